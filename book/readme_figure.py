#!/usr/bin/env python
"""Draw the README's figure, the gain of every measured chapter on one case, from the records that ship.

    python book/readme_figure.py [--check]

README-figure.svg carries its description as ``<desc>``, figures included, so that ``--check`` can tell without drawing
whether the records have moved on; another matplotlib may draw the same figure in other bytes.
"""

from __future__ import annotations

import argparse
import io
import sys
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dsv4ref.evidence import records
from dsv4ref.optimizations.report import report_rows
from dsv4ref.show import home, plots

FIGURE = Path(__file__).resolve().parents[1] / "README-figure.svg"


def figure() -> Figure:
    """The figure of the records that ship; its label is the description, with days and devices."""
    rows = home.one_case_each(report_rows(records.shipped()))
    # Drawn, but not described: a kernel that changes makes the record stale, not the figures in it wrong.
    changed = " (kernels have changed since)" if any(row["stale"] for row in rows) else ""
    fig = plots.predicted_vs_measured(rows, f"Speedup, as predicted and as measured{changed}")
    with plots.style():
        axes = fig.axes[0]
        axes.set_xscale("log")  # one large ratio must not press the others together
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.xaxis.set_minor_formatter(NullFormatter())
    runs = sorted({f"{row['device']} on {row['date'][:10]}" for row in rows})
    fig.set_label(f"{str(fig.get_label()).replace(changed, '')} Measured: {', '.join(runs)}.")
    return fig


def svg(fig: Figure) -> str:
    """The figure as a standalone SVG, described by its ``<title>`` and ``<desc>``."""
    drawn = io.BytesIO()
    with plots.style():
        fig.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    text = drawn.getvalue().decode("utf-8")
    start = text.index(">", text.index("<svg")) + 1
    return text[:start] + f"\n <title>Speedup per chapter</title>\n {_desc(fig)}" + text[start:]


def is_current(text: str) -> bool:
    """Whether an SVG shows what the records say now."""
    return _desc(figure()) in text


def _desc(fig: Figure) -> str:
    return f"<desc>{escape(str(fig.get_label()), quote=False)}</desc>"


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 done or current, 1 not current, 2 nothing to draw."""
    parser = argparse.ArgumentParser(description="Draw the README's figure from the shipped records.")
    parser.add_argument("--check", action="store_true", help="only say whether the figure is current")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            current = FIGURE.is_file() and is_current(FIGURE.read_text(encoding="utf-8"))
            print(f"{FIGURE.name}: {'current' if current else 'not what the records say; run make figure'}")
            return 0 if current else 1
        FIGURE.write_text(svg(figure()), encoding="utf-8")
    except ValueError as error:
        print(f"readme_figure: {error}", file=sys.stderr)
        return 2
    print(FIGURE.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
