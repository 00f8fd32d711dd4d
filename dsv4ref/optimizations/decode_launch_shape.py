"""Chapter 05: choose the decode's launch shape by what the call looks like, instead of one shape for every batch.

Baseline: BLOCK_H 16, BLOCK_K 16, four warps, always. Optimised: `dsv4ref.kernels.sparse_mla.launch.select_launch`.
The same kernel on both sides, so results differ by summation order only: a budget gate.

Source: doubleword's vLLM fork, PR 12 and commit a767c4d13.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import KVCache, Scope
from dsv4ref.formats.kv_cache import ROW_BYTES
from dsv4ref.kernels import peers
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import PUBLISHED, STATIC, LaunchShape, choose, select_launch, table_for
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case

__all__ = ["OPTIMIZATION"]


def _decode(inputs: DecodeInputs, launch: LaunchShape | None) -> dict[str, Tensor]:
    out, lse = sparse_mla_decode(
        inputs.q, inputs.swa, inputs.extra, sink=inputs.sink, scale=inputs.scale, return_lse=True, launch=launch
    )
    assert lse is not None
    return {"out": out, "lse": lse}


def _baseline(inputs: DecodeInputs) -> dict[str, Tensor]:
    return _decode(inputs, STATIC)


def _optimized(inputs: DecodeInputs) -> dict[str, Tensor]:
    return _decode(inputs, None)


def _timed(inputs: DecodeInputs) -> Mapping[str, Callable[[], object]]:
    out = torch.empty_like(inputs.q)

    def variant(launch: LaunchShape | None) -> Callable[[], object]:
        return lambda: sparse_mla_decode(
            inputs.q, inputs.swa, inputs.extra, sink=inputs.sink, scale=inputs.scale, out=out, launch=launch
        )

    rows, heads = inputs.q.shape[0], inputs.q.shape[1]
    width = inputs.extra.width if inputs.extra is not None else 0
    published = choose(PUBLISHED, rows, heads, width).shape
    variants = {"baseline": variant(STATIC), "optimized": variant(None), "published table": variant(published)}
    peer = peers.flashmla_decode(
        inputs.q, inputs.swa, inputs.extra, sink=inputs.sink, scale=inputs.scale, out=torch.empty_like(inputs.q)
    )
    return variants if peer is None else {**variants, "peer: FlashMLA": peer}


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device)
    selected = select_launch(spec.arch if spec else "cpu", p["rows"], p["heads"], p["extra"] or 0)
    vectors = 2 * decode_model.vector_bytes(p)
    return Prediction(
        baseline_bytes=decode_model.key_bytes(p, STATIC) + vectors,
        optimized_bytes=decode_model.key_bytes(p, selected) + vectors,
        least_bytes=decode_model.least_bytes(p),
        flops=decode_model.decode_flops(p),
        baseline_launches=1,
        optimized_launches=1,
        baseline_us=decode_model.decode_time_us(p, STATIC, spec) if spec else None,
        optimized_us=decode_model.decode_time_us(p, selected, spec) if spec else None,
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason=f"{STATIC} -> {selected}: fewer passes over the keys once the compute units are full, "
        "fewer dependent memory trips per row when they are not",
    )


# --- hazards: the shipped entry point with one thing wrong ---


def _without_sink(inputs: DecodeInputs) -> dict[str, Tensor]:
    return _optimized(replace(inputs, sink=torch.full_like(inputs.sink, float("-inf"))))


def _one_dialect_for_both(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The extra cache read in the SWA cache's dialect."""
    assert inputs.extra is not None
    misread = KVCache(inputs.extra.cache.data, inputs.swa.cache.dialect)
    return _optimized(replace(inputs, extra=replace(inputs.extra, cache=misread)))


def _clamped_slots(scope: Scope) -> Scope:
    slots = scope.indices.clamp(0, scope.cache.rows - 1)
    return replace(scope, indices=slots)


def _mask_dropped(inputs: DecodeInputs) -> dict[str, Tensor]:
    """Invalid slots are made addressable instead of being masked, so that -1 reads slot 0."""
    extra = _clamped_slots(inputs.extra) if inputs.extra is not None else None
    return _optimized(replace(inputs, swa=_clamped_slots(inputs.swa), extra=extra))


def _list_cut_to_whole_tiles(inputs: DecodeInputs) -> dict[str, Tensor]:
    """Loop bounds computed with a rounded-down division: the last partial tile of every list is never visited."""
    return _optimized(replace(inputs, swa=_whole_tiles(inputs.swa, STATIC.block_k)))


