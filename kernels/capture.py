"""Whether this call is being captured, and on which stream: the driver's answer, or an emulation's on the CPU.

Code that must not read the device from the host, or allocate, while a graph is captured asks here. On a GPU the answer
is torch's. Without one there is nothing to ask, so an emulated capture or stream announces itself by a context manager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

__all__ = ["current_stream", "emulated_capture", "emulated_stream", "is_capturing"]

_CAPTURING: ContextVar[bool] = ContextVar("emulated capture", default=False)
_STREAM: ContextVar[int] = ContextVar("emulated stream", default=0)


def is_capturing() -> bool:
    """True while the current CUDA stream is being captured, or inside `emulated_capture`."""
    return _CAPTURING.get() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def current_stream(device: torch.device) -> int:
    """A number for the stream that work on ``device`` would go to now; 0 on a CPU outside `emulated_stream`."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else _STREAM.get()


@contextlib.contextmanager
def emulated_capture() -> Iterator[None]:
    """Within the block, `is_capturing` says yes; for an emulation of graph capture on CPU tensors."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


@contextlib.contextmanager
def emulated_stream(number: int) -> Iterator[None]:
    """Within the block, CPU work counts as work on stream ``number``; nothing runs concurrently."""
    token = _STREAM.set(number)
    try:
        yield
    finally:
        _STREAM.reset(token)
