"""Where an engine's requests stand, kept so that it, or another engine of the same sizes, can go on from there again.

A checkpoint holds a copy of the caches' bytes, since decode steps write into them, and every request's state as a
Python value, which nobody changes; a state that a device step had taken over is handed back for it.

So prompts are computed once for engines that differ in how they decode, and windows of decode steps begin at the same
bytes however often they are timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.compressor import CompressorState
from dsv4ref.ref.state import LayerState, State
from dsv4ref.serving.blocks import CacheSizes, LayerCaches, PagedCaches, RequestRows
from dsv4ref.serving.requests import Request

__all__ = ["Checkpoint", "check_fits", "copied_request", "read_caches", "rebound", "write_caches"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Requests that decode, with everything that their next token depends on.

    Args:
        config: the model's shapes.
        sizes: of the caches.
        requests: in the order in which they joined.
        states: request id -> state over the rows of the engine that it was taken from.
        window, pages: request id -> its blocks in either pool.
        caches: copies of every cache's bytes, in the order of `read_caches`.
    """

    config: ModelConfig
    sizes: CacheSizes
    requests: tuple[Request, ...]
    states: Mapping[int, State]
    window: Mapping[int, tuple[int, ...]]
    pages: Mapping[int, tuple[int, ...]]
    caches: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the copied caches."""
        return sum(tensor.nbytes for tensor in self.caches)


def check_fits(checkpoint: Checkpoint, caches: PagedCaches) -> None:
    """The checkpoint is of an engine with the same model and cache sizes.

    Raises:
        ValueError: it is not; names what differs.
    """
    if checkpoint.config != caches.config:
        raise ValueError(f"checkpoint: it is of {checkpoint.config.name}, expected this engine's {caches.config.name}")
    if checkpoint.sizes != caches.sizes:
        raise ValueError(f"checkpoint: its caches are {checkpoint.sizes}, expected this engine's {caches.sizes}")


def copied_request(request: Request) -> Request:
    """A request of its own that stands where this one stands."""
    return replace(request, output=list(request.output))


def _stores(caches: PagedCaches) -> list[Tensor]:
    found = []
    for layer in caches.layers:
        found.append(layer.window.data)
        if layer.compressed is not None:
            found.append(layer.compressed.data)
        if layer.index_keys is not None:
            found.append(layer.index_keys)
    return found


def read_caches(caches: PagedCaches) -> tuple[Tensor, ...]:
    """Copies of every layer's caches."""
    return tuple(store.clone() for store in _stores(caches))


def write_caches(caches: PagedCaches, copies: tuple[Tensor, ...]) -> None:
    """Put `read_caches`' bytes back, one copy per cache."""
    for store, copy in zip(_stores(caches), copies, strict=True):
        store.copy_(copy)


def rebound(state: State, caches: PagedCaches) -> State:
    """The same state over another engine's caches.

    Args:
        state: over the rows of an engine of the same sizes; not changed.
        caches: whose rows it shall be over.
    """
    layers = zip(state.layers, caches.layers, strict=True)
    return State(state.position, tuple(_layer(layer, stores, caches.reference) for layer, stores in layers))


def _layer(state: LayerState, stores: LayerCaches, where: torch.device) -> LayerState:
    def rows(held: object, store: object) -> RequestRows | None:
        if held is None:
            return None
        assert isinstance(held, RequestRows), "the engine's states are made by its caches"
        return replace(held, store=store)  # type: ignore[arg-type]

    def group(held: CompressorState | None) -> CompressorState | None:
        if held is None:
            return None
        moved = {name: value.to(where) for name, value in vars(held).items() if isinstance(value, Tensor)}
        return replace(held, **moved)  # type: ignore[arg-type]

    window = rows(state.window, stores.window)
    assert window is not None
    return LayerState(
        window,
        rows(state.compressed, stores.compressed),
        group(state.compressor),
        rows(state.index_keys, stores.index_keys),
        group(state.index_compressor),
    )
