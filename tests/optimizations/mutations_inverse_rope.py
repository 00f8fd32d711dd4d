"""Bugs to plant in the rotation of outputs (chapter 19)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "outputs turned forward": Mutation(
        "kernels/sparse_mla/merge.py",
        "tl.join(tl.where(turn, a * c + b * s, a), tl.where(turn, b * c - a * s, b))",
        "tl.join(tl.where(turn, a * c - b * s, a), tl.where(turn, b * c + a * s, b))",
        cases=("fused_inverse_rope/tiny", "fused_inverse_rope/tiny-one-split"),
        unaffected=("fused_inverse_rope/tiny-start",),
    ),
    "the row's index for its position": Mutation(
        "kernels/sparse_mla/split_decode.py",
        "position = tl.load(positions + row)",
        "position = row",
        cases=("fused_inverse_rope/tiny", "fused_inverse_rope/tiny-one-split"),
        unaffected=("persistent_decode/tiny",),
    ),
    "the first pair not turned": Mutation(
        "kernels/sparse_mla/merge.py",
        "rotated = pairs >= FIRST",
        "rotated = pairs > FIRST",
        cases=("fused_inverse_rope/tiny", "fused_inverse_rope/tiny-swa-only"),
        unaffected=("fused_inverse_rope/tiny-start",),
    ),
}
