"""Plans of the split decode: whole waves, fewest iterations, and no split that does not pay, by the model."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4ref import device, kernels
from dsv4ref.device import get_device
from dsv4ref.evidence import isa
from dsv4ref.kernels.sparse_mla import splits as splits_module
from dsv4ref.kernels.sparse_mla.launch import STATIC, LaunchShape, select_launch
from dsv4ref.kernels.sparse_mla.split_decode import SplitScratch
from dsv4ref.kernels.sparse_mla.splits import (
    MAX_SPLITS,
    SHAPES,
    WORTH_A_SPLIT,
    Machine,
    SplitPlan,
    candidates,
    machine_of,
    plan_splits,
    staged_bytes,
    tiles_per_row,
)
from dsv4ref.optimizations import decode_model
from dsv4ref.optimizations.split_model import partial_request

CARDS = ("mi300x", "mi355x", "h200")
CALLS = list(itertools.product((1, 2, 8, 31, 64, 100, 128, 256, 1024), (8, 16, 32, 64, 128), ((128, 512), (128, 0))))


def machine(card: str) -> Machine:
    return Machine.of(get_device(card))


def every_plan(m: Machine, rows: int, heads: int, widths: tuple[int, int]) -> list[SplitPlan]:
    """All shapes and split counts, those that leave splits empty included."""
    return [
        plan_splits(m, rows, heads, *widths, shape.launch, splits)
        for shape in SHAPES[m.arch]
        for splits in range(1, MAX_SPLITS + 1)
    ]


# --- what a plan says ------------------------------------------------------------------------------------------------


def test_one_row_of_v4_flash_on_mi300x_by_hand() -> None:
    """4 head blocks of 16 heads, 4 + 16 tiles of 32 keys: 80 workgroups of one tile each in one wave of 304."""
    plan = plan_splits(machine("mi300x"), 1, 64, 128, 512)
    assert (plan.launch, plan.splits, plan.tiles_per_split) == (LaunchShape(16, 32, 8), 20, 1)
    assert (plan.workgroups, plan.waves, plan.iterations) == (80, 1, 1)
    assert plan.idle == pytest.approx(1 - 80 / 304)
    assert plan.reason == "80 workgroups in 1 wave of 304, 1 iteration"


def test_a_whole_machine_of_rows_is_not_split() -> None:
    """256 rows of 64 heads are 256 workgroups at 64x16: MI355X has 256 compute units."""
    plan = plan_splits(machine("mi355x"), 256, 64, 128, 512)
    assert (plan.splits, plan.waves, plan.idle, plan.launch) == (1, 1, 0.0, LaunchShape(64, 16, 8))
    half = plan_splits(machine("mi355x"), 128, 64, 128, 512)
    assert (half.splits, half.waves, half.idle, half.launch) == (2, 1, 0.0, LaunchShape(64, 16, 8))


def test_tiles_do_not_cross_scopes() -> None:
    assert tiles_per_row(128, 512, 32) == 20
    assert tiles_per_row(33, 5, 32) == 3
    assert tiles_per_row(33, 0, 32) == 2
    assert tiles_per_row(0, 0, 32) == 1, "a row without keys still has to be written"


@pytest.mark.parametrize("card", CARDS)
def test_no_other_plan_is_faster_than_the_chosen_one_by_more_than_a_split_has_to_promise(card: str) -> None:
    m = machine(card)
    for rows, heads, widths in CALLS:
        chosen = plan_splits(m, rows, heads, *widths)
        useful = {plan.launch for plan in candidates(m, rows, heads, *widths)}
        others = [plan for plan in every_plan(m, rows, heads, widths) if plan.launch in useful]
        fastest = min(others, key=lambda plan: plan.time_us)
        limit = fastest.time_us * (WORTH_A_SPLIT if chosen.splits == 1 else 1.0)
        assert chosen.time_us <= limit + 1e-3, f"{rows} x {heads}, {widths}: {chosen} against {fastest}"
        single = min((plan for plan in others if plan.splits == 1), key=lambda plan: plan.time_us)
        assert chosen.splits == 1 or chosen.time_us * WORTH_A_SPLIT < single.time_us


@pytest.mark.parametrize("card", CARDS)
def test_within_a_wave_count_the_fewest_iterations_win(card: str) -> None:
    """vllm#57880's rule, from the plan's own numbers: no split count of the same shape and waves walks fewer tiles."""
    m = machine(card)
    for rows, heads, widths in CALLS:
        chosen = plan_splits(m, rows, heads, *widths)
        if chosen.splits == 1:
            continue
        for splits in range(1, chosen.splits + 1):
            other = plan_splits(m, rows, heads, *widths, chosen.launch, splits)
            if other.waves == chosen.waves:
                assert other.iterations > chosen.iterations or splits == chosen.splits, (rows, heads, other, chosen)


def test_candidates_leave_no_split_empty_and_no_head_block_mostly_padding() -> None:
    for heads, widest in ((8, 16), (16, 16), (17, 32), (32, 32), (33, 64), (128, 64)):
        plans = candidates(machine("mi300x"), 4, heads, 128, 512)
        assert max(plan.launch.block_h for plan in plans) == widest, heads
        for plan in plans:
            tiles = tiles_per_row(128, 512, plan.launch.block_k)
            assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split, plan
            assert 0 <= plan.idle < 1, plan


