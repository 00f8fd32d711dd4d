"""The one central type: an `Optimization` states a claim and everything needed to check it.

Notebooks, tests, the command line, the benchmark and the scoreboard all read this object, so there is one input
builder, one reference and one gate everywhere. It is plain data and functions: a chapter's module builds one and names
it ``OPTIMIZATION``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4ref.evidence.gates import Gate, Outputs, Verdict, poisoned_allocations
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.records import PublishedFigure

__all__ = ["Case", "Hazard", "Optimization", "Prediction", "case_seed", "run_hazard", "verify"]

Inputs = Any
"""What a chapter's `make_inputs` builds: its own small dataclass. Only that chapter's functions look inside."""


@dataclass(frozen=True)
class Case:
    """A named shape.

    Args:
        name: as typed on the command line, e.g. ``flash-256``.
        params: the numbers that make the case.
        tiny: runs on the CPU interpreter in seconds; ``verify --cases tiny`` runs these.
        needs_gpu: too large for the CPU interpreter; ``verify --cases all --device cpu`` names it and leaves it out.
        measured: `measure` times this case.
        about: what the case is for, if not a plain production shape.
    """

    name: str
    params: Mapping[str, Any]
    tiny: bool = False
    needs_gpu: bool = False
    measured: bool = False
    about: str = ""


@dataclass(frozen=True)
class Hazard:
    """A bug that really happened, planted, with the case whose gate must catch it.

    Args:
        title: one line.
        story: what went wrong upstream and why.
        source: where it is recorded (PR, issue, commit).
        ids: the hazard numbers it belongs to, e.g. ``("H12",)``.
        case: the case it is run on.
        planted: inputs -> outputs of the broken implementation.
    """

    title: str
    story: str
    source: str
    ids: tuple[str, ...]
    case: str
    planted: Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Prediction:
    """What is expected before anything is measured.

    Args:
        baseline_bytes, optimized_bytes: bytes a call asks memory for, re-reads that caches may serve included.
        least_bytes: bytes any implementation must move through device memory.
        flops: arithmetic per call, the same work on both sides.
        baseline_launches, optimized_launches: kernel launches per call.
        baseline_us, optimized_us: modelled microseconds per call; None if the device has no figures to model with.
        bound_us: the larger of least_bytes/bandwidth and flops/rate on published peaks; None likewise.
        reason: the model in a sentence.
    """

    baseline_bytes: int
    optimized_bytes: int
    least_bytes: int
    flops: int
    baseline_launches: int
    optimized_launches: int
    baseline_us: float | None
    optimized_us: float | None
    bound_us: float | None
    reason: str

    @property
    def ratio(self) -> float | None:
        """Expected baseline time over optimised time."""
        if self.baseline_us is None or self.optimized_us is None:
            return None
        return self.baseline_us / self.optimized_us


@dataclass(frozen=True)
class Optimization:
    """A claim and everything needed to check it.

    Args:
        id, number, title, part: where the chapter stands; the notebook is ``notebooks/{number:02d}_{id}.ipynb``.
        sources: the documents the optimisation comes from.
        cases: named shapes, production, odd and empty; those marked tiny run on the CPU interpreter in seconds.
        make_inputs: (case, device, seed) -> inputs.
        reference: float64 (or integer) oracle on the same quantised inputs.
        yardstick: the straightforward PyTorch implementation that budgets are relative to; None if no check needs it.
        baseline: the path before the optimisation.
        optimized: the path after it.
        gate: what must hold between them.
        hazards: planted bugs by name.
        predict: (case, device key) -> Prediction.
        claims: published figures, from data/published.jsonl.
        timed: inputs -> named callables to time: "baseline", "optimized" and any other variants and peers. Called a
            second time it builds the baseline's twin, so buffers that a callable writes belong to that call's result.
        host_timed: inputs -> named callables whose own time on the host is measured, likewise; None if nobody claims
            anything about it.
        measured_modules: modules whose bytes decide whether a record is stale.
        kernels: architecture -> the compile requests for ISA evidence, one per kernel and launch shape.
        recorded_by: the command that records the measured cases; anything but "measure" takes too long for a page.
    """

    id: str
    number: int
    title: str
    part: str
    sources: tuple[str, ...]
    cases: Mapping[str, Case]
    make_inputs: Callable[[Case, str, int], Inputs]
    reference: Callable[[Inputs], Outputs]
    baseline: Callable[[Inputs], Outputs]
    optimized: Callable[[Inputs], Outputs]
    gate: Gate
    hazards: Mapping[str, Hazard]
    predict: Callable[[Case, str], Prediction]
    claims: tuple[PublishedFigure, ...]
    timed: Callable[[Inputs], Mapping[str, Callable[[], object]]]
    measured_modules: tuple[str, ...]
    host_timed: Callable[[Inputs], Mapping[str, Callable[[], object]]] | None = None
    yardstick: Callable[[Inputs], Outputs] | None = None
    kernels: Callable[[str], tuple[CompileRequest, ...]] = field(default=lambda arch: ())
    recorded_by: str = "measure"

    def __post_init__(self) -> None:
        for name, hazard in self.hazards.items():
            if hazard.case not in self.cases:
                raise ValueError(f"hazards[{name!r}].case: got {hazard.case!r}, expected one of {sorted(self.cases)}")
        for name, case in self.cases.items():
            if case.name != name:
                raise ValueError(f"cases[{name!r}]: the case calls itself {case.name!r}")

    @property
    def notebook(self) -> str:
        """File name of the chapter's notebook."""
        return f"{self.number:02d}_{self.id}.ipynb"

    def case(self, name: str) -> Case:
        """The named case; ValueError naming the chapter's cases otherwise."""
        if name not in self.cases:
            raise ValueError(f"case: got {name!r}, expected one of {sorted(self.cases)} for {self.id}")
        return self.cases[name]


