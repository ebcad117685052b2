"""A good episode in an .npz file, and 90 ways to spoil it or to write it otherwise.

EPISODES is {name: (write(folder), what is said)}: words of the one line with which it is left out,
RIGHT if its clips are read, None if neither is sure."""
import io
import math
import os
import struct
import zipfile
import zlib

import numpy as np


RIGHT = ""
N = 8                                   # frames of an episode


def arrays(**changes):
    """The arrays of a good episode; None leaves one out."""
    random = np.random.default_rng(0)
    good = {"observations": random.integers(0, 256, (N, 16, 24, 3)).astype(np.uint8),
            "states": random.uniform(-0.1, 0.1, (N, 7)).cumsum(0) * 0.1}
    return {key: value for key, value in (good | changes).items() if value is not None}


def episode(**changes):
    def write(folder):
        np.savez(folder / "odd.npz", allow_pickle=True, **arrays(**changes))
    return write


def images(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


# Files by hand

def npy(shape, descr="|u1", data=None, version=1, fortran=False, header=None):
    """Bytes of an .npy file with any header; without `data`, as many zeros as it says."""
    text = header or repr({"descr": descr, "fortran_order": fortran, "shape": shape})
    text = text.encode() if isinstance(text, str) else text
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    head = b"\x93NUMPY" + bytes([version, 0]) + length + text
    if data is None:
        data = bytes(math.prod(shape) * np.dtype(descr).itemsize)
    return head + data


def saved(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def members(method=zipfile.ZIP_STORED, twice=(), **contents):
    """A .zip of these contents over those of a good episode."""
    def write(folder):
        whole = {key: saved(value) for key, value in arrays().items()} | contents
        with zipfile.ZipFile(folder / "odd.npz", "w", method) as archive:
            for name, data in whole.items():
                archive.writestr(f"{name}.npy", data)
            for name in twice:
                archive.writestr(f"{name}.npy", whole[name])
    return write


def edited(change, compressed=False):
    """change(bytes of a good file) -> bytes"""
    def write(folder):
        data = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(data, **arrays())
        (folder / "odd.npz").write_bytes(change(bytearray(data.getvalue())))
    return write


def forged(offset, value, form="<I", everywhere=False):
    """A number of the zip's list of members, by its offset in the entry of the images, overwritten;
    everywhere: in front of their data as well."""
    def change(data):
        struct.pack_into(form, data, data.index(b"PK\1\2") + offset, value)
        if everywhere:
            struct.pack_into(form, data, offset - 2, value)
        return data
    return edited(change)


def zeros(name, header, n):
    """A .zip with one member: a header and n zeros, deflated to a thousandth without making
    them."""
    block = 1 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    one = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    blocks, rest = divmod(n, block)
    end = packer.compress(bytes(rest)) + packer.flush()
    crc = zlib.crc32(header)
    for _ in range(blocks):
        crc = zlib.crc32(bytes(block), crc)
    crc = zlib.crc32(bytes(rest), crc)
    data, size = start + one * blocks + end, len(header) + n
    entry = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 33, crc, 0xffffffff, 0xffffffff, len(name), 20)
    wide = struct.pack("<HHQQ", 1, 16, size, len(data))
    local = b"PK\3\4" + entry + name + wide + data
    listed = (b"PK\1\2" + struct.pack("<H", 45) + entry + struct.pack("<HHHII", 0, 0, 0, 0, 0)
              + name + wide)
    return local, listed


def zero_files(*files):
    """files: (name, header, number of zeros)"""
    def write(folder):
        parts, lists = b"", b""
        for name, header, n in files:
            local, listed = zeros(name, header, n)
            lists += listed[:42] + struct.pack("<I", len(parts)) + listed[46:]
            parts += local
        n = len(files)
        end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, len(lists), len(parts), 0)
        (folder / "odd.npz").write_bytes(parts + lists + end)
    return write


def bomb(*shape, states=None):
    """Observations of zeros; `states` of the same number unless given."""
    n = states or shape[0]
    return zero_files((b"observations.npy", npy(shape, data=b""), math.prod(shape)),
                      (b"states.npy", npy((n, 7), "<f8", b""), n * 56))


