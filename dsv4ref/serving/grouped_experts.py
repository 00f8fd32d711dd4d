"""Routed experts by the grouped MXFP4 GEMM: an expert's weights are read once per tile of its rows (chapter 12).

The same signature as the other forms (`dsv4ref.serving.operations.Experts`), for prompts, decode rows and device steps
alike. What differs from the reference is rounding: the router's weight multiplies behind ``w2``, products are held in
bf16, and so is their sum.

Between the launches nothing is kept, so that any number of rows may come; captured, that memory is the graph's.

Stacking copies: three layers of V4-Flash are 9.6 GiB. Engines that stand side by side, as on a ladder, share the stacks
of a model's unchanged tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

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
        model: its experts are stored in MXFP4; copied to the device now, or shared with whoever copied the same tensors
            before; later changes are not seen.
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
        """Bytes of the stacked weights, shared ones included."""
        return sum(m.matrices.packed.nbytes + m.matrices.scales.nbytes for layer in self._layers for m in layer)

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
        w1, w2 = (stack.matrices for stack in self._layers[layer])
        where, (tokens, top_k) = w1.packed.device, experts.shape
        tiles = [select_tile(self._arch, tokens, w1.num_experts, top_k, w.n, w.k) for w in (w1, w2)]
        plan = plan_dispatch(experts.to(where, torch.int32), w1.num_experts, block_m=tiles[0].block_m)
        y = expert_layer(
            x.to(where, torch.bfloat16), w1, w2, route_weights.to(where, torch.float32).contiguous(), plan,
            limit=self._config.swiglu_limit, w1_tile=tiles[0], w2_tile=tiles[1],
        )  # fmt: skip
        return y.to(x.device, x.dtype)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Matrices of all experts of a layer, and the tensors that they were copied from."""

    matrices: Mxfp4Weights
    sources: tuple[Tensor, ...]


# Tensors by identity and version. A stack keeps its sources, so an identity is not given to another tensor before the
# entry is gone (H31); an entry goes with the last `GroupedExperts` that has it.
_STACKS: WeakValueDictionary[tuple[object, ...], _Stack] = WeakValueDictionary()


def _stacked(model: Model, layer: int, names: tuple[str, ...], device: torch.device | str) -> _Stack:
    """Matrices of all experts, those of one expert below each other."""
    parts = model.weights.at(block_name(model.config, layer)).at("ffn").at("experts")
    stored = [
        [[parts.at(str(expert)).raw(f"{name}.{kind}") for name in names]
         for expert in range(model.config.router.n_experts)]
        for kind in ("weight", "scale")
    ]  # fmt: skip
    sources = tuple(tensor for experts in stored for tensors in experts for tensor in tensors)
    key = (torch.device(device), names, *((id(tensor), tensor._version) for tensor in sources))
    if (known := _STACKS.get(key)) is not None:
        return known
    stacks = [
        torch.stack([torch.cat([tensor.view(torch.uint8) for tensor in tensors]) for tensors in experts])
        for experts in stored
    ]
    packed, scales = (part.to(device) for part in stacks)
    stack = _Stack(Mxfp4Weights(packed, scales).prepared(architecture(torch.device(device))), sources)
    _STACKS[key] = stack
    return stack
