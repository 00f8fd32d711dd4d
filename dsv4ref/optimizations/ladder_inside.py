"""A ladder's steps from inside: launches, device and host time and memory of every rung, and traces to look at.

What is counted is read back from a profile of a labelled step, the same file that Perfetto opens.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4ref.evidence import launches, timing
from dsv4ref.optimizations.ladder_runner import REHEARSAL
from dsv4ref.optimizations.ladder_subjects import EngineSubject

__all__ = ["captures_apart", "look_inside", "trace_counts"]

_TIMES = ("device_ms", "host_ms", "host_percent", "host_percent_ci")
_PAIR_STEPS, _PAIRS = 8, 11
_CAPTURES = 6
_STEP_LABEL = "decode step"


def captures_apart(one: EngineSubject, other: EngineSubject) -> list[dict[str, Any]]:
    """How much faster one capture of a step is than another of the same step, for several pairs of captures.

    Both engines have the same switches. Within a pair nothing is captured again, so that an interval that does not hold
    1 is a difference that lasts; rounds of one pair would only make it surer.

    Args:
        one, other: replayed on a GPU; each pair is captured anew.

    Returns:
        Rows with pair, windows (of each), ratio, low and high: time of one over time of the other, a window each, and
        the 95 % interval of the median.
    """
    rows = []
    for pair in range(_CAPTURES):
        one.renew()
        other.renew()
        times: dict[EngineSubject, list[float]] = {one: [], other: []}
        for turn in range(timing.MIN_ROUNDS):
            for subject in (one, other) if turn % 2 else (other, one):
                times[subject].append(float(np.mean(subject.window(_PAIR_STEPS))))
        ratio = timing.bootstrap_ratio(times[one], times[other])
        found = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        rows.append({"pair": pair, "windows": timing.MIN_ROUNDS, **found})
    return rows


def look_inside(
    subjects: Mapping[str, EngineSubject], out: Path, rows: Sequence[Mapping[str, Any]], *, rehearsal: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Launches, device and host time and memory of every rung's step; traces of the first and the last kept.

    Args:
        subjects: of the green rungs, in order; each is rewound, so that all stand at the same position.
        out: folder of the traces.
        rows: of `rung_rows`, for the rungs' names and mean steps.
        rehearsal: say in every row that it is one.

    Returns:
        Rows with rung, launches, device_ms, host_ms, host_percent and host_percent_ci, engine_bytes, step_bytes, note;
        times are None on the CPU, the interval also where launches are made one by one. And of the traces: rung, file
        and `trace_counts`.

        The host's time is the part of a step in which the device waits for it. Of launches that the host makes one by
        one that is the mean step less what the profile has the device busy. A replay's launches wait for nobody: there
        it is the step less the same step launched without looking at its answer, both by clocks, and before the first
        profile: whatever a profiler leaves behind in a process is not in it.
    """
    on_replays = {n: s.host_and_device(_PAIR_STEPS, _PAIRS) for n, s in subjects.items() if s.on_gpu and s.replayed}
    tpot = {row["rung"]: row["tpot_ms"] for row in rows if row["tpot_ms"] is not None}
    inside, traces = [], []
    ends = {next(iter(subjects)): "before", list(subjects)[-1]: "after"}
    note = REHEARSAL if rehearsal else ""
    for (rung, ms), (name, subject) in zip(tpot.items(), subjects.items(), strict=True):
        subject.rewind()
        kept = out / f"trace_{ends[name]}.json.gz" if name in ends else None
        counts: dict[str, Any] = {}
        if kept is not None or subject.on_gpu:
            with tempfile.TemporaryDirectory() as folder:
                counts = trace_counts(_trace(subject, kept or Path(folder) / "trace.json.gz"))
        row: dict[str, Any] = {"rung": rung}
        if subject.on_gpu:
            row["launches"] = sum(counts[kind] for kind in ("kernel", "copy", "fill"))
            pairs = on_replays.get(name, [(ms / 1e3, counts["busy_us"] / 1e6)])
            stepped, device = (1e3 * float(np.median(times)) for times in zip(*pairs, strict=True))
            waited = 1e3 * float(np.median([step - alone for step, alone in pairs]))
            row |= {"device_ms": device, "host_ms": waited, "host_percent": 100 * waited / stepped}
            row["host_percent_ci"] = None
            if name in on_replays:
                share = timing.bootstrap_median([100 * (step - alone) / step for step, alone in pairs])
                row |= {"host_percent": share.median, "host_percent_ci": [share.low, share.high]}
        else:
            subject.rewind()
            counted = launches.count_launches(subject.step, warmup=0, method="aten-dispatch+interpreter")
            row |= {"launches": counted.total} | dict.fromkeys(_TIMES)
        row |= {"engine_bytes": subject.engine_bytes, "step_bytes": subject.step_bytes()}
        inside.append(row | {"note": note})
        if kept is not None:
            traces.append({"rung": rung, "file": kept.name, **counts, "note": note})
    return inside, traces


def _trace(subject: EngineSubject, path: Path) -> Path:
    """Profile one step into a Chrome trace, under a label; the step before it goes through the profiler and is dropped.

    A profile may lose its first kernels, which are then those of the step that nobody reads.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profile:
        for _ in range(2):
            with torch.profiler.record_function(_STEP_LABEL):
                subject.step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            profile.step()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"  # the profiler's own gzip goes line by line, for as long as all the rest
        profile.export_chrome_trace(str(plain))
        path.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=3))
    return path


def trace_counts(path: Path) -> dict[str, Any]:
    """What the last decode step of a trace holds, read back from the file.

    Args:
        path: a Chrome trace, gzipped, of steps under the label ``decode step``.

    Returns:
        kernel, copy, fill (launches on the device; 0 on a CPU), operators (ATen operators, nested ones too), busy_us
        (device time of the launches) and span_us (from the beginning of the first to the end of the last).

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
    ends = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in device]
    counts["span_us"] = max(end for _, end in ends) - min(at for at, _ in ends) if ends else 0.0
    return counts
