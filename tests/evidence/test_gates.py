"""Gates: each relation against the right partner, all of them or none, and memory that cannot hide an unwritten row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.gates import Check, Gate, poisoned_allocations

X = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)
BF16 = X.to(torch.bfloat16)
INDICES = torch.arange(6, dtype=torch.int32)

ALL = Gate((Check("buffer", "bit"), Check("slots", "exact"), Check("out", "budget", "attention_bf16")))
GREEN: dict[str, Mapping[str, Tensor]] = {
    "candidate": {"buffer": BF16, "slots": INDICES, "out": BF16},
    "baseline": {"buffer": BF16.clone()},
    "reference": {"slots": INDICES.clone(), "out": X},
    "yardstick": {"out": BF16.clone()},
}


def judged(**changes: dict[str, Any]) -> Any:
    """The gate's verdict with some outputs exchanged; None takes an output away."""
    sides: dict[str, Any] = {}
    for side, outputs in GREEN.items():
        changed = {**outputs, **changes.get(side, {})}
        sides[side] = {name: value for name, value in changed.items() if value is not None}
    return ALL.judge(**sides)


def test_a_gate_is_green_when_every_relation_holds() -> None:
    verdict = judged()
    assert verdict.passed
    assert verdict.gate == "bit"
    assert [(c.output, c.relation) for c in verdict.comparisons] == [
        ("buffer", "bit"),
        ("slots", "exact"),
        ("out", "budget"),
    ]
    assert all(name in verdict.detail for name in ("buffer: ", "slots: ", "out: "))


def test_an_optional_output_may_be_absent_but_not_wrong() -> None:
    gate = Gate((Check("out", "budget", "attention_bf16"), Check("slots", "exact", optional=True)))
    absent = gate.judge({"out": BF16}, **{side: GREEN[side] for side in ("baseline", "reference", "yardstick")})
    assert absent.passed
    assert absent.absent == ("slots",)
    assert absent.detail.endswith("slots: does not exist here")
    wrong = gate.judge(
        {"out": BF16, "slots": INDICES + 1}, **{side: GREEN[side] for side in ("baseline", "reference", "yardstick")}
    )
    assert not wrong.passed
    assert "slots: 6 of 6 elements differ" in wrong.detail


def _changed(tensor: Tensor, value: float) -> Tensor:
    copy = tensor.clone()
    copy[3] = value
    return copy


@pytest.mark.parametrize(
    ("output", "value", "detail"),
    [
        ("buffer", _changed(BF16, 99.0), "buffer: 1 of 64 elements differ, first at (3,): 99, expected 1.046875"),
        ("slots", _changed(INDICES, 9), "slots: 1 of 6 elements differ, first at (3,): 9, expected 3"),
        ("out", _changed(BF16, 1.2), "out: 1 elements outside"),
        ("out", _changed(BF16, math.nan), "out: NaN masks differ at 1 elements, first (3,)"),
    ],
)
def test_one_red_relation_makes_the_gate_red_and_its_line_is_the_detail(
    output: str, value: Tensor, detail: str
) -> None:
    verdict = judged(candidate={output: value})
    assert not verdict.passed
    assert verdict.detail.startswith(detail)
    assert [c.output for c in verdict.comparisons if not c.passed] == [output]


@pytest.mark.parametrize("output", ["buffer", "slots", "out"])
def test_a_missing_output_is_red_and_named(output: str) -> None:
    verdict = judged(candidate={output: None})
    assert not verdict.passed
    others = sorted({"buffer", "slots", "out"} - {output})
    assert verdict.detail == f"{output}: missing; outputs are {others}"


def test_bits_are_held_against_the_baseline_and_numbers_against_the_reference() -> None:
    """Exchanged partners turn exactly their own relation red."""
    other = _changed(BF16, 99.0)
    assert [c.output for c in judged(baseline={"buffer": other}).comparisons if not c.passed] == ["buffer"]
    assert judged(reference={"buffer": other}).passed
    assert [c.output for c in judged(reference={"slots": INDICES + 1}).comparisons if not c.passed] == ["slots"]
    assert judged(baseline={"slots": INDICES + 1, "out": other}).passed
    assert [c.output for c in judged(reference={"out": X + 1}).comparisons if not c.passed] == ["out"]


