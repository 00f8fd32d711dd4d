"""An emulation of AITER's persistent MLA decode in PyTorch: its functions, buffers and plan semantics, anywhere.

It exists to test the side of the contract that is ours: what is passed, what is kept, what is refreshed. It says
nothing of AITER's speed and is never timed.

What is the same: signatures (checked against `contract`), the six buffers with their sizes, dtypes and meaning, fixed
and ragged lists, kv granularity, partial results and their reduction, natural-log LSE, the output written in place, and
that nothing reads the lengths once the plan is made. What is not: a row is cut evenly instead of by AITER's payload
rule, so *which* rows are split differs; keys and values are multiplied in float32; one query token a row and pages of
one token only. What AITER does with a row that has no keys is not known here; the emulation leaves it unwritten, which
is the worst a caller can meet.

All arithmetic has static shapes and stays on the device, so a graph can capture it. With ``strict`` every call is
checked as far as the host can see, and outside of capture the plan is read back and compared with the lengths of now.
Without, a stale plan reads what it was told to read, as hardware would, and a slot that does not exist reads as NaN.

Source of the semantics: ROCm/aiter at e4048607a, ``aiter/ops/attention.py`` and ``csrc/kernels/mla/metadata``.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.kernels.aiter.library import Library, load_aiter, unavailable
from dsv4ref.kernels.aiter.plan import DecodeShape, PlanBuffers, check_plan
from dsv4ref.kernels.capture import is_capturing
from dsv4ref.kernels.checks import check_tensor

__all__ = ["NAME", "EmulatedAiter", "emulated_library", "library_for"]

NAME = "emulation of AITER's persistent decode"
_CHUNK = 64  # rows of work per matrix product: bounds the gathered keys


class MlaVersion(enum.IntEnum):
    """AITER's enum of plan versions; the emulation plans V32 only."""

    V32 = 0
    V40 = 1


def emulated_library(arch: str = "gfx950", *, compute_units: int = 8, strict: bool = True) -> Library:
    """The emulation as a `Library`.

    Args:
        arch: whose rows of the support matrix, and whose fp8 dialect, apply.
        compute_units: CUs to plan for, from 1 on.
        strict: refuse what the host can see to be wrong, stale plans included.

    Raises:
        ValueError: no compute unit.
    """
    if compute_units < 1:
        raise ValueError(f"compute_units: got {compute_units}, expected at least 1")
    return Library(NAME, EmulatedAiter(compute_units, strict=strict), arch, compute_units, emulated=True)


def library_for(device: torch.device | str) -> Library:
    """The library that chapters run on a device: genuine AITER on an AMD GPU that has it, the emulation elsewhere.

    Which of the two it is stands in its name. Where AITER is installed and does not import, that is an error, not a
    reason to emulate.

    Raises:
        AiterUnavailableError: AITER is there, and its import fails.
    """
    if torch.device(device).type == "cuda" and unavailable() is None:
        return load_aiter()
    return emulated_library()


@dataclass(frozen=True)
class _Planned:
    """What the host remembers of a plan between the two calls."""

    shape: DecodeShape
    pointers: tuple[int, ...]