def many_members(n):
    """A .zip of nothing but a list of n empty members."""
    def write(folder):
        number = struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 33, *[0] * 3, 8, *[0] * 6)
        data = b"".join(b"PK\1\2" + number + b"%08d" % i for i in range(n))
        end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, n, n, len(data), 0)
        end += b"PK\6\7" + struct.pack("<IQI", 0, len(data), 1)
        end += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, *[0xffffffff] * 2, 0)
        (folder / "odd.npz").write_bytes(data + end)
    return write


def in_place_of_the_file(make):
    def write(folder):
        make(folder / "odd.npz")
    return write


def link_to_a_good_one(folder):
    (folder / "elsewhere").mkdir()
    episode()(folder / "elsewhere")
    os.symlink(folder / "elsewhere/odd.npz", folder / "odd.npz")


def named(name):
    def write(folder):
        episode()(folder)
        os.rename(os.fsencode(folder / "odd.npz"), os.fsencode(folder) + b"/" + name)
    return write


F = np.asfortranarray
OBSERVATIONS, STATES = arrays()["observations"], arrays()["states"]
DEEP = "{'descr': '|u1', 'fortran_order': False, 'shape': " + "(" * 3000 + ")" * 3000 + "}"

EPISODES = {
    # Written otherwise
    "a good one": (episode(), RIGHT),
    "a batch axis": (episode(observations=OBSERVATIONS[None], states=STATES[None]), RIGHT),
    "a batch axis of the images alone": (episode(observations=OBSERVATIONS[None]), RIGHT),
    "column-major images": (episode(observations=F(OBSERVATIONS)), RIGHT),
    "column-major images, batch axis": (episode(observations=F(OBSERVATIONS[None])), RIGHT),
    "column-major states": (episode(states=F(STATES)), RIGHT),
    "big-endian states": (episode(states=STATES.astype(">f8")), RIGHT),
    "float16 states": (episode(states=STATES.astype(np.float16)), RIGHT),
    "long double states": (episode(states=STATES.astype(np.longdouble)), RIGHT),
    "images of 1 pixel": (episode(observations=images(N, 1, 1, 3)), "of one colour"),
    "images of 1 × 500 pixels": (episode(observations=images(N, 1, 500, 3)), "of one colour"),
    "bytes as episode": (episode(episode=np.array(b"one")), RIGHT),
    "a list of one episode": (episode(episode=np.array(["one"])), RIGHT),
    "a number as episode": (episode(episode=np.array(7)), RIGHT),
    "an empty episode": (episode(episode=np.array("")), RIGHT),
    "a pickled extra array": (episode(info=np.array({"a": 1}, object)), RIGHT),
    "an extra array that is no array": (members(extra=b"not an array"), RIGHT),
    "a header of version 2": (members(states=npy((N, 7), "<f8", version=2)), RIGHT),
    "garbage at the end": (edited(lambda data: data + bytes(1000)), RIGHT),
    "garbage at the beginning": (edited(lambda data: bytes(1000) + data), RIGHT),
    "a comment": (edited(lambda data: data[:-2] + b"\5\0hello"), RIGHT),
    "a link": (link_to_a_good_one, RIGHT),
    # States
    "no states": (episode(states=None), "has no array 'states'"),
    "states of objects": (episode(states=STATES.astype(object)), "holds Python objects"),
    "states of text": (episode(states=STATES.astype("U9")), "states are <U9"),
    "complex states": (episode(states=STATES.astype(complex)), "states are complex128"),
    "states of bools": (episode(states=STATES > 0), "states are bool"),
    "states of dates": (episode(states=STATES.astype("M8[s]")), "states are datetime64[s]"),
    "states of records": (episode(states=images(N, dtype="f8,f8")), "holds records"),
    "states of no axis": (episode(states=np.array(1.0)), "states are [], expected [n, 7]"),
    "states of one axis": (episode(states=STATES.ravel()), "states are [56]"),
    "states of 8 numbers": (episode(states=images(N, 8, dtype=float)), "8 numbers in a pose"),
    "states of two episodes": (episode(states=images(2, N, 7, dtype=float)), "states are [2, 8, 7"),
    "a state too many": (episode(states=images(N + 1, 7, dtype=float)), "8 images and 9 states"),
    "states that are not finite": (episode(states=STATES * np.nan), "not finite"),
    "states of 33 axes": (members(states=npy((1,) * 33, "<f8")), "states are [1, 1"),
    "states of 3000 axes": (members(states=npy((1,) * 3000, "<f8", version=2)), "states are [1"),
    # Images
    "no images": (episode(observations=None), "has no array 'observations'"),
    "nothing": (lambda folder: np.savez(folder / "odd.npz"), "has no array 'observations'"),
    "float images": (episode(observations=OBSERVATIONS / 255), "observations are float64"),
    "signed images": (episode(observations=OBSERVATIONS.astype(np.int8)), "observations are int8"),
    "gray images": (episode(observations=OBSERVATIONS[..., 0]), "observations are uint8 [8, 16"),
    "images with alpha": (episode(observations=images(N, 8, 8, 4)), "[8, 8, 8, 4]"),
    "channels first": (episode(observations=images(N, 3, 8, 8)), "[8, 3, 8, 8]"),
    "two cameras": (episode(observations=images(2, N, 8, 8, 3)), "[2, 8, 8, 8, 3]"),
    "no frame": (episode(observations=images(0, 8, 8, 3), states=images(0, 7, dtype=float)), None),
    "images of no pixel": (episode(observations=images(N, 0, 8, 3)), "images of 0 × 8 pixels"),
    "images of 9,000,000 pixels": (bomb(N, 3000, 3000, 3), "images of 3000 × 3000 pixels"),
    "images of 64,000,000 pixels": (bomb(16, 8000, 8000, 3), "images of 8000 × 8000 pixels"),
    "a strip": (bomb(N, 1, 8_000_000, 3), "images of 1 × 8000000 pixels"),
    # `episode`
    "a list of episodes": (episode(episode=np.array(["a", "b"])), "expected the name of one"),
    "half an episode": (episode(episode=np.array(0.5)), "expected the name of one"),
    "a pickled episode": (episode(episode=np.array({"a": 1}, object)), "holds Python objects"),
    "an episode in Latin-1": (episode(episode=np.array("é".encode("latin-1"))), "text in UTF-8"),
    "half a character": (members(episode=npy((), "<U1", b"\0\xd8\0\0")), "no text"),
    "no character": (members(episode=npy((), "<U1", b"\0\0\xff\xff")), "no text"),
    "an episode of 100 MB": (members(zipfile.ZIP_DEFLATED, episode=npy((), "|S100000000")),
                             "expected the name of one"),
    # Sizes
    "6.3 GB in 6 MB": (bomb(2280, 720, 1280, 3), "2,280 images of 720 × 1280 pixels: 6,303"),
    "6.3 GB of small images": (bomb(2_000_000, 32, 33, 3), "2,000,000 images of 32 × 33"),
    "90,000 images of 1 pixel": (bomb(90_000, 1, 1, 3), "1,105,920,000 as frames"),
    "6 GB of states": (bomb(N, 8, 8, 3, states=100_000_000), "8 images and 100000000 states"),
    "4 GB of column-major images": (members(zipfile.ZIP_DEFLATED, observations=npy(
        (300, 720, 1280, 3), fortran=True)), "column-major"),
    "10^12 rows": (members(states=npy((10 ** 12, 7), "<f8", b"")), "claims float64"),
    "10^12 images": (members(observations=npy((10 ** 12, 8, 8, 3), data=b"")), "claims uint8"),
    "10^30 rows": (members(states=npy((10 ** 30, 7), "<f8", b"")), "claims float64"),
    "fewer rows than bytes": (members(states=npy((N, 7), "<f8", bytes(900))), "but has 900"),
    "negative axes": (members(states=npy((-N, -7), "<f8", bytes(448))), "a negative axis"),
    "text of no length": (members(states=npy((10 ** 15, 7), "|S0", b"")), "states are |S0"),
    "30,000 members": (many_members(30_000), "has no array 'observations'"),
    "2,000,000 members": (many_members(2_000_000), "its list of files has 108,000,000 bytes"),
    # Headers
    "no header": (members(states=b""), "damaged"),
    "half a header": (members(states=npy((N, 7), "<f8")[:40]), "damaged"),
    "a header of text": (members(states=npy((N, 7), header="import os")), "damaged"),
    "a header of brackets": (members(states=npy((N, 7), header=DEEP)), "damaged"),
    "a header with code": (members(states=npy((N, 7), header="__import__('os').getcwd()")),
                           "damaged"),
    "a header of bytes": (members(states=npy((N, 7), header=b"\xff\xfe{'")), "damaged"),
    "a header of version 9": (members(states=npy((N, 7), "<f8", version=9)), "damaged"),
    "a shape of text": (members(states=npy((N, "7"), "<f8", bytes(448))), "damaged"),
    "a dtype of text": (members(states=npy((N, 7), "nonsense", b"")), "damaged"),
    "a dtype with a shape": (members(states=npy((N,), ("<f8", (7,)), bytes(448))), "odd.npz"),
    "a header of 5 GB": (members(states=b"\x93NUMPY\2\0\xff\xff\xff\xff{"), "damaged"),
    "a header of 4 GB of zeros": (zero_files(
        (b"observations.npy", b"\x93NUMPY\2\0\xf0\xff\xff\xff", 2 ** 32),
        (b"states.npy", npy((N, 7), "<f8", b""), N * 56)), "damaged"),
    # The .zip
    "an array twice": (members(twice=["states"]), "2 files named 'states.npy'"),
    "an encrypted array": (forged(8, 1, "<H", everywhere=True), "without a password"),
    "LZMA": (members(zipfile.ZIP_LZMA), "compressed by method 14"),
    "BZIP2": (members(zipfile.ZIP_BZIP2), "compressed by method 12"),
    "an unknown method": (forged(10, 99, "<H", everywhere=True), "compressed by method 99"),
    "a size too large": (forged(24, 2 ** 31), "odd.npz"),
    "a size too small": (forged(24, 1000), "odd.npz"),
    "a compressed size too large": (forged(20, 2 ** 31), RIGHT),
    "an offset beyond the end": (forged(42, 2 ** 31), "odd.npz"),
    "a wrong checksum": (forged(16, 1), "damaged"),
    "a version of the future": (forged(6, 90, "<H"), "damaged"),
    "another name inside": (edited(lambda data: data.replace(b"observations", b"abservations", 1)),
                            "damaged"),
    "altered bytes": (edited(lambda data: data[:4000] + b"?" + data[4001:]), "damaged"),
    "altered deflated bytes": (edited(lambda data: data[:4000] + b"????" + data[4004:], True),
                               "damaged"),
    "cut short": (edited(lambda data: data[:-100]), "damaged"),
    "half": (edited(lambda data: data[:len(data) // 2]), "damaged"),
    "empty": (edited(lambda data: b""), "damaged"),
    "zeros": (edited(lambda data: bytes(5000)), "damaged"),
    "an .npy": (edited(lambda data: saved(OBSERVATIONS)), "not a zip file"),
    "HTML": (edited(lambda data: b"<html>404</html>"), "not a zip file"),
    # No file, and names of files
    "a folder": (in_place_of_the_file(os.mkdir), None),
    "a pipe": (in_place_of_the_file(os.mkfifo), "pipe"),
    "a device": (in_place_of_the_file(lambda path: os.symlink("/dev/zero", path)), "device"),
    "a link to nowhere": (in_place_of_the_file(lambda path: os.symlink("/nowhere", path)),
                          "No such file"),
    "a link to itself": (in_place_of_the_file(lambda path: os.symlink(path, path)), "odd.npz"),
    "a file name in Latin-1": (named("é.npz".encode("latin-1")), "not UTF-8"),
    "a file name of two lines": (named(b"a\nb.npz"), RIGHT),
}
