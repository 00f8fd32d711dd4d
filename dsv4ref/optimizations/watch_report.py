"""What the shipped profiles and sanitizer runs of a chapter say: the rows and sentences that its page shows.

Nothing here runs a tool (`watch` does). A variant may launch several kernels; what limits it is read from its longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from dsv4ref.evidence import profiles, records, sanitizer
from dsv4ref.evidence.profiles import Profile
from dsv4ref.evidence.sanitizer import Inspection
from dsv4ref.optimizations.base import Optimization

__all__ = [
    "FACTORS", "LIMITS", "SANITIZED", "beside", "factor_rows", "factors_said", "limit_rows", "profiled", "sanitized",
]  # fmt: skip

LIMITS = ("case", "device", "variant", "kernel", "us", "launches", "what limits it")
"""Columns of `limit_rows`."""
FACTORS = ("case", "device", "from", "to", "time", "instructions", "cycles between them", "tensor pipe busy, us")
"""Columns of `factor_rows`."""
SANITIZED = ("case", "device", "tool", "errors", "warnings", "reported", "of the planted error")
"""Columns of `sanitized`'s rows."""

_Found: TypeAlias = Mapping[tuple[str, str, str], Sequence[Profile]]

_QUANTITIES: Mapping[str, str] = {
    "time, us": "us",
    "registers per thread": "registers",
    "warps that an SM holds": "warps_per_sm",
    "shared memory of a workgroup, bytes": "shared_bytes",
    "requests of spilled registers": "spill_requests",
    "tensor pipe, %": "tensor_percent",
    "issue slots busy, %": "issue_percent",
    "device memory, %": "dram_percent",
    "L2, %": "l2_percent",
    "L2 hits, %": "l2_hit_percent",
    "L1 and shared memory, %": "l1_percent",
    "shared stores: bank conflicts": "store_conflicts",
    "their share of the wavefronts, %": "conflict_percent",
    "cycles a warp takes per instruction": "cycles_per_instruction",
}


def profiled(opt: Optimization) -> tuple[str, _Found]:
    """The newest profiles of a chapter that ship.

    Returns:
        A sentence that says where they come from, and the launches by case, device and variant.
    """
    kept = [one for one in profiles.latest(profiles.shipped()) if one.chapter == opt.id]
    found: dict[tuple[str, str, str], list[Profile]] = {}
    for one in kept:
        found.setdefault((one.case, one.device, one.variant), []).append(one)
    return _said(kept, "profile"), found


def sanitized(opt: Optimization) -> tuple[str, list[dict[str, Any]]]:
    """The newest word of each sanitizer on each of a chapter's cases that ships.

    Returns:
        A sentence that says where they come from, and rows with the columns of `SANITIZED`.
    """
    kept = [one for one in sanitizer.latest(sanitizer.shipped()) if one.chapter == opt.id]
    rows = []
    for one in kept:
        reported = [f"{place}: {count}" for place, count in one.findings.items()]
        values = (one.case, one.device, one.tool, one.errors, one.warnings, reported, one.control)
        rows.append(dict(zip(SANITIZED, values, strict=True)))
    return _said(kept, "sanitizer run"), rows


def longest(launches: Iterable[Profile]) -> Profile:
    """The launch that takes the most time."""
    return max(launches, key=lambda one: one.us)


def limit_rows(found: _Found) -> list[dict[str, Any]]:
    """What limits each variant on each case: rows with the columns of `LIMITS`, of the longest launch.

    Args:
        found: as `profiled` returns it; "us" adds up all launches of a variant.
    """
    rows = []
    for (case, device, variant), launches in found.items():
        main = longest(launches)
        values = (case, device, variant, main.kernel, sum(one.us for one in launches), len(launches), main.limit)
        rows.append(dict(zip(LIMITS, values, strict=True)))
    return rows


def beside(found: _Found, case: str, device: str, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Counters of one case, a row per quantity and a column per variant, of each variant's longest launch.

    Args:
        found: as `profiled` returns it.
        case, device: by name.
        variants: which, in order; those that were not profiled are left out.

    Returns:
        Rows with the columns "counted" and the variants' names; none where no variant was profiled.
    """
    mains = {name: longest(found[case, device, name]) for name in variants if (case, device, name) in found}
    if not mains:
        return []
    rows: list[dict[str, Any]] = [
        {"counted": what, **{name: getattr(main, field) for name, main in mains.items()}}
        for what, field in _QUANTITIES.items()
    ]
    for place in range(3):
        waits = {name: "{} {:.0f} %".format(*main.waits(3)[place]) for name, main in mains.items()}
        rows.append({"counted": f"of them waiting, {('most', 'second', 'third')[place]}", **waits})
    return rows


def factor_rows(found: _Found, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Ratios of two variants' times as a product: fewer instructions times fewer cycles between them.

    A scheduler issues at most one instruction per cycle, so its share of busy issue slots times the launch's time is
    the time that the instructions alone would take. The ratio of these is "instructions", the inverse ratio of the
    shares "cycles between them", and their product "time": exactly, because all three come from two counters.

    Args:
        found: as `profiled` returns it.
        pairs: variants, from and to; a pair that was not profiled on a case has no row there.

    Returns:
        Rows with the columns of `FACTORS`: ratios to / from, below 1 where "to" is better, and the time that the
        tensor pipe is busy in either.
    """
    rows = []
    pairs = tuple(pairs)
    for case, device in dict.fromkeys((case, device) for case, device, _ in found):
        for before, after in pairs:
            keys = ((case, device, before), (case, device, after))
            if any(key not in found for key in keys):
                continue
            a, b = (longest(found[key]) for key in keys)
            if not a.issue_percent or not b.issue_percent:
                continue
            ratio = b.us / a.us
            stretch = a.issue_percent / b.issue_percent
            tensor = tuple(one.us * one.tensor_percent / 100 for one in (a, b))
            busy = f"{tensor[0]:.0f} → {tensor[1]:.0f}"
            values = (case, device, before, after, ratio, ratio / stretch, stretch, busy)
            rows.append(dict(zip(FACTORS, values, strict=True)))
    return rows


def factors_said(rows: Iterable[Mapping[str, Any]]) -> str:
    """What rows of `factor_rows` come to, a line each; says so where there is none."""
    said = []
    for row in rows:
        factors = {what: row[what] for what in ("instructions", "cycles between them")}
        helped = [f"{what} x {factor:.2f}" for what, factor in sorted(factors.items(), key=lambda item: item[1])]
        who = f"{row['case']}, {row['device']}: from {row['from']} to {row['to']}"
        said.append(f"{who}: time x {row['time']:.2f} = {' and '.join(helped)}")
    return "\n".join(said) or "no two variants were profiled on the same case"


def _said(kept: Sequence[Profile] | Sequence[Inspection], what: str) -> str:
    if not kept:
        return f"no {what} ships with this chapter yet"
    described = sorted({f"{one.device_name}, {one.date[:10]}, tool {one.tool_version}" for one in kept})
    stale = ", STALE: the sources have changed since" if any(records.is_stale(one) for one in kept) else ""
    return f"{what}s from {'; '.join(described)}{stale}"
