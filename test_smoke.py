"""The README's commands, small: the toy's whole story, training from the command line, resuming, two processes."""
import json
import os
import subprocess
import sys

import pytest

import lora
import model
import toy
import train

pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """`python toy.py`, cut short: fewer episodes and steps, the same code."""
    out = tmp_path_factory.mktemp("toy")
    losses = toy.story(out, n_episodes=40, encoder_steps=40, predictor_steps=120,
                       overrides=["--max_steps=60", "--save_every=20", "--val_every=60", "--decay_steps=20"])
    return out, losses


def test_the_toy_learns_and_leaves_what_it_says(story, capsys):
    out, losses = story
    assert sorted(losses) == [0, 40, 60]
    assert losses[60]["val_loss"] < 0.95 * losses[0]["val_loss"]
    assert train.saved_steps(out / "lora") == [20, 40, 60]
    steps = [json.loads(line)["step"] for line in (out / "lora/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    encoder, predictor = model.load(out / "base.pt", toy.SIZE)
    lora.load(predictor, out / "lora/step_60")
    assert all(layer.lora_B.abs().sum() > 0 for layer in lora._adapted(predictor).values())


def command(story, *args, processes=0):
    out = story[0]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    result = subprocess.run(
        [sys.executable, *launch, "train.py", "config.yaml", "toy.yaml", f"--data.path={out}/data", "--val_every=2",
         f"--model.checkpoint={out}/base.pt", "--batch_size=4", "--val_batches=2", "--log_every=1", *args],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=110)
    return result


def test_the_command_line_trains_resumes_and_refuses_to_mix_runs(story, tmp_path):
    run = f"--out_dir={tmp_path / 'run'}"
    first = command(story, run, "--max_steps=3", "--decay_steps=1", "--optimizer=adamw8bit", "--precision=bf16")
    assert first.returncode == 0, first.stderr
    assert "32,768 trainable in 8 adapted layers" in first.stdout and train.saved_steps(tmp_path / "run") == [3]
    again = command(story, run, "--max_steps=5", "--decay_steps=1", "--optimizer=adamw8bit", "--precision=bf16")
    assert again.returncode == 1 and "go on with --resume" in again.stderr and "Traceback" not in again.stderr
    more = command(story, run, "--max_steps=5", "--decay_steps=1", "--optimizer=adamw8bit", "--precision=bf16", "--resume")
    assert more.returncode == 0 and "from step 3 to 5" in more.stdout, more.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_torchrun_trains_on_records_with_two_processes(story, tmp_path):
    result = command(story, f"--out_dir={tmp_path / 'run'}", "--max_steps=2", "--decay_steps=1", processes=2)
    assert result.returncode == 0, result.stderr
    assert "4 clips x 1 micro-batches x 2 ranks = 8 clips a step" in result.stdout
    assert train.saved_steps(tmp_path / "run") == [2]


def test_landscapes_and_the_package_from_the_command_line(story, tmp_path):
    """energy.py and export.py package on the toy's run, on records, as the README gives them."""
    out, here = story[0], os.getcwd()

    def python(*args):
        result = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, timeout=110,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout

    text = python(f"{here}/energy.py", f"{here}/config.yaml", f"{here}/toy.yaml", f"--adapters={out}/lora/step_60",
                  f"--data.path={out}/data", f"--model.checkpoint={out}/base.pt", f"--out_dir={tmp_path}/run", "--energy.pairs=4",
                  "--energy.planners=[cem]", "--energy.cem_iterations=2")
    assert "Δx–Δy" in text and "step_60" in text and "WARNING" not in text
    assert json.loads((tmp_path / "run/energy/comparison.json").read_text())["controls"]["null"] == 0
    python(f"{here}/export.py", "package", f"{out}/lora", "--steps=0,60", "--trajectories=4")
    assert "steps [0, 60]" in python(f"{here}/export.py", "verify", "checkpoints_for_colab.zip")


def test_help_is_the_manual(capsys):
    train.main([])
    assert "torchrun --standalone" in capsys.readouterr().out
