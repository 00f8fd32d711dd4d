"""Routing data of a grouped GEMM, built on the device: which rows each expert reads, where they go, and its tiles.

A *slot* is one of a token's k expert choices, numbered ``token * k + choice``. Slots of local experts are sorted by
expert, stably, so that each expert's rows are contiguous and in token order::

    histogram[e]     slots of expert e
    offsets[e]       first sorted position of expert e;  offsets[E] is the number of local slots
    gather[p]        slot at sorted position p           -1 behind the last local slot
    scatter[s]       sorted position of slot s           -1 for slots that are not local; else gather's inverse
    tile_expert[t]   expert of tile t                    -1 behind the last tile
    tile_first[t]    its first sorted position; the tile ends block_m later or with its expert

The grid of the GEMM is `max_tiles`, which depends on shapes alone: nothing is read back to the host, and a captured
graph may replay with any routing.

Three launches: count (a histogram per block of tokens), scan (over blocks, per expert), place (positions and tiles).
There are no atomics, so the order is the same in every run. A block is 32 whole tokens, 32 * 6 = 192 slots in 256
lanes: lanes beyond the *block's* slots belong to the next program and must not be counted here, although their slots
exist. Slots that are not local sort behind all experts as one more expert, E, which makes them write the -1 tail.

Reference: `dsv4ref.ref.dispatch`. Source of the layout: triton_kernels ``routing`` (gather and scatter indices, blocks
of 32 tokens, bound on tiles). Hazards: H12, H15, H38.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts.expert_map import ExpertMap, _local_ids

__all__ = ["BLOCK_TOKENS", "DispatchPlan", "allocate_plan", "check_experts", "max_tiles", "plan_dispatch"]

BLOCK_TOKENS = 32
"""Tokens whose slots one program counts and places."""
CHUNK = 32
"""Experts, slots or tiles that a program compares with its lanes at a time."""
SCAN_EXPERTS = 16
"""Experts one scan program carries over the blocks."""


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Routing data of one batch; the module docstring says what each tensor holds.

    Args:
        block_m: rows of a tile.
        local: int32 ``[M, k]``, local expert of each slot or -1.
        histogram: int32 ``[E]``.
        offsets: int32 ``[E + 1]``.
        gather, scatter: int32 ``[M * k]``.
        tile_expert, tile_first: int32 ``[max_tiles]``.
        block_counts: int32 ``[blocks, E + 1]``, scratch: slots of each expert in earlier blocks.
    """

    block_m: int
    local: Tensor
    histogram: Tensor
    offsets: Tensor
    gather: Tensor
    scatter: Tensor
    tile_expert: Tensor
    tile_first: Tensor
    block_counts: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "block_m"}


def max_tiles(slots: int, num_experts: int, block_m: int) -> int:
    """Most tiles that any routing of ``slots`` slots can need: each expert rounds up once, if there is a slot for it.

    Args:
        slots: M * k.
        num_experts: E.
        block_m: rows of a tile.
    """
    opened = min(slots, num_experts)
    return opened + (slots - opened) // block_m if opened else 0


@triton.jit
def _expert_of(local, slots, live, E: tl.constexpr):
    """Local expert of each slot; E for slots that are not local."""
    found = tl.load(local + slots, mask=live, other=-1)
    return tl.where((found >= 0) & (found < E), found, E)


@triton.jit
def _count_kernel(
    experts, table, local, block_counts, total,
    E: tl.constexpr, MAPPED: tl.constexpr, NUM_GLOBAL: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, LANES: tl.constexpr, CHUNK_E: tl.constexpr,
):  # fmt: skip
    """block_counts[b, e] = slots of expert e in block b, and the slots' local experts."""
    block = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    slots = block * BLOCK_SLOTS + lanes
    live = (lanes < BLOCK_SLOTS) & (slots < total)
    found = tl.load(experts + slots, mask=live, other=-1)
    if MAPPED:
        found = _local_ids(found, table, live, NUM_GLOBAL)
    found = tl.where((found >= 0) & (found < E), found, -1)
    tl.store(local + slots, found, mask=live)
    found = tl.where(found < 0, E, found)
    row = block_counts + block.to(tl.int64) * (E + 1)
    for first in range(0, E + 1, CHUNK_E):
        numbers = first + tl.arange(0, CHUNK_E)
        same = (numbers[:, None] == found[None, :]) & live[None, :]
        tl.store(row + numbers, tl.sum(same.to(tl.int32), axis=1), mask=numbers < E + 1)


