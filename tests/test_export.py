"""Every export reads back as what it was, loads where it should, and a damaged one is named."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import tiny
from safetensors.torch import load_file
from small import recipe

import config
import energy
import export
import lora
import model
import train

KEYS = ["--model.size=tiny", "--precision=fp32"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run folder with steps 2 and 4, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("export") / "run"
    train.train(recipe(base, folder, "--max_steps=4", "--save_every=2", "--optimizer=adamw", "--milestones=[2]"))
    return folder


def probe(predictor):
    z = model.layer_norm(torch.randn(1, 3 * 16, 52, generator=torch.Generator().manual_seed(0)))
    actions = 0.1 * torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return predictor.eval()(z.to(predictor.predictor_norm.weight.dtype), actions, actions)


@pytest.mark.parametrize("name, tolerance", [("fp32", 0), ("bf16", 2e-2), ("fp16", 2e-3)])
def test_a_slim_file_is_the_same_model_to_its_precision(base, run, tmp_path, name, tolerance, capsys):
    source, target = f"{base}/base.pt", f"{tmp_path}/slim.safetensors"
    export.main(["slim", source, target, f"--dtype={name}", "--model.size=tiny"])
    assert "every value read back" in capsys.readouterr().out
    exact, rounded = model.load(source, "tiny"), model.load(target, "tiny")
    assert rounded[0].base_fingerprint == exact[0].base_fingerprint             # so its adapters fit
    lora.load(rounded[1], run / "step_4")
    lora.remove(rounded[1])
    off = (probe(rounded[1]) - probe(exact[1])).norm() / probe(exact[1]).norm()
    assert off <= tolerance and (off > 0) == (tolerance > 0)
    clip = torch.randn(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (rounded[0](clip) - exact[0](clip)).norm() <= tolerance * exact[0](clip).norm()
    tensors = load_file(target)                                                 # the library reads what we wrote
    assert {t.dtype for t in tensors.values()} == {model.DTYPES[name]}
    wanted = model._full_names(*(part.state_dict() for part in exact))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[k], v.to(model.DTYPES[name])) for k, v in wanted.items())


def test_slim_twice_keeps_the_fingerprint_and_refuses_what_is_no_checkpoint(base, tmp_path):
    first, second = f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors"
    export.slim(f"{base}/base.pt", first, "tiny", torch.float16)
    export.slim(first, second, "tiny", torch.bfloat16)
    assert model.load(second, "tiny")[0].base_fingerprint == model.load(f"{base}/base.pt", "tiny")[0].base_fingerprint
    (tmp_path / "cut.safetensors").write_bytes(Path(first).read_bytes()[:5000])
    for args, says in (([f"{tmp_path}/cut.safetensors", second], "not a whole .safetensors"),
                       ([f"{base}/base.pt", f"{tmp_path}/c.pt"], "is named ….safetensors"),
                       ([f"{base}/base.pt", f"{tmp_path}/c.safetensors", "--dtype=int8"], "choose from bf16, fp16, fp32")):
        with pytest.raises(SystemExit, match=says):
            export.main(["slim", *args, "--model.size=tiny"])
    assert not list(tmp_path.glob("c.*")) and not list(tmp_path.glob("*.tmp"))


def test_what_is_written_wrong_is_noticed(base, tmp_path, monkeypatch):
    write = export._write_safetensors
    monkeypatch.setattr(export, "_write_safetensors", lambda path, names, read, meta: write(
        path, names, lambda name: read(name) * (1.01 if name.endswith("predictor_proj.weight") else 1), meta))
    with pytest.raises(ValueError, match="differs from what was written"):
        export.slim(f"{base}/base.pt", f"{tmp_path}/slim.safetensors", "tiny", torch.float32)


def test_the_baseline_is_an_adapter_that_changes_nothing(base, tmp_path):
    export.main(["baseline", "config.yaml", f"{tmp_path}/step_0", f"--model.checkpoint={base}/base.pt", *KEYS])
    _, predictor = model.load(base / "base.pt", "tiny")
    before = probe(predictor)
    lora.load(predictor, tmp_path / "step_0")
    assert torch.equal(probe(predictor), before) and lora.update_norm(predictor) == 0
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model.load(base / "base.pt", "tiny")[1], tmp_path / "step_0")
    assert (probe(theirs.base_model.model) - before).abs().max() < 1e-6
    with pytest.raises(SystemExit, match="is there already"):
        export.main(["baseline", "config.yaml", f"{tmp_path}/step_0", f"--model.checkpoint={base}/base.pt", *KEYS])


def test_step_to_adapter_to_peft_and_back(base, run, tmp_path):
    export.main(["adapter", f"{run}/step_4", f"{tmp_path}/adapter"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model.load(base / "base.pt", "tiny")[1], tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (run / "step_4", tmp_path / "again"))
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
    export.main(["merge", "config.yaml", f"{run}/step_4", f"{tmp_path}/merged.pt", f"--model.checkpoint={base}/base.pt", *KEYS])
    assert "every value read back" in capsys.readouterr().out
    _, adapted = model.load(base / "base.pt", "tiny")
    plain = probe(adapted)
    lora.load(adapted, run / "step_4")
    encoder, merged = model.load(tmp_path / "merged.pt", "tiny")
    assert (probe(merged) - probe(adapted)).abs().max() < 1e-5 < (probe(merged) - plain).abs().max()
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), tiny()[0].state_dict().values()))
    file = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert file.keys() == {"encoder", "predictor"} and not any("lora" in name for name in file["predictor"])
    with pytest.raises(ValueError, match="another base model"):            # the merged model is another base
        lora.load(merged, run / "step_4")


@pytest.fixture(scope="module")
def package(base, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    small = ["--energy.grid=5", "--energy.planes=[xy]", "--energy.cem_samples=16", "--energy.cem_iterations=2",
             "--energy.cem_elites=4", "--energy.radius=0.1", "--data.val_fraction=0.6", "--energy.per_episode=1"]
    export.package(run, [0, 2, 4], 3, folder / "checkpoints_for_colab.zip", small)
    return folder / "checkpoints_for_colab.zip"


def test_a_package_holds_what_it_says(base, run, package, tmp_path):
    manifest = export.verify(package)
    assert manifest["steps"] == [0, 2, 4] and manifest["recorded_frames_per_step"] == 1
    assert manifest["base_fingerprint"] == model.load(base / "base.pt", "tiny")[0].base_fingerprint
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path)
        assert sorted(archive.namelist()) == sorted([*manifest["sha256"], "manifest.json"])
    export.verify(tmp_path)
    for path in Path("vjepa2_src").glob("*.py"):                            # kernels.py is imported on a GPU alone
        assert (tmp_path / path).read_bytes() == path.read_bytes()
    assert (tmp_path / "adapters/step_4/adapter_model.safetensors").read_bytes() == \
        (run / "step_4/adapter_model.safetensors").read_bytes()
    cfg = config.load([str(tmp_path / "config.yaml"), f"--data.path={tmp_path}/trajectories"])
    for clip in energy.read_clips(cfg):                                     # the very frames and poses of the run's data
        source = np.load(base / "data" / clip["episode"])
        first = int(np.abs(source["states"][:, 0] - clip["states"][0, 0].item()).argmin())
        assert np.array_equal(clip["frames"].permute(1, 2, 3, 0), source["observations"][first:first + 4])
        assert np.allclose(clip["states"], source["states"][first:first + 4], atol=1e-6)


def test_a_cut_or_altered_package_is_named(package, tmp_path):
    data = package.read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[:-2000])
    (tmp_path / "short.zip").write_bytes(data[:len(data) // 2])
    for name in ("cut.zip", "short.zip"):
        with pytest.raises(SystemExit, match=f"{name}: cut short or damaged .*copy it again"):
            export.main(["verify", f"{tmp_path}/{name}"])
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "out")
    weights = tmp_path / "out/adapters/step_2/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="adapters/step_2/adapter_model.safetensors was altered"):
        export.verify(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match="not a whole package"):
        export.verify(tmp_path / "out")


def test_a_package_of_what_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, says in ((["--steps=0,9"], "step_9: no such step; .* has step_2, step_4"), (["--steps=four"], "whole numbers")):
        with pytest.raises(SystemExit, match=says):
            export.main(["package", str(run), *args])
    with pytest.raises(SystemExit, match="no config.yaml in it"):
        export.main(["package", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="python export.py slim"):
        export.main([])


def test_the_notebook_runs_from_the_package_alone(base, package, tmp_path):
    """Unpacked in an empty folder, with slim base weights beside it: every cell, in a fresh kernel."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "work")
    export.slim(f"{base}/base.pt", tmp_path / "work/base.safetensors", "tiny", torch.float32)
    code = ("import nbformat, nbclient; book = nbformat.read('colab.ipynb', 4); "
            "nbclient.NotebookClient(book, timeout=300).execute(); nbformat.write(book, 'done.ipynb')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "work", env=environment, check=True, timeout=400)
    cells = json.loads((tmp_path / "work/done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "steps [0, 2, 4], 3 trajectories" in text and "3 pairs of 3 episodes" in text
    assert "Δx–Δy" in text and "change against baseline" in text and "largest difference 0" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    names = zipfile.ZipFile(tmp_path / "work/results.zip").namelist()
    assert {"results/landscapes.npz", "results/comparison.json", "results/metrics.csv", "results/landscapes_xy.png"} <= set(names)


def test_the_notebook_finds_the_zip_and_says_when_it_is_cut(package, tmp_path):
    """The cell that unpacks, outside of Colab: a zip beside the notebook, whole and cut short."""
    cells = json.loads((Path(__file__).parents[1] / "colab.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(code[:2]))

    def execute():
        return subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)

    assert "no checkpoints_for_colab.zip in" in execute().stderr
    (tmp_path / "checkpoints_for_colab.zip").write_bytes(package.read_bytes()[:9000])
    cut = execute()
    assert "checkpoints_for_colab.zip: cut short or damaged" in cut.stderr and "Traceback" not in cut.stderr
    shutil.copy(package, tmp_path / "checkpoints_for_colab.zip")
    assert "steps [0, 2, 4], 3 trajectories" in execute().stdout


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads((Path(__file__).parents[1] / "colab.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert not any("pip install" in "".join(cell["source"]) for cell in cells)
