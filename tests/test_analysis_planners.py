"""Planners find known minima within their bounds; what they spend, return and refuse. That they are
the published ones is in test_planners_published.py."""
import numpy as np
import pytest
import torch

from analysis import planners
from analysis.planners import cem, cem_jepa_wms, gradient_plan, mppi


SAMPLING = [cem, cem_jepa_wms, mppi]
ALL = [*SAMPLING, gradient_plan]

# metres: inside, near the corner of the box (and of the ball of jepa-wms), near zero
MINIMA = [(0.03, -0.05, 0.02), (0.056, -0.056, 0.056), (0.003, 0.001, -0.002)]
LANDSCAPES = {
    "bowl": lambda d: 1 + (d ** 2).sum(-1),
    "narrow bowl": lambda d: (d ** 2 * torch.tensor([1.0, 16.0, 4.0])).sum(-1),
    "cone": lambda d: 0.4 + d.norm(dim=-1),
    "L1 cone": lambda d: 100 * d.abs().sum(-1),
}


def towards(minimum, landscape="cone"):
    """Energy by where the moves lead together, lowest at `minimum`."""
    return lambda a: LANDSCAPES[landscape](a[..., :3].sum(1) - torch.tensor(minimum))


def recorded(energy_of):
    """The function, and the list of all actions that it gets."""
    seen = []

    def and_record(actions):
        seen.append(actions.detach().clone())
        return energy_of(actions)
    return and_record, seen


@pytest.mark.parametrize("planner", ALL)
@pytest.mark.parametrize("landscape", LANDSCAPES)
@pytest.mark.parametrize("horizon", [1, 2])
def test_known_minima_are_found(planner, landscape, horizon):
    for minimum in MINIMA:
        goal = horizon * np.array(minimum, np.float32)
        energy_of = towards(goal.tolist(), landscape)
        plan = planner(energy_of, horizon=horizon)
        assert plan.actions.shape == (horizon, 7) and plan.actions.dtype == np.float32
        within = 0.002 if planner is gradient_plan else 0.0015
        assert np.linalg.norm(plan.actions[:, :3].sum(0) - goal) < within * horizon
        again = energy_of(torch.from_numpy(plan.actions)[None]).item()
        assert plan.energy == pytest.approx(again, abs=1e-6) and plan.seconds > 0


def test_minima_at_and_beyond_the_edge_of_the_box_are_found():
    for planner in (cem, mppi, gradient_plan):
        plan = planner(towards([0.074, -0.073, 0.0]))
        assert plan.actions[0, :3] == pytest.approx([0.074, -0.073, 0], abs=1e-3)
        plan = planner(towards([0.3, 0.0, 0.0]))
        assert plan.actions[0, :3] == pytest.approx([0.075, 0, 0], abs=2e-3)
    # a ball: the direction stays
    plan = cem_jepa_wms(towards([0.3, -0.3, 0.0]), horizon=1)
    assert plan.actions[0, :3] == pytest.approx([0.0707, -0.0707, 0], abs=2e-3)


def test_rotation_and_gripper_are_found_by_those_that_search_them():
    target = torch.tensor([0.02, -0.03, 0.01, 0.04, -0.02, 0.05, 0.4])
    plan = cem_jepa_wms(lambda a: (a - target).norm(dim=-1).sum(1), horizon=2)
    assert plan.actions == pytest.approx(np.tile(target, (2, 1)), abs=2e-3)
    plan = cem(lambda a: (a - target).norm(dim=-1).sum(1))
    assert plan.actions[0] == pytest.approx([0.02, -0.03, 0.01, 0, 0, 0, 0.4], abs=5e-3)
    for planner in (mppi, gradient_plan):
        assert (planner(lambda a: (a - target).norm(dim=-1).sum(1)).actions[:, 3:] == 0).all()


@pytest.mark.parametrize("closedness, returned", [
    (0.2, 0), (-0.2, 0), (0.3, 0.3), (-0.3, -0.3), (5.0, 0.75)])
def test_meta_rounds_small_gripper_moves_to_none(closedness, returned):
    energy_of, seen = recorded(lambda a: (a[..., 6] - closedness).abs().sum(1))
    plan = cem(energy_of)
    assert plan.actions[0, 6] == pytest.approx(returned, abs=0.01)
    assert plan.energy == pytest.approx(abs(plan.actions[0, 6] - closedness), abs=1e-6)
    assert seen[-1].numpy() == pytest.approx(plan.actions[None])


@pytest.mark.parametrize("planner", ALL)
@pytest.mark.parametrize("horizon", [1, 3])
def test_every_action_that_is_evaluated_is_within_the_bounds(planner, horizon, monkeypatch):
    monkeypatch.setattr(planners, "JEPA_WMS_STD", 1.0)      # 0.1 hardly reaches the gripper's
    # slopes down to the corner, and to far too much turning and gripping
    energy_of, seen = recorded(lambda a: -a.sum((1, 2)) - a[..., 6].sum(1))
    own = {} if planner is cem_jepa_wms else {"box": 0.06}
    planner(energy_of, horizon=horizon, **own)
    actions = torch.cat(seen).flatten(0, 1).numpy()                     # [n, 7]
    gripper = np.abs(actions[:, 6]).max()
    if planner is cem_jepa_wms:
        norm = np.linalg.norm(actions[:, :6], axis=1).max()
        assert norm == pytest.approx(0.1) and norm <= 0.1 + 1e-7
        assert gripper == pytest.approx(0.75)
        return
    assert np.abs(actions[:, :3]).max() == pytest.approx(0.06, rel=1e-6)
    assert (actions[:, 3:6] == 0).all()
    assert gripper == pytest.approx(0.75 if planner is cem else 0, rel=1e-6)


