"""What is typed is understood or told, in one line and before anything is loaded."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
import energy
import export
from running import checks, command_line


ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests/old_files"
SCRIPTS = ["train.py", "latents.py", "energy.py", "export.py", "toy.py"]
BENCH = ["bench.speed", "bench.measure", "bench.toy_study"]
# As in the old run's config.yaml, which names base.pt and data/.
SMALL = "--model.checkpoint=base.pt --model.size=tiny --data.path=data"


@pytest.fixture(scope="module")
def files_to_name(tmp_path_factory):
    """A run, and files that are there and hold nothing."""
    tmp_path = tmp_path_factory.mktemp("files_to_name")
    shutil.copytree(OLD / "run", tmp_path / "runs/x")
    shutil.copytree(OLD / "run/step_4", tmp_path / "runs/x/step_50")
    shutil.copytree(OLD / "run/step_4", tmp_path / "runs/x/step_5000")
    shutil.copytree(OLD / "run/step_4", tmp_path / "runs/x/step_6000")
    for name in ("base.pt", "data/a.npz", "droid/1.0.0/d-train.tfrecord-0", "lat/store.json",
                 "land.npz", "pack.zip", "runs/new/config.yaml", "runs/land/landscapes.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("empty", "[odd] name"):
        (tmp_path / name).mkdir()
    (tmp_path / "[odd] name/a.npz").write_text("")
    shutil.copy(tmp_path / "runs/x/config.yaml", tmp_path / "runs/new/config.yaml")
    shutil.copy(ROOT / "config.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def folder(files_to_name, monkeypatch):
    """The working folder, not to be written to."""
    monkeypatch.chdir(files_to_name)
    monkeypatch.setattr(checks, "_is_installed", lambda package: True)
    return files_to_name


@pytest.fixture
def own_folder(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(script, line):
    return command_line.parse(script, "What it does.", shlex.split(line))


UNDERSTOOD = [
    ("--batch_size 2", "batch_size", 2),
    ("--batch-size=3", "batch_size", 3),
    ("--Batch_Size 3", "batch_size", 3),
    ("--data.frame-step 3", "data.frame_step", 3),
    ("batch_size=2", "batch_size", 2),
    ("lora.rank=2", "lora.rank", 2),
    ("-lr=1e-3", "lr", 1e-3),
    ("-lr 1e-3", "lr", 1e-3),
    ("---lr=1e-3", "lr", 1e-3),
    ("—lr=1e-3", "lr", 1e-3),
    ("–lr 1e-3", "lr", 1e-3),
    ("−−lr=1e-3", "lr", 1e-3),
    ("--lr 1e-3 --batch_size 2", "lr", 1e-3),
    ("--lora.targets attn.qkv,mlp.fc1", "lora.targets", ("attn.qkv", "mlp.fc1")),
    ("--milestones [1,2]", "milestones", (1, 2)),
    ("--resume", "resume", True),
    ("--resume true", "resume", True),
    ("--resume changed", "resume", "changed"),
    ("--compile off", "compile", False),
    ("--resume --lr 1e-3", "resume", True),
    ("--out_dir 0712", "out_dir", "0712"),
    ("--data.camera=--x", "data.camera", "--x"),
    ("--lr=1 --lr=2", "lr", 2.0),
    ("--device= config.yaml", "device", ""),
    ("--data.latents=lat --data.path=nowhere", "data.latents", "lat"),
    ("--data.path 'droid/1.0.0'", "data.path", "droid/1.0.0"),
    ("--data.path='[odd] name'", "data.path", "[odd] name"),
    ("--data.path='da*/?.npz'", "data.path", "da*/?.npz"),
    ("--data.path=gs://nowhere", "data.path", "gs://nowhere"),
    ("--model.checkpoint random", "model.checkpoint", "random"),
]


@pytest.mark.parametrize("line, name, expected", UNDERSTOOD)
def test_understood(folder, line, name, expected):
    cfg = parse("train.py", f"config.yaml {SMALL} {line}")
    assert config.flat(cfg)[name] == expected and cfg.given[name] == "command line"


TOLD = [
    # Spelling
    ("train.py", "config.yaml --batchsize 2", "did you mean batch_size?"),
    ("train.py", "config.yaml --batch", "did you mean batch_size?"),
    ("train.py", "config.yaml batchsize=2", "batchsize=2: no such config file"),
    ("train.py", "config.yaml --lr==1e-3", "--lr==1e-3: write --lr=VALUE, with one ="),
    ("train.py", "config.yaml --lr = 1e-3", "no spaces"),
    ("train.py", "config.yaml --lr= 1e-3", "no spaces"),
    ("train.py", "config.yaml --lr", "lr expects a finite number, got no value"),
    ("train.py", "config.yaml --lr --resume", "lr expects a finite number, got no value"),
    ("train.py", "config.yaml --lr -1", "it must be at least 0"),
    ("train.py", "--wandb config.yaml", "wandb expects text, got no value"),
    ("train.py", "config.yaml -b 2", "unknown key b"),
    ("train.py", "config.yaml --", "--: neither a file nor --key=value"),
    ("train.py", "config.yaml ''", "one argument is empty"),
    ("train.py", "config.yaml --lora=8", "lora has keys such as lora.rank; got '8'"),
    ("train.py", "config.yaml --adapters=x", "unknown key adapters"),
    ("train.py", "config.yaml --resume 2", "2: no such config file"),
    ("train.py", "runs/x ~nobody-here", "no such user"),
    ("energy.py", "config.yaml --adapter=x", "--adapter; did you mean --adapters?"),
    ("energy.py", "config.yaml --adaptors x", "--adaptors; did you mean --adapters?"),
    ("energy.py", "runs/x --step=50", "--step; did you mean --steps?"),
    ("energy.py", "runs/x --steps", "--steps needs one value"),
    ("energy.py", "runs/x --steps=", "--steps needs one value"),
    ("energy.py", "runs/x --steps=4 --steps=50", "--steps needs one value"),
    ("energy.py", "runs/x --steps=four", "--steps=four: give whole numbers"),
    ("energy.py", "runs/x --steps=-4", "give whole numbers"),
    ("energy.py", "runs/x --steps=4,7", "step_7: no such step; runs/x has step_4, step_50"),
    # Paths
    ("train.py", "nowhere.yaml", "nowhere.yaml: no such config file"),
    ("train.py", "runs", "runs: no config.yaml in it; name a recipe"),
    ("train.py", str(ROOT), "no config.yaml in it; name a recipe"),
    ("train.py", "base.pt", "base.pt: a recipe has keys such as out_dir; got nothing"),
    ("train.py", "runs/x", "runs/x: to go on with this run add --resume"),
    ("train.py", "runs/x/step_4", "--init=runs/x/step_4 starts from here"),
    ("train.py", f"config.yaml {SMALL} --data.path=/nowhere", "/nowhere: no file matches"),
    ("train.py", f"config.yaml {SMALL} --data.path=", "data.path is empty"),
    ("train.py", f"config.yaml {SMALL} --data.path=droid", "--data.path=droid/1.0.0?"),
    ("train.py", f"config.yaml {SMALL} --data.path=empty", "the folder holds nothing"),
    ("train.py", f"config.yaml {SMALL} --data.path=x*/*", "x*/*: no file matches"),
    ("train.py", f"config.yaml {SMALL} --data.latents=data", "data: no stored latents"),
    ("train.py", f"config.yaml {SMALL} --init=x", "x: not an adapter folder"),
    ("train.py", f"config.yaml {SMALL} --init=runs/x", "runs/x/step_6000 is the newest"),
    ("train.py", f"config.yaml {SMALL} --out_dir=base.pt", "base.pt: is a file"),
    ("train.py", f"config.yaml {SMALL} --out_dir=.", "config.yaml: is of no run"),
    ("train.py", f"config.yaml {SMALL} --out_dir=base.pt/x", "base.pt/x: nothing can be written"),
    ("train.py", f"config.yaml {SMALL} --out_dir=/proc/x", "/proc/x: nothing can be written"),
    ("train.py", "config.yaml --data.path=data", "vjepa2-ac-vitg.pt: no such checkpoint"),
    ("train.py", "config.yaml --model.checkpoint=data", "no such checkpoint but a folder"),
    ("latents.py", "config.yaml --data.path=/nowhere", "/nowhere: no file matches"),
    ("latents.py", f"config.yaml {SMALL} --data.latents=base.pt", "base.pt: is a file"),
    ("energy.py", "config.yaml land.npz", "energy.py --from=land.npz reads landscapes"),
    ("energy.py", "--from=none.npz", "none.npz: no such file"),
    ("energy.py", "--from=land.npz --lr=1", "--lr=1: --from reads arrays alone"),
    ("energy.py", "--from=land.npz --adapters=x", "--adapters: --from reads arrays alone"),
    ("energy.py", "runs/x --adapters=y", "y: not an adapter folder"),
    ("energy.py", "runs/x --adapters=runs/x/config.yaml", "a folder, not a file in it"),
    ("energy.py", "runs/new", "runs/new: holds no step_N"),
    ("export.py", "", "python export.py slim SOURCE.pt"),
    ("export.py", "marge a b", "marge: no command; there are slim, baseline"),
    ("export.py", "slim base.pt", "slim takes 2 paths, got 1"),
    ("export.py", "slim none.pt x.safetensors", "none.pt: no such checkpoint"),
    ("export.py", "slim base.pt base.pt", "over the file that is read"),
    ("export.py", "slim base.pt x.safetensors --dtype=int8", "choose from bf16, fp16, fp32"),
    ("export.py", "slim base.pt x.safetensors --steps=4", "--steps does not apply to slim"),
    ("export.py", "adapter runs/x/step_4 y --lora.rank=2", "--lora.rank=2 does not apply"),
    ("export.py", "adapter runs/x/step_4 data", "data is there already"),
    ("export.py", "baseline runs/x data", "data is there already"),
    ("export.py", "merge config.yaml runs/x/step_4", "config.yaml: not an adapter folder"),
    ("export.py", "merge runs/x m.pt", "a run, not one of its steps"),
    ("export.py", "merge data m.pt", "data: no config.yaml in it"),
    ("export.py", "merge runs/x/step_4 base.pt", "over the file that is read"),
    ("export.py", "merge runs/x/step_4 data", "data: is a folder"),
    ("export.py", "merge runs/x/step_4 runs/x/step_4/state.pt", "lies in an adapter's folder"),
    ("export.py", "package runs", "runs: no config.yaml in it"),
    ("export.py", "package none", "none: no such folder"),
    ("export.py", "package runs/x --trajectories=0", "--trajectories=0: give a whole number"),
    ("export.py", "package runs/x --trajectories=1e3", "give a whole number"),
    ("export.py", "package runs/x --steps=0,7", "step_7: no such step"),
    ("export.py", "verify none.zip", "none.zip: no such file"),
    ("toy.py", "x", "x: toy.py takes no such argument"),
    ("toy.py", "--seed=3", "--seed=3: toy.py takes no such argument"),
    ("bench.toy_study", "--seed=3", "did you mean --seeds?"),
    ("bench.speed", "--part=x", "did you mean --parts?"),
    ("bench.measure", "load --files=x", "did you mean --file?"),
]


@pytest.mark.parametrize("script, line, says", TOLD)
def test_told_in_one_line(folder, script, line, says):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as error, command_line.one_line_errors(script):
        parse(script, line)
    message = str(error.value)
    assert message.startswith(f"{script}: ") and says in message and "\n" not in message
    assert len(message) < 1000 and sorted(folder.rglob("*")) == before


def test_a_run_folder_in_place_of_a_recipe(folder):
    """It has the run's settings, wherever it has been moved to, and keys override them."""
    cfg = parse("train.py", "runs/x --resume --max_steps=9")
    assert (cfg.out_dir, cfg.resume, cfg.max_steps, cfg.lr) == ("runs/x", True, 9, 0.01)
    assert "lora.rank" in cfg.given and "save_every" in cfg.given
    new = parse("train.py", "runs/x --out_dir=runs/y")
    assert (new.out_dir, new.max_steps, new.lora.rank) == ("runs/y", 4, 4)
    assert parse("train.py", "runs/x --debug").out_dir.startswith("runs/x/debug-")
    assert parse("latents.py", "runs/x").data.frame_step == 1
    assert parse("bench.speed", "runs/x --parts=files").options == {"parts": "files"}


