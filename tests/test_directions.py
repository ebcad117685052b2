"""Direction apart from magnitude: known where the answer is, at chance or undefined elsewhere."""
import numpy as np
import pytest

from analysis import measures
from energy import grid


TRUE = np.array([0.03, -0.05, 0.02])
LENGTH = np.linalg.norm(TRUE)
MULTIPLES = np.linspace(0, 2, 21)
PLANES = [("xy", 21), ("xz", 21), ("yz", 21), ("xyz", 11)]


def turned(degrees, vector=TRUE):
    """The vector, turned by an angle about an axis at right angles to it."""
    across = np.cross(vector, [0, 0, 1.0])
    across *= np.linalg.norm(vector) / np.linalg.norm(across)
    return np.cos(np.deg2rad(degrees)) * vector + np.sin(np.deg2rad(degrees)) * across


def cone(centre):
    return lambda moves: 0.4 + np.linalg.norm(moves - centre, axis=-1)


def measured(energy_of, truth=TRUE, points=400):
    """`shell` and `ray` of a landscape over moves [K, 3]."""
    moves = np.linalg.norm(truth) * measures.sphere(points)
    found = measures.shell(moves, energy_of(moves), truth, energy_of(truth))
    return found | measures.ray(MULTIPLES, energy_of(MULTIPLES[:, None] * truth))


def on_grid(energy_of, axes, points, truth=TRUE):
    actions = grid(axes, 0.1, points)
    return measures.metrics(actions, energy_of(actions[:, :3]), np.append(truth, np.zeros(4)))


def all_nan(found):
    return bool(np.isnan(list(found.values())).all())


# Known answers

def test_a_cone_at_the_truth():
    found = measured(cone(TRUE))
    assert found["shell_percentile"] == 0 and found["shell_spearman"] == pytest.approx(1)
    assert found["shell_angle"] < 8
    assert found["ray_minimum"] == pytest.approx(1) and found["ray_at_zero"] == 0
    energies = 0.4 + LENGTH * np.abs(MULTIPLES - 1)
    assert found["ray_gain"] == pytest.approx(LENGTH / energies.mean())


@pytest.mark.parametrize("degrees", [20, 70, 120])
def test_a_cone_in_a_wrong_direction(degrees):
    found = measured(cone(turned(degrees)))
    # the cap of the sphere that is nearer to the centre of the cone than the truth is
    cap = 50 * (1 - np.cos(np.deg2rad(degrees)))
    assert found["shell_percentile"] == pytest.approx(cap, abs=1)
    assert found["shell_angle"] == pytest.approx(degrees, abs=8)
    # the point of the ray nearest to the centre of the cone
    assert found["ray_minimum"] == pytest.approx(max(0, np.cos(np.deg2rad(degrees))), abs=0.02)
    assert found["ray_at_zero"] == (degrees > 90)
    assert (found["ray_gain"] > 0) == (degrees < 60)


def test_a_cone_at_the_opposite_of_the_truth():
    found = measured(cone(-TRUE))
    assert found["shell_percentile"] == 100 and found["shell_spearman"] == pytest.approx(-1)
    assert found["shell_angle"] > 172
    assert found["ray_minimum"] == 0 and found["ray_at_zero"] == 1 and found["ray_gain"] < 0


@pytest.mark.parametrize("multiple", [0.25, 0.5, 1.5])
def test_a_cone_of_another_length_has_the_right_direction(multiple):
    found = measured(cone(multiple * TRUE))
    assert found["shell_percentile"] == 0 and found["shell_spearman"] == pytest.approx(1)
    assert found["ray_minimum"] == pytest.approx(multiple, abs=0.03)
    gain = multiple - abs(1 - multiple)
    assert found["ray_gain"] == pytest.approx(
        gain * LENGTH / (0.4 + LENGTH * np.abs(MULTIPLES - multiple)).mean(), abs=1e-9)


def test_a_minimum_beyond_the_ray_is_at_its_end():
    assert measured(cone(3 * TRUE))["ray_minimum"] == 2
    assert measures.ray([0, 1], [1.0, 0.5])["ray_minimum"] == 1
    backwards = measures.ray([-1, 0, 1], [1.0, 2.0, 3.0])
    assert backwards["ray_minimum"] == -1 and backwards["ray_at_zero"] == 0


def test_the_angle_of_parallel_moves_is_defined_in_spite_of_rounding():
    for truth in np.random.default_rng(0).normal(scale=0.05, size=(300, 3)):
        moves = np.stack([truth, -truth, np.cross(truth, [0, 0, 1])])
        for lowest, angle in enumerate((0, 180, 90)):
            energies = np.ones(3)
            energies[lowest] = 0.5
            found = measures.shell(moves, energies, truth, 0.9)
            assert found["shell_angle"] == pytest.approx(angle, abs=1e-4)


