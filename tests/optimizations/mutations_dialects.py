"""Bugs to plant in the conversion of a cache to the other FP8 dialect (chapter 02)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "scales of a converted cache not moved": Mutation(
        "kernels/cache_gather.py",
        "moved = tl.minimum(scale + 1, 255)",
        "moved = scale",
        cases=("fp8_dialects/tiny", "fp8_dialects/tiny-c128"),
        unaffected=("fp8_dialects/tiny-reverse",),
    ),
    "minus zero converted as it is": Mutation(
        "kernels/cache_gather.py",
        "new = ((words ^ is_0x80) & (low_bits ^ 0xFFFFFFFF)) | nan",
        "new = (words & (low_bits ^ 0xFFFFFFFF)) | nan",
        cases=("fp8_dialects/tiny", "fp8_dialects/tiny-c128"),
        unaffected=("fp8_dialects/tiny-reverse",),
    ),
}
