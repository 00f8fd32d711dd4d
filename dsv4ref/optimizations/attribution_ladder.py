"""Chapter 17: what each optimisation is worth, measured so that the answer can be "nothing that could be told".

The claim has two halves. The decode engine gives the tokens of everything off on every rung of its ladder. And a
ladder's report says of each rung what is true of it: a gain, a loss, or neither; a mean without warm-up; a p99 only
where there are steps enough for one; nothing at all of a rung whose tokens changed.

The first half runs engines. The second runs the shipped journal, rounds and report on a `SimulatedMachine`, whose truth
is known, so it is a test of the method and no measurement. Every case runs both: where no engine runs, its tokens are
simulated too.

Baseline: one run per rung, one after the other, as a ladder of commits is run. Optimised: interleaved rounds, an A/A
pair, intervals, gates first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.ladder_attribution import Switches
from dsv4ref.optimizations.ladder_benchmark import CHAPTER, MEASURED_MODULES, OFF
from dsv4ref.optimizations.ladder_runner import Journal, Window, interleave, rung_rows
from dsv4ref.optimizations.ladder_simulation import SimulatedMachine, SimulatedRung
from dsv4ref.optimizations.ladder_statistics import AGAIN
from dsv4ref.optimizations.ladder_subjects import EngineSubject, computed_prompts, timed_oracle
from dsv4ref.optimizations.ladder_workload import Preset
from dsv4ref.ref.model import Model
from dsv4ref.serving.checkpoints import Checkpoint
from dsv4ref.serving.features import available

__all__ = ["OPTIMIZATION", "LadderInputs", "machine", "measured", "reported", "rung_by_rung"]

_AGAIN = f"{OFF} {AGAIN}"
_REQUESTS, _TOKENS = 3, 6
_REFUSED = 0
"""What stands in every output of a rung that is not reported."""


@dataclass(frozen=True)
class LadderInputs:
    """One ladder.

    Args:
        truth: rung -> what is simulated, the baseline first.
        settings: of the simulated machine.
        rounds, window, warmup: the design.
        seed: of the simulated noise.
        tokens: int64 ``[R, N]``: of simulated engines, the right ones; of real ones, the prompts.
        preset: the engines' benchmark; None where they are simulated.
        model: their model.
        sets: rung -> its switches.
        joins: the gate's requests join at two moments, prompts and all; otherwise it runs the rows that a ladder times,
            from one checkpoint.
        device: of the engines.
    """

    truth: Mapping[str, SimulatedRung]
    settings: Mapping[str, float]
    rounds: int
    window: int
    warmup: int
    seed: int
    tokens: Tensor
    preset: Preset | None = None
    model: Model | None = None
    sets: Mapping[str, Switches] | None = None
    joins: bool = True
    device: str = "cpu"

    @property
    def rungs(self) -> tuple[str, ...]:
        """Names, the baseline first."""
        return tuple(self.truth)


def _build(case: Case, device: str, seed: int) -> LadderInputs:
    p = case.params
    design = {"rounds": p["rounds"], "window": p["window"], "warmup": p["warmup"], "seed": seed}
    settings = {name: p[name] for name in ("window_noise", "step_noise", "drift_per_hour") if name in p}
    if p["preset"] is None:
        tokens = torch.randint(0, 2**15, (_REQUESTS, _TOKENS), generator=torch.Generator().manual_seed(seed))
        return LadderInputs(p["truth"], settings, tokens=tokens, **design)
    preset = workload.get_preset(p["preset"])
    model = workload.slice_model(preset.config, seed, device)
    order = attribution.source_order(attribution.names_of(available(model)))
    names = (OFF, *(f"+ {name}" for name in order))
    sets = dict(zip(names, attribution.prefixes(order), strict=True))
    if p["rungs"] == "ends":
        sets = {OFF: frozenset[str](), "everything on": frozenset(order)}
    signs = np.random.default_rng(seed).integers(-1, 2, size=len(sets))
    changes = [0.0, *(0.03 * float(sign) for sign in signs[1:])]
    truth = {name: SimulatedRung(change) for name, change in zip(sets, changes, strict=True)}
    count, length = preset.gate[:2] if p["joins"] else (preset.requests, preset.prompt)
    asked = workload.prompts(preset.config, count, length, seed)
    return LadderInputs(
        truth, settings, tokens=asked, preset=preset, model=model, sets=sets, joins=p["joins"], device=device, **design
    )  # fmt: skip


# --- tokens ---


def _divergent(inputs: LadderInputs) -> dict[str, int]:
    """Requests of every rung whose tokens leave those of everything off."""
    if inputs.model is None:
        changed = {name: inputs.tokens.clone() for name in inputs.rungs}
        for name, rung in inputs.truth.items():
            changed[name][0, -1] += rung.faulty
        return {name: int((tokens != inputs.tokens).any(dim=1).sum()) for name, tokens in changed.items()}
    assert inputs.preset is not None
    assert inputs.sets is not None
    if not inputs.joins:
        start = computed_prompts(inputs.model, inputs.preset, inputs.tokens, inputs.device)
        run_timed = partial(EngineSubject, inputs.model, inputs.preset, start=start, device=inputs.device)
        generated = {name: run_timed(on).generated for name, on in inputs.sets.items()}
        oracle = timed_oracle(inputs.model, inputs.preset, start, inputs.device)
        return {name: workload.divergent(run, oracle.generated, oracle.budget) for name, run in generated.items()}
    new = inputs.preset.gate[2]
    run = partial(workload.generate, inputs.model, inputs.tokens, new, device=inputs.device)
    # Rungs first, the oracle behind them.
    seen = {name: run(sorted(on)) for name, on in inputs.sets.items()}
    off = run(())
    budget = workload.gate_budget(workload.plain_generated(inputs.model, inputs.tokens, new, inputs.device), off)
    return {name: workload.divergent(generated, off, budget) for name, generated in seen.items()}


# --- times ---


def machine(inputs: LadderInputs) -> SimulatedMachine:
    """A fresh simulated machine for a ladder: its rungs, and the baseline's second run."""
    baseline, *others = inputs.rungs
    rungs = {baseline: inputs.truth[baseline], _AGAIN: inputs.truth[baseline]}
    return SimulatedMachine({**rungs, **{name: inputs.truth[name] for name in others}}, inputs.seed, **inputs.settings)


