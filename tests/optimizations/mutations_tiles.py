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
    "a rank's share of the batch is forgotten": Mutation(
        "kernels/experts/tiles.py",
        "return -(-tokens * local_experts // num_experts) if num_experts else 0",
        "return tokens",
        cases=("moe_tiles/tiny",),
        unaffected=("moe_tiles/tiny-16",),
    ),
    "the columns of a short group are those of a whole one": Mutation(
        "kernels/experts/grouped_gemm.py",
        "column = program % (GROUP * BLOCKS) // in_group * SIZE",
        "column = program % (GROUP * BLOCKS) // GROUP * SIZE",
        cases=("moe_tiles/tiny-odd-k",),
        unaffected=("moe_tiles/tiny",),
    ),
}
