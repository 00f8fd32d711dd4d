"""Thin calls into AITER with named buffers and checked shapes: what the chapters use of it, and nothing else.

Three habits close the traps that the library leaves open. Every buffer travels by keyword, so the two orders of the
plan buffers cannot be mixed up. Every dtype, split count and layout switch is passed, so no default is met by accident.
And shapes are asked of the support matrix first, so that what has no kernel is refused with a reason before a launch.

All functions take the library as an argument: the genuine one and the emulation run through the same lines.

Source: ROCm/aiter at e4048607a, see `contract`. Hazards: H05, H10, H11, H12, H23.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4ref.device import native_dialect
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.kernels.aiter import support
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.plan import PLAN_ORDER, DecodeShape, PlanBuffers
from dsv4ref.kernels.checks import check_no_overlap, check_tensor

__all__ = [
    "UnsupportedError",
    "allocate_plan",
    "biased_grouped_topk",
    "fill_plan",
    "mla_decode",
    "mla_decode_v4_nm",
    "mla_decode_v40",
    "mqa_logits",
    "paged_mqa_logits",
    "plan_sizes",
    "require",
    "sparse_decode",
    "sparse_prefill",
    "topk_gating",
    "topk_rows_decode",
    "topk_rows_prefill",
]

_PACKED_DIM, _ROPE_DIM = 512, 64
_MAX_PACKED_ROWS = 2**23  # mla_decode_fwd_v4_nm multiplies rows in 24 bits (ROCm/aiter dc10015752)
_SHORTEST_SPLIT = 32  # its splits drop the tail below this many tokens


class UnsupportedError(ValueError):
    """AITER has no kernel for a call; `answer` holds the reason and the nearest supported choice."""

    def __init__(self, entry: str, answer: support.Answer) -> None:
        super().__init__(f"{entry}: {answer.reason}; nearest supported: {answer.nearest}")
        self.answer = answer


def require(
    library: Library, entry: str, *, heads: int, query_length: int, dtypes: tuple[str, str], persistent: bool, lse: bool
) -> support.Kernel:
    """The kernel that a call would run, from the support matrix.

    Raises:
        UnsupportedError: there is none; the message says why not, and what comes nearest.
    """
    answer = support.query(
        entry,
        arch=library.arch,
        heads=heads,
        query_length=query_length,
        q_dtype=dtypes[0],
        kv_dtype=dtypes[1],
        persistent=persistent,
        lse=lse,
    )
    if answer.kernel is None:
        raise UnsupportedError(entry, answer)
    return answer.kernel


# --- the persistent decode: plan, then run ---


@functools.lru_cache(maxsize=256)
def plan_sizes(library: Library, shape: DecodeShape) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each plan buffer, by name. They depend on the shape and the CUs, never on lengths.

    Raises:
        UnsupportedError: no persistent kernel for the shape.
        TypeError: fp8 of a dialect that the architecture's matrix units do not read.
    """
    _require_persistent(library, shape, lse=False)
    sizes = library.function("get_mla_metadata_info_v1")(
        batch_size=shape.rows,
        max_seqlen_qo=1,
        num_head_qo=shape.heads,
        q_dtype=shape.q_dtype,
        kv_dtype=shape.kv_dtype,
        is_sparse=shape.layout == "fixed",
        fast_mode=True,
        intra_batch_mode=False,
        max_split_per_batch=-1,
    )
    named = {}
    for name, (size, dtype) in zip(PLAN_ORDER, sizes, strict=True):
        named[name] = ((size,) if isinstance(size, int) else tuple(size), dtype)
    return MappingProxyType(named)


def allocate_plan(library: Library, shape: DecodeShape, device: torch.device) -> PlanBuffers:
    """Allocate the six plan buffers, uninitialised.

    Raises: as `plan_sizes`.
    """
    sizes = plan_sizes(library, shape)
    return PlanBuffers(**{name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()})


