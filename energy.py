"""Energy landscapes of a world model: how far each action's predicted outcome is from a goal image.

    python energy.py config.yaml --adapters=runs/droid/step_5000,runs/droid/step_20000      # and the baseline, always
    python energy.py --from=runs/droid/energy/landscapes.npz        # numbers and figures again, without a model

Writes into out_dir/energy: landscapes.npz (every energy, as `analyse` says), metrics.csv, comparison.json and figures.

    energies = energy.landscape(world, h[:1], states[:1], h[1], actions)    # [K], L1 on layer-normed latents
    numbers = energy.metrics(actions, energies, true_action)                # what one landscape says, as a dict
    plan = energy.cem(lambda a: energy.rollout(world, h[:1], states[:1], h[1], a))

Energy of an action: mean |LN(P(z, a, s)) - z_goal| over the last frame's tokens (arXiv:2506.09985, section 4). Several
steps repeat the action and carry state and latents forward. Actions are metres, radians and gripper closedness in the
robot's base frame, as in droid.py. A number that a landscape cannot support is NaN, which reads "undefined".
"""
import re
import sys
import time
import zipfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from analysis import compare
import config
import files
import droid
from analysis import figures
import latents
import lora
import model
import speed
from episodes.poses import apply_action, pose_deltas
from analysis.measures import AXES, metrics  # noqa: F401
from analysis.planners import cem, gradient_plan

N_NEGATIVES = 32            # real actions of other moments that each true action is held against
BYTES_PER_TOKEN = 120_000   # activations of one token in ViT-g's predictor without gradients, measured with room to spare


# Energies

def rollout(world, h_context, states, h_goal, actions, chunk=64):
    """Energy of each sequence of actions.

    h_context [T, N, D] latents of the frames so far, states [T, 7] their poses, h_goal [N, D], actions [K, H, 7].
    Returns [K] float32 on the latents' device, with gradient if the actions carry one. `chunk` sequences at a time."""
    device, T = h_context.device, len(h_context)
    states = torch.as_tensor(states, dtype=torch.float32).cpu()
    past = torch.from_numpy(pose_deltas(states.numpy())).float() if T > 1 else torch.zeros(0, 7)
    energies = []
    K, H, _ = actions.shape
    actions, states, past = actions.to(device), states.to(device), past.to(device)      # here: each copy waits for the GPU
    if K > chunk:                       # all batches of one size: compiled once, and a place in the list changes nothing
        actions = torch.cat([actions, actions[-1:].expand(-K % chunk, -1, -1)])
    for own in actions.split(chunk):                                                # [k, H, 7]
        k = len(own)
        h = h_context.expand(k, -1, -1, -1)                                         # [k, T, N, D]
        s = states.expand(k, -1, -1)                                                # [k, T, 7]
        a = torch.cat([past.expand(k, -1, -1), own[:, :1]], dim=1)                  # [k, T, 7]
        z, memory = world.remember(h, a, s, keep=T if H > 1 else 0)
        for step in range(1, H):
            s = torch.from_numpy(apply_action(s[:, -1].detach().cpu().numpy(), own[:, step - 1].detach().cpu().numpy())).float().to(device)
            moved = own[:, :step, :3].sum(dim=1)
            s = (s + F.pad(moved - moved.detach(), (0, 4)))[:, None]                # [k, 1, 7]; its gradient: xyz adds up
            z, memory = world.remember(model.layer_norm(z[:, -1:]), own[:, step:step + 1], s, memory,
                                       keep=T + step if step + 1 < H else 0)
        energies.append(world.error(z[:, -1], h_goal))
    return torch.cat(energies)[:K]


@torch.no_grad()
def landscape(world, h_context, states, h_goal, actions, steps=1, chunk=64):
    """Energy of each action, taken `steps` times: as `rollout`, with actions [K, 7]. Returns [K]."""
    actions = torch.as_tensor(actions, dtype=torch.float32)
    return rollout(world, h_context, states, h_goal, actions[:, None].expand(-1, steps, -1), chunk)


