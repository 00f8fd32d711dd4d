"""Cache entries gathered from ragged slot lists into dense rows that the caller owns and keeps.

Attention kernels that walk dense rows only cannot read a paged 584-byte cache; somebody copies the entries first, one
row for every position of a scope's lists. Three formats, all with one validity byte per row::

    scales kept   448 e4m3 codes | 7 UE8M0 bytes, validity | 64 bf16      584 bytes   the cache's numbers
    bf16          512 bf16       | validity                              1025 bytes   the cache's numbers
    unit scale    512 e4m3 codes | validity                               513 bytes   value / 1, rounded again (H21)

Scales kept is the cache entry with its planes apart: codes, scale bytes and rope rows each start on a multiple of 64, 8
and 128 bytes. Rope stays bf16, because it was never quantised. The validity byte stands in the pad byte of the scales.
Rows of slots that are none hold zero codes, zero rope and validity 0, under scale bytes that mean nothing; a zero key
is still a key, so the consumer must look.

Reference: `dsv4ref.formats.kv_cache.gather`. Layout of the source: `dsv4ref.formats.kv_cache`.
Source of the unit-scale format, kept for comparison: ROCm/vllm#900 (dequantised to bf16, then cast to FP8).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, ROPE_DIM, SCALE_SLOTS
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture, decode_mode
from dsv4ref.kernels.sparse_mla.decode import _load_keys

__all__ = [
    "GATHER_ROWS",
    "GatherBuffer",
    "GatheredScope",
    "Kind",
    "allocate_buffer",
    "entry_bytes",
    "gather_bf16",
    "gather_fp8",
    "gather_unit_scale",
]

GATHER_ROWS = 8
"""Rows one gather program writes."""

# Layout constants as the kernels see them; equal to those of formats.kv_cache (a test holds that).
_NOPE = tl.constexpr(448)
_DIM = tl.constexpr(512)
_ROW_BYTES = tl.constexpr(576)
_ROPE_WORDS = tl.constexpr(32)
_SCALE_SLOTS = tl.constexpr(8)


class Kind(enum.StrEnum):
    """What a row of a gather buffer holds."""

    SCALES_KEPT = "scales kept"
    BF16 = "bf16"
    UNIT_SCALE = "unit scale"


_VALUES = {
    Kind.SCALES_KEPT: (NOPE_DIM, torch.uint8),
    Kind.BF16: (HEAD_DIM, torch.bfloat16),
    Kind.UNIT_SCALE: (HEAD_DIM, torch.uint8),
}


def entry_bytes(kind: Kind) -> int:
    """Bytes of one row, its validity byte included."""
    width, dtype = _VALUES[Kind(kind)]
    return width * dtype.itemsize + (SCALE_SLOTS + 2 * ROPE_DIM if kind is Kind.SCALES_KEPT else 1)


@dataclass(frozen=True)
class GatherBuffer:
    """Dense rows in memory that outlives a step: its addresses are what a captured graph holds.

    Args:
        kind: what a row holds.
        dialect: which e4m3 the codes are in; of no meaning to `Kind.BF16`.
        values: uint8 ``[capacity, 448]`` codes, bf16 ``[capacity, 512]``, or uint8 ``[capacity, 512]`` codes.
        tags: uint8 ``[capacity, 8]``, seven scale bytes and the validity byte; ``[capacity, 1]``, validity alone, for
            the other kinds. Validity is 0 for a row without an entry.
        rope: bf16 ``[capacity, 64]`` for `Kind.SCALES_KEPT`, None for the others.

    Raises:
        TypeError, ValueError: a plane of another dtype, shape, device or layout, naming it.
    """

    kind: Kind
    dialect: Dialect
    values: Tensor
    tags: Tensor
    rope: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, Kind):
            raise TypeError(f"kind: got {self.kind!r}, expected a Kind")
        object.__setattr__(self, "dialect", Dialect.of(self.dialect))
        width, dtype = _VALUES[self.kind]
        kept = self.kind is Kind.SCALES_KEPT
        checks.check_tensor("values", self.values, dtype=dtype, shape=("capacity", width), contiguous=True)
        where, shape = self.values.device, (self.capacity, SCALE_SLOTS if kept else 1)
        checks.check_tensor("tags", self.tags, dtype=torch.uint8, shape=shape, device=where, contiguous=True)
        if kept:
            shape = (self.capacity, ROPE_DIM)
            checks.check_tensor("rope", self.rope, dtype=torch.bfloat16, shape=shape, device=where, contiguous=True)
        elif self.rope is not None:
            raise ValueError(f"rope: got a tensor, expected None for {self.kind.value} rows, which hold rope in values")

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return int(self.values.shape[0])

    @property
    def valid(self) -> Tensor:
        """uint8 view ``[capacity]`` of the validity bytes."""
        return self.tags[:, -1]

    @property
    def planes(self) -> dict[str, Tensor]:
        """The tensors that make the buffer, by name."""
        found = {"values": self.values, "tags": self.tags}
        return found if self.rope is None else {**found, "rope": self.rope}


@dataclass(frozen=True)
class GatheredScope:
    """A scope whose entries lie in a gather buffer: row t's keys are rows ``indptr[t]`` to ``indptr[t + 1]``.

    Args:
        buffer: where the entries are.
        indptr: int32 ``[T + 1]`` contiguous, the gathered scope's own.
        width: the widest a row can be in the steady state.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank or device, naming the field.
    """

    buffer: GatherBuffer
    indptr: Tensor
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.buffer, GatherBuffer):
            raise TypeError(f"buffer: got {type(self.buffer).__name__}, expected a GatherBuffer")
        where = self.buffer.values.device
        checks.check_tensor("indptr", self.indptr, dtype=torch.int32, shape=("T + 1",), device=where, contiguous=True)
        if self.indptr.numel() < 1:
            raise ValueError("indptr: got no elements, expected T + 1 (at least 1)")
        if not isinstance(self.width, int) or self.width < 0:
            raise ValueError(f"width: got {self.width!r}, expected a non-negative integer")

    @property
    def num_queries(self) -> int:
        """T, the query rows the lists are for."""
        return int(self.indptr.numel()) - 1


def allocate_buffer(
    capacity: int, kind: Kind, dialect: Dialect | str, *, device: torch.device | str = "cpu"
) -> GatherBuffer:
    """Allocate a buffer whose rows are valid and NaN until they are gathered: a row nobody wrote is heard.

    Args:
        capacity: rows, at least the capacity of the longest index list that will be gathered into it.
        kind: what a row holds.
        dialect: which e4m3 will be written.
        device: where.

    Returns:
        GatherBuffer; raises ValueError on a capacity that is no count.
    """
    if not isinstance(capacity, int) or capacity < 0:
        raise ValueError(f"capacity: got {capacity!r}, expected a non-negative integer")
    dialect = Dialect.of(dialect)
    width, dtype = _VALUES[Kind(kind)]
    nan: float = float("nan") if dtype is torch.bfloat16 else _NAN_CODES[dialect]
    kept = kind is Kind.SCALES_KEPT
    return GatherBuffer(
        kind=Kind(kind),
        dialect=dialect,
        values=torch.full((capacity, width), nan, dtype=dtype, device=device),
        tags=torch.full((capacity, SCALE_SLOTS if kept else 1), 0xFF, dtype=torch.uint8, device=device),
        rope=torch.full((capacity, ROPE_DIM), torch.nan, dtype=torch.bfloat16, device=device) if kept else None,
    )


_NAN_CODES = {Dialect.FN: 0x7F, Dialect.FNUZ: 0x80}


# --- kernels ---


@triton.jit
def _listed(indices, indptr, num_queries, capacity, num_rows, ROWS: tl.constexpr):
    """This program's list positions: (lane int64, is a position, slot, is an entry)."""
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # The live length is on the device: the grid covers the capacity, and a graph replays with any length below it.
    live = lanes < tl.minimum(tl.load(indptr + num_queries), capacity)
    slots = tl.load(indices + lanes, mask=live, other=-1)
    return lanes.to(tl.int64), live, slots, (slots >= 0) & (slots < num_rows)


