"""Chapter 12's inputs: random MXFP4 experts of one rank, a routed batch, float64 oracle and yardstick.

Codes are drawn and not quantised: any byte is a pair of codes, so that 256 experts of V4-Flash take no longer than
filling their memory. Scales are such that outputs are of order one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.config import V4_FLASH
from dsv4ref.formats import mxfp4
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import ExpertMap, Mxfp4Weights
from dsv4ref.optimizations.base import Case
from dsv4ref.ref.experts import clamped_swiglu_ref

__all__ = ["CHECKED_ROWS", "LayerInputs", "build", "in_row_units", "plain", "reference"]

_MEAN_SQUARE = float(mxfp4.decode(torch.arange(16, dtype=torch.uint8)).square().mean())

CHECKED_ROWS = 32
"""Rows of a V4-Flash batch that the oracle computes: each needs up to six experts unpacked to float64."""


@dataclass(frozen=True)
class LayerInputs:
    """One rank's part of a layer's routed experts.

    Args:
        x: bf16 ``[M, D]``.
        w1: ``[E_local, 2 I, D]``, the gate's rows, then up's, in the layout of checkpoints.
        w2: ``[E_local, D, I]``, likewise.
        experts: int32 ``[M, k]`` global ids; -1 for a slot of nobody.
        weights: fp32 ``[M, k]``; NaN where the slot is nobody's.
        placed: this rank's experts.
        limit: of the activation's clamp.
        checked: int64 ``[C]`` ascending, rows that the oracle and the yardstick compute; every row if None.
    """

    x: Tensor
    w1: Mxfp4Weights
    w2: Mxfp4Weights
    experts: Tensor
    weights: Tensor
    placed: ExpertMap
    limit: float
    checked: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """bool ``[M, k]``: slots that this rank computes, without the code under test."""
        return torch.isin(self.experts, self.placed.global_ids().to(self.experts.dtype))

    @functools.cached_property
    def exact(self) -> Tensor:
        """`reference` of these inputs, worked out once: every output of a gate is in units of its rows."""
        return reference(self)

    @functools.cached_property
    def prepared(self) -> tuple[Mxfp4Weights, Mxfp4Weights]:
        """W1 and W2 as a server holds them: in the layout that this device's kernels decode fastest, made once."""
        arch = architecture(self.x.device)
        return self.w1.prepared(arch), self.w2.prepared(arch)

    @property
    def row_size(self) -> Tensor:
        """Root mean square of each checked row that float64 gives, 1 for rows of zeros: float64 ``[C, 1]``."""
        size = self.exact.square().mean(dim=1, keepdim=True).sqrt()
        return torch.where(size > 0, size, 1.0)

    def pick(self, rows: Tensor) -> Tensor:
        """The checked ones of ``[M, ...]`` rows."""
        return rows if self.checked is None else rows[self.checked]


def build(case: Case, device: str, seed: int) -> LayerInputs:
    """Inputs of a case; the codes come from a generator on the device itself."""
    p, rng = case.params, torch.Generator(device=device).manual_seed(seed)
    placed = ExpertMap.placed(p["experts"], rank=p["ranks"] - 1, ranks=p["ranks"], device=device)
    w1 = _weights(placed.num_local, 2 * p["inner"], p["hidden"], rng)
    w2 = _weights(placed.num_local, p["hidden"], p["inner"], rng)
    rows, top_k = p["rows"], p["top_k"]
    x = torch.randn((rows, p["hidden"]), generator=rng, device=device)
    chosen = torch.rand((rows, p["experts"]), generator=rng, device=device).topk(top_k, dim=1).indices
    weights = torch.rand((rows, top_k), generator=rng, device=device) + 0.1
    weights = V4_FLASH.router.route_scale * weights / weights.sum(dim=1, keepdim=True)
    if p["content"] == "padding":  # rows of a graph beyond the batch, and single choices dropped
        nobody = torch.rand((rows, top_k), generator=rng, device=device) < 0.2
        nobody[1::3] = True
        chosen, weights = chosen.masked_fill(nobody, -1), weights.masked_fill(nobody, float("nan"))
    elif p["content"] == "one expert":
        chosen = torch.full_like(chosen, p["experts"] - 1)
    elif p["content"] == "large":  # activations far beyond the clamp
        x = 16 * x
    elif p["content"] != "plain":
        raise ValueError(f"content: got {p['content']!r}, expected 'plain', 'padding', 'one expert' or 'large'")
    return LayerInputs(
        x.to(torch.bfloat16), w1, w2, chosen.to(torch.int32).contiguous(), weights.contiguous(), placed,
        V4_FLASH.swiglu_limit, _sample(rows, p.get("checked"), seed, device),
    )  # fmt: skip


def _sample(rows: int, count: int | None, seed: int, device: str) -> Tensor | None:
    """``count`` of the rows, the first and the last among them; None for all."""
    if count is None or rows <= count:
        return None
    if count < 2:
        raise ValueError(f"checked: got {count}, expected None or at least 2, the first and the last row")
    between = 1 + torch.randperm(rows - 2, generator=torch.Generator().manual_seed(seed))[: count - 2]
    return torch.cat([torch.tensor([0]), between.sort().values, torch.tensor([rows - 1])]).to(device)


def _weights(experts: int, n: int, k: int, rng: torch.Generator) -> Mxfp4Weights:
    """Elements with a mean square of about 1 / k, under scales of three sizes."""
    exponent = round(-0.5 * math.log2(_MEAN_SQUARE * k))
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=rng, device=rng.device, dtype=torch.uint8)
    shape = (experts, n, k // mxfp4.BLOCK)
    scales = torch.randint(126 + exponent, 129 + exponent, shape, generator=rng, device=rng.device, dtype=torch.uint8)
    return Mxfp4Weights(packed, scales)


def reference(inputs: LayerInputs) -> Tensor:
    """This rank's part of the routed sum in float64, on the same quantised weights: ``[C, D]``, the checked rows."""
    return _summed(inputs, torch.float64, torch.float64)


def plain(inputs: LayerInputs) -> Tensor:
    """Plain PyTorch: bf16 matrices, each step rounded to bf16, the sum in fp32: bf16 ``[C, D]``."""
    return _summed(inputs, torch.bfloat16, torch.float32).to(torch.bfloat16)


def in_row_units(inputs: LayerInputs, out: Tensor) -> Tensor:
    """The checked rows of ``[M, D]`` over their size in float64: ``[C, D]`` float64.

    Rounding errors are relative to a row's size, which differs by ten and more between tokens.
    """
    return inputs.pick(out).to(torch.float64) / inputs.row_size


def _summed(inputs: LayerInputs, dtype: torch.dtype, total_dtype: torch.dtype) -> Tensor:
    x, experts, weights = (inputs.pick(rows) for rows in (inputs.x, inputs.experts, inputs.weights))
    total = torch.zeros(x.shape, dtype=total_dtype, device=x.device)
    x = x.to(dtype)
    for local, expert in enumerate(inputs.placed.global_ids().tolist()):
        tokens, choices = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            w1, w2 = (mxfp4.dequantise(w.packed[local], w.scales[local], dtype) for w in (inputs.w1, inputs.w2))
            gate, up = functional.linear(x[tokens], w1).chunk(2, dim=1)
            y = functional.linear(clamped_swiglu_ref(gate, up, inputs.limit), w2)
            total.index_add_(0, tokens, y.to(total_dtype) * weights[tokens, choices, None].to(total_dtype))
    return total
