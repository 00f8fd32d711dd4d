"""The solutions of chapter 13's exercises, and the figures its text states, checked."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.device import get_device
from dsv4ref.kernels.experts import Mxfp4Weights, expert_layer, plan_dispatch, tiles
from dsv4ref.optimizations import catalogue, moe_tiles, tile_model
from dsv4ref.optimizations.routing_eager import loads

OPT = catalogue.get("moe_tiles")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def solution(start: str, **names: Any) -> dict[str, Any]:
    """The names that a solution defines, executed as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (code,) = re.findall(rf"```python\n({re.escape(start)}.*?)```", text, re.DOTALL)
    *lines, last = code.rstrip().splitlines()
    exec("\n".join([*lines, last if last.startswith(" ") else f"answer = {last}"]), names)
    return names


def test_64_rows_fill_the_64_row_tile_and_all_rows_would_halve_it() -> None:
    mine = tile_model.local_loads(tile_model.even_loads(4096, 6, 384), 8)
    assert mine.tolist() == [64] * 48
    picked = tiles.select_tile("gfx942", tiles.local_rows(4096, 384, 48), 48, 6, 4096, 4096)
    assert (picked.block_m, tile_model.occupancy(mine, picked.block_m).fill) == (64, 1.0)
    by_all = tiles.select_tile("gfx942", 4096, 48, 6, 4096, 4096)
    assert 4096 * 6 / 48 == 512
    assert (by_all.block_m, tile_model.occupancy(mine, by_all.block_m).fill) == (128, 0.5)


def test_the_worst_batch_is_just_above_64_rows() -> None:
    found = solution(
        "spec = get_device", get_device=get_device, tile_model=tile_model, loads=loads, tiles=tiles
    )  # fmt: skip
    assert found["answer"] == 2752
    assert 2752 * 6 / 256 == 64.5
    assert round(found["behind"](2752), 2) == 1.19
    mine, mi355x = tile_model.local_loads(loads(256, 6, 2752, 0.0), 2), get_device("mi355x")
    times = {t.block_m: tile_model.layer_time_us(mine, t, 4096, 2048, mi355x) for t in tile_model.candidates("gfx950")}
    assert min(times, key=lambda height: times[height]) == 64
    assert round(times[128] / times[64], 2) == 1.07


def test_the_context_manager_restores_what_was_there_after_an_exception() -> None:
    constrained = solution("@contextlib.contextmanager", contextlib=contextlib)["constrained"]
    constraints = {"block_n": 64}
    seen = []
    with contextlib.suppress(KeyError), constrained(constraints, block_m=128):
        seen.append(dict(constraints))
        raise KeyError
    assert seen == [{"block_n": 64, "block_m": 128}]
    assert constraints == {"block_n": 64}


@pytest.mark.parametrize(("byte", "finite"), [(0, True), (127, True), (254, True), (255, False)])
def test_only_one_byte_of_padding_shows(byte: int, finite: bool, device: str) -> None:
    inputs = OPT.make_inputs(OPT.case("tiny-odd-k"), device, 0)
    last = inputs.w1.scales.clone()
    packed, x = inputs.w1.packed.clone(), inputs.x.clone()
    last[..., -1], packed[..., -16:], x[:, -32:] = byte, 0, 0
    w1_tile, w2_tile = moe_tiles.tiles_for(inputs)
    plan = plan_dispatch(inputs.experts, block_m=w1_tile.block_m, expert_map=inputs.placed)
    out = expert_layer(
        x, Mxfp4Weights(packed, last), inputs.w2, inputs.weights, plan, limit=10.0, w1_tile=w1_tile, w2_tile=w2_tile
    )
    assert bool(out.isfinite().all()) is finite
    masked = expert_layer(
        inputs.x, inputs.w1, inputs.w2, inputs.weights, plan, limit=10.0, w1_tile=w1_tile, w2_tile=w2_tile
    )
    assert bool(masked.isfinite().all())


# --- prose ---


def test_published_figures_are_the_ones_the_prose_quotes() -> None:
    claim = next(c for c in OPT.claims if c.source == "doubleword PR 12")
    assert (claim.before, claim.after, round(claim.gain_percent, 2)) == (4691.31, 4822.24, 2.79)
    ladder = next(c for c in OPT.claims if c is not claim)
    assert (round(ladder.after - ladder.before, 2), round(ladder.gain_percent, 2)) == (106.80, 4.21)
    assert "EngineDeadError" in ladder.note


def test_four_of_the_six_bugs_leave_the_numbers_right() -> None:
    inputs = OPT.make_inputs(OPT.case("tiny"), "cpu", 0)
    right = OPT.reference(inputs)
    tile_only = []
    for name, hazard in OPT.hazards.items():
        if hazard.case == "tiny":
            out = hazard.planted(inputs)
            assert (out["tile"] != right["tile"]).any(), name
            error = (out["out"] - right["out"]).abs().max()
            assert error < 2**-5, f"{name}: largest error {error:.3g}"
            tile_only.append(name)
    assert (len(tile_only), len(OPT.hazards)) == (4, 6)


def test_the_published_rule_runs_1024_rows_at_three_eighths() -> None:
    height = next(t.block_m for low, high, t, _ in tiles.PUBLISHED if low <= 1024 <= (high or 1024))
    mine = tile_model.local_loads(tile_model.even_loads(1024, 6, 256), 2)
    assert tile_model.occupancy(mine, height).fill == 0.375
    assert tile_model.library_block_m("gfx942", 6 * 1024, 128, 4096) == height
    assert all(tile_model.library_block_m("gfx942", 6 * m, 128, 4096) < 128 for m in moe_tiles.M_SWEEP)


def test_a_selected_tile_may_read_more() -> None:
    p = OPT.predict(OPT.case("ep2-1024"), "mi300x")
    assert 1 < p.optimized_bytes / p.baseline_bytes < 1.05
    same = OPT.predict(OPT.case("ep2-4096"), "mi300x")
    assert same.optimized_bytes == same.baseline_bytes
    assert same.ratio == 1
    assert replace(same, optimized_us=None).ratio is None
