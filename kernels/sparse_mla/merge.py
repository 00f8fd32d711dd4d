"""Merge of partial attention results by their LSE, with the sink and an optional inverse RoPE: one kernel.

One program handles a few heads of one query row: it reads the N LSEs of each head, then each part once, and writes::

    lse       = ln sum_i exp(lse_i)
    out[t, h] = sum_i exp(lse_i - lse) part_i[t, h] / (1 + exp(sink_h - lse)),   rotated back to the query's position

Arithmetic is fp32; the parts may be bf16 or fp32. What empty parts, infinities and NaN mean is the reference's
definition: -inf *and* +inf are empty parts, a part of weight 0 is masked, all empty is exactly zero.

Reference: `dsv4ref.ref.merge.merge_scopes_ref`, `dsv4ref.ref.rope.rotate_back_ref`. Hazards: H12, H16.
Source of the semantics: FlashMLA's combine; vLLM's merge_attn_states; vllm#57435 (rotation inside the reduce).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.formats.kv_cache import HEAD_DIM, ROPE_DIM
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture

__all__ = ["HEADS_PER_PROGRAM", "MAX_PARTS", "WARPS", "QueryRotation", "merge_scopes"]

HEADS_PER_PROGRAM = 4
"""Heads one program merges; with `WARPS` waves, one head of 512 dims per wave of 64 lanes: 16-byte loads of bf16."""
WARPS = 4
MAX_PARTS = 16
"""Parts one launch merges. Their number is compiled in, so that the loads of all parts are in flight at once, which
takes registers: 16 fp32 parts leave two waves per SIMD on gfx942, 32 leave one, and 64 spill (Triton 3.7.1)."""

_PAIRS = ROPE_DIM // 2

# Layout constants as the kernel sees them; equal to those of formats.kv_cache (a test holds that).
_DIM = tl.constexpr(512)
_ROPE_PAIRS = tl.constexpr(32)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_lse(lses, live):
    """Natural LSEs of one part; +inf, as some kernels mark a row without keys, becomes -inf."""
    value = tl.load(lses, mask=live, other=float("-inf"))
    return tl.where(value == float("inf"), float("-inf"), value)


@triton.jit
def _rotate_back(x, cos, sin, known, BLOCK_H: tl.constexpr):
    """a' = a cos + b sin, b' = b cos - a sin on the pairs of the last 64 dims of x, ``[BLOCK_H, 512]`` or its end."""
    PAIRS: tl.constexpr = x.shape[1] // 2
    FIRST: tl.constexpr = PAIRS - _ROPE_PAIRS
    a, b = tl.split(tl.reshape(x, (BLOCK_H, PAIRS, 2)))  # [BLOCK_H, PAIRS] each
    pairs = tl.arange(0, PAIRS)
    rotated = pairs >= FIRST
    pair = tl.where(rotated, pairs - FIRST, 0)
    # A position outside the tables shows: its rotated dims become NaN, and nothing is read.
    c = tl.load(cos + pair, mask=rotated & known, other=float("nan"))[None, :]
    s = tl.load(sin + pair, mask=rotated & known, other=float("nan"))[None, :]
    # Zeros stay zeros, whatever the tables say: a padded row has neither keys nor a position.
    turn = rotated[None, :] & ((a != 0.0) | (b != 0.0))
    return tl.reshape(tl.join(tl.where(turn, a * c + b * s, a), tl.where(turn, b * c - a * s, b)), (BLOCK_H, 2 * PAIRS))


@triton.jit
def _merge_scopes_kernel(
    partials,
    lses,
    sink,
    positions,
    cos,
    sin,
    out,
    lse,
    part_stride_n,
    part_stride_t,
    part_stride_h,
    lses_stride_n,
    lses_stride_t,
    lses_stride_h,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_heads,
    PARTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    live = heads < num_heads
    row = tl.program_id(1).to(tl.int64)
    # int64 before the products: parts of a large batch lie further apart than 2^31 elements (H26).
    wide = heads.to(tl.int64)
    lses_at = lses + row * lses_stride_t + wide * lses_stride_h  # [BLOCK_H]

    # lse = ln sum_i exp(lse_i), around the largest lse_i
    largest = _load_lse(lses_at, live)
    for i in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, _load_lse(lses_at + tl.cast(i, tl.int64) * lses_stride_n, live))
    # Every part empty: any finite reference will do, and -inf - -inf would be NaN (H16).
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for i in tl.static_range(PARTS):
        part_lse = _load_lse(lses_at + tl.cast(i, tl.int64) * lses_stride_n, live)
        total += tl.exp2((part_lse - reference) * _LOG2_E)
    empty = total == 0.0
    merged_lse = reference + tl.log2(total) * _LN_2
    if HAS_LSE:
        lse_at = lse + row * lse_stride_t + wide * lse_stride_h
        tl.store(lse_at, tl.where(empty, float("-inf"), merged_lse), mask=live)

    # 1 / (1 + exp(sink - lse)): once, for the merged row. Overflow to inf gives the share 0 that is meant.
    share = tl.where(empty, 0.0, 1.0 / total)
    if HAS_SINK:
        logit = tl.load(sink + heads, mask=live, other=float("-inf"))
        kept = 1.0 / (1.0 + tl.exp2((logit - merged_lse) * _LOG2_E))
        share = tl.where(empty, 0.0, share * kept)

    # o = sum_i exp(lse_i - lse) o_i, times the sink's factor
    dims = tl.arange(0, _DIM)
    part_at = partials + row * part_stride_t + wide[:, None] * part_stride_h + dims[None, :]
    result = tl.zeros((BLOCK_H, _DIM), dtype=tl.float32)
    for i in tl.static_range(PARTS):
        part_lse = _load_lse(lses_at + tl.cast(i, tl.int64) * lses_stride_n, live)
        weight = tl.exp2((part_lse - reference) * _LOG2_E) * share
        # The term is masked, and not even loaded: an empty part may hold anything, and 0 x NaN is NaN (H12, H16).
        counts = live & (weight != 0.0)
        part = tl.load(part_at + tl.cast(i, tl.int64) * part_stride_n, mask=counts[:, None], other=0.0)
        result += tl.where(counts[:, None], weight[:, None] * part.to(tl.float32), 0.0)

    if HAS_ROPE:
        position = tl.load(positions + row)
        known = (position >= 0) & (position < num_positions)
        at = position.to(tl.int64)
        result = _rotate_back(result, cos + at * cos_stride, sin + at * sin_stride, known, BLOCK_H)
    out_at = out + row * out_stride_t + wide[:, None] * out_stride_h + dims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True)
class QueryRotation:
    """Where the queries stand, and the tables of cos and sin that rotate an output back there.

    Args:
        positions: int32 or int64 ``[T]`` contiguous, absolute. A position outside the tables makes the rotated dims of
            its row NaN, unless the row has no key (zeros have no direction).
        cos, sin: fp32 ``[P, 32]``, unit last stride: the angle of pair i at position p, from 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device, naming the field.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __post_init__(self) -> None:
        dtype = _dtype_among("positions", self.positions, torch.int32, torch.int64)
        checks.check_tensor("positions", self.positions, dtype=dtype, shape=("T",), contiguous=True)
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            checks.check_tensor(name, table, dtype=torch.float32, shape=("P", _PAIRS), device=self.positions.device)
            if table.stride(1) != 1:
                raise ValueError(f"{name}: got strides {table.stride()}, expected a unit stride in the last dimension")
        if self.cos.shape[0] != self.sin.shape[0]:
            raise ValueError(f"sin: got {self.sin.shape[0]} positions, expected {self.cos.shape[0]} like cos")

    @staticmethod
    def of(positions: Tensor, freqs: Tensor, length: int) -> QueryRotation:
        """Tables for positions 0 to ``length`` - 1 from frequencies: once per model, not once per step.

        Args:
            positions: as the field.
            freqs: fp32 ``[32]``, as `dsv4ref.ref.rope`; angles are fp32 products, which is part of the model.
            length: number of positions.
        """
        checks.check_tensor("freqs", freqs, dtype=torch.float32, shape=(_PAIRS,))
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length: got {length!r}, expected a positive integer")
        angles = torch.arange(length, dtype=torch.float32, device=freqs.device)[:, None] * freqs
        return QueryRotation(positions, torch.cos(angles), torch.sin(angles))


