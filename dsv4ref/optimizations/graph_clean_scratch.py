"""Chapter 10: keep what a persistent decode needs in one scratch per shape, at addresses that a graph may capture.

Baseline: every step allocates its lists, its cast query, its output, its constants and its plan. Optimised: one scratch
per shape, everything rewritten in place, the plan included. Same kernels on the same numbers, so the same bits.

What makes it a chapter is what must not be kept: the plan. The source's first scratch cached it with the buffers and
read out of bounds when the lengths changed. The gate therefore also counts the keys that every plan visits, compares
the packed lists with a list comprehension, replays the step from a graph, and asks whether any address moved, and
whether anything was allocated: by the eager preparation, and on a GPU by the replay of the whole step.

The decode runs on genuine AITER where there is an AMD GPU with it, and on the emulation elsewhere. Planted bugs always
run on the emulation: on the real library they are reads out of bounds. Timed, on the device and on the host, is our own
preparation alone; plan and decode belong to the library.

Source: ROCm/vllm#900, second and third commit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref.device import native_dialect
from dsv4ref.evidence import records
from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels.aiter import adapters
from dsv4ref.kernels.aiter.emulation import emulated_library, library_for
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.lists import list_offsets, pack_lists
from dsv4ref.kernels.aiter.plan import DecodeShape, PlanBuffers, planned_keys
from dsv4ref.kernels.capture import current_stream
from dsv4ref.optimizations import decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.serving.graphs import CudaGraph, Graph, capture
from dsv4ref.serving.scratch import Scratch, Scratches

__all__ = ["OPTIMIZATION", "CachedPlan", "ScratchInputs", "Step", "allocated", "placements"]

SCALE = HEAD_DIM**-0.5
_HEADS = 16  # planned without folding on both architectures, so that a plan's rows are the batch's
_UNITS = 4
"""Compute units that tiny cases are planned for: few enough for a long row to be split."""

_LAUNCH_US = 2.0
"""Assumed cost of one more launch inside a graph, microseconds, on top of the bytes it moves."""

OPTIMIZED_LAUNCHES = {"pack the lists": 1, "running sum, empty rows": 1, "cast the query": 1}
BASELINE_LAUNCHES = {**OPTIMIZED_LAUNCHES, "qo_indptr": 1, "kv_last_page_lens": 1, "q_scale": 1, "kv_scale": 1}


@dataclass(frozen=True)
class Step:
    """What one decode step brings.

    Args:
        q: bf16 ``[T, H, 512]``.
        indices: int32 ``[T, topk]`` slots; garbage behind each row's length.
        lengths: int32 ``[T]``.
    """

    q: Tensor
    indices: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class ScratchInputs:
    """Several steps over one cache.

    Args:
        library: AITER, or its emulation.
        cache: fp8 in the library's dialect, ``[slots, 1, 1, 512]``.
        steps: in order; their shapes may differ.
    """

    library: Library
    cache: Tensor
    steps: tuple[Step, ...]

    @property
    def slots(self) -> int:
        """Slots of the cache."""
        return self.cache.shape[0]

    def shape(self, step: Step) -> DecodeShape:
        """The key of a step's scratch."""
        rows, heads, _ = step.q.shape
        return DecodeShape(rows, heads, step.indices.shape[1], self.cache.dtype, self.cache.dtype)


def _build(case: Case, device: str, seed: int) -> ScratchInputs:
    p = case.params
    library = library_for(device)
    if p["emulated"] or library.emulated:
        library = emulated_library(library.arch, compute_units=p["units"], strict=not p["emulated"])
    dtype = Dialect.of(native_dialect(library.arch), argument=f"dialect of {library.arch}").dtype
    rng = torch.Generator().manual_seed(seed)
    cache = torch.randn((p["slots"], 1, 1, HEAD_DIM), generator=rng).to(dtype).to(device)
    steps: list[Step] = []
    drawn: dict[tuple[int, ...], Step] = {}
    for lengths in p["steps"]:
        rows, topk = len(lengths), p["topk"]
        # Steps of one length list are one and the same: the protocol's second call must repeat the first.
        if lengths not in drawn:
            q = torch.randn((rows, _HEADS, HEAD_DIM), generator=rng).to(torch.bfloat16)
            indices = torch.randint(0, p["slots"], (rows, topk), generator=rng, dtype=torch.int32)
            holes = torch.rand((rows, topk), generator=rng) < p["holes"]
            indices = torch.where(holes, torch.where(indices % 2 == 0, -1, p["slots"]), indices)
            behind = torch.arange(topk) >= torch.tensor(lengths)[:, None]
            indices = torch.where(behind, 2**31 - 1, indices).to(torch.int32)
            counts = torch.tensor(lengths, dtype=torch.int32)
            drawn[lengths] = Step(q.to(device), indices.to(device), counts.to(device))
        steps.append(drawn[lengths])
    return ScratchInputs(library, cache, tuple(steps))


