"""The table of Hopper's kernel: ratios of the same run's times, and no row without both kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations import catalogue, split_hopper, split_k_decode
from dsv4ref.optimizations.base import verify
from dsv4ref.optimizations.split_k_decode import SplitInputs

OPT = catalogue.get("split_k_decode")


def timed(case: str, **times: float) -> list[Record]:
    """Records of a case, on a recorded one's pattern."""
    pattern = next(r for r in records.shipped() if (r.chapter, r.case) == (OPT.id, "flash-64"))
    names = {"portable": "optimized", "gluon": "gluon", "peer": "peer: FlashMLA"}
    return [
        replace(pattern, case=case, variant=names[key], p20_us=time, p50_us=time, p80_us=time)
        for key, time in times.items()
    ]


def test_rows_hold_the_ratios_of_one_run() -> None:
    rows = split_hopper.hopper_rows(
        OPT, [*timed("flash-64", portable=90.0, gluon=30.0, peer=45.0), *timed("heads-8-64", portable=40.0, gluon=50.0)]
    )
    assert [row["case"] for row in rows] == ["flash-64", "heads-8-64"]
    assert (rows[0]["portable / gluon"], rows[0]["FlashMLA / gluon"]) == (3.0, 1.5)
    assert rows[1]["FlashMLA / gluon"] is None
    said = split_hopper.summary(rows)
    assert "geometric mean 1.55 over 2 cases" in said
    assert "portable faster: heads-8-64" in said
    assert "FlashMLA / gluon: geometric mean 1.50 over 1 cases" in said
    assert "FlashMLA faster: nowhere" in said
    behind = split_hopper.summary(
        split_hopper.hopper_rows(OPT, timed("flash-64", portable=90.0, gluon=30.0, peer=20.0))
    )
    assert "FlashMLA faster: flash-64" in behind


@pytest.mark.parametrize("times", [{"portable": 90.0}, {"gluon": 30.0}, {"peer": 1.0, "gluon": 2.0}], ids=str)
def test_a_case_without_both_kernels_has_no_row(times: dict[str, float]) -> None:
    assert split_hopper.hopper_rows(OPT, timed("flash-64", **times)) == []
    assert split_hopper.summary([]) == "no record of this kernel ships"


def test_other_chapters_records_are_left_out() -> None:
    found = timed("flash-64", portable=90.0, gluon=30.0)
    assert split_hopper.hopper_rows(OPT, [replace(r, chapter="fused_inverse_rope") for r in found]) == []


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_a_wrong_result_of_hoppers_kernel_turns_the_gate_red(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(inputs: SplitInputs) -> Callable[..., tuple[Tensor, Tensor | None]]:
        def call(return_lse: bool) -> tuple[Tensor, Tensor | None]:
            step = inputs.step
            out, lse = split_k_decode.split_k_decode(
                step.q, step.swa, step.extra, sink=inputs.sink, scale=step.scale, return_lse=return_lse
            )
            out[0, 0, :8] += error
            return out, lse

        return call

    monkeypatch.setattr(split_k_decode, "_on_hopper", instead)
    verdict = verify(OPT, "tiny", device="cpu", seed=0)
    assert verdict.passed is (error == 0.0), verdict.detail
    assert verdict.absent == ()
