"""The split decode's panel: waves of workgroups over time, for several split counts. A model; no kernels.

One line per split count. A box is a wave, as wide as it takes and as high as the machine has places for workgroups; its
filled part is what the workgroups take. Many full waves are one box. The last box, in vermillion, is the reduce.
"""

from __future__ import annotations

import html

from dsv4ref import config
from dsv4ref.device import get_device
from dsv4ref.kernels.sparse_mla.splits import MAX_SPLITS, Machine, SplitPlan, plan_splits, reduce_us
from dsv4ref.show.panels import COLOURS, GRID

__all__ = ["LAYERS", "split_explorer"]

LAYERS = ("C4", "C128", "SWA only")
"""Kinds of layers: what the extra scope holds."""

_COUNTS = (1, 2, 4, 8, 16, MAX_SPLITS)
_BLUE, _VERMILLION = COLOURS[:2]
_LEFT, _TOP, _ROW, _TALL, _WIDE = 96, 44, 44, 26, 300


def split_explorer(
    rows: int = 8, heads: int = 64, context: int = 8192, layer: str = "C4", device: str = "mi300x"
) -> str:
    """Waves, idle share and iterations of a decode under several split counts, the planned one marked, as SVG.

    Args:
        rows: query rows.
        heads: query heads per row; up to 64 the top-k is V4-Flash's, above V4-Pro's.
        context: the longest context that the layer is served for, in tokens. Plans know no other length.
        layer: one of `LAYERS`.
        device: key of a device with published figures.

    Raises:
        ValueError: no such layer, or a number below 1.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer: got {layer!r}, expected one of {list(LAYERS)}")
    if context < 1:
        raise ValueError(f"context: got {context}, expected at least 1 token")
    model = config.V4_FLASH if heads <= config.V4_FLASH.n_heads else config.V4_PRO
    extra = {"C4": min(context // 4, model.index_topk), "C128": context // 128, "SWA only": 0}[layer]
    swa = min(context, model.window_size)
    spec = get_device(device)
    machine = Machine.of(spec)
    chosen = plan_splits(machine, rows, heads, swa, extra)
    counts = sorted({*_COUNTS, chosen.splits})
    plans = [plan_splits(machine, rows, heads, swa, extra, chosen.launch, splits) for splits in counts]
    title = f"{_count(rows, 'row')} x {heads} heads, {swa} + {extra} keys, tile {chosen.launch}, {spec.name}"
    return _picture(machine, rows, heads, plans, chosen, title)


def _picture(
    machine: Machine, rows: int, heads: int, plans: list[SplitPlan], chosen: SplitPlan, title: str
) -> str:  # fmt: skip
    scale = _WIDE / max(plan.time_us for plan in plans)
    parts, said = [], []
    for at, plan in enumerate(plans):
        y = _TOP + at * _ROW
        merge_us = reduce_us(machine, rows, heads, plan.splits) if plan.splits > 1 else 0.0
        wave_us = (plan.time_us - merge_us) / plan.waves
        here = plan.splits == chosen.splits
        name = _count(plan.splits, "split")
        line = (
            f"{_count(plan.waves, 'wave')}, {100 * plan.idle:.0f} % idle, {_count(plan.iterations, 'iteration')}, "
            f"{plan.time_us:.1f} us"
        )
        weight = ' font-weight="bold"' if here else ""
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 18}" text-anchor="end"{weight}>{name}</text>')
        parts += _waves(plan, y, wave_us * scale)
        x = _LEFT + plan.waves * wave_us * scale
        if merge_us:
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(merge_us * scale, 1):.1f}" height="{_TALL}" '
                f'fill="{_VERMILLION}"/>'
            )
        end = x + merge_us * scale + 8
        parts.append(f'<text x="{end:.1f}" y="{y + 18}"{weight}>{line}{"  ◄ planned" if here else ""}</text>')
        said.append(f"{name}{' (planned)' if here else ''}: {line}")
    key = _TOP + len(plans) * _ROW + 6
    for x, colour, text in (
        (8, _BLUE, "workgroups at work"),
        (180, "none", "idle places"),
        (300, _VERMILLION, "reduce"),
    ):
        stroke = f' stroke="{GRID}"' if colour == "none" else ""
        parts.append(f'<rect x="{x}" y="{key}" width="14" height="14" fill="{colour}"{stroke}/>')
        parts.append(f'<text x="{x + 20}" y="{key + 12}">{text}</text>')
    label = html.escape(f"{title}. {'; '.join(said)}", quote=True)
    return (
        f'<svg viewBox="0 0 720 {key + 28}" role="img" aria-label="{label}" font-family="sans-serif" font-size="13" '
        'fill="currentColor" style="width:100%;max-width:720px;height:auto">'
        f'<text x="8" y="20" font-weight="bold">{html.escape(title)}</text>{"".join(parts)}</svg>'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _waves(plan: SplitPlan, y: int, wide: float) -> list[str]:
    """The full waves as one box, the last one as another."""
    full = plan.waves - 1
    last = 1 - plan.idle * plan.waves  # idle places are all in the last wave
    boxes: list[tuple[float, float, float]] = [(_LEFT, full * wide, 1.0)] if full else []
    boxes.append((_LEFT + full * wide, wide, last))
    drawn = []
    for x, width, share in boxes:
        tall = _TALL * share
        drawn.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_TALL}" fill="none" stroke="{GRID}"/>'
            f'<rect x="{x:.1f}" y="{y + _TALL - tall:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{_BLUE}"/>'
        )
    return drawn
