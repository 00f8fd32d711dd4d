"""What chapter 18 computes beside its plans: the worth of each step, published and recorded times, compile requests.

The time model is `dsv4ref.kernels.sparse_mla.splits`; this module asks it about other plans than the chosen one.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dsv4ref.device import get_device
from dsv4ref.evidence import records
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.records import PublishedFigure, Record
from dsv4ref.kernels.sparse_mla.launch import STATIC, LaunchShape, select_launch
from dsv4ref.kernels.sparse_mla.split_decode import REDUCE_CHUNK, REDUCE_WARPS
from dsv4ref.kernels.sparse_mla.splits import (
    MAX_SPLITS,
    SHAPES,
    Machine,
    SplitPlan,
    plan_splits,
    reduce_us,
    staged_bytes,
    tiles_per_row,
)
from dsv4ref.optimizations import decode_launch_shape, decode_model, prefill_inputs
from dsv4ref.optimizations.base import Optimization

__all__ = [
    "PEER_GOAL",
    "RECORDED",
    "beaten_rows",
    "claimed_rows",
    "claims",
    "fastest_rows",
    "ladder",
    "machine_for",
    "partial_request",
    "plan",
    "recorded_rows",
    "reduce_request",
    "residual_rows",
    "residual_shapes",
    "single_pass",
    "summary",
    "table_and_splits",
]

PEER_GOAL = 0.45
"""What this workbook aims at for a portable Triton kernel: FlashMLA's time over its own. A goal, from no source."""

RECORDED = (
    "case", "device", "splits", "kernel", "split, model", "split, recorded", "plan: recorded / model",
    "twice the splits / plan", "FlashMLA / plan",
)  # fmt: skip
"""Columns of `recorded_rows`."""

_CHAPTER = "split_k_decode"
_TESTS_OF_THE_MODEL = ("vllm#44899", "sglang#36094")
_MODULE = "dsv4ref.kernels.sparse_mla.split_decode"
_RECORDED_ON = "h200"
_PEER = "peer: FlashMLA"
_FINISH = {"positions": "*i64", "cos": "*fp32", "sin": "*fp32"}
_STRIDES = dict.fromkeys(
    ["out_stride_t", "out_stride_h", "lse_stride_t", "lse_stride_h", "cos_stride", "sin_stride", "num_positions"], "i32"
)
_COUNTS = {"num_rows": "i32", "num_heads": "i32", "num_splits": "i32"}


def partial_request(shape: LaunchShape, arch: str, *, split: bool = True, rotation: bool = False) -> CompileRequest:
    """The partial kernel at one launch shape, over two scopes.

    Args:
        shape: tile and warps.
        arch: "gfx942" or "gfx950".
        split: writes parts for a reduce; otherwise one split, with sink and output.
        rotation: of the one split, with inverse RoPE as well.
    """
    whole = decode_model.compile_request(shape, arch)
    rope = rotation and not split
    unused = "*bf16"  # the launcher passes an output or a query where an argument has no use
    finish = _FINISH if rope else dict.fromkeys(_FINISH, unused)
    parts = "*fp32" if split else unused
    pointers = {**finish, "parts": parts, "part_lses": parts}
    if split:
        pointers["sink"] = unused
    signature = {**whole.signature, **pointers, **_STRIDES, **_COUNTS}
    constexprs = {**whole.constexprs, "SPLIT": split, "HAS_SINK": not split, "HAS_ROPE": rope}
    loose = {"num_rows", "num_splits"}
    if not split:
        del signature["num_splits"]
        constexprs["num_splits"] = 1  # the JIT folds an integer equal to 1
    kind = "parts" if split else f"one split{', rotation' if rope else ''}"
    aligned = (whole.divisible_by_16 | frozenset(pointers) | frozenset(_STRIDES) | {"num_heads"}) - loose
    return replace(
        whole,
        kernel="split_k_decode",
        module=_MODULE,
        function="_split_k_decode_kernel",
        shape=f"{shape}, {kind}",
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=frozenset(aligned),
    )


