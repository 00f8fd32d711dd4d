"""UE8M0 scales: one byte ``b`` that stands for 2^(b - 127); 255 is NaN, 0 is 2^-127 (a float32 subnormal).

Two readings of the byte are common and wrong: ``b << 23`` taken as float32 bits turns byte 0 into 0.0, and float32
``ceil(log2(x))`` is one too low for most values one ulp above a power of two. Both are done bit-exactly here.

Source: OCP Microscaling Formats (MX) v1.0 section 5.4; DeepSeek-V4's act_quant (rounding up); hazard H18.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AMAX_FLOOR", "ceil_exponent", "decode", "scale_byte"]

AMAX_FLOOR = 1e-4
"""Smallest block maximum a KV-cache writer divides by (DeepSeek-V4's act_quant and vLLM's cache writers)."""

_BIAS = 127


def decode(scale_bytes: Tensor) -> Tensor:
    """Decode scale bytes to float32, exactly.

    Args:
        scale_bytes: uint8, any shape.

    Returns:
        float32 of the same shape: 2^(b - 127), 2^-127 for 0, NaN for 255.
    """
    if scale_bytes.dtype is not torch.uint8:
        raise TypeError(f"scale_bytes: got {scale_bytes.dtype}, expected torch.uint8")
    exponent = scale_bytes.to(torch.int32)
    bits = exponent << 23
    bits = torch.where(exponent == 0, torch.full_like(bits, 0x00400000), bits)
    bits = torch.where(exponent == 255, torch.full_like(bits, 0x7FC00000), bits)
    return bits.view(torch.float32)


def ceil_exponent(x: Tensor) -> Tensor:
    """The smallest integer e with 2^e >= x, from the float32 bits.

    Args:
        x: float32, positive and normal.

    Returns:
        int32 of the same shape.
    """
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits >> 23) & 0xFF) - _BIAS + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def scale_byte(amax: Tensor, fp8_max: float, floor: float = AMAX_FLOOR) -> Tensor:
    """The scale byte a writer stores for a block whose largest magnitude is ``amax``.

    Args:
        amax: float32 block maxima, any shape; NaN gives byte 255.
        fp8_max: the magnitude the block is scaled under (`Dialect.writer_max`).
        floor: lower bound on ``amax``, so that all-zero blocks get a finite scale.

    Returns:
        uint8 of the same shape.
    """
    ratio = amax.to(torch.float32).clamp(min=floor) * (1.0 / fp8_max)
    return (ceil_exponent(ratio) + _BIAS).clamp(0, 255).to(torch.uint8)
