"""What an analysis has computed so far, kept beside its result: a kill loses seconds, not hours."""
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import write_npz
from files.reading import read_npz


SECONDS = 10            # between two times at which it is written


class Unfinished:
    """{key: {name: array}}, a dict that is kept in unfinished.npz beside `path` until it is left
    without an exception. What was computed with other settings is not taken over.

    settings: a text that tells them apart."""

    def __init__(self, path, settings):
        self.path = Path(path).with_name("unfinished.npz")
        self.settings, self.found, self.written = settings, {}, time.monotonic()

    def __enter__(self):
        try:
            arrays = read_npz(self.path) if self.path.exists() else {}
        except (ValueError, OSError):
            arrays = {}                         # it is only there to save time
        if arrays and arrays.pop("settings", None) == self.settings:
            for name, array in arrays.items():
                key, _, name = name.partition("/")
                self.found.setdefault(key, {})[name] = array
            tqdm.write(f"{self.path}: goes on with {len(self.found)} parts that are done")
        return self

    def __contains__(self, key):
        return str(key) in self.found

    def __getitem__(self, key):
        return self.found[str(key)]

    def __setitem__(self, key, arrays):
        self.found[str(key)] = arrays
        if time.monotonic() > self.written + SECONDS:
            self._write()

    def _write(self):
        arrays = {f"{key}/{name}": array for key, one in self.found.items()
                  for name, array in one.items()}
        write_npz(self.path, settings=np.array(self.settings), **arrays)
        self.written = time.monotonic()

    def __exit__(self, kind, *_):
        if kind is None:
            self.path.unlink(missing_ok=True)
        elif self.found:
            self._write()
