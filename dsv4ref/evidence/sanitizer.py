"""Runs under compute-sanitizer, and what the tool said of them, kernel by kernel.

`Inspection` is one tool's word on one case. It says what the tool reported and no more: racecheck does not know
every way to order two accesses, and finds nothing that a case does not reach. Before a tool's silence counts it has to
find an error planted for it (`planted`), in the same run and on the same machine.

Inspections ship with the package as data/sanitizer/<device>/<chapter>.jsonl. Source: NVIDIA's Compute Sanitizer
documentation (memcheck, racecheck).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dsv4ref.evidence import lines

Tool = Literal["memcheck", "racecheck"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
PROGRAM = "compute-sanitizer"
SCHEMA = 1
TIMEOUT_S = 300.0
"""Wall-clock limit of one run; a sanitizer slows a kernel ten to a hundred times."""

_OURS = "--kernel-name=regex=^_[a-z0-9_]+_kernel$"
"""Kernels that are called as this workbook's are; a planted one is too, so a filter that lets nothing through shows."""

OPTIONS: Mapping[Tool, tuple[str, ...]] = {
    "memcheck": (_OURS,),
    # The flag lets racecheck follow a hand-over through several barriers: warps that meet at one of theirs, and a
    # thread of them that arrives for all at the next.
    "racecheck": (_OURS, "--racecheck-indirect-barrier-dependency"),
}
"""What each tool is run with; an `Inspection` says so too."""

_SUMMARY = {
    "memcheck": re.compile(r"^=+ ERROR SUMMARY: (?P<errors>\d+) errors?", re.MULTILINE),
    "racecheck": re.compile(
        r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)",
        re.MULTILINE,
    ),
}
_PLACE = re.compile(
    r"\bat (?:\w+: )?(?P<kernel>[\w:<>~, ]+?(?:\([^)]*\))?)\+0x[0-9a-f]+(?: in (?P<place>[\w./-]+:\d+))?"
)


@dataclass(frozen=True)
class Report:
    """What a tool printed: its own totals, and its reports by kernel and source lines."""

    errors: int
    warnings: int
    findings: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One tool's run over the calls that the gate compares, on one case.

    `errors` and `warnings` are the tool's totals; `findings` counts its reports by kernel and source lines, and
    `control` those of the error planted for it before. `options` is what the tool was run with, `tool_version` the
    program's own. The other fields are those of a `records.Record`.

    Raises: ValueError or TypeError naming the field, what it holds and what is expected.
    """

    chapter: str
    case: str
    tool: str
    errors: int
    warnings: int
    findings: Mapping[str, int]
    control: int
    options: str
    tool_version: str
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
    run: str
    kind: str = "sanitizer"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        lines.check_types(self)
        lines.check_fixed(self, kind="sanitizer", schema=SCHEMA)
        lines.check_keys(self, "chapter", "device")
        check_tool(self.tool)
        lines.check_least(self, 0, "errors", "warnings", "seed")
        lines.check_least(self, 1, "control")
        if bool(self.findings) != bool(self.errors + self.warnings):
            raise ValueError(
                f"findings: got {len(self.findings)} places beside {self.errors} errors and {self.warnings} warnings, "
                "expected places exactly where the tool reports something"
            )
        lines.utc("date", self.date)
        lines.check_sources(self)

    @property
    def clean(self) -> bool:
        """True if the tool reports nothing."""
        return not self.errors and not self.warnings


def check_tool(tool: str) -> None:
    """ValueError unless `tool` is one of `TOOLS`."""
    if tool not in TOOLS:
        raise ValueError(f"tool: got {tool!r}, expected one of {', '.join(TOOLS)}")


def tools(names: Iterable[str]) -> tuple[Tool, ...]:
    """The named tools in the order of `TOOLS`, all of them if none is named. Raises as `check_tool`."""
    chosen = set(names)
    for name in sorted(chosen):
        check_tool(name)
    return tuple(tool for tool in TOOLS if not chosen or tool in chosen)


# ---- files ----


def write(path: Path, inspections: Iterable[Inspection]) -> None:
    """Append to a file of inspections. Raises as `lines.append`."""
    lines.append(path, inspections, Inspection)


def shipped() -> tuple[Inspection, ...]:
    """The inspections that came with the package. Raises as `lines.read_folder`."""
    return lines.shipped("sanitizer", Inspection)


def latest(inspections: Iterable[Inspection]) -> tuple[Inspection, ...]:
    """The newest inspection of each (chapter, case, tool, device); of equal dates the one that comes last."""
    newest: dict[tuple[str, str, str, str], Inspection] = {}
    for one in inspections:
        key = (one.chapter, one.case, one.tool, one.device)
        if key not in newest or lines.utc("date", one.date) >= lines.utc("date", newest[key].date):
            newest[key] = one
    return tuple(newest.values())


# ---- the tool ----


def require_program() -> str:
    """Where compute-sanitizer is; RuntimeError if it is not on PATH."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise RuntimeError(f"sanitize: expected {PROGRAM} on PATH, which comes with the CUDA toolkit, and found none")
    return found


