"""Attention that is causal by time step and full inside it, without computing what a mask would hide.

A dense mask makes the kernels compute every pair, and slowly. Here Triton kernels (kernels.py) go through the blocks of
tokens that see each other. The predictor puts all patches first, frame by frame, and the condition tokens behind them: a
frame's 256 patches then fill whole blocks, and only the condition tokens need a mask.
"""
import importlib.util
import math
import os
import shutil
from functools import lru_cache

import torch

BLOCK, BLOCK_CONDITIONS = 64, 32        # rows of a kernel's program: the fastest on an H100, and they fit smaller cards


@lru_cache
def has_triton():
    """Triton and the C compiler that it needs to start a kernel."""
    return importlib.util.find_spec("triton") is not None and bool(
        os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang"))))


def has_kernels(x):
    """Where Triton kernels run: in half precision on Nvidia GPUs from Ampere on."""
    return (x.is_cuda and torch.version.cuda is not None and x.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(x.device) >= (8, 0) and has_triton())


def has_fast_attention(x, patches, head_dim):
    """Where those of attention do: with frames of whole blocks besides."""
    return has_kernels(x) and patches % BLOCK == 0 and head_dim in (32, 64)


@torch.library.custom_op("vjepa2::step_causal_attention", mutates_args=())
def step_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: int, patches: int,
                          keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention in which a token sees its own time step and all earlier ones.

    q, k, v [B, H, L, d], channels contiguous. L = steps × (patches + conditions) for k and v: the patches of all steps, then their
    condition tokens. q may have the last steps only. Returns the output [B, H, L, d], a view of [B, L, H, d], the
    log2-sum-exp2 [B, H, L] in float32, and copies of k and v of the first `keep` steps."""
    from vjepa2_src import kernels
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (q.stride(), k.stride(), v.stride())
    out, lse = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, times, sizes = _launch(q, k, steps, patches)
    kernels.forward[grid(q)](q, k, v, out, lse, *_strides(q, k, v, out), *times, _scale(q) * math.log2(math.e), **sizes)
    return out, lse, first_steps(k, steps, patches, keep), first_steps(v, steps, patches, keep)


def first_steps(x, steps, patches, keep):
    """x [B, H, L, d] of `steps` time steps -> its first `keep` steps, in the same order."""
    end = steps * patches + keep * (x.shape[2] // steps - patches)
    return torch.cat([x[:, :, :keep * patches], x[:, :, steps * patches:end]], dim=2)


@torch.library.custom_op("vjepa2::step_causal_attention_backward", mutates_args=())
def _backward(d_out: torch.Tensor, d_first_k: torch.Tensor, d_first_v: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              out: torch.Tensor, lse: torch.Tensor, steps: int, patches: int, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vjepa2_src import kernels
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    dq, dk, dv, delta = _empty(q), _empty(k), _empty(k), torch.empty_like(lse)
    grid, times, sizes = _launch(q, k, steps, patches)
    scales = _scale(q) * math.log2(math.e), _scale(q)
    kernels.backward_queries[grid(q)](q, k, v, out, d_out, dq, lse, delta, *_strides(q, k, v, out, d_out, dq), *times, *scales, **sizes)
    kernels.backward_keys[grid(k)](q, k, v, d_out, dk, dv, lse, delta, *_strides(q, k, v, d_out, dk, dv), *times, *scales, **sizes)
    if keep:
        n = keep * patches
        for d, more in ((dk, d_first_k), (dv, d_first_v)):
            d[:, :, :n] += more[:, :, :n]
            d[:, :, steps * patches:steps * patches + more.shape[2] - n] += more[:, :, n:]
    return dq, dk, dv


def _empty(x):
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
    block_conditions = 16 if steps * conditions <= 16 else BLOCK_CONDITIONS

    def grid(x):
        own = x.shape[2] // tokens
        return own * patches // block + -(-own * conditions // block_conditions), x.shape[0] * x.shape[1]
    return (grid, (q.shape[1], steps, steps - q.shape[2] // tokens),
            dict(N=patches, C=conditions, D=q.shape[3], BLOCK=block, BLOCK_C=block_conditions, num_warps=4, num_stages=3))


@step_causal_attention.register_fake
def _(q, k, v, steps, patches, keep):
    first = (first_steps(x, steps, patches, keep) for x in (k, v))
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32), *first


@_backward.register_fake
def _(d_out, d_first_k, d_first_v, q, k, v, *_):
    return _empty(q), _empty(k), _empty(k)


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[:2])
    ctx.sizes = inputs[3:]


step_causal_attention.register_autograd(
    lambda ctx, d_out, d_lse, *d_first: (*_backward(d_out, *d_first, *ctx.saved_tensors, *ctx.sizes), None, None, None), setup_context=_remember)
