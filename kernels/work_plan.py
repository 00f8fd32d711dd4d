"""The work plan of a persistent decode: ragged KV work cut into one list of pieces per compute unit, in one launch.

A persistent kernel starts as many workgroups as there are compute units and hands each its list. Every query token's
KV entries are counted in granules (a token without entries counts as one, so that somebody writes its row); the line
of all granules is cut into equal shares, one per compute unit; a token that a cut crosses becomes several pieces whose
partial results a reduce has to merge.

Buffers and the columns of `work_info` follow AITER's ``get_mla_metadata_v1`` (HIP, one workgroup as well). How AITER
cuts is its own: its cost per token, caps on splits and cluster order are not modelled here, so its plan for the same
lengths is another one. `dsv4ref.serving.plan` is this kernel's reference.

Source: AITER aiter/ops/attention.py, csrc/kernels/mla/metadata/v1_2_device.cuh (buffers and columns).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks

__all__ = ["GRANULARITY", "MAX_BLOCK", "MIN_BLOCK", "Plan", "empty_plan", "plan_work"]

GRANULARITY = 16
"""KV entries that are never split: the key tile of the decode kernels."""

MIN_BLOCK, MAX_BLOCK = 128, 1024
"""Tokens that the kernel's one program takes at a time."""


@dataclass(frozen=True)
class Plan:
    """The five buffers of a plan for at most T tokens and C compute units; what is not used holds -1, or is flat.

    Args:
        work_indptr: int32 ``[C + 1]``; unit c works on rows ``work_indptr[c]`` to ``work_indptr[c + 1]``.
        work_info: int32 ``[T + C - 1, 8]``, rows of (token, partial slot or -1 for "write the result itself", first
            query row, one past it, first KV entry, one past it, KV entries of the token behind this piece, 0). KV
            entries count over all tokens, as in ``kv_indptr``.
        reduce_indptr: int32 ``[C + 1]``; reduction r merges the slots ``reduce_partial_map[reduce_indptr[r] : ...]``.
        reduce_final_map: int32 ``[C, 2]``, the query rows (first, one past it) that reduction r writes.
        reduce_partial_map: int32 ``[2 * C]``, partial slots.
    """

    work_indptr: Tensor
    work_info: Tensor
    reduce_indptr: Tensor
    reduce_final_map: Tensor
    reduce_partial_map: Tensor

    @property
    def compute_units(self) -> int:
        """Compute units that the buffers are for."""
        return self.work_indptr.numel() - 1

    @property
    def max_tokens(self) -> int:
        """Tokens that the buffers hold at most."""
        return self.work_info.shape[0] - self.compute_units + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all five buffers."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))


