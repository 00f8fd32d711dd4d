"""The ladder of the decode engine, run: what ``dsv4ref ladder`` does and chapter 17 shows.

Sets of switches are enumerated from `dsv4ref.serving.features.Features`, so that a switch added there is a rung here.
Gates come first, then rounds, then one look at each rung's steps from inside: launches, device time, memory, and a
trace of the first and the last rung that Perfetto opens.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4ref import device as machines
from dsv4ref import kernels
from dsv4ref.evidence import records, roofline, timing
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations import step_model
from dsv4ref.optimizations.ladder_attribution import Switches
from dsv4ref.optimizations.ladder_inside import captures_apart, look_inside
from dsv4ref.optimizations.ladder_metadata import metadata_rows
from dsv4ref.optimizations.ladder_runner import (
    Journal,
    contribution_rows,
    interleave,
    mean_step,
    noise_floors,
    rung_rows,
)
from dsv4ref.optimizations.ladder_soak import Soak, run_soak
from dsv4ref.optimizations.ladder_statistics import AGAIN
from dsv4ref.optimizations.ladder_subjects import EngineSubject, computed_prompts, timed_oracle
from dsv4ref.optimizations.ladder_workload import Preset
from dsv4ref.ref.model import Model
from dsv4ref.serving.features import available, unavailable

__all__ = [
    "ATTRIBUTIONS",
    "CHAPTER",
    "EVERYTHING_OFF",
    "MEASURED_MODULES",
    "SELDOM",
    "Gated",
    "Plan",
    "Report",
    "make_plan",
    "open_subjects",
    "run_ladder",
]

CHAPTER = "attribution_ladder"

ATTRIBUTIONS = ("ladder", "orders", "shapley")
"""Which sets run: an order's rungs; those, the reverse order's and each switch left out; or all that can be built."""

SELDOM = 3
"""Sets that are no rung of the first order run in one of so many rounds, as long as that leaves rounds enough."""

OFF = "off"
EVERYTHING_OFF = "everything off"
"""What journal and tables call the first rung of a ladder that begins with no switch on."""

_PACKAGES = ("dsv4ref.serving", "dsv4ref.ref", "dsv4ref.kernels")


def _measured_modules() -> tuple[str, ...]:
    """Every module that a decode step may run, found by looking."""
    names = []
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in Path(folder).rglob("*.py"):
                parts = file.relative_to(folder).with_suffix("").parts
                names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return tuple(sorted(names))


MEASURED_MODULES = _measured_modules()
"""The modules whose bytes a ladder's rounds stand on: a change in any of them begins another journal."""


# --- what is run ---


@dataclass(frozen=True)
class Plan:
    """The sets of switches that a ladder runs.

    Args:
        order: the switches as the ladder turns them on.
        reverse: the second order; what is on in the first rung stays in front.
        attribution: one of `ATTRIBUTIONS`.
        sets: all that are run, the first rung first.
        unavailable: switches that the model cannot turn on, and why.
        begin: the switch up to which everything is on in the first rung; None: it has nothing on.
    """

    order: tuple[str, ...]
    reverse: tuple[str, ...]
    attribution: str
    sets: tuple[Switches, ...]
    unavailable: Mapping[str, str]
    begin: str | None = None

    @property
    def base(self) -> Switches:
        """What is on in the first rung, and so in every set."""
        return self.sets[0]

    @property
    def turned_on(self) -> tuple[str, ...]:
        """The switches of which the ladder says what they are worth, in its order."""
        return tuple(name for name in self.order if name not in self.base)

    @property
    def twice(self) -> tuple[str, ...]:
        """Sets that run twice: an A/A pair of slow steps, of steps launched one by one, and of replayed ones."""
        rungs = attribution.prefixes(self.order, self.begin)
        launched = next((on for on in rungs if "device_step" in on), rungs[-1])
        return tuple(dict.fromkeys(self.name(on) for on in (rungs[0], launched, rungs[-1])))

    def allowed(self, switches: Switches) -> bool:
        """Whether these can be turned on beside what is on in the first rung."""
        return attribution.allowed_features(self.base | switches)

    def name(self, switches: Switches) -> str:
        """A set's name in journal and tables: its switches in the order of the ladder, or ``off``."""
        return "+".join(name for name in self.order if name in switches) or OFF

    def rungs(self, order: Sequence[str]) -> list[tuple[str, str]]:
        """(what is turned on, name of the set) of every rung of an order."""
        sets = attribution.prefixes(order, self.begin)
        first = EVERYTHING_OFF if self.begin is None else f"everything up to {self.begin}"
        labels = (first, *(f"+ {name}" for name in order[len(order) + 1 - len(sets) :]))
        return [(label, self.name(on)) for label, on in zip(labels, sets, strict=True)]


