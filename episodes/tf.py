"""TensorFlow, for TFRecords and gs://, imported only where they are read."""
import ctypes
import os
from contextlib import suppress

import files.imports  # noqa: F401 (TensorFlow and Triton in one process)


# Of glibc's mallopt, and bytes: a record is larger, a decoded clip smaller.
M_MMAP_THRESHOLD, LARGE = -3, 4 << 20
_without_credentials = "NO_GCE_CHECK" not in os.environ         # ours to say; see `tensorflow`


def tensorflow(anonymous=True):
    """TensorFlow, kept off the GPU. anonymous: read public buckets without looking for credentials,
    until the first call that asks for them.

    Raises ValueError if it cannot be imported."""
    global _without_credentials
    if _without_credentials:
        # TensorFlow looks it up for each token; only "true" counts.
        os.environ["NO_GCE_CHECK"] = "true" if anonymous else "false"
        _without_credentials = anonymous
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise ValueError("reading TFRecords and gs:// needs TensorFlow: pip install tensorflow "
                         f"({error})") from None
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"TensorFlow cannot be imported ({reason}); install it again") from None
    # Or glibc would keep the memory of records, 20 MB each, in the heap of each thread that reads:
    # 0.1 GB in all. Other C libraries have no such function.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    with suppress(RuntimeError):            # in use already: the user's notebook decides then
        tf.config.set_visible_devices([], "GPU")
    return tf
