"""The structure of the project: sizes of files, which module imports which, and runs without fast/.

CONTRIBUTING.md explains the floors. What counts as a file of the project is what git tracks, or
would track if it were added."""
import ast
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
import model


ROOT = Path(__file__).resolve().parents[1]

# Bottom to top: files and folders. A module imports from floors below its own and from its own
# folder, so that whoever reads upwards from the bottom has seen everything a file builds on.
FLOORS = ["files", "settings", "config", "vjepa2_src", "lora", "model", "analysis", "report",
          "episodes", "running", "droid", "fast", "latents", "checkpoint", "evaluation", "energy",
          "train", "decoder", "sweep", "export", "tabletop", "toy", "bench", "tests"]
USES_FAST = {"fast", "toy", "bench", "tests"}                   # floors
# inside functions
USES_FAST_WHEN_ASKED = {"train.py", "latents.py", "evaluation/analysis.py", "evaluation/plan.py"}

READING_PATH = ["config.py", "vjepa2_src/__init__.py", "vjepa2_src/blocks.py",
                "vjepa2_src/encoder.py", "vjepa2_src/predictor.py", "model.py", "lora.py",
                "droid.py", "episodes/poses.py", "episodes/clips.py", "train.py"]


# Files

def project_files(*endings):
    """Paths relative to ROOT, with one of the endings if some are given."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = set(listed.stdout.split("\0"))
    except (OSError, subprocess.CalledProcessError):
        # A checkout without git, or not a clone: all but caches and what runs leave behind.
        names = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")}
        names = {name for name in names if not re.search(
            r"(^|/)(__pycache__|\.venv|venv|\.\w+_cache|\.hypothesis)/|^(runs|latents)/", name)}
    return sorted(name for name in names
                  if (ROOT / name).is_file() and name.endswith(endings or ""))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def n_lines(*names):
    return sum(len(read(name).splitlines()) for name in names)


def is_test(name):
    return name.startswith("tests/") or name in ("test_smoke.py", "conftest.py")


def test_few_files_on_top():
    on_top = [name for name in project_files(".py") if "/" not in name]
    assert len(on_top) <= 14, on_top


@pytest.mark.parametrize("names, most", [
    (["README.md"], 160), (["lora.py"], 220), (["train.py"], 260),
    ([name for name in READING_PATH if name.startswith("vjepa2_src/")], 300), (READING_PATH, 2000),
], ids=["README", "lora", "train", "vjepa2_src", "reading path"])
def test_what_is_read_first_stays_short(names, most):
    lengths = {name: n_lines(name) for name in names}
    assert sum(lengths.values()) <= most, f"{sum(lengths.values())} lines: {lengths}"


def test_the_reading_path_has_all_of_the_networks():
    networks = [name for name in project_files(".py") if name.startswith("vjepa2_src/")]
    assert networks and set(networks) <= set(READING_PATH)


def test_the_readme_counts_right():
    """Lines in its reading order; a/{b,c}.py stands for a/b.py and a/c.py."""
    rows = re.findall(r"^\| \d \| (.*?) \| (\d+) \|", read("README.md"), re.M)
    assert len(rows) == 6
    for cell, lines in rows:
        names = []
        for name in re.findall(r"`(.*?)`", cell):
            prefix, _, rest = name.partition("{")
            inner, _, suffix = rest.partition("}")
            names += [prefix + part + suffix for part in inner.split(",")]
        files = [file for name in names for file in project_files()
                 if file == name or name.endswith("/") and file.startswith(name)]
        assert n_lines(*files) == int(lines), (cell, n_lines(*files))


def test_test_files_have_at_most_400_lines():
    lengths = {name: n_lines(name) for name in project_files(".py") if is_test(name)}
    long = {name: n for name, n in lengths.items() if n > 400}
    assert not long, long


def test_lines_have_at_most_100_columns():
    long = [f"{name}:{number}" for name in project_files(".py", ".md", ".yaml", ".yml")
            for number, line in enumerate(read(name).splitlines(), 1)
            if len(line) > 100 and not name.startswith("tests/old_files/")]
    assert not long, f"{len(long)} lines: {long[:20]}"


def test_enough_lines_say_why():
    """Full-line comments are 3 % of the code or more. Those in strings and docstrings do not
    count."""
    code = [name for name in project_files(".py") if not is_test(name)]
    n_comments = 0
    for name in code:
        tokens = tokenize.generate_tokens(io.StringIO(read(name)).readline)
        n_comments += sum(token.type == tokenize.COMMENT and token.line.strip() == token.string
                          for token in tokens)
    share = n_comments / n_lines(*code)
    assert share >= 0.03, f"{share:.1%}"


# Imports

def modules():
    """{name by which it is imported: path}, such as {"fast.memory": "fast/memory.py"}."""
    found = {}
    for path in project_files(".py"):
        # pyproject.toml puts tests/ on the path, so a file in there is imported by its own name.
        name = path.removeprefix("tests/").removesuffix(".py").removesuffix("/__init__")
        found[name.replace("/", ".")] = path
    return found


def floor_of(path):
    return "tests" if is_test(path) else path.split("/")[0].removesuffix(".py")


@lru_cache
def imports():
    """[(importing module, imported module of this project, place, inside a function?)]"""
    known, found = modules(), []
    for importer, path in known.items():
        tree = ast.parse(read(path), path)
        functions = [node for node in ast.walk(tree)
                     if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        lazy = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                # The last part is a module (`from fast import memory`) or a name in one.
                name = name if name in known else name.rpartition(".")[0]
                if name in known:
                    found.append((importer, name, f"{path}:{node.lineno}", id(node) in lazy))
    return found


def test_every_file_is_on_a_floor():
    missing = [path for path in modules().values() if floor_of(path) not in FLOORS]
    assert not missing, f"{missing}: say in FLOORS what they may import"


def test_no_module_imports_upwards():
    known, wrong = modules(), []
    for importer, imported, place, _ in imports():
        here, there = floor_of(known[importer]), floor_of(known[imported])
        if here != there and FLOORS.index(there) > FLOORS.index(here):
            wrong.append(f"{place} imports {imported}")
    assert not wrong, wrong


def test_no_modules_import_each_other():
    """In functions either: a circle that is closed later is still a circle for the reader."""
    graph = {}
    for importer, imported, _, _ in imports():
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_fast_is_imported_where_it_is_asked_for_and_nowhere_else():
    known, wrong = modules(), []
    for importer, imported, place, lazy in imports():
        path = known[importer]
        allowed = floor_of(path) in USES_FAST or (path in USES_FAST_WHEN_ASKED and lazy)
        if floor_of(known[imported]) == "fast" and not allowed:
            wrong.append(f"{place} imports {imported}")
    assert not wrong, wrong


def test_the_networks_know_nothing_of_speed():
    words, found = re.compile("kernel|triton|compile|cuda|memory", re.IGNORECASE), []
    for name in project_files(".py"):
        if name.startswith("vjepa2_src/"):
            # Conv3d's attribute kernel_size has PyTorch's name.
            lines = read(name).replace(".kernel_size", "").splitlines()
            found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1)
                      if words.search(line)]
    assert not found, found


# Runs without fast/

def run_pipeline(folder):
    """Trains, resumes, stores latents, trains from them and computes landscapes, on a small model
    and the CPU, with the default --compile=true."""
    import energy
    import latents
    import small
    import train
    base = small.write(folder)
    # bitsandbytes would take longer to import than all the rest.
    short = ["--optimizer=adamw", "--batch_size=1", "--grad_accum=1", "--warmup_steps=1",
             "--val_every=2", "--val_batches=1", "--energy.pairs=1", "--energy.planes=[xy]",
             "--energy.grid=5", "--energy.planners=[]"]
    run, store = folder / "run", f"--data.latents={folder}/store"
    train.train(small.recipe(base, run, *short, "--max_steps=2"))
    last = train.train(small.recipe(base, run, *short, "--max_steps=4", "--resume"))
    latents.encode(small.recipe(base, run, *short, store))
    train.train(small.recipe(base, folder / "stored", *short, store, "--max_steps=1"))
    arrays = energy.analyse(small.recipe(base, run, *short), [last], folder / "landscapes.npz")
    assert last.name == "step_4" and arrays["checkpoints"].tolist() == ["baseline", "step_4"]
    assert Path(train.__file__).parent == Path.cwd()
    loaded = [name for name in sys.modules if name.split(".")[0] == "fast"]
    assert not loaded, loaded


def run_in(checkout, folder):
    """`run_pipeline` in a process of its own, with the modules of a checkout."""
    code = "import pathlib, sys, test_house; test_house.run_pipeline(pathlib.Path(sys.argv[1]))"
    env = os.environ | {"PYTHONPATH": str(checkout / "tests"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=checkout, env=env,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_run_on_the_cpu_loads_no_module_of_fast(tmp_path):
    run_in(ROOT, tmp_path)


def test_a_checkout_without_fast_does_everything(tmp_path):
    checkout, folder = tmp_path / "checkout", tmp_path / "files"
    folder.mkdir()
    for name in project_files():
        if not name.startswith("fast/"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    assert not (checkout / "fast").exists()
    run_in(checkout, folder)


@pytest.mark.parametrize("keys, device, missing, expected", [
    ([], "cuda", "", True),
    ([], "cpu", "", False),
    (["--compile=false"], "cuda", "", False),
    (["--debug"], "cuda", "", False),
    ([], "cuda", "fast", False),
    ([], "cuda", "the files in fast", False),
    ([], "cuda", "triton", False),
    ([], "cuda", "C compiler", False),
])
def test_fast_is_asked_for_only_where_it_can_run(monkeypatch, keys, device, missing, expected):
    """On a GPU as well --compile=false loads nothing of fast/: train.py, latents.py and energy.py
    import it after this question."""
    def find_spec(name):
        if name == missing:
            return None
        # a folder without __init__.py, such as one with old caches alone, has no origin
        return SimpleNamespace(origin=None if name in missing.split() else name)

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which",
                        lambda name: None if missing == "C compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    cfg = config.load(["config.yaml", *keys])
    assert model.can_accelerate(cfg, torch.device(device)) is expected
