"""The solutions of chapter 09's exercises, and what its log of dead ends says, checked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.device import get_device
from dsv4ref.evidence import isa
from dsv4ref.kernels.sparse_mla import merge_scopes, sparse_mla_decode
from dsv4ref.kernels.sparse_mla.merge import MAX_PARTS
from dsv4ref.optimizations import catalogue, persistent_decode
from dsv4ref.optimizations.decode_inputs import DecodeInputs
from dsv4ref.ref.merge import merge_weights_ref

OPT = catalogue.get("persistent_decode")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def prose() -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    section = prose().split("## Exercises")[1].split("\n## ")[0]
    titles = re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert titles == ["How wrong is base 2?", "The sink as a key", "When is a merge about bytes?"]


def test_base_2_turns_four_fifths_into_881_thousandths() -> None:
    lses = torch.tensor([128.0, 512.0]).log()[:, None, None]
    right, _, _ = merge_weights_ref(lses)
    wrong, _, _ = merge_weights_ref(lses / math.log(2))
    assert right[1].item() == pytest.approx(0.8, abs=1e-6)
    assert round(wrong[1].item(), 3) == 0.881
    assert (wrong[1] / wrong[0]).item() == pytest.approx(math.e**2, rel=1e-5)
    assert round(math.e**2, 2) == 7.39
    equal, _, _ = merge_weights_ref(torch.ones_like(lses) / math.log(2))
    assert equal.flatten().tolist() == pytest.approx([0.5, 0.5])


def solution(name: str) -> Any:
    """A function of the exercises' solutions, as it stands in the notebook."""
    (code,) = re.findall(rf"```python\n(def {name}.*?)```", prose(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "merge_scopes": merge_scopes}
    exec(code, names)
    return names[name]


@pytest.mark.parametrize("case", ["tiny", "tiny-gaps"])
def test_a_sink_given_to_one_scope_is_a_key_of_it(case: str, device: str) -> None:
    inputs: DecodeInputs = OPT.make_inputs(OPT.case(case), device, 0)
    assert inputs.extra is not None
    with_sink = sparse_mla_decode(inputs.q, inputs.swa, sink=inputs.sink, scale=inputs.scale, return_lse=True)
    without = sparse_mla_decode(inputs.q, inputs.extra, scale=inputs.scale, return_lse=True)
    partials, lses = (torch.stack(pair) for pair in zip(with_sink, without, strict=True))  # type: ignore[arg-type]
    before = lses.clone()
    out, lse = solution("sink_as_a_key")(partials, lses, inputs.sink)
    assert torch.equal(lses, before), "the caller's LSEs were written"
    outputs: dict[str, Tensor] = {"out": out, "lse": lse}
    assert OPT.yardstick is not None
    verdict = OPT.gate.judge(
        outputs, baseline=outputs, reference=OPT.reference(inputs), yardstick=OPT.yardstick(inputs)
    )
    of_out, of_lse = verdict.comparisons
    assert of_out.passed, of_out.detail
    assert not of_lse.passed
    want = torch.logaddexp(OPT.reference(inputs)["lse"], inputs.sink.double())
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device_key", "first"), [("mi300x", 54), ("h200", 49)])
def test_a_merge_is_about_bytes_from_this_many_rows_on(device_key: str, first: int) -> None:
    bandwidth = get_device(device_key).bandwidth_tb_s
    assert bandwidth is not None

    def bytes_us(rows: int) -> float:
        return persistent_decode.merge_bytes({"rows": rows, "heads": 64}) / (bandwidth * 1e6)

    launch_us = persistent_decode.split_times_us(OPT.case("flash-128").params, device_key)["launches"] / 2
    assert launch_us == 2.0
    assert bytes_us(first) > launch_us > bytes_us(first - 1), f"{bytes_us(first - 1):.4f}, {bytes_us(first):.4f} us"
    assert persistent_decode.merge_bytes({"rows": 1, "heads": 64}) == 197_120


# --- what did not work -----------------------------------------------------------------------------------------------


def test_the_largest_merge_keeps_two_waves_and_spills_nothing() -> None:
    """16 fp32 parts with rotation and LSE; the log says why the launcher stops there."""
    request = persistent_decode.merge_request("gfx942", rotation=True)
    largest = replace(
        request,
        shape="16 parts",
        signature={**request.signature, "partials": "*fp32"},
        constexprs={**request.constexprs, "PARTS": MAX_PARTS},
    )
    (row,) = isa.compile_rows([largest], ["gfx942"])
    assert MAX_PARTS == 16
    assert row.vgpr_spills == 0
    assert row.waves_per_simd >= 2


def test_the_log_counts_the_planted_bugs_right() -> None:
    assert "It accepts two of seven bugs." in prose()
    assert len(OPT.hazards) == 7  # tests/optimizations/test_persistent_decode.py names the two
