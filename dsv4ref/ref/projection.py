"""The grouped output projection ``wo_a`` and its block-scaled FP8 weight, in PyTorch.

    w[g, r, d] = code * 2^(byte - 127), one byte per 128 x 128 block of the stored [G * R, D_in] matrix
    z[t, g, r] = sum_d o[t, g, d] * w[g, r, d]

Source: DeepSeek-V4 inference/model.py (grouped output projection; converts the weight to bf16 at load).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.formats import ue8m0

__all__ = ["WEIGHT_BLOCK", "dequantise_weight_ref", "grouped_projection_ref"]

WEIGHT_BLOCK = 128
"""Rows and columns that share one scale in FP8 weights."""


def dequantise_weight_ref(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Dequantise a block-scaled FP8 matrix op by op: cast, expand the scales twice, multiply, cast.

    Exact in bfloat16: an e4m3 value has 4 significant bits and the scale is a power of two.

    Args:
        weight: e4m3fn or e4m3fnuz ``[N, K]``.
        scale: UE8M0 bytes, uint8 ``[ceil(N / 128), ceil(K / 128)]``.
        dtype: result type.

    Returns:
        ``[N, K]`` of ``dtype``.

    Raises:
        ValueError: a weight that is no matrix, or scales of another shape, too many as well as too few.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K]")
    rows, columns = weight.shape
    blocks = [-(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)]
    if list(scale.shape) != blocks:  # too large a tensor would be cut to size without a word
        raise ValueError(
            f"scale: got shape {list(scale.shape)}, expected {blocks}, one per {WEIGHT_BLOCK} x {WEIGHT_BLOCK} block "
            f"of a weight {list(weight.shape)}"
        )
    values = weight.to(torch.float32)  # [N, K]
    factors = ue8m0.decode(scale)  # [N / 128, K / 128]
    factors = factors.repeat_interleave(WEIGHT_BLOCK, dim=0)[:rows]
    factors = factors.repeat_interleave(WEIGHT_BLOCK, dim=1)[:, :columns]  # [N, K]
    return (values * factors).to(dtype)


def grouped_projection_ref(o: Tensor, weight: Tensor) -> Tensor:
    """Project each head group with its own matrix.

    Args:
        o: ``[T, G, D]`` attention output after inverse RoPE, heads of a group concatenated.
        weight: ``[G * R, D]``, rows g*R .. g*R+R-1 belonging to group g; same dtype as ``o``.

    Returns:
        z ``[T, G, R]`` of ``o``'s dtype.
    """
    _, groups, width = o.shape
    per_group = weight.view(groups, -1, width)  # [G, R, D]
    return torch.bmm(o.transpose(0, 1), per_group.transpose(1, 2)).transpose(0, 1)
