"""Statistics of timing on simulated samples; graph capture and events on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv4ref.evidence import timing
from dsv4ref.evidence.timing import MIN_ROUNDS, bootstrap_ratio, collect, percentiles, rotations, round_order, summarise

ROUNDS = 40
NO_GPU = "timing needs a CUDA or ROCm GPU"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def simulated(rng: np.random.Generator, mean: float, noise: float, drift: np.ndarray | float = 1.0) -> np.ndarray:
    return mean * drift * np.exp(noise * rng.standard_normal(ROUNDS))


def summary(samples: dict[str, np.ndarray]) -> timing.Timing:
    return summarise(
        samples, baseline="a", again="a again", method="graph", device_name="none", rotations=1, flush_bytes=1
    )


# ---- percentiles ----


def test_percentiles_of_a_ramp_are_its_own_values() -> None:
    assert percentiles(list(range(101))[::-1]) == (20.0, 50.0, 80.0)


def test_percentiles_interpolate_between_samples() -> None:
    assert percentiles([1.0, 2.0], (0, 25, 50, 100)) == (1.0, 1.25, 1.5, 2.0)


@pytest.mark.parametrize(
    ("samples", "which", "message"),
    [
        ([], (50,), "samples: got shape"),
        ([1.0, float("nan")], (50,), r"samples\[1\]: got nan"),
        ([1.0], (101,), "which: got"),
    ],
)
def test_percentiles_refuse_what_has_none(samples: list[float], which: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        percentiles(samples, which)


# ---- bootstrap ----


def test_interval_of_equal_variants_covers_one_as_often_as_it_claims() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        ratio = bootstrap_ratio(simulated(rng, 50, 0.02), simulated(rng, 50, 0.02), resamples=1000)
        covered.append(ratio.low <= 1 <= ratio.high)
    share = float(np.mean(covered))
    assert 0.90 <= share <= 0.99, f"a 95 % interval covered the truth in {share:.3f} of 300 runs"


def test_ten_percent_shift_is_found_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(2)
    found = [
        bootstrap_ratio(simulated(rng, 55, 0.02), simulated(rng, 50, 0.02), resamples=1000, seed=i) for i in range(100)
    ]
    assert min(ratio.low for ratio in found) > 1, (
        f"worst lower end {min(ratio.low for ratio in found)}, expected above 1"
    )
    share = float(np.mean([ratio.low <= 1.1 <= ratio.high for ratio in found]))
    assert share >= 0.88, f"the interval held 1.1 in {share:.2f} of 100 runs"


def test_pairing_takes_out_a_drift_that_both_share() -> None:
    rng = np.random.default_rng(3)
    drift = np.linspace(1.0, 3.0, ROUNDS)
    ratio = bootstrap_ratio(simulated(rng, 20, 0.001, drift), simulated(rng, 10, 0.001, drift))
    assert 1.99 < ratio.low <= ratio.median <= ratio.high < 2.01, ratio


def test_bootstrap_is_deterministic_in_its_seed() -> None:
    rng = np.random.default_rng(4)
    a, b = simulated(rng, 10, 0.1), simulated(rng, 10, 0.1)
    assert bootstrap_ratio(a, b, seed=7) == bootstrap_ratio(a, b, seed=7)
    assert len({bootstrap_ratio(a, b, resamples=100, seed=seed) for seed in range(10)}) > 1


def test_median_lies_in_its_interval_even_of_one_round() -> None:
    assert bootstrap_ratio([3.0], [2.0]) == timing.Ratio(1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("a", "b", "resamples", "message"),
    [
        ([1.0, 2.0], [1.0], 1000, "b: got 1 samples, expected 2"),
        ([1.0, 0.0], [1.0, 1.0], 1000, r"a\[1\]: got 0.0, expected a positive time"),
        ([1.0], [float("inf")], 1000, r"b\[0\]: got inf"),
        ([1.0], [1.0], 99, "resamples: got 99"),
    ],
)
def test_bootstrap_refuses_samples_that_are_no_pairs_of_times(
    a: list[float], b: list[float], resamples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_ratio(a, b, resamples=resamples)


# ---- summary ----


def test_median_of_any_sign_has_the_interval_that_a_ratio_of_the_same_samples_has() -> None:
    rng = np.random.default_rng(5)
    drawn = rng.standard_normal(ROUNDS)
    found = timing.bootstrap_median(drawn - np.median(drawn))
    assert found.low < found.median < found.high
    # The middle two of an even number of samples are rounded when their mean is taken off, so 0 comes within an ulp.
    assert abs(found.median) <= np.spacing(np.abs(drawn).max())
    times = simulated(rng, 10.0, 0.05)
    assert timing.bootstrap_median(times, seed=3) == bootstrap_ratio(times, np.ones(ROUNDS), seed=3)
    with pytest.raises(ValueError, match=r"samples\[1\]: got inf, expected a finite number"):
        timing.bootstrap_median([1.0, float("inf")])


def test_noise_floor_is_the_farther_end_of_the_again_interval() -> None:
    assert timing.noise_floor(timing.Ratio(1.01, 0.999, 1.02)) == pytest.approx(0.02)
    assert timing.noise_floor(timing.Ratio(0.98, 0.97, 0.999)) == pytest.approx(0.03)


def test_difference_inside_the_noise_is_rarely_called_resolvable_and_one_above_it_is_found() -> None:
    rng = np.random.default_rng(5)
    equal, faster = [], []
    for _ in range(60):
        run = summary(
            {
                "a": simulated(rng, 100, 0.01),
                "same": simulated(rng, 100, 0.01),
                "faster": simulated(rng, 95, 0.01),
                "a again": simulated(rng, 100, 0.01),
            }
        )
        equal.append(run.resolvable("same"))
        faster.append(run.resolvable("faster"))
    assert np.mean(equal) <= 0.05, f"{np.sum(equal)} of 60 equal pairs were called resolvable"
    assert np.mean(faster) >= 0.95, f"only {np.sum(faster)} of 60 differences of 5 % were resolved"


def test_offset_between_the_two_baselines_hides_a_difference_of_that_size() -> None:
    rng = np.random.default_rng(6)
    samples = {"a": simulated(rng, 100, 1e-4), "b": simulated(rng, 97, 1e-4), "a again": simulated(rng, 97, 1e-4)}
    run = summary(samples)
    assert run.noise_floor == pytest.approx(100 / 97 - 1, abs=2e-3)
    assert not run.resolvable("b")
    samples["b"] = simulated(rng, 90, 1e-4)
    assert summary(samples).resolvable("b")


def test_verdicts_read_as_ratio_with_interval_or_as_not_resolvable() -> None:
    flat = np.full(ROUNDS, 100.0)
    wave = flat * (1 + 0.004 * np.where(np.arange(ROUNDS) % 2, 1, -1))
    run = summary({"a": flat, "a again": wave, "half": flat / 2, "slower": flat / 0.95, "same": flat * 1.002})
    assert run.verdict("half") == "2.00x [2.00, 2.00]"
    assert run.verdict("slower") == "0.950x [0.950, 0.950]"
    assert run.verdict("same") == "not resolvable (0.998, floor 0.4 %)"


def test_record_fields_carry_the_ratio_and_leave_it_empty_for_the_baseline() -> None:
    run = summary({"a": np.full(ROUNDS, 4.0), "a again": np.full(ROUNDS, 4.0), "b": np.full(ROUNDS, 2.0)})
    fields = run.record_fields("b")
    assert (fields["p50_us"], fields["repeats"], fields["ratio"], fields["noise_floor"]) == (2.0, ROUNDS, 2.0, 0.0)
    fields = run.record_fields("a")
    assert [fields[name] for name in ("p50_us", "ratio", "ratio_low", "ratio_high", "noise_floor")] == [4.0] + [
        None
    ] * 4


def test_unknown_names_and_missing_baselines_are_refused() -> None:
    samples = {"a": np.ones(ROUNDS), "a again": np.ones(ROUNDS)}
    run = summary(samples)
    for ask in (run.resolvable, run.verdict):
        with pytest.raises(ValueError, match="name: got 'a', expected a variant compared with the baseline"):
            ask("a")
    with pytest.raises(ValueError, match="name: got 'b'"):
        run.record_fields("b")
    with pytest.raises(ValueError, match="again: got 'a again', expected one of"):
        summary({"a": np.ones(ROUNDS)})


# ---- order, rotation, collection ----


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_name_stands_once_at_every_place_and_neighbours_change_sides(count: int) -> None:
    names = [f"v{i}" for i in range(count)]
    orders = [round_order(names, index) for index in range(2 * count)]
    for cycle in (orders[:count], orders[count:]):
        for place in range(count):
            assert sorted(order[place] for order in cycle) == names
    assert orders[count] == orders[0][::-1]


def test_rotation_exceeds_three_times_the_cache_within_its_limit() -> None:
    assert rotations(10, 100) == 31
    assert 31 * 10 > 3 * 100
    assert rotations(10**9, 100) == 2
    assert rotations(1, 10**9, limit=16) == 16
    with pytest.raises(ValueError, match="set_bytes: got 0"):
        rotations(0, 100)
    with pytest.raises(ValueError, match="limit: got 1"):
        rotations(1, 100, limit=1)


def test_flush_outlasts_the_hosts_submission() -> None:
    assert timing.flush_passes(host_us=10, flush_us=100) == 1
    assert timing.flush_passes(host_us=100, flush_us=100) == 2
    assert timing.flush_passes(host_us=1e6, flush_us=1) == timing.MAX_FLUSH_PASSES


def test_collect_interleaves_and_keeps_equally_many_samples() -> None:
    calls: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        def sample() -> float:
            calls.append(name)
            return float(len(calls))

        return sample

    samples = collect({name: sampler(name) for name in "abc"}, rounds=6, max_seconds=60)
    assert calls == [name for index in range(6) for name in round_order(list("abc"), index)]
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert samples["a"][0] == 1.0
    assert samples["b"][1] == 4.0


def test_collect_stops_at_the_time_limit_but_not_before_enough_rounds() -> None:
    ticks = iter(range(10**6))
    samples = collect({"a": lambda: 1.0}, rounds=100, max_seconds=20, clock=lambda: float(next(ticks)))
    # The clock is first read again once MIN_ROUNDS rounds are there, so 20 ticks are spent 20 readings later.
    assert len(samples["a"]) == MIN_ROUNDS + 19
    ticks = iter(range(0, 10**9, 1000))
    samples = collect({"a": lambda: 1.0}, rounds=100, max_seconds=1, clock=lambda: float(next(ticks)))
    assert len(samples["a"]) == MIN_ROUNDS


# ---- the A/A pair ----


def test_a_difference_between_two_captures_of_the_baseline_is_in_the_noise_floor() -> None:
    rng = np.random.default_rng(8)
    built: list[str] = []

    def build(name: str, mean: float) -> Callable[[], float]:
        built.append(name)
        at = 1 + 0.03 * built.count("a again")  # planted: the second capture lies where memory is 3 % slower
        return lambda: mean * at * float(np.exp(1e-4 * rng.standard_normal()))

    samplers = timing.samplers_of({"a": 100.0, "b": 98.0}, baseline="a", twin=100.0, build=build)
    assert built == ["a", "b", "a again"], "every one is built for itself"
    run = summary({n: np.array(v) for n, v in collect(samplers, rounds=ROUNDS, max_seconds=60).items()})
    assert run.noise_floor == pytest.approx(1 - 1 / 1.03, abs=1e-3)
    assert not run.resolvable("b"), run.verdict("b")


# ---- the host's clock ----


class Clock:
    """Nanoseconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def spend(self, microseconds: int) -> None:
        self.now += 1000 * microseconds


