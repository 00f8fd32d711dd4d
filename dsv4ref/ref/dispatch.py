"""Expert dispatch in integers: where each expert lives, and the order in which it reads its tokens.

    slot           one of a token's k choices, token * k + choice
    local[s]       number that the slot's expert has on this rank, -1 if it lives elsewhere or is none
    histogram[e]   how many slots expert e of this rank has
    gather         the local slots by expert, then by slot, then -1
    scatter        position of each local slot in gather, -1 for the others
    tiles          runs of at most block_m positions of one expert, by expert

Plain loops over Python integers: this is the specification that the device's version is compared with.

Source: triton_kernels, ``routing`` (layout of gather and scatter indices); vLLM, ``determine_expert_map`` (placements).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DispatchRef", "dispatch_ref", "expert_table_ref", "remap_ref"]


@dataclass(frozen=True)
class DispatchRef:
    """Routing data of one rank, all int32: ``[E]``, ``[E + 1]``, ``[M * k]`` twice, ``[tiles]`` twice."""

    histogram: Tensor
    offsets: Tensor
    gather: Tensor
    scatter: Tensor
    tile_expert: Tensor
    tile_first: Tensor


def expert_table_ref(num_experts: int, rank: int, ranks: int, placement: str) -> Tensor:
    """int32 ``[E]``: this rank's number of every global expert, -1 for experts elsewhere.

    Args:
        num_experts: E, any number.
        rank, ranks: this rank and how many there are.
        placement: "linear" (contiguous ranges, the first ranks one expert longer where E does not divide) or
            "round_robin" (expert e on rank e mod R).

    Raises:
        ValueError: another placement.
    """
    if placement == "round_robin":
        owners = [expert % ranks for expert in range(num_experts)]
    elif placement == "linear":
        sizes = [num_experts // ranks + (r < num_experts % ranks) for r in range(ranks)]
        owners = [r for r, size in enumerate(sizes) for _ in range(size)]
    else:
        raise ValueError(f"placement: got {placement!r}, expected 'linear' or 'round_robin'")
    table, count = [], 0
    for owner in owners:
        table.append(count if owner == rank else -1)
        count += owner == rank
    return torch.tensor(table, dtype=torch.int32)


def remap_ref(experts: Tensor, table: Tensor) -> Tensor:
    """Local numbers of global ids, int32 of the same shape; an id that is no expert, -1 above all, gives -1.

    Args:
        experts: integer ``[M, k]``.
        table: integer ``[E]``.
    """
    numbers = table.tolist()
    flat = [numbers[e] if 0 <= e < len(numbers) else -1 for e in experts.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int32).reshape(experts.shape)


def dispatch_ref(local: Tensor, num_experts: int, block_m: int) -> DispatchRef:
    """Routing data of one rank.

    Args:
        local: integer ``[M, k]`` local numbers; whatever is not 0 .. E - 1 is skipped.
        num_experts: E of this rank.
        block_m: rows of a tile.

    Returns:
        `DispatchRef`; tiles are those in use, without a tail.
    """
    experts = local.flatten().tolist()
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(experts):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    gather = [slot for slots in slots_of for slot in slots]
    scatter = [-1] * len(experts)
    for position, slot in enumerate(gather):
        scatter[slot] = position
    offsets = [0]
    for slots in slots_of:
        offsets.append(offsets[-1] + len(slots))
    tiles = [(e, at) for e in range(num_experts) for at in range(offsets[e], offsets[e + 1], block_m)]
    columns = (
        [len(slots) for slots in slots_of],
        offsets,
        gather + [-1] * (len(experts) - len(gather)),
        scatter,
        [expert for expert, _ in tiles],
        [at for _, at in tiles],
    )
    return DispatchRef(*(torch.tensor(column, dtype=torch.int32) for column in columns))
