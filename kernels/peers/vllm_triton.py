"""vLLM's split-K sparse decode: Triton for MI300X, over the same 584-byte caches, for any number of heads.

The module that holds it is imported from an installed vLLM 0.33, or as ``vllm_rocm_sparse.rocm_aiter_mla_sparse``: that
one file of the wheel, alone in a package of that name. Alone, what it imports from vLLM is stood in for, none of which
the decode calls but the question whether the platform's FP8 is fnuz.

It splits on gfx942 and gfx950 only and takes a single pass elsewhere; called here, it takes gfx942's path with its own
split heuristic, fed the SM count of this GPU, and both caches in the OCP dialect.

Source of the call: vLLM 0.33 ``v1/attention/ops/rocm_aiter_mla_sparse.py``, ``_rocm_sparse_attn_decode_ragged_triton``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import NOPE_DIM, ROPE_DIM
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.peers.agreement import check_agreement, described

__all__ = ["VLLM_TRITON", "vllm_note", "vllm_sparse_decode"]

VLLM_TRITON = "vLLM Triton split-K"
"""What the decode's peer is called."""

_INSTALLED = "vllm.v1.attention.ops.rocm_aiter_mla_sparse"
_ALONE = "vllm_rocm_sparse.rocm_aiter_mla_sparse"
_SPLIT_KERNEL = "_sparse_attn_decode_partial_kernel"  # vLLM 0.22 has the module, and no split in it


@functools.cache
def _module() -> ModuleType | None:
    for home, stands_in in ((_INSTALLED, contextlib.nullcontext), (_ALONE, _standing_in_for_vllm)):
        try:
            with stands_in():
                found = importlib.import_module(home)
        except (ImportError, OSError):  # OSError: built against another torch
            continue
        if hasattr(found, _SPLIT_KERNEL):
            return found
    return None


@contextlib.contextmanager
def _standing_in_for_vllm() -> Iterator[None]:
    """What the file imports from its package, in sys.modules for as long as the file is imported."""
    unused = object()
    platform = SimpleNamespace(
        is_rocm=lambda: False, is_fp8_fnuz=lambda: False, fp8_dtype=lambda: torch.float8_e4m3fn
    )  # fmt: skip
    held: dict[str, dict[str, Any]] = {
        "": {"envs": ModuleType("vllm.envs")},
        ".envs": {},
        ".compilation.breakable_cudagraph": {"eager_break_during_capture": lambda function: function},
        ".config": {"CUDAGraphMode": unused, "get_current_vllm_config": unused},
        ".forward_context": {"get_forward_context": unused},
        ".logger": {"init_logger": logging.getLogger},
        ".platforms": {"current_platform": platform},
        ".triton_utils": {"tl": tl, "triton": triton},
        ".utils.torch_utils": {"LayerNameType": str, "direct_register_custom_op": lambda *args, **kwargs: None},
        ".v1.attention.backends.mla.indexer": {"DeepseekV32IndexerMetadata": unused},
        ".v1.attention.ops.common": {"pack_seq_triton": unused, "unpack_seq_triton": unused},
        ".v1.worker.workspace": {"current_workspace_manager": unused},
    }
    names = [f"vllm{name}" for name in held]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    for name, attributes in zip(names, held.values(), strict=True):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def vllm_note() -> str | None:
    """Where vLLM's Triton decode comes from, with the version; None if it is not here."""
    module = _module()
    return None if module is None else described(module.__name__)


def vllm_sparse_decode(
    q: Tensor,
    swa: Scope,
    extra: Scope | None,
    *,
    sink: Tensor,
    scale: float,
    out: Tensor,
    ours: Callable[[], Tensor],
) -> Callable[[], Tensor] | None:
    """vLLM's split-K sparse decode bound to one set of inputs: two launches, whatever the split count.

    Args:
        q: bf16 ``[T, H, 512]`` on an NVIDIA GPU, T at least 1.
        swa, extra: scopes of any row lengths, in OCP caches.
        sink: fp32 ``[H]``.
        scale: softmax scale.
        out: bf16 ``[T, H, 512]``, written by each call. The parts are allocated by each call.
        ours: gives this project's result, bf16 ``[T, H, 512]``, which one call of the peer is checked against here.

    Returns:
        A callable that runs the kernels and returns ``out``; None if the module is missing or does not support the
        call.

    Raises:
        RuntimeError: the two results are farther apart than rounding explains.
    """
    module = _module()
    if module is None or not q.is_cuda or torch.version.hip is not None or not q.shape[0]:
        return None
    if any(s.cache.dialect is not Dialect.FN for s in (swa, extra) if s is not None):
        return None
    second = {}
    if extra is not None:
        second = {
            "extra_cache": extra.cache.data, "extra_indices": extra.indices, "extra_indptr": extra.indptr
        }  # fmt: skip

    def run() -> Tensor:
        with _as_on_gfx942(module):
            found: Tensor = module._rocm_sparse_attn_decode_ragged_triton(
                q=q,
                main_cache=swa.cache.data,
                main_indices=swa.indices,
                main_indptr=swa.indptr,
                scale=scale,
                attn_sink=sink,
                nope_head_dim=NOPE_DIM,
                rope_head_dim=ROPE_DIM,
                out=out,
                **second,
            )
        return found

    check_agreement(run(), ours())
    return run


@contextlib.contextmanager
def _as_on_gfx942(module: Any) -> Iterator[None]:
    """Elsewhere the module's entry takes a single pass."""
    before = module._ON_GFX942
    module._ON_GFX942 = True
    try:
        yield
    finally:
        module._ON_GFX942 = before
