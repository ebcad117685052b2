"""The sampling planners against their formulas, written down again in NumPy and float64 from the
same stream of noise, on latents of the small official network."""
from functools import partial

import numpy as np
import pytest
import torch

import energy
import model
from analysis import planners
from parity import SHARED, tiny


HORIZON, SAMPLES, ITERATIONS, ELITES, BOX, SEED = 2, 24, 3, 6, 0.075, 3
SIZE = {"horizon": HORIZON, "samples": SAMPLES, "iterations": ITERATIONS, "seed": SEED}


@pytest.fixture(scope="module")
def energy_of_formula():
    """Of a context, its pose and a goal whose latents are drawn."""
    world = model.WorldModel(*tiny()).eval()
    h = model.layer_norm(torch.randn(2, 16, 52, generator=torch.Generator().manual_seed(0)))
    states = np.array([[0.3, 0.1, 0.4, 3.0, 0.1, -0.2, 0.5]])
    return partial(energy.sequence_energy, world, h[:1], states, h[1])


@pytest.fixture(scope="module")
def energy_of_franka():
    file = SHARED / "data/franka_example_traj.npz"
    if not file.exists():
        pytest.skip("the Franka pair is not here")
    arrays = np.load(file)
    world = model.WorldModel(*tiny(image_size=256)).eval()
    frames = torch.from_numpy(arrays["observations"][0]).permute(3, 0, 1, 2)[None]
    h, states = world.encode(frames)[0], arrays["states"][0].astype(np.float64)
    return partial(energy.sequence_energy, world, h[:1], states[:1], h[1])


@pytest.fixture(params=["energy_of_formula", "energy_of_franka"])
def energy_of(request):
    return request.getfixturevalue(request.param)


class Recorded:
    """energy_of, with all samples and energies kept."""

    def __init__(self, energy_of):
        self.energy_of, self.rounds = energy_of, []

    def __call__(self, actions):
        with torch.no_grad():
            energies = self.energy_of(actions)
        self.rounds.append((actions.double().numpy(), energies.double().numpy()))
        return energies

    def replay(self):
        """evaluate: [K, H, 7] -> [K] in NumPy, for the same samples in the same order. Energies of
        this network differ by 1e-5 of their value: computed twice, they could change places."""
        rounds = iter(self.rounds)

        def evaluate(actions):
            samples, energies = next(rounds)
            assert np.abs(actions - samples).max() < 1e-6
            return energies
        return evaluate

    def anew(self, actions):
        return self.energy_of(torch.from_numpy(actions).float()).detach().double().numpy()


def noise():
    """[ITERATIONS, K, H, 7]: standard normal, of the planners' generator."""
    random = torch.Generator().manual_seed(SEED)
    return [torch.randn(SAMPLES, HORIZON, 7, generator=random).double().numpy()
            for _ in range(ITERATIONS)]


def meta(evaluate, momentum_mean=0.15, momentum_std=0.15, ddof=1, limit=0.75):
    """The mean of Meta's CEM: [H, 7]."""
    xyz, grip = np.zeros((HORIZON, 3)), np.zeros((HORIZON, 1))
    xyz_std, grip_std = np.full((HORIZON, 3), BOX), np.ones((HORIZON, 1))
    for draw in noise():
        x = np.clip(draw[..., :3] * xyz_std + xyz, -BOX, BOX)
        g = np.clip(draw[..., 6:] * grip_std + grip, -limit, limit)
        actions = np.concatenate([x, np.zeros((SAMPLES, HORIZON, 3)), g], axis=2)
        i = np.argsort(evaluate(actions), kind="stable")[:ELITES]
        xyz = momentum_mean * xyz + (1 - momentum_mean) * x[i].mean(0)
        grip = momentum_mean * grip + (1 - momentum_mean) * g[i].mean(0)
        xyz_std = momentum_std * xyz_std + (1 - momentum_std) * x[i].std(0, ddof=ddof)
        grip_std = momentum_std * grip_std + (1 - momentum_std) * g[i].std(0, ddof=ddof)
    grip[np.abs(grip) < 0.25] = 0
    return np.concatenate([xyz, np.zeros((HORIZON, 3)), grip], axis=1)


def difference(a, b):
    """Largest of all moves, in metres."""
    return np.abs(a - b)[:, :3].max()


def test_cem_gives_the_mean_of_metas_formula(energy_of, monkeypatch):
    recorded = Recorded(energy_of)
    plan = planners.cem(recorded, elites=ELITES, box=BOX, **SIZE)
    mean = meta(recorded.replay())
    assert np.abs(plan.actions - mean).max() < 1e-5
    assert plan.energy == pytest.approx(recorded.anew(mean[None])[0], abs=1e-6)

    # what could be taken for it is far away: the best sample, and no momentum
    samples, energies = (np.concatenate(x) for x in zip(*recorded.rounds[:-1]))
    assert difference(samples[energies.argmin()], mean) > 1e-3
    monkeypatch.setattr(planners, "MOMENTUM", 0.0)
    without = planners.cem(energy_of, elites=ELITES, box=BOX, **SIZE)
    assert difference(without.actions, mean) > 1e-3


@pytest.mark.parametrize("change", [
    {"momentum_mean": 0}, {"momentum_std": 0}, {"momentum_mean": 0.85}, {"ddof": 0}, {"limit": 9}])
def test_another_formula_gives_another_mean(energy_of_formula, change):
    recorded = Recorded(energy_of_formula)
    plan = planners.cem(recorded, elites=ELITES, box=BOX, **SIZE)
    assert np.abs(plan.actions - meta(recorded.replay())).max() < 1e-5
    assert np.abs(plan.actions - meta(recorded.anew, **change)).max() > 1e-4


def test_cem_gives_the_mean_of_the_formula_of_jepa_wms(energy_of):
    recorded = Recorded(energy_of)
    plan = planners.cem_jepa_wms(recorded, elites=ELITES, **SIZE)
    evaluate = recorded.replay()
    mean, std = np.zeros((HORIZON, 7)), np.full((HORIZON, 7), 0.1)
    for draw in noise():
        actions = mean + std * draw
        for action in actions.reshape(-1, 7):
            norm = np.sqrt(np.sum(action[:6] ** 2))
            if norm > 0.1:
                action[:6] *= 0.1 / norm
            action[6] = min(max(action[6], -0.75), 0.75)
        i = np.argsort(evaluate(actions), kind="stable")[:ELITES]
        mean, std = actions[i].mean(0), actions[i].std(0, ddof=1)
    assert np.abs(plan.actions - mean).max() < 1e-5
    assert plan.energy == pytest.approx(recorded.anew(mean[None])[0], abs=1e-6)


def test_mppi_weighs_by_the_exponential_of_the_energy(energy_of):
    recorded = Recorded(energy_of)
    plan = planners.mppi(recorded, box=BOX, **SIZE)
    evaluate = recorded.replay()
    mean, std = np.zeros((HORIZON, 3)), np.full((HORIZON, 3), BOX)
    for draw in noise():
        x = np.clip(mean + std * draw[..., :3], -BOX, BOX)
        energies = evaluate(np.concatenate([x, np.zeros((SAMPLES, HORIZON, 4))], axis=2))
        weights = np.exp(-(energies - energies.min()) / (planners.TEMPERATURE * energies.std()))
        weights = (weights / weights.sum())[:, None, None]
        mean = (weights * x).sum(0)
        std = np.sqrt((weights * (x - mean) ** 2).sum(0))
    assert np.abs(plan.actions[:, :3] - mean).max() < 1e-5
    assert (plan.actions[:, 3:] == 0).all()
