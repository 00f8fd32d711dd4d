"""Other people's kernels for the same operation, used where they are installed and never required.

FlashMLA (hand-written CUDA for sm_90 and sm_100): DeepSeek's ``flash_mla`` package, or the copy inside vLLM's wheel.
Its decode takes dense index lists of equal width, so a peer exists only for inputs whose rows are all full.

triton_kernels (of Triton's repository): its own package, or the copy inside vLLM's wheel. Two matmul_ogs over MXFP4
weights in the layout that it prefers on this GPU, as vLLM calls them. Its SwiGLU takes gate and up interleaved and adds
1 to up, which is another function, so this project's activation kernel runs between them.

Source of the calls: FlashMLA ``flash_mla_interface.py`` (``flash_mla_with_kvcache``, sparse mode, 584-byte layout);
triton_kernels ``matmul_ogs.py`` and ``routing.py`` in vLLM 0.22; vLLM ``mxfp4_utils.py`` (the weights' layout).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.experts import DispatchPlan, Mxfp4Weights
from dsv4ref.kernels.experts.separate import activate_rows

__all__ = [
    "TRITON_KERNELS",
    "flashmla_decode",
    "flashmla_note",
    "note",
    "triton_kernels_layer",
    "triton_kernels_note",
]

TRITON_KERNELS = "triton_kernels, our activation"
"""What the expert layer's peer is called."""

_HOMES = ("flash_mla.flash_mla_interface", "vllm.third_party.flashmla.flash_mla_interface")
_INDEX_TILE = 64
_VENDORED = "vllm.third_party.triton_kernels"
_SWIZZLED_N, _SWIZZLED_K = 256, 128
"""Columns of its tile at 8 warps, and its step along K: what its Hopper layout comes in."""
_AGREEMENT = 3e-2
"""Largest norm of the difference to this project's result, over that result's norm. A wrong layout gives about 1."""


@functools.cache
def _flashmla() -> ModuleType | None:
    for home in _HOMES:
        try:
            return importlib.import_module(home)
        except (ImportError, OSError):  # OSError: built against another torch
            continue
    return None


def flashmla_note() -> str | None:
    """Which FlashMLA is importable, e.g. "vllm.third_party.flashmla (vllm 0.22.0)"; None if there is none."""
    module = _flashmla()
    return None if module is None else _described(module.__name__.removesuffix(".flash_mla_interface"))


def _described(home: str) -> str:
    package = home.split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return f"{home} ({package} {version})"


def note(variant: str) -> str | None:
    """Which package a variant of a measurement calls, with its version; None if it is not here.

    Args:
        variant: its name without the prefix, "FlashMLA" or `TRITON_KERNELS`.
    """
    return triton_kernels_note() if variant == TRITON_KERNELS else flashmla_note()


def flashmla_decode(
    q: Tensor, swa: Scope, extra: Scope | None, *, sink: Tensor, scale: float, out: Tensor
) -> Callable[[], Tensor] | None:
    """FlashMLA's sparse decode bound to one set of inputs.

    Args:
        q: bf16 ``[T, H, 512]`` contiguous on a Hopper or Blackwell GPU, H 64 or 128.
        swa, extra: scopes whose rows all hold exactly ``width`` slots, a multiple of 64, in OCP caches.
        sink: fp32 ``[H]``.
        scale: softmax scale.
        out: bf16 ``[T, H, 512]`` contiguous, written by each call.

    Returns:
        A callable that runs the kernel and returns ``out``; None if FlashMLA is missing or does not support the call.
    """
    module = _flashmla()
    scopes = [scope for scope in (swa, extra) if scope is not None]
    if module is None or not q.is_cuda or torch.version.hip is not None or q.shape[1] not in (64, 128):
        return None
    if any(s.cache.dialect is not Dialect.FN or s.width % _INDEX_TILE or not _rows_are_full(s) for s in scopes):
        return None
    rows = q.shape[0]
    caches = [scope.cache.data.unsqueeze(2) for scope in scopes]  # [blocks, bs, 1, 584]
    lists = [scope.indices.view(rows, 1, scope.width) for scope in scopes]
    # Made by the first call and valid while shapes and lengths stay the same, which they do for bound inputs.
    plan, _ = module.get_mla_metadata()

    def run() -> Tensor:
        module.flash_mla_with_kvcache(
            q=q.unsqueeze(1),
            k_cache=caches[0],
            block_table=None,
            cache_seqlens=None,
            head_dim_v=HEAD_DIM,
            tile_scheduler_metadata=plan,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=lists[0],
            attn_sink=sink,
            extra_k_cache=caches[1] if extra is not None else None,
            extra_indices_in_kvcache=lists[1] if extra is not None else None,
            out=out.unsqueeze(1),
        )
        return out

    return run


def _rows_are_full(scope: Scope) -> bool:
    lengths = scope.indptr[1:] - scope.indptr[:-1]
    return scope.num_queries > 0 and bool((lengths == scope.width).all())


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
    return None if module is None else _described(module.__name__)


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

    _check_agreement(run(), ours())
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


def _check_agreement(found: Tensor, expected: Tensor) -> None:
    """Refuse a peer that computes something else: its time would mean nothing."""
    if found.shape != expected.shape:
        raise RuntimeError(f"peer: result {tuple(found.shape)}, expected {tuple(expected.shape)}")
    theirs, ours = found.to(torch.float32), expected.to(torch.float32)
    error, size = float((theirs - ours).norm()), float(ours.norm())
    if not error <= _AGREEMENT * size:  # NaN is no agreement
        raise RuntimeError(f"peer: differs from our result by {error:.3g} of {size:.3g}, expected {_AGREEMENT:g} of it")
