"""Tiny reference experts behind a router, run the way a grouped GEMM would: each expert on the rows it is handed.

The experts are the reference's own function in float64, so whatever an expert is handed, its product is right. What
comes out wrong in the sum was handed to the wrong expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4ref.ref.experts import routed_experts_ref
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.weights import Weights

__all__ = ["Experts", "assignment", "build_experts", "local_error", "routed", "routed_by_plan", "segments"]

_DOUBLE = replace(STRUCTURE, dtype=torch.float64)
_LIMIT = 10.0


@dataclass(frozen=True)
class Experts:
    """Weights of E experts and the tokens' hidden states, float64 on the CPU.

    Args:
        x: ``[M, D]``.
        w1, w3: ``[E, I, D]``.
        w2: ``[E, D, I]``.
    """

    x: Tensor
    w1: Tensor
    w3: Tensor
    w2: Tensor

    def weights(self, expert: int) -> dict[str, Tensor]:
        """One expert's matrices by the names the reference reads."""
        return {f"{expert}.{name}.weight": getattr(self, name)[expert] for name in ("w1", "w2", "w3")}


def build_experts(num_experts: int, rows: int, width: int, generator: torch.Generator) -> Experts:
    """Random experts of hidden width D and half as many intermediate units, with outputs of order one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inner = width // 2
    w1, w3 = (normal(num_experts, inner, width) / width**0.5 * 2 for _ in range(2))
    return Experts(normal(rows, width), w1, w3, normal(num_experts, width, inner) / inner**0.5)


def _compute(experts: Experts, expert: int, tokens: Tensor, weights: Tensor) -> Tensor:
    """One expert on some tokens, weighted: ``[n, D]``."""
    ids = torch.full((len(tokens), 1), expert)
    named = Weights(experts.weights(expert), dtype=torch.float64)
    return routed_experts_ref(experts.x[tokens], weights[:, None], ids, named, _LIMIT, _DOUBLE)


def routed(experts: Experts, weights: Tensor, chosen: Tensor) -> Tensor:
    """The routed sum on one rank, straight from the ids: float64 ``[M, D]``.

    Args:
        experts: weights and tokens.
        weights: ``[M, k]``.
        chosen: integer ``[M, k]`` global ids; whatever is no expert adds nothing.
    """
    total = torch.zeros_like(experts.x)
    for expert in range(len(experts.w1)):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens):
            total.index_add_(0, tokens, _compute(experts, expert, tokens, weights[tokens, slots].to(torch.float64)))
    return total


def segments(plan: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
    """What a grouped GEMM reads: (local expert, slots), the slots being gather's between the expert's offsets.

    Entries that are no slot (-1, or poison where nobody wrote) are left out: a GEMM would skip or fault there.
    """
    gather, counts = plan["gather"].cpu().to(torch.int64), plan["histogram"].tolist()
    starts = plan["offsets"].tolist()
    found = []
    for expert, (start, count) in enumerate(zip(starts, counts, strict=False)):
        slots = gather[start : start + count]
        found.append((expert, slots[(slots >= 0) & (slots < len(gather))]))
    return found


def routed_by_plan(experts: Experts, weights: Tensor, plan: Mapping[str, Tensor], owned: Sequence[int]) -> Tensor:
    """One rank's part of the routed sum, from its routing data: float64 ``[M, D]``.

    Args:
        experts: weights and tokens.
        weights: fp32 ``[M, k]``.
        plan: routing data by name, as `DispatchPlan.tensors`.
        owned: global expert behind each local number.
    """
    total, flat = torch.zeros_like(experts.x), weights.cpu().to(torch.float64).flatten()
    top_k = max(weights.shape[1], 1)
    for local, slots in segments(plan):
        if len(slots):
            tokens = slots // top_k
            total.index_add_(0, tokens, _compute(experts, owned[local], tokens, flat[slots]))
    return total


def assignment(plans: Sequence[Mapping[str, Tensor]], owned: Sequence[Sequence[int]], rows: int, top_k: int) -> Tensor:
    """How often each token is computed by each expert, over all ranks: int64 ``[M, E]``.

    Args:
        plans: routing data per rank.
        owned: per rank, the global expert behind each local number.
        rows, top_k: M and k.
    """
    counts = torch.zeros((rows, sum(map(len, owned))), dtype=torch.int64)
    for plan, mine in zip(plans, owned, strict=True):
        for local, slots in segments(plan):
            tokens = slots // top_k
            counts[:, mine[local]] += torch.bincount(tokens, minlength=rows)
    return counts


def local_error(experts: Experts, counts: Tensor) -> float:
    """Largest error of any product that was computed, against a dense product of the same expert and token.

    Args:
        experts: weights and tokens.
        counts: `assignment`; pairs with a count of 0 were not computed.

    Returns:
        absolute error; outputs are of order one.
    """
    gate = torch.einsum("eid,td->eti", experts.w1, experts.x).clamp(max=_LIMIT)
    up = torch.einsum("eid,td->eti", experts.w3, experts.x).clamp(-_LIMIT, _LIMIT)
    dense = torch.einsum("edi,eti->etd", experts.w2, torch.nn.functional.silu(gate) * up)
    worst = 0.0
    for expert in range(len(experts.w1)):
        tokens = counts[:, expert].nonzero()[:, 0]
        if len(tokens):
            mine = _compute(experts, expert, tokens, torch.ones(len(tokens), dtype=torch.float64))
            worst = max(worst, float((mine - dense[expert, tokens]).abs().max()))
    return worst
