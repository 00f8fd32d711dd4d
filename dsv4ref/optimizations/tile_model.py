"""What a routing histogram does to tiles: exact occupancy and traffic, and a time model to choose a tile with.

Occupancy is integer arithmetic on tokens per expert, so it is exact for the histogram it is given. An expert with c
rows needs ceil(c / block_m) tiles; their rows beyond c are padding; every tile reads the expert's weights, all but the
first of them again::

    tiles    = sum over experts of ceil(c / block_m)
    fill     = sum c / (tiles * block_m)
    re-reads = tiles - experts with c > 0

The time of one GEMM is the longer of memory and arithmetic, and a launch. Its constants are round numbers, written down
before anything was measured, not a fit::

    memory     = (weights once + activations) / bandwidth + (re-reads of weights) / (2 * bandwidth)
    arithmetic = ceil(tiles * ceil(N / block_n) / compute units) * (product + decode)

* product: 2 block_m block_n K FLOPs, padding included, at half the unit's share of the dense bf16 rate;
* decode: fp4 to bf16 of block_n * K codes at 4 lane-instructions each on 128 lanes: paid once per *tile*, which
  is the second thing that a taller tile amortises;
* re-reads come from a cache at twice memory's bandwidth. Whether they do depends on the order of workgroups (XCDs).

Bytes are counted as in chapter 12 (`expert_traffic`), whose model prices launches; this one prices a tile. It has no
term for latency, LDS, registers, waves or the matrix unit's favourite shapes: workgroups that share a unit
take turns, and a unit is as fast with one of them as with four.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4ref.accuracy import score
from dsv4ref.accuracy.task import TASK
from dsv4ref.accuracy.twin import forward
from dsv4ref.device import DeviceSpec
from dsv4ref.formats import mxfp4
from dsv4ref.kernels.experts.tiles import ExpertTile, default_tile, rules_for
from dsv4ref.optimizations.routing_eager import loads

__all__ = [
    "Occupancy",
    "best_tile",
    "candidates",
    "cliff_rows",
    "even_loads",
    "gemm_bytes",
    "gemm_time_us",
    "layer_time_us",
    "library_block_m",
    "local_loads",
    "occupancy",
    "trained_loads",
    "weight_bytes",
]

_LAUNCH_US = 2.0
_LANES = 128
_INSTRUCTIONS_PER_CODE = 4
_CLOCK_GHZ = 1.8
_MATRIX_SHARE = 0.5
_CACHE_FACTOR = 2.0


@dataclass(frozen=True)
class Occupancy:
    """Tiles of one histogram at one block_m; every field is exact.

    Args:
        rows: local (token, expert) pairs.
        tiles: tiles needed.
        padded_rows: rows that the tiles have, ``tiles * block_m``.
        touched: experts with at least one row.
        re_reads: tiles that read weights which another tile reads too.
    """

    rows: int
    tiles: int
    padded_rows: int
    touched: int
    re_reads: int

    @property
    def fill(self) -> float:
        """Share of the tiles' rows that hold a pair; 0 without a tile."""
        return self.rows / self.padded_rows if self.tiles else 0.0


