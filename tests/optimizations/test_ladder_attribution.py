"""Attribution on games with known answers: efficiency, symmetry, dummy, precedence; and the engine's own switches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import pytest

from dsv4ref.optimizations import ladder_attribution as attribution
from dsv4ref.optimizations.ladder_attribution import Switches, Times
from dsv4ref.serving.features import Features

NAMES = ("a", "b", "c", "d")


def anything(on: Switches) -> bool:
    return True


def needs_a(on: Switches) -> bool:
    """b and c refine a."""
    return "a" in on or not on & {"b", "c"}


def game(seed: int, names: Sequence[str] = NAMES) -> Times:
    values = np.random.default_rng(seed).uniform(1, 10, 2 ** len(names))
    sets = (frozenset(s) for n in range(len(names) + 1) for s in itertools.combinations(names, n))
    return dict(zip(sets, values.tolist(), strict=True))


def by_orders(times: Times, names: Sequence[str], allowed: Callable[[Switches], bool]) -> dict[str, float]:
    """The definition: every order whose prefixes are allowed, one by one."""
    orders = [o for o in itertools.permutations(names) if all(allowed(s) for s in attribution.prefixes(o))]
    shares = [attribution.cumulative(times, order) for order in orders]
    return {name: sum(share[name] for share in shares) / len(orders) for name in names}


@pytest.mark.parametrize("allowed", [anything, needs_a])
@pytest.mark.parametrize("seed", range(3))
def test_shapley_is_the_mean_over_all_orders_and_adds_up(seed: int, allowed: Callable[[Switches], bool]) -> None:
    times = game(seed)
    shares = attribution.shapley(times, NAMES, allowed)
    assert shares == pytest.approx(by_orders(times, NAMES, allowed))
    assert sum(shares.values()) == pytest.approx(times[frozenset()] - times[frozenset(NAMES)])


def test_a_switch_that_changes_no_time_gets_nothing() -> None:
    inner = game(0, NAMES[:3])
    times = {on: inner[on - {"d"}] for on in game(0)}
    assert attribution.shapley(times, NAMES, anything)["d"] == pytest.approx(0, abs=1e-12)
    assert attribution.leave_one_out(times, NAMES, anything)["d"] == 0


def test_switches_that_may_be_exchanged_get_the_same() -> None:
    counted = game(1)
    times = {
        on: sum(counted[frozenset(NAMES[:n])] for n in range(len(on & {"a", "b"}) + 1)) + len(on) for on in counted
    }
    shares = attribution.shapley(times, NAMES, anything)
    assert shares["a"] == pytest.approx(shares["b"])


def test_where_times_add_up_every_view_says_the_same() -> None:
    worth = dict(zip(NAMES, (3.0, -1.0, 0.5, 2.0), strict=True))
    times = {on: 10 - sum(worth[name] for name in on) for on in game(0)}
    assert attribution.cumulative(times, NAMES) == pytest.approx(worth)
    assert attribution.cumulative(times, NAMES[::-1]) == pytest.approx(worth)
    assert attribution.leave_one_out(times, NAMES, anything) == pytest.approx(worth)
    assert attribution.shapley(times, NAMES, anything) == pytest.approx(worth)


def test_every_orders_contributions_add_up_and_leaving_out_need_not() -> None:
    """The slower of two parts: whoever comes last gets what both together allow."""
    times = {frozenset(): 30.0, frozenset("a"): 28.0, frozenset("b"): 30.0, frozenset("ab"): 14.0}
    assert attribution.cumulative(times, "ab") == {"a": 2.0, "b": 14.0}
    assert attribution.cumulative(times, "ba") == {"b": 0.0, "a": 16.0}
    assert attribution.leave_one_out(times, "ab", anything) == {"a": 16.0, "b": 14.0}
    assert attribution.shapley(times, "ab", anything) == {"a": 9.0, "b": 7.0}


def test_leaving_out_a_switch_takes_along_what_needs_it() -> None:
    assert attribution.reduced(NAMES, "a", needs_a) == {"d"}
    assert attribution.reduced(NAMES, "b", needs_a) == {"a", "c", "d"}


def test_times_per_round_are_attributed_round_by_round() -> None:
    times = [game(seed) for seed in range(5)]
    stacked = {on: np.array([t[on] for t in times]) for on in times[0]}
    shares = attribution.shapley(stacked, NAMES, needs_a)
    for number, alone in enumerate(times):
        single = attribution.shapley(alone, NAMES, needs_a)
        assert {name: share[number] for name, share in shares.items()} == pytest.approx(single)


# --- orders ---


def test_what_a_switch_needs_is_brought_before_it_and_nothing_else_moves() -> None:
    assert attribution.ladder_order("bdca", needs_a) == ("a", "b", "d", "c")
    assert attribution.ladder_order("dabc", needs_a) == tuple("dabc")


def test_two_things_that_a_switch_needs_are_both_brought() -> None:
    def allowed(on: Switches) -> bool:
        return "c" not in on or {"a", "b"} <= on

    assert attribution.ladder_order("cab", allowed) == ("a", "b", "c")


def test_an_order_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted: a cannot be turned on after nothing"):
        attribution.ladder_order("a", lambda on: not on)
    with pytest.raises(ValueError, match="names: got a twice"):
        attribution.ladder_order("aba", anything)


def test_a_missing_time_is_named() -> None:
    times = dict(game(0))
    del times[frozenset("ab")]
    with pytest.raises(ValueError, match=r"times: no time of a \+ b, expected one; there are 15"):
        attribution.cumulative(times, NAMES)


def test_too_many_switches_are_refused_before_their_subsets_are_made() -> None:
    with pytest.raises(ValueError, match="got 15 switches, expected at most 14"):
        attribution.feasible_subsets("abcdefghijklmno", anything)


def test_a_full_set_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names: a \+ b cannot be built"):
        attribution.feasible_subsets("ab", lambda on: len(on) < 2)


# --- the engine's switches ---

SWITCHES = tuple(item.name for item in fields(Features))


def test_feasible_sets_are_those_that_features_accepts() -> None:
    subsets = attribution.feasible_subsets(SWITCHES)
    assert len(set(subsets)) == len(subsets) <= 2 ** len(SWITCHES)
    for count in range(len(SWITCHES) + 1):
        for chosen in itertools.combinations(SWITCHES, count):
            try:
                attribution.features_of(chosen)
                buildable = True
            except ValueError:
                buildable = False
            assert (frozenset(chosen) in subsets) == buildable, chosen


@pytest.mark.parametrize("wanted", [SWITCHES, SWITCHES[::-1]])
def test_every_prefix_of_an_order_of_the_engines_switches_can_be_built(wanted: tuple[str, ...]) -> None:
    order = attribution.ladder_order(wanted)
    assert sorted(order) == sorted(SWITCHES)
    assert all(attribution.allowed_features(rung) for rung in attribution.prefixes(order))


def test_the_sources_order_has_its_rungs_in_the_published_order() -> None:
    order = attribution.source_order(SWITCHES)
    assert sorted(order) == sorted(SWITCHES)
    rungs = ["output_passthrough", "cached_projection", "launch_shape"]
    assert [name for name in order if name in rungs] == rungs


def test_a_switch_is_told_by_name() -> None:
    on = attribution.features_of(["shrink_tail_fill"])
    assert attribution.names_of(on) == ("shrink_tail_fill",)
    with pytest.raises(ValueError, match="switches: got shrink, expected some of"):
        attribution.features_of(["shrink"])
    assert not attribution.allowed_features(frozenset({"no switch"}))


def test_shapley_counts_orders_and_does_not_sample_them() -> None:
    """Nine switches have 362,880 orders; the shares of a sum over pairs are known."""
    names = "abcdefghi"
    times: dict[Switches, float] = {}
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            times[frozenset(chosen)] = -float(math.comb(count, 2))
    assert attribution.shapley(times, names, anything) == pytest.approx(dict.fromkeys(names, 4.0))
