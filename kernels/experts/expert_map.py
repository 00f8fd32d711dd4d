"""Which rank holds which expert: a global -> local map as a type of its own.

Two representations are in use and look alike: a *map* (``[E]``, local number or -1) and AITER's 0/1 *mask*
(``[E + shared + 1]``, last entry 0). A mask read as a map sends every token to local experts 0 and 1, and every matrix
product stays right (vllm#49758: GSM8K 0.00 before the fix, 0.95 after). Here kernels take an `ExpertMap`, a tensor is
refused, and the mask is made from the map where AITER wants one.

Placements: ``linear`` gives every rank a contiguous range, ``round_robin`` expert e to rank e mod R. Experts that do
not divide go to the first ranks, one each.

Reference: `dsv4ref.ref.dispatch`. Hazards: H15, H38.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture

__all__ = ["ExpertMap", "Placement"]

Placement = Literal["linear", "round_robin"]

REMAP_LANES = 1024
"""Ids one remap program reads."""


@triton.jit
def _local_ids(ids, table, live, E: tl.constexpr):
    """table[id] for ids that are experts, -1 for all others: an id of -1 must not wrap to the table's end."""
    known = live & (ids >= 0) & (ids < E)
    return tl.load(table + ids, mask=known, other=-1)


@triton.jit
def _remap_kernel(ids, table, out, count, E: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = at < count
    found = tl.load(ids + at, mask=live, other=-1)
    tl.store(out + at, _local_ids(found, table, live, E), mask=live)


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """The experts of one rank.

    Args:
        table: int32 ``[E]`` contiguous, this rank's number of each global expert, -1 for experts elsewhere.
        num_local: experts on this rank; the table must hold each of 0 .. num_local - 1 exactly once.
        rank, ranks: this rank and how many there are.

    Raises:
        TypeError, ValueError: not such a table. A 0/1 mask never is: it holds a number twice, or the wrong ones.
    """

    table: Tensor
    num_local: int
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        checks.check_tensor("table", self.table, dtype=torch.int32, shape=("E",), contiguous=True)
        for name, value, low in (("num_local", self.num_local, 0), ("ranks", self.ranks, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least {low}")
        if not isinstance(self.rank, int) or not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank: got {self.rank!r}, expected 0 to {self.ranks - 1}")
        # Once per layer, at load, so the wait for the device is affordable.
        local = sorted(number for number in self.table.tolist() if number != -1)
        if local != list(range(self.num_local)):
            hint = ""
            if set(self.table.tolist()) <= {0, 1}:
                hint = " (this looks like a 0/1 mask; a map holds local numbers, and -1 for experts elsewhere)"
            shown = ", ".join(map(str, local[:6])) + (", ..." if len(local) > 6 else "")
            raise ValueError(
                f"table: its local numbers are [{shown}], expected each of 0 to {self.num_local - 1} once{hint}"
            )

    @staticmethod
    def placed(
        num_experts: int, *, rank: int, ranks: int, placement: Placement = "linear", device: torch.device | str = "cpu"
    ) -> ExpertMap:
        """The map of one rank under a placement.

        Args:
            num_experts: global number of experts E, at least 1; it need not be a multiple of ``ranks``.
            rank, ranks: this rank and how many there are.
            placement: "linear" or "round_robin".
            device: where kernels will read it.

        Raises:
            ValueError: an argument is not as described.
        """
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"num_experts: got {num_experts!r}, expected an integer of at least 1")
        if not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"ranks: got {ranks!r}, expected an integer of at least 1")
        if not isinstance(rank, int) or not 0 <= rank < ranks:
            raise ValueError(f"rank: got {rank!r}, expected 0 to {ranks - 1}")
        if placement not in get_args(Placement):
            raise ValueError(f"placement: got {placement!r}, expected one of {list(get_args(Placement))}")
        if placement == "linear":
            share, rest = divmod(num_experts, ranks)
            first = rank * share + min(rank, rest)
            mine = range(first, first + share + (rank < rest))
        else:
            mine = range(rank, num_experts, ranks)
        table = torch.full((num_experts,), -1, dtype=torch.int32)
        table[list(mine)] = torch.arange(len(mine), dtype=torch.int32)
        return ExpertMap(table.to(device), len(mine), rank, ranks)

    @property
    def num_experts(self) -> int:
        """Global number of experts E."""
        return int(self.table.shape[0])

    def global_ids(self) -> Tensor:
        """The global expert behind each local number, int64 ``[num_local]``; waits for the device."""
        local = self.table.to(torch.int64)
        mine = (local >= 0).nonzero()[:, 0]
        return mine[local[mine].argsort()]

    def mask(self, num_shared: int = 0) -> Tensor:
        """AITER's view: int32 ``[E + num_shared + 1]``, 1 for experts of this rank and shared ones, 0 at the end.

        Args:
            num_shared: shared experts fused behind the routed ones, present on every rank.

        Source: vLLM, ``determine_expert_map`` (aiter branch): a trailing 0 stands for no expert.
        """
        if not isinstance(num_shared, int) or num_shared < 0:
            raise ValueError(f"num_shared: got {num_shared!r}, expected an integer of at least 0")
        local = (self.table >= 0).to(torch.int32)
        return torch.cat([local, local.new_ones(num_shared), local.new_zeros(1)])

    def remap(self, experts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Local numbers of global expert ids, one kernel launch.

        Args:
            experts: int32 ``[M, k]`` contiguous global ids. -1, and any other id that is no expert, gives -1.
            out: int32 ``[M, k]`` contiguous to write into; allocated if None.

        Returns:
            int32 ``[M, k]``, -1 for slots that are not this rank's.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, layout or device, or an output that overlaps an input.
        """
        where = self.table.device
        checks.check_tensor("experts", experts, dtype=torch.int32, shape=("M", "k"), device=where, contiguous=True)
        if out is None:
            out = torch.empty_like(experts)
        else:
            checks.check_tensor(
                "out", out, dtype=torch.int32, shape=tuple(experts.shape), device=where, contiguous=True
            )
            checks.check_no_overlap("out", out, "experts", experts)
            checks.check_no_overlap("out", out, "the map", self.table)
        architecture(where)
        count = experts.numel()
        if count:
            lanes = min(REMAP_LANES, triton.next_power_of_2(count))
            _remap_kernel[(triton.cdiv(count, lanes),)](
                experts, self.table, out, count, E=self.num_experts, LANES=lanes, num_warps=4
            )
        return out
