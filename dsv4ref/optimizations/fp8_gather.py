"""Chapter 11: gather cache entries straight into FP8 rows with their block scales, instead of through bf16.

Baseline: gather and dequantise into bf16 rows, then decode over them. Optimised: gather the entries as they are (codes,
scale bytes, bf16 rope; relabelled if the target dialect is the other one), then decode over those. Both hold the
cache's numbers exactly; the rows take 584 bytes instead of 1025.

The source dequantises the whole cache to bf16 and casts that to FP8 with scale 1. Its cast is a planted bug here, over
the listed entries only; `recast` counts what it loses.

Source: ROCm/vllm#900, ``rocm_aiter_dsv4_decode.py`` (the cast, with ``kv_scale`` = 1); vllm#56426 (a gather that does
not requantise, for AITER's later decode kernel).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref import device
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import Dialect, KVCache, Scope, fp8, kv_cache
from dsv4ref.formats.kv_cache import ENTRY_BYTES, HEAD_DIM, NOPE_DIM, SCALE_BLOCK, SCALE_COUNT
from dsv4ref.kernels.codes import decode_mode
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.fp8_gather import (
    GATHER_ROWS,
    GatherBuffer,
    GatheredScope,
    Kind,
    allocate_buffer,
    entry_bytes,
    gather_bf16,
    gather_fp8,
    gather_unit_scale,
)
from dsv4ref.kernels.sparse_mla.gathered_decode import gathered_launch, sparse_mla_decode_gathered
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case

__all__ = ["OPTIMIZATION", "WAYS", "GatherInputs", "attend", "read_rows", "traffic_rows"]

Outputs = dict[str, Tensor]
Gather = Callable[[Scope, Dialect], GatheredScope]

_SPREAD = 6
"""Binary orders between the scales of one entry's blocks in the cases called spread."""
_LAUNCH_US = 2.0
"""Assumed cost of one launch inside a graph, microseconds, on top of the bytes it moves."""


@dataclass(frozen=True)
class GatherInputs:
    """Decode inputs and the dialect that the FP8 rows are wanted in."""

    decode: DecodeInputs
    target: Dialect


# --- inputs ---


