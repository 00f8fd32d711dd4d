"""Sparse MLA prefill over gathered bf16 keys, and which of the two ways to read a prompt's keys is for what.

A prefill step has thousands of query rows of few prompts, so neighbouring rows list mostly the same keys. Upstream
therefore dequantises a chunk's keys once, into a bf16 workspace, and every query row names its own rows of it::

    out[t, h] = sum_k exp(s_k) kv_k / (sum_k exp(s_k) + exp(sink_h)),   s_k = scale * q[t, h] . kv_k,   k in indices[t]

* `sparse_mla_prefill` here reads that workspace: 1,024 bytes a key and nothing to decode.
* Straight from the 584-byte caches, a prefill is `sparse_mla_decode` with one query row per token: same lists, same
  arithmetic, no workspace, and every key decoded again by every row that lists it. There is no second kernel for it.

Prefill has no reduce, so the rotation back to the query's position sits in this kernel's epilogue or in a pass of its
own over the output; on gfx942 and gfx950 the epilogue costs a few registers, no spill and no wave.

One program handles BLOCK_H heads of one query row and walks the row's list BLOCK_K keys at a time; everything after the
load of the keys is the decode's arithmetic line by line, so that equal tiles see equal operands in equal order.
On sm_90 a second kernel does the same work with warps that copy and warps that multiply (`hopper_prefill`); ``path``
says which runs.

The current chunk's keys have to come from the cache as well, not from the projection that has just made them: a later
decode step reads the rounded ones, and prefill at p must equal decode at p.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`, `dsv4ref.ref.rope.rotate_back_ref`.
Source of the semantics: FlashMLA's flash_mla_sparse_fwd (arguments, edge cases); vLLM's DeepSeek-V4 prefill (the
workspace).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla import hopper_prefill
from dsv4ref.kernels.sparse_mla.decode import _check_output
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, Rule, choose
from dsv4ref.kernels.sparse_mla.merge import QueryRotation, _rotate_back

__all__ = ["PREFILL_SELECTION", "Path", "select_prefill_launch", "sparse_mla_prefill"]

Path = Literal["auto", "triton", "gluon"]

_LOG2_E = math.log2(math.e)
_WARPGROUP_ROWS = 64  # the least rows that Hopper's warpgroup product takes
_ROWS_PER_WARP = 16

# Layout constants as the kernel sees them; equal to those of formats.kv_cache (a test holds that).
_DIM = tl.constexpr(512)
# Running maxima start here and not at -inf, so that a tile without a valid key gives exp2(0) and not exp2(inf - inf).
_LOWEST = tl.constexpr(-1.0e30)

_CDNA = (
    Rule(
        LaunchShape(16, 32, 8), "no more than 16 heads to share keys with: a wider tile would be padding", max_heads=16
    ),
    Rule(
        LaunchShape(32, 16, 8),
        "no more than 32 heads to share keys with; tiles of 32 keys spill",
        max_heads=32,
    ),
    Rule(
        LaunchShape(64, 16, 8),
        "a row's keys are read once per 64 heads, in all of gfx942's LDS; tiles of 32 keys spill, and 128 heads need "
        "twice that LDS",
    ),
)
_HOPPER = (
    Rule(
        LaunchShape(16, 64, 4, 2),
        "measured: no more than 16 heads; 64 keys a tile, and the next ones arrive by async copies, which no decoding "
        "of codes stands in the way of here",
        max_heads=16,
    ),
    Rule(
        LaunchShape(32, 32, 4, 3), "measured: no more than 32 heads; four warps, so that programs share an SM",
        max_heads=32,
    ),
    Rule(
        LaunchShape(64, 64, 8, 2),
        "measured: a row's keys are read once per 64 heads and feed wgmma; a third tile of keys does not fit",
    ),
)  # fmt: skip
PREFILL_SELECTION: Mapping[str, tuple[Rule, ...]] = {
    "gfx942": _CDNA, "gfx950": _CDNA, "sm_90": _HOPPER, "cpu": _CDNA,
}  # fmt: skip
"""Rules by architecture, first match wins. sm_90's are the fastest of the shapes tried on a prompt's 4,096 rows (Triton
3.6). None of gfx942's and gfx950's has been timed: they are the widest without spills, at two waves per SIMD (Triton
3.7.1). A prefill step has rows enough to fill any of these devices, so rows do not decide."""


def _products_apart(arch: str, launch: LaunchShape) -> bool:
    """Whether QK must not be seen to lead to PV: on Hopper, with more warps than rows of the tile keep busy."""
    return arch == "sm_90" and launch.block_h >= _WARPGROUP_ROWS and launch.block_h < _ROWS_PER_WARP * launch.num_warps


def select_prefill_launch(arch: str, heads: int) -> LaunchShape:
    """The launch shape for query rows of ``heads`` heads; gfx942's rules where an architecture has none."""
    return choose(PREFILL_SELECTION.get(arch, _CDNA), 1, heads, 0).shape


