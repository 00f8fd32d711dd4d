"""The book's generated tables as Markdown: rows in, text out, nothing read and nothing computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

HAZARD_FIELDS = frozenset({"name", "symptom", "cause", "source"})
NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> str:
    """A Markdown pipe table.

    Args:
        header: column titles.
        rows: cells; anything with a ``str``, pipes are escaped.
        empty: sentence to show instead when there are no rows.

    Returns:
        Markdown.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = []
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: got {len(row)} cells {list(row)}, expected {len(header)} for {list(header)}")
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    if not lines:
        return empty + "\n"
    head = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(head + lines) + "\n"


def hazard_table(
    hazards: Mapping[str, Mapping[str, str]], catalogue: Mapping[str, Any], documents: Mapping[str, str]
) -> str:
    """The hazards index: what went wrong upstream, and where the workbook plants it.

    Args:
        hazards: per id (``H01``) its name, symptom, cause and source.
        catalogue: per chapter id the optimisation, whose ``hazards`` values carry ``ids``.
        documents: per chapter id the document its notebook became; absent when the book has no such notebook.

    Returns:
        Markdown; every id is an anchor in lower case (``hazards.html#h01``).

    Raises:
        ValueError: an entry lacks a field, or a chapter plants a hazard the index does not know.
    """
    planted: dict[str, dict[str, str]] = {}  # per hazard the chapters that plant it, with the gate that catches it
    for ident, optimization in catalogue.items():
        link = _chapter(ident, optimization.number, documents)
        for name, hazard in optimization.hazards.items():
            for number in hazard.ids:
                if number not in hazards:
                    raise ValueError(f"{ident}: hazard {name!r} names {number!r}, which is not in hazards.toml")
                planted.setdefault(number, {})[link] = f"{optimization.number:02} {optimization.gate.name}"
    rows = []
    for number, hazard in hazards.items():
        if missing := HAZARD_FIELDS - hazard.keys():
            raise ValueError(f"hazards.toml: {number} lacks {sorted(missing)}")
        anchor = f"[{number}]{{#{number.lower()}}}"
        caught = planted.get(number, {})
        place, gates = ", ".join(caught) or "no chapter yet", ", ".join(caught.values()) or NONE
        seen = f"**{hazard['name']}**: {hazard['symptom']}"
        rows.append((anchor, seen, hazard["cause"], hazard["source"], place, gates))
    return table(("Hazard", "What you see", "Why", "Source", "Planted in", "Gate"), rows, "No hazards are listed.")


_FIGURES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "arch": ("Compiler target", lambda v: f"`{v}`"),
    "compute_units": ("CUs (SMs)", str),
    "xcds": ("Dies (XCDs), each with an L2 of its own", str),
    "simds_per_cu": ("SIMDs per CU (partitions per SM)", str),
    "wave_size": ("Lanes of a wave (warp)", str),
    "max_waves_per_simd": ("Waves per SIMD, at most", str),
    "register_file_bytes": ("Vector registers per CU", lambda v: _binary(v)),
    "lds_bytes": ("LDS (shared memory) per CU", lambda v: _binary(v)),
    "lds_bytes_per_workgroup": ("of which one workgroup may take", lambda v: _binary(v)),
    "l2_bytes": ("L2, all together", lambda v: _binary(v)),
    "mall_bytes": ("Infinity Cache", lambda v: _binary(v)),
    "hbm_bytes": ("Memory", lambda v: _binary(v)),
    "bandwidth_tb_s": ("Memory bandwidth", lambda v: f"{v:g} TB/s"),
    "matrix_shapes": ("Matrix instructions, M x N x K", lambda v: "; ".join(v)),
    "bf16_tflops": ("bf16, dense", lambda v: f"{v:,.1f} TFLOP/s"),
    "fp8_tflops": ("FP8, dense", lambda v: f"{v:,.1f} TFLOP/s"),
    "fp4_tflops": ("FP4, dense", lambda v: f"{v:,.1f} TFLOP/s"),
    "clock_mhz": ("Engine clock that these rates assume", lambda v: f"{v:,.0f} MHz"),
    "fp8_dialect": ("FP8 dialect of the matrix units", lambda v: f"`{v}`"),
}


def device_table(spec: Any) -> str:
    """The published figures of one device, each with its source.

    Args:
        spec: a ``dsv4ref.device.DeviceSpec``.

    Returns:
        Markdown; figures that nobody published are left out.
    """
    rows = [
        (label, text(value), spec.sources.get(name, NONE))
        for name, (label, text) in _FIGURES.items()
        if (value := getattr(spec, name)) is not None
    ]
    return table(("Figure", "Value", "Source"), rows, "Nothing is published.")


