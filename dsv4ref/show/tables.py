"""Tables: in a notebook (HTML with a plain-text twin), in the terminal (rich) and as one scoreboard page.

Rows are plain mappings, as `dsv4ref --json` prints them; the column tuples `GATES`, `HAZARDS`, `ISA` and `SCOREBOARD`
say which keys a table reads and how they look, and serve all three renderings. Every text is escaped. A verdict is a
word before it is a colour. ``None`` means "not known" and shows as a dash; a missing key is an error, not a dash.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from string import Template
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from dsv4ref.evidence.records import HOST
from dsv4ref.show import Html

Row = Mapping[str, Any]
UNKNOWN = "–"
_PILL = "color:#fff;font-weight:bold;white-space:nowrap;padding:0 0.45em;border-radius:0.3em"
_CAPTION = "caption-side:top;text-align:left;white-space:nowrap;color:inherit"
GOOD, BAD = "#2e8540", "#c2542d"  # white letters on these have 4.5:1, whatever the page's own ground is
QUIET = "#767676"


@dataclass(frozen=True)
class Column:
    """One column: the row's key, and how its value reads.

    Args:
        key: the key in every row.
        title: the heading; the key itself when left out.
        words: what a true and a false value are called. Such a column is a verdict: it takes a bool, a word or None,
            and a value equal to one of the two words counts as that verdict.
        text: the whole row to the cell's text, where one value is not enough; sorting still goes by ``row[key]``.
        left: keep numbers on the left (ids and labels that happen to be numbers).
    """

    key: str
    title: str = ""
    words: tuple[str, str] | None = None
    text: Callable[[Row], str] | None = None
    left: bool = False

    @property
    def heading(self) -> str:
        return self.title or self.key


@dataclass(frozen=True)
class _Cell:
    text: str
    sort: str  # what the scoreboard page sorts by: a number where there is one, "" for unknown
    verdict: bool | None = None


def number(value: Any) -> str:
    """A value as a table shows it: 4 significant digits, thousands separated, a dash for None.

    Args:
        value: number, bool, text, None, or a sequence or mapping of these.
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        return _real(float(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number(item)}" for key, item in value.items()) or UNKNOWN
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        separator = "; " if any("," in item for item in items if isinstance(item, str)) else ", "
        return separator.join(number(item) for item in items) or UNKNOWN
    return str(value)


def _real(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[Row], columns: Sequence[Column | str], caption: str = "") -> Html:
    """Lay out rows as a table for a notebook.

    Args:
        rows: mappings; every one has every column's key.
        columns: what to show, in order; a text stands for `Column(text)`.
        caption: one line above the table.

    Returns:
        `Html` whose plain text is the same table with aligned columns.

    Raises:
        ValueError: no columns, or a row without a column's key.
    """
    layout = _columns(columns)
    cells = _cells(rows, layout)
    right = _right(rows, layout)
    head = "".join(
        f'<th scope="col" style="{_align(r)}">{_esc(c.heading)}</th>' for c, r in zip(layout, right, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{_align(r, c.text)}">{_inline(c)}</td>' for c, r in zip(line, right, strict=True))
        + "</tr>"
        for line in cells
    )
    if not rows:
        body = f'<tr><td colspan="{len(layout)}" style="text-align:left">no rows</td></tr>'
    top = f'<caption style="{_CAPTION}">{_esc(caption)}</caption>' if caption else ""
    page = (
        # Pages that restyle unknown HTML in dark mode leave pandas' class alone, and theme it.
        # A wide table scrolls, and without a place in the tab order only a mouse could scroll it.
        f'<div style="overflow-x:auto" tabindex="0" role="group" aria-label="{_esc(caption or "table")}">'
        '<table class="dataframe dsv4-table" style="margin-left:0">'
        f"{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return Html(page, _plain(layout, cells, right, caption))


def rich_table(rows: Sequence[Row], columns: Sequence[Column | str], caption: str = "") -> RichTable:
    """The same table for the terminal; markup in the data is not interpreted.

    Args, raises: as `table`.

    Returns:
        a rich renderable.
    """
    layout = _columns(columns)
    out = RichTable(title=Text(caption) if caption else None, title_justify="left")
    for column, right in zip(layout, _right(rows, layout), strict=True):
        out.add_column(Text(column.heading), justify="right" if right else "left", overflow="fold")
    for line in _cells(rows, layout):
        styles = {None: "", True: "green", False: "bold red"}
        out.add_row(*(Text(cell.text, style=styles[cell.verdict]) for cell in line))
    return out


def gate_table(rows: Sequence[Row], caption: str = "Gates") -> Html:
    """What `dsv4ref verify` found. Rows: ``id, case, gate, passed, detail``."""
    return table(rows, GATES, caption)


def hazard_table(rows: Sequence[Row], caption: str = "Planted bugs") -> Html:
    """What `dsv4ref hazards` found. Rows: ``id, hazard, caught, detail``."""
    return table(rows, HAZARDS, caption)


def isa_table(rows: Sequence[Row], caption: str = "Cross-compiled, no GPU needed") -> Html:
    """What `dsv4ref isa` found.

    Args:
        rows: ``kernel, arch, shape, vgpr, agpr, sgpr, vgpr_spills, lds`` (bytes), ``waves_per_simd, mfma``.
        caption: one line above the table.
    """
    return table(rows, ISA, caption)


def scoreboard(rows: Sequence[Row], caption: str = "Scoreboard: ratio = baseline / optimised") -> Html:
    """What `dsv4ref report` found.

    Args:
        rows: ``id, case, device, claimed, predicted, ratio, ratio_ci, noise_floor, baseline_us, optimized_us, peers,
            gate, stale``; ratios as numbers, ``claimed`` as a number or published figures as texts, ``ratio_ci`` as
            (low, high), ``noise_floor`` as a fraction (an interval within 1 +- 0.01 is not resolvable at 0.01),
            ``gate`` as a bool or "passed", times in us.
        caption: one line above the table.
    """
    return table(rows, scoreboard_columns(rows), caption)


def scoreboard_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """`SCOREBOARD`, with peers and rates only where a row has some, planted bugs where every row counts them, and the
    method of every row where one of them is of the host's time.
    """
    shown = [column for column in SCOREBOARD if column.key != "peers" or any(row.get("peers") for row in rows)]
    if any(row.get("tok_s") for row in rows):
        shown.insert([column.key for column in shown].index("optimized_us") + 1, _RATES)
    if any(row.get("method") == HOST for row in rows):
        shown.insert([column.key for column in shown].index("device") + 1, Column("method"))
    if rows and all("hazards" in row for row in rows):
        shown.insert([column.key for column in shown].index("gate") + 1, Column("hazards", "bugs planted"))
    return tuple(shown)


def device_card(facts: Mapping[str, Any], caption: str = "This machine", note: str = "") -> Html:
    """A card of facts about a device, one per line.

    Args:
        facts: name to value, in the order to show.
        caption: heading of the card.
        note: one sentence below, such as what cannot run here and why.
    """
    lines = "".join(
        f'<tr><th scope="row" style="text-align:left">{_esc(key)}</th>'
        f'<td style="text-align:left">{_esc(number(value))}</td></tr>'
        for key, value in facts.items()
    )
    below = f'<p style="margin:0.25em 0 0 0">{_esc(note)}</p>' if note else ""
    page = (
        '<div class="dsv4-card" style="border:1px solid #76767680;border-radius:6px;padding:0.5em 1em;'
        'display:inline-block;max-width:100%;overflow-x:auto">'
        f'<table class="dataframe" style="margin:0;min-width:14em"><caption style="{_CAPTION};font-weight:bold">'
        f"{_esc(caption)}</caption><tbody>{lines}</tbody></table>{below}</div>"
    )
    width = max((len(key) for key in facts), default=0)
    text = [
        caption,
        *(f"  {key.ljust(width)}  {number(value)}" for key, value in facts.items()),
        *([note] if note else []),
    ]
    return Html(page, "\n".join(text))


def scoreboard_html(rows: Sequence[Row], title: str = "dsv4ref scoreboard", note: str = "") -> str:
    """The scoreboard as one HTML file: sortable, filterable, light and dark, no outside URL.

    Args:
        rows: as for `scoreboard`.
        title: heading and title of the page.
        note: one sentence under the heading, such as where the records come from.

    Returns:
        a complete HTML document.

    Raises:
        ValueError: as `table`.
    """
    layout = scoreboard_columns(rows)
    right = _right(rows, layout)
    head = "".join(
        f'<th scope="col" aria-sort="none" class="{"r" if r else "l"}">'
        f'<button type="button">{_esc(c.heading)}</button></th>'
        for c, r in zip(layout, right, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{"r" if r else "l"}" data-sort="{_esc(cell.sort)}">{_classed(cell)}</td>'
            for cell, r in zip(line, right, strict=True)
        )
        + "</tr>"
        for line in _cells(rows, layout)
    )
    return _PAGE.substitute(
        title=_esc(title),
        note=f"<p>{_esc(note)}</p>" if note else "",
        head=head,
        body=body or f'<tr><td colspan="{len(layout)}">no records</td></tr>',
        count=len(rows),
        pill=_PILL,
        good=GOOD,
        bad=BAD,
        quiet=QUIET,
    )


def _columns(columns: Sequence[Column | str]) -> tuple[Column, ...]:
    if isinstance(columns, str) or not columns:
        raise ValueError(f"columns: got {columns!r}, expected at least one Column or key")
    return tuple(Column(column) if isinstance(column, str) else column for column in columns)


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[_Cell]]:
    for position, row in enumerate(rows):
        missing = [column.key for column in columns if column.key not in row]
        if missing:
            raise ValueError(f"rows[{position}]: no {', '.join(missing)}; it has {', '.join(map(str, row))}")
    return [[_cell(row, column) for column in columns] for row in rows]


def _cell(row: Row, column: Column) -> _Cell:
    value = row[column.key]
    verdict = _verdict(value, column)
    if column.text is not None:
        text = column.text(row)
    elif column.words is not None and verdict is not None:
        text = ("✓ " if verdict else "✗ ") + column.words[0 if verdict else 1]
    else:
        text = number(value)
    if value is None or text == UNKNOWN:
        sort = ""
    elif isinstance(value, Real):
        sort = repr(float(value))
    else:
        sort = text
    return _Cell(text, sort, verdict)


def _verdict(value: Any, column: Column) -> bool | None:
    if column.words is None or value is None:
        return None
    if isinstance(value, str):
        return {column.words[0]: True, column.words[1]: False}.get(value)
    if isinstance(value, bool):
        return value
    raise ValueError(f"{column.key}: got {value!r}, expected a bool, a word or None")


def _right(rows: Sequence[Row], columns: Sequence[Column]) -> list[bool]:
    """A column is set to the right when it holds numbers and nothing else."""

    def numeric(column: Column) -> bool:
        values = [row[column.key] for row in rows if row.get(column.key) is not None]
        return bool(values) and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)

    return [not column.left and numeric(column) for column in columns]


def _esc(value: object) -> str:
    return html.escape(str(value), quote=True)


_LONGEST_NAME = 24


def _align(right: bool, text: str = "") -> str:
    # A name such as flash-1024 would break at its hyphen; long ones may, so that a table still fits its page.
    whole = right or (0 < len(text) <= _LONGEST_NAME and " " not in text)
    return f"padding:0.2em 0.7em;text-align:{'right' if right else 'left'}{';white-space:nowrap' if whole else ''}"


def _inline(cell: _Cell) -> str:
    if cell.verdict is None:
        return _esc(cell.text)
    colour = GOOD if cell.verdict else BAD
    return f'<span style="{_PILL};background:{colour}">{_esc(cell.text)}</span>'


def _classed(cell: _Cell) -> str:
    if cell.verdict is None:
        return _esc(cell.text)
    return f'<span class="{"good" if cell.verdict else "bad"}">{_esc(cell.text)}</span>'


def _plain(columns: Sequence[Column], cells: list[list[_Cell]], right: list[bool], caption: str) -> str:
    grid = [[column.heading for column in columns], *([cell.text for cell in line] for line in cells)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    grid.insert(1, ["-" * width for width in widths])

    def line(texts: list[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(
        [*([caption] if caption else []), *(line(texts) for texts in grid), *([] if cells else ["no rows"])]
    )


def _times(value: Any) -> str:
    return f"{_ratio(value)}×" if isinstance(value, Real) else number(value)


def _ratio(value: Any) -> str:
    return f"{float(value):.{2 if abs(value - 1) >= 0.1 else 3}f}"  # near 1 the third digit is what matters


def _measured(row: Row) -> str:
    """Ratio with its interval. A ratio that does not clear the noise floor keeps its number and gets the sentence."""
    ratio = row["ratio"]
    if ratio is None:
        return "not measured"
    low, high = row["ratio_ci"] or (ratio, ratio)
    text = _times(ratio) + (f" [{_ratio(low)}, {_ratio(high)}]" if row["ratio_ci"] else "")
    floor = row["noise_floor"] or 0.0
    # The rule of evidence.timing: the whole interval has to lie outside 1 +- the floor.
    return text if low > 1 + floor or high < 1 - floor else f"{text} not resolvable"


def _floor(row: Row) -> str:
    return UNKNOWN if row["noise_floor"] is None else f"±{100 * row['noise_floor']:.2g} %"


def interval(value: Any) -> str:
    """Median and 95 % interval of something with ``median``, ``low`` and ``high``, in percent; a dash for None."""
    return UNKNOWN if value is None else f"{value.median:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def _change(values: Any) -> str:
    return UNKNOWN if values is None else " → ".join(number(value) for value in values)


_RATES = Column("tok_s", "output tok/s", text=lambda row: _change(row.get("tok_s")))

LADDER = (
    Column("order"),
    Column("rung"),
    Column("gate"),
    Column("tok_s", "output tok/s"),
    Column("tpot_ms", "mean step, ms"),
    Column("p99_ms", "p99, ms"),
    Column("verdict", "change of speed, 95 %"),
    Column("rounds"),
    Column("note"),
)
RUNGS = (
    Column("rung"),
    Column("tok_s", "output tok/s"),
    Column("tpot_ms", "mean TPOT, ms"),
    Column("p99_ms", "p99, ms"),
    Column("launches"),
    Column("host_ms", "host, ms"),
    Column("host_percent", "host, %"),
    Column("verdict", "change of speed, 95 %"),
)
INSIDE = (
    Column("rung"),
    Column("device_ms", "device, ms"),
    Column("engine_bytes", "engine keeps, bytes"),
    Column("step_bytes", "a step takes, bytes"),
)
METADATA = (
    Column("batch", "rows"),
    Column("step"),
    Column("host_us", "host, us"),
    Column("host_us_ci", "95 %", text=lambda row: " to ".join(number(value) for value in row["host_us_ci"])),
    Column("launches"),
    Column("loads", "row copies"),
)
GATES = (
    Column("id"),
    Column("case"),
    Column("gate"),
    Column("passed", "verdict", words=("pass", "FAIL")),
    Column("detail"),
)
HAZARDS = (
    Column("id"),
    Column("hazard"),
    Column("caught", "verdict", words=("caught", "MISSED")),
    Column("detail"),
)
ISA = (
    Column("kernel"),
    Column("arch"),
    Column("shape"),
    Column("vgpr", "VGPR"),
    Column("agpr", "AGPR"),
    Column("sgpr", "SGPR"),
    Column("vgpr_spills", "VGPR spills"),
    Column("lds", "LDS, B"),
    Column("waves_per_simd", "waves / SIMD"),
    Column("mfma", "MFMA"),
)
SCOREBOARD = (
    Column("id"),
    Column("case"),
    Column("device"),
    Column("claimed", text=lambda row: _times(row["claimed"])),
    Column("predicted", text=lambda row: _times(row["predicted"])),
    Column("ratio", "measured [95 %]", text=_measured),
    Column("noise_floor", "noise floor", text=_floor),
    Column("baseline_us", "baseline, us"),
    Column("optimized_us", "optimised, us"),
    Column("peers", "peers, us"),
    Column("gate", words=("passed", "FAILED")),
    Column("stale", text=lambda row: {None: UNKNOWN, True: "STALE", False: "current"}[row["stale"]]),
)

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.4; }
body { margin: 1.5rem; background: Canvas; color: CanvasText; }
label { display: block; margin: 1rem 0; }
input { font: inherit; padding: 0.25em 0.5em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35em 0.6em; border-bottom: 1px solid ${quiet}60; vertical-align: top; }
.r, td:first-child { white-space: nowrap; }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; }
th button { cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: ${quiet}22; }
.l { text-align: left; } .r { text-align: right; }
.good, .bad { $pill; } .good { background: $good; } .bad { background: $bad; }
</style>
</head>
<body>
<h1>$title</h1>
$note
<label>Filter <input id="filter" type="search" placeholder="id, case, device"></label>
<p id="count" role="status">$count rows</p>
<div class="wide" tabindex="0" role="region" aria-label="$title"><table>
<thead><tr>$head</tr></thead>
<tbody>
$body
</tbody>
</table></div>
<script>
"use strict";
const body = document.querySelector("tbody");
const heads = [...document.querySelectorAll("th")];
function compare(a, b) {
  if (a === b) return 0;
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", {numeric: true}) : x - y;
}
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const keyed = [...body.rows].map(row => [row.cells[column]?.dataset.sort ?? "", row]);
  keyed.sort(([a], [b]) => {
    if (!a || !b) return Number(!a) - Number(!b);  // unknown values stay last in both directions
    return up ? compare(a, b) : compare(b, a);
  });
  body.append(...keyed.map(([, row]) => row));
}));
document.getElementById("filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(" ").filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    shown += row.hidden ? 0 : 1;
  }
  document.getElementById("count").textContent = shown + " rows";
});
</script>
</body>
</html>
""")