def _whole_tiles(scope: Scope, tile: int) -> Scope:
    bounds = scope.indptr.tolist()
    kept = [list(range(b, b + (e - b) // tile * tile)) for b, e in itertools.pairwise(bounds)]
    order = torch.tensor([i for row in kept for i in row], dtype=torch.int64, device=scope.indices.device)
    lengths = torch.tensor([0, *(len(row) for row in kept)], device=scope.indptr.device).cumsum(0)
    return replace(scope, indices=scope.indices[order], indptr=lengths.to(torch.int32))


def _records_instead_of_planes(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The extra cache re-laid as ``data[b, i]`` = entry i, which is what the 584-byte view seems to say it is."""
    assert inputs.extra is not None
    cache = inputs.extra.cache
    flat = cache.data.new_zeros(cache.num_blocks * cache.block_stride)
    as_records = KVCache(flat.as_strided(cache.data.shape, cache.data.stride()), cache.dialect)
    as_records.data[:, :, :ROW_BYTES] = cache.entry_rows
    as_records.data[:, :, ROW_BYTES:] = cache.entry_scales
    return _optimized(replace(inputs, extra=replace(inputs.extra, cache=as_records)))


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    shapes = dict.fromkeys([STATIC, *(rule.shape for rule in table_for(arch)), *(rule.shape for rule in PUBLISHED)])
    return tuple(decode_model.compile_request(shape, arch) for shape in shapes)


def _tp8(rows: int) -> Case:
    return decode_case(f"flash-tp8-{rows}", rows=rows, heads=8, needs_gpu=rows > 1, about="V4-Flash at TP8")


_CASES = (
    *decode_inputs.tiny_and_odd_cases(),
    *(_tp8(rows) for rows in (1, 256)),
    *decode_inputs.production_cases(),
)

OPTIMIZATION = Optimization(
    id="decode_launch_shape",
    number=5,
    title="Launch shape of the sparse decode",
    part="II sparse MLA decode",
    sources=("doubleword vLLM fork PR 12, commit a767c4d13", "vllm#46275 (what superseded it)"),
    cases={case.name: case for case in _CASES},
    make_inputs=decode_inputs.build,
    reference=decode_inputs.reference,
    yardstick=decode_inputs.plain,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate((Check("out", "budget", "attention_bf16"), Check("lse", "budget", "lse_fp32"))),
    hazards={
        "sink-left-out": Hazard(
            title="the attention sink is left out",
            story="The sink belongs into the softmax denominator once, after both scopes. A variant that loses it "
            "returns plausible vectors that are all a little too long.",
            source="ROCm/vllm#900, review thread",
            ids=(),
            case="tiny",
            planted=_without_sink,
        ),
        "one-dialect-flag": Hazard(
            title="one FP8 dialect flag for both caches",
            story="On gfx942 the SWA cache is written in fnuz while the compressed cache is OCP; a reader with one "
            "flag halves or doubles one scope's keys and values and meets NaN at OCP's -0.",
            source="vllm#45681",
            ids=("H17",),
            case="tiny-fnuz",
            planted=_one_dialect_for_both,
        ),
        "mask-dropped": Hazard(
            title="invalid slots are clamped instead of masked",
            story="A -1 that is made addressable reads slot 0: another request's key enters the softmax, and rows that "
            "should be empty are not.",
            source="vllm#57036",
            ids=("H15",),
            case="tiny-ragged",
            planted=_mask_dropped,
        ),
        "last-tile-lost": Hazard(
            title="the last partial tile of a list is never visited",
            story="A loop bound rounded down works for every list length that is a multiple of BLOCK_K, which is every "
            "length a synthetic benchmark uses.",
            source="AITER commit dc10015752 (splits under 32 KV tokens drop the tail)",
            ids=(),
            case="tiny",
            planted=_list_cut_to_whole_tiles,
        ),
        "interleaved-view": Hazard(
            title="the 584-byte view is taken at its word",
            story="The cache tensor's shape says 584 bytes per entry, but a block is planar: rows first, then scales. "
            "Reading data[b, i] as entry i drifts by 8 bytes per entry.",
            source="vllm#50455 (the indexer cache's version of it)",
            ids=("H30",),
            case="tiny",
            planted=_records_instead_of_planes,
        ),
    },
    predict=_predict,
    claims=records.published("decode_launch_shape"),
    timed=_timed,
    measured_modules=decode_model.MEASURED_MODULES,
    kernels=_requests,
)
