"""The networks equal the official ones, the files of both layouts are read strictly, the losses are the paper's."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import FIGURES, LOSSES, SHARED, inputs, tiny
from safetensors.torch import save_file
from small import interpret

import model
from vjepa2_src.blocks import Heads, polynomial_gelu, rope_table, rotate


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


@pytest.mark.parametrize("rollout", [2, 3])
def test_losses_equal_the_official_ones(outputs, rollout):
    _, states, actions = inputs()
    actions = torch.cat([actions, torch.full((2, 1, 7), 99.0)], dim=1)  # the last action must not matter
    world = model.WorldModel(*tiny())
    losses = world.losses(outputs["latents"].unflatten(1, (8, 16)), actions, states, rollout)
    assert losses["teacher_forcing"].item() == pytest.approx(LOSSES["teacher_forcing"], abs=1e-6)
    assert losses["rollout"].item() == pytest.approx(LOSSES[rollout], abs=1e-6)
    alone = world.losses(outputs["latents"].unflatten(1, (8, 16)), actions, states, 0)
    assert alone["rollout"] == 0 and alone["teacher_forcing"] == losses["teacher_forcing"]


def test_full_size_names_shapes_and_counts():
    encoder, predictor = model._empty("vitg")                           # on the meta device
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
        patch_size=16, crop_size=64, tubelet_size=2, hidden_size=size["encoder_dim"], mlp_ratio=48 / 11,
        num_attention_heads=size["encoder_heads"], num_hidden_layers=size["encoder_depth"],
        attn_implementation="eager")).eval()
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
    """Channels turn in pairs (0,1), (2,3) …, but frequencies are tiled, so a pair's two angles differ."""
    cosine, sine = rope_table(26, 3, 2, 2, 2, 2, torch.device("cpu"))   # groups of 8, 2 channels left over
    frame2_patch3 = 2 * 4 + 3                                           # row 1, column 1
    frequency = 10000.0 ** (-np.arange(4) / 4)
    for axis, index in enumerate((2, 1, 1)):
        angles = index * np.concatenate([frequency, frequency])
        assert cosine[frame2_patch3, 8 * axis:8 * axis + 8].numpy() == pytest.approx(np.cos(angles), abs=1e-6)
    assert (cosine[:, 24:] == 1).all() and (sine[:, 24:] == 0).all()
    action_of_frame2 = 3 * 4 + 2 * 2                                    # behind all patches
    assert (cosine[action_of_frame2, 8:] == 1).all() and cosine[action_of_frame2, 0] == pytest.approx(np.cos(2))
    x = torch.zeros(1, 1, 18, 26)
    x[..., 0] = 1                                                       # only channel 0, whose partner is 1
    turned = rotate(x, (cosine, sine))[0, 0, frame2_patch3]
    assert turned[:2].tolist() == pytest.approx([np.cos(2), np.sin(2 * 0.1)], abs=1e-6)
    later = rope_table(26, 1, 2, 2, 2, 2, torch.device("cpu"), first=2)
    assert all(torch.equal(one, torch.cat([every[8:12], every[16:18]])) for one, every in zip(later, (cosine, sine)))


