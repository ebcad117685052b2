"""Damages of a cache: functions of its folder and of a random generator."""
import json
import os
import zipfile
from pathlib import Path

import numpy as np


def files_of(folder, random, ending="*"):
    name = random.choice(("wrist_image_left", "exterior_image_1_left")) if ending == "any" else (
        "wrist_image_left")
    return sorted(folder.glob(f"{name}-*/*.{'*' if ending == 'any' else ending}"))


def bytes_altered(folder, random):
    path = random.choice([*files_of(folder, random, "npz"), *files_of(folder, random, "images")])
    data = bytearray(path.read_bytes())
    how = random.choice(("flip", "cut", "zeros", "longer", "empty", "random", "inserted"))
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2)) if data else (0, 0)
    if how == "flip" and data:
        data[min(a, len(data) - 1)] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[a:]
    elif how == "zeros":
        data[a:b] = bytes(b - a)
    elif how == "longer":
        data += random.randbytes(20)
    elif how == "random":
        data[a:b] = random.randbytes(b - a)
    elif how == "inserted":
        data[a:a] = random.randbytes(5)
    path.write_bytes(b"" if how == "empty" else data)
    return f"{path.suffix} {how}"


def exchanged(folder, random):
    """Files of two shards, or of two cameras: both, or one of them."""
    endings = random.choice((("npz",), ("images",), ("npz", "images")))
    a = random.choice(files_of(folder, random, "npz"))
    same = [*files_of(folder, random, "npz"), *folder.glob("exterior*/*.npz")]
    b = random.choice([path for path in same if path != a])
    for ending in endings:
        one, other = a.with_suffix(f".{ending}"), b.with_suffix(f".{ending}")
        one.rename(folder / "between")
        other.rename(one)
        (folder / "between").rename(other)
    return f"{' and '.join(endings)} exchanged"


def index_changed(folder, random):
    """Odd arrays, the sums of the .zip being right."""
    path = random.choice(files_of(folder, random, "npz"))
    arrays = dict(np.load(path))
    episodes = json.loads(arrays["episodes"].tobytes())
    how = random.choice(("number", "dropped", "doubled", "order", "type", "dtype", "shape",
                         "pickle", "array", "sizes", "crcs", "source", "deep", "text"))
    one = random.choice(episodes)
    if how == "number":
        numbers = -1, 0, 10 ** 30, -10 ** 30, 2 ** 63, 1, 3
        one[random.choice((3, 5, 6, 7))] = random.choice(numbers)
    elif how == "dropped":
        episodes.remove(one)
    elif how == "doubled":
        episodes.append(one)
    elif how == "order":            # of the same lengths, told by nothing but names
        one[2] = "a reason"
    elif how == "type":
        one[random.randrange(8)] = random.choice((None, 1.5, [], {}, True, "x"))
    arrays["episodes"] = np.frombuffer(json.dumps(episodes).encode(), np.uint8)
    name = random.choice(sorted(arrays))
    if how == "dtype" and name != "source":
        arrays[name] = arrays[name].astype(random.choice((np.float16, np.int8, np.complex64)))
    elif how == "shape":
        arrays[name] = arrays[name][None]
    elif how == "pickle":
        arrays[name] = np.array([{}], object)
    elif how == "array":
        del arrays[name]
    elif how == "sizes":
        a = arrays["sizes"]
        a[:2] = random.choice(((a[0] + 1, a[1] - 1), (-1, a[0] + a[1] + 1), (2 ** 62, 2 ** 62)))
    elif how == "crcs":
        arrays["crcs"] = random.choice((arrays["crcs"][::-1], np.zeros_like(arrays["crcs"])))
    elif how == "source":
        arrays["source"] = np.array(random.choice(("", "0 0", "x" * 10000)))
    elif how == "deep":
        arrays["episodes"] = np.frombuffer(b"[" * 100000, np.uint8)
    elif how == "text":
        arrays["episodes"] = np.frombuffer(b"\xff\xfe[]", np.uint8)
    np.savez(path, **arrays)
    return f"index {how}"


def odd_file(folder, random):
    ending = random.choice(("npz", "images", "lock", "images.tmp", "npz.tmp"))
    path = Path(f"{random.choice(files_of(folder, random, 'npz'))}"[:-3] + ending)
    how = random.choice(("gone", "folder", "pipe", "link to nothing", "link to another"))
    if ending == "lock" and how == "pipe":          # as slow as the one at its other end
        how = "gone"
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to nothing":
        path.symlink_to("nothing")
    elif how == "link to another":
        path.symlink_to(random.choice(files_of(folder, random, "images") or [folder]))
    return f"{ending} {how}"


def all_gone(folder, random):
    for path in files_of(folder, random, random.choice(("npz", "images"))):
        path.unlink()
    return "all gone"


def folder_gone(folder, random):
    folder.rename(folder.with_name(f"gone-{random.random()}"))
    return "folder gone"


DAMAGES = [*[bytes_altered] * 4, exchanged, *[index_changed] * 2, odd_file, all_gone, folder_gone]


def damage(folder, random):
    """Damages a cache -> what was done."""
    done = []
    for how in random.choices(DAMAGES, k=random.randint(1, 3)):
        try:
            done.append(how(folder, random))
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            done.append(f"({how.__name__}: {type(error).__name__})")    # of what is damaged already
        if how is folder_gone:
            break
    return ", ".join(done)