@triton.jit
def _gather_scaled_kernel(
    cache,
    indices,
    indptr,
    codes,
    tags,
    rope,
    num_queries,
    capacity,
    num_rows,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    CONVERT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """codes, scale bytes and rope of each listed entry, as they are or relabelled to the other dialect."""
    at, live, slots, valid = _listed(indices, indptr, num_queries, capacity, num_rows, ROWS)
    # int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    block = cache + (slots // BLOCK_SIZE).to(tl.int64) * block_stride
    position = slots % BLOCK_SIZE

    dims = tl.arange(0, _DIM)
    is_nope = (dims < _NOPE)[None, :]
    entry = block + position * _ROW_BYTES
    code = tl.load(entry[:, None] + dims[None, :], mask=valid[:, None] & is_nope, other=0)
    groups = tl.arange(0, _SCALE_SLOTS)
    is_scale = (groups < _SCALE_SLOTS - 1)[None, :]
    scale_at = block + BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS
    scale = tl.load(scale_at[:, None] + groups[None, :], mask=valid[:, None] & is_scale, other=127).to(tl.int32)

    # Codes stay and scale bytes move by one, but for -0 and the NaN codes; +-240 are OCP's NaN as they stand.
    if CONVERT == "to_fnuz":
        code = tl.where(code == 0x80, 0, tl.where((code & 0x7F) == 0x7F, 0x80, code)).to(tl.uint8)
        scale = tl.minimum(scale + 1, 255)
    elif CONVERT == "to_fn":
        code = tl.where(code == 0x80, 0x7F, code).to(tl.uint8)
        scale = tl.where(scale == 255, 255, tl.maximum(scale - 1, 0))
    else:
        tl.static_assert(CONVERT == "none")

    tl.store(codes + at[:, None] * _NOPE + dims[None, :], code, mask=live[:, None] & is_nope)
    tag = tl.where(is_scale, scale, valid[:, None].to(tl.int32)).to(tl.uint8)
    tl.store(tags + at[:, None] * _SCALE_SLOTS + groups[None, :], tag, mask=live[:, None])
    # Rope as words: a copy, payloads of NaNs included.
    words = tl.arange(0, _ROPE_WORDS)
    rope_at = (entry + _NOPE).to(tl.pointer_type(tl.int32))
    word = tl.load(rope_at[:, None] + words[None, :], mask=valid[:, None], other=0)
    rope_words = rope.to(tl.pointer_type(tl.int32))
    tl.store(rope_words + at[:, None] * _ROPE_WORDS + words[None, :], word, mask=live[:, None])


@triton.jit
def _encode_codes(values, FNUZ: tl.constexpr):
    """fp32 -> uint8 e4m3 codes, ties to even, saturating: `formats.fp8.encode`, by bits, on every architecture."""
    # e4m3fn: bias 7, 448 at most, smallest normal 2^-6; e4m3fnuz: bias 8, 240 at most, smallest normal 2^-7.
    BIAS: tl.constexpr = 8 if FNUZ else 7
    MOST: tl.constexpr = 240.0 if FNUZ else 448.0
    NORMAL: tl.constexpr = 0.0078125 if FNUZ else 0.015625
    ULP_SHIFT: tl.constexpr = 8192.0 if FNUZ else 16384.0  # 2^23 times the spacing of subnormal codes
    nan = values != values
    size = tl.where(nan, 0.0, tl.minimum(tl.abs(values), MOST))
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - BIAS) << 3)
    # Adding 2^23 spacings leaves the count of spacings, rounded to even, in the low bits.
    subnormal = (size + ULP_SHIFT).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < NORMAL, subnormal, normal)
    negative = (values.to(tl.int32, bitcast=True) < 0) & ((code != 0) | (not FNUZ))
    code = tl.where(negative, code | 0x80, code)
    return tl.where(nan, 0x80 if FNUZ else 0x7F, code).to(tl.uint8)


