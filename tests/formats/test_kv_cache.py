"""The 584-byte paged cache: its bytes against blocks assembled by hand, the writer's rounding, and what is refused."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.formats import Dialect, KVCache, fp8, kv_cache
from dsv4ref.formats.kv_cache import allocate, block_stride, dequantise, gather, insert, quantise

BOTH = pytest.mark.parametrize("dialect", Dialect)


def random_kv(rng: torch.Generator, rows: int) -> Tensor:
    """Rows whose seven blocks span many binades, so that scales differ within an entry."""
    spread = torch.exp2(torch.randint(-12, 13, (rows, 8, 1), generator=rng).to(torch.float32))
    return (torch.randn((rows, 8, 64), generator=rng) * spread).reshape(rows, 512)


def raw_bytes(cache: KVCache) -> bytes:
    """The cache's memory from its first byte to the end of its last block, through no view of the package."""
    flat = cache.data.as_strided((cache.num_blocks * cache.block_stride,), (1,))
    return bytes(flat.tolist())


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "stride"), [(2, 1728), (64, 37_440), (256, 149_760), (1, 1152), (72, 42_048)])
def test_block_strides(block_size: int, stride: int) -> None:
    assert block_stride(block_size) == stride


@pytest.mark.parametrize("block_size", [0, -1, 2.0, None])
def test_block_sizes_that_cannot_be(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"block_size: got {re.escape(repr(block_size))}, expected a positive"):
        block_stride(block_size)


def test_constants_of_the_format() -> None:
    assert (kv_cache.NOPE_DIM, kv_cache.ROPE_DIM, kv_cache.HEAD_DIM) == (448, 64, 512)
    assert (kv_cache.ROW_BYTES, kv_cache.SCALE_SLOTS, kv_cache.ENTRY_BYTES) == (576, 8, 584)


