"""The solutions of chapter 17's exercises, and the figures its text states, checked."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.evidence import timing
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations import ladder_statistics as statistics
from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.ladder_simulation import PARTS, overlap_times
from dsv4ref.ref.numerics import DEFAULT
from dsv4ref.serving.blocks import CacheSizes, PagedCaches

OPT = catalogue.get("attribution_ladder")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def solution(name: str) -> Callable[..., Any]:
    """A function of the exercises as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (found,) = re.findall(rf"```python\n(def {name}\b.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"statistics": statistics, "timing": timing, "attribution": attribution}
    exec(found, names)
    function: Callable[..., Any] = names[name]
    return function


# --- how many rounds ---


def test_the_rule_needs_about_a_hundred_rounds_where_the_formula_says_16() -> None:
    change = statistics.published_rungs()[1].gain_percent / 100
    assert statistics.repeats_to_resolve(change, 0.003) == 16
    needed = solution("rounds_needed")(change, 0.003, trials=60)
    assert 80 <= needed <= 125, needed


def test_a_large_change_needs_the_fewest_rounds_there_are() -> None:
    assert solution("rounds_needed")(0.05, 0.003, trials=50) == timing.MIN_ROUNDS


# --- worth nothing first ---


@pytest.mark.parametrize("host", [10.0, 20.0, 27.0, 30.0, 54.0])
@pytest.mark.parametrize("device", [10.0, 20.0, 30.0, 54.0])
def test_a_kernel_is_worth_nothing_first_and_something_last_between_two_bounds(host: float, device: float) -> None:
    times = overlap_times(host, device)
    first = attribution.cumulative(times, ("faster kernel", "fewer launches", "fewer bytes"))["faster kernel"]
    last = attribution.cumulative(times, ("fewer launches", "fewer bytes", "faster kernel"))["faster kernel"]
    found = first == 0 and last > 1e-9
    assert found == (host / 2.7 < device <= host), (host, device, first, last)


# --- orders that can be built ---


def test_a_third_of_the_orders_can_be_built() -> None:
    def allowed(on: frozenset[str]) -> bool:
        return "a" in on or not on & {"b", "c"}

    names = "abcdef"
    assert solution("orders")(names, allowed) == math.factorial(6) // 3 == 240
    written = [o for o in itertools.permutations(names) if all(allowed(s) for s in attribution.prefixes(o))]
    assert len(written) == 240


# --- what the text states ---


def test_the_first_rungs_are_lost_at_about_four_times_the_noise_of_the_third() -> None:
    edges = [statistics.noise_at_the_edge(rung.gain_percent / 100) for rung in statistics.published_rungs()]
    assert edges[2] == min(edges)
    assert max(edges[:2]) < 4 * edges[2] < min(edges[3:])


def test_the_models_ends_and_its_two_orders_are_as_told() -> None:
    times = overlap_times(30.0, 28.0)
    assert times[frozenset()] == 30
    assert times[frozenset(PARTS)] == pytest.approx(15.12)
    assert attribution.cumulative(times, PARTS)["fewer launches"] == 2
    assert attribution.cumulative(times, PARTS[::-1])["fewer launches"] == pytest.approx(30 - 15.12)
    left_out = attribution.leave_one_out(times, PARTS, lambda on: True)
    assert sum(left_out.values()) > 30 - 15.12


def test_the_claims_account_for_all_but_4_percent_of_the_requests() -> None:
    rate, tpot = OPT.claims
    for when in ("before", "after"):
        assert getattr(rate, when) * getattr(tpot, when) / 1e3 == pytest.approx(0.96 * 1024, rel=0.005)
    rungs = statistics.published_rungs()
    assert (rate.before, rate.after) == (rungs[0].before, rungs[-1].after)


def test_chunks_of_8192_take_nearly_four_times_the_caches_of_2048() -> None:
    preset = workload.get_preset("h200-slice")

    def held(chunk: int) -> int:
        sizes = CacheSizes(slots=64, max_length=preset.max_length, cache_tokens=64 * 1024, chunk=chunk)
        layers = PagedCaches(preset.config, sizes, DEFAULT, "meta").layers
        caches = [cache for layer in layers for cache in (layer.window, layer.compressed) if cache is not None]
        keys = [layer.index_keys for layer in layers if layer.index_keys is not None]
        return sum(cache.data.nbytes for cache in caches) + sum(key.nbytes for key in keys)

    assert 3.5 < held(8192) / held(2048) < 4
