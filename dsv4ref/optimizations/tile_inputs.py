"""Inputs of the expert-tile chapter: random MXFP4 experts, a routing with or without skew, oracle and yardstick.

The codes are drawn, not quantised: every byte is a pair of codes, and building 256 experts of V4-Flash takes no longer
than filling their memory. Scales are such that activations and outputs are of order one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.formats import mxfp4
from dsv4ref.kernels.experts import ExpertMap, Mxfp4Weights
from dsv4ref.optimizations.base import Case
from dsv4ref.ref.experts import clamped_swiglu_ref

__all__ = ["ExpertInputs", "build", "plain", "reference", "tile_case"]

_LIMIT = 10.0
_MEAN_SQUARE = 8.5625 * 1.75
"""Of the sixteen codes, each as likely, under scales of a half, one and two."""


@dataclass(frozen=True)
class ExpertInputs:
    """One rank's part of a layer's routed experts.

    Args:
        x: bf16 ``[M, D]``.
        w1: ``[E_local, 2 I, D]``, the gate's rows, then up's.
        w2: ``[E_local, D, I]``.
        experts: int32 ``[M, k]``, global ids.
        weights: fp32 ``[M, k]``.
        placed: this rank's experts.
        limit: of the activation's clamp.
    """

    x: Tensor
    w1: Mxfp4Weights
    w2: Mxfp4Weights
    experts: Tensor
    weights: Tensor
    placed: ExpertMap
    limit: float


def tile_case(
    name: str, *, rows: int, experts: int, ranks: int = 1, top_k: int = 2, hidden: int = 64, inner: int = 32,
    skew: float = 0.0, tiny: bool = False, measured: bool = False, about: str = "",
) -> Case:  # fmt: skip
    """A case: M rows on rank 0 of ``ranks``, which sees all of them and holds ``experts / ranks`` experts."""
    params = {
        "rows": rows,
        "experts": experts,
        "ranks": ranks,
        "top_k": top_k,
        "hidden": hidden,
        "inner": inner,
        "skew": skew,
    }
    return Case(name, params, tiny=tiny, needs_gpu=not tiny, measured=measured, about=about)


def build(case: Case, device: str, seed: int) -> ExpertInputs:
    """Inputs of a case; the experts' codes come from a generator on the device itself."""
    p, rng = case.params, torch.Generator(device=device).manual_seed(seed)
    placed = ExpertMap.placed(p["experts"], rank=0, ranks=p["ranks"], device=device)
    w1 = _weights(placed.num_local, 2 * p["inner"], p["hidden"], rng)
    w2 = _weights(placed.num_local, p["hidden"], p["inner"], rng)
    x = torch.randn((p["rows"], p["hidden"]), generator=rng, device=device).to(torch.bfloat16)
    # Popularity (r + 1) ** -skew of an expert number r in random order; Gumbel noise, the k largest win.
    order = torch.randperm(p["experts"], generator=rng, device=device)
    uniform = torch.rand((p["rows"], p["experts"]), generator=rng, device=device).clamp_min(1e-12)
    keys = -p["skew"] * torch.log1p(order.to(torch.float32)) - torch.log(-torch.log(uniform))
    chosen = keys.topk(p["top_k"], dim=1).indices.to(torch.int32)
    weights = torch.rand(chosen.shape, generator=rng, device=device) + 0.1
    weights = 1.5 * weights / weights.sum(dim=1, keepdim=True)
    return ExpertInputs(x, w1, w2, chosen.contiguous(), weights.contiguous(), placed, _LIMIT)


def _weights(experts: int, n: int, k: int, rng: torch.Generator) -> Mxfp4Weights:
    exponent = round(-0.5 * math.log2(_MEAN_SQUARE * k))
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=rng, device=rng.device, dtype=torch.uint8)
    shape = (experts, n, k // mxfp4.BLOCK)
    scales = torch.randint(126 + exponent, 129 + exponent, shape, generator=rng, device=rng.device, dtype=torch.uint8)
    return Mxfp4Weights(packed, scales)


def reference(inputs: ExpertInputs) -> Tensor:
    """This rank's part of the routed sum in float64, on the same quantised weights: ``[M, D]``."""
    return _summed(inputs, torch.float64, torch.float64)


def plain(inputs: ExpertInputs) -> Tensor:
    """Plain PyTorch: bf16 matrices, each step rounded to bf16, the sum in fp32: bf16 ``[M, D]``."""
    return _summed(inputs, torch.bfloat16, torch.float32).to(torch.bfloat16)


def _summed(inputs: ExpertInputs, dtype: torch.dtype, total_dtype: torch.dtype) -> Tensor:
    total = torch.zeros(inputs.x.shape, dtype=total_dtype, device=inputs.x.device)
    x = inputs.x.to(dtype)
    for local, expert in enumerate(inputs.placed.global_ids().tolist()):
        tokens, slots = (inputs.experts == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        w1, w2 = (mxfp4.dequantise(w.packed[local], w.scales[local], dtype) for w in (inputs.w1, inputs.w2))
        gate, up = functional.linear(x[tokens], w1).chunk(2, dim=1)
        y = functional.linear(clamped_swiglu_ref(gate, up, inputs.limit), w2)
        total.index_add_(0, tokens, y.to(total_dtype) * inputs.weights[tokens, slots, None].to(total_dtype))
    return total
