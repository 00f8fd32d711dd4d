"""Chapter 03's cases: logits, biases and hash tables that corner a router, and the ranks its experts are spread over.

Inputs keep neighbouring scores 2^-17 apart, or exactly equal: what lies between is a tie class whose order fp32
rounding decides, not the router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V3_2, V4_FLASH, V4_PRO, RouterConfig
from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.optimizations.base import Case
from dsv4ref.optimizations.routing_experts import Experts, build_experts
from dsv4ref.ref.dispatch import expert_table_ref
from dsv4ref.ref.router import sqrt_softplus_ref

__all__ = ["CASES", "RoutingInputs", "build", "undecided"]

_TIE_BAND = 2.0**-17
"""Biased scores closer than this, relative, are a tie class; fp32 scores are good to about 2^-21."""


@dataclass(frozen=True)
class RoutingInputs:
    """One batch at the router, and the ranks its experts are spread over.

    Args:
        kind: "learned", "hash" (V4) or "grouped" (V3.2).
        router: E, k, scale, groups.
        logits: fp32 or bf16 ``[M, E]``.
        bias: fp32 ``[E]``; zeros and unread for "hash".
        table: int64 ``[V, k]``, and token_ids int64 ``[M]``, -1 for padding rows; empty unless "hash".
        maps: one `ExpertMap` per rank.
        placement: how the maps place experts, for an oracle that does not read them.
        block_m: rows of a tile.
        moe: tiny experts and the tokens' hidden states; None where only integers and weights are compared.
    """

    kind: str
    router: RouterConfig
    logits: Tensor
    bias: Tensor
    table: Tensor
    token_ids: Tensor
    maps: tuple[ExpertMap, ...]
    placement: str
    block_m: int
    moe: Experts | None


def build(case: Case, device: str, seed: int) -> RoutingInputs:
    p, generator = case.params, torch.Generator().manual_seed(seed)
    router: RouterConfig = p["router"]
    rows, num_experts = p["rows"], router.n_experts
    bias = p["offset"] + 0.1 * torch.randn(num_experts, generator=generator)
    draw: Callable[[int], Tensor] = lambda n: 1.5 * torch.randn((n, num_experts), generator=generator)  # noqa: E731
    if p["content"] == "ties":
        bias = (bias * 8).round() / 8
        draw = lambda n: torch.randint(-2, 3, (n, num_experts), generator=generator) / 2.0  # noqa: E731
    elif p["content"] == "extremes":
        bias = torch.zeros(num_experts)
        draw = lambda n: _extreme(n, num_experts, generator)  # noqa: E731
    elif p["content"] == "one expert":
        bias[num_experts // 2] += 100.0
    elif p["content"] == "idle rank":
        bias[expert_table_ref(num_experts, p["ranks"] - 1, p["ranks"], p["placement"]) >= 0] -= 100.0
    elif p["content"] not in ("plain", "padding"):
        raise ValueError(f"content: got {p['content']!r}, expected one the chapter names")
    logits = draw(rows).to(p["dtype"])
    if p["kind"] != "hash":
        for _ in range(100):
            near = undecided(logits, bias, router)
            if not near.any():
                break
            logits[near] = draw(int(near.sum())).to(p["dtype"])
        else:
            raise ValueError(f"{case.name}: rows inside a tie class remain after 100 draws")
    table, token_ids = torch.zeros((0, router.top_k), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    if p["kind"] == "hash":
        shuffled = torch.rand((64, num_experts), generator=generator).argsort(dim=1)
        table = shuffled[:, : router.top_k].contiguous()
        token_ids = torch.randint(0, 64, (rows,), generator=generator)
        if p["content"] == "padding":
            token_ids[rows // 2 :] = -1
    maps = tuple(
        ExpertMap.placed(num_experts, rank=r, ranks=p["ranks"], placement=p["placement"], device=device)
        for r in range(p["ranks"])
    )
    moe = build_experts(num_experts, rows, p["width"], generator) if p["width"] else None
    return RoutingInputs(
        p["kind"], router, logits.to(device), bias.to(device), table.to(device), token_ids.to(device), maps,
        p["placement"], p["block_m"], moe,
    )  # fmt: skip


def _extreme(rows: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Rows far below zero, far above, and across: underflow of the softplus and overflow of its exponential."""
    spread = torch.linspace(0.0, 20.0, num_experts)
    logits = torch.stack([spread[torch.randperm(num_experts, generator=generator)] for _ in range(rows)])
    logits[0::3] -= 115.0
    logits[1::3] += 85.0
    logits[2::3] = logits[2::3] * 8.0 - 80.0
    return logits