# --- the two paths ---


def allocated(library: Library, shape: DecodeShape, step: Step, slots: int) -> dict[str, Tensor]:
    """What a decode takes, all of it new: seven launches and sixteen tensors."""
    device, rows, i32 = step.q.device, shape.rows, torch.int32
    b = adapters.allocate_plan(library, shape, device).by_name()
    b["qo_indptr"] = torch.arange(rows + 1, dtype=i32, device=device)
    b["kv_last_page_lens"] = torch.ones(rows, dtype=i32, device=device)
    b["q_scale"], b["kv_scale"] = torch.ones(1, device=device), torch.ones(1, device=device)
    b["kv_indptr"] = torch.empty(rows + 1, dtype=i32, device=device)
    b["kv_indices"] = torch.empty((rows, shape.topk), dtype=i32, device=device)
    b["counts"] = torch.empty(rows, dtype=i32, device=device)
    pack_lists(step.indices, step.lengths, slots, out=b["kv_indices"], counts=b["counts"])
    b["empty"] = torch.empty(rows, dtype=torch.bool, device=device)
    list_offsets(b["counts"], indptr=b["kv_indptr"], empty=b["empty"])
    b["q"] = step.q.to(shape.q_dtype)
    b["out"] = torch.empty((rows, shape.heads, shape.value_dim), dtype=torch.bfloat16, device=device)
    return b


def _plan(buffers: Mapping[str, Tensor]) -> PlanBuffers:
    return PlanBuffers(**{name: buffers[name] for name in PlanBuffers.__dataclass_fields__})


def _allocating_step(inputs: ScratchInputs, step: Step) -> Mapping[str, Tensor]:
    shape = inputs.shape(step)
    b = allocated(inputs.library, shape, step, inputs.slots)
    lists = {name: b[name] for name in ("qo_indptr", "kv_indptr", "kv_last_page_lens")}
    adapters.fill_plan(inputs.library, shape, _plan(b), **lists)
    adapters.mla_decode(
        inputs.library, shape, _plan(b), q=b["q"], kv=inputs.cache, out=b["out"], **lists,
        kv_indices=b["kv_indices"].view(-1), sm_scale=SCALE, q_scale=b["q_scale"], kv_scale=b["kv_scale"],
        return_lse=False,
    )  # fmt: skip
    b["out"].masked_fill_(b["empty"][:, None, None], 0.0)
    return b


def _scratch_step(inputs: ScratchInputs, scratch: Scratch, step: Step) -> None:
    scratch.refresh(step.q, step.indices, step.lengths, inputs.slots)
    scratch.decode(inputs.cache, SCALE, return_lse=False)


def _buffers(scratch: Scratch) -> dict[str, Tensor]:
    return {name: scratch.buffer(name) for name in scratch.addresses()}


@dataclass(frozen=True)
class _After:
    """What a step left behind, copied before the next one overwrites it."""

    out: Tensor
    slots: Tensor
    keys: Tensor
    moved: int
    allocated: int

    @staticmethod
    def of(buffers: Mapping[str, Tensor], known: Mapping[str, int], allocated: int) -> _After:
        moved = sum(known[name] != buffer.data_ptr() for name, buffer in buffers.items()) if known else 0
        keys = planned_keys(_plan(buffers), buffers["counts"].shape[0])
        slots = buffers["kv_indices"].flatten().clone()
        return _After(buffers["out"].flatten().clone(), slots, keys, moved, allocated)


