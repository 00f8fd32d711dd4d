"""Chapter 09's own figures: what the eager paths launch and move, what the split costs, what a cosine lets through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4ref.evidence import compare
from dsv4ref.evidence.launches import count_launches, operator_kind
from dsv4ref.kernels.sparse_mla import merge_scopes
from dsv4ref.optimizations import catalogue, decode_inputs, decode_model, persistent_decode
from dsv4ref.optimizations.base import Case, run_hazard, verify
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case
from dsv4ref.optimizations.pytorch_decode import GATHER_LAUNCHES, gather_bytes, gather_decode

OPT = catalogue.get("persistent_decode")
SEED = 0


def inputs_of(name: str, device: str = "cpu") -> DecodeInputs:
    built: DecodeInputs = OPT.make_inputs(OPT.case(name), device, SEED)
    return built


# --- the baseline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-gaps", "tiny-ragged", "tiny-fnuz", "tiny-c128"])
def test_the_eager_decode_is_attention(name: str, device: str) -> None:
    inputs = inputs_of(name, device)
    ours = OPT.baseline(inputs)
    verdict = OPT.gate.judge(
        ours, baseline=ours, reference=OPT.reference(inputs), yardstick=decode_inputs.plain(inputs)
    )
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("name", ["tiny", "tiny-fnuz", "tiny-c128", "flash-none"])
def test_the_eager_decode_launches_what_the_model_counts(name: str) -> None:
    """Without a GPU, and whatever the shape: an empty batch has fewer, since nothing is written."""
    inputs = inputs_of(name)
    counted = count_launches(
        lambda: gather_decode(inputs.q, inputs.scopes, inputs.sink, inputs.scale),
        warmup=0, method="aten-dispatch+interpreter",
    )  # fmt: skip
    assert counted.total <= GATHER_LAUNCHES
    assert counted.total == GATHER_LAUNCHES or name == "flash-none", counted


class Traffic(TorchDispatchMode):
    """Bytes of the operators that would launch work: their inputs and outputs, gathers by what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if operator_kind(func, args, kwargs, result) is not None:
            written = nbytes(result)
            gather = func._schema.name == "aten::index"
            self.bytes += written + (written if gather else nbytes((args, kwargs)))
        return result


def nbytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize(("heads", "extra"), [(8, 64), (64, 32)])
def test_the_eager_decode_moves_what_the_model_counts(heads: int, extra: int) -> None:
    """Within 5 %: the model leaves out operators on slots, scales and LSEs."""
    case = decode_case("traffic", rows=2, heads=heads, swa=128, extra=extra)
    inputs = decode_inputs.build(case, "cpu", SEED)
    with Traffic() as traffic:
        gather_decode(inputs.q, inputs.scopes, inputs.sink, inputs.scale)
    counted, modelled = traffic.bytes, gather_bytes(case.params)
    assert 0.95 * counted <= modelled <= counted, f"counted {counted}, modelled {modelled}"


# --- the merge and the split -----------------------------------------------------------------------------------------


def test_an_eager_merge_takes_17_launches_and_the_kernel_one(device: str) -> None:
    inputs = inputs_of("tiny", device)
    scratch = persistent_decode.decode_scopes(inputs)
    out = torch.empty_like(inputs.q)
    eager = count_launches(lambda: persistent_decode.eager_merge(scratch.partials, scratch.lses, inputs.sink))
    fused = count_launches(lambda: merge_scopes(scratch.partials, scratch.lses, sink=inputs.sink, out=out))
    assert fused.total == 1
    assert eager.total == 17 if device == "cpu" else eager.total >= 17, eager


def test_eager_and_fused_merge_agree_where_both_are_defined(device: str) -> None:
    inputs = inputs_of("tiny-gaps", device)
    scratch = persistent_decode.decode_scopes(inputs)
    eager, eager_lse = persistent_decode.eager_merge(scratch.partials, scratch.lses, inputs.sink)
    fused, lse = merge_scopes(scratch.partials, scratch.lses, sink=inputs.sink, return_lse=True)
    assert lse is not None
    torch.testing.assert_close(lse, eager_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused, eager, rtol=2**-8, atol=1e-6)  # one bf16 ulp where fp32 differs in its last bits


@pytest.mark.parametrize("device_key", ["mi300x", "mi355x", "h200"])
def test_the_prediction_is_the_sum_of_its_parts_and_dearer_than_a_single_pass(device_key: str) -> None:
    for case in OPT.cases.values():
        if not case.measured:
            continue
        times = persistent_decode.split_times_us(case.params, device_key)
        single = times.pop("single pass")
        predicted = OPT.predict(case, device_key).optimized_us
        assert predicted is not None
        assert math.isclose(predicted, sum(times.values()))
        assert predicted > single, case.name


def test_the_split_model_needs_a_device_with_published_figures() -> None:
    params = OPT.case("flash-128").params
    with pytest.raises(ValueError, match="device: got 'cpu', expected one whose bandwidth"):
        persistent_decode.split_times_us(params, "cpu")


def test_the_merge_moves_three_vectors_and_two_lses() -> None:
    params = {"rows": 3, "heads": 16}
    assert persistent_decode.merge_bytes(params) == 3 * decode_model.vector_bytes(params) + 2 * 4 * 3 * 16


# --- cases and criteria ----------------------------------------------------------------------------------------------


def test_gaps_are_where_the_case_says(device: str) -> None:
    inputs = inputs_of("tiny-gaps", device)
    assert inputs.extra is not None
    empty = [scope.indptr.diff().eq(0).tolist() for scope in (inputs.swa, inputs.extra)]
    assert empty == [[False, True, False, True, False, True, False], [False, False, True, True, False, False, True]]
    early = inputs_of("tiny-early", device)
    assert early.extra is not None
    assert early.extra.indices.numel() == 0
    assert early.extra.width == 16


def test_an_unknown_gap_is_refused() -> None:
    case = OPT.case("tiny")
    with pytest.raises(ValueError, match="missing: got 'swa', expected 'none', 'extra' or 'alternate'"):
        OPT.make_inputs(Case("x", {**case.params, "missing": "swa"}), "cpu", SEED)


def test_the_head_counts_of_the_claim_are_among_the_cases() -> None:
    """TP2, TP4 and TP8 of both models, and the published batch at the heads the source ran."""
    assert {8, 16, 32, 64} <= {case.params["heads"] for case in OPT.cases.values()}
    measured = {(c.params["rows"], c.params["heads"]) for c in OPT.cases.values() if c.measured}
    assert {(128, 16), (128, 32), (128, 64), (128, 128)} <= measured


def test_the_published_cosine_alone_lets_two_planted_bugs_through(device: str) -> None:
    verdicts = {name: run_hazard(OPT, name, device=device, seed=SEED) for name in OPT.hazards}
    accepted = {name for name, verdict in verdicts.items() if persistent_decode.accepted_as_published(verdict)}
    assert accepted == {"sink-per-scope", "sink-scaled"}


@pytest.mark.parametrize("name", ["tiny", "tiny-tp4", "tiny-tp2", "tiny-gaps"])
def test_what_the_gate_accepts_meets_the_published_criterion(name: str, device: str) -> None:
    verdict = verify(OPT, name, device=device, seed=SEED)
    assert verdict.passed, verdict.detail
    assert persistent_decode.accepted_as_published(verdict)
    bound = compare.TOLERANCES["attention_bf16"].cosine
    assert bound is not None
    assert bound < 1 - persistent_decode.PUBLISHED_COSINE