def test_the_gradient_of_turned_heads_is_that_of_the_rotation():
    random = torch.Generator().manual_seed(0)
    table, qkv = rope_table(26, 3, 2, 2, 2, 2, torch.device("cpu")), torch.randn(2, 18, 3, 2, 26, generator=random)
    d = torch.randn(3, 2, 2, 18, 26, generator=random)
    found = []
    for split in (lambda x: Heads.apply(x, *table), lambda x: [f(y) for f, y in zip((lambda y: rotate(y, table),) * 2 + (torch.clone,), x.permute(2, 0, 3, 1, 4))]):
        leaf = qkv.clone().requires_grad_()
        parts = split(leaf)
        sum((part * own).sum() for part, own in zip(parts, d)).backward()
        found.append([*(part.detach() for part in parts), leaf.grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision_stays_within_two_percent(outputs, dtype):
    encoder, predictor = (part.to(dtype) for part in tiny())
    clip, states, actions = inputs()
    with torch.no_grad():
        pairs = [(encoder(clip), outputs["encoder_tubelet"]),
                 (predictor(outputs["latents"][:, :7 * 16], actions, states[:, :7]), outputs["predictor"])]
    for half, full in pairs:
        assert half.dtype == dtype
        assert (half.float() - full).norm() / full.norm() < 0.02


def test_autocast_on_half_precision_weights(outputs):
    """As training runs: frozen bf16 weights under autocast; losses come out in fp32."""
    world = model.WorldModel(*(part.to(torch.bfloat16) for part in tiny()))
    _, states, actions = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = world.losses(outputs["latents"].unflatten(1, (8, 16))[:, :7], actions, states[:, :7])
    assert losses["rollout"].dtype == torch.float32
    assert losses["rollout"].item() == pytest.approx(LOSSES[2], rel=0.02)


@settings(max_examples=20, deadline=None)
@given(t=st.integers(1, 5), which=st.sampled_from(["latents", "actions", "states"]), seed=st.integers(0, 99))
def test_a_changed_frame_leaves_earlier_predictions_bit_identical(t, which, seed):
    random = torch.Generator().manual_seed(seed)
    given_ = {"latents": torch.randn(1, 6, 16, 52, generator=random), "actions": torch.randn(1, 6, 7, generator=random),
              "states": torch.randn(1, 6, 7, generator=random)}
    changed = {k: v.clone() for k, v in given_.items()}
    changed[which][:, t] += 1
    _, predictor = tiny()
    with torch.no_grad():
        before, after = (predictor(x["latents"].flatten(1, 2), x["actions"], x["states"]).unflatten(1, (6, 16))
                         for x in (given_, changed))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_encode_normalises_and_encodes_each_frame_alone():
    world = model.WorldModel(*tiny())
    frames = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h = world.encode(frames)
    assert h.shape == (2, 4, 16, 52) and h.dtype == torch.float32 and not h.requires_grad
    assert torch.allclose(h.mean(-1), torch.zeros(2, 4, 16), atol=1e-5)
    assert torch.allclose(h[1, 2], world.encode(frames[1:, :, 2:3])[0, 0], atol=1e-5)
    red = (frames[0, 0, 0] / 255 - 0.485) / 0.229                       # ImageNet's mean and deviation, RGB
    blue = (frames[0, 2, 0] / 255 - 0.406) / 0.225
    green = (frames[0, 1, 0] / 255 - 0.456) / 0.224
    clip = torch.stack([red, green, blue])[None, :, None].expand(-1, -1, 2, -1, -1)
    assert torch.allclose(h[:1, 0], model.layer_norm(world.encoder(clip)), atol=1e-5)
    assert world.encode(frames, per_frame=False).shape == (2, 2, 16, 52)


def test_activation_checkpointing_changes_no_gradient():
    _, states, actions = inputs()
    grads = []
    for checkpointing in (False, True):
        encoder, predictor = tiny()
        predictor.requires_grad_(True).activation_checkpointing = checkpointing
        h = torch.randn(2, 7, 16, 52, generator=torch.Generator().manual_seed(0))
        sum(model.WorldModel(encoder, predictor).losses(h, actions, states[:, :7]).values()).backward()
        grads.append([p.grad for p in predictor.parameters() if p.grad is not None])
    assert len(grads[0]) > 30 and all(torch.equal(a, b) for a, b in zip(*grads))


# Reading checkpoints

def layouts(folder):
    """The same weights as the released layout, other prefixes, flat, and safetensors."""
    encoder, predictor = (part.state_dict() for part in tiny())
    released = {"opt": {"state": {}}, "scaler": None, "epoch": 315, "loss": 0.4, "batch_size": 8, "world_size": 32, "lr": 1e-4}
    for name, (of_encoder, of_predictor) in {"module": ("module.",) * 2, "backbone": ("module.backbone.", "module."),
                                             "bare": ("", "")}.items():
        parts = {"encoder": {of_encoder + k: v for k, v in encoder.items()},
                 "predictor": {of_predictor + k: v for k, v in predictor.items()}}
        torch.save(parts | {"target_encoder": parts["encoder"]} | released, folder / f"{name}.pt")
    flat = {f"encoder.{k}": v for k, v in encoder.items()} | {f"predictor.{k}": v for k, v in predictor.items()}
    torch.save(flat, folder / "flat.pt")
    save_file(flat, folder / "slim.safetensors")


def test_every_layout_loads_the_same_weights(tmp_path):
    layouts(tmp_path)
    expected = [part.state_dict() for part in tiny()]
    files = sorted(tmp_path.iterdir()) + [p for p in [SHARED / "parity/tiny_official.pt"] if p.exists()]
    assert len(files) >= 5
    fingerprints = set()
    for path in files:
        for dtype in (torch.float32, torch.bfloat16):
            parts = model.load(path, "tiny", dtype)
            fingerprints.add(parts[0].base_fingerprint)
            for part, state in zip(parts, expected):
                assert all(torch.equal(v, state[k].to(dtype)) for k, v in part.state_dict().items())
                assert not any(p.requires_grad for p in part.parameters())
    assert len(fingerprints) == 1
    encoder, predictor = tiny()
    other = model.fingerprint(model._full_names(encoder.state_dict(), model.build("tiny")[1].state_dict()))
    assert other not in fingerprints


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def spoil(what, path):
    torch.manual_seed(0)
    file = torch.load(path, weights_only=True)
    predictor = file["predictor"]
    if what == "missing name":
        del predictor["predictor_blocks.1.mlp.fc1.weight"]
    elif what == "unexpected name":
        predictor["predictor_blocks.9.mlp.fc1.weight"] = torch.zeros(3)
    elif what == "wrong shape":
        predictor["predictor_embed.bias"] = torch.zeros(61)
    elif what == "no predictor":
        del file["predictor"]
    elif what == "pickle with code":
        file["epoch"] = Code()
    elif what == "another file":
        file = {"weights": [1, 2, 3]}
    torch.save(file, path)
    if what.startswith("cut"):
        with open(path, "r+b") as out:
            out.truncate(int(path.stat().st_size * float(what.split()[1])))


@pytest.mark.parametrize("what, says", {
    "missing name": "1 missing (predictor.predictor_blocks.1.mlp.fc1.weight)",
    "unexpected name": "1 unexpected (predictor.predictor_blocks.9.mlp.fc1.weight)",
    "wrong shape": "predictor.predictor_embed.bias [61] instead of [60]",
    "no predictor": "predictor_embed.weight",
    "pickle with code": "Python objects",
    "another file": "not a V-JEPA 2-AC checkpoint",
    "cut 0.99": "download it again", "cut 0.5": "download it again", "cut 0.001": "download it again",
    "cut 0": "download it again",
}.items())
def test_a_bad_checkpoint_is_named_in_one_line(tmp_path, capsys, what, says):
    layouts(tmp_path)
    path = tmp_path / "bare.pt"
    spoil(what, path)
    with pytest.raises(ValueError) as error:
        model.load(path, "tiny")
    message = str(error.value)
    assert str(path) in message and says in message and "\n" not in message
    assert "must not run" not in capsys.readouterr().out


def test_other_checkpoint_mistakes(tmp_path):
    layouts(tmp_path)
    with pytest.raises(ValueError, match="https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt"):
        model.load(tmp_path / "absent.pt", "vitg")
    with pytest.raises(ValueError, match="--model.size=vitg"):
        model.load(tmp_path / "bare.pt", "vitg")
    with pytest.raises(ValueError, match="choose from vitg, tiny"):
        model.load(tmp_path / "bare.pt", "vith")
    with pytest.raises(ValueError, match="unknown.*depth"):
        model.build(model.SIZES["tiny"] | {"depth": 3})
    (tmp_path / "slim.safetensors").write_bytes((tmp_path / "slim.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="slim.safetensors.*copy it again"):
        model.load(tmp_path / "slim.safetensors", "tiny")


def test_loading_takes_the_memory_of_the_wanted_weights_only(tmp_path):
    """A file with fp32 weights, their copy and optimizer states, read to bf16: a sixth of its size."""
    pytest.importorskip("resource")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    args = ["--model.size={encoder_dim: 512, encoder_depth: 12, encoder_heads: 8, predictor_dim: 256, predictor_depth: 4, "
            "predictor_heads: 4, image_size: 64}", f"--file={tmp_path / 'big.pt'}"]

    def bench(command):
        result = subprocess.run([sys.executable, "bench_more.py", command, *args], capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])

    result = bench("load")
    assert result["file_gib"] > 0.3
    assert result["peak_anonymous_gib"] < 1.3 * result["weights_gib"]
    assert bench("slim")["peak_anonymous_gib"] < 0.7 * result["weights_gib"]        # tensor by tensor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_time_steps_one_by_one_from_memory_equal_all_at_once(checkpointing):
    """Predictions and gradients, however many steps were computed at first."""
    _, states, actions = inputs()
    z = torch.randn(2, 5, 16, 52, generator=torch.Generator().manual_seed(0))
    found = []
    for first in (5, 1, 3):
        _, predictor = tiny()
        predictor.requires_grad_(True).activation_checkpointing = checkpointing
        parts, memory = [], None
        for i, j in [(0, first), *((t, t + 1) for t in range(first, 5))]:
            out, memory = predictor.remember(z[:, i:j].flatten(1, 2), actions[:, i:j], states[:, i:j], memory, keep=j)
            parts.append(out)
        out = torch.cat(parts, dim=1)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad for p in predictor.parameters() if p.grad is not None]))
    for out, grads in found[1:]:
        assert torch.allclose(out, found[0][0], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, found[0][1])) and len(grads) > 30


