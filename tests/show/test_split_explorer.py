"""The split decode's panel: its words and boxes are the plans', and the planned split count is the marked one."""

from __future__ import annotations

import re

import pytest

from dsv4ref.device import get_device
from dsv4ref.kernels.sparse_mla.splits import Machine, plan_splits
from dsv4ref.show.splits import LAYERS, split_explorer


def lines(svg: str) -> dict[int, str]:
    """Split count -> what the alternative text says of it."""
    label = re.search(r'aria-label="([^"]*)"', svg)
    assert label is not None
    return {int(n): text for n, text in re.findall(r"(\d+) splits?(?: \(planned\))?: ([^;]*)", label[1])}


@pytest.mark.parametrize("device", ["mi300x", "mi355x", "h200"])
def test_the_planned_count_is_marked_and_its_figures_are_the_plans(device: str) -> None:
    svg = split_explorer(rows=8, heads=64, device=device)
    plan = plan_splits(Machine.of(get_device(device)), 8, 64, 128, 512)
    marked = re.search(r"(\d+) splits? \(planned\): (\d+) waves?, (\d+) % idle, (\d+) iterations?, ([\d.]+) us", svg)
    assert marked is not None
    assert [int(marked[i]) for i in (1, 2, 4)] == [plan.splits, plan.waves, plan.iterations]
    assert float(marked[5]) == pytest.approx(plan.time_us, abs=0.06)
    assert float(marked[3]) == pytest.approx(100 * plan.idle, abs=0.6)
    assert svg.count("planned</text>") == 1


def test_one_split_has_no_reduce() -> None:
    svg = split_explorer(rows=256, heads=64, device="mi355x")
    assert "1 split (planned)" in svg
    reduces = svg.count('fill="#D55E00"') - 1  # the key has one
    assert reduces == len(lines(svg)) - 1


@pytest.mark.parametrize(
    ("layer", "context", "keys"), [("C4", 8192, "128 + 512"), ("C4", 1024, "128 + 256"), ("C128", 8192, "128 + 64"),
                                   ("SWA only", 8192, "128 + 0"), ("C4", 100, "100 + 25")],
)  # fmt: skip
def test_the_widths_are_those_of_the_longest_context(layer: str, context: int, keys: str) -> None:
    assert f", {keys} keys," in split_explorer(layer=layer, context=context)


def test_v4_pro_begins_above_64_heads() -> None:
    assert "128 + 512 keys" in split_explorer(heads=64)
    assert "128 + 1024 keys" in split_explorer(heads=128)


def test_boxes_stay_on_the_page() -> None:
    for rows in (1, 64, 1024):
        for layer in LAYERS:
            for x, width in re.findall(
                r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', split_explorer(rows=rows, layer=layer)
            ):
                assert float(x) + float(width) <= 398.0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="layer: got 'C8', expected one of"):
        split_explorer(layer="C8")
    with pytest.raises(ValueError, match="context: got 0, expected at least 1"):
        split_explorer(context=0)
