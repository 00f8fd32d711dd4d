"""Fused routers: ids against the reference, ties, NaN and infinity, underflow, dtypes, and bad arguments."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import pytest
import torch
from torch import Tensor

from dsv4ref.config import V3_2, V4_FLASH, V4_PRO, RouterConfig
from dsv4ref.evidence.compare import identical
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.experts.routing import check_hash_table, route_grouped, route_hash, route_learned
from dsv4ref.ref.router import route_grouped_ref, route_hash_ref, route_learned_ref

ODD = RouterConfig(n_experts=37, top_k=6, scoring="sqrtsoftplus", route_scale=1.5)
ONE = RouterConfig(n_experts=1, top_k=1, scoring="sqrtsoftplus", route_scale=1.5)
GROUPS = RouterConfig(n_experts=15, top_k=3, scoring="sigmoid", route_scale=2.5, n_groups=5, topk_groups=2)
NAN, INF = float("nan"), float("inf")
ULPS = 16
"""Weights may be this many fp32 ulps off: score, a sum of k, a quotient and the scale, each a few."""


def assert_routed(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Same ids in the same order, weights within the budget."""
    ids = identical("experts", got[1], want[1].to(torch.int32), relation="exact")
    assert ids.passed, ids.detail
    error = ((got[0].double() - want[0].double()).abs() / want[0].double()).flatten()
    worst = int(error.argmax()) if error.numel() else 0
    assert error.numel() == 0 or error[worst] <= ULPS * 2**-23, (
        f"weights[{worst // got[0].shape[1]}, {worst % got[0].shape[1]}]: {got[0].flatten()[worst]:.9g}, "
        f"expected {want[0].flatten()[worst]:.9g}"
    )


