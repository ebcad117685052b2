"""Every export reads back as what it was, loads where it should, and a damaged one is named."""
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import energy
import export
import files
import lora
import model
import train
from parity import tiny
from small import recipe, run_python


KEYS = ["--model.size=tiny", "--precision=fp32"]
PROJECT = Path(__file__).resolve().parents[1]
# written by the version of this project in which all modules were in one folder
OLD_PACKAGE = PROJECT / "tests/old_files/checkpoints_for_colab.zip"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run folder with steps 2 and 4, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("export") / "run"
    train.train(recipe(base, folder, "--max_steps=4", "--save_every=2", "--optimizer=adamw",
                       "--milestones=[2]"))
    return folder


def probe(predictor):
    """The predictor's output for three frames of random latents, actions and states."""
    z = torch.randn(1, 3 * 16, 52, generator=torch.Generator().manual_seed(0))
    actions = 0.1 * torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1))
    dtype = predictor.predictor_norm.weight.dtype
    with torch.no_grad():
        return predictor.eval()(model.layer_norm(z).to(dtype), actions, actions)


def unpack(package, folder):
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)


# Weights

@pytest.mark.parametrize("name, tolerance", [("fp32", 0), ("bf16", 2e-2), ("fp16", 2e-3)])
def test_slim_is_the_same_model_to_its_precision(base, run, tmp_path, name, tolerance, capsys):
    source, target = f"{base}/base.pt", f"{tmp_path}/slim.safetensors"
    export.main(["slim", source, target, f"--dtype={name}", "--model.size=tiny"])
    assert "every value read back" in capsys.readouterr().out
    encoder, predictor = model.load(source, "tiny")
    rounded_encoder, rounded_predictor = model.load(target, "tiny")
    # adapters of the one fit the other
    assert rounded_encoder.base_fingerprint == encoder.base_fingerprint
    lora.load(rounded_predictor, run / "step_4")
    lora.remove(rounded_predictor)
    expected = probe(predictor)
    error = (probe(rounded_predictor) - expected).norm() / expected.norm()
    assert error <= tolerance and (error > 0) == (tolerance > 0)
    clip = torch.randn(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(clip)
        assert (rounded_encoder(clip) - expected).norm() <= tolerance * expected.norm()
    # the library reads what we wrote
    tensors = load_file(target)
    assert {t.dtype for t in tensors.values()} == {model.DTYPES[name]}
    wanted = model.flat_names(encoder.state_dict(), predictor.state_dict())
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[k], v.to(model.DTYPES[name])) for k, v in wanted.items())


def test_slim_twice_keeps_the_fingerprint_and_the_bytes(base, tmp_path):
    first, second, third = (f"{tmp_path}/{name}.safetensors" for name in "abc")
    export.slim(f"{base}/base.pt", first, "tiny", torch.float16)
    export.slim(first, second, "tiny", torch.bfloat16)
    original = model.load(f"{base}/base.pt", "tiny")[0]
    assert model.load(second, "tiny")[0].base_fingerprint == original.base_fingerprint
    export.slim(f"{base}/base.pt", third, "tiny", torch.float16)
    assert Path(third).read_bytes() == Path(first).read_bytes()


def test_slim_refuses_what_is_no_checkpoint(base, tmp_path):
    source, cut = f"{base}/base.pt", f"{tmp_path}/cut.safetensors"
    export.slim(source, cut, "tiny", torch.float16)
    Path(cut).write_bytes(Path(cut).read_bytes()[:5000])
    target = f"{tmp_path}/c.safetensors"
    for args, says in (([cut, target], "not a whole .safetensors"),
                       ([source, f"{tmp_path}/c.pt"], "a name that ends in .safetensors"),
                       ([source, target, "--dtype=int8"], "choose from bf16, fp16, fp32")):
        with pytest.raises(SystemExit, match=says):
            export.main(["slim", *args, "--model.size=tiny"])
    assert not list(tmp_path.glob("c.*")) and not list(tmp_path.glob("*.tmp"))


def test_what_is_written_wrong_is_noticed(base, tmp_path, monkeypatch):
    write = files.write_safetensors

    def write_wrongly(file, names, read, metadata):
        def read_wrongly(name):
            return read(name) * (1.01 if name.endswith("predictor_proj.weight") else 1)
        write(file, names, read_wrongly, metadata)

    monkeypatch.setattr(files, "write_safetensors", write_wrongly)
    with pytest.raises(ValueError, match="differs from what was written"):
        export.slim(f"{base}/base.pt", f"{tmp_path}/slim.safetensors", "tiny", torch.float32)