@pytest.mark.parametrize("lowest", [0.02, 0.73, 0.999, 1.6, 1.95])
def test_the_minimum_of_a_parabola_is_exact_whatever_the_spacing(lowest):
    multiples = np.array([1, 0, 0.25, 2, 0.5, 0.9, 1.1, 1.5, 0.1, 1.8])
    energies = 3 + 0.2 * (multiples - lowest) ** 2
    found = measures.ray(multiples, energies)
    inside = 0.05 < lowest < 1.9
    assert found["ray_minimum"] == pytest.approx(lowest if inside else round(lowest), abs=1e-6)
    assert found["ray_gain"] == pytest.approx(
        0.2 * (lowest ** 2 - (1 - lowest) ** 2) / energies.mean())


# On a grid

@pytest.mark.parametrize("axes, points", PLANES)
@pytest.mark.parametrize("degrees", [0, 40, 90, 180])
def test_the_angle_on_a_grid_is_that_of_the_swept_axes(axes, points, degrees):
    kept = ["xyz".index(axis) for axis in axes]
    truth, centre = np.array([0.06, -0.06, 0.06]), np.zeros(3)
    if len(axes) == 3:
        centre = turned(degrees, truth)
    else:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        a, b = truth[kept]
        centre[kept] = c * a - s * b, s * a + c * b
    # what is not swept must not count
    offset = np.delete(np.arange(3), kept)
    truth[offset] = 0.3
    found = on_grid(lambda moves: np.linalg.norm((moves - centre)[:, kept], axis=1), axes, points,
                    truth)
    assert found["angle"] == pytest.approx(degrees, abs=8)
    assert found["direction_cosine"] == pytest.approx(np.cos(np.deg2rad(found["angle"])))
    assert found["at_zero"] == 0


@pytest.mark.parametrize("axes, points", [*PLANES, ("xy", 8), ("xyz", 6)])
def test_a_minimum_at_the_zero_action_is_counted(axes, points):
    """With an even number of points zero lies between four (eight) that are equally near."""
    for nudge in (0, 1e-4, -1e-4):
        found = on_grid(cone(nudge), axes, points)
        assert found["at_zero"] == 1
        # a point at zero has no direction, those around it have one
        assert np.isnan(found["angle"]) == np.isnan(found["direction_cosine"]) == points % 2
    spacing = 0.2 / (points - 1)
    away = on_grid(cone(1.4 * spacing), axes, points)
    assert away["at_zero"] == 0 and np.isfinite(away["angle"])


def test_a_truth_of_no_length_has_no_direction():
    for truth in (np.zeros(3), np.full(3, 1e-12)):
        found = on_grid(cone(TRUE), "xy", 21, truth)
        assert np.isnan(found["angle"]) and np.isnan(found["direction_cosine"])
        assert np.isnan(found["length_ratio"]) and found["at_zero"] == 0
        assert all_nan(measures.shell(np.zeros((5, 3)), np.arange(5.0), truth, 2.0))
    found = on_grid(cone(TRUE), "xy", 21, np.array([0, 0, 0.05]))
    assert np.isnan(found["angle"])


@pytest.mark.parametrize("share, flat", [(0.0099, 1), (0.0101, 0), (0.16, 0), (1e-7, 1), (0, 1)])
def test_a_landscape_within_1_percent_of_its_mean_is_flat(share, flat):
    random = np.random.default_rng(0)
    actions = grid("xy", 0.1, 21)
    relief = random.uniform(-1, 1, len(actions))
    relief -= relief.mean()
    relief *= share / np.ptp(relief)
    for scale in (1e-3, 1, 50):
        found = measures.metrics(actions, scale * (1 + relief), np.append(TRUE, np.zeros(4)))
        assert found["flat"] == flat
        assert found["relative_range"] == pytest.approx(share)
        # flat is not constant: what can be measured is
        assert np.isfinite(found["argmin_error"]) == np.isfinite(found["at_zero"]) == (share > 1e-6)


def test_energies_that_are_not_finite_are_undefined():
    for wrong in (np.nan, np.inf):
        energies = np.linspace(1, 2, 441)
        energies[7] = wrong
        with np.errstate(invalid="ignore"):
            found = measures.metrics(grid("xy", 0.1, 21), energies, np.append(TRUE, np.zeros(4)))
        undefined = ("relative_range", "flat", "at_zero", "angle", "rank")
        assert np.isnan([found[name] for name in undefined]).all()
        assert all_nan(measures.ray(MULTIPLES, energies[:21]))
        moves = LENGTH * measures.sphere(441)
        assert all_nan(measures.shell(moves, energies, TRUE, 1.0))
        assert all_nan(measures.shell(moves, np.linspace(1, 2, 441), TRUE, wrong))


# Undefined, or at chance

def test_equal_energies_count_half():
    moves = LENGTH * measures.sphere(8)
    energies = np.array([1, 2, 3, 4, 4, 5, 6, 7.0])
    assert measures.shell(moves, energies, TRUE, 4)["shell_percentile"] == 50
    assert measures.shell(moves, energies, TRUE, 1)["shell_percentile"] == 6.25
    assert measures.shell(moves, energies, TRUE, 0)["shell_percentile"] == 0
    assert measures.shell(moves, energies, TRUE, 9)["shell_percentile"] == 100


