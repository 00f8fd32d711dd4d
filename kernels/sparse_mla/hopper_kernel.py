"""The Gluon kernel behind `hopper_decode`: pieces of work of 64 heads of a row and split, warps in three roles.

Two places for key tiles in shared memory stand between the roles, each with a "full" and an "empty" mbarrier::

    fill     4 warps: slots, addresses and scales two tiles ahead, raw bytes in registers one ahead; codes to bf16 with
             integer moves and packed multiplies; bf16 [64, 512] into the place that is empty
    lead     4 warps: S = Q K^T (wgmma), online softmax in base 2, P to shared memory, O += P K for dims 0..255
    follow   4 warps: O += P K for dims 256..511; they ask the L2 for the next piece's queries

What a row, a split, an invalid slot and an empty list mean is what `split_decode` says; so are the parts and LSEs that
several splits leave for its reduce kernel.

Source of the idea: FlashMLA's sparse FP8 decode for sm_90 (a producer warpgroup dequantises into shared memory for
warpgroups that multiply); Triton's Gluon (`gluon.warp_specialize`, `warpgroup_mma`, `mbarrier`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dsv4ref.kernels.sparse_mla.hopper_roles import (
    _HALF,
    _HEADS,
    _KEYS,
    _TILE,
    FOLLOW_REGISTERS,
    WARPS,
    _follow,
    _lead,
    _line_of,
)

__all__ = ["FILL_REGISTERS", "FOLLOW_REGISTERS", "WARPS"]

FILL_REGISTERS = 144

_SCALE_SLOTS = gl.constexpr(8)
_ROW_BYTES = gl.constexpr(576)

_FILL = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
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


# --- the warps that fill ---


@gluon.jit
def _slots_at(indices, begin, length, tile):
    """Slots of one tile of a list, -1 beyond its end."""
    lanes = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _FILL))
    return gl.load(indices + begin + lanes, mask=(lanes >= 0) & (lanes < length), other=-1)


@gluon.jit
def _slots_of(tile, line, swa, extra, HAS_EXTRA: gl.constexpr):
    """Slots of a tile of the line; -1 past its last tile."""
    _, last, swa_tiles, swa_begin, swa_length, extra_begin, extra_length = line
    if HAS_EXTRA:
        if tile < swa_tiles:
            slots = _slots_at(swa[1], swa_begin, gl.where(tile < last, swa_length, 0), tile)
        else:
            slots = _slots_at(extra[1], extra_begin, gl.where(tile < last, extra_length, 0), tile - swa_tiles)
    else:
        slots = _slots_at(swa[1], swa_begin, gl.where(tile < last, swa_length, 0), tile)
    return slots


@gluon.jit
def _addresses(scope, slots, BLOCK_SIZE: gl.constexpr):
    """Pointers to a tile's rows, their eight scale bytes as one word, and which slots are valid."""
    cache, _, _, _, num_rows, block_stride = scope
    valid = (slots >= 0) & (slots < num_rows)
    # int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    block = cache + (slots // BLOCK_SIZE).to(gl.int64) * block_stride
    position = slots % BLOCK_SIZE
    rows = (block + position * _ROW_BYTES).to(gl.pointer_type(gl.int32))
    at = (block + (BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS)).to(gl.pointer_type(gl.uint64))
    return rows, gl.load(at, mask=valid, other=0x7F7F7F7F7F7F7F7F), valid


@gluon.jit
def _keys_of(
    slots, tile, line, swa, extra, SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr
):  # fmt: skip
    """Where a tile's keys lie, with their scales and validity."""
    if HAS_EXTRA:
        if tile < line[2]:
            rows, scales, valid = _addresses(swa, slots, SWA_BLOCK)
        else:
            rows, scales, valid = _addresses(extra, slots, EXTRA_BLOCK)
    else:
        rows, scales, valid = _addresses(swa, slots, SWA_BLOCK)
    return rows, scales, valid


@gluon.jit
def _load_words(rows, valid, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """``COUNT`` words of each row; four at a time, so that a thread's load is 16 bytes."""
    columns = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(0, _FILL))
    return gl.load(rows[:, None] + columns[None, :], mask=valid[:, None], other=0)


