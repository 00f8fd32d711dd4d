"""Chapter 18's records of Hopper's own kernel, beside the portable one and FlashMLA in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from dsv4ref.evidence.records import Record
from dsv4ref.optimizations.base import Optimization

__all__ = ["COLUMNS", "PEER_GOAL", "hopper_rows", "summary"]

PEER_GOAL = 0.6
"""FlashMLA's time over this kernel's that was aimed at, as a geometric mean over the production cases."""

COLUMNS = (
    "case",
    "device",
    "portable, us",
    "gluon, us",
    "FlashMLA, us",
    "portable / gluon",
    "FlashMLA / gluon",
)

_PORTABLE, _HOPPER, _PEER = "optimized", "gluon", "peer: FlashMLA"


def hopper_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Times of the two partial kernels and of FlashMLA, of every case that has the first two.

    Args:
        opt: chapter 18.
        measured: its records.

    Returns:
        Rows with the columns of `COLUMNS`; FlashMLA's are None where it does not take the case.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    for record in measured:
        if record.chapter == opt.id:
            times.setdefault((record.case, record.device), {})[record.variant] = record.p50_us
    rows = []
    for (case, device), found in times.items():
        if _PORTABLE not in found or _HOPPER not in found:
            continue
        portable, hopper, peer = found[_PORTABLE], found[_HOPPER], found.get(_PEER)
        ratios = (portable / hopper, None if peer is None else peer / hopper)
        rows.append(dict(zip(COLUMNS, (case, device, portable, hopper, peer, *ratios), strict=True)))
    return rows


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """What rows of `hopper_rows` come to, per device; says so where there is none."""
    rows, lines = list(rows), []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        gain = statistics.geometric_mean(row["portable / gluon"] for row in here)
        slower = [row["case"] for row in here if row["portable / gluon"] < 1]
        lines.append(f"{device}: portable / gluon, geometric mean {gain:.2f} over {len(here)} cases")
        lines.append(f"  portable faster: {', '.join(slower) or 'nowhere'}")
        peers = [row["FlashMLA / gluon"] for row in here if row["FlashMLA / gluon"] is not None]
        if peers:
            mean = statistics.geometric_mean(peers)
            span = f"{min(peers):.2f} to {max(peers):.2f}"
            lines.append(
                f"  FlashMLA / gluon: geometric mean {mean:.2f} over {len(peers)} cases, {span}; aimed at {PEER_GOAL}"
            )
            behind = [
                row["case"] for row in here if row["FlashMLA / gluon"] is not None and row["FlashMLA / gluon"] < 1
            ]
            lines.append(f"  FlashMLA faster: {', '.join(behind) or 'nowhere'}")
    return "\n".join(lines) or "no record of this kernel ships"
