"""The compressor: r tokens become one cache entry, by a learned softmax over tokens, channel by channel.

For token p, both rows c channels wide::

    kv_p = x_p Wkv^T                       no bias
    g_p  = x_p Wgate^T + ape[p mod r]      ape: a learned bias per place in the group and channel

C128 (c = d)      entry j pools tokens 128j .. 128j+127::

    e_j = sum_k softmax_k(g_k) * kv_k

C4 (c = 2d)       entry j pools 8 rows: of the previous group, tokens 4j-4 .. 4j-1, the FIRST d channels of kv and g; of
its own group, tokens 4j .. 4j+3, the SECOND d channels; one softmax over the 8. Entry 0 has no previous group: kv = 0
and g = -inf there, hence no weight. (Third-party notes on the technical report label the two streams the other way
round; DeepSeek's code is followed.)

An entry exists once its last token was processed, and that token already sees it. Then, in this order::

    RMSNorm, RoPE at position j*r (the group's first token, for C4 too), and the storage format of its cache

Source: DeepSeek-V4 inference/model.py, ``Compressor``. That code never resets its state between requests, so that rows
of an old request can reach entry 0 of the next one; here a request starts from `empty_state`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.numerics import Numerics, bf16_round_trip
from dsv4ref.ref.rope import rotate_ref
from dsv4ref.ref.weights import Weights

__all__ = ["CompressorState", "compress_ref", "empty_state", "place_entries_ref", "pool_ref"]


@dataclass(frozen=True)
class CompressorState:
    """What a compressor remembers between calls.

    Args:
        kv: ``[n, c]`` rows of the open group, n < r.
        score: ``[n, c]`` their g, ape already added.
        previous_kv: ``[r, d]`` the last closed group's first-half channels (C4), ``[0, d]`` (C128).
        previous_score: the same of g; -inf before the first group has closed.
        entries: groups closed so far.
    """

    kv: Tensor
    score: Tensor
    previous_kv: Tensor
    previous_score: Tensor
    entries: int


def empty_state(
    ratio: int, dim: int, overlap: bool, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CompressorState:
    """The state at the start of a sequence.

    Args:
        ratio: r, tokens per entry.
        dim: d, width of an entry.
        overlap: whether an entry also pools the previous group (C4).
        dtype: arithmetic type.
        device: where, the weights' device.
    """
    channels = 2 * dim if overlap else dim
    previous = torch.zeros(ratio if overlap else 0, dim, dtype=dtype, device=device)
    return CompressorState(
        kv=previous.new_zeros(0, channels),
        score=previous.new_zeros(0, channels),
        previous_kv=previous,
        previous_score=torch.full_like(previous, float("-inf")),
        entries=0,
    )


def pool_ref(kv: Tensor, score: Tensor) -> Tensor:
    """Softmax over rows in every channel, then the weighted sum: ``[n, d]`` and ``[n, d]`` give ``[d]``."""
    return (torch.softmax(score, dim=0) * kv).sum(dim=0)


def compress_ref(x: Tensor, weights: Weights, state: CompressorState) -> tuple[Tensor, CompressorState]:
    """Take in T more tokens and pool the groups that they close.

    Args:
        x: ``[T, D]`` normed layer input (what ``wq_a`` reads), tokens consecutive and following the state's last.
        weights: ``wkv``, ``wgate`` and ``ape`` of the compressor. The products are done in the arithmetic dtype.
        state: what earlier tokens left.

    Returns:
        pooled entries ``[E, d]``, numbers ``state.entries ..``, before norm and rotation; and the new state.
    """
    ape = weights.tensor("ape")  # [r, c]
    ratio, dim = ape.shape[0], state.previous_kv.shape[1]
    overlap = state.previous_kv.shape[0] > 0

    arrived = torch.arange(x.shape[0], device=x.device)
    place = (state.kv.shape[0] + arrived) % ratio  # [T] p mod r: groups start at multiples of r
    kv = x @ weights.matrix("wkv").T  # [T, c]
    score = x @ weights.matrix("wgate").T + ape[place]  # [T, c]
    kv, score = torch.cat((state.kv, kv)), torch.cat((state.score, score))  # from the open group's first token

    previous_kv, previous_score = state.previous_kv, state.previous_score
    pooled = []
    closed = kv.shape[0] // ratio
    for group in range(closed):
        rows = slice(group * ratio, (group + 1) * ratio)
        if overlap:
            own_kv, own_score = kv[rows, dim:], score[rows, dim:]  # [r, d]
            pooled.append(pool_ref(torch.cat((previous_kv, own_kv)), torch.cat((previous_score, own_score))))
            previous_kv, previous_score = kv[rows, :dim], score[rows, :dim]
        else:
            pooled.append(pool_ref(kv[rows], score[rows]))
    new_state = CompressorState(
        kv=kv[closed * ratio :],
        score=score[closed * ratio :],
        previous_kv=previous_kv,
        previous_score=previous_score,
        entries=state.entries + closed,
    )
    return torch.stack(pooled) if pooled else x.new_zeros(0, dim), new_state


def place_entries_ref(
    pooled: Tensor, first: int, ratio: int, norm: Tensor, freqs: Tensor, eps: float, numerics: Numerics
) -> Tensor:
    """Norm and rotate pooled rows into entries; the storage format comes after.

    Args:
        pooled: ``[E, d]`` of `compress_ref`.
        first: number of the first of them.
        ratio: r; entry j is rotated to position j*r.
        norm: ``[d]`` RMSNorm weight.
        freqs: fp32 ``[R / 2]`` frequencies of the layer.
        eps: of the norm.
        numerics: ``round_pooled`` rounds before the norm as DeepSeek does; the default does not.

    Returns:
        ``[E, d]``.
    """
    if numerics.round_pooled:
        pooled = bf16_round_trip(pooled)
    positions = (first + torch.arange(pooled.shape[0], device=pooled.device)) * ratio  # [E]
    normed = numerics.round(rms_norm_ref(pooled, norm, eps))
    return numerics.round(rotate_ref(normed, positions, freqs))
