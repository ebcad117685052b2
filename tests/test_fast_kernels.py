"""The Triton kernels compute what PyTorch does, in Triton's interpreter on the CPU."""
import json
from types import SimpleNamespace

import pytest

import fast
import lora
import model
from small import interpret


CFG = SimpleNamespace(activation_checkpointing=False, rollout=3)
SIZE = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=2,
            predictor_heads=4, image_size=64)

ATTENTION = """
import torch, torch.nn.functional as F
from fast.attention import first_steps, frame_causal_attention
from fast.networks import patches_first_mask
for B, H, T, N, d, seen in ((2, 2, 3, 32, 16, 0), (1, 1, 1, 16, 32, 0), (1, 1, 17, 16, 16, 0),
                            (1, 1, 2, 128, 64, 0), (2, 1, 4, 16, 16, 3), (1, 1, 19, 16, 16, 2),
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
