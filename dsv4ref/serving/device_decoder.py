"""Decode steps on the device, captured or not: which batch size runs, and what its buffers already hold.

A batch runs in the smallest of a few sizes that holds it; its other rows are padding. With capture, every size is
recorded once, over padding alone, with a memory pool of its own (H08); a batch too large for the captured sizes runs
uncaptured at the number of slots.

A step leaves its answers where the next step reads its tokens, and moves every position on by one. So in a steady state
the host copies nothing to the device: it reads the answers, and remembers which rows the buffers hold. When the rows
that it wants are others, because somebody joined, left or was cancelled, or because a step failed, it loads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dsv4ref.ref.model import Model
from dsv4ref.ref.state import State
from dsv4ref.serving.blocks import PagedCaches
from dsv4ref.serving.device_step import NO_ANSWER, DeviceStep, Rows
from dsv4ref.serving.graphs import Buckets
from dsv4ref.serving.operations import Operations
from dsv4ref.serving.slot_states import SlotStates

__all__ = ["DeviceDecoder", "default_sizes"]


def default_sizes(slots: int) -> tuple[int, ...]:
    """The powers of two below a number of slots, and that number."""
    return (*(2**power for power in range((slots - 1).bit_length())), slots)


class DeviceDecoder:
    """Decodes batches of requests that have joined.

    Args:
        model: resident on the caches' device.
        caches: the engine's.
        sizes: batch sizes, all different, 1 to the caches' slots; the number of slots is one in any case.
        skip_full: as `DeviceStep`.

    Attributes:
        states: who has which slot.
        captured: the batch sizes that are replayed.
        loads: steps so far whose rows the host had to copy.

    Raises:
        ValueError: a size that cannot be.
    """

    def __init__(self, model: Model, caches: PagedCaches, sizes: Sequence[int], *, skip_full: bool) -> None:
        slots = caches.sizes.slots
        if not sizes or len(set(sizes)) != len(sizes) or not all(1 <= size <= slots for size in sizes):
            raise ValueError(f"buckets: got {list(sizes)}, expected different numbers from 1 to {slots}, the slots")
        self.states = SlotStates(model, caches)
        self.steps = {
            size: DeviceStep(size, model, caches, self.states, skip_full=skip_full) for size in sorted({*sizes, slots})
        }
        self.loads = 0
        self._device = caches.layers[0].window.data.device
        self._wanted = tuple(sorted(sizes))
        self._graphs: Buckets | None = None
        self._held: dict[int, Rows] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        return () if self._graphs is None else self._graphs.sizes

    @property
    def nbytes(self) -> int:
        """Bytes of tables, open groups and every size's buffers; not what graphs keep for themselves."""
        return self.states.nbytes + sum(step.nbytes for step in self.steps.values())

    def capture(self, operations: Operations) -> None:
        """Record every size that was asked for, each over padding alone.

        Args:
            operations: what the replays will do; another choice later changes only what is not captured.

        Raises:
            RuntimeError: an operation that cannot be captured.
        """
        graphs = Buckets(self._wanted, device=self._device)
        with torch.no_grad():
            for size in self._wanted:
                self._held.pop(size, None)
                self.steps[size].load(Rows())
                graphs.capture(size, partial(self.steps[size].run, operations))
        self._graphs = graphs

    def join(self, owner: int, state: State) -> None:
        """Take a request over whose prompt is computed; nothing if that was done before.

        Args, raises: as `SlotStates.join`.
        """
        if self.states.slot_of(owner) is None:
            self.states.join(owner, state)

    def leave(self, owner: int) -> None:
        """Forget a request; nothing if it never joined."""
        self.states.leave(owner)

    def rows(self, owners: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Rows:
        """Rows of requests that have joined.

        Args:
            owners: the requests' ids, all different.
            positions, tokens: one of each.

        Raises:
            ValueError: one has not joined.
        """
        return Rows(self.states.slots_of(owners), positions, tokens)

    def decode(self, rows: Rows, operations: Operations) -> tuple[list[int | None], Tensor]:
        """Compute the next token of every row.

        Args:
            rows: at least one, of different slots.
            operations: what a size that is not captured does.

        Returns:
            Per row the token of highest logit, None where logits are not finite; and the logits ``[rows, V]``, which
            the next step of this size overwrites.

        Raises:
            ValueError: no row, or more than there are slots.
            Whatever an operation raises; the step may be repeated.
        """
        step = self.place(rows)
        logits = self.launch(len(rows), operations)
        answers: list[int] = step.answers[: len(rows)].tolist()
        self.remember(rows, answers)
        known: list[int | None] = list(answers)
        if NO_ANSWER in answers:
            known = [None if answer == NO_ANSWER else answer for answer in answers]
        return known, logits[: len(rows)]

    def place(self, rows: Rows) -> DeviceStep:
        """The host's part of a step before its launch: see that the buffers hold its rows.

        Args:
            rows: as `decode`.

        Returns:
            The step of the batch size that holds them; nothing was launched if its buffers held them already.

        Raises:
            ValueError: no row, or more than there are slots.
        """
        step = self.steps[self._size_for(len(rows))]
        # Taken out: until the step has succeeded nobody knows what its buffers hold.
        if self._held.pop(step.rows, None) != rows:
            step.load(rows)
            self.loads += 1
        return step

    def launch(self, rows: int, operations: Operations) -> Tensor:
        """The step of the rows that its buffers hold, replayed or run; the answers stay on the device.

        Its own inputs are left behind one token further, so launches may follow each other. `decode` loads its rows
        again after one that nobody `remember`ed.

        Args:
            rows: how many.
            operations: as `decode`.

        Returns:
            Logits of the batch size that holds them.

        Raises:
            ValueError: no row, or more than there are slots.
        """
        step = self.steps[self._size_for(rows)]
        self._held.pop(step.rows, None)
        if self._graphs is not None and step.rows in self._graphs.sizes:
            logits: Tensor = self._graphs.replay(rows)
            return logits
        return step.run(operations)

    def remember(self, rows: Rows, answers: Sequence[int]) -> None:
        """The host's part behind it: note what a step of these rows has left in its buffers.

        Args:
            rows: as `place`d.
            answers: per row its token, or `NO_ANSWER`, with which nothing is noted.
        """
        if NO_ANSWER not in answers:
            self._held[self._size_for(len(rows))] = rows.followed_by(answers)

    def _size_for(self, rows: int) -> int:
        for size in self.steps:
            if 1 <= rows <= size:
                return size
        raise ValueError(f"rows: got {rows}, expected 1 to {max(self.steps)}, the slots")
