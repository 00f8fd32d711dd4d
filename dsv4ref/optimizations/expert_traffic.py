"""What each launch of an expert layer moves, computes and how many programs it has: closed forms for chapter 12.

Three paths. ``separate``: two GEMMs, two gathers, an activation, a sum. ``products``: the activation fused into the
first GEMM and the gathers gone. ``owned``: the sum fused into the second GEMM, whose programs own blocks of the output.

Slots fall uniformly on the experts (`routing_eager.loads`), each rank holds an equal part of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsv4ref.device import DeviceSpec
from dsv4ref.kernels.experts.expert_layer import OWNED_TILE, SUM_LANES
from dsv4ref.kernels.experts.tiles import local_rows, select_tile
from dsv4ref.optimizations.routing_eager import loads

__all__ = ["LAUNCH_US", "PATHS", "Path", "Step", "batch_loads", "least_bytes", "step_time_us", "steps", "useful_flops"]

Path = Literal["separate", "products", "owned"]
PATHS: tuple[Path, ...] = get_args(Path)

LAUNCH_US = 2.0
"""Assumed cost of one launch inside a graph, microseconds, on top of what it moves."""
_BF16 = 2
_CODE = 0.5 + 1 / 32
"""Bytes of a weight: its code, and its part of a scale."""


@dataclass(frozen=True)
class Step:
    """One launch.

    Args:
        name: what it does.
        moved: bytes with every operand counted once, and the weight once per pass over it.
        asked: bytes its programs ask for, re-reads that caches may serve included.
        flops: arithmetic, rows that only fill a tile included.
        programs: of its grid that have work.
    """

    name: str
    moved: int
    asked: int
    flops: int
    programs: int


@functools.lru_cache(maxsize=128)
def batch_loads(experts: int, ranks: int, top_k: int, rows: int) -> tuple[int, ...]:
    """Slots of each of a rank's experts, for one draw of a uniform routing."""
    return tuple(loads(experts, top_k, rows, 0.0).tolist()[: experts // ranks])


def _matrix(name: str, per_expert: tuple[int, ...], tile_rows: int, n: int, k: int, blocks: int, written: int) -> Step:
    """A grouped GEMM: an expert's weight is asked for once per tile of rows, and rows once per block of columns."""
    slots, tiles = sum(per_expert), sum(-(-count // tile_rows) for count in per_expert)
    used = sum(count > 0 for count in per_expert)
    weight, out = int(n * k * _CODE), slots * written * _BF16
    rows = slots * k * _BF16
    return Step(
        name, used * weight + rows + out, tiles * weight + blocks * rows + out, 2 * tiles * tile_rows * n * k,
        tiles * blocks,
    )  # fmt: skip


def _rows(name: str, read: int, written: int, programs: int) -> Step:
    """A launch that touches every element once; read and written in bf16 elements."""
    moved = _BF16 * (read + written)
    return Step(name, moved, moved, 0, programs)


def steps(path: Path, p: Mapping[str, Any], arch: str) -> tuple[Step, ...]:
    """The launches of a path in order; none for an empty batch.

    Args:
        path: one of `PATHS`.
        p: ``rows, experts, ranks, top_k, hidden, inner``.
        arch: whose tiles.

    Raises:
        ValueError: another path.
    """
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, expected one of {list(PATHS)}")
    rows, top_k, hidden, inner = p["rows"], p["top_k"], p["hidden"], p["inner"]
    if not rows:
        return ()
    per_expert = batch_loads(p["experts"], p["ranks"], top_k, rows)
    slots, every = sum(per_expert), rows * top_k
    mine = local_rows(rows, p["experts"], len(per_expert))
    first, second = (
        select_tile(arch, mine, len(per_expert), top_k, n, k) for n, k in ((2 * inner, hidden), (hidden, inner))
    )
    blocks1, blocks2 = -(-2 * inner // first.block_n), -(-hidden // second.block_n)
    w1 = functools.partial(_matrix, "W1", per_expert, first.block_m, 2 * inner, hidden, blocks1)
    w2 = _matrix("W2 by slot", per_expert, second.block_m, hidden, inner, blocks2, hidden)
    chunks = -(-hidden // SUM_LANES)
    total = _rows("weighted sum", slots * hidden, rows * hidden, rows * chunks)
    if path == "products":
        return (w1(inner), w2, total)
    if path == "owned":
        return (w1(inner), _owned(p, per_expert))
    return (
        w1(2 * inner),
        _rows("gather to token order", slots * 2 * inner, every * 2 * inner, every * -(-2 * inner // SUM_LANES)),
        _rows("clamped SwiGLU", every * 2 * inner, every * inner, every * -(-inner // SUM_LANES)),
        _rows("gather to expert order", slots * inner, every * inner, every * -(-inner // SUM_LANES)),
        w2,
        total,
    )


def _owned(p: Mapping[str, Any], per_expert: tuple[int, ...]) -> Step:
    """Every block of 16 tokens reads each expert that one of them chose, for a uniform routing."""
    rows, hidden, inner, size = p["rows"], p["hidden"], p["inner"], OWNED_TILE.block_m
    full, rest = divmod(rows, size)
    absent = 1 - p["top_k"] / p["experts"]
    reads = len(per_expert) * (full * (1 - absent**size) + (1 - absent**rest))
    passes = sum(count > 0 for count in per_expert) if rows <= size else round(reads)
    blocks = -(-hidden // OWNED_TILE.block_n)
    weight, activations = int(passes * hidden * inner * _CODE), sum(per_expert) * inner * _BF16
    out = rows * hidden * _BF16
    return Step(
        "W2 and sum", weight + activations + out, weight + blocks * activations + out,
        2 * passes * size * hidden * inner, blocks * -(-rows // size),
    )  # fmt: skip


def step_time_us(step: Step, spec: DeviceSpec) -> float:
    """Modelled time of a launch: its bytes or its arithmetic, at the share of the device that its programs can reach.

    A CU without a program draws no bandwidth and multiplies nothing.
    """
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    assert spec.compute_units is not None
    share = min(1.0, step.programs / spec.compute_units) if step.programs else 1.0
    return max(step.moved / (spec.bandwidth_tb_s * 1e6), step.flops / (spec.bf16_tflops * 1e6)) / share + LAUNCH_US


def useful_flops(p: Mapping[str, Any]) -> int:
    """FLOPs of the two matrices over this rank's slots, without padding."""
    slots = sum(batch_loads(p["experts"], p["ranks"], p["top_k"], p["rows"]))
    return int(2 * slots * 3 * p["inner"] * p["hidden"])


def least_bytes(p: Mapping[str, Any]) -> int:
    """Weights of the experts in use, rows of x and of the output, each once; nothing between."""
    per_expert = batch_loads(p["experts"], p["ranks"], p["top_k"], p["rows"])
    used = sum(count > 0 for count in per_expert)
    return int(used * 3 * p["inner"] * p["hidden"] * _CODE) + 2 * p["rows"] * p["hidden"] * _BF16
