"""The warps that fill key tiles in Hopper's decode: gather rows of the FP8 cache, dequantise them, store bf16.

A tile is 64 keys, and two partitions of four warps have 32 each: one warp a scheduler has too little to issue while it
waits for its own results. A thread has 16 codes of each group of 64 of one key: in registers from one tile's end, where
the loads are issued, to the next tile, where the place in shared memory is empty. Rope dims need no arithmetic and no
registers: they are copied there (cp.async) while the codes are decoded.

Codes become bf16 by integer moves and two packed multiplies, exactly. What is NaN shows without being looked for in
every dim: one NaN dim makes the key's score NaN, and that every dim of the row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from dsv4ref.kernels.sparse_mla.hopper_roles import _HALF, _KEYS, _hand_over, _place

__all__: list[str] = []

_MINE = gl.constexpr(32)
_SCALE_SLOTS = gl.constexpr(8)
_ROW_BYTES = gl.constexpr(576)
_ROPE_AT = gl.constexpr(224)  # of a row's bf16 places
_ONES = gl.constexpr(0x01010101)
_SEVEN_BITS = gl.constexpr(0x7F7F7F7F)

_FILL = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
_ROPES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))


def _decode_asm(shows_nan: bool) -> str:
    """PTX: 16 e4m3fn codes (4 words, operands 8 to 11) times a power of two (12) to 16 bf16 (8 words), exactly.

    Sign and seven bits of a code, moved to bits 15 and 10..4, are a bf16 of the value times 2^-120. Two packed
    multiplies, by 2^120 and by the scale, are exact wherever the result is a bf16: one by their product would overflow
    for scales from 2^8. With ``shows_nan`` all 16 are NaN if bit 7 of any byte of operands 16 to 19 is set.
    """
    lines = ["{", ".reg .b32 a, t, n, m, f;", ".reg .pred p;", "mov.b32 m, 0x7B807B80;", "mov.b32 f, $12;"]
    if shows_nan:
        lines += ["or.b32 n, $16, $17;", "or.b32 n, n, $18;", "or.b32 n, n, $19;"]
        lines += ["and.b32 n, n, 0x80808080;", "setp.ne.b32 p, n, 0;", "selp.b32 f, 0x7FC07FC0, f, p;"]
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


def _factor_asm(byte: int) -> str:
    """PTX: the UE8M0 scale in one byte of a word as two bf16: its bits from 7 up, and 2^-127 for byte 0."""
    moved = f"prmt.b32 a, $1, 0, 0x{byte}4{byte}4;"
    return "\n".join(
        ["{", ".reg .b32 a, b;", "mov.b32 b, 0x00400040;", moved, "shr.u32 a, a, 1;", "max.u16x2 $0, a, b;", "}"]
    )


_DECODE = gl.constexpr(_decode_asm(shows_nan=False))
_DECODE_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
_DECODE_LAST = gl.constexpr(_decode_asm(shows_nan=True))
_DECODE_LAST_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))
_FACTOR_0 = gl.constexpr(_factor_asm(0))
_FACTOR_1 = gl.constexpr(_factor_asm(1))
_FACTOR_2 = gl.constexpr(_factor_asm(2))
_FACTOR_3 = gl.constexpr(_factor_asm(3))


@gluon.jit
def _list_of(indptr, row, capacity):
    """Where a row's list begins, and how many slots it has."""
    begin = gl.load(indptr + row)
    end = gl.minimum(gl.load(indptr + row + 1), capacity)
    return begin, gl.maximum(end - begin, 0)


@gluon.jit
def _line_of(item, sizes, swa, extra, HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr):
    """A piece's tiles, first to last, of the line of tiles that both lists of its row make; where the lists lie."""
    _, row, split = _place(item, sizes)
    swa_begin, swa_length = _list_of(swa[2], row, swa[3])
    swa_tiles = (swa_length + _KEYS - 1) // _KEYS
    extra_begin, extra_length = swa_begin, swa_length * 0
    first, last = swa_tiles * 0, swa_tiles
    if HAS_EXTRA:
        extra_begin, extra_length = _list_of(extra[2], row, extra[3])
        last += (extra_length + _KEYS - 1) // _KEYS
    if SPLIT:
        share = (last + sizes[3] - 1) // sizes[3]
        first = gl.minimum(split * share, last)
        last = gl.minimum(first + share, last)
    return first, last, swa_tiles, swa_begin, swa_length, extra_begin, extra_length


