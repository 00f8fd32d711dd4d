"""Decode calls for tests: inputs built on the CPU, so that no device changes them, and the reference's verdict.

Every output and scratch starts as NaN, and every cache ends in a block of 0xFF: NaN codes, NaN scales, NaN rope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import KVCache, Scope, kv_cache
from dsv4ref.formats.scope import ragged
from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

Lists = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Call:
    """The arguments of one decode, and what the reference makes of them."""

    q: Tensor
    swa: Scope
    extra: Scope | None = None
    sink: Tensor | None = None
    scale: float = 512**-0.5

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The kernel's out and LSE, into poisoned memory."""
        with poisoned_allocations():
            out, lse = sparse_mla_decode(
                self.q, self.swa, self.extra, sink=self.sink, scale=self.scale, **{"return_lse": True, **options}
            )
        assert lse is not None
        return out, lse

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Hold results against the budget of the attention gates."""
        scopes = [self.swa] if self.extra is None else [self.swa, self.extra]
        want, want_lse = sparse_attention_ref(self.q, scopes, self.sink, self.scale)
        plain, _ = sparse_attention_plain(self.q, scopes, self.sink, self.scale)
        found = compare.close("out", out, want, compare.TOLERANCES["attention_bf16"], plain)
        assert found.passed, found.detail
        if lse is not None:
            found = compare.close("lse", lse, want_lse, compare.TOLERANCES["lse_fp32"])
            assert found.passed, found.detail


class Builder:
    """Builds calls on one device from one generator."""

    def __init__(self, rng: torch.Generator, device: str) -> None:
        self.rng, self.device = rng, device

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.rng) * std

    def queries(self, rows: int, heads: int) -> Tensor:
        return self.randn(rows, heads, 512, std=16.0).to(torch.bfloat16).to(self.device)

    def cache(self, entries: int, block: int = 64, dialect: str = "e4m3fn") -> KVCache:
        """``entries`` rounded up to whole blocks, then one block of poison."""
        blocks = -(-entries // block)
        cache = kv_cache.allocate(blocks + 1, block, dialect, device=self.device, fill=0xFF)
        slots = torch.arange(blocks * block, device=self.device)
        kv_cache.insert(cache, slots, self.randn(blocks * block, 512, std=0.1).to(self.device))
        return cache

    def scope(self, cache: KVCache, lists: Lists) -> Scope:
        return Scope(cache, *ragged(lists, self.device), width=max((len(row) for row in lists), default=0))

    def lists(self, lengths: Sequence[int], entries: int) -> list[list[int]]:
        return [torch.randint(0, entries, (n,), generator=self.rng).tolist() for n in lengths]

    def call(
        self, swa: Lists, extra: Lists | None = None, *, heads: int = 4, blocks: tuple[int, int] = (64, 64),
        dialects: tuple[str, str] = ("e4m3fn", "e4m3fn"), entries: int = 64, sink: bool = True,
    ) -> Call:  # fmt: skip
        return Call(
            q=self.queries(len(swa), heads),
            swa=self.scope(self.cache(entries, blocks[0], dialects[0]), swa),
            extra=None if extra is None else self.scope(self.cache(entries, blocks[1], dialects[1]), extra),
            sink=self.randn(heads).to(self.device) if sink else None,
        )

    def small(self, rows: int = 2, heads: int = 4, **options: Any) -> Call:
        """Rows of 20 SWA and 17 extra slots: whole and partial tiles of 16."""
        return self.call(self.lists([20] * rows, 64), self.lists([17] * rows, 64), heads=heads, **options)
