"""How training runs adapted layers: merged, as one matrix product, with gradients through the rank.

y = x (W + s B A)ᵀ + b is one matrix product, and so is the gradient of x. With the rank-r
activations low = x Aᵀ and d_low = s d_y B, d_A = d_lowᵀ x and d_B = s d_yᵀ low. FastPredictor
(networks.py) merges all adapters at the beginning of each sequence in training mode, once for a
micro-batch. In half precision the merged copy is rounded, by about as much as the weights were; so
in eval mode (validation, landscapes) the layers compute lora.py's formula, in which the base and
the adapted model share their weights.

Dropout drops the same inputs for all tokens of a micro-batch, on the columns of A, which costs
nothing; lora.py draws anew for each token.

On GPUs with the kernels of lora_kernels.py, the MLP and the QKV projection compute the rank-r
products in the pass that makes their widest gradients, instead of reading those again.
"""
import torch
import torch.nn.functional as F

from fast.attention import has_kernels
from fast.gelu import gelu
from lora import LoRALinear
from vjepa2_src.blocks import apply_rope


# Programs of a kernel on each multiprocessor, and their tiles: from a sweep on an H100.
PROGRAMS = 4
GELU_TILE = dict(ROWS=32, COLUMNS=128, num_warps=4, num_stages=2)
QKV_TILE = dict(ROWS=32, COLUMNS=64, num_warps=4, num_stages=3)


def write_merged(out, weight, A, B, scale):
    """out [out features, in] = weight + scale · B A, in float32, rounded to the dtype of `out`.

    To bfloat16 the rounding is stochastic, with noise that is fixed for each element: rounding to
    the nearest would lose all of an update of less than half a rounding step. An update of zero
    changes no bit."""
    total = weight.float() + scale * (B @ A)
    if weight.dtype == torch.bfloat16:
        # A hash of the element's number, kept to the 16 bits that bfloat16 lacks; it may wrap.
        x = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
        x = x.view(weight.shape)
        x = (x ^ (x >> 16)) * 0x45D9F3B
        x = (x ^ (x >> 16)) * 0x45D9F3B
        threshold = (x ^ (x >> 16)) & 0xFFFF
        total = ((total.view(torch.int32) + threshold) & -0x10000).view(torch.float32)
    out.copy_(total)


class MergedLoRALinear(LoRALinear):
    """LoRALinear whose training mode uses a merged copy of the weights, once `merge` made one.

    Only FastPredictor knows when that copy has to be made anew; a layer called by itself in
    training mode uses the last one."""

    merged = None           # W + s B A of the micro-batch, in W's dtype
    input_scale = None      # dropout, [in features]: 0 or 1 / (1 - p) for each input
    kernels = False         # whether Triton kernels take it

    @torch.no_grad()
    def merge(self, write=write_merged):
        """Draws dropout anew and writes W + s B A. write: `write_merged`, maybe compiled."""
        A = self.lora_A
        if self.dropout:
            if self.input_scale is None:
                self.input_scale = torch.ones_like(A[0])
            self.input_scale.bernoulli_(1 - self.dropout).div_(1 - self.dropout)
            A = A * self.input_scale
        if self.merged is None:
            self.merged = torch.empty_like(self.weight)
        self.kernels = has_kernels(self.merged)
        write(self.merged, self.weight, A, self.lora_B, self.scale)

    def forward(self, x):
        if self.training and self.merged is not None:
            return MergedLinear.apply(*self.function_arguments(x))
        return super().forward(x)

    def function_arguments(self, x):
        """x, W + s B A, bias, A, B, all in the dtype to compute in, and s: what the autograd
        functions below take for a layer."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.merged.dtype
        A = self.lora_A * self.input_scale if self.dropout else self.lora_A
        x, weight, A, B = (tensor.to(dtype) for tensor in (x, self.merged, A, self.lora_B))
        return x, weight, None if self.bias is None else self.bias.to(dtype), A, B, self.scale


def drop_merged(layer):
    """Drops what `MergedLoRALinear.merge` made."""
    for name in ("merged", "input_scale", "kernels"):
        vars(layer).pop(name, None)


class MergedLinear(torch.autograd.Function):
    """x [..., in] -> x weightᵀ + bias with weight = W + scale · B A.

    All of one dtype; only x, A and B have gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, weight, A, B = ctx.saved_tensors
        d_x = d_y @ weight
        x, d_y = x.flatten(0, -2), d_y.flatten(0, -2)                       # [tokens, …]
        d_A = (d_y @ (ctx.scale * B)).T @ x                                 # [rank, in]
        d_B = ctx.scale * (d_y.T @ (x @ A.T))                               # [out, rank]
        return d_x, None, None, d_A, d_B, None


def can_fuse(tile, *layers):
    """Whether all layers are merged where kernels run, and of sizes that these take: equal ranks up
    to 32, widths of whole tiles."""
    for layer in layers:
        if not (layer.training and getattr(layer, "kernels", False)):
            return False
        if layer.lora_A.shape[0] != layers[0].lora_A.shape[0] or layer.lora_A.shape[0] > 32:
            return False
        if any(size % tile["COLUMNS"] for size in layer.weight.shape):
            return False
    return True