@pytest.mark.parametrize("planner", SAMPLING)
def test_the_sampling_planners_spend_their_samples_and_one_more(planner):
    energy_of, seen = recorded(towards(MINIMA[0]))
    plan = planner(energy_of, horizon=2, samples=20, iterations=4)
    assert [tuple(a.shape) for a in seen] == 4 * [(20, 2, 7)] + [(1, 2, 7)]
    assert not any((sample.numpy() == plan.actions).all() for sample in torch.cat(seen[:-1]))
    energy_of, seen = recorded(towards(MINIMA[0]))
    planner(energy_of)
    horizon, samples, iterations = (3, 300, 15) if planner is cem_jepa_wms else (1, 800, 10)
    assert [tuple(a.shape) for a in seen[:-1]] == iterations * [(samples, horizon, 7)]


def test_the_gradient_planner_spends_what_its_constants_say():
    energy_of, seen = recorded(lambda a: (a[..., :3] ** 2).sum((1, 2)))
    gradient_plan(energy_of, horizon=2)
    expected = (planners.GRADIENT_STARTS, 2, 7)
    assert [tuple(a.shape) for a in seen] == [expected] * (planners.GRADIENT_ITERATIONS + 1)


def test_the_gradient_planner_returns_the_best_plan_seen_and_not_the_last():
    seen = []

    def energy_of(actions):
        # lowest in the first call: what comes after is worse by 1 for each call
        energy = (actions[..., :3] ** 2).sum((1, 2)) + len(seen)
        seen.append(energy.detach())
        return energy

    plan = gradient_plan(energy_of)
    assert plan.energy == seen[0].min().item()
    again = (torch.from_numpy(plan.actions)[:, :3] ** 2).sum().item()
    assert again == pytest.approx(plan.energy, abs=1e-7)


@pytest.mark.parametrize("planner", ALL)
def test_a_seed_fixes_the_plan_whatever_else_is_drawn(planner):
    def energy_of(actions):
        return torch.sin(90 * actions[..., :3]).sum((1, 2))

    plans = []
    for seed in (0, 0, 1):
        torch.randn(3)
        plans.append(planner(energy_of, iterations=2, seed=seed))
    assert (plans[0].actions == plans[1].actions).all()
    assert (plans[0].actions != plans[2].actions).any()


@pytest.mark.parametrize("planner", SAMPLING)
@pytest.mark.parametrize("energy", [0.0, 0.7, 1e-30, 1e30])
def test_a_flat_landscape_has_a_finite_plan(planner, energy):
    plan = planner(lambda a: torch.full((len(a),), energy), samples=50)
    assert np.isfinite(plan.actions).all() and plan.energy == np.float32(energy)


def test_a_flat_landscape_gives_all_samples_of_mppi_the_same_weight():
    energy_of, seen = recorded(lambda a: torch.full((len(a),), 0.7))
    plan = mppi(energy_of, samples=50, iterations=1)
    assert plan.actions == pytest.approx(seen[0].mean(0).numpy(), abs=1e-7)


@pytest.mark.parametrize("planner", SAMPLING)
def test_the_scale_of_energies_does_not_matter(planner):
    plan = planner(towards(MINIMA[0]), iterations=4)
    scaled = planner(lambda a: towards(MINIMA[0])(a).double() / 4096, iterations=4)
    assert scaled.actions == pytest.approx(plan.actions, abs=1e-6)


@pytest.mark.parametrize("planner", ALL)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_energies_that_are_not_finite_are_refused(planner, wrong):
    # of some actions, and of all
    for limit in (0.01, -9):
        def energy_of(actions, limit=limit):
            x = actions[..., 0].sum(1)
            return torch.where(x > limit, wrong, x ** 2)

        with pytest.raises(ValueError, match="^energies of .* are not finite .*--precision=.*$"):
            planner(energy_of)
    if planner is not gradient_plan:        # of the plan alone
        with pytest.raises(ValueError, match="not finite"):
            planner(lambda a: a[..., 0].sum(1) if len(a) > 1 else torch.tensor([wrong]))


@pytest.mark.parametrize("planner", [cem, cem_jepa_wms])
@pytest.mark.parametrize("samples, elites", [(10, 1), (10, 0), (10, 11), (1, 1)])
def test_elites_without_a_standard_deviation_are_refused(planner, samples, elites):
    with pytest.raises(ValueError, match=f"elites must be .*{samples}.* not {elites}$"):
        planner(towards(MINIMA[0]), samples=samples, elites=elites)
    planner(towards(MINIMA[0]), samples=2, elites=2)
