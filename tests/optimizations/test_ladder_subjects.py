"""Engines of a ladder: all from one checkpoint, gated on the rows that are timed, and what a soak and a count say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref.evidence import timing
from dsv4ref.optimizations import ladder_subjects as subjects
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.ladder_inside import captures_apart, look_inside
from dsv4ref.optimizations.ladder_metadata import MetadataHost, metadata_rows
from dsv4ref.optimizations.ladder_soak import Soak, run_soak
from dsv4ref.optimizations.ladder_workload import SoakPlan
from dsv4ref.ref.model import Model
from dsv4ref.serving.checkpoints import Checkpoint
from dsv4ref.serving.device_decoder import DeviceDecoder
from dsv4ref.serving.engine import DecodeEngine

PRESET = replace(workload.get_preset("tiny"), window=3, output=8)
CHEAP = frozenset(("shrink_tail_fill", "cached_projection"))
DEVICE_STEP = frozenset(("sparse_decode", "routing_kernels", "resident_weights", "device_step"))


@pytest.fixture(scope="module")
def model(device: str) -> Model:
    return workload.slice_model(PRESET.config, 0, device)


@pytest.fixture(scope="module")
def start(model: Model, device: str) -> Checkpoint:
    asked = workload.prompts(PRESET.config, PRESET.requests, PRESET.prompt, 1)
    return subjects.computed_prompts(model, PRESET, asked, device)


# --- subjects ---


def test_every_window_begins_where_the_prompts_ended(model: Model, start: Checkpoint, device: str) -> None:
    subject = subjects.EngineSubject(model, PRESET, CHEAP, start, device)
    stood = max(request.length for request in start.requests)
    for _ in range(2):
        seconds = subject.window(3)
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert subject.context == stood + 3


def test_a_device_step_takes_requests_over_before_the_clock_starts(
    model: Model, start: Checkpoint, device: str
) -> None:
    subject = subjects.EngineSubject(model, PRESET, DEVICE_STEP, start, device)
    decoder = subject._engine.decoder
    assert decoder is not None
    subject.rewind()
    loads = decoder.loads
    subject.step()
    assert decoder.loads == loads, "the timed step finds its rows in place"
    assert subject.room == PRESET.output - 2 - 2, "two tokens are there, one step is not timed, one must be left"


def test_a_replayed_step_is_captured_anew_and_others_stay_as_they_are(
    model: Model, start: Checkpoint, device: str
) -> None:
    subject = subjects.EngineSubject(model, PRESET, DEVICE_STEP | {"captured_steps"}, start, device)
    decoder = subject._engine.decoder
    assert decoder is not None
    graphs, tokens = decoder._graphs, subject.generated.tokens
    subject.renew()
    assert decoder._graphs is not graphs
    assert subjects._answers(subject._engine, start, PRESET.warmup)[0].tokens == tokens
    eager = subjects.EngineSubject(model, PRESET, DEVICE_STEP, start, device)
    eager.renew()
    assert not eager.replayed


def test_a_window_that_runs_into_the_end_is_refused(model: Model, start: Checkpoint, device: str) -> None:
    subject = subjects.EngineSubject(model, PRESET, frozenset(), start, device)
    subject.rewind()
    for _ in range(subject.room):
        subject.step()
    with pytest.raises(RuntimeError, match="step: decoded 2 rows, prefilled 0, 2 left; expected 2 decode rows"):
        subject.step()


@pytest.mark.parametrize(
    ("step_s", "steps"), [(0.001, 8), (0.125, 8), (0.126, 4), (0.3, 2), (0.7, 2), (1.4, 2), (60.0, 2)]
)
def test_a_long_step_is_sampled_fewer_times_and_never_once(step_s: float, steps: int) -> None:
    assert subjects.steps_for(step_s, workload.get_preset("h200-short")) == steps


def test_the_oracle_refuses_another_token_and_an_answer_that_ends_early(
    model: Model, start: Checkpoint, device: str
) -> None:
    oracle = subjects.timed_oracle(model, PRESET, start, device)
    assert oracle.budget > 0
    assert oracle.reason(oracle.generated) is None
    wrong = {id: [*tokens[:-1], (tokens[-1] + 1) % 96] for id, tokens in oracle.generated.tokens.items()}
    found = workload.Generated(wrong, oracle.generated.logits)
    assert oracle.reason(found) == "2 of 2 requests left the tokens of everything off"
    count, gap = oracle.excused(found)
    assert (count, oracle.excused(oracle.generated)) == (2, (0, 0.0))
    apart = workload.gaps(found, oracle.generated)
    assert gap == max(apart.values()) > min(apart.values()) > 2 * oracle.budget
    short = workload.Generated({id: tokens[:-1] for id, tokens in oracle.generated.tokens.items()})
    assert oracle.reason(short) == "2 of 2 requests left the tokens of everything off"


def test_steps_are_counted_from_the_same_place_on_every_rung(
    model: Model, start: Checkpoint, device: str, tmp_path: Path
) -> None:
    chosen = {str(n): subjects.EngineSubject(model, PRESET, CHEAP, start, device) for n in range(2)}
    chosen["1"].step()  # it stands elsewhere
    rows = [{"rung": name, "tpot_ms": 1.0} for name in chosen]
    found, traces = look_inside(chosen, tmp_path, rows, rehearsal=True)
    assert found[0]["launches"] == found[1]["launches"] > 0
    assert [row["rung"] for row in traces] == ["0", "1"]
    assert all((tmp_path / row["file"]).stat().st_size and row["operators"] for row in traces)


class Drawn:
    """A replayed engine on which every capture has a speed of its own."""

    def __init__(self, draws: list[float], log: list[str], name: str) -> None:
        self.draws, self.log, self.name, self.speed = draws, log, name, 0.0

    def renew(self) -> None:
        self.speed = self.draws.pop(0)
        self.log.append("new")

    def window(self, steps: int) -> tuple[float, ...]:
        self.log.append(self.name)
        return (self.speed,) * steps


def test_a_pair_of_captures_is_timed_in_turns_and_not_captured_again_meanwhile() -> None:
    log: list[str] = []
    draws = [1.0, 1.01, 0.99, 1.02, 1.0, 1.03]
    rows = captures_apart(Drawn(draws.copy(), log, "a"), Drawn([1.0] * len(draws), log, "b"))  # type: ignore[arg-type]
    assert [row["ratio"] for row in rows] == pytest.approx(draws)
    assert all(row["low"] == row["high"] == row["ratio"] for row in rows), "within a pair nothing varies"
    assert [row["pair"] for row in rows] == list(range(len(draws)))
    assert {row["windows"] for row in rows} == {timing.MIN_ROUNDS}
    of_pair = 2 + 2 * timing.MIN_ROUNDS
    assert len(log) == of_pair * len(draws)
    for begin in range(0, len(log), of_pair):
        assert log[begin : begin + 2] == ["new", "new"]
        turns = log[begin + 2 : begin + of_pair]
        assert sorted(turns[:2]) == sorted(turns[2:4]) == ["a", "b"]
        assert turns[0] != turns[2], "neither always runs first"


# --- joins and leaves ---


def test_nothing_grows_while_requests_join_and_leave(model: Model, device: str) -> None:
    plan = SoakPlan(30, 10, 3, ((3, 4), (26, 3), (1, 5)))
    found = run_soak(model, CHEAP, plan, device=device, seed=0)
    assert found.reason is None
    assert found.growth == 0
    assert found.finished > 10
    assert found.cancelled > 1
    assert 0 < min(found.held) <= max(found.held) <= found.blocks
    assert found.idle[0] < found.busy[0]
    assert found.lost == 0


def test_a_request_that_is_not_let_go_of_is_seen(model: Model, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = DecodeEngine._leave

    def leave(self: DecodeEngine, request: Any, *given: Any) -> None:
        kept.append(torch.zeros(1000, device=device))
        original(self, request, *given)

    monkeypatch.setattr(DecodeEngine, "_leave", leave)
    found = run_soak(model, frozenset(), SoakPlan(8, 3, 2, ((3, 2), (2, 3))), device=device, seed=0)
    assert found.growth >= 4000
    assert found.reason == f"an empty engine grew by {found.growth} bytes between steps 3 and 8"


def test_blocks_that_do_not_come_back_are_a_reason() -> None:
    found = Soak(9, 3, 2, 1, "live tensors", (10, 20), (10, 10), None, 12, (3, 6), 2)
    assert found.reason == "2 of 12 blocks did not come back"
    with pytest.raises(ValueError, match="mark: got 8, expected a step before the last one, 8"):
        SoakPlan(8, 8, 2, ((1, 1),))


# --- metadata ---


def test_a_steady_step_launches_nothing_and_copies_nothing(model: Model, device: str) -> None:
    rows = {row["step"]: row for row in metadata_rows(model, DEVICE_STEP, (3,), device=device, repeats=10)}
    assert list(rows) == ["steady", "another row", "another request"]
    assert (rows["steady"]["launches"], rows["steady"]["loads"]) == (0, 0)
    for kind in ("another row", "another request"):
        assert rows[kind]["launches"] > 0
        assert rows[kind]["loads"] == 1
    for row in rows.values():
        low, high = row["host_us_ci"]
        assert 0 < low <= row["host_us"] <= high
    with pytest.raises(ValueError, match="repeats: got 9, expected at least 10"):
        metadata_rows(model, DEVICE_STEP, (3,), device=device, repeats=9)


def forgetting(original: Callable[..., None]) -> Callable[..., None]:
    return lambda self, rows, answers: None


def test_a_decoder_that_forgets_its_rows_is_seen(model: Model, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceDecoder, "remember", forgetting(DeviceDecoder.remember))
    host = MetadataHost(model, DEVICE_STEP, 2, device)
    before = host.loads
    host.steady()
    assert host.loads == before + 1
