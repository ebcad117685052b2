"""Planning: find the actions of lowest energy, by sampling or by gradient.

    def energy_of(actions):             # [K, H, 7] -> [K]
        return energy.sequence_energy(world, h[:1], states[:1], h[2], actions)

    plan = cem(energy_of, horizon=2)    # Plan(actions, energy, seconds)

                    searches                    bounds of each step             returns
    cem             xyz, gripper                a box; gripper ±0.75            mean
    cem_jepa_wms    xyz, rotation, gripper      a ball of (xyz, rotation)       mean
    mppi            xyz                         a box                           mean
    gradient_plan   xyz                         a box                           best seen

The first three are one loop: sample sequences from a Gaussian, evaluate them, fit the Gaussian to
the good ones. They differ in the space, its bounds and the fit. Their mean is a plan that was never
sampled, and averages the noise of single samples away.
"""
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F


# Of Meta's planner: the share of the old mean and std that stays, and gripper moves below which the
# gripper is left alone (most of them are noise).
MOMENTUM = 0.15
GRIPPER_THRESHOLD = 0.25
# Largest change of gripper closedness a step, in both versions of CEM.
GRIPPER_LIMIT = 0.75

# Of jepa-wms: initial std of all 7 dimensions, the largest norm of (xyz, rotation) a step, and what
# a plan costs.
JEPA_WMS_STD = 0.1
JEPA_WMS_NORM = 0.1
JEPA_WMS_SAMPLES, JEPA_WMS_ITERATIONS = 300, 15

# A weight falls by a factor of e for each TEMPERATURE standard deviations of the energies. Largest
# errors measured on bowls and cones: 0.02 mm at one step and 2.3 mm at two (0.7 has not converged
# after ten iterations: 2.2 and 17 mm); on landscapes that level off far from the minimum 4.3 mm at
# one step (0.2 collapses early: 7.3 mm).
TEMPERATURE = 0.3

# The gradient planner's cost: energies of GRADIENT_STARTS sequences, GRADIENT_ITERATIONS + 1 times,
# for the moves after the last update are evaluated too.
GRADIENT_STARTS = 8
GRADIENT_ITERATIONS = 60


@dataclass
class Plan:
    actions: np.ndarray     # [H, 7] float32: metres, radians, gripper closedness
    energy: float           # of these actions
    seconds: float


def cem(energy_of, horizon=1, samples=800, iterations=10, elites=10, box=0.075, seed=0,
        device="cpu"):
    """Cross-entropy method as Meta published it with V-JEPA 2-AC (arXiv:2506.09985, section 4, and
    its code): xyz moves and the gripper; rotation stays.

    energy_of: [K, H, 7] -> [K]. Each axis of each step is clipped to ±box metres, the gripper to
    ±GRIPPER_LIMIT. Mean and std follow those of the elites, with MOMENTUM. Returns the Plan of the
    last mean, with gripper moves below GRIPPER_THRESHOLD set to 0. Raises ValueError for fewer than
    two elites or more than samples, and for energies that are not finite."""
    started = time.monotonic()
    std = torch.tensor([box] * 3 + [0] * 3 + [1.0], device=device)
    limit = torch.tensor([box] * 3 + [0] * 3 + [GRIPPER_LIMIT], device=device)
    mean = _search(energy_of, horizon, std, lambda actions: actions.clamp(-limit, limit),
                   _fit_to_elites(elites, samples, MOMENTUM), samples, iterations, seed)
    mean[:, 6] *= mean[:, 6].abs() >= GRIPPER_THRESHOLD
    return _plan(mean, energy_of, started)


def cem_jepa_wms(energy_of, horizon=3, samples=JEPA_WMS_SAMPLES, iterations=JEPA_WMS_ITERATIONS,
                 elites=10, seed=0, device="cpu"):
    """Cross-entropy method as in the protocol of jepa-wms (arXiv:2512.24497): all 7 dimensions.

    Arguments and errors as for `cem`. The 6 numbers (xyz in metres, rotation in radians) of each
    step are scaled down to a norm of JEPA_WMS_NORM, the gripper is clipped to ±GRIPPER_LIMIT.
    Without momentum. Returns the Plan of the last mean."""
    started = time.monotonic()

    def bounded(actions):
        pose, gripper = actions[..., :6], actions[..., 6:]
        norm = pose.norm(dim=-1, keepdim=True)                          # [K, H, 1]
        pose = pose * (JEPA_WMS_NORM / norm.clamp(min=JEPA_WMS_NORM))
        return torch.cat([pose, gripper.clamp(-GRIPPER_LIMIT, GRIPPER_LIMIT)], dim=-1)

    std = torch.full((7,), JEPA_WMS_STD, device=device)
    mean = _search(energy_of, horizon, std, bounded, _fit_to_elites(elites, samples, momentum=0),
                   samples, iterations, seed)
    return _plan(mean, energy_of, started)


