"""The sparse decode's online softmax over tiles whose 512 dims are held in two halves: sm_90's tiles of 64 heads.

Same keys, same arithmetic as `decode`; what differs is what the compiler makes of it for Hopper's warp group product:

* A warp decodes two half rows at a time, and its stores into the swizzled tile spread over all banks; of a whole row
  they would meet two by two in half of them.
* The lower half has codes only: nothing is selected there, and the rope goes to the upper half's columns alone.
* Each warp keeps the sums of its own columns of keys; they are added over warps once, after the last tile.
* The compiler is told that the scale is positive, so that the branch which keeps QK and PV apart costs nothing.
* One loop walks both scopes, which differ in scalars only; of two loops, the compiler spills into the second.

QK is the sum of two products, PV two products of one matrix of weights.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`. Layout: `dsv4ref.formats.kv_cache`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4ref.kernels.codes import _decode_codes, _decode_scales, _join_keys
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

__all__ = ["in_halves"]

# Layout constants as the kernels see them; equal to those of formats.kv_cache (a test holds that).
_NOPE = tl.constexpr(448)
_DIM = tl.constexpr(512)
_HALF = tl.constexpr(256)
_ROPE = tl.constexpr(64)
_SCALE_BLOCK = tl.constexpr(64)
_SCALE_SLOTS = tl.constexpr(8)
_ROW_BYTES = tl.constexpr(576)
_LOWEST = tl.constexpr(-1.0e30)
# Neighbouring columns of scores that one group of lanes holds, and warp groups that share a row's columns
_COLUMNS = tl.constexpr(8)
_WARP_GROUPS = tl.constexpr(2)

_WARP_GROUP_HEADS = 64
_PACKED = "packed_fn"


def in_halves(launch: LaunchShape, *modes: str) -> bool:
    """Whether a decode at this launch shape holds its keys in halves: warp group products of codes decoded in pairs.

    Args:
        launch: tile and warps.
        modes: how each scope's codes are read, `codes.decode_mode`.
    """
    return launch.block_h >= _WARP_GROUP_HEADS and set(modes) == {_PACKED}


# `codes._PACKED_KEYS` without the rope. $2: codes; $3, $4: factors.
_PACKED_CODES = tl.constexpr(
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
    mul.rn.bf16x2 $0, low, $3;
    mul.rn.bf16x2 $1, high, $4;
    }"""
)


