"""What the engine may do faster than the reference: one switch per optimisation that has a kernel in this package.

Everything off is the reference model on paged caches. A part without a fast kernel (compressor, residual streams,
prefill attention) has no switch and is computed in PyTorch either way. The gathers and the two-launch decode of
chapters 09 and 11 have none either: they serve AITER's kernels, and `sparse_mla_decode` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from dsv4ref.config import C4, ModelConfig
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.ref.model import Model
from dsv4ref.ref.projection import WEIGHT_BLOCK
from dsv4ref.ref.weights import block_name

__all__ = ["Features", "available", "check_available", "unavailable"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """The switches; all off by default.

    Args:
        sparse_decode: decode rows attend through `dsv4ref.kernels.sparse_mla.sparse_mla_decode`, one launch per layer,
            with one static launch shape, into memory of its own that is then copied.
        launch_shape: that kernel's launch shape is selected by the live shape (chapter 05).
        output_passthrough: that kernel writes into the layer's output rows (chapter 06).
        cached_projection: the bf16 copy of an FP8 ``wo_a`` is made once and followed (chapter 08).
        routing_kernels: experts and weights come from one launch per layer (chapter 03).
        shrink_tail_fill: of the persistent list buffers only the tail that shrank is cleared (chapter 16).
        grouped_experts: routed experts come from the grouped MXFP4 GEMM, three launches per layer and three of the plan
            (chapter 12); without, the reference computes token by token, or a device step gathers each pair's weights.
        resident_weights: the model's matrices are dequantised once and kept where the kernels are; ``wo_a`` and routed
            experts stay as stored (`dsv4ref.serving.resident`).
        device_step: decode rows are computed without the host: state in buffers by request slot, metadata and lists
            made by launches (chapters 04 and 10; `dsv4ref.serving.device_step`). The lists that ``shrink_tail_fill``
            clears are then not in use.
        full_window_skip: rows of that step that see no more entries than top-k take them all without logits (chapter
            14).
        captured_steps: that step is captured once per batch size and replayed (chapter 10).

    Raises:
        TypeError: a switch is no bool.
        ValueError: a switch refines another one that is off.
    """

    sparse_decode: bool = field(default=False, metadata={"chapter": "decode_launch_shape"})
    launch_shape: bool = field(default=False, metadata={"chapter": "decode_launch_shape"})
    output_passthrough: bool = field(default=False, metadata={"chapter": "output_passthrough"})
    cached_projection: bool = field(default=False, metadata={"chapter": "cached_projection"})
    routing_kernels: bool = field(default=False, metadata={"chapter": "expert_routing"})
    shrink_tail_fill: bool = field(default=False, metadata={"chapter": "shrink_tail_fill"})

    grouped_experts: bool = field(default=False, metadata={"chapter": "direct_w2_reduce"})
    resident_weights: bool = field(default=False, metadata={"chapter": "cached_projection"})
    device_step: bool = field(default=False, metadata={"chapter": "static_decode_metadata"})
    full_window_skip: bool = field(default=False, metadata={"chapter": "full_window_topk"})
    captured_steps: bool = field(default=False, metadata={"chapter": "graph_clean_scratch"})

    def __post_init__(self) -> None:
        for name, value in self.switches().items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, expected True or False")
        for name, needed in _REFINES.items():
            for other in needed:
                if getattr(self, name) and not getattr(self, other):
                    raise ValueError(f"{name}: got True, expected False without {other}, which it builds on")

    def switches(self) -> Mapping[str, bool]:
        """Name -> whether it is on, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def without(self, *names: str) -> Features:
        """With these switches off, and with them whatever builds on one of them.

        Raises:
            ValueError: a name that is no switch.
        """
        for name in names:
            if name not in self.switches():
                raise ValueError(f"names: got {name!r}, expected some of {list(self.switches())}")
        off = set(names)
        for name, needed in _REFINES.items():
            if off & set(needed):
                off.add(name)
        return replace(self, **dict.fromkeys(off, False))


