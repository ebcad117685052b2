"""Packages as export.py writes them, zipped or unpacked: comparing them with their manifest."""
import hashlib
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from files.reading import (
    JSON_LIMIT,
    check_expanded,
    check_fields,
    file_size,
    is_inside,
    one_line,
    open_member,
    open_zip,
    parse_json,
    read_bytes,
    shown,
)


# manifest.json, and what packages of earlier versions do not have
FIELDS = {"base_fingerprint": str, "steps": [int], "trajectories": int, "camera": str,
          "recorded_frames_per_step": int, "sha256": {str: str}}
LATER_FIELDS = {"base": str, "made": str, "bytes": {str: int}}

# Beside an unpacked package: what the notebook reads and writes, and copies of it.
BESIDE = (".zip", ".pt", ".safetensors", ".ipynb")

AGAIN = "unpack or copy the package again"


def verify(path):
    """Compares a package with its manifest, and returns that.

    Raises ValueError with the file if one is missing, altered or cut short, or not in the manifest:
    it would be imported or measured as if it belonged to the package."""
    path = Path(path)
    where = f"{path}/manifest.json"
    try:
        if path.is_dir():
            manifest = _read_manifest(read_bytes(where, JSON_LIMIT), where)
            sizes = _sizes_in_folder(path, manifest["sha256"])
            _compare(path, manifest, sizes, lambda name: open(path / name, "rb"))
            return manifest
        with open_zip(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()
                     if not info.filename.endswith("/")}
            check_expanded(path, sum(sizes.values()))
            if sizes.get("manifest.json", 0) > JSON_LIMIT:
                raise ValueError(f"{where}: has more than {JSON_LIMIT:,} bytes")
            read = partial(_open_in_zip, archive)
            with read("manifest.json") as stream:
                manifest = _read_manifest(stream.read(), where)
            _compare(path, manifest, sizes, read)
            return manifest
    except (FileNotFoundError, KeyError) as error:
        missing = Path(getattr(error, "filename", "") or "manifest.json").name
        raise ValueError(f"{path}: not a whole package (no {missing}); {AGAIN}") from None


@contextmanager
def _open_in_zip(archive, name):
    with open_member(archive, name) as stream, one_line(archive.filename):
        yield stream


def _read_manifest(data, where):
    manifest = parse_json(data, where)
    check_fields(manifest, FIELDS, where, LATER_FIELDS)
    for name in manifest["sha256"]:
        if not is_inside(name) or name == "manifest.json":
            raise ValueError(f"{where}: {shown(name)} is no name of a file in a package; {AGAIN}")
    return manifest


def _sizes_in_folder(folder, expected):
    """{name: bytes} of the files in an unpacked package that could be taken for its own: all at
    the top and in its own folders, and modules in others."""
    own = {PurePosixPath(name).parts[0] for name in expected if "/" in name}
    names = []
    for top in sorted(os.listdir(folder)):
        if top.startswith((".", "__pycache__")):
            continue
        if top in own:
            for place, folders, files in os.walk(folder / top):
                folders[:] = [name for name in folders
                              if not name.startswith(".") and name != "__pycache__"]
                place = Path(place).relative_to(folder)
                names += [(place / name).as_posix() for name in files if not name.startswith(".")]
        elif not (folder / top).is_dir():
            names += [top] if top in expected or not top.endswith(BESIDE) else []
        elif (folder / top / "__init__.py").exists():
            names.append(f"{top}/__init__.py")
    return {name: file_size(folder / name) for name in names}


def _compare(path, manifest, sizes, read):
    """sizes: {name: bytes} of what is there; read(name): a context of a stream. Raises ValueError
    with the first difference, FileNotFoundError."""
    expected = manifest["sha256"]
    missing = sorted(expected.keys() - sizes.keys())
    if missing:
        raise ValueError(f"{path}: not a whole package (no {_some(missing)}); {AGAIN}")
    extra = sorted(sizes.keys() - expected.keys() - {"manifest.json"})
    if extra:
        raise ValueError(f"{path}: holds {_some(extra)}, which the manifest does not name; move "
                         f"it away, or {AGAIN}")
    wanted_sizes = manifest.get("bytes", sizes)
    for name, digest in expected.items():
        found = hashlib.sha256()
        with read(name) as stream:
            # a size that differs is enough
            if sizes[name] == wanted_sizes.get(name):
                for chunk in iter(partial(stream.read, 1 << 20), b""):
                    found.update(chunk)
        if found.hexdigest() != digest:
            raise ValueError(f"{path}: {name} was altered; {AGAIN}")


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
