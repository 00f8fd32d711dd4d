"""Chapter 16: clear only what the previous, larger step used, instead of filling three buffers in every step.

Baseline: req_id, indices and indptr are filled with zeros, then written. Optimised: `serving.tail_fill.TailFilled`
clears the tokens between the new extent and the previous one, and nothing while the batch does not shrink.

The two are equal where somebody may look, and differ in the gap between the last live index and the extent. The gate
compares everything but the gap with an oracle that builds each step's buffers from nothing, and what a reader of all
captured rows gets from them.

Source: vllm#42982 (the optimisation; its review found the uninitialised buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref import config, device
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.serving.tail_fill import TailFilled

__all__ = ["GAP", "LAUNCH_US", "OPTIMIZATION", "FillInputs", "FillStep", "observed", "replay", "written_by"]

LAUNCH_US = 2.0
"""Assumed cost of one small launch inside a graph, microseconds, as in chapter 06."""

GAP = -1
"""What stands in the compared outputs where an index may hold anything, and behind a row that has ended."""

_FILLS = ("req_id", "indices", "indptr")
_WRITES = {"copy req_id": 1, "cumulative sum into indptr": 2, "flatten the rest of indptr": 2}
"""Operators of `TailFilled.write`, and the launches of each on a GPU, counted on an H200: the sum prepares itself, and
the number that the rest is filled with is copied first. On a CPU an operator counts as one."""


@dataclass(frozen=True)
class FillStep:
    """One step: requests ``[T]`` and lengths ``[T]`` of its tokens, and its KV indices ``[sum of lengths]``; int32."""

    requests: int
    req_id: Tensor
    lengths: Tensor
    indices: Tensor

    @property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return self.req_id.numel()


@dataclass(frozen=True)
class FillInputs:
    """Successive steps over one set of buffers for `max_tokens` tokens of at most `topk` indices."""

    steps: tuple[FillStep, ...]
    max_tokens: int
    topk: int

    @property
    def rows(self) -> int:
        """Rows that a captured reader reads in every step: as many as the largest step has tokens."""
        return max(step.tokens for step in self.steps)


def _whole(generator: torch.Generator, low: int, high: int, size: int) -> Tensor:
    return torch.randint(low, high + 1, (size,), generator=generator, dtype=torch.int32)


def _shapes(params: Mapping[str, Any], generator: torch.Generator) -> list[tuple[int, int]]:
    """(requests, query tokens of each) per step; drawn ones are one chunk in four, else decode, now and then nobody."""
    if params["shapes"] != "random":
        return list(params["shapes"])
    sizes, kinds = (_whole(generator, 0, high, params["steps"]).tolist() for high in (params["max_tokens"], 3))
    return [(size, 1) if kind else (1, size) for size, kind in zip(sizes, kinds, strict=True)]


def _build(case: Case, device: str, seed: int) -> FillInputs:
    p = case.params
    generator = torch.Generator().manual_seed(seed)
    shortest, longest = p["lengths"]
    steps = []
    for requests, query in _shapes(p, generator):
        tokens = requests * query
        req_id = torch.arange(requests, dtype=torch.int32).repeat_interleave(query)
        lengths = _whole(generator, shortest, longest, tokens)
        # Never 0: a stale index must not look like a cleared one.
        indices = _whole(generator, 1, 2**20, int(lengths.sum()))
        steps.append(FillStep(requests, req_id.to(device), lengths.to(device), indices.to(device)))
    return FillInputs(tuple(steps), p["max_tokens"], p["topk"])


# --- what may be seen ---


def observed(buffers: TailFilled, step: FillStep, rows: int, *, to_the_stride: bool = False) -> dict[str, Tensor]:
    """What may be seen of the buffers after a step.

    Args:
        buffers: after the step's `write` and indices.
        step: the step.
        rows: rows that a captured reader reads.
        to_the_stride: read `topk` indices per row, wherever the row ends: what no reader may do.

    Returns:
        ``req_id`` and ``indptr`` whole, ``indices`` with the gap masked, and ``read`` int32 ``[rows, topk]``: the
        indices that each row's reader gets, `GAP` behind a row's end.
    """
    indices = buffers.indices.clone()
    indices[step.indices.numel() : step.tokens * buffers.topk] = GAP
    begin, end = buffers.indptr[:rows, None].long(), buffers.indptr[1 : rows + 1, None].long()
    at = begin + torch.arange(buffers.topk, device=begin.device)
    mine = at < (begin + buffers.topk if to_the_stride else end)
    read = torch.where(mine, buffers.indices[at.clamp(max=buffers.indices.numel() - 1)], GAP)
    return {"req_id": buffers.req_id.clone(), "indptr": buffers.indptr.clone(), "indices": indices, "read": read}


Prepare = Callable[[TailFilled, FillStep], None]


def replay(
    inputs: FillInputs,
    prepare: Prepare,
    *,
    buffers: TailFilled | None = None,
    to_the_stride: bool = False,
) -> dict[str, Tensor]:
    """Run the steps over one set of buffers and stack what may be seen after each.

    Args:
        inputs: the steps.
        prepare: clears the buffers before a step is written.
        buffers: fresh ones by default.
        to_the_stride: as in `observed`.
    """
    where = inputs.steps[0].req_id.device
    buffers = buffers or TailFilled(inputs.max_tokens, inputs.topk, where)
    seen: dict[str, list[Tensor]] = {}
    for step in inputs.steps:
        prepare(buffers, step)
        buffers.write(step.req_id, step.lengths)
        buffers.indices[: step.indices.numel()].copy_(step.indices)
        for name, value in observed(buffers, step, inputs.rows, to_the_stride=to_the_stride).items():
            seen.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in seen.items()}


def _fill_everything(buffers: TailFilled, step: FillStep) -> None:
    _fill_all(buffers)
    buffers._tokens = step.tokens  # instead of `prepare`, which would clear the tail


def _fill_all(buffers: TailFilled) -> None:
    for name in _FILLS:
        getattr(buffers, name).zero_()


def _fill_the_tail(buffers: TailFilled, step: FillStep) -> None:
    buffers.prepare(step.tokens)


def _baseline(inputs: FillInputs) -> dict[str, Tensor]:
    return replay(inputs, _fill_everything)


def _optimized(inputs: FillInputs) -> dict[str, Tensor]:
    return replay(inputs, _fill_the_tail)


def _reference(inputs: FillInputs) -> dict[str, Tensor]:
    """Each step from nothing, token by token, with Python's lists; no buffer outlives a step."""
    seen: dict[str, list[Tensor]] = {"req_id": [], "indptr": [], "indices": [], "read": []}
    for step in inputs.steps:
        lengths, live = step.lengths.tolist(), step.indices.cpu()
        req_id, indptr = torch.zeros(inputs.max_tokens, dtype=torch.int32), [0]
        indices = torch.zeros(inputs.max_tokens * inputs.topk, dtype=torch.int32)
        read = torch.full((inputs.rows, inputs.topk), GAP, dtype=torch.int32)
        for token, length in enumerate(lengths):
            req_id[token] = int(step.req_id[token])
            read[token, :length] = live[indptr[-1] : indptr[-1] + length]
            indptr.append(indptr[-1] + length)
        indices[: len(live)] = live
        indices[len(live) : len(lengths) * inputs.topk] = GAP
        indptr += [indptr[-1]] * (inputs.max_tokens - len(lengths))
        whole = (req_id, torch.tensor(indptr, dtype=torch.int32), indices, read)
        for name, value in zip(seen, whole, strict=True):
            seen[name].append(value)
    return {name: torch.stack(values) for name, values in seen.items()}


