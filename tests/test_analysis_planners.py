"""What planners spend and where they start; that they find minima is in test_energy.py."""
import pytest
import torch

from analysis import planners


def test_the_gradient_planner_spends_what_its_constants_say():
    shapes = []

    def energy_of(actions):
        shapes.append(tuple(actions.shape))
        return (actions[..., :3] ** 2).sum((1, 2))

    planners.gradient_plan(energy_of, horizon=2)
    expected = (planners.GRADIENT_STARTS, 2, 7)
    assert shapes == [expected] * (planners.GRADIENT_ITERATIONS + 1)


@pytest.mark.parametrize("planner", [planners.cem, planners.gradient_plan])
def test_the_best_plan_seen_is_returned_and_not_the_last(planner):
    seen = []

    def energy_of(actions):
        # lowest in the first call: what comes after is worse by 1 for each call
        energy = (actions[..., :3] ** 2).sum((1, 2)) + len(seen)
        seen.append(energy.detach())
        return energy

    plan = planner(energy_of)
    assert plan.energy == seen[0].min().item()
    again = (torch.from_numpy(plan.actions)[:, :3] ** 2).sum().item()
    assert again == pytest.approx(plan.energy, abs=1e-7)


@pytest.mark.parametrize("planner", [planners.cem, planners.gradient_plan])
def test_a_seed_fixes_the_plan(planner):
    def energy_of(actions):
        return torch.sin(90 * actions[..., :3]).sum((1, 2))

    plans = [planner(energy_of, iterations=2, seed=seed) for seed in (0, 0, 1)]
    assert (plans[0].actions == plans[1].actions).all()
    assert (plans[0].actions != plans[2].actions).any()
