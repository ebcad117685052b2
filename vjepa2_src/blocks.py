"""What the encoder and the predictor share: 3-D rotary positions, attention, the transformer block.

Capitals are sizes: B clips, T time steps, L tokens, H heads, D width, d width of a head. Module
attribute names are the released checkpoint's.
Source of the maths: arXiv:2506.09985 and facebookresearch/vjepa2 (MIT).
"""
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F


@lru_cache(maxsize=64)
def rope_table(head_dim, frames, rows, cols, train_grid, n_cond, device, first_frame=0):
    """Cosines and signed sines that rotate queries and keys by their place in the video.

    A head's channels fall into three groups of `2 * (head_dim // 3 // 2)`, rotated by frame, row
    and column index; the channels left over stay as they are. The tokens of one frame are `n_cond`
    condition tokens, rotated by the frame index alone, then rows × cols patches. Row and column
    indices are scaled to the `train_grid` of patches per side that the weights were trained on.
    Returns two [frames * (n_cond + rows * cols), head_dim] float32 tensors, made once per shape.

    A quirk that the released weights need: channels rotate in neighbouring pairs (0,1), (2,3) …,
    yet the frequencies are tiled [f0 … fn, f0 … fn], so the two channels of a pair rotate by
    different angles. (The usual layout repeats each frequency for both: [f0, f0, f1, f1 …].)
    """
    group = 2 * (head_dim // 3 // 2)
    # The table is cached, and tensors made under inference_mode cannot be saved for backward.
    with torch.inference_mode(False):
        frequency = 10000.0 ** (-torch.arange(group // 2, device=device) / (group / 2))
        frequency = frequency.tile(2)                                               # [group]
        place = torch.zeros(frames, n_cond + rows * cols, 3, device=device)     # frame, row, column
        place[:, :, 0] = torch.arange(first_frame, first_frame + frames, device=device)[:, None]
        patch = torch.arange(rows * cols, device=device)
        place[:, n_cond:, 1] = patch // cols * (train_grid / rows)
        place[:, n_cond:, 2] = patch % cols * (train_grid / cols)
        angle = (place[..., None] * frequency).flatten(2).flatten(0, 1)             # [L, 3 * group]
        angle = F.pad(angle, (0, head_dim - 3 * group))                             # [L, head_dim]
        # Signs for (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).
        sine = angle.sin()
        sine[:, 0::2].neg_()
        return angle.cos(), sine


def apply_rope(x, cosine, sine):
    """x [B, H, L, d] rotated by `rope_table`, in float32; returns x's dtype."""
    return (x * cosine + swap_pairs(x) * sine).to(x.dtype)


def swap_pairs(x):
    """Exchanges the two channels of each pair: (x0, x1, x2, x3 …) -> (x1, x0, x3, x2 …)."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope, mask=None, kv_cache=None):
        """x [B, L, D] -> [B, L, D].

        rope: cosines and sines from `rope_table`, [L, d] each. mask [L, L'] bool, True where a
        query may look; None: everywhere. kv_cache: a list, empty or with the rotated keys and the
        values [B, H, L_past, d] of earlier tokens; it is updated in place, L' = L_past + L."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)                           # [B, H, L, d]
        if kv_cache is not None:
            if kv_cache:
                k, v = torch.cat([kv_cache[0], k], dim=2), torch.cat([kv_cache[1], v], dim=2)
            kv_cache[:] = k, v
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                 # [B, H, L, d]
        return self.proj(x.transpose(1, 2).flatten(2))                              # [B, L, D]


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, n_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x, rope, mask=None, kv_cache=None):
        """x [B, L, D] -> [B, L, D]; the other arguments as for `Attention`."""
        x = x + self.attn(self.norm1(x), rope, mask, kv_cache)
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def init_weights(module, depth):
    """Random weights for training from scratch, in place: normal(0, 0.02), the last layer of each
    residual branch smaller with depth, biases 0, norms 1. Works on any device and dtype."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            parameter.normal_(std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)
