"""The gathers: bytes and numbers against the formats, both dialects, rows that are none, persistence, bad arguments."""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit signature takes no Python types)

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dsv4ref.kernels.sparse_mla import fp8_gather, gathered_decode  # before triton: this decides how kernels run

# isort: split
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.evidence.compare import identical
from dsv4ref.formats import Dialect, KVCache, Scope, fp8, kv_cache
from dsv4ref.formats.kv_cache import ENTRY_BYTES, HEAD_DIM, NOPE_DIM, ROPE_DIM, ROW_BYTES, SCALE_COUNT, SCALE_SLOTS
from dsv4ref.formats.scope import ragged
from dsv4ref.kernels.cache_gather import relabel_entries, unconvertible_blocks
from dsv4ref.kernels.sparse_mla.fp8_gather import (
    GatherBuffer,
    GatheredScope,
    Kind,
    allocate_buffer,
    entry_bytes,
    gather_bf16,
    gather_fp8,
    gather_unit_scale,
)

FN, FNUZ = Dialect.FN, Dialect.FNUZ
BOTH = pytest.mark.parametrize("dialect", list(Dialect))
GATHERS = {Kind.SCALES_KEPT: gather_fp8, Kind.BF16: gather_bf16, Kind.UNIT_SCALE: gather_unit_scale}
KINDS = pytest.mark.parametrize("kind", list(Kind))
LISTS = [[3, -1, 20], [], [7, 7, 0, 2**31 - 1], [-(2**31), 1]]  # duplicates, holes, an empty row
ENTRIES = 21