@gluon.jit
def _slots_of(tile, line, swa, extra, PART: gl.constexpr, HAS_EXTRA: gl.constexpr):
    """Slots of a tile of the line, -1 beyond a list's end; -1 past the piece's last tile."""
    _, last, swa_tiles, swa_begin, swa_length, extra_begin, extra_length = line
    lanes = tile * _KEYS + PART * _MINE + gl.arange(0, _MINE, layout=gl.SliceLayout(1, _FILL))
    at = swa[1] + swa_begin
    length = swa_length
    if HAS_EXTRA:
        of_swa = tile < swa_tiles
        at = gl.where(of_swa, at, extra[1] + extra_begin)
        length = gl.where(of_swa, length, extra_length)
        lanes -= gl.where(of_swa, 0, swa_tiles * _KEYS)
    length = gl.where(tile < last, length, 0)
    return gl.load(at + lanes, mask=(lanes >= 0) & (lanes < length), other=-1)


@gluon.jit
def _addresses(scope, slots, BLOCK_SIZE: gl.constexpr):
    """Where a tile's rows lie, and the eight scale bytes of each; which slots are valid."""
    cache, _, _, _, num_rows, block_stride = scope
    valid = (slots >= 0) & (slots < num_rows)
    # int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    block = cache + (slots // BLOCK_SIZE).to(gl.int64) * block_stride
    position = slots % BLOCK_SIZE
    rows = (block + position * _ROW_BYTES).to(gl.pointer_type(gl.int32))
    scales_at = (block + (BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS)).to(gl.pointer_type(gl.uint64))
    return rows, scales_at, valid


@gluon.jit
def _keys_of(
    slots, tile, line, swa, extra, SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr
):  # fmt: skip
    """Where a tile's keys lie, their scales as one word each, and which are valid."""
    if HAS_EXTRA:
        if tile < line[2]:
            rows, scales_at, valid = _addresses(swa, slots, SWA_BLOCK)
        else:
            rows, scales_at, valid = _addresses(extra, slots, EXTRA_BLOCK)
    else:
        rows, scales_at, valid = _addresses(swa, slots, SWA_BLOCK)
    return rows, gl.load(scales_at, mask=valid, other=0x7F7F7F7F7F7F7F7F), valid


@gluon.jit
def _load_words(rows, valid, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """``COUNT`` words of each row; four at a time, so that a thread's load is 16 bytes."""
    columns = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(0, _FILL))
    return gl.load(rows[:, None] + columns[None, :], mask=valid[:, None], other=0)


@gluon.jit
def _load_codes(rows, valid):
    """A tile's codes: seven groups of 64 of each key."""
    return (
        _load_words(rows, valid, 0, 16),
        _load_words(rows, valid, 16, 16),
        _load_words(rows, valid, 32, 16),
        _load_words(rows, valid, 48, 16),
        _load_words(rows, valid, 64, 16),
        _load_words(rows, valid, 80, 16),
        _load_words(rows, valid, 96, 16),
    )


@gluon.jit
def _copy_rope(high, rows, valid):
    """Begin to copy a tile's rope dims; those of keys that are not valid arrive as zeros."""
    dims = _ROPE_AT + gl.arange(0, 64, layout=gl.SliceLayout(0, _ROPES))
    rows = gl.convert_layout(rows, gl.SliceLayout(1, _ROPES), assert_trivial=True).to(gl.pointer_type(gl.bfloat16))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, _ROPES), assert_trivial=True)
    async_copy.async_copy_global_to_shared(
        high.slice(192, 64, dim=1), rows[:, None] + dims[None, :], mask=valid[:, None]
    )
    async_copy.commit_group()  # a wait is for groups: copies in none are not waited for


