"""Expert tiles: what a tile refuses, tables without holes or overlaps, selection at the edges, the order of work."""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit signature takes no Python types)

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from dsv4ref.kernels.experts.tiles import (
    DEFAULT,
    PUBLISHED,
    SELECTION,
    XCDS,
    ExpertTile,
    TileRule,
    _xcd_position,
    check_rules,
    choose_tile,
    default_tile,
    local_rows,
    rules_for,
    select_tile,
    xcd_position,
)

ARCHS = sorted(SELECTION)


def chosen(arch: str, rows: int, local_experts: int = 128, n: int = 4096, k: int = 4096) -> ExpertTile:
    return select_tile(arch, rows, local_experts, 6, n, k)


# --- a tile ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_m": 48}, "block_m: got 48, expected a power of two of at least 16"),
        ({"block_m": 8}, "block_m: got 8, expected a power of two of at least 16"),
        ({"block_n": 0}, "block_n: got 0, expected a power of two of at least 1"),
        ({"block_k": 16}, "block_k: got 16, expected a power of two of at least 32"),
        ({"num_warps": True}, "num_warps: got True, expected a power of two of at least 1"),
        ({"num_stages": 0}, "num_stages: got 0, expected a positive integer"),
        ({"subtile_n": 256}, "subtile_n: got 256, expected None or a power of two up to 128"),
        ({"subtile_n": 24}, "subtile_n: got 24, expected None or a power of two up to 128"),
    ],
)
def test_a_tile_refuses_what_no_launch_could_use(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(ExpertTile(32, 128, 128, 4), **change)


def test_a_tile_is_no_wider_than_its_problem() -> None:
    tile = ExpertTile(32, 128, 128, 4, subtile_n=64)
    assert tile.fitted(4096, 4096) == tile
    assert tile.fitted(40, 96) == ExpertTile(32, 64, 128, 4, subtile_n=64)
    assert tile.fitted(8, 32) == ExpertTile(32, 16, 32, 4, subtile_n=16)
    assert str(tile) == "32x128x128 w4 s1 e64"


# --- tables ---


def table(*bounds: tuple[int, int | None]) -> tuple[TileRule, ...]:
    return tuple(TileRule(DEFAULT, "a line", above, upto) for above, upto in bounds)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ((), "empty table"),
        (table((0, 16), (12, None)), "overlaps"),
        (table((0, None), (64, None)), "overlaps"),
        (table((0, 16), (32, None)), "no line covers averages above 16 up to 32"),
        (table((8, None)), "no line covers averages above 0 up to 8"),
        (table((0, 16), (16, 64)), "no line covers averages above 64"),
        (table((0, 0), (0, None)), "covers nothing"),
    ],
)
def test_a_table_with_a_hole_or_an_overlap_is_refused(rules: tuple[TileRule, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_rules(rules)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_average_is_covered_by_exactly_one_line_in_any_order(arch: str) -> None:
    rules = SELECTION[arch]
    check_rules(rules[::-1])
    for experts in (1, 3, 128, 384):
        for slots in {0, 1, experts, experts + 1, *(experts * b + d for b in (1, 16, 32, 64, 500) for d in (-1, 0, 1))}:
            lines = [str(rule.tile) for rule in rules if rule.matches(slots, experts)]
            assert len(lines) == 1, f"{slots} rows over {experts} experts: {lines}"


def test_a_call_that_no_line_covers_is_an_error_not_a_default() -> None:
    with pytest.raises(ValueError, match="none covers 200 rows over 2 experts"):
        choose_tile(table((0, 64)), 200, 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_taller_tile_never_comes_for_fewer_rows(arch: str) -> None:
    heights = [chosen(arch, rows).block_m for rows in range(0, 4096, 7)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (16, 128)


# --- selection ---


@pytest.mark.parametrize("arch", ARCHS)
def test_the_edges_are_exact(arch: str) -> None:
    # 128 experts, one choice each: 128 * 16 rows are an average of exactly 16.
    last = (12, 28, 48) if arch == "sm_90" else (16, 32, 64)
    tiles = {a: [select_tile(arch, 128 * a + d, 128, 1, 4096, 4096) for d in (0, 1)] for a in last}
    few = 8 if arch == "sm_90" else 128  # an average of 1 / 16, or of 1
    edge = [select_tile(arch, few + d, 128, 1, 4096, 4096) for d in (0, 1)]
    assert [(t.block_m, t.block_n) for t in edge] == [(16, 64), (16, 128)]
    assert [[t.block_m for t in tiles[a]] for a in last] == [[16, 32], [32, 64], [64, 128]]


def test_m_1024_on_half_of_256_experts_is_24_rows_per_expert_and_takes_32() -> None:
    rows = local_rows(1024, 256, 128)
    assert (rows, rows * 6 / 128) == (512, 24.0)
    assert chosen("gfx942", rows).block_m == 32
    assert chosen("gfx942", 1024).block_m == 64  # what the rank would take by all rows
    assert select_tile("gfx942", 1024, 256, 6, 4096, 4096).block_m == 32  # a rank with all experts


def test_local_rows_round_up_and_refuse_impossible_placements() -> None:
    assert [local_rows(m, 384, 48) for m in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert local_rows(7, 0, 0) == 0
    with pytest.raises(ValueError, match="local_experts: got 9, expected at most num_experts = 8"):
        local_rows(1, 8, 9)
    with pytest.raises(ValueError, match="tokens: got -1"):
        local_rows(-1, 8, 4)


def test_no_rows_or_no_experts_select_the_first_line() -> None:
    first = SELECTION["gfx942"][0].tile
    assert chosen("gfx942", 0) == chosen("gfx942", 100, local_experts=0) == first


def test_an_architecture_without_rules_gets_the_default_and_says_why() -> None:
    assert chosen("gfx90a", 1) == chosen("gfx90a", 5000) == DEFAULT
    assert rules_for("gfx90a")[0].reason == "no rules for gfx90a: the default tile"


@pytest.mark.parametrize(
    ("name", "value"), [("rows", -1), ("local_experts", -1), ("top_k", 0), ("n", 0), ("k", 0), ("rows", 1.5)]
)
def test_a_bad_count_is_named(name: str, value: int) -> None:
    counts = {"rows": 8, "local_experts": 4, "top_k": 2, "n": 64, "k": 64} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: got {re.escape(str(value))}, expected an integer of at least"):
        select_tile("gfx942", **counts)


@pytest.mark.parametrize("arch", [*ARCHS, "gfx90a"])
def test_the_default_tile_differs_between_architectures_in_its_stages_only(arch: str) -> None:
    assert replace(default_tile(arch), num_stages=1) == DEFAULT


def test_the_published_ramp_steps_to_64_rows_at_1024() -> None:
    tiles = {m: next(t for low, high, t, _ in PUBLISHED if low <= m <= (high or m)) for m in (512, 1023, 1024, 8192)}
    assert [t.block_m for t in tiles.values()] == [32, 32, 64, 64]
    assert {(t.block_n, t.block_k) for t in tiles.values()} == {(128, 128)}
    assert tiles[1024].subtile_n == 128 // 16


# --- order of work ---


@triton.jit
def _positions_kernel(out, PROGRAMS: tl.constexpr, DIES: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + program, _xcd_position(program, PROGRAMS, DIES, CHUNK))


@pytest.mark.parametrize(("programs", "dies", "chunk"), [(37, 8, 2), (64, 8, 4), (5, 8, 4), (48, 1, 3), (16, 8, 1)])
def test_the_kernels_order_is_the_documented_permutation(programs: int, dies: int, chunk: int, device: str) -> None:
    out = torch.full((programs,), -1, dtype=torch.int32, device=device)
    _positions_kernel[(programs,)](out, PROGRAMS=programs, DIES=dies, CHUNK=chunk)
    wanted = [xcd_position(p, programs, dies, chunk) for p in range(programs)]
    assert out.tolist() == wanted
    assert sorted(wanted) == list(range(programs))


def test_neighbouring_work_meets_on_one_die_and_the_tail_stays_spread() -> None:
    dies, chunk, programs = XCDS["gfx942"], 4, 200
    die_of = {xcd_position(p, programs, dies, chunk): p % dies for p in range(programs)}
    whole = programs // (dies * chunk) * dies * chunk
    for first in range(0, whole, chunk):
        assert len({die_of[work] for work in range(first, first + chunk)}) == 1, first
    # The last 72 pieces are idle tiles: no die may be left with idle ones only, or with none.
    busy = [sum(die == d for work, die in die_of.items() if work < 128) for d in range(dies)]
    assert busy == [128 // dies] * dies
