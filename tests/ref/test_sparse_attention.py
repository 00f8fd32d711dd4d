"""The attention reference against loops in plain Python, and the properties that its definition implies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4ref.formats import Dialect, KVCache, Scope, kv_cache
from dsv4ref.formats.scope import ragged
from dsv4ref.ref.sparse_attention import row_slots, sparse_attention_plain, sparse_attention_ref

SCALE = 512**-0.5


def filled(rng: torch.Generator, blocks: int, block_size: int = 2, dialect: str = "e4m3fn") -> KVCache:
    cache = kv_cache.allocate(blocks, block_size, dialect, fill=0xFF)
    kv_cache.insert(cache, torch.arange(cache.rows), torch.randn((cache.rows, 512), generator=rng) * 0.1)
    return cache


def scope(cache: KVCache, lists: list[list[int]]) -> Scope:
    return Scope(cache, *ragged(lists), width=max((len(row) for row in lists), default=0))


def queries(rng: torch.Generator, rows: int, heads: int) -> Tensor:
    return (torch.randn((rows, heads, 512), generator=rng) * 16).to(torch.bfloat16)


def by_loops(q: list[float], keys: list[list[float]], sink: float | None, scale: float) -> tuple[list[float], float]:
    """One query vector over its keys: the formula, number by number, in Python's float64."""
    scores = [scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    mass = math.fsum(math.exp(score) for score in scores)
    total = mass + (0.0 if sink is None else math.exp(sink))
    out = [math.fsum(math.exp(s) * key[d] for s, key in zip(scores, keys, strict=True)) / total for d in range(512)]
    return out, math.log(mass)


@pytest.mark.parametrize("with_sink", [False, True])
def test_the_reference_is_the_formula(with_sink: bool, rng: torch.Generator) -> None:
    """Two scopes of two geometries and dialects, holes and duplicates, number by number."""
    swa, extra = filled(rng, 3), filled(rng, 1, 8, "e4m3fnuz")
    lists = ([[5, 0, 5], [2]], [[-1, 7, 99], [3, 1]])
    scopes = [scope(swa, lists[0]), scope(extra, lists[1])]
    q, sink = queries(rng, 2, 2), torch.randn(2, generator=rng)
    out, lse = sparse_attention_ref(q, scopes, sink if with_sink else None, SCALE)
    assert out.dtype is lse.dtype is torch.float64

    valid = [([5, 0, 5], [7]), ([2], [3, 1])]
    for t, (swa_slots, extra_slots) in enumerate(valid):
        keys = [
            kv_cache.gather(cache, torch.tensor([slot]), torch.float64)[0].tolist()
            for cache, slots in ((swa, swa_slots), (extra, extra_slots))
            for slot in slots
        ]
        for h in range(2):
            want, want_lse = by_loops(q[t, h].tolist(), keys, sink[h].item() if with_sink else None, SCALE)
            assert lse[t, h].item() == pytest.approx(want_lse, abs=1e-12)
            error = (out[t, h] - torch.tensor(want, dtype=torch.float64)).abs()
            d = int(error.argmax())
            assert error[d] < 1e-13, f"{(t, h, d)}: {out[t, h, d].item()}, expected {want[d]}"


def test_the_sink_is_not_scaled(rng: torch.Generator) -> None:
    """A key whose score is 0 against a sink of 0 gets half the weight, whatever the scale."""
    cache = filled(rng, 1)
    q = torch.zeros(1, 1, 512, dtype=torch.bfloat16)
    key = kv_cache.gather(cache, torch.tensor([0]), torch.float64)[0]
    for scale in (SCALE, 100.0):
        out, lse = sparse_attention_ref(q, [scope(cache, [[0]])], torch.zeros(1), scale)
        assert torch.allclose(out[0, 0], key / 2, rtol=1e-15, atol=0)
        assert lse.item() == 0.0
        weighted, _ = sparse_attention_ref(q, [scope(cache, [[0]])], torch.full((1,), math.log(3)), scale)
        assert torch.allclose(weighted[0, 0], key / 4, rtol=1e-6, atol=0)


def test_sinks_at_the_ends(rng: torch.Generator) -> None:
    cache, q = filled(rng, 2), queries(rng, 1, 3)
    lists = [scope(cache, [[0, 1, 2]])]
    none, lse = sparse_attention_ref(q, lists, None, SCALE)
    ends = torch.tensor([-math.inf, math.inf, 0.0])
    out, lse_ends = sparse_attention_ref(q, lists, ends, SCALE)
    assert torch.equal(out[:, 0], none[:, 0])
    assert torch.count_nonzero(out[:, 1]) == 0
    assert (out[:, 2].abs() < none[:, 2].abs()).any()
    assert torch.equal(lse_ends, lse), "the LSE excludes the sink"


@pytest.mark.parametrize("lists", [[[]], [[-1, -1]], [[4, 2**31 - 1, -(2**31)]]], ids=["empty", "-1", "out of range"])
@pytest.mark.parametrize("sink", [None, 0.0, -math.inf, math.inf])
def test_rows_without_a_valid_slot_are_zero_with_lse_minus_infinity(
    lists: list[list[int]], sink: float | None, rng: torch.Generator
) -> None:
    sinks = None if sink is None else torch.full((2,), sink)
    scopes, q = [scope(filled(rng, 2), lists)], queries(rng, 1, 2)
    for attention in (sparse_attention_ref, sparse_attention_plain):
        out, lse = attention(q, scopes, sinks, SCALE)
        assert torch.count_nonzero(out) == 0
        assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_no_rows_at_all(rng: torch.Generator) -> None:
    out, lse = sparse_attention_ref(queries(rng, 0, 2), [scope(filled(rng, 1), [])], None, SCALE)
    assert out.shape == (0, 2, 512)
    assert lse.shape == (0, 2)


def test_the_order_of_slots_does_not_matter(rng: torch.Generator) -> None:
    cache, q = filled(rng, 8), queries(rng, 1, 4)
    slots = torch.randperm(16, generator=rng).tolist()
    out, lse = sparse_attention_ref(q, [scope(cache, [slots])], None, SCALE)
    again, lse_again = sparse_attention_ref(q, [scope(cache, [sorted(slots)])], None, SCALE)
    assert torch.allclose(out, again, rtol=1e-12, atol=1e-15)
    assert torch.allclose(lse, lse_again, rtol=1e-14)


def test_two_scopes_are_one_concatenated_scope(rng: torch.Generator) -> None:
    """The same entries in two caches, or all in one."""
    kv = torch.randn((8, 512), generator=rng) * 0.1
    first, second, both = (kv_cache.allocate(n, 2, "e4m3fn") for n in (2, 2, 4))
    kv_cache.insert(first, torch.arange(4), kv[:4])
    kv_cache.insert(second, torch.arange(4), kv[4:])
    kv_cache.insert(both, torch.arange(8), kv)
    q, sink = queries(rng, 2, 3), torch.randn(3, generator=rng)
    split = [scope(first, [[3, 0], []]), scope(second, [[1, 1], [2]])]
    joined = [scope(both, [[3, 0, 5, 5], [6]])]
    for got, want in zip(
        sparse_attention_ref(q, split, sink, SCALE), sparse_attention_ref(q, joined, sink, SCALE), strict=True
    ):
        assert torch.equal(got, want)


def test_a_slot_listed_twice_counts_twice(rng: torch.Generator) -> None:
    """Every slot doubled: the same average, and ln 2 more mass. One slot doubled: another average."""
    cache, q = filled(rng, 2), queries(rng, 1, 2)
    once, lse_once = sparse_attention_ref(q, [scope(cache, [[0, 1, 2]])], None, SCALE)
    twice, lse_twice = sparse_attention_ref(q, [scope(cache, [[0, 1, 2, 0, 1, 2]])], None, SCALE)
    assert torch.allclose(twice, once, rtol=1e-12)
    assert torch.allclose(lse_twice, lse_once + math.log(2), rtol=1e-12)
    uneven, _ = sparse_attention_ref(q, [scope(cache, [[0, 1, 2, 0]])], None, SCALE)
    assert (uneven - once).abs().max() > 1e-3


def test_row_slots_keep_order_and_duplicates_and_drop_the_invalid(rng: torch.Generator) -> None:
    lists = scope(filled(rng, 2), [[0], [3, -1, 4, 3, 2**31 - 1, -(2**31), 1], []])
    assert row_slots(lists, 1).tolist() == [3, 3, 1]
    assert row_slots(lists, 2).tolist() == []
    assert row_slots(lists, 1).dtype is torch.int64


def test_entries_nobody_refers_to_may_be_nan(rng: torch.Generator) -> None:
    cache = kv_cache.allocate(4, 2, "e4m3fn", fill=0xFF)
    kv_cache.insert(cache, torch.tensor([3]), torch.randn((1, 512), generator=rng))
    out, lse = sparse_attention_ref(queries(rng, 1, 2), [scope(cache, [[3, -1, 8]])], None, SCALE)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_nan_in_an_entry_that_is_read_shows(rng: torch.Generator) -> None:
    cache = filled(rng, 2)
    cache.entry_rows[1, 0, 7] = 0x7F
    out, _ = sparse_attention_ref(queries(rng, 2, 2), [scope(cache, [[0, 2], [0]])], None, SCALE)
    assert torch.isnan(out[0]).all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("dialect", Dialect)
def test_the_plain_implementation_differs_by_bf16_roundings_only(dialect: Dialect, rng: torch.Generator) -> None:
    """P and the output are rounded to 8 bits: every element within two ulps of its row's scale, and not exact."""
    cache, q = filled(rng, 16, dialect=dialect), queries(rng, 2, 4)
    scopes, sink = [scope(cache, [list(range(32)), [5, 6]])], torch.randn(4, generator=rng)
    want, want_lse = sparse_attention_ref(q, scopes, sink, SCALE)
    out, lse = sparse_attention_plain(q, scopes, sink, SCALE)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(lse.to(torch.float64), want_lse, rtol=1e-5, atol=1e-6)
    error = (out.to(torch.float64) - want).abs()
    allowed = want.abs() / 128 + want.abs().amax(dim=-1, keepdim=True) / 128
    assert (error <= allowed).all(), f"worst {(error / allowed).max().item():.2f} of its bound"
    assert error.max() > 0


def test_mismatched_arguments_are_refused(rng: torch.Generator) -> None:
    cache, q = filled(rng, 2), queries(rng, 2, 3)
    scopes = [scope(cache, [[0], [1]])]
    for attention in (sparse_attention_ref, sparse_attention_plain):
        with pytest.raises(ValueError, match=r"q: got shape \(2, 3, 448\), expected \[T, H, 512\]"):
            attention(q[..., :448], scopes, None, SCALE)
        with pytest.raises(ValueError, match="scopes: got none"):
            attention(q, [], None, SCALE)
        with pytest.raises(ValueError, match=r"scopes\[1\]: got lists of 3 rows, expected 2 like q"):
            attention(q, [*scopes, scope(cache, [[0], [1], [2]])], None, SCALE)
        with pytest.raises(ValueError, match=r"sink: got shape \(2,\), expected \(3,\), one per head"):
            attention(q, scopes, torch.zeros(2), SCALE)


def test_extreme_scores_do_not_overflow(rng: torch.Generator) -> None:
    cache = filled(rng, 2)
    q = queries(rng, 1, 2) * 4096
    for attention in (sparse_attention_ref, sparse_attention_plain):
        out, lse = attention(q, [scope(cache, [[0, 1, 2, 3]])], torch.zeros(2), SCALE)
        assert torch.isfinite(out).all()
        assert (lse.abs() > 700).any(), "the test must reach scores whose exponential overflows"