def grid(axes, radius, points, others=None):
    """Actions on a regular grid around zero: [points ** len(axes), 7] float32, the first axis slowest.

    axes: of "xyz", such as "xy"; radius in metres; others [7]: values of the axes that are not swept (default 0)."""
    ticks = np.linspace(-radius, radius, points)
    actions = np.tile(np.zeros(7) if others is None else np.asarray(others, float), (points ** len(axes), 1))
    mesh = np.meshgrid(*[ticks] * len(axes), indexing="ij")
    for axis, values in zip(axes, mesh):
        actions[:, AXES.index(axis)] = values.ravel()
    return actions.astype(np.float32)


# The analysis

def read_clips(cfg):
    """Validation clips whose first frame is a context and whose frame energy.steps is its goal: P dicts with frames
    [3, T, S, S] uint8 or h [T, N, D], states, actions [T, 7], episode. At most energy.per_episode of an episode, evenly over its length."""
    e = cfg.energy
    ahead = max(e.steps, e.horizon if e.planners else 1)
    if cfg.data.clip_frames <= ahead:
        raise ValueError(f"data.clip_frames {cfg.data.clip_frames} is too few: energy.steps and energy.horizon look {ahead} "
                         f"frames ahead; set --data.clip_frames={ahead + 1} or more")
    if not cfg.data.val_fraction:
        raise ValueError("data.val_fraction is 0: there is no episode to measure on; --data.val_fraction=1 takes all")
    loader = droid.create_dataloader(cfg, "val", shuffle=False)
    chosen, n_still, n_episodes = [], 0, 0
    for _, clips in groupby(loader.clips(), key=lambda clip: clip["episode"]):
        clips = list(clips)
        moving = [c for c in clips if (c["states"][e.steps, :3] - c["states"][0, :3]).norm() >= e.min_move]
        n_still += len(clips) - len(moving)
        n_episodes += bool(moving)
        every = np.linspace(0, len(moving) - 1, min(e.per_episode, len(moving))).round().astype(int)
        chosen += [moving[i] for i in every]
        if len(chosen) >= e.pairs:
            break
    if not chosen:
        if n_still:
            raise ValueError(f"{cfg.data.path}: in none of {n_still} clips the gripper moves {100 * e.min_move:g} cm between "
                             "context and goal; lower --energy.min_move or raise --data.frame_step")
        raise loader.nothing()
    say(f"{min(len(chosen), e.pairs)} pairs of {n_episodes} episodes"
        + (f" (energy.pairs asks for {e.pairs}; --energy.per_episode takes more of each)" if len(chosen) < e.pairs else "")
        + f"; left out: {n_still} clips that move less than {100 * e.min_move:g} cm; {loader.report()}")
    return chosen[:e.pairs]


def true_action(states, steps):
    """The action that, taken `steps` times, leads from the first pose to pose `steps`. states [T, 7] -> [7] float64."""
    action = pose_deltas(np.asarray(states)[[0, steps]])[0] / steps
    turn = Rotation.from_euler("xyz", steps * action[3:6]).as_rotvec() / steps
    action[3:6] = Rotation.from_rotvec(turn).as_euler("xyz")
    return action


def choose_adapter(predictor, adapter, lora_config):
    """Puts an adapter folder, or for "baseline" one that changes nothing, into the predictor in place of any other.
    Returns the size of the update against the weights, ||s B A|| / ||W|| over all adapted layers."""
    lora.remove(predictor)
    if adapter == "baseline":
        lora.inject(predictor, lora_config.rank, lora_config.alpha, 0.0, lora_config.targets, lora_config.rslora)
    else:
        lora.load(predictor, adapter)
    predictor.requires_grad_(False).eval()
    return lora.update_norm(predictor)


