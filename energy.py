"""Energy landscapes of a world model: how far each action's predicted outcome is from a goal image.

    python energy.py runs/droid --steps=5000,20000                  # with that run's settings
    python energy.py --from=runs/droid/energy/landscapes.npz        # metrics and figures again

The baseline is always computed too. Writes into out_dir/energy: landscapes.npz (every energy;
analysis/__init__.py lists the arrays), metrics.csv, comparison.json and figures.

    h = world.encode(frames)[0]                                             # [T, N, D]
    energies = energy.landscape(world, h[:1], states[:1], h[1], actions)    # [K]
    numbers = energy.metrics(actions, energies, true_action)                # a dict
    plan = energy.cem(lambda a: energy.sequence_energy(world, h[:1], states[:1], h[1], a))

Energy of an action: mean |LN(P(z, a, s)) - z_goal| over the last frame's tokens (arXiv:2506.09985,
section 4). Several steps repeat the action and carry state and latents forward. Actions are metres,
radians and gripper closedness in the robot's base frame, as in droid.py. Metrics that a landscape
cannot determine are NaN, shown as "undefined".
"""
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("energy.py", __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import droid
import lora
import model
from analysis import compare, figures
from analysis.arrays import check
from analysis.measures import AXES, metrics  # noqa: F401
from analysis.planners import GRADIENT_ITERATIONS, GRADIENT_STARTS, cem, gradient_plan
from episodes.pairs import choose_clips, seen_in_training, true_action
from episodes.poses import apply_action, pose_deltas
from episodes.stored import all_finite, check_store
from files import write_npz
from files.reading import read_npz


N_NEGATIVES = 32            # real actions of other moments that each true action is compared with
# Activations of one token in ViT-g's predictor without gradients, measured with room to spare.
BYTES_PER_TOKEN = 120_000
TOKENS_PER_FRAME = 258      # of ViT-g's predictor: 256 patches, action, state


# Energies

def sequence_energy(world, h_context, states, h_goal, actions, chunk=64):
    """Energy of each sequence of actions.

    h_context [T, N, D] latents of the frames so far, states [T, 7] their poses, h_goal [N, D],
    actions [K, H, 7]. Returns [K] float32 on the latents' device, with gradient if the actions
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
    if K > chunk:
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
        energies.append(world.distance(z[:, 0], h_goal))
    return torch.cat(energies)[:K]


def _next_state(state, action):
    """The poses after an action, state and action [k, 7]: [k, 1, 7].

    Rotations are composed in NumPy, without a gradient. Positions add up, with one: the planners
    search moves."""
    after = apply_action(state.detach().cpu().numpy(), action.detach().cpu().numpy())
    after = torch.from_numpy(after).float().to(state.device)
    return torch.cat([state[:, :3] + action[:, :3], after[:, 3:]], dim=1)[:, None]


@torch.no_grad()
def landscape(world, h_context, states, h_goal, actions, steps=1, chunk=64):
    """Energy of each action, taken `steps` times: as `sequence_energy`, with actions [K, 7].
    Returns [K]."""
    actions = torch.as_tensor(actions, dtype=torch.float32)[:, None].expand(-1, steps, -1)
    return sequence_energy(world, h_context, states, h_goal, actions, chunk)


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


# The analysis

def read_clips(cfg):
    """Validation clips to measure on: `episodes.pairs.choose_clips`."""
    return choose_clips(droid.validation_loaders(cfg), cfg)


def choose_adapter(predictor, adapter, lora_config):
    """Puts an adapter folder, or for "baseline" one that changes nothing, into the predictor in
    place of any other. Returns ||s B A|| / ||W||, the size of the update.

    The baseline carries an adapter of zeros so that all checkpoints go through the same arithmetic:
    differences between them come from the adapters alone."""
    lora.remove(predictor)
    if adapter == "baseline":
        c = lora_config
        lora.inject(predictor, c.rank, c.alpha, 0.0, c.targets, c.rslora)
    else:
        lora.load(predictor, adapter)
    predictor.requires_grad_(False).eval()
    return lora.update_norm(predictor)


def analyse(cfg, adapters, path):
    """Landscapes, plans and controls of the baseline and of each adapter folder, on the same pairs.

    Saves the arrays to `path` after each checkpoint and returns them; analysis/__init__.py lists
    them. Raises ValueError for an adapter that does not fit, before anything is computed."""
    path = Path(path)
    device = model.resolve_device(cfg.device)
    if cfg.memory:
        from fast import memory
        cfg = memory.cap_gpu_memory(cfg, device)
    precision = model.resolve_precision(cfg.precision, device)
    torch.manual_seed(cfg.seed)
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size, model.DTYPES[precision],
                                    device, encoder=not cfg.data.latents)
    if cfg.data.latents:
        check_store(cfg, predictor.encoder_fingerprint)
    world = model.WorldModel(encoder, predictor)
    tqdm.write(f"{model.device_name(device)}, {precision}; base {cfg.model.checkpoint} "
               f"({world.base_fingerprint})")
    names = names_of(adapters)
    adapters = ["baseline", *(adapter for adapter in adapters if adapter != "baseline")]
    norms = [choose_adapter(predictor, adapter, cfg.lora) for adapter in adapters]
    for name, norm in zip(names, norms):
        warning = ""
        if norm == 0 and name != "baseline":
            warning = " WARNING: B is zero in all its layers, this is the baseline"
        tqdm.write(f"  {name}: update / weights {norm:.2e}{warning}")
    if device.type == "cpu" and sum(p.numel() for p in world.parameters()) > 1e8:
        tqdm.write("no GPU: an action takes seconds at this size; --energy.pairs=1 "
                   "--energy.grid=7 --energy.planners=[] is a start")

    # Everything that depends on the pairs alone; then the encoder's memory is free again.
    clips = read_clips(cfg)
    seen = seen_in_training(clips, adapters, cfg.energy.allow_trained)
    names = [f"{name} (trained on {row.sum()} of these {len(row)})" if row.any() else name
             for name, row in zip(names, seen)]
    h = [clip["h"].to(device).float() if "h" in clip
         else world.encode(clip["frames"][None].to(device))[0] for clip in clips]   # P x [T, N, D]
    world.encoder = encoder = None
    for clip, x in zip(clips, h):
        _check_finite(all_finite(x), f"the latents of {clip['episode']}", precision)
    arrays = _pair_arrays(cfg, clips, h)
    arrays |= {"device": np.array(model.device_name(device)), "dtype": np.array(precision),
               "base": np.array(world.base_fingerprint)}
    chunk = chunk_size(cfg, device)
    lora.remove(predictor)
    if model.can_accelerate(cfg, device):
        import fast
        fast.accelerate(world, cfg)

    path.parent.mkdir(parents=True, exist_ok=True)
    per_pair = _evaluations(cfg, arrays)
    # None: hidden without a terminal, but a notebook has none and shows it all the same.
    bar = tqdm(total=per_pair * len(clips) * len(names), unit="action", unit_scale=True,
               smoothing=0.05, disable=False if "ipykernel" in sys.modules else None)
    without_adapter = _first_landscape(world, cfg, arrays, clips, h, chunk)
    found = []
    for name, adapter in zip(names, adapters):
        choose_adapter(predictor, adapter, cfg.lora)
        if name == "baseline":
            again = _first_landscape(world, cfg, arrays, clips, h, chunk)
            difference = (without_adapter - again).abs().max().item()
            arrays["null_difference"] = np.array(difference)
        bar.set_description(name)
        pairs = []
        for p, clip in enumerate(clips):
            pairs.append(_one_pair(world, cfg, arrays, p, clip, h[p], chunk, name))
            bar.update(per_pair)
        found.append({key: np.stack([pair[key] for pair in pairs]) for key in pairs[0]})
        arrays |= {key: np.stack([one[key] for one in found]) for key in found[0]}
        done = len(found)
        arrays |= {"checkpoints": np.array(names[:done]), "update_norm": np.array(norms[:done]),
                   "training_steps": np.array([_training_step(n) for n in names[:done]])}
        write_npz(path, **arrays)
    bar.close()
    return arrays


def _first_landscape(world, cfg, arrays, clips, h, chunk):
    """Energies of the first pair's first plane: computed twice, they must be equal in every bit."""
    actions = arrays[f"actions_{cfg.energy.planes[0]}"][0]
    return landscape(world, h[0][:1], clips[0]["states"][:1], h[0][cfg.energy.steps], actions,
                     cfg.energy.steps, chunk)


def names_of(adapters):
    """The baseline, then each folder under the shortest end of its path that no other one has."""
    paths = [Path(adapter) for adapter in adapters if adapter != "baseline"]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--adapters names a folder twice: {', '.join(map(str, paths))}")
    for n in range(1, 20):
        names = ["/".join(path.resolve().parts[-n:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return ["baseline", *names]


def _training_step(name):
    found = re.search(r"step_(\d+)", name)
    return int(found[1]) if found else 0 if name == "baseline" else -1


def _pair_arrays(cfg, clips, h):
    """The arrays that depend on the pairs alone, not on a checkpoint."""
    e, P, steps = cfg.energy, len(clips), cfg.energy.steps
    random = np.random.default_rng(cfg.seed)
    states = np.stack([clip["states"].numpy() for clip in clips]).astype(float)     # [P, T, 7]
    truth = np.stack([true_action(s, steps) for s in states])                       # [P, 7]
    actions = np.stack([pose_deltas(s) for s in states])                            # [P, T-1, 7]
    T = states.shape[1]

    # Real actions of other moments: those of other pairs, and the pair's own after the goal.
    pools = [np.concatenate([np.delete(actions, p, axis=0).reshape(-1, 7), actions[p, steps:]])
             for p in range(P)]
    n_negatives = min(N_NEGATIVES, min(map(len, pools)))
    negatives = [pool[random.choice(len(pool), n_negatives, False)] for pool in pools]
    shuffled = [pool[random.integers(len(pool), size=T - 1)] if len(pool)
                else np.full((T - 1, 7), np.nan) for pool in pools]

    # Energies between real frames: what a perfect predictor could reach with this encoder. The
    # goal itself is left out: its energy would be zero.
    others = [i for i in range(T) if i != steps]
    real_actions = [[pose_deltas(s[[0, i]])[0] if i else np.zeros(7) for i in others]
                    for s in states]
    real_energy = [_mean_l1(x[others], x[steps]) for x in h]

    arrays = {
        "episodes": np.array([clip["episode"] for clip in clips]), "planes": np.array(e.planes),
        "radius": np.array(e.radius), "steps": np.array(steps),
        "frame_step": np.array(clips[0]["frame_step"]), "true_actions": truth, "states": states,
        "negatives": np.stack(negatives), "shuffled": np.stack(shuffled),
        "horizon_copy": np.stack([_mean_l1(x[1:], x[:1]) for x in h]),
        "oracle_actions": np.stack(real_actions), "oracle_energy": np.stack(real_energy),
        "oracle_truth": np.stack([pose_deltas(s[[0, steps]])[0] for s in states])}
    if "frames" in clips[0]:
        arrays["frames"] = np.stack([clip["frames"][:, [0, steps]].permute(1, 2, 3, 0).numpy()
                                     for clip in clips])
    for plane in e.planes:
        arrays[f"actions_{plane}"] = np.stack(
            [grid(plane, e.radius, e.grid, t if e.others == "truth" else None) for t in truth])
    if e.planners:
        arrays["true_moves"] = states[:, 1:e.horizon + 1, :3] - states[:, :1, :3]   # [P, H, 3]
    return arrays


def _mean_l1(z, h):
    """Mean L1 of each frame, z [n, N, D] against h [N, D] or [1, N, D]: [n] in NumPy."""
    return (z - h).abs().mean(dim=(1, 2)).cpu().numpy()


def _evaluations(cfg, arrays):
    """How many actions are evaluated per pair and checkpoint, for the progress bar; a step of the
    gradient planner counts three (forward and backward)."""
    e = cfg.energy
    in_planes = sum(arrays[f"actions_{plane}"].shape[1] for plane in e.planes)
    n = e.steps * (in_planes + arrays["negatives"].shape[1] + 2)        # 2: the true one and zero
    for h in range(1, e.horizon + 1):
        if "cem" in e.planners:
            n += h * e.cem_samples * e.cem_iterations
        if "gradient" in e.planners:
            n += 3 * h * GRADIENT_STARTS * (GRADIENT_ITERATIONS + 1)
    return n


def _check_finite(finite, what, precision):
    """Raises ValueError: planners and figures would stumble over what is not finite."""
    if not finite:
        cure = ("use --precision=bf16 or fp32" if precision == "fp16" else
                "the weights have grown too large; take an earlier step")
        raise ValueError(f"{what} are not finite in {precision} (NaN or infinite); {cure}")


def _one_pair(world, cfg, arrays, p, clip, h, chunk, name):
    """The arrays of one checkpoint and one pair: those that have [C, P, …] in landscapes.npz."""
    e, device, states = cfg.energy, h.device, clip["states"]
    planes = [arrays[f"actions_{plane}"][p] for plane in e.planes]
    single = [arrays["true_actions"][p][None], np.zeros((1, 7)), arrays["negatives"][p]]
    energies = landscape(world, h[:1], states[:1], h[e.steps], np.concatenate(planes + single),
                         e.steps, chunk)
    where = f"of {clip['episode']} under {name}", arrays["dtype"].item()
    _check_finite(energies.isfinite().all(), f"the energies {where[0]}", where[1])
    parts = [part.cpu().numpy() for part in energies.split([len(x) for x in planes + single])]
    out = {f"energy_{plane}": part for plane, part in zip(e.planes, parts)}
    out |= {"energy_true": parts[-3][0], "energy_zero": parts[-2][0], "energy_negatives": parts[-1]}

    def energy_of(goal):
        return lambda actions: sequence_energy(world, h[:1], states[:1], goal, actions, chunk)

    if "cem" in e.planners:
        plans = [cem(energy_of(h[n]), n, e.cem_samples, e.cem_iterations, e.cem_elites, e.radius,
                     cfg.seed, device) for n in range(1, e.horizon + 1)]
        out |= _plan_arrays("cem", plans)
    with uncompiled(world):
        if "gradient" in e.planners:
            plans = [gradient_plan(energy_of(h[n]), n, GRADIENT_STARTS, GRADIENT_ITERATIONS,
                                   box=e.radius, seed=cfg.seed, device=device)
                     for n in range(1, e.horizon + 1)]
            out |= _plan_arrays("gradient", plans)
        out |= _losses_and_horizon(world, h, clip, arrays["shuffled"][p])
    # Those of shuffled actions may be undefined.
    finite = np.isfinite([out["loss"], out["loss_zero"], *out["horizon_l1"]]).all()
    _check_finite(finite, f"the losses {where[0]}", where[1])
    return out


def uncompiled(world):
    """A context in which compiled parts of the world, if it has any, run eagerly: for what is done
    too seldom, or in too many shapes, to be worth compiling."""
    return world.uncompiled() if hasattr(world, "uncompiled") else nullcontext()


def _plan_arrays(planner, plans):
    return {f"{planner}_moves": np.stack([plan.actions[:, :3].sum(0) for plan in plans]),
            f"{planner}_energy": np.array([plan.energy for plan in plans]),
            f"{planner}_seconds": np.array([plan.seconds for plan in plans])}


@torch.no_grad()
def _losses_and_horizon(world, h, clip, shuffled):
    """Losses with the clip's own actions, with others and with none: they differ if the model uses
    actions. And the L1 of the model's own predictions by horizon."""
    states, actions = clip["states"].to(h.device)[None], clip["actions"].to(h.device)[None]
    shuffled = F.pad(torch.from_numpy(shuffled).float(), (0, 0, 0, 1)).to(h.device)[None]
    out = {}
    for name, a in (("loss", actions), ("loss_shuffled", shuffled),
                    ("loss_zero", torch.zeros_like(actions))):                      # [1, T, 7]
        out[name] = world.losses(h[None], a, states, rollout=0)["teacher_forcing"].item()
    z, predicted, kv_cache = h[None, :1], [], []
    for n in range(len(h) - 1):
        z = world.predict(z, actions[:, n:n + 1], states[:, n:n + 1], kv_cache)     # [1, 1, N, D]
        predicted.append(z[0, 0])
    out["horizon_l1"] = _mean_l1(torch.stack(predicted), h[1:])
    return out


def chunk_size(cfg, device):
    """Action sequences a batch: 200, or the largest divisor of it whose activations half of the
    free memory holds."""
    if device.type != "cuda":
        return 64
    e = cfg.energy
    steps = max(e.steps, e.horizon if e.planners else 1)
    free = torch.cuda.mem_get_info(device)[0]
    if cfg.memory:
        free = min(free, cfg.memory * 2 ** 30 - torch.cuda.memory_allocated(device))
    fits = 0.5 * free / (TOKENS_PER_FRAME * steps * BYTES_PER_TOKEN)
    return max(n for n in (200, 100, 50, 25, 10, 5, 2, 1) if n <= max(1, fits))


# Files and the command line

def load(path):
    """The arrays of landscapes.npz, compared with what analysis/__init__.py lists. Raises
    ValueError."""
    try:
        arrays = read_npz(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; energy.py config.yaml --adapters=… writes it"
                         ) from None
    except ValueError as error:
        raise ValueError(f"{error}, or compute it again") from None
    try:
        check(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; is it a landscapes.npz of energy.py?") from None
    return arrays


def report(arrays, folder):
    """Writes metrics and figures of the arrays into `folder` -> the content of comparison.json."""
    result = compare.write(folder, arrays)
    figures.write(folder, arrays, result)
    return result


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("energy.py", __doc__, args, _run)


def _run(given):
    started = time.monotonic()
    if given.source:
        folder, arrays = Path(given.source).parent, load(given.source)
    else:
        if given.note:
            print(given.note)
        folder = Path(given.cfg.out_dir) / "energy"
        arrays = analyse(given.cfg, given.adapters, folder / "landscapes.npz")
    print(compare.table(report(arrays, folder)))
    print(f"\n{folder}: landscapes.npz, metrics.csv, comparison.json and figures; "
          f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(arguments)
