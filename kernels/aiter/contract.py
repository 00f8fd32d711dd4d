"""The signatures that the adapters were written for, as data, and a comparison with an installed AITER.

AITER changes its signatures between releases, and vLLM detects features by inspecting them. `CONTRACT` holds what was
read at one commit; `compare` says what a library has that is different, so that a mismatch is a list of names before it
is a fault in a kernel.

Source: ROCm/aiter at e4048607a; each signature names its file.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["CONTRACT", "Difference", "Signature", "compare", "find"]


@dataclass(frozen=True)
class Signature:
    """One function's expected signature.

    Args:
        entry: the function's name.
        module: where it is imported from.
        text: its parameters with their defaults, as Python source.
        file: where in ROCm/aiter it was read.
        writes: arguments that it fills in place.
    """

    entry: str
    module: str
    text: str
    file: str
    writes: tuple[str, ...] = ()

    def parameters(self) -> dict[str, tuple[str, str | None]]:
        """Name -> (kind, default as source, None if required), in order."""
        function = ast.parse(f"def f({self.text}): ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        given = function.args
        required = len(given.args) - len(given.defaults)
        found: dict[str, tuple[str, str | None]] = {}
        for index, argument in enumerate(given.args):
            default = given.defaults[index - required] if index >= required else None
            found[argument.arg] = ("positional", None if default is None else ast.unparse(default))
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            found[argument.arg] = ("keyword", None if default is None else ast.unparse(default))
        return found


_PLAN = "work_metadata_ptrs, work_info_set, work_indptr, reduce_indptr, reduce_final_map, reduce_partial_map"

_SIGNATURES = (
    Signature(
        "get_mla_metadata_info_v1",
        "aiter",
        "batch_size, max_seqlen_qo, num_head_qo, q_dtype, kv_dtype, is_sparse, fast_mode=True, num_kv_splits=32, "
        "intra_batch_mode=False, max_split_per_batch=-1",
        "aiter/ops/attention.py:1136",
    ),
    Signature(
        "get_mla_metadata_v1",
        "aiter",
        "seqlens_qo_indptr, seqlens_kv_indptr, kv_last_page_lens, num_heads_per_head_k, num_heads_k, is_causal, "
        f"{_PLAN}, page_size=1, kv_granularity=16, max_seqlen_qo=-1, uni_seqlen_qo=-1, fast_mode=True, topk=-1, "
        "max_split_per_batch=-1, intra_batch_mode=False, is_cp_round_robin=False, mla_version=MlaVersion.V32, "
        "dtype_q_nope=None, dtype_q_rope=None, dtype_kv_nope=None, dtype_kv_rope=None, dtype_q=None, dtype_kv=None",
        "aiter/ops/attention.py:1362",
        tuple(_PLAN.split(", ")),
    ),
    Signature(
        "mla_decode_fwd",
        "aiter.mla",
        "q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q, page_size=1, nhead_kv=1, "
        "sm_scale=None, logit_cap=0.0, num_kv_splits=None, num_kv_splits_indptr=None, work_meta_data=None, "
        "work_indptr=None, work_info_set=None, reduce_indptr=None, reduce_final_map=None, reduce_partial_map=None, "
        "q_scale=None, kv_scale=None, intra_batch_mode=False, return_logits=False, return_lse=False, g_kv_indptr=None, "
        "cp_world_size=1, cp_rank=0, causal=True",
        "aiter/mla.py:523",
        ("o",),
    ),
    Signature(
        "mla_decode_fwd_v4_nm",
        "aiter.mla",
        "q, qrope, kv_buffer, kvrope, output, qo_indptr, kv_indptr, kv_page_indices, max_seqlen_q, *, sink, "
        "split_indptr=None, sm_scale=None, out_16_nosplit=0, num_kv_splits=None, logits=None, attn_lse=None, "
        "kv_last_page_lens=None",
        "aiter/mla.py:1579",
        ("output",),
    ),
    Signature(
        "mla_v40_decode_fwd",
        "aiter.mla",
        "q, q_rope, kv_buffer, kv_buffer_rope, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q, "
        "work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map, sm_scale=None, "
        "return_lse=False, attn_sink=None",
        "aiter/mla.py:1015",
        ("o",),
    ),
    Signature(
        "biased_grouped_topk",
        "aiter",
        "gating_output, correction_bias, topk_weights, topk_ids, num_expert_group, topk_group, need_renorm, "
        "routed_scaling_factor=1.0",
        "aiter/ops/topk.py:176",
        ("topk_weights", "topk_ids"),
    ),
    Signature(
        "topk_gating",
        "aiter",
        "topk_weights, topk_indices, gating_output, correction_bias=None, need_renorm=True, routed_scaling_factor=1.0, "
        "score_func='sqrtsoftplus'",
        "aiter/ops/topk.py",
        ("topk_weights", "topk_indices"),
    ),
    Signature(
        "pa_decode_sparse",
        "aiter.ops.triton.attention.pa_decode_sparse",
        "q, unified_kv, kv_indices, kv_indptr, attn_sink, softmax_scale, kv_scales=None, block_h=None, kv_splits=None, "
        "has_invalid=True, skip_reduce=False, USE_EXP2=None, *, extra_cache=None, extra_indices=None, "
        "extra_indptr=None",
        "aiter/ops/triton/attention/pa_decode_sparse.py",
    ),
    Signature(
        "pa_prefill_sparse",
        "aiter.ops.triton.attention.pa_prefill_sparse",
        "q, unified_kv, kv_indices_prefix, kv_indptr_prefix, kv, kv_indices_extend, kv_indptr_extend, attn_sink, "
        "softmax_scale, has_invalid=None",
        "aiter/ops/triton/attention/pa_prefill_sparse.py",
    ),
    Signature(
        "fp8_mqa_logits",
        "aiter.ops.triton.attention.fp8_mqa_logits",
        "Q, KV, kv_scales, weights, cu_starts, cu_ends, clean_logits=True",
        "aiter/ops/triton/attention/fp8_mqa_logits.py",
    ),
    Signature(
        "deepgemm_fp8_paged_mqa_logits",
        "aiter.ops.triton.attention.pa_mqa_logits",
        "q_fp8, kv_cache, weights, out_logits, context_lens, kv_indices, max_model_len, Preshuffle=False, "
        "KVBlockSize=1, ChunkK=256, TotalCuCount=None, WavePerEU=2, VarCtxSchedule=None",
        "aiter/ops/triton/attention/pa_mqa_logits.py",
        ("out_logits",),
    ),
    Signature(
        "top_k_per_row_prefill",
        "aiter",
        "logits, rowStarts, rowEnds, indices, values, numRows, stride0, stride1, k=2048, stable=False",
        "aiter/ops/topk.py",
        ("indices", "values"),
    ),
    Signature(
        "top_k_per_row_decode",
        "aiter",
        "logits, next_n, seqLens, indices, numRows, stride0, stride1, k=2048, stable=False",
        "aiter/ops/topk.py",
        ("indices",),
    ),
)

CONTRACT: Mapping[str, Signature] = MappingProxyType({s.entry: s for s in _SIGNATURES})
"""Entry -> the signature that its adapter was written for."""


@dataclass(frozen=True)
class Difference:
    """One thing in which a library differs from the contract.

    ``breaks`` is False for what a call by keyword does not notice: a new parameter with a default.
    """

    entry: str
    what: str
    expected: str
    found: str
    breaks: bool


def find(library: Any, entry: str) -> Callable[..., Any]:
    """The function of an entry in a library: in the genuine package, or in an object that is laid out like it.

    Args:
        library: the ``aiter`` module, or an object with the same attributes.
        entry: a name from `CONTRACT`.

    Raises:
        ValueError: no such entry.
        AttributeError: the library does not have it.
    """
    if entry not in CONTRACT:
        raise ValueError(f"entry: got {entry!r}, expected one of {sorted(CONTRACT)}")
    module = CONTRACT[entry].module
    found = library
    walked = library.__name__ if inspect.ismodule(library) else None
    for part in module.split(".")[1:]:
        if walked is not None:
            walked = f"{walked}.{part}"
            found = importlib.import_module(walked)  # AITER's own __init__ does not import its Triton wrappers
        else:
            found = getattr(found, part)
    function: Callable[..., Any] = getattr(found, entry)
    return function


def compare(library: Any, entries: Iterable[str] | None = None) -> list[Difference]:
    """Compare a library's signatures with the contract by introspection.

    Args:
        library: as in `find`.
        entries: which; default all of `CONTRACT`.

    Returns:
        The differences, in the contract's order; none if the adapters may be used as they are.

    Raises:
        ValueError: an entry is not in the contract.
    """
    return [difference for entry in (CONTRACT if entries is None else entries) for difference in _of(library, entry)]


def _of(library: Any, entry: str) -> list[Difference]:
    try:
        function = find(library, entry)
    except (AttributeError, ImportError) as error:
        return [Difference(entry, "function", f"in {CONTRACT[entry].module}", f"missing: {error}", True)]
    expected = CONTRACT[entry].parameters()
    found = _signature(function)
    if found is None:
        return [Difference(entry, "signature", "readable", "hidden behind a wrapper that takes anything", True)]
    differences = []
    for name, (kind, default) in expected.items():
        if name not in found:
            differences.append(Difference(entry, name, f"{kind} parameter", "missing", True))
        elif found[name][1] != default:
            want, got = ("required" if d is None else f"default {d}" for d in (default, found[name][1]))
            differences.append(Difference(entry, name, want, got, found[name][1] is None or default is not None))
    for name, (kind, default) in found.items():
        if name not in expected:
            got = f"{kind}, " + ("required" if default is None else f"default {default}")
            differences.append(Difference(entry, name, "no such parameter", got, default is None))
    order = [name for name in found if name in expected]
    if order != [name for name in expected if name in found]:
        differences.append(Difference(entry, "order", ", ".join(expected), ", ".join(order), False))
    return differences


def _signature(function: Callable[..., Any]) -> dict[str, tuple[str, str | None]] | None:
    found: dict[str, tuple[str, str | None]] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = "keyword" if parameter.kind is parameter.KEYWORD_ONLY else "positional"
        default = None if parameter.default is parameter.empty else _source(parameter.default)
        found[parameter.name] = (kind, default)
    return found or None


def _source(value: object) -> str:
    """A default as it would stand in source: an enum member by name, anything else by its repr."""
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)
