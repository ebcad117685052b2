"""How many operations the objective needs, whatever the implementation computes.

Counted are matrix products, forward and for the gradients of inputs (frozen weights have none), and
attention of those pairs of tokens that see each other, forward and, twice that, backward. Nothing
counts a second time for checkpointing, and the adapters' small products not at all.
"""
import model
from vjepa2_src.predictor import N_COND


def flops_per_clip(cfg, from_frames):
    """Of the objective, forward and backward, for one clip; with the encoder if from frames."""
    size = model.resolve_size(cfg.model.size)
    _, predictor = model.empty_networks(cfg.model.size)
    T, P, depth = cfg.data.clip_frames, size["predictor_dim"], size["predictor_depth"]
    tokens = predictor.grid ** 2 + N_COND                       # of a time step
    # The blocks, and the layers from the encoder's width to the predictor's and back.
    matrices = block_weights(predictor.predictor_blocks) + 2 * size["encoder_dim"] * P
    # (time steps computed, pairs of time steps of which one sees the other): teacher forcing, then
    # each further step of the rollout.
    passes = [(T - 1, T * (T - 1) / 2)] + [(1, n) for n in range(2, cfg.rollout + 1)]
    total = 0.0
    for steps, pairs in passes:
        # Q Kᵀ and the sum over values: 4 operations for each pair of tokens and channel. The
        # backward pass takes twice as many as the forward pass.
        total += 3 * 4 * pairs * tokens ** 2 * P * depth
        # 2 for each weight and token, forward and again for the gradient of the inputs.
        total += 2 * 2 * steps * tokens * matrices
    return total + (T * encode_flops(cfg) if from_frames else 0)


def encode_flops(cfg):
    """Of the encoder, for one frame."""
    size = model.resolve_size(cfg.model.size)
    encoder, _ = model.empty_networks(cfg.model.size)
    N = encoder.grid ** 2
    matrices = sum(p.numel() for p in encoder.parameters() if p.ndim > 1)
    return 2 * N * matrices + 4 * N * N * size["encoder_dim"] * size["encoder_depth"]


def predict_flops(cfg):
    """Of the predictor, forward, for one frame of context; without an adapter's."""
    size = model.resolve_size(cfg.model.size)
    _, predictor = model.empty_networks(cfg.model.size)
    P, tokens = size["predictor_dim"], predictor.grid ** 2 + N_COND
    matrices = block_weights(predictor.predictor_blocks) + 2 * size["encoder_dim"] * P
    return 2 * tokens * matrices + 4 * tokens ** 2 * P * size["predictor_depth"]


def block_weights(blocks):
    """Numbers in the matrices of a network's blocks."""
    return sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
