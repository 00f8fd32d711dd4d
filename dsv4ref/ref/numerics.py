"""What the reference rounds and quantises, as switches, so that structure and number formats can be tested apart.

Arithmetic is done in ``Numerics.dtype`` throughout. ``STRUCTURE`` switches every format off: what is left is the
function that the architecture defines, and what other implementations are compared with. ``DEEPSEEK`` makes every
rounding of DeepSeek's code that has a switch. ``DEFAULT`` lies between them: the stored formats, and none of the four
roundings that public implementations disagree about. The book's page on ambiguities says who does what.

Source: DeepSeek-V4 inference/kernel.py, ``act_quant`` and ``fp4_act_quant`` (in-place quantise-dequantise).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from dsv4ref.formats import fp8, mxfp4, ue8m0
from dsv4ref.formats.fp8 import Dialect

__all__ = ["DEEPSEEK", "DEFAULT", "STRUCTURE", "Numerics", "bf16_round_trip", "fp4_round_trip", "fp8_round_trip"]


GEMM_BLOCK = 128
"""Activations that share one scale where a GEMM reads FP8 inputs."""

_CHOICES = {
    "dtype": (torch.float32, torch.float64),
    "quantise_kv": ("none", "fp8"),
    "quantise_index": ("none", "fp4", "fp8"),
    "quantise_linear_inputs": ("none", "fp8"),
    "quantise_expert_inputs": ("none", "fp8"),
}


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Which roundings a forward pass makes.

    Args:
        dtype: arithmetic type, float32 or float64. RoPE angles are float32 in both: they are part of the model.
        round_bf16: round activations to bfloat16 where DeepSeek's code stores bfloat16 tensors (outputs of linears,
            norms and rotations, residual streams, attention outputs). Probabilities inside attention, the indexer's
            scores and scale, and everything from router logits to router weights stay unrounded.
        quantise_kv: ``"fp8"`` passes the first head_dim - 64 dimensions of keys through FP8 with one UE8M0 scale per 64
            and rounds the rotary ones to bfloat16; the quantisation does round (an early DeepSeek revision did not).
        kv_dialect: the e4m3 dialect of ``quantise_kv``; FNUZ is scaled under 224.
        quantise_index: format of indexer queries and keys. ``"fp4"``: per 32, DeepSeek's. ``"fp8"``: per 128, vLLM's.
            Scores are unrounded in every case (DeepSeek: bfloat16). There is no dialect to choose: under 448 and 224
            the two hold the same values.
        hadamard: rotate indexer queries AND keys before quantising. Without quantisation it changes nothing.
        quantise_linear_inputs: ``"fp8"``: per 128, on the inputs of linears whose weights are stored in FP8 (DeepSeek),
            but for ``wo_a``, which reads bfloat16.
        quantise_expert_inputs: the same for routed experts (DeepSeek); ``"none"`` is the bf16-activation path of Triton
            kernels.
        weight_before_w2: multiply the router weight into the expert's activation, before ``w2`` (DeepSeek), not after.
        clamp_shared: the shared expert clamps like routed experts (an early DeepSeek revision did not).
        yarn_on_swa: YaRN-scale layers without compression too; a bug of one vLLM fork, never right.
        q_norm_bf16: round every step of the per-head query norm to bfloat16 (DeepSeek), not only its result.
        round_pooled: round pooled compressor rows to bfloat16 before their norm (DeepSeek).
        mask_mtp_position_0: the MTP block sees a zero embedding at position 0 (vLLM).

    Raises:
        ValueError: a field has another value than those named above.
    """

    dtype: torch.dtype = torch.float32
    round_bf16: bool = True
    quantise_kv: Literal["none", "fp8"] = "fp8"
    kv_dialect: Dialect = Dialect.FN
    quantise_index: Literal["none", "fp4", "fp8"] = "fp4"
    hadamard: bool = True
    quantise_linear_inputs: Literal["none", "fp8"] = "none"
    quantise_expert_inputs: Literal["none", "fp8"] = "none"
    weight_before_w2: bool = True
    clamp_shared: bool = True
    yarn_on_swa: bool = False
    q_norm_bf16: bool = False
    round_pooled: bool = False
    mask_mtp_position_0: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_dialect", Dialect.of(self.kv_dialect, argument="kv_dialect"))
        for item in fields(self):
            value = getattr(self, item.name)
            accepted = _CHOICES.get(item.name)
            if accepted is not None and value not in accepted:
                raise ValueError(f"{item.name}: got {value!r}, expected one of {list(accepted)}")
            if item.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{item.name}: got {value!r}, expected True or False")

    def round(self, x: Tensor) -> Tensor:
        """``x`` in ``dtype``, through bfloat16 if ``round_bf16``: where DeepSeek's code holds a bfloat16 tensor."""
        return bf16_round_trip(x).to(self.dtype) if self.round_bf16 else x.to(self.dtype)

    def linear_input(self, x: Tensor) -> Tensor:
        """``x`` as a linear with FP8 weights reads it: ``[..., K]``."""
        return fp8_round_trip(x, GEMM_BLOCK) if self.quantise_linear_inputs == "fp8" else x

    def expert_input(self, x: Tensor) -> Tensor:
        """``x`` as a routed expert's matrix reads it: ``[..., K]``."""
        return fp8_round_trip(x, GEMM_BLOCK) if self.quantise_expert_inputs == "fp8" else x


