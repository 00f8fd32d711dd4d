"""Solutions of chapter 05's exercises, worked out with the package."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from dsv4ref.kernels.sparse_mla.launch import PUBLISHED, LaunchShape, Rule, choose, select_launch
from dsv4ref.optimizations.decode_model import key_bytes

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "05_decode_launch_shape.ipynb"
TITLES = ["Where does the H200 selection change shape?", "What does TP cost?", "Make the table fail"]


def exercises() -> dict[str, str]:
    """Title to text of every exercise, its solution included."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    section = prose.split("\n## Exercises\n")[1].split("\n## ")[0]
    return {part.split("\n", 1)[0].strip(): part for part in section.split("\n### ")[1:]}


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    assert list(exercises()) == TITLES


@pytest.mark.parametrize(("heads", "first"), [(64, 34), (128, 17)])
def test_sm_90_changes_shape_once(heads: int, first: int) -> None:
    shapes = [select_launch("sm_90", rows, heads, 512) for rows in range(1, 513)]
    tiles = [(shape.block_h, shape.block_k) for shape in shapes]
    changes = {rows: tiles[rows - 1] for rows in range(2, 513) if tiles[rows - 1] != tiles[rows - 2]}
    assert tiles[0] == (16, 64)
    assert changes == {first: (64, 64)}


def test_the_solutions_own_line_shows_the_changes() -> None:
    found = re.search(r"`(\[select_launch\(.*?\])`", exercises()[TITLES[0]])
    assert found is not None
    shapes = eval(found[1], {"select_launch": select_launch})  # the solution's own code, with that one name
    assert [(shape.block_h, shape.block_k) for shape in shapes] == [(16, 64), (64, 64)] * 2


@pytest.mark.parametrize("rows", [1, 64, 256, 1024])
def test_tp8_wastes_half_the_tile_and_fetches_keys_eight_times(rows: int) -> None:
    ranks, heads = 8, 64
    rank = select_launch("sm_90", rows, heads // ranks, 512)
    assert rank.block_h == 16
    assert (rank.block_h - heads // ranks) / rank.block_h == 0.5
    scopes = {"rows": rows, "swa": 128, "extra": 512}
    node = ranks * key_bytes({**scopes, "heads": heads // ranks}, rank)
    assert node == ranks * key_bytes({**scopes, "heads": heads}, LaunchShape(64, 64, 8))


def answers(table: tuple[Rule, ...], rows: range | tuple[int, ...]) -> dict[tuple[int, int], str]:
    """The shape at every row count, for an extra scope of each kind: none, narrow, wide."""
    return {(t, extra): str(choose(table, t, 64, extra).shape) for t in rows for extra in (0, 1, 8, 9, 512)}


def dead(table: tuple[Rule, ...]) -> list[Rule]:
    """Lines that are never the first to match."""
    grid = [(rows, extra) for rows in range(1, 600) for extra in (0, 1, 8, 9, 512)]
    alive = {id(next(rule for rule in table if rule.matches(rows, 64, extra))) for rows, extra in grid}
    return [rule for rule in table if id(rule) not in alive]


def swapped(first: int) -> tuple[Rule, ...]:
    table = list(PUBLISHED)
    table[first], table[first + 1] = table[first + 1], table[first]
    return tuple(table)


def test_swapping_the_exact_line_kills_it_and_only_32_rows_see_it() -> None:
    (line,) = (i for i, rule in enumerate(PUBLISHED) if rule.min_rows == rule.max_rows == 32)
    table = swapped(line)
    assert dead(PUBLISHED) == []
    assert dead(table) == [PUBLISHED[line]]
    assert answers(table, (31, 33, 79, 80)) == answers(PUBLISHED, (31, 33, 79, 80))
    before, after = answers(PUBLISHED, range(1, 600)), answers(table, range(1, 600))
    seen = {rows for (rows, _extra), shape in before.items() if after[rows, _extra] != shape}
    assert seen == {32}
    assert {after[32, extra] for extra in (0, 1, 8)} == {"16x32 w4 s1"}


def test_one_other_swap_would_do_too() -> None:
    """The line for layers without an extra scope is a special case of the next; behind it, it never matches."""
    deadly = [i for i in range(len(PUBLISHED) - 1) if dead(swapped(i))]
    quiet = [i for i in deadly if answers(swapped(i), (31, 33, 79, 80)) == answers(PUBLISHED, (31, 33, 79, 80))]
    assert [PUBLISHED[i].reason for i in quiet] == [
        "SWA-only layers, large batch",
        "narrow extra scope, exactly 32 rows",
    ]