def analyse(cfg, adapters, path):
    """Landscapes, plans and controls of the baseline and of each adapter folder, on the same pairs.

    Writes `path` (.npz) after each checkpoint and returns its arrays. C checkpoints, P pairs, K actions, T frames a clip:
    checkpoints, training_steps [C] (-1: unknown), update_norm [C]; episodes [P], frames [P, 2, S, S, 3] context and goal, unless from latents;
    true_actions [P, 7]; for each of planes: actions_xy [P, K, 7], energy_xy [C, P, K]; energy_true, energy_zero [C, P];
    negatives [P, M, 7], energy_negatives [C, P, M]: real actions of other moments;
    loss, loss_shuffled, loss_zero [C, P]: teacher forcing with the clip's actions, with others, with none;
    horizon_l1 [C, P, T-1], horizon_copy [P, T-1]: L1 of the model's own prediction k frames on, and of copying frame 0;
    oracle_actions [P, F, 7], oracle_energy [P, F], oracle_truth [P, 7]: real frames of the clip instead of predictions;
    cem_moves, gradient_moves [C, P, H, 3] (m, the whole way), …_energy, …_seconds [C, P, H], true_moves [P, H, 3];
    null_difference: the largest |energy| difference of the base model to itself with adapters of zeros; first pair, first plane.
    Raises ValueError for an adapter that does not fit, before anything is computed."""
    e, path = cfg.energy, Path(path)
    device = model.resolve_device(cfg.device)
    cfg = speed.limit(cfg, device)
    precision = model.resolve_precision(cfg.precision, device)
    torch.manual_seed(cfg.seed)
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size, model.DTYPES[precision], device,
                                    encoder=not cfg.data.latents)
    if cfg.data.latents:
        latents.check(cfg, predictor.encoder_fingerprint)
    world = model.WorldModel(encoder, predictor)
    say(f"{model.device_name(device)}, {precision}; base {cfg.model.checkpoint} ({world.base_fingerprint})")
    names, adapters = names_of(adapters), ["baseline", *(a for a in adapters if a != "baseline")]
    norms = [choose_adapter(predictor, adapter, cfg.lora) for adapter in adapters]
    for name, norm in zip(names, norms):
        say(f"  {name}: update / weights {norm:.2e}"
            + (" WARNING: B is zero in all its layers, this is the baseline" if norm == 0 and name != "baseline" else ""))
    if device.type == "cpu" and sum(p.numel() for p in world.parameters()) > 1e8:
        say("no GPU: an action takes seconds at this size; --energy.pairs=1 --energy.grid=7 --energy.planners=[] is a start")
    clips = read_clips(cfg)
    h = [clip["h"].to(device).float() if "h" in clip else world.encode(clip["frames"][None].to(device))[0]
         for clip in clips]                                                                 # P x [T, N, D]
    world.encoder = encoder = None                                                          # its memory is free again
    arrays = _what_all_share(cfg, clips, h) | {
        "device": np.array(model.device_name(device)), "dtype": np.array(precision), "base": np.array(world.base_fingerprint)}
    chunk = chunk_size(cfg, device)
    if speed.compiles(cfg, device):
        speed.compile_world(world)
    per_pair = _evaluations(cfg, arrays)
    hidden = False if "ipykernel" in sys.modules else None          # None: hidden without a terminal, but not in a notebook
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=per_pair * len(clips) * len(names), unit="action", unit_scale=True, smoothing=0.05, disable=hidden)
    lora.remove(predictor)
    plane = e.planes[0]
    plain = landscape(world, h[0][:1], clips[0]["states"][:1], h[0][e.steps], arrays[f"actions_{plane}"][0], e.steps, chunk)
    found = []
    for name, adapter, norm in zip(names, adapters, norms):
        choose_adapter(predictor, adapter, cfg.lora)
        if name == "baseline":
            again = landscape(world, h[0][:1], clips[0]["states"][:1], h[0][e.steps], arrays[f"actions_{plane}"][0],
                              e.steps, chunk)
            arrays["null_difference"] = np.array((plain - again).abs().max().item())
        bar.set_description(name)
        pairs = []
        for p, clip in enumerate(clips):
            pairs.append(_one_pair(world, cfg, arrays, p, clip, h[p], chunk))
            bar.update(per_pair)
        found.append({key: np.stack([pair[key] for pair in pairs]) for key in pairs[0]})
        arrays |= {key: np.stack([one[key] for one in found]) for key in found[0]}
        done = len(found)
        arrays |= {"checkpoints": np.array(names[:done]), "update_norm": np.array(norms[:done]),
                   "training_steps": np.array([_training_step(n) for n in names[:done]])}
        files.write_npz(path, **arrays)
    bar.close()
    return arrays


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


