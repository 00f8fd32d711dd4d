"""Boundary checks shared by the launchers: one clear error, naming the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "MAX_GRID_ROWS",
    "byte_range",
    "check_grid_rows",
    "check_no_overlap",
    "check_tensor",
    "check_writable_rows",
    "numbered_device",
]

MAX_GRID_ROWS = 65_535
"""Programs along the second axis of a grid, CUDA's limit; launchers that put rows there take no more in one call."""


def check_tensor(
    name: str,
    tensor: object,
    *,
    dtype: torch.dtype,
    shape: tuple[int | str, ...],
    device: torch.device | None = None,
    contiguous: bool = False,
) -> Tensor:
    """Check a tensor argument and return it.

    Args:
        name: the argument's name, for the message.
        tensor: what came.
        dtype: the required dtype.
        shape: required sizes; a string is a free dimension, named for the message.
        device: required device, if any.
        contiguous: require full contiguity.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, device or layout.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    want = "[" + ", ".join(str(s) for s in shape) + "]"
    sizes_match = len(tensor.shape) == len(shape) and all(
        isinstance(want_size, str) or size == want_size for size, want_size in zip(tensor.shape, shape, strict=True)
    )
    if not sizes_match:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {want}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous tensor")
    return tensor


def check_grid_rows(name: str, rows: int) -> None:
    """Refuse more rows than one launch has programs for; the driver would, without saying which argument it was.

    Raises:
        ValueError: more than `MAX_GRID_ROWS`.
    """
    if rows > MAX_GRID_ROWS:
        raise ValueError(f"{name}: got {rows} rows, expected at most {MAX_GRID_ROWS} in one launch")


def numbered_device(device: torch.device | str) -> torch.device:
    """A device as its tensors name it: "cuda" is the GPU that is current now, by its number.

    For a device that is kept, and that `check_tensor` compares with a tensor's later.

    Args:
        device: any that torch takes.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_writable_rows(name: str, tensor: Tensor) -> None:
    """Check that a kernel may write every element of ``tensor`` once: unit last stride, no element shared.

    Raises:
        ValueError: the last dimension is strided, or two indices address the same memory (an expanded view).
    """
    if tensor.numel() == 0:
        return
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a unit stride in the last dimension")
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)} with strides {tensor.stride()} overlaps itself, "
                "expected every element to have its own memory"
            )
        reach += stride * (size - 1)


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte a strided tensor touches; equal if it has no elements."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


def check_no_overlap(name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse an output whose memory range touches an input's.

    Ranges, not elements, are compared: interleaved views of one buffer are refused too, which is the safe side.

    Raises:
        ValueError: the ranges intersect.
    """
    begin, end = byte_range(written)
    other_begin, other_end = byte_range(other)
    if written.device == other.device and begin < other_end and other_begin < end:
        shared = min(end, other_end) - max(begin, other_begin)
        raise ValueError(
            f"{name}: its memory range overlaps {other_name}'s by {shared} bytes, expected separate memory "
            "(programs that finish early would overwrite rows that others have yet to read)"
        )
