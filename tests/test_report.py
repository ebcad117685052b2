"""report.html holds what the arrays hold, in one file, whatever names are in them."""
import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from reports import ODD_NAMES, made, make_quick, text_of

import config
import energy
from analysis import arrays as kinds
from analysis import compare, figures, verdict
from report import charts, logs, page, tables, text, viewer
from small import recipe


OLD = Path(__file__).parent / "old_files/landscapes.npz"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the parts of a comparison that take longest."""
    make_quick(monkeypatch)


class Page(HTMLParser):
    """A page taken apart as a browser does."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.scripts, self.inside = [], [], [], None
        self.feed(source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.texts.append(data)


def floats(packed):
    return np.frombuffer(base64.b64decode(packed), "<f4")


# What the page holds

def test_the_verdict_and_its_rows_are_those_of_the_terminal():
    arrays = made(C=3, P=12)
    result = compare.compare(arrays)
    found = Page(page.page(arrays, result))
    for sentence in verdict.verdict(result):
        assert " ".join(sentence.split()) in found.text
    for line in verdict.six_rows(result)[1:]:
        for number in re.findall(r"-?\d+\.\d+\*?", line.replace(",", ", ")):
            assert number in found.text
    for section in ("verdict", "viewer", "training", "figures", "data", "controls", "all"):
        assert ("section", {"id": section}) in found.tags
    assert "W*: rotation" in found.text and "self-consistency" not in found.text


def test_energies_are_those_of_the_arrays_in_every_bit():
    arrays = made(planes=("xy", "xyz", "yz"), flat=[(1, 2)])
    data = Page(text_of(arrays)).data
    assert data["checkpoints"] == ["baseline", "step_100", "step_200 (control)"]
    assert data["first"] == 1                               # the last one that is no control
    for plane, found in zip(arrays["planes"].tolist(), data["planes"]):
        for kind, prefix in (("l1", "energy"), ("l2", "l2")):
            expected = arrays[f"{prefix}_{plane}"]
            assert np.array_equal(floats(found[kind]["energy"]), expected.ravel())
            assert found[kind]["scale"] == figures.scale_end(expected)
        ticks, = found["ticks"]                             # all pairs have the same grid
        mesh = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(-1, len(plane))
        columns = ["xyz".index(axis) for axis in plane]
        assert mesh == pytest.approx(arrays[f"actions_{plane}"][0][:, columns], abs=1e-8)
        assert found["l1"]["flat"] == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert np.array_equal(floats(data["true"]["l1"]), arrays["energy_true"].ravel())
    assert data["truths"] == pytest.approx(arrays["true_actions"][:, :3], abs=1e-8)
    assert data["plans"][0]["moves"] == pytest.approx(arrays["cem_moves"][:, :, 0], abs=1e-8)
    assert [pair["frames"] for pair in data["pairs"]] == [[0, 4], [10, 14], [20, 24], [30, 34]]


def test_plans_are_drawn_as_one_step_of_those_that_look_as_far_as_the_goal():
    arrays = made()
    arrays |= {"steps": np.array(2), "plan_horizons": np.array([1, 2]),
               "cem_moves": np.concatenate([arrays["cem_moves"], 3 * arrays["cem_moves"]], axis=2),
               "true_moves": np.repeat(arrays["true_moves"], 2, axis=1)}
    for name in ("cem_energy", "cem_seconds"):
        arrays[name] = np.repeat(arrays[name], 2, axis=2)
    moves = viewer.content(arrays, compare.compare(arrays))["plans"][0]["moves"]
    assert moves == pytest.approx(1.5 * arrays["cem_moves"][:, :, 0], abs=1e-8)


def test_grids_of_pairs_that_differ_are_kept_apart():
    arrays = made(P=2)
    arrays["actions_xy"][1] *= 2
    xy, xz = viewer.content(arrays, compare.compare(arrays))["planes"]
    assert len(xy["ticks"]) == 2 and len(xz["ticks"]) == 1
    assert xy["ticks"][1][0][-1] == pytest.approx(0.2)


def test_the_file_loads_nothing_and_runs_one_script():
    source = text_of(made())
    found = Page(source)
    policy, = [a["content"] for tag, a in found.tags if a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    assert len(found.scripts) == 2
    for _, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://|\bfetch\b|XMLHttp|import\(", source)


def test_names_are_text_whatever_they_are(tmp_path):
    P = len(ODD_NAMES)
    arrays = made(C=3, P=P, points=3, planes=("xy",), frames=False)
    arrays["episodes"] = np.array(ODD_NAMES)
    arrays["checkpoints"] = np.array(ODD_NAMES[:3])
    arrays["validation"] = arrays["about_data"] = arrays["command"] = np.array(ODD_NAMES)
    arrays["device"] = np.array(ODD_NAMES[0])
    result = compare.compare(arrays)
    (tmp_path / "imagination").mkdir()
    page.write(tmp_path, arrays, result)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    plain = Page(text_of(made(C=3, P=P, points=3, planes=("xy",), frames=False)))
    assert len(found.scripts) == 2 and found.scripts[1] == plain.scripts[1]
    assert not set("<>&") & set(found.scripts[0])
    # no element, and no attribute, that other names do not give too
    shapes = [{(tag, *sorted(a)) for tag, a in one.tags} - {("pre",), ("code",)}
              for one in (found, plain)]
    assert shapes[0] - shapes[1] <= {("li",), ("ul",), ("details",), ("summary",)}
    for name, pair in zip(arrays["episodes"].tolist(), found.data["pairs"]):
        assert pair["episode"] == text.clean(name)
        assert " ".join(text.clean(name).split()) in found.text


def test_clean_shows_what_cannot_be_seen():
    assert text.clean("a\u202eb\udcff\n") == "a\\u202eb\\udcff\\n"
    assert text.clean("👩‍🔬 grün") == "👩‍🔬 grün" and text.html("<a>\x00") == "&lt;a&gt;\\x00"


# Arrays that lack something

def test_old_landscapes_give_a_report(tmp_path, capsys):
    shutil.copy(OLD, tmp_path / "landscapes.npz")
    energy.main([f"--from={tmp_path}"])
    assert f"{tmp_path}: report.html, figures" in capsys.readouterr().out
    data = Page((tmp_path / "report.html").read_text(encoding="utf-8")).data
    assert set(data["true"]) == {"l1"} and data["pairs"][0]["frames"] is None
    assert base64.b64decode(data["pairs"][1]["images"][1]).startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("change", [
    lambda a: a.pop("frames"), lambda a: a.pop("frame_numbers"),
    lambda a: [a.pop(key) for key in list(a) if key.startswith("l2_")],
    lambda a: [a.pop(key) for key in list(a) if key.startswith("cem_")],
    lambda a: a.update(energy_xy=np.full_like(a["energy_xy"], 0.7)),
    lambda a: a.update(energy_xy=np.zeros_like(a["energy_xy"])),
    lambda a: a.update(energy_xy=-a["energy_xy"]),
    lambda a: a.update(loss_shuffled=np.full_like(a["loss_shuffled"], np.nan)),
    lambda a: a.update(horizon_l1=a["horizon_l1"][:, :, :0], horizon_copy=a["horizon_copy"][:, :0],
                       l2_horizon=a["l2_horizon"][:, :, :0],
                       l2_horizon_copy=a["l2_horizon_copy"][:, :0]),
    lambda a: a.update(update_norm=np.full(2, np.nan)),
    lambda a: a.update(true_actions=30 * a["true_actions"]),
    lambda a: a.update(training_steps=np.array([0, -1])),
    lambda a: a.update(protocol=np.array("jepa_wms"), also=np.array("camera B"))])
def test_what_is_missing_or_odd_leaves_the_rest(change):
    arrays = made(C=2, P=2, planes=("xy",))
    change(arrays)
    found = Page(text_of(arrays))
    assert len(found.data["pairs"]) == 2
    assert "nan" not in found.text.lower().split()


def test_the_baseline_alone_and_one_pair():
    found = Page(text_of(made(C=1, P=1)))
    assert found.data["first"] == 0 and "TOO LITTLE DATA" in found.text


def test_a_second_data_set_is_in_the_verdict():
    arrays = made(C=2, P=12)
    result = compare.compare(arrays)
    assert "Forgetting: on the second data set" in Page(page.page(arrays, result, result)).text


def test_the_size_of_a_usual_comparison(tmp_path):
    """Noise, which compresses worst, as images."""
    arrays = made(C=3, P=16, points=21, planes=("xy", "xz", "yz"), size=256)
    page.write(tmp_path, arrays, compare.compare(arrays))
    assert (tmp_path / "report.html").stat().st_size < 8e6


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_strips_beside_the_page_are_put_in(tmp_path, monkeypatch):
    assert page.strips(tmp_path) == ""
    (tmp_path / "imagination").mkdir()
    assert page.strips(tmp_path) == ""
    random = np.random.default_rng(0)
    plain, noise = np.zeros((40, 60, 3), np.uint8), random.integers(0, 256, (90, 3000, 3), np.uint8)
    for name, data in (("imagination_10.png", png(plain)), ("imagination_9.png", png(noise)),
                       ("a<b>.png", png(plain)[:-9]), ("zebra.png", b"GIF89a"), ("no.txt", b"")):
        (tmp_path / "imagination" / name).write_bytes(data)
    (tmp_path / "imagination/folder.png").mkdir()
    found = page.strips(tmp_path)
    assert found.index("imagination 9") < found.index("imagination 10")
    assert base64.b64encode(png(plain)).decode() in found and found.count("<img") >= 2
    jpeg = base64.b64decode(re.search(r"image/jpeg;base64,(.*?)\"", found)[1])
    assert Image.open(io.BytesIO(jpeg)).size == (1600, 48)
    assert "zebra.png (no PNG" in found and "folder.png (no PNG" in found and "no.txt" not in found
    assert "<b>" not in found
    monkeypatch.setattr(page, "STRIPS_LIMIT", 1000)
    found = page.strips(tmp_path)
    assert "in imagination/:" in found and "imagination_9.png" in found


# Training curves

def test_a_log_is_read_past_what_is_torn_or_odd(tmp_path):
    good = [{"step": 0, "val_loss": 2.0, "val_l1": 1.0, "val_copy": 0.5, "val_shuffled": 1.0},
            {"step": 10, "loss": 0.4, "lr": 1e-4}, {"step": 10, "val_loss": 1.0}]
    odd = [b"", b"\xff\xfe", b"[1, 2]", b"null", b'{"step": "x", "loss": 1}', b'{"loss": 3}',
           b'{"step": 11, "loss": "high"}', b'{"step": 12, "loss": NaN}', b"[" * 5000,
           b'{"step": 13, "loss": 1e300}', b'{"step": true, "loss": 1}', b'{"step": 14, "lo']
    lines = [json.dumps(line).encode() for line in good]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, *odd]))
    values = logs.read(tmp_path / "metrics.jsonl")
    assert values[:, 0].tolist() == [0, 10, 10]
    assert values[0, 1:].tolist() == pytest.approx([np.nan, 2, 1, 1, 0.5], nan_ok=True)
    assert {values[1, 1], values[2, 2]} == {0.4, 1.0}
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    assert logs.read(tmp_path / "metrics.jsonl").shape == (0, len(logs.COLUMNS))
    with pytest.raises(ValueError, match="a folder, expected a file"):
        logs.read(tmp_path)


