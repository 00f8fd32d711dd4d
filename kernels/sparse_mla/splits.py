"""How many splits a sparse decode takes, and at which launch shape: planned on the host, as data, before any launch.

One workgroup per (row, head block) leaves most compute units without work when rows are few, and leaves the last wave
of workgroups half empty when they are not. Cutting each row's keys into splits makes more and shorter workgroups. The
time of a plan is modelled with round constants::

    workgroups = rows * head blocks * splits
    waves      = ceil(workgroups / (compute units * resident))
    iterations = waves * tiles per split
    time       = iterations * step + (splits > 1) * (reduce + 2 * staged bytes / bandwidth)
    step       = 2 memory trips + workgroups on one compute unit * BLOCK_K * cost per key

and the plan is the pair of launch shape and split count with the least time. A wave costs the same however few of its
places are used, which is why plans fill waves; iterations are why, among split counts with the same number of waves,
the one with the fewest tiles per split wins; staged bytes and the reduce are why rows in plenty are not split at all.
Constants are those of the decode chapters' model (0.7 us per trip, 12 lane-instructions per code), not a fit to any
machine, so a split has to promise a tenth before it is taken.

Everything here is integers the host knows without asking the device: padded widths, never live lengths. A plan is thus
the same in every replay of a captured graph.

Source of the idea: vllm#46275 (split decode on gfx942), vllm#57880 (fewest iterations within a wave count, no reduce
at one split; it never takes another wave for fewer iterations, and a plan here may), sglang#36094 (staging is not
free).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dsv4ref import device
from dsv4ref.device import DeviceSpec
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.sparse_mla.launch import STATIC, LaunchShape

__all__ = [
    "MAX_SPLITS",
    "SHAPES",
    "WORTH_A_SPLIT",
    "Machine",
    "SplitPlan",
    "SplitShape",
    "candidates",
    "machine_of",
    "plan_splits",
    "reduce_us",
    "staged_bytes",
    "step_us",
    "tiles_per_row",
]

MAX_SPLITS = 32
"""Splits of one row at most, as in vllm#52212: one workgroup of the reduce reads them all, 2 KiB each."""

WORTH_A_SPLIT = 1.1
"""How much faster than the best single pass a split plan has to be by the model, which is no better than that."""

_MEMORY_TRIP_US = 0.7
_TRIPS_PER_TILE = 2
_TRIPS_OF_REDUCE = 2
_LAUNCH_US = 2.0
_LANES = 128
_INSTRUCTIONS_PER_CODE = 12
_CLOCK_GHZ = 1.8
_SMALLEST_MATRIX_TILE = 16
_WARP_GROUP_TILE = {"sm_90": 64}
"""Rows of a matrix tile where the fast product has more than 16: padding up to them is cheaper than a narrower tile."""
_EMULATED = "gfx942"
"""What the interpreter plans for, as its launch shapes are AMD's too."""


@dataclass(frozen=True)
class SplitShape:
    """A launch shape of the split decode, how many of its workgroups one compute unit holds at once, and why."""

    launch: LaunchShape
    resident: int
    reason: str


_CDNA_SHAPES = (
    SplitShape(
        LaunchShape(16, 32, 8), 1,
        "fewest heads per workgroup, so the most workgroups before any split; two waves per SIMD",
    ),
    SplitShape(LaunchShape(32, 16, 8), 1, "half the passes over a row's keys of 16x32; two waves per SIMD"),
    SplitShape(
        LaunchShape(64, 16, 8), 1,
        "keys decoded once per 64 heads, with splits to make up for the workgroups that costs; two waves per SIMD",
    ),
)  # fmt: skip
_HOPPER_SHAPES = (
    # First, because the model cannot tell it from 16x64 once every SM holds two of its workgroups; a measurement can.
    SplitShape(LaunchShape(16, 32, 4), 2, "measured: the best single pass for 16 heads and more workgroups than SMs"),
    SplitShape(LaunchShape(16, 64, 8), 1, "measured: the best single pass while an SM has one workgroup or none"),
    SplitShape(
        LaunchShape(64, 64, 8), 1, "measured: the best single pass over several waves, of 32 heads as well; wgmma"
    ),
)

