"""Bugs to plant in the sparse decode and in the FP8 dialects (chapters 05 and 06)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "sink term deleted": Mutation(
        "kernels/sparse_mla/decode.py",
        "row_sum = row_sum * decay + tl.where(absorbed, 1.0, tl.exp2(sink_log2 - new_max))",
        "row_sum = row_sum * decay",
        cases=("decode_launch_shape/tiny", "output_passthrough/tiny"),
    ),
    "dialects swapped": Mutation(
        "kernels/codes.py",
        "return f\"{kind}_{'fn' if dialect is Dialect.FN else 'fnuz'}\"",
        "return f\"{kind}_{'fnuz' if dialect is Dialect.FN else 'fn'}\"",
        cases=("decode_launch_shape/tiny", "decode_launch_shape/tiny-fnuz", "cached_projection/tiny"),
    ),
    "extra scope read in the SWA dialect": Mutation(
        "kernels/sparse_mla/decode.py",
        "EXTRA_MODE=modes[1],",
        "EXTRA_MODE=modes[0],",
        cases=("decode_launch_shape/tiny-fnuz",),
        unaffected=("decode_launch_shape/tiny",),
    ),
    "validity mask dropped": Mutation(
        "kernels/sparse_mla/decode.py",
        "valid = slots.to(tl.uint32) < num_rows",
        "valid = slots == slots\n        slots = tl.minimum(tl.maximum(slots, 0), num_rows - 1)",
        cases=("decode_launch_shape/tiny-ragged", "output_passthrough/tiny-ragged"),
    ),
    "weights of masked slots not forced to zero": Mutation(
        "kernels/sparse_mla/decode.py",
        "weights = tl.where(valid[None, :], tl.exp2(scores - new_max[:, None]), 0.0)",
        "weights = tl.exp2(scores - new_max[:, None])",
        cases=("decode_launch_shape/tiny-ragged",),
        unaffected=("decode_launch_shape/tiny",),
    ),
    "scale bytes of the neighbour": Mutation(
        "kernels/sparse_mla/decode.py",
        "BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS",
        "BLOCK_SIZE * _ROW_BYTES + (position ^ 1) * _SCALE_SLOTS",
        cases=("decode_launch_shape/tiny", "decode_launch_shape/tiny-c128"),
    ),
    "output strides ignored": Mutation(
        "kernels/sparse_mla/decode.py",
        "out_at = out + row * out_stride_t + heads[:, None].to(tl.int64) * out_stride_h",
        "out_at = out + row * num_heads * 512 + heads[:, None].to(tl.int64) * 512",
        cases=("output_passthrough/tiny-fnuz",),
        unaffected=("output_passthrough/tiny",),
    ),
}
