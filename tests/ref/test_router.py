"""Routers: formulas by loops, what the bias may and may not do, ties, groups."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close

from dsv4ref.config import V3_2, V4_FLASH, V4_PRO, RouterConfig
from dsv4ref.ref.router import (
    route_grouped_ref,
    route_hash_ref,
    route_learned_ref,
    router_logits_ref,
    sqrt_softplus_ref,
)

SMALL = RouterConfig(n_experts=10, top_k=3, scoring="sqrtsoftplus", route_scale=1.5)
GROUPED = RouterConfig(n_experts=12, top_k=3, scoring="sigmoid", route_scale=2.5, n_groups=4, topk_groups=2)


def score(z: float) -> float:
    return math.sqrt(math.log1p(math.exp(z)))


def test_learned_routing_by_loops(rng: torch.Generator) -> None:
    logits = torch.randn((20, 10), generator=rng, dtype=torch.float64) * 2
    bias = torch.randn(10, generator=rng, dtype=torch.float64) * 0.5
    weights, experts = route_learned_ref(logits, bias, SMALL)
    for t in range(20):
        s = [score(z) for z in logits[t].tolist()]
        best = sorted(range(10), key=lambda e: (-(s[e] + bias[e].item()), e))[:3]
        assert experts[t].tolist() == best, t
        total = sum(s[e] for e in best)
        for slot, e in enumerate(best):
            assert weights[t, slot].item() == pytest.approx(s[e] / total * 1.5, rel=1e-12), (t, slot)


@pytest.mark.parametrize("router", [V4_FLASH.router, V4_PRO.router], ids=["flash", "pro"])
def test_weights_sum_to_the_route_scale_over_distinct_experts(router: RouterConfig, rng: torch.Generator) -> None:
    logits, bias = torch.randn((64, router.n_experts), generator=rng), 8 + torch.randn(router.n_experts, generator=rng)
    weights, experts = route_learned_ref(logits, bias, router)
    assert_close(weights.sum(dim=1), torch.full((64,), router.route_scale), 1e-6 * router.route_scale)
    assert all(len(set(row)) == 6 for row in experts.tolist())


def test_scores_over_their_whole_range() -> None:
    z = torch.tensor([-80.0, -20, -1, 0, 1, 19.9, 20.1, 80], dtype=torch.float64)
    want = torch.tensor([math.sqrt(max(v, 0) + math.log1p(math.exp(-abs(v)))) for v in z.tolist()], dtype=torch.float64)
    # softplus is linear from 20 on, which drops e^-20 = 2e-9 of 20.
    assert ((sqrt_softplus_ref(z) - want).abs() / want).max() < 1e-9


def test_the_bias_steers_and_does_not_weigh(rng: torch.Generator) -> None:
    logits = torch.randn((1, 10), generator=rng)
    bias = torch.zeros(10)
    bias[[2, 5, 7]] = 100.0
    weights, experts = route_learned_ref(logits, bias, SMALL)
    assert sorted(experts[0].tolist()) == [2, 5, 7]
    chosen = sqrt_softplus_ref(logits)[0, experts[0]]
    assert_close(weights[0], chosen / chosen.sum() * 1.5, 1e-6)


def test_a_bias_in_bf16_would_choose_other_experts(rng: torch.Generator) -> None:
    """Near 8 the spacing of bfloat16 is 1/16; scores differ by less."""
    logits = torch.randn((256, 256), generator=rng)
    bias = 8 + 0.1 * torch.randn(256, generator=rng)
    _, experts = route_learned_ref(logits, bias, V4_FLASH.router)
    _, rounded = route_learned_ref(logits, bias.to(torch.bfloat16).float(), V4_FLASH.router)
    differ = (experts.sort(dim=1).values != rounded.sort(dim=1).values).any(dim=1)
    assert differ.float().mean() > 0.1
    # Nor is the sum of score and bias rounded: fp32 chooses what float64 does.
    exact = (torch.log1p(torch.exp(logits.double())).sqrt() + bias.double()).topk(6, dim=1).indices
    wrong = (experts.sort(dim=1).values != exact.sort(dim=1).values).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"token {wrong[0]}: experts {experts[wrong[0]].tolist()}, in float64 {exact[wrong[0]].tolist()}"


def test_ties_go_to_the_lower_expert() -> None:
    weights, experts = route_learned_ref(torch.zeros(2, 10), torch.zeros(10), SMALL)
    assert experts.tolist() == [[0, 1, 2]] * 2
    assert_close(weights, torch.full((2, 3), 0.5), 1e-6)


def test_without_renormalisation_scores_are_only_scaled() -> None:
    router = replace(SMALL, norm_topk_prob=False)
    logits = torch.arange(10.0)[None]
    weights, experts = route_learned_ref(logits, torch.zeros(10), router)
    assert experts.tolist() == [[9, 8, 7]]
    assert_close(weights, torch.tensor([[score(9), score(8), score(7)]]) * 1.5, 1e-5)


def test_hash_layers_choose_by_token_and_weigh_by_score(rng: torch.Generator) -> None:
    table = torch.stack([torch.randperm(10, generator=rng)[:3] for _ in range(7)])
    tokens = torch.tensor([6, 0, 6])
    logits = torch.randn((3, 10), generator=rng, dtype=torch.float64)
    for stored in (table, table.to(torch.int32)):
        weights, experts = route_hash_ref(logits, stored, tokens, SMALL)
        assert experts.dtype is torch.int64
        assert experts.tolist() == [table[6].tolist(), table[0].tolist(), table[6].tolist()]
        for t in range(3):
            s = [score(logits[t, e].item()) for e in experts[t].tolist()]
            assert weights[t].tolist() == pytest.approx([1.5 * v / sum(s) for v in s], rel=1e-12)


def grouped_by_loops(logits: list[float], bias: list[float], router: RouterConfig) -> tuple[list[int], list[float]]:
    s = [1 / (1 + math.exp(-z)) for z in logits]
    b = [v + c for v, c in zip(s, bias, strict=True)]
    size = router.n_experts // (router.n_groups or 1)
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.n_groups or 1)]
    best = sorted(range(len(groups)), key=lambda g: (-sum(sorted(b[e] for e in groups[g])[-2:]), g))
    allowed = [e for g in best[: router.topk_groups] for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: (-b[e], e))[: router.top_k]
    total = sum(s[e] for e in chosen)
    return chosen, [s[e] / total * router.route_scale for e in chosen]


@pytest.mark.parametrize("offset", [0.0, -3.0, 8.0])
@pytest.mark.parametrize("router", [GROUPED, V3_2.router], ids=["small", "v3.2"])
def test_grouped_routing_by_loops(router: RouterConfig, offset: float, rng: torch.Generator) -> None:
    """At offset -3 every biased score is negative: a mask of 0 instead of -inf would let masked experts in."""
    logits = torch.randn((12, router.n_experts), generator=rng, dtype=torch.float64)
    bias = offset + 0.3 * torch.randn(router.n_experts, generator=rng, dtype=torch.float64)
    weights, experts = route_grouped_ref(logits, bias, router)
    for t in range(12):
        want, want_weights = grouped_by_loops(logits[t].tolist(), bias.tolist(), router)
        assert experts[t].tolist() == want, t
        assert weights[t].tolist() == pytest.approx(want_weights, rel=1e-12), t


def test_groups_exclude_the_best_single_expert() -> None:
    """The group with the single best expert loses to groups with two good ones."""
    logits = torch.full((1, 12), -4.0)
    logits[0, 0] = 5.0
    logits[0, [3, 4, 6, 7]] = 1.0
    _, experts = route_grouped_ref(logits, torch.zeros(12), GROUPED)
    assert 0 not in experts[0].tolist()


def test_logits_are_computed_in_the_activations_dtype(rng: torch.Generator) -> None:
    x, weight = torch.randn((4, 64), generator=rng), torch.randn((10, 64), generator=rng).to(torch.bfloat16)
    assert_close(router_logits_ref(x, weight), (x.double() @ weight.double().T).float(), 1e-5)


def test_mismatched_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="router: got sigmoid, grouped, expected sqrtsoftplus, no groups"):
        route_learned_ref(torch.zeros(1, 12), torch.zeros(12), GROUPED)
    with pytest.raises(ValueError, match="router: got sqrtsoftplus, no groups, expected sigmoid, grouped"):
        route_grouped_ref(torch.zeros(1, 10), torch.zeros(10), SMALL)
    with pytest.raises(ValueError, match=r"logits: got shape \(1, 9\), expected \[T, 10\]"):
        route_learned_ref(torch.zeros(1, 9), torch.zeros(9), SMALL)
    table = torch.arange(30).view(10, 3) % 10
    with pytest.raises(ValueError, match="token_ids: got -1, expected 0 to 9"):
        route_hash_ref(torch.zeros(2, 10), table, torch.tensor([3, -1]), SMALL)
    with pytest.raises(ValueError, match=r"token_ids: got shape \(1,\), expected \(2,\) like the logits"):
        route_hash_ref(torch.zeros(2, 10), table, torch.tensor([3]), SMALL)
    with pytest.raises(ValueError, match=r"bias: got torch.bfloat16 \(10,\), expected torch.float32"):
        route_learned_ref(torch.zeros(1, 10), torch.zeros(10, dtype=torch.bfloat16), SMALL)
