"""Reading records from gs:// through TensorFlow, against a local emulator."""

import pytest

import tabletop
from small import episode


pytest.importorskip("tensorflow")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    import gcs_emulator
    with gcs_emulator.Bucket(tmp_path_factory.mktemp("certificates")) as bucket:
        yield bucket


SCRIPT = """
import json, os, sys, time, torch, droid
from itertools import islice
from pathlib import Path
from episodes import retry
from small import data_recipe

folder, tf, url = sys.argv[1], droid.tensorflow(), "gs://gresearch/robotics/[droid] 100/1.0.0"
for path in Path(folder).iterdir():
    tf.io.gfile.copy(str(path), f"{url}/{path.name}")
retry.pause = lambda seconds: time.sleep(0.01)

def set_faults(*rules):
    Path(sys.argv[2], "faults").write_text(json.dumps(rules))
    os.replace(Path(sys.argv[2], "faults"), Path(sys.argv[2], "faults.json"))

def read(path, *faults):
    cfg = data_recipe(path, "--batch_size=6", "--data.cache=off")
    loader = droid.create_dataloader(cfg)
    set_faults(*faults)
    return list(islice(loader, 6))          # more than one epoch

local = read(folder)

def compare(**rule):
    for a, b in zip(local, read(url, rule), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a), rule
    print("equal", *rule.values(), flush=True)

compare(mode="slow", seconds=0.1, times=2)
data = "^GET /gresearch/.*00001-of"         # of one shard
compare(mode="status", code=503, times=3)
compare(mode="status", code=429, match=data, times=2)
compare(mode="drop", times=2)
compare(mode="cut", after=40_000, match=data, times=4)
compare(mode="alter", after=40_000, match=data, times=2)
compare(mode="stall", after=40_000, match=data, times=1)

for wrong in (f"{url}/absent", "gs://no-such-bucket/x"):
    try:
        droid.create_dataloader(data_recipe(wrong, "--data.cache=off"))
    except ValueError as error:
        print(error)
for rule in (dict(mode="status", code=403), dict(mode="status", code=503)):
    loader = droid.create_dataloader(data_recipe(url, "--data.retry_minutes=0.03",
                                                "--data.cache=off"))
    set_faults(rule)
    begin = time.monotonic()
    try:
        next(iter(loader))
    except retry.ConnectionLost as error:
        assert time.monotonic() - begin < 15
        print(error)
    set_faults()
"""


def test_records_are_streamed_from_a_bucket_and_through_faults(bucket, tmp_path):
    """The same clips in the same order as from the local folder, whatever happens on the way; what
    does not pass is an error of one line."""
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=2)
    bucket.env |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "0", "GCS_REQUEST_IDLE_TIMEOUT_SECS": "1"}
    out, err = bucket.run(SCRIPT, tmp_path, bucket.folder)
    *equal, absent, no_bucket, denied, lost = out.splitlines()
    assert [line.split()[0] for line in equal] == ["equal"] * 7, out
    assert "1.0.0/absent: no file matches" in absent and "gs://no-such-bucket/x" in no_bucket
    assert "access denied (HTTP response code 403)" in denied
    assert "has not answered for 2 s (HTTP response code 503)" in lost
    assert err.count("does not answer") == err.count("answers again") + 1 >= 6


KEPT = """
import os, sys, torch, droid
from episodes import clips
from small import data_recipe

folder, tf, url = sys.argv[1], droid.tensorflow(), "gs://gresearch/kept/1.0.0"
if not tf.io.gfile.exists(url):
    for name in os.listdir(folder):
        tf.io.gfile.copy(f"{folder}/{name}", f"{url}/{name}")
local, kept = [data_recipe(path, "--data.offsets=any") for path in (folder, url)]
os.chdir(sys.argv[2])
orders = []
for cfg in (local, kept):
    orders.append(droid.create_dataloader(cfg)._decoded_clips(clips.START))
n = 0
for a, b in zip(*orders):
    if a[0]["epoch"] == 20:
        break
    assert a[0] == b[0] and torch.equal(a[1]["frames"], b[1]["frames"])
    n += 1
print(n, "equal")
"""


def test_each_shard_is_fetched_once_in_twenty_epochs_and_two_runs(bucket, tmp_path, monkeypatch):
    """By default, into cache/ of the folder where it is started."""
    tabletop.write_rlds(tmp_path / "data", [episode(name) for name in "abcd"], n_shards=2)
    bucket.env |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "0", "GCS_REQUEST_IDLE_TIMEOUT_SECS": "1"}
    log = bucket.folder / "requests.log"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    for _ in range(2):
        out, err = bucket.run(KEPT, tmp_path / "data", tmp_path)
        assert int(out.split()[0]) > 20 * 20 and "does not answer" not in err
    asked = log.read_text().splitlines()[before:]
    for shard in ("00000-of-00002", "00001-of-00002"):
        reads = [line for line in asked if shard in line and " GET /gresearch/" in line]
        assert len(reads) == 1, reads
    assert len(list((tmp_path / "cache").glob("kept/*/*.npz"))) == 2
