"""One step's rows: tokens of several requests in one tensor, and the ragged slot lists that their queries attend to.

Rows of decoding requests come first, so that kernels take one leading slice of every tensor; prompt rows follow. A row
at position p attends to the window slots of ``max(0, p - W + 1) .. p`` and to the slots of its compressed entries.

The lists of decode rows lie in buffers that keep their addresses (`SlotLists`); those of prompt rows, which no graph
captures, are made anew in every step.

Source: the split into decode and prefill rows, and the ragged lists, as in vLLM's DeepSeek-V4 backend on ROCm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.formats.scope import Scope
from dsv4ref.serving.requests import Segment
from dsv4ref.serving.tail_fill import TailFilled

__all__ = ["Batch", "SlotLists", "make_batch", "prompt_scope"]


@dataclass(frozen=True)
class Batch:
    """What a step computes.

    Args:
        segments: one per request, decoding requests first.
        decodes: how many of them decode, one row each.
        token_ids: int64 ``[T]``, where the model computes.
        positions: int64 ``[T]``, likewise: each row's place in its request.
        rows: of every segment, its rows of ``[T]``.
    """

    segments: tuple[Segment, ...]
    decodes: int
    token_ids: Tensor
    positions: Tensor
    rows: tuple[slice, ...]

    @property
    def sampled(self) -> tuple[int, ...]:
        """Numbers of the segments whose last row gives a token."""
        return tuple(number for number, segment in enumerate(self.segments) if segment.samples)

    @property
    def sampled_rows(self) -> Tensor:
        """Their last rows, int64 ``[len(sampled)]``."""
        return torch.tensor([self.rows[number].stop - 1 for number in self.sampled], dtype=torch.int64)


def make_batch(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Batch:
    """Lay out segments, decoding requests first, as rows.

    Args:
        segments: of `RequestQueue.schedule`, at least one.
        device: where the model computes.
    """
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[slice] = []
    for segment in segments:
        rows.append(slice(len(tokens), len(tokens) + segment.end - segment.begin))
        tokens.extend(segment.request.tokens(segment.begin, segment.end))
        positions.extend(range(segment.begin, segment.end))
    decodes = sum(segment.request.decoding for segment in segments)
    assert all(segment.request.decoding for segment in segments[:decodes]), "decoding requests come first"
    where = torch.device(device)
    return Batch(
        tuple(segments), decodes, torch.tensor(tokens, device=where), torch.tensor(positions, device=where), tuple(rows)
    )


class SlotLists:
    """The slot lists of a step's decode rows in one kind of cache, at addresses that never change.

    Args:
        rows: decode rows of a step at most.
        width: slots of a row at most, at least 1.
        device: where.
        prepare: clears what the step must not find, before it is written; `Features.shrink_tail_fill` decides.
    """

    def __init__(
        self, rows: int, width: int, device: torch.device | str, prepare: Callable[[TailFilled, int], None]
    ) -> None:
        self.width = width
        self.buffers = TailFilled(rows, width, device)
        self._prepare = prepare
        self._rows = 0

    def prepare(self, rows: int) -> None:
        """Start a step of so many decode rows; once per step, whatever the number of layers."""
        self._prepare(self.buffers, rows)
        self._rows = rows

    def scope(self, cache: KVCache, slots: Sequence[Tensor]) -> Scope:
        """Write the rows' lists, and give them as a scope over a cache; good until the next call.

        Args:
            cache: one layer's.
            slots: per decode row, int64 ``[n]`` on one device, n at most the width.
        """
        lengths = [int(row.numel()) for row in slots]
        if len(slots) != self._rows or max(lengths, default=0) > self.width:
            raise ValueError(
                f"slots: got {len(slots)} rows of up to {max(lengths, default=0)}, expected {self._rows} of up to "
                f"{self.width}"
            )
        where, buffers = self.buffers.indices.device, self.buffers
        row_numbers = torch.arange(self._rows, dtype=torch.int32)
        buffers.write(row_numbers.to(where), torch.tensor(lengths, dtype=torch.int32).to(where))
        if slots:
            buffers.indices[: sum(lengths)].copy_(torch.cat(list(slots)))
        return Scope(cache, buffers.indices, buffers.indptr[: self._rows + 1], self.width)


def prompt_scope(cache: KVCache, slots: Sequence[Tensor], width: int) -> Scope:
    """Prompt rows' lists as a scope over a cache.

    Args:
        cache: one layer's.
        slots: per row, int64 ``[n]`` on one device.
        width: slots of a row at most.
    """
    where = cache.data.device
    ends = torch.tensor([0, *itertools.accumulate(int(row.numel()) for row in slots)], dtype=torch.int32)
    return Scope(cache, torch.cat(list(slots)).to(where, torch.int32), ends.to(where), width)