@gluon.jit
def _store_group(half, codes, scales, GROUP: gl.constexpr):
    """Dequantise 64 codes of each key and put them into their half of a tile, two to a word."""
    byte = (scales >> (8 * GROUP)).to(gl.int32) & 0xFF
    bits = byte << 7
    bits = gl.where(byte == 0, 0x0040, bits)
    bits = gl.where(byte == 255, 0x7FC0, bits)
    factor, codes = gl.broadcast((bits | (bits << 16))[:, None], codes)
    low, high = gl.inline_asm_elementwise(
        _DECODE, _DECODE_CONSTRAINTS, [codes, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )  # fmt: skip
    half.slice((GROUP % 4) * 32, 32, dim=1).store(gl.join(low, high).reshape([_KEYS, 32]))


@gluon.jit
def _load_rows(rows, valid):
    """A tile's raw bytes: seven groups of 64 codes, and the rope dims."""
    return (
        _load_words(rows, valid, 0, 16),
        _load_words(rows, valid, 16, 16),
        _load_words(rows, valid, 32, 16),
        _load_words(rows, valid, 48, 16),
        _load_words(rows, valid, 64, 16),
        _load_words(rows, valid, 80, 16),
        _load_words(rows, valid, 96, 16),
        _load_words(rows, valid, 112, 32),
    )


@gluon.jit
def _fill(
    keys, live, full, empty, sizes, swa, extra,
    SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    step = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        first, last = line[0], line[1]
        slots = _slots_of(first, line, swa, extra, HAS_EXTRA)
        next_slots = _slots_of(first + 1, line, swa, extra, HAS_EXTRA)
        rows, scales, valid = _keys_of(slots, first, line, swa, extra, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA)
        slots = _slots_of(first + 2, line, swa, extra, HAS_EXTRA)
        raw = _load_rows(rows, valid)
        next_rows, next_scales, next_valid = _keys_of(
            next_slots, first + 1, line, swa, extra, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA
        )  # fmt: skip
        for tile in range(first, last):
            # Asked for two tiles ahead, loaded one ahead: what is loaded has arrived in the L2, and slots in registers.
            later_rows, later_scales, later_valid = _keys_of(
                slots, tile + 2, line, swa, extra, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA
            )  # fmt: skip
            slots = _slots_of(tile + 3, line, swa, extra, HAS_EXTRA)
            at = step % 2
            mbarrier.wait(empty.index(at), ((step // 2) & 1) ^ 1)
            low = keys.index(2 * at)._reinterpret(gl.int32, [_KEYS, _HALF // 2], _WORDS)
            high = keys.index(2 * at + 1)._reinterpret(gl.int32, [_KEYS, _HALF // 2], _WORDS)
            live.index(at).store(valid.to(gl.int32))
            for group in gl.static_range(7):
                _store_group(low if group < 4 else high, raw[group], scales, group)
            high.slice(96, 32, dim=1).store(raw[7])
            fence_async_shared()
            mbarrier.arrive(full.index(at), count=1)
            # Only now: the fence waits for every load that is still under way.
            raw = _load_rows(next_rows, next_valid)
            scales, valid = next_scales, next_valid
            next_rows, next_scales, next_valid = later_rows, later_scales, later_valid
            step += 1


@gluon.jit
def _hopper_decode_kernel(
    q,
    out,
    lse,
    sink,
    positions,
    cos,
    sin,
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
    cos_stride,
    sin_stride,
    num_positions,
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
    HAS_ROPE: gl.constexpr,
    FOLLOW_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    items = (num_heads + _HEADS - 1) // _HEADS * num_rows * num_splits
    sizes = (items, num_rows, num_heads, num_splits)
    swa = (swa_cache, swa_indices, swa_indptr, swa_capacity, swa_rows, swa_block_stride)
    extra = (extra_cache, extra_indices, extra_indptr, extra_capacity, extra_rows, extra_block_stride)
    q_strides, out_strides = (q_stride_t, q_stride_h), (out_stride_t, out_stride_h)
    lse_strides = (lse_stride_t, lse_stride_h)
    targets = (out, parts)
    turning = (positions, cos, sin, cos_stride, sin_stride, num_positions)

    query = gl.allocate_shared_memory(gl.bfloat16, [2, _HEADS, _HALF], _TILE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [4, _KEYS, _HALF], _TILE)
    weights_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, _HEADS, _KEYS], _TILE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    decays = gl.allocate_shared_memory(gl.float32, [2, _HEADS], flat)
    shares = gl.allocate_shared_memory(gl.float32, [_HEADS], flat)
    live = gl.allocate_shared_memory(gl.int32, [2, _KEYS], flat)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_lead, (
                query, keys, weights_tiles, decays, shares, live, full, empty, ready, done, taken, sizes, swa, extra,
                q, lse, sink, part_lses, targets, q_strides, out_strides, lse_strides, scale_log2,
                HAS_EXTRA, SPLIT, HAS_SINK, HAS_LSE,
            )),
            (_follow, (
                keys, weights_tiles, decays, shares, full, empty, ready, done, taken, sizes, swa, extra,
                q, q_strides, targets, out_strides, turning,
                HAS_EXTRA, SPLIT, HAS_ROPE,
            )),
            (_fill, (
                keys, live, full, empty, sizes, swa, extra,
                SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, SPLIT,
            )),
        ],
        [4, 4],
        [FOLLOW_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