def inputs(router: RouterConfig, rows: int, rng: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    logits = torch.randn((rows, router.n_experts), generator=rng) * 3
    return logits.to(device), (7 + 0.1 * torch.randn(router.n_experts, generator=rng)).to(device)


@pytest.mark.parametrize("router", [V4_FLASH.router, V4_PRO.router, ODD, ONE], ids=["flash", "pro", "odd", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learned_routing_is_the_references(
    router: RouterConfig, dtype: torch.dtype, rng: torch.Generator, device: str
) -> None:
    logits, bias = inputs(router, 5, rng, device)
    logits = logits.to(dtype)
    with poisoned_allocations():
        got = route_learned(logits, bias, router)
    assert_routed(got, route_learned_ref(logits.double(), bias.double(), router))


@pytest.mark.parametrize("router", [V3_2.router, GROUPS], ids=["v3.2", "odd"])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_grouped_routing_is_the_references(
    router: RouterConfig, offset: float, rng: torch.Generator, device: str
) -> None:
    """At offset -3 every biased score is negative."""
    logits, bias = inputs(router, 5, rng, device)
    bias = bias - 7 + offset
    with poisoned_allocations():
        got = route_grouped(logits, bias, router)
    assert_routed(got, route_grouped_ref(logits.double(), bias.double(), router))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_hash_routing_is_the_references(kind: torch.dtype, rng: torch.Generator, device: str) -> None:
    logits, _ = inputs(ODD, 5, rng, device)
    table = torch.stack([torch.randperm(37, generator=rng)[:6] for _ in range(9)]).to(device, kind)
    tokens = torch.tensor([8, 0, 3, 8, 1], device=device).to(kind)
    with poisoned_allocations():
        got = route_hash(logits, table, tokens, ODD)
    assert_routed(got, route_hash_ref(logits.double(), table.to(torch.int64), tokens.to(torch.int64), ODD))


def test_without_renormalisation_scores_are_only_scaled(rng: torch.Generator, device: str) -> None:
    router = replace(ODD, norm_topk_prob=False)
    logits, bias = inputs(router, 3, rng, device)
    assert_routed(route_learned(logits, bias, router), route_learned_ref(logits.double(), bias.double(), router))


def test_ties_go_to_the_lower_expert_and_zeros_have_one_sign(device: str) -> None:
    """Scores of experts 3 and up are all 0, as +0 or as -0 after the bias; the first three win."""
    logits = torch.zeros((2, 37), device=device)
    _, experts = route_learned(logits, torch.zeros(37, device=device), ODD)
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    gone = torch.full((1, 37), -INF, device=device)
    bias = torch.zeros(37, device=device)
    bias[::2] = -0.0  # 0 + -0 is +0, and -0 must not rank below it
    _, experts = route_learned(gone, bias, ODD)
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5]]
    _, experts = route_grouped(torch.zeros((1, 15), device=device), torch.zeros(15, device=device), GROUPS)
    assert experts.tolist() == [[0, 1, 2]]


def test_nan_is_chosen_last_and_ids_stay_distinct(rng: torch.Generator, device: str) -> None:
    logits, bias = inputs(ODD, 4, rng, device)
    logits[0, :10] = NAN  # 27 numbers left
    logits[1, 4:] = NAN  # four numbers for six choices
    logits[2] = NAN
    weights, experts = route_learned(logits, bias, ODD)
    assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 37 for row in experts.tolist())
    assert min(experts[0].tolist()) >= 10
    assert torch.isfinite(weights[[0, 3]]).all()
    assert sorted(experts[1, :4].tolist()) == [0, 1, 2, 3]
    assert experts[1, 4:].tolist() == [4, 5]
    assert experts[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.isnan(weights[[1, 2]]).all(), "a chosen NaN must stay visible"


def test_nan_takes_no_group_and_no_place_from_numbers(device: str) -> None:
    logits = torch.zeros((1, 15), device=device)
    logits[0, :6] = NAN  # groups 0 and 1 hold no number
    logits[0, 9] = NAN  # group 3 has two numbers
    _, experts = route_grouped(logits, torch.zeros(15, device=device), GROUPS)
    assert experts.tolist() == [[6, 7, 8]]
    logits[0, 6:9] = -1.0  # group 2 is worst among numbers: groups 3 and 4 are kept, 9 is skipped
    _, experts = route_grouped(logits, torch.zeros(15, device=device), GROUPS)
    assert experts.tolist() == [[10, 11, 12]]
    _, experts = route_grouped(torch.full((1, 15), NAN, device=device), torch.zeros(15, device=device), GROUPS)
    assert experts.tolist() == [[0, 1, 2]]


def test_infinite_logits_choose_first_and_last(rng: torch.Generator, device: str) -> None:
    logits, bias = inputs(ODD, 2, rng, device)
    logits[0, 20] = INF
    logits[1, 5:] = -INF
    bias = bias - 7
    weights, experts = route_learned(logits, bias, ODD)
    assert experts[0, 0] == 20
    assert torch.isnan(weights[0, 0])
    assert (weights[0, 1:] == 0).all()
    finite = route_learned_ref(logits[1:].double(), bias.double(), ODD)
    assert experts[1].tolist() == finite[1][0].tolist()


@pytest.mark.parametrize("z", [-100.0, -60.0, -16.5, -15.5, -1e-3, 0.0, 19.0, 21.0, 100.0, 3e38])
def test_weights_hold_over_the_whole_range_of_logits(z: float, device: str) -> None:
    """At -100 the softplus is 4e-44, below fp32's smallest normal number; its root is not."""
    router = RouterConfig(n_experts=4, top_k=2, scoring="sqrtsoftplus", route_scale=1.5)
    logits = torch.tensor([[z, z * 1.01 - 0.5, -200.0, -300.0]], device=device)
    want = route_learned_ref(logits.double(), torch.zeros(4, dtype=torch.float64, device=device), router)
    assert_routed(route_learned(logits, torch.zeros(4, device=device), router), want)


@pytest.mark.parametrize("z", [-85.0, -60.0, -1e-3, 0.0, 15.0, 100.0, 3e38])
def test_sigmoid_weights_hold_as_well(z: float, device: str) -> None:
    """At -85 e^-z is 8e36; its rounded argument alone would cost 30 ulps on some machines."""
    router = RouterConfig(n_experts=4, top_k=2, scoring="sigmoid", route_scale=2.5, n_groups=2, topk_groups=1)
    logits = torch.tensor([[z, z * 1.01 - 0.5, -200.0, -300.0]], device=device)
    want = route_grouped_ref(logits.double(), torch.zeros(4, dtype=torch.float64, device=device), router)
    assert_routed(route_grouped(logits, torch.zeros(4, device=device), router), want)


def test_a_sum_of_zero_weighs_nothing(device: str) -> None:
    weights, experts = route_learned(torch.full((1, 37), -1e4, device=device), torch.zeros(37, device=device), ODD)
    assert weights.tolist() == [[0.0] * 6]
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_bias_of_minus_infinity_switches_an_expert_off(rng: torch.Generator, device: str) -> None:
    logits, bias = inputs(ODD, 3, rng, device)
    bias[:20] = -INF
    weights, experts = route_learned(logits, bias, ODD)
    assert experts.min() >= 20
    assert torch.isfinite(weights).all()


def test_unknown_tokens_and_experts_become_minus_one_without_a_read(rng: torch.Generator, device: str) -> None:
    logits, _ = inputs(ODD, 5, rng, device)
    table = torch.arange(12, dtype=torch.int32, device=device).reshape(2, 6)
    table[1, 2], table[1, 4] = 37, -5
    tokens = torch.tensor([0, -1, 2, 2**31 - 1, 1], dtype=torch.int32, device=device)
    with poisoned_allocations():
        weights, experts = route_hash(logits, table, tokens, ODD)
    assert experts[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert experts[1:4].tolist() == [[-1] * 6] * 3
    assert (weights[1:4] == 0).all()
    assert experts[4].tolist() == [6, 7, -1, 9, -1, 11]
    assert weights[4].sum().item() == pytest.approx(1.5, rel=1e-6)


def test_an_expert_number_beyond_32_bits_is_none(rng: torch.Generator, device: str) -> None:
    logits, _ = inputs(ODD, 1, rng, device)
    table = torch.arange(6, device=device)[None, :].contiguous()
    table[0, 3] = 2**32 + 3  # its low half is expert 3
    _, experts = route_hash(logits, table, torch.zeros(1, dtype=torch.int64, device=device), ODD)
    assert experts.tolist() == [[0, 1, 2, -1, 4, 5]]


def test_rows_may_be_strided_and_outputs_the_callers(rng: torch.Generator, device: str) -> None:
    logits, bias = inputs(ODD, 8, rng, device)
    strided = torch.randn((8, 64), generator=rng).to(device)
    strided[:, 5:42] = logits
    weights, experts = torch.full((8, 6), NAN, device=device), torch.full((8, 6), 99, dtype=torch.int32, device=device)
    got = route_learned(strided[:, 5:42], bias, ODD, weights=weights, experts=experts)
    assert got[0] is weights
    assert got[1] is experts
    assert_routed(got, route_learned_ref(logits.double(), bias.double(), ODD))


def test_no_token_and_one_launch(rng: torch.Generator, device: str) -> None:
    bias = torch.zeros(37, device=device)
    weights, experts = route_learned(torch.zeros((0, 37), device=device), bias, ODD)
    assert weights.shape == experts.shape == (0, 6)
    logits = torch.randn((2, 37), generator=rng).to(device)
    table, tokens = torch.zeros((1, 6), dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int64).to(device)
    flat = torch.zeros((2, 15), device=device), torch.zeros(15, device=device)
    for call in (
        lambda: route_learned(logits, bias, ODD),
        lambda: route_hash(logits, table, tokens, ODD),
        lambda: route_grouped(*flat, GROUPS),
    ):
        assert count_launches(call, warmup=0).total == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"bias": torch.zeros(37, dtype=torch.bfloat16)},
            TypeError,
            "bias: got torch.bfloat16, expected torch.float32",
        ),
        ({"bias": torch.zeros(36)}, ValueError, "bias: got shape [36], expected [37]"),
        ({"logits": torch.zeros(2, 37, dtype=torch.float16)}, TypeError, "logits: got torch.float16"),
        ({"logits": torch.zeros(2, 36)}, ValueError, "logits: got shape [2, 36], expected [M, 37]"),
        ({"logits": torch.zeros(37, 2).T}, ValueError, "logits: got strides (1, 2), expected a unit stride"),
        ({"logits": [[0.0]]}, TypeError, "logits: got list, expected a torch.Tensor"),
        ({"router": GROUPS}, ValueError, "router: got sigmoid, grouped, expected sqrtsoftplus, no groups"),
        ({"router": 6}, TypeError, "router: got int, expected a RouterConfig"),
        (
            {"experts": torch.zeros(2, 6, dtype=torch.int64)},
            TypeError,
            "experts: got torch.int64, expected torch.int32",
        ),
        ({"weights": torch.zeros(2, 8)}, ValueError, "weights: got shape [2, 8], expected [2, 6]"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str, device: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 37), "bias": torch.zeros(37), "router": ODD, **changes}
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=re.escape(message)):
        route_learned(**arguments)


