"""What running/bucket.py does on gs://, here on a local folder, which TensorFlow treats alike."""
import hashlib
import json
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import bucket
from small import flip


pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def watch():
    return bucket.Watch()


@pytest.fixture
def folder(tmp_path, watch):
    """A Bucket whose folder is a local one."""
    class Local(bucket.Bucket):
        def write(self, name, source, size):
            path = Path(self.url, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            super().write(name, source, size)
    return Local(str(tmp_path / "bucket"), watch)


def write_step(run, n, seed=0, sums=True):
    step = run / f"step_{n}"
    step.mkdir(parents=True)
    values = torch.full([50], n + seed / 10)
    (step / "adapter_config.json").write_text(f'{{"seed": {seed}}}')
    save_file({"a": values}, step / bucket.ADAPTER)
    torch.save({"a": values} | ({"history": []} if sums else {}), step / "state.pt")
    if sums:
        (step / "SHA256SUMS").write_text(sums_of(step))
    return step


def sums_of(step):
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
                   for path in sorted(step.iterdir()) if path.name != "SHA256SUMS")


def write_run(run, steps=(2, 4, 10), seed=0, run_id="a"):
    for n in steps:
        write_step(run, n, seed)
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    if run_id:
        (run / "run.json").write_text(json.dumps({"id": run_id}))
    return run


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


# What is uploaded

