"""Traces: the steps that a scheduler hands to the metadata builder, for requests that decode, prefill, come and go.

Only lengths are modelled. Each function gives one (query lengths, sequence lengths) pair per step, which
`serving.metadata.make_step` turns into a `Step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Lengths", "decode_trace", "prefill_trace", "serving_trace"]


@dataclass(frozen=True)
class Lengths:
    """One step: ``query`` tokens computed and ``seq`` tokens held afterwards, per request in the batch's order."""

    query: tuple[int, ...]
    seq: tuple[int, ...]


def decode_trace(contexts: Sequence[int], steps: int, *, per_step: int = 1) -> list[Lengths]:
    """The same requests decode in every step.

    Args:
        contexts: length of each request before the first step.
        steps: how many steps.
        per_step: tokens per request and step; more than one with speculative decoding.

    Raises:
        ValueError: a negative context or number of steps, or `per_step` below 1.
    """
    _check("steps", steps, 0)
    _check("per_step", per_step, 1)
    for context in contexts:
        _check("contexts", context, 0)
    return [
        Lengths((per_step,) * len(contexts), tuple(context + per_step * (step + 1) for context in contexts))
        for step in range(steps)
    ]


def prefill_trace(prompt: int, budget: int) -> list[Lengths]:
    """One request's prompt, in chunks of at most `budget` tokens.

    Raises:
        ValueError: a prompt or budget below 1.
    """
    _check("prompt", prompt, 1)
    _check("budget", budget, 1)
    ends = [*range(budget, prompt, budget), prompt]
    return [Lengths((end - begin,), (end,)) for begin, end in zip([0, *ends], ends, strict=False)]


def serving_trace(*, slots: int, prompt: int, output: int, budget: int, steps: int) -> list[Lengths]:
    """Continuous batching in its steady state: who finishes is replaced, and new prompts are prefilled beside decodes.

    The first requests start spread over their lives, evenly. In a step every decoding request takes one token of the
    budget, and the rest goes to prompts, in the order of the slots.

    Args:
        slots: requests in flight.
        prompt, output: tokens of every request's prompt and answer.
        budget: tokens per step, at least `slots`.
        steps: how many steps.

    Raises:
        ValueError: a number below 1, or a budget below `slots`.
    """
    for name, value in (("slots", slots), ("prompt", prompt), ("output", output), ("steps", steps)):
        _check(name, value, 1)
    _check("budget", budget, slots)
    held = [prompt + output * slot // slots for slot in range(slots)]
    trace = []
    for _ in range(steps):
        left = budget - sum(tokens >= prompt for tokens in held)
        query = []
        for tokens in held:
            take = 1 if tokens >= prompt else min(prompt - tokens, left)
            left -= take if tokens < prompt else 0
            query.append(take)
        held = [tokens + take for tokens, take in zip(held, query, strict=True)]
        present = [(take, tokens) for take, tokens in zip(query, held, strict=True) if take]
        trace.append(Lengths(tuple(take for take, _ in present), tuple(tokens for _, tokens in present)))
        held = [0 if tokens >= prompt + output else tokens for tokens in held]
    return trace


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
