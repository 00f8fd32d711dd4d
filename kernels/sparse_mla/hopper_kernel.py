"""The Gluon kernel behind `hopper_decode`: one program per (64 heads, row, split), its warps divided into two roles.

Four warps fill, eight compute; two key tiles in shared memory stand between them, each with a "full" and an "empty"
mbarrier::

    fill     slots -> addresses -> raw bytes in registers, one tile ahead; codes to bf16 with integer moves and two
             packed multiplies; bf16 [64, 512] into the tile that is empty
    compute  S = Q K^T (wgmma), online softmax in base 2, P to shared memory, O += P K (wgmma); each of two warpgroups
             holds half of the keys' columns of S and half of the dims of O

What a row, a split, an invalid slot and an empty list mean is what `split_decode` says; so are the parts and LSEs that
several splits leave for its reduce kernel.

Source of the idea: FlashMLA's sparse FP8 decode for sm_90 (a producer warpgroup dequantises into shared memory for
warpgroups that multiply); Triton's Gluon (`gluon.warp_specialize`, `warpgroup_mma`, `mbarrier`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["COMPUTE_WARPS", "FILL_REGISTERS", "FILL_WARPS"]

COMPUTE_WARPS = 8
FILL_WARPS = 4
FILL_REGISTERS = 144

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_DIM = gl.constexpr(512)
_NOPE = gl.constexpr(448)
_GROUP = gl.constexpr(64)
_SCALE_SLOTS = gl.constexpr(8)
_ROW_BYTES = gl.constexpr(576)
_LOWEST = gl.constexpr(-1.0e30)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)

_FILL = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))


def _decode_asm() -> str:
    """PTX: 16 e4m3fn codes (4 words) times a power of two to 16 bf16 (8 words), exactly; a NaN code makes all 16 NaN.

    Sign and seven bits of a code, moved to bits 15 and 10..4, are a bf16 of the value times 2^-120. Two packed
    multiplies, by 2^120 and by the scale, are exact wherever the result is a bf16: one by their product would overflow
    for scales from 2^8.
    """
    lines = ["{", ".reg .b32 a, t, n, m, f;", ".reg .pred p;", "mov.b32 m, 0x7B807B80;", "mov.b32 n, 0;"]
    for word in range(8, 12):
        lines += [f"and.b32 t, ${word}, 0x7F7F7F7F;", "add.u32 t, t, 0x01010101;", "or.b32 n, n, t;"]
    lines += ["and.b32 n, n, 0x80808080;", "setp.ne.b32 p, n, 0;", "selp.b32 f, 0x7FC07FC0, $12, p;"]
    for i in range(4):
        for j, selector in enumerate(("0x1404", "0x3424")):  # codes 0 and 1, codes 2 and 3, each in a high byte
            lines += [
                f"prmt.b32 a, ${8 + i}, 0, {selector};",
                "shr.u32 t, a, 4;",
                "and.b32 t, t, 0x07F007F0;",
                "lop3.b32 a, a, 0x80008000, t, 0xEA;",
                "mul.rn.bf16x2 a, a, m;",
                f"mul.rn.bf16x2 ${4 * j + i}, a, f;",
            ]
    return "\n".join([*lines, "}"])


_DECODE = gl.constexpr(_decode_asm())
_DECODE_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))


@gluon.jit
def _list_of(indptr, row, capacity):
    """Where a row's list begins, and how many slots it has."""
    begin = gl.load(indptr + row)
    end = gl.minimum(gl.load(indptr + row + 1), capacity)
    return begin, gl.maximum(end - begin, 0)


@gluon.jit
def _addresses(cache, block_stride, num_rows, slots, BLOCK_SIZE: gl.constexpr):
    """Pointers to a tile's rows, their eight scale bytes as one word, and which slots are valid."""
    valid = (slots >= 0) & (slots < num_rows)
    # int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    block = (slots // BLOCK_SIZE).to(gl.int64)
    position = slots % BLOCK_SIZE
    rows = (cache + (block * block_stride + position * _ROW_BYTES)).to(gl.pointer_type(gl.int32))
    at = cache + (block * block_stride + BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS)
    scales = gl.load(at.to(gl.pointer_type(gl.uint64)), mask=valid, other=0x7F7F7F7F7F7F7F7F)
    return rows, scales, valid


