"""What chapter 18 says about its own steps and about published times: by the plans, and in the order claimed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsv4ref.evidence import records
from dsv4ref.kernels.sparse_mla.splits import reduce_us
from dsv4ref.optimizations import catalogue, prefill_inputs, split_k_decode, split_model

OPT = catalogue.get("split_k_decode")
MEASURED = [name for name, case in OPT.cases.items() if case.measured]


@pytest.mark.parametrize("device", ["mi300x", "mi355x", "h200"])
def test_steps_after_over_splitting_never_get_slower_but_for_what_a_split_has_to_promise(device: str) -> None:
    for name in MEASURED:
        rows = split_model.ladder(OPT.cases[name].params, device)
        times = [row["us"] for row in rows[2:5]]
        assert times == sorted(times, reverse=True), (name, rows)
        assert rows[5]["us"] <= 1.1 * rows[4]["us"], (name, rows)
        assert rows[3]["iterations"] == rows[2]["iterations"], (name, rows)


def test_a_reduce_at_one_split_costs_what_the_step_says() -> None:
    params = OPT.cases["flash-256"].params
    rows = split_model.ladder(params, "mi355x")
    saved = rows[3]["us"] - rows[4]["us"]
    assert rows[4]["splits"] == 1
    assert saved == pytest.approx(reduce_us(split_model.machine_for("mi355x"), 256, 64, 1))
    assert rows[4]["staged, MB"] == 0


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_the_plans(name: str) -> None:
    case = OPT.cases[name]
    for device in ("mi300x", "mi355x", "h200"):
        p, plan = OPT.predict(case, device), split_model.plan(case.params, device)
        assert p.optimized_us == plan.time_us
        assert p.optimized_launches == (1 if plan.splits == 1 else 2)
        assert p.ratio is not None
        assert p.ratio == 1.0 or plan.splits > 1 or p.ratio > 1.0, (name, device, p.ratio)
    assert OPT.predict(case, "cpu").ratio is None


def test_the_table_of_chapter_05_is_worth_its_wide_tile_and_no_more() -> None:
    """What the chapter says of it, on MI300X: nothing at few rows, everything at many, and a loss between."""
    few, between, many = (
        split_model.table_and_splits(OPT.cases[name].params, "mi300x")
        for name in ("flash-8", "flash-128", "flash-1024")
    )
    assert few["small tile, split"] == few["table, split"] == few["chosen together"] < few["table"]
    assert between["chosen together"] < min(between["table, split"], between["small tile, split"])
    assert many["table"] == many["chosen together"] < many["small tile, split"]


def test_every_published_figure_has_a_table() -> None:
    """The claims are one; the rest are rows of the comparisons with the model, and one time in the text."""
    figures = records.published(OPT.id)
    rest = [figure for figure in figures if figure not in OPT.claims]
    assert len(figures) == len(OPT.claims) + len(rest)
    times = [figure for figure in rest if figure.source == "sglang#36094" and figure.unit == "us"]
    assert len(rest) == len(split_model.claimed_rows()) + len(split_model.fastest_rows()) + len(times)
    assert [(figure.before, figure.after) for figure in times] == [(55.7, 44.1)]


def test_the_model_is_too_fast_on_the_machine_it_could_be_checked_on() -> None:
    """Chapter 05's records: every single pass takes longer than modelled, and none by an order of magnitude."""
    rows = split_model.residual_rows()
    assert len(rows) == 12
    assert all(1 < row["measured / model"] < 5 for row in rows), rows
    assert all(row["FlashMLA, us"] < row["measured, us"] for row in rows), rows


def test_the_factor_is_not_one_for_all_shapes() -> None:
    """What the chapter says: it is not one factor, neither between shapes nor between batches of the static one."""
    rows = split_model.residual_shapes()
    assert sum(row["cases"] for row in rows) == 24
    static = rows[0]
    assert static["shape"] == "16x16 w4 s1"
    assert static["measured / model, from"] == pytest.approx(1, abs=0.02), "right at the fullest batch"
    assert static["to"] > 1.5, "too fast by more than half elsewhere"
    ranges = [(row["measured / model, from"], row["to"]) for row in rows]
    assert any(a[1] < b[0] for a in ranges for b in ranges), "some shapes' ranges do not touch"
    assert rows[-1]["to"] / rows[0]["measured / model, from"] > 1.1 * 1.1, rows


