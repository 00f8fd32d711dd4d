"""The steps between the expert GEMMs as launches of their own: what a fused layer is held against.

    rows by an index         out[i] = source[index[i]], zeros where the index is -1
    clamped SwiGLU           out = silu(min(g, limit)) * clamp(u, -limit, limit) of rows [g, u]

Reference: `dsv4ref.ref.experts.clamped_swiglu_ref`. Source: doubleword's vLLM fork before commit 29aaf1bbc, where the
activation is computed in token order between two gathers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts.grouped_gemm import _clamped_swiglu

__all__ = ["activate_rows", "gather_rows"]

_LANES = 1024


@triton.jit
def _gather_rows_kernel(source, index, out, columns, source_stride, out_stride, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = column < columns
    taken = tl.load(index + row)
    found = tl.load(source + taken.to(tl.int64) * source_stride + column, mask=inside & (taken >= 0), other=0.0)
    tl.store(out + row * out_stride + column, found, mask=inside)


@triton.jit
def _activate_rows_kernel(rows, out, inner, limit, row_stride, out_stride, CLAMP: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = column < inner
    gate = tl.load(rows + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(rows + row * row_stride + inner + column, mask=inside, other=0.0).to(tl.float32)
    activated = _clamped_swiglu(gate, up, limit, CLAMP)
    tl.store(out + row * out_stride + column, activated.to(out.dtype.element_ty), mask=inside)


def gather_rows(source: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows of ``source`` in another order, one kernel launch.

    Args:
        source: bf16 ``[R, C]``, rows may be strided.
        index: int32 ``[n]`` contiguous, row numbers, -1 for a row of zeros; a plan's ``gather`` or ``scatter``.
        out: bf16 ``[n, C]``, rows may be strided; allocated if None.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device; ``out`` sharing memory with the source.
    """
    _check_rows("source", source)
    checks.check_tensor("index", index, dtype=torch.int32, shape=("n",), device=source.device, contiguous=True)
    architecture(source.device)
    rows, columns = int(index.shape[0]), int(source.shape[1])
    out = _checked_out(out, (rows, columns), source, "source")
    if out.numel():
        _gather_rows_kernel[(rows, -(-columns // _LANES))](
            source, index, out, columns, source.stride(0), out.stride(0), LANES=_LANES, num_warps=4
        )
    return out


def activate_rows(rows: Tensor, limit: float | None, *, out: Tensor | None = None) -> Tensor:
    """Clamped SwiGLU of rows that hold gate and up side by side, one kernel launch.

    Args:
        rows: bf16 ``[n, 2 I]``, rows may be strided.
        limit: of the clamp, positive; None for no clamp.
        out: bf16 ``[n, I]``, rows may be strided; allocated if None.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device; ``out`` sharing memory with the rows.
    """
    _check_rows("rows", rows)
    if rows.shape[1] % 2:
        raise ValueError(f"rows: got shape {list(rows.shape)}, expected gate and up, so an even number of columns")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: got {limit!r}, expected a positive number or None")
    architecture(rows.device)
    count, inner = int(rows.shape[0]), int(rows.shape[1]) // 2
    out = _checked_out(out, (count, inner), rows, "rows")
    if out.numel():
        _activate_rows_kernel[(count, -(-inner // _LANES))](
            rows, out, inner, 0.0 if limit is None else float(limit), rows.stride(0), out.stride(0),
            CLAMP=limit is not None, LANES=_LANES, num_warps=4,
        )  # fmt: skip
    return out


def _check_rows(name: str, tensor: Tensor) -> None:
    checks.check_tensor(name, tensor, dtype=torch.bfloat16, shape=("rows", "columns"))
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a unit stride in the last dimension")


def _checked_out(out: Tensor | None, shape: tuple[int, int], source: Tensor, name: str) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=source.device)
    checks.check_tensor("out", out, dtype=torch.bfloat16, shape=shape, device=source.device)
    checks.check_writable_rows("out", out)
    checks.check_no_overlap("out", out, name, source)
    return out
