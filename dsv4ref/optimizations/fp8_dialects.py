"""Chapter 02: each cache says which e4m3 dialect it is written in, instead of one reader flag for all of them.

Baseline: a reader with one flag, which has to re-encode a cache of the other dialect before it may read it. Optimised:
the reader takes the dialect from the cache (`dsv4ref.kernels.cache_gather.gather_entries`), and where a whole cache has
to change sides after all, its codes stay and its scale bytes move by one (`relabel_entries`).

Integers decide: the gate compares the bits of the dequantised rows, and the converted cache's codes and scales, with
the reference. All NaNs count as one; every other bit, the sign of zero included, counts.

Source: vllm#42893 and #45681 (MI300X: fnuz SWA cache beside an OCP compressed cache); OCP OFP8 and MX specifications.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref import device
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound
from dsv4ref.formats import Dialect, KVCache, Scope, fp8, kv_cache, ue8m0
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, ROW_BYTES, SCALE_BLOCK, SCALE_COUNT
from dsv4ref.kernels.cache_gather import GATHER_ROWS, RELABEL_ENTRIES, gather_entries, relabel_entries
from dsv4ref.kernels.codes import decode_mode
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction

__all__ = [
    "OPTIMIZATION",
    "DialectInputs",
    "bits",
    "conversion_rows",
    "other",
    "reencode",
    "scope_rows",
    "touched_rows",
]

_NAN_BITS = 0x7FC0
_LAUNCH_US = 2.0
"""Assumed cost of one launch inside a graph, microseconds, on top of the bytes it moves."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class DialectInputs:
    """Two caches and what to read from them.

    Args:
        swa, extra: the caches, each with its dialect; both end in a block of 0xFF.
        swa_slots, extra_slots: int32 ``[N]``, in any order, with duplicates, -1 and slots past the end.
        kv: fp32 ``[E, 512]``, what was written into slots 0..E-1 of ``extra``; None if its bytes are no writer's.
    """

    swa: KVCache
    extra: KVCache
    swa_slots: Tensor
    extra_slots: Tensor
    kv: Tensor | None


def other(dialect: Dialect) -> Dialect:
    """The dialect that this one is not."""
    return Dialect.FNUZ if dialect is Dialect.FN else Dialect.FN


def bits(rows: Tensor) -> Tensor:
    """bf16 ``[N, 512]`` as int16 bit patterns, every NaN as 0x7FC0."""
    return torch.where(rows.isnan(), _NAN_BITS, rows.view(torch.int16)).to(torch.int16)


# --- inputs ---


def _build(case: Case, device: str, seed: int) -> DialectInputs:
    p = case.params
    generator = torch.Generator(device=device).manual_seed(seed)
    swa, _ = _written(p["entries"], p["swa_block"], p["swa_dialect"], device, generator)
    kv: Tensor | None = None
    if p["content"] == "written":
        extra, kv = _written(p["entries"], p["extra_block"], p["extra_dialect"], device, generator)
    elif p["content"] == "every byte":
        extra = _every_byte(p["extra_block"], p["extra_dialect"], device)
    else:
        raise ValueError(f"content: got {p['content']!r}, expected 'written' or 'every byte'")
    slots = [_slots(cache, p["entries"], generator) for cache in (swa, extra)]
    return DialectInputs(swa, extra, slots[0], slots[1], kv)


