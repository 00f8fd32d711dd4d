"""The engine's paged caches, shared by all requests, and the account of who holds which block.

Two pools of blocks; a block of a pool is the same number in the caches of all layers that the pool serves::

    window   per layer, 584-byte entries, block_size tokens to a block; a request's blocks form a ring
    pages    page_tokens tokens to a page: in a C4 layer 64 entries and 64 indexer keys, in a C128 layer 2 entries

A ring holds the last W - 1 tokens and the chunk that is being computed, whatever the request's length: row i lies in
block ``(i // block_size) mod ring``. A request takes all its blocks when it joins and returns them when it leaves; a
request that runs never waits for memory.

`RequestRows` are one request's rows in these caches, and make the states that the reference model works on. Behind the
blocks of a pool every cache has one more, the *bin*: nobody owns it and nobody reads it, and a step that writes a fixed
number of entries, whoever has one to write, sends the others there.

Source: paging and page size as in vLLM's DeepSeek-V4 caches; rows and states: dsv4ref.ref.state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4ref.config import C4, SWA, ModelConfig
from dsv4ref.formats import kv_cache
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.state import LayerState, State, empty_layer

__all__ = ["BlockPool", "CacheSizes", "LayerCaches", "OutOfBlocksError", "PagedCaches", "RequestRows", "index_dtype"]


class OutOfBlocksError(RuntimeError):
    """A pool has fewer free blocks than were asked for."""


class BlockPool:
    """Blocks by number, each free or held by one owner.

    Args:
        name: for messages.
        blocks: how many, numbered from 0.

    Raises:
        ValueError: a negative number of blocks.
    """

    def __init__(self, name: str, blocks: int) -> None:
        if blocks < 0:
            raise ValueError(f"blocks: got {blocks} for {name}, expected 0 or more")
        self.name, self.blocks = name, blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._held: dict[int, tuple[int, ...]] = {}

    @property
    def free(self) -> tuple[int, ...]:
        """Blocks that nobody holds; the last one is given out next."""
        return tuple(self._free)

    @property
    def spare(self) -> int:
        """How many these are."""
        return len(self._free)

    @property
    def owners(self) -> tuple[int, ...]:
        """Who holds blocks."""
        return tuple(self._held)

    def held(self, owner: int) -> tuple[int, ...]:
        """An owner's blocks, in the order in which it took them; none for somebody who holds none."""
        return self._held.get(owner, ())

    def take(self, owner: int, count: int) -> tuple[int, ...]:
        """Hand ``count`` blocks to an owner that holds none.

        Raises:
            ValueError: the owner holds blocks already, or a negative count.
            OutOfBlocksError: fewer are free; nothing is handed out.
        """
        if owner in self._held or count < 0:
            raise ValueError(f"owner: {owner} asks {self.name} for {count} blocks and holds {self._held.get(owner)}")
        if count > self.spare:
            raise OutOfBlocksError(f"{self.name}: {self.spare} of {self.blocks} blocks are free, expected {count}")
        self._held[owner] = tuple(self._free.pop() for _ in range(count))
        return self._held[owner]

    def give_back(self, owner: int) -> None:
        """Take an owner's blocks back.

        Raises:
            ValueError: the owner holds none.
        """
        if owner not in self._held:
            raise ValueError(f"owner: got {owner}, expected one that holds blocks of {self.name}: {self.owners}")
        self._free.extend(reversed(self._held.pop(owner)))

    def assign(self, held: Mapping[int, tuple[int, ...]]) -> None:
        """Give blocks to exactly these owners, whoever held them before; all others are free.

        Args:
            held: owner -> its blocks, in the order in which it took them.

        Raises:
            ValueError: a block that there is not, or one with two owners; nothing has changed.
        """
        given = [block for blocks in held.values() for block in blocks]
        if len(set(given)) < len(given) or not set(given) <= set(range(self.blocks)):
            raise ValueError(f"held: got {dict(held)}, expected blocks of {self.name} below {self.blocks}, each once")
        self._held = dict(held)
        self._free = sorted(set(range(self.blocks)) - set(given), reverse=True)

    def check(self) -> None:
        """Every block is free or held, and once.

        Raises:
            RuntimeError: names the first block that is not.
        """
        seen = Counter([*self._free, *(block for held in self._held.values() for block in held)])
        for block in range(self.blocks):
            if seen[block] != 1:
                raise RuntimeError(f"{self.name}: block {block} is accounted for {seen[block]} times, expected 1")


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """How large the caches are.

    Args:
        slots: requests at once; each has a ring.
        max_length: tokens of one request at most.
        cache_tokens: tokens that the compressed caches hold over all requests, in whole pages, at least ``max_length``.
        chunk: prompt tokens of one request and step at most.
        block_size: tokens per window block.
        page_tokens: tokens per page, a multiple of 128.

    Raises:
        ValueError: a number that cannot be, naming it.
    """

    slots: int
    max_length: int
    cache_tokens: int
    chunk: int
    block_size: int = 64
    page_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        if self.cache_tokens < self.max_length:
            raise ValueError(
                f"cache_tokens: got {self.cache_tokens}, expected at least max_length = {self.max_length}, or the "
                "longest request could never join"
            )
        if self.page_tokens % 128:
            raise ValueError(f"page_tokens: got {self.page_tokens}, expected a multiple of 128: whole C128 entries")

    def ring(self, config: ModelConfig) -> int:
        """Window blocks of one request."""
        return -(-(config.window_size - 1 + self.chunk) // self.block_size)

    def pages(self, config: ModelConfig, tokens: int) -> int:
        """Pages for so many tokens; none where no layer compresses."""
        return -(-tokens // self.page_tokens) if any(config.main_ratios) else 0

    def nbytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that the caches take; nothing is allocated.

        Args:
            config: the model.
            dtype: of indexer keys.
        """
        pages, total = self.pages(config, self.cache_tokens) + 1, 0  # and the bins
        for ratio in config.main_ratios:
            total += (self.slots * self.ring(config) + 1) * kv_cache.block_stride(self.block_size)
            if ratio != SWA:
                total += pages * kv_cache.block_stride(self.page_tokens // ratio)
            if ratio == C4:
                total += pages * (self.page_tokens // C4) * config.index_head_dim * dtype.itemsize
        return total


@dataclass(frozen=True)
class RequestRows:
    """One request's rows in a shared cache; the `Rows` of dsv4ref.ref.state.

    Row i is entry ``i mod bs`` of block ``blocks[(i // bs) mod n]``. In a ring, appending overwrites forgotten rows; a
    compressed cache forgets nothing and never wraps.

    Args:
        store: a paged FP8 cache, or ``[blocks, bs, d]`` of unpacked rows (indexer keys).
        blocks: the request's, in order.
        first: oldest row held.
        end: one past the newest row.
    """

    store: KVCache | Tensor
    blocks: tuple[int, ...]
    first: int = 0
    end: int = 0

    @property
    def block_size(self) -> int:
        """Rows per block."""
        return self.store.block_size if isinstance(self.store, KVCache) else int(self.store.shape[1])

    @property
    def room(self) -> int:
        return len(self.blocks) * self.block_size - (self.end - self.first)

    def slots(self, numbers: Tensor) -> Tensor:
        """Flat slot ids of rows, int64 ``[n]``, where ``numbers`` are: what a scope's list holds.

        Raises:
            ValueError: a row that is not held.
        """
        outside = (numbers < self.first) | (numbers >= self.end)
        if bool(outside.any()):
            raise ValueError(
                f"numbers: row {int(numbers[outside][0])} is not held, expected {self.first} to {self.end - 1}"
            )
        blocks = torch.tensor(self.blocks, dtype=torch.int64, device=numbers.device)
        return blocks[numbers // self.block_size % len(self.blocks)] * self.block_size + numbers % self.block_size

    def append(self, rows: Tensor) -> RequestRows:
        if rows.shape[0] > self.room:
            raise ValueError(f"rows: got {rows.shape[0]} more, but the cache has room for {self.room}")
        grown = replace(self, end=self.end + int(rows.shape[0]))
        if not rows.shape[0]:
            return grown
        slots = grown.slots(torch.arange(self.end, grown.end))
        if isinstance(self.store, KVCache):
            where = self.store.data.device
            kv_cache.insert(self.store, slots.to(where), rows.to(where))
        else:
            self.store.view(-1, self.store.shape[2])[slots.to(self.store.device)] = rows.to(self.store)
        return grown

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        slots = self.slots(numbers)
        if isinstance(self.store, KVCache):
            return kv_cache.gather(self.store, slots.to(self.store.data.device), dtype).to(numbers.device)
        return self.store.view(-1, self.store.shape[2])[slots.to(self.store.device)].to(numbers.device, dtype)

    def forget(self, before: int) -> RequestRows:
        return replace(self, first=max(self.first, min(before, self.end)))


@dataclass(frozen=True)
class LayerCaches:
    """One layer's caches, all requests together.

    Args:
        window: ``[slots * ring + 1, block_size]`` entries.
        compressed: ``[pages + 1, page_tokens / r]`` entries; None without compression.
        index_keys: ``[pages + 1, page_tokens / 4, index_head_dim]`` of `index_dtype`, on C4 layers: the values are
            those of the numerics' format, unpacked, since the reference indexer reads them.
    """

    window: KVCache
    compressed: KVCache | None = None
    index_keys: Tensor | None = None


def index_dtype(numerics: Numerics) -> torch.dtype:
    """What indexer keys are kept in: bfloat16 where it holds every value of their format, as kernels read them."""
    return torch.bfloat16 if numerics.round_bf16 else numerics.dtype


class PagedCaches:
    """Every layer's caches and both pools.

    Args:
        config: the model; its head_dim must be the cache's 512.
        sizes: how large.
        numerics: cache dialect and arithmetic dtype.
        device: where the caches live.
        reference: where the reference computes, hence where a state's open groups lie; by default there too.

    Raises:
        ValueError: a head that is not 512 wide with 64 rotary, or formats other than an FP8 cache's.
        RuntimeError: the memory is not there; the message says how much was asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: CacheSizes,
        numerics: Numerics,
        device: torch.device | str = "cpu",
        reference: torch.device | str | None = None,
    ) -> None:
        if config.head_dim != kv_cache.HEAD_DIM or config.rope_head_dim != kv_cache.ROPE_DIM:
            raise ValueError(
                f"config: {config.name} has head_dim {config.head_dim} with {config.rope_head_dim} rotary, expected "
                f"{kv_cache.HEAD_DIM} with {kv_cache.ROPE_DIM} for a 584-byte cache"
            )
        if numerics.quantise_kv != "fp8":
            raise ValueError(
                f"numerics: got quantise_kv={numerics.quantise_kv!r}, expected 'fp8': a 584-byte cache quantises its "
                "keys whatever the formats say"
            )
        self.config, self.sizes, self.numerics = config, sizes, numerics
        self.reference = torch.device(device if reference is None else reference)
        self.nbytes = sizes.nbytes(config, index_dtype(numerics))
        blocks, pages = sizes.slots * sizes.ring(config), sizes.pages(config, sizes.cache_tokens)
        try:
            self.layers = tuple(self._layer(ratio, blocks + 1, pages + 1, device) for ratio in config.main_ratios)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(
                f"caches: {self.nbytes} bytes could not be allocated on {device} ({error}); expected smaller slots = "
                f"{sizes.slots} or cache_tokens = {sizes.cache_tokens}"
            ) from error
        self.window_pool, self.page_pool = BlockPool("window", blocks), BlockPool("pages", pages)

    def _layer(self, ratio: int, blocks: int, pages: int, device: torch.device | str) -> LayerCaches:
        # 0xFF poisons what nobody has written: NaN codes, NaN scales, NaN rope.
        sizes, dialect = self.sizes, self.numerics.kv_dialect
        window = kv_cache.allocate(blocks, sizes.block_size, dialect, device=device, fill=0xFF)
        if ratio == SWA:
            return LayerCaches(window)
        entries = sizes.page_tokens // ratio
        compressed = kv_cache.allocate(pages, entries, dialect, device=device, fill=0xFF)
        if ratio != C4:
            return LayerCaches(window, compressed)
        shape = (pages, entries, self.config.index_head_dim)
        keys = torch.full(shape, torch.nan, dtype=index_dtype(self.numerics), device=device)
        return LayerCaches(window, compressed, keys)

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens could join now."""
        ring, pages = self.sizes.ring(self.config), self.sizes.pages(self.config, tokens)
        return ring <= self.window_pool.spare and pages <= self.page_pool.spare

    def open(self, owner: int, tokens: int) -> State:
        """Take a request's blocks and make its empty state over them.

        Args:
            owner: the request's id.
            tokens: that it computes at most.

        Raises:
            OutOfBlocksError: not `fits`.
            ValueError: the owner has blocks already.
            RuntimeError, MemoryError: the rest of the state could not be allocated. Whatever is raised, the owner holds
                no more blocks than before.
        """
        ring = self.window_pool.take(owner, self.sizes.ring(self.config))
        try:
            pages = self.page_pool.take(owner, self.sizes.pages(self.config, tokens))
            layers = zip(self.config.main_ratios, self.layers, strict=True)
            return State(0, tuple(self._rows(ratio, caches, ring, pages) for ratio, caches in layers))
        except BaseException:
            for pool in (self.window_pool, self.page_pool):
                if owner in pool.owners:
                    pool.give_back(owner)
            raise

    def _rows(self, ratio: int, caches: LayerCaches, ring: tuple[int, ...], pages: tuple[int, ...]) -> LayerState:
        compressed = None if caches.compressed is None else RequestRows(caches.compressed, pages)
        window = RequestRows(caches.window, ring)
        layer = empty_layer(self.config, ratio, self.numerics.dtype, window, compressed, self.reference)
        return layer if caches.index_keys is None else replace(layer, index_keys=RequestRows(caches.index_keys, pages))

    def behind(self, owner: int, position: int) -> State:
        """An owner's rows as they stand once so many of its tokens are computed, whoever wrote them; open groups empty.

        Args:
            owner: holds blocks.
            position: tokens computed.
        """
        config = self.config
        ring, pages = self.window_pool.held(owner), self.page_pool.held(owner)
        layers = []
        for ratio, caches in zip(config.main_ratios, self.layers, strict=True):
            layer = self._rows(ratio, caches, ring, pages)
            assert isinstance(layer.window, RequestRows)
            first = max(0, position + 1 - config.window_size)  # that the next token still sees
            layer = replace(layer, window=replace(layer.window, first=first, end=position))
            if isinstance(rows := layer.compressed, RequestRows):
                layer = replace(layer, compressed=replace(rows, end=position // ratio))
            if isinstance(rows := layer.index_keys, RequestRows):
                layer = replace(layer, index_keys=replace(rows, end=position // ratio))
            layers.append(layer)
        return State(position, tuple(layers))

    def close(self, owner: int) -> None:
        """Return a request's blocks; its state must not be used again.

        Raises:
            ValueError: the owner holds none.
        """
        self.window_pool.give_back(owner)
        self.page_pool.give_back(owner)

    def check(self, owners: tuple[int, ...]) -> None:
        """Both pools account for every block, and these owners, no others, hold some.

        Raises:
            RuntimeError: a block is lost or doubled, or somebody holds blocks who should not, or the reverse.
        """
        for pool in (self.window_pool, self.page_pool):
            pool.check()
            if sorted(pool.owners) != sorted(owners):
                raise RuntimeError(f"{pool.name}: held by {sorted(pool.owners)}, expected {sorted(owners)}")
