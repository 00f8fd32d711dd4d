"""Journal, rounds and rows of a ladder, on subjects whose times are given."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4ref.optimizations import ladder_runner as runner
from dsv4ref.optimizations.ladder_runner import Journal, MixedRunError, Window

HEADER = {"benchmark": {"requests": 2, "output": 8}, "sources": {"module": "0" * 64}}
NAMES = ("off", "off again", "on")


@dataclass
class Subject:
    """Takes a given time per step; notes when it ran."""

    name: str
    log: list[str]
    room: int = 100
    seconds: float = 1.0
    context: int = field(default=0)

    def renew(self) -> None:
        """Nothing about it is left to chance."""

    def window(self, steps: int) -> tuple[float, ...]:
        self.log.append(self.name)
        self.room -= steps
        self.context += steps
        return (self.seconds,) * steps


def opener(log: list[str], room: int = 100, opened: list[int] | None = None) -> Callable[[], Mapping[str, Subject]]:
    def open_pass() -> Mapping[str, Subject]:
        if opened is not None:
            opened.append(len(log))
        return {name: Subject(name, log, room) for name in NAMES}

    return open_pass


# --- the journal ---


def test_a_window_is_on_disk_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ladder.jsonl"
    window = Window(0, "off", 5, (0.25, 0.5))
    Journal(path, HEADER).add(window)
    assert Journal(path, HEADER).windows == [window]
    header, line = (json.loads(line) for line in path.read_text().splitlines())
    assert header["kind"] == "ladder"
    assert line["seconds"] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": {"module": "1" * 64}}, r"another sources.module: it has \"0+\.\.\., this run has \"1+\.\.\."),
        ({"benchmark": {"requests": 4, "output": 8}}, r"another benchmark.requests: it has 2, this run has 4"),
        (
            {"benchmark": {"requests": 4, "output": 9}},
            r"requests: it has 2, this run has 4 \(and 1 more: benchmark.out",
        ),
    ],
)
def test_a_run_of_something_else_is_refused_and_adds_nothing(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ladder.jsonl"
    Journal(path, HEADER).add(Window(0, "off", 5, (1.0,)))
    before = path.read_bytes()
    with pytest.raises(MixedRunError, match=message):
        Journal(path, HEADER | changed)
    assert path.read_bytes() == before


def test_a_line_that_a_kill_cut_off_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ladder.jsonl"
    journal = Journal(path, HEADER)
    for name in NAMES:
        journal.add(Window(0, name, 5, (1.0,)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = Journal(path, HEADER)
    assert [window.name for window in again.windows] == list(NAMES[:2])
    assert again.dropped > 0
    again.add(Window(0, NAMES[2], 5, (1.0,)))
    assert path.read_bytes() == whole


def test_a_file_that_is_no_journal_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "ladder.jsonl"
    Journal(path, HEADER)
    with path.open("a") as file:
        file.write('{"round": 0}\n')
    with pytest.raises(ValueError, match=r"ladder.jsonl:2: expected round, name, context, seconds"):
        Journal(path, HEADER)
    path.write_text("times\n")
    with pytest.raises(ValueError, match=r"ladder.jsonl:1: expected one JSON object"):
        Journal(path, HEADER)


# --- rounds ---


def test_every_round_runs_every_subject_once_and_the_order_moves(tmp_path: Path) -> None:
    log: list[str] = []
    journal = Journal(tmp_path / "j", HEADER)
    runner.interleave(opener(log), journal, rounds=6, steps=2)
    rounds = [log[n : n + 3] for n in range(0, len(log), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == sorted(NAMES) for names in rounds)
    assert {names[0] for names in rounds} == set(NAMES), "no subject always runs first"


def test_what_is_drawn_by_chance_is_drawn_anew_before_each_round_and_not_within_it(tmp_path: Path) -> None:
    log: list[str] = []

    class Drawing(Subject):
        def renew(self) -> None:
            log.append(f"new {self.name}")

    rare = {"off": 2, "off again": 2, "on": 4}
    subjects = {name: Drawing(name, log) for name in NAMES}
    runner.interleave(lambda: subjects, Journal(tmp_path / "j", HEADER), rounds=rare, steps=1)
    rounds: list[list[str]] = []
    for line in log:
        if line.startswith("new ") and not (rounds and rounds[-1][-1].startswith("new ")):
            rounds.append([])
        rounds[-1].append(line)
    assert len(rounds) == 4
    for lines in rounds:
        half = len(lines) // 2
        assert sorted(lines[:half]) == sorted(f"new {name}" for name in lines[half:])


def test_worn_out_subjects_are_replaced_by_fresh_ones(tmp_path: Path) -> None:
    log: list[str] = []
    opened: list[int] = []
    journal = Journal(tmp_path / "j", HEADER)
    runner.interleave(opener(log, room=5, opened=opened), journal, rounds=5, steps=2)
    assert opened == [0, 6, 12]
    assert [window.context for window in journal.windows if window.name == "on"] == [0, 2, 0, 2, 0]


def test_subjects_without_room_for_a_window_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="steps: a fresh subject has no room for a window of 6"):
        runner.interleave(opener([], room=5), Journal(tmp_path / "j", HEADER), rounds=1, steps=6)


def test_a_killed_run_goes_on_and_the_round_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    log: list[str] = []

    class KilledError(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if done == 7:  # in the middle of the third round
            raise KilledError

    path = tmp_path / "j"
    with pytest.raises(KilledError):
        runner.interleave(opener(log), Journal(path, HEADER), rounds=5, steps=2, progress=progress)
    assert len(log) == 7
    journal = Journal(path, HEADER)
    assert journal.rounds(NAMES) == 2
    runner.interleave(opener(log), journal, rounds=5, steps=2)
    assert len(log) == 7 + 3 * 3
    found = runner.windows_by_round(Journal(path, HEADER).windows, NAMES)
    assert list(found) == [0, 1, 3, 4, 5]
    assert all(set(windows) == set(NAMES) for windows in found.values())


def test_a_run_that_is_complete_measures_nothing_more_and_more_repeats_are_added(tmp_path: Path) -> None:
    log: list[str] = []
    path = tmp_path / "j"
    runner.interleave(opener(log), Journal(path, HEADER), rounds=2, steps=2)
    runner.interleave(opener(log), Journal(path, HEADER), rounds=2, steps=2)
    assert len(log) == 6
    runner.interleave(opener(log), Journal(path, HEADER), rounds=3, steps=2)
    assert len(log) == 9


WANTED = {"off": 7, "off again": 7, "on": 3}


def test_subjects_of_which_fewer_rounds_are_wanted_run_in_their_share_of_them_and_in_the_first(tmp_path: Path) -> None:
    log: list[str] = []
    journal = Journal(tmp_path / "j", HEADER)
    assert runner.interleave(opener(log), journal, rounds=WANTED, steps=2)
    found = runner.windows_by_round(journal.windows, ())
    assert [number for number, windows in found.items() if "on" in windows] == [0, 3, 5]
    assert len(found) == 7
    assert all({"off", "off again"} <= set(windows) for windows in found.values())
    more = {"off": 2, "off again": 12, "on": 4}
    assert runner.interleave(opener(log), Journal(tmp_path / "three", HEADER), rounds=more, steps=2)
    counted = [window.name for window in Journal(tmp_path / "three", HEADER).windows]
    assert {name: counted.count(name) for name in NAMES} == more
    with pytest.raises(ValueError, match="rounds: got 0 of on, expected at least 1"):
        runner.interleave(opener([]), journal, rounds=WANTED | {"on": 0}, steps=2)


def test_a_subject_that_a_kill_cut_off_gets_its_rounds_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    for number in range(7):
        for name in NAMES[:2]:
            journal.add(Window(number, name, 0, (1.0,)))
    assert runner.interleave(opener([]), journal, rounds=WANTED, steps=2)
    assert journal.rounds(NAMES) == 3


def test_every_subject_runs_first_also_where_some_are_not_in_every_round(tmp_path: Path) -> None:
    log: list[str] = []
    wanted = {"off": 24, "off again": 24, "on": 6}
    runner.interleave(opener(log), journal := Journal(tmp_path / "j", HEADER), rounds=wanted, steps=2)
    for names in (set(NAMES), set(NAMES[:2])):
        rounds = [list(found) for found in runner.windows_by_round(journal.windows, ()).values() if set(found) == names]
        assert {order[0] for order in rounds} == names


def test_no_round_begins_that_would_end_too_late(tmp_path: Path) -> None:
    log: list[str] = []
    journal = Journal(tmp_path / "j", HEADER)
    timed: dict[str, Any] = {"rounds": 9, "steps": 2, "clock": lambda: float(len(log))}
    assert not runner.interleave(opener(log), journal, max_seconds=10, **timed)
    assert journal.rounds(NAMES) == 3, "each takes three seconds of ten"
    assert runner.interleave(opener(log), journal, **timed)
    assert journal.rounds(NAMES) == 9


# --- rows ---


def test_a_rung_is_held_against_the_pair_that_is_nearest_in_time() -> None:
    times = TIMES | {"a+b": 0.3, "a+b+c again": 0.1}
    noisy = windows({name: seconds for name, seconds in times.items() if name.startswith("off")}, noise=0.05)
    quiet = windows({name: seconds for name, seconds in times.items() if not name.startswith("off")}, noise=1e-4)
    floors = runner.noise_floors([*noisy, *quiet], times)
    assert floors["off"] == floors["a"] == floors["a+b"]
    assert floors["a+b+c"] < floors["off"] / 10
    rows = runner.rung_rows([*noisy, *quiet], RUNGS, requests=1, gates=GREEN)
    assert [row["noise_floor"] for row in rows] == [floors[name] for name in GREEN]
    with pytest.raises(ValueError, match="expected a second run of one, named"):
        runner.noise_floors([Window(n, "off", 0, (1.0,)) for n in range(10)], ["off"])


def windows(times: Mapping[str, float], rounds: int = 30, steps: int = 16, noise: float = 0.002) -> list[Window]:
    generator = np.random.default_rng(0)
    return [
        Window(number, name, 0, tuple((seconds * (1 + noise * generator.standard_normal(steps))).tolist()))
        for number in range(rounds)
        for name, seconds in times.items()
    ]


TIMES = {"off": 0.4, "off again": 0.4, "a": 0.4, "a+b": 0.2, "a+b+c": 0.1}
RUNGS = [("everything off", "off"), ("+ a", "a"), ("+ b", "a+b"), ("+ c", "a+b+c")]
GREEN: dict[str, str | None] = dict.fromkeys(("off", "a", "a+b", "a+b+c"))


def test_rows_say_throughput_and_the_change_of_each_rung() -> None:
    rows = runner.rung_rows(windows(TIMES), RUNGS, requests=1024, gates=GREEN)
    assert [row["tok_s"] for row in rows] == pytest.approx([2560, 2560, 5120, 10240], rel=2e-3)
    assert [row["sign"] for row in rows] == [None, 0, 1, 1]
    assert [row["speedup"] for row in rows[1:]] == pytest.approx([1, 2, 4], rel=2e-3)
    assert rows[2]["change_ci"][0] <= 100 <= rows[2]["change_ci"][1], rows[2]["verdict"]
    assert all(row["p99_ms"] == pytest.approx(row["tpot_ms"], rel=0.02) for row in rows)
    assert [row["note"] for row in rows] == [""] * 4


def test_a_rung_that_ran_in_more_rounds_is_compared_over_those_that_both_have() -> None:
    often = windows(TIMES | {"a+b+c again": 0.1}, rounds=40)
    drifted = [w if w.round < 10 else Window(w.round, w.name, 0, tuple(2 * s for s in w.seconds)) for w in often]
    seen = [w for w in drifted if w.round < 10 or w.name.startswith("a+b+c")]
    rows = runner.rung_rows(seen, RUNGS, requests=1, gates=GREEN)
    assert [row["rounds"] for row in rows] == [10, 10, 10, 40]
    assert rows[3]["speedup"] == pytest.approx(4, rel=2e-3), "rounds 10 to 39 have nothing to be held against"
    assert rows[3]["change"] == pytest.approx(100, rel=2e-3)
    assert rows[3]["tpot_ms"] == pytest.approx(100 * (10 + 2 * 30) / 40, rel=2e-3)


def test_a_red_rung_has_no_figure_and_the_next_is_held_against_the_last_green_one() -> None:
    rows = runner.rung_rows(windows(TIMES), RUNGS, requests=1024, gates=GREEN | {"a+b": "2 of 3 requests left"})
    red = rows[2]
    assert red["verdict"] == "refused: red gate"
    assert red["gate"] == "2 of 3 requests left"
    assert all(red[key] is None for key in ("tok_s", "tpot_ms", "p99_ms", "change", "sign", "speedup"))
    assert rows[3]["change"] == pytest.approx(300, rel=0.01)


def test_a_rung_without_a_gate_is_refused() -> None:
    gates = {name: reason for name, reason in GREEN.items() if name != "a"}
    with pytest.raises(ValueError, match="gates: none for a, expected one per subject"):
        runner.rung_rows(windows(TIMES), RUNGS, requests=1, gates=gates)


def test_rounds_without_the_second_baseline_are_no_rounds() -> None:
    with pytest.raises(ValueError, match="windows: no round has all of off, off again"):
        runner.rung_rows([], RUNGS, requests=1, gates=GREEN)
    without = [window for window in windows(TIMES) if window.name != "off again"]
    with pytest.raises(ValueError, match="windows: no round has all of off, off again"):
        runner.rung_rows(without, RUNGS, requests=1, gates=GREEN)


def test_few_steps_give_a_mean_and_no_p99() -> None:
    rows = runner.rung_rows(windows(TIMES, rounds=12, steps=8), RUNGS, requests=1, gates=GREEN)
    assert [row["p99_ms"] for row in rows] == [None] * 4
    assert all(row["tpot_ms"] for row in rows)


def test_a_rehearsal_says_so_in_every_row() -> None:
    rows = runner.rung_rows(windows(TIMES), RUNGS, requests=1, gates=GREEN, rehearsal=True)
    assert {row["note"] for row in rows} == {runner.REHEARSAL}


def test_contributions_are_shares_of_the_first_rung_with_their_sum() -> None:
    total = [10.0] * 20
    rows = runner.contribution_rows({"view": {"a": [2.0] * 20, "b": [-1.0] * 20}}, total)
    assert [row["switch"] for row in rows] == ["a", "b", "sum"]
    assert [(r["view"].low, r["view"].median, r["view"].high) for r in rows] == [(20,) * 3, (-10,) * 3, (10,) * 3]


def test_worn_out_subjects_are_gone_before_their_successors_are_built(tmp_path: Path) -> None:
    built: list[weakref.ref[Worn]] = []

    def open_pass() -> dict[str, Worn]:
        assert [reference() for reference in built] == [None] * len(built), "an engine stands beside its successor"
        fresh = {name: Worn() for name in ("off", "on")}
        built.extend(weakref.ref(subject) for subject in fresh.values())
        return fresh

    runner.interleave(open_pass, Journal(tmp_path / "ladder.jsonl", {}), rounds=3, steps=1)
    assert len(built) == 6


class Worn:
    """A subject that has room for one window."""

    context = 0

    def __init__(self) -> None:
        self.room = 1

    def renew(self) -> None:
        assert self.room, "renewed for the round that it is about to run in"

    def window(self, steps: int) -> tuple[float, ...]:
        self.room -= steps
        return (1.0,) * steps
