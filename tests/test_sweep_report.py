"""report.html of sweep.py: what it holds, whatever the values and numbers are."""
import re
import shlex
import shutil
from html import unescape

import numpy as np
import pytest
from reports import ODD_NAMES, opened
from test_sweep import command, run_of, stored  # noqa: F401 (a fixture)

import config
import sweep
from analysis import sweeps
from report import charts, sweep_page


def result_of(*runs, max_steps=10, criterion=("val_l1", "val_l1", False)):
    return sweeps.result(*criterion, max_steps, runs)


def usual(n=4):
    """n runs, of which the worse half is stopped at step 5; the last one fails."""
    runs = []
    for i in range(n):
        points = [(0, 0.5), (5, 0.4 + i / 1000), (10, 0.3 + i / 1000)][:3 if i < n / 2 else 2]
        fault = "the loss is nan: lower --lr" if n > 1 and i == n - 1 else ""
        runs.append(run_of({"lr": f"{(i + 1) * 1e-4:g}", "camera": f"<{i}>"}, *points, fault=fault))
    return result_of(*runs)


def page_of(result, settings=None, words=("python", "sweep.py")):
    return sweep_page.page(result, settings or {}, words, "name")


def text_of(page):
    return " ".join(unescape(re.sub("<[^<>]*>", " ", page.partition("<body>")[2])).split())


def chart_of(page, section="curves"):
    return re.search(f'<section id="{section}">.*?</section>', page, re.S)[0]


def ends_of(chart):
    """{name of a line: x of its last point}"""
    return {name: float(re.findall(r"[ML]([\d.]+) ", body)[-1]) for name, body in
            re.findall(r"<g><title>(.*?)</title>(.*?)</g>", chart) if 'd="M' in body}


# What it holds

def test_the_page_says_what_the_terminal_says():
    found = usual()
    page = page_of(found, words=["python", "sweep.py", "--over=lr=1,2", "a b"])
    text = text_of(page)
    for sentence in sweeps.sentences(found):
        assert " ".join(sentence.split()) in text
    assert page.count('<li class="bad">') == 1          # that a run failed
    for row in sweeps.rows(found):
        for cell in row:
            assert str(cell) in text
    assert "the loss is nan: lower --lr" in chart_of(page, "runs")
    assert shlex.join(["python", "sweep.py", "--over=lr=1,2", "a b"]) in text


def test_what_must_not_be_missed_is_marked():
    worse = run_of({"lr": "1"}, (0, 0.2), (10, 0.3))
    worse.validations[10]["val_shuffle_ratio"] = 1.001
    marked = re.findall('<li class="bad">(.*?)</li>', page_of(result_of(worse)))
    assert [line[:20] for line in marked] == ["The base model has 0", "It hardly uses the a"]
    assert '<li class="bad">No run came' in page_of(result_of(run_of({"lr": "1"}, (0, 0.2))))
    assert "bad" not in page_of(result_of(run_of({"data.path": "bad"}, (0, 2), (10, 1)))).split(
        '"verdict">')[1].split("</ul>")[0].replace("data.path=bad", "")


def test_it_loads_nothing_and_has_no_script():
    page = page_of(usual(), {"data.path": "https://example.org/<script>"})
    assert "default-src 'none'; img-src data:;\n style-src 'unsafe-inline'\">" in page
    assert "<script" not in page and "script-src" not in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_a_curve_ends_where_its_run_was_stopped():
    chart = chart_of(page_of(usual()))
    ends = ends_of(chart)
    first, second, third, fourth = (next(x for name, x in ends.items() if name.startswith(
        f"Run {i}: ")) for i in (1, 2, 3, 4))
    assert first == second > third == fourth
    assert "stopped at step 5" in chart and "failed at step 5" in chart
    assert "among the worse half and was stopped" in chart and ends["base model"] == first
    assert len(set(re.findall(r'<li>.*?class="(s\d)"', chart))) == 4      # each its own colour


