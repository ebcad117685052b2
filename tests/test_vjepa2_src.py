"""The plain networks equal the official ones, and keep the quirks that the weights need."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from parity import FIGURES, SHARED, inputs, tiny
from vjepa2_src.blocks import apply_rope, rope_table


def per_frame(encoder, clip):
    B, _, T, _, _ = clip.shape
    frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
    return encoder(frames).unflatten(0, (B, T)).flatten(1, 2)           # [B, T*N, D]


@pytest.fixture(scope="module")
def outputs():
    """What our networks give for the parity inputs."""
    encoder, predictor = tiny()
    clip, states, actions = inputs()
    with torch.no_grad():
        out = {"encoder_tubelet": encoder(clip), "encoder_per_frame": per_frame(encoder, clip)}
        out["latents"] = model.layer_norm(out["encoder_per_frame"])
        out["predictor"] = predictor(out["latents"][:, :7 * 16], actions, states[:, :7])
    return out


@pytest.mark.parametrize("name", FIGURES)
def test_outputs_equal_the_official_modules(outputs, name):
    values = outputs[name].flatten()
    stride = len(values) // 8
    assert values[stride // 2::stride][:8].tolist() == pytest.approx(FIGURES[name], abs=1e-5)
    file = SHARED / "parity/tiny_ac.npz"
    if file.exists():
        assert np.abs(outputs[name].numpy() - np.load(file)[name]).max() < 1e-5


def test_full_size_names_shapes_and_counts():
    encoder, predictor = model.empty_networks("vitg")                   # on the meta device
    assert sum(p.numel() for p in encoder.parameters()) == 1_012_173_952
    assert sum(p.numel() for p in predictor.parameters()) == 305_220_992
    assert (len(encoder.state_dict()), len(predictor.state_dict())) == (484, 300)
    file = SHARED / "parity/checkpoint_keys.json"
    if file.exists():
        keys = json.loads(file.read_text())
        for part, module in (("encoder", encoder), ("predictor", predictor)):
            assert {k: list(v.shape) for k, v in module.state_dict().items()} == keys[part]


def test_encoder_equals_the_one_in_transformers():
    """A second, independent witness."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder
    size = model.SIZES["tiny"]
    theirs = VJEPA2Encoder(transformers.VJEPA2Config(
        patch_size=16, crop_size=64, tubelet_size=2, hidden_size=size["encoder_dim"],
        mlp_ratio=48 / 11, num_attention_heads=size["encoder_heads"],
        num_hidden_layers=size["encoder_depth"], attn_implementation="eager")).eval()
    encoder, _ = tiny()
    state = {}
    for name, tensor in encoder.state_dict().items():
        name = name.replace("blocks.", "layer.").replace("attn.", "attention.")
        if name.startswith("patch_embed"):
            state[name.replace("patch_embed", "embeddings.patch_embeddings")] = tensor
        elif ".qkv." in name:
            for which, third in zip(("query", "key", "value"), tensor.chunk(3)):
                state[name.replace("qkv", which)] = third
        else:
            state[name if name.startswith("layer.") else f"layer{name}"] = tensor
    theirs.load_state_dict(state)
    clip, _, _ = inputs()
    with torch.no_grad():
        difference = theirs(clip.transpose(1, 2)).last_hidden_state - encoder(clip)
    assert difference.abs().max() < 1e-5


