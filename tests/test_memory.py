"""fast/memory.py: the memory budget, the estimate behind it, and advice when memory runs out."""
from types import SimpleNamespace

import pytest
import torch

import config
import energy
from fast import memory


GIB = memory.GIB
VITG = ["config.yaml", "--data.path=nowhere"]
FROM_LATENTS = ["--data.latents=x"]


@pytest.mark.parametrize("gib, args, batch, checkpointing", [
    (80, [], 8, False), (22, [], 4, False), (15, [], 2, False), (6, [], 2, True), (5, [], 1, True),
    (40, FROM_LATENTS, 8, False), (15, FROM_LATENTS, 4, False), (5, FROM_LATENTS, 4, True),
    (2.5, FROM_LATENTS, 1, True)])
def test_a_budget_picks_the_micro_batch_and_checkpointing(gib, args, batch, checkpointing):
    """For ViT-g; the clips of a step stay the same. `python -m bench.speed --memory=…` checks on a
    GPU that what was picked fits."""
    cfg, text = memory.choose_micro_batch(config.load([*VITG, f"--memory={gib}", *args]))
    assert (cfg.batch_size, cfg.activation_checkpointing) == (batch, checkpointing)
    assert cfg.batch_size * cfg.grad_accum == 32 and f"--batch_size={batch} " in text
    assert memory.estimate(cfg, cfg.batch_size, checkpointing) < gib * GIB


def test_without_a_budget_the_recipe_stays_as_it_is():
    cfg = config.load(VITG)
    assert memory.choose_micro_batch(cfg) == (cfg, "")


def test_a_budget_that_is_too_small_names_the_cure():
    message = (r"--memory=1: one clip of 16 frames needs about .* latents.py first"
               r".*--data.clip_frames=8")
    with pytest.raises(ValueError, match=message):
        memory.choose_micro_batch(config.load([*VITG, "--memory=1"]))


@pytest.mark.parametrize("measured, args, clips, checkpointing", [
    (20.5, FROM_LATENTS, 8, False), (10.8, FROM_LATENTS, 4, False), (6.5, FROM_LATENTS, 2, False),
    (2.2, FROM_LATENTS, 1, True),
    (22.3, [], 8, False), (12.6, [], 4, False), (8.2, [], 2, False), (4.3, [], 2, True)])
def test_the_estimate_is_near_what_was_measured(measured, args, clips, checkpointing):
    """Peak GiB of bench.speed on an H100 in bf16: never under it, as what is picked must fit, and
    never far above."""
    cfg = config.load([*VITG, *args])
    assert measured <= memory.estimate(cfg, clips, checkpointing) / GIB < 1.2 * measured


@pytest.fixture
def t4(monkeypatch):
    """A GPU as a T4, of whose 16 GB 14.6 GiB are there, 14 of them free and 1 in use by PyTorch.

    Returns the list of shares of it that PyTorch was limited to."""
    shares, total = [], 14.6 * GIB
    for name, function in dict(
            get_device_properties=lambda _: SimpleNamespace(total_memory=total),
            set_per_process_memory_fraction=lambda share, _: shares.append(share),
            mem_get_info=lambda _: (14 * GIB, total),
            memory_allocated=lambda _: GIB).items():
        monkeypatch.setattr(torch.cuda, name, function)
    return shares


def test_a_budget_limits_pytorch_and_is_lowered_to_what_the_card_has(t4):
    device = torch.device("cuda", 0)
    assert memory.cap_gpu_memory(config.load([*VITG, "--memory=16"]), device).memory == 14.6
    assert memory.cap_gpu_memory(config.load([*VITG, "--memory=3"]), device).memory == 3
    assert t4 == [1, pytest.approx(3 / 14.6)]
    cfg = config.load(VITG)
    assert memory.cap_gpu_memory(cfg, device) is cfg and len(t4) == 2


def test_free_memory_and_the_chunks_of_the_analysis_come_from_the_budget(t4):
    device = torch.device("cuda", 0)
    cfg = config.load([*VITG, "--memory=3"])
    assert energy.chunk_size(cfg, device) == 25
    # Half of the free memory holds these 25 sequences of one step, but not 50.
    assert 25 <= 0.5 * 2 * GIB / (258 * energy.BYTES_PER_TOKEN) < 50
    assert energy.chunk_size(config.load(VITG), device) == 200
    # The KV cache of three more steps leaves room for fewer.
    assert energy.chunk_size(config.load([*VITG, "--energy.horizon=4"]), device) == 50


def test_advice_names_only_what_is_left_to_change():
    cfg = config.load([*VITG, *FROM_LATENTS, "--batch_size=1", "--data.clip_frames=8"])
    assert memory.advice(cfg) == "use a card with more memory"
    cfg = config.load([*VITG, *FROM_LATENTS, "--batch_size=2", "--data.clip_frames=8"])
    assert memory.advice(cfg) == "use --batch_size=1 --grad_accum=32"
