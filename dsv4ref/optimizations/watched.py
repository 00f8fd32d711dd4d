"""The process that a profiler or a sanitizer watches: it runs one case of one chapter, and as little else as it can.

``python -m dsv4ref.optimizations.watched timed CHAPTER CASE SEED VARIANT...`` calls each variant once, after warm-up,
between the profiler's start and stop and in an NVTX range of its own; a profiler told to leave everything before the
start alone sees nothing but the launches of these calls. ``... watched gate CHAPTER CASE SEED`` makes the two calls
that the gate compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from dsv4ref.evidence import profiles
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import case_seed

__all__ = ["gate_command", "run_gate_calls", "run_timed", "timed_command", "variants_of"]

_WARM_UP = 2
_MODULE = "dsv4ref.optimizations.watched"


def timed_command(chapter: str, case: str, seed: int, variants: Sequence[str]) -> list[str]:
    """The command line of a process that calls these variants of a case once each, for a profiler."""
    return [sys.executable, "-m", _MODULE, "timed", chapter, case, str(seed), *variants]


def gate_command(chapter: str, case: str, seed: int) -> list[str]:
    """The command line of a process that makes the gate's calls on a case, for a sanitizer."""
    return [sys.executable, "-m", _MODULE, "gate", chapter, case, str(seed)]


def variants_of(chapter: str, case: str, seed: int) -> tuple[str, ...]:
    """Names of what the chapter times on a case on this machine's GPU."""
    opt = catalogue.get(chapter)
    return tuple(opt.timed(opt.make_inputs(opt.case(case), "cuda", case_seed(opt.id, case, seed))))


def run_timed(chapter: str, case: str, seed: int, variants: Sequence[str]) -> None:
    """Warm up, then call each variant once where a profiler looks.

    Args:
        chapter, case: by name.
        seed: the run's seed.
        variants: names of the chapter's `timed`.

    Raises:
        ValueError: unknown chapter, case or variant.
    """
    opt = catalogue.get(chapter)
    calls = opt.timed(opt.make_inputs(opt.case(case), "cuda", case_seed(opt.id, case, seed)))
    if unknown := [name for name in variants if name not in calls]:
        raise ValueError(
            f"variants: got {', '.join(unknown)}, expected some of {', '.join(calls)} for {chapter}/{case}"
        )
    for name in variants:
        for _ in range(_WARM_UP):
            calls[name]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for number, name in enumerate(variants):
        with torch.cuda.nvtx.range(profiles.range_name(number)):
            calls[name]()
            torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_gate_calls(chapter: str, case: str, seed: int) -> None:
    """Call what the gate compares, baseline and optimised, once each on one case.

    Raises:
        ValueError: unknown chapter or case.
    """
    opt = catalogue.get(chapter)
    inputs = opt.make_inputs(opt.case(case), "cuda", case_seed(opt.id, case, seed))
    for call in (opt.baseline, opt.optimized):
        call(inputs)
        torch.cuda.synchronize()


if __name__ == "__main__":
    what, chapter, case, seed, *variants = sys.argv[1:]
    if what == "timed":
        run_timed(chapter, case, int(seed), variants)
    else:
        run_gate_calls(chapter, case, int(seed))
