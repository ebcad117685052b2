"""colab.ipynb, with and without a decoder in the package, and how the decoder gets there."""
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import export
import model
import train
from evaluation.decoding import FILE, Decoder, decoder_file
from small import flip, recipe, run_python


PROJECT = Path(__file__).resolve().parents[1]
FEW = ["--energy.grid=5", "--energy.planes=[xy]", "--energy.radius=0.1", "--energy.cem_samples=16",
       "--energy.cem_iterations=2", "--energy.cem_elites=4", "--energy.per_episode=1",
       "--data.val_fraction=0.6", "--energy.allow_trained"]


def decoder(encoder, tokens=16, image_size=64):
    """The bytes of one that is untrained: what it shows is of no matter."""
    torch.manual_seed(0)
    network = Decoder(tokens, 52, image_size, 64, 1)
    network.init_weights()
    return decoder_file(network, {"encoder": encoder})


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run folder with steps 2 and 4; decoders beside it: decoder/ and others that do not fit."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
    train.train(recipe(base, folder, "--max_steps=4", "--save_every=2", "--milestones=[2]",
                       "--val_every=0"))
    encoder = model.load(base / "base.pt", "tiny")[0].encoder_fingerprint
    fits = decoder(encoder)
    for name, data in {"decoder": fits, "other": decoder("0123"), "cut": fits[:-9], "empty": b"",
                       "small": decoder(encoder, 4, 32), "large": decoder(encoder, 16, 128),
                       "adapter": (folder / "step_2/adapter_model.safetensors").read_bytes()
                       }.items():
        (folder.parent / name).mkdir()
        (folder.parent / name / FILE).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / export.PACKAGE
    export.package(run, [0, 2, 4], 3, path, FEW)
    return path


@pytest.fixture(scope="module")
def with_decoder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / export.PACKAGE
    line = export.package(run, [0, 4], 1, path, FEW, run.parent / "decoder")
    assert line.endswith("1 trajectories, the notebook, a decoder")
    return path


# A decoder in the package

def test_a_package_brings_the_decoder(run, package, with_decoder, tmp_path, capsys):
    assert FILE not in export.verify(package)["sha256"]
    assert FILE in export.verify(with_decoder)["sha256"]
    shutil.unpack_archive(with_decoder, tmp_path)
    assert (tmp_path / FILE).read_bytes() == (run.parent / "decoder" / FILE).read_bytes()
    export.main(["verify", str(tmp_path)])
    assert "complete and unchanged" in capsys.readouterr().out
    flip(tmp_path / FILE, -1)
    for change in (lambda: None, (tmp_path / FILE).unlink):
        change()
        with pytest.raises(SystemExit, match=f"{FILE} was altered|no '{FILE}'") as error:
            export.main(["verify", str(tmp_path)])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, says", [
    ("other", "was trained on latents of another encoder"), ("nowhere", "no such file"),
    ("cut", "not a whole"), ("empty", "not a whole"), ("adapter", "holds no decoder"),
    ("small", "images of 32 pixels, and those of the run have 64"), ("large", "of 128 pixels"),
    ("", "--decoder needs one value")])
def test_a_decoder_that_does_not_fit_is_refused(run, tmp_path, monkeypatch, name, says):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = name and run.parent / name
    with pytest.raises(SystemExit, match=says) as error:
        export.main(["package", str(run), "--steps=0", f"--decoder={path}", *FEW])
    assert "\n" not in str(error.value) and not list(Path.cwd().iterdir())


def test_other_commands_take_no_decoder(run):
    with pytest.raises(SystemExit, match="--decoder does not apply to adapter"):
        export.main(["adapter", str(run / "step_2"), "x", f"--decoder={run.parent}/decoder"])


# The notebook

def notebook():
    return json.loads((PROJECT / "colab.ipynb").read_text())["cells"]


