"""What a resumed run goes on with: its own settings, changes that are taken and that are refused,
other numbers of processes, and new runs that start from an adapter."""
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config
import lora
import train
from running import command_line, settings
from running.lock import Lock
from running.log import Logger
from small import recipe, write_episodes


# PyTorch's AdamW, as importing bitsandbytes takes longer than a short run.
SHORT = ["--optimizer=adamw", "--max_steps=2", "--val_every=0", "--grad_accum=1",
         "--data.frame_step=2", "--lora.dropout=0.2"]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a run of two steps, at frame_step 2."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(recipe(base, out, *SHORT))
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")


def resume(out, *args):
    """Resumes a run whose recipe is not named again."""
    return train.train(config.load([f"--out_dir={out}", "--resume", "--device=cpu", *args]))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# The run's own settings

def test_the_recipe_need_not_be_named_again(run, capsys):
    """Camera, step, rank, learning rate and all the rest are the run's own; equal bytes follow."""
    whole = shutil.copytree(run, run.with_name("whole"))
    resume(run, "--max_steps=4")
    resume(whole, "--max_steps=4", "--data.frame_step=2", "--lora.rank=4", "--lr=1e-2")
    said = capsys.readouterr().out
    assert "goes on with its own" in said and "data.frame_step 2" in said and "lora.rank 4" in said
    assert "changed from step 2 on: max_steps from 2 to 4" in said
    for name in ("adapter_model.safetensors", "state.pt"):
        assert (run / "step_4" / name).read_bytes() == (whole / "step_4" / name).read_bytes()
    saved = config.load([str(run / "config.yaml")])
    assert saved.data.frame_step == 2 and saved.max_steps == 4 and saved.resume is False


def test_a_recipe_with_the_defaults_changes_nothing(run):
    """`python train.py config.yaml --resume`, though the run was made with other settings."""
    resume(run, "config.yaml", "--max_steps=3")
    assert config.load([str(run / "config.yaml")]).data.frame_step == 2


@pytest.mark.parametrize("change", [
    "data.camera=exterior_image_1_left", "data.crop=droid", "data.frame_step=1",
    "data.clip_frames=3", "data.clip_stride=1", "data.keys.pose=x",
    "data.keys.episode=", "data.val_fraction=0.5", "data.only_success=false", "data.drop_idle=true",
    "data.shuffle_buffer=9", "precision=bf16", "lora.rank=8",
    "lora.alpha=1", "lora.rslora=false", "lora.dropout=0", "lora.targets=[attn.qkv]", "rollout=1",
    "seed=1", "optimizer=adamw8bit", "model.size=vitg", "batch_size=1", "grad_accum=4"])
def test_what_changes_what_is_learned_is_refused(finished, change):
    before = contents(finished)
    with pytest.raises(ValueError) as error:
        resume(finished, "--max_steps=4", f"--{change}")
    message, name = str(error.value), change.partition("=")[0]
    assert name in message and str(finished) in message and "\n" not in message
    assert "--init=" in message and contents(finished) == before


def test_a_change_that_is_asked_for_is_made_and_kept_in_mind(run, capsys):
    resume(run, "--resume=changed", "--max_steps=3", "--data.frame_step=1", "--seed=5")
    assert "changed from step 2 on: data.frame_step from 2 to 1" in capsys.readouterr().out
    eras = checkpoint.read_state(run / "step_3")["history"]
    assert [era["from_step"] for era in eras] == [0, 2]
    assert [era["settings"]["data.frame_step"] for era in eras] == [2, 1]
    resume(run, "--max_steps=4")
    assert checkpoint.read_state(run / "step_4")["history"][-1]["settings"]["seed"] == 5


def test_what_may_change_is_taken_and_said(run, capsys):
    resume(run, "--max_steps=4", "--lr=5e-3", "--weight_decay=0.5", "--grad_clip=0.1",
           "--log_every=2", "--save_every=1", "--batch_size=1", "--grad_accum=2")
    said = capsys.readouterr().out
    for change in ("lr from 0.01 to 0.005", "weight_decay from 0.01 to 0.5",
                   "grad_clip from 1.0 to 0.1", "batch_size from 2 to 1"):
        assert f"changed from step 2 on: {change}" in said
    groups = checkpoint.read_state(run / "step_4")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5]


