"""Panels: a pure function of a few numbers, drawn again whenever a slider moves.

`panel` needs a kernel and is for JupyterLab; `frames` draws every value beforehand and moves in a static page, offline.
Both call the function inside the cell, so that a function that fails fails the cell. `bars` and `lines` draw the SVG
that such functions return: closed-form models need no plotting library, and the SVG takes its text colour from the
page.

Every picture carries its alternative text: `bars` and `lines` say their numbers in ``aria-label``.
"""

import hashlib
import html
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from dsv4ref.show import Html

Draw = Callable[..., str]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito; the order of show.plots
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")
GRID = "#767676"
MAX_FRAMES = 200  # a page carries every frame
_DESCRIBED = re.compile(r"""(aria-label|alt)="[^"]+"|<title>[^<]+""")


class Panel(ipywidgets.VBox):
    """Sliders above a picture. `controls` maps each argument's name to its widget; `view` is the `HTML` widget."""

    def __init__(self, controls: Mapping[str, Any], view: Any) -> None:
        self.controls = dict(controls)
        self.view = view
        super().__init__([*self.controls.values(), view])


def panel(f: Draw, **ranges: Any) -> Panel:
    """Wire one slider or menu per argument to a picture.

    Args:
        f: pure function of the named arguments; returns HTML or SVG. It is called at once, and again on every change.
        ranges: for each argument of `f`: ``(low, high)`` or ``(low, high, step)`` of ints or floats gives a slider; a
            list of numbers gives a slider over these; a list of texts, or a mapping of label to value, gives a menu;
            ``True`` or ``False`` gives a check box. A control starts at the argument's default where `f` has one, else
            at its first value.

    Returns:
        the `Panel`; leave it as the cell's last expression.

    Raises:
        TypeError: a name that `f` does not take, a range of no known kind, or an `f` that does not return a text.
        ValueError: a range without values, or a default outside its range.
        Exception: whatever `f` raises, here and when a slider moves; the error first replaces the stale picture.
    """
    if not ranges:
        raise ValueError("ranges: got none, expected one per argument that moves")
    try:
        inspect.signature(f).bind_partial(**dict.fromkeys(ranges))
    except TypeError as error:
        raise TypeError(f"ranges: {', '.join(ranges)} do not fit {_name(f)}{inspect.signature(f)}: {error}") from error
    controls = {name: _control(name, kind, _default(f, name)) for name, kind in ranges.items()}
    view = ipywidgets.HTML()

    def draw(_change: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            view.value = _drawn(f, values)
        except Exception as error:
            view.value = f'<p role="alert"><strong>{_esc(type(error).__name__)}</strong>: {_esc(error)}</p>'
            raise  # nbval sees it, the cell fails; in JupyterLab it is in the log besides

    draw()
    for control in controls.values():
        control.observe(draw, names="value")
    return Panel(controls, view)


def frames(f: Draw, name: str, values: Sequence[Any], **fixed: Any) -> Html:
    """Draw `f` for every value beforehand and put a slider over the pictures that needs no kernel and no network.

    Args:
        f: pure function; returns HTML or SVG with alternative text (``aria-label``, ``alt`` or ``<title>``).
        name: the argument that the slider moves.
        values: what it takes, in order; 2 to 200.
        fixed: the other arguments of `f`.

    Returns:
        `Html`; the first frame shows where scripts do not run.

    Raises:
        TypeError: arguments that `f` does not take, or an `f` that does not return a text.
        ValueError: too few or too many values, or a picture without alternative text.
    """
    if not 2 <= len(values) <= MAX_FRAMES:
        raise ValueError(f"values: got {len(values)}, expected 2 to {MAX_FRAMES}")
    if name in fixed:
        raise TypeError(f"fixed: got {name!r}, which is the argument that moves")
    drawn = [_drawn(f, {name: value, **fixed}) for value in values]
    for value, picture in zip(values, drawn, strict=True):
        if ("<svg" in picture or "<img" in picture) and not _DESCRIBED.search(picture):
            raise ValueError(
                f"{_name(f)}({name}={value!r}): picture without alternative text, expected aria-label or alt"
            )
    labels = [f"{name} = {_text(value)}" for value in values]
    # From the content, not a counter: the same panel gets the same id in every run, so outputs do not change.
    key = "dsv4-" + hashlib.sha256("\0".join([name, *labels, *drawn]).encode()).hexdigest()[:12]
    pictures = "".join(
        f'<div class="dsv4-frame" data-label="{_esc(label)}"{"" if i == 0 else " hidden"}>{picture}</div>'
        for i, (label, picture) in enumerate(zip(labels, drawn, strict=True))
    )
    # Inline, and found from the slider itself: works from file://, in JupyterLab, and twice in one page. Without the
    # data-lm attribute JupyterLab takes the arrow keys for its own.
    move = (
        "const s=this,p=s.closest('.dsv4-frames');p.querySelectorAll('.dsv4-frame').forEach((d,i)=>{"
        "d.hidden=i!==Number(s.value);if(!d.hidden){s.setAttribute('aria-valuetext',d.dataset.label);"
        "p.querySelector('output').textContent=d.dataset.label}})"
    )
    page = (
        f'<div class="dsv4-frames" id="{key}" style="max-width:46em">'
        f'<div style="display:flex;gap:0.75em;align-items:center"><label for="{key}-at">{_esc(name)}</label>'
        f'<input id="{key}-at" type="range" min="0" max="{len(values) - 1}" step="1" value="0" autocomplete="off" '
        f'data-lm-suppress-shortcuts="true" aria-valuetext="{_esc(labels[0])}" oninput="{_esc(move)}" style="flex:1">'
        f'<output for="{key}-at" style="min-width:8em">{_esc(labels[0])}</output></div>{pictures}</div>'
    )
    return Html(page, f"{_name(f)}: {len(values)} frames, {labels[0]} to {labels[-1]}")


def bars(items: Mapping[str, float], *, title: str, unit: str, limit: float | None = None) -> str:
    """Horizontal bars with their values, as SVG.

    Args:
        items: label to value, at or above 0.
        title: what the bars say; also begins the alternative text.
        unit: of the values, shown behind each.
        limit: value at the right end; the largest when left out. Fix it when a slider moves the bars.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: no bars, or a value that is negative or not finite.
    """
    if not items:
        raise ValueError("items: got none, expected at least one bar")
    bad = {label: value for label, value in items.items() if not (math.isfinite(value) and value >= 0)}
    if bad:
        raise ValueError(f"items: got {bad}, expected finite values at or above 0")
    end = max(items.values()) if limit is None else limit
    left = min(260, 16 + 7 * max(map(len, items)))
    room = 640 - left - 110
    parts = []
    for i, (label, value) in enumerate(items.items()):
        y, wide = 34 + 26 * i, room * min(1.0, value / end) if end > 0 else 0.0
        beyond = " ▸" if end < value else ""
        parts.append(
            _svg_text(left - 8, y + 13, label, "end")
            + f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="18" fill="{COLOURS[i % len(COLOURS)]}"/>'
            + _svg_text(left + wide + 6, y + 13, f"{_text(value)} {unit}{beyond}")
        )
    said = f"{title}: " + ", ".join(f"{label} {_text(value)} {unit}" for label, value in items.items())
    return _svg(640, 44 + 26 * len(items), title, said, "".join(parts))


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    mark: float | None = None,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
) -> str:
    """Curves over one pair of axes, as SVG.

    Args:
        series: name to points (x, y), in order of x.
        title: what the curves say; also begins the alternative text.
        x_label, y_label: axis labels with units.
        log_x, log_y: logarithmic axes; every coordinate must then be above 0.
        mark: x of a dashed vertical line, such as the slider's own value.
        x_limits, y_limits: ends of the axes; those of the data when left out. Fix them when a slider moves the curves.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: no points, a coordinate that is not finite, or one at or below 0 on a logarithmic axis.
    """
    points = [point for curve in series.values() for point in curve]
    if not points:
        raise ValueError("series: got no points, expected at least one")
    left, right, top, bottom = 70, 610, 40, 270
    x_axis = _Axis("x", [x for x, _ in points], x_limits, log_x, left, right)
    y_axis = _Axis("y", [y for _, y in points], y_limits, log_y, bottom, top)
    faint = 'stroke-opacity="0.25"'
    parts = []
    for tick in x_axis.ticks():
        at = x_axis(tick)
        parts += [_svg_line(at, top, at, bottom, GRID, faint), _svg_text(at, bottom + 17, _text(tick), "middle")]
    for tick in y_axis.ticks():
        at = y_axis(tick)
        parts += [_svg_line(left, at, right, at, GRID, faint), _svg_text(left - 6, at + 4, _text(tick), "end")]
    parts += [_svg_line(left, bottom, right, bottom, GRID), _svg_line(left, top, left, bottom, GRID)]
    parts += [_svg_text((left + right) / 2, bottom + 36, x_label, "middle")]
    parts += [_svg_text(0, 0, y_label, "middle", f"translate(16 {(top + bottom) / 2}) rotate(-90)")]
    if mark is not None:
        at = x_axis(mark)
        parts.append(_svg_line(at, top, at, bottom, "currentColor", 'stroke-dasharray="4 3"'))
    # A nested svg cuts off what lies outside the axes; a clipPath would need an id, and stop working when hidden.
    box = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
    view = f'viewBox="{left} {top} {right - left} {bottom - top}" overflow="hidden"'
    for i, (label, curve) in enumerate(series.items()):
        pen = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2.5" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in curve)
        y = bottom + 60 + 20 * i
        parts.append(f'<svg {box} {view}><polyline points="{path}" fill="none" {pen}/></svg>')
        parts.append(f'<line x1="{left}" y1="{y - 4}" x2="{left + 30}" y2="{y - 4}" {pen}/>')
        parts.append(_svg_text(left + 38, y, label))
    said = f"{title}. {y_label} over {x_label}. " + "; ".join(
        f"{label}: from {_text(curve[0][1])} at {_text(curve[0][0])} to {_text(curve[-1][1])} at {_text(curve[-1][0])}"
        for label, curve in series.items()
        if curve
    )
    return _svg(640, bottom + 52 + 20 * len(series), title, said, "".join(parts))