DEFAULT = Numerics()
"""bf16 activations, FP8 keys and FP4 indexer vectors; four of DeepSeek's roundings are off, see `DEEPSEEK`."""

DEEPSEEK = Numerics(quantise_linear_inputs="fp8", quantise_expert_inputs="fp8", q_norm_bf16=True, round_pooled=True)
"""Every rounding of DeepSeek's code that has a switch."""

STRUCTURE = Numerics(
    round_bf16=False, quantise_kv="none", quantise_index="none", hadamard=False, weight_before_w2=False
)
"""No format at all: the architecture in fp32."""


def bf16_round_trip(x: Tensor) -> Tensor:
    """``x`` rounded to bfloat16, in its own dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


def fp8_round_trip(x: Tensor, block: int, dialect: Dialect = Dialect.FN) -> Tensor:
    """Quantise to FP8 with one UE8M0 scale per block of the last dimension, and dequantise.

    ``e = ceil(log2(max(max|x|, 1e-4) / fp8_max))``, ``y = fp8(x / 2^e) * 2^e``. Values are rounded to bfloat16 first,
    as the cache writers and GEMM front ends do. A last block that the width does not fill is a block of its own.

    Args:
        x: floating ``[..., K]``.
        block: values under one scale (64 in the KV cache, 128 in GEMM inputs and the indexer).
        dialect: which e4m3.

    Returns:
        ``[..., K]`` of ``x``'s dtype.
    """
    parts = []
    for part in x.to(torch.bfloat16).to(torch.float32).split(block, dim=-1):
        scale_bytes = ue8m0.scale_byte(part.abs().amax(dim=-1, keepdim=True), dialect.writer_max)
        scale = ue8m0.decode(scale_bytes)
        codes = fp8.encode((part / scale).clamp(-dialect.writer_max, dialect.writer_max), dialect)
        parts.append(fp8.decode(codes, dialect, torch.float32) * scale)
    return torch.cat(parts, dim=-1).to(x.dtype)


def fp4_round_trip(x: Tensor) -> Tensor:
    """Quantise to MXFP4 (e2m1, one UE8M0 scale per 32 of the last dimension, ties to even), and dequantise.

    Args:
        x: floating ``[..., K]``, K a multiple of 32; rounded to bfloat16 first.

    Returns:
        ``[..., K]`` of ``x``'s dtype.
    """
    packed, scales = mxfp4.quantise(x.to(torch.bfloat16))
    return mxfp4.dequantise(packed, scales, x.dtype)
