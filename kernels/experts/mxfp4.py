"""MXFP4 weights of the routed experts in two layouts, and their decoding in registers.

``checkpoint``: two e2m1 codes to a byte along K, one UE8M0 byte per 32 of them, as `dsv4ref.formats.mxfp4` lays them
out. Decoded by moving one code at a time, on any architecture.

``wgmma``: the same codes and scales in the order in which Hopper's matrix unit takes a left operand from registers,
made once when weights are loaded (`Mxfp4Weights.prepared`). Thread t of four that share a row holds, of every 16
columns, the columns 2t, 2t + 1, 2t + 8 and 2t + 9 (PTX, wgmma, "register fragments for A"). So::

    step of 128 columns      codes uint8 [N, 64], scales uint8 [N, 4]; steps follow each other: [E, K / 128, N, ...]
    row of a step            thread t reads 16 bytes at 16 t: one 32-bit word per scale group g
    word                     8 codes: column 32 g + 8 p + 2 t + h, for p in 0..3 and h in 0..1
    code in its word         at `_PLACES` of half h: where a shift by 0, 3 or 6 brings sign, exponent and mantissa to
                             bf16's bits 15, 8-7 and 6; the last four bits that are left take three shifts

A word becomes four pairs of bf16 by 11 integer operations, and four multiplications of pairs by 2^126 times the scale,
which is a bf16 number up to the scale byte `LARGEST_SCALE`. No byte is moved between threads.

A decoded weight has at most two significant bits, so bf16 holds it exactly wherever the result is a normal number: what
a kernel multiplies are the numbers that the checkpoint stores.

Reference: `dsv4ref.formats.mxfp4.dequantise`. Source of the idea to permute bits at load time: triton_kernels,
``hopper_value.py``. Hazard: H39.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import _decode_scales

__all__ = ["LARGEST_SCALE", "STEP", "Layout", "Mxfp4Weights"]

Layout = Literal["checkpoint", "wgmma"]

STEP = 128
"""Columns of a step of the layout ``wgmma``: four scale groups, so that a thread reads 16 bytes."""
LARGEST_SCALE = 128
"""Largest scale byte of the layout ``wgmma``: 2^126 * 2^(128 - 127) is bf16's largest power of two."""

_BLOCK = tl.constexpr(mxfp4.BLOCK)
_PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))
"""Bits of sign, exponent and mantissa of pair p's codes in either half of a word."""