def test_another_weight_decay_has_an_effect(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    resume(run, "--max_steps=4")
    resume(other, "--max_steps=4", "--weight_decay=5")
    a, b = (load_file(out / "step_4/adapter_model.safetensors") for out in (run, other))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_milestones_of_before_stay(base, tmp_path):
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--milestones=[1]", "--keep=1"))
    resume(out, "--max_steps=5", "--save_every=1", "--milestones=[3]")
    assert checkpoint.saved_steps(out) == [1, 3, 5]
    resume(out, "--max_steps=6")
    assert checkpoint.saved_steps(out) == [1, 3, 6]


def test_a_run_that_is_beyond_the_steps_asked_for_says_so(run):
    for key in ("max_steps", "stop_at"):
        with pytest.raises(ValueError, match=f"is at step 2, which is beyond --{key}=1"):
            resume(run, f"--{key}=1", *(["--max_steps=4"] if key == "stop_at" else []))


def test_an_old_config_is_not_overwritten_by_a_run_that_is_refused(base, run):
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="already holds step 2; go on with --resume"):
        train.train(recipe(base, run, "--seed=3"))
    assert (run / "config.yaml").read_bytes() == before


def test_a_lost_or_damaged_config_is_told_by_the_checkpoint(run, capsys):
    (run / "config.yaml").write_bytes(b"\xff\xfe not: [yaml")
    resume(run, "--max_steps=3")
    assert "its checkpoint tells its settings" in capsys.readouterr().out
    (run / "config.yaml").unlink()
    resume(run, "--max_steps=4")
    assert config.load([str(run / "config.yaml")]).data.frame_step == 2


# The schedule

def test_5000_then_20000_without_a_jump(base, tmp_path, capsys):
    """Planned at once and stopped on the way, the schedule stays whole; a longer plan afterwards
    raises the learning rate, which is said."""
    whole, parts, jump = (tmp_path / name for name in ("whole", "parts", "jump"))
    args = [*SHORT, "--max_steps=6", "--warmup_steps=1"]
    train.train(recipe(base, whole, *args))
    assert train.train(recipe(base, parts, *args, "--stop_at=2")).name == "step_2"
    assert "from step 0 to 2, of 6 planned" in capsys.readouterr().out
    resume(parts)
    assert contents(parts / "step_6") == contents(whole / "step_6")
    assert "learning rate at step" not in capsys.readouterr().out
    train.train(recipe(base, jump, *args, "--max_steps=2"))
    resume(jump, "--max_steps=6")
    said = capsys.readouterr().out
    assert "learning rate at step 3: 9.05e-03, and 1.00e-06 as planned before" in said
    assert "--max_steps=6 --stop_at=2" in said


# Other numbers of processes

def test_more_or_fewer_processes_keep_the_clips_of_a_step():
    cfg = config.load(["--resume", "--max_steps=9"])
    own = settings.flat(config.load(["--batch_size=2", "--grad_accum=6", "--max_steps=9"]))
    said = []
    for saved, now, expected in ((2, 1, (2, 12)), (1, 2, (2, 3)), (1, 4, (1, 3)), (3, 1, (2, 18))):
        merged = settings.merge(cfg, own, 3, now, saved, True, said.append)
        assert (merged.batch_size, merged.grad_accum) == expected
        assert any(f"{now} ranks instead of {saved}" in line for line in said)
        said.clear()
    with pytest.raises(ValueError, match="batch_size x grad_accum x ranks 12, now 60"):
        settings.merge(cfg, own, 3, 5, 1, True, said.append)


# From an adapter

def test_a_new_run_starts_from_an_adapter(base, finished, tmp_path):
    """Its weights and LoRA shape; optimizer, schedule and step are new."""
    out = tmp_path / "new"
    train.train(recipe(base, out, *SHORT, f"--init={finished}/step_2", "--max_steps=1",
                       "--data.frame_step=1", "--lr=1e-12", "--min_lr=0", "--weight_decay=0"))
    state, before = lora.read(out / "step_1")[1], lora.read(finished / "step_2")[1]
    assert all(torch.allclose(state[name], before[name], atol=1e-8) for name in before)
    assert checkpoint.read_state(out / "step_1")["step"] == 1


