"""Chapter 09: decode scope by scope, and merge the two results by their LSE with the sink applied once.

Baseline: the eager PyTorch decode that the published figure is against (`pytorch_decode`). Optimised: one decode launch
per scope that also returns its LSE, then one merge kernel. The source does this with AITER's persistent FP8 decode,
which knows neither a second cache nor a sink; here the producer is this workbook's own kernel, so that the merge can be
proved on any machine, and its single pass over both scopes is timed beside it: what does splitting cost?

Source: ROCm/vllm#900 and vllm#40889, ``rocm_aiter_dsv4_decode.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate, Verdict
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import Scope
from dsv4ref.kernels import peers
from dsv4ref.kernels.sparse_mla import (
    TwoScopeScratch,
    merge_scopes,
    select_launch,
    sparse_mla_decode,
    two_scope_decode,
)
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, table_for
from dsv4ref.kernels.sparse_mla.merge import HEADS_PER_PROGRAM, WARPS
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case
from dsv4ref.optimizations.pytorch_decode import GATHER_LAUNCHES, gather_bytes, gather_decode, gather_time_us
from dsv4ref.ref.sparse_attention import row_slots

__all__ = [
    "OPTIMIZATION",
    "PUBLISHED_COSINE",
    "accepted_as_published",
    "decode_scopes",
    "eager_merge",
    "merge_bytes",
    "merge_request",
    "split_times_us",
]

PUBLISHED_COSINE = 0.999
"""The source's criterion against PyTorch, at TP2, TP4 and TP8 head counts."""

_LAUNCHES = 3
_LAUNCH_US = 2.0
"""Assumed cost of one more launch inside a graph, microseconds, on top of the bytes it moves."""


def _build(case: Case, device: str, seed: int) -> DecodeInputs:
    inputs = decode_inputs.build(case, device, seed)
    missing = case.params["missing"]
    if missing == "none":
        return inputs
    rows = inputs.q.shape[0]
    if missing == "extra":  # a layer's first tokens: nothing is compressed yet
        swa, extra = [], list(range(rows))
    elif missing == "alternate":  # neither, the SWA scope, the extra scope, both
        swa, extra = [t for t in range(rows) if t % 4 in (1, 3)], [t for t in range(rows) if t % 4 in (2, 3)]
    else:
        raise ValueError(f"missing: got {missing!r}, expected 'none', 'extra' or 'alternate'")
    assert inputs.extra is not None
    return replace(inputs, swa=_without_rows(inputs.swa, swa), extra=_without_rows(inputs.extra, extra))


def _without_rows(scope: Scope, rows: Sequence[int]) -> Scope:
    """The scope with the lists of some rows emptied."""
    lengths = scope.indptr.diff()
    lengths[list(rows)] = 0
    kept = [scope.indices[int(scope.indptr[t]) : int(scope.indptr[t]) + int(n)] for t, n in enumerate(lengths)]
    indptr = torch.cat([scope.indptr[:1], lengths.cumsum(0).to(torch.int32)])
    return replace(scope, indices=torch.cat(kept), indptr=indptr)


