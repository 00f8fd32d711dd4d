"""The ragged lists that a sparse decode reads, made on the device from positions, block tables and top-k entries.

Scopes differ in which of their entries a query row at position p lists, and not in how an entry becomes a slot::

    seen  = (p + 1) // ratio                           entries that the row may see: 1 for SWA, 4 and 128 compressed
    SWA, C128   the last `width` of them, in order     recent_lists, one launch
    C4          those that top-k chose, -1 dropped     pack_entries, two launches
    slot  = table[request, entry // block_size] * block_size + entry % block_size

Captured graphs replay these launches for any step of a batch size, so nothing here depends on a number that the host
would have to read: grids come from upper bounds, outputs are the caller's, and a row's place in the list is the sum of
the lengths before it, which every program takes itself. That is one load per 1024 rows, and no running sum as a launch
of its own. A padded row has position -1, hence no entries.

What cannot be a slot becomes -1, which the decode kernels skip: an entry behind the block table, a block that is not
allocated, a request that does not exist. Products are taken in 64 bits, so that a block id of garbage cannot wrap into
a slot that somebody owns (H26).

Reference: `dsv4ref.ref.indices`. Source: vLLM's ragged decode buffers for DeepSeek-V4 on ROCm (which lists), whose
packer copies a prefix of each row where `pack_entries` compacts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, int32

from dsv4ref.kernels.checks import check_no_overlap, check_tensor

__all__ = ["MAX_TOPK", "fill_window", "pack_entries", "pack_slots", "recent_lists"]

MAX_TOPK = 4096
"""Entries of a row that one program packs at most."""

LANES = 256
"""Entries of a row that one program of `recent_lists` and `fill_window` writes at most."""

SUM_ROWS = 1024
"""Rows whose lengths a program adds up at a time."""


# --- kernels ---


@triton.jit
def _seen(position, ratio):
    # reference: seen = (position + 1) // ratio; a padded row's -1 gives 0
    return (tl.maximum(position, -1) + 1) // ratio


@triton.jit
def _slot_of(table, request, entry, listed, requests, blocks, table_stride, slots, BLOCK_SIZE: tl.constexpr):
    # reference: slot_ref
    at = entry // BLOCK_SIZE
    known = listed & (entry >= 0) & (at < blocks) & (request >= 0) & (request < requests)
    block = tl.load(table + request.to(tl.int64) * table_stride + at, mask=known, other=-1)
    slot = block.to(tl.int64) * BLOCK_SIZE + entry % BLOCK_SIZE
    return tl.where(known & (block >= 0) & (slot < slots), slot, -1).to(tl.int32)


@triton.jit
def _recent_before(positions, row, ratio, width, ROWS: tl.constexpr):
    """Entries that the rows before this one list."""
    total = 0
    for begin in range(0, row, ROWS):
        lanes = begin + tl.arange(0, ROWS)
        position = tl.load(positions + lanes, mask=lanes < row, other=-1)
        total += tl.sum(tl.minimum(_seen(position, ratio), width), axis=0)
    return total


@triton.jit
def _recent_lists_kernel(
    positions,
    requests,
    table,
    indices,
    indptr,
    num_requests,
    blocks,
    table_stride,
    slots,
    ratio,
    width,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per row and LANES of its entries."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * LANES
    seen = _seen(tl.load(positions + row), ratio)
    # reference: entries = range(seen - min(seen, width), seen)
    length = tl.minimum(seen, width)
    if (begin == 0) | (begin < length):
        before = _recent_before(positions, row, ratio, width, ROWS)
        lanes = begin + tl.arange(0, LANES)
        entry = seen - length + lanes
        request = tl.load(requests + row)
        slot = _slot_of(table, request, entry, lanes < length, num_requests, blocks, table_stride, slots, BLOCK_SIZE)
        tl.store(indices + before + lanes, slot, mask=lanes < length)
        if begin == 0:
            tl.store(indptr + row + 1, before + length)
            tl.store(indptr, 0, mask=row == 0)


@triton.jit
def _listed_slots(
    dense,
    limits,
    requests,
    table,
    row,
    dense_stride,
    topk,
    num_requests,
    blocks,
    table_stride,
    slots,
    ratio,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slots of one row of top-k entries, or of slots if BLOCK_SIZE is 0; -1 where there is none."""
    lanes = tl.arange(0, BLOCK)
    value = tl.load(dense + row.to(tl.int64) * dense_stride + lanes, mask=lanes < topk, other=-1)
    limit = tl.load(limits + row)
    if BLOCK_SIZE == 0:
        return tl.where((lanes < limit) & (value >= 0) & (value < slots), value, -1)
    # reference: an entry counts if 0 <= entry < seen; that excludes the future, and everything in a padded row
    listed = (value >= 0) & (value < _seen(limit, ratio))
    request = tl.load(requests + row)
    return _slot_of(table, request, value, listed, num_requests, blocks, table_stride, slots, BLOCK_SIZE)


