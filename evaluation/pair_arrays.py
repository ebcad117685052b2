"""What an analysis measures of its pairs without a landscape: the arrays that depend on the pairs
alone, such as truths, grids and controls, and the losses of a checkpoint on their clips."""
import numpy as np
import torch

from episodes.pairs import true_action
from episodes.poses import pose_deltas
from evaluation.energies import grid, ray, roll_out, shell
from evaluation.protocol import plan_horizons, protocol_name


N_NEGATIVES = 32            # real actions of other moments that each true action is compared with
N_SHELL = 64                # actions as long as the true one, 24° from the next one
RAY_MULTIPLES = np.linspace(0, 2, 9)        # of the true action, with 0 and 1 among them


def pair_arrays(cfg, clips, h):
    """The arrays that depend on the pairs alone, not on a checkpoint."""
    e, P, steps, now = cfg.energy, len(clips), cfg.energy.steps, cfg.energy.context - 1
    random = np.random.default_rng(cfg.seed)
    goal = now + steps
    states = np.stack([clip["states"].numpy() for clip in clips]).astype(float)     # [P, T, 7]
    truth = np.stack([true_action(s[now:], steps) for s in states])                 # [P, 7]
    actions = np.stack([pose_deltas(s) for s in states])                            # [P, T-1, 7]
    T = states.shape[1]

    # Real actions of other moments: those of other pairs, and the pair's own after the goal.
    pools = [np.concatenate([np.delete(actions, p, axis=0).reshape(-1, 7), actions[p, goal:]])
             for p in range(P)]
    n_negatives = min(N_NEGATIVES, min(map(len, pools)))
    negatives = [pool[random.choice(len(pool), n_negatives, False)] for pool in pools]
    shuffled = [pool[random.integers(len(pool), size=T - 1)] if len(pool)
                else np.full((T - 1, 7), np.nan) for pool in pools]

    # Energies between real frames: what a perfect predictor could reach with this encoder. The
    # goal itself is left out: its energy would be zero.
    others = [i for i in range(T) if i != goal]
    real_actions = [[pose_deltas(s[[now, i]])[0] if i != now else np.zeros(7) for i in others]
                    for s in states]
    real_energy = [_mean_l1(x[others], x[goal]) for x in h]

    arrays = {
        "episodes": np.array([clip["episode"] for clip in clips]), "planes": np.array(e.planes),
        "radius": np.array(e.radius), "steps": np.array(steps),
        "context": np.array(e.context), "protocol": np.array(protocol_name(e)),
        "objective": np.array(e.objective),
        "frame_step": np.array(clips[0]["frame_step"]), "true_actions": truth, "states": states,
        "negatives": np.stack(negatives), "shuffled": np.stack(shuffled),
        "horizon_copy": np.stack([_mean_l1(x[1:], x[:1]) for x in h]),
        "l2_horizon_copy": np.stack([_mean_l2(x[1:], x[:1]) for x in h]),
        "oracle_actions": np.stack(real_actions), "oracle_energy": np.stack(real_energy),
        "oracle_truth": np.stack([pose_deltas(s[[now, goal]])[0] for s in states]),
        "actions_shell": np.stack([shell(t, N_SHELL) for t in truth]),
        "actions_ray": np.stack([ray(t, RAY_MULTIPLES) for t in truth]),
        "ray_multiples": RAY_MULTIPLES}
    if "frames" in clips[0]:
        arrays["frames"] = np.stack([clip["frames"][:, [now, goal]].permute(1, 2, 3, 0).numpy()
                                     for clip in clips])
    for plane in e.planes:
        arrays[f"actions_{plane}"] = np.stack(
            [grid(plane, e.radius, e.grid, t if e.others == "truth" else None) for t in truth])
    if e.planners:
        horizons = plan_horizons(cfg)
        arrays["plan_horizons"] = np.array(horizons)                                # [H]
        arrays["true_moves"] = np.stack(
            [states[:, now + n, :3] - states[:, now, :3] for n in horizons], axis=1)    # [P, H, 3]
    return arrays


def _mean_l1(z, h):
    """Mean L1 of each frame, z [n, N, D] against h [N, D] or [1, N, D]: [n] in NumPy."""
    return (z - h).abs().mean(dim=(1, 2)).cpu().numpy()


def _mean_l2(z, h):
    """The same with the mean of the squares."""
    return (z - h).square().mean(dim=(1, 2)).cpu().numpy()


@torch.no_grad()
def losses_and_horizons(world, h, clips, shuffled):
    """Losses of B clips with their own actions, with others and with none, which differ if the
    model uses actions; and L1 and L2 of the model's own predictions by horizon.

    h: list of B latents [T, N, D]; shuffled [B, T-1, 7]. Returns loss, loss_shuffled, loss_zero
    [B], horizon_l1 and l2_horizon [B, T-1] in NumPy."""
    h = torch.stack(list(h))
    states, actions = (torch.stack([torch.as_tensor(clip[key]) for clip in clips]).to(h.device)
                       for key in ("states", "actions"))                            # [B, T, 7]
    others = torch.from_numpy(np.asarray(shuffled)).to(actions)
    kinds = {"loss": actions[:, :-1], "loss_shuffled": others,
             "loss_zero": torch.zeros_like(others)}
    out = {}
    for name, a in kinds.items():
        predicted = world.predict(h[:, :-1], a, states[:, :-1])                     # [B, T-1, N, D]
        out[name] = (predicted - h[:, 1:]).abs().mean(dim=(1, 2, 3)).cpu().numpy()
    off = roll_out(world, h, actions, states) - h[:, 1:]
    return out | {"horizon_l1": off.abs().mean(dim=(2, 3)).cpu().numpy(),
                  "l2_horizon": off.square().mean(dim=(2, 3)).cpu().numpy()}
