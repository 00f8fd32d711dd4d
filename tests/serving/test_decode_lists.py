"""Lists at fixed addresses: what a step leaves, what a refresh may do under capture, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.capture import emulated_capture
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.static_decode_metadata import OPTIMIZED_LAUNCHES, ListInputs, observed, rebuilt, replayed
from dsv4ref.serving.decode_lists import DecodeLists, ListGeometry
from dsv4ref.serving.graphs import EmulatedGraph

OPT = catalogue.get("static_decode_metadata")
TINY = [name for name, case in OPT.cases.items() if case.tiny]


def inputs_of(case: str, device: str = "cpu", seed: int = 0) -> ListInputs:
    found: ListInputs = OPT.make_inputs(OPT.case(case), device, seed)
    return found


def lists_of(inputs: ListInputs) -> DecodeLists:
    return DecodeLists(inputs.rows, inputs.requests, inputs.geometry, inputs.steps[0].positions.device)


def launches(call: Callable[[], object], device: str) -> int:
    """By the profiler where kernels are compiled."""
    return count_launches(call, method="aten-dispatch+interpreter" if device == "cpu" else "cuda-profiler").total


@pytest.mark.parametrize("case", TINY)
def test_the_baseline_passes_the_same_gate(case: str) -> None:
    inputs = inputs_of(case)
    verdict = OPT.gate.judge(OPT.baseline(inputs), baseline={}, reference=OPT.reference(inputs))
    assert verdict.passed, verdict.detail


def test_any_step_may_be_the_one_that_is_captured(device: str) -> None:
    """In the chapter it is the first; here each of them, on the same lists."""
    inputs = inputs_of("tiny", device)
    for first in range(len(inputs.steps)):
        turned = ListInputs(inputs.geometry, inputs.steps[first:] + inputs.steps[:first], inputs.rows, inputs.requests)
        for step, seen in zip(turned.steps, replayed(turned, lambda: lists_of(inputs)), strict=True):
            want = observed(rebuilt(step, inputs.geometry), inputs.rows, inputs.geometry)
            for name, value in want.items():
                wrong = (seen[name] != value).nonzero()
                assert not len(wrong), f"{name}: captured on {first}, differs first at {wrong[0].tolist()}"


def test_a_refresh_is_four_launches_and_allocates_nothing(device: str) -> None:
    inputs = inputs_of("tiny", device)
    lists = lists_of(inputs)
    lists.load(inputs.steps[0])
    assert launches(lists.refresh, device) == sum(OPTIMIZED_LAUNCHES.values())
    before = lists.addresses()
    assert count_allocations(lists.refresh).count == 0
    assert lists.addresses() == before


@pytest.mark.parametrize("case", [name for name in TINY if OPT.cases[name].params["steps"][-1]])
def test_launches_are_predicted_as_counted(case: str, device: str) -> None:
    p = OPT.predict(OPT.case(case), "h200")
    calls = OPT.timed(inputs_of(case, device))
    assert launches(calls["optimized"], device) == p.optimized_launches
    if device == "cpu":  # the baseline is predicted in operators, of which some are several kernels on a GPU
        assert launches(calls["baseline"], device) == p.baseline_launches


def test_packing_by_a_mask_is_what_a_capture_refuses() -> None:
    inputs = inputs_of("tiny")
    entries = inputs.steps[0].entries
    with pytest.raises(RuntimeError, match="reads the device from the host"):
        EmulatedGraph(lambda: entries[entries >= 0])


def test_a_refresh_runs_inside_a_capture(device: str) -> None:
    inputs = inputs_of("tiny", device)
    lists = lists_of(inputs)
    lists.load(inputs.steps[0])
    with emulated_capture():
        lists.refresh()
    assert int(lists.lists["swa"].indptr[-1]) > 0


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("positions", torch.zeros(6, dtype=torch.int32), ValueError, "positions: got 6 rows, expected at most 5"),
        ("positions", torch.zeros(3), TypeError, r"positions: got torch\.float32"),
        ("requests", torch.zeros(3, dtype=torch.int64), TypeError, r"requests: got torch\.int64"),
        (
            "swa_table",
            torch.zeros(9, 16, dtype=torch.int32),
            ValueError,
            r"pages: got shape \[3, 4\], expected \[9, 4\]",
        ),
        (
            "entries",
            torch.zeros(3, 8, dtype=torch.int32),
            ValueError,
            r"entries: got shape \[3, 8\], expected \[3, 24\]",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    inputs = inputs_of("tiny")
    step = inputs.steps[0]
    changed = type(step)(**{**vars(step), name: value})
    with pytest.raises(error, match=message):
        lists_of(inputs).load(changed)


def test_more_requests_than_there_is_room_for_are_refused() -> None:
    inputs = inputs_of("tiny")
    with pytest.raises(ValueError, match="swa_table: got 3 requests, expected at most 2"):
        DecodeLists(5, 2, inputs.geometry).load(inputs.steps[0])


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: got 0, expected at least 1"):
        DecodeLists(0, 1, ListGeometry(8, 1024, 64, 64, 2))
    with pytest.raises(ValueError, match="topk: got 0, expected at least 1"):
        ListGeometry(0, 1024, 64, 64, 2)
    with pytest.raises(ValueError, match="page: got 100, expected a multiple of 128"):
        ListGeometry(8, 1024, 64, 64, 2, page=100)