def _timed(inputs: FillInputs) -> Mapping[str, Callable[[], object]]:
    """The last step after the one before it: both sides fill, then write; the KV indices are other kernels' work."""
    before, step = inputs.steps[-2:]
    buffers = TailFilled(inputs.max_tokens, inputs.topk, step.req_id.device)
    buffers.prepare(step.tokens)

    def full() -> None:
        _fill_all(buffers)
        buffers.write(step.req_id, step.lengths)

    def tail() -> None:
        buffers.clear(step.tokens, before.tokens)
        buffers.write(step.req_id, step.lengths)

    return {"baseline": full, "optimized": tail}


def written_by(tokens: int, most: int) -> tuple[str, ...]:
    """The operators of a step's `TailFilled.write` that have something to write.

    Args:
        tokens, most: of the step, and of the largest step there may be.
    """
    copied, summed, flattened = _WRITES
    return (*((copied, summed) if tokens else ()), *((flattened,) if tokens < most else ()))


def _predict(case: Case, device_key: str) -> Prediction:
    """The last step of a case, after the one before it."""
    p = case.params
    shapes = _shapes(p, torch.Generator().manual_seed(0))
    before, tokens = (requests * query for requests, query in shapes[-2:])
    most, topk = p["max_tokens"], p["topk"]
    written = 4 * (2 * tokens + 2 * tokens + most - tokens)
    filled = 4 * (most + most * topk + most + 1)
    cleared = 4 * max(before - tokens, 0) * (1 + topk)
    writes = sum(_WRITES[name] for name in written_by(tokens, most))
    spec = device.KNOWN_DEVICES.get(device_key)
    baseline_us = optimized_us = bound_us = None
    fills = len(_FILLS[:2]) if cleared else 0
    if spec is not None and spec.bandwidth_tb_s is not None:
        per_us = spec.bandwidth_tb_s * 1e6
        baseline_us = (len(_FILLS) + writes) * LAUNCH_US + (filled + written) / per_us
        optimized_us = (fills + writes) * LAUNCH_US + (cleared + written) / per_us
        bound_us = (cleared + written) / per_us
    return Prediction(
        baseline_bytes=filled + written,
        optimized_bytes=cleared + written,
        least_bytes=cleared + written,
        flops=0,
        baseline_launches=len(_FILLS) + writes,
        optimized_launches=fills + writes,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason=f"{len(_FILLS)} fills of whole buffers become {fills} of a tail; {writes} launches write on both sides",
    )