@triton.jit
def _scale_codes(codes, factors, MODE: tl.constexpr):
    """Codes times factors (bf16), rounded once as `codes._join_keys` does."""
    if MODE == "packed_fn":
        return tl.inline_asm_elementwise(
            _PACKED_CODES, "=r,=r,r,r,r", [codes, factors], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return (_decode_codes(codes, MODE).to(tl.float32) * factors.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _load_half(cache, rows, words, valid, FIRST: tl.constexpr, MODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Dequantised dims ``FIRST:FIRST + 256`` of keys, bf16 [BLOCK_K, 256]; rows of invalid slots are zero."""
    dims = tl.arange(FIRST, FIRST + _HALF)[None, :]
    # Each thread shifts out the byte that its codes share. The last byte is padding, and the rope takes no factor.
    factors = _decode_scales(((words[:, None] >> (dims // _SCALE_BLOCK * 8)) & 0xFF).to(tl.uint8))
    if FIRST + _HALF <= _NOPE:
        codes = tl.load(cache + rows[:, None] + dims, mask=valid[:, None], other=0)
        keys = _scale_codes(codes, factors, MODE)
    else:
        is_nope = dims < _NOPE
        codes = tl.load(cache + rows[:, None] + dims, mask=valid[:, None] & is_nope, other=0)
        rope_row = (cache + rows + _NOPE).to(tl.pointer_type(tl.bfloat16))
        rope = tl.load(rope_row[:, None] + tl.arange(0, _ROPE)[None, :], mask=valid[:, None], other=0.0)
        rope = tl.broadcast_to(rope[:, None, :], (BLOCK_K, _HALF // _ROPE, _ROPE))
        keys = _join_keys(codes, factors, tl.reshape(rope, (BLOCK_K, _HALF)), is_nope, MODE)
    return keys


@triton.jit
def _attend_in_halves(
    query_rows,
    live,
    first,
    last,
    swa_cache,
    swa_indices,
    swa_begin,
    swa_end,
    swa_rows,
    swa_block_stride,
    extra_cache,
    extra_indices,
    extra_begin,
    extra_end,
    extra_rows,
    extra_block_stride,
    scale_log2,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The online softmax over tiles ``first:last`` of the line that both scopes' tiles make, SWA first.

    Queries are loaded from ``query_rows`` (pointers [BLOCK_H]) where `live`; a scope's slots are those of
    ``indices[begin:end]``. Returns the accumulator's halves [BLOCK_H, 256], the running maximum and the sum [BLOCK_H].
    """
    tl.assume(scale_log2 > 0)  # launchers refuse any other: the branch below is no branch
    low_query = tl.load(query_rows[:, None] + tl.arange(0, _HALF)[None, :], mask=live[:, None], other=0.0)
    high_query = tl.load(query_rows[:, None] + tl.arange(_HALF, _DIM)[None, :], mask=live[:, None], other=0.0)
    low = tl.zeros((BLOCK_H, _HALF), dtype=tl.float32)
    high = tl.zeros((BLOCK_H, _HALF), dtype=tl.float32)
    row_max = tl.full((BLOCK_H,), _LOWEST, dtype=tl.float32)
    row_sums = tl.zeros((BLOCK_H, _WARP_GROUPS, _COLUMNS), dtype=tl.float32)
    swa_tiles = (swa_end - swa_begin + BLOCK_K - 1) // BLOCK_K
    for tile in range(first, last):
        cache, indices, num_rows, block_stride = swa_cache, swa_indices, swa_rows, swa_block_stride
        start, end = swa_begin + tile * BLOCK_K, swa_end
        if HAS_EXTRA:
            more = tile >= swa_tiles
            cache = tl.where(more, extra_cache, cache)
            indices = tl.where(more, extra_indices, indices)
            num_rows = tl.where(more, extra_rows, num_rows)
            block_stride = tl.where(more, extra_block_stride, block_stride)
            start = tl.where(more, extra_begin + (tile - swa_tiles) * BLOCK_K, start)
            end = tl.where(more, extra_end, end)
        lanes = start + tl.arange(0, BLOCK_K)
        slots = tl.load(indices + lanes, mask=lanes < end, other=-1)
        # Unsigned: a shift and a mask, and -1 is too large as well. int64 before the product: block * stride passes
        # 2^31 in caches of a few GB (H26).
        unsigned = slots.to(tl.uint32)
        valid = unsigned < num_rows
        block, position = unsigned // SWA_BLOCK, unsigned % SWA_BLOCK
        entries = SWA_BLOCK
        if HAS_EXTRA and EXTRA_BLOCK != SWA_BLOCK:
            block = tl.where(more, unsigned // EXTRA_BLOCK, block)
            position = tl.where(more, unsigned % EXTRA_BLOCK, position)
            entries = tl.where(more, EXTRA_BLOCK, SWA_BLOCK)
        at = block.to(tl.int64) * block_stride
        rows = at + position.to(tl.int32) * _ROW_BYTES  # [BLOCK_K]
        # A row's eight scale bytes as one word, aligned as blocks and rows are
        scales = cache + (at + (entries * _ROW_BYTES + position.to(tl.int32) * _SCALE_SLOTS))
        words = tl.load(scales.to(tl.pointer_type(tl.int64)), mask=valid, other=0)
        low_keys = _load_half(cache, rows, words, valid, 0, MODE, BLOCK_K)
        high_keys = _load_half(cache, rows, words, valid, _HALF, MODE, BLOCK_K)

        # Of two products in a chain, Triton deals the first to the warps along its rows only, and both warp groups
        # would compute all of the scores. It does not follow a chain out of a branch.
        weights = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.bfloat16)
        decay = tl.zeros((BLOCK_H,), dtype=tl.float32)
        if scale_log2 > 0:
            # s_k = scale * q . kv_k, in units of log 2. Scaled before the sum: a bare sum of products is a chain again.
            scores = tl.dot(high_query, tl.trans(high_keys)) * scale_log2  # [BLOCK_H, BLOCK_K]
            scores += tl.dot(low_query, tl.trans(low_keys)) * scale_log2
            scores = tl.where(valid[None, :], scores, _LOWEST)
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            decay = tl.exp2(row_max - new_max)
            # The explicit zero matters: in a row without any valid key, scores == new_max and exp2 would give 1.
            shares = tl.where(valid[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
            # Over the columns of one thread: nothing crosses a lane.
            grouped = tl.reshape(shares, (BLOCK_H, _WARP_GROUPS, BLOCK_K // (_WARP_GROUPS * _COLUMNS), _COLUMNS))
            row_sums = row_sums * decay[:, None, None] + tl.sum(grouped, axis=2)
            weights = shares.to(tl.bfloat16)
            row_max = new_max
        low = tl.dot(weights, low_keys, low * decay[:, None])  # [BLOCK_H, 256]
        high = tl.dot(weights, high_keys, high * decay[:, None])
    return low, high, row_max, tl.sum(tl.sum(row_sums, axis=2), axis=1)