@gluon.jit
def _slots_at(indices, begin, length, tile):
    """Slots of one tile of a list, -1 beyond its end."""
    lanes = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _FILL))
    return gl.load(indices + begin + lanes, mask=(lanes >= 0) & (lanes < length), other=-1)


@gluon.jit
def _load_words(rows, valid, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """``COUNT`` words of each row; four at a time, so that a thread's load is 16 bytes."""
    columns = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(0, _FILL))
    return gl.load(rows[:, None] + columns[None, :], mask=valid[:, None], other=0)


@gluon.jit
def _store_group(tile, codes, scales, GROUP: gl.constexpr):
    """Dequantise 64 codes of each key and put them into the tile's columns, two to a word."""
    byte = (scales >> (8 * GROUP)).to(gl.int32) & 0xFF
    bits = byte << 7
    bits = gl.where(byte == 0, 0x0040, bits)
    bits = gl.where(byte == 255, 0x7FC0, bits)
    factor, codes = gl.broadcast((bits | (bits << 16))[:, None], codes)
    low, high = gl.inline_asm_elementwise(
        _DECODE, _DECODE_CONSTRAINTS, [codes, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )  # fmt: skip
    tile.slice(GROUP * 32, 32, dim=1).store(gl.join(low, high).reshape([_KEYS, 32]))


@gluon.jit
def _next_tile(
    tile, last, swa_tiles,
    swa_cache, swa_indices, swa_begin, swa_length, swa_rows, swa_block_stride,
    extra_cache, extra_indices, extra_begin, extra_length, extra_rows, extra_block_stride,
    SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Addresses, scales and validity of a tile of the line that both lists make; nothing is valid past ``last``."""
    if HAS_EXTRA:
        if tile < swa_tiles:
            slots = _slots_at(swa_indices, swa_begin, gl.where(tile < last, swa_length, 0), tile)
            rows, scales, valid = _addresses(swa_cache, swa_block_stride, swa_rows, slots, SWA_BLOCK)
        else:
            slots = _slots_at(extra_indices, extra_begin, gl.where(tile < last, extra_length, 0), tile - swa_tiles)
            rows, scales, valid = _addresses(extra_cache, extra_block_stride, extra_rows, slots, EXTRA_BLOCK)
    else:
        slots = _slots_at(swa_indices, swa_begin, gl.where(tile < last, swa_length, 0), tile)
        rows, scales, valid = _addresses(swa_cache, swa_block_stride, swa_rows, slots, SWA_BLOCK)
    return rows, scales, valid


@gluon.jit
def _fill(
    keys, live, full, empty, first, last, swa_tiles,
    swa_cache, swa_indices, swa_begin, swa_length, swa_rows, swa_block_stride,
    extra_cache, extra_indices, extra_begin, extra_length, extra_rows, extra_block_stride,
    SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    rows, scales, valid = _next_tile(
        first, last, swa_tiles,
        swa_cache, swa_indices, swa_begin, swa_length, swa_rows, swa_block_stride,
        extra_cache, extra_indices, extra_begin, extra_length, extra_rows, extra_block_stride,
        SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    c0 = _load_words(rows, valid, 0, 16)
    c1 = _load_words(rows, valid, 16, 16)
    c2 = _load_words(rows, valid, 32, 16)
    c3 = _load_words(rows, valid, 48, 16)
    c4 = _load_words(rows, valid, 64, 16)
    c5 = _load_words(rows, valid, 80, 16)
    c6 = _load_words(rows, valid, 96, 16)
    rope = _load_words(rows, valid, 112, 32)
    for tile in range(first, last):
        # The next tile's bytes are asked for as this one's registers come free: a tile's time to arrive.
        rows, next_scales, next_valid = _next_tile(
            tile + 1, last, swa_tiles,
            swa_cache, swa_indices, swa_begin, swa_length, swa_rows, swa_block_stride,
            extra_cache, extra_indices, extra_begin, extra_length, extra_rows, extra_block_stride,
            SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
        step = tile - first
        at = step % 2
        mbarrier.wait(empty.index(at), ((step // 2) & 1) ^ 1)
        target = keys.index(at)._reinterpret(gl.int32, [_KEYS, _DIM // 2], _WORDS)
        live.index(at).store(valid.to(gl.int32))
        _store_group(target, c0, scales, 0)
        c0 = _load_words(rows, next_valid, 0, 16)
        _store_group(target, c1, scales, 1)
        c1 = _load_words(rows, next_valid, 16, 16)
        _store_group(target, c2, scales, 2)
        c2 = _load_words(rows, next_valid, 32, 16)
        _store_group(target, c3, scales, 3)
        c3 = _load_words(rows, next_valid, 48, 16)
        _store_group(target, c4, scales, 4)
        c4 = _load_words(rows, next_valid, 64, 16)
        _store_group(target, c5, scales, 5)
        c5 = _load_words(rows, next_valid, 80, 16)
        _store_group(target, c6, scales, 6)
        c6 = _load_words(rows, next_valid, 96, 16)
        target.slice(_NOPE // 2, _GROUP // 2, dim=1).store(rope)
        rope = _load_words(rows, next_valid, 112, 32)
        fence_async_shared()
        mbarrier.arrive(full.index(at), count=1)
        scales = next_scales
        valid = next_valid


@gluon.jit
def _compute(
    query, keys, weights_tile, live, full, empty, first, last,
    q, out, lse, sink, parts, part_lses,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    num_rows, num_heads, row, split, head_block, scale_log2,
    SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SCORES)
    per_key: gl.constexpr = gl.SliceLayout(0, _SCORES)
    copied = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _COPY))
    copied_dims = gl.arange(0, _DIM, layout=gl.SliceLayout(0, _COPY))
    at = row * q_stride_t + copied.to(gl.int64)[:, None] * q_stride_h + copied_dims[None, :]
    query.store(gl.load(q + at, mask=(copied < num_heads)[:, None], other=0.0))
    fence_async_shared()

    output = gl.zeros([_HEADS, _DIM], gl.float32, layout=_OUTPUT)
    row_max = gl.full([_HEADS], _LOWEST, gl.float32, layout=per_row)
    row_sum = gl.zeros([_HEADS], gl.float32, layout=per_row)
    for step in range(0, last - first):
        buffer = step % 2
        tile = keys.index(buffer)
        mbarrier.wait(full.index(buffer), (step // 2) & 1)
        scores = warpgroup_mma(
            query, tile.permute((1, 0)), gl.zeros([_HEADS, _KEYS], gl.float32, layout=_SCORES), use_acc=False,
            is_async=True,
        )  # fmt: skip
        valid = live.index(buffer).load(per_key)[None, :] != 0
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(valid, scores * scale_log2, _LOWEST)
        new_max = gl.maximum(row_max, gl.max(scores, axis=1))
        decay = gl.exp2(row_max - new_max)
        # The explicit zero matters: in a row without any valid slot, scores == new_max and exp2 would give 1.
        weights = gl.where(valid, gl.exp2(scores - new_max[:, None]), 0.0)
        row_sum = row_sum * decay + gl.sum(weights, axis=1)
        weights_tile.store(weights.to(gl.bfloat16))
        fence_async_shared()
        output = output * gl.convert_layout(decay, gl.SliceLayout(1, _OUTPUT))[:, None]
        output = warpgroup_mma(weights_tile, tile, output, is_async=True)
        output = warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(empty.index(buffer), count=1)
        row_max = new_max

    heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=per_row)
    wide = heads.to(gl.int64)
    unseen = row_sum == 0.0
    value = gl.where(unseen, float("-inf"), (row_max + gl.log2(row_sum)) * _LN_2)
    if SPLIT:
        place = (split.to(gl.int64) * num_rows + row) * num_heads
        gl.store(part_lses + place + wide, value, mask=heads < num_heads)
        inverse = gl.where(unseen, 0.0, 1.0 / row_sum)
        rows = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _OUTPUT))
        dims = gl.arange(0, _DIM, layout=gl.SliceLayout(0, _OUTPUT))
        share = gl.convert_layout(inverse, gl.SliceLayout(1, _OUTPUT))
        part_at = parts + (place + rows.to(gl.int64))[:, None] * _DIM + dims[None, :]
        written = gl.convert_layout(row_sum, gl.SliceLayout(1, _OUTPUT)) != 0.0
        gl.store(part_at, output * share[:, None], mask=((rows < num_heads) & written)[:, None])
    else:
        if HAS_LSE:
            gl.store(lse + row * lse_stride_t + wide * lse_stride_h, value, mask=heads < num_heads)
        share = gl.where(unseen, 0.0, 1.0 / row_sum)
        if HAS_SINK:
            # l' = l * exp(m - m') + exp(sink - m'), o = acc * exp(m - m') / l'
            sink_log2 = gl.load(sink + heads, mask=heads < num_heads, other=float("-inf")) * _LOG2_E
            new_max = gl.maximum(row_max, sink_log2)
            decay = gl.exp2(row_max - new_max)
            # A sink of +inf takes all the weight: the row is zero. inf - inf would make it NaN.
            absorbed = sink_log2 == float("inf")
            row_sum = row_sum * decay + gl.where(absorbed, 1.0, gl.exp2(sink_log2 - new_max))
            share = gl.where(row_sum == 0.0, 0.0, decay / row_sum)
        result = output * gl.convert_layout(share, gl.SliceLayout(1, _OUTPUT))[:, None]
        # Through the queries' place in shared memory, which nobody reads any more, to whole lines of the output.
        query.store(result.to(gl.bfloat16))
        out_at = out + row * out_stride_t + copied.to(gl.int64)[:, None] * out_stride_h + copied_dims[None, :]
        gl.store(out_at, query.load(_COPY), mask=(copied < num_heads)[:, None])


@gluon.jit
def _hopper_decode_kernel(
    q,
    out,
    lse,
    sink,
    parts,
    part_lses,
    swa_cache,
    swa_indices,
    swa_indptr,
    swa_capacity,
    swa_rows,
    swa_block_stride,
    extra_cache,
    extra_indices,
    extra_indptr,
    extra_capacity,
    extra_rows,
    extra_block_stride,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    num_rows,
    num_heads,
    num_splits,
    scale_log2,
    SWA_BLOCK: gl.constexpr,
    EXTRA_BLOCK: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_LSE: gl.constexpr,
    FILLERS: gl.constexpr,
    FILL_REGS: gl.constexpr,
):
    head_block = gl.program_id(0)
    row = gl.program_id(1).to(gl.int64)
    split = gl.program_id(2)

    # This split's tiles, of the line of tiles that both lists make
    swa_begin, swa_length = _list_of(swa_indptr, row, swa_capacity)
    swa_tiles = (swa_length + _KEYS - 1) // _KEYS
    extra_begin, extra_length = swa_begin, swa_length * 0
    first, last = swa_tiles * 0, swa_tiles
    if HAS_EXTRA:
        extra_begin, extra_length = _list_of(extra_indptr, row, extra_capacity)
        last += (extra_length + _KEYS - 1) // _KEYS
    if SPLIT:
        share = (last + num_splits - 1) // num_splits
        first = gl.minimum(split * share, last)
        last = gl.minimum(first + share, last)

    query = gl.allocate_shared_memory(gl.bfloat16, [_HEADS, _DIM], _TILE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, _DIM], _TILE)
    weights_tile = gl.allocate_shared_memory(gl.bfloat16, [_HEADS, _KEYS], _TILE)
    live = gl.allocate_shared_memory(gl.int32, [2, _KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_compute, (
                query, keys, weights_tile, live, full, empty, first, last,
                q, out, lse, sink, parts, part_lses,
                q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
                num_rows, num_heads, row, split, head_block, scale_log2,
                SPLIT, HAS_SINK, HAS_LSE,
            )),
            (_fill, (
                keys, live, full, empty, first, last, swa_tiles,
                swa_cache, swa_indices, swa_begin, swa_length, swa_rows, swa_block_stride,
                extra_cache, extra_indices, extra_begin, extra_length, extra_rows, extra_block_stride,
                SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
            )),
        ],
        [FILLERS],
        [FILL_REGS],
    )  # fmt: skip