def test_what_counted_for_one_start_is_not_taken_over(own_folder):
    path = own_folder / "runs/x/config.yaml"
    text = path.read_text().replace("resume: false", "resume: true")
    path.write_text(
        text.replace("debug: false", "debug: true\nstop_at: 3\ninit: gone"))
    cfg = parse("train.py", "runs/x --out_dir=runs/y")
    assert (cfg.resume, cfg.stop_at, cfg.init, cfg.debug, cfg.max_steps) == (False, 0, "", False, 4)


@pytest.mark.parametrize("line, steps", [
    ("runs/x --steps=4,50", ["runs/x/step_4", "runs/x/step_50"]),
    ("runs/x --steps 50,4,50", ["runs/x/step_50", "runs/x/step_4"]),
    ("runs/x --steps=[0,4]", ["runs/x/step_4"]),                # 0: the baseline, always there
    ("runs/x --steps=step_4", ["runs/x/step_4"]),
    ("runs/x", ["runs/x/step_5000", "runs/x/step_6000"]),       # a milestone, the newest one
    ("runs/x/step_50", ["runs/x/step_50"]),
    ("runs/x --adapters=runs/x/step_4", ["runs/x/step_4"]),
    ("runs/x --adapters='runs/x/step_4, baseline' --steps=50",
     ["runs/x/step_50", "runs/x/step_4", "baseline"]),
    (f"config.yaml {SMALL}", []),
    (f"config.yaml {SMALL} --out_dir=runs/x --steps=4", ["runs/x/step_4"]),
])
def test_the_adapters_that_energy_compares(folder, line, steps):
    given = parse("energy.py", line)
    assert given.adapters == steps and given.source == ""
    assert bool(given.note) == (line == "runs/x")


