"""The lightning indexer: which compressed entries a query of a C4 layer attends to.

    q_h     = wq_b(qr), 64 heads of 128; RoPE on the last 64 dims at the query's position; Hadamard; quantised
    k_j     = the indexer's own C4 compressor, 128 wide; RoPE at 4j; Hadamard; quantised
    w_h     = weights_proj(x) * 128^-0.5 * 64^-0.5            signed, no activation
    score_j = sum_h w_h relu(q_h . k_j)                       for j < (p + 1) // 4
    select  = the index_topk entries of highest score, ties to the lower number

An entry that no head responds to scores exactly 0 and outranks negative scores: with few heads there are exact ties at
0, and two correct implementations may select different entries.

Hadamard: the Sylvester matrix of order 128 times 128^-0.5. It is orthogonal, so scores stay what they are until
rounding; it spreads outliers over a block before quantisation. Rotating only one side destroys retrieval.

Source: DeepSeek-V4 inference/model.py, ``Indexer`` and ``rotate_activation``; scores in fp32 as in vLLM and
transformers (DeepSeek: bfloat16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.numerics import Numerics, fp4_round_trip, fp8_round_trip
from dsv4ref.ref.rope import rotate_ref
from dsv4ref.ref.weights import Weights

__all__ = [
    "hadamard_ref",
    "index_format_ref",
    "index_head_weights_ref",
    "index_queries_ref",
    "index_scores_ref",
    "select_ref",
]

FP8_BLOCK = 128


def hadamard_ref(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dimension, orthonormal: its own inverse.

    Args:
        x: ``[..., d]``, d a power of two.

    Returns:
        ``x @ S * d^-0.5``, with S[i, j] = (-1)^(number of bits set in both i and j).
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"x: got last dimension {dim}, expected a power of two")
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return x @ matrix * dim**-0.5


def index_format_ref(x: Tensor, numerics: Numerics) -> Tensor:
    """What queries and keys go through alike, after RoPE: Hadamard, then quantise and dequantise.

    Args:
        x: ``[..., 128]``.
        numerics: ``hadamard`` and ``quantise_index``.

    Returns:
        ``[..., 128]``.
    """
    if numerics.hadamard:
        x = numerics.round(hadamard_ref(x))
    if numerics.quantise_index == "fp4":
        return fp4_round_trip(x)
    if numerics.quantise_index == "fp8":
        return fp8_round_trip(x, FP8_BLOCK)
    return x


def index_queries_ref(
    qr: Tensor, weights: Weights, positions: Tensor, freqs: Tensor, config: ModelConfig, numerics: Numerics
) -> Tensor:
    """Indexer queries.

    Args:
        qr: ``[T, q_lora_rank]`` the normed query latent, shared with attention.
        weights: the indexer's.
        positions: integer ``[T]``.
        freqs: fp32 ``[R / 2]`` of the layer.
        config: index_n_heads Hi and index_head_dim di.
        numerics: formats.

    Returns:
        ``[T, Hi, di]``.
    """
    q = numerics.round(numerics.linear_input(qr) @ weights.matrix("wq_b").T)
    q = q.unflatten(-1, (config.index_n_heads, config.index_head_dim))  # [T, Hi, di]
    return index_format_ref(numerics.round(rotate_ref(q, positions, freqs)), numerics)


def index_head_weights_ref(x: Tensor, weights: Weights, config: ModelConfig, numerics: Numerics) -> Tensor:
    """Weight of every indexer head in a token's scores, both scales folded in.

    Args:
        x: ``[T, D]`` normed layer input, not the query latent.
        weights: the indexer's.
        config: gives 128^-0.5 * 64^-0.5.
        numerics: formats.

    Returns:
        ``[T, Hi]``.
    """
    return numerics.round(x @ weights.matrix("weights_proj").T) * config.index_scale


def index_scores_ref(q: Tensor, keys: Tensor, head_weights: Tensor) -> Tensor:
    """Score entries for one query.

    Args:
        q: ``[Hi, di]``.
        keys: ``[N, di]``, only entries that the query may see.
        head_weights: ``[Hi]``.

    Returns:
        ``[N]``.
    """
    return head_weights @ torch.relu(q @ keys.T)


def select_ref(scores: Tensor, topk: int) -> Tensor:
    """The entries of highest score.

    Args:
        scores: ``[N]``, of visible entries only.
        topk: how many at most.

    Returns:
        int64 ``[min(topk, N)]``, best first; of equal scores the lower entry number first.
    """
    return torch.sort(scores, descending=True, stable=True).indices[:topk]
