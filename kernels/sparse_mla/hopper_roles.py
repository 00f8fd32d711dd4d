"""What the warps that multiply share in Hopper's warp-specialised kernels: a tile's softmax, a row's end, its output.

A piece of work is 64 heads of a row and split. Its key tiles, bf16 ``[64, 512]``, come through two places in shared
memory. One role scores a tile (S = Q K^T, online softmax in base 2) and hands the weights P on in bf16, with what older
sums decay by; sums O = O * decay + P K are kept by halves of the dims, 0..255 and 256..511, which different roles have.
Who fills the places is each kernel's own affair: `hopper_kernel` has the decode, `hopper_prefill_kernel` the prefill.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

__all__ = ["WARPS"]

WARPS = 4

# Triton 3.7 has this barrier under another name.
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_HALF = gl.constexpr(256)
_ROPE = gl.constexpr(64)
_LOWEST = gl.constexpr(-1.0e30)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
# 512 threads leave each 128 registers at compile time, too few for one instruction of 256 columns.
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def _rows_of(columns: int) -> gl.DistributedLinearLayout:
    """Rows where the sums have them, but eight neighbouring columns, 16 bytes of bf16, in a thread."""
    wide = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], *wide],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, columns],
    )


_ROWS_128 = gl.constexpr(_rows_of(128))
_ROWS_64 = gl.constexpr(_rows_of(64))


@gluon.jit
def _place(item, sizes):
    """Head block, row and split of a piece of work; the head blocks of a row, which share its keys, are neighbours."""
    _, num_rows, num_heads, _ = sizes
    blocks = (num_heads + _HEADS - 1) // _HEADS
    rest = item // blocks
    return item % blocks, (rest % num_rows).to(gl.int64), rest // num_rows


@gluon.jit
def _hand_over(arrived):
    """Give what the role's threads wrote into shared memory to whoever waits at an mbarrier, wgmma included.

    One thread arrives for all: so each has to have fenced its own writes, and then all have to meet. Left to itself the
    compiler puts a barrier where it sees a reason for one, which may be before the fence.
    """
    fence_async_shared()
    _meet()
    mbarrier.arrive(arrived, count=1)


@gluon.jit
def _weigh(scores, valid, row_max, row_sum, scale_log2, weights_tile, decays, ready):
    """One tile of the online softmax, handed on: weights and what older sums are multiplied by."""
    # -inf, and not only a weight of 0: exp2 of it is 0 beside any maximum, and the least is finite.
    scores = gl.where(valid, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale_log2)
    decay = gl.exp2(row_max - new_max)
    weights = gl.exp2(scores * scale_log2 - new_max[:, None])
    weights_tile.store(weights.to(gl.bfloat16))
    decays.store(decay)
    _hand_over(ready)
    return decay, new_max, row_sum * decay + gl.sum(weights, axis=1)


@gluon.jit
def _with_sink(row_max, row_sum, sink, heads, num_heads):
    """What a row's sums are multiplied by where a sink joins its keys."""
    # l' = l * exp(m - m') + exp(sink - m'), o = acc * exp(m - m') / l'
    sink_log2 = gl.load(sink + heads, mask=heads < num_heads, other=float("-inf")) * _LOG2_E
    new_max = gl.maximum(row_max, sink_log2)
    decay = gl.exp2(row_max - new_max)
    # A sink of +inf takes all the weight: the row is zero. inf - inf would make it NaN.
    absorbed = sink_log2 == float("inf")
    total = row_sum * decay + gl.where(absorbed, 1.0, gl.exp2(sink_log2 - new_max))
    return gl.where(total == 0.0, 0.0, decay / total)


@gluon.jit
def _columns_cut(x):
    """The left and the right half of a tile's columns; both lie in the same thread."""
    halves = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1))
    return gl.split(halves)


@gluon.jit
def _store_columns(x, out_row, heads, num_heads, out_stride_h, FIRST: gl.constexpr):
    # As the product leaves them, a thread has two neighbouring columns: stores of 4 bytes, half sectors, take so long
    # that the next piece's tiles wait for their places.
    layout: gl.constexpr = _ROWS_128 if x.shape[1] == 128 else _ROWS_64
    values = gl.convert_layout(x.to(gl.bfloat16), layout)
    rows = gl.convert_layout(heads, gl.SliceLayout(1, layout))
    dims = FIRST + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    at = out_row + rows.to(gl.int64)[:, None] * out_stride_h + dims[None, :]
    gl.store(at, values, mask=(rows < num_heads)[:, None])


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
        left, right = _columns_cut(output)
        _store_columns(left, out_row, heads, sizes[2], strides[1], HALF * 256)
        if HAS_ROPE and HALF == 1:
            nope, rope = _columns_cut(right)
            _store_columns(nope, out_row, heads, sizes[2], strides[1], 384)
            _store_columns(_rotate_back(rope, row, turning), out_row, heads, sizes[2], strides[1], 448)
        else:
            _store_columns(right, out_row, heads, sizes[2], strides[1], HALF * 256 + 128)
