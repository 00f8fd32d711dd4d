"""The Hopper path of `split_k_decode`: a warp-specialised Gluon kernel for sm_90, and when it may and should be used.

What it computes is what the portable Triton kernel computes; how, stands in `hopper_kernel`. Gluon is an experimental
part of Triton and the kernel is written in Hopper's instructions, so its module is imported on first use only: AMD GPUs
and the interpreter never see it.

It takes the whole contract of `split_k_decode` but for two things, which stay with the portable kernel: e4m3fnuz caches
(no Hopper tool writes them) and a rotation at one split (with more the shared reduce rotates).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import triton
from torch import Tensor

from dsv4ref import device
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla.decode import _scope_arguments
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

__all__ = ["ARCH", "TILE", "launch_partials", "missing", "worthwhile"]

ARCH = "sm_90"
TILE = LaunchShape(64, 64, 8)
"""Heads and keys of one step, and the warps that multiply; four more fill the tiles."""


def missing(where: torch.device) -> str | None:
    """Why a device cannot run this path; None if it can.

    Raises:
        ValueError: as `codes.architecture`.
    """
    arch = architecture(where)
    if arch != ARCH:
        return f"it is written for {ARCH}, this is {arch}"
    try:
        _kernel_module()
    except ImportError as error:
        return f"this Triton ({triton.__version__}) has no Gluon for Hopper: {error}"
    return None


def refused(swa: Scope, extra: Scope | None) -> str | None:
    """Why this path does not take these caches, on any device; None if it does."""
    for name, scope in (("swa", swa), ("extra", extra)):
        if scope is not None and scope.cache.dialect is not Dialect.FN:
            return f"{name}'s cache is {scope.cache.dialect.value}, and it reads {Dialect.FN.value} only"
    return None


@functools.cache
def _kernel_module() -> ModuleType:
    return importlib.import_module("dsv4ref.kernels.sparse_mla.hopper_kernel")


def launch_partials(
    q: Tensor,
    swa: Scope,
    extra: Scope | None,
    *,
    sink: Tensor | None,
    scale_log2: float,
    splits: int,
    out: Tensor,
    lse: Tensor | None,
    parts: Tensor,
    part_lses: Tensor,
) -> None:
    """Launch the partial kernel on arguments that `split_k_decode` has checked.

    Args:
        q, swa, extra, sink, out, lse: as `split_k_decode`; out, lse and sink are used at one split only.
        scale_log2: softmax scale times log2(e).
        splits: pieces of each row.
        parts, part_lses: as `SplitScratch`'s; used at more than one split.
    """
    module = _kernel_module()
    num_rows, num_heads = q.shape[0], q.shape[1]
    second = extra if extra is not None else swa
    finish = splits == 1
    items = TILE.workgroups(num_rows, num_heads) * splits
    module._hopper_decode_kernel[(min(items, device.current(q.device.index).compute_units),)](
        q,
        out,
        lse if lse is not None else out,
        sink if sink is not None else q,
        parts,
        part_lses,
        *_scope_arguments(swa),
        *_scope_arguments(second),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        lse.stride(1) if lse is not None else 0,
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
        FOLLOW_REGISTERS=module.FOLLOW_REGISTERS,
        FILL_REGISTERS=module.FILL_REGISTERS,
        num_warps=module.WARPS,
    )
