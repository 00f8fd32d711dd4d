"""Bugs to plant in the scratch of the persistent decode and in its lists (chapter 10)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "plan made once": Mutation(
        "dsv4ref/serving/scratch.py",
        "        self.prepare(q, indices, lengths, num_slots)\n        self.replan()\n",
        "        self.prepare(q, indices, lengths, num_slots)\n"
        "        if not hasattr(self, '_planned'):\n"
        "            self.replan()\n"
        "            self._planned = True\n",
        cases=("graph_clean_scratch/emulated-three-calls", "graph_clean_scratch/emulated-holes"),
    ),
    "holes stay in the lists": Mutation(
        "kernels/aiter/lists.py",
        "place = tl.cumsum(kept, axis=0) - kept",
        "place = lanes",
        cases=("graph_clean_scratch/emulated-holes",),
        unaffected=("graph_clean_scratch/three-calls",),
    ),
    "rows without keys are not zeroed": Mutation(
        "dsv4ref/serving/scratch.py",
        '        b["out"].masked_fill_(b["empty"][:, None, None], 0.0)\n',
        "",
        cases=("graph_clean_scratch/padding",),
        unaffected=("graph_clean_scratch/three-calls",),
    ),
}
