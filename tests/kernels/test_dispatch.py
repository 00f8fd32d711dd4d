"""Routing data built on the device: integers against the reference, padding, sentinels, extremes, and bad arguments."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.compare import identical
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.experts.dispatch import (
    BLOCK_TOKENS,
    DispatchPlan,
    allocate_plan,
    check_experts,
    max_tiles,
    plan_dispatch,
)
from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.ref.dispatch import dispatch_ref, expert_table_ref, remap_ref


def assert_plan(plan: DispatchPlan, local: Tensor, num_experts: int) -> None:
    """Every integer of the reference, and -1 behind its tiles."""
    want = dispatch_ref(local.cpu(), num_experts, plan.block_m)
    used = want.tile_expert.numel()
    assert used <= plan.tile_expert.numel()
    tail = plan.tile_expert.numel() - used
    for name in ("histogram", "offsets", "gather", "scatter", "tile_expert", "tile_first"):
        expected = getattr(want, name)
        if name.startswith("tile"):
            expected = torch.cat([expected, torch.full((tail,), -1, dtype=torch.int32)])
        found = identical(name, getattr(plan, name).cpu(), expected, relation="exact")
        assert found.passed, found.detail


def chosen(tokens: int, top_k: int, experts: int, rng: torch.Generator, device: str) -> Tensor:
    """Distinct experts per token, skewed to the low numbers."""
    scores = torch.rand((tokens, experts), generator=rng) + torch.linspace(1.0, 0.0, experts)
    return scores.argsort(dim=1, descending=True)[:, :top_k].to(torch.int32).contiguous().to(device)


@pytest.mark.parametrize("top_k", [1, 6, 8])
@pytest.mark.parametrize("tokens", [1, 33, 74])
@pytest.mark.parametrize("experts", [37, 64])
def test_integers_are_the_references(tokens: int, top_k: int, experts: int, rng: torch.Generator, device: str) -> None:
    """33 tokens of top 6 are one full block of 192 slots in 256 lanes, and a second one."""
    ids = chosen(tokens, top_k, experts, rng, device)
    ids[torch.rand((tokens, top_k), generator=rng).to(device) < 0.2] = -1
    with poisoned_allocations():
        plan = plan_dispatch(ids, experts, block_m=4)
    assert_plan(plan, ids, experts)
    assert torch.equal(plan.local, ids)


@pytest.mark.parametrize("block_m", [1, 3, 16, 128])
def test_tiles_cover_every_local_slot_once(block_m: int, rng: torch.Generator, device: str) -> None:
    ids = chosen(40, 6, 12, rng, device)
    plan = plan_dispatch(ids, 12, block_m=block_m)
    assert_plan(plan, ids, 12)
    covered: list[int] = []
    for expert, first in zip(plan.tile_expert.tolist(), plan.tile_first.tolist(), strict=True):
        if expert >= 0:
            covered += range(first, min(first + block_m, int(plan.offsets[expert + 1])))
    assert covered == list(range(240))


def test_gather_and_scatter_are_inverse_on_local_slots(rng: torch.Generator, device: str) -> None:
    ids = chosen(40, 6, 12, rng, device)
    ids[::3, 1] = -1
    plan = plan_dispatch(ids, 12, block_m=8)
    local = int(plan.offsets[-1])
    assert local == 240 - 14
    gather, scatter = plan.gather[:local].to(torch.int64), plan.scatter.to(torch.int64)
    assert torch.equal(scatter[gather].cpu(), torch.arange(local))
    assert (plan.gather[local:] == -1).all()
    assert ((scatter == -1) == (ids.flatten() == -1)).all()


def test_minus_one_counts_for_no_expert(rng: torch.Generator, device: str) -> None:
    """-1 // 32 truncates to 0 and a shift by -1 sets bit 31: expert 31 must not gain what -1 slots add."""
    ids = chosen(9, 6, 64, rng, device)
    before = plan_dispatch(ids, 64, block_m=8).histogram
    more = torch.cat([ids, torch.full_like(ids, -1)])
    after = plan_dispatch(more, 64, block_m=8)
    assert torch.equal(after.histogram, before)
    assert_plan(after, more, 64)


