"""Per-step metadata of a sparse decode, and the cache that skips the plan when nothing it depends on has changed.

A step holds requests; each computes some query tokens (one in decode, a chunk in prefill). Token i of a request's q
tokens sees the KV entries up to itself, and attends to at most top-k of them::

    length = min(seq - q + i + 1, topk)              i = 0 .. q - 1;  0 for a padding request, which has seq = 0

The work plan is a function of these per-token lengths and of nothing else that changes between steps. A key is a
fingerprint of what the host knows of a step; a plan may be reused if the keys are equal. A key is *safe* if equal keys
imply equal lengths, and *tight* if equal lengths imply equal keys. Three keys stand here as plain functions: the one
that vllm#42982 published (not safe), the one that vllm#47766 made of it (safe), and `lengths_key` (safe and tight).

Source: vllm#42982, vllm#47766; vLLM 0.33.0 v1/attention/backends/mla/rocm_aiter_mla_sparse.py, ``build``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from dsv4ref.kernels.capture import is_capturing
from dsv4ref.kernels.work_plan import Plan

__all__ = [
    "KEYS",
    "CacheStats",
    "Key",
    "MetadataCache",
    "Step",
    "StepMetadata",
    "kv_indptr_of",
    "lengths_key",
    "make_step",
    "published_key",
    "vllm_033_key",
]


@dataclass(frozen=True)
class Step:
    """What the scheduler hands over for one step of R requests and T query tokens.

    Args:
        query_lens: int32 ``[R]`` on the host: tokens that each request computes now.
        host_seq_lens: int32 ``[R]`` on the host: each request's length with these tokens, 0 for padding; None where
            only the device knows, as with asynchronous scheduling or speculative tokens.
        seq_lens: the same on the device, int32 ``[R]``.
        req_id: int32 ``[T]`` on the device: the request of each token.
        behind: int32 ``[T]`` on the device: tokens of the same request that come after it in this step.
    """

    query_lens: Tensor
    host_seq_lens: Tensor | None
    seq_lens: Tensor
    req_id: Tensor
    behind: Tensor

    @property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return self.req_id.numel()


def make_step(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    on_host: bool = True,
) -> Step:
    """Build a step.

    Args:
        query_lens: tokens that each request computes, 0 or more.
        seq_lens: each request's length with these tokens; 0 for a padding request.
        device: where the device's part goes.
        on_host: whether the host knows the lengths; False leaves `Step.host_seq_lens` None.

    Raises:
        ValueError: other counts, a negative number, or a request shorter than its own query.
    """
    if len(query_lens) != len(seq_lens):
        raise ValueError(f"seq_lens: got {len(seq_lens)} requests, expected {len(query_lens)}, one per query length")
    for request, (query, seq) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if query < 0:
            raise ValueError(f"query_lens[{request}]: got {query}, expected 0 or more")
        if seq < query and seq != 0:
            raise ValueError(f"seq_lens[{request}]: got {seq}, expected at least its {query} query tokens, or 0")
    queries = np.asarray(query_lens, dtype=np.int32)
    ends = np.cumsum(queries, dtype=np.int32)
    req_id = np.repeat(np.arange(queries.size, dtype=np.int32), queries)
    behind = ends[req_id] - 1 - np.arange(req_id.size, dtype=np.int32)
    host = torch.tensor(list(seq_lens), dtype=torch.int32)
    return Step(
        query_lens=torch.from_numpy(queries),
        host_seq_lens=host if on_host else None,
        seq_lens=host.to(device, copy=True),
        req_id=torch.from_numpy(req_id).to(device),
        behind=torch.from_numpy(behind).to(device),
    )


def kv_indptr_of(step: Step, topk: int) -> Tensor:
    """Where each token's KV entries begin: int32 ``[T + 1]`` on the device, without asking the host for lengths.

    Args:
        step: the step.
        topk: entries that a token attends to at most, at least 1.

    Raises:
        ValueError: `topk` below 1.
    """
    _check_topk(topk)
    lengths = (step.seq_lens.index_select(0, step.req_id) - step.behind).clamp_(0, topk)  # the causal ramp
    indptr = lengths.new_zeros(step.tokens + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=indptr[1:])
    return indptr


# --- keys ---

Key = Callable[[Step, int], Hashable | None]
"""(step, topk) -> a fingerprint, or None where the host does not know enough to make one: then nothing is reused."""


def published_key(step: Step, topk: int) -> Hashable | None:
    """vllm#42982: (tokens, longest query, min(length, topk) per request). Leaves out how many tokens are context.

    The source's tuple also holds the number of heads, which is one number for the life of a metadata builder.
    """
    if step.host_seq_lens is None:
        return None
    seq_lens = step.host_seq_lens.numpy()
    return (step.tokens, int(step.query_lens.max()) if len(seq_lens) else 0, np.minimum(seq_lens, topk).tobytes())


def vllm_033_key(step: Step, topk: int) -> Hashable | None:
    """vllm#47766, as in vLLM 0.33.0: the published key, and min(context, topk) and the query length per request."""
    if step.host_seq_lens is None:
        return None
    queries = step.query_lens.numpy()
    context = np.minimum(step.host_seq_lens.numpy() - queries, topk)
    return (published_key(step, topk), context.tobytes(), queries.tobytes())


