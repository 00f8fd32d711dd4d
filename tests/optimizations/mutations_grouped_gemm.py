"""Bugs to plant in the grouped GEMM and the expert layer (chapter 12)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "the high nibble is decoded first": Mutation(
        "kernels/experts/mxfp4.py",
        "    return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))\n",
        "    return tl.reshape(tl.join(high, low), (BLOCK_N, BLOCK_K))\n",
        cases=("direct_w2_reduce/tiny-1",),
    ),
    "an expert's last row is left to nobody": Mutation(
        "kernels/experts/grouped_gemm.py",
        "        end = tl.load(offsets + expert + 1)\n",
        "        end = tl.load(offsets + expert + 1) - 1\n",
        cases=("direct_w2_reduce/tiny-one-expert",),
        unaffected=("direct_w2_reduce/tiny-0",),
    ),
    "the sum reads slots that are not local": Mutation(
        "kernels/experts/expert_layer.py",
        "        is_local = tl.load(local + slot) >= 0  # nobody has written the others' rows\n",
        "        is_local = tl.load(local + slot) >= -1\n",
        cases=("direct_w2_reduce/tiny-ep2",),
        unaffected=("direct_w2_reduce/tiny-1",),
    ),
}
