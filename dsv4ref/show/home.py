"""The start page: every notebook in order, what it changes, how long it reads; and one measured case of each.

Read from the notebooks, the catalogue and the records, so that a chapter that is added stands here without an edit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat

from dsv4ref.evidence.records import HOST

__all__ = ["CASE", "contents", "one_case_each", "reading_minutes"]

CASE = "flash-256"
"""V4-Flash at 256 rows: in the middle of the sizes that are measured."""

WORDS_PER_MINUTE = 180
LINES_PER_MINUTE = 25
"""Prose with formulas, and code that is read rather than skimmed."""

_FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
_CHANGES = re.compile(r"^\| Optimisation \| (.+) \|$", re.MULTILINE)


def reading_minutes(path: Path) -> int:
    """Minutes that a notebook takes to read, from its words and its lines of code, in steps of five.

    Args:
        path: the notebook. Folded solutions and outputs are not counted.

    Raises:
        ValueError: no such notebook.
    """
    cells = _cells(path)
    prose = sum(len(re.findall(r"\w+", _FOLDED.sub("", c.source))) for c in cells if c.cell_type == "markdown")
    lines = sum(1 for c in cells if c.cell_type == "code" for line in c.source.splitlines() if line.strip())
    return 5 * max(1, math.ceil((prose / WORDS_PER_MINUTE + lines / LINES_PER_MINUTE) / 5 - 0.5))


def contents(rows: Iterable[Mapping[str, Any]], folder: Path = Path()) -> str:
    """The chapters as a table with links, part by part, as the book has them.

    Args:
        rows: ``number, title, part, gate, notebook, devices`` in order, as `catalogue.rows` gives them; rows without a
            gate are pages, not chapters.
        folder: where the notebooks are; links are relative to it.

    Returns:
        Markdown, of which JupyterLab and the book each make links between notebooks in their own way.
    """
    chapters = [row for row in rows if row["gate"] is not None]
    parts = list(dict.fromkeys(row["part"] for row in chapters))
    chapters.sort(key=lambda row: parts.index(row["part"]))  # a late number may belong to an early part
    lines = ["| | Chapter | What changes | Minutes | Recorded on |", "|---|---|---|---|---|"]
    for part, members in groupby(chapters, key=lambda row: row["part"]):
        lines.append(f"| | **Part {_cell(part)}** | | | |")
        for row in members:
            path = folder / row["notebook"]
            title, minutes, changes = _cell(row["title"]), "", ""
            if path.is_file():  # a chapter whose notebook is still being written is named all the same
                title, minutes = f"[{title}]({row['notebook']})", str(reading_minutes(path))
                found = _CHANGES.search(_cells(path)[0].source)
                changes = found[1] if found else ""
            recorded = ", ".join(row["devices"]) or "nothing yet"
            lines.append(f"| {row['number']:02d} | {title} | {changes} | {minutes} | {recorded} |")
    return "\n".join(lines)


def one_case_each(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row per chapter and device, of device time: its `CASE`, or the first measured one where there is none such.

    Args:
        rows: ``id, case, device, method``, as ``report_rows`` gives them.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: got none, expected at least one measured chapter; see dsv4ref report")
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != HOST:  # one figure, one clock
            groups.setdefault((row["id"], row["device"], row["method"]), []).append(row)
    return [next((row for row in group if row["case"] == CASE), group[0]) for group in groups.values()]


def _cells(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"path: no notebook {path}")
    return list(nbformat.read(path, as_version=4).cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