def device_comparison(specs: Sequence[Any]) -> str:
    """The published figures of several devices side by side, without sources."""
    rows = [
        (label, *(NONE if (value := getattr(spec, name)) is None else text(value) for spec in specs))
        for name, (label, text) in _FIGURES.items()
    ]
    return table(("Figure", *(spec.name for spec in specs)), rows, "No devices are known.")


def device_arithmetic(specs: Sequence[Any]) -> str:
    """What follows from the published figures by arithmetic: what a tile may use, and where the roofs meet.

    Raises:
        ValueError: a device does not publish what is needed.
    """
    needed = "compute_units simds_per_cu wave_size max_waves_per_simd register_file_bytes lds_bytes l2_bytes hbm_bytes"
    needed += " bandwidth_tb_s bf16_tflops fp8_tflops"
    for spec in specs:
        if absent := [name for name in needed.split() if getattr(spec, name) is None]:
            raise ValueError(f"{spec.key}: no published {', '.join(absent)}, expected all of {needed}")
    lines: Sequence[tuple[str, Callable[[Any], str]]] = (
        ("32-bit registers per lane of a SIMD", lambda s: f"{_lane_registers(s):g}"),
        ("the same with every wave slot taken", lambda s: f"{_lane_registers(s) / s.max_waves_per_simd:g}"),
        (
            "Waves on the whole device, at most",
            lambda s: f"{s.compute_units * s.simds_per_cu * s.max_waves_per_simd:,}",
        ),
        ("LDS of the whole device", lambda s: _binary(s.compute_units * s.lds_bytes)),
        ("Registers of the whole device", lambda s: _binary(s.compute_units * s.register_file_bytes)),
        ("Bytes per CU and microsecond from memory", lambda s: f"{s.bandwidth_tb_s * 1e6 / s.compute_units:,.0f}"),
        ("FLOP per byte where bf16 meets memory", lambda s: f"{s.bf16_tflops / s.bandwidth_tb_s:.0f}"),
        ("FLOP per byte where FP8 meets memory", lambda s: f"{s.fp8_tflops / s.bandwidth_tb_s:.0f}"),
        ("Reading the L2's size from memory", lambda s: f"{s.l2_bytes / s.bandwidth_tb_s / 1e6:.1f} µs"),
        ("Reading all of memory once", lambda s: f"{s.hbm_bytes / s.bandwidth_tb_s / 1e9:.0f} ms"),
    )
    rows = [(label, *(text(spec) for spec in specs)) for label, text in lines]
    return table(("Follows", *(spec.name for spec in specs)), rows, "No devices are known.")


def _lane_registers(spec: Any) -> float:
    return float(spec.register_file_bytes / (4 * spec.simds_per_cu * spec.wave_size))


