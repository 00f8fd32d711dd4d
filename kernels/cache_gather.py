"""Rows out of a paged FP8 cache, and the cache's conversion between e4m3 dialects without re-encoding it.

`gather_entries` reads and dequantises entries in the dialect that *this cache* says it is written in; two caches of one
decode step may differ. It shares its inner function with the sparse decode, so what is proved about one reader holds
for the other.

`relabel_entries` rewrites a cache from one dialect to the other in place. The same byte is half as much in fnuz, so the
codes stay and the scale byte moves by one. Three codes have no such partner::

    e4m3fn   -> e4m3fnuz   0x80 (-0)      -> 0x00 (+0)      0x7F, 0xFF (NaN) -> 0x80 (NaN)   scale byte + 1
    e4m3fnuz -> e4m3fn     0x80 (NaN)     -> 0x7F (NaN)     0x7F, 0xFF (+-240): no partner   scale byte - 1

Reference: `dsv4ref.formats.kv_cache.gather`, `dsv4ref.formats.fp8.from_fn_to_fnuz`. Layout:
`dsv4ref.formats.kv_cache`. Source of the relation: OCP OFP8 rev. 1.0; LLVM APFloat ``Float8E4M3FNUZ``.
Hazards: H17, H18.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, SCALE_BLOCK, SCALE_COUNT, KVCache
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture, decode_mode
from dsv4ref.kernels.sparse_mla.decode import _load_keys

__all__ = ["GATHER_ROWS", "RELABEL_ENTRIES", "gather_entries", "relabel_entries", "unconvertible_blocks"]

GATHER_ROWS = 8
"""Entries one gather program reads."""
RELABEL_ENTRIES = 16
"""Most entries one conversion program rewrites; fewer where a block holds fewer."""

# Layout constants as the kernels see them; equal to those of formats.kv_cache (a test holds that).
_DIM = tl.constexpr(512)
_ROW_BYTES = tl.constexpr(576)
_ROW_WORDS = tl.constexpr(144)
_CODE_WORDS = tl.constexpr(112)
_SCALE_COUNT = tl.constexpr(7)
_SCALE_SLOTS = tl.constexpr(8)


@triton.jit
def _gather_entries_kernel(
    cache,
    slots,
    out,
    count,
    num_rows,
    block_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out[n] = code * 2^(byte - 127) for dims 0..447, the stored bf16 for dims 448..511; zeros for invalid slots."""
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = lanes < count
    wanted = tl.load(slots + lanes, mask=live, other=-1)
    valid = (wanted >= 0) & (wanted < num_rows)
    keys = _load_keys(cache, block_stride, wanted, valid, BLOCK_SIZE, MODE, ROWS)  # [ROWS, 512]
    dims = tl.arange(0, _DIM)
    tl.store(out + lanes[:, None].to(tl.int64) * out_stride + dims[None, :], keys, mask=live[:, None])


@triton.jit
def _zero_bytes(words):
    """0x80 in every byte of ``words`` that is zero, 0x00 in the others; no carry crosses a byte."""
    return ((((words & 0x7F7F7F7F) + 0x7F7F7F7F) | words) ^ 0xFFFFFFFF) & 0x80808080


@triton.jit
def _relabel_entries_kernel(
    cache, block_stride, BLOCK_SIZE: tl.constexpr, TO_FNUZ: tl.constexpr, ENTRIES: tl.constexpr
):
    """Rewrite the codes of ENTRIES entries four at a time, where they change at all, and shift their scales by one."""
    # int64 before the product: block * stride passes 2^31 in caches of a few GB (H26).
    block = cache + tl.program_id(0).to(tl.int64) * block_stride
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    live = entries < BLOCK_SIZE

    lanes = tl.arange(0, 128)
    at = block.to(tl.pointer_type(tl.int32)) + entries[:, None] * _ROW_WORDS + lanes[None, :]
    inside = live[:, None] & (lanes < _CODE_WORDS)[None, :]
    words = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    is_0x80 = _zero_bytes(words ^ 0x80808080)
    if TO_FNUZ:
        nan = _zero_bytes((words & 0x7F7F7F7F) ^ 0x7F7F7F7F)
        low_bits = nan - (nan >> 7)  # 0x7F in the bytes that are NaN
        new = ((words ^ is_0x80) & (low_bits ^ 0xFFFFFFFF)) | nan
    else:
        new = (words ^ is_0x80) | (is_0x80 - (is_0x80 >> 7))
    tl.store(at, new.to(tl.int32, bitcast=True), mask=inside & (new != words))

    groups = tl.arange(0, _SCALE_SLOTS)
    scale_at = block + BLOCK_SIZE * _ROW_BYTES + entries[:, None] * _SCALE_SLOTS + groups[None, :]
    counted = live[:, None] & (groups < _SCALE_COUNT)[None, :]
    scale = tl.load(scale_at, mask=counted, other=127).to(tl.int32)
    if TO_FNUZ:
        moved = tl.minimum(scale + 1, 255)
    else:
        moved = tl.where(scale == 255, 255, tl.maximum(scale - 1, 0))
    tl.store(scale_at, moved.to(tl.uint8), mask=counted)


