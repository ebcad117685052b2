"""Attention that is causal by time step and full inside it, without computing what a mask hides.

A dense mask makes the library's kernels compute every pair of tokens, and slowly. The Triton
kernels in attention_kernels.py go through the blocks of tokens that see each other. For that the
patches of all time steps come first, frame by frame, and the action and state tokens behind them:
a frame's 256 patches then fill whole blocks, and only the action and state tokens need a mask.
"""
import math

import torch


# Rows of a kernel's program, of patches and of action and state tokens: the fastest on an H100,
# and small enough for the shared memory of smaller cards.
BLOCK, BLOCK_CONDITIONS = 64, 32


def has_kernels(x):
    """Whether Triton kernels take x: half precision on Nvidia GPUs from Ampere on."""
    return (x.is_cuda and torch.version.cuda is not None
            and x.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(x.device) >= (8, 0))


def has_fast_attention(x, patches, head_dim):
    """Whether the attention kernels take x: frames must fill whole blocks besides."""
    return has_kernels(x) and patches % BLOCK == 0 and head_dim in (32, 64)


def first_steps(x, steps, patches, keep):
    """x [B, H, L, d] of `steps` time steps -> its first `keep` steps, in the same order."""
    end = steps * patches + keep * (x.shape[2] // steps - patches)
    return torch.cat([x[:, :, :keep * patches], x[:, :, steps * patches:end]], dim=2)


def append_steps(past, new, patches, tokens):
    """The time steps of `past` followed by those of `new`, [B, H, L, d] each, patches first."""
    n_past = past.shape[2] // tokens * patches
    n_new = new.shape[2] // tokens * patches
    return torch.cat([past[:, :, :n_past], new[:, :, :n_new],
                      past[:, :, n_past:], new[:, :, n_new:]], dim=2)


@torch.library.custom_op("vjepa2::frame_causal_attention", mutates_args=())
def frame_causal_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: int, patches: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention in which a token sees its own time step and all earlier ones.

    q, k, v [B, H, L, d], channels contiguous. For k and v, L = steps × (patches + conditions): the
    patches of all steps, then their action and state tokens. q may have the last steps only.
    Returns the output [B, H, L, d], a view of [B, L, H, d], the log2-sum-exp2 [B, H, L] in float32,
    and copies of k and v of the first `keep` steps: the KV cache of a sequence that goes on."""
    from fast import attention_kernels
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (q.stride(), k.stride(), v.stride())
    out, lse = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, times, sizes = _launch(q, k, steps, patches)
    attention_kernels.forward[grid(q)](q, k, v, out, lse, *_strides(q, k, v, out), *times,
                                       _scale(q) * math.log2(math.e), **sizes)
    return (out, lse, first_steps(k, steps, patches, keep), first_steps(v, steps, patches, keep))


@torch.library.custom_op("vjepa2::frame_causal_attention_backward", mutates_args=())
def _backward(
        d_out: torch.Tensor, d_first_k: torch.Tensor, d_first_v: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        steps: int, patches: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fast import attention_kernels
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    dq, dk, dv, delta = _empty(q), _empty(k), _empty(k), torch.empty_like(lse)
    grid, times, sizes = _launch(q, k, steps, patches)
    scales = _scale(q) * math.log2(math.e), _scale(q)
    # The first kernel also writes delta, which the second one reads.
    attention_kernels.backward_queries[grid(q)](
        q, k, v, out, d_out, dq, lse, delta, *_strides(q, k, v, out, d_out, dq),
        *times, *scales, **sizes)
    attention_kernels.backward_keys[grid(k)](
        q, k, v, d_out, dk, dv, lse, delta, *_strides(q, k, v, d_out, dk, dv),
        *times, *scales, **sizes)
    if keep:
        n, first_condition = keep * patches, steps * patches
        for d, d_first in ((dk, d_first_k), (dv, d_first_v)):
            d[:, :, :n] += d_first[:, :, :n]
            n_conditions = d_first.shape[2] - n
            d[:, :, first_condition:first_condition + n_conditions] += d_first[:, :, n:]
    return dq, dk, dv


def _empty(x):
    """Like x [B, H, L, d], stored as [B, L, H, d]: the output projection then needs no copy."""
    B, H, L, d = x.shape
    return x.new_empty(B, L, H, d).transpose(1, 2)


def _scale(q):
    return q.shape[-1] ** -0.5


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def _launch(q, k, steps, patches):
    """grid(rows of a tensor), (H, T, S), and the sizes that a kernel is compiled for."""
    tokens = k.shape[2] // steps
    conditions, block = tokens - patches, min(BLOCK, patches)
    # A single time step has two of them: a smaller block wastes less.
    block_conditions = 16 if steps * conditions <= 16 else BLOCK_CONDITIONS

    def grid(x):
        x_steps = x.shape[2] // tokens
        blocks = x_steps * patches // block + -(-x_steps * conditions // block_conditions)
        return blocks, x.shape[0] * x.shape[1]

    times = q.shape[1], steps, steps - q.shape[2] // tokens
    return grid, times, dict(N=patches, C=conditions, D=q.shape[3], BLOCK=block,
                             BLOCK_C=block_conditions, num_warps=4, num_stages=3)


@frame_causal_attention.register_fake
def _(q, k, v, steps, patches, keep):
    first = (first_steps(x, steps, patches, keep) for x in (k, v))
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32), *first


@_backward.register_fake
def _(d_out, d_first_k, d_first_v, q, k, v, *_):
    return _empty(q), _empty(k), _empty(k)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[:2])
    ctx.sizes = inputs[3:]


def _autograd_backward(ctx, d_out, d_lse, *d_first):
    return *_backward(d_out, *d_first, *ctx.saved_tensors, *ctx.sizes), None, None, None


frame_causal_attention.register_autograd(_autograd_backward, setup_context=_setup_context)
