"""The roofline of attention decode: what each kind of layer must move, multiply and decode, on one card. No kernels.

Axes are logarithmic, and stay where they are unless a value lies beyond them. A filled mark stands where a kind's
slowest side holds it; the hollow one below stands where the decode chapters' model has the launch that the table
selects. The roof of dequantisation is dashed: unlike the other two it is no published peak, but instructions per code,
a round number of that model, and it rises with the heads, for all of which a code is decoded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4ref import config
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence.roofline import Bound
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch
from dsv4ref.optimizations import decode_model, step_model
from dsv4ref.show.panels import COLOURS, GRID, _Axis, _svg, _svg_line, _svg_text, _text

__all__ = ["SIDES", "roofline_explorer"]

SIDES = {
    "memory": ("memory", COLOURS[0]),
    "arithmetic": ("matrix units", COLOURS[1]),
    "dequantisation": ("dequantisation", COLOURS[2]),
}
"""What can bind: the side's name in a `Bound` -> its name in the picture and its colour."""

_INTENSITIES, _RATES = (1.0, 1000.0), (0.1, 5000.0)  # FLOP per byte, TFLOP/s
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 70, 610, 40, 270
_KEY, _KINDS = _BOTTOM + 62, _BOTTOM + 116
_BARS, _LONGEST, _TALL = 150, 300, 98
_DASHED = 'stroke-dasharray="7 4"'


@dataclass(frozen=True)
class _Kind:
    """Attention of one kind of layer: its lists, its bound, and the launch that is selected for it."""

    name: str
    swa: int
    extra: int
    bound: Bound
    launch: LaunchShape
    launch_us: float

    @property
    def others(self) -> tuple[str, float]:
        """The side behind the one that binds, and how many times its time the bound is."""
        second = sorted(self.bound.sides_us, key=lambda side: -self.bound.sides_us[side])[1]
        return second, self.bound.time_us / self.bound.sides_us[second]


def roofline_explorer(
    rows: int = 64, heads: int = 64, topk: int = 512, context: int = 32768, device: str = "mi300x"
) -> str:
    """Where attention of each kind of layer stands under a card's roofs, which side binds and by how much, as SVG.

    Args:
        rows: query rows, of as many sequences.
        heads: query heads per row, on this rank.
        topk: entries that the indexer keeps; the other lengths of lists follow from the context.
        context: tokens of each sequence.
        device: key of a device with published figures.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: a number below 1, a context beyond the model's, or a device without figures.
    """
    for name, value in {"rows": rows, "heads": heads, "topk": topk}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    spec = decode_model.spec_for(device)
    if spec is None:
        raise ValueError(f"device: got {device!r}, expected one with published bandwidth, matrix rate and units")
    model = replace(config.V4_FLASH, index_topk=topk)
    keys = step_model.decode_tokens(model, 1, context).keys
    swa = keys[config.SWA]
    kinds = [_kind(name, rows, heads, swa, keys[ratio] - swa, spec) for ratio, name in config.LAYER_KINDS.items()]
    title = f"Attention decode, {rows} rows x {heads} heads at {context:,}, {spec.name}: bounds and model"
    parts = _plot(kinds)
    roofs = ", ".join(f"{SIDES[side][0]} {height}" for side, height in _heights(kinds[0].bound).items())
    said = [f"Roofs: {roofs}"]
    for number, kind in enumerate(kinds):
        lines, words = _sides(kind, _KINDS + number * _TALL, number)
        parts += lines
        said.append(words)
    return _svg(_WIDTH, _KINDS + len(kinds) * _TALL - 12, title, f"{title}. {'. '.join(said)}", "".join(parts))


def _kind(name: str, rows: int, heads: int, swa: int, extra: int, spec: DeviceSpec) -> _Kind:
    params = {"rows": rows, "heads": heads, "swa": swa, "extra": extra}
    bound = replace(decode_model.bound(params, spec), levels=(decode_model.dequantisation(params, spec),))
    launch = select_launch(spec.arch, rows, heads, extra)
    return _Kind(name, swa, extra, bound, launch, decode_model.decode_time_us(params, launch, spec))


def _roofs(bound: Bound) -> dict[str, float]:
    """The height of the two flat roofs, in TFLOP/s: the work over the time that this side alone would take."""
    return {side: 1e-6 * bound.flops / bound.sides_us[side] for side in ("arithmetic", "dequantisation")}


def _heights(bound: Bound) -> dict[str, str]:
    """What the key says of each roof."""
    rates = {side: f"{_text(rate)} TFLOP/s" for side, rate in _roofs(bound).items()}
    return {"memory": f"{_text(1e-12 * bound.bytes_per_s)} TB/s"} | rates


def _key(bound: Bound) -> list[str]:
    parts = []
    for left, (side, height) in zip((8, 150, 385), _heights(bound).items(), strict=True):
        name, colour = SIDES[side]
        pen = f'stroke-width="2.5" {_DASHED if side == "dequantisation" else ""}'
        parts.append(_svg_line(left, _KEY - 4, left + 24, _KEY - 4, colour, pen))
        parts.append(_svg_text(left + 30, _KEY, f"{name} {height}"))
    y = _KEY + 22
    filled = [_mark(number, 14 + 14 * number, y - 4, "currentColor") for number in range(3)]
    hollow = [_mark(number, 156 + 14 * number, y - 4, "none") for number in range(3)]
    parts += [*filled, _svg_text(56, y, "bound"), *hollow, _svg_text(198, y, "selected launch, modelled")]
    return parts


