"""Triton kernels of frame-causal attention, forward and backward; fully masked blocks are skipped.

fast/attention.py calls these. A token sees its own frame and all earlier ones (arXiv:2506.09985).
The method is FlashAttention-2 (arXiv:2307.08691): the softmax is taken over one block of keys after
the other, with a running maximum and sum, so the scores of all pairs are never in memory at once.

The tokens of one head, as rows of K and V: T frames of N patches, then C action and state tokens
for each of the T frames.

    0         N        2N            T N          T N + C      T N + 2C       T (N + C)
    +---------+---------+-- ... ------+------------+------------+-- ... --------+
    | patches | patches |             | action and | action and |               |
    | frame 0 | frame 1 |             | state of 0 | state of 1 |               |
    +---------+---------+-- ... ------+------------+------------+-- ... --------+

Q, Out and all that has the shape of Q lie likewise, but without the first S frames: their keys and
values come from a KV cache, and nothing is computed for them.

N is a multiple of BLOCK, so a block of patches belongs to one frame, and of two such blocks one
sees the other whole or not at all. Only the few action and state tokens need a mask.

The grid is (blocks of rows, B * H). A program takes BLOCK rows of patches, or BLOCK_C rows of
action and state tokens, of one head, and loops over the blocks that its rows see. Capitals Q, K, …
are pointers to tensors, small letters q, k, … are tiles in registers. Strides (q_batch, q_head,
q_row) count elements; the D channels of a head lie side by side.

Scores are kept in base 2: exp2 is an instruction of the GPU, and exp would be exp2 after one more
multiplication. The caller multiplies log2(e) into scale_log2 instead.
"""
import triton
import triton.language as tl


# Forward

