"""Tiles of the grouped expert GEMM, as data: the default tile, the published ramp, and this workbook's selection.

A tile is block_m rows of one expert by block_n of its output columns, walked along K in steps of block_k. What it
trades: rows beyond an expert's last are computed and thrown away (padding, grows with block_m), and every tile of an
expert reads the expert's weights again (grows as block_m shrinks). Which of the two costs more turns on the rows that
an expert has, not on the rows of the batch, so the selection goes by *average rows per local expert*.

Source of the published ramp: doubleword's vLLM fork, commits 330979094 and d9d24cade. Of what it replaced:
triton_kernels' ``opt_flags`` (block_m up to 128, block_n up to 256, block_k 128). Hazards: H36, H38.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import triton
import triton.language as tl

__all__ = [
    "DEFAULT",
    "PUBLISHED",
    "SELECTION",
    "XCDS",
    "ExpertTile",
    "TileRule",
    "check_rules",
    "choose_tile",
    "default_tile",
    "local_rows",
    "rules_for",
    "select_tile",
    "xcd_position",
]

_SCALE_GROUP = 32
"""Weights of one UE8M0 scale along K: a smaller block_k would split a group."""
_MATRIX_ROWS = 16
"""Rows of the smallest matrix instruction on CDNA and Hopper."""


def _is_integer(value: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_power_of_two(value: int) -> bool:
    return _is_integer(value) and value > 0 and not value & (value - 1)


def _check_count(name: str, value: int, least: int = 0) -> None:
    if not _is_integer(value) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")


@dataclass(frozen=True)
class ExpertTile:
    """Tile and resources of one launch.

    Args:
        block_m: rows of one expert; also the ``block_m`` of the dispatch plan that the launch walks.
        block_n: output columns, counted in rows of the weight.
        block_k: step along the contracted dimension, whole scale groups.
        num_warps: warps (waves on AMD).
        num_stages: pipeline stages.
        subtile_n: columns that the epilogue converts and stores at a time; None stores the tile in one piece.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    subtile_n: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("block_m", _MATRIX_ROWS), ("block_n", 1), ("block_k", _SCALE_GROUP), ("num_warps", 1)):
            value = getattr(self, name)
            if not _is_power_of_two(value) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected a power of two of at least {least}")
        if not _is_integer(self.num_stages) or self.num_stages < 1:
            raise ValueError(f"num_stages: got {self.num_stages!r}, expected a positive integer")
        if self.subtile_n is not None and (not _is_power_of_two(self.subtile_n) or self.subtile_n > self.block_n):
            raise ValueError(f"subtile_n: got {self.subtile_n!r}, expected None or a power of two up to {self.block_n}")

    def __str__(self) -> str:
        subtile = "" if self.subtile_n is None else f" e{self.subtile_n}"
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}{subtile}"

    def fitted(self, n: int, k: int) -> ExpertTile:
        """The same tile with block_n and block_k no wider than the problem, rounded up to powers of two."""
        block_n = min(self.block_n, max(_MATRIX_ROWS, triton.next_power_of_2(n)))
        block_k = min(self.block_k, max(_SCALE_GROUP, triton.next_power_of_2(k)))
        subtile_n = None if self.subtile_n is None else min(self.subtile_n, block_n)
        return replace(self, block_n=block_n, block_k=block_k, subtile_n=subtile_n)


@dataclass(frozen=True)
class TileRule:
    """One line of a table: the tile for ``above < average rows per expert <= upto``, and why. None is unbounded."""

    tile: ExpertTile
    reason: str
    above: int | Fraction = 0
    upto: int | Fraction | None = None

    def matches(self, slots: int, experts: int) -> bool:
        """Whether ``slots / experts`` lies in the interval; no float, so that a bound is exact. Zero is in the first.

        Args:
            slots: rows of all local experts together.
            experts: local experts.
        """
        over = slots > self.above * experts or self.above == 0
        return over and (self.upto is None or slots <= self.upto * experts)