@pytest.mark.parametrize("card", CARDS)
def test_one_split_takes_what_the_decode_model_says(card: str) -> None:
    """The two models agree on the same launch; with one workgroup per unit or fewer, only this one sees no pairs."""
    spec, m = get_device(card), machine(card)
    for rows, heads, (swa, extra) in CALLS:
        shape = select_launch(spec.arch, rows, heads, extra)
        plan = plan_splits(m, rows, heads, swa, extra, shape, 1)
        if 8 // shape.num_warps > 1 and plan.workgroups <= m.compute_units:
            continue
        params = {"rows": rows, "heads": heads, "swa": swa, "extra": extra}
        assert plan.time_us == pytest.approx(decode_model.decode_time_us(params, shape, spec)), (rows, heads, shape)


def test_a_tie_goes_to_the_shape_that_was_measured_faster() -> None:
    plan = plan_splits(machine("h200"), 1024, 16, 128, 512)
    assert (plan.launch, plan.splits) == (LaunchShape(16, 32, 4), 1)


def test_few_heads_may_take_a_part_of_a_warp_groups_tile() -> None:
    """Measured: 1,024 rows of 32 heads are faster in half of 64x64 than in two halves of 16-row tiles."""
    plan = plan_splits(machine("h200"), 1024, 32, 128, 512)
    assert (plan.launch, plan.splits) == (LaunchShape(64, 64, 8), 1)
    assert max(plan.launch.block_h for plan in candidates(machine("mi300x"), 1024, 32, 128, 512)) == 32


def test_staging_is_what_the_scratch_holds() -> None:
    assert staged_bytes(3, 8, 5) == SplitScratch.allocate(3 * 8 * 5, "cpu").nbytes


# --- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(kernels.mode() != "interpreted", reason="the interpreter's machine")
def test_the_interpreter_plans_for_gfx942() -> None:
    assert machine_of(torch.device("cpu")) == machine("mi300x")


def test_a_live_card_is_planned_for_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = get_device("h200")
    first = replace(h200, key="other", name="NVIDIA Other", bandwidth_tb_s=1.0)
    monkeypatch.setattr(device, "KNOWN_DEVICES", {"other": first, **device.KNOWN_DEVICES})
    monkeypatch.setattr(splits_module, "architecture", lambda where: "sm_90")

    def planned(name: str, units: int | None) -> Machine | None:
        live = SimpleNamespace(name=name, compute_units=units)
        monkeypatch.setattr(device, "current", lambda index: live)
        return machine_of.__wrapped__(torch.device("cuda", 0))  # not from the cache, and nothing left in it

    assert planned("NVIDIA H200", h200.compute_units) == Machine.of(h200, h200.compute_units)
    assert planned("NVIDIA H100", 114) == Machine.of(first, 114)


def test_a_partition_has_its_share_of_the_card() -> None:
    whole, part = machine("mi300x"), Machine.of(get_device("mi300x"), 38)
    assert part.compute_units == 38
    assert part.bandwidth_tb_s == pytest.approx(whole.bandwidth_tb_s / 8)
    assert part.bf16_tflops == pytest.approx(whole.bf16_tflops / 8)
    assert plan_splits(part, 8, 64, 128, 512).splits < plan_splits(whole, 8, 64, 128, 512).splits


def test_a_machine_without_a_model_gets_one_split_and_says_so() -> None:
    plan = plan_splits(None, 4, 64, 128, 512)
    assert (plan.launch, plan.splits, plan.workgroups) == (STATIC, 1, 16)
    assert math.isnan(plan.time_us)
    assert plan.reason == "no wave model: as asked, else 1 split"
    assert plan_splits(None, 4, 64, 128, 512, LaunchShape(16, 32, 4), 3).splits == 3


def test_a_launch_shape_of_ones_own_is_kept() -> None:
    odd = LaunchShape(64, 16, 4)
    assert plan_splits(machine("mi300x"), 1, 8, 128, 512, odd).launch == odd
    assert plan_splits(machine("mi300x"), 1, 64, 128, 512, odd).launch == odd
    assert plan_splits(machine("mi300x"), 1, 64, 128, 512, odd, 7).splits == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected a positive integer"),
        ({"heads": 2.0}, "heads: got 2.0"),
        ({"swa_width": -1}, "swa_width: got -1, expected a non-negative integer"),
        ({"splits": 0}, "splits: got 0, expected an integer from 1 to 32"),
        ({"splits": 33}, "splits: got 33"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rows": 1, "heads": 8, "swa_width": 128, "extra_width": 0, **change}
    with pytest.raises(ValueError, match=message):
        plan_splits(machine("h200"), **arguments)


def test_machines_without_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="spec: got 'cpu', expected a card with published units"):
        Machine.of(get_device("cpu"))
    with pytest.raises(ValueError, match="compute_units: got 0, expected a positive number"):
        Machine.of(get_device("h200"), 0)


# --- what the compiler makes of the shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_as_many_workgroups_are_resident_as_registers_and_lds_allow(arch: str) -> None:
    requests = [partial_request(shape.launch, arch) for shape in SHAPES[arch]]
    for shape, row in zip(SHAPES[arch], isa.compile_rows(requests, [arch]), strict=True):
        assert row.vgpr_spills == 0, row
        assert row.waves_per_simd * isa.arch_caps(arch).simds_per_cu // row.num_warps == shape.resident, row