@dataclass
class _Simulated:
    """A `ladder_runner.Subject` on a simulated machine."""

    machine: SimulatedMachine
    name: str
    room: int
    context: int = 0

    def renew(self) -> None:
        """Nothing: a simulated machine draws its noise in every window."""

    def window(self, steps: int) -> tuple[float, ...]:
        self.room -= steps
        self.context += steps
        return self.machine.window(self.name, steps)


def measured(
    inputs: LadderInputs, on: SimulatedMachine, *, warmup: int | None = None, path: Path | None = None
) -> list[Window]:
    """Rounds of a ladder, through the shipped journal and the shipped interleaving.

    Args:
        inputs: the ladder.
        on: where it runs.
        warmup: steps of a fresh engine that are not counted; default the ladder's.
        path: of the journal; default a file that is gone afterwards.
    """
    untimed = inputs.warmup if warmup is None else warmup

    def open_pass() -> dict[str, _Simulated]:
        for name in on.rungs:
            on.restart(name)
            on.window(name, untimed)
        half = -(-inputs.rounds // 2)  # two passes, so that what a fresh engine does shows twice
        return {name: _Simulated(on, name, half * inputs.window) for name in on.rungs}

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(path or Path(folder) / "ladder.jsonl", {"seed": inputs.seed})
        interleave(open_pass, journal, rounds=inputs.rounds, steps=inputs.window)
    return journal.windows


# --- the report ---


def reported(
    inputs: LadderInputs, rows: Sequence[Mapping[str, Any]], divergent: Mapping[str, int]
) -> dict[str, Tensor]:
    """What a ladder's rows say, as numbers that can be compared with the truth; 0 all along for a rung without figures.

    Args:
        inputs: the ladder.
        rows: of `rung_rows`, one per rung.
        divergent: of every rung, requests whose tokens changed.

    Returns:
        int64 ``[rungs]`` each: ``divergent`` requests behind the figures; ``gains``, the sign that the row tells;
        ``mean``, error of the mean step against the baseline's in whole percent; ``p99``, 1 where one is stated.
    """
    on = machine(inputs)
    baseline = inputs.rungs[0]
    outputs: dict[str, list[int]] = {"divergent": [], "gains": [], "mean": [], "p99": []}
    for name, row in zip(inputs.rungs, rows, strict=True):
        values = [_REFUSED] * 4
        if row["tpot_ms"] is not None:
            true = on.true_step_s(name) / on.true_step_s(baseline)
            error = row["tpot_ms"] / rows[0]["tpot_ms"] / true - 1
            values = [divergent[name], row["sign"] or 0, round(100 * error), int(row["p99_ms"] is not None)]
        for key, value in zip(outputs, values, strict=True):
            outputs[key].append(value)
    return {key: torch.tensor(values) for key, values in outputs.items()}


def _rows(inputs: LadderInputs, windows: Sequence[Window], divergent: Mapping[str, int]) -> list[dict[str, Any]]:
    gates = {name: f"{count} requests left the tokens" if count else None for name, count in divergent.items()}
    return rung_rows(windows, [(n, n) for n in inputs.rungs], requests=len(inputs.tokens), gates=gates)


def _optimized(inputs: LadderInputs) -> dict[str, Tensor]:
    divergent = _divergent(inputs)
    return reported(inputs, _rows(inputs, measured(inputs, machine(inputs)), divergent), divergent)


def _reference(inputs: LadderInputs) -> dict[str, Tensor]:
    """The truth, from what was simulated alone."""
    on = machine(inputs)
    green = [name for name in inputs.rungs if not inputs.truth[name].faulty]
    gains, before = [], green[0]
    for name in inputs.rungs:
        faster = on.true_step_s(before) / on.true_step_s(name) - 1
        gains.append(int(np.sign(round(faster, 9))) if name in green else _REFUSED)
        before = name if name in green else before
    # One step beyond the quantile, at least, in 19 of 20 runs.
    enough = 1 - 0.99 ** (inputs.rounds * inputs.window) >= 0.95
    zeros = torch.zeros(len(inputs.rungs), dtype=torch.int64)
    stated = torch.tensor([int(enough and name in green) for name in inputs.rungs])
    return {"divergent": zeros, "gains": torch.tensor(gains), "mean": zeros, "p99": stated}


# --- the source's design, and other ways to be wrong ---


def _one_run_each(inputs: LadderInputs) -> dict[str, Tensor]:
    """One long window per rung, one after the other; what is faster is a gain."""
    on, steps = machine(inputs), inputs.rounds * inputs.window
    rows: list[dict[str, Any]] = []
    for name in inputs.rungs:
        on.window(name, inputs.warmup)
        tpot = 1e3 * float(np.mean(on.window(name, steps)))
        sign = int(np.sign(rows[-1]["tpot_ms"] - tpot)) if rows else 0
        rows.append({"tpot_ms": tpot, "sign": sign, "p99_ms": tpot})
    return reported(inputs, rows, dict.fromkeys(inputs.rungs, 0))


def rung_by_rung(inputs: LadderInputs) -> list[Window]:
    """As many windows as the design has, all of one rung before all of the next; only the A/A pair takes turns."""
    on = machine(inputs)
    windows = []
    for group in ((inputs.rungs[0], _AGAIN), *((name,) for name in inputs.rungs[1:])):
        for name in group:
            on.window(name, inputs.warmup)
        windows += [Window(n, name, 0, on.window(name, inputs.window)) for n in range(inputs.rounds) for name in group]
    return windows


def _one_after_the_other(inputs: LadderInputs) -> dict[str, Tensor]:
    divergent = _divergent(inputs)
    return reported(inputs, _rows(inputs, rung_by_rung(inputs), divergent), divergent)


def _ungated(inputs: LadderInputs) -> dict[str, Tensor]:
    """Times of every rung, whatever it computes."""
    windows = measured(inputs, machine(inputs))
    return reported(inputs, _rows(inputs, windows, dict.fromkeys(inputs.rungs, 0)), _divergent(inputs))


def _any_p99(inputs: LadderInputs) -> dict[str, Tensor]:
    """The 99th percentile of however many steps there are."""
    divergent = _divergent(inputs)
    rows = _rows(inputs, measured(inputs, machine(inputs)), divergent)
    return reported(inputs, [row | {"p99_ms": row["tpot_ms"]} for row in rows], divergent)


def _warmup_counted(inputs: LadderInputs) -> dict[str, Tensor]:
    """The clock starts with the first step of a fresh engine."""
    divergent = _divergent(inputs)
    return reported(inputs, _rows(inputs, measured(inputs, machine(inputs), warmup=0), divergent), divergent)


def _resumed_with_another_source(inputs: LadderInputs) -> dict[str, Tensor]:
    """Killed after two thirds, edited, continued into the same journal, which does not ask by what it was begun."""
    divergent = _divergent(inputs)
    last = inputs.rungs[-1]
    older = replace(inputs, truth={**inputs.truth, last: replace(inputs.truth[last], change=0.05)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ladder.jsonl"
        measured(replace(older, rounds=2 * inputs.rounds // 3), machine(older), path=path)
        windows = measured(inputs, machine(inputs), path=path)
    return reported(inputs, _rows(inputs, windows, divergent), divergent)


# --- timing, prediction ---


class _Stepper:
    """Decode steps without end: an engine goes back to its prompts before a request would leave."""

    def __init__(self, inputs: LadderInputs, switches: Switches, start: Checkpoint) -> None:
        assert inputs.preset is not None
        assert inputs.model is not None
        self._subject = EngineSubject(inputs.model, inputs.preset, switches, start, inputs.device)
        self._left = 0

    def __call__(self) -> None:
        if self._left < 1:
            self._subject.rewind()
            self._left = self._subject.room
        self._subject.step()
        self._left -= 1


def _timed(inputs: LadderInputs) -> Mapping[str, Callable[[], object]]:
    """One decode step of the preset's first rung and with everything on; only of a case that runs engines."""
    if inputs.sets is None:
        raise ValueError("inputs: a simulated ladder, expected one that runs engines: there is nothing to time")
    assert inputs.preset is not None
    assert inputs.model is not None
    asked = workload.prompts(inputs.preset.config, inputs.preset.requests, inputs.preset.prompt, inputs.seed)
    start = computed_prompts(inputs.model, inputs.preset, asked, inputs.device)
    *_, on = inputs.sets.values()
    order = attribution.source_order(tuple(on))
    first, *_ = attribution.prefixes(order, inputs.preset.begin)
    return {"baseline": _Stepper(inputs, first, start), "optimized": _Stepper(inputs, on, start)}


def _predict(case: Case, device_key: str) -> Prediction:
    """Nothing: what this chapter predicts is what a design can resolve (`ladder_statistics`), not an engine's speed."""
    return Prediction(
        baseline_bytes=0,
        optimized_bytes=0,
        least_bytes=0,
        flops=0,
        baseline_launches=0,
        optimized_launches=0,
        baseline_us=None,
        optimized_us=None,
        bound_us=None,
        reason="no model: an eager engine is bound by its host, of which a device's published figures say nothing",
    )


_DESIGN = {"rounds": 30, "window": 16, "warmup": 8}
_NOISE = {"window_noise": 0.003, "step_noise": 0.01}


def _simulated(
    name: str, *rungs: SimulatedRung, rounds: int = 30, window: int = 16, about: str, **settings: float
) -> Case:
    truth = {OFF: SimulatedRung(), **{f"rung {number}": rung for number, rung in enumerate(rungs, start=1)}}
    design: dict[str, Any] = {"rounds": rounds, "window": window, "warmup": 8}
    params = {"preset": None, "truth": truth, **design, **_NOISE, **settings}
    return Case(name, params, tiny=True, about=about)


def _engines(name: str, preset: str, rungs: str, about: str, *, joins: bool = True, **kind: bool) -> Case:
    tokens = workload.get_preset(preset).requests  # of a step, for the scoreboard's rates
    params = {"preset": preset, "rungs": rungs, "joins": joins, "tokens": tokens, **_DESIGN, **_NOISE}
    return Case(name, params, about=about, **kind)


_GAIN, _LOSS, _NOTHING = SimulatedRung(0.03), SimulatedRung(-0.03), SimulatedRung()

_CASES = (
    _engines("tiny", "tiny", "ends", "engines, everything on against everything off; simulated times", tiny=True),
    _engines("tiny-rungs", "tiny", "all", "engines, every rung in the source's order; simulated times"),
    _simulated("simulated", _GAIN, _NOTHING, _LOSS, _NOTHING, about="a gain, a loss and two rungs of nothing"),
    _simulated("simulated-nothing", *[_NOTHING] * 5, about="five rungs that change nothing"),
    _simulated(
        "simulated-drift", *[_NOTHING] * 4, about="a machine that slows down by 20 % an hour", drift_per_hour=0.2
    ),
    _simulated(
        "simulated-faulty", _GAIN, SimulatedRung(0.2, faulty=True), _NOTHING,
        about="a rung that is 20 % faster and gives another token",
    ),
    _simulated(
        "simulated-short", _GAIN, _LOSS, rounds=12, window=8, about="96 steps, too few for a p99", window_noise=0.001
    ),
    _simulated(
        "simulated-compiling", _GAIN, SimulatedRung(slow_steps=6), about="a rung whose fresh engine is slow for longer"
    ),
    _engines(
        "h200-short", "h200-short", "ends", "32 requests, 124 in, 512 out, the same layers; its timed rows are gated",
        joins=False, needs_gpu=True, measured=True,
    ),
    _engines(
        "h200-slice", "h200-slice", "ends",
        "1024 requests, 512 in, 512 out, three layers of V4-Flash; timed from device_step on",
        needs_gpu=True, measured=True,
    ),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id=CHAPTER,
    number=17,
    title="The attribution ladder",
    part="IV orchestration",
    sources=("doubleword branch clean-linear-throughput-20260526",),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_one_run_each,
    optimized=_optimized,
    gate=Gate(tuple(Check(name, "exact") for name in ("divergent", "gains", "mean", "p99"))),
    hazards={
        "one-run-per-rung": Hazard(
            title="each rung is run once, and a larger number is a gain",
            story="The difference of two runs is never exactly nothing, so every rung is a gain or a loss. The "
            "source's ladder has five rungs of one run each, and calls one of them noise: the one that fell.",
            source="doubleword branch clean-linear-throughput-20260526, commit messages",
            ids=("H42",),
            case="simulated-nothing",
            planted=_one_run_each,
        ),
        "one-after-the-other": Hazard(
            title="all runs of a rung before all of the next",
            story="Repeats narrow the interval around the wrong number: what the machine does in the meantime is "
            "booked to the rung. An A/A pair whose halves take turns does not show it.",
            source="no report of this very bug; the source does not say in which order its rungs ran, or how far apart",
            ids=("H42",),
            case="simulated-drift",
            planted=_one_after_the_other,
        ),
        "changed-output": Hazard(
            title="a rung is timed whose tokens have changed",
            story="Skipping work is fast. A benchmark that looks at throughput alone rewards it.",
            source="no report of a ladder that did; vllm#49758 is a server that ran, at gsm8k 0.00",
            ids=(),
            case="simulated-faulty",
            planted=_ungated,
        ),
        "p99-of-few": Hazard(
            title="a p99 from 96 steps",
            story="The percentile of any sample can be computed. Below 299 steps the odds that none of them lies "
            "beyond the true p99 are more than one in twenty, and the largest step goes by that name.",
            source="no report of this very bug",
            ids=(),
            case="simulated-short",
            planted=_any_p99,
        ),
        "warm-up-counted": Hazard(
            title="the first steps of a fresh engine are counted",
            story="They compile, tune and fill caches, and a new kernel has more of it to do. The mean moves by what "
            "the compiler took, the median does not, and the two then tell different stories.",
            source="no report of this very bug",
            ids=(),
            case="simulated-compiling",
            planted=_warmup_counted,
        ),
        "another-source": Hazard(
            title="a run is continued after the source was edited",
            story="A resumable benchmark keeps what it has. If it does not note by which source, two thirds of a "
            "rung's rounds can be those of code that is gone.",
            source="no report of this very bug",
            ids=(),
            case="simulated",
            planted=_resumed_with_another_source,
        ),
    },
    predict=_predict,
    claims=records.published(CHAPTER),
    timed=_timed,
    measured_modules=MEASURED_MODULES,
    recorded_by="ladder",
)