@triton.jit
def _scan_kernel(block_counts, histogram, blocks, E: tl.constexpr, CHUNK_E: tl.constexpr, CHUNK_B: tl.constexpr):
    """block_counts[b, e] <- sum of block_counts[:b, e];  histogram[e] = the whole sum"""
    numbers = tl.program_id(0) * CHUNK_E + tl.arange(0, CHUNK_E)
    real = numbers < E + 1
    running = tl.zeros((CHUNK_E,), dtype=tl.int32)
    for first in range(0, blocks, CHUNK_B):
        rows = first + tl.arange(0, CHUNK_B)
        at = block_counts + rows[:, None].to(tl.int64) * (E + 1) + numbers[None, :]
        inside = (rows < blocks)[:, None] & real[None, :]
        counts = tl.load(at, mask=inside, other=0)
        upto = tl.cumsum(counts, axis=0)
        tl.store(at, running[None, :] + upto - counts, mask=inside)
        running += tl.sum(counts, axis=0)
    tl.store(histogram + numbers, running, mask=numbers < E)


@triton.jit
def _place_kernel(
    local, block_counts, histogram, offsets, gather, scatter, tile_expert, tile_first, total, tiles,
    E: tl.constexpr, BLOCK_SLOTS: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK_N: tl.constexpr,
):  # fmt: skip
    """Place the slots of one block, and write this program's share of the tiles."""
    block = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    slots = block * BLOCK_SLOTS + lanes
    live = (lanes < BLOCK_SLOTS) & (slots < total)
    mine = _expert_of(local, slots, live, E)

    # position = slots of lower experts + same expert in earlier blocks + same expert earlier in this block
    position = tl.load(block_counts + block.to(tl.int64) * (E + 1) + mine, mask=live, other=0)
    for first in range(0, BLOCK_SLOTS, CHUNK_N):
        others = first + tl.arange(0, CHUNK_N)  # a block is a multiple of CHUNK_N slots
        exists = block * BLOCK_SLOTS + others < total
        theirs = _expert_of(local, block * BLOCK_SLOTS + others, exists, E)
        earlier = exists[None, :] & (others[None, :] < lanes[:, None]) & (theirs[None, :] == mine[:, None])
        position += tl.sum(earlier.to(tl.int32), axis=1)
    start = 0
    for first in range(0, E, CHUNK_N):
        numbers = first + tl.arange(0, CHUNK_N)
        counts = tl.load(histogram + numbers, mask=numbers < E, other=0)
        position += tl.sum(tl.where(numbers[None, :] < mine[:, None], counts[None, :], 0), axis=1)
        if block == 0:
            tl.store(offsets + numbers, start + tl.cumsum(counts, axis=0) - counts, mask=numbers < E)
        start += tl.sum(counts, axis=0)
    if block == 0:
        tl.store(offsets + E, start)

    # Slots that are not local come behind all others, so between them the programs write every entry once. The bound
    # on the position holds for right counts: a wrong one has to turn a gate red, not write where it pleases.
    is_local = mine < E
    tl.store(scatter + slots, tl.where(is_local, position, -1), mask=live)
    tl.store(gather + position, tl.where(is_local, slots, -1), mask=live & (position < total))
    for first in range(block * CHUNK_N, tiles, tl.num_programs(0) * CHUNK_N):
        _place_tiles(first, histogram, tile_expert, tile_first, tiles, E, BLOCK_M, CHUNK_N)


