"""A picture of the expert layer's launches: three ways to run it, and where the modelled time goes."""

from __future__ import annotations

from dsv4ref.config import V4_FLASH
from dsv4ref.optimizations import decode_model, expert_traffic
from dsv4ref.show.panels import COLOURS, _svg, _svg_line, _svg_text

__all__ = ["launch_explorer"]

_WIDTH, _LEFT, _PLOT = 640, 90.0, 530.0
_COLOURS = {
    "W1": COLOURS[0],
    "gather to token order": COLOURS[1],
    "gather to expert order": COLOURS[1],
    "clamped SwiGLU": COLOURS[2],
    "W2 by slot": COLOURS[4],
    "weighted sum": COLOURS[5],
    "W2 and sum": COLOURS[3],
}
_LEGEND = {
    "W1": "W1",
    "gather to token order": "gathers",
    "clamped SwiGLU": "clamped SwiGLU",
    "W2 by slot": "W2 by slot",
    "weighted sum": "weighted sum",
    "W2 and sum": "W2 and sum, owned",
}


def launch_explorer(rows: int = 1024, ranks: int = 2, device: str = "mi300x") -> str:
    """The launches of the three paths as bars of modelled time, V4-Flash.

    Args:
        rows: M, 1 or more.
        ranks: ranks that share the 256 experts.
        device: whose published figures the model takes.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: no row, ranks that do not divide the experts, or a device without figures.
    """
    router = V4_FLASH.router
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    if ranks < 1 or router.n_experts % ranks:
        raise ValueError(f"ranks: got {ranks}, expected a divisor of {router.n_experts}")
    spec = decode_model.spec_for(device)
    if spec is None:
        raise ValueError(f"device: got {device!r}, expected one with published bandwidth and matrix rate")
    p = {
        "rows": rows, "experts": router.n_experts, "ranks": ranks, "top_k": router.top_k,
        "hidden": V4_FLASH.hidden_size, "inner": V4_FLASH.moe_inter_dim,
    }  # fmt: skip
    paths = {path: expert_traffic.steps(path, p, spec.arch) for path in expert_traffic.PATHS}
    times = {path: [expert_traffic.step_time_us(s, spec) for s in found] for path, found in paths.items()}
    longest = max(sum(one) for one in times.values())
    parts, said = [], []
    for at, (path, found) in enumerate(paths.items()):
        y, x = 40.0 + 34 * at, _LEFT
        parts.append(_svg_text(8, y + 16, path))
        for step, time in zip(found, times[path], strict=True):
            wide = _PLOT * time / longest
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.2f}" height="22" fill="{_COLOURS[step.name]}" stroke="white" '
                f'stroke-width="0.6"><title>{step.name}: {time:.1f} us</title></rect>'
            )
            x += wide
        gigabytes = sum(s.moved for s in found) / 1e9
        said.append(f"{path}: {len(found)} launches, {sum(times[path]):.0f} us, {gigabytes:.2f} GB moved")
    for at, (name, shown) in enumerate(_LEGEND.items()):
        x, y = _LEFT + 180 * (at % 3), 158.0 + 20 * (at // 3)
        parts.append(_svg_line(x, y - 4, x + 14, y - 4, _COLOURS[name], 'stroke-width="8"'))
        parts.append(_svg_text(x + 20, y, shown))
    parts += [_svg_text(8, 206 + 18 * at, line) for at, line in enumerate(said)]
    title = (
        f"One layer's routed experts, M = {rows}, {router.n_experts // ranks} experts on the rank, {spec.name}: a model"
    )
    return _svg(_WIDTH, 252, title, f"{title}. {'. '.join(said)}", "".join(parts))