def version() -> str:
    """The program's version, from its own words."""
    said = subprocess.run([require_program(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"[Vv]ersion\s+(\d+(?:\.\d+)+)", said)
    if found is None:
        raise RuntimeError(f"{PROGRAM} --version: got {said.strip()!r}, expected a version")
    return found.group(1)


def parse(tool: Tool, text: str) -> Report:
    """Read what a tool printed.

    Args:
        tool: which one it was.
        text: its whole output.

    Returns:
        Its totals, and a count of its reports by kernel and source lines: "kernel, file.py:12 and file.py:30" for the
        two accesses of a race, "no kernel" for a report that names none.

    Raises:
        ValueError: there is no summary, so the run did not end well; the tool's last line is quoted.
    """
    check_tool(tool)
    summary = _SUMMARY[tool].search(text)
    if summary is None:
        said = [line.strip("= \t") for line in text.splitlines() if line.strip("= \t")]
        raise ValueError(f"{tool}: no summary in its output, expected one; it ends with {said[-1] if said else ''!r}")
    totals = {name: int(count) for name, count in summary.groupdict().items()}
    findings: Counter[str] = Counter()
    for block in _blocks(text[: summary.start()]):
        places = list(_PLACE.finditer(block))
        kernel = places[0]["kernel"].strip() if places else "no kernel"
        where = dict.fromkeys(found["place"].rsplit("/", 1)[-1] for found in places if found["place"])
        findings[f"{kernel}, {' and '.join(where)}" if where else kernel] += 1
    return Report(totals["errors"], totals.get("warnings", 0), dict(findings))


def _blocks(text: str) -> list[str]:
    """The tool's reports: each begins with a line that is not indented, and goes on indented."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        said = line.removeprefix("=========")
        if not said.strip() or "COMPUTE-SANITIZER" in said:
            continue
        if not said.startswith("  "):
            if said.startswith(" Target application"):  # what the error did to the process
                break
            found.append([])
        if found:
            found[-1].append(said)
    return ["\n".join(block) for block in found]


def inspect(tool: Tool, command: Sequence[str]) -> Report:
    """Run a command under a tool.

    Args:
        tool: one of `TOOLS`.
        command: a program and its arguments; it has to end well unless the tool reports errors.

    Raises:
        RuntimeError: no compute-sanitizer, the run took longer than `TIMEOUT_S`, it ended without the tool's summary,
            or it failed although the tool reports nothing.
    """
    check_tool(tool)
    # Every allocation its own: in a pooled one an access past a tensor's end stays inside the pool.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    arguments = [require_program(), "--tool", tool, *OPTIONS[tool], *command]
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{tool}: no end after {TIMEOUT_S:.0f} s of {' '.join(command[1:])}") from error
    last = (done.stderr.strip().splitlines() or [""])[-1]
    try:
        report = parse(tool, done.stdout + done.stderr)
    except ValueError as error:
        raise RuntimeError(f"{error}; stderr ends with {last!r}") from error
    if done.returncode and not report.errors:
        raise RuntimeError(f"{tool}: {' '.join(command[1:])} failed (exit {done.returncode}): {last}")
    return report


# ---- the control: an error of each tool's kind ----

_PLANTED: Mapping[str, str] = {
    "memcheck": """
extern "C" __global__ void _planted_memcheck_kernel(int* out) { out[64 + threadIdx.x] = threadIdx.x; }
""",
    "racecheck": """
extern "C" __global__ void _planted_racecheck_kernel(int* out) {
  __shared__ int passed_on[64];
  passed_on[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = passed_on[63 - threadIdx.x];  // another warp's, and nothing between store and load
}
""",
}


def planted(tool: Tool) -> int:
    """Run the error planted for a tool under it.

    Returns:
        How many errors and warnings the tool reports of it.

    Raises:
        RuntimeError: it reports none, so its silence about other kernels would mean nothing; or as `inspect`.
    """
    report = inspect(tool, [sys.executable, "-m", "dsv4ref.evidence.sanitizer", tool])
    if not any(place.startswith(_planted_name(tool)) for place in report.findings):
        raise RuntimeError(f"{tool}: it does not report the error planted for it, so nothing it says here counts")
    return report.errors + report.warnings


def _planted_name(tool: str) -> str:
    return f"_planted_{tool}_kernel"


def _run_planted(tool: str) -> None:
    import torch

    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    kernel = torch.cuda._compile_kernel(_PLANTED[tool], _planted_name(tool))
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[out])
    torch.cuda.synchronize()


if __name__ == "__main__":
    check_tool(sys.argv[1])
    _run_planted(sys.argv[1])