def test_a_run_comes_back_from_its_mirror(folder, tmp_path):
    run = write_run(tmp_path / "run")
    write_step(run, 3, sums=False)                          # of an older version
    for name in ("step_12.tmp/state.pt", "step_4.damaged/state.pt", "step_2.before-2/state.pt",
                 "debug-1/step_3/state.pt", "lock", "notes/curve.png"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    (run / "notes/empty").touch()
    bucket.upload(folder, run)
    there = contents(folder.url)
    steps = {name: data for name, data in contents(run).items()
             if name.split("/")[0] in ("step_2", "step_3", "step_4", "step_10")}
    assert there == steps | {
        "step_3/SHA256SUMS": sums_of(run / "step_3").encode(), "config.yaml": b"seed: 0\n",
        "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n', "notes/curve.png": b"x", "notes/empty": b"",
        "run.json": b'{"id": "a", "writer": ""}\n'}
    fresh = tmp_path / "fresh"
    bucket.fetch(folder, fresh)
    step = {name: data for name, data in there.items() if name.startswith("step_10/")}
    assert contents(fresh) == step | {"run.json": b'{"id": "a"}\n'} | {
        name: there[name] for name in ("config.yaml", "metrics.jsonl")}
    bucket.fetch(folder, fresh, newer_than=10)
    assert len(contents(fresh)) == 7


def test_what_is_there_whole_is_not_sent_again(folder, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    bucket.upload(folder, run)
    Path(folder.url, "step_2/SHA256SUMS").unlink()          # as an older version leaves a step, or
    Path(folder.url, "step_4/SHA256SUMS").unlink()          # an upload that was cut off
    flip(Path(folder.url, f"step_4/{bucket.ADAPTER}"), 100)
    Path(folder.url, "step_10/UPLOADING").touch()
    sent, write = [], type(folder).write
    monkeypatch.setattr(type(folder), "write", lambda self, name, *args: (
        sent.append(name), write(self, name, *args)))
    bucket.upload(folder, run)
    names = [name for name in sent if name.startswith("step_")]
    assert names == ["step_2/SHA256SUMS", "step_4/UPLOADING", f"step_4/{bucket.ADAPTER}",
                     "step_4/SHA256SUMS", "step_10/SHA256SUMS"]
    assert set(map(len, folder.steps().values())) == {4}
    assert folder.read_text("step_4/SHA256SUMS") == sums_of(Path(folder.url, "step_4"))


@pytest.mark.parametrize("sums", [True, False])
def test_wherever_an_upload_is_cut_no_step_is_a_mixture(folder, tmp_path, monkeypatch, sums):
    """A step that was trained again, with another result, replaces the one in the bucket.

    sums: whether that has SHA256SUMS, or is of an older version."""
    for n in (2, 10):
        write_step(Path(folder.url), n, sums=sums)
    Path(folder.url, "run.json").write_text('{"id": "a"}')
    before = shutil.copytree(folder.url, tmp_path / "before")
    run, calls, cut, done = write_run(tmp_path / "run", [2, 10], seed=1), 0, -1, False

    def until_cut(change, *args):
        nonlocal calls
        calls += 1
        if calls > cut:
            raise bucket.NoAnswer("cut")
        change(*args)
    for name in ("write", "remove"):
        monkeypatch.setattr(folder, name, partial(until_cut, getattr(folder, name)))
    outcomes = set()
    while not done:
        shutil.rmtree(folder.url)
        shutil.copytree(before, folder.url)
        calls, cut = 0, cut + 1
        with suppress(bucket.NoAnswer):
            bucket.upload(folder, run)
            done = True
        bucket.fetch(folder, tmp_path / "fresh")
        step, = (tmp_path / "fresh").glob("step_*")
        seeds = {json.loads((step / "adapter_config.json").read_text())["seed"],
                 round(10 * (torch.load(step / "state.pt")["a"][0].item() % 1))}
        assert len(seeds) == 1
        outcomes.add((step.name, *seeds))
        shutil.rmtree(tmp_path / "fresh")
    # As it was, without step_10 for a while, as it is to be.
    assert outcomes == {("step_10", 0), ("step_2", 1), ("step_10", 1)}


def test_in_a_hurry_the_newest_step_comes_first(folder, tmp_path, monkeypatch, capsys):
    run, write = write_run(tmp_path / "run"), type(folder).write

    def hurry(self, name, *args):
        write(self, name, *args)
        if name == "step_2/SHA256SUMS":
            monkeypatch.setattr(self.watch, "hurried", True)
    monkeypatch.setattr(type(folder), "write", hurry)
    bucket.upload(folder, run)
    out = capsys.readouterr().out
    assert re.findall(r"^step_(\d+)", out, re.M) == ["2", "10", "4"]


def test_a_file_that_arrives_altered_is_not_taken_for_whole(folder, tmp_path, monkeypatch):
    run, write = write_run(tmp_path / "run", steps=[2]), type(folder).write

    def alter(self, name, *args):
        write(self, name, *args)
        if name == f"step_2/{bucket.ADAPTER}":
            flip(Path(self.url, name), 100)
    monkeypatch.setattr(type(folder), "write", alter)
    with pytest.raises(bucket.NoAnswer, match="step_2/adapter_model.safetensors arrived altered"):
        bucket.upload(folder, run)
    assert Path(folder.url, "step_2/UPLOADING").exists()
    bucket.fetch(folder, tmp_path / "fresh")            # nothing else is there: starts anew
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["run.json"]
    monkeypatch.undo()
    bucket.upload(folder, run)
    assert folder.steps() == {2: {*bucket.FILES, "SHA256SUMS"}}
    assert sums_of(Path(folder.url, "step_2")) == sums_of(run / "step_2")


def test_a_damaged_local_step_is_said_and_spoils_nothing(folder, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    bucket.upload(folder, run)
    whole = contents(folder.url)
    flip(run / f"step_2/{bucket.ADAPTER}", 100)
    (run / "step_4/state.pt").unlink()
    (run / "step_10/SHA256SUMS").write_text("half")
    write_step(run, 11)
    flip(run / "step_11/state.pt", 100)
    capsys.readouterr()
    bucket.upload(folder, run)
    assert contents(folder.url) == whole
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 3 and "step_4: not uploaded: it has no state.pt" in said
    assert "step_10: not uploaded: SHA256SUMS is damaged" in said
    assert "step_11: not uploaded: state.pt is damaged" in said


def test_a_step_that_rotation_removes_meanwhile_is_no_error(folder, tmp_path, monkeypatch, capsys):
    run, write = write_run(tmp_path / "run"), type(folder).write

    def rotate(self, name, *args):
        write(self, name, *args)
        if name == "step_2/adapter_config.json":
            shutil.rmtree(run / "step_2")
    monkeypatch.setattr(type(folder), "write", rotate)
    bucket.upload(folder, run)
    assert "not uploaded" not in capsys.readouterr().out
    assert sorted(folder.steps()) == [2, 4, 10] and "SHA256SUMS" in folder.steps()[10]


# What is fetched

def damage_sums(step):
    (step / "SHA256SUMS").write_text((step / "SHA256SUMS").read_text()[:80])


def damage_names(step):
    text = (step / "SHA256SUMS").read_text().replace("adapter_config", "../adapter_config")
    (step / "SHA256SUMS").write_text(text)


def damage_old_state(step):
    shutil.rmtree(step)
    write_step(step.parent, 10, sums=False)
    flip(step / "state.pt", (step / "state.pt").read_bytes().index(b"data/0") + 200)


def damage_old_adapter(step):
    (step / "SHA256SUMS").unlink()
    (step / bucket.ADAPTER).write_bytes((step / bucket.ADAPTER).read_bytes()[:-1])


@pytest.mark.parametrize("damage, said", [
    (lambda step: flip(step / bucket.ADAPTER, 100), "adapter_model.safetensors is damaged"),
    (lambda step: flip(step / "state.pt", 300), "state.pt is damaged"),
    (lambda step: (step / "state.pt").write_bytes(b""), "state.pt is damaged"),
    (lambda step: (step / "state.pt").unlink(), "it has no state.pt"),
    (lambda step: (step / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    (lambda step: (step / "SHA256SUMS").unlink(), "it has no SHA256SUMS"),
    (damage_sums, "SHA256SUMS is damaged"),
    (damage_names, "SHA256SUMS is damaged"),
    (damage_old_state, "state.pt is damaged"),
    (damage_old_adapter, "damaged"),
])
def test_a_damaged_newest_step_is_left_for_the_one_before(folder, tmp_path, capsys, damage, said):
    bucket.upload(folder, write_run(tmp_path / "run"))
    damage(Path(folder.url, "step_10"))
    capsys.readouterr()
    fresh = tmp_path / "fresh"
    bucket.fetch(folder, fresh)
    out = capsys.readouterr().out.splitlines()
    assert f"{folder.url}/step_10: {said}" in out[1] and out[1].endswith("going on from step 4")
    assert [path.name for path in fresh.glob("step_*")] == ["step_4"] and len(out) == 2
    Path(folder.url, "step_4/UPLOADING").touch()
    Path(folder.url, "step_2/state.pt").unlink()
    with pytest.raises(ValueError, match="none of its steps is whole .*step_10"):
        bucket.fetch(folder, tmp_path / "other")


def test_nothing_in_the_run_folder_is_lost_by_fetching(folder, tmp_path):
    bucket.upload(folder, write_run(tmp_path / "run"))
    mine = write_run(tmp_path / "mine", steps=[2, 10], seed=1)
    (mine / "step_10/state.pt").unlink()
    (mine / "metrics.jsonl").write_text('{"step": 9}\n')
    before = contents(mine)
    bucket.fetch(folder, mine, newer_than=2)
    after = contents(mine)
    assert after["metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n'
    assert after["metrics.jsonl.before"] == before["metrics.jsonl"]
    for name, data in before.items():
        name = name.replace("step_10/", "step_10.before/").replace("s.jsonl", "s.jsonl.before")
        assert after[name] == data


def test_a_fetch_that_was_cut_or_altered_goes_on(folder, tmp_path, monkeypatch):
    bucket.upload(folder, write_run(tmp_path / "run"))
    reads, read = [], bucket.Bucket.read

    def fail_once(self, name, sink=None):
        reads.append(name)
        if name in (f"step_10/{bucket.ADAPTER}", "step_10/state.pt") and reads.count(name) == 1:
            sink.write(b"half")
            if "state" in name:
                raise bucket.NoAnswer("cut")
            return hashlib.sha256(b"half").hexdigest()
        return read(self, name, sink)
    monkeypatch.setattr(bucket.Bucket, "read", fail_once)
    with pytest.raises(bucket.NoAnswer):
        bucket.fetch(folder, tmp_path / "fresh")
    assert not (tmp_path / "fresh/step_10").exists()
    bucket.fetch(folder, tmp_path / "fresh")
    assert reads.count(f"step_10/{bucket.ADAPTER}") == 2        # both times before the cut
    step = tmp_path / "fresh/step_10"
    assert sums_of(step) == (step / "SHA256SUMS").read_text()


# Whose folder it is

def test_a_bucket_folder_belongs_to_one_run(folder, tmp_path):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", seed=1, run_id="b")
    new = write_run(tmp_path / "new", steps=[], run_id="c")
    bucket.claim(folder, run, "first")
    bucket.upload(folder, run, "first")
    before = contents(folder.url)
    for args in ((bucket.claim, other, "x"), (bucket.upload, other, "x"), (bucket.upload, other),
                 (bucket.fetch, other)):
        with pytest.raises(ValueError, match="holds another run"):
            args[0](folder, *args[1:])
    with pytest.raises(ValueError, match=r"holds another run \(step 10\); choose another --gcs_dir,"
                                         " or go on with that run by --resume"):
        bucket.claim(folder, new, "x")
    nothing = write_run(tmp_path / "nothing", steps=[])     # the same run, whose steps are gone
    with pytest.raises(ValueError, match=r"holds this run already \(step 10\)"):
        bucket.claim(folder, nothing, "x")
    assert contents(folder.url) == before
    # The same run on another machine goes on; the first one finds out.
    bucket.claim(folder, run, "second")
    bucket.upload(folder, run, "second")
    with pytest.raises(ValueError, match="goes on elsewhere"):
        bucket.upload(folder, run, "first")
    bucket.upload(folder, run)                  # by hand
    Path(folder.url, "run.json").unlink()
    bucket.upload(folder, run, "second")
    assert json.loads(folder.read_text("run.json")) == {"id": "a", "writer": "second"}


def test_a_mirror_of_an_older_version_belongs_to_the_run_that_it_came_from(folder, tmp_path):
    run = write_run(tmp_path / "run", run_id="")
    bucket.upload(folder, run)
    assert not folder.exists("run.json")
    other = write_run(tmp_path / "other", seed=1, run_id="b")
    new = write_run(tmp_path / "new", steps=[], run_id="c")
    for folder_of_another in (other, new):
        with pytest.raises(ValueError, match="holds another run"):
            bucket.claim(folder, folder_of_another, "x")
    old = write_run(tmp_path / "old", [2], seed=1, run_id="")
    with pytest.raises(ValueError, match="holds another run than"):
        bucket.fetch(folder, old, newer_than=2)
    fresh = tmp_path / "fresh"
    bucket.fetch(folder, fresh)                 # --resume on another machine
    (fresh / "run.json").write_text('{"id": "d"}')
    bucket.claim(folder, fresh, "x")
    assert json.loads(folder.read_text("run.json")) == {"id": "d", "writer": "x"}
