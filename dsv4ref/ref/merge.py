"""Merging partial attention results: the definition, in PyTorch.

Attention over a union of disjoint key sets from attention over each of them. Part i brings its normalised output and
the natural logarithm of its softmax denominator, both without the sink::

    o_i = sum_{k in S_i} exp(s_k) v_k / exp(lse_i)        lse_i = ln sum_{k in S_i} exp(s_k)

    lse = ln sum_i exp(lse_i)
    o   = sum_i exp(lse_i - lse) o_i * 1 / (1 + exp(sink - lse))

The sink's factor stands once, outside the sum: it is the share of exp(lse) in exp(lse) + exp(sink). Parts come from the
two scopes of a layer, from splits of a row's keys, or from earlier merges (without the sink), in any order.

Ends of the range:

* An LSE of -inf is an empty part. So is +inf, which is how FlashAttention 2 and FlashMLA report a row without keys; a
  merge has no other use for it. A producer that returns +inf for a row *with* keys has lost that part, and no merge
  can bring it back.
* A part of weight 0 contributes nothing, whatever it holds: the term is masked and not only the weight (0 x NaN).
* All parts empty: o = 0 exactly, with or without a sink, and lse = -inf.
* A sink of -inf has no effect; +inf takes all the weight, o = 0. Neither changes lse.
* NaN therefore comes out only where a part of non-zero weight, an LSE or the sink is NaN.

Source: FlashMLA's combine (empty splits); vLLM's merge_attn_states (+inf counts as -inf); AITER's mla reduce (masks the
term); vllm#28181 and flashinfer#4051 (all parts empty); hazard H16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4ref.ref.rope import rotate_back_ref

__all__ = ["merge_scopes_ref", "merge_weights_ref"]


def merge_weights_ref(
    lses: Tensor, sink: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """What each part and the sink weigh; the weights of a row with a key add up to 1.

    Args:
        lses: ``[N, T, H]`` natural LSE per part, floating; -inf and +inf are empty parts.
        sink: ``[H]`` logit per head, or None for no sink.
        dtype: arithmetic and result type.

    Returns:
        weights ``[N, T, H]``, the sink's weight ``[T, H]``, and the merged lse ``[T, H]`` without the sink.
    """
    lses = lses.to(dtype)
    lses = torch.where(torch.isposinf(lses), -math.inf, lses)
    lse = torch.logsumexp(lses, dim=0)  # [T, H]; torch returns -inf if every part is -inf
    empty = torch.isneginf(lse)
    weights = torch.exp(lses - torch.where(empty, 0.0, lse))  # [N, T, H]; exp(-inf - 0) where all are empty
    none = torch.zeros_like(lse)
    if sink is None:
        return weights, none, lse
    # 1 / (1 + exp(sink - lse)); an empty row leaves the sink everything, and a sink of -inf nothing to anybody
    logits = sink.to(dtype).expand_as(lse)
    kept = torch.sigmoid(torch.where(empty, none, lse) - logits)
    taken = torch.where(empty, torch.where(torch.isneginf(logits), none, none + 1.0), 1.0 - kept)
    return weights * torch.where(empty, none, kept), taken, lse


def merge_scopes_ref(
    partials: Tensor,
    lses: Tensor,
    sink: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    freqs: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Merge N partial attention results, in ``dtype``.

    Args:
        partials: ``[N, T, H, D]``, any floating dtype; normalised, without the sink.
        lses: ``[N, T, H]`` natural LSE per part, without the sink.
        sink: ``[H]`` or None for no sink.
        positions: integer ``[T]``, the queries' own; with ``freqs``, the last dimensions are rotated back to them.
        freqs: fp32 ``[R / 2]``, as `dsv4ref.ref.rope`.
        dtype: arithmetic and result type. A weight that underflows in it masks its part.

    Returns:
        out ``[T, H, D]`` and lse ``[T, H]``, both of ``dtype``.

    Raises:
        ValueError: only one of ``positions`` and ``freqs`` came.
    """
    if (positions is None) != (freqs is None):
        raise ValueError("positions and freqs: got one of them, expected both or neither")
    weights, _, lse = merge_weights_ref(lses, sink, dtype)
    weights = weights[..., None]  # [N, T, H, 1]
    terms = torch.where(weights == 0, 0.0, weights * partials.to(dtype))
    out = terms.sum(dim=0)  # [T, H, D]
    if positions is not None and freqs is not None:
        out = rotate_back_ref(out, positions, freqs)
    return out, lse
