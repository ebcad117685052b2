"""Triton kernels of attention.py: attention that is causal by time step, its backward pass, and nothing that a mask would hide.

The keys of a head lie in rows: the N patches of frame 0, of frame 1, … (T * N rows), then C condition tokens of each frame
(C * T rows). Queries lie likewise, without the first S frames, which come from a memory. N is a multiple of BLOCK, so a block
of patches belongs to one frame, and two blocks see each other whole or not at all: only the few condition tokens need a mask.
Scores are kept in base 2 (exp2 is what the hardware has).

A kernel's program takes BLOCK rows of one head, of patches or (BLOCK_C rows) of conditions, and goes through the rows that
they see. Strides count elements, of batch, head and row; the channels of a head are neighbours.
Source of the method: FlashAttention-2 (arXiv:2307.08691); of the mask: arXiv:2506.09985.
"""
import triton
import triton.language as tl


@triton.jit
def _read(at, rows, stride, channels, there):
    return tl.load(at + rows[:, None] * stride + channels[None, :], mask=there[:, None], other=0.0)


@triton.jit
def _attend(out, top, total, q, k, v, scale, mask, MASKED: tl.constexpr):
    """One block of keys: the running output, maximum and sum of exponentials of the rows."""
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    return tl.dot(p.to(v.dtype), v, out * shrink[:, None]), higher, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward_rows(Q, K, V, Out, Lse, rows, there, frame, last, T, q_row, k_row, v_row, out_row, scale, ROWS: tl.constexpr,
                  N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CONDITIONS: tl.constexpr):
    """Rows of frames `frame`, none later than last - 1; CONDITIONS: they are of several frames."""
    channels = tl.arange(0, D)
    q = _read(Q, rows, q_row, channels, there)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, C * last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        seen = c < C * last
        k, v = _read(K, T * N + c, k_row, channels, seen), _read(V, T * N + c, v_row, channels, seen)
        out, top, total = _attend(out, top, total, q, k, v, scale, (frame[:, None] >= (c // C)[None, :]) & seen[None, :], True)
    for start in range(0, N * last, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        k = tl.load(K + at[:, None] * k_row + channels[None, :])
        v = tl.load(V + at[:, None] * v_row + channels[None, :])
        out, top, total = _attend(out, top, total, q, k, v, scale, (frame >= start // N)[:, None], CONDITIONS)
    tl.store(Out + rows[:, None] * out_row + channels[None, :], (out / total[:, None]).to(Out.dtype.element_ty), mask=there[:, None])
    tl.store(Lse + rows, top + tl.math.log2(total), mask=there)


@triton.jit
def forward(Q, K, V, Out, Lse, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
            H, T, S, scale, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Out = softmax(scale * Q K^T) V; Lse [B, H, rows of Q] = log2 of the sum of exp2. scale includes log2(e)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)           # those that see most begin
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    Q += b * q_batch + h * q_head
    K += b * k_batch + h * k_head
    V += b * v_batch + h * v_head
    Out += b * out_batch + h * out_head
    Lse += (b * H + h) * (T - S) * (N + C)
    patches = (T - S) * N // BLOCK
    if block < patches:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        _forward_rows(Q, K, V, Out, Lse, rows, rows >= 0, S + rows // N, S + block * BLOCK // N + 1, T, q_row, k_row, v_row, out_row, scale,
                      BLOCK, N, C, D, BLOCK, BLOCK_C, False)
    else:
        c = (block - patches) * BLOCK_C + tl.arange(0, BLOCK_C)
        last = tl.minimum(S + ((block - patches + 1) * BLOCK_C - 1) // C + 1, T)
        _forward_rows(Q, K, V, Out, Lse, (T - S) * N + c, c < C * (T - S), S + c // C, last, T, q_row, k_row, v_row, out_row, scale,
                      BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)


@triton.jit
def _d_queries(dq, q, d_out, k, v, lse, delta, scale, mask, MASKED: tl.constexpr):
    p = tl.math.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    d_scores = p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq)


@triton.jit
def _d_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta, rows, there, frame, last, T, q_row, k_row, v_row, out_row, d_out_row, dq_row,
                  scale, natural, ROWS: tl.constexpr,
                  N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CONDITIONS: tl.constexpr):
    channels = tl.arange(0, D)
    q = _read(Q, rows, q_row, channels, there)
    d_out = _read(DOut, rows, d_out_row, channels, there)
    delta = tl.sum(_read(Out, rows, out_row, channels, there).to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(Delta + rows, delta, mask=there)
    lse = tl.load(Lse + rows, mask=there, other=float("inf"))
    dq = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, C * last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        seen = c < C * last
        k, v = _read(K, T * N + c, k_row, channels, seen), _read(V, T * N + c, v_row, channels, seen)
        dq = _d_queries(dq, q, d_out, k, v, lse, delta, scale, (frame[:, None] >= (c // C)[None, :]) & seen[None, :], True)
    for start in range(0, N * last, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        k = tl.load(K + at[:, None] * k_row + channels[None, :])
        v = tl.load(V + at[:, None] * v_row + channels[None, :])
        dq = _d_queries(dq, q, d_out, k, v, lse, delta, scale, (frame >= start // N)[:, None], CONDITIONS)
    tl.store(DQ + rows[:, None] * dq_row + channels[None, :], (dq * natural).to(DQ.dtype.element_ty), mask=there[:, None])


@triton.jit
def backward_queries(Q, K, V, Out, DOut, DQ, Lse, Delta, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                     out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row, dq_batch, dq_head, dq_row, H, T, S, scale, natural,
                     N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """DQ, and Delta [B, H, rows of Q] = the sum of Out * DOut over channels. natural: the scale without log2(e)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    Q += b * q_batch + h * q_head
    K += b * k_batch + h * k_head
    V += b * v_batch + h * v_head
    Out += b * out_batch + h * out_head
    DOut += b * d_out_batch + h * d_out_head
    DQ += b * dq_batch + h * dq_head
    Lse += (b * H + h) * (T - S) * (N + C)
    Delta += (b * H + h) * (T - S) * (N + C)
    patches = (T - S) * N // BLOCK
    if block < patches:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        _d_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta, rows, rows >= 0, S + rows // N, S + block * BLOCK // N + 1, T, q_row, k_row, v_row,
                      out_row, d_out_row, dq_row, scale, natural, BLOCK, N, C, D, BLOCK, BLOCK_C, False)
    else:
        c = (block - patches) * BLOCK_C + tl.arange(0, BLOCK_C)
        last = tl.minimum(S + ((block - patches + 1) * BLOCK_C - 1) // C + 1, T)
        _d_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta, (T - S) * N + c, c < C * (T - S), S + c // C, last, T, q_row, k_row, v_row,
                      out_row, d_out_row, dq_row, scale, natural, BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)


@triton.jit
def _d_keys(dk, dv, k, v, q, d_out, lse, delta, scale, mask, MASKED: tl.constexpr):
    p = tl.math.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])                     # [keys, queries]
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dv = tl.dot(p.to(d_out.dtype), d_out, dv)
    d_scores = p * (tl.dot(v, tl.trans(d_out)) - delta[None, :])
    return tl.dot(d_scores.to(q.dtype), q, dk), dv


@triton.jit
def _d_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, rows, there, frame, first, T, S, q_row, k_row, v_row, d_out_row, dk_row, dv_row,
                scale, natural, ROWS: tl.constexpr,
                N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CONDITIONS: tl.constexpr):
    """Rows of keys of frames `frame`, none earlier than first."""
    channels = tl.arange(0, D)
    k, v = _read(K, rows, k_row, channels, there), _read(V, rows, v_row, channels, there)
    dk = tl.zeros([ROWS, D], tl.float32)
    dv = tl.zeros([ROWS, D], tl.float32)
    first, steps = tl.maximum(first - S, 0), T - S                                      # of the queries
    for start in range(C * first // BLOCK_C * BLOCK_C, C * steps, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at, seeing = steps * N + c, c < C * steps
        q, d_out = _read(Q, at, q_row, channels, seeing), _read(DOut, at, d_out_row, channels, seeing)
        lse = tl.load(Lse + at, mask=seeing, other=float("inf"))                        # exp2(-inf) = 0
        delta = tl.load(Delta + at, mask=seeing, other=0.0)
        dk, dv = _d_keys(dk, dv, k, v, q, d_out, lse, delta, scale, frame[:, None] <= S + (c // C)[None, :], True)
    for start in range(first * N, steps * N, BLOCK):
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        q = tl.load(Q + at[:, None] * q_row + channels[None, :])
        d_out = tl.load(DOut + at[:, None] * d_out_row + channels[None, :])
        dk, dv = _d_keys(dk, dv, k, v, q, d_out, tl.load(Lse + at), tl.load(Delta + at), scale, (frame <= S + start // N)[:, None], CONDITIONS)
    tl.store(DK + rows[:, None] * dk_row + channels[None, :], (dk * natural).to(DK.dtype.element_ty), mask=there[:, None])
    tl.store(DV + rows[:, None] * dv_row + channels[None, :], dv.to(DV.dtype.element_ty), mask=there[:, None])


@triton.jit
def backward_keys(Q, K, V, DOut, DK, DV, Lse, Delta, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                  d_out_batch, d_out_head, d_out_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, H, T, S, scale, natural,
                  N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """DK and DV; after `backward_queries`, which writes Delta."""
    block = tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    Q += b * q_batch + h * q_head
    K += b * k_batch + h * k_head
    V += b * v_batch + h * v_head
    DOut += b * d_out_batch + h * d_out_head
    DK += b * dk_batch + h * dk_head
    DV += b * dv_batch + h * dv_head
    Lse += (b * H + h) * (T - S) * (N + C)
    Delta += (b * H + h) * (T - S) * (N + C)
    conditions = tl.cdiv(C * T, BLOCK_C)
    if block < conditions:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        _d_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, T * N + c, c < C * T, c // C, block * BLOCK_C // C, T, S, q_row, k_row, v_row,
                    d_out_row, dk_row, dv_row, scale, natural, BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)
    else:
        rows = (block - conditions) * BLOCK + tl.arange(0, BLOCK)
        _d_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, rows, rows >= 0, rows // N, (block - conditions) * BLOCK // N, T, S, q_row, k_row, v_row,
                    d_out_row, dk_row, dv_row, scale, natural, BLOCK, N, C, D, BLOCK, BLOCK_C, False)
