"""Chapter 18: cut a row's keys over several workgroups, so that few rows fill the machine, and merge what they found.

Baseline: `sparse_mla_decode` at chapter 05's launch shape, one workgroup per row and head block. Optimised:
`split_k_decode`, launch shape and split count planned together from padded widths: whole waves of workgroups, the
fewest iterations, and where one split is best no staging and no second launch.

What is predicted, broken by hazards and measured as "optimized" is the portable kernel, the same on every device. Where
Hopper's own kernel exists (sm_90, `hopper_decode`) it stands behind the same gate and is measured beside it.

Source: vllm#44899 and vllm#46275 (split decode on gfx950 and gfx942), vllm#52212, vllm#57880.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import Scope
from dsv4ref.kernels import peers
from dsv4ref.kernels.peers.agreement import check_agreement
from dsv4ref.kernels.sparse_mla import (
    SplitScratch,
    hopper_decode,
    hopper_prefill,
    merge_scopes,
    sparse_mla_decode,
    split_decode,
)
from dsv4ref.kernels.sparse_mla.prefill import Path as PrefillPath
from dsv4ref.kernels.sparse_mla.prefill import sparse_mla_prefill
from dsv4ref.kernels.sparse_mla.splits import MAX_SPLITS, SHAPES, machine_of, staged_bytes
from dsv4ref.optimizations import decode_inputs, decode_model, prefill_inputs, split_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case
from dsv4ref.optimizations.prefill_inputs import Workspace, prompt_case
from dsv4ref.optimizations.report import PEER_PREFIX
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

__all__ = ["BF16_KEYS", "HOPPER", "HOPPER_BF16_KEYS", "OPTIMIZATION", "SplitInputs", "parts_of"]

HOPPER = "gluon"
"""The variant that Hopper's own kernel is timed as, and the prefix of its outputs in the gate."""
BF16_KEYS = "bf16 keys"
"""The variant that the portable prefill over a prompt's workspace is timed as."""
HOPPER_BF16_KEYS = f"{BF16_KEYS}, {HOPPER}"
"""The variant that Hopper's own prefill over the same workspace is timed as."""

plan_for = functools.partial(split_decode.plan_for, path="triton")
split_k_decode = functools.partial(split_decode.split_k_decode, path="triton")


@dataclass(frozen=True)
class SplitInputs:
    """One decode step, the sink it is called with, if any, and the split count; None leaves that to the plan.

    The rows of a prompt's chunk come with its workspace: the same keys in bf16.
    """

    step: DecodeInputs
    sink: Tensor | None
    splits: int | None
    workspace: Workspace | None = None


def _build(case: Case, device: str, seed: int) -> SplitInputs:
    workspace = None
    if prefill_inputs.is_prompt(case.params):
        step, workspace = prefill_inputs.build(case, device, seed)
    else:
        step = decode_inputs.build(case, device, seed)
    return SplitInputs(step, step.sink if case.params["sink"] else None, case.params["splits"], workspace)


def _named(outputs: tuple[Tensor, Tensor | None], prefix: str = "") -> dict[str, Tensor]:
    out, lse = outputs
    assert lse is not None
    return {f"{prefix}out": out, f"{prefix}lse": lse}


