"""One thread a process: the networks of the tests are small, and threads that wait for a busy core cost minutes."""
import os
from contextlib import suppress

import pytest

with suppress(ImportError):
    import triton  # noqa: F401 — before TensorFlow, as in droid.tensorflow

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    import small
    return small.write(tmp_path_factory.mktemp("base"))
