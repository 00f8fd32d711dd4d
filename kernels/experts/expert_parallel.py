"""Experts spread over ranks: tokens go to everybody, each rank computes the experts it holds, the parts are summed.

::

    dispatch   all-gather of tokens, router weights and ids, every rank padded to the same capacity with ids of -1
    experts    the caller's function on all tokens, with this rank's numbers for its own experts and -1 for the others
    combine    all-reduce of the fp32 parts; a rank keeps the rows of its own tokens
    shared     added once, by the rank that owns the token, after the sum

Gathering everything is the simplest exchange that is right for any routing: sizes are fixed by the capacity, no count
travels and the host waits for nothing, as a captured graph needs (not tried here). It moves R times the tokens that an
all-to-all of exactly the needed rows would at worst; a rank whose experts nobody chose computes on nothing and adds
zeros.

For any backend of ``torch.distributed``: gloo on CPUs, which the tests run, NCCL (RCCL) on GPUs.

Source: vLLM's all-gather / reduce-scatter dispatch, in outline. Hazards: H12 (padded rows), H15, H38.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.experts.expert_map import ExpertMap

__all__ = ["combine", "expert_parallel", "gather_tokens"]

LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x ``[N, D]``, weights ``[N, k]``, local ids ``[N, k]``) -> weighed sum over the local slots, fp32 ``[N, D]``."""


def gather_tokens(
    x: Tensor, weights: Tensor, experts: Tensor, *, capacity: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' tokens on every rank, in rank order, each rank's share padded to ``capacity`` rows.

    Args:
        x: ``[M, D]``, M at most ``capacity``, 0 included; D and dtype alike on all ranks.
        weights: fp32 ``[M, k]``.
        experts: int32 ``[M, k]`` global ids.
        capacity: rows per rank, alike on all ranks.
        group: the ranks; None for all.

    Returns:
        x ``[R * capacity, D]``, weights and experts ``[R * capacity, k]``. Padding rows are zeros with ids of -1.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or more tokens than capacity.
    """
    checks.check_tensor("weights", weights, dtype=torch.float32, shape=("M", "k"))
    checks.check_tensor("experts", experts, dtype=torch.int32, shape=tuple(weights.shape), device=weights.device)
    rows = weights.shape[0]
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    checks.check_tensor("x", x, dtype=x.dtype, shape=(rows, "D"), device=weights.device)
    if not isinstance(capacity, int) or capacity < max(rows, 1):
        raise ValueError(f"capacity: got {capacity!r}, expected an integer of at least {max(rows, 1)}")
    filled: tuple[tuple[Tensor, float], ...] = ((x, 0.0), (weights, 0.0), (experts, -1))
    return tuple(_gathered(tensor, fill, capacity, group) for tensor, fill in filled)  # type: ignore[return-value]


def combine(parts: Tensor, *, rows: int, capacity: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks of their parts, of which this rank keeps its own tokens.

    Args:
        parts: fp32 ``[R * capacity, D]``, this rank's; overwritten by the sum.
        rows: this rank's tokens M.
        capacity: as `gather_tokens`.
        group: the ranks; None for all.

    Returns:
        fp32 ``[M, D]``, a view of ``parts``.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.
    """
    ranks = dist.get_world_size(group)
    checks.check_tensor("parts", parts, dtype=torch.float32, shape=(ranks * capacity, "D"), contiguous=True)
    if not 0 <= rows <= capacity:
        raise ValueError(f"rows: got {rows}, expected 0 to the capacity {capacity}")
    dist.all_reduce(parts, group=group)
    first = dist.get_rank(group) * capacity
    return parts[first : first + rows]


def expert_parallel(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    expert_map: ExpertMap,
    local_experts: LocalExperts,
    *,
    capacity: int,
    shared: Callable[[Tensor], Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The routed experts (and the shared one) of this rank's tokens, with experts spread over the ranks of a group.

    Args:
        x: ``[M, D]`` this rank's tokens, M at most ``capacity``; 0 on a rank without tokens, which takes part all the
            same.
        weights: fp32 ``[M, k]`` router weights.
        experts: int32 ``[M, k]`` global ids, -1 for slots that nobody computes.
        expert_map: of this rank.
        local_experts: computes this rank's experts; it must skip slots with local id -1.
        capacity: rows per rank, alike on all ranks.
        shared: ``[M, D]`` -> ``[M, D]``, added once and without a weight; None for none.
        group: the ranks; None for all.

    Returns:
        fp32 ``[M, D]``.

    Raises:
        TypeError: a tensor or a mask where the map belongs.
        ValueError: a map of another rank or number of ranks than the group's; otherwise as `gather_tokens`.
    """
    if not isinstance(expert_map, ExpertMap):
        raise TypeError(
            f"expert_map: got {type(expert_map).__name__}, expected an ExpertMap (a bare tensor may be a 0/1 mask)"
        )
    here = dist.get_rank(group), dist.get_world_size(group)
    if (expert_map.rank, expert_map.ranks) != here:
        raise ValueError(
            f"expert_map: for rank {expert_map.rank} of {expert_map.ranks}, expected rank {here[0]} of {here[1]}"
        )
    all_x, all_weights, all_experts = gather_tokens(x, weights, experts, capacity=capacity, group=group)
    parts = local_experts(all_x, all_weights, expert_map.remap(all_experts))
    y = combine(parts, rows=x.shape[0], capacity=capacity, group=group)
    return y if shared is None else y + shared(x)


def _gathered(tensor: Tensor, fill: float, capacity: int, group: dist.ProcessGroup | None) -> Tensor:
    padded = tensor.new_full((capacity, tensor.shape[1]), fill)
    padded[: tensor.shape[0]] = tensor
    ranks = dist.get_world_size(group)
    everybody = tensor.new_empty((ranks * capacity, tensor.shape[1]))
    dist.all_gather(list(everybody.chunk(ranks)), padded, group=group)
    return everybody
