"""Bugs to plant in what the reference carries from one call to the next (chapter 01)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "previous group kept from before the call": Mutation(
        "dsv4ref/ref/compressor.py",
        "previous_kv=previous_kv,",
        "previous_kv=state.previous_kv,",
        cases=("decode_step/after-5",),
        unaffected=("decode_step/after-3",),
    ),
    "place in the group counted from zero in every call": Mutation(
        "dsv4ref/ref/compressor.py",
        "place = (state.kv.shape[0] + arrived) % ratio",
        "place = arrived % ratio",
        cases=("decode_step/after-5",),
        unaffected=("decode_step/after-4",),
    ),
}