def empty_plan(max_tokens: int, compute_units: int, device: torch.device | str = "cpu") -> Plan:
    """Buffers large enough for every plan of up to `max_tokens` tokens, whatever their lengths.

    That the sizes do not depend on lengths is what lets a captured graph keep the addresses. C units have C - 1 cuts
    between them: at most that many tokens are split, into at most twice as many partial results.

    Args:
        max_tokens: query tokens of a step, at least 1.
        compute_units: at least 1.
        device: where the buffers go.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("max_tokens", max_tokens), ("compute_units", compute_units)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")

    def buffer(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    return Plan(
        work_indptr=buffer(compute_units + 1),
        work_info=buffer(max_tokens + compute_units - 1, 8),
        reduce_indptr=buffer(compute_units + 1),
        reduce_final_map=buffer(compute_units, 2),
        reduce_partial_map=buffer(2 * compute_units),
    )


@triton.jit
def _plan_work_kernel(
    kv_indptr,
    work_indptr,
    work_info,
    reduce_indptr,
    reduce_final_map,
    reduce_partial_map,
    num_tokens,
    compute_units,
    work_rows,
    GRANULARITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: count the granules, then walk the tokens in blocks and write the pieces of each."""
    lanes = tl.arange(0, BLOCK)
    total = 0
    for begin in range(0, num_tokens, BLOCK):
        token = begin + lanes
        live = token < num_tokens
        length = tl.load(kv_indptr + token + 1, live, 0) - tl.load(kv_indptr + token, live, 0)
        total += tl.sum(tl.where(live, tl.maximum((length + GRANULARITY - 1) // GRANULARITY, 1), 0))
    share = tl.maximum((total + compute_units - 1) // compute_units, 1)

    granules_before, rows_before, partials_before, splits_before = 0, 0, 0, 0
    for begin in range(0, num_tokens, BLOCK):
        token = begin + lanes
        live = token < num_tokens
        start = tl.load(kv_indptr + token, live, 0)
        end = tl.load(kv_indptr + token + 1, live, 0)
        # reference: granules = maximum(ceil(length / granularity), 1)
        granules = tl.where(live, tl.maximum((end - start + GRANULARITY - 1) // GRANULARITY, 1), 0)
        last = granules_before + tl.cumsum(granules, 0)
        first = last - granules
        unit = first // share
        # reference: a piece ends where its token ends or its unit's share ends
        pieces = tl.where(live, (last - 1) // share - unit + 1, 0)
        split = (pieces > 1).to(tl.int32)
        row = rows_before + tl.cumsum(pieces, 0) - pieces
        partial = partials_before + tl.cumsum(pieces * split, 0) - pieces * split
        reduction = splits_before + tl.cumsum(split, 0) - split
        for piece in range(tl.max(pieces, 0)):
            here = piece < pieces
            owner = unit + piece
            begins = tl.maximum(first, owner * share)
            ends = tl.minimum(last, (owner + 1) * share)
            kv_start = tl.minimum(start + (begins - first) * GRANULARITY, end)
            kv_end = tl.minimum(start + (ends - first) * GRANULARITY, end)
            slot = partial + piece
            at = work_info + (row + piece) * 8
            tl.store(at, token, here)
            tl.store(at + 1, tl.where(split > 0, slot, -1), here)
            tl.store(at + 2, token, here)
            tl.store(at + 3, token + 1, here)
            tl.store(at + 4, kv_start, here)
            tl.store(at + 5, kv_end, here)
            tl.store(at + 6, end - kv_end, here)
            tl.store(at + 7, tl.zeros_like(token), here)
            tl.store(work_indptr + owner, row + piece, here & (begins == owner * share))
            tl.store(reduce_partial_map + slot, slot, here & (split > 0))
        tl.store(reduce_indptr + reduction + 1, partial + pieces, split > 0)
        tl.store(reduce_final_map + reduction * 2, token, split > 0)
        tl.store(reduce_final_map + reduction * 2 + 1, token + 1, split > 0)
        granules_before += tl.sum(granules, 0)
        rows_before += tl.sum(pieces, 0)
        partials_before += tl.sum(pieces * split, 0)
        splits_before += tl.sum(split, 0)

    # What no token filled: units without work, reductions that are none, and -1 elsewhere.
    tl.store(reduce_indptr, 0)
    busy = (total + share - 1) // share
    for begin in range(0, 2 * compute_units + 1, BLOCK):
        at = begin + lanes
        tl.store(work_indptr + at, rows_before, (at >= busy) & (at <= compute_units))
        tl.store(reduce_indptr + at, partials_before, (at > splits_before) & (at <= compute_units))
        tl.store(reduce_final_map + at, -1, (at >= splits_before * 2) & (at < compute_units * 2))
        tl.store(reduce_partial_map + at, -1, (at >= partials_before) & (at < compute_units * 2))
    for begin in range(rows_before * 8, work_rows * 8, BLOCK):
        at = begin + lanes
        tl.store(work_info + at, -1, at < work_rows * 8)


def plan_work(kv_indptr: Tensor, plan: Plan) -> Plan:
    """Write the plan for the given lengths into a plan's buffers, on the device, in one launch.

    Args:
        kv_indptr: int32 ``[T + 1]`` contiguous, from 0, non-decreasing (not checked: it lies on the device).
        plan: buffers for at least T tokens, on the same device; every element is written.

    Returns:
        ``plan``.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; more tokens than the buffers are for.
    """
    indptr = checks.check_tensor("kv_indptr", kv_indptr, dtype=torch.int32, shape=("T + 1",), contiguous=True)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan (empty_plan makes one)")
    units, tokens = plan.compute_units, indptr.numel() - 1
    if not 0 <= tokens <= plan.max_tokens:
        raise ValueError(f"kv_indptr: got {tokens} tokens, expected 0 to {plan.max_tokens}, as the plan's buffers hold")
    shapes: dict[str, tuple[int, ...]] = {
        "work_indptr": (units + 1,),
        "work_info": (plan.max_tokens + units - 1, 8),
        "reduce_indptr": (units + 1,),
        "reduce_final_map": (units, 2),
        "reduce_partial_map": (2 * units,),
    }
    buffers = [
        checks.check_tensor(
            f"plan.{name}", getattr(plan, name), dtype=torch.int32, shape=shape, device=indptr.device, contiguous=True
        )
        for name, shape in shapes.items()
    ]
    block = min(MAX_BLOCK, max(triton.next_power_of_2(tokens), MIN_BLOCK))
    _plan_work_kernel[(1,)](
        indptr, *buffers, tokens, units, buffers[1].shape[0], GRANULARITY=GRANULARITY, BLOCK=block, num_warps=4
    )
    return plan
