"""The Gluon kernel behind `hopper_prefill`: pieces of work of 64 heads of a row, warps in four roles.

Two places for key tiles in shared memory stand between the roles. A place has two halves, by dims, each with a "full"
and an "empty" mbarrier of its own::

    fill     4 warps: slots two tiles ahead; cp.async of 16 bytes, which no register waits for, straight into the halves
             that are empty; after a piece's first tile its queries, once the piece before has used its own
    score    4 warps: S = Q K^T (wgmma), online softmax in base 2, P to shared memory
    low      4 warps: O += P K for dims 0..255
    high     4 warps: O += P K for dims 256..511

What a row, a slot that is not valid and an empty list mean is what `prefill` says.

Source of the idea: FlashMLA's sparse prefill for sm_90 (a producer warpgroup gathers with cp.async whose completion an
mbarrier counts); Triton's Gluon (`gluon.warp_specialize`, `async_copy.mbarrier_arrive`).
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
    _place,
    _weigh,
    _with_sink,
    _write_half,
)

__all__ = ["FILL_REGISTERS", "SUM_REGISTERS", "WARPS"]

# A warp group of each role shares 512 registers a thread; what these leave is the scoring role's.
SUM_REGISTERS = 168
FILL_REGISTERS = 72

_FILL_THREADS = gl.constexpr(128)
_GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


# No code is better for knowing their divisors, and one kernel for every batch is compiled once.
_SIZES = ("indices_stride", "num_positions", "num_keys", "width", "num_rows", "num_heads")


@gluon.jit
def _length_of(row, lists):
    """How many leading entries of its list a row reads."""
    _, _, lengths, width, HAS_LENGTHS = lists
    end = width
    if HAS_LENGTHS:
        end = gl.maximum(gl.minimum(gl.load(lengths + row), width), 0)
    return end


@gluon.jit
def _slots_at(lists, row, tile, end):
    """Slots of one tile of a row's list, -1 beyond its end."""
    lanes = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _GATHER))
    return gl.load(lists[0] + row * lists[1] + lanes, mask=lanes < end, other=-1)


@gluon.jit
def _copy(half, rows, valid, FIRST: gl.constexpr):
    """Begin to copy 256 dims of 64 rows; rows that are not valid arrive as zeros."""
    dims = FIRST + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _GATHER))
    async_copy.async_copy_global_to_shared(half, rows[:, None] + dims[None, :], mask=valid[:, None])