def gather_entries(cache: KVCache, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Read and dequantise cache entries in the cache's own dialect, one kernel launch.

    Args:
        cache: the paged cache; its ``dialect`` decides how codes are read, never the platform.
        slots: int32 ``[N]`` contiguous. A slot below 0 or at least ``cache.rows`` gives a row of zeros.
        out: bf16 ``[N, 512]`` to write into, unit last stride, sharing no memory with cache or slots; allocated if
            None.

    Returns:
        bf16 ``[N, 512]``: exact wherever the product is a normal bf16; NaN for NaN codes and NaN scales.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, stride, device, or an output that overlaps an input.
    """
    _check_cache(cache)
    where = cache.data.device
    checks.check_tensor("slots", slots, dtype=torch.int32, shape=("N",), device=where, contiguous=True)
    count = int(slots.shape[0])
    if out is None:
        out = torch.empty((count, HEAD_DIM), dtype=torch.bfloat16, device=where)
    else:
        checks.check_tensor("out", out, dtype=torch.bfloat16, shape=(count, HEAD_DIM), device=where)
        checks.check_writable_rows("out", out)
        checks.check_no_overlap("out", out, "the cache", cache.data)
        checks.check_no_overlap("out", out, "slots", slots)
    mode = decode_mode(cache.dialect, architecture(where))
    if count:
        _gather_entries_kernel[(triton.cdiv(count, GATHER_ROWS),)](
            cache.data, slots, out, count, cache.rows, cache.block_stride, out.stride(0),
            BLOCK_SIZE=cache.block_size, MODE=mode, ROWS=GATHER_ROWS, num_warps=4,
        )  # fmt: skip
    return out


def unconvertible_blocks(cache: KVCache, to: Dialect | str) -> int:
    """How many 64-code blocks cannot be relabelled: a host-side count, which waits for the device.

    To fnuz: blocks whose scale byte is 254, since 2^128 has no byte. To OCP: blocks that hold +-240 (0x7F, 0xFF), which
    writers that scale under 240 store, and non-zero blocks with scale byte 0. Blocks with a NaN scale (255) are NaN in
    both dialects.

    Args:
        cache: what would be converted.
        to: the dialect it would be converted to.
    """
    _check_cache(cache)
    to = Dialect.of(to, argument="to")
    if to is cache.dialect:
        return 0
    scales = cache.entry_scales[..., :SCALE_COUNT]
    if to is Dialect.FNUZ:
        return int((scales == 254).sum())
    magnitude = cache.entry_rows[..., :NOPE_DIM] & 0x7F
    magnitude = magnitude.reshape(*scales.shape, SCALE_BLOCK)
    stuck = (magnitude == 0x7F).any(dim=-1) | ((scales == 0) & (magnitude != 0).any(dim=-1))
    return int((stuck & (scales != 255)).sum())


def relabel_entries(cache: KVCache, to: Dialect | str, *, check: bool = True) -> KVCache:
    """Convert a cache to the other dialect in place, without re-encoding it: one kernel launch.

    Every block written under `Dialect.writer_max` converts, and dequantises to the same numbers (-0 becomes +0). The
    caller must drop its old `KVCache`, which still carries the old dialect.

    Args:
        cache: what to convert; its bytes change.
        to: the dialect wanted; a cache already in it is returned untouched.
        check: refuse caches with blocks that do not convert. Waits for the device, so switch it off under graph
            capture; then +-240 becomes NaN, scale byte 254 becomes NaN, and scale byte 0 stays (twice the value).

    Returns:
        KVCache over the same memory, in the dialect ``to``.

    Raises:
        TypeError, ValueError: not a cache or dialect, or (with ``check``) blocks that do not convert; nothing is
            written then.
    """
    _check_cache(cache)
    to = Dialect.of(to, argument="to")
    if to is cache.dialect:
        return cache
    architecture(cache.data.device)  # refuses CPU tensors where kernels are compiled
    if check and (stuck := unconvertible_blocks(cache, to)):
        raise ValueError(
            f"cache: {stuck} blocks of {SCALE_BLOCK} codes hold +-240 or a scale at the end of its range, expected "
            f"codes written under {cache.dialect.writer_max:g} (re-encode those to {to.value})"
        )
    if cache.rows:
        entries = min(RELABEL_ENTRIES, triton.next_power_of_2(cache.block_size))
        grid = (cache.num_blocks, triton.cdiv(cache.block_size, entries))
        _relabel_entries_kernel[grid](
            cache.data, cache.block_stride, BLOCK_SIZE=cache.block_size, TO_FNUZ=to is Dialect.FNUZ, ENTRIES=entries,
            num_warps=4,
        )  # fmt: skip
    return KVCache(cache.data, to)


def _check_cache(cache: object) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a KVCache")
