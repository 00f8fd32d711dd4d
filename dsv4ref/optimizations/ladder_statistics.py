"""What a ladder's samples can say: the change of a rung with its interval, the tail of its steps, repeats needed.

A rung is resolved if the whole 95 % interval of its ratio lies outside 1 +- the noise floor of an A/A pair that ran in
the same rounds. That is the rule of every chapter's measurements (`dsv4ref.evidence.timing`), and stricter than a test
at 5 %: where nothing changed it speaks up far more rarely than once in twenty.

The power of a design, two ways: `repeats_to_resolve` by the normal formula, which knows only the noise; and
`resolved_share`, which runs the rule itself on simulated rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dsv4ref.evidence import records, timing
from dsv4ref.evidence.records import PublishedFigure
from dsv4ref.evidence.timing import Ratio

__all__ = [
    "AGAIN",
    "Change",
    "Tail",
    "change",
    "noise_at_the_edge",
    "published_rungs",
    "repeats_to_resolve",
    "resolvable_change",
    "resolved_share",
    "steps_for_tail",
    "tail",
]

AGAIN = "again"
"""Suffix of the subject that is the first rung's second run, the other half of the A/A pair."""

_CONFIDENCE = timing.CONFIDENCE


@dataclass(frozen=True)
class Change:
    """Time before over time after a rung, with its interval, against the noise floor of the same rounds.

    Args:
        ratio: above 1 the rung is faster.
        floor: relative distance from 1 that an A/A pair reached.
        rounds: pairs behind it.
    """

    ratio: Ratio
    floor: float
    rounds: int

    @property
    def sign(self) -> int:
        """1 or -1 where a gain or a loss is resolved, else 0."""
        if self.rounds < timing.MIN_ROUNDS:
            return 0
        return int(self.ratio.low > 1 + self.floor) - int(self.ratio.high < 1 - self.floor)

    @property
    def percent(self) -> tuple[float, float, float]:
        """Change of speed in percent: low, median, high."""
        low, median, high = (100 * (value - 1) for value in (self.ratio.low, self.ratio.median, self.ratio.high))
        return low, median, high

    @property
    def verdict(self) -> str:
        """In words: ``+1.36 % [+1.1, +1.6]``, or ``not resolvable`` with the reason."""
        if self.rounds < timing.MIN_ROUNDS:
            return f"not resolvable ({self.rounds} rounds, expected at least {timing.MIN_ROUNDS})"
        low, median, high = self.percent
        if self.sign:
            return f"{median:+.2f} % [{low:+.2f}, {high:+.2f}]"
        return f"not resolvable ({median:+.2f} % [{low:+.2f}, {high:+.2f}], floor {100 * self.floor:.2f} %)"


def change(before: Sequence[float], after: Sequence[float], floor: float, *, seed: int = 0) -> Change:
    """The change between two rungs that ran in the same rounds.

    Args:
        before, after: seconds per step, one per round and paired by it.
        floor: the rounds' noise floor.
        seed: of the bootstrap.

    Raises:
        ValueError: another number of rounds, a time that is not positive, or a negative floor.
    """
    if not floor >= 0:
        raise ValueError(f"floor: got {floor}, expected a relative distance from 1, at least 0")
    return Change(timing.bootstrap_ratio(before, after, seed=seed), floor, len(before))


# --- the tail ---


@dataclass(frozen=True)
class Tail:
    """A high quantile of step times, or None where there are too few steps to have one.

    Args:
        quantile: such as 0.99.
        seconds: the sample's quantile; None if refused.
        steps, needed: how many there are, and how many there must be.
    """

    quantile: float
    seconds: float | None
    steps: int
    needed: int


