"""Triton kernels of the backward pass of adapted layers: gradient and rank-r products in one pass.

fast/merged_lora.py calls these. For an adapted layer with low_rank = x Aᵀ [M, R], the gradient
d [M, F] of its output (M tokens, F features, R the rank) enters two products: d B [M, R], which
leads to A's gradient, and dᵀ low_rank [F, R], which is B's. Both are memory-bound: as matmuls of
their own they would read d, which is wide, twice more. Here d is multiplied while it is still in
registers.

                   COLUMNS of F
    d [M, F]   +------+------+-- ... --+    A program makes one block of columns in one range of
               |      |      |         |    `each` rows, tile by tile (ROWS x COLUMNS) from top to
       `each`  | tile |      |         |    bottom: the gradient behind the layer's GELU or RoPE
       rows    | tile |      |         |    is read, taken through that operation, multiplied and
               | ...  |      |         |    written.
               +------+------+-- ... --+
               |      |      |         |    Sums over rows stay in registers until the range ends.
               +------+------+-- ... --+

So each product comes as partial sums, which the caller adds up: RowSums [F / COLUMNS, M, R] of d B,
one for each block of columns, and ColumnSums [ranges of rows, F, R] of dᵀ low_rank. Atomic adds
would need no such buffers, but add in another order each time: training would not be repeatable.

The grid is (F / COLUMNS, ranges of rows). RANK is R, filled up to a power of two of at least 16,
which the tensor cores need. Capitals are pointers to tensors or, as in the diagram, sizes; tensors
without strides are contiguous, row by row.
"""
import triton
import triton.language as tl


