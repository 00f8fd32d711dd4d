"""The solutions of chapter 01's exercises, and the facts its text states, checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv4ref.config import V3_2, V4_FLASH
from dsv4ref.device import get_device
from dsv4ref.optimizations import catalogue, step_model
from dsv4ref.optimizations.decode_step import StepInputs, prefixed
from dsv4ref.optimizations.step_model import decode_tokens, distinct_experts
from dsv4ref.optimizations.step_trace import trace
from dsv4ref.ref import model
from dsv4ref.ref.model import forward_ref

OPT = catalogue.get("decode_step")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def test_thirty_rows_touch_half_of_the_experts() -> None:
    assert distinct_experts(29, 6, 256) <= 128 < distinct_experts(30, 6, 256)


def test_the_indexer_outweighs_attention_from_11328_tokens_on() -> None:
    def read(context: int) -> tuple[float, float]:
        step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, context))
        attention = next(row for row in step if row.stage == "attention" and row.kind == "C4")
        scores = next(row for row in step if row.stage == "index_logits")
        return scores.cache_bytes, attention.cache_bytes

    indexer, attention = read(11_328)
    assert attention == 373_760
    assert indexer > attention
    assert read(11_327)[0] <= attention


def test_a_short_sequence_weighs_4006_tokens_of_growth_and_v32_is_smaller_up_to_348() -> None:
    fixed = step_model.fixed_bytes(V4_FLASH)
    total = fixed["windows"] + fixed["compressor rows"]
    assert (fixed["windows"], fixed["compressor rows"], total) == (3_214_336, 12_206_080, 15_420_416)
    per_token = step_model.cache_growth(V4_FLASH).total
    assert 4005 * per_token < total <= 4006 * per_token
    smaller = [
        n
        for n in range(1, 2000)
        if step_model.cache_bytes(V3_2, n) < step_model.cache_bytes(V4_FLASH, n) + fixed["compressor rows"]
    ]
    assert smaller == list(range(1, 349))


# --- streams mixed backwards -----------------------------------------------------------------------------------------


@pytest.fixture
def after_five() -> StepInputs:
    inputs: StepInputs = OPT.make_inputs(OPT.case("after-5"), "cpu", 0)
    return inputs


def mixed_backwards(inputs: StepInputs) -> dict[str, Tensor]:
    """Run the exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(.*?def mixed_backwards.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"opt": OPT}
    exec(solution, names)
    found: dict[str, Tensor] = names["mixed_backwards"](inputs)
    return found


def test_streams_mixed_backwards_are_red_in_every_row(after_five: StepInputs) -> None:
    wrong, reference = mixed_backwards(after_five), OPT.reference(after_five)
    verdict = OPT.gate.judge(wrong, baseline={}, reference=reference)
    assert not verdict.passed
    error = (wrong["logits"] - reference["logits"]).abs().amax(dim=1)
    assert (error > 0.05).all(), error


def test_sums_of_columns_tell_only_below_2e_5(after_five: StepInputs) -> None:
    rows, columns, right = [], [], model.hc_post_ref

    def watched(result: Tensor, streams: Tensor, post: Tensor, mix: Tensor, numerics: Any) -> Tensor:
        rows.append((mix.sum(dim=-1) - 1).abs().max().item())
        columns.append((mix.sum(dim=-2) - 1).abs().max().item())
        return right(result, streams, post, mix, numerics)

    with mock.patch.object(model, "hc_post_ref", watched):
        OPT.optimized(after_five)
    assert 1e-5 < max(rows) < 2e-5
    assert max(columns) < 2e-6


# --- what the text says ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the text speaks of torch 2.13")
def test_pytorchs_counter_sees_no_flops_in_a_matrix_times_a_vector() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.ones(4, 5) @ torch.ones(5)
    assert counter.get_total_flops() == 0


def test_more_than_half_of_the_eager_launches_are_in_the_mhc_stages_and_nearly_all_of_those_are_sinkhorns() -> None:
    inputs: StepInputs = OPT.make_inputs(OPT.case("after-3"), "cpu", 0)
    state = prefixed(inputs)
    operators = [o for o in trace(lambda: forward_ref(inputs.model, inputs.token_ids[3:4], state)) if o.kind]
    launches = Counter(operator.stage for operator in operators)
    mhc = launches["hc_pre_attn"] + launches["hc_pre_ffn"]
    assert mhc > sum(launches.values()) / 2
    config = inputs.model.config
    per_iteration = 6  # row sums, + eps, divide; column sums, + eps, divide
    sinkhorn = 2 * config.n_layers * per_iteration * (config.hc_sinkhorn_iters - 1)
    assert 0.8 < sinkhorn / mhc < 1


def test_a_single_row_has_about_a_thousand_launches_in_two_milliseconds() -> None:
    step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, 4096))
    assert 900 < step_model.launches(step) < 1100
    assert 1.9e3 < step_model.step_bound_us(step, get_device("mi300x")) < 2.3e3


def test_four_fifths_of_every_bar_are_memory_and_arithmetic_binds_what_the_text_names() -> None:
    bound_by_arithmetic: dict[str, set[int]] = {}
    for key in ("mi300x", "mi355x", "h200"):
        spec = get_device(key)
        for rows in (1, 64, 1024):
            for context in (1024, 32768, 1 << 20):
                step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, rows, context))
                arithmetic = [row for row in step if step_model.bound(row, spec).side == "arithmetic"]
                share = step_model.step_bound_us(arithmetic, spec) / step_model.step_bound_us(step, spec)
                assert share < 0.2, (key, rows, context, share)
                for row in arithmetic:
                    bound_by_arithmetic.setdefault(row.stage, set()).add(rows)
                    assert row.stage != "attention" or (key, context) == ("h200", 1 << 20)
    assert all(rows == {1024} for stage, rows in bound_by_arithmetic.items() if stage != "attention")
    assert {"wq_b", "wo_a", "wo_b", "lm_head", "shared_expert", "attention"} <= set(bound_by_arithmetic)
    assert "routed_experts" not in bound_by_arithmetic


def test_the_quiet_bugs_change_no_best_token_and_the_text_may_say_so() -> None:
    """The text says that some planted bugs leave the best tokens alone."""
    hazard = OPT.hazards["yarn-everywhere"]
    inputs = OPT.make_inputs(OPT.case(hazard.case), "cpu", 0)
    assert torch.equal(hazard.planted(inputs)["top1"], OPT.reference(inputs)["top1"])
