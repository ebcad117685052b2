"""The GPU memory budget: train within --memory=GIB, and say what to change when memory runs out.

    cfg = memory.cap_gpu_memory(cfg, device)            # PyTorch may not allocate more
    cfg, picked = memory.choose_micro_batch(cfg)        # micro-batch and checkpointing that fit
"""
import os
from dataclasses import replace

import torch

import model


GIB = 2 ** 30

# Share of the budget that `estimate` may fill: the rest goes to fragmentation and to workspaces
# that cuBLAS allocates as it needs them.
USABLE_SHARE = 0.92
# Largest micro-batch to choose, in clips: larger ones hardly gain. On an H100, 4 clips from latents
# take 23.5 ms each and 8 take 23.0.
MAX_CLIPS = 8

# Measured on an H100 with ViT-g in bf16 (python -m bench.speed), and so chosen that `estimate` is
# never below the measured peak. Widths: numbers per token in multiples of the network's width.
BLOCK_WIDTHS = 12           # widths that a compiled block of the predictor keeps for backward
PLAIN_BLOCK_WIDTHS = 28     # widths that a plain one keeps (--compile=false): LoRA's inputs too
ENCODER_WIDTHS = 14         # widths in use inside one block of the encoder, which keeps nothing
LATENT_BYTES = 24           # bytes per number of the latents, for all that has their shape
OVERHEAD = 0.6 * GIB        # bytes, whatever the sizes: workspaces of the libraries


def cap_gpu_memory(cfg, device):
    """Limits PyTorch to cfg.memory GiB of the GPU; 0 is no limit.

    Returns cfg, with memory lowered to what the card has: cards sold with 16 GB have 14.6 GiB."""
    if device.type != "cuda" or not cfg.memory:
        return cfg
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    cfg = replace(cfg, memory=min(cfg.memory, total))
    torch.cuda.set_per_process_memory_fraction(cfg.memory / total, device)
    return cfg


def estimate(cfg, clips, checkpointing, compiled=True):
    """Peak bytes of training with micro-batches of `clips` clips, from the sizes alone.

    checkpointing: whether blocks are recomputed in the backward pass. Both are arguments, whatever
    cfg says, so that choices can be compared. At most 20 % above the measured peaks."""
    size = model.resolve_size(cfg.model.size)
    T, N = cfg.data.clip_frames, (size["image_size"] // 16) ** 2
    D, P, depth = size["encoder_dim"], size["predictor_dim"], size["predictor_depth"]
    item = 4 if cfg.precision == "fp32" else 2              # bytes of a number
    from_frames = not cfg.data.latents                      # the encoder is in memory

    encoder, predictor = (sum(p.numel() for p in network.parameters())
                          for network in model.empty_networks(cfg.model.size))
    # fast/ keeps a merged copy of a block's adapted matrices, which have 3 + 1 + 4 + 4 = 12 P².
    merged = 12 * depth * P ** 2 if compiled else 0
    weights = item * (predictor + merged + (encoder if from_frames else 0))
    # Weights, gradients and Adam's two moments in float32: 16 bytes. The inputs and outputs of the
    # four matrices have 16 P together, rounded up to 18.
    adapters = 16 * depth * cfg.lora.rank * 18 * P

    # Teacher forcing, then each further step of the rollout, which takes one frame at a time.
    tokens = clips * (N + 2) * (T - 1 + max(0, cfg.rollout - 1))
    width = tokens * P * item
    block = width * (BLOCK_WIDTHS if compiled else PLAIN_BLOCK_WIDTHS)
    if checkpointing:
        # The inputs of all blocks, and one block at a time that is being recomputed.
        activations = width * depth + block
    else:
        activations = block * depth

    bytes_per_latent = LATENT_BYTES + (ENCODER_WIDTHS * item if from_frames else 0)
    latents = clips * T * N * D * bytes_per_latent
    return weights + adapters + activations + latents + OVERHEAD


def choose_micro_batch(cfg, compiled=True):
    """The largest micro-batch that fits into cfg.memory GiB, at the same number of clips per step.

    Without activation checkpointing, which costs time, if two clips fit so (one, if a step has only
    one); else with it. Returns (cfg, what was chosen and why), or (cfg, "") without a budget.
    Raises ValueError with the cure if not even one clip with checkpointing fits."""
    if not cfg.memory:
        return cfg, ""
    clips = cfg.batch_size * cfg.grad_accum
    sizes = [n for n in range(MAX_CLIPS, 0, -1) if clips % n == 0]
    choices = [(n, False) for n in sizes if n > 1 or clips == 1] + [(n, True) for n in sizes]
    for n, checkpointing in choices:
        need = estimate(cfg, n, checkpointing, compiled) / GIB
        if need <= USABLE_SHARE * cfg.memory:
            picked = (f"--batch_size={n} --grad_accum={clips // n} "
                      f"--activation_checkpointing={str(checkpointing).lower()}")
            cfg = replace(cfg, batch_size=n, grad_accum=clips // n,
                          activation_checkpointing=checkpointing)
            return cfg, f"--memory={cfg.memory:g}: picked {picked}, about {need:.1f} GiB"
    # The last choice was the smallest one.
    raise ValueError(f"--memory={cfg.memory:g}: one clip of {cfg.data.clip_frames} frames needs "
                     f"about {need:.1f} GiB; {advice(cfg, least=True)}")


def advice(cfg, least=False):
    """Which setting to change when memory runs out, the cheapest first.

    least: the micro-batch is one clip with checkpointing already, whatever cfg says."""
    clips = cfg.batch_size * cfg.grad_accum
    options = []
    if cfg.batch_size > 1 and not least:
        half = cfg.batch_size // 2
        options.append(f"--batch_size={half} --grad_accum={clips // half}")
    if not cfg.activation_checkpointing and not least:
        options.append("--activation_checkpointing=true")
    if not cfg.data.latents:
        options.append("latents.py first, then --data.latents=FOLDER (no encoder in memory)")
    if cfg.data.clip_frames > 8:
        options.append(f"--data.clip_frames={cfg.data.clip_frames // 2}")
    return "use " + ", or ".join(options) if options else "use a card with more memory"


def out_of_memory(cfg, device, done):
    """One line for a torch.OutOfMemoryError: what was used, what to change, what is saved.

    done: the step of the newest checkpoint, 0 if there is none."""
    used = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0
    parts = [f"out of memory at {used:.1f} GiB with micro-batches of {cfg.batch_size}", advice(cfg)]
    if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):
        parts.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps a little")
    saved = f"step {done}, go on with --resume" if done else "none"
    return "; ".join([*parts, f"newest checkpoint: {saved}"])