def test_host_time_is_the_calls_own_and_waits_on_either_side_are_not_in_it() -> None:
    clock, log = Clock(), []

    def freed() -> None:
        clock.spend(500)
        log.append("freed")

    def call() -> object:
        clock.spend(7)
        log.append("call")
        return Kept(freed)

    def settle() -> None:
        clock.spend(90)
        log.append("settle")

    sample = timing.host_sampler(call, settle, clock)
    assert [sample(), sample()] == [7.0, 7.0]
    assert log == ["settle", "call", "settle", "freed"] * 2


class Kept:
    """Says when it is freed."""

    def __init__(self, freed: Callable[[], object]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"baseline": "b"}, ValueError, r"baseline: got 'b', expected one of the variants \['a'\]"),
        ({"variants": {"a": 1}}, TypeError, r"variants\['a'\]\[0\]: got int, expected a callable"),
        ({"twin": 1}, TypeError, "twin: got int, expected a callable"),
        ({"rounds": MIN_ROUNDS - 1}, ValueError, "rounds: got 9, expected at least 10"),
        ({"warmup": 0}, ValueError, "warmup: got 0"),
        ({"max_seconds": 0}, ValueError, "max_seconds: got 0"),
    ],
)
def test_time_host_names_the_argument_at_fault(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timing.time_host(**{"variants": {"a": calls(1)[0]}, "baseline": "a", **options})


# ---- arguments ----


def calls(count: int) -> list:
    return [lambda index=index: index for index in range(count)]


SAME = calls(1)[0]


@pytest.mark.parametrize(
    ("variants", "options", "error", "message"),
    [
        ({"a": calls(2)}, {"baseline": "b"}, ValueError, r"baseline: got 'b', expected one of the variants \['a'\]"),
        ({"a": []}, {}, ValueError, r"variants\['a'\]: got no callables"),
        ({"a": calls(2), "b": calls(3)}, {}, ValueError, r"variants\['b'\]: got 3 callables, expected 2 as in 'a'"),
        ({"a": [SAME, SAME]}, {}, ValueError, r"variants\['a'\]: the same callable comes twice"),
        ({"a": [1]}, {}, TypeError, r"variants\['a'\]\[0\]: got int, expected a callable"),
        ({"a": calls(1), "a again": calls(1)}, {}, ValueError, "kept for the second run of the baseline"),
        ({"a": calls(2)}, {"twin": calls(1)}, ValueError, "twin: got 1 callables, expected 2 as in 'a'"),
        ({"a": calls(1)}, {"twin": [None]}, TypeError, r"twin\[0\]: got NoneType, expected a callable"),
        ({"a": calls(1)}, {"rounds": MIN_ROUNDS - 1}, ValueError, "rounds: got 9, expected at least 10"),
        ({"a": calls(1)}, {"warmup": 0}, ValueError, "warmup: got 0"),
        ({"a": calls(1)}, {"flush_bytes": 0}, ValueError, "flush_bytes: got 0"),
        ({"a": calls(1)}, {"method": "wall"}, ValueError, "method: got 'wall', expected one of"),
        ({"a": calls(1)}, {"max_seconds": float("nan")}, ValueError, "max_seconds: got nan"),
    ],
)
def test_time_interleaved_names_the_argument_at_fault(
    variants: dict[str, list], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        timing.time_interleaved(variants, **{"baseline": "a", "flush_bytes": 2**28, **options})


@needs_no_gpu
def test_timing_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"time_interleaved: expected a CUDA or ROCm GPU, but torch .* sees none"):
        timing.time_interleaved({"a": calls(1)}, baseline="a", flush_bytes=2**28)
    with pytest.raises(RuntimeError, match="time_host: expected a CUDA or ROCm GPU"):
        timing.time_host({"a": SAME}, baseline="a")
    with pytest.raises(RuntimeError, match="sample_events: expected a CUDA or ROCm GPU"):
        timing.sample_events(SAME, repeats=1, warmup=1)


# ---- on a GPU ----


def negations(sets: int, times: int, elements: int) -> list:
    """`sets` callables; each negates `times` tensors of its own into outputs of its own."""

    def one() -> Callable[[], None]:
        pairs = [(torch.randn(elements, device="cuda"), torch.empty(elements, device="cuda")) for _ in range(times)]

        def call() -> None:
            for source, target in pairs:
                torch.neg(source, out=target)

        return call

    return [one() for _ in range(sets)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["graph", "events"])
def test_twice_the_traffic_takes_twice_the_time_and_a_twin_is_not_resolvable(method: timing.Method) -> None:
    elements = 1 << 25  # 128 MiB each way: well above the L2, and long against launch gaps
    twice = negations(3, 2, elements)
    run = timing.time_interleaved(
        {"twice": twice, "twin": list(twice), "once": negations(3, 1, elements)},
        baseline="twice",
        flush_bytes=2**28,
        method=method,
    )
    assert 1.9 < run.ratios["once"].median < 2.1, run.verdict("once")
    assert run.resolvable("once"), run.verdict("once")
    assert run.noise_floor < 0.05, f"noise floor {run.noise_floor}, expected below 5 %"
    assert not run.resolvable("twin"), run.verdict("twin")
    floor_us = 2 * 2 * 4 * elements / 10e12 * 1e6  # no card moves 10 TB/s
    assert run.quantiles["twice"].p50_us > floor_us, (run.quantiles["twice"], floor_us)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["graph", "events"])
