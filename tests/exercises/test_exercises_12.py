"""The solutions of chapter 12's exercises, and the figures its text states, checked."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4ref.config import V4_FLASH
from dsv4ref.device import KNOWN_DEVICES
from dsv4ref.evidence import isa
from dsv4ref.evidence.compare import error_norm
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.experts import plan_dispatch
from dsv4ref.kernels.experts.expert_layer import OWNED_TILE
from dsv4ref.optimizations import catalogue, direct_w2_inputs, direct_w2_reduce, expert_traffic
from dsv4ref.optimizations.base import case_seed
from dsv4ref.optimizations.direct_w2_inputs import LayerInputs

OPT = catalogue.get("direct_w2_reduce")
STEADY = {**OPT.case("all-4096").params, "rows": 5120}


def built(name: str, device: str) -> LayerInputs:
    inputs: LayerInputs = OPT.make_inputs(OPT.case(name), device, case_seed(OPT.id, name, 0))
    return inputs


# --- exercises ---


def test_a_steps_rows_between_w2_and_the_sum_and_what_the_chapter_saves() -> None:
    each_way = STEADY["rows"] * STEADY["top_k"] * STEADY["hidden"] * 2
    assert each_way == 240 * 2**20
    assert round(2 * V4_FLASH.n_layers * each_way / 2**30, 1) == 20.2
    moved = [sum(s.moved for s in expert_traffic.steps(path, STEADY, "gfx942")) for path in ("separate", "products")]
    saved = moved[0] - moved[1]
    assert saved == 20 * STEADY["rows"] * STEADY["top_k"] * STEADY["inner"]
    assert round(saved / 2**30, 2) == 1.17
    assert saved / (2 * each_way) == 2.5


def test_swapped_gathers_lose_the_positions_whose_own_number_is_no_local_slot(device: str) -> None:
    inputs = built("tiny-ep2", device)
    plan = plan_dispatch(inputs.experts, expert_map=inputs.placed, block_m=16)
    trip = direct_w2_reduce.round_trip(plan.gather, plan.scatter).tolist()
    local = inputs.local.flatten().tolist()
    want = [p if local[p] else -1 for p in range(len(local))]
    assert trip == want
    assert sum(one < 0 for one in trip[: int(plan.offsets[-1])]) > 0, "some local position must be lost"
    whole = built("tiny", device)
    plan = plan_dispatch(whole.experts, expert_map=whole.placed, block_m=16)
    assert direct_w2_reduce.round_trip(plan.gather, plan.scatter).tolist() == list(range(27))


@pytest.mark.parametrize(("rows", "passes"), [(16, 6), (17, 12), (32, 12)])
def test_an_owner_reads_the_same_six_experts_once_per_block(rows: int, passes: int) -> None:
    blocks = -(-rows // OWNED_TILE.block_m)
    assert 6 * blocks == passes
    assert 6 * -(-rows // 16) == passes, "tiles of 16 rows make as many"
    # The model's count for experts chosen uniformly can only be larger than one block's and at most all of them.
    p = {**OPT.case("all-16").params, "rows": rows}
    weight = p["hidden"] * p["inner"] * (0.5 + 1 / 32)
    counted = (expert_traffic.steps("owned", p, "gfx942")[1].moved) / weight
    assert 6 <= counted <= 256 * blocks


def test_errors_are_as_the_roots_of_the_roundings(device: str) -> None:
    inputs = built("tiny-top6", device)
    exact = direct_w2_inputs.reference(inputs).cpu()
    tile = direct_w2_reduce.tiles_of(inputs)[0]
    plan = plan_dispatch(inputs.experts, expert_map=inputs.placed, block_m=tile.block_m)
    owned, products = (direct_w2_reduce.layer(inputs, plan, form).cpu() for form in ("owned", "products"))
    plain = direct_w2_inputs.plain(inputs).cpu()
    one = error_norm(owned, exact) / math.sqrt(2)
    assert abs(one - 0.0017) < 0.0002
    for got, roundings in ((products, 3), (plain, 6)):
        ratio = error_norm(got, exact) / one
        assert abs(ratio / math.sqrt(roundings) - 1) < 0.1, f"{ratio}, expected the root of {roundings}"


# --- what the text states ---


@pytest.mark.parametrize("case", ["tiny-ep2", "tiny-1", "tiny-0"])
def test_launches_are_predicted_as_counted(case: str, device: str) -> None:
    calls = OPT.timed(OPT.make_inputs(OPT.case(case), device, 0))
    p = OPT.predict(OPT.case(case), "mi300x")
    counted = [count_launches(calls[name]).total for name in ("baseline", "optimized", "owned")]
    assert counted[:2] == [p.baseline_launches, p.optimized_launches]
    assert counted == ([0, 0, 0] if case == "tiny-0" else [6, 3, 2])


@pytest.mark.parametrize("case", [name for name, case in OPT.cases.items() if case.tiny])
def test_the_baseline_passes_the_gate_too(case: str, device: str) -> None:
    inputs = built(case, device)
    found = OPT.baseline(inputs)
    assert OPT.yardstick is not None
    verdict = OPT.gate.judge(found, baseline={}, reference=OPT.reference(inputs), yardstick=OPT.yardstick(inputs))
    assert verdict.passed, verdict.detail


def test_a_slot_and_inner_unit_cost_twenty_bytes_on_one_rank_and_more_on_two() -> None:
    def saved(ranks: int) -> float:
        p = {**STEADY, "ranks": ranks}
        slots = sum(expert_traffic.batch_loads(256, ranks, 6, 5120))
        moved = [sum(s.moved for s in expert_traffic.steps(path, p, "gfx942")) for path in ("separate", "products")]
        return (moved[0] - moved[1]) / slots / p["inner"]

    assert saved(1) == 20
    assert saved(2) > 25


@pytest.mark.parametrize("key", ["mi300x", "mi355x", "h200"])
def test_the_model_prefers_an_owner_up_to_sixteen_rows_where_its_programs_fill_the_machine(key: str) -> None:
    spec = KNOWN_DEVICES[key]

    def time(path: expert_traffic.Path, rows: int) -> float:
        p = {**STEADY, "ranks": 2, "rows": rows}
        return sum(expert_traffic.step_time_us(s, spec) for s in expert_traffic.steps(path, p, spec.arch))

    assert time("owned", 1) < time("products", 1)
    assert spec.compute_units is not None
    assert (time("owned", 16) < time("products", 16)) == (spec.compute_units <= 256)
    assert time("owned", 64) > time("products", 64)
    assert time("owned", 1024) > 3 * time("products", 1024)


def test_a_path_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="path: got 'fused', expected one of"):
        expert_traffic.steps("fused", STEADY, "gfx942")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: got 'separate', expected 'products' or 'owned'"):
        direct_w2_reduce.layer(built("tiny-1", "cpu"), None, "separate")  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_the_fused_w1_keeps_fewer_waves_and_lds_holds_x_alone(arch: str) -> None:
    plain, fused = OPT.kernels(arch)[:2]
    rows = isa.compile_rows([plain, fused], [arch])
    assert rows[1].waves_per_simd < rows[0].waves_per_simd
    tile = fused.constexprs
    assert rows[1].lds == tile["BLOCK_M"] * tile["BLOCK_K"] * torch.bfloat16.itemsize  # type: ignore[operator]
    assert not isa.check_caps(rows)
