"""Speed and memory, and nothing else: faster parts for the plain networks.

    fast.accelerate(world, cfg)             # in place; compiled, with kernels where they can run
    fast.restore(world)                     # the plain networks again

`accelerate` changes the classes of modules (PLAIN_TO_FAST below) and compiles the blocks. Weights,
names and state dicts stay as they are, and so do results, to rounding: before anything is
compiled, both kinds compute the losses of a small random clip, and a difference beyond rounding
raises an error. A change in the plain networks or in the loss is thus never ignored silently.

Without this folder everything runs, more slowly: train.py, latents.py and energy.py import it only
where `model.can_accelerate` says so.
"""
from contextlib import contextmanager

import torch

import lora
import model
from fast import networks
from fast.compiler import CUDAGraph, compile_blocks, eager, prepare_compiler
from fast.merged_lora import MergedLoRALinear, unmerge, write_merged
from vjepa2_src.blocks import MLP, Attention, Block
from vjepa2_src.predictor import Predictor


__all__ = ["CUDAGraph", "accelerate", "eager", "restore"]

PLAIN_TO_FAST = {
    model.WorldModel: networks.FastWorldModel, Predictor: networks.FastPredictor,
    Block: networks.FastBlock, Attention: networks.FastAttention, MLP: networks.FastMLP,
    lora.LoRALinear: MergedLoRALinear,
}
FAST_TO_PLAIN = {fast: plain for plain, fast in PLAIN_TO_FAST.items()}

# Relative differences that still count as rounding: of a network's outputs (L2), and of losses, in
# which rounding averages out. A fault that random inputs can show is far above.
TOLERANCE = {torch.bfloat16: (0.05, 5e-3), torch.float16: (0.02, 1e-3), torch.float32: (1e-4, 1e-4)}


def accelerate(world, cfg, compiled=True):
    """Makes a `WorldModel` fast, in place. Its weights must be loaded; adapters may be there or
    come later. cfg: activation_checkpointing, rollout. compiled=False: leaves out the compiler.

    Raises ValueError if the fast parts compute something else than the plain ones."""
    _swap(world, PLAIN_TO_FAST)
    world.predictor.activation_checkpointing = cfg.activation_checkpointing
    _check(world, cfg.rollout)
    if not compiled:
        return
    prepare_compiler()
    compile_blocks(world.predictor.predictor_blocks)
    if world.encoder is not None:
        compile_blocks(world.encoder.blocks)
    for name in ("l1", "l1_of_raw", "layer_norm"):
        setattr(world, name, torch.compile(getattr(world, name), dynamic=False))
    world.predictor.write_merged = torch.compile(write_merged, dynamic=False)


def restore(world):
    """Takes the fast parts out again, in place: the plain networks, not compiled."""
    _swap(world, FAST_TO_PLAIN)
    for module in world.modules():
        if isinstance(module, lora.LoRALinear):
            unmerge(module)
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
    for name in ("l1", "l1_of_raw", "layer_norm"):
        vars(world).pop(name, None)
    for name in ("activation_checkpointing", "write_merged"):
        vars(world.predictor).pop(name, None)


def _swap(world, classes):
    """Changes the class of each module that `classes` names. A fast block of the predictor passes
    keys and values on, so of the encoder only the MLPs are changed."""
    in_encoder = set() if world.encoder is None else set(world.encoder.modules())
    for module in world.modules():
        is_mlp = isinstance(module, MLP)
        if type(module) in classes and (is_mlp or module not in in_encoder):
            module.__class__ = classes[type(module)]


@contextmanager
def _plain(world):
    _swap(world, FAST_TO_PLAIN)
    try:
        yield
    finally:
        _swap(world, PLAIN_TO_FAST)


def _check(world, rollout):
    """Raises ValueError if the fast parts compute something else than the plain ones."""
    outputs, losses = TOLERANCE[world.predictor.predictor_norm.weight.dtype]
    for name, difference in differences(world, rollout).items():
        if not difference <= (outputs if name in ("encoder", "predictions") else losses):
            raise ValueError(f"fast/ does not compute the {name} of the plain networks (model.py, "
                             "vjepa2_src/); follow the change in fast/networks.py, or use "
                             "--compile=false")


@torch.no_grad()
def differences(world, rollout):
    """Relative differences of an accelerated world to the plain one on a random clip, in training
    mode without dropout: {"encoder", "predictions" and each loss: float}; infinite for a loss that
    only one of them has."""
    predictor = world.predictor
    device, dtype = predictor.predictor_norm.weight.device, predictor.predictor_norm.weight.dtype
    random = torch.Generator().manual_seed(0)           # the run's own random stream is not touched

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(device)

    T, N, D = rollout + 2, predictor.grid ** 2, predictor.predictor_embed.in_features
    clip = model.layer_norm(normal(1, T, N, D)), 0.1 * normal(1, T, 7), normal(1, T, 7)
    pixels = predictor.grid * 16
    image = (64 * normal(1, 3, 1, pixels, pixels) + 128).clamp(0, 255).to(torch.uint8)

    def results():
        out = {"predictions": world.predict(*clip)} | world.losses(*clip, rollout)
        if world.encoder is not None:
            out["encoder"] = world.encode(image)
        return out

    modes = {module: module.training for module in world.modules()}
    dropout = {layer: layer.dropout for layer in lora.adapted_layers(world).values()}
    for layer in dropout:
        layer.dropout = 0.0
    world.train()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), eager():
        found = results()
        with _plain(world):
            expected = results()
    for module, mode in modes.items():
        module.training = mode
    for layer, p in dropout.items():
        layer.dropout = p
    return {name: ((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
                   ).item() if name in found and name in expected else float("inf")
            for name in expected | found}