class FusedLoRAMLP(torch.autograd.Function):
    """MergedLinear, GELU, MergedLinear as one function, whose backward pass computes both layers'
    rank-r products along with GELU's gradient."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, A1, B1, scale1, weight2, bias2, A2, B2, scale2):
        hidden = F.linear(x, weight1, bias1)
        ctx.save_for_backward(x, hidden, weight1, A1, B1, weight2, A2, B2)
        ctx.scales = scale1, scale2
        return F.linear(gelu(hidden), weight2, bias2)

    @staticmethod
    def backward(ctx, d_y):
        x, hidden, weight1, A1, B1, weight2, A2, B2 = ctx.saved_tensors
        scale1, scale2 = ctx.scales
        shape = x.shape
        x, hidden, d_y = (tensor.flatten(0, -2) for tensor in (x, hidden, d_y))
        d_hidden, (d_low1, low2), (d_B1, d_A2) = gelu_backward(
            d_y @ weight2, hidden, scale1 * B1, x @ A1.T, A2, d_y @ (scale2 * B2))
        d_x = (d_hidden @ weight1).view(shape)
        d_A1, d_B2 = d_low1.T @ x, scale2 * (d_y.T @ low2)
        return (d_x, None, None, d_A1, scale1 * d_B1, None,
                None, None, d_A2.T, d_B2, None)


class FusedLoRAQKV(torch.autograd.Function):
    """MergedLinear to qkv, then the rotation of q and k (as networks.SplitAndRotate), as one
    function, whose backward pass computes the rank-r products along with the rotation's."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, cosine, sine, n_heads):
        ctx.save_for_backward(x, weight, A, B, cosine, sine)
        ctx.scale = scale
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, n_heads, -1))     # [B, L, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # [B, H, L, d] each
        return apply_rope(q, cosine, sine), apply_rope(k, cosine, sine), v

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        x, weight, A, B, cosine, sine = ctx.saved_tensors
        shape, x = x.shape, x.flatten(0, -2)
        d_qkv, d_low, d_B = qkv_backward(d_q, d_k, d_v, cosine, sine, ctx.scale * B, x @ A.T)
        d_x = (d_qkv @ weight).view(shape)
        return d_x, None, None, d_low.T @ x, ctx.scale * d_B, None, None, None, None


@torch.library.custom_op("vjepa2::gelu_backward", mutates_args=())
def gelu_backward(
        d: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, low: torch.Tensor,
        A: torch.Tensor, d_low: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d [M, F] of GELU(hidden) -> d_hidden [M, F], and the rank-r products of both layers.

    Of the layer before GELU, whose B [F, R] and low [M, R] are given, and of the one behind it, by
    its A [R, F] and d_low [M, R]: d_hidden B and GELU(hidden) Aᵀ in [2, M, R], d_hiddenᵀ low and
    GELU(hidden)ᵀ d_low in [2, F, R]."""
    from fast import lora_kernels
    (M, width), rank = hidden.shape, B.shape[1]
    grid, by_row, by_column, sizes = _launch(hidden, (2,), M, width, rank, GELU_TILE)
    d_hidden = hidden.new_empty(M, width)
    d, hidden, B, low, A, d_low = (x.contiguous() for x in (d, hidden, B, low, A, d_low))
    lora_kernels.gelu_backward[grid](d, hidden, d_hidden, B, low, A, d_low, by_row, by_column, M,
                                     F=width, **sizes)
    return d_hidden, by_row.sum(1), by_column.sum(1).to(B.dtype)


@torch.library.custom_op("vjepa2::qkv_backward", mutates_args=())
def qkv_backward(
        d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor, cosine: torch.Tensor,
        sine: torch.Tensor, B: torch.Tensor, low: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_q, d_k, d_v [batch, H, L, d] -> d_qkv [M, 3 H d] as networks.SplitAndRotate gives it, and
    the rank-r products d_qkv B [M, R] and d_qkvᵀ low [3 H d, R]."""
    from fast import lora_kernels
    (_, H, L, d), (M, rank), width = d_q.shape, low.shape, len(B)
    grid, by_row, by_column, sizes = _launch(d_q, (), M, width, rank, QKV_TILE)
    d_qkv = d_q.new_empty(M, width)
    # [batch, L, H d], not copied where they are stored so already
    rows = [x.transpose(1, 2).flatten(2) for x in (d_q, d_k, d_v)]
    rows = [x if x.stride(2) == 1 else x.contiguous() for x in rows]
    strides = [stride for x in rows for stride in x.stride()[:2]]
    lora_kernels.heads_backward[grid](*rows, *strides, cosine, sine, d_qkv, B.contiguous(),
                                      low.contiguous(), by_row, by_column, M, L, D=H * d, HEAD=d,
                                      **sizes)
    return d_qkv, by_row.sum(0), by_column.sum(0).to(B.dtype)


def _launch(x, outer, M, width, rank, tile):
    """The grid, buffers for the partial sums by row and by column, and the kernel's sizes."""
    properties = torch.cuda.get_device_properties(x.device)
    programs = PROGRAMS * properties.multi_processor_count
    across = width // tile["COLUMNS"]
    each = -(-M // max(1, programs // across))
    each += -each % tile["ROWS"]                                # rows of a program, whole tiles
    down = -(-M // each)
    by_row = x.new_empty(*outer, across, M, rank)
    by_column = x.new_empty(*outer, down, width, rank, dtype=torch.float32)
    # The matrix units take inner sizes of powers of two from 16 on.
    padded_rank = max(16, 1 << (rank - 1).bit_length())
    return (across, down), by_row, by_column, dict(each=each, R=rank, RANK=padded_rank, **tile)


@gelu_backward.register_fake
def _(d, hidden, B, low, A, d_low):
    return (hidden.new_empty(hidden.shape), hidden.new_empty(2, *low.shape),
            hidden.new_empty(2, *B.shape))


@qkv_backward.register_fake
def _(d_q, d_k, d_v, cosine, sine, B, low):
    return d_q.new_empty(len(low), len(B)), torch.empty_like(low), torch.empty_like(B)
