"""Captured decode steps: a graph recorded over padding gives what the same step gives uncaptured, whoever comes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engine_runs import (
    Arrivals,
    Run,
    assert_within_budget,
    drive,
    engine,
    in_mxfp4,
    plain_run,
    prompt,
    same_bits,
    slice_model,
    smooth_model,
)
from torch import Tensor

from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.ref.model import Model
from dsv4ref.serving import graphs
from dsv4ref.serving.decode_lists import DecodeLists
from dsv4ref.serving.device_decoder import DeviceDecoder
from dsv4ref.serving.device_step import DeviceStep, Rows
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import Features, available

CONFIG = slice_model((0,)).config
# More requests than two slots, of all places in a group of four.
SHORT: Arrivals = {0: [(prompt(CONFIG, 3, 2), 5), (prompt(CONFIG, 9, 3), 3)], 1: [(prompt(CONFIG, 6, 4), 3)]}
# A replay closes the first C128 entry, others the entries of groups of four.
BOUNDARIES: Arrivals = {0: [(prompt(CONFIG, 126, 0), 4), (prompt(CONFIG, 2, 1), 4)]}


@pytest.fixture(scope="module")
def model() -> Model:
    """One C4 layer, and no choice that an error could flip."""
    return smooth_model((4,))


def captured(model: Model, device: str, **changes: Any) -> DecodeEngine:
    return engine(model, **{"slots": 2, "buckets": (2,), "features": available(model), "device": device, **changes})


def eager(model: Model, device: str, **changes: Any) -> DecodeEngine:
    return captured(model, device, features=available(model).without("captured_steps"), **changes)


@pytest.fixture(scope="module")
def expected(model: Model, device: str) -> Run:
    return drive(eager(model, device), SHORT)


def decoder(subject: DecodeEngine) -> DeviceDecoder:
    assert subject.decoder is not None
    return subject.decoder


# --- a replay is the step ---------------------------------------------------------------------------------------------


def test_replays_give_the_bits_of_uncaptured_steps(model: Model, expected: Run, device: str) -> None:
    subject = captured(model, device)
    assert decoder(subject).captured == (2,)
    gc.collect()  # memory that only the graph still reads would go now
    same_bits(drive(subject, SHORT), expected)


def test_replays_close_entries_of_4_and_of_128_tokens(device: str) -> None:
    model = smooth_model((4, 128))
    same_bits(drive(captured(model, device), BOUNDARIES), drive(eager(model, device), BOUNDARIES))


def test_grouped_experts_are_replayed_and_stay_within_the_budget(device: str) -> None:
    """In all rows; the plain form weighs behind w2 as the GEMM does, which is a rounding of its own."""
    model = in_mxfp4(smooth_model((0,)))
    arrivals = {0: [(prompt(CONFIG, 3, 0), 3), (prompt(CONFIG, 2, 1), 3)]}
    weighs_late = replace(model, numerics=replace(model.numerics, weight_before_w2=False))
    off = drive(engine(model, slots=2, device=device), arrivals)
    runs = [drive(make(model, device), arrivals) for make in (captured, eager)]
    same_bits(*runs)
    assert_within_budget(runs[0], off, plain_run(weighs_late, arrivals, device))


def test_a_batch_too_large_for_the_captured_sizes_runs_uncaptured(model: Model, expected: Run, device: str) -> None:
    subject = captured(model, device, buckets=(1,))
    assert (decoder(subject).captured, list(decoder(subject).steps)) == ((1,), [1, 2])
    replayed: list[int] = []

    def counted(replay: Callable[[], None]) -> None:
        replayed.append(1)
        replay()

    on_replay(subject, counted)
    run = drive(subject, SHORT)
    assert run.tokens == expected.tokens
    assert 0 < len(replayed) < sum(decoded > 0 for decoded, _ in run.rows)


def test_any_step_may_be_the_one_that_is_captured(model: Model, device: str) -> None:
    """Captured over two requests at positions 5 and 11, replayed for others: of other lengths, slots and number."""
    twins = [eager(model, device) for _ in range(2)]
    for subject in twins:
        for tokens, new in SHORT[0]:
            subject.submit(tokens, new)
        for _ in range(3):
            subject.step()
    held = live(twins[0])
    positions, tokens = [r.computed for r in held.values()], [r.output[-1] for r in held.values()]
    rows = decoder(twins[0]).rows(list(held), positions, tokens)
    turned = Rows(rows.slots[::-1], positions[::-1], tokens[::-1])
    first = Rows(rows.slots[:1], positions[:1], tokens[:1])
    steps = [decoder(subject).steps[2] for subject in twins]
    operations = [subject.operations for subject in twins]
    with torch.no_grad():
        steps[0].load(rows)
        # An emulated capture runs the step, a real one only records it: what is compared is a replay's.
        graph = graphs.capture(partial(steps[0].run, operations[0]), device=device, warmup=0)
        for other in (rows, turned, first, rows.followed_by([7] * len(rows)), Rows()):
            for step in steps:
                step.load(other)
            graph.replay()
            want = steps[1].run(operations[1])
            assert torch.equal(graph.outputs[: len(other)], want[: len(other)]), other
            assert torch.equal(steps[0].answers[: len(other)], steps[1].answers[: len(other)])


def live(subject: DecodeEngine) -> dict[int, Any]:
    return {request.id: request for request in subject._queue.running}


# --- planted ----------------------------------------------------------------------------------------------------------


def freeze(patch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """Under capture a method reads positions that the host copied then, as it would read a number of its own."""
    right: Callable[..., Any] = getattr(kind, name)

    def wrong(self: Any, *given: Any) -> Any:
        lists = self if isinstance(self, DecodeLists) else self.lists
        live_step, frozen = lists.step, torch.empty_like(lists.step.positions)
        if graphs.is_capturing():
            frozen.fill_(2)
            lists.step = replace(live_step, positions=frozen)
        try:
            return right(self, *given)
        finally:
            lists.step = live_step

    patch.setattr(kind, name, wrong)


@pytest.mark.parametrize(
    ("kind", "name"), [(DecodeLists, "list_swa"), (DecodeLists, "pack_c4"), (DeviceStep, "_select")]
)
def test_a_length_frozen_at_capture_is_seen(
    kind: type, name: str, model: Model, expected: Run, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(monkeypatch, kind, name)
    with pytest.raises((AssertionError, KeyError)):
        same_bits(drive(captured(model, device), SHORT), expected)


def test_rows_of_who_left_are_seen_if_they_are_not_reloaded(
    model: Model, expected: Run, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    right = DeviceStep.load

    def once(self: DeviceStep, rows: Any) -> None:
        if self.rows not in loaded or not rows:
            right(self, rows)
        if rows:
            loaded.append(self.rows)

    monkeypatch.setattr(DeviceStep, "load", once)
    with pytest.raises((AssertionError, KeyError)):
        same_bits(drive(captured(model, device), SHORT), expected)


def test_an_operation_that_reads_the_device_cannot_be_captured(model: Model, device: str) -> None:
    subject = eager(model, device)
    route = subject.operations.route

    def reads(*given: Any) -> Any:
        weights, experts = route(*given)
        return (weights, experts) if int(experts.max()) >= 0 else (weights, experts + 1)

    with pytest.raises(RuntimeError, match="captur"):
        decoder(subject).capture(replace(subject.operations, route=reads))
    assert decoder(subject).captured == ()
    assert drive(subject, {0: SHORT[0]}).tokens.keys() == {0, 1}, "still there, uncaptured"


# --- the host's part --------------------------------------------------------------------------------------------------


def on_replay(subject: DecodeEngine, act: Callable[[Callable[[], None]], None]) -> None:
    """Call ``act`` with every graph's replay in its place."""
    captured_graphs = decoder(subject)._graphs
    assert captured_graphs is not None
    for graph in captured_graphs._graphs.values():
        graph.replay = partial(act, graph.replay)  # type: ignore[method-assign]


