"""Chapters under NVIDIA's tools: what ncu counts of the variants, what compute-sanitizer says of the gate's calls.

Either tool watches a process of its own (`watched`), because both slow down whatever else runs beside what they watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv4ref import device, kernels
from dsv4ref.evidence import profiles, records, sanitizer, timing
from dsv4ref.evidence.profiles import Profile
from dsv4ref.evidence.sanitizer import Inspection
from dsv4ref.kernels import peers
from dsv4ref.optimizations import watched
from dsv4ref.optimizations.base import Optimization, verify
from dsv4ref.optimizations.measure import RedGateError
from dsv4ref.optimizations.report import PEER_PREFIX

__all__ = ["profile", "sanitize"]

_PROCESSES = 4
"""Processes under a sanitizer at a time; they time nothing, so they may share the GPU."""


def profile(
    opt: Optimization,
    cases: Sequence[str],
    out: Path,
    *,
    seed: int,
    variants: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Profile]:
    """Verify cases of a chapter on this machine's NVIDIA GPU, profile their variants and append to a file.

    Args:
        opt: the chapter.
        cases: names.
        out: folder; profiles go to ``<out>/<device>/<chapter>.jsonl``.
        seed: the run's seed.
        variants: names of the chapter's `timed`; none for all.
        progress: called with a line before each step.

    Yields:
        A profile per launch, case by case, in the order of the launches.

    Raises:
        RuntimeError: no GPU, no ncu, ncu failed, or a variant launched nothing.
        ValueError: unknown case or variant.
        RedGateError: the gate failed on a case; nothing of it was profiled.
    """
    timing.require_gpu("profile")
    tool = profiles.version()
    for name in cases:
        opt.case(name)
    run = records.new_run()
    for name in cases:
        progress(f"{opt.id}: gate on {name}")
        verdict = verify(opt, name, device="cuda", seed=seed)
        if not verdict.passed:
            raise RedGateError(f"{opt.id}/{name}: {verdict.detail}")
        timed = watched.variants_of(opt.id, name, seed)
        if unknown := [variant for variant in variants if variant not in timed]:
            raise ValueError(f"variant: got {', '.join(unknown)}, expected some of {', '.join(timed)} for {name}")
        chosen = tuple(variants) or timed
        progress(f"{opt.id}: {profiles.PROGRAM} on {name}: {', '.join(chosen)}")
        launches = profiles.collect(watched.timed_command(opt.id, name, seed, chosen))
        if idle := [variant for number, variant in enumerate(chosen) if number not in {x.variant for x in launches}]:
            raise RuntimeError(f"{opt.id}/{name}: {profiles.PROGRAM} saw no launch of {', '.join(idle)}")
        found = []
        counts = dict.fromkeys(chosen, 0)
        where, sources = _where(), records.hash_sources(opt.measured_modules)
        for launch in launches:
            variant = chosen[launch.variant]
            peer = variant.removeprefix(PEER_PREFIX) if variant.startswith(PEER_PREFIX) else None
            found.append(
                Profile(
                    chapter=opt.id,
                    case=name,
                    variant=variant,
                    launch=counts[variant],
                    **profiles.profile_fields(launch),
                    tool_version=tool,
                    gate="passed",
                    seed=seed,
                    sources=sources,
                    peers=None if peer is None else peers.note(peer),
                    run=run,
                    **where,
                )
            )
            counts[variant] += 1
        profiles.write(out / device.current().key / f"{opt.id}.jsonl", found)
        yield from found


def sanitize(
    opt: Optimization,
    cases: Sequence[str],
    out: Path,
    *,
    seed: int,
    tools: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Inspection]:
    """Run the calls that a chapter's gate compares under compute-sanitizer and append what it says to a file.

    Args:
        opt: the chapter.
        cases: names; none for those marked tiny.
        out: folder; inspections go to ``<out>/<device>/<chapter>.jsonl``.
        seed: the run's seed.
        tools: names; none for memcheck and racecheck.
        progress: called with a line before each step.

    Yields:
        One inspection per tool and case.

    Raises:
        RuntimeError: no GPU, no compute-sanitizer, a run that did not end well, or a tool that does not find the error
            planted for it.
        ValueError: unknown case or tool.
    """
    timing.require_gpu("sanitize")
    version = sanitizer.version()
    chosen = [opt.case(name).name for name in cases] or [case.name for case in opt.cases.values() if case.tiny]
    asked = sanitizer.tools(tools)
    run = records.new_run()
    for tool in asked:
        progress(f"{opt.id}: {tool} on the error planted for it")
        control = sanitizer.planted(tool)
        progress(f"{opt.id}: {tool} on {', '.join(chosen)}")
        with ThreadPoolExecutor(_PROCESSES) as pool:
            commands = [watched.gate_command(opt.id, name, seed) for name in chosen]
            reports = list(pool.map(lambda command, tool=tool: sanitizer.inspect(tool, command), commands))
        where, sources = _where(), records.hash_sources(opt.measured_modules)
        found = [
            Inspection(
                chapter=opt.id,
                case=name,
                tool=tool,
                errors=report.errors,
                warnings=report.warnings,
                findings=report.findings,
                control=control,
                options=" ".join(sanitizer.OPTIONS[tool]) or "none",
                tool_version=version,
                seed=seed,
                sources=sources,
                run=run,
                **where,
            )
            for name, report in zip(chosen, reports, strict=True)
        ]
        sanitizer.write(out / device.current().key / f"{opt.id}.jsonl", found)
        yield from found


def _where() -> records.Provenance:
    machine = device.current()
    return records.provenance(device=machine.key, device_name=machine.name, mode=kernels.mode())
