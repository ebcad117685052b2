"""Triton kernels of folded.py: what stands before an adapted layer in the backward pass, and that layer's thin products, in one pass.

The gradient d [M, F] of an adapted layer's output is needed for d B [M, R] and dᵀ low [F, R] (R is the rank, low = x Aᵀ). Done one after
the other they read it twice more, and memory is what they wait for. Here a program makes COLUMNS columns of d out of what comes
from behind (through GELU, through rotary positions), writes them, and multiplies them while it has them. It goes through
`each` rows, so the products are parts of sums: ByRow [F / COLUMNS, M, R] and ByColumn [ranges of rows, F, R]. Matrices lie row by row.
RANK is R, filled up to what the matrix units take.
"""
import triton
import triton.language as tl


@triton.jit
def gelu_backward(D, Hidden, DHidden, B, Low, A, DLow, ByRow, ByColumn, M, each,
                  F: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """DHidden = D * GELU'(Hidden), and the products of both layers around GELU: of the first with its B [F, R] and Low [M, R], and of the
    second, whose input is GELU(Hidden), with its A [R, F] and DLow [M, R]. ByRow and ByColumn hold the first's, then the second's."""
    block, part = tl.program_id(0), tl.program_id(1)
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    real = (ranks < R)[None, :]
    b = tl.load(B + columns[:, None] * R + ranks[None, :], mask=real, other=0.0)
    a = tl.load(A + ranks[None, :] * F + columns[:, None], mask=real, other=0.0)
    d_b = tl.zeros([COLUMNS, RANK], tl.float32)
    d_a = tl.zeros([COLUMNS, RANK], tl.float32)
    for first in range(part * each, tl.minimum(part * each + each, M), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < M)[:, None]
        at = rows[:, None] * F + columns[None, :]
        x = tl.load(Hidden + at, mask=there, other=0.0).to(tl.float32)
        d = tl.load(D + at, mask=there, other=0.0).to(tl.float32)
        bell = tl.exp(-0.5 * x * x)
        t = 1 / (1 + 0.23164189 * tl.abs(x))                    # as in blocks.polynomial_gelu
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
        below = tl.where(x < 0, tail, 1 - tail)
        d = (d * (below + x * bell * 0.3989422804014327)).to(b.dtype)
        g = (x * below).to(a.dtype)
        d, g = tl.where(there, d, 0.0), tl.where(there, g, 0.0)         # without this Triton computes both anew for each product below
        tl.store(DHidden + at, d, mask=there)
        at = rows[:, None] * R + ranks[None, :]
        low = tl.load(Low + at, mask=there & real, other=0.0)
        d_low = tl.load(DLow + at, mask=there & real, other=0.0)
        d_b = tl.dot(tl.trans(d), low, d_b)
        d_a = tl.dot(tl.trans(g), d_low, d_a)
        at += block.to(tl.int64) * M * R
        tl.store(ByRow + at, tl.dot(d, b).to(ByRow.dtype.element_ty), mask=there & real)
        at += tl.num_programs(0).to(tl.int64) * M * R
        tl.store(ByRow + at, tl.dot(g, a).to(ByRow.dtype.element_ty), mask=there & real)
    at = (part * F + columns[:, None]) * R + ranks[None, :]
    tl.store(ByColumn + at, d_b, mask=real)
    tl.store(ByColumn + tl.num_programs(1) * F * R + at, d_a, mask=real)


@triton.jit
def heads_backward(DQ, DK, DV, q_batch, q_row, k_batch, k_row, v_batch, v_row, Cosine, Sine, DQkv, B, Low, ByRow, ByColumn, M, L, each,
                   D: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """DQkv [M, 3 D] = DQ and DK [batch, L, D] turned back (blocks.rotate), and DV; and its products with B [3 D, R] and Low [M, R]."""
    block, part = tl.program_id(0), tl.program_id(1)
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    real = (ranks < R)[None, :]
    b = tl.load(B + columns[:, None] * R + ranks[None, :], mask=real, other=0.0)
    d_b = tl.zeros([COLUMNS, RANK], tl.float32)
    which = block * COLUMNS // D                                                    # of q, k and v
    From, batch, row = DQ, q_batch, q_row
    if which == 1:
        From, batch, row = DK, k_batch, k_row
    if which == 2:
        From, batch, row = DV, v_batch, v_row
    for first in range(part * each, tl.minimum(part * each + each, M), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < M)[:, None]
        at = (rows // L * batch + rows % L * row)[:, None] + (columns % D)[None, :]
        d = tl.load(From + at, mask=there, other=0.0).to(tl.float32)
        at = (rows % L * HEAD)[:, None] + (columns % HEAD)[None, :]
        turns = there & (columns < 2 * D)[None, :]
        cosine, sine = tl.load(Cosine + at, mask=turns, other=1.0), tl.load(Sine + at, mask=turns, other=0.0)
        even, odd = tl.split(tl.reshape(d * sine, [ROWS, COLUMNS // 2, 2]))
        d = (d * cosine + tl.reshape(tl.join(odd, even), [ROWS, COLUMNS])).to(b.dtype)
        d = tl.where(there, d, 0.0)                                     # as above
        tl.store(DQkv + rows[:, None] * (3 * D) + columns[None, :], d, mask=there)
        at = rows[:, None] * R + ranks[None, :]
        d_b = tl.dot(tl.trans(d), tl.load(Low + at, mask=there & real, other=0.0), d_b)
        tl.store(ByRow + block.to(tl.int64) * M * R + at, tl.dot(d, b).to(ByRow.dtype.element_ty), mask=there & real)
    tl.store(ByColumn + (part * 3 * D + columns[:, None]) * R + ranks[None, :], d_b, mask=real)
