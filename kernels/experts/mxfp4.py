"""MXFP4 weights of the routed experts, and their decoding in registers.

Two e2m1 codes to a byte along K, one UE8M0 byte per 32 of them, as `dsv4ref.formats.mxfp4` lays them out. A decoded
weight has at most two significant bits, so bf16 holds it exactly wherever the result is a normal number: what a kernel
multiplies are the numbers that the checkpoint stores.

Reference: `dsv4ref.formats.mxfp4.dequantise`. Hazard: H39.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import _decode_scales

__all__ = ["Mxfp4Weights"]

_BLOCK = tl.constexpr(mxfp4.BLOCK)


@dataclass(frozen=True, eq=False)
class Mxfp4Weights:
    """One matrix per expert, quantised.

    Args:
        packed: uint8 ``[E, N, K / 2]`` contiguous, K a multiple of 32; the even column in the low nibble.
        scales: uint8 ``[E, N, K / 32]`` contiguous, UE8M0.

    Raises:
        TypeError, ValueError: other dtypes, shapes, layouts or devices. Checkpoints store int8 and float8_e8m0fnu:
            view them as uint8.
    """

    packed: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        packed, group = self.packed, mxfp4.BLOCK // 2
        checks.check_tensor("packed", packed, dtype=torch.uint8, shape=("E", "N", "K / 2"), contiguous=True)
        if packed.shape[1] < 1 or packed.shape[2] < 1 or packed.shape[2] % group:
            raise ValueError(
                f"packed: got shape {list(packed.shape)}, expected at least one row, and a multiple of {group} bytes "
                f"per row (two codes to a byte, {mxfp4.BLOCK} codes to a scale)"
            )
        shape = (*packed.shape[:2], packed.shape[2] // group)
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
        return int(self.packed.shape[1])

    @property
    def k(self) -> int:
        """The contracted dimension."""
        return 2 * int(self.packed.shape[2])

    @property
    def bytes_per_expert(self) -> int:
        """Codes and scales of one expert."""
        return self.n * (self.k // 2 + self.k // mxfp4.BLOCK)


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
