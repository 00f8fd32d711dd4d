"""The solutions of chapter 18's exercises, and figures of its prose, checked."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref.kernels.sparse_mla import LaunchShape
from dsv4ref.kernels.sparse_mla.splits import SplitPlan, reduce_us, staged_bytes, step_us
from dsv4ref.optimizations import catalogue, split_model
from dsv4ref.optimizations.split_k_decode import parts_of

OPT = catalogue.get("split_k_decode")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook
FLASH = {"heads": 64, "swa": 128, "extra": 512}


def prose() -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def plan(rows: int, **fixed: Any) -> SplitPlan:
    return split_model.plan({"rows": rows, **FLASH}, "mi300x", **fixed)


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    section = prose().split("## Exercises")[1].split("\n## ")[0]
    assert re.findall(r"^### (.*)$", section, re.MULTILINE) == [
        "From which row on is nothing split?",
        "A reduce in PyTorch",
        "One scratch for all batches",
    ]


def test_from_153_rows_on_nothing_is_split_on_mi300x() -> None:
    wide = LaunchShape(64, 16, 8)
    assert {plan(rows).splits for rows in range(153, 1025)} == {1}
    last = plan(152)
    assert (last.launch, last.splits, last.waves, last.iterations) == (wide, 2, 1, 20)
    beyond = plan(153, launch=wide, splits=2)
    assert (beyond.waves, beyond.iterations) == (2, 40)
    assert plan(153, launch=wide, splits=1).iterations == 40
    more = plan(153, launch=wide, splits=3)
    assert (more.waves, more.iterations) == (2, 28)
    machine, single = split_model.machine_for("mi300x"), plan(153, launch=wide, splits=1)
    assert round(12 * step_us(machine, wide), 1) == 27.8
    assert round(reduce_us(machine, 153, 64, 3), 1) == 26.1
    assert single.time_us / more.time_us < 1.02
    three = [plan(rows, launch=wide, splits=3) for rows in (101, 102)]
    assert [p.waves for p in three] == [1, 2]
    assert three[0].tiles_per_split == 14


def solution(name: str) -> Any:
    """A function of the exercises' solutions, as it stands in the notebook."""
    (code,) = re.findall(rf"```python\n(def {name}.*?)```", prose(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    return names[name]


@pytest.mark.parametrize("case", ["tiny", "tiny-over-split", "tiny-ragged"])
def test_the_reduce_of_the_solution_passes_the_chapters_gate(case: str, device: str) -> None:
    inputs = OPT.make_inputs(OPT.case(case), device, 0)
    parts, lses = parts_of(inputs)
    assert case == "tiny" or parts.isnan().any(), "no empty split: the case proves nothing"
    out, lse = solution("reduce_parts")(parts, lses, inputs.sink)
    outputs = {"out": out.to(torch.bfloat16), "lse": lse}
    assert OPT.yardstick is not None
    verdict = OPT.gate.judge(
        outputs, baseline=outputs, reference=OPT.reference(inputs), yardstick=OPT.yardstick(inputs)
    )
    assert verdict.passed, verdict.detail


def test_one_scratch_of_19456_parts_serves_every_batch() -> None:
    plans = {rows: plan(rows) for rows in range(1, 1025)}
    needed = {rows: p.splits * rows * 64 for rows, p in plans.items() if p.splits > 1}
    most = max(needed.values())
    assert most == 19_456 == 2 * 152 * 64
    assert max(rows for rows, places in needed.items() if places == most) == 152
    assert {plans[rows].waves for rows in needed} == {1}, "the solution's argument is about plans of one wave"
    assert staged_bytes(1, 1, 1) == 2052
    assert round(most * 2052 / 2**20, 1) == 38.1


# --- prose -----------------------------------------------------------------------------------------------------------


def says(sentence: str) -> bool:
    """Whether the chapter's prose holds a sentence, wherever its lines break."""
    return sentence in " ".join(prose().split())


def test_eight_splits_of_twenty_tiles_are_no_shorter_than_seven() -> None:
    assert math.ceil(20 / 8) == math.ceil(20 / 7) == 3
    assert says("8 splits of 20 tiles walk 3 tiles, and 7 do as well")


def test_640_keys_divide_evenly_by_the_split_counts_named() -> None:
    """In tiles of 32 keys, 128 and 512 apart."""
    tiles = 128 // 32 + 512 // 32
    assert [n for n in (2, 4, 5, 10) if tiles % n] == []
    assert says("640 keys in 2, 4, 5 or 10 splits divide evenly")
