"""Chapter 15: keep the work plan of a persistent decode while nothing that it depends on changes.

Baseline: the plan is computed in every step. Optimised: `serving.metadata.MetadataCache` computes it when a fingerprint
of the step differs from the last one. The gate compares the plan's buffers after every step of a trace, integer by
integer: the claim is that equal keys imply equal plans.

The planner is `kernels.work_plan`, which stands in for AITER's ``get_mla_metadata_v1``: one launch of one workgroup
into buffers of the same names and columns, with a simpler way to cut. Its reference is `serving.plan`.

Source: vllm#42982 (the optimisation and its key), vllm#47766 (the key mended).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsv4ref import config, device
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.kernels.work_plan import GRANULARITY, MAX_BLOCK, MIN_BLOCK, Plan, empty_plan, plan_work
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.serving.metadata import (
    KEYS,
    Key,
    MetadataCache,
    Step,
    kv_indptr_of,
    lengths_key,
    make_step,
    published_key,
)
from dsv4ref.serving.plan import outside, plan_work_ref
from dsv4ref.serving.traces import Lengths, decode_trace, prefill_trace, serving_trace

__all__ = ["LAUNCH_US", "OPTIMIZATION", "TraceInputs", "host_calls", "verdicts"]

LAUNCH_US = 2.0
"""Assumed cost of one small launch inside a graph, microseconds, as in chapter 06."""

_MEMORY_TRIP_US = 0.7
_PASSES = 2
_REFRESH = {
    "gather each token's request": 1,
    "subtract what is behind it": 1,
    "clamp to top-k": 1,
    "clear": 1,
    "cumulative sum": 2,
}
"""What every step runs on both sides, the KV ranges, which change with every token; and the launches of each on a GPU,
counted on an H200: the sum prepares itself. On a CPU an operator counts as one."""
_REFRESH_LAUNCHES = sum(_REFRESH.values())

_BUFFERS = tuple(field.name for field in fields(Plan))


@dataclass(frozen=True)
class TraceInputs:
    """Successive steps of one server, with the plan's parameters: top-k, compute units, most tokens in a step."""

    steps: tuple[Step, ...]
    topk: int
    compute_units: int
    max_tokens: int

    def new_plan(self) -> Plan:
        """Fresh buffers on the steps' device."""
        where = self.steps[0].seq_lens.device if self.steps else "cpu"
        return empty_plan(self.max_tokens, self.compute_units, where)


def _trace(params: Mapping[str, Any], rng: np.random.Generator) -> list[Lengths]:
    kind = params["trace"]
    if kind == "decode":
        low, high = params["contexts"]
        contexts = rng.integers(low, high + 1, params["requests"]).tolist()
        return decode_trace(contexts, params["steps"])
    if kind == "prefill":
        return prefill_trace(params["prompt"], params["budget"])
    if kind == "serving":
        wanted = ("slots", "prompt", "output", "budget", "steps")
        return serving_trace(**{name: params[name] for name in wanted})
    if kind == "listed":
        return [Lengths(tuple(query), tuple(seq)) for query, seq in params["lengths"]]
    raise ValueError(f"trace: got {kind!r}, expected 'decode', 'prefill', 'serving' or 'listed'")


def _build(case: Case, device: str, seed: int) -> TraceInputs:
    p = case.params
    trace = _trace(p, np.random.default_rng(seed))
    blind = p.get("blind", ())
    steps = tuple(
        make_step(lengths.query, lengths.seq, device=device, on_host=index not in blind)
        for index, lengths in enumerate(trace)
    )
    most = max((step.tokens for step in steps), default=0)
    return TraceInputs(steps, p["topk"], p["units"], max(most, 1))


Builder = Callable[[Step], tuple[Tensor, Plan]]


