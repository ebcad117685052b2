"""Speed and memory, and nothing else: faster parts for the plain networks.

    fast.accelerate(world, cfg)             # in place; compiled, with kernels where they can run
    fast.restore(world)                     # the plain networks again

`accelerate` changes the classes of modules (PLAIN_TO_FAST below) and compiles the blocks. Weights,
names and state dicts stay as they are, and so do results, to rounding: before anything is compiled,
check.py compares both kinds, gradients included, and a difference raises an error. A change in the
plain code is thus not ignored silently. Forward hooks on modules inside the predictor are not
called where several modules are computed as one.

Without this folder everything but --memory runs, more slowly: train.py, latents.py and energy.py
import it only where `model.can_accelerate` says so.
"""
from contextlib import contextmanager

import torch

import lora
import model
from fast import check, networks
from fast.compiler import CUDAGraph, compile_blocks
from fast.merged_lora import MergedLoRALinear, drop_merged, write_merged
from vjepa2_src.blocks import MLP, Attention, Block
from vjepa2_src.predictor import Predictor


__all__ = ["CUDAGraph", "accelerate", "differences", "restore"]

PLAIN_TO_FAST = {
    model.WorldModel: networks.FastWorldModel, Predictor: networks.FastPredictor,
    Block: networks.FastBlock, Attention: networks.FastAttention, MLP: networks.FastMLP,
    lora.LoRALinear: MergedLoRALinear,
}
FAST_TO_PLAIN = {fast: plain for plain, fast in PLAIN_TO_FAST.items()}

# Relative differences of predictions (L2) and of losses, in which rounding averages out, that count
# as rounding. Measured at full size on an H100 in bf16: 0.009 and 8e-6.
TOLERANCE = {torch.bfloat16: (0.05, 5e-3), torch.float16: (0.02, 1e-3), torch.float32: (1e-4, 1e-4)}


def accelerate(world, cfg, compiled=True):
    """Makes a `WorldModel` fast, in place. Its weights must be loaded; adapters may be there or
    come later. cfg: activation_checkpointing, rollout. compiled=False: leaves out the compiler.

    Raises ValueError, with the world left plain, if the fast parts compute something else than the
    plain ones, or do not know a class in it."""
    for module in world.modules():
        for plain in PLAIN_TO_FAST:
            if isinstance(module, plain) and type(module) not in (plain, PLAIN_TO_FAST[plain]):
                raise ValueError(f"fast/ does not know {type(module).__name__}, a subclass of "
                                 f"{plain.__name__}; use --compile=false")
    check.check_code(_fast, max(2, cfg.rollout))
    _swap(world, PLAIN_TO_FAST)
    for block in world.predictor.predictor_blocks:
        vars(block).pop("forward", None)        # what model.checkpoint_activations put there
    world.predictor.activation_checkpointing = cfg.activation_checkpointing
    try:
        _check_precision(world, cfg.rollout)
    except ValueError:
        restore(world)
        raise
    if not compiled:
        return
    compile_blocks(world.predictor.predictor_blocks)
    if world.encoder is not None:
        compile_blocks(world.encoder.blocks)
    for name in ("l1_and_l2", "l1_of_raw", "layer_norm"):
        setattr(world, name, torch.compile(getattr(world, name), dynamic=False))
    world.predictor.write_merged = torch.compile(write_merged, dynamic=False)


def restore(world):
    """Takes the fast parts out again, in place: the plain networks, not compiled."""
    _swap(world, FAST_TO_PLAIN)
    for module in world.modules():
        if isinstance(module, lora.LoRALinear):
            drop_merged(module)
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
    for name in ("l1_and_l2", "l1_of_raw", "layer_norm"):
        vars(world).pop(name, None)
    for name in ("activation_checkpointing", "write_merged", "merges"):
        vars(world.predictor).pop(name, None)


def differences(world, rollout):
    """Relative differences of an accelerated world to the plain one: `check.differences`."""
    return check.differences(world, rollout, _plain)


def _check_precision(world, rollout):
    """Raises ValueError if the differences are larger than rounding explains."""
    outputs, losses = TOLERANCE[world.predictor.predictor_norm.weight.dtype]
    for name, difference in differences(world, rollout).items():
        limit = outputs if name in ("latents", "predictions") else losses
        if not difference <= limit:
            raise ValueError(f"fast/ is too far from the plain networks: {name} differ by "
                             f"{difference:.1e} (rounding: under {limit:.0e}); report this, and "
                             "use --compile=false")


def _swap(world, classes):
    """Changes the class of each module that `classes` names. A fast block of the predictor passes
    keys and values on, so of the encoder only the MLPs are changed."""
    in_encoder = set() if world.encoder is None else set(world.encoder.modules())
    for module in world.modules():
        is_mlp = isinstance(module, MLP)
        if type(module) in classes and (is_mlp or module not in in_encoder):
            module.__class__ = classes[type(module)]


@contextmanager
def _fast(world):
    _swap(world, PLAIN_TO_FAST)
    try:
        yield
    finally:
        restore(world)


@contextmanager
def _plain(world):
    _swap(world, FAST_TO_PLAIN)
    try:
        yield
    finally:
        _swap(world, PLAIN_TO_FAST)