@triton.jit
def _place_tiles(
    first_tile, histogram, tile_expert, tile_first, tiles, E: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK_N: tl.constexpr
):  # fmt: skip
    """The expert of a tile is the number of experts whose tiles all end at or before it."""
    tile = first_tile + tl.arange(0, CHUNK_N)
    expert = tl.zeros((CHUNK_N,), dtype=tl.int32)
    tiles_before = tl.zeros((CHUNK_N,), dtype=tl.int32)
    rows_before = tl.zeros((CHUNK_N,), dtype=tl.int32)
    end = 0
    for first in range(0, E, CHUNK_N):
        numbers = first + tl.arange(0, CHUNK_N)
        counts = tl.load(histogram + numbers, mask=numbers < E, other=0)
        needed = (counts + BLOCK_M - 1) // BLOCK_M
        done = ((end + tl.cumsum(needed, axis=0))[None, :] <= tile[:, None]) & (numbers < E)[None, :]
        expert += tl.sum(done.to(tl.int32), axis=1)
        tiles_before += tl.sum(tl.where(done, needed[None, :], 0), axis=1)
        rows_before += tl.sum(tl.where(done, counts[None, :], 0), axis=1)
        end += tl.sum(needed, axis=0)
    used = tile < end
    at = rows_before + (tile - tiles_before) * BLOCK_M
    tl.store(tile_expert + tile, tl.where(used, expert, -1), mask=tile < tiles)
    tl.store(tile_first + tile, tl.where(used, at, -1), mask=tile < tiles)