def test_a_twin_that_moves_more_is_a_noise_floor_of_that_size(method: timing.Method) -> None:
    elements = 1 << 25
    once, twice = (negations(3, times, elements) for times in (1, 2))
    run = timing.time_interleaved(
        {"once": once, "also": negations(3, 1, elements)}, baseline="once", twin=twice, flush_bytes=2**28, method=method
    )
    assert run.noise_floor > 0.45, f"the twin takes twice as long: got a floor of {run.noise_floor}, expected near 0.5"
    assert not run.resolvable("also"), run.verdict("also")


@pytest.mark.gpu
@needs_gpu
def test_the_baseline_is_captured_twice() -> None:
    x, captured = torch.randn(1 << 25, device="cuda"), []

    def call() -> None:
        """Twice the work in its second capture."""
        if torch.cuda.is_current_stream_capturing():
            captured.append(1)
        for _ in range(max(1, len(captured))):
            x.neg_()

    run = timing.time_interleaved({"a": [call]}, baseline="a", flush_bytes=2**28)
    assert len(captured) == 2
    assert run.noise_floor > 0.4, run.noise_floor


@pytest.mark.gpu
@needs_gpu
def test_host_time_leaves_out_what_the_device_does() -> None:
    small, large = torch.ones(1, device="cuda"), torch.ones(1 << 28, device="cuda")
    run = timing.time_host({"large": lambda: large.neg_(), "small": lambda: small.neg_()}, baseline="large")
    device_us = 2 * 4 * large.numel() / 10e12 * 1e6  # no card moves 10 TB/s
    assert run.method == "host"
    assert run.quantiles["large"].p50_us < device_us / 2, (run.quantiles["large"], device_us)
    assert 0.5 < run.ratios["small"].median < 2, run.verdict("small")
    assert run.noise_floor < 0.25, run.noise_floor


