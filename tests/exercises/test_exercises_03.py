"""The solutions of chapter 03's exercises, and what its prose says in numbers, checked."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.config import V4_FLASH
from dsv4ref.evidence import records
from dsv4ref.kernels.experts import ExpertMap, max_tiles, routing
from dsv4ref.kernels.experts.dispatch import BLOCK_TOKENS
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.expert_routing import _padding_counted
from dsv4ref.optimizations.report import report_rows
from dsv4ref.optimizations.routing_eager import load_facts
from dsv4ref.optimizations.routing_inputs import undecided

OPT = catalogue.get("expert_routing")


def test_a_rank_of_eight_reserves_414_tiles_and_needs_64() -> None:
    slots = 1024 * V4_FLASH.router.top_k
    local = V4_FLASH.router.n_experts // 8
    assert (slots, local) == (6144, 32)
    assert max_tiles(slots, local, 16) == 414
    balanced = torch.full((local,), slots // 8 // local)
    assert balanced[0] == 24
    assert load_facts(balanced, 1, 16)["tiles"] == 64


def passes(mask: tuple[int, ...], num_local: int) -> bool:
    try:
        ExpertMap(torch.tensor(mask, dtype=torch.int32), num_local, 0, 1)
    except ValueError:
        return False
    return True


def test_three_masks_are_maps_and_the_count_refuses_them() -> None:
    masks = [mask for size in range(1, 7) for mask in itertools.product((0, 1), repeat=size)]
    maps = [mask for mask in masks if any(passes(mask, n) for n in range(7))]
    assert maps == [(0,), (0, 1), (1, 0)]
    assert not any(passes(mask, sum(mask)) for mask in masks)


def counted_twice(tokens: int, top_k: int) -> int:
    """Slots that the padding bug counts beyond the batch's own."""
    local = torch.zeros((tokens, top_k), dtype=torch.int32)
    return int(_padding_counted(local, 1)[0]) - tokens * top_k


def test_padding_shows_from_33_tokens_of_top_6_and_never_of_top_8() -> None:
    assert next(tokens for tokens in range(1, 40) if counted_twice(tokens, 6)) == BLOCK_TOKENS + 1 == 33
    assert not any(counted_twice(tokens, 8) for tokens in (1, 33, 64, 1024))
    assert counted_twice(1024, 6) == 31 * 64 == 1984


@pytest.mark.parametrize(("offset", "low", "high"), [(0.0, 0.0, 0.5), (7.0, 0.5, 3.0)])
def test_one_or_two_rows_in_a_hundred_are_close_at_a_bias_of_7(offset: float, low: float, high: float) -> None:
    rng = torch.Generator().manual_seed(1)
    router = V4_FLASH.router
    logits = 1.5 * torch.randn((4096, router.n_experts), generator=rng)
    bias = offset + 0.1 * torch.randn(router.n_experts, generator=rng)
    share = 100 * undecided(logits, bias, router).float().mean().item()
    assert low <= share < high


def test_eager_weights_are_rough_far_below_zero_and_the_kernels_are_not() -> None:
    """What the log of dead ends says: fp32 softplus of -100 is a subnormal number."""
    inputs = OPT.make_inputs(OPT.case("tiny-extremes"), "cpu", 0)
    want = OPT.reference(inputs)["weights"]
    eager = (OPT.baseline(inputs)["weights"].double() / want - 1).abs().max()
    ours = (OPT.optimized(inputs)["weights"].double() / want - 1).abs().max()
    assert eager > 1e-4, f"eager softplus is good to {eager:.1e}"
    assert ours < 2e-6, f"the kernel is off by {ours:.1e}"


def test_one_rounding_of_the_argument_costs_32_ulps_at_minus_87_and_none_taken_apart() -> None:
    """What the text says of exponentials: 2^x in float64, everything around it in fp32."""

    def exp(x: Tensor) -> Tensor:  # as a GPU has it that multiplies by log2 e and looks up a power of two
        return torch.exp2((x * math.log2(math.e)).double()).float()

    def ulps(found: Tensor) -> float:
        return float((found.double() / torch.exp(x.double()) - 1).abs().max() * 2**23)

    x = torch.linspace(-87.0, 0.0, 100_001)
    whole = torch.floor(x * math.log2(math.e))
    rest = (x - whole * routing._LN_2_HIGH.value) - whole * routing._LN_2_LOW.value
    assert 30 < ulps(exp(x)) < 33
    assert ulps(torch.exp2(whole) * exp(rest)) < 2


def on_h200() -> dict[str, dict[str, Any]]:
    """The shipped H200 records' rows by case."""
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    return {row["case"]: row for row in report_rows(mine)}


def test_the_h200s_records_say_what_the_page_says_of_them() -> None:
    rows = on_h200()
    short = {case: row["ratio"] / row["predicted"] for case, row in rows.items()}
    assert min(short, key=lambda case: short[case]) == "flash-1", short
    assert all(short[case] < 1 for case in ("flash-1", "flash-1024", "pro-1024", "v32-1024")), short
    one, many, most = (rows[case] for case in ("flash-1", "flash-1024", "flash-8192"))
    assert one["variants"]["order"] > one["optimized_us"] / 2, one
    assert most["ratio"] < many["ratio"], (most["ratio"], many["ratio"])
    assert short["flash-8192"] > 1, short
    growth = {name: most["variants"][name] - many["variants"][name] for name in ("route", "order")}
    assert growth["route"] > growth["order"], growth
