"""The faster parts compute what the plain networks do, cannot be stale, and come out again."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fast
import lora
import model
from fast.gelu import polynomial_gelu
from fast.merged_lora import MergedLoRALinear, write_merged
from fast.networks import FastWorldModel, SplitAndRotate
from parity import LOSSES, inputs, tiny
from vjepa2_src.blocks import Block, apply_rope, rope_table


ROOT = Path(__file__).resolve().parents[1]
CFG = SimpleNamespace(activation_checkpointing=False, rollout=3)


def give_B_values(module, std=0.05):
    torch.manual_seed(3)
    for layer in lora.adapted_layers(module).values():
        torch.nn.init.normal_(layer.lora_B, std=std)


def adapted_world(dropout=0.0, encoder=True):
    torch.manual_seed(0)
    networks = tiny()
    lora.inject(networks[1], rank=4, alpha=8, dropout=dropout)
    give_B_values(networks[1])
    return model.WorldModel(networks[0] if encoder else None, networks[1]).train()


def latents(clips=2, T=7):
    return torch.randn(clips, T, 16, 52, generator=torch.Generator().manual_seed(0))


def losses_and_gradients(world, rollout=3):
    _, states, actions = inputs()
    world.zero_grad()
    losses = world(actions, states[:, :7], h=latents(), rollout=rollout)
    sum(losses.values()).backward()
    return ({name: value.item() for name, value in losses.items()},
            [p.grad.clone() for p in world.parameters() if p.requires_grad])


# As a whole

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rollout", [0, 1, 2, 5])
def test_losses_and_gradients_equal_the_plain_ones(checkpointing, rollout):
    world = adapted_world()
    expected, grads = losses_and_gradients(world, rollout)
    fast.accelerate(world, SimpleNamespace(activation_checkpointing=checkpointing, rollout=2),
                    compiled=False)
    assert type(world) is FastWorldModel
    found, fast_grads = losses_and_gradients(world, rollout)
    assert found == pytest.approx(expected, abs=1e-5) and len(grads) == 24
    for one, other in zip(fast_grads, grads):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_the_official_losses():
    """The fast loss against the official modules' figures, as the plain one in test_model.py."""
    encoder, predictor = tiny()
    world = model.WorldModel(encoder, predictor)
    clip, states, actions = inputs()
    with torch.no_grad():
        frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        h = model.layer_norm(encoder(frames).unflatten(0, (2, 8)))
    actions = torch.cat([actions, torch.full((2, 1, 7), 99.0)], dim=1)
    fast.accelerate(world, CFG, compiled=False)
    for rollout in (2, 3):
        losses = world.losses(h, actions, states, rollout)
        teacher_forcing = losses["teacher_forcing"].item()
        assert teacher_forcing == pytest.approx(LOSSES["teacher_forcing"], abs=1e-6)
        assert losses["rollout"].item() == pytest.approx(LOSSES[rollout], abs=1e-6)
    with pytest.raises(ValueError, match="rollout 8 needs more than 8 frames"):
        world.losses(h, actions, states, 8)


def test_restoring_gives_the_plain_networks_bit_for_bit():
    world = adapted_world()
    classes = [type(module) for module in world.modules()]
    attributes = [set(vars(module)) for module in world.modules()]
    names = set(world.state_dict())
    expected = losses_and_gradients(world)
    fast.accelerate(world, CFG, compiled=False)
    assert [type(module) for module in world.modules()] != classes
    assert set(world.state_dict()) == names
    losses_and_gradients(world)
    fast.restore(world)
    assert [type(module) for module in world.modules()] == classes
    assert [set(vars(module)) for module in world.modules()] == attributes
    found = losses_and_gradients(world)
    assert found[0] == expected[0]
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1]))


