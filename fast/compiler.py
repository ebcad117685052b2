"""What makes it fast on a large GPU and fit on a small one: compiled blocks, CUDA graphs, a memory budget.

    if speed.compiles(cfg, device):
        write_folded = speed.compile_world(world)       # in place
    work = speed.Graphed(work, parameters)              # forward and backward as one launch
    cfg, text = speed.fit(cfg)                          # micro-batch and checkpointing for --memory=GIB
"""
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import torch

import folded
import model
from vjepa2_src.attention import has_triton

GIB = 2 ** 30
ROOM = 0.92         # of the budget: the rest is for cuBLAS's workspaces and what fragments
# Measured (bench.py, ViT-g): per token and block of the predictor, in widths of its dtype, compiled and not; bytes per number of
# the latents; widths per token inside an encoder's block; workspaces.
BLOCK, BLOCK_EAGER, LATENT, ENCODER, REST = 12, 20, 24, 14, 0.6 * GIB


def compiles(cfg, device):
    """Whether blocks are compiled: asked for, on a GPU, and Triton is there."""
    return cfg.compile and not cfg.debug and device.type == "cuda" and has_triton()


def compile_blocks(blocks):
    """Compiles each block, in place; one compilation serves all blocks of a shape."""
    _prepare_compiler()
    for block in blocks:
        block.compile(dynamic=False)


@lru_cache
def _prepare_compiler():
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V
    dynamo = torch._dynamo.config
    setattr(dynamo, "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit", 64)   # shapes in one process
    # Layer norms are computed again in the backward pass, not kept; below 0.85 attention would be too.
    torch._functorch.config.activation_memory_budget = 0.9
    # Rows of up to 2,048 numbers are normed in one go, as those of up to 1,024 are, instead of read twice: the encoder's have 1,408.
    default = getattr(InductorChoices, "should_use_persistent_reduction", None)

    def in_one_go(features, *args, **options):
        return default(features, *args, **options) or (features.get_reduction_hint() == ReductionHint.INNER
                                                       and V.graph.sizevars.statically_known_leq(features.reduction_numel, 2048))
    if default:                                     # not a public name
        InductorChoices.should_use_persistent_reduction = staticmethod(in_one_go)


def compile_world(world):
    """Compiles the blocks and the error of a world model, in place -> `folded.write_folded` compiled, for `lora.fold`."""
    for blocks in (world.predictor.predictor_blocks, world.encoder.blocks if world.encoder else ()):
        compile_blocks(blocks)
    world.error = torch.compile(model.error, dynamic=False)
    return torch.compile(folded.write_folded, dynamic=False)


