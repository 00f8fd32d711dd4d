"""Inverse RoPE of attention outputs in one launch, in place: for producers that cannot rotate what they write.

An output row carries rotated dims because keys are values too. `merge_scopes`, `split_k_decode` and
`sparse_mla_prefill` turn them back in fp32 before they round; this kernel does it afterwards, on the rounded numbers,
and touches nothing but the last 64 dims of each head: 256 bytes of traffic where a copy of the whole head takes 2,048::

    a' = a cos + b sin,   b' = b cos - a sin        on interleaved pairs (a, b) = (x[448 + 2i], x[449 + 2i])

Rows in front of `first` are left alone: a batch may hold rows that a kernel has turned already. `first` is a number on
the device, because a Python number would be frozen by a graph or by a compiler that drops its guards (H07, H09).

Reference: `dsv4ref.ref.rope.rotate_back_ref`.
Source of the idea: vllm#45103 (one launch for about ten operators; it copies whole rows), ROCm/ATOM (in place).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla.merge import QueryRotation

__all__ = ["HEADS_PER_PROGRAM", "WARPS", "rotate_rows"]

HEADS_PER_PROGRAM = 16
"""Heads one program turns: 2 KiB of bf16, 16 values for each lane of one wave of 64."""
WARPS = 1

# Layout constants as the kernel sees them; equal to those of formats.kv_cache (a test holds that).
_NOPE = tl.constexpr(448)
_ROPE = tl.constexpr(64)
_PAIRS = tl.constexpr(32)


@triton.jit
def _rotate_rows_kernel(
    x,
    positions,
    cos,
    sin,
    first,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_heads,
    HAS_FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64)
    live = heads < num_heads
    if HAS_FIRST:
        live = live & (row >= tl.load(first))
    # int64 before the products: rows of a large prefill lie further apart than 2^31 bytes (H26).
    at = x + row * x_stride_t + heads[:, None].to(tl.int64) * x_stride_h + _NOPE + tl.arange(0, _ROPE)[None, :]
    a, b = tl.split(tl.reshape(tl.load(at, mask=live[:, None], other=0.0).to(tl.float32), (BLOCK_H, _PAIRS, 2)))

    position = tl.load(positions + row)
    known = (position >= 0) & (position < num_positions)
    pairs = tl.arange(0, _PAIRS)
    readable = known & (pairs < _PAIRS)
    # A position outside the tables shows: its rotated dims become NaN, and nothing is read.
    at_table = position.to(tl.int64)
    c = tl.load(cos + at_table * cos_stride + pairs, mask=readable, other=float("nan"))[None, :]
    s = tl.load(sin + at_table * sin_stride + pairs, mask=readable, other=float("nan"))[None, :]
    # Zeros stay zeros, whatever the tables say: a padded row has neither keys nor a position.
    turn = (a != 0.0) | (b != 0.0)
    turned = tl.join(tl.where(turn, a * c + b * s, a), tl.where(turn, b * c - a * s, b))
    tl.store(at, tl.reshape(turned, (BLOCK_H, _ROPE)).to(x.dtype.element_ty), mask=live[:, None])


def rotate_rows(x: Tensor, rotation: QueryRotation, *, first: Tensor | None = None) -> Tensor:
    """Rotate the last 64 dims of attention outputs back to their queries' positions, in place, one kernel launch.

    Args:
        x: bf16 or fp32 ``[T, H, 512]``, any row and head stride, unit last stride; the first 448 dims are not touched.
        rotation: positions of the T rows, and the tables. A row outside them becomes NaN unless it is zero.
        first: int32 ``[1]`` on the device: rows before it are left alone. None turns all.

    Returns:
        ``x``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device, or an ``x`` that overlaps what is read.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"x: got {x.dtype}, expected torch.bfloat16 or torch.float32")
    checks.check_tensor("x", x, dtype=x.dtype, shape=("T", "H", HEAD_DIM))
    checks.check_writable_rows("x", x)
    if not isinstance(rotation, QueryRotation):
        raise TypeError(f"rotation: got {type(rotation).__name__}, expected a QueryRotation")
    num_rows, num_heads, _ = x.shape
    checks.check_grid_rows("x", num_rows)
    if rotation.positions.shape[0] != num_rows or rotation.positions.device != x.device:
        raise ValueError(
            f"rotation: got {rotation.positions.shape[0]} positions on {rotation.positions.device}, "
            f"expected {num_rows} on {x.device}"
        )
    inputs = {"positions": rotation.positions, "cos": rotation.cos, "sin": rotation.sin}
    if first is not None:
        inputs["first"] = checks.check_tensor("first", first, dtype=torch.int32, shape=(1,), device=x.device)
    for name, other in inputs.items():
        checks.check_no_overlap("x", x, name, other)
    architecture(x.device)  # refuses CPU tensors where kernels are compiled
    diagnostics.record("rotate_rows", x=x, first=first is not None)
    if num_rows == 0 or num_heads == 0:
        return x

    _rotate_rows_kernel[(triton.cdiv(num_heads, HEADS_PER_PROGRAM), num_rows)](
        x,
        rotation.positions,
        rotation.cos,
        rotation.sin,
        first if first is not None else rotation.positions,
        x.stride(0),
        x.stride(1),
        rotation.cos.stride(0),
        rotation.sin.stride(0),
        rotation.cos.shape[0],
        num_heads,
        HAS_FIRST=first is not None,
        BLOCK_H=HEADS_PER_PROGRAM,
        num_warps=WARPS,
    )
    return x
