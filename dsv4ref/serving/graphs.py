"""Capture and replay of device work: real CUDA graphs, and an emulation that shows the same hazards on a CPU.

A graph records device work, not host code: kernels with the addresses and numbers that they were given. Replaying it
reads whatever stands at those addresses then. So everything that the host decided at capture, a branch, a length, a
stride, is frozen (H07), and memory that was freed in between is read all the same (H06).

`EmulatedGraph` has these semantics on CPU tensors: it records ATen operators and interpreted Triton launches with the
memory they touch, and replays only those. It is a way to see hazards on a laptop, not a way to run anything faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dsv4ref.kernels.capture import current_stream, emulated_capture, is_capturing

__all__ = ["Buckets", "CudaGraph", "EmulatedGraph", "FreedMemoryError", "Graph", "capture"]


class Graph(Protocol):
    """Captured device work."""

    method: str
    outputs: Any

    def replay(self) -> None:
        """Run the recorded device work once more, on the memory it was captured with."""


def capture(fn: Callable[[], Any], *, device: torch.device | str, warmup: int = 1) -> Graph:
    """Capture one call of ``fn``: a CUDA graph on a GPU, an `EmulatedGraph` on the CPU.

    Args:
        fn: launches device work; what it returns becomes ``outputs``, overwritten by every replay.
        device: where its tensors live.
        warmup: eager calls first, which compile kernels and fill caches.

    Raises:
        ValueError: a negative warmup.
        RuntimeError: capturing already; or ``fn`` does what a capture cannot record, such as reading the device.
    """
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}, expected at least 0")
    if is_capturing():
        raise RuntimeError("capture: already capturing, expected captures not to be nested")
    for _ in range(warmup):
        fn()
    return CudaGraph(fn) if torch.device(device).type == "cuda" else EmulatedGraph(fn)


class CudaGraph:
    """A CUDA or HIP graph of one call, with a memory pool of its own.

    A pool shared with another graph would let the two overwrite each other's intermediates (H08), so none can be
    passed. Replays belong to one stream: the graph's memory is one scratch (H33).
    """

    method = "cuda-graph"

    def __init__(self, fn: Callable[[], Any]) -> None:
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = fn()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream: int | None = None

    def replay(self) -> None:
        """Replay on the current stream.

        Raises:
            RuntimeError: another stream than the first replay's.
        """
        self._stream = _same_stream(self._stream, self._device)
        self._graph.replay()


def _same_stream(known: int | None, device: torch.device) -> int:
    stream = current_stream(device)
    if known is not None and stream != known:
        raise RuntimeError(
            f"replay: on stream {stream:#x}, expected {known:#x}, the first replay's: a graph's memory is one scratch "
            "and two streams would run in it at once"
        )
    return stream


# --- the emulation ---


class FreedMemoryError(RuntimeError):
    """A replay would read memory that was freed after the capture; a real graph reads whatever is there now."""


@dataclass(frozen=True)
class _Address:
    """A tensor by the memory it views, without keeping that memory alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> _Address:
        storage = StorageWeakRef(tensor.untyped_storage())
        return _Address(storage, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            return None
        whole = torch.empty(0, dtype=self.dtype, device=storage.device)
        return whole.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Recorded:
    """One piece of device work: what runs, on which memory, and which of the graph's own tensors take its results."""

    name: str
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    results: Mapping[int, Tensor]


class EmulatedGraph:
    """A CUDA graph's semantics on CPU tensors.

    Memory that existed before the capture is remembered by address only; memory made during it belongs to the graph.
    Host values are frozen. Operators that read the device from the host, or whose result's size depends on values,
    cannot be recorded, as on a GPU. Random numbers are replayed with fresh draws, and `Tensor.tolist` on a CPU is
    invisible to the recorder; neither belongs into captured work. Memory counts as freed once Python has let go of it:
    Triton's interpreter leaves the arguments of a launch in a reference cycle, which `gc.collect` resolves.

    Args:
        fn: as in `capture`.
        on_freed: ``"raise"`` names the operation that would read freed memory; ``"garbage"`` gives it a block of NaN
            (or the largest integer), as if its memory had a new owner.

    Raises:
        ValueError: another ``on_freed``.
        RuntimeError: an operator that cannot be captured.
    """

    method = "emulated"

    def __init__(self, fn: Callable[[], Any], *, on_freed: Literal["raise", "garbage"] = "raise") -> None:
        if on_freed not in ("raise", "garbage"):
            raise ValueError(f"on_freed: got {on_freed!r}, expected 'raise' or 'garbage'")
        self._on_freed = on_freed
        self._stream: int | None = None
        recorder = _Recorder()
        with torch.no_grad(), emulated_capture(), recorder, _recorded_launches(recorder):
            self.outputs = fn()
        self._work = tuple(recorder.work)

    def __len__(self) -> int:
        """Operations recorded."""
        return len(self._work)

    def replay(self) -> None:
        """Run the recorded operations again, in order.

        Raises:
            FreedMemoryError: an operation's memory was freed after the capture, unless garbage was asked for.
            RuntimeError: another stream than the first replay's.
        """
        self._stream = _same_stream(self._stream, torch.device("cpu"))
        with torch.no_grad():
            for index, work in enumerate(self._work):
                args, kwargs = (self._resolved(tree, index, work.name) for tree in (work.args, work.kwargs))
                fresh = _tensors(work.run(*args, **kwargs))
                for position, held in work.results.items():
                    held.copy_(fresh[position])

    def _resolved(self, tree: Any, index: int, name: str) -> Any:
        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, _Address):
                return leaf
            tensor = leaf.tensor()
            if tensor is not None:
                return tensor
            if self._on_freed == "raise":
                raise FreedMemoryError(
                    f"replay: operation {index} ({name}) reads {leaf.dtype} {list(leaf.size)}, which was freed after "
                    "the capture; expected its owner to live as long as the graph"
                )
            span = sum(stride * (size - 1) for stride, size in zip(leaf.stride, leaf.size, strict=True)) + 1
            whole = torch.empty(leaf.offset + span, dtype=leaf.dtype)
            filler = torch.nan if leaf.dtype.is_floating_point else torch.iinfo(leaf.dtype).max
            return whole.fill_(filler).as_strided(leaf.size, leaf.stride, leaf.offset)

        return tree_map(resolve, tree)


