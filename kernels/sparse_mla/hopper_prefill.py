"""The Hopper path of `sparse_mla_prefill`: a warp-specialised Gluon kernel for sm_90, and what it does not take.

What it computes is what the portable Triton kernel computes; how, stands in `hopper_prefill_kernel`. As in
`hopper_decode`, the kernel's module is imported at the first launch: AMD GPUs and the interpreter never see it.

Programs are as many as SMs and each takes piece after piece of the work (row, 64 heads), so that one piece's keys are
gathered while the piece before is written.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import triton
from torch import Tensor

from dsv4ref import device
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla.hopper_decode import ARCH, TILE
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.merge import QueryRotation

__all__ = ["FEWEST_HEADS", "launch_prefill", "refusal"]

FEWEST_HEADS = 33
"""Heads from which a piece of 64 is not half padding; with fewer the portable kernel's narrower tiles are chosen."""

_ALIGNMENT = 16  # elements: one copy moves 16 bytes, and Triton knows strides by multiples of 16


def refusal(q: Tensor, kv: Tensor, launch: LaunchShape | None) -> str | None:
    """Why this path cannot take a call; None if it can.

    Args:
        q, kv, launch: as `sparse_mla_prefill`.

    Raises:
        ValueError: as `codes.architecture`.
    """
    arch = architecture(q.device)
    if arch != ARCH:
        return f"that kernel is for {ARCH}, and this is {arch}"
    if launch is not None:
        return f"its tile is fixed, and launch asks for {launch}"
    for name, tensor in (("q", q), ("kv", kv)):
        strides = tensor.stride()[:-1]
        if tensor.data_ptr() % _ALIGNMENT or any(stride % _ALIGNMENT for stride in strides):
            return f"{name} lies at {tensor.data_ptr():#x} with strides {strides}, and it copies 16 bytes at a time"
    return _gluon_is_missing()


@functools.cache
def _kernel_module() -> ModuleType:
    return importlib.import_module("dsv4ref.kernels.sparse_mla.hopper_prefill_kernel")


@functools.cache
def _gluon_is_missing() -> str | None:
    try:
        _kernel_module()
    except ImportError as error:
        return f"triton {triton.__version__} has no Gluon for Hopper ({error})"
    return None


def launch_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    lengths: Tensor | None,
    sink: Tensor | None,
    rotation: QueryRotation | None,
    scale_log2: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Launch the kernel on arguments that `sparse_mla_prefill` has checked.

    Args:
        q, kv, indices, lengths, sink, rotation, out, lse: as `sparse_mla_prefill`.
        scale_log2: softmax scale times log2(e).
    """
    module = _kernel_module()
    num_rows, num_heads, _ = q.shape
    pieces = TILE.workgroups(num_rows, num_heads)
    module._hopper_prefill_kernel[(min(pieces, device.current(q.device.index).compute_units),)](
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
        num_rows,
        num_heads,
        scale_log2,
        HAS_LENGTHS=lengths is not None,
        HAS_SINK=sink is not None,
        HAS_ROPE=rotation is not None,
        HAS_LSE=lse is not None,
        SUM_REGISTERS=module.SUM_REGISTERS,
        FILL_REGISTERS=module.FILL_REGISTERS,
        num_warps=module.WARPS,
    )
