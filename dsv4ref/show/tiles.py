"""A picture of tiles: what a routing histogram fills of them, what it wastes, and what the model makes of it."""

from __future__ import annotations

import functools

from torch import Tensor

from dsv4ref.device import get_device
from dsv4ref.kernels.experts.tiles import local_rows, select_tile
from dsv4ref.optimizations.routing_eager import loads
from dsv4ref.optimizations.tile_model import candidates, layer_time_us, local_loads, occupancy
from dsv4ref.show.panels import COLOURS, GRID, _svg, _svg_line, _svg_text

__all__ = ["histogram_bars", "tile_explorer"]

_WIDTH, _LEFT, _PLOT = 640, 48.0, 576.0
_TOP_K, _HIDDEN, _INTERMEDIATE = 6, 4096, 2048


def histogram_bars(histogram: Tensor, block_m: int, *, title: str) -> str:
    """Rows per expert, busiest first, inside the tiles that they need, as SVG.

    Args:
        histogram: integer ``[E]``, at least one expert and one row.
        block_m: rows of a tile; thin lines mark its multiples.
        title: what is shown; also begins the alternative text.

    Returns:
        an ``<svg>`` element. Outlines are padding.

    Raises:
        ValueError: no rows.
    """
    counts = sorted((int(count) for count in histogram), reverse=True)
    if not counts or not counts[0]:
        raise ValueError(f"histogram: got {len(counts)} experts without a row, expected at least one row")
    parts, said = _bars(counts, block_m)
    return _svg(_WIDTH, 232, title, f"{title}. {said}", "".join(parts))


def _bars(counts: list[int], block_m: int) -> tuple[list[str], str]:
    """Bars from y = 40 to 190 with a line of text below, and that text."""
    base, tall = 190.0, 150.0
    highest = -(-counts[0] // block_m) * block_m
    wide, parts = _PLOT / len(counts), []
    for multiple in range(0, highest + 1, block_m * -(-highest // (6 * block_m))):
        y = base - tall * multiple / highest
        parts += [_svg_line(_LEFT, y, _LEFT + _PLOT, y, GRID), _svg_text(_LEFT - 6, y + 4, str(multiple), "end")]
    for index, count in enumerate(counts):
        x, room = _LEFT + index * wide, -(-count // block_m) * block_m
        for size, style in (
            (room, f'fill="none" stroke="{COLOURS[1]}" stroke-width="0.8"'),
            (count, f'fill="{COLOURS[0]}"'),
        ):
            high = tall * size / highest
            parts.append(
                f'<rect x="{x:.1f}" y="{base - high:.1f}" width="{wide * 0.8:.1f}" height="{high:.1f}" {style}/>'
            )
    seen = occupancy(counts, block_m)
    said = (
        f"{seen.rows} rows in {seen.tiles} tiles of {block_m}: {100 * seen.fill:.1f} % full, "
        f"{seen.padded_rows - seen.rows} rows of padding, {seen.re_reads} re-reads"
    )
    parts.append(_svg_text(8, base + 26, said))
    return parts, said


@functools.lru_cache(maxsize=512)
def _loads(experts: int, tokens: int, skew: float, ranks: int) -> Tensor:
    return local_loads(loads(experts, _TOP_K, tokens, skew), ranks)


def tile_explorer(
    tokens: int = 1024,
    experts: int = 256,
    ranks: int = 2,
    skew: float = 0.0,
    block_m: int = 32,
    device: str = "mi300x",
) -> str:
    """Load of the first rank's experts under one tile height, and the modelled time of both GEMMs under every tile.

    Args:
        tokens: M, of which every rank sees all; each chooses 6 experts, D = 4096 and I = 2048.
        experts: E, over all ranks.
        ranks: ranks of a linear placement.
        skew: exponent of the experts' popularity, 0 for equal.
        block_m: rows of the tiles drawn.
        device: key of a device with published figures.

    Returns:
        an ``<svg>`` element.
    """
    spec, mine = get_device(device), _loads(experts, tokens, skew, ranks)
    counts = sorted((int(count) for count in mine), reverse=True)
    title = f"{tokens} tokens, {len(counts)} of {experts} experts, skew {skew:g}, {spec.name}"
    if not counts[0]:
        return _svg(_WIDTH, 60, title, f"{title}. No rows on this rank", _svg_text(8, 44, "no rows on this rank"))
    parts, said = _bars(counts, block_m)
    rows = local_rows(tokens, experts, len(counts))
    selected = select_tile(spec.arch, rows, len(counts), _TOP_K, 2 * _INTERMEDIATE, _HIDDEN)
    times = {t: layer_time_us(mine, t, _HIDDEN, _INTERMEDIATE, spec) for t in candidates(spec.arch)}
    best, longest, y, notes = min(times, key=lambda t: times[t]), max(times.values()), 240.0, []
    for tile, time in times.items():
        marks = [name for name, marked in (("selected", selected), ("best", best)) if marked == tile]
        label = f"{time:,.0f} us" + (f" ({', '.join(marks)})" if marks else "")
        fill = COLOURS[0] if tile.block_m == block_m else COLOURS[5]
        parts.append(_svg_text(8, y + 12, str(tile)))
        parts.append(f'<rect x="176" y="{y:.0f}" width="{320 * time / longest:.1f}" height="16" fill="{fill}"/>')
        parts.append(_svg_text(184 + 320 * time / longest, y + 12, label))
        notes.append(f"{tile}: {label}")
        y += 24
    return _svg(_WIDTH, int(y) + 8, title, f"{title}. {said}. Modelled: {'; '.join(notes)}", "".join(parts))
