"""In-register decoding of e4m3 codes and UE8M0 scales, shared by the kernels.

Each architecture converts one e4m3 dialect in hardware (gfx942: fnuz; gfx950 and sm_90: OCP); Triton refuses or
emulates the other. Moving bits gives the same numbers for either dialect everywhere, for a few integer operations.

Reference: `dsv4ref.formats.fp8.decode`, `dsv4ref.formats.ue8m0.decode`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from dsv4ref import device, kernels
from dsv4ref.formats.fp8 import Dialect

__all__ = ["architecture", "decode_mode"]


@functools.cache
def architecture(where: torch.device) -> str:
    """The architecture kernels run on for tensors of a device: "gfx942", "sm_90", ... or "cpu" (the interpreter).

    Raises:
        ValueError: a CPU device while kernels are compiled for a GPU.
    """
    if where.type != "cpu":
        return device.current(where.index).arch
    if kernels.mode() != "interpreted":
        raise ValueError(
            "device: got CPU tensors while kernels are compiled; expected GPU tensors, or TRITON_INTERPRET=1 in the "
            "environment before the first import"
        )
    return "cpu"


def decode_mode(dialect: Dialect, arch: str) -> str:
    """How `_decode_codes` reads ``dialect`` on ``arch``: "native_fn", "native_fnuz", "bits_fn" or "bits_fnuz"."""
    kind = "native" if device.native_dialect(arch) == dialect.value else "bits"
    return f"{kind}_{'fn' if dialect is Dialect.FN else 'fnuz'}"


@triton.jit
def _decode_codes(codes, MODE: tl.constexpr):
    """uint8 e4m3 codes -> bf16, exactly."""
    if MODE == "native_fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    elif MODE == "native_fnuz":
        return codes.to(tl.float8e4b8, bitcast=True).to(tl.bfloat16)
    else:
        # Exponent and mantissa land in bf16's fields; one multiply by a power of two corrects the bias and is exact,
        # subnormal codes included.
        wide = codes.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 4)
        small = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
        if MODE == "bits_fn":
            value = small * 1.329227995784916e36  # 2 ** (127 - 7)
            value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
        else:
            tl.static_assert(MODE == "bits_fnuz")
            value = small * 6.64613997892458e35  # 2 ** (127 - 8)
            value = tl.where(wide == 0x80, float("nan"), value)
        return value.to(tl.bfloat16)


@triton.jit
def _decode_scales(scale_bytes):
    """UE8M0 bytes -> bf16 powers of two; byte 0 is 2^-127 and 255 is NaN, which a plain shift gets wrong (H18)."""
    wide = scale_bytes.to(tl.int16)
    bits = wide << 7
    bits = tl.where(wide == 0, 0x0040, bits)
    bits = tl.where(wide == 255, 0x7FC0, bits)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