def test_a_missing_yardstick_is_an_error_of_the_chapter_and_not_a_verdict() -> None:
    with pytest.raises(ValueError, match="yardstick: missing for out"):
        judged(yardstick={"out": None})
    sides = {name: side for name, side in GREEN.items() if name != "yardstick"}
    with pytest.raises(ValueError, match="yardstick: missing for out"):
        ALL.judge(**sides)


def test_empty_outputs_are_green() -> None:
    empty = torch.empty(0, 4, dtype=torch.bfloat16)
    verdict = judged(
        candidate={"buffer": empty, "out": empty},
        baseline={"buffer": empty},
        reference={"out": empty.to(torch.float64)},
        yardstick={"out": empty},
    )
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize(
    ("relations", "name"),
    [(("budget",), "budget"), (("budget", "exact"), "exact"), (("budget", "bit"), "bit"), (("exact", "bit"), "bit")],
)
def test_a_gate_is_called_by_its_strictest_relation(relations: tuple[Any, ...], name: str) -> None:
    checks = tuple(Check("x", r, "attention_bf16" if r == "budget" else None) for r in relations)
    assert Gate(checks).name == name


def test_a_gate_without_checks_could_not_fail() -> None:
    with pytest.raises(ValueError, match=r"checks: got none, expected at least one"):
        Gate(())
    with pytest.raises(ValueError, match=r"checks: got none, expected at least one that is not optional"):
        Gate((Check("out", "bit", optional=True),))


@pytest.mark.parametrize(
    ("relation", "tolerance", "message"),
    [
        ("equal", None, "relation: got 'equal', expected 'bit', 'exact' or 'budget'"),
        ("budget", None, "tolerance: got None for budget; only 'budget' takes one, and must"),
        ("bit", "attention_bf16", "tolerance: got 'attention_bf16' for bit; only 'budget' takes one"),
        ("budget", "attention", r"tolerance: got 'attention', expected one of \['attention_bf16'"),
    ],
)
def test_checks_that_cannot_be(relation: Any, tolerance: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Check("x", relation, tolerance)


# --- poisoned memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fresh_memory_is_nan_inside_the_block(dtype: torch.dtype, device: str) -> None:
    with poisoned_allocations():
        tensors = (
            torch.empty(33, dtype=dtype, device=device),
            torch.empty_like(torch.zeros(33, dtype=dtype, device=device)),
            torch.zeros(1, dtype=dtype, device=device).new_empty(33),
            torch.empty_strided((3, 4), (8, 1), dtype=dtype, device=device),
        )
    for tensor in tensors:
        assert torch.isnan(tensor).all()


def test_fresh_integers_are_the_largest() -> None:
    with poisoned_allocations():
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()


def test_an_unwritten_row_shows_even_where_the_allocator_hands_back_the_answer(device: str) -> None:
    """The right answer is computed and freed just before, as a gate that runs its reference first would do."""

    def forgets_a_row(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = x[:-1] * 2
        return out

    x = torch.arange(4096.0, device=device).reshape(64, 64)
    answer = x * 2
    del answer
    with poisoned_allocations():
        out = forgets_a_row(x)
    assert torch.isnan(out[-1]).all()
    assert torch.equal(out[:-1], x[:-1] * 2)


@pytest.mark.parametrize(("deterministic", "warn_only", "fill"), [(False, False, True), (True, True, False)])
def test_the_switches_are_put_back(deterministic: bool, warn_only: bool, fill: bool) -> None:
    def switches() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    before = switches()
    try:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        with poisoned_allocations():
            assert switches() == (True, True, True)
        assert switches() == (deterministic, warn_only, fill)
        with pytest.raises(KeyError), poisoned_allocations():
            raise KeyError
        assert switches() == (deterministic, warn_only, fill), "also after an error"
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
