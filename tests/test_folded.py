"""The one-pass backward passes of the MLP and of attention's heads: Triton's kernels, in its interpreter, against layer by layer."""
import json

import pytest
import torch
from small import interpret

import lora
import model

SIZE = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=2, predictor_heads=4, image_size=64)

KERNELS = f"SIZE = {json.dumps(SIZE)}" + """
from types import SimpleNamespace
from unittest import mock
import torch
import folded, lora, model
properties = lambda _: SimpleNamespace(multi_processor_count=2)         # several ranges of rows
for rank in (4, 24):
    torch.manual_seed(0)
    _, predictor = model.build(SIZE)
    lora.inject(predictor, rank, 8.0, dropout=0.2)
    for layer in lora._adapted(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    world, found, passes = model.WorldModel(None, predictor).train(), [], mock.Mock(side_effect=folded.gelu_backward)
    for kernels in (False, True):
        torch.manual_seed(1)
        h, actions, states = model.layer_norm(torch.randn(3, 4, 16, 32)), torch.randn(3, 4, 7), torch.randn(3, 4, 7)
        with (mock.patch("lora.has_kernels", lambda x: kernels), mock.patch("torch.cuda.get_device_properties", properties),
              mock.patch("folded.gelu_backward", passes)):
            lora.fold(predictor)
            world.zero_grad()
            sum(world.losses(h, actions, states, rollout=3).values()).backward()
        found.append([p.grad for p in world.parameters() if p.requires_grad])
        assert passes.called == kernels
    print(max(((a - b).norm() / a.norm()).item() for a, b in zip(*found)), len(found[0]))
"""


def test_one_pass_over_the_gradients_equals_layer_by_layer():
    words = interpret(KERNELS)
    assert words[1::2] == ["16", "16"] and max(map(float, words[::2])) < 1e-5


@pytest.mark.parametrize("size, adapters, mlp, attn", [
    (SIZE, dict(rank=32), True, True), (SIZE, dict(rank=33), False, False), (SIZE | dict(predictor_dim=192), dict(rank=4), False, True),
    (SIZE | dict(predictor_dim=160), dict(rank=4), False, False),
    (SIZE, dict(rank=4, targets=("attn.qkv", "mlp.fc1")), False, True), (SIZE, dict(rank=4, targets=("mlp.fc1", "mlp.fc2")), True, False)])
def test_what_the_kernels_cannot_take_goes_layer_by_layer(monkeypatch, size, adapters, mlp, attn):
    monkeypatch.setattr("lora.has_kernels", lambda _: True)
    _, predictor = model.build(size)
    lora.inject(predictor, **adapters)
    assert not predictor.predictor_blocks[0].mlp.fuses() and not predictor.predictor_blocks[0].attn.fuses()
    lora.fold(predictor)
    assert (predictor.predictor_blocks[0].mlp.fuses(), predictor.predictor_blocks[0].attn.fuses()) == (mlp, attn)


def test_what_is_measured_is_not_folded_and_layers_taken_out_are_plain_again(monkeypatch):
    monkeypatch.setattr("lora.has_kernels", lambda _: True)
    _, predictor = model.build(SIZE)
    arguments = torch.randn(1, 16, 32), torch.randn(1, 1, 7), torch.randn(1, 1, 7)
    base = predictor(*arguments)
    lora.inject(predictor, 4)
    for layer in lora._adapted(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    formula = predictor(*arguments)
    lora.fold(predictor)
    assert torch.equal(predictor(*arguments), formula) and not torch.equal(formula, base)
    predictor.train()
    assert predictor.predictor_blocks[0].mlp.fuses() and predictor.predictor_blocks[0].attn.fuses()
    assert not torch.equal(predictor(*arguments), formula)
    lora.remove(predictor)
    assert torch.equal(predictor(*arguments), base)