def _binary(value: int) -> str:
    """Bytes in the largest unit that leaves at least one: ``160 KiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def settings_table(rows: Iterable[Mapping[str, str]]) -> str:
    """The environment variables, from ``dsv4ref.settings.rows()``."""
    cells = [
        (
            f"[`{row['name']}`]{{#{row['name'].lower()}}}",
            row["type"],
            f"`{row['default']}`",
            row["meaning"],
            row["owner"],
        )
        for row in rows
    ]
    return table(("Variable", "Takes", "Default", "Meaning", "Read by"), cells, "There are none.")


def scoreboard(rows: Iterable[Mapping[str, Any]], documents: Mapping[str, str]) -> str:
    """The scoreboard, one sortable table per device.

    Args:
        rows: rows of ``dsv4ref.optimizations.report.report_rows``: id, case, device, method, baseline_us, optimized_us,
            ratio, ratio_ci, noise_floor, resolvable, predicted, claimed, peers, gate, hazards, stale and date.
        documents: per chapter id its document, for links.

    Returns:
        Markdown with a rubric per device.
    """
    by_device: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_device.setdefault(row["device"], []).append(row)
    header = ("Chapter", "Case", "Claimed", "Predicted", "Measured [95 %]", "Noise", "µs, before", "µs, after",
              "Peers, µs", "Gate", "Bugs planted", "Method", "Recorded", "Stale")  # fmt: skip
    parts = []
    for device in sorted(by_device):
        cells = [
            (
                _chapter(row["id"], None, documents),
                row["case"],
                ", ".join(re.findall(r"[+-][\d.]+ %", row["claimed"] or "")) or NONE,  # of what, the claims' table says
                NONE if row["predicted"] is None else f"{row['predicted']:.2f}×",
                _ratio(row),
                f"±{100 * row['noise_floor']:.2g} %",
                _us(row["baseline_us"]),
                _us(row["optimized_us"]),
                ", ".join(f"{name} {_us(us)}" for name, us in row["peers"].items()) or NONE,
                row["gate"],
                row["hazards"],
                row["method"],
                row["date"][:10],
                "stale" if row["stale"] else "no",
            )
            for row in by_device[device]
        ]
        parts.append(f"```{{rubric}} {device}\n```\n\n{_sortable(table(header, cells, ''))}")
    return "\n".join(parts) or "No measurement ships with the workbook yet.\n"


def unmeasured_table(rows: Iterable[Mapping[str, Any]], devices: Sequence[str], documents: Mapping[str, str]) -> str:
    """The chapters without a record, each with what is predicted for one of its cases.

    Args:
        rows: ``id, case`` (None where there is nothing to time), ``gate, hazards`` and ``predicted`` (device -> ratio
            or None).
        devices: whose predictions to show.
        documents: per chapter id its document, for links.

    Returns:
        Markdown.
    """
    cells = []
    for row in rows:
        ratios = [row["predicted"].get(device) for device in devices]
        shown = [NONE if ratio is None else f"{ratio:.2f}×" for ratio in ratios]
        case = row["case"] or "nothing to time"
        cells.append((_chapter(row["id"], None, documents), case, *shown, row["gate"], row["hazards"]))
    header = ("Chapter", "Case", *(f"Predicted, {device}" for device in devices), "Gate", "Bugs planted")
    return _sortable(table(header, cells, "Every chapter has a record."))


def _sortable(markdown: str) -> str:
    return f":::{{div}} sortable\n\n{markdown}\n:::\n"


def claims_table(catalogue: Mapping[str, Any], documents: Mapping[str, str]) -> str:
    """The figures that the sources published, as they published them.

    Args:
        catalogue: per chapter id the optimisation; its ``claims`` have what, before, after, unit, device, source, note.
        documents: per chapter id its document, for links.

    Returns:
        Markdown.
    """
    cells = [
        (
            _chapter(ident, None, documents),
            f"{claim.what}{'; ' + claim.note if claim.note else ''}",
            f"{claim.before:g} → {claim.after:g} {claim.unit} ({claim.gain_percent:+.2f} %)",
            claim.device,
            claim.source,
        )
        for ident, optimization in catalogue.items()
        for claim in optimization.claims
    ]
    return table(("Chapter", "What", "Claimed", "Device", "Source"), cells, "No chapter quotes a published figure.")


def run_status(records: Iterable[Any], is_stale: Callable[[Any], bool], documents: Mapping[str, str]) -> str:
    """What ran where, when and with which versions: one row per run.

    Args:
        records: measurement records (``dsv4ref.evidence.records.Record``).
        is_stale: whether a measured source has changed since.
        documents: per chapter id its document, for links.

    Returns:
        Markdown, newest first.
    """
    runs: dict[str, list[Any]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    rows = []
    for lines in sorted(runs.values(), key=lambda lines: str(lines[0].date), reverse=True):
        one = lines[0]
        chapters = ", ".join(_chapter(ident, None, documents) for ident in sorted({line.chapter for line in lines}))
        versions = f"driver {one.driver or NONE}, torch {one.torch}, triton {one.triton}, Python {one.python}"
        changed = sum(map(is_stale, lines))
        state = f"{changed} of {len(lines)} stale" if changed else f"{len(lines)} current"
        commit = f"`{one.commit[:10]}`" if one.commit else NONE
        rows.append((str(one.date)[:10], one.device_name, versions, commit, chapters, state))
    header = ("Date", "Device", "Versions", "Commit", "Chapters", "Records")
    return table(header, rows, "No measurement ships with the workbook yet.")


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _chapter(ident: str, number: int | None, documents: Mapping[str, str]) -> str:
    label = ident if number is None else f"{number:02} {ident}"
    return f"[{label}](/{documents[ident]})" if ident in documents else label


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["ratio_ci"]
    digits = 2 if abs(row["ratio"] - 1) >= 0.1 else 3  # near 1 the third is what matters
    text = f"{row['ratio']:.{digits}f}× [{low:.{digits}f}, {high:.{digits}f}]"
    return text if row["resolvable"] else f"{text} not resolvable"
