"""Sparse MLA attention over ragged slot lists: the definition, in PyTorch.

For query row t and head h, with S_t the multiset of valid slots over all scopes (0 <= slot < rows of that cache)::

    s_k = (q[t, h] . kv_k) * scale                      kv_k is key and value at once, 512 dims
    lse = ln sum_{k in S_t} exp(s_k)                    excludes the sink; -inf when S_t is empty
    o   = sum_k exp(s_k) kv_k / (sum_k exp(s_k) + exp(sink_h))

The sink is a learned logit with a zero value vector; it is compared with scaled scores and is not scaled itself.
S_t empty gives o = 0 exactly. FlashMLA reports +inf for the LSE of an empty row; this package reports -inf, the value
that merging partial results needs.

Source: DeepSeek-V4 inference/kernel.py, ``sparse_attn_kernel``; FlashMLA tests/ref.py (edge cases).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4ref.formats import kv_cache
from dsv4ref.formats.scope import Scope

__all__ = ["row_slots", "sparse_attention_plain", "sparse_attention_ref"]


def row_slots(scope: Scope, row: int) -> Tensor:
    """The valid slots of one query row, int64 ``[n]``, in list order, duplicates kept."""
    begin, end = int(scope.indptr[row]), int(scope.indptr[row + 1])
    slots = scope.indices[begin:end].to(torch.int64)
    return slots[(slots >= 0) & (slots < scope.cache.rows)]


def _check(q: Tensor, scopes: Sequence[Scope], sink: Tensor | None) -> tuple[int, int, int]:
    if q.dim() != 3 or q.shape[2] != kv_cache.HEAD_DIM:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [T, H, {kv_cache.HEAD_DIM}]")
    num_rows, num_heads, head_dim = q.shape
    if not scopes:
        raise ValueError("scopes: got none, expected one or two")
    for number, scope in enumerate(scopes):
        if scope.num_queries != num_rows:
            raise ValueError(f"scopes[{number}]: got lists of {scope.num_queries} rows, expected {num_rows} like q")
    if sink is not None and tuple(sink.shape) != (num_heads,):
        raise ValueError(f"sink: got shape {tuple(sink.shape)}, expected ({num_heads},), one per head of q")
    return num_rows, num_heads, head_dim


def _row_keys(scopes: Sequence[Scope], row: int, dtype: torch.dtype) -> Tensor:
    """Dequantised keys of one query row over all scopes, ``[n, 512]``."""
    return torch.cat([kv_cache.gather(scope.cache, row_slots(scope, row), dtype) for scope in scopes])


def sparse_attention_ref(
    q: Tensor, scopes: Sequence[Scope], sink: Tensor | None, scale: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Attention of every query row over its slots, in ``dtype`` on the quantised inputs.

    Args:
        q: ``[T, H, 512]``, any floating dtype.
        scopes: one or two scopes with T rows each.
        sink: fp32 ``[H]`` or None for no sink.
        scale: softmax scale, 512 ** -0.5 in DeepSeek-V4.
        dtype: arithmetic and result type.

    Returns:
        out ``[T, H, 512]`` and natural-log lse ``[T, H]``, both of ``dtype``.

    Raises:
        ValueError: no scope, or shapes that do not belong together.
    """
    num_rows, num_heads, head_dim = _check(q, scopes, sink)
    out = q.new_zeros((num_rows, num_heads, head_dim), dtype=dtype)
    lse = q.new_full((num_rows, num_heads), float("-inf"), dtype=dtype)
    for t in range(num_rows):
        kv = _row_keys(scopes, t, dtype)  # [n, 512]
        if kv.shape[0] == 0:
            continue
        scores = (q[t].to(dtype) @ kv.T) * scale  # [H, n]
        lse[t] = torch.logsumexp(scores, dim=-1)  # [H]
        total = lse[t] if sink is None else torch.logaddexp(lse[t], sink.to(dtype))
        out[t] = torch.exp(scores - total[:, None]) @ kv  # [H, 512]
    return out, lse


def sparse_attention_plain(
    q: Tensor, scopes: Sequence[Scope], sink: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The straightforward bf16 implementation that numerical budgets are relative to.

    Same roundings as the kernels: bf16 keys, fp32 scores and sums, P rounded to bf16 before P @ V, bf16 output.

    Args, shapes and errors as `sparse_attention_ref`; returns out bf16 ``[T, H, 512]`` and lse fp32 ``[T, H]``.
    """
    num_rows, num_heads, head_dim = _check(q, scopes, sink)
    out = q.new_zeros((num_rows, num_heads, head_dim), dtype=torch.bfloat16)
    lse = q.new_full((num_rows, num_heads), float("-inf"), dtype=torch.float32)
    for t in range(num_rows):
        kv = _row_keys(scopes, t, torch.bfloat16).to(torch.float32)  # [n, 512]
        if kv.shape[0] == 0:
            continue
        scores = (q[t].to(torch.float32) @ kv.T) * scale  # [H, n]
        lse[t] = torch.logsumexp(scores, dim=-1)
        largest = scores.amax(dim=-1, keepdim=True)  # [H, 1]
        weights = torch.exp(scores - largest)  # [H, n]
        total = weights.sum(dim=-1, keepdim=True)  # [H, 1]
        if sink is not None:
            total = total + torch.exp(sink.to(torch.float32)[:, None] - largest)
        mixed = weights.to(torch.bfloat16).to(torch.float32) @ kv  # [H, 512]
        out[t] = (mixed / total).to(torch.bfloat16)
    return out, lse