def run_notebook(base, package, folder):
    """Unpacked in an empty folder, with base weights beside it: every cell, in a fresh kernel.
    Returns what it prints, and how many pictures of each kind it shows."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.unpack_archive(package, folder)
    export.slim(f"{base}/base.pt", folder / "base.safetensors", "tiny", torch.float32)
    code = ("import nbformat, nbclient; book = nbformat.read('colab.ipynb', 4); "
            "nbclient.NotebookClient(book, timeout=300).execute(); "
            "nbformat.write(book, 'done.ipynb')")
    result = run_python(["-c", code], folder, timeout=400)
    assert result.returncode == 0, result.stderr
    cells = json.loads((folder / "done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "Δx–Δy" in text and "change against baseline" in text and "largest difference 0" in text
    page, = ("".join(output["data"]["text/html"]) for output in outputs
             if "text/html" in output.get("data", {}))
    shown = [kind for output in outputs for kind in output.get("data", {}) if "image/" in kind]
    return text, page, {kind: shown.count(f"image/{kind}") for kind in ("png", "gif")}


def test_the_notebook_runs_without_a_decoder(base, package, tmp_path):
    text, page, shown = run_notebook(base, package, tmp_path)
    assert "steps [0, 2, 4], 3 trajectories" in text and "3 pairs of 3 episodes" in text
    assert "There is no decoder in this package: train one with decoder.py" in text
    assert shown == {"png": 4, "gif": 0} and "What the models imagine" not in page
    names = zipfile.ZipFile(tmp_path / "results.zip").namelist()
    assert {"results/landscapes.npz", "results/comparison.json", "results/metrics.csv",
            "results/landscapes_xy.png", "results/report.html"} <= set(names)
    assert not any("imagination" in name for name in names)


def test_the_notebook_shows_what_the_models_imagine(base, with_decoder, tmp_path):
    text, page, shown = run_notebook(base, with_decoder, tmp_path)
    assert "PSNR (dB) where pixels change ↑" in text and "copy of the context" in text
    assert shown == {"png": 4 + 3, "gif": 1} and "What the models imagine" in page
    names = zipfile.ZipFile(tmp_path / "results.zip").namelist()
    assert {"results/imagination/imagination_0.gif", "results/imagination/imagination.json",
            "results/imagination/counterfactuals.png"} <= set(names)


def test_the_notebook_goes_on_with_a_decoder_of_another_encoder(run, tmp_path, monkeypatch,
                                                                capsys):
    """One that was laid beside it by hand."""
    pytest.importorskip("IPython")
    monkeypatch.chdir(tmp_path)
    shutil.copy(run.parent / "other" / FILE, FILE)
    cell, = ["".join(cell["source"]) for cell in notebook() if cell["cell_type"] == "code"
             and "decoder_for" in "".join(cell["source"])]
    analysis = SimpleNamespace(fingerprints=lambda: ("4567", "89ab"), device="cpu")
    exec(cell, {"Path": Path, "analysis": analysis})
    line, = capsys.readouterr().out.splitlines()
    assert "was trained on latents of another encoder" in line


def test_the_notebook_finds_the_zip_and_says_when_it_is_cut(package, tmp_path):
    """The cell that unpacks, outside of Colab: a zip beside the notebook, whole and cut short."""
    cells = ["".join(cell["source"]) for cell in notebook() if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells[:2]))
    assert "no checkpoints_for_colab.zip in" in run_python(["cells.py"], tmp_path).stderr
    (tmp_path / "checkpoints_for_colab.zip").write_bytes(package.read_bytes()[:9000])
    cut = run_python(["cells.py"], tmp_path)
    assert "checkpoints_for_colab.zip: cut short or damaged" in cut.stderr
    assert "Traceback" not in cut.stderr
    shutil.copy(package, tmp_path / "checkpoints_for_colab.zip")
    whole = run_python(["cells.py"], tmp_path)
    assert "steps [0, 2, 4], 3 trajectories" in whole.stdout, whole.stderr


def test_the_notebook_is_committed_without_outputs():
    for cell in notebook():
        source = "".join(cell["source"])
        assert "pip install" not in source
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            assert all(len(line) <= 100 for line in source.splitlines())


@pytest.mark.parametrize("line, says", [
    ("    !nvidia-smi", ""), ("    %matplotlib inline", ""),
    ("import energy as", "cell 3 is not Python")])
def test_a_notebook_edited_in_colab_is_packed_or_named(monkeypatch, tmp_path, line, says):
    shutil.copytree(export.PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns(
        "runs", ".*", "tests", "docs"))
    notebook = tmp_path / "project/colab.ipynb"
    content = json.loads(notebook.read_text())
    content["cells"][2] = {"cell_type": "code", "source": ["if True:\n", line]} if not says else {
        "cell_type": "code", "source": [line]}
    notebook.write_text(json.dumps(content))
    monkeypatch.setattr(export, "PROJECT", tmp_path / "project")
    if says:
        with pytest.raises(ValueError, match=says):
            export.source_files()
    else:
        assert {"energy.py", "latents.py", "fast/networks.py"} <= set(export.source_files())
