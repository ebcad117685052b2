"""The world model: losses are the paper's, frames are encoded alone, files are read strictly."""
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import model
from files import weights
from parity import LOSSES, SHARED, inputs, tiny


@pytest.fixture(scope="module")
def latents():
    """Of the parity inputs: [2, 8, 16, 52]."""
    encoder, _ = tiny()
    clip, _, _ = inputs()
    with torch.no_grad():
        frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        return model.layer_norm(encoder(frames).unflatten(0, (2, 8)))


@pytest.mark.parametrize("rollout", [2, 3])
def test_losses_equal_the_official_ones(latents, rollout):
    _, states, actions = inputs()
    # the last action must not matter
    actions = torch.cat([actions, torch.full((2, 1, 7), 99.0)], dim=1)
    world = model.WorldModel(*tiny())
    losses = world.losses(latents, actions, states, rollout)
    assert losses["teacher_forcing"].item() == pytest.approx(LOSSES["teacher_forcing"], abs=1e-6)
    assert losses["rollout"].item() == pytest.approx(LOSSES[rollout], abs=1e-6)
    alone = world.losses(latents, actions, states, 0)
    assert alone["rollout"] == 0 and alone["teacher_forcing"] == losses["teacher_forcing"]
    with pytest.raises(ValueError, match="rollout 8 needs more than 8 frames, the clip has 8"):
        world.losses(latents, actions, states, 8)


def test_autocast_on_half_precision_weights(latents):
    """As training runs: frozen bf16 weights under autocast; losses come out in fp32."""
    world = model.WorldModel(*(part.to(torch.bfloat16) for part in tiny()))
    _, states, actions = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = world.losses(latents[:, :7], actions, states[:, :7])
    assert losses["rollout"].dtype == torch.float32
    assert losses["rollout"].item() == pytest.approx(LOSSES[2], rel=0.02)


def test_encode_normalises_and_encodes_each_frame_alone():
    world = model.WorldModel(*tiny())
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8, generator=random)
    h = world.encode(frames)
    assert h.shape == (2, 4, 16, 52) and h.dtype == torch.float32 and not h.requires_grad
    assert torch.allclose(h.mean(-1), torch.zeros(2, 4, 16), atol=1e-5)
    assert torch.allclose(h[1, 2], world.encode(frames[1:, :, 2:3])[0, 0], atol=1e-5)
    # ImageNet's mean and standard deviation, RGB
    red = (frames[0, 0, 0] / 255 - 0.485) / 0.229
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
        predictor.requires_grad_(True)
        if checkpointing:
            model.checkpoint_activations(predictor)
        h = torch.randn(2, 7, 16, 52, generator=torch.Generator().manual_seed(0))
        losses = model.WorldModel(encoder, predictor).losses(h, actions, states[:, :7])
        sum(losses.values()).backward()
        grads.append([p.grad for p in predictor.parameters() if p.grad is not None])
    assert len(grads[0]) > 30 and all(torch.equal(a, b) for a, b in zip(*grads))


# Reading checkpoints

def layouts(folder):
    """The same weights as the released layout, other prefixes, flat, and safetensors."""
    encoder, predictor = (part.state_dict() for part in tiny())
    released = {"opt": {"state": {}}, "scaler": None, "epoch": 315, "loss": 0.4, "batch_size": 8,
                "world_size": 32, "lr": 1e-4}
    prefixes = {"module": ("module.", "module."), "backbone": ("module.backbone.", "module."),
                "bare": ("", "")}
    for name, (of_encoder, of_predictor) in prefixes.items():
        parts = {"encoder": {of_encoder + k: v for k, v in encoder.items()},
                 "predictor": {of_predictor + k: v for k, v in predictor.items()}}
        torch.save(parts | {"target_encoder": parts["encoder"]} | released, folder / f"{name}.pt")
    flat = model.flat_names(encoder, predictor)
    torch.save(flat, folder / "flat.pt")
    save_file(flat, folder / "slim.safetensors")


def test_every_layout_loads_the_same_weights(tmp_path):
    layouts(tmp_path)
    expected = [part.state_dict() for part in tiny()]
    official = SHARED / "parity/tiny_official.pt"
    files = sorted(tmp_path.iterdir()) + [official] * official.exists()
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
    other = model.flat_names(encoder.state_dict(), model.build("tiny")[1].state_dict())
    assert weights.fingerprint(other) not in fingerprints


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
    "cut 0.99": "download it again", "cut 0.5": "download it again",
    "cut 0.001": "download it again", "cut 0": "download it again",
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
    slim = tmp_path / "slim.safetensors"
    slim.write_bytes(slim.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="slim.safetensors.*copy it again"):
        model.load(tmp_path / "slim.safetensors", "tiny")


def test_loading_takes_the_memory_of_the_wanted_weights_only(tmp_path):
    """Of a file with fp32 weights, a copy and optimizer states to bf16: a sixth of its size."""
    pytest.importorskip("resource")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    args = ["--model.size={encoder_dim: 512, encoder_depth: 12, encoder_heads: 8, "
            "predictor_dim: 256, predictor_depth: 4, predictor_heads: 4, image_size: 64}",
            f"--file={tmp_path / 'big.pt'}"]

    def bench(command):
        result = subprocess.run([sys.executable, "-m", "bench.measure", command, *args],
                                capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])

    result = bench("load")
    assert result["file_gib"] > 0.3
    assert result["peak_anonymous_gib"] < 1.3 * result["weights_gib"]
    # tensor by tensor
    assert bench("slim")["peak_anonymous_gib"] < 0.7 * result["weights_gib"]
