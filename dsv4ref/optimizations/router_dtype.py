"""Chapter 14: router logits in fp32 without a cast, and why the cast must not be saved by rounding the bias.

Baseline: a GEMM that writes bf16 logits, a cast to fp32, a router with fp32 logits and fp32 bias: three launches. The
source keeps the logits in bf16 and rounds the correction *bias* to bf16 once, at load: two launches, and another
router, so it stands here as a hazard. Optimised: a GEMM that writes what it accumulated in fp32
(`dsv4ref.kernels.experts.router_gemm`), and the same router: two launches, and nothing is rounded to bf16.

The gate compares with the router in float64. Rows that fp32 logits cannot decide (`router_band`) allow any set that
their band does not contradict; all other sets are compared exactly.

Source: vllm#42982; vllm#50268, vllm#54845 and sglang#37133.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V3_2, V4_FLASH, V4_PRO, RouterConfig
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound
from dsv4ref.kernels.experts import route_grouped, route_learned, router_logits
from dsv4ref.kernels.experts.router_gemm import ROWS_PATH, TILES, RouterTile
from dsv4ref.optimizations import decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.router_band import Decision, decide, scores64, weights64
from dsv4ref.ref.router import router_logits_ref

__all__ = ["OPTIMIZATION", "RouterInputs", "decision_of", "route", "source_route"]

_LAUNCH_US = 2.0
"""Assumed cost of one launch inside a graph, microseconds, on top of the bytes it moves."""
_SCORE_FLOPS = 10
"""A score's exponential, logarithm, quotient and root, each as one; selection adds a comparison per choice."""

Outputs = dict[str, Tensor]
Routed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RouterInputs:
    """Hidden states at one layer's router.

    Args:
        router: learned V4, or grouped V3.2.
        x: bf16 ``[M, D]``.
        weight: bf16 ``[E, D]``; logits of plain rows have a standard deviation of 1.
        bias: fp32 ``[E]``.
    """

    router: RouterConfig
    x: Tensor
    weight: Tensor
    bias: Tensor


