"""Kernel launches of one call, counted rather than estimated.

Two methods, named in the result and never mixed, since they count different things:

`cuda-profiler` reads a torch profile of one warm call on the GPU: kernels, memory copies and memory sets as the device
ran them, those inside a replayed graph included.

`aten-dispatch+interpreter` needs no GPU. It counts the ATen operators of one warm call that would launch work on a GPU,
each as one, and the launches of Triton kernels that run on Triton's interpreter. It is a lower bound with these known
gaps: an operator that takes several kernels (sort, top-k, nonzero, a split reduction) counts once, what an operator
calls inside counts with it, and a copy between host and device looks like no copy at all when both are the CPU.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from dsv4ref.evidence.timing import require_gpu

Method = Literal["cuda-profiler", "aten-dispatch+interpreter"]
Kind = Literal["kernel", "copy", "fill"]

# Operators whose whole work is one copy, or one constant written; every other operator that launches is a kernel.
_COPIES = frozenset({"copy_", "_to_copy", "clone"})
_FILLS = frozenset(
    f"{prefix}{value}{suffix}"
    for value in ("zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
) | {"zero_", "fill_", "scalar_tensor"}
_HOST_READ = "_local_scalar_dense"  # item(), bool(), int(): one element copied to the host

# The HIP runtime implements asynchronous copies and sets with kernels of these names.
_HIP_COPY = "__amd_rocclr_copyBuffer"
_HIP_FILL = "__amd_rocclr_fillBuffer"

# Host seconds between the start of a profile and the call, one attempt each; see `_profiled`.
_PAUSES = (0.0, 0.2, 2.0)
_SENTINELS = 8


@dataclass(frozen=True)
class Launches:
    """What one call launched, in order within each kind.

    `kernels` are names of kernels ('aten.<op>' for an operator seen on the CPU), `copies` memory copies, `fills` memory
    sets on the GPU and constant fills on the CPU.
    """

    method: str
    kernels: tuple[str, ...]
    copies: tuple[str, ...]
    fills: tuple[str, ...]

    @property
    def total(self) -> int:
        """Kernels, copies and fills together."""
        return len(self.kernels) + len(self.copies) + len(self.fills)


def count_launches(fn: Callable[[], object], *, warmup: int = 2, method: Method | None = None) -> Launches:
    """Count what one call of `fn` launches, after `warmup` calls that fill caches and compile.

    Args:
        fn: called warmup + 1 times (and again after a profile that lost records); its result is dropped.
        warmup: untracked calls first, at least 0.
        method: None takes 'cuda-profiler' where there is a GPU and 'aten-dispatch+interpreter' elsewhere. Name the
            latter for a function of CPU tensors on a machine with a GPU: on the GPU it launches nothing.

    Returns: `Launches`; its `method` says which way was taken.

    Raises:
        ValueError: an argument is not as described, or `fn` touches GPU tensors under 'aten-dispatch+interpreter'.
        RuntimeError: 'cuda-profiler' without a GPU, or a profile that does not hold the whole call.
    """
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}, expected at least 0")
    if method is None:
        method = "cuda-profiler" if torch.cuda.is_available() else "aten-dispatch+interpreter"
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}, expected one of {list(get_args(Method))}")
    if method == "cuda-profiler":
        require_gpu("count_launches(method='cuda-profiler')")
    for _ in range(warmup):
        fn()
    return _count_profiled(fn) if method == "cuda-profiler" else _count_dispatched(fn)


# ---- on the GPU: torch.profiler ----


def _count_profiled(fn: Callable[[], object]) -> Launches:
    """Profile until a session holds the whole call: sentinels before it and behind it."""
    for pause in _PAUSES:
        between = between_sentinels(device_events(_profiled(fn, pause)), _SENTINELS)
        if between is not None:
            return Launches("cuda-profiler", *by_kind(between))
    raise RuntimeError(
        f"count_launches: {len(_PAUSES)} profiles did not hold the {_SENTINELS} known kernels around the call, so "
        "records are missing; expected torch.profiler to see GPU kernels (does this machine allow CUPTI or roctracer?)"
    )


def _profiled(fn: Callable[[], object], pause: float) -> Mapping[str, Any]:
    """The Chrome trace of: a pause, known kernels, `fn`, one known kernel.

    A profile can lose its first kernels: their time stamps may lie before the start of the session, by more the longer
    the GPU has been idle, and are then dropped without a word (pytorch issue 192021, CUPTI before CUDA 13.1). The
    kernels before the call show whether that happened, and a pause moves the call out of the lossy part.
    """
    known = torch.zeros(1, device="cuda")
    torch.frac_(known)  # its kernel is loaded before the profile starts
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        time.sleep(pause)
        for _ in range(_SENTINELS):
            torch.frac_(known)
        torch.cuda.synchronize()
        fn()
        torch.cuda.synchronize()
        torch.frac_(known)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"), strict=False)


def device_events(trace: Mapping[str, Any]) -> list[tuple[Kind, str]]:
    """Kernels, copies and sets of a Chrome trace, as (kind, name), in the order in which the device started them."""
    kinds: dict[str, Kind] = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
    found: list[tuple[float, Kind, str]] = []
    for event in trace["traceEvents"]:
        kind = kinds.get(str(event.get("cat", "")).lower())
        if kind is None or event.get("ph") != "X":
            continue
        name = str(event["name"])
        if name.startswith(_HIP_COPY):
            kind = "copy"
        elif name.startswith(_HIP_FILL):
            kind = "fill"
        found.append((float(event["ts"]), kind, name))
    return [(kind, name) for _, kind, name in sorted(found, key=lambda item: item[0])]


def between_sentinels(events: Sequence[tuple[Kind, str]], sentinels: int) -> list[tuple[Kind, str]] | None:
    """The events between up to `sentinels` leading copies of the last event, and that last event.

    The profile loses a prefix, so one leading sentinel proves that nothing after it is missing. None where not even
    that one is there.
    """
    if len(events) < 2 or events[-1][0] != "kernel" or events[0] != events[-1]:
        return None
    last = len(events) - 1
    first = 0
    while first < min(sentinels, last) and events[first] == events[-1]:
        first += 1
    return list(events[first:last])


def by_kind(events: Sequence[tuple[Kind, str]]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of kernels, copies and fills, each in the order of `events`."""
    kernels, copies, fills = (
        tuple(name for kind, name in events if kind == wanted) for wanted in ("kernel", "copy", "fill")
    )
    return kernels, copies, fills


