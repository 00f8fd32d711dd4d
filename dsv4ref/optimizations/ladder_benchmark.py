"""The ladder of the decode engine, run: what ``dsv4ref ladder`` does and chapter 17 shows.

Sets of switches are enumerated from `dsv4ref.serving.features.Features`, so that a switch added there is a rung here.
Gates come first, then rounds, then one look at each rung's steps from inside: launches, device time, memory, and a
trace of the first and the last rung that Perfetto opens.
"""

from __future__ import annotations

import gc
import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4ref import device as machines
from dsv4ref import kernels
from dsv4ref.evidence import launches, records, roofline, timing
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations import step_model
from dsv4ref.optimizations.ladder_attribution import Switches
from dsv4ref.optimizations.ladder_runner import (
    REHEARSAL,
    Journal,
    contribution_rows,
    interleave,
    mean_step,
    rung_rows,
)
from dsv4ref.optimizations.ladder_statistics import AGAIN
from dsv4ref.optimizations.ladder_workload import EngineSubject, Preset
from dsv4ref.ref.model import Model
from dsv4ref.serving.features import available, unavailable

__all__ = ["ATTRIBUTIONS", "CHAPTER", "MEASURED_MODULES", "Plan", "Report", "make_plan", "run_ladder", "trace_counts"]

CHAPTER = "attribution_ladder"

ATTRIBUTIONS = ("ladder", "orders", "shapley")
"""Which sets run: an order's rungs; those, the reverse order's and each switch left out; or all that can be built."""

OFF = "off"

_PACKAGES = ("dsv4ref.serving", "dsv4ref.ref", "dsv4ref.kernels")
_TRACED_STEPS = 2
_STEP_LABEL = "decode step"


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
        reverse: the second order.
        attribution: one of `ATTRIBUTIONS`.
        sets: all that are run, nothing on first.
        unavailable: switches that the model cannot turn on, and why.
    """

    order: tuple[str, ...]
    reverse: tuple[str, ...]
    attribution: str
    sets: tuple[Switches, ...]
    unavailable: Mapping[str, str]

    def name(self, switches: Switches) -> str:
        """A set's name in journal and tables: its switches in the order of the ladder, or ``off``."""
        return "+".join(name for name in self.order if name in switches) or OFF

    def rungs(self, order: Sequence[str]) -> list[tuple[str, str]]:
        """(what is turned on, name of the set) of every rung of an order."""
        labels = ("everything off", *(f"+ {name}" for name in order))
        return [(label, self.name(on)) for label, on in zip(labels, attribution.prefixes(order), strict=True)]


