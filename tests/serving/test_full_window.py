"""Who decides whether a choice is the identity: every combination by hand, and the way that is really taken."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.kernels.capture import emulated_capture
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.full_window_topk import ChoiceInputs
from dsv4ref.serving.full_window import Way, choose_entries, way_for

OPT = catalogue.get("full_window_topk")


@pytest.mark.parametrize(
    ("columns", "longest", "eager", "captured"),
    [
        (600, 0, Way.FILL, Way.DEVICE),
        (600, 512, Way.FILL, Way.DEVICE),
        (600, 513, Way.TOPK, Way.DEVICE),
        (600, None, Way.DEVICE, Way.DEVICE),
        (512, 512, Way.FILL, Way.FILL),
        (512, None, Way.FILL, Way.FILL),
        (513, 512, Way.FILL, Way.DEVICE),
    ],
)
def test_the_host_decides_eagerly_and_the_device_under_capture(
    columns: int, longest: int | None, eager: Way, captured: Way
) -> None:
    assert way_for(512, columns, longest, capturing=False) is eager
    assert way_for(512, columns, longest, capturing=True) is captured


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="longest: got -1, expected at least 0"):
        way_for(512, 600, -1, capturing=False)


@pytest.mark.parametrize("longest", [12, 40, None])
def test_every_way_gives_the_same_sets_within_the_window(longest: int | None, device: str) -> None:
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case("tiny"), device, 0)
    step = inputs.steps[0]
    given = (step.q, step.weights, inputs.keys, inputs.table, inputs.requests, step.lengths)
    out = inputs.fresh()
    way = choose_entries(*given, longest=longest, scratch=inputs.scratch(), out=out)
    assert way is {12: Way.FILL, 40: Way.TOPK, None: Way.DEVICE}[longest]
    for row, length in enumerate(step.lengths.tolist()):
        assert sorted(out[row, :length].tolist()) == list(range(length)), f"row {row}"
        assert (out[row, length:] == -1).all(), f"row {row}"


def test_under_capture_the_bound_of_the_batch_is_not_used(device: str) -> None:
    inputs: ChoiceInputs = OPT.make_inputs(OPT.case("tiny-short-long"), device, 0)
    step = inputs.steps[1]
    given = (step.q, step.weights, inputs.keys, inputs.table, inputs.requests, step.lengths)
    found = []
    for longest in (1, 40):
        out, scratch = inputs.fresh(), inputs.scratch()
        with emulated_capture():
            assert choose_entries(*given, longest=longest, scratch=scratch, out=out) is Way.DEVICE
        found.append(out)
    assert torch.equal(*found)