def check_rules(rules: tuple[TileRule, ...]) -> None:
    """Refuse a table with a hole or an overlap: every average must be covered by exactly one line, in any order.

    Raises:
        ValueError: naming the two lines or the uncovered averages.
    """
    if not rules:
        raise ValueError("rules: got an empty table, expected at least one line")
    end: int | Fraction | None = 0
    before = None
    for rule in sorted(rules, key=lambda rule: rule.above):
        if end is None or rule.above < end:
            raise ValueError(f"rules: {rule.tile} from above {rule.above} overlaps {before}, which ends at {end}")
        if rule.above > end:
            raise ValueError(f"rules: no line covers averages above {end} up to {rule.above}")
        if rule.upto is not None and rule.upto <= rule.above:
            raise ValueError(f"rules: {rule.tile} covers nothing: above {rule.above} up to {rule.upto}")
        end, before = rule.upto, rule.tile
    if end is not None:
        raise ValueError(f"rules: no line covers averages above {end}")


DEFAULT = ExpertTile(128, 128, 128, 8)
"""One tile for every batch, as tall as triton_kernels' heuristics go and half as wide: at 256 columns the grouped GEMM
spills registers on gfx942."""

PUBLISHED = (
    (512, 1023, ExpertTile(32, 128, 128, 8), "ramp: few rows per expert, so fewer rows per tile"),
    (1024, None, ExpertTile(64, 128, 128, 8, subtile_n=8), "steady: larger batches, epilogue in 16 pieces"),
)
"""(least M, largest M, tile, reason) as published, for MI300X with 128 local experts of 256, top-k 6, k = n = 4096. The
lines give block sizes and ``epilogue_subtile=16``, a *number of pieces* in triton_kernels: 8 columns each. The warp
count, 8, is that library's default. Below 512 its heuristics stay."""

_FEW = Fraction(1, 16)
"""Rows per expert of a batch of one or two tokens, when 128 experts or more are local."""

_CDNA = (
    TileRule(ExpertTile(16, 64, 128, 4), "fewer rows than experts: narrow tiles, for more programs than units", upto=1),
    TileRule(ExpertTile(16, 128, 128, 4), "the weights are the traffic, and 16 rows pad least", above=1, upto=16),
    TileRule(ExpertTile(32, 128, 128, 4), "the published ramp's tile", above=16, upto=32),
    TileRule(ExpertTile(64, 128, 128, 8), "the published steady tile, epilogue in one piece", above=32, upto=64),
    TileRule(ExpertTile(128, 128, 128, 8), "each weight is read and decoded once per 128 rows", above=64),
)

_HOPPER = (
    TileRule(ExpertTile(16, 64, 128, 4, 5), "a token or two: narrow tiles, for more programs than SMs", upto=_FEW),
    TileRule(ExpertTile(16, 128, 128, 4, 3), "the weights are the traffic, and 16 rows pad least", above=_FEW, upto=12),
    TileRule(ExpertTile(32, 128, 128, 4, 3), "above 16 rows one decoding of the weights, not two", above=12, upto=28),
    TileRule(ExpertTile(64, 128, 128, 4, 3), "above 32 rows one decoding of the weights, not two", above=28, upto=48),
    TileRule(ExpertTile(128, 128, 128, 4, 3), "one decoding per 128 rows; two programs fit an SM", above=48),
)
"""Bounds lie below the tiles' heights: loads scatter about their average, and a taller tile halves itself for an expert
with few rows (`dsv4ref.kernels.experts.grouped_gemm.HALVED_ROWS`)."""

SELECTION: Mapping[str, tuple[TileRule, ...]] = {"gfx942": _CDNA, "gfx950": _CDNA, "sm_90": _HOPPER, "cpu": _CDNA}
"""Lines by architecture; the interpreter ("cpu") exercises the AMD tiles. sm_90's are for weights in the layout
``wgmma``: the fastest of some twenty tiles tried by hand on an H200 at 0.02 to 192 rows per expert. The reasons are
inferences; chapter 13's records time the table's tiles. No AMD GPU has run gfx942's and gfx950's."""

for _rules in SELECTION.values():
    check_rules(_rules)

XCDS: Mapping[str, int] = {"gfx942": 8, "gfx950": 8}
"""Dies with an L2 of their own; consecutive workgroups go round them in turn. One where not listed."""