def eager():
    """Compiled blocks run uncompiled inside: for what is done too seldom, or in too many shapes, to be worth compiling."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Graphed:
    """Forward and backward of a micro-batch as one CUDA graph: launching its kernels one by one takes longer than they run.

    work(batch) -> {name: scalar tensor}, and adds to the parameters' gradients; batch: {name: tensor on the host, page-locked},
    each call of the shapes of the first. Gradients must stay where they are: zero_grad(set_to_none=False)."""

    def __init__(self, work, parameters):
        self.work, self.parameters, self.graph = work, parameters, None

    def __call__(self, batch):
        if self.graph is None:
            self._capture(batch)
        with torch.cuda.stream(self.side):              # copied from the host while the micro-batch before it is at work
            self.side.wait_event(self.taken)
            for name, value in batch.items():
                self.staged[name].copy_(value, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self.side)
        for name, value in self.staged.items():
            self.inputs[name].copy_(value)
        self.taken.record()
        self.graph.replay()
        return self.outputs

    def _capture(self, batch):
        random = torch.cuda.get_rng_state()
        self.inputs = {name: value.to(self.parameters[0].device) for name, value in batch.items()}
        self.staged = {name: torch.empty_like(value) for name, value in self.inputs.items()}
        self.side, self.taken = torch.cuda.Stream(), torch.cuda.Event()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):              # warm-up, as torch.cuda.graph asks for
            for _ in range(2):
                self.work(self.inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        for parameter in self.parameters:
            if parameter.grad is not None:              # None: adapts a layer that nothing uses
                parameter.grad.zero_()
        torch.cuda.empty_cache()                        # the graph has a pool of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):    # the loader's page-locks memory
            self.outputs = self.work(self.inputs)
        torch.cuda.set_rng_state(random)                # a resumed run draws the same numbers as an uninterrupted one


# Memory

def limit(cfg, device):
    """Holds PyTorch to cfg.memory GiB of the GPU -> cfg, with memory lowered to what the card has (16 GB cards have 14.6 GiB)."""
    if device.type != "cuda" or not cfg.memory:
        return cfg
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    cfg = replace(cfg, memory=min(cfg.memory, total))
    torch.cuda.set_per_process_memory_fraction(cfg.memory / total, device)
    return cfg


def free(cfg, device):
    """Bytes that may still be allocated: within cfg.memory if that is set."""
    on_card = torch.cuda.mem_get_info(device)[0]
    return min(on_card, cfg.memory * GIB - torch.cuda.memory_allocated(device)) if cfg.memory else on_card


def estimate(cfg, clips, checkpointing, compiled=True):
    """Peak bytes of training with micro-batches of `clips`, from the sizes alone; its constants are measured (bench.py)."""
    size = model.resolve_size(cfg.model.size)
    T, N = cfg.data.clip_frames, (size["image_size"] // 16) ** 2
    tokens = clips * (N + 2) * (T - 1 + max(0, cfg.rollout - 1))                # teacher forcing, then each further step of the rollout
    width, D, bytes_each = size["predictor_dim"], size["encoder_dim"], 4 if cfg.precision == "fp32" else 2
    encoder, predictor = (sum(p.numel() for p in part.parameters()) for part in model._empty(cfg.model.size))
    copies = 12 * size["predictor_depth"] * width ** 2                          # a second copy of the adapted matrices
    weights = bytes_each * (predictor + copies + (0 if cfg.data.latents else encoder))
    adapters = 16 * size["predictor_depth"] * cfg.lora.rank * 18 * width       # four linear layers: 9 widths in, 9 out
    one = tokens * width * bytes_each * (BLOCK if compiled else BLOCK_EAGER)     # what a block keeps for its backward pass
    kept = tokens * width * bytes_each * size["predictor_depth"] + one if checkpointing else one * size["predictor_depth"]
    latents = clips * T * N * D * (LATENT + (0 if cfg.data.latents else ENCODER * bytes_each))
    return weights + adapters + kept + latents + REST


def fit(cfg, compiled=True):
    """For cfg.memory: the largest micro-batch that fits at the same clips per step, without checkpointing if two clips do.

    -> (cfg, what was picked). Raises ValueError if not even one clip with checkpointing fits."""
    if not cfg.memory:
        return cfg, ""
    clips = cfg.batch_size * cfg.grad_accum
    sizes = [b for b in range(8, 0, -1) if clips % b == 0]
    for b, checkpointing in [(b, False) for b in sizes if b > 1 or clips == 1] + [(b, True) for b in sizes]:
        need = estimate(cfg, b, checkpointing, compiled) / GIB
        if need <= ROOM * cfg.memory:
            return (replace(cfg, batch_size=b, grad_accum=clips // b, activation_checkpointing=checkpointing),
                    f"--memory={cfg.memory:g}: picked --batch_size={b} --grad_accum={clips // b} "
                    f"--activation_checkpointing={str(checkpointing).lower()}, about {need:.1f} GiB")
    raise ValueError(f"--memory={cfg.memory:g}: one clip of {cfg.data.clip_frames} frames needs about {need:.1f} GiB; "
                     + advice(cfg, least=True))


def advice(cfg, least=False):
    """Which setting to change when memory runs out, the cheapest first."""
    clips = cfg.batch_size * cfg.grad_accum
    ways = []
    if cfg.batch_size > 1 and not least:
        ways.append(f"--batch_size={cfg.batch_size // 2} --grad_accum={clips // (cfg.batch_size // 2)}")
    if not cfg.activation_checkpointing and not least:
        ways.append("--activation_checkpointing=true")
    if not cfg.data.latents:
        ways.append("latents.py first, then --data.latents=FOLDER (no encoder in memory)")
    if cfg.data.clip_frames > 8:
        ways.append(f"--data.clip_frames={cfg.data.clip_frames // 2}")
    return "use " + ", or ".join(ways) if ways else "use a card with more memory"


def out_of_memory(cfg, device, done):
    """One line for a torch.OutOfMemoryError: what was used, what to change, what is safe."""
    used = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0
    fragments = "" if os.environ.get("PYTORCH_CUDA_ALLOC_CONF") else "; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps a little"
    return (f"out of memory at {used:.1f} GiB with micro-batches of {cfg.batch_size}; {advice(cfg)}{fragments}; "
            f"newest checkpoint: {f'step {done}, go on with --resume' if done else 'none'}")