def test_a_long_log_is_thinned_by_its_means(tmp_path):
    lines = [{"step": step, "loss": float(step % 2)} for step in range(3000)]
    lines += [{"step": step, "val_loss": step} for step in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = logs.read(tmp_path / "metrics.jsonl")
    training = values[~np.isnan(values[:, 1])]
    assert len(training) == len(values) - len(training) == logs.MOST_ROWS
    assert training[:, 1] == pytest.approx(0.5) and (np.diff(values[:, 0]) >= 0).all()
    assert np.nanmax(values[:, 2]) == 999


def test_curves_are_drawn_for_each_run(tmp_path):
    arrays = made()
    values = np.full((2, 3, 6), np.nan)
    values[0] = [[0, np.nan, 2, 1, 1.5, 0.8], [5, 0.3, *4 * [np.nan]],
                 [10, np.nan, 1, 0.5, 1.4, 0.8]]
    values[1, 0] = [0, 0.9, *4 * [np.nan]]
    arrays |= {"log_runs": np.array(["lora", "<control>"]), "log_values": values,
               "run_of": np.array([-1, 0, 1])}
    kinds.check(arrays)
    first, second = logs.of_arrays(arrays)
    assert first.steps == [100] and len(first.values) == 3 and len(second.values) == 1
    found = Page(text_of(arrays, curves=[first, second])).text
    assert "L1 one frame ahead, on validation clips, lora" in found
    assert "Loss, <control>" in found and "clips, <control>" not in found
    # an earlier version's, in the folder of a run
    folder = tmp_path / "energy/step_5"
    folder.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 0.25}\n')
    found, = logs.of_folder(made(), folder)
    assert found.values[0, :2].tolist() == [3, 0.25]
    assert logs.of_folder(made(), tmp_path) == [] != logs.of_folder(arrays, tmp_path)