def allocate_plan(
    tokens: int, top_k: int, num_experts: int, *, block_m: int, device: torch.device | str = "cpu"
) -> DispatchPlan:
    """A plan's tensors, unwritten: static memory for `plan_dispatch` under graph capture.

    Args:
        tokens: M, 0 or more.
        top_k: k, 1 or more.
        num_experts: E on this rank, 0 or more (a rank may hold none).
        block_m: rows of a tile, 1 or more.
        device: where.

    Raises:
        ValueError: a size is not as described, or M * k does not fit 31 bits.
    """
    sizes = (("tokens", tokens, 0), ("top_k", top_k, 1), ("num_experts", num_experts, 0), ("block_m", block_m, 1))
    for name, value, low in sizes:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least {low}")
    if tokens * top_k > 2**31 - 1 - triton.next_power_of_2(BLOCK_TOKENS * top_k):
        raise ValueError(f"tokens: got {tokens} x {top_k} slots, expected fewer than 2^31 (positions are int32)")
    shapes = _plan_shapes(tokens, top_k, num_experts, block_m)
    tensors = {name: torch.empty(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()}
    return DispatchPlan(block_m=block_m, **tensors)


def _plan_shapes(tokens: int, top_k: int, num_experts: int, block_m: int) -> dict[str, tuple[int, ...]]:
    slots = tokens * top_k
    tiles = max_tiles(slots, num_experts, block_m)
    return {
        "local": (tokens, top_k),
        "histogram": (num_experts,),
        "offsets": (num_experts + 1,),
        "gather": (slots,),
        "scatter": (slots,),
        "tile_expert": (tiles,),
        "tile_first": (tiles,),
        "block_counts": (triton.cdiv(tokens, BLOCK_TOKENS), num_experts + 1),
    }


def plan_dispatch(
    experts: Tensor,
    num_experts: int | None = None,
    *,
    block_m: int,
    expert_map: ExpertMap | None = None,
    out: DispatchPlan | None = None,
    check: bool = False,
) -> DispatchPlan:
    """Sort a batch's slots by expert: three kernel launches (two for an empty batch), no host sync.

    Args:
        experts: int32 ``[M, k]`` contiguous, any k. Global ids with a map, local ones without. -1, and any id that is
            no expert, marks a slot that nobody computes here. An expert may stand in a row twice: both slots are kept.
        num_experts: E of this rank; taken from the map if there is one.
        block_m: rows of a tile.
        expert_map: remaps in the same launches. A tensor is refused: a map and a mask look alike.
        out: a plan of these sizes to write into; allocated if None. Every element is written.
        check: refuse ids that are no expert (-1 aside) and experts that stand in a row twice; waits for the device, so
            not under graph capture.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, layout, size or device; what ``check`` found.
    """
    checks.check_tensor("experts", experts, dtype=torch.int32, shape=("M", "k"), contiguous=True)
    num_experts = _local_count(num_experts, expert_map, experts.device)
    architecture(experts.device)
    if check:
        check_experts(experts, expert_map.num_experts if expert_map is not None else num_experts)
    tokens, top_k = (int(size) for size in experts.shape)
    out = _checked_plan(out, experts, tokens, top_k, num_experts, block_m)

    blocks, slots = out.block_counts.shape[0], tokens * top_k
    shape = {"BLOCK_SLOTS": BLOCK_TOKENS * top_k, "LANES": triton.next_power_of_2(BLOCK_TOKENS * top_k)}
    if blocks:
        _count_kernel[(blocks,)](
            experts, expert_map.table if expert_map is not None else experts, out.local, out.block_counts, slots,
            E=num_experts, MAPPED=expert_map is not None,
            NUM_GLOBAL=expert_map.num_experts if expert_map is not None else 0, CHUNK_E=CHUNK, num_warps=4, **shape,
        )  # fmt: skip
    _scan_kernel[(triton.cdiv(num_experts + 1, SCAN_EXPERTS),)](
        out.block_counts, out.histogram, blocks, E=num_experts, CHUNK_E=SCAN_EXPERTS, CHUNK_B=CHUNK, num_warps=4
    )
    _place_kernel[(max(blocks, 1),)](
        out.local, out.block_counts, out.histogram, out.offsets, out.gather, out.scatter, out.tile_expert,
        out.tile_first, slots, out.tile_expert.shape[0], E=num_experts, BLOCK_M=block_m, CHUNK_N=CHUNK, num_warps=4,
        **shape,
    )  # fmt: skip
    return out


def check_experts(experts: Tensor, num_experts: int) -> None:
    """Refuse ids outside -1 .. num_experts - 1, and an expert that a token names twice; waits for the device.

    Args:
        experts: integer ``[M, k]``.
        num_experts: how many there are.

    Raises:
        ValueError: naming the first such token.
    """
    ordered = experts.sort(dim=1).values
    outside = ((experts < -1) | (experts >= num_experts)).any(dim=1)
    doubled = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
    for bad, wanted in ((outside, f"-1 to {num_experts - 1}"), (doubled, "each expert once")):
        if bool(bad.any()):
            token = int(bad.to(torch.uint8).argmax())
            raise ValueError(f"experts: token {token} has {experts[token].tolist()}, expected {wanted}")


def _local_count(num_experts: int | None, expert_map: ExpertMap | None, where: torch.device) -> int:
    if expert_map is None:
        if num_experts is None:
            raise ValueError("num_experts: got None without an expert_map, expected the number of experts")
        return num_experts
    if not isinstance(expert_map, ExpertMap):
        raise TypeError(
            f"expert_map: got {type(expert_map).__name__}, expected an ExpertMap (a bare tensor may be a 0/1 mask)"
        )
    if num_experts not in (None, expert_map.num_local):
        raise ValueError(f"num_experts: got {num_experts}, expected {expert_map.num_local} like the map, or None")
    if expert_map.table.device != where:
        raise ValueError(f"expert_map: on {expert_map.table.device}, expected {where} like experts")
    return expert_map.num_local


def _checked_plan(
    out: DispatchPlan | None, experts: Tensor, tokens: int, top_k: int, num_experts: int, block_m: int
) -> DispatchPlan:
    if out is None:
        return allocate_plan(tokens, top_k, num_experts, block_m=block_m, device=experts.device)
    if not isinstance(out, DispatchPlan):
        raise TypeError(f"out: got {type(out).__name__}, expected a DispatchPlan")
    if out.block_m != block_m:
        raise ValueError(f"out: for tiles of {out.block_m} rows, expected {block_m}")
    wanted = _plan_shapes(tokens, top_k, num_experts, block_m)
    for name, tensor in out.tensors.items():
        checks.check_tensor(
            f"out.{name}", tensor, dtype=torch.int32, shape=wanted[name], device=experts.device,
            contiguous=True,
        )  # fmt: skip
        checks.check_no_overlap(f"out.{name}", tensor, "experts", experts)
    return out