@pytest.mark.gpu
@needs_gpu
def test_graph_leaves_out_the_launch_gaps_that_events_include() -> None:
    chain = negations(8, 20, 1024)
    medians = {
        method: timing.time_interleaved({"chain": chain}, baseline="chain", flush_bytes=2**28, method=method)
        .quantiles["chain"]
        .p50_us
        for method in ("graph", "events")
    }
    assert medians["graph"] < medians["events"], medians


@pytest.mark.gpu
@needs_gpu
def test_flush_makes_a_small_input_cold() -> None:
    elements = 1 << 21  # 8 MiB each way: fits any L2 of the cards in this book
    cold = timing.time_interleaved({"cold": negations(1, 1, elements)}, baseline="cold", flush_bytes=2**28).quantiles[
        "cold"
    ]
    call = negations(1, 1, elements)[0]
    warm = timing.time_interleaved(
        {"warm": [lambda: [call() for _ in range(16)]]}, baseline="warm", flush_bytes=2**28
    ).quantiles["warm"]
    assert warm.p50_us / 16 < cold.p50_us, f"warm {warm.p50_us / 16} us, cold {cold.p50_us} us"


@pytest.mark.gpu
@needs_gpu
def test_variant_without_gpu_work_is_refused() -> None:
    host = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"variants\['host'\]: its calls put nothing into the graph"):
        timing.time_interleaved({"host": [lambda: host.neg()]}, baseline="host", flush_bytes=2**28)


@pytest.mark.gpu
@needs_gpu
def test_flush_smaller_than_the_l2_is_refused() -> None:
    with pytest.raises(ValueError, match=r"flush_bytes: got 1024, expected at least the L2 of this GPU, \d+"):
        timing.time_interleaved({"a": negations(1, 1, 8)}, baseline="a", flush_bytes=1024)


@pytest.mark.gpu
@needs_gpu
def test_failed_capture_names_the_variant() -> None:
    # In a process of its own: a failed capture can leave the CUDA context unusable.
    script = (
        "import torch\n"
        "from dsv4ref.evidence import timing\n"
        "x = torch.ones(8, device='cuda')\n"
        "try:\n"
        "    timing.time_interleaved({'good': [lambda: x.neg()], 'bad': [lambda: x.sum().item()]},\n"
        "                            baseline='good', flush_bytes=2**28)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "variants['bad']: graph capture failed with" in done.stdout, (done.stdout, done.stderr[-2000:])
    assert "method='events'" in done.stdout