def case_seed(optimization: str, case: str, seed: int) -> int:
    """A seed that depends on the run's seed and on names only, so selecting or reordering cases changes no inputs."""
    return (zlib.crc32(f"{optimization}/{case}".encode()) ^ seed) & 0x7FFFFFFF


def _judge(opt: Optimization, inputs: Inputs, candidate: Callable[[Inputs], Outputs]) -> Verdict:
    # Candidate first, oracle last, into poisoned memory: otherwise the allocator may hand the candidate a buffer that
    # already holds the answer, and a row it never wrote would pass.
    with poisoned_allocations():
        ours = candidate(inputs)
        baseline = opt.baseline(inputs)
    reference = opt.reference(inputs)
    yardstick = opt.yardstick(inputs) if opt.yardstick is not None else None
    return opt.gate.judge(ours, baseline=baseline, reference=reference, yardstick=yardstick)


def verify(opt: Optimization, case: str, *, device: str, seed: int) -> Verdict:
    """Run the chapter's gate on one case.

    Args:
        opt: the chapter.
        case: one of its cases.
        device: "cpu" or "cuda".
        seed: the run's seed.

    Raises:
        ValueError: unknown case.
    """
    inputs = opt.make_inputs(opt.case(case), device, case_seed(opt.id, case, seed))
    return _judge(opt, inputs, opt.optimized)


def run_hazard(opt: Optimization, name: str, *, device: str, seed: int) -> Verdict:
    """Run the chapter's gate on a planted bug: the verdict must *not* be passed.

    Raises:
        ValueError: unknown hazard.
    """
    if name not in opt.hazards:
        raise ValueError(f"hazard: got {name!r}, expected one of {sorted(opt.hazards)} for {opt.id}")
    hazard = opt.hazards[name]
    inputs = opt.make_inputs(opt.case(hazard.case), device, case_seed(opt.id, hazard.case, seed))
    return _judge(opt, inputs, hazard.planted)
