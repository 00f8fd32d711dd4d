"""Split-K sparse MLA decode: a row's keys cut over several workgroups, merged by one reduce, or none at one split.

The partial kernel runs one program per (row, head block, split). Both scopes' lists of a row count as one line of key
tiles, SWA first; split s of S takes a contiguous range of them and runs the online softmax of `sparse_mla_decode` over
it. With one split the program holds the whole row: it applies the sink, rotates if asked and writes the caller's
output, and nothing else is launched. With more, it writes its normalised part and LSE in fp32, and a reduce merges::

    lse       = ln sum_s exp(lse_s)
    out[t, h] = sum_s exp(lse_s - lse) part_s[t, h] / (1 + exp(sink_h - lse)),   rotated back to the query's position

The host chooses S from padded widths (`splits`); the program cuts the tiles that a row really has, so that short rows
are shared out as evenly as long ones. A split without tiles, or with invalid slots only, writes an LSE of -inf and no
part, and the reduce never reads what it did not write.

On sm_90 a second partial kernel does the same work with warps that fill and warps that multiply (`hopper_decode`);
the reduce, the scratch and the arguments are shared, and ``path`` says which one runs.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`, `dsv4ref.ref.merge.merge_scopes_ref`,
`dsv4ref.ref.rope.rotate_back_ref`. Hazards: H07, H12, H16.
Source of the idea: vllm#46275, vllm#52212 (split decode), vllm#57880 (one split needs no reduce), vllm#48788 (one head
per workgroup of the reduce), vllm#57435 (rotation inside the reduce).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture, decode_mode
from dsv4ref.kernels.sparse_mla import hopper_decode
from dsv4ref.kernels.sparse_mla.decode import (
    _LOWEST,
    _WARP_GROUP_HEADS,
    _attend_tile,
    _check_output,
    _check_query,
    _input_memory,
    _load_keys,
    _scope_arguments,
)
from dsv4ref.kernels.sparse_mla.halves import _attend_in_halves, in_halves
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.merge import QueryRotation, _load_lse, _rotate_back
from dsv4ref.kernels.sparse_mla.splits import SplitPlan, machine_of, plan_splits

__all__ = ["REDUCE_CHUNK", "REDUCE_WARPS", "Path", "SplitScratch", "plan_for", "split_k_decode"]

Path = Literal["auto", "triton", "gluon"]
"""Which partial kernel: the portable one, Hopper's, or Hopper's where it can run and was measured to be faster."""

REDUCE_CHUNK = 8
"""Parts the reduce loads at once: 8 vectors of 512 fp32 are 16 registers of each lane of four waves on AMD."""
REDUCE_WARPS = 4

_LOG2_E_FLOAT = math.log2(math.e)

# As the kernels see them; equal to those of formats.kv_cache (a test holds that).
_DIM = tl.constexpr(512)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend_tiles(
    query,
    accumulator,
    row_max,
    row_sum,
    cache,
    indices,
    begin,
    end,
    num_rows,
    block_stride,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The online softmax over slots ``indices[begin:end]``; returns the updated (accumulator, row_max, row_sum)."""
    for start in range(begin, end, BLOCK_K):
        lanes = start + tl.arange(0, BLOCK_K)
        slots = tl.load(indices + lanes, mask=lanes < end, other=-1)
        valid = slots.to(tl.uint32) < num_rows  # unsigned, -1 is too large as well
        WIDE_ROPE: tl.constexpr = MODE == "packed_fn" and BLOCK_H < _WARP_GROUP_HEADS
        keys = _load_keys(cache, block_stride, slots, valid, BLOCK_SIZE, MODE, BLOCK_K, WIDE_ROPE)  # [BLOCK_K, 512]
        accumulator, row_max, row_sum = _attend_tile(
            query, accumulator, row_max, row_sum, keys, valid, scale_log2, MODE
        )  # fmt: skip
    return accumulator, row_max, row_sum


@triton.jit
def _list_of(indptr, row, capacity):
    """Where a row's list begins, and how many slots it has."""
    begin = tl.load(indptr + row)
    end = tl.minimum(tl.load(indptr + row + 1), capacity)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def _turned_back(x, positions, cos, sin, row, cos_stride, sin_stride, num_positions, BLOCK_H: tl.constexpr):
    """x, ``[BLOCK_H, 512]`` or its end, with its rope dims rotated back to the row's position."""
    position = tl.load(positions + row)
    known = (position >= 0) & (position < num_positions)
    at = position.to(tl.int64)
    return _rotate_back(x, cos + at * cos_stride, sin + at * sin_stride, known, BLOCK_H)


