"""Writing files whole or not at all."""
import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np


def write_npz(path, **arrays):
    """As np.savez_compressed, by way of `write_file`."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_file(path, data.getbuffer())


def write_file(path, data):
    """Writes bytes beside `path`, then renames: readers see the old file or the new one, never a part.

    Raises OSError with the path (disk full, no permission); an existing file is then left as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"could not be saved: {error.strerror}", str(path)) from None
