"""Energies: how far the predicted outcome of an action is from a goal image.

    energies = landscape(world, h[:1], states[:1], h[1], actions)           # [K] L1
    both = sequence_energies(world, h[:1], states[:1], h[1], actions[:, None])     # [K, 2]

Energy of an action: mean |LN(P(z, a, s)) - z_goal| over the last frame's tokens (arXiv:2506.09985,
section 4). Several steps repeat the action and carry state and latents forward. Beside this L1
stands the L2 energy, the mean of the squares, which jepa-wms plans with (arXiv:2512.24497).
Actions are metres, radians and gripper closedness in the robot's base frame, as in droid.py.
"""
from contextlib import nullcontext

import numpy as np
import torch

from analysis.measures import AXES, sphere
from episodes.poses import apply_action, pose_deltas


# Activations of one token in ViT-g's predictor without gradients, measured with room to spare.
BYTES_PER_TOKEN = 120_000
TOKENS_PER_FRAME = 258      # of ViT-g's predictor: 256 patches, action, state
CHUNK = 64                  # sequences of actions in a batch, where memory is not measured
L1, L2 = 0, 1               # columns of `sequence_energies`


def sequence_energies(world, h_context, states, h_goal, actions, chunk=CHUNK):
    """L1 and L2 energy of each sequence of actions.

    h_context [T, N, D] latents of the frames so far, states [T, 7] their poses, h_goal [N, D],
    actions [K, H, 7]. Returns [K, 2] float32 on the latents' device, with gradient if the actions
    carry one. `chunk` sequences are computed at a time. Raises ValueError in training mode, in
    which dropout would make energies random."""
    if world.predictor.training:
        raise ValueError("energies are computed in eval mode; call world.eval() first")
    device, T = h_context.device, len(h_context)
    states = torch.as_tensor(states, dtype=torch.float32).cpu()
    # The actions that led from each context frame to the next.
    past_actions = torch.zeros(0, 7)
    if T > 1:
        past_actions = torch.from_numpy(pose_deltas(states.numpy())).float()
    # Copied once, not for each chunk: a copy waits for the GPU.
    actions, states, past_actions = (x.to(device) for x in (actions, states, past_actions))
    K, H, _ = actions.shape
    if K > chunk or hasattr(world, "uncompiled"):
        # Full chunks only: one shape to compile, and energies do not depend on an action's chunk.
        actions = torch.cat([actions, actions[-1:].expand(-K % chunk, -1, -1)])
    energies = []
    for a in actions.split(chunk):                                              # [k, H, 7]
        k = len(a)
        h = h_context.expand(k, -1, -1, -1)                                     # [k, T, N, D]
        context_actions = torch.cat([past_actions.expand(k, -1, -1), a[:, :1]], dim=1)  # [k, T, 7]
        s = states.expand(k, -1, -1)                                            # [k, T, 7]
        kv_cache = [] if H > 1 else None
        z = world.predict(h, context_actions, s, kv_cache)[:, -1:]              # [k, 1, N, D]
        for step in range(1, H):
            s = _next_state(s[:, -1], a[:, step - 1])                           # [k, 1, 7]
            z = world.predict(z, a[:, step:step + 1], s, kv_cache)              # [k, 1, N, D]
        energies.append(world.distances(z[:, 0], h_goal))
    return torch.cat(energies)[:K]


def sequence_energy(world, h_context, states, h_goal, actions, chunk=CHUNK):
    """The L1 energies alone: arguments as for `sequence_energies`. Returns [K]."""
    return sequence_energies(world, h_context, states, h_goal, actions, chunk)[:, L1]


def _next_state(state, action):
    """The poses after an action, state and action [k, 7]: [k, 1, 7].

    Rotations are composed in NumPy, without a gradient. Positions add up, with one: the planners
    search moves."""
    after = apply_action(state.detach().cpu().numpy(), action.detach().cpu().numpy())
    after = torch.from_numpy(after).float().to(state.device)
    return torch.cat([state[:, :3] + action[:, :3], after[:, 3:]], dim=1)[:, None]


@torch.no_grad()
def landscapes(world, h_context, states, h_goal, actions, steps=1, chunk=CHUNK):
    """L1 and L2 energy of each action, taken `steps` times: as `sequence_energies`, with actions
    [K, 7]. Returns [K, 2]."""
    actions = torch.as_tensor(actions, dtype=torch.float32)[:, None].expand(-1, steps, -1)
    return sequence_energies(world, h_context, states, h_goal, actions, chunk)


def landscape(world, h_context, states, h_goal, actions, steps=1, chunk=CHUNK):
    """The L1 energies alone. Returns [K]."""
    return landscapes(world, h_context, states, h_goal, actions, steps, chunk)[:, L1]


@torch.no_grad()
def roll_out(world, h, actions, states, steps=None):
    """The model's own predictions of frames 1 … steps from frame 0 and the true actions and states.

    h [B, T, N, D], actions and states [B, T, 7]; steps: T-1 if not given. Returns
    [B, steps, N, D]."""
    z, predicted, kv_cache = h[:, :1].float(), [], []
    for n in range(h.shape[1] - 1 if steps is None else steps):
        z = world.predict(z, actions[:, n:n + 1], states[:, n:n + 1], kv_cache)     # [B, 1, N, D]
        predicted.append(z)
    return torch.cat(predicted, dim=1)


# Actions to measure

def grid(axes, radius, points, others=None):
    """Actions on a regular grid around zero: [points ** len(axes), 7] float32, first axis slowest.

    axes: of "xyz", such as "xy"; radius in metres; others [7]: values of the axes that are not
    swept (default 0)."""
    ticks = np.linspace(-radius, radius, points)
    others = np.zeros(7) if others is None else np.asarray(others, float)
    actions = np.tile(others, (points ** len(axes), 1))
    mesh = np.meshgrid(*[ticks] * len(axes), indexing="ij")
    for axis, values in zip(axes, mesh):
        actions[:, AXES.index(axis)] = values.ravel()
    return actions.astype(np.float32)


def shell(truth, n):
    """n actions as long as the true one [7], in directions spread evenly over the sphere; rotation
    and gripper are the truth's: [n, 7] float32."""
    actions = np.tile(np.asarray(truth, float), (n, 1))
    actions[:, :3] = np.linalg.norm(truth[:3]) * sphere(n)
    return actions.astype(np.float32)


def ray(truth, multiples):
    """The true action [7] with its move at multiples [R] of its length; rotation and gripper are
    the truth's: [R, 7] float32."""
    actions = np.tile(np.asarray(truth, float), (len(multiples), 1))
    actions[:, :3] *= np.asarray(multiples)[:, None]
    return actions.astype(np.float32)


# Memory and speed

def chunk_size(cfg, device):
    """Action sequences a batch: 200, or the largest divisor of it whose activations half of the
    free memory holds."""
    if device.type != "cuda":
        return CHUNK
    e = cfg.energy
    steps = e.context - 1 + max(e.steps, e.horizon if e.planners else 1)
    free = torch.cuda.mem_get_info(device)[0]
    if cfg.memory:
        free = min(free, cfg.memory * 2 ** 30 - torch.cuda.memory_allocated(device))
    fits = 0.5 * free / (TOKENS_PER_FRAME * steps * BYTES_PER_TOKEN)
    return max(n for n in (200, 100, 50, 25, 10, 5, 2, 1) if n <= max(1, fits))


def uncompiled(world):
    """A context in which compiled parts of the world, if it has any, run eagerly: for what is done
    too seldom, or in too many shapes, to be worth compiling."""
    return world.uncompiled() if hasattr(world, "uncompiled") else nullcontext()
