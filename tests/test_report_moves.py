"""The true moves in report.html: charts of how far they go, and pairs that show the axes."""
import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from reports import made

from report import charts, moves


def arrays_of(actions, radius=0.1, planes=("xy", "xz"), **others):
    actions = np.array(actions, float).reshape(-1, 7)
    P = len(actions)
    return {"true_actions": actions, "radius": np.array(radius), "steps": np.array(1),
            "planes": np.array(planes), "frames": np.zeros((P, 2, 8, 8, 3), np.uint8)} | others


def move(x=0, y=0, z=0, rotation=(0, 0, 0), gripper=0):
    return [x, y, z, *rotation, gripper]


def bars(figure):
    """[(class, count)] of a chart, from left to right."""
    return [(kind, int(n)) for kind, n in
            re.findall(r'<rect class="(s\d)".*?<title>.*?: (\d+)</title>', figure)]


def figures(text):
    return re.findall(r"<figure.*?</figure>", text)


# Charts of moves

def test_each_number_of_a_move_has_its_chart_and_what_lies_outside_is_said():
    random = np.random.default_rng(0)
    actions = random.uniform(-0.09, 0.09, (64, 7))
    actions[:12, 0] = np.linspace(0.11, 0.16, 12)
    text = moves.histograms(arrays_of(actions))
    assert "12 of 64 true moves lie outside the grid: beyond ±10 cm in x, y or z." in text
    x, y, z, rotation, gripper = figures(text)
    for figure in (x, y, z, rotation, gripper):
        assert sum(n for _, n in bars(figure)) == 64 and "legend" not in figure
    assert sum(n for kind, n in bars(x) if kind == "s2") == 12
    assert {kind for kind, _ in bars(y) + bars(z) + bars(rotation) + bars(gripper)} == {"s1"}
    assert [one.count('class="mark"') for one in (x, y, z, rotation, gripper)] == [2, 2, 2, 0, 0]
    assert "Dotted: ±10 cm" in x and "Dotted" not in rotation + gripper
    assert "from 11 to" not in x and "to 16 cm" in x


def test_what_is_at_the_end_of_the_grid_is_inside():
    for radius in (0.075, 0.1, 0.12, 0.05, 0.33):
        for end in (radius, -radius, radius * (1 + 1e-12)):     # as rounding leaves it
            text = moves.histograms(arrays_of([move(end), move(0, end)], radius))
            assert "outside" not in text
            assert {kind for one in figures(text)[:3] for kind, _ in bars(one)} == {"s1"}
        text = moves.histograms(arrays_of([move(1.0001 * radius), move()], radius))
        assert "1 of 2 true moves lies outside" in text
        assert bars(figures(text)[0]) == [("s1", 1), ("s2", 1)]


def test_only_axes_that_a_grid_has_are_judged_by_it():
    text = moves.histograms(arrays_of([move(z=0.5), move()], planes=("xy",)))
    assert "outside" not in text and {kind for kind, _ in bars(figures(text)[2])} == {"s1"}
    assert "Dotted" in figures(text)[0] and "Dotted" not in figures(text)[2]
    text = moves.histograms(arrays_of([move(y=0.5), move()], planes=("y",)))
    assert "beyond ±10 cm in y." in text


def test_the_angle_is_that_of_the_whole_rotation():
    figure = figures(moves.histograms(arrays_of([move(rotation=(np.pi / 2, np.pi / 2, 0))])))[3]
    assert "All: 120°" in figure and bars(figure) == [("s1", 1)]


def test_what_rests_is_one_bar_in_the_middle_of_its_chart():
    *_, rotation, gripper = figures(moves.histograms(arrays_of([move(0.01), move(0.02)])))
    for figure, place in ((rotation, charts.LEFT), (gripper, (charts.LEFT + charts.WIDTH) / 2)):
        (x, width), = re.findall(r'<rect.*?x="([\d.]+)".*?width="([\d.]+)"', figure)
        assert abs(float(x) - place) < 40 and 20 < float(width) < 60
    assert "All: 0." in gripper


def test_steps_of_a_longer_move_are_called_so():
    assert "one of the 3 equal steps" in moves.histograms(
        arrays_of([move(0.01)], steps=np.array(3)))
    assert "equal steps" not in moves.histograms(arrays_of([move(0.01)]))


