"""The paged 584-byte FP8 KV cache of DeepSeek-V4 ("fp8_ds_mla", FlashMLA's MODEL1).

A block of ``bs`` entries is planar, not one record after another::

    byte i*576 + [0, 448)        entry i: 448 e4m3 codes, dims 0..447 ("nope")
    byte i*576 + [448, 576)      entry i: 64 bf16 little-endian, dims 448..511 (already rotated, "rope")
    byte bs*576 + i*8 + [0, 7)   entry i: 7 UE8M0 bytes, byte b scales dims 64b..64b+63
    byte bs*576 + i*8 + 7        pad, written 0, never read
    up to the block stride       padding to a multiple of 576

The tensor handed around is uint8 ``[num_blocks, bs, 584]`` with strides ``(block_stride, 584, 1)``; the 584 is a *size*
convention: ``data[b, i]`` is not entry i. Slot id = block * bs + i.

Source: FlashMLA tests/quant.py and api/sparse_decode.h, vLLM cache_utils.py (layout facts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.formats import fp8, ue8m0
from dsv4ref.formats.fp8 import Dialect

__all__ = [
    "ENTRY_BYTES",
    "HEAD_DIM",
    "NOPE_DIM",
    "ROPE_DIM",
    "ROW_BYTES",
    "SCALE_BLOCK",
    "SCALE_SLOTS",
    "KVCache",
    "allocate",
    "block_stride",
    "dequantise",
    "gather",
    "insert",
    "quantise",
]

NOPE_DIM = 448
ROPE_DIM = 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
SCALE_BLOCK = 64
SCALE_COUNT = NOPE_DIM // SCALE_BLOCK
SCALE_SLOTS = 8
"""Scale bytes stored per entry: seven that count and one pad."""
ROW_BYTES = NOPE_DIM + 2 * ROPE_DIM
"""Bytes of one entry's data part; also what block strides are a multiple of."""
ENTRY_BYTES = ROW_BYTES + SCALE_SLOTS