def test_a_full_disk_leaves_the_old_file(base, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "merged.pt").write_bytes(b"old")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SystemExit, match="merged.pt: could not be saved: .*make room"):
        export.main(["merge", "config.yaml", f"{run}/step_4", f"{tmp_path}/merged.pt",
                     f"--model.checkpoint={base}/base.pt", *KEYS])
    assert (tmp_path / "merged.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["merged.pt"]


def test_the_baseline_is_an_adapter_that_changes_nothing(base, tmp_path):
    args = ["baseline", "config.yaml", f"{tmp_path}/step_0",
            f"--model.checkpoint={base}/base.pt", *KEYS]
    export.main(args)
    _, predictor = model.load(base / "base.pt", "tiny")
    before = probe(predictor)
    lora.load(predictor, tmp_path / "step_0")
    assert torch.equal(probe(predictor), before) and lora.update_norm(predictor) == 0
    peft = pytest.importorskip("peft")
    _, predictor = model.load(base / "base.pt", "tiny")
    theirs = peft.PeftModel.from_pretrained(predictor, tmp_path / "step_0")
    assert (probe(theirs.base_model.model) - before).abs().max() < 1e-6
    with pytest.raises(SystemExit, match="is there already"):
        export.main(args)


def test_step_to_adapter_to_peft_and_back(base, run, tmp_path):
    export.main(["adapter", f"{run}/step_4", f"{tmp_path}/adapter"])
    assert {*export.ADAPTER_FILES, "trained_on.json"} == set(os.listdir(tmp_path / "adapter"))
    peft = pytest.importorskip("peft")
    _, predictor = model.load(base / "base.pt", "tiny")
    theirs = peft.PeftModel.from_pretrained(predictor, tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "again")
    first = load_file(run / "step_4/adapter_model.safetensors")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    outputs = []
    for folder in (run / "step_4", tmp_path / "again"):
        _, predictor = model.load(base / "base.pt", "tiny")
        lora.load(predictor, folder)
        outputs.append(probe(predictor))
    assert torch.equal(*outputs)
    with pytest.raises(SystemExit, match="step_7.*step_N"):
        export.main(["adapter", f"{run}/step_7", f"{tmp_path}/none"])


def test_merged_equals_base_and_adapter(base, run, tmp_path, capsys):
    export.main(["merge", "config.yaml", f"{run}/step_4", f"{tmp_path}/merged.pt",
                 f"--model.checkpoint={base}/base.pt", *KEYS])
    assert "every value read back" in capsys.readouterr().out
    _, adapted = model.load(base / "base.pt", "tiny")
    without = probe(adapted)
    lora.load(adapted, run / "step_4")
    encoder, merged = model.load(tmp_path / "merged.pt", "tiny")
    assert (probe(merged) - probe(adapted)).abs().max() < 1e-5
    assert (probe(merged) - without).abs().max() > 1e-5
    expected = tiny()[0].state_dict()
    assert all(torch.equal(tensor, expected[k]) for k, tensor in encoder.state_dict().items())
    file = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert file.keys() == {"encoder", "predictor"}
    assert not any("lora" in name for name in file["predictor"])
    # the merged model is another base
    with pytest.raises(ValueError, match="another base model"):
        lora.load(merged, run / "step_4")


# The package

@pytest.fixture(scope="module")
def package(base, run, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "checkpoints_for_colab.zip"
    export.package(run, [0, 2, 4], 3, path, [
        "--energy.grid=5", "--energy.planes=[xy]", "--energy.radius=0.1",
        "--energy.cem_samples=16", "--energy.cem_iterations=2", "--energy.cem_elites=4",
        "--energy.per_episode=1", "--data.val_fraction=0.6", "--energy.allow_trained"])
    return path


def test_a_package_holds_what_it_says(base, run, package, tmp_path):
    manifest = export.verify(package)
    assert manifest["steps"] == [0, 2, 4] and manifest["recorded_frames_per_step"] == 1
    encoder, predictor = model.load(base / "base.pt", "tiny")
    assert manifest["base_fingerprint"] == encoder.base_fingerprint
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == sorted([*manifest["sha256"], "manifest.json"])
    unpack(package, tmp_path)
    export.verify(tmp_path)
    for name in export.source_files():
        assert (tmp_path / name).read_bytes() == (PROJECT / name).read_bytes()
    name = "step_4/adapter_model.safetensors"
    assert (tmp_path / "adapters" / name).read_bytes() == (run / name).read_bytes()
    lora.load(predictor, tmp_path / "adapters/step_0")
    assert lora.update_norm(predictor) == 0
    # frames and poses are those of the run's data
    cfg = config.load([str(tmp_path / "config.yaml"), f"--data.path={tmp_path}/trajectories"])
    clips = energy.read_clips(cfg)
    assert len(clips) == 3
    for clip in clips:
        source = np.load(base / "data" / clip["episode"])
        x = clip["states"][0, 0].item()
        first = int(np.abs(source["states"][:, 0] - x).argmin())
        expected = source["observations"][first:first + 4]
        assert np.array_equal(clip["frames"].permute(1, 2, 3, 0), expected)
        assert np.allclose(clip["states"], source["states"][first:first + 4], atol=1e-6)


def test_the_sources_are_those_that_the_notebook_imports():
    names = export.source_files()
    assert {"colab.ipynb", "LICENSE", "export.py", "energy.py", "model.py", "lora.py", "config.py",
            "files/__init__.py", "files/peft.py", "files/weights.py", "droid.py",
            "vjepa2_src/__init__.py", "vjepa2_src/blocks.py",
            "analysis/__init__.py", "analysis/compare.py", "analysis/figures.py",
            "episodes/npz.py"} <= set(names)
    # imported inside of functions, on a GPU
    assert {str(path.relative_to(PROJECT)) for path in PROJECT.glob("fast/*.py")} <= set(names)
    assert not {"train.py", "toy.py", "conftest.py", "test_smoke.py"} & set(names)
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders - {"fast"} == {"analysis", "docs", "episodes", "evaluation", "files", "report",
                                 "running", "settings", "vjepa2_src"}
    assert names == sorted(set(names))


def test_sources_are_found_wherever_they_are_imported(tmp_path, monkeypatch):
    """Lazily, by a module of a module, by `from package import module`; but nothing else."""
    (tmp_path / "room").mkdir()
    contents = {
        "a.py": "def f():\n    if True:\n        import room.b as b\n    return b",
        "room/__init__.py": "from c import value", "room/b.py": "import os, numpy, a", "c.py": "",
        "room/d.py": "", "e.py": "", "latents.py": "", "LICENSE": "", "unused.py": "import a"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    cells = [{"cell_type": "markdown", "source": ["import unused"]},
             {"cell_type": "code", "source": ["import a\n", "from room import d"]},
             {"cell_type": "code", "source": ["try:\n", "    import e\n", "except OSError: pass"]}]
    (tmp_path / "colab.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(export, "PROJECT", tmp_path)
    assert export.source_files() == ["LICENSE", "a.py", "c.py", "colab.ipynb", "e.py",
                                     "latents.py", "room/__init__.py", "room/b.py", "room/d.py"]


def test_every_module_of_the_package_can_be_imported_from_it(package, tmp_path):
    unpack(package, tmp_path)
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
               for name in export.source_files() if name.endswith(".py")]
    # kernels need Triton, which a CPU build of PyTorch does not bring
    modules = [name for name in modules if not name.endswith("_kernels")]
    code = (f"import importlib\nfor name in {modules}:\n"
            "    print(importlib.import_module(name).__file__)")
    result = run_python(["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    paths = result.stdout.splitlines()
    assert len(paths) == len(modules) > 10
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_a_package_from_before_still_works(base, tmp_path):
    """Its sources lie in one folder; its adapters, trajectories and config are read by today's."""
    manifest = export.verify(OLD_PACKAGE)
    assert {"folded.py", "compare.py"} <= manifest["sha256"].keys()
    unpack(OLD_PACKAGE, tmp_path)
    export.verify(tmp_path)
    cfg = config.load([str(tmp_path / "config.yaml"), f"--data.path={tmp_path}/trajectories"])
    assert (cfg.lora.rank, cfg.data.val_fraction) == (1, 1.0)
    clip, = energy.read_clips(cfg)
    assert clip["frames"].shape == (3, 4, 64, 64) and clip["episode"] == "episode_3.npz"
    _, predictor = model.load(base / "base.pt", "tiny")
    assert manifest["base_fingerprint"] == predictor.base_fingerprint
    for step, changed in ((0, False), (2, True)):
        lora.load(predictor, tmp_path / f"adapters/step_{step}")
        assert (lora.update_norm(predictor) > 0) == changed
        lora.remove(predictor)


def test_a_cut_or_altered_package_is_named(package, tmp_path):
    data = package.read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[:-2000])
    (tmp_path / "short.zip").write_bytes(data[:len(data) // 2])
    for name in ("cut.zip", "short.zip"):
        with pytest.raises(SystemExit, match=f"{name}: cut short or damaged .*copy it again"):
            export.main(["verify", f"{tmp_path}/{name}"])
    unpack(package, tmp_path / "out")
    name = "adapters/step_2/adapter_model.safetensors"
    weights = tmp_path / "out" / name
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{name} was altered"):
        export.verify(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match="not a whole package"):
        export.verify(tmp_path / "out")


def test_a_package_of_what_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, says in ((["--steps=0,9"], "step_9: no such step; .* has step_2, step_4"),
                       (["--steps=four"], "whole numbers")):
        with pytest.raises(SystemExit, match=says):
            export.main(["package", str(run), *args])
    with pytest.raises(SystemExit, match="no config.yaml in it"):
        export.main(["package", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="python export.py slim"):
        export.main([])