def test_any_moves_are_drawn_or_left_out():
    random = np.random.default_rng(0)
    assert moves.histograms(arrays_of([])) == ""
    assert moves.histograms(arrays_of([move(np.nan), move(y=np.inf)])) == ""
    assert "1 of 1 true moves lies" in moves.histograms(
        arrays_of([move(9), move(np.nan), move(gripper=-np.inf)]))
    for seed in range(80):
        scale = 10.0 ** random.integers(-12, 9)
        actions = scale * random.normal(size=(int(random.integers(1, 6)), 7))
        if seed % 4 == 0:
            actions[:] = actions[0]
        if seed % 4 == 1:
            actions[random.random(actions.shape) < 0.1] = random.choice([np.nan, np.inf])
        if seed % 8 == 2:
            actions[:] = 0
        n = np.isfinite(actions).all(axis=1).sum()
        arrays = arrays_of(actions, 10.0 ** random.integers(-3, 2),
                           random.choice(["x", "xy", "xyz", "yz"], 1))
        text = moves.histograms(arrays)
        assert len(figures(text)) == 5 * (n > 0) and not re.search(r"\bnan|\binf\b", text)
        for figure in figures(text):
            assert sum(count for _, count in bars(figure)) == n
            assert 1 <= len(bars(figure)) <= 40
            for x, y, width, height in re.findall(
                    r'x="([\d.-]+)" y="([\d.-]+)" width="([\d.-]+)" height="([\d.-]+)"', figure):
                assert charts.LEFT <= float(x) and float(x) + float(width) <= charts.WIDTH
                assert float(width) > 1 and float(height) > 1 and float(y) >= charts.TOP - 0.1
        moves.axes(arrays)


def test_far_moves_are_counted_in_the_outermost_bars():
    text = moves.histograms(arrays_of([move(0.01), move(500), move(-500, gripper=1)]))
    assert "in the outermost bars" in figures(text)[0]
    assert bars(figures(text)[0]) == [("s2", 1), ("s1", 1), ("s2", 1)]
    assert "outermost" not in figures(text)[1]


# Axes

def shown(text):
    """{axis: (the caption, number of images)}"""
    found = {}
    for figure in figures(text):
        caption = re.sub("<.*?>", "", re.search("<figcaption>(.*?)</figcaption>", figure)[1])
        found[caption.lstrip("+−")[0]] = caption, figure.count("<img")
    return found


def test_the_pair_that_moves_most_nearly_along_an_axis_shows_it():
    actions = [move(0.02, 0.01), move(0.05, 0.01, 0.01), move(0.009), move(0, -0.06, 0.03),
               move(z=0.001), move(0.03, 0.03, 0.03)]
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None, None] * np.full(
        (1, 2, 300, 400, 3), 40, np.uint8)
    text = moves.axes(arrays_of(actions, frames=frames))
    assert shown(text) == {
        "x": ("+x: pair 1, 5.2 cm, cosine 0.96", 2),
        "y": ("−y: pair 3, 6.7 cm, cosine 0.89; +y is the opposite way", 2),
        "z": ("z is not shown: no measured pair moves along it (by 1 cm or more).", 0)}
    sources = re.findall(r'src="data:image/jpeg;base64,(.*?)"', text)
    images = [Image.open(io.BytesIO(base64.b64decode(one))) for one in sources]
    assert {one.size for one in images} == {(256, 192)}
    assert [int(np.asarray(one).mean().round()) for one in images] == [40, 40, 120, 120]
    assert "context image of pair 3" in text and "goal image of pair 1" in text


def test_the_move_between_the_images_counts_and_not_that_of_a_step():
    actions = [move(0.004)]
    assert "not shown" in shown(moves.axes(arrays_of(actions)))["x"][0]
    text = moves.axes(arrays_of(actions, steps=np.array(3)))
    assert shown(text)["x"][0] == "+x: pair 0, 1.2 cm, cosine 1.00"


@pytest.mark.parametrize("least", [0.0101, 0.0099])
def test_a_short_move_shows_no_axis(least):
    assert ("pair 0" in moves.axes(arrays_of([move(least)]))) == (least > 0.01)


def test_without_images_there_is_a_sentence():
    arrays = made(P=3, frames=False)
    assert "no images, measured from stored latents" in moves.axes(arrays)
    assert "<img" not in moves.axes(arrays)
    assert "not shown" in moves.axes(arrays_of([])) and "not shown" in moves.axes(
        arrays_of([move(np.nan)]))
