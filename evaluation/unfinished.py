"""What an analysis has computed so far, kept beside its result: a kill loses seconds, not hours."""
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import write_npz
from files.reading import read_npz


UNFINISHED = "unfinished.npz"
SECONDS = 10            # between two times at which it is written


class Unfinished:
    """{key: {name: array}}, a dict that is kept in unfinished.npz beside `path` until it is left
    without an exception. What was computed with other settings is not taken over.

    settings: a text that tells them apart. Raises OSError and ValueError, at once if nothing can be
    written there."""

    def __init__(self, path, settings):
        self.path, self.result = Path(path).with_name(UNFINISHED), Path(path)
        self.settings, self.found = settings, {}

    def __enter__(self):
        for path in (self.path, self.result):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: is no file, and results go there; remove it, or choose "
                                 "another --energy.name")
        arrays = {}
        if self.path.exists():
            try:
                arrays = read_npz(self.path)
            except (ValueError, OSError) as error:      # it is only there to save time
                tqdm.write(f"{error}; what it held is computed again")
        if arrays and str(arrays.pop("settings", None)) == self.settings:
            for name, array in arrays.items():
                key, _, name = name.partition("/")
                self.found.setdefault(key, {})[name] = array
            if self.found:
                tqdm.write(f"{self.path}: goes on with {len(self.found)} parts that are done")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Before anything is computed: a full disk is found now, and others see whose folder it is.
        self._write()
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
            return
        # The first error is the one to be told.
        with suppress(OSError):
            self._write()
