"""Requests, and who of them computes what in the next step: first come, first served, up to the number of slots.

A request waits, joins when a slot and its blocks are free, computes its prompt in one or several chunks, then decodes
one token per step, and leaves: finished, cancelled or failed. In a step every decoding request computes one token, and
prompts share a budget of ``chunk`` tokens in the order in which they joined; so decoding never waits for a prompt.

A request's last token is never computed: nobody asks for what follows it.

Source: continuous batching with chunked prefill as in vLLM's V1 scheduler, without preemption: a request's blocks are
all taken when it joins.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Request", "RequestQueue", "Segment", "Status", "greedy"]


class Status(enum.StrEnum):
    """Where a request stands; the last three are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class Request:
    """One prompt and what became of it.

    Args:
        id: unique within an engine.
        prompt: token ids, at least one.
        max_new_tokens: tokens to generate at most.
        stop: token ids that end the answer; such a token is its last.
        status: where it stands.
        output: tokens generated so far.
        computed: tokens of prompt and output that the model has processed.
        error: why it failed; None otherwise.
        cancelled: whether it is to leave at the end of the step that is running.
    """

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    computed: int = 0
    error: str | None = None
    cancelled: bool = False

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def longest(self) -> int:
        """Tokens that it computes at most, hence that its caches must hold."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed."""
        return self.computed >= len(self.prompt)

    def token(self, position: int) -> int:
        """The token at a position of prompt and output."""
        of_prompt = len(self.prompt)
        return self.prompt[position] if position < of_prompt else self.output[position - of_prompt]

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens ``begin .. end - 1`` of prompt and output."""
        of_prompt = len(self.prompt)
        return [*self.prompt[begin:end], *self.output[max(0, begin - of_prompt) : max(0, end - of_prompt)]]

    def take(self, token: int) -> bool:
        """Append a generated token; returns whether it is the last."""
        self.output.append(token)
        return len(self.output) == self.max_new_tokens or token in self.stop


class Segment(NamedTuple):
    """Consecutive tokens of one request that a step computes.

    Args:
        request: whose.
        begin, end: positions ``begin .. end - 1``.
    """

    request: Request
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether it ends with the last known token, so that its logits give the next one."""
        return self.end == self.request.length


class RequestQueue:
    """Who waits and who runs.

    Args:
        slots: requests that run at once.
        chunk: prompt tokens of a step at most, over all requests.
        prompt_rows: instead, every prompt computes one token per step, as answers do.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, slots: int, chunk: int, *, prompt_rows: bool = False) -> None:
        for name, value in (("slots", slots), ("chunk", chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        self.slots, self.chunk, self.prompt_rows = slots, chunk, prompt_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def find(self, id: int) -> Request:
        """A request that waits or runs.

        Raises:
            ValueError: there is none of that id; it may have left.
        """
        for request in (*self.running, *self.waiting):
            if request.id == id:
                return request
        live = sorted(request.id for request in (*self.running, *self.waiting))
        raise ValueError(f"id: got {id!r}, expected a request that waits or runs, one of {live}")

    def next(self) -> Request | None:
        """Who would join now: the longest waiting, if there is a slot."""
        return self.waiting[0] if self.waiting and len(self.running) < self.slots else None

    def join(self, request: Request) -> None:
        """From the head of the queue into a slot."""
        assert self.next() is request, f"request {request.id} is not next"
        self.running.append(self.waiting.popleft())
        request.status = Status.RUNNING

    def leave(self, request: Request, status: Status, error: str | None = None) -> None:
        """Out of the queue or its slot, for good."""
        (self.running if request in self.running else self.waiting).remove(request)
        request.status, request.error = status, error

    def replace(self, running: Iterable[Request]) -> None:
        """Nobody waits, and these run, in this order, whoever did before.

        Args:
            running: at most as many as there are slots.
        """
        self.waiting.clear()
        self.running = list(running)
        assert len(self.running) <= self.slots, f"{len(self.running)} requests in {self.slots} slots"

    def schedule(self) -> tuple[Segment, ...]:
        """What the next step computes: decoding requests first, one token each, then prompts within the budget."""
        decodes = [Segment(r, r.computed, r.computed + 1) for r in self.running if r.decoding]
        if len(decodes) == len(self.running):
            return tuple(decodes)
        behind = [r for r in self.running if not r.decoding]
        if self.prompt_rows:
            return (*decodes, *(Segment(r, r.computed, r.computed + 1) for r in behind))
        prompts, left = [], self.chunk
        for request in behind:
            take = min(len(request.prompt) - request.computed, left)
            if take > 0:
                prompts.append(Segment(request, request.computed, request.computed + take))
                left -= take
        return (*decodes, *prompts)


def greedy(logits: Tensor) -> Sequence[int | None]:
    """The token of highest logit per row, ties to the lower id; None for a row that holds a NaN or an infinity.

    Args:
        logits: floating ``[N, V]``.
    """
    finite = torch.isfinite(logits).all(dim=1).tolist()
    best = logits.argmax(dim=1).tolist() if logits.shape[0] else []
    return [token if ok else None for token, ok in zip(best, finite, strict=True)]