class _Axis:
    """Maps values of one axis to pixels and chooses round ticks."""

    def __init__(
        self, name: str, values: list[float], limits: tuple[float, float] | None, log: bool, start: float, stop: float
    ) -> None:
        low, high = limits or (min(values), max(values))
        if not all(map(math.isfinite, [*values, low, high])):
            raise ValueError(f"series: got a {name} that is not finite, expected finite coordinates")
        if log and min(*values, low) <= 0:
            raise ValueError(f"series: got {name} = {min(*values, low)} on a logarithmic axis, expected above 0")
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.log, self.start, self.stop = low, high, log, start, stop

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            step = 10.0 if self.high / self.low > 200 else 2.0
            first, last = math.ceil(math.log(self.low, step) - 1e-9), math.floor(math.log(self.high, step) + 1e-9)
            skip = max(1, math.ceil((last - first + 1) / 8))
            return [step**k for k in range(first, last + 1, skip)] or [self.low, self.high]
        raw = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def _svg(width: int, height: int, title: str, said: str, inside: str) -> str:
    heading = _svg_text(8, 20, title, extra=' font-weight="bold"')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_esc(said)}" font-family="sans-serif" '
        f'font-size="13" fill="currentColor" style="width:100%;max-width:{width}px;height:auto">{heading}{inside}</svg>'
    )


