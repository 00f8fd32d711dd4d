"""What a cast to FP8 with scale 1 loses: code by code, in two roundings, and in the attention output (chapter 11).

A number of the cache is code * 2^k, exact in bf16. Cast back without its scale, it keeps its mantissa while scale 1 has
normal codes for it, loses bits below them, is zero below half of the smallest, and saturates above the largest.

Source: ROCm/vllm#900 (the cast). The percentages are arithmetic on the formats; hazards H19, H20, H21.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.formats import Dialect, Scope, fp8, kv_cache, ue8m0
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, SCALE_BLOCK, SCALE_COUNT
from dsv4ref.formats.scope import ragged
from dsv4ref.optimizations.decode_inputs import DecodeInputs
from dsv4ref.optimizations.fp8_gather import WAYS, attend, read_rows
from dsv4ref.ref.sparse_attention import sparse_attention_ref

__all__ = ["CLASSES", "accuracy_rows", "class_rows", "one_row", "recast_classes", "rounding_rows"]

CLASSES = ("exact", "rounded", "flushed to zero", "saturated", "NaN")
"""What becomes of a number; `recast_classes` returns positions in this list."""

_KEYS = 32
_HEADS = 8
_SCORE_STD = 1.6
"""The scores' spread in the decode chapters' inputs: a softmax neither flat nor one-hot."""


def _codes_and_scales(dialect: Dialect) -> tuple[Tensor, Tensor]:
    """All 256 codes and the 255 scales that are numbers, in float64."""
    every = torch.arange(256).to(torch.uint8)
    return fp8.decode(every, dialect, torch.float64), ue8m0.decode(every[:255]).to(torch.float64)


def recast_classes(dialect: Dialect, *, clamp: bool = True) -> Tensor:
    """Every number that a code and a scale byte can make, re-cast through bf16 to the same dialect with scale 1.

    Args:
        dialect: of the codes read and written.
        clamp: saturate beyond the maximum; False is torch's bare cast, which does so in OCP and gives NaN in fnuz.

    Returns:
        int64 ``[255, 256]``: scale bytes 0 to 254 by codes, positions in `CLASSES`; -1 for codes that are NaN.
    """
    dialect = Dialect.of(dialect)
    codes, scales = _codes_and_scales(dialect)
    exact = scales[:, None] * codes
    through = exact.to(torch.bfloat16).to(torch.float32)
    cast = fp8.encode(through, dialect) if clamp else through.to(dialect.dtype).view(torch.uint8)
    found = fp8.decode(cast, dialect, torch.float64)
    classes = torch.full(exact.shape, CLASSES.index("rounded"))
    classes[(found == 0) & (exact != 0)] = CLASSES.index("flushed to zero")
    classes[exact.abs() > dialect.finite_max] = CLASSES.index("saturated")
    classes[found.isnan()] = CLASSES.index("NaN")
    classes[found == exact] = CLASSES.index("exact")
    classes[exact.isnan()] = -1
    return classes


def class_rows(dialect: Dialect, exponents: Sequence[int], *, clamp: bool = True) -> list[dict[str, Any]]:
    """Per cent of a dialect's number codes in each class, every code counted once, by scale 2^exponent.

    Args:
        dialect, clamp: as `recast_classes`.
        exponents: of the scale, -127 to 127.

    Returns:
        rows with scale, exponent and one share per name in `CLASSES`.
    """
    classes = recast_classes(dialect, clamp=clamp)
    rows = []
    for exponent in exponents:
        row = classes[exponent + 127]
        numbers = row[row >= 0]
        shares = {name: 100 * float((numbers == i).double().mean()) for i, name in enumerate(CLASSES)}
        rows.append({"scale": f"2^{exponent}", "exponent": exponent, **shares})
    return rows


def rounding_rows(sigmas: Sequence[float], *, samples: int = 200_000, seed: int = 0) -> list[dict[str, Any]]:
    """Two roundings (fp32 -> bf16 -> fp8) against one, on Gaussian numbers and on all that a cache can hold.

    Args:
        sigmas: standard deviations of the Gaussian samples.
        samples: numbers per sample.
        seed: of the samples.

    Returns:
        rows with numbers, count and the per cent of OCP codes that differ; the last row is every code under every
        scale byte.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = {f"Gaussian, σ = {s:g}": torch.randn(samples, generator=generator) * s for s in sigmas}
    codes, scales = _codes_and_scales(Dialect.FN)
    sets["code · 2^k, all of them"] = (scales[:, None] * codes[codes.isfinite()]).flatten().to(torch.float32)
    rows = []
    for name, values in sets.items():
        differ = fp8.encode(values, Dialect.FN) != fp8.encode(values.to(torch.bfloat16), Dialect.FN)
        share = 100 * float(differ.double().mean())
        rows.append({"numbers": name, "count": len(values), "codes that differ, %": share})
    return rows


