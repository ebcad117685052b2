"""Arrays, pages and tabs of a browser for the tests of report.html."""
from contextlib import contextmanager
from functools import partial

import numpy as np
from test_verdict import RADIUS, arrays_of

from analysis import compare, measures
from energy import grid
from report import page


READY = "document.querySelector('#map').width > 100"
# Names as file systems and people make them: each shows as text and does nothing else.
ODD_NAMES = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"quotes' & `ticks`",
    "<!-- <script>", "]]>", "{{data}} {{nothing}}", "${x} \\1 \\g<0> $1 %s", "&lt;b&gt; &amp;amp;",
    "line\nbreak\ttab\r", "bytes that are no text \udcff\udc80", "right \u202e to left \u2066",
    "\u2028line\u2029", "grün/日本語/العربية", "👩‍🔬 🤖", "\x00nul\x07bell\x1b[31m", " ", "x" * 300,
    "javascript:alert(1)", "a/b/trajectory.h5", "= 1 + 1", "é vs é", "\ufeffbom",
    "' onmouseover='alert(1)", "</style><style>*{display:none}</style>", "</title>", "\u00ad\u200b"]


def made(C=3, P=4, points=7, planes=("xy", "xz"), frames=True, size=32, flat=(), seed=0):
    """Arrays as of `energy.analyse`. Each of `flat` is a (checkpoint, pair) whose landscapes are.
    The last checkpoint of several is a control; pairs 0 and 1 are of one episode, and so on."""
    arrays, random = arrays_of(C, n_pairs=P, l2=True, seed=seed), np.random.default_rng(seed)
    arrays["is_control"] = (np.arange(C) == C - 1).astype(int) * (C > 2)
    arrays["planes"] = np.array(planes)
    minima = arrays["cem_moves"][:, :, 0]                                   # [C, P, 3]
    for plane in planes:
        actions = np.stack([grid(plane, RADIUS, points, t) for t in arrays["true_actions"]])
        away = np.linalg.norm(actions[None, :, :, :3] - minima[:, :, None], axis=-1)
        energy = 0.4 + away + 0.01 * random.normal(size=away.shape)
        for c, p in flat:
            energy[c, p] = 0.4 + 1e-4 * away[c, p]
        arrays[f"actions_{plane}"] = actions
        arrays[f"energy_{plane}"] = energy.astype(np.float32)
        arrays[f"l2_{plane}"] = (energy ** 2).astype(np.float32)
    for name in ("energy_true", "l2_true"):
        arrays[name] = arrays[name].astype(np.float32)
    if frames:
        arrays["frames"] = random.integers(0, 256, (P, 2, size, size, 3)).astype(np.uint8)
    arrays["frame_numbers"] = np.stack([10 * np.arange(P), 10 * np.arange(P) + 4], axis=1)
    return arrays


def make_quick(monkeypatch):
    """A comparison with fewer resamples, and without what takes long and is not looked at."""
    monkeypatch.setattr(measures, "cluster_bootstrap", partial(measures.cluster_bootstrap, n=50))
    monkeypatch.setattr(measures, "N_ANGLE_RESAMPLES", 4)
    monkeypatch.setattr(measures, "_monotone_rays", lambda *_: np.nan)


def text_of(arrays, **others):
    """The page of arrays."""
    return page.page(arrays, compare.compare(arrays), **others)


@contextmanager
def opened(browser, path, width=1280, ready=READY, **options):
    """A tab with the page; nothing in it may fail, and nothing may be loaded. ready: what is true
    when its script has run."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    tab, faults = context.new_page(), []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("data:", "file:"))
           or faults.append(request.url))
    tab.goto(path.as_uri())
    if ready:
        tab.wait_for_function(ready)
    files = tab.evaluate("performance.getEntriesByType('resource')"
                         ".filter((one) => !one.name.startsWith('data:')).length")
    yield tab
    assert not faults and files == 0
    context.close()
