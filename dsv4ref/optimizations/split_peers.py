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

__all__ = ["GOALS", "GROUPS", "peer_means", "peer_rows", "prompt_rows"]

GROUPS = ("all heads", "slices", "prompts")
"""What is averaged together: decode of all heads, of a tensor-parallel slice's, and a prompt's chunk."""

GOALS: Mapping[tuple[str, str, str], float] = {
    ("all heads", "optimized", FLASHMLA): 0.45,
    ("all heads", "optimized", VLLM_TRITON): 5.0,
    ("slices", "optimized", VLLM_TRITON): 2.0,
    ("prompts", "bf16 keys", FLASHMLA_PREFILL): 0.5,
}
"""What this workbook aims at, by group, our variant and peer: the peer's time over ours. Goals, from no source."""

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
        Rows ``{case, device, group, plan us}`` and, of each decode peer that any case has, its microseconds and their
        ratio to the plan's; None where a peer does not take the case.
    """
    times = {key: seen for key, seen in _times(measured).items() if group_of(opt.case(key[0]).params) != "prompts"}
    present = [name for name in (FLASHMLA, VLLM_TRITON) if any(PEER_PREFIX + name in seen for seen in times.values())]
    found = []
    for (case, device), seen in times.items():
        line: dict[str, Any] = {"case": case, "device": device, "group": group_of(opt.case(case).params)}
        line["plan, us"] = seen["optimized"].p50_us
        for name in present:
            peer = seen.get(PEER_PREFIX + name)
            line[f"{name}, us"] = None if peer is None else peer.p50_us
            line[f"{name} / plan"] = None if peer is None else peer.p50_us / seen["optimized"].p50_us
        found.append(line)
    return found


def prompt_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Recorded chunks of a prompt, by what reads their keys.

    Args: as `peer_rows`.

    Returns:
        Rows ``{case, device, variant, us, TFLOP/s, bound, %, FlashMLA prefill / this}``, a row per variant; the bound
        is the roofline of the roofs measured in the same run.
    """
    found = []
    for (case, device), seen in _times(measured).items():
        if group_of(opt.case(case).params) != "prompts":
            continue
        peer = seen.get(PEER_PREFIX + FLASHMLA_PREFILL)
        for variant, r in seen.items():
            found.append(
                {
                    "case": case,
                    "device": device,
                    "variant": variant,
                    "us": r.p50_us,
                    "TFLOP/s": r.flops / r.p50_us / 1e6,
                    "bound, %": None if r.bound_us is None else 100 * r.bound_us / r.p50_us,
                    f"{FLASHMLA_PREFILL} / this": None if peer is None else peer.p50_us / r.p50_us,
                }
            )
    return found


def peer_means(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Geometric means of the peers' times over ours, one row per device, group, variant of ours and peer.

    Only cases that a peer takes count. Of ours, the plan counts everywhere, and the bf16 keys where they are measured.

    Args: as `peer_rows`.

    Returns:
        Rows ``{device, group, ours, peer, cases, peer / ours, from, to, aimed at}``, the last None without a goal.
    """
    ratios: dict[tuple[str, str, str, str], list[float]] = {}
    for (case, device), seen in _times(measured).items():
        group = group_of(opt.case(case).params)
        for ours in ("optimized", "bf16 keys"):
            for peer in (name for name in seen if ours in seen and name.startswith(PEER_PREFIX)):
                key = (device, group, ours, peer.removeprefix(PEER_PREFIX))
                ratios.setdefault(key, []).append(seen[peer].p50_us / seen[ours].p50_us)
    order = sorted(ratios, key=lambda key: (key[0], GROUPS.index(key[1]), key[3], key[2]))
    return [
        {
            "device": device,
            "group": group,
            "ours": ours,
            "peer": peer,
            "cases": len(ratios[device, group, ours, peer]),
            "peer / ours": statistics.geometric_mean(ratios[device, group, ours, peer]),
            "from": min(ratios[device, group, ours, peer]),
            "to": max(ratios[device, group, ours, peer]),
            "aimed at": GOALS.get((group, ours, peer)),
        }
        for device, group, ours, peer in order
    ]


def _times(measured: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Records by case and device, then variant."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in measured:
        found.setdefault((record.case, record.device), {})[record.variant] = record
    return found
