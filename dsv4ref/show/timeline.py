"""The orchestration chapters' pictures, as SVG: a server's steps under a cache key, and a step's fills.

The metadata timeline has one column per step, one row per request. A cell is filled as high as the request's last token
has KV entries, out of top-k; a chunk of a prompt is struck through. Below, the cache's verdict on the step: a bar where
the plan is made, a dot where it is reused, a cross where it is reused and wrong.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from dsv4ref import config
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Case
from dsv4ref.optimizations.metadata_cache import Verdict, verdicts
from dsv4ref.serving.metadata import KEYS
from dsv4ref.serving.traces import Lengths, decode_trace, prefill_trace, serving_trace
from dsv4ref.show.panels import COLOURS, GRID, bars

__all__ = ["TRACES", "fill_explorer", "metadata_timeline", "timeline"]

TRACES = ("decode", "prompt", "serving")
"""The traces that `metadata_timeline` can draw."""

_STEPS = 36
_REQUESTS = 5
_BLUE, _VERMILLION, _GREEN = COLOURS[:3]
_LEFT, _TOP, _ROW, _RIGHT = 84, 36, 22, 630
_WORDS: Mapping[Verdict, str] = {"plan": "planned", "reuse": "reused", "stale": "reused and wrong"}


def timeline(trace: Sequence[Lengths], verdict: Sequence[Verdict], topk: int, title: str) -> str:
    """Draw a trace with one verdict per step.

    Args:
        trace: the steps; a request keeps its place in the batch.
        verdict: "plan", "reuse" or "stale" per step.
        topk: entries that a token attends to at most; a full cell.
        title: what the picture says; also begins the alternative text.

    Returns:
        an ``<svg>`` element.

    Raises:
        ValueError: no steps, or another number of verdicts.
    """
    if not trace or len(trace) != len(verdict):
        raise ValueError(f"verdict: got {len(verdict)} for {len(trace)} steps, expected one per step, at least one")
    requests = max(len(step.query) for step in trace)
    wide = (_RIGHT - _LEFT) / len(trace)
    below = _TOP + requests * _ROW
    parts = [_text(_LEFT - 8, _TOP + row * _ROW + 15, f"request {row}", "end") for row in range(requests)]
    for at, (step, mark) in enumerate(zip(trace, verdict, strict=True)):
        x = _LEFT + at * wide
        for row, (query, seq) in enumerate(zip(step.query, step.seq, strict=True)):
            parts.append(_cell(x, _TOP + row * _ROW, wide, min(seq, topk) / topk, chunk=query > 1))
        parts.append(_mark(x + wide / 2, below + 16, mark))
    parts.append(_text(_LEFT - 8, below + 20, "plan", "end"))
    parts.append(_text(_LEFT, below + 42, f"step 0 to {len(trace) - 1}; a full cell is {topk:,} entries or more"))
    x = _LEFT
    for name in _WORDS:
        parts.append(_mark(x + 6, below + 60, name) + _text(x + 18, below + 64, _WORDS[name]))
        x += 34 + 8 * len(_WORDS[name])
    parts.append(_cell(x, below + 51, 16, 1.0, chunk=True) + _text(x + 22, below + 64, "chunk of a prompt"))
    counts = Counter(verdict)
    said = ", ".join(f"{counts[name]} {_WORDS[name]}" for name in _WORDS)
    label = html.escape(f"{title}. {len(trace)} steps of {requests} requests: {said}.", quote=True)
    return (
        f'<svg viewBox="0 0 640 {below + 76}" role="img" aria-label="{label}" font-family="sans-serif" font-size="13" '
        'fill="currentColor" style="width:100%;max-width:640px;height:auto">'
        f'<text x="8" y="20" font-weight="bold">{html.escape(f"{title}: {said}")}</text>{"".join(parts)}</svg>'
    )


def metadata_timeline(trace: str = "decode", key: str = "lengths", context: int = 2030) -> str:
    """A server's steps under one cache key, top-k 2048.

    Args:
        trace: "decode" (five requests, lengths 4 apart), "prompt" (one of 22,000 tokens in chunks of 8192, beside no
            other, then decode) or "serving" (requests of 24 tokens' answer finish and are replaced).
        key: one of `serving.metadata.KEYS`.
        context: tokens that the first request (or every prompt, for "serving") holds at the start.

    Raises:
        ValueError: an unknown trace or key.
    """
    if key not in KEYS:
        raise ValueError(f"key: got {key!r}, expected one of {list(KEYS)}")
    topk = config.V3_2.index_topk
    if trace == "decode":
        steps = decode_trace([max(context - 4 * row, 0) for row in range(_REQUESTS)], _STEPS)
    elif trace == "prompt":
        chunks = prefill_trace(22_000, 8192)
        steps = [*chunks, *decode_trace([22_000], _STEPS - len(chunks))]
    elif trace == "serving":
        prompt = max(context, 1)
        steps = serving_trace(slots=_REQUESTS, prompt=prompt, output=24, budget=_REQUESTS * prompt, steps=_STEPS)
    else:
        raise ValueError(f"trace: got {trace!r}, expected one of {list(TRACES)}")
    return timeline(steps, verdicts(steps, topk, KEYS[key]), topk, f"Key {key!r}, {trace}")


def fill_explorer(
    before: int = 64, tokens: int = 64, max_tokens: int = 8192, topk: int = 2048, device: str = "mi355x"
) -> str:
    """Modelled microseconds of one step's fills and writes, filling everything and filling the tail.

    Args:
        before, tokens: query tokens of the previous step and of this one, at most `max_tokens`.
        max_tokens: tokens that the buffers hold.
        topk: KV indices per token.
        device: key of a device with published figures.
    """
    shapes = ((before, 1), (tokens, 1))
    params = {"shapes": shapes, "max_tokens": max_tokens, "topk": topk, "lengths": (topk, topk)}
    p = catalogue.get("shrink_tail_fill").predict(Case("explored", params), device)
    assert p.baseline_us is not None
    assert p.optimized_us is not None
    items = {
        f"everything, {p.baseline_launches} launches": p.baseline_us,
        f"the tail, {p.optimized_launches} launches": p.optimized_us,
    }
    return bars(items, title=f"Modelled, {before} then {tokens} tokens, {device}", unit="us")


def _cell(x: float, y: float, wide: float, share: float, *, chunk: bool) -> str:
    tall = (_ROW - 6) * share
    frame = (
        f'<rect x="{x + 1:.1f}" y="{y + 3}" width="{wide - 2:.1f}" height="{_ROW - 6}" fill="none" stroke="{GRID}"/>'
    )
    body = (
        f'<rect x="{x + 1:.1f}" y="{y + 3 + _ROW - 6 - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}" '
        f'fill="{_BLUE}" fill-opacity="{0.9 if share == 1 else 0.4}"/>'
    )
    strike = (
        f'<line x1="{x + 1:.1f}" y1="{y + _ROW - 3}" x2="{x + wide - 1:.1f}" y2="{y + 3}" '
        'stroke="currentColor" stroke-width="2"/>'
    )
    return frame + body + (strike if chunk else "")


def _mark(x: float, y: float, verdict: str) -> str:
    if verdict == "plan":
        return f'<rect x="{x - 3:.1f}" y="{y - 8}" width="6" height="16" fill="{_BLUE}"/>'
    if verdict == "reuse":
        return f'<circle cx="{x:.1f}" cy="{y}" r="3" fill="{_GREEN}"/>'
    arms = f"M{x - 4:.1f},{y - 4}l8,8m0,-8l-8,8"
    return f'<path d="{arms}" stroke="{_VERMILLION}" stroke-width="3" fill="none"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