def filled(dialect: Dialect, rng: torch.Generator, device: str, block: int = 64) -> KVCache:
    """A poisoned cache whose blocks differ in size by 2^12, with codes that underflow to -0 and a NaN rope payload."""
    cache = kv_cache.allocate(-(-ENTRIES // block) + 1, block, dialect, device=device, fill=0xFF)
    kv = torch.randn((ENTRIES, HEAD_DIM), generator=rng)
    size = torch.randint(-6, 6, (ENTRIES, HEAD_DIM // 64), generator=rng)
    kv *= torch.exp2(size).repeat_interleave(64, dim=1)
    kv[:, 3::97] = -1e-9
    kv_cache.insert(cache, torch.arange(ENTRIES, device=device), kv.to(device))
    cache.entry_rows[0, 0, NOPE_DIM] = 0xA5
    cache.entry_rows[0, 0, NOPE_DIM + 1] = 0x7F
    return cache


def scope_of(cache: KVCache, lists: Any = LISTS) -> Scope:
    return Scope(cache, *ragged(lists, cache.data.device), width=4)


def gathered(kind: Kind, scope: Scope, target: Dialect, room: int = 3) -> GatheredScope:
    into = allocate_buffer(scope.indices.numel() + room, kind, target, device=scope.indices.device)
    return GATHERS[kind](scope, into)


def entries_of(scope: Scope) -> tuple[Tensor, Tensor]:
    """(position is an entry, slots of those)."""
    slots = scope.indices[: int(scope.indptr[-1])].to(torch.int64)
    valid = (slots >= 0) & (slots < scope.cache.rows)
    return valid, slots[valid]


def assert_same(name: str, got: Tensor, want: Tensor) -> None:
    found = identical(name, got.contiguous(), want.contiguous())
    assert found.passed, found.detail


# --- what a row holds ---


@BOTH
@pytest.mark.parametrize("block", [1, 2, 64, 256])
def test_rows_are_the_caches_own_bytes(dialect: Dialect, block: int, rng: torch.Generator, device: str) -> None:
    scope = scope_of(filled(dialect, rng, device, block))
    rows = gathered(Kind.SCALES_KEPT, scope, dialect).buffer
    valid, slots = entries_of(scope)
    at, position = slots // block, slots % block
    data, scales = scope.cache.entry_rows[at, position], scope.cache.entry_scales[at, position]
    count = len(valid)
    assert rows.rope is not None
    assert_same("codes", rows.values[:count][valid], data[:, :NOPE_DIM])
    assert_same("scales", rows.tags[:count, :SCALE_COUNT][valid], scales[:, :SCALE_COUNT])
    assert_same("rope", rows.rope[:count][valid].view(torch.uint8), data[:, NOPE_DIM:])


@KINDS
@BOTH
def test_slots_that_are_none_give_zeros_and_no_validity(
    kind: Kind, dialect: Dialect, rng: torch.Generator, device: str
) -> None:
    scope = scope_of(filled(dialect, rng, device))
    rows = gathered(kind, scope, dialect).buffer
    valid, _ = entries_of(scope)
    assert_same("validity", rows.valid[: len(valid)], valid.to(torch.uint8))
    none = ~valid
    assert int(none.sum()) == 3
    assert (rows.values[: len(valid)][none] == 0).all()
    if rows.rope is not None:
        assert (rows.rope[: len(valid)][none] == 0).all()
        assert (rows.tags[: len(valid)][none][:, :SCALE_COUNT] == 127).all()


@BOTH
def test_bf16_rows_are_the_formats_numbers(dialect: Dialect, rng: torch.Generator, device: str) -> None:
    scope = scope_of(filled(dialect, rng, device))
    rows = gathered(Kind.BF16, scope, dialect).buffer
    valid, slots = entries_of(scope)
    got, want = rows.values[: len(valid)][valid], kv_cache.gather(scope.cache, slots)
    assert_same("NaN mask", got.isnan(), want.isnan())
    assert_same("values", got.nan_to_num(), want.nan_to_num())


@BOTH
@pytest.mark.parametrize("target", list(Dialect))
def test_unit_scale_rows_are_the_formats_numbers_encoded_without_a_scale(
    dialect: Dialect, target: Dialect, rng: torch.Generator, device: str
) -> None:
    scope = scope_of(filled(dialect, rng, device))
    rows = gathered(Kind.UNIT_SCALE, scope, target).buffer
    valid, slots = entries_of(scope)
    want = fp8.encode(kv_cache.gather(scope.cache, slots), target)
    got = rows.values[: len(valid)][valid]
    nan = fp8.decode(want, target).isnan()  # OCP has two NaN codes
    assert_same("NaN mask", fp8.decode(got, target).isnan(), nan)
    assert_same("codes", got[~nan], want[~nan])


@triton.jit
def _encode_all(values, out, count, FNUZ: tl.constexpr):
    lanes = tl.program_id(0) * 256 + tl.arange(0, 256)
    live = lanes < count
    tl.store(out + lanes, fp8_gather._encode_codes(tl.load(values + lanes, mask=live, other=0.0), FNUZ), mask=live)


@BOTH
def test_the_encoder_rounds_every_neighbourhood_as_the_formats_do(dialect: Dialect, device: str) -> None:
    """All codes, the middles between them, one fp32 step to either side of both, and what lies beyond."""
    codes = fp8.decode(torch.arange(256).to(torch.uint8), dialect)
    numbers = codes[codes.isfinite()].unique()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    ends = torch.tensor([239.0, 248.0, 250.0, 449.0, 1e4, 3e38, torch.inf, 1e-45, 2.0**-127, 0.0, -0.0, torch.nan])
    values = torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down), ends, -ends])
    out = torch.full((len(values),), 0xAA, dtype=torch.uint8, device=device)
    grid = (triton.cdiv(len(values), 256),)
    _encode_all[grid](values.to(device), out, len(values), FNUZ=dialect is FNUZ)
    want = fp8.encode(values, dialect)
    nan = values.isnan()
    wrong = ((out.cpu() != want) & ~nan).nonzero()[:, 0].tolist()
    assert not wrong, [(values[i].item(), int(out[i]), int(want[i])) for i in wrong[:3]]
    assert fp8.decode(out.cpu(), dialect)[nan].isnan().all()


# --- the other dialect ---


@BOTH
def test_rows_in_the_other_dialect_are_a_converted_caches_rows(
    dialect: Dialect, rng: torch.Generator, device: str
) -> None:
    """Codes and scale bytes equal those of `relabel_entries`, and the numbers stay."""
    to = FN if dialect is FNUZ else FNUZ
    scope = scope_of(filled(dialect, rng, device))
    assert unconvertible_blocks(KVCache(scope.cache.data[:-1], dialect), to) == 0
    rows = gathered(Kind.SCALES_KEPT, scope, to).buffer
    valid, slots = entries_of(scope)
    assert rows.rope is not None
    got = [plane[: len(valid)][valid] for plane in (rows.values, rows.tags[:, :SCALE_COUNT], rows.rope)]
    want = kv_cache.gather(scope.cache, slots) + 0.0
    read = kv_cache.dequantise(got[0], got[1], got[2], to) + 0.0
    assert_same("numbers", read.nan_to_num(), want.nan_to_num())

    converted = relabel_entries(scope.cache, to, check=False)
    at, position = slots // scope.cache.block_size, slots % scope.cache.block_size
    assert_same("codes", got[0], converted.entry_rows[at, position][:, :NOPE_DIM])
    assert_same("scales", got[1], converted.entry_scales[at, position][:, :SCALE_COUNT])


@BOTH
def test_every_code_under_every_scale_converts_or_is_one_of_the_named_exceptions(dialect: Dialect, device: str) -> None:
    """256 codes x 256 scale bytes: equal numbers but for +-240, and scales at the ends of their range."""
    to = FN if dialect is FNUZ else FNUZ
    cache = kv_cache.allocate(147, 1, dialect, device=device)  # 147 entries of 7 blocks hold 1024 blocks of 64 codes
    codes = torch.arange(256, device=device).repeat(256).to(torch.uint8)
    scales = torch.arange(256, device=device).repeat_interleave(4).to(torch.uint8)
    flat = torch.zeros(147 * NOPE_DIM, dtype=torch.uint8, device=device)
    flat[: len(codes)] = codes
    cache.entry_rows[:, 0, :NOPE_DIM] = flat.reshape(147, NOPE_DIM)
    bytes_ = torch.full((147 * SCALE_COUNT,), 127, dtype=torch.uint8, device=device)
    bytes_[: len(scales)] = scales
    cache.entry_scales[:, 0, :SCALE_COUNT] = bytes_.reshape(147, SCALE_COUNT)
    rows = gathered(Kind.SCALES_KEPT, scope_of(cache, [list(range(147))]), to, room=0).buffer
    assert rows.rope is not None
    got = kv_cache.dequantise(rows.values, rows.tags[:, :SCALE_COUNT], rows.rope, to, torch.float64)
    want = kv_cache.gather(cache, torch.arange(147, device=device), torch.float64)
    got, want = (t[:, :NOPE_DIM].flatten()[: len(codes)].reshape(256, 256) for t in (got, want))
    differ = (got != want) & ~(got.isnan() & want.isnan())
    byte, code = (part.tolist() for part in differ.nonzero().T)
    exceptions = set(zip(byte, code, strict=True))
    if to is FNUZ:
        assert {b for b, _ in exceptions} == {254}
        assert got[254].isnan().all(), "2^128 has no scale byte"
    else:
        assert {c for b, c in exceptions if b != 0} == {0x7F, 0xFF}
        assert 255 not in {b for b, _ in exceptions}, "NaN scales are NaN in both"
        assert got[1:255, [0x7F, 0xFF]].isnan().all(), "+-240 has no OCP partner"
        small = [c for c in range(256) if c & 0x7F not in (0, 0x7F)]
        assert torch.equal(got[0, small], 2 * want[0, small]), "scale byte 0 cannot go down"


# --- a buffer that outlives the step ---


@KINDS
def test_positions_past_the_lists_keep_what_they_held(kind: Kind, rng: torch.Generator, device: str) -> None:
    """The live length is on the device; the grid covers the capacity, as under a captured graph."""
    scope = scope_of(filled(FN, rng, device))
    padded = replace(scope, indices=torch.cat([scope.indices, scope.indices[:5]]))  # room that indptr does not use
    into = allocate_buffer(padded.indices.numel() + 2, kind, FN, device=device)
    before = {name: plane.clone() for name, plane in into.planes.items()}
    GATHERS[kind](padded, into)
    count = int(scope.indptr[-1])
    for name, plane in into.planes.items():
        assert_same(name, plane[count:].view(torch.uint8), before[name][count:].view(torch.uint8))
        assert not torch.equal(plane[:count].view(torch.uint8), before[name][:count].view(torch.uint8)), name


@KINDS
def test_lists_refreshed_in_place_are_followed_and_addresses_stay(
    kind: Kind, rng: torch.Generator, device: str
) -> None:
    scope = scope_of(filled(FN, rng, device))
    into = allocate_buffer(scope.indices.numel(), kind, FN, device=device)
    first = GATHERS[kind](scope, into)
    pointers = [plane.data_ptr() for plane in into.planes.values()]
    shorter, indptr = ragged([[5], [], [-1, 4], []], device)
    scope.indices[:3], scope.indptr[:] = shorter, indptr
    again = GATHERS[kind](scope, into)
    assert [plane.data_ptr() for plane in again.buffer.planes.values()] == pointers
    assert again.indptr is first.indptr is scope.indptr
    fresh = gathered(kind, scope, FN)
    for name, plane in into.planes.items():
        assert_same(name, plane[:3].view(torch.uint8), fresh.buffer.planes[name][:3].view(torch.uint8))


@KINDS
def test_a_buffer_is_valid_and_nan_until_it_is_gathered_into(kind: Kind) -> None:
    for dialect in Dialect:
        rows = allocate_buffer(2, kind, dialect)
        assert (rows.valid != 0).all()
        values = rows.values if kind is Kind.BF16 else fp8.decode(rows.values, dialect)
        assert values.isnan().all()
        assert rows.rope is None or rows.rope.isnan().all()


@KINDS
def test_empty_lists_launch_nothing(kind: Kind, rng: torch.Generator, device: str) -> None:
    scope = scope_of(filled(FN, rng, device), [[], []])
    assert gathered(kind, scope, FN, room=0).num_queries == 2


@KINDS
def test_the_bytes_of_a_row_are_those_of_its_planes(kind: Kind) -> None:
    rows = allocate_buffer(1, kind, FN)
    assert sum(plane.nbytes for plane in rows.planes.values()) == entry_bytes(kind)
    assert entry_bytes(Kind.SCALES_KEPT) == ENTRY_BYTES


def test_the_kernels_layout_constants_are_the_formats() -> None:
    for module in (fp8_gather, gathered_decode):
        assert (module._NOPE.value, module._DIM.value, module._SCALE_SLOTS.value) == (NOPE_DIM, HEAD_DIM, SCALE_SLOTS)
    assert (fp8_gather._ROW_BYTES.value, fp8_gather._ROPE_WORDS.value * 4) == (ROW_BYTES, 2 * ROPE_DIM)
    assert (gathered_decode._ROPE.value, gathered_decode._SCALE_BLOCK.value) == (ROPE_DIM, kv_cache.SCALE_BLOCK)


# --- bad arguments ---


def meta(kind: Kind) -> GatherBuffer:
    return allocate_buffer(9, kind, FN, device="meta")


@pytest.mark.parametrize(
    ("scope", "into", "error", "message"),
    [
        (lambda s: s.cache, lambda b: b, TypeError, "scope: got KVCache, expected a Scope"),
        (lambda s: s, lambda b: b.values, TypeError, "into: got Tensor, expected a GatherBuffer"),
        (lambda s: s, lambda b: meta(b.kind), ValueError, "into: on meta, expected"),
        (
            lambda s: s,
            lambda b: allocate_buffer(8, b.kind, FN, device=b.values.device),
            ValueError,
            "into: got 8 rows, expected at least 9, the list's room",
        ),
    ],
)
@KINDS
def test_bad_gathers_are_refused(
    kind: Kind, scope: Any, into: Any, error: type[Exception], message: str, rng: torch.Generator, device: str
) -> None:
    right = scope_of(filled(FN, rng, device))
    buffer = allocate_buffer(9, kind, FN, device=device)
    with pytest.raises(error, match=re.escape(message)):
        GATHERS[kind](scope(right), into(buffer))


@KINDS
def test_a_buffer_of_another_kind_is_refused(kind: Kind, rng: torch.Generator, device: str) -> None:
    scope = scope_of(filled(FN, rng, device))
    other = Kind.UNIT_SCALE if kind is Kind.BF16 else Kind.BF16
    into = allocate_buffer(9, other, FN, device=device)
    with pytest.raises(ValueError, match=f"into: got a buffer of {other.value} rows, expected {kind.value}"):
        GATHERS[kind](scope, into)


def test_a_buffer_inside_the_cache_is_refused(rng: torch.Generator, device: str) -> None:
    scope = scope_of(filled(FN, rng, device))
    rows = allocate_buffer(9, Kind.SCALES_KEPT, FN, device=device)
    shared = scope.cache.data.as_strided((9, NOPE_DIM), (NOPE_DIM, 1))
    with pytest.raises(ValueError, match=r"into\.values: its memory range overlaps the cache's by \d+ bytes"):
        gather_fp8(scope, replace(rows, values=shared))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "scales kept"}, TypeError, "kind: got 'scales kept', expected a Kind"),
        ({"dialect": "e5m2"}, ValueError, "dialect: got 'e5m2', expected one of"),
        ({"values": torch.zeros(2, 512, dtype=torch.uint8)}, ValueError, "values: got shape [2, 512], expected"),
        ({"values": torch.zeros(2, 448)}, TypeError, "values: got torch.float32, expected torch.uint8"),
        ({"tags": torch.zeros(2, 1, dtype=torch.uint8)}, ValueError, "tags: got shape [2, 1], expected [2, 8]"),
        ({"tags": torch.zeros(3, 8, dtype=torch.uint8)}, ValueError, "tags: got shape [3, 8], expected [2, 8]"),
        ({"tags": torch.zeros(2, 16, dtype=torch.uint8)[:, ::2]}, ValueError, "tags: got strides (16, 2), expected a"),
        ({"rope": None}, TypeError, "rope: got NoneType, expected a torch.Tensor"),
        ({"kind": Kind.BF16, "values": torch.zeros(2, 512, dtype=torch.bfloat16),
          "tags": torch.zeros(2, 1, dtype=torch.uint8)}, ValueError, "rope: got a tensor, expected None for bf16 rows"),
    ],
)  # fmt: skip
def test_planes_that_do_not_make_a_buffer_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        replace(allocate_buffer(2, Kind.SCALES_KEPT, FN), **change)


@pytest.mark.parametrize("capacity", [-1, 2.0, None])
def test_a_capacity_that_is_no_count_is_refused(capacity: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"capacity: got {capacity!r}, expected a non-negative integer")):
        allocate_buffer(capacity, Kind.BF16, FN)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"buffer": None}, TypeError, "buffer: got NoneType, expected a GatherBuffer"),
        ({"indptr": torch.zeros(2)}, TypeError, "indptr: got torch.float32, expected torch.int32"),
        ({"indptr": torch.zeros(0, dtype=torch.int32)}, ValueError, "indptr: got no elements, expected T + 1"),
        ({"width": -1}, ValueError, "width: got -1, expected a non-negative integer"),
    ],
)
def test_fields_that_do_not_make_a_gathered_scope_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    right = GatheredScope(allocate_buffer(2, Kind.BF16, FN), torch.zeros(2, dtype=torch.int32), width=1)
    with pytest.raises(error, match=re.escape(message)):
        replace(right, **change)
