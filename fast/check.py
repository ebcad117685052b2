"""Whether the fast parts compute what the plain networks do.

`check_code` compares both on a small network of random weights in float32, where rounding is far
below any fault: outputs, losses, the gradients of the adapters, energies. `differences` compares
them on the real network and device, where kernels and half precision come in.
"""
from contextlib import contextmanager

import torch

import lora
import model
from fast.compiler import eager


def check_code(swap, rollout):
    """Raises ValueError if a fast part computes something else than the plain one.

    swap: a context manager that makes a world fast. It is the code that is compared here, whatever
    the weights: an edit of model.py, lora.py or vjepa2_src/ that fast/ does not follow is found."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        world = _small_world()
        batch = _random_batch(world, rollout, "cpu")
        expected = _results(world, batch, rollout)
        with swap(world):
            found = _results(world, batch, rollout)
    for name in expected | found:
        if not relative_difference(found.get(name), expected.get(name)) < 1e-4:
            raise ValueError(f"fast/ does not compute the {name} of the plain code (model.py, "
                             "lora.py, vjepa2_src/); follow the change in fast/, or use "
                             "--compile=false")


def _small_world():
    """Weights of unit gain and no zeros, so that each part of the networks shows in the result."""
    encoder, predictor = model.build("tiny")
    lora.inject(predictor, rank=2)
    world = model.WorldModel(encoder, predictor)
    with torch.no_grad():
        for parameter in world.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan_in ** -0.5)
        for layer in lora.adapted_layers(world).values():
            layer.lora_B.normal_(std=0.05)      # the update is scaled up, and rounding with it
    return world.train()


def _random_batch(world, rollout, device):
    """(frames, h, actions, states): an image, and a clip of one frame more than rollout + 1."""
    predictor = world.predictor
    T, N, D = rollout + 2, predictor.grid ** 2, predictor.predictor_embed.in_features
    S = predictor.grid * (world.encoder.patch if world.encoder is not None else 16)
    random = torch.Generator().manual_seed(0)           # the run's own random stream is not touched
    frames = torch.randint(0, 256, (1, 3, 1, S, S), dtype=torch.uint8, generator=random)
    h = model.layer_norm(torch.randn(1, T, N, D, generator=random))
    actions = 0.1 * torch.randn(1, T, 7, generator=random)
    states = torch.randn(1, T, 7, generator=random)
    return [tensor.to(device) for tensor in (frames, h, actions, states)]


def _results(world, batch, rollout):
    """{name: tensor} of everything that fast/ has a part in."""
    frames, h, actions, states = batch
    results = {}
    losses = world.losses(h, actions, states, rollout)
    results |= {name: value.detach() for name, value in losses.items()}
    world.zero_grad()
    sum(losses.values()).backward()
    for name, parameter in world.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad.clone()
    with torch.no_grad():
        results["latents"] = world.encode(frames)
        # LoRA's formula in eval mode, its merged form in training mode
        for mode in (False, True):
            world.train(mode)
            kv_cache = []
            first = world.predict(h[:, :2], actions[:, :2], states[:, :2], kv_cache)
            next_ = world.predict(h[:, 2:], actions[:, 2:], states[:, 2:], kv_cache)
            predictions = torch.cat([first, next_], dim=1)
            results["predictions" if mode else "predictions in eval mode"] = predictions
        results["energies"] = world.distances(predictions, h)
    return results


@torch.no_grad()
def differences(world, rollout, plain):
    """Relative differences of an accelerated world to the plain one on a random clip, in training
    mode without dropout: {"latents", "predictions" and each loss: float}.

    plain: a context manager that takes the fast parts out."""
    device, dtype = next((p.device, p.dtype) for p in world.predictor.parameters()
                         if not p.requires_grad)
    frames, *clip = _random_batch(world, rollout, device)

    def results():
        out = {"predictions": world.predict(*clip)} | world.losses(*clip, rollout)
        if world.encoder is not None:
            out["latents"] = world.encode(frames)
        return out

    with _training_without_dropout(world), eager(), \
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = results()
        with plain(world):
            expected = results()
    return {name: relative_difference(found.get(name), expected.get(name))
            for name in expected | found}


@contextmanager
def _training_without_dropout(world):
    modes = {module: module.training for module in world.modules()}
    dropout = {layer: layer.dropout for layer in lora.adapted_layers(world).values()}
    try:
        for layer in dropout:
            layer.dropout = 0.0
        world.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, p in dropout.items():
            layer.dropout = p


def relative_difference(found, expected):
    """||found - expected|| / ||expected||; infinite if one is missing or of another shape."""
    if found is None or expected is None or found.shape != expected.shape:
        return float("inf")
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()
