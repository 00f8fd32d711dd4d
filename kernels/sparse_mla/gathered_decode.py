"""Sparse MLA decode over gathered rows: the decode of `decode.py`, with dense rows in the place of paged entries.

The block scales are folded into the keys, not into the scores: a code has four significant bits, so code * 2^e is exact
in bf16 and one product serves both Q K and P V. (A matrix unit that multiplies FP8 operands has to scale seven partial
dot products per key instead, and P once per block of 64 dims; powers of two make both exact as well.) Everything after
the load is `decode.py`'s arithmetic line by line, so that equal tiles see equal operands in equal order.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`. Rows: `dsv4ref.kernels.sparse_mla.fp8_gather`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import _decode_codes, _decode_scales, _join_keys, architecture, decode_mode
from dsv4ref.kernels.sparse_mla.decode import _LOWEST, _attend_tile, _check_output
from dsv4ref.kernels.sparse_mla.fp8_gather import GatheredScope
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

__all__ = ["GATHERED_LAUNCH", "gathered_launch", "sparse_mla_decode_gathered"]

_LOG2_E = math.log2(math.e)

# Layout constants as the kernel sees them; equal to those of formats.kv_cache (a test holds that).
_NOPE = tl.constexpr(448)
_ROPE = tl.constexpr(64)
_DIM = tl.constexpr(512)
_SCALE_BLOCK = tl.constexpr(64)
_SCALE_SLOTS = tl.constexpr(8)

GATHERED_LAUNCH = {
    "gfx942": LaunchShape(32, 16, 8),
    "gfx950": LaunchShape(32, 16, 8),
    "sm_90": LaunchShape(64, 64, 8),
}
"""One launch shape per architecture, none of them timed. sm_90's is the paged decode's. gfx942's and gfx950's are
chosen by their ISA: no spills over rows in the dialect that the architecture converts, nor over scales-kept rows in
either."""


def gathered_launch(arch: str) -> LaunchShape:
    """The architecture's launch shape; gfx942's where none is listed, as on the interpreter."""
    return GATHERED_LAUNCH.get(arch, GATHERED_LAUNCH["gfx942"])


@triton.jit
def _load_rows(values, tags, rope, at, valid, KIND: tl.constexpr, MODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys bf16 [BLOCK_K, 512] of gathered rows; rows that are not valid are zero, whatever their bytes."""
    dims = tl.arange(0, _DIM)
    if KIND == "bf16":
        keys = tl.load(values + at[:, None] * _DIM + dims[None, :], mask=valid[:, None], other=0.0)
    elif KIND == "unit scale":
        codes = tl.load(values + at[:, None] * _DIM + dims[None, :], mask=valid[:, None], other=0)
        keys = _decode_codes(codes, MODE)
    else:
        tl.static_assert(KIND == "scales kept")
        is_nope = dims < _NOPE
        code_at = values + at[:, None] * _NOPE + dims[None, :]
        codes = tl.load(code_at, mask=valid[:, None] & is_nope[None, :], other=0)
        groups = tl.arange(0, _SCALE_SLOTS)
        scaled = groups < _SCALE_SLOTS - 1  # the last byte is the validity
        scale_at = tags + at[:, None] * _SCALE_SLOTS + groups[None, :]
        factors = _decode_scales(tl.load(scale_at, mask=valid[:, None] & scaled[None, :], other=127))
        factors = tl.broadcast_to(factors[:, :, None], (BLOCK_K, _SCALE_SLOTS, _SCALE_BLOCK))
        factors = tl.reshape(factors, (BLOCK_K, _DIM))

        rope_dims = tl.where(is_nope, 0, dims - _NOPE)
        rope_at = rope + at[:, None] * _ROPE + rope_dims[None, :]
        tail = tl.load(rope_at, mask=valid[:, None] & (dims >= _NOPE)[None, :], other=0.0)
        keys = _join_keys(codes, factors, tail, is_nope[None, :], MODE)
    return keys


