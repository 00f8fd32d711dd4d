"""Routed experts by the grouped MXFP4 GEMM: an expert's weights are read once per tile of its rows (chapter 12).

The same signature as the other forms (`dsv4ref.serving.operations.Experts`), for prompts, decode rows and device steps
alike. What differs from the reference is rounding: the router's weight multiplies behind ``w2``, products are held in
bf16, and so is their sum.

Between the launches nothing is kept, so that any number of rows may come; captured, that memory is the graph's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import Mxfp4Weights, expert_layer, plan_dispatch, select_tile
from dsv4ref.ref.model import Model
from dsv4ref.ref.weights import block_name

__all__ = ["GroupedExperts"]


class GroupedExperts:
    """The routed experts of every layer, stacked for the GEMM.

    Args:
        model: its experts are stored in MXFP4; copied to the device now, later changes are not seen.
        device: where.
    """

    def __init__(self, model: Model, device: torch.device | str) -> None:
        self._config, self._arch = model.config, architecture(torch.device(device))
        self._layers = [
            (_stacked(model, layer, ("w1", "w3"), device), _stacked(model, layer, ("w2",), device))
            for layer in range(model.config.n_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked weights."""
        return sum(m.packed.nbytes + m.scales.nbytes for layer in self._layers for m in layer)

    def __call__(self, x: Tensor, route_weights: Tensor, experts: Tensor, layer: int) -> Tensor:
        """Sum over every token's experts; device work only, safe to capture.

        Args:
            x: ``[T, D]`` normed layer input, rounded to bf16.
            route_weights: ``[T, k]``.
            experts: int64 ``[T, k]``; -1 for none, which adds nothing.
            layer: whose experts.

        Returns:
            ``[T, D]`` of ``x``'s dtype, rounded to bf16.
        """
        w1, w2 = self._layers[layer]
        where, (tokens, top_k) = w1.packed.device, experts.shape
        tiles = [select_tile(self._arch, tokens, w1.num_experts, top_k, w.n, w.k) for w in (w1, w2)]
        plan = plan_dispatch(experts.to(where, torch.int32), w1.num_experts, block_m=tiles[0].block_m)
        y = expert_layer(
            x.to(where, torch.bfloat16), w1, w2, route_weights.to(where, torch.float32).contiguous(), plan,
            limit=self._config.swiglu_limit, w1_tile=tiles[0], w2_tile=tiles[1],
        )  # fmt: skip
        return y.to(x.device, x.dtype)


def _stacked(model: Model, layer: int, names: tuple[str, ...], device: torch.device | str) -> Mxfp4Weights:
    """Matrices of all experts, those of one expert below each other."""
    parts = model.weights.at(block_name(model.config, layer)).at("ffn").at("experts")
    stacked = [
        torch.stack([
            torch.cat([parts.at(str(expert)).raw(f"{name}.{kind}").view(torch.uint8) for name in names])
            for expert in range(model.config.router.n_experts)
        ])
        for kind in ("weight", "scale")
    ]  # fmt: skip
    return Mxfp4Weights(*(part.to(device) for part in stacked))
