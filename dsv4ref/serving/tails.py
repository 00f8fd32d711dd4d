"""Open groups of the compressors on the device: a step appends every row's token and pools the groups that it closes.

The reference's state grows and shrinks with the open group. Here every request slot has a ring of fixed size, and
token p is row ``p mod n`` of it::

    C128   n = 128: at its last token the ring is the group, in order
    C4     n = 8:   at its last token the ring is the previous group and the group, rotated by 0 or 4

Every row of a step pools its ring, whether a group closes there or not; what that gives in between belongs to no entry,
and the caller throws it away. So nothing in here depends on a position but addresses and masks.

A write at position p reaches what token p - n left, which no later position reads: a step may be repeated.

Source: DeepSeek-V4 inference/model.py, ``Compressor.kv_state`` and ``score_state``, which are such rings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4ref.ref.compressor import CompressorState, empty_state
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.numerics import Numerics, bf16_round_trip
from dsv4ref.ref.rope import rotate_ref
from dsv4ref.ref.weights import Weights

__all__ = ["Tail", "append_and_pool", "place_rows"]


@dataclass(frozen=True)
class Tail:
    """One compressor's rings, of all request slots.

    Args:
        kv: ``[slots, n, c]``.
        score: ``[slots, n, c]``, ape already added.
        ratio: r, tokens per entry.
        dim: d, width of an entry; c is 2d where an entry also pools the previous group (C4).
    """

    kv: Tensor
    score: Tensor
    ratio: int
    dim: int

    @staticmethod
    def allocate(
        slots: int, ratio: int, dim: int, overlap: bool, dtype: torch.dtype, device: torch.device | str
    ) -> Tail:
        """Rings of NaN: a row that is read before it is written is heard."""
        shape = (slots, 2 * ratio if overlap else ratio, 2 * dim if overlap else dim)
        kv, score = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        return Tail(kv, score, ratio, dim)

    @property
    def overlap(self) -> bool:
        """Whether an entry also pools the previous group."""
        return self.kv.shape[1] == 2 * self.ratio

    @property
    def nbytes(self) -> int:
        """Bytes of the rings."""
        return self.kv.nbytes + self.score.nbytes

    def take_over(self, slot: int, state: CompressorState) -> None:
        """Continue where the reference's state stands.

        Args:
            slot: whose ring.
            state: of the same compressor; not changed.
        """
        mine = ((self.kv, state.kv, state.previous_kv), (self.score, state.score, state.previous_score))
        begin = state.entries * self.ratio  # position of the open group's first token
        for ring, rows, previous in mine:
            ring[slot].fill_(torch.nan)
            ring[slot, self._rows(begin, rows.shape[0])] = rows.to(ring.device)
            if self.overlap and state.entries:  # its first half is all that anybody still reads
                ring[slot, self._rows(begin - self.ratio, self.ratio), : self.dim] = previous.to(ring.device)

    def hand_back(self, slot: int, position: int) -> CompressorState:
        """The open group as the reference keeps it, copied: what `take_over` would continue from.

        Args:
            slot: whose ring.
            position: tokens that the ring has taken in.
        """
        entries, begin = position // self.ratio, position // self.ratio * self.ratio
        state = empty_state(self.ratio, self.dim, self.overlap, self.kv.dtype, self.kv.device)
        rows = self._rows(begin, position - begin)
        state = replace(state, kv=self.kv[slot, rows], score=self.score[slot, rows], entries=entries)
        if not (self.overlap and entries):
            return state
        rows = self._rows(begin - self.ratio, self.ratio)
        kv, score = (ring[slot, rows, : self.dim] for ring in (self.kv, self.score))
        return replace(state, previous_kv=kv, previous_score=score)

    def _rows(self, first: int, count: int) -> Tensor:
        return (first + torch.arange(count, device=self.kv.device)) % self.kv.shape[1]


def append_and_pool(x: Tensor, weights: Weights, tail: Tail, slots: Tensor, positions: Tensor) -> Tensor:
    """Take in one token of every row, and pool what the ring then holds.

    Args:
        x: ``[T, D]`` normed layer input.
        weights: ``wkv``, ``wgate`` and ``ape`` of the compressor, resident.
        tail: written.
        slots: int64 ``[T]``, whose ring.
        positions: int64 ``[T]`` of the tokens, 0 or more.

    Returns:
        ``[T, d]`` before norm and rotation: an entry in rows whose token closes a group, of no meaning elsewhere.
    """
    ratio, held = tail.ratio, tail.kv.shape[1]
    kv = x @ weights.matrix("wkv").T  # [T, c]
    score = x @ weights.matrix("wgate").T + weights.tensor("ape")[positions % ratio]  # [T, c]
    place = positions % held
    tail.kv[slots, place] = kv
    tail.score[slots, place] = score

    back = torch.arange(held - 1, -1, -1, device=x.device)
    rows = (positions[:, None] - back) % held  # [T, n], oldest first
    kv, score = tail.kv[slots[:, None], rows], tail.score[slots[:, None], rows]  # [T, n, c]
    if tail.overlap:
        first = (positions < held - 1)[:, None, None]  # entry 0 has no previous group: neither weights nor values
        kv = torch.cat((kv[:, :ratio, : tail.dim].masked_fill(first, 0.0), kv[:, ratio:, tail.dim :]), dim=1)
        previous = score[:, :ratio, : tail.dim].masked_fill(first, float("-inf"))
        score = torch.cat((previous, score[:, ratio:, tail.dim :]), dim=1)  # [T, n, d]
    return (torch.softmax(score, dim=1) * kv).sum(dim=1)


def place_rows(
    pooled: Tensor, entries: Tensor, ratio: int, norm: Tensor, freqs: Tensor, eps: float, numerics: Numerics
) -> Tensor:
    """`dsv4ref.ref.compressor.place_entries_ref` for rows of different requests.

    Args:
        pooled: ``[T, d]`` of `append_and_pool`.
        entries: int64 ``[T]``, each row's entry number, 0 or more.
        ratio, norm, freqs, eps, numerics: as there.

    Returns:
        ``[T, d]``.
    """
    if numerics.round_pooled:
        pooled = bf16_round_trip(pooled)
    normed = numerics.round(rms_norm_ref(pooled, norm, eps))
    return numerics.round(rotate_ref(normed, entries * ratio, freqs))