def _named(outputs: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    out, lse = outputs
    assert lse is not None
    return {"out": out, "lse": lse}


def _baseline(inputs: DecodeInputs) -> dict[str, Tensor]:
    return _named(gather_decode(inputs.q, inputs.scopes, inputs.sink, inputs.scale))


def _optimized(inputs: DecodeInputs) -> dict[str, Tensor]:
    assert inputs.extra is not None
    return _named(
        two_scope_decode(
            inputs.q, inputs.swa, inputs.extra, sink=inputs.sink, scale=inputs.scale, return_lse=True
        )
    )  # fmt: skip


def accepted_as_published(verdict: Verdict) -> bool:
    """Whether an output that the gate has judged meets the source's criterion, cos > 0.999 over the whole tensor.

    The gate's own budget implies it: it bounds 1 - cos by 5e-6. NaN or infinity in the wrong place is no cosine.
    """
    difference = next(c.cosine_difference for c in verdict.comparisons if c.output == "out")
    return difference is not None and 1.0 - difference > PUBLISHED_COSINE


def decode_scopes(inputs: DecodeInputs, sink: Tensor | None = None) -> TwoScopeScratch:
    """Both scopes decoded apart, as a producer leaves them for the merge.

    Args:
        inputs: a decode step over two scopes.
        sink: None, as it must be. With a sink, each partial has lost the sink's share already.
    """
    rows, heads, _ = inputs.q.shape
    scratch = TwoScopeScratch.allocate(rows, heads, inputs.q.device)
    for scope, out, lse in zip(inputs.scopes, scratch.partials, scratch.lses, strict=True):
        sparse_mla_decode(inputs.q, scope, sink=sink, scale=inputs.scale, out=out, lse=lse)
    return scratch


def eager_merge(partials: Tensor, lses: Tensor, sink: Tensor, *, mask_empty_rows: bool = True) -> tuple[Tensor, Tensor]:
    """The merge as the source has it, in PyTorch operators: weights, sum, the sink's factor, empty rows zeroed.

    Args:
        partials: bf16 ``[2, T, H, 512]``.
        lses: fp32 ``[2, T, H]``, natural.
        sink: fp32 ``[H]``.
        mask_empty_rows: the last step. The source asks the host whether it is needed; here it always runs, so that
            the call can be captured.

    Returns:
        out bf16 ``[T, H, 512]``, lse fp32 ``[T, H]``. NaN where a part of weight 0 is NaN, or an LSE is +inf.
    """
    lse = torch.logsumexp(lses, dim=0)  # [T, H]
    first, second = ((part - lse).exp()[..., None] for part in lses)
    out = first * partials[0] + second * partials[1]  # [T, H, 512] fp32
    out = out * (1.0 / (1.0 + (sink - lse).exp()))[..., None]
    if mask_empty_rows:
        out = out.masked_fill((lse == -math.inf)[..., None], 0.0)
    return out.to(torch.bfloat16), lse


def _timed(inputs: DecodeInputs) -> Mapping[str, Callable[[], object]]:
    assert inputs.extra is not None
    q, swa, extra, sink, scale = inputs.q, inputs.swa, inputs.extra, inputs.sink, inputs.scale
    scratch, out = TwoScopeScratch.allocate(q.shape[0], q.shape[1], q.device), torch.empty_like(q)

    def scopes() -> None:
        for scope, partial, lse in zip(inputs.scopes, scratch.partials, scratch.lses, strict=True):
            sparse_mla_decode(q, scope, scale=scale, out=partial, lse=lse)

    def eager() -> None:
        scopes()
        eager_merge(scratch.partials, scratch.lses, sink)

    variants: dict[str, Callable[[], object]] = {
        "baseline": lambda: gather_decode(q, inputs.scopes, sink, scale),
        "optimized": lambda: two_scope_decode(q, swa, extra, sink=sink, scale=scale, out=out, scratch=scratch),
        "scopes, eager merge": eager,
        "scopes, not merged": scopes,
        "single pass": lambda: sparse_mla_decode(q, swa, extra, sink=sink, scale=scale, out=out),
    }
    peer = peers.flashmla_decode(q, swa, extra, sink=sink, scale=scale, out=torch.empty_like(q))
    return variants if peer is None else {**variants, "peer: FlashMLA": peer}


# --- prediction ---


def merge_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of one merge: both partials and their LSEs read, the output written."""
    return 3 * decode_model.vector_bytes(params) + 2 * _lse_bytes(params)


def _lse_bytes(params: Mapping[str, Any]) -> int:
    return int(4 * params["rows"] * params["heads"])


def _scopes_apart(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The decode shapes of the two launches: the SWA scope alone, and the extra scope in its place."""
    return {**params, "extra": None}, {**params, "swa": params["extra"], "extra": None}


def _shape(params: Mapping[str, Any], arch: str) -> LaunchShape:
    return select_launch(arch, params["rows"], params["heads"], params["extra"] or 0)


def split_times_us(params: Mapping[str, Any], device: str) -> dict[str, float]:
    """Modelled microseconds of the single pass, and of what stands in its place.

    That is both scopes' decodes, the write of one partial more than there are outputs (the decode model counts no
    writes), the merge's bytes, and two launches more.

    Raises:
        ValueError: the device publishes too little for the model.
    """
    spec = decode_model.spec_for(device)
    if spec is None or spec.bandwidth_tb_s is None:
        raise ValueError(f"device: got {device!r}, expected one whose bandwidth, matrix rate and units are published")
    swa, extra = (decode_model.decode_time_us(part, _shape(part, spec.arch), spec) for part in _scopes_apart(params))
    return {
        "single pass": decode_model.decode_time_us(params, _shape(params, spec.arch), spec),
        "SWA decode": swa,
        "extra decode": extra,
        "second partial": decode_model.vector_bytes(params) / (spec.bandwidth_tb_s * 1e6),
        "merge": merge_bytes(params) / (spec.bandwidth_tb_s * 1e6),
        "launches": (_LAUNCHES - 1) * _LAUNCH_US,
    }


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device) if p["rows"] else None  # an empty batch takes no time to compare
    arch = spec.arch if spec else "cpu"
    keys = sum(decode_model.key_bytes(part, _shape(part, arch)) for part in _scopes_apart(p))
    written = 2 * (decode_model.vector_bytes(p) + _lse_bytes(p))  # partials and their LSEs
    times = split_times_us(p, device) if spec else {}
    return Prediction(
        baseline_bytes=gather_bytes(p),
        optimized_bytes=keys + 2 * decode_model.vector_bytes(p) + written + merge_bytes(p),
        least_bytes=decode_model.least_bytes(p),
        flops=decode_model.decode_flops(p),
        baseline_launches=GATHER_LAUNCHES,
        optimized_launches=_LAUNCHES,
        baseline_us=gather_time_us(p, spec) if spec else None,
        optimized_us=sum(us for part, us in times.items() if part != "single pass") if spec else None,
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason="keys are read as 584 bytes instead of travelling through memory as bf16 and fp32, and scores never "
        "leave the chip; against a single pass, two launches more, and both partials written and read",
    )


