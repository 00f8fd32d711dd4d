"""The two roles that multiply in Hopper's warp-specialised kernels, whoever fills their tiles.

Key tiles, bf16 ``[64, 512]``, come through places in shared memory, each with a "full" and an "empty" mbarrier::

    lead     4 warps: S = Q K^T (wgmma), online softmax in base 2, P to shared memory, O += P K for dims 0..255
    follow   4 warps: O += P K for dims 256..511; they ask the L2 for the next piece's queries

Which keys a place holds and how they came there is the filling warps' affair: `hopper_kernel` has those of the decode.
What leaves the roles is a finished row or, with several splits, a part of one with its LSE.
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

__all__ = ["FOLLOW_REGISTERS", "WARPS"]

WARPS = 4
FOLLOW_REGISTERS = 160

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_HALF = gl.constexpr(256)
_ROPE = gl.constexpr(64)
_LOWEST = gl.constexpr(-1.0e30)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)

_ASK_LINES = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def _ask_asm(instruction: str) -> str:
    """PTX: a prefetch of an address; none for address 0. The result is there because an operator has one."""
    return "\n".join(["{", ".reg .pred p;", "setp.ne.b64 p, $1, 0;", f"@p {instruction};", "mov.b32 $0, 0;", "}"])


_ASK_LINE = gl.constexpr(_ask_asm("prefetch.global.L2 [$1]"))


@gluon.jit
def _list_of(indptr, row, capacity):
    """Where a row's list begins, and how many slots it has."""
    begin = gl.load(indptr + row)
    end = gl.minimum(gl.load(indptr + row + 1), capacity)
    return begin, gl.maximum(end - begin, 0)


@gluon.jit
def _place(item, sizes):
    """Head block, row and split of a piece of work; the head blocks of a row, which share its keys, are neighbours."""
    _, num_rows, num_heads, _ = sizes
    blocks = (num_heads + _HEADS - 1) // _HEADS
    rest = item // blocks
    return item % blocks, (rest % num_rows).to(gl.int64), rest // num_rows


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
def _columns_cut(x):
    """The left and the right half of a tile's columns; both lie in the same thread."""
    halves = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1))
    return gl.split(halves)


@gluon.jit
def _store_columns(x, out_row, heads, num_heads, out_stride_h, FIRST: gl.constexpr):
    layout: gl.constexpr = x.type.layout
    rows = gl.convert_layout(heads, gl.SliceLayout(1, layout))
    dims = FIRST + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    at = out_row + rows.to(gl.int64)[:, None] * out_stride_h + dims[None, :]
    gl.store(at, x.to(gl.bfloat16), mask=(rows < num_heads)[:, None])


