"""Comparisons of two tensors: as bytes, as integers, or within a numerical budget.

Order of business in a budget comparison: shapes and dtypes, then the NaN and infinity masks, then values. A comparison
never raises on a mismatch and never rounds it away: it returns what differs, where, and both values there.

Source of the bf16 attention and LSE bounds: FlashMLA's tests (2.01/128 relative or 1e-3 absolute per element, cosine
difference 5e-6; LSE 8.01/65536 relative or 1e-6 absolute).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Comparison", "Tolerance", "close", "error_norm", "identical"]


@dataclass(frozen=True)
class Tolerance:
    """A numerical budget.

    Args:
        abs: an element passes if |candidate - oracle| is at most this ...
        rel: ... or at most this times |oracle|.
        cosine: bound on 1 - cos(candidate, oracle) over the whole tensor; None where a direction means nothing.
        yardstick_factor: bound on the candidate's error norm as a multiple of the straightforward implementation's;
            None where no such implementation is compared.
        reason: why these numbers, in units of the output format.
    """

    abs: float
    rel: float
    cosine: float | None
    yardstick_factor: float | None
    reason: str


TOLERANCES = {
    "attention_bf16": Tolerance(
        abs=1e-3,
        rel=2.01 / 128,
        cosine=5e-6,
        yardstick_factor=2.0,
        reason="bf16 keeps 8 significant bits: 1/128 is an ulp at the bottom of a binade, two cover rounding P and the "
        "output; absolute slack near zero; norm within twice that of plain PyTorch with the same roundings",
    ),
    "lse_fp32": Tolerance(
        abs=1e-6,
        rel=8.01 / 65536,
        cosine=None,
        yardstick_factor=None,
        reason="fp32 scores over 512 products and an exp2-based sum: 2^-13 relative, FlashMLA's own bound",
    ),
    "matmul_bf16": Tolerance(
        abs=1e-3,
        rel=2.01 / 128,
        cosine=5e-6,
        yardstick_factor=2.0,
        reason="one bf16 rounding of an fp32 accumulation (half an ulp = 1/256), doubled for summation order",
    ),
    "expert_rows_bf16": Tolerance(
        abs=2.0**-5,
        rel=2.01 / 128,
        cosine=1e-5,
        yardstick_factor=2.0,
        reason="rows in units of their own root mean square: activations, products and sum are rounded to bf16 once "
        "each, together some 2^-8 of the row; eight times that for the largest of millions of elements",
    ),
    "router_fp32": Tolerance(
        abs=1e-12,
        rel=16 * 2.0**-23,
        cosine=None,
        yardstick_factor=None,
        reason="16 fp32 ulps: exp, log and root of the score, a sum of k scores, a quotient and the scale, a few each; "
        "absolute slack for weights of exactly 0",
    ),
    "router_logits_fp32": Tolerance(
        abs=2.0**-13,
        rel=2.0**-13,
        cosine=None,
        yardstick_factor=None,
        reason="an fp32 sum of up to 7,168 products that adds up to order one: rounding errors in a random walk, "
        "2^-24 sqrt(7168), 16 times over",
    ),
    "router_weights_band": Tolerance(
        abs=1e-12,
        rel=2.0**-12,
        cosine=None,
        yardstick_factor=None,
        reason="two logit bands: a score's relative change is at most its logit's change, and so is the sum's",
    ),
    "routed_sum": Tolerance(
        abs=1e-5,
        rel=1e-5,
        cosine=1e-10,
        yardstick_factor=None,
        reason="float64 experts summed with fp32 router weights: the weights' 2e-6, and cancellation among k terms",
    ),
    "step_fp32": Tolerance(
        abs=2.0**-13,
        rel=2.0**-13,
        cosine=None,
        yardstick_factor=None,
        reason="fp32 keeps 24 bits, an ulp of 2^-23 at 1; a few layers of sums over hundreds of products cost some 60 "
        "ulps of values of order 1 (2^-17), sixteen times that for other shapes and seeds",
    ),
}
"""Every numerical budget of the workbook, by name."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison of one output found.

    `worst` is the index of the worst element (the first differing byte's element for identity), or None if there is
    nothing to point at; `candidate` and `oracle` are the values there.
    """

    output: str
    relation: str
    passed: bool
    detail: str
    worst: tuple[int, ...] | None = None
    candidate: float | None = None
    oracle: float | None = None
    max_abs: float | None = None
    norm: float | None = None
    yardstick_norm: float | None = None
    cosine_difference: float | None = None


def error_norm(candidate: Tensor, oracle: Tensor) -> float:
    """||candidate - oracle|| / ||oracle|| in float64 over finite elements; 0/0 counts as 0, x/0 as infinity."""
    mask = torch.isfinite(candidate) & torch.isfinite(oracle)
    oracle64 = oracle.to(torch.float64)[mask]
    difference = (candidate.to(torch.float64)[mask] - oracle64).norm().item()
    scale = oracle64.norm().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _at(tensor: Tensor, index: tuple[int, ...]) -> float:
    return float(tensor[index].item())


def identical(output: str, candidate: Tensor, oracle: Tensor, *, relation: str = "bit") -> Comparison:
    """Compare dtype, shape, stride and bytes (``relation="bit"``) or dtype, shape and integers (``"exact"``).

    NaNs are compared as bytes: the same NaN is identical, a different one is not.
    """
    for name, got, want in (
        ("dtype", candidate.dtype, oracle.dtype),
        ("shape", tuple(candidate.shape), tuple(oracle.shape)),
    ):
        if got != want:
            return Comparison(output, relation, False, f"{output}: {name} {got}, expected {want}")
    if relation == "bit" and candidate.stride() != oracle.stride():
        return Comparison(output, relation, False, f"{output}: stride {candidate.stride()}, expected {oracle.stride()}")
    if candidate.numel() == 0:
        return Comparison(output, relation, True, f"{output}: empty, equal")
    size = candidate.element_size()
    ours = candidate.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size)
    theirs = oracle.to(candidate.device).contiguous().reshape(-1).view(torch.uint8).reshape(-1, size)
    differs = (ours != theirs).any(dim=1)
    count = int(differs.sum())
    if count == 0:
        return Comparison(output, relation, True, f"{output}: {candidate.numel()} elements equal")
    where = _unravel(int(differs.to(torch.uint8).argmax()), candidate.shape)
    return Comparison(
        output,
        relation,
        False,
        f"{output}: {count} of {candidate.numel()} elements differ, first at {where}: "
        f"{_at(candidate, where):.9g}, expected {_at(oracle, where):.9g}",
        worst=where,
        candidate=_at(candidate, where),
        oracle=_at(oracle, where),
    )


def close(
    output: str, candidate: Tensor, oracle: Tensor, tolerance: Tolerance, yardstick: Tensor | None = None
) -> Comparison:
    """Compare within a budget.

    Args:
        output: the output's name, for messages.
        candidate: what the kernel wrote.
        oracle: float32 or float64 reference on the same quantised inputs.
        tolerance: the budget.
        yardstick: the straightforward implementation's result; required if the tolerance has a yardstick factor.

    Raises:
        ValueError: the budget needs a yardstick and none came.
    """
    if tolerance.yardstick_factor is not None and yardstick is None:
        raise ValueError(f"yardstick: missing for {output}, expected the straightforward implementation's result")
    if candidate.shape != oracle.shape:
        detail = f"{output}: shape {tuple(candidate.shape)}, expected {tuple(oracle.shape)}"
        return Comparison(output, "budget", False, detail)
    if yardstick is not None and candidate.dtype != yardstick.dtype:
        detail = f"{output}: dtype {candidate.dtype}, expected {yardstick.dtype}"
        return Comparison(output, "budget", False, detail)
    if candidate.numel() == 0:
        return Comparison(output, "budget", True, f"{output}: empty", max_abs=0.0, norm=0.0)
    ours = candidate.to(device=oracle.device, dtype=torch.float64)
    theirs = oracle.to(torch.float64)

    nan_or_inf = _mask_mismatch(ours, theirs)
    if nan_or_inf is not None:
        kind, count, where = nan_or_inf
        return Comparison(
            output,
            "budget",
            False,
            f"{output}: {kind} masks differ at {count} elements, first {where}: "
            f"{_at(ours, where):.6g}, expected {_at(theirs, where):.6g}",
            worst=where,
            candidate=_at(ours, where),
            oracle=_at(theirs, where),
        )

    finite = torch.isfinite(theirs)
    error = torch.where(finite, (ours - theirs).abs(), torch.zeros_like(ours))
    allowed = torch.maximum(torch.full_like(theirs, tolerance.abs), tolerance.rel * theirs.abs())
    excess = torch.where(finite, error / allowed, torch.zeros_like(error))
    where = _unravel(int(excess.argmax()), excess.shape)
    failures = []
    over = int((excess > 1.0).sum())
    if over:
        failures.append(f"{over} elements outside abs {tolerance.abs:g} / rel {tolerance.rel:.4g}")
    norm = error_norm(ours, theirs)
    yardstick_norm = None
    if tolerance.yardstick_factor is not None and yardstick is not None:
        yardstick_norm = error_norm(yardstick.to(oracle.device), theirs)
        if norm > tolerance.yardstick_factor * yardstick_norm:
            failures.append(f"error norm {norm:.3g} over {tolerance.yardstick_factor:g} x {yardstick_norm:.3g}")
    cosine = _cosine_difference(ours, theirs, finite)
    if tolerance.cosine is not None and cosine > tolerance.cosine:
        failures.append(f"cosine difference {cosine:.3g} over {tolerance.cosine:g}")
    verdict = "; ".join(failures) if failures else f"error norm {norm:.3g}"
    return Comparison(
        output,
        "budget",
        not failures,
        f"{output}: {verdict}; worst {excess[where].item():.3g} of its bound at {where}: "
        f"{_at(ours, where):.6g}, expected {_at(theirs, where):.6g}",
        worst=where,
        candidate=_at(ours, where),
        oracle=_at(theirs, where),
        max_abs=float(error.max()),
        norm=norm,
        yardstick_norm=yardstick_norm,
        cosine_difference=cosine,
    )


def _mask_mismatch(ours: Tensor, theirs: Tensor) -> tuple[str, int, tuple[int, ...]] | None:
    masks = (
        ("NaN", torch.isnan(ours) != torch.isnan(theirs)),
        ("+inf", torch.isposinf(ours) != torch.isposinf(theirs)),
        ("-inf", torch.isneginf(ours) != torch.isneginf(theirs)),
    )
    for kind, mismatch in masks:
        count = int(mismatch.sum())
        if count:
            return kind, count, _unravel(int(mismatch.to(torch.uint8).argmax()), ours.shape)
    return None


def _cosine_difference(ours: Tensor, theirs: Tensor, finite: Tensor) -> float:
    """1 - cos, from the difference of the normalised vectors, which keeps precision near zero."""
    a, b = ours[finite], theirs[finite]
    norm_a, norm_b = a.norm(), b.norm()
    if norm_a == 0 or norm_b == 0:
        return 0.0 if norm_a == norm_b else 1.0
    return float(((a / norm_a - b / norm_b).norm() ** 2 / 2).item())