def reduce_request(arch: str, *, padded: int = 32, rotation: bool = False) -> CompileRequest:
    """The reduce over up to ``padded`` splits, with the sink.

    Args:
        arch: "gfx942" or "gfx950".
        padded: splits, rounded up to a power of two.
        rotation: with inverse RoPE and the merged LSE as well.
    """
    finish = _FINISH if rotation else dict.fromkeys(_FINISH, "*bf16")
    pointers = {
        "parts": "*fp32", "part_lses": "*fp32", "sink": "*fp32", **finish, "out": "*bf16",
        "lse": "*fp32" if rotation else "*bf16",
    }  # fmt: skip
    strides = dict(_STRIDES)
    constexprs: dict[str, int | bool] = {"PADDED": padded, "CHUNK": min(padded, REDUCE_CHUNK)}
    if rotation:
        del strides["lse_stride_h"]
        constexprs["lse_stride_h"] = 1
    return CompileRequest(
        kernel="reduce_splits",
        module=_MODULE,
        function="_reduce_splits_kernel",
        shape=f"{padded} parts w{REDUCE_WARPS}{', rotation, LSE' if rotation else ''}",
        signature={**pointers, **strides, **_COUNTS},
        constexprs={**constexprs, "HAS_SINK": True, "HAS_LSE": rotation, "HAS_ROPE": rotation},
        num_warps=REDUCE_WARPS,
        divisible_by_16=frozenset(pointers) | frozenset(strides) | {"num_heads"},
    )


# --- what each step is worth ---


def single_pass(params: Mapping[str, Any], device: str) -> SplitPlan:
    """The decode before splitting: chapter 05's shape, one workgroup per row and head block, by the plans' model.

    Args:
        params: rows, heads, swa and extra (None for no such scope), as `decode_inputs.decode_case` names them.
        device: key of a device with published figures, or "cpu", which counts as MI300X.
    """
    machine = machine_for(device)
    shape = select_launch(machine.arch, params["rows"], params["heads"], params["extra"] or 0)
    return plan(params, device, launch=shape, splits=1)


def plan(params: Mapping[str, Any], device: str, **fixed: Any) -> SplitPlan:
    """The plan of a call, its launch shape or split count fixed if given; arguments as `single_pass`."""
    machine = machine_for(device)
    return plan_splits(machine, params["rows"], params["heads"], params["swa"], params["extra"] or 0, **fixed)


def machine_for(device: str) -> Machine:
    """The machine of a device key; "cpu", where kernels are interpreted, counts as MI300X."""
    return Machine.of(get_device("mi300x" if device == "cpu" else device))


