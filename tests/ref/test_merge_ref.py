"""The merge's definition against attention over all keys at once, in float64, and at the ends of the range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dsv4ref.ref.merge import merge_scopes_ref, merge_weights_ref
from dsv4ref.ref.rope import frequencies, rotate_back_ref, rotate_ref

INF, NAN = math.inf, math.nan


def attention(scores: Tensor, values: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over all keys of a row, the sink a column of zero value: scores ``[T, H, K]``, values ``[T, K, D]``."""
    lse = torch.logsumexp(scores, dim=-1)
    column = torch.full_like(lse, -INF) if sink is None else sink.expand_as(lse)
    weights = torch.softmax(torch.cat([scores, column[..., None]], dim=-1), dim=-1)[..., :-1]
    return weights @ values, lse


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("cuts", [(7,), (1, 9), (3, 4, 11, 12)], ids=str)
def test_merging_the_parts_is_attention_over_the_whole(
    cuts: tuple[int, ...], with_sink: bool, rng: torch.Generator
) -> None:
    scores = torch.randn((2, 3, 13), generator=rng, dtype=torch.float64) * 5
    values = torch.randn((2, 13, 16), generator=rng, dtype=torch.float64)
    sink = torch.randn(3, generator=rng, dtype=torch.float64) if with_sink else None
    bounds = (0, *cuts, 13)
    parts = [attention(scores[..., a:b], values[:, a:b]) for a, b in itertools.pairwise(bounds)]
    out, lse = merge_scopes_ref(torch.stack([o for o, _ in parts]), torch.stack([part for _, part in parts]), sink)
    want, want_lse = attention(scores, values, sink)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, want_lse, rtol=1e-13, atol=0)


def test_weights_and_the_sinks_share_add_up_to_one(rng: torch.Generator) -> None:
    lses = torch.randn((3, 2, 4), generator=rng) * 20
    lses[0, 0] = -INF
    weights, taken, _ = merge_weights_ref(lses, torch.randn(4, generator=rng) * 20)
    torch.testing.assert_close(weights.sum(dim=0) + taken, torch.ones_like(taken), rtol=1e-12, atol=0)
    assert (weights[0, 0] == 0).all()


@pytest.mark.parametrize("mark", [-INF, INF])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_an_empty_part_may_hold_anything(mark: float, poison: float, rng: torch.Generator) -> None:
    partials = torch.randn((2, 1, 2, 8), generator=rng)
    lses = torch.tensor([[[1.0, 2.0]], [[mark, mark]]])
    partials[1] = poison
    out, lse = merge_scopes_ref(partials, lses)
    torch.testing.assert_close(out, partials[0].to(torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(lse, lses[0].to(torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("sink", [None, 0.3, -INF, INF])
def test_all_parts_empty_is_exactly_zero(sink: float | None) -> None:
    logits = None if sink is None else torch.tensor([sink])
    lses = torch.tensor([[[-INF]], [[INF]]])
    out, lse = merge_scopes_ref(torch.full((2, 1, 1, 8), NAN), lses, logits)
    assert torch.count_nonzero(out) == 0, out
    assert lse.tolist() == [[-INF]]
    weights, taken, _ = merge_weights_ref(lses, logits)
    assert torch.count_nonzero(weights) == 0
    assert taken.item() == (0.0 if sink in (None, -INF) else 1.0)


def test_an_infinite_sink_takes_everything_or_nothing_and_leaves_the_lse(rng: torch.Generator) -> None:
    partials, lses = torch.randn((2, 1, 2, 8), generator=rng), torch.randn((2, 1, 2), generator=rng)
    bare, bare_lse = merge_scopes_ref(partials, lses)
    out, lse = merge_scopes_ref(partials, lses, torch.tensor([INF, -INF]))
    assert torch.count_nonzero(out[:, 0]) == 0
    torch.testing.assert_close(out[:, 1], bare[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(lse, bare_lse, rtol=0, atol=0)


def test_nan_comes_out_only_where_it_weighs_something(rng: torch.Generator) -> None:
    partials, lses = torch.randn((2, 1, 3, 8), generator=rng), torch.zeros((2, 1, 3))
    partials[1] = NAN
    lses[1, 0] = torch.tensor([0.0, -INF, -2000.0])  # the last underflows, also in float64
    out, lse = merge_scopes_ref(partials, lses)
    assert [bool(out[0, h].isnan().all()) for h in range(3)] == [True, False, False]
    assert torch.isfinite(out[0, 1:]).all()
    assert torch.isfinite(lse).all()


def test_the_rotation_is_undone_after_the_merge(rng: torch.Generator) -> None:
    freqs, positions = frequencies(10000.0, 64), torch.tensor([0, 5, 70_000])
    plain = torch.randn((1, 3, 2, 512), generator=rng, dtype=torch.float64)
    lses = torch.zeros((1, 3, 2))
    out, _ = merge_scopes_ref(plain, lses, positions=positions, freqs=freqs)
    torch.testing.assert_close(out, rotate_back_ref(plain[0], positions, freqs), rtol=0, atol=0)
    torch.testing.assert_close(rotate_ref(out, positions, freqs), plain[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="positions and freqs: got one of them, expected both or neither"):
        merge_scopes_ref(plain, lses, positions=positions)
