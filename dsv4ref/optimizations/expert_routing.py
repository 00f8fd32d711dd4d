"""Chapter 03: tokens to experts under expert parallelism, with the right map and nothing counted twice.

Baseline: scores, top-k, remapping and the sort by expert in eager PyTorch. Optimised: one kernel that routes
(`dsv4ref.kernels.experts.routing`) and three that order (`dsv4ref.kernels.experts.dispatch`), under an `ExpertMap`.

A routing bug leaves every matrix product right and gives it the wrong tokens. The gate therefore compares integers:
ids, local numbers of every rank, histograms, both permutations, tiles; the router weights to 16 ulps; and, on tiny
experts, the sum over ranks with what one rank computes.

Source: vllm#46408, #49758; doubleword's vLLM fork, commits 8b5f7aa2c and c32932bb9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V3_2, V4_FLASH, V4_PRO
from dsv4ref.evidence import records
from dsv4ref.evidence.compare import error_norm
from dsv4ref.evidence.gates import Check, Gate, Verdict, poisoned_allocations
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound
from dsv4ref.kernels.experts import allocate_plan, plan_dispatch, route_grouped, route_hash, route_learned
from dsv4ref.kernels.experts.dispatch import BLOCK_TOKENS, CHUNK, SCAN_EXPERTS, DispatchPlan, max_tiles
from dsv4ref.kernels.experts.expert_map import REMAP_LANES, ExpertMap
from dsv4ref.kernels.experts.routing import scored_constants
from dsv4ref.optimizations import decode_model, routing_eager
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction, case_seed
from dsv4ref.optimizations.routing_experts import assignment, local_error, routed, routed_by_plan
from dsv4ref.optimizations.routing_inputs import CASES, RoutingInputs, build
from dsv4ref.ref.dispatch import dispatch_ref, expert_table_ref, remap_ref
from dsv4ref.ref.router import route_grouped_ref, route_hash_ref, route_learned_ref

__all__ = [
    "OPTIMIZATION",
    "PLAN_OUTPUTS",
    "Damage",
    "assignments",
    "damage",
    "optimized_plan",
    "optimized_route",
    "ranks_of",
]

_LAUNCH_US = 2.0
"""Assumed cost of one launch inside a graph, microseconds, on top of the bytes it moves."""
_SCORE_FLOPS = 10
"""A score's exponential, logarithm, quotient, root and so on, each as one; selection adds a comparison per choice."""

Outputs = dict[str, Tensor]
Routed = tuple[Tensor, Tensor]


# --- the paths ---


def optimized_route(inputs: RoutingInputs, bias: Tensor | None = None, **out: Tensor) -> Routed:
    """Weights and experts from the case's kernel; another bias may be put in its place."""
    bias = inputs.bias if bias is None else bias
    if inputs.kind == "hash":
        return route_hash(inputs.logits, inputs.table, inputs.token_ids, inputs.router, **out)
    route = route_learned if inputs.kind == "learned" else route_grouped
    return route(inputs.logits, bias, inputs.router, **out)


def optimized_plan(inputs: RoutingInputs, experts: Tensor, rank: int) -> DispatchPlan:
    """One rank's routing data, remapped and sorted in the same three launches."""
    return plan_dispatch(experts, expert_map=inputs.maps[rank], block_m=inputs.block_m)


def _eager_route(inputs: RoutingInputs) -> Routed:
    if inputs.kind == "hash":
        return routing_eager.eager_route_hash(inputs.logits, inputs.table, inputs.token_ids, inputs.router)
    learned = inputs.kind == "learned"
    route = routing_eager.eager_route_learned if learned else routing_eager.eager_route_grouped
    return route(inputs.logits, inputs.bias, inputs.router)


def _eager_plan(inputs: RoutingInputs, experts: Tensor, rank: int) -> dict[str, Tensor]:
    one = inputs.maps[rank]
    return routing_eager.eager_plan(experts, one.table, one.num_local, inputs.block_m)


PLAN_OUTPUTS = ("local", "histogram", "offsets", "gather", "scatter", "tile_expert", "tile_first")
"""Routing data in a chapter's outputs: every rank's, one behind the other."""


