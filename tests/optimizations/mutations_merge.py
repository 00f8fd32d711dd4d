"""Bugs to plant in the merge of partial results (chapter 09)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "merge without the sink's factor": Mutation(
        "kernels/sparse_mla/merge.py",
        "share = tl.where(empty, 0.0, share * kept)",
        "share = tl.where(kept < 0.0, 0.0, share)",
        cases=("persistent_decode/tiny", "persistent_decode/tiny-tp2"),
    ),
    "merge around -inf in empty rows": Mutation(
        "kernels/sparse_mla/merge.py",
        'reference = tl.where(largest == float("-inf"), 0.0, largest)',
        "reference = largest",
        cases=("persistent_decode/tiny-ragged", "persistent_decode/tiny-gaps"),
        unaffected=("persistent_decode/tiny", "persistent_decode/tiny-early"),
    ),
    "merged LSE left in base 2": Mutation(
        "kernels/sparse_mla/merge.py",
        "merged_lse = reference + tl.log2(total) * _LN_2",
        "merged_lse = reference + tl.log2(total)",
        cases=("persistent_decode/tiny",),
        unaffected=("persistent_decode/tiny-early",),  # one part: log2(1) = ln(1)
    ),
}
