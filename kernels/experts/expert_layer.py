"""The routed experts of a layer: two grouped GEMMs, the activation between them, and the sum over a token's experts.

    h[p] = swiglu(W1[e] x[gather[p] // k])          expert-sorted, activation fused       one launch
    y[gather[p]] = W2[e] h[p]                       one row per slot                      one launch
    out[t] = sum_j weight[t, j] y[t k + j]          over local choices, in fp32           one launch

The activation stays in expert order: turning its rows to token order and back are inverse permutations. No element is
written by two programs and there are no atomics, so a result does not depend on who finishes first.

Every row of ``out`` is written. A slot that is not local contributes nothing because its row, which no program has
written, is not read; a token without a local expert gets zeros.

The sum stands apart from the GEMM in the form ``products``, and its operands pass through memory. In the form ``owned``
it does not: a program owns a block of the output, walks all experts of its tokens and writes the sum. That saves the
traffic and a launch. It also reads an expert's weights again for every block of 16 tokens, and there are only as many
programs as output blocks.

The router weight is applied to the fp32 product, after W2, as vLLM and transformers do; DeepSeek's code applies it to
the activation. The same in exact arithmetic; `dsv4ref.ref.experts` has both.

Reference: `dsv4ref.ref.experts.routed_experts_ref`. Source: doubleword's vLLM fork, commit 29aaf1bbc (the direct form);
vllm#46408 (the masked sum). Hazards: H12, H38.
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
from dsv4ref.kernels.experts.dispatch import DispatchPlan
from dsv4ref.kernels.experts.grouped_gemm import _load_weights, grouped_gemm
from dsv4ref.kernels.experts.mxfp4 import Mxfp4Weights
from dsv4ref.kernels.experts.tiles import ExpertTile

__all__ = [
    "OWNED_TILE",
    "SUM_LANES",
    "ExpertScratch",
    "Form",
    "allocate_scratch",
    "expert_layer",
    "owned_w2",
    "sum_slots",
]

Form = Literal["products", "owned"]

OWNED_TILE = ExpertTile(16, 16, 512, 4)
"""Tokens, output columns and step of an owner. Narrow, because every program walks all experts of its tokens."""
SUM_LANES = 1024
"""Columns that a program of the sum writes."""


@dataclass(frozen=True, eq=False)
class ExpertScratch:
    """Static memory between the launches.

    Args:
        hidden: bf16 ``[M * k, I]``, by sorted position.
        products: bf16 ``[M * k, D]``, by slot; None if only the form ``owned`` will run.
    """

    hidden: Tensor
    products: Tensor | None


def allocate_scratch(
    tokens: int, top_k: int, inner: int, depth: int, *, form: Form = "products", device: torch.device | str = "cpu"
) -> ExpertScratch:
    """Scratch of `expert_layer`, unwritten.

    Args:
        tokens, top_k: M and k.
        inner, depth: I and D.
        form: which will run.
        device: where.

    Raises:
        ValueError: a size below 0 (top_k, inner, depth: below 1), or another form.
    """
    for name, value, least in (("tokens", tokens, 0), ("top_k", top_k, 1), ("inner", inner, 1), ("depth", depth, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
    _check_form(form)
    hidden = torch.empty((tokens * top_k, inner), dtype=torch.bfloat16, device=device)
    if form == "owned":
        return ExpertScratch(hidden, None)
    return ExpertScratch(hidden, torch.empty((tokens * top_k, depth), dtype=torch.bfloat16, device=device))


@triton.jit
def _sum_slots_kernel(
    products, route_weights, local, out, product_stride, out_stride, D: tl.constexpr, TOP_K: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weight[t, j] y[t k + j], in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = columns < D
    total = tl.zeros((LANES,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        is_local = tl.load(local + slot) >= 0  # nobody has written the others' rows
        weight = tl.load(route_weights + slot, mask=is_local, other=0.0)
        y = tl.load(products + slot * product_stride + columns, mask=inside & is_local, other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _owned_w2_kernel(
    hidden, packed, scales, route_weights, local, scatter, offsets, tile_expert, tile_first, out, tokens, tiles,
    hidden_stride, out_stride, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over experts of BLOCK_T tokens, BLOCK_N columns: experts in ascending order, each once."""
    column = tl.program_id(0) * BLOCK_N
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    choices = tl.arange(0, CHOICES)
    real = (rows < tokens)[:, None] & (choices < TOP_K)[None, :]
    slots = rows.to(tl.int64)[:, None] * TOP_K + choices[None, :]
    mine = tl.load(local + slots, mask=real, other=-1)
    position = tl.load(scatter + slots, mask=mine >= 0, other=-1)
    weight = tl.load(route_weights + slots, mask=mine >= 0, other=0.0)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for tile in tl.range(0, tiles):
        expert = tl.load(tile_expert + tile)
        # Only an expert's first tile: the others hold more rows of the expert that is being computed for all of them.
        opens = tl.load(tile_first + tile) == tl.load(offsets + tl.maximum(expert, 0))
        chosen = (mine == expert) & (expert >= 0) & opens
        if tl.max(tl.max(chosen.to(tl.int32), axis=1), axis=0) > 0:
            # A token that names an expert twice has two equal rows; either serves, with the sum of the weights.
            source = tl.max(tl.where(chosen, position, -1), axis=1)
            times = tl.sum(tl.where(chosen, weight, 0.0), axis=1)
            has = source >= 0
            h_rows = hidden + source.to(tl.int64)[None, :] * hidden_stride
            y = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
            for first in range(0, K, BLOCK_K):
                inside = has[None, :]
                if K % BLOCK_K:
                    inside = inside & (k < K - first)[:, None]
                h = tl.load(h_rows + first + k[:, None], mask=inside, other=0.0)
                w = _load_weights(packed, scales, expert * N + column, N - column, first, K, BLOCK_N, BLOCK_K)
                y = tl.dot(w, h, y)
            total += tl.where(has[None, :], y * times[None, :], 0.0)  # a weight's NaN is its own tokens' only
    n = column + tl.arange(0, BLOCK_N)
    at = out + rows.to(tl.int64)[None, :] * out_stride + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (rows < tokens)[None, :])


