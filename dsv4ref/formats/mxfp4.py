"""MXFP4: e2m1 codes, two to a byte, and one UE8M0 scale per 32 values along the last dimension.

    code 0..7      0, 0.5, 1, 1.5, 2, 3, 4, 6        bit 3 of the nibble is the sign
    byte           the value with the even index in the low nibble, its right neighbour in the high nibble
    scale          e = ceil(log2(max|x| / 6)), stored as e + 127
    value          code * 2^e                        exact in bfloat16 whenever the result is a normal number

Values between two codes round to the nearest, ties to the code whose last bit is 0 (what the hardware converters do;
DeepGEMM's test helper rounds ties toward zero). The scale exponent is a ceiling, so that 6 * 2^e is never below the
block's maximum. DeepSeek-V4 stores its routed experts this way, and quantises indexer queries and keys to it.

Source: OCP Microscaling Formats (MX) v1.0; DeepSeek-V4 inference/kernel.py, ``fp4_act_quant`` (scale and its floor),
and inference/convert.py (nibble order).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dsv4ref.formats import ue8m0

__all__ = ["AMAX_FLOOR", "BLOCK", "MAX", "decode", "dequantise", "encode", "pack", "quantise", "unpack"]

BLOCK = 32
"""Values that share one scale."""
MAX = 6.0
"""Largest magnitude of a code."""
AMAX_FLOOR = MAX * 2.0**-126
"""Smallest block maximum: an all-zero block gets the scale 2^-126, the smallest normal one."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints between neighbouring codes. A tie belongs to the even code: the lower one where its number is even.
_MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(_VALUES))


def decode(codes: Tensor) -> Tensor:
    """Decode e2m1 codes, one per element.

    Args:
        codes: uint8 in 0..15, any shape.

    Returns:
        float32 of the same shape; code 8 is -0.0.

    Raises:
        TypeError, ValueError: not uint8, or a code above 15.
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}, expected torch.uint8")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: got {int(codes.max())}, expected 0 to 15")
    table = torch.tensor(_VALUES + tuple(-value for value in _VALUES), device=codes.device)
    return table[codes.to(torch.int64)]


def encode(values: Tensor) -> Tensor:
    """Round to the nearest e2m1 code, ties to even; magnitudes above 6 saturate.

    Args:
        values: any floating dtype, any shape, no NaN (e2m1 has none).

    Returns:
        uint8 codes 0..15 of the same shape.

    Raises:
        ValueError: a value is NaN.
    """
    if bool(torch.isnan(values).any()):
        raise ValueError("values: got NaN, expected numbers (e2m1 has no NaN)")
    magnitude = values.abs().to(torch.float64)
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, midpoint in enumerate(_MIDPOINTS):
        # The step from code `lower` to `lower + 1`: at the midpoint itself it is taken if `lower` is odd.
        above = (magnitude >= midpoint) if lower % 2 else (magnitude > midpoint)
        code += above.to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Two codes to a byte along the last dimension: even index in the low nibble.

    Args:
        codes: uint8 ``[..., K]`` in 0..15, K even.

    Returns:
        uint8 ``[..., K / 2]``.
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}, expected torch.uint8")
    if codes.dim() < 1 or codes.shape[-1] % 2:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}, expected an even last dimension")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: got {int(codes.max())}, expected 0 to 15")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 or int8 (checkpoints store int8) ``[..., K / 2]``.

    Returns:
        uint8 codes ``[..., K]``.
    """
    _check_packed(packed)
    # int8's right shift would copy the sign into the high nibble.
    as_bytes = packed.contiguous().view(torch.uint8)
    return torch.stack((as_bytes & 0x0F, as_bytes >> 4), dim=-1).flatten(-2)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise blocks of 32 along the last dimension.

    Args:
        x: floating ``[..., K]``, K a multiple of 32, finite.

    Returns:
        packed uint8 ``[..., K / 2]`` and scale bytes uint8 ``[..., K / 32]``.

    Raises:
        TypeError, ValueError: ``x`` is not that.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, expected a floating dtype")
    if x.dim() < 1 or x.shape[-1] % BLOCK:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a last dimension that is a multiple of {BLOCK}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: got infinities or NaN, expected finite values")
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK))  # [..., K / 32, 32]
    scales = ue8m0.scale_byte(blocks.abs().amax(dim=-1), MAX, floor=AMAX_FLOOR)  # [..., K / 32]
    codes = encode(blocks / ue8m0.decode(scales)[..., None])
    return pack(codes.flatten(-2)), scales


def dequantise(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantise`: code * 2^(byte - 127), exact wherever ``dtype`` holds the product.

    Args:
        packed: uint8 or int8 ``[..., K / 2]``.
        scales: UE8M0 bytes, uint8 ``[..., K / 32]``.
        dtype: result type. The largest scales reach beyond float32 and bfloat16, which then give an infinity.

    Returns:
        ``[..., K]`` of ``dtype``.

    Raises:
        TypeError, ValueError: the dtypes are others, or the shapes do not belong together.
    """
    _check_packed(packed)
    width = 2 * packed.shape[-1]
    wanted = (*packed.shape[:-1], width // BLOCK)
    if tuple(scales.shape) != wanted or width % BLOCK:
        raise ValueError(
            f"scales: got shape {tuple(scales.shape)} for {tuple(packed.shape)} packed bytes, "
            f"expected {wanted}, one per {BLOCK} values"
        )
    # Two significant bits times a power of two: float32 rounds no product, down to 0.5 * 2^-127. From 2^128 on it
    # overflows, as bfloat16 does.
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8)
    pairs = decode(unpack(every_byte[:, None])).to(exact)  # [256, 2]
    codes = packed.contiguous().view(torch.uint8).flatten().to(torch.int32)
    blocks = pairs.index_select(0, codes).view(*wanted, BLOCK)  # [..., K / 32, 32]
    return blocks.mul_(ue8m0.decode(scales).to(exact)[..., None]).flatten(-2).to(dtype)


def _check_packed(packed: Tensor) -> None:
    if packed.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"packed: got {packed.dtype}, expected torch.uint8 or torch.int8")
    if packed.dim() < 1:
        raise ValueError("packed: got a scalar, expected at least one dimension")
