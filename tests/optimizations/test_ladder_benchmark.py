"""The ladder on the tiny engine: what is planned, refused, resumed and read back."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4ref.config import LAYER_KINDS
from dsv4ref.evidence import timing
from dsv4ref.evidence.roofline import Roofs
from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations import ladder_benchmark as benchmark
from dsv4ref.optimizations import ladder_inside as inside
from dsv4ref.optimizations import ladder_subjects as subjects
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.ladder_runner import REHEARSAL, MixedRunError, Window, mean_step
from dsv4ref.optimizations.report import report_rows
from dsv4ref.ref.model import Model
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import available

SHORT = replace(workload.get_preset("tiny"), window=1, output=10, gate=(2, 4, 3))
CHEAP = ("shrink_tail_fill", "cached_projection")  # no interpreted kernel in a decode row


@pytest.fixture(scope="module")
def model() -> Model:
    return workload.slice_model(SHORT.config, 0)


def run(out: Path, device: str, **changes: Any) -> benchmark.Report:
    chosen: dict[str, Any] = {"device": device, "seed": 0, "switches": CHEAP, "which": "ladder", **changes}
    return benchmark.run_ladder(SHORT, out, **chosen)


# --- plans ---


def test_a_plan_takes_every_switch_that_the_model_can_turn_on(model: Model) -> None:
    plan = benchmark.make_plan(model, which="orders")
    assert sorted(plan.order) == sorted(attribution.names_of(available(model)))
    assert plan.sets[0] == frozenset()
    assert frozenset(plan.order) in plan.sets
    for order in (plan.order, plan.reverse):
        assert set(attribution.prefixes(order)) <= set(plan.sets)
    assert {attribution.reduced(plan.order, name) for name in plan.order} <= set(plan.sets)
    names = [plan.name(on) for on in plan.sets]
    assert len(set(names)) == len(names)


def test_shapley_runs_every_set_that_can_be_built_and_a_ladder_only_its_rungs(model: Model) -> None:
    every = benchmark.make_plan(model, which="shapley").sets
    assert set(every) == set(attribution.feasible_subsets(benchmark.make_plan(model).order))
    assert len(benchmark.make_plan(model, which="ladder", switches=CHEAP).sets) == 3


def test_an_order_is_given_by_name(model: Model) -> None:
    given = benchmark.make_plan(model, "cached_projection, shrink_tail_fill", switches=CHEAP)
    assert given.order == ("cached_projection", "shrink_tail_fill")
    assert (
        benchmark.make_plan(model, "reverse", switches=CHEAP).reverse
        == benchmark.make_plan(model, switches=CHEAP).order
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "backwards"}, "order: got 'backwards', expected source, reverse, or each of"),
        ({"which": "all"}, "attribution: got 'all', expected one of ladder, orders, shapley"),
        ({"switches": ["fast"]}, "switches: got 'fast', expected some of"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(model: Model, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.make_plan(model, **changes)


def test_a_switch_that_the_model_cannot_turn_on_is_refused_with_the_reason(model: Model) -> None:
    plain = Model(model.config, model.tensors, replace(model.numerics, round_bf16=False))
    assert "cached_projection" not in benchmark.make_plan(plain, switches=["shrink_tail_fill"]).order
    with pytest.raises(ValueError, match="switches: got cached_projection, which this model cannot turn on: numerics"):
        benchmark.make_plan(plain, switches=CHEAP)


# --- presets and weights ---


@pytest.mark.parametrize("preset", workload.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_has_all_kinds_of_layers_and_room_for_its_windows(preset: workload.Preset) -> None:
    kinds = [preset.config.layer_kind(layer) for layer in range(preset.config.n_layers)]
    assert sorted(kinds) == sorted(LAYER_KINDS.values())
    assert any(preset.config.is_hash_layer(layer) for layer in range(preset.config.n_layers))
    assert not all(preset.config.is_hash_layer(layer) for layer in range(preset.config.n_layers))
    # The first requests decode while the last prompts are computed; rows of all prompts go side by side.
    prompts = 1 if preset.prompt_rows else -(-preset.requests * preset.prompt // preset.chunk)
    assert preset.output - prompts - preset.warmup > preset.window
    assert preset.repeats >= timing.MIN_ROUNDS
    json.dumps(preset.settings())


def test_the_large_preset_is_the_sources_benchmark_at_flash_widths() -> None:
    preset = workload.get_preset("h200-slice")
    config = preset.config
    assert (preset.requests, preset.prompt, preset.output) == (1024, 512, 512)
    assert (config.hidden_size, config.n_heads, config.router.n_experts, config.moe_inter_dim) == (4096, 64, 256, 2048)
    assert preset.repeats * preset.window >= 299, "steps enough for a p99"
    assert not preset.rehearsal


def test_the_short_preset_differs_in_its_requests_and_in_what_those_cost() -> None:
    short, large = workload.get_preset("h200-short"), workload.get_preset("h200-slice")
    own = ("name", "requests", "prompt", "about", "window", "sample_s", "warmup", "budget", "soak", "begin")
    rounds = ("repeats", "often")
    assert replace(short, **{name: getattr(large, name) for name in (*own, *rounds)}) == large
    assert short.begin is None, "one of the two has every rung"
    assert short.soak is not None
    assert short.repeats * short.often * short.window >= 299, "steps enough for a p99 of a fast rung"


@pytest.mark.parametrize(("name", "ratios"), [("h200-short", (4, 128)), ("h200-slice", (4,))])
def test_the_steps_that_warm_a_preset_up_close_entries(name: str, ratios: tuple[int, ...]) -> None:
    preset = workload.get_preset(name)
    behind = preset.prompt  # the prompts' last step decodes the first requests' next token
    for ratio in ratios:
        assert any(position % ratio == ratio - 1 for position in range(behind + 1, behind + 1 + preset.warmup)), ratio


@pytest.mark.parametrize("name", ["h200-short", "h200-slice"])
def test_the_gate_of_a_large_preset_fills_the_window_and_closes_entries(name: str) -> None:
    preset = workload.get_preset(name)
    assert preset.gate[1] > max(preset.config.window_size, 128)
    assert preset.max_length // 4 < preset.config.index_topk, "the comment says that nothing is chosen"


def test_the_gate_of_the_rehearsal_wraps_the_window_and_chooses_entries() -> None:
    tiny = workload.get_preset("tiny")
    assert tiny.gate[1] > tiny.config.window_size
    assert tiny.gate[1] // 4 > tiny.config.index_topk


def test_a_budget_is_of_steps_that_are_gated() -> None:
    with pytest.raises(ValueError, match="budget: got 3, expected 1 to 2 steps, the warm-up's"):
        replace(SHORT, budget=3)


def test_weights_are_codes_whose_values_have_variance_one_over_width(model: Model) -> None:
    experts = model.tensors["layers.0.ffn.experts.0.w1.weight"]
    assert experts.dtype is torch.int8
    for name in ("layers.0.ffn.experts.0.w1", "layers.0.attn.wq_a"):
        values = model.weights.matrix(name)
        assert 0.4 < float(values.square().mean()) * values.shape[1] < 2.5, name


def test_weights_follow_the_seed() -> None:
    first, again, other = (workload.slice_model(SHORT.config, seed).tensors for seed in (0, 0, 1))
    name = "layers.1.ffn.experts.3.w2.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


# --- the gate ---


def generated(tokens: list[int], logits: list[list[float]]) -> workload.Generated:
    return workload.Generated({0: tokens}, {0: [torch.tensor(row) for row in logits]})


def test_another_token_is_a_divergence_unless_its_logit_is_within_the_budget() -> None:
    reference = generated([2, 0], [[0.0, 0.9, 1.0], [1.0, 0.0, 0.0]])
    close, far = generated([1, 1], [[0.0, 1.0, 0.9]] * 2), generated([0, 0], [[1.0, 0.0, 0.0]] * 2)
    assert workload.divergent(reference, reference, 0.0) == 0
    assert workload.divergent(close, reference, 0.06) == 0
    assert workload.divergent(close, reference, 0.04) == 1
    assert workload.divergent(far, reference, 0.06) == 1


def test_a_gap_is_how_far_below_the_highest_the_other_token_was() -> None:
    reference = generated([2, 0], [[0.0, 0.9, 1.0], [1.0, 0.0, 0.0]])
    assert workload.gaps(reference, reference) == {}
    assert workload.gaps(generated([1, 1], [[0.0, 1.0, 0.9]] * 2), reference) == {0: pytest.approx(0.1)}
    assert workload.gaps(generated([2], [[0.0, 0.9, 1.0]]), reference) == {0: float("inf")}
    assert workload.gaps(generated([2, 0, 1], [[0.0, 0.9, 1.0]] * 3), reference) == {0: float("inf")}


def test_an_answer_that_ends_early_is_a_divergence() -> None:
    reference = generated([2, 0], [[0.0, 0.9, 1.0], [1.0, 0.0, 0.0]])
    assert workload.divergent(generated([2], [[0.0, 0.9, 1.0]]), reference, 1.0) == 1
    assert workload.divergent(workload.Generated(), reference, 1.0) == 1


def test_the_budget_is_twice_the_largest_error_of_a_logit_up_to_the_divergence() -> None:
    reference = generated([0, 0], [[1.0, 0.5], [1.0, 0.5]])
    assert workload.gate_budget(generated([0, 0], [[1.0, 0.25], [0.5, 0.5]]), reference) == 1.0
    assert workload.gate_budget(generated([1, 0], [[0.9, 1.0], [9.0, 9.0]]), reference) == 1.0
    assert workload.gate_budget(generated([0], [[1.0, 0.25]]), reference) == 0.5, "of fewer steps"


class WrongProjection(DecodeEngine):
    """Its cached projection negates what it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.features.cached_projection:
            right = self.operations.project
            self.operations = replace(self.operations, project=lambda *given: -right(*given))


