"""`droid.py copy` from an emulated gs://: each shard once, through faults, kills and Ctrl-C."""
import re

import pytest


pytest.importorskip("tensorflow")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("cryptography")
URL = "gs://gresearch/[a] set/1.0.0"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    import gcs_emulator
    with gcs_emulator.Bucket(tmp_path_factory.mktemp("certificates")) as bucket:
        bucket.env |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "0", "GCS_REQUEST_IDLE_TIMEOUT_SECS": "1"}
        yield bucket


# Each copy is a forked child, so that TensorFlow is imported once. One that is killed neither
# closes its files nor writes what it still holds in memory.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
from episodes import copying, fetching, retry
from running import stop

folder, out, url, certificates = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
tf = copying.tensorflow()
fetching.CHUNK, fetching.TAIL = 10_000, 1000
retry.pause = lambda seconds: time.sleep(0.01)
shard, small = "^GET /gresearch/.*00001-of", "^GET /gresearch/.*json"

def set_faults(*rules):
    Path(certificates, "faults").write_text(json.dumps(rules))
    os.replace(Path(certificates, "faults"), Path(certificates, "faults.json"))
    os.truncate(f"{certificates}/requests.log", 0)

def in_child(function, *args, number=signal.SIGKILL, seconds=0):
    child = os.fork()
    if not child:
        if number == signal.SIGINT:
            stop.begin_script()
        try:
            print(function(*args), flush=True)
        except (ValueError, OSError) as error:
            print(error, flush=True)
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def make():
    (folder / "features.json").write_text('{"features": "of a data set"}')
    for i in range(2):
        with tf.io.TFRecordWriter(f"{folder}/x-train.tfrecord-0000{i}-of-00002") as shard:
            for size in (30_000, 50_000, 20_000):
                shard.write(random.randbytes(size))
    for path in folder.iterdir():
        tf.io.gfile.copy(str(path), f"{url}/{path.name}", overwrite=True)

def copy(target, minutes=10, **signals):
    return in_child(copying.copy, url, str(out / target), minutes, **signals)

def equal(target):
    there = {name for name in files if (out / target / name).exists()}
    assert all((out / target / name).read_bytes() == files[name] for name in there)
    return there == files.keys()

def gets():
    log = Path(certificates, "requests.log").read_text().splitlines()
    return sum(" GET /gresearch/" in line for line in log)

in_child(make)
files = {path.name: path.read_bytes() for path in folder.iterdir()}
for i, rule in enumerate([
        {}, dict(mode="status", code=503, times=3), dict(mode="drop", match=shard, times=2),
        dict(mode="cut", after=40_000, match=shard, times=4),
        dict(mode="alter", after=40_000, match=shard, times=1),
        dict(mode="alter", after=3, match=small, times=1),
        dict(mode="stall", after=40_000, match=shard, times=1)]):
    set_faults(*[rule] * bool(rule))
    copy(f"copy{i}")
    print(rule.get("mode"), equal(f"copy{i}"), gets(), flush=True)
set_faults()
copy("copy0")
print("again", gets(), flush=True)

set_faults(dict(mode="slow", seconds=0.5, match="^GET /gresearch/"))
codes = [copy("killed", number=number, seconds=seconds) for number, seconds in (
    (signal.SIGKILL, 0.8), (signal.SIGINT, 1), (signal.SIGKILL, 0.6), (signal.SIGKILL, 1.1))]
equal("killed")
copy("killed")
print("killed", equal("killed"), codes, flush=True)

for rule in dict(mode="status", code=503, match=shard), dict(mode="status", code=403, match=shard):
    set_faults(rule)
    copy("lost", minutes=0.01)
set_faults()
copy("lost")
print(equal("lost"))
"""


def test_through_faults_and_kills(bucket, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    out, err = bucket.run(SCRIPT, folder, tmp_path, URL, bucket.folder)
    # A request for each of the two shards, two for what has no checksums, one for each that failed.
    rows = [line.split() for line in out.splitlines()
            if re.match("(None|status|drop|cut|alter|stall) ", line)]
    assert rows == [
        ["None", "True", "4"], ["status", "True", "4"], ["drop", "True", "6"],
        ["cut", "True", "8"], ["alter", "True", "5"], ["alter", "True", "5"],
        ["stall", "True", "5"]], out
    assert "\nagain 0\n" in out
    assert "\nkilled True [-9, 130, " in out and "stopped by SIGINT\n" in err
    assert "has not answered for 1 s (HTTP response code 503); check the network" in out
    assert "access denied (HTTP response code 403)" in out
    assert out.endswith("\nTrue\n")
    assert err.count("does not answer") == err.count("answers again") + 1 == 5, err
    assert "Traceback" not in err
