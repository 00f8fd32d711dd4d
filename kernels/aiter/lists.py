"""Key lists as the persistent decode wants them: valid slots first, -1 behind, and how many there are.

A plan knows a list by its length, so an invalid slot *inside* it is read as a slot. Counting the valid entries and
leaving them where they are, as ROCm/vllm#900 does, therefore reads a hole and drops as many entries from the end. Here
one launch packs every row::

    valid[j] = j < length and 0 <= slot[j] < slots
    place[j] = number of valid entries before j
    out[place[j]] = slot[j];  out[count:] = -1

and one more makes the running sum of the counts, by one program: a batch is small, and a library's scan would take
several launches and temporary memory. Order and duplicates are kept.

Reference: `dsv4ref.ref.sparse_attention.row_slots`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels.checks import check_no_overlap, check_tensor

__all__ = ["list_offsets", "pack_lists"]

_OFFSETS_BLOCK = 1024


@triton.jit
def _pack_lists_kernel(indices, lengths, out, counts, num_slots, topk, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    in_row = lanes < topk
    slots = tl.load(indices + row * row_stride + lanes, mask=in_row, other=-1)
    valid = in_row & (lanes < tl.load(lengths + row)) & (slots >= 0) & (slots < num_slots)
    kept = valid.to(tl.int32)
    place = tl.cumsum(kept, axis=0) - kept
    count = tl.sum(kept, axis=0)
    # The two stores share no address: packed entries lie below count, the tail from count on.
    tl.store(out + row * topk + place, slots, mask=valid)
    tl.store(out + row * topk + lanes, tl.full((BLOCK,), -1, tl.int32), mask=in_row & (lanes >= count))
    tl.store(counts + row, count)


@triton.jit
def _list_offsets_kernel(counts, indptr, empty, rows, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    carry = 0
    tl.store(indptr, 0)
    for first in range(0, rows, BLOCK):
        at = first + lanes
        length = tl.load(counts + at, mask=at < rows, other=0)
        tl.store(indptr + 1 + at, carry + tl.cumsum(length, axis=0), mask=at < rows)
        tl.store(empty + at, (length == 0).to(tl.uint8), mask=at < rows)
        carry += tl.sum(length, axis=0)


def pack_lists(indices: Tensor, lengths: Tensor, num_slots: int, *, out: Tensor, counts: Tensor) -> None:
    """Pack the valid slots of every row to its front, in one launch and in place.

    Args:
        indices: int32 ``[T, topk]``, unit last stride: slots, invalid where negative or from ``num_slots`` on.
        lengths: int32 ``[T]``: entries from here on are not part of the row's list, whatever they hold.
        num_slots: slots of the cache.
        out: int32 ``[T, topk]`` contiguous, written whole.
        counts: int32 ``[T]`` contiguous, written.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; an output that overlaps an input.
    """
    check_tensor("indices", indices, dtype=torch.int32, shape=("T", "topk"))
    rows, topk = indices.shape
    if topk > 1 and indices.stride(1) != 1:
        raise ValueError(f"indices: got strides {indices.stride()}, expected a unit stride in the last dimension")
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(rows,), device=indices.device, contiguous=True)
    check_tensor("out", out, dtype=torch.int32, shape=(rows, topk), device=indices.device, contiguous=True)
    check_tensor("counts", counts, dtype=torch.int32, shape=(rows,), device=indices.device, contiguous=True)
    for name, written in (("out", out), ("counts", counts)):
        check_no_overlap(name, written, "indices", indices)
        check_no_overlap(name, written, "lengths", lengths)
    check_no_overlap("out", out, "counts", counts)
    if rows:
        block = triton.next_power_of_2(max(topk, 1))
        _pack_lists_kernel[(rows,)](indices, lengths, out, counts, num_slots, topk, indices.stride(0), BLOCK=block)


def list_offsets(counts: Tensor, *, indptr: Tensor, empty: Tensor) -> None:
    """Running sum of list lengths and the mask of empty lists, in one launch and in place.

    Args:
        counts: int32 ``[T]`` contiguous.
        indptr: int32 ``[T + 1]`` contiguous, written whole: element 0 is 0.
        empty: bool ``[T]`` contiguous, written: True where a count is 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; an output that overlaps the counts.
    """
    check_tensor("counts", counts, dtype=torch.int32, shape=("T",), contiguous=True)
    rows = counts.shape[0]
    check_tensor("indptr", indptr, dtype=torch.int32, shape=(rows + 1,), device=counts.device, contiguous=True)
    check_tensor("empty", empty, dtype=torch.bool, shape=(rows,), device=counts.device, contiguous=True)
    check_no_overlap("indptr", indptr, "counts", counts)
    check_no_overlap("empty", empty, "counts", counts)
    check_no_overlap("empty", empty, "indptr", indptr)
    block = min(triton.next_power_of_2(max(rows, 1)), _OFFSETS_BLOCK)
    _list_offsets_kernel[(1,)](counts, indptr, empty.view(torch.uint8), rows, BLOCK=block)