def running(model: Model, device: str, **changes: Any) -> DecodeEngine:
    """Two requests that have decoded for two steps and go on for long."""
    subject = captured(model, device, **changes)
    for tokens, _ in SHORT[0]:
        subject.submit(tokens, 100)
    for _ in range(4):
        subject.step()
    return subject


def test_a_steady_step_loads_nothing_and_allocates_nothing_beside_the_replay(model: Model, device: str) -> None:
    subject = running(model, device, keep_logits=False)
    loads = decoder(subject).loads
    step = decoder(subject).steps[2]

    def instead(replay: Callable[[], None]) -> None:
        step.lists.step.positions.add_(1)  # what a replay leaves behind, without its work

    on_replay(subject, instead)
    counted = count_allocations(subject.step, warmup=2, method="aten-dispatch")
    # The answers are read: on a GPU by copies, on the CPU in place.
    assert [operator for operator in counted.operators if device == "cpu" or "copy" not in operator] == []
    assert decoder(subject).loads == loads


def test_rows_are_loaded_when_somebody_joins_or_leaves_and_else_fed_back(
    model: Model, expected: Run, device: str
) -> None:
    subject = captured(model, device)
    batches: list[list[tuple[int, int]]] = [[]]
    right = decoder(subject).decode

    def decode(rows: Any, operations: Any) -> Any:
        batches.append(list(zip(rows.slots, rows.positions, strict=True)))
        return right(rows, operations)

    decoder(subject).decode = decode  # type: ignore[method-assign]
    run = drive(subject, SHORT)
    assert run.tokens == expected.tokens
    fed_back = [[(slot, position + 1) for slot, position in rows] for rows in batches]
    changes = sum(rows != before for rows, before in zip(batches[1:], fed_back, strict=False))
    assert decoder(subject).loads == changes
    assert 2 <= changes < len(batches) - 1


