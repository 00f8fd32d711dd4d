"""What rounding a router's bias, or its logits, to bf16 does: distinct values, changed expert sets, task accuracy.

Logits are drawn from a standard normal distribution, biases around an offset. Real biases cluster: GLM-5.2's between
6.817 and 7.063 (sglang#37133), DeepSeek-V3's above 2.02 (transformers#45441), the released V4-Flash's around 8. A
constant added to all of them changes no selection in exact arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4ref.accuracy import score
from dsv4ref.accuracy.task import TASK
from dsv4ref.config import V3_2, V4_FLASH, RouterConfig
from dsv4ref.optimizations import chapter
from dsv4ref.optimizations.router_band import decide
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.router import route_grouped_ref, route_learned_ref

__all__ = [
    "OFFSETS",
    "ROUTERS",
    "SPREADS",
    "accuracy_rows",
    "bf16_spacing",
    "bias_facts",
    "changed",
    "draw_bias",
    "rate_rows",
]

OFFSETS = (0.0, 1.0, 2.02, 5.0, 7.0, 8.0)
SPREADS = (0.02, 0.1)
ROUTERS = {"V3.2": V3_2.router, "V4-Flash": V4_FLASH.router}
_DRAWS = 4
"""Biases per setting: which experts round up is luck, the same for all rows of a draw."""


def bf16_spacing(value: float) -> float:
    """Distance of bf16 numbers around a value that is not 0: 8 significant bits."""
    if not (math.isfinite(value) and value):
        raise ValueError(f"value: got {value}, expected a finite number other than 0")
    return 2.0 ** (math.frexp(abs(value))[1] - 8)


def draw_bias(offset: float, spread: float, experts: int, seed: int) -> Tensor:
    """fp32 ``[E]``: normal, with that mean and that standard deviation."""
    return offset + spread * torch.randn(experts, generator=torch.Generator().manual_seed(seed))


def bias_facts(bias: Tensor) -> dict[str, float]:
    """Distinct values in fp32 and in bf16, and bf16's spacing at the median of the absolute values."""
    return {
        "distinct in fp32": bias.unique().numel(),
        "distinct in bf16": bias.to(torch.bfloat16).unique().numel(),
        "bf16 spacing": bf16_spacing(float(bias.abs().median())),
    }


def _expert_sets(logits: Tensor, bias: Tensor, router: RouterConfig) -> Tensor:
    """The reference router's experts in fp32, ascending: int64 ``[M, k]``."""
    route = route_learned_ref if router.n_groups is None else route_grouped_ref
    return route(logits, bias, router)[1].sort(dim=1).values


@functools.lru_cache(maxsize=512)
def changed(router: RouterConfig, offset: float, spread: float, rows: int, seed: int = 0) -> Mapping[str, float]:
    """Shares of rows whose expert set changes, 0..1.

    Args:
        router: of either kind.
        offset, spread: of the bias.
        rows: in all, spread evenly over a few draws of the bias.
        seed: of logits and biases.

    Returns:
        ``"bias"``: bias rounded, logits bf16 on both sides (the source against its baseline). ``"logits"``: logits
        rounded, bias fp32 on both sides (the baseline against fp32 logits). ``"both"``: the source against fp32.
        ``"tie class"``: rows that fp32 logits do not decide (`router_band`).
    """
    found = dict.fromkeys(("bias", "logits", "both", "tie class"), 0.0)
    each = rows // _DRAWS
    if each < 1:
        raise ValueError(f"rows: got {rows}, expected at least {_DRAWS}")
    for draw in range(_DRAWS):
        rng = torch.Generator().manual_seed(1000 * seed + draw)
        logits = torch.randn((each, router.n_experts), generator=rng)
        bias = draw_bias(offset, spread, router.n_experts, 1000 * seed + draw + 500)
        narrow = logits.to(torch.bfloat16).to(torch.float32)
        rounded = bias.to(torch.bfloat16).to(torch.float32)
        right = _expert_sets(logits, bias, router)
        baseline = _expert_sets(narrow, bias, router)
        source = _expert_sets(narrow, rounded, router)
        for name, one, other in (("bias", baseline, source), ("logits", right, baseline), ("both", right, source)):
            found[name] += (one != other).any(dim=1).float().mean().item() / _DRAWS
        decided = decide(logits.to(torch.float64), bias, router).decided
        found["tie class"] += (~decided).float().mean().item() / _DRAWS
    return MappingProxyType(found)


def rate_rows(what: str, rows: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`changed` in percent, one row per router and spread, a column per offset.

    Args:
        what: a key of `changed`.
        rows, seed: as `changed`.
    """
    return [
        {"router": name, "spread": spread}
        | {f"{offset:g}": round(100 * changed(router, offset, spread, rows, seed)[what], 2) for offset in OFFSETS}
        for name, router in ROUTERS.items()
        for spread in SPREADS
    ]


def accuracy_rows(offsets: Sequence[float] = OFFSETS, sequences: int = 6, seed: int = 77) -> list[dict[str, Any]]:
    """The small trained model with its learned biases moved by an offset and rounded to bf16, and moved in fp32.

    Args:
        offsets: added to every bias.
        sequences: of the task, each processed as one prompt, in fp32.
        seed: of the sequences; below 1,000,000 they are held out.

    Returns:
        one row per offset in bf16 behind one for the largest offset in fp32: offset, dtype, distinct biases of all
        learned layers, right answers in percent, and points lost against the model as it is, with their standard error.
    """
    examples = replace(TASK.examples(sequences, seed), tail=TASK.length)
    model = score.load_model(STRUCTURE)
    right = score.accuracy(score.plain(model), examples)
    rows, ways = [], [(max(offsets), torch.float32), *((offset, torch.bfloat16) for offset in offsets)]
    for offset, dtype in chapter.progress(ways, "scoring"):
        moved = score.router_bias(model, offset, dtype).model
        biases = [t for name, t in moved.tensors.items() if name.endswith("ffn.gate.bias")]
        found = score.accuracy(score.plain(moved), examples)
        lost, error = score.points_lost(right, found)
        rows.append(
            {
                "offset": offset,
                "bias in": str(dtype).removeprefix("torch."),
                "distinct biases": "+".join(str(bias.unique().numel()) for bias in biases),
                "right, %": 100 * found["retrieval"],
                "points lost": lost,
                "standard error": error,
            }
        )
    return rows