@gluon.jit
def _fill(query, keys, live, full, empty, asked, answered, sizes, lists, kv, kv_stride, num_keys, q, q_strides):
    step = 0
    turn = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        head_block, row, _ = _place(item, sizes)
        end = _length_of(row, lists)
        slots = _slots_at(lists, row, 0, end)
        next_slots = _slots_at(lists, row, 1, end)
        for tile in range((end + _KEYS - 1) // _KEYS):
            later_slots = _slots_at(lists, row, tile + 2, end)
            at = step % 2
            phase = ((step // 2) & 1) ^ 1
            valid = (slots >= 0) & (slots < num_keys)
            # int64 before the product: 512 * slot passes 2^31 at four million rows (H26).
            rows = kv + slots.to(gl.int64) * kv_stride
            mbarrier.wait(empty.index(2 * at), phase)
            live.index(at).store(valid.to(gl.int32))
            mbarrier.arrive(full.index(2 * at), count=1)
            _copy(keys.index(2 * at), rows, valid, 0)
            async_copy.mbarrier_arrive(full.index(2 * at), increment_count=False)
            mbarrier.wait(empty.index(2 * at + 1), phase)
            _copy(keys.index(2 * at + 1), rows, valid, 256)
            async_copy.mbarrier_arrive(full.index(2 * at + 1), increment_count=False)
            if tile == 0:
                heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _GATHER))
                q_rows = q + row * q_strides[0] + heads.to(gl.int64) * q_strides[1]
                mbarrier.wait(answered, turn ^ 1)
                _copy(query.index(0), q_rows, heads < sizes[2], 0)
                _copy(query.index(1), q_rows, heads < sizes[2], 256)
                async_copy.mbarrier_arrive(asked, increment_count=False)
                turn = turn ^ 1
            slots, next_slots = next_slots, later_slots
            step += 1


@gluon.jit
def _score(
    query, keys, weights_tiles, decays, shares, live, full, ready, asked, answered, done, taken, sizes, lists,
    lse, sink, lse_strides, scale_log2, HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SCORES)
    per_key: gl.constexpr = gl.SliceLayout(0, _SCORES)
    step = 0
    turn = 0
    asks = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        head_block, row, _ = _place(item, sizes)
        tiles = (_length_of(row, lists) + _KEYS - 1) // _KEYS
        row_max = gl.full([_HEADS], _LOWEST, gl.float32, layout=per_row)
        row_sum = gl.zeros([_HEADS], gl.float32, layout=per_row)
        if tiles > 0:
            mbarrier.wait(asked, asks)
            asks = asks ^ 1
        for tile in range(tiles):
            at = step % 2
            phase = (step // 2) & 1
            mbarrier.wait(full.index(2 * at), phase)
            valid = live.index(at).load(per_key)[None, :] != 0
            mbarrier.wait(full.index(2 * at + 1), phase)
            # The copies are the generic proxy's writes, wgmma's reads the async proxy's. One fence, for both halves: it
            # stands in the way of every tile, and costs more than a product that begins with the first half wins.
            fence_async_shared()
            scores = gl.zeros([_HEADS, _KEYS], gl.float32, layout=_SCORES)
            scores = warpgroup_mma(
                query.index(0), keys.index(2 * at).permute((1, 0)), scores, use_acc=False, is_async=True
            )
            scores = warpgroup_mma(query.index(1), keys.index(2 * at + 1).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(answered, count=1, pred=tile + 1 == tiles)
            _decay, row_max, row_sum = _weigh(
                scores, valid, row_max, row_sum, scale_log2, weights_tiles.index(at), decays.index(at), ready.index(at)
            )  # fmt: skip
            step += 1

        heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=per_row)
        wide = heads.to(gl.int64)
        unseen = row_sum == 0.0
        value = gl.where(unseen, float("-inf"), (row_max + gl.log2(row_sum)) * _LN_2)
        share = gl.where(unseen, 0.0, 1.0 / row_sum)
        if HAS_LSE:
            gl.store(lse + row * lse_strides[0] + wide * lse_strides[1], value, mask=heads < sizes[2])
        if HAS_SINK:
            share = _with_sink(row_max, row_sum, sink, heads, sizes[2])
        mbarrier.wait(taken, 1 - turn)
        shares.store(share)
        mbarrier.arrive(done, count=1)
        turn = 1 - turn


@gluon.jit
def _sum(
    keys, weights_tiles, decays, shares, empty, ready, done, taken, sizes, lists, targets, out_strides, turning,
    HALF: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SUMS)
    step = 0
    turn = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        _, row, _ = _place(item, sizes)
        output = gl.zeros([_HEADS, _HALF], gl.float32, layout=_SUMS)
        for _ in range((_length_of(row, lists) + _KEYS - 1) // _KEYS):
            at = step % 2
            mbarrier.wait(ready.index(at), (step // 2) & 1)
            output = output * decays.index(at).load(per_row)[:, None]
            output = warpgroup_mma(weights_tiles.index(at), keys.index(2 * at + HALF), output, is_async=True)
            output = warpgroup_mma_wait(0, deps=[output])
            mbarrier.arrive(empty.index(2 * at + HALF), count=1)
            step += 1
        mbarrier.wait(done, turn)
        share = shares.load(per_row)
        mbarrier.arrive(taken, count=1)
        _write_half(output, share, targets, out_strides, turning, item, sizes, HALF, False, HAS_ROPE)
        turn = 1 - turn


@gluon.jit(do_not_specialize=_SIZES)
def _hopper_prefill_kernel(
    q,
    kv,
    indices,
    lengths,
    sink,
    positions,
    cos,
    sin,
    out,
    lse,
    q_stride_t,
    q_stride_h,
    kv_stride,
    indices_stride,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    cos_stride,
    sin_stride,
    num_positions,
    num_keys,
    width,
    num_rows,
    num_heads,
    scale_log2,
    HAS_LENGTHS: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_ROPE: gl.constexpr,
    HAS_LSE: gl.constexpr,
    SUM_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    items = (num_heads + _HEADS - 1) // _HEADS * num_rows
    sizes = (items, num_rows, num_heads, 1)
    lists = (indices, indices_stride, lengths, width, HAS_LENGTHS)
    turning = (positions, cos, sin, cos_stride, sin_stride, num_positions)

    query = gl.allocate_shared_memory(gl.bfloat16, [2, _HEADS, _HALF], _TILE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [4, _KEYS, _HALF], _TILE)
    weights_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, _HEADS, _KEYS], _TILE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    decays = gl.allocate_shared_memory(gl.float32, [2, _HEADS], flat)
    shares = gl.allocate_shared_memory(gl.float32, [_HEADS], flat)
    live = gl.allocate_shared_memory(gl.int32, [2, _KEYS], flat)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    answered = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(4):
        # Every thread's copies arrive for themselves; with a tile's first half arrives which of its keys are valid.
        mbarrier.init(full.index(i), count=_FILL_THREADS + 1 - i % 2)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(asked, count=_FILL_THREADS)
    mbarrier.init(answered, count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(taken, count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_score, (
                query, keys, weights_tiles, decays, shares, live, full, ready, asked, answered, done, taken,
                sizes, lists, lse, sink, (lse_stride_t, lse_stride_h), scale_log2, HAS_SINK, HAS_LSE,
            )),
            (_sum, (
                keys, weights_tiles, decays, shares, empty, ready, done, taken, sizes, lists,
                (out, out), (out_stride_t, out_stride_h), turning, 0, HAS_ROPE,
            )),
            (_sum, (
                keys, weights_tiles, decays, shares, empty, ready, done, taken, sizes, lists,
                (out, out), (out_stride_t, out_stride_h), turning, 1, HAS_ROPE,
            )),
            (_fill, (
                query, keys, live, full, empty, asked, answered, sizes, lists, kv, kv_stride, num_keys,
                q, (q_stride_t, q_stride_h),
            )),
        ],
        [4, 4, 4],
        [SUM_REGISTERS, SUM_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
