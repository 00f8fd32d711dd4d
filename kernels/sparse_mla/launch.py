"""Launch shapes of the sparse decode, as data: the static shape, the published table, and this workbook's selection.

A launch shape trades four things. A larger BLOCK_H re-reads a row's keys fewer times (once per head block) but leaves
fewer workgroups; a larger BLOCK_K amortises the softmax bookkeeping but needs registers and LDS for the key tile.

Source of the static shape and the published table: doubleword's vLLM fork, ``_select_sparse_decode_config``,
commit a767c4d13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PUBLISHED", "SELECTION", "STATIC", "LaunchShape", "Rule", "choose", "select_launch", "table_for"]

_LARGEST_KEY_TILE = 64


@dataclass(frozen=True)
class LaunchShape:
    """Tile and resources of one launch: BLOCK_H heads by BLOCK_K slots, warps (waves on AMD), pipeline stages."""

    block_h: int
    block_k: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name in ("block_h", "block_k", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value!r}, expected a positive power of two")
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"num_stages: got {self.num_stages!r}, expected a positive integer")
        if self.block_k > _LARGEST_KEY_TILE:
            # 64x128 with 8 warps compiles on sm_90 (Triton 3.6) and returns wrong numbers; chapter 05 tells the story.
            raise ValueError(f"block_k: got {self.block_k}, expected at most {_LARGEST_KEY_TILE}")

    def __str__(self) -> str:
        return f"{self.block_h}x{self.block_k} w{self.num_warps} s{self.num_stages}"

    def workgroups(self, rows: int, heads: int) -> int:
        """Programs launched for ``rows`` query rows of ``heads`` heads."""
        return rows * -(-heads // self.block_h)


@dataclass(frozen=True)
class Rule:
    """One line of a selection table: a shape, why, and when. Bounds are inclusive, None is unbounded.

    `min_workgroups` and `max_workgroups` bound the programs that this very shape would launch.
    """

    shape: LaunchShape
    reason: str
    min_rows: int = 0
    max_rows: int | None = None
    min_extra: int = 0
    max_extra: int | None = None
    min_workgroups: int = 0
    max_workgroups: int | None = None
    max_heads: int | None = None

    def matches(self, rows: int, heads: int, extra_width: int) -> bool:
        """Whether the rule covers a call with this many query rows, heads and extra slots per row."""
        return (
            _within(rows, self.min_rows, self.max_rows)
            and _within(extra_width, self.min_extra, self.max_extra)
            and _within(heads, 1, self.max_heads)
            and _within(self.shape.workgroups(rows, heads), self.min_workgroups, self.max_workgroups)
        )


def _within(value: int, low: int, high: int | None) -> bool:
    return low <= value and (high is None or value <= high)


STATIC = LaunchShape(16, 16, 4)
"""What the port used for every batch before the optimisation (its head_dim >= 256 branch)."""

PUBLISHED = (
    Rule(LaunchShape(64, 16, 4), "SWA-only layers, large batch", min_rows=256, max_extra=0),
    Rule(LaunchShape(64, 16, 8), "narrow extra scope, large batch", min_rows=256, max_extra=8),
    Rule(LaunchShape(32, 16, 4), "narrow extra scope, medium batch", min_rows=80, max_rows=255, max_extra=8),
    Rule(LaunchShape(16, 16, 4), "narrow extra scope, exactly 32 rows", min_rows=32, max_rows=32, max_extra=8),
    Rule(LaunchShape(16, 32, 4), "narrow extra scope, small batch", max_rows=79, max_extra=8),
    Rule(LaunchShape(4, 64, 4), "wide extra scope, fewer than 32 rows", max_rows=31, min_extra=9),
    Rule(LaunchShape(16, 32, 4), "wide extra scope, small batch", min_rows=32, max_rows=79, min_extra=9),
    Rule(LaunchShape(32, 16, 4), "wide extra scope, medium batch", min_rows=80, max_rows=255, min_extra=9),
    Rule(LaunchShape(64, 16, 8), "wide extra scope, large batch", min_rows=256, min_extra=9),
)
"""The table as published for MI300X, 64 heads. Lines overlap (SWA-only calls, 32 rows), so their order decides."""

_CDNA = (
    Rule(
        LaunchShape(16, 32, 8), "no more than 16 heads to share keys with: a wider tile would be padding", max_heads=16
    ),
    Rule(
        LaunchShape(32, 16, 8),
        "no more than 32 heads to share keys with, and enough workgroups",
        min_workgroups=160,
        max_heads=32,
    ),
    Rule(LaunchShape(16, 32, 8), "no more than 32 heads, few workgroups", max_heads=32),
    Rule(
        LaunchShape(64, 16, 8),
        "the published large-batch shape from its published size on (256 rows of 64 heads): keys are read once per 64 "
        "heads; no spills, two waves per SIMD, all of gfx942's LDS",
        min_workgroups=256,
    ),
    Rule(
        LaunchShape(32, 16, 8),
        "the published medium-batch tile (from 80 rows of 64 heads) with eight waves instead of four: four need more "
        "than 256 registers and leave one wave per SIMD",
        min_workgroups=160,
    ),
    Rule(
        LaunchShape(16, 32, 8),
        "few workgroups: the published small-batch tile, again with eight waves for two waves per SIMD",
    ),
)

_HOPPER = (
    Rule(
        LaunchShape(16, 64, 8),
        "one workgroup per SM or fewer: latency decides, and the narrow tile spreads a row's heads over more SMs",
        max_workgroups=132,
    ),
    Rule(
        LaunchShape(16, 32, 4),
        "more workgroups than SMs, but no more heads to share keys with: the tile that lets two workgroups fit an SM",
        max_heads=16,
    ),
    Rule(
        LaunchShape(64, 64, 8),
        "several waves: a row's keys are read once per 64 heads and feed wgmma, which takes 64 rows at a time; 32 "
        "heads are faster in half of this tile than in all of 32x64",
    ),
)

SELECTION: Mapping[str, tuple[Rule, ...]] = {"gfx942": _CDNA, "gfx950": _CDNA, "sm_90": _HOPPER, "cpu": _CDNA}
"""Rules by architecture, first match wins. sm_90's are measured; gfx942's and gfx950's come from ISA evidence and the
published table, not from a run; the interpreter ("cpu") exercises the AMD shapes. No shape spills for caches as their
writers leave them; gfx950 reading an fnuz cache, which no writer there produces, spills one or two registers at 64x16.
"""


def choose(rules: tuple[Rule, ...], rows: int, heads: int, extra_width: int) -> Rule:
    """The first rule that covers the call.

    Raises:
        ValueError: no rule does.
    """
    for rule in rules:
        if rule.matches(rows, heads, extra_width):
            return rule
    raise ValueError(f"rules: none covers rows={rows}, heads={heads}, extra_width={extra_width}")


def table_for(arch: str) -> tuple[Rule, ...]:
    """The architecture's rules; the static shape for every call where none have been worked out."""
    return SELECTION.get(arch, (Rule(STATIC, f"no rules for {arch}: the static shape"),))


def select_launch(arch: str, rows: int, heads: int, extra_width: int) -> LaunchShape:
    """Select a launch shape.

    Args:
        arch: "gfx942", "gfx950", "sm_90", "cpu" or any other; see `table_for`.
        rows: query rows.
        heads: query heads per row.
        extra_width: slots per row in the extra scope (steady-state width, not the live length).

    Returns:
        LaunchShape.
    """
    return choose(table_for(arch), rows, heads, extra_width).shape
