"""What a ladder's samples can say: signs against known truths, the tail's rule, the power of a design."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsv4ref.evidence import timing
from dsv4ref.evidence.timing import Ratio
from dsv4ref.optimizations import ladder_statistics as statistics
from dsv4ref.optimizations.ladder_statistics import Change


def rounds(mean: float, noise: float, count: int, seed: int) -> list[float]:
    return list(mean * (1 + noise * np.random.default_rng(seed).standard_normal(count)))


@pytest.mark.parametrize(("faster", "sign"), [(1.03, 1), (1.0, 0), (0.97, -1)])
def test_a_change_has_the_sign_of_its_truth(faster: float, sign: int) -> None:
    off, again, on = (rounds(0.4 / f, 0.003, 30, seed) for f, seed in ((1, 1), (1, 2), (faster, 3)))
    found = statistics.change(off, on, timing.noise_floor(timing.bootstrap_ratio(off, again)))
    assert found.sign == sign, found.verdict
    assert found.verdict.startswith("not resolvable") == (sign == 0)
    low, median, high = found.percent
    assert low <= median <= high


def test_an_interval_that_touches_the_floor_is_not_resolved() -> None:
    ratio = Ratio(median=1.02, low=1.01, high=1.03)
    assert Change(ratio, 0.009, 30).sign == 1
    assert Change(ratio, 0.01, 30).sign == 0
    assert Change(Ratio(0.98, 0.97, 0.99), 0.009, 30).sign == -1


def test_too_few_rounds_resolve_nothing_however_large_the_change() -> None:
    found = statistics.change([2.0] * 9, [1.0] * 9, 0.0)
    assert found.sign == 0
    assert "9 rounds, expected at least 10" in found.verdict


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor: got -0\.1, expected a relative distance"):
        statistics.change([1.0], [1.0], -0.1)


# --- the tail ---


@pytest.mark.parametrize("quantile", [0.9, 0.95, 0.99, 0.999])
def test_the_steps_for_a_tail_are_the_fewest_that_reach_it_19_times_in_20(quantile: float) -> None:
    needed = statistics.steps_for_tail(quantile)
    assert 1 - quantile**needed >= 0.95 > 1 - quantile ** (needed - 1)


def test_a_p99_is_refused_below_299_steps_and_not_from_there_on() -> None:
    steps = [float(n) for n in range(1, 300)]
    assert statistics.tail(steps[:298]).seconds is None
    found = statistics.tail(steps)
    assert found.seconds == pytest.approx(np.percentile(steps, 99))
    assert (found.steps, found.needed) == (299, 299)


@pytest.mark.parametrize("quantile", [0.0, 1.0, 99.0])
def test_a_quantile_is_a_share(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile: got"):
        statistics.tail([1.0], quantile)


# --- power ---


def test_repeats_rise_with_the_square_of_noise_over_change() -> None:
    once = statistics.repeats_to_resolve(0.01, 0.01)
    assert statistics.repeats_to_resolve(0.01, 0.02) == pytest.approx(4 * once, abs=3)
    assert statistics.repeats_to_resolve(-0.01, 0.01) == once


def test_the_formula_is_a_tests_power_on_simulated_means() -> None:
    """At the computed number of repeats, a z-test of the paired differences sees the change nine times in ten."""
    change, noise = 0.0035, 0.003
    repeats = statistics.repeats_to_resolve(change, noise, power=0.9)
    pairs = noise * np.random.default_rng(0).standard_normal((4000, 2, repeats))
    means = (change + pairs[:, 0] - pairs[:, 1]).mean(axis=1)
    seen = float((means > 1.959964 * np.sqrt(2 / repeats) * noise).mean())
    assert 0.88 < seen < 0.94, seen


def test_the_edge_of_noise_is_where_the_resolvable_change_is_the_change() -> None:
    edge = statistics.noise_at_the_edge(-0.0016)
    assert statistics.resolvable_change(edge) == pytest.approx(0.0016)
    assert statistics.resolvable_change(edge, 4) == pytest.approx(0.0008)


def test_the_rule_seldom_speaks_where_nothing_changed_and_nearly_always_where_much_did() -> None:
    assert statistics.resolved_share(0.0, 0.003, 30) <= 0.02
    assert statistics.resolved_share(0.02, 0.003, 30) == 1.0
    assert statistics.resolved_share(-0.02, 0.003, 30) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.repeats_to_resolve(0.0, 0.01), "relative: got 0.0"),
        (lambda: statistics.repeats_to_resolve(0.01, 0.0), "noise: got 0.0"),
        (lambda: statistics.repeats_to_resolve(0.01, 0.01, power=1.0), "power: got 1.0"),
        (lambda: statistics.resolvable_change(0.01, 0), "repeats: got 0"),
        (lambda: statistics.resolved_share(0.01, 0.01, 5), "repeats: got 5, expected at least 10"),
    ],
)
def test_a_design_that_cannot_be_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


# --- the source's ladder ---


def test_the_published_rungs_are_one_chain_that_ends_at_the_published_total() -> None:
    rungs = statistics.published_rungs()
    assert [rung.before for rung in rungs[1:]] == [rung.after for rung in rungs[:-1]]
    assert (rungs[0].before, rungs[-1].after) == (2485.06, 2645.87)
    assert [rung.gain_percent < 0 for rung in rungs] == [False, False, True, False, False]


def test_figures_that_form_no_chain_are_refused() -> None:
    first, second, *rest = statistics.published_rungs()
    with pytest.raises(ValueError, match="5 changes with 2 beginnings, expected one chain"):
        statistics.published_rungs([first, replace(second, before=1.0), *rest])