def block_stride(block_size: int) -> int:
    """Bytes from one block to the next: ``block_size * 584`` rounded up to a multiple of 576.

    Raises:
        ValueError: ``block_size`` is not a positive integer.
    """
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: got {block_size!r}, expected a positive integer")
    return -(-block_size * ENTRY_BYTES // ROW_BYTES) * ROW_BYTES


@dataclass(frozen=True)
class KVCache:
    """A paged cache and the dialect its codes are written in.

    Args:
        data: uint8 ``[num_blocks, bs, 584]``, strides ``(block stride, 584, 1)``, block stride a multiple of 576,
            data pointer 16-byte aligned.
        dialect: which e4m3 the nope codes are in.

    Raises:
        TypeError, ValueError: the tensor is not that; the message names what came and what was expected.
    """

    data: Tensor
    dialect: Dialect

    def __post_init__(self) -> None:
        object.__setattr__(self, "dialect", Dialect.of(self.dialect))
        if not isinstance(self.data, Tensor):
            raise TypeError(f"data: got {type(self.data).__name__}, expected a torch.Tensor")
        if self.data.dtype is not torch.uint8:
            raise TypeError(f"data: got {self.data.dtype}, expected torch.uint8")
        if self.data.dim() != 3 or self.data.shape[2] != ENTRY_BYTES:
            raise ValueError(f"data: got shape {tuple(self.data.shape)}, expected [num_blocks, bs, {ENTRY_BYTES}]")
        if self.data.shape[1] < 1:
            raise ValueError(f"data: got block size {self.data.shape[1]}, expected at least 1")
        stride = self.data.stride()
        least = self.block_size * ENTRY_BYTES
        if stride[1:] != (ENTRY_BYTES, 1) or stride[0] % ROW_BYTES or stride[0] < least:
            raise ValueError(
                f"data: got strides {stride}, expected (a multiple of {ROW_BYTES} >= {least}, {ENTRY_BYTES}, 1)"
            )
        if self.data.data_ptr() % 16:
            raise ValueError(f"data: data pointer is {self.data.data_ptr() % 16} bytes off a 16-byte boundary")

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        return int(self.data.shape[0])

    @property
    def block_size(self) -> int:
        """Entries per block."""
        return int(self.data.shape[1])

    @property
    def block_stride(self) -> int:
        """Bytes from one block to the next."""
        return int(self.data.stride(0))

    @property
    def rows(self) -> int:
        """Entries in the cache; valid slots are ``0 <= slot < rows``."""
        return self.num_blocks * self.block_size

    @property
    def entry_rows(self) -> Tensor:
        """uint8 view ``[num_blocks, bs, 576]`` of the data parts: codes, then rope bytes."""
        return self.data.as_strided((self.num_blocks, self.block_size, ROW_BYTES), (self.block_stride, ROW_BYTES, 1))

    @property
    def entry_scales(self) -> Tensor:
        """uint8 view ``[num_blocks, bs, 8]`` of the scale bytes."""
        return self.data.as_strided(
            (self.num_blocks, self.block_size, SCALE_SLOTS),
            (self.block_stride, SCALE_SLOTS, 1),
            self.data.storage_offset() + self.block_size * ROW_BYTES,
        )


def allocate(
    num_blocks: int,
    block_size: int,
    dialect: Dialect | str,
    *,
    device: torch.device | str = "cpu",
    stride: int | None = None,
    fill: int = 0,
) -> KVCache:
    """Allocate a cache.

    Args:
        num_blocks: blocks, at least 0.
        block_size: entries per block (production: 64 for SWA and C4, 2 for C128, in 256-token pages).
        dialect: which e4m3 will be written.
        device: where.
        stride: bytes from block to block; default `block_stride` (block_size).
        fill: the byte every address starts with (0xFF poisons: NaN codes, NaN scales, NaN rope).

    Returns:
        KVCache; raises ValueError on sizes that cannot be.
    """
    if not isinstance(num_blocks, int) or num_blocks < 0:
        raise ValueError(f"num_blocks: got {num_blocks!r}, expected a non-negative integer")
    least = block_stride(block_size)
    stride = least if stride is None else stride
    if stride < least or stride % ROW_BYTES:
        raise ValueError(f"stride: got {stride}, expected a multiple of {ROW_BYTES} >= {least}")
    if not 0 <= fill <= 255:
        raise ValueError(f"fill: got {fill}, expected a byte, 0 to 255")
    flat = torch.full((num_blocks * stride,), fill, dtype=torch.uint8, device=device)
    data = flat.as_strided((num_blocks, block_size, ENTRY_BYTES), (stride, ENTRY_BYTES, 1))
    return KVCache(data, Dialect.of(dialect))


def quantise(kv: Tensor, dialect: Dialect | str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise KV vectors the way the cache writers do: round to bf16, then one UE8M0 scale per 64 nope dims.

    Args:
        kv: ``[N, 512]``, any floating dtype; rope dims already rotated.
        dialect: which e4m3 to write.

    Returns:
        codes uint8 ``[N, 448]``, scale bytes uint8 ``[N, 7]``, rope bf16 ``[N, 64]``.

    Raises:
        ValueError: ``kv`` is not ``[N, 512]`` floating.
    """
    dialect = Dialect.of(dialect)
    if kv.dim() != 2 or kv.shape[1] != HEAD_DIM or not kv.is_floating_point():
        raise ValueError(f"kv: got {kv.dtype} {tuple(kv.shape)}, expected floating [N, {HEAD_DIM}]")
    rounded = kv.to(torch.bfloat16)
    blocks = rounded[:, :NOPE_DIM].to(torch.float32).reshape(-1, SCALE_COUNT, SCALE_BLOCK)
    scales = ue8m0.scale_byte(blocks.abs().amax(dim=-1), dialect.writer_max)
    scaled = blocks / ue8m0.decode(scales)[..., None]
    # The exponent is a ceiling, so the clamp only catches rounding of the ratio one ulp below a power of two.
    codes = fp8.encode(scaled.clamp(-dialect.writer_max, dialect.writer_max), dialect)
    return codes.reshape(-1, NOPE_DIM), scales, rounded[:, NOPE_DIM:].contiguous()


def dequantise(
    codes: Tensor, scales: Tensor, rope: Tensor, dialect: Dialect | str, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Inverse of `quantise`: code * 2^(byte - 127), exact in bfloat16 whenever the result is a normal number.

    Args:
        codes: uint8 ``[N, 448]``.
        scales: uint8 ``[N, 7]``.
        rope: bf16 ``[N, 64]``.
        dialect: which e4m3 the codes are in.
        dtype: result type.

    Returns:
        ``[N, 512]`` of ``dtype``.
    """
    for name, part, columns in (("codes", codes, NOPE_DIM), ("scales", scales, SCALE_COUNT), ("rope", rope, ROPE_DIM)):
        if part.shape != (codes.shape[0], columns):
            raise ValueError(f"{name}: got shape {tuple(part.shape)}, expected {(codes.shape[0], columns)}")
    values = fp8.decode(codes, Dialect.of(dialect), torch.float64).reshape(-1, SCALE_COUNT, SCALE_BLOCK)
    nope = (values * ue8m0.decode(scales).to(torch.float64)[..., None]).reshape(-1, NOPE_DIM)
    return torch.cat([nope.to(dtype), rope.to(dtype)], dim=1)


def _locate(cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots: got {type(slots).__name__}, expected int32 or int64 [N]")
    if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1:
        raise TypeError(f"slots: got {slots.dtype} {tuple(slots.shape)}, expected int32 or int64 [N]")
    slots = slots.to(torch.int64)
    outside = (slots < 0) | (slots >= cache.rows)
    if bool(outside.any()):
        raise ValueError(f"slots: {int(slots[outside][0])} is outside 0..{cache.rows - 1}")
    return slots // cache.block_size, slots % cache.block_size


def insert(cache: KVCache, slots: Tensor, kv: Tensor) -> None:
    """Quantise ``kv`` and write it into the cache, in place.

    Args:
        cache: where.
        slots: int32 or int64 ``[N]``, distinct, each in ``0..rows-1``.
        kv: ``[N, 512]`` floating.

    Raises:
        ValueError, TypeError: wrong shapes or a slot outside the cache.
    """
    block, position = _locate(cache, slots)
    if kv.dim() != 2:
        raise ValueError(f"kv: got shape {tuple(kv.shape)}, expected [N, {HEAD_DIM}]")
    if kv.shape[0] != slots.shape[0]:
        raise ValueError(f"kv: got {kv.shape[0]} rows for {slots.shape[0]} slots, expected one row per slot")
    codes, scales, rope = quantise(kv, cache.dialect)
    cache.entry_rows[block, position] = torch.cat([codes, rope.view(torch.uint8)], dim=1)
    pad = torch.zeros_like(scales[:, :1])
    cache.entry_scales[block, position] = torch.cat([scales, pad], dim=1)


def gather(cache: KVCache, slots: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Read and dequantise entries.

    Args:
        cache: where.
        slots: int32 or int64 ``[N]``, each in ``0..rows-1``; duplicates allowed.
        dtype: result type.

    Returns:
        ``[N, 512]`` of ``dtype``.

    Raises:
        ValueError, TypeError: wrong dtype or a slot outside the cache.
    """
    block, position = _locate(cache, slots)
    rows = cache.entry_rows[block, position]
    scales = cache.entry_scales[block, position][:, :SCALE_COUNT]
    rope = rows[:, NOPE_DIM:].contiguous().view(torch.bfloat16)
    return dequantise(rows[:, :NOPE_DIM].contiguous(), scales.contiguous(), rope, cache.dialect, dtype)
