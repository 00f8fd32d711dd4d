"""The solutions of chapter 07's exercises, and the figures its text states, checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref import config
from dsv4ref.kernels.sparse_mla.indices import fill_window
from dsv4ref.kernels.sparse_mla.topk import select
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.full_window_topk import ChoiceInputs, ChoiceStep, choice_of, judged, scores_of
from dsv4ref.ref.indices import seen_ref
from dsv4ref.serving.graphs import capture

OPT = catalogue.get("full_window_topk")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


@pytest.fixture
def two_graphs() -> Any:
    """The exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(class TwoGraphs.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"capture": capture}
    exec(solution, names)
    return names["TwoGraphs"]


@pytest.mark.parametrize("case", ["tiny-short-long", "tiny-long-short", "tiny-ties"])
def test_two_graphs_are_right_for_every_batch(case: str, two_graphs: Any, device: str) -> None:
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case(case), device, 0)
    scratch, out, first = inputs.scratch(), inputs.fresh(), inputs.steps[0]
    held = ChoiceStep(first.q.clone(), first.weights.clone(), first.lengths.clone(), first.longest)
    given = (held.q, held.weights, inputs.keys, inputs.table, inputs.requests, held.lengths)
    graphs = two_graphs(
        lambda: fill_window(held.lengths, out),
        lambda: select(*given, scratch=scratch, out=out),
        inputs.topk,
        device,
    )
    want = OPT.reference(inputs)
    for number, step in enumerate(inputs.steps):
        for target, source in ((held.q, step.q), (held.weights, step.weights), (held.lengths, step.lengths)):
            target.copy_(source)
        graphs.replay(step.longest)
        for name, value in judged(out, scores_of(inputs, step), step.lengths).items():
            wrong = (value != want[name][number]).nonzero()
            assert not len(wrong), f"batch {number}, {name} differs first at {wrong[0].tolist()}"


def test_the_first_row_that_loses_an_entry_is_at_position_2051() -> None:
    topk = config.V4_FLASH.index_topk
    assert next(p for p in range(10_000) if seen_ref(p, 4) > topk) == 2051
    assert config.V4_FLASH.first_dropping_context == 2052


@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_bound_that_is_too_high_changes_no_set(more: int) -> None:
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case("tiny"), "cpu", 0)
    step = inputs.steps[0]
    loose = ChoiceStep(step.q, step.weights, step.lengths, step.longest + more)
    choice, exact = choice_of(inputs, loose), choice_of(inputs, step)
    assert torch.equal(choice.sort(1).values, exact.sort(1).values)


def test_a_bound_that_is_too_low_loses_the_newest() -> None:
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case("tiny-short-long"), "cpu", 0)
    step = inputs.steps[1]
    choice = choice_of(inputs, ChoiceStep(step.q, step.weights, step.lengths, inputs.topk))
    assert choice[0].tolist() == list(range(inputs.topk))
    assert int(step.lengths[0]) > inputs.topk


def test_scores_are_exact_in_fp32() -> None:
    """Whole numbers and eighths: every partial sum has fewer than 24 bits."""
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case("tiny-long-short"), "cpu", 0)
    scores = scores_of(inputs, inputs.steps[0])
    finite = scores[scores.isfinite()]
    assert torch.equal(finite.float().double(), finite)
    assert 8 * 64 * 128 * 2 < 2**24


def test_the_judge_counts_each_kind_of_wrong_lane() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    for lanes, length, wrong in (
        ([0, 2, 3], 5, 0), ([0, 3, 1], 5, 0), ([0, 0, 2], 5, 1), ([0, 5, 2], 5, 1), ([0, -1, 2], 5, 1),
        ([0, 1, 7], 2, 1), ([1, 0, -1], 2, 0), ([-1, -1, -1], 0, 0), ([4, -1, -1], 0, 1),
    ):  # fmt: skip
        visible = torch.where(torch.arange(5) < length, scores, -torch.inf)
        found = judged(torch.tensor([lanes]), visible, torch.tensor([length]))
        assert int(found["wrong"][0]) == wrong, (lanes, length)
