"""report.html in a browser without a window: every control does what it says, at two widths."""
import numpy as np
import pytest
from reports import ODD_NAMES, made, make_quick, opened

from analysis import compare
from report import page


C, P, POINTS = 3, 5, 7
PAIR = 1                # whose true action is outside of the grid


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(path of a page, its arrays)"""
    arrays = made(C, P, POINTS, planes=("xy", "xz", "xyz"), flat=[(1, 3), (2, 3)])
    arrays["true_actions"][PAIR, :2] = 0.3, -0.2
    arrays["episodes"] = np.array(["first", "first", *ODD_NAMES[:3]])
    folder = tmp_path_factory.mktemp("<a> & ü %20#")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        page.write(folder, arrays, compare.compare(arrays))
    return folder / "report.html", arrays


def place(tab, i, j, points=POINTS):
    """Where the cell of tick i of the first axis and j of the second is on the screen."""
    box = tab.locator("#map").bounding_box()
    side = box["width"] - 48 - 8
    return (box["x"] + 48 + (i + 0.5) * side / points,
            box["y"] + 8 + (points - j - 0.5) * side / points)


def energy(tab):
    return np.float32(tab.inner_text("#energy"))


def pixels(tab, canvas):
    return tab.evaluate(f"document.querySelector('{canvas}').toDataURL()")


def press(tab, group, text):
    tab.locator(f"#{group} label", has_text=text).first.click()


def chosen(tab):
    """(pair, checkpoint) as they are marked among all pairs."""
    button = tab.locator("#overview button[aria-pressed=true]")
    return tuple(int(button.get_attribute(f"data-{name}")) for name in ("pair", "checkpoint"))


@pytest.mark.parametrize("width", [1280, 400])
def test_the_number_under_the_pointer_is_that_of_the_arrays(browser, report, width):
    path, arrays = report
    with opened(browser, path, width) as tab:
        tab.locator("#map").scroll_into_view_if_needed()
        for p, c, plane, kind in [(0, 1, "xy", "energy"), (2, 0, "xz", "l2"), (4, 2, "xy", "l2")]:
            tab.select_option("#pair", str(p))
            tab.select_option("#checkpoint", str(c))
            press(tab, "planes", f"Δx–Δ{plane[1]}")
            press(tab, "kinds", {"energy": "L1", "l2": "L2"}[kind])
            tab.locator("#map").scroll_into_view_if_needed()
            for i, j in [(0, 0), (3, 5), (6, 2)]:
                tab.mouse.move(*place(tab, i, j))
                assert energy(tab) == arrays[f"{kind}_{plane}"][c, p].reshape(7, 7)[i, j]
                x = f"{100 * np.linspace(-0.1, 0.1, 7)[i]:+.2f}".replace("-", "−")
                assert f"Δx {x}".replace("+0.00", "0.00") in tab.inner_text("#readout")
        tab.mouse.move(2, 2)
        assert "Point at the map" in tab.inner_text("#readout")


        # nothing is wider than the screen
        tab.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("#map", "#surface", "#pair", "#checkpoint", "#next"):
            box = tab.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_every_control_does_what_it_says(browser, report):
    path, arrays = report
    with opened(browser, path) as tab:
        assert chosen(tab) == (0, 1) and tab.is_disabled("#previous")
        seen = {pixels(tab, "#map")}
        tab.click("#next")
        assert chosen(tab) == (1, 1) and "Pair 1: first, recorded frames 10 → 14" in tab.inner_text(
            "#episode")
        seen.add(pixels(tab, "#map"))
        tab.click("#previous")
        tab.select_option("#pair", str(P - 1))
        assert chosen(tab) == (P - 1, 1) and tab.is_disabled("#next")
        seen.add(pixels(tab, "#map"))
        tab.locator("#overview button").nth(2 * C + 2).click()
        assert chosen(tab) == (2, 2) and tab.input_value("#checkpoint") == "2"
        assert tab.input_value("#pair") == "2"
        for group, text in (("planes", "Δx–Δz"), ("kinds", "L2"), ("scales", "own scale")):
            seen.add(pixels(tab, "#map"))
            small = pixels(tab, "#overview canvas")
            press(tab, group, text)
            assert pixels(tab, "#overview canvas") != small
        seen.add(pixels(tab, "#map"))
        assert len(seen) == 7
        end = tab.inner_text("#bar-end")
        press(tab, "scales", "one scale")
        assert tab.inner_text("#bar-end") != end
        # images are those of the pair
        sources = {tab.select_option("#pair", str(p)) and tab.get_attribute("#goal", "src")
                   for p in range(P)}
        assert len(sources) == P and all(one.startswith("data:image/jpeg") for one in sources)
        assert tab.evaluate("document.querySelector('#goal').naturalWidth") == 32


def test_flat_landscapes_are_marked(browser, report):
    with opened(browser, report[0]) as tab:
        tab.select_option("#pair", "3")
        assert tab.is_visible("#flat")
        tab.select_option("#checkpoint", "0")
        assert not tab.is_visible("#flat")
        marked = tab.evaluate("[...document.querySelectorAll('#overview button.flat')]"
                              ".map((one) => [one.dataset.pair, one.dataset.checkpoint])")
        assert marked == [["3", "1"], ["3", "2"]]


def test_truth_minimum_and_plan_stand_in_the_table_and_on_the_map(browser, report):
    path, arrays = report
    with opened(browser, path) as tab:
        rows = tab.locator("#marks tr").all_inner_texts()
        lowest = arrays["energy_xy"][1, 0].argmin()
        assert "true action" in rows[0]
        assert np.float32(rows[0].split("energy ")[1].split()[0]) == arrays["energy_true"][1, 0]
        assert np.float32(rows[1].split("energy ")[1].split()[0]) == arrays["energy_xy"][1, 0].min()
        where = arrays["actions_xy"][0, lowest, :2]
        off = 100 * np.linalg.norm(where - arrays["true_actions"][0, :2])
        assert f"{off:.2f} cm from the truth" in rows[1] and "plan, CEM" in rows[2]
        spread = np.ptp(arrays["energy_xy"][1, 0]) / arrays["energy_xy"][1, 0].mean()
        assert abs(float(rows[3].split()[4]) - 100 * spread) < 0.1 * 100 * spread
        # orange where the cross is, or the arrow to a truth outside
        orange = """(() => {const map = document.querySelector('#map');
            const c = new OffscreenCanvas(map.width, map.height);
            const g = c.getContext('2d', {willReadFrequently: true}); g.drawImage(map, 0, 0);
            const d = g.getImageData(0, 0, c.width, c.height).data; let n = 0;
            for (let i = 0; i < d.length; i += 4)
              if (d[i] === 213 && d[i + 1] === 94 && d[i + 2] === 0) n++; return n})()"""
        assert tab.evaluate(orange) > 20
        tab.select_option("#pair", str(PAIR))
        assert tab.evaluate(orange) > 20


def test_a_grid_over_three_axes_is_shown_level_by_level(browser, report):
    path, arrays = report
    with opened(browser, path) as tab:
        assert not tab.is_visible("#slice")
        press(tab, "planes", "Δx–Δy–Δz")
        assert tab.is_visible("#slice")
        cube = arrays["energy_xyz"][1, 0].reshape(7, 7, 7)
        assert tab.input_value("#level") == str(cube.argmin() % 7)
        tab.locator("#level").scroll_into_view_if_needed()
        for level in (0, 6, 2):
            tab.locator("#level").fill(str(level))
            tab.mouse.move(*place(tab, 4, 1))
            assert energy(tab) == cube[4, 1, level]
        assert "Δz −3.33" in tab.inner_text("#readout")


def test_the_keyboard_moves_over_the_map_and_turns_the_surface(browser, report):
    path, arrays = report
    values = arrays["energy_xy"][1, 0].reshape(7, 7)
    with opened(browser, path) as tab:
        tab.focus("#map")
        tab.keyboard.press("ArrowUp")                       # begins at the minimum
        assert energy(tab) == values.min()
        for _ in range(8):
            tab.keyboard.press("ArrowLeft")
            tab.keyboard.press("ArrowDown")
        assert energy(tab) == values[0, 0]
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowUp")
        assert energy(tab) == values[1, 1]
        before = pixels(tab, "#surface")
        tab.focus("#surface")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowUp")
        assert tab.input_value("#turn") == "-54" and tab.input_value("#tilt") == "39"
        assert pixels(tab, "#surface") != before
        # every control is reached by the tab key
        tab.focus("#previous") if tab.is_enabled("#previous") else tab.focus("#pair")
        reached = set()
        for _ in range(16):
            reached.add(tab.evaluate("document.activeElement.id || document.activeElement.name"))
            tab.keyboard.press("Tab")
        assert {"pair", "next", "checkpoint", "planes", "kinds", "scales", "map", "surface",
                "turn", "tilt", "all-pairs"} <= reached


def test_dragging_turns_the_surface_and_sliders_too(browser, report):
    with opened(browser, report[0]) as tab:
        tab.locator("#surface").scroll_into_view_if_needed()
        box = tab.locator("#surface").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + 40, y + 20)
        tab.mouse.up()
        tab.mouse.move(x, y)
        assert tab.input_value("#turn") == "-80" and tab.input_value("#tilt") == "43"
        before = pixels(tab, "#surface")
        tab.locator("#tilt").fill("80")
        assert pixels(tab, "#surface") != before


def test_a_finger_turns_and_tilts_the_surface_and_then_scrolls(browser, report):
    with opened(browser, report[0], 400, has_touch=True, is_mobile=True) as tab:
        tab.locator("#surface").scroll_into_view_if_needed()
        box, touch = tab.locator("#surface").bounding_box(), tab.context.new_cdp_session(tab)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def swipe(dx, dy, fingers=1):
            """-> (turn, tilt, how far the page was scrolled)"""
            before = tab.evaluate("scrollY")
            for n in range(9):
                touch.send("Input.dispatchTouchEvent", {
                    "type": "touchMove" if n else "touchStart",
                    "touchPoints": [{"x": x + 20 * f + n * dx / 8, "y": y + n * dy / 8, "id": f}
                                    for f in range(fingers)]})
            touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            tab.wait_for_timeout(200)
            return (float(tab.input_value("#turn")), float(tab.input_value("#tilt")),
                    tab.evaluate("scrollY") - before)

        assert swipe(80, 0) == (-100, 35, 0)
        assert swipe(0, 80) == (-100, 67, 0)
        assert swipe(0, -40) == (-100, 51, 0)
        assert swipe(0, 40, fingers=2)[:2] == (-100, 51)
        turned, tilt, _ = swipe(0, -160)
        assert (turned, tilt) == (-100, 5)
        assert swipe(0, -160)[2] > 80


def test_a_finger_reads_energies(browser, report):
    path, arrays = report
    with opened(browser, path, 400, has_touch=True, is_mobile=True) as tab:
        tab.locator("#map").scroll_into_view_if_needed()
        tab.touchscreen.tap(*place(tab, 5, 4))
        assert energy(tab) == arrays["energy_xy"][1, 0].reshape(7, 7)[5, 4]
        tab.locator("#next").tap()
        assert chosen(tab) == (1, 1)


def test_dark_light_paper_and_a_frame_of_a_notebook(browser, report):
    path, _ = report
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    with opened(browser, path, color_scheme="dark") as tab:
        assert tab.evaluate(paper) == "rgb(20, 23, 27)"
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate(paper) == "rgb(255, 255, 255)"
        assert tab.is_visible("#map") and not tab.is_visible(".controls")
    with opened(browser, path, color_scheme="light") as tab:
        assert tab.evaluate(paper) == "rgb(255, 255, 255)"
        tab.evaluate("""(source) => {const f = document.createElement('iframe');
            f.srcdoc = source; f.id = 'frame'; f.width = 900; document.body.append(f)}""",
                     path.read_text(encoding="utf-8"))
        inner = tab.frame_locator("#frame")
        inner.locator("#overview button").nth(C * P - 1).wait_for()
        assert inner.locator("#pair option").count() == P