def _plot(kinds: list[_Kind]) -> list[str]:
    """Axes, the three roofs with their key, two marks for each kind."""
    rates = [1e-6 * kind.bound.flops / us for kind in kinds for us in (kind.bound.time_us, kind.launch_us)]
    x = _axis("intensity", _INTENSITIES, [kind.bound.intensity for kind in kinds], _LEFT, _RIGHT)
    y = _axis("rate", _RATES, rates, _BOTTOM, _TOP)
    parts, faint = [], 'stroke-opacity="0.25"'
    for tick in x.ticks():
        parts += [_svg_line(x(tick), _TOP, x(tick), _BOTTOM, GRID, faint)]
        parts += [_svg_text(x(tick), _BOTTOM + 17, _text(tick), "middle")]
    for tick in y.ticks():
        parts += [_svg_line(_LEFT, y(tick), _RIGHT, y(tick), GRID, faint)]
        parts += [_svg_text(_LEFT - 6, y(tick) + 4, _text(tick), "end")]
    parts += [_svg_line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, GRID), _svg_line(_LEFT, _TOP, _LEFT, _BOTTOM, GRID)]
    parts += [_svg_text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "FLOP per byte of memory traffic", "middle")]
    parts += [_svg_text(0, 0, "TFLOP/s", "middle", f"translate(16 {(_TOP + _BOTTOM) / 2}) rotate(-90)")]
    bound = kinds[0].bound  # the same roofs for all
    roofs, slope = _roofs(bound), 1e-12 * bound.bytes_per_s  # TFLOP/s at one FLOP per byte
    starts = {side: max(height / slope, x.low) for side, height in roofs.items()}
    ends = {"memory": (x.low, slope * x.low, starts["arithmetic"], roofs["arithmetic"])}
    ends |= {side: (starts[side], roofs[side], x.high, roofs[side]) for side in roofs}
    for side, (x1, y1, x2, y2) in ends.items():
        pen = f'stroke-width="2.5" class="roof" {_DASHED if side == "dequantisation" else ""}'
        parts.append(_svg_line(x(x1), y(y1), x(x2), y(y2), SIDES[side][1], pen))
    for number, kind in enumerate(kinds):
        at = x(kind.bound.intensity)
        high, low = (y(1e-6 * kind.bound.flops / us) for us in (kind.bound.time_us, kind.launch_us))
        parts.append(_svg_line(at, high, at, low, "currentColor", 'stroke-opacity="0.6" stroke-dasharray="2 3"'))
        parts += [_mark(number, at, high, "currentColor"), _mark(number, at, low, "none")]
    return [*parts, *_key(bound)]


def _axis(name: str, usual: tuple[float, float], values: list[float], start: float, stop: float) -> _Axis:
    """A logarithmic axis with its usual ends, moved only for a value beyond them."""
    limits = min(usual[0], *values), max(usual[1], *values)
    return _Axis(name, values, limits, True, start, stop)


def _mark(number: int, x: float, y: float, fill: str) -> str:
    """A kind's mark: told apart by shape, so that colour is left to the roofs."""
    style = f'fill="{fill}" stroke="currentColor" stroke-width="1.5"'
    if number == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    if number == 1:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {style}/>'
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 10h-12z" {style}/>'


def _sides(kind: _Kind, y: int, number: int) -> tuple[list[str], str]:
    """A kind's three times as bars, the longest of them full, and the same in words."""
    bound, (second, ahead) = kind.bound, kind.others
    name = f"{kind.name}, {kind.swa} + {kind.extra:,} keys, {_text(bound.intensity)} FLOP/B"
    verdict = f"bound by {SIDES[bound.side][0]}, {ahead:.2f} times as long as {SIDES[second][0]}"
    launch = (
        f"launch {kind.launch}, modelled: {_text(kind.launch_us)} us, {bound.attained(kind.launch_us):.2g} % of bound"
    )
    parts = [_mark(number, 14, y - 4, "currentColor"), _svg_text(28, y, f"{name}: {verdict}")]
    for at, (side, us) in enumerate(bound.sides_us.items()):
        label, colour = SIDES[side]
        wide = _LONGEST * us / bound.time_us
        top = y + 8 + 18 * at
        weight = ' font-weight="bold"' if side == bound.side else ""
        parts.append(_svg_text(_BARS - 8, top + 12, label, "end", extra=weight))
        parts.append(f'<rect x="{_BARS}" y="{top}" width="{wide:.1f}" height="14" fill="{colour}"/>')
        parts.append(_svg_text(_BARS + wide + 6, top + 12, f"{_text(us)} us", extra=weight))
    parts.append(_svg_text(28, y + 76, launch))
    times = ", ".join(f"{SIDES[side][0]} {_text(us)} us" for side, us in bound.sides_us.items())
    return parts, f"{name}: {times}; {verdict}; {launch}"
