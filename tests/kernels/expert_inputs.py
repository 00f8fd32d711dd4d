"""Small MXFP4 experts, and what float64 makes of them: shared by the tests of the grouped GEMM and of the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.kernels.experts import Mxfp4Weights
from dsv4ref.ref.experts import clamped_swiglu_ref

LIMIT = 0.75
"""Below most activations of these inputs, so that a missing clamp shows."""


def quantised(experts: int, n: int, k: int, rng: torch.Generator, device: str) -> Mxfp4Weights:
    values = torch.randn((experts, n, k), generator=rng) * k**-0.5
    packed, scales = mxfp4.quantise(values)
    return Mxfp4Weights(packed.to(device), scales.to(device))


def matrices(weights: Mxfp4Weights) -> Tensor:
    """float64 ``[E, N, K]`` on the CPU."""
    return mxfp4.dequantise(weights.packed.cpu(), weights.scales.cpu(), torch.float64)


def choices(tokens: int, experts: int, top_k: int, absent: int, rng: torch.Generator) -> Tensor:
    """Distinct experts per token, int32; about ``absent`` in ``experts + absent`` of them -1."""
    rows = [torch.randperm(experts + absent, generator=rng)[:top_k] for _ in range(tokens)]
    found = torch.stack(rows) if rows else torch.zeros((0, top_k), dtype=torch.int64)
    return torch.where(found < experts, found, -1).to(torch.int32)


def hidden_of(x: Tensor, w1: Tensor, expert: int, limit: float | None) -> Tensor:
    """float64 activation of one row by one expert, w1 holding gate and up."""
    gate, up = (w1[expert] @ x.double()).chunk(2)
    return clamped_swiglu_ref(gate, up, limit)


def layer64(x: Tensor, w1: Mxfp4Weights, w2: Mxfp4Weights, weights: Tensor, experts: Tensor, limit: float) -> Tensor:
    """The routed sum in float64 ``[M, D]``, slot by slot; ids that are no expert add nothing."""
    x, weights, first, second = x.cpu(), weights.cpu(), matrices(w1), matrices(w2)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(experts.tolist()):
        for choice, expert in enumerate(row):
            if 0 <= expert < len(first):
                y = second[expert] @ hidden_of(x[token], first, expert, limit)
                total[token] += weights[token, choice].double() * y
    return total


def worst(got: Tensor, want: Tensor, bound: float) -> str:
    """The largest error above ``bound`` with its index and both values; empty if there is none."""
    error = (got.cpu().double() - want).abs().nan_to_num(nan=float("inf"))
    if error.numel() == 0 or float(error.max()) <= bound:
        return ""
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"{where}: {got[where].item()}, expected {want[where].item()} to {bound}"
