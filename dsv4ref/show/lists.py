"""Panels of the chapters about lists: what a row lists at a position, and what choosing it costs. No kernels."""

from __future__ import annotations

from dsv4ref import config
from dsv4ref.device import get_device
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Case
from dsv4ref.ref.indices import seen_ref
from dsv4ref.show import panels

__all__ = ["list_explorer", "window_explorer"]

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


def window_explorer(context: int = 2048, rows: int = 64, model: str = "v4-flash", device: str = "mi300x") -> str:
    """Modelled time of one C4 layer's choice, always computed and by the cheapest way, as SVG.

    Args:
        context: tokens of every row, at least 4.
        rows: query rows.
        model: "v4-flash" or "v4-pro".
        device: key of a device with published figures.

    Raises:
        ValueError: a context without a compressed entry.
    """
    if context < 4:
        raise ValueError(f"context: got {context}, expected at least 4 tokens, which make an entry")
    m, spec = config.get_model(model), get_device(device)
    entries = seen_ref(context - 1, 4)
    params = {"steps": ((entries,) * rows,), "topk": m.index_topk, "columns": max(entries, m.index_topk)}
    case = Case("explored", {**params, "block_size": 64})
    prediction = catalogue.get("full_window_topk").predict(case, device)
    assert prediction.baseline_us is not None
    assert prediction.optimized_us is not None
    way = "fill" if entries <= m.index_topk else "the same: top-k has to choose"
    items = {"logits and top-k": prediction.baseline_us, f"full window ({way})": prediction.optimized_us}
    title = f"Modelled choice of {m.index_topk} from {entries:,} entries, {rows} rows, {spec.name}"
    return panels.bars(items, title=title, unit="us")
