"""What chapter 18's records say beside other people's kernels: decode on all heads and on slices, and a prompt's chunk.

Every ratio is the peer's time over ours in the same run, so above 1 ours is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from dsv4ref.evidence.records import Record
from dsv4ref.kernels.peers import FLASHMLA, FLASHMLA_PREFILL, VLLM_TRITON
from dsv4ref.optimizations import prefill_inputs
from dsv4ref.optimizations.base import Optimization
from dsv4ref.optimizations.report import PEER_PREFIX

__all__ = [
    "BESIDE", "GOALS", "GROUPS", "MEANS", "PROMPTS", "TARGETS", "group_of", "peer_means", "peer_rows", "point_rows",
    "prompt_rows", "verdicts",
]  # fmt: skip

GROUPS = ("all heads", "slices", "prompts")
"""What is averaged together: decode of all heads, of a tensor-parallel slice's, and a prompt's chunk."""

GOALS: Mapping[tuple[str, str, str], float] = {
    ("all heads", "optimized", FLASHMLA): 0.45,
    ("all heads", "gluon", FLASHMLA): 0.6,
    ("all heads", "optimized", VLLM_TRITON): 5.0,
    ("all heads", "gluon", VLLM_TRITON): 5.0,
    ("slices", "optimized", VLLM_TRITON): 2.0,
    ("slices", "gluon", VLLM_TRITON): 2.0,
    ("prompts", "bf16 keys", FLASHMLA_PREFILL): 0.5,
    ("prompts", "bf16 keys, gluon", FLASHMLA_PREFILL): 0.5,
}
"""The least this workbook asks of itself, by group, our variant and peer: the peer's time over ours; from no source."""

TARGETS: Mapping[tuple[str, str, str], float] = {
    ("all heads", "optimized", FLASHMLA): 0.8,
    ("all heads", "gluon", FLASHMLA): 1.0,
    ("all heads", "optimized", VLLM_TRITON): 8.0,
    ("all heads", "gluon", VLLM_TRITON): 8.0,
    ("slices", "optimized", VLLM_TRITON): 4.0,
    ("slices", "gluon", VLLM_TRITON): 4.0,
    ("prompts", "bf16 keys", FLASHMLA_PREFILL): 0.9,
    ("prompts", "bf16 keys, gluon", FLASHMLA_PREFILL): 0.9,
}
"""What it would like to reach, likewise."""

_DECODES = (FLASHMLA, VLLM_TRITON)
BESIDE = (
    "case", "device", "group", "plan, us",
    *(f"{name}, us" for name in _DECODES),
    *(f"{name} / plan" for name in _DECODES),
)  # fmt: skip
"""Columns of `peer_rows`."""
_OURS = ("optimized", "gluon", "bf16 keys", "bf16 keys, gluon")
PROMPTS = ("case", "device", "variant", "us", "TFLOP/s", "bound, %", f"{FLASHMLA_PREFILL} / this")
"""Columns of `prompt_rows`."""
MEANS = ("device", "group", "ours", "peer", "cases", "peer / ours", "from", "to", "aimed at", "target")
"""Columns of `peer_means`."""

_SLICE_HEADS = 32


def group_of(params: Mapping[str, Any]) -> str:
    """Which of `GROUPS` a case belongs to."""
    if prefill_inputs.is_prompt(params):
        return "prompts"
    return "slices" if params["heads"] <= _SLICE_HEADS else "all heads"


def peer_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Recorded decodes beside their peers.

    Args:
        opt: chapter 18.
        measured: its records.

    Returns:
        Rows with the columns of `BESIDE`; None where a peer does not take the case.
    """
    found = []
    for (case, device), seen in _times(measured).items():
        group = group_of(opt.case(case).params)
        if group == "prompts":
            continue
        plan, peers = seen["optimized"].p50_us, [seen.get(PEER_PREFIX + name) for name in _DECODES]
        times = [None if peer is None else peer.p50_us for peer in peers]
        ratios = [None if us is None else us / plan for us in times]
        found.append(dict(zip(BESIDE, (case, device, group, plan, *times, *ratios), strict=True)))
    return found


def prompt_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Recorded chunks of a prompt, by what reads their keys.

    Args: as `peer_rows`.

    Returns:
        Rows with the columns of `PROMPTS`, one per variant; the bound is the roofline on measured roofs.
    """
    found = []
    for (case, device), seen in _times(measured).items():
        if group_of(opt.case(case).params) != "prompts":
            continue
        peer = seen.get(PEER_PREFIX + FLASHMLA_PREFILL)
        for variant, r in seen.items():
            rate, bound = r.flops / r.p50_us / 1e6, None if r.bound_us is None else 100 * r.bound_us / r.p50_us
            ratio = None if peer is None else peer.p50_us / r.p50_us
            found.append(dict(zip(PROMPTS, (case, device, variant, r.p50_us, rate, bound, ratio), strict=True)))
    return found


