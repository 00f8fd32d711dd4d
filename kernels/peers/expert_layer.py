"""triton_kernels (of Triton's repository) for the expert layer: its own package, or the copy inside vLLM's wheel.

Two matmul_ogs over MXFP4 weights in the layout that it prefers on this GPU, as vLLM calls them. Its SwiGLU takes gate
and up interleaved and adds 1 to up, which is another function, so this project's activation kernel runs between them.

Source of the calls: triton_kernels ``matmul_ogs.py`` and ``routing.py`` in vLLM 0.22; vLLM ``mxfp4_utils.py`` (the
weights' layout).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dsv4ref.kernels.experts import DispatchPlan, Mxfp4Weights
from dsv4ref.kernels.experts.separate import activate_rows
from dsv4ref.kernels.peers.agreement import check_agreement, described

__all__ = ["TRITON_KERNELS", "triton_kernels_layer", "triton_kernels_note"]

TRITON_KERNELS = "triton_kernels, our activation"
"""What the expert layer's peer is called."""

_VENDORED = "vllm.third_party.triton_kernels"
_SWIZZLED_N, _SWIZZLED_K = 256, 128
"""Columns of its tile at 8 warps, and its step along K: what its Hopper layout comes in."""


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The package, with matmul_ogs loaded; None if there is none, or only another one of that name."""
    try:
        found = importlib.import_module("triton_kernels")
    except (ImportError, OSError):
        try:
            found = importlib.import_module(_VENDORED)
        except (ImportError, OSError):
            return None
        # Its modules import each other by the bare name.
        sys.modules["triton_kernels"] = found
    try:
        for part in ("matmul_ogs", "routing", "tensor", "tensor_details.layout"):
            importlib.import_module(f"triton_kernels.{part}")
    except (ImportError, OSError):
        if found.__name__ == _VENDORED:
            del sys.modules["triton_kernels"]
        return None
    return found


def triton_kernels_note() -> str | None:
    """Which triton_kernels is importable, e.g. "vllm.third_party.triton_kernels (vllm 0.22.0)"; None if none is."""
    module = _triton_kernels()
    return None if module is None else described(module.__name__)


def triton_kernels_layer(
    x: Tensor,
    w1: Mxfp4Weights,
    w2: Mxfp4Weights,
    route_weights: Tensor,
    plan: DispatchPlan,
    *,
    limit: float | None,
    ours: Callable[[], Tensor],
) -> Callable[[], Tensor] | None:
    """triton_kernels' expert GEMMs and sum, this project's activation between them, bound to one set of inputs.

    The weights are copied into its layout. It picks tiles itself, by all slots over the local experts, as under vLLM.

    Args:
        x: bf16 ``[M, D]`` contiguous.
        w1: ``[E, 2 I, D]``, the gate's rows, then up's.
        w2: ``[E, D, I]``.
        route_weights: fp32 ``[M, k]``.
        plan: routing data of the batch, for any tile height.
        limit: of the activation's clamp.
        ours: gives this project's result, bf16 ``[M, D]``, which one call of the peer is checked against here.

    Returns:
        A callable that runs the kernels and returns bf16 ``[M, D]``; None without an NVIDIA GPU, the package or rows,
        and for weights that its tiles do not divide.

    Raises:
        RuntimeError: the two results are farther apart than rounding explains.
    """
    if not x.is_cuda or torch.version.hip is not None or not x.shape[0] or _triton_kernels() is None:
        return None
    if any(w.n % _SWIZZLED_N or w.k % _SWIZZLED_K for w in (w1, w2)):
        return None
    matmul = importlib.import_module("triton_kernels.matmul_ogs")
    (first, first_config), (second, second_config) = (_in_their_layout(w) for w in (w1, w2))
    routed, gather, scatter, scales = _their_routing(route_weights, plan)

    def run() -> Tensor:
        gate_up = matmul.matmul_ogs(x, first, None, routed, gather_indx=gather, precision_config=first_config)
        found: Tensor = matmul.matmul_ogs(
            activate_rows(gate_up, limit), second, None, routed, scatter_indx=scatter, precision_config=second_config,
            gammas=scales,
        )  # fmt: skip
        return found

    check_agreement(run(), ours())
    return run


def _in_their_layout(weights: Mxfp4Weights) -> tuple[object, object]:
    """Codes as ``[E, K, N]``, swizzled as the package wants them on this GPU, and a configuration with the scales."""
    tensor, layout, matmul = (
        importlib.import_module(f"triton_kernels.{part}") for part in ("tensor", "tensor_details.layout", "matmul_ogs")
    )
    codes = tensor.wrap_torch_tensor(weights.packed.transpose(1, 2), dtype=tensor.FP4)
    scales = tensor.wrap_torch_tensor(weights.scales.transpose(1, 2))
    to_codes, code_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    to_scales, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    swizzled = tensor.convert_layout(scales, to_scales, **scale_options)
    config = matmul.PrecisionConfig(weight_scale=swizzled, out_dtype=torch.bfloat16)
    return tensor.convert_layout(codes, to_codes, **code_options), config


def _their_routing(route_weights: Tensor, plan: DispatchPlan) -> tuple[object, object, object, Tensor]:
    """A plan in the package's terms, and the router weights by sorted position: the same two permutations."""
    routing = importlib.import_module("triton_kernels.routing")
    slots, experts = plan.gather.numel(), plan.histogram.numel()
    scales = route_weights.flatten()[plan.gather.clamp(min=0).long()]
    blocks = routing.compute_expt_data(plan.histogram, experts, slots)
    routed = routing.RoutingData(scales, plan.histogram, experts, plan.local.shape[1], blocks)
    gather = routing.GatherIndx(src_indx=plan.gather, dst_indx=plan.scatter)
    return routed, gather, routing.ScatterIndx(src_indx=plan.scatter, dst_indx=plan.gather), scales