def _what_all_share(cfg, clips, h):
    """The arrays that depend on the pairs alone."""
    e, P, steps = cfg.energy, len(clips), cfg.energy.steps
    random = np.random.default_rng(cfg.seed)
    states = np.stack([clip["states"].numpy() for clip in clips]).astype(float)            # [P, T, 7]
    truth = np.stack([true_action(s, steps) for s in states])                               # [P, 7]
    actions = np.stack([pose_deltas(s) for s in states])                                    # [P, T-1, 7]
    T = states.shape[1]
    pools = [np.concatenate([np.delete(actions, p, axis=0).reshape(-1, 7), actions[p, steps:]]) for p in range(P)]
    n_negatives = min(N_NEGATIVES, min(map(len, pools)))
    others = [i for i in range(1, T) if i != steps]
    arrays = {
        "episodes": np.array([clip["episode"] for clip in clips]), "planes": np.array(e.planes),
        "radius": np.array(e.radius), "steps": np.array(steps), "frame_step": np.array(cfg.data.frame_step),
        "true_actions": truth, "states": states,
        "negatives": np.stack([pool[random.choice(len(pool), n_negatives, False)] for pool in pools]),
        "shuffled": np.stack([pool[random.integers(len(pool), size=T - 1)] if len(pool) else np.full((T - 1, 7), np.nan)
                              for pool in pools]),
        "horizon_copy": np.stack([(x[1:] - x[:1]).abs().mean(dim=(1, 2)).cpu().numpy() for x in h]),
        "oracle_actions": np.stack([[pose_deltas(s[[0, i]])[0] for i in [0, *others]] if T > 1 else [] for s in states]),
        "oracle_energy": np.stack([(x[[0, *others]] - x[steps]).abs().mean(dim=(1, 2)).cpu().numpy() for x in h]),
        "oracle_truth": np.stack([pose_deltas(s[[0, steps]])[0] for s in states])}
    if "frames" in clips[0]:
        arrays["frames"] = np.stack([clip["frames"][:, [0, steps]].permute(1, 2, 3, 0).numpy() for clip in clips])
    for plane in e.planes:
        arrays[f"actions_{plane}"] = np.stack([grid(plane, e.radius, e.grid, t if e.others == "truth" else None)
                                               for t in truth])
    if e.planners:
        arrays["true_moves"] = states[:, 1:e.horizon + 1, :3] - states[:, :1, :3]           # [P, H, 3]
    return arrays


def _evaluations(cfg, arrays):
    """How many actions are evaluated per pair and checkpoint; a gradient step counts three."""
    e = cfg.energy
    n = e.steps * (sum(arrays[f"actions_{plane}"].shape[1] for plane in e.planes) + arrays["negatives"].shape[1] + 2)
    for h in range(1, e.horizon + 1):
        n += h * e.cem_samples * e.cem_iterations * ("cem" in e.planners) + 3 * h * 8 * 61 * ("gradient" in e.planners)
    return n


def _one_pair(world, cfg, arrays, p, clip, h, chunk):
    """The arrays of one checkpoint and one pair, as in `analyse` without [C, P]."""
    e, device, states = cfg.energy, h.device, clip["states"]
    planes = [arrays[f"actions_{plane}"][p] for plane in e.planes]
    single = [arrays["true_actions"][p][None], np.zeros((1, 7)), arrays["negatives"][p]]
    sizes = [len(part) for part in planes + single]
    energies = landscape(world, h[:1], states[:1], h[e.steps], np.concatenate(planes + single), e.steps, chunk)
    parts = [part.cpu().numpy() for part in energies.split(sizes)]
    out = {f"energy_{plane}": part for plane, part in zip(e.planes, parts)}
    out |= {"energy_true": parts[-3][0], "energy_zero": parts[-2][0], "energy_negatives": parts[-1]}

    def energy_of(goal):
        return lambda actions: rollout(world, h[:1], states[:1], goal, actions, chunk)

    if "cem" in e.planners:
        out |= _plans("cem", e, h, lambda goal, n: cem(energy_of(goal), n, e.cem_samples, e.cem_iterations, e.cem_elites,
                                                       e.radius, cfg.seed, device))
    with speed.eager():
        if "gradient" in e.planners:
            out |= _plans("gradient", e, h, lambda goal, n: gradient_plan(energy_of(goal), n, box=e.radius, seed=cfg.seed,
                                                                          device=device))
        out |= _with_wrong_actions(world, h, clip, arrays["shuffled"][p])
    return out


