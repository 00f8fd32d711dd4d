"""The Gluon kernel behind `hopper_decode`: pieces of work of 64 heads of a row and split, warps in four roles.

Two places for key tiles in shared memory stand between the roles, each with a "full" and an "empty" mbarrier::

    fill     2 x 4 warps, 32 keys of every tile each: gather and dequantise them, bf16 [32, 512] into an empty place
    lead     4 warps: O += P K of the tile before, for dims 0..255, and behind it S = Q K^T (wgmma); online softmax in
             base 2, P to shared memory; at a piece's end they ask for the next piece's queries (cp.async)
    follow   4 warps: O += P K for dims 256..511; they ask the L2 for the next piece's queries

What a row, a split, an invalid slot and an empty list mean is what `split_decode` says; so are the parts and LSEs that
several splits leave for its reduce kernel.

Source of the idea: FlashMLA's sparse FP8 decode for sm_90 (a producer warpgroup dequantises into shared memory for
warpgroups that multiply); Triton's Gluon (`gluon.warp_specialize`, `warpgroup_mma`, `mbarrier`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4ref.kernels.sparse_mla.hopper_fill import _fill, _line_of
from dsv4ref.kernels.sparse_mla.hopper_roles import (
    _HALF,
    _HEADS,
    _KEYS,
    _LN_2,
    _LOWEST,
    _SCORES,
    _SUMS,
    _TILE,
    WARPS,
    _meet,
    _place,
    _weigh,
    _with_sink,
    _write_half,
)

__all__ = ["FILL_REGISTERS", "FOLLOW_REGISTERS", "WARPS"]

# Four groups of 128 threads share 512 registers a thread; what these leave, 208, is the lead's.
FOLLOW_REGISTERS = 160
FILL_REGISTERS = 72

_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
_ASK_LINES = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))


def _ask_asm(instruction: str) -> str:
    """PTX: a prefetch of an address; none for address 0. The result is there because an operator has one."""
    return "\n".join(["{", ".reg .pred p;", "setp.ne.b64 p, $1, 0;", f"@p {instruction};", "mov.b32 $0, 0;", "}"])


_ASK_LINE = gl.constexpr(_ask_asm("prefetch.global.L2 [$1]"))


@gluon.jit
def _copy_queries(query, q, q_strides, item, sizes):
    """Begin to copy a piece's queries into shared memory; heads that do not exist, and pieces, arrive as zeros."""
    head_block, row, _ = _place(item, sizes)
    heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _COPY))
    dims = gl.arange(0, _HALF, layout=gl.SliceLayout(0, _COPY))
    at = q + row * q_strides[0] + heads.to(gl.int64)[:, None] * q_strides[1] + dims[None, :]
    there = ((heads < sizes[2]) & (item < sizes[0]))[:, None]
    async_copy.async_copy_global_to_shared(query.index(0), at, mask=there)
    async_copy.async_copy_global_to_shared(query.index(1), at + _HALF, mask=there)
    async_copy.commit_group()