def _outputs(inputs: RoutingInputs, route: Routed, plans: list[dict[str, Tensor]]) -> Outputs:
    """Everything the gate compares: the ranks' integers one behind the other, and the sum over ranks."""
    weights, experts = route
    found = {"experts": experts, "weights": weights}
    found |= {name: torch.cat([plan[name].flatten() for plan in plans]) for name in PLAN_OUTPUTS}
    found["routed"] = torch.zeros(0, dtype=torch.float64)
    if inputs.moe is not None:
        owned = [one.global_ids().tolist() for one in inputs.maps]
        parts = [routed_by_plan(inputs.moe, weights, plan, o) for plan, o in zip(plans, owned, strict=True)]
        found["routed"] = torch.stack(parts).sum(dim=0)
    return found


def ranks_of(inputs: RoutingInputs, outputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Histogram, offsets and gather of each rank, cut out of the outputs again."""
    slots = inputs.logits.shape[0] * inputs.router.top_k
    found, experts = [], 0
    for rank, one in enumerate(inputs.maps):
        behind = experts + one.num_local
        found.append(
            {
                "histogram": outputs["histogram"][experts:behind],
                "offsets": outputs["offsets"][experts + rank : behind + rank + 1],
                "gather": outputs["gather"][rank * slots : (rank + 1) * slots],
            }
        )
        experts = behind
    return found


def assignments(inputs: RoutingInputs, outputs: Mapping[str, Tensor]) -> Tensor:
    """How often each token is computed by each global expert, int64 ``[M, E]``, whatever the ids say."""
    owned = [one.global_ids().tolist() for one in inputs.maps]
    return assignment(ranks_of(inputs, outputs), owned, inputs.logits.shape[0], inputs.router.top_k)


Route = Callable[[RoutingInputs], Routed]
Plan = Callable[[RoutingInputs, Tensor, int], DispatchPlan | Mapping[str, Tensor]]


def _run(inputs: RoutingInputs, route: Route | None = None, plan: Plan = optimized_plan) -> Outputs:
    weights, experts = (route or optimized_route)(inputs)
    plans = []
    for rank in range(len(inputs.maps)):
        made = plan(inputs, experts, rank)
        plans.append(made.tensors if isinstance(made, DispatchPlan) else dict(made))
    return _outputs(inputs, (weights, experts), plans)


def _baseline(inputs: RoutingInputs) -> Outputs:
    return _run(inputs, _eager_route, _eager_plan)


def _optimized(inputs: RoutingInputs) -> Outputs:
    return _run(inputs)


def _reference(inputs: RoutingInputs) -> Outputs:
    """Routers in float64, placements and integers by loops, and all experts on one rank."""
    z, bias = inputs.logits.cpu().to(torch.float64), inputs.bias.cpu().to(torch.float64)
    if inputs.kind == "hash":
        tokens = inputs.token_ids.cpu()
        known = (tokens >= 0)[:, None]
        weights, experts = route_hash_ref(z, inputs.table.cpu(), tokens.clamp(min=0), inputs.router)
        weights, experts = weights * known, torch.where(known, experts, -1)
    else:
        route = route_learned_ref if inputs.kind == "learned" else route_grouped_ref
        weights, experts = route(z, bias, inputs.router)
    plans = []
    ranks = len(inputs.maps)
    for rank in range(ranks):
        table = expert_table_ref(inputs.router.n_experts, rank, ranks, inputs.placement)
        local, num_local = remap_ref(experts, table), int((table >= 0).sum())
        want = dispatch_ref(local, num_local, inputs.block_m)
        tail = max_tiles(local.numel(), num_local, inputs.block_m) - want.tile_expert.numel()
        nothing = torch.full((tail,), -1, dtype=torch.int32)
        tiles = {name: torch.cat([getattr(want, name), nothing]) for name in ("tile_expert", "tile_first")}
        plans.append({"local": local, **vars(want), **tiles})
    found: Outputs = {"experts": experts.to(torch.int32), "weights": weights}
    found |= {name: torch.cat([plan[name].flatten() for plan in plans]) for name in PLAN_OUTPUTS}
    found["routed"] = torch.zeros(0, dtype=torch.float64)
    if inputs.moe is not None:
        found["routed"] = routed(inputs.moe, weights, experts)
    return found


def _timed(inputs: RoutingInputs) -> Mapping[str, Callable[[], object]]:
    """Rank 0's share: route and order, together and apart, into memory that stays."""
    rows, router = inputs.logits.shape[0], inputs.router
    where, one = inputs.logits.device, inputs.maps[0]
    weights = torch.empty((rows, router.top_k), dtype=torch.float32, device=where)
    experts = torch.empty((rows, router.top_k), dtype=torch.int32, device=where)
    plan = allocate_plan(rows, router.top_k, one.num_local, block_m=inputs.block_m, device=where)
    ready = optimized_route(inputs)[1]

    def order(ids: Tensor) -> object:
        return plan_dispatch(ids, expert_map=one, block_m=inputs.block_m, out=plan)

    return {
        "baseline": lambda: _eager_plan(inputs, _eager_route(inputs)[1], 0),
        "optimized": lambda: order(optimized_route(inputs, weights=weights, experts=experts)[1]),
        "eager route": lambda: _eager_route(inputs),
        "route": lambda: optimized_route(inputs, weights=weights, experts=experts),
        "eager order": lambda: _eager_plan(inputs, ready, 0),
        "order": lambda: order(ready),
    }


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    router, rows, kind = p["router"], p["rows"], p["kind"]
    logit_bytes = p["dtype"].itemsize
    num_local = -(-router.n_experts // p["ranks"])
    eager = routing_eager.eager_bytes(kind, rows, router, num_local, logit_bytes)
    fused = routing_eager.fused_bytes(kind, rows, router, num_local, logit_bytes, p["block_m"])
    least = routing_eager.least_bytes(kind, rows, router, num_local, logit_bytes)
    eager_launches = routing_eager.eager_launches(kind) + routing_eager.eager_launches("plan")
    eager_launches += p["dtype"] is not torch.float32
    fused_launches = routing_eager.fused_launches(p)
    scored = router.top_k if kind == "hash" else router.n_experts
    flops = rows * scored * (_SCORE_FLOPS + router.top_k)
    spec = decode_model.spec_for(device)
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None and rows:
        baseline_us = eager / (spec.bandwidth_tb_s * 1e6) + eager_launches * _LAUNCH_US
        optimized_us = fused / (spec.bandwidth_tb_s * 1e6) + fused_launches * _LAUNCH_US
        bound_us = Bound(least, flops, spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12).time_us
    return Prediction(
        baseline_bytes=eager,
        optimized_bytes=fused,
        least_bytes=least,
        flops=flops,
        baseline_launches=eager_launches,
        optimized_launches=fused_launches,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="launches: tensors this small move in less time than a launch takes, and the eager path has ten or more "
        "for every one of the kernels'",
    )


# --- hazards ---


def _with_local(local_of: Callable[[Tensor, ExpertMap], Tensor]) -> Callable[[RoutingInputs], Outputs]:
    """The right router, and local numbers computed some other way."""

    def plan(inputs: RoutingInputs, experts: Tensor, rank: int) -> DispatchPlan:
        one = inputs.maps[rank]
        local = local_of(experts, one).to(torch.int32).contiguous()
        return plan_dispatch(local, one.num_local, block_m=inputs.block_m)

    return lambda inputs: _run(inputs, plan=plan)


def _with_histogram(count: Callable[[Tensor, int], Tensor]) -> Callable[[RoutingInputs], Outputs]:
    """The right order, and a histogram (so offsets, so every expert's rows) counted some other way."""

    def plan(inputs: RoutingInputs, experts: Tensor, rank: int) -> Mapping[str, Tensor]:
        right = optimized_plan(inputs, experts, rank)
        histogram = count(right.local, inputs.maps[rank].num_local)
        offsets = torch.nn.functional.pad(histogram.cumsum(0), (1, 0))
        return {
            **right.tensors,
            "histogram": histogram.to(torch.int32),
            "offsets": offsets.to(torch.int32),
        }

    return lambda inputs: _run(inputs, plan=plan)


def _with_bias(change: Callable[[Tensor], Tensor]) -> Callable[[RoutingInputs], Outputs]:
    return lambda inputs: _run(inputs, lambda i: optimized_route(i, change(i.bias)))


def _phantom_31(local: Tensor, num_local: int) -> Tensor:
    """A bitmatrix packed without masking -1: -1 // 32 truncates to word 0, and a shift by -1 sets its bit 31."""
    word = torch.div(local, 32, rounding_mode="trunc")
    column = (word * 32 + (local & 31)).to(torch.int64)
    width = -(-num_local // 32) * 32
    bits = torch.zeros((local.shape[0], width), dtype=torch.int64, device=local.device)
    return bits.scatter_(1, column, 1)[:, :num_local].sum(dim=0)


def _padding_counted(local: Tensor, num_local: int) -> Tensor:
    """Every program counts all lanes of its power of two, so the next block's first slots count twice."""
    slots = local.flatten().to(torch.int64)
    block = BLOCK_TOKENS * local.shape[1]
    lanes = 1 << (block - 1).bit_length()
    seen = torch.cat([slots[first : first + lanes] for first in range(0, len(slots), block)])
    return torch.bincount(seen[seen >= 0], minlength=num_local)


def _naive_softplus(inputs: RoutingInputs) -> Routed:
    """sqrt(log(1 + exp(z))) as written: 0 / 0 far below zero, inf / inf far above."""
    scores = torch.sqrt(torch.log(1 + torch.exp(inputs.logits.float())))
    experts = torch.sort(scores + inputs.bias, dim=-1, descending=True, stable=True).indices[:, : inputs.router.top_k]
    chosen = scores.gather(1, experts)
    return chosen / chosen.sum(dim=-1, keepdim=True) * inputs.router.route_scale, experts.to(torch.int32)


def _higher_expert_first(inputs: RoutingInputs) -> Routed:
    """Ties to the higher expert: the same kernel over experts in reverse order."""
    turned = replace(inputs, logits=inputs.logits.flip(1).contiguous(), bias=inputs.bias.flip(0).contiguous())
    weights, experts = optimized_route(turned)
    return weights, inputs.router.n_experts - 1 - experts


@dataclass(frozen=True)
class Damage:
    """What a planted bug does to a batch.

    Args:
        verdict: the gate's.
        right, wrong: int64 ``[M, E]``, how often each expert computes each token.
        rank_sizes: experts per rank.
        row: hazard, products computed, their largest error, tokens with a wrong output, error norm of the output.
    """

    verdict: Verdict
    right: Tensor
    wrong: Tensor
    rank_sizes: tuple[int, ...]
    row: dict[str, Any]


def damage(name: str, *, device: str, seed: int) -> Damage:
    """Run a planted bug once: the gate's verdict, who computed what, and whether any product was wrong in itself.

    Args:
        name: a hazard whose case has experts to compute.
        device: "cpu" or "cuda".
        seed: the run's seed.
    """
    hazard = OPTIMIZATION.hazards[name]
    inputs = build(OPTIMIZATION.case(hazard.case), device, case_seed(OPTIMIZATION.id, hazard.case, seed))
    assert inputs.moe is not None
    with poisoned_allocations():
        found = hazard.planted(inputs)
    want = _reference(inputs)
    right, wrong = assignments(inputs, want), assignments(inputs, found)
    off = (found["routed"] - want["routed"]).abs().amax(dim=1) > 1e-4  # outputs are of order one
    row = {
        "hazard": name,
        "products computed": int(wrong.sum()),
        "products, largest error": local_error(inputs.moe, wrong),
        "tokens with a wrong output": f"{int(off.sum())} of {len(off)}",
        "output, error": error_norm(found["routed"], want["routed"]),
    }
    verdict = OPTIMIZATION.gate.judge(found, baseline={}, reference=want)
    return Damage(verdict, right, wrong, tuple(one.num_local for one in inputs.maps), row)


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """Routers of Flash, Pro and V3.2, and dispatch for a rank of eight."""
    base = "dsv4ref.kernels.experts"
    routers = {"Flash": V4_FLASH.router, "Pro": V4_PRO.router, "V3.2": V3_2.router}
    ends = {"weights": "*fp32", "experts": "*i32", "logits_stride": "i32"}
    scored = {"logits": "*fp32", "bias": "*fp32", **ends}
    found = [
        _request("route", f"{base}.routing", "_route_scored_kernel", f"{name} E{r.n_experts} k{r.top_k} w1 s1", scored,
                 {"scale": "fp32"}, scored_constants(r), 1)
        for name, r in routers.items()
    ]  # fmt: skip
    flash = V4_FLASH.router
    found.append(
        _request("route_hash", f"{base}.routing", "_route_hash_kernel", "Flash E256 k6 w1 s1",
                 {"logits": "*fp32", "table": "*i64", "token_ids": "*i64", **ends, "vocabulary": "i32"},
                 {"scale": "fp32"}, {"E": flash.n_experts, "K": flash.top_k, "NORMALISE": True, "SLOT_LANES": 8}, 1)
    )  # fmt: skip
    dispatch = f"{base}.dispatch"
    for name in ("Flash", "Pro", "V3.2"):
        router = routers[name]
        local, block = router.n_experts // 8, BLOCK_TOKENS * router.top_k
        shape, size = f"{name} EP8 k{router.top_k} w4 s1", {"E": local, "BLOCK_SLOTS": block, "LANES": 256}
        count = {**size, "MAPPED": True, "NUM_GLOBAL": router.n_experts, "CHUNK_E": CHUNK}
        counted = dict.fromkeys(("experts", "table", "local", "block_counts"), "*i32")
        found.append(_request("count", dispatch, "_count_kernel", shape, counted, {"total": "i32"}, count, 4))
        scan = {"E": local, "CHUNK_E": SCAN_EXPERTS, "CHUNK_B": CHUNK}
        scanned = dict.fromkeys(("block_counts", "histogram"), "*i32")
        found.append(_request("scan", dispatch, "_scan_kernel", shape, scanned, {"blocks": "i32"}, scan, 4))
        place = {**size, "BLOCK_M": 16, "CHUNK_N": CHUNK}
        names = "local block_counts histogram offsets gather scatter tile_expert tile_first"
        placed, sizes = dict.fromkeys(names.split(), "*i32"), {"total": "i32", "tiles": "i32"}
        found.append(_request("place", dispatch, "_place_kernel", shape, placed, sizes, place, 4))
    remapped = dict.fromkeys(("ids", "table", "out"), "*i32")
    constants = {"E": flash.n_experts, "LANES": REMAP_LANES}
    found.append(
        _request("remap", f"{base}.expert_map", "_remap_kernel", "E256 w4 s1", remapped, {"count": "i32"}, constants, 4)
    )
    return tuple(found)


def _request(kernel: str, module: str, function: str, shape: str, aligned: Mapping[str, str], free: Mapping[str, str],
             constants: Mapping[str, Any], num_warps: int) -> CompileRequest:  # fmt: skip
    return CompileRequest(
        kernel=kernel, module=module, function=function, shape=shape, signature={**aligned, **free},
        constexprs=constants, num_warps=num_warps, divisible_by_16=frozenset(aligned),
    )  # fmt: skip


OPTIMIZATION = Optimization(
    id="expert_routing",
    number=3,
    title="Expert routing",
    part="I ground truth",
    sources=("vllm#46408", "vllm#49758", "doubleword vLLM fork, commits 8b5f7aa2c and c32932bb9"),
    cases={case.name: case for case in CASES},
    make_inputs=build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("experts", "exact"),
            Check("weights", "budget", "router_fp32"),
            *(Check(name, "exact") for name in PLAN_OUTPUTS),
            Check("routed", "budget", "routed_sum"),
        )
    ),
    hazards={
        "mask-as-map": Hazard(
            title="a 0/1 mask is used as the map",
            story="AITER takes a mask, every other kernel a map, and one property returned either. Read as a map, the "
            "mask sends each token to local experts 0 and 1.",
            source="vllm#49758 (GSM8K 0.00 -> 0.95); doubleword vLLM fork, commit 8b5f7aa2c; vllm#47158 is akin (a "
            "mask converted once more is all ones, cosine 0.527)",
            ids=("H38",),
            case="tiny-two-blocks",
            planted=_with_local(lambda ids, one: one.mask()[ids.long()]),
        ),
        "wrapped-minus-one": Hazard(
            title="expert_map[-1] wraps to the last expert",
            story="Dispatch marks slots of other ranks with -1 and leaves their weights. expert_map[topk_ids] reads "
            "the map from its end for them, and on the last rank that is an expert.",
            source="vllm#46408",
            ids=("H15", "H38"),
            case="tiny-two-blocks",
            planted=_with_local(lambda ids, one: one.table[ids.masked_fill(one.remap(ids) < 0, -1).long()]),
        ),
        "phantom-expert": Hazard(
            title="-1 sets bit 31: a phantom expert",
            story="Packing a bit per expert, -1 // 32 truncates to word 0 and a shift by -1 % 32 sets bit 31 where the "
            "hardware takes the low five bits of a shift, as AMD's does. Expert 31 gains a row for nearly every token, "
            "and all experts behind it read rows that are not theirs.",
            source="vLLM 0.33.0, pack_bitmatrix (the mask for it); Triton's integer division truncates",
            ids=("H15",),
            case="tiny-two-blocks",
            planted=_with_histogram(_phantom_31),
        ),
        "padding-lanes": Hazard(
            title="padding lanes are counted twice",
            story="32 tokens of top 6 are 192 slots in 256 lanes. Masked by the batch's size instead of the block's, "
            "the last 64 lanes count the next block's slots a second time.",
            source="doubleword vLLM fork, commit c32932bb9",
            ids=("H12",),
            case="tiny-two-blocks",
            planted=_with_histogram(_padding_counted),
        ),
        "global-ids": Hazard(
            title="global ids meet local weights",
            story="Nobody remaps. Ids below the local count pick a local expert of that number on every rank; the "
            "others are out of range, which is skipped here and an illegal access where nothing checks.",
            source="aiter#3995 (illegal access)",
            ids=("H38",),
            case="tiny-two-blocks",
            planted=_with_local(lambda ids, one: ids),
        ),
        "sentinel-clamped": Hazard(
            title="the -1 of padding rows reaches a kernel that has none",
            story="A kernel indexes the weights with -1 and faults. Sending such slots to expert 0 is right with a "
            "weight of 0, as the fix proposes; clamped alone, every slot that is not local is expert 0's work.",
            source="vllm#57036 (the fault, and a fix that is still open)",
            ids=("H15",),
            case="tiny-padding",
            planted=_with_local(lambda ids, one: one.remap(ids).clamp(min=0)),
        ),
        "bias-rounded": Hazard(
            title="the correction bias is rounded to bf16",
            story="Around 7 bf16 has steps of 1/32, more than what separates the experts.",
            source="vllm#42982; sglang#37133, which restores fp32",
            ids=("H22",),
            case="tiny-two-blocks",
            planted=_with_bias(lambda bias: bias.to(torch.bfloat16).float()),
        ),
        "bias-reinterpreted": Hazard(
            title="the fp32 bias is read as bf16",
            story="A kernel dispatched on the logits' dtype reads the bias pointer as that dtype: every other value is "
            "the low half of an fp32 number.",
            source="AITER biased_grouped_topk, topk_softmax_kernels_group.cu",
            ids=("H23",),
            case="tiny-odd",
            planted=_with_bias(lambda bias: bias.view(torch.bfloat16)[: len(bias)].float()),
        ),
        "naive-softplus": Hazard(
            title="sqrt(log(1 + exp(z))) as written",
            story="Far below zero all chosen scores are 0 and the weights 0 / 0; far above they are inf / inf.",
            source="sglang#34459; aiter#4247",
            ids=("H24",),
            case="tiny-extremes",
            planted=lambda inputs: _run(inputs, _naive_softplus),
        ),
        "ties-reversed": Hazard(
            title="ties go to the higher expert",
            story="No source defines ties, so two kernels, or two runs, may choose different experts.",
            source="aiter#4376",
            ids=("H25",),
            case="tiny-ties",
            planted=lambda inputs: _run(inputs, _higher_expert_first),
        ),
    },
    predict=_predict,
    claims=records.published("expert_routing"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.experts.routing",
        "dsv4ref.kernels.experts.dispatch",
        "dsv4ref.kernels.experts.expert_map",
        "dsv4ref.optimizations.expert_routing",
        "dsv4ref.optimizations.routing_eager",
    ),
    kernels=_requests,
)
