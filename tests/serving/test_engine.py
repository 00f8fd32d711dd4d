"""The engine gives every request the tokens that it would get alone, and the same ones with every feature on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    ARRIVALS,
    LONG,
    Run,
    alone,
    assert_same,
    assert_within_budget,
    drive,
    engine,
    error_norms,
    largest_error,
    plain_attend,
    plain_run,
    prompt,
    slice_model,
    smooth_model,
)
from torch import Tensor

from dsv4ref.accuracy.score import load_model
from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED
from dsv4ref.config import V4_TINY
from dsv4ref.formats.scope import Scope
from dsv4ref.ref import checkpoint, checkpoint_writer
from dsv4ref.ref.model import Model
from dsv4ref.ref.numerics import DEFAULT
from dsv4ref.serving.features import Features, available

# --- joins, leaves, chunks: against the reference model, one request at a time ----------------------------------------


@pytest.fixture(scope="module")
def unrounded() -> Model:
    """Without bf16 roundings, which turn another order of sums into another choice of experts now and then."""
    return slice_model(numerics=replace(DEFAULT, round_bf16=False))


@pytest.fixture(scope="module")
def expected(unrounded: Model) -> Run:
    return alone(unrounded, ARRIVALS)


def assert_equal(run: Run, expected: Run) -> None:
    assert run.tokens == expected.tokens
    norms = error_norms(run, expected)
    assert max(norms.values()) < 1e-3, norms


def test_a_request_gets_in_company_what_the_reference_model_gives_it_alone(unrounded: Model, expected: Run) -> None:
    run = drive(engine(unrounded), ARRIVALS)
    assert_equal(run, expected)
    assert {id: len(tokens) for id, tokens in run.tokens.items()} == {0: 7, 1: 4, 2: 6, 3: 3}
    assert all(decoded <= 3 and prefilled <= 20 for decoded, prefilled in run.rows), run.rows
    assert any(decoded and prefilled for decoded, prefilled in run.rows), "decode and prompt rows in one step"


def test_entries_that_a_chunk_or_a_decoded_token_closes_are_the_references(unrounded: Model) -> None:
    assert_equal(drive(engine(unrounded), LONG), alone(unrounded, LONG))


@pytest.mark.parametrize(("chunk", "block_size", "page_tokens"), [(1, 8, 128), (7, 64, 256), (200, 24, 384)])
def test_chunks_and_block_sizes_change_no_token(
    chunk: int, block_size: int, page_tokens: int, unrounded: Model, expected: Run
) -> None:
    subject = engine(unrounded, chunk=chunk, block_size=block_size, page_tokens=page_tokens)
    assert_equal(drive(subject, {0: [request for requests in ARRIVALS.values() for request in requests]}), expected)


def test_blocks_that_others_left_full_of_poison_change_no_token(unrounded: Model, expected: Run) -> None:
    """A request reads no row that it has not written: what former owners leave in its blocks is NaN here."""
    subject = engine(unrounded)
    for _ in range(2):
        run = drive(subject, ARRIVALS)
        assert list(run.tokens.values()) == list(expected.tokens.values())
        for layer in subject.caches.layers:
            for cache in (layer.window, layer.compressed):
                if cache is not None:
                    cache.data.fill_(0xFF)
            if layer.index_keys is not None:
                layer.index_keys.fill_(torch.nan)


def test_a_stop_token_ends_a_request_and_others_go_on(unrounded: Model, expected: Run) -> None:
    subject = engine(unrounded)
    first, second = ARRIVALS[0]
    stop = expected.tokens[0][2]
    ended = subject.submit(first[0], first[1], stop=[stop])
    other = subject.submit(torch.tensor(second[0]), second[1])
    done = subject.run()
    assert done[ended].output == expected.tokens[0][: expected.tokens[0].index(stop) + 1]
    assert done[other].output == expected.tokens[1]


# --- features on against off ------------------------------------------------------------------------------------------


def test_every_feature_on_gives_the_tokens_of_every_feature_off(device: str) -> None:
    model = slice_model()
    features = available(model)
    assert [name for name, on in features.switches().items() if not on] == ["grouped_experts"]
    off = drive(engine(model, device=device), ARRIVALS)
    on = drive(engine(model, features=features, device=device), ARRIVALS)
    assert_same(on, off, 2 * largest_error(plain_run(model, ARRIVALS, device), off))
    assert on.rows == off.rows


def test_features_agree_behind_the_first_c128_entry(device: str) -> None:
    """All but the router's kernels, which the test above has: interpreted, they take longer than all the rest."""
    model = slice_model()
    off = drive(engine(model, device=device), LONG)
    on = drive(engine(model, features=available(model).without("routing_kernels"), device=device), LONG)
    assert on.tokens == off.tokens


