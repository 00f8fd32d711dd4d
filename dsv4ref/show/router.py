"""A picture of what bf16 leaves of a router's correction bias."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4ref.optimizations.router_study import ROUTERS, bias_facts, changed, draw_bias
from dsv4ref.show.panels import COLOURS, GRID, _svg, _svg_line, _svg_text

__all__ = ["bias_explorer"]

_WIDTH, _LEFT, _PLOT = 640, 40.0, 580.0


def bias_explorer(
    offset: float = 7.0, spread: float = 0.02, experts: int = 256, router: str = "V3.2", rows: int = 400
) -> str:
    """Biases before and after rounding, how many experts share each bf16 value, and how many rows change experts.

    Args:
        offset, spread: mean and standard deviation of the biases.
        experts: E, a multiple of V3.2's 8 groups.
        router: "V3.2" (top 8 in groups, sigmoid) or "V4-Flash" (top 6, sqrt-softplus).
        rows: random tokens that are routed.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: a router of another name.
    """
    if router not in ROUTERS:
        raise ValueError(f"router: got {router!r}, expected one of {sorted(ROUTERS)}")
    bias = draw_bias(offset, spread, experts, 0)
    values, shared = bias.to(torch.bfloat16).float().unique(return_counts=True)
    facts = bias_facts(bias)
    moved = changed(replace(ROUTERS[router], n_experts=experts), offset, spread, rows)
    low = min(bias.min().item(), values.min().item())
    high = max(bias.max().item(), values.max().item())
    scale = _PLOT / (high - low)
    parts = [_svg_text(8, 44, "fp32, one line per expert"), _svg_text(8, 104, "bf16, experts per value")]
    for value in bias.tolist():
        x = _LEFT + (value - low) * scale
        parts.append(_svg_line(x, 54, x, 82, COLOURS[0], 'stroke-width="0.8" stroke-opacity="0.6"'))
    base, tall = 200.0, 80.0
    parts.append(_svg_line(_LEFT, base, _LEFT + _PLOT, base, GRID))
    for value, count in zip(values.tolist(), shared.tolist(), strict=True):
        x, height = _LEFT + (value - low) * scale, tall * count / int(shared.max())
        parts.append(f'<rect x="{x - 1.5:.1f}" y="{base - height:.1f}" width="3" height="{height:.1f}" '
                     f'fill="{COLOURS[1]}"/>')  # fmt: skip
    parts.append(_svg_text(_LEFT, base + 16, f"{low:.3f}"))
    parts.append(_svg_text(_LEFT + _PLOT, base + 16, f"{high:.3f}", "end"))
    said = (
        f"distinct biases: {facts['distinct in fp32']} in fp32, {facts['distinct in bf16']} in bf16 (steps of "
        f"{facts['bf16 spacing']:g}); up to {int(shared.max())} experts share a value",
        f"rows of {rows} that change experts, bias rounded: {100 * moved['bias']:.1f} %; logits rounded instead: "
        f"{100 * moved['logits']:.1f} %",
    )
    parts += [_svg_text(8, base + 40 + 20 * i, line) for i, line in enumerate(said)]
    title = f"{router} router, {experts} experts, biases {offset:g} ± {spread:g}"
    return _svg(_WIDTH, 276, title, f"{title}. {'. '.join(said)}", "".join(parts))
