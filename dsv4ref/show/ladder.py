"""Chapter 17's pictures, as SVG: what an order does to contributions, and what a noise leaves of a ladder."""

from __future__ import annotations

import itertools

from dsv4ref.optimizations import ladder_statistics as statistics
from dsv4ref.optimizations.ladder_attribution import cumulative, leave_one_out, shapley
from dsv4ref.optimizations.ladder_simulation import PARTS, overlap_times
from dsv4ref.show import panels

__all__ = ["ORDERS", "VIEWS", "ladder_explorer", "noise_explorer"]

ORDERS = tuple(" > ".join(order) for order in itertools.permutations(PARTS))
"""The orders that `ladder_explorer` can draw, switches from the first turned on to the last."""

VIEWS = ("ladder", "left out", "Shapley")
"""What `ladder_explorer` can show of them."""


def ladder_explorer(
    order: str = ORDERS[0], view: str = "ladder", host_ms: float = 30.0, device_ms: float = 28.0
) -> str:
    """What each of three switches saves of a step that takes as long as the slower of host and device: a model.

    Args:
        order: one of `ORDERS`; only the ladder depends on it.
        view: "ladder" (in this order), "left out" (taken from the full set) or "Shapley" (mean over all orders).
        host_ms, device_ms: what host and device need with nothing on.

    Raises:
        ValueError: an unknown order or view, or a time that is not positive.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
    times = overlap_times(host_ms, device_ms)
    names = order.split(" > ")
    if view == "ladder":
        shares = cumulative(times, names)
    elif view in VIEWS:
        shares = (leave_one_out if view == "left out" else shapley)(times, names, lambda on: True)
    else:
        raise ValueError(f"view: got {view!r}, expected one of {', '.join(VIEWS)}")
    total = times[frozenset()] - times[frozenset(PARTS)]
    title = f"Model, host {host_ms:g} ms, device {device_ms:g} ms, {view}: saved of {total:.3g} ms in all"
    shown = {name: shares[name] for name in names} | {"sum": sum(shares.values())}
    return panels.bars(shown, title=title, unit="ms")


def noise_explorer(noise_percent: float = 0.3, repeats: int = 1) -> str:
    """The source's ladder, rung by rung, against what so many runs of such a noise can resolve.

    Args:
        noise_percent: relative standard deviation of one run, in percent; assumed, since the source states none.
        repeats: runs of every rung.
    """
    threshold = 100 * statistics.resolvable_change(noise_percent / 100, repeats)
    items = {
        f"{'+' if f.gain_percent > 0 else '-'} {f.chapter}": abs(f.gain_percent) for f in statistics.published_rungs()
    }
    told = sum(value > threshold for value in items.values())
    runs = "one run" if repeats == 1 else f"{repeats} runs"
    title = f"{told} of {len(items)} rungs above {threshold:.2f} %: {runs} each, noise {noise_percent:g} %"
    return panels.bars(items, title=title, unit="%", limit=max(items.values()))
