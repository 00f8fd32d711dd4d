"""Bugs to plant in the router GEMM (chapter 14)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "router logits rounded to bf16 before the store": Mutation(
        "kernels/experts/router_gemm.py",
        "    tl.store(at, z, mask=there[:, None] & real[None, :])\n",
        "    tl.store(at, z.to(tl.bfloat16).to(tl.float32), mask=there[:, None] & real[None, :])\n",
        cases=("router_dtype/tiny-grouped",),
        unaffected=("router_dtype/tiny-odd",),
    ),
    "the last column of D is left out where there are few rows": Mutation(
        "kernels/experts/router_gemm.py",
        "        inside = columns < depth - first\n        a = tl.load(x + row",
        "        inside = columns < depth - first - 1\n        a = tl.load(x + row",
        cases=("router_dtype/tiny-odd",),
        unaffected=("router_dtype/tiny-negative",),
    ),
}
