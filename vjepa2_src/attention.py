"""Attention that is causal by time step and full inside it, without computing what a mask would hide.

A dense mask makes the kernels compute every pair, and slowly. Here the allowed pairs are cut into rectangles that need no
mask, cuDNN's kernel takes each, and the parts are merged by their log-sum-exp, which is exact. The backward pass
hands the merged output and log-sum-exp to each part's backward kernel: exact again.

With G groups of g time steps (g divides their number), the rectangles are: step i of every group with steps 0..i of
its own group (g calls, all groups at once), and group j with all groups before it (G - 1 calls).
"""
import torch

aten = torch.ops.aten


def has_fast_attention(x, steps, head_dim):
    """Where it was measured to help: half precision on Nvidia's Hopper GPUs and later, clips of some length."""
    return (steps >= 8 and head_dim % 8 == 0 and x.is_cuda and torch.version.cuda is not None
            and x.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(x.device) >= (9, 0))


@torch.library.custom_op("vjepa2::block_causal_attention", mutates_args=())
def block_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which a token sees its own time step and all earlier ones.

    q, k, v [B, H, L, d] in half precision on a GPU, or any dtype on a CPU; best as views of [B, L, H, d]. L = steps × tokens
    per step. Returns the output [B, H, L, d], a view of [B, L, H, d], and the log-sum-exp [B, H, L, 1] in float32."""
    g, groups, n = _shape(q, steps)
    B, H, L, d = q.shape
    out, lse = q.new_empty(B, L, H, d).transpose(1, 2), q.new_empty(B, H, L, 1, dtype=torch.float32)
    own_q, own_k, own_v, own_out = (_by_group(x, groups) for x in (q, k, v, out))       # [B * groups, H, g * n, d]
    for i in range(g):
        rows, seen = slice(i * n, (i + 1) * n), slice(0, (i + 1) * n)
        part, part_lse = _attend(own_q[:, :, rows], own_k[:, :, seen], own_v[:, :, seen])
        own_out[:, :, rows] = part
        lse.unflatten(2, (groups, -1))[:, :, :, rows] = part_lse.unflatten(0, (B, groups)).transpose(1, 2)
    for j in range(1, groups):
        rows, seen = slice(j * g * n, (j + 1) * g * n), slice(0, j * g * n)
        part, part_lse = _attend(q[:, :, rows], k[:, :, seen], v[:, :, seen])
        weight = torch.sigmoid(part_lse - lse[:, :, rows])                              # of the earlier groups
        out[:, :, rows].lerp_(part, weight.to(out.dtype))
        lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
    return out, lse


@torch.library.custom_op("vjepa2::block_causal_attention_backward", mutates_args=())
def _backward(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
              steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, groups, n = _shape(q, steps)
    B, H, L, d = q.shape
    d_out = d_out.transpose(1, 2).contiguous().transpose(1, 2)                          # kernels want it as `out` lies
    grads = [q.new_empty(B, L, H, d).transpose(1, 2) for _ in range(3)]                 # of q, k and v
    own, own_grads = ([_by_group(x, groups) for x in xs] for xs in ((d_out, q, k, v, out), grads))
    own_lse = lse.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)              # [B * groups, H, g * n, 1]
    dq, dk, dv = own_grads
    for i in reversed(range(g)):                        # the last step sees its whole group: it writes, the others add
        rows, seen = slice(i * n, (i + 1) * n), slice(0, (i + 1) * n)
        places = rows, rows, seen, seen, rows
        dq[:, :, rows], *parts = _attend_backward(*(x[:, :, p] for x, p in zip(own, places)), own_lse[:, :, rows])
        for grad, part in zip((dk, dv), parts):
            if i == g - 1:
                grad.copy_(part)
            else:
                grad[:, :, seen] += part
    for j in range(1, groups):
        rows, seen = slice(j * g * n, (j + 1) * g * n), slice(0, j * g * n)
        places = rows, rows, seen, seen, rows
        parts = _attend_backward(*(x[:, :, p] for x, p in zip((d_out, q, k, v, out), places)), lse[:, :, rows])
        for grad, part, place in zip(grads, parts, (rows, seen, seen)):
            grad[:, :, place] += part
    return tuple(grads)


def _shape(q, steps):
    """g, groups, tokens per step: g is the largest divisor up to the square root."""
    g = max(g for g in range(1, steps + 1) if steps % g == 0 and g * g <= steps)
    return g, steps // g, q.shape[2] // steps


def _by_group(x, groups):
    """[B, H, L, d] -> [B * groups, H, L / groups, d]; a view where x is one of [B, L, H, d]."""
    return x.transpose(1, 2).unflatten(1, (groups, -1)).flatten(0, 1).transpose(1, 2)


def _attend(q, k, v):
    """Dense attention -> output [B, H, L, d], log-sum-exp [B, H, L, 1] in float32."""
    if q.is_cuda:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.unsqueeze(-1)


def _attend_backward(d_out, q, k, v, out, lse):
    if q.is_cuda:
        unused = torch.empty((), dtype=torch.int64, device=q.device)        # seed and offset of a dropout that is not there
        return aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, k, v, out, lse.contiguous(), unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, False)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, q, k, v, out, lse.squeeze(-1), 0.0, False)


@block_causal_attention.register_fake
def _(q, k, v, steps):
    B, H, L, d = q.shape
    return q.new_empty(B, L, H, d).transpose(1, 2), q.new_empty(B, H, L, 1, dtype=torch.float32)


@_backward.register_fake
def _(d_out, q, k, v, out, lse, steps):
    B, H, L, d = q.shape
    return tuple(q.new_empty(B, L, H, d).transpose(1, 2) for _ in range(3))


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.steps = inputs[3]


block_causal_attention.register_autograd(lambda ctx, d_out, d_lse: (*_backward(d_out, *ctx.saved_tensors, ctx.steps), None),
                                         setup_context=_remember)