# --- hazards ---


def _uninitialised(inputs: FillInputs) -> dict[str, Tensor]:
    buffers = TailFilled(inputs.max_tokens, inputs.topk, inputs.steps[0].req_id.device)
    buffers.req_id = torch.empty_like(buffers.req_id)
    return replay(inputs, _fill_the_tail, buffers=buffers)


class _OwnExtent:
    """A `prepare` that keeps its own idea of the previous extent; `rule` says what it clears and what it remembers."""

    def __init__(self, rule: Callable[[FillStep, int], tuple[int, int, int]]) -> None:
        self._rule, self._extent = rule, 0

    def __call__(self, buffers: TailFilled, step: FillStep) -> None:
        begin, end, self._extent = self._rule(step, self._extent)
        buffers.clear(begin, end)
        buffers._tokens = step.tokens


def _in_requests(step: FillStep, extent: int) -> tuple[int, int, int]:
    return step.requests, extent, step.requests


def _remembered_first(step: FillStep, extent: int) -> tuple[int, int, int]:
    extent = step.tokens
    return step.tokens, extent, extent


def _once_clean_always_clean(inputs: FillInputs) -> dict[str, Tensor]:
    """After a shrink the tail is known to be zero; the flag that says so is reset by growth only."""
    clean = False

    def rule(step: FillStep, extent: int) -> tuple[int, int, int]:
        nonlocal clean
        begin, end = (step.tokens, 0 if clean else extent)
        clean = step.tokens < extent
        return begin, end, step.tokens

    return replay(inputs, _OwnExtent(rule))


def _captured_slice(inputs: FillInputs) -> dict[str, Tensor]:
    """The fill is part of the graph of its batch size: its bounds are those of the first time."""
    captured: dict[int, tuple[int, int]] = {}

    def rule(step: FillStep, extent: int) -> tuple[int, int, int]:
        begin, end = captured.setdefault(step.tokens, (step.tokens, extent))
        return begin, end, step.tokens

    return replay(inputs, _OwnExtent(rule))


_SMALL = {"max_tokens": 12, "topk": 8, "lengths": (0, 8)}
_V32 = {"max_tokens": 8192, "topk": config.V3_2.index_topk, "lengths": (config.V3_2.index_topk,) * 2}


def _small(name: str, *shapes: tuple[int, int], about: str) -> Case:
    return Case(name, {"shapes": shapes, **_SMALL}, tiny=True, about=about)