SHAPES: Mapping[str, tuple[SplitShape, ...]] = {
    "gfx942": _CDNA_SHAPES,
    "gfx950": _CDNA_SHAPES,
    "sm_90": _HOPPER_SHAPES,
}
"""Launch shapes by architecture. sm_90's were measured, as single passes (chapter 05) and with splits (chapter 18). The
others come from ISA evidence: no spills, LDS within its cap, `resident` from registers and LDS. No AMD GPU ran them.
"""


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a GPU: where its shapes come from, and three figures."""

    arch: str
    compute_units: int
    bandwidth_tb_s: float
    bf16_tflops: float

    def __post_init__(self) -> None:
        for name in ("compute_units", "bandwidth_tb_s", "bf16_tflops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a positive number")

    @staticmethod
    def of(spec: DeviceSpec, compute_units: int | None = None) -> Machine:
        """A card by its published figures.

        Args:
            spec: the card.
            compute_units: how many of its units there are to use, if not all: a partition (CPX, MIG) gets as much less
                bandwidth and matrix rate.

        Raises:
            ValueError: the card publishes too few figures.
        """
        if spec.compute_units is None or spec.bandwidth_tb_s is None or spec.bf16_tflops is None:
            raise ValueError(f"spec: got {spec.key!r}, expected a card with published units, bandwidth and bf16 rate")
        units = spec.compute_units if compute_units is None else compute_units
        share = units / spec.compute_units
        return Machine(spec.arch, units, spec.bandwidth_tb_s * share, spec.bf16_tflops * share)


@dataclass(frozen=True)
class SplitPlan:
    """One way to launch a decode, and what the model says of it.

    Args:
        launch: tile and warps.
        splits: pieces each row's keys are cut into; 1 is a single pass without staging or reduce.
        tiles_per_split: key tiles one workgroup walks at most, at the padded widths.
        workgroups: programs of the partial kernel.
        waves: rounds of workgroups the machine needs for them; 0 where no model exists.
        idle: share of the places for workgroups in these waves that stay empty.
        time_us: modelled microseconds; NaN where no model exists.
        reason: why this one.
        path: the partial kernel it is for: the portable one ("triton") or Hopper's ("gluon").
    """

    launch: LaunchShape
    splits: int
    tiles_per_split: int
    workgroups: int
    waves: int
    idle: float
    time_us: float
    reason: str
    path: str = "triton"

    @property
    def iterations(self) -> int:
        """Key tiles on the critical path."""
        return self.waves * self.tiles_per_split


def tiles_per_row(swa_width: int, extra_width: int, block_k: int) -> int:
    """Key tiles of a row at its padded widths; a tile belongs to one scope, and a row without keys still has one."""
    return max(1, -(-swa_width // block_k) + -(-extra_width // block_k))


def staged_bytes(rows: int, heads: int, splits: int) -> int:
    """Bytes of ``splits`` partial results of every row and head, fp32 vectors and LSEs; a single pass stages none."""
    return splits * rows * heads * 4 * (HEAD_DIM + 1)


@functools.lru_cache(maxsize=16)
def machine_of(where: torch.device) -> Machine | None:
    """The machine that tensors of a device live on; None for architectures without a model.

    The interpreter plans for gfx942.
    """
    arch = architecture(where)
    live = None if arch == "cpu" else device.current(where.index)
    arch = _EMULATED if live is None else arch
    # A card this project does not know is planned for as the first one of its architecture, with its own units.
    spec = None if live is None else device.match_spec(live.name, arch, live.compute_units)
    spec = spec or next((s for s in device.KNOWN_DEVICES.values() if s.arch == arch), None)
    return (
        None if spec is None or arch not in SHAPES else Machine.of(spec, None if live is None else live.compute_units)
    )


def candidates(
    machine: Machine,
    rows: int,
    heads: int,
    swa_width: int,
    extra_width: int,
    shapes: tuple[SplitShape, ...] | None = None,
) -> tuple[SplitPlan, ...]:
    """Every plan worth considering: each shape that is not mostly padding, each split count that leaves none empty.

    Args:
        machine: the GPU.
        rows, heads: query rows and heads per row, at least 1.
        swa_width, extra_width: slots per row in each scope (padded widths); 0 for a scope that is not there.
        shapes: which to consider; the architecture's if None.

    Raises:
        ValueError: a number that makes no sense.
    """
    _check_counts(rows=rows, heads=heads)
    _check_widths(swa_width=swa_width, extra_width=extra_width)
    table = SHAPES.get(machine.arch, ()) if shapes is None else shapes
    # A head block wider than the heads, rounded up to a matrix tile, only adds padding.
    tile = _WARP_GROUP_TILE.get(machine.arch, _SMALLEST_MATRIX_TILE)
    useful = [s for s in table if s.launch.block_h < 2 * max(heads, tile)]
    plans = []
    for shape in useful:
        tiles = tiles_per_row(swa_width, extra_width, shape.launch.block_k)
        counts = sorted({-(-tiles // per) for per in range(1, tiles + 1)})
        plans += [
            _assess(machine, shape, rows, heads, tiles, splits) for splits in counts if splits <= MAX_SPLITS
        ]  # fmt: skip
    return tuple(plans)


@functools.lru_cache(maxsize=4096)
def plan_splits(
    machine: Machine | None,
    rows: int,
    heads: int,
    swa_width: int,
    extra_width: int,
    launch: LaunchShape | None = None,
    splits: int | None = None,
) -> SplitPlan:
    """Choose launch shape and split count.

    Args:
        machine: the GPU; None for one without a model: one split, the static shape unless another is given.
        rows, heads, swa_width, extra_width: as `candidates`.
        launch: fixes the shape; None chooses.
        splits: fixes the split count, 1 to `MAX_SPLITS`; None chooses.

    Raises:
        ValueError: a number that makes no sense.
    """
    _check_counts(rows=rows, heads=heads)
    _check_widths(swa_width=swa_width, extra_width=extra_width)
    if splits is not None and not (isinstance(splits, int) and 1 <= splits <= MAX_SPLITS):
        raise ValueError(f"splits: got {splits!r}, expected an integer from 1 to {MAX_SPLITS}")
    if machine is None:
        shape, count = launch or STATIC, splits or 1
        tiles = -(-tiles_per_row(swa_width, extra_width, shape.block_k) // count)
        workgroups = shape.workgroups(rows, heads) * count
        return SplitPlan(shape, count, tiles, workgroups, 0, 0.0, float("nan"), "no wave model: as asked, else 1 split")
    shapes = None if launch is None else (_shape_of(machine.arch, launch),)
    if splits is None:
        plans = candidates(machine, rows, heads, swa_width, extra_width, shapes)
        # A wide shape given by hand is the caller's choice, padding or not.
        plans = plans or _at(machine, shapes or (), rows, heads, swa_width, extra_width, 1)
    else:
        plans = _at(machine, shapes or SHAPES[machine.arch], rows, heads, swa_width, extra_width, splits)
    singles = [plan for plan in plans if plan.splits == 1]
    best = _fastest(plans)
    if not singles:
        return best
    single = _fastest(singles)
    return best if single.time_us > WORTH_A_SPLIT * best.time_us else single


def _fastest(plans: Sequence[SplitPlan]) -> SplitPlan:
    """Least time, to the nanosecond; then fewest splits; then the table's order."""
    return min(plans, key=lambda plan: (round(plan.time_us, 3), plan.splits))