def merge_scopes(
    partials: Tensor,
    lses: Tensor,
    *,
    sink: Tensor | None = None,
    rotation: QueryRotation | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Merge N partial attention results of T query rows, one kernel launch.

    Args:
        partials: bf16 or fp32 ``[N, T, H, 512]``, any other strides, unit last stride: normalised, without the sink.
            Producers that write into a caller's buffer write into ``partials[i]``, and nothing is copied.
        lses: fp32 ``[N, T, H]``, any strides: natural LSE per part, without the sink. -inf and +inf are empty parts,
            whose ``partials`` may hold anything; a base-2 LSE has to be multiplied by ln 2 first.
        sink: fp32 ``[H]`` contiguous, natural-log logit per head; None for none. -inf has no effect, +inf zeroes rows.
        rotation: rotate the last 64 dims back to the queries' positions, in fp32 before rounding; None leaves them.
        out: bf16 or fp32 ``[T, H, 512]`` to write into, any row and head stride, unit last stride, sharing no memory
            with any input; bf16, allocated, if None. Every element is written, rows without a key with zeros.
        lse: fp32 ``[T, H]`` to write the merged natural LSE (without the sink) into; implies `return_lse`.
        return_lse: allocate and return the LSE. Empty rows give -inf.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride, device, or an output that overlaps an input.
    """
    inputs = _check_inputs(partials, lses, sink, rotation)
    parts, num_rows, num_heads, _ = partials.shape
    where = partials.device
    _check_outputs(out, lse, inputs)
    if out is None:
        out = torch.empty((num_rows, num_heads, HEAD_DIM), dtype=torch.bfloat16, device=where)
    if lse is None and return_lse:
        lse = torch.empty((num_rows, num_heads), dtype=torch.float32, device=where)
    architecture(where)  # refuses CPU tensors where kernels are compiled
    diagnostics.record("merge_scopes", partials=partials, out=out, sink=sink is not None, rotation=rotation is not None)
    if num_rows == 0:
        return out, lse

    grid = (triton.cdiv(num_heads, HEADS_PER_PROGRAM), num_rows)
    _merge_scopes_kernel[grid](
        partials,
        lses,
        sink if sink is not None else lses,
        rotation.positions if rotation is not None else lses,
        rotation.cos if rotation is not None else lses,
        rotation.sin if rotation is not None else lses,
        out,
        lse if lse is not None else lses,
        *partials.stride()[:3],
        *lses.stride(),
        *out.stride()[:2],
        *(lse.stride() if lse is not None else (0, 0)),
        rotation.cos.stride(0) if rotation is not None else 0,
        rotation.sin.stride(0) if rotation is not None else 0,
        rotation.cos.shape[0] if rotation is not None else 0,
        num_heads,
        PARTS=parts,
        HAS_SINK=sink is not None,
        HAS_ROPE=rotation is not None,
        HAS_LSE=lse is not None,
        BLOCK_H=HEADS_PER_PROGRAM,
        num_warps=WARPS,
    )
    return out, lse


def _check_inputs(
    partials: Tensor, lses: Tensor, sink: Tensor | None, rotation: QueryRotation | None
) -> dict[str, Tensor]:
    """Check what the kernel reads, and return it by the name an error should give it."""
    dtype = _dtype_among("partials", partials, torch.bfloat16, torch.float32)
    checks.check_tensor("partials", partials, dtype=dtype, shape=("N", "T", "H", HEAD_DIM))
    parts, num_rows, num_heads, _ = partials.shape
    if not 1 <= parts <= MAX_PARTS:
        raise ValueError(f"partials: got {parts} parts, expected 1 to {MAX_PARTS}")
    checks.check_grid_rows("partials", num_rows)
    if num_heads < 1:
        raise ValueError(f"partials: got {num_heads} heads, expected at least 1")
    if partials.stride(3) != 1:
        raise ValueError(f"partials: got strides {partials.stride()}, expected a unit stride in the last dimension")
    where = partials.device
    checks.check_tensor("lses", lses, dtype=torch.float32, shape=(parts, num_rows, num_heads), device=where)
    inputs = {"partials": partials, "lses": lses}
    if sink is not None:
        checks.check_tensor("sink", sink, dtype=torch.float32, shape=(num_heads,), device=where, contiguous=True)
        inputs["sink"] = sink
    if rotation is not None:
        if not isinstance(rotation, QueryRotation):
            raise TypeError(f"rotation: got {type(rotation).__name__}, expected a QueryRotation")
        if rotation.positions.shape[0] != num_rows or rotation.positions.device != where:
            raise ValueError(
                f"rotation: got {rotation.positions.shape[0]} positions on {rotation.positions.device}, "
                f"expected {num_rows} on {where}"
            )
        inputs |= {"positions": rotation.positions, "cos": rotation.cos, "sin": rotation.sin}
    return inputs


def _check_outputs(out: Tensor | None, lse: Tensor | None, inputs: dict[str, Tensor]) -> None:
    """Check what the kernel writes, where it came from the caller: that it fits, and that nothing else lives there."""
    _, num_rows, num_heads, _ = inputs["partials"].shape
    where = inputs["partials"].device
    if out is not None:
        dtype = _dtype_among("out", out, torch.bfloat16, torch.float32)
        checks.check_tensor("out", out, dtype=dtype, shape=(num_rows, num_heads, HEAD_DIM), device=where)
        inputs = inputs | {"out": out}
    if lse is not None:
        checks.check_tensor("lse", lse, dtype=torch.float32, shape=(num_rows, num_heads), device=where)
    for name, written in (("out", out), ("lse", lse)):
        if written is not None:
            checks.check_writable_rows(name, written)
            for other_name, other in inputs.items():
                if other_name != name:
                    checks.check_no_overlap(name, written, other_name, other)


def _dtype_among(name: str, tensor: object, first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The tensor's dtype, if it is one of the two."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in (first, second):
        raise TypeError(f"{name}: got {tensor.dtype}, expected {first} or {second}")
    return tensor.dtype