def test_charts_of_any_numbers_are_drawn_or_left_out():
    random = np.random.default_rng(0)
    for seed in range(60):
        scale = 10.0 ** random.integers(-12, 12)
        n = int(random.integers(1, 40))
        y = scale * (random.normal(size=n) * (seed % 3 > 0) + seed % 2)
        y[random.random(n) < 0.2] = np.nan
        drawn = charts.chart("t", "x", [charts.Line("a", np.arange(n), y, seed % 20, y - 1, y + 1),
                                        charts.Line("b", [0], [np.inf], -1)], zero=seed % 4 > 0)
        assert bool(drawn) == np.isfinite(y).any() and not re.search("nan|inf", drawn)
        ticks = re.findall(r'text-anchor="end">(.*?)<', drawn)
        assert len(set(ticks)) == len(ticks)


# Glossary and figures

def test_the_glossary_has_the_rows_and_is_left_out_without_its_source(monkeypatch, tmp_path):
    found = tables.glossary()
    for *_, title in verdict.ROWS:
        assert text.html(title) in found, title
    assert "plan distance to truth" in found and "**" not in found
    monkeypatch.setattr(tables, "GLOSSARY", tmp_path / "none.md")
    assert tables.glossary() == ""


def test_figures_show_noise_as_flat_and_what_the_camera_saw():
    arrays = made(C=2, P=3, flat=[(c, p) for c in range(2) for p in range(3)])
    figure = figures.heat_maps(arrays, "xy")
    frames, maps = figure.axes[:3], [a for a in figure.axes[3:] if a.images]
    assert len(maps) == 6 and {panel.images[0].get_clim() for panel in maps} == {(0, 1.0)}
    gap = arrays["frames"].shape[2] // 16
    seen = np.asarray(frames[1].images[0].get_array())
    assert np.array_equal(seen[:, :32], arrays["frames"][1, 0])
    assert np.array_equal(seen[:, 32 + gap:], arrays["frames"][1, 1])
    assert frames[2].get_title() == "pair 2\nepisode 1\nframe 20 → 24"
    with matplotlib.rc_context(figures.STYLE):
        assert not matplotlib.rcParams["axes.formatter.useoffset"]
    landscape = np.array([1.0, 1.5, 2.0, 3.5])              # mean 2
    assert figures.above_minimum(landscape).tolist() == [0, 25, 50, 125]