@triton.jit
def _attend_rows(
    query,
    accumulator,
    row_max,
    row_sum,
    values,
    tags,
    rope,
    indptr,
    capacity,
    row,
    scale_log2,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One scope's part of the online softmax; returns the updated (accumulator, row_max, row_sum)."""
    TAGS: tl.constexpr = _SCALE_SLOTS if KIND == "scales kept" else 1
    begin = tl.load(indptr + row)
    end = tl.minimum(tl.load(indptr + row + 1), capacity)
    for start in range(begin, end, BLOCK_K):
        lanes = start + tl.arange(0, BLOCK_K)
        at = lanes.to(tl.int64)  # row * stride passes 2^31 at four million rows (H26)
        valid = tl.load(tags + at * TAGS + (TAGS - 1), mask=lanes < end, other=0) != 0
        keys = _load_rows(values, tags, rope, at, valid, KIND, MODE, BLOCK_K)  # [BLOCK_K, 512]
        accumulator, row_max, row_sum = _attend_tile(
            query, accumulator, row_max, row_sum, keys, valid, scale_log2, MODE
        )  # fmt: skip
    return accumulator, row_max, row_sum


@triton.jit
def _gathered_decode_kernel(
    q,
    out,
    lse,
    sink,
    swa_values,
    swa_tags,
    swa_rope,
    swa_indptr,
    swa_capacity,
    extra_values,
    extra_tags,
    extra_rope,
    extra_indptr,
    extra_capacity,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    num_heads,
    scale_log2,
    KIND: tl.constexpr,
    SWA_MODE: tl.constexpr,
    EXTRA_MODE: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Head blocks of one row are neighbours in launch order, so that their re-reads of the row's keys meet in L2.
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64)
    live = heads < num_heads
    dims = tl.arange(0, _DIM)
    query_at = q + row * q_stride_t + heads[:, None].to(tl.int64) * q_stride_h + dims[None, :]
    query = tl.load(query_at, mask=live[:, None], other=0.0)  # [BLOCK_H, 512]

    accumulator = tl.zeros((BLOCK_H, _DIM), dtype=tl.float32)
    row_max = tl.full((BLOCK_H,), _LOWEST, dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
    accumulator, row_max, row_sum = _attend_rows(
        query, accumulator, row_max, row_sum, swa_values, swa_tags, swa_rope, swa_indptr, swa_capacity,
        row, scale_log2, KIND, SWA_MODE, BLOCK_K,
    )  # fmt: skip
    if HAS_EXTRA:
        accumulator, row_max, row_sum = _attend_rows(
            query, accumulator, row_max, row_sum, extra_values, extra_tags, extra_rope, extra_indptr, extra_capacity,
            row, scale_log2, KIND, EXTRA_MODE, BLOCK_K,
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
    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
    result = accumulator * inverse[:, None]
    out_at = out + row * out_stride_t + heads[:, None].to(tl.int64) * out_stride_h + dims[None, :]
    tl.store(out_at, result.to(tl.bfloat16), mask=live[:, None])


def sparse_mla_decode_gathered(
    q: Tensor,
    swa: GatheredScope,
    extra: GatheredScope | None = None,
    *,
    sink: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    launch: LaunchShape | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Decode attention of T query rows over gathered rows, one kernel launch; the contract of `sparse_mla_decode`.

    Args:
        q: bf16 ``[T, H, 512]``, unit last stride; rope dims rotated.
        swa: first scope, T rows.
        extra: second scope, T rows, gathered into rows of the same kind (the dialect may differ), or None.
        sink: fp32 ``[H]`` contiguous, natural-log logit per head; None for none. -inf has no effect, +inf zeroes rows.
        scale: softmax scale.
        out: bf16 ``[T, H, 512]`` to write into, any row and head stride, unit last stride, sharing no memory with any
            input; allocated if None. Every element is written, rows without a valid key with zeros.
        lse: fp32 ``[T, H]`` to write the natural-log LSE (without the sink) into; implies `return_lse`.
        return_lse: allocate and return the LSE. Empty rows give -inf.
        launch: tile and warps; `gathered_launch` of the architecture if None.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride, device or kind, or an output that overlaps an input.
    """
    num_rows, num_heads = _check_call(q, swa, extra, sink, scale)
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
    launch = launch or gathered_launch(arch)
    diagnostics.record(
        "sparse_mla_decode_gathered", q=q, out=out, rows=swa.buffer.kind.value, swa_width=swa.width,
        extra_width=extra.width if extra is not None else 0, launch=str(launch),
    )  # fmt: skip
    if num_rows == 0:
        return out, lse

    second = extra if extra is not None else swa
    grid = (triton.cdiv(num_heads, launch.block_h), num_rows)
    _gathered_decode_kernel[grid](
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
        KIND=swa.buffer.kind.value,
        SWA_MODE=decode_mode(swa.buffer.dialect, arch),
        EXTRA_MODE=decode_mode(second.buffer.dialect, arch),
        HAS_EXTRA=extra is not None,
        HAS_SINK=sink is not None,
        HAS_LSE=lse is not None,
        BLOCK_H=launch.block_h,
        BLOCK_K=launch.block_k,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out, lse


def _scope_arguments(scope: GatheredScope) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    rows = scope.buffer
    return rows.values, rows.tags, rows.rope if rows.rope is not None else rows.tags, scope.indptr, rows.capacity


def _check_call(
    q: Tensor, swa: GatheredScope, extra: GatheredScope | None, sink: Tensor | None, scale: float
) -> tuple[int, int]:
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
        if not isinstance(scope, GatheredScope):
            raise TypeError(f"{name}: got {type(scope).__name__}, expected a GatheredScope")
        if scope.num_queries != num_rows:
            raise ValueError(f"{name}: its indptr has {scope.num_queries} rows, expected {num_rows} like q")
        if scope.buffer.values.device != q.device:
            raise ValueError(f"{name}: buffer on {scope.buffer.values.device}, expected {q.device} like q")
    if extra is not None and extra.buffer.kind is not swa.buffer.kind:
        raise ValueError(f"extra: got {extra.buffer.kind.value} rows, expected {swa.buffer.kind.value} like swa")
    return num_rows, num_heads


def _input_memory(q: Tensor, swa: GatheredScope, extra: GatheredScope | None, sink: Tensor | None) -> dict[str, Tensor]:
    """Every tensor the kernel reads, by the name an error should give it."""
    inputs = {"q": q}
    if sink is not None:
        inputs["sink"] = sink
    for name, scope in (("swa", swa), ("extra", extra)):
        if scope is not None:
            inputs |= {f"the {name} {plane}": tensor for plane, tensor in scope.buffer.planes.items()}
            inputs[f"the {name} indptr"] = scope.indptr
    return inputs
