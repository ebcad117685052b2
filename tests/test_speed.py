"""The memory budget, advice when memory runs out, and the table of speeds."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small import interpret, recipe

import bench
import bench_more
import config
import energy
import model
import speed
import train

VITG = ["config.yaml", "--data.path=nowhere"]


@pytest.mark.parametrize("gib, args, batch, checkpointing", [
    (80, [], 8, False), (22, [], 4, False), (15, [], 2, False), (6, [], 2, True), (5, [], 1, True),
    (40, ["--data.latents=x"], 8, False), (15, ["--data.latents=x"], 4, False), (5, ["--data.latents=x"], 4, True), (2.5, ["--data.latents=x"], 1, True)])
def test_a_budget_picks_micro_batches_and_checkpointing(gib, args, batch, checkpointing):
    """For ViT-g; the clips of a step stay the same. bench.py --memory=… checks on a GPU that what was picked fits."""
    cfg, text = speed.fit(config.load([*VITG, f"--memory={gib}", *args]))
    assert (cfg.batch_size, cfg.activation_checkpointing) == (batch, checkpointing)
    assert cfg.batch_size * cfg.grad_accum == 32 and f"--batch_size={batch} " in text
    assert speed.estimate(cfg, cfg.batch_size, checkpointing) < gib * speed.GIB


@pytest.mark.parametrize("arg, says", [("--parts=foo", "--parts are some of training"), ("--repeats=x", "x"), ("--repeats=0", "--repeats"),
                                       ("--model.sise=tiny", "did you mean model.size")])
def test_bench_names_a_slip(arg, says):
    with pytest.raises(SystemExit, match=f"bench.py: .*{says}"):
        bench.main(["--device=cpu", arg])


def test_a_budget_is_held_and_lowered_to_what_the_card_has(monkeypatch):
    """A T4 says that 14.6 of its 16 GiB are there; chunks of the analysis come from the budget, not from the free memory."""
    held, device = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=14.6 * speed.GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: held.append(share))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (14 * speed.GIB, 14.6 * speed.GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: speed.GIB)
    assert speed.limit(config.load([*VITG, "--memory=16"]), device).memory == 14.6
    cfg = speed.limit(config.load([*VITG, "--memory=3"]), device)
    assert cfg.memory == 3 and held == [1, pytest.approx(3 / 14.6)]
    assert energy.chunk_size(cfg, device) == 25 <= 0.5 * 2 * speed.GIB / (258 * energy.BYTES_PER_TOKEN) < 50
    assert energy.chunk_size(config.load(VITG), device) == 200
    assert energy.chunk_size(config.load([*VITG, "--energy.horizon=4"]), device) == 50      # memories of three more steps


def test_no_budget_leaves_the_recipe_and_one_too_small_says_what_to_do():
    cfg = config.load(VITG)
    assert speed.fit(cfg) == (cfg, "")
    with pytest.raises(ValueError, match=r"--memory=1: one clip of 16 frames needs about .* latents.py first.*--data.clip_frames=8"):
        speed.fit(config.load([*VITG, "--memory=1"]))


def test_out_of_memory_ends_in_advice_and_the_last_checkpoint_is_intact(base, tmp_path, monkeypatch):
    args = ["--save_every=2", "--val_every=0", "--batch_size=2", "--activation_checkpointing=false"]
    train.train(recipe(base, tmp_path / "run", *args, "--max_steps=2"))
    before = {path: path.read_bytes() for path in (tmp_path / "run/step_2").iterdir()}
    losses, calls = model.WorldModel.losses, []

    def runs_out(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return losses(self, *args, **kwargs)
    monkeypatch.setattr(model.WorldModel, "losses", runs_out)
    with pytest.raises(ValueError) as error:
        train.train(recipe(base, tmp_path / "run", *args, "--max_steps=4", "--resume"))
    said = str(error.value)
    assert "\n" not in said and "--batch_size=1 --grad_accum=4" in said and "--activation_checkpointing=true" in said
    assert "latents.py first" in said and "newest checkpoint: step 2, go on with --resume" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run/step_2").iterdir()} == before


@pytest.mark.parametrize("measured, from_frames, clips, checkpointing", [
    (20.5, False, 8, False), (10.8, False, 4, False), (6.5, False, 2, False), (8.2, True, 2, False), (12.6, True, 4, False),
    (22.3, True, 8, False), (4.3, True, 2, True), (2.2, False, 1, True)])
def test_the_estimate_is_near_what_was_measured(measured, from_frames, clips, checkpointing):
    """GiB that bench.py showed on an H100 in bf16: never under it (what is picked must fit), never far above."""
    cfg = config.load([*VITG, *([] if from_frames else ["--data.latents=x"])])
    assert measured <= speed.estimate(cfg, clips, checkpointing) / speed.GIB < 1.2 * measured


def test_the_profile_names_what_takes_longest(monkeypatch, capsys):
    bench_more.main(["profile", "--device=cpu", "--model.size=tiny", "--data.clip_frames=4", "--precision=fp32", "--activation_checkpointing=false"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    times = [row["ms"] for row in found["kernels"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= found["total_ms"] * 1.001
    assert any("addmm" in row["name"] for row in found["kernels"])


def test_advice_names_only_what_is_left_to_change():
    cfg = config.load([*VITG, "--batch_size=1", "--data.latents=x", "--data.clip_frames=8"])
    assert speed.advice(cfg) == "use a card with more memory"


def test_the_counted_arithmetic_is_that_of_the_facts():
    """16 frames, ViT-g: 0.52 TFLOP a frame for the encoder, about 15.8 a clip with it and 7.3 without."""
    cfg = config.load(VITG)
    assert bench.encode_flops(cfg) == pytest.approx(0.52e12, rel=0.04)
    assert bench.flops_per_clip(cfg, True) == pytest.approx(15.8e12, rel=0.06)
    assert bench.flops_per_clip(cfg, False) == pytest.approx(7.3e12, rel=0.08)


def test_the_table_of_speeds_runs_on_a_cpu(tmp_path):
    here = os.getcwd()
    (tmp_path / "config.yaml").symlink_to(f"{here}/config.yaml")
    result = subprocess.run([sys.executable, f"{here}/bench.py", "--device=cpu", "--model.size=tiny", "--data.clip_frames=4", "--repeats=2"],
                            cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "runs/bench/bench.json").read_text())["rows"]}
    assert len(rows) >= 14 and all(row["ms"] > 0 for row in rows.values())
    assert {"step from frames, 2 clips, plain", "step from latents, 2 clips", "50 candidate actions, one step",
            "reading 64 random clips of stored latents, 2 a batch"} <= rows.keys()
    assert rows["step from latents, 2 clips"]["clips"] == 2


COMPILED = """
from types import SimpleNamespace
from unittest import mock
import torch
import lora, model, speed
from vjepa2_src import kernels
size = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=1, predictor_heads=4, image_size=64)
_, predictor = model.build(size)
lora.inject(predictor, 4, 8.0)
world, forward, compile_ = model.WorldModel(None, predictor).train(), mock.MagicMock(), torch.nn.Module.compile
forward.__getitem__.side_effect = kernels.forward.__getitem__
with (mock.patch("lora.has_kernels", lambda x: True), mock.patch("vjepa2_src.predictor.has_fast_attention", lambda *_: True),
      mock.patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2)),
      mock.patch.object(kernels, "forward", forward),
      mock.patch("torch.nn.Module.compile", lambda self, **options: compile_(self, backend="aot_eager_decomp_partition", **options))):
    speed.compile_blocks(predictor.predictor_blocks)
    lora.fold(predictor)
    sum(world.losses(torch.randn(2, 4, 16, 32), torch.randn(2, 4, 7), torch.randn(2, 4, 7), rollout=2).values()).backward()
print(forward.__getitem__.call_count)
"""


def test_compiled_blocks_compute_attention_once():
    """Once for teacher forcing and once for the rollout's second step: what the compiler recomputes to save memory is cheap."""
    assert interpret(COMPILED) == ["2"]