@dataclass(frozen=True, eq=False)
class Mxfp4Weights:
    """One matrix per expert, quantised.

    Args:
        packed: uint8 contiguous. ``checkpoint``: ``[E, N, K / 2]``, K a multiple of 32; the even column in the low
            nibble. ``wgmma``: ``[E, K / 128, N, 64]``.
        scales: uint8 contiguous, UE8M0. ``checkpoint``: ``[E, N, K / 32]``. ``wgmma``: ``[E, K / 128, N, 4]``.
        layout: see the module.

    Raises:
        TypeError, ValueError: other dtypes, shapes, layouts or devices. Checkpoints store int8 and float8_e8m0fnu:
            view them as uint8.
    """

    packed: Tensor
    scales: Tensor
    layout: Layout = "checkpoint"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout: got {self.layout!r}, expected one of {list(get_args(Layout))}")
        packed, group = self.packed, mxfp4.BLOCK // 2
        if self.layout == "wgmma":
            checks.check_tensor(
                "packed", packed, dtype=torch.uint8, shape=("E", "K / 128", "N", STEP // 2), contiguous=True
            )
        else:
            checks.check_tensor("packed", packed, dtype=torch.uint8, shape=("E", "N", "K / 2"), contiguous=True)
        if 0 in packed.shape[1:] or packed.shape[-1] % group:
            raise ValueError(
                f"packed: got shape {list(packed.shape)}, expected at least one row, and a multiple of {group} bytes "
                f"per row (two codes to a byte, {mxfp4.BLOCK} codes to a scale)"
            )
        shape = (*packed.shape[:-1], packed.shape[-1] // group)
        checks.check_tensor(
            "scales", self.scales, dtype=torch.uint8, shape=shape, device=packed.device, contiguous=True
        )

    @property
    def num_experts(self) -> int:
        """E of this rank."""
        return int(self.packed.shape[0])

    @property
    def n(self) -> int:
        """Output columns of the GEMM, rows of a matrix."""
        return int(self.packed.shape[2 if self.layout == "wgmma" else 1])

    @property
    def k(self) -> int:
        """The contracted dimension."""
        return STEP * int(self.packed.shape[1]) if self.layout == "wgmma" else 2 * int(self.packed.shape[2])

    @property
    def bytes_per_expert(self) -> int:
        """Codes and scales of one expert."""
        return self.n * (self.k // 2 + self.k // mxfp4.BLOCK)

    def prepared(self, arch: str) -> Mxfp4Weights:
        """The same matrices in the layout that the kernels decode fastest on ``arch``; waits for the device.

        ``wgmma`` on sm_90, for K a multiple of 128 and scale bytes up to `LARGEST_SCALE`, which excludes 255, NaN
        (checkpoints stay far below); the layout at hand in every other case. `restored` takes it back, bit by bit.

        Args:
            arch: "sm_90" or another.

        Returns:
            a copy, one expert's matrix at a time, which needs the memory of both; or these very weights.
        """
        if arch != "sm_90" or self.layout == "wgmma" or self.k % STEP:
            return self
        if self.scales.numel() and int(self.scales.max()) > LARGEST_SCALE:
            return self
        experts, rows, steps = self.num_experts, self.n, self.k // STEP
        packed = self.packed.new_empty((experts, steps, rows, STEP // 2))
        places = _pair_places().to(packed.device)
        for source, target in zip(self.packed, packed, strict=True):
            pairs = source.view(rows, steps, 4, 4, 4).permute(1, 0, 4, 2, 3).to(torch.int64)  # [step, N, t, g, p]
            words = torch.zeros(pairs.shape[:-1], dtype=torch.int32, device=pairs.device)
            for p in range(4):
                words |= places[p][pairs[..., p]]
            target.copy_(words.flatten(2).view(torch.uint8))
        scales = self.scales.view(experts, rows, steps, 4).transpose(1, 2).contiguous()
        return Mxfp4Weights(packed, scales, "wgmma")

    def restored(self) -> Mxfp4Weights:
        """The same matrices in the layout of checkpoints: the inverse of `prepared`."""
        if self.layout == "checkpoint":
            return self
        experts, steps, rows, _ = self.packed.shape
        packed = self.packed.new_empty((experts, rows, self.k // 2))
        for source, target in zip(self.packed, packed, strict=True):
            words = source.view(torch.int32).view(steps, rows, 4, 4)  # t, g
            pairs = torch.stack([_pair_of(words, p) for p in range(4)], dim=-1)
            target.copy_(pairs.permute(1, 0, 3, 4, 2).reshape(rows, self.k // 2))
        return Mxfp4Weights(packed, self.scales.transpose(1, 2).reshape(experts, rows, -1).contiguous())


def _pair_places() -> Tensor:
    """int32 ``[4, 256]``: a byte of two codes as pair p of a word; the pairs of a word are disjoint bits."""
    byte = torch.arange(256, dtype=torch.int64)
    places = torch.zeros((4, 256), dtype=torch.int64)
    for pair, bits in enumerate(_PLACES):
        for half in range(2):
            for i, bit in enumerate(bits):
                places[pair] |= (byte >> (4 * half + 3 - i) & 1) << (bit + 16 * half)
    return places.to(torch.int32)  # bit 31 becomes the sign


def _pair_of(words: Tensor, pair: int) -> Tensor:
    """uint8, the byte of two codes that pair p of int32 words came from."""
    found = torch.zeros_like(words)
    for half in range(2):
        for i, bit in enumerate(_PLACES[pair]):
            found |= (words >> (bit + 16 * half) & 1) << (4 * half + 3 - i)
    return found.to(torch.uint8)


@triton.jit
def _decode_codes4(codes):
    """e2m1 codes 0..15, int16 -> fp32, exactly.

    Exponent and mantissa land in bf16's fields, where they read as 2^-126 times the value; codes 0 and 1 are
    subnormal on both sides.
    """
    bits = ((codes & 0x8) << 12) | ((codes & 0x7) << 6)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def _decode_tile(packed, scale_bytes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint8 ``[N, K / 2]`` and ``[N, K / 32]`` -> bf16 ``[N, K]``: code * 2^(byte - 127)."""
    GROUPS: tl.constexpr = BLOCK_K // _BLOCK
    grouped = tl.reshape(packed.to(tl.int16), (BLOCK_N, GROUPS, _BLOCK // 2))
    scale = _decode_scales(scale_bytes).to(tl.float32)[:, :, None]
    # Two multiplications: 2^126 and the scale together leave fp32's range. The cast rounds nothing.
    low = (_decode_codes4(grouped & 0xF) * scale).to(tl.bfloat16)
    high = (_decode_codes4(grouped >> 4) * scale).to(tl.bfloat16)
    return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))


@triton.jit
def _group_factor(scale_words, GROUP: tl.constexpr):
    """2^126 times scale ``GROUP`` of a word of four, as bf16 in both halves of an int32; bytes up to 128."""
    return (((scale_words >> (8 * GROUP)) & 0xFF) + 126) * 0x00800080


@triton.jit
def _decode_half(words, factors, PAIR: tl.constexpr, HALF: tl.constexpr):
    """One code of each int32 word -> bf16; what `_decode_words` does, an operation at a time."""
    half = (words >> (16 * HALF)) & 0xFFFF
    if PAIR == 3:
        bits = ((half << 1) & 0x8000) | ((half >> 5) & 0x0100) | ((half >> 4) & 0x00C0)
    else:
        bits = (half << (3 * PAIR)) & 0x81C0
    factor = (factors & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return (bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32) * factor).to(tl.bfloat16)


@triton.jit
def _decode_words(words, factors, PTX: tl.constexpr):
    """int32 words and factors of their groups -> eight bf16 tensors, pair by pair, exactly."""
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, y;
            and.b32 x, $8, 0x81C081C0;
            mul.rn.bf16x2 x, x, $9;
            mov.b32 {$0, $1}, x;
            shl.b32 x, $8, 3;
            and.b32 x, x, 0x81C081C0;
            mul.rn.bf16x2 x, x, $9;
            mov.b32 {$2, $3}, x;
            shl.b32 x, $8, 6;
            and.b32 x, x, 0x81C081C0;
            mul.rn.bf16x2 x, x, $9;
            mov.b32 {$4, $5}, x;
            shl.b32 x, $8, 1;
            and.b32 x, x, 0x80008000;
            shr.u32 y, $8, 5;
            lop3.b32 x, y, 0x01000100, x, 0xEA;
            shr.u32 y, $8, 4;
            lop3.b32 x, y, 0x00C000C0, x, 0xEA;
            mul.rn.bf16x2 x, x, $9;
            mov.b32 {$6, $7}, x;
            }
            """,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, factors],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            _decode_half(words, factors, 0, 0), _decode_half(words, factors, 0, 1),
            _decode_half(words, factors, 1, 0), _decode_half(words, factors, 1, 1),
            _decode_half(words, factors, 2, 0), _decode_half(words, factors, 2, 1),
            _decode_half(words, factors, 3, 0), _decode_half(words, factors, 3, 1),
        )  # fmt: skip


@triton.jit
def _decode_step(words, scale_words, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """A step of the layout ``wgmma``, int32 ``[N, 16]`` and ``[N, 1]`` -> bf16 ``[N, 128]`` in the order of columns.

    Joins and the permutation only name registers: the compiler finds that a thread already holds its fragment.
    """
    even = tl.join(_group_factor(scale_words, 0), _group_factor(scale_words, 2))
    odd = tl.join(_group_factor(scale_words, 1), _group_factor(scale_words, 3))
    factors = tl.reshape(tl.join(even, odd), (BLOCK_N, 1, 4))
    words = tl.reshape(words, (BLOCK_N, 4, 4))  # t, g
    a0, a1, b0, b1, c0, c1, d0, d1 = _decode_words(words, tl.broadcast_to(factors, (BLOCK_N, 4, 4)), PTX)
    low = tl.join(tl.join(a0, a1), tl.join(b0, b1))
    high = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    tile = tl.permute(tl.join(low, high), (0, 2, 5, 4, 1, 3))  # [N, t, g, h, p % 2, p / 2] -> [N, g, p, t, h]
    return tl.reshape(tile, (BLOCK_N, 128))
