"""Experts: clamped SwiGLU, the routed sum and the shared expert.

    g = w1 x;  u = w3 x
    g <- min(g, limit);  u <- clamp(u, -limit, limit)         no lower clamp on g
    y = w2(silu(g) * u * router weight)

DeepSeek multiplies the router weight in before ``w2``, where activations are rounded; vLLM and transformers after.
Equal in exact arithmetic; ``Numerics.weight_before_w2`` chooses. The routed sum is accumulated unrounded, the shared
expert added to it without a weight, and the total rounded once.

The gpt-oss activation (alpha 1.702, limit 7, u + 1) is a different function.

Source: DeepSeek-V4 inference/model.py, ``Expert`` and ``MoE``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.config import ModelConfig
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.router import route_hash_ref, route_learned_ref, router_logits_ref
from dsv4ref.ref.weights import Weights

__all__ = ["clamped_swiglu_ref", "moe_ref", "route_ref", "routed_experts_ref", "shared_expert_ref"]


def clamped_swiglu_ref(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """``silu(min(g, limit)) * clamp(u, -limit, limit)``, elementwise; None for no clamp."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    return functional.silu(gate) * up


def routed_experts_ref(
    x: Tensor, route_weights: Tensor, experts: Tensor, weights: Weights, limit: float, numerics: Numerics
) -> Tensor:
    """Sum over every token's experts.

    Token by token, so that what one token gets does not depend, to the last bit, on which others share its experts.

    Args:
        x: ``[T, D]`` normed layer input.
        route_weights: ``[T, k]``.
        experts: int64 ``[T, k]``, distinct in every row.
        weights: ``<e>.w1``, ``<e>.w2``, ``<e>.w3``.
        limit: of the clamp.
        numerics: formats.

    Returns:
        ``[T, D]``, not rounded.
    """
    total = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        part = weights.at(str(expert))
        w1, w2, w3 = part.matrix("w1"), part.matrix("w2"), part.matrix("w3")  # [I, D], [D, I], [I, D]
        for t, slot in (experts == expert).nonzero().tolist():
            inputs = numerics.expert_input(x[t])  # [D]
            gate, up = numerics.round(w1 @ inputs), numerics.round(w3 @ inputs)  # [I]
            hidden = clamped_swiglu_ref(gate, up, limit)
            if numerics.weight_before_w2:
                hidden = hidden * route_weights[t, slot]
            y = numerics.round(w2 @ numerics.expert_input(numerics.round(hidden)))  # [D]
            total[t] += y if numerics.weight_before_w2 else y * route_weights[t, slot]
    return total


def shared_expert_ref(x: Tensor, weights: Weights, limit: float, numerics: Numerics) -> Tensor:
    """The expert that every token goes through, without a router weight.

    Args:
        x: ``[T, D]`` normed layer input.
        weights: ``w1``, ``w2``, ``w3``.
        limit: of the clamp, applied where ``numerics.clamp_shared``.
        numerics: formats.

    Returns:
        ``[T, D]``.
    """
    inputs = numerics.linear_input(x)
    gate = numerics.round(inputs @ weights.matrix("w1").T)  # [T, I]
    up = numerics.round(inputs @ weights.matrix("w3").T)
    hidden = numerics.round(clamped_swiglu_ref(gate, up, limit if numerics.clamp_shared else None))
    return numerics.round(numerics.linear_input(hidden) @ weights.matrix("w2").T)


def route_ref(
    x: Tensor, token_ids: Tensor, weights: Weights, hashed: bool, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Weights ``[T, k]`` and experts int64 ``[T, k]`` of one layer's gate.

    Args:
        x: ``[T, D]`` normed layer input.
        token_ids: int64 ``[T]``, read by hash layers.
        weights: the gate's.
        hashed: whether this is a hash layer.
        config: the model.
    """
    logits = router_logits_ref(x, weights.tensor("weight"))
    if hashed:
        return route_hash_ref(logits, weights.raw("tid2eid"), token_ids, config.router)
    return route_learned_ref(logits, weights.tensor("bias"), config.router)


def moe_ref(
    x: Tensor, token_ids: Tensor, weights: Weights, hashed: bool, config: ModelConfig, numerics: Numerics
) -> Tensor:
    """The whole feed-forward part: router, routed experts, shared expert.

    Args:
        x: ``[T, D]`` normed layer input.
        token_ids: int64 ``[T]``.
        weights: the part's (``layers.N.ffn``).
        hashed: whether the layer routes by token id.
        config: the model.
        numerics: formats.

    Returns:
        ``[T, D]``.
    """
    route_weights, experts = route_ref(x, token_ids, weights.at("gate"), hashed, config)
    routed = routed_experts_ref(x, route_weights, experts, weights.at("experts"), config.swiglu_limit, numerics)
    return numerics.round(routed + shared_expert_ref(x, weights.at("shared_experts"), config.swiglu_limit, numerics))