def test_a_model_in_the_released_formats_has_every_feature_and_gets_the_same_tokens(
    tmp_path: Path, device: str
) -> None:
    """MXFP4 experts, FP8 linears, an MTP block that the engine leaves alone."""
    checkpoint_writer.write_random(tmp_path / "model", V4_TINY, seed=2)
    model = Model(V4_TINY, checkpoint.load(tmp_path / "model", V4_TINY))
    assert model.tensors["layers.0.ffn.experts.0.w1.weight"].dtype is torch.int8
    assert all(available(model).switches().values())
    features = available(model).without("grouped_experts")  # interpreted, 16 of them take too long
    arrivals = {0: [(prompt(V4_TINY, 9, 0), 3), (prompt(V4_TINY, 2, 1), 3)]}
    given: list[dict[str, Any]] = [{}, {"features": features, "buckets": (2,)}]
    runs = [drive(engine(model, slots=2, device=device, **changes), arrivals) for changes in given]
    assert runs[1].tokens == runs[0].tokens


@pytest.fixture(scope="module")
def smooth() -> Model:
    return smooth_model()


@pytest.fixture(scope="module")
def smooth_off(smooth: Model, device: str) -> Run:
    return drive(engine(smooth, device=device), ARRIVALS)


@pytest.fixture(scope="module")
def smooth_plain(smooth: Model, device: str) -> Run:
    return plain_run(smooth, ARRIVALS, device)


def test_logits_stay_within_twice_the_error_of_plain_bf16_attention(
    smooth: Model, smooth_off: Run, smooth_plain: Run, device: str
) -> None:
    features = available(smooth).without("routing_kernels")
    assert_within_budget(drive(engine(smooth, features=features, device=device), ARRIVALS), smooth_off, smooth_plain)


@pytest.mark.parametrize("bug", ["the oldest key is dropped", "requests change places", "no compressed entries"])
def test_the_budget_sees_an_attention_that_is_wrong(
    bug: str, smooth: Model, smooth_off: Run, smooth_plain: Run, device: str
) -> None:
    subject = engine(smooth, device=device)
    right = plain_attend(smooth)

    def wrong(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        if bug == "the oldest key is dropped":
            window.indices[window.indptr[:-1].long()] = -1
        if bug == "no compressed entries":
            compressed = None
        o = right(q, window, compressed, sink, out)
        return o.flip(0) if bug == "requests change places" else o

    subject.operations = replace(subject.operations, attend=wrong)
    with pytest.raises(AssertionError, match="plain bf16 attention"):
        assert_within_budget(drive(subject, ARRIVALS), smooth_off, smooth_plain)


# --- the trained model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions() -> Mapping[int, list[tuple[list[int], int]]]:
    """Two sequences up to the first question's key, so that the first token is its answer."""
    examples = TASK.examples(2, 77)
    return {0: [(row[: examples.tail + 2].tolist(), 8) for row in examples.tokens]}


def test_the_trained_model_answers_and_features_change_no_token(
    questions: Mapping[int, list[tuple[list[int], int]]], device: str
) -> None:
    trained, examples = load_model(), TASK.examples(2, 77)
    sizes = {"slots": 2, "max_length": 300, "chunk": 400, "device": device}
    off = drive(engine(trained, **sizes), questions)
    answers = [int(row[examples.tail + 2]) for row in examples.tokens]
    assert [off.tokens[id][0] for id in (0, 1)] == answers
    features = available(trained).without("routing_kernels")
    on = drive(engine(trained, features=features, **sizes), questions)
    assert on.tokens == off.tokens
    assert on.rows == off.rows


def test_the_trained_model_with_every_feature_that_it_has(device: str) -> None:
    trained = load_model()
    features = available(trained)
    assert features == replace(Features(**dict.fromkeys(features.switches(), True)), cached_projection=False).without(
        "grouped_experts"
    )
    arrivals = {0: [(prompt(V4_TINY_TRAINED, 21, 8), 6), (prompt(V4_TINY_TRAINED, 11, 9), 6)]}
    runs = [drive(engine(trained, features=f, device=device), arrivals) for f in (Features(), features)]
    assert runs[1].tokens == runs[0].tokens