def _prepared(inputs: ScratchInputs, scratch: Scratch, step: Step) -> int:
    """What preparing a step asks of the allocator; plan and decode are the library's, which may ask for more."""
    return count_allocations(lambda: scratch.prepare(step.q, step.indices, step.lengths, inputs.slots), warmup=1).count


def _outputs(steps: Sequence[_After], replayed: Tensor | None = None, replays: Sequence[int] = ()) -> dict[str, Tensor]:
    """What the gate compares; ``replays`` is what each step's replay allocated, where that is a real graph's."""
    out = torch.cat([step.out for step in steps])
    allocated = [step.allocated for step in steps]
    if replays:
        allocated = [eager + replay for eager, replay in zip(allocated, replays, strict=True)]
    return {
        "out": out,
        "replayed": out if replayed is None else replayed,
        "slots": torch.cat([step.slots for step in steps]).cpu(),
        "keys": torch.cat([step.keys for step in steps]),
        "moved": torch.tensor([step.moved for step in steps], dtype=torch.int32),
        "allocated": torch.tensor(allocated, dtype=torch.int32),
    }


def _baseline(inputs: ScratchInputs) -> dict[str, Tensor]:
    return _outputs([_After.of(b := _allocating_step(inputs, step), {}, len(b)) for step in inputs.steps])


def _walk(inputs: ScratchInputs, at: Callable[[DecodeShape], Scratch]) -> Iterator[_After]:
    """Every step through the scratch that ``at`` gives for its shape, and whether that scratch stayed where it was."""
    known: dict[DecodeShape, dict[str, int]] = {}
    for step in inputs.steps:
        shape = inputs.shape(step)
        scratch = at(shape)
        allocated = _prepared(inputs, scratch, step)
        _scratch_step(inputs, scratch, step)
        yield _After.of(_buffers(scratch), known.get(shape, {}), allocated)
        known.setdefault(shape, scratch.addresses())


def _replayed(inputs: ScratchInputs) -> tuple[Tensor, list[int]]:
    """Every step replayed from its shape's graph, whose inputs are copied into place; and what each replay allocated.

    An emulated graph runs its operators again, so it says nothing of allocations: none are counted then.
    """
    scratches = Scratches(inputs.library, inputs.cache.device)
    graphs: dict[DecodeShape, Graph] = {}
    held: dict[DecodeShape, Step] = {}
    out: list[Tensor] = []
    allocated: list[int] = []
    for step in inputs.steps:
        shape = inputs.shape(step)
        scratch = scratches.at(shape)
        if shape not in graphs:
            mine = held[shape] = _cloned(step)
            mine.lengths.zero_()  # captured on other lengths than any it will replay

            def work(scratch: Scratch = scratch, mine: Step = mine) -> None:
                _scratch_step(inputs, scratch, mine)

            graphs[shape] = capture(work, device=inputs.cache.device)
        _load(held[shape], step)
        graph = graphs[shape]
        if isinstance(graph, CudaGraph):
            allocated.append(count_allocations(graph.replay, warmup=0).count)
        else:
            graph.replay()
        out.append(scratch.out.flatten().clone())
    return torch.cat(out), allocated


def _optimized(inputs: ScratchInputs) -> dict[str, Tensor]:
    scratches = Scratches(inputs.library, inputs.cache.device)
    return _outputs(list(_walk(inputs, scratches.at)), *_replayed(inputs))


def _reference(inputs: ScratchInputs) -> dict[str, Tensor]:
    slots: list[int] = []
    keys: list[int] = []
    for step in inputs.steps:
        topk = step.indices.shape[1]
        for row, length in zip(step.indices.tolist(), step.lengths.tolist(), strict=True):
            kept = [slot for slot in row[:length] if 0 <= slot < inputs.slots]
            slots += kept + [-1] * (topk - len(kept))
            keys.append(len(kept))
    return {
        "slots": torch.tensor(slots, dtype=torch.int32),
        "keys": torch.tensor(keys, dtype=torch.int32),
        "moved": torch.zeros(len(inputs.steps), dtype=torch.int32),
        "allocated": torch.zeros(len(inputs.steps), dtype=torch.int32),
    }


