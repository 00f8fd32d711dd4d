"""Chapter 01's own promises: both sides are right, paged equals plain to the bit, what is timed is what is proved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.compare import TOLERANCES, close
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Prediction
from dsv4ref.optimizations.decode_step import StepInputs, prefixed
from dsv4ref.ref.state import PagedRows

OPT = catalogue.get("decode_step")


def built(case: str) -> StepInputs:
    inputs: StepInputs = OPT.make_inputs(OPT.case(case), "cpu", 5)
    return inputs


def bits(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in outputs.items()}


@pytest.mark.parametrize("case", ["first", "after-5", "window"])
def test_recomputing_is_within_the_same_budget(case: str) -> None:
    """The gate compares the step with the oracle; the baseline must not owe its name to the step."""
    inputs = built(case)
    ours, oracle = OPT.baseline(inputs), OPT.reference(inputs)
    for output in ("logits", "streams"):
        comparison = close(output, ours[output], oracle[output], TOLERANCES["step_fp32"])
        assert comparison.passed, comparison.detail
    assert torch.equal(ours["top1"], oracle["top1"])


def test_the_oracle_of_a_plain_case_recomputes_in_float64_and_that_of_a_paged_one_steps_on_plain_tensors() -> None:
    assert OPT.reference(built("after-3"))["logits"].dtype is torch.float64
    assert OPT.reference(built("paged-fnuz"))["logits"].dtype is torch.float32


def test_paged_caches_give_the_bits_of_plain_tensors() -> None:
    inputs = built("paged-fnuz")
    paged, plain = bits(dict(OPT.optimized(inputs))), bits(dict(OPT.reference(inputs)))
    for name in plain:
        assert torch.equal(paged[name], plain[name]), name


def test_the_paged_case_frees_blocks_takes_them_again_and_keeps_no_order() -> None:
    inputs = built("paged")
    assert inputs.dialect is Dialect.FN
    for layer in prefixed(inputs).layers:
        window = layer.window
        assert isinstance(window, PagedRows)
        used = [block for block in window.table if block is not None]
        assert None in window.table
        assert len(window.table) > window.cache.num_blocks, "no block was taken twice"
        assert used != sorted(used)


@pytest.mark.parametrize("case", ["after-3", "several", "paged-fnuz"])
def test_what_would_be_timed_is_what_the_gate_proves_and_can_be_repeated(case: str) -> None:
    inputs = built(case)
    step = OPT.timed(inputs)["optimized"]
    want = bits(dict(OPT.optimized(inputs)))
    for call in range(2):
        got = step()
        assert isinstance(got, dict)
        for name, tensor in bits(got).items():
            assert torch.equal(tensor, want[name]), (name, call)


def test_a_step_costs_less_than_recomputing_and_the_gap_widens_with_the_prefix() -> None:
    def predicted(case: str) -> Prediction:
        return OPT.predict(OPT.case(case), "mi300x")

    ratios = [predicted(case).ratio for case in ("after-5", "window", "second")]
    assert all(ratio is not None and ratio > 1 for ratio in ratios)
    assert ratios == sorted(ratios, key=lambda ratio: ratio or 0)
    first = predicted("second")
    assert first.optimized_launches == first.baseline_launches
    assert first.optimized_bytes < first.baseline_bytes


def test_cases_cover_every_position_where_something_changes_hands() -> None:
    """The last token before, the token at, and the first after a boundary of 4 and of 128, decoded, not prefilled."""
    decoded = set()
    for case in OPT.cases.values():
        decoded |= set(range(case.params["prefix"], case.params["prefix"] + sum(case.params["steps"])))
    assert {0, 2, 3, 4, 5, 7, 125, 126, 127, 128, 130, 131, 255} <= decoded
    assert any(max(case.params["steps"]) > 1 for case in OPT.cases.values())
