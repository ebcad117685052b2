"""Good stores of latents, packages and landscapes, which earlier versions wrote, and 110 ways to
spoil them or to write them otherwise.

STORES, PACKAGES and LANDSCAPES are {name: (spoil(path), what is said)}: words of the error, or
RIGHT. A package is spoiled as a .zip (PACKAGES) or unpacked (UNPACKED)."""
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from stress.spoiled_npz import npy


RIGHT = ""
OLD = Path(__file__).resolve().parents[1] / "old_files"
AGAIN = "run latents.py again"
DEEP = b"[" * 100_000 + b"]" * 100_000


def good_store(folder):
    return shutil.copytree(OLD / "latents", folder / "store")


def good_package(folder):
    return Path(shutil.copy(OLD / "checkpoints_for_colab.zip", folder))


def good_folder(folder):
    with zipfile.ZipFile(OLD / "checkpoints_for_colab.zip") as archive:
        archive.extractall(folder / "package")
    return folder / "package"


def good_landscapes(folder):
    return Path(shutil.copy(OLD / "landscapes.npz", folder))


# A file anew

def replaced(name, make):
    """make(path) or bytes, in place of a file of a folder; "" for the path itself."""
    def spoil(path):
        path = path / name if name else path
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(make) if isinstance(make, bytes) else make(path)
    return spoil


def changed(name, change):
    """change(bytes) -> bytes of a file of a folder"""
    def spoil(path):
        path = path / name if name else path
        path.write_bytes(change(path.read_bytes()))
    return spoil


def edited(name="store.json", **values):
    """Fields of a JSON file; `...` removes one."""
    def change(data):
        whole = json.loads(data) | values
        return json.dumps({key: value for key, value in whole.items() if value is not ...}).encode()
    return changed(name, change)


def rewritten(name="", **values):
    """Arrays of an .npz file, given or computed from the old one; None removes one."""
    def spoil(path):
        path = path / name if name else path
        with np.load(path) as file:
            arrays = dict(file)
        for key, value in values.items():
            arrays[key] = value(arrays[key]) if callable(value) else value
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return spoil


def index(**values):
    return rewritten("00000.npz", **values)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(10 ** 12)