def test_ids_beyond_the_experts_are_skipped_not_read(device: str) -> None:
    ids = torch.tensor([[5, 2**31 - 1], [-(2**31), 4]], dtype=torch.int32, device=device)
    plan = plan_dispatch(ids, 5, block_m=1)
    assert plan.local.tolist() == [[-1, -1], [-1, 4]]
    assert_plan(plan, ids, 5)


def test_one_expert_gets_everything(device: str) -> None:
    ids = torch.full((70, 1), 3, dtype=torch.int32, device=device)
    plan = plan_dispatch(ids, 5, block_m=16)
    assert_plan(plan, ids, 5)
    assert plan.histogram.tolist() == [0, 0, 0, 70, 0]
    assert plan.tile_expert[:5].tolist() == [3] * 5


def test_a_doubled_expert_keeps_both_slots(device: str) -> None:
    ids = torch.tensor([[2, 2, 0]], dtype=torch.int32, device=device)
    plan = plan_dispatch(ids, 3, block_m=2)
    assert_plan(plan, ids, 3)
    assert plan.gather.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"experts: token 0 has \[2, 2, 0\], expected each expert once"):
        plan_dispatch(ids, 3, block_m=2, check=True)


@pytest.mark.parametrize("experts", [0, 1, 31, 32])
def test_no_token_and_few_experts(experts: int, device: str) -> None:
    with poisoned_allocations():
        plan = plan_dispatch(torch.zeros((0, 6), dtype=torch.int32, device=device), experts, block_m=16)
    assert plan.histogram.tolist() == [0] * experts
    assert plan.offsets.tolist() == [0] * (experts + 1)
    ids = torch.zeros((3, 1), dtype=torch.int32, device=device)
    with poisoned_allocations():
        assert_plan(plan_dispatch(ids, experts, block_m=2), ids, experts)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 1), (8, 2), (37, 3), (385, 8), (2, 5)])
def test_a_placement_is_the_references(experts: int, ranks: int, placement: Any) -> None:
    for rank in range(ranks):
        got = ExpertMap.placed(experts, rank=rank, ranks=ranks, placement=placement)
        found = identical("table", got.table, expert_table_ref(experts, rank, ranks, placement), relation="exact")
        assert found.passed, f"rank {rank}: {found.detail}"


@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (37, 3), (385, 4)])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_every_slot_is_local_to_one_rank(
    experts: int, ranks: int, placement: Any, rng: torch.Generator, device: str
) -> None:
    ids = chosen(9, 6, experts, rng, device)
    ids[4] = -1
    owners = torch.zeros((9, 6), dtype=torch.int32)
    total = 0
    for rank in range(ranks):
        one = ExpertMap.placed(experts, rank=rank, ranks=ranks, placement=placement, device=device)
        plan = plan_dispatch(ids, expert_map=one, block_m=8)
        assert_plan(plan, remap_ref(ids.cpu(), one.table.cpu()), one.num_local)
        owners += (plan.local >= 0).cpu()
        total += int(plan.histogram.sum())
        back = torch.where(plan.local >= 0, one.global_ids()[plan.local.clamp(min=0).long()], -1)
        assert ((back == ids) | (back == -1)).all()
    assert (owners[[0, 1, 2, 3, 5, 6, 7, 8]] == 1).all()
    assert (owners[4] == 0).all()
    assert total == 8 * 6


def test_a_rank_that_gets_nothing(device: str) -> None:
    ids = torch.arange(4, dtype=torch.int32, device=device).repeat(6, 1)
    idle = ExpertMap.placed(8, rank=1, ranks=2, device=device)
    with poisoned_allocations():
        plan = plan_dispatch(ids, expert_map=idle, block_m=8)
    assert_plan(plan, torch.full((6, 4), -1), 4)
    assert (plan.tile_expert == -1).all()


def test_the_plan_is_the_callers_and_the_order_the_same_every_time(rng: torch.Generator, device: str) -> None:
    ids = chosen(40, 6, 12, rng, device)
    plan = allocate_plan(40, 6, 12, block_m=8, device=device)
    for tensor in plan.tensors.values():
        tensor.fill_(77)
    where = {name: tensor.data_ptr() for name, tensor in plan.tensors.items()}
    assert plan_dispatch(ids, 12, block_m=8, out=plan) is plan
    assert_plan(plan, ids, 12)
    other = chosen(40, 6, 12, rng, device)
    plan_dispatch(other, 12, block_m=8, out=plan)
    assert_plan(plan, other, 12)
    assert where == {name: tensor.data_ptr() for name, tensor in plan.tensors.items()}


