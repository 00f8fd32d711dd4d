"""What ncu prints, read back: one launch per row, units held, and what is missing refused by name.

`ncu_raw.csv` is the raw page of a run on an H200, chapter 18 at 1024 rows, cut down to the columns that are read and
two others; kernels are named by their functions. `emulated_ncu` stands in for the program, which needs a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.evidence import lines, profiles
from dsv4ref.evidence.profiles import Profile

RAW = (Path(__file__).parent / "ncu_raw.csv").read_text(encoding="utf-8")
WHERE: dict[str, Any] = {
    "chapter": "split_k_decode",
    "case": "flash-1024",
    "tool_version": "2025.3.1.0",
    "gate": "passed",
    "device": "h200",
    "device_name": "NVIDIA H200",
    "driver": "580.159.03",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "python": "3.12.3",
    "mode": "compiled",
    "date": "2026-01-31T12:00:00+00:00",
    "commit": "0" * 40,
    "seed": 0,
    "sources": {"dsv4ref.evidence.lines": "ab" * 32},
    "peers": None,
    "run": "20260131T120000Z-abc123",
}
LAUNCHES = profiles.parse(RAW)


def profile(number: int, **changes: Any) -> Profile:
    fields = {
        "variant": str(LAUNCHES[number].variant),
        "launch": 0,
        **WHERE,
        **profiles.profile_fields(LAUNCHES[number]),
    }
    return Profile(**(fields | changes))


PORTABLE, HOPPER, PEER, COMBINE = (profile(number) for number in range(4))


# ---- reading ----


def test_each_row_is_a_launch_of_its_range() -> None:
    assert [(one.variant, one.kernel, one.grid, one.block) for one in LAUNCHES] == [
        (0, "_split_k_decode_kernel", "(1, 1024, 1)", "(256, 1, 1)"),
        (1, "_hopper_decode_kernel", "(132, 1, 1)", "(384, 1, 1)"),
        (2, "flash_fwd_splitkv_mla_fp8_sparse_kernel", "(1, 1, 132)", "(384, 1, 1)"),
        (2, "flash_fwd_mla_combine_kernel", "(1024, 1, 8)", "(256, 1, 1)"),
    ]


def test_counters_come_in_the_profiles_units() -> None:
    assert (PORTABLE.us, PORTABLE.registers, PORTABLE.shared_bytes, PORTABLE.warps_per_sm) == (508.32, 255, 140_288, 8)
    assert (PORTABLE.spill_requests, PORTABLE.store_conflicts, PORTABLE.store_wavefronts) == (
        1_245_184,
        5_924_960,
        14_046_680,
    )
    assert (HOPPER.tensor_percent, HOPPER.issue_percent, HOPPER.dram_percent) == (23.64, 26.11, 31.98)
    assert PORTABLE.conflict_percent == pytest.approx(42.18, abs=0.01)
    assert COMBINE.conflict_percent == 0.0  # it stores nothing to shared memory


def test_stalls_are_shares_of_a_warps_cycles() -> None:
    total = sum(HOPPER.stalls.values())
    assert total == pytest.approx(HOPPER.cycles_per_instruction, abs=0.1)
    assert HOPPER.waits(2) == (
        ("long_scoreboard", pytest.approx(100 * 5.71 / total)),
        ("short_scoreboard", pytest.approx(100 * 1.04 / total)),
    )
    assert PEER.waits(1)[0][0] == "barrier"
    assert "selected" not in [name for name, _ in PORTABLE.waits(99)]


def test_a_unit_below_the_line_does_not_limit_a_kernel() -> None:
    assert HOPPER.busiest == ("L2", 47.45)
    assert HOPPER.limit == "waiting (long_scoreboard, 53 % of a warp's cycles); no unit is above 47 % (L2)"
    assert replace(HOPPER, dram_percent=61.0).limit == "device memory, at 61 % of its peak"


def test_the_same_sums_keep_the_tensor_pipe_busy_for_the_same_time() -> None:
    """The three kernels make the same products, so a counter that named another unit would show here."""
    busy = [one.us * one.tensor_percent / 100 for one in (PORTABLE, HOPPER, PEER)]
    assert max(busy) / min(busy) < 1.02, busy


# ---- refusals ----


def edited(old: str, new: str, count: int = 1) -> str:
    assert old in RAW
    return RAW.replace(old, new, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ncu: expected a table with at least one launch; it says ''"),
        ("==ERROR== The user does not have permission\n", "it says '==ERROR== The user does not have permission'"),
        ("\n".join(RAW.splitlines()[:-4]) + "\n", "expected a table with at least one launch"),
        (edited("launch__registers_per_thread", "registers"), "expected a column 'launch__registers_per_thread'"),
        (edited('"register/thread"', '"register"'), "launch__registers_per_thread: got the unit 'register', expected"),
        (edited('"508,320"', '"n/a"'), "_split_k_decode_kernel: gpu__time_duration.sum: got 'n/a', expected a number"),
        (edited("dsv4ref-variant-1", "elsewhere"), "_hopper_decode_kernel: got the ranges .*elsewhere.*, expected one"),
    ],
)
def test_what_is_missing_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profiles.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"us": 0.0}, "us, cycles_per_instruction: got 0.0"),
        ({"registers": -1}, "registers: got -1, expected at least 0"),
        ({"l2_hit_percent": float("nan")}, "l2_hit_percent: got nan, expected a finite number"),
        ({"stalls": {"barrier": 1.0}}, "stalls: their sum is 1.0, expected cycles_per_instruction, which is 10.75"),
        ({"stalls": {"barrier": float("inf")}}, r"stalls\['barrier'\]: got inf, expected a finite number"),
        ({"gate": "failed"}, "gate: got 'failed', expected 'passed'"),
        ({"sources": {}}, "sources: got no modules"),
    ],
)
def test_a_line_that_cannot_be_true_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HOPPER, **changes)


# ---- lines ----


def test_profiles_come_back_equal(tmp_path: Path) -> None:
    profiles.write(tmp_path / "h200" / "split_k_decode.jsonl", [PORTABLE, HOPPER])
    assert lines.read_folder(tmp_path, Profile) == (PORTABLE, HOPPER)


def test_a_profile_is_no_record(tmp_path: Path) -> None:
    from dsv4ref.evidence import records

    profiles.write(tmp_path / "some.jsonl", [PORTABLE])
    with pytest.raises(ValueError, match="kind: got 'profile', expected 'measured'"):
        records.read(tmp_path / "some.jsonl")
    with pytest.raises(TypeError, match=r"got \['Profile'\], expected only Record or only PublishedFigure"):
        records.write(tmp_path / "some.jsonl", [PORTABLE])  # type: ignore[arg-type]


def test_latest_keeps_all_launches_of_the_newest_run() -> None:
    later: dict[str, Any] = {"date": "2026-01-31T13:00:00+00:00", "run": "later"}
    new = [replace(PEER, **later), replace(COMBINE, launch=1, **later)]
    assert profiles.latest([PEER, COMBINE, PORTABLE, *new]) == (*new, PORTABLE)


# ---- the program ----


@pytest.fixture
def emulated_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a program of that name on PATH that keeps its arguments and writes a text where --log-file says."""

    def install(text: str, status: int = 0) -> Path:
        (tmp_path / "says").write_text(text)
        program = tmp_path / profiles.PROGRAM
        program.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n'
            'while [ "$1" != --log-file ]; do shift; done\n'
            f'cat {tmp_path}/says > "$2"\nexit {status}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "arguments"

    return install


def test_a_run_gives_the_launches_and_leaves_the_clocks_alone(emulated_ncu: Callable[..., Path]) -> None:
    arguments = emulated_ncu(RAW)
    assert profiles.collect([sys.executable, "-m", "some.module"]) == LAUNCHES
    said = arguments.read_text()
    assert said.endswith(f"{sys.executable} -m some.module\n")
    assert "--clock-control none --profile-from-start off --nvtx" in said


def test_a_run_that_fails_quotes_ncu(emulated_ncu: Callable[..., Path]) -> None:
    emulated_ncu("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM\n==PROF== Disconnected\n", 1)
    with pytest.raises(RuntimeError, match=r"ncu: -m some.module failed \(exit 1\): ==ERROR== ERR_NVGPUCTRPERM"):
        profiles.collect([sys.executable, "-m", "some.module"])


def test_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="expected ncu on PATH, which comes with NVIDIA Nsight Compute"):
        profiles.collect([sys.executable])