@triton.jit
def _count_listed_kernel(
    dense,
    limits,
    requests,
    table,
    counts,
    dense_stride,
    topk,
    num_requests,
    blocks,
    table_stride,
    slots,
    ratio,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = _listed_slots(
        dense, limits, requests, table, row, dense_stride, topk, num_requests, blocks, table_stride, slots, ratio,
        BLOCK_SIZE, BLOCK,
    )  # fmt: skip
    tl.store(counts + row, tl.sum((slot >= 0).to(tl.int32), axis=0))


@triton.jit
def _pack_listed_kernel(
    dense,
    limits,
    requests,
    table,
    counts,
    indices,
    indptr,
    dense_stride,
    topk,
    num_requests,
    blocks,
    table_stride,
    slots,
    ratio,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0)
    before = 0
    for begin in range(0, row, ROWS):
        lanes = begin + tl.arange(0, ROWS)
        before += tl.sum(tl.load(counts + lanes, mask=lanes < row, other=0), axis=0)
    slot = _listed_slots(
        dense, limits, requests, table, row, dense_stride, topk, num_requests, blocks, table_stride, slots, ratio,
        BLOCK_SIZE, BLOCK,
    )  # fmt: skip
    # reference: [slot for slot in row if slot >= 0]; the place of a slot is the number of slots before it
    kept = (slot >= 0).to(tl.int32)
    place = before + tl.cumsum(kept, axis=0) - kept
    tl.store(indices + place, slot, mask=slot >= 0)
    tl.store(indptr + row + 1, before + tl.sum(kept, axis=0))
    tl.store(indptr, 0, mask=row == 0)


@triton.jit
def _fill_window_kernel(lengths, out, topk, out_stride, LANES: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    # reference: [*range(length), *[-1] * (topk - length)]
    entry = tl.where(lanes < tl.load(lengths + row), lanes, -1)
    tl.store(out + row.to(tl.int64) * out_stride + lanes, entry, mask=lanes < topk)


# --- launchers ---


def recent_lists(
    positions: Tensor,
    requests: Tensor,
    table: Tensor,
    *,
    ratio: int,
    width: int,
    block_size: int,
    num_slots: int,
    indices: Tensor,
    indptr: Tensor,
) -> None:
    """List the last ``width`` entries that each row may see, as slots: SWA (ratio 1) and C128, in one launch.

    Args:
        positions: int32 ``[T]`` contiguous, -1 for a padded row.
        requests: int32 ``[T]`` contiguous, the row of ``table``; several rows may share one (speculative tokens).
        table: int32 ``[R, B]``, unit last stride: block ids of the scope's cache, -1 where none is allocated.
        ratio: tokens per entry.
        width: entries per row at most. For C128 at least ``(longest position + 1) // 128``, or the oldest are dropped.
        block_size: entries per block of the cache.
        num_slots: slots of the cache.
        indices: int32 ``[capacity]`` contiguous with capacity >= T * width, written up to ``indptr[T]``.
        indptr: int32 ``[T + 1]`` contiguous, written whole.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; a number below 1; an output that overlaps an input.
    """
    rows = _check_rows(positions, requests, table)
    _check_numbers(ratio=ratio, width=width, block_size=block_size, num_slots=num_slots)
    _check_lists(indices, indptr, rows, width, positions)
    _check_apart({"indices": indices, "indptr": indptr}, {"positions": positions, "requests": requests, "table": table})
    if not rows:
        indptr.zero_()
        return
    lanes = min(LANES, triton.next_power_of_2(width))
    _recent_lists_kernel[(rows, triton.cdiv(width, lanes))](
        positions, requests, table, indices, indptr, *table.shape, table.stride(0), num_slots, ratio, width,
        BLOCK_SIZE=block_size, LANES=lanes, ROWS=_sum_rows(rows), num_warps=4,
    )  # fmt: skip


def pack_entries(
    entries: Tensor,
    positions: Tensor,
    requests: Tensor,
    table: Tensor,
    *,
    ratio: int,
    block_size: int,
    num_slots: int,
    counts: Tensor,
    indices: Tensor,
    indptr: Tensor,
) -> None:
    """Turn dense rows of entry numbers into ragged lists of slots, without those that are none, in two launches.

    Kept is what the row may see and has a slot, wherever it stands in the row; order and duplicates stay.

    Args:
        entries: int32 ``[T, topk]``, unit last stride: entry numbers within a request, -1 for none.
        positions, requests, table, ratio, block_size, num_slots, indptr: as in `recent_lists`.
        counts: int32 ``[T]`` contiguous, written.
        indices: int32 ``[capacity]`` contiguous with capacity >= T * topk, written up to ``indptr[T]``.

    Raises:
        TypeError, ValueError: as `recent_lists`; more than `MAX_TOPK` entries per row.
    """
    rows = _check_rows(positions, requests, table)
    _check_numbers(ratio=ratio, block_size=block_size, num_slots=num_slots)
    inputs = {"positions": positions, "requests": requests, "table": table}
    numbers = (*table.shape, table.stride(0), num_slots, ratio)
    _pack("entries", entries, positions, inputs, rows, numbers, block_size, counts, indices, indptr)


def pack_slots(
    slots: Tensor, lengths: Tensor, *, num_slots: int, counts: Tensor, indices: Tensor, indptr: Tensor
) -> None:
    """Turn dense rows of slots into ragged lists, without those that are none, in two launches.

    Args:
        slots: int32 ``[T, topk]``, unit last stride; none where negative or from ``num_slots`` on.
        lengths: int32 ``[T]`` contiguous: lanes from here on are not part of a row, whatever they hold.
        num_slots, counts, indices, indptr: as in `pack_entries`.

    Raises:
        TypeError, ValueError: as `pack_entries`.
    """
    check_tensor("lengths", lengths, dtype=int32, shape=("T",), contiguous=True)
    _check_numbers(num_slots=num_slots)
    numbers = (0, 0, 0, num_slots, 1)
    _pack("slots", slots, lengths, {"lengths": lengths}, lengths.shape[0], numbers, 0, counts, indices, indptr)


def _pack(
    name: str,
    dense: Tensor,
    limits: Tensor,
    inputs: dict[str, Tensor],
    rows: int,
    numbers: tuple[int, ...],
    block_size: int,
    counts: Tensor,
    indices: Tensor,
    indptr: Tensor,
) -> None:
    check_tensor(name, dense, dtype=int32, shape=(rows, "topk"), device=limits.device)
    _check_unit_stride(name, dense)
    topk = dense.shape[1]
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"{name}: got rows of {topk}, expected 1 to {MAX_TOPK} entries")
    check_tensor("counts", counts, dtype=int32, shape=(rows,), device=limits.device, contiguous=True)
    _check_lists(indices, indptr, rows, topk, limits)
    _check_apart({"counts": counts, "indices": indices, "indptr": indptr}, {name: dense, **inputs})
    if not rows:
        indptr.zero_()
        return
    # Without a block table its two pointers are never followed; they must point somewhere all the same.
    where = (inputs.get("requests", limits), inputs.get("table", dense))
    block = triton.next_power_of_2(topk)
    args = (dense.stride(0), topk, *numbers)
    _count_listed_kernel[(rows,)](dense, limits, *where, counts, *args, BLOCK_SIZE=block_size, BLOCK=block, num_warps=4)
    _pack_listed_kernel[(rows,)](
        dense, limits, *where, counts, indices, indptr, *args,
        BLOCK_SIZE=block_size, BLOCK=block, ROWS=_sum_rows(rows), num_warps=4,
    )  # fmt: skip


def fill_window(lengths: Tensor, out: Tensor) -> None:
    """What top-k gives while it drops nothing: each row's entries ``0..length - 1``, then -1, in one launch.

    Args:
        lengths: int32 ``[T]`` contiguous, entries that each row may see. Where one exceeds topk, the row gets its first
            topk entries, which is *not* its top-k: the caller knows better or asks `dsv4ref.kernels.sparse_mla.topk`.
        out: int32 ``[T, topk]``, unit last stride, written whole.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; ``out`` overlaps ``lengths``.
    """
    check_tensor("lengths", lengths, dtype=int32, shape=("T",), contiguous=True)
    check_tensor("out", out, dtype=int32, shape=(lengths.shape[0], "topk"), device=lengths.device)
    _check_unit_stride("out", out)
    _check_apart({"out": out}, {"lengths": lengths})
    rows, topk = out.shape
    if rows and topk:
        lanes = min(LANES, triton.next_power_of_2(topk))
        _fill_window_kernel[(rows, triton.cdiv(topk, lanes))](
            lengths, out, topk, out.stride(0), LANES=lanes, num_warps=4
        )


# --- checks ---


def _check_rows(positions: Tensor, requests: Tensor, table: Tensor) -> int:
    check_tensor("positions", positions, dtype=int32, shape=("T",), contiguous=True)
    rows, where = positions.shape[0], positions.device
    check_tensor("requests", requests, dtype=int32, shape=(rows,), device=where, contiguous=True)
    check_tensor("table", table, dtype=int32, shape=("R", "B"), device=where)
    _check_unit_stride("table", table)
    return rows


def _check_unit_stride(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a unit stride in the last dimension")


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected an integer from 1 on")


def _check_lists(indices: Tensor, indptr: Tensor, rows: int, width: int, like: Tensor) -> None:
    check_tensor("indices", indices, dtype=int32, shape=("capacity",), device=like.device, contiguous=True)
    check_tensor("indptr", indptr, dtype=int32, shape=(rows + 1,), device=like.device, contiguous=True)
    if not rows * width <= indices.numel() < 2**31:
        raise ValueError(
            f"indices: got room for {indices.numel()}, expected at least {rows} rows * {width} = {rows * width}, which "
            "int32 offsets must hold"
        )


def _check_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    names = list(written)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            check_no_overlap(name, written[name], other, written[other])
        for other, tensor in read.items():
            check_no_overlap(name, written[name], other, tensor)


def _sum_rows(rows: int) -> int:
    return int(min(SUM_ROWS, triton.next_power_of_2(rows)))
