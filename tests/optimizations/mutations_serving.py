"""Bugs to plant in the planner, the metadata cache and the tail fill (chapters 15 and 16)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "a piece may end behind its token": Mutation(
        "kernels/work_plan.py",
        "kv_end = tl.minimum(start + (ends - first) * GRANULARITY, end)",
        "kv_end = start + (ends - first) * GRANULARITY",
        cases=("metadata_cache/tiny", "metadata_cache/tiny-chunks"),
    ),
    "steps without host lengths reuse the plan": Mutation(
        "dsv4ref/serving/metadata.py",
        "reused = key is not None and key == self._seen",
        "reused = key == self._seen",
        cases=("metadata_cache/tiny-blind",),
        unaffected=("metadata_cache/tiny-chunks",),
    ),
    "the first token of the tail is left": Mutation(
        "dsv4ref/serving/tail_fill.py",
        "self.clear(tokens, self._tokens)",
        "self.clear(tokens + 1, self._tokens)",
        cases=("shrink_tail_fill/tiny", "shrink_tail_fill/tiny-random"),
    ),
}