def _build(case: Case, device: str, seed: int) -> GatherInputs:
    decode = decode_inputs.build(case, device, seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    change = _SCALES[case.params["scales"]]
    if change is not None:
        swa = replace(decode.swa, cache=change(decode.swa.cache, generator))
        extra = decode.extra and replace(decode.extra, cache=change(decode.extra.cache, generator))
        decode = replace(decode, swa=swa, extra=extra)
    return GatherInputs(decode, _target(case.params["target"], device))


def _target(asked: str, where: str) -> Dialect:
    if asked != "native":
        return Dialect.of(asked, argument="target")
    return Dialect.of(device.native_dialect(device.current().arch)) if where == "cuda" else Dialect.FN


def _spread(cache: KVCache, generator: torch.Generator) -> KVCache:
    """Every block's scale up to `_SPREAD` binary orders lower: what a writer stores for blocks of unequal size."""
    changed = _copy(cache)
    scales = changed.entry_scales[..., :SCALE_COUNT]
    lower = torch.randint(0, _SPREAD + 1, scales.shape, generator=generator, device=scales.device)
    scales.copy_(torch.where(scales == 255, 255, (scales - lower).clamp(min=0)))
    return changed


def _corners(cache: KVCache, generator: torch.Generator) -> KVCache:
    """A few blocks under the two lowest scale bytes, 0 (2^-127) and 1; a -0 in every entry of an OCP cache."""
    changed = _copy(cache)
    scales = changed.entry_scales[..., :SCALE_COUNT]
    lot = torch.randint(0, 10, scales.shape, generator=generator, device=scales.device)
    scales.copy_(torch.where((lot < 2) & (scales != 255), lot, scales))
    if cache.dialect is Dialect.FN:
        changed.entry_rows[..., 5] = torch.where(scales[..., 0] == 255, changed.entry_rows[..., 5], 0x80)
    return changed


_SCALES: Mapping[str, Callable[[KVCache, torch.Generator], KVCache] | None] = {
    "written": None,
    "spread": _spread,
    "corners": _corners,
}


def _copy(cache: KVCache) -> KVCache:
    """The same bytes in memory of their own, padding included."""
    flat = cache.data.as_strided((cache.num_blocks * cache.block_stride,), (1,)).clone()
    return KVCache(flat.as_strided(cache.data.shape, cache.data.stride()), cache.dialect)


# --- the paths ---


def _into_new(kind: Kind, gather: Callable[[Scope, GatherBuffer], GatheredScope]) -> Gather:
    """The gather into a buffer of its own, every byte of which is NaN before."""
    return lambda scope, target: gather(
        scope, allocate_buffer(scope.indices.numel(), kind, target, device=scope.cache.data.device)
    )


_KEPT = _into_new(Kind.SCALES_KEPT, gather_fp8)
_BF16 = _into_new(Kind.BF16, gather_bf16)
_UNIT = _into_new(Kind.UNIT_SCALE, gather_unit_scale)


def _recast_nope(scope: Scope, target: Dialect) -> GatheredScope:
    """Nope codes re-cast with scale 1, rope as it was."""
    gathered = _KEPT(scope, target)
    gathered.buffer.values.copy_(_UNIT(scope, target).buffer.values[:, :NOPE_DIM])
    gathered.buffer.tags[:, :SCALE_COUNT] = 127
    return gathered


WAYS: Mapping[str, Gather] = {
    "bf16 rows": _BF16,
    "scales kept": _KEPT,
    "unit scale": _UNIT,
    "unit scale, rope kept": _recast_nope,
}
"""Ways to gather a scope in a dialect. The last one isolates what dropping the scales does."""


def read_rows(gathered: GatheredScope) -> Tensor:
    """The numbers that gathered rows hold, read by the formats.

    Args:
        gathered: a scope's rows.

    Returns:
        bf16 ``[positions of the lists, 512]``, without the sign of zero, which fnuz does not have.
    """
    rows, count = gathered.buffer, int(gathered.indptr[-1])
    values = rows.values[:count]
    if rows.kind is Kind.UNIT_SCALE:
        return fp8.decode(values, rows.dialect, torch.bfloat16) + 0.0
    if rows.rope is None:
        return values + 0.0
    return kv_cache.dequantise(values, rows.tags[:count, :SCALE_COUNT], rows.rope[:count], rows.dialect) + 0.0


def attend(inputs: DecodeInputs, gathered: Sequence[GatheredScope]) -> tuple[Tensor, Tensor]:
    """Attention over gathered scopes.

    Args:
        inputs: q, sink and softmax scale.
        gathered: the SWA scope's rows and, if there is one, the extra scope's.

    Returns:
        out bf16 ``[T, H, 512]`` and natural-log lse fp32 ``[T, H]``.
    """
    out, lse = sparse_mla_decode_gathered(inputs.q, *gathered, sink=inputs.sink, scale=inputs.scale, return_lse=True)
    assert lse is not None
    return out, lse


def _run(inputs: GatherInputs, gather: Gather) -> Outputs:
    gathered = [gather(scope, inputs.target) for scope in inputs.decode.scopes]
    out, lse = attend(inputs.decode, gathered)
    valid = torch.cat([g.buffer.valid[: int(g.indptr[-1])] for g in gathered])
    return {"out": out, "lse": lse, "keys": torch.cat([read_rows(g) for g in gathered]), "valid": valid}


def _baseline(inputs: GatherInputs) -> Outputs:
    return _run(inputs, _BF16)


def _optimized(inputs: GatherInputs) -> Outputs:
    return _run(inputs, _KEPT)


def _reference(inputs: GatherInputs) -> Outputs:
    """Attention in float64 on the caches' numbers; the numbers and validity of every listed slot."""
    keys, valid = [], []
    for scope in inputs.decode.scopes:
        slots = scope.indices[: int(scope.indptr[-1])].to(torch.int64)
        is_entry = (slots >= 0) & (slots < scope.cache.rows)
        rows = torch.zeros((len(slots), HEAD_DIM), dtype=torch.bfloat16, device=slots.device)
        rows[is_entry] = kv_cache.gather(scope.cache, slots[is_entry]) + 0.0
        keys.append(rows)
        valid.append(is_entry.to(torch.uint8))
    return {**decode_inputs.reference(inputs.decode), "keys": torch.cat(keys), "valid": torch.cat(valid)}


def _yardstick(inputs: GatherInputs) -> Outputs:
    return decode_inputs.plain(inputs.decode)


def _timed(inputs: GatherInputs) -> Mapping[str, Callable[[], object]]:
    """Both paths and their parts; the re-cast in one kernel and in two passes; and the decode that needs no gather."""
    d = inputs.decode
    out = torch.empty_like(d.q)

    def buffers(kind: Kind) -> list[GatherBuffer]:
        return [allocate_buffer(s.indices.numel(), kind, inputs.target, device=s.indices.device) for s in d.scopes]

    def path(kind: Kind, gather: Callable[[Scope, GatherBuffer], GatheredScope]) -> tuple[Callable[[], object], ...]:
        into = buffers(kind)
        ready = [gather(scope, rows) for scope, rows in zip(d.scopes, into, strict=True)]

        def gathers() -> None:
            for scope, rows in zip(d.scopes, into, strict=True):
                gather(scope, rows)

        def decode() -> None:
            sparse_mla_decode_gathered(d.q, *ready, sink=d.sink, scale=d.scale, out=out)

        def both() -> None:
            gathers()
            decode()

        return both, gathers, decode

    bf16, bf16_gather, bf16_decode = path(Kind.BF16, gather_bf16)
    kept, kept_gather, kept_decode = path(Kind.SCALES_KEPT, gather_fp8)
    unit, _, unit_decode = path(Kind.UNIT_SCALE, gather_unit_scale)
    staged, codes = buffers(Kind.BF16), buffers(Kind.UNIT_SCALE)

    def two_passes() -> None:
        for scope, rows, cast in zip(d.scopes, staged, codes, strict=True):
            gather_bf16(scope, rows)
            cast.values.view(inputs.target.dtype).copy_(rows.values)
        unit_decode()

    return {
        "baseline": bf16,
        "optimized": kept,
        "unit scale": unit,
        "bf16, then cast to unit scale": two_passes,
        "gather to bf16": bf16_gather,
        "gather to fp8": kept_gather,
        "decode over bf16 rows": bf16_decode,
        "decode over fp8 rows": kept_decode,
        "decode from the cache": lambda: sparse_mla_decode(d.q, d.swa, d.extra, sink=d.sink, scale=d.scale, out=out),
    }


# --- prediction ---


def traffic_rows() -> list[dict[str, Any]]:
    """Bytes that each way to attention moves for one listed entry, and kernel launches per scope before the decode."""
    cast = 2 * HEAD_DIM + HEAD_DIM  # bf16 in, codes out
    kept, bf16, unit = (entry_bytes(kind) for kind in (Kind.SCALES_KEPT, Kind.BF16, Kind.UNIT_SCALE))
    rows = (
        ("bf16 rows (baseline)", ENTRY_BYTES, bf16, 0, bf16, 1),
        ("fp8 rows, scales kept (optimised)", ENTRY_BYTES, kept, 0, kept, 1),
        ("fp8 rows, unit scale, one kernel", ENTRY_BYTES, unit, 0, unit, 1),
        ("bf16 rows, then cast to unit scale", ENTRY_BYTES, bf16, cast, unit, 2),
        ("no rows: decode from the cache", 0, 0, 0, ENTRY_BYTES, 0),
    )
    keys = ("way", "gather reads", "gather writes", "cast moves", "decode reads")
    return [{**dict(zip(keys, row, strict=False)), "bytes": sum(row[1:5]), "launches": row[5]} for row in rows]


def _predict(case: Case, device_key: str) -> Prediction:
    p = case.params
    entries = p["rows"] * decode_inputs.keys_per_row(p)
    scopes = 1 if p["extra"] is None else 2
    spec = decode_model.spec_for(device_key) if p["rows"] else None  # an empty batch takes no time to compare
    passes = gathered_launch(spec.arch if spec else "cpu").workgroups(1, p["heads"])
    vectors, flops = 2 * decode_model.vector_bytes(p), decode_model.decode_flops(p)

    def asked(kind: Kind) -> int:
        return entries * (ENTRY_BYTES + (1 + passes) * entry_bytes(kind)) + vectors

    def time_us(kind: Kind) -> float | None:
        if spec is None or spec.bandwidth_tb_s is None or spec.bf16_tflops is None:
            return None
        gather_us = entries * (ENTRY_BYTES + entry_bytes(kind)) / (spec.bandwidth_tb_s * 1e6)
        memory_us = (entries * entry_bytes(kind) + vectors) / (spec.bandwidth_tb_s * 1e6)
        return gather_us + max(memory_us, flops / (spec.bf16_tflops * 1e6)) + (scopes + 1) * _LAUNCH_US

    return Prediction(
        baseline_bytes=asked(Kind.BF16),
        optimized_bytes=asked(Kind.SCALES_KEPT),
        least_bytes=decode_model.least_bytes(p),
        flops=flops,
        baseline_launches=scopes + 1,
        optimized_launches=scopes + 1,
        baseline_us=time_us(Kind.BF16),
        optimized_us=time_us(Kind.SCALES_KEPT),
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason="each gather at the published bandwidth, the decode at its roofline with every row read from memory "
        "once, and a round figure per launch: the ratio is of bytes, and a decode above its roofline dilutes it",
    )


# --- hazards ---


def _tampered(change: Callable[[Scope, GatheredScope], None]) -> Callable[[GatherInputs], Outputs]:
    """The optimised path with something wrong about the gathered rows."""

    def planted(inputs: GatherInputs) -> Outputs:
        def gather(scope: Scope, target: Dialect) -> GatheredScope:
            gathered = _KEPT(scope, target)
            change(scope, gathered)
            return gathered

        return _run(inputs, gather)

    return planted


def _rope_in_fp8(scope: Scope, gathered: GatheredScope) -> None:
    rope, dialect = gathered.buffer.rope, gathered.buffer.dialect
    assert rope is not None
    rope.copy_(fp8.decode(fp8.encode(rope, dialect), dialect))


def _scales_dropped(scope: Scope, gathered: GatheredScope) -> None:
    gathered.buffer.tags[:, :SCALE_COUNT] = 127


def _byte_zero_as_zero(scope: Scope, gathered: GatheredScope) -> None:
    """Blocks under scale byte 0 as a reader has them that shifts the byte into the exponent field: 0.0."""
    zeroed = (gathered.buffer.tags[:, :SCALE_COUNT] == 0).repeat_interleave(SCALE_BLOCK, dim=1)
    gathered.buffer.values[zeroed] = 0


def _entries(scope: Scope, gathered: GatheredScope) -> tuple[Tensor, Tensor]:
    """Positions of the lists that hold an entry, and its slot."""
    at = gathered.buffer.valid[: int(gathered.indptr[-1])].nonzero()[:, 0]
    return at, scope.indices[at].to(torch.int64)


def _cast_by_value(saturate: bool) -> Callable[[Scope, GatheredScope], None]:
    """Codes converted by value under the old scale: what does not fit saturates, or becomes NaN."""

    def change(scope: Scope, gathered: GatheredScope) -> None:
        at, slots = _entries(scope, gathered)
        block, position = slots // scope.cache.block_size, slots % scope.cache.block_size
        target = gathered.buffer.dialect
        values = fp8.decode(scope.cache.entry_rows[block, position][:, :NOPE_DIM].contiguous(), scope.cache.dialect)
        codes = fp8.encode(values, target) if saturate else values.to(target.dtype).view(torch.uint8)
        gathered.buffer.values[at] = codes
        gathered.buffer.tags[at, :SCALE_COUNT] = scope.cache.entry_scales[block, position][:, :SCALE_COUNT]

    return change


def _bare_cast(inputs: GatherInputs) -> Outputs:
    with warnings.catch_warnings():  # NumPy, under the interpreter, remarks that a row of NaN has no maximum
        warnings.simplefilter("ignore", RuntimeWarning)
        return _tampered(_cast_by_value(saturate=False))(inputs)


def _scales_from(offset: int, neighbour: bool) -> Callable[[Scope, GatheredScope], None]:
    """Scale bytes read ``offset`` bytes late, or from the entry beside the right one."""

    def change(scope: Scope, gathered: GatheredScope) -> None:
        at, slots = _entries(scope, gathered)
        block, position = slots // scope.cache.block_size, slots % scope.cache.block_size
        stored = scope.cache.entry_scales[block, position ^ 1 if neighbour else position]
        gathered.buffer.tags[at, :SCALE_COUNT] = stored[:, offset : offset + SCALE_COUNT]

    return change


def _validity_ignored(scope: Scope, gathered: GatheredScope) -> None:
    gathered.buffer.valid.fill_(1)


def _stale_rows(inputs: GatherInputs) -> Outputs:
    """A gather that returns early for a slot that is none; the buffer holds the step before."""

    def gather(scope: Scope, target: Dialect) -> GatheredScope:
        before = _KEPT(replace(scope, indices=scope.indices % scope.cache.block_size), target)  # entries everywhere
        now = _KEPT(scope, target)
        skipped = now.buffer.valid == 0
        for name, plane in now.buffer.planes.items():
            plane[skipped] = before.buffer.planes[name][skipped]
        return now

    return _run(inputs, gather)


def _wrong_label(inputs: GatherInputs) -> Outputs:
    """Rows gathered as they are, under the label of the dialect that was asked for."""

    def gather(scope: Scope, target: Dialect) -> GatheredScope:
        gathered = _KEPT(scope, scope.cache.dialect)
        return replace(gathered, buffer=replace(gathered.buffer, dialect=target))

    return _run(inputs, gather)


# --- kernels, cases, the chapter ---


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """Both gathers and the decode over both kinds of rows; caches and rows as upstream has them on the architecture."""
    native = Dialect.of(device.native_dialect(arch), argument=f"native dialect of {arch}")
    lists = {"cache": "*u8", "indices": "*i32", "indptr": "*i32"}
    sizes = {"num_queries": "i32", "capacity": "i32", "num_rows": "i32", "block_stride": "i32"}
    gathers = [
        _gather_request("_gather_scaled_kernel", f"scales kept, {convert}",
                        {**lists, "codes": "*u8", "tags": "*u8", "rope": "*bf16", **sizes}, {"CONVERT": convert})
        for convert in ("none", "to_fnuz" if native is Dialect.FNUZ else "to_fn")
    ]  # fmt: skip
    gathers.append(
        _gather_request("_gather_values_kernel", "bf16", {**lists, "out": "*bf16", "tags": "*u8", **sizes},
                        {"MODE": decode_mode(Dialect.FN, arch), "STORE": "bf16"})
    )  # fmt: skip
    return (*gathers, *(_decode_request(kind, native, arch) for kind in Kind))


def _gather_request(function: str, label: str, signature: dict[str, str], constexprs: dict[str, Any]) -> CompileRequest:
    pointers = {name for name, kind in signature.items() if kind.startswith("*")}
    return CompileRequest(
        kernel="gather_rows",
        module="dsv4ref.kernels.sparse_mla.fp8_gather",
        function=function,
        shape=f"{label} x{GATHER_ROWS} w4 s1",
        signature=signature,
        constexprs={"BLOCK_SIZE": 64, "ROWS": GATHER_ROWS, **constexprs},
        num_warps=4,
        divisible_by_16=frozenset(pointers | {"block_stride"}),
    )


def _decode_request(kind: Kind, dialect: Dialect, arch: str) -> CompileRequest:
    launch = gathered_launch(arch)
    pointers = {"q": "*bf16", "out": "*bf16", "lse": "*bf16", "sink": "*fp32"}
    for scope in ("swa", "extra"):
        pointers[f"{scope}_values"] = "*bf16" if kind is Kind.BF16 else "*u8"
        pointers[f"{scope}_tags"] = "*u8"
        pointers[f"{scope}_rope"] = "*bf16" if kind is Kind.SCALES_KEPT else "*u8"
        pointers[f"{scope}_indptr"] = "*i32"
    strides = "num_heads q_stride_t q_stride_h out_stride_t out_stride_h lse_stride_t lse_stride_h"
    aligned = dict.fromkeys(strides.split(), "i32")
    free = {"swa_capacity": "i32", "extra_capacity": "i32", "scale_log2": "fp32"}
    mode = decode_mode(dialect, arch)
    return CompileRequest(
        kernel="gathered_decode",
        module="dsv4ref.kernels.sparse_mla.gathered_decode",
        function="_gathered_decode_kernel",
        shape=f"{launch}, {kind.value}",
        signature={**pointers, **aligned, **free},
        constexprs={
            "KIND": kind.value,
            "SWA_MODE": mode,
            "EXTRA_MODE": mode,
            "HAS_EXTRA": True,
            "HAS_SINK": True,
            "HAS_LSE": False,
            "BLOCK_H": launch.block_h,
            "BLOCK_K": launch.block_k,
        },
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible_by_16=frozenset(pointers) | frozenset(aligned),
    )


def _with(case: Case, target: str, scales: str = "written", **changes: Any) -> Case:
    return replace(case, params={**case.params, "target": target, "scales": scales}, **changes)


_TINY = {case.name: case for case in decode_inputs.tiny_and_odd_cases()}
_CASES = (
    _with(_TINY["tiny"], "e4m3fn"),
    _with(_TINY["tiny-ragged"], "e4m3fn"),
    _with(_TINY["tiny-fnuz"], "e4m3fnuz", about="SWA cache in fnuz, extra cache in OCP, rows wanted in fnuz"),
    _with(_TINY["tiny-c128"], "e4m3fn"),
    _with(
        _TINY["tiny-swa-only"], "e4m3fnuz", "corners",
        about="SWA-only layer, odd heads; an OCP cache into fnuz rows, -0 and the lowest scales in it",
    ),
    _with(
        decode_case("tiny-spread", rows=2, heads=8, swa=24, extra=20, extra_dialect="e4m3fnuz", tiny=True,
                    about="block scales of one entry up to six binary orders apart; an fnuz cache into OCP rows"),
        "e4m3fn", "spread",
    ),
    _with(
        decode_case("tiny-corners", rows=2, heads=4, swa=20, extra=None, tiny=True,
                    about="blocks under scale bytes 0 and 1, -0"),
        "e4m3fn", "corners",
    ),
    _with(decode_case("flash-none", rows=0, heads=64, about="an empty batch", tiny=True), "e4m3fn"),
    _with(_TINY["flash-tp4-3"], "e4m3fnuz"),
    _with(_TINY["pro-tp4-3"], "e4m3fn"),
    _with(_TINY["flash-74"], "native", "spread"),
    _with(_TINY["flash-321"], "native"),
    *(_with(case, "native") for case in decode_inputs.production_cases()),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="fp8_gather",
    number=11,
    title="FP8 gather",
    part="II sparse MLA decode",
    sources=("ROCm/vllm#900", "vllm#56426"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_yardstick,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("out", "budget", "attention_bf16"),
            Check("lse", "budget", "lse_fp32"),
            Check("keys", "exact"),
            Check("valid", "exact"),
        )
    ),
    hazards={
        "unit-scale": Hazard(
            title="rows re-cast to FP8 with scale 1",
            story="The gather dequantises to bf16, exactly, and the cast that follows keeps what scale 1 can hold: "
            "small numbers lose bits or become zero, and rope, which was bf16, keeps four bits of eight.",
            source="ROCm/vllm#900 (kv.to(float8_e4m3fn), kv_scale = 1)",
            ids=("H21",),
            case="tiny",
            planted=lambda inputs: _run(inputs, _UNIT),
        ),
        "unit-scale-spread": Hazard(
            title="the same with rope kept in bf16",
            story="What the dropped scales alone do, where the blocks of one entry differ in size.",
            source="ROCm/vllm#900, with its rope repaired",
            ids=("H21",),
            case="tiny-spread",
            planted=lambda inputs: _run(inputs, _recast_nope),
        ),
        "rope-in-fp8": Hazard(
            title="scales kept, rope rounded to FP8",
            story="One dtype for 512 dims is simpler than two. The 64 rope dims never had a scale, and lose half of "
            "their bits.",
            source="ROCm/vllm#900 (one FP8 tensor of 512 dims)",
            ids=("H21",),
            case="tiny",
            planted=_tampered(_rope_in_fp8),
        ),
        "scales-dropped": Hazard(
            title="codes gathered without their scales",
            story="The codes are right, and every block is as large as its largest element allows.",
            source="no report of this very bug; vllm#42893 (a factor of two) is akin",
            ids=("H21",),
            case="tiny",
            planted=_tampered(_scales_dropped),
        ),
        "cast-to-nan": Hazard(
            title="OCP codes cast to fnuz by value, torch's bare cast",
            story="A code decodes to as much as 448. fnuz ends at 240, and the cast makes NaN of 248 and more.",
            source="PyTorch: Tensor.to(torch.float8_e4m3fnuz)",
            ids=("H19",),
            case="tiny-swa-only",
            planted=_bare_cast,
        ),
        "cast-saturates": Hazard(
            title="OCP codes cast to fnuz by value, clamped at 240",
            story="No NaN to see, and the largest elements of every block are cut off.",
            source="doubleword vLLM fork, fused_deepseek_v4_qnorm_rope .cu: a fixed 448 before a cast to fnuz",
            ids=("H19",),
            case="tiny-swa-only",
            planted=_tampered(_cast_by_value(saturate=True)),
        ),
        "wrong-label": Hazard(
            title="rows copied as they are, read in the dialect that was asked for",
            story="Keys half or twice their size in one of two scopes, and -0 reads as NaN.",
            source="vllm#42893, vllm#45681",
            ids=("H17",),
            case="tiny-fnuz",
            planted=_wrong_label,
        ),
        "shifted-scales": Hazard(
            title="scale byte 0 read as zero",
            story="byte << 23 is right for 1 to 254. Attention cannot see a number of 2^-127, so the rows are compared "
            "as well.",
            source="OCP MX v1.0, section 5.4; vLLM 0.33.0, which special-cases the zero",
            ids=("H18",),
            case="tiny-corners",
            planted=_tampered(_byte_zero_as_zero),
        ),
        "neighbours-scales": Hazard(
            title="scale bytes of the entry beside",
            story="Scales lie behind all data rows of a block and need an address of their own. Neighbours resemble "
            "each other, and most of their scale bytes agree.",
            source="ATOM#1904 (rows of a block addressed wrongly, 0.36 -> 0.958 when fixed) is akin",
            ids=(),
            case="tiny",
            planted=_tampered(_scales_from(0, neighbour=True)),
        ),
        "scales-one-late": Hazard(
            title="scale bytes read one byte late",
            story="Eight bytes per entry, seven of them scales. The last block gets the pad byte, 2^-127, and the "
            "others their successor's.",
            source="the format's own trap: FlashMLA tests/quant.py pads seven scales to eight",
            ids=("H18",),
            case="tiny",
            planted=_tampered(_scales_from(1, neighbour=False)),
        ),
        "stale-rows": Hazard(
            title="rows of slots that are none keep the step before",
            story="A persistent buffer is never empty. A gather that returns early for -1 leaves an older entry there, "
            "validity byte included.",
            source="AITER pa_decode_sparse at e4048607a and vllm#46408 (rows left unwritten) are akin",
            ids=("H12",),
            case="tiny-ragged",
            planted=_stale_rows,
        ),
        "validity-ignored": Hazard(
            title="a row of zeros taken for no key",
            story="A zero key scores 0, and exp(0) joins the denominator: every weight of the row shrinks.",
            source="no report of this very bug; FlashMLA's reference masks the scores of invalid slots as well as keys",
            ids=(),
            case="tiny-ragged",
            planted=_tampered(_validity_ignored),
        ),
    },
    predict=_predict,
    claims=records.published("fp8_gather"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.sparse_mla.fp8_gather",
        "dsv4ref.kernels.sparse_mla.gathered_decode",
        *decode_model.MEASURED_MODULES,
    ),
    kernels=_requests,
)
