"""RMS norms: weighted (hidden states, latents) and weightless (query heads, residual streams).

    y = x / sqrt(mean(x^2) + eps) * w

Statistics and the weight multiply are done in the arithmetic dtype, not in bfloat16; callers round the result.

Source: DeepSeek-V4 inference/model.py, ``RMSNorm`` and the query norm in ``Attention.forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.ref.numerics import bf16_round_trip

__all__ = ["head_norm_ref", "inverse_rms", "rms_norm_ref"]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, which stays with size 1."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: ``[..., D]``, float32 or float64.
        weight: ``[D]`` of the same dtype.
        eps: added to the mean square, 1e-6 in DeepSeek-V4.

    Returns:
        ``[..., D]``.
    """
    return x * inverse_rms(x, eps) * weight


def head_norm_ref(q: Tensor, eps: float, bf16_steps: bool = False) -> Tensor:
    """The query norm: each head over all its dimensions, nope and rope, without a weight.

    Args:
        q: ``[T, H, d]``, float32 or float64.
        eps: added to the mean square.
        bf16_steps: round square, mean, inverse root and product to bfloat16 one by one, as DeepSeek's code does on its
            bfloat16 tensor. The default keeps the statistic in ``q``'s dtype, as transformers and vLLM do.

    Returns:
        ``[T, H, d]``.
    """
    if not bf16_steps:
        return q * inverse_rms(q, eps)
    mean = bf16_round_trip(bf16_round_trip(q.square()).mean(dim=-1, keepdim=True))
    return bf16_round_trip(q * bf16_round_trip(torch.rsqrt(bf16_round_trip(mean + eps))))
