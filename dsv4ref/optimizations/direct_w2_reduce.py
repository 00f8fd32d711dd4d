"""Chapter 12: the expert layer in three launches instead of six, and why not in two.

Baseline: W1, its rows gathered to token order, the activation, its rows gathered back to expert order, W2 with one row
per slot, a sum over the slots of a token. The two gathers are inverse permutations; without them the activation is
elementwise in expert order and moves into W1. Optimised: W1 with the activation, W2, the sum.

The source's third step, to sum inside W2, is here as a second form (`expert_layer`'s ``owned``): a program that owns a
block of the output. It does save the rows between W2 and the sum, and reads weights again for every 16 tokens.

The gate holds both forms against float64, in poisoned memory; that W2 wrote the rows of local slots and no others, each
once; and that gather after scatter is the identity on local slots.

Source: doubleword's vLLM fork, commit 29aaf1bbc; vllm#46408 and vllm#55934, which went back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V4_FLASH
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import DispatchPlan, ExpertTile, expert_layer, grouped_gemm, plan_dispatch, select_tile
from dsv4ref.kernels.experts.expert_layer import (
    OWNED_TILE,
    SUM_LANES,
    ExpertScratch,
    allocate_scratch,
    owned_constants,
    sum_slots,
)
from dsv4ref.kernels.experts.grouped_gemm import grouped_constants
from dsv4ref.kernels.experts.separate import activate_rows, gather_rows
from dsv4ref.kernels.experts.tiles import local_rows
from dsv4ref.optimizations import decode_model, direct_w2_inputs, expert_traffic
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.direct_w2_inputs import CHECKED_ROWS, LayerInputs, in_row_units
from dsv4ref.optimizations.expert_traffic import Path

__all__ = ["OPTIMIZATION", "SeparateMemory", "layer", "round_trip", "separate_layer", "tiles_of"]

_GUARD_BITS = 0x7FA5
"""A bf16 NaN with a payload: a row that was written, even with another NaN, shows in the bytes."""
_OWNED_ROWS = 64
"""Rows up to which the form ``owned`` is timed; beyond, it reads every expert for every 16 tokens."""

Outputs = dict[str, Tensor]


# --- the paths ---


def tiles_of(inputs: LayerInputs) -> tuple[ExpertTile, ExpertTile]:
    """Tiles of W1 and W2 for this rank's part of the batch."""
    arch, (rows, top_k) = architecture(inputs.x.device), inputs.experts.shape
    mine = inputs.placed.num_local
    rows = local_rows(rows, inputs.placed.num_experts, mine)
    w1, w2 = (select_tile(arch, rows, mine, top_k, w.n, w.k) for w in (inputs.w1, inputs.w2))
    return w1, w2


def _plan(inputs: LayerInputs) -> DispatchPlan:
    return plan_dispatch(inputs.experts, expert_map=inputs.placed, block_m=tiles_of(inputs)[0].block_m)


class SeparateMemory:
    """Static memory between the six launches of the baseline.

    Args:
        inputs: whose shapes.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        slots, inner, depth = inputs.experts.numel(), inputs.w2.k, inputs.w2.n

        def rows(columns: int) -> Tensor:
            return torch.empty((slots, columns), dtype=torch.bfloat16, device=inputs.x.device)

        self.sorted_gate_up, self.token_gate_up = rows(2 * inner), rows(2 * inner)
        self.token_hidden, self.sorted_hidden, self.products = rows(inner), rows(inner), rows(depth)


def separate_layer(
    inputs: LayerInputs,
    plan: DispatchPlan,
    memory: SeparateMemory,
    *,
    to_tokens: Tensor | None = None,
    to_experts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The baseline's six launches.

    Args:
        inputs: the case's.
        plan: its routing data.
        memory: written.
        to_tokens, to_experts: indices of the two gathers; the plan's scatter and gather if None.
        out: bf16 ``[M, D]``; allocated if None.
    """
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles_of(inputs)
    grouped_gemm(inputs.x, w1, plan, gather=True, tile=w1_tile, out=memory.sorted_gate_up)
    gather_rows(memory.sorted_gate_up, plan.scatter if to_tokens is None else to_tokens, out=memory.token_gate_up)
    activate_rows(memory.token_gate_up, inputs.limit, out=memory.token_hidden)
    gather_rows(memory.token_hidden, plan.gather if to_experts is None else to_experts, out=memory.sorted_hidden)
    grouped_gemm(memory.sorted_hidden, w2, plan, scatter=True, tile=w2_tile, out=memory.products)
    return sum_slots(memory.products, inputs.weights, plan, out=out)