def test_an_adapter_decides_the_shape_unless_another_is_asked_for(base, finished, tmp_path):
    args = [f"--out_dir={tmp_path / 'new'}", f"--init={finished}/step_2"]
    assert settings.with_adapter_of(config.load(args)).lora.rank == 4
    with pytest.raises(ValueError, match=r"has lora.rank 4, and 8 is asked for; leave --lora.rank"):
        settings.with_adapter_of(config.load([*args, "--lora.rank=8"]))


def test_a_step_without_its_state_is_kept_and_can_be_started_from(base, run, tmp_path, capsys):
    """Such as an adapter fetched from elsewhere: neither resumed nor overwritten."""
    (run / "step_2/state.pt").unlink()
    before = contents(run)
    for args in (["--resume"], []):
        with pytest.raises(ValueError, match=f"--init={run}/step_2"):
            train.train(recipe(base, run, *SHORT, *args))
    assert contents(run) == before
    shutil.copytree(run / "step_2", tmp_path / "other/step_2")
    train.train(recipe(base, run.with_name("new"), *SHORT, f"--init={run}/step_2"))


def test_a_damaged_step_is_set_aside_when_it_is_trained_again(base, tmp_path, capsys):
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--save_every=1"))
    adapter = out / "step_2/adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    resume(out)
    said = capsys.readouterr()
    assert f"{adapter}: damaged" in said.err and "going on from step 1" in said.err
    assert (out / "step_2.damaged/adapter_model.safetensors").read_bytes() == data
    assert checkpoint.saved_steps(out) == [1, 2]


def undone(monkeypatch, run, what=KeyboardInterrupt):
    """Runs `run`, which dies or is disturbed by `what` once its first step is logged."""
    log = Logger.log

    def log_and_disturb(self, done, **values):
        log(self, done, **values)
        if "loss" in values:
            if what is KeyboardInterrupt:
                raise what
            what()
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "log", log_and_disturb)
        with pytest.raises((KeyboardInterrupt, OSError)) as error:
            run()
    return str(error.value)


@pytest.mark.parametrize("args", [["RUN"], ["config.yaml", "--out_dir=RUN"],
                                  ["config.yaml", "--out_dir=RUN", "--init=ADAPTER"]])
def test_a_run_that_dies_before_its_first_step_is_saved_begins_as_before(
        base, finished, tmp_path, monkeypatch, capsys, args):
    """From its adapter, with its settings."""
    whole, died, adapter = tmp_path / "whole", tmp_path / "died", f"{finished}/step_2"
    train.train(recipe(base, whole, *SHORT, f"--init={adapter}"))
    undone(monkeypatch, lambda: train.train(recipe(base, died, *SHORT, f"--init={adapter}")))
    assert not checkpoint.step_folders(died)
    args = [arg.replace("RUN", str(died)).replace("ADAPTER", adapter) for arg in args]
    train.train(command_line.parse("train.py", "", [*args, "--resume"]))
    assert "goes on with its own" in capsys.readouterr().out
    assert contents(died / "step_2") == contents(whole / "step_2")
    own, other = (config.flat(config.load([f"{out}/config.yaml"])) for out in (whole, died))
    # Where and how are said anew for each start.
    assert {name for name in own if own[name] != other[name]} <= {"out_dir", "device"}


def test_of_a_run_without_a_step_another_start_may_be_asked_for(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "step_2")
    cfg = config.load([f"--out_dir={out}", "--resume", "--init=x", "--lr=3"])
    begun = settings.begun(cfg, print)
    assert (begun.init, begun.lr, begun.data.frame_step) == ("x", 3.0, 2)
    (out / "config.yaml").write_text("cut: [")
    with pytest.raises(ValueError, match="config.yaml.*or remove it, and the run begins anew"):
        resume(out)


def test_where_a_run_began_is_kept_and_cannot_change(base, finished, tmp_path):
    """It is not read again: the adapter may be gone."""
    adapter, out = shutil.copytree(finished / "step_2", tmp_path / "first"), tmp_path / "run"
    train.train(recipe(base, out, *SHORT, f"--init={adapter}", "--max_steps=1"))
    shutil.rmtree(adapter)
    for step, args in ((2, []), (3, [f"--init={tmp_path}/x/../first"])):
        train.train(command_line.parse("train.py", "", [
            str(out), "--resume", f"--max_steps={step}", *args]))
        assert config.load([str(out / "config.yaml")]).init == str(adapter)
    before = contents(out)
    for folder, began in ((out, f"from {adapter}"), (finished, "without --init")):
        with pytest.raises(ValueError, match=f"was begun {began} and is .*: --init=x comes too"):
            resume(folder, "--max_steps=4", "--init=x", "--resume=changed")
    assert contents(out) == before


