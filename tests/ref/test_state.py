"""Rows, plain and paged, and sequences on real paged FP8 caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close, random_tokens, random_weights, tiny

from dsv4ref.config import V4_TINY
from dsv4ref.formats import Dialect, Scope, kv_cache
from dsv4ref.formats.scope import ragged
from dsv4ref.ref.attention import attend_row_ref
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.mtp import MtpState, mtp_ref
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.sparse_attention import sparse_attention_ref
from dsv4ref.ref.state import PagedRows, PlainRows, Rows, State, empty_layer, empty_sequence, paged_sequence

# Wide enough for the 584-byte cache, small in everything else.
PAGED = replace(
    tiny((0, 4, 128)), head_dim=512, n_heads=4, o_groups=2, hidden_size=64, moe_inter_dim=32, q_lora_rank=32
)


def paged(blocks: int, block_size: int, dialect: Dialect = Dialect.FN) -> PagedRows:
    """Blocks handed out in a scrambled order, and poisoned memory."""
    order = tuple(reversed(range(0, blocks, 2))) + tuple(range(1, blocks, 2))
    return PagedRows(kv_cache.allocate(blocks, block_size, dialect, fill=0xFF), order)


@pytest.mark.parametrize("make", [lambda: PlainRows(torch.zeros(0, 512)), lambda: paged(5, 3)], ids=["plain", "paged"])
def test_rows_are_found_by_number(make: Callable[[], Rows], rng: torch.Generator) -> None:
    rows = make()
    kv = torch.randn((12, 512), generator=rng)
    kv = kv_cache.dequantise(*kv_cache.quantise(kv, Dialect.FN), Dialect.FN, torch.float32)
    rows = rows.append(kv[:1]).append(kv[1:1]).append(kv[1:8]).forget(4)
    assert (rows.first, rows.end) == (4, 8)
    rows = rows.append(kv[8:])
    numbers = torch.tensor([11, 4, 4, 7, 8])
    assert torch.equal(rows.gather(numbers, torch.float32), kv[numbers])
    assert rows.gather(numbers, torch.float64).dtype is torch.float64
    assert torch.equal(rows.forget(-5).gather(numbers, torch.float32), kv[numbers]), "forgetting nothing"
    for number in (3, 12, -1):
        with pytest.raises(ValueError, match=rf"numbers: row {number} is not held, expected 4 to 11"):
            rows.gather(torch.tensor([5, number]), torch.float32)


def test_forgotten_blocks_are_used_again() -> None:
    """Four blocks of 4 carry a window of 8 rows through 60 rows, and never more than 4 blocks exist."""
    rows, kv = paged(4, 4), torch.arange(60.0)[:, None].repeat(1, 512) / 16
    for row in range(60):
        rows = rows.append(kv[row : row + 1]).forget(row - 7)
        live = torch.arange(rows.first, rows.end)
        assert_close(rows.gather(live, torch.float32)[:, -1], kv[live, -1].to(torch.bfloat16).float(), 0.0, f"{row}")
        used = [block for block in rows.table if block is not None]
        assert len(set(used)) == len(used)
        assert sorted([*used, *rows.free]) == [0, 1, 2, 3]


def test_a_full_cache_is_an_error_before_any_write() -> None:
    rows = paged(2, 3).append(torch.ones(4, 512))
    before = rows.cache.data.clone()
    assert rows.room == 2
    with pytest.raises(ValueError, match="rows: got 3 more, but the cache has room for 2"):
        rows.append(torch.ones(3, 512))
    assert torch.equal(rows.cache.data, before)


@pytest.mark.parametrize("dialect", Dialect)
def test_paged_caches_give_the_bits_of_the_simulated_format(dialect: Dialect) -> None:
    """Prefill, a chunk and decode over the window's edge: bytes in pages, or numbers that went through FP8."""
    model = Model(PAGED, random_weights(PAGED, 5), Numerics(kv_dialect=dialect))
    tokens = random_tokens(PAGED, 140, 5)
    other = Dialect.FNUZ if dialect is Dialect.FN else Dialect.FN  # each cache in its own dialect
    plain = model.new_sequence()
    pages = paged_sequence(PAGED, 140, 125, block_size=16, dialect=dialect, compressed_dialect=other)
    for chunk in tokens.split([125, 2, 5, 1, 1, 1, 1, 1, 1, 1, 1]):
        want, plain = forward_ref(model, chunk, plain)
        got, pages = forward_ref(model, chunk, pages)
        assert torch.equal(got.logits, want.logits), f"up to position {plain.position}"
    assert isinstance(pages.layers[1].compressed, PagedRows)
    assert pages.layers[1].compressed.end == 35
    # Both dialects hold the same values: only the caches themselves can tell which they are in.
    for layer in pages.layers:
        assert isinstance(layer.window, PagedRows)
        assert layer.window.cache.dialect is dialect
        assert not isinstance(layer.compressed, PagedRows) or layer.compressed.cache.dialect is other