def occupancy(histogram: Tensor | Sequence[int], block_m: int) -> Occupancy:
    """Count the tiles of a histogram.

    Args:
        histogram: integers ``[E]``, rows per local expert.
        block_m: rows of a tile.

    Raises:
        ValueError: a negative count, or a block_m below 1.
    """
    counts = [int(count) for count in histogram]
    if any(count < 0 for count in counts):
        raise ValueError(f"histogram: got {min(counts)} rows for an expert, expected 0 or more")
    if block_m < 1:
        raise ValueError(f"block_m: got {block_m}, expected at least 1")
    tiles = sum(-(-count // block_m) for count in counts)
    touched = sum(count > 0 for count in counts)
    return Occupancy(sum(counts), tiles, tiles * block_m, touched, tiles - touched)


# --- histograms ---


def even_loads(tokens: int, top_k: int, num_experts: int) -> Tensor:
    """The most even histogram there is: int64 ``[E]``, M * k pairs, counts that differ by at most one."""
    each, rest = divmod(tokens * top_k, num_experts)
    return each + (torch.arange(num_experts) < rest).to(torch.int64)


def local_loads(histogram: Tensor, ranks: int, rank: int = 0) -> Tensor:
    """One rank's part of a histogram under linear placement: int64 ``[E / R]`` (or one more)."""
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: got {rank}, expected 0 to {ranks - 1}")
    return histogram.tensor_split(ranks)[rank]


@functools.lru_cache(maxsize=8)
def _trained(sequences: int, seed: int) -> Mapping[int, Tensor]:
    model = score.load_model()
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in model.tensors.items()}
    with torch.no_grad():
        return forward(tensors, model.config, TASK.examples(sequences, seed).tokens).loads


def trained_loads(sequences: int, seed: int = 77) -> Mapping[int, Tensor]:
    """Real routing: learned layer -> int64 ``[E]``, tokens per expert of the small trained model on its task.

    Its routers choose one of 32 experts and were balanced by a bias during training, like the large model's. It is a
    small model: it shows how uneven a trained router is, not how uneven V4-Flash's is.

    Args:
        sequences: how many, 292 tokens each.
        seed: of the sequences.
    """
    return MappingProxyType(dict(_trained(sequences, seed)))


# --- traffic and time ---


def weight_bytes(n: int, k: int) -> int:
    """Stored bytes of one expert's matrix: half a byte per code, one scale byte per 32."""
    return n * k // 2 + n * k // mxfp4.BLOCK


def gemm_bytes(counts: Occupancy, tile: ExpertTile | None, n: int, k: int, out_columns: int | None = None) -> int:
    """Bytes that the programs of one GEMM ask for; None for what any implementation must move.

    Weights once per tile, activations once per column block, results once; bf16 activations and results.

    Args:
        counts: occupancy at the tile's block_m (any, for None).
        tile: the tile.
        n, k: rows and columns of the weight.
        out_columns: columns written per pair; n if None, half of it behind a SwiGLU.
    """
    reads, columns = (counts.touched, 1) if tile is None else (counts.tiles, -(-n // tile.block_n))
    written = n if out_columns is None else out_columns
    return reads * weight_bytes(n, k) + 2 * counts.rows * (columns * k + written)


def gemm_time_us(counts: Occupancy, tile: ExpertTile, n: int, k: int, spec: DeviceSpec) -> float:
    """Modelled microseconds of one grouped GEMM; the module docstring has the model."""
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    assert spec.compute_units is not None
    if not counts.tiles:
        return _LAUNCH_US
    bytes_per_us = spec.bandwidth_tb_s * 1e6
    again = counts.re_reads * weight_bytes(n, k) / (_CACHE_FACTOR * bytes_per_us)
    memory = gemm_bytes(counts, None, n, k) / bytes_per_us + again
    programs = counts.tiles * -(-n // tile.block_n)
    flops = 2 * tile.block_m * tile.block_n * k
    product = flops / (_MATRIX_SHARE * spec.bf16_tflops * 1e6 / spec.compute_units)
    decode = tile.block_n * k * _INSTRUCTIONS_PER_CODE / (_LANES * _CLOCK_GHZ * 1e3)
    return _LAUNCH_US + max(memory, -(-programs // spec.compute_units) * (product + decode))


def layer_time_us(
    histogram: Tensor | Sequence[int], tile: ExpertTile, hidden: int, intermediate: int, spec: DeviceSpec
) -> float:
    """Modelled microseconds of both expert GEMMs: ``[2I, D]`` and ``[D, I]``.

    Args:
        histogram: rows per local expert.
        tile: of both, before it is fitted to their widths.
        hidden, intermediate: D and I.
        spec: a device with published figures.
    """
    counts = occupancy(histogram, tile.block_m)
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    return sum(gemm_time_us(counts, tile.fitted(n, k), n, k, spec) for n, k in shapes)


def candidates(arch: str) -> tuple[ExpertTile, ...]:
    """The tiles that an architecture's table can choose, and the default, by rows, columns and warps."""
    tiles = {rule.tile for rule in rules_for(arch)} | {default_tile(arch)}
    return tuple(sorted(tiles, key=lambda tile: (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)))


def best_tile(histogram: Tensor | Sequence[int], hidden: int, intermediate: int, spec: DeviceSpec) -> ExpertTile:
    """The candidate that the model finds fastest for a histogram; the smallest of equals."""
    return min(
        candidates(spec.arch), key=lambda tile: layer_time_us(histogram, tile, hidden, intermediate, spec)
    )  # min keeps the first of equals


def library_block_m(arch: str, slots: int, local_experts: int, n: int) -> int:
    """The tile height that triton_kernels' heuristics give bf16 x MXFP4 experts, for comparison.

    It divides the rows of the gather, which are M * k whoever owns them, by the experts of the rank.

    Args:
        arch: "gfx942", "gfx950" or "sm_90".
        slots: M * k.
        local_experts: experts of the rank, at least 1.
        n: output columns.

    Raises:
        ValueError: another architecture.

    Source: triton-lang/triton commit 009e8edea, triton_kernels ``matmul_ogs_details/opt_flags.py``. Read, not run;
    other versions differ.
    """
    if arch not in ("gfx942", "gfx950", "sm_90"):
        raise ValueError(f"arch: got {arch!r}, expected 'gfx942', 'gfx950' or 'sm_90'")
    average = max(1, slots // local_experts)
    power = 1 << (average - 1).bit_length()  # the next power of two
    if arch == "sm_90":
        return max(16, min(2 * power, 64)) if average <= 64 else min(power, 128)
    if arch == "gfx950" and slots > 1024:
        return 64
    if average >= 512 and n >= 2048:
        return 256 if arch == "gfx950" else 128
    if arch == "gfx950" and slots >= 512:
        return 128
    return max(32, min(power, 64))


def cliff_rows(
    tokens: Sequence[int], top_k: int, num_experts: int, ranks: int, blocks: Sequence[int], skew: float = 0.0
) -> list[dict[str, Any]]:
    """Occupancy over batch sizes: one row per M, with tiles and fill for every block_m.

    Args:
        tokens: batch sizes.
        top_k, num_experts, ranks: routing and placement; the rows are of rank 0.
        blocks: rows of the tiles.
        skew: of `loads`, whose draws are seeded: the same rows in every run.
    """
    rows = []
    for m in tokens:
        mine = local_loads(loads(num_experts, top_k, m, skew), ranks)
        row: dict[str, Any] = {"M": m, "rows per expert": round(int(mine.sum()) / len(mine), 2)}
        for block in blocks:
            counted = occupancy(mine, block)
            row |= {f"tiles of {block}": counted.tiles, f"fill of {block}": round(counted.fill, 3)}
        rows.append(row)
    return rows