def test_moves_of_one_energy_with_the_truth_apart_have_a_percentile_only():
    for n in (1, 8):
        found = measures.shell(LENGTH * measures.sphere(n), np.ones(n), TRUE, 0.5)
        assert found["shell_percentile"] == 0
        assert np.isnan(found["shell_angle"]) and np.isnan(found["shell_spearman"])
    assert all_nan(measures.shell(np.zeros((0, 3)), [], TRUE, 0.5))


@pytest.mark.filterwarnings("error")
def test_moves_of_one_angle_have_no_order():
    ring = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0]])
    found = measures.shell(ring, [1.0, 2, 3], [0, 0, 1], 1.5)
    assert found["shell_angle"] == 90 and np.isnan(found["shell_spearman"])


@pytest.mark.parametrize("truth", [TRUE, [0.001, 0, 0], [0, 0, -0.13]])
def test_a_prior_for_short_moves_has_no_direction(truth):
    found = measured(lambda moves: 0.4 + np.linalg.norm(moves.astype(np.float32), axis=-1),
                     np.array(truth))
    assert all(np.isnan(found[name]) for name in found if name.startswith("shell"))
    assert found["ray_minimum"] == 0 and found["ray_at_zero"] == 1 and found["ray_gain"] < 0
    assert all_nan(measured(lambda moves: np.full(moves.shape[:-1], 0.4), np.array(truth)))


def intervals(prior, noise, seed):
    """Of 200 landscapes in 20 episodes: 0.4 + prior · |move| + noise of that std."""
    random = np.random.default_rng(seed)

    def energy_of(moves):
        moves = np.asarray(moves)
        rough = noise * random.normal(size=moves.shape[:-1])
        return 0.4 + prior * np.linalg.norm(moves, axis=-1) + rough

    found = []
    for i in range(200):
        direction = random.normal(size=3)
        truth = random.uniform(0.01, 0.1) * direction / np.linalg.norm(direction)
        axes, points = PLANES[i % 4]
        found.append(on_grid(energy_of, axes, points, truth) | measured(energy_of, truth, 64))
    episodes = np.repeat(np.arange(20), 10)
    return {name: measures.cluster_bootstrap([one[name] for one in found], episodes)
            for name in found[0]}


@pytest.mark.parametrize("prior, noise", [(0, 0.01), (1, 0.01)])
def test_noise_and_a_prior_with_noise_are_at_chance(prior, noise):
    found = intervals(prior, noise, seed=1)
    for name in ("shell_percentile", "shell_angle", "shell_spearman", "angle", "direction_cosine"):
        mean, low, high = found[name]
        assert low < measures.METRICS[name].chance < high, name
        width = {"direction_cosine": 0.4, "shell_spearman": 0.1}.get(name, 30)
        assert 0 < high - low < width, name
    if prior:
        assert found["at_zero"][0] > 0.2 and found["ray_at_zero"][0] > 0.2
        assert found["ray_gain"][2] < 0 and found["ray_minimum"][2] < 0.5
        # among all lengths the prior looks like a signal, since true moves are short
        assert found["rank"][2] < 30
    else:
        assert found["at_zero"][0] < 0.05 and 0.8 < found["ray_minimum"][0] < 1.2
        assert found["ray_gain"][1] < 0 < found["ray_gain"][2]


# Directions

def test_a_sphere_is_even():
    everywhere = np.random.default_rng(0).normal(size=(500, 3))
    everywhere /= np.linalg.norm(everywhere, axis=1, keepdims=True)
    for n in range(1, 501):
        found = measures.sphere(n)
        assert found.shape == (n, 3)
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-12
        assert np.linalg.norm(found.mean(axis=0)) < 1.1 / n
        if n > 30 and n % 47:
            continue
        # as far apart, and as near to any direction, as the area of each allows
        if n > 1:
            apart = np.linalg.norm(found[:, None] - found, axis=-1) + 9 * np.eye(n)
            assert apart.min() * n ** 0.5 > 2
        if n > 3:
            away = np.linalg.norm(everywhere[:, None] - found, axis=-1).min(axis=1)
            assert away.max() * n ** 0.5 < 3.6


@pytest.mark.parametrize("multiples", [[0, 0.5, 2], [0.5, 1], [], [0.1, 1.001]])
def test_a_ray_without_zero_or_the_truth_is_refused(multiples):
    with pytest.raises(ValueError, match="^a ray needs the multiples 0 and 1 .*$"):
        measures.ray(multiples, np.arange(len(multiples)))


def test_multiples_may_be_rounded_repeated_and_in_any_order():
    multiples = np.array([2, 1 + 1e-13, 0, 0.5, 1, 1.5, -0.0], np.float64)
    energies = 1 + (multiples - 1) ** 2
    found = measures.ray(multiples, energies)
    assert found["ray_minimum"] == pytest.approx(1)
    exact = measures.ray(np.float32([0, 0.5, 1, 1.5, 2]), np.float32([2, 1.25, 1, 1.25, 2]))
    assert found == pytest.approx(exact)
