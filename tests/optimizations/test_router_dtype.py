"""Chapter 14's tie class, what its cases rest on, and the figures that its prose quotes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.config import RouterConfig
from dsv4ref.evidence.launches import count_launches
from dsv4ref.optimizations import catalogue, router_dtype, router_study
from dsv4ref.optimizations.base import Case, case_seed
from dsv4ref.optimizations.router_band import LOGIT_BAND, decide
from dsv4ref.ref.router import route_grouped_ref, route_learned_ref

OPT = catalogue.get("router_dtype")
LEARNED = RouterConfig(n_experts=6, top_k=2, scoring="sqrtsoftplus", route_scale=1.0)
GROUPED = RouterConfig(
    n_experts=8, top_k=2, scoring="sigmoid", route_scale=1.0, n_groups=4, topk_groups=2
)  # fmt: skip


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("name", ["V3.2", "V4-Flash"])
def test_without_a_band_the_reference_routers_decide(name: str, rng: torch.Generator) -> None:
    router = router_study.ROUTERS[name]
    z = torch.randn((64, router.n_experts), generator=rng, dtype=torch.float64)
    bias = 7 + 0.1 * torch.randn(router.n_experts, generator=rng, dtype=torch.float64)
    route = route_grouped_ref if router.n_groups else route_learned_ref
    want = route(z, bias, router)[1].sort(dim=1).values
    found = decide(z, bias, router, band=0.0)
    assert torch.equal(found.experts, want)
    assert found.allows(want).all()


def test_close_rivals_are_a_tie_class_and_both_sets_are_allowed() -> None:
    z, bias = row(3.0, 1.0, 1.0 + LOGIT_BAND, 0.0, -1.0, -2.0), torch.zeros(6)
    found = decide(z, bias, LEARNED)
    assert found.experts.tolist() == [[0, 2]]
    assert not found.decided[0]
    allowed = {(a, b) for a in range(-1, 7) for b in range(-1, 7) if found.allows(torch.tensor([[a, b]]))[0]}
    assert allowed == {(0, 1), (1, 0), (0, 2), (2, 0)}


def test_a_clear_row_allows_one_set() -> None:
    z, bias = row(3.0, 1.0, 1.0 + 16 * LOGIT_BAND, 0.0, -1.0, -2.0), torch.zeros(6)
    found = decide(z, bias, LEARNED)
    assert found.decided[0]
    assert found.allows(torch.tensor([[2, 0]]))[0]
    assert not found.allows(torch.tensor([[0, 1]]))[0]
    assert not found.allows(torch.tensor([[0, 0]]))[0]


def test_close_groups_are_a_tie_class_whatever_their_experts() -> None:
    z = row(4.0, 3.0, 1.0, 0.0, 1.0 + LOGIT_BAND, 0.0, -3.0, -3.0)  # groups 1 and 2 are alike; 0 holds both winners
    assert not decide(z, torch.zeros(8), GROUPED).decided[0]
    assert decide(z, torch.zeros(8), GROUPED).allows(torch.tensor([[0, 1]]))[0]
    assert not decide(z, torch.zeros(8), GROUPED).allows(torch.tensor([[0, 6]]))[0], "group 3 cannot be kept"


@pytest.mark.parametrize("name", ["V3.2", "V4-Flash"])
def test_any_logits_within_the_band_route_to_an_allowed_set(name: str, rng: torch.Generator) -> None:
    """A band forty times as wide, so that many rows are open: decided ones must not move, open ones stay allowed."""
    router, band = router_study.ROUTERS[name], 40 * LOGIT_BAND
    z = torch.randn((400, router.n_experts), generator=rng, dtype=torch.float64)
    bias = 1 + 0.02 * torch.randn(router.n_experts, generator=rng, dtype=torch.float64)
    found = decide(z, bias, router, band)
    assert 0.1 < found.decided.float().mean() < 0.9
    route = route_grouped_ref if router.n_groups else route_learned_ref
    moved = 0
    for _ in range(5):
        sign = torch.randint(0, 2, z.shape, generator=rng) * 2 - 1
        experts = route(z + sign * band * z.abs().clamp(min=1), bias, router)[1]
        bad = (~found.allows(experts)).nonzero().flatten().tolist()
        assert not bad, f"row {bad[0]}: {sorted(experts[bad[0]].tolist())}, expected {found.experts[bad[0]].tolist()}"
        moved += int((experts.sort(dim=1).values != found.experts).any(dim=1).sum())
    assert moved > 50


def test_rows_that_are_not_finite_follow_the_rule() -> None:
    nan, inf = float("nan"), float("inf")
    z = torch.tensor([[nan] * 6, [nan, nan, -50.0, nan, nan, nan], [0.0, inf, 0.0, inf, inf, -inf]]).double()
    found = decide(z, torch.zeros(6), LEARNED)
    assert found.experts.tolist() == [[0, 1], [0, 2], [1, 3]]
    assert found.decided.all()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"logits: got torch.float32, expected torch.float64"):
        decide(row(*[0.0] * 6).float(), torch.zeros(6), LEARNED)
    with pytest.raises(ValueError, match=r"logits: got shape \[1, 5\], expected \[M, 6\]"):
        decide(row(*[0.0] * 5), torch.zeros(6), LEARNED)
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match="value: got"):
            router_study.bf16_spacing(bad)
    with pytest.raises(ValueError, match="rows: got 3, expected at least 4"):
        router_study.changed(LEARNED, 0.0, 0.1, 3)


# --- what the chapter says ---


def test_the_source_is_the_baseline_with_a_rounded_bias_bit_for_bit(device: str) -> None:
    inputs = OPT.make_inputs(OPT.case("tiny-grouped"), device, case_seed(OPT.id, "tiny-grouped", 0))
    baseline = replace(inputs, bias=inputs.bias.to(torch.bfloat16).float())
    want = router_dtype.route(baseline, (inputs.x @ inputs.weight.T).float())
    for name, got, wanted in zip(("weights", "experts"), router_dtype.source_route(inputs), want, strict=True):
        assert torch.equal(got, wanted), f"{name}: first difference at {(got != wanted).nonzero()[0].tolist()}"


RATES = {
    ("V3.2", 0.02): (0.2, 14, 55), ("V3.2", 0.1): (0.8, 11, 43),
    ("V4-Flash", 0.02): (0.1, 4.2, 22), ("V4-Flash", 0.1): (0.4, 4.4, 21),
}  # fmt: skip


@pytest.mark.parametrize(("name", "spread"), RATES)
def test_changed_rows_grow_with_the_offset(name: str, spread: float) -> None:
    """Against a count by other code over 8,000 tokens; the draw of the bias moves it more than the number of tokens."""
    rates = [100 * router_study.changed(router_study.ROUTERS[name], o, spread, 2000)["bias"] for o in (0.0, 1.0, 7.0)]
    for got, want, slack in zip(rates, RATES[name, spread], (0.5, 4.0, 8.0), strict=True):
        assert abs(got - want) <= slack, f"{got:.1f} %, expected {want} +- {slack}"


def test_logits_in_bf16_change_few_rows_and_no_more_with_the_offset() -> None:
    for router in router_study.ROUTERS.values():
        found = [router_study.changed(router, offset, 0.02, 2000) for offset in (0.0, 1.0, 7.0)]
        assert len({round(one["logits"], 3) for one in found}) == 1, [one["logits"] for one in found]
        assert 0.01 < found[0]["logits"] < 0.05
        assert all(one["tie class"] < 0.02 for one in found)


def test_glms_range_has_nine_bf16_numbers() -> None:
    values = torch.linspace(6.817, 7.063, 10001).to(torch.bfloat16).unique()
    assert len(values) == 9
    assert router_study.bf16_spacing(7.0) == float(values[1] - values[0]) == 1 / 32


def test_a_rounded_bias_costs_the_trained_model_answers_at_8_and_not_at_0() -> None:
    rows = router_study.accuracy_rows((0.0, 8.0), sequences=4)
    exact, near, far = rows
    assert (exact["offset"], exact["bias in"], exact["points lost"]) == (8.0, "float32", 0.0)
    assert abs(near["points lost"]) <= 3 * near["standard error"]
    assert far["points lost"] > 2 * far["standard error"] > 0, far


def test_launches_are_three_and_two(device: str) -> None:
    inputs = OPT.make_inputs(OPT.case("tiny-odd"), device, 0)
    timed = OPT.timed(inputs)
    counted = {name: count_launches(timed[name]).total for name in ("baseline", "optimized", "source, rounded bias")}
    p = OPT.predict(OPT.case("tiny-odd"), "mi300x")
    assert (counted["baseline"], counted["optimized"]) == (p.baseline_launches, p.optimized_launches) == (3, 2)
    assert counted["source, rounded bias"] == 2
    assert OPT.predict(OPT.case("flash-0"), "mi300x").ratio is None


def test_predicted_bytes_written_out() -> None:
    router = replace(config.V4_FLASH.router, n_experts=8, top_k=2)
    p = OPT.predict(Case("x", {"router": router, "rows": 3, "depth": 16}), "h200")
    gemm, bias, out = 2 * 16 * (3 + 8), 4 * 8, 3 * 2 * 8
    assert p.optimized_bytes == gemm + 4 * 24 + 4 * 24 + bias + out
    assert p.baseline_bytes == gemm + 2 * 24 + (2 + 4) * 24 + 4 * 24 + bias + out
    assert p.least_bytes == gemm + bias + out
    assert p.flops == 2 * 3 * 8 * 16 + 3 * 8 * (10 + 2)
