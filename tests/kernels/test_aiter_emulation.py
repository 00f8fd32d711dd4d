"""The emulation of AITER's persistent decode: a decode over a plan is attention, and misuse is refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from aiter_calls import FP8, SLOTS, Call, build
from hypothesis import given
from hypothesis import strategies as st

from dsv4ref.kernels.aiter import adapters, contract
from dsv4ref.kernels.aiter.emulation import NAME, emulated_library
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.plan import PLAN_ORDER, check_plan, planned_keys, work_rows


@pytest.fixture
def library() -> Library:
    return emulated_library(compute_units=4)


def agrees(call: Call, lse: torch.Tensor | None) -> None:
    assert lse is not None
    for row, keys in enumerate(call.lists):
        if not len(keys):
            assert call.arguments["out"][row].isnan().all(), f"row {row} has no keys and was written"
            continue
        out, want = call.arguments["out"][row].double(), call.expected(row)
        off = (out - want[0]).abs() - (2**-8 * want[0].abs() + 1e-6)
        assert (off <= 0).all(), f"row {row}: worst {off.argmax()}: {out.flatten()[off.argmax()]}"
        torch.testing.assert_close(lse[row].double(), want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["fixed", "ragged"])
@pytest.mark.parametrize(
    "lengths", [[3, 2], [64], [64, 0, 40, 33], [0, 0, 5], [1] * 9, [17, 64, 16, 15, 64, 64], [64, 64]]
)
def test_a_decode_over_a_plan_is_attention(
    lengths: list[int], layout: str, library: Library, rng: torch.Generator
) -> None:
    call = build(library, lengths, rng, layout=layout)
    call.fill()
    agrees(call, call.run())


@pytest.mark.parametrize("units", [1, 2, 3, 16])
def test_how_many_units_share_the_work_does_not_change_the_result(units: int, rng: torch.Generator) -> None:
    call = build(emulated_library(compute_units=units), [64, 5, 48], rng)
    call.fill()
    agrees(call, call.run())
    assert call.plan.work_indptr.shape == (units + 1,)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    units=st.integers(1, 9),
    layout=st.sampled_from(["fixed", "ragged"]),
)
def test_every_plan_covers_every_key_once_inside_its_own_buffers(lengths: list[int], units: int, layout: str) -> None:
    call = build(
        emulated_library(compute_units=units), lengths, torch.Generator().manual_seed(0), layout=layout, heads=16
    )
    call.fill()
    check_plan(call.plan, call.shape, call.arguments["kv_indptr"])
    work, plan = work_rows(call.plan), call.plan
    reached = [range(int(start), int(end)) for start, end in work[:, 4:6]]
    entries = list(itertools.chain.from_iterable(reached))
    assert len(entries) == len(set(entries)) == sum(min(n, 64) for n in lengths)
    assert (work[:, 4] % 16 == 0).all() or layout == "ragged"
    assert plan.work_indptr[0] == 0
    assert (plan.work_indptr[1:] >= plan.work_indptr[:-1]).all()
    slots = sorted(int(slot) for slot in work[:, 1] if slot >= 0)
    assert slots == list(range(len(slots)))
    assert len(slots) <= plan.reduce_partial_map.shape[0]
    assert int(plan.reduce_indptr[-1]) == len(slots)
    for row in range(len(lengths)):
        mine = work[work[:, 0] == row]
        assert len(mine) == 1 or (mine[:, 1] >= 0).all()
        begin, end = plan.reduce_indptr[row : row + 2].tolist()
        if len(mine) > 1:
            assert plan.reduce_final_map[row].tolist() == [row, row + 1]
            assert plan.reduce_partial_map[begin:end].tolist() == mine[:, 1].tolist()
        else:
            assert begin == end
    offsets = [int(o) for o in work[:, 6]]
    assert offsets == [int((work[work[:, 0] == w[0]][:, 5]).max() - w[5]) for w in work]


def test_the_order_of_the_sizes_is_aiters(library: Library) -> None:
    sizes = library.module.get_mla_metadata_info_v1(3, 1, 16, FP8, FP8, True)
    assert [dtype for _, dtype in sizes] == [torch.uint64] + [torch.int32] * 5
    assert [size for size, _ in sizes] == [2, 5, (6, 8), 4, (3, 2), 6]
    assert PLAN_ORDER.index("work_indptr") < PLAN_ORDER.index("work_info_set")
    taken = list(contract.CONTRACT["get_mla_metadata_v1"].parameters())
    assert taken.index("work_info_set") < taken.index("work_indptr"), "the trap that named buffers close"


def test_a_plan_does_not_depend_on_what_its_buffers_held(library: Library, rng: torch.Generator) -> None:
    call = build(library, [64, 0, 40], rng)
    call.fill()
    first = work_rows(call.plan)
    for buffer in call.plan.by_name().values():
        buffer.view(torch.int32).fill_(-7)
    call.fill()
    assert torch.equal(work_rows(call.plan), first)


def test_the_output_and_nothing_else_is_written_in_place(library: Library, rng: torch.Generator) -> None:
    call = build(library, [40, 64], rng)
    call.fill()
    before = {name: value.clone() for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    address = call.arguments["out"].data_ptr()
    call.run()
    assert call.arguments["out"].data_ptr() == address
    for name in set(before) - {"out"}:
        same = call.arguments[name].view(torch.uint8) == before[name].view(torch.uint8)
        assert same.all(), name


# --- what is refused ---


def planned(library: Library, rng: torch.Generator, lengths: list[int] | None = None) -> Call:
    call = build(library, lengths or [3, 2], rng)
    call.fill()
    return call


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([0, 2, 5], r"plan: work row 0 reads entries 0 to 3 of batch 0, whose list is 0 to 2 now: a stale plan"),
        ([0, 4, 6], r"plan: covers 3 keys of batch 0, whose length is 4 now: a stale plan"),
        ([0, 3, 4], r"plan: work row 1 reads entries 64 to 66 of batch 1, whose list is 64 to 65 now"),
    ],
)
def test_a_stale_plan_is_refused_by_its_row(
    now: list[int], message: str, library: Library, rng: torch.Generator
) -> None:
    call = planned(library, rng)
    with pytest.raises(ValueError, match=message):
        call.run(kv_indptr=torch.tensor(now, dtype=torch.int32))


def test_without_strictness_a_stale_plan_reads_what_it_was_told(rng: torch.Generator) -> None:
    call = planned(emulated_library(compute_units=4, strict=False), rng, [3, 0])
    call.arguments["kv_indices"][2] = -1  # the list is 2 long now, and its tail says so
    call.run(kv_indptr=torch.tensor([0, 2, 2], dtype=torch.int32))
    assert call.arguments["out"][0].isnan().all(), "slot -1 was read"


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_a_slot_that_does_not_exist_is_refused(slot: int, library: Library, rng: torch.Generator) -> None:
    call = planned(library, rng)
    call.arguments["kv_indices"][1] = slot
    with pytest.raises(ValueError, match=f"row 0 names slot {slot} at entry 1, expected 3 slots in 0 to {SLOTS - 1}"):
        call.run()


def test_a_ragged_list_shorter_than_its_lengths_is_refused(library: Library, rng: torch.Generator) -> None:
    call = build(library, [3, 2], rng, layout="ragged")
    call.fill()
    with pytest.raises(ValueError, match="row 1 names nothing at entry 1, expected 2 slots"):
        call.run(kv_indices=call.arguments["kv_indices"][:4].clone())


@pytest.mark.parametrize("name", PLAN_ORDER)
def test_a_plan_buffer_that_moved_is_refused(name: str, library: Library, rng: torch.Generator) -> None:
    call = planned(library, rng)
    moved = {**call.plan.by_name(), name: call.plan.by_name()[name].clone()}
    call.plan = type(call.plan)(**moved)
    with pytest.raises(ValueError, match="these six buffers were not filled together"):
        call.run()


def test_addresses_inside_the_plan_are_checked(library: Library, rng: torch.Generator) -> None:
    call = planned(library, rng)
    call.plan.work_metadata_ptrs.view(torch.int64)[1] += 8
    with pytest.raises(ValueError, match="work_metadata_ptrs: points elsewhere than at work_indptr and work_info_set"):
        call.run()


def raw_plan_arguments(call: Call) -> dict[str, Any]:
    return {
        "seqlens_qo_indptr": call.arguments["qo_indptr"],
        "seqlens_kv_indptr": call.arguments["kv_indptr"],
        "kv_last_page_lens": call.arguments["kv_last_page_lens"],
        "num_heads_per_head_k": 16, "num_heads_k": 1, "is_causal": True,
        "max_seqlen_qo": 1, "uni_seqlen_qo": 1, "topk": 64, "dtype_q": FP8, "dtype_kv": FP8,
        **call.plan.by_name(),
    }  # fmt: skip


def test_the_info_functions_order_is_refused_by_the_fill_function(library: Library, rng: torch.Generator) -> None:
    call = build(library, [3, 2], rng)
    arguments = raw_plan_arguments(call)
    buffers = [arguments.pop(name) for name in PLAN_ORDER]
    first = [arguments.pop(name) for name in list(arguments)[:6]]
    with pytest.raises(ValueError, match=r"work_indptr: got shape \[5, 8\], expected \[5\]|work_info_set: got shape"):
        library.module.get_mla_metadata_v1(*first, *buffers, **arguments)


def test_a_plan_without_dtypes_is_a_plan_for_bf16(library: Library, rng: torch.Generator) -> None:
    call = build(library, [3, 2], rng)
    arguments = {k: v for k, v in raw_plan_arguments(call).items() if not k.startswith("dtype")}
    library.module.get_mla_metadata_v1(**arguments)
    with pytest.raises(
        TypeError, match=r"q: got torch.float8_e4m3fn, expected torch.bfloat16, which the plan was made for"
    ):
        call.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 64}, "page_size: got 64, expected 1, all that is emulated"),
        ({"max_seqlen_qo": 2}, "max_seqlen_qo: got 2, expected 1"),
        ({"fast_mode": False}, "fast_mode: got False, expected True"),
        ({"kv_granularity": 24}, "kv_granularity: got 24, expected a power of two"),
        ({"topk": 0}, "topk: got 0, expected a whole number from 1 on"),
    ],
)
def test_what_is_not_emulated_is_refused(
    change: dict[str, Any], message: str, library: Library, rng: torch.Generator
) -> None:
    arguments = {**raw_plan_arguments(build(library, [3, 2], rng)), **change}
    with pytest.raises(ValueError, match=message):
        library.module.get_mla_metadata_v1(**arguments)


@pytest.mark.parametrize("name", ["seqlens_qo_indptr", "seqlens_kv_indptr", "kv_last_page_lens"])
def test_indices_of_another_width_are_refused(name: str, library: Library, rng: torch.Generator) -> None:
    arguments = raw_plan_arguments(build(library, [3, 2], rng))
    arguments[name] = arguments[name].long()
    with pytest.raises(TypeError, match=f"{name}: got torch.int64, expected torch.int32"):
        library.module.get_mla_metadata_v1(**arguments)


def test_the_emulation_says_so_wherever_it_is_named(library: Library, rng: torch.Generator) -> None:
    assert library.emulated
    assert "emulation" in library.name
    assert "Emulated" in type(library.module).__name__
    with pytest.raises(ValueError, match=NAME):
        library.module.get_mla_metadata_info_v1(1, 1, 12, FP8, FP8, True)
    with pytest.raises(AttributeError, match=r"emulation of .* has no aiter.topk_gating"):
        library.function("topk_gating")


def test_planned_keys_count_each_rows_share(library: Library, rng: torch.Generator) -> None:
    call = planned(library, rng, [64, 0, 40])
    assert planned_keys(call.plan, 3).tolist() == [64, 0, 40]
    assert planned_keys(call.plan, 1).tolist() == [64]


def test_its_signatures_are_the_contracts(library: Library) -> None:
    emulated = ["get_mla_metadata_info_v1", "get_mla_metadata_v1", "mla_decode_fwd"]
    assert contract.compare(library.module, emulated) == []


def test_no_compute_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="compute_units: got 0, expected at least 1"):
        emulated_library(compute_units=0)


def test_bf16_runs_without_scales(library: Library, rng: torch.Generator) -> None:
    call = build(library, [5, 64], rng)
    bf16 = torch.bfloat16
    shape = type(call.shape)(2, 16, 64, bf16, bf16)
    plan = adapters.allocate_plan(library, shape, torch.device("cpu"))
    a = {**call.arguments, "q": call.arguments["q"].to(bf16), "kv": call.arguments["kv"].to(bf16)}
    a |= {"q_scale": None, "kv_scale": None}
    fresh = Call(library, shape, plan, call.lists, a)
    fresh.fill()
    agrees(fresh, fresh.run())
