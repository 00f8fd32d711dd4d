"""The solutions of chapter 15's exercises, and the figures its text states, checked."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4ref import config
from dsv4ref.evidence import records
from dsv4ref.evidence.launches import count_launches
from dsv4ref.optimizations import catalogue, metadata_cache
from dsv4ref.optimizations.metadata_cache import host_calls, verdicts
from dsv4ref.optimizations.report import report_rows
from dsv4ref.serving.metadata import KEYS, Key, Step, lengths_key, make_step
from dsv4ref.serving.traces import Lengths, decode_trace, prefill_trace

OPT = catalogue.get("metadata_cache")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook
TOPK = config.V3_2.index_topk


@pytest.fixture(scope="module")
def request_key() -> Key:
    """The exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(def request_key.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"np": np}
    exec(solution, names)
    key: Callable[..., Any] = names["request_key"]
    return key


def step_of(requests: tuple[tuple[int, int], ...]) -> Step:
    return make_step([q for q, _ in requests], [q + c for q, c in requests])


def test_the_key_per_request_is_safe(request_key: Key) -> None:
    """Every pair of steps of two requests with up to 3 query tokens, around a top-k of 3."""
    requests = list(itertools.product(range(4), range(6)))
    by_key: dict[Any, set[Any]] = {}
    for pair in itertools.product(requests, repeat=2):
        step = step_of(pair)
        by_key.setdefault(request_key(step, 3), set()).add(lengths_key(step, 3))
    collisions = {key: lengths for key, lengths in by_key.items() if len(lengths) > 1}
    assert not collisions
    assert request_key(make_step([1], [9], on_host=False), 3) is None


def test_the_key_per_request_misses_what_the_solution_says(request_key: Key) -> None:
    one, other = step_of(((3, 0),)), step_of(((1, 0), (2, 1)))
    assert lengths_key(one, TOPK) == lengths_key(other, TOPK)
    assert request_key(one, TOPK) != request_key(other, TOPK)
    edge = [step_of(((1, context),)) for context in (TOPK - 1, TOPK)]
    assert request_key(edge[0], TOPK) == request_key(edge[1], TOPK)


@pytest.mark.parametrize("budget", [8, 9, 20])
def test_exactly_the_prompts_of_twice_the_budget_fail_under_the_published_key(budget: int) -> None:
    for prompt in range(1, 4 * budget):
        found = verdicts(prefill_trace(prompt, budget), 8, KEYS["published"])
        full = prompt // budget
        assert found.count("stale") == max(full - 1, 0), (budget, prompt, found)
        assert found[full:] == ["plan"] * (len(found) - full), "a shorter last chunk plans again"


def c4_entries(length: int) -> int:
    return min(length // 4, config.V4_FLASH.index_topk)


def test_a_c4_plan_changes_in_every_fourth_step_and_not_from_2048_tokens_on() -> None:
    assert [c4_entries(s) for s in (2047, 2048, 5000)] == [511, 512, 512]
    kept = sum(c4_entries(s) == c4_entries(s + 1) for s in range(2000))
    assert kept == 1500
    draw = random.Random(0)
    four = sum(all(draw.randrange(4) for _ in range(4)) for _ in range(20_000)) / 20_000
    assert math.isclose(four, 0.75**4, abs_tol=0.01)  # the same for four requests, where it can be counted
    assert math.isclose(0.75**64, 1e-8, rel_tol=0.05)


# --- what the text states ---


@pytest.mark.parametrize(
    ("budget", "prompt", "garbage"),
    [(8192, 22_000, True), (12_288, 22_000, False), (21_504, 22_000, False), (12_288, 33_000, True)],
)
def test_the_published_key_predicts_the_table_of_vllm_47567(budget: int, prompt: int, garbage: bool) -> None:
    assert ("stale" in verdicts(prefill_trace(prompt, budget), TOPK, KEYS["published"])) == garbage
    for safe in ("vLLM 0.33", "lengths"):
        assert "stale" not in verdicts(prefill_trace(prompt, budget), TOPK, KEYS[safe])


def hits(context: int, key: str) -> int:
    return verdicts(decode_trace([context], 500), TOPK, KEYS[key]).count("reuse")


def test_below_topk_no_key_hits_and_at_its_edge_they_differ_by_one_step() -> None:
    assert {key: hits(1500, key) for key in KEYS} == dict.fromkeys(KEYS, 0)
    assert {key: hits(2047, key) for key in KEYS} == {"published": 499, "vLLM 0.33": 498, "lengths": 499}
    assert {key: hits(2048, key) for key in KEYS} == dict.fromkeys(KEYS, 499)


@pytest.mark.parametrize("case", ["tiny-chunks", "tiny-drafts"])
def test_launches_are_predicted_as_counted(case: str) -> None:
    inputs = OPT.make_inputs(OPT.case(case), "cpu", 0)
    p = OPT.predict(OPT.case(case), "mi355x")
    calls = OPT.timed(inputs)
    counted = {name: count_launches(calls[name], warmup=0, method="aten-dispatch+interpreter").total for name in calls}
    more = len(inputs.steps) * sum(launches - 1 for launches in metadata_cache._REFRESH.values())  # on a GPU
    assert {name: n + more for name, n in counted.items()} == {
        "baseline": p.baseline_launches, "optimized": p.optimized_launches
    }  # fmt: skip
    assert more == len(inputs.steps)


def test_the_records_launch_what_is_predicted() -> None:
    for record in records.latest(records.shipped()):
        if (record.chapter, record.method) == (OPT.id, "graph") and record.variant in ("baseline", "optimized"):
            p = OPT.predict(OPT.case(record.case), record.device)
            want = {"baseline": p.baseline_launches, "optimized": p.optimized_launches}[record.variant]
            assert record.launches == want, (record.case, record.variant)


def test_the_host_calls_fingerprint_every_step_and_launch_nothing() -> None:
    inputs = OPT.make_inputs(OPT.case("v32-64-5k"), "cpu", 0)
    for name, call in host_calls(inputs).items():
        assert call() == len(inputs.steps) - 1, name
    trace = [Lengths((1,), (5,)), Lengths((1,), (6,))]
    assert verdicts(trace, TOPK, lengths_key) == ["plan", "plan"]


def on_h200() -> dict[str, dict[str, Any]]:
    """The shipped H200 records' rows by case."""
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    return {row["case"]: row for row in report_rows(r for r in mine if r.method != records.HOST)}


def test_the_h200s_records_say_what_the_page_says_of_them() -> None:
    rows = on_h200()
    saved = {name: row["baseline_us"] - row["optimized_us"] for name, row in rows.items()}
    for name in ("v32-1-5k", "v32-64-5k", "v32-512-5k"):
        assert rows[name]["ratio"] > rows[name]["predicted"], name
    assert max(saved, key=lambda name: saved[name]) == "v32-1-5k", saved
    same = rows["v32-64-1k"]
    assert same["predicted"] == 1
    assert abs(same["ratio"] - 1) < 0.1, same["ratio"]


def test_the_h200s_host_pays_where_the_key_never_hits() -> None:
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    host = {(r.case, r.variant): r.p50_us for r in mine if r.method == records.HOST}
    cases = {case for case, _ in host}
    assert "v32-64-1k" in cases
    for case in cases:
        saved = host[case, "baseline"] - host[case, "optimized"]
        assert saved > 0 if case != "v32-64-1k" else -saved > host[case, "fingerprints alone"], (case, saved)