def layer(
    inputs: LayerInputs,
    plan: DispatchPlan,
    form: Path = "products",
    *,
    weights: Tensor | None = None,
    limit: float | None = V4_FLASH.swiglu_limit,
    scratch: ExpertScratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`expert_layer` on a case: three launches, or two in the form ``owned``.

    Args:
        inputs: the case's.
        plan: its routing data.
        form: "products" or "owned".
        weights: other router weights than the case's.
        limit: of the clamp, None for no clamp.
        scratch, out: memory; allocated if None.
    """
    if form == "separate":
        raise ValueError("form: got 'separate', expected 'products' or 'owned'")
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles_of(inputs)
    owned = form == "owned"  # which decodes the checkpoint's layout, and has a tile of its own
    return expert_layer(
        inputs.x, w1, inputs.w2 if owned else w2, inputs.weights if weights is None else weights, plan, limit=limit,
        form=form, w1_tile=w1_tile, w2_tile=None if owned else w2_tile, scratch=scratch, out=out,
    )  # fmt: skip


def round_trip(to_tokens: Tensor, to_experts: Tensor) -> Tensor:
    """Where a slot's row ends up that is gathered to token order and back: int32 ``[M * k]``, -1 for no row.

    Args:
        to_tokens: int32 ``[M * k]``, sorted position that each slot's row is taken from, -1 for none.
        to_experts: int32 ``[M * k]``, slot that each sorted position's row is taken from, -1 for none.

    Returns:
        for each sorted position, the position that its row came from: the identity on local positions.
    """
    via = to_experts.long()
    known = via >= 0
    return torch.where(known, to_tokens[via.clamp(min=0)], -1).to(torch.int32)


def _guarded(inputs: LayerInputs) -> Tensor:
    """Rows for W2's products, every byte of them known to be nobody's."""
    shape = (inputs.experts.numel(), inputs.w2.n)
    return torch.full(shape, _GUARD_BITS, dtype=torch.int16, device=inputs.x.device).view(torch.bfloat16)


def _outputs(inputs: LayerInputs, out: Tensor, owned: Tensor, products: Tensor, trip: Tensor) -> Outputs:
    """What the gate compares.

    out, owned     the layer in either form, its checked rows in units of their size
    written        1 for every slot whose row of products W2 wrote
    round trip     the cancelling gathers as index algebra
    """
    written = (products.view(torch.int16) != _GUARD_BITS).any(dim=1).to(torch.int32)
    found = {"out": in_row_units(inputs, out), "owned": in_row_units(inputs, owned)}
    return {**found, "written": written, "round trip": trip}


def _baseline(inputs: LayerInputs) -> Outputs:
    plan, memory = _plan(inputs), SeparateMemory(inputs)
    memory.products = _guarded(inputs)
    out = separate_layer(inputs, plan, memory)
    return _outputs(inputs, out, out, memory.products, round_trip(plan.scatter, plan.gather))


def _optimized(inputs: LayerInputs) -> Outputs:
    plan = _plan(inputs)
    slots, inner = inputs.experts.numel(), inputs.w2.k
    hidden = torch.empty((slots, inner), dtype=torch.bfloat16, device=inputs.x.device)
    scratch = ExpertScratch(hidden, _guarded(inputs))
    out = layer(inputs, plan, scratch=scratch)
    assert scratch.products is not None
    owned = layer(inputs, plan, "owned")
    return _outputs(inputs, out, owned, scratch.products, round_trip(plan.scatter, plan.gather))


def _reference(inputs: LayerInputs) -> Outputs:
    out, local = inputs.exact / inputs.row_size, inputs.local.flatten()
    positions = torch.arange(local.numel(), dtype=torch.int32, device=local.device)
    return {
        "out": out,
        "owned": out,
        "written": local.to(torch.int32),
        "round trip": torch.where(positions < int(local.sum()), positions, -1),
    }


def _plain(inputs: LayerInputs) -> Outputs:
    out = direct_w2_inputs.plain(inputs).to(torch.float64) / inputs.row_size
    return {"out": out, "owned": out}


def _timed(inputs: LayerInputs) -> Mapping[str, Callable[[], object]]:
    """Both paths on one plan, into memory that stays, and the launches that differ on their own."""
    plan, memory, (rows, top_k) = _plan(inputs), SeparateMemory(inputs), inputs.experts.shape
    scratch = allocate_scratch(rows, top_k, inputs.w2.k, inputs.w2.n, device=inputs.x.device)
    assert scratch.products is not None
    products, out = scratch.products, torch.empty_like(inputs.x)
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles_of(inputs)
    layer(inputs, plan, scratch=scratch, out=out)  # the single launches below start from real rows
    limit, hidden = inputs.limit, scratch.hidden
    found: dict[str, Callable[[], object]] = {
        "baseline": lambda: separate_layer(inputs, plan, memory, out=out),
        "optimized": lambda: layer(inputs, plan, scratch=scratch, out=out),
        "W1 with activation": lambda: grouped_gemm(
            inputs.x, w1, plan, gather=True, gated=True, limit=limit, tile=w1_tile, out=hidden
        ),
        "W2 by slot": lambda: grouped_gemm(hidden, w2, plan, scatter=True, tile=w2_tile, out=products),
        "weighted sum": lambda: sum_slots(products, inputs.weights, plan, out=out),
    }  # fmt: skip
    if rows <= _OWNED_ROWS:
        found["owned"] = lambda: layer(inputs, plan, "owned", scratch=scratch, out=out)
    return found


# --- prediction ---


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device) if p["rows"] else None
    arch = spec.arch if spec else "cpu"
    before, after = (expert_traffic.steps(path, p, arch) for path in ("separate", "products"))
    baseline_us = optimized_us = bound_us = None
    least, flops = expert_traffic.least_bytes(p), expert_traffic.useful_flops(p)
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None:
        baseline_us, optimized_us = (
            sum(expert_traffic.step_time_us(s, spec) for s in found) for found in (before, after)
        )
        bound_us = Bound(least, flops, spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12).time_us
    return Prediction(
        baseline_bytes=sum(step.asked for step in before),
        optimized_bytes=sum(step.asked for step in after),
        least_bytes=least,
        flops=flops,
        baseline_launches=len(before),
        optimized_launches=len(after),
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="three launches less, and 20 bytes less per slot and inner unit: gate and up stay in the accumulators",
    )


# --- hazards ---


def _with_out(change: Callable[[LayerInputs, DispatchPlan], Tensor]) -> Callable[[LayerInputs], Outputs]:
    """The right layer, with its output computed some other way."""
    return lambda inputs: {**_optimized(inputs), "out": in_row_units(inputs, change(inputs, _plan(inputs)))}


def _products(inputs: LayerInputs, plan: DispatchPlan) -> Tensor:
    """W2's rows by slot in fp32; those of slots that are not local hold what the memory held."""
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles_of(inputs)
    hidden = grouped_gemm(inputs.x, w1, plan, gather=True, gated=True, limit=inputs.limit, tile=w1_tile)
    return grouped_gemm(hidden, w2, plan, scatter=True, tile=w2_tile).float()


def _unwritten_slots(inputs: LayerInputs, plan: DispatchPlan) -> Tensor:
    """All k rows of a token are summed, those of other ranks with a weight of 0."""
    weights = inputs.weights.masked_fill(plan.local < 0, 0.0)
    products = _products(inputs, plan).unflatten(0, tuple(weights.shape))
    return (products * weights[..., None]).sum(dim=1).to(torch.bfloat16)


def _unwritten_rows(inputs: LayerInputs, plan: DispatchPlan) -> Tensor:
    """Tokens without a local expert are skipped, and so is their row of the output."""
    right, out = layer(inputs, plan), torch.empty_like(inputs.x)
    served = (plan.local >= 0).any(dim=1)
    out[served] = right[served]
    return out


def _padding_lanes(inputs: LayerInputs, plan: DispatchPlan) -> Tensor:
    """k is padded to a power of two, and the lanes behind k are masked by the end of the batch only."""
    tokens, top_k = plan.local.shape
    lanes = torch.arange(1 << (top_k - 1).bit_length(), device=inputs.x.device)
    slots = torch.arange(tokens, device=inputs.x.device)[:, None] * top_k + lanes
    live = slots < tokens * top_k
    slots = slots.clamp(max=max(tokens * top_k - 1, 0))
    live &= plan.local.flatten()[slots] >= 0
    weights = inputs.weights.flatten()[slots].masked_fill(~live, 0.0)
    rows = _products(inputs, plan)[slots].masked_fill(~live[..., None], 0.0)
    return (rows * weights[..., None]).sum(dim=1).to(torch.bfloat16)


def _weight_before_activation(inputs: LayerInputs, plan: DispatchPlan) -> Tensor:
    """x is scaled by the router weight on its way into W1, one row per slot."""
    tokens, top_k = inputs.experts.shape
    scaled = (inputs.x[:, None] * inputs.weights[..., None]).to(torch.bfloat16).flatten(0, 1)
    single = plan_dispatch(inputs.experts.reshape(-1, 1), expert_map=inputs.placed, block_m=plan.block_m)
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles_of(inputs)
    ones = torch.ones((tokens * top_k, 1), device=inputs.x.device)
    rows = expert_layer(scaled, w1, w2, ones, single, limit=inputs.limit, w1_tile=w1_tile, w2_tile=w2_tile)
    return rows.float().unflatten(0, (tokens, top_k)).sum(dim=1).to(torch.bfloat16)


def _swapped_gathers(inputs: LayerInputs) -> Outputs:
    """Each gather gets the other's index: both are permutations of the same length and dtype."""
    plan, memory = _plan(inputs), SeparateMemory(inputs)
    memory.products = _guarded(inputs)
    out = separate_layer(inputs, plan, memory, to_tokens=plan.gather, to_experts=plan.scatter)
    return _outputs(inputs, out, out, memory.products, round_trip(plan.gather, plan.scatter))


# --- cases ---


def _case(name: str, rows: int, experts: int, **changes: Any) -> Case:
    flags = {key: changes.pop(key) for key in ("tiny", "needs_gpu", "measured", "about") if key in changes}
    params = {"rows": rows, "experts": experts, "ranks": 1, "top_k": 2, "hidden": 128, "inner": 64, "content": "plain",
              **changes}  # fmt: skip
    return Case(name, params, **flags)


def _flash(rows: int, ranks: int, **flags: Any) -> Case:
    router = V4_FLASH.router
    name = f"ep{ranks}-{rows}" if ranks > 1 else f"all-{rows}"
    shape = {"ranks": ranks, "top_k": router.top_k, "hidden": V4_FLASH.hidden_size, "inner": V4_FLASH.moe_inter_dim}
    about = f"V4-Flash, {router.n_experts // ranks} of {router.n_experts} experts on the rank"
    if rows > CHECKED_ROWS:
        shape["checked"] = CHECKED_ROWS
        about += f"; float64 checks {CHECKED_ROWS} rows"
    return _case(name, rows, router.n_experts, needs_gpu=True, about=about, **shape, **flags)


M_SWEEP = {2: (1, 8, 16, 64, 1024, 4096, 8192), 1: (16, 1024, 4096, 8192)}
"""Rows of the measured cases by ranks. Every expert on one rank takes twice the memory and time to build: fewer."""
_CASES = (
    _case("tiny", 9, 6, top_k=3, tiny=True, about="all experts here"),
    _case("tiny-ep2", 21, 8, ranks=2, top_k=3, tiny=True, about="half of the experts elsewhere, and whole rows"),
    _case("tiny-padding", 12, 6, top_k=3, content="padding", tiny=True, about="rows and slots of nobody"),
    _case("tiny-top6", 10, 12, top_k=6, tiny=True, about="top 6, no power of two"),
    _case("tiny-one-expert", 40, 4, top_k=1, content="one expert", tiny=True, about="one expert gets everything"),
    _case("tiny-odd", 5, 37, hidden=160, inner=96, tiny=True, about="37 experts; widths that no tile divides"),
    _case("tiny-large", 7, 4, content="large", tiny=True, about="activations beyond the clamp"),
    _case("tiny-1", 1, 6, top_k=3, tiny=True, about="one token"),
    _case("tiny-0", 0, 6, top_k=3, tiny=True, about="an empty batch"),
    _flash(33, 2),
    _flash(321, 1),
    *(_flash(rows, ranks, measured=True) for ranks, sweep in M_SWEEP.items() for rows in sweep),
)


# --- ISA ---


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """W1 as the baseline and as the optimised path launch it, the sum, and the owner; tiles are chapter 13's matter."""
    n, k = 2 * V4_FLASH.moe_inter_dim, V4_FLASH.hidden_size
    top_k, every = V4_FLASH.router.top_k, V4_FLASH.router.n_experts
    tile = select_tile(arch, local_rows(1024, every, every // 2), every // 2, top_k, n, k)
    pointers = {"x": "*bf16", "packed": "*u8", "scales": "*u8", "out": "*bf16"}
    indices = dict.fromkeys(("gather", "offsets", "tile_expert", "tile_first"), "*i32")
    strides = dict.fromkeys(("x_stride", "out_stride"), "i32")
    found = [
        CompileRequest(
            kernel=f"W1, {'activation fused' if gated else 'plain'}",
            module="dsv4ref.kernels.experts.grouped_gemm",
            function="_grouped_kernel",
            shape=f"{tile}, {'gated' if gated else 'plain'}",
            signature={**pointers, **indices, **strides, "tiles": "i32", "limit": "fp32"},
            constexprs=grouped_constants(n, k, top_k, tile, arch, True, False, gated, gated),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            divisible_by_16=frozenset({**pointers, **indices, **strides}),
        )
        for gated in (False, True)
    ]
    pointers = {"products": "*bf16", "route_weights": "*fp32", "local": "*i32", "out": "*bf16"}
    strides = dict.fromkeys(("product_stride", "out_stride"), "i32")
    found.append(
        CompileRequest(
            kernel="weighted sum",
            module="dsv4ref.kernels.experts.expert_layer",
            function="_sum_slots_kernel",
            shape=f"{SUM_LANES} w4 s1",
            signature={**pointers, **strides},
            constexprs={"D": k, "TOP_K": top_k, "LANES": SUM_LANES},
            num_warps=4,
            divisible_by_16=frozenset({**pointers, **strides}),
        )
    )
    pointers = {"hidden": "*bf16", "packed": "*u8", "scales": "*u8", "route_weights": "*fp32", "out": "*bf16"}
    indices = dict.fromkeys(("local", "scatter", "offsets", "tile_expert", "tile_first"), "*i32")
    strides = dict.fromkeys(("hidden_stride", "out_stride"), "i32")
    found.append(
        CompileRequest(
            kernel="W2 and sum, owned",
            module="dsv4ref.kernels.experts.expert_layer",
            function="_owned_w2_kernel",
            shape=str(OWNED_TILE),
            signature={**pointers, **indices, **strides, "tokens": "i32", "tiles": "i32"},
            constexprs=owned_constants(k, V4_FLASH.moe_inter_dim, top_k),
            num_warps=OWNED_TILE.num_warps,
            num_stages=OWNED_TILE.num_stages,
            divisible_by_16=frozenset({**pointers, **indices, **strides}),
        )
    )
    return tuple(found)


_MATMUL_OGS = "triton_kernels matmul_ogs at triton commit 02adf8fdd (read)"

OPTIMIZATION = Optimization(
    id="direct_w2_reduce",
    number=12,
    title="Direct W2 reduce",
    part="III MXFP4 MoE",
    sources=("doubleword vLLM fork, commit 29aaf1bbc", "vllm#46408", "vllm#55934"),
    cases={case.name: case for case in _CASES},
    make_inputs=direct_w2_inputs.build,
    reference=_reference,
    yardstick=_plain,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("out", "budget", "expert_rows_bf16"),
            Check("owned", "budget", "expert_rows_bf16"),
            Check("written", "exact"),
            Check("round trip", "exact"),
        )
    ),
    hazards={
        "unwritten-slots": Hazard(
            title="the sum reads the rows of slots that nobody computed",
            story="W2 writes a row per local slot; the sum that follows it takes all k rows of a token. Under expert "
            "parallelism some hold whatever the scratch held. A weight of 0 does not help: 0 x NaN is NaN.",
            source=f"vllm#46408; {_MATMUL_OGS}: the sum's index is an arange",
            ids=("H12",),
            case="tiny-ep2",
            planted=_with_out(_unwritten_slots),
        ),
        "unwritten-rows": Hazard(
            title="a token without a local expert has no row written",
            story="No slot of it has a position, so a loop over positions never reaches its row of the output. The "
            "sum over ranks then adds one rank's leftovers.",
            source="vllm#46408 (the masked sum writes such rows as zeros)",
            ids=("H12",),
            case="tiny-ep2",
            planted=_with_out(_unwritten_rows),
        ),
        "padding-lanes": Hazard(
            title="lanes behind k are the next token's slots",
            story="A block of 6 choices is 8 lanes. Masked by the end of the batch instead of k, lanes 6 and 7 add the "
            "next token's first two experts to this one. The last token is right, and so is every batch of one.",
            source="doubleword vLLM fork, commit c32932bb9 (the same mask, in the histogram)",
            ids=("H12", "H38"),
            case="tiny-top6",
            planted=_with_out(_padding_lanes),
        ),
        "weights-twice": Hazard(
            title="the router weight is applied in W2 and again in the sum",
            story="W2's epilogue takes the weights, and so does the sum that used to be the only one. Where a token's "
            "weights are alike, the output keeps its direction, and a cosine sees little.",
            source="no report of this very bug; vllm#46408 and commit 29aaf1bbc apply the weight in different places",
            ids=(),
            case="tiny",
            planted=_with_out(lambda inputs, plan: layer(inputs, plan, weights=inputs.weights.square())),
        ),
        "weight-before-activation": Hazard(
            title="the router weight is applied to W1's input",
            story="Between activation and W2, or after W2, is the same number. Before the activation it is not: SiLU "
            "and the clamp are not linear, and gate and up would both carry it.",
            source="no report of this very bug; DeepSeek-V4 inference/model.py, Expert, applies it before W2",
            ids=(),
            case="tiny",
            planted=_with_out(_weight_before_activation),
        ),
        "swapped-gathers": Hazard(
            title="each gather takes the other's index",
            story="Both are int32 permutations of the same length, called dispatch and combine, or src and dst, by "
            "either convention. On one rank the bug is none: the activation is elementwise, and a permutation and its "
            "inverse cancel in either order. Under expert parallelism neither is a permutation any more, and rows of "
            "local slots come back as zeros.",
            source="no report of this very bug; vllm#49758 is akin (the right kernel, the wrong index)",
            ids=("H38",),
            case="tiny-ep2",
            planted=_swapped_gathers,
        ),
        "clamp-lost": Hazard(
            title="the fused activation is SwiGLU without the clamp",
            story="Rare large activations pass, and tokens glitch now and then instead of failing.",
            source="vllm#41935, vllm#42855",
            ids=(),
            case="tiny-large",
            planted=_with_out(lambda inputs, plan: layer(inputs, plan, limit=None)),
        ),
    },
    predict=_predict,
    claims=records.published("direct_w2_reduce"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.experts.expert_layer",
        "dsv4ref.kernels.experts.grouped_gemm",
        "dsv4ref.kernels.experts.mxfp4",
        "dsv4ref.kernels.experts.separate",
        "dsv4ref.kernels.experts.tiles",
        "dsv4ref.optimizations.direct_w2_inputs",
        "dsv4ref.optimizations.direct_w2_reduce",
    ),
    kernels=_requests,
)
