"""The solutions of chapter 06's exercises, and what its log of dead ends says, checked."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.device import get_device
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.optimizations import base, catalogue, decode_model
from dsv4ref.optimizations.base import Case
from dsv4ref.optimizations.output_passthrough import OutputInputs

OPT = catalogue.get("output_passthrough")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def copy_us(rows: int, device: str) -> tuple[float, float]:
    """The model's copy of a V4-Flash layer: microseconds of its bytes, and of its launch."""
    flash = OPT.cases["flash-256"]
    p = OPT.predict(Case("exercise", {**flash.params, "rows": rows}), device)
    assert p.baseline_us is not None
    assert p.optimized_us is not None
    bandwidth = get_device(device).bandwidth_tb_s
    assert bandwidth is not None
    in_bytes = 2 * decode_model.vector_bytes({**flash.params, "rows": rows}) / (bandwidth * 1e6)
    return in_bytes, p.baseline_us - p.optimized_us - in_bytes


@pytest.mark.parametrize(("device", "first"), [("mi300x", 81), ("h200", 74)])
def test_the_copy_is_about_bytes_from_this_many_rows_on(device: str, first: int) -> None:
    in_bytes, in_launch = copy_us(first, device)
    assert in_bytes > in_launch, f"{first} rows: bytes {in_bytes:.4f} us, launch {in_launch:.4f} us"
    in_bytes, in_launch = copy_us(first - 1, device)
    assert in_bytes < in_launch, f"{first - 1} rows: bytes {in_bytes:.4f} us, launch {in_launch:.4f} us"


def test_a_copied_row_is_131072_bytes() -> None:
    assert 2 * decode_model.vector_bytes({"rows": 1, "heads": 64}) == 131_072


def row_too_many(inputs: OutputInputs) -> dict[str, Tensor]:
    """Run the exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(def row_too_many.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"replace": replace, "torch": torch, "sparse_mla_decode": sparse_mla_decode}
    exec(solution, names)
    found: dict[str, Tensor] = names["row_too_many"](inputs)
    return found


@pytest.fixture
def tiny() -> OutputInputs:
    return OPT.make_inputs(OPT.case("tiny"), "cpu", 0)


def test_only_the_buffer_sees_one_row_too_many(tiny: OutputInputs) -> None:
    assert OPT.yardstick is not None
    verdict = OPT.gate.judge(
        row_too_many(tiny),
        baseline=OPT.baseline(tiny),
        reference=OPT.reference(tiny),
        yardstick=OPT.yardstick(tiny),
    )
    by_output = {comparison.output: comparison for comparison in verdict.comparisons}
    assert not verdict.passed
    assert by_output["out"].passed, by_output["out"].detail
    assert not by_output["buffer"].passed
    assert by_output["buffer"].worst == (3, 0, 0), by_output["buffer"].detail  # the first guard row of three rows


def test_one_row_too_many_leaves_the_output_right_in_every_bit_and_zeros_the_next_row(tiny: OutputInputs) -> None:
    found, right = row_too_many(tiny), OPT.baseline(tiny)
    assert torch.equal(found["out"].view(torch.int16), right["out"].view(torch.int16))
    assert torch.equal(found["buffer"][3], torch.zeros_like(found["buffer"][3]))
    assert torch.equal(found["buffer"][4].view(torch.int16), tiny.buffer[4].view(torch.int16))


def test_one_sample_of_noise_leaves_almost_every_deviation_open() -> None:
    (gain,) = OPT.claims
    noise = catalogue.get("cached_projection").claims[0]
    assert noise.before == gain.after  # the ladder's next rung
    seen, claimed = abs(noise.after - noise.before), gain.after - gain.before
    assert round(seen, 2) == 4.06
    assert round(claimed, 2) == 8.74
    normal = NormalDist()
    few, many = normal.inv_cdf(0.5 + 0.025 / 2), normal.inv_cdf(1 - 0.025 / 2)
    assert (round(few, 3), round(many, 2)) == (0.031, 2.24)
    low, high = seen / many, seen / few
    assert round(low, 1) == 1.8
    assert math.isclose(high, 130, abs_tol=1)
    assert math.isclose(claimed / low, 5, abs_tol=0.2)
    assert math.isclose(high / claimed, 15, abs_tol=0.2)


@pytest.mark.parametrize("relation", ["bit", "budget"])
@pytest.mark.parametrize("hazard", sorted(OPT.hazards))
def test_no_shipped_hazard_needs_the_guard_rows(hazard: str, relation: str) -> None:
    tolerance = "attention_bf16" if relation == "budget" else None
    on_the_output = replace(OPT, gate=Gate((Check("out", relation, tolerance),)))  # type: ignore[arg-type]
    verdict = base.run_hazard(on_the_output, hazard, device="cpu", seed=0)
    assert not verdict.passed, f"{hazard} is only visible outside the output now: tell the chapter"
