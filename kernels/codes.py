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
    """How kernels read ``dialect`` on ``arch``: "packed_fn", "native_fn", "native_fnuz", "bits_fn" or "bits_fnuz"."""
    if dialect is Dialect.FN and arch == "sm_90":
        return "packed_fn"
    kind = "native" if device.native_dialect(arch) == dialect.value else "bits"
    return f"{kind}_{'fn' if dialect is Dialect.FN else 'fnuz'}"


# sm_90 converts two codes at once, to fp16, and multiplies two bf16 at once: ten instructions for four codes, and one
# for two to join the rope. Every step but the product is exact, and the product rounds once, subnormals kept (PTX
# ISA, "mul{.rnd}.bf16x2": subnormal numbers are supported), so NaN codes, NaN factors and 2^-127 come out as in fp32.
# Triton's own conversion to bf16 (3.6, 3.7) takes each fp16 of a pair through an F2F.BF16.F16 of its own.
# $2: codes; $3, $4: factors; $5, $6: rope; $7, $8: all ones where the rope is meant.
_PACKED_KEYS = tl.constexpr(
    """{
    .reg .b16 c0, c1, h0, h1, h2, h3;
    .reg .b32 low, high;
    .reg .f32 f0, f1, f2, f3;
    mov.b32 {c0, c1}, $2;
    cvt.rn.f16x2.e4m3x2 low, c0;
    cvt.rn.f16x2.e4m3x2 high, c1;
    mov.b32 {h0, h1}, low;
    mov.b32 {h2, h3}, high;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    cvt.rn.bf16x2.f32 low, f1, f0;
    cvt.rn.bf16x2.f32 high, f3, f2;
    mul.rn.bf16x2 low, low, $3;
    mul.rn.bf16x2 high, high, $4;
    lop3.b32 $0, low, $5, $7, 0xd8;
    lop3.b32 $1, high, $6, $8, 0xd8;
    }"""
)


@triton.jit
def _decode_codes(codes, MODE: tl.constexpr):
    """uint8 e4m3 codes -> bf16, exactly."""
    if MODE == "packed_fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(tl.bfloat16)
    elif MODE == "native_fn":
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


@triton.jit
def _join_keys(codes, factors, rope, is_nope, MODE: tl.constexpr):
    """Keys bf16: code times factor (bf16) where `is_nope`, the rope's value elsewhere.

    The product is exact, 4 significant bits times 2^e, but where it leaves bf16's range: there it rounds once.
    """
    if MODE == "packed_fn":
        choice = tl.broadcast_to(tl.where(is_nope, 0, -1).to(tl.int16), codes.shape)
        return tl.inline_asm_elementwise(
            _PACKED_KEYS, "=r,=r,r,r,r,r,r,r,r", [codes, factors, rope, choice], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        nope = (_decode_codes(codes, MODE).to(tl.float32) * factors.to(tl.float32)).to(tl.bfloat16)
        return tl.where(is_nope, nope, rope)
