"""Grouped GEMM over MXFP4 experts: every expert's matrix times the rows that its tokens bring.

    sorted position p of expert e      y[p] = W[e] x[row(p)]
    row(p)                             gather[p] // k with ``gather``, else p itself
    written to                         slot gather[p] with ``scatter``, else p itself
    with a ``limit``                   W = [gate; up]:  h = silu(min(g, limit)) * clamp(u, -limit, limit)

One kernel does the first matrix of a layer (gather and activation fused) and the second (scatter fused). The grid comes
from a `DispatchPlan`: its bound on tiles, times blocks of output columns. Programs behind the last tile leave at once,
so nothing is read back to the host and a captured graph may replay with any routing. No atomics: every element is
written once, by one program, summed in an order that shapes and tile alone decide.

The weight is the *left* operand, so that a tile is computed as its transpose ``[block_n, block_m]``: the decoded weight
is in registers, where wgmma and MFMA take a left operand from, and block_m may be as small as 16.

The activation is fused because its operands are in the accumulators: a program multiplies block_n / 2 gate rows and
the same block_n / 2 up rows. Gate and up are not rounded to bf16 on the way, as `clamped_swiglu_ref` has it with
unrounded inputs.

Weights in the layout ``wgmma`` (`dsv4ref.kernels.experts.mxfp4`) take a path of their own. Eight gate rows and the same
eight up rows follow each other in one left operand: of 16 rows a thread's accumulators hold rows r and r + 8, so gate
and up of a column meet in one thread, and a GEMM with the activation issues the instructions of one without. A block of
more rows than one instruction per warp takes is multiplied in two parts, because the compiler keeps a decoded operand
in registers only for 16 rows to a warp; else it goes through shared memory.

Rows of slots that are not local are neither read nor written: with ``scatter`` they keep what was there (H12).
Whoever reads the result has to leave them out, as `dsv4ref.kernels.experts.expert_layer` does.

Reference: `dsv4ref.ref.experts`. Source of the structure: triton_kernels, ``matmul_ogs``. Hazards: H12, H38, H39.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts.dispatch import DispatchPlan
from dsv4ref.kernels.experts.mxfp4 import STEP, Layout, Mxfp4Weights, _decode_step, _decode_tile
from dsv4ref.kernels.experts.tiles import XCDS, ExpertTile, _xcd_position, select_tile

__all__ = ["GROUP_TILES", "HALVED_ROWS", "grouped_constants", "grouped_gemm"]

GROUP_TILES = 8
"""Tiles that one block of output columns walks before the next block starts: their weights, and the rows of the
tiles, are read again while they are still in the L2."""

HALVED_ROWS = 32
"""Rows of a tile from which on an expert's last tile is multiplied at half that height where its rows fit, with weights
in the layout ``wgmma``: 16 is the least that there is."""


@triton.jit
def _load_weights(packed, scales, row, rows_left, first, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows ``row ..`` of one matrix, columns ``first .. first + BLOCK_K``, decoded; zeros beyond either end."""
    n = tl.arange(0, BLOCK_N)
    pairs = tl.arange(0, BLOCK_K // 2)
    groups = tl.arange(0, BLOCK_K // 32)
    real = (n < rows_left)[:, None]
    rows = (row + n).to(tl.int64)[:, None]
    inside_pairs, inside_groups = real, real
    if K % BLOCK_K:  # a scale byte of another row may be 255, which is NaN (H39)
        inside_pairs = real & (pairs < (K - first) // 2)[None, :]
        inside_groups = real & (groups < (K - first) // 32)[None, :]
    codes = tl.load(packed + rows * (K // 2) + first // 2 + pairs[None, :], mask=inside_pairs, other=0)
    scale = tl.load(scales + rows * (K // 32) + first // 32 + groups[None, :], mask=inside_groups, other=0)
    return _decode_tile(codes, scale, BLOCK_N, BLOCK_K)


@triton.jit
def _load_step(words, scale_words, rows, inside, step, N: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
               PTX: tl.constexpr):  # fmt: skip
    """Rows int64 ``[PART]`` of one step of 128 columns, decoded: weights in the layout ``wgmma``."""
    at = (rows + step * N)[:, None]
    word = tl.arange(0, 16)[None, :]
    if MASKED:
        codes = tl.load(words + at * 16 + word, mask=inside[:, None], other=0)
        scales = tl.load(scale_words + at, mask=inside[:, None], other=0)
    else:
        codes = tl.load(words + at * 16 + word)
        scales = tl.load(scale_words + at)
    return _decode_step(codes, scales, PART, PTX)


@triton.jit
def _clamped_swiglu(gate, up, limit, CLAMP: tl.constexpr):
    """silu(min(g, limit)) * clamp(u, -limit, limit); comparisons, because a minimum would swallow NaN."""
    if CLAMP:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _store(y, out, rows, live, column, columns, out_stride, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Store a transposed tile ``[SIZE, M]``, in pieces of SIZE / PIECES columns of the output."""
    if PIECES == 1:
        n = column + tl.arange(0, SIZE)
        at = out + rows.to(tl.int64)[None, :] * out_stride + n[:, None]
        tl.store(at, y.to(out.dtype.element_ty), mask=(n < columns)[:, None] & live[None, :])
    else:
        HALF: tl.constexpr = SIZE // 2
        low, high = tl.split(tl.permute(tl.reshape(y, (2, HALF, y.shape[1])), (1, 2, 0)))
        _store(low, out, rows, live, column, columns, out_stride, HALF, PIECES // 2)
        _store(high, out, rows, live, column + HALF, columns, out_stride, HALF, PIECES // 2)


@triton.jit
def _grouped_kernel(
    x, packed, scales, out, gather, offsets, tile_expert, tile_first, tiles, limit, x_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr, XCDS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One tile of positions by one block of output columns; PARTS is 0 for weights in the layout of checkpoints."""
    SIZE: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # columns of the output per program
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    BLOCKS: tl.constexpr = (COLUMNS + SIZE - 1) // SIZE
    program = _xcd_position(tl.program_id(0), tl.num_programs(0), XCDS, GROUP)
    # GROUP tiles of the first column block, then of the next; the last group may be shorter.
    first_tile = program // (GROUP * BLOCKS) * GROUP
    in_group = tl.minimum(tiles - first_tile, GROUP)
    tile = first_tile + program % (GROUP * BLOCKS) % in_group
    column = program % (GROUP * BLOCKS) // in_group * SIZE
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        first = tl.load(tile_first + tile)
        end = tl.load(offsets + expert + 1)
        if HALVES:
            if end - first > BLOCK_M // 2:
                _tile(
                    x, packed, scales, out, gather, first, end, expert, column, limit, x_stride, out_stride, N, K,
                    TOP_K, GATHER, SCATTER, GATED, CLAMP, BLOCK_M, BLOCK_N, BLOCK_K, PIECES, PARTS, PTX,
                )  # fmt: skip
            else:
                _tile(
                    x, packed, scales, out, gather, first, end, expert, column, limit, x_stride, out_stride, N, K,
                    TOP_K, GATHER, SCATTER, GATED, CLAMP, BLOCK_M // 2, BLOCK_N, BLOCK_K, PIECES, PARTS, PTX,
                )  # fmt: skip
        else:
            _tile(
                x, packed, scales, out, gather, first, end, expert, column, limit, x_stride, out_stride, N, K,
                TOP_K, GATHER, SCATTER, GATED, CLAMP, BLOCK_M, BLOCK_N, BLOCK_K, PIECES, PARTS, PTX,
            )  # fmt: skip


@triton.jit
def _tile(
    x, packed, scales, out, gather, first, end, expert, column, limit, x_stride, out_stride, N: tl.constexpr,
    K: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, GATED: tl.constexpr,
    CLAMP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions from ``first``, those before ``end``."""
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    slots = positions
    if GATHER or SCATTER:
        slots = tl.load(gather + positions, mask=live, other=0)
    sources = slots // TOP_K if GATHER else positions
    x_rows = x + sources.to(tl.int64)[None, :] * x_stride
    rows = slots if SCATTER else positions
    if PARTS:
        _steps(
            x_rows, packed, scales, out, rows, live, expert, column, limit, out_stride, N, K, GATED, CLAMP, BLOCK_M,
            BLOCK_N, PIECES, PARTS, PTX,
        )  # fmt: skip
    else:
        _pairs(
            x_rows, packed, scales, out, rows, live, expert, column, limit, out_stride, N, K, GATED, CLAMP, BLOCK_M,
            BLOCK_N, BLOCK_K, PIECES,
        )  # fmt: skip


@triton.jit
def _pairs(
    x_rows, packed, scales, out, rows, live, expert, column, limit, out_stride, N: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """A tile with weights in the layout ``checkpoint``: gate and up are two products."""
    SIZE: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # columns of the output per program
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    matrix = expert * N  # first row of the expert's matrix among all
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros((SIZE, BLOCK_M), dtype=tl.float32)
    up = tl.zeros((SIZE, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = live[None, :]
        if K % BLOCK_K:
            inside = inside & (k < K - first)[:, None]
        a = tl.load(x_rows + first + k[:, None], mask=inside, other=0.0)  # [K, M]
        left = COLUMNS - column
        y = tl.dot(_load_weights(packed, scales, matrix + column, left, first, K, SIZE, BLOCK_K), a, y)
        if GATED:
            w = _load_weights(packed, scales, matrix + COLUMNS + column, left, first, K, SIZE, BLOCK_K)
            up = tl.dot(w, a, up)
    if GATED:
        y = _clamped_swiglu(y, up, limit, CLAMP)
    _store(y, out, rows, live, column, COLUMNS, out_stride, SIZE, PIECES)


@triton.jit
def _steps(
    x_rows, words, scale_words, out, rows, live, expert, column, limit, out_stride, N: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A tile with weights in the layout ``wgmma``: one product of PARTS parts, gate and up eight rows by eight."""
    PART: tl.constexpr = BLOCK_N // PARTS
    SIZE: tl.constexpr = PART // 2 if GATED else PART  # columns of the output per part
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    row = tl.arange(0, PART)
    n = row // 16 * 8 + row % 8 if GATED else row
    inside = n < COLUMNS - column
    matrix = expert.to(tl.int64) * (N * (K // 128)) + column
    first_rows = matrix + (n + row // 8 % 2 * COLUMNS if GATED else n)
    k = tl.arange(0, 128)
    y = tl.zeros((PART, BLOCK_M), dtype=tl.float32)
    z = tl.zeros((PART, BLOCK_M), dtype=tl.float32)
    for step in range(K // 128):
        a = tl.load(x_rows + step * 128 + k[:, None], mask=live[None, :], other=0.0)  # [K, M]
        w = _load_step(words, scale_words, first_rows, inside, step, N, PART, COLUMNS % SIZE != 0, PTX)
        if PARTS == 2:
            more = n < COLUMNS - column - SIZE
            v = _load_step(words, scale_words, first_rows + SIZE, more, step, N, PART, COLUMNS % (2 * SIZE) != 0, PTX)
        y = tl.dot(w, a, y)
        if PARTS == 2:
            z = tl.dot(v, a, z)
    _finish(y, out, rows, live, column, limit, out_stride, COLUMNS, GATED, CLAMP, BLOCK_M, PART, PIECES)
    if PARTS == 2:
        _finish(z, out, rows, live, column + SIZE, limit, out_stride, COLUMNS, GATED, CLAMP, BLOCK_M, PART, PIECES)


@triton.jit
def _finish(
    y, out, rows, live, column, limit, out_stride, COLUMNS: tl.constexpr, GATED: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr, PART: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Activate and store one part's accumulators."""
    if GATED:
        SIZE: tl.constexpr = PART // 2
        gate, up = tl.split(tl.permute(tl.reshape(y, (PART // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1)))
        y = tl.reshape(_clamped_swiglu(gate, up, limit, CLAMP), (SIZE, BLOCK_M))
        _store(y, out, rows, live, column, COLUMNS, out_stride, SIZE, PIECES)
    else:
        _store(y, out, rows, live, column, COLUMNS, out_stride, PART, PIECES)


def grouped_gemm(
    x: Tensor,
    weights: Mxfp4Weights,
    plan: DispatchPlan,
    *,
    gather: bool = False,
    scatter: bool = False,
    gated: bool = False,
    limit: float | None = None,
    tile: ExpertTile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each expert's matrix with its rows, one kernel launch.

    Args:
        x: bf16, rows may be strided, unit last stride: ``[M, K]`` with ``gather`` (token rows), else ``[M * k, K]`` by
            sorted position. Rows of slots that are not local are not read.
        weights: one matrix per local expert, ``[N, K]``; with ``gated`` the gate's rows, then as many of up.
        plan: of this batch; its block_m is the tile's.
        gather: position p reads row ``gather[p] // k`` of x.
        scatter: position p writes row ``gather[p]``, so that row ``token * k + choice`` is that choice's product.
        gated: apply the clamped SwiGLU, in fp32, before the store.
        limit: of the clamp, positive; None for no clamp. Only with ``gated``.
        tile: launch shape; `select_tile` with all choices taken for local if None.
        out: bf16 ``[M * k, N]`` (``gated``: ``[M * k, N / 2]``), rows may be strided; allocated if None.

    Returns:
        ``out``. With ``scatter``, rows of slots that are not local are not written; without, the rows behind the last
        local position are not.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, layout or device; a plan for other experts or another
            block_m; ``out`` sharing memory with an operand.
    """
    for name, value, kind in (("weights", weights, Mxfp4Weights), ("plan", plan, DispatchPlan)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a {kind.__name__}")
    if limit is not None and not (gated and limit > 0):
        raise ValueError(f"limit: got {limit!r} with gated={gated}, expected a positive number, and gated=True")
    if gated and weights.n % 2:
        raise ValueError(f"weights: got {weights.n} rows per expert, expected gate and up, so an even number")
    if plan.histogram.shape[0] != weights.num_experts:
        raise ValueError(f"plan: made for {plan.histogram.shape[0]} experts, expected {weights.num_experts}")
    tokens, top_k = (int(size) for size in plan.local.shape)
    slots, columns = tokens * top_k, weights.n // 2 if gated else weights.n
    rows = tokens if gather else slots
    checks.check_tensor("x", x, dtype=torch.bfloat16, shape=(rows, weights.k), device=weights.packed.device)
    if x.stride(1) != 1:
        raise ValueError(f"x: got strides {x.stride()}, expected a unit stride in the last dimension")
    if plan.gather.device != x.device:
        raise ValueError(f"plan: on {plan.gather.device}, expected {x.device}")
    arch = architecture(x.device)
    if tile is None:
        tile = select_tile(arch, tokens, weights.num_experts, top_k, weights.n, weights.k)
    if plan.block_m != tile.block_m:
        raise ValueError(
            f"plan: made for tiles of {plan.block_m} rows, expected {tile.block_m}, as the tile {tile} has"
        )
    constants = grouped_constants(
        weights.n, weights.k, top_k, tile, arch, gather, scatter, gated, limit is not None, weights.layout
    )
    if out is None:
        out = torch.empty((slots, columns), dtype=torch.bfloat16, device=x.device)
    else:
        checks.check_tensor("out", out, dtype=torch.bfloat16, shape=(slots, columns), device=x.device)
        checks.check_writable_rows("out", out)
        for name, other in (("x", x), ("weights.packed", weights.packed), ("weights.scales", weights.scales)):
            checks.check_no_overlap("out", out, name, other)
    tiles = int(plan.tile_expert.shape[0])
    if tiles:
        blocks = -(-columns // (tile.block_n // 2 if gated else tile.block_n))
        packed, scales = weights.packed, weights.scales
        if weights.layout == "wgmma":
            packed, scales = packed.view(torch.int32), scales.view(torch.int32)
        _grouped_kernel[(tiles * blocks,)](
            x, packed, scales, out, plan.gather, plan.offsets, plan.tile_expert, plan.tile_first, tiles,
            0.0 if limit is None else float(limit), x.stride(0), out.stride(0), num_warps=tile.num_warps,
            num_stages=tile.num_stages, **constants,
        )  # fmt: skip
    return out


def grouped_constants(
    n: int,
    k: int,
    top_k: int,
    tile: ExpertTile,
    arch: str,
    gather: bool,
    scatter: bool,
    gated: bool,
    clamp: bool,
    layout: Layout = "checkpoint",
) -> dict[str, int | bool]:
    """What `_grouped_kernel` is compiled for.

    Raises:
        ValueError: a block_n too narrow to split into gate and up, or a subtile that does not divide it; the layout
            ``wgmma`` on an architecture without it, or with a tile that does not walk in its steps.
    """
    size = tile.block_n // 2 if gated else tile.block_n
    if size < 16:
        raise ValueError(f"tile: got block_n {tile.block_n}, expected at least {32 if gated else 16}")
    subtile = size if tile.subtile_n is None else min(tile.subtile_n, size)
    parts = 0
    if layout == "wgmma":
        if arch not in ("sm_90", "cpu"):
            raise ValueError(f"weights: in the layout 'wgmma', expected 'checkpoint' on {arch}")
        if tile.block_k != STEP:
            raise ValueError(f"tile: got block_k {tile.block_k}, expected {STEP} with the layout 'wgmma'")
        parts = max(1, tile.block_n // (16 * tile.num_warps))
        if parts > 2:
            raise ValueError(
                f"tile: got block_n {tile.block_n} with {tile.num_warps} warps, expected at most 32 rows to a warp "
                "with the layout 'wgmma'"
            )
    return {
        "N": n,
        "K": k,
        "TOP_K": top_k,
        "GATHER": gather,
        "SCATTER": scatter,
        "GATED": gated,
        "CLAMP": clamp,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PIECES": max(1, size // max(1, parts) // subtile),
        "XCDS": XCDS.get(arch, 1),
        "GROUP": GROUP_TILES,
        "PARTS": parts,
        "HALVES": parts > 0 and tile.block_m >= HALVED_ROWS,
        "PTX": arch == "sm_90",
    }