def test_of_many_runs_the_best_one_stands_out():
    chart = chart_of(page_of(usual(60)))
    legend = re.findall(r"</svg>([^<]*)</li>", chart)
    assert legend[0].startswith("Run 1: lr=0.0001")
    assert sorted(legend[1:]) == ["base model", "other runs", "stopped early"]
    assert len(ends_of(chart)) == sweep_page.MOST_CURVES + 1
    assert re.findall("<title>(.*?)</title>", chart)[-1].startswith("Run 1: ")      # above others
    assert "The best 50 of 60 runs." in chart
    page = page_of(usual(60))
    assert "The other 10 runs" in page and all(f">Run {i}<" in page for i in range(1, 61))


def test_a_run_that_diverges_does_not_flatten_the_others():
    found = result_of(run_of({"lr": "1"}, (0, 0.5), (10, 0.4)),
                      run_of({"lr": "2"}, (0, 0.5), (5, 0.6), (10, 4e5), fault="x"))
    chart = chart_of(page_of(found))
    assert "Values above 1.5 are not shown." in chart
    assert "e+" not in chart and "400000" not in chart


def test_a_larger_value_can_be_the_better_one():
    found = result_of(run_of({"lr": "1"}, (0, 1), (10, 9)), run_of({"lr": "2"}, (0, 1), (10, 2)),
                      criterion=("shuffle_ratio", "val_l1", True))
    chart = chart_of(page_of(found))
    assert "Higher is better." in chart and "not shown" not in chart
    assert "Run 1: lr=1<" in chart


def test_settings_that_differ_from_the_defaults_come_first():
    settings = config.flat(config.Config()) | {"max_steps": 77, "data.path": "<data>"}
    shown = re.search('<section id="settings">.*?</section>',
                      page_of(usual(), settings), re.S)[0]
    own, folded = shown.split("<details>")
    assert re.findall(r'<th scope="row">(.*?)</th><td data-head="value">(.*?)</td>', own) == [
        ("max_steps", "77"), ("data.path", "&lt;data&gt;")]
    assert "lora.rank" in folded and folded.count('scope="row"') == len(settings) - 2


# By value

@pytest.mark.parametrize("texts, labels", [
    (["16", "8", "32"], ["8", "16", "32"]), (["1e-3", "1e-5"], ["1e-5", "1e-3"]),
    (["b", "a"], ["b", "a"]), (["true", "false", "1"], ["true", "false", "1"]),
    ([f"{10 ** -k:g}" for k in range(2, 10)],
     ["1e-09", "1e-08", "1e-07", "1e-06", "1e-05", "0.0001", "0.001", "0.01"]),
    ([f"{x:g}" for x in np.linspace(1e-4, 9e-4, 9)], ["0.0001", "0.0002", "0.0005"]),
])
def test_values_have_their_ticks(texts, labels):
    places, ticks, found, (low, high) = sweep_page._axis(texts)
    assert found == labels or len(found) <= sweeps.MOST_TICKS and set(found) <= set(labels)
    assert len(ticks) == len(found) and all(low < x < high for x in [*places.values(), *ticks])
    assert len(set(places.values())) == len(texts)


def test_any_sweep_is_a_page():
    random = np.random.default_rng(0)
    for seed in range(60):
        numbers = 10.0 ** random.integers(-9, 9, 1) * random.normal(size=30)
        kind = seed % 6
        texts = [[f"{x:g}" for x in numbers], [f"{abs(x):g}" for x in numbers], ODD_NAMES[:30],
                 ["nan", "inf", "0", "-0", "1e400", "1"], ["x"], ["0.1", "1_0", "0x1"]][kind]
        runs = []
        for text in dict.fromkeys(texts[:int(random.integers(1, 31))]):
            n = int(random.integers(0, 300 if seed % 10 == 0 else 5))
            points = zip(range(int(random.integers(0, 2)), n + 1),
                         10.0 ** random.integers(-6, 9) * random.normal(size=n + 1))
            run = run_of({"a.b": text, "c": "1"}, *points, fault=random.choice(["", "<fault>"]))
            for one in run.validations.values():
                if random.random() < 0.1:
                    del one["val_l1"]
            runs.append(run)
        page = page_of(result_of(*runs, max_steps=300, criterion=(
            "val_l1", "val_l1", bool(seed % 2))))
        for figure in re.findall("<figure.*?</figure>", page, re.S):
            drawn = re.sub("<title>.*?</title>|<text.*?</text>|<li>.*?</li>", "", figure)
            assert not re.search(r'="[^"]*\b(nan|inf)\b', drawn)
            for x in re.findall(r'[ M"L](?:cx="|d="M)([-\d.]+)', drawn):
                assert charts.LEFT - 1 <= float(x) <= charts.WIDTH
        assert "<fault>" not in page


