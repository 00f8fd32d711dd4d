"""Chapter 03 on several ranks: the rehearsal under torchrun, comparisons that can fail, and rows of its records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4ref import kernels
from dsv4ref.evidence import records
from dsv4ref.evidence.records import Record
from dsv4ref.kernels.experts import ExpertMap, plan_dispatch
from dsv4ref.optimizations import catalogue, direct_w2_inputs, routing_exchange, routing_ranks
from dsv4ref.optimizations.base import Case
from dsv4ref.optimizations.direct_w2_inputs import LayerInputs
from dsv4ref.optimizations.report import report_rows
from dsv4ref.optimizations.routing_exchange import ALONE, FLASH, MANY, ONE, compared, record_rows

INTERPRETED = pytest.mark.skipif(kernels.mode() != "interpreted", reason="a GPU each for two ranks, or CPU tensors")


@INTERPRETED
def test_two_ranks_rehearse_what_gpus_will_record() -> None:
    found = routing_ranks.launch_ranks(2, "dsv4ref.optimizations.routing_exchange", "--seed", "3")
    assert (found["backend"], found["ranks"], found["red"], found["notes"]) == ("gloo", 2, [], [])
    assert [line["variant"] for line in found["records"]] == [ONE, MANY, "round robin", ALONE]
    assert {line["method"] for line in found["records"]} == {"host clock, a rehearsal"}
    assert {line["device"][-3:] for line in found["records"]} == {"-x2"}


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("interpreted", ["--out", "anywhere"], "--out: got a folder, but nothing is recorded without a GPU"),
        ("compiled", [], "--out: missing, expected a folder for the records"),
    ],
)
def test_records_go_where_there_is_a_gpu_and_nowhere_else(
    mode: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "mode", lambda: mode)
    monkeypatch.setattr("sys.argv", ["routing_exchange", *arguments])
    with pytest.raises(SystemExit, match="2"):
        routing_exchange.main()
    assert message in capsys.readouterr().err


# --- comparisons ---


@pytest.fixture
def whole(seed: int) -> LayerInputs:
    params = {"rows": 6, "experts": 4, "ranks": 1, "top_k": 2, "hidden": 64, "inner": 32, "content": "plain"}
    return direct_w2_inputs.build(Case("whole", params), "cpu", seed)


def parts(whole: LayerInputs, first: ExpertMap, second: ExpertMap) -> torch.Tensor:
    """The sum of what two ranks would return that hold these experts."""
    return sum(  # type: ignore[return-value]
        direct_w2_inputs.reference(
            replace(
                whole,
                placed=one,
                w1=replace(whole.w1, packed=whole.w1.packed[held], scales=whole.w1.scales[held]),
                w2=replace(whole.w2, packed=whole.w2.packed[held], scales=whole.w2.scales[held]),
            )
        ).float()
        for one in (first, second)
        for held in [one.global_ids()]
    )


def test_right_parts_pass_and_an_expert_held_twice_or_by_nobody_does_not(whole: LayerInputs) -> None:
    alone = direct_w2_inputs.plain(whole)
    left, right = (ExpertMap.placed(4, rank=rank, ranks=2) for rank in (0, 1))
    right_parts = compared(whole, alone, parts(whole, left, right))
    assert all(c.passed for c in right_parts), [c.detail for c in right_parts]
    for wrong in (parts(whole, left, left), parts(whole, ExpertMap.placed(4, rank=0, ranks=1), right)):
        assert [c.passed for c in compared(whole, alone, wrong)] == [False, False]


def test_rows_of_another_token_do_not_pass(whole: LayerInputs) -> None:
    alone = direct_w2_inputs.plain(whole)
    swapped = alone.float()[[1, 0, *range(2, 6)]]
    against64, against_one = compared(whole, alone, swapped)
    assert (against64.passed, against_one.passed) == (False, False)
    assert against_one.worst is not None
    assert against_one.worst[0] in (0, 1), against_one.detail


def test_the_layers_experts_take_local_numbers(device: str) -> None:
    """As the exchange hands them over: -1 for slots of other ranks, which must add nothing."""
    params = {"rows": 5, "experts": 3, "ranks": 1, "top_k": 2, "hidden": 64, "inner": 32, "content": "plain"}
    inputs = direct_w2_inputs.build(Case("local", params), device, 0)
    local = inputs.experts.masked_fill(inputs.experts == 2, -1)
    assert int(plan_dispatch(local, 3, block_m=16).histogram[2]) == 0
    layer = replace(routing_exchange.TINY, router=replace(routing_exchange.TINY.router, n_experts=3))
    y = routing_exchange._experts(layer, inputs.x, inputs.weights, local, inputs.w1, inputs.w2, inputs.limit)
    masked = replace(inputs, experts=local)
    found = compared(masked, direct_w2_inputs.plain(masked), y)
    assert all(c.passed for c in found), [c.detail for c in found]


# --- records ---


def line(variant: str, p50: float, **changes: Any) -> Record:
    ratio = None if variant == ONE else 100.0 / p50
    fields: dict[str, Any] = {
        "chapter": routing_exchange.CHAPTER, "case": f"{FLASH.name}-64", "variant": variant, "p20_us": p50,
        "p50_us": p50, "p80_us": p50, "repeats": 40, "method": "graph", "bytes": 1, "flops": 0, "launches": None,
        "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "noise_floor": None if ratio is None else 0.01,
        "bound_us": None, "gate": "passed", "device": "h200-x2", "device_name": "2 x NVIDIA H200", "driver": None,
        "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "mode": "compiled",
        "date": "2026-01-31T12:00:00+00:00", "commit": None, "seed": 0,
        "sources": records.hash_sources(routing_exchange.MEASURED_MODULES), "peers": None, "run": "r",
    }  # fmt: skip
    return Record(**{**fields, **changes})


FOUR = ((ONE, 100.0), (MANY, 60.0), ("round robin", 61.0), (ALONE, 20.0))


def test_a_row_per_batch_and_method_and_other_records_in_none() -> None:
    lines = [line(name, p50, method=method) for method in ("events", "graph") for name, p50 in FOUR]
    lines.append(line(ONE, 1.0, case="flash-1024"))  # the chapter's other records, which `measure` makes
    rows = record_rows(lines)
    assert [(row["tokens"], row["method"]) for row in rows] == [(64, "events"), (64, "graph")]
    first = rows[0]
    assert [first[f"{name}, us"] for name in ("one rank", "all ranks", "round robin", "exchange alone")] == [
        100.0, 60.0, 61.0, 20.0
    ]  # fmt: skip
    assert (first["devices"], first["stale"]) == ("2 x NVIDIA H200", False)
    assert record_rows([]) == []


def test_a_changed_kernel_makes_the_row_stale() -> None:
    lines = [line(name, p50) for name, p50 in FOUR]
    lines[3] = replace(lines[3], sources={**lines[3].sources, routing_exchange.MEASURED_MODULES[0]: "0" * 64})
    assert [row["stale"] for row in record_rows(lines)] == [True]


def test_the_scoreboard_of_one_gpu_leaves_them_out() -> None:
    assert report_rows([line(name, p50) for name, p50 in FOUR]) == []
    names = {f"{FLASH.name}-{rows}" for rows in FLASH.rows}
    assert not names & set(catalogue.get(routing_exchange.CHAPTER).cases)
