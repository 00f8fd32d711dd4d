"""The decode step in pictures: one page with every stage and the chapters that change it, and where its time must go.

Everything drawn here is a prediction from published peaks (`dsv4ref.optimizations.step_model`) or a list of chapters
(`dsv4ref.optimizations.catalogue`); nothing is measured.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from dsv4ref.config import V4_FLASH, ModelConfig, get_model
from dsv4ref.device import get_device
from dsv4ref.optimizations import catalogue, step_model
from dsv4ref.optimizations.step_model import STAGES
from dsv4ref.show import panels, plots

__all__ = ["PLANNED", "chapter_rows", "step_diagram", "step_explorer", "time_bars"]

PLANNED: Mapping[int, str] = MappingProxyType(
    {
        3: "Expert routing",
        4: "Static decode metadata",
        7: "Full-window top-k",
        9: "Persistent decode",
        10: "Graph-clean scratch",
        11: "FP8 gather",
        12: "Direct W2 reduce",
        13: "MoE tiles",
        14: "Router dtype",
        15: "Metadata cache",
        16: "Shrink-tail fill",
        18: "Split-K decode",
        19: "Fused inverse RoPE",
    }
)
"""What a chapter is to be about, by number, for those that the catalogue may not have yet."""

_GROUPS = tuple(dict.fromkeys(stage.group for stage in STAGES.values()))
COLOURS: Mapping[str, str] = MappingProxyType(dict(zip(_GROUPS, (plots.GREY, *plots.COLOURS), strict=True)))
"""One colour per group of stages."""
_HATCHES = dict(zip(_GROUPS, ("", *plots.HATCHES), strict=True))


def chapter_rows() -> list[dict[str, Any]]:
    """Every chapter that changes a stage: its number, title, whether it is written, and the stages.

    Returns:
        Rows ``{"chapter", "title", "status", "stages"}`` in order of the numbers; status is "in this book" or
        "planned".
    """
    written = {chapter.number: chapter.title for chapter in catalogue.load().values()}
    numbers = sorted({number for stage in STAGES.values() for number in stage.chapters})
    return [
        {
            "chapter": f"{number:02d}",
            "title": written.get(number) or PLANNED[number],
            "status": "in this book" if number in written else "planned",
            "stages": [stage.name for stage in STAGES.values() if number in stage.chapters],
        }
        for number in numbers
    ]


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Box:
    """One box of the page: the stages it stands for, where it is, and its two lines of text."""

    stages: tuple[str, ...]
    x: int
    y: int
    width: int
    height: int
    title: str
    detail: str


def step_diagram(model: ModelConfig = V4_FLASH, link: Callable[[str], str] | None = None) -> str:
    """The whole decode step on one page, each stage with the numbers of the chapters that change it, as SVG.

    Args:
        model: whose widths are shown.
        link: file name of a chapter's notebook -> URL, where numbers are to be links; an empty URL is none.

    Returns:
        an ``<svg>`` element that takes its text colour from the page and describes itself to screen readers. Chapters
        of the catalogue that change no single stage stand beside the first one.
    """
    pages = {chapter.number: chapter.notebook for chapter in catalogue.load().values()}
    placed = {number for stage in STAGES.values() for number in stage.chapters}
    whole = sorted(set(pages) - placed)
    parts = [_whole(whole, pages, link)] if whole else []
    parts += [_frame(10, 92, 840, 458, f"{model.n_layers} layers, each:"), _frame(20, 118, 570, 420, "attention half")]
    parts += [_frame(602, 118, 238, 420, "experts half"), *map(_arrow, _ARROWS)]
    for box in _boxes(model):
        parts.append(_drawn_box(box, pages, link))
    parts.append(_legend(pages))
    said = f"One decode step of {model.name}. " + "; ".join(
        f"{stage.name}: {stage.about}"
        + (f" (chapters {', '.join(map(str, stage.chapters))})" if stage.chapters else "")
        for stage in STAGES.values()
    )
    if whole:
        said += f"; chapters of no single stage: {', '.join(map(str, whole))}"
    role = "group" if link else "img"  # what is inside an image cannot be reached
    return (
        f'<svg viewBox="0 0 860 690" role="{role}" aria-label="{html.escape(said, quote=True)}" '
        'font-family="sans-serif" font-size="13" fill="currentColor" style="width:100%;max-width:860px;height:auto">'
        + "".join(parts)
        + "</svg>"
    )


def _whole(numbers: Sequence[int], pages: Mapping[int, str], link: Callable[[str], str] | None) -> str:
    """The chapters that are about the step as a whole, in the free place right of the first stage."""
    pills = [_pill(842 - 27 * (len(numbers) - i), 52, number, pages[number], link) for i, number in enumerate(numbers)]
    return f'<text x="842" y="46" font-size="12" text-anchor="end">chapters of no single stage:</text>{"".join(pills)}'


def _boxes(m: ModelConfig) -> tuple[_Box, ...]:
    D, n, G = m.hidden_size, m.hc_mult, m.o_groups
    heads, k, E = f"{m.n_heads} x {m.head_dim}", m.router.top_k, m.router.n_experts
    mixes = (2 + n) * n
    return (
        _Box(("embed",), 30, 30, 250, 44, "embed", f"token → {n} equal streams [T, {n}, {D}]"),
        _Box(("hc_pre_attn", "attn_norm"), 30, 142, 550, 44, "mHC pre, RMSNorm",
             f"{n * D} → {mixes} mixing weights, Sinkhorn; {n} streams → x [T, {D}]"),
        _Box(("wq_a", "q_norm"), 30, 214, 130, 50, "wq_a, norm", f"{D} → {m.q_lora_rank}"),
        _Box(("wq_b", "q_rope"), 30, 292, 130, 50, "wq_b, norm, RoPE", f"{m.q_lora_rank} → {heads}"),
        _Box(("wkv",), 170, 214, 130, 50, "wkv", f"{D} → {m.head_dim}, K = V"),
        _Box(("kv_insert",), 170, 292, 130, 50, "KV insert", "FP8: 584 bytes"),
        _Box(("compressor",), 310, 214, 130, 128, "compressor", "C4 and C128 layers:"),
        _Box(("index_k", "index_q", "index_weights"), 450, 214, 130, 50, "index q, k, w",
             f"C4 layers: {m.index_n_heads} x {m.index_head_dim}"),
        _Box(("index_logits", "topk"), 450, 292, 130, 50, "scores, top-k", f"best {m.index_topk} entries"),
        _Box(("attention",), 30, 370, 550, 50, "sparse attention, sink",
             f"{heads} over {m.window_size} window keys and the chosen entries"),
        _Box(("inverse_rope",), 30, 440, 130, 44, "inverse RoPE", "at the query's p"),
        _Box(("wo_a",), 184, 440, 186, 44, "wo_a", f"{G} x ({m.wo_a_input_width} → {m.o_lora_rank})"),
        _Box(("wo_b",), 394, 440, 186, 44, "wo_b", f"{G * m.o_lora_rank} → {D}"),
        _Box(("hc_post_attn",), 30, 500, 550, 30, "mHC post", f"post · y + {n} x {n} mixture of the streams"),
        _Box(("hc_pre_ffn", "ffn_norm"), 612, 142, 218, 44, "mHC pre, RMSNorm", f"as before: x [T, {D}]"),
        _Box(("router",), 612, 214, 218, 50, "router", f"{E} scores, {k} by score or token"),
        _Box(("routed_experts",), 612, 292, 134, 128, "routed experts", f"{k} of {E}, FP4"),
        _Box(("shared_expert",), 756, 292, 74, 128, "shared", "expert"),
        _Box(("hc_post_ffn",), 612, 500, 218, 30, "mHC post", ""),
        _Box(("head_collapse", "final_norm"), 420, 580, 200, 44, "collapse, RMSNorm", f"{n} streams → {D}"),
        _Box(("lm_head",), 640, 580, 190, 44, "lm_head", f"{D} → {m.vocab_size} logits"),
    )  # fmt: skip


_ARROWS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((155, 74), (155, 142)),
    *(((x, 186), (x, 214)) for x in (95, 235, 375, 515)),
    *(((x, 264), (x, 292)) for x in (95, 235, 515)),
    *(((x, 342), (x, 370)) for x in (95, 235, 375, 515)),
    ((95, 420), (95, 440)),
    ((160, 462), (184, 462)),
    ((370, 462), (394, 462)),
    ((487, 484), (487, 500)),
    ((580, 515), (596, 515), (596, 164), (612, 164)),
    ((721, 186), (721, 214)),
    ((679, 264), (679, 292)),
    ((830, 164), (836, 164), (836, 278), (793, 278), (793, 292)),
    ((679, 420), (679, 500)),
    ((793, 420), (793, 500)),
    ((721, 530), (721, 564), (520, 564), (520, 580)),
    ((620, 602), (640, 602)),
)


def _frame(x: int, y: int, width: int, height: int, label: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="none" stroke="{plots.GREY}" '
        f'stroke-dasharray="3 4"/><text x="{x + 10}" y="{y + 18}" font-size="12" font-style="italic">{label}</text>'
    )


def _arrow(points: Sequence[tuple[int, int]]) -> str:
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    head = f"{x1},{y1} {x1 - 6 * dx - 4 * dy},{y1 - 6 * dy - 4 * dx} {x1 - 6 * dx + 4 * dy},{y1 - 6 * dy + 4 * dx}"
    line = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{line}" fill="none" stroke="{plots.GREY}" stroke-width="1.5"/>'
        f'<polygon points="{head}" fill="{plots.GREY}"/>'
    )


def _drawn_box(box: _Box, pages: Mapping[int, str], link: Callable[[str], str] | None) -> str:
    colour = COLOURS[STAGES[box.stages[0]].group]
    lines = [box.detail]
    if box.stages == ("compressor",):  # the one box with room and need for more
        lines += ["an entry per 4 or", "128 tokens, RoPE,", "FP8: 584 bytes", "→ compressed cache"]
    parts = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="5" fill="{colour}" '
        f'fill-opacity="0.16" stroke="{colour}" stroke-width="1.5"/>',
        f'<text x="{box.x + 8}" y="{box.y + 18}" font-weight="bold">{html.escape(box.title)}</text>',
    ]
    if box.height <= 30:
        parts.append(f'<text x="{box.x + 80}" y="{box.y + 18}" font-size="11.5">{html.escape(box.detail)}</text>')
    else:
        parts += [
            f'<text x="{box.x + 8}" y="{box.y + 34 + 16 * i}" font-size="11.5">{html.escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
    numbers = sorted({number for stage in box.stages for number in STAGES[stage].chapters})
    high = 4 if box.height > 100 else 1  # pills above one another where a box is narrow and tall
    right = box.x + box.width - 6
    for i, number in enumerate(reversed(numbers)):
        column, line = (0, i) if high > 1 else (i, 0)
        y = box.y + box.height - 20 - 18 * line if high > 1 else box.y + 6
        parts.append(_pill(right - 24 - 27 * column, y, number, pages.get(number), link))
    return "".join(parts)


def _pill(x: float, y: float, number: int, page: str | None, link: Callable[[str], str] | None) -> str:
    """A chapter's number: filled where the chapter is written, outlined where it is planned."""
    fill, ink = (plots.BLUE, "#ffffff") if page else ("none", "currentColor")
    pill = (
        f'<rect x="{x}" y="{y}" width="24" height="15" rx="7" fill="{fill}" stroke="{plots.BLUE}"/>'
        f'<text x="{x + 12}" y="{y + 11.5}" font-size="11" text-anchor="middle" fill="{ink}">{number:02d}</text>'
    )
    url = link(page) if page and link else ""
    says = f"chapter {number:02d}"
    return f'<a href="{html.escape(url, quote=True)}" aria-label="{says}">{pill}</a>' if url else pill


