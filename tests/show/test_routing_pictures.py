"""Pictures of routing: squares where the matrices have them, colours by right and wrong, numbers that add up."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from dsv4ref.optimizations.routing_eager import load_facts, loads
from dsv4ref.show.panels import COLOURS
from dsv4ref.show.routing import assignment_pair, routing_explorer

RIGHT = torch.tensor([[1, 0, 0], [0, 1, 1]])
WRONG = torch.tensor([[0, 1, 0], [0, 1, 2]])


def rects(svg: str) -> list[dict[str, str]]:
    return [dict(element.attrib) for element in ElementTree.fromstring(svg).iter("rect")]


def test_squares_say_right_stray_and_missing() -> None:
    found = rects(assignment_pair(RIGHT, WRONG, rank_sizes=(2, 1), title="T"))
    left = [r for r in found if float(r["x"]) < 300]
    wrong = [r for r in found if float(r["x"]) >= 300]
    assert [r["fill"] for r in left] == [COLOURS[0]] * 3
    # token 0: expert 0 missing, expert 1 stray; token 1: expert 1 right, expert 2 twice where once was asked for
    assert [r["fill"] for r in wrong] == ["none", COLOURS[1], COLOURS[0], COLOURS[1]]
    columns = [round((float(r["x"]) - 340) / float(r["width"])) for r in wrong]
    assert columns == [0, 1, 1, 2]


def test_the_picture_says_its_numbers() -> None:
    root = ElementTree.fromstring(assignment_pair(RIGHT, WRONG, rank_sizes=(2, 1), title="T"))
    assert root.attrib["aria-label"] == (
        "T. 2 tokens x 3 experts: 3 pairs asked for; with the bug 4 are computed, 2 of them stray, and 1 missing"
    )


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wrong: got shape \(2, 2\), expected \(2, 3\)"):
        assignment_pair(RIGHT, WRONG[:, :2], rank_sizes=(3,), title="T")
    with pytest.raises(ValueError, match=r"rank_sizes: got \[2\], expected sizes that add up to 3"):
        assignment_pair(RIGHT, WRONG, rank_sizes=(2,), title="T")


def test_facts_of_a_histogram_written_out() -> None:
    facts = load_facts(torch.tensor([5, 0, 1, 2]), ranks=2, block_m=4)
    assert facts == {
        "mean": 2.0, "largest": 5, "empty": 1, "busiest rank": 1.25, "tiles": 4, "reserved": 6, "filled": 0.5,
    }  # fmt: skip
    nothing = load_facts(torch.zeros(4, dtype=torch.int64), ranks=2, block_m=4)
    assert nothing["tiles"] == nothing["filled"] == nothing["busiest rank"] == 0


def test_the_explorer_draws_each_expert_and_says_its_load() -> None:
    svg = routing_explorer(experts=37, rows=20, skew=1.0, ranks=3)
    found = rects(svg)
    assert len(found) == 37
    counts = loads(37, 6, 20, 1.0)
    tallest = max(range(37), key=lambda i: float(found[i]["height"]))
    assert counts[tallest] == counts.max()
    assert [r["fill"] for r in found] == [COLOURS[0]] * 13 + [COLOURS[1]] * 12 + [COLOURS[0]] * 12
    label = ElementTree.fromstring(svg).attrib["aria-label"]
    assert f"largest {int(counts.max())}" in label
    assert f"{int((counts == 0).sum())} experts without one" in label


def test_the_explorer_takes_an_empty_batch() -> None:
    assert "0 needed" in routing_explorer(rows=0)
