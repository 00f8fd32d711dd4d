"""What a page says of profiles and sanitizer runs: the longest launch, factors that multiply, nothing if none ship."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsv4ref.evidence import profiles, records, sanitizer
from dsv4ref.evidence.profiles import Profile
from dsv4ref.evidence.sanitizer import Inspection
from dsv4ref.optimizations import catalogue, watch_report

OPT = catalogue.get("split_k_decode")

SLOW = Profile(
    chapter=OPT.id,
    case="flash-1024",
    variant="optimized",
    launch=0,
    kernel="_split_k_decode_kernel",
    grid="(1024, 1, 1)",
    block="(256, 1, 1)",
    us=500.0,
    registers=255,
    shared_bytes=200_000,
    warps_per_sm=8.0,
    spill_requests=1000,
    tensor_percent=14.0,
    issue_percent=20.0,
    dram_percent=25.0,
    l2_percent=30.0,
    l1_percent=35.0,
    l2_hit_percent=40.0,
    store_conflicts=42,
    store_wavefronts=100,
    cycles_per_instruction=10.0,
    stalls={"long_scoreboard": 5.0, "barrier": 2.5, "wait": 1.5, "selected": 1.0},
    tool_version="2025.3.1.0",
    gate="passed",
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
    sources=records.hash_sources(["dsv4ref.evidence.lines"]),
    peers=None,
    run="20260131T120000Z-abc123",
)
FAST = replace(SLOW, variant="gluon", kernel="_hopper_decode_kernel", us=250.0, tensor_percent=28.0, issue_percent=25.0)
TAIL = replace(SLOW, launch=1, kernel="_reduce_splits_kernel", us=20.0, dram_percent=75.0)
SAID = Inspection(
    **{name: getattr(SLOW, name) for name in records.Provenance.__annotations__},
    chapter=OPT.id,
    case="tiny",
    tool="racecheck",
    errors=2,
    warnings=0,
    findings={"_hopper_decode_kernel, hopper_kernel.py:4 and hopper_kernel.py:3": 2},
    control=1,
    options="none",
    tool_version="2025.3.1.0",
    seed=0,
    sources=SLOW.sources,
    run=SLOW.run,
)


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put lines in the place of those that the package ships."""

    def shipping(*lines: Profile | Inspection) -> None:
        monkeypatch.setattr(profiles, "shipped", lambda: tuple(x for x in lines if isinstance(x, Profile)))
        monkeypatch.setattr(sanitizer, "shipped", lambda: tuple(x for x in lines if isinstance(x, Inspection)))

    return shipping


def test_a_variants_longest_launch_is_what_is_shown(ship: Any) -> None:
    ship(TAIL, SLOW, FAST, replace(SLOW, chapter="moe_tiles", case="other"))
    said, found = watch_report.profiled(OPT)
    assert said == "profiles from NVIDIA H200, 2026-01-31, tool 2025.3.1.0"
    rows = {row["variant"]: row for row in watch_report.limit_rows(found)}
    assert list(rows) == ["optimized", "gluon"]
    assert (rows["optimized"]["kernel"], rows["optimized"]["us"]) == ("_split_k_decode_kernel", 520.0)
    assert rows["optimized"]["launches"] == 2
    assert rows["optimized"]["what limits it"].startswith("waiting (long_scoreboard, 50 %")


def test_counters_stand_side_by_side(ship: Any) -> None:
    ship(SLOW, FAST)
    _, found = watch_report.profiled(OPT)
    rows = {
        row["counted"]: row for row in watch_report.beside(found, "flash-1024", "h200", ("gluon", "optimized", "x"))
    }
    assert rows["time, us"] == {"counted": "time, us", "gluon": 250.0, "optimized": 500.0}
    assert rows["their share of the wavefronts, %"]["optimized"] == pytest.approx(42.0)
    assert rows["of them waiting, second"]["gluon"] == "barrier 25 %"
    assert watch_report.beside(found, "flash-1", "h200", ("gluon",)) == []


def test_factors_multiply_to_the_ratio_of_the_times(ship: Any) -> None:
    ship(SLOW, FAST)
    _, found = watch_report.profiled(OPT)
    (row,) = watch_report.factor_rows(found, [("optimized", "gluon"), ("gluon", "peer: FlashMLA")])
    assert row["time"] == pytest.approx(0.5)
    assert row["cycles between them"] == pytest.approx(20 / 25)
    assert row["instructions"] == pytest.approx(250 * 25 / (500 * 20))
    assert row["instructions"] * row["cycles between them"] == pytest.approx(row["time"])
    assert row["tensor pipe busy, us"] == "70 → 70"
    assert watch_report.factors_said([row]) == (
        "flash-1024, h200: from optimized to gluon: time x 0.50 = instructions x 0.62 and cycles between them x 0.80"
    )


def test_a_changed_source_is_said(ship: Any) -> None:
    old = {"dsv4ref.evidence.lines": "0" * 64}
    ship(SLOW, replace(FAST, sources=old), replace(SAID, sources=old))
    assert watch_report.profiled(OPT)[0].endswith(", STALE: the sources have changed since")
    assert watch_report.sanitized(OPT)[0].endswith(", STALE: the sources have changed since")


def test_findings_are_shown_as_the_tool_said_them(ship: Any) -> None:
    ship(SAID, replace(SAID, tool="memcheck", errors=0, findings={}))
    said, rows = watch_report.sanitized(OPT)
    assert said == "sanitizer runs from NVIDIA H200, 2026-01-31, tool 2025.3.1.0"
    assert [(row["tool"], row["errors"]) for row in rows] == [("racecheck", 2), ("memcheck", 0)]
    assert rows[0]["reported"] == ["_hopper_decode_kernel, hopper_kernel.py:4 and hopper_kernel.py:3: 2"]


def test_where_nothing_ships_the_page_says_so(ship: Any) -> None:
    ship()
    assert watch_report.profiled(OPT) == ("no profile ships with this chapter yet", {})
    assert watch_report.sanitized(OPT) == ("no sanitizer run ships with this chapter yet", [])
    assert watch_report.factor_rows({}, [("optimized", "gluon")]) == []
    assert watch_report.factors_said([]) == "no two variants were profiled on the same case"
