"""How training runs adapted layers: as one matrix with the update added, W + s B A, and gradients of A and B through the rank.

y = x (W + s B A)ᵀ + b is one matrix product, and so is the gradient of x; with low = x Aᵀ and d_low = s d_y B, both as wide as the rank,
d_A = d_lowᵀ x and d_B = s d_yᵀ low. `lora.fold` writes the sum once for each micro-batch. On GPUs with the kernels of
folded_kernels.py, the MLP and the heads of attention take these products while they make their widest gradients, instead of reading
them again.
"""
import torch
import torch.nn.functional as F

from vjepa2_src import blocks

PROGRAMS = 4                            # of the kernels on each multiprocessor; this and their tiles: from a sweep on an H100
GELU_TILE = dict(ROWS=32, COLUMNS=128, num_warps=4, num_stages=2)
HEADS_TILE = dict(ROWS=32, COLUMNS=64, num_warps=4, num_stages=3)


def write_folded(out, weight, A, B, scale):
    """out [out features, in] = weight + scale · B A, computed in float32 and rounded to their dtype.

    To bfloat16 it rounds up or down by a threshold that is fixed for each element and spread evenly over them: to the nearest,
    all of an update of less than half a step would be lost. An update of zero changes no bit."""
    total = weight.float() + scale * (B @ A)
    if weight.dtype == torch.bfloat16:
        x = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device).view(weight.shape)
        x = (x ^ (x >> 16)) * 0x45D9F3B                 # a hash of the element's number; it wraps around
        x = (x ^ (x >> 16)) * 0x45D9F3B
        threshold = (x ^ (x >> 16)) & 0xFFFF            # of the 16 bits that bfloat16 lacks
        total = ((total.view(torch.int32) + threshold) & -0x10000).view(torch.float32)
    out.copy_(total)


class LinearFunction(torch.autograd.Function):
    """x [..., in] -> x weightᵀ + bias with weight = W + scale · B A. All of one dtype; only x, A and B have gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, weight, A, B = ctx.saved_tensors
        d_x = d_y @ weight
        x, d_y = x.flatten(0, -2), d_y.flatten(0, -2)                           # [tokens, in], [tokens, out]
        d_A = (d_y @ (ctx.scale * B)).T @ x                                     # [rank, in]
        d_B = ctx.scale * (d_y.T @ (x @ A.T))                                   # [out, rank]
        return d_x, None, None, d_A, d_B, None


class MLP(blocks.MLP):
    """The same as one autograd function, where both layers are adapted."""

    def forward(self, x):
        if not (self.training and self.fuses()):
            return super().forward(x)
        x, *first = self.fc1.parts(x)
        return _MLP.apply(x, *first, *self.fc2.parts(x)[1:])

    def fuses(self):
        return _fuses(GELU_TILE, self.fc1, self.fc2)


class _MLP(torch.autograd.Function):
    """As LinearFunction, GELU, LinearFunction."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, A1, B1, scale1, weight2, bias2, A2, B2, scale2):
        hidden = F.linear(x, weight1, bias1)
        ctx.save_for_backward(x, hidden, weight1, A1, B1, weight2, A2, B2)
        ctx.scales = scale1, scale2
        return F.linear(blocks.gelu(hidden), weight2, bias2)

    @staticmethod
    def backward(ctx, d_y):
        x, hidden, weight1, A1, B1, weight2, A2, B2 = ctx.saved_tensors
        scale1, scale2 = ctx.scales
        shape = x.shape
        x, hidden, d_y = (tensor.flatten(0, -2) for tensor in (x, hidden, d_y))
        d_hidden, (d_low1, low2), (d_B1, d_A2) = gelu_backward(d_y @ weight2, hidden, scale1 * B1, x @ A1.T, A2, d_y @ (scale2 * B2))
        d_x = (d_hidden @ weight1).view(shape)
        return d_x, None, None, d_low1.T @ x, scale1 * d_B1, None, None, None, d_A2.T, scale2 * (d_y.T @ low2), None


class Attention(blocks.Attention):
    """The same with qkv and the rotations as one autograd function, where qkv is adapted."""

    def heads(self, x, table):
        if not (self.training and self.fuses()):
            return super().heads(x, table)
        return _Heads.apply(*self.qkv.parts(x), *table, self.n_heads)

    def fuses(self):
        return _fuses(HEADS_TILE, self.qkv)


