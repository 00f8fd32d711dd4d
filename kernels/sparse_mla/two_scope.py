"""Two-scope decode in three launches: one decode per scope with its LSE, then one merge that applies the sink.

The portable form of what AITER's persistent kernels make necessary: a decode kernel that knows one cache and no sink.
`sparse_mla_decode` walks both scopes in one launch and is the better choice wherever it can be used; this path exists
for producers that cannot (chapter 09 says what the split costs).

Every launch writes into memory the caller may own, nothing is read back to the host, and no choice depends on device
data, so the call can be captured into a graph.

Reference: `dsv4ref.ref.sparse_attention.sparse_attention_ref`, `dsv4ref.ref.merge.merge_scopes_ref`.
Source: ROCm/vllm#900 (AITER's persistent decode per scope, merged by LSE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels import checks
from dsv4ref.kernels.sparse_mla.decode import _check_query, _input_memory, sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.merge import QueryRotation, _check_inputs, _check_outputs, merge_scopes

__all__ = ["TwoScopeScratch", "two_scope_decode"]

_SCOPES = 2


@dataclass(frozen=True)
class TwoScopeScratch:
    """Partial results of both scopes, kept between steps. One stream at a time may use it.

    Args:
        partials: bf16 ``[2, T, H, 512]`` contiguous, SWA first.
        lses: fp32 ``[2, T, H]`` contiguous.
    """

    partials: Tensor
    lses: Tensor

    def __post_init__(self) -> None:
        checks.check_tensor(
            "partials", self.partials, dtype=torch.bfloat16, shape=(_SCOPES, "T", "H", HEAD_DIM), contiguous=True
        )
        checks.check_tensor(
            "lses", self.lses, dtype=torch.float32, shape=tuple(self.partials.shape[:3]),
            device=self.partials.device, contiguous=True,
        )  # fmt: skip
        checks.check_no_overlap("lses", self.lses, "partials", self.partials)

    @staticmethod
    def allocate(rows: int, heads: int, device: torch.device | str) -> TwoScopeScratch:
        """Memory for up to ``rows`` query rows of ``heads`` heads, uninitialised: every call writes what it reads."""
        return TwoScopeScratch(
            torch.empty((_SCOPES, rows, heads, HEAD_DIM), dtype=torch.bfloat16, device=device),
            torch.empty((_SCOPES, rows, heads), dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Device memory it takes, bytes."""
        return sum(t.numel() * t.element_size() for t in (self.partials, self.lses))


def two_scope_decode(
    q: Tensor,
    swa: Scope,
    extra: Scope,
    *,
    sink: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
    rotation: QueryRotation | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    scratch: TwoScopeScratch | None = None,
    launches: tuple[LaunchShape | None, LaunchShape | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """Decode attention of T query rows, scope by scope, and merge: three kernel launches.

    A layer with one scope has nothing to merge: call `sparse_mla_decode`.

    Args:
        q, swa, sink, scale, lse, return_lse: as `sparse_mla_decode`.
        extra: second scope, T rows; rows or the whole scope may be empty.
        rotation: as `merge_scopes`.
        out: as `merge_scopes`.
        scratch: partial results; its first T rows are used, H must fit exactly. Allocated if None.
        launches: launch shapes of the SWA and of the extra decode; None selects, as `sparse_mla_decode`.

    Returns:
        (out, lse or None).

    Raises:
        TypeError, ValueError: before any launch: as `sparse_mla_decode` and `merge_scopes`; a scratch that does not
            fit or that overlaps an input or an output.
    """
    if not isinstance(extra, Scope):
        raise TypeError(f"extra: got {type(extra).__name__}, expected a Scope (with one scope, sparse_mla_decode)")
    rows, heads = _check_query(q, swa, extra, sink, scale)
    for name, launch in zip(("launches[0]", "launches[1]"), launches, strict=True):
        if launch is not None and not isinstance(launch, LaunchShape):
            raise TypeError(f"{name}: got {type(launch).__name__}, expected a LaunchShape or None")
    if scratch is None:
        scratch = TwoScopeScratch.allocate(rows, heads, q.device)
    elif not isinstance(scratch, TwoScopeScratch):
        raise TypeError(f"scratch: got {type(scratch).__name__}, expected a TwoScopeScratch")
    _, capacity, scratch_heads, _ = scratch.partials.shape
    if capacity < rows or scratch_heads != heads or scratch.partials.device != q.device:
        raise ValueError(
            f"scratch: got {capacity} rows of {scratch_heads} heads on {scratch.partials.device}, "
            f"expected at least {rows} rows of {heads} heads on {q.device}"
        )
    partials, lses = scratch.partials[:, :rows], scratch.lses[:, :rows]
    inputs = _input_memory(q, swa, extra, sink)
    for name, written in (("scratch.partials", partials), ("scratch.lses", lses)):
        for other_name, other in inputs.items():
            checks.check_no_overlap(name, written, other_name, other)
    _check_outputs(out, lse, {**inputs, **_check_inputs(partials, lses, sink, rotation)})

    for scope, partial, part_lse, launch in zip((swa, extra), partials, lses, launches, strict=True):
        sparse_mla_decode(q, scope, scale=scale, out=partial, lse=part_lse, launch=launch)
    return merge_scopes(partials, lses, sink=sink, rotation=rotation, out=out, lse=lse, return_lse=return_lse)