def merge_request(arch: str, *, rotation: bool = False) -> CompileRequest:
    """The merge of two bf16 partials with a sink, as it would be specialised on an AMD architecture.

    Args:
        arch: "gfx942" or "gfx950".
        rotation: with inverse RoPE and the merged LSE as well.
    """
    pointers = {
        "partials": "*bf16", "lses": "*fp32", "sink": "*fp32", "out": "*bf16", "lse": "*fp32",
        "positions": "*i64" if rotation else "*fp32", "cos": "*fp32", "sin": "*fp32",
    }  # fmt: skip
    parts = "part_stride_n part_stride_t part_stride_h lses_stride_n lses_stride_t"
    results = "out_stride_t out_stride_h lse_stride_t lse_stride_h cos_stride sin_stride num_positions num_heads"
    sizes = dict.fromkeys(f"{parts} {results}".split(), "i32")
    folded = {"lses_stride_h": 1}
    if rotation:
        folded["lse_stride_h"] = 1
        del sizes["lse_stride_h"]
    return CompileRequest(
        kernel="merge_scopes",
        module="dsv4ref.kernels.sparse_mla.merge",
        function="_merge_scopes_kernel",
        shape=f"{HEADS_PER_PROGRAM} heads w{WARPS}{', rotation, LSE' if rotation else ''}",
        signature={**pointers, **sizes},
        constexprs={
            **folded,
            "PARTS": 2,
            "HAS_SINK": True,
            "HAS_ROPE": rotation,
            "HAS_LSE": rotation,
            "BLOCK_H": HEADS_PER_PROGRAM,
        },
        num_warps=WARPS,
        divisible_by_16=frozenset(pointers) | frozenset(sizes),
    )


