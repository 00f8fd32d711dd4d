"""Figures from recorded results: one style, units on every axis, device and date under every plot.

Rows are plain mappings, one per result; the figure only lays them out. Colours are Okabe and Ito's colour-blind-safe
set (https://jfly.uni-koeln.de/color/), each variant has a hatch or marker besides, and text and axes are a mid grey on
a transparent ground, so that one picture reads in a light and in a dark page.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dsv4ref.show import Html

Row = Mapping[str, Any]

GREY = "#767676"  # 4.5:1 on white, 4.2:1 on #111
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
MARKERS = ("o", "s", "^", "D", "v", "P")
LOG_SPAN = 30  # a linear axis hides the smallest bar once the largest is this many times longer

STYLE: Any = {  # Any: newer matplotlib types its keys one by one, older does not
    "figure.facecolor": "none",
    "figure.figsize": (7.5, 4.2),
    "savefig.facecolor": "none",
    "savefig.transparent": True,
    "axes.facecolor": "none",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "hatch.color": "#ffffff90",
    "font.size": 11,
    # Glyphs as outlines and ids from a fixed salt: the same rows give the same bytes on every machine.
    "svg.fonttype": "path",
    "svg.hashsalt": "dsv4ref",
}


def style() -> AbstractContextManager[None]:
    """The workbook's matplotlib settings, for figures drawn by hand: ``with style(): ...``."""
    return rc_context(STYLE)


def picture(fig: Figure, alt: str = "") -> Html:
    """Turn a figure into an ``<img>`` with alternative text, which JupyterLab and the book both keep.

    Args:
        fig: any matplotlib figure; those of this module bring their own description.
        alt: what the figure says, for somebody who cannot see it; the figure's own description when left out.

    Returns:
        `Html` holding the figure as an inline SVG image.

    Raises:
        ValueError: neither `alt` nor a description.
    """
    text = alt or str(fig.get_label())
    if not text.strip():
        raise ValueError("alt: got '', and the figure has no description; expected what the figure says")
    drawn = io.BytesIO()
    with style():
        fig.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    width = round(fig.get_figwidth() * 96)
    image = (
        f'<img alt="{html.escape(text, quote=True)}" src="data:image/svg+xml;base64,{data}" '
        f'style="width:100%;max-width:{width}px;height:auto;background:none;filter:none">'
    )
    return Html(image, text)


def measured_bars(rows: Sequence[Row], title: str = "Measured time") -> Figure:
    """Median time per case, one bar per variant, whiskers from p20 to p80.

    Args:
        rows: ``case, variant, p20_us, p50_us, p80_us, device, date``, one per bar, all from one device. Variants keep
            the order of their first row (baseline, optimised, then peers).
        title: what was measured.

    Returns:
        a figure with a description; the time axis is logarithmic when the longest bar is 30 times the shortest.

    Raises:
        ValueError: no rows, a missing key, two devices, two rows for one bar, or quantiles out of order.
    """
    _need(rows, "case", "variant", "p20_us", "p50_us", "p80_us", "device", "date")
    devices = _distinct(rows, "device")
    if len(devices) > 1:
        raise ValueError(
            f"rows: got devices {', '.join(devices)}, expected one; a figure compares variants on one device"
        )
    cases, variants = _distinct(rows, "case"), _distinct(rows, "variant")
    bars = {(row["case"], row["variant"]): row for row in rows}
    if len(bars) != len(rows):
        raise ValueError(f"rows: {len(rows)} rows for {len(bars)} bars, expected one per case and variant")
    for row in rows:
        if not 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]:
            got = f"p20 {row['p20_us']}, p50 {row['p50_us']}, p80 {row['p80_us']} us"
            raise ValueError(f"rows: {row['case']}, {row['variant']}: got {got}; expected 0 < p20 <= p50 <= p80")
    thick = 0.8 / len(variants)
    with style():
        fig = Figure(figsize=(7.5, 1.4 + 0.34 * len(rows)), layout="constrained")
        ax = fig.subplots()
        for v, variant in enumerate(variants):
            mine = [(c, bars[case, variant]) for c, case in enumerate(cases) if (case, variant) in bars]
            at = [c + (v + 0.5) * thick - 0.4 for c, _ in mine]
            mid = [row["p50_us"] for _, row in mine]
            whiskers = [
                [row["p50_us"] - row["p20_us"] for _, row in mine],
                [row["p80_us"] - row["p50_us"] for _, row in mine],
            ]
            ax.barh(
                at, mid, height=thick * 0.92, xerr=whiskers, ecolor=GREY, capsize=3, label=variant,
                color=COLOURS[v % len(COLOURS)], hatch=HATCHES[v % len(HATCHES)],
            )  # fmt: skip
            for y, row in zip(at, (row for _, row in mine), strict=True):
                ax.annotate(
                    _us(row["p50_us"]), (row["p80_us"], y), (5, 0), textcoords="offset points", va="center", size=9
                )
        ax.set_yticks(range(len(cases)), cases)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        medians = [row["p50_us"] for row in rows]
        if max(medians) / min(medians) >= LOG_SPAN:
            ax.set_xscale("log")
            _plain_ticks(ax.xaxis)
            ax.set_xlabel("time, us (log scale)")
        else:
            ax.set_xlabel("time, us")
        ax.margins(x=0.12)
        ax.set_title(title)
        fig.legend(loc="outside upper right", ncols=min(4, len(variants)))
        _caption(fig, rows, "median, whiskers p20 to p80")
    said = "; ".join(f"{row['case']}, {row['variant']}: {_us(row['p50_us'])}" for row in rows)
    return _described(fig, f"{title}, median times on {_provenance(rows)}. {said}.")