def test_where_landscapes_are_read_from(folder):
    assert parse("energy.py", "--from land.npz").source == "land.npz"
    assert parse("energy.py", "--from=runs/land").source == "runs/land/landscapes.npz"


def test_what_export_takes(folder):
    merge = parse("export.py", "merge runs/x/step_50 m.pt")
    assert merge.paths == ["runs/x/step_50", "m.pt"] and merge.cfg.model.size == "tiny"
    other = parse("export.py", f"merge config.yaml runs/x/step_50 m.pt {SMALL} --lora.rank=2")
    assert other.paths == ["runs/x/step_50", "m.pt"] and other.cfg.lora.rank == 2
    package = parse("export.py", "package runs/x --trajectories 3")
    assert (package.steps, package.trajectories) == ([0, 5000, 6000], 3)
    assert parse("export.py", "package runs/x --steps=4,0").steps == [4, 0]
    slim = parse("export.py", "--dtype=fp32 slim base.pt x.safetensors --model.size tiny")
    assert (slim.command, slim.dtype, slim.cfg.model.size) == ("slim", "fp32", "tiny")
    baseline = parse("export.py", "baseline runs/x step_0")
    assert baseline.paths == ["step_0"] and baseline.cfg.data.path == "data"


def test_on_resume_the_paths_are_those_of_the_run(own_folder):
    """The recipe's own base and data need not be there; what the command line gives is checked."""
    assert parse("train.py", "config.yaml --resume --out_dir=runs/x").resume
    for given, says in (("--data.path=gone", "gone: no file"), ("--out_dir=runs/y", "vitg.pt: no")):
        with pytest.raises(ValueError, match=says):
            parse("train.py", f"config.yaml --resume --out_dir=runs/x {given}")
    # A damaged one: the checkpoint knows what it needs.
    (own_folder / "runs/x/config.yaml").write_text("cut: [")
    assert parse("train.py", "config.yaml --resume --out_dir=runs/x").resume


