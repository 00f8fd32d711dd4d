"""Measure a chapter on this machine's GPU: gates first, then interleaved timing, then one record per variant.

Device time of every measured case, and host time where the chapter says what to time: two methods, two records.

No speedup is recorded behind a red gate: every case the chapter has is verified on the device before anything is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from dsv4ref import device, kernels
from dsv4ref.evidence import launches, records, roofline, timing
from dsv4ref.evidence.records import Record
from dsv4ref.evidence.timing import Timing
from dsv4ref.kernels import peers
from dsv4ref.optimizations.base import Case, Optimization, Prediction, case_seed, verify
from dsv4ref.optimizations.report import PEER_PREFIX

__all__ = ["MAX_SECONDS", "RedGateError", "measure", "measure_case", "measure_host_case"]

MAX_SECONDS = 20.0
"""Wall-clock limit of one case's timing; the minimum number of rounds is always run."""

_MAX_ROTATIONS = 16


class RedGateError(RuntimeError):
    """A gate failed on the device, so nothing may be measured; the message is one line per failed case."""


def measure(
    opt: Optimization, out: Path, *, seed: int, progress: Callable[[str], None] = lambda line: None
) -> Iterator[Record]:
    """Verify every case of a chapter on the GPU, then time its measured cases and append the records to a file.

    Args:
        opt: the chapter.
        out: folder; records go to ``<out>/<device>/<chapter>.jsonl``.
        seed: the run's seed.
        progress: called with a line before each step.

    Yields:
        The records, case by case; none of a chapter that another command records.

    Raises:
        RuntimeError: no GPU.
        RedGateError: a gate failed; nothing was timed or written.
    """
    timing.require_gpu("measure")
    if opt.recorded_by != "measure":
        progress(f"{opt.id}: nothing to measure here, its records come from dsv4ref {opt.recorded_by}")
        return
    red = []
    for name in opt.cases:
        progress(f"{opt.id}: gate on {name}")
        verdict = verify(opt, name, device="cuda", seed=seed)
        if not verdict.passed:
            red.append(f"{opt.id}/{name}: {verdict.detail}")
    if red:
        raise RedGateError("\n".join(red))
    path = out / device.current().key / f"{opt.id}.jsonl"
    run = records.new_run()
    for case in opt.cases.values():
        if case.measured:
            progress(f"{opt.id}: timing {case.name}")
            lines = measure_case(opt, case, seed=seed, run=run)
            if opt.host_timed is not None:
                progress(f"{opt.id}: host time of {case.name}")
                lines += measure_host_case(opt, case, seed=seed, run=run)
            records.write(path, lines)
            yield from lines


@functools.cache
def _roofs() -> roofline.Roofs:
    """The device's roofs, measured once per process."""
    return roofline.measure_roofs()


def measure_case(opt: Optimization, case: Case, *, seed: int, run: str) -> tuple[Record, ...]:
    """Device time of one case's variants, in one interleaved run.

    Args:
        opt, case: the chapter and its case.
        seed: the run's seed; each rotation gets its own.
        run: id shared by the records of one run.

    Returns:
        One record per variant, the baseline first.
    """
    machine = device.current()
    l2_bytes = machine.l2_bytes or 0
    prediction = opt.predict(case, machine.key)
    count = timing.rotations(max(prediction.optimized_bytes, 1), l2_bytes, limit=_MAX_ROTATIONS)
    sets = [opt.make_inputs(case, "cuda", case_seed(opt.id, f"{case.name}/{i}", seed)) for i in range(count)]
    variants = _gather([opt.timed(inputs) for inputs in sets])
    timed = timing.time_interleaved(
        variants,
        baseline="baseline",
        twin=[opt.timed(inputs)["baseline"] for inputs in sets],
        flush_bytes=4 * max(l2_bytes, 32 << 20),
        max_seconds=MAX_SECONDS,
    )
    bound_us = _roofs().bound(prediction.least_bytes, prediction.flops).time_us
    return _records(opt, case, prediction, timed, {n: c[0] for n, c in variants.items()}, bound_us, seed, run)


def measure_host_case(opt: Optimization, case: Case, *, seed: int, run: str) -> tuple[Record, ...]:
    """Host time of one case's `Optimization.host_timed`, in one interleaved run.

    Args:
        opt, case: the chapter, which has such variants, and its case.
        seed: the run's seed.
        run: id shared by the records of one run.

    Returns:
        One record per variant with the method `records.HOST`, the baseline first; no bound, which is the device's.

    Raises:
        ValueError: the chapter has nothing to time on the host.
    """
    if opt.host_timed is None:
        raise ValueError(f"opt: {opt.id} has nothing to time on the host, expected a chapter with host_timed")
    inputs = opt.make_inputs(case, "cuda", case_seed(opt.id, case.name, seed))
    variants, twin = opt.host_timed(inputs), opt.host_timed(inputs)["baseline"]
    timed = timing.time_host(variants, baseline="baseline", twin=twin, max_seconds=MAX_SECONDS)
    return _records(opt, case, opt.predict(case, device.current().key), timed, variants, None, seed, run)


def _records(
    opt: Optimization,
    case: Case,
    prediction: Prediction,
    timed: Timing,
    variants: Mapping[str, Callable[[], object]],
    bound_us: float | None,
    seed: int,
    run: str,
) -> tuple[Record, ...]:
    """One record per variant of a run; ``variants`` are called once more, to count their launches."""
    machine = device.current()
    # Other variants and peers have no traffic model of their own: their line holds what nobody can avoid moving.
    counted = {"baseline": prediction.baseline_bytes, "optimized": prediction.optimized_bytes}
    where = records.provenance(device=machine.key, device_name=machine.name, mode=kernels.mode())
    lines = []
    for name, call in variants.items():
        lines.append(
            Record(
                chapter=opt.id,
                case=case.name,
                variant=name,
                **timed.record_fields(name),
                bytes=counted.get(name, prediction.least_bytes),
                flops=prediction.flops,
                launches=launches.count_launches(call).total,
                bound_us=bound_us,
                gate="passed",
                seed=seed,
                sources=records.hash_sources(opt.measured_modules),
                peers=peers.note(name.removeprefix(PEER_PREFIX)) if name.startswith(PEER_PREFIX) else None,
                run=run,
                **where,
            )
        )
    torch.cuda.synchronize()
    return tuple(lines)


def _gather(sets: list[Mapping[str, Callable[[], object]]]) -> dict[str, list[Callable[[], object]]]:
    """Per variant, its call on every input set."""
    return {name: [variants[name] for variants in sets] for name in sets[0]}