def make_plan(
    model: Model, order: str = "source", which: str = "ladder", switches: Iterable[str] | None = None
) -> Plan:
    """Choose the sets.

    Args:
        model: decides which switches there are.
        order: ``source``, ``reverse``, or names with commas, each once; what a switch needs is brought before it.
        which: one of `ATTRIBUTIONS`.
        switches: only these; default all that the model can turn on.

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
    reverse = attribution.ladder_order(wanted[::-1])
    sets = list(attribution.prefixes(wanted))
    if which != "ladder":
        sets += [*attribution.prefixes(reverse), *(attribution.reduced(wanted, name) for name in wanted)]
    if which == "shapley":
        sets += attribution.feasible_subsets(wanted)
    return Plan(wanted, reverse, which, tuple(dict.fromkeys(sets)), reasons)


# --- the run ---


@dataclass(frozen=True)
class Report:
    """What a ladder may say.

    Args:
        preset: the benchmark.
        rungs: order name -> rows of `rung_rows`.
        contributions: rows of `contribution_rows`, None while a gate is red: they need every set.
        inside: per set of the first order, launches per step, device and host time, memory.
        traces: per traced rung, its file and what was counted in it.
        gates: set -> None or why its gate is red.
        records: for the scoreboard; none of a rehearsal, a selection of switches, another order or a red gate.
    """

    preset: Preset
    rungs: Mapping[str, list[dict[str, Any]]]
    contributions: list[dict[str, Any]] | None
    inside: list[dict[str, Any]]
    traces: list[dict[str, Any]]
    gates: Mapping[str, str | None]
    records: tuple[Record, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything but the records, as plain values."""
        return {
            "benchmark": self.preset.facts() | {"rehearsal": self.preset.rehearsal},
            "rungs": self.rungs,
            "contributions": None
            if self.contributions is None
            else [
                {k: asdict(v) if isinstance(v, timing.Ratio) else v for k, v in row.items()}
                for row in self.contributions
            ],
            "inside": self.inside,
            "traces": self.traces,
            "gates": self.gates,
        }

    @property
    def green(self) -> bool:
        """Whether every set's gate is."""
        return all(reason is None for reason in self.gates.values())


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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Run a ladder, or continue the one in ``out``.

    Args:
        preset: the benchmark.
        out: folder of the journal (``ladder.jsonl``), ``report.json``, the traces and, on a GPU, the records.
        device: "cpu" or "cuda".
        seed: of weights and prompts.
        repeats: rounds, at least `timing.MIN_ROUNDS`; default the preset's.
        order, which, switches: as in `make_plan`.
        inside: count launches and memory, and write traces; records need it.
        progress: called with what runs, how much is done and how much there is.

    Raises:
        ValueError: bad input.
        MixedRunError: ``out`` holds a journal of another benchmark, machine or source.
        RuntimeError: a request failed.
    """
    rounds = preset.repeats if repeats is None else repeats
    if rounds < timing.MIN_ROUNDS:
        raise ValueError(f"repeats: got {rounds}, expected at least {timing.MIN_ROUNDS}, or intervals say nothing")
    model = workload.slice_model(preset.config, seed, device)
    plan = make_plan(model, order, which, switches)
    # Refused before the gates, which take a while.
    journal = Journal(out / "ladder.jsonl", _header(preset, plan, seed, device))
    gates = check_gates(model, preset, plan, device=device, seed=seed, progress=progress)
    if gates[OFF] is not None:
        raise RuntimeError(f"everything off does not repeat its own tokens, so nothing can be compared: {gates[OFF]}")
    green = [on for on in plan.sets if gates[plan.name(on)] is None]
    asked = workload.prompts(preset.config, preset.requests, preset.prompt, seed + 1)
    latest: dict[str, EngineSubject] = {}

    def open_pass() -> Mapping[str, EngineSubject]:
        latest.clear()
        _give_memory_back()
        for number, on in enumerate((*green, frozenset[str]())):  # the last one is the A/A pair's other half
            name = plan.name(on) if number < len(green) else f"{OFF} {AGAIN}"
            progress(f"prompts: {name}", number, len(green) + 1)
            try:
                latest[name] = EngineSubject(model, preset, on, asked, device)
            except torch.OutOfMemoryError as error:
                raise _no_room(f"engine {number + 1} of {len(green) + 1}, {name}, does not fit") from error
            _check_room([subject.engine_bytes for subject in latest.values()], len(green) - number)
        return latest

    interleave(open_pass, journal, rounds=rounds, steps=preset.window, progress=progress)
    first = plan.rungs(plan.order)
    rows = {
        "order": rung_rows(journal.windows, first, requests=preset.requests, gates=gates, rehearsal=preset.rehearsal)
    }
    if which != "ladder":
        rows["reverse"] = rung_rows(
            journal.windows, plan.rungs(plan.reverse), requests=preset.requests, gates=gates, rehearsal=preset.rehearsal
        )
    looked: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    if inside:
        if not latest or min(subject.room for subject in latest.values()) < _TRACED_STEPS + 2:
            open_pass()
        reported = {name: latest[name] for _, name in first if gates[name] is None}
        looked, traces = _look_inside(reported, out, rows["order"], rehearsal=preset.rehearsal)
    shares = _contributions(journal, plan) if len(green) == len(plan.sets) else None
    lines: tuple[Record, ...] = ()
    recorded = device == "cuda" and not preset.rehearsal and _is_whole(plan, model)
    if recorded and looked and len(green) == len(plan.sets):
        lines = _records(preset, plan, journal, looked, seed)
        key = machines.current().key
        target = out / "records" / key / f"{CHAPTER}.jsonl"
        target.unlink(missing_ok=True)  # of the same journal with fewer rounds
        records.write(target, lines)
    report = Report(preset, rows, shares, looked, traces, gates, lines)
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    return report


def _is_whole(plan: Plan, model: Model) -> bool:
    """Every switch in the source's order: a record's "optimized" is everything on, and says nothing of an order."""
    return plan.order == attribution.source_order(attribution.names_of(available(model)))


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


def check_gates(
    model: Model,
    preset: Preset,
    plan: Plan,
    *,
    device: str,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, str | None]:
    """The gate of every set of a plan: set -> None where it is green, else what is wrong.

    Args:
        model, preset, plan: what runs.
        device: "cpu" or "cuda".
        seed: of the gate's prompts.
        progress: as in `run_ladder`.
    """
    count, length, new = preset.gate
    asked = workload.prompts(preset.config, count, length, seed + 2)
    reference = workload.generate(model, asked, new, (), device)
    budget = workload.gate_budget(workload.plain_generated(model, asked, new, device), reference)
    gates: dict[str, str | None] = {}
    for number, on in enumerate(plan.sets):
        name = plan.name(on)
        progress(f"gate: {name}", number, len(plan.sets))
        try:
            wrong = workload.divergent(workload.generate(model, asked, new, on, device), reference, budget)
        except RuntimeError as error:
            gates[name] = str(error)
            continue
        gates[name] = f"{wrong} of {count} requests left the tokens of everything off" if wrong else None
    progress("gates", len(plan.sets), len(plan.sets))
    return gates


def _contributions(journal: Journal, plan: Plan) -> list[dict[str, Any]]:
    """What each switch saves, under every view that the sets allow."""
    names = [plan.name(on) for on in plan.sets]
    means = mean_step(journal.windows, [*names, f"{OFF} {AGAIN}"])
    times = {on: np.asarray(means[plan.name(on)]) for on in plan.sets}
    views = {"in this order": attribution.cumulative(times, plan.order)}
    if plan.attribution != "ladder":
        views["in reverse"] = attribution.cumulative(times, plan.reverse)
        views["left out"] = attribution.leave_one_out(times, plan.order)
    if plan.attribution == "shapley":
        views["Shapley"] = attribution.shapley(times, plan.order)
    return contribution_rows(views, means[OFF])


# --- a step from inside ---


def _look_inside(
    subjects: Mapping[str, EngineSubject], out: Path, rows: Sequence[Mapping[str, Any]], *, rehearsal: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Launches, device and host time and memory of every rung's step; traces of the first and the last kept."""
    tpot = {row["rung"]: row["tpot_ms"] for row in rows if row["tpot_ms"] is not None}
    inside, traces = [], []
    ends = {next(iter(subjects)): "before", list(subjects)[-1]: "after"}
    for (rung, ms), (name, subject) in zip(tpot.items(), subjects.items(), strict=True):
        kept = out / f"trace_{ends[name]}.json.gz" if name in ends else None
        counts: dict[str, Any] = {}
        if kept is not None or subject.on_gpu:
            with tempfile.TemporaryDirectory() as folder:
                counts = trace_counts(_trace(subject, kept or Path(folder) / "trace.json.gz"))
        else:
            for _ in range(_TRACED_STEPS):  # all subjects stand at the same position when launches are counted
                subject.step()
        launched: int
        busy_ms: float | None
        host_ms: float | None
        if subject.on_gpu:
            launched, busy_ms = sum(counts[kind] for kind in ("kernel", "copy", "fill")), counts["busy_us"] / 1e3
            host_ms = max(ms - busy_ms, 0.0)  # of the step's time, what the device had nothing to do
        else:
            method = "aten-dispatch+interpreter"
            launched = launches.count_launches(subject.step, warmup=0, method=method).total  # type: ignore[arg-type]
            busy_ms, host_ms = None, None
        row = {"rung": rung, "launches": launched, "device_ms": busy_ms, "host_ms": host_ms}
        row |= {"engine_bytes": subject.engine_bytes, "step_bytes": subject.step_bytes()}
        inside.append(row | {"note": _note(rehearsal)})
        if kept is not None:
            traces.append({"rung": rung, "file": kept.name, **counts, "note": _note(rehearsal)})
    return inside, traces


