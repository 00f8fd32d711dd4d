"""A plan reads every KV entry once and stays in its buffers at any lengths; its check finds every kind of damage."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.serving.plan import GRANULARITY, Plan, check_plan, empty_plan, kv_work, outside, plan_work_ref

LENGTHS = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 3000)), max_size=30)
UNITS = st.integers(1, 64)


def indptr(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def planned(lengths: list[int], units: int, spare: int = 0) -> Plan:
    return plan_work_ref(indptr(lengths), empty_plan(max(len(lengths), 1) + spare, units))


@settings(max_examples=150)
@given(LENGTHS, UNITS)
def test_every_kv_entry_is_read_exactly_once_by_its_own_token(lengths: list[int], units: int) -> None:
    plan, bounds = planned(lengths, units), indptr(lengths).tolist()
    reads = [0] * bounds[-1]
    for token, _, _, _, begin, end, _, _ in plan.work_info[: int(plan.work_indptr[-1])].tolist():
        assert bounds[token] <= begin <= end <= bounds[token + 1], (token, begin, end)
        for entry in range(begin, end):
            reads[entry] += 1
    wrong = [(entry, count) for entry, count in enumerate(reads) if count != 1]
    assert not wrong, f"entry {wrong[0][0]} is read {wrong[0][1]} times"
    assert kv_work(plan) == sum(lengths)


@settings(max_examples=150)
@given(LENGTHS, UNITS, st.integers(0, 5))
def test_a_plan_passes_its_own_check_and_fills_its_buffers(lengths: list[int], units: int, spare: int) -> None:
    plan = planned(lengths, units, spare)
    check_plan(plan, indptr(lengths))
    rows = int(plan.work_indptr[-1])
    assert (plan.work_info[rows:] == -1).all()
    assert (plan.work_info[:rows, 0] >= 0).all()
    assert plan.max_tokens == max(len(lengths), 1) + spare


@settings(max_examples=150)
@given(LENGTHS, UNITS)
def test_no_unit_has_more_than_an_equal_share(lengths: list[int], units: int) -> None:
    plan = planned(lengths, units)
    total = sum(max(-(-length // GRANULARITY), 1) for length in lengths)
    for unit in range(units):
        rows = plan.work_info[int(plan.work_indptr[unit]) : int(plan.work_indptr[unit + 1])]
        load = sum(max(-(-(end - begin) // GRANULARITY), 1) for begin, end in rows[:, 4:6].tolist())
        assert load <= -(-total // units), f"unit {unit}: {load} of {total} granules"


@given(LENGTHS, UNITS)
def test_lengths_can_be_read_off_a_plan(lengths: list[int], units: int) -> None:
    """So two plans are equal only where the lengths are: nothing but the lengths will do as a key without misses."""
    info = planned(lengths, units).work_info
    found = [0] * len(lengths)
    for token, _, _, _, begin, end, _, _ in info[info[:, 0] >= 0].tolist():
        found[token] += end - begin
    assert found == lengths


def test_two_tokens_on_two_units_by_hand() -> None:
    """48 and 16 entries: 3 granules and 1, shares of 2; the first token's third granule is the second unit's."""
    plan = planned([48, 16], 2)
    assert plan.work_indptr.tolist() == [0, 1, 3]
    assert plan.work_info.tolist() == [
        [0, 0, 0, 1, 0, 32, 16, 0],
        [0, 1, 0, 1, 32, 48, 0, 0],
        [1, -1, 1, 2, 48, 64, 0, 0],
    ]
    assert plan.reduce_indptr.tolist() == [0, 2, 2]
    assert plan.reduce_final_map.tolist() == [[0, 1], [-1, -1]]
    assert plan.reduce_partial_map.tolist() == [0, 1, -1, -1]


def test_a_token_without_entries_has_a_row_of_its_own() -> None:
    info = planned([0, 20, 0], 4).work_info
    assert [row[:2] + row[4:6] for row in info[info[:, 0] >= 0].tolist()] == [
        [0, -1, 0, 0],
        [1, 0, 0, 16],
        [1, 1, 16, 20],
        [2, -1, 20, 20],
    ]


# --- what the check finds ---


@given(LENGTHS.filter(lambda lengths: len(lengths) > 0), UNITS, st.data())
def test_a_plan_for_other_lengths_is_refused(lengths: list[int], units: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(lengths) - 1))
    other = [*lengths[:at], lengths[at] + data.draw(st.integers(1, 40)), *lengths[at + 1 :]]
    for ours, now in ((lengths, other), (other, lengths)):
        with pytest.raises(ValueError):
            check_plan(planned(ours, units), indptr(now))


def test_a_shorter_request_is_named_with_its_range() -> None:
    plan = planned([64, 64, 64], 3)
    now = indptr([64, 40, 64])
    assert outside(plan, now).tolist() == [1, 2]
    with pytest.raises(
        ValueError, match=r"work_info\[1\]: token 1 reads KV entries 64 to 128, expected within 64 to 104"
    ):
        check_plan(plan, now)


def test_a_token_that_is_gone_is_outside() -> None:
    assert outside(planned([16, 16], 2), indptr([16])).tolist() == [1]
    with pytest.raises(ValueError, match=r"token 1 reads .* expected within no such token"):
        check_plan(planned([16, 16], 2), indptr([16]))
    assert outside(planned([16], 2), indptr([])).tolist() == [0]


@pytest.mark.parametrize("buffer", [field.name for field in fields(Plan)])
def test_one_wrong_number_in_any_buffer_is_found(buffer: str) -> None:
    """Every element in use, one at a time; padding and what lies behind the used rows is nobody's business."""
    lengths = [100, 7, 80, 0, 33]  # two of them are split
    sound = planned(lengths, 3)
    splits = int((sound.reduce_final_map[:, 0] >= 0).sum())
    used = {
        "work_info": int(sound.work_indptr[-1]),
        "reduce_indptr": splits + 1,
        "reduce_final_map": splits,
        "reduce_partial_map": int(sound.reduce_indptr[-1]),
    }
    assert splits == 2
    for where in torch.ones_like(getattr(sound, buffer)).nonzero().tolist():
        if where[0] >= used.get(buffer, 99) or (buffer == "work_info" and where[1] == 7):
            continue
        plan = planned(lengths, 3)
        getattr(plan, buffer)[tuple(where)] += 1
        try:
            check_plan(plan, indptr(lengths))
        except ValueError:
            continue
        # Moving a boundary between units by a row is another plan for the same lengths, and a sound one.
        assert buffer == "work_indptr", f"{buffer}{where} may be anything"


@pytest.mark.parametrize(
    ("kv_indptr", "message"),
    [
        ([1, 2], r"kv_indptr: got \[1, 2\], expected one dimension that starts at 0"),
        ([], "expected one dimension that starts at 0"),
        ([0, 5, 3], "kv_indptr: falls by 2 at 1"),
        ([0, 1, 2, 3], "kv_indptr: got 3 tokens, expected at most 2"),
    ],
)
def test_lengths_that_are_none_are_refused(kv_indptr: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_work_ref(torch.tensor(kv_indptr, dtype=torch.int32), empty_plan(2, 2))
