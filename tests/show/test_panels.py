"""Panels redraw when a control moves and fail where the function fails; frames move without a kernel."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import ipywidgets
import pytest

from dsv4ref.show.panels import bars, frames, lines, panel

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def say(rows: int = 4, kind: str = "a", split: bool = False, share: float = 0.5) -> str:
    return f"<p>{rows} {kind} {split} {share}</p>"


def test_a_panel_draws_at_once_and_again_when_a_control_moves() -> None:
    shown = panel(say, rows=(1, 64), kind=["a", "b"])
    assert shown.view.value == "<p>4 a False 0.5</p>"
    shown.controls["rows"].value = 32
    assert shown.view.value == "<p>32 a False 0.5</p>"
    shown.controls["kind"].value = "b"
    assert shown.view.value == "<p>32 b False 0.5</p>"
    assert shown.children == (*shown.controls.values(), shown.view)


@pytest.mark.parametrize(
    ("kind", "name", "widget", "first"),
    [
        ((1, 64), "rows", ipywidgets.IntSlider, 4),
        ((2, 64, 2), "rows", ipywidgets.IntSlider, 4),
        ((0.0, 1.0), "share", ipywidgets.FloatSlider, 0.5),
        ([1, 4, 16], "rows", ipywidgets.SelectionSlider, 4),
        (range(1, 9), "rows", ipywidgets.SelectionSlider, 4),
        (["a", "b"], "kind", ipywidgets.Dropdown, "a"),
        ({"four": 4, "eight": 8}, "rows", ipywidgets.Dropdown, 4),
        (True, "split", ipywidgets.Checkbox, False),
    ],
)
def test_the_range_chooses_the_control_and_the_default_its_start(
    kind: Any, name: str, widget: type, first: Any
) -> None:
    control: Any = panel(say, **{name: kind}).controls[name]
    assert control.value == first
    assert type(control) is widget
    assert getattr(control, "continuous_update", True) is True  # redrawn while the slider moves


def test_without_a_default_a_control_starts_at_its_first_value() -> None:
    shown = panel(lambda n, word: f"{n} {word}", n=(3, 9), word=["x", "y"])
    assert shown.view.value == "3 x"


def test_a_function_that_fails_at_once_fails_the_cell() -> None:
    with pytest.raises(ZeroDivisionError):
        panel(lambda n: str(1 / n), n=(0, 3))


def test_an_error_on_moving_is_raised_and_replaces_the_stale_picture() -> None:
    shown = panel(lambda n: f"{1 / (3 - n):.1f}", n=(1, 5))
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        shown.controls["n"].value = 3
    assert shown.view.value == '<p role="alert"><strong>ZeroDivisionError</strong>: division by zero</p>'
    shown.controls["n"].value = 2
    assert shown.view.value == "1.0"


def test_the_error_text_is_escaped() -> None:
    def fail(n: int) -> str:
        if n > 1:
            raise ValueError("<script>")
        return ""

    shown = panel(fail, n=(1, 2))
    with pytest.raises(ValueError, match="<script>"):
        shown.controls["n"].value = 2
    assert "<script>" not in shown.view.value
    assert "&lt;script&gt;" in shown.view.value


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        ({}, ValueError, "ranges: got none"),
        ({"columns": (1, 2)}, TypeError, "ranges: columns do not fit say"),
        ({"rows": "abc"}, TypeError, "rows: got 'abc', expected"),
        ({"rows": (1, 2, 3, 4)}, TypeError, r"rows: got \(1, 2, 3, 4\)"),
        ({"rows": (9, 1)}, ValueError, r"rows: got \(9, 1\), expected low < high"),
        ({"rows": []}, ValueError, "rows: got no values"),
        ({"rows": (8, 64)}, ValueError, "rows: default 4 is outside 8 to 64"),
        ({"kind": ["x", "y"]}, ValueError, r"kind: default 'a' is not among \['x', 'y'\]"),
    ],
)
def test_ranges_that_make_no_control_are_refused(ranges: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        panel(say, **ranges)


def test_a_function_that_returns_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="returned int, expected HTML or SVG"):
        panel(lambda n: n, n=(1, 2))


def picture(rows: int, topk: int = 512) -> str:
    return bars({"baseline": rows * topk, "optimised": rows}, title=f"{rows} rows", unit="us", limit=1024 * 512)


def test_frames_hold_every_picture_and_show_the_first() -> None:
    shown = frames(picture, "rows", [1, 64, 1024], topk=256)
    assert re.findall(r'<div class="dsv4-frame" data-label="([^"]+)"( hidden)?>', shown.html) == [
        ("rows = 1", ""),
        ("rows = 64", " hidden"),
        ("rows = 1,024", " hidden"),
    ]
    for rows in (1, 64, 1024):
        assert picture(rows, 256) in shown.html
    assert 'type="range" min="0" max="2" step="1" value="0"' in shown.html
    assert str(shown) == "picture: 3 frames, rows = 1 to rows = 1,024"


def test_frames_take_their_id_from_their_content_and_load_nothing() -> None:
    one, again, other = (frames(picture, "rows", values) for values in ([1, 2], [1, 2], [1, 3]))
    keys = [re.findall(r'id="(dsv4-[0-9a-f]{12})"', shown.html) for shown in (one, again, other)]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 1
    assert f'for="{keys[0][0]}-at"' in one.html
    assert not re.search(r"https?:|\bsrc=|<script", one.html)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: frames(picture, "rows", [1]), ValueError, "values: got 1, expected 2 to 200"),
        (lambda: frames(picture, "rows", range(1, 300)), ValueError, "values: got 299"),
        (lambda: frames(picture, "rows", [1, 2], rows=3), TypeError, "fixed: got 'rows'"),
        (lambda: frames(lambda n: "<svg></svg>", "n", [1, 2]), ValueError, "without alternative text"),
        (lambda: frames(lambda n: '<img alt="">', "n", [1, 2]), ValueError, "without alternative text"),
        (lambda: frames(lambda n: n, "n", [1, 2]), TypeError, "returned int"),
    ],
)
def test_frames_refuse_what_would_not_work_in_a_page(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and there is none on PATH")
def test_frames_move_with_mouse_and_keys_in_a_static_page(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    shown = frames(picture, "rows", [1, 64, 1024]).html
    path = tmp_path / "page.html"
    path.write_text(f"<meta charset='utf-8'><div>{shown}</div><div>{shown}</div>", encoding="utf-8")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(path.as_uri())
        visible = page.locator(".dsv4-frame:visible svg")

        def titles() -> list[str]:
            return [(svg.get_attribute("aria-label") or "").split(":")[0] for svg in visible.all()]

        assert titles() == ["1 rows", "1 rows"]
        slider = page.get_by_role("slider").nth(1)
        slider.focus()
        slider.press("ArrowRight")
        assert titles() == ["1 rows", "64 rows"]  # the second copy moves alone
        assert slider.get_attribute("aria-valuetext") == "rows = 64"
        slider.press("End")
        assert titles() == ["1 rows", "1024 rows"]
        assert page.locator("output").nth(1).inner_text() == "rows = 1,024"
        browser.close()


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_bars_are_proportional_say_their_numbers_and_stop_at_the_limit() -> None:
    root = parsed(bars({"half": 50, "whole": 100.0, "more": 250}, title="Bytes <moved>", unit="MB", limit=100))
    half, whole, more = (float(bar.attrib["width"]) for bar in root.iter("rect"))
    assert half == pytest.approx(whole / 2, abs=0.1)
    assert more == whole
    assert root.attrib["aria-label"] == "Bytes <moved>: half 50 MB, whole 100 MB, more 250 MB"
    words = [element.text for element in root.iter("text")]
    assert words == ["Bytes <moved>", "half", "50 MB", "whole", "100 MB", "more", "250 MB ▸"]
    assert root.attrib["fill"] == "currentColor"


def test_lines_put_points_where_their_axes_say() -> None:
    curve = [(1.0, 1.0), (10.0, 10.0), (100.0, 100.0)]
    plain = parsed(lines({"a": curve}, title="T", x_label="rows", y_label="time, us"))
    logarithmic = parsed(lines({"a": curve}, title="T", x_label="rows", y_label="time, us", log_x=True, log_y=True))

    def points(root: ElementTree.Element) -> list[float]:
        (line,) = root.iter("polyline")
        return [float(number) for number in re.split("[ ,]", line.attrib["points"])]

    assert points(plain) == pytest.approx([70, 270, 70 + 540 / 11, 270 - 230 / 11, 610, 40], abs=0.1)
    assert points(logarithmic) == pytest.approx([70, 270, 340, 155, 610, 40], abs=0.1)
    assert plain.attrib["aria-label"] == "T. time, us over rows. a: from 1 at 1 to 100 at 100"
    assert {"1", "2", "64", "rows", "time, us", "a"} <= {str(e.text) for e in logarithmic.iter("text")}
    assert not re.search(r'\bid="|url\(', lines({"a": curve}, title="T", x_label="x", y_label="y"))


def test_fixed_limits_hold_the_axes_still() -> None:
    def ticks(top: float) -> list[str]:
        svg = lines(
            {"a": [(0, 0), (1, top)]}, title="T", x_label="x", y_label="y", x_limits=(0, 1), y_limits=(0, 10), mark=0.5
        )
        assert 'stroke-dasharray="4 3"' in svg
        return [str(element.text) for element in parsed(svg).iter("text")]

    assert ticks(3) == ticks(9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bars({}, title="T", unit="us"), "items: got none"),
        (lambda: bars({"a": -1.0}, title="T", unit="us"), "expected finite values at or above 0"),
        (lambda: lines({}, title="T", x_label="x", y_label="y"), "series: got no points"),
        (lambda: lines({"a": [(0, float("inf"))]}, title="T", x_label="x", y_label="y"), "a y that is not finite"),
        (lambda: lines({"a": [(0, 1)]}, title="T", x_label="x", y_label="y", log_x=True), "x = 0 on a logarithmic"),
    ],
)
def test_drawings_refuse_what_has_no_place(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
