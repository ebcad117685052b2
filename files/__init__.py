"""Writing files atomically, the safetensors format one tensor at a time, and lines said once."""
import io
import json
import os
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm


SAFETENSORS_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def write_file(path, data):
    """Writes `data` (bytes) to `path` atomically: readers see the old file or the new one.

    Raises OSError naming the path (disk full, no permission); an old file is then unchanged."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # without this a crash of the machine could leave the new name with empty contents
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        message = f"could not be saved: {error.strerror}"
        raise OSError(error.errno, message, str(path)) from None


def free_name(path, ending):
    """A name beside `path` that is not taken: path.ENDING, path.ENDING-2 and so on."""
    names = [path.with_name(f"{path.name}.{ending}")]
    while names[-1].exists():
        names.append(path.with_name(f"{path.name}.{ending}-{len(names) + 1}"))
    return names[-1]


def write_npz(path, **arrays):
    """Writes arrays as np.savez_compressed does, atomically. Raises OSError as `write_file`."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_file(path, data.getbuffer())


def write_safetensors(file, names, read, metadata):
    """Writes tensors to an open binary file (or BytesIO) in the safetensors format.

    names: the tensors' names, written in this order. read(name) returns the tensor; it is called
    twice for each name. metadata: {str: str} for the header. Raises KeyError for a dtype other than
    float32, float16 and bfloat16. Flushing to disk is left to the caller.

    The library's own writer needs all tensors in memory, twice, and writes the metadata in a random
    order. This one holds one tensor at a time, and equal content gives equal bytes.
    Format: https://huggingface.co/docs/safetensors: the header's length as 8 bytes, the header as
    JSON, then the values of all tensors without gaps."""
    # Here, since the command line is checked before PyTorch is loaded, which takes seconds.
    import torch
    header, offset = {"__metadata__": metadata}, 0
    for name in names:
        tensor = read(name)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[str(tensor.dtype)], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # padded as the library does: readers map the file, and the first values must start aligned
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        # the name `tensor` again, so that the previous one is freed; as bytes, since NumPy has no
        # bfloat16
        tensor = read(name).cpu().contiguous().flatten()
        file.write(tensor.view(torch.uint8).numpy())


@lru_cache
def say_once(text):
    """A line on stderr: once, however often files are read, and by one process of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)