class _Recorder(TorchDispatchMode):
    """Runs every operator and notes those that do device work."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[_Recorded] = []
        self.inside_kernel = False
        self._own: dict[int, Tensor] = {}  # storages made during the capture, kept alive by a tensor on each

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside_kernel:
            return func(*args, **kwargs)
        if func._schema.name == "aten::lift_fresh":
            raise RuntimeError(
                "capture: torch.tensor copies numbers from the host, expected them in a tensor made before the capture "
                "(on a GPU: cannot copy from unpinned memory while capturing)"
            )
        if _reads_device(func, args):
            raise RuntimeError(
                f"capture: {func} reads the device from the host, expected work whose sizes and branches are known "
                "(on a GPU: operation not permitted when stream is capturing)"
            )
        given = {_storage(t) for t in _tensors((args, kwargs))}
        # Handles are taken first: an operator may change a tensor's metadata in place.
        held_args, held_kwargs = self._handles(args), self._handles(kwargs)
        result = func(*args, **kwargs)
        made = {i: t for i, t in enumerate(_tensors(result)) if _storage(t) not in given}
        for tensor in made.values():
            self._own[_storage(tensor)] = tensor
        only_allocates = func._schema.name.split("::")[1].removeprefix("new_").startswith("empty")
        if (made and not only_allocates) or func._schema.is_mutable:
            self.work.append(_Recorded(str(func), func, held_args, held_kwargs, made))
        return result

    def launch(self, run: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a Triton kernel and note it as one operation."""
        self.work.append(_Recorded(name, run, self._handles(args), self._handles(dict(kwargs)), {}))
        outer, self.inside_kernel = self.inside_kernel, True
        try:
            return run(*args, **kwargs)
        finally:
            self.inside_kernel = outer

    def _handles(self, tree: Any) -> Any:
        def handle(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or _storage(leaf) in self._own:
                return leaf
            return _Address.of(leaf)

        return tree_map(handle, tree)


@contextmanager
def _recorded_launches(recorder: _Recorder) -> Iterator[None]:
    """Hand each launch of an interpreted Triton kernel to the recorder as one operation."""
    from triton.runtime import interpreter  # not above: dsv4ref.kernels decides how Triton is imported

    executor = interpreter.GridExecutor
    original = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            return original(self, *run_args, **run_kwargs)

        return recorder.launch(run, self.fn.__name__, args, kwargs)

    executor.__call__ = launch
    try:
        yield
    finally:
        executor.__call__ = original


def _reads_device(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator's result or its size depends on values: what a capture cannot record."""
    name = func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        # Indexing is static by numbers and dynamic by a mask; writing one value through a mask is a masked fill.
        by_mask = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        return by_mask and (name == "aten::index" or args[2].numel() != 1)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's storage; its address would not do, since empty storages share the null address."""
    return tensor.untyped_storage()._cdata


# --- one graph per batch size ---


class Buckets:
    """Graphs for a few batch sizes, each with memory of its own; a batch runs in the smallest bucket that holds it.

    Args:
        sizes: batch sizes, all different, from 1 on.
        device: where the work runs.
    """

    def __init__(self, sizes: Sequence[int], *, device: torch.device | str) -> None:
        if not sizes or len(set(sizes)) != len(sizes) or min(sizes) < 1:
            raise ValueError(f"sizes: got {list(sizes)}, expected different numbers from 1 on")
        self.sizes = tuple(sorted(sizes))
        self.device = torch.device(device)
        self._graphs: dict[int, Graph] = {}

    def size_for(self, rows: int) -> int:
        """The bucket for a batch of ``rows``.

        Raises:
            ValueError: the batch fits in none.
        """
        for size in self.sizes:
            if 1 <= rows <= size:
                return size
        raise ValueError(f"rows: got {rows}, expected 1 to {self.sizes[-1]}, the largest bucket")

    def capture(self, size: int, fn: Callable[[], Any], *, warmup: int = 1) -> Graph:
        """Capture the work of one bucket.

        Raises:
            ValueError: no such bucket, or it is captured already.
            RuntimeError: as `capture`.
        """
        if size not in self.sizes or size in self._graphs:
            free = [s for s in self.sizes if s not in self._graphs]
            raise ValueError(f"size: got {size}, expected one of the uncaptured buckets {free}")
        self._graphs[size] = capture(fn, device=self.device, warmup=warmup)
        return self._graphs[size]

    def replay(self, rows: int) -> Any:
        """Replay the bucket for a batch of ``rows``; returns its outputs, padding rows included.

        Raises:
            ValueError: no bucket holds the batch, or its graph has not been captured.
        """
        size = self.size_for(rows)
        if size not in self._graphs:
            raise ValueError(f"rows: got {rows}, expected a captured bucket; {size} has not been captured")
        graph = self._graphs[size]
        graph.replay()
        return graph.outputs
