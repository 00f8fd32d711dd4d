"""The simulated machine does what its rungs say, so that a method can be judged by it."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4ref.optimizations import base, catalogue
from dsv4ref.optimizations.attribution_ladder import machine, measured
from dsv4ref.optimizations.ladder_simulation import SimulatedMachine, SimulatedRung

OPT = catalogue.get("attribution_ladder")
RUNGS = {"off": SimulatedRung(), "a": SimulatedRung(0.25), "b": SimulatedRung(-0.2)}
SIMULATED = [name for name in OPT.cases if name.startswith("simulated")]


def test_changes_of_speed_multiply_along_the_ladder() -> None:
    on = SimulatedMachine(RUNGS, 0, step_s=1.0)
    assert [on.true_step_s(name) for name in RUNGS] == pytest.approx([1.0, 0.8, 1.0])


def test_without_noise_steps_are_the_truth_after_the_slow_ones() -> None:
    on = SimulatedMachine(RUNGS, 0, step_s=1.0, window_noise=0.0, step_noise=0.0, slow_factor=10.0)
    assert on.window("a", 5) == pytest.approx((8, 8, 8, 0.8, 0.8))
    assert on.window("a", 2) == pytest.approx((0.8, 0.8))
    on.restart("a")
    assert on.window("a", 4) == pytest.approx((8, 8, 8, 0.8))
    assert on.now == pytest.approx(25.6 + 1.6 + 24.8)


def test_drift_follows_the_machines_own_clock() -> None:
    on = SimulatedMachine({"off": SimulatedRung(slow_steps=0)}, 0, 36.0, 0.0, 0.0, drift_per_hour=1.0)
    seconds = on.window("off", 3)
    assert seconds == pytest.approx((36.0, 36.0 * 1.01, 36.0 * (1 + 0.0201)))


def test_noise_has_the_stated_size_and_follows_the_seed() -> None:
    quiet = {"off": SimulatedRung(slow_steps=0)}
    windows = np.array([SimulatedMachine(quiet, seed, 1.0, 0.003, 0.01).window("off", 50) for seed in range(200)])
    assert windows.mean(axis=1).std() == pytest.approx(np.hypot(0.003, 0.01 / np.sqrt(50)), rel=0.15)
    assert SimulatedMachine(quiet, 3).window("off", 5) == SimulatedMachine(quiet, 3).window("off", 5)


def test_a_baseline_that_changes_something_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rungs: got .*, expected at least a baseline, whose change is 0"):
        SimulatedMachine({"a": SimulatedRung(0.1)}, 0)


def test_a_ladder_runs_every_rung_and_the_second_baseline_in_every_round() -> None:
    inputs = OPT.make_inputs(OPT.case("simulated"), "cpu", 0)
    windows = measured(inputs, machine(inputs))
    assert len(windows) == inputs.rounds * (len(inputs.rungs) + 1)
    assert {len(window.seconds) for window in windows} == {inputs.window}


@pytest.mark.parametrize("case", SIMULATED)
def test_the_report_is_true_whatever_the_noise(case: str) -> None:
    for seed in (1, 2):
        verdict = base.verify(OPT, case, device="cpu", seed=seed)
        assert verdict.passed, f"seed {seed}: {verdict.detail}"


@pytest.mark.parametrize("hazard", OPT.hazards)
def test_planted_mistakes_are_caught_whatever_the_noise(hazard: str) -> None:
    for seed in (1, 2):
        verdict = base.run_hazard(OPT, hazard, device="cpu", seed=seed)
        assert not verdict.passed, f"seed {seed}: {verdict.detail}"


def test_a_simulated_ladder_has_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="inputs: a simulated ladder, expected one that runs engines"):
        OPT.timed(OPT.make_inputs(OPT.case("simulated"), "cpu", 0))


def test_what_is_timed_is_a_step_and_steps_do_not_run_out() -> None:
    calls = OPT.timed(OPT.make_inputs(OPT.case("tiny"), "cpu", 0))
    assert set(calls) == {"baseline", "optimized"}
    for _ in range(14):  # one more than a request of 16 tokens has behind its warm-up
        calls["baseline"]()