@triton.jit
def forward(Q, K, V, Out, Lse,
            q_batch, q_head, q_row, k_batch, k_head, k_row,
            v_batch, v_head, v_row, out_batch, out_head, out_row,
            H, T, S, scale_log2,
            N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
            BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes Out = softmax(scale * Q Kᵀ) V, of the shape of Q, and Lse for the backward pass.

    Lse [B, H, rows of Q] float32 = log2(sum(exp2(scale_log2 * Q Kᵀ))), with scale_log2 = scale *
    log2(e)."""
    # Programs start in the order of their index. The last rows see the most keys; started last,
    # they would keep a few multiprocessors busy while the others have nothing left to do.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = _batch_and_head(H)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    Out += batch * out_batch + head * out_head
    Lse += (batch * H + head) * (T - S) * (N + C)

    patch_blocks = (T - S) * N // BLOCK
    if block < patch_blocks:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        # Patches fill whole blocks: every row is valid.
        _forward_rows(Q, K, V, Out, Lse, rows, rows >= 0,
                      S + rows // N, S + block * BLOCK // N + 1, T,
                      q_row, k_row, v_row, out_row, scale_log2,
                      BLOCK, N, C, D, BLOCK, BLOCK_C, False)
    else:
        tokens = (block - patch_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        end_frame = tl.minimum(S + ((block - patch_blocks + 1) * BLOCK_C - 1) // C + 1, T)
        _forward_rows(Q, K, V, Out, Lse, (T - S) * N + tokens, tokens < C * (T - S),
                      S + tokens // C, end_frame, T,
                      q_row, k_row, v_row, out_row, scale_log2,
                      BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)


@triton.jit
def _forward_rows(Q, K, V, Out, Lse, rows, valid, frames, end_frame, T,
                  q_row, k_row, v_row, out_row, scale_log2,
                  ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, SEVERAL_FRAMES: tl.constexpr):
    """Attention of the queries in `rows`, of which those that are `valid` exist.

    frames: the frame of each row, all before end_frame. SEVERAL_FRAMES: rows are of more than one
    frame (action and state tokens), so that patches need a mask, too."""
    channels = tl.arange(0, D)
    q = _load_rows(Q, rows, q_row, channels, valid)                             # [ROWS, D]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)

    # The tokens of frame 0, which all rows see, come first: from then on row_max is finite, and
    # -inf - -inf = nan cannot occur where a later block is masked for a row.
    for start in range(0, C * end_frame, BLOCK_C):
        tokens = start + tl.arange(0, BLOCK_C)
        in_range = tokens < C * end_frame
        k = _load_rows(K, T * N + tokens, k_row, channels, in_range)            # [BLOCK_C, D]
        v = _load_rows(V, T * N + tokens, v_row, channels, in_range)
        visible = (frames[:, None] >= (tokens // C)[None, :]) & in_range[None, :]
        out, row_max, row_sum = _attend(out, row_max, row_sum, q, k, v, scale_log2, visible, True)

    for start in range(0, N * end_frame, BLOCK):
        patches = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        k = tl.load(K + patches[:, None] * k_row + channels[None, :])           # [BLOCK, D]
        v = tl.load(V + patches[:, None] * v_row + channels[None, :])
        visible = (frames >= start // N)[:, None]
        out, row_max, row_sum = _attend(out, row_max, row_sum, q, k, v, scale_log2, visible,
                                        SEVERAL_FRAMES)

    tl.store(Out + rows[:, None] * out_row + channels[None, :],
             (out / row_sum[:, None]).to(Out.dtype.element_ty), mask=valid[:, None])
    tl.store(Lse + rows, row_max + tl.math.log2(row_sum), mask=valid)


@triton.jit
def _attend(out, row_max, row_sum, q, k, v, scale_log2, visible, MASKED: tl.constexpr):
    """Adds one block of keys to the running output, maximum and sum of exponentials of the rows.

    `out` is divided by the sum at the very end, not after each block (FlashAttention-2)."""
    scores = tl.dot(q, tl.trans(k))                                             # [rows, keys]
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.math.exp2(scores * scale_log2 - new_max[:, None])
    # What was summed up so far was relative to the maximum before.
    rescale = tl.math.exp2(row_max - new_max)
    out = tl.dot(p.to(v.dtype), v, out * rescale[:, None])
    return out, new_max, row_sum * rescale + tl.sum(p, 1)


# Backward: the gradient of the queries
#
# One pass over the rows of Q gives DQ, another one over the rows of K gives DK and DV. A single
# pass would have to add to one of them from many programs at once.

@triton.jit
def backward_queries(Q, K, V, Out, DOut, DQ, Lse, Delta,
                     q_batch, q_head, q_row, k_batch, k_head, k_row,
                     v_batch, v_head, v_row, out_batch, out_head, out_row,
                     d_out_batch, d_out_head, d_out_row, dq_batch, dq_head, dq_row,
                     H, T, S, scale_log2, scale,
                     N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                     BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes DQ, and Delta [B, H, rows of Q] float32 = sum(Out * DOut) over the channels.

    scale_log2 = scale * log2(e), as in `forward`; scale is that of the softmax."""
    # As in `forward`, the rows that see the most start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = _batch_and_head(H)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    Out += batch * out_batch + head * out_head
    DOut += batch * d_out_batch + head * d_out_head
    DQ += batch * dq_batch + head * dq_head
    Lse += (batch * H + head) * (T - S) * (N + C)
    Delta += (batch * H + head) * (T - S) * (N + C)

    patch_blocks = (T - S) * N // BLOCK
    if block < patch_blocks:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        _backward_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta, rows, rows >= 0,
                             S + rows // N, S + block * BLOCK // N + 1, T,
                             q_row, k_row, v_row, out_row, d_out_row, dq_row, scale_log2, scale,
                             BLOCK, N, C, D, BLOCK, BLOCK_C, False)
    else:
        tokens = (block - patch_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        end_frame = tl.minimum(S + ((block - patch_blocks + 1) * BLOCK_C - 1) // C + 1, T)
        _backward_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta,
                             (T - S) * N + tokens, tokens < C * (T - S),
                             S + tokens // C, end_frame, T,
                             q_row, k_row, v_row, out_row, d_out_row, dq_row, scale_log2, scale,
                             BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)


@triton.jit
def _backward_query_rows(Q, K, V, Out, DOut, DQ, Lse, Delta, rows, valid, frames, end_frame, T,
                         q_row, k_row, v_row, out_row, d_out_row, dq_row, scale_log2, scale,
                         ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                         BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, SEVERAL_FRAMES: tl.constexpr):
    """DQ and Delta of `rows`; arguments as for `_forward_rows`."""
    channels = tl.arange(0, D)
    q = _load_rows(Q, rows, q_row, channels, valid)                             # [ROWS, D]
    d_out = _load_rows(DOut, rows, d_out_row, channels, valid)
    out = _load_rows(Out, rows, out_row, channels, valid)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)                # [ROWS]
    tl.store(Delta + rows, delta, mask=valid)
    # Rows that do not exist get p = exp2(-inf) = 0.
    lse = tl.load(Lse + rows, mask=valid, other=float("inf"))
    dq = tl.zeros([ROWS, D], tl.float32)

    for start in range(0, C * end_frame, BLOCK_C):
        tokens = start + tl.arange(0, BLOCK_C)
        in_range = tokens < C * end_frame
        k = _load_rows(K, T * N + tokens, k_row, channels, in_range)            # [BLOCK_C, D]
        v = _load_rows(V, T * N + tokens, v_row, channels, in_range)
        visible = (frames[:, None] >= (tokens // C)[None, :]) & in_range[None, :]
        dq = _add_to_dq(dq, q, d_out, k, v, lse, delta, scale_log2, visible, True)

    for start in range(0, N * end_frame, BLOCK):
        patches = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        k = tl.load(K + patches[:, None] * k_row + channels[None, :])           # [BLOCK, D]
        v = tl.load(V + patches[:, None] * v_row + channels[None, :])
        visible = (frames >= start // N)[:, None]
        dq = _add_to_dq(dq, q, d_out, k, v, lse, delta, scale_log2, visible, SEVERAL_FRAMES)

    tl.store(DQ + rows[:, None] * dq_row + channels[None, :],
             (dq * scale).to(DQ.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _add_to_dq(dq, q, d_out, k, v, lse, delta, scale_log2, visible, MASKED: tl.constexpr):
    """dq plus the part of one block of keys; its factor `scale` is left to the end."""
    # Probabilities are computed anew from Lse: reading them would take longer.
    p = tl.math.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])        # [rows, keys]
    if MASKED:
        p = tl.where(visible, p, 0.0)
    d_scores = p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq)


# Backward: the gradients of the keys and values

@triton.jit
def backward_keys(Q, K, V, DOut, DK, DV, Lse, Delta,
                  q_batch, q_head, q_row, k_batch, k_head, k_row,
                  v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
                  dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
                  H, T, S, scale_log2, scale,
                  N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes DK and DV; runs after `backward_queries`, which writes Delta."""
    # The first keys are seen by the most queries. They start first, in the order of the index; the
    # action and state tokens come before the patches.
    block = tl.program_id(0)
    batch, head = _batch_and_head(H)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    DOut += batch * d_out_batch + head * d_out_head
    DK += batch * dk_batch + head * dk_head
    DV += batch * dv_batch + head * dv_head
    Lse += (batch * H + head) * (T - S) * (N + C)
    Delta += (batch * H + head) * (T - S) * (N + C)

    token_blocks = tl.cdiv(C * T, BLOCK_C)
    if block < token_blocks:
        tokens = block * BLOCK_C + tl.arange(0, BLOCK_C)
        _backward_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, T * N + tokens, tokens < C * T,
                           tokens // C, block * BLOCK_C // C, T, S,
                           q_row, k_row, v_row, d_out_row, dk_row, dv_row, scale_log2, scale,
                           BLOCK_C, N, C, D, BLOCK, BLOCK_C, True)
    else:
        rows = (block - token_blocks) * BLOCK + tl.arange(0, BLOCK)
        _backward_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, rows, rows >= 0,
                           rows // N, (block - token_blocks) * BLOCK // N, T, S,
                           q_row, k_row, v_row, d_out_row, dk_row, dv_row, scale_log2, scale,
                           BLOCK, N, C, D, BLOCK, BLOCK_C, False)


@triton.jit
def _backward_key_rows(Q, K, V, DOut, DK, DV, Lse, Delta, rows, valid, frames, first_frame, T, S,
                       q_row, k_row, v_row, d_out_row, dk_row, dv_row, scale_log2, scale,
                       ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                       BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, SEVERAL_FRAMES: tl.constexpr):
    """DK and DV of the keys in `rows`, of which those that are `valid` exist.

    frames: the frame of each row, none before first_frame; else as for `_forward_rows`."""
    channels = tl.arange(0, D)
    k = _load_rows(K, rows, k_row, channels, valid)                             # [ROWS, D]
    v = _load_rows(V, rows, v_row, channels, valid)
    dk = tl.zeros([ROWS, D], tl.float32)
    dv = tl.zeros([ROWS, D], tl.float32)
    # Frames are now counted as the queries lie: the first is frame S.
    first_frame = tl.maximum(first_frame - S, 0)
    q_frames = T - S

    # The loop starts at a multiple of BLOCK_C, maybe a few tokens too early: these are masked.
    for start in range(C * first_frame // BLOCK_C * BLOCK_C, C * q_frames, BLOCK_C):
        tokens = start + tl.arange(0, BLOCK_C)
        q_rows = q_frames * N + tokens
        in_range = tokens < C * q_frames
        q = _load_rows(Q, q_rows, q_row, channels, in_range)                    # [BLOCK_C, D]
        d_out = _load_rows(DOut, q_rows, d_out_row, channels, in_range)
        # Queries that do not exist get p = exp2(-inf) = 0.
        lse = tl.load(Lse + q_rows, mask=in_range, other=float("inf"))
        delta = tl.load(Delta + q_rows, mask=in_range, other=0.0)
        visible = frames[:, None] <= S + (tokens // C)[None, :]
        dk, dv = _add_to_dk_dv(dk, dv, k, v, q, d_out, lse, delta, scale_log2, visible, True)

    for start in range(first_frame * N, q_frames * N, BLOCK):
        patches = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        q = tl.load(Q + patches[:, None] * q_row + channels[None, :])           # [BLOCK, D]
        d_out = tl.load(DOut + patches[:, None] * d_out_row + channels[None, :])
        lse = tl.load(Lse + patches)
        delta = tl.load(Delta + patches)
        visible = (frames <= S + start // N)[:, None]
        dk, dv = _add_to_dk_dv(dk, dv, k, v, q, d_out, lse, delta, scale_log2, visible,
                               SEVERAL_FRAMES)

    tl.store(DK + rows[:, None] * dk_row + channels[None, :],
             (dk * scale).to(DK.dtype.element_ty), mask=valid[:, None])
    tl.store(DV + rows[:, None] * dv_row + channels[None, :],
             dv.to(DV.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _add_to_dk_dv(dk, dv, k, v, q, d_out, lse, delta, scale_log2, visible, MASKED: tl.constexpr):
    """dk and dv plus the parts of one block of queries; dk's factor `scale` is left to the end."""
    # Transposed, [keys, queries], so that each product below takes p or d_scores as it is.
    p = tl.math.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(d_out.dtype), d_out, dv)
    d_scores = p * (tl.dot(v, tl.trans(d_out)) - delta[None, :])
    return tl.dot(d_scores.to(q.dtype), q, dk), dv


# Shared

@triton.jit
def _batch_and_head(H):
    """The batch index and head of this program, int64: a large batch has over 2^31 elements."""
    return (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)


@triton.jit
def _load_rows(X, rows, stride, channels, valid):
    """[rows, D] of X, zeros in rows that are not valid."""
    return tl.load(X + rows[:, None] * stride + channels[None, :], mask=valid[:, None], other=0.0)
