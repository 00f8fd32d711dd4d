"""The page of the step shows every stage and chapter, bars show the model's figures, both describe themselves."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from dsv4ref.config import V4_FLASH, V4_PRO
from dsv4ref.device import get_device
from dsv4ref.optimizations import catalogue, step_model
from dsv4ref.optimizations.step_model import STAGES
from dsv4ref.show import plots, step

SVG = "{http://www.w3.org/2000/svg}"
WRITTEN = {chapter.number for chapter in catalogue.load().values()}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))


def test_every_stage_has_one_box_on_the_page() -> None:
    shown = [stage for box in step._boxes(V4_FLASH) for stage in box.stages]
    assert sorted(shown) == sorted(STAGES)


def test_boxes_lie_on_the_page_and_do_not_overlap() -> None:
    boxes = step._boxes(V4_FLASH)
    for i, a in enumerate(boxes):
        assert a.x >= 0 <= a.y, a.title
        assert a.x + a.width <= 860, a.title
        assert a.y + a.height <= 690, a.title
        for b in boxes[i + 1 :]:
            apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
            assert apart, (a.title, b.title)


def test_arrows_begin_and_end_at_boxes() -> None:
    edges = [(b.x, b.y, b.x + b.width, b.y + b.height) for b in step._boxes(V4_FLASH)]

    def touches(point: tuple[int, int]) -> bool:
        x, y = point
        return any(
            (x in (left, right) and top <= y <= bottom) or (y in (top, bottom) and left <= x <= right)
            for left, top, right, bottom in edges
        )

    loose = [arrow for arrow in step._ARROWS if not (touches(arrow[0]) and touches(arrow[-1]))]
    assert not loose


def test_the_page_is_one_picture_that_describes_every_stage() -> None:
    root = parsed(step.step_diagram())
    assert root.get("role") == "img"
    said = root.get("aria-label") or ""
    for stage in STAGES.values():
        assert f"{stage.name}: {stage.about}" in said
    assert "http" not in step.step_diagram()  # nothing from outside


def test_widths_are_the_models() -> None:
    texts = {model.name: step.step_diagram(model) for model in (V4_FLASH, V4_PRO)}
    assert "4096 → 1024" in texts["v4-flash"]
    assert "7168 → 1536" in texts["v4-pro"]
    assert "61 layers, each:" in texts["v4-pro"]


def test_written_chapters_are_links_where_links_are_wanted() -> None:
    drawn = step.step_diagram(link=lambda page: f"chapters/{page}")
    linked = re.findall(r'<a href="([^"]+)" aria-label="chapter (\d\d)">', drawn)
    assert set(linked) == {(f"chapters/{c.notebook}", f"{c.number:02d}") for c in catalogue.load().values()}
    assert 'role="group"' in drawn  # a reader of an image's description would not meet the links
    assert "<a " not in step.step_diagram()
    assert "<a " not in step.step_diagram(link=lambda page: "")


def test_every_chapter_of_a_stage_is_written_or_named_as_planned() -> None:
    rows = step.chapter_rows()
    assert {int(row["chapter"]) for row in rows} == {n for stage in STAGES.values() for n in stage.chapters}
    for row in rows:
        assert (row["status"] == "in this book") == (int(row["chapter"]) in WRITTEN)
        assert row["title"]
        assert row["stages"]


def test_every_planned_chapter_that_runs_kernels_is_on_the_page() -> None:
    """One beyond the plan is placed by whoever adds it, once it is more than a toy."""
    on_page = {number for stage in STAGES.values() for number in stage.chapters}
    planned = [c for c in catalogue.load().values() if c.number <= max(step.PLANNED)]
    assert {c.number for c in planned if c.kernels("gfx942")} <= on_page


# --- bars ------------------------------------------------------------------------------------------------------------


def bar(rows: int, device: str = "mi300x") -> dict[str, Any]:
    spec = get_device(device)
    model = step_model.rows(V4_FLASH, step_model.decode_tokens(V4_FLASH, rows, 4096))
    return {"device": spec.name, "case": f"{rows} rows", "times": step_model.group_times_us(model, spec)}


def test_bars_fill_the_whole_and_say_their_total() -> None:
    rows = [bar(1), bar(64)]
    figure = step.time_bars(rows, "Flash")
    (ax,) = figure.axes
    for at in range(2):
        drawn = [patch for container in ax.containers for patch in [container[at]]]
        assert sum(patch.get_width() for patch in drawn) == pytest.approx(100)
    totals = [f"{sum(row['times'].values()) / 1e3:.3g} ms" for row in rows]
    assert [text.get_text() for text in ax.texts] == totals
    label = str(figure.get_label())
    assert "nothing measured" in label
    assert all(total in label for total in totals)


def test_there_is_a_pair_of_axes_per_device() -> None:
    figure = step.time_bars([bar(1), bar(1, "h200"), bar(2, "h200")], "Flash")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["AMD Instinct MI300X", "NVIDIA H200 SXM"]
    assert "<img" in plots.picture(figure).html


def test_groups_are_all_coloured_apart() -> None:
    groups = {stage.group for stage in STAGES.values()}
    assert set(step.COLOURS) == groups
    assert len(set(step.COLOURS.values())) == len(groups)


def test_rows_that_cannot_be_drawn_are_named() -> None:
    with pytest.raises(ValueError, match="rows: got none"):
        step.time_bars([], "x")
    with pytest.raises(ValueError, match=r"rows\[0\]: no times; it has device, case"):
        step.time_bars([{"device": "d", "case": "c"}], "x")
    with pytest.raises(ValueError, match=r"rows\[0\]: unknown groups \['router'\], expected embedding, head"):
        step.time_bars([{"device": "d", "case": "c", "times": {"router": 1.0}}], "x")


# --- the panel -------------------------------------------------------------------------------------------------------


def test_the_panel_shows_the_longest_stages_and_keeps_the_sum() -> None:
    svg = step.step_explorer(64, 1 << 20, "mi355x")
    said = parsed(svg).get("aria-label") or ""
    values = [float(value) for value in re.findall(r"([\d.]+) ms(?:,|$)", said)]
    total = sum(step_model.group_times_us(
        step_model.rows(V4_FLASH, step_model.decode_tokens(V4_FLASH, 64, 1 << 20)), get_device("mi355x")
    ).values())  # fmt: skip
    assert sum(values) == pytest.approx(total / 1e3, rel=1e-3)
    assert values[:-1] == sorted(values[:-1], reverse=True)
    assert "routed_experts" in said


def test_more_ranks_shorten_the_experts() -> None:
    def experts(ranks: int) -> float:
        svg = step.step_explorer(64, 4096, ranks=ranks)
        return float(re.findall(r"routed_experts ([\d.]+) ms", svg)[0])

    assert experts(8) < experts(2) < experts(1)


def test_an_unknown_device_or_model_is_named() -> None:
    with pytest.raises(ValueError, match="key: no device is called 'mi400'"):
        step.step_explorer(device="mi400")
    with pytest.raises(ValueError, match="name: no model is called 'v5'"):
        step.step_explorer(model="v5")