class _Heads(torch.autograd.Function):
    """As LinearFunction, blocks.Heads."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, cosine, sine, n_heads):
        ctx.save_for_backward(x, weight, A, B, cosine, sine)
        ctx.scale = scale
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
        return blocks.rotate(q, (cosine, sine)), blocks.rotate(k, (cosine, sine)), v

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        x, weight, A, B, cosine, sine = ctx.saved_tensors
        shape, x = x.shape, x.flatten(0, -2)
        d_qkv, d_low, d_B = heads_backward(d_q, d_k, d_v, cosine, sine, ctx.scale * B, x @ A.T)
        return (d_qkv @ weight).view(shape), None, None, d_low.T @ x, ctx.scale * d_B, None, None, None, None


FUSED = {blocks.MLP: MLP, blocks.Attention: Attention}


def _fuses(tile, *layers):
    """Whether all are folded where kernels run, and of sizes that these take: ranks up to 32, widths of whole tiles."""
    return all(getattr(layer, "kernels", False) and layer.lora_A.shape[0] == layers[0].lora_A.shape[0] <= 32
               and all(size % tile["COLUMNS"] == 0 for size in layer.weight.shape) for layer in layers)


@torch.library.custom_op("vjepa2::gelu_backward", mutates_args=())
def gelu_backward(d: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, low: torch.Tensor, A: torch.Tensor,
                  d_low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d [M, F] of GELU(hidden) -> d_hidden [M, F], and thin products of the layer before GELU, whose B [F, R] and low [M, R] are given,
    and of the one behind it, by its A [R, F] and d_low [M, R]: d_hidden B and GELU(hidden) Aᵀ in [2, M, R], d_hiddenᵀ low and
    GELU(hidden)ᵀ d_low in [2, F, R]."""
    import folded_kernels
    (M, width), rank = hidden.shape, B.shape[1]
    grid, by_row, by_column, sizes = _launch(hidden, (2,), M, width, rank, GELU_TILE)
    d_hidden = hidden.new_empty(M, width)
    inputs = [x.contiguous() for x in (d, hidden, B, low, A, d_low)]
    folded_kernels.gelu_backward[grid](*inputs[:2], d_hidden, *inputs[2:], by_row, by_column, M, F=width, **sizes)
    return d_hidden, by_row.sum(1), by_column.sum(1).to(B.dtype)


@torch.library.custom_op("vjepa2::heads_backward", mutates_args=())
def heads_backward(d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, B: torch.Tensor,
                   low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_q, d_k, d_v [batch, H, L, d] -> d_qkv [M, 3 H d] as blocks.Heads gives it, d_qkv B [M, R] and d_qkvᵀ low [3 H d, R]."""
    import folded_kernels
    (_, H, L, d), (M, rank), width = d_q.shape, low.shape, len(B)
    grid, by_row, by_column, sizes = _launch(d_q, (), M, width, rank, HEADS_TILE)
    d_qkv = d_q.new_empty(M, width)
    rows = [x.transpose(1, 2).flatten(2) for x in (d_q, d_k, d_v)]              # [batch, L, H d], not copied if they lie so
    rows = [x if x.stride(2) == 1 else x.contiguous() for x in rows]
    folded_kernels.heads_backward[grid](*rows, *[stride for x in rows for stride in x.stride()[:2]], cosine, sine, d_qkv,
                                        B.contiguous(), low.contiguous(), by_row, by_column, M, L, D=H * d, HEAD=d, **sizes)
    return d_qkv, by_row.sum(0), by_column.sum(0).to(B.dtype)


def _launch(x, outer, M, width, rank, tile):
    """The grid, buffers for the parts of sums by row and by column, and the kernel's sizes."""
    programs = PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    across = width // tile["COLUMNS"]
    each = -(-M // max(1, programs // across))
    each += -each % tile["ROWS"]                                                # rows of a program
    down = -(-M // each)
    return ((across, down), x.new_empty(*outer, across, M, rank), x.new_empty(*outer, down, width, rank, dtype=torch.float32),
            dict(each=each, R=rank, RANK=max(16, 1 << (rank - 1).bit_length()), **tile))


@gelu_backward.register_fake
def _(d, hidden, B, low, A, d_low):
    return hidden.new_empty(hidden.shape), hidden.new_empty(2, *low.shape), hidden.new_empty(2, *B.shape)


@heads_backward.register_fake
def _(d_q, d_k, d_v, cosine, sine, B, low):
    return d_q.new_empty(len(low), len(B)), torch.empty_like(low), torch.empty_like(B)
