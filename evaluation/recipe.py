"""Both networks written out a second time, as published, to check the code and the files by.

    h = Recipe().encode(encoder, frames)                        # [2, N, D]
    h = Recipe(bgr="before").encode(encoder, frames)                # if the channels were swapped

Nothing of model.py and vjepa2_src/ is used but their weights, so that a fault there does not hide
here. A recipe can be altered in one thing at a time; `OF_ENCODER` and `of_predictor` list what is
known to go wrong. Sources: arXiv:2506.09985, facebookresearch/vjepa2.
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Recipe:
    """How latents and predictions come about. The defaults are as published."""
    bgr: str = ""               # "before" or "after" mean and std are taken out
    clip: str = ""              # "tubelet": both frames as one; "joint": doubled, in one clip
    rope: str = "tiled"         # or "repeated", "halves" (the two common kinds), "none"
    norm: bool = True           # the LayerNorm without weights
    last_norm: bool = True      # the one with weights that ends each network
    used: Callable = range      # number of blocks -> those that are used,
    doubled: Callable = lambda n: range(0)      # and those whose weights are doubled
    actions: np.ndarray | None = None   # [7, 7] that actions, and states, are multiplied by
    states: np.ndarray | None = None

    def encode(self, encoder, frames):
        """frames [2, H, W, 3] uint8 -> latents [2, N, D] float32."""
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).to(frames.device)
        images = frames.flip(-1) if self.bgr == "before" else frames
        images = (images.float() / 255 - mean) / std
        images = images.flip(-1) if self.bgr == "after" else images
        images = images.permute(3, 0, 1, 2)                                         # [3, 2, H, W]
        clips = {"": images.transpose(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1),
                 "tubelet": images[None], "joint": images.repeat_interleave(2, 1)[None]}[self.clip]
        kernel = encoder.patch_embed.proj.weight                            # [D, 3, 2, 16, 16]
        B, _, T, H, W = clips.shape
        T, rows, cols = T // 2, H // 16, W // 16
        # As a matrix product: a 3-D convolution in half precision is slow on a CPU.
        x = clips.to(kernel.dtype).reshape(B, 3, T, 2, rows, 16, cols, 16)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, T * rows * cols, -1)
        x = F.linear(x, kernel.flatten(1), encoder.patch_embed.proj.bias)
        place = torch.cartesian_prod(*map(torch.arange, (T, rows, cols))).to(x)
        x = self._blocks(x, encoder.blocks, encoder.dim // encoder.head_dim, place)
        x = self._last_norm(x, encoder.norm).float().reshape(B * T, rows * cols, -1)
        return _normed(x if self.clip != "tubelet" else x.expand(2, -1, -1), self.norm)

    def predict(self, predictor, h, actions, state):
        """h [N, D] of one frame, actions [K, 7] from there, state [7] -> [K, N, D] float32."""
        def token(layer, values, change):
            values = np.atleast_2d(values)
            values = values if change is None else values @ change.T
            return layer(torch.as_tensor(values).to(layer.weight))[:, None]         # [K, 1, P]

        K, P = len(actions), predictor.predictor_norm.normalized_shape[0]
        # In any order: places are in the rotations, and within one frame nothing is masked.
        x = torch.cat([token(predictor.action_encoder, actions, self.actions),
                       token(predictor.state_encoder, state, self.states).expand(K, -1, -1),
                       predictor.predictor_embed(h.to(predictor.predictor_embed.weight))
                       .expand(K, -1, -1)], dim=1)
        grid = torch.arange(predictor.grid)
        # Action and state have no row and column.
        place = F.pad(torch.cartesian_prod(torch.arange(1), grid, grid), (0, 0, 2, 0)).to(x)
        x = self._blocks(x, predictor.predictor_blocks, P // predictor.head_dim, place)
        x = predictor.predictor_proj(self._last_norm(x[:, 2:], predictor.predictor_norm))
        return _normed(x.float(), self.norm)

    def _last_norm(self, x, norm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6) if self.last_norm else x

    def _blocks(self, x, blocks, n_heads, place):
        """x [B, L, D] through the blocks; place [L, 3]: frame, row and column of each token."""
        rotate = _rotation(place.float(), x.shape[-1] // n_heads, self.rope)
        n = len(blocks)
        for i in self.used(n):
            w = dict(blocks[i].named_parameters())
            if i in self.doubled(n):
                w = {name: 2 * values for name, values in w.items()}

            def of(name, w=w):
                return w[f"{name}.weight"], w[f"{name}.bias"]

            y = F.layer_norm(x, x.shape[-1:], *of("norm1"), 1e-6)
            qkv = F.linear(y, *of("attn.qkv")).unflatten(-1, (3, n_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # [B, heads, L, d] each
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
            x = x + F.linear(y.transpose(1, 2).flatten(2), *of("attn.proj"))
            y = F.layer_norm(x, x.shape[-1:], *of("norm2"), 1e-6)
            x = x + F.linear(F.gelu(F.linear(y, *of("mlp.fc1"))), *of("mlp.fc2"))
        return x


def _normed(x, wanted):
    if not wanted:
        return x
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def _rotation(place, width, kind):
    """A function that rotates [B, heads, L, width] by the tokens' places [L, 3]."""
    group = 2 * (width // 3 // 2)
    frequency = 10000.0 ** (-torch.arange(group // 2, device=place.device) / (group / 2))
    # Tiled is the quirk of the released weights: the two channels of a pair turn differently.
    repeat = frequency.repeat_interleave if kind == "repeated" else frequency.tile
    angle = (place[:, :, None] * repeat(2) * (kind != "none")).flatten(1)
    cosine, sine = angle.cos(), angle.sin()                                 # [L, 3 * group]

    def rotate(x):
        y = x[..., :3 * group].float()
        if kind == "halves":
            a, b = y.unflatten(-1, (3, 2, -1)).unbind(-2)
            turned = torch.stack([-b, a], dim=-2).flatten(-3)
        else:
            turned = torch.stack([-y[..., 1::2], y[..., 0::2]], dim=-1).flatten(-2)
        return torch.cat([(y * cosine + turned * sine).to(x.dtype), x[..., 3 * group:]], dim=-1)

    return rotate


# Alternatives: (kind, in words, what is changed in the recipe)

NORM, ROPE, BGR, CLIP = "missing layer norm", "common RoPE", "BGR images", "clip-wise encoding"
AXES, DEGREES, HALF = "axes swapped", "angles in degrees", "half of the weights"
EVERYWHERE = [
    (NORM, "without the LayerNorm that follows each network", dict(norm=False)),
    (NORM, "without the networks' own last LayerNorm", dict(last_norm=False)),
    (ROPE, "with each frequency repeated for a pair of channels, not tiled", dict(rope="repeated")),
    (ROPE, "with channels rotated in halves, not in neighbouring pairs", dict(rope="halves")),
    (ROPE, "without any rotary positions", dict(rope="none")),
    # Twice, as halves of an odd number of blocks can be rounded up and down.
    (HALF, "with the first half of the blocks alone", dict(used=lambda n: range(n // 2))),
    (HALF, "with the first half of the blocks alone", dict(used=lambda n: range((n + 1) // 2))),
    (HALF, "with the second half of the blocks alone", dict(used=lambda n: range(n // 2, n))),
    (HALF, "with the second half of the blocks alone", dict(used=lambda n: range((n + 1) // 2, n))),
    (HALF, "with every second block alone", dict(used=lambda n: range(0, n, 2))),
    (HALF, "with every second block alone", dict(used=lambda n: range(1, n, 2))),
    (HALF, "with the first half of the weights doubled", dict(doubled=lambda n: range(n // 2))),
    (HALF, "with the first half of the weights doubled",
     dict(doubled=lambda n: range((n + 1) // 2))),
    (HALF, "with the second half of the weights doubled",
     dict(doubled=lambda n: range(n // 2, n))),
    (HALF, "with the second half of the weights doubled",
     dict(doubled=lambda n: range((n + 1) // 2, n))),
    (HALF, "with all weights of the blocks doubled", dict(doubled=range))]
OF_ENCODER = [
    (BGR, "with the images' channels in the order B, G, R", dict(bgr="before")),
    (BGR, "with the channels reversed after mean and std are taken out", dict(bgr="after")),
    (CLIP, "with both frames as one tubelet", dict(clip="tubelet")),
    (CLIP, "with both frames, each doubled, in one clip", dict(clip="joint")), *EVERYWHERE]


def signed_axes():
    """[(words, [3, 3] matrix)]: exchanges and signs of x, y and z, but for none at all. The 12
    exchanges alone and signs alone come first: they are more likely than both at once."""
    changes = sorted(product(permutations(range(3)), product((1, -1), repeat=3)),
                     key=lambda change: (change[0] != (0, 1, 2)) + (change[1] != (1, 1, 1)))
    return [("(" + ", ".join("-"[s > 0:] + "xyz"[i] for i, s in zip(axes, signs))
             + ") in place of (x, y, z)", np.diag(signs) @ np.eye(3)[list(axes)])
            for axes, signs in changes[1:]]


def _with_turns(turns, rotation):
    """Changes of all seven columns; rotation: whether that of poses is changed as positions are."""
    for words, turn in turns:
        change = np.eye(7)
        change[:3, :3] = turn
        change[3:6, 3:6] = turn if rotation else np.eye(3)
        yield AXES, words + " and their angles likewise" * rotation, change


def of_predictor():
    """Alternatives in two lists: the second, of axes in stranger orders, is only for where nothing
    of the first fits."""
    simple, strange = [], []
    for factor, words in ((180 / np.pi, "180/π"), (np.pi / 180, "π/180")):
        turned = np.diag([1, 1, 1, factor, factor, factor, 1])
        simple += [(DEGREES, f"angles times {words}", turned),
                   (DEGREES, f"all numbers times {words}", factor * np.eye(7))]
    for columns, words in (((6, 0, 1, 2, 3, 4, 5), "the gripper first"),
                           ((3, 4, 5, 0, 1, 2, 6), "angles before positions")):
        simple.append((AXES, words, np.eye(7)[list(columns)]))
    turns = signed_axes()
    simple += [*_with_turns(turns[:12], False), *_with_turns(turns[:12], True)]
    strange += [*_with_turns(turns[12:], False), *_with_turns(turns[12:], True)]
    lists = [[(kind, f"with {words} in {' and '.join(what)}", dict.fromkeys(what, change))
              for kind, words, change in changes
              for what in (("states",), ("actions",), ("actions", "states"))]
             for changes in (simple, strange)]
    return [EVERYWHERE + lists[0], lists[1]]