def _build(case: Case, device: str, seed: int) -> RouterInputs:
    p, rng = case.params, torch.Generator().manual_seed(seed)
    router, rows, depth = p["router"], p["rows"], p["depth"]
    wide = torch.randn((rows, depth + p["padding"]), generator=rng)
    weight = torch.randn((router.n_experts, depth), generator=rng) * depth**-0.5
    bias = p["offset"] + p["spread"] * torch.randn(router.n_experts, generator=rng)
    if p["content"] == "extremes":  # logits of about +-100, and of about 0.01
        wide *= torch.tensor([50.0, 0.01, 1.0]).repeat(rows)[:rows, None]
    elif p["content"] == "not finite":  # a graph's padding rows hold what the last batch left there
        wide[1::4] = float("nan")
        wide[2::4, depth // 2] = float("inf")
    elif p["content"] != "plain":
        raise ValueError(f"content: got {p['content']!r}, expected 'plain', 'extremes' or 'not finite'")
    x = wide.to(device, torch.bfloat16)[:, :depth]
    return RouterInputs(router, x, weight.to(device, torch.bfloat16), bias.to(device))


# --- the paths ---


def route(inputs: RouterInputs, logits: Tensor, bias: Tensor | None = None, **out: Tensor) -> Routed:
    """Weights and experts from the case's kernel; another bias may be put in its place."""
    kernel = route_learned if inputs.router.n_groups is None else route_grouped
    return kernel(logits, inputs.bias if bias is None else bias, inputs.router, **out)


def _bf16_logits(inputs: RouterInputs) -> Tensor:
    return inputs.x @ inputs.weight.T


def _rounded(bias: Tensor) -> Tensor:
    """The bias as the source stores it, in bf16, widened for a kernel that takes fp32: the same numbers."""
    return bias.to(torch.bfloat16).to(torch.float32)


def source_route(inputs: RouterInputs) -> Routed:
    """What the source launches: bf16 logits straight into the router, and the bias rounded to bf16."""
    return route(inputs, _bf16_logits(inputs), _rounded(inputs.bias))


def decision_of(inputs: RouterInputs) -> tuple[Tensor, Decision]:
    """Logits in float64 ``[M, E]``, exact to 2^-53, and what they decide; on the CPU."""
    logits = router_logits_ref(inputs.x.cpu().to(torch.float64), inputs.weight.cpu())
    return logits, decide(logits, inputs.bias.cpu(), inputs.router)


def _outputs(inputs: RouterInputs, logits: Tensor, routed: Routed) -> Outputs:
    """What the gate compares, by name.

    experts, weights      sets, ascending by expert; -1 and 0 in a tie class
    allowed               1 where the row's set is one that the logits' band does not contradict
    weights / formula     each weight over what float64 makes of *these* logits and *these* experts
    logits                as they reach the router, fp32
    """
    weights, experts = (t.cpu() for t in routed)
    logits = logits.cpu()
    _, decision = decision_of(inputs)
    wanted = weights64(logits, experts, inputs.router)
    relative = weights.to(torch.float64) / wanted
    order = experts.sort(dim=1, stable=True).indices
    is_open = ~decision.decided[:, None]
    return {
        "experts": experts.gather(1, order).masked_fill(is_open, -1),
        "allowed": decision.allows(experts).to(torch.int32),
        "weights": weights.gather(1, order).masked_fill(is_open, 0.0),
        "weights / formula": relative.masked_fill(wanted.isnan() & weights.isnan(), 1.0),
        "logits": logits,
    }


def _baseline(inputs: RouterInputs) -> Outputs:
    logits = _bf16_logits(inputs).to(torch.float32)
    return _outputs(inputs, logits, route(inputs, logits))


def _optimized(inputs: RouterInputs, bias: Tensor | None = None) -> Outputs:
    logits = router_logits(inputs.x, inputs.weight)
    return _outputs(inputs, logits, route(inputs, logits, bias))


def _reference(inputs: RouterInputs) -> Outputs:
    logits, decision = decision_of(inputs)
    is_open = ~decision.decided[:, None]
    weights = weights64(logits, decision.experts, inputs.router)
    return {
        "experts": decision.experts.to(torch.int32).masked_fill(is_open, -1),
        "allowed": torch.ones(len(logits), dtype=torch.int32),
        "weights": weights.masked_fill(is_open, 0.0),
        "weights / formula": torch.ones_like(weights),
        "logits": logits,
    }


def _timed(inputs: RouterInputs) -> Mapping[str, Callable[[], object]]:
    """Three routers and two GEMMs, into memory that stays; the source's bias is rounded once, as at load."""
    rows, router, where = inputs.x.shape[0], inputs.router, inputs.x.device
    shape = (rows, router.n_experts)
    narrow = torch.empty(shape, dtype=torch.bfloat16, device=where)
    wide = torch.empty(shape, dtype=torch.float32, device=where)
    rounded, turned = _rounded(inputs.bias), inputs.weight.T
    out = {
        "weights": torch.empty((rows, router.top_k), dtype=torch.float32, device=where),
        "experts": torch.empty((rows, router.top_k), dtype=torch.int32, device=where),
    }

    def gemm() -> Tensor:
        return torch.mm(inputs.x, turned, out=narrow)

    def fp32_gemm() -> Tensor:
        return router_logits(inputs.x, inputs.weight, out=wide)

    return {
        "baseline": lambda: route(inputs, wide.copy_(gemm()), **out),
        "optimized": lambda: route(inputs, fp32_gemm(), **out),
        "source, rounded bias": lambda: route(inputs, gemm(), rounded, **out),
        "library's bf16 gemm": gemm,
        "fp32 gemm": fp32_gemm,
    }


# --- prediction ---


def _traffic(params: Mapping[str, Any], logit_bytes: int) -> tuple[int, int]:
    """Bytes of the GEMM and of the router with logits of some width."""
    router, rows, depth = params["router"], params["rows"], params["depth"]
    logits = rows * router.n_experts * logit_bytes
    gemm = 2 * depth * (rows + router.n_experts) + logits
    return gemm, logits + 4 * router.n_experts + 8 * rows * router.top_k


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    router, rows = p["router"], p["rows"]
    gemm_flops = 2 * rows * router.n_experts * p["depth"]
    flops = gemm_flops + rows * router.n_experts * (_SCORE_FLOPS + router.top_k)
    narrow, _ = _traffic(p, 2)
    wide, select = _traffic(p, 4)
    cast = rows * router.n_experts * (2 + 4)
    spec = decode_model.spec_for(device) if rows else None
    baseline_us = optimized_us = bound_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None:
        rest_us = select / (spec.bandwidth_tb_s * 1e6)
        baseline_us = _gemm_us(narrow, gemm_flops, spec) + cast / (spec.bandwidth_tb_s * 1e6) + rest_us + 3 * _LAUNCH_US
        optimized_us = _gemm_us(wide, gemm_flops, spec) + rest_us + 2 * _LAUNCH_US
        bound_us = _gemm_us(_least_bytes(p), flops, spec)
    return Prediction(
        baseline_bytes=narrow + cast + select,
        optimized_bytes=wide + select,
        least_bytes=_least_bytes(p),
        flops=flops,
        baseline_launches=3 if rows else 0,
        optimized_launches=2 if rows else 0,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=bound_us,
        reason="one launch less and a quarter less traffic on logits, if the fp32 GEMM is as good as the library's "
        "bf16 GEMM",
    )


def _least_bytes(params: Mapping[str, Any]) -> int:
    """x, weight and bias read, ids and weights written; logits need not leave the chip."""
    router, rows, depth = params["router"], params["rows"], params["depth"]
    return int(2 * depth * (rows + router.n_experts) + 4 * router.n_experts + 8 * rows * router.top_k)


def _gemm_us(moved: int, flops: int, spec: DeviceSpec) -> float:
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    return Bound(moved, flops, spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12).time_us


# --- hazards ---


def _source(inputs: RouterInputs) -> Outputs:
    return _outputs(inputs, _bf16_logits(inputs).to(torch.float32), source_route(inputs))


def _masked_with_zero(inputs: RouterInputs) -> Outputs:
    """Groups that are dropped score 0 instead of -inf, which is more than any biased score below zero."""
    router = inputs.router
    assert router.n_groups is not None
    assert router.topk_groups is not None
    logits = router_logits(inputs.x, inputs.weight)
    biased = (torch.sigmoid(logits) + inputs.bias).unflatten(1, (router.n_groups, -1))
    best = biased.topk(2, dim=-1).values.sum(dim=-1).topk(router.topk_groups, dim=-1).indices
    kept = torch.zeros(biased.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
    masked = biased.masked_fill(~kept[..., None], 0.0).flatten(1)
    experts = torch.sort(masked, dim=1, descending=True, stable=True).indices[:, : router.top_k]
    weights = weights64(logits, experts, router).to(torch.float32)
    return _outputs(inputs, logits, (weights, experts.to(torch.int32)))


def _nan_never_wins(inputs: RouterInputs) -> Outputs:
    """Selection by ``score > best`` from -inf: where nothing compares, each choice keeps the 0 it started with."""
    logits = router_logits(inputs.x, inputs.weight)
    left = (scores64(logits, inputs.router) + inputs.bias).clone()
    found = []
    for _ in range(inputs.router.top_k):
        best = left.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).max(dim=1)
        expert = best.indices.masked_fill(best.values == float("-inf"), 0)
        left.scatter_(1, expert[:, None], float("-inf"))
        found.append(expert)
    experts = torch.stack(found, dim=1)
    weights = weights64(logits, experts, inputs.router).to(torch.float32)
    return _outputs(inputs, logits, (weights, experts.to(torch.int32)))


def _reinterpreted(bias: Tensor) -> Tensor:
    """The first half of the bias's bytes, taken for E bf16 numbers."""
    return bias.view(torch.bfloat16)[: len(bias)].to(torch.float32)


# --- cases ---


def _router(like: RouterConfig, n_experts: int, **changes: Any) -> RouterConfig:
    return replace(like, n_experts=n_experts, **changes)


def _case(name: str, router: RouterConfig, rows: int, depth: int, **changes: Any) -> Case:
    flags = {key: changes.pop(key) for key in ("tiny", "needs_gpu", "measured", "about") if key in changes}
    params = {"router": router, "rows": rows, "depth": depth, "offset": 7.0, "spread": 0.1, "padding": 0,
              "content": "plain", **changes}  # fmt: skip
    return Case(name, params, **flags)


_FLASH, _PRO, _V32 = V4_FLASH.router, V4_PRO.router, V3_2.router
_MODELS = (("flash", _FLASH, 4096), ("pro", _PRO, 7168), ("v32", _V32, 7168))
_LARGE = {"measured": True, "needs_gpu": True}
_CASES = (
    _case("tiny", _router(_FLASH, 128), 32, 96, offset=8.0, spread=0.02, tiny=True, about="biases around 8"),
    _case("tiny-odd", _router(_FLASH, 37), 5, 1101, padding=3, tiny=True, about="odd E and D, strided rows, no tiles"),
    _case("tiny-grouped", _router(_V32, 128), 24, 128, tiny=True, about="V3.2's groups, top 8"),
    _case("tiny-negative", _router(_V32, 32), 12, 128, offset=-3.0, tiny=True, about="all biased scores below zero"),
    _case("tiny-plain", _router(_FLASH, 24), 129, 72, offset=0.0, tiny=True, about="no offset; tiles without slices"),
    _case("tiny-extremes", _router(_FLASH, 24), 9, 96, content="extremes", tiny=True, about="logits around +-100"),
    _case("tiny-not-finite", _router(_FLASH, 24), 12, 96, content="not finite", tiny=True,
          about="rows of NaN, and with an infinity"),
    _case("flash-3", _FLASH, 3, 4096, tiny=True, about="V4-Flash, three tokens"),
    _case("v32-9", _V32, 9, 7168, offset=5.0, tiny=True, about="V3.2, the first row past the path without tiles"),
    _case("flash-0", _FLASH, 0, 4096, tiny=True, about="an empty batch"),
    _case("pro-321", _PRO, 321, 7168, needs_gpu=True),
    *(_case(f"{name}-{rows}", router, rows, depth, **_LARGE)
      for name, router, depth in _MODELS for rows in ((1, 64, 1024) if name != "v32" else (1, 8, 64, 256, 1024, 8192))),
)  # fmt: skip


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """The GEMM at every launch shape; of the architecture only the number of stages depends."""
    requests = [_request(tile, arch) for tile in (ROWS_PATH, *TILES)]
    return tuple({request.shape: request for request in requests}.values())  # two tiles may differ in max_rows alone


def _request(tile: RouterTile, arch: str) -> CompileRequest:
    tiled = tile.block_m > 1
    pointers = {"x": "*bf16", "weight": "*bf16", "out": "*fp32"}
    sizes = dict.fromkeys(("experts", "depth", "x_stride", "out_stride"), "i32")
    constants = {"BLOCK_E": tile.block_e, "BLOCK_K": tile.block_k}
    return CompileRequest(
        kernel="router_gemm",
        module="dsv4ref.kernels.experts.router_gemm",
        function="_router_tile_kernel" if tiled else "_router_rows_kernel",
        shape=f"{tile} s{tile.stages(arch)}",
        signature={**pointers, **({"rows": "i32"} if tiled else {}), **sizes},
        constexprs=constants | ({"BLOCK_M": tile.block_m, "SLICES": tile.slices} if tiled else {}),
        num_warps=tile.num_warps,
        num_stages=tile.stages(arch),
        divisible_by_16=frozenset(pointers) | frozenset(sizes),
        within_2gb=frozenset(pointers),
    )


OPTIMIZATION = Optimization(
    id="router_dtype",
    number=14,
    title="Router dtype",
    part="III MXFP4 MoE",
    sources=("vllm#42982", "vllm#50268", "vllm#54845", "sglang#37133"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            Check("experts", "exact"),
            Check("allowed", "exact"),
            Check("weights", "budget", "router_weights_band"),
            Check("weights / formula", "budget", "router_fp32"),
            Check("logits", "budget", "router_logits_fp32"),
        )
    ),
    hazards={
        "source": Hazard(
            title="logits stay bf16, and the bias is rounded to bf16 to match",
            story="The router kernel wants logits and bias in one dtype. Rounding the bias once, at load, saves the "
            "cast of every step, and around 7 leaves a bias that is a multiple of 1/32.",
            source="vllm#42982; vLLM 0.33.0 exempts GLM only",
            ids=("H22",),
            case="tiny-grouped",
            planted=_source,
        ),
        "bias-rounded": Hazard(
            title="fp32 logits, and only the bias rounded",
            story="The rounding that matters is the bias's: with the best logits there are, most rows still change.",
            source="sglang#37133, which restores fp32",
            ids=("H22",),
            case="tiny",
            planted=lambda inputs: _optimized(inputs, _rounded(inputs.bias)),
        ),
        "bias-reinterpreted": Hazard(
            title="the fp32 bias is read as bf16",
            story="A kernel dispatched on the logits' dtype reads the bias pointer as that dtype: with bf16 logits, "
            "every other number is the low half of an fp32 one.",
            source="AITER biased_grouped_topk, topk_softmax_kernels_group.cu",
            ids=("H23",),
            case="tiny-grouped",
            planted=lambda inputs: _optimized(inputs, _reinterpreted(inputs.bias)),
        ),
        "masked-with-zero": Hazard(
            title="dropped groups score 0 instead of -inf",
            story="Nothing is lost while biased scores are positive. Where they are all negative, 0 beats every "
            "expert of the kept groups.",
            source="AITER biased_grouped_topk_torch, the reference of its own tests",
            ids=(),
            case="tiny-negative",
            planted=_masked_with_zero,
        ),
        "nan-never-wins": Hazard(
            title="a row of NaN chooses expert 0 every time",
            story="Selection by comparison finds nothing to prefer, and each choice keeps its initial value: one "
            "expert k times, which a plan counts k times.",
            source="AITER biased_grouped_topk, generic path; aiter#4247",
            ids=("H24",),
            case="tiny-not-finite",
            planted=_nan_never_wins,
        ),
        "container": Hazard(
            title="bf16 information in an fp32 tensor",
            story="Asked for fp32 logits, a fallback multiplies in bf16 and casts. Dtypes, shapes and launches' names "
            "look right; the logits are as rough as before.",
            source="vLLM 0.33.0, GateLinear's last tier, which ROCm took; vllm#50268",
            ids=(),
            case="tiny",
            planted=_baseline,
        ),
    },
    predict=_predict,
    claims=records.published("router_dtype"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.experts.router_gemm",
        "dsv4ref.kernels.experts.routing",
        "dsv4ref.optimizations.router_dtype",
    ),
    kernels=_requests,
)