# What the analysis adds for the report

@pytest.fixture(scope="module")
def analysed(base, tmp_path_factory):
    """Of frames, and of latents that were stored from them: arrays of both, and the Config."""
    import latents
    folder = tmp_path_factory.mktemp("described")
    short = ["--data.val_fraction=1", "--energy.grid=5", "--energy.planes=[xy]",
             "--energy.pairs=3", "--energy.planners=[]", "--energy.steps=2",
             "--energy.horizon=2"]
    frames = recipe(base, folder, *short)
    stored = recipe(base, folder, *short, f"--data.latents={folder}/store")
    latents.encode(stored)
    return [energy.analyse(cfg, [], folder / f"{name}.npz")
            for name, cfg in (("frames", frames), ("stored", stored))] + [frames, folder]


def test_latents_have_the_images_that_they_were_made_from(analysed):
    of_frames, of_latents, *_ = analysed
    assert np.array_equal(of_frames["frames"], of_latents["frames"])
    assert of_latents["frames"].shape == (3, 2, 64, 64, 3)


def test_an_analysis_says_what_it_was_made_of(analysed):
    arrays, _, cfg, _ = analysed
    assert arrays["validation"].tolist() == [f"episode_{i}.npz" for i in range(6)]
    assert "6 for validation" in arrays["about_data"][0]
    python, script, *words = arrays["command"].tolist()
    again = config.load(words)
    assert (python, script) == ("python", "energy.py")
    for part in ("data", "energy", "model", "seed", "precision"):
        assert getattr(again, part) == getattr(cfg, part)
    found = Page(text_of(arrays)).text
    assert "--energy.steps=2" in found and "All 6 validation episodes" in found


def test_results_of_an_earlier_version_get_what_they_lack(analysed):
    arrays, _, cfg, folder = analysed
    old = {key: value for key, value in arrays.items()
           if key not in ("command", "commit", "about_data", "validation")}
    np.savez(folder / "earlier.npz", **old)
    found = energy.analyse(cfg, [], folder / "earlier.npz")
    assert found.keys() == arrays.keys() == energy.load(folder / "earlier.npz").keys()


def test_frame_numbers_and_runs(analysed, tmp_path, capsys):
    from test_energy import save_adapter

    from droid import validation_loaders
    from evaluation.described import described
    _, _, cfg, _ = analysed
    clips = [clip | {"start": 5 + i, "frame_step": 3} for i, clip in
             enumerate(energy.read_clips(cfg))]
    for run, log in (("a/run", '{"step": 1, "loss": 2}\n'), ("b/run", ""), ("c", None)):
        (tmp_path / run).mkdir(parents=True)
        if log is not None:
            (tmp_path / run / "metrics.jsonl").write_text(log)
    adapters = ["baseline", *(save_adapter(tmp_path / f"{run}/step_{n}") for run, n in (
        ("a/run", 1), ("b/run", 2), ("c", 3), ("a/run", 4)))]
    found = described(cfg, clips, validation_loaders(cfg), adapters)
    assert found["frame_numbers"].tolist() == [[5, 11], [6, 12], [7, 13]]
    assert found["log_runs"].tolist() == ["a/run", "b/run"]
    assert found["run_of"].tolist() == [-1, 0, 1, -1, 0]
    assert found["log_values"].shape == (2, 1, 6) and found["log_values"][0, 0, 1] == 2
