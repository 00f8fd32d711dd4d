"""Checkpoints: an engine goes on from one as the engine that it was taken from did, as often as it is asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import engine, in_mxfp4, prompt, slice_model, smooth_model

from dsv4ref.ref.model import Model
from dsv4ref.serving.blocks import BlockPool
from dsv4ref.serving.checkpoints import Checkpoint
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import Features, available
from dsv4ref.serving.gathered_experts import GatheredExperts
from dsv4ref.serving.resident import resident_model

STEPS = 4
LENGTHS = (30, 6)  # of prompts whose answers have no near tie


@pytest.fixture(scope="module")
def model() -> Model:
    """No choice that an error could flip."""
    return smooth_model((4, 128))


@pytest.fixture(scope="module")
def donor(model: Model, device: str) -> DecodeEngine:
    """An engine of the reference whose requests decode."""
    made = engine(model, device=device, chunk=40)
    for seed, length in enumerate(LENGTHS):
        made.submit(prompt(model.config, length, 5 + seed), 20)
    while made.step().prefilled:
        pass
    return made


@pytest.fixture(scope="module")
def start(donor: DecodeEngine) -> Checkpoint:
    return donor.checkpoint()


def answers(chosen: DecodeEngine, steps: int = STEPS) -> list[dict[int, int]]:
    return [dict(chosen.step().tokens) for _ in range(steps)]


def test_an_engine_repeats_itself_from_its_checkpoint(donor: DecodeEngine, start: Checkpoint) -> None:
    donor.restore(start)
    first = answers(donor)
    donor.restore(start)
    assert answers(donor) == first
    assert all(set(tokens) == {0, 1} for tokens in first)
    donor.check_blocks()


def test_a_device_step_goes_on_where_the_reference_stood(
    model: Model, donor: DecodeEngine, start: Checkpoint, device: str
) -> None:
    donor.restore(start)
    expected = answers(donor)
    features = available(model).without("captured_steps", "grouped_experts")
    other = engine(model, device=device, chunk=40, features=features, buckets=(2,))
    other.submit(prompt(model.config, 5, 9), 9)  # it is forgotten
    other.step()
    for _ in range(2):
        other.restore(start)
        assert answers(other) == expected
    other.check_blocks()
    assert other.caches.window_pool.owners == (0, 1)
    assert other.submit([1], 1) > max(expected[0]), "ids are not given twice"


def test_a_checkpoint_outlives_what_later_steps_write(donor: DecodeEngine, start: Checkpoint) -> None:
    before = [copy.clone() for copy in start.caches]
    donor.restore(start)
    answers(donor)
    assert all(
        torch.equal(copy.view(torch.uint8), kept.view(torch.uint8))
        for copy, kept in zip(start.caches, before, strict=True)
    )
    assert [len(request.output) for request in start.requests] == [2, 2]
    assert start.nbytes == sum(copy.nbytes for copy in before)


def test_a_checkpoint_needs_requests_whose_prompts_are_computed(model: Model, device: str) -> None:
    fresh = engine(model, device=device, chunk=40)
    with pytest.raises(RuntimeError, match=r"checkpoint: prompts of requests \[\] are not computed and 0 wait"):
        fresh.checkpoint()
    fresh.submit(prompt(model.config, 3, 1), 4)
    with pytest.raises(RuntimeError, match="and 1 wait, expected requests that run and decode"):
        fresh.checkpoint()


@pytest.mark.parametrize("changes", [{"slots": 2}, {"max_length": 200}, {"chunk": 20}])
def test_another_size_is_refused_and_changes_nothing(
    model: Model, start: Checkpoint, device: str, changes: dict[str, Any]
) -> None:
    other = engine(model, **{"device": device, "chunk": 40, **changes})
    id = other.submit([1, 2], 3)
    with pytest.raises(ValueError, match="checkpoint: its caches are CacheSizes"):
        other.restore(start)
    assert other.waiting == (id,)


def test_another_model_is_refused(start: Checkpoint, device: str) -> None:
    with pytest.raises(ValueError, match="checkpoint: it is of slice, expected this engine's slice"):
        engine(slice_model((4,)), device=device, chunk=40).restore(start)


def test_a_pool_takes_an_assignment_whole_or_not_at_all() -> None:
    pool = BlockPool("window", 4)
    pool.take(7, 2)
    pool.assign({1: (3, 0)})
    pool.check()
    assert (pool.held(1), pool.held(7), pool.take(2, 2)) == ((3, 0), (), (1, 2))
    for held in ({1: (4,)}, {1: (0,), 2: (0,)}):
        with pytest.raises(ValueError, match=r"held: got .*, expected blocks of window below 4, each once"):
            pool.assign(held)
    assert pool.owners == (1, 2)


# --- what engines of one model share ---


def test_engines_of_one_model_share_what_was_made_of_its_tensors_until_one_changes(device: str) -> None:
    model = in_mxfp4(slice_model((4,)))
    first, second = resident_model(model, device), resident_model(model, device)
    assert first is second
    stacks = [GatheredExperts(model, device) for _ in range(2)]
    assert stacks[0]._layers[0]["w1"] is stacks[1]._layers[0]["w1"]
    model.tensors["layers.0.attn.wq_a.weight"].mul_(2)
    model.tensors["layers.0.ffn.experts.3.w1.weight"].add_(1)
    third = resident_model(model, device)
    assert third is not first
    name = "layers.0.attn.wq_a.weight"
    assert torch.equal(third.tensors[name].cpu(), model.tensors[name].float())
    changed = GatheredExperts(model, device)
    assert changed._layers[0]["w1"] is not stacks[0]._layers[0]["w1"]
    assert changed._layers[0]["w2"] is stacks[0]._layers[0]["w2"]


def test_nothing_is_shared_with_engines_that_are_gone(device: str) -> None:
    from dsv4ref.serving import resident

    model = slice_model((0,))
    before = len(resident._RESIDENT)
    made = engine(model, device=device, features=Features(resident_weights=True))
    assert len(resident._RESIDENT) == before + 1
    del made
    assert len(resident._RESIDENT) == before


def test_steps_that_nobody_looked_at_make_the_next_one_load_its_rows(
    model: Model, start: Checkpoint, device: str
) -> None:
    features = available(model).without("captured_steps", "grouped_experts")
    made = engine(model, device=device, chunk=40, features=features, buckets=(2,))
    made.restore(start)
    expected = answers(made)
    made.restore(start)
    first = answers(made, 1)
    decoder = made.decoder
    assert decoder is not None
    for _ in range(2):
        decoder.launch(2, made.operations)
    tokens = decoder.steps[2].answers.tolist()
    assert tokens == list(expected[2].values()), "a launch leaves the next one's inputs behind"
    loads = decoder.loads
    made.restore(start)
    assert [*answers(made)] == expected
    assert first == expected[:1]
    assert decoder.loads == loads + 1


def test_a_checkpoint_of_a_device_step_is_where_the_reference_goes_on(model: Model, device: str) -> None:
    features = available(model).without("captured_steps", "grouped_experts")
    taken = engine(model, device=device, features=features, buckets=(2,))
    for seed, length in enumerate(LENGTHS):
        taken.submit(prompt(model.config, length, 5 + seed), 20)
    while taken.step().prefilled:
        pass
    taken.step()
    assert set(taken._states.values()) == {None}, "the device has them"
    handed = taken.checkpoint()
    expected = answers(taken)
    reference = engine(model, device=device)
    reference.restore(handed)
    assert answers(reference) == expected
    taken.restore(handed)
    assert answers(taken) == expected


def test_prompts_that_go_through_device_steps_leave_what_the_reference_leaves(
    model: Model, donor: DecodeEngine, start: Checkpoint, device: str
) -> None:
    features = available(model).without("captured_steps", "grouped_experts")
    rows = engine(model, device=device, chunk=40, features=features, buckets=(2,), prompt_rows=True)
    for seed, length in enumerate(LENGTHS):
        rows.submit(prompt(model.config, length, 5 + seed), 40)
    given: dict[int, list[int]] = {0: [], 1: []}
    counts = []
    while any(len(tokens) < STEPS for tokens in given.values()):
        result = rows.step()
        counts.append((result.prefilled, result.decoded))
        for id, token in result.tokens.items():
            given[id].append(token)
    short, long = sorted(LENGTHS)
    assert counts[: long + 1] == [(2, 0)] * short + [(1, 1)] * (long - short) + [(0, 2)]
    donor.restore(start)
    behind = {request.id: list(request.output) for request in start.requests}
    for step in answers(donor):
        for id, token in step.items():
            behind[id].append(token)
    assert {id: tokens[:STEPS] for id, tokens in given.items()} == {id: t[:STEPS] for id, t in behind.items()}
    with pytest.raises(ValueError, match="prompt_rows: got True, expected False without device_step"):
        engine(model, device=device, prompt_rows=True)


def test_a_state_is_handed_back_as_it_was_taken_over(model: Model, start: Checkpoint, device: str) -> None:
    other = engine(model, device=device, chunk=40, features=available(model).without("captured_steps"), buckets=(2,))
    other.restore(start)
    assert other.decoder is not None
    for id, state in other._states.items():
        assert state is not None
        other.decoder.states.join(id, state)
        handed = other.decoder.states.hand_back(id, state.position)
        assert handed.position == state.position
        for number, (got, want) in enumerate(zip(handed.layers, state.layers, strict=True)):
            assert (got.window, got.compressed, got.index_keys) == (want.window, want.compressed, want.index_keys)
            for name in ("compressor", "index_compressor"):
                mine, theirs = getattr(got, name), getattr(want, name)
                assert (mine is None) == (theirs is None), (number, name)
                for field, value in vars(theirs).items() if theirs is not None else ():
                    given = getattr(mine, field)
                    where = (number, name, field)
                    if isinstance(value, torch.Tensor):
                        torch.testing.assert_close(given, value.to(given), rtol=0, atol=0, msg=str(where))
                    else:
                        assert given == value, where
