"""The Hopper path of `split_k_decode`: a warp-specialised Gluon kernel for sm_90, its plan, and when it is used.

What it computes is what the portable Triton kernel computes; how, stands in `hopper_kernel`. Gluon is an experimental
part of Triton and the kernel is written in Hopper's instructions, so its module is imported at the first launch: AMD
GPUs and the interpreter never see it.

It takes the whole contract of `split_k_decode` but for e4m3fnuz caches, which no tool writes on Hopper, and launch
shapes: its tile is fixed. Programs are as many as SMs and each takes piece after piece of the work (row, 64 heads,
split), so that one piece's keys are gathered while the piece before is written. Time is modelled as::

    rounds = ceil(pieces / SMs)
    time   = rounds * (tiles per split * step + piece) + (splits > 1) * (reduce + 2 * staged bytes / bandwidth)
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import triton
from torch import Tensor

from dsv4ref import device
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla.decode import _scope_arguments
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.merge import QueryRotation
from dsv4ref.kernels.sparse_mla.splits import (
    MAX_SPLITS,
    WORTH_A_SPLIT,
    Machine,
    SplitPlan,
    reduce_us,
    tiles_per_row,
)

__all__ = ["ARCH", "TILE", "launch_partials", "plan", "refusal", "worthwhile"]

ARCH = "sm_90"
TILE = LaunchShape(64, 64, 4)
"""Heads and keys of one step, and the warps of the partition that leads; four more follow, and eight fill."""

_ALIGNMENT = 16  # elements: one copy moves 16 bytes, and Triton knows strides by multiples of 16

# Round figures of one tile and of one piece on H200; a plan orders split counts by them, and promises no time.
_STEP_US = 3.0
_PIECE_US = 10.0

# From how many rows on it was faster, by the fewest heads: one piece of 64 heads does the work of a slice's 8 as well.
_FEWEST_ROWS = ((2 * TILE.block_h, 1), (TILE.block_h, 8), (8, 32))


def refusal(q: Tensor, swa: Scope, extra: Scope | None, launch: LaunchShape | None) -> str | None:
    """Why this path cannot take a call; None if it can.

    Args:
        q, swa, extra, launch: as `split_k_decode`.

    Raises:
        ValueError: as `codes.architecture`.
    """
    arch = architecture(q.device)
    if arch != ARCH:
        return f"that kernel is for {ARCH}, and this is {arch}"
    if launch is not None:
        return f"its tile is fixed, and launch asks for {launch}"
    for name, scope in (("swa", swa), ("extra", extra)):
        if scope is not None and scope.cache.dialect is not Dialect.FN:
            return f"{name}'s cache is {scope.cache.dialect.value}, and it reads {Dialect.FN.value} only"
    if q.data_ptr() % _ALIGNMENT or any(stride % _ALIGNMENT for stride in q.stride()[:2]):
        return f"q lies at {q.data_ptr():#x} with strides {q.stride()}, and it copies 16 bytes at a time"
    return _gluon_is_missing()


def worthwhile(rows: int, heads: int, swa_width: int, extra_width: int) -> bool:
    """Whether this path was faster than the portable one at such a size, on H200.

    Timed were 8, 16, 32, 64 and 128 heads with 1, 8, 32, 64 and 256 rows, at the widths of V4's C4 layers. A size
    between them is taken to be like the next smaller one, a size beyond like the last; other widths were not timed, nor
    fewer than 8 heads, which are left to the portable path.

    Args:
        rows, heads, swa_width, extra_width: as `splits.plan_splits`.
    """
    return any(heads >= least and rows >= fewest for least, fewest in _FEWEST_ROWS)


def plan(
    machine: Machine, rows: int, heads: int, swa_width: int, extra_width: int, splits: int | None = None
) -> SplitPlan:
    """Choose the split count for this path.

    Args:
        machine, rows, heads, swa_width, extra_width, splits: as `splits.plan_splits`.

    Raises:
        ValueError: a split count outside 1 to `MAX_SPLITS`.
    """
    if splits is not None and not (isinstance(splits, int) and 1 <= splits <= MAX_SPLITS):
        raise ValueError(f"splits: got {splits!r}, expected an integer from 1 to {MAX_SPLITS}")
    tiles = tiles_per_row(swa_width, extra_width, TILE.block_k)
    counts = sorted({-(-tiles // per) for per in range(1, tiles + 1)}) if splits is None else [splits]
    plans = [_assess(machine, rows, heads, tiles, count) for count in counts if count <= MAX_SPLITS]
    best = min(plans, key=lambda p: (round(p.time_us, 3), p.splits))
    single = plans[0]
    return best if single.time_us > WORTH_A_SPLIT * best.time_us else single


def _assess(machine: Machine, rows: int, heads: int, tiles: int, splits: int) -> SplitPlan:
    pieces = TILE.workgroups(rows, heads) * splits
    rounds = -(-pieces // machine.compute_units)
    per_split = -(-tiles // splits)
    time_us = rounds * (per_split * _STEP_US + _PIECE_US)
    if splits > 1:
        time_us += reduce_us(machine, rows, heads, splits)
    idle = 1 - pieces / (rounds * machine.compute_units)
    said = f"Hopper: {pieces} pieces of {per_split} tiles in {rounds} rounds of {machine.compute_units}"
    return SplitPlan(TILE, splits, per_split, pieces, rounds, idle, time_us, said, "gluon")


@functools.cache
def _kernel_module() -> ModuleType:
    return importlib.import_module("dsv4ref.kernels.sparse_mla.hopper_kernel")


@functools.cache
def _gluon_is_missing() -> str | None:
    try:
        _kernel_module()
    except ImportError as error:
        return f"triton {triton.__version__} has no Gluon for Hopper ({error})"
    return None


def launch_partials(
    q: Tensor,
    swa: Scope,
    extra: Scope | None,
    *,
    sink: Tensor | None,
    rotation: QueryRotation | None,
    scale_log2: float,
    splits: int,
    out: Tensor,
    lse: Tensor | None,
    parts: Tensor,
    part_lses: Tensor,
) -> None:
    """Launch the partial kernel on arguments that `split_k_decode` has checked.

    Args:
        q, swa, extra, sink, rotation, out, lse: as `split_k_decode`; what finishes a row is used at one split only.
        scale_log2: softmax scale times log2(e).
        splits: pieces of each row.
        parts, part_lses: as `SplitScratch`'s; used at more than one split.
    """
    module = _kernel_module()
    num_rows, num_heads = q.shape[0], q.shape[1]
    second = extra if extra is not None else swa
    finish = splits == 1
    turned = rotation if finish else None
    pieces = TILE.workgroups(num_rows, num_heads) * splits
    module._hopper_decode_kernel[(min(pieces, device.current(q.device.index).compute_units),)](
        q,
        out,
        lse if lse is not None else out,
        sink if sink is not None else q,
        turned.positions if turned is not None else q,
        turned.cos if turned is not None else q,
        turned.sin if turned is not None else q,
        out if finish else parts,
        out if finish else part_lses,
        *_scope_arguments(swa),
        *_scope_arguments(second),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
        turned.cos.stride(0) if turned is not None else 0,
        turned.sin.stride(0) if turned is not None else 0,
        turned.cos.shape[0] if turned is not None else 0,
        num_rows,
        num_heads,
        splits,
        scale_log2,
        SWA_BLOCK=swa.cache.block_size,
        EXTRA_BLOCK=second.cache.block_size,
        HAS_EXTRA=extra is not None,
        SPLIT=not finish,
        HAS_SINK=finish and sink is not None,
        HAS_LSE=finish and lse is not None,
        HAS_ROPE=turned is not None,
        FOLLOW_REGISTERS=module.FOLLOW_REGISTERS,
        FILL_REGISTERS=module.FILL_REGISTERS,
        num_warps=module.WARPS,
    )