def _run(inputs: TraceInputs, build: Builder) -> dict[str, Tensor]:
    """The metadata after every step, stacked; `outside` counts the pieces that would read another token's entries."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("outside", "kv_indptr", *_BUFFERS)}
    for step in inputs.steps:
        kv_indptr, plan = build(step)
        found["outside"].append(torch.tensor(outside(plan, kv_indptr).numel(), dtype=torch.int32))
        unused = inputs.max_tokens - step.tokens
        found["kv_indptr"].append(torch.cat([kv_indptr, kv_indptr[-1:].expand(unused)]))
        for name in _BUFFERS:
            found[name].append(getattr(plan, name).clone())
    return {name: torch.stack(values) for name, values in found.items()}


def _plan_every_step(inputs: TraceInputs) -> dict[str, Tensor]:
    plan = inputs.new_plan()

    def build(step: Step) -> tuple[Tensor, Plan]:
        kv_indptr = kv_indptr_of(step, inputs.topk)
        return kv_indptr, plan_work(kv_indptr, plan)

    return _run(inputs, build)


def _cached(inputs: TraceInputs, key: Key = lengths_key) -> dict[str, Tensor]:
    cache = MetadataCache(plan_work, inputs.new_plan(), inputs.topk, key)

    def build(step: Step) -> tuple[Tensor, Plan]:
        made = cache.build(step)
        return made.kv_indptr, made.plan

    return _run(inputs, build)


def _reference(inputs: TraceInputs) -> dict[str, Tensor]:
    """Each step on its own: the ramp token by token, the plan on the host, buffers that nothing was in before."""

    def build(step: Step) -> tuple[Tensor, Plan]:
        indptr = [0]
        for query, seq in zip(step.query_lens.tolist(), step.seq_lens.tolist(), strict=True):
            for token in range(query):
                indptr.append(indptr[-1] + max(0, min(seq - query + token + 1, inputs.topk)))
        kv_indptr = torch.tensor(indptr, dtype=torch.int32)
        return kv_indptr, plan_work_ref(kv_indptr, empty_plan(inputs.max_tokens, inputs.compute_units))

    return _run(inputs, build)


# --- what a key does on a trace ---

Verdict = Literal["plan", "reuse", "stale"]


def verdicts(trace: Sequence[Lengths], topk: int, key: Key) -> list[Verdict]:
    """What a key makes of every step: plan, reuse the plan, or reuse a plan that was made for other lengths.

    Args:
        trace: the steps.
        topk: entries that a token attends to at most.
        key: any of `serving.metadata.KEYS`, or another.
    """
    found: list[Verdict] = []
    seen: Hashable | None = None
    planned_for: Hashable | None = None
    for lengths in trace:
        step = make_step(lengths.query, lengths.seq)
        now, truth = key(step, topk), lengths_key(step, topk)
        if now is not None and now == seen:
            found.append("reuse" if truth == planned_for else "stale")
        else:
            seen, planned_for = now, truth
            found.append("plan")
    return found


def host_calls(inputs: TraceInputs) -> Mapping[str, Callable[[], object]]:
    """What the host pays per trace for each key: the fingerprint of every step, and comparing it with the last.

    These run anywhere and launch nothing. `_host_timed` has one of them in place, with the launches around it.
    """

    def walk(key: Key) -> Callable[[], int]:
        def run() -> int:
            seen: Hashable | None = None
            hits = 0
            for step in inputs.steps:
                now = key(step, inputs.topk)
                hits += now is not None and now == seen
                seen = now
            return hits

        return run

    return {name: walk(key) for name, key in KEYS.items()}


def _timed(inputs: TraceInputs) -> Mapping[str, Callable[[], object]]:
    """One pass over the trace, as a server that has been running it: which steps plan is decided before any launch."""
    cache = MetadataCache(lambda kv_indptr, plan: plan, inputs.new_plan(), inputs.topk)
    for step in inputs.steps:
        cache.build(step)
    reused = [cache.build(step).reused for step in inputs.steps]
    plan = inputs.new_plan()

    def run(skip: Sequence[bool]) -> None:
        for step, skipped in zip(inputs.steps, skip, strict=True):
            kv_indptr = kv_indptr_of(step, inputs.topk)
            if not skipped:
                plan_work(kv_indptr, plan)

    return {
        "baseline": lambda: run([False] * len(inputs.steps)),
        "optimized": lambda: run(reused),
    }


def _host_timed(inputs: TraceInputs) -> Mapping[str, Callable[[], object]]:
    """The same pass as a host pays for it: fingerprints, comparisons and submissions; and the fingerprints alone."""
    cache, plan = MetadataCache(plan_work, inputs.new_plan(), inputs.topk), inputs.new_plan()

    def plan_every_step() -> None:
        for step in inputs.steps:
            plan_work(kv_indptr_of(step, inputs.topk), plan)

    def cached() -> None:
        for step in inputs.steps:
            cache.build(step)

    return {
        "baseline": plan_every_step,
        "optimized": cached,
        "fingerprints alone": host_calls(inputs)["lengths"],
    }


def _predict(case: Case, device_key: str) -> Prediction:
    """One pass over the case's trace; the plan's single workgroup has one compute unit's share of the bandwidth."""
    p = case.params
    trace = _trace(p, np.random.default_rng(0))
    twice = verdicts([*trace, *trace], p["topk"], lengths_key)  # as `_timed`: a server that has been running it
    tokens = [sum(lengths.query) for lengths in trace]
    most = max([1, *tokens])
    written = empty_plan(most, p["units"], "meta").nbytes
    refresh = [40 * count + 4 for count in tokens]
    planned = [4 * _PASSES * (2 * count) + written for count in tokens]
    misses = [index for index in range(len(trace)) if twice[len(trace) + index] == "plan"]
    spec = device.KNOWN_DEVICES.get(device_key)
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.compute_units is not None:
        per_us = spec.bandwidth_tb_s * 1e6
        one_unit = per_us / spec.compute_units

        def plan_us(index: int) -> float:
            trips = _PASSES * -(-tokens[index] // MAX_BLOCK)
            return LAUNCH_US + trips * _MEMORY_TRIP_US + planned[index] / one_unit

        every = sum(_REFRESH_LAUNCHES * LAUNCH_US + moved / per_us for moved in refresh)
        baseline_us = every + sum(plan_us(index) for index in range(len(trace)))
        optimized_us = every + sum(plan_us(index) for index in misses)
        bound_us = sum(4 * (count + 1) for count in tokens) / per_us
    return Prediction(
        baseline_bytes=sum(refresh) + sum(planned),
        optimized_bytes=sum(refresh) + sum(planned[index] for index in misses),
        least_bytes=sum(4 * (count + 1) for count in tokens),
        flops=0,
        baseline_launches=len(trace) * (_REFRESH_LAUNCHES + 1),
        optimized_launches=len(trace) * _REFRESH_LAUNCHES + len(misses),
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason=f"{len(misses)} of {len(trace)} steps plan; {_REFRESH_LAUNCHES} launches per step remain on both sides",
    )


# --- hazards ---


def _none_is_a_value(step: Step, topk: int) -> Hashable:
    """A key over whatever is there: two steps without host lengths look alike."""
    seq_lens = step.host_seq_lens
    clamped = None if seq_lens is None else np.minimum(seq_lens.numpy(), topk).tobytes()
    return (step.tokens, clamped, step.query_lens.numpy().tobytes())


def _tokens_only(step: Step, topk: int) -> Hashable:
    return step.tokens


def _unsegmented(step: Step, topk: int) -> Hashable | None:
    """The mended key without the query lengths."""
    if step.host_seq_lens is None:
        return None
    context = np.minimum(step.host_seq_lens.numpy() - step.query_lens.numpy(), topk)
    return (published_key(step, topk), context.tobytes())


def _key_frozen_at_capture(inputs: TraceInputs) -> dict[str, Tensor]:
    """A step is captured once per batch size; its replays compare the host values of the capture."""
    captured: dict[int, Hashable | None] = {}

    def key(step: Step, topk: int) -> Hashable | None:
        return captured.setdefault(step.tokens, lengths_key(step, topk))

    return _cached(inputs, key)


def _keyed_on_address(inputs: TraceInputs) -> dict[str, Tensor]:
    """The lengths lie in one persistent buffer, as a captured step needs it, and the key is its address."""
    most = max(step.seq_lens.numel() for step in inputs.steps)
    buffer = inputs.steps[0].seq_lens.new_zeros(most)

    def key(step: Step, topk: int) -> Hashable:
        return (step.seq_lens.data_ptr(), step.seq_lens.numel(), step.tokens)

    cache = MetadataCache(plan_work, inputs.new_plan(), inputs.topk, key)

    def build(step: Step) -> tuple[Tensor, Plan]:
        here = buffer[: step.seq_lens.numel()]
        here.copy_(step.seq_lens)
        made = cache.build(replace(step, seq_lens=here))
        return made.kv_indptr, made.plan

    return _run(inputs, build)


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    pointers = dict.fromkeys(("kv_indptr", *_BUFFERS), "*i32")
    return tuple(
        CompileRequest(
            kernel="plan_work",
            module="dsv4ref.kernels.work_plan",
            function="_plan_work_kernel",
            shape=f"{block} w4 s1",
            signature={**pointers, **dict.fromkeys(("num_tokens", "compute_units", "work_rows"), "i32")},
            constexprs={"GRANULARITY": GRANULARITY, "BLOCK": block},
            num_warps=4,
            divisible_by_16=frozenset(pointers),
        )
        for block in (MIN_BLOCK, MAX_BLOCK)
    )


_SMALL = {"topk": 32, "units": 8}
_V32 = {"topk": config.V3_2.index_topk, "units": 256}


def _decode(name: str, requests: int, context: int, **flags: Any) -> Case:
    params = {"trace": "decode", "requests": requests, "contexts": (context, context), "steps": 8, **_V32}
    return Case(name, params, **flags)


_CASES = (
    Case(
        "tiny",
        {"trace": "decode", "requests": 3, "contexts": (24, 34), "steps": 10, **_SMALL},
        tiny=True,
        about="decode across top-k",
    ),
    Case(
        "tiny-chunks",
        {"trace": "prefill", "prompt": 130, "budget": 40, **_SMALL},
        tiny=True,
        about="a prompt in four chunks, each longer than top-k",
    ),
    Case(
        "tiny-serving",
        {"trace": "serving", "slots": 4, "prompt": 28, "output": 9, "budget": 20, "steps": 16, **_SMALL},
        tiny=True,
        about="requests finish and join; prompts are prefilled beside decodes",
    ),
    Case(
        "tiny-drafts",
        {
            "trace": "listed",
            "lengths": [((6, 2), (36, 32)), ((2, 6), (32, 36)), ((4, 4), (34, 34)), ((4, 4), (34, 34))],
            **_SMALL,
        },
        tiny=True,
        about="several tokens per request, in different shares",
    ),
    Case(
        "tiny-blind",
        {
            "trace": "decode",
            "requests": 3,
            "contexts": (8, 16),
            "steps": 8,
            "blind": (1, 2, 3, 6),
            **_SMALL,
        },
        tiny=True,
        about="steps whose lengths only the device knows",
    ),
    Case(
        "tiny-empty",
        {
            "trace": "listed",
            "lengths": [((), ()), ((1, 1, 1), (5, 0, 40)), ((1, 1, 1), (5, 0, 40)), ((2, 0), (0, 7)), ((), ())],
            **_SMALL,
        },
        tiny=True,
        about="empty steps, padding requests, a request without a token",
    ),
    _decode("v32-1-5k", 1, 5000, measured=True, about="one request past top-k"),
    _decode("v32-64-5k", 64, 5000, measured=True, about="the source's batch, every request past top-k"),
    _decode("v32-512-5k", 512, 5000, measured=True),
    _decode("v32-64-1k", 64, 1000, measured=True, about="every request below top-k: the plan changes in every step"),
    Case(
        "v32-chunks",
        {"trace": "prefill", "prompt": 22_000, "budget": 8192, **_V32},
        about="the prompt of vllm#47567: three chunks",
    ),
    Case(
        "v32-serving",
        {"trace": "serving", "slots": 64, "prompt": 5000, "output": 500, "budget": 8192, "steps": 8, **_V32},
        about="5000 in, 500 out, 64 in flight",
    ),
)

OPTIMIZATION = Optimization(
    id="metadata_cache",
    number=15,
    title="Metadata cache",
    part="IV orchestration",
    sources=("vllm#42982", "vllm#47766", "vLLM 0.33.0"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_plan_every_step,
    optimized=_cached,
    gate=Gate(tuple(Check(name, "exact") for name in ("outside", "kv_indptr", *_BUFFERS))),
    hazards={
        "key-collision": Hazard(
            title="the key leaves out the context length",
            story="The published key holds min(length, top-k) per request. The first chunk of a prompt ramps up from "
            "one entry per token, the second has top-k for every token, and both chunks have the same key.",
            source="vllm#42982; symptoms in vllm#47042 and #46856; blamed on the kernel in aiter#4076 and "
            "vllm#47567; mended by vllm#47766",
            ids=("H01",),
            case="tiny-chunks",
            planted=lambda inputs: _cached(inputs, published_key),
        ),
        "no-query-segments": Hazard(
            title="the key leaves out how the tokens are shared out between requests",
            story="Once lengths are clamped, context and length no longer give the number of query tokens: (6, 2) and "
            "(2, 6) tokens look alike.",
            source="vllm#47766 adds the query lengths beside the context lengths",
            ids=("H01",),
            case="tiny-drafts",
            planted=lambda inputs: _cached(inputs, _unsegmented),
        ),
        "none-is-a-hit": Hazard(
            title="missing host lengths compare equal",
            story="The host copy of the lengths is optional. A key that takes None for a value finds two steps without "
            "one to be the same step.",
            source="vllm#42982, review (left open there)",
            ids=("H03",),
            case="tiny-blind",
            planted=lambda inputs: _cached(inputs, _none_is_a_value),
        ),
        "stale-plan": Hazard(
            title="the plan is kept while lengths change under it",
            story="A plan names absolute KV positions. When a request leaves and a shorter one takes its place, the "
            "kept plan reads past the end of what is there.",
            source="ROCm/vllm#900, the first version of its scratch",
            ids=("H05",),
            case="tiny-serving",
            planted=lambda inputs: _cached(inputs, _tokens_only),
        ),
        "frozen-at-capture": Hazard(
            title="the decision is captured",
            story="Host code does not run in a replay: whatever was compared at capture is compared for ever, and the "
            "plan of the captured lengths stays.",
            source="vllm#51318, vllm#52448, vllm#50004 (the same with other host values)",
            ids=("H07",),
            case="tiny",
            planted=_key_frozen_at_capture,
        ),
        "address-key": Hazard(
            title="the cache is keyed on the address of the lengths",
            story="Capture wants the lengths in one persistent buffer, so their address is the one thing that never "
            "changes.",
            source="no report of this very bug; chapter 08 has it for weights (doubleword fork, review of PR 12)",
            ids=("H31", "H05"),
            case="tiny",
            planted=_keyed_on_address,
        ),
    },
    predict=_predict,
    claims=records.published("metadata_cache"),
    timed=_timed,
    host_timed=_host_timed,
    measured_modules=("dsv4ref.kernels.work_plan", "dsv4ref.serving.metadata"),
    kernels=_requests,
)