def accuracy_rows(
    exponents: Sequence[int], *, where: str, spread: int = 0, dialect: Dialect = Dialect.FN, seed: int = 0
) -> list[dict[str, Any]]:
    """Error of the attention output by the size of the keys, for each way to gather: one query row, 8 heads, 32 keys.

    Args:
        exponents: the keys' standard deviation is 2^exponent; queries shrink in step, so that scores keep their spread.
        where: "cpu" or "cuda".
        spread: binary orders between the blocks of one entry: each is lowered by 0 to ``spread`` of them.
        dialect: of the cache and of the rows.
        seed: of the inputs, which are the same for every exponent but for their size.

    Returns:
        rows with exponent, the median scale stored, the per cent of nope numbers that the re-cast keeps, and for each
        of `fp8_gather.WAYS` the error norm against float64 attention over the cache's numbers.
    """
    rows = []
    for exponent in exponents:
        scope, inputs = one_row(exponent, where=where, spread=spread, dialect=dialect, seed=seed)
        oracle, _ = sparse_attention_ref(inputs.q, inputs.scopes, inputs.sink, inputs.scale)
        gathered = {way: gather(scope, scope.cache.dialect) for way, gather in WAYS.items()}
        held, recast = (read_rows(gathered[way])[:, :NOPE_DIM] for way in ("bf16 rows", "unit scale"))
        stored = int(scope.cache.entry_scales[..., :SCALE_COUNT].flatten().median()) - 127
        row = {"exponent": exponent, "median scale": f"2^{stored}"}
        row["nope kept, %"] = 100 * float((held == recast).double().mean())
        rows.append(row | {w: compare.error_norm(attend(inputs, [g])[0], oracle) for w, g in gathered.items()})
    return rows


def one_row(
    exponent: int, *, where: str, spread: int = 0, dialect: Dialect = Dialect.FN, seed: int = 0
) -> tuple[Scope, DecodeInputs]:
    """The attention that `accuracy_rows` runs, for one size of the keys.

    Args: as `accuracy_rows`, for one exponent.

    Returns:
        the scope of 32 keys, and the inputs that hold it.
    """
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn((_KEYS, HEAD_DIM), generator=generator) * 2.0**exponent
    lower = torch.randint(0, spread + 1, (_KEYS, SCALE_COUNT), generator=generator)
    kv[:, :NOPE_DIM] *= torch.exp2(-lower.float()).repeat_interleave(SCALE_BLOCK, dim=1)
    q = torch.randn((1, _HEADS, HEAD_DIM), generator=generator) * _SCORE_STD * 2.0**-exponent
    cache = kv_cache.allocate(1, _KEYS, dialect, device=where)
    kv_cache.insert(cache, torch.arange(_KEYS, device=where), kv.to(where))
    scope = Scope(cache, *ragged([range(_KEYS)], where), width=_KEYS)
    sink = torch.zeros(_HEADS, device=where)
    return scope, DecodeInputs(q.to(torch.bfloat16).to(where), scope, None, sink, HEAD_DIM**-0.5)