# One writer

@pytest.mark.parametrize("how, saved_in", [
    (lambda out: out.rename(out.with_name("moved")), "moved"),
    (lambda out: shutil.rmtree(out), "run"),
    (lambda out: (out.rename(out.with_name("moved")), out.mkdir()), "moved"),
    (lambda out: (out / "lock").unlink(), None),
    (lambda out: (shutil.rmtree(out), out.write_text("")), None),
], ids=["moved", "removed", "moved, another there", "lock removed", "a file there"])
def test_a_run_whose_folder_is_gone_is_not_split(base, tmp_path, monkeypatch, how, saved_in):
    """What was done is saved in what is left of it, and the run ends."""
    out = tmp_path / "run"
    line = undone(monkeypatch, lambda: train.train(recipe(base, out, *SHORT, "--save_every=1")),
                  lambda: how(out))
    folders = {path.parent.parent.name for path in tmp_path.glob("*/*/state.pt")}
    assert folders == ({saved_in} if saved_in else set()) and "\n" not in line
    assert "while this run was writing here" in line and str(out) in line
    if saved_in:
        assert f"step 1 was saved in {tmp_path / saved_in}" in line
        resume(tmp_path / saved_in, f"--model.checkpoint={base}/base.pt",
               f"--data.path={base}/data")
        assert checkpoint.saved_steps(tmp_path / saved_in) == [1, 2]
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_lock_leaves_that_of_another_alone(tmp_path):
    """The folder was moved, and another run began under its name."""
    first = Lock(tmp_path / "run")
    first.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    with Lock(tmp_path / "run") as second:
        assert "has taken over" in first.lost() and first.where() == tmp_path / "moved"
        first.release()
        assert not second.lost() and not (tmp_path / "moved/lock").exists()


def test_a_second_run_is_refused_and_says_who_is_there(base, tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from running.lock import Lock\n"
         f"with Lock({str(out)!r}): print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"{out}: process {holder.pid} on .* is writing here"):
        train.train(recipe(base, out, *SHORT))
    holder.kill()
    holder.wait()
    assert train.train(recipe(base, out, *SHORT)).name == "step_2"
    assert not (out / "lock").exists()


def test_where_flock_is_not_known_the_counter_decides(tmp_path, monkeypatch):
    """As on NFS or a mounted Drive, where the holder is on another machine."""
    from running import lock
    monkeypatch.setattr(lock, "_try_flock", lambda fd: None)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    monkeypatch.setattr(lock, "_gone", lambda holder: False)
    first = lock.Lock(tmp_path)
    first.acquire()
    with pytest.raises(ValueError, match="is writing here"):
        lock.Lock(tmp_path).acquire()
    first.released.set()                # as if its machine had gone
    second = lock.Lock(tmp_path)
    second.acquire()
    assert "has taken over" in first.lost() and not second.lost()
    second.release()
    # And has ended since: what it left may be another run's.
    assert "its lock was removed while this run was writing here" in first.lost()
    assert first.where() is None


# Where the values came from

def test_a_base_may_move_but_not_change(base, run, tmp_path):
    shutil.copy(base / "base.pt", tmp_path / "moved.pt")
    resume(run, "--max_steps=3", f"--model.checkpoint={tmp_path}/moved.pt")
    with pytest.raises(ValueError, match="trained on another base model"):
        resume(run, "--max_steps=4", "--model.checkpoint=random")
    resume(run, "--max_steps=4", "--model.checkpoint=random", "--resume=changed")
    assert checkpoint.saved_steps(run) == [2, 3, 4]


def test_episodes_elsewhere_are_other_data(base, run, tmp_path):
    (tmp_path / "data").mkdir()
    write_episodes(tmp_path / "data", n=4, length=12, patches=4, move=0.05)
    with pytest.raises(ValueError, match="another data.path"):
        resume(run, "--max_steps=3", f"--data.path={tmp_path}/data")