def _plans(planner, e, h, plan):
    plans = [plan(h[n], n) for n in range(1, e.horizon + 1)]
    return {f"{planner}_moves": np.stack([one.actions[:, :3].sum(0) for one in plans]),
            f"{planner}_energy": np.array([one.energy for one in plans]),
            f"{planner}_seconds": np.array([one.seconds for one in plans])}


@torch.no_grad()
def _with_wrong_actions(world, h, clip, shuffled):
    """Losses with the clip's own actions, with others and with none; L1 of the model's own predictions by horizon."""
    states, actions = clip["states"].to(h.device)[None], clip["actions"].to(h.device)[None]         # [1, T, 7]
    shuffled = F.pad(torch.from_numpy(shuffled).float(), (0, 0, 0, 1)).to(h.device)[None]
    out = {name: world.losses(h[None], a, states, rollout=0)["teacher_forcing"].item()
           for name, a in (("loss", actions), ("loss_shuffled", shuffled), ("loss_zero", torch.zeros_like(actions)))}
    own, memory = [h[None, :1]], None
    for n in range(len(h) - 1):
        z, memory = world.remember(own[-1], actions[:, n:n + 1], states[:, n:n + 1], memory, keep=n + 1)
        own.append(model.layer_norm(z))
    return out | {"horizon_l1": (torch.cat(own[1:], dim=1)[0] - h[1:]).abs().mean(dim=(1, 2)).cpu().numpy()}


# Speed and memory

def chunk_size(cfg, device):
    """Action sequences a batch: 200, or a divisor of it that half of the free memory holds (batches are filled up to one size)."""
    if device.type != "cuda":
        return 64
    e = cfg.energy
    steps = max(e.steps, e.horizon if e.planners else 1)
    fits = 0.5 * speed.free(cfg, device) / (258 * steps * BYTES_PER_TOKEN)
    return max(n for n in (200, 100, 50, 25, 10, 5, 2, 1) if n <= max(1, fits))


# Files and the command line

def load(path):
    """The arrays of landscapes.npz. Raises ValueError if it is missing or damaged."""
    try:
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; energy.py config.yaml --adapters=… writes it") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: not a whole .npz file ({error}); compute it again") from None


def say(text):
    tqdm.write(text)


def report(arrays, folder):
    """Numbers and figures of the arrays, written into `folder` -> the comparison, as in comparison.json."""
    result = compare.write(folder, arrays)
    figures.write(folder, arrays, result)
    return result


def main(args):
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return
    own = {key: text for key, _, text in (arg.partition("=") for arg in args) if key in ("--adapters", "--from")}
    args = [arg for arg in args if arg.partition("=")[0] not in own]
    started = time.monotonic()
    try:
        if "--from" in own:
            folder = Path(own["--from"]).parent
            arrays = load(own["--from"])
        else:
            cfg = config.load(args)
            folder = Path(cfg.out_dir) / "energy"
            arrays = analyse(cfg, [a for a in own.get("--adapters", "").split(",") if a], folder / "landscapes.npz")
        print(compare.table(report(arrays, folder)))
        print(f"\n{folder}: landscapes.npz, metrics.csv, comparison.json and figures; {time.monotonic() - started:.0f} s")
    except (ValueError, OSError) as error:
        sys.exit(f"energy.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
