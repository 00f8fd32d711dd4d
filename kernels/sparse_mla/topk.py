"""Index logits over paged keys, and the entries of highest logit: what the indexer of a C4 layer costs, and its choice.

    logit[t, j] = sum_h w[t, h] relu(q[t, h] . k_j)        j < length[t]; -inf behind
    choice[t]   = the topk entries of highest logit; all of them, in order, while length[t] <= topk

Three launches: logits, torch's top-k, and the conversion of its answer to int32 entries with -1 behind. A row that sees
at most topk entries needs none of that, and `select` can leave it to the device to notice (`skip_full`): the row's
logits are not computed, and its choice is written as `fill_window` writes it. torch's top-k runs all the same, over
whatever the logits hold there.

An entry whose block is not allocated has no logit and is not chosen; a row that is not scored lists it, and packing
drops it.

Keys are bf16, as DeepSeek's own inference code keeps them after its simulated quantisation; products are accumulated in
fp32. Ties at the k-th logit are torch's: any of the equal entries may be chosen.

Reference: `dsv4ref.ref.indexer`, ``index_scores_ref`` and ``select_ref``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels.checks import check_no_overlap, check_tensor

__all__ = ["KEY_TILE", "TopkScratch", "index_logits", "select"]

KEY_TILE = 64
"""Entries that one program scores."""

_FINISH_LANES = 1024
_NEVER = -1


@dataclass(frozen=True)
class TopkScratch:
    """What `select` writes on the way; kept by the caller, so that a graph may hold its addresses.

    Args:
        logits: fp32 ``[T, columns]``.
        values: fp32 ``[T, k]``, k = min(topk, columns).
        chosen: int64 ``[T, k]``, which is what torch's top-k gives.
    """

    logits: Tensor
    values: Tensor
    chosen: Tensor

    @staticmethod
    def allocate(rows: int, columns: int, topk: int, device: torch.device | str = "cpu") -> TopkScratch:
        """Scratch for up to ``columns`` entries per row.

        Raises:
            ValueError: a negative number of rows, or a width below 1.
        """
        for name, value, least in (("rows", rows, 0), ("columns", columns, 1), ("topk", topk, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        k = min(topk, columns)
        return TopkScratch(
            logits=torch.empty((rows, columns), dtype=torch.float32, device=device),
            values=torch.empty((rows, k), dtype=torch.float32, device=device),
            chosen=torch.empty((rows, k), dtype=torch.int64, device=device),
        )


@triton.jit
def _index_logits_kernel(
    q,
    weights,
    keys,
    table,
    requests,
    lengths,
    logits,
    num_requests,
    blocks,
    table_stride,
    key_blocks,
    key_stride,
    columns,
    skip_up_to,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per row and BLOCK_N of its entries."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.load(lengths + row)
    if length <= skip_up_to:
        return
    request = tl.load(requests + row)
    at = entry // BLOCK_SIZE
    seen = (entry < length) & (at < blocks) & (request >= 0) & (request < num_requests)
    score = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if tl.program_id(1) * BLOCK_N < length:
        block = tl.load(table + request.to(tl.int64) * table_stride + at, mask=seen, other=-1)
        seen = seen & (block >= 0) & (block < key_blocks)
        heads = tl.arange(0, HEADS)
        dims = tl.arange(0, DIM)
        query = tl.load(q + (row * HEADS + heads[:, None]) * DIM + dims[None, :])  # [HEADS, DIM]
        # int64 before the product: a block's number times its stride passes 2^31 in caches of a few GB (H26).
        key_at = block.to(tl.int64) * key_stride + (entry % BLOCK_SIZE) * DIM
        key = tl.load(keys + key_at[None, :] + dims[:, None], mask=seen[None, :], other=0.0)  # [DIM, BLOCK_N]
        # reference: head_weights @ relu(q @ keys.T)
        dots = tl.maximum(tl.dot(query, key), 0.0)
        weight = tl.load(weights + row * HEADS + heads)
        score = tl.where(seen, tl.sum(weight[:, None] * dots, axis=0), float("-inf"))
    tl.store(logits + row * columns + entry, score, mask=entry < columns)


@triton.jit
def _finish_choice_kernel(lengths, values, chosen, out, k, topk, out_stride, skip_up_to, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    length = tl.load(lengths + row)
    value = tl.load(values + row * k + lanes, mask=lanes < k, other=float("-inf"))
    entry = tl.load(chosen + row * k + lanes, mask=lanes < k, other=-1).to(tl.int32)
    # An entry whose logit is -inf is none: the row has fewer than k, or the cache has no such block.
    entry = tl.where(value > float("-inf"), entry, -1)
    if length <= skip_up_to:
        entry = tl.where(lanes < length, lanes, -1)
    tl.store(out + row * out_stride + lanes, entry, mask=lanes < topk)


def index_logits(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    *,
    logits: Tensor,
    skip_up_to: int = _NEVER,
) -> None:
    """Logits of every entry that a row may see, in one launch.

    Args:
        q: bf16 ``[T, Hi, di]`` contiguous, as quantised; Hi and di powers of two, at least 16.
        weights: fp32 ``[T, Hi]`` contiguous, scales folded in.
        keys: bf16 ``[blocks, block_size, di]``, contiguous within a block.
        table: int32 ``[R, B]``, unit last stride: block ids.
        requests: int32 ``[T]`` contiguous, rows of ``table``.
        lengths: int32 ``[T]`` contiguous, entries that each row may see; one length per *row*, also where several
            rows belong to one request.
        logits: fp32 ``[T, columns]`` contiguous, written: -inf behind a row's length and where there is no block.
        skip_up_to: rows of at most so many entries are left as they are; none by default.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; the output overlaps an input.
    """
    check_tensor("q", q, dtype=torch.bfloat16, shape=("T", "Hi", "di"), contiguous=True)
    rows, heads, dim = q.shape
    for name, size in (("Hi", heads), ("di", dim)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"q: got {name} = {size}, expected a power of two from 16 on")
    where = q.device
    check_tensor("weights", weights, dtype=torch.float32, shape=(rows, heads), device=where, contiguous=True)
    check_tensor("keys", keys, dtype=torch.bfloat16, shape=("blocks", "block_size", dim), device=where)
    if keys.stride()[1:] != (dim, 1):
        raise ValueError(f"keys: got strides {keys.stride()}, expected blocks of contiguous entries, (any, {dim}, 1)")
    check_tensor("table", table, dtype=torch.int32, shape=("R", "B"), device=where)
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(f"table: got strides {table.stride()}, expected a unit stride in the last dimension")
    check_tensor("requests", requests, dtype=torch.int32, shape=(rows,), device=where, contiguous=True)
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(rows,), device=where, contiguous=True)
    check_tensor("logits", logits, dtype=torch.float32, shape=(rows, "columns"), device=where, contiguous=True)
    for name, tensor in (("q", q), ("weights", weights), ("keys", keys), ("lengths", lengths)):
        check_no_overlap("logits", logits, name, tensor)
    columns = logits.shape[1]
    if rows and columns:
        _index_logits_kernel[(rows, triton.cdiv(columns, KEY_TILE))](
            q, weights, keys, table, requests, lengths, logits, *table.shape, table.stride(0), keys.shape[0],
            keys.stride(0), columns, skip_up_to, BLOCK_SIZE=keys.shape[1], HEADS=heads, DIM=dim, BLOCK_N=KEY_TILE,
            num_warps=4,
        )  # fmt: skip


def select(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    *,
    scratch: TopkScratch,
    out: Tensor,
    skip_full: bool = False,
) -> None:
    """The entries of highest logit of every row: logits, torch's top-k, conversion.

    Args:
        q, weights, keys, table, requests, lengths: as `index_logits`; no length above the scratch's columns.
        scratch: written.
        out: int32 ``[T, topk]``, unit last stride, written whole: entries in the order of their logits, then -1.
        skip_full: rows of at most topk entries get ``0..length - 1`` without logits.

    Raises:
        TypeError, ValueError: as `index_logits`; a scratch of another size; outputs that overlap.
    """
    rows = q.shape[0]
    check_tensor("out", out, dtype=torch.int32, shape=(rows, "topk"), device=q.device)
    topk = out.shape[1]
    if topk > 1 and out.stride(1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected a unit stride in the last dimension")
    k = min(topk, scratch.logits.shape[1])
    for name, dtype in (("values", torch.float32), ("chosen", torch.int64)):
        tensor = getattr(scratch, name)
        check_tensor(f"scratch.{name}", tensor, dtype=dtype, shape=(rows, k), device=q.device, contiguous=True)
        check_no_overlap("out", out, f"scratch.{name}", tensor)
    check_no_overlap("out", out, "lengths", lengths)
    skip_up_to = topk if skip_full else _NEVER
    index_logits(q, weights, keys, table, requests, lengths, logits=scratch.logits, skip_up_to=skip_up_to)
    if rows:
        torch.topk(scratch.logits, k, dim=1, out=(scratch.values, scratch.chosen))
        lanes = min(_FINISH_LANES, triton.next_power_of_2(topk))
        _finish_choice_kernel[(rows, triton.cdiv(topk, lanes))](
            lengths, scratch.values, scratch.chosen, out, k, topk, out.stride(0), skip_up_to, LANES=lanes, num_warps=4
        )
