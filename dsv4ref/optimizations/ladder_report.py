"""A ladder's report as it ships: read back, held against the sources that it stands on, and laid out in rows.

Records hold what every chapter's measurements hold, a time per variant. The rest of a ladder, its other orders, tails,
launches, metadata and soak, is in one JSON file per device and preset, ``data/ladders/<device>/<preset>.json``: the
``report.json`` of the run whose records these are.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4ref.evidence import records
from dsv4ref.optimizations.ladder_benchmark import CHAPTER, EVERYTHING_OFF, MEASURED_MODULES

__all__ = [
    "adopt",
    "begins_with_everything_off",
    "contribution_texts",
    "figures",
    "headlines",
    "is_stale",
    "read_report",
    "shipped_reports",
]

_PARTS = (
    "benchmark", "where", "complete", "rungs", "contributions", "inside", "captures", "traces", "metadata", "soak",
    "gates",
)  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """One report.

    Args:
        path: a ``report.json``.

    Raises:
        ValueError: it is no report of a ladder; names the file and what is missing.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected one JSON object ({error})") from error
    missing = [part for part in _PARTS if not isinstance(found, dict) or part not in found]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}, expected a ladder's report")
    return found


def shipped_reports() -> dict[tuple[str, str], dict[str, Any]]:
    """The reports that came with the package, by device and preset; none before the first one was recorded.

    Returns:
        Of each device the ladders that begin with everything off come first.

    Raises:
        ValueError: as `read_report`, or a report that lies under another device's or preset's name.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with importlib.resources.as_file(importlib.resources.files(records.PACKAGE) / "data" / "ladders") as folder:
        for path in sorted(folder.glob("*/*.json")) if folder.is_dir() else ():
            report = read_report(path)
            of = (report["where"]["device"], report["benchmark"]["name"])
            if of != (path.parent.name, path.stem):
                raise ValueError(f"{path}: it is of {' and '.join(of)}, expected {path.parent.name} and {path.stem}")
            found[of] = report
    return dict(sorted(found.items(), key=lambda item: (item[0][0], not begins_with_everything_off(item[1]))))


def adopt(out: Path, data: Path) -> None:
    """Put a run's records and report among those that ship, over the last ones of its preset and no others.

    Args:
        out: folder of a complete ``dsv4ref ladder`` on a GPU.
        data: the package's ``data``, or a folder laid out like it.

    Raises:
        ValueError: the run left no records, or no report of what they are of.
    """
    report = read_report(out / "report.json")
    device, preset = report["where"]["device"], report["benchmark"]["name"]
    found = list(records.read(out / "records" / device / f"{CHAPTER}.jsonl"))
    if not found or {record.case for record in found} != {preset}:
        raise ValueError(f"{out}: its records are not of {preset}, of which its report is")
    target = data / "records" / device / f"{CHAPTER}.jsonl"
    kept = [record for record in records.read(target) if record.case != preset] if target.exists() else []
    target.unlink(missing_ok=True)
    records.write(target, [*kept, *found])
    (data / "ladders" / device).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "report.json", data / "ladders" / device / f"{preset}.json")


def begins_with_everything_off(report: Mapping[str, Any]) -> bool:
    """Whether the first rung has no switch on; otherwise it is named for the switches that it has."""
    return bool(report["rungs"]["order"][0]["rung"] == EVERYTHING_OFF)


def is_stale(report: Mapping[str, Any]) -> bool:
    """True if a source that the report's rounds stand on has changed since, is gone or has been added."""
    return bool(report["where"]["sources"] != records.hash_sources(MEASURED_MODULES))


def figures(report: Mapping[str, Any], order: str = "order") -> list[dict[str, Any]]:
    """What a ladder has to say of every rung.

    Args:
        report: of `read_report`.
        order: "order", or "reverse" where the ladder ran it.

    Returns:
        Rows with rung, tok_s, tpot_ms, p99_ms, verdict, speedup and speedup_ci as in `rung_rows`; and of the first
        order launches, device_ms, host_ms and host_percent of a step, None where nobody looked.

    Raises:
        ValueError: the ladder did not run that order.
    """
    if order not in report["rungs"]:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(report['rungs'])}")
    inside = {row["rung"]: row for row in report["inside"]} if order == "order" else {}
    kept = ("rung", "gate", "tok_s", "tpot_ms", "p99_ms", "verdict", "speedup", "speedup_ci", "noise_floor", "rounds")
    looked = ("launches", "device_ms", "host_ms", "host_percent", "host_percent_ci", "engine_bytes", "step_bytes")
    return [
        {**{key: row[key] for key in kept}, **{key: inside.get(row["rung"], {}).get(key) for key in looked}}
        for row in report["rungs"][order]
    ]


def contribution_texts(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each switch saves, in percent of the first rung's step, under every view, as texts with intervals."""
    return [
        {
            key: value
            if isinstance(value, str)
            else f"{value['median']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
            for key, value in row.items()
        }
        for row in report["contributions"] or ()
    ]


def headlines(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that a ladder is run for, each with what it should be.

    Args:
        report: of `read_report`, complete.

    Returns:
        Rows with figure, value and bar.
    """
    rows = figures(report)
    off, on = rows[0], rows[-1]
    eager = next((row for row, after in itertools.pairwise(rows) if after["rung"] == "+ captured_steps"), None)
    first = off["rung"]
    found = [(f"everything on against {first}", _ratio(on), "stated with its interval")]
    if eager is not None and eager is not off:
        found.append((f"the last eager rung against {first}", _ratio(eager), "stated with its interval"))
    found.append((f"A/A noise floor, {first}", f"{100 * off['noise_floor']:.3f} %", "at most 0.3 %"))
    found.append(("A/A noise floor, everything on", f"{100 * on['noise_floor']:.3f} %", "at most 0.3 %"))
    if on["host_percent"] is not None:
        share = f"{on['host_percent']:.2f} %"
        if on["host_percent_ci"] is not None:
            share += " [{:.2f}, {:.2f}]".format(*on["host_percent_ci"])
        found.append(("host share of a replayed step", share, "below 5 %"))
    for row in report["metadata"]:
        if row["step"] == "steady":
            about = f"metadata of a steady step, {row['batch']} rows: launches"
            found.append((about, f"{row['launches']} in {row['host_us']:.1f} us of the host", "0"))
    if (soak := report["soak"]) is not None:
        about = f"growth of an empty engine, steps {soak['mark']} to {soak['steps']}"
        found.append((about, f"{soak['growth']} bytes, {soak['lost']} blocks lost", "0"))
    return [dict(zip(("figure", "value", "bar"), texts, strict=True)) for texts in found]


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["speedup_ci"]
    return f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
