"""Thin calls into AITER's sparse attention, indexer logits, top-k and routing, checked as in `adapters`.

Source: ROCm/aiter at e4048607a, see `contract`. Hazards: H12, H23, H25, H30.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4ref.device import native_dialect
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.kernels.aiter.adapters import check_ragged, require
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.checks import check_tensor

__all__ = [
    "biased_grouped_topk",
    "mqa_logits",
    "paged_mqa_logits",
    "sparse_decode",
    "sparse_prefill",
    "topk_gating",
    "topk_rows_decode",
    "topk_rows_prefill",
]


def sparse_decode(
    library: Library,
    *,
    q: Tensor,
    pool: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    sink: Tensor,
    sm_scale: float,
    kv_scales: Tensor | None = None,
    kv_splits: int | None = None,
) -> Tensor:
    """`pa_decode_sparse` over one pool, with rows that have no keys set to zero: one split leaves them unwritten (H12).

    Args:
        library: any AMD architecture of the support matrix.
        q: bf16 ``[T, H, 512]``.
        pool: bf16 ``[slots, 512]``, or e4m3fnuz codes with ``kv_scales`` fp32 ``[slots, 8]``.
        kv_indices, kv_indptr: int32 ragged lists; -1 is skipped.
        sink: fp32 ``[H]``.
        sm_scale: softmax scale.
        kv_splits: None lets AITER choose.

    Returns:
        bf16 ``[T, H, 512]``, allocated by AITER.

    Raises:
        UnsupportedError, TypeError, ValueError: as `adapters.mla_decode`.
    """
    rows, heads = q.shape[0], q.shape[1]
    is_fp8 = kv_scales is not None
    require(library, "pa_decode_sparse", heads=heads, query_length=1, dtypes=("bf16", "fp8" if is_fp8 else "bf16"),
            persistent=False, lse=False)  # fmt: skip
    check_tensor("q", q, dtype=torch.bfloat16, shape=(rows, heads, 512), contiguous=True)
    held = Dialect.FNUZ.dtype if is_fp8 else torch.bfloat16
    check_tensor("pool", pool, dtype=held, shape=("slots", 512), device=q.device, contiguous=True)
    if kv_scales is not None:
        check_tensor("kv_scales", kv_scales, dtype=torch.float32, shape=(pool.shape[0], 8), device=q.device)
    check_tensor("sink", sink, dtype=torch.float32, shape=(heads,), device=q.device, contiguous=True)
    check_ragged(rows, None, kv_indptr, kv_indices, q.device)
    out: Tensor = library.function("pa_decode_sparse")(
        q=q, unified_kv=pool, kv_indices=kv_indices, kv_indptr=kv_indptr, attn_sink=sink, softmax_scale=sm_scale,
        kv_scales=kv_scales, kv_splits=kv_splits, has_invalid=True, skip_reduce=False,
    )  # fmt: skip
    empty = kv_indptr[1:] == kv_indptr[:-1]
    return out.masked_fill_(empty[:, None, None], 0.0)


def sparse_prefill(
    library: Library, *, q: Tensor, pool: Tensor, kv_indices: Tensor, kv_indptr: Tensor, sink: Tensor, sm_scale: float
) -> Tensor:
    """`pa_prefill_sparse` over one pool; the form with a second source exists on gfx1250 only and is not offered.

    Args: as `sparse_decode`.

    Returns:
        ``[T, H, 512]``, allocated by AITER.

    Raises:
        ValueError: on gfx942, where e4048607a evaluates the sink's truth value (an error for more than one head).
        TypeError: as `adapters.mla_decode`.
    """
    if library.arch == "gfx942":
        raise ValueError(
            "library: pa_prefill_sparse cannot take a sink on gfx942 at e4048607a (it evaluates `attn_sink or ...`), "
            "expected gfx950"
        )
    rows, heads = q.shape[0], q.shape[1]
    check_tensor("q", q, dtype=torch.bfloat16, shape=(rows, heads, 512), contiguous=True)
    check_tensor("pool", pool, dtype=torch.bfloat16, shape=("slots", 512), device=q.device, contiguous=True)
    check_tensor("sink", sink, dtype=torch.float32, shape=(heads,), device=q.device, contiguous=True)
    check_ragged(rows, None, kv_indptr, kv_indices, q.device)
    out: Tensor = library.function("pa_prefill_sparse")(
        q=q, unified_kv=pool, kv_indices_prefix=kv_indices, kv_indptr_prefix=kv_indptr, kv=None,
        kv_indices_extend=None, kv_indptr_extend=None, attn_sink=sink, softmax_scale=sm_scale, has_invalid=True,
    )  # fmt: skip
    return out


def mqa_logits(
    library: Library, *, q: Tensor, k: Tensor, k_scales: Tensor, weights: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """`fp8_mqa_logits`: the indexer's logits of unpaged keys.

    Args:
        q: fp8 ``[S, H, D]``, H and D powers of two.
        k: fp8 ``[N, D]``; ``k_scales`` fp32 ``[N]``.
        weights: fp32 ``[S, H]``.
        starts, ends: int32 ``[S]``, the keys each query may see.

    Returns:
        fp32 ``[S, N]``, -inf outside ``[start, end)``.

    Raises:
        TypeError, ValueError: another dtype, shape or device; H or D no power of two.
    """
    queries, heads, dim = q.shape
    fp8 = Dialect.of(native_dialect(library.arch), argument=f"dialect of {library.arch}").dtype
    if heads & (heads - 1) or dim & (dim - 1):
        raise ValueError(f"q: got {heads} heads of {dim} dims, expected powers of two")
    check_tensor("q", q, dtype=fp8, shape=(queries, heads, dim), contiguous=True)
    check_tensor("k", k, dtype=fp8, shape=("N", dim), device=q.device, contiguous=True)
    check_tensor("k_scales", k_scales, dtype=torch.float32, shape=(k.shape[0],), device=q.device)
    check_tensor("weights", weights, dtype=torch.float32, shape=(queries, heads), device=q.device)
    for name, bound in (("starts", starts), ("ends", ends)):
        check_tensor(name, bound, dtype=torch.int32, shape=(queries,), device=q.device)
    logits: Tensor = library.function("fp8_mqa_logits")(
        Q=q, KV=k, kv_scales=k_scales, weights=weights, cu_starts=starts, cu_ends=ends, clean_logits=True
    )
    return logits


def paged_mqa_logits(
    library: Library,
    *,
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    out: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_length: int,
    block_size: int,
) -> None:
    """`deepgemm_fp8_paged_mqa_logits`, not preshuffled. A block holds all its codes first, then all its scales (H30).

    Args:
        q: fp8 ``[B, next_n, H, D]``.
        cache: uint8 ``[blocks, block_size, 1, D + 4]``.
        weights: fp32 ``[B * next_n, H]``.
        out: fp32 ``[B * next_n, max_length]``, written in place up to each context; fill it with -inf first.
        context_lens: int32 ``[B]``.
        block_table: int32 ``[B, blocks per sequence]``.
        max_length: the longest context.
        block_size: tokens a block.

    Raises:
        TypeError, ValueError: another dtype, shape or device.
    """
    batch, next_n, heads, dim = q.shape
    fp8 = Dialect.of(native_dialect(library.arch), argument=f"dialect of {library.arch}").dtype
    check_tensor("q", q, dtype=fp8, shape=(batch, next_n, heads, dim), contiguous=True)
    check_tensor("cache", cache, dtype=torch.uint8, shape=("blocks", block_size, 1, dim + 4), device=q.device)
    check_tensor("weights", weights, dtype=torch.float32, shape=(batch * next_n, heads), device=q.device)
    check_tensor("out", out, dtype=torch.float32, shape=(batch * next_n, max_length), device=q.device, contiguous=True)
    check_tensor("context_lens", context_lens, dtype=torch.int32, shape=(batch,), device=q.device)
    check_tensor("block_table", block_table, dtype=torch.int32, shape=(batch, "blocks"), device=q.device)
    library.function("deepgemm_fp8_paged_mqa_logits")(
        q_fp8=q, kv_cache=cache, weights=weights, out_logits=out, context_lens=context_lens, kv_indices=block_table,
        max_model_len=max_length, Preshuffle=False, KVBlockSize=block_size,
    )  # fmt: skip


def topk_rows_prefill(
    library: Library,
    *,
    logits: Tensor,
    starts: Tensor,
    ends: Tensor,
    indices: Tensor,
    values: Tensor,
    k: int,
    stable: bool,
) -> None:
    """`top_k_per_row_prefill`. Without ``stable``, ties fall differently from run to run (H25).

    Args:
        logits: fp32 ``[rows, N]``.
        starts, ends: int32 ``[rows]``.
        indices, values: int32 and fp32 ``[rows, k]``, written in place.
        k, stable: how many, and whether ties have an order.

    Raises:
        TypeError, ValueError: another dtype, shape or device.
    """
    rows = logits.shape[0]
    _check_topk(logits, indices, k)
    check_tensor("values", values, dtype=torch.float32, shape=(rows, k), device=logits.device, contiguous=True)
    for name, bound in (("starts", starts), ("ends", ends)):
        check_tensor(name, bound, dtype=torch.int32, shape=(rows,), device=logits.device)
    library.function("top_k_per_row_prefill")(
        logits=logits, rowStarts=starts, rowEnds=ends, indices=indices, values=values, **_rows_of(logits), k=k,
        stable=stable,
    )  # fmt: skip


def topk_rows_decode(
    library: Library, *, logits: Tensor, lengths: Tensor, indices: Tensor, next_n: int, k: int, stable: bool
) -> None:
    """`top_k_per_row_decode`.

    Args: as `topk_rows_prefill`; ``lengths`` int32 ``[rows / next_n]``, ``next_n`` query tokens a sequence.
    """
    _check_topk(logits, indices, k)
    sequences = logits.shape[0] // next_n
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(sequences,), device=logits.device)
    library.function("top_k_per_row_decode")(
        logits=logits, next_n=next_n, seqLens=lengths, indices=indices, **_rows_of(logits), k=k, stable=stable
    )


def _check_topk(logits: Tensor, indices: Tensor, k: int) -> None:
    check_tensor("logits", logits, dtype=torch.float32, shape=("rows", "N"))
    check_tensor("indices", indices, dtype=torch.int32, shape=(logits.shape[0], k), device=logits.device)


def _rows_of(logits: Tensor) -> Mapping[str, int]:
    return {"numRows": logits.shape[0], "stride0": logits.stride(0), "stride1": logits.stride(1)}


# --- routing ---


def biased_grouped_topk(
    library: Library,
    *,
    logits: Tensor,
    bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    groups: int,
    topk_groups: int,
    renormalise: bool,
    scale: float,
) -> None:
    """`biased_grouped_topk`. It reads the bias in the logits' dtype unchecked, so equal dtypes are required (H23).

    Args:
        logits: fp32, fp16 or bf16 ``[T, E]``.
        bias: the same dtype, ``[E]``.
        weights, ids: fp32 and int32 ``[T, topk]``, written in place.
        groups, topk_groups: 1, 2, 4 or 8 expert groups, and how many of them a token may use.
        renormalise, scale: what happens to the weights.

    Raises:
        TypeError, ValueError: another dtype, shape or device; an unsupported number of groups.
    """
    if groups not in (1, 2, 4, 8):
        raise ValueError(f"groups: got {groups}, expected 1, 2, 4 or 8")
    _check_routing(logits, weights, ids)
    check_tensor("bias", bias, dtype=logits.dtype, shape=(logits.shape[1],), device=logits.device, contiguous=True)
    library.function("biased_grouped_topk")(
        gating_output=logits, correction_bias=bias, topk_weights=weights, topk_ids=ids, num_expert_group=groups,
        topk_group=topk_groups, need_renorm=renormalise, routed_scaling_factor=scale,
    )  # fmt: skip


def topk_gating(
    library: Library,
    *,
    logits: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    renormalise: bool,
    scale: float,
    score: str,
) -> None:
    """`topk_gating`, DeepSeek-V4's router with ``score="sqrtsoftplus"``.

    Args: as `biased_grouped_topk`; ``bias`` fp32, or bf16 unless the logits are fp16, or None.

    Raises:
        TypeError, ValueError: as `biased_grouped_topk`; another score function.
    """
    if score not in ("sqrtsoftplus", "sigmoid", "softmax"):
        raise ValueError(f"score: got {score!r}, expected 'sqrtsoftplus', 'sigmoid' or 'softmax'")
    _check_routing(logits, weights, ids)
    if bias is not None:
        wanted = torch.bfloat16 if bias.dtype is torch.bfloat16 and logits.dtype is not torch.float16 else torch.float32
        check_tensor("bias", bias, dtype=wanted, shape=(logits.shape[1],), device=logits.device, contiguous=True)
    library.function("topk_gating")(
        topk_weights=weights, topk_indices=ids, gating_output=logits, correction_bias=bias, need_renorm=renormalise,
        routed_scaling_factor=scale, score_func=score,
    )  # fmt: skip


def _check_routing(logits: Tensor, weights: Tensor, ids: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"logits: got {logits.dtype}, expected float32, float16 or bfloat16")
    check_tensor("logits", logits, dtype=logits.dtype, shape=("T", "E"), contiguous=True)
    shape = (logits.shape[0], "topk")
    check_tensor("weights", weights, dtype=torch.float32, shape=shape, device=logits.device, contiguous=True)
    check_tensor(
        "ids", ids, dtype=torch.int32, shape=(logits.shape[0], weights.shape[1]), device=logits.device, contiguous=True
    )