def placements(inputs: ScratchInputs) -> list[dict[str, Any]]:
    """Where the buffers come from, and where the refresh runs: which of the four does a graph follow?

    Args:
        inputs: the graph is captured on the first step and replayed on the last, which must have the same shape.

    Returns:
        Rows ``{graph, buffers, refresh, right}``; right means the last step's output, in every bit.
    """
    right = _allocating_step(inputs, inputs.steps[-1])["out"]
    rows = []
    for new, inside in itertools.product((False, True), repeat=2):
        now = _cloned(inputs.steps[0])
        before, captured = _placed(inputs, now, new=new, inside=inside)
        before()
        graph = capture(captured, device=inputs.cache.device, warmup=0)
        _load(now, inputs.steps[-1])
        before()
        graph.replay()
        rows.append(
            {
                "graph": graph.method,
                "buffers": "new each step" if new else "one scratch",
                "refresh": "in the graph" if inside else "by the host, before the replay",
                "right": torch.equal(graph.outputs, right),
            }
        )
    return rows


def _placed(
    inputs: ScratchInputs, now: Step, *, new: bool, inside: bool
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """What the host does before each replay, and what is captured."""
    held: list[Scratch] = []  # never freed: this is about addresses, not about what becomes of freed memory

    def build() -> None:
        if new or not held:
            held.append(Scratch(inputs.library, inputs.shape(now), inputs.cache.device))
            held[-1].rebuild()

    def refresh() -> None:
        build()
        held[-1].refresh(now.q, now.indices, now.lengths, inputs.slots)

    def decode() -> Tensor:
        held[-1].decode(inputs.cache, SCALE, return_lse=False)
        return held[-1].out

    def whole_step() -> Tensor:
        if new:
            return _allocating_step(inputs, now)["out"]
        held[-1].refresh(now.q, now.indices, now.lengths, inputs.slots)
        return decode()

    if not inside:
        return refresh, decode
    return (lambda: None) if new else build, whole_step


def _cloned(step: Step) -> Step:
    return Step(step.q.clone(), step.indices.clone(), step.lengths.clone())


def _load(target: Step, step: Step) -> None:
    """Copy a step's inputs to where a graph reads them."""
    target.q.copy_(step.q)
    target.indices.copy_(step.indices)
    target.lengths.copy_(step.lengths)


def _timed(inputs: ScratchInputs) -> Mapping[str, Callable[[], object]]:
    step, device = inputs.steps[0], inputs.cache.device
    shape = inputs.shape(step)
    held: dict[int, Scratches] = {}

    def prepare() -> None:
        # A scratch belongs to the stream that built it. Timing warms up and captures on a stream of its own, and counts
        # launches on another: each builds its scratch in the first call, which nobody times.
        stream = current_stream(device)
        if stream not in held:
            held[stream] = Scratches(inputs.library, device)
        held[stream].at(shape).prepare(step.q, step.indices, step.lengths, inputs.slots)

    return {"baseline": lambda: allocated(inputs.library, shape, step, inputs.slots), "optimized": prepare}


def _host_timed(inputs: ScratchInputs) -> Mapping[str, Callable[[], object]]:
    """The same preparation as a host pays for it: eager, replayed, and replayed behind the copies of its inputs.

    Inputs that the step before leaves in place need no copies, as where one graph holds the whole step.
    """
    step, device = inputs.steps[0], inputs.cache.device
    held, scratch = _cloned(step), Scratch(inputs.library, inputs.shape(step), device)
    scratch.rebuild()
    graph = capture(lambda: scratch.prepare(held.q, held.indices, held.lengths, inputs.slots), device=device)

    def loaded() -> None:
        _load(held, step)
        graph.replay()

    return {**_timed(inputs), "replayed": graph.replay, "inputs copied, replayed": loaded}


def _predict(case: Case, device: str) -> Prediction:
    rows, topk = len(case.params["steps"][0]), case.params["topk"]
    query = rows * _HEADS * HEAD_DIM
    # q read in bf16 and written in fp8, lists read and written, lengths read; counts, running sum and mask written.
    least = 3 * query + 8 * rows * topk + 4 * rows + 4 * rows + 4 * (rows + 1) + rows
    moved = least + 4 * rows  # the running sum reads the counts again
    constants = 4 * (rows + 1) + 4 * rows + 8
    spec = decode_model.spec_for(device)
    before, after = sum(BASELINE_LAUNCHES.values()), sum(OPTIMIZED_LAUNCHES.values())
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None:
        per_us = spec.bandwidth_tb_s * 1e6
        bound_us = least / per_us
        baseline_us = before * _LAUNCH_US + (moved + constants) / per_us
        optimized_us = after * _LAUNCH_US + moved / per_us
    return Prediction(
        baseline_bytes=moved + constants,
        optimized_bytes=moved,
        least_bytes=least,
        flops=0,
        baseline_launches=before,
        optimized_launches=after,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="four launches that write constants are not made again; plan and decode are the library's and not timed",
    )


def _offsets_request(rows: int) -> CompileRequest:
    """The running sum for up to ``rows`` rows at a time, a power of two."""
    pointers = {"counts": "*i32", "indptr": "*i32", "empty": "*u8"}
    return CompileRequest(
        kernel="list_offsets",
        module="dsv4ref.kernels.aiter.lists",
        function="_list_offsets_kernel",
        shape=f"rows {rows} w4",
        signature={**pointers, "rows": "i32"},
        constexprs={"BLOCK": rows},
        num_warps=4,
        divisible_by_16=frozenset(pointers),
    )


def _pack_request(topk: int) -> CompileRequest:
    """The packing kernel for lists of up to ``topk`` entries, a power of two."""
    pointers = {"indices": "*i32", "lengths": "*i32", "out": "*i32", "counts": "*i32"}
    return CompileRequest(
        kernel="pack_lists",
        module="dsv4ref.kernels.aiter.lists",
        function="_pack_lists_kernel",
        shape=f"topk {topk} w4",
        signature={**pointers, "num_slots": "i32", "topk": "i32", "row_stride": "i32"},
        constexprs={"BLOCK": topk},
        num_warps=4,
        divisible_by_16=frozenset(pointers) | {"topk", "row_stride"},
    )


# --- hazards: always on the emulation, which does what it is told ---


class CachedPlan(Scratch):
    """The source's first scratch: the plan is made with the buffers, and kept with them."""

    _planned = False

    def replan(self) -> None:
        """Plan on first use only."""
        if not self._planned:
            super().replan()
            self._planned = True


class _SharedArena(Scratch):
    """Buffers of every shape are cut from the front of one block of memory."""

    def __init__(self, library: Library, shape: DecodeShape, device: torch.device, arena: Tensor) -> None:
        super().__init__(library, shape, device)
        self._arena = arena

    def rebuild(self) -> None:
        """Build as usual, then move every buffer into the arena."""
        super().rebuild()
        at = 0
        for name, own in self._buffers.items():
            size = own.numel() * own.element_size()
            mine = self._arena[at : at + size].view(own.dtype).view(own.shape)
            mine.copy_(own)
            self._buffers[name] = mine
            at += -(-size // 64) * 64
        self.out = self._buffers["out"]


class _RaggedPlan(Scratch):
    """The plan is made without ``topk``, so it addresses the fixed-stride lists as ragged ones."""

    def replan(self) -> None:
        """Plan with AITER's default layout."""
        shape = DecodeShape(self.shape.rows, self.shape.heads, self.shape.topk, self.shape.q_dtype,
                            self.shape.kv_dtype, "ragged")  # fmt: skip
        names = ("qo_indptr", "kv_indptr", "kv_last_page_lens")
        adapters.fill_plan(self.library, shape, self.plan, **{name: self._buffers[name] for name in names})


class _CountedLists(Scratch):
    """Valid entries are counted and left where they are, as in ROCm/vllm#900."""

    def prepare(self, q: Tensor, indices: Tensor, lengths: Tensor, num_slots: int) -> None:
        """Mask the lists instead of packing them."""
        super().prepare(q, indices, lengths, num_slots)
        inside = torch.arange(self.shape.topk, device=self.device) < lengths[:, None]
        valid = inside & (indices >= 0) & (indices < num_slots)
        self._buffers["kv_indices"].copy_(torch.where(valid, indices, -1))


class _UnmaskedRows(Scratch):
    """Rows without a key are taken to be written by the kernel."""

    def prepare(self, q: Tensor, indices: Tensor, lengths: Tensor, num_slots: int) -> None:
        """Prepare as usual, and forget which rows are empty."""
        super().prepare(q, indices, lengths, num_slots)
        self._buffers["empty"].fill_(False)


def _planted(kind: type[Scratch]) -> Callable[[ScratchInputs], dict[str, Tensor]]:
    def run(inputs: ScratchInputs) -> dict[str, Tensor]:
        held: dict[DecodeShape, Scratch] = {}

        def at(shape: DecodeShape) -> Scratch:
            if shape not in held:
                held[shape] = kind(inputs.library, shape, inputs.cache.device)
                held[shape].rebuild()
            return held[shape]

        return _outputs(list(_walk(inputs, at)))

    return run


def _in_one_arena(inputs: ScratchInputs) -> dict[str, Tensor]:
    arena = torch.zeros(1 << 20, dtype=torch.uint8, device=inputs.cache.device)
    held: dict[DecodeShape, Scratch] = {}
    for step in inputs.steps:  # all buckets are built first, as before a capture
        shape = inputs.shape(step)
        if shape not in held:
            held[shape] = _SharedArena(inputs.library, shape, inputs.cache.device, arena)
            held[shape].rebuild()
    return _outputs(list(_walk(inputs, held.__getitem__)))


def _rebuilt_on_mismatch(inputs: ScratchInputs) -> dict[str, Tensor]:
    """One scratch for all shapes, built anew whenever the shape is another one than last time."""
    last: list[Scratch] = []

    def at(shape: DecodeShape) -> Scratch:
        if not last or last[-1].shape != shape:
            last.append(Scratch(inputs.library, shape, inputs.cache.device))
            last[-1].rebuild()
        return last[-1]

    return _outputs(list(_walk(inputs, at)))


def _two_streams(inputs: ScratchInputs) -> dict[str, Tensor]:
    """Another stream's refresh lands between ours and our decode: one order the device is free to choose."""
    scratches = Scratches(inputs.library, inputs.cache.device)
    after = []
    for step, other in itertools.pairwise((*inputs.steps, inputs.steps[0])):
        scratch = scratches.at(inputs.shape(step))
        allocated = _prepared(inputs, scratch, step)
        for work in (step, other):
            scratch.refresh(work.q, work.indices, work.lengths, inputs.slots)
        scratch.decode(inputs.cache, SCALE, return_lse=False)
        after.append(_After.of(_buffers(scratch), {}, allocated))
    return _outputs(after)


def _tiny(
    name: str, steps: Sequence[tuple[int, ...]], about: str, *, holes: float = 0.0, emulated: bool = False
) -> Case:
    params = {"steps": tuple(steps), "topk": 64, "slots": 90, "units": _UNITS, "holes": holes, "emulated": emulated}
    return Case(name, params, tiny=True, about=about)


def _production(name: str, rows: int, topk: int) -> Case:
    lengths = tuple(topk - 7 * row % topk for row in range(rows))
    params = {"steps": (lengths, lengths[::-1]), "topk": topk, "slots": 4096, "units": 32, "holes": 0.0}
    return Case(name, {**params, "emulated": False}, needs_gpu=True, measured=True)


_PROTOCOL = ((3, 2), (3, 2), (4, 1))
_INTERLEAVED = ((40, 3, 64, 17, 9), (64, 20), (5, 64, 1, 30, 2), (33, 7), (40, 3, 64, 17, 9))
_PADDED = ((40, 50, 7), (7, 0, 0), (0, 0, 0))
_CASES = (
    _tiny("three-calls", _PROTOCOL, "the source's protocol: lengths, the same again, other lengths"),
    _tiny("split", ((64, 10), (64, 64), (1, 50)), "rows split over several units, partial results reduced"),
    _tiny("two-keys", _INTERLEAVED, "two shapes interleaved, a smaller batch after a larger"),
    _tiny("padding", _PADDED, "rows without keys, where the last step had some"),
    _tiny("holes", ((30, 64), (64, 5)), "invalid slots inside the lists", holes=0.2),
    _tiny("emulated-three-calls", _PROTOCOL, "for planted bugs: the emulation, not strict", emulated=True),
    _tiny("emulated-two-keys", _INTERLEAVED, "for planted bugs", emulated=True),
    _tiny("emulated-padding", _PADDED, "for planted bugs", emulated=True),
    _tiny("emulated-holes", ((30, 64), (64, 5)), "for planted bugs", holes=0.2, emulated=True),
    _production("flash-tp4-1", 1, 512),
    _production("flash-tp4-64", 64, 512),
    _production("flash-tp4-512", 512, 512),
    _production("pro-tp8-256", 256, 1024),
)

OPTIMIZATION = Optimization(
    id="graph_clean_scratch",
    number=10,
    title="Graph-clean scratch",
    part="II sparse MLA decode",
    sources=("ROCm/vllm#900, second and third commit",),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("out", "bit"),
            Check("replayed", "bit"),
            Check("slots", "exact"),
            Check("keys", "exact"),
            Check("moved", "exact"),
            Check("allocated", "exact"),
        )
    ),
    hazards={
        "cached-plan": Hazard(
            title="the plan is kept with the buffers",
            story="Same shape, same buffers, so the same plan: but a plan holds lengths. When they change the kernel "
            "visits keys that are no longer there, and misses those that are new.",
            source="ROCm/vllm#900: its first scratch did this and faulted; the later one refreshes in every call",
            ids=("H05",),
            case="emulated-three-calls",
            planted=_planted(CachedPlan),
        ),
        "shared-arena": Hazard(
            title="buckets share one block of memory",
            story="Only one bucket runs at a time, so one block seems enough. What was written once, at build time, "
            "does not survive another bucket's use of the block.",
            source="ATOM commit 915e41d42 (GSM8K 0.664 with a shared graph pool, 0.976 with one a bucket); vllm#52644",
            ids=("H08",),
            case="emulated-two-keys",
            planted=_in_one_arena,
        ),
        "rebuilt": Hazard(
            title="one scratch, built anew whenever the shape changes",
            story="Right for a run of equal batches. Once two sizes alternate, every change frees buffers that a "
            "graph captured.",
            source="ROCm/vllm rocm_aiter_dsv4_decode.py at 318361349 (read); akin: aiter#5193, a cached tensor freed",
            ids=("H06",),
            case="emulated-two-keys",
            planted=_rebuilt_on_mismatch,
        ),
        "two-streams": Hazard(
            title="two streams, one scratch",
            story="Another stream's refresh lands between this stream's refresh and its decode.",
            source="vllm#56098; sglang#37812",
            ids=("H33",),
            case="emulated-three-calls",
            planted=_two_streams,
        ),
        "ragged-plan": Hazard(
            title="a ragged plan over fixed-stride lists",
            story="Leaving topk out of the plan switches the layout. The lengths are right, every list but the first "
            "begins elsewhere, and nothing complains.",
            source="AITER get_mla_metadata_v1 at e4048607a (read): topk defaults to -1",
            ids=("H11",),
            case="emulated-three-calls",
            planted=_planted(_RaggedPlan),
        ),
        "counted-lists": Hazard(
            title="invalid entries are counted, not packed away",
            story="The plan knows a list by its length. A hole inside it is read as slot -1, and as many entries at "
            "the end are never read.",
            source="ROCm/vllm rocm_aiter_dsv4_decode.py at 318361349 (read; whether its callers pass holes is unknown)",
            ids=("H15",),
            case="emulated-holes",
            planted=_planted(_CountedLists),
        ),
        "unmasked-rows": Hazard(
            title="rows without a key keep the last step's answer",
            story="A padded row has no work that writes it. In a fresh buffer that is garbage; in a scratch it is "
            "the previous batch's output, finite and plausible.",
            source="vLLM 0.33.0, rocm_aiter_mla.py (zeroes the output first); vllm#45750 (zero-length padded rows)",
            ids=("H12",),
            case="emulated-padding",
            planted=_planted(_UnmaskedRows),
        ),
    },
    predict=_predict,
    claims=records.published("graph_clean_scratch"),
    timed=_timed,
    host_timed=_host_timed,
    measured_modules=("dsv4ref.kernels.aiter.lists", "dsv4ref.serving.graphs", "dsv4ref.serving.scratch"),
    kernels=lambda arch: (*(_pack_request(topk) for topk in (128, 512, 1024)), _offsets_request(1024)),
)
