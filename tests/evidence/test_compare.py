"""Comparisons: what passes, what fails, and that a failure points at the worst element with both values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.evidence.compare import TOLERANCES, Tolerance, close, error_norm, identical

ELEMENTWISE = Tolerance(abs=0.1, rel=0.01, cosine=None, yardstick_factor=None, reason="each element alone")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, dtype=torch.float64),
        torch.tensor([math.nan, -math.nan, math.inf, -0.0], dtype=torch.bfloat16),
        torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
        torch.tensor([[1, -1], [2**62, 0]]),
        torch.tensor(3.0),
        torch.tensor([True, False]),
        torch.empty(0, 5),
    ],
    ids=["float64", "bf16", "fp8", "int64", "scalar", "bool", "empty"],
)
@pytest.mark.parametrize("relation", ["bit", "exact"])
def test_a_tensor_is_identical_to_its_copy(tensor: Tensor, relation: str) -> None:
    found = identical("x", tensor, tensor.clone(), relation=relation)
    assert found.passed, found.detail
    assert found.relation == relation
    assert found.worst is None


def test_the_first_differing_element_is_named_with_both_values() -> None:
    oracle = torch.arange(12.0).reshape(3, 4)
    candidate = oracle.clone()
    candidate[1, 2], candidate[2, 0] = 99.0, 77.0
    found = identical("x", candidate, oracle)
    assert not found.passed
    assert (found.worst, found.candidate, found.oracle) == ((1, 2), 99.0, 6.0)
    assert found.detail == "x: 2 of 12 elements differ, first at (1, 2): 99, expected 6"


@pytest.mark.parametrize(
    ("candidate", "oracle"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.nextafter(torch.tensor([1.0]), torch.tensor(2.0))),
        (torch.tensor([0x7FC1], dtype=torch.int16).view(torch.bfloat16), torch.tensor([math.nan]).bfloat16()),
        (torch.tensor([0x80], dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(1).to(torch.float8_e4m3fn)),
    ],
    ids=["negative zero", "one ulp", "another NaN", "fp8 negative zero"],
)  # fmt: skip
def test_bytes_are_compared_not_numbers(candidate: Tensor, oracle: Tensor) -> None:
    assert not identical("x", candidate, oracle).passed


@pytest.mark.parametrize(
    ("candidate", "detail"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "x: dtype torch.float64, expected torch.float32"),
        (torch.zeros(3, 2), "x: shape (3, 2), expected (2, 3)"),
        (torch.zeros(3, 2).T, "x: stride (1, 2), expected (3, 1)"),
        (torch.zeros(2, 6)[:, :3], "x: stride (6, 1), expected (3, 1)"),
    ],
)
def test_dtype_shape_and_stride_are_part_of_the_bytes(candidate: Tensor, detail: str) -> None:
    found = identical("x", candidate, torch.zeros(2, 3))
    assert not found.passed
    assert found.detail == detail


def test_exactness_of_integers_does_not_depend_on_strides() -> None:
    values = torch.arange(6).reshape(3, 2)
    assert identical("x", values.T.contiguous().T, values, relation="exact").passed
    assert not identical("x", values.T.contiguous().T, values, relation="bit").passed


def test_strided_tensors_are_compared_element_by_element() -> None:
    oracle = torch.arange(6.0).reshape(2, 3).T
    candidate = oracle.clone()
    candidate[2, 1] = 50.0
    found = identical("x", candidate, oracle.clone())
    assert found.worst == (2, 1)
    assert (found.candidate, found.oracle) == (50.0, 5.0)


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_an_element_passes_by_its_absolute_or_its_relative_bound() -> None:
    oracle = numbers(0.0, 100.0, -100.0, 1.0)
    assert close("x", numbers(0.1, 101.0, -99.0, 1.0999), oracle, ELEMENTWISE).passed
    for where, value in ((0, 0.11), (1, 101.1), (2, -101.1), (3, 0.89)):
        candidate = oracle.clone()
        candidate[where] = value
        found = close("x", candidate, oracle, ELEMENTWISE)
        assert not found.passed
        assert found.worst == (where,)
        assert (found.candidate, found.oracle) == (value, oracle[where].item())


def test_the_worst_element_is_the_one_furthest_outside_its_own_bound() -> None:
    """1.5 off at 100 is 1.5 of its bound; 0.3 off at 0 is 3 of its bound, and a smaller error."""
    oracle = numbers(100.0, 0.0, 0.0).reshape(3, 1)
    found = close("x", numbers(101.5, 0.3, 0.2).reshape(3, 1), oracle, ELEMENTWISE)
    assert found.worst == (1, 0)
    assert found.max_abs == pytest.approx(1.5)
    assert found.detail == ("x: 3 elements outside abs 0.1 / rel 0.01; worst 3 of its bound at (1, 0): 0.3, expected 0")


def test_a_budget_that_is_met_still_says_how_near_it_was() -> None:
    found = close("x", numbers(1.05, 2.0), numbers(1.0, 2.0), ELEMENTWISE)
    assert found.passed
    assert found.worst == (0,)
    assert found.norm == pytest.approx(0.05 / math.sqrt(5))
    assert "worst 0.5 of its bound at (0,): 1.05, expected 1" in found.detail


@pytest.mark.parametrize(
    ("candidate", "oracle", "kind"),
    [
        (numbers(1, math.nan), numbers(1, 2), "NaN"),
        (numbers(1, 2), numbers(1, math.nan), "NaN"),
        (numbers(1, math.inf), numbers(1, 2), "+inf"),
        (numbers(1, 2), numbers(1, -math.inf), "-inf"),
        (numbers(1, math.inf), numbers(1, -math.inf), "+inf"),
        (numbers(1, math.nan), numbers(1, math.inf), "NaN"),
    ],
)
def test_nan_and_infinity_masks_come_before_values(candidate: Tensor, oracle: Tensor, kind: str) -> None:
    found = close("x", candidate, oracle, ELEMENTWISE)
    assert not found.passed
    assert found.worst == (1,)
    assert found.detail.startswith(f"x: {kind} masks differ at 1 elements, first (1,): ")


def test_matching_masks_leave_the_finite_elements_to_be_compared() -> None:
    oracle = numbers(math.nan, math.inf, -math.inf, 1.0)
    assert close("x", oracle.clone(), oracle, ELEMENTWISE).passed
    found = close("x", numbers(math.nan, math.inf, -math.inf, 1.5), oracle, ELEMENTWISE)
    assert not found.passed
    assert found.worst == (3,)


def test_all_nan_on_both_sides_is_agreement() -> None:
    both = torch.full((4,), math.nan)
    for tolerance in TOLERANCES.values():
        assert close("x", both, both.to(torch.float64), tolerance, both).passed


def test_shapes_must_agree() -> None:
    found = close("x", torch.zeros(2, 1), torch.zeros(2), ELEMENTWISE)
    assert not found.passed
    assert found.detail == "x: shape (2, 1), expected (2,)"


def test_the_candidates_dtype_must_be_the_yardsticks() -> None:
    """A bf16 budget on an fp32 output would let a kernel pass that writes another type than it promises."""
    oracle = numbers(1.0, 2.0)
    yardstick = oracle.to(torch.bfloat16)
    assert close("x", yardstick, oracle, TOLERANCES["attention_bf16"], yardstick).passed
    found = close("x", oracle.to(torch.float32), oracle, TOLERANCES["attention_bf16"], yardstick)
    assert not found.passed
    assert found.detail == "x: dtype torch.float32, expected torch.bfloat16"


def test_empty_tensors_agree() -> None:
    empty = torch.empty(0, 5)
    found = close("x", empty, empty.to(torch.float64), TOLERANCES["attention_bf16"], empty)
    assert found.passed
    assert found.detail == "x: empty"


# --- norms and directions --------------------------------------------------------------------------------------------

NORMED = Tolerance(abs=100.0, rel=0.0, cosine=None, yardstick_factor=2.0, reason="the norm alone")
DIRECTED = Tolerance(abs=100.0, rel=0.0, cosine=5e-6, yardstick_factor=None, reason="the direction alone")


def test_the_error_norm_may_be_twice_the_straightforward_implementations() -> None:
    oracle = numbers(3.0, 4.0)
    yardstick = oracle + numbers(0.1, 0.0)
    assert close("x", oracle + numbers(0.0, 0.199), oracle, NORMED, yardstick).passed
    found = close("x", oracle + numbers(0.0, 0.201), oracle, NORMED, yardstick)
    assert not found.passed
    assert found.yardstick_norm == pytest.approx(0.1 / 5)
    assert found.norm == pytest.approx(0.201 / 5)
    assert "error norm 0.0402 over 2 x 0.02" in found.detail


def test_a_perfect_yardstick_leaves_no_room() -> None:
    oracle = numbers(3.0, 4.0)
    assert close("x", oracle.clone(), oracle, NORMED, oracle.clone()).passed
    assert not close("x", oracle + 1e-12, oracle, NORMED, oracle.clone()).passed


def test_a_budget_with_a_yardstick_needs_one() -> None:
    with pytest.raises(ValueError, match="yardstick: missing for x, expected the straightforward implementation's"):
        close("x", numbers(1.0), numbers(1.0), NORMED)


def test_the_direction_is_compared_over_the_whole_tensor() -> None:
    oracle = torch.ones(100, dtype=torch.float64)
    longer = oracle * 1.5
    assert close("x", longer, oracle, DIRECTED).passed
    turned = oracle.clone()
    turned[0] += 0.1
    found = close("x", turned, oracle, DIRECTED)
    assert not found.passed
    exact = 1 - torch.nn.functional.cosine_similarity(turned, oracle, dim=0).item()
    assert found.cosine_difference == pytest.approx(exact, rel=1e-6)
    assert "cosine difference" in found.detail


@pytest.mark.parametrize(
    ("candidate", "oracle", "difference"), [((0, 0), (0, 0), 0.0), ((1, 0), (0, 0), 1.0), ((0, 0), (1, 0), 1.0)]
)
def test_a_zero_vector_has_no_direction(
    candidate: tuple[float, ...], oracle: tuple[float, ...], difference: float
) -> None:
    found = close("x", numbers(*candidate), numbers(*oracle), DIRECTED)
    assert found.cosine_difference == difference
    assert found.passed == (difference == 0.0)


def test_error_norms_are_relative_and_over_finite_elements() -> None:
    assert error_norm(numbers(3, 4.5), numbers(3, 4)) == pytest.approx(0.1)
    assert error_norm(numbers(3, 4.5, math.nan, 1), numbers(3, 4, 1, math.inf)) == pytest.approx(0.1)
    assert error_norm(numbers(0, 0), numbers(0, 0)) == 0.0
    assert error_norm(numbers(1, 0), numbers(0, 0)) == math.inf
    assert error_norm(torch.tensor([1.0], dtype=torch.bfloat16), numbers(2)) == 0.5


# --- the table of budgets --------------------------------------------------------------------------------------------


def test_the_attention_and_lse_bounds_are_flashmlas() -> None:
    attention, lse = TOLERANCES["attention_bf16"], TOLERANCES["lse_fp32"]
    assert (attention.abs, attention.rel, attention.cosine) == (1e-3, 2.01 / 128, 5e-6)
    assert attention.yardstick_factor == 2.0
    assert (lse.abs, lse.rel) == (1e-6, 8.01 / 65536)


@pytest.mark.parametrize("name", TOLERANCES)
def test_every_budget_has_a_reason_and_room_for_its_format_but_not_more(name: str) -> None:
    """A value rounded to the output format passes; one off by three ulps of it does not."""
    tolerance = TOLERANCES[name]
    assert len(tolerance.reason) > 20
    dtype, ulp = (torch.bfloat16, 2.0**-7) if name.endswith("bf16") else (torch.float32, 2.0**-12)
    oracle = torch.linspace(1.0, 1.99, 512, dtype=torch.float64)
    rounded = oracle.to(dtype)
    assert close("x", rounded, oracle, tolerance, rounded).passed
    off = (oracle * (1 + 3 * ulp)).to(dtype)
    assert not close("x", off, oracle, tolerance, rounded).passed


finite = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8))
def test_a_verdict_is_what_the_definition_says(pairs: list[tuple[float, float]]) -> None:
    candidate, oracle = (numbers(*column) for column in zip(*pairs, strict=True))
    used = [abs(c - o) / max(0.1, 0.01 * abs(o)) for c, o in pairs]
    assume(all(abs(share - 1) > 1e-9 for share in used))  # at the bound itself rounding decides
    found = close("x", candidate, oracle, ELEMENTWISE)
    assert found.passed == (max(used) < 1)
    assert found.worst is not None
    assert used[found.worst[0]] == pytest.approx(max(used))