def fill_plan(
    library: Library,
    shape: DecodeShape,
    plan: PlanBuffers,
    *,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_last_page_lens: Tensor,
) -> None:
    """Plan the decode of the current lengths, in place. Needed after every change of ``kv_indptr``.

    Args:
        library, shape: as `plan_sizes`.
        plan: `allocate_plan`'s buffers for this shape.
        qo_indptr: int32 ``[T + 1]``, 0 to T: one query token a row.
        kv_indptr: int32 ``[T + 1]``, running sum of list lengths.
        kv_last_page_lens: int32 ``[T]``, all 1 with pages of one token.

    Raises:
        TypeError, ValueError: a buffer of another dtype, shape, device or layout.
    """
    _require_persistent(library, shape, lse=False)
    device = qo_indptr.device
    check_tensor("qo_indptr", qo_indptr, dtype=torch.int32, shape=(shape.rows + 1,), contiguous=True)
    _check_lengths(shape, kv_indptr, kv_last_page_lens, device)
    for name, (size, dtype) in plan_sizes(library, shape).items():
        buffer = plan.by_name()[name]
        check_tensor(f"plan.{name}", buffer, dtype=dtype, shape=size, device=device, contiguous=True)
    library.function("get_mla_metadata_v1")(
        seqlens_qo_indptr=qo_indptr,
        seqlens_kv_indptr=kv_indptr,
        kv_last_page_lens=kv_last_page_lens,
        num_heads_per_head_k=shape.heads,
        num_heads_k=1,
        is_causal=True,
        **plan.by_name(),
        page_size=1,
        kv_granularity=shape.kv_granularity,
        max_seqlen_qo=1,
        uni_seqlen_qo=1,
        fast_mode=True,
        topk=shape.planned_topk,
        max_split_per_batch=-1,
        intra_batch_mode=False,
        dtype_q=shape.q_dtype,
        dtype_kv=shape.kv_dtype,
    )


def mla_decode(
    library: Library,
    shape: DecodeShape,
    plan: PlanBuffers,
    *,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    sm_scale: float,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    return_lse: bool,
) -> Tensor | None:
    """Run the persistent decode over a filled plan. Rows without keys may be left unwritten: mask them (H12).

    Args:
        library, shape, plan: as `fill_plan`, which must have run on the current lengths.
        q: ``shape.q_dtype`` ``[T, H, dim]`` contiguous.
        kv: ``shape.kv_dtype`` ``[slots, 1, 1, dim]`` contiguous.
        out: bf16 ``[T, H, value_dim]`` contiguous, written in place.
        qo_indptr, kv_indptr, kv_last_page_lens: what the plan was filled from.
        kv_indices: int32 slots: ``[T * topk]`` for the fixed layout, any length for the ragged one.
        sm_scale: softmax scale.
        q_scale, kv_scale: fp32 ``[1]``, required for fp8.
        return_lse: ask for the LSE.

    Returns:
        Natural-log LSE, fp32 ``[T, H]``, allocated by AITER; None if not asked for.

    Raises:
        UnsupportedError: no such kernel, or none with an LSE.
        TypeError, ValueError: an argument of another dtype, shape, device or layout; ``out`` overlapping an input.
    """
    _require_persistent(library, shape, lse=return_lse)
    device = q.device
    check_tensor("q", q, dtype=shape.q_dtype, shape=(shape.rows, shape.heads, shape.dim), contiguous=True)
    check_tensor("kv", kv, dtype=shape.kv_dtype, shape=("slots", 1, 1, shape.dim), device=device, contiguous=True)
    size = (shape.rows, shape.heads, shape.value_dim)
    check_tensor("out", out, dtype=torch.bfloat16, shape=size, device=device, contiguous=True)
    check_no_overlap("out", out, "q", q)
    check_no_overlap("out", out, "kv", kv)
    check_tensor("qo_indptr", qo_indptr, dtype=torch.int32, shape=(shape.rows + 1,), device=device, contiguous=True)
    _check_lengths(shape, kv_indptr, kv_last_page_lens, device)
    entries = shape.rows * shape.topk if shape.layout == "fixed" else "entries"
    check_tensor("kv_indices", kv_indices, dtype=torch.int32, shape=(entries,), device=device, contiguous=True)
    scales = {"q_scale": q_scale, "kv_scale": kv_scale}
    for (name, scale), kind in zip(scales.items(), shape.dtype_names, strict=True):
        if kind == "fp8":
            check_tensor(name, scale, dtype=torch.float32, shape=(1,), device=device)
    buffers = plan.by_name()
    _, lse = library.function("mla_decode_fwd")(
        q=q,
        kv_buffer=kv,
        o=out,
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_lens=kv_last_page_lens,
        max_seqlen_q=1,
        page_size=1,
        nhead_kv=1,
        sm_scale=sm_scale,
        num_kv_splits=library.compute_units,  # None would let AITER leave the persistent path for some batches
        work_meta_data=buffers.pop("work_metadata_ptrs"),
        **buffers,
        **scales,
        return_lse=return_lse,
    )
    if return_lse and lse is None:
        raise RuntimeError(f"{library.name}: mla_decode_fwd returned no LSE, expected one for {shape}")
    result: Tensor | None = lse if return_lse else None
    return result


