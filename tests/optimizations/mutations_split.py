"""Bugs to plant in the split decode (chapter 18)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "tiles per split rounded down": Mutation(
        "kernels/sparse_mla/split_decode.py",
        "share = (last + num_splits - 1) // num_splits",
        "share = last // num_splits",
        cases=("split_k_decode/tiny-no-sink",),
        unaffected=("split_k_decode/tiny-six-tiles", "split_k_decode/tiny-swa-only"),  # divides; one split
    ),
    "parts of empty splits are read": Mutation(
        "kernels/sparse_mla/split_decode.py",
        "counts = (some < num_splits) & (weights != 0.0)",
        "counts = some < num_splits",
        cases=("split_k_decode/tiny-over-split",),
        unaffected=("split_k_decode/tiny", "split_k_decode/tiny-six-tiles"),
    ),
    "the extra list begins at the split's first tile of the row": Mutation(
        "kernels/sparse_mla/split_decode.py",
        "extra_first, extra_last = tl.maximum(first - swa_tiles, 0), tl.maximum(last - swa_tiles, 0)",
        "extra_first, extra_last = first, tl.maximum(last - swa_tiles, 0)",
        cases=("split_k_decode/tiny-six-tiles", "split_k_decode/tiny-no-sink"),
        unaffected=("split_k_decode/tiny-swa-only",),
    ),
}
