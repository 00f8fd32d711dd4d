"""Profiles: what Nsight Compute (ncu) counted of one kernel launch, and what that says about its limit.

`Profile` is one launch of one variant on one case. Its time is that of the launch alone, with caches flushed before it
and clocks as they were: it explains a record and does not replace one. ncu replays a launch once per group of counters,
so what it counts comes from several runs of the same launch.

Profiles ship with the package as data/profiles/<device>/<chapter>.jsonl. Source: the Nsight Compute documentation
(command line; metrics decoder; warp stall reasons).
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4ref.evidence import lines

PROGRAM = "ncu"
SCHEMA = 1
TIMEOUT_S = 300.0
"""Wall-clock limit of one run of ncu."""
BUSY_PERCENT = 60.0
"""Share of its peak from which a unit counts as what limits a kernel; ncu's own advice draws the line there."""


@dataclass(frozen=True)
class Metric:
    """An ncu metric, the unit that ``--print-units base`` gives it, and what that is in the profile's unit."""

    name: str
    unit: str
    scale: float = 1.0


METRICS: Mapping[str, Metric] = {
    "us": Metric("gpu__time_duration.sum", "ns", 1e-3),
    "registers": Metric("launch__registers_per_thread", "register/thread"),
    "shared_bytes": Metric("launch__shared_mem_per_block", "byte/block"),
    "warps_per_sm": Metric("sm__maximum_warps_avg_per_active_cycle", "warp"),
    "spill_requests": Metric("derived__local_spilling_requests", ""),
    "tensor_percent": Metric("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "%"),
    "issue_percent": Metric("sm__inst_issued.avg.pct_of_peak_sustained_elapsed", "%"),
    "dram_percent": Metric("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    "l2_percent": Metric("lts__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    "l1_percent": Metric("l1tex__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    "l2_hit_percent": Metric("lts__t_sector_hit_rate.pct", "%"),
    "store_conflicts": Metric("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum", ""),
    "store_wavefronts": Metric("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum", ""),
    "cycles_per_instruction": Metric("smsp__average_warp_latency_per_inst_issued.ratio", "cycle"),
}
"""Field of a profile -> the metric that it is read from."""

_REPLAYS_DIFFER = 0.1  # a sum and its terms are counted in different runs of the launch, and come in two decimals
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(?P<reason>\w+)_per_issue_active\.ratio")
_SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables", "SchedulerStats", "WarpStateStats",
)  # fmt: skip
_RANGES = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
_RANGE = "dsv4ref-variant-"
_UNITS = {
    "tensor pipe": "tensor_percent",
    "issue slots": "issue_percent",
    "device memory": "dram_percent",
    "L2": "l2_percent",
    "L1 and shared memory": "l1_percent",
}


@dataclass(frozen=True)
class Launch:
    """What ncu says of one launch: whose it is, its kernel and grid, the fields of `METRICS`, the stalls."""

    variant: int
    kernel: str
    grid: str
    block: str
    metrics: Mapping[str, float]
    stalls: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One launch under ncu.

    `launch` counts a variant's launches from 0. `us` is the launch's time, `shared_bytes` a workgroup's, `warps_per_sm`
    the most that an SM can hold. Percentages are of a unit's peak, `l2_hit_percent` of the L2's sectors.
    `store_conflicts` of the `store_wavefronts` come from bank conflicts of stores to shared memory. `stalls` are cycles
    per reason that a warp waits for one issued instruction, the cycle of issue among them as "selected";
    `cycles_per_instruction` is their sum as another replay counted it. `tool_version` is ncu's. The other fields are
    those of a `records.Record`.

    Raises: ValueError or TypeError naming the field, what it holds and what is expected.
    """

    chapter: str
    case: str
    variant: str
    launch: int
    kernel: str
    grid: str
    block: str
    us: float
    registers: int
    shared_bytes: int
    warps_per_sm: float
    spill_requests: int
    tensor_percent: float
    issue_percent: float
    dram_percent: float
    l2_percent: float
    l1_percent: float
    l2_hit_percent: float
    store_conflicts: int
    store_wavefronts: int
    cycles_per_instruction: float
    stalls: Mapping[str, float]
    tool_version: str
    gate: str
    device: str
    device_name: str
    driver: str | None
    torch: str
    triton: str
    python: str
    mode: str
    date: str
    commit: str | None
    seed: int
    sources: Mapping[str, str]
    peers: str | None
    run: str
    kind: str = "profile"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        lines.check_types(self)
        lines.check_fixed(self, kind="profile", schema=SCHEMA, gate="passed")
        lines.check_keys(self, "chapter", "device")
        lines.check_least(self, 0, "launch", "registers", "shared_bytes", "spill_requests", "seed")
        lines.check_least(
            self, 0, "store_conflicts", "store_wavefronts", *(n for n in METRICS if n.endswith("percent"))
        )
        if self.us <= 0 or self.cycles_per_instruction <= 0:
            raise ValueError(
                f"us, cycles_per_instruction: got {self.us}, {self.cycles_per_instruction}, expected positive numbers"
            )
        total = sum(self.stalls.values())
        if abs(total / self.cycles_per_instruction - 1) > _REPLAYS_DIFFER:
            raise ValueError(
                f"stalls: their sum is {total}, expected cycles_per_instruction, which is {self.cycles_per_instruction}"
            )
        lines.utc("date", self.date)
        lines.check_sources(self)

    @property
    def conflict_percent(self) -> float:
        """Share of the shared-memory store wavefronts that bank conflicts cost, percent; 0 without stores."""
        return 100 * self.store_conflicts / self.store_wavefronts if self.store_wavefronts else 0.0

    @property
    def busiest(self) -> tuple[str, float]:
        """The unit nearest its peak, and how near, percent."""
        return max(((unit, float(getattr(self, name))) for unit, name in _UNITS.items()), key=lambda item: item[1])

    def waits(self, count: int = 3) -> tuple[tuple[str, float], ...]:
        """The reasons for which a warp issues nothing, the longest first, each in percent of its cycles."""
        total = sum(self.stalls.values())
        shares = [(name, 100 * cycles / total) for name, cycles in self.stalls.items()]
        return tuple(sorted((s for s in shares if s[0] != "selected"), key=lambda item: -item[1])[:count])

    @property
    def limit(self) -> str:
        """What limits the launch: the unit at `BUSY_PERCENT` of its peak or above, else what its warps wait for."""
        unit, percent = self.busiest
        if percent >= BUSY_PERCENT:
            return f"{unit}, at {percent:.0f} % of its peak"
        reason, share = self.waits(1)[0]
        return f"waiting ({reason}, {share:.0f} % of a warp's cycles); no unit is above {percent:.0f} % ({unit})"


# ---- files ----


def write(path: Path, found: Iterable[Profile]) -> None:
    """Append to a file of profiles. Raises as `lines.append`."""
    lines.append(path, found, Profile)


def shipped() -> tuple[Profile, ...]:
    """The profiles that came with the package. Raises as `lines.read_folder`."""
    return lines.shipped("profiles", Profile)


def latest(found: Iterable[Profile]) -> tuple[Profile, ...]:
    """The newest run's launches of each (chapter, case, variant, device), in the order in which these first appear."""
    groups: dict[tuple[str, str, str, str], list[Profile]] = {}
    for one in found:
        groups.setdefault((one.chapter, one.case, one.variant, one.device), []).append(one)
    kept: list[Profile] = []
    for group in groups.values():
        newest = max(enumerate(group), key=lambda item: (lines.utc("date", item[1].date), item[0]))[1]
        kept.extend(one for one in group if one.run == newest.run)
    return tuple(kept)


# ---- the tool ----


def require_program() -> str:
    """Where ncu is; RuntimeError if it is not on PATH."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise RuntimeError(
            f"profile: expected {PROGRAM} on PATH, which comes with NVIDIA Nsight Compute, and found none"
        )
    return found


def version() -> str:
    """The program's version, from its own words."""
    said = subprocess.run([require_program(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Version\s+(\d+(?:\.\d+)+)", said)
    if found is None:
        raise RuntimeError(f"{PROGRAM} --version: got {said.strip()!r}, expected a version")
    return found.group(1)


def range_name(variant: int) -> str:
    """The NVTX range that a profiled process opens around its variant of this number, counted from 0."""
    return f"{_RANGE}{variant}"


def collect(command: Sequence[str]) -> list[Launch]:
    """Run a process under ncu.

    Args:
        command: a program and its arguments; it calls cudaProfilerStart and cudaProfilerStop around what is to be
            seen, in ranges called by `range_name`.

    Returns:
        The launches seen, in their order.

    Raises:
        RuntimeError: no ncu, or the run failed, took longer than `TIMEOUT_S` or showed ncu no launch.
        ValueError: as `parse`.
    """
    program = require_program()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        arguments = [program, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--csv"]
        arguments += [
            "--page",
            "raw",
            "--print-units",
            "base",
            "--print-kernel-base",
            "function",
            "--log-file",
            str(log),
        ]
        for section in _SECTIONS:
            arguments += ["--section", section]
        try:
            done = subprocess.run(
                [*arguments, *command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{PROGRAM}: no end after {TIMEOUT_S:.0f} s of {' '.join(command[1:])}") from error
        text = log.read_text(encoding="utf-8") if log.is_file() else ""
    if done.returncode:
        said = [line for line in (text + done.stderr).splitlines() if line.startswith("==ERROR==")]
        last = (said or done.stderr.strip().splitlines() or text.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"{PROGRAM}: {' '.join(command[1:])} failed (exit {done.returncode}): {last}")
    return parse(text)


def parse(text: str) -> list[Launch]:
    """Read the raw page that ncu prints with ``--csv --nvtx --print-units base``.

    Args:
        text: its output; lines before the table's head are ncu's messages.

    Returns:
        One `Launch` per row.

    Raises:
        ValueError: there is no table or no launch in it, or a row lacks a metric, has one in another unit or as no
            number, or stands in no range called by `range_name`.
    """
    table = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(table))
    if len(rows) < 2:  # the first row holds the units
        said = [line for line in text.splitlines() if line.startswith("==")]
        raise ValueError(f"{PROGRAM}: expected a table with at least one launch; it says {said[-1] if said else ''!r}")
    units = rows[0]
    names = [metric.name for metric in METRICS.values()]
    if missing := [name for name in ("Kernel Name", "Grid Size", "Block Size", _RANGES, *names) if name not in units]:
        raise ValueError(f"{PROGRAM}: expected a column {missing[0]!r}, which is not in its table")
    for metric in METRICS.values():
        if units[metric.name] != metric.unit:
            raise ValueError(f"{metric.name}: got the unit {units[metric.name]!r}, expected {metric.unit!r}")
    return [_launch(row) for row in rows[1:]]


def _launch(row: Mapping[str, str]) -> Launch:
    found = re.search(re.escape(_RANGE) + r"(\d+)", row[_RANGES])
    if found is None:
        raise ValueError(f"{row['Kernel Name']}: got the ranges {row[_RANGES]!r}, expected one called {_RANGE}N")
    metrics = {field: _number(row, metric.name) * metric.scale for field, metric in METRICS.items()}
    stalls = {m["reason"]: _number(row, name) for name in row if (m := _STALL.fullmatch(name))}
    return Launch(int(found[1]), row["Kernel Name"], row["Grid Size"], row["Block Size"], metrics, stalls)


def _number(row: Mapping[str, str], name: str) -> float:
    try:
        return float(row[name].replace(",", ""))
    except ValueError as error:
        raise ValueError(f"{row['Kernel Name']}: {name}: got {row[name]!r}, expected a number") from error


def profile_fields(launch: Launch) -> dict[str, Any]:
    """The fields of a `Profile` that ncu gives: kernel, grid, block, metrics, stalls."""
    counts = {"registers", "shared_bytes", "spill_requests", "store_conflicts", "store_wavefronts"}
    metrics = {name: round(value) if name in counts else value for name, value in launch.metrics.items()}
    return {"kernel": launch.kernel, "grid": launch.grid, "block": launch.block, **metrics, "stalls": launch.stalls}
