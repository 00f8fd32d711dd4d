"""Bugs to plant in the routing data (chapter 03); the fourth, a mask for a map, is refused by `ExpertMap` itself."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "padding lanes of a block counted": Mutation(
        "kernels/experts/dispatch.py",
        "    live = (lanes < BLOCK_SLOTS) & (slots < total)\n    found = tl.load(experts",
        "    live = slots < total\n    found = tl.load(experts",
        cases=("expert_routing/tiny-two-blocks",),
        unaffected=("expert_routing/tiny",),
    ),
    "an id of -1 wraps to the map's end": Mutation(
        "kernels/experts/expert_map.py",
        "    known = live & (ids >= 0) & (ids < E)\n",
        "    known = live & (ids < E)\n    ids = tl.where(ids < 0, ids + E, ids)\n",
        cases=("expert_routing/tiny-padding",),
        unaffected=("expert_routing/tiny",),
    ),
    "slots that are not local count for expert 31": Mutation(
        "kernels/experts/dispatch.py",
        "    found = tl.where(found < 0, E, found)\n",
        "    found = tl.where(found < 0, 31, found)\n",
        cases=("expert_routing/tiny-two-blocks",),
        unaffected=("expert_routing/tiny",),
    ),
}