def mppi(energy_of, horizon=1, samples=800, iterations=10, box=0.075, seed=0, device="cpu"):
    """Model predictive path integral (Williams et al. 2015, arXiv:1509.01149; here the std adapts
    too): every sample counts, by exp(-energy / temperature). xyz moves; rotation and gripper stay.

    Arguments as for `cem`; each axis of each step is clipped to ±box metres. Returns the Plan of
    the last mean."""
    started = time.monotonic()
    std = torch.tensor([box] * 3 + [0] * 4, device=device)
    mean = _search(energy_of, horizon, std, lambda actions: actions.clamp(-box, box),
                   _fit_by_weight, samples, iterations, seed)
    return _plan(mean, energy_of, started)


@torch.no_grad()
def _search(energy_of, horizon, std, bounded, fit, samples, iterations, seed):
    """The mean [H, 7] of a Gaussian that starts at zero with std [7], where 0 keeps a dimension
    fixed, after `iterations` of sampling and fitting.

    bounded: [K, H, 7] -> [K, H, 7]; fit: (actions, energy [K], mean, std) -> new mean and std."""
    random = torch.Generator(std.device).manual_seed(seed)
    std = std.expand(horizon, 7)
    mean = torch.zeros_like(std)
    for _ in range(iterations):
        noise = torch.randn(samples, horizon, 7, generator=random, device=std.device)
        actions = bounded(mean + std * noise)                           # [K, H, 7]
        mean, std = fit(actions, _finite(energy_of(actions)).float(), mean, std)
    return mean


def _finite(energy):
    """Raises ValueError rather than to plan with what is left of a broken model."""
    if not energy.isfinite().all():
        raise ValueError("energies of sampled actions are not finite (NaN or infinite); "
                         "--precision=bf16 or fp32 cures fp16, an earlier step other causes")
    return energy


def _fit_to_elites(elites, samples, momentum):
    if not 2 <= elites <= samples:
        raise ValueError(f"elites must be at least 2 and at most samples ({samples}), not {elites}")
    return partial(_to_elites, elites=elites, momentum=momentum)


def _to_elites(actions, energy, mean, std, elites, momentum):
    chosen = actions[energy.topk(elites, largest=False).indices]        # [elites, H, 7]
    return (momentum * mean + (1 - momentum) * chosen.mean(0),
            momentum * std + (1 - momentum) * chosen.std(0))


def _fit_by_weight(actions, energy, mean, std):
    """Weighted mean and std. The temperature follows the spread of the energies, which have no
    scale of their own; without any spread all weights are equal."""
    temperature = TEMPERATURE * energy.std(correction=0)
    above = (energy - energy.min()) / temperature.clamp(min=torch.finfo(energy.dtype).tiny)
    weights = torch.softmax(-above, dim=0)[:, None, None]               # [K, 1, 1]
    mean = (weights * actions).sum(0)
    return mean, (weights * (actions - mean) ** 2).sum(0).sqrt()


@torch.no_grad()
def _plan(actions, energy_of, started):
    """The Plan of actions [H, 7], whose energy no sample has."""
    energy = _finite(energy_of(actions[None])).item()
    return Plan(actions.cpu().numpy(), energy, time.monotonic() - started)


def gradient_plan(energy_of, horizon=1, starts=GRADIENT_STARTS, iterations=GRADIENT_ITERATIONS,
                  lr=0.005, box=0.075, seed=0, device="cpu"):
    """Adam on the moves themselves, through the predictor, from zero and starts - 1 random points
    at once. xyz moves; rotation and gripper stay.

    Arguments as for `cem`; energy_of must be differentiable; lr in metres. Returns the best Plan
    seen."""
    started = time.monotonic()
    random = torch.Generator(device).manual_seed(seed)
    moves = box * (2 * torch.rand(starts, horizon, 3, generator=random, device=device) - 1)
    # Several starts, for the landscape has local minima; one of them is no motion, since most true
    # moves are small against the box.
    moves[0] = 0
    moves.requires_grad_(True)
    optimizer = torch.optim.Adam([moves], lr=lr)
    best, lowest = None, torch.inf
    for step in range(iterations + 1):
        actions = F.pad(moves, (0, 4))                                  # [starts, H, 7]
        energy = _finite(energy_of(actions))                            # [starts]
        if energy.min() < lowest:
            best, lowest = actions[energy.argmin()].detach().clone(), energy.min().detach()
        # Adam's steps are about lr long however flat the landscape is: only a falling lr settles
        optimizer.param_groups[0]["lr"] = lr * (1 - step / (iterations + 1))
        optimizer.zero_grad()
        # each start's energy depends on its own moves alone, so the sum's gradient is theirs
        energy.sum().backward()
        optimizer.step()
        with torch.no_grad():
            moves.clamp_(-box, box)
    return Plan(best.cpu().numpy(), float(lowest), time.monotonic() - started)
