"""Inputs shared by the sparse-decode chapters: one builder for tests, notebooks, gates and benchmarks.

Values stand at FlashMLA's test scale (keys with standard deviation 0.1), because the absolute bound of the attention
budget, 1e-3, belongs to that scale. Queries have standard deviation 16, so that scores spread by about 1.6 and the
softmax is neither flat nor one-hot.

Every cache ends in blocks nobody refers to, filled with 0xFF: NaN codes, NaN scales, NaN rope. A kernel that reads past
its lists shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.formats import Dialect, Scope, kv_cache
from dsv4ref.formats.kv_cache import HEAD_DIM, KVCache
from dsv4ref.optimizations.base import Case
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

__all__ = ["DecodeInputs", "build", "decode_case", "plain", "production_cases", "reference"]

_KEY_STD = 0.1
_QUERY_STD = 16.0
_POISON_BLOCKS = 2
_L2_ENTRIES = 400_000
"""Entries a GPU pool has at least: 230 MB, several times any L2, so that random slots miss it."""


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step's attention inputs: q ``[T, H, 512]``, its scopes, sink ``[H]``, softmax scale."""

    q: Tensor
    swa: Scope
    extra: Scope | None
    sink: Tensor
    scale: float

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes present, SWA first."""
        return (self.swa,) if self.extra is None else (self.swa, self.extra)


def decode_case(
    name: str,
    *,
    rows: int,
    heads: int,
    swa: int = 128,
    extra: int | None = 512,
    lengths: str = "full",
    swa_block: int = 64,
    extra_block: int = 64,
    swa_dialect: str = "e4m3fn",
    extra_dialect: str = "e4m3fn",
    **flags: Any,
) -> Case:
    """Describe a decode shape.

    Args:
        name: the case's name.
        rows, heads: T and H.
        swa, extra: steady-state widths of the scopes; ``extra=None`` for an SWA-only layer.
        lengths: "full" (every row at its width), "ragged" (random lengths, -1 and out-of-range slots and duplicates
            inside, some rows empty, one row with invalid slots only), or "window" (SWA lengths around the window's
            edge: 1, 126, 127, 128).
        swa_block, extra_block, swa_dialect, extra_dialect: cache geometry.
        flags: `Case`'s own fields (tiny, measured, needs_gpu, about).
    """
    params = {
        "rows": rows,
        "heads": heads,
        "swa": swa,
        "extra": extra,
        "lengths": lengths,
        "swa_block": swa_block,
        "extra_block": extra_block,
        "swa_dialect": swa_dialect,
        "extra_dialect": extra_dialect,
    }
    return Case(name, params, **flags)


def production_cases() -> tuple[Case, ...]:
    """The measured shapes: V4-Flash and V4-Pro C4 layers at 1 to 1024 query rows, all heads on one rank."""
    cases = []
    for label, model in (("flash", config.V4_FLASH), ("pro", config.V4_PRO)):
        for rows in (1, 8, 64, 128, 256, 1024):
            cases.append(
                decode_case(
                    f"{label}-{rows}",
                    rows=rows,
                    heads=model.n_heads,
                    swa=model.window_size,
                    extra=model.index_topk,
                    measured=True,
                    needs_gpu=rows > 1,
                )
            )
    return tuple(cases)


def build(case: Case, device: str, seed: int) -> DecodeInputs:
    """Build a case's inputs; the caches depend on its geometry only, the rest on the seed."""
    p = case.params
    rows, heads = p["rows"], p["heads"]
    generator = torch.Generator(device=device).manual_seed(seed)
    q = (torch.randn((rows, heads, HEAD_DIM), generator=generator, device=device) * _QUERY_STD).to(torch.bfloat16)
    sink = torch.randn((heads,), generator=generator, device=device)
    swa = _scope(p, "swa", rows, device, generator)
    extra = None if p["extra"] is None else _scope(p, "extra", rows, device, generator)
    return DecodeInputs(q=q, swa=swa, extra=extra, sink=sink, scale=HEAD_DIM**-0.5)