def _note(rehearsal: bool) -> str:
    return REHEARSAL if rehearsal else ""


def _trace(subject: EngineSubject, path: Path) -> Path:
    """Profile a few steps into a Chrome trace, each under a label; the last one is the one to read."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_TRACED_STEPS):
            with torch.profiler.record_function(_STEP_LABEL):
                subject.step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"  # the profiler's own gzip goes line by line, for as long as all the rest
        profile.export_chrome_trace(str(plain))
        path.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=3))
    return path


def trace_counts(path: Path) -> dict[str, Any]:
    """What the last decode step of a trace holds, read back from the file.

    A profile may lose its first kernels; the last step is behind them.

    Args:
        path: a Chrome trace, gzipped, of steps under the label ``decode step``.

    Returns:
        kernel, copy, fill (launches on the device; 0 on a CPU), operators (ATen operators, nested ones too), and
        busy_us (device time of the launches).

    Raises:
        ValueError: no such label in the trace.
    """
    with gzip.open(path, "rt", errors="replace") as file:
        trace = json.load(file, strict=False)
    spans = [e for e in trace["traceEvents"] if e.get("name") == _STEP_LABEL and e.get("cat") == "user_annotation"]
    if not spans:
        raise ValueError(f"path: {path.name} has no {_STEP_LABEL!r}, expected a trace of labelled steps")
    last = max(spans, key=lambda e: float(e["ts"]))
    begin, end = float(last["ts"]), float(last["ts"]) + float(last["dur"])
    inside = [e for e in trace["traceEvents"] if e.get("ph") == "X" and begin <= float(e["ts"]) < end]
    found = launches.device_events({"traceEvents": inside})
    counts: dict[str, Any] = {kind: sum(k == kind for k, _ in found) for kind in ("kernel", "copy", "fill")}
    counts["operators"] = sum(e.get("cat") == "cpu_op" for e in inside)
    device = [e for e in inside if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    counts["busy_us"] = sum(float(e["dur"]) for e in device)
    return counts


# --- records ---


def _records(
    preset: Preset, plan: Plan, journal: Journal, inside: Sequence[Mapping[str, Any]], seed: int
) -> tuple[Record, ...]:
    """One line per rung for the scoreboard; "optimized" is the last one."""
    names = [name for _, name in plan.rungs(plan.order)]
    every = [*(plan.name(on) for on in plan.sets), f"{OFF} {AGAIN}"]
    means = mean_step(journal.windows, every)
    floor = timing.noise_floor(timing.bootstrap_ratio(means[OFF], means[f"{OFF} {AGAIN}"]))
    middle = step_model.decode_tokens(preset.config, preset.requests, preset.prompt + preset.output // 2)
    stages = step_model.rows(preset.config, middle)
    moved, flops = (int(sum(getattr(row, what) * row.count for row in stages)) for what in ("bytes", "flops"))
    bound_us = roofline.measure_roofs().bound(moved, flops).time_us
    machine = machines.current()
    where = records.provenance(device=machine.key, device_name=machine.name, mode=kernels.mode())
    run, lines = records.new_run(), []
    for name, seen in zip(names, inside, strict=True):
        p20, p50, p80 = timing.percentiles([1e6 * value for value in means[name]])
        ratio = None if name == OFF else timing.bootstrap_ratio(means[OFF], means[name])
        lines.append(
            Record(
                chapter=CHAPTER,
                case=preset.name,
                variant={names[0]: "baseline", names[-1]: "optimized"}.get(
                    name, f"+ {plan.order[names.index(name) - 1]}"
                ),
                p20_us=p20,
                p50_us=p50,
                p80_us=p80,
                repeats=len(means[name]),
                method="host clock, synchronised steps",
                bytes=moved,
                flops=flops,
                launches=seen["launches"],
                ratio=None if ratio is None else ratio.median,
                ratio_low=None if ratio is None else ratio.low,
                ratio_high=None if ratio is None else ratio.high,
                noise_floor=None if ratio is None else floor,
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
