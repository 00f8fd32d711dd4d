"""What a chapter's page asks of its `Optimization`, as plain rows: gates, hazards, predictions, claims, measurements.

The command line and the notebooks show the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dsv4ref import device, kernels, settings
from dsv4ref.evidence import isa, records
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import base, measure, report
from dsv4ref.optimizations.base import Optimization

__all__ = [
    "board_rows",
    "claim_rows",
    "comparison_rows",
    "facts",
    "gate_rows",
    "hazard_rows",
    "host_measurements",
    "isa_rows",
    "measurements",
    "prediction_rows",
    "residual_rows",
    "where",
]

_TARGETS = ("mi300x", "mi355x", "h200")


def facts() -> dict[str, str]:
    """This process in five lines: device, architecture, how kernels run, torch and triton versions."""
    machine = device.current()
    how = {
        "compiled": "compiled for this GPU",
        "interpreted": "interpreted on the CPU (numbers are real, times are not)",
    }[kernels.mode()]
    return {
        "device": machine.name,
        "architecture": machine.arch,
        "kernels": how,
        "torch": machine.torch,
        "triton": str(machine.triton),
    }


def where() -> str:
    """The torch device chapters run on here: "cuda" where kernels are compiled, else "cpu"."""
    return "cuda" if kernels.mode() == "compiled" else "cpu"


def gate_rows(opt: Optimization, cases: Iterable[str], *, target: str, seed: int) -> Iterator[dict[str, Any]]:
    """Run the gate case by case: ``{id, case, gate, passed, detail}``."""
    for name in cases:
        verdict = base.verify(opt, name, device=target, seed=seed)
        yield {
            "id": opt.id,
            "case": name,
            "gate": verdict.gate,
            "passed": verdict.passed,
            "detail": verdict.detail,
        }


def comparison_rows(opt: Optimization, cases: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Run the gate and show every comparison: error against budget and the worst index, one row per case and output.

    Args:
        opt: the chapter.
        cases: names; default the tiny ones.
    """
    names = [name for name, case in opt.cases.items() if case.tiny] if cases is None else list(cases)
    seed = settings.get("DSV4REF_SEED")
    rows = []
    for name in _progress(names, "gate"):
        for c in base.verify(opt, name, device=where(), seed=seed).comparisons:
            rows.append(
                {
                    "case": name,
                    "about": opt.cases[name].about,
                    "output": c.output,
                    "relation": c.relation,
                    "error norm": c.norm,
                    "plain PyTorch's": c.yardstick_norm,
                    "worst at": None if c.worst is None else str(c.worst),
                    "passed": c.passed,
                }
            )
    return rows


def hazard_rows(
    opt: Optimization, names: Iterable[str] | None = None, *, target: str | None = None, seed: int | None = None
) -> Iterator[dict[str, Any]]:
    """Run planted bugs through the gate: ``{id, hazard, caught, detail}``."""
    run_seed = settings.get("DSV4REF_SEED") if seed is None else seed
    for name in opt.hazards if names is None else names:
        verdict = base.run_hazard(opt, name, device=target or where(), seed=run_seed)
        yield {"id": opt.id, "hazard": name, "caught": not verdict.passed, "detail": verdict.detail}


def prediction_rows(
    opt: Optimization, cases: Iterable[str] | None = None, devices: Sequence[str] = _TARGETS
) -> list[dict[str, Any]]:
    """What is expected of the measured cases (or of those named), on every device, before anything is measured."""
    names = [case.name for case in opt.cases.values() if case.measured] if cases is None else list(cases)
    rows = []
    for name in names:
        for key in devices:
            p = opt.predict(opt.case(name), key)
            rows.append(
                {
                    "device": key,
                    "case": name,
                    "MB before": p.baseline_bytes / 1e6,
                    "MB after": p.optimized_bytes / 1e6,
                    "GFLOP": p.flops / 1e9,
                    "launches before": p.baseline_launches,
                    "launches after": p.optimized_launches,
                    "bound, us": p.bound_us,
                    "ratio": p.ratio,
                }
            )
    return rows


