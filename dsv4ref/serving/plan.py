"""A work plan in Python: how ragged KV work is cut over compute units, and the check that a plan fits its lengths.

This is a stand-in. AITER plans with a HIP kernel (``get_mla_metadata_v1``) that no machine without ROCm can run; it has
its own costs and caps. What the chapters need of it holds here too: a plan is a deterministic function of the lengths,
it names absolute KV positions, and it is wrong for any other lengths. `dsv4ref.kernels.work_plan` computes the same
plan on the device.

Source: AITER aiter/ops/attention.py (``get_mla_metadata_info_v1``, ``get_mla_metadata_v1``): buffers and columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4ref.kernels.work_plan import GRANULARITY, Plan, empty_plan

__all__ = ["GRANULARITY", "Plan", "check_plan", "empty_plan", "kv_work", "outside", "plan_work_ref"]

TOKEN, PARTIAL, Q_START, Q_END, KV_START, KV_END, KV_BEHIND = range(7)
"""Columns of `Plan.work_info`; the eighth is padding."""


def plan_work_ref(kv_indptr: Tensor, plan: Plan) -> Plan:
    """Write the plan for the given lengths into a plan's buffers, on the host.

    Args:
        kv_indptr: int32 ``[T + 1]``, from 0, non-decreasing; a device tensor is copied to the host.
        plan: buffers for at least T tokens; every element is written.

    Returns:
        ``plan``.

    Raises:
        ValueError: an indptr that does not start at 0 or decreases, naming where; more tokens than the buffers hold.
    """
    indptr = _indptr(kv_indptr)
    tokens, units = indptr.size - 1, plan.compute_units
    if tokens > plan.max_tokens:
        raise ValueError(f"kv_indptr: got {tokens} tokens, expected at most {plan.max_tokens}, as the plan holds")
    start, end = indptr[:-1], indptr[1:]
    granules = np.maximum(-(-(end - start) // GRANULARITY), 1)
    last = np.cumsum(granules)
    first = last - granules
    total = int(granules.sum())
    share = max(-(-total // units), 1)
    # A piece begins where a token or a unit's share begins, and ends where the next piece begins.
    begins = np.union1d(first, np.arange(0, total, share)).astype(np.int64)
    ends = np.append(begins[1:], total)[: begins.size]
    token = np.searchsorted(first, begins, side="right") - 1
    pieces = np.bincount(token, minlength=tokens)
    split = pieces > 1
    partial = np.full(begins.size, -1)
    is_partial = split[token]
    partial[is_partial] = np.arange(is_partial.sum())
    kv_start = np.minimum(start[token] + (begins - first[token]) * GRANULARITY, end[token])
    kv_end = np.minimum(start[token] + (ends - first[token]) * GRANULARITY, end[token])
    rows = (token, partial, token, token + 1, kv_start, kv_end, end[token] - kv_end, np.zeros_like(token))
    split_tokens = np.flatnonzero(split)
    _put(plan.work_info, np.stack(rows, axis=1))
    _put(plan.work_indptr, np.searchsorted(begins, np.arange(units + 1) * share))
    _put(plan.reduce_indptr, np.concatenate([[0], np.cumsum(pieces[split])]), flat=True)
    _put(plan.reduce_final_map, np.stack([split_tokens, split_tokens + 1], axis=1))
    _put(plan.reduce_partial_map, np.arange(is_partial.sum()))
    return plan


def kv_work(plan: Plan) -> int:
    """KV entries that a plan reads, over all its pieces."""
    info = _used(plan)
    return int((info[:, KV_END] - info[:, KV_START]).sum())


def outside(plan: Plan, kv_indptr: Tensor) -> Tensor:
    """The pieces that would read KV entries which are not their token's: what a stale plan does (H05).

    Args:
        plan: any plan.
        kv_indptr: int32 ``[T + 1]``, the lengths as they are now.

    Returns:
        int64 ``[n]``, rows of ``plan.work_info``; a row for a token that does not exist now counts.
    """
    indptr, info = _indptr(kv_indptr), _used(plan)
    token = info[:, TOKEN]
    known = token < indptr.size - 1
    mine = np.where(known, token, 0)
    begin, end = (indptr[mine], indptr[mine + 1]) if indptr.size > 1 else (0 * mine, 0 * mine)
    inside = known & (info[:, KV_START] >= begin) & (info[:, KV_END] <= end)
    return torch.from_numpy(np.flatnonzero(~inside))


def check_plan(plan: Plan, kv_indptr: Tensor) -> None:
    """Check that a plan is one for these lengths, before a kernel follows it out of bounds.

    Every KV entry of every token is read exactly once and in order, within the token's own range; every token has a
    piece; units share the rows without a gap; the partial results of each split token, and no others, are reduced.

    Args:
        plan: any plan.
        kv_indptr: int32 ``[T + 1]``, the lengths as they are now.

    Raises:
        ValueError: the first thing that is wrong, with its row and both values.
    """
    indptr, info = _indptr(kv_indptr), _used(plan)
    bad = outside(plan, kv_indptr)
    if bad.numel():
        row = int(bad[0])
        token, kv_start, kv_end = (int(info[row, column]) for column in (TOKEN, KV_START, KV_END))
        allowed = f"{indptr[token]} to {indptr[token + 1]}" if token < indptr.size - 1 else "no such token"
        raise ValueError(
            f"work_info[{row}]: token {token} reads KV entries {kv_start} to {kv_end}, expected within {allowed}"
        )
    work_indptr = plan.work_indptr.cpu().numpy()
    if work_indptr[0] != 0 or work_indptr[-1] != len(info) or (np.diff(work_indptr) < 0).any():
        raise ValueError(f"work_indptr: got {work_indptr.tolist()}, expected 0 to {len(info)} without a step back")
    # Rows are in order, so "exactly once" is: each begins where its predecessor ended.
    expected = 0
    for row, (token, _, q_start, q_end, kv_start, kv_end, behind, _) in enumerate(info.tolist()):
        if kv_start != expected or (q_start, q_end) != (token, token + 1) or behind != indptr[token + 1] - kv_end:
            raise ValueError(f"work_info[{row}]: got {info[row].tolist()}, expected KV entries from {expected} on")
        expected = kv_end
    if expected != indptr[-1]:
        raise ValueError(f"work_info: its rows end at KV entry {expected}, expected {indptr[-1]}")
    pieces = np.bincount(info[:, TOKEN], minlength=indptr.size - 1)
    if (pieces == 0).any():
        raise ValueError(f"work_info: token {int(pieces.argmin())} has no row, expected one for every token")
    _check_reduce(plan, info, pieces)


def _check_reduce(plan: Plan, info: np.ndarray, pieces: np.ndarray) -> None:
    bounds = plan.reduce_indptr.cpu().numpy()
    split = np.flatnonzero(pieces > 1)
    for reduction, token in enumerate(split):
        slots = plan.reduce_partial_map[bounds[reduction] : bounds[reduction + 1]].tolist()
        written = info[info[:, TOKEN] == token, PARTIAL].tolist()
        target = plan.reduce_final_map[reduction].tolist()
        if slots != written or target != [token, token + 1]:
            raise ValueError(
                f"reduction {reduction}: merges slots {slots} into query rows {target}, expected {written} into "
                f"{[int(token), int(token) + 1]}"
            )
    if bounds[len(split)] != bounds[-1]:
        raise ValueError(f"reduce_indptr: got {bounds[-1]} partial results, expected {bounds[len(split)]}")
    alone = info[np.isin(info[:, TOKEN], split, invert=True), PARTIAL]
    if (alone != -1).any():
        raise ValueError(f"work_info: an unsplit token writes partial slot {int(alone.max())}, expected -1")


def _used(plan: Plan) -> np.ndarray:
    info = plan.work_info.cpu().numpy()
    return info[: int((info[:, TOKEN] >= 0).sum())].astype(np.int64)


def _indptr(kv_indptr: Tensor) -> np.ndarray:
    indptr = kv_indptr.cpu().numpy().astype(np.int64)
    if indptr.ndim != 1 or indptr.size == 0 or indptr[0] != 0:
        raise ValueError(f"kv_indptr: got {indptr.tolist()[:4]}, expected one dimension that starts at 0")
    if (steps := np.diff(indptr)).size and steps.min() < 0:
        raise ValueError(f"kv_indptr: falls by {-steps.min()} at {int(steps.argmin())}, expected it never to decrease")
    return indptr


def _put(buffer: Tensor, values: np.ndarray, flat: bool = False) -> None:
    """Write values into the front of a buffer, and -1 (or the last value) behind them."""
    buffer.fill_(int(values[-1]) if flat else -1)
    buffer[: len(values)] = torch.from_numpy(values.astype(np.int32)).to(buffer.device)
