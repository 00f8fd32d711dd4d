"""The two 8-bit e4m3 dialects: OCP ``e4m3fn`` and AMD's ``e4m3fnuz``.

The same byte means different numbers. For the 253 bytes that are finite and non-zero-signed in both, the fnuz value is
exactly half the OCP value; the three exceptions are 0x7F and 0xFF (OCP NaN, fnuz +-240) and 0x80 (OCP -0, fnuz NaN).
gfx942's matrix cores and converters speak fnuz, gfx950 and sm_90 speak OCP. A reader must therefore be *told* which
dialect a cache holds: this package makes the dialect an attribute of every cache and never infers it from the platform.

Source: OCP 8-bit Floating Point Specification (OFP8) rev. 1.0; LLVM APFloat ``Float8E4M3FNUZ``.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

__all__ = ["Dialect", "decode", "encode", "from_fn_to_fnuz"]


class Dialect(enum.StrEnum):
    """Which e4m3 a byte is written in. The value is the torch dtype's suffix."""

    FN = "e4m3fn"
    FNUZ = "e4m3fnuz"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of this dialect."""
        return torch.float8_e4m3fn if self is Dialect.FN else torch.float8_e4m3fnuz

    @property
    def finite_max(self) -> float:
        """Largest finite value: 448 (OCP) or 240 (fnuz)."""
        return 448.0 if self is Dialect.FN else 240.0

    @property
    def writer_max(self) -> float:
        """The magnitude a block's largest element is scaled under when this dialect is written.

        448 for OCP. 224, not 240, for fnuz: then the code bytes equal the OCP-448 bytes (but for -0) and only the scale
        exponent differs by one, so that a cache converts between dialects without touching its codes.
        """
        return 448.0 if self is Dialect.FN else 224.0

    @classmethod
    def of(cls, value: object, *, argument: str = "dialect") -> Dialect:
        """Return ``value`` as a Dialect.

        Raises:
            ValueError: names the argument, what came, and the two accepted names.
        """
        if isinstance(value, str):
            try:
                return cls(value)
            except ValueError:
                pass
        raise ValueError(f"{argument}: got {value!r}, expected one of {[d.value for d in cls]}")


def decode(codes: Tensor, dialect: Dialect, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode bytes to numbers.

    Args:
        codes: uint8, any shape.
        dialect: which e4m3 the bytes are written in.
        dtype: result type; float32, float64, bfloat16 and float16 all hold every value exactly.

    Returns:
        Tensor of ``codes``' shape; NaN codes give NaN.

    Raises:
        TypeError: ``codes`` is not uint8.
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}, expected torch.uint8")
    return codes.view(Dialect.of(dialect).dtype).to(dtype)


def encode(values: Tensor, dialect: Dialect) -> Tensor:
    """Round numbers to the nearest code, ties to even; magnitudes beyond the finite maximum saturate.

    torch's own casts disagree out of range (e4m3fn saturates, e4m3fnuz is NaN from 248 up), so the clamp is explicit.

    Args:
        values: any floating dtype, any shape. NaN gives the dialect's NaN code.
        dialect: which e4m3 to write.

    Returns:
        uint8 tensor of ``values``' shape.
    """
    dialect = Dialect.of(dialect)
    clamped = values.to(torch.float32).clamp(-dialect.finite_max, dialect.finite_max)
    return clamped.to(dialect.dtype).view(torch.uint8)


def from_fn_to_fnuz(codes: Tensor) -> Tensor:
    """Re-label OCP bytes as fnuz bytes: same bits, -0 becomes +0, and the caller adds one to the scale exponent.

    Args:
        codes: uint8 OCP codes, any shape, none of them NaN.

    Returns:
        uint8 fnuz codes of the same shape whose decoded value is half the original.

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: a NaN code (0x7F or 0xFF) is present; it would silently become +-240.
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}, expected torch.uint8")
    nan = (codes & 0x7F) == 0x7F
    if bool(nan.any()):
        raise ValueError(f"codes: {int(nan.sum())} NaN bytes (0x7F/0xFF), expected finite OCP codes")
    return torch.where(codes == 0x80, torch.zeros_like(codes), codes)