@triton.jit
def _gather_values_kernel(
    cache,
    indices,
    indptr,
    out,
    tags,
    num_queries,
    capacity,
    num_rows,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Dequantised entries as bf16, or cast back to e4m3 with scale 1."""
    at, live, slots, valid = _listed(indices, indptr, num_queries, capacity, num_rows, ROWS)
    keys = _load_keys(cache, block_stride, slots, valid, BLOCK_SIZE, MODE, ROWS)  # bf16 [ROWS, 512]
    if STORE == "bf16":
        stored = keys
    elif STORE == "fn":
        stored = _encode_codes(keys.to(tl.float32), False)
    else:
        tl.static_assert(STORE == "fnuz")
        stored = _encode_codes(keys.to(tl.float32), True)
    dims = tl.arange(0, _DIM)
    tl.store(out + at[:, None] * _DIM + dims[None, :], stored, mask=live[:, None])
    tl.store(tags + at, valid.to(tl.uint8), mask=live)


# --- launchers ---


def gather_fp8(scope: Scope, into: GatherBuffer) -> GatheredScope:
    """Gather a scope's entries into FP8 rows with their block scales kept, one kernel launch.

    Every position of the lists gets a row, the others keep what they held. The target's dialect need not be the
    cache's: codes stay and scale bytes move by one, which is exact for every block that
    `cache_gather.unconvertible_blocks` does not count. Those: +-240 becomes NaN, scale byte 254 becomes NaN on the way
    to fnuz, scale byte 0 stays on the way to OCP (twice the value).

    Args:
        scope: what to gather.
        into: a `Kind.SCALES_KEPT` buffer with room for ``scope.indices``, sharing no memory with the scope.

    Returns:
        GatheredScope over ``into`` and the scope's own ``indptr``, which may be refreshed in place between steps.

    Raises:
        TypeError, ValueError: a wrong type, kind, capacity or device, or memory that overlaps.
    """
    return _gather(scope, into, Kind.SCALES_KEPT)


def gather_bf16(scope: Scope, into: GatherBuffer) -> GatheredScope:
    """Gather and dequantise a scope's entries into bf16 rows, one kernel launch.

    Args, returns and raises as `gather_fp8`, for a `Kind.BF16` buffer.
    """
    return _gather(scope, into, Kind.BF16)


def gather_unit_scale(scope: Scope, into: GatherBuffer) -> GatheredScope:
    """Gather, dequantise to bf16 and cast to FP8 with scale 1, all 512 dims: the source's format, for comparison only.

    Values beyond the dialect's maximum saturate. Args, returns and raises as `gather_fp8`, for a `Kind.UNIT_SCALE`
    buffer.
    """
    return _gather(scope, into, Kind.UNIT_SCALE)


def _gather(scope: Scope, into: GatherBuffer, kind: Kind) -> GatheredScope:
    _check_gather(scope, into, kind)
    cache = scope.cache
    capacity, lists = scope.indices.numel(), (cache.data, scope.indices, scope.indptr)
    sizes = scope.num_queries, capacity, cache.rows, cache.block_stride
    arch = architecture(cache.data.device)
    grid = (triton.cdiv(capacity, GATHER_ROWS),)
    if capacity and kind is Kind.SCALES_KEPT:
        convert = "none" if into.dialect is cache.dialect else f"to_{_suffix(into.dialect)}"
        _gather_scaled_kernel[grid](
            *lists, into.values, into.tags, into.rope, *sizes,
            BLOCK_SIZE=cache.block_size, CONVERT=convert, ROWS=GATHER_ROWS, num_warps=4,
        )  # fmt: skip
    elif capacity:
        _gather_values_kernel[grid](
            *lists, into.values, into.tags, *sizes,
            BLOCK_SIZE=cache.block_size, MODE=decode_mode(cache.dialect, arch),
            STORE="bf16" if kind is Kind.BF16 else _suffix(into.dialect), ROWS=GATHER_ROWS, num_warps=4,
        )  # fmt: skip
    return GatheredScope(into, scope.indptr, scope.width)


def _suffix(dialect: Dialect) -> str:
    return dialect.value.removeprefix("e4m3")


def _check_gather(scope: object, into: object, kind: Kind) -> None:
    if not isinstance(scope, Scope):
        raise TypeError(f"scope: got {type(scope).__name__}, expected a Scope")
    if not isinstance(into, GatherBuffer):
        raise TypeError(f"into: got {type(into).__name__}, expected a GatherBuffer")
    if into.kind is not kind:
        raise ValueError(f"into: got a buffer of {into.kind.value} rows, expected {kind.value}")
    if into.values.device != scope.cache.data.device:
        raise ValueError(f"into: on {into.values.device}, expected {scope.cache.data.device} like the cache")
    if into.capacity < scope.indices.numel():
        raise ValueError(f"into: got {into.capacity} rows, expected at least {scope.indices.numel()}, the list's room")
    read = {"the cache": scope.cache.data, "the indices": scope.indices, "the indptr": scope.indptr}
    for plane, tensor in into.planes.items():
        for name, other in read.items():
            checks.check_no_overlap(f"into.{plane}", tensor, name, other)
