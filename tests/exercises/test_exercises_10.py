"""The solutions of chapter 10's exercises, and what its page says of the source, checked."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref import config
from dsv4ref.evidence import records
from dsv4ref.kernels.aiter.emulation import emulated_library
from dsv4ref.kernels.aiter.plan import DecodeShape, planned_keys, work_rows
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.graph_clean_scratch import BASELINE_LAUNCHES, OPTIMIZED_LAUNCHES, SCALE, ScratchInputs
from dsv4ref.optimizations.report import report_rows
from dsv4ref.serving.graphs import capture
from dsv4ref.serving.scratch import Scratch, scratch_bytes, scratch_sizes

OPT = catalogue.get("graph_clean_scratch")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook


def solution(start: str) -> dict[str, Any]:
    """Run an exercise's solution as it stands in the notebook; its names."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (code,) = re.findall(rf"```python\n({re.escape(start)}.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "emulated_library": emulated_library, "DecodeShape": DecodeShape,
                             "scratch_bytes": scratch_bytes, "work_rows": work_rows, "planned_keys": planned_keys,
                             "capture": capture, "SCALE": SCALE}  # fmt: skip
    exec(code, names)
    return names


@pytest.fixture
def inputs(device: str) -> ScratchInputs:
    if device != "cpu":
        pytest.skip("the solutions are written for CPU tensors, and kernels are compiled here")
    found: ScratchInputs = OPT.make_inputs(OPT.case("three-calls"), "cpu", 0)
    return found


@pytest.fixture
def scratch(inputs: ScratchInputs) -> Scratch:
    built = Scratch(inputs.library, inputs.shape(inputs.steps[0]), "cpu")
    built.rebuild()
    return built


def test_the_bytes_of_all_buckets() -> None:
    names = solution("library = emulated_library")
    total, keys, library = names["total"], names["keys"], names["library"]
    assert len(keys) == 20
    parts = dict.fromkeys(("q", "out"), 0)
    for key in keys:
        for part in parts:
            size, dtype = scratch_sizes(library, key)[part]
            parts[part] += torch.Size(size).numel() * dtype.itemsize
    assert f"{total / 2**20:.0f} {sum(parts.values()) / 2**20:.0f}" == "51 48", (total, parts)
    assert f"{config.V4_FLASH.n_layers * total / 2**30:.1f}" == "2.1"
    assert sum(parts.values()) == 2 * 1023 * 24_576
    largest = [key for key in keys if key.rows == 512]
    share = sum(scratch_bytes(library, key) for key in largest) / total
    assert 0.45 < share < 0.52, share


def test_a_grown_list_stays_inside_a_kept_plan(inputs: ScratchInputs, scratch: Scratch) -> None:
    kept_plan = solution("def kept_plan")["kept_plan"]
    step = inputs.steps[0]
    step.indices[0, 3] = 5
    inside, keys = kept_plan(scratch, step, torch.tensor([4, 2], dtype=torch.int32))
    assert (inside, keys) == (True, [3, 2])
    with pytest.raises(ValueError, match="plan: covers 3 keys of batch 0, whose length is 4 now"):
        scratch.check()
    inside, _ = kept_plan(scratch, step, torch.tensor([2, 2], dtype=torch.int32))
    assert not inside, "a list that became shorter is what the bound finds"


def test_half_a_graph_repeats_without_a_refresh(inputs: ScratchInputs, scratch: Scratch) -> None:
    assert solution("def without_refresh")["without_refresh"](inputs, scratch) is True


def test_the_page_names_no_shape_that_the_matrix_does_not() -> None:
    """The two refusals that the page prints are refusals, and gfx942 serves this chapter's shape without an LSE."""
    from dsv4ref.kernels.aiter.support import query

    usual = {"query_length": 1, "q_dtype": "fp8", "kv_dtype": "fp8", "persistent": True}
    assert not query("mla_decode_fwd", arch="gfx942", heads=16, lse=True, **usual).supported  # type: ignore[arg-type]
    assert not query("mla_decode_fwd", arch="gfx950", heads=64, lse=True, **usual).supported  # type: ignore[arg-type]
    assert query("mla_decode_fwd", arch="gfx942", heads=16, lse=False, **usual).supported  # type: ignore[arg-type]


def on_h200() -> dict[str, dict[str, Any]]:
    """The shipped H200 records' rows by case."""
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    return {row["case"]: row for row in report_rows(r for r in mine if r.method != records.HOST)}


def test_the_h200s_records_say_what_the_page_says_of_them() -> None:
    gone = sum(BASELINE_LAUNCHES.values()) - sum(OPTIMIZED_LAUNCHES.values())
    rows = on_h200()
    stays = {name: row["optimized_us"] / sum(OPTIMIZED_LAUNCHES.values()) for name, row in rows.items()}
    for name, row in rows.items():
        assert row["ratio_ci"][1] < row["predicted"], (name, row["ratio_ci"], row["predicted"])
        goes = (row["baseline_us"] - row["optimized_us"]) / gone
        assert 0.5 < goes < min(stays[name], 2), (name, goes)
        assert 2 < goes * gone < 6, (name, goes)
    assert stays["flash-tp4-1"] < stays["flash-tp4-64"] < stays["flash-tp4-512"]