def sum_slots(products: Tensor, route_weights: Tensor, plan: DispatchPlan, *, out: Tensor | None = None) -> Tensor:
    """Weighted sum over a token's local choices, in fp32, one kernel launch.

    Args:
        products: bf16 ``[M * k, D]`` by slot; rows of slots that are not local are not read.
        route_weights: fp32 ``[M, k]`` contiguous; those of slots that are not local are not read.
        plan: of this batch.
        out: bf16 ``[M, D]``, rows may be strided; allocated if None. Every row is written.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, layout or device; ``out`` sharing memory with an input.
    """
    tokens, top_k = _check_weights(route_weights, plan)
    checks.check_tensor(
        "products", products, dtype=torch.bfloat16, shape=(tokens * top_k, "D"), device=route_weights.device
    )
    depth = int(products.shape[1])
    if depth > 1 and products.stride(1) != 1:
        raise ValueError(f"products: got strides {products.stride()}, expected a unit stride in the last dimension")
    architecture(products.device)
    out = _checked_out(out, (tokens, depth), {"products": products, "route_weights": route_weights})
    if out.numel():
        _sum_slots_kernel[(tokens, -(-depth // SUM_LANES))](
            products, route_weights, plan.local, out, products.stride(0), out.stride(0), D=depth, TOP_K=top_k,
            LANES=SUM_LANES, num_warps=4,
        )  # fmt: skip
    return out


def owned_w2(
    hidden: Tensor, w2: Mxfp4Weights, route_weights: Tensor, plan: DispatchPlan, *, out: Tensor | None = None
) -> Tensor:
    """Second matrix, router weights and sum over a token's experts in one kernel launch.

    Args:
        hidden: bf16 ``[M * k, I]`` by sorted position; rows behind the last local slot are not read.
        w2: ``[E, D, I]`` in the layout of checkpoints.
        route_weights: fp32 ``[M, k]`` contiguous.
        plan: of this batch, any block_m.
        out: bf16 ``[M, D]``, rows may be strided; allocated if None. Every row is written.

    Returns:
        ``out``; experts are summed in ascending order.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, layout or device; ``out`` sharing memory with an input.
    """
    tokens, top_k = _check_weights(route_weights, plan)
    if not isinstance(w2, Mxfp4Weights):
        raise TypeError(f"w2: got {type(w2).__name__}, expected a Mxfp4Weights")
    if w2.layout != "checkpoint":
        raise ValueError(f"w2: got the layout {w2.layout!r}, expected 'checkpoint'")
    if plan.histogram.shape[0] != w2.num_experts:
        raise ValueError(f"plan: made for {plan.histogram.shape[0]} experts, expected {w2.num_experts}")
    where = route_weights.device
    checks.check_tensor("hidden", hidden, dtype=torch.bfloat16, shape=(tokens * top_k, w2.k), device=where)
    if hidden.stride(1) != 1:
        raise ValueError(f"hidden: got strides {hidden.stride()}, expected a unit stride in the last dimension")
    if w2.packed.device != where:
        raise ValueError(f"w2: on {w2.packed.device}, expected {where}")
    architecture(where)
    given = {"hidden": hidden, "route_weights": route_weights, "w2.packed": w2.packed, "w2.scales": w2.scales}
    out = _checked_out(out, (tokens, w2.n), given)
    if tokens:
        tile = OWNED_TILE.fitted(w2.n, w2.k)
        _owned_w2_kernel[(-(-w2.n // tile.block_n), -(-tokens // tile.block_m))](
            hidden, w2.packed, w2.scales, route_weights, plan.local, plan.scatter, plan.offsets, plan.tile_expert,
            plan.tile_first, out, tokens, plan.tile_expert.shape[0], hidden.stride(0), out.stride(0),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **owned_constants(w2.n, w2.k, top_k),
        )  # fmt: skip
    return out


def owned_constants(n: int, k: int, top_k: int) -> dict[str, int]:
    """What `_owned_w2_kernel` is compiled for."""
    tile = OWNED_TILE.fitted(n, k)
    return {
        "N": n,
        "K": k,
        "TOP_K": top_k,
        "CHOICES": triton.next_power_of_2(top_k),
        "BLOCK_T": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def expert_layer(
    x: Tensor,
    w1: Mxfp4Weights,
    w2: Mxfp4Weights,
    route_weights: Tensor,
    plan: DispatchPlan,
    *,
    limit: float | None,
    form: Form = "products",
    w1_tile: ExpertTile | None = None,
    w2_tile: ExpertTile | None = None,
    scratch: ExpertScratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """This rank's part of the routed sum: three kernel launches, two in the form ``owned``; no host sync.

    Args:
        x: bf16 ``[M, D]``, rows may be strided.
        w1: ``[E, 2 I, D]``, the gate's rows, then up's.
        w2: ``[E, D, I]``; in the layout of checkpoints with the form ``owned``.
        route_weights: fp32 ``[M, k]`` contiguous; those of slots that are not local are not read.
        plan: of this batch; its block_m is the tiles'.
        limit: of the activation's clamp; None for no clamp.
        form: "products" or "owned"; see the module.
        w1_tile, w2_tile: launch shapes; `select_tile` with all choices taken for local if None. The form ``owned``
            has a tile of its own for W2 and takes none.
        scratch: memory between the launches, needed under graph capture; allocated if None.
        out: bf16 ``[M, D]``, rows may be strided; allocated if None. Every row is written.

    Returns:
        ``out``. A token without a local expert gets zeros.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, layout or device; ``out`` or the scratch sharing memory with
            an input.
    """
    _check_form(form)
    for name, matrix in (("w1", w1), ("w2", w2)):
        if not isinstance(matrix, Mxfp4Weights):
            raise TypeError(f"{name}: got {type(matrix).__name__}, expected a Mxfp4Weights")
    if (w2.num_experts, w2.n, 2 * w2.k) != (w1.num_experts, w1.k, w1.n):
        raise ValueError(
            f"w2: got {w2.num_experts} experts of [{w2.n}, {w2.k}], expected {w1.num_experts} of [{w1.k}, {w1.n // 2}] "
            f"to go with w1's [{w1.n}, {w1.k}] (gate and up)"
        )
    if form == "owned" and w2_tile is not None:
        raise ValueError(f"w2_tile: got {w2_tile}, expected None with form 'owned'")
    tokens, top_k = _check_weights(route_weights, plan)
    checks.check_tensor("x", x, dtype=torch.bfloat16, shape=(tokens, w1.k), device=route_weights.device)
    out = _checked_out(out, (tokens, w2.n), {"x": x, "route_weights": route_weights})
    if scratch is None:
        scratch = allocate_scratch(tokens, top_k, w2.k, w2.n, form=form, device=x.device)
    if form == "products" and scratch.products is None:
        raise ValueError("scratch: has no products, expected the scratch of form 'products'")
    hidden = grouped_gemm(x, w1, plan, gather=True, gated=True, limit=limit, tile=w1_tile, out=scratch.hidden)
    if form == "owned":
        return owned_w2(hidden, w2, route_weights, plan, out=out)
    products = grouped_gemm(hidden, w2, plan, scatter=True, tile=w2_tile, out=scratch.products)
    return sum_slots(products, route_weights, plan, out=out)


def _check_form(form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form: got {form!r}, expected 'products' or 'owned'")


def _check_weights(route_weights: Tensor, plan: DispatchPlan) -> tuple[int, int]:
    """M and k of a batch whose router weights go with its plan."""
    if not isinstance(plan, DispatchPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a DispatchPlan")
    tokens, top_k = (int(size) for size in plan.local.shape)
    checks.check_tensor(
        "route_weights", route_weights, dtype=torch.float32, shape=(tokens, top_k), device=plan.local.device,
        contiguous=True,
    )  # fmt: skip
    return tokens, top_k


def _checked_out(out: Tensor | None, shape: tuple[int, int], inputs: dict[str, Tensor]) -> Tensor:
    where = next(iter(inputs.values())).device
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=where)
    checks.check_tensor("out", out, dtype=torch.bfloat16, shape=shape, device=where)
    checks.check_writable_rows("out", out)
    for name, tensor in inputs.items():
        checks.check_no_overlap("out", out, name, tensor)
    return out
