"""Bad input and faults: one clear error, nobody else affected, every block returned."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_runs import Run, drive, engine, prompt, slice_model
from torch import Tensor

from dsv4ref.accuracy.score import load_model
from dsv4ref.ref.model import Model
from dsv4ref.ref.numerics import DEFAULT
from dsv4ref.serving import blocks
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import Features
from dsv4ref.serving.requests import Request, Status

CONFIG = slice_model((0,)).config
PROMPTS = [prompt(CONFIG, length, seed) for seed, length in enumerate((7, 26, 3))]
NEW = 6


@pytest.fixture(scope="module")
def model() -> Model:
    return slice_model((4,), numerics=replace(DEFAULT, round_bf16=False))


@pytest.fixture(scope="module")
def healthy(model: Model) -> Run:
    return drive(engine(model), {0: [(tokens, NEW) for tokens in PROMPTS]})


def submitted(model: Model, **changes: Any) -> DecodeEngine:
    subject = engine(model, **changes)
    for tokens in PROMPTS:
        subject.submit(tokens, NEW)
    return subject


def on_call(subject: DecodeEngine, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the step that attends with decode rows for the ``number``-th time, from 0."""
    attend, calls = subject.operations.attend, iter(range(10**6))

    def wrapped(*arguments: Any) -> Tensor:
        if next(calls) == number:
            act()
        return attend(*arguments)

    subject.operations = replace(subject.operations, attend=wrapped)


def raise_no_memory() -> None:
    raise torch.OutOfMemoryError("no memory for this test")