@gluon.jit
def _ask_queries(q, q_strides, item, sizes):
    """Bring a later piece's queries into the L2, 128 bytes at a time, if there is such a piece."""
    head_block, row, _ = _place(item, sizes)
    heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _ASK_LINES))
    lines = gl.arange(0, 8, layout=gl.SliceLayout(0, _ASK_LINES)) * 64
    at = q + row * q_strides[0] + heads.to(gl.int64)[:, None] * q_strides[1] + lines[None, :]
    at = gl.where(((heads < sizes[2]) & (item < sizes[0]))[:, None], at.to(gl.int64), 0)
    gl.inline_asm_elementwise(_ASK_LINE, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(query, keys, at):
    """q . kv of one tile, still running: in two halves of the dims."""
    zeros = gl.zeros([_HEADS, _KEYS], gl.float32, layout=_SCORES)
    part = warpgroup_mma(query.index(0), keys.index(2 * at).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(query.index(1), keys.index(2 * at + 1).permute((1, 0)), part, is_async=True)


@gluon.jit
def _lead(
    query, keys, weights_tiles, decays, shares, live, full, empty, ready, done, taken, sizes, swa, extra,
    q, q_strides, lse, sink, part_lses, targets, out_strides, lse_strides, scale_log2,
    HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SCORES)
    per_key: gl.constexpr = gl.SliceLayout(0, _SCORES)
    _, num_rows, num_heads, _ = sizes
    step = 0
    turn = 0
    _copy_queries(query, q, q_strides, gl.program_id(0), sizes)
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        head_block, row, split = _place(item, sizes)
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        first, last = line[0], line[1]
        output = gl.zeros([_HEADS, _HALF], gl.float32, layout=_SUMS)
        row_max = gl.full([_HEADS], _LOWEST, gl.float32, layout=per_row)
        row_sum = gl.zeros([_HEADS], gl.float32, layout=per_row)
        async_copy.wait_group(0)
        fence_async_shared()
        _meet()  # a warp multiplies heads that others have copied
        if first < last:
            at = step % 2
            mbarrier.wait(full.index(at), (step // 2) & 1)
            valid = live.index(at).load(per_key)[None, :] != 0
            scores = _scores(query, keys, at)
            scores = warpgroup_mma_wait(0, deps=[scores])
            decay, row_max, row_sum = _weigh(
                scores, valid, row_max, row_sum, scale_log2, weights_tiles.index(at), decays.index(at), ready.index(at)
            )  # fmt: skip
            step += 1
            for _ in range(first + 1, last):
                at = step % 2
                # The sums of the tile before, queued ahead of this one's scores: tensor cores do not wait between them.
                output = warpgroup_mma(weights_tiles.index(1 - at), keys.index(2 - 2 * at), output, is_async=True)
                mbarrier.wait(full.index(at), (step // 2) & 1)
                valid = live.index(at).load(per_key)[None, :] != 0
                scores = _scores(query, keys, at)
                output, scores = warpgroup_mma_wait(2, deps=[output, scores])
                mbarrier.arrive(empty.index(1 - at), count=1)
                scores = warpgroup_mma_wait(0, deps=[scores])
                decay, row_max, row_sum = _weigh(
                    scores, valid, row_max, row_sum, scale_log2, weights_tiles.index(at), decays.index(at),
                    ready.index(at),
                )  # fmt: skip
                output = output * gl.convert_layout(decay, gl.SliceLayout(1, _SUMS))[:, None]
                step += 1
            at = (step + 1) % 2
            output = warpgroup_mma(weights_tiles.index(at), keys.index(2 * at), output, is_async=True)
            output = warpgroup_mma_wait(0, deps=[output])
            mbarrier.arrive(empty.index(at), count=1)
        _copy_queries(query, q, q_strides, item + gl.num_programs(0), sizes)

        heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=per_row)
        wide = heads.to(gl.int64)
        unseen = row_sum == 0.0
        value = gl.where(unseen, float("-inf"), (row_max + gl.log2(row_sum)) * _LN_2)
        share = gl.where(unseen, 0.0, 1.0 / row_sum)
        if SPLIT:
            place = (split.to(gl.int64) * num_rows + row) * num_heads
            gl.store(part_lses + place + wide, value, mask=heads < num_heads)
            share = gl.where(unseen, -1.0, share)
        else:
            if HAS_LSE:
                gl.store(lse + row * lse_strides[0] + wide * lse_strides[1], value, mask=heads < num_heads)
            if HAS_SINK:
                share = _with_sink(row_max, row_sum, sink, heads, num_heads)
        mbarrier.wait(taken, 1 - turn)
        shares.store(share)
        mbarrier.arrive(done, count=1)
        share = gl.convert_layout(share, gl.SliceLayout(1, _SUMS))
        _write_half(output, share, targets, out_strides, (), item, sizes, 0, SPLIT, False)
        turn = 1 - turn


@gluon.jit
def _follow(
    keys, weights_tiles, decays, shares, empty, ready, done, taken, sizes, swa, extra,
    q, q_strides, targets, out_strides, turning,
    HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SUMS)
    step = 0
    turn = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        _ask_queries(q, q_strides, item + gl.num_programs(0), sizes)
        output = gl.zeros([_HEADS, _HALF], gl.float32, layout=_SUMS)
        for _ in range(line[0], line[1]):
            at = step % 2
            mbarrier.wait(ready.index(at), (step // 2) & 1)  # the scores were there: so was the tile
            output = output * decays.index(at).load(per_row)[:, None]
            output = warpgroup_mma(weights_tiles.index(at), keys.index(2 * at + 1), output, is_async=True)
            output = warpgroup_mma_wait(0, deps=[output])
            mbarrier.arrive(empty.index(at), count=1)
            step += 1
        mbarrier.wait(done, turn)
        share = shares.load(per_row)
        mbarrier.arrive(taken, count=1)
        _write_half(output, share, targets, out_strides, turning, item, sizes, 1, SPLIT, HAS_ROPE)
        turn = 1 - turn


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
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_lead, (
                query, keys, weights_tiles, decays, shares, live, full, empty, ready, done, taken, sizes, swa, extra,
                q, q_strides, lse, sink, part_lses, targets, out_strides, lse_strides, scale_log2,
                HAS_EXTRA, SPLIT, HAS_SINK, HAS_LSE,
            )),
            (_follow, (
                keys, weights_tiles, decays, shares, empty, ready, done, taken, sizes, swa, extra,
                q, q_strides, targets, out_strides, turning,
                HAS_EXTRA, SPLIT, HAS_ROPE,
            )),
            (_fill, (
                keys, live, full, empty, sizes, swa, extra, 0,
                SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, SPLIT,
            )),
            (_fill, (
                keys, live, full, empty, sizes, swa, extra, 1,
                SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, SPLIT,
            )),
        ],
        [4, 4, 4],
        [FOLLOW_REGISTERS, FILL_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