def ladder(params: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """From one workgroup per row and head block to the shipped plan, one decision per step, by the model.

    The steps between keep one small tile, as vllm#46275 does, and run the reduce whatever the split count.

    Args: as `single_pass`.

    Returns:
        Rows ``{step, shape, splits, waves, idle, iterations, staged MB, us}``.
    """
    machine, rows, heads = machine_for(device), params["rows"], params["heads"]
    tile = SHAPES[machine.arch][0]
    whole = plan(params, device, launch=tile.launch, splits=1)
    fits = machine.compute_units * tile.resident // whole.workgroups
    in_a_wave = plan(params, device, launch=tile.launch, splits=min(max(1, fits), MAX_SPLITS))
    # The same tiles per split with no split left empty
    tiles = tiles_per_row(params["swa"], params["extra"] or 0, tile.launch.block_k)
    trimmed = plan(params, device, launch=tile.launch, splits=-(-tiles // in_a_wave.tiles_per_split))
    chosen = plan(params, device)
    steps = [
        ("single pass, chapter 05's shape", single_pass(params, device), False),
        (f"small tile, {MAX_SPLITS} splits", plan(params, device, launch=tile.launch, splits=MAX_SPLITS), True),
        ("small tile, as many splits as fit a wave", in_a_wave, True),
        ("no more splits than these iterations need", trimmed, True),
        ("no reduce at one split", trimmed, trimmed.splits > 1),
        ("shape and splits chosen together", chosen, chosen.splits > 1),
    ]
    found = []
    for step, p, staged in steps:
        extra_us = reduce_us(machine, rows, heads, 1) if staged and p.splits == 1 else 0.0
        found.append(
            {
                "step": step,
                "shape": str(p.launch),
                "splits": p.splits,
                "waves": p.waves,
                "idle, %": 100 * p.idle,
                "iterations": p.iterations,
                "staged, MB": staged_bytes(rows, heads, p.splits) / 1e6 if staged else 0.0,
                "us": p.time_us + extra_us,
            }
        )
    return found


def table_and_splits(params: Mapping[str, Any], device: str) -> dict[str, float]:
    """Modelled microseconds with and without chapter 05's table, with and without splits; args as `single_pass`."""
    table = single_pass(params, device)
    tile = SHAPES[machine_for(device).arch][0].launch
    return {
        "small tile": plan(params, device, launch=tile, splits=1).time_us,
        "table": table.time_us,
        "small tile, split": plan(params, device, launch=tile).time_us,
        "table, split": plan(params, device, launch=table.launch).time_us,
        "chosen together": plan(params, device).time_us,
    }


def claims() -> tuple[PublishedFigure, ...]:
    """The published figures of the chapter but for those the model is held against, which have tables of their own."""
    return tuple(figure for figure in records.published(_CHAPTER) if figure.source not in _TESTS_OF_THE_MODEL)


def residual_rows() -> list[dict[str, Any]]:
    """Single passes of chapter 05 as recorded on an H200 beside the model's; no rows without records.

    Returns:
        Rows ``{case, shape, measured us, model us, measured / model}``, with FlashMLA in the same runs and the model of
        this chapter's plan: two times that no run of ours stands between.
    """
    passes, found = _single_passes(), []
    for (case, variant), record in passes.items():
        if variant != "optimized":
            continue
        params = decode_launch_shape.OPTIMIZATION.case(case).params
        p, peer = single_pass(params, record.device), passes.get((case, _PEER))
        found.append(
            {
                "case": case,
                "shape": str(p.launch),
                "measured, us": record.p50_us,
                "model, us": p.time_us,
                "measured / model": record.p50_us / p.time_us,
                "FlashMLA, us": peer.p50_us if peer is not None else None,
                "plan, model us": plan(params, record.device).time_us,
            }
        )
    return found


def residual_shapes() -> list[dict[str, Any]]:
    """The same factor by launch shape, the static shape of chapter 05's baseline included: is it one factor?

    Returns:
        Rows ``{shape, cases, from, to}``: least and greatest measured / model of a shape.
    """
    factors: dict[str, list[float]] = {}
    for (case, variant), record in _single_passes().items():
        params = decode_launch_shape.OPTIMIZATION.case(case).params
        if variant == "baseline":
            p = plan(params, _RECORDED_ON, launch=STATIC, splits=1)
        elif variant == "optimized":
            p = single_pass(params, _RECORDED_ON)
        else:
            continue
        factors.setdefault(str(p.launch), []).append(record.p50_us / p.time_us)
    return [
        {"shape": shape, "cases": len(seen), "measured / model, from": min(seen), "to": max(seen)}
        for shape, seen in sorted(factors.items(), key=lambda item: min(item[1]))
    ]


def _single_passes() -> dict[tuple[str, str], Record]:
    """Chapter 05's records on an H200, by case and variant."""
    opened = decode_launch_shape.OPTIMIZATION.id
    return {
        (r.case, r.variant): r
        for r in records.latest(records.shipped())
        if (r.chapter, r.device) == (opened, _RECORDED_ON)
    }


def claimed_rows() -> list[dict[str, Any]]:
    """vllm#44899's times by batch on MI355X beside the model's: single pass before, split after.

    The published single pass has 16 heads to a workgroup, so the model's small tile stands for it.
    """
    found = []
    for claim in records.published(_CHAPTER):
        batch = re.search(r"16 heads, up to 128 \+ 1024 keys, batch (\d+)$", claim.what)
        if batch is None:
            continue
        params = {"rows": int(batch[1]), "heads": 16, "swa": 128, "extra": 1024}
        before, after = single_pass(params, "mi355x"), plan(params, "mi355x")
        found.append(
            {
                "batch": params["rows"],
                "published before, us": claim.before,
                "model, us": before.time_us,
                "published after, us": claim.after,
                "model after, us": after.time_us,
                "splits": after.splits,
                "published ratio": claim.before / claim.after,
                "model's ratio": before.time_us / after.time_us,
            }
        )
    return found


def fastest_rows() -> list[dict[str, Any]]:
    """sglang#36094's split counts, a heuristic's and the measured best, beside the plan's for the same calls.

    Returns:
        Rows ``{rows, heuristic, fastest, planned, shape}`` and the modelled microseconds of 1, 2, 4 and 8 splits.
    """
    found = []
    for claim in records.published(_CHAPTER):
        rows = re.search(r"measured fastest, 128 heads, top-k 1024, (\d+) rows", claim.what)
        if rows is None:
            continue
        params = {"rows": int(rows[1]), "heads": 128, "swa": 128, "extra": 1024}
        p = plan(params, "mi355x")
        line: dict[str, Any] = {"rows": params["rows"], "heuristic": int(claim.before), "fastest": int(claim.after)}
        line |= {"planned": p.splits, "shape": str(p.launch)}
        times = {f"{n}, us": plan(params, "mi355x", launch=p.launch, splits=n).time_us for n in (1, 2, 4, 8)}
        found.append(line | times)
    return found


# --- what was recorded ---


def recorded_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """A ratio taken apart: what the other kernel is worth at one split, and what splitting is, beside the model.

    Args:
        opt: this chapter.
        measured: its records; devices without published figures and prompts, which nobody splits, are left out.

    Returns:
        Rows with the columns of `RECORDED`. ``kernel`` times ``split, recorded`` is baseline over optimised.
    """
    found = []
    for (case, device), times in _times(opt, measured).items():
        params = opt.case(case).params
        p, one = plan(params, device), plan(params, device, splits=1)
        planned, peer = times["optimized"], times.get(_PEER)
        found.append(
            {
                "case": case,
                "device": device,
                "splits": p.splits,
                "kernel": times["baseline"] / times["one split"],
                "split, model": one.time_us / p.time_us,
                "split, recorded": times["one split"] / planned,
                "plan: recorded / model": planned / p.time_us,
                "twice the splits / plan": times["twice the splits"] / planned,
                "FlashMLA / plan": None if peer is None else peer / planned,
            }
        )
    return found


def beaten_rows(opt: Optimization, measured: Iterable[Record]) -> tuple[float, list[dict[str, Any]]]:
    """Where a variant was faster than the plan.

    Args: as `recorded_rows`.

    Returns:
        How far two variants that make the same launches differ at most, as a share of the plan's time, and rows
        ``{case, device, variant, splits, faster, faster by the model}`` of variants faster than the plan by more.
    """
    spread = 0.0
    found: list[dict[str, Any]] = []
    for (case, device), times in _times(opt, measured).items():
        params = opt.case(case).params
        p = plan(params, device)
        tile = SHAPES[machine_for(device).arch][0].launch
        asked = {
            "one split": plan(params, device, splits=1),
            "small tile": plan(params, device, launch=tile),
            "twice the splits": plan(params, device, launch=p.launch, splits=min(MAX_SPLITS, 2 * p.splits)),
        }
        for variant, other in asked.items():
            gain = times["optimized"] / times[variant] - 1
            if (other.launch, other.splits) == (p.launch, p.splits):
                spread = max(spread, abs(gain))
                continue
            line = {"case": case, "device": device, "variant": variant, "splits": f"{p.splits} → {other.splits}"}
            found.append(
                line | {"faster, %": 100 * gain, "faster by the model, %": 100 * (p.time_us / other.time_us - 1)}
            )
    return spread, [row for row in found if row["faster, %"] > 100 * spread]


def summary(opt: Optimization, measured: Iterable[Record]) -> str:
    """The records in two lines per device, for the head of the page; empty without records.

    Args: as `recorded_rows`.
    """
    kept = list(measured)
    rows, lines = recorded_rows(opt, kept), []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        ratios = [row["kernel"] * row["split, recorded"] for row in here]
        split, kernel = (_range(row[part] for row in here) for part in ("split, recorded", "kernel"))
        parts = f"splitting gives {split} of it, the other kernel {kernel}"
        lines.append(f"{device}: time of single pass / plan {_range(ratios)} over {len(here)} cases; {parts}")
        peers = [row["FlashMLA / plan"] for row in here if row["FlashMLA / plan"] is not None]
        if peers:
            mean = f"geometric mean {statistics.geometric_mean(peers):.2f} of {len(peers)} cases"
            lines.append(f"{device}: time of FlashMLA / plan {_range(peers)}, {mean}; aimed at: {PEER_GOAL}")
    return "\n".join(lines)


def _range(numbers: Iterable[float]) -> str:
    found = sorted(numbers)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def _times(opt: Optimization, measured: Iterable[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """p50 microseconds by decode case and device, then variant, of devices that the model knows."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for record in measured:
        known = record.chapter == _CHAPTER and decode_model.spec_for(record.device) is not None
        if known and not prefill_inputs.is_prompt(opt.case(record.case).params):
            found.setdefault((record.case, record.device), {})[record.variant] = record.p50_us
    return found
