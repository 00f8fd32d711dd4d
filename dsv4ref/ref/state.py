"""What one sequence leaves behind for its next tokens: window keys, compressed entries, compressor rows, indexer keys.

Keys live in *rows* addressed by number: absolute position in a window, entry number in a compressed cache. There are
two kinds of rows, and the model does not know which it has: `PlainRows`, a tensor, and `PagedRows`, a paged FP8 cache.

A forward pass takes a state and returns the next one. Plain states are values: an old one stays usable, so that a
sequence can be continued twice. Paged states share their cache's memory and are used once.

Source: DeepSeek-V4 inference/model.py keeps the same contents in ``Attention.kv_cache`` (ring buffer, then compressed
rows) and ``Compressor.kv_state`` / ``score_state``; paging as in vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA, ModelConfig
from dsv4ref.formats import kv_cache
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.ref.compressor import CompressorState, empty_state

__all__ = ["LayerState", "PagedRows", "PlainRows", "Rows", "State", "empty_layer", "empty_sequence", "paged_sequence"]


class Rows(Protocol):
    """Numbered key rows ``first .. end - 1``."""

    @property
    def first(self) -> int:
        """Number of the oldest row that is still held."""

    @property
    def end(self) -> int:
        """One past the newest row."""

    @property
    def room(self) -> int | None:
        """Rows that can still be appended; None for any number."""

    def append(self, rows: Tensor) -> Rows:
        """With ``rows`` ``[n, d]`` as numbers ``end .. end + n - 1``."""

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by number, int64 ``[n]`` -> ``[n, d]``."""

    def forget(self, before: int) -> Rows:
        """Without the rows numbered below ``before``."""


def _check_numbers(numbers: Tensor, first: int, end: int) -> None:
    outside = (numbers < first) | (numbers >= end)
    if bool(outside.any()):
        raise ValueError(f"numbers: row {int(numbers[outside][0])} is not held, expected {first} to {end - 1}")


@dataclass(frozen=True)
class PlainRows:
    """Rows in a tensor.

    Args:
        data: ``[n, d]``.
        first: number of ``data[0]``.
    """

    data: Tensor
    first: int = 0

    @property
    def end(self) -> int:
        return self.first + int(self.data.shape[0])

    @property
    def room(self) -> None:
        return None

    def append(self, rows: Tensor) -> PlainRows:
        return PlainRows(torch.cat((self.data, rows)), self.first)

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        _check_numbers(numbers, self.first, self.end)
        return self.data[numbers - self.first].to(dtype)

    def forget(self, before: int) -> PlainRows:
        dropped = max(0, before - self.first)
        return PlainRows(self.data[dropped:], self.first + dropped)


