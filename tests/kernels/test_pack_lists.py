"""Packing key lists and their running sum: the kernels against list comprehensions, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.kernels.aiter.lists import list_offsets, pack_lists

SLOTS = 100


def expected(indices: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    topk = indices.shape[1]
    kept = [[s for s in row[:n] if 0 <= s < SLOTS] for row, n in zip(indices.tolist(), lengths.tolist(), strict=True)]
    rows = [part + [-1] * (topk - len(part)) for part in kept]
    return torch.tensor(rows, dtype=torch.int32).view(-1, topk), torch.tensor([len(p) for p in kept], dtype=torch.int32)


def packed(indices: Tensor, lengths: Tensor, device: str) -> tuple[Tensor, Tensor]:
    out = torch.full(indices.shape, 7777, dtype=torch.int32, device=device)
    counts = torch.full(lengths.shape, 7777, dtype=torch.int32, device=device)
    pack_lists(indices.to(device), lengths.to(device), SLOTS, out=out, counts=counts)
    return out.cpu(), counts.cpu()


@pytest.mark.parametrize(("rows", "topk"), [(0, 8), (1, 1), (3, 5), (5, 64), (2, 128), (3, 130), (2, 1024)])
def test_valid_slots_come_first_and_in_order(rows: int, topk: int, device: str, rng: torch.Generator) -> None:
    indices = torch.randint(-20, SLOTS + 20, (rows, topk), generator=rng, dtype=torch.int32)
    lengths = torch.randint(0, topk + 3, (rows,), generator=rng, dtype=torch.int32)
    for found, want, name in zip(packed(indices, lengths, device), expected(indices, lengths), "oc", strict=True):
        wrong = (found != want).nonzero()
        assert not len(wrong), f"{name} at {wrong[0].tolist()}: {found[tuple(wrong[0])]}, {want[tuple(wrong[0])]}"


@pytest.mark.parametrize(
    ("row", "length", "want"),
    [
        ([3, -1, 5, 9], 4, [3, 5, 9, -1]),
        ([3, -1, 5, 9], 2, [3, -1, -1, -1]),
        ([3, 3, 3, 3], 4, [3, 3, 3, 3]),
        ([-1, -1, -1, -1], 4, [-1, -1, -1, -1]),
        ([3, 5, 9, 2], 0, [-1, -1, -1, -1]),
        ([99, 100, 2**31 - 1, -(2**31)], 4, [99, -1, -1, -1]),
        ([3, 5, 9, 2], 9, [3, 5, 9, 2]),
        ([3, 5, 9, 2], -1, [-1, -1, -1, -1]),
    ],
)
def test_holes_tails_duplicates_and_bounds(row: list[int], length: int, want: list[int], device: str) -> None:
    out, counts = packed(torch.tensor([row], dtype=torch.int32), torch.tensor([length], dtype=torch.int32), device)
    assert out[0].tolist() == want
    assert counts[0] == sum(slot >= 0 for slot in want)


def test_rows_may_be_strided(device: str) -> None:
    wide = torch.arange(24, dtype=torch.int32).view(3, 8)
    out, _ = packed(wide[:, 2:6], torch.full((3,), 4, dtype=torch.int32), device)
    assert out.tolist() == wide[:, 2:6].tolist()


def arguments() -> dict[str, Any]:
    return {"indices": torch.zeros(2, 4, dtype=torch.int32), "lengths": torch.zeros(2, dtype=torch.int32),
            "num_slots": SLOTS, "out": torch.zeros(2, 4, dtype=torch.int32),
            "counts": torch.zeros(2, dtype=torch.int32)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("indices", torch.zeros(2, 4), TypeError, "indices: got torch.float32, expected torch.int32"),
        ("indices", torch.zeros(2, 8, dtype=torch.int32)[:, ::2], ValueError, "indices: got strides"),
        ("lengths", torch.zeros(3, dtype=torch.int32), ValueError, r"lengths: got shape \[3\], expected \[2\]"),
        ("out", torch.zeros(2, 5, dtype=torch.int32), ValueError, r"out: got shape \[2, 5\], expected \[2, 4\]"),
        ("counts", torch.zeros(2, dtype=torch.int64), TypeError, "counts: got torch.int64"),
    ],
)
def test_a_wrong_argument_is_refused(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_lists(**{**arguments(), name: value})


def test_an_output_that_overlaps_is_refused() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="out: its memory range overlaps indices'"):
        pack_lists(**{**given, "out": given["indices"]})
    shared = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="counts: its memory range overlaps lengths'"):
        pack_lists(**{**given, "lengths": shared[1:3], "counts": shared[:2]})


# --- the running sum ---


@pytest.mark.parametrize("rows", [0, 1, 3, 1023, 1024, 1025, 2050])
def test_offsets_are_the_running_sum_and_empty_rows_are_marked(rows: int, device: str, rng: torch.Generator) -> None:
    counts = torch.randint(0, 3, (rows,), generator=rng, dtype=torch.int32)
    indptr = torch.full((rows + 1,), 7777, dtype=torch.int32, device=device)
    empty = torch.ones(rows, dtype=torch.bool, device=device)
    list_offsets(counts.to(device), indptr=indptr, empty=empty)
    want = [0, *counts.cumsum(0).tolist()]
    wrong = [i for i, (a, b) in enumerate(zip(indptr.tolist(), want, strict=True)) if a != b]
    assert not wrong, f"offset {wrong[0]}: {indptr[wrong[0]]}, expected {want[wrong[0]]}"
    assert torch.equal(empty.cpu(), counts == 0)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("counts", torch.zeros(2, dtype=torch.int64), TypeError, r"counts: got torch\.int64, expected torch\.int32"),
        ("indptr", torch.zeros(2, dtype=torch.int32), ValueError, r"indptr: got shape \[2\], expected \[3\]"),
        ("empty", torch.zeros(2, dtype=torch.uint8), TypeError, r"empty: got torch\.uint8, expected torch\.bool"),
    ],
)
def test_a_wrong_argument_of_the_sum_is_refused(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"counts": torch.zeros(2, dtype=torch.int32), "indptr": torch.zeros(3, dtype=torch.int32),
                             "empty": torch.zeros(2, dtype=torch.bool)}  # fmt: skip
    with pytest.raises(error, match=message):
        list_offsets(**{**given, name: value})


def test_offsets_over_their_counts_are_refused() -> None:
    shared = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="indptr: its memory range overlaps counts'"):
        list_offsets(shared[:2], indptr=shared, empty=torch.zeros(2, dtype=torch.bool))