@gluon.jit
def _rotate_back(x, row, turning):
    """a' = a cos + b sin, b' = b cos - a sin on the pairs of the rope dims x ``[64, 64]``, as `merge._rotate_back`."""
    positions, cos, sin, cos_stride, sin_stride, num_positions = turning
    a, b = gl.split(x.reshape([_HEADS, _ROPE // 2, 2]))
    layout: gl.constexpr = a.type.layout
    position = gl.load(positions + row)
    known = (position >= 0) & (position < num_positions)
    at = position.to(gl.int64)
    pairs = gl.arange(0, _ROPE // 2, layout=gl.SliceLayout(0, layout))
    # A position outside the tables shows: its rotated dims become NaN, and nothing is read.
    c = gl.load(cos + at * cos_stride + pairs, mask=known, other=float("nan"))[None, :]
    s = gl.load(sin + at * sin_stride + pairs, mask=known, other=float("nan"))[None, :]
    # Zeros stay zeros, whatever the tables say: a padded row has neither keys nor a position.
    turn = (a != 0.0) | (b != 0.0)
    turned = gl.join(gl.where(turn, a * c + b * s, a), gl.where(turn, b * c - a * s, b))
    return turned.reshape([_HEADS, _ROPE])


@gluon.jit
def _write_half(
    output, share, targets, strides, turning, item, sizes,
    HALF: gl.constexpr, SPLIT: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """One half of the dims of a piece's heads, scaled: to the output, or to the parts where a split saw a key."""
    out, parts = targets
    layout: gl.constexpr = output.type.layout
    head_block, row, split = _place(item, sizes)
    heads = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, layout))
    output = output * share[:, None]
    if SPLIT:
        dims = HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, layout))
        place = (split.to(gl.int64) * sizes[1] + row) * sizes[2] + heads
        # The share is -1 where nothing was seen; a NaN has been, and shows.
        seen = (heads < sizes[2]) & ((share >= 0.0) | (share != share))
        gl.store(parts + place[:, None] * (2 * _HALF) + dims[None, :], output, mask=seen[:, None])
    else:
        out_row = out + row * strides[0]
        if HAS_ROPE and HALF == 1:
            left, right = _columns_cut(output)
            nope, rope = _columns_cut(right)
            rope = _rotate_back(rope, row, turning)
            _store_columns(left, out_row, heads, sizes[2], strides[1], 256)
            _store_columns(nope, out_row, heads, sizes[2], strides[1], 384)
            _store_columns(rope, out_row, heads, sizes[2], strides[1], 448)
        else:
            _store_columns(output, out_row, heads, sizes[2], strides[1], HALF * 256)


@gluon.jit
def _scores(query, keys, at):
    """q . kv of one tile, still running: in two halves of the dims."""
    zeros = gl.zeros([_HEADS, _KEYS], gl.float32, layout=_SCORES)
    part = warpgroup_mma(query.index(0), keys.index(2 * at).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(query.index(1), keys.index(2 * at + 1).permute((1, 0)), part, is_async=True)


@gluon.jit
def _weigh(scores, live, row_max, row_sum, scale_log2, weights_tile, decays, ready):
    """One tile of the online softmax, handed on: weights and what older sums are multiplied by."""
    valid = live[None, :] != 0
    scores = gl.where(valid, scores * scale_log2, _LOWEST)
    new_max = gl.maximum(row_max, gl.max(scores, axis=1))
    decay = gl.exp2(row_max - new_max)
    # The explicit zero matters: in a row without any valid slot, scores == new_max and exp2 would give 1.
    weights = gl.where(valid, gl.exp2(scores - new_max[:, None]), 0.0)
    weights_tile.store(weights.to(gl.bfloat16))
    decays.store(decay)
    fence_async_shared()
    mbarrier.arrive(ready, count=1)
    return decay, new_max, row_sum * decay + gl.sum(weights, axis=1)


@gluon.jit
def _lead(
    query, keys, weights_tiles, decays, shares, live, full, empty, ready, done, taken, sizes, swa, extra,
    q, lse, sink, part_lses, targets, q_strides, out_strides, lse_strides, scale_log2,
    HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _SCORES)
    per_key: gl.constexpr = gl.SliceLayout(0, _SCORES)
    _, num_rows, num_heads, _ = sizes
    step = 0
    turn = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        head_block, row, split = _place(item, sizes)
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        first, last = line[0], line[1]
        copied = head_block * _HEADS + gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _COPY))
        dims = gl.arange(0, _HALF, layout=gl.SliceLayout(0, _COPY))
        q_at = q + row * q_strides[0] + copied.to(gl.int64)[:, None] * q_strides[1] + dims[None, :]
        low = gl.load(q_at, mask=(copied < num_heads)[:, None], other=0.0)
        high = gl.load(q_at + _HALF, mask=(copied < num_heads)[:, None], other=0.0)
        query.index(0).store(low)
        query.index(1).store(high)
        fence_async_shared()

        output = gl.zeros([_HEADS, _HALF], gl.float32, layout=_OUTPUT)
        row_max = gl.full([_HEADS], _LOWEST, gl.float32, layout=per_row)
        row_sum = gl.zeros([_HEADS], gl.float32, layout=per_row)
        for _ in range(first, last):
            at = step % 2
            mbarrier.wait(full.index(at), (step // 2) & 1)
            scores = _scores(query, keys, at)
            valid = live.index(at).load(per_key)
            scores = warpgroup_mma_wait(0, deps=[scores])
            decay, row_max, row_sum = _weigh(
                scores, valid, row_max, row_sum, scale_log2, weights_tiles.index(at), decays.index(at), ready.index(at)
            )  # fmt: skip
            output = output * gl.convert_layout(decay, gl.SliceLayout(1, _OUTPUT))[:, None]
            # At once: the tile is given back as soon as it can be, and the next one is being filled meanwhile.
            output = warpgroup_mma(weights_tiles.index(at), keys.index(2 * at), output, is_async=True)
            output = warpgroup_mma_wait(0, deps=[output])
            mbarrier.arrive(empty.index(at), count=1)
            step += 1

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
                # l' = l * exp(m - m') + exp(sink - m'), o = acc * exp(m - m') / l'
                sink_log2 = gl.load(sink + heads, mask=heads < num_heads, other=float("-inf")) * _LOG2_E
                new_max = gl.maximum(row_max, sink_log2)
                decay = gl.exp2(row_max - new_max)
                # A sink of +inf takes all the weight: the row is zero. inf - inf would make it NaN.
                absorbed = sink_log2 == float("inf")
                total = row_sum * decay + gl.where(absorbed, 1.0, gl.exp2(sink_log2 - new_max))
                share = gl.where(total == 0.0, 0.0, decay / total)
        mbarrier.wait(taken, 1 - turn)
        shares.store(share)
        mbarrier.arrive(done, count=1)
        share = gl.convert_layout(share, gl.SliceLayout(1, _OUTPUT))
        _write_half(output, share, targets, out_strides, (), item, sizes, 0, SPLIT, False)
        turn = 1 - turn


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
def _follow(
    keys, weights_tiles, decays, shares, full, empty, ready, done, taken, sizes, swa, extra,
    q, q_strides, targets, out_strides, turning,
    HAS_EXTRA: gl.constexpr, SPLIT: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    per_row: gl.constexpr = gl.SliceLayout(1, _OUTPUT)
    step = 0
    turn = 0
    for item in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        line = _line_of(item, sizes, swa, extra, HAS_EXTRA, SPLIT)
        _ask_queries(q, q_strides, item + gl.num_programs(0), sizes)
        output = gl.zeros([_HEADS, _HALF], gl.float32, layout=_OUTPUT)
        for _ in range(line[0], line[1]):
            at = step % 2
            phase = (step // 2) & 1
            mbarrier.wait(full.index(at), phase)
            mbarrier.wait(ready.index(at), phase)
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