def _at(
    machine: Machine, shapes: tuple[SplitShape, ...], rows: int, heads: int, swa: int, extra: int, splits: int
) -> tuple[SplitPlan, ...]:
    return tuple(
        _assess(machine, shape, rows, heads, tiles_per_row(swa, extra, shape.launch.block_k), splits)
        for shape in shapes
    )


def _shape_of(arch: str, launch: LaunchShape) -> SplitShape:
    """The table's entry for a launch shape; a shape that is not in it counts as eight waves per compute unit."""
    known = next((shape for shape in SHAPES[arch] if shape.launch == launch), None)
    return known or SplitShape(launch, max(1, 8 // launch.num_warps), "given")


def _assess(machine: Machine, shape: SplitShape, rows: int, heads: int, tiles: int, splits: int) -> SplitPlan:
    """The model; see the module docstring."""
    launch, units = shape.launch, machine.compute_units
    workgroups = launch.workgroups(rows, heads) * splits
    places = units * shape.resident
    waves = -(-workgroups // places)
    per_split = -(-tiles // splits)
    together = min(shape.resident, -(-workgroups // units))
    time_us = waves * per_split * step_us(machine, launch, together)
    if splits > 1:
        time_us += reduce_us(machine, rows, heads, splits)
    said = f"{workgroups} workgroups in {_count(waves, 'wave')} of {places}, {_count(waves * per_split, 'iteration')}"
    return SplitPlan(launch, splits, per_split, workgroups, waves, 1 - workgroups / (waves * places), time_us, said)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def step_us(machine: Machine, launch: LaunchShape, together: int = 1) -> float:
    """Modelled microseconds of one iteration: one key tile of each of the workgroups on one compute unit."""
    decode_us = HEAD_DIM * _INSTRUCTIONS_PER_CODE / (_LANES * _CLOCK_GHZ * 1e3)
    matrix_flops = 4 * max(launch.block_h, _SMALLEST_MATRIX_TILE) * HEAD_DIM
    matrix_us = matrix_flops / (machine.bf16_tflops * 1e6 / machine.compute_units)
    return _TRIPS_PER_TILE * _MEMORY_TRIP_US + together * launch.block_k * (decode_us + matrix_us)


def reduce_us(machine: Machine, rows: int, heads: int, splits: int) -> float:
    """Modelled microseconds that a reduce adds: a launch, its two memory trips, the parts written and read back."""
    traffic = 2 * staged_bytes(rows, heads, splits) / (machine.bandwidth_tb_s * 1e6)
    return _LAUNCH_US + _TRIPS_OF_REDUCE * _MEMORY_TRIP_US + traffic


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: got {count!r}, expected a positive integer")


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        if not isinstance(width, int) or width < 0:
            raise ValueError(f"{name}: got {width!r}, expected a non-negative integer")