def peer_means(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Geometric means of the peers' times over ours, one row per device, group, variant of ours and peer.

    Only cases that a peer takes count. Of ours, the plan counts everywhere, Hopper's own kernels ("gluon") and the bf16
    keys where they are measured.

    Args: as `peer_rows`.

    Returns:
        Rows with the columns of `MEANS`; "aimed at" and "target" are None where there is none.
    """
    ratios: dict[tuple[str, str, str, str], list[float]] = {}
    for (case, device), times in _times(measured).items():
        group = group_of(opt.case(case).params)
        for ours in _OURS:
            for peer in (name for name in times if ours in times and name.startswith(PEER_PREFIX)):
                key = (device, group, ours, peer.removeprefix(PEER_PREFIX))
                ratios.setdefault(key, []).append(times[peer].p50_us / times[ours].p50_us)
    order = sorted(ratios, key=lambda key: (key[0], GROUPS.index(key[1]), key[3], key[2]))
    found = []
    for device, group, ours, peer in order:
        seen = ratios[device, group, ours, peer]
        asked = (GOALS.get((group, ours, peer)), TARGETS.get((group, ours, peer)))
        numbers = (len(seen), statistics.geometric_mean(seen), min(seen), max(seen), *asked)
        found.append(dict(zip(MEANS, (device, group, ours, peer, *numbers), strict=True)))
    return found


def verdicts(means: Iterable[Mapping[str, Any]]) -> str:
    """What rows of `peer_means` come to: a line per mean that something is asked of; says so where there is none."""
    said = []
    for row in means:
        asked = [(what, row[what]) for what in ("aimed at", "target") if row[what] is not None]
        words = [f"{what} {least}: {'reached' if row['peer / ours'] >= least else 'missed'}" for what, least in asked]
        if words:
            said.append(f"{row['device']}, {row['group']}, {row['peer']} / {row['ours']} {row['peer / ours']:.2f}; ")
            said[-1] += "; ".join(words)
    return "\n".join(said) or "no record stands beside a peer"


def point_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """FlashMLA's prefill over everything of ours that was recorded, a row per point of heads and keys.

    Args: as `peer_rows`.

    Returns:
        Rows ``{case, device, heads, keys, peer's us, variant...}``: the peer's time over the variant's, above 1 where
        ours is faster; None for a variant that another point has and this one lacks. Points without the peer have none.
    """
    peer = PEER_PREFIX + FLASHMLA_PREFILL
    seen = {
        place: times
        for place, times in _times(measured).items()
        if peer in times and group_of(opt.case(place[0]).params) == "prompts"
    }
    ours = list(dict.fromkeys(name for times in seen.values() for name in times if not name.startswith(PEER_PREFIX)))
    found = []
    for (case, device), times in sorted(seen.items(), key=lambda item: _size(opt, item[0][0])):
        heads, keys = _size(opt, case)
        line = {"case": case, "device": device, "heads": heads, "keys": keys}
        line[f"{FLASHMLA_PREFILL}, us"] = times[peer].p50_us
        ratios = {name: times[peer].p50_us / times[name].p50_us if name in times else None for name in ours}
        found.append(line | ratios)
    return found


def _size(opt: Optimization, case: str) -> tuple[int, int]:
    """Heads and keys per row of a case."""
    params = opt.case(case).params
    return params["heads"], params["swa"] + params["extra"]


def _times(measured: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Records by case and device, then variant."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in measured:
        found.setdefault((record.case, record.device), {})[record.variant] = record
    return found
