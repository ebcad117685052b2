"""What runs on a GPU alone: the kernels inside the networks, CUDA graphs, compiled blocks, several
GPUs, running out of memory. Skipped without one; `pytest tests/test_gpu.py`. Networks of full width
with few blocks, random weights."""
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import fast
import latents
import lora
import model
import train
from fast.memory import GIB
from small import recipe, write_episodes


pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU from Ampere on")

SIZE = dict(encoder_dim=1408, encoder_depth=2, encoder_heads=22, predictor_dim=1024,
            predictor_depth=4, predictor_heads=16, image_size=256)
CFG = SimpleNamespace(activation_checkpointing=False, rollout=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_episodes(folder, n=5, length=24, patches=16, move=0.02)
    return folder


def gpu_recipe(data, out, *args):
    return recipe(data, out, "--device=cuda", "--precision=bf16", "--model.checkpoint=random",
                  f"--model.size={json.dumps(SIZE)}", f"--data.path={data}",
                  "--data.clip_frames=9", "--lora.rank=16", "--optimizer=adamw", "--lr=1e-3",
                  "--val_every=0", "--grad_accum=2", "--activation_checkpointing=false", *args)


def logged_losses(out_dir):
    lines = map(json.loads, open(f"{out_dir}/metrics.jsonl"))
    return np.array([[line["teacher_forcing"], line["rollout"]] for line in lines])


def losses_of(cfg):
    train.train(cfg)
    return logged_losses(cfg.out_dir)


def batch_of(clips, T, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {"h": model.layer_norm(torch.randn(clips, T, 256, 1408, generator=random)),
            "actions": 0.05 * torch.randn(clips, T, 7, generator=random),
            "states": torch.randn(clips, T, 7, generator=random)}


def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    _, predictor = model.build(SIZE, dtype, "cuda")
    lora.inject(predictor, 16, 32.0)
    for layer in lora.adapted_layers(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=2e-3)
    return model.WorldModel(None, predictor).train()


def gradients(world, batch, dtype, rollout=3):
    """Losses and the adapters' gradients, scaled so that fp16 can hold them."""
    world.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        losses = world(**on_gpu(batch), rollout=rollout)
    (2.0 ** 16 * sum(losses.values())).backward()
    grads = [p.grad.flatten() for p in world.parameters() if p.grad is not None]
    return torch.stack(list(losses.values())).detach(), torch.cat(grads)


@pytest.mark.parametrize("T", [2, 9, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_are_as_near_to_float32_as_the_plain_networks(dtype, T):
    batch, found = batch_of(2, T), {}
    for name, kind in (("exact", torch.float32), ("fast", dtype), ("plain", dtype)):
        world = adapted()
        for p in world.predictor.parameters():
            if not p.requires_grad:
                p.data = p.data.to(kind)
        if name == "fast":
            fast.accelerate(world, CFG, compiled=False)
        found[name] = gradients(world, batch, kind, rollout=min(3, T - 1))
        block = world.predictor.predictor_blocks[0]
        if name == "fast":
            assert block.mlp.fuses() and block.attn.fuses()
    exact_losses, exact = found["exact"]
    errors = [(found[name][1] - exact).norm() / exact.norm() for name in ("fast", "plain")]
    print(f"{dtype}, {T} steps: kernels {errors[0]:.2e}, plain {errors[1]:.2e} from float32's "
          f"gradients; losses {(found['fast'][0] - exact_losses).abs().max():.1e}, "
          f"{(found['plain'][0] - exact_losses).abs().max():.1e}")
    assert (found["fast"][0] - exact_losses).abs().max() < 1e-3
    assert errors[0] < 0.25 and errors[0] < 1.3 * errors[1]


def test_micro_batches_in_a_cuda_graph_equal_eager_ones():
    """Three different batches, one after the other without waiting: losses of each, and the sum of
    their gradients."""
    batches, found = [batch_of(2, 9, seed) for seed in range(3)], []
    for graphed in (False, True):
        world = adapted(torch.bfloat16)
        trainable = [p for p in world.parameters() if p.requires_grad]
        fast.accelerate(world, CFG, compiled=graphed)
        step = partial(train.forward_backward, world,
                       scaler=torch.amp.GradScaler("cuda", enabled=False),
                       autocast=torch.autocast("cuda", torch.bfloat16), rollout=2, grad_accum=1)
        if graphed:
            step = fast.CUDAGraph(step, trainable)
            pinned = [{k: v.pin_memory() for k, v in batch.items()} for batch in batches]
            losses = [{k: v.clone() for k, v in step(batch).items()} for batch in pinned]
        else:
            losses = [step(on_gpu(batch)) for batch in batches]
        torch.cuda.synchronize()
        grads = torch.cat([p.grad.flatten() for p in trainable if p.grad is not None])
        found.append(([list(map(float, one.values())) for one in losses], grads))
    (eager_losses, grads), (graph_losses, graph_grads) = found
    assert np.allclose(eager_losses, graph_losses, rtol=2e-3)
    assert len({tuple(one) for one in graph_losses}) == 3
    assert (graph_grads - grads).norm() < 0.2 * grads.norm()


def test_200_steps_from_latents_and_from_frames_and_50_steps_plain(data, tmp_path):
    """The same clips and seeds: losses agree to bf16's precision, while they fall."""
    store = f"--data.latents={tmp_path}/store"
    latents.encode(gpu_recipe(data, tmp_path, store))
    no_dropout = "--lora.dropout=0"             # fast/ draws it once a micro-batch, not per token
    frames = losses_of(gpu_recipe(data, tmp_path / "frames", "--max_steps=200", no_dropout))
    stored = losses_of(gpu_recipe(data, tmp_path / "stored", "--max_steps=200", no_dropout, store))
    plain = losses_of(gpu_recipe(data, tmp_path / "plain", "--max_steps=50", no_dropout, store,
                                 "--compile=false"))
    compiled = losses_of(gpu_recipe(data, tmp_path / "compiled", "--max_steps=50", no_dropout,
                                    store))
    apart, plain_apart = np.abs(frames / stored - 1), np.abs(compiled / plain - 1)
    print(f"\nframes and latents, 200 steps: {apart.max():.1e} at most, {apart.mean():.1e} mean; "
          f"plain and compiled, 50 steps: {plain_apart.max():.1e}, {plain_apart.mean():.1e}; "
          f"loss {stored[:5].sum(1).mean():.3f} -> {stored[-5:].sum(1).mean():.3f}")
    assert stored[-5:].sum(1).mean() < 0.99 * stored[:5].sum(1).mean()
    assert apart.max() < 1e-2 and apart.mean() < 2e-3
    assert plain_apart.max() < 1e-2 and plain_apart.mean() < 2e-3


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, tmp_path):
    """Compiled, in CUDA graphs, with dropout: adapter, optimizer, and the adapter file's bytes."""
    args = ["--max_steps=6", "--save_every=3", "--lora.dropout=0.2"]
    whole = train.train(gpu_recipe(data, tmp_path / "whole", *args))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts",
                    ignore=shutil.ignore_patterns("step_6"))
    parts = train.train(gpu_recipe(data, tmp_path / "parts", *args, "--resume"))
    before, after, again = (torch.load(step / "state.pt")["optimizer"]["state"]
                            for step in (tmp_path / "whole/step_3", whole, parts))
    for i, moments in after.items():
        assert all(torch.equal(again[i][key], value) for key, value in moments.items())
    assert not torch.equal(before[0]["exp_avg"], after[0]["exp_avg"])
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_landscapes_equal_the_plain_ones(data, tmp_path):
    """One-step and three-step energies of an adapted model, compiled with kernels and plain."""
    import energy
    world = adapted(torch.bfloat16).eval()
    h = model.layer_norm(torch.randn(2, 256, 1408, generator=torch.Generator().manual_seed(0)))
    h, states, actions = h.cuda(), torch.zeros(1, 7), energy.grid("xy", 0.1, 7)
    found = []
    for accelerated in (False, True):
        if accelerated:
            fast.accelerate(world, CFG)
        found.append([energy.landscape(world, h[:1], states, h[1], actions, steps).cpu()
                      for steps in (1, 3)])
    for plain, compiled in zip(*found):
        print(f"energies differ by {(plain - compiled).abs().max():.1e}, "
              f"range {plain.max() - plain.min():.1e}")
        assert (plain - compiled).abs().max() < 2e-3 * plain.mean()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one_with_the_double_batch(data, tmp_path):
    """torchrun with NCCL, in CUDA graphs: the same clips, the same losses."""
    args = ["--max_steps=20", "--lora.dropout=0", "--save_every=10"]
    one = losses_of(gpu_recipe(data, tmp_path / "one", *args, "--batch_size=4"))
    cfg = gpu_recipe(data, tmp_path / "two", *args, "--batch_size=2")
    (tmp_path / "two.yaml").write_text(config.dump(cfg))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", str(tmp_path / "two.yaml")]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    for _ in range(2):                          # the second time it resumes at its last step
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
        command.append("--resume")
    assert "TensorFloat32" not in result.stdout + result.stderr
    two = logged_losses(tmp_path / "two")
    apart = np.abs(two / one - 1)
    print(f"\ntwo GPUs and one, 20 steps: {apart.max():.1e} at most, {apart.mean():.1e} mean")
    assert two.shape == one.shape and apart.max() < 5e-3 and apart.mean() < 1e-3


def test_running_out_of_memory_ends_in_advice_and_keeps_the_checkpoint(data, tmp_path):
    cfg = gpu_recipe(data, tmp_path / "run", "--max_steps=1")
    out = train.train(cfg)
    before = {path: path.read_bytes() for path in out.iterdir()}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        share = (torch.cuda.memory_reserved() + 1.2 * GIB) / total
        torch.cuda.set_per_process_memory_fraction(share)
        with pytest.raises(ValueError, match="out of memory at .* micro-batches of 8; use "
                           "--batch_size=4 .*newest checkpoint: step 1"):
            train.train(gpu_recipe(data, tmp_path / "run", "--max_steps=3", "--resume=changed",
                                   "--batch_size=8"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
