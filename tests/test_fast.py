"""The faster parts compute what the plain networks do, cannot be stale, and come out again."""
import json
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
from small import interpret
from vjepa2_src.blocks import MLP, apply_rope, rope_table


CFG = SimpleNamespace(activation_checkpointing=False, rollout=3)
SIZE = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=2,
            predictor_heads=4, image_size=64)


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


def changed_loss(self, h, actions, states, rollout=2):
    z = self.predict(h[:, :-1], actions[:, :-1], states[:, :-1])
    return {"teacher_forcing": F.mse_loss(z, h[:, 1:]), "rollout": h.new_zeros(())}


@pytest.mark.parametrize("change", ["loss", "another loss", "mlp", "attention", "encoder"])
def test_a_change_in_the_plain_networks_is_never_ignored(monkeypatch, change):
    """Somebody edits model.py or vjepa2_src/ and trains with fast/ as it was."""
    forward = MLP.forward
    if change == "loss":
        monkeypatch.setattr(model.WorldModel, "losses", changed_loss)
    elif change == "another loss":
        losses = model.WorldModel.losses
        monkeypatch.setattr(model.WorldModel, "losses", lambda *a, **k: losses(*a, **k)
                            | {"smooth": torch.zeros(())})
    elif change == "mlp":
        monkeypatch.setattr(MLP, "forward", lambda self, x: self.fc2(F.silu(self.fc1(x))))
    elif change == "attention":
        monkeypatch.setattr("vjepa2_src.blocks.apply_rope", lambda x, *_: x)
    elif change == "encoder":
        monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) * (
            1.1 if self.fc1.in_features == 52 else 1))
    world = adapted_world()
    with pytest.raises(ValueError, match=r"fast/ does not compute .*--compile=false") as error:
        fast.accelerate(world, CFG, compiled=False)
    assert "\n" not in str(error.value)


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


# Triton kernels, in Triton's interpreter

ATTENTION = """
import torch, torch.nn.functional as F
from fast.attention import first_steps, frame_causal_attention
from fast.networks import patches_first_mask
for B, H, T, N, d, seen in ((2, 2, 3, 32, 16, 0), (1, 1, 1, 16, 32, 0), (1, 2, 17, 16, 16, 0),
                            (1, 1, 2, 128, 64, 0), (2, 1, 4, 16, 16, 3), (1, 2, 19, 16, 16, 2),
                            (1, 1, 18, 16, 16, 17)):
    torch.manual_seed(0)
    L = T * (N + 2)
    # queries of the steps after `seen`
    rows = torch.cat([torch.arange(seen * N, T * N), torch.arange(T * N + seen * 2, L)])
    mask, found = patches_first_mask(T - seen, seen, N, torch.device("cpu")), []
    qkv = torch.randn(B, L, 3, H, d)
    d_out = torch.randn(B, len(rows), H, d).transpose(1, 2)
    keep = T // 2
    d_first = torch.randn(2, B, H, keep * (N + 2), d)
    for kernels in (False, True):
        leaf = qkv.clone().requires_grad_()
        q, k, v = (x * 1 for x in leaf.permute(2, 0, 3, 1, 4))                      # [B, H, L, d]
        if kernels:
            out, _, *first = frame_causal_attention(q[:, :, rows], k, v, T, N, keep)
        else:
            out = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask)
            first = [first_steps(x, T, N, keep) for x in (k, v)]
        torch.autograd.backward([out, *first], [d_out, *d_first])
        found.append((out.detach(), leaf.grad))
    print(max((a - b).abs().max().item() for a, b in zip(*found)))
"""


def test_the_kernels_of_attention_equal_the_dense_mask():
    """Outputs and gradients; 17 steps have more action and state tokens than one block."""
    errors = [float(word) for word in interpret(ATTENTION)]
    assert len(errors) == 7 and max(errors) < 1e-5


