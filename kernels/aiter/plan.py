"""The work plan of AITER's persistent decode: its shape, its six buffers, and whether it still fits the lengths.

A persistent kernel does not read the lengths. It reads a plan that `get_mla_metadata_v1` made from them: for every CU a
range of rows of ``work_info_set``, and in every row which query rows meet which part of the key list. A plan kept while
the lengths change sends the kernel past the end of the list (H05).

A row of ``work_info_set`` is [batch, partial slot, q start, q end, kv start, kv end, kv offset, pad]. A partial slot of
-1 means the row is not split and its result is final; otherwise `reduce_indptr`, `reduce_final_map` and
`reduce_partial_map` say which partial results make which output row. kv start and end count entries of ``kv_indices``;
kv offset is what remains of the list behind kv end.

Source: ROCm/aiter at e4048607a, ``aiter/ops/attention.py`` and ``csrc/kernels/mla/metadata/v1_2_device.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from dsv4ref.kernels.capture import is_capturing

__all__ = ["PLAN_ORDER", "DecodeShape", "PlanBuffers", "check_plan", "planned_keys", "work_rows"]

PLAN_ORDER = (
    "work_metadata_ptrs",
    "work_indptr",
    "work_info_set",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)
"""The order in which `get_mla_metadata_info_v1` returns sizes. `get_mla_metadata_v1` takes another one (H11)."""

_DTYPES = {
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class DecodeShape:
    """Everything a plan's buffers depend on; also the key of a scratch.

    Args:
        rows: query rows T, one token each.
        heads: query heads H on this rank, on one KV head.
        topk: longest key list of a row.
        q_dtype, kv_dtype: a torch fp8 dtype or bfloat16. Never left out: AITER plans for bf16 if they are.
        layout: ``"fixed"``: row t's list starts at entry t * topk; ``"ragged"``: at kv_indptr[t].
        dim: width of a key; the value is its first ``value_dim`` numbers.
        kv_granularity: lists are cut at multiples of this many entries, a power of two.
    """

    rows: int
    heads: int
    topk: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    layout: Literal["fixed", "ragged"] = "fixed"
    dim: int = 512
    value_dim: int = 512
    kv_granularity: int = 16

    def __post_init__(self) -> None:
        for name in ("rows", "heads", "topk", "dim", "value_dim", "kv_granularity"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number from 1 on")
        for name in ("q_dtype", "kv_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {', '.join(map(str, _DTYPES))}")
        if self.layout not in ("fixed", "ragged"):
            raise ValueError(f"layout: got {self.layout!r}, expected 'fixed' or 'ragged'")
        if self.kv_granularity & (self.kv_granularity - 1):
            raise ValueError(f"kv_granularity: got {self.kv_granularity}, expected a power of two")
        if self.value_dim > self.dim:
            raise ValueError(f"value_dim: got {self.value_dim}, expected at most dim ({self.dim})")

    @property
    def dtype_names(self) -> tuple[str, str]:
        """The two dtypes as the support matrix names them."""
        return _DTYPES[self.q_dtype], _DTYPES[self.kv_dtype]

    @property
    def planned_topk(self) -> int:
        """AITER's ``topk`` argument, which is its layout switch: negative means ragged."""
        return self.topk if self.layout == "fixed" else -1


@dataclass(frozen=True)
class PlanBuffers:
    """The six metadata buffers by name, so that no call depends on their order.

    Args:
        work_metadata_ptrs: uint64 ``[2]``, addresses of the next two.
        work_indptr: int32 ``[CUs + 1]``, which rows of work each CU does.
        work_info_set: int32 ``[works, 8]``, the rows of work.
        reduce_indptr: int32 ``[T + 1]``, which partial results belong to each output tile.
        reduce_final_map: int32 ``[T, 2]``, first and last query row of each tile.
        reduce_partial_map: int32 ``[partials]``, where each partial result lies.
    """

    work_metadata_ptrs: Tensor
    work_indptr: Tensor
    work_info_set: Tensor
    reduce_indptr: Tensor
    reduce_final_map: Tensor
    reduce_partial_map: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """Buffers by their names in AITER's fill function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def nbytes(self) -> int:
        """Bytes of the six buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.by_name().values())


def work_rows(plan: PlanBuffers) -> Tensor:
    """The rows of work that the plan holds, int32 ``[works, 8]`` on the CPU; reads the device.

    Raises:
        RuntimeError: during graph capture.
    """
    if is_capturing():
        raise RuntimeError("plan: reading it back needs the host, expected no graph capture")
    count = int(plan.work_indptr[-1])
    return plan.work_info_set[:count].cpu()


def planned_keys(plan: PlanBuffers, rows: int) -> Tensor:
    """How many keys the plan visits for each query row, int32 ``[rows]`` on the CPU; reads the device.

    Rows that the plan names beyond ``rows`` are not counted. For head counts that AITER plans without folding, 16 among
    them.
    """
    work = work_rows(plan)
    batch, length = work[:, 0].to(torch.int64), work[:, 5] - work[:, 4]
    inside = (batch >= 0) & (batch < rows)
    return torch.zeros(rows, dtype=torch.int32).index_add_(0, batch[inside], length[inside])


def check_plan(plan: PlanBuffers, shape: DecodeShape, kv_indptr: Tensor) -> None:
    """Check that a plan visits exactly the keys that the lengths say, reading both back from the device.

    Args:
        plan: filled buffers.
        shape: what they were made for.
        kv_indptr: int32 ``[T + 1]``, the lengths of *now*.

    Raises:
        ValueError: a row of work reaches outside its list, or a list is not covered; the message names the row.
        RuntimeError: during graph capture.
    """
    work = work_rows(plan)
    ends = kv_indptr.cpu().to(torch.int64)
    lengths = ends[1:] - ends[:-1]
    starts = ends[:-1]
    if shape.layout == "fixed":
        lengths = lengths.clamp(max=shape.topk)
        starts = torch.arange(shape.rows) * shape.topk
    for index, (batch, _, _, _, kv_start, kv_end, _, _) in enumerate(work.tolist()):
        if not 0 <= batch < shape.rows:
            raise ValueError(f"plan: work row {index} is for batch {batch}, expected 0 to {shape.rows - 1} (stale?)")
        begin, end = int(starts[batch]), int(starts[batch] + lengths[batch])
        if kv_start < begin or kv_end > end:
            raise ValueError(
                f"plan: work row {index} reads entries {kv_start} to {kv_end} of batch {batch}, whose list is {begin} "
                f"to {end} now: a stale plan, expected get_mla_metadata_v1 after every change of lengths"
            )
    counted = planned_keys(plan, shape.rows)
    short = (counted != lengths).nonzero()
    if len(short):
        batch = int(short[0])
        raise ValueError(
            f"plan: covers {int(counted[batch])} keys of batch {batch}, whose length is {int(lengths[batch])} now: a "
            "stale plan, expected get_mla_metadata_v1 after every change of lengths"
        )