# Names

def test_values_are_text_whatever_they_are(tmp_path):
    plain = page_of(usual(len(ODD_NAMES)))
    runs = [run_of({"data.camera": name, "lr": name}, (0, 0.5), (10, 0.4)) for name in ODD_NAMES]
    found = result_of(*runs)
    page = page_of(found, {name: name for name in ODD_NAMES}, ODD_NAMES)

    def shapes(page):
        return {re.sub('="[^"]*"', "", tag) for tag in re.findall("<[^<>]*>", page)}
    assert shapes(page) - shapes(plain) <= {"<b>", "</b>", "<figure class>"}
    assert "<script" not in page and "<img" not in page and not set("\u202e\u2066\x00") & set(page)
    page.encode()
    for i in range(0, len(runs), 5):
        sweeps.draw(result_of(*runs[i:i + 5]), tmp_path / "sweep.png")
    sweep_page.write(tmp_path, found, {}, ["x"])


def test_sweep_writes_it(base, stored, tmp_path, capsys):  # noqa: F811
    names = ["<b>&amp;.pt", "👩‍🔬\u202e.pt"]
    for name in names:
        shutil.copy(base / "base.pt", tmp_path / name)
    out = tmp_path / "a<i>b"
    sweep.main(command(base, stored, out, "--max_steps=2",
                       f"--over=model.checkpoint={tmp_path}/{names[0]},{tmp_path}/{names[1]}",
                       "--halvings=1"))
    assert f"{out}/sweep: report.html, sweep.csv" in capsys.readouterr().out
    page = (out / "sweep/report.html").read_text(encoding="utf-8")
    text = text_of(page)
    assert "Sweep a<i>b" in text and "👩‍🔬\\u202e.pt" in text and "<b>&amp;.pt" in text
    again = shlex.split(unescape(re.search("<code>(.*?)</code>", page)[1]))
    assert again[:3] == ["python", "sweep.py", "config.yaml"] and "--halvings=1" in again
    assert "--max_steps=2" in again
    settings = chart_of(page, "settings")
    assert ">max_steps<" in settings and ">batch_size<" in settings
    assert ">model.checkpoint<" not in settings and page.count('scope="row">Run ') == 2


# In a browser

@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_screen_and_loads_nothing(browser, tmp_path, width):
    runs = [run_of({"data.path": f"/{'x' * 200}{i}", "lr": str(i)}, (0, 0.5), (10, 0.3 + i / 100),
                   fault="long " * 40 if i == 11 else "") for i in range(12)]
    sweep_page.write(tmp_path, result_of(*runs), config.flat(config.Config()), ["sweep.py"])
    with opened(browser, tmp_path / "report.html", width, ready=None) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for n in range(tab.locator("figure").count()):
            box = tab.locator("figure").nth(n).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 100
        row = tab.locator("#runs tbody tr").first
        heads = row.evaluate("(row) => [...row.cells].map((one) => getComputedStyle(one, "
                             "'::before').content)")
        assert ('"L1"' in heads) == (width == 400)      # a row is a card
        overflow = tab.locator("#runs .scroll").evaluate("(one) => one.scrollWidth")
        assert width > 400 or overflow <= width
