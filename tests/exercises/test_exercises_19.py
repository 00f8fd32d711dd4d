"""The solutions of chapter 19's exercises, and the figures its text states, checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref import config
from dsv4ref.device import get_device
from dsv4ref.evidence import compare
from dsv4ref.optimizations import catalogue, fused_inverse_rope
from dsv4ref.optimizations.fused_inverse_rope import EAGER_LAUNCHES, LAUNCH_US, eager_bytes, rotation_times_us
from dsv4ref.ref.merge import merge_scopes_ref
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.rope import frequencies, layer_frequencies, rotate_back_ref

OPT = catalogue.get("fused_inverse_rope")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def prose() -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def solution(name: str) -> Any:
    """A function of the exercises' solutions, as it stands in the notebook."""
    (code,) = re.findall(rf"```python\n(def {name}.*?)```", prose(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "merge_scopes_ref": merge_scopes_ref, "rotate_back_ref": rotate_back_ref}
    exec(code, names)
    return names[name]


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    section = prose().split("## Exercises")[1].split("\n## ")[0]
    titles = re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert titles == ["Turn the parts instead", "When do bytes count?", "Into the weights?"]


# --- turn the parts instead ---


def test_turned_parts_merge_to_the_turned_row_unless_positions_differ() -> None:
    rng = torch.Generator().manual_seed(0)
    parts = torch.randn((3, 2, 4, 512), generator=rng, dtype=torch.float64)
    lses = torch.randn((3, 2, 4), generator=rng, dtype=torch.float64)
    positions, freqs = torch.tensor([77, 4095]), frequencies(10_000.0, 64)
    turned = solution("turn_the_parts")(parts, lses, positions, freqs)
    want, _ = merge_scopes_ref(parts, lses, positions=positions, freqs=freqs)
    assert compare.error_norm(turned, want) < 1e-14
    apart = torch.stack([rotate_back_ref(part, positions + i, freqs) for i, part in enumerate(parts)])
    assert compare.error_norm(merge_scopes_ref(apart, lses)[0], want) > 0.1


def test_bf16_parts_are_rounded_once_more_if_they_are_turned() -> None:
    rng = torch.Generator().manual_seed(1)
    parts = torch.randn((3, 50, 4, 64), generator=rng, dtype=torch.float64)
    lses, positions = torch.zeros((3, 50, 4), dtype=torch.float64), torch.arange(50)
    freqs = torch.ones(32)
    want, _ = merge_scopes_ref(parts, lses, positions=positions, freqs=freqs)
    rounded = parts.to(torch.bfloat16).to(torch.float64)
    behind, _ = merge_scopes_ref(rounded, lses, positions=positions, freqs=freqs)
    each = torch.stack([rotate_back_ref(part, positions, freqs).to(torch.bfloat16) for part in rounded])
    before, _ = merge_scopes_ref(each, lses)
    assert compare.error_norm(before, want) > 1.3 * compare.error_norm(behind, want)


# --- when do bytes count? ---


def test_bytes_pass_launches_from_165_rows_on() -> None:
    spec = get_device("mi300x")
    assert spec.bandwidth_tb_s is not None
    row = eager_bytes({"rows": 1, "heads": 64})
    assert row == 64 * 13_056 == 835_584
    assert round(row / spec.bandwidth_tb_s / 1e6, 3) == 0.158
    launches = EAGER_LAUNCHES * LAUNCH_US
    assert launches == 26
    for rows, more in ((164, False), (165, True)):
        moved = rotation_times_us({"rows": rows, "heads": 64}, spec)["eager"] - launches
        assert (moved > launches) is more, rows


# --- into the weights? ---


def test_folded_weights_are_right_at_one_position_only() -> None:
    rng = torch.Generator().manual_seed(2)
    weight = torch.randn((8, 512), generator=rng, dtype=torch.float64)
    o = torch.randn((2, 512), generator=rng, dtype=torch.float64)
    positions, freqs = torch.tensor([77, 78]), frequencies(10_000.0, 64)
    want = rotate_back_ref(o, positions, freqs) @ weight.T
    got = o @ solution("folded")(weight, 77, freqs).T
    assert compare.error_norm(got[0], want[0]) < 1e-14
    assert compare.error_norm(got[1], want[1]) > 0.01


# --- figures in the text ---


def test_the_header_and_the_text_count_the_operators_as_the_model_does() -> None:
    assert f"{EAGER_LAUNCHES} operators that rotate back" in prose()
    assert round(sum(fused_inverse_rope._HEAD_BYTES.values()) / 1e3) == 13


def test_an_fp32_angle_of_pair_1_is_rounded_by_up_to_8_thousandths() -> None:
    freq = layer_frequencies(config.V4_FLASH, 2, Numerics())[1]
    positions = torch.arange(250_000, 262_144)
    error = (positions.to(torch.float32) * freq).double() - positions.double() * freq.double()
    assert 0.0075 < float(error.abs().max()) <= 0.0079


def test_less_than_a_fifth_of_the_published_tpot_is_the_rotations() -> None:
    cached = catalogue.get("cached_projection")
    projection = cached.predict(cached.cases["flash-8"], "mi355x")
    assert projection.baseline_us is not None
    assert projection.optimized_us is not None
    times = rotation_times_us({"rows": 4, "heads": 64}, get_device("mi355x"))
    rotation = times["eager"] - times["one launch, whole heads"]
    whole = rotation + projection.baseline_us - projection.optimized_us
    assert 0.15 < rotation / whole < 0.2
    tpot = OPT.claims[0]
    assert 43 * whole / 1e3 == pytest.approx(tpot.before - tpot.after, rel=0.15)


def test_the_published_launch_is_more_than_twice_the_models() -> None:
    step, alone = OPT.claims[2:]
    assert step.source == "vllm#57451"
    assert alone.source == "vllm#57078"
    spec = get_device("mi355x")
    assert step.before / config.V4_FLASH.n_layers > 2 * LAUNCH_US
    tiled = rotation_times_us({"rows": 1024, "heads": 64}, spec)["one launch, whole heads"]
    assert tiled < alone.after < 1.15 * tiled


def test_bf16_counts_256_positions() -> None:
    counted = torch.arange(600).to(torch.bfloat16).to(torch.int64)
    assert torch.equal(counted[:257], torch.arange(257))
    assert counted[257] != 257
    assert set(counted[256:512].diff().tolist()) <= {0, 2}


def test_two_layers_of_flash_and_its_mtp_block_have_plain_tables() -> None:
    flash = config.V4_FLASH
    plain = [layer for layer in range(flash.n_layers + flash.n_mtp_layers) if not flash.uses_yarn(layer)]
    assert plain == [0, 1, flash.n_layers]