def test_the_run_itself_is_not_touched_by_the_comparison():
    """Neither its random stream, nor a mode, nor dropout."""
    world = adapted_world(dropout=0.3)
    world.encoder.eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fast.accelerate(world, CFG, compiled=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert world.predictor.training and not world.encoder.training
    assert {layer.dropout for layer in lora.adapted_layers(world).values()} == {0.3}
    still = model.WorldModel(*tiny())
    fast.accelerate(still, CFG, compiled=False)
    assert not any(module.training for module in still.modules())


# Edits of the plain code, as (file, from, to), that fast/ does not follow.
EDITS = {
    "another loss": ("model.py", "F.l1_loss(forced, h[:, 1:])", "F.mse_loss(forced, h[:, 1:])"),
    "a small term": ("model.py", "F.l1_loss(forced, h[:, 1:])",
                     "F.l1_loss(forced, h[:, 1:]) + 1e-3 * forced.square().mean()"),
    "a third loss": ("model.py", "        return losses",
                     "        return losses | {'smooth': 0 * forced.mean()}"),
    "a gradient alone": ("model.py", "torch.cat([h[:, :1], rolled], dim=1)",
                         "torch.cat([h[:, :1], rolled.detach()], dim=1)"),
    "the energy": ("model.py", "(z - h.float()).abs()", "(z - h.float()).square()"),
    "attention": ("vjepa2_src/blocks.py", "q, k = apply_rope(q, *rope)",
                  "q, k = apply_rope(q / q.norm(dim=-1, keepdim=True), *rope)"),
    "the rotation": ("vjepa2_src/blocks.py", "(x * cosine + swap_pairs(x) * sine)",
                     "(2 * x * cosine + 2 * swap_pairs(x) * sine)"),
    "the MLP": ("vjepa2_src/blocks.py", "F.gelu(self.fc1(x))",
                "F.gelu(self.fc1(x), approximate='tanh')"),
    "the block": ("vjepa2_src/blocks.py", "return x + self.mlp(self.norm2(x))",
                  "return x + 0.999 * self.mlp(self.norm2(x))"),
    "LoRA's formula": ("lora.py", "self.scale * F.linear", "2 * self.scale * F.linear"),
    "token order and mask": ("vjepa2_src/predictor.py", "step[past_frames * tokens:, None] >=",
                             "step[past_frames * tokens:, None] <="),
}


def test_an_edit_of_the_plain_code_is_never_ignored(tmp_path):
    """Somebody edits model.py, lora.py or vjepa2_src/ and trains with fast/ as it was: in bf16,
    with random weights and adapters of zeros, where outputs hardly change."""
    for edit, (file, old, new) in EDITS.items():
        folder = tmp_path / edit
        folder.mkdir()
        for name in ("config.py", "files", "lora.py", "model.py", "vjepa2_src", "fast"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    done = subprocess.run([sys.executable, "-c", ACCELERATE, *map(str, tmp_path.iterdir())],
                          capture_output=True, text=True, timeout=100,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    refused = [Path(line).name for line in done.stdout.splitlines()]
    assert sorted(refused) == sorted(EDITS), done.stderr


# One process, forked for each edited copy: PyTorch is imported once.
ACCELERATE = """
import os, sys
from types import SimpleNamespace
import torch
for folder in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    sys.path.insert(0, folder)
    import fast, lora, model
    encoder, predictor = model.build("tiny", torch.bfloat16)
    lora.inject(predictor, rank=4)
    world = model.WorldModel(encoder, predictor).train()
    cfg = SimpleNamespace(activation_checkpointing=False, rollout=2)
    try:
        fast.accelerate(world, cfg, compiled=False)
    except ValueError as error:
        assert "fast/ does not compute the" in str(error) and "--compile=false" in str(error)
        assert type(world) is model.WorldModel              # it is plain again
        print(folder, flush=True)
    os._exit(0)
"""


def test_a_subclass_is_named_and_a_refused_world_stays_plain(monkeypatch):
    class MyWorld(model.WorldModel):
        pass

    world = MyWorld(*tiny())
    with pytest.raises(ValueError, match="does not know MyWorld, a subclass of WorldModel"):
        fast.accelerate(world, CFG, compiled=False)
    world = adapted_world()
    monkeypatch.setattr(fast, "differences", lambda *_: {"predictions": float("nan")})
    with pytest.raises(ValueError, match="too far from the plain networks: predictions"):
        fast.accelerate(world, CFG, compiled=False)
    assert type(world) is model.WorldModel and type(world.predictor.predictor_blocks[0]) is Block


def test_checkpointed_blocks_can_be_accelerated():
    world = adapted_world()
    expected, _ = losses_and_gradients(world)
    model.checkpoint_activations(world.predictor)
    fast.accelerate(world, CFG, compiled=False)
    assert losses_and_gradients(world)[0] == pytest.approx(expected, abs=1e-5)


def test_two_forward_passes_before_a_backward_pass_are_refused():
    """With checkpointing the second one would be recomputed with other adapters, silently."""
    for checkpointing in (True, False):
        world = adapted_world(dropout=0.5, encoder=False)
        cfg = SimpleNamespace(activation_checkpointing=checkpointing, rollout=2)
        fast.accelerate(world, cfg, compiled=False)
        _, states, actions = inputs()
        losses = [world(actions, states[:, :7], h=latents())["rollout"] for _ in range(2)]
        with pytest.raises(RuntimeError, match="backward|inplace"):
            sum(losses).backward()


def test_tables_made_in_inference_mode_serve_training():
    world = adapted_world(encoder=False)
    fast.accelerate(world, CFG, compiled=False)
    _, states, actions = inputs()
    with torch.inference_mode():
        world.predict(latents(T=6), actions[:, :6], states[:, :6])
    sum(world(actions[:, :6], states[:, :6], h=latents(T=6)).values()).backward()


def test_time_steps_from_a_kv_cache_equal_all_at_once():
    _, states, actions = inputs()
    _, predictor = tiny()
    world = model.WorldModel(None, predictor)
    fast.accelerate(world, CFG, compiled=False)
    h, found = latents(T=5), []
    with torch.no_grad():
        for calls in ([5], [1, 1, 1, 1, 1], [2, 3]):
            parts, kv_cache, i = [], [], 0
            for n in calls:
                steps = slice(i, i + n)
                parts.append(world.predict(h[:, steps], actions[:, steps], states[:, steps],
                                           kv_cache))
                i += n
            found.append(torch.cat(parts, dim=1))
        # of five steps the first is kept; then a step of the model's own follows
        _, kv = predictor.run(h.flatten(1, 2), actions[:, :5], states[:, :5], keep=1)
        after, _ = predictor.run(h[:, 4], actions[:, 1:2], states[:, 1:2], kv)
        whole = predictor(h[:, [0, 4]].flatten(1, 2), actions[:, :2], states[:, :2])
    assert all(torch.allclose(one, found[0], atol=1e-5) for one in found[1:])
    assert torch.allclose(after, whole[:, 16:], atol=1e-5)


# Merged adapters

def test_a_merged_copy_is_never_stale():
    """Whatever changes the adapters between two passes counts in the second one."""
    world = adapted_world(encoder=False)
    fast.accelerate(world, CFG, compiled=False)
    _, states, actions = inputs()

    def predictions():
        with torch.no_grad():
            return world.predict(latents(), actions, states[:, :7])

    before = predictions()
    for change in (lambda p: p.data.mul_(2), lambda p: setattr(p, "data", p.data + 0.1)):
        for layer in lora.adapted_layers(world).values():
            change(layer.lora_B)
        after = predictions()
        world.eval()
        formula = predictions()                             # in eval mode nothing is merged
        world.train()
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.allclose(after, formula, atol=1e-4)
        before = after


def test_layers_injected_later_are_merged_too_and_removed_ones_are_plain():
    _, predictor = tiny()
    world = model.WorldModel(None, predictor)
    fast.accelerate(world, CFG, compiled=False)
    _, states, actions = inputs()
    with torch.no_grad():
        base = world.predict(latents(), actions, states[:, :7])
        lora.inject(predictor, rank=4)
        give_B_values(predictor)
        formula = world.predict(latents(), actions, states[:, :7])
        world.train()
        merged = world.predict(latents(), actions, states[:, :7])
        layers = lora.adapted_layers(predictor).values()
        assert {type(layer) for layer in layers} == {MergedLoRALinear}
        assert torch.allclose(merged, formula, atol=1e-4) and not torch.equal(formula, base)
        lora.remove(predictor)
        assert torch.equal(world.predict(latents(), actions, states[:, :7]), base)


def test_dropout_is_drawn_once_for_a_sequence():
    world = adapted_world(dropout=0.5, encoder=False)
    fast.accelerate(world, CFG, compiled=False)
    losses_and_gradients(world)
    layer = lora.adapted_layers(world.predictor)["predictor_blocks.0.mlp.fc2"]
    drawn = layer.input_scale.clone()
    assert set(drawn.tolist()) == {0, 2}
    x = torch.randn(3, layer.in_features)
    update = layer.scale * (x * drawn) @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias + update, atol=1e-4)
    losses_and_gradients(world)
    assert not torch.equal(layer.input_scale, drawn)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_merged_layers_give_the_output_and_the_gradients_of_the_formula(dtype, close, dropout):
    _, predictor = tiny()
    lora.inject(predictor, rank=4, dropout=dropout)
    give_B_values(predictor)
    layer = lora.adapted_layers(predictor)["predictor_blocks.0.mlp.fc2"].to(dtype).train()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    layer.__class__ = MergedLoRALinear
    layer.merge()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, layer.in_features, generator=random).to(dtype).requires_grad_()
    d_y = torch.randn(3, 5, layer.out_features, generator=random).to(dtype)
    leaves = x, layer.lora_A, layer.lora_B
    y = layer(x)
    merged = [y, *torch.autograd.grad(y, leaves, d_y)]
    dropped = x if layer.input_scale is None else x * layer.input_scale.to(dtype)
    low = F.linear(dropped, layer.lora_A.to(dtype))
    y = F.linear(x, layer.weight, layer.bias) + layer.scale * F.linear(low, layer.lora_B.to(dtype))
    formula = [y, *torch.autograd.grad(y, leaves, d_y)]
    for one, other in zip(merged, formula):
        assert one.dtype == other.dtype and (one - other).norm() < close * other.norm()


def test_merging_into_bfloat16_keeps_updates_smaller_than_its_steps():
    """Rounded to the nearest, a small update would be lost; what is kept is measured along what it
    does to inputs."""
    random = torch.Generator().manual_seed(0)
    W = (0.03 * torch.randn(256, 512, generator=random)).to(torch.bfloat16)
    A = 0.02 * torch.randn(8, 512, generator=random)
    x = torch.randn(256, 512, generator=random)
    out = torch.empty_like(W)

    def kept(weight, update):
        wanted = x @ update.T
        return ((x @ (weight.float() - W.float()).T) * wanted).sum() / wanted.square().sum()

    for size in (0, 1e-5, 1e-3):
        B = size * torch.randn(256, 8, generator=random)
        write_merged(out, W, A, B, 8.0)
        if size == 0:
            assert torch.equal(out, W)
            continue
        nearest = (W.float() + 8 * B @ A).to(torch.bfloat16)
        assert abs(kept(out, 8 * B @ A) - 1) < 0.05
        assert kept(nearest, 8 * B @ A) < 0.3 or size > 1e-5


# Pieces

def test_the_gradient_of_split_and_rotate_is_that_of_the_rotation():
    random = torch.Generator().manual_seed(0)
    rope = rope_table(26, 3, 2, 2, 2, 2, torch.device("cpu"))
    qkv = torch.randn(2, 18, 3, 2, 26, generator=random)
    d = torch.randn(3, 2, 2, 18, 26, generator=random)

    def plain(x):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    found = []
    for split in (lambda x: SplitAndRotate.apply(x, *rope), plain):
        leaf = qkv.clone().requires_grad_()
        parts = split(leaf)
        sum((part * weight).sum() for part, weight in zip(parts, d)).backward()
        found.append([*(part.detach() for part in parts), leaf.grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_polynomial_gelu():
    x = torch.linspace(-12, 12, 10001, dtype=torch.float64)
    assert (polynomial_gelu(x.float()) - F.gelu(x)).abs().max() < 1e-6
    half = x.to(torch.bfloat16)
    assert polynomial_gelu(half).dtype == torch.bfloat16
    assert (polynomial_gelu(half) - F.gelu(half)).abs().max() <= 2 ** -9