def test_the_variant_with_twice_the_splits_keeps_the_planned_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """On MI300X the plan at twice the splits would take another shape, and two things would change at once."""
    params = OPT.cases["flash-8"].params
    planned = split_model.plan(params, "mi300x")
    assert split_model.plan(params, "mi300x", splits=2 * planned.splits).launch != planned.launch
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(split_k_decode, "split_k_decode", lambda *args, **options: asked.append(options))
    inputs = OPT.make_inputs(OPT.case("tiny-planned"), "cpu", 0)
    found = OPT.timed(inputs)
    found["twice the splits"]()
    step = inputs.step
    plan = split_k_decode.plan_for(step.q, step.swa, step.extra)
    assert (asked[0]["launch"], asked[0]["splits"]) == (plan.launch, 2 * plan.splits)


def test_published_times_are_all_compared() -> None:
    rows = split_model.claimed_rows()
    assert [row["batch"] for row in rows] == [4, 8, 16, 32, 64, 128, 160, 320, 512]
    assert all(row["splits"] > 1 for row in rows[:-1])
    assert rows[-1]["splits"] == 1
    ratios = [row["published ratio"] / row["model's ratio"] for row in rows]
    assert 0.8 < ratios[0] < ratios[-1] < 2.1, ratios


def test_the_plans_counts_are_those_that_measured_fastest_elsewhere() -> None:
    rows = split_model.fastest_rows()
    assert [(row["rows"], row["planned"], row["fastest"]) for row in rows] == [(32, 4, 4), (64, 2, 2), (128, 1, 1)]
    assert all(row["heuristic"] == 2 * row["fastest"] for row in rows)


def _recorded() -> list[records.Record]:
    return [r for r in records.latest(records.shipped()) if (r.chapter, r.device) == (OPT.id, "h200")]


def _slowed(r: records.Record, factor: float) -> records.Record:
    return replace(r, p20_us=factor * r.p20_us, p50_us=factor * r.p50_us, p80_us=factor * r.p80_us)


def test_the_recorded_ratio_is_the_kernels_times_the_splits() -> None:
    """Only if one split runs at the single pass's own shape is one factor the kernel's and the other the split's."""
    ratios = {r.case: r.ratio for r in _recorded() if r.variant == "optimized"}
    rows = split_model.recorded_rows(OPT, _recorded())
    decodes = {name for name in MEASURED if not prefill_inputs.is_prompt(OPT.case(name).params)}
    assert {row["case"] for row in rows} == decodes <= set(ratios) <= set(MEASURED)
    for row in rows:
        params = OPT.cases[row["case"]].params
        one = split_model.plan(params, "h200", splits=1)
        assert one.launch == split_model.single_pass(params, "h200").launch, (row["case"], str(one.launch))
        assert row["kernel"] * row["split, recorded"] == pytest.approx(ratios[row["case"]], rel=0.005), row
        assert tuple(row) == split_model.RECORDED
    assert {row["case"] for row in rows if row["FlashMLA / plan"] is None} == {n for n in decodes if "heads" in n}


def test_a_full_machine_gains_nothing_from_a_second_split_in_the_records() -> None:
    full = [row for row in split_model.recorded_rows(OPT, _recorded()) if row["splits"] == 1]
    assert len(full) == 10
    assert all(row["twice the splits / plan"] > 0.99 for row in full), full


def test_a_variant_faster_than_the_plan_is_named_and_launches_that_are_the_same_are_the_spread() -> None:
    spread, before = split_model.beaten_rows(OPT, _recorded())
    assert 0 < spread < 0.01
    faster = [_slowed(r, 0.5) if (r.case, r.variant) == ("pro-8", "twice the splits") else r for r in _recorded()]
    same, after = split_model.beaten_rows(OPT, faster)
    (added,) = [row for row in after if row not in before]
    assert same == spread
    assert (added["case"], added["variant"], added["splits"]) == ("pro-8", "twice the splits", "6 → 12"), added
    slower = [_slowed(r, 1.5) if r.variant == "one split" else r for r in _recorded()]
    assert split_model.beaten_rows(OPT, slower)[0] == pytest.approx(1 / 3, abs=0.01)


def test_without_records_nothing_is_said() -> None:
    assert split_model.summary(OPT, []) == ""
    assert split_model.beaten_rows(OPT, []) == (0.0, [])
    elsewhere = [replace(r, device="cpu") for r in _recorded()]
    assert split_model.recorded_rows(OPT, elsewhere) == []
