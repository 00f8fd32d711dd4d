"""Requests: who joins, who computes what in a step, and which token a row of logits gives."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.serving.requests import Request, RequestQueue, Status, greedy


def queue_of(*lengths: int, slots: int = 3, chunk: int = 10) -> RequestQueue:
    queue = RequestQueue(slots, chunk)
    for id, length in enumerate(lengths):
        queue.waiting.append(Request(id, tuple(range(length)), 4))
    while (request := queue.next()) is not None:
        queue.join(request)
    return queue


def step(queue: RequestQueue) -> list[tuple[int, int, int]]:
    """Ids, begins and ends of the next step, which is then taken as computed; every sampled token is 0."""
    segments = queue.schedule()
    for segment in segments:
        segment.request.computed = segment.end
        if segment.samples:
            segment.request.take(0)
    return [(segment.request.id, segment.begin, segment.end) for segment in segments]


def test_prompts_share_the_chunk_in_order_and_decoding_goes_first() -> None:
    queue = queue_of(4, 13, 2)
    assert step(queue) == [(0, 0, 4), (1, 0, 6)]
    assert step(queue) == [(0, 4, 5), (1, 6, 13), (2, 0, 2)]
    assert step(queue) == [(0, 5, 6), (1, 13, 14), (2, 2, 3)]


def test_a_prompt_gives_a_token_only_with_its_last_chunk() -> None:
    queue = queue_of(25)
    sampled = []
    for _ in range(3):
        sampled.append([segment.samples for segment in queue.schedule()])
        step(queue)
    assert sampled == [[False], [False], [True]]
    assert queue.running[0].output == [0]


def test_more_requests_than_slots_wait_in_order() -> None:
    queue = queue_of(1, 1, 1, 1, 1, slots=2)
    assert [request.id for request in queue.running] == [0, 1]
    assert queue.next() is None
    queue.leave(queue.running[0], Status.FINISHED)
    request = queue.next()
    assert request is not None
    queue.join(request)
    assert [request.id for request in queue.running] == [1, 2]
    assert [request.id for request in queue.waiting] == [3, 4]


def test_the_last_token_is_not_computed() -> None:
    request = Request(0, (5, 6), 3)
    assert request.longest == 4
    request.output = [7, 8, 9]
    assert [request.tokens(*span) for span in ((0, 1), (1, 3), (2, 4), (4, 5))] == [[5], [6, 7], [7, 8], [9]]
    request.output = []
    assert [request.take(token) for token in (7, 8, 9)] == [False, False, True]


def test_a_stop_token_ends_the_answer_and_is_its_last() -> None:
    request = Request(0, (5,), 9, frozenset({8}))
    assert [request.take(token) for token in (7, 8)] == [False, True]
    assert request.output == [7, 8]


def test_greedy_takes_the_lower_of_equal_tokens_and_none_where_logits_are_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, nan, 0.0], [0.0, inf, 0.0], [-3.0, -4.0, -inf], [-1.0, -2.0, -3.0]])
    assert list(greedy(logits)) == [1, None, None, None, 0]
    assert list(greedy(torch.zeros(0, 3))) == []


@pytest.mark.parametrize(("slots", "chunk", "name"), [(0, 1, "slots"), (1, -1, "chunk"), (True, 1, "slots")])
def test_a_queue_needs_slots_and_a_chunk(slots: int, chunk: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got .*, expected a positive integer"):
        RequestQueue(slots, chunk)


def test_an_unknown_request_is_named_with_those_there_are() -> None:
    queue = queue_of(1, 1, 1, slots=2)
    with pytest.raises(ValueError, match=r"id: got 9, expected .* one of \[0, 1, 2\]"):
        queue.find(9)
