"""Routers in float64 with an error band: which expert sets fp32 logits decide, and which sets they leave open.

fp32 sums of the same products, taken in another order, differ by a few parts in a million. Where two candidates are
closer than that, both choices are right: the row is in a *tie class*. So every logit becomes an interval, and a row is
decided if the same experts win at either end of all intervals.

    logit band       2^-13 max(1, |z|)        16 * 2^-24 * sqrt(7168), rounded up: the random walk of rounding errors in
                                              a sum of D <= 7168 products that adds up to order one, 16 times over
    biased score     2^-20 |s + bias|         what fp32 adds in score and sum, a few ulps

bf16 logits are off by up to 2^-8 |z|, 32 bands; a bias rounded to bf16 by up to 1/64 around 7, 128 bands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.config import RouterConfig
from dsv4ref.ref.router import sqrt_softplus_ref

__all__ = ["LOGIT_BAND", "Decision", "decide", "scores64", "weights64"]

LOGIT_BAND = 2.0**-13
_SUM_BAND = 2.0**-20


@dataclass(frozen=True)
class Decision:
    """What a batch of logits decides.

    Args:
        experts: int64 ``[M, k]``, the float64 router's, ascending.
        decided: bool ``[M]``, False in a tie class. Rows with a NaN or an infinity count as decided: there the rule
            (NaN last, equal scores to the lower expert) says which experts win.
    """

    router: RouterConfig
    experts: Tensor
    decided: Tensor
    _low: Tensor
    _high: Tensor
    _possible: Tensor
    _certain: Tensor

    def allows(self, experts: Tensor) -> Tensor:
        """Rows whose experts nothing contradicts, bool ``[M]``.

        A decided row allows its experts and no others. In a tie class they must be distinct experts of groups that may
        be kept, and none of a group that is kept for certain may be left out although it is above one of them.

        Args:
            experts: integer ``[M, k]``, any order, any value.
        """
        ids = experts.to("cpu", torch.int64).sort(dim=1).values
        total = self.router.n_experts
        sound = ((ids >= 0) & (ids < total)).all(dim=1) & (ids[:, 1:] != ids[:, :-1]).all(dim=1)
        held = ids.clamp(0, total - 1)
        chosen = torch.zeros_like(self._low, dtype=torch.bool).scatter_(1, held, True)
        beaten = self._low.masked_fill(chosen | ~self._certain, float("-inf")).amax(dim=1)
        open_rows = (self._high.gather(1, held).amin(dim=1) >= beaten) & self._possible.gather(1, held).all(dim=1)
        return sound & torch.where(self.decided, (ids == self.experts).all(dim=1), open_rows)


def scores64(logits: Tensor, router: RouterConfig) -> Tensor:
    """The router's scores in float64."""
    z = logits.to(torch.float64)
    return sqrt_softplus_ref(z) if router.scoring == "sqrtsoftplus" else torch.sigmoid(z)


def weights64(logits: Tensor, experts: Tensor, router: RouterConfig) -> Tensor:
    """Weights of given experts in float64, ``[M, k]``; ids out of range count as expert 0."""
    inside = (experts >= 0) & (experts < router.n_experts)
    chosen = scores64(logits, router).gather(1, experts.to(torch.int64).masked_fill(~inside, 0))
    if router.norm_topk_prob:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    return chosen * router.route_scale


def decide(logits: Tensor, bias: Tensor, router: RouterConfig, band: float = LOGIT_BAND) -> Decision:
    """Route in float64 and say which rows the band leaves open.

    Args:
        logits: float64 ``[M, E]``, as exact as they can be had.
        bias: ``[E]``.
        router: of either kind.
        band: half width of a logit's interval at |z| <= 1; relative beyond.

    Raises:
        TypeError, ValueError: logits that are not float64, or not of this router.
    """
    if logits.dtype is not torch.float64:
        raise TypeError(f"logits: got {logits.dtype}, expected torch.float64: the band is far below fp32's own error")
    if logits.dim() != 2 or logits.shape[1] != router.n_experts:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [M, {router.n_experts}]")
    half = torch.where(logits.isfinite(), band * logits.abs().clamp(min=1.0), 0.0)
    shift = bias.to(torch.float64)
    middle = scores64(logits, router) + shift
    slack = torch.where(middle.isfinite(), _SUM_BAND * middle.abs(), 0.0)
    middle, low, high = (
        torch.where(biased.isnan(), float("-inf"), biased)
        for biased in (
            middle,
            scores64(logits - half, router) + shift - slack,
            scores64(logits + half, router) + shift + slack,
        )
    )
    kept, possible, certain = _groups(middle, low, high, router)
    candidates = middle.masked_fill(~kept, float("-inf"))
    order = torch.sort(candidates, dim=1, descending=True, stable=True).indices
    if router.n_groups is not None:  # NaN ranks below everything, but experts of dropped groups are no candidates
        order = order.gather(1, torch.sort(kept.gather(1, order), dim=1, descending=True, stable=True).indices)
    experts = order[:, : router.top_k].sort(dim=1).values
    chosen = torch.zeros_like(kept).scatter_(1, experts, True)
    best_left = high.masked_fill(chosen | ~kept, float("-inf")).amax(dim=1)
    clear = low.gather(1, experts).amin(dim=1) > best_left
    same_groups = (possible == certain).all(dim=1)
    return Decision(
        router, experts, (clear & same_groups) | ~logits.isfinite().all(dim=1), low, high, possible, certain
    )


def _groups(middle: Tensor, low: Tensor, high: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of groups that are kept, may be, and certainly are: bool ``[M, E]`` each."""
    if router.n_groups is None or router.topk_groups is None:
        everything = torch.ones_like(middle, dtype=torch.bool)
        return everything, everything, everything
    groups, keep = router.n_groups, router.topk_groups
    mid, lowest, highest = (
        biased.unflatten(1, (groups, -1)).topk(2, dim=-1).values.sum(dim=-1) for biased in (middle, low, high)
    )
    best = torch.sort(mid, dim=1, descending=True, stable=True).indices[:, :keep]
    kept = torch.zeros_like(mid, dtype=torch.bool).scatter_(1, best, True)
    # At most keep - 1 others may be at or above it, and at least keep are certainly above it.
    above = (highest[:, None, :] >= lowest[:, :, None]).sum(dim=2) - 1
    certainly_above = (lowest[:, None, :] > highest[:, :, None]).sum(dim=2)
    masks = (kept, certainly_above < keep, above < keep)
    spread = tuple(mask.repeat_interleave(router.n_experts // groups, dim=1) for mask in masks)
    return spread[0], spread[1], spread[2]