class EmulatedAiter:
    """Stands where the ``aiter`` module would: the same function names at the same paths.

    Args:
        compute_units: CUs to plan for.
        strict: see the module's docstring.
    """

    def __init__(self, compute_units: int, *, strict: bool) -> None:
        self.compute_units = compute_units
        self.strict = strict
        self.mla = SimpleNamespace(mla_decode_fwd=self.mla_decode_fwd)
        self._plans: dict[int, _Planned] = {}  # by the address of work_info_set

    def get_mla_metadata_info_v1(
        self,
        batch_size: int,
        max_seqlen_qo: int,
        num_head_qo: int,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        is_sparse: bool,
        fast_mode: bool = True,
        num_kv_splits: int = 32,
        intra_batch_mode: bool = False,
        max_split_per_batch: int = -1,
    ) -> tuple[tuple[Any, torch.dtype], ...]:
        """Sizes of the six buffers, in AITER's order. Emulated: fast mode, one query token, one tile a row."""
        _only("get_mla_metadata_info_v1", max_seqlen_qo=(max_seqlen_qo, 1), fast_mode=(fast_mode, True),
              intra_batch_mode=(intra_batch_mode, False))  # fmt: skip
        if num_head_qo % 8:
            raise ValueError(f"{NAME}: num_head_qo: got {num_head_qo}, expected a multiple of 8")
        units = self.compute_units
        most = batch_size + units - 1
        partials = max(min(most, 2 * (units - 1)), 1)
        if max_split_per_batch > 0:
            partials = max(partials, batch_size + min(units, max_split_per_batch * batch_size))
        return (
            (2, torch.uint64),
            (units + 1, torch.int32),
            ((most, 8), torch.int32),
            (batch_size + 1, torch.int32),
            ((batch_size, 2), torch.int32),
            (partials, torch.int32),
        )

    def get_mla_metadata_v1(
        self,
        seqlens_qo_indptr: Tensor,
        seqlens_kv_indptr: Tensor,
        kv_last_page_lens: Tensor,
        num_heads_per_head_k: int,
        num_heads_k: int,
        is_causal: bool,
        work_metadata_ptrs: Tensor,
        work_info_set: Tensor,
        work_indptr: Tensor,
        reduce_indptr: Tensor,
        reduce_final_map: Tensor,
        reduce_partial_map: Tensor,
        page_size: int = 1,
        kv_granularity: int = 16,
        max_seqlen_qo: int = -1,
        uni_seqlen_qo: int = -1,
        fast_mode: bool = True,
        topk: int = -1,
        max_split_per_batch: int = -1,
        intra_batch_mode: bool = False,
        is_cp_round_robin: bool = False,
        mla_version: MlaVersion = MlaVersion.V32,
        dtype_q_nope: torch.dtype | None = None,
        dtype_q_rope: torch.dtype | None = None,
        dtype_kv_nope: torch.dtype | None = None,
        dtype_kv_rope: torch.dtype | None = None,
        dtype_q: torch.dtype | None = None,
        dtype_kv: torch.dtype | None = None,
    ) -> None:
        """Fill the six buffers in place from the current lengths. Emulated: pages of one token, one query token."""
        _only("get_mla_metadata_v1", num_heads_k=(num_heads_k, 1), page_size=(page_size, 1),
              fast_mode=(fast_mode, True), max_seqlen_qo=(max_seqlen_qo, 1), uni_seqlen_qo=(uni_seqlen_qo, 1),
              intra_batch_mode=(intra_batch_mode, False), is_cp_round_robin=(is_cp_round_robin, False),
              mla_version=(mla_version, MlaVersion.V32), max_split_per_batch=(max_split_per_batch, -1))  # fmt: skip
        rows = seqlens_kv_indptr.shape[0] - 1
        plan = PlanBuffers(work_metadata_ptrs, work_indptr, work_info_set, reduce_indptr, reduce_final_map,
                           reduce_partial_map)  # fmt: skip
        self._check_plan_buffers(plan, rows, seqlens_qo_indptr, seqlens_kv_indptr, kv_last_page_lens)
        # Omitted dtypes mean bf16 in AITER; that is what this plan is then made for, and running it in fp8 is refused.
        q_dtype = dtype_q_nope or dtype_q or torch.bfloat16
        kv_dtype = dtype_kv_nope or dtype_kv or torch.bfloat16
        ragged = topk < 0
        # Without topk nothing bounds a list, so a ragged plan has no longest one to record.
        shape = DecodeShape(rows, num_heads_per_head_k, 1 if ragged else topk, q_dtype, kv_dtype,
                            "ragged" if ragged else "fixed", kv_granularity=kv_granularity)  # fmt: skip
        self._write_plan(plan, shape, seqlens_kv_indptr)
        self._plans[work_info_set.data_ptr()] = _Planned(shape, _pointers(plan))

    def _check_plan_buffers(self, plan: PlanBuffers, rows: int, *inputs: Tensor) -> None:
        device = inputs[0].device
        for name, tensor, size in zip(
            ("seqlens_qo_indptr", "seqlens_kv_indptr", "kv_last_page_lens"), inputs, (rows + 1, rows + 1, rows),
            strict=True,
        ):  # fmt: skip
            check_tensor(name, tensor, dtype=torch.int32, shape=(size,), device=device, contiguous=True)
        most = rows + self.compute_units - 1
        wanted: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
            "work_metadata_ptrs": (torch.uint64, (2,)),
            "work_indptr": (torch.int32, (self.compute_units + 1,)),
            "work_info_set": (torch.int32, (most, 8)),
            "reduce_indptr": (torch.int32, (rows + 1,)),
            "reduce_final_map": (torch.int32, (rows, 2)),
            "reduce_partial_map": (torch.int32, ("partials",)),
        }
        for name, (dtype, dims) in wanted.items():
            check_tensor(name, plan.by_name()[name], dtype=dtype, shape=dims, device=device, contiguous=True)

    def _write_plan(self, plan: PlanBuffers, shape: DecodeShape, kv_indptr: Tensor) -> None:
        """Cut every list into pieces of equal size, at most one piece per CU more than there are rows."""
        rows, grain, device = shape.rows, shape.kv_granularity, kv_indptr.device
        ends = kv_indptr.to(torch.int64)
        lengths, starts = ends[1:] - ends[:-1], ends[:-1]  # [T]
        if shape.layout == "fixed":
            lengths = lengths.clamp(max=shape.topk)
            starts = torch.arange(rows, device=device) * shape.topk
        blocks = (lengths + grain - 1) // grain
        # With N pieces in all, at most 2 (CUs - 1) of them belong to rows that are split: the size of the partial map.
        size = ((blocks.sum() + self.compute_units - 1) // self.compute_units).clamp(min=1)
        pieces = ((blocks + size - 1) // size).clamp(min=1)
        last = pieces.cumsum(0)
        work = torch.arange(plan.work_info_set.shape[0], device=device)
        owner = torch.searchsorted(last, work, right=True)  # T where there is no work left
        used, row = owner < rows, owner.clamp(max=rows - 1)
        piece = work - (last - pieces)[row]
        kv_start = starts[row] + piece * size * grain
        row_end = starts[row] + lengths[row]
        kv_end = torch.minimum(kv_start + size * grain, row_end)
        split = torch.where(pieces > 1, pieces, 0)
        split_last = split.cumsum(0)
        slot = torch.where(split[row] > 0, (split_last - split)[row] + piece, -1)
        columns = (row, slot, row, row + 1, kv_start, kv_end, row_end - kv_end, torch.zeros_like(row))
        # Entries behind the last row of work keep what they held, as AITER's do.
        _write(plan.work_info_set, used[:, None], torch.stack(columns, 1))
        shares = torch.arange(self.compute_units + 1, device=device) * last[-1] // self.compute_units
        plan.work_indptr.copy_(shares)
        plan.reduce_indptr[:1].fill_(0)
        plan.reduce_indptr[1:].copy_(split_last)
        tiles = torch.arange(rows, device=device)
        _write(plan.reduce_final_map, (split > 0)[:, None], torch.stack((tiles, tiles + 1), 1))
        partials = torch.arange(plan.reduce_partial_map.shape[0], device=device)
        _write(plan.reduce_partial_map, partials < split_last[-1], partials)
        addresses = plan.work_metadata_ptrs.view(torch.int64)
        addresses[:1].fill_(plan.work_indptr.data_ptr())
        addresses[1:].fill_(plan.work_info_set.data_ptr())

    def mla_decode_fwd(
        self,
        q: Tensor,
        kv_buffer: Tensor,
        o: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_last_page_lens: Tensor,
        max_seqlen_q: int,
        page_size: int = 1,
        nhead_kv: int = 1,
        sm_scale: float | None = None,
        logit_cap: float = 0.0,
        num_kv_splits: int | None = None,
        num_kv_splits_indptr: Tensor | None = None,
        work_meta_data: Tensor | None = None,
        work_indptr: Tensor | None = None,
        work_info_set: Tensor | None = None,
        reduce_indptr: Tensor | None = None,
        reduce_final_map: Tensor | None = None,
        reduce_partial_map: Tensor | None = None,
        q_scale: Tensor | None = None,
        kv_scale: Tensor | None = None,
        intra_batch_mode: bool = False,
        return_logits: bool = False,
        return_lse: bool = False,
        g_kv_indptr: Tensor | None = None,
        cp_world_size: int = 1,
        cp_rank: int = 0,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a plan. Emulated: persistent mode, one query token a row, one KV head."""
        _only("mla_decode_fwd", max_seqlen_q=(max_seqlen_q, 1), page_size=(page_size, 1), nhead_kv=(nhead_kv, 1),
              logit_cap=(logit_cap, 0.0), num_kv_splits_indptr=(num_kv_splits_indptr, None),
              intra_batch_mode=(intra_batch_mode, False), cp_world_size=(cp_world_size, 1),
              g_kv_indptr=(g_kv_indptr, None), cp_rank=(cp_rank, 0))  # fmt: skip
        buffers = (work_meta_data, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map)
        given = [buffer for buffer in buffers if buffer is not None]
        if len(given) != len(buffers):
            raise ValueError(f"{NAME}: got {len(given)} of 6 plan buffers, expected all (persistent mode only)")
        plan = PlanBuffers(*given)
        check_tensor("o", o, dtype=torch.bfloat16, shape=(q.shape[0], q.shape[1], "value_dim"), contiguous=True)
        self._check_run(plan, q, kv_buffer, kv_indptr, kv_indices)
        rows, heads, dim = q.shape
        scale = dim**-0.5 if sm_scale is None else sm_scale
        values = _Values(q, q_scale, kv_buffer, kv_scale, scale, o.shape[2])
        longest = self._longest(plan, kv_indices)
        partial_out = o.new_empty((reduce_partial_map.shape[0], heads, o.shape[2]), dtype=torch.float32)  # type: ignore[union-attr]
        partial_lse = o.new_empty(partial_out.shape[:2], dtype=torch.float32)
        lse = o.new_empty((rows, heads), dtype=torch.float32)
        for first in range(0, plan.work_info_set.shape[0], _CHUNK):
            work = plan.work_info_set[first : first + _CHUNK].to(torch.int64)
            live = torch.arange(first, first + work.shape[0], device=q.device) < plan.work_indptr[-1]
            live &= work[:, 5] > work[:, 4]  # a row without keys is left as it was
            row = torch.where(live, work[:, 2], 0).clamp(0, rows - 1)
            found, found_lse = values.attend(row, work[:, 4], work[:, 5], kv_indices, live, longest)
            final, slot = live & (work[:, 1] < 0), work[:, 1].clamp(0, partial_out.shape[0] - 1)
            _scatter(o, row, final, found.to(torch.bfloat16))
            _scatter(lse, row, final, found_lse)
            _scatter(partial_out, slot, live & ~final, found)
            _scatter(partial_lse, slot, live & ~final, found_lse)
        self._reduce(plan, partial_out, partial_lse, o, lse)
        return partial_out, lse if return_lse else None

    def _check_run(self, plan: PlanBuffers, q: Tensor, kv: Tensor, kv_indptr: Tensor, kv_indices: Tensor) -> None:
        planned = self._plans.get(plan.work_info_set.data_ptr())
        if planned is None or planned.pointers != _pointers(plan):
            raise ValueError(
                f"{NAME}: plan: these six buffers were not filled together, expected get_mla_metadata_v1 on the same "
                "addresses (a reallocated buffer leaves its old address in the plan)"
            )
        shape = planned.shape
        for name, tensor, dtype in (("q", q, shape.q_dtype), ("kv_buffer", kv, shape.kv_dtype)):
            if tensor.dtype is not dtype:
                raise TypeError(
                    f"{NAME}: {name}: got {tensor.dtype}, expected {dtype}, which the plan was made for (an omitted "
                    "dtype means bf16)"
                )
        check_tensor("q", q, dtype=shape.q_dtype, shape=(shape.rows, shape.heads, "dim"), contiguous=True)
        check_tensor("kv_buffer", kv, dtype=shape.kv_dtype, shape=("slots", 1, 1, q.shape[2]), contiguous=True)
        check_tensor("kv_indptr", kv_indptr, dtype=torch.int32, shape=(shape.rows + 1,), contiguous=True)
        size = shape.rows * shape.topk if shape.layout == "fixed" else "entries"
        check_tensor("kv_indices", kv_indices, dtype=torch.int32, shape=(size,), contiguous=True)
        if not self.strict or is_capturing():
            return
        written = [int(address) for address in plan.work_metadata_ptrs.view(torch.int64).tolist()]
        if written != [plan.work_indptr.data_ptr(), plan.work_info_set.data_ptr()]:
            raise ValueError(f"{NAME}: work_metadata_ptrs: points elsewhere than at work_indptr and work_info_set")
        check_plan(plan, shape, kv_indptr)
        _check_slots(shape, kv_indptr, kv_indices, kv.shape[0])

    def _longest(self, plan: PlanBuffers, kv_indices: Tensor) -> int:
        """Entries that one row of work can span, known to the host: the list's stride, or the whole ragged list."""
        shape = self._plans[plan.work_info_set.data_ptr()].shape
        return shape.topk if shape.layout == "fixed" else kv_indices.shape[0]

    def _reduce(self, plan: PlanBuffers, partial_out: Tensor, partial_lse: Tensor, o: Tensor, lse: Tensor) -> None:
        """o = sum_i exp(lse_i - L) o_i with L = logsumexp_i(lse_i), for the rows that were split."""
        indptr = plan.reduce_indptr.to(torch.int64)
        first, count = indptr[:-1], indptr[1:] - indptr[:-1]  # [T]
        reach = min(self.compute_units, plan.reduce_partial_map.shape[0])  # no row has more pieces than there are CUs
        each = first[:, None] + torch.arange(reach, device=o.device)
        live = each < indptr[1:, None]
        slot = plan.reduce_partial_map[each.clamp(max=plan.reduce_partial_map.shape[0] - 1)].to(torch.int64)
        slot = torch.where(live, slot, 0)
        part_lse = torch.where(live[:, :, None], partial_lse[slot], -torch.inf)  # [T, pieces, H]
        total = part_lse.logsumexp(1)
        merged = torch.zeros_like(o, dtype=torch.float32)
        for piece in range(reach):  # a loop, not a sum over pieces: [T, pieces, H, 512] would be large
            weight = torch.where(live[:, piece, None], torch.exp(part_lse[:, piece] - total), 0.0)
            value = torch.where(live[:, piece, None, None], partial_out[slot[:, piece]], 0.0)
            merged += weight[:, :, None] * value
        row = torch.where(count > 0, plan.reduce_final_map[:, 0].to(torch.int64), 0).clamp(0, o.shape[0] - 1)
        _scatter(o, row, count > 0, merged.to(torch.bfloat16))
        _scatter(lse, row, count > 0, total)


@dataclass(frozen=True)
class _Values:
    """Queries and keys with their scales, and attention over a range of list entries."""

    q: Tensor
    q_scale: Tensor | None
    kv: Tensor
    kv_scale: Tensor | None
    sm_scale: float
    value_dim: int

    def attend(
        self, row: Tensor, start: Tensor, end: Tensor, kv_indices: Tensor, live: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Attention of query ``row[w]`` over ``kv_indices[start[w]:end[w]]``: fp32 ``[W, H, Dv]`` and ``[W, H]``."""
        at = start[:, None] + torch.arange(longest, device=self.q.device)  # [W, L]
        inside = live[:, None] & (at < end[:, None])
        slot = kv_indices[at.clamp(0, kv_indices.shape[0] - 1)].to(torch.int64)
        exists = (slot >= 0) & (slot < self.kv.shape[0])
        keys = _numbers(self.kv, self.kv_scale, slot.clamp(0, self.kv.shape[0] - 1))[:, :, 0, 0]  # [W, L, D]
        keys = torch.where(exists[:, :, None], keys, torch.nan)
        keys = torch.where(inside[:, :, None], keys, 0.0)
        scores = _numbers(self.q, self.q_scale, row) @ keys.transpose(1, 2) * self.sm_scale  # [W, H, L]
        scores = torch.where(inside[:, None, :], scores, -torch.inf)
        lse = scores.logsumexp(2)
        weights = torch.where(inside[:, None, :], torch.exp(scores - lse[:, :, None]), 0.0)
        return weights @ keys[:, :, : self.value_dim], lse


def _numbers(codes: Tensor, scale: Tensor | None, at: Tensor) -> Tensor:
    """``codes[at]`` in float32; fp8 is gathered as bytes, which every device can."""
    if codes.element_size() == 1:
        taken = codes.view(torch.uint8)[at].view(codes.dtype).to(torch.float32)
        return taken if scale is None else taken * scale
    return codes[at].to(torch.float32)


def _write(buffer: Tensor, where: Tensor, values: Tensor) -> None:
    """``buffer[where] = values[where]`` with static shapes."""
    buffer.copy_(torch.where(where, values.to(buffer.dtype), buffer))


def _scatter(target: Tensor, row: Tensor, live: Tensor, values: Tensor) -> None:
    """``target[row[i]] = values[i]`` where live, with static shapes: the rest goes to a row that is dropped."""
    count = target.shape[0]
    wide = torch.empty((count + 1, *target.shape[1:]), dtype=target.dtype, device=target.device)
    wide[:count].copy_(target)
    wide.index_copy_(0, torch.where(live, row, count), values)
    target.copy_(wide[:count])


def _pointers(plan: PlanBuffers) -> tuple[int, ...]:
    return tuple(buffer.data_ptr() for buffer in plan.by_name().values())


def _only(function: str, **given: tuple[object, object]) -> None:
    for name, (value, emulated) in given.items():
        if value is not emulated and value != emulated:
            raise ValueError(f"{NAME}: {function}: {name}: got {value!r}, expected {emulated!r}, all that is emulated")


def _check_slots(shape: DecodeShape, kv_indptr: Tensor, kv_indices: Tensor, slots: int) -> None:
    """Every list entry that the lengths cover names a slot of the cache."""
    ends, listed = kv_indptr.tolist(), kv_indices.cpu()
    for row, (begin, end) in enumerate(itertools.pairwise(ends)):
        first = row * shape.topk if shape.layout == "fixed" else begin
        length = min(end - begin, shape.topk) if shape.layout == "fixed" else end - begin
        part = listed[first : first + length]
        bad = ((part < 0) | (part >= slots)).nonzero()
        if len(bad) or part.shape[0] < length:
            entry = int(bad[0]) if len(bad) else part.shape[0]
            what = f"slot {int(part[entry])}" if len(bad) else "nothing"
            raise ValueError(
                f"{NAME}: kv_indices: row {row} names {what} at entry {entry}, expected {length} slots in 0 to "
                f"{slots - 1}"
            )
