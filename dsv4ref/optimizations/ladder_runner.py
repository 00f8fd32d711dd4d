"""Run a ladder: gates, interleaved rounds in a journal that survives a kill, and the rows that may be reported.

A round runs a window of steps of every subject, in an order that changes from round to round, and at least the first
rung twice. What a subject's speed depends on by chance is drawn anew before it, or no number of rounds would average
it. Subjects of which more rounds are wanted run alone in those that the others are not in: rounds are what
narrows an interval, and a fast step's cost less. Whatever is compared, is over the rounds that have all of it.
Each window is one line of the journal, written before the next one starts. A run that was killed continues with a fresh
pass of engines, and the round that was cut off is run again. The journal's first line says what was
measured, on what and by which source; a run that differs in any of it is refused, since its rounds would be mixed with
the old ones.

A subject whose gate is red has no row: its times are neither reported nor part of anybody's contribution.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv4ref.evidence import timing
from dsv4ref.evidence.timing import Ratio
from dsv4ref.optimizations.ladder_statistics import AGAIN, change, tail

__all__ = [
    "REHEARSAL",
    "Journal",
    "MixedRunError",
    "Subject",
    "Window",
    "contribution_rows",
    "interleave",
    "mean_step",
    "noise_floors",
    "rung_rows",
    "windows_by_round",
]

REHEARSAL = "rehearsal of the method, no statement about speed"


class MixedRunError(RuntimeError):
    """A journal holds another run: another benchmark, machine or source. Nothing was added to it."""


class Subject(Protocol):
    """Something whose steps are timed; it wears out after `room` of them."""

    @property
    def room(self) -> int:
        """Steps that are left."""

    @property
    def context(self) -> int:
        """Where it stands, noted with each window."""

    def renew(self) -> None:
        """Draw anew what its speed depends on by chance and keeps; called before each round that it is in."""

    def window(self, steps: int) -> tuple[float, ...]:
        """Seconds of each of so many steps, or of fewer, at least one, where steps are long."""


@dataclass(frozen=True)
class Window:
    """One sample: seconds of each step of one subject in one round."""

    round: int
    name: str
    context: int
    seconds: tuple[float, ...]


# --- the journal ---


class Journal:
    """Windows on disk, one JSON line each, behind a header that says what they are windows of.

    Args:
        path: the file; made, with its folder, if missing.
        header: what must be the same for rounds to be comparable; plain JSON values.

    Attributes:
        windows: those on disk.
        dropped: bytes of a last line that a kill had cut off, removed.

    Raises:
        MixedRunError: the file was begun under another header; names what differs.
        ValueError: the file is no journal; names the line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.windows, self.dropped = path, list[Window](), 0
        wanted = json.loads(json.dumps({"kind": "ladder", **header}))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self.dropped = len(text) - len(whole)
        if self.dropped:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.decode().splitlines()
        if not lines:
            self._append(wanted)
            return
        found = self._parse(lines[0], 1)
        if found != wanted:
            raise MixedRunError(f"{path}: begun with another {_difference(found, wanted)}; give another folder")
        for number, line in enumerate(lines[1:], start=2):
            try:
                values = self._parse(line, number)
                self.windows.append(Window(**{**values, "seconds": tuple(values["seconds"])}))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected round, name, context, seconds ({error})") from error

    def add(self, window: Window) -> None:
        """Append a window; from here on a kill of this process does not lose it."""
        self._append(vars(window))
        self.windows.append(window)

    def rounds(self, names: Iterable[str]) -> int:
        """Rounds in which every one of these subjects has a window."""
        return len(windows_by_round(self.windows, names))

    @property
    def next_round(self) -> int:
        """A number that no window has."""
        return max((window.round for window in self.windows), default=-1) + 1

    def _append(self, values: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write((json.dumps(values) + "\n").encode())

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}:{number}: expected one JSON object ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.path}:{number}: got {line[:40]!r}, expected one JSON object")
        return values


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which two headers differ, nested ones with dots, and both values of the first."""
    pairs = list(_leaves(found, wanted))
    key, old, new = pairs[0]
    more = f" (and {len(pairs) - 1} more: {', '.join(other for other, *_ in pairs[1:4])})" if len(pairs) > 1 else ""
    return f"{key}: it has {_short(old)}, this run has {_short(new)}{more}"


def _leaves(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*found, *wanted)):
            yield from _leaves(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def windows_by_round(windows: Iterable[Window], names: Iterable[str]) -> dict[int, dict[str, Window]]:
    """The complete rounds: number -> subject -> window, where every one of these subjects has one."""
    wanted = set(names)
    rounds: dict[int, dict[str, Window]] = {}
    for window in windows:
        rounds.setdefault(window.round, {})[window.name] = window
    return {number: found for number, found in sorted(rounds.items()) if wanted <= found.keys()}


# --- rounds ---


def interleave(
    open_pass: Callable[[], Mapping[str, Subject]],
    journal: Journal,
    *,
    rounds: int | Mapping[str, int],
    steps: int,
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> bool:
    """Run rounds until the journal has enough complete ones, or time is up.

    Args:
        open_pass: fresh subjects by name, warmed up; called again when they are worn out.
        journal: takes the windows; its complete rounds count towards ``rounds``.
        rounds: complete rounds wanted, those on disk included; by name where subjects differ in it. Those of which most
            are wanted run in every round, the others in their share, evenly.
        steps: of a window at most.
        max_seconds: no round begins that would end later, as long as the longest one so far took.
        clock: seconds.
        progress: called with what runs, windows done and windows wanted.

    Returns:
        Whether all rounds are there.

    Raises:
        ValueError: a subject of which not even one round is wanted.
        RuntimeError: fresh subjects have no room for a window.
    """
    started, longest = clock(), 0.0
    subjects: Mapping[str, Subject] = {}
    wanted: dict[str, int] = {}
    while True:
        if not subjects or min(subject.room for subject in subjects.values()) < steps:
            if subjects and not _left(journal, wanted):
                break
            subjects = {}  # frees the worn-out engines before their successors are built
            subjects = open_pass()
            wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in subjects}
            if few := [name for name, count in wanted.items() if count < 1]:
                raise ValueError(f"rounds: got {wanted[few[0]]} of {few[0]}, expected at least 1")
            if min(subject.room for subject in subjects.values()) < steps:
                raise RuntimeError(f"steps: a fresh subject has no room for a window of {steps}")
        if not (taking := _left(journal, wanted)):
            break
        begun = clock()
        if begun - started + longest > max_seconds:
            return False
        number, done = journal.next_round, len(journal.windows)
        # Before the first window, not between them: a capture empties the allocator's cache, which the next step fills.
        for name in taking:
            subjects[name].renew()
        for place, name in enumerate(timing.round_order(taking, journal.rounds(taking))):
            progress(name, done + place, sum(wanted.values()))
            # No name for the subject: it would keep a worn-out engine beside all of its successors.
            context = subjects[name].context
            journal.add(Window(number, name, context, subjects[name].window(steps)))
        longest = max(longest, clock() - begun)
    progress("done", sum(wanted.values()), sum(wanted.values()))
    return True


def _left(journal: Journal, wanted: Mapping[str, int]) -> list[str]:
    """Who runs in the next round; nobody if no round is wanted any more."""
    done = {count: journal.rounds(name for name in wanted if wanted[name] >= count) for count in set(wanted.values())}
    most = max(done)
    # Not ahead of their share of the rounds that there are, or all of those are there.
    due = [count for count in done if done[count] < count and done[count] * most <= done[most] * count]
    late = [count for count in done if done[count] < count and done[most] >= most]
    rarest = min((*due, *late), default=most + 1)
    return [name for name, count in wanted.items() if count >= rarest]


def mean_step(windows: Iterable[Window], names: Iterable[str]) -> dict[str, list[float]]:
    """Mean seconds of a step, per subject and round that has all of them."""
    names = list(names)
    complete = windows_by_round(windows, names)
    return {name: [float(np.mean(found[name].seconds)) for found in complete.values()] for name in names}


# --- rows ---


def rung_rows(
    windows: Sequence[Window],
    rungs: Sequence[tuple[str, str]],
    *,
    requests: int,
    gates: Mapping[str, str | None],
    rehearsal: bool = False,
) -> list[dict[str, Any]]:
    """One row per rung of an order: throughput, step times, and its change against the rung before, if it may be told.

    Args:
        windows: of a journal.
        rungs: (what is turned on, subject), the baseline first. A second run of a subject is called ``<subject>
            again``; the baseline has one, others may.
        requests: in flight, one token each per step.
        gates: subject -> why its gate is red, or None if it is green; a red one gets a row without figures.
        rehearsal: say in every row that it is one.

    Returns:
        Rows with rung, gate, tok_s, tpot_ms, p99_ms (None where there are too few steps), change and change_ci in
        percent against the nearest green rung before, sign (of a resolved change, else 0), verdict, speedup and
        speedup_ci against the baseline, noise_floor, rounds, note. A rung's noise_floor is that of the A/A pair whose
        steps are nearest to its own in length; two rungs are held against the larger of theirs. Times are of all
        windows of a rung, whose number is rounds; a change is of the rounds that both are in.

    Raises:
        ValueError: no rungs, no complete round, or a subject without a gate.
    """
    if not rungs:
        raise ValueError("rungs: got none, expected at least the baseline")
    if missing := [subject for _, subject in rungs if subject not in gates]:
        raise ValueError(f"gates: none for {', '.join(missing)}, expected one per subject: nothing is reported without")
    baseline = rungs[0][1]
    again = f"{baseline} {AGAIN}"
    green = [subject for _, subject in rungs if gates[subject] is None]
    names = list(dict.fromkeys((baseline, again, *green)))
    complete = windows_by_round(windows, names)
    if not complete:
        raise ValueError(f"windows: no round has all of {', '.join(names)}, expected at least one")
    floors = noise_floors(windows, names)
    rows: list[dict[str, Any]] = []
    before: str | None = None
    for label, subject in rungs:
        row: dict[str, Any] = {"rung": label, "gate": gates[subject] or "green"} | dict.fromkeys(_FIGURES)
        rounds = 0
        if gates[subject] is not None:
            row["verdict"] = "refused: red gate"
        else:
            own = [window.seconds for window in windows if window.name == subject]
            seconds, rounds = [step for window in own for step in window], len(own)
            p99 = tail(seconds).seconds
            row["tok_s"], row["tpot_ms"] = requests / float(np.mean(seconds)), 1e3 * float(np.mean(seconds))
            row["p99_ms"] = None if p99 is None else 1e3 * p99
            row["noise_floor"] = floors[subject]
            row["verdict"] = f"A/A floor {100 * floors[subject]:.2f} %"
            if before is not None:
                floor = {other: max(floors[other], floors[subject]) for other in (before, baseline)}
                step, whole = (
                    change(*_pair(windows, other, subject), floor=floor[other]) for other in (before, baseline)
                )
                low, row["change"], high = step.percent
                row |= {"change_ci": [low, high], "sign": step.sign, "verdict": step.verdict}
                row |= {"speedup": whole.ratio.median, "speedup_ci": [whole.ratio.low, whole.ratio.high]}
            before = subject
        row |= {"rounds": rounds, "note": REHEARSAL if rehearsal else ""}
        rows.append(row)
    return rows


_FIGURES = (
    "tok_s", "tpot_ms", "p99_ms", "change", "change_ci", "sign", "verdict", "speedup", "speedup_ci", "noise_floor",
)  # fmt: skip


def _pair(windows: Iterable[Window], one: str, other: str) -> tuple[list[float], list[float]]:
    """Mean seconds of a step of two subjects, over the rounds that have both."""
    means = mean_step(windows, (one, other))
    return means[one], means[other]


def noise_floors(windows: Sequence[Window], names: Iterable[str]) -> dict[str, float]:
    """The noise floor of every subject: that of the A/A pair whose mean step is nearest to its own, as a ratio.

    A pair of slow steps says nothing about fast ones: what disturbs a step of the host by a share of it may be another
    share of a replayed graph.

    Args:
        windows: of a journal, with at least one subject's second run.
        names: of the subjects.

    Raises:
        ValueError: no subject has a second run.
    """
    names, ran = list(dict.fromkeys(names)), {window.name for window in windows}
    pairs = [name for name in names if f"{name} {AGAIN}" in ran]
    if not pairs:
        raise ValueError(f"windows: got {', '.join(sorted(ran))}, expected a second run of one, named '... {AGAIN}'")
    floors = {
        name: timing.noise_floor(timing.bootstrap_ratio(*_pair(windows, name, f"{name} {AGAIN}"))) for name in pairs
    }
    typical = {name: math.log(float(np.mean(mean_step(windows, [name])[name]))) for name in names}
    return {name: floors[min(pairs, key=lambda pair: abs(typical[pair] - typical[name]))] for name in names}


def contribution_rows(
    contributions: Mapping[str, Mapping[str, Sequence[float]]], total: Sequence[float]
) -> list[dict[str, Any]]:
    """Time saved per step by each switch, in percent of the baseline's step, under each view, with intervals.

    Args:
        contributions: view -> switch -> seconds saved, one per round.
        total: the baseline's seconds per step, one per round.

    Returns:
        Rows with switch, then per view a `Ratio` in percent (median, low, high); the last row is the sum.
    """
    base = np.asarray(total, dtype=float)
    switches = list(dict.fromkeys(name for view in contributions.values() for name in view))
    rows: list[dict[str, Any]] = []
    for name in (*switches, "sum"):
        row: dict[str, Any] = {"switch": name}
        for view, shares in contributions.items():
            values = (
                sum((np.asarray(v) for v in shares.values()), np.zeros_like(base)) if name == "sum" else shares[name]
            )
            row[view] = _percent(np.asarray(values) / base)
        rows.append(row)
    return rows


def _percent(shares: np.ndarray) -> Ratio:
    interval = timing.bootstrap_median(shares)
    return Ratio(*(100 * value for value in (interval.median, interval.low, interval.high)))
