"""The scoreboard: what was claimed, predicted and measured, from records only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsv4ref.evidence import records
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Optimization

__all__ = ["PEER_PREFIX", "report_rows"]

PEER_PREFIX = "peer: "
"""Variants whose name begins so are third parties' kernels, timed in the same run."""


def report_rows(measured: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per chapter, case, device and method with records: the newest run's figures, prediction and claim.

    Args:
        measured: records, any order.

    Returns:
        Rows with id, case, device, method, baseline_us, optimized_us, ratio, ratio_ci, noise_floor, predicted, claimed,
        peers, gate, stale; then hazards (how many bugs the chapter plants), variants (other variants' microseconds),
        bound_us, date, resolvable; tok_s and tpot_ms, each of (baseline, optimised), None but for the ladder's decode
        steps, whose cases state their ``tokens``. Times are p50 microseconds, the host's where method is
        `records.HOST`, which nobody predicts; ratio is baseline over optimised; claimed is text, since published gains
        are of whole systems.
    """
    chapters = catalogue.load()
    groups: dict[tuple[str, str, str, str], dict[str, Record]] = {}
    for record in records.latest(measured):
        key = (record.chapter, record.case, record.device, record.method)
        groups.setdefault(key, {})[record.variant] = record
    rows = []
    for (chapter, case, device, method), variants in groups.items():
        opt = chapters.get(chapter)
        if opt is None or case not in opt.cases or "baseline" not in variants or "optimized" not in variants:
            continue
        rows.append(_row(opt, case, device, method, variants))
    order = {id: index for index, id in enumerate(chapters)}
    cases = {(id, name): index for id, opt in chapters.items() for index, name in enumerate(opt.cases)}
    return sorted(rows, key=lambda row: (order[row["id"]], row["device"], cases[row["id"], row["case"]]))


def _row(opt: Optimization, case: str, device: str, method: str, variants: dict[str, Record]) -> dict[str, Any]:
    baseline, optimized = variants["baseline"], variants["optimized"]
    others = {n: r.p50_us for n, r in variants.items() if n not in ("baseline", "optimized")}
    low, high, floor = optimized.ratio_low, optimized.ratio_high, optimized.noise_floor
    assert low is not None
    assert high is not None
    assert floor is not None
    # Other chapters' cases have tokens too, and their times are not a step's.
    steps = opt.recorded_by == "ladder"
    times = (baseline.p50_us, optimized.p50_us)
    return {
        "id": opt.id,
        "case": case,
        "device": device,
        "method": method,
        "baseline_us": baseline.p50_us,
        "optimized_us": optimized.p50_us,
        "ratio": optimized.ratio,
        "ratio_ci": [low, high],
        "noise_floor": floor,
        "predicted": None if method == records.HOST else opt.predict(opt.cases[case], device).ratio,
        "claimed": "; ".join(f"{c.gain_percent:+.2f} % {c.unit.removeprefix('% ')}, {c.device}" for c in opt.claims)
        or None,
        "peers": {n.removeprefix(PEER_PREFIX): us for n, us in others.items() if n.startswith(PEER_PREFIX)},
        "gate": optimized.gate,
        "stale": records.is_stale(optimized),
        "hazards": len(opt.hazards),
        "variants": {n: us for n, us in others.items() if not n.startswith(PEER_PREFIX)},
        "bound_us": optimized.bound_us,
        "date": optimized.date,
        "resolvable": low > 1 + floor or high < 1 - floor,
        "tok_s": [1e6 * opt.cases[case].params["tokens"] / us for us in times] if steps else None,
        "tpot_ms": [us / 1e3 for us in times] if steps else None,
    }
