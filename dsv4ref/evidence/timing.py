"""Interleaved timing on a GPU, and the statistics that turn samples into a ratio with an interval.

Two halves. The upper half is arithmetic over samples and runs anywhere: `percentiles`, `bootstrap_ratio`, `summarise`,
`round_order`, `rotations`, `collect`. The lower half touches the device: `time_interleaved` captures every variant into
a graph (or calls it eagerly between two events), `time_host` asks the host's clock for the time that calls take to
return, and both hand samples to the upper half.

A sample of device time is that of R calls over R different input sets, divided by R. Before each sample a buffer larger
than the L2 is written and then read, outside the timed region, so that no call finds its inputs cached and none pays
for writing back the lines that the flush left dirty. A sample of host time is one call's, submitted to an idle device.

Every round runs all variants, and a second baseline, the twin; their ratio is the A/A ratio that gives the noise floor.
The twin is a capture of its own, over buffers of its own where the caller built it anew: two captures of the same
launches can differ by more than two replays of one, and two variants never share a capture. A floor from two replays of
one capture would leave that out.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict, TypeVar, get_args

import numpy as np
import torch

from dsv4ref.evidence.records import HOST

Method = Literal["graph", "events"]
Samples: TypeAlias = Sequence[float] | np.ndarray
Calls = TypeVar("Calls")

MIN_ROUNDS = 10  # fewer paired ratios than this give a bootstrap interval that says nothing
RESAMPLES = 4000
CONFIDENCE = 0.95
MAX_FLUSH_PASSES = 32


class TimingFields(TypedDict):
    """The part of a measurement record that a `Timing` fills in."""

    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int
    method: str
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    noise_floor: float | None


@dataclass(frozen=True)
class Quantiles:
    """Time of one call, in microseconds, over `repeats` samples."""

    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its bootstrap 95 % interval: `median` in [`low`, `high`]."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Samples of one interleaved run, and what they say.

    `samples_us` maps each variant, and the baseline's twin `again`, to one sample per round. `ratios` maps every name
    except the baseline to baseline / variant (above 1: the variant is faster). `noise_floor` is the distance from 1 of
    the farther end of the A/A ratio's 95 % interval: it covers both the width of that interval and its offset from 1.
    """

    method: str
    device_name: str
    baseline: str
    again: str
    rotations: int
    flush_bytes: int
    samples_us: Mapping[str, tuple[float, ...]]
    quantiles: Mapping[str, Quantiles]
    ratios: Mapping[str, Ratio]
    noise_floor: float

    def resolvable(self, name: str) -> bool:
        """True if the whole interval of `name`'s ratio lies outside 1 +- the noise floor.

        Raises ValueError if `name` has no ratio in this run.
        """
        ratio = self._ratio(name)
        return ratio.low > 1 + self.noise_floor or ratio.high < 1 - self.noise_floor

    def verdict(self, name: str) -> str:
        """The ratio of `name` in words: '1.93x [1.91, 1.95]', or 'not resolvable (0.998, floor 0.4 %)'.

        Raises ValueError if `name` has no ratio in this run.
        """
        ratio = self._ratio(name)
        if not self.resolvable(name):
            return f"not resolvable ({ratio.median:.3f}, floor {100 * self.noise_floor:.1f} %)"
        digits = 2 if abs(ratio.median - 1) >= 0.1 else 3
        return f"{ratio.median:.{digits}f}x [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"

    def record_fields(self, name: str) -> TimingFields:
        """The times of variant `name`, and its ratio (None for the baseline), as fields of a measurement record.

        Raises ValueError if `name` is not a variant of this run.
        """
        if name not in self.quantiles:
            raise ValueError(f"name: got {name!r}, expected one of {sorted(self.quantiles)}")
        quantiles = self.quantiles[name]
        ratio = None if name == self.baseline else self.ratios[name]
        return TimingFields(
            p20_us=quantiles.p20_us,
            p50_us=quantiles.p50_us,
            p80_us=quantiles.p80_us,
            repeats=quantiles.repeats,
            method=self.method,
            ratio=None if ratio is None else ratio.median,
            ratio_low=None if ratio is None else ratio.low,
            ratio_high=None if ratio is None else ratio.high,
            noise_floor=None if ratio is None else self.noise_floor,
        )

    def _ratio(self, name: str) -> Ratio:
        if name not in self.ratios:
            raise ValueError(
                f"name: got {name!r}, expected a variant compared with the baseline {self.baseline!r}: "
                f"one of {sorted(self.ratios)}"
            )
        return self.ratios[name]