def test_three_launches_and_no_copy_to_the_host(rng: torch.Generator, device: str) -> None:
    ids = chosen(40, 6, 12, rng, device)
    one = ExpertMap.placed(12, rank=0, ranks=2, device=device)
    plan = allocate_plan(40, 6, 6, block_m=8, device=device)
    counted = count_launches(lambda: plan_dispatch(ids, expert_map=one, block_m=8, out=plan), warmup=0)
    assert (counted.total, counted.copies, counted.fills) == (3, (), ())
    empty = ids[:0]
    assert count_launches(lambda: plan_dispatch(empty, 12, block_m=8), warmup=0).total == 2


@pytest.mark.parametrize("block_m", [1, 2, 7])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_the_bound_on_tiles_is_reached_and_never_passed(block_m: int, experts: int) -> None:
    def partitions(slots: int, parts: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(slots,)]
        return [(n, *rest) for n in range(slots + 1) for rest in partitions(slots - n, parts - 1)]

    for slots in range(9):
        needed = max(sum(-(-n // block_m) for n in counts) for counts in partitions(slots, experts))
        assert max_tiles(slots, experts, block_m) == needed, (slots, experts, block_m)
    assert max_tiles(5, 0, block_m) == 0


def test_remap_is_one_launch_and_masks_what_is_no_expert(device: str) -> None:
    one = ExpertMap.placed(5, rank=1, ranks=2, device=device)
    ids = torch.tensor([[-1, 0, 4], [3, 5, -7]], dtype=torch.int32, device=device)
    buffer = torch.full((2, 3), 99, dtype=torch.int32, device=device)
    assert one.remap(ids, out=buffer) is buffer
    assert buffer.tolist() == [[-1, -1, 1], [0, -1, -1]]
    assert count_launches(lambda: one.remap(ids, out=buffer), warmup=0).total == 1
    assert one.remap(ids[:0]).shape == (0, 3)
    many = torch.arange(-3, 1500, dtype=torch.int32, device=device)[:1500].reshape(250, 6)
    assert torch.equal(one.remap(many).cpu(), remap_ref(many.cpu(), one.table.cpu()))


# --- the map is not a mask ---


@pytest.mark.parametrize(
    ("table", "num_local"),
    [([1, 1, 0, 0], 2), ([1, 0], 1), ([0, 1], 1), ([1, 1, 1, 1], 4), ([0, 0, 0], 0), ([0, 0, 1, 1, 1, 0], 3)],
)
def test_a_mask_is_refused_as_a_map(table: list[int], num_local: int) -> None:
    with pytest.raises(ValueError, match=r"table: its local numbers are .* \(this looks like a 0/1 mask"):
        ExpertMap(torch.tensor(table, dtype=torch.int32), num_local, 0, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.tensor([0, -1, 2], dtype=torch.int32)}, ValueError, "numbers are [0, 2], expected each of 0"),
        ({"table": torch.tensor([0, -2], dtype=torch.int32)}, ValueError, "its local numbers are [-2, 0]"),
        ({"table": torch.tensor([True, False])}, TypeError, "table: got torch.bool, expected torch.int32"),
        ({"rank": 2}, ValueError, "rank: got 2, expected 0 to 1"),
        ({"ranks": 0}, ValueError, "ranks: got 0, expected an integer of at least 1"),
        ({"num_local": -1}, ValueError, "num_local: got -1, expected an integer of at least 0"),
    ],
)
def test_tables_that_are_no_map_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"table": torch.tensor([0, -1, 1], dtype=torch.int32), "num_local": 2, "rank": 0, "ranks": 2}
    ExpertMap(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=re.escape(message)):
        ExpertMap(**{**good, **change})