# --- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "new", "error", "message"),
    [
        ([], 1, ValueError, "prompt: got no tokens, expected at least one"),
        (torch.zeros(0, dtype=torch.int64), 1, ValueError, "prompt: got no tokens"),
        ([3, 96], 1, ValueError, "prompt: got 96, expected 0 to 95"),
        ([-1], 1, ValueError, "prompt: got -1, expected 0 to 95"),
        ([0.5], 1, ValueError, "prompt: got torch.float32 .*, expected integers"),
        ([[1, 2]], 1, ValueError, r"prompt: got torch.int64 \(1, 2\), expected integers \[T\]"),
        (["a"], 1, TypeError, r"prompt: got \['a'\], expected a sequence of token ids"),
        (7, 1, TypeError, "prompt: got 7, expected a sequence of token ids"),
        ([1], 0, ValueError, "max_new_tokens: got 0, expected a positive integer"),
        ([1], True, ValueError, "max_new_tokens: got True"),
        ([1] * 60, 102, ValueError, "60 tokens and max_new_tokens = 102, which computes 161; expected at most .* 160"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_it_waits(
    tokens: Any, new: int, error: type[Exception], message: str, model: Model
) -> None:
    subject = engine(model)
    with pytest.raises(error, match=message):
        subject.submit(tokens, new)
    assert subject.idle
    assert subject.submit([1], 1) == 0


def test_the_longest_request_that_fits_runs_to_its_end(model: Model) -> None:
    subject = engine(model, max_length=40)
    id = subject.submit([1] * 30, 11)
    assert len(subject.run()[id].output) == 11


def test_a_stop_token_outside_the_vocabulary_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="stop: got 500, expected 0 to 95"):
        engine(model).submit([1], 1, stop=[500])


def test_an_engine_that_cannot_be_built_says_why(model: Model) -> None:
    with pytest.raises(RuntimeError, match=r"caches: \d+ bytes could not be allocated"):
        engine(model, cache_tokens=2**45)
    with pytest.raises(ValueError, match="max_length: got 5000, expected at most 4096, slice's positions"):
        engine(model, max_length=5000)
    with pytest.raises(ValueError, match="slots: got 0, expected a positive integer"):
        engine(model, slots=0)
    with pytest.raises(ValueError, match="features: got cached_projection=True, expected False"):
        engine(load_model(), features=Features(cached_projection=True))
    with pytest.raises(ValueError, match="head_dim 128 with 64 rotary, expected 512"):
        engine(slice_model((0,), head_dim=128))


# --- more than there is room for --------------------------------------------------------------------------------------


def test_more_requests_than_slots_wait_and_get_the_same_tokens(model: Model, healthy: Run) -> None:
    subject = submitted(model, slots=1)
    subject.step()
    assert (subject.running, subject.waiting) == ((0,), (1, 2))
    done = subject.run()
    assert {id: request.output for id, request in done.items()} == healthy.tokens
    subject.check_blocks()


def test_a_request_waits_for_pages_that_a_longer_one_holds_and_nobody_overtakes_it(model: Model) -> None:
    subject = engine(model, slots=3, max_length=256, cache_tokens=384, page_tokens=128)
    big, waits, small = subject.submit([1] * 100, 60), subject.submit([2] * 120, 20), subject.submit([3], 2)
    subject.step()
    assert (subject.running, subject.waiting) == ((big,), (waits, small))
    subject.cancel(big)
    subject.step()
    assert subject.running == (waits, small)
    subject.check_blocks()


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_request_leaves_at_once_and_others_go_on(steps: int, model: Model, healthy: Run) -> None:
    subject = submitted(model)
    for _ in range(steps):
        subject.step()
    subject.cancel(1)
    subject.check_blocks()
    assert 1 not in (*subject.running, *subject.waiting)
    done = subject.run()
    assert done[1].status is Status.CANCELLED
    assert {id: done[id].output for id in (0, 2)} == {id: healthy.tokens[id] for id in (0, 2)}
    subject.check_blocks()
    with pytest.raises(ValueError, match="id: got 1, expected a request that waits or runs"):
        subject.cancel(1)


def test_a_request_cancelled_in_the_middle_of_a_step_leaves_when_it_ends(model: Model, healthy: Run) -> None:
    subject = submitted(model)
    seen: list[tuple[int, ...]] = []

    def cancel() -> None:
        subject.cancel(0)
        seen.append(subject.running)  # its blocks are being read: it is still there

    on_call(subject, 2, cancel)
    results = []
    while not subject.idle:
        results.append(subject.step())
        subject.check_blocks()
    (left,) = [result for result in results if any(request.id == 0 for request in result.done)]
    assert 0 in seen[0]
    assert 0 not in left.tokens
    (request,) = [request for request in left.done if request.id == 0]
    assert request.status is Status.CANCELLED
    assert request.output == healthy.tokens[0][: len(request.output)]
    assert 1 <= len(request.output) < NEW
    finished = {request.id: request.output for result in results for request in result.done if request.id != 0}
    assert finished == {id: healthy.tokens[id] for id in (1, 2)}


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_changes_nothing_and_can_be_tried_again(model: Model, healthy: Run) -> None:
    subject = submitted(model)
    on_call(subject, 3, raise_no_memory)
    failures = 0
    done: dict[int, Request] = {}
    while not subject.idle:
        before = {request.id: (request.computed, tuple(request.output)) for request in subject._queue.running}
        try:
            done |= {request.id: request for request in subject.step().done}
        except torch.OutOfMemoryError:
            failures += 1
            after = {request.id: (request.computed, tuple(request.output)) for request in subject._queue.running}
            assert {id: after[id] for id in before} == before
        subject.check_blocks()
    assert failures == 1
    assert {id: request.output for id, request in done.items()} == healthy.tokens


def test_after_a_failed_step_a_request_can_be_cancelled_and_others_go_on(model: Model, healthy: Run) -> None:
    subject = submitted(model)

    def fail() -> None:
        subject.cancel(1)
        raise_no_memory()

    on_call(subject, 1, fail)
    subject.step()
    subject.step()
    with pytest.raises(torch.OutOfMemoryError):
        subject.step()
    assert 1 not in subject.running
    done = subject.run()
    assert done[1].status is Status.CANCELLED
    assert {id: done[id].output for id in (0, 2)} == {id: healthy.tokens[id] for id in (0, 2)}
    subject.check_blocks()


def test_a_request_whose_caches_cannot_be_made_fails_alone(
    model: Model, healthy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = blocks.empty_layer, iter(range(10**6))

    def second_fails(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError("no memory for this test")
        return make(*arguments, **named)

    monkeypatch.setattr(blocks, "empty_layer", second_fails)
    subject = submitted(model)
    first = subject.step()
    subject.check_blocks()
    (failed,) = first.done
    assert (failed.id, failed.status) == (1, Status.FAILED)
    assert failed.error == "its caches could not be made: no memory for this test"
    done = subject.run()
    assert {id: done[id].output for id in (0, 2)} == {id: healthy.tokens[id] for id in (0, 2)}


def test_a_request_whose_logits_are_not_finite_fails_alone(model: Model, healthy: Run) -> None:
    subject = submitted(model)
    while len(subject.step().tokens) < 3:
        pass
    for block in subject.caches.window_pool._held[1]:
        subject.caches.layers[0].window.data[block] = 0xFF
    done = subject.run()
    assert done[1].status is Status.FAILED
    assert done[1].error == f"logits after {done[1].length} tokens are not finite"
    assert {id: done[id].output for id in (0, 2)} == {id: healthy.tokens[id] for id in (0, 2)}
    subject.check_blocks()


def test_a_step_within_a_step_is_refused(model: Model) -> None:
    subject = submitted(model)
    on_call(subject, 0, lambda: (subject.step(), None)[1])
    with pytest.raises(RuntimeError, match="step: called from within a step"):
        subject.run()
    assert len(subject.run()) == 3


def test_joins_leaves_cancels_and_failures_leave_nothing_behind(rng: torch.Generator) -> None:
    subject = engine(slice_model((0, 4)), max_length=40)

    def churn(steps: int) -> None:
        for _ in range(steps):
            if int(torch.randint(0, 2, (1,), generator=rng)):
                length, new = (int(torch.randint(1, 20, (1,), generator=rng)) for _ in range(2))
                subject.submit(prompt(CONFIG, length, length), new)
            live = (*subject.running, *subject.waiting)
            if live and not int(torch.randint(0, 6, (1,), generator=rng)):
                subject.cancel(live[int(torch.randint(0, len(live), (1,), generator=rng))])
            if not int(torch.randint(0, 9, (1,), generator=rng)):
                operations = subject.operations
                on_call(subject, 0, raise_no_memory)
                with contextlib.suppress(torch.OutOfMemoryError):
                    subject.step()
                subject.operations = operations
            subject.step()
            subject.check_blocks()
        subject.run()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    churn(20)
    before = tensors()
    churn(60)
    assert tensors() == before
    assert not subject._states
    for pool in (subject.caches.window_pool, subject.caches.page_pool):
        assert sorted(pool.free) == list(range(pool.blocks))
