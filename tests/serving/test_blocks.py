"""Blocks: every one is free or held once, rings keep what a query still sees, and nobody reads another's rows."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.config import V4_FLASH, V4_TINY
from dsv4ref.formats import kv_cache
from dsv4ref.ref.numerics import DEFAULT, STRUCTURE
from dsv4ref.ref.state import PlainRows
from dsv4ref.serving import blocks
from dsv4ref.serving.blocks import BlockPool, CacheSizes, OutOfBlocksError, PagedCaches, RequestRows

SIZES = CacheSizes(slots=2, max_length=300, cache_tokens=1024, chunk=40, block_size=16)


def caches(sizes: CacheSizes = SIZES, device: str = "cpu") -> PagedCaches:
    return PagedCaches(V4_TINY, sizes, DEFAULT, device)


def rows_of(paged: PagedCaches, owner: int, layer: int = 2) -> RequestRows:
    window = paged.open(owner, 300).layers[layer].window
    assert isinstance(window, RequestRows)
    return window


def test_a_pool_counts_its_blocks_over_any_order_of_takes_and_returns(rng: torch.Generator) -> None:
    pool = BlockPool("pool", 23)
    for owner in range(300):
        asked = int(torch.randint(0, 9, (1,), generator=rng))
        if asked <= len(pool.free):
            assert len(set(pool.take(owner, asked))) == asked
        else:
            before = pool.free
            with pytest.raises(OutOfBlocksError, match=f"{len(before)} of 23 blocks are free, expected {asked}"):
                pool.take(owner, asked)
            assert pool.free == before
            pool.give_back(pool.owners[int(torch.randint(0, len(pool.owners), (1,), generator=rng))])
        pool.check()
    for owner in pool.owners:
        pool.give_back(owner)
    assert sorted(pool.free) == list(range(23))


def test_a_pool_refuses_whoever_takes_or_returns_twice() -> None:
    pool = BlockPool("pool", 4)
    pool.take(7, 2)
    with pytest.raises(ValueError, match="owner: 7 asks pool for 1 blocks"):
        pool.take(7, 1)
    pool.give_back(7)
    with pytest.raises(ValueError, match="owner: got 7, expected one that holds blocks of pool"):
        pool.give_back(7)


@pytest.mark.parametrize(("change", "times"), [(lambda free: free.pop(), 0), (lambda free: free.append(free[-1]), 2)])
def test_a_lost_or_doubled_block_is_named(change: object, times: int) -> None:
    pool = BlockPool("pool", 4)
    assert callable(change)
    change(pool._free)
    with pytest.raises(RuntimeError, match=f"pool: block 0 is accounted for {times} times, expected 1"):
        pool.check()


@pytest.mark.parametrize("chunk", [1, 17, 33])  # 127 + 33 rows are exactly ten blocks of 16
def test_a_ring_keeps_what_the_next_chunk_still_sees(chunk: int, rng: torch.Generator, device: str) -> None:
    sizes = CacheSizes(slots=2, max_length=300, cache_tokens=1024, chunk=chunk, block_size=16)
    paged = caches(sizes, device)
    ring, other = rows_of(paged, 0), rows_of(paged, 1)
    plain, width = PlainRows(torch.zeros(0, 512)), V4_TINY.window_size
    other = other.append(torch.ones(chunk, 512))
    while ring.end < 400:
        new = torch.randn(int(torch.randint(1, chunk + 1, (1,), generator=rng)), 512, generator=rng).bfloat16().float()
        ring, plain = ring.append(new), plain.append(new)
        held = torch.arange(ring.first, ring.end)
        got, want = ring.gather(held, torch.float32), plain.gather(held, torch.float32)
        # fp8 with a scale per 64: half a step of 1/8 of the block's largest, twice for its power-of-two scale.
        assert float((got - want).abs().max()) <= float(want.abs().max()) / 16, f"at {ring.end} tokens"
        ring, plain = ring.forget(ring.end + 1 - width), plain.forget(ring.end + 1 - width)
        assert ring.end - ring.first >= min(ring.end, width - 1)
    assert torch.equal(other.gather(torch.arange(chunk), torch.float32), torch.ones(chunk, 512))


def test_a_row_that_was_forgotten_or_never_written_is_not_given_out() -> None:
    ring = rows_of(caches(), 0).append(torch.zeros(40, 512)).forget(9)
    for number in (8, 40):
        with pytest.raises(ValueError, match=f"numbers: row {number} is not held, expected 9 to 39"):
            ring.slots(torch.tensor([20, number]))


def test_a_full_ring_refuses_more_rows_and_keeps_its_own() -> None:
    ring = rows_of(caches(), 0).append(torch.ones(167, 512))  # eleven blocks of 16: 127 rows and a chunk of 40
    assert ring.room == 9
    with pytest.raises(ValueError, match="rows: got 10 more, but the cache has room for 9"):
        ring.append(torch.zeros(10, 512))
    assert torch.equal(ring.gather(torch.arange(167), torch.float32), torch.ones(167, 512))


def test_requests_never_share_a_slot() -> None:
    paged = caches()
    held = [paged.open(owner, 300) for owner in (0, 1)]
    for layer in range(V4_TINY.n_layers):
        for name in ("window", "compressed", "index_keys"):
            rows = [getattr(state.layers[layer], name) for state in held]
            if rows[0] is None:
                continue
            first, second = (set(r.append(torch.zeros(r.room, r.store.shape[2] if name == "index_keys" else 512))
                                 .slots(torch.arange(r.room)).tolist()) for r in rows)  # fmt: skip
            assert not first & second, (layer, name)


def test_a_state_that_cannot_be_made_leaves_no_block_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = caches()
    paged.open(0, 300)

    def no_memory(*_: object) -> None:
        raise MemoryError("no memory for this test")

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "empty_layer", no_memory)
        with pytest.raises(MemoryError):
            paged.open(1, 300)
    paged.check((0,))
    with pytest.raises(ValueError, match="owner: 0 asks window"):
        paged.open(0, 300)
    paged.check((0,))
    paged.open(1, 300)
    with pytest.raises(OutOfBlocksError, match="window: 0 of 22 blocks are free, expected 11"):
        paged.open(2, 1)
    paged.check((0, 1))
    with pytest.raises(RuntimeError, match=r"window: held by \[0, 1\], expected \[0\]"):
        paged.check((0,))


def test_bytes_are_what_is_allocated() -> None:
    paged = caches()
    allocated = 0
    for layer in paged.layers:
        for cache in (layer.window, layer.compressed):
            allocated += 0 if cache is None else cache.data.untyped_storage().nbytes()
        allocated += 0 if layer.index_keys is None else layer.index_keys.untyped_storage().nbytes()
    assert paged.nbytes == allocated


def test_a_flash_page_is_64_c4_entries_with_their_keys_and_2_c128_entries() -> None:
    def nbytes(pages: int) -> int:
        sizes = CacheSizes(slots=1, max_length=256, cache_tokens=256 * pages, chunk=2048)
        return sizes.nbytes(V4_FLASH, torch.float32)

    c4 = V4_FLASH.n_c4_layers * (kv_cache.block_stride(64) + 64 * V4_FLASH.index_head_dim * 4)
    assert nbytes(10) - nbytes(9) == c4 + V4_FLASH.n_c128_layers * kv_cache.block_stride(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 0}, "slots: got 0, expected a positive integer"),
        ({"chunk": True}, "chunk: got True, expected a positive integer"),
        ({"cache_tokens": 299}, "cache_tokens: got 299, expected at least max_length = 300"),
        ({"page_tokens": 192}, "page_tokens: got 192, expected a multiple of 128"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheSizes(**{**vars(SIZES), **change})


def test_caches_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="numerics: got quantise_kv='none', expected 'fp8'"):
        PagedCaches(V4_TINY, SIZES, STRUCTURE)


def test_caches_that_do_not_fit_the_memory_say_how_much_was_asked_for() -> None:
    sizes = CacheSizes(slots=2, max_length=300, cache_tokens=2**45, chunk=40)
    with pytest.raises(RuntimeError, match=r"caches: \d{15,} bytes could not be allocated on cpu .* cache_tokens = "):
        PagedCaches(V4_TINY, sizes, DEFAULT)
