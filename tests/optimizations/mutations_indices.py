"""Bugs to plant in the index kernels (chapters 04 and 07)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "slots taken in 32 bits": Mutation(
        "kernels/sparse_mla/indices.py",
        "slot = block.to(tl.int64) * BLOCK_SIZE + entry % BLOCK_SIZE",
        "slot = block * BLOCK_SIZE + entry % BLOCK_SIZE",
        cases=("static_decode_metadata/tiny-garbage",),
        unaffected=("static_decode_metadata/tiny", "static_decode_metadata/tiny-speculative"),
    ),
    "a row sees the entry that it has yet to close": Mutation(
        "kernels/sparse_mla/indices.py",
        "return (tl.maximum(position, -1) + 1) // ratio",
        "return (tl.maximum(position, -1) + ratio) // ratio",
        cases=("static_decode_metadata/tiny", "static_decode_metadata/tiny-edges"),
    ),
    "the window one entry too long": Mutation(
        "kernels/sparse_mla/indices.py",
        "entry = tl.where(lanes < tl.load(lengths + row), lanes, -1)",
        "entry = tl.where(lanes <= tl.load(lengths + row), lanes, -1)",
        cases=("full_window_topk/tiny", "full_window_topk/tiny-narrow"),
        unaffected=("full_window_topk/tiny-ties", "static_decode_metadata/tiny"),
    ),
}
