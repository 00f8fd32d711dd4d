"""The solutions of chapter 16's exercises, and the figures its text states, checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.launches import count_launches
from dsv4ref.optimizations import catalogue, shrink_tail_fill
from dsv4ref.optimizations.report import report_rows
from dsv4ref.optimizations.shrink_tail_fill import FillInputs, observed, replay
from dsv4ref.serving.tail_fill import TailFilled

OPT = catalogue.get("shrink_tail_fill")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


@pytest.fixture(scope="module")
def no_gap() -> type[TailFilled]:
    """The exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(class NoGap.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"TailFilled": TailFilled}
    exec(solution, names)
    found: type[TailFilled] = names["NoGap"]
    return found


def gaps(buffers: TailFilled, inputs: FillInputs) -> list[int]:
    """Nonzero indices in the gap after each step."""
    found = []
    for step in inputs.steps:
        buffers.prepare(step.tokens)
        buffers.write(step.req_id, step.lengths)
        buffers.indices[: step.indices.numel()] = step.indices
        found.append(int((buffers.indices[step.indices.numel() : step.tokens * inputs.topk] != 0).sum()))
    return found


def test_clearing_the_extent_leaves_no_gap(no_gap: type[TailFilled]) -> None:
    inputs = OPT.make_inputs(OPT.case("tiny-twice"), "cpu", 0)
    sizes = (inputs.max_tokens, inputs.topk)
    assert sum(gaps(TailFilled(*sizes), inputs)) > 0, "the case must have a gap to close"
    assert gaps(no_gap(*sizes), inputs) == [0] * len(inputs.steps)
    seen = replay(inputs, lambda buffers, step: buffers.prepare(step.tokens), buffers=no_gap(*sizes))
    assert OPT.gate.judge(seen, baseline={}, reference=OPT.reference(inputs)).passed


def test_no_gap_costs_two_launches_and_half_a_megabyte(no_gap: type[TailFilled]) -> None:
    buffers = no_gap(128, 16)
    buffers.prepare(64)
    assert count_launches(lambda: buffers.prepare(64), method="aten-dispatch+interpreter").total == 2
    assert TailFilled(8192, 2048, "meta").indices.nbytes == 128 * (64 * 2048 * 4)
    assert 64 * 2048 * 4 == 2**19


def one_step(buffers: TailFilled, lengths: list[int]) -> int:
    """Run a step; the index right behind the live ones."""
    buffers.prepare(len(lengths))
    buffers.write(torch.zeros(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    buffers.indices[: sum(lengths)] = 7
    return int(buffers.indices[sum(lengths)])


def test_one_index_too_many_is_zero_at_topk_and_stale_below() -> None:
    buffers = TailFilled(8, 4)
    assert one_step(buffers, [4, 4, 4]) == 0
    assert one_step(buffers, [4, 4]) == 0
    assert one_step(buffers, [4, 3]) == 7
    assert one_step(buffers, [1, 1, 1, 1]) == 7


def test_the_sum_of_lengths_falls_while_the_number_of_tokens_stays() -> None:
    """Exercise 3: one of two requests at top-k is replaced by one of a single token."""
    before, after = [4, 4], [4, 1]
    assert len(before) == len(after)
    assert sum(after) < sum(before)


# --- what the text states ---


def test_the_indices_of_8192_tokens_are_64_mib() -> None:
    assert TailFilled(8192, 2048, "meta").indices.nbytes == 64 * 2**20


@pytest.mark.parametrize("case", [name for name, case in OPT.cases.items() if case.tiny])
def test_launches_are_predicted_as_counted(case: str) -> None:
    inputs = OPT.make_inputs(OPT.case(case), "cpu", 0)
    p = OPT.predict(OPT.case(case), "mi355x")
    counted = {
        name: count_launches(call, method="aten-dispatch+interpreter").total for name, call in OPT.timed(inputs).items()
    }
    names = shrink_tail_fill.written_by(inputs.steps[-1].tokens, inputs.max_tokens)
    more = sum(shrink_tail_fill._WRITES[name] - 1 for name in names)  # on a GPU
    assert {name: n + more for name, n in counted.items()} == {
        "baseline": p.baseline_launches, "optimized": p.optimized_launches
    }  # fmt: skip


def test_the_mask_of_the_gap_depends_on_the_step_and_not_on_the_buffers() -> None:
    inputs = OPT.make_inputs(OPT.case("tiny"), "cpu", 0)
    step = inputs.steps[0]

    def masked(fill: int) -> Tensor:
        buffers = TailFilled(inputs.max_tokens, inputs.topk)
        buffers.indices.fill_(fill)
        return observed(buffers, step, inputs.rows)["indices"] == -1

    assert torch.equal(masked(0), masked(5))
    assert int(masked(0).sum()) == step.tokens * inputs.topk - step.indices.numel()


def on_h200() -> dict[str, dict[str, Any]]:
    """The shipped H200 records' rows by case."""
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    return {row["case"]: row for row in report_rows(mine)}


def test_the_h200s_records_say_what_the_page_says_of_them() -> None:
    rows = on_h200()
    steady, chunk = rows["steady-64"], rows["shrink-8192-64"]
    assert steady["baseline_us"] - steady["optimized_us"] > steady["baseline_us"] / 2, steady
    assert 0.95 < chunk["ratio_ci"][0] < chunk["ratio_ci"][1] < 1.1, chunk["ratio_ci"]
    for name, row in rows.items():
        p = OPT.predict(OPT.case(name), "h200")
        launches = {r.variant: r.launches for r in records.latest(records.shipped())
                    if (r.chapter, r.device, r.case) == (OPT.id, "h200", name)}  # fmt: skip
        expected = {"baseline": p.baseline_launches, "optimized": p.optimized_launches}
        assert launches == expected, (name, launches, expected)
        assert row["predicted"] == p.ratio