# ---- statistics over samples: no device ----


def percentiles(samples: Samples, which: Sequence[float] = (20, 50, 80)) -> tuple[float, ...]:
    """Percentiles of `samples` by linear interpolation.

    Args:
        samples: finite numbers, at least one.
        which: percentages in [0, 100].

    Returns: one float per entry of `which`, in the unit of `samples`.

    Raises: ValueError for no samples, a sample that is not finite, or a percentage outside [0, 100].
    """
    values = _finite("samples", samples)
    if any(not 0 <= q <= 100 for q in which):
        raise ValueError(f"which: got {list(which)}, expected percentages in [0, 100]")
    return tuple(float(value) for value in np.percentile(values, list(which)))


def bootstrap_ratio(a: Samples, b: Samples, *, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """Median of the paired ratios a[i] / b[i] with a percentile-bootstrap 95 % interval.

    Pairing by round takes out what both members of a pair share: clocks, temperature, a neighbour on the machine. The
    rounds are resampled as if independent; a drift that outlasts a round and hits one variant alone is not covered.

    Args:
        a, b: positive finite times of the same rounds, equally many, in one unit.
        resamples: bootstrap draws.
        seed: of the draws; the same samples and seed give the same interval.

    Returns: `Ratio`; low <= median <= high.

    Raises: ValueError if lengths differ, a value is not positive and finite, or `resamples` is below 100.
    """
    first, second = _positive("a", a), _positive("b", b)
    if len(first) != len(second):
        raise ValueError(f"b: got {len(second)} samples, expected {len(first)}, one per round as in a")
    return bootstrap_median(first / second, resamples=resamples, seed=seed)


def bootstrap_median(samples: Samples, *, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """Median of samples, of either sign, with a percentile-bootstrap 95 % interval.

    Args:
        samples: finite numbers, one per round.
        resamples: bootstrap draws.
        seed: of the draws; the same samples and seed give the same interval.

    Returns: `Ratio`; low <= median <= high.

    Raises: ValueError for no samples, a sample that is not finite, or `resamples` below 100.
    """
    values = _finite("samples", samples)
    if resamples < 100:
        raise ValueError(f"resamples: got {resamples}, expected at least 100")
    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    medians = np.median(values[draws], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, [tail, 100 - tail])
    median = float(np.median(values))
    return Ratio(median=median, low=min(float(low), median), high=max(float(high), median))


def noise_floor(again: Ratio) -> float:
    """The noise floor of an A/A ratio: how far from 1 the farther end of its 95 % interval lies."""
    return max(abs(again.low - 1), abs(again.high - 1))


def summarise(
    samples_us: Mapping[str, Samples],
    *,
    baseline: str,
    again: str,
    method: str,
    device_name: str,
    rotations: int,
    flush_bytes: int,
    seed: int = 0,
) -> Timing:
    """Turn one sample per variant and round into a `Timing`.

    Args:
        samples_us: microseconds per call; equally many for every name; holds `baseline` and `again`, its twin.
        baseline, again: names of the A/A pair.
        method, device_name, rotations, flush_bytes: how the samples were taken; stored as given.
        seed: of the bootstrap.

    Raises: ValueError if a name is missing or a sample is not a positive finite number.
    """
    for argument, name in (("baseline", baseline), ("again", again)):
        if name not in samples_us:
            raise ValueError(f"{argument}: got {name!r}, expected one of {sorted(samples_us)}")
    kept = {name: tuple(_positive(f"samples_us[{name!r}]", values).tolist()) for name, values in samples_us.items()}
    ratios = {
        name: bootstrap_ratio(kept[baseline], values, seed=seed) for name, values in kept.items() if name != baseline
    }
    return Timing(
        method=method,
        device_name=device_name,
        baseline=baseline,
        again=again,
        rotations=rotations,
        flush_bytes=flush_bytes,
        samples_us=kept,
        quantiles={name: _quantiles(values) for name, values in kept.items()},
        ratios=ratios,
        noise_floor=noise_floor(ratios[again]),
    )


def _quantiles(samples: Samples) -> Quantiles:
    p20, p50, p80 = percentiles(samples, (20, 50, 80))
    return Quantiles(p20_us=p20, p50_us=p50, p80_us=p80, repeats=len(samples))


def round_order(names: Sequence[str], index: int) -> list[str]:
    """The order in which round `index` runs `names`.

    The order starts one place later each round, so that over len(names) rounds each name stands once at each place;
    every other such cycle runs backwards, so that no name always follows the same neighbour.
    """
    start = index % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if (index // len(names)) % 2 else order


def rotations(set_bytes: int, l2_bytes: int, *, limit: int = 64) -> int:
    """How many input sets to rotate through: together more than three times the L2, and between 2 and `limit`.

    `limit` bounds the host's work for small inputs. It costs no coldness: each set is read once per sample, and the L2
    is flushed before the sample.

    Args:
        set_bytes: bytes that one call reads and writes.
        l2_bytes: size of the device's last-level cache.

    Raises: ValueError for sizes that are not positive or a limit below 2.
    """
    for name, value, least in (("set_bytes", set_bytes, 1), ("l2_bytes", l2_bytes, 1), ("limit", limit, 2)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    return min(max(2, 3 * l2_bytes // set_bytes + 1), limit)


def flush_passes(host_us: float, flush_us: float) -> int:
    """How many flush passes keep the device busy while the host submits a sample (half as long again, for safety).

    A device that has finished flushing before the sample arrives would wait inside the timed region.
    """
    return min(max(1, math.ceil(1.5 * host_us / flush_us)), MAX_FLUSH_PASSES)


def samplers_of(
    variants: Mapping[str, Calls], *, baseline: str, twin: Calls, build: Callable[[str, Calls], Callable[[], float]]
) -> dict[str, Callable[[], float]]:
    """One sampler per variant, and one more for the baseline's twin: `build` runs for every one of them.

    Args:
        variants: name -> what is timed.
        baseline: the variant whose twin makes the A/A pair.
        twin: the baseline, built a second time.
        build: (name, what is timed) -> a function that takes one sample; what it captures belongs to that sampler.

    Returns: name -> sampler; the twin's is named '<baseline> again'.
    """
    return {name: build(name, calls) for name, calls in {**variants, f"{baseline} again": twin}.items()}


def collect(
    samplers: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    max_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Run every sampler once per round, in `round_order`, and keep what each returns.

    Stops early after the round in which `max_seconds` have passed, but never before `MIN_ROUNDS` rounds.

    Returns: name -> one sample per finished round, equally many for all.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    started = clock()
    for index in range(rounds):
        for name in round_order(list(samplers), index):
            samples[name].append(samplers[name]())
        if index + 1 >= MIN_ROUNDS and clock() - started >= max_seconds:
            break
    return samples


# ---- the device ----


def time_interleaved(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    *,
    baseline: str,
    twin: Sequence[Callable[[], object]] | None = None,
    rounds: int = 40,
    warmup: int = 5,
    flush_bytes: int,
    method: Method = "graph",
    max_seconds: float = 60.0,
    seed: int = 0,
) -> Timing:
    """Time variants of one operation against a baseline, interleaved in one process, on the current GPU.

    Args:
        variants: name -> R callables without arguments, the same operation over R different input sets built by the
            caller (`rotations` says how many); R is the same for all variants. Operands shared between sets stay warm.
        baseline: the variant that ratios are against.
        twin: the baseline's R callables built a second time, with outputs and scratch of their own; captured and timed
            as '<baseline> again', it gives the noise floor. None captures the baseline's own calls a second time:
            what they allocate is then the twin's own, what they were built with is shared.
        rounds: samples per variant, at least `MIN_ROUNDS`.
        warmup: untimed passes over each variant before capture, and untimed rounds after it; at least 1.
        flush_bytes: size of the buffer that is written and read before each sample; at least the L2.
        method: 'graph' replays one captured graph of the R calls: device time alone. 'events' calls eagerly between
            two events: device time plus the gaps in which the device waits for the host.
        max_seconds: stop after the round in which this has passed, but not before `MIN_ROUNDS` rounds.
        seed: of the bootstrap.

    Returns: `Timing`.

    Raises:
        ValueError or TypeError: an argument is not as described.
        RuntimeError: no GPU; a variant that cannot be captured, or that puts no work into its graph.
    """
    again = _check_variants(variants, baseline)
    if twin is not None:
        _check_calls("twin", twin, len(variants[baseline]), baseline)
    _check_rounds(rounds, warmup, max_seconds)
    if flush_bytes < 1:
        raise ValueError(f"flush_bytes: got {flush_bytes}, expected at least the size of the L2 in bytes")
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}, expected one of {list(get_args(Method))}")
    require_gpu("time_interleaved")
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    if flush_bytes < l2_bytes:
        raise ValueError(f"flush_bytes: got {flush_bytes}, expected at least the L2 of this GPU, {l2_bytes}")

    flush, submissions_us = _Flush(flush_bytes), list[float]()

    def build(name: str, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        if method == "graph":
            graph = _Graph(name, calls, warmup)
            submissions_us.append(graph.host_us())
            return _sampler(graph.replay, len(calls), flush)
        run = _in_turn(calls)
        for _ in range(warmup):
            run()
        return _sampler(run, len(calls), flush)

    samplers = samplers_of(variants, baseline=baseline, twin=variants[baseline] if twin is None else twin, build=build)
    if submissions_us:
        flush.cover(max(submissions_us))
    collect(samplers, rounds=warmup, max_seconds=max_seconds)
    samples = collect(samplers, rounds=rounds, max_seconds=max_seconds)
    return summarise(
        samples,
        baseline=baseline,
        again=again,
        method=method,
        device_name=torch.cuda.get_device_name(),
        rotations=len(variants[baseline]),
        flush_bytes=flush_bytes,
        seed=seed,
    )


def time_host(
    variants: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    twin: Callable[[], object] | None = None,
    rounds: int = 300,
    warmup: int = 20,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> Timing:
    """Time how long calls keep the host, from the call to its return, interleaved in one process beside a GPU.

    The device is idle when a call begins, and whatever the call leaves it to do is waited for outside the timed region:
    a sample holds Python, checks, allocation and submission, not the work submitted, unless the call itself waits for
    it. Python's garbage collector is off meanwhile, as in `timeit`.

    Args:
        variants: name -> a callable without arguments.
        baseline: the variant that ratios are against.
        twin: the baseline built a second time, the other half of the A/A pair; None calls the baseline itself.
        rounds: samples per variant, at least `MIN_ROUNDS`.
        warmup: untimed rounds first, at least 1.
        max_seconds: as `time_interleaved`.
        seed: of the bootstrap.

    Returns: `Timing` with method 'host', of one input set, without a flush.

    Raises:
        ValueError or TypeError: an argument is not as described.
        RuntimeError: no GPU.
    """
    again = _check_variants({name: (call,) for name, call in variants.items()}, baseline)
    if twin is not None and not callable(twin):
        raise TypeError(f"twin: got {type(twin).__name__}, expected a callable")
    _check_rounds(rounds, warmup, max_seconds)
    require_gpu("time_host")
    samplers = samplers_of(
        variants,
        baseline=baseline,
        twin=variants[baseline] if twin is None else twin,
        build=lambda _, call: host_sampler(call, torch.cuda.synchronize),
    )
    collect(samplers, rounds=warmup, max_seconds=max_seconds)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        samples = collect(samplers, rounds=rounds, max_seconds=max_seconds)
    finally:
        if collects:
            gc.enable()
    return summarise(
        samples,
        baseline=baseline,
        again=again,
        method=HOST,
        device_name=torch.cuda.get_device_name(),
        rotations=1,
        flush_bytes=0,
        seed=seed,
    )


def host_sampler(
    call: Callable[[], object],
    settle: Callable[[], None],
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Callable[[], float]:
    """A function that takes one sample of host time: microseconds from a call to its return.

    Args:
        call: what is timed; what it returns is dropped after the clock has stopped.
        settle: waits for the device; runs before and after the timed region.
        clock: nanoseconds.
    """

    def sample() -> float:
        settle()
        started = clock()
        kept = call()
        elapsed = clock() - started
        settle()
        del kept
        return elapsed / 1e3

    return sample


def sample_events(call: Callable[[], object], *, repeats: int, warmup: int) -> list[float]:
    """Device time of single eager calls between two events, in microseconds, one entry per repeat; no flush.

    For calls long enough (well above 100 us) that neither launch gaps nor cached operands matter.

    Raises: ValueError for `repeats` or `warmup` below 1; RuntimeError without a GPU.
    """
    for name, value in (("repeats", repeats), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    require_gpu("sample_events")
    for _ in range(warmup):
        call()
    pairs = [_event_pair() for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairs]


def require_gpu(caller: str) -> None:
    """Raise RuntimeError, naming `caller` and this torch, if torch sees no CUDA or ROCm GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{caller}: expected a CUDA or ROCm GPU, but torch {torch.__version__} sees none "
            "(torch.cuda.is_available() is False); nothing is timed on a CPU"
        )


class _Flush:
    """Evicts the L2: writes a buffer, which pushes everything else out, then reads it, which leaves its lines clean."""

    def __init__(self, size: int) -> None:
        self._buffer = torch.zeros(math.ceil(size / 4), dtype=torch.float32, device="cuda")
        self._sink = torch.zeros((), dtype=torch.float32, device="cuda")
        self._passes = 1

    def __call__(self) -> None:
        for _ in range(self._passes):
            self._buffer.zero_()
            torch.amax(self._buffer, dim=0, out=self._sink)

    def cover(self, host_us: float) -> None:
        """Repeat the flush often enough to hide `host_us` of submission behind it."""
        self._passes = 1
        flush_us = percentiles(sample_events(self, repeats=5, warmup=2), (50,))[0]
        self._passes = flush_passes(host_us, flush_us)


class _Graph:
    """One captured graph of all calls of a variant; keeps what the calls use and return alive."""

    def __init__(self, name: str, calls: Sequence[Callable[[], object]], warmup: int) -> None:
        # The side stream is the capture stream too: what warm-up created for a stream (workspaces, scratch) is reused.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

        self._calls = tuple(calls)
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves the capture stream current when ending the capture fails; the outer context does not.
        try:
            with (
                torch.cuda.stream(stream),
                warnings.catch_warnings(record=True, action="always") as caught,
                torch.cuda.graph(self._graph, stream=stream),
            ):
                # Outputs stay alive so that each call writes memory of its own instead of its predecessor's.
                self._outputs = [call() for call in calls]
        except Exception as error:
            raise RuntimeError(
                f"variants[{name!r}]: graph capture failed with {type(_root(error)).__name__}: "
                f"{_first_line(_root(error))}; expected calls without host synchronisation, or use method='events'"
            ) from error
        for warning in caught:
            if "graph is empty" in str(warning.message).lower():
                raise RuntimeError(
                    f"variants[{name!r}]: its calls put nothing into the graph; expected work on the current GPU and "
                    "stream (are the tensors on the GPU?)"
                )
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def replay(self) -> None:
        self._graph.replay()

    def host_us(self) -> float:
        """Host time to submit one replay to an idle device, in microseconds: the slowest of five, after a first."""
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._graph.replay()
            times.append(1e6 * (time.perf_counter() - started))
        torch.cuda.synchronize()
        return max(times[1:])


def _sampler(run: Callable[[], None], calls: int, flush: Callable[[], None]) -> Callable[[], float]:
    start, end = _event_pair()

    def sample() -> float:
        flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / calls

    return sample


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: ending a failed capture raises again and hides the cause."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]


# ---- argument checks ----


def _check_variants(variants: Mapping[str, Sequence[Callable[[], object]]], baseline: str) -> str:
    """Check `variants` and `baseline`; return the name of the baseline's twin."""
    if baseline not in variants:
        raise ValueError(f"baseline: got {baseline!r}, expected one of the variants {sorted(variants)}")
    again = f"{baseline} again"
    if again in variants:
        raise ValueError(f"variants: got a variant named {again!r}, which is kept for the second run of the baseline")
    expected = len(variants[baseline])
    if expected == 0:
        raise ValueError(f"variants[{baseline!r}]: got no callables, expected one per input set")
    for name, calls in variants.items():
        _check_calls(f"variants[{name!r}]", calls, expected, baseline)
    return again


def _check_calls(argument: str, calls: Sequence[Callable[[], object]], expected: int, baseline: str) -> None:
    if len(calls) != expected:
        raise ValueError(
            f"{argument}: got {len(calls)} callables, expected {expected} as in {baseline!r}: a ratio needs both sides "
            "to rotate through equally many input sets"
        )
    for index, call in enumerate(calls):
        if not callable(call):
            raise TypeError(f"{argument}[{index}]: got {type(call).__name__}, expected a callable")
    if len({id(call) for call in calls}) != len(calls):
        raise ValueError(
            f"{argument}: the same callable comes twice, expected one per input set: a repeated one would find its "
            "inputs in the cache"
        )


def _check_rounds(rounds: int, warmup: int, max_seconds: float) -> None:
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: got {rounds}, expected at least {MIN_ROUNDS}")
    if warmup < 1:
        raise ValueError(f"warmup: got {warmup}, expected at least 1")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds: got {max_seconds}, expected a positive number of seconds")


def _finite(name: str, samples: Samples) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name}: got shape {values.shape}, expected at least one number in one dimension")
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{worst}]: got {values[worst]}, expected a finite number")
    return values


def _positive(name: str, samples: Samples) -> np.ndarray:
    values = _finite(name, samples)
    if values.min() <= 0:
        worst = int(values.argmin())
        raise ValueError(f"{name}[{worst}]: got {values[worst]}, expected a positive time")
    return values
