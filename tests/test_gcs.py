"""gs:// through TensorFlow, against a local emulator: reading records, mirroring a run, starting a
run from its mirror."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tabletop
from small import episode


pytest.importorskip("tensorflow")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def gs(tmp_path_factory):
    """A function that runs a Python script against the emulator -> its stdout and stderr."""
    folder = tmp_path_factory.mktemp("certificates")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(str(free.getsockname()[1]))
    emulator = subprocess.Popen(
        [sys.executable, "tests/gcs_emulator.py", *ports, str(folder)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert emulator.stdout.readline() == "ready\n"
    env = os.environ | {
        "NO_GCE_CHECK": "true", "HTTPS_PROXY": f"http://127.0.0.1:{ports[0]}",
        "PYTHONPATH": "tests:.", "CURL_CA_BUNDLE": f"{folder}/ca.pem",
        "GCS_RETRY_CONFIG_MAX_RETRIES": "1"}

    def run(script, *args):
        command = [sys.executable, "-c", script, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout, result.stderr

    yield run
    emulator.terminate()
    emulator.wait()


def test_records_are_streamed_from_a_bucket(gs, tmp_path):
    """The same clips in the same order as from the local folder; a path that does not exist is an
    error of one line."""
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=2)
    out, _ = gs("""
import sys, torch, droid
from pathlib import Path
from small import data_recipe
tf, url = droid.tensorflow(), "gs://gresearch/robotics/droid_100/1.0.0"
for path in Path(sys.argv[1]).iterdir():
    tf.io.gfile.copy(str(path), f"{url}/{path.name}")
local, remote = (droid.create_dataloader(data_recipe(path)) for path in (sys.argv[1], url))
for a, b, _ in zip(local, remote, range(20)):
    assert all(torch.equal(a[key], b[key]) for key in a)
for wrong in (f"{url}/absent", "gs://no-such-bucket/x"):
    try:
        droid.create_dataloader(data_recipe(wrong))
    except ValueError as error:
        print(error)
""", tmp_path)
    assert len(out.splitlines()) == 2
    assert "1.0.0/absent: no file matches" in out and "gs://no-such-bucket/x" in out


def test_a_run_is_mirrored_and_can_start_from_its_mirror(gs, tmp_path):
    for step in (2, 10):
        folder = tmp_path / f"run/step_{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(f"adapter {step}")
        (folder / "state.pt").write_text(f"state {step}")
    (tmp_path / "run/step_12.tmp").mkdir()
    (tmp_path / "run/step_12.tmp/state.pt").write_text("half")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    out, err = gs("""
import sys, droid
from pathlib import Path
from running import mirror
run, url, tf = Path(sys.argv[1]), "gs://gresearch/mirror/run", droid.tensorflow()
mirror.upload(run, url)
mirror.upload(run / "step_2", url + "/step_99")            # as if cut off before state.pt
tf.io.gfile.remove(url + "/step_99/state.pt")
(run / "metrics.jsonl").write_text("{}\\n{}\\n")
(run / "step_2/state.pt").write_text("must not be sent again")
mirror.upload(run, url)
for path in sorted(tf.io.gfile.glob(url + "/*") + tf.io.gfile.glob(url + "/*/*")):
    print(path)
assert tf.io.gfile.GFile(url + "/metrics.jsonl").read() == "{}\\n{}\\n"
assert tf.io.gfile.GFile(url + "/step_2/state.pt").read() == "state 2"
assert mirror.fetch_newest(url, sys.argv[2])
assert not mirror.fetch_newest(url + "/nothing", sys.argv[2])
mirror.upload(run, "gs://no-such-bucket/run")              # prints, does not raise
""", tmp_path / "run", tmp_path / "fresh")
    assert ".tmp" not in out and "step_10/state.pt" in out
    fresh = tmp_path / "fresh"
    assert (fresh / "step_10/state.pt").read_text() == "state 10"
    assert (fresh / "step_10/adapter_model.safetensors").read_text() == "adapter 10"
    assert sorted(path.name for path in fresh.iterdir()) == ["metrics.jsonl", "step_10"]
    assert "not uploaded to gs://no-such-bucket/run" in err
    files = sorted(path.name for path in Path(tmp_path / "run/step_10").iterdir())
    assert files == ["adapter_model.safetensors", "state.pt"]