def test_a_replay_that_fails_leaves_requests_as_they_were(model: Model, expected: Run, device: str) -> None:
    subject, failures = captured(model, device), iter(range(10**6))

    def fails(replay: Callable[[], None]) -> None:
        replay()  # tokens are fed back
        if next(failures) % 2:
            raise torch.OutOfMemoryError("no memory for this test")

    on_replay(subject, fails)
    step = subject.step

    def until_it_succeeds() -> Any:
        while True:
            before = {id: (request.computed, tuple(request.output)) for id, request in live(subject).items()}
            try:
                return step()
            except torch.OutOfMemoryError:
                after = {id: (request.computed, tuple(request.output)) for id, request in live(subject).items()}
                assert {id: after[id] for id in before} == before

    subject.step = until_it_succeeds  # type: ignore[method-assign]
    same_bits(drive(subject, SHORT), expected)
    assert next(failures) > 6


# --- memory -----------------------------------------------------------------------------------------------------------


def test_joins_and_leaves_move_no_buffer_and_leave_nothing_behind(device: str, rng: torch.Generator) -> None:
    """Over two hundred steps; one replay in ten does its work, since interpreted they take most of a step."""
    model = smooth_model((0,))
    subject = captured(model, device, max_length=40)
    numbers = iter(range(10**9))

    def sometimes(replay: Callable[[], None]) -> None:
        if next(numbers) % 10 == 0:
            replay()
        else:
            step = decoder(subject).steps[2]
            step.lists.step.positions.add_((step.lists.step.positions >= 0).int())
            step.tokens.copy_(step.answers.clamp_(min=0))

    on_replay(subject, sometimes)

    def churn(steps: int) -> None:
        for _ in range(steps):
            if int(torch.randint(0, 3, (1,), generator=rng)) == 0 and len(subject.waiting) < 2:
                length, new = (int(torch.randint(1, 12, (1,), generator=rng)) for _ in range(2))
                subject.submit(prompt(CONFIG, length, length), new)
            if subject.running and not int(torch.randint(0, 12, (1,), generator=rng)):
                subject.cancel(subject.running[0])
            subject.step()
            subject.check_blocks()
        subject.run()

    def held() -> tuple[int, int, Mapping[str, int]]:
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return tensors, decoder(subject).nbytes, decoder(subject).steps[2].addresses()

    churn(40)
    before = held()
    churn(170)
    assert held() == before
    assert not subject._states
    assert not decoder(subject).states.pool.owners
    subject.check_blocks()


def test_every_batch_size_has_buffers_and_a_graph_of_its_own(model: Model, device: str) -> None:
    subject = captured(model, device, buckets=(1, 2))
    one, two = (decoder(subject).steps[size].addresses() for size in (1, 2))
    shared = {name for name in one if one[name] == two[name]}
    assert shared == {"swa_table", "pages"}
    assert decoder(subject).captured == (1, 2)
    assert decoder(subject).nbytes >= sum(step.nbytes for step in decoder(subject).steps.values())


def test_without_the_switch_nothing_is_captured(model: Model, device: str) -> None:
    assert decoder(eager(model, device)).captured == ()
    assert engine(model, device=device).decoder is None
    assert Features().captured_steps is False