def _scope(p: Mapping[str, Any], name: str, rows: int, device: str, generator: torch.Generator) -> Scope:
    width, block = p[name], p[f"{name}_block"]
    entries = max(rows * width, 4 * block, _L2_ENTRIES if device != "cpu" else 0)
    cache = _pool(-(-entries // block), block, p[f"{name}_dialect"], device, 0 if name == "swa" else 1)
    usable = cache.rows - _POISON_BLOCKS * block
    lengths = _lengths(p["lengths"], name, rows, width, generator, device)
    indptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    indptr[1:] = lengths.cumsum(0)
    total = int(indptr[-1])
    indices = torch.randint(0, usable, (total,), generator=generator, device=device, dtype=torch.int32)
    if p["lengths"] == "ragged":
        indices = _with_invalid_slots(indices, indptr, cache.rows, generator)
    return Scope(cache=cache, indices=indices, indptr=indptr, width=width)


@functools.lru_cache(maxsize=4)
def _pool(blocks: int, block_size: int, dialect: str, device: str, salt: int) -> KVCache:
    """A filled cache followed by poisoned blocks; shared by every input built on the same geometry."""
    cache = kv_cache.allocate(blocks + _POISON_BLOCKS, block_size, Dialect.of(dialect), device=device, fill=0xFF)
    generator = torch.Generator(device=device).manual_seed(salt)
    step = 1 << 16
    for begin in range(0, blocks * block_size, step):
        slots = torch.arange(begin, min(begin + step, blocks * block_size), device=device)
        kv = torch.randn((len(slots), HEAD_DIM), generator=generator, device=device) * _KEY_STD
        kv_cache.insert(cache, slots, kv)
    return cache


def _lengths(kind: str, scope: str, rows: int, width: int, generator: torch.Generator, device: str) -> Tensor:
    if kind == "full":
        return torch.full((rows,), width, dtype=torch.int64, device=device)
    if kind == "window":
        edges = torch.tensor([1, 126, 127, 128], device=device)
        return edges[torch.arange(rows, device=device) % 4] if scope == "swa" else torch.full_like(edges, width)[:rows]
    if kind != "ragged":
        raise ValueError(f"lengths: got {kind!r}, expected 'full', 'ragged' or 'window'")
    lengths = torch.randint(0, width + 1, (rows,), generator=generator, device=device)
    lengths[rows // 2] = 0  # one row is empty in every scope: its output is exactly zero
    return lengths


def _with_invalid_slots(indices: Tensor, indptr: Tensor, cache_rows: int, generator: torch.Generator) -> Tensor:
    """Plant -1, slots past the end and duplicates inside the lists; make the last row's slots all invalid."""
    lot = torch.rand(indices.shape, generator=generator, device=indices.device)
    for low, high, slot in ((0.0, 0.1, -1), (0.1, 0.15, cache_rows), (0.15, 0.2, 2**31 - 1), (0.2, 0.25, -(2**31))):
        indices = torch.where((lot >= low) & (lot < high), torch.full_like(indices, slot), indices)
    if indices.numel() > 1:
        indices[1::7] = indices[0 : indices.numel() - 1 : 7][: indices[1::7].numel()]
    indices[int(indptr[-2]) :] = -1
    return indices


def reference(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The float64 oracle: ``out`` and ``lse``."""
    out, lse = sparse_attention_ref(inputs.q, inputs.scopes, inputs.sink, inputs.scale)
    return {"out": out, "lse": lse}


def plain(inputs: DecodeInputs) -> dict[str, Tensor]:
    """The straightforward bf16 implementation: ``out`` and ``lse``."""
    out, lse = sparse_attention_plain(inputs.q, inputs.scopes, inputs.sink, inputs.scale)
    return {"out": out, "lse": lse}


def keys_per_row(params: Mapping[str, Any]) -> int:
    """Keys a full row attends to over both scopes."""
    return int(params["swa"]) + int(params["extra"] or 0)


def tiny_and_odd_cases() -> Sequence[Case]:
    """Shapes for the interpreter and the corners: empty rows, holes, both dialects, odd blocks, TP slices."""
    return (
        decode_case("tiny", rows=3, heads=8, swa=24, extra=20, tiny=True, about="V4-Flash at TP8: 8 heads"),
        decode_case(
            "tiny-ragged", rows=5, heads=8, swa=40, extra=24, lengths="ragged", tiny=True,
            about="empty rows, -1 and out-of-range slots, duplicates, a row of invalid slots only",
        ),
        decode_case(
            "tiny-fnuz", rows=3, heads=8, swa=24, extra=40, lengths="ragged", swa_dialect="e4m3fnuz", tiny=True,
            about="SWA cache in fnuz, extra cache in OCP, as upstream runs gfx942",
        ),
        decode_case(
            "tiny-c128", rows=3, heads=16, swa=33, extra=5, swa_block=256, extra_block=2, tiny=True,
            about="C128 layer: two entries per block; SWA block of 256",
        ),
        decode_case("tiny-swa-only", rows=1, heads=5, swa=17, extra=None, tiny=True, about="SWA-only layer, odd heads"),
        decode_case(
            "window-edges", rows=4, heads=8, swa=128, extra=8, lengths="window",
            about="positions around the window's edge: 1, 126, 127 and 128 SWA keys",
        ),
        decode_case("flash-tp4-3", rows=3, heads=16, about="V4-Flash at TP4, odd batch"),
        decode_case("pro-tp4-3", rows=3, heads=32, extra=1024, lengths="ragged", about="V4-Pro at TP4, odd and ragged"),
        decode_case("flash-74", rows=74, heads=64, lengths="ragged", needs_gpu=True, about="odd batch, ragged"),
        decode_case("flash-321", rows=321, heads=64, lengths="ragged", needs_gpu=True, about="odd batch, ragged"),
    )  # fmt: skip
