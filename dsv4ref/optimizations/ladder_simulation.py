"""Simulated ladders: step times whose truth is known, to try a method on before it is trusted with a GPU.

Nothing here is a measurement, and every name says so. `SimulatedMachine` has a clock that runs while anything runs on
it, a speed that drifts with that clock, first steps that are slow, and two kinds of noise: per window and per step.
`overlap_time` is a model of three switches that act on the same step, for what an order does to their contributions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PARTS", "SimulatedMachine", "SimulatedRung", "overlap_time", "overlap_times"]


@dataclass(frozen=True)
class SimulatedRung:
    """A rung's truth.

    Args:
        change: of speed against the rung before, e.g. 0.01 for one percent faster.
        slow_steps: first steps of a fresh engine that are slow (compilation, tuning, caches).
        faulty: whether its output is another one.
    """

    change: float = 0.0
    slow_steps: int = 3
    faulty: bool = False


@dataclass
class SimulatedMachine:
    """A machine on which simulated rungs run, one at a time.

    Args:
        rungs: name -> truth, in the order of the ladder; the first is the baseline, whose change is 0.
        seed: of the noise.
        step_s: mean seconds of a step of the baseline.
        window_noise: relative standard deviation that the steps of a window share.
        step_noise: relative standard deviation of a single step.
        drift_per_hour: relative change of step times per hour of the machine's clock, as when it warms up.
        slow_factor: how much slower a slow step is.
    """

    rungs: Mapping[str, SimulatedRung]
    seed: int
    step_s: float = 0.4
    window_noise: float = 0.003
    step_noise: float = 0.01
    drift_per_hour: float = 0.0
    slow_factor: float = 60.0
    now: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not self.rungs or next(iter(self.rungs.values())).change:
            raise ValueError(f"rungs: got {dict(self.rungs)}, expected at least a baseline, whose change is 0")
        self._generator = np.random.default_rng(self.seed)
        self._slow_left = {name: rung.slow_steps for name, rung in self.rungs.items()}

    def true_step_s(self, name: str) -> float:
        """Mean seconds of a step of this rung, without drift, slow steps and noise."""
        names = list(self.rungs)
        factors = [1 + self.rungs[other].change for other in names[: names.index(name) + 1]]
        return self.step_s / math.prod(factors)

    def restart(self, name: str) -> None:
        """A fresh engine: its first steps are slow again."""
        self._slow_left[name] = self.rungs[name].slow_steps

    def window(self, name: str, steps: int) -> tuple[float, ...]:
        """Simulated seconds of each of so many steps; the clock moves on by their sum."""
        shared = 1 + self.window_noise * self._generator.standard_normal()
        single = 1 + self.step_noise * self._generator.standard_normal(steps)
        seconds = []
        for factor in np.maximum(shared * single, 0.1):
            slow = self.slow_factor if self._slow_left[name] > 0 else 1.0
            self._slow_left[name] -= 1
            drift = 1 + self.drift_per_hour * self.now / 3600
            seconds.append(float(self.true_step_s(name) * factor * slow * drift))
            self.now += seconds[-1]
        return tuple(seconds)


# --- three switches, one step ---

PARTS = ("fewer launches", "faster kernel", "fewer bytes")
"""The switches of `overlap_time`."""


def overlap_time(on: frozenset[str], *, host_ms: float, device_ms: float) -> float:
    """Milliseconds of a step that takes as long as the slower of host and device: a model, not a measurement.

    Args:
        on: of `PARTS`: the first leaves a third of the host's time, the others 60 % and 90 % of the device's.
        host_ms, device_ms: what host and device need with nothing on.
    """
    host = host_ms / 3 if "fewer launches" in on else host_ms
    device = device_ms * (0.6 if "faster kernel" in on else 1) * (0.9 if "fewer bytes" in on else 1)
    return max(host, device)


def overlap_times(host_ms: float, device_ms: float) -> dict[frozenset[str], float]:
    """`overlap_time` of every set of the switches.

    Raises:
        ValueError: a time that is not positive.
    """
    if not (host_ms > 0 and device_ms > 0):
        raise ValueError(f"host_ms, device_ms: got {host_ms}, {device_ms}, expected times above 0")
    sets = [frozenset(chosen) for n in range(len(PARTS) + 1) for chosen in itertools.combinations(PARTS, n)]
    return {on: overlap_time(on, host_ms=host_ms, device_ms=device_ms) for on in sets}
