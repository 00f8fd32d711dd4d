"""Expert routers: DeepSeek-V4's, by score or by token id, and DeepSeek-V3.2's, by score within groups.

V4       s = sqrt(softplus(x W^T))
         learned layers   experts = top-k of s + bias        hash layers   experts = table[token id]
         w = s[experts] / sum * route_scale                  the bias selects, it never weights
V3.2     s = sigmoid(x W^T);  b = s + bias
         group score = sum of its two largest b;  keep the best groups;  experts = top-k of b within them
         w = s[experts] / sum * route_scale

Everything from the logits on is done in the arithmetic dtype. The bias is large beside the differences that decide
(about 8 on the released Flash, by a comment in vLLM's code): in bfloat16 its spacing there is 1/16, and s + bias would
lose the selection.

Ties go to the lower expert number; no source specifies them.

Source: DeepSeek-V4 inference/model.py, ``Gate``; DeepSeek-V3.2-Exp inference/model.py, ``Gate``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.config import RouterConfig

__all__ = ["route_grouped_ref", "route_hash_ref", "route_learned_ref", "router_logits_ref", "sqrt_softplus_ref"]


def router_logits_ref(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``: ``[T, D]`` and ``[E, D]`` give ``[T, E]`` of ``x``'s dtype, whatever the weight is stored in."""
    return x @ weight.to(x.dtype).T


def sqrt_softplus_ref(logits: Tensor) -> Tensor:
    """V4's score, ``sqrt(ln(1 + e^z))``, elementwise; softplus is taken as z above 20."""
    return torch.sqrt(functional.softplus(logits))


def _top(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of every row, best first, ties to the lower index: int64 ``[T, count]``."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def _weights(scores: Tensor, experts: Tensor, router: RouterConfig) -> Tensor:
    """Scores of the chosen experts, renormalised and then scaled, ``[T, k]``."""
    chosen = scores.gather(1, experts)
    if router.norm_topk_prob:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return chosen * router.route_scale


def route_learned_ref(logits: Tensor, bias: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """V4, learned layers: the k experts of highest biased score.

    Args:
        logits: ``[T, E]``, float32 or float64.
        bias: ``[E]`` of the same dtype.
        router: k and the scale.

    Returns:
        weights ``[T, k]`` that sum to route_scale, and experts int64 ``[T, k]``.

    Raises:
        ValueError: a router of another kind, or shapes and dtypes that do not belong together.
    """
    _expect(logits, bias, router, "sqrtsoftplus", grouped=False)
    scores = sqrt_softplus_ref(logits)
    experts = _top(scores + bias, router.top_k)
    return _weights(scores, experts, router), experts


def route_hash_ref(logits: Tensor, table: Tensor, token_ids: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """V4, hash layers: experts are fixed per token id; the gate still weights them.

    Args:
        logits: ``[T, E]``.
        table: integer ``[V, k]``, distinct experts in every row.
        token_ids: int64 ``[T]``.
        router: the scale.

    Returns:
        weights ``[T, k]`` and experts int64 ``[T, k]``.

    Raises:
        ValueError: a router of another kind, shapes that do not belong together, or a token id outside the table.
    """
    _expect(logits, None, router, "sqrtsoftplus", grouped=False)
    if tuple(token_ids.shape) != (logits.shape[0],):
        raise ValueError(
            f"token_ids: got shape {tuple(token_ids.shape)}, expected ({logits.shape[0]},) like the logits"
        )
    outside = (token_ids < 0) | (token_ids >= table.shape[0])
    if bool(outside.any()):
        raise ValueError(f"token_ids: got {int(token_ids[outside][0])}, expected 0 to {table.shape[0] - 1}")
    experts = table[token_ids].to(torch.int64)
    return _weights(sqrt_softplus_ref(logits), experts, router), experts


def route_grouped_ref(logits: Tensor, bias: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """V3.2: the k experts of highest biased score within the best groups.

    Experts of the other groups are masked with -inf (a mask of 0 would let them in where biased scores are negative).

    Args:
        logits: ``[T, E]``, float32 or float64.
        bias: ``[E]`` of the same dtype.
        router: groups, k and the scale.

    Returns:
        weights ``[T, k]`` and experts int64 ``[T, k]``.

    Raises:
        ValueError: a router of another kind, or shapes and dtypes that do not belong together.
    """
    _expect(logits, bias, router, "sigmoid", grouped=True)
    assert router.n_groups is not None
    assert router.topk_groups is not None
    scores = torch.sigmoid(logits)
    biased = (scores + bias).unflatten(1, (router.n_groups, -1))  # [T, groups, E / groups]
    group_scores = biased.topk(2, dim=-1).values.sum(dim=-1)  # [T, groups]
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, _top(group_scores, router.topk_groups), True)
    masked = biased.masked_fill(~kept[..., None], float("-inf")).flatten(1)  # [T, E]
    experts = _top(masked, router.top_k)
    return _weights(scores, experts, router), experts


def _expect(logits: Tensor, bias: Tensor | None, router: RouterConfig, scoring: str, grouped: bool) -> None:
    if router.scoring != scoring or (router.n_groups is not None) != grouped:
        kind = f"{router.scoring}, {'grouped' if router.n_groups is not None else 'no groups'}"
        raise ValueError(f"router: got {kind}, expected {scoring}, {'grouped' if grouped else 'no groups'}")
    if logits.dim() != 2 or logits.shape[1] != router.n_experts:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [T, {router.n_experts}]")
    if bias is not None and (bias.dtype is not logits.dtype or tuple(bias.shape) != (router.n_experts,)):
        raise ValueError(
            f"bias: got {bias.dtype} {tuple(bias.shape)}, expected {logits.dtype} ({router.n_experts},) like the logits"
        )
