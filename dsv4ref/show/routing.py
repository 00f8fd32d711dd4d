"""Pictures of expert routing: who computes which token, right and wrong, and how a batch loads experts and ranks.

Both return SVG with alternative text, like `panels.bars`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4ref.optimizations.routing_eager import load_facts, loads
from dsv4ref.show.panels import COLOURS, GRID, _svg, _svg_line, _svg_text

__all__ = ["assignment_pair", "routing_explorer"]

_RIGHT, _WRONG = COLOURS[0], COLOURS[1]
_WIDTH = 640


def assignment_pair(right: Tensor, wrong: Tensor, *, rank_sizes: Sequence[int], title: str) -> str:
    """Token x expert, right on the left and with a bug on the right, as SVG.

    Filled squares are pairs that are computed: blue where the router asked for them, vermillion where it did not (or
    asked for fewer). A hollow square was asked for and is computed by nobody. Thin lines part the ranks.

    Args:
        right, wrong: integer ``[M, E]``, how often each expert computes each token.
        rank_sizes: experts of each rank of a linear placement; they add up to E.
        title: what went wrong; also begins the alternative text.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: shapes that differ, or rank sizes that do not add up.
    """
    if right.shape != wrong.shape or right.dim() != 2:
        raise ValueError(f"wrong: got shape {tuple(wrong.shape)}, expected {tuple(right.shape)}, [M, E] like right")
    rows, experts = right.shape
    if sum(rank_sizes) != experts:
        raise ValueError(f"rank_sizes: got {list(rank_sizes)}, expected sizes that add up to {experts}")
    cell = min(9.0, 290 / experts, 330 / max(rows, 1))
    asked, stray = right > 0, wrong > right
    missing = asked & (wrong < right)
    parts = []
    for panel, (x, label) in enumerate(((24.0, "right"), (340.0, "with the bug"))):
        shown = right if panel == 0 else wrong
        parts.append(_svg_text(x, 40, label))
        for token in range(rows):
            for expert in range(experts):
                at = f'x="{x + expert * cell:.1f}" y="{46 + token * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}"'
                if panel and missing[token, expert] and not shown[token, expert]:
                    parts.append(f'<rect {at} fill="none" stroke="{_RIGHT}" stroke-width="0.8"/>')
                elif shown[token, expert]:
                    colour = _WRONG if panel and stray[token, expert] else _RIGHT
                    parts.append(f'<rect {at} fill="{colour}"/>')
        edge = 0
        for size in (0, *rank_sizes):
            edge += size
            parts.append(_svg_line(x + edge * cell, 46, x + edge * cell, 46 + rows * cell, GRID, 'stroke-width="0.8"'))
    bottom = 46 + rows * cell
    more, fewer = (int(difference.clamp(min=0).sum()) for difference in (wrong - right, right - wrong))
    facts = (
        f"{int(right.sum())} pairs asked for; with the bug {int(wrong.sum())} are computed, "
        f"{more} of them stray, and {fewer} missing"
    )
    parts.append(_svg_text(24, bottom + 18, f"{rows} tokens down, {experts} experts across"))
    parts.append(_svg_text(24, bottom + 36, facts))
    return _svg(
        _WIDTH, round(bottom + 46), title, f"{title}. {rows} tokens x {experts} experts: {facts}", "".join(parts)
    )


def routing_explorer(
    experts: int = 256, top_k: int = 6, rows: int = 64, skew: float = 0.5, ranks: int = 8, block_m: int = 16
) -> str:
    """Tokens per expert for one drawn batch, coloured by rank, and what they mean for ranks and tiles, as SVG.

    Args:
        experts, top_k, rows: E, k and M.
        skew: exponent of the experts' popularity, 0 for equal.
        ranks: of a linear placement; neighbours alternate in colour.
        block_m: rows of a tile.
    """
    counts = loads(experts, top_k, rows, skew)
    facts = load_facts(counts, ranks, block_m)
    top = max(1.0, facts["largest"])
    left, wide, base, high = 40.0, 580.0 / experts, 190.0, 140.0
    parts = [_svg_line(left, base, left + 580, base, GRID), _svg_text(left - 6, base - high + 4, f"{top:.0f}", "end")]
    parts.append(_svg_text(left - 6, base + 4, "0", "end"))
    at = 0
    for rank, mine in enumerate(counts.tensor_split(ranks)):
        for count in mine.tolist():
            tall = high * count / top
            parts.append(
                f'<rect x="{left + at * wide:.1f}" y="{base - tall:.1f}" width="{wide * 0.9:.2f}" '
                f'height="{tall:.1f}" fill="{COLOURS[rank % 2]}"/>'
            )
            at += 1
    level = base - high * facts["mean"] / top
    parts.append(_svg_line(left, level, left + 580, level, GRID, 'stroke-dasharray="4 3"'))
    said = (
        f"tokens per expert: mean {facts['mean']:.3g} (dashed), largest {facts['largest']:.0f}, {facts['empty']:.0f} "
        f"experts without one",
        f"busiest of {ranks} ranks: {facts['busiest rank']:.2f} times the mean",
        f"tiles of {block_m} rows: {facts['tiles']:.0f} needed, {100 * facts['filled']:.0f} % of their rows filled, "
        f"{facts['reserved']:.0f} in the ranks' grids",
    )
    parts += [_svg_text(8, base + 24 + 20 * i, line) for i, line in enumerate(said)]
    title = f"{rows} tokens, top {top_k} of {experts} experts, skew {skew:g}"
    return _svg(_WIDTH, 270, title, f"{title}. {'. '.join(said)}", "".join(parts))