@dataclass(frozen=True)
class PagedRows:
    """Rows in a paged FP8 cache: row i is entry ``i % bs`` of block ``table[i // bs]``.

    Blocks whose rows are all forgotten go back to the free list; a full cache is an error.

    Args:
        cache: blocks, this sequence's own or borrowed from a larger cache through ``free``.
        free: blocks that may still be taken, in order.
        table: logical block -> physical block; None once forgotten.
        first: oldest row held.
        end: one past the newest row.
    """

    cache: KVCache
    free: tuple[int, ...]
    table: tuple[int | None, ...] = ()
    first: int = 0
    end: int = 0

    @property
    def room(self) -> int:
        return (len(self.table) + len(self.free)) * self.cache.block_size - self.end

    def slots(self, numbers: Tensor) -> Tensor:
        """Flat slot ids of rows, int64 ``[n]``: what a kernel's index list holds."""
        _check_numbers(numbers, self.first, self.end)
        block_size = self.cache.block_size
        blocks = [-1 if block is None else block for block in self.table]
        table = torch.tensor(blocks, dtype=torch.int64, device=numbers.device)
        return table[numbers // block_size] * block_size + numbers % block_size

    def append(self, rows: Tensor) -> PagedRows:
        if rows.shape[0] > self.room:
            raise ValueError(f"rows: got {rows.shape[0]} more, but the cache has room for {self.room}")
        end = self.end + int(rows.shape[0])
        taken = -(-end // self.cache.block_size) - len(self.table)
        grown = PagedRows(self.cache, self.free[taken:], self.table + self.free[:taken], self.first, end)
        if rows.shape[0]:
            kv_cache.insert(self.cache, grown.slots(torch.arange(self.end, end, device=rows.device)), rows)
        return grown

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return kv_cache.gather(self.cache, self.slots(numbers), dtype)

    def forget(self, before: int) -> PagedRows:
        first = max(self.first, min(before, self.end))
        dead = first // self.cache.block_size
        returned = tuple(block for block in self.table[:dead] if block is not None)
        table = (None,) * dead + self.table[dead:]
        return PagedRows(self.cache, self.free + returned, table, first, self.end)


@dataclass(frozen=True)
class LayerState:
    """One layer's share. A layer without compression has a window only; only C4 layers have an indexer.

    Args:
        window: keys of the last positions, ``[.., d]``.
        compressed: compressed entries, ``[.., d]``.
        compressor: rows of the open group.
        index_keys: the indexer's entries, ``[.., index_head_dim]``.
        index_compressor: the indexer's open group.
    """

    window: Rows
    compressed: Rows | None = None
    compressor: CompressorState | None = None
    index_keys: Rows | None = None
    index_compressor: CompressorState | None = None

    @property
    def kind(self) -> int:
        """The ratio that these parts belong to: 0, 4 or 128."""
        if self.compressed is None:
            return SWA
        return C128 if self.index_keys is None else C4


@dataclass(frozen=True)
class State:
    """One sequence.

    Args:
        position: tokens processed, hence the position of the next one.
        layers: one entry per layer.
    """

    position: int
    layers: tuple[LayerState, ...]

    def check_rows(self, config: ModelConfig) -> None:
        """Every layer holds the rows that ``position`` tokens leave behind.

        Raises:
            ValueError: names the layer and its cache, the rows that it holds and those that were expected.
        """
        for layer, state in enumerate(self.layers):
            oldest = max(0, self.position - config.window_size + 1)
            if state.window.end != self.position or state.window.first > oldest:
                raise ValueError(
                    f"state: layer {layer}'s window holds rows {state.window.first} to {state.window.end - 1}, "
                    f"expected {oldest} to {self.position - 1} at position {self.position}"
                )
            for name, rows in (("compressed", state.compressed), ("index_keys", state.index_keys)):
                if rows is not None and rows.end != (entries := self.position // state.kind):
                    raise ValueError(
                        f"state: layer {layer}'s {name} cache holds {rows.end} entries, expected {entries} at position "
                        f"{self.position}"
                    )
            for name, open_group in (("compressor", state.compressor), ("index_compressor", state.index_compressor)):
                if open_group is not None:
                    tokens = open_group.entries * state.kind + open_group.kv.shape[0]
                    if tokens != self.position:
                        raise ValueError(
                            f"state: layer {layer}'s {name} has taken in {tokens} tokens, expected {self.position}"
                        )

    def check_room(self, config: ModelConfig, tokens: int) -> None:
        """Every cache can take ``tokens`` more tokens.

        Raises:
            ValueError: names the layer and its cache, what it has room for and what is needed.
        """
        for layer, state in enumerate(self.layers):
            ratio = config.ratio(layer)
            caches = [("window", state.window, tokens)]
            if state.compressed is not None:
                entries = (self.position + tokens) // ratio - self.position // ratio
                caches.append(("compressed", state.compressed, entries))
            for name, rows, needed in caches:
                if rows.room is not None and needed > rows.room:
                    raise ValueError(
                        f"state: layer {layer}'s {name} cache has room for {rows.room} rows, expected {needed} "
                        f"for {tokens} more tokens"
                    )


def empty_layer(
    config: ModelConfig,
    ratio: int,
    dtype: torch.dtype = torch.float32,
    window: Rows | None = None,
    compressed: Rows | None = None,
    device: torch.device | str = "cpu",
) -> LayerState:
    """A layer at the start of a sequence; rows are plain where none are given.

    Args:
        config: the model.
        ratio: of the layer.
        dtype: arithmetic type.
        window: empty rows for the window.
        compressed: empty rows for compressed entries.
        device: where plain rows and open groups lie, the weights' device.
    """

    def plain(width: int) -> PlainRows:
        return PlainRows(torch.zeros(0, width, dtype=dtype, device=device))

    window = plain(config.head_dim) if window is None else window
    if ratio == SWA:
        return LayerState(window)
    overlap = ratio == C4
    layer = LayerState(
        window,
        plain(config.head_dim) if compressed is None else compressed,
        empty_state(ratio, config.head_dim, overlap, dtype, device),
    )
    if not overlap:
        return layer
    return LayerState(
        layer.window,
        layer.compressed,
        layer.compressor,
        plain(config.index_head_dim),
        empty_state(ratio, config.index_head_dim, overlap, dtype, device),
    )


def empty_sequence(
    config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> State:
    """A new sequence on plain tensors: no rows, open groups empty, "previous" C4 groups weightless."""
    return State(0, tuple(empty_layer(config, ratio, dtype, device=device) for ratio in config.main_ratios))


def paged_sequence(
    config: ModelConfig,
    max_tokens: int,
    chunk: int,
    *,
    block_size: int = 64,
    page_tokens: int = 256,
    dialect: Dialect | str = Dialect.FN,
    compressed_dialect: Dialect | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> State:
    """A new sequence on paged FP8 caches of its own; indexer keys stay plain tensors.

    Args:
        config: the model; its head_dim must be the cache's 512.
        max_tokens: tokens that the compressed caches have room for.
        chunk: most tokens of one forward pass: the window cache holds them and the window before them.
        block_size: entries per block of the window caches.
        page_tokens: tokens that a block of a compressed cache stands for: 64 C4 entries, 2 C128 entries.
        dialect: e4m3 dialect of the window caches.
        compressed_dialect: of the compressed caches; default as the windows'.
        dtype: arithmetic type.
        device: where everything lies, the weights' device.

    Raises:
        ValueError: head_dim is not 512, a size is not positive, or a page is no whole number of entries.
    """
    if config.head_dim != kv_cache.HEAD_DIM or config.rope_head_dim != kv_cache.ROPE_DIM:
        raise ValueError(
            f"config: {config.name} has head_dim {config.head_dim} with {config.rope_head_dim} rotary, expected "
            f"{kv_cache.HEAD_DIM} with {kv_cache.ROPE_DIM} for a 584-byte cache"
        )
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    for ratio in set(config.main_ratios) - {SWA}:
        if page_tokens < 1 or page_tokens % ratio:
            raise ValueError(f"page_tokens: got {page_tokens}, expected a positive multiple of the ratio {ratio}")

    def rows(count: int, size: int, which: Dialect | str) -> PagedRows:
        blocks = -(-count // size)
        # 0xFF poisons what nobody has written: NaN codes, NaN scales, NaN rope.
        return PagedRows(kv_cache.allocate(blocks, size, which, device=device, fill=0xFF), tuple(range(blocks)))

    def layer(ratio: int) -> LayerState:
        # One block more than the rows fill: the oldest may be alive for a single row.
        window = rows(config.window_size + chunk + block_size, block_size, dialect)
        compressed = None
        if ratio:
            compressed = rows(max_tokens // ratio, page_tokens // ratio, compressed_dialect or dialect)
        return empty_layer(config, ratio, dtype, window, compressed, device)

    return State(0, tuple(layer(ratio) for ratio in config.main_ratios))
