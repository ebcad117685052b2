"""Planning: find the actions of lowest energy, by sampling or by gradient.

    def energy_of(actions):             # [K, H, 7] -> [K]
        return energy.sequence_energy(world, h[:1], states[:1], h[1], actions)

    plan = cem(energy_of, horizon=2)    # Plan(actions, energy, seconds)

Both search xyz moves within a box of ±box metres a step (arXiv:2506.09985, section 4); rotation and
gripper stay.
"""
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


# The gradient planner's cost: energies of GRADIENT_STARTS sequences, GRADIENT_ITERATIONS + 1 times,
# for the moves after the last update are evaluated too.
GRADIENT_STARTS = 8
GRADIENT_ITERATIONS = 60


@dataclass
class Plan:
    actions: np.ndarray     # [H, 7] float32
    energy: float
    seconds: float


@torch.no_grad()
def cem(energy_of, horizon=1, samples=800, iterations=10, elites=10, box=0.075, seed=0,
        device="cpu"):
    """Cross-entropy method over xyz moves; rotation and gripper stay. Defaults are the paper's.

    energy_of: [K, H, 7] -> [K]; box: each axis of each step within ±box metres. Returns the best
    Plan seen."""
    started = time.monotonic()
    random = torch.Generator(device).manual_seed(seed)
    mean = torch.zeros(horizon, 3, device=device)
    std = torch.full((horizon, 3), box, device=device)
    best, lowest = None, torch.inf
    for _ in range(iterations):
        moves = mean + std * torch.randn(samples, horizon, 3, generator=random, device=device)
        actions = F.pad(moves.clamp(-box, box), (0, 4))                 # [K, H, 7]
        energy = energy_of(actions)
        chosen = actions[energy.topk(elites, largest=False).indices]    # [elites, H, 7], best first
        mean, std = chosen[..., :3].mean(0), chosen[..., :3].std(0)
        if energy.min() < lowest:
            best, lowest = chosen[0], energy.min()
    return Plan(best.cpu().numpy(), float(lowest), time.monotonic() - started)


def gradient_plan(energy_of, horizon=1, starts=GRADIENT_STARTS, iterations=GRADIENT_ITERATIONS,
                  lr=0.005, box=0.075, seed=0, device="cpu"):
    """Adam on the moves themselves, through the predictor, from zero and starts - 1 random points
    at once.

    Arguments and result as for `cem`; energy_of must be differentiable; lr in metres."""
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
        energy = energy_of(actions)                                     # [starts]
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
