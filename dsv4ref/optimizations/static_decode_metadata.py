"""Chapter 04: make a decode step's ragged lists on the device, into buffers that a graph may capture.

Baseline: every step builds the lists of its three scopes from new tensors, with the operators of PyTorch. Optimised:
`serving.decode_lists.DecodeLists` keeps inputs and lists at fixed addresses and fills them with four launches.

Both are integers, so the gate is exact, against Python lists. It looks at every row of the captured batch size, padding
included, eager and replayed: the graph is captured on the first step and replayed on all of them. What stands behind
the last offset is nobody's, and is masked.

Source: doubleword's vLLM fork, commits 22cc02230 and 00af8fd88 (static buffers for the compressed scopes, then SWA);
cb8a18556 (reads of the device that a capture refuses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4ref import config, device
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.launches import operator_kind
from dsv4ref.kernels.sparse_mla.indices import LANES, SUM_ROWS
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.ref.indices import pack_entries_ref, recent_lists_ref, seen_ref
from dsv4ref.serving.decode_lists import DecodeLists, DecodeStep, ListGeometry, Ragged
from dsv4ref.serving.graphs import capture

__all__ = ["GAP", "LAUNCH_US", "OPTIMIZATION", "ListInputs", "observed", "rebuilt", "replayed"]

Outputs = dict[str, Tensor]

GAP = -9
"""What stands in the compared outputs behind a row's end."""

LAUNCH_US = 2.0
"""Assumed cost of one small launch inside a graph, microseconds, as in chapter 06."""

OPTIMIZED_LAUNCHES = {"SWA lists": 1, "C128 lists": 1, "count the C4 entries": 1, "pack the C4 lists": 1}

_GARBAGE_BLOCK = 2**26 + 3
"""Times 64 this is 192 in 32 bits: a block that is none, and a slot of somebody's."""


@dataclass(frozen=True)
class ListInputs:
    """Successive steps in one batch size: `rows` rows, padding included, and tables of `requests` requests."""

    geometry: ListGeometry
    steps: tuple[DecodeStep, ...]
    rows: int
    requests: int


def _build(case: Case, device: str, seed: int) -> ListInputs:
    p = case.params
    rng = torch.Generator().manual_seed(seed)
    blocks, pages = p["blocks"], p["pages"]
    geometry = ListGeometry(p["topk"], p["context"], swa_slots=blocks * 64, c4_slots=pages * 64, c128_slots=pages * 2)
    steps = []
    for positions in p["steps"]:
        tokens = len(positions)
        requests = torch.arange(tokens) // p["query_tokens"]
        if p["query_tokens"] == 1:
            requests = torch.randperm(tokens, generator=rng)
        count = int(requests.max()) + 1 if tokens else 0
        swa = torch.randint(0, blocks, (count, geometry.swa_blocks), generator=rng, dtype=torch.int32)
        page = torch.randint(0, pages, (count, geometry.pages), generator=rng, dtype=torch.int32)
        if p["garbage"]:
            swa[:, 1::2], page[:, 1::3] = _GARBAGE_BLOCK, -1
        steps.append(
            DecodeStep(
                positions=torch.tensor(positions, dtype=torch.int32).to(device),
                requests=requests.to(torch.int32).to(device),
                swa_table=swa.to(device),
                pages=page.to(device),
                entries=_chosen(positions, p["topk"], p["holes"], rng).to(device),
            )
        )
    return ListInputs(geometry, tuple(steps), p["rows"], max(step.swa_table.shape[0] for step in steps))


def _chosen(positions: Sequence[int], topk: int, holes: float, rng: torch.Generator) -> Tensor:
    """Entries as an indexer might choose them: distinct, in no order, -1 behind them and, at a rate, between them."""
    chosen = torch.full((len(positions), topk), -1, dtype=torch.int32)
    for row, position in enumerate(positions):
        picked = torch.randperm(seen_ref(position, 4), generator=rng)[:topk].to(torch.int32)
        picked = torch.where(torch.rand(picked.shape, generator=rng) < holes, -1, picked)
        chosen[row, : len(picked)] = picked
    return chosen


# --- the two paths ---