def undecided(logits: Tensor, bias: Tensor, router: RouterConfig) -> Tensor:
    """bool ``[M]``: rows in which two scores that decide something lie in one tie class without being equal."""
    z = logits.to(torch.float64)
    scores = sqrt_softplus_ref(z) if router.scoring == "sqrtsoftplus" else torch.sigmoid(z)
    biased = scores + bias.to(torch.float64)
    undecided = torch.zeros(len(z), dtype=torch.bool)
    if router.n_groups is not None and router.topk_groups is not None:
        groups = biased.unflatten(1, (router.n_groups, -1))
        sums = groups.topk(2, dim=-1).values.sum(dim=-1)
        ordered, best = sums.sort(dim=1, descending=True, stable=True)
        undecided |= _near(ordered[:, router.topk_groups - 1 : router.topk_groups + 1]).any(dim=1)
        dropped = torch.ones_like(sums, dtype=torch.bool).scatter_(1, best[:, : router.topk_groups], False)
        biased = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    ordered = biased.sort(dim=1, descending=True).values
    return undecided | _near(ordered[:, : router.top_k + 1]).any(dim=1)


def _near(ordered: Tensor) -> Tensor:
    upper, lower = ordered[:, :-1], ordered[:, 1:]
    return (upper != lower) & (upper - lower < _TIE_BAND * torch.maximum(upper.abs(), lower.abs()))


# --- cases ---


def _router(n_experts: int, top_k: int = 6, groups: int | None = None, kept: int | None = None) -> RouterConfig:
    scoring = V3_2.router.scoring if groups else V4_FLASH.router.scoring
    scale = V3_2.router.route_scale if groups else V4_FLASH.router.route_scale
    return RouterConfig(n_experts=n_experts, top_k=top_k, scoring=scoring, route_scale=scale, n_groups=groups,
                        topk_groups=kept)  # fmt: skip


def _case(name: str, kind: str, router: RouterConfig, rows: int, **changes: Any) -> Case:
    flags = {key: changes.pop(key) for key in ("tiny", "needs_gpu", "measured", "about") if key in changes}
    params = {"kind": kind, "router": router, "rows": rows, "ranks": 8, "placement": "linear", "block_m": 16,
              "dtype": torch.float32, "content": "plain", "offset": 7.0, "width": 0, **changes}  # fmt: skip
    return Case(name, params, **flags)


def _tiny(name: str, kind: str, router: RouterConfig, rows: int, about: str, **changes: Any) -> Case:
    return _case(name, kind, router, rows, tiny=True, about=about, **{"ranks": 2, "block_m": 4, "width": 16, **changes})


_FLASH, _PRO, _V32 = V4_FLASH.router, V4_PRO.router, V3_2.router
_PRODUCTION = (("flash", "learned", _FLASH), ("pro", "learned", _PRO), ("v32", "grouped", _V32))
_LARGE = {"needs_gpu": True, "measured": True}
CASES = (
    _tiny("tiny", "learned", _router(24), 9, "two ranks"),
    _tiny("tiny-two-blocks", "learned", _router(72), 40, "240 slots, and 36 experts per rank: no multiple of 32"),
    _tiny("tiny-grouped", "grouped", _router(32, 8, 8, 4), 7, "V3.2's groups, top 8", ranks=4, placement="round_robin"),
    _tiny("tiny-padding", "hash", _router(24), 10, "token ids, half of them -1 of padding rows", ranks=3,
          content="padding"),
    _tiny("tiny-odd", "learned", _router(37), 5, "bf16 logits, 37 experts on three ranks", ranks=3,
          placement="round_robin", dtype=torch.bfloat16),
    _tiny("tiny-ties", "learned", _router(24), 7, "many equal scores", content="ties"),
    _tiny("tiny-extremes", "learned", _router(24), 6, "logits from -115 to +105", content="extremes"),
    _tiny("tiny-one-expert", "learned", _router(24, 1), 40, "one expert gets everything", content="one expert"),
    _tiny("tiny-idle-rank", "learned", _router(24), 6, "a rank gets nothing", content="idle rank"),
    _case("flash-3", "learned", _FLASH, 3, tiny=True, about="V4-Flash on eight ranks"),
    _case("flash-0", "learned", _FLASH, 0, tiny=True, about="an empty batch"),
    _case("flash-1", "learned", _FLASH, 1, measured=True),
    _case("flash-hash-33", "hash", _FLASH, 33, needs_gpu=True),
    _case("v32-74", "grouped", _V32, 74, needs_gpu=True, placement="round_robin"),
    _case("pro-321", "learned", _PRO, 321, needs_gpu=True, dtype=torch.bfloat16),
    *(_case(f"{model}-1024", kind, router, 1024, **_LARGE) for model, kind, router in _PRODUCTION),
    _case("flash-8192", "learned", _FLASH, 8192, **_LARGE),
)  # fmt: skip
