"""Thin calls into AITER's decode kernels, with named buffers and checked shapes; `operators` has the other entries.

Three habits close the traps that the library leaves open. Every buffer travels by keyword, so the two orders of the
plan buffers cannot be mixed up. Every dtype, split count and layout switch is passed, so no default is met by accident.
And shapes are asked of the support matrix first, so that what has no kernel is refused with a reason before a launch.

All functions take the library as an argument: the genuine one and the emulation run through the same lines.

Source: ROCm/aiter at e4048607a, see `contract`. Hazards: H05, H10, H11, H12.
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
    "check_ragged",
    "fill_plan",
    "mla_decode",
    "mla_decode_v4_nm",
    "mla_decode_v40",
    "plan_sizes",
    "require",
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
    check_ragged(rows // query_length, qo_indptr, kv_indptr, kv_indices, q.device)
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
    check_ragged(rows // query_length, qo_indptr, kv_indptr, kv_indices, q.device)
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


def check_ragged(rows: int, qo_indptr: Tensor | None, kv_indptr: Tensor, kv_indices: Tensor, device: Any) -> None:
    """Check ragged lists: int32 ``[rows + 1]`` offsets and int32 entries, contiguous, on one device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, indptr in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
        if indptr is not None:
            check_tensor(name, indptr, dtype=torch.int32, shape=(rows + 1,), device=device, contiguous=True)
    check_tensor("kv_indices", kv_indices, dtype=torch.int32, shape=("entries",), device=device, contiguous=True)
