"""The solutions of chapter 14's exercises, and what its prose says in numbers, checked."""

from __future__ import annotations

from typing import Any

import torch

from dsv4ref.config import V3_2
from dsv4ref.evidence import records
from dsv4ref.kernels.experts import router_logits
from dsv4ref.kernels.experts.router_gemm import select_tile
from dsv4ref.optimizations import catalogue, router_study
from dsv4ref.optimizations.report import report_rows
from dsv4ref.optimizations.router_band import LOGIT_BAND

OPT = catalogue.get("router_dtype")


def test_glms_range_rounds_to_nine_numbers() -> None:
    low, high = (torch.tensor(edge).to(torch.bfloat16).item() for edge in (6.817, 7.063))
    assert (low, high) == (218 / 32, 226 / 32)
    assert torch.linspace(6.817, 7.063, 10001).to(torch.bfloat16).unique().numel() == 226 - 218 + 1 == 9


def rate(offset: float) -> float:
    return router_study.changed(V3_2.router, offset, 0.1, 400)["bias"]


def test_offsets_a_whole_number_of_steps_apart_round_alike() -> None:
    assert router_study.bf16_spacing(4.5) == router_study.bf16_spacing(7.9) == 1 / 32
    assert rate(4.5) == rate(5.0) == rate(7.0)
    assert rate(7.99) != rate(7.0)


def test_programs_at_the_limits() -> None:
    programs = {m: select_tile(m).programs(m, 256) for m in (8, 9, 128, 129)}
    assert programs == {8: 1024, 9: 16, 128: 128, 129: 40}


def test_bf16_in_an_fp32_tensor_shows_in_its_low_bits(device: str) -> None:
    inputs = OPT.make_inputs(OPT.case("tiny"), device, 0)
    ours = router_logits(inputs.x, inputs.weight)
    cast = (inputs.x @ inputs.weight.T).float()
    assert (cast == cast.bfloat16()).all()
    assert not (ours == ours.bfloat16()).all()
    assert (cast.view(torch.int32) & 0xFFFF == 0).all()


# --- prose ---


def test_the_band_beside_the_errors_it_is_compared_with() -> None:
    assert LOGIT_BAND / 2 < 16 * 2.0**-24 * 7168**0.5 <= LOGIT_BAND
    assert 0.45 < 6e-5 / LOGIT_BAND < 0.55
    assert 2.0**-8 / LOGIT_BAND == 32


def test_published_figures_are_the_ones_the_prose_quotes() -> None:
    changes = {claim.unit: claim for claim in OPT.claims}
    assert round(changes["ms"].gain_percent, 2) == -3.10
    assert round(changes["relative speed"].gain_percent, 2) == -3.06
    assert changes["launches"].before - changes["launches"].after == V3_2.n_moe_layers == 58
    assert (changes["values"].before, changes["values"].after) == (238, 8)


def on_h200() -> dict[str, dict[str, Any]]:
    """The shipped H200 records' rows by case."""
    mine = [r for r in records.latest(records.shipped()) if r.chapter == OPT.id and r.device == "h200"]
    return {row["case"]: row for row in report_rows(mine)}


def test_the_h200s_records_say_what_the_page_says_of_them() -> None:
    rows = on_h200()
    for name, row in rows.items():
        tokens, us = OPT.cases[name].params["rows"], row["variants"]
        cast = row["baseline_us"] - us["source, rounded bias"]
        behind = us["fp32 gemm"] - us["library's bf16 gemm"]
        ahead = us["source, rounded bias"] - row["optimized_us"]
        if tokens <= 64:
            assert row["ratio_ci"][0] > 1 + row["noise_floor"], (name, row["ratio_ci"])
        else:
            assert row["ratio_ci"][1] < 1 - row["noise_floor"], (name, row["ratio_ci"])
        if tokens <= 8 or name == "flash-64":
            assert behind < 0 < ahead, (name, us)
        elif tokens == 64:
            assert 0.8 * cast < behind < 1.25 * cast, (name, behind, cast)
            assert ahead < 0, (name, us)
        else:
            assert behind > cast, (name, behind, cast)


def test_a_step_along_d_takes_four_to_six_tenths_of_a_microsecond() -> None:
    rows, steps = on_h200(), {}
    for name in ("flash-64", "flash-1024", "v32-64", "v32-256", "v32-1024"):
        p = OPT.cases[name].params
        tile = select_tile(p["rows"])
        steps[name] = rows[name]["variants"]["fp32 gemm"] / -(-p["depth"] // (tile.block_k * tile.slices))
    assert all(0.35 < step < 0.6 for step in steps.values()), steps
    for few, many in (("flash-64", "flash-1024"), ("v32-64", "v32-1024"), ("v32-256", "v32-1024")):
        assert 1 < steps[many] / steps[few] < 1.5, (few, many, steps)
