"""Ragged lists made on the device: the kernels against Python lists, the corners by name, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.kernels.sparse_mla import indices as kernels
from dsv4ref.kernels.sparse_mla.indices import fill_window, pack_entries, pack_slots, recent_lists
from dsv4ref.ref.indices import full_window_ref, pack_entries_ref, pack_slots_ref, recent_lists_ref, seen_ref

UNWRITTEN = 7777


def i32(values: Any, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_lists(indices: Tensor, indptr: Tensor, want: list[list[int]]) -> None:
    offsets = indptr.tolist()
    lengths = [0, *torch.tensor([len(row) for row in want]).cumsum(0).tolist()]
    wrong = [t for t, (a, b) in enumerate(zip(offsets, lengths, strict=True)) if a != b]
    assert not wrong, f"indptr[{wrong[0]}]: {offsets[wrong[0]]}, expected {lengths[wrong[0]]}"
    for t, row in enumerate(want):
        found = indices[offsets[t] : offsets[t + 1]].tolist()
        differ = [j for j, (a, b) in enumerate(zip(found, row, strict=True)) if a != b]
        assert not differ, f"row {t}, entry {differ[0]}: {found[differ[0]]}, expected {row[differ[0]]}"
    assert (indices[offsets[-1] :] == UNWRITTEN).all(), "something behind the last list was written"


def recent(positions: list[int], requests: list[int], table: list[list[int]], device: str, **numbers: Any) -> None:
    """Run the kernel and compare it with the reference."""
    rows = len(positions)
    indices = torch.full((rows * numbers["width"] + 3,), UNWRITTEN, dtype=torch.int32, device=device)
    indptr = torch.full((rows + 1,), UNWRITTEN, dtype=torch.int32, device=device)
    given = (i32(positions, device), i32(requests, device), i32(table, device))
    recent_lists(*given, **numbers, indices=indices, indptr=indptr)
    assert_lists(indices.cpu(), indptr.cpu(), recent_lists_ref(positions, requests, table, **numbers))


TABLE = [[5, 2, 9, 0], [1, 7, -1, 3], [4, 6, 8, 2**26 + 3]]


@pytest.mark.parametrize(
    ("ratio", "width", "block_size"), [(1, 128, 64), (1, 5, 3), (128, 2, 2), (4, 64, 64), (1, 300, 256)]
)
def test_recent_lists_at_the_edges_of_window_group_and_block(
    ratio: int, width: int, block_size: int, device: str
) -> None:
    positions = [-1, 0, 2, 3, 4, 62, 63, 64, 126, 127, 128, 129, 255, 256, 511]
    requests = [t % 3 for t in range(len(positions))]
    recent(positions, requests, TABLE, device, ratio=ratio, width=width, block_size=block_size, num_slots=640)


def test_several_query_tokens_of_a_request_have_lists_of_their_own(device: str) -> None:
    recent([126, 127, 128, 9, 10], [0, 0, 0, 2, 2], TABLE, device, ratio=1, width=128, block_size=64, num_slots=640)


def test_offsets_add_up_over_more_rows_than_a_program_adds_at_a_time(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SUM_ROWS", 4)
    positions = [t % 7 - 1 for t in range(19)]
    recent(positions, [0] * 19, TABLE, device, ratio=1, width=3, block_size=2, num_slots=20)


def test_what_has_no_slot_is_listed_as_minus_one(device: str) -> None:
    indices, indptr = i32([UNWRITTEN] * 40, device), i32([UNWRITTEN] * 5, device)
    positions, requests = i32([19, 3, 7, 15], device), i32([0, 3, -1, 1], device)
    table = i32([[0, 9, 1], [0, 2**30, 1]], device)  # request 0: block 9 is not in the cache; 3 and -1: no requests
    numbers: dict[str, Any] = {"ratio": 1, "width": 10, "block_size": 4, "num_slots": 12}
    recent_lists(positions, requests, table, **numbers, indices=indices, indptr=indptr)
    assert indptr.tolist() == [0, 10, 14, 22, 32]
    row = [indices[a:b].tolist() for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
    assert row[0] == [6, 7] + [-1] * 8, "entries 10, 11 in block 1, then behind the table"
    assert row[1] == [-1] * 4
    assert row[2] == [-1] * 8
    assert row[3] == [-1, -1, 4, 5, 6, 7, -1, -1, -1, -1], "2^30 * 4 is 0 in 32 bits, and a slot of somebody else"


# --- packing ---


def packed(entries: Tensor, positions: list[int], requests: list[int], table: list[list[int]], device: str) -> None:
    rows, topk = entries.shape
    numbers: dict[str, Any] = {"ratio": 4, "block_size": 3, "num_slots": 30}
    indices = torch.full((rows * topk + 2,), UNWRITTEN, dtype=torch.int32, device=device)
    indptr, counts = i32([UNWRITTEN] * (rows + 1), device), i32([UNWRITTEN] * rows, device)
    given = (entries.to(device), i32(positions, device), i32(requests, device), i32(table, device))
    pack_entries(*given, **numbers, counts=counts, indices=indices, indptr=indptr)
    want = pack_entries_ref(entries.tolist(), positions, requests, table, **numbers)
    assert_lists(indices.cpu(), indptr.cpu(), want)
    assert counts.tolist() == [len(row) for row in want]


@pytest.mark.parametrize(("rows", "topk"), [(1, 1), (5, 7), (3, 64), (9, 130)])
def test_entries_are_packed_in_order_wherever_the_holes_are(
    rows: int, topk: int, device: str, rng: torch.Generator
) -> None:
    entries = torch.randint(-4, 16, (rows, topk), generator=rng, dtype=torch.int32)
    positions = torch.randint(-1, 60, (rows,), generator=rng).tolist()
    packed(entries, positions, [t % 4 - 1 for t in range(rows)], TABLE, device)


def test_an_entry_that_the_row_may_not_see_is_dropped(device: str) -> None:
    for position in (-1, 0, 2, 3, 4, 7, 11):
        entries = i32([[0, 1, 2, -1, 1, 0]])
        packed(entries, [position], [0], TABLE, device)
        assert seen_ref(position, 4) == max(position + 1, 0) // 4


def test_rows_of_a_wider_buffer_are_packed(device: str) -> None:
    wide = torch.arange(24, dtype=torch.int32).view(3, 8) % 9
    packed(wide[:, 2:7], [40, 40, 40], [0, 1, 2], TABLE, device)


def test_slots_are_packed_up_to_their_length(device: str, rng: torch.Generator) -> None:
    slots = torch.randint(-3, 14, (6, 9), generator=rng, dtype=torch.int32)
    lengths = [9, 0, -2, 4, 30, 1]
    indices, indptr, counts = (i32([UNWRITTEN] * n, device) for n in (60, 7, 6))
    pack_slots(slots.to(device), i32(lengths, device), num_slots=10, counts=counts, indices=indices, indptr=indptr)
    assert_lists(indices.cpu(), indptr.cpu(), pack_slots_ref(slots.tolist(), lengths, 10))


# --- the identity fill ---


@pytest.mark.parametrize("topk", [1, 5, 256, 300])
def test_the_window_is_its_entries_in_order_and_minus_one_behind(topk: int, device: str) -> None:
    lengths = sorted({0, 1, topk - 1, topk})
    out = torch.full((len(lengths), topk + 4), UNWRITTEN, dtype=torch.int32, device=device)
    fill_window(i32(lengths, device), out[:, 2:-2])
    for length, row in zip(lengths, out.tolist(), strict=True):
        assert row == [UNWRITTEN] * 2 + full_window_ref(length, topk) + [UNWRITTEN] * 2, f"length {length}"


def test_no_window_holds_more_than_topk() -> None:
    with pytest.raises(ValueError, match="length: got 6, expected 0 to topk = 5"):
        full_window_ref(6, 5)


def test_no_rows_leave_one_offset(device: str) -> None:
    none, indptr = i32([], device), i32([UNWRITTEN], device)
    recent_lists(
        none, none, i32(TABLE, device), ratio=1, width=4, block_size=2, num_slots=9, indices=none, indptr=indptr
    )
    assert indptr.tolist() == [0]
    fill_window(none, none.view(0, 5))


# --- bad arguments ---


def recent_arguments() -> dict[str, Any]:
    return {"positions": i32([3, 4]), "requests": i32([0, 1]), "table": i32(TABLE), "ratio": 1, "width": 4,
            "block_size": 2, "num_slots": 20, "indices": i32([0] * 8), "indptr": i32([0] * 3)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "positions",
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            r"positions: got torch\.int64, expected torch\.int32",
        ),
        (
            "requests",
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            r"requests: got torch\.int64, expected torch\.int32",
        ),
        ("requests", i32([0]), ValueError, r"requests: got shape \[1\], expected \[2\]"),
        ("table", i32(TABLE)[:, ::2], ValueError, r"table: got strides \(4, 2\), expected a unit stride"),
        ("ratio", 0, ValueError, "ratio: got 0, expected an integer from 1 on"),
        ("indices", i32([0] * 7), ValueError, r"indices: got room for 7, expected at least 2 rows \* 4 = 8"),
        ("indptr", i32([0] * 2), ValueError, r"indptr: got shape \[2\], expected \[3\]"),
    ],
)
def test_a_wrong_argument_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recent_lists(**{**recent_arguments(), name: value})


def test_outputs_over_inputs_are_refused() -> None:
    given = recent_arguments()
    shared = i32([0] * 8)
    with pytest.raises(ValueError, match="indices: its memory range overlaps positions'"):
        recent_lists(**{**given, "indices": shared, "positions": shared[2:4]})
    with pytest.raises(ValueError, match="out: its memory range overlaps lengths'"):
        fill_window(shared[:2], shared[1:7].view(2, 3))


def test_rows_beyond_what_a_program_packs_are_refused() -> None:
    slots, lengths = torch.zeros((1, kernels.MAX_TOPK + 1), dtype=torch.int32), i32([4])
    with pytest.raises(ValueError, match=r"slots: got rows of 4097, expected 1 to 4096 entries"):
        pack_slots(slots, lengths, num_slots=4, counts=i32([0]), indices=slots[0].clone(), indptr=i32([0, 0]))