def _legend(pages: Mapping[int, str]) -> str:
    numbers = sorted({number for stage in STAGES.values() for number in stage.chapters})
    parts, x = [], 16
    for group, colour in COLOURS.items():
        parts.append(
            f'<rect x="{x}" y="643" width="14" height="14" rx="3" fill="{colour}" fill-opacity="0.35" '
            f'stroke="{colour}"/><text x="{x + 19}" y="655" font-size="12">{group}</text>'
        )
        x += 34 + 7 * len(group)
    written = next((number for number in numbers if number in pages), None)
    planned = next((number for number in numbers if number not in pages), None)
    x = 16
    for number, says in ((written, "a chapter of this book"), (planned, "a planned one")):
        if number is not None:
            parts.append(_pill(x, 667, number, pages.get(number), None))
            parts.append(f'<text x="{x + 30}" y="679" font-size="12">{says}</text>')
            x += 200
    return "".join(parts)


# --- where time must go ----------------------------------------------------------------------------------------------


def time_bars(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """What share of a step's bound each group of stages has, one bar per case, one pair of axes per device.

    Args:
        rows: ``device, case`` and ``times`` (group -> microseconds, as `step_model.group_times_us`), one per bar.
        title: what is predicted.

    Returns:
        a figure with a description; the total stands behind each bar.

    Raises:
        ValueError: no rows, a missing key, or a group that is not drawn.
    """
    if not rows:
        raise ValueError("rows: got none, expected at least one row to draw")
    for position, row in enumerate(rows):
        missing = [key for key in ("device", "case", "times") if key not in row]
        if missing:
            raise ValueError(f"rows[{position}]: no {', '.join(missing)}; it has {', '.join(map(str, row))}")
        if unknown := set(row["times"]) - set(_GROUPS):
            raise ValueError(f"rows[{position}]: unknown groups {sorted(unknown)}, expected {', '.join(_GROUPS)}")
    devices = list(dict.fromkeys(row["device"] for row in rows))
    most = max(sum(row["device"] == device for row in rows) for device in devices)
    with plots.style():
        fig = Figure(figsize=(7.5, 1.3 + len(devices) * (0.7 + 0.27 * most)), layout="constrained")
        for ax, device in zip(fig.subplots(len(devices), 1, squeeze=False)[:, 0], devices, strict=True):
            mine = [row for row in rows if row["device"] == device]
            left = [0.0] * len(mine)
            for group in _GROUPS:
                shares = [100 * row["times"].get(group, 0.0) / sum(row["times"].values()) for row in mine]
                ax.barh(
                    range(len(mine)), shares, left=left, height=0.8, color=COLOURS[group], hatch=_HATCHES[group],
                    label=group,
                )  # fmt: skip
                left = [start + share for start, share in zip(left, shares, strict=True)]
            for at, row in enumerate(mine):
                ax.annotate(_ms(row), (100, at), (5, 0), textcoords="offset points", va="center", size=9)
            ax.set_yticks(range(len(mine)), [row["case"] for row in mine])
            ax.invert_yaxis()
            ax.set_xlim(0, 112)
            ax.set_xticks(range(0, 101, 20))
            ax.grid(visible=False, axis="y")
            ax.set_title(device, size=11)
        ax.set_xlabel("share of the sum of the stages' bounds, %")
        fig.suptitle(title, x=0.01, ha="left", size=13)
        handles, labels = ax.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4)
    said = "; ".join(
        f"{row['device']}, {row['case']}: {_ms(row)}, most of it {max(row['times'], key=row['times'].__getitem__)}"
        for row in rows
    )
    fig.set_label(f"{title}. Predicted from published peaks, nothing measured. {said}.")
    return fig


def _ms(row: Mapping[str, Any]) -> str:
    return f"{sum(row['times'].values()) / 1e3:.3g} ms"


_BARS = 11


def step_explorer(
    rows: int = 64, context: int = 32768, device: str = "mi300x", model: str = "v4-flash", ranks: int = 1
) -> str:
    """The stages of one step with the longest bounds, as SVG.

    Args:
        rows: sequences in the step, of one rank.
        context: tokens of each.
        device: key of a device with published figures.
        model: "v4-flash" or "v4-pro".
        ranks: that share the routed experts; everything else is on every rank.
    """
    spec, config = get_device(device), get_model(model)
    step = step_model.rows(config, step_model.decode_tokens(config, rows, context), ep=ranks)
    times = step_model.stage_times_us(step, spec)
    ranked = sorted(times, key=lambda stage: -times[stage])
    items = {stage: times[stage] / 1e3 for stage in ranked[:_BARS]}
    items[f"the other {len(times) - len(items)}"] = sum(times[stage] for stage in ranked[_BARS:]) / 1e3
    total = sum(times.values()) / 1e3
    title = f"{model}, {rows} rows at {context:,}, {spec.name}: bounds add up to {total:.3g} ms"
    return panels.bars(items, title=title, unit="ms")
