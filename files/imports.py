"""TensorFlow and Triton in one process, whichever the user imports first; TensorFlow without noise.

Each brings an LLVM of its own. Where TensorFlow comes first, Triton's library finds TensorFlow's
symbols instead of its own, and ends the process: "option registered more than once", an abort that
no except clause catches (Triton 3.7 and 3.9 with TensorFlow 2.21). Other packages import the two as
well: TensorBoard's writer, bitsandbytes, torch.compile. So what has to happen around an import is
tied to the import itself, whoever asks for it. Importing this module is enough.
"""
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress


# What TensorFlow reads once, when it is imported. Its client of gs:// would wait an hour for a
# server that says nothing, and try 10 times in 200 s: episodes/retry.py tries for longer, but can
# be interrupted, and says what it does.
SETTINGS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GCS_RETRY_CONFIG_MAX_RETRIES": "1",
    "GCS_REQUEST_CONNECTION_TIMEOUT_SECS": "20",
    "GCS_REQUEST_IDLE_TIMEOUT_SECS": "20",          # without a byte
    "GCS_METADATA_REQUEST_TIMEOUT_SECS": "60",
    "GCS_READ_REQUEST_TIMEOUT_SECS": "300",         # 8 MB at a time
}
NOISE = re.compile(rb"[IWE]\d{4} \d\d:|\d{4}-\d\d-\d\d \S+: [IWE] |WARNING: All log messages before"
                   rb"|To enable the following instructions")


@contextmanager
def _around_tensorflow():
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # Triton first: then each finds its own symbols. One that is broken is not TensorFlow's fault.
    with suppress(Exception):
        import triton  # noqa: F401
    with _without_noise():
        yield


@contextmanager
def _around_triton():
    # "tensorflow" alone is there as soon as its import begins.
    if "tensorflow.python" not in sys.modules or not hasattr(os, "RTLD_DEEPBIND"):
        yield
        return
    if os.environ.get("LD_PRELOAD"):
        # An allocator that is loaded so would be passed over too: memory taken from one of them
        # would be given back to the other.
        raise ImportError("Triton cannot be loaded after TensorFlow where LD_PRELOAD is set: "
                          "restart Python and import droid first")
    flags = sys.getdlopenflags()
    # Symbols are looked up in the library and what it links to before all others.
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        yield
    finally:
        sys.setdlopenflags(flags)


@contextmanager
def _without_noise():
    """Keeps the lines of C++ code from stderr that TF_CPP_MIN_LOG_LEVEL does not stop."""
    try:
        stderr = os.dup(2)
    except OSError:                     # closed
        yield
        return
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if failed or not NOISE.match(line):
                    os.write(2, line)


class _Finder:
    """Finds what the others find, and does what is in AROUND while it is loaded."""
    AROUND = {"tensorflow": ("exec_module", _around_tensorflow),
              "triton._C.libtriton": ("create_module", _around_triton)}

    def find_spec(self, name, path=None, target=None):
        if name not in self.AROUND:
            return None
        others = (finder for finder in sys.meta_path
                  if finder is not self and hasattr(finder, "find_spec"))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec), None)
        if spec and spec.loader:
            method, around = self.AROUND[name]
            load = getattr(spec.loader, method)

            def load_within(argument):
                with around():
                    return load(argument)
            setattr(spec.loader, method, load_within)
        return spec


sys.meta_path.insert(0, _Finder())
