"""What compute-sanitizer prints, read back: totals, kernels, lines; and runs that do not count are refused.

The texts are cut down from runs on an H200. `emulated_sanitizer` stands in for the program, which needs a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref.evidence import lines, sanitizer
from dsv4ref.evidence.sanitizer import Inspection

RACES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at _hopper_decode_kernel+0x1a30 in hopper_kernel.py:443
=========     and Write access at _hopper_decode_kernel+0xf1a0 in hopper_kernel.py:336 [1024 hazards]
=========
========= Error: Race reported between Read access at _hopper_decode_kernel+0x1a40 in hopper_kernel.py:443
=========     and Write access at _hopper_decode_kernel+0xf1b0 in hopper_kernel.py:336 [1024 hazards]
=========
========= Error: Race reported between Read access at _hopper_decode_kernel+0x170 in hopper_kernel.py:456
=========     and Write access at _hopper_decode_kernel+0x9ed0 in hopper_kernel.py:456 [14 hazards]
=========     and Write access at _hopper_decode_kernel+0x10ba0 in hopper_kernel.py:530 [7 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"

INSPECTION = Inspection(
    chapter="split_k_decode",
    case="tiny",
    tool="racecheck",
    errors=3,
    warnings=0,
    findings={"_hopper_decode_kernel, hopper_kernel.py:443 and hopper_kernel.py:336": 3},
    control=1,
    options="none",
    tool_version="2025.3.1.0",
    device="h200",
    device_name="NVIDIA H200",
    driver="580.159.03",
    torch="2.11.0+cu130",
    triton="3.6.0",
    python="3.12.3",
    mode="compiled",
    date="2026-01-31T12:00:00+00:00",
    commit="0" * 40,
    seed=0,
    sources={"dsv4ref.evidence.lines": "ab" * 32},
    run="20260131T120000Z-abc123",
)


# ---- reading ----


def test_races_are_counted_by_kernel_and_lines() -> None:
    report = sanitizer.parse("racecheck", RACES)
    assert (report.errors, report.warnings) == (3, 0)
    assert report.findings == {
        "_hopper_decode_kernel, hopper_kernel.py:443 and hopper_kernel.py:336": 2,
        "_hopper_decode_kernel, hopper_kernel.py:456 and hopper_kernel.py:530": 1,
    }


def test_a_clean_run_has_no_findings() -> None:
    assert sanitizer.parse("memcheck", CLEAN) == sanitizer.Report(0, 0, {})


@pytest.mark.parametrize(
    ("text", "ends"),
    [("", "''"), ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", "Device not supported")],
)
def test_without_a_summary_nothing_is_known(text: str, ends: str) -> None:
    with pytest.raises(ValueError, match=f"memcheck: no summary in its output, expected one; it ends with .*{ends}"):
        sanitizer.parse("memcheck", text)


def test_one_tools_summary_is_not_anothers() -> None:
    with pytest.raises(ValueError, match="racecheck: no summary"):
        sanitizer.parse("racecheck", CLEAN)


def test_unknown_tool_is_refused() -> None:
    with pytest.raises(ValueError, match="tool: got 'leakcheck', expected one of memcheck, racecheck"):
        sanitizer.tools(["memcheck", "leakcheck"])
    assert sanitizer.tools(["racecheck"]) == ("racecheck",)
    assert sanitizer.tools([]) == ("memcheck", "racecheck")


# ---- lines ----


def test_inspections_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "h200" / "split_k_decode.jsonl"
    clean = replace(INSPECTION, tool="memcheck", errors=0, findings={})
    sanitizer.write(path, [INSPECTION, clean])
    assert lines.read_folder(tmp_path, Inspection) == (INSPECTION, clean)
    assert (INSPECTION.clean, clean.clean) == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": 0}, "control: got 0, expected at least 1"),
        ({"findings": {}}, "findings: got 0 places beside 3 errors"),
        ({"errors": 0}, "findings: got 1 places beside 0 errors"),
        ({"tool": "synccheck"}, "tool: got 'synccheck', expected one of"),
        ({"errors": -1}, "errors: got -1, expected at least 0"),
        ({"sources": {}}, "sources: got no modules"),
        ({"date": "2026-01-31"}, "date: got .*, expected a time in UTC"),
    ],
)
def test_a_line_that_says_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(INSPECTION, **changes)


def test_findings_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"findings: got .* expected a mapping of text to whole numbers"):
        replace(INSPECTION, findings={"a kernel": 1.5})  # type: ignore[dict-item]


def test_latest_keeps_the_newest_of_each_tool_and_case() -> None:
    later = replace(INSPECTION, date="2026-01-31T13:00:00+00:00", errors=1)
    other = replace(INSPECTION, case="tiny-ragged")
    assert sanitizer.latest([later, INSPECTION, other]) == (later, other)


# ---- the program ----


@pytest.fixture
def emulated_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """Put a program of that name on PATH that keeps its arguments, prints a text and exits with a status."""

    def install(text: str, status: int = 0) -> Path:
        (tmp_path / "says").write_text(text)
        program = tmp_path / sanitizer.PROGRAM
        program.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n'
            f"echo $PYTORCH_NO_CUDA_MEMORY_CACHING >> {tmp_path}/arguments\ncat {tmp_path}/says\nexit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "arguments"

    return install


def test_a_run_gives_the_tools_word_and_pools_no_memory(emulated_sanitizer: Callable[..., Path]) -> None:
    arguments = emulated_sanitizer(RACES, 0)
    assert sanitizer.inspect("racecheck", [sys.executable, "-m", "some.module"]).errors == 3
    assert arguments.read_text().splitlines() == [
        f"--tool racecheck {' '.join(sanitizer.OPTIONS['racecheck'])} {sys.executable} -m some.module",
        "1",
    ]


def test_a_run_that_fails_on_its_own_is_not_clean(emulated_sanitizer: Callable[..., Path]) -> None:
    emulated_sanitizer(CLEAN, 1)
    with pytest.raises(RuntimeError, match=r"memcheck: -m some.module failed \(exit 1\)"):
        sanitizer.inspect("memcheck", [sys.executable, "-m", "some.module"])


def test_a_run_that_fails_for_what_the_tool_reports_counts(emulated_sanitizer: Callable[..., Path]) -> None:
    emulated_sanitizer(RACES, 1)
    assert sanitizer.inspect("racecheck", [sys.executable]).errors == 3


def test_a_run_without_a_summary_is_refused(emulated_sanitizer: Callable[..., Path]) -> None:
    emulated_sanitizer("========= Error: Device not supported\n", 0)
    with pytest.raises(RuntimeError, match=r"memcheck: no summary .* 'Error: Device not supported'"):
        sanitizer.inspect("memcheck", [sys.executable])


def test_silence_about_the_planted_error_is_refused(emulated_sanitizer: Callable[..., Path]) -> None:
    emulated_sanitizer(CLEAN, 0)
    with pytest.raises(RuntimeError, match="memcheck: it does not report the error planted for it"):
        sanitizer.planted("memcheck")
    emulated_sanitizer(RACES, 0)  # errors, but of another kernel
    with pytest.raises(RuntimeError, match="racecheck: it does not report the error planted for it"):
        sanitizer.planted("racecheck")


def test_version_is_the_programs_own(emulated_sanitizer: Callable[..., Path]) -> None:
    emulated_sanitizer("NVIDIA (R) Compute Sanitizer\nVersion 2025.3.1.0 (build 1)\n")
    assert sanitizer.version() == "2025.3.1.0"
    emulated_sanitizer("who knows\n")
    with pytest.raises(RuntimeError, match="got 'who knows', expected a version"):
        sanitizer.version()


def test_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="expected compute-sanitizer on PATH"):
        sanitizer.inspect("memcheck", [sys.executable])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs compute-sanitizer on a GPU")
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_each_tool_finds_the_error_planted_for_it(tool: sanitizer.Tool) -> None:
    try:
        sanitizer.require_program()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert sanitizer.planted(tool) >= 1