def test_a_rung_whose_tokens_change_is_refused(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "DecodeEngine", WrongProjection)
    found = run(tmp_path, device, inside=False)
    assert not found.green
    assert found.inside == found.traces == []
    off, fill, cached = found.rungs["order"]
    assert off["gate"] == fill["gate"] == "green"
    assert "requests left the tokens of everything off" in cached["gate"]
    assert cached["tok_s"] is None
    assert found.contributions is None
    assert found.records == ()
    names = {json.loads(line).get("name") for line in (tmp_path / "ladder.jsonl").read_text().splitlines()}
    assert not any("cached_projection" in str(name) for name in names), "it was not run"


# --- a run ---


def test_a_ladder_runs_is_resumed_and_refuses_another_source(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(tmp_path, device, inside=False)
    assert found.green
    assert [row["rung"] for row in found.rungs["order"]] == [
        "everything off",
        "+ shrink_tail_fill",
        "+ cached_projection",
    ]
    assert all(row["note"] == REHEARSAL for row in found.rungs["order"])
    assert all(row["rounds"] == 10 for row in found.rungs["order"])
    assert found.records == (), "a rehearsal is no record"
    journal = (tmp_path / "ladder.jsonl").read_bytes()
    assert len(journal.splitlines()) == 1 + 10 * 5  # three rungs, and the first and the last a second time

    stated = json.loads((tmp_path / "report.json").read_text())
    assert stated["rungs"]["order"] == found.rungs["order"]
    assert stated["benchmark"]["rehearsal"] is True

    again = run(tmp_path, device, inside=False)
    assert (tmp_path / "ladder.jsonl").read_bytes() == journal, "complete: nothing is run again"
    assert [row["tok_s"] for row in again.rungs["order"]] == [row["tok_s"] for row in found.rungs["order"]]

    with monkeypatch.context() as patched:
        patched.setattr(benchmark.records, "hash_sources", lambda names: {"dsv4ref.serving.engine": "f" * 64})
        with pytest.raises(MixedRunError, match="another sources"):
            run(tmp_path, device)
    with pytest.raises(MixedRunError, match="another seed: it has 0, this run has 1"):
        run(tmp_path, device, seed=1)
    assert (tmp_path / "ladder.jsonl").read_bytes() == journal


def test_too_few_repeats_are_refused_before_anything_runs(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="repeats: got 9, expected at least 10"):
        run(tmp_path / "out", device, repeats=9)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_out_of_time_says_so_and_is_continued(tmp_path: Path, device: str) -> None:
    with pytest.raises(RuntimeError, match="max_seconds: 1e-06 s were over before the first round was complete"):
        run(tmp_path, device, inside=False, max_seconds=1e-6)
    clock = iter(range(1000))
    original = benchmark.interleave

    def four_rounds(*given: Any, **named: Any) -> bool:
        return original(*given, **{**named, "max_seconds": 8, "clock": lambda: float(next(clock))})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(benchmark, "interleave", four_rounds)
        part = run(tmp_path, device)
    assert not part.complete
    assert part.inside == part.traces == part.metadata == []
    assert part.soak is None
    assert part.contributions is None
    assert part.rungs["order"][1]["verdict"].startswith("not resolvable (")
    whole = run(tmp_path, device, inside=False)
    assert whole.complete
    assert 0 < part.rungs["order"][0]["rounds"] < whole.rungs["order"][0]["rounds"] == 10
    with pytest.raises(ValueError, match="max_seconds: got 0, expected a positive number of seconds"):
        run(tmp_path, device, max_seconds=0)


def test_sets_that_only_other_views_need_run_in_fewer_rounds(tmp_path: Path, device: str) -> None:
    found = run(tmp_path, device, which="orders", repeats=20, inside=False, switches=("shrink_tail_fill",))
    assert {row["rounds"] for row in found.rungs["order"]} == {20}
    found = run(tmp_path / "two", device, which="orders", repeats=20, inside=False)
    assert {row["rounds"] for row in found.rungs["order"]} == {20}
    assert {row["rounds"] for row in found.rungs["reverse"][1:-1]} == {10}
    assert found.contributions is not None


def test_a_ladder_may_begin_with_switches_on_and_says_so(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = replace(SHORT, begin="shrink_tail_fill")
    found = benchmark.run_ladder(later, tmp_path, device=device, seed=0, switches=CHEAP, inside=False)
    first, second = found.rungs["order"]
    assert (first["rung"], second["rung"]) == ("everything up to shrink_tail_fill", "+ cached_projection")
    assert list(found.gates) == ["shrink_tail_fill", "shrink_tail_fill+cached_projection"]
    assert found.contributions is not None
    assert [row["switch"] for row in found.contributions] == ["cached_projection", "sum"]
    header, *windows = (json.loads(line) for line in (tmp_path / "ladder.jsonl").read_text().splitlines())
    assert header["benchmark"]["begin"] == "shrink_tail_fill"
    assert "off" not in {window["name"] for window in windows}, "everything off is the gate's oracle and no rung"
    means = mean_step([Window(**window) for window in windows], found.gates)
    before, after = (np.asarray(means[name]) for name in found.gates)
    assert second["speedup"] == pytest.approx(np.median(before / after))
    assert found.as_json()["benchmark"]["first rung"] == first["rung"]
    with pytest.raises(MixedRunError, match=r"another benchmark\.begin: it has .shrink_tail_fill., this run has null"):
        run(tmp_path, device, inside=False)
    monkeypatch.setattr(subjects, "DecodeEngine", WrongProjection)
    both = replace(SHORT, begin="cached_projection")
    with pytest.raises(RuntimeError, match="the first rung, is red, so nothing is compared: 2 of 2 requests left"):
        benchmark.run_ladder(both, tmp_path / "red", device=device, seed=0, switches=CHEAP)


def test_every_view_of_a_ladder_that_begins_with_switches_on_keeps_them_on(model: Model) -> None:
    plan = benchmark.make_plan(model, begin="device_step")
    assert [label for label, _ in plan.rungs(plan.order)][:2] == ["everything up to device_step", "+ full_window_skip"]
    assert plan.sets == attribution.prefixes(plan.order)[1 + plan.order.index("device_step") :]
    both = benchmark.make_plan(model, which="orders", begin="device_step")
    on_first = 1 + both.order.index("device_step")
    assert both.base == frozenset(both.order[:on_first]) == frozenset(both.reverse[:on_first])
    assert both.turned_on == both.order[on_first:]
    assert both.reverse[on_first:] == both.turned_on[::-1], "each of these can come first"
    assert all(both.base <= on for on in both.sets)
    assert {frozenset(both.order) - {name} for name in both.turned_on} <= set(both.sets)
    every = benchmark.make_plan(model, which="shapley", begin="device_step")
    assert len(every.sets) == 2 ** len(both.turned_on)
    with pytest.raises(ValueError, match="begin: got 'warp', expected one of"):
        benchmark.make_plan(model, begin="warp")


def test_both_ends_and_the_first_device_step_run_twice(model: Model) -> None:
    plan = benchmark.make_plan(model)
    off, launched, on = plan.twice
    assert (off, on) == ("off", plan.name(frozenset(plan.order)))
    assert launched.endswith("device_step")
    assert benchmark.make_plan(model, begin="device_step").twice == (launched, on)
    assert benchmark.make_plan(model, switches=CHEAP).twice == ("off", "shrink_tail_fill+cached_projection")


def test_fast_rungs_run_in_more_rounds_and_other_views_in_fewer(model: Model) -> None:
    class Built:
        def __init__(self, name: str) -> None:
            self.steps = SHORT.window if "captured_steps" in name else SHORT.window - 1

    plan = benchmark.make_plan(model, which="orders")
    names = [*(plan.name(on) for on in plan.sets), "off again"]
    wanted = benchmark._rounds(replace(SHORT, often=4), plan, {name: Built(name) for name in names}, 30)  # type: ignore[misc]
    rungs = [name for _, name in plan.rungs(plan.order)]
    assert wanted["off"] == wanted["off again"] == wanted[rungs[1]] == 30
    assert wanted[rungs[-1]] == 120
    assert {wanted[name] for name in names[:-1] if name not in rungs and "captured_steps" not in name} == {10}
    assert {wanted[name] for name in names[:-1] if name not in rungs and "captured_steps" in name} == {40}


def test_every_module_of_the_engine_is_a_source_of_its_rounds() -> None:
    modules = set(benchmark.MEASURED_MODULES)
    assert {"dsv4ref.serving.engine", "dsv4ref.ref.attention", "dsv4ref.kernels.sparse_mla.decode"} <= modules
    assert "dsv4ref.kernels" in modules


def test_engines_that_cannot_fit_are_refused_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * 2**30, 9 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    benchmark._check_room([None], 1000)
    benchmark._check_room([2 * 2**30, 50 * 2**30], 3)  # the others may be as small as the smallest
    with pytest.raises(RuntimeError, match=r"switches: 4 more engines of 2.0 GiB or more do not fit into 6.0 GiB"):
        benchmark._check_room([2 * 2**30, 50 * 2**30], 4)


def test_a_journal_of_another_device_is_another_run(model: Model) -> None:
    plan = benchmark.make_plan(model, switches=CHEAP)
    assert benchmark._header(SHORT, plan, 0, "cpu") != benchmark._header(SHORT, plan, 0, "cuda")


def test_only_every_switch_in_the_sources_order_from_the_presets_first_rung_makes_a_record(model: Model) -> None:
    assert benchmark._is_whole(SHORT, benchmark.make_plan(model, which="orders"), model)
    assert not benchmark._is_whole(SHORT, benchmark.make_plan(model, "reverse"), model)
    assert not benchmark._is_whole(SHORT, benchmark.make_plan(model, switches=CHEAP), model)
    assert not benchmark._is_whole(SHORT, benchmark.make_plan(model, begin="device_step"), model)
    large = workload.get_preset("h200-slice")
    assert benchmark._is_whole(large, benchmark.make_plan(model, begin=large.begin), model)
    assert not benchmark._is_whole(large, benchmark.make_plan(model), model)


# --- views and traces ---


def test_contributions_come_from_the_rounds_of_the_journal(model: Model) -> None:
    plan = benchmark.make_plan(model, which="shapley", switches=CHEAP)
    seconds = {(): 10.0, ("shrink_tail_fill",): 9.0, ("cached_projection",): 8.0, CHEAP: 7.5}
    names = {plan.name(frozenset(on)): value for on, value in seconds.items()} | {"off again": 10.0}
    journal = type("Journal", (), {"windows": [Window(n, k, 0, (v,)) for n in range(12) for k, v in names.items()]})()
    rows = {row["switch"]: row for row in benchmark._contributions(journal, plan)}
    medians = {view: {name: row[view].median for name, row in rows.items()} for view in ("in this order", "left out")}
    assert medians["in this order"] == pytest.approx({"shrink_tail_fill": 10, "cached_projection": 15, "sum": 25})
    assert medians["left out"] == pytest.approx({"shrink_tail_fill": 5, "cached_projection": 15, "sum": 20})
    assert rows["shrink_tail_fill"]["Shapley"].median == pytest.approx(7.5)
    assert rows["sum"]["Shapley"].median == pytest.approx(25)


def test_shares_behind_a_later_first_rung_are_of_what_is_turned_on_beside_it(model: Model) -> None:
    plan = benchmark.make_plan(model, which="shapley", switches=("routing_kernels", *CHEAP), begin="routing_kernels")
    assert plan.base == {"routing_kernels"}
    seconds = {(): 10.0, ("shrink_tail_fill",): 9.0, ("cached_projection",): 8.0, CHEAP: 7.5}
    names = {plan.name(plan.base | set(on)): value for on, value in seconds.items()}
    journal = type("Journal", (), {"windows": [Window(n, k, 0, (v,)) for n in range(12) for k, v in names.items()]})()
    rows = {row["switch"]: row for row in benchmark._contributions(journal, plan)}
    assert rows.keys() == {*CHEAP, "sum"}, "what is on in the first rung has no share"
    medians = {
        view: {name: row[view].median for name, row in rows.items()}
        for view in next(iter(rows.values()))
        if view != "switch"
    }
    assert medians["in this order"] == pytest.approx({"shrink_tail_fill": 10, "cached_projection": 15, "sum": 25})
    assert medians["in reverse"] == pytest.approx({"shrink_tail_fill": 5, "cached_projection": 20, "sum": 25})
    assert medians["left out"] == pytest.approx({"shrink_tail_fill": 5, "cached_projection": 15, "sum": 20})
    assert medians["Shapley"] == pytest.approx({"shrink_tail_fill": 7.5, "cached_projection": 17.5, "sum": 25})


def test_records_of_a_ladder_are_what_the_scoreboard_reads(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, with roofs that are given instead of measured."""
    monkeypatch.setattr(benchmark.roofline, "measure_roofs", lambda: Roofs("none", 4e12, 7e14))
    plan = benchmark.make_plan(model, switches=CHEAP)
    seconds = {plan.name(on): value for on, value in zip(plan.sets, (0.10, 0.09, 0.05), strict=True)} | {
        "off again": 0.10,
        "shrink_tail_fill+cached_projection again": 0.05,
    }
    windows = [Window(n, k, 0, (v * (1 + 1e-4 * n),) * 16) for n in range(12) for k, v in seconds.items()]
    journal = type("Journal", (), {"windows": windows})()
    counted = [{"launches": count} for count in (300, 200, 100)]
    large = workload.get_preset("h200-slice")
    lines = benchmark._records(large, plan, journal, counted, seed=0)
    assert [line.variant for line in lines] == ["baseline", f"+ {plan.order[0]}", "optimized"]
    assert [line.launches for line in lines] == [300, 200, 100]
    assert [line.ratio for line in lines[1:]] == pytest.approx([10 / 9, 2.0])
    assert all(line.bound_us is not None and line.repeats == 12 for line in lines)
    (row,) = report_rows(lines)
    assert (row["id"], row["case"], row["gate"], row["stale"]) == (benchmark.CHAPTER, large.name, "passed", False)
    assert row["ratio"] == pytest.approx(2.0)
    assert row["resolvable"]
    assert row["baseline_us"] == pytest.approx(1e5, rel=1e-2)


def event(name: str, cat: str, ts: float, dur: float) -> dict[str, Any]:
    return {"name": name, "cat": cat, "ph": "X", "ts": ts, "dur": dur}


def test_a_trace_is_read_within_its_last_step(tmp_path: Path) -> None:
    events = [
        event("decode step", "user_annotation", 0, 100),
        event("lost", "kernel", 10, 5),
        event("decode step", "user_annotation", 200, 100),
        event("gemm", "kernel", 210, 30),
        event("Memcpy HtoD", "gpu_memcpy", 250, 2),
        event("Memset", "gpu_memset", 255, 1),
        event("aten::mm", "cpu_op", 205, 3),
        event("behind", "kernel", 301, 7),
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = inside.trace_counts(path)
    assert found == {"kernel": 1, "copy": 1, "fill": 1, "operators": 1, "busy_us": 33.0, "span_us": 46.0}
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[1:2]}, file)
    with pytest.raises(ValueError, match="has no 'decode step'"):
        inside.trace_counts(path)