def _svg_text(x: float, y: float, text: str, anchor: str = "start", transform: str = "", extra: str = "") -> str:
    turn = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}{extra}>{_esc(text)}</text>'


def _svg_line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def _drawn(f: Draw, values: Mapping[str, Any]) -> str:
    picture = f(**values)
    if not isinstance(picture, str):
        raise TypeError(f"{_name(f)}: returned {type(picture).__name__}, expected HTML or SVG as a text")
    return picture


def _control(name: str, kind: Any, start: Any) -> Any:
    """The widget for one range; `start` is None when the function has no default."""
    common: dict[str, Any] = {"description": name, "style": {"description_width": "initial"}}
    if isinstance(kind, bool):
        return ipywidgets.Checkbox(value=kind if start is None else bool(start), **common)
    if isinstance(kind, tuple):
        return _slider(name, kind, start, common | {"continuous_update": True})
    if isinstance(kind, Mapping):
        options = [(str(label), value) for label, value in kind.items()]
    elif isinstance(kind, list | range):
        options = [(_text(value), value) for value in kind]
    else:
        raise TypeError(f"{name}: got {kind!r}, expected (low, high[, step]), a list, a mapping, True or False")
    if not options:
        raise ValueError(f"{name}: got no values, expected at least one")
    values = [value for _, value in options]
    if start is not None and start not in values:
        raise ValueError(f"{name}: default {start!r} is not among {values}")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and not isinstance(kind, Mapping):
        common["continuous_update"] = True
        return ipywidgets.SelectionSlider(options=options, value=values[0] if start is None else start, **common)
    return ipywidgets.Dropdown(options=options, value=values[0] if start is None else start, **common)


def _slider(name: str, kind: tuple[Any, ...], start: Any, common: dict[str, Any]) -> Any:
    if len(kind) not in (2, 3) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in kind):
        raise TypeError(f"{name}: got {kind!r}, expected (low, high) or (low, high, step) of numbers")
    whole = all(isinstance(value, int) for value in kind)
    low, high = kind[:2]
    step = kind[2] if len(kind) == 3 else (1 if whole else (high - low) / 100)
    if not (low < high and step > 0):
        raise ValueError(f"{name}: got {kind!r}, expected low < high and a step above 0")
    start = low if start is None else start
    if not low <= start <= high:
        raise ValueError(f"{name}: default {start!r} is outside {low} to {high}")
    slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return slider(min=low, max=high, step=step, value=start, **common)


def _default(f: Draw, name: str) -> Any:
    parameter = inspect.signature(f).parameters.get(name)  # absent when f takes **kwargs
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _name(f: Draw) -> str:
    return getattr(f, "__name__", type(f).__name__)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _esc(value: object) -> str:
    return html.escape(str(value), quote=True)
