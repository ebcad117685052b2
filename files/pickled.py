"""Files that torch.save has written, read without running code."""
import re
import zipfile

import torch

from files.reading import shown


URL = "https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt"
PICKLE_LIMIT = 8 << 20          # bytes of names and numbers; the released file has under 1 MB

# Values that training scripts put beside the weights: classes and functions as pickles name them.
DATA = re.compile(
    r"numpy\.(_?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)|dtype|ndarray"
    r"|dtypes\.\w+|bool_?|u?int\w*|float\w*|complex\w*|str_|bytes_|datetime64|timedelta64|void"
    r"|random\.\w+\.\w+)"
    r"|builtins\.(bool|int|float|str|bytes|list|tuple|dict|frozenset|slice|range)"
    r"|collections\.(defaultdict|deque)|argparse\.Namespace|types\.SimpleNamespace"
    r"|pathlib\.\w+|datetime\.\w+|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|torch\.torch_version\.TorchVersion")


class _Unread:
    """Stands for a value beside the weights. Pickles say which class or function makes a value;
    a class like this one is called instead, so nothing of theirs runs."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _stand_in(name):
    """A class to be called instead of what a pickle names, such as numpy.ndarray."""
    module, _, last = name.rpartition(".")
    # torch's reader fills these two in after they were made, and only if they are a dict or list
    container = {"collections.defaultdict": dict, "collections.deque": list}.get(name)
    make = {"__new__": lambda cls, *args: container()} if container else {}
    return type(last, (_Unread,), {"__module__": module} | make)


def load_pickled(path):
    """What torch.save has written to `path`, tensors backed by the file. Runs no code of the file's
    choice: of its classes, those of tensors are made, those in DATA passed over, others refused."""
    _check_zip(path)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        code = sorted(name for name in foreign if not DATA.fullmatch(name))
        if not code:
            with torch.serialization.safe_globals([_stand_in(name) for name in foreign]):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # A damaged pickle can make its reader raise anything: IndexError, AttributeError, MemoryError …
    except Exception as error:
        raise ValueError(f"{path}: not a whole PyTorch file ({first_line(error)}); "
                         f"download it again: wget -c {URL}") from None
    raise ValueError(f"{path}: holds Python objects other than tensors "
                     f"({', '.join(map(printable, code[:3]))}) and was not opened (it could run "
                     "code); use the released file or re-save its state dicts")


def _check_zip(path):
    """Raises ValueError unless `path` is a zip file as torch.save writes it, with nothing that
    expands to more than the file has."""
    with open(path, "rb") as file:
        start = file.read(16)
    again = f"download it again: wget -c {URL}"
    if start[:1] == b"\x80":
        raise ValueError(f"{path}: is in the format of PyTorch before 1.6, which cannot be mapped; "
                         "re-save it with torch.save(torch.load(path, weights_only=True), path)")
    if start[8:10] == b'{"':
        raise ValueError(f"{path}: is a .safetensors file; let its name end in .safetensors")
    if start and start[:2] != b"PK":
        raise ValueError(f"{path}: not a PyTorch file, it begins with {shown(start)}; {again}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickles = [m for m in members if m.filename.endswith("/data.pkl")]
            protocol = archive.open(pickles[0]).read(2)[1:] if pickles else b""
    except Exception as error:          # zipfile too raises anything for damaged files
        raise ValueError(f"{path}: not a whole PyTorch file ({first_line(error)}); {again}"
                         ) from None
    if not pickles or any("/code/" in m.filename for m in members):
        what = "a TorchScript model" if pickles else "a zip file of another program"
        names = ", ".join(printable(m.filename) for m in members[:3])
        raise ValueError(f"{path}: is {what} ({names}, …); save state dicts with torch.save")
    if (any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size
            for m in members) or max(m.file_size for m in pickles) > PICKLE_LIMIT):
        raise ValueError(f"{path}: is compressed, or has more than {PICKLE_LIMIT >> 20} MB beside "
                         "its tensors: not as torch.save writes it; re-save its state dicts")
    if protocol > b"\x02":
        raise ValueError(f"{path}: has pickle protocol {protocol[0]}, which cannot be read without "
                         "the risk of running code; re-save it with torch.save's default, 2")


def printable(name):
    """A name from a file for a message: as it is, unless it is long or would break the line."""
    return name if isinstance(name, str) and name.isprintable() and len(name) < 120 else shown(name)


def first_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__
