"""The solutions of chapter 04's exercises, and the figures its text states, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv4ref.kernels.sparse_mla.indices import SUM_ROWS, recent_lists
from dsv4ref.optimizations import catalogue, static_decode_metadata
from dsv4ref.optimizations.static_decode_metadata import GAP, ListInputs, observed
from dsv4ref.ref.indices import seen_ref, slot_ref
from dsv4ref.serving.decode_lists import DecodeLists, Ragged

OPT = catalogue.get("static_decode_metadata")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


@pytest.fixture
def inputs() -> ListInputs:
    found: ListInputs = OPT.make_inputs(OPT.case("tiny-edges"), "cpu", 0)
    return found


@pytest.fixture
def full_window_lists() -> Callable[..., None]:
    """The exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(def full_window_lists.*?)```", text, re.DOTALL)
    names: dict[str, Callable[..., None]] = {"recent_lists": recent_lists}
    exec(solution, names)
    return names["full_window_lists"]


def test_the_window_kernel_lists_all_entries_while_they_fit(
    inputs: ListInputs, full_window_lists: Callable[..., None]
) -> None:
    g, step = inputs.geometry, inputs.steps[0]
    rows = len(step.positions)
    assert max(seen_ref(at, 4) for at in step.positions.tolist()) == 32 > g.topk, "the case has a row beyond top-k too"
    indices, indptr = torch.empty(rows * g.topk, dtype=torch.int32), torch.empty(rows + 1, dtype=torch.int32)
    full_window_lists(step, g, indices, indptr)
    for row, (position, request) in enumerate(zip(step.positions.tolist(), step.requests.tolist(), strict=True)):
        blocks, seen = step.pages[request].tolist(), seen_ref(position, 4)
        found = indices[indptr[row] : indptr[row + 1]].tolist()
        if seen <= g.topk:
            assert found == [slot_ref(e, blocks, g.page // 4, g.c4_slots) for e in range(seen)], f"row {row}"
        else:
            assert len(found) == g.topk, "beyond top-k it lists the newest, which nobody chose"


def test_the_sums_outgrow_the_swa_lists_from_258_rows_on() -> None:
    sums = [4 * rows * (rows - 1) // 2 for rows in range(300)]
    lists = [4 * 128 * rows for rows in range(300)]
    assert next(rows for rows in range(1, 300) if sums[rows] > lists[rows]) == 258
    assert 4 * SUM_ROWS == 4096


@pytest.mark.parametrize("field", ["requests", "entries"])
def test_only_the_positions_of_padded_rows_matter(inputs: ListInputs, field: str) -> None:
    lists = DecodeLists(8, inputs.requests, inputs.geometry)
    lists.load(inputs.steps[0])
    getattr(lists.step, field)[5:] = 3
    lists.step.swa_table[5:] = 77
    lists.refresh()
    seen = observed(lists.lists, 8, inputs.geometry)
    for scope in inputs.geometry.widths:
        assert (seen[scope][5:] == GAP).all(), scope
        assert torch.equal(seen[scope][:5], OPT.reference(inputs)[scope][0]), scope


# --- what the text states ---


def test_the_garbage_block_wraps_to_slot_192() -> None:
    block = static_decode_metadata._GARBAGE_BLOCK
    assert block * 64 == 2**32 + 192


def test_a_reader_sees_nothing_behind_the_last_row() -> None:
    lists = {scope: Ragged(torch.full((9,), 5, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32))
             for scope in ("swa", "c4", "c128")}  # fmt: skip
    inputs = OPT.make_inputs(OPT.case("tiny"), "cpu", 0)
    seen = observed(lists, 3, inputs.geometry)
    assert seen["c4"][0, :3].tolist() == [5, 5, GAP]
    assert (seen["c4"][1:] == GAP).all()
    assert seen["offsets"].tolist() == [0, 2, 2, 2] * 3
