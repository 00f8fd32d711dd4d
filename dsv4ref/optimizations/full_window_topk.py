"""Chapter 07: while top-k drops nothing, write 0..length-1 instead of computing logits and choosing.

Baseline: index logits over all paged keys, torch's top-k, conversion. Optimised: `serving.full_window.choose_entries`,
one fill while the host's bound says that every row fits; the baseline beyond; and under capture a choice that each row
makes on the device, because a branch of the host would be frozen.

Queries, keys and weights are whole numbers, so that scores are exact in fp32 in any order, and ties are ties. A choice
is compared as a set: the entries *above* the k-th score must all be there, and of those *at* it the right number,
whichever they are. Lists of rows within the window also go through the attention.

Source: doubleword's vLLM fork, commit 266c6c84d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import KVCache, Scope, kv_cache
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.indices import LANES, fill_window, pack_entries
from dsv4ref.kernels.sparse_mla.topk import KEY_TILE, TopkScratch, select
from dsv4ref.optimizations import decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.ref.indexer import index_scores_ref
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref
from dsv4ref.serving import full_window
from dsv4ref.serving.full_window import Way, choose_entries
from dsv4ref.serving.graphs import capture

__all__ = ["LAUNCH_US", "OPTIMIZATION", "ChoiceInputs", "ChoiceStep", "choice_of", "judged", "scores_of"]

Outputs = dict[str, Tensor]

LAUNCH_US = 2.0
"""Assumed cost of one small launch inside a graph, microseconds, as in chapter 06."""

BASELINE_LAUNCHES = {"logits": 1, "top-k": 1, "conversion": 1}
FILL_LAUNCHES = {"fill": 1}

_MODEL = config.V4_FLASH
_HEADS, _DIM = _MODEL.index_n_heads, _MODEL.index_head_dim
_ATTENTION_HEADS = 8
_UNWRITTEN = 2**30


@dataclass(frozen=True)
class ChoiceStep:
    """What one step brings: queries ``[T, 64, 128]``, head weights ``[T, 64]`` and entries to see ``[T]``.

    `longest` is the host's bound of the lengths.
    """

    q: Tensor
    weights: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True)
class ChoiceInputs:
    """Several steps of one batch size over one set of caches.

    Args:
        steps: in order; all have T rows.
        requests: int32 ``[T]``, the request of each row.
        table: int32 ``[R, B]`` block ids, of both caches.
        keys: bf16 ``[blocks, block_size, 128]`` index keys.
        cache: the C4 entries that attention reads.
        attended: bf16 ``[T, H, 512]`` attention queries.
        topk: entries chosen at most.
    """

    steps: tuple[ChoiceStep, ...]
    requests: Tensor
    table: Tensor
    keys: Tensor
    cache: KVCache
    attended: Tensor
    topk: int

    @property
    def columns(self) -> int:
        """Entries that the block tables can address."""
        return int(self.table.shape[1] * self.keys.shape[1])

    def scratch(self) -> TopkScratch:
        """Scratch for this batch size."""
        return TopkScratch.allocate(len(self.requests), self.columns, self.topk, self.table.device)

    def fresh(self) -> Tensor:
        """A buffer for a choice, which holds no entry of any row."""
        return torch.full((len(self.requests), self.topk), _UNWRITTEN, dtype=torch.int32, device=self.table.device)


def _build(case: Case, device: str, seed: int) -> ChoiceInputs:
    p = case.params
    rng = torch.Generator().manual_seed(seed)
    rows, block_size = len(p["steps"][0]), p["block_size"]
    requests = torch.arange(rows, dtype=torch.int32) // p["query_tokens"]
    count = int(requests.max()) + 1

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=rng).float()

    keys = whole(-2, 2, p["blocks"], block_size, _DIM)
    if p["distinct"]:  # so few different keys that many scores are equal
        keys = keys.view(-1, _DIM)[torch.randint(0, p["distinct"], (p["blocks"] * block_size,), generator=rng)]
        keys = keys.view(p["blocks"], block_size, _DIM)
    cache = kv_cache.allocate(p["blocks"], block_size, "e4m3fn", device=device)
    for begin in range(0, cache.rows, 1 << 16):
        slots = torch.arange(begin, min(begin + (1 << 16), cache.rows))
        kv_cache.insert(cache, slots.to(device), torch.randn((len(slots), HEAD_DIM), generator=rng).to(device) * 0.1)
    width = -(-p["columns"] // block_size)
    table = torch.stack([torch.randperm(p["blocks"], generator=rng)[:width] for _ in range(count)])
    steps = []
    for lengths in p["steps"]:
        q = whole(-1, 1, rows, _HEADS, _DIM).to(torch.bfloat16).to(device)
        weights = (whole(-8, 8, rows, _HEADS) / 8).to(device)
        steps.append(ChoiceStep(q, weights, torch.tensor(lengths, dtype=torch.int32).to(device), max(lengths)))
    attended = torch.randn((rows, _ATTENTION_HEADS, HEAD_DIM), generator=rng) * 16
    return ChoiceInputs(
        tuple(steps), requests.to(device), table.to(torch.int32).to(device), keys.to(torch.bfloat16).to(device), cache,
        attended.to(torch.bfloat16).to(device), p["topk"],
    )  # fmt: skip


# --- what is right ---


def scores_of(inputs: ChoiceInputs, step: ChoiceStep) -> Tensor:
    """Scores by the reference, float64 ``[T, columns]``, -inf behind each row's length."""
    scores = torch.full((len(inputs.requests), inputs.columns), -torch.inf, dtype=torch.float64)
    keys, block_size = inputs.keys.double().cpu(), inputs.keys.shape[1]
    for row, length in enumerate(step.lengths.tolist()):
        entries = torch.arange(length)
        blocks = inputs.table[int(inputs.requests[row])].cpu().long()[entries // block_size]
        q, weights = step.q[row].double().cpu(), step.weights[row].double().cpu()
        scores[row, :length] = index_scores_ref(q, keys[blocks, entries % block_size], weights)
    return scores


def judged(choice: Tensor, scores: Tensor, lengths: Tensor) -> Outputs:
    """A choice as what may be compared of it.

    Args:
        choice: int32 ``[T, topk]``.
        scores: of `scores_of`.
        lengths: int32 ``[T]``.

    Returns:
        ``above`` int32 ``[T, columns]``, 1 where an entry above the k-th score was chosen; ``at`` int32 ``[T]``, how
        many at the k-th score were; ``wrong`` int32 ``[T]``, how many lanes hold what they may not: an entry that the
        row does not see, an entry for the second time, -1 before lane min(length, topk), anything else from it on.
    """
    above = torch.zeros(scores.shape, dtype=torch.int32)
    at, wrong = (torch.zeros(len(choice), dtype=torch.int32) for _ in range(2))
    for row, (lanes, length) in enumerate(zip(choice.tolist(), lengths.tolist(), strict=True)):
        kept = min(length, len(lanes))
        good = {entry for entry in lanes[:kept] if 0 <= entry < length}
        wrong[row] = kept - len(good) + sum(entry != -1 for entry in lanes[kept:])
        if kept and good:
            kth = scores[row].topk(kept).values[-1]
            mine = torch.tensor(sorted(good))
            value = scores[row, mine]
            above[row, mine[value > kth]] = 1
            at[row] = (value == kth).sum()
    return {"above": above, "at": at, "wrong": wrong}


def _attention(inputs: ChoiceInputs, step: ChoiceStep, choice: Tensor) -> tuple[Tensor, Scope]:
    """Attention of the rows within the window over their choice; rows beyond, where ties may differ, have no keys."""
    rows, device = len(inputs.requests), inputs.table.device
    inside = step.lengths <= inputs.topk
    positions = torch.where(inside, 4 * step.lengths - 1, -1).to(torch.int32)
    counts, indptr = (torch.empty(rows + n, dtype=torch.int32, device=device) for n in (0, 1))
    indices = torch.empty(rows * inputs.topk, dtype=torch.int32, device=device)
    pack_entries(
        choice, positions, inputs.requests, inputs.table, ratio=4, block_size=inputs.keys.shape[1],
        num_slots=inputs.cache.rows, counts=counts, indices=indices, indptr=indptr,
    )  # fmt: skip
    scope = Scope(inputs.cache, indices, indptr, inputs.topk)
    out = torch.empty_like(inputs.attended)
    sparse_mla_decode(inputs.attended, scope, None, sink=None, scale=HEAD_DIM**-0.5, out=out)
    return out, scope


# --- the paths ---

Choose = Callable[[ChoiceInputs, ChoiceStep, TopkScratch, Tensor], object]


def _always_topk(inputs: ChoiceInputs, step: ChoiceStep, scratch: TopkScratch, out: Tensor) -> None:
    select(step.q, step.weights, inputs.keys, inputs.table, inputs.requests, step.lengths, scratch=scratch, out=out)


def _cheapest(inputs: ChoiceInputs, step: ChoiceStep, scratch: TopkScratch, out: Tensor) -> Way:
    return choose_entries(
        step.q, step.weights, inputs.keys, inputs.table, inputs.requests, step.lengths, longest=step.longest,
        scratch=scratch, out=out,
    )  # fmt: skip


def choice_of(inputs: ChoiceInputs, step: ChoiceStep, choose: Choose = _cheapest) -> Tensor:
    """One step's choice, int32 ``[T, topk]``, in fresh buffers."""
    out = inputs.fresh()
    choose(inputs, step, inputs.scratch(), out)
    return out


def _replayed(inputs: ChoiceInputs, choose: Choose) -> list[Tensor]:
    """Every step's choice, from a graph that was captured on the first."""
    scratch, out = inputs.scratch(), inputs.fresh()
    first = inputs.steps[0]
    held = ChoiceStep(first.q.clone(), first.weights.clone(), first.lengths.clone(), first.longest)
    graph = capture(lambda: choose(inputs, held, scratch, out), device=inputs.table.device)
    choices = []
    for step in inputs.steps:
        for target, source in ((held.q, step.q), (held.weights, step.weights), (held.lengths, step.lengths)):
            target.copy_(source)
        out.fill_(_UNWRITTEN)
        graph.replay()
        choices.append(out.clone())
    return choices


def _run(inputs: ChoiceInputs, choose: Choose) -> Outputs:
    """Every step eagerly and from the graph, in buffers that live on; attention over the eager ones."""
    scratch, buffer = inputs.scratch(), inputs.fresh()
    eager, attention = [], []
    for step in inputs.steps:
        choose(inputs, step, scratch, buffer)
        eager.append(buffer.clone())
        attention.append(_attention(inputs, step, buffer)[0])
    found = [
        judged(choice, scores_of(inputs, step), step.lengths)
        for choices in (eager, _replayed(inputs, choose))
        for choice, step in zip(choices, inputs.steps, strict=True)
    ]
    return {**{name: torch.stack([f[name] for f in found]) for name in found[0]}, "out": torch.stack(attention)}


def _baseline(inputs: ChoiceInputs) -> Outputs:
    return _run(inputs, _always_topk)


def _optimized(inputs: ChoiceInputs) -> Outputs:
    return _run(inputs, _cheapest)


def _whole_window(inputs: ChoiceInputs, step: ChoiceStep) -> Scope:
    """The lists of all that rows within the window see, from the block table."""
    block_size, lists = inputs.keys.shape[1], []
    for row, length in enumerate(step.lengths.tolist()):
        entries = torch.arange(length if length <= inputs.topk else 0)
        blocks = inputs.table[int(inputs.requests[row])].cpu().long()[entries // block_size]
        lists.append(blocks * block_size + entries % block_size)
    indptr = torch.tensor([0, *(len(row) for row in lists)]).cumsum(0)
    device = inputs.table.device
    indices = torch.cat(lists).to(torch.int32).to(device)
    return Scope(inputs.cache, indices, indptr.to(torch.int32).to(device), inputs.topk)


def _attended(inputs: ChoiceInputs, attention: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    scale = HEAD_DIM**-0.5
    return torch.stack(
        [attention(inputs.attended, [_whole_window(inputs, step)], None, scale)[0] for step in inputs.steps]
    )


def _reference(inputs: ChoiceInputs) -> Outputs:
    """From scores alone: what is above the k-th of each row, and how many places that leaves."""
    found = []
    for step in inputs.steps:
        scores = scores_of(inputs, step)
        kept = step.lengths.cpu().clamp(max=inputs.topk)
        kth = [torch.inf if k == 0 else row.topk(k).values[-1] for row, k in zip(scores, kept.tolist(), strict=True)]
        above = (scores > torch.tensor(kth, dtype=torch.float64)[:, None]).to(torch.int32)
        at = (kept - above.sum(1)).to(torch.int32)
        found.append({"above": above, "at": at, "wrong": torch.zeros_like(at)})
    stacked = {name: torch.stack([f[name] for f in (*found, *found)]) for name in found[0]}
    return {**stacked, "out": _attended(inputs, sparse_attention_ref)}


def _yardstick(inputs: ChoiceInputs) -> Outputs:
    return {"out": _attended(inputs, sparse_attention_plain)}


def _timed(inputs: ChoiceInputs) -> Mapping[str, Callable[[], object]]:
    """The last step; and what a graph holds, which is left to the device."""
    step, scratch, out = inputs.steps[-1], inputs.scratch(), inputs.fresh()

    def way(taken: Way) -> Callable[[], object]:
        if taken is Way.FILL:
            return lambda: fill_window(step.lengths, out)
        return lambda: select(
            step.q, step.weights, inputs.keys, inputs.table, inputs.requests, step.lengths, scratch=scratch, out=out,
            skip_full=taken is Way.DEVICE,
        )  # fmt: skip

    # By name, not by asking under capture: timing captures every variant, and would time the device's way twice.
    fastest = full_window.way_for(inputs.topk, inputs.columns, step.longest, capturing=False)
    return {"baseline": way(Way.TOPK), "optimized": way(fastest), "device decides": way(Way.DEVICE)}


# --- prediction ---


def _predict(case: Case, device_key: str) -> Prediction:
    """The last step of a case."""
    p = case.params
    lengths, topk = p["steps"][-1], p["topk"]
    rows, columns = len(lengths), -(-p["columns"] // p["block_size"]) * p["block_size"]
    fill = 4 * rows + 4 * rows * topk
    flops = 2 * _HEADS * _DIM * sum(lengths)
    k = min(topk, columns)
    scored = 2 * _DIM * sum(lengths) + (2 * _HEADS * _DIM + 4 * _HEADS) * rows + 4 * rows * columns
    chosen = 4 * rows * columns + 2 * (4 + 8) * rows * k + 4 * rows * topk
    inside = max(lengths) <= topk
    spec = decode_model.spec_for(device_key)
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None:
        per_us, rate = spec.bandwidth_tb_s * 1e6, spec.bf16_tflops * 1e6
        baseline_us = sum(BASELINE_LAUNCHES.values()) * LAUNCH_US + max(scored / per_us, flops / rate) + chosen / per_us
        optimized_us = sum(FILL_LAUNCHES.values()) * LAUNCH_US + fill / per_us if inside else baseline_us
        bound_us = fill / per_us if inside else max((scored - 4 * rows * columns + fill) / per_us, flops / rate)
    return Prediction(
        baseline_bytes=scored + chosen,
        optimized_bytes=fill if inside else scored + chosen,
        least_bytes=fill if inside else scored - 4 * rows * columns + fill,
        flops=0 if inside else flops,
        baseline_launches=sum(BASELINE_LAUNCHES.values()),
        optimized_launches=sum((FILL_LAUNCHES if inside else BASELINE_LAUNCHES).values()),
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="logits at their roofline, every row reading its keys for itself; top-k as one launch that reads its "
        "input once, where a library's takes more of both: the ratio is a low estimate",
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """The three kernels at V4-Flash's sizes, blocks of 64 entries."""
    module = "dsv4ref.kernels.sparse_mla.topk"
    lists = dict.fromkeys(("table", "requests", "lengths"), "*i32")
    logits = {"q": "*bf16", "weights": "*fp32", "keys": "*bf16", **lists, "logits": "*fp32"}
    numbers = ("num_requests", "blocks", "table_stride", "key_blocks", "key_stride", "columns", "skip_up_to")
    finish = {"lengths": "*i32", "values": "*fp32", "chosen": "*i64", "out": "*i32"}
    fill = {"lengths": "*i32", "out": "*i32"}
    topk = _MODEL.index_topk
    return (
        CompileRequest(
            kernel="index_logits", module=module, function="_index_logits_kernel", shape=f"{KEY_TILE} entries w4",
            signature={**logits, **dict.fromkeys(numbers, "i32")},
            constexprs={"BLOCK_SIZE": 64, "HEADS": _HEADS, "DIM": _DIM, "BLOCK_N": KEY_TILE}, num_warps=4,
            divisible_by_16=frozenset(logits) | {"key_stride", "columns"},
        ),
        CompileRequest(
            kernel="finish_choice", module=module, function="_finish_choice_kernel", shape=f"topk {topk} w4",
            signature={**finish, **dict.fromkeys(("k", "topk", "out_stride", "skip_up_to"), "i32")},
            constexprs={"LANES": topk}, num_warps=4, divisible_by_16=frozenset(finish) | {"k", "topk", "out_stride"},
        ),
        CompileRequest(
            kernel="fill_window", module="dsv4ref.kernels.sparse_mla.indices", function="_fill_window_kernel",
            shape=f"lanes {LANES} w4", signature={**fill, **dict.fromkeys(("topk", "out_stride"), "i32")},
            constexprs={"LANES": LANES}, num_warps=4, divisible_by_16=frozenset(fill) | {"topk", "out_stride"},
        ),
    )  # fmt: skip


# --- hazards ---


def _frozen_branch(inputs: ChoiceInputs) -> Outputs:
    """The host's branch, taken under capture as if the batch were the only one."""
    with mock.patch.object(full_window, "is_capturing", return_value=False):
        return _run(inputs, _cheapest)


def _with_longest(change: Callable[[ChoiceStep, int], int]) -> Callable[[ChoiceInputs], Outputs]:
    """Another bound: ``change`` gets the step and topk."""

    def planted(inputs: ChoiceInputs) -> Outputs:
        wrong = tuple(replace(step, longest=change(step, inputs.topk)) for step in inputs.steps)
        return _run(replace(inputs, steps=wrong), _cheapest)

    return planted


def _tail_left(inputs: ChoiceInputs, step: ChoiceStep, scratch: TopkScratch, out: Tensor) -> None:
    before = out.clone()
    _cheapest(inputs, step, scratch, out)
    lanes = torch.arange(out.shape[1], device=out.device)
    out.copy_(torch.where(lanes < step.lengths[:, None], out, before))


def _ties_dropped(inputs: ChoiceInputs, step: ChoiceStep, scratch: TopkScratch, out: Tensor) -> None:
    _always_topk(inputs, step, scratch, out)
    kth = scratch.values[:, -1:]
    lost = (scratch.values == kth) & (step.lengths > inputs.topk)[:, None]
    out.copy_(torch.where(lost, -1, out))


def _lengths_of_requests(inputs: ChoiceInputs, step: ChoiceStep, scratch: TopkScratch, out: Tensor) -> None:
    """``seq_lens`` has an element per request; row t reads element t, and behind the end what happens to be there."""
    per_request = step.lengths[:: len(inputs.requests) // inputs.table.shape[0]]
    behind = torch.full_like(step.lengths, inputs.topk)
    lengths = torch.cat((per_request, behind))[: len(step.lengths)]
    _cheapest(inputs, replace(step, lengths=lengths), scratch, out)


def _planted(choose: Choose) -> Callable[[ChoiceInputs], Outputs]:
    return lambda inputs: _run(inputs, choose)


# --- cases ---

_TOPK = 12


def _tiny(name: str, *steps: tuple[int, ...], about: str, **changes: Any) -> Case:
    params = {"steps": steps, "topk": _TOPK, "columns": 40, "block_size": 8, "blocks": 9, "distinct": 0}
    return Case(name, {**params, "query_tokens": 1, **changes}, tiny=True, about=about)


def _production(name: str, model: config.ModelConfig, rows: int, tokens: int, *, prefill: bool = False) -> Case:
    """Rows at the same context, or the rows of one request's chunk."""
    lengths = tuple((tokens - rows + 1 + row) // 4 if prefill else tokens // 4 for row in range(rows))
    columns = max(tokens // 4, model.index_topk)
    params = {"steps": (lengths,), "topk": model.index_topk, "columns": columns, "block_size": 64, "distinct": 0}
    params |= {"blocks": max(4096, -(-columns // 64)), "query_tokens": rows if prefill else 1}
    return Case(name, params, needs_gpu=True, measured=True)


_CASES = (
    _tiny("tiny", (3, _TOPK, 0, 7), (5, 11, 1, _TOPK), about="decode inside the window, one row without entries"),
    _tiny("tiny-edges", (_TOPK - 1, _TOPK, 0), (_TOPK - 1, _TOPK, _TOPK + 1), (_TOPK + 1,) * 3,
          about="topk - 1, topk, topk + 1"),
    _tiny("tiny-short-long", (2, 9, 4), (30, 9, 40), (1, 2, 3), about="captured short, replayed long"),
    _tiny("tiny-long-short", (33, 25, 38), (3, 9, 0), about="captured long, replayed short"),
    _tiny("tiny-ties", (35, 30, 13), (_TOPK, 20, 3), distinct=5, about="five different keys: ties at the k-th score"),
    _tiny("tiny-speculative", (4, 5, 30, 31), (11, 12, 2, 2), query_tokens=2, about="two query tokens a request"),
    _tiny("tiny-prefill", (0, 0, 0, 1, 1, 1, 1, 2), (11, 11, 11, 12, 12, 12, 12, 13), query_tokens=8,
          about="chunks of one request, the second across the edge"),
    _tiny("tiny-narrow", (3, 8, 0), (1, 2, 3), columns=8, about="tables that hold less than topk entries"),
    *(_production(f"flash-{rows}-2k", config.V4_FLASH, rows, 2048) for rows in (1, 64, 1024)),
    _production("flash-64-8k", config.V4_FLASH, 64, 8192),
    _production("flash-prefill-2048", config.V4_FLASH, 2048, 2048, prefill=True),
    _production("pro-256-4k", config.V4_PRO, 256, 4096),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="full_window_topk",
    number=7,
    title="Full-window top-k",
    part="II sparse MLA decode",
    sources=("doubleword vLLM fork, commit 266c6c84d",),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_yardstick,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate((*(Check(name, "exact") for name in ("above", "at", "wrong")), Check("out", "budget", "attention_bf16"))),
    hazards={
        "frozen-branch": Hazard(
            title="captured short, replayed long",
            story="The host asks whether every row fits, at capture, once. The graph holds a fill, and goes on "
            "filling when the rows no longer fit.",
            source="vllm#51318, vllm#52448, vllm#50004, vllm#54121 (the same with other host values)",
            ids=("H07",),
            case="tiny-short-long",
            planted=_frozen_branch,
        ),
        "one-too-many": Hazard(
            title="off by one at topk",
            story="longest <= topk + 1 passes for longest <= topk: a row of topk + 1 entries loses its newest, "
            "whatever the scores say.",
            source="no report of this very bug; the boundary that vllm#51298's tests walk is akin",
            ids=(),
            case="tiny-edges",
            planted=_with_longest(lambda step, topk: step.longest - 1),
        ),
        "first-row": Hazard(
            title="one row speaks for the batch",
            story="A bound taken from the first row, or from an average, is none: one long request among short ones "
            "gets the oldest topk entries.",
            source="doubleword commit 266c6c84d (it takes the maximum; this is what the maximum is for)",
            ids=(),
            case="tiny-speculative",
            planted=_with_longest(lambda step, topk: int(step.lengths[0])),
        ),
        "tail-left": Hazard(
            title="the tail is not -1",
            story="Only the entries are written. What stood behind them in the last step is a valid entry number.",
            source="vllm#57036, vllm#53261 (entries of padding that reach a kernel)",
            ids=("H15",),
            case="tiny",
            planted=_planted(_tail_left),
        ),
        "ties-dropped": Hazard(
            title="of equal scores, none",
            story="A choice by threshold keeps what is above the k-th score. Entries at it are dropped, and the list "
            "is short.",
            source="aiter#4376 (ties at the k-th place differ from run to run)",
            ids=("H25",),
            case="tiny-ties",
            planted=_planted(_ties_dropped),
        ),
        "lengths-of-requests": Hazard(
            title="lengths of requests, indexed by row",
            story="With speculative tokens a request has several rows and one length. Row t takes element t: another "
            "request's, then what is behind the array.",
            source="doubleword commit 266c6c84d (read: its decode fill indexes seq_lens by row)",
            ids=(),
            case="tiny-speculative",
            planted=_planted(_lengths_of_requests),
        ),
    },
    predict=_predict,
    claims=records.published("full_window_topk"),
    timed=_timed,
    measured_modules=("dsv4ref.kernels.sparse_mla.indices", "dsv4ref.kernels.sparse_mla.topk"),
    kernels=_requests,
)