def test_a_rollout_after_a_memory_of_one_step_sees_nothing_later():
    """Of five steps the first is remembered; then a step of the model's own follows."""
    _, states, actions = inputs()
    z = torch.randn(2, 5, 16, 52, generator=torch.Generator().manual_seed(0))
    _, predictor = tiny()
    with torch.no_grad():
        _, memory = predictor.remember(z.flatten(1, 2), actions[:, :5], states[:, :5], keep=1)
        own = torch.randn(2, 16, 52, generator=torch.Generator().manual_seed(1))
        after, _ = predictor.remember(own, actions[:, 1:2], states[:, 1:2], memory)
        whole = predictor(torch.cat([z[:, 0], own], dim=1), actions[:, :2], states[:, :2])
    assert torch.allclose(after, whole[:, 16:], atol=1e-5)


def test_polynomial_gelu():
    x = torch.linspace(-12, 12, 10001, dtype=torch.float64)
    assert (polynomial_gelu(x.float()) - F.gelu(x)).abs().max() < 1e-6
    half = x.to(torch.bfloat16)
    assert polynomial_gelu(half).dtype == torch.bfloat16 and (polynomial_gelu(half) - F.gelu(half)).abs().max() <= 2 ** -9


KERNELS = """
import torch, torch.nn.functional as F
from vjepa2_src.attention import first_steps, step_causal_attention
from vjepa2_src.blocks import causal_mask
for B, H, T, N, d, seen in ((2, 2, 3, 32, 16, 0), (1, 1, 1, 16, 32, 0), (1, 2, 17, 16, 16, 0), (1, 1, 2, 128, 64, 0),
                            (2, 1, 4, 16, 16, 3), (1, 2, 19, 16, 16, 2), (1, 1, 18, 16, 16, 17)):
    torch.manual_seed(0)
    L = T * (N + 2)
    rows = torch.cat([torch.arange(seen * N, T * N), torch.arange(T * N + seen * 2, L)])    # queries of the steps after `seen`
    mask, found = causal_mask(T, N, 2, torch.device("cpu")), []
    qkv, d_out = torch.randn(B, L, 3, H, d), torch.randn(B, len(rows), H, d).transpose(1, 2)
    keep = T // 2
    d_first = torch.randn(2, B, H, keep * (N + 2), d)
    for kernels in (False, True):
        leaf = qkv.clone().requires_grad_()
        q, k, v = (x * 1 for x in leaf.permute(2, 0, 3, 1, 4))                      # [B, H, L, d] each
        if kernels:
            out, _, *first = step_causal_attention(q[:, :, rows], k, v, T, N, keep)
        else:
            out, first = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask[rows]), [first_steps(x, T, N, keep) for x in (k, v)]
        torch.autograd.backward([out, *first], [d_out, *d_first])
        found.append((out.detach(), leaf.grad))
    print(max((a - b).abs().max().item() for a, b in zip(*found)))
"""


def test_the_kernels_of_attention_equal_the_dense_mask():
    """Outputs and gradients, in Triton's interpreter; 17 steps have more condition tokens than one block."""
    errors = [float(word) for word in interpret(KERNELS)]
    assert len(errors) == 7 and max(errors) < 1e-5