@triton.jit
def gelu_backward(DOut, Hidden, DHidden, B, LowRank, A, DLowRank, RowSums, ColumnSums, M, each,
                  F: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes DHidden [M, F] = DOut * GELU'(Hidden), and the products of both layers around GELU.

    The first layer's output is Hidden: its products are DHidden B and DHiddenᵀ LowRank, with its B
    [F, R] and LowRank [M, R]. The second layer's input is g = GELU(Hidden): its products are g Aᵀ
    and gᵀ DLowRank, with its A [R, F] and DLowRank [M, R]. RowSums and ColumnSums hold the first
    layer's, then the second layer's: [2, F / COLUMNS, M, R] and [2, ranges of rows, F, R] float32.
    GELU(Hidden) was not kept in memory: it is computed anew here, too."""
    block, part = tl.program_id(0), tl.program_id(1)
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    in_rank = (ranks < R)[None, :]
    b = tl.load(B + columns[:, None] * R + ranks[None, :], mask=in_rank, other=0.0)
    a = tl.load(A + ranks[None, :] * F + columns[:, None], mask=in_rank, other=0.0)
    d_b = tl.zeros([COLUMNS, RANK], tl.float32)
    d_a = tl.zeros([COLUMNS, RANK], tl.float32)
    for first in range(part * each, tl.minimum(part * each + each, M), ROWS):
        # int64: M * F exceeds 2^31 with many tokens.
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < M)[:, None]
        offsets = rows[:, None] * F + columns[None, :]
        x = tl.load(Hidden + offsets, mask=valid, other=0.0).to(tl.float32)     # [ROWS, COLUMNS]
        d = tl.load(DOut + offsets, mask=valid, other=0.0).to(tl.float32)

        # GELU(x) = x * cdf(x), and GELU'(x) = cdf(x) + x * density(x), of the standard normal
        # distribution. The cdf by a polynomial, to 1e-7 (Abramowitz and Stegun, 7.1.26), as in
        # gelu.polynomial_gelu: the library's error function takes longer than reading x.
        gaussian = tl.exp(-0.5 * x * x)
        t = 1 / (1 + 0.23164189 * tl.abs(x))
        tail = -0.7265760135 + t * 0.5307027145
        tail = 0.7107068705 + t * tail
        tail = -0.142248368 + t * tail
        tail = 0.127414796 + t * tail
        tail = t * tail * gaussian                                              # cdf(-|x|)
        cdf = tl.where(x < 0, tail, 1 - tail)
        d = (d * (cdf + x * gaussian * 0.3989422804014327)).to(b.dtype)         # 1 / sqrt(2 pi)
        g = (x * cdf).to(a.dtype)

        # Rows beyond M are 0 already. But without this mask Triton would recompute both, with all
        # of the above, for each of the products below, in the register layout that it needs.
        d = tl.where(valid, d, 0.0)
        g = tl.where(valid, g, 0.0)
        tl.store(DHidden + offsets, d, mask=valid)

        offsets = rows[:, None] * R + ranks[None, :]
        low_rank = tl.load(LowRank + offsets, mask=valid & in_rank, other=0.0)  # [ROWS, RANK]
        d_low_rank = tl.load(DLowRank + offsets, mask=valid & in_rank, other=0.0)
        d_b = tl.dot(tl.trans(d), low_rank, d_b)
        d_a = tl.dot(tl.trans(g), d_low_rank, d_a)
        offsets += block.to(tl.int64) * M * R
        tl.store(RowSums + offsets, tl.dot(d, b).to(RowSums.dtype.element_ty), mask=valid & in_rank)
        offsets += tl.num_programs(0).to(tl.int64) * M * R
        tl.store(RowSums + offsets, tl.dot(g, a).to(RowSums.dtype.element_ty), mask=valid & in_rank)

    offsets = (part * F + columns[:, None]) * R + ranks[None, :]
    tl.store(ColumnSums + offsets, d_b, mask=in_rank)
    tl.store(ColumnSums + tl.num_programs(1) * F * R + offsets, d_a, mask=in_rank)


@triton.jit
def heads_backward(DQ, DK, DV, q_batch, q_row, k_batch, k_row, v_batch, v_row, Cosine, Sine, DQkv,
                   B, LowRank, RowSums, ColumnSums, M, L, each,
                   D: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes DQkv [M, 3 D], the gradient of the QKV projection's output before RoPE, and its
    products DQkv B and DQkvᵀ LowRank, with B [3 D, R] and LowRank [M, R].

    DQ, DK, DV [batch, L, D] with M = batch * L; strides q_batch, q_row, … count elements. Cosine,
    Sine [L, HEAD] are those of the forward pass; a head has HEAD channels."""
    block, part = tl.program_id(0), tl.program_id(1)
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    in_rank = (ranks < R)[None, :]
    b = tl.load(B + columns[:, None] * R + ranks[None, :], mask=in_rank, other=0.0)
    d_b = tl.zeros([COLUMNS, RANK], tl.float32)

    # D is a multiple of COLUMNS: all columns of a program belong to one of q, k and v.
    which = block * COLUMNS // D
    Source, batch, row = DQ, q_batch, q_row
    if which == 1:
        Source, batch, row = DK, k_batch, k_row
    if which == 2:
        Source, batch, row = DV, v_batch, v_row
    for first in range(part * each, tl.minimum(part * each + each, M), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < M)[:, None]
        offsets = (rows // L * batch + rows % L * row)[:, None] + (columns % D)[None, :]
        d = tl.load(Source + offsets, mask=valid, other=0.0).to(tl.float32)     # [ROWS, COLUMNS]

        # RoPE's backward pass is the transpose of its rotation: multiplied by the sines first, then
        # the two channels of each pair swapped. Values are not rotated: cosine 1, sine 0.
        offsets = (rows % L * HEAD)[:, None] + (columns % HEAD)[None, :]
        rotated = valid & (columns < 2 * D)[None, :]
        cosine = tl.load(Cosine + offsets, mask=rotated, other=1.0)
        sine = tl.load(Sine + offsets, mask=rotated, other=0.0)
        even, odd = tl.split(tl.reshape(d * sine, [ROWS, COLUMNS // 2, 2]))
        d = (d * cosine + tl.reshape(tl.join(odd, even), [ROWS, COLUMNS])).to(b.dtype)
        # As in `gelu_backward`: keeps Triton from recomputing d for each product.
        d = tl.where(valid, d, 0.0)
        tl.store(DQkv + rows[:, None] * (3 * D) + columns[None, :], d, mask=valid)

        offsets = rows[:, None] * R + ranks[None, :]
        d_b = tl.dot(tl.trans(d), tl.load(LowRank + offsets, mask=valid & in_rank, other=0.0), d_b)
        tl.store(RowSums + block.to(tl.int64) * M * R + offsets,
                 tl.dot(d, b).to(RowSums.dtype.element_ty), mask=valid & in_rank)

    tl.store(ColumnSums + (part * 3 * D + columns[:, None]) * R + ranks[None, :], d_b, mask=in_rank)
