"""Device steps give decode rows the tokens that the reference engine gives them, and nobody another's state."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_runs import (
    Arrivals,
    Run,
    assert_same,
    assert_within_budget,
    drive,
    engine,
    largest_error,
    plain_run,
    prompt,
    same_bits,
    slice_model,
    smooth_model,
)
from torch import Tensor

from dsv4ref.accuracy.score import load_model
from dsv4ref.accuracy.task import TASK
from dsv4ref.ref.model import Model
from dsv4ref.serving.decode_lists import PADDING
from dsv4ref.serving.device_decoder import default_sizes
from dsv4ref.serving.device_step import DeviceStep
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import Features, available
from dsv4ref.serving.operations import Operations
from dsv4ref.serving.requests import Request, Status
from dsv4ref.serving.tails import Tail

CONFIG = slice_model((0,)).config
# A prompt that ends before the 127 that closes a C128 entry; behind it, one that ends where a group of four does.
BOUNDARIES: Arrivals = {0: [(prompt(CONFIG, 125, 0), 6), (prompt(CONFIG, 4, 1), 5)]}
# More requests than two slots, of all places in a group of four; the second's chunk leaves a token over.
SHORT: Arrivals = {0: [(prompt(CONFIG, 3, 2), 5), (prompt(CONFIG, 19, 3), 3)], 1: [(prompt(CONFIG, 6, 4), 3)]}


def eager(model: Model) -> Features:
    return available(model).without("captured_steps")


@pytest.fixture(scope="module")
def small() -> Model:
    """The same with one C4 layer, for what has nothing to do with other kinds of layers."""
    return smooth_model((4,))


@pytest.fixture(scope="module")
def small_runs(small: Model, device: str) -> Mapping[str, Run]:
    """`SHORT` in two slots: all off, by plain bf16 attention, and in device steps."""
    return {
        "off": drive(engine(small, slots=2, device=device), SHORT),
        "plain": plain_run(small, SHORT, device),
        "step": drive(engine(small, slots=2, features=eager(small), device=device), SHORT),
    }


# --- against the engine with every feature off ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth() -> Model:
    """Without a choice that an error could flip."""
    return smooth_model()


@pytest.fixture(scope="module")
def runs(smooth: Model, device: str) -> Mapping[str, Run]:
    """The same requests all off, by plain bf16 attention, and in device steps."""
    return {
        "off": drive(engine(smooth, device=device), BOUNDARIES),
        "plain": plain_run(smooth, BOUNDARIES, device),
        "step": drive(engine(smooth, features=eager(smooth), device=device), BOUNDARIES),
    }


def test_logits_of_device_steps_stay_within_twice_the_error_of_plain_bf16_attention(runs: Mapping[str, Run]) -> None:
    assert_within_budget(runs["step"], runs["off"], runs["plain"])
    assert runs["step"].rows == runs["off"].rows
    assert (2, 0) in runs["step"].rows


def test_a_random_slice_gets_the_same_tokens_where_top_k_drops_entries(device: str) -> None:
    model, arrivals = slice_model((4, 128), seed=3), {0: [(prompt(CONFIG, 29, 5), 5), (prompt(CONFIG, 25, 6), 4)]}
    off = drive(engine(model, device=device), arrivals)
    step = drive(engine(model, features=eager(model), device=device), arrivals)
    assert model.config.index_topk < 25 // 4
    assert_same(step, off, 2 * largest_error(plain_run(model, arrivals, device), off))
    assert step.rows == off.rows


def test_the_trained_model_answers_its_questions_from_device_steps(device: str) -> None:
    """Its answers are the first token; the rest of the tokens is decoded far behind the window."""
    trained, examples = load_model(), TASK.examples(1, 77)
    arrivals = {0: [(examples.tokens[0][: examples.tail + 2].tolist(), 4)]}
    sizes = {"slots": 1, "max_length": 300, "chunk": 400, "device": device}
    off = drive(engine(trained, **sizes), arrivals)
    step = drive(engine(trained, features=eager(trained), **sizes), arrivals)
    assert step.tokens == off.tokens
    assert [run.tokens[0][0] for run in (off, step)] == [int(examples.tokens[0][examples.tail + 2])] * 2


def test_chunks_blocks_and_batch_sizes_change_no_bit(small: Model, device: str) -> None:
    """Batches of other sizes are other products: equal bits need one size, equal tokens do not."""
    once = drive(engine(small, slots=2, features=eager(small), device=device, buckets=(2,)), SHORT)
    sizes: dict[str, Any] = {"block_size": 8, "page_tokens": 128, "buckets": (2,)}
    same_bits(drive(engine(small, slots=2, features=eager(small), device=device, **sizes), SHORT), once)
    padded = drive(engine(small, slots=2, features=eager(small), device=device, chunk=7, buckets=(1,)), SHORT)
    assert padded.tokens == once.tokens


def test_without_logits_a_step_still_has_its_tokens(small: Model, device: str) -> None:
    subject = engine(small, slots=2, features=eager(small), device=device, keep_logits=False)
    ids = [subject.submit(tokens, new) for tokens, new in SHORT[0]]
    while not subject.idle:
        result = subject.step()
        assert not result.logits
        done = {request.id: request.output for request in result.done}
        assert all(len(done[id]) == new for id, (_, new) in zip(ids, SHORT[0], strict=True) if id in done)


# --- planted: what the budget must see --------------------------------------------------------------------------------


def write_outside_the_mask(patch: pytest.MonkeyPatch) -> None:
    """Every token writes the entry that its group will have, closed or not."""
    right = DeviceStep._slots

    def wrong(
        self: DeviceStep, blocks: int, block_size: int, rows: Any, numbers: Tensor, writes: Tensor, **named: Any
    ) -> Tensor:
        return right(self, blocks, block_size, rows, numbers, rows.live, **named)

    patch.setattr(DeviceStep, "_slots", wrong)


def keep_the_slot_of_who_left(patch: pytest.MonkeyPatch) -> None:
    """Open groups are not handed over: a request continues what its slot's last owner left."""
    patch.setattr(Tail, "take_over", lambda *_: None)


