"""What runs on a GPU alone: the kernels inside the networks, CUDA graphs, compiled blocks, running out of memory. Skipped without
one; `pytest tests/test_gpu.py` took 2 min 30 s on an H100, compilation included. Networks of full width with few blocks, random weights."""
import json
import shutil

import numpy as np
import pytest
import torch
from small import recipe, write_episodes

import latents
import lora
import model
import speed
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU from Ampere on")

SIZE = dict(encoder_dim=1408, encoder_depth=2, encoder_heads=22, predictor_dim=1024, predictor_depth=4, predictor_heads=16, image_size=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_episodes(folder, n=5, length=24, patches=16, move=0.02)
    return folder


def gpu_recipe(data, out, *args):
    return recipe(data, out, "--device=cuda", "--precision=bf16", "--model.checkpoint=random", f"--model.size={json.dumps(SIZE)}",
                  f"--data.path={data}", "--data.clip_frames=9", "--lora.rank=16", "--optimizer=adamw", "--lr=1e-3", "--val_every=0",
                  "--grad_accum=2", "--activation_checkpointing=false", *args)


def losses(cfg):
    train.train(cfg)
    lines = map(json.loads, open(f"{cfg.out_dir}/metrics.jsonl"))
    return np.array([[line["teacher_forcing"], line["rollout"]] for line in lines])


def batch_of(clips, T, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {"h": model.layer_norm(torch.randn(clips, T, 256, 1408, generator=random)), "actions": 0.05 * torch.randn(clips, T, 7, generator=random),
            "states": torch.randn(clips, T, 7, generator=random)}


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    _, predictor = model.build(SIZE, dtype, "cuda")
    lora.inject(predictor, 16, 32.0)
    for layer in lora._adapted(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=2e-3)
    return model.WorldModel(None, predictor).train()


def gradients(world, batch, dtype, rollout=3):
    """Losses and the adapters' gradients, scaled so that fp16 can hold them."""
    lora.fold(world.predictor)
    world.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = world(**{key: value.cuda() for key, value in batch.items()}, rollout=rollout)
    (2.0 ** 16 * sum(found.values())).backward()
    return torch.stack(list(found.values())).detach(), torch.cat([p.grad.flatten() for p in world.parameters() if p.grad is not None])


@pytest.mark.parametrize("T", [2, 9, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_are_as_near_to_float32_as_a_dense_mask_and_layer_by_layer(monkeypatch, dtype, T):
    batch, found = batch_of(2, T), {}
    for name, kind, fast in (("exact", torch.float32, False), ("fast", dtype, True), ("dense", dtype, False)):
        world = adapted()
        for p in world.predictor.parameters():
            if not p.requires_grad:
                p.data = p.data.to(kind)
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr("vjepa2_src.predictor.has_fast_attention", lambda *_: False)
                patch.setattr("lora.has_kernels", lambda _: False)
            found[name] = gradients(world, batch, kind, rollout=min(3, T - 1))
        block = world.predictor.predictor_blocks[0]
        assert block.mlp.fuses() == block.attn.fuses() == fast
    fast, dense = ((found[name][1] - found["exact"][1]).norm() / found["exact"][1].norm() for name in ("fast", "dense"))
    assert (found["fast"][0] - found["exact"][0]).abs().max() < 1e-3
    print(f"{dtype}, {T} steps: kernels {fast:.2e}, without {dense:.2e} from float32's gradients")
    assert fast < 0.25 and fast < 1.3 * dense


def test_graphed_micro_batches_equal_eager_ones():
    """Three different batches, one after the other without waiting: losses of each, and the sum of their gradients."""
    batches, found = [batch_of(2, 9, seed) for seed in range(3)], []
    for graphed in (False, True):
        world = adapted(torch.bfloat16)
        trainable = [p for p in world.parameters() if p.requires_grad]
        write = speed.compile_world(world) if graphed else None
        off = torch.amp.GradScaler("cuda", enabled=False)
        autocast = torch.autocast("cuda", torch.bfloat16)

        def work(batch, world=world, write=write, off=off, autocast=autocast):
            return train.forward_backward(world, lambda: lora.fold(world.predictor, write), off, autocast, 2, 1, batch)
        run = speed.Graphed(work, trainable) if graphed else lambda batch: work({key: value.cuda() for key, value in batch.items()})
        each = [[value.clone() for value in run({key: value.pin_memory() for key, value in batch.items()}).values()] for batch in batches]
        found.append((torch.tensor(each), torch.cat([p.grad.flatten() for p in trainable])))
    (eager, grads), (graph, graph_grads) = found
    assert torch.allclose(eager, graph, rtol=1e-3) and (eager[0] != eager[1]).all()
    assert (graph_grads - grads).norm() < 0.2 * grads.norm()


def test_200_steps_from_latents_and_from_frames_and_50_steps_eager(data, tmp_path):
    """The same clips and seeds: losses agree to bf16's precision, while they fall."""
    store = f"--data.latents={tmp_path}/store"
    latents.encode(gpu_recipe(data, tmp_path, store))
    frames = losses(gpu_recipe(data, tmp_path / "frames", "--max_steps=200"))
    stored = losses(gpu_recipe(data, tmp_path / "stored", "--max_steps=200", store))
    eager = losses(gpu_recipe(data, tmp_path / "eager", "--max_steps=50", store, "--compile=false"))
    compiled = losses(gpu_recipe(data, tmp_path / "compiled", "--max_steps=50", store))
    apart, eager_apart = np.abs(frames / stored - 1), np.abs(compiled / eager - 1)
    print(f"\nframes and latents, 200 steps: {apart.max():.1e} at most, {apart.mean():.1e} mean; eager and compiled, 50 steps: "
          f"{eager_apart.max():.1e}, {eager_apart.mean():.1e}; "
          f"loss {stored[:5].sum(1).mean():.3f} -> {stored[-5:].sum(1).mean():.3f}")
    assert stored[-5:].sum(1).mean() < 0.99 * stored[:5].sum(1).mean()
    assert apart.max() < 1e-2 and eager_apart.max() < 1e-2 and apart.mean() < 2e-3 and eager_apart.mean() < 2e-3


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, tmp_path):
    """Compiled, in CUDA graphs, with dropout."""
    args = ["--max_steps=6", "--save_every=3", "--lora.dropout=0.2"]
    whole = train.train(gpu_recipe(data, tmp_path / "whole", *args))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("step_6"))
    parts = train.train(gpu_recipe(data, tmp_path / "parts", *args, "--resume"))
    before, after, again = (torch.load(step / "state.pt")["optimizer"]["state"] for step in (tmp_path / "whole/step_3", whole, parts))
    assert all(torch.equal(again[i][key], value) for i, moments in after.items() for key, value in moments.items())
    assert not torch.equal(before[0]["exp_avg"], after[0]["exp_avg"])
    assert (whole / "adapter_model.safetensors").read_bytes() == (parts / "adapter_model.safetensors").read_bytes()


def test_running_out_of_memory_ends_in_advice_and_keeps_the_checkpoint(data, tmp_path):
    cfg = gpu_recipe(data, tmp_path / "run", "--max_steps=1")
    out = train.train(cfg)
    before = {path: path.read_bytes() for path in out.iterdir()}
    torch.cuda.empty_cache()
    device = torch.device("cuda", 0)
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.2 * speed.GIB) / torch.cuda.get_device_properties(device).total_memory)
        with pytest.raises(ValueError, match="out of memory at .* micro-batches of 8; use --batch_size=4 .*newest checkpoint: step 1"):
            train.train(gpu_recipe(data, tmp_path / "run", "--max_steps=3", "--resume", "--batch_size=8"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