def test_outputs_may_not_share_memory(device: str) -> None:
    memory = torch.zeros(2 * 37 + 12, device=device)
    logits, weights = memory[:74].view(2, 37), memory[68:80].view(2, 6)
    with pytest.raises(ValueError, match="weights: its memory range overlaps logits's"):
        route_learned(logits, torch.zeros(37, device=device), ODD, weights=weights)
    shared = torch.zeros((2, 6), device=device)
    with pytest.raises(ValueError, match="experts: its memory range overlaps weights's"):
        route_learned(
            torch.zeros((2, 37), device=device), torch.zeros(37, device=device), ODD,
            weights=shared, experts=shared.view(torch.int32),
        )  # fmt: skip


def test_float_tables_are_refused(device: str) -> None:
    with pytest.raises(TypeError, match=r"table: got torch.float32, expected torch.int32 or torch.int64"):
        route_hash(
            torch.zeros((1, 37), device=device), torch.zeros((3, 6), device=device), torch.zeros(1, dtype=torch.int64),
            ODD,
        )  # fmt: skip


def test_hash_tables_are_checked_once() -> None:
    table = torch.arange(18).reshape(3, 6)
    check_hash_table(table, ODD)
    doubled, outside = table.clone(), table.clone()
    doubled[1, 5], outside[2, 0] = 6, 37
    with pytest.raises(ValueError, match=r"table: token 1 has experts \[6, 7, 8, 9, 10, 6\], expected distinct"):
        check_hash_table(doubled, ODD)
    with pytest.raises(ValueError, match=r"table: token 2 has experts \[37, .*\], expected experts 0 to 36"):
        check_hash_table(outside, ODD)
    with pytest.raises(ValueError, match=r"table: got shape \[3, 5\], expected \[V, 6\]"):
        check_hash_table(table[:, :5], ODD)


@pytest.mark.skipif(kernels.mode() != "interpreted", reason="compiled kernels take GPU tensors; this is about the mode")
def test_the_interpreter_takes_cpu_tensors() -> None:
    _, experts = route_learned(torch.arange(37.0)[None], torch.zeros(37), ODD)
    assert experts.tolist() == [[36, 35, 34, 33, 32, 31]]