def choose_tile(rules: tuple[TileRule, ...], slots: int, experts: int) -> TileRule:
    """The line that covers ``slots`` rows over ``experts`` local experts.

    Raises:
        ValueError: none does.
    """
    for rule in rules:
        if rule.matches(slots, experts):
            return rule
    raise ValueError(f"rules: none covers {slots} rows over {experts} experts")


def rules_for(arch: str) -> tuple[TileRule, ...]:
    """The architecture's table; the default tile for every batch where none has been worked out."""
    return SELECTION.get(arch, (TileRule(DEFAULT, f"no rules for {arch}: the default tile"),))


def default_tile(arch: str) -> ExpertTile:
    """`DEFAULT` with the pipeline stages of the architecture's tallest tile."""
    tallest = max((rule.tile for rule in rules_for(arch)), key=lambda tile: tile.block_m)
    return replace(DEFAULT, num_stages=tallest.num_stages)


def local_rows(tokens: int, num_experts: int, local_experts: int) -> int:
    """Tokens that would give this rank's experts their expected load if every choice of theirs were local.

    A rank that sees M tokens and holds a part of the experts computes that part of the M * k choices. Selecting by M
    would take each expert for ``num_experts / local_experts`` times as full as it is.

    Args:
        tokens: M, the rows of the batch that the rank is handed.
        num_experts: experts over all ranks.
        local_experts: experts of this rank.

    Returns:
        ``ceil(tokens * local_experts / num_experts)``.

    Raises:
        ValueError: a count is negative, or more experts are local than there are.
    """
    for name, value in (("tokens", tokens), ("num_experts", num_experts), ("local_experts", local_experts)):
        _check_count(name, value)
    if local_experts > num_experts:
        raise ValueError(f"local_experts: got {local_experts}, expected at most num_experts = {num_experts}")
    return -(-tokens * local_experts // num_experts) if num_experts else 0


def select_tile(arch: str, rows: int, local_experts: int, top_k: int, n: int, k: int) -> ExpertTile:
    """Select the tile of one expert GEMM from shapes alone: the histogram is on the device and is not waited for.

    Args:
        arch: "gfx942", "gfx950", "sm_90", "cpu" or any other; see `rules_for`.
        rows: tokens whose choices are *all* local: M on a rank that holds every expert, `local_rows` under expert
            parallelism. Not the padded rows of a static batch.
        local_experts: experts of this rank; a rank may hold none.
        top_k: choices of a token.
        n: output columns of the GEMM (rows of the weight).
        k: contracted dimension.

    Returns:
        ExpertTile, no wider than n and k.

    Raises:
        ValueError: a count is negative, or top_k, n or k is 0.
    """
    for name, value, least in (
        ("rows", rows, 0), ("local_experts", local_experts, 0), ("top_k", top_k, 1), ("n", n, 1), ("k", k, 1),
    ):  # fmt: skip
        _check_count(name, value, least)
    # Without experts there is no average, and no tile will run: take the first line rather than divide by nothing.
    slots, experts = (rows * top_k, local_experts) if local_experts else (0, 1)
    return choose_tile(rules_for(arch), slots, experts).tile.fitted(n, k)


def xcd_position(program: int, programs: int, xcds: int, chunk: int) -> int:
    """Work of a program when runs of ``chunk`` neighbours shall share one die's L2.

    Workgroup p runs on die p % xcds. Groups of ``xcds * chunk`` programs are transposed, so that a die gets a run of
    ``chunk`` neighbouring pieces; a last, incomplete group keeps its order. Giving each die one long run instead would
    leave the dies at the end idle, because the grid is an upper bound whose tail has no tile.

    Args:
        program, programs: index and number of programs.
        xcds: dies, 1 for no change.
        chunk: neighbouring pieces that read the same weights.
    """
    group = xcds * chunk
    if program >= programs // group * group:
        return program
    inside = program % group
    return program - inside + inside % xcds * chunk + inside // xcds


@triton.jit
def _xcd_position(program, programs, XCDS: tl.constexpr, CHUNK: tl.constexpr):
    """`xcd_position` in a kernel."""
    GROUP: tl.constexpr = XCDS * CHUNK
    inside = program % GROUP
    moved = program - inside + inside % XCDS * CHUNK + inside // XCDS
    return tl.where(program >= programs // GROUP * GROUP, program, moved)
