"""The merge's panel: who gets how much of a row, right and with one of the usual mistakes. No kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.ref.merge import merge_weights_ref
from dsv4ref.show import panels

__all__ = ["MISTAKES", "merge_explorer"]

MISTAKES = ("none", "base 2 taken for natural", "sink in each scope", "sink times scale", "extra LSE is +inf")
_NAMES = ("SWA", "extra", "sink")


def merge_explorer(
    swa: float = 1.0, extra: float = 0.0, extra_keys: int = 512, sink: float = 4.0, mistake: str = "none"
) -> str:
    """The weights of both scopes and of the sink in one row of one head, as SVG.

    Every key of a scope has the same score, so that a scope's LSE is the score plus the logarithm of its keys.

    Args:
        swa: score of the 128 SWA keys.
        extra: score of the extra scope's keys.
        extra_keys: how many there are; 0 is an empty scope.
        sink: the head's logit.
        mistake: one of `MISTAKES`.

    Raises:
        ValueError: no such mistake.
    """
    if mistake not in MISTAKES:
        raise ValueError(f"mistake: got {mistake!r}, expected one of {list(MISTAKES)}")
    lses = torch.tensor([swa + math.log(128), extra + math.log(extra_keys) if extra_keys else -math.inf])
    logit = torch.tensor([sink])
    right = _weights(lses, logit)
    items = {f"{name}, right" if mistake != "none" else name: w for name, w in zip(_NAMES, right, strict=True)}
    if mistake != "none":
        wrong = _mistaken(lses, logit, mistake)
        items |= {f"{name}, wrong": w for name, w in zip(_NAMES, wrong, strict=True)}
    said = ", ".join(f"{name} LSE {value:.2f}" for name, value in zip(_NAMES, lses.tolist(), strict=False))
    return panels.bars(items, title=f"{said}, sink {sink:g}; mistake: {mistake}", unit="of the row", limit=1.0)


def _weights(lses: Tensor, sink: Tensor) -> list[float]:
    weights, taken, _ = merge_weights_ref(lses[:, None, None], sink)
    return [*weights.flatten().tolist(), float(taken)]


def _mistaken(lses: Tensor, sink: Tensor, mistake: str) -> list[float]:
    if mistake == "base 2 taken for natural":
        return _weights(lses / math.log(2), sink)
    if mistake == "sink times scale":
        return _weights(lses, sink * HEAD_DIM**-0.5)
    if mistake == "extra LSE is +inf":
        return _weights(torch.stack([lses[0], torch.tensor(math.inf)]), sink)
    # Each partial keeps its scope's share against the sink; what is missing from 1 went to sinks.
    merged = _weights(lses, torch.tensor([-math.inf]))[:2]
    kept = [w * share for w, share in zip(merged, torch.sigmoid(lses - sink).tolist(), strict=True)]
    return [*kept, 1.0 - sum(kept)]