# ---- without a GPU: ATen dispatch and Triton's interpreter ----


def _count_dispatched(fn: Callable[[], object]) -> Launches:
    with _Operators() as operators, _interpreted_launches(operators):
        fn()
    return Launches("aten-dispatch+interpreter", *by_kind(operators.events))


class _Operators(TorchDispatchMode):
    """Notes each operator that would launch work, unless it runs inside a Triton kernel's emulation."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[Kind, str]] = []
        self.inside_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = len(self.events)
        result = func(*args, **kwargs)
        if self.inside_kernel:
            return result
        for tensor in _tensors((args, kwargs, result)):
            if tensor.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"fn: {func} touches a tensor on {tensor.device}, expected CPU tensors under "
                    "'aten-dispatch+interpreter'; use method='cuda-profiler'"
                )
        kind = operator_kind(func, args, kwargs, result)
        # A custom operator counts by the Triton kernels launched inside it, or as one where there are none.
        if kind is not None and not (func.namespace != "aten" and len(self.events) > before):
            self.events.append((kind, f"{func.namespace}.{_name(func)}"))
        return result


def operator_kind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Kind | None:
    """What a call of an ATen operator would launch on a GPU; None for views, allocations and metadata.

    Decided from the operator's own schema and tags and from the tensors of this call: no launch if it changes only
    metadata in place, allocates without writing, returns only storage that it was given (a view, whether or not its
    schema says so), or has no element to write.
    """
    name = _name(func)
    if torch.Tag.inplace_view in func.tags or name.removeprefix("new_").startswith("empty"):
        return None
    if name == _HOST_READ:
        return "copy"
    mutates = func._schema.is_mutable
    written = _tensors(_mutated(func, args, kwargs) if mutates else result)
    if written and all(tensor.numel() == 0 for tensor in written):
        return None
    if written and not mutates:
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if all(_storage(tensor) in given for tensor in written):
            return None
    if name in _COPIES:
        return "copy"
    return "fill" if name in _FILLS else "kernel"


@contextmanager
def _interpreted_launches(operators: _Operators) -> Iterator[None]:
    """Note each launch of an interpreted Triton kernel, and hide the host operators that emulate it."""
    executor = interpreter.GridExecutor
    original = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid = self.grid
        seen: list[Sequence[int]] = []

        def evaluated(meta: Mapping[str, Any]) -> Sequence[int]:
            seen.append(grid(meta) if callable(grid) else grid)
            return seen[-1]

        self.grid = evaluated
        outer, operators.inside_kernel = operators.inside_kernel, True
        try:
            return original(self, *args, **kwargs)
        finally:
            operators.inside_kernel = outer
            self.grid = grid
            # A compiled launch with an empty grid launches nothing.
            if seen and math.prod(seen[-1]) > 0:
                operators.events.append(("kernel", self.fn.__name__))

    executor.__call__ = launch
    try:
        yield
    finally:
        executor.__call__ = original


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of this call that the operator's schema says it writes."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.name in kwargs:
                written.append(kwargs[argument.name])
            elif index < len(args):
                written.append(args[index])
    return written


def _name(func: Any) -> str:
    return func._schema.name.split("::", 1)[1]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; its address would not do, since empty storages share the null address."""
    return tensor.untyped_storage()._cdata
