"""Manifold-constrained hyper-connections (mHC): four residual streams instead of one.

A half-block reads one mixture of the streams and writes back into all of them. With X [n, D] the streams of one token
and x its n*D values, stream 0 first::

    m      = (x fn^T) / sqrt(mean(x^2) + eps)                 n + n + n*n numbers
    pre_i  = sigmoid(m[i] scale[0] + base[i]) + hc_eps        what the half-block reads:  u = sum_i pre_i X_i
    post_j = 2 sigmoid(m[n+j] scale[1] + base[n+j])
    C      = Sinkhorn(m[2n + n*i + j] scale[2] + base[2n + n*i + j])
    Y_j    = post_j f(u) + sum_i C[i, j] X_i

i is the SOURCE stream (row) and j the DESTINATION (column). Sinkhorn ends by normalising columns, so that a destination
is a convex mixture of sources; rows then sum to 1 only approximately. Mixing with C transposed is the classic bug.

Source: DeepSeek-V4 inference/model.py, ``Block.hc_pre``, ``Block.hc_post`` and ``ParallelHead``; inference/kernel.py,
``hc_split_sinkhorn``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.norms import inverse_rms
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.weights import Weights

__all__ = ["collapse_ref", "hc_post_ref", "hc_pre_ref", "hc_weights_ref", "sinkhorn_ref"]


def sinkhorn_ref(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Make matrices doubly stochastic, columns last.

    The softmax over each row and one column normalisation are the first iteration.

    Args:
        logits: ``[..., n, n]``.
        iterations: row-and-column rounds, 20 in DeepSeek-V4.
        eps: added to every entry once and to every sum.

    Returns:
        ``[..., n, n]``, positive; columns sum to 1 up to eps.
    """
    matrix = torch.softmax(logits, dim=-1) + eps
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return matrix


def _mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """``(x fn^T) * rsqrt(mean(x^2) + eps)``: ``[T, n, D]`` gives ``[T, rows of fn]``."""
    x = streams.flatten(1)  # [T, n * D]
    return (x @ fn.T) * inverse_rms(x, eps)


def hc_weights_ref(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The three sets of mixing weights of one half-block.

    Args:
        streams: X ``[T, n, D]``, float32 or float64.
        fn: ``[(2 + n) n, n * D]``.
        base: ``[(2 + n) n]``.
        scale: ``[3]`` for pre, post and C.
        config: n, iterations and both eps.

    Returns:
        pre ``[T, n]``, post ``[T, n]`` and C ``[T, n, n]`` indexed [token, source, destination].
    """
    n = config.hc_mult
    mixes = _mixes(streams, fn, config.norm_eps)  # [T, (2 + n) n]
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n))
    return pre, post, sinkhorn_ref(logits, config.hc_sinkhorn_iters, config.hc_eps)


def hc_pre_ref(
    streams: Tensor, weights: Weights, name: str, config: ModelConfig, numerics: Numerics
) -> tuple[Tensor, Tensor, Tensor]:
    """What a half-block reads, and how its result goes back.

    Args:
        streams: X ``[T, n, D]``.
        weights: the block's.
        name: ``"attn"`` or ``"ffn"``.
        config: the model.
        numerics: formats; the weights themselves are never rounded.

    Returns:
        u ``[T, D]``, post ``[T, n]``, C ``[T, n, n]``.
    """
    fn, base, scale = (weights.tensor(f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
    pre, post, mix = hc_weights_ref(streams, fn, base, scale, config)
    return numerics.round((pre[..., None] * streams).sum(dim=1)), post, mix


def hc_post_ref(result: Tensor, streams: Tensor, post: Tensor, mix: Tensor, numerics: Numerics) -> Tensor:
    """Write a half-block's result back.

    Args:
        result: f(u) ``[T, D]``.
        streams: X ``[T, n, D]``, as it was before the half-block.
        post: ``[T, n]``.
        mix: C ``[T, n, n]``, [token, source, destination].
        numerics: formats.

    Returns:
        Y ``[T, n, D]``.
    """
    mixed = torch.einsum("tij,tid->tjd", mix, streams)  # [T, n, D]
    return numerics.round(post[..., None] * result[:, None, :] + mixed)


def collapse_ref(streams: Tensor, weights: Weights, config: ModelConfig, numerics: Numerics) -> Tensor:
    """Streams to one vector, before the final norm: a sigmoid mixture, no Sinkhorn.

    Args:
        streams: X ``[T, n, D]``.
        weights: holds ``hc_head_fn`` ``[n, n * D]``, ``hc_head_base`` ``[n]`` and ``hc_head_scale`` ``[1]``.
        config: the model.
        numerics: formats.

    Returns:
        ``[T, D]``.
    """
    mixes = _mixes(streams, weights.tensor("hc_head_fn"), config.norm_eps)  # [T, n]
    pre = torch.sigmoid(mixes * weights.tensor("hc_head_scale") + weights.tensor("hc_head_base")) + config.hc_eps
    return numerics.round((pre[..., None] * streams).sum(dim=1))