def test_rope_keeps_the_tiled_frequencies_that_the_weights_need():
    """Channels rotate in pairs (0,1), (2,3) …, but frequencies are tiled, so a pair's two angles
    differ. A frame's tokens are 2 condition tokens, then 2 x 2 patches."""
    cosine, sine = rope_table(26, 3, 2, 2, 2, 2, torch.device("cpu"))   # groups of 8, 2 left over
    frame2_patch3 = 2 * 6 + 2 + 3                                       # row 1, column 1
    frequency = 10000.0 ** (-np.arange(4) / 4)
    for axis, index in enumerate((2, 1, 1)):
        angles = index * np.concatenate([frequency, frequency])
        group = cosine[frame2_patch3, 8 * axis:8 * axis + 8]
        assert group.numpy() == pytest.approx(np.cos(angles), abs=1e-6)
    assert (cosine[:, 24:] == 1).all() and (sine[:, 24:] == 0).all()
    for condition in (2 * 6, 2 * 6 + 1):                                # rotated by the frame alone
        assert (cosine[condition, 8:] == 1).all()
        assert cosine[condition, 0] == pytest.approx(np.cos(2))
    x = torch.zeros(1, 1, 18, 26)
    x[..., 0] = 1                       # channel 0, whose partner is channel 1
    rotated = apply_rope(x, cosine, sine)[0, 0, frame2_patch3]
    assert rotated[:2].tolist() == pytest.approx([np.cos(2), np.sin(2 * 0.1)], abs=1e-6)
    later = rope_table(26, 1, 2, 2, 2, 2, torch.device("cpu"), first_frame=2)
    assert torch.equal(later[0], cosine[12:]) and torch.equal(later[1], sine[12:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision_stays_within_two_percent(outputs, dtype):
    encoder, predictor = (part.to(dtype) for part in tiny())
    clip, states, actions = inputs()
    with torch.no_grad():
        predicted = predictor(outputs["latents"][:, :7 * 16], actions, states[:, :7])
        pairs = [(encoder(clip), outputs["encoder_tubelet"]), (predicted, outputs["predictor"])]
    for half, full in pairs:
        assert half.dtype == dtype
        assert (half.float() - full).norm() / full.norm() < 0.02


@settings(max_examples=20, deadline=None)
@given(t=st.integers(1, 5), which=st.sampled_from(["latents", "actions", "states"]),
       seed=st.integers(0, 99))
def test_a_changed_frame_leaves_earlier_predictions_bit_identical(t, which, seed):
    random = torch.Generator().manual_seed(seed)
    original = {"latents": torch.randn(1, 6, 16, 52, generator=random),
                "actions": torch.randn(1, 6, 7, generator=random),
                "states": torch.randn(1, 6, 7, generator=random)}
    changed = {k: v.clone() for k, v in original.items()}
    changed[which][:, t] += 1
    _, predictor = tiny()
    with torch.no_grad():
        before, after = (predictor(x["latents"].flatten(1, 2), x["actions"], x["states"])
                         .unflatten(1, (6, 16)) for x in (original, changed))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_time_steps_from_a_kv_cache_equal_all_at_once():
    """Predictions and gradients, however many steps each call takes."""
    _, states, actions = inputs()
    z = torch.randn(2, 5, 16, 52, generator=torch.Generator().manual_seed(0))
    found = []
    for calls in ([5], [1, 1, 1, 1, 1], [3, 1, 1], [1, 4], [2, 3]):
        _, predictor = tiny()
        predictor.requires_grad_(True)
        parts, kv_cache, i = [], [], 0
        for n in calls:
            steps = slice(i, i + n)
            parts.append(predictor(z[:, steps].flatten(1, 2), actions[:, steps], states[:, steps],
                                   kv_cache))
            i += n
        out = torch.cat(parts, dim=1)
        out.square().mean().backward()
        grads = [p.grad for p in predictor.parameters() if p.grad is not None]
        found.append((out.detach(), grads))
        assert len(kv_cache) == 3 and kv_cache[0][0].shape[2] == 5 * 18
    for out, grads in found[1:]:
        assert torch.allclose(out, found[0][0], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, found[0][1]))
        assert len(grads) > 30


def test_shapes_that_do_not_fit_are_named():
    encoder, predictor = tiny()
    with pytest.raises(ValueError, match="clip of 3 frames of 64x60 pixels: need multiples of 2"):
        encoder(torch.zeros(1, 3, 3, 64, 60))
    with pytest.raises(ValueError, match="expected 2 x 16 tokens"):
        predictor(torch.zeros(1, 16, 52), torch.zeros(1, 2, 7), torch.zeros(1, 2, 7))