def board_rows(
    opt: Optimization, measured: Iterable[Record], devices: Sequence[str] = _TARGETS
) -> list[dict[str, Any]]:
    """The chapter's scoreboard: what was measured, and what is predicted wherever nobody has measured.

    Args:
        opt: the chapter.
        measured: records; none is fine, and host time, which nobody predicts, is left out.
        devices: which to predict for.

    Returns:
        ``report_rows``, then for every other measured case and device a row with the same keys for a figure (id, case,
        device, predicted, claimed, ratio, ratio_ci, date), the last three None.
    """
    rows = report.report_rows(r for r in measured if r.chapter == opt.id and r.method != records.HOST)
    known = {(row["case"], row["device"]) for row in rows}
    for case in opt.cases.values():
        for key in devices:
            if case.measured and (case.name, key) not in known:
                row: dict[str, Any] = {"id": opt.id, "case": case.name, "device": key}
                row |= {"predicted": opt.predict(case, key).ratio, "claimed": None}
                rows.append(row | {"ratio": None, "ratio_ci": None, "date": None})
    return rows


def claim_rows(opt: Optimization) -> list[dict[str, Any]]:
    """The published figures, each with the change that its own two numbers give."""
    return [
        {
            "claim": c.what,
            "before": c.before,
            "after": c.after,
            "unit": c.unit,
            "change, %": round(c.gain_percent, 2),
            "device": c.device,
            "source": c.source,
            "note": c.note,
        }
        for c in opt.claims
    ]


def residual_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """Predicted beside measured times, per case and device: how far the model is off on either side."""
    rows = []
    for row in report.report_rows(record for record in measured if record.method != records.HOST):
        p = opt.predict(opt.case(row["case"]), row["device"])
        rows.append(
            {
                "case": row["case"],
                "device": row["device"],
                "baseline: model, us": p.baseline_us,
                "baseline: measured, us": row["baseline_us"],
                "optimised: model, us": p.optimized_us,
                "optimised: measured, us": row["optimized_us"],
                "% of bound": None if row["bound_us"] is None else 100 * row["bound_us"] / row["optimized_us"],
            }
        )
    return rows


def measurements(opt: Optimization, cases: Iterable[str] | None = None) -> tuple[str, list[Record]]:
    """Measure here if kernels are compiled for a GPU, else take the newest records that ship with the package.

    Device time; host time is `host_measurements`. A chapter whose records another command makes
    (`Optimization.recorded_by`) is never measured here.

    Args:
        opt: the chapter.
        cases: measured cases to include; default all of them.

    Returns:
        a sentence that says which of the two it is, and the records.
    """
    return _measurements(opt, cases, measure.measure_case, host=False)


def host_measurements(opt: Optimization, cases: Iterable[str] | None = None) -> tuple[str, list[Record]]:
    """As `measurements`, of a chapter's host time: microseconds that calls keep the host, from call to return."""
    return _measurements(opt, cases, measure.measure_host_case, host=True)


def _measurements(
    opt: Optimization, cases: Iterable[str] | None, take: Callable[..., tuple[Record, ...]], *, host: bool
) -> tuple[str, list[Record]]:
    wanted = [c.name for c in opt.cases.values() if c.measured] if cases is None else list(cases)
    if kernels.mode() == "compiled" and torch.cuda.is_available() and opt.recorded_by == "measure":
        seed, run = settings.get("DSV4REF_SEED"), records.new_run()
        live = [r for name in _progress(wanted, "measuring") for r in take(opt, opt.case(name), seed=seed, run=run)]
        return f"measured live on {device.current().name}", live
    shipped = records.latest(records.shipped(extra=settings.get("DSV4REF_RECORDS")))
    kept = [r for r in shipped if r.chapter == opt.id and r.case in wanted and (r.method == records.HOST) is host]
    if not kept:
        what = "no host time" if host else "nothing"
        return f"{what} has been recorded for this chapter yet", []
    order = {name: index for index, name in enumerate(wanted)}
    kept.sort(key=lambda r: (r.device, order[r.case]))
    described = sorted({f"{r.device_name}, {r.date[:10]}" for r in kept})
    stale = ", STALE: the measured sources have changed since" if any(records.is_stale(r) for r in kept) else ""
    return f"recorded on {'; '.join(described)}{stale}", kept


def isa_rows(opt: Optimization, archs: Sequence[str] = ("gfx942", "gfx950")) -> list[dict[str, Any]]:
    """Cross-compile the chapter's kernels and read registers, spills, LDS, waves and MFMA from the ISA."""
    return [
        row.as_json() for arch in _progress(archs, "compiling") for row in isa.compile_rows(opt.kernels(arch), (arch,))
    ]


def _progress(items: Sequence[str], what: str) -> Iterable[str]:
    """The items; in a notebook with a bar, if they take over two seconds. The command line prints rows instead."""
    if "ipykernel" not in sys.modules:
        return items
    from tqdm import tqdm

    bar: Iterable[str] = tqdm(items, desc=what, delay=2, leave=False)
    return bar
