"""Routed experts by gathered weights: every (token, expert) pair reads its expert's matrices, wherever they are stored.

The reference asks the host which experts a batch needs. A captured step cannot, and does not have to: a pair's three
matrices are gathered by number and dequantised, whatever the number. That reads an expert's weights once per pair, not
once per batch, so it is a form for small batches; a grouped GEMM takes its place behind the same signature.

A token's experts are added in the order of their numbers, as the reference adds them.

Reference: `dsv4ref.ref.experts.routed_experts_ref`.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dsv4ref.formats import mxfp4, ue8m0
from dsv4ref.ref.experts import clamped_swiglu_ref
from dsv4ref.ref.model import Model
from dsv4ref.ref.weights import block_name

__all__ = ["GATHER_BYTES", "GatheredExperts"]

GATHER_BYTES = 2**28
"""Dequantised weights of one matrix that are held at once; more pairs than that holds are computed piece by piece."""

_MATRICES = ("w1", "w2", "w3")


@dataclass(frozen=True, eq=False)
class _Stacked:
    """One matrix of all experts of a layer.

    Args:
        stored: floating ``[E, out, in]``, or MXFP4 bytes ``[E, out, in / 2]``.
        scales: of MXFP4 bytes, UE8M0 ``[E, out, in / 32]``.
        values: fp32 ``[16]``, what an MXFP4 code stands for.
        sources: the tensors that it was made from: while it lives, nothing else has their identities.
    """

    stored: Tensor
    scales: Tensor | None
    values: Tensor
    sources: tuple[Tensor, ...]

    def gather(self, experts: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n, out, in]`` of experts int64 ``[n]``."""
        chosen = self.stored[experts]
        if self.scales is None:
            return chosen.to(dtype)
        numbers = self.values[mxfp4.unpack(chosen).to(torch.int64)].unflatten(-1, (-1, mxfp4.BLOCK))
        return (numbers * ue8m0.decode(self.scales[experts])[..., None]).flatten(-2).to(dtype)


# As `dsv4ref.serving.grouped_experts` shares its stacks: by identity and version (H31).
_STACKS: WeakValueDictionary[tuple[object, ...], _Stacked] = WeakValueDictionary()


class GatheredExperts:
    """The routed experts of every layer, stacked.

    Args:
        model: its expert weights are copied to the device now, or shared with whoever copied the same tensors before;
            later changes are not seen. MXFP4 and floating weights stay as they are stored, FP8 ones are dequantised.
        device: where.
        gather_bytes: as `GATHER_BYTES`.

    Raises:
        ValueError: not even one pair's matrix fits ``gather_bytes``.
    """

    def __init__(self, model: Model, device: torch.device | str, gather_bytes: int = GATHER_BYTES) -> None:
        config = model.config
        pair = config.moe_inter_dim * config.hidden_size * model.numerics.dtype.itemsize
        if gather_bytes < pair:
            raise ValueError(f"gather_bytes: got {gather_bytes}, expected at least {pair}, one dequantised matrix")
        self.pairs = gather_bytes // pair
        self._config, self._numerics = config, model.numerics
        self._values = mxfp4.decode(torch.arange(16, dtype=torch.uint8)).to(device)
        self._layers = [
            {name: self._stacked(model, layer, name, torch.device(device)) for name in _MATRICES}
            for layer in range(config.n_layers)
        ]

    def _stacked(self, model: Model, layer: int, name: str, device: torch.device) -> _Stacked:
        parts = model.weights.at(block_name(self._config, layer)).at("ffn").at("experts")
        experts = [parts.at(str(number)) for number in range(self._config.router.n_experts)]
        floating = experts[0].raw(f"{name}.weight").dtype.itemsize > 1
        kinds = ("weight",) if floating else ("weight", "scale")
        sources = tuple(expert.raw(f"{name}.{kind}") for expert in experts for kind in kinds)
        key = (device, self._numerics.dtype, *((id(tensor), tensor._version) for tensor in sources))
        if (known := _STACKS.get(key)) is not None:
            return known
        scales = None
        if experts[0].raw(f"{name}.weight").dtype in (torch.int8, torch.uint8):
            stored = [expert.raw(f"{name}.weight").view(torch.uint8) for expert in experts]
            scales = torch.stack([expert.raw(f"{name}.scale").view(torch.uint8) for expert in experts]).to(device)
        else:
            stored = [expert.raw(f"{name}.weight") if floating else expert.matrix(name) for expert in experts]
        stacked = _Stacked(torch.stack(stored).to(device), scales, self._values, sources)
        _STACKS[key] = stacked
        return stacked

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked weights."""
        stacked = [matrix for layer in self._layers for matrix in layer.values()]
        return sum(m.stored.nbytes + (0 if m.scales is None else m.scales.nbytes) for m in stacked)

    def __call__(self, x: Tensor, route_weights: Tensor, experts: Tensor, layer: int) -> Tensor:
        """Sum over every token's experts; device work only, safe to capture.

        Args:
            x: ``[T, D]`` normed layer input.
            route_weights: ``[T, k]``.
            experts: int64 ``[T, k]``; -1 for none, which adds nothing.
            layer: whose experts.

        Returns:
            ``[T, D]``, not rounded.
        """
        top_k = experts.shape[1]
        experts, order = torch.sort(experts, dim=1)
        route_weights = route_weights.gather(1, order)
        numbers, factors = experts.flatten(), route_weights.flatten()  # [T * k]
        rows = torch.arange(numbers.shape[0], device=x.device) // top_k
        pieces = [
            self._pairs(x[rows[piece]], factors[piece], numbers[piece], layer)
            for piece in (slice(at, at + self.pairs) for at in range(0, numbers.shape[0], self.pairs))
        ]
        parts = torch.cat(pieces).unflatten(0, (-1, top_k))  # [T, k, D]
        total = torch.zeros_like(x)
        for slot in range(top_k):
            total = total + parts[:, slot]
        return total

    def _pairs(self, x: Tensor, route_weights: Tensor, experts: Tensor, layer: int) -> Tensor:
        """What each pair adds, ``[n, D]``: x ``[n, D]``, weights ``[n]``, experts ``[n]``."""
        numerics, matrices = self._numerics, self._layers[layer]
        known, weight = (experts >= 0)[:, None], route_weights[:, None]
        numbers = experts.clamp(min=0)

        def times(name: str, inputs: Tensor) -> Tensor:
            matrix = matrices[name].gather(numbers, numerics.dtype)  # [n, out, in]
            return numerics.round(torch.bmm(matrix, inputs[:, :, None])[:, :, 0])

        inputs = numerics.expert_input(x)
        hidden = clamped_swiglu_ref(times("w1", inputs), times("w3", inputs), self._config.swiglu_limit)
        if numerics.weight_before_w2:
            hidden = hidden * weight
        y = times("w2", numerics.expert_input(numerics.round(hidden)))
        return torch.where(known, y if numerics.weight_before_w2 else y * weight, 0.0)