def make_plan(
    model: Model,
    order: str = "source",
    which: str = "ladder",
    switches: Iterable[str] | None = None,
    begin: str | None = None,
) -> Plan:
    """Choose the sets.

    Args:
        model: decides which switches there are.
        order: ``source``, ``reverse``, or names with commas, each once; what a switch needs is brought before it.
        which: one of `ATTRIBUTIONS`.
        switches: only these; default all that the model can turn on.
        begin: the first rung has everything up to this switch on; by default it has everything off.

    Raises:
        ValueError: an unknown order, attribution or switch, or one that the model cannot turn on.
    """
    if which not in ATTRIBUTIONS:
        raise ValueError(f"attribution: got {which!r}, expected one of {', '.join(ATTRIBUTIONS)}")
    known = attribution.names_of(available(model))
    chosen = known if switches is None else tuple(switches)
    reasons = dict(unavailable(model))
    for name in chosen:
        if name in reasons:
            raise ValueError(f"switches: got {name}, which this model cannot turn on: {reasons[name]}")
        if name not in known:
            raise ValueError(f"switches: got {name!r}, expected some of {', '.join(known)}")
    source = attribution.source_order(chosen)
    if order in ("source", "reverse"):
        wanted = source if order == "source" else attribution.ladder_order(source[::-1])
    else:
        given = [name.strip() for name in order.split(",")]
        if sorted(given) != sorted(chosen):
            raise ValueError(f"order: got {order!r}, expected source, reverse, or each of {', '.join(chosen)} once")
        wanted = attribution.ladder_order(given)
    if begin is not None and begin not in wanted:
        raise ValueError(f"begin: got {begin!r}, expected one of {', '.join(wanted)}")
    rungs = attribution.prefixes(wanted, begin)
    plan = Plan(wanted, wanted, which, rungs, reasons, begin)
    later = plan.turned_on
    reverse = (*wanted[: len(plan.base)], *attribution.ladder_order(later[::-1], plan.allowed))
    others: list[Switches] = []
    if which != "ladder":
        others += attribution.prefixes(reverse, begin)
        others += [plan.base | attribution.reduced(later, name, plan.allowed) for name in later]
    if which == "shapley":
        others += [plan.base | on for on in attribution.feasible_subsets(later, plan.allowed)]
    return replace(plan, reverse=reverse, sets=tuple(dict.fromkeys([*rungs, *others])))


# --- the run ---