def _require_persistent(library: Library, shape: DecodeShape, *, lse: bool) -> None:
    require(library, "mla_decode_fwd", heads=shape.heads, query_length=1, dtypes=shape.dtype_names, persistent=True,
            lse=lse)  # fmt: skip
    native = Dialect.of(native_dialect(library.arch), argument=f"dialect of {library.arch}").dtype
    for name in ("q_dtype", "kv_dtype"):
        dtype = getattr(shape, name)
        if dtype not in (native, torch.bfloat16):
            raise TypeError(f"{name}: got {dtype}, expected {native}, the fp8 that {library.arch} reads, or bfloat16")


def _check_lengths(shape: DecodeShape, kv_indptr: Tensor, kv_last_page_lens: Tensor, device: torch.device) -> None:
    check_tensor("kv_indptr", kv_indptr, dtype=torch.int32, shape=(shape.rows + 1,), device=device, contiguous=True)
    check_tensor(
        "kv_last_page_lens", kv_last_page_lens, dtype=torch.int32, shape=(shape.rows,), device=device, contiguous=True
    )


# --- decode entries of DeepSeek-V4 ---


def mla_decode_v4_nm(
    library: Library,
    *,
    q: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    kv_rope: Tensor,
    out: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    sink: Tensor,
    query_length: int,
    num_kv_splits: int,
    shortest: int,
) -> None:
    """`mla_decode_fwd_v4_nm`: sink folded in, packed fp8 records beside bf16 rope, softmax scale fixed at 512 ** -0.5.

    Args:
        library: must be for gfx950.
        q, q_rope: fp8 ``[T, H, 512]`` (448 codes, 14 scale bytes, each twice, pad) and bf16 ``[T, H, 64]``.
        kv, kv_rope: fp8 ``[slots, 1, 1, 512]``, fewer than 2 ** 23 slots, and bf16 ``[slots, 1, 1, 64]``.
        out: bf16 ``[T, H, 512]``, written in place; with one split only because it is asked to (aiter#4311).
        qo_indptr, kv_indptr, kv_indices: int32, ragged.
        sink: fp32 ``[H]``; -inf for a head without one.
        query_length: tokens a sequence.
        num_kv_splits: 1, or so few that every split has at least 32 of ``shortest`` keys: a shorter one drops its tail.
        shortest: length of the shortest key list, from the host.

    Raises:
        UnsupportedError: no shipped variant for the heads, query length and architecture.
        TypeError, ValueError: as `mla_decode`; splits too short; too many slots.
    """
    rows, heads = q.shape[0], q.shape[1]
    require(library, "mla_decode_fwd_v4_nm", heads=heads, query_length=query_length, dtypes=("fp8+bf16", "fp8+bf16"),
            persistent=False, lse=False)  # fmt: skip
    if kv.shape[0] >= _MAX_PACKED_ROWS:
        raise ValueError(f"kv: got {kv.shape[0]} slots, expected fewer than {_MAX_PACKED_ROWS} (24-bit row offsets)")
    _check_packed(q, q_rope, kv, kv_rope, out)
    check_tensor("sink", sink, dtype=torch.float32, shape=(heads,), device=q.device, contiguous=True)
    if num_kv_splits < 1 or (num_kv_splits > 1 and shortest < _SHORTEST_SPLIT * num_kv_splits):
        raise ValueError(
            f"num_kv_splits: got {num_kv_splits} for lists of {shortest} keys and more, expected 1 or splits of at "
            f"least {_SHORTEST_SPLIT} keys"
        )
    _check_ragged(rows // query_length, qo_indptr, kv_indptr, kv_indices, q.device)
    library.function("mla_decode_fwd_v4_nm")(
        q=q, qrope=q_rope, kv_buffer=kv, kvrope=kv_rope, output=out, qo_indptr=qo_indptr, kv_indptr=kv_indptr,
        kv_page_indices=kv_indices, max_seqlen_q=query_length, sink=sink, num_kv_splits=num_kv_splits,
        out_16_nosplit=int(num_kv_splits == 1),  # by default one split leaves its result in fp32 and ``out`` unwritten
    )  # fmt: skip


def mla_decode_v40(
    library: Library,
    plan: PlanBuffers,
    *,
    q: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    kv_rope: Tensor,
    out: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    query_length: int,
    sm_scale: float,
    sink: Tensor | None,
    return_lse: bool,
) -> Tensor | None:
    """`mla_v40_decode_fwd`, experimental; its plan must be filled for ``MlaVersion.V40`` with fp8 nope and bf16 rope.

    Args: as `mla_decode_v4_nm`, and ``plan`` as `mla_decode`; ``sink`` fp32 ``[H]`` or None.

    Returns:
        LSE fp32 ``[T, H]``, or None if not asked for.

    Raises:
        UnsupportedError, TypeError, ValueError: as `mla_decode_v4_nm`.
        NotImplementedError: from AITER, where ``AITER_ENABLE_EXPERIMENTAL`` is not 1.
    """
    rows, heads = q.shape[0], q.shape[1]
    require(library, "mla_v40_decode_fwd", heads=heads, query_length=query_length, dtypes=("fp8+bf16", "fp8+bf16"),
            persistent=True, lse=return_lse)  # fmt: skip
    _check_packed(q, q_rope, kv, kv_rope, out)
    if sink is not None:
        check_tensor("sink", sink, dtype=torch.float32, shape=(heads,), device=q.device, contiguous=True)
    _check_ragged(rows // query_length, qo_indptr, kv_indptr, kv_indices, q.device)
    buffers = plan.by_name()
    buffers.pop("work_metadata_ptrs")
    _, lse = library.function("mla_v40_decode_fwd")(
        q=q, q_rope=q_rope, kv_buffer=kv, kv_buffer_rope=kv_rope, o=out, qo_indptr=qo_indptr, kv_indptr=kv_indptr,
        kv_indices=kv_indices, kv_last_page_lens=kv_last_page_lens, max_seqlen_q=query_length, **buffers,
        sm_scale=sm_scale, return_lse=return_lse, attn_sink=sink,
    )  # fmt: skip
    result: Tensor | None = lse
    return result


def _check_packed(q: Tensor, q_rope: Tensor, kv: Tensor, kv_rope: Tensor, out: Tensor) -> None:
    rows, heads = q.shape[0], q.shape[1]
    fp8 = Dialect.FN.dtype  # gfx950's
    slots = kv.shape[0]
    check_tensor("q", q, dtype=fp8, shape=(rows, heads, _PACKED_DIM), contiguous=True)
    check_tensor("q_rope", q_rope, dtype=torch.bfloat16, shape=(rows, heads, _ROPE_DIM), device=q.device)
    check_tensor("kv", kv, dtype=fp8, shape=("slots", 1, 1, _PACKED_DIM), device=q.device, contiguous=True)
    check_tensor("kv_rope", kv_rope, dtype=torch.bfloat16, shape=(slots, 1, 1, _ROPE_DIM), device=q.device)
    check_tensor("out", out, dtype=torch.bfloat16, shape=(rows, heads, _PACKED_DIM), device=q.device, contiguous=True)
    for name, tensor in (("q", q), ("q_rope", q_rope), ("kv", kv), ("kv_rope", kv_rope)):
        check_no_overlap("out", out, name, tensor)


def _check_ragged(rows: int, qo_indptr: Tensor | None, kv_indptr: Tensor, kv_indices: Tensor, device: Any) -> None:
    for name, indptr in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
        if indptr is not None:
            check_tensor(name, indptr, dtype=torch.int32, shape=(rows + 1,), device=device, contiguous=True)
    check_tensor("kv_indices", kv_indices, dtype=torch.int32, shape=("entries",), device=device, contiguous=True)


# --- sparse attention, logits and top-k in Triton and HIP ---


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
        UnsupportedError, TypeError, ValueError: as `mla_decode`.
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
    _check_ragged(rows, None, kv_indptr, kv_indices, q.device)
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
        TypeError: as `mla_decode`.
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
    _check_ragged(rows, None, kv_indptr, kv_indices, q.device)
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
