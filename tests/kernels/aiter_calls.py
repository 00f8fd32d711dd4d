"""Calls of the persistent decode on small inputs, through the adapters, and the attention they must equal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref.kernels.aiter import adapters
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.plan import DecodeShape, PlanBuffers

FP8 = torch.float8_e4m3fn
SCALE = 512**-0.5
SLOTS = 200


@dataclass
class Call:
    """Everything one call takes, and the lists as a reference reads them."""

    library: Library
    shape: DecodeShape
    plan: PlanBuffers
    lists: list[Tensor]
    arguments: dict[str, Any]

    def fill(self) -> None:
        names = ("qo_indptr", "kv_indptr", "kv_last_page_lens")
        adapters.fill_plan(self.library, self.shape, self.plan, **{name: self.arguments[name] for name in names})

    def run(self, **changes: Any) -> Tensor | None:
        return adapters.mla_decode(self.library, self.shape, self.plan, **{**self.arguments, **changes})

    def expected(self, row: int) -> tuple[Tensor, Tensor]:
        """Attention of one row in float64 on the same fp8 numbers: out ``[H, 512]``, lse ``[H]``."""
        keys = self.arguments["kv"][self.lists[row].long(), 0, 0].double()
        scores = self.arguments["q"][row].double() @ keys.T * SCALE
        return torch.softmax(scores, -1) @ keys, scores.logsumexp(-1)


def build(
    library: Library,
    lengths: list[int],
    rng: torch.Generator,
    *,
    topk: int = 64,
    layout: Any = "fixed",
    heads: int = 16,
) -> Call:
    """A call on random fp8 numbers, every buffer poisoned that the library is to fill."""
    rows = len(lengths)
    shape = DecodeShape(rows, heads, topk, FP8, FP8, layout)
    lists = [torch.randint(0, SLOTS, (min(n, topk),), generator=rng, dtype=torch.int32) for n in lengths]
    flat = torch.cat(lists)
    if layout == "fixed":
        table = torch.full((rows, topk), -1, dtype=torch.int32)
        for row, part in enumerate(lists):
            table[row, : len(part)] = part
        flat = table.view(-1)
    ends = itertools.accumulate((len(part) for part in lists), initial=0)
    plan = adapters.allocate_plan(library, shape, torch.device("cpu"))
    for buffer in plan.by_name().values():
        buffer.view(torch.int32).fill_(2**31 - 1)
    arguments = {
        "q": torch.randn(rows, heads, 512, generator=rng).to(FP8),
        "kv": torch.randn(SLOTS, 1, 1, 512, generator=rng).to(FP8),
        "out": torch.full((rows, heads, 512), torch.nan, dtype=torch.bfloat16),
        "qo_indptr": torch.arange(rows + 1, dtype=torch.int32),
        "kv_indptr": torch.tensor(list(ends), dtype=torch.int32),
        "kv_indices": flat,
        "kv_last_page_lens": torch.ones(rows, dtype=torch.int32),
        "sm_scale": SCALE,
        "q_scale": torch.ones(1),
        "kv_scale": torch.ones(1),
        "return_lse": True,
    }
    return Call(library, shape, plan, lists, arguments)