@dataclass(frozen=True)
class Gated:
    """What the gates of a ladder compared.

    Args:
        requests, steps: whose greedy tokens, and of how many decode steps.
        budget: by how much a logit may differ.
        excused: set -> requests with another token, and the largest gap between its logit and the highest; both logits
            may be off by the budget.
        plain: the same of plain bf16 attention, over the steps of the budget.
        off_ms: of everything off, the oracle's steps one by one: no rounds, no interval.
    """

    requests: int
    steps: int
    budget: float
    excused: Mapping[str, tuple[int, float]]
    plain: tuple[int, float]
    off_ms: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """What a ladder may say.

    Args:
        preset: the benchmark.
        complete: whether all rounds are there; what is not about rounds is found only then.
        rungs: order name -> rows of `rung_rows`.
        contributions: rows of `contribution_rows`, None while a gate is red or rounds are missing: they need every set.
        inside: per set of the first order, launches per step, device and host time, memory.
        captures: rows of `captures_apart` for everything on; none where that is not replayed on a GPU.
        traces: per traced rung, its file and what was counted in it.
        metadata: rows of `metadata_rows`.
        soak: of `run_soak`; None if it did not run.
        gates: set -> None or why its gate is red.
        gated: what they compared.
        where: device, versions, date, sources and seed.
        records: for the scoreboard; none of a rehearsal, a selection of switches, another order or a red gate.
    """

    preset: Preset
    complete: bool
    rungs: Mapping[str, list[dict[str, Any]]]
    contributions: list[dict[str, Any]] | None
    inside: list[dict[str, Any]]
    captures: list[dict[str, Any]]
    traces: list[dict[str, Any]]
    metadata: list[dict[str, Any]]
    soak: Soak | None
    gates: Mapping[str, str | None]
    gated: Gated
    where: Mapping[str, Any]
    records: tuple[Record, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything but the records, as plain values."""
        return {
            "benchmark": self.preset.facts() | {"name": self.preset.name, "rehearsal": self.preset.rehearsal},
            "where": self.where,
            "complete": self.complete,
            "rungs": self.rungs,
            "contributions": None
            if self.contributions is None
            else [
                {k: asdict(v) if isinstance(v, timing.Ratio) else v for k, v in row.items()}
                for row in self.contributions
            ],
            "inside": self.inside,
            "captures": self.captures,
            "traces": self.traces,
            "metadata": self.metadata,
            "soak": None if self.soak is None else asdict(self.soak) | {"growth": self.soak.growth},
            "gates": self.gates,
            "gated": asdict(self.gated),
        }

    @property
    def green(self) -> bool:
        """Whether every set's gate is, and memory neither grew nor was lost."""
        return all(reason is None for reason in self.gates.values()) and (self.soak is None or not self.soak.reason)


def run_ladder(
    preset: Preset,
    out: Path,
    *,
    device: str,
    seed: int,
    repeats: int | None = None,
    order: str = "source",
    which: str = "ladder",
    switches: Iterable[str] | None = None,
    inside: bool = True,
    max_seconds: float = math.inf,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Run a ladder, or continue the one in ``out``.

    Args:
        preset: the benchmark.
        out: folder of the journal (``ladder.jsonl``), ``report.json``, the traces and, on a GPU, what ships:
            ``records/`` and ``ladders/``, as in the package's ``data``.
        device: "cpu" or "cuda".
        seed: of weights and prompts.
        repeats: rounds, at least `timing.MIN_ROUNDS`; default the preset's. Rungs whose steps are fast enough for a
            whole window run in ``preset.often`` times as many, sets that only the second order or the other views need
            in one of `SELDOM`.
        order, which, switches: as in `make_plan`.
        inside: count launches and memory, write traces, soak; records need it.
        max_seconds: no round begins that would end later; what is missing then is left to the next run.
        progress: called with what runs, how much is done and how much there is.

    Raises:
        ValueError: bad input.
        MixedRunError: ``out`` holds a journal of another benchmark, machine or source.
        RuntimeError: a request failed, or time was up before the first round.
    """
    started = time.monotonic()
    rounds = preset.repeats if repeats is None else repeats
    if rounds < timing.MIN_ROUNDS:
        raise ValueError(f"repeats: got {rounds}, expected at least {timing.MIN_ROUNDS}, or intervals say nothing")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds: got {max_seconds}, expected a positive number of seconds")
    progress("weights", 0, 1)
    model = workload.slice_model(preset.config, seed, device)
    plan = make_plan(model, order, which, switches, preset.begin)
    # Refused before the gates, which take a while.
    header = _header(preset, plan, seed, device)
    journal = Journal(out / "ladder.jsonl", header)
    subjects, gates, gated = open_subjects(model, preset, plan, device=device, seed=seed, progress=progress)
    complete = interleave(
        lambda: subjects, journal, rounds=_rounds(preset, plan, subjects, rounds), steps=preset.window,
        max_seconds=max_seconds - (time.monotonic() - started), progress=progress,
    )  # fmt: skip
    if not journal.rounds(subjects):
        raise RuntimeError(f"max_seconds: {max_seconds:g} s were over before the first round was complete")
    rows = {}
    for name, listed in {"order": plan.order, "reverse": plan.reverse}.items():
        if name == "order" or which != "ladder":
            rows[name] = rung_rows(
                journal.windows, plan.rungs(listed), requests=preset.requests, gates=gates, rehearsal=preset.rehearsal
            )
    whole = complete and len(subjects) - len(plan.twice) == len(plan.sets)
    looked: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    captures: list[dict[str, Any]] = []
    metadata: list[dict[str, Any]] = []
    soak = None
    if inside and complete:
        reported = {name: subjects[name] for _, name in plan.rungs(plan.order) if gates[name] is None}
        everything = frozenset(plan.order)
        last = plan.name(everything)
        # What is timed by clocks comes before the first profile.
        if gates[last] is None:
            if subjects[last].on_gpu and subjects[last].replayed:
                progress("captures of the last rung", 0, 1)
                captures = captures_apart(subjects[last], subjects[f"{last} {AGAIN}"])
            if "device_step" in everything:
                metadata = metadata_rows(model, everything, preset.batches, device=device)
        progress("a step from inside", 0, 1)
        looked, traces = look_inside(reported, out, rows["order"], rehearsal=preset.rehearsal)
        if gates[last] is None and preset.soak is not None:
            soak = run_soak(model, everything, preset.soak, device=device, seed=seed, progress=progress)
    lines: tuple[Record, ...] = ()
    recorded = device == "cuda" and not preset.rehearsal and _is_whole(preset, plan, model)
    lost = preset.soak is not None and (soak is None or soak.reason is not None)
    if recorded and whole and looked and not lost:
        lines = _records(preset, plan, journal, looked, seed)
    shares = _contributions(journal, plan) if whole else None
    report = Report(
        preset, complete, rows, shares, looked, captures, traces, metadata, soak, gates, gated, _where(header), lines
    )
    text = json.dumps(report.as_json(), indent=1)
    (out / "report.json").write_text(text, encoding="utf-8")
    if lines:  # over those of the same journal with fewer rounds
        key = machines.current().key
        (target := out / "records" / key / f"{CHAPTER}.jsonl").unlink(missing_ok=True)
        records.write(target, lines)
        (out / "ladders" / key).mkdir(parents=True, exist_ok=True)
        (out / "ladders" / key / f"{preset.name}.json").write_text(text, encoding="utf-8")
    return report


def _rounds(preset: Preset, plan: Plan, subjects: Mapping[str, EngineSubject], rounds: int) -> dict[str, int]:
    """Rounds of every subject: more of those with fast steps, fewer of sets that are no rung of the first order."""
    rungs = {name for _, name in plan.rungs(plan.order)}

    def wanted(name: str, subject: EngineSubject) -> int:
        count = rounds * preset.often if subject.steps == preset.window else rounds
        if name.removesuffix(f" {AGAIN}") in rungs:
            return count
        return max(timing.MIN_ROUNDS, -(-count // SELDOM))

    return {name: wanted(name, subject) for name, subject in subjects.items()}


def open_subjects(
    model: Model,
    preset: Preset,
    plan: Plan,
    *,
    device: str,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[dict[str, EngineSubject], dict[str, str | None], Gated]:
    """An engine for every set of a plan whose gate is green, from one checkpoint; and every gate.

    Args:
        model, preset, plan: what runs.
        device: "cpu" or "cuda".
        seed: of the prompts.
        progress: as in `run_ladder`.

    Returns:
        Subjects by the names of their sets, those that are run twice also as ``<set> again``; set -> None where its
        gate is green, else what is wrong; and what was compared.

    Raises:
        RuntimeError: the first rung's gate is red, or the engines do not fit.
    """
    total = len(plan.sets) + 3
    progress("prompts", 0, total)
    asked = workload.prompts(preset.config, preset.requests, preset.prompt, seed + 1)
    start = computed_prompts(model, preset, asked, device)
    progress("everything off, the oracle", 1, total)
    oracle = timed_oracle(model, preset, start, device)
    subjects: dict[str, EngineSubject] = {}
    gates: dict[str, str | None] = {}
    excused: dict[str, tuple[int, float]] = {}
    _give_memory_back()
    built: list[int | None] = []
    for number, on in enumerate(plan.sets):
        name = plan.name(on)
        for label in (name, *([f"{name} {AGAIN}"] if name in plan.twice else [])):
            progress(f"gate: {label}", number + 2, total)
            try:
                subject = EngineSubject(model, preset, on, start, device)
            except torch.OutOfMemoryError as error:
                raise _no_room(f"engine {number + 1} of {len(plan.sets)}, {label}, does not fit") from error
            except RuntimeError as error:
                gates[name] = str(error)
                continue
            gates[name] = gates.get(name) or oracle.reason(subject.generated)
            excused[name] = oracle.excused(subject.generated)
            subjects[label] = subject
            built.append(subject.engine_bytes)
        if gates[name] is not None:
            if number == 0:
                raise RuntimeError(f"the gate of {name}, the first rung, is red, so nothing is compared: {gates[name]}")
            for label in (name, f"{name} {AGAIN}"):
                subjects.pop(label, None)
            excused.pop(name, None)
        _check_room(built, len(plan.sets) - 1 - number)
    off_ms = tuple(1e3 * seconds for seconds in oracle.seconds)
    return subjects, gates, Gated(preset.requests, preset.warmup, oracle.budget, excused, oracle.plain, off_ms)


def _is_whole(preset: Preset, plan: Plan, model: Model) -> bool:
    """Every switch in the source's order, from the first rung that is the preset's own: a record says neither."""
    ordered = plan.order == attribution.source_order(attribution.names_of(available(model)))
    return ordered and plan.begin == workload.get_preset(preset.name).begin


def _give_memory_back() -> None:
    """What gates and worn-out engines leave: cycles, and memory that the allocator keeps from `mem_get_info`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_room(built: Sequence[int | None], more: int) -> None:
    """So many more engines fit beside these, each at least as large as the smallest: refuses nothing that would fit."""
    known = [size for size in built if size is not None]
    if not known:
        return
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if more * min(known) > free:
        gib = f"{min(known) / 2**30:.1f} GiB or more do not fit into {free / 2**30:.1f} GiB"
        raise _no_room(f"{more} more engines of {gib}")


def _no_room(what: str) -> RuntimeError:
    return RuntimeError(f"switches: {what}; expected fewer sets (attribution 'ladder', or fewer switches)")


def _header(preset: Preset, plan: Plan, seed: int, device: str) -> dict[str, Any]:
    machine = machines.current()
    return {
        "schema": 1,
        "benchmark": preset.settings(),
        "sets": [plan.name(on) for on in plan.sets],
        "seed": seed,
        "machine": {
            "runs_on": device,
            "device": machine.name,
            "driver": machine.driver,
            "torch": machine.torch,
            "triton": machine.triton,
        },
        "mode": kernels.mode(),
        "sources": records.hash_sources(MEASURED_MODULES),
    }


def _where(header: Mapping[str, Any]) -> dict[str, Any]:
    """Where and when a report is from, with the sources that let it go stale."""
    machine = machines.current()
    on = records.provenance(device=machine.key, device_name=machine.name, mode=kernels.mode())
    return {**on, "seed": header["seed"], "sources": header["sources"]}


def _contributions(journal: Journal, plan: Plan) -> list[dict[str, Any]]:
    """What each switch saves, under every view that the sets allow."""
    names = [plan.name(on) for on in plan.sets]
    means = mean_step(journal.windows, names)
    times = {on: np.asarray(means[plan.name(on)]) for on in plan.sets}
    views = {"in this order": attribution.cumulative(times, plan.order, plan.begin)}
    beside = {on - plan.base: seconds for on, seconds in times.items()}
    if plan.attribution != "ladder":
        views["in reverse"] = attribution.cumulative(times, plan.reverse, plan.begin)
        views["left out"] = attribution.leave_one_out(beside, plan.turned_on, plan.allowed)
    if plan.attribution == "shapley":
        views["Shapley"] = attribution.shapley(beside, plan.turned_on, plan.allowed)
    return contribution_rows(views, means[plan.name(plan.sets[0])])


# --- records ---


def _records(
    preset: Preset, plan: Plan, journal: Journal, inside: Sequence[Mapping[str, Any]], seed: int
) -> tuple[Record, ...]:
    """One line per rung for the scoreboard; "optimized" is the last one."""
    labels, names = zip(*plan.rungs(plan.order), strict=True)
    windows = journal.windows
    floors = noise_floors(windows, names)
    # A window's middle; all windows begin behind the prompts.
    middle = step_model.decode_tokens(preset.config, preset.requests, preset.prompt + preset.window // 2)
    stages = step_model.rows(preset.config, middle)
    moved, flops = (int(sum(getattr(row, what) * row.count for row in stages)) for what in ("bytes", "flops"))
    bound_us = roofline.measure_roofs().bound(moved, flops).time_us
    machine = machines.current()
    where = records.provenance(device=machine.key, device_name=machine.name, mode=kernels.mode())
    run, lines = records.new_run(), []
    for label, name, seen in zip(labels, names, inside, strict=True):
        means = mean_step(windows, [name])[name]
        p20, p50, p80 = timing.percentiles([1e6 * value for value in means])
        paired = mean_step(windows, (names[0], name))
        ratio = None if name == names[0] else timing.bootstrap_ratio(paired[names[0]], paired[name])
        lines.append(
            Record(
                chapter=CHAPTER,
                case=preset.name,
                variant={names[0]: "baseline", names[-1]: "optimized"}.get(name, label),
                p20_us=p20,
                p50_us=p50,
                p80_us=p80,
                repeats=len(means),
                method="host clock, synchronised steps",
                bytes=moved,
                flops=flops,
                launches=seen["launches"],
                ratio=None if ratio is None else ratio.median,
                ratio_low=None if ratio is None else ratio.low,
                ratio_high=None if ratio is None else ratio.high,
                noise_floor=None if ratio is None else max(floors[names[0]], floors[name]),
                bound_us=bound_us,
                gate="passed",
                seed=seed,
                sources=records.hash_sources(MEASURED_MODULES),
                peers=None,
                run=run,
                **where,
            )
        )
    return tuple(lines)
