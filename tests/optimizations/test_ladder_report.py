"""A ladder's report as it ships: read back, refused where it is none, and held against its sources and bars."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.evidence import records
from dsv4ref.optimizations import ladder_report
from dsv4ref.optimizations.ladder_benchmark import MEASURED_MODULES
from dsv4ref.show import tables


def rung(name: str, tpot_ms: float, speedup: float | None, floor: float = 0.001) -> dict[str, Any]:
    ci = None if speedup is None else [0.99 * speedup, 1.01 * speedup]
    return {
        "rung": name, "gate": "green", "tok_s": 32e3 / tpot_ms, "tpot_ms": tpot_ms, "p99_ms": None, "verdict": "",
        "speedup": speedup, "speedup_ci": ci, "noise_floor": floor, "rounds": 20, "change": None, "sign": 1, "note": "",
    }  # fmt: skip


def looked(name: str, launches: int, percent: float | None) -> dict[str, Any]:
    ms = None if percent is None else percent / 10
    keys = ("device_ms", "engine_bytes", "step_bytes")
    return {"rung": name, "launches": launches, "host_ms": ms, "host_percent": percent, "note": ""} | dict.fromkeys(
        keys
    )


@pytest.fixture
def report() -> dict[str, Any]:
    rungs = [
        rung("everything off", 800.0, None), rung("+ device_step", 40.0, 20.0, 0.004),
        rung("+ captured_steps", 10.0, 80.0, 0.002),
    ]  # fmt: skip
    inside = [
        looked("everything off", 9000, 50.0),
        looked("+ device_step", 900, 60.0),
        looked("+ captured_steps", 901, 1.5),
    ]
    metadata = [
        {"batch": 64, "step": kind, "host_us": us, "host_us_ci": [us, us], "launches": count, "loads": 0.0}
        for kind, us, count in (("steady", 20.0, 0), ("another row", 90.0, 6))
    ]  # fmt: skip
    share = {"median": 1.5, "low": 1.25, "high": 1.75}
    return {
        "benchmark": {"name": "h200-short"},
        "where": {"device": "h200", "sources": records.hash_sources(MEASURED_MODULES)},
        "complete": True,
        "rungs": {"order": rungs, "reverse": rungs[:1]},
        "contributions": [{"switch": "device_step", "left out": share}],
        "inside": inside, "captures": [], "traces": [], "metadata": metadata,
        "soak": {"mark": 100, "steps": 2000, "growth": 0, "lost": 0}, "gates": {},
    }  # fmt: skip


def test_a_report_comes_back_and_anything_else_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(report))
    assert ladder_report.read_report(path) == report
    del report["soak"]
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"h200.json: no soak, expected a ladder's report"):
        ladder_report.read_report(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"h200.json: no benchmark, where"):
        ladder_report.read_report(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"h200.json: expected one JSON object"):
        ladder_report.read_report(path)


def test_a_report_is_stale_once_a_source_has_changed_gone_or_come(report: dict[str, Any]) -> None:
    assert not ladder_report.is_stale(report)
    for change in ({"dsv4ref.serving.engine": "0" * 64}, {"dsv4ref.serving.gone": "0" * 64}):
        changed = copy.deepcopy(report)
        changed["where"]["sources"] |= change
        assert ladder_report.is_stale(changed), change
    del report["where"]["sources"]["dsv4ref.serving.engine"]
    assert ladder_report.is_stale(report)


def test_a_rung_has_its_times_and_what_was_counted_inside_it(report: dict[str, Any]) -> None:
    rows = ladder_report.figures(report)
    assert [(row["rung"], row["launches"], row["host_percent"]) for row in rows] == [
        ("everything off", 9000, 50.0), ("+ device_step", 900, 60.0), ("+ captured_steps", 901, 1.5),
    ]  # fmt: skip
    assert [row["tok_s"] for row in rows] == pytest.approx([40, 800, 3200])
    assert ladder_report.figures(report, "reverse")[0]["launches"] is None
    with pytest.raises(ValueError, match="order: got 'sideways', expected one of order, reverse"):
        ladder_report.figures(report, "sideways")
    assert "901" in tables.table(rows, tables.RUNGS).html


def test_headlines_put_every_figure_beside_its_bar(report: dict[str, Any]) -> None:
    found = {row["figure"]: (row["value"], row["bar"]) for row in ladder_report.headlines(report)}
    assert found["everything on against everything off"][0] == "80.00x [79.20, 80.80]"
    assert found["the last eager rung against everything off"][0] == "20.00x [19.80, 20.20]"
    assert found["A/A noise floor, everything off"] == ("0.100 %", "at most 0.3 %")
    assert found["A/A noise floor, everything on"] == ("0.200 %", "at most 0.3 %")
    assert found["host share of a replayed step"] == ("1.50 %", "below 5 %")
    assert found["metadata of a steady step, 64 rows: launches"] == ("0 in 20.0 us of the host", "0")
    assert found["growth of an empty engine, steps 100 to 2000"] == ("0 bytes, 0 blocks lost", "0")


def test_headlines_of_a_ladder_that_begins_with_switches_on_are_held_against_them(report: dict[str, Any]) -> None:
    first, last = report["rungs"]["order"][1:]
    report["rungs"]["order"] = [{**first, "rung": "everything up to device_step", "speedup": None}, last]
    report["inside"] = [{**report["inside"][1], "rung": "everything up to device_step"}, report["inside"][2]]
    report["soak"] = None
    assert not ladder_report.begins_with_everything_off(report)
    found = [row["figure"] for row in ladder_report.headlines(report)]
    assert found[:3] == [
        "everything on against everything up to device_step",
        "A/A noise floor, everything up to device_step",
        "A/A noise floor, everything on",
    ]
    assert not any("everything off" in figure or "empty engine" in figure for figure in found)


def record(case: str, variant: str) -> records.Record:
    shipped = next(r for r in records.shipped() if r.chapter == "attribution_ladder")
    return dataclasses.replace(shipped, case=case, variant=variant)


def test_a_run_is_adopted_over_the_last_one_of_its_preset_and_no_other(report: dict[str, Any], tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    target = data / "records" / "h200" / "attribution_ladder.jsonl"
    records.write(target, [record("h200-short", "old"), record("h200-slice", "kept")])
    records.write(out / "records" / "h200" / "attribution_ladder.jsonl", [record("h200-short", "new")])
    (out / "report.json").write_text(json.dumps(report))
    ladder_report.adopt(out, data)
    ladder_report.adopt(out, data)
    assert [r.variant for r in records.read(target)] == ["kept", "new"]
    assert ladder_report.read_report(data / "ladders" / "h200" / "h200-short.json") == report
    report["benchmark"]["name"] = "h200-slice"
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="its records are not of h200-slice, of which its report is"):
        ladder_report.adopt(out, data)
    assert [r.variant for r in records.read(target)] == ["kept", "new"]


def test_contributions_are_texts_with_their_intervals(report: dict[str, Any]) -> None:
    assert ladder_report.contribution_texts(report) == [{"switch": "device_step", "left out": "+1.50 [+1.25, +1.75]"}]


def test_what_ships_is_of_the_device_that_it_is_named_after_and_has_records() -> None:
    for (device, name), shipped in ladder_report.shipped_reports().items():
        lines = [r for r in records.shipped() if (r.chapter, r.case, r.device) == ("attribution_ladder", name, device)]
        assert shipped["complete"]
        assert len(lines) == len(shipped["rungs"]["order"])
