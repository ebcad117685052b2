"""bench/: the table of speeds runs on a CPU, slips are named, operations are counted right; the
profile; the table of the toy's study."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import config
import model
from bench import flops, measure, speed, toy_study


ROOT = Path(__file__).resolve().parents[1]
VITG = ["config.yaml", "--data.path=nowhere"]
SMALL = ["--device=cpu", "--model.size=tiny", "--data.clip_frames=4", "--precision=fp32"]


def test_the_table_of_speeds_runs_on_a_cpu(tmp_path):
    """In another folder, so that nothing is written into this one."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bench.speed", *SMALL, "--repeats=2"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/bench/bench.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) >= 14 and all(row["ms"] > 0 for row in rows.values())
    assert {"step from frames, 2 clips, plain", "step from frames, 2 clips, --compile=false",
            "step from frames, 2 clips", "step from latents, 2 clips",
            "50 candidate actions, one step", "50 candidate actions, one step, with an adapter",
            "reading 64 random clips of stored latents, 2 a batch"} <= rows.keys()
    assert rows["step from latents, 2 clips"]["clips"] == 2


@pytest.mark.parametrize("arg, says", [
    ("--parts=foo", "--parts are some of training"), ("--repeats=x", "x"),
    ("--repeats=0", "--repeats"), ("--model.sise=tiny", "did you mean model.size")])
def test_a_slip_is_named(arg, says):
    with pytest.raises(SystemExit, match=f"bench.speed: .*{says}"):
        speed.main(["--device=cpu", arg])


def test_what_fits_a_budget_is_timed_and_what_does_not_is_named(capsys):
    table = speed.Table(model.resolve_device("cpu"), repeats=1)
    cfg = config.load(["config.yaml", *SMALL, "--memory=2.5", "--grad_accum=1"])
    speed.time_picked(table, cfg)
    assert [row["name"] for row in table.rows[1:]] == [
        "step from frames, 2 clips, as picked", "step from latents, 2 clips, as picked"]
    assert all(row["hours_5000"] > 0 for row in table.rows[1:])
    speed.time_picked(table, config.load([*VITG, "--memory=1"]))
    assert capsys.readouterr().out.count("--memory=1: one clip of 16 frames needs about") == 2
    assert len(table.rows) == 3


def test_the_counted_operations_are_those_of_the_facts():
    """16 frames, ViT-g: 0.52 TFLOP a frame for the encoder, about 15.8 a clip with it and 7.3
    without."""
    cfg = config.load(VITG)
    assert flops.encode_flops(cfg) == pytest.approx(0.52e12, rel=0.04)
    assert flops.flops_per_clip(cfg, True) == pytest.approx(15.8e12, rel=0.06)
    assert flops.flops_per_clip(cfg, False) == pytest.approx(7.3e12, rel=0.08)


def test_the_profile_names_what_takes_longest(capsys):
    measure.main(["profile", *SMALL, "--activation_checkpointing=false"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    times = [row["ms"] for row in found["kernels"]]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= found["total_ms"] * 1.001
    assert any("addmm" in row["name"] for row in found["kernels"])


def test_a_released_file_is_loaded_in_a_fresh_process(tmp_path, capfd):
    measure.main(["load", "--model.size=tiny", f"--file={tmp_path}/x.pt"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    n_weights = sum(p.numel() for network in model.empty_networks("tiny")
                    for p in network.parameters())
    assert found["weights_gib"] == pytest.approx(2 * n_weights / 2 ** 30)       # in bf16
    assert found["file_gib"] > 4 * found["weights_gib"]


def test_the_study_has_a_row_for_each_line_and_an_interval_in_each_cell(tmp_path):
    """From made-up values of two seeds: means, intervals over episodes and the seeds' own means."""
    episodes = np.array(["0 a", "0 b", "0 c", "1 a", "1 b", "1 c"])
    values = {"xy spearman": [np.full(3, 0.25), np.full(3, 0.75)]}
    cells = toy_study.summarise(values, episodes)
    assert cells["Spearman"]["mean"] == 0.5 and cells["Spearman"]["seeds"] == [0.25, 0.75]
    assert 0.25 <= cells["Spearman"]["low"] < 0.5 < cells["Spearman"]["high"] <= 0.75
    angles = {toy_study.ANGLES: {"seeds": [91.2, None]}}
    text = toy_study.table({"lines": {"LoRA, camera B": cells | angles}})
    row = text.splitlines()[-1]
    assert row.startswith("| LoRA, camera B |  |  | 0.50 [")
    assert row.endswith("], 0.25 to 0.75 |  |  | 91 / none |")