def lengths_key(step: Step, topk: int) -> Hashable | None:
    """The per-token lengths themselves, computed on the host: equal keys exactly where the lengths are equal."""
    if step.host_seq_lens is None:
        return None
    queries = step.query_lens.numpy()
    req_id = np.repeat(np.arange(queries.size), queries)
    behind = np.cumsum(queries)[req_id] - 1 - np.arange(req_id.size)
    lengths = np.clip(step.host_seq_lens.numpy()[req_id] - behind, 0, topk)
    return lengths.astype(np.int32).tobytes()


KEYS: Mapping[str, Key] = MappingProxyType(
    {"published": published_key, "vLLM 0.33": vllm_033_key, "lengths": lengths_key}
)
"""The keys by the names under which the chapter shows them."""


# --- the cache ---


@dataclass(frozen=True)
class CacheStats:
    """What a cache did: plans reused, plans made, and how many of these because the host knew no lengths."""

    hits: int = 0
    misses: int = 0
    unkeyed: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over steps; 0 before the first."""
        steps = self.hits + self.misses
        return self.hits / steps if steps else 0.0


@dataclass(frozen=True)
class StepMetadata:
    """What the attention kernel reads in one step: each token's KV range, the plan, and whether that was reused.

    ``kv_indptr`` is new in every step; a captured kernel has to read `serving.tail_fill.TailFilled.indptr` instead.
    """

    kv_indptr: Tensor
    plan: Plan
    reused: bool


class MetadataCache:
    """Plans a step's work, unless the previous step's plan has the same key.

    One plan is kept, in one set of buffers: captured graphs hold their addresses. The KV ranges are written in every
    step. A step whose key is None is planned and forgotten, so that the step after it is planned as well.

    The decision is the host's and is taken before a launch or a replay. Captured into a graph it would be frozen (H07),
    so `build` refuses to run under capture.

    Args:
        planner: (kv_indptr, plan) -> plan, writing the plan's buffers; `kernels.work_plan.plan_work` on the device.
        plan: the buffers, from `kernels.work_plan.empty_plan`.
        topk: entries that a token attends to at most.
        key: `lengths_key`, or another to compare with it.

    Raises:
        ValueError: `topk` below 1.
    """

    def __init__(self, planner: Callable[[Tensor, Plan], Plan], plan: Plan, topk: int, key: Key = lengths_key) -> None:
        _check_topk(topk)
        self._planner, self._plan, self._topk, self._key = planner, plan, topk, key
        self._seen: Hashable | None = None
        self._stats = CacheStats()

    @property
    def stats(self) -> CacheStats:
        """Counts since the cache was made."""
        return self._stats

    def build(self, step: Step) -> StepMetadata:
        """The metadata of a step; `StepMetadata.plan` is the cache's own buffers and good until the next call.

        Raises:
            RuntimeError: called while a graph is being captured.
        """
        if is_capturing():
            raise RuntimeError("build: called under graph capture, which would freeze the decision; call it before")
        kv_indptr = kv_indptr_of(step, self._topk)
        key = self._key(step, self._topk)
        reused = key is not None and key == self._seen
        if not reused:
            self._seen = None  # a planner that fails leaves a plan that belongs to no key
            self._planner(kv_indptr, self._plan)
            self._seen = key
        hits, misses, unkeyed = self._stats.hits, self._stats.misses, self._stats.unkeyed
        self._stats = CacheStats(hits + reused, misses + (not reused), unkeyed + (key is None))
        return StepMetadata(kv_indptr, self._plan, reused)


def _check_topk(topk: int) -> None:
    if topk < 1:
        raise ValueError(f"topk: got {topk}, expected at least 1")