@BOTH
@pytest.mark.parametrize("block_size", [2, 64, 256])
def test_every_byte_stands_where_the_layout_says(block_size: int, dialect: Dialect, rng: torch.Generator) -> None:
    """A block assembled by hand from the quantised parts, with Python's own packing, is the cache's memory."""
    slots = [block_size, 2 * block_size - 1, block_size + 1]  # first, last and second entry of the second block
    kv = random_kv(rng, len(slots))
    codes, scales, rope = quantise(kv, dialect)
    cache = allocate(3, block_size, dialect, fill=0xA5)
    insert(cache, torch.tensor(slots), kv)

    stride = -(-block_size * 584 // 576) * 576
    expected = bytearray([0xA5]) * (3 * stride)
    for i, slot in enumerate(slots):
        block, position = divmod(slot, block_size)
        row = block * stride + position * 576
        scale = block * stride + block_size * 576 + position * 8
        expected[row : row + 448] = bytes(codes[i].tolist())
        expected[row + 448 : row + 576] = struct.pack("<64H", *(v & 0xFFFF for v in rope[i].view(torch.int16).tolist()))
        expected[scale : scale + 7] = bytes(scales[i].tolist())
        expected[scale + 7] = 0
    got = raw_bytes(cache)
    assert len(got) == len(expected)
    differing = [i for i in range(len(expected)) if got[i] != expected[i]]
    assert not differing, f"byte {differing[0]}: {got[differing[0]]}, expected {expected[differing[0]]}"


@BOTH
def test_reading_back_needs_only_the_documented_offsets(dialect: Dialect, rng: torch.Generator) -> None:
    """The other direction: numbers computed from raw bytes with plain Python are what gather returns."""
    cache = allocate(2, 64, dialect)
    insert(cache, torch.tensor([70]), random_kv(rng, 1))
    memory, row, scale = raw_bytes(cache), 37_440 + 6 * 576, 37_440 + 64 * 576 + 6 * 8
    table = torch.arange(256).to(torch.uint8).view(dialect.dtype).to(torch.float64).tolist()
    nope = [table[memory[row + d]] * 2.0 ** (memory[scale + d // 64] - 127) for d in range(448)]
    halves = struct.unpack("<64H", memory[row + 448 : row + 576])
    rope = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    assert gather(cache, torch.tensor([70]), torch.float64)[0].tolist() == nope + rope


def test_views_of_a_cache_inside_a_larger_buffer_keep_its_offset(rng: torch.Generator) -> None:
    """Production pools put several caches into one allocation."""
    pool = torch.full((4096 + 3 * 1728,), 0xA5, dtype=torch.uint8)
    data = pool[4096:].as_strided((3, 2, 584), (1728, 584, 1), 4096)
    cache = KVCache(data, Dialect.FN)
    kv = random_kv(rng, 6)
    insert(cache, torch.arange(6), kv)
    assert set(pool[:4096].tolist()) == {0xA5}
    apart = allocate(3, 2, "e4m3fn")
    insert(apart, torch.arange(6), kv)
    assert torch.equal(gather(cache, torch.arange(6)), gather(apart, torch.arange(6)))


def test_the_584_byte_view_is_not_one_entry_per_row(rng: torch.Generator) -> None:
    """``data[b, i]`` looks like entry i and is not, from the second entry on."""
    cache = allocate(1, 64, "e4m3fn")
    kv = random_kv(rng, 64)
    insert(cache, torch.arange(64), kv)
    codes, _, _ = quantise(kv, "e4m3fn")
    assert torch.equal(cache.data[0, 0, :448], codes[0])
    assert not torch.equal(cache.data[0, 1, :448], codes[1])
    assert torch.equal(cache.entry_rows[0, 1, :448], codes[1])


# --- the writer's numbers --------------------------------------------------------------------------------------------


def test_all_zero_rows_survive() -> None:
    codes, scales, rope = quantise(torch.zeros(2, 512), "e4m3fn")
    assert scales.tolist() == [[105] * 7] * 2
    assert int(codes.max()) == 0
    assert torch.equal(rope, torch.zeros(2, 64, dtype=torch.bfloat16))
    assert quantise(torch.zeros(1, 512), "e4m3fnuz")[1].tolist() == [[106] * 7]


@BOTH
def test_dequantising_is_exact_in_bf16(dialect: Dialect) -> None:
    """All codes under scales across the range: the bf16 result equals the float64 product."""
    codes = torch.arange(448).remainder(256).to(torch.uint8).expand(9, 448).contiguous()
    scales = torch.tensor([20, 64, 105, 120, 127, 128, 140, 200, 240], dtype=torch.uint8)[:, None].expand(9, 7)
    rope = torch.zeros(9, 64, dtype=torch.bfloat16)
    exact = dequantise(codes, scales.contiguous(), rope, dialect, torch.float64)
    rounded = dequantise(codes, scales.contiguous(), rope, dialect)
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(torch.isnan(rounded), torch.isnan(exact))
    assert torch.equal(rounded.to(torch.float64).nan_to_num(7.0), exact.nan_to_num(7.0))
    by_hand = fp8.decode(codes[4], dialect, torch.float64)  # scale byte 127 is 1
    assert torch.equal(exact[4, :448].nan_to_num(7.0), by_hand.nan_to_num(7.0))


@BOTH
def test_rounding_error_is_within_half_a_step_of_the_block(dialect: Dialect, rng: torch.Generator) -> None:
    """3 mantissa bits: at most 1/16 of a value, and at most half the smallest step of its block."""
    kv = random_kv(rng, 64).to(torch.bfloat16).to(torch.float64)
    codes, scales, rope = quantise(kv, dialect)
    back = dequantise(codes, scales, rope, dialect, torch.float64)
    assert torch.equal(back[:, 448:], kv[:, 448:])
    step = torch.exp2(scales.to(torch.float64) - 127) * fp8.decode(torch.tensor([1], dtype=torch.uint8), dialect).item()
    allowed = torch.maximum(kv[:, :448].abs() / 16, step.repeat_interleave(64, dim=1) / 2)
    excess = (back[:, :448] - kv[:, :448]).abs() - allowed
    worst = divmod(int(excess.argmax()), 448)
    assert excess.max() <= 0, f"{worst}: {back[worst].item()}, expected {kv[worst].item()} +- {allowed[worst].item()}"


def test_values_are_rounded_to_bf16_before_they_are_quantised() -> None:
    """fp32 -> bf16 -> fp8 is not fp32 -> fp8: just above the middle between two codes bf16 rounds onto the tie."""
    kv = torch.zeros(1, 512)
    kv[0, 0] = 448.0  # scale 1
    kv[0, 1] = 17.0 + 2**-10  # codes 16 and 18: 18 is nearer, but bf16 makes it 17, a tie that goes to 16
    codes, scales, _ = quantise(kv, "e4m3fn")
    assert scales[0, 0].item() == 127
    assert fp8.decode(codes[0, 1:2], Dialect.FN).item() == 16.0


def test_fnuz_bytes_are_the_ocp_bytes_and_scales_are_one_more(rng: torch.Generator) -> None:
    """Why 224: an OCP cache converts to fnuz without touching a code, except OCP's -0."""
    kv = torch.cat([random_kv(rng, 128), torch.full((1, 512), -1e-12), torch.zeros(1, 512)])
    kv[0, 5] = -0.0
    fn_codes, fn_scales, fn_rope = quantise(kv, "e4m3fn")
    fnuz_codes, fnuz_scales, fnuz_rope = quantise(kv, "e4m3fnuz")
    assert torch.equal(fnuz_scales, fn_scales + 1)
    negative_zero = fn_codes == 0x80
    assert negative_zero.any()
    assert torch.equal(fnuz_codes[~negative_zero], fn_codes[~negative_zero])
    assert set(fnuz_codes[negative_zero].tolist()) == {0}
    assert torch.equal(fnuz_rope, fn_rope)
    assert torch.equal(fnuz_codes, fp8.from_fn_to_fnuz(fn_codes))
    assert torch.equal(
        dequantise(fn_codes, fn_scales, fn_rope, "e4m3fn").abs(),
        dequantise(fnuz_codes, fnuz_scales, fnuz_rope, "e4m3fnuz").abs(),
    )


def test_misreading_a_dialect_is_a_factor_of_two_and_nan_at_negative_zero(rng: torch.Generator) -> None:
    kv = random_kv(rng, 8)
    kv[0, 5] = -0.0
    cache = allocate(4, 2, "e4m3fn")
    insert(cache, torch.arange(8), kv)
    right, misread = gather(cache, torch.arange(8)), gather(KVCache(cache.data, Dialect.FNUZ), torch.arange(8))
    nan = torch.isnan(misread)
    assert nan[0, 5]
    assert torch.equal(misread[:, :448][~nan[:, :448]] * 2, right[:, :448][~nan[:, :448]])
    assert torch.equal(misread[:, 448:], right[:, 448:])


def test_nan_in_a_block_shows_in_its_scale_and_its_values_only() -> None:
    kv = torch.ones(1, 512)
    kv[0, 70] = math.nan
    codes, scales, rope = quantise(kv, "e4m3fn")
    assert scales[0].tolist()[1] == 255
    back = dequantise(codes, scales, rope, "e4m3fn")
    assert torch.isnan(back[0, 64:128]).all()
    assert torch.isfinite(back[0, :64]).all()
    assert torch.isfinite(back[0, 128:]).all()


# Numbers of the last binade may round up past bf16's largest; the cache has no infinity to keep.
bf16_numbers = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7FFF < 0x7F00)


@given(st.lists(bf16_numbers, min_size=64, max_size=64), st.sampled_from(list(Dialect)), st.integers(-20, 20))
@settings(max_examples=60)
def test_quantising_is_idempotent(patterns: list[int], dialect: Dialect, exponent: int) -> None:
    """What a cache holds is kept bit for bit by another trip, and the bytes settle after one.

    The bytes may change once: a block maximum that rounds down to a power of two times the limit gets a smaller scale
    and doubled codes for the same values.
    """
    numbers = torch.tensor(patterns, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(sum(patterns))
    moderate = torch.randn(448, generator=generator) * 2.0**exponent
    kv = torch.cat([moderate.to(torch.bfloat16), numbers])[torch.randperm(512, generator=generator)][None]
    first = quantise(kv, dialect)
    once = dequantise(*first, dialect)
    second = quantise(once, dialect)
    twice = dequantise(*second, dialect)
    assert torch.equal(once.view(torch.int16), twice.view(torch.int16))
    for again, settled in zip(quantise(twice, dialect), second, strict=True):
        assert torch.equal(again.view(torch.uint8), settled.view(torch.uint8))


# --- insert and gather -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 64])
def test_inserting_leaves_every_other_byte(block_size: int, rng: torch.Generator) -> None:
    cache = allocate(3, block_size, "e4m3fn")
    insert(cache, torch.arange(cache.rows), random_kv(rng, cache.rows))
    before, slot = raw_bytes(cache), block_size + 1
    insert(cache, torch.tensor([slot]), random_kv(rng, 1))
    after = raw_bytes(cache)
    row = cache.block_stride + 576
    scale = cache.block_stride + block_size * 576 + 8
    own = {*range(row, row + 576), *range(scale, scale + 8)}
    strays = [i for i in range(len(before)) if before[i] != after[i] and i not in own]
    assert not strays, f"bytes {strays[:5]} changed"
    assert before[row : row + 576] != after[row : row + 576]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathering_keeps_order_and_duplicates(dtype: torch.dtype, rng: torch.Generator) -> None:
    kv = random_kv(rng, 6)
    cache = allocate(3, 2, "e4m3fnuz")
    insert(cache, torch.arange(6), kv)
    entries = dequantise(*quantise(kv, "e4m3fnuz"), "e4m3fnuz")
    order = torch.tensor([4, 0, 4, 5, 4], dtype=dtype)
    assert torch.equal(gather(cache, order), entries[order.to(torch.int64)])


def test_gathering_nothing_is_empty() -> None:
    assert gather(allocate(1, 2, "e4m3fn"), torch.tensor([], dtype=torch.int32)).shape == (0, 512)


def test_a_poisoned_cache_reads_as_nan() -> None:
    assert torch.isnan(gather(allocate(1, 2, "e4m3fn", fill=0xFF), torch.tensor([0, 1]))).all()


def test_a_cache_of_no_blocks_has_no_rows() -> None:
    cache = allocate(0, 64, "e4m3fn")
    assert (cache.num_blocks, cache.block_size, cache.rows) == (0, 64, 0)


def test_allocating_with_a_wider_stride_keeps_the_block_layout(rng: torch.Generator) -> None:
    kv = random_kv(rng, 4)
    wide, plain = allocate(2, 2, "e4m3fn", stride=2304), allocate(2, 2, "e4m3fn")
    for cache in (wide, plain):
        insert(cache, torch.arange(4), kv)
    assert (wide.block_stride, wide.rows) == (2304, 4)
    assert torch.equal(gather(wide, torch.arange(4)), gather(plain, torch.arange(4)))


# --- refusals --------------------------------------------------------------------------------------------------------


def strided(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.zeros(100_000, dtype=torch.uint8).as_strided(shape, stride, offset)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1], TypeError, "data: got list, expected a torch.Tensor"),
        (torch.zeros(1, 2, 584), TypeError, "data: got torch.float32, expected torch.uint8"),
        (strided((2, 584), (584, 1)), ValueError, "data: got shape (2, 584), expected [num_blocks, bs, 584]"),
        (strided((1, 2, 656), (1728, 656, 1)), ValueError, "data: got shape (1, 2, 656), expected [num_blocks, bs"),
        (strided((1, 0, 584), (1728, 584, 1)), ValueError, "data: got block size 0, expected at least 1"),
        (strided((3, 2, 584), (1168, 584, 1)), ValueError, "data: got strides (1168, 584, 1), expected (a multiple"),
        (strided((3, 2, 584), (1152, 584, 1)), ValueError, "of 576 >= 1168"),
        (strided((3, 2, 584), (1728, 576, 1)), ValueError, "data: got strides (1728, 576, 1)"),
        (strided((3, 2, 584), (1728, 584, 2)), ValueError, "data: got strides (1728, 584, 2)"),
        (strided((3, 2, 584), (1728, 584, 1), 8), ValueError, "data: data pointer is 8 bytes off a 16-byte boundary"),
    ],
)
def test_tensors_that_are_no_cache(data: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KVCache(data, Dialect.FN)


def test_a_cache_needs_a_known_dialect() -> None:
    with pytest.raises(ValueError, match=r"dialect: got 'fp8', expected one of \['e4m3fn', 'e4m3fnuz'\]"):
        allocate(1, 2, "fp8")


CACHE = allocate(2, 2, "e4m3fn")
ONE = torch.zeros(1, 512)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: allocate(-1, 2, "e4m3fn"), ValueError, "num_blocks: got -1, expected a non-negative integer"),
        (lambda: allocate(1, 0, "e4m3fn"), ValueError, "block_size: got 0"),
        (lambda: allocate(2, 2, "e4m3fn", stride=1800), ValueError, "1800"),
        (lambda: quantise(torch.zeros(1, 448), "e4m3fn"), ValueError, "kv: got torch.float32 (1, 448), expected"),
        (lambda: quantise(torch.zeros(512), "e4m3fn"), ValueError, "kv: got torch.float32 (512,), expected floating"),
        (lambda: quantise(ONE.to(torch.int32), "e4m3fn"), ValueError, "kv: got torch.int32 (1, 512), expected float"),
        (lambda: quantise(ONE, "e5m2"), ValueError, "dialect: got 'e5m2'"),
        (lambda: gather(CACHE, torch.tensor([0, 4])), ValueError, "slots: 4 is outside 0..3"),
        (lambda: gather(CACHE, torch.tensor([-1])), ValueError, "slots: -1 is outside 0..3"),
        (lambda: gather(CACHE, torch.tensor([0.0])), TypeError, "slots: got torch.float32 (1,), expected int32"),
        (lambda: gather(CACHE, torch.tensor([[0]])), TypeError, "slots: got torch.int64 (1, 1), expected int32"),
        (lambda: insert(CACHE, torch.tensor([4]), ONE), ValueError, "slots: 4 is outside 0..3"),
        (lambda: insert(CACHE, torch.tensor([0, 1]), ONE), ValueError, "kv: got 1 rows for 2 slots, expected one row"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def _parts(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return quantise(torch.zeros(rows, 512), "e4m3fn")


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: allocate(2, 2, "e4m3fn", stride=576), ValueError, "stride"),
        (lambda: allocate(1, 2, "e4m3fn", fill=300), ValueError, "fill"),
        (lambda: gather(CACHE, [0]), TypeError, "slots"),  # type: ignore[arg-type]
        (lambda: insert(CACHE, torch.tensor([0]), torch.tensor(1.0)), ValueError, "kv"),
        (lambda: dequantise(_parts(2)[0], _parts(1)[1], _parts(2)[2], "e4m3fn"), ValueError, "scales"),
        (lambda: dequantise(torch.zeros(7, 64).to(torch.uint8), *_parts(1)[1:], "e4m3fn"), ValueError, "codes"),
        (lambda: dequantise(*_parts(2)[:2], _parts(1)[2], "e4m3fn"), ValueError, "rope"),
    ],
    ids=["stride too small", "fill", "slots list", "kv scalar", "scales rows", "codes shape", "rope rows"],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"\b{argument}: got .*, expected"):
        call()
