"""The one-pass backward passes of the MLP and of attention's heads: Triton's kernels, in its interpreter, against layer by layer."""
from small import interpret

KERNELS = """
from types import SimpleNamespace
from unittest import mock
import torch
import folded, lora, model
size = dict(encoder_dim=32, encoder_depth=1, encoder_heads=2, predictor_dim=128, predictor_depth=2, predictor_heads=4, image_size=64)
properties = lambda _: SimpleNamespace(multi_processor_count=2)         # several ranges of rows
for rank, dtype in ((4, torch.float32), (24, torch.float32)):
    torch.manual_seed(0)
    _, predictor = model.build(size, dtype)
    lora.inject(predictor, rank, 8.0, dropout=0.2)
    for layer in lora._adapted(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    world, found, passes = model.WorldModel(None, predictor).train(), [], mock.Mock(side_effect=folded.gelu_backward)
    for kernels in (False, True):
        torch.manual_seed(1)
        h, actions, states = model.layer_norm(torch.randn(3, 4, 16, 32)), torch.randn(3, 4, 7), torch.randn(3, 4, 7)
        with (mock.patch("folded.has_kernels", lambda x: kernels), mock.patch("torch.cuda.get_device_properties", properties),
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
