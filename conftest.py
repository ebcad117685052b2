"""For all tests: one thread a process, Ctrl-C as in a terminal, and the small base checkpoint.

The tests' networks are small: more threads gain nothing, and threads that wait for a busy core cost
minutes.
"""
import os
import shutil
import signal

import pytest

import files.imports  # noqa: F401 (before tests import TensorFlow)


os.environ["OMP_NUM_THREADS"] = "1"
# A shell lets its background jobs ignore SIGINT, which tests send to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    # Here, so that PyTorch is imported after the variable above was set.
    import small
    return small.write(tmp_path_factory.mktemp("base"))


# The episodes of small.LENGTHS, in both kinds of files

@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    import small
    return small.write_records(tmp_path_factory.mktemp("rlds"))


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    import small
    return small.write_trajectories(tmp_path_factory.mktemp("npz"))


@pytest.fixture(params=["rlds", "npz"])
def source(request):
    """(folder, names of the episodes in it): .npz knows no failures."""
    return request.getfixturevalue(request.param), "abcd" if request.param == "rlds" else "abcde"


# Reports

@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield one
        one.close()