def _one_scope_request(shape: LaunchShape, arch: str) -> CompileRequest:
    """The decode of one scope as the merge needs it: no second scope, no sink, an LSE of unit head stride."""
    request = decode_model.compile_request(shape, arch)
    signature = {**request.signature, "lse": "*fp32", "sink": "*bf16"}
    del signature["lse_stride_h"]
    changed = {"HAS_EXTRA": False, "HAS_SINK": False, "HAS_LSE": True, "lse_stride_h": 1}
    return replace(
        request,
        shape=f"{shape}, one scope, LSE",
        signature=signature,
        constexprs={**request.constexprs, **changed},
        divisible_by_16=request.divisible_by_16 - {"lse_stride_h"},
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    shapes = dict.fromkeys(rule.shape for rule in table_for(arch))
    merges = merge_request(arch), merge_request(arch, rotation=True)
    return (*merges, *(_one_scope_request(shape, arch) for shape in shapes))


# --- hazards ---


def _empty_rows_not_masked(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The eager merge without its last step: -inf - -inf in rows where both scopes are empty."""
    scratch = decode_scopes(inputs)
    return _named(eager_merge(scratch.partials, scratch.lses, inputs.sink, mask_empty_rows=False))


def _is_empty(scope: Scope) -> list[bool]:
    return [row_slots(scope, t).numel() == 0 for t in range(scope.num_queries)]


def _weight_masked_only(inputs: DecodeInputs) -> dict[str, Tensor]:
    """Partials of empty rows are never written (poisoned memory: NaN), and the merge multiplies them by 0."""
    scratch = decode_scopes(inputs)
    for scope, partial in zip(inputs.scopes, scratch.partials, strict=True):
        partial[_is_empty(scope)] = math.nan
    return _named(eager_merge(scratch.partials, scratch.lses, inputs.sink))


def _nothing_written_for_empty_rows(inputs: DecodeInputs) -> dict[str, Tensor]:
    """A producer that returns early for empty rows, in a scratch kept between steps: rows and LSEs of the last one."""
    scratch = decode_scopes(inputs)
    last = decode_scopes(replace(inputs, q=inputs.q.flip(0)))
    for scope, *pairs in zip(
        inputs.scopes, zip(scratch.partials, last.partials, strict=True), zip(scratch.lses, last.lses, strict=True),
        strict=True,
    ):  # fmt: skip
        for now, before in pairs:
            empty = _is_empty(scope)
            now[empty] = before.roll(1, 0)[empty]  # the batch has moved up by one row since
    return _merged(scratch.partials, scratch.lses, inputs.sink)


def _merged(partials: Tensor, lses: Tensor, sink: Tensor | None) -> dict[str, Tensor]:
    return _named(merge_scopes(partials, lses, sink=sink, return_lse=True))


def _sink_in_each_scope(inputs: DecodeInputs) -> dict[str, Tensor]:
    """Each scope's decode applies the sink, the merge does not: the sink is counted once per scope."""
    scratch = decode_scopes(inputs, sink=inputs.sink)
    return _merged(scratch.partials, scratch.lses, None)


def _base_2_taken_for_natural(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The producers return log2 of their sums and the merge takes them for natural logarithms."""
    scratch = decode_scopes(inputs)
    return _merged(scratch.partials, scratch.lses / math.log(2), inputs.sink)


def _lse_of_plus_infinity(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The extra scope's kernel returns +inf for some heads that have keys."""
    scratch = decode_scopes(inputs)
    scratch.lses[1, :, ::4] = math.inf
    return _merged(scratch.partials, scratch.lses, inputs.sink)


def _sink_scaled(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The sink is multiplied by the softmax scale, as if it were a raw score."""
    scratch = decode_scopes(inputs)
    return _merged(scratch.partials, scratch.lses, inputs.sink * inputs.scale)


# --- cases ---


def _case(case: Case, missing: str = "none", **changes: Any) -> Case:
    return replace(case, params={**case.params, "missing": missing}, **changes)


_ODD = {case.name: case for case in decode_inputs.tiny_and_odd_cases()}
_CASES = (
    _case(_ODD["tiny"], about="TP8 of Flash: 8 heads; odd batch"),
    _case(decode_case("tiny-tp4", rows=2, heads=16, swa=24, extra=20, tiny=True, about="TP4 of Flash: 16 heads")),
    _case(decode_case("tiny-tp2", rows=2, heads=32, swa=24, extra=20, tiny=True, about="TP2 of Flash, TP4 of Pro: 32")),
    _case(
        decode_case("tiny-gaps", rows=7, heads=8, swa=24, extra=20, tiny=True), "alternate",
        about="row by row: both scopes, no SWA, no extra, neither",
    ),
    _case(
        decode_case("tiny-early", rows=2, heads=8, swa=3, extra=16, tiny=True), "extra",
        about="a sequence's first tokens: no compressed entry in any row",
    ),
    _case(_ODD["tiny-ragged"]),
    _case(_ODD["tiny-fnuz"]),
    _case(_ODD["tiny-c128"]),
    _case(decode_case("tiny-one", rows=1, heads=5, swa=17, extra=33, tiny=True, about="one row, odd heads")),
    _case(decode_case("flash-none", rows=0, heads=64, tiny=True, about="an empty batch")),
    _case(_ODD["window-edges"]),
    _case(_ODD["flash-tp4-3"]),
    _case(_ODD["pro-tp4-3"]),
    _case(decode_case("pro-tp2-3", rows=3, heads=64, extra=1024, needs_gpu=True, about="V4-Pro at TP2, odd batch")),
    _case(_ODD["flash-74"]),
    _case(_ODD["flash-321"]),
    _case(
        decode_case("flash-tp4-128", rows=128, heads=16, measured=True, needs_gpu=True),
        about="the published batch at V4-Flash's TP4 heads",
    ),
    _case(
        decode_case("pro-tp4-128", rows=128, heads=32, extra=1024, measured=True, needs_gpu=True),
        about="the published batch at V4-Pro's TP4 heads",
    ),
    *(_case(case) for case in decode_inputs.production_cases()),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="persistent_decode",
    number=9,
    title="Two scopes, one merge",
    part="II sparse MLA decode",
    sources=("ROCm/vllm#900", "vllm#40889 (the same change, closed)"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=decode_inputs.reference,
    yardstick=decode_inputs.plain,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("out", "budget", "attention_bf16"),
            Check("lse", "budget", "lse_fp32"),
        )
    ),
    hazards={
        "both-empty": Hazard(
            title="rows without any key are not masked after the merge",
            story="Both LSEs are -inf, their merge is -inf, and the weights are exp(-inf - -inf) = NaN. The source "
            "asks the host whether a row is empty and masks it then; without the question the mask has to be there.",
            source="vllm#28181 and vllm#39148 (vLLM's own merge kernels); flashinfer#4051",
            ids=("H16",),
            case="tiny-ragged",
            planted=_empty_rows_not_masked,
        ),
        "nan-times-zero": Hazard(
            title="the weight of an empty scope is zero, its unwritten partial is not",
            story="A kernel that returns early leaves memory as it was. 0 x NaN is NaN, so masking the weight is not "
            "enough: the term has to be masked, as AITER's reduce does.",
            source="AITER e4048607a, mla reduce; vllm#41601",
            ids=("H12", "H16"),
            case="tiny-gaps",
            planted=_weight_masked_only,
        ),
        "stale-rows": Hazard(
            title="an empty scope's partial and LSE are those of the step before",
            story="In a scratch kept between steps an early return leaves a finite LSE beside a finite partial. "
            "Nothing is NaN, and no merge can tell it from a result.",
            source="vllm#49294 (a finite LSE for empty rows); AITER pa_decode_sparse at e4048607a (one split)",
            ids=("H12",),
            case="tiny-gaps",
            planted=_nothing_written_for_empty_rows,
        ),
        "sink-per-scope": Hazard(
            title="the sink is applied in each scope instead of once",
            story="Each partial is short by its own scope's share of the sink, and the shares do not add up to the "
            "sink's share of the whole row.",
            source="no report of this very bug; FlashMLA's combine and ROCm/vllm#900 apply it after the merge",
            ids=(),
            case="tiny-tp2",
            planted=_sink_in_each_scope,
        ),
        "base-2": Hazard(
            title="base-2 LSEs are merged as natural ones",
            story="Kernels keep scores in units of log 2 inside. AITER's skip_reduce hands out such partials, and "
            "FlashMLA's README calls the prefill LSE base-2 while its code returns the natural one.",
            source="sglang#35045 (FlashInfer's LSE in a natural merge); AITER pa_decode_sparse at e4048607a "
            "(skip_reduce); FlashMLA README against tests/ref.py",
            ids=(),
            case="tiny",
            planted=_base_2_taken_for_natural,
        ),
        "inf-lse": Hazard(
            title="a kernel returns an LSE of +inf for rows that have keys",
            story="AITER's 64-head persistent kernel does on gfx950, and the source splits 64 heads into two calls. "
            "An eager merge turns the row into NaN; one that takes +inf for empty, as this one, loses the scope.",
            source="ROCm/vllm#900 (mla_a8w8_qh64_qseqlen4_gqaratio16_lse_ps)",
            ids=("H16",),
            case="tiny",
            planted=_lse_of_plus_infinity,
        ),
        "sink-scaled": Hazard(
            title="the sink is multiplied by the softmax scale",
            story="The sink is compared with scaled scores and is not scaled itself. Scaled, every sink is near 0, and "
            "every head loses about the same share.",
            source="no report of this very bug; DeepSeek-V4 inference/kernel.py has the sink unscaled",
            ids=(),
            case="tiny-tp2",
            planted=_sink_scaled,
        ),
    },
    predict=_predict,
    claims=records.published("persistent_decode"),
    timed=_timed,
    measured_modules=(
        *decode_model.MEASURED_MODULES,
        "dsv4ref.kernels.sparse_mla.merge",
        "dsv4ref.kernels.sparse_mla.two_scope",
        "dsv4ref.optimizations.pytorch_decode",
    ),
    kernels=_requests,
)