@triton.jit
def _split_k_decode_kernel(
    q,
    out,
    lse,
    sink,
    positions,
    cos,
    sin,
    parts,
    part_lses,
    swa_cache,
    swa_indices,
    swa_indptr,
    swa_capacity,
    swa_rows,
    swa_block_stride,
    extra_cache,
    extra_indices,
    extra_indptr,
    extra_capacity,
    extra_rows,
    extra_block_stride,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_rows,
    num_heads,
    num_splits,
    scale_log2,
    SWA_BLOCK: tl.constexpr,
    SWA_MODE: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    EXTRA_MODE: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Head blocks of one row and split are neighbours in launch order, so that their re-reads of the same keys meet in a
    # cache: L2 on sm_90, Infinity Cache on gfx942 and gfx950, which deal neighbours out to dies with an L2 each.
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    live = heads < num_heads
    wide = heads.to(tl.int64)
    # The accumulator has all dims of a row, or the first half of them while `upper` has the others.
    FIRST_DIMS: tl.constexpr = _DIM // 2 if HALVES else _DIM
    dims = tl.arange(0, FIRST_DIMS)
    query_rows = q + row * q_stride_t + wide * q_stride_h  # [BLOCK_H]

    # This split's tiles, of the line of tiles that both lists make
    swa_begin, swa_length = _list_of(swa_indptr, row, swa_capacity)
    swa_tiles = (swa_length + BLOCK_K - 1) // BLOCK_K
    first, last = swa_tiles * 0, swa_tiles
    if HAS_EXTRA:
        extra_begin, extra_length = _list_of(extra_indptr, row, extra_capacity)
        last += (extra_length + BLOCK_K - 1) // BLOCK_K
    if SPLIT:
        share = (last + num_splits - 1) // num_splits
        first = tl.minimum(split * share, last)
        last = tl.minimum(first + share, last)

    if HALVES:
        tl.static_assert(SWA_MODE == EXTRA_MODE)
        if not HAS_EXTRA:
            extra_begin, extra_length = swa_begin, swa_length
        accumulator, upper, row_max, row_sum = _attend_in_halves(
            query_rows, live, first, last,
            swa_cache, swa_indices, swa_begin, swa_begin + swa_length, swa_rows, swa_block_stride,
            extra_cache, extra_indices, extra_begin, extra_begin + extra_length, extra_rows, extra_block_stride,
            scale_log2, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, SWA_MODE, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        query = tl.load(query_rows[:, None] + dims[None, :], mask=live[:, None], other=0.0)  # [BLOCK_H, 512]
        accumulator = tl.zeros((BLOCK_H, _DIM), dtype=tl.float32)
        row_max = tl.full((BLOCK_H,), _LOWEST, dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
        accumulator, row_max, row_sum = _attend_tiles(
            query, accumulator, row_max, row_sum, swa_cache, swa_indices,
            swa_begin + tl.minimum(first * BLOCK_K, swa_length), swa_begin + tl.minimum(last * BLOCK_K, swa_length),
            swa_rows, swa_block_stride, scale_log2, SWA_BLOCK, SWA_MODE, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        if HAS_EXTRA:
            extra_first, extra_last = tl.maximum(first - swa_tiles, 0), tl.maximum(last - swa_tiles, 0)
            accumulator, row_max, row_sum = _attend_tiles(
                query, accumulator, row_max, row_sum, extra_cache, extra_indices,
                extra_begin + extra_first * BLOCK_K, extra_begin + tl.minimum(extra_last * BLOCK_K, extra_length),
                extra_rows, extra_block_stride, scale_log2, EXTRA_BLOCK, EXTRA_MODE, BLOCK_H, BLOCK_K,
            )  # fmt: skip

    # lse = ln sum_k exp(s_k), before the sink; -inf for a row, or a split of it, without keys
    empty = row_sum == 0.0
    value = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * _LN_2)
    if SPLIT:
        at = (split.to(tl.int64) * num_rows + row) * num_heads + wide
        tl.store(part_lses + at, value, mask=live)
        inverse = tl.where(empty, 0.0, 1.0 / row_sum)
        written = (live & (row_sum != 0.0))[:, None]
        part_at = parts + at[:, None] * _DIM + dims[None, :]
        tl.store(part_at, accumulator * inverse[:, None], mask=written)
        if HALVES:
            tl.store(part_at + FIRST_DIMS, upper * inverse[:, None], mask=written)
    else:
        if HAS_LSE:
            tl.store(lse + row * lse_stride_t + wide * lse_stride_h, value, mask=live)
        # l' = l * exp(m - m') + exp(sink - m'), o = acc * exp(m - m') / l'
        if HAS_SINK:
            sink_log2 = tl.load(sink + heads, mask=live, other=float("-inf")) * _LOG2_E
            new_max = tl.maximum(row_max, sink_log2)
            decay = tl.exp2(row_max - new_max)
            # A sink of +inf takes all the weight: the row is zero. inf - inf would make it NaN.
            absorbed = sink_log2 == float("inf")
            row_sum = row_sum * decay + tl.where(absorbed, 1.0, tl.exp2(sink_log2 - new_max))
            accumulator = accumulator * decay[:, None]
            if HALVES:
                upper = upper * decay[:, None]
        inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
        result = accumulator * inverse[:, None]
        out_at = out + row * out_stride_t + wide[:, None] * out_stride_h + dims[None, :]
        if HALVES:
            tl.store(out_at, result.to(tl.bfloat16), mask=live[:, None])
            result = upper * inverse[:, None]
            out_at += FIRST_DIMS
        if HAS_ROPE:
            result = _turned_back(
                result, positions, cos, sin, row, cos_stride, sin_stride, num_positions, BLOCK_H
            )  # fmt: skip
        tl.store(out_at, result.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def _reduce_splits_kernel(
    parts,
    part_lses,
    sink,
    positions,
    cos,
    sin,
    out,
    lse,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_rows,
    num_heads,
    num_splits,
    PADDED: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One head of one row: merge its parts, apply the sink once, rotate, write once."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)

    # lse = ln sum_s exp(lse_s), around the largest lse_s
    splits = tl.arange(0, PADDED)
    # int64 before the products: splits of a large batch lie further apart than 2^31 bytes (H26).
    at = (splits.to(tl.int64) * num_rows + row) * num_heads + head
    lses = _load_lse(part_lses + at, splits < num_splits)  # [PADDED]
    largest = tl.max(lses, axis=0)
    # Every part empty: any finite reference will do, and -inf - -inf would be NaN (H16).
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2((lses - reference) * _LOG2_E), axis=0)
    empty = total == 0.0
    merged_lse = tl.where(empty, float("-inf"), reference + tl.log2(total) * _LN_2)
    if HAS_LSE:
        tl.store(lse + row * lse_stride_t + head * lse_stride_h, merged_lse)

    # 1 / (1 + exp(sink - lse)): once, for the merged row. Overflow to inf gives the share 0 that is meant.
    share = tl.where(empty, 0.0, 1.0 / total)
    if HAS_SINK:
        kept = 1.0 / (1.0 + tl.exp2((tl.load(sink + head) - merged_lse) * _LOG2_E))
        share = tl.where(empty, 0.0, share * kept)

    # o = sum_s exp(lse_s - lse) part_s, times the sink's factor
    dims = tl.arange(0, _DIM)
    result = tl.zeros((_DIM,), dtype=tl.float32)
    for begin in tl.static_range(0, PADDED, CHUNK):
        some = begin + tl.arange(0, CHUNK)
        some_at = (some.to(tl.int64) * num_rows + row) * num_heads + head  # [CHUNK]
        weights = tl.exp2((_load_lse(part_lses + some_at, some < num_splits) - reference) * _LOG2_E) * share
        # The term is masked, and not even loaded: an empty split wrote no part, and 0 x NaN is NaN (H12, H16).
        counts = (some < num_splits) & (weights != 0.0)
        chunk = tl.load(parts + some_at[:, None] * _DIM + dims[None, :], mask=counts[:, None], other=0.0)
        result += tl.sum(weights[:, None] * chunk, axis=0)

    if HAS_ROPE:
        turned = _turned_back(
            result[None, :], positions, cos, sin, row, cos_stride, sin_stride, num_positions, 1
        )  # fmt: skip
        result = tl.reshape(turned, (_DIM,))
    tl.store(out + row * out_stride_t + head * out_stride_h + dims, result.to(tl.bfloat16))


@dataclass(frozen=True)
class SplitScratch:
    """Partial results of a split decode, kept between steps. One stream at a time may use it.

    A call with S splits of T rows and H heads uses the first S * T * H places, so one scratch serves every batch size
    and split count that fits. What a call has not written it does not read.

    Args:
        parts: fp32 ``[N, 512]`` contiguous.
        lses: fp32 ``[N]`` contiguous.
    """

    parts: Tensor
    lses: Tensor

    def __post_init__(self) -> None:
        checks.check_tensor("parts", self.parts, dtype=torch.float32, shape=("N", HEAD_DIM), contiguous=True)
        checks.check_tensor(
            "lses", self.lses, dtype=torch.float32, shape=(self.parts.shape[0],), device=self.parts.device,
            contiguous=True,
        )  # fmt: skip
        checks.check_no_overlap("lses", self.lses, "parts", self.parts)

    @staticmethod
    def allocate(places: int, device: torch.device | str) -> SplitScratch:
        """Memory for ``places`` partial vectors (splits x rows x heads), uninitialised.

        Raises:
            ValueError: a negative number.
        """
        if not isinstance(places, int) or places < 0:
            raise ValueError(f"places: got {places!r}, expected a non-negative integer")
        return SplitScratch(
            torch.empty((places, HEAD_DIM), dtype=torch.float32, device=device),
            torch.empty((places,), dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Device memory it takes, bytes."""
        return sum(t.numel() * t.element_size() for t in (self.parts, self.lses))


def plan_for(
    q: Tensor,
    swa: Scope,
    extra: Scope | None = None,
    *,
    launch: LaunchShape | None = None,
    splits: int | None = None,
    path: Path = "auto",
) -> SplitPlan:
    """The plan a call with these arguments follows: from shapes and widths alone, nothing is read from the device.

    Args:
        q: ``[T, H, 512]``, T at least 1.
        swa, extra, launch, splits, path: as `split_k_decode`.

    Raises:
        ValueError: as `splits.plan_splits`; a path that is none, or "gluon" where it does not exist.
    """
    if path not in get_args(Path):
        raise ValueError(f"path: got {path!r}, expected one of {', '.join(map(repr, get_args(Path)))}")
    machine = machine_of(q.device)
    size = (q.shape[0], q.shape[1], swa.width, extra.width if extra is not None else 0)
    reason = hopper_decode.refusal(q, swa, extra, launch)
    if path == "gluon" and reason is not None:
        raise ValueError(f"path: got 'gluon', but {reason}")
    if path != "triton" and reason is None and machine is not None:
        plan = hopper_decode.plan(machine, *size, splits)
        if path == "gluon" or hopper_decode.worthwhile(*size):
            return plan
    return plan_splits(machine, *size, launch, splits)


def split_k_decode(
    q: Tensor,
    swa: Scope,
    extra: Scope | None = None,
    *,
    sink: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
    rotation: QueryRotation | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    scratch: SplitScratch | None = None,
    launch: LaunchShape | None = None,
    splits: int | None = None,
    path: Path = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Decode attention of T query rows over their SWA and extra slots: one launch at one split, two at more.

    Args:
        q, swa, extra, sink, scale, out, lse, return_lse: as `sparse_mla_decode`.
        rotation: rotate the last 64 dims back to the queries' positions, in fp32 before rounding; None leaves them.
        scratch: partial results, at least splits * T * H places; allocated if None. Not used at one split.
        launch: tile and warps; None lets the plan choose.
        splits: pieces of each row, 1 to 32; None lets the plan choose. Results of different split counts differ by the
            order of sums; the same count gives the same bits.
        path: "triton" for the portable kernel, "gluon" for Hopper's (sm_90, e4m3fn caches, no ``launch``: its tile is
            fixed), "auto" for Hopper's where `hopper_decode.worthwhile` says that it was measured to be faster.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: before any launch: as `sparse_mla_decode`; a rotation or scratch that does not fit or
            overlaps what is written or read; "gluon" where it does not exist, with the reason.
    """
    num_rows, num_heads = _check_query(q, swa, extra, sink, scale)
    checks.check_grid_rows("q", num_rows)
    inputs = _input_memory(q, swa, extra, sink) | _rotation_memory(rotation, num_rows, q.device)
    if launch is not None and not isinstance(launch, LaunchShape):
        raise TypeError(f"launch: got {type(launch).__name__}, expected a LaunchShape")
    arch = architecture(q.device)
    plan = plan_for(q, swa, extra, launch=launch, splits=splits, path=path) if num_rows else None
    places = plan.splits * num_rows * num_heads if plan is not None and plan.splits > 1 else 0
    scratch = _check_scratch(scratch, places, inputs)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    else:
        _check_output("out", out, torch.bfloat16, tuple(q.shape), inputs | _scratch_memory(scratch))
    if lse is not None:
        others = inputs | _scratch_memory(scratch) | {"out": out}
        _check_output("lse", lse, torch.float32, (num_rows, num_heads), others)
    elif return_lse:
        lse = torch.empty((num_rows, num_heads), dtype=torch.float32, device=q.device)
    diagnostics.record(
        "split_k_decode", q=q, out=out, swa_width=swa.width, extra_width=extra.width if extra is not None else 0,
        launch=str(plan.launch) if plan is not None else None, splits=plan.splits if plan is not None else None,
        path=plan.path if plan is not None else None, rotation=rotation is not None,
    )  # fmt: skip
    if plan is None:
        return out, lse

    second = extra if extra is not None else swa
    split = plan.splits > 1
    finish = (
        rotation.positions if rotation is not None else q,
        rotation.cos if rotation is not None else q,
        rotation.sin if rotation is not None else q,
    )
    strides = (
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
        rotation.cos.stride(0) if rotation is not None else 0,
        rotation.sin.stride(0) if rotation is not None else 0,
        rotation.cos.shape[0] if rotation is not None else 0,
    )
    flags = {"HAS_SINK": sink is not None, "HAS_LSE": lse is not None, "HAS_ROPE": rotation is not None}
    if plan.path == "gluon":
        hopper_decode.launch_partials(
            q, swa, extra, sink=sink, rotation=rotation, scale_log2=scale * _LOG2_E_FLOAT, splits=plan.splits, out=out,
            lse=lse, parts=scratch.parts, part_lses=scratch.lses,
        )  # fmt: skip
    else:
        modes = (decode_mode(swa.cache.dialect, arch), decode_mode(second.cache.dialect, arch))
        _split_k_decode_kernel[(triton.cdiv(num_heads, plan.launch.block_h), num_rows, plan.splits)](
            q,
            out,
            lse if lse is not None else out,
            sink if sink is not None else q,
            *finish,
            scratch.parts if split else out,
            scratch.lses if split else out,
            *_scope_arguments(swa),
            *_scope_arguments(second),
            q.stride(0),
            q.stride(1),
            *strides,
            num_rows,
            num_heads,
            plan.splits,
            scale * _LOG2_E_FLOAT,
            SWA_BLOCK=swa.cache.block_size,
            SWA_MODE=modes[0],
            EXTRA_BLOCK=second.cache.block_size,
            EXTRA_MODE=modes[1],
            HAS_EXTRA=extra is not None,
            SPLIT=split,
            **(dict.fromkeys(flags, False) if split else flags),  # the reduce finishes what is split
            HALVES=in_halves(plan.launch, *modes),
            BLOCK_H=plan.launch.block_h,
            BLOCK_K=plan.launch.block_k,
            num_warps=plan.launch.num_warps,
            num_stages=plan.launch.num_stages,
        )
    if split:
        padded = max(2, triton.next_power_of_2(plan.splits))
        _reduce_splits_kernel[(num_heads, num_rows)](
            scratch.parts,
            scratch.lses,
            sink if sink is not None else q,
            *finish,
            out,
            lse if lse is not None else out,
            *strides,
            num_rows,
            num_heads,
            plan.splits,
            PADDED=padded,
            **flags,
            CHUNK=min(padded, REDUCE_CHUNK),
            num_warps=REDUCE_WARPS,
        )
    return out, lse


def _rotation_memory(rotation: QueryRotation | None, num_rows: int, where: torch.device) -> dict[str, Tensor]:
    """Check the rotation against the queries, and return what the kernel reads of it by name."""
    if rotation is None:
        return {}
    if not isinstance(rotation, QueryRotation):
        raise TypeError(f"rotation: got {type(rotation).__name__}, expected a QueryRotation")
    if rotation.positions.shape[0] != num_rows or rotation.positions.device != where:
        raise ValueError(
            f"rotation: got {rotation.positions.shape[0]} positions on {rotation.positions.device}, "
            f"expected {num_rows} on {where}"
        )
    return {"positions": rotation.positions, "cos": rotation.cos, "sin": rotation.sin}


def _check_scratch(scratch: SplitScratch | None, places: int, inputs: dict[str, Tensor]) -> SplitScratch:
    """The caller's scratch, if it fits and lives nowhere else; otherwise a new one."""
    where = inputs["q"].device
    if scratch is None:
        return SplitScratch.allocate(places, where)
    if not isinstance(scratch, SplitScratch):
        raise TypeError(f"scratch: got {type(scratch).__name__}, expected a SplitScratch")
    if scratch.parts.shape[0] < places or scratch.parts.device != where:
        raise ValueError(
            f"scratch: got {scratch.parts.shape[0]} places on {scratch.parts.device}, "
            f"expected at least {places} (splits x rows x heads) on {where}"
        )
    for name, written in _scratch_memory(scratch).items():
        for other_name, other in inputs.items():
            checks.check_no_overlap(name, written, other_name, other)
    return scratch


def _scratch_memory(scratch: SplitScratch) -> dict[str, Tensor]:
    return {"scratch.parts": scratch.parts, "scratch.lses": scratch.lses}
