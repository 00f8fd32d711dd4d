"""The planning kernel writes every element that its reference writes, and refuses buffers that do not fit."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels import mode
from dsv4ref.kernels.work_plan import MAX_BLOCK, Plan, empty_plan, plan_work
from dsv4ref.serving.plan import plan_work_ref

DEVICE = "cuda" if mode() == "compiled" else "cpu"


def indptr(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def differences(got: Plan, want: Plan) -> list[str]:
    """The first differing element of every buffer, with both values."""
    found = []
    for field in fields(Plan):
        ours, theirs = getattr(got, field.name).cpu(), getattr(want, field.name)
        if not torch.equal(ours, theirs):
            where = tuple((ours != theirs).nonzero()[0].tolist())
            found.append(f"{field.name}{list(where)}: {int(ours[where])}, expected {int(theirs[where])}")
    return found


def agree(lengths: list[int], units: int, spare: int = 0) -> list[str]:
    most = max(len(lengths), 1) + spare
    mine = plan_work(indptr(lengths).to(DEVICE), empty_plan(most, units, DEVICE))
    return differences(mine, plan_work_ref(indptr(lengths), empty_plan(most, units)))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 40), st.integers(0, 3))
def test_the_kernel_writes_the_references_plan(lengths: list[int], units: int, spare: int) -> None:
    assert agree(lengths, units, spare) == []


@pytest.mark.parametrize(
    ("lengths", "units"),
    [
        ([], 4),
        ([2048], 256),
        ([2048] * 64, 304),
        ([1] * (MAX_BLOCK + 1), 7),
        ([300, 0, 5] * 500, 132),
        ([0] * 5, 3),
        ([10_000], 1),
    ],
    ids=["empty", "one row", "decode", "a second block", "several blocks", "nothing to read", "one unit"],
)
def test_shapes_at_the_edges(lengths: list[int], units: int) -> None:
    assert agree(lengths, units) == []


def test_a_smaller_plan_leaves_nothing_of_a_larger_one() -> None:
    plan = empty_plan(40, 8, DEVICE)
    plan_work(indptr([500] * 40).to(DEVICE), plan)
    plan_work(indptr([20, 3]).to(DEVICE), plan)
    assert differences(plan, plan_work_ref(indptr([20, 3]), empty_plan(40, 8))) == []


def test_a_plan_is_one_launch() -> None:
    lengths, plan = indptr([100] * 5).to(DEVICE), empty_plan(5, 4, DEVICE)
    assert count_launches(lambda: plan_work(lengths, plan)).total == 1


@pytest.mark.parametrize(
    ("kv_indptr", "plan", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), empty_plan(2, 2), "kv_indptr: got torch.int64, expected torch.int32"),
        (torch.zeros(0, dtype=torch.int32), empty_plan(2, 2), "kv_indptr: got -1 tokens, expected 0 to 2"),
        (torch.zeros(4, dtype=torch.int32), empty_plan(2, 2), "kv_indptr: got 3 tokens, expected 0 to 2"),
        (torch.zeros(6, dtype=torch.int32)[::2], empty_plan(2, 2), "kv_indptr: got strides"),
        (torch.zeros(3, dtype=torch.int32), "plan", "plan: got str, expected a Plan"),
        (
            torch.zeros(3, dtype=torch.int32),
            replace(empty_plan(2, 2), reduce_final_map=torch.zeros(2, dtype=torch.int32)),
            r"plan.reduce_final_map: got shape \[2\], expected \[2, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(kv_indptr: Tensor, plan: Plan, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        plan_work(kv_indptr, plan)


@pytest.mark.parametrize(("tokens", "units", "name"), [(0, 4, "max_tokens"), (4, 0, "compute_units")])
def test_empty_plans_have_room_for_something(tokens: int, units: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        empty_plan(tokens, units)
