"""Panels of the chapters about lists: what a row lists at a position, and what choosing it costs. No kernels."""

from __future__ import annotations

from dsv4ref import config
from dsv4ref.ref.indices import seen_ref
from dsv4ref.show import panels

__all__ = ["list_explorer"]

_SCOPES = {"SWA": 1, "C4": 4, "C128": 128}


def list_explorer(position: int = 2047, model: str = "v4-flash") -> str:
    """Slots that one decode row lists in each scope, as SVG.

    Args:
        position: of the row's query token, from 0.
        model: "v4-flash" or "v4-pro".
    """
    m = config.get_model(model)
    bounds = {"SWA": m.window_size, "C4": m.index_topk, "C128": m.max_position // 128}
    items = {}
    for scope, ratio in _SCOPES.items():
        seen = seen_ref(position, ratio)
        kept = min(seen, bounds[scope])
        items[scope if kept == seen else f"{scope} (of {seen:,})"] = float(kept)
    return panels.bars(items, title=f"Slots listed at position {position:,}, {model}", unit="slots")
