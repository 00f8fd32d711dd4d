"""The solutions of chapter 11's exercises, and what its text says in numbers, checked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.formats import Dialect, fp8
from dsv4ref.formats.kv_cache import NOPE_DIM, ROPE_DIM
from dsv4ref.optimizations import base, catalogue, recast
from dsv4ref.optimizations.fp8_gather import WAYS, read_rows, traffic_rows
from dsv4ref.ref.sparse_attention import sparse_attention_ref
from dsv4ref.show.explorers import recast_explorer

OPT = catalogue.get("fp8_gather")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / OPT.notebook
CLASS = {name: position for position, name in enumerate(recast.CLASSES)}


# --- what is flushed ---


def survivors(exponent: int) -> list[int]:
    """Codes whose number is neither zero nor flushed by the re-cast."""
    row = recast.recast_classes(Dialect.FN)[exponent + 127]
    zero = fp8.decode(torch.arange(256).to(torch.uint8), Dialect.FN) == 0
    return [code for code in range(256) if row[code] not in (-1, CLASS["flushed to zero"]) and not zero[code]]


def test_nothing_is_left_at_2_to_the_minus_19_and_twelve_codes_at_minus_18() -> None:
    assert survivors(-19) == []
    assert survivors(-18) == [*range(0x79, 0x7F), *range(0xF9, 0xFF)]
    codes = torch.tensor(survivors(-18)).to(torch.uint8)
    recast_value = fp8.decode(fp8.encode(fp8.decode(codes, Dialect.FN) * 2.0**-18, Dialect.FN), Dialect.FN)
    assert recast_value.abs().unique().tolist() == [2.0**-9]


# --- one better scale ---


def one_scale(keys: Tensor) -> Tensor:
    """Run the exercise's solution as it stands in the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    (solution,) = re.findall(r"```python\n(def one_scale.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "fp8": fp8}
    exec(solution, names)
    found: Tensor = names["one_scale"](keys)
    return found


def attention_error(exponent: int, spread: int, change: Any) -> tuple[float, float]:
    """(share of nope numbers kept, error norm of float64 attention over changed keys)."""
    scope, step = recast.one_row(exponent, where="cpu", spread=spread)
    keys = read_rows(WAYS["bf16 rows"](scope, Dialect.FN)).double()
    changed = change(keys)
    oracle, _ = sparse_attention_ref(step.q, [scope], step.sink, step.scale)
    scores = step.q[0].double() @ changed.T * step.scale
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1), step.sink.double())
    kept = float((changed == keys)[:, :NOPE_DIM].double().mean())
    return kept, compare.error_norm(torch.exp(scores - total[:, None]) @ changed, oracle[0])


def unit(keys: Tensor) -> Tensor:
    return fp8.decode(fp8.encode(keys.float(), Dialect.FN), Dialect.FN, torch.float64)


def test_one_better_scale_repairs_nope_and_not_rope() -> None:
    kept, error = attention_error(-8, 0, one_scale)
    kept_unit, error_unit = attention_error(-8, 0, unit)
    _, error_at_one = attention_error(0, 0, unit)
    assert kept > 0.98 > 0.2 > kept_unit
    assert error < error_unit / 10
    assert error == pytest.approx(error_at_one, rel=0.2)
    _, exact = attention_error(-8, 0, lambda keys: keys)
    assert exact < 1e-12


def test_blocks_that_differ_by_2_to_the_6_still_lie_inside_one_scales_15_binades() -> None:
    kept, _ = attention_error(-8, 6, one_scale)
    assert kept > 0.99
    numbers = fp8.decode(torch.arange(8, 127).to(torch.uint8), Dialect.FN)  # normal and positive
    assert int(torch.log2(numbers).floor().unique().numel()) == 15


def test_one_better_scale_does_not_saturate() -> None:
    keys = torch.tensor([[448.0 * 2.0**-9, -(2.0**-20), 0.0]], dtype=torch.float64)
    assert torch.equal(one_scale(keys)[0, [0, 2]], keys[0, [0, 2]])


# --- when a gather pays ---


def test_a_gather_and_a_dense_decode_move_three_times_the_bytes_of_a_paged_decode() -> None:
    by_way = {row["way"]: row for row in traffic_rows()}
    kept, direct = by_way["fp8 rows, scales kept (optimised)"], by_way["no rows: decode from the cache"]
    assert (kept["bytes"], direct["bytes"]) == (1752, 584)
    assert kept["gather reads"] + kept["gather writes"] == 1168
    assert by_way["bf16 rows (baseline)"]["gather reads"] + by_way["bf16 rows (baseline)"]["gather writes"] == 1609