@triton.jit
def _weigh(query, keys, valid, row_max, row_sum, scale_log2):
    """The online softmax over one tile of keys; returns (weights in bf16, decay, new maximum, new sum)."""
    # s_k = scale * q . kv_k, in units of log 2
    scores = tl.dot(query, tl.trans(keys)) * scale_log2  # [BLOCK_H, BLOCK_K]
    scores = tl.where(valid[None, :], scores, _LOWEST)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    decay = tl.exp2(row_max - new_max)
    # The explicit zero matters: in a row without any valid key, scores == new_max and exp2 would give 1.
    weights = tl.where(valid[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
    return weights.to(tl.bfloat16), decay, new_max, row_sum * decay + tl.sum(weights, axis=1)


@triton.jit
def _sparse_mla_prefill_kernel(
    q,
    kv,
    indices,
    lengths,
    sink,
    positions,
    cos,
    sin,
    out,
    lse,
    q_stride_t,
    q_stride_h,
    kv_stride,
    indices_stride,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_keys,
    width,
    num_heads,
    scale_log2,
    HAS_LENGTHS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Head blocks of one row are neighbours in launch order, so that their re-reads of the row's keys meet in a cache:
    # L2 on sm_90, Infinity Cache on gfx942 and gfx950, which deal neighbours out to dies with an L2 each.
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64)
    live = heads < num_heads
    dims = tl.arange(0, _DIM)
    query_at = q + row * q_stride_t + heads[:, None].to(tl.int64) * q_stride_h + dims[None, :]
    query = tl.load(query_at, mask=live[:, None], other=0.0)  # [BLOCK_H, 512]

    accumulator = tl.zeros((BLOCK_H, _DIM), dtype=tl.float32)
    row_max = tl.full((BLOCK_H,), _LOWEST, dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
    end = width
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + row), width)
    listed = indices + row * indices_stride
    for start in tl.range(0, end, BLOCK_K):
        lanes = start + tl.arange(0, BLOCK_K)
        slots = tl.load(listed + lanes, mask=lanes < end, other=-1)
        valid = (slots >= 0) & (slots < num_keys)
        # int64 before the product: 512 * slot passes 2^31 at four million rows (H26). Rows that are not valid are
        # zero and not only masked in the scores: QK and PV must never see their bytes.
        key_at = kv + slots.to(tl.int64)[:, None] * kv_stride + dims[None, :]
        keys = tl.load(key_at, mask=valid[:, None], other=0.0)  # [BLOCK_K, 512]

        if APART:
            # Always true in this loop. The compiler looks for a second product among the uses of the first, and gives
            # QK all warps along its rows if it finds one: with 64 heads and eight warps each warpgroup computes all of
            # it. It does not look past the end of a branch.
            if start < end:
                weights, decay, new_max, row_sum = _weigh(query, keys, valid, row_max, row_sum, scale_log2)
            else:
                weights = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.bfloat16)
                decay = row_max
                new_max = row_max
        else:
            weights, decay, new_max, row_sum = _weigh(query, keys, valid, row_max, row_sum, scale_log2)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weights, keys, accumulator)  # [BLOCK_H, 512]
        row_max = new_max

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
    if HAS_ROPE:
        position = tl.load(positions + row)
        known = (position >= 0) & (position < num_positions)
        at = position.to(tl.int64)
        result = _rotate_back(result, cos + at * cos_stride, sin + at * sin_stride, known, BLOCK_H)
    out_at = out + row * out_stride_t + heads[:, None].to(tl.int64) * out_stride_h + dims[None, :]
    tl.store(out_at, result.to(tl.bfloat16), mask=live[:, None])