def file_kinds(name, words):
    """What is no file of the right kind."""
    return {
        f"{name}: a folder": (replaced(name, os.mkdir), words),
        f"{name}: a pipe": (replaced(name, os.mkfifo), words),
        f"{name}: a device": (replaced(name, lambda path: os.symlink("/dev/zero", path)), words),
        f"{name}: a link to nowhere": (replaced(name, lambda path: os.symlink("/nowhere", path)),
                                       None),
        f"{name}: empty": (replaced(name, b""), words),
        f"{name}: zeros": (replaced(name, bytes(5000)), words),
        f"{name}: half": (changed(name, lambda data: data[:len(data) // 2]), words),
    }


def json_kinds(name):
    """What is no JSON object."""
    return {
        f"{name}: not UTF-8": (replaced(name, b"\xff\xfe\0"), "not text in UTF-8"),
        f"{name}: a list": (replaced(name, b"[1, 2]"), "holds [1, 2], expected an object"),
        f"{name}: nested": (replaced(name, DEEP), "nested too deeply"),
        f"{name}: nested in an object": (replaced(name, b'{"a":' + DEEP + b"}"), "nested too"),
        f"{name}: a number of 9,000 digits": (replaced(name, b'{"a": ' + b"9" * 9000 + b"}"),
                                              "not whole JSON"),
        f"{name}: 100 MB": (replaced(name, b" " * 100_000_000 + b"{}"), "bytes, more than"),
        f"{name}: 1 TB of nothing": (replaced(name, sparse), "bytes, more than"),
        f"{name}: an empty object": (replaced(name, b"{}"), "has no "),
        f"{name}: with a byte order mark": (changed(name, lambda data: b"\xef\xbb\xbf" + data),
                                            RIGHT),
    }


# Stores

STORES = {
    "a good one": (lambda path: None, RIGHT),
    "another field": (edited(made="2027"), RIGHT),
    "data.path of today": (edited(path="/elsewhere", keys={}), "was made from /elsewhere"),
    "data.keys of later": (edited(keys={"later": "x"}), RIGHT),
    **file_kinds("store.json", "store.json"),
    **json_kinds("store.json"),
    **{f"no {key}": (edited(**{key: ...}), f"has no '{key}'")
       for key in ("dtype", "files", "tokens", "frame_step", "encoder", "only_success")},
    "tokens of text": (edited(tokens="16"), "tokens is '16', expected a whole number"),
    "tokens that are true": (edited(tokens=True), "tokens is True"),
    "no token": (edited(tokens=0), "tokens is 0"),
    "10^12 tokens": (edited(tokens=10 ** 12), "tokens is 1000000000000"),
    "another number of tokens": (edited(tokens=15), AGAIN),
    "a width of 10^30": (edited(width=10 ** 30), "width is 1000000"),
    "a negative width": (edited(width=-52), "width is -52"),
    "frame_step 0": (edited(frame_step=0), "frame_step is 0"),
    "another frame_step": (edited(frame_step=2), "another frame_step"),
    "another camera": (edited(camera="x"), "another camera"),
    "another key": (edited(keys={"pose": "steps/action"}), "another keys.pose"),
    "keys of numbers": (edited(keys={"pose": 1}), "keys is {'pose': 1}"),
    "another image_size": (edited(image_size=256), "another image_size"),
    "another encoder": (edited(encoder="0" * 16), "another encoder"),
    "an unknown dtype": (edited(dtype="int8"), "dtype is 'int8'"),
    "a dtype that is a list": (edited(dtype=["bf16"]), "dtype is ['bf16']"),
    "another dtype": (edited(dtype="fp32"), AGAIN),
    "only_success as text": (edited(only_success="yes"), "only_success is 'yes'"),
    "no files": (edited(files=[]), "files is []"),
    "files that are a number": (edited(files=3), "files is 3, expected a list"),
    "files of numbers": (edited(files=[1, 2, 3]), "files is [1, 2, 3]"),
    "a file more": (edited(files=["a", "b", "c", "d"]), "1 of 4 files are missing"),
    **file_kinds("00000.npz", AGAIN),
    **{f"an index without {key}": (index(**{key: None}), AGAIN)
       for key in ("rows", "poses", "names", "sha256", "damaged")},
    "an extra array": (index(extra=np.zeros(3)), RIGHT),
    "negative rows": (index(rows=lambda a: -a), AGAIN),
    "rows of text": (index(rows=lambda a: a.astype(str)), AGAIN),
    "rows of floats": (index(rows=lambda a: a + 0.5), AGAIN),
    "rows that overflow": (index(rows=lambda a: a * 0 + 2 ** 62), AGAIN),
    "rows of two axes": (index(rows=lambda a: a[None]), AGAIN),
    "rows of two episodes": (index(rows=lambda a: np.tile(a // 2, 2)), AGAIN),
    "no row of a success": (index(rows=lambda a: a * 0), AGAIN),
    "longer than its poses": (index(lengths=lambda a: a + 1), AGAIN),
    "a negative length": (index(lengths=lambda a: -a), AGAIN),
    "poses of one axis": (index(poses=lambda a: a.ravel()), AGAIN),
    "poses of text": (index(poses=lambda a: a.astype(str)), AGAIN),
    "poses of objects": (index(poses=lambda a: a.astype(object)), AGAIN),
    "poses that are not finite": (index(poses=lambda a: a * np.nan), None),
    "10^12 poses": (lambda path: add_member(path / "00000.npz", "poses",
                                            npy((10 ** 12, 7), "<f8", b"")), AGAIN),
    "6 GB of velocities": (lambda path: add_member(path / "00000.npz", "joint_velocity", npy(
        (120_000_000, 7), "<f8", bytes(100))), AGAIN),
    "names of bytes": (index(names=lambda a: a.astype("S")), AGAIN),
    "names that are none": (lambda path: add_member(path / "00000.npz", "names", npy(
        (1,), "<U1", b"\0\0\xff\xff")), AGAIN),
    "success as text": (index(success=lambda a: a.astype(str)), AGAIN),
    "a failure with latents": (index(success=lambda a: ~a), None),
    "two fields of a damaged one": (index(damaged=np.array(["a", "b"])), AGAIN),
    "a list of checksums": (index(sha256=np.array(["a", "b"])), AGAIN),
    "latents: a byte more": (changed("00000.bin", lambda data: data + b"?"), AGAIN),
    "latents: a folder": (replaced("00000.bin", os.mkdir), AGAIN),
    "latents: a pipe": (replaced("00000.bin", os.mkfifo), AGAIN),
    "latents: missing": (replaced("00000.bin", lambda path: None), AGAIN),
    "latents that are not finite": (changed("00000.bin", lambda data: b"\xff" * len(data)),
                                    "not finite"),
}


def add_member(path, name, data):
    """Replaces an array of an .npz file by the bytes of an .npy file."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file if key != name}
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", data)


# Packages

def repacked(change, method=zipfile.ZIP_DEFLATED):
    """change({name: bytes}) edits it in place."""
    def spoil(path):
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        change(contents)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
    return spoil


def manifest(**values):
    """Fields of the manifest; a function gets the old value, `...` removes a field."""
    def change(contents):
        whole = json.loads(contents["manifest.json"])
        for key, value in values.items():
            whole[key] = value(whole[key]) if callable(value) else value
        whole = {key: value for key, value in whole.items() if value is not ...}
        contents["manifest.json"] = json.dumps(whole).encode()
    return change


def in_folder(change):
    """A change of `repacked`, to an unpacked package: of the manifest alone."""
    def spoil(path):
        contents = {"manifest.json": (path / "manifest.json").read_bytes()}
        change(contents)
        (path / "manifest.json").write_bytes(contents["manifest.json"])
    return spoil


def twice(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("energy.py", b"import os")


def encrypted(data):
    """The mark of an encrypted member, wherever one is."""
    data = bytearray(data)
    for sign, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = data.find(sign)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(sign, at + 4)
    return bytes(data)


def nameless(path):
    """Its last file, of which only the list of files gives the name."""
    twice(path)
    data = bytearray(path.read_bytes())
    at, name = data.rindex(b"PK\1\2"), b"energy.py"
    data[at + 46:at + 46 + len(name)], data[at + 28:at + 30] = b"", b"\0\0"
    end = data.rindex(b"PK\5\6") + 12
    size = int.from_bytes(data[end:end + 4], "little") - len(name)
    data[end:end + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)


def also_named(name):
    return manifest(sha256=lambda sums: sums | {name: "0" * 64})


DIGESTS = {
    "no digests": (manifest(sha256=...), "has no 'sha256'"),
    "digests in a list": (manifest(sha256=[]), "sha256 is [], expected an object"),
    "digests that are numbers": (manifest(sha256=lambda sums: dict.fromkeys(sums, 1)), "sha256 is"),
    "digests of text": (manifest(sha256=lambda sums: dict.fromkeys(sums, "?")), "was altered"),
    "steps that are text": (manifest(steps="0, 2"), "steps is '0, 2', expected a list"),
    "steps of text": (manifest(steps=["0", "2"]), "steps is ['0', '2']"),
    "no base": (manifest(base_fingerprint=None), "base_fingerprint is None"),
    "trajectories not finite": (manifest(trajectories=float("nan")), "trajectories is nan"),
    "sizes of text": (manifest(bytes={"energy.py": "1"}), "bytes is {'energy.py': '1'}"),
    "other sizes": (manifest(bytes={}), "was altered"),
    "a file too many named": (also_named("more.py"), "no 'more.py'"),
    "a name outside": (also_named("../more.py"), "'../more.py' is no name of a file in a package"),
    "an absolute name": (also_named("/etc/passwd"), "'/etc/passwd' is no name"),
    "a name with a zero byte": (also_named("a\0b"), "'a\\x00b' is no name"),
    "half a character in a name": (also_named("a\ud800"), "is no name"),
    "an empty name": (also_named(""), "'' is no name"),
    "itself named": (also_named("manifest.json"), "'manifest.json' is no name"),
}

PACKAGES = {
    "a good one": (lambda path: None, RIGHT),
    "stored": (repacked(lambda contents: None, zipfile.ZIP_STORED), RIGHT),
    "with folders": (repacked(lambda contents: contents.update({"adapters/": b""})), RIGHT),
    **{name: (repacked(change), words) for name, (change, words) in DIGESTS.items()},
    "an altered file": (repacked(lambda c: c.update({"lora.py": b"?" + c["lora.py"][1:]})),
                        "lora.py was altered"),
    "a longer file": (repacked(lambda c: c.update({"lora.py": c["lora.py"] + b"\n"})),
                      "lora.py was altered"),
    "a file less": (repacked(lambda c: c.pop("lora.py")), "no 'lora.py'"),
    "a file more": (repacked(lambda c: c.update({"numpy.py": b""})), "holds 'numpy.py'"),
    "a file outside": (repacked(lambda c: c.update({"../x.py": b""})), "holds '../x.py'"),
    "a file without a name": (nameless, "holds ''"),
    "no manifest": (repacked(lambda c: c.pop("manifest.json")), "no manifest.json"),
    "a manifest of 100 MB": (repacked(lambda c: c.update({"manifest.json": b" " * 10 ** 8})),
                             "more than"),
    "a bomb": (repacked(lambda c: c.update({"lora.py": bytes(1_200_000_000)})), "expands to 1,2"),
    "LZMA": (repacked(lambda c: None, zipfile.ZIP_LZMA), "compressed by method 14"),
    "a file twice": (twice, "2 files named 'energy.py'"),
    "encrypted": (changed("", encrypted), "without a password"),
    "a nested manifest": (repacked(lambda c: c.update({"manifest.json": DEEP})), "nested too"),
    **{name: (spoil, "checkpoints_for_colab.zip") for name, (spoil, _) in file_kinds("", "").items()
       if name != ": a folder"},
    "an empty folder": (replaced("", os.mkdir), "no manifest.json"),
}


def written(name, data=b""):
    def spoil(path):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return spoil


UNPACKED = {
    "a good one": (lambda path: None, RIGHT),
    **{name: (in_folder(change), words) for name, (change, words) in DIGESTS.items()},
    **{f"beside it: {name}": (written(name), RIGHT) for name in (
        "results/landscapes.npz", "results.zip", "__pycache__/energy.cpython-312.pyc",
        "vjepa2_src/__pycache__/blocks.cpython-312.pyc", ".ipynb_checkpoints/colab.ipynb",
        "base.safetensors", "vjepa2-ac-vitg.pt", "copy.ipynb", "checkpoints_for_colab.zip",
        "sample_data/README.md", ".DS_Store", "adapters/.DS_Store")},
    **{f"among it: {name}": (written(name), f"holds '{name}'") for name in (
        "numpy.py", "torch/__init__.py", "trajectories/999.npz", "vjepa2_src/new.py", "notes.txt",
        "adapters/step_9/adapter_model.safetensors")},
    "a pipe among it": (lambda path: os.mkfifo(path / "trajectories/001.npz"), "a device, pipe"),
    **file_kinds("lora.py", "lora.py"),
    **{name: case for name, case in file_kinds("manifest.json", "manifest.json").items()},
    **json_kinds("manifest.json"),
}


# Landscapes

def at(place, value):
    """One value of an array."""
    def change(array):
        array = array.copy()
        array[place] = value
        return array
    return change


LANDSCAPES = {
    "good ones": (lambda path: None, RIGHT),
    "an extra array": (rewritten(extra=np.zeros(3)), RIGHT),
    "no frames": (rewritten(frames=None), RIGHT),
    "float32": (rewritten(states=lambda a: a.astype(np.float32)), RIGHT),
    "no planner": (rewritten(cem_moves=None, cem_energy=None, cem_seconds=None, true_moves=None),
                   RIGHT),
    "half a planner": (rewritten(cem_energy=None), "has no array cem_energy"),
    **{f"no {name}": (rewritten(**{name: None}), f"has no array {name}") for name in (
        "checkpoints", "planes", "energy_xy", "actions_xy", "radius", "device", "negatives")},
    "an object": (rewritten(device=np.array({}, object)), "holds Python objects"),
    "energies of text": (rewritten(energy_xy=lambda a: a.astype(str)), "energy_xy is <U"),
    "complex energies": (rewritten(energy_xy=lambda a: a + 1j), "energy_xy is complex"),
    "energies of one axis": (rewritten(energy_xy=lambda a: a.ravel()), "energy_xy is [100]"),
    "a checkpoint more": (rewritten(energy_xy=lambda a: np.concatenate([a, a[:1]])),
                          "energy_xy is [3, 2, 25], expected [C, P, K] with C = 2"),
    "a pair less": (rewritten(episodes=lambda a: a[:1]), "with P = 1"),
    "no pair": (rewritten(**{name: (lambda a, axis=axis: a.take([], axis)) for name, axis in {
        "episodes": 0, "states": 0, "true_actions": 0, "energy_true": 1, "energy_zero": 1,
        "negatives": 0, "energy_negatives": 1, "loss": 1, "shuffled": 0, "loss_shuffled": 1,
        "loss_zero": 1, "horizon_l1": 1, "horizon_copy": 0, "oracle_actions": 0, "frames": 0,
        "oracle_energy": 0, "oracle_truth": 0, "actions_xy": 0, "energy_xy": 1, "cem_moves": 1,
        "cem_energy": 1, "cem_seconds": 1, "true_moves": 0}.items()}), "P = 0, expected 1"),
    "poses of 6 numbers": (rewritten(states=lambda a: a[..., :6]), "states is [2, 4, 6]"),
    "an energy that is not finite": (rewritten(energy_xy=at((1, 0, 3), np.nan)),
                                     "energy_xy of step_4 is nan at [1, 0, 3]"),
    "an infinite loss": (rewritten(loss=at((0, 1), np.inf)), "loss of baseline is inf at [0, 1]"),
    "an energy of 1e30": (rewritten(energy_zero=at((0, 0), 1e30)), "energy_zero of baseline is"),
    "an action that is not finite": (rewritten(true_actions=at((0, 0), np.nan)), "true_actions is"),
    "shuffled actions that are undefined": (rewritten(shuffled=lambda a: a * np.nan), RIGHT),
    **{p: (rewritten(planes=np.array([p])), f"planes holds '{p}'") for p in ("xw", "x", "yx")},
    "a plane twice": (rewritten(planes=np.array(["xy", "xy"])), "planes holds a name twice"),
    "a plane that is not there": (rewritten(planes=np.array(["xz"])), "has no array actions_xz"),
    "no plane": (rewritten(planes=np.array([], "U2")), "n = 0, expected 1"),
    "a checkpoint twice": (rewritten(checkpoints=lambda a: a[[0, 0]]), "checkpoints holds a name"),
    "a name of 10,000 characters": (rewritten(checkpoints=np.array(["baseline", "a" * 10_000])),
                                    "which is no name"),
    "a name with formulas": (rewritten(checkpoints=np.array(["baseline", "a$b_{$\\x"])), RIGHT),
    "a grid that is none": (rewritten(actions_xy=at((0, 3, 0), 0.5)), "is no grid"),
    "a grid in another order": (rewritten(actions_xy=lambda a: a[:, ::-1]), "is no grid"),
    "24 points": (rewritten(actions_xy=lambda a: a[:, :24], energy_xy=lambda a: a[..., :24]),
                  "is no grid"),
    "a radius of 0": (rewritten(radius=np.array(0.0)), "radius is 0.0"),
    "a radius of text": (rewritten(radius=np.array("1 cm")), "radius is <U4"),
    "two radii": (rewritten(radius=np.ones(2)), "radius is [2], expected []"),
    "steps of floats": (rewritten(steps=np.array(1.5)), "steps is float64, expected int"),
    "frames of floats": (rewritten(frames=lambda a: a / 255), "frames is float64"),
    "10^12 energies": (lambda path: add_member(path, "energy_xy", npy(
        (2, 2, 10 ** 12), "<f4", b"")), "claims float32"),
    **file_kinds("", "landscapes.npz"),
}
