"""Boundary checks: what passes, what is refused, and that the message names argument, arrival and expectation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4ref.kernels import checks
from dsv4ref.kernels.checks import (
    MAX_GRID_ROWS,
    byte_range,
    check_grid_rows,
    check_no_overlap,
    check_tensor,
    check_writable_rows,
    numbered_device,
)
from dsv4ref.kernels.sparse_mla import QueryRotation, merge_scopes, rotate_rows, sparse_mla_prefill

CPU = torch.device("cpu")


def test_a_fitting_tensor_is_returned_itself() -> None:
    x = torch.zeros(3, 4)
    assert check_tensor("x", x, dtype=torch.float32, shape=("T", 4), device=CPU, contiguous=True) is x
    assert check_tensor("x", x.T, dtype=torch.float32, shape=(4, "T")) is not None


@pytest.mark.parametrize(
    ("tensor", "wanted", "error", "message"),
    [
        (None, {}, TypeError, "x: got NoneType, expected a torch.Tensor"),
        ([1.0], {}, TypeError, "x: got list, expected a torch.Tensor"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), {}, TypeError, "x: got torch.bfloat16, expected torch.float32"),
        (torch.zeros(3, 5), {}, ValueError, "x: got shape [3, 5], expected [T, 4]"),
        (torch.zeros(3), {}, ValueError, "x: got shape [3], expected [T, 4]"),
        (torch.zeros(1, 3, 4), {}, ValueError, "x: got shape [1, 3, 4], expected [T, 4]"),
        (torch.zeros(3, 4, device="meta"), {"device": CPU}, ValueError, "x: on meta, expected cpu"),
        (torch.zeros(4, 3).T, {"contiguous": True}, ValueError, "x: got strides (1, 3), expected a contiguous tensor"),
    ],
)
def test_a_misfit_is_refused(tensor: Any, wanted: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_tensor("x", tensor, dtype=torch.float32, shape=("T", 4), **wanted)


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name, want in {"cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu", "meta": "meta"}.items():
        for device in (name, torch.device(name)):
            assert str(numbered_device(device)) == want, device


def test_a_kept_device_is_the_one_that_its_tensors_name(device: str) -> None:
    kept = numbered_device(device)
    assert check_tensor("x", torch.zeros(3, device=device), dtype=torch.float32, shape=(3,), device=kept) is not None


# --- writable rows ---------------------------------------------------------------------------------------------------

MEMORY = torch.zeros(4096)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3, 4), (4, 1)),
        ((3, 4), (7, 1)),
        ((3, 2, 4), (4, 12, 1)),  # transposed
        ((3, 2, 4), (64, 8, 1)),
        ((1, 4), (0, 1)),  # a stride nobody steps along
        ((3, 1), (5, 9)),  # a last dimension of one has no stride to speak of
        ((0, 4), (0, 0)),
    ],
)
def test_rows_with_memory_of_their_own_may_be_written(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    check_writable_rows("out", MEMORY.as_strided(shape, stride))


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((3, 4), (8, 2), "out: got strides (8, 2), expected a unit stride in the last dimension"),
        ((3, 4), (1, 3), "out: got strides (1, 3), expected a unit stride"),
        ((3, 4), (0, 1), "out: shape [3, 4] with strides (0, 1) overlaps itself"),
        ((3, 4), (3, 1), "out: shape [3, 4] with strides (3, 1) overlaps itself"),
        ((3, 2, 4), (4, 4, 1), "out: shape [3, 2, 4] with strides (4, 4, 1) overlaps itself"),
    ],
)
def test_rows_that_share_memory_may_not(shape: tuple[int, ...], stride: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_writable_rows("out", MEMORY.as_strided(shape, stride))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=3))
@settings(max_examples=200)
def test_whatever_passes_has_no_two_indices_at_one_address(dims: list[tuple[int, int]]) -> None:
    shape, stride = zip(*dims, strict=True)
    tensor = MEMORY.as_strided(shape, stride)
    try:
        check_writable_rows("out", tensor)
    except ValueError:
        return
    addresses = torch.arange(4096).as_strided(shape, stride).flatten().tolist()
    assert len(set(addresses)) == len(addresses), (shape, stride)


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_byte_ranges_reach_from_the_first_to_the_last_element() -> None:
    x = torch.zeros(100, dtype=torch.bfloat16)
    begin = x.data_ptr()
    assert byte_range(x) == (begin, begin + 200)
    assert byte_range(x[10:20]) == (begin + 20, begin + 40)
    assert byte_range(x.as_strided((3, 2), (10, 1), 5)) == (begin + 10, begin + 10 + 2 * 22)
    assert byte_range(x[5:5])[0] == byte_range(x[5:5])[1]


@pytest.mark.parametrize(("written", "other"), [((0, 10), (10, 20)), ((10, 20), (0, 10)), ((0, 0), (0, 20))])
def test_neighbours_in_one_buffer_do_not_overlap(written: tuple[int, int], other: tuple[int, int]) -> None:
    check_no_overlap("out", MEMORY[slice(*written)], "q", MEMORY[slice(*other)])


@pytest.mark.parametrize(
    ("written", "other", "shared"), [((0, 10), (9, 20), 4), ((5, 15), (0, 40), 40), ((0, 40), (5, 15), 40)]
)
def test_overlap_is_refused_in_bytes(written: tuple[int, int], other: tuple[int, int], shared: int) -> None:
    with pytest.raises(ValueError, match=rf"out: its memory range overlaps q's by {shared} bytes, expected separate"):
        check_no_overlap("out", MEMORY[slice(*written)], "q", MEMORY[slice(*other)])


def test_interleaved_views_are_refused_too() -> None:
    """They share no element, but telling that in general costs more than it is worth."""
    pairs = MEMORY.view(-1, 2)
    with pytest.raises(ValueError, match="out: its memory range overlaps q's"):
        check_no_overlap("out", pairs[:, 0], "q", pairs[:, 1])


def test_addresses_of_two_devices_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs may well use the same address; here both tensors claim to."""
    monkeypatch.setattr(checks, "byte_range", lambda tensor: (0, 100))
    check_no_overlap("out", MEMORY, "q", torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match="overlaps q's by 100 bytes"):
        check_no_overlap("out", MEMORY[:1], "q", MEMORY[1:])


def test_launchers_that_put_rows_on_a_grids_second_axis_refuse_more_than_it_has() -> None:
    """One more row than CUDA's limit, of one and the same memory: refused by name, before any other argument counts."""
    check_grid_rows("q", MAX_GRID_ROWS)
    rows = MAX_GRID_ROWS + 1
    q = torch.zeros((1, 1, 512), dtype=torch.bfloat16).expand(rows, 1, 512)
    one = torch.zeros((1, 512), dtype=torch.bfloat16)
    rotation = QueryRotation.of(torch.zeros(1, dtype=torch.int64), torch.ones(32), 1)
    with pytest.raises(ValueError, match="q: got 65536 rows, expected at most 65535 in one launch"):
        sparse_mla_prefill(q, one, torch.zeros((1, 1), dtype=torch.int32))
    with pytest.raises(ValueError, match="partials: got 65536 rows"):
        merge_scopes(q[None], torch.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match="x: got 65536 rows"):
        rotate_rows(torch.empty((rows, 1, 512), dtype=torch.bfloat16), rotation)
