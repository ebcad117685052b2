"""evaluation/check.py names each fault, built in once in the code or the file, and no other."""
import numpy as np
import pytest
import torch
from test_check import EXPECTED, few_alternatives, files, run, write, write_expected  # noqa: F401

import model
import vjepa2_src
from episodes import poses
from evaluation import diagnosis, recipe
from evaluation.recipe import AXES, BGR, CLIP, DEGREES, HALF, NORM, ROPE, Recipe
from vjepa2_src import blocks


pytestmark = pytest.mark.usefixtures("few_alternatives")
KINDS = [AXES, BGR, CLIP, DEGREES, HALF, NORM, ROPE]
SWAP_XZ, SWAP_XY = [2, 1, 0, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6]
DEGREE = 180 / np.pi


def named(out):
    """The kinds of faults that a report names."""
    assert "DEVIATES" in out and "These are" not in out
    return [kind for kind in KINDS if kind in out]


# In the code: name -> what is put in its place, with the original as the first argument

def common_rope(original, *args, **kwargs):
    """Each frequency for both channels of a pair."""
    cosine, sine = original(*args, **kwargs)
    group = 2 * (args[0] // 3 // 2)
    order = torch.arange(cosine.shape[1])
    for axis in range(3):
        order[axis * group:][:group] = axis * group + torch.arange(group // 2).repeat_interleave(2)
    sign = 1 - 2.0 * (torch.arange(cosine.shape[1]) % 2 == 0)
    return cosine[:, order], (sine * sign)[:, order] * sign


def rotated_halves(x):
    """For swap_pairs, of tiled frequencies and signed sines: channels turned as in other models."""
    group = 2 * (x.shape[-1] // 3 // 2)
    y, rest = x[..., :3 * group], x[..., 3 * group:]
    a, b = y.unflatten(-1, (3, 2, -1)).unbind(-2)
    sign = 1 - 2.0 * (torch.arange(3 * group) % 2 == 0)         # the sines have these
    return torch.cat([torch.stack([-b, a], dim=-2).flatten(-3) * sign, rest], dim=-1)


def with_half_of_the_blocks(original, self, *args):
    whole = self.predictor_blocks
    self.predictor_blocks = whole[:2]
    try:
        return original(self, *args)
    finally:
        self.predictor_blocks = whole


def poses_changed(actions, states):
    def forward(original, self, z, a, s, kv_cache=None):
        return original(self, z, actions(a), states(s), kv_cache)
    return forward


def as_degrees(poses):
    return poses * torch.tensor([1, 1, 1, DEGREE, DEGREE, DEGREE, 1])


def one_tubelet(original, self, frames):
    return original(self, frames, per_frame=False)


def joint_clip(original, self, frames):
    return original(self, frames.repeat_interleave(2, dim=2), per_frame=False)


def same(x):
    return x


ENCODE = [(model.WorldModel, "encode")]
PREDICT = [(vjepa2_src.Predictor, "forward")]
IN_CODE = {
    "no layer norm": (NORM, [(model, "layer_norm")], lambda original, x: x.float()),
    "other norm": (NORM, [(model, "layer_norm")], lambda original, x: x.float().tanh()),
    "BGR": (BGR, ENCODE, lambda original, self, frames: original(self, frames.flip(1))),
    "BGR after the mean": (BGR, [(vjepa2_src.Encoder, "forward")],
                           lambda original, self, clip: original(self, clip.flip(1))),
    "one tubelet": (CLIP, ENCODE, one_tubelet),
    "one tubelet, twice": (CLIP, ENCODE, lambda *args: one_tubelet(*args).expand(-1, 2, -1, -1)),
    "one clip": (CLIP, ENCODE, joint_clip),
    "common RoPE": (ROPE, [(vjepa2_src.encoder, "rope_table"),
                           (vjepa2_src.predictor, "rope_table")], common_rope),
    "RoPE in halves": (ROPE, [(blocks, "swap_pairs")], lambda original, x: rotated_halves(x)),
    "states in degrees": (DEGREES, PREDICT, poses_changed(same, as_degrees)),
    "true action in degrees": (DEGREES, [(poses, "pose_deltas")],
                               lambda original, s: original(s) * [1, 1, 1, *[DEGREE] * 3, 1]),
    "x and z": (AXES, PREDICT, poses_changed(lambda a: a[..., SWAP_XZ], lambda s: s[..., SWAP_XZ])),
    "-y of states": (AXES, PREDICT, poses_changed(
        same, lambda s: s * torch.tensor([1, -1, 1, 1, 1, 1, 1]))),
    "true action's x and y": (AXES, [(poses, "pose_deltas")],
                              lambda original, s: original(s)[..., SWAP_XY]),
    "some blocks": (HALF, PREDICT, with_half_of_the_blocks),
}


@pytest.mark.parametrize("fault", IN_CODE)
def test_faults_in_the_code_are_named(files, monkeypatch, capsys, fault):    # noqa: F811
    kind, places, change = IN_CODE[fault]
    for owner, name in places:
        original = getattr(owner, name)

        def changed(*args, original=original, **kwargs):
            return change(original, *args, **kwargs)

        monkeypatch.setattr(owner, name, changed)
    assert not run(*files)
    out = capsys.readouterr().out
    assert named(out) == [kind], out
    assert "The code computes with this file as published" not in out


@pytest.mark.parametrize("part", ["random", "missing"])
def test_weights_that_are_not_loaded_are_named(files, monkeypatch, capsys, part):    # noqa: F811
    load = model.load

    def load_part(*args, **kwargs):
        encoder, predictor = load(*args, **kwargs)
        if part == "missing":
            encoder.blocks = encoder.blocks[:1]
        else:
            random = torch.Generator().manual_seed(0)
            for parameter in encoder.blocks[1].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        return encoder, predictor

    monkeypatch.setattr(model, "load", load_part)
    assert not run(*files)
    out = capsys.readouterr().out
    assert named(out) == [HALF]
    assert "12 of 76 tensors in memory are missing or not those of the file" in out
    assert "encoder.blocks.1.norm1.weight" in out


def test_axes_in_a_strange_order_are_found(files, monkeypatch, capsys):    # noqa: F811
    """By the second list, as nothing of the first fits; the angles go along."""
    strange = [one for one in recipe.of_predictor()[1] if "in states" in one[1]]
    lists = [diagnosis.of_predictor()[0], strange]
    monkeypatch.setattr(diagnosis, "of_predictor", lambda: lists)
    forward, turn = vjepa2_src.Predictor.forward, [1, 2, 0, 4, 5, 3, 6]
    sign = torch.tensor([1, -1, 1, 1, -1, 1, 1])
    monkeypatch.setattr(vjepa2_src.Predictor, "forward", lambda self, z, a, s, kv_cache=None:
                        forward(self, z, a, s[..., turn] * sign, kv_cache))
    assert not run(*files)
    out = capsys.readouterr().out
    assert named(out) == [AXES]
    assert "with (y, -z, x) in place of (x, y, z) and their angles likewise in states." in out


def test_a_fault_that_is_not_known_is_not_given_a_name(files, monkeypatch, capsys):    # noqa: F811
    """In the predictor, in energies, in the encoder."""
    forward = vjepa2_src.blocks.MLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(vjepa2_src.blocks.MLP, "forward", lambda self, x: -forward(self, x))
        assert not run(*files)
    out = capsys.readouterr().out
    assert named(out) == [] and "encoder: the code differs from the recipe by" in out
    with monkeypatch.context() as patch:
        patch.setattr(model.WorldModel, "distances",
                      lambda self, z, h: (z - h).square().flatten(1).mean(1, keepdim=True))
        assert not run(*files)
    out = capsys.readouterr().out
    assert named(out) == [] and "gives other energies than the recipe" in out


def test_overflow_is_said(files, monkeypatch, capsys):    # noqa: F811
    monkeypatch.setattr(model, "layer_norm", lambda x: x.float() * np.inf)
    assert not run(*files)
    assert "not finite" in capsys.readouterr().out


# In the file

def columns(*names, order=None, factor=None):
    def change(encoder, predictor):
        for name in names:
            weight = predictor[f"{name}.weight"]
            if order:
                weight[:] = weight[:, order].clone()
            if factor:
                weight[:, 3:6] *= factor
    return change


def of_block(part, change):
    """change(name, tensor) on each tensor of one block of the encoder (0) or the predictor (1)."""
    def change_all(*states):
        for name, tensor in states[part].items():
            if name.startswith(("blocks.1.", "predictor_blocks.2.")):
                change(name, tensor)
    return change_all


def reverse_channels(encoder, predictor):
    kernel = encoder["patch_embed.proj.weight"]
    kernel[:] = kernel.flip(1).clone()


def initialise(name, tensor):
    if tensor.ndim == 1:
        tensor.fill_("norm" in name and name.endswith("weight"))
    else:
        tensor.normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def shuffle(name, tensor):
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    tensor[:] = tensor.flatten()[order].view_as(tensor).clone()


IN_FILE = {
    "channels": (BGR, reverse_channels),
    "x and z of actions": (AXES, columns("action_encoder", order=SWAP_XZ)),
    "x and y": (AXES, columns("action_encoder", "state_encoder", order=SWAP_XY)),
    "degrees": (DEGREES, columns("state_encoder", factor=DEGREE)),
    "zero block": (HALF, of_block(0, lambda name, tensor: tensor.zero_())),
    "zero block of the predictor": (HALF, of_block(1, lambda name, tensor: tensor.zero_())),
    "untrained block": (HALF, of_block(0, initialise)),
    "every second value": (HALF, of_block(0, lambda name, tensor: tensor.view(-1)[::2].zero_())),
    "halved block": (HALF, of_block(0, lambda name, tensor: tensor.mul_(0.5))),
    "larger block": (HALF, of_block(0, lambda name, tensor: tensor.mul_(3))),
    "block of another file": (HALF, of_block(0, shuffle)),
}


@pytest.mark.parametrize("fault", IN_FILE)
def test_faults_in_the_file_are_named(files, tmp_path, capsys, fault):    # noqa: F811
    kind, change = IN_FILE[fault]
    assert not run(write(tmp_path / "base.pt", change), files[1])
    out = capsys.readouterr().out
    assert named(out) == [kind], out
    assert "The code computes with this file as published" in out
    assert ("hold zeros or other constants" in out) == fault.startswith(("zero", "untr", "every"))


@pytest.mark.parametrize("kind, changes, in_both", [
    (NORM, dict(norm=False), True), (ROPE, dict(rope="repeated"), True),
    (CLIP, dict(clip="joint"), False),
    (BGR, dict(bgr="before"), False)])
def test_expected_values_that_were_made_wrongly(
        files, tmp_path, capsys, monkeypatch, kind, changes, in_both):    # noqa: F811
    """The hint is the same: what gives the expected values."""
    found = {}
    monkeypatch.setattr(diagnosis, "of_file", lambda given, values: found.update(
        diagnosis.by_recipe(given, Recipe(**changes).encode(given.world.encoder, given.frames),
                            changes if in_both else None)) or ["off"])
    assert not run(files[0], write_expected(tmp_path / "off.json", EXPECTED | {"copy": 0}))
    monkeypatch.undo()
    assert not run(files[0], write_expected(tmp_path / "wrong.json", EXPECTED | found))
    assert named(capsys.readouterr().out.split("DEVIATES: off")[1]) == [kind]


def test_all_that_fits_is_named_and_two_faults_are_two():
    """Of alternatives that are equally good none is left out."""
    lists = [[("a", "1", 0.5), ("b", "2", 0.9), ("c", "3", 1.1)], [("d", "4", 0.0)]]
    assert [kind for kind, *_ in diagnosis._try(lists, float, equal=0.95)] == ["a", "b"]
    one_better = [[("a", "1", 0.01), ("b", "2", 0.9)]]
    assert [kind for kind, *_ in diagnosis._try(one_better, float)] == ["a"]
    assert diagnosis._try([[("a", "1", float("nan"))], [("b", "2", 2.0)]], float) == []
    fits = [("a", "1", {}), ("a", "1", {}), ("b", "2", {}), ("a", "3", {})]
    assert diagnosis._hint(fits, "so") == "a: so 1 or 3; or b: so 2."