@pytest.mark.parametrize("key, package", [
    ("--tensorboard", "tensorboard"), ("--wandb=x", "wandb"),
    ("--optimizer=adamw8bit", "bitsandbytes")])
def test_packages_that_are_not_there(folder, monkeypatch, key, package):
    cfg = config.load([*shlex.split(SMALL), "--optimizer=adamw", key])
    checks.check_training(cfg)
    monkeypatch.setattr(checks, "_is_installed", lambda package: False)
    with pytest.raises(ValueError, match=f"{package} is not installed: pip install {package}, or"):
        checks.check_training(cfg)


def test_only_records_need_tensorflow(folder, monkeypatch):
    monkeypatch.setattr(checks, "_is_installed", lambda package: package != "tensorflow")
    for path in ("droid/1.0.0", "gs://bucket/x"):
        with pytest.raises(ValueError, match="needs TensorFlow: pip install tensorflow"):
            parse("train.py", f"config.yaml {SMALL} --data.path={path}")
        parse("train.py", f"config.yaml {SMALL} --data.path={path} --data.latents=lat")
    parse("train.py", f"config.yaml {SMALL}")


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """Such as wandb/, which W&B makes in the working folder."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not checks._is_installed("no_such_package") and checks._is_installed("yaml")


# Help

@pytest.mark.parametrize("script", SCRIPTS + BENCH)
def test_help_anywhere(script, capsys):
    for args in (*([word] for word in command_line.HELP), ["config.yaml", "-h"],
                 ["--help", "--nonsense=1"], ["merge", "a", "help"]):
        with pytest.raises(SystemExit) as done:
            command_line.parse(script, "What it does.", args)
        assert not done.value.code
    text = capsys.readouterr().out
    assert text.startswith("What it does.")
    for option in command_line.OPTIONS[script]:
        assert f"  --{option}=" in text


def test_help_lists_every_key_with_its_default_and_meaning():
    text = command_line.help_text("train.py", "")
    for name, value in config.flat(config.Config()).items():
        default, meaning = re.search(
            rf"^  --{re.escape(name)}=(\S*)\s+(\S.*)$", text, re.M).groups()
        default = default.replace('""', "")             # as a shell would
        assert config.flat(config.load([f"--{name}={default}"]))[name] == value
        assert len(meaning) > 3 and not meaning.startswith("--")
    assert "--seed=" not in command_line.help_text("toy.py", "")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("script", ["train.py", "latents.py", "energy.py", "bench.measure"])
def test_no_arguments_ask_for_help(script, capsys):
    with pytest.raises(SystemExit) as done:
        command_line.parse(script, "What it does.", [])
    assert not done.value.code and "What it does." in capsys.readouterr().out


# Errors

@pytest.mark.parametrize("error, line", [
    (ValueError("a\n  b"), "x.py: a b"), (OSError(28, "full", "f"), "x.py: [Errno 28] full: 'f'"),
    (MemoryError(), "x.py: out of memory"), (ImportError("no y"), "x.py: no y"),
    (RuntimeError("PytorchStreamWriter failed writing file"), "x.py: PytorchStreamWriter failed"),
    (RuntimeError("Parent directory /proc/x does not exist."), "x.py: Parent directory /proc/x"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "x.py: DefaultCPUAllocator: can"),
    (RuntimeError("a bug"), None), (KeyError("a bug"), None)])
def test_errors_that_the_user_can_mend_are_one_line(error, line):
    with pytest.raises(SystemExit if line else type(error)) as found:
        with command_line.one_line_errors("x.py"):
            raise error
    assert not line or str(found.value).startswith(line)
    with pytest.raises(type(error)), command_line.one_line_errors("x.py", debug=True):
        raise error


# The scripts themselves

@pytest.fixture
def without_torch(own_folder):
    """An environment in which importing PyTorch, TensorFlow or a model of theirs ends the process
    with another code."""
    for name in ("torch", "tensorflow", "safetensors"):
        (own_folder / "poison" / name).mkdir(parents=True)
        (own_folder / "poison" / name / "__init__.py").write_text("import os; os._exit(77)\n")
    return os.environ | {"PYTHONPATH": f"{own_folder / 'poison'}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("script, line, code, says", [
    ("train.py", "nowhere.yaml", 1, "train.py: nowhere.yaml: no such config file"),
    ("latents.py", "config.yaml --data.path=/nowhere", 1, "latents.py: /nowhere: no file matches"),
    ("energy.py", "runs/x --steps=7", 1, "energy.py: runs/x/step_7: no such step"),
    ("export.py", "merge x y", 1, "export.py: x: not an adapter folder"),
    ("toy.py", "x", 1, "toy.py: x: toy.py takes"),
    ("train.py", "config.yaml --help", 0, ""), ("export.py", "merge -h", 0, ""),
    ("bench.speed", "help", 0, ""),
    ("train.py", "runs/x --resume", 77, ""),                # all is well: PyTorch is imported
])
def test_told_before_pytorch_is_loaded(own_folder, without_torch, script, line, code, says):
    module = ["-m", script] if script in BENCH else [str(ROOT / script)]
    done = subprocess.run([sys.executable, *module, *shlex.split(line)], cwd=own_folder, text=True,
                          env=without_torch, capture_output=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(says) and done.stderr.count("\n") == (code == 1)
    assert ("--lora.rank=16" in done.stdout) == (code == 0)


def test_a_run_folder_through_export_and_energy(base, tmp_path, monkeypatch, capsys):
    """No recipe is named; what is computed is what the run's settings say."""
    for name in ("base.pt", "data"):
        (tmp_path / name).symlink_to(base / name)
    shutil.copytree(OLD / "run", tmp_path / "runs/x")
    monkeypatch.chdir(tmp_path)
    export.main(["merge", "runs/x/step_4", "merged.pt"])
    export.main(["package", "runs/x", "--trajectories=1"])
    assert export.verify(export.PACKAGE)["steps"] == [0, 4] and Path("merged.pt").exists()
    energy.main(["runs/x", "--energy.pairs=1", "--energy.planners=[]", "--energy.grid=5"])
    arrays = energy.load("runs/x/energy/step_4/landscapes.npz")
    assert arrays["checkpoints"].tolist() == ["baseline", "step_4"]
    assert len(arrays["episodes"]) == 1 and arrays["frame_step"] == 1
    assert "runs/x: its milestones and the newest step" in capsys.readouterr().out