def steps_for_tail(quantile: float, confidence: float = _CONFIDENCE) -> int:
    """Steps that make it likely that at least one lies beyond the quantile: ``1 - quantile^n >= confidence``.

    With fewer, no step at all lies beyond it more than once in twenty times, and the largest sample is then called p99.
    No distribution is assumed, independent steps are.

    Args:
        quantile: above 0 and below 1.
        confidence: above 0 and below 1.
    """
    for name, value in (("quantile", quantile), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: got {value}, expected a number between 0 and 1")
    return math.ceil(math.log(1 - confidence) / math.log(quantile))


def tail(seconds: Sequence[float], quantile: float = 0.99) -> Tail:
    """A quantile of single steps, refused where there are fewer than `steps_for_tail`.

    Args:
        seconds: one per step, at least one.
        quantile: above 0 and below 1.
    """
    needed = steps_for_tail(quantile)
    (value,) = timing.percentiles(seconds, (100 * quantile,))
    return Tail(quantile, value if len(seconds) >= needed else None, len(seconds), needed)


# --- power ---


def repeats_to_resolve(relative: float, noise: float, *, power: float = 0.9) -> int:
    """Paired repeats after which a change is told from none, by the normal formula for a mean.

    ``n = ((z_975 + z_power) * sqrt(2) * noise / relative)^2``: each repeat compares two runs, and both are noisy.

    Args:
        relative: the change, e.g. 0.0035.
        noise: relative standard deviation of one run.
        power: probability of telling it.

    Raises:
        ValueError: no change, no noise given as a positive number, or a power outside 0 to 1.
    """
    if not (relative and math.isfinite(relative)):
        raise ValueError(f"relative: got {relative}, expected a change other than 0")
    _noise(noise)
    if not 0 < power < 1:
        raise ValueError(f"power: got {power}, expected a probability between 0 and 1")
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) + NormalDist().inv_cdf(power)
    return max(1, math.ceil((z * math.sqrt(2) * noise / relative) ** 2))


def resolvable_change(noise: float, repeats: int = 1) -> float:
    """The smallest difference of two means of so many runs that noise alone reaches less than once in twenty.

    Args:
        noise: relative standard deviation of one run.
        repeats: runs on either side.
    """
    _noise(noise)
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    return NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * math.sqrt(2 / repeats) * noise


def noise_at_the_edge(relative: float) -> float:
    """The noise of one run from which on a single pair of runs does not show this change."""
    return abs(relative) / resolvable_change(1.0)


def resolved_share(relative: float, noise: float, repeats: int, *, trials: int = 200, seed: int = 0) -> float:
    """How often the rule of `Change` resolves a change with its right sign, on simulated rounds.

    Args:
        relative: the true change of speed; for 0, how often either sign is reported.
        noise: relative standard deviation of one run, normal and independent: the kindest case.
        repeats: rounds, at least `timing.MIN_ROUNDS`.
        trials: simulated ladders.
        seed: of the simulation.
    """
    _noise(noise)
    if repeats < timing.MIN_ROUNDS:
        raise ValueError(f"repeats: got {repeats}, expected at least {timing.MIN_ROUNDS}")
    generator = np.random.default_rng(seed)
    hits = 0
    for trial in range(trials):
        off, again, on = 1 + noise * generator.standard_normal((3, repeats))
        pair = timing.bootstrap_ratio(off, again, resamples=400, seed=trial)
        ratio = timing.bootstrap_ratio(off, on / (1 + relative), resamples=400, seed=trial)
        sign = Change(ratio, timing.noise_floor(pair), repeats).sign
        hits += sign == (1 if relative > 0 else -1) if relative else sign != 0
    return hits / trials


def _noise(noise: float) -> None:
    if not 0 < noise <= 1:
        raise ValueError(f"noise: got {noise}, expected a relative standard deviation above 0, at most 1")


# --- the source's ladder ---


def published_rungs(figures: Sequence[PublishedFigure] | None = None) -> tuple[PublishedFigure, ...]:
    """The source's ladder: the published changes of which each begins where another ended, in that order.

    Args:
        figures: published figures; default all that came with the package.

    Raises:
        ValueError: the figures do not form one chain.
    """
    steps = [f for f in (records.published() if figures is None else figures) if f.what == _BENCHMARK]
    by_start: Mapping[float, PublishedFigure] = {step.before: step for step in steps}
    starts = [step for step in steps if step.before not in {other.after for other in steps}]
    if len(starts) != 1 or len(by_start) != len(steps):
        raise ValueError(f"figures: {len(steps)} changes with {len(starts)} beginnings, expected one chain")
    chain = [starts[0]]
    while (following := by_start.get(chain[-1].after)) is not None:
        chain.append(following)
    if len(chain) != len(steps):
        raise ValueError(f"figures: a chain of {len(chain)} of {len(steps)} changes, expected all of them")
    return tuple(chain)


_BENCHMARK = "output throughput, 512/512, concurrency 1024"
