"""The rotation's panel: the angle of each pair at a position, and how far off a usual mistake puts it. No kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.rope import layer_frequencies
from dsv4ref.show import panels

__all__ = ["LAYERS", "MISTAKES", "PAIRS", "rotation_explorer"]

LAYERS = {"SWA only": 0, "compressed": 2}
"""Kinds of layers, each by one of V4-Flash's."""

MISTAKES = (
    "none",
    "turned forward",
    "row 3 for the position",
    "one token too far",
    "table of the other kind of layer",
    "position in bf16",
)

PAIRS = (0, 4, 8, 12, 16, 20, 24, 28, 31)
"""Pairs that are shown, of 32."""


def rotation_explorer(position: int = 4097, layer: str = "compressed", mistake: str = "none") -> str:
    """Angles of some pairs at a position, or how far off they are with a mistake, as SVG.

    Args:
        position: of the query, from 0.
        layer: one of `LAYERS`.
        mistake: one of `MISTAKES`.

    Raises:
        ValueError: no such layer or mistake, or a negative position.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer: got {layer!r}, expected one of {list(LAYERS)}")
    if mistake not in MISTAKES:
        raise ValueError(f"mistake: got {mistake!r}, expected one of {list(MISTAKES)}")
    if position < 0:
        raise ValueError(f"position: got {position}, expected 0 or more")
    right = _degrees(position, layer)
    where = f"position {position:,}, {layer} layer"
    if mistake == "none":
        turned = right.remainder(360.0)
        return panels.bars(_by_pair(turned), title=f"Angle within a turn, {where}", unit="degrees", limit=360.0)
    off = (_mistaken(position, layer, mistake) - right + 180.0).remainder(360.0) - 180.0
    title = f"How far off each pair is, {where}; mistake: {mistake}"
    return panels.bars(_by_pair(off.abs()), title=title, unit="degrees", limit=180.0)


def _by_pair(values: Tensor) -> dict[str, float]:
    return {f"pair {pair}": round(float(values[pair]), 3) for pair in PAIRS}


def _degrees(position: float, layer: str) -> Tensor:
    """The angles of all pairs, float64 ``[32]``: fp32 products, as in the model."""
    freqs = layer_frequencies(config.V4_FLASH, LAYERS[layer], Numerics())
    return torch.rad2deg((torch.tensor(position, dtype=torch.float32) * freqs).to(torch.float64))


def _mistaken(position: int, layer: str, mistake: str) -> Tensor:
    if mistake == "turned forward":
        return -_degrees(position, layer)
    if mistake == "table of the other kind of layer":
        (other,) = (kind for kind in LAYERS if kind != layer)
        return _degrees(position, other)
    rounded = float(torch.tensor(position).to(torch.bfloat16))
    taken = {"row 3 for the position": 3.0, "one token too far": position + 1.0, "position in bf16": rounded}
    return _degrees(taken[mistake], layer)