def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
    rotation: QueryRotation | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    launch: LaunchShape | None = None,
    path: Path = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Prefill attention of T query rows over listed rows of a bf16 workspace, one kernel launch.

    Both scopes of a layer stand in one list, as rows of one workspace. For keys that are still in their FP8 caches call
    `dsv4ref.kernels.sparse_mla.sparse_mla_decode` with one query row per token.

    Args:
        q: bf16 ``[T, H, 512]``, unit last stride; rope dims rotated.
        kv: bf16 ``[N, 512]``, any row stride, unit last stride; key and value at once. Rows no list names are not read.
        indices: int32 ``[T, W]``, any row stride, unit last stride: rows of ``kv``. A row below 0 or at least N is
            skipped, wherever it stands; a row listed twice counts twice. W needs no multiple.
        lengths: int32 ``[T]`` contiguous: how many leading entries of its list each row reads, at most W of them; below
            1 is an empty row. None reads all W.
        sink: fp32 ``[H]`` contiguous, natural-log logit per head; None for none. -inf has no effect, +inf zeroes rows.
        scale: softmax scale.
        rotation: rotate the last 64 dims back to the queries' positions, in fp32 before rounding; None leaves them.
        out: bf16 ``[T, H, 512]`` to write into, any row and head stride, unit last stride, sharing no memory with any
            input; allocated if None. Every element is written, rows without a valid key with zeros.
        lse: fp32 ``[T, H]`` to write the natural-log LSE (without the sink) into; implies `return_lse`.
        return_lse: allocate and return the LSE. Empty rows give -inf.
        launch: tile and warps; `select_prefill_launch` from H if None.
        path: "triton" for the portable kernel, "gluon" for Hopper's (sm_90, aligned ``q`` and ``kv``, no ``launch``:
            its tile is fixed), "auto" for Hopper's where it takes the call and `hopper_prefill.FEWEST_HEADS` are there.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device, an output that overlaps an input; a path that is
            none, or "gluon" where it does not exist.
    """
    inputs = _check_inputs(q, kv, indices, lengths, sink, scale) | _rotation_memory(rotation, q)
    num_rows, num_heads, _ = q.shape
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
    taken = _path_for(q, kv, launch, path)
    arch = architecture(q.device)
    launch = launch or (hopper_prefill.TILE if taken == "gluon" else select_prefill_launch(arch, num_heads))
    diagnostics.record(
        "sparse_mla_prefill", q=q, kv=kv, out=out, width=int(indices.shape[1]), lengths=lengths is not None,
        rotation=rotation is not None, launch=str(launch), path=taken,
    )  # fmt: skip
    if num_rows == 0:
        return out, lse
    if taken == "gluon":
        hopper_prefill.launch_prefill(
            q, kv, indices, lengths=lengths, sink=sink, rotation=rotation, scale_log2=scale * _LOG2_E, out=out, lse=lse
        )
        return out, lse

    grid = (triton.cdiv(num_heads, launch.block_h), num_rows)
    _sparse_mla_prefill_kernel[grid](
        q,
        kv,
        indices,
        lengths if lengths is not None else indices,
        sink if sink is not None else q,
        rotation.positions if rotation is not None else q,
        rotation.cos if rotation is not None else q,
        rotation.sin if rotation is not None else q,
        out,
        lse if lse is not None else out,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        indices.stride(0),
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
        rotation.cos.stride(0) if rotation is not None else 0,
        rotation.sin.stride(0) if rotation is not None else 0,
        rotation.cos.shape[0] if rotation is not None else 0,
        kv.shape[0],
        indices.shape[1],
        num_heads,
        scale * _LOG2_E,
        HAS_LENGTHS=lengths is not None,
        HAS_SINK=sink is not None,
        HAS_ROPE=rotation is not None,
        HAS_LSE=lse is not None,
        APART=_products_apart(arch, launch),
        BLOCK_H=launch.block_h,
        BLOCK_K=launch.block_k,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out, lse


def _path_for(q: Tensor, kv: Tensor, launch: LaunchShape | None, path: str) -> str:
    """Which kernel takes a call: "triton" or "gluon"."""
    if path not in get_args(Path):
        raise ValueError(f"path: got {path!r}, expected one of {', '.join(map(repr, get_args(Path)))}")
    reason = hopper_prefill.refusal(q, kv, launch) if path != "triton" else None
    if path == "gluon" and reason is not None:
        raise ValueError(f"path: got 'gluon', but {reason}")
    if path == "triton" or reason is not None:
        return "triton"
    return "gluon" if path == "gluon" or q.shape[1] >= hopper_prefill.FEWEST_HEADS else "triton"


def _check_inputs(
    q: Tensor, kv: Tensor, indices: Tensor, lengths: Tensor | None, sink: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """Check what the kernel reads, and return it by the name an error should give it."""
    checks.check_tensor("q", q, dtype=torch.bfloat16, shape=("T", "H", HEAD_DIM))
    num_rows, num_heads, _ = q.shape
    checks.check_grid_rows("q", num_rows)
    if num_heads < 1:
        raise ValueError(f"q: got {num_heads} heads, expected at least 1")
    checks.check_tensor("kv", kv, dtype=torch.bfloat16, shape=("N", HEAD_DIM), device=q.device)
    checks.check_tensor("indices", indices, dtype=torch.int32, shape=(num_rows, "W"), device=q.device)
    for name, tensor in (("q", q), ("kv", kv), ("indices", indices)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected a unit stride in the last dimension")
    if not (isinstance(scale, float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: got {scale!r}, expected a positive finite float")
    inputs = {"q": q, "kv": kv, "indices": indices}
    if lengths is not None:
        checks.check_tensor(
            "lengths", lengths, dtype=torch.int32, shape=(num_rows,), device=q.device, contiguous=True
        )  # fmt: skip
        inputs["lengths"] = lengths
    if sink is not None:
        checks.check_tensor("sink", sink, dtype=torch.float32, shape=(num_heads,), device=q.device, contiguous=True)
        inputs["sink"] = sink
    return inputs


def _rotation_memory(rotation: QueryRotation | None, q: Tensor) -> dict[str, Tensor]:
    """Check the rotation against the queries, and return what the kernel reads of it by name."""
    if rotation is None:
        return {}
    if not isinstance(rotation, QueryRotation):
        raise TypeError(f"rotation: got {type(rotation).__name__}, expected a QueryRotation")
    if rotation.positions.shape[0] != q.shape[0] or rotation.positions.device != q.device:
        raise ValueError(
            f"rotation: got {rotation.positions.shape[0]} positions on {rotation.positions.device}, "
            f"expected {q.shape[0]} on {q.device}"
        )
    return {"positions": rotation.positions, "cos": rotation.cos, "sin": rotation.sin}