MERGED = f"SIZE = {json.dumps(SIZE)}" + """
from types import SimpleNamespace
from unittest import mock
import torch
import fast, lora, model
from fast import merged_lora
cfg = SimpleNamespace(activation_checkpointing=False, rollout=2)
properties = lambda _: SimpleNamespace(multi_processor_count=2)         # several ranges of rows
for rank in (4, 24):
    torch.manual_seed(0)
    _, predictor = model.build(SIZE)
    lora.inject(predictor, rank, 8.0, dropout=0.2)
    for layer in lora.adapted_layers(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    world, found = model.WorldModel(None, predictor).train(), []
    fast.accelerate(world, cfg, compiled=False)
    passes = mock.Mock(side_effect=merged_lora.gelu_backward)
    for kernels in (False, True):
        torch.manual_seed(1)
        h = model.layer_norm(torch.randn(3, 4, 16, 32))
        actions, states = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
        with (mock.patch("fast.merged_lora.has_kernels", lambda x: kernels),
              mock.patch("torch.cuda.get_device_properties", properties),
              mock.patch("fast.merged_lora.gelu_backward", passes)):
            world.zero_grad()
            sum(world.losses(h, actions, states, rollout=3).values()).backward()
        found.append([p.grad for p in world.parameters() if p.requires_grad])
        assert passes.called == kernels
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*found)]
    print(max(errors), len(errors))
"""


def test_one_pass_over_the_gradients_equals_layer_by_layer():
    words = interpret(MERGED)
    assert words[1::2] == ["16", "16"] and max(map(float, words[::2])) < 1e-5


@pytest.mark.parametrize("size, adapters, mlp, attn", [
    (SIZE, dict(rank=32), True, True),
    (SIZE, dict(rank=33), False, False),
    (SIZE | dict(predictor_dim=192), dict(rank=4), False, True),
    (SIZE | dict(predictor_dim=160), dict(rank=4), False, False),
    (SIZE, dict(rank=4, targets=("attn.qkv", "mlp.fc1")), False, True),
    (SIZE, dict(rank=4, targets=("mlp.fc1", "mlp.fc2")), True, False)])
def test_what_the_kernels_cannot_take_goes_layer_by_layer(monkeypatch, size, adapters, mlp, attn):
    _, predictor = model.build(size)
    lora.inject(predictor, **adapters)
    world = model.WorldModel(None, predictor)
    fast.accelerate(world, CFG, compiled=False)
    block = predictor.predictor_blocks[0]
    monkeypatch.setattr("fast.merged_lora.has_kernels", lambda _: True)
    assert not block.mlp.fuses() and not block.attn.fuses()
    world.train()
    predictor.merge_adapters()
    assert (block.mlp.fuses(), block.attn.fuses()) == (mlp, attn)
    # what is measured uses the formula
    world.eval()
    assert not block.mlp.fuses() and not block.attn.fuses()


COMPILED = """
from types import SimpleNamespace
from unittest import mock
import torch
import fast, lora, model
from fast import attention_kernels, compiler
size = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=1,
            predictor_heads=4, image_size=64)
_, predictor = model.build(size)
lora.inject(predictor, 4, 8.0)
world, compile_ = model.WorldModel(None, predictor).train(), torch.nn.Module.compile
fast.accelerate(world, SimpleNamespace(activation_checkpointing=False, rollout=2), compiled=False)
forward = mock.MagicMock()
forward.__getitem__.side_effect = attention_kernels.forward.__getitem__

def compile_without_inductor(self, **options):
    compile_(self, backend="aot_eager_decomp_partition", **options)

properties = lambda _: SimpleNamespace(multi_processor_count=2)
with (mock.patch("fast.merged_lora.has_kernels", lambda x: True),
      mock.patch("fast.networks.has_fast_attention", lambda *_: True),
      mock.patch("torch.cuda.get_device_properties", properties),
      mock.patch.object(attention_kernels, "forward", forward),
      mock.patch("torch.nn.Module.compile", compile_without_inductor)):
    compiler.compile_blocks(predictor.predictor_blocks)
    h, actions, states = torch.randn(2, 4, 16, 32), torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    sum(world.losses(h, actions, states, rollout=2).values()).backward()
print(forward.__getitem__.call_count)
"""


def test_compiled_blocks_compute_attention_once():
    """Once for teacher forcing and once for the rollout's second step: what the compiler recomputes
    to save memory is cheap."""
    assert interpret(COMPILED) == ["2"]