def predicted_vs_measured(rows: Sequence[Row], title: str = "Speedup: predicted, claimed, measured") -> Figure:
    """Ratio of baseline to optimised time per chapter and case: what was predicted, published and measured.

    Args:
        rows: ``id, case, device, predicted, claimed, ratio, ratio_ci, date``, as the report's rows. Ratios are numbers
            or None; published figures that are no ratio (a text, or several in a list) go into the description, not
            into the drawing; ``ratio_ci`` is (low, high) or None; ``date`` is required where ``ratio`` is a number.
        title: of the figure.

    Returns:
        a figure with a description; a row without a measurement says "not measured" where its point would be.

    Raises:
        ValueError: no rows, a missing key, a measurement without a date, or nothing to draw at all.
    """
    _need(rows, "id", "case", "device", "predicted", "claimed", "ratio", "ratio_ci", "date")
    undated = [f"{row['id']}, {row['case']}" for row in rows if row["ratio"] is not None and not row["date"]]
    if undated:
        raise ValueError(f"rows: measured without a date: {'; '.join(undated)}")
    kinds = (("predicted", "D", "none", BLUE), ("claimed", "s", "none", PURPLE), ("ratio", "o", VERMILLION, VERMILLION))
    drawn = {key: [(i, row[key]) for i, row in enumerate(rows) if _is_number(row[key])] for key, *_ in kinds}
    if not any(drawn.values()):
        raise ValueError("rows: no row has a predicted, claimed or measured ratio")
    with style():
        fig = Figure(figsize=(7.5, 1.6 + 0.42 * len(rows)), layout="constrained")
        ax = fig.subplots()
        for key, marker, face, edge in kinds:
            if drawn[key]:
                at, value = [i for i, _ in drawn[key]], [x for _, x in drawn[key]]
                label = "measured, 95 % interval" if key == "ratio" else key
                ax.plot(value, at, marker, mfc=face, mec=edge, mew=2, ls="none", label=label, zorder=3)
        for i, row in enumerate(rows):
            if row["ratio"] is None:
                ax.annotate("not measured", (1, i), (6, -12), textcoords="offset points", size=9, style="italic")
            elif row["ratio_ci"] is not None:
                ax.plot(row["ratio_ci"], [i, i], color=VERMILLION, lw=3, alpha=0.6, solid_capstyle="butt")
        ax.axvline(1, color=GREY, lw=1, ls="--")
        ax.set_yticks(range(len(rows)), [f"{row['id']}\n{row['case']} · {row['device']}" for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.1)
        ratios = [1.0, *(value for pairs in drawn.values() for _, value in pairs)]
        if min(ratios) > 0 and max(ratios) / min(ratios) > LOG_SPAN:
            ax.set_xscale("log")
            _plain_ticks(ax.xaxis)
        ax.set_xlabel("baseline time / optimised time (1 = no change)")
        ax.set_title(title)
        fig.legend(loc="outside upper right", ncols=3)
        measured = [row for row in rows if row["ratio"] is not None]
        _caption(
            fig, measured or rows, "measured" if measured else "predictions and published figures only, not measured"
        )
    said = "; ".join(
        f"{row['id']}, {row['case']}, {row['device']}: predicted {_x(row['predicted'])}, claimed {_x(row['claimed'])}, "
        f"measured {_x(row['ratio'])}"
        for row in rows
    )
    return _described(fig, f"{title}. {said}.")


def roofline(points: Sequence[Row], roofs: Sequence[Row], title: str = "Roofline") -> Figure:
    """Rate against arithmetic intensity, under the roofs measured on the same device.

    Args:
        points: ``label, bytes, flops, p50_us, percent`` (of the point's own bound, or None), ``device, date``.
        roofs: ``label, bandwidth_Bps`` (bytes/s), ``rate_flops`` (FLOP/s), one per line.
        title: of the figure.

    Returns:
        a figure with a description, both axes logarithmic.

    Raises:
        ValueError: no points, no roofs, a missing key, or an amount that is not above 0.
    """
    _need(points, "label", "bytes", "flops", "p50_us", "percent", "device", "date", name="points")
    _need(roofs, "label", "bandwidth_Bps", "rate_flops", name="roofs")
    for name, rows, keys in (("points", points, ("bytes", "flops", "p50_us")), ("roofs", roofs, _ROOF)):
        for row in rows:
            if not all(_is_number(row[key]) and row[key] > 0 for key in keys):
                got = ", ".join(f"{key} {row[key]}" for key in keys)
                raise ValueError(f"{name}: {row['label']}: got {got}, expected numbers above 0")
    at = [(point["flops"] / point["bytes"], point["flops"] / point["p50_us"] / 1e6) for point in points]
    lids = [(roof["bandwidth_Bps"] / 1e12, roof["rate_flops"] / 1e12) for roof in roofs]
    knees = [rate / bandwidth for bandwidth, rate in lids]  # FLOP/byte where a roof bends
    low, high = min(*(x for x, _ in at), *knees) / 4, max(*(x for x, _ in at), *knees) * 4
    said = []
    with style():
        fig = Figure(figsize=(7.5, 5.0), layout="constrained")
        ax = fig.subplots()
        for r, (roof, (bandwidth, rate), knee) in enumerate(zip(roofs, lids, knees, strict=True)):
            label = f"{roof['label']}: {bandwidth:.3g} TB/s, {rate:.4g} TFLOP/s"
            dash = ("-", "--", ":", "-.")[r % 4]
            ax.plot([low, knee, high], [low * bandwidth, rate, rate], color=GREY, label=label, ls=dash)
        for i, (point, (x, y)) in enumerate(zip(points, at, strict=True)):
            share = "" if point["percent"] is None else f", {point['percent']:.0f} % of its bound"
            label = f"{point['label']}: {y:.3g} TFLOP/s{share}"
            ax.plot(x, y, MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], ls="none", label=label, zorder=3)
            said.append(f"{label} at {x:.3g} FLOP/byte")
        ax.set_xscale("log")
        ax.set_yscale("log")
        _plain_ticks(ax.xaxis)
        _plain_ticks(ax.yaxis)
        ax.set_xlabel("arithmetic intensity, FLOP/byte")
        ax.set_ylabel("rate, TFLOP/s")
        ax.set_title(title)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
        _caption(fig, points, "roofs measured on the same device")
    return _described(fig, f"{title} on {_provenance(points)}. {'; '.join(said)}.")


