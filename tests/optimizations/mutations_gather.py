"""Bugs to plant in the FP8 gather and in the decode over gathered rows (chapter 11)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "gathered scale bytes of the neighbour": Mutation(
        "kernels/sparse_mla/fp8_gather.py",
        "scale_at = block + BLOCK_SIZE * _ROW_BYTES + position * _SCALE_SLOTS",
        "scale_at = block + BLOCK_SIZE * _ROW_BYTES + (position ^ 1) * _SCALE_SLOTS",
        cases=("fp8_gather/tiny", "fp8_gather/tiny-c128"),
    ),
    "-0 kept on the way to fnuz": Mutation(
        "kernels/sparse_mla/fp8_gather.py",
        "tl.where(code == 0x80, 0, tl.where((code & 0x7F) == 0x7F, 0x80, code))",
        "tl.where((code & 0x7F) == 0x7F, 0x80, code)",
        cases=("fp8_gather/tiny-swa-only",),
        unaffected=("fp8_gather/tiny", "fp8_gather/tiny-spread"),
    ),
    "every listed row taken for a key": Mutation(
        "kernels/sparse_mla/gathered_decode.py",
        "valid = tl.load(tags + at * TAGS + (TAGS - 1), mask=lanes < end, other=0) != 0",
        "valid = lanes < end",
        cases=("fp8_gather/tiny-ragged",),
        unaffected=("fp8_gather/tiny",),
    ),
}
