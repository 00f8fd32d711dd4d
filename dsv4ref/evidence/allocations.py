"""Allocations of one call, counted: by the CUDA allocator's own statistics, or operator by operator on the CPU.

Two methods, named in the result and never mixed. `cuda-allocator` is the growth of the caching allocator's counter of
requests: every tensor that anybody made, inside libraries too. `aten-dispatch` needs no GPU: it counts storages that an
ATen operator returned and was not given. What an operator allocates for itself inside, it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4ref.evidence.timing import require_gpu

__all__ = ["Allocations", "count_allocations"]

Method = Literal["cuda-allocator", "aten-dispatch"]


@dataclass(frozen=True)
class Allocations:
    """What one call asked of the allocator: how often, and the operators that did where they are known."""

    method: str
    count: int
    operators: tuple[str, ...] = ()


def count_allocations(fn: Callable[[], object], *, warmup: int = 2, method: Method | None = None) -> Allocations:
    """Count what one call of ``fn`` allocates, after ``warmup`` calls.

    Args:
        fn: called warmup + 1 times; its result is dropped.
        warmup: uncounted calls first, at least 0.
        method: None takes 'cuda-allocator' where there is a GPU and 'aten-dispatch' elsewhere.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: 'cuda-allocator' without a GPU.
    """
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}, expected at least 0")
    if method is None:
        method = "cuda-allocator" if torch.cuda.is_available() else "aten-dispatch"
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}, expected one of {list(get_args(Method))}")
    if method == "cuda-allocator":
        require_gpu("count_allocations(method='cuda-allocator')")
    for _ in range(warmup):
        fn()
    if method == "cuda-allocator":
        torch.cuda.synchronize()
        before = _requests()
        fn()
        torch.cuda.synchronize()
        return Allocations(method, _requests() - before)
    with _Allocating() as seen, _quiet_kernels(seen):
        fn()
    return Allocations(method, len(seen.operators), tuple(seen.operators))


def _requests() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


class _Allocating(TorchDispatchMode):
    """Notes every operator that returns memory which none of its arguments holds."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.inside_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside_kernel:
            given = _storages((args, kwargs))
            for _ in _storages(result) - given:
                self.operators.append(str(func))
        return result


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


@contextmanager
def _quiet_kernels(seen: _Allocating) -> Iterator[None]:
    """Within the block, tensors that Triton's interpreter makes to emulate a kernel do not count."""
    from triton.runtime import interpreter  # not above: dsv4ref.kernels decides how Triton is imported

    executor = interpreter.GridExecutor
    original = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, seen.inside_kernel = seen.inside_kernel, True
        try:
            return original(self, *args, **kwargs)
        finally:
            seen.inside_kernel = outer

    executor.__call__ = launch
    try:
        yield
    finally:
        executor.__call__ = original