def test_rows_are_what_a_kernels_scopes_would_name(rng: torch.Generator) -> None:
    """The reference's attention over two kinds of rows is `sparse_attention_ref` over their slots."""
    window, entries = paged(4, 16), paged(3, 2, Dialect.FNUZ)
    window = window.append(torch.randn((50, 512), generator=rng)).forget(20)
    entries = entries.append(torch.randn((5, 512), generator=rng))
    recent, selected = torch.arange(22, 50), torch.tensor([4, 0, 3])
    q, sink = torch.randn((4, 512), generator=rng), torch.randn(4, generator=rng)
    keys = torch.cat((window.gather(recent, torch.float64), entries.gather(selected, torch.float64)))
    got = attend_row_ref(q.double(), keys, sink.double(), 512**-0.5)
    scopes = [
        Scope(rows.cache, *ragged([rows.slots(numbers).tolist()]), width=128)
        for rows, numbers in ((window, recent), (entries, selected))
    ]
    want, _ = sparse_attention_ref(q[None], scopes, sink, 512**-0.5)
    assert_close(got, want[0], 1e-13)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (64, r"state: layer 0's window cache has room for 247 rows, expected 291 for 291 more tokens"),
        (300, r"state: layer 1's compressed cache has room for 62 rows, expected 73 for 291 more tokens"),
    ],
)
def test_a_cache_that_is_too_small_is_refused_before_any_work(chunk: int, message: str) -> None:
    model = Model(PAGED, random_weights(PAGED, 5))
    tokens = random_tokens(PAGED, 300, 5)
    _, state = forward_ref(model, tokens[:9], paged_sequence(PAGED, 8, chunk))
    caches = [rows.cache.data for layer in state.layers for rows in (layer.window, layer.compressed) if rows]  # type: ignore[attr-defined]
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match=message):
        forward_ref(model, tokens[9:], state)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
    output, _ = forward_ref(model, tokens[9:12], state)
    assert torch.isfinite(output.logits).all()


def test_an_mtp_window_that_is_too_small_is_refused_before_any_work() -> None:
    model, window = Model(PAGED, random_weights(PAGED, 5)), paged(1, 2)
    before, streams = window.cache.data.clone(), torch.zeros(3, PAGED.hc_mult, PAGED.hidden_size)
    with pytest.raises(ValueError, match="window cache has room for 2 rows, expected 3 for 3 more tokens"):
        mtp_ref(model, random_tokens(PAGED, 3, 5), streams, MtpState(0, empty_layer(PAGED, 0, window=window)))
    assert torch.equal(window.cache.data, before)


def test_impossible_paged_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="config: test has head_dim 128 with 64 rotary, expected 512 with 64"):
        paged_sequence(tiny((0,)), 8, 8)
    with pytest.raises(ValueError, match="chunk: got 0, expected a positive integer"):
        paged_sequence(V4_TINY, 8, 0)
    with pytest.raises(ValueError, match="page_tokens: got 64, expected a positive multiple of the ratio 128"):
        paged_sequence(V4_TINY, 8, 8, page_tokens=64)


def test_a_new_sequence_holds_nothing() -> None:
    state: State = empty_sequence(tiny((0, 4, 128)))
    assert state.position == 0
    assert [layer.kind for layer in state.layers] == [0, 4, 128]
    for layer in state.layers:
        for rows in (layer.window, layer.compressed, layer.index_keys):
            assert rows is None or rows.end == 0
        for compressor in (layer.compressor, layer.index_compressor):
            assert compressor is None or torch.isneginf(compressor.previous_score).all()
            assert compressor is None or (compressor.kv.shape[0], compressor.entries) == (0, 0)
    assert state.layers[1].index_compressor is not None
    assert state.layers[1].index_compressor.previous_score.shape == (4, 128)
