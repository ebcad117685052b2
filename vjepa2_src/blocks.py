"""What the encoder and the predictor share: 3-D rotary positions, attention, the transformer block.

Capitals are sizes: B clips, T time steps, L tokens, H heads, D width. Module attribute names are the
released checkpoint's. Source of the maths: arXiv:2506.09985 and facebookresearch/vjepa2 (MIT).
"""
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from vjepa2_src.attention import first_steps, step_causal_attention


@lru_cache(maxsize=64)
def rope_table(head_dim, frames, rows, cols, grid, n_cond, device, first=0):
    """Cosines and signed sines that rotate queries and keys by their place in the video.

    A head's channels fall into three groups of `2 * (head_dim // 3 // 2)`, turned by frame, row and
    column index; the channels left over stay as they are. The tokens are the rows × cols patches of each frame, from
    frame `first` on, then `n_cond` condition tokens of each frame, turned by the frame alone. Row and column indices are
    scaled to the `grid` the network was trained on. Returns two [frames * (rows * cols + n_cond), head_dim]
    float32 tensors, computed once per shape.

    A quirk that the released weights need: channels turn in neighbouring pairs (0,1), (2,3) …, yet
    the frequencies are tiled [f0 … fn, f0 … fn], so the two channels of a pair turn by different angles.
    """
    group = 2 * (head_dim // 3 // 2)
    with torch.inference_mode(False):           # a table first made in inference must serve training
        frequency = 10000.0 ** (-torch.arange(group // 2, device=device) / (group / 2))
        frequency = frequency.tile(2)                                                   # [group]
        frame = torch.arange(first, first + frames, device=device, dtype=torch.float32)
        patch = torch.arange(rows * cols, device=device).repeat(frames)
        place = torch.zeros(frames * (rows * cols + n_cond), 3, device=device)
        place[:, 0] = torch.cat([frame.repeat_interleave(rows * cols), frame.repeat_interleave(n_cond)])
        place[:len(patch), 1] = patch // cols * (grid / rows)
        place[:len(patch), 2] = patch % cols * (grid / cols)
        angle = (place[:, :, None] * frequency).flatten(1)                              # [L, 3 * group]
        angle = F.pad(angle, (0, head_dim - 3 * group))                                 # [L, head_dim]
        sine = angle.sin()
        sine[:, 0::2].neg_()                    # (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)
        return angle.cos(), sine


def rotate(x, table):
    """x [B, H, L, head_dim] turned by `rope_table`, in float32; returns x's dtype."""
    cosine, sine = table
    return (x * cosine + _swap(x) * sine).to(x.dtype)


def _swap(x):
    """The two channels of each pair in each other's place."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class Heads(torch.autograd.Function):
    """qkv [B, L, 3, H, head_dim] -> q and k turned by the table, and v: [B, H, L, head_dim] each. The gradient is written in qkv's
    own order; autograd's would be put together from three padded parts and copied."""

    @staticmethod
    def forward(ctx, qkv, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return rotate(q, (cosine, sine)), rotate(k, (cosine, sine)), v

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        cosine, sine = ctx.saved_tensors
        parts = [(d * cosine + _swap(d) * _swap(sine)).to(d.dtype) for d in (d_q, d_k)]
        return torch.stack([d.transpose(1, 2) for d in (*parts, d_v)], dim=2), None, None


@lru_cache(maxsize=64)
def causal_mask(frames, patches, n_cond, device):
    """[L, L] bool, True where a query may look: everything in its own time step and all earlier ones. Tokens as in `rope_table`."""
    with torch.inference_mode(False):
        step = torch.arange(frames, device=device)
        step = torch.cat([step.repeat_interleave(patches), step.repeat_interleave(n_cond)])     # [L]
        return step[:, None] >= step[None, :]


class Attention(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, table, frames=None, fast=False, mask=None, past=None, keep=0):
        """x [B, L, D] -> [B, L, D], memory; table from rope_table. Without more, all tokens see each other.

        frames = (T, N): x holds T time steps of N patches, behind them L - T * N condition tokens. past: the memory of
        time steps before them. Attention is causal by time step in attention.py's kernels if fast, else with a mask from
        causal_mask (a single step needs none). memory: (k, v) [B, H, L', head_dim] of the first `keep` time steps, or None."""
        q, k, v = self.heads(x, table)                                  # [B, H, L, head_dim] each
        T, N = frames or (1, x.shape[1])
        C = x.shape[1] // T - N
        if past is not None:
            seen = past[0].shape[2] // (N + C)
            k, v = (torch.cat([old[:, :, :seen * N], new[:, :, :T * N], old[:, :, seen * N:], new[:, :, T * N:]], dim=2)
                    for old, new in zip(past, (k, v)))
            T += seen
        if fast:
            x, _, *memory = step_causal_attention(q, k, v, T, N, keep)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            memory = [first_steps(z, T, N, keep) for z in (k, v)] if keep else []
        return self.proj(x.transpose(1, 2).flatten(2)), memory if keep else None       # [B, L, D]

    def heads(self, x, table):
        return Heads.apply(self.qkv(x).unflatten(-1, (3, self.n_heads, -1)), *table)


def gelu(x):
    """GELU; by a polynomial where that is faster: compiled for a GPU, in half precision, where autograd does not follow
    (folded.py has a backward pass of its own)."""
    fast = torch.compiler.is_compiling() and x.is_cuda and x.dtype.itemsize == 2 and not torch.is_grad_enabled()
    return polynomial_gelu(x) if fast else F.gelu(x)


def polynomial_gelu(x):
    """GELU to 1e-6, computed in float32: the library's error function takes longer than reading x does. One number of x is y; the normal
    distribution below -|y| is a polynomial of t times the bell curve (Abramowitz and Stegun, 7.1.26)."""
    y = x.float()
    t = 1 / (1 + 0.23164189 * y.abs())
    tail = 0.5307027145 * t - 0.7265760135
    for coefficient in (0.7107068705, -0.142248368, 0.127414796):
        tail = tail * t + coefficient
    tail = tail * t * torch.exp(-0.5 * y * y)
    return (y * torch.where(y < 0, tail, 1 - tail)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, n_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x, table, *arguments):
        """As `Attention.forward`."""
        change, memory = self.attn(self.norm1(x), table, *arguments)
        x = x + change
        return x + self.mlp(self.norm2(x)), memory


@torch.no_grad()
def init_weights(module, depth):
    """Random weights for training from nothing: normal(0, 0.02), the last layer of each residual branch
    smaller with depth, biases 0, norms 1. Works on any device and dtype, in place."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            parameter.normal_(std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)
