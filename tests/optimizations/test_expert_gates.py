"""What the gates of chapters 12 and 13 compute in float64: once per case, and on large batches a sample of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4ref.kernels import peers
from dsv4ref.optimizations import catalogue, direct_w2_inputs, direct_w2_reduce, moe_tiles
from dsv4ref.optimizations.base import Case, Optimization, verify
from dsv4ref.optimizations.direct_w2_inputs import LayerInputs

CHAPTERS = [catalogue.get("direct_w2_reduce"), catalogue.get("moe_tiles")]
ids = [chapter.id for chapter in CHAPTERS]
ROWS, CHECKED = 23, 5


def sampled(chapter: Optimization) -> Case:
    """A tiny case with the sample that large ones have."""
    tiny = chapter.case("tiny")
    return replace(tiny, params={**tiny.params, "rows": ROWS, "checked": CHECKED})


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids)
def test_checked_rows_are_the_whole_oracles(chapter: Optimization, device: str) -> None:
    inputs = chapter.make_inputs(sampled(chapter), device, 7)
    rows = inputs.checked.tolist()
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1], len(rows)) == (0, ROWS - 1, CHECKED)
    for compute in (direct_w2_inputs.reference, direct_w2_inputs.plain):
        whole, part = compute(replace(inputs, checked=None)).double(), compute(inputs).double()
        assert whole.shape[0] == ROWS
        # A library's product of fewer rows may sum in another order, and a bf16 row may then round the other way.
        torch.testing.assert_close(
            part, whole[rows], rtol=2**-7, atol=2**-7 if compute is direct_w2_inputs.plain else 0
        )


def test_every_row_is_checked_where_there_are_few() -> None:
    chapter = CHAPTERS[0]
    params = {**chapter.case("tiny").params, "rows": CHECKED, "checked": CHECKED}
    assert chapter.make_inputs(Case("few", params), "cpu", 0).checked is None
    with pytest.raises(ValueError, match="checked: got 1, expected None or at least 2"):
        chapter.make_inputs(Case("one", {**params, "checked": 1}), "cpu", 0)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids)
def test_a_gate_works_the_oracle_out_once(chapter: Optimization, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[LayerInputs] = []
    real = direct_w2_inputs.reference

    def counted(inputs: LayerInputs) -> torch.Tensor:
        calls.append(inputs)
        return real(inputs)

    monkeypatch.setattr(direct_w2_inputs, "reference", counted)
    case = sampled(chapter)
    verdict = verify(replace(chapter, cases={**chapter.cases, case.name: case}), case.name, device=device, seed=0)
    assert verdict.passed, verdict.detail
    assert len(calls) == 1


def test_a_wrong_checked_row_and_an_unwritten_one_elsewhere_are_caught(device: str) -> None:
    chapter = CHAPTERS[0]
    inputs = chapter.make_inputs(sampled(chapter), device, 7)
    right, reference, plain = chapter.optimized(inputs), chapter.reference(inputs), direct_w2_reduce._plain(inputs)

    def judged(**changes: torch.Tensor) -> str:
        verdict = chapter.gate.judge({**right, **changes}, baseline=right, reference=reference, yardstick=plain)
        assert not verdict.passed, verdict.detail
        return verdict.detail

    assert chapter.gate.judge(right, baseline=right, reference=reference, yardstick=plain).passed
    out, written = right["out"].clone(), right["written"].clone()
    out[-1] = out[0]
    assert "out:" in judged(out=out)
    unchecked = next(row for row in range(ROWS) if row not in inputs.checked.tolist())
    slot = unchecked * inputs.experts.shape[1]
    written[slot] = 1 - written[slot]
    assert f"first at ({slot},)" in judged(written=written)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids)
def test_cases_say_how_many_rows_float64_checks(chapter: Optimization) -> None:
    large = [case for case in chapter.cases.values() if case.params["rows"] > direct_w2_inputs.CHECKED_ROWS]
    assert {case.params["rows"] for case in large if case.measured} >= {1024, 4096, 8192}
    for case in large:
        if case.needs_gpu:
            assert case.params["checked"] == direct_w2_inputs.CHECKED_ROWS, case.name
            assert case.about.endswith(f"float64 checks {direct_w2_inputs.CHECKED_ROWS} rows"), case.about
        else:
            assert case.params.get("checked") is None, case.name


def test_a_failing_peer_is_named_and_left_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("another version")

    monkeypatch.setattr(peers, "triton_kernels_layer", broken)
    inputs = CHAPTERS[1].make_inputs(CHAPTERS[1].case("tiny-few"), device, 0)
    with pytest.warns(UserWarning, match="triton_kernels, our activation is left out: RuntimeError: another version"):
        timed = moe_tiles._timed(inputs)
    assert "optimized" in timed
    assert not [name for name in timed if name.startswith("peer")]


def test_a_peer_is_timed_as_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "triton_kernels_layer", lambda *args, ours, **kwargs: ours)
    inputs = CHAPTERS[1].make_inputs(CHAPTERS[1].case("tiny-few"), device, 0)
    timed = moe_tiles._timed(inputs)
    assert list(timed)[-1] == "peer: triton_kernels, our activation"


@pytest.mark.skipif(not torch.cuda.is_available() or not peers.triton_kernels_note(), reason="needs triton_kernels")
def test_the_peer_agrees_with_the_layer_and_repeats(device: str) -> None:
    chapter = CHAPTERS[1]
    shape = {"rows": 40, "hidden": 256, "inner": 128}  # the narrowest that its tiles divide
    inputs = chapter.make_inputs(Case("peer", {**chapter.case("tiny").params, **shape}), device, 0)
    timed = moe_tiles._timed(inputs)
    peer = timed[f"peer: {peers.TRITON_KERNELS}"]
    first, second = peer(), peer()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    ours = moe_tiles._run(inputs, moe_tiles.tiles_for(inputs))["out"]
    theirs = direct_w2_inputs.in_row_units(inputs, first)
    torch.testing.assert_close(theirs, ours, rtol=2**-4, atol=2**-4)
    assert torch.equal(first, second)