def _large(name: str, *shapes: tuple[int, int], about: str) -> Case:
    return Case(name, {"shapes": shapes, **_V32}, needs_gpu=True, measured=True, about=about)


_CASES = (
    _small("tiny", (8, 1), (3, 1), (6, 1), about="shrink, then grow into what was cleared"),
    _small("tiny-twice", (12, 1), (7, 1), (2, 1), (9, 1), (1, 1), about="shrink twice in a row"),
    _small("tiny-return", (6, 1), (3, 1), (12, 1), (3, 1), about="one batch size reached from two others"),
    _small("tiny-prefill", (2, 6), (3, 1), (1, 12), (2, 2), about="few requests with many tokens"),
    _small("tiny-empty", (4, 1), (0, 1), (12, 1), (0, 1), about="steps without a token, and a full buffer"),
    Case("tiny-random", {"shapes": "random", "steps": 16, **_SMALL}, tiny=True, about="random batches and chunks"),
    Case(
        "random-long",
        {"shapes": "random", "steps": 200, "max_tokens": 96, "topk": 64, "lengths": (0, 64)},
        about="random batches and chunks, 200 steps",
    ),
    _large("steady-64", (64, 1), (64, 1), about="the steady state of 64 requests"),
    _large("shrink-64-63", (64, 1), (63, 1), about="one request leaves"),
    _large("shrink-8192-64", (1, 8192), (64, 1), about="decode after a full chunk of prefill"),
)

OPTIMIZATION = Optimization(
    id="shrink_tail_fill",
    number=16,
    title="Shrink-tail fill",
    part="IV orchestration",
    sources=("vllm#42982",),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(tuple(Check(name, "exact") for name in ("req_id", "indptr", "indices", "read"))),
    hazards={
        "empty-for-zeros": Hazard(
            title="the request ids start uninitialised",
            story="The whole-buffer fill also initialised the buffer. Without it, what no step has reached yet is "
            "whatever the allocator had there, and a captured kernel looks requests up by it.",
            source="vllm#42982, review; mended there by torch.zeros",
            ids=("H13",),
            case="tiny",
            planted=_uninitialised,
        ),
        "extent-in-requests": Hazard(
            title="the extent counts requests",
            story="In decode a request has one token, so requests and tokens are the same number until the first "
            "prefill chunk.",
            source="no report of this very bug; vllm#42982 keeps two extents, one per buffer",
            ids=("H14",),
            case="tiny-prefill",
            planted=lambda inputs: replay(inputs, _OwnExtent(_in_requests)),
        ),
        "extent-updated-first": Hazard(
            title="the previous extent is overwritten before the fill reads it",
            story="Then the tail runs from the new extent to the new extent.",
            source="no report of this very bug",
            ids=("H14",),
            case="tiny",
            planted=lambda inputs: replay(inputs, _OwnExtent(_remembered_first)),
        ),
        "shrunk-twice": Hazard(
            title="the tail is cleared by the first of two shrinks only",
            story="A flag says that the tail is clean, and is reset by growth. The second shrink makes a new tail.",
            source="no report of this very bug",
            ids=("H14",),
            case="tiny-twice",
            planted=_once_clean_always_clean,
        ),
        "captured-slice": Hazard(
            title="the fill is captured",
            story="Both ends of the slice are host values. A graph keeps those of the capture, whatever batch size "
            "came before this time.",
            source="vllm#51318, vllm#52448 (the same with other host values)",
            ids=("H07",),
            case="tiny-return",
            planted=_captured_slice,
        ),
        "reads-past-indptr": Hazard(
            title="a reader takes top-k indices per row",
            story="With every buffer zeroed in every step, reading past a row's end gave its neighbour's entries or "
            "zeros. Now it gives indices of another step.",
            source="vllm#42982, the comment on the fills; aiter get_mla_metadata_v1 has both layouts (topk >= 0 is "
            "fixed-stride)",
            ids=("H14", "H11"),
            case="tiny",
            planted=lambda inputs: replay(inputs, _fill_the_tail, to_the_stride=True),
        ),
    },
    predict=_predict,
    claims=records.published("shrink_tail_fill"),
    timed=_timed,
    measured_modules=("dsv4ref.serving.tail_fill",),
)