# --- what the text says ---


@pytest.mark.parametrize("exponent", [-8, 0])
def test_rope_carries_the_error_of_ordinary_keys_and_the_scales_that_of_small_ones(exponent: int) -> None:
    def rope_only(keys: Tensor) -> Tensor:
        return torch.cat([keys[:, :NOPE_DIM], unit(keys)[:, NOPE_DIM:]], dim=1)

    def nope_only(keys: Tensor) -> Tensor:
        return torch.cat([unit(keys)[:, :NOPE_DIM], keys[:, NOPE_DIM:]], dim=1)

    assert ROPE_DIM == 64
    (_, rope), (_, nope) = (attention_error(exponent, 0, change) for change in (rope_only, nope_only))
    if exponent == 0:
        assert rope > 20 * nope, f"rope {rope:.4g}, nope {nope:.4g}"
    else:
        assert nope > 2 * rope, f"rope {rope:.4g}, nope {nope:.4g}"


def test_a_budget_on_attention_alone_would_let_the_shifted_scale_byte_pass() -> None:
    on_attention = replace(OPT, gate=Gate((Check("out", "budget", "attention_bf16"),)))
    assert base.run_hazard(on_attention, "shifted-scales", device="cpu", seed=0).passed
    assert not base.run_hazard(OPT, "shifted-scales", device="cpu", seed=0).passed


@pytest.mark.parametrize("hazard", ["unit-scale", "unit-scale-spread", "rope-in-fp8"])
def test_the_re_cast_is_outside_the_attention_budget_not_only_inexact(hazard: str) -> None:
    on_attention = replace(OPT, gate=Gate((Check("out", "budget", "attention_bf16"),)))
    verdict = base.run_hazard(on_attention, hazard, device="cpu", seed=0)
    assert not verdict.passed, verdict.detail


PUBLISHED = {0: (100, 0), -2: (87, 1.6), -4: (75, None), -6: (62, 19), -12: (24, 57)}


@pytest.mark.parametrize("exponent", PUBLISHED)
def test_the_shares_of_exact_and_flushed_codes(exponent: int) -> None:
    (row,) = recast.class_rows(Dialect.FN, [exponent])
    exact, flushed = PUBLISHED[exponent]
    assert row["exact"] == pytest.approx(exact, abs=0.5)
    if flushed is not None:
        assert row["flushed to zero"] == pytest.approx(flushed, abs=0.4)
    assert sum(row[name] for name in recast.CLASSES) == pytest.approx(100)


def test_the_bare_cast_makes_nan_in_fnuz_and_saturates_in_ocp() -> None:
    ocp, fnuz = (recast.class_rows(d, [1], clamp=False)[0] for d in Dialect)
    assert (ocp["NaN"], fnuz["saturated"]) == (0, 0)
    assert ocp["saturated"] == pytest.approx(100 * 16 / 254)
    assert fnuz["NaN"] == pytest.approx(100 * 16 / 255)


@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_number_has_one_class_and_only_nan_codes_have_none(dialect: Dialect) -> None:
    classes = recast.recast_classes(dialect)
    nan = fp8.decode(torch.arange(256).to(torch.uint8), dialect).isnan()
    assert ((classes < 0) == nan).all()
    assert (classes[127][~nan] == CLASS["exact"]).all()
    assert int(classes.max()) <= CLASS["saturated"]  # the clamp leaves no NaN


def test_two_roundings_cannot_differ_for_what_a_cache_holds() -> None:
    rows = recast.rounding_rows((0.05, 1.0, 8.0), samples=100_000)
    assert rows[-1]["codes that differ, %"] == 0
    assert rows[-1]["count"] == 255 * 254
    assert all(2.4 < row["codes that differ, %"] < 3.3 for row in rows[:-1]), rows


def test_the_explorer_draws_the_tables_shares() -> None:
    (row,) = recast.class_rows(Dialect.FNUZ, [1], clamp=False)
    picture = recast_explorer(1, "e4m3fnuz", "bare")
    assert f"NaN {row['NaN']:.4g} %" in picture
    assert "saturated 0 %" in picture
    assert recast_explorer(1, "e4m3fnuz") != picture
