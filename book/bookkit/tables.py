"""The book's generated tables as Markdown: rows in, text out, nothing read and nothing computed."""

from __future__ import annotations

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
    planted: dict[str, list[str]] = {}
    for ident, optimization in catalogue.items():
        link = _chapter(ident, optimization.number, documents)
        for name, hazard in optimization.hazards.items():
            for number in hazard.ids:
                if number not in hazards:
                    raise ValueError(f"{ident}: hazard {name!r} names {number!r}, which is not in hazards.toml")
                planted.setdefault(number, [])
                if link not in planted[number]:
                    planted[number].append(link)
    rows = []
    for number, hazard in hazards.items():
        if missing := HAZARD_FIELDS - hazard.keys():
            raise ValueError(f"hazards.toml: {number} lacks {sorted(missing)}")
        anchor = f"[{number}]{{#{number.lower()}}}"
        place = ", ".join(planted.get(number, [])) or NONE
        rows.append((anchor, f"**{hazard['name']}**: {hazard['symptom']}", hazard["cause"], hazard["source"], place))
    return table(("", "What you see", "Why", "Source", "Planted in"), rows, "No hazards are listed.")


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
    """The scoreboard, one table per device.

    Args:
        rows: rows of ``dsv4ref.optimizations.report.report_rows``: id, case, device, method, baseline_us, optimized_us,
            ratio, ratio_ci, resolvable, predicted, peers, gate, stale and date.
        documents: per chapter id its document, for links.

    Returns:
        Markdown with a rubric per device.
    """
    by_device: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_device.setdefault(row["device"], []).append(row)
    header = ("Chapter, case", "µs", "Ratio", "Predicted", "Peers, µs", "Gate", "Method", "Record")
    parts = []
    for device in sorted(by_device):
        cells = [
            (
                f"{_chapter(row['id'], None, documents)} {row['case']}",
                f"{_us(row['baseline_us'])} → {_us(row['optimized_us'])}",
                _ratio(row),
                NONE if row["predicted"] is None else f"{row['predicted']:.2f}×",
                ", ".join(f"{name} {_us(us)}" for name, us in row["peers"].items()) or NONE,
                row["gate"],
                row["method"],
                f"{row['date'][:10]}{', stale' if row['stale'] else ''}",
            )
            for row in by_device[device]
        ]
        parts.append(f"```{{rubric}} {device}\n```\n\n" + table(header, cells, ""))
    return "\n".join(parts) or "No measurement ships with the workbook yet.\n"


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
    text = f"{row['ratio']:.2f}× [{low:.2f}, {high:.2f}]"
    return text if row["resolvable"] else f"{text} not resolvable"
