"""FlashMLA (hand-written CUDA for sm_90 and sm_100): DeepSeek's ``flash_mla`` package, or the copy inside vLLM's wheel.

Both of its sparse kernels take index lists of equal width, so a peer exists only for inputs whose rows are all full, of
64 heads or 128. Decode reads the 584-byte caches in tiles of 64 keys, prefill a bf16 workspace in tiles of 128.

Source of the calls: FlashMLA ``flash_mla_interface.py``: ``flash_mla_with_kvcache`` (sparse mode, 584-byte layout) and
``flash_mla_sparse_fwd``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.peers.agreement import check_agreement, described

__all__ = ["FLASHMLA", "FLASHMLA_PREFILL", "flashmla_decode", "flashmla_note", "flashmla_prefill"]

FLASHMLA = "FlashMLA"
"""What the decode's peer is called."""
FLASHMLA_PREFILL = "FlashMLA prefill"
"""What the prefill's peer is called."""

_HOMES = ("flash_mla.flash_mla_interface", "vllm.third_party.flashmla.flash_mla_interface")
_HEADS = (64, 128)
_INDEX_TILE = 64
_PREFILL_INDEX_TILE = 128


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
    return None if module is None else described(module.__name__.removesuffix(".flash_mla_interface"))


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
    if module is None or not q.is_cuda or torch.version.hip is not None or q.shape[1] not in _HEADS:
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


def flashmla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    sink: Tensor,
    scale: float,
    out: Tensor,
    ours: Callable[[], Tensor],
) -> Callable[[], Tensor] | None:
    """FlashMLA's sparse prefill bound to one set of inputs. It also writes maxima and LSEs, into tensors of its own.

    Args:
        q: bf16 ``[T, H, 512]`` contiguous on a Hopper or Blackwell GPU, H 64 or 128, T at least 1.
        kv: bf16 ``[N, 512]`` contiguous, key and value at once.
        indices: int32 ``[T, W]`` contiguous, rows of ``kv``; W a multiple of 128.
        sink: fp32 ``[H]``.
        scale: softmax scale.
        out: bf16 ``[T, H, 512]`` contiguous, written by each call.
        ours: gives this project's result, bf16 ``[T, H, 512]``, which one call of the peer is checked against here.

    Returns:
        A callable that runs the kernel and returns ``out``; None if FlashMLA is missing or does not support the call.

    Raises:
        RuntimeError: the two results are farther apart than rounding explains.
    """
    module = _flashmla()
    if module is None or not q.is_cuda or torch.version.hip is not None or q.shape[1] not in _HEADS:
        return None
    if not q.shape[0] or not indices.shape[1] or indices.shape[1] % _PREFILL_INDEX_TILE:
        return None

    def run() -> Tensor:
        module.flash_mla_sparse_fwd(
            q=q,
            kv=kv.unsqueeze(1),
            indices=indices.unsqueeze(1),
            sm_scale=scale,
            d_v=HEAD_DIM,
            attn_sink=sink,
            out=out,
        )
        return out

    check_agreement(run(), ours())
    return run
