"""Single-pass sparse MLA decode over one or two paged FP8 caches with ragged slot lists.

One program handles BLOCK_H heads of one query row: it walks the SWA list, then the extra list, BLOCK_K slots at a time,
with one online softmax over both, folds the attention sink in once at the end and writes the output in place.

    out[t, h] = sum_k exp(s_k) kv_k / (sum_k exp(s_k) + exp(sink_h)),   s_k = scale * q[t, h] . kv_k

Tiles for sm_90's warp group product go through the loop of `halves`, every other one through those here.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`. Layout: `dsv4ref.formats.kv_cache`.
Source of the semantics: DeepSeek-V4 inference/kernel.py; vLLM's ROCm ragged decode; FlashMLA (edge cases).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics, settings
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import _decode_scales, _join_keys, architecture, decode_mode
from dsv4ref.kernels.sparse_mla.halves import _attend_in_halves, in_halves
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch

__all__ = ["sparse_mla_decode"]

_LOG2_E = math.log2(math.e)

# Layout constants as the kernel sees them; equal to those of formats.kv_cache (a test holds that).
_NOPE = tl.constexpr(448)
_DIM = tl.constexpr(512)
_ROPE = tl.constexpr(64)
_SCALE_BLOCK = tl.constexpr(64)
_SCALE_SLOTS = tl.constexpr(8)
_ROW_BYTES = tl.constexpr(576)
# Running maxima start here and not at -inf, so that a tile without a valid slot gives exp2(0) and not exp2(inf - inf).
_LOWEST = tl.constexpr(-1.0e30)
# Rows of a product that one warp group of sm_90 computes together
_WARP_GROUP_HEADS = tl.constexpr(64)


@triton.jit
def _load_keys(
    cache,
    block_stride,
    slots,
    valid,
    BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE_ROPE: tl.constexpr = False,
):
    """Dequantised keys bf16 [BLOCK_K, 512]; rows of invalid slots are zero, so QK and PV never see their bytes.

    The rope dims are 64 columns repeated in registers: fewer loads and addresses than 512 columns of which 448 are
    masked. `WIDE_ROPE` loads them as these, in place, which saves the way through shared memory.
    """
    # Unsigned: a shift and a mask. int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    unsigned = slots.to(tl.uint32)
    block = (unsigned // BLOCK_SIZE).to(tl.int64) * block_stride
    position = (unsigned % BLOCK_SIZE).to(tl.int32)
    rows = block + position * _ROW_BYTES  # [BLOCK_K]
    scales = block + (BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS)  # [BLOCK_K]

    dims = tl.arange(0, _DIM)[None, :]
    is_nope = dims < _NOPE
    codes = tl.load(cache + rows[:, None] + dims, mask=valid[:, None] & is_nope, other=0)

    if MODE == "packed_fn":
        # A row's eight scale bytes as one word, aligned as blocks and rows are. Each thread shifts out the byte that
        # its codes share; nothing goes through shared memory. The last byte is padding, and the rope takes no factor.
        words = tl.load((cache + scales).to(tl.pointer_type(tl.int64)), mask=valid, other=0)
        factors = _decode_scales(((words[:, None] >> (dims // _SCALE_BLOCK * 8)) & 0xFF).to(tl.uint8))
    else:
        groups = tl.arange(0, _SCALE_SLOTS)[None, :]
        scaled = valid[:, None] & (groups < _SCALE_SLOTS - 1)
        factors = _decode_scales(tl.load(cache + scales[:, None] + groups, mask=scaled, other=127))  # [BLOCK_K, 8]
        factors = tl.broadcast_to(factors[:, :, None], (BLOCK_K, _SCALE_SLOTS, _SCALE_BLOCK))
        factors = tl.reshape(factors, (BLOCK_K, _DIM))

    rope_row = (cache + rows + _NOPE).to(tl.pointer_type(tl.bfloat16))
    if WIDE_ROPE:
        rope = tl.load(rope_row[:, None] + (dims - _NOPE), mask=valid[:, None] & (dims >= _NOPE), other=0.0)
    else:
        rope = tl.load(rope_row[:, None] + tl.arange(0, _ROPE)[None, :], mask=valid[:, None], other=0.0)
        rope = tl.broadcast_to(rope[:, None, :], (BLOCK_K, _DIM // _ROPE, _ROPE))
        rope = tl.reshape(rope, (BLOCK_K, _DIM))
    return _join_keys(codes, factors, rope, is_nope, MODE)


@triton.jit
def _weigh_tile(query, row_max, row_sum, keys, valid, scale_log2):
    """Softmax weights bf16 [BLOCK_H, BLOCK_K] of one tile, what earlier tiles decay by, and (row_max, row_sum)."""
    # s_k = scale * q . kv_k, in units of log 2
    scores = tl.dot(query, tl.trans(keys)) * scale_log2  # [BLOCK_H, BLOCK_K]
    scores = tl.where(valid[None, :], scores, _LOWEST)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    decay = tl.exp2(row_max - new_max)
    # The explicit zero matters: in a row without any valid key, scores == new_max and exp2 would give 1.
    weights = tl.where(valid[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    return weights.to(tl.bfloat16), decay, new_max, row_sum


@triton.jit
def _attend_tile(query, accumulator, row_max, row_sum, keys, valid, scale_log2, MODE: tl.constexpr):
    """One tile of the online softmax, over keys bf16 [BLOCK_K, 512] that are zero where not valid.

    Returns the updated (accumulator, row_max, row_sum).
    """
    if MODE == "packed_fn" and query.shape[0] >= _WARP_GROUP_HEADS:
        # On sm_90, of two products in a chain, Triton deals the first to the warps along its rows only: with 64 heads
        # and eight warps both warp groups compute all of the scores. It does not follow a chain out of a branch, and
        # this one is always taken: launchers refuse a scale that is not positive.
        weights = tl.zeros((query.shape[0], keys.shape[0]), dtype=tl.bfloat16)
        decay = tl.zeros((query.shape[0],), dtype=tl.float32)
        if scale_log2 > 0:
            weights, decay, row_max, row_sum = _weigh_tile(query, row_max, row_sum, keys, valid, scale_log2)
    else:
        weights, decay, row_max, row_sum = _weigh_tile(query, row_max, row_sum, keys, valid, scale_log2)
    accumulator = tl.dot(weights, keys, accumulator * decay[:, None])  # [BLOCK_H, 512]
    return accumulator, row_max, row_sum


@triton.jit
def _list_bounds(indptr, row, capacity):
    """Where a row's list begins and ends."""
    return tl.load(indptr + row), tl.minimum(tl.load(indptr + row + 1), capacity)