def test_the_mask_is_a_view_of_the_map() -> None:
    one = ExpertMap.placed(5, rank=1, ranks=2, placement="round_robin")
    assert one.table.tolist() == [-1, 0, -1, 1, -1]
    assert one.mask().tolist() == [0, 1, 0, 1, 0, 0]
    assert one.mask(2).tolist() == [0, 1, 0, 1, 0, 1, 1, 0]
    assert one.global_ids().tolist() == [1, 3]
    with pytest.raises(ValueError, match="num_shared: got -1"):
        one.mask(-1)
    with pytest.raises(ValueError, match="table: its local numbers are"):
        ExpertMap(one.mask(1), one.num_local, one.rank, one.ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"ranks": 0}, "ranks: got 0"),
        ({"rank": -1}, "rank: got -1, expected 0 to 1"),
        ({"placement": "random"}, "placement: got 'random', expected one of ['linear', 'round_robin']"),
    ],
)
def test_placements_are_checked(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_experts": 4, "rank": 0, "ranks": 2, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        ExpertMap.placed(arguments.pop("num_experts"), **arguments)


# --- bad arguments ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"experts": torch.zeros((2, 6), dtype=torch.int64)}, TypeError, "experts: got torch.int64"),
        ({"experts": torch.zeros(12, dtype=torch.int32)}, ValueError, "experts: got shape [12], expected [M, k]"),
        ({"experts": torch.zeros((6, 2), dtype=torch.int32).T}, ValueError, "expected a contiguous tensor"),
        ({"num_experts": None}, ValueError, "num_experts: got None without an expert_map"),
        ({"num_experts": -1}, ValueError, "num_experts: got -1, expected an integer of at least 0"),
        ({"block_m": 0}, ValueError, "block_m: got 0, expected an integer of at least 1"),
        ({"expert_map": torch.tensor([1, 0])}, TypeError, "expert_map: got Tensor, expected an ExpertMap"),
        ({"expert_map": ExpertMap.placed(8, rank=0, ranks=2)}, ValueError, "num_experts: got 5, expected 4 like"),
        ({"out": 1}, TypeError, "out: got int, expected a DispatchPlan"),
        ({"out": allocate_plan(2, 6, 5, block_m=4)}, ValueError, "out: for tiles of 4 rows, expected 8"),
        ({"out": allocate_plan(3, 6, 5, block_m=8)}, ValueError, "out.local: got shape [3, 6], expected [2, 6]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if kernels.mode() != "interpreted":
        pytest.skip("arguments are CPU tensors, which compiled kernels refuse first")
    ids = torch.zeros((2, 6), dtype=torch.int32)
    arguments: dict[str, Any] = {"experts": ids, "num_experts": 5, "block_m": 8, **change}
    with pytest.raises(error, match=re.escape(message)):
        plan_dispatch(arguments.pop("experts"), arguments.pop("num_experts"), **arguments)


def test_the_ids_may_not_be_the_plans_memory(device: str) -> None:
    plan = allocate_plan(2, 6, 5, block_m=8, device=device)
    plan.local.zero_()
    with pytest.raises(ValueError, match=r"out\.local: its memory range overlaps experts's"):
        plan_dispatch(plan.local, 5, block_m=8, out=plan)
    wrong = replace(plan, histogram=plan.histogram.to(torch.int64))
    with pytest.raises(TypeError, match=r"out\.histogram: got torch\.int64, expected torch\.int32"):
        plan_dispatch(torch.zeros_like(plan.local), 5, block_m=8, out=wrong)


def test_ids_are_checked_on_request(device: str) -> None:
    ids = torch.tensor([[-1, -1], [0, 5]], dtype=torch.int32, device=device)
    check_experts(ids, 6)
    with pytest.raises(ValueError, match=r"experts: token 1 has \[0, 5\], expected -1 to 4"):
        plan_dispatch(ids, 5, block_m=8, check=True)
    mapped = ExpertMap.placed(6, rank=0, ranks=3, device=device)
    plan_dispatch(ids, expert_map=mapped, block_m=8, check=True)


def test_positions_fit_31_bits() -> None:
    with pytest.raises(ValueError, match=r"tokens: got 400000000 x 6 slots, expected fewer than 2\^31"):
        allocate_plan(400_000_000, 6, 4, block_m=8, device="meta")
    assert BLOCK_TOKENS * 8 == 256