@gluon.jit
def _nan_bits(codes, scales):
    """Bit 7 of some byte is set where a key has a NaN: among the codes that a thread has of it, or its scales."""
    bits = (codes[0] & _SEVEN_BITS) + _ONES
    for group in gl.static_range(1, 7):
        bits |= (codes[group] & _SEVEN_BITS) + _ONES
    low = scales.to(gl.int32)
    high = (scales >> 32).to(gl.int32) & 0x00FFFFFF
    of_scales = (((low & _SEVEN_BITS) + _ONES) & low) | (((high & _SEVEN_BITS) + _ONES) & high)
    return bits | of_scales[:, None]


@gluon.jit
def _group(codes, scales, nan, GROUP: gl.constexpr):
    """One group of 64 dims of each key, two bf16 to a word; the last one shows the key's NaNs."""
    word = (scales >> (32 * (GROUP // 4))).to(gl.int32)
    if GROUP % 4 == 0:
        factor = gl.inline_asm_elementwise(_FACTOR_0, "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    elif GROUP % 4 == 1:
        factor = gl.inline_asm_elementwise(_FACTOR_1, "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    elif GROUP % 4 == 2:
        factor = gl.inline_asm_elementwise(_FACTOR_2, "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    else:
        factor = gl.inline_asm_elementwise(_FACTOR_3, "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    factor, words = gl.broadcast(factor[:, None], codes[GROUP])
    if GROUP == 6:
        low, high = gl.inline_asm_elementwise(
            _DECODE_LAST, _DECODE_LAST_CONSTRAINTS, [words, factor, nan], dtype=(gl.int32, gl.int32), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            _DECODE, _DECODE_CONSTRAINTS, [words, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
        )  # fmt: skip
    return gl.join(low, high).reshape([_MINE, 32])


@gluon.jit
def _beside(a, b):
    """Two blocks of words as one, so that one store takes them: between two stores all of the role's warps meet."""
    return gl.join(a, b).permute((0, 2, 1)).reshape([_MINE, 2 * a.shape[1]])


@gluon.jit
def _store_codes(low, high, codes, scales, PART: gl.constexpr):
    """Dequantise a tile's codes into its halves."""
    nan = _nan_bits(codes, scales)
    left = _beside(_group(codes, scales, nan, 0), _group(codes, scales, nan, 1))
    right = _beside(_group(codes, scales, nan, 2), _group(codes, scales, nan, 3))
    low._reinterpret(gl.int32, [_KEYS, _HALF // 2], _WORDS).slice(PART * _MINE, _MINE, dim=0).store(
        _beside(left, right)
    )
    words = high._reinterpret(gl.int32, [_KEYS, _HALF // 2], _WORDS).slice(PART * _MINE, _MINE, dim=0)
    words.slice(0, 64, dim=1).store(_beside(_group(codes, scales, nan, 4), _group(codes, scales, nan, 5)))
    words.slice(64, 32, dim=1).store(_group(codes, scales, nan, 6))


@gluon.jit
def _fill(
    keys, live, full, empty, sizes, swa, extra, PART: gl.constexpr,
    SWA_BLOCK: gl.constexpr, EXTRA_BLOCK: gl.constexpr, HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    step = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        first, last = line[0], line[1]
        slots = _slots_of(first, line, swa, extra, PART, HAS_EXTRA)
        rows, scales, valid = _keys_of(slots, first, line, swa, extra, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA)
        codes = _load_codes(rows, valid)
        slots = _slots_of(first + 1, line, swa, extra, PART, HAS_EXTRA)
        for tile in range(first, last):
            at = step % 2
            mbarrier.wait(empty.index(at), ((step // 2) & 1) ^ 1)
            low = keys.index(2 * at)
            high = keys.index(2 * at + 1)
            live.index(at).slice(PART * _MINE, _MINE, dim=0).store(valid.to(gl.int32))
            _copy_rope(high.slice(PART * _MINE, _MINE, dim=0), rows, valid)
            _store_codes(low, high, codes, scales, PART)
            async_copy.wait_group(0)
            _hand_over(full.index(at))
            # Only now: the fence waits for every load that is still under way.
            rows, scales, valid = _keys_of(slots, tile + 1, line, swa, extra, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA)
            codes = _load_codes(rows, valid)
            slots = _slots_of(tile + 2, line, swa, extra, PART, HAS_EXTRA)
            step += 1
