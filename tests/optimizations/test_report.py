"""The scoreboard's rows from records, and that nothing is measured without a GPU or behind a red gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref import kernels
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import catalogue, chapter
from dsv4ref.optimizations.decode_model import MEASURED_MODULES
from dsv4ref.optimizations.measure import RedGateError, measure, measure_host_case
from dsv4ref.optimizations.report import report_rows
from dsv4ref.show import tables

BASELINE = Record(
    chapter="decode_launch_shape",
    case="flash-64",
    variant="baseline",
    p20_us=99.0,
    p50_us=100.0,
    p80_us=102.0,
    repeats=40,
    method="graph",
    bytes=1_000_000,
    flops=2_000_000,
    launches=1,
    ratio=None,
    ratio_low=None,
    ratio_high=None,
    noise_floor=None,
    bound_us=20.0,
    gate="passed",
    device="h200",
    device_name="NVIDIA H200",
    driver=None,
    torch="2.11.0",
    triton="3.6.0",
    python="3.12.3",
    mode="compiled",
    date="2026-01-31T12:00:00+00:00",
    commit=None,
    seed=0,
    sources=records.hash_sources(MEASURED_MODULES),
    peers=None,
    run="20260131T120000Z-abc123",
)


def timed(variant: str, p50: float, ratio: tuple[float, float, float] = (1.9, 2.0, 2.1), floor: float = 0.01) -> Record:
    return replace(
        BASELINE, variant=variant, p20_us=p50, p50_us=p50, p80_us=p50,
        ratio_low=ratio[0], ratio=ratio[1], ratio_high=ratio[2], noise_floor=floor,
    )  # fmt: skip


OPTIMIZED = timed("optimized", 50.0)


def test_a_row_holds_what_the_records_say_beside_prediction_and_claim() -> None:
    others = [timed("published table", 80.0), replace(timed("peer: FlashMLA", 40.0), peers="FlashMLA 1.0")]
    (row,) = report_rows([BASELINE, OPTIMIZED, *others])
    opt = catalogue.get("decode_launch_shape")
    predicted = opt.predict(opt.case("flash-64"), "h200").ratio
    assert predicted is not None
    claimed = row.pop("claimed")
    assert row == {
        "id": "decode_launch_shape",
        "case": "flash-64",
        "device": "h200",
        "method": "graph",
        "baseline_us": 100.0,
        "optimized_us": 50.0,
        "ratio": 2.0,
        "ratio_ci": [1.9, 2.1],
        "noise_floor": 0.01,
        "predicted": predicted,
        "peers": {"FlashMLA": 40.0},
        "gate": "passed",
        "hazards": len(opt.hazards),
        "stale": False,
        "variants": {"published table": 80.0},
        "bound_us": 20.0,
        "date": "2026-01-31T12:00:00+00:00",
        "resolvable": True,
        "tok_s": None,
        "tpot_ms": None,
    }
    assert "+5.52 % tok/s, 2x MI300X" in claimed


@pytest.mark.parametrize(
    ("interval", "floor", "resolvable"),
    [
        ((1.02, 1.03, 1.04), 0.01, True),
        ((1.005, 1.03, 1.04), 0.01, False),  # reaches into the noise floor
        ((1.02, 1.03, 1.04), 0.03, False),
        ((0.9, 1.0, 1.1), 0.0, False),
        ((0.9, 0.92, 0.95), 0.01, True),  # a loss is a result too
        ((0.9, 0.97, 0.995), 0.01, False),
    ],
)
def test_a_difference_inside_the_noise_floor_is_not_resolvable(
    interval: tuple[float, float, float], floor: float, resolvable: bool
) -> None:
    (row,) = report_rows([BASELINE, timed("optimized", 50.0, interval, floor)])
    assert row["resolvable"] is resolvable
    assert row["ratio_ci"] == [interval[0], interval[2]]


@pytest.mark.parametrize("module", MEASURED_MODULES)
def test_a_changed_source_makes_the_row_stale(module: str) -> None:
    changed = replace(OPTIMIZED, sources={**OPTIMIZED.sources, module: "0" * 64})
    (row,) = report_rows([BASELINE, changed])
    assert row["stale"] is True


def test_the_newest_run_counts() -> None:
    date, run = "2026-02-01T00:00:00+00:00", "20260201T000000Z-def456"
    newer = [replace(r, date=date, run=run) for r in (replace(BASELINE, p80_us=300.0, p50_us=200.0), OPTIMIZED)]
    for measured in ([BASELINE, OPTIMIZED, *newer], [*newer, BASELINE, OPTIMIZED]):
        (row,) = report_rows(measured)
        assert (row["baseline_us"], row["date"]) == (200.0, date)


def _of(**changes: Any) -> list[Record]:
    return [replace(record, **changes) for record in (BASELINE, OPTIMIZED)]


def test_rows_come_by_chapter_then_device_then_case() -> None:
    measured = [
        *_of(chapter="output_passthrough", case="flash-1"),
        *_of(device="mi300x", case="flash-1"),
        *_of(case="flash-256"),
        *_of(case="flash-1"),
    ]
    found = [(row["id"], row["device"], row["case"]) for row in report_rows(measured)]
    assert found == [
        ("decode_launch_shape", "h200", "flash-1"),
        ("decode_launch_shape", "h200", "flash-256"),
        ("decode_launch_shape", "mi300x", "flash-1"),
        ("output_passthrough", "h200", "flash-1"),
    ]


def test_two_methods_of_one_case_are_two_rows() -> None:
    rows = report_rows([*_of(), *_of(method=records.HOST)])
    assert sorted(row["method"] for row in rows) == ["graph", "host"]


def test_host_time_has_no_prediction_and_no_place_among_device_times() -> None:
    opt, slower = catalogue.get("decode_launch_shape"), _of(method=records.HOST, p80_us=900.0, p50_us=900.0)
    assert [row["predicted"] for row in report_rows(slower)] == [None]
    for rows in (chapter.board_rows(opt, [*_of(), *slower], ["h200"]), chapter.residual_rows(opt, [*_of(), *slower])):
        found = [row.get("baseline_us", row.get("baseline: measured, us")) for row in rows if row["case"] == "flash-64"]
        assert found == [100.0]
    assert [row for row in chapter.board_rows(opt, slower, ["h200"]) if row["ratio"] is not None] == []


def test_each_clock_has_its_own_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "h200-of-a-test"
    mine = [replace(r, device=device) for r in (*_of(), *_of(method=records.HOST))]
    records.write(tmp_path / device / "decode_launch_shape.jsonl", mine)
    monkeypatch.setenv("DSV4REF_RECORDS", str(tmp_path))
    monkeypatch.setattr(kernels, "mode", lambda: "interpreted")  # on a GPU it would measure instead of reading
    opt = catalogue.get("decode_launch_shape")
    for take, method in ((chapter.measurements, "graph"), (chapter.host_measurements, "host")):
        _, found = take(opt, ["flash-64"])
        assert [(r.method, r.variant) for r in found if r.device == device] == [
            (method, "baseline"), (method, "optimized")
        ]  # fmt: skip
    assert chapter.host_measurements(opt, ["flash-1"]) == ("no host time has been recorded for this chapter yet", [])


def test_a_chapter_without_host_calls_says_so() -> None:
    opt = catalogue.get("decode_launch_shape")
    with pytest.raises(ValueError, match="opt: decode_launch_shape has nothing to time on the host"):
        measure_host_case(opt, opt.case("flash-64"), seed=0, run="r")


@pytest.mark.parametrize(
    "measured",
    [
        [],
        [BASELINE],
        [OPTIMIZED],
        _of(chapter="a_chapter_of_tomorrow"),
        _of(case="a-case-of-yesterday"),
    ],
    ids=["none", "baseline only", "optimized only", "unknown chapter", "unknown case"],
)
def test_records_that_make_no_comparison_make_no_row(measured: list[Record]) -> None:
    assert report_rows(measured) == []


def test_the_shipped_records_make_rows() -> None:
    rows = report_rows(records.shipped())
    assert {row["gate"] for row in rows} <= {"passed"}
    assert {row["id"] for row in rows} <= set(catalogue.load())
    for row in rows:
        low, high = row["ratio_ci"]
        assert low <= row["ratio"] <= high, row["case"]


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_nothing_is_measured_without_a_gpu(tmp_path: Path) -> None:
    opt = catalogue.get("output_passthrough")
    with pytest.raises(RuntimeError, match=r"measure.* GPU"):
        next(measure(opt, tmp_path, seed=0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_nothing_is_measured_behind_a_red_gate(tmp_path: Path) -> None:
    opt = catalogue.get("output_passthrough")
    red = replace(
        opt,
        cases={name: opt.cases[name] for name in ("tiny", "flash-1")},
        hazards={},
        optimized=lambda inputs: {"out": torch.zeros_like(inputs.decode.q)},
        gate=Gate((Check("out", "budget", "attention_bf16"),)),
    )
    with pytest.raises(RedGateError, match="output_passthrough/tiny: out: "):
        next(measure(red, tmp_path, seed=0))
    assert list(tmp_path.iterdir()) == []


def test_the_ladders_rows_carry_rates_and_no_others_do() -> None:
    chapter = catalogue.get("attribution_ladder")
    lines = [
        replace(line, chapter=chapter.id, case="h200-short", method="host clock") for line in (BASELINE, OPTIMIZED)
    ]
    (row,) = report_rows(lines)
    assert row["tok_s"] == pytest.approx([32 / 100e-6, 32 / 50e-6])
    assert row["tpot_ms"] == pytest.approx([0.1, 0.05])
    headings = [column.heading for column in tables.scoreboard_columns([row])]
    assert "output tok/s" in headings
    (other,) = report_rows([BASELINE, OPTIMIZED])
    assert other["tok_s"] is None
    assert "output tok/s" not in [column.heading for column in tables.scoreboard_columns([other])]
    # Its cases have tokens as well, which are no output.
    prompt = [replace(line, chapter="split_k_decode", case="flash-prompt") for line in (BASELINE, OPTIMIZED)]
    assert report_rows(prompt)[0]["tok_s"] is None


def test_a_scoreboard_takes_rows_with_rates_and_rows_without() -> None:
    chapter = catalogue.get("attribution_ladder")
    ladder = [
        replace(line, chapter=chapter.id, case="h200-short", method="host clock") for line in (BASELINE, OPTIMIZED)
    ]
    rows = report_rows([BASELINE, OPTIMIZED, *ladder])
    assert [row["tok_s"] is not None for row in rows].count(True) == 1 < len(rows)
    columns = tables.scoreboard_columns(rows)
    assert "320,000" in str(tables.table(rows, columns)._repr_html_())
    assert tables.rich_table(rows, columns, "mixed").row_count == len(rows)
    assert "320,000" in tables.scoreboard_html(rows)


def test_the_shipped_records_make_a_scoreboard() -> None:
    rows = report_rows(records.shipped())
    assert rows
    assert tables.rich_table(rows, tables.scoreboard_columns(rows), "shipped").row_count == len(rows)