def rebuilt(step: DecodeStep, geometry: ListGeometry) -> dict[str, Ragged]:
    """All lists of a step, in new tensors: the baseline.

    Written without a read of the device, so that it can be captured and timed as the kernels are; packing by a boolean
    mask would be shorter and would wait for the device in each scope.

    Args:
        step: T rows.
        geometry: sizes.

    Returns:
        By scope, lists of T rows in tensors of capacity T * width + 1.
    """
    g = geometry
    return {
        "swa": _recent(step, step.swa_table, 1, g.widths["swa"], g.swa_block, g.swa_slots),
        "c4": _packed(*_dense_c4(step, g)),
        "c128": _recent(step, step.pages, 128, g.widths["c128"], g.page // 128, g.c128_slots),
    }


def _recent(step: DecodeStep, table: Tensor, ratio: int, width: int, block_size: int, num_slots: int) -> Ragged:
    seen = (step.positions + 1) // ratio
    length = seen.clamp(max=width)
    lanes = torch.arange(width, device=seen.device)
    slots = _slots(table, step.requests, (seen - length)[:, None] + lanes, block_size, num_slots)
    return _packed(slots, lanes < length[:, None])


def _dense_c4(step: DecodeStep, g: ListGeometry) -> tuple[Tensor, Tensor]:
    """Slots ``[T, topk]`` of the chosen entries, and which of them count."""
    slots = _slots(step.pages, step.requests, step.entries, g.page // 4, g.c4_slots)
    seen = (step.positions + 1) // 4
    return slots, (step.entries >= 0) & (step.entries < seen[:, None]) & (slots >= 0)


def _slots(table: Tensor, requests: Tensor, entries: Tensor, block_size: int, num_slots: int) -> Tensor:
    """Slot of each entry ``[T, n]``, in 64 bits; -1 where there is none."""
    at = (entries // block_size).clamp(0, table.shape[1] - 1).long()
    block = table[requests.clamp(min=0).long()].gather(1, at).long()
    slot = block * block_size + entries % block_size
    return torch.where((block >= 0) & (slot < num_slots), slot, -1)


def _packed(slots: Tensor, keep: Tensor) -> Ragged:
    """What is kept of each row, one row after the other."""
    rows, width = slots.shape
    count = keep.sum(1)
    ends = count.cumsum(0)
    indptr = torch.zeros(rows + 1, dtype=torch.int32, device=slots.device)
    indptr[1:] = ends
    place = torch.where(
        keep, (ends - count - 1)[:, None] + keep.cumsum(1), rows * width
    )  # one spare place takes what is dropped
    indices = torch.full((rows * width + 1,), -1, dtype=torch.int32, device=slots.device)
    return Ragged(indices.scatter_(0, place.flatten(), slots.flatten().to(torch.int32)), indptr)


def observed(lists: Mapping[str, Ragged], rows: int, geometry: ListGeometry) -> Outputs:
    """What a reader of `rows` rows gets from the lists.

    Args:
        lists: by scope.
        rows: rows of the batch size; rows that the lists do not have are empty.
        geometry: widths.

    Returns:
        Per scope int32 ``[rows, width]``, `GAP` behind a row's end; and ``offsets`` int32, all scopes' indptr.
    """
    seen, offsets = {}, []
    for scope, width in geometry.widths.items():
        indices, indptr = lists[scope].indices, lists[scope].indptr
        indptr = torch.cat((indptr, indptr[-1:].expand(rows + 1 - len(indptr))))
        at = indptr[:-1, None] + torch.arange(width, device=indptr.device)
        read = indices[at.clamp(0, len(indices) - 1).long()]
        seen[scope] = torch.where(at < indptr[1:, None], read, GAP)
        offsets.append(indptr)
    return {**seen, "offsets": torch.cat(offsets)}


def _outputs(eager: Iterable[Outputs], graph: Iterable[Outputs], moved: Sequence[int]) -> Outputs:
    steps = list(eager)
    stacked = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    after = torch.cat([value.flatten() for step in graph for value in step.values()])
    return {**stacked, "replayed": after, "moved": torch.tensor(moved, dtype=torch.int32)}


def _baseline(inputs: ListInputs) -> Outputs:
    seen = [observed(rebuilt(step, inputs.geometry), inputs.rows, inputs.geometry) for step in inputs.steps]
    return _outputs(seen, seen, [0] * len(seen))


At = Callable[[], DecodeLists]


def _run(inputs: ListInputs, kind: type[DecodeLists] = DecodeLists, *, rebuild: bool = False) -> Outputs:
    """Every step eagerly, then every step from a graph of the first; ``rebuild`` makes new buffers for each step."""

    def make() -> DecodeLists:
        return kind(inputs.rows, inputs.requests, inputs.geometry, inputs.steps[0].positions.device)

    mine, eager, moved = make(), [], []
    known = mine.addresses()
    kept = [mine]  # never freed: this is about addresses, not about what becomes of freed memory
    for step in inputs.steps:
        mine = make() if rebuild else mine
        kept.append(mine)
        mine.load(step)
        mine.refresh()
        moved.append(sum(known[name] != address for name, address in mine.addresses().items()))
        eager.append(observed(mine.lists, inputs.rows, inputs.geometry))
    return _outputs(eager, replayed(inputs, make, rebuild=rebuild), moved)


def replayed(inputs: ListInputs, make: At, *, rebuild: bool = False) -> list[Outputs]:
    """What a graph, captured on the first step, leaves after each step that it is replayed on.

    Args:
        inputs: the steps.
        make: makes the lists.
        rebuild: the host makes new ones before each replay, as if a step's metadata were its own.
    """
    captured = make()
    captured.load(inputs.steps[0])
    graph = capture(captured.refresh, device=inputs.steps[0].positions.device)
    seen, kept = [], [captured]
    for step in inputs.steps:
        if rebuild:
            kept.append(make())
        kept[-1].load(step)
        graph.replay()
        seen.append(observed(captured.lists, inputs.rows, inputs.geometry))
    return seen


def _optimized(inputs: ListInputs) -> Outputs:
    return _run(inputs)


def _reference(inputs: ListInputs) -> Outputs:
    """Each step from nothing, with Python's lists."""
    g, steps = inputs.geometry, []
    for step in inputs.steps:
        positions, requests = step.positions.tolist(), step.requests.tolist()
        swa, pages = step.swa_table.tolist(), step.pages.tolist()
        lists = {
            "swa": recent_lists_ref(
                positions, requests, swa, ratio=1, width=g.window, block_size=g.swa_block, num_slots=g.swa_slots
            ),
            "c4": pack_entries_ref(
                step.entries.tolist(), positions, requests, pages, ratio=4, block_size=g.page // 4,
                num_slots=g.c4_slots,
            ),
            "c128": recent_lists_ref(
                positions, requests, pages, ratio=128, width=g.widths["c128"], block_size=g.page // 128,
                num_slots=g.c128_slots,
            ),
        }  # fmt: skip
        seen, offsets = {}, []
        for scope, width in g.widths.items():
            rows = lists[scope] + [[]] * (inputs.rows - len(positions))
            seen[scope] = torch.tensor([row + [GAP] * (width - len(row)) for row in rows], dtype=torch.int32)
            offsets += [sum(len(row) for row in rows[:t]) for t in range(len(rows) + 1)]
        steps.append({**seen, "offsets": torch.tensor(offsets, dtype=torch.int32)})
    return _outputs(steps, steps, [0] * len(steps))


def _timed(inputs: ListInputs) -> Mapping[str, Callable[[], object]]:
    """The last step's lists; and the C4 lists alone, which each C4 layer makes anew."""
    step, g = inputs.steps[-1], inputs.geometry
    lists = DecodeLists(inputs.rows, inputs.requests, g, step.positions.device)
    lists.load(step)
    return {
        "baseline": lambda: rebuilt(step, g),
        "optimized": lists.refresh,
        "C4 rebuilt": lambda: _packed(*_dense_c4(step, g)),
        "C4 packed": lists.pack_c4,
    }


# --- prediction ---


class _Traffic(TorchDispatchMode):
    """Launches and bytes of ATen operators: every argument read, every result written; what is both counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if operator_kind(func, args, kwargs, result) is not None:
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum({(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in tensors}.values())
        return result


def _rebuilt_traffic(rows: int, requests: int, geometry: ListGeometry) -> tuple[int, int]:
    """Launches and bytes of the baseline, run on tensors without memory."""
    step = DecodeLists(rows, requests, geometry, "meta").step
    with _Traffic() as traffic:
        rebuilt(step, geometry)
    return traffic.launches, traffic.bytes


def _predict(case: Case, device_key: str) -> Prediction:
    """The last step of a case."""
    p = case.params
    positions = p["steps"][-1]
    rows, topk = len(positions), p["topk"]
    geometry = ListGeometry(topk, p["context"], 1, 1, 1)
    listed = {
        "swa": sum(min(seen_ref(at, 1), geometry.window) for at in positions),
        "c4": sum(min(seen_ref(at, 4), topk) for at in positions),
        "c128": sum(seen_ref(at, 128) for at in positions),
    }
    # Positions and requests, chosen entries, a block id and a slot for everything listed, offsets.
    least = 8 * rows + 4 * rows * topk + 8 * sum(listed.values()) + 3 * 4 * (rows + 1)
    sums = 4 * rows * (rows - 1) // 2 * len(listed)  # each row's program adds up the rows before it
    again = 4 * rows * topk + 4 * listed["c4"] + 2 * 8 * rows + 4 * rows  # C4 is read twice, counts are written
    launches, moved = _rebuilt_traffic(rows, -(-rows // p["query_tokens"]), geometry) if rows else (0, least)
    optimized = least + sums + again
    spec = device.KNOWN_DEVICES.get(device_key)
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and rows:
        per_us = spec.bandwidth_tb_s * 1e6
        baseline_us = launches * LAUNCH_US + moved / per_us
        optimized_us = len(OPTIMIZED_LAUNCHES) * LAUNCH_US + optimized / per_us
        bound_us = least / per_us
    return Prediction(
        baseline_bytes=max(moved, least),
        optimized_bytes=optimized,
        least_bytes=least,
        flops=0,
        baseline_launches=max(launches, len(OPTIMIZED_LAUNCHES)),
        optimized_launches=len(OPTIMIZED_LAUNCHES),
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="a round figure per launch, and every operand and result once through memory",
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """The kernels as a batch of 1024 rows specialises them; SWA and C128 differ in the block size only."""
    numbers = ("num_requests", "blocks", "table_stride", "slots", "ratio")
    recent = ("positions", "requests", "table", "indices", "indptr")
    packed = ("dense", "limits", "requests", "table", "counts", "indices", "indptr")
    found = []

    def add(function: str, shape: str, pointers: Sequence[str], scalars: Sequence[str], **constants: int) -> None:
        found.append(
            CompileRequest(
                kernel=function.strip("_").removesuffix("_kernel"),
                module="dsv4ref.kernels.sparse_mla.indices",
                function=function,
                shape=shape,
                signature=dict.fromkeys(pointers, "*i32") | dict.fromkeys(scalars, "i32"),
                constexprs=constants,
                num_warps=4,
                divisible_by_16=frozenset(pointers),
            )
        )

    for scope, block_size, lanes in (("swa", 64, 128), ("c128", 2, LANES)):
        shape = f"{scope} lanes {lanes} w4"
        add("_recent_lists_kernel", shape, recent, (*numbers, "width"), BLOCK_SIZE=block_size, LANES=lanes,
            ROWS=SUM_ROWS)  # fmt: skip
    for topk in (config.V4_FLASH.index_topk, config.V4_PRO.index_topk):
        scalars = ("dense_stride", "topk", *numbers)
        add("_count_listed_kernel", f"topk {topk} w4", packed[:5], scalars, BLOCK_SIZE=64, BLOCK=topk)
        add("_pack_listed_kernel", f"topk {topk} w4", packed, scalars, BLOCK_SIZE=64, BLOCK=topk, ROWS=SUM_ROWS)
    return tuple(found)


# --- hazards ---


class _HostOffsets(DecodeLists):
    """Offsets of the SWA lists are written by the host, one number at a time."""

    _host: Sequence[int] = ()

    def load(self, step: DecodeStep) -> None:
        """Load, and take the lengths from the scheduler, which has them without asking the device."""
        super().load(step)
        self._host = self.step.positions.tolist()

    def refresh(self) -> None:
        """Refresh, then write numbers that a capture freezes."""
        super().refresh()
        total = 0
        for row, position in enumerate(self._host):
            total += min(seen_ref(position, 1), self.geometry.window)
            self.lists["swa"].indptr[row + 1 : row + 2].fill_(total)


class _Replaced(DecodeLists):
    """One scope's lists come from elsewhere."""

    scope = "c4"

    def replacement(self) -> Ragged:
        """Lists for all rows."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Refresh, then put the other lists in place."""
        super().refresh()
        other, mine = self.replacement(), self.lists[self.scope]
        mine.indices.copy_(other.indices[:-1])
        mine.indptr.copy_(other.indptr)


class _Prefix(_Replaced):
    """As many lanes as there are valid entries, from the front: the holes stay and the end is lost."""

    def replacement(self) -> Ragged:
        """Count, then copy a prefix."""
        slots, keep = _dense_c4(self.step, self.geometry)
        lanes = torch.arange(slots.shape[1], device=slots.device)
        return _packed(torch.where(keep, slots, -1), lanes < keep.sum(1)[:, None])


class _Unguarded(_Replaced):
    """The request's offset is added to every lane, -1 included."""

    def replacement(self) -> Ragged:
        """Translate without asking whether there is an entry."""
        s, block_size = self.step, self.geometry.page // 4
        _, keep = _dense_c4(s, self.geometry)
        at = (s.entries // block_size) % s.pages.shape[1]  # -1 // 64 is -1: the last column
        block = s.pages[s.requests.clamp(min=0).long()].gather(1, at.long())
        lanes = torch.arange(s.entries.shape[1], device=at.device)
        return _packed(block * block_size + s.entries % block_size, lanes < keep.sum(1)[:, None])


class _Slots32(_Replaced):
    """Block id times block size in 32 bits."""

    scope = "swa"

    def replacement(self) -> Ragged:
        """The SWA lists as an int32 kernel would make them."""
        s, g = self.step, self.geometry
        seen = (s.positions + 1).clamp(min=0)
        length = seen.clamp(max=g.window)
        lanes = torch.arange(g.window, device=seen.device, dtype=torch.int32)
        entries = (seen - length)[:, None] + lanes
        at = (entries // g.swa_block).clamp(max=g.swa_blocks - 1).long()
        block = s.swa_table[s.requests.clamp(min=0).long()].gather(1, at)
        slot = block * g.swa_block + entries % g.swa_block
        valid = (slot >= 0) & (slot < g.swa_slots)
        return _packed(torch.where(valid, slot, -1), lanes < length[:, None])


class _WideRequests(DecodeLists):
    """The requests of the rows are 64-bit numbers, read as 32-bit ones."""

    def load(self, step: DecodeStep) -> None:
        """Load, then reinterpret."""
        super().load(step)
        wide = self.step.requests.to(torch.int64)
        self.step.requests.copy_(wide.view(torch.int32)[: self.rows])


class _NoPadding(DecodeLists):
    """Only the step's own rows are copied."""

    def load(self, step: DecodeStep) -> None:
        """Load, and leave the rows behind as they were."""
        tokens = step.positions.shape[0]
        positions, requests = (t[tokens:].clone() for t in (self.step.positions, self.step.requests))
        super().load(step)
        self.step.positions[tokens:].copy_(positions)
        self.step.requests[tokens:].copy_(requests)


class _ZeroPadding(DecodeLists):
    """Rows behind the step's are filled with zeros."""

    def load(self, step: DecodeStep) -> None:
        """Load, and pad with what is a token, at position 0 of request 0."""
        super().load(step)
        self.step.positions[step.positions.shape[0] :].zero_()
        self.step.requests[step.positions.shape[0] :].zero_()


def _planted(kind: type[DecodeLists]) -> Callable[[ListInputs], Outputs]:
    return lambda inputs: _run(inputs, kind)


# --- cases ---


def _tiny(name: str, *steps: tuple[int, ...], rows: int = 5, about: str, **changes: Any) -> Case:
    params = {"steps": steps, "rows": rows, "topk": 24, "context": 1024, "blocks": 40, "pages": 12, "holes": 0.0}
    return Case(name, {**params, "query_tokens": 1, "garbage": False, **changes}, tiny=True, about=about)


def _production(name: str, model: config.ModelConfig, rows: int, context: int) -> Case:
    positions = tuple(context - 1 - 37 * row % (context // 2) for row in range(rows))
    steps = (tuple(at - 1 for at in positions), positions)
    params = {"steps": steps, "rows": rows, "topk": model.index_topk, "context": context, "blocks": 4 * rows}
    params |= {"pages": rows * -(-context // 256), "holes": 0.0, "query_tokens": 1, "garbage": False}
    return Case(name, params, needs_gpu=True, measured=True)


_CASES = (
    _tiny("tiny", (5, 130, 640), (700, 131, 6, 300, 1), (127,), about="captured on three rows; five, then one"),
    _tiny("tiny-edges", (0, 2, 3, 126, 127), (128, 255, 256, 511, 1023), about="edges of window, group and page"),
    _tiny("tiny-holes", (640, 130, 88), (500, 77, 300, 9), holes=0.3, about="-1 between the chosen entries"),
    _tiny("tiny-speculative", (200, 201, 7, 8), (64, 65, 127, 128), query_tokens=2, about="two query tokens a request"),
    _tiny(
        "tiny-garbage", (640, 130, 300), (1000, 70), garbage=True, about="blocks that are not allocated, or not there"
    ),
    _tiny("tiny-none", (40, 3), (), (9, 500, 2), about="a step without a row"),
    *(_production(f"flash-{rows}-8k", config.V4_FLASH, rows, 8192) for rows in (1, 64, 1024)),
    _production("flash-64-128k", config.V4_FLASH, 64, 131072),
    _production("pro-256-32k", config.V4_PRO, 256, 32768),
)

OPTIMIZATION = Optimization(
    id="static_decode_metadata",
    number=4,
    title="Static decode metadata",
    part="II sparse MLA decode",
    sources=("doubleword vLLM fork, commits 22cc02230, 00af8fd88 and cb8a18556", "branch commit 061834a20"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(tuple(Check(name, "exact") for name in ("swa", "c4", "c128", "offsets", "replayed", "moved"))),
    hazards={
        "host-offsets": Hazard(
            title="the replay reads lengths of the capture",
            story="The scheduler knows the lengths, so the host writes the offsets: numbers, which a graph keeps. The "
            "slots follow the step, the offsets do not.",
            source="doubleword commits 22cc02230 and 00af8fd88 (metadata of the capture read at replay)",
            ids=("H05", "H07"),
            case="tiny",
            planted=_planted(_HostOffsets),
        ),
        "rebuilt-tensors": Hazard(
            title="each step has tensors of its own",
            story="Right in eager mode. The graph goes on reading the tensors of its capture, which nobody writes "
            "any more; here they are at least kept alive.",
            source="doubleword commits 22cc02230 (compressed scopes) and 00af8fd88 (SWA)",
            ids=("H06",),
            case="tiny",
            planted=lambda inputs: _run(inputs, rebuild=True),
        ),
        "prefix-copied": Hazard(
            title="a row with a hole is cut short",
            story="The packer counts the valid entries and copies as many lanes from the front. With a -1 inside, the "
            "count is right and a valid entry at the end is lost.",
            source="vLLM's ragged C4 packer for ROCm (read): valid entries must be a prefix",
            ids=("H15",),
            case="tiny-holes",
            planted=_planted(_Prefix),
        ),
        "unguarded": Hazard(
            title="-1 is translated like an entry",
            story="-1 plus an offset is a slot: of the last block of the row, or of another request.",
            source="vLLM cache_utils.py and its ROCm backend (read): the ragged combine turns -1 into M*b - 1",
            ids=("H15",),
            case="tiny-holes",
            planted=_planted(_Unguarded),
        ),
        "slots-in-32-bits": Hazard(
            title="block id times block size wraps",
            story="An id that is no block wraps into the range of slots and passes the check behind the product.",
            source="AITER commits dc10015752 and e6e70704f5 (slot times stride); no report of this very product",
            ids=("H26",),
            case="tiny-garbage",
            planted=_planted(_Slots32),
        ),
        "wide-requests": Hazard(
            title="64-bit request numbers read as 32-bit ones",
            story="Every other row is request 0: arange without a dtype makes int64, and a kernel takes a pointer.",
            source="AITER commit 8cfa77e486 (int32 and int64 in generated batch indices); vllm#45750",
            ids=("H10",),
            case="tiny",
            planted=_planted(_WideRequests),
        ),
        "stale-rows": Hazard(
            title="rows of a larger batch stay",
            story="The batch shrinks inside one captured size. Rows that nobody overwrites are tokens of requests "
            "that may be gone.",
            source="vllm#45750 (stale lengths in padded rows)",
            ids=("H15",),
            case="tiny",
            planted=_planted(_NoPadding),
        ),
        "zero-padding": Hazard(
            title="padding that looks like a token",
            story="Zeros are a position: the first token of request 0. Each padded row lists one slot.",
            source="vllm#45750 (zero-length padded rows)",
            ids=("H15",),
            case="tiny",
            planted=_planted(_ZeroPadding),
        ),
    },
    predict=_predict,
    claims=records.published("static_decode_metadata"),
    timed=_timed,
    measured_modules=("dsv4ref.kernels.sparse_mla.indices", "dsv4ref.serving.decode_lists"),
    kernels=_requests,
)