_REFINES: Mapping[str, tuple[str, ...]] = {
    "launch_shape": ("sparse_decode",),
    "output_passthrough": ("sparse_decode",),
    # The reference's attention and hash router read the device.
    "device_step": ("sparse_decode", "routing_kernels", "resident_weights"),
    "full_window_skip": ("device_step",),
    "captured_steps": ("device_step",),
}
"""Switch -> those without which it means nothing; a switch that builds on others comes after them."""


def unavailable(model: Model) -> Mapping[str, str]:
    """The switches that a model cannot turn on, and why: name -> reason.

    Args:
        model: its weights and formats decide.
    """
    numerics = model.numerics
    reasons: dict[str, str] = {}
    if not numerics.round_bf16:
        reason = "numerics have round_bf16=False, and the kernel's queries and outputs are bf16"
        reasons |= dict.fromkeys(("sparse_decode", "launch_shape", "output_passthrough", "cached_projection"), reason)
    elif (unfit := _unfit_projection(model)) is not None:
        reasons["cached_projection"] = unfit
    if numerics.dtype is not torch.float32:
        reasons["routing_kernels"] = f"numerics have dtype {numerics.dtype}, and the router's arithmetic is fp32"
    if (unfit := _unfit_experts(model)) is not None:
        reasons["grouped_experts"] = unfit
    if (unfit := _unfit_indexer(model.config)) is not None:
        reasons["device_step"] = unfit
    for name, needed in _REFINES.items():
        for other in needed:
            if other in reasons:
                reasons.setdefault(name, f"{other} is not available: {reasons[other]}")
    return reasons


def _unfit_experts(model: Model) -> str | None:
    """Why the grouped GEMM does not compute this model's experts."""
    numerics = model.numerics
    if not numerics.round_bf16:
        return "numerics have round_bf16=False, and the GEMM's activations are bf16"
    if numerics.quantise_expert_inputs != "none":
        return f"numerics quantise expert inputs to {numerics.quantise_expert_inputs}, and the GEMM reads bf16"
    for layer in range(model.config.n_layers):
        for expert in range(model.config.router.n_experts):
            for matrix in ("w1", "w2", "w3"):
                name = f"{block_name(model.config, layer)}.ffn.experts.{expert}.{matrix}.weight"
                if (dtype := model.tensors[name].dtype) not in (torch.int8, torch.uint8):
                    return f"{name} is stored in {dtype}, and the GEMM decodes MXFP4"
    return None


def _unfit_indexer(config: ModelConfig) -> str | None:
    """Why the indexer's kernel does not take this model."""
    if C4 not in config.main_ratios:
        return None
    for name, size in (("index_n_heads", config.index_n_heads), ("index_head_dim", config.index_head_dim)):
        if size < 16 or size & (size - 1):
            return f"{name} is {size}, and the indexer's kernel takes powers of two from 16 on"
    return None


def _unfit_projection(model: Model) -> str | None:
    """Why there is no ``wo_a`` to keep a bf16 copy of."""
    for layer in range(model.config.n_layers):
        name = f"{block_name(model.config, layer)}.attn.wo_a.weight"
        weight = model.tensors[name]
        if weight.dtype not in {dialect.dtype for dialect in Dialect}:
            return f"{name} is stored in {weight.dtype}, and only an FP8 weight is dequantised"
        if any(size % WEIGHT_BLOCK for size in weight.shape):
            return f"{name} is {list(weight.shape)}, and the kernel takes multiples of {WEIGHT_BLOCK}"
    return None


def available(model: Model) -> Features:
    """Every switch on that the model can turn on."""
    reasons = unavailable(model)
    return Features(**{item.name: item.name not in reasons for item in fields(Features)})


def check_available(model: Model, features: Features) -> None:
    """The model can turn on what is asked for.

    Raises:
        TypeError: no `Features`.
        ValueError: names the first switch that it cannot, and why.
    """
    if not isinstance(features, Features):
        raise TypeError(f"features: got {type(features).__name__}, expected a Features")
    for name, reason in unavailable(model).items():
        if getattr(features, name):
            raise ValueError(f"features: got {name}=True, expected False: {reason}")
