"""Bugs to plant in the tile selection and in the kernel's walk over tiles (chapter 13)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "tiles by tokens instead of choices": Mutation(
        "kernels/experts/tiles.py",
        "slots, experts = (rows * top_k, local_experts)",
        "slots, experts = (rows, local_experts)",
        cases=("moe_tiles/tiny", "moe_tiles/tiny-64"),
        unaffected=("moe_tiles/tiny-few", "moe_tiles/tiny-tall"),
    ),
    "a bound belongs to the line above it": Mutation(
        "kernels/experts/tiles.py",
        "(self.upto is None or slots <= self.upto * experts)",
        "(self.upto is None or slots < self.upto * experts)",
        cases=("moe_tiles/tiny-16",),
        unaffected=("moe_tiles/tiny-64",),
    ),
    "the last group of tiles is taken for a whole one": Mutation(
        "kernels/experts/grouped_gemm.py",
        "in_group = tl.minimum(tiles - first_tile, GROUP)",
        "in_group = GROUP",
        cases=("moe_tiles/tiny-odd-k",),
        unaffected=("moe_tiles/tiny",),
    ),
}
