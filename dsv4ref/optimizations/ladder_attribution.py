"""What each switch of a ladder is worth, from the step times of sets of switches: in an order, left out, or shared.

A ladder turns switches on one by one and books the difference to the last one turned on. Where switches act on the same
time the booking depends on the order, and no order is the right one. Three views of the same measurements:

* `cumulative`: one order, as a ladder shows it; contributions add up to the total by construction;
* `leave_one_out`: what is lost when a switch is taken from the full set; they do not add up in general;
* `shapley`: the average over all orders that can be built; they add up, and depend on no order.

Some switches refine others and cannot be on without them. An order counts only if `Features` accepts every one of its
prefixes, so that each step of it could have been measured. Where everything can be combined, this is the classical
value.

Everything here is a pure function of times. A time may be a number or an array with one entry per round; all views are
linear in it.

Source: L. S. Shapley, "A value for n-person games" (1953); U. Faigle and W. Kern, "The Shapley value for cooperative
games under precedence constraints" (1992).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

from dsv4ref.optimizations.ladder_statistics import published_rungs
from dsv4ref.serving.features import Features

__all__ = [
    "Allowed",
    "Switches",
    "Times",
    "allowed_features",
    "cumulative",
    "feasible_subsets",
    "features_of",
    "ladder_order",
    "leave_one_out",
    "names_of",
    "prefixes",
    "reduced",
    "shapley",
    "source_order",
]

Switches: TypeAlias = frozenset[str]
"""The switches that are on."""

Times: TypeAlias = Mapping[Switches, Any]
"""Seconds per step of sets of switches: a number each, or an array over rounds each."""

Allowed: TypeAlias = Callable[[Switches], bool]
"""Whether a set of switches can be built."""

_MOST = 14  # switches whose subsets are enumerated: 16,384 of them


# --- switches of the engine ---


def names_of(features: Features) -> tuple[str, ...]:
    """The switches that are on, in the order of the fields."""
    return tuple(name for name, on in features.switches().items() if on)


def features_of(switches: Iterable[str]) -> Features:
    """The `Features` with these switches on, all others off.

    Raises:
        ValueError: a name that is no switch, or a switch without one that it refines.
    """
    wanted = set(switches)
    known = [item.name for item in fields(Features)]
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"switches: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    return Features(**{name: name in wanted for name in known})


def allowed_features(switches: Switches) -> bool:
    """Whether `Features` accepts the set: its own checks are the only list of what depends on what."""
    known = {item.name for item in fields(Features)}
    try:
        Features(**{name: name in switches for name in known})
    except ValueError:
        return False
    return switches <= known


# --- orders ---


def feasible_subsets(names: Sequence[str], allowed: Allowed = allowed_features) -> tuple[Switches, ...]:
    """Every set of these switches that can be built, smaller ones first.

    Raises:
        ValueError: more than 14 switches, a name twice, or the empty or the full set cannot be built.
    """
    _distinct(names)
    if len(names) > _MOST:
        raise ValueError(f"names: got {len(names)} switches, expected at most {_MOST}: their subsets are enumerated")
    sizes = range(len(names) + 1)
    found = tuple(s for n in sizes for s in map(frozenset, itertools.combinations(names, n)) if allowed(s))
    for needed in (frozenset[str](), frozenset(names)):
        if needed not in found:
            raise ValueError(f"names: {_said(needed)} cannot be built, expected both the empty and the full set to be")
    return found


def ladder_order(wanted: Sequence[str], allowed: Allowed = allowed_features) -> tuple[str, ...]:
    """The wanted order with what a switch needs brought before it, so that every prefix can be built.

    Args:
        wanted: every switch once.
        allowed: which sets can be built.

    Raises:
        ValueError: a name twice, or an order that nothing brought forward makes buildable.
    """
    _distinct(wanted)
    order: list[str] = []
    while len(order) < len(wanted):
        left = [name for name in wanted if name not in order]
        order += _next(frozenset(order), left, allowed)
    return tuple(order)


def _next(on: Switches, left: Sequence[str], allowed: Allowed) -> tuple[str, ...]:
    """The first switch that is left, behind the fewest others that it needs: breadth first over what can be built."""
    paths: list[tuple[str, ...]] = [()]
    seen = {on}
    for path in paths:
        reached = on.union(path)
        if allowed(reached | {left[0]}):
            return (*path, left[0])
        for name in left[1:]:
            if (wider := reached | {name}) not in seen and allowed(wider):
                seen.add(wider)
                paths.append((*path, name))
    raise ValueError(f"wanted: {left[0]} cannot be turned on after {_said(on)}, whatever is turned on before it")


def source_order(names: Sequence[str]) -> tuple[str, ...]:
    """The switches in the order of the source's ladder.

    First those that are no rung of it, in the order of the fields: parts that the source's baseline had from the start,
    or that other sources brought. Then those whose chapter is a rung, in the rungs' published order; what a rung needs
    comes before it.

    Args:
        names: switches, each once.
    """
    rungs = [figure.chapter for figure in published_rungs()]
    chapters = {item.name: item.metadata.get("chapter") for item in fields(Features)}
    place = {name: rungs.index(str(chapters[name])) if chapters[name] in rungs else -1 for name in names}
    known = [item.name for item in fields(Features) if item.name in names]
    return ladder_order(sorted(known, key=lambda name: place[name]))


def prefixes(order: Sequence[str], begin: str | None = None) -> tuple[Switches, ...]:
    """The rungs of an order: nothing on, or everything up to ``begin``, then one switch more each."""
    first = 0 if begin is None else 1 + order.index(begin)
    return tuple(frozenset(order[:count]) for count in range(first, len(order) + 1))


def reduced(names: Sequence[str], name: str, allowed: Allowed = allowed_features) -> Switches:
    """The largest set that can be built without a switch: it, and what only makes sense with it, left out.

    Raises:
        ValueError: no such switch, no set without it, or two largest ones.
    """
    if name not in names:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(names)}")
    others = [other for other in names if other != name]
    for size in range(len(others), -1, -1):
        largest = [found for found in map(frozenset, itertools.combinations(others, size)) if allowed(found)]
        if len(largest) == 1:
            return largest[0]
        if largest:
            raise ValueError(f"name: without {name} there are {len(largest)} largest sets, expected one")
    raise ValueError(f"name: no set without {name} can be built")


# --- contributions ---


def cumulative(times: Times, order: Sequence[str], begin: str | None = None) -> dict[str, Any]:
    """Time saved per step by each switch as it is turned on in this order; negative where it costs.

    Args:
        times: of every rung of the order.
        order: every switch once.
        begin: as `prefixes`; those that are on in the first rung have no contribution.

    Raises:
        ValueError: a name twice, or a prefix without a time.
    """
    _distinct(order)
    rungs = [_time(times, rung) for rung in prefixes(order, begin)]
    turned_on = order[len(order) + 1 - len(rungs) :]
    return {name: before - after for name, before, after in zip(turned_on, rungs, rungs[1:], strict=False)}


def leave_one_out(times: Times, names: Sequence[str], allowed: Allowed = allowed_features) -> dict[str, Any]:
    """Time lost per step when each switch is taken from the full set, together with what cannot be on without it.

    Raises:
        ValueError: a set without a time.
    """
    full = _time(times, frozenset(names))
    return {name: _time(times, reduced(names, name, allowed)) - full for name in names}


def shapley(times: Times, names: Sequence[str], allowed: Allowed = allowed_features) -> dict[str, Any]:
    """Time saved per step by each switch, averaged over all orders whose every prefix can be built.

    Exact: orders are counted through the subsets, not sampled. Contributions add up to ``times[none] - times[all]``; a
    switch that changes no time gets 0; two that may be exchanged get the same.

    Args:
        times: of every feasible subset of ``names``.
        names: the switches.
        allowed: which sets can be built.

    Raises:
        ValueError: a set without a time, or no order that can be built.
    """
    subsets = feasible_subsets(names, allowed)
    edges = [(s, s | {name}, name) for s in subsets for name in names if name not in s and s | {name} in set(subsets)]
    ways_to = dict.fromkeys(subsets, 0) | {frozenset[str](): 1}
    ways_on = dict.fromkeys(subsets, 0) | {frozenset(names): 1}
    for before, after, _ in edges:
        ways_to[after] += ways_to[before]
    for before, after, _ in reversed(edges):
        ways_on[before] += ways_on[after]
    orders = ways_on[frozenset()]
    if not orders:
        raise ValueError(f"names: no order of {', '.join(names)} can be built one switch at a time")
    shares: dict[str, Any] = dict.fromkeys(names, 0.0)
    for before, after, name in edges:
        weight = ways_to[before] * ways_on[after] / orders
        if weight:
            shares[name] = shares[name] + weight * (_time(times, before) - _time(times, after))
    return shares


def _time(times: Times, switches: Switches) -> Any:
    if switches not in times:
        raise ValueError(f"times: no time of {_said(switches)}, expected one; there are {len(times)}")
    return times[switches]


def _distinct(names: Sequence[str]) -> None:
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise ValueError(f"names: got {', '.join(doubled)} twice, expected every switch once")


def _said(switches: Switches) -> str:
    return "nothing" if not switches else " + ".join(sorted(switches))