def _twice(outputs: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    """What both kernels are held to."""
    return _named(outputs) | _named(outputs, f"{HOPPER} ")


def _reference(inputs: SplitInputs) -> dict[str, Tensor]:
    step = inputs.step
    return _twice(sparse_attention_ref(step.q, step.scopes, inputs.sink, step.scale))


def _plain(inputs: SplitInputs) -> dict[str, Tensor]:
    step = inputs.step
    return _twice(sparse_attention_plain(step.q, step.scopes, inputs.sink, step.scale))


def _baseline(inputs: SplitInputs) -> dict[str, Tensor]:
    step = inputs.step
    return _named(
        sparse_mla_decode(step.q, step.swa, step.extra, sink=inputs.sink, scale=step.scale, return_lse=True)
    )  # fmt: skip


def _on_hopper(inputs: SplitInputs) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """These inputs' call of Hopper's kernel; None where it does not exist or does not take them."""
    step = inputs.step
    if hopper_decode.refusal(step.q, step.swa, step.extra, None) is not None:
        return None
    return functools.partial(
        split_decode.split_k_decode, step.q, step.swa, step.extra, sink=inputs.sink, scale=step.scale,
        splits=inputs.splits, path="gluon",
    )  # fmt: skip


def _optimized(inputs: SplitInputs) -> dict[str, Tensor]:
    step = inputs.step
    found = _named(
        split_k_decode(
            step.q, step.swa, step.extra, sink=inputs.sink, scale=step.scale, return_lse=True, splits=inputs.splits
        )
    )
    hopper = _on_hopper(inputs)
    return found if hopper is None else found | _named(hopper(return_lse=True), f"{HOPPER} ")


def _timed(inputs: SplitInputs) -> Mapping[str, Callable[[], object]]:
    if inputs.workspace is not None:
        return _timed_prompt(inputs, inputs.workspace)
    step, sink = inputs.step, inputs.sink
    q, swa, extra, scale = step.q, step.swa, step.extra, step.scale
    out = torch.empty_like(q)
    machine = machine_of(q.device)
    tile = SHAPES[machine.arch][0].launch if machine is not None else None
    planned = plan_for(q, swa, extra, splits=inputs.splits)
    asked: dict[str, dict[str, Any]] = {
        "optimized": {"splits": inputs.splits},
        "one split": {"splits": 1},
        "small tile": {"launch": tile},
        "twice the splits": {"launch": planned.launch, "splits": min(MAX_SPLITS, 2 * planned.splits)},
    }
    places = max(plan_for(q, swa, extra, **options).splits for options in asked.values()) * q.shape[0] * q.shape[1]
    scratch = SplitScratch.allocate(places, q.device)

    def variant(options: Mapping[str, Any]) -> Callable[[], object]:
        return lambda: split_k_decode(q, swa, extra, sink=sink, scale=scale, out=out, scratch=scratch, **options)

    variants: dict[str, Callable[[], object]] = {
        "baseline": lambda: sparse_mla_decode(q, swa, extra, sink=sink, scale=scale, out=out),
        **{name: variant(options) for name, options in asked.items()},
    }
    found = variants | _timed_on_hopper(inputs, out)
    return found | _decode_peers(inputs, lambda: split_k_decode(q, swa, extra, sink=sink, scale=scale)[0])


def _timed_on_hopper(inputs: SplitInputs, out: Tensor) -> dict[str, Callable[[], object]]:
    """Hopper's own kernel under its own plan, where there is one."""
    step, hopper = inputs.step, _on_hopper(inputs)
    if hopper is None:
        return {}
    planned = split_decode.plan_for(step.q, step.swa, step.extra, splits=inputs.splits, path="gluon")
    places = planned.splits * step.q.shape[0] * step.q.shape[1] if planned.splits > 1 else 0
    return {HOPPER: functools.partial(hopper, out=out, scratch=SplitScratch.allocate(places, step.q.device))}


def _timed_prompt(inputs: SplitInputs, workspace: Workspace) -> Mapping[str, Callable[[], object]]:
    """The two decodes over the FP8 caches, and the prefill over the same keys in bf16, on each path that exists.

    The workspace's own making is in no variant's time.
    """
    step, sink = inputs.step, inputs.sink
    assert sink is not None
    q, swa, extra, scale = step.q, step.swa, step.extra, step.scale
    out = torch.empty_like(q)

    def from_caches() -> Tensor:
        return split_k_decode(q, swa, extra, sink=sink, scale=scale, out=out, splits=inputs.splits)[0]

    def from_workspace(path: PrefillPath) -> Tensor:
        return sparse_mla_prefill(q, workspace.kv, workspace.indices, sink=sink, scale=scale, out=out, path=path)[0]

    variants: dict[str, Callable[[], object]] = {
        "baseline": lambda: sparse_mla_decode(q, swa, extra, sink=sink, scale=scale, out=out),
        "optimized": from_caches,
        BF16_KEYS: functools.partial(from_workspace, "triton"),
    }
    check_agreement(from_workspace("triton").clone(), from_caches())
    if hopper_prefill.refusal(q, workspace.kv, None) is None:
        check_agreement(from_workspace("gluon").clone(), from_caches())
        variants[HOPPER_BF16_KEYS] = functools.partial(from_workspace, "gluon")
    peer = peers.flashmla_prefill(
        q, workspace.kv, workspace.indices, sink=sink, scale=scale, out=torch.empty_like(q), ours=from_caches
    )
    if peer is not None:
        variants[f"{PEER_PREFIX}{peers.FLASHMLA_PREFILL}"] = peer
    return variants | _timed_on_hopper(inputs, out) | _decode_peers(inputs, from_caches)


def _decode_peers(inputs: SplitInputs, ours: Callable[[], Tensor]) -> dict[str, Callable[[], object]]:
    """Other people's decodes for these inputs, as far as they are installed and take them."""
    step, sink = inputs.step, inputs.sink
    if sink is None:
        return {}
    q, swa, extra, scale = step.q, step.swa, step.extra, step.scale
    found = {peers.FLASHMLA: peers.flashmla_decode(q, swa, extra, sink=sink, scale=scale, out=torch.empty_like(q))}
    if inputs.workspace is None:
        found[peers.VLLM_TRITON] = peers.vllm_sparse_decode(
            q, swa, extra, sink=sink, scale=scale, out=torch.empty_like(q), ours=ours
        )
    return {f"{PEER_PREFIX}{name}": peer for name, peer in found.items() if peer is not None}


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device) if p["rows"] else None  # an empty batch takes no time to compare
    sized = {**p, "rows": max(p["rows"], 1)}
    before, after = split_model.single_pass(sized, device), split_model.plan(sized, device, splits=p["splits"])
    staged = 2 * staged_bytes(p["rows"], p["heads"], after.splits) if after.splits > 1 else 0
    vectors = 2 * decode_model.vector_bytes(p)
    return Prediction(
        baseline_bytes=decode_model.key_bytes(p, before.launch) + vectors,
        optimized_bytes=decode_model.key_bytes(p, after.launch) + vectors + staged,
        least_bytes=prefill_inputs.least_bytes(p) if prefill_inputs.is_prompt(p) else decode_model.least_bytes(p),
        flops=decode_model.decode_flops(p),
        baseline_launches=min(p["rows"], 1),
        optimized_launches=(1 if after.splits == 1 else 2) if p["rows"] else 0,
        baseline_us=before.time_us if spec else None,
        optimized_us=after.time_us if spec else None,
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason=f"{before.launch}, {before.reason} -> {after.launch} in {after.splits} splits, {after.reason}",
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    partials = [
        split_model.partial_request(shape.launch, arch, **kind)
        for shape in SHAPES[arch]
        for kind in ({"split": True}, {"split": False, "rotation": True})
    ]
    return (*partials, split_model.reduce_request(arch, rotation=True))


# --- hazards ---


def parts_of(inputs: SplitInputs) -> tuple[Tensor, Tensor]:
    """What the partial kernel leaves for the reduce; parts that no split wrote are NaN.

    Returns:
        parts fp32 ``[S, T, H, 512]`` and natural LSEs fp32 ``[S, T, H]``, -inf where a split has no key.
    """
    step = inputs.step
    rows, heads, dim = step.q.shape
    splits = plan_for(step.q, step.swa, step.extra, splits=inputs.splits).splits
    scratch = SplitScratch.allocate(splits * rows * heads, step.q.device)
    scratch.parts.fill_(math.nan)
    split_k_decode(step.q, step.swa, step.extra, scale=step.scale, scratch=scratch, splits=splits)
    return scratch.parts.view(splits, rows, heads, dim), scratch.lses.view(splits, rows, heads)


def _merged(parts: Tensor, lses: Tensor, sink: Tensor | None) -> dict[str, Tensor]:
    return _named(merge_scopes(parts, lses, sink=sink, return_lse=True))


def _sink_in_each_split(inputs: SplitInputs) -> dict[str, Tensor]:
    """The partial kernel's epilogue of one split, sink included, run at several; the reduce merges what it gets."""
    parts, lses = parts_of(inputs)
    assert inputs.sink is not None
    return _merged(parts * torch.sigmoid(lses - inputs.sink)[..., None], lses, None)


def _empty_split_not_masked(inputs: SplitInputs) -> dict[str, Tensor]:
    """An eager reduce that gives an empty split the weight 0 and multiplies its unwritten part by it."""
    parts, lses = parts_of(inputs)
    lse = torch.logsumexp(lses, dim=0)
    out = ((lses - lse).exp()[..., None] * parts).sum(0)
    if inputs.sink is not None:
        out = out * torch.sigmoid(lse - inputs.sink)[..., None]
    return {"out": out.to(torch.bfloat16), "lse": lse}


def _last_steps_parts(inputs: SplitInputs) -> dict[str, Tensor]:
    """Empty splits return early and write no LSE: those of the step before stand there, one row further down."""
    parts, lses = parts_of(inputs)
    last_parts, last_lses = (t.roll(1, 1) for t in parts_of(replace(inputs, step=_step_before(inputs.step))))
    empty = lses == -math.inf
    return _merged(
        torch.where(empty[..., None], last_parts, parts), torch.where(empty, last_lses, lses), inputs.sink
    )  # fmt: skip


def _step_before(step: DecodeInputs) -> DecodeInputs:
    return replace(step, q=step.q.flip(0))


def _base_2(inputs: SplitInputs) -> dict[str, Tensor]:
    """The partial kernel writes the log2 it computes with, and the reduce takes it for natural."""
    parts, lses = parts_of(inputs)
    return _merged(parts, lses / math.log(2), inputs.sink)


def _frozen_lengths(inputs: SplitInputs) -> dict[str, Tensor]:
    """Tiles per split computed on the host, at a capture whose longest row had half the slots of today's."""
    captured = max(_tiles(inputs, row) for row in range(inputs.step.q.shape[0])) // 2
    return _visiting(inputs, lambda tiles, splits: min(tiles, splits * -(-captured // splits)))


def _tail_dropped(inputs: SplitInputs) -> dict[str, Tensor]:
    """Tiles per split rounded down: what does not divide evenly is in no split."""
    return _visiting(inputs, lambda tiles, splits: tiles // splits * splits)


def _tiles(inputs: SplitInputs, row: int) -> int:
    """Key tiles that a row has, over both scopes."""
    block_k = plan_for(inputs.step.q, inputs.step.swa, inputs.step.extra, splits=inputs.splits).launch.block_k
    return sum(-(-int(scope.indptr[row + 1] - scope.indptr[row]) // block_k) for scope in inputs.step.scopes)


def _visiting(inputs: SplitInputs, visited: Callable[[int, int], int]) -> dict[str, Tensor]:
    """The shipped call on lists cut to the tiles that faulty splits visit: ``visited(tiles of the row, splits)``."""
    step = inputs.step
    plan = plan_for(step.q, step.swa, step.extra, splits=inputs.splits)
    left = [visited(_tiles(inputs, row), plan.splits) for row in range(step.q.shape[0])]
    scopes = []
    for scope in step.scopes:
        lengths = scope.indptr.diff().tolist()
        kept = [min(length, tiles * plan.launch.block_k) for length, tiles in zip(lengths, left, strict=True)]
        left = [tiles - -(-k // plan.launch.block_k) for tiles, k in zip(left, kept, strict=True)]
        scopes.append(_shortened(scope, kept))
    swa, extra = scopes[0], scopes[1] if len(scopes) > 1 else None
    return _optimized(replace(inputs, step=replace(step, swa=swa, extra=extra)))


def _shortened(scope: Scope, lengths: list[int]) -> Scope:
    lists = [scope.indices[int(scope.indptr[t]) : int(scope.indptr[t]) + n] for t, n in enumerate(lengths)]
    ends = torch.tensor([0, *lengths], device=scope.indptr.device).cumsum(0).to(torch.int32)
    return replace(scope, indices=torch.cat(lists), indptr=ends)


# --- cases ---


def _case(case: Case, splits: int | None = None, sink: bool = True, **changes: Any) -> Case:
    return replace(case, params={**case.params, "splits": splits, "sink": sink}, **changes)


def _page_case(block: int, topk: int, splits: int, rows: int, **options: Any) -> Case:
    """A point of FlashMLA's grid: page size, top-k, query tokens per request as rows."""
    case = decode_case(
        f"page-{block}-topk-{topk}", rows=rows, heads=8, swa=64, extra=topk, swa_block=64, extra_block=block,
        about=f"{rows} query token{'s' if rows > 1 else ''}, pages of {block}",
    )  # fmt: skip
    return _case(case, splits, **options)


_ODD = {case.name: case for case in decode_inputs.tiny_and_odd_cases()}
_PAGES = (
    _page_case(2, 64, 2, 1), _page_case(53, 128, 3, 2), _page_case(61, 256, 5, 1, sink=False),
    _page_case(64, 512, 7, 1), _page_case(69, 1024, 16, 1), _page_case(256, 2048, 32, 1, sink=False),
)  # fmt: skip
_SLICES = tuple(
    _case(
        decode_case(f"heads-{heads}-{rows}", rows=rows, heads=heads, measured=True, needs_gpu=True),
        about=f"{heads} heads, a tensor-parallel slice",
    )
    for heads in (8, 16, 32)
    for rows in (64, 1024)
)
_PROMPTS = tuple(
    _case(
        prompt_case(
            name, tokens=262_144, rows=4096, heads=heads, swa=128, extra=topk, measured=True, needs_gpu=True,
            about="a prompt's last 4,096 tokens of 262,144, one query row each",
        )
    )
    for name, heads, topk in (
        ("flash-prompt", 64, 512), ("prompt-64-1024", 64, 1024), ("prompt-128-512", 128, 512),
        ("pro-prompt", 128, 1024),
    )
)  # fmt: skip
_CASES = (
    _case(_ODD["tiny"], 2, about="V4-Flash at TP8: 8 heads, two splits"),
    _case(_ODD["tiny-ragged"], 3),
    _case(_ODD["tiny-fnuz"], 2),
    _case(_ODD["tiny-c128"], 2),
    _case(_ODD["tiny-swa-only"], 1, about="SWA-only layer, odd heads, one split: no reduce"),
    _case(
        decode_case(
            "tiny-over-split", rows=3, heads=8, swa=24, extra=40, extra_block=53, lengths="ragged", tiny=True,
            about="far more splits than tiles: most are empty in every row; pages of 53",
        ),
        9,
    ),
    _case(
        decode_case(
            "tiny-no-sink", rows=3, heads=8, swa=40, extra=61, extra_block=61, tiny=True,
            about="no sink; three query tokens of one request as rows; pages of 61",
        ),
        3, sink=False,
    ),
    _case(decode_case("tiny-planned", rows=1, heads=8, swa=64, extra=160, tiny=True, about="as the plan decides")),
    _case(
        decode_case(
            "tiny-six-tiles", rows=2, heads=8, swa=40, extra=100, tiny=True,
            about="two query tokens of one request; six tiles in two splits: the cut falls inside the extra list",
        ),
        2,
    ),
    _case(
        prompt_case(
            "tiny-prompt", tokens=160, rows=3, heads=8, swa=24, extra=36, tiny=True,
            about="a prompt's last tokens: neighbouring rows list the same keys",
        )
    ),
    _case(decode_case("flash-none", rows=0, heads=64, tiny=True, about="an empty batch")),
    *_PAGES,
    _case(_ODD["window-edges"]),
    _case(_ODD["flash-tp4-3"]),
    _case(_ODD["pro-tp4-3"]),
    _case(_ODD["flash-74"]),
    _case(_ODD["flash-321"]),
    *_SLICES,
    *_PROMPTS,
    *(_case(case) for case in decode_inputs.production_cases()),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="split_k_decode",
    number=18,
    title="Split-K decode",
    part="V after the sources",
    sources=("vllm#44899", "vllm#46275", "vllm#52212", "vllm#57880 (open)"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_plain,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("out", "budget", "attention_bf16"),
            Check("lse", "budget", "lse_fp32"),
            Check(f"{HOPPER} out", "budget", "attention_bf16", optional=True),
            Check(f"{HOPPER} lse", "budget", "lse_fp32", optional=True),
        )
    ),
    hazards={
        "sink-per-split": Hazard(
            title="each split applies the sink",
            story="At one split the partial kernel's epilogue applies the sink. Left on at several, every part is "
            "short by its own split's share, and the error grows with the split count.",
            source="no report of this very bug; vllm#57880 folds the sink into the epilogue at one split only",
            ids=(),
            case="tiny-over-split",
            planted=_sink_in_each_split,
        ),
        "empty-split-nan": Hazard(
            title="the weight of an empty split is zero, its part was never written",
            story="Rows shorter than their padded width leave splits without keys in every step. The scratch holds "
            "what it held: 0 x NaN is NaN, and a row without any key gives -inf - -inf.",
            source="AITER e4048607a, mla reduce (masks the term); vllm#28181; vllm#41601",
            ids=("H12", "H16"),
            case="tiny-over-split",
            planted=_empty_split_not_masked,
        ),
        "stale-parts": Hazard(
            title="an empty split leaves the LSE and the part of the step before",
            story="A program without tiles that returns before its stores saves nothing worth having: in a scratch "
            "kept between steps a finite LSE stands beside a finite part, and no reduce can tell.",
            source="vllm#49294 (a finite LSE where there are no keys); vllm#50566 (the scratch that is kept)",
            ids=("H12",),
            case="tiny-over-split",
            planted=_last_steps_parts,
        ),
        "frozen-lengths": Hazard(
            title="tiles per split come from the lengths at capture",
            story="A host that divides the longest live row by the split count bakes the quotient into the graph. "
            "Replayed with longer rows, their ends belong to no split.",
            source="vllm#51318 (a C128 width chosen from live lengths, reverted)",
            ids=("H07",),
            case="tiny-six-tiles",
            planted=_frozen_lengths,
        ),
        "base-2": Hazard(
            title="parts' LSEs in base 2 are merged as natural ones",
            story="The partial kernel computes with log2; an LSE written without the factor ln 2 makes heavy splits "
            "heavier. Splits of equal weight stay right, so a test with flat scores sees nothing.",
            source="sglang#35045 (FlashInfer's LSE in a natural merge); FlashMLA keeps base 2 within its own combine",
            ids=(),
            case="tiny-over-split",
            planted=_base_2,
        ),
        "tail-dropped": Hazard(
            title="tiles per split are rounded down",
            story="A row's tiles divided by its splits without rounding up leaves the remainder to nobody. Benchmarks "
            "at 512 + 128 keys and powers of two of splits divide evenly.",
            source="AITER commit dc10015752 (splits under 32 KV tokens drop the tail)",
            ids=(),
            case="tiny-no-sink",
            planted=_tail_dropped,
        ),
    },
    predict=_predict,
    claims=split_model.claims(),
    timed=_timed,
    measured_modules=(
        *decode_model.MEASURED_MODULES,
        "dsv4ref.kernels.sparse_mla.hopper_decode",
        "dsv4ref.kernels.sparse_mla.hopper_fill",
        "dsv4ref.kernels.sparse_mla.hopper_kernel",
        "dsv4ref.kernels.sparse_mla.hopper_prefill",
        "dsv4ref.kernels.sparse_mla.hopper_prefill_kernel",
        "dsv4ref.kernels.sparse_mla.hopper_roles",
        "dsv4ref.kernels.sparse_mla.merge",
        "dsv4ref.kernels.sparse_mla.prefill",
        "dsv4ref.kernels.sparse_mla.split_decode",
        "dsv4ref.kernels.sparse_mla.splits",
    ),
    kernels=_requests,
)
