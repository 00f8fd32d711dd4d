"""Router logits in one launch: a bf16 x bf16 product that is accumulated, and written, in fp32.

    z[m, e] = sum_d x[m, d] * weight[e, d]

A product of two bf16 numbers is exact in fp32, so all rounding is that of the fp32 sum; nothing is rounded to bf16 and
widened again. Every element is summed by one program in an order that shapes alone decide: no atomics, no scratch, and
the same bytes on every call. Other numbers of rows may use another path, so another order.

* Up to 8 rows (`ROWS_PATH`): a program takes one row and two experts, and multiplies and adds in fp32. A matrix tile
  would leave all but 16 programs without work.
* Beyond (`TILES`): matrix tiles. The smallest are cut along D into slices that are summed in order at the end, so that
  all waves of a program have work.

Reference: `dsv4ref.ref.router.router_logits_ref`. Source of the idea: vllm#50268 (fp32 output of the library's GEMM),
vllm#54845 (a Triton kernel for few rows). Hazard: H22.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture

__all__ = ["ROWS_PATH", "TILES", "RouterTile", "router_logits", "select_tile"]


AMD_STAGES = 2
"""Triton's own choice for AMD. More take LDS from waves (the ISA shows it), and nobody has timed them there."""


@dataclass(frozen=True)
class RouterTile:
    """A launch shape.

    Args:
        max_rows: it is used up to this M; None for any.
        block_m, block_e, block_k: rows, experts, and columns of D per step and slice. block_m = 1 is the path without
            matrix units.
        slices: parts of D that are summed apart.
        num_warps: waves per program.
        num_stages: steps of the loop over D that the compiler keeps in flight on Nvidia.
    """

    max_rows: int | None
    block_m: int
    block_e: int
    block_k: int
    slices: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        sliced = f"/{self.slices}" if self.slices > 1 else ""
        return f"{self.block_m}x{self.block_e}x{self.block_k}{sliced} w{self.num_warps}"

    def stages(self, arch: str) -> int:
        """Pipeline stages of a launch on an architecture: named here, for the launch and for whoever compiles it."""
        return AMD_STAGES if arch.startswith("gfx") else self.num_stages

    def programs(self, rows: int, experts: int) -> int:
        """Programs of a launch."""
        return -(-rows // self.block_m) * -(-experts // self.block_e)


ROWS_PATH = RouterTile(8, 1, 2, 1024, 1, 4, 3)
"""One row and two experts to a program: 128 programs for one token and 256 experts."""

TILES = (
    RouterTile(128, 16, 16, 64, 4, 4, 4),
    RouterTile(1024, 32, 32, 128, 1, 4, 4),
    RouterTile(4096, 64, 64, 64, 1, 4, 4),
    RouterTile(None, 64, 64, 64, 1, 4, 3),
)
"""Blocks are chosen by counting programs, not by measuring: 128 rows of 256 experts make 128, 1,024 make 256, 8,192
make 512. Stages were tried, one to four, on an H200: four hide more of the way to memory; but with four only three
programs of 64 x 64 fit an SM, too few for 512 at once.
"""


def select_tile(rows: int) -> RouterTile:
    """The launch shape for a number of rows; ValueError for a negative one."""
    if rows < 0:
        raise ValueError(f"rows: got {rows}, expected at least 0")
    return next(t for t in (ROWS_PATH, *TILES) if t.max_rows is None or rows <= t.max_rows)


@triton.jit
def _router_rows_kernel(
    x, weight, out, experts, depth, x_stride, out_stride, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):
    """z[m, e] for one row: lanes add up their own columns, and one sum over lanes ends it."""
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_K)
    real = numbers < experts
    weight_at = weight + numbers[:, None].to(tl.int64) * depth + columns[None, :]
    total = tl.zeros((BLOCK_E, BLOCK_K), dtype=tl.float32)
    for first in range(0, depth, BLOCK_K):
        inside = columns < depth - first
        a = tl.load(x + row * x_stride + first + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_at + first, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += a[None, :] * w
    tl.store(out + row * out_stride + numbers, tl.sum(total, axis=1), mask=real)


@triton.jit
def _router_tile_kernel(
    x,
    weight,
    out,
    rows,
    experts,
    depth,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """z[m, e] for BLOCK_M rows and BLOCK_E experts; slice s takes every SLICES-th block of columns."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    numbers = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    there, real = tokens < rows, numbers < experts
    x_rows = x + tokens.to(tl.int64) * x_stride  # [BLOCK_M]
    w_rows = weight + numbers.to(tl.int64) * depth  # [BLOCK_E]
    if SLICES == 1:
        columns = tl.arange(0, BLOCK_K)
        z = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for first in range(0, depth, BLOCK_K):
            inside = columns < depth - first
            a = tl.load(x_rows[:, None] + first + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + first + columns[:, None], mask=real[None, :] & inside[:, None], other=0.0)
            z = tl.dot(a, w, z)
    else:
        columns = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [SLICES, BLOCK_K]
        sums = tl.zeros((SLICES, BLOCK_M, BLOCK_E), dtype=tl.float32)
        for first in range(0, depth, SLICES * BLOCK_K):
            inside = columns < depth - first
            a = tl.load(
                x_rows[None, :, None] + first + columns[:, None, :],
                mask=there[None, :, None] & inside[:, None, :],
                other=0.0,
            )
            w = tl.load(
                w_rows[None, None, :] + first + columns[:, :, None],
                mask=real[None, None, :] & inside[:, :, None],
                other=0.0,
            )
            sums = tl.dot(a, w, sums)
        z = tl.sum(sums, axis=0)
    at = out + tokens[:, None].to(tl.int64) * out_stride + numbers[None, :]
    tl.store(at, z, mask=there[:, None] & real[None, :])


def router_logits(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Router logits ``x weight^T`` in fp32, one kernel launch.

    Args:
        x: bf16 ``[M, D]``, any row stride, unit last stride.
        weight: bf16 ``[E, D]`` contiguous.
        out: fp32 ``[M, E]`` to write into, rows may be strided; allocated if None.

    Returns:
        ``out``. NaN and infinity in a row of x, or of the weight, reach that row's, or that expert's, logits only.

    Raises:
        TypeError, ValueError: wrong dtype, shape, stride or device; ``out`` sharing memory with an input.
    """
    checks.check_tensor("x", x, dtype=torch.bfloat16, shape=("M", "D"))
    rows, depth = x.shape
    if depth < 1:
        raise ValueError(f"x: got shape {list(x.shape)}, expected at least one column")
    if depth > 1 and x.stride(1) != 1:
        raise ValueError(f"x: got strides {x.stride()}, expected a unit stride in the last dimension")
    checks.check_tensor("weight", weight, dtype=torch.bfloat16, shape=("E", depth), device=x.device, contiguous=True)
    arch = architecture(x.device)  # refuses CPU tensors where kernels are compiled
    experts = weight.shape[0]
    if out is None:
        out = torch.empty((rows, experts), dtype=torch.float32, device=x.device)
    else:
        checks.check_tensor("out", out, dtype=torch.float32, shape=(rows, experts), device=x.device)
        checks.check_writable_rows("out", out)
        checks.check_no_overlap("out", out, "x", x)
        checks.check_no_overlap("out", out, "weight", weight)
    if out.numel() == 0:
        return out
    tile = select_tile(rows)
    stages = tile.stages(arch)
    grid = (-(-rows // tile.block_m), -(-experts // tile.block_e))
    if tile.block_m == 1:
        _router_rows_kernel[grid](
            x, weight, out, experts, depth, x.stride(0), out.stride(0), BLOCK_E=tile.block_e, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=stages,
        )  # fmt: skip
    else:
        _router_tile_kernel[grid](
            x, weight, out, rows, experts, depth, x.stride(0), out.stride(0), BLOCK_M=tile.block_m,
            BLOCK_E=tile.block_e, BLOCK_K=tile.block_k, SLICES=tile.slices, num_warps=tile.num_warps,
            num_stages=stages,
        )  # fmt: skip
    return out