def close_a_token_late(patch: pytest.MonkeyPatch) -> None:
    """An entry is written one token after the one that closes it, which should already see it."""
    right = DeviceStep._entry_slots

    def wrong(self: DeviceStep, cache: Any, ratio: int, rows: Any) -> Tensor:
        return right(self, cache, ratio, replace(rows, positions=(rows.positions - 1).clamp(min=0)))

    patch.setattr(DeviceStep, "_entry_slots", wrong)


def forget_the_unit_of_position(patch: pytest.MonkeyPatch) -> None:
    """Queries and keys are rotated to where the last token was."""
    right = DeviceStep._attention

    def wrong(self: DeviceStep, x: Tensor, layer: Any, rows: Any, operations: Operations) -> Tensor:
        late = replace(rows, positions=(rows.positions - 1).clamp(min=0))
        return right(self, x, layer, late, operations)

    patch.setattr(DeviceStep, "_attention", wrong)


@pytest.mark.parametrize(
    "bug", [write_outside_the_mask, keep_the_slot_of_who_left, close_a_token_late, forget_the_unit_of_position]
)
def test_the_budget_sees_a_step_that_is_wrong(
    bug: Any, small: Model, small_runs: Mapping[str, Run], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    wrong = drive(engine(small, slots=2, features=eager(small), device=device), SHORT)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        assert_within_budget(wrong, small_runs["off"], small_runs["plain"])


# --- whose memory is whose --------------------------------------------------------------------------------------------


def poison_what_nobody_holds(subject: DecodeEngine) -> None:
    """NaN in the open groups of free slots and of padding, in free blocks and in the bins."""
    assert subject.decoder is not None
    states, caches = subject.decoder.states, subject.caches
    for slot in (*states.pool.free, states.padding):
        for tails in states.tails:
            for tail in (tails.compressor, tails.index):
                if tail is not None:
                    tail.kv[slot].fill_(torch.nan)
                    tail.score[slot].fill_(torch.nan)
    for layer in caches.layers:
        for pool, cache in ((caches.window_pool, layer.window), (caches.page_pool, layer.compressed)):
            for block in (*pool.free, pool.blocks):
                if cache is not None:
                    cache.data[block].fill_(0xFF)
                if cache is layer.compressed and layer.index_keys is not None:
                    layer.index_keys[block].fill_(torch.nan)


def drive_poisoned(subject: DecodeEngine, arrivals: Arrivals) -> Run:
    """`drive`, with poison before every step."""
    step = subject.step

    def poisoned() -> Any:
        poison_what_nobody_holds(subject)
        return step()

    subject.step = poisoned  # type: ignore[method-assign]
    return drive(subject, arrivals)


def test_rows_read_nothing_that_their_request_has_not_written(
    small: Model, small_runs: Mapping[str, Run], device: str
) -> None:
    subject = engine(small, slots=2, features=eager(small), device=device)
    same_bits(drive_poisoned(subject, SHORT), small_runs["step"])
    again = drive_poisoned(subject, SHORT)  # in slots and blocks of requests that have left
    assert [again.tokens[id + 3] for id in range(3)] == [small_runs["step"].tokens[id] for id in range(3)]


def test_padding_rows_write_into_bins_and_the_padding_slot_alone(small: Model, device: str) -> None:
    subject = engine(small, slots=3, features=eager(small), device=device, buckets=(3,))
    subject.submit(SHORT[0][0][0], 7)
    poison_what_nobody_holds(subject)
    for _ in range(6):
        subject.step()
    assert subject.decoder is not None
    assert subject.decoder.states.pool.owners == (0,), "the request is still there"
    for layer in subject.caches.layers:
        for pool, cache in ((subject.caches.window_pool, layer.window), (subject.caches.page_pool, layer.compressed)):
            assert cache is not None
            free = cache.data[list(pool.free)]
            assert bool((free == 0xFF).all()), f"{pool.name}: {int((free != 0xFF).sum())} bytes of free blocks written"
            assert bool((cache.data[pool.blocks] != 0xFF).any()), "padding wrote nothing at all"
    for tails in subject.decoder.states.tails:
        assert tails.compressor is not None
        free = tails.compressor.kv[list(subject.decoder.states.pool.free)]
        assert bool(free.isnan().all()), f"{int((~free.isnan()).sum())} numbers of free slots written"


def test_a_request_beside_padding_gets_what_it_gets_without(
    small: Model, small_runs: Mapping[str, Run], device: str
) -> None:
    """Its first entry is closed by a decoded token: the open group must still be what its own tokens left."""
    subject = engine(small, slots=3, features=eager(small), device=device, buckets=(3,))
    run = drive(subject, {0: SHORT[0][:1]})
    off, plain = (Run({0: small_runs[kind].tokens[0]}, {0: small_runs[kind].logits[0]}) for kind in ("off", "plain"))
    assert_within_budget(run, off, plain)
    assert subject.decoder is not None
    positions = subject.decoder.steps[3].lists.step.positions.tolist()
    assert positions[1:] == [PADDING, PADDING], "padding is padding after any number of steps"


# --- transactions -----------------------------------------------------------------------------------------------------


def test_a_step_may_be_repeated_from_any_point_of_its_middle(
    small: Model, small_runs: Mapping[str, Run], device: str
) -> None:
    """Whatever a failed step wrote, the next try writes again: the tokens are those of an engine that never failed."""
    healthy = small_runs["step"]
    subject = engine(small, slots=2, features=eager(small), device=device)
    right, calls, failures = subject.operations, iter(range(10**6)), 0

    def fails(name: str, every: int) -> Any:
        def wrapped(*given: Any) -> Any:
            result = getattr(right, name)(*given)  # what it writes is written
            if next(calls) % every == every - 1:
                raise torch.OutOfMemoryError("no memory for this test")
            return result

        return wrapped

    subject.operations = replace(right, attend=fails("attend", 3), step_experts=fails("step_experts", 4))
    step = subject.step

    def until_it_succeeds() -> Any:
        nonlocal failures
        for _ in range(50):
            try:
                return step()
            except torch.OutOfMemoryError:
                failures += 1
        raise AssertionError("no step succeeds")

    subject.step = until_it_succeeds  # type: ignore[method-assign]
    run = drive(subject, SHORT)
    assert failures > 5
    assert run.tokens == healthy.tokens
    assert run.rows == healthy.rows


def test_a_step_that_fails_after_its_tokens_were_fed_back_is_repeated_from_its_own(
    small: Model, small_runs: Mapping[str, Run], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = small_runs["step"]
    subject = engine(small, slots=2, features=eager(small), device=device)
    right, calls, failures = DeviceStep.run, iter(range(10**6)), 0

    def run(self: DeviceStep, operations: Operations) -> Tensor:
        nonlocal failures
        logits = right(self, operations)
        if next(calls) % 2 == 0:
            failures += 1
            raise torch.OutOfMemoryError("no memory for this test")
        return logits

    monkeypatch.setattr(DeviceStep, "run", run)
    step = subject.step

    def twice() -> Any:
        with contextlib.suppress(torch.OutOfMemoryError):
            return step()
        return step()

    subject.step = twice  # type: ignore[method-assign]
    same_bits(drive(subject, SHORT), healthy)
    assert failures > 4


def test_a_request_cancelled_while_it_decodes_gives_its_slot_to_the_next(
    small: Model, small_runs: Mapping[str, Run], device: str
) -> None:
    healthy = small_runs["step"]
    subject = engine(small, slots=2, features=eager(small), device=device)
    run = drive(subject, SHORT, cancels={3: [0]})
    assert run.done[0].status is Status.CANCELLED
    assert run.tokens[0] == healthy.tokens[0][: len(run.tokens[0])]
    assert {id: run.tokens[id] for id in (1, 2)} == {id: healthy.tokens[id] for id in (1, 2)}
    assert subject.decoder is not None
    assert not subject.decoder.states.pool.owners
    assert bool((subject.decoder.states.window_table == -1).all())


def test_a_request_whose_logits_are_not_finite_fails_alone(
    small: Model, small_runs: Mapping[str, Run], device: str
) -> None:
    healthy = small_runs["step"]
    subject = engine(small, slots=2, features=eager(small), device=device)
    for tokens, new in SHORT[0]:
        subject.submit(tokens, new)
    done: dict[int, Request] = {}
    for number in range(20):
        done |= {request.id: request for request in subject.step().done}
        if number == 3:
            for block in subject.caches.window_pool.held(0):
                subject.caches.layers[0].window.data[block] = 0xFF
    assert done[0].status is Status.FAILED
    assert done[0].error == f"logits after {done[0].length} tokens are not finite"
    assert done[1].output == healthy.tokens[1]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_double_up_to_the_slots() -> None:
    assert [default_sizes(slots) for slots in (1, 2, 3, 8, 9)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("buckets", [(), (0,), (1, 1), (2, 4)])
def test_batch_sizes_that_cannot_be_are_refused(buckets: tuple[int, ...], small: Model, device: str) -> None:
    with pytest.raises(ValueError, match=r"buckets: got .* expected different numbers from 1 to 2, the slots"):
        engine(small, slots=2, features=eager(small), device=device, buckets=buckets)
    with pytest.raises(ValueError, match=r"buckets: got .* expected None without device_step"):
        engine(small, device=device, buckets=buckets)