@triton.jit
def _attend_scope(
    query,
    accumulator,
    row_max,
    row_sum,
    cache,
    indices,
    indptr,
    capacity,
    num_rows,
    block_stride,
    row,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One scope's part of the online softmax; returns the updated (accumulator, row_max, row_sum)."""
    begin, end = _list_bounds(indptr, row, capacity)
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
def _sparse_mla_decode_kernel(
    q,
    out,
    lse,
    sink,
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
    num_heads,
    scale_log2,
    SWA_BLOCK: tl.constexpr,
    SWA_MODE: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    EXTRA_MODE: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Head blocks of one row are neighbours in launch order, so that their re-reads of the row's keys meet in L2.
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64)
    live = heads < num_heads
    # The accumulator has all dims of a row, or the first half of them while `upper` has the others.
    FIRST_DIMS: tl.constexpr = _DIM // 2 if HALVES else _DIM
    dims = tl.arange(0, FIRST_DIMS)
    query_rows = q + row * q_stride_t + heads.to(tl.int64) * q_stride_h  # [BLOCK_H]

    if HALVES:
        tl.static_assert(SWA_MODE == EXTRA_MODE)
        swa_begin, swa_end = _list_bounds(swa_indptr, row, swa_capacity)
        tiles = (swa_end - swa_begin + BLOCK_K - 1) // BLOCK_K
        extra_begin, extra_end = swa_begin, swa_end
        if HAS_EXTRA:
            extra_begin, extra_end = _list_bounds(extra_indptr, row, extra_capacity)
            tiles += (extra_end - extra_begin + BLOCK_K - 1) // BLOCK_K
        accumulator, upper, row_max, row_sum = _attend_in_halves(
            query_rows, live, 0, tiles, swa_cache, swa_indices, swa_begin, swa_end, swa_rows, swa_block_stride,
            extra_cache, extra_indices, extra_begin, extra_end, extra_rows, extra_block_stride,
            scale_log2, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, SWA_MODE, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        query = tl.load(query_rows[:, None] + dims[None, :], mask=live[:, None], other=0.0)  # [BLOCK_H, 512]
        accumulator = tl.zeros((BLOCK_H, _DIM), dtype=tl.float32)
        row_max = tl.full((BLOCK_H,), _LOWEST, dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
        accumulator, row_max, row_sum = _attend_scope(
            query, accumulator, row_max, row_sum,
            swa_cache, swa_indices, swa_indptr, swa_capacity, swa_rows, swa_block_stride,
            row, scale_log2, SWA_BLOCK, SWA_MODE, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        if HAS_EXTRA:
            accumulator, row_max, row_sum = _attend_scope(
                query, accumulator, row_max, row_sum,
                extra_cache, extra_indices, extra_indptr, extra_capacity, extra_rows, extra_block_stride,
                row, scale_log2, EXTRA_BLOCK, EXTRA_MODE, BLOCK_H, BLOCK_K,
            )  # fmt: skip

    # lse = ln sum_k exp(s_k), before the sink; -inf for an empty row
    if HAS_LSE:
        value = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
        lse_at = lse + row * lse_stride_t + heads.to(tl.int64) * lse_stride_h
        tl.store(lse_at, value, mask=live)

    # l' = l * exp(m - m') + exp(sink - m'), o = acc * exp(m - m') / l'
    if HAS_SINK:
        sink_log2 = tl.load(sink + heads, mask=live, other=float("-inf")) * 1.4426950408889634
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
    out_at = out + row * out_stride_t + heads[:, None].to(tl.int64) * out_stride_h + dims[None, :]
    tl.store(out_at, result.to(tl.bfloat16), mask=live[:, None])
    if HALVES:
        tl.store(out_at + FIRST_DIMS, (upper * inverse[:, None]).to(tl.bfloat16), mask=live[:, None])


def sparse_mla_decode(
    q: Tensor,
    swa: Scope,
    extra: Scope | None = None,
    *,
    sink: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    launch: LaunchShape | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Decode attention of T query rows over their SWA and extra slots, one kernel launch.

    Args:
        q: bf16 ``[T, H, 512]``, unit last stride; rope dims rotated.
        swa: first scope, T rows.
        extra: second scope, T rows, or None.
        sink: fp32 ``[H]`` contiguous, natural-log logit per head; None for none. -inf has no effect, +inf zeroes rows.
        scale: softmax scale.
        out: bf16 ``[T, H, 512]`` to write into, any row and head stride, unit last stride, sharing no memory with any
            input; allocated if None. Every element is written, rows without a valid slot with zeros.
        lse: fp32 ``[T, H]`` to write the natural-log LSE (without the sink) into; implies `return_lse`.
        return_lse: allocate and return the LSE. Empty rows give -inf.
        launch: tile and warps. If None: the environment's ``DSV4REF_LAUNCH_SHAPE`` if set, else
            `launch.select_launch` from T, H and ``extra.width``.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride, device, dialect, or an output that overlaps an input.
    """
    num_rows, num_heads = _check_query(q, swa, extra, sink, scale)
    inputs = _input_memory(q, swa, extra, sink)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    else:
        _check_output("out", out, torch.bfloat16, tuple(q.shape), inputs)
    if lse is not None:
        _check_output("lse", lse, torch.float32, (num_rows, num_heads), {**inputs, "out": out})
    elif return_lse:
        lse = torch.empty((num_rows, num_heads), dtype=torch.float32, device=q.device)
    if launch is not None and not isinstance(launch, LaunchShape):
        raise TypeError(f"launch: got {type(launch).__name__}, expected a LaunchShape")
    arch = architecture(q.device)
    if launch is None:
        launch = _asked_for() or select_launch(arch, num_rows, num_heads, extra.width if extra is not None else 0)
    diagnostics.record(
        "sparse_mla_decode", q=q, out=out, swa_width=swa.width, extra_width=extra.width if extra is not None else 0,
        launch=str(launch),
    )  # fmt: skip
    if num_rows == 0:
        return out, lse

    second = extra if extra is not None else swa
    modes = (decode_mode(swa.cache.dialect, arch), decode_mode(second.cache.dialect, arch))
    grid = (triton.cdiv(num_heads, launch.block_h), num_rows)
    _sparse_mla_decode_kernel[grid](
        q,
        out,
        lse if lse is not None else out,
        sink if sink is not None else q,
        *_scope_arguments(swa),
        *_scope_arguments(second),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
        num_heads,
        scale * _LOG2_E,
        SWA_BLOCK=swa.cache.block_size,
        SWA_MODE=modes[0],
        EXTRA_BLOCK=second.cache.block_size,
        EXTRA_MODE=modes[1],
        HAS_EXTRA=extra is not None,
        HAS_SINK=sink is not None,
        HAS_LSE=lse is not None,
        HALVES=in_halves(launch, *modes),
        BLOCK_H=launch.block_h,
        BLOCK_K=launch.block_k,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out, lse


def _asked_for() -> LaunchShape | None:
    """The launch shape the environment asks for, for sweeps."""
    asked = settings.get("DSV4REF_LAUNCH_SHAPE")
    if asked is None:
        return None
    return LaunchShape(asked.block_h, asked.block_k, asked.warps, asked.stages if asked.stages is not None else 1)


def _scope_arguments(scope: Scope) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    cache = scope.cache
    return cache.data, scope.indices, scope.indptr, scope.indices.numel(), cache.rows, cache.block_stride


def _check_query(q: Tensor, swa: Scope, extra: Scope | None, sink: Tensor | None, scale: float) -> tuple[int, int]:
    checks.check_tensor("q", q, dtype=torch.bfloat16, shape=("T", "H", HEAD_DIM))
    num_rows, num_heads = int(q.shape[0]), int(q.shape[1])
    if q.stride(2) != 1:
        raise ValueError(f"q: got strides {q.stride()}, expected a unit stride in the last dimension")
    if num_heads < 1:
        raise ValueError(f"q: got {num_heads} heads, expected at least 1")
    if not (isinstance(scale, float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: got {scale!r}, expected a positive finite float")
    if sink is not None:
        checks.check_tensor("sink", sink, dtype=torch.float32, shape=(num_heads,), device=q.device, contiguous=True)
    for name, scope in (("swa", swa), ("extra", extra)):
        if scope is None and name == "extra":
            continue
        if not isinstance(scope, Scope):
            raise TypeError(f"{name}: got {type(scope).__name__}, expected a Scope")
        if scope.num_queries != num_rows:
            raise ValueError(f"{name}: its indptr has {scope.num_queries} rows, expected {num_rows} like q")
        if scope.cache.data.device != q.device:
            raise ValueError(f"{name}: cache on {scope.cache.data.device}, expected {q.device} like q")
    return num_rows, num_heads


def _input_memory(q: Tensor, swa: Scope, extra: Scope | None, sink: Tensor | None) -> dict[str, Tensor]:
    """Every tensor the kernel reads, by the name an error should give it."""
    inputs = {"q": q}
    if sink is not None:
        inputs["sink"] = sink
    for name, scope in (("swa", swa), ("extra", extra)):
        if scope is not None:
            inputs[f"the {name} cache"] = scope.cache.data
            inputs[f"the {name} indices"] = scope.indices
            inputs[f"the {name} indptr"] = scope.indptr
    return inputs


def _check_output(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], others: dict[str, Tensor]
) -> None:
    """Check a tensor the kernel writes: what it is, that its elements are apart, and that nothing else lives there."""
    checks.check_tensor(name, tensor, dtype=dtype, shape=shape, device=others["q"].device)
    checks.check_writable_rows(name, tensor)
    for other_name, other in others.items():
        checks.check_no_overlap(name, tensor, other_name, other)