def _written(entries: int, block: int, dialect: str, device: str, generator: torch.Generator) -> tuple[KVCache, Tensor]:
    """A cache with ``entries`` written, and what was written: amplitudes 2^-8 .. 2^7, and the corners of the format."""
    cache = kv_cache.allocate(-(-entries // block) + 1, block, dialect, device=device, fill=0xFF)
    kv = torch.randn((entries, HEAD_DIM), generator=generator, device=device)
    exponents = torch.randint(-8, 8, (entries, HEAD_DIM // SCALE_BLOCK), generator=generator, device=device)
    kv *= torch.exp2(exponents).repeat_interleave(SCALE_BLOCK, dim=1)
    kv[:, 5] = -1e-9  # rounds to zero from below: -0 in OCP, which is fnuz's NaN
    kv[1:2] = 0.0  # an all-zero entry: the floor decides its scale
    kv[2:3, :SCALE_BLOCK] *= 2.0**-18  # maxima below the floor
    kv[3:4, 7] = 1.8125 * 2.0**9  # a mantissa in (1.75, 1.875], where 240 and 224 choose different scales
    if entries:
        kv_cache.insert(cache, torch.arange(entries, device=device), kv)
    return cache, kv


def _every_byte(block: int, dialect: str, device: str) -> KVCache:
    """Every code under every scale byte: 256 scales x 256 codes are 1024 blocks of 64, seven to an entry."""
    codes = torch.arange(256, device=device).repeat(256)
    scales = torch.arange(256, device=device).repeat_interleave(256 // SCALE_BLOCK)
    entries = -(-len(scales) // SCALE_COUNT)
    flat_codes = torch.zeros(entries * NOPE_DIM, dtype=torch.uint8, device=device)
    flat_codes[: len(codes)] = codes.to(torch.uint8)
    flat_scales = torch.full((entries * SCALE_COUNT,), 127, dtype=torch.uint8, device=device)
    flat_scales[: len(scales)] = scales.to(torch.uint8)
    cache = kv_cache.allocate(-(-entries // block) + 1, block, dialect, device=device, fill=0xFF)
    slots = torch.arange(entries, device=device)
    where = slots // block, slots % block
    rows = torch.zeros((entries, ROW_BYTES), dtype=torch.uint8, device=device)
    rows[:, :NOPE_DIM] = flat_codes.reshape(entries, NOPE_DIM)
    cache.entry_rows[where] = rows
    cache.entry_scales[where[0], where[1], :SCALE_COUNT] = flat_scales.reshape(entries, SCALE_COUNT)
    return cache


def _slots(cache: KVCache, entries: int, generator: torch.Generator) -> Tensor:
    """All slots in random order, then duplicates and slots that are none; nothing for an empty case."""
    where = cache.data.device
    if not entries:
        return torch.zeros(0, dtype=torch.int32, device=where)
    order = torch.randperm(cache.rows - cache.block_size, generator=generator, device=where).to(torch.int32)
    invalid = torch.tensor([-1, cache.rows, 2**31 - 1, -(2**31)], dtype=torch.int32, device=where)
    return torch.cat([order, order[:3], invalid])


# --- the paths ---


def reencode(cache: KVCache, into: KVCache) -> None:
    """Dequantise every entry to bf16 and quantise it again in ``into``'s dialect: eager PyTorch, no host sync."""
    rows, scales = cache.entry_rows, cache.entry_scales[..., :SCALE_COUNT]
    codes = fp8.decode(rows[..., :NOPE_DIM], cache.dialect)
    nope = codes.unflatten(-1, (SCALE_COUNT, SCALE_BLOCK)) * ue8m0.decode(scales)[..., None]
    rope = rows[..., NOPE_DIM:].contiguous().view(torch.bfloat16)
    kv = torch.cat([nope.flatten(-2).to(torch.bfloat16), rope], dim=-1)
    new_codes, new_scales, _ = kv_cache.quantise(kv.reshape(-1, HEAD_DIM), into.dialect)
    into.entry_rows[..., :NOPE_DIM] = new_codes.reshape(*rows.shape[:2], NOPE_DIM)
    into.entry_rows[..., NOPE_DIM:] = rows[..., NOPE_DIM:]
    into.entry_scales[..., :SCALE_COUNT] = new_scales.reshape(scales.shape)


def _reencoded(cache: KVCache, to: Dialect) -> KVCache:
    into = kv_cache.allocate(cache.num_blocks, cache.block_size, to, device=cache.data.device)
    reencode(cache, into)
    return into


def _relabelled(cache: KVCache, to: Dialect) -> KVCache:
    return relabel_entries(_copy(cache), to)


def _copy(cache: KVCache) -> KVCache:
    """The same bytes in memory of their own, padding included."""
    flat = cache.data.as_strided((cache.num_blocks * cache.block_stride,), (1,)).clone()
    return KVCache(flat.as_strided(cache.data.shape, cache.data.stride()), cache.dialect)


def _read(inputs: DialectInputs, extra: KVCache, swa: KVCache | None = None) -> Outputs:
    swa_rows = gather_entries(inputs.swa if swa is None else swa, inputs.swa_slots)
    return {"swa": bits(swa_rows), "extra": bits(gather_entries(extra, inputs.extra_slots))}


Convert = Callable[[KVCache, Dialect], KVCache]


def _converted(inputs: DialectInputs, convert: Convert) -> Outputs:
    """The extra cache in the other dialect: its rows, and the codes and scales of the entries written."""
    if inputs.kv is None:  # bytes that no writer stores need not convert
        return _nothing(inputs)
    cache = convert(inputs.extra, other(inputs.extra.dialect))
    entries = inputs.kv.shape[0]
    rows = cache.entry_rows.reshape(-1, ROW_BYTES)[:entries, :NOPE_DIM]
    scales = cache.entry_scales.reshape(cache.rows, -1)[:entries, :SCALE_COUNT]
    read = bits(gather_entries(cache, inputs.extra_slots))
    return {"converted": read, "codes": rows.contiguous(), "scales": scales.contiguous()}


def _nothing(inputs: DialectInputs) -> Outputs:
    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((0, width), dtype=dtype, device=inputs.extra.data.device)

    return {
        "converted": empty(HEAD_DIM, torch.int16),
        "codes": empty(NOPE_DIM, torch.uint8),
        "scales": empty(SCALE_COUNT, torch.uint8),
    }


def _baseline(inputs: DialectInputs) -> Outputs:
    """One flag, the SWA cache's: the extra cache is re-encoded unless it happens to agree."""
    flag = inputs.swa.dialect
    writers_bytes = inputs.kv is not None
    extra = _reencoded(inputs.extra, flag) if writers_bytes and inputs.extra.dialect is not flag else inputs.extra
    return {**_read(inputs, extra), **_converted(inputs, _reencoded)}


def _optimized(inputs: DialectInputs) -> Outputs:
    return {**_read(inputs, inputs.extra), **_converted(inputs, _relabelled)}


def _reference(inputs: DialectInputs) -> Outputs:
    """The formats' own reading of both caches, and the bytes a writer of the other dialect would have stored."""
    extra = _gather_ref(inputs.extra, inputs.extra_slots)
    read = {"swa": bits(_gather_ref(inputs.swa, inputs.swa_slots)), "extra": bits(extra)}
    if inputs.kv is None:
        return {**read, **_nothing(inputs)}
    extra[:, :NOPE_DIM] += 0.0  # fnuz has no -0: a converted cache holds +0
    codes, scales, _ = kv_cache.quantise(inputs.kv, other(inputs.extra.dialect))
    codes = torch.where(codes == 0x80, torch.zeros_like(codes), codes)
    return {**read, "converted": bits(extra), "codes": codes, "scales": scales}


def _gather_ref(cache: KVCache, slots: Tensor) -> Tensor:
    """`kv_cache.gather` with zeros for slots that are none."""
    rows = torch.zeros((len(slots), HEAD_DIM), dtype=torch.bfloat16, device=slots.device)
    valid = (slots >= 0) & (slots < cache.rows)
    rows[valid] = kv_cache.gather(cache, slots[valid])
    return rows


# --- what a conversion costs ---

_EAGER_STEPS: Mapping[str, int] = {
    "codes to fp32": 1 + 4,
    "times scale": 4 + 4,
    "to bf16": 4 + 2,
    "join with rope": 2 + 2,
    "back to fp32": 2 + 4,
    "magnitudes": 4 + 4,
    "block maxima": 4,
    "divide by the new scale": 4 + 4,
    "clamp to the writer's maximum": 4 + 4,
    "clamp to the dialect's maximum": 4 + 4,
    "to fp8": 4 + 1,
    "into the cache": 1 + 1,
}
"""The eager re-encoding: bytes moved per code. Operators on scales and rope, most of the launches, count as none."""

EAGER_LAUNCHES = 44
"""Launches of `reencode`; a test counts them."""


def conversion_rows() -> list[dict[str, Any]]:
    """Ways to read a cache of the other dialect: bytes moved per 584-byte entry and launches, besides the read."""
    return [
        {"way": "explicit dialect per cache", "bytes": 0, "launches": 0},
        {"way": "free conversion, writer stores no -0", "bytes": 2 * SCALE_COUNT, "launches": 1},
        {"way": "free conversion, -0 cleaned on the way", "bytes": NOPE_DIM + 2 * SCALE_COUNT, "launches": 1},
        {"way": "re-encode in one ideal kernel", "bytes": 2 * (NOPE_DIM + SCALE_COUNT), "launches": 1},
        {"way": "re-encode in eager PyTorch", "bytes": sum(_EAGER_STEPS.values()) * NOPE_DIM,
         "launches": EAGER_LAUNCHES},
    ]  # fmt: skip


def touched_rows(before: KVCache, after: KVCache) -> list[dict[str, Any]]:
    """Bytes that differ between two caches of one layout, by plane: codes, rope, scale bytes, pad."""

    def planes(cache: KVCache) -> dict[str, Tensor]:
        rows, scales = cache.entry_rows, cache.entry_scales
        return {
            "codes": rows[..., :NOPE_DIM],
            "rope": rows[..., NOPE_DIM:],
            "scale bytes": scales[..., :SCALE_COUNT],
            "pad": scales[..., SCALE_COUNT:],
        }

    old, new = planes(before), planes(after)
    return [{"plane": n, "bytes": old[n].numel(), "changed": int((old[n] != new[n]).sum())} for n in old]


def _predict(case: Case, device_key: str) -> Prediction:
    entries = case.params["entries"]
    ways = {row["way"]: row["bytes"] * entries for row in conversion_rows()}
    eager, free = ways["re-encode in eager PyTorch"], ways["free conversion, -0 cleaned on the way"]
    least = ways["free conversion, writer stores no -0"]
    flops = 2 * NOPE_DIM * entries
    spec = decode_model.spec_for(device_key)
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None and entries:
        baseline_us = eager / (spec.bandwidth_tb_s * 1e6) + EAGER_LAUNCHES * _LAUNCH_US
        optimized_us = free / (spec.bandwidth_tb_s * 1e6) + _LAUNCH_US
        bound_us = Bound(least, flops, spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12).time_us
    return Prediction(
        baseline_bytes=eager,
        optimized_bytes=free,
        least_bytes=least,
        flops=flops,
        baseline_launches=EAGER_LAUNCHES,
        optimized_launches=1,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="a re-encoding decodes, scans and rewrites every code; relabelling reads the codes once, to find -0, "
        "and moves the scale bytes",
    )


def _timed(inputs: DialectInputs) -> Mapping[str, Callable[[], object]]:
    cache, to = inputs.extra, other(inputs.extra.dialect)
    into = kv_cache.allocate(cache.num_blocks, cache.block_size, to, device=cache.data.device)
    # In place and repeated: scale bytes climb to 255 and stay, and -0 is found in the first call only. Neither changes
    # how many bytes a call reads; it writes as many scales as the first.
    relabel, eager, scales_only = _copy(cache), _copy(cache), _copy(cache).entry_scales[..., :SCALE_COUNT]
    codes, scales = eager.entry_rows[..., :NOPE_DIM], eager.entry_scales[..., :SCALE_COUNT]
    out = torch.empty((len(inputs.extra_slots), HEAD_DIM), dtype=torch.bfloat16, device=cache.data.device)

    def eager_free() -> None:
        codes.masked_fill_(codes == 0x80, 0)
        scales.add_(1)

    def reader(dialect: Dialect) -> Callable[[], object]:
        labelled = KVCache(cache.data, dialect)
        return lambda: gather_entries(labelled, inputs.extra_slots, out=out)

    return {
        "baseline": lambda: reencode(cache, into),
        "optimized": lambda: relabel_entries(relabel, to, check=False),
        "eager free conversion": eager_free,
        "scale bytes only": lambda: scales_only.add_(1),
        "read as e4m3fn": reader(Dialect.FN),
        "read as e4m3fnuz": reader(Dialect.FNUZ),
    }


# --- hazards ---


def _one_flag(inputs: DialectInputs) -> Outputs:
    """The extra cache read in the SWA cache's dialect."""
    misread = KVCache(inputs.extra.data, inputs.swa.dialect)
    return {**_read(inputs, misread), **_converted(inputs, _relabelled)}


def _with_conversion(convert: Convert) -> Callable[[DialectInputs], Outputs]:
    return lambda inputs: {**_read(inputs, inputs.extra), **_converted(inputs, convert)}


def _minus_zero_kept(cache: KVCache, to: Dialect) -> KVCache:
    mine = _copy(cache)
    scales = mine.entry_scales[..., :SCALE_COUNT]
    scales += scales != 255
    return KVCache(mine.data, to)


def _scale_kept(cache: KVCache, to: Dialect) -> KVCache:
    done = _relabelled(cache, to)
    done.entry_scales.copy_(cache.entry_scales)
    return done


def _codes_cast(saturate: bool) -> Convert:
    """The codes converted by value under the old scale: what does not fit saturates, or becomes NaN."""

    def convert(cache: KVCache, to: Dialect) -> KVCache:
        done = _copy(cache)
        values = fp8.decode(cache.entry_rows[..., :NOPE_DIM], cache.dialect)
        codes = fp8.encode(values, to) if saturate else values.to(to.dtype).view(torch.uint8)
        done.entry_rows[..., :NOPE_DIM] = codes
        return KVCache(done.data, to)

    return convert


def _unit_scale(cache: KVCache, to: Dialect) -> KVCache:
    """Dequantised values cast back to FP8 with scale 1."""
    done = _reencoded(cache, to)
    values = fp8.decode(cache.entry_rows[..., :NOPE_DIM], cache.dialect).unflatten(-1, (SCALE_COUNT, SCALE_BLOCK))
    values = values * ue8m0.decode(cache.entry_scales[..., :SCALE_COUNT])[..., None]
    done.entry_rows[..., :NOPE_DIM] = fp8.encode(values.flatten(-2), to)
    done.entry_scales[..., :SCALE_COUNT] = 127
    return done


def _written_again(inputs: DialectInputs, quantise: Callable[[Tensor, Dialect], tuple[Tensor, Tensor]]) -> Outputs:
    """The converted cache as another writer fills it from the same vectors."""
    assert inputs.kv is not None
    kv = inputs.kv

    def convert(cache: KVCache, to: Dialect) -> KVCache:
        done = _relabelled(cache, to)
        codes, scales = quantise(kv[:, :NOPE_DIM].to(torch.float32), to)
        slots = torch.arange(len(kv), device=kv.device)
        where = slots // cache.block_size, slots % cache.block_size
        done.entry_rows[where[0], where[1], :NOPE_DIM] = codes
        done.entry_scales[where[0], where[1], :SCALE_COUNT] = scales
        return done

    return _with_conversion(convert)(inputs)


def _quantise_under(limit: float, nope: Tensor, to: Dialect) -> tuple[Tensor, Tensor]:
    """One UE8M0 scale per 64 values under ``limit``, codes straight from ``nope``'s precision."""
    blocks = nope.unflatten(-1, (SCALE_COUNT, SCALE_BLOCK))
    scales = ue8m0.scale_byte(blocks.abs().amax(dim=-1), limit)
    return fp8.encode((blocks / ue8m0.decode(scales)[..., None]).flatten(-2), to), scales


def _finfo_writer(inputs: DialectInputs) -> Outputs:
    """A writer that scales under the dialect's largest number, 240."""
    return _written_again(inputs, lambda nope, to: _quantise_under(to.finite_max, nope.to(torch.bfloat16).float(), to))


def _one_rounding(inputs: DialectInputs) -> Outputs:
    """A writer that skips the rounding to bf16."""
    return _written_again(inputs, lambda nope, to: _quantise_under(to.writer_max, nope, to))


def _shifted_scales(inputs: DialectInputs) -> Outputs:
    """A reader that shifts the scale byte into the exponent field and stops there."""
    slots = inputs.extra_slots
    rows = _gather_ref(inputs.extra, slots)
    valid = (slots >= 0) & (slots < inputs.extra.rows)
    at = slots[valid].to(torch.int64)
    flat = inputs.extra.entry_rows.reshape(-1, ROW_BYTES)[at, :NOPE_DIM]
    scales = inputs.extra.entry_scales.reshape(inputs.extra.rows, -1)[at, :SCALE_COUNT]
    shifted = (scales.to(torch.int32) << 23).view(torch.float32)  # 0 -> 0.0, 255 -> inf
    values = fp8.decode(flat, inputs.extra.dialect).unflatten(-1, (SCALE_COUNT, SCALE_BLOCK)) * shifted[..., None]
    rows[valid, :NOPE_DIM] = values.flatten(-2).to(torch.bfloat16)
    return {**_optimized(inputs), "extra": bits(rows)}


# --- attention, scope by scope ---


def scope_rows(flag: Dialect, *, where: str, seed: int = 0) -> list[dict[str, Any]]:
    """Attention over each scope alone and over both, every cache read with one flag, against reading each as written.

    Args:
        flag: the one dialect both caches are read in; the SWA cache is written in fnuz, the extra cache in OCP.
        where: "cpu" or "cuda".
        seed: of the inputs.

    Returns:
        rows with scope, written in, read as, cosine of the outputs, length ratio, NaN outputs.
    """
    case = decode_inputs.decode_case("scopes", rows=2, heads=8, swa=48, extra=48, swa_dialect=Dialect.FNUZ.value)
    inputs = decode_inputs.build(case, where, seed)
    assert inputs.extra is not None

    def attend(*scopes: Scope) -> Tensor:
        extra = scopes[1] if len(scopes) > 1 else None
        return sparse_mla_decode(inputs.q, scopes[0], extra, sink=inputs.sink, scale=inputs.scale)[0].double()

    rows = []
    named = {"SWA": (inputs.swa,), "extra": (inputs.extra,), "both": (inputs.swa, inputs.extra)}
    for name, scopes in named.items():
        right = attend(*scopes)
        wrong = attend(*(replace(scope, cache=KVCache(scope.cache.data, flag)) for scope in scopes))
        finite = wrong.isfinite()
        a, b = right[finite], wrong[finite]
        rows.append(
            {
                "scope": name,
                "written in": " + ".join(scope.cache.dialect.value for scope in scopes),
                "read as": flag.value,
                "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
                "length": float(b.norm() / a.norm()),
                "NaN outputs": int((~finite).sum()),
            }
        )
    return rows


def _short(dialect: Dialect) -> str:
    return dialect.value.removeprefix("e4m3")


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    native = Dialect.of(device.native_dialect(arch), argument=f"native dialect of {arch}")
    aligned = dict.fromkeys(("block_stride", "out_stride"), "i32")
    gathers = tuple(
        CompileRequest(
            kernel="gather_entries",
            module="dsv4ref.kernels.cache_gather",
            function="_gather_entries_kernel",
            shape=f"{_short(dialect)} x{GATHER_ROWS} w4 s1",
            signature={"cache": "*u8", "slots": "*i32", "out": "*bf16", "count": "i32", "num_rows": "i32", **aligned},
            constexprs={"BLOCK_SIZE": 64, "MODE": decode_mode(dialect, arch), "ROWS": GATHER_ROWS},
            num_warps=4,
            divisible_by_16=frozenset({"cache", "slots", "out", *aligned}),
        )
        for dialect in (native, other(native))
    )
    relabels = tuple(
        CompileRequest(
            kernel="relabel_entries",
            module="dsv4ref.kernels.cache_gather",
            function="_relabel_entries_kernel",
            shape=f"to {_short(to)} x{RELABEL_ENTRIES} w4 s1",
            signature={"cache": "*u8", "block_stride": "i32"},
            constexprs={"BLOCK_SIZE": 64, "TO_FNUZ": to is Dialect.FNUZ, "ENTRIES": RELABEL_ENTRIES},
            num_warps=4,
            divisible_by_16=frozenset({"cache", "block_stride"}),
        )
        for to in (Dialect.FNUZ, Dialect.FN)
    )
    return (*gathers, *relabels)


def _case(name: str, entries: int, swa: Dialect, extra: Dialect, **changes: Any) -> Case:
    flags = {key: changes.pop(key) for key in ("tiny", "needs_gpu", "measured", "about") if key in changes}
    params = {"entries": entries, "swa_dialect": swa.value, "extra_dialect": extra.value, "swa_block": 64,
              "extra_block": 64, "content": "written", **changes}  # fmt: skip
    return Case(name, params, **flags)


_FN, _FNUZ = Dialect.FN, Dialect.FNUZ
_ENTRIES_PER_TOKEN = 4  # a C4 layer keeps one compressed entry for four tokens
_CASES = (
    _case("tiny", 37, _FNUZ, _FN, tiny=True, about="gfx942 as upstream runs it: SWA cache fnuz, compressed cache OCP"),
    _case("tiny-reverse", 37, _FN, _FNUZ, tiny=True, about="the other way round"),
    _case("tiny-c128", 9, _FNUZ, _FN, tiny=True, extra_block=2, swa_block=256, about="two entries to a block"),
    _case("tiny-same", 37, _FN, _FN, tiny=True, about="both OCP: gfx950, sm_90"),
    _case("one-entry", 1, _FNUZ, _FNUZ, tiny=True, about="both fnuz, a single entry"),
    _case("empty", 0, _FNUZ, _FN, tiny=True, about="caches of padding only, no slots"),
    _case("every-byte-fn", 5, _FNUZ, _FN, tiny=True, content="every byte", about="256 codes under 256 scales, OCP"),
    _case("every-byte-fnuz", 5, _FN, _FNUZ, tiny=True, content="every byte", about="256 codes under 256 scales, fnuz"),
    _case("c4-32k", 32768 // _ENTRIES_PER_TOKEN, _FNUZ, _FN, measured=True, needs_gpu=True,
          about="one C4 layer at 32k tokens of context"),
    _case("c4-1m", 1048576 // _ENTRIES_PER_TOKEN, _FNUZ, _FN, measured=True, needs_gpu=True,
          about="one C4 layer at 1M tokens of context"),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="fp8_dialects",
    number=2,
    title="FP8 dialects",
    part="I ground truth",
    sources=("vllm#42893", "vllm#45681", "OCP OFP8 rev. 1.0 and MX v1.0"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            *(Check(name, "exact") for name in ("swa", "extra", "converted", "codes", "scales")),
            Check("swa", "bit"),
            Check("converted", "bit"),
        )
    ),
    hazards={
        "one-flag": Hazard(
            title="one flag for both caches: OCP bytes read as fnuz",
            story="The decode kernel took the SWA cache's flag for the compressed cache, which is always OCP: its keys "
            "and values halve, and -0 reads as NaN.",
            source="vllm#42893, vllm#45681",
            ids=("H17",),
            case="tiny",
            planted=_one_flag,
        ),
        "one-flag-reversed": Hazard(
            title="one flag for both caches: fnuz bytes read as OCP",
            story="A wrapper dropped its use_fnuz argument on the way: keys and values double.",
            source="vllm#42893",
            ids=("H17",),
            case="tiny-reverse",
            planted=_one_flag,
        ),
        "minus-zero-kept": Hazard(
            title="the conversion leaves -0 in place",
            story="OCP's 0x80 is -0, fnuz's 0x80 is its only NaN. A handful of codes in a cache, each of which turns "
            "every row that attends to it into NaN.",
            source="OCP OFP8 rev. 1.0; PyTorch's float8_e4m3fnuz",
            ids=("H17",),
            case="tiny",
            planted=_with_conversion(_minus_zero_kept),
        ),
        "scale-kept": Hazard(
            title="the conversion forgets the scale",
            story="The bytes are right and everything is half as large.",
            source="vllm#42893",
            ids=("H17",),
            case="tiny",
            planted=_with_conversion(_scale_kept),
        ),
        "shifted-scales": Hazard(
            title="the scale byte is shifted into the exponent and nothing else",
            story="byte << 23 is right for 1 to 254. Byte 0 means 2^-127 and becomes 0; byte 255 means NaN and becomes "
            "infinity.",
            source="OCP MX v1.0, section 5.4; vLLM 0.33.0, which special-cases the zero",
            ids=("H18",),
            case="every-byte-fn",
            planted=_shifted_scales,
        ),
        "bare-cast": Hazard(
            title="codes converted by value with torch's bare cast",
            story="240 is fnuz's largest number, and the cast makes NaN of what lies beyond instead of saturating.",
            source="PyTorch: Tensor.to(torch.float8_e4m3fnuz)",
            ids=("H19",),
            case="tiny",
            planted=_with_conversion(_codes_cast(saturate=False)),
        ),
        "saturating-cast": Hazard(
            title="codes converted by value, clamped at 240",
            story="No NaN to see, and every block's largest values are cut off.",
            source="doubleword vLLM fork, fused_deepseek_v4_qnorm_rope .cu: a fixed 448 before a cast to fnuz",
            ids=("H19",),
            case="tiny",
            planted=_with_conversion(_codes_cast(saturate=True)),
        ),
        "finfo-writer": Hazard(
            title="fnuz written under 240 where 224 is expected",
            story="240 is a number of the dialect and looks like the obvious maximum. Some blocks then have another "
            "scale and other codes than their OCP twins, and hold +-240, which is OCP's NaN.",
            source="vllm#45681 (224.0)",
            ids=("H17",),
            case="tiny",
            planted=_finfo_writer,
        ),
        "one-rounding": Hazard(
            title="codes written from fp32 instead of from bf16",
            story="fp32 -> bf16 -> fp8 rounds twice. A writer that skips the middle step is more precise and stores "
            "other bytes, so two writers of one cache disagree.",
            source="DeepSeek-V4 inference code (quantises bf16)",
            ids=("H20",),
            case="tiny",
            planted=_one_rounding,
        ),
        "unit-scale": Hazard(
            title="dequantised values cast back to FP8 with scale 1",
            story="Exact only for blocks whose scale was 1; elsewhere small values flush to zero and large ones "
            "saturate.",
            source="ROCm/vllm#900",
            ids=("H21",),
            case="tiny",
            planted=_with_conversion(_unit_scale),
        ),
    },
    predict=_predict,
    claims=records.published("fp8_dialects"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.cache_gather",
        "dsv4ref.kernels.codes",
        "dsv4ref.kernels.sparse_mla.decode",
        "dsv4ref.kernels.sparse_mla.halves",
        "dsv4ref.optimizations.fp8_dialects",
        "dsv4ref.formats.kv_cache",
        "dsv4ref.formats.fp8",
        "dsv4ref.formats.ue8m0",
    ),
    kernels=_requests,
)
