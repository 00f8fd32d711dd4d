"""Gates: what must hold before a speedup may be stated.

A gate is a list of checks on named outputs. Each check is a relation:

* ``bit``: dtype, shape, stride and bytes equal to the *baseline*'s output;
* ``exact``: integers equal to the *reference*'s (order matters; sort sets first);
* ``budget``: within a `compare.Tolerance` of the *reference*, which computes in float64 on the same quantised inputs.

A gate that cannot fail is worthless, so every chapter runs its gate on planted bugs (hazards) and requires it to fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.evidence.compare import TOLERANCES, Comparison

__all__ = ["Check", "Gate", "Outputs", "Verdict", "poisoned_allocations"]

Outputs = Mapping[str, Tensor]
Relation = Literal["bit", "exact", "budget"]


@dataclass(frozen=True)
class Check:
    """One relation on one output; `tolerance` names a row of `compare.TOLERANCES` and goes with ``budget`` only.

    An `optional` output is one that some devices cannot produce: its absence passes, and the verdict says so.
    """

    output: str
    relation: Relation
    tolerance: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.relation not in ("bit", "exact", "budget"):
            raise ValueError(f"relation: got {self.relation!r}, expected 'bit', 'exact' or 'budget'")
        if (self.relation == "budget") != (self.tolerance is not None):
            raise ValueError(
                f"tolerance: got {self.tolerance!r} for {self.relation}; only 'budget' takes one, and must"
            )
        if self.tolerance is not None and self.tolerance not in TOLERANCES:
            raise ValueError(f"tolerance: got {self.tolerance!r}, expected one of {sorted(TOLERANCES)}")


@dataclass(frozen=True)
class Verdict:
    """A gate's result: passed only if every comparison passed; `detail` is the worst line, for people.

    `absent` names optional outputs that the candidate did not produce, and that nothing was thus said about.
    """

    gate: str
    passed: bool
    comparisons: tuple[Comparison, ...]
    absent: tuple[str, ...] = ()

    @property
    def detail(self) -> str:
        """The first failing comparison's line, or all lines joined when green."""
        for comparison in self.comparisons:
            if not comparison.passed:
                return comparison.detail
        said = [c.detail for c in self.comparisons]
        return "; ".join([*said, *(f"{output}: does not exist here" for output in self.absent)])


@dataclass(frozen=True)
class Gate:
    """The checks that stand behind one optimisation; `name` is the strictest relation, for tables."""

    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        if all(check.optional for check in self.checks):
            raise ValueError(
                "checks: got none, expected at least one that is not optional (a gate must be able to fail)"
            )

    @property
    def name(self) -> str:
        """The strictest relation any check asserts: ``bit`` over ``exact`` over ``budget``."""
        relations = {check.relation for check in self.checks}
        return next(r for r in ("bit", "exact", "budget") if r in relations)

    def judge(
        self, candidate: Outputs, *, baseline: Outputs, reference: Outputs, yardstick: Outputs | None = None
    ) -> Verdict:
        """Compare a candidate's outputs.

        Args:
            candidate: outputs under test, by name.
            baseline: the unoptimised path's outputs (``bit`` checks).
            reference: the oracle's outputs, float64 or integer (``budget`` and ``exact`` checks).
            yardstick: the straightforward implementation's outputs, where a tolerance asks for one.

        Returns:
            Verdict. A missing output fails, unless its check is optional; it does not raise.
        """
        absent = tuple(c.output for c in self.checks if c.optional and c.output not in candidate)
        checks = [check for check in self.checks if check.output not in absent]
        compared = [self._compare(check, candidate, baseline, reference, yardstick or {}) for check in checks]
        return Verdict(self.name, *_fold(compared), absent)

    def _compare(
        self, check: Check, candidate: Outputs, baseline: Outputs, reference: Outputs, yardstick: Outputs
    ) -> Comparison:
        if check.output not in candidate:
            names = sorted(candidate)
            return Comparison(check.output, check.relation, False, f"{check.output}: missing; outputs are {names}")
        ours = candidate[check.output]
        if check.relation == "bit":
            return compare.identical(check.output, ours, baseline[check.output])
        if check.relation == "exact":
            return compare.identical(check.output, ours, reference[check.output], relation="exact")
        assert check.tolerance is not None
        tolerance = TOLERANCES[check.tolerance]
        return compare.close(check.output, ours, reference[check.output], tolerance, yardstick.get(check.output))


def _fold(comparisons: list[Comparison]) -> tuple[bool, tuple[Comparison, ...]]:
    return all(c.passed for c in comparisons), tuple(comparisons)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the block, `torch.empty` and its kin return NaN (integers: the largest value), not old memory.

    The allocator often hands back memory that already holds the right answer; poisoned, a row nobody wrote shows up.
    Uses PyTorch's own switch (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)