_ROOF = ("bandwidth_Bps", "rate_flops")


def _need(rows: Sequence[Row], *keys: str, name: str = "rows") -> None:
    if not rows:
        raise ValueError(f"{name}: got none, expected at least one row to draw")
    for position, row in enumerate(rows):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{name}[{position}]: no {', '.join(missing)}; it has {', '.join(map(str, row))}")


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _provenance(rows: Sequence[Row]) -> str:
    """Every device with its dates (the day is enough for a caption)."""
    parts = []
    for device in _distinct(rows, "device"):
        days = sorted({str(row["date"])[:10] for row in rows if str(row["device"]) == device and row["date"]})
        parts.append(f"{device}, {' and '.join(days[:1] + days[1:][-1:])}" if days else device)
    return "; ".join(parts)


def _caption(fig: Figure, rows: Sequence[Row], what: str) -> None:
    # A figure's own text takes no room in a constrained layout; the super-label does.
    fig.supxlabel(f"{_provenance(rows)} · {what}", size=9, x=0.01, ha="left")


def _plain_ticks(axis: Axis) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _described(fig: Figure, text: str) -> Figure:
    fig.set_label(text)
    return fig


def _us(value: float) -> str:
    return f"{value:,.0f} us" if value >= 100 else f"{value:.3g} us"


def _x(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_x(item) for item in value) or "nothing"
    if value is None:
        return "nothing"
    if not _is_number(value):
        return str(value)
    return f"{value:.{2 if abs(value - 1) >= 0.1 else 3}f}×"
