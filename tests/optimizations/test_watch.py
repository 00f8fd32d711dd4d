"""Chapters under NVIDIA's tools: one line per launch and per run, nothing behind a red gate, no variant unseen.

The tools need a GPU: here `emulated_tools` answers in their place, and one test asks the real ones where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref.evidence import lines, profiles, sanitizer, timing
from dsv4ref.evidence.profiles import Launch, Profile
from dsv4ref.evidence.sanitizer import Inspection, Report, Tool
from dsv4ref.optimizations import catalogue, watch, watched
from dsv4ref.optimizations.base import verify
from dsv4ref.optimizations.measure import RedGateError

OPT = catalogue.get("split_k_decode")
TIMED = ("baseline", "optimized", "peer: FlashMLA")


def launch(variant: int, kernel: str) -> Launch:
    metrics = dict.fromkeys(profiles.METRICS, 10.0)
    return Launch(variant, kernel, "(132, 1, 1)", "(384, 1, 1)", metrics, {"long_scoreboard": 6.0, "selected": 4.0})


class Tools:
    """What the emulated tools saw and say."""

    launches: Sequence[Launch] = (launch(0, "_partial"), launch(0, "_reduce"), launch(1, "_partial"))
    report = Report(0, 0, {})
    commands: Sequence[list[str]] = ()
    planted: Sequence[str] = ()


@pytest.fixture
def emulated_tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    tools = Tools()

    def collect(command: list[str]) -> list[Launch]:
        tools.commands = [*tools.commands, command]
        return list(tools.launches)

    def inspect(tool: Tool, command: list[str]) -> Report:
        tools.commands = [*tools.commands, command]
        return tools.report

    def planted(tool: Tool) -> int:
        tools.planted = [*tools.planted, tool]
        return 1

    monkeypatch.setattr(timing, "require_gpu", lambda caller: None)
    monkeypatch.setattr(watch, "verify", lambda opt, case, device, seed: verify(opt, case, device="cpu", seed=seed))
    monkeypatch.setattr(watched, "variants_of", lambda chapter, case, seed: TIMED)
    monkeypatch.setattr(profiles, "version", lambda: "0.emulated")
    monkeypatch.setattr(profiles, "collect", collect)
    monkeypatch.setattr(sanitizer, "version", lambda: "0.emulated")
    monkeypatch.setattr(sanitizer, "inspect", inspect)
    monkeypatch.setattr(sanitizer, "planted", planted)
    return tools


def profile(tmp_path: Path, **options: Any) -> list[Profile]:
    return list(watch.profile(OPT, ["tiny"], tmp_path, seed=3, **options))


# ---- profiles ----


def test_each_launch_is_a_line_of_its_variant(emulated_tools: Tools, tmp_path: Path) -> None:
    found = profile(tmp_path, variants=("optimized", "peer: FlashMLA"))
    assert [(one.variant, one.launch, one.kernel) for one in found] == [
        ("optimized", 0, "_partial"),
        ("optimized", 1, "_reduce"),
        ("peer: FlashMLA", 0, "_partial"),
    ]
    assert {(one.case, one.seed, one.gate, one.tool_version) for one in found} == {("tiny", 3, "passed", "0.emulated")}
    assert set(found[0].sources) == set(OPT.measured_modules)
    assert lines.read_folder(tmp_path, Profile) == tuple(found)
    (command,) = emulated_tools.commands
    assert command[2:] == [
        "dsv4ref.optimizations.watched", "timed", OPT.id, "tiny", "3", "optimized", "peer: FlashMLA",
    ]  # fmt: skip


def test_a_variant_without_a_launch_is_refused(emulated_tools: Tools, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="tiny: ncu saw no launch of peer: FlashMLA"):
        profile(tmp_path)
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_an_unknown_variant_or_case_is_refused(emulated_tools: Tools, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant: got glue, expected some of baseline, optimized, peer: FlashMLA"):
        profile(tmp_path, variants=("glue",))
    with pytest.raises(ValueError, match="case: got 'huge'"):
        list(watch.profile(OPT, ["huge"], tmp_path, seed=0))
    assert list(emulated_tools.commands) == []


def test_behind_a_red_gate_nothing_is_profiled(emulated_tools: Tools, tmp_path: Path) -> None:
    hazard = OPT.hazards["base-2"]
    broken = dataclasses.replace(OPT, optimized=hazard.planted)
    with pytest.raises(RedGateError, match=f"{OPT.id}/{hazard.case}: "):
        list(watch.profile(broken, [hazard.case], tmp_path, seed=0))
    assert list(emulated_tools.commands) == []
    assert list(tmp_path.rglob("*.jsonl")) == []


# ---- sanitizers ----


def test_each_tool_says_a_line_per_tiny_case_behind_its_control(emulated_tools: Tools, tmp_path: Path) -> None:
    emulated_tools.report = Report(1, 0, {"a kernel": 1})
    found = list(watch.sanitize(OPT, [], tmp_path, seed=3))
    tiny = [case.name for case in OPT.cases.values() if case.tiny]
    assert [(one.tool, one.case) for one in found] == [(tool, case) for tool in sanitizer.TOOLS for case in tiny]
    assert list(emulated_tools.planted) == list(sanitizer.TOOLS)
    assert {tuple(command[2:]) for command in emulated_tools.commands} == {
        ("dsv4ref.optimizations.watched", "gate", OPT.id, case, "3") for case in tiny
    }
    assert lines.read_folder(tmp_path, Inspection) == tuple(found)


def test_named_cases_and_tools_only(emulated_tools: Tools, tmp_path: Path) -> None:
    (one,) = watch.sanitize(OPT, ["tiny-ragged"], tmp_path, seed=0, tools=["racecheck"])
    assert (one.case, one.tool, one.clean) == ("tiny-ragged", "racecheck", True)
    with pytest.raises(ValueError, match="tool: got 'leakcheck'"):
        list(watch.sanitize(OPT, [], tmp_path, seed=0, tools=["leakcheck"]))


# ---- the real ones ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs ncu on a GPU")
def test_ncu_sees_the_launches_of_a_variant(tmp_path: Path) -> None:
    try:
        profiles.require_program()
    except RuntimeError as error:
        pytest.skip(str(error))
    found = profile(tmp_path, variants=("optimized",))
    assert {one.variant for one in found} == {"optimized"}
    assert all(one.registers > 0 for one in found)
