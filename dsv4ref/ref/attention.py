"""One attention layer: query and key paths, window and compressed keys, sink, inverse rotation, grouped output.

    qr  = RMSNorm(wq_a x)                                     also feeds the indexer
    q_h = rotate(headnorm(wq_b qr))                           H heads of d, RoPE on the last R dims
    kv  = rotate(RMSNorm(wkv x))                              ONE vector of d: key and value of every head
    S_p = window {max(0, p-W+1) .. p}  and  compressed entries j < (p+1) // r, on C4 the indexer's selection of them
    o_h = sum_{k in S_p} exp(q_h . kv_k / sqrt(d)) kv_k / (sum_k exp(...) + exp(sink_h))
    y   = wo_b(concat_g wo_a[g] (heads of g, rotated back at p))

A token may count twice, raw in the window and inside an entry; that is intended. The open group's tokens are not in any
entry yet, and never further back than the window reaches, so that every token is covered.

Source: DeepSeek-V4 inference/model.py, ``Attention``; inference/kernel.py, ``sparse_attn``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4ref.config import C4, SWA, ModelConfig
from dsv4ref.ref.compressor import compress_ref, place_entries_ref
from dsv4ref.ref.indexer import (
    index_format_ref,
    index_head_weights_ref,
    index_queries_ref,
    index_scores_ref,
    select_ref,
)
from dsv4ref.ref.norms import head_norm_ref, rms_norm_ref
from dsv4ref.ref.numerics import Numerics, bf16_round_trip, fp8_round_trip
from dsv4ref.ref.projection import grouped_projection_ref
from dsv4ref.ref.rope import layer_frequencies, rotate_back_ref, rotate_ref
from dsv4ref.ref.state import LayerState, PlainRows, Rows
from dsv4ref.ref.weights import Weights

__all__ = [
    "attend_row_ref",
    "attention_ref",
    "keys_ref",
    "kv_format_ref",
    "output_ref",
    "queries_ref",
    "select_entries_ref",
    "update_rows_ref",
]

KV_BLOCK = 64
"""Key dimensions that share one scale in the FP8 cache."""


def queries_ref(
    x: Tensor, weights: Weights, positions: Tensor, freqs: Tensor, config: ModelConfig, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    """The query path.

    Args:
        x: ``[T, D]`` normed layer input.
        weights: the attention's.
        positions: integer ``[T]``.
        freqs: fp32 ``[R / 2]`` of the layer.
        config: H, d and eps.
        numerics: formats.

    Returns:
        q ``[T, H, d]`` and the latent qr ``[T, q_lora_rank]``.
    """
    latent = numerics.round(numerics.linear_input(x) @ weights.matrix("wq_a").T)
    qr = numerics.round(rms_norm_ref(latent, weights.tensor("q_norm.weight"), config.norm_eps))
    q = numerics.round(numerics.linear_input(qr) @ weights.matrix("wq_b").T)
    q = q.unflatten(-1, (config.n_heads, config.head_dim))  # [T, H, d]
    q = numerics.round(head_norm_ref(q, config.norm_eps, numerics.q_norm_bf16))
    return numerics.round(rotate_ref(q, positions, freqs)), qr


def kv_format_ref(kv: Tensor, config: ModelConfig, numerics: Numerics) -> Tensor:
    """What a key goes through on its way into the cache and out again.

    Args:
        kv: ``[N, d]``, rotated.
        config: how many dimensions are rotary.
        numerics: ``quantise_kv`` and ``kv_dialect``.

    Returns:
        ``[N, d]``: FP8 per 64 of the first d - R dimensions, bfloat16 of the rotary ones; or ``kv`` itself.
    """
    if numerics.quantise_kv == "none":
        return kv
    nope, rope = kv[:, : config.nope_dim], kv[:, config.nope_dim :]
    return torch.cat((fp8_round_trip(nope, KV_BLOCK, numerics.kv_dialect), bf16_round_trip(rope)), dim=1)


def keys_ref(
    x: Tensor, weights: Weights, positions: Tensor, freqs: Tensor, config: ModelConfig, numerics: Numerics
) -> Tensor:
    """Window keys: one vector per token, key and value of all heads.

    Args and shapes as `queries_ref`.

    Returns:
        kv ``[T, d]`` as the cache will give it back.
    """
    kv = numerics.round(numerics.linear_input(x) @ weights.matrix("wkv").T)
    kv = numerics.round(rms_norm_ref(kv, weights.tensor("kv_norm.weight"), config.norm_eps))
    return kv_format_ref(numerics.round(rotate_ref(kv, positions, freqs)), config, numerics)


def update_rows_ref(
    x: Tensor,
    kv: Tensor,
    weights: Weights,
    ratio: int,
    freqs: Tensor,
    state: LayerState,
    config: ModelConfig,
    numerics: Numerics,
) -> LayerState:
    """Append the tokens' window keys and whatever entries they complete, before any of them is attended to.

    Args:
        x: ``[T, D]`` normed layer input.
        kv: ``[T, d]`` of `keys_ref`.
        weights: the attention's.
        ratio: r of the layer.
        freqs: fp32 ``[R / 2]`` of the layer.
        state: what earlier tokens left.
        config: the model.
        numerics: formats.

    Returns:
        The new state; nothing is forgotten yet.
    """
    state = replace(state, window=state.window.append(kv))
    if ratio == SWA:
        return state
    assert state.compressor is not None
    assert state.compressed is not None
    part = weights.at("compressor")
    pooled, compressor = compress_ref(x, part, state.compressor)
    norm = part.tensor("norm.weight")
    entries = place_entries_ref(pooled, state.compressor.entries, ratio, norm, freqs, config.norm_eps, numerics)
    entries = kv_format_ref(entries, config, numerics)
    state = replace(state, compressor=compressor, compressed=state.compressed.append(entries))
    if ratio != C4:
        return state
    assert state.index_compressor is not None
    assert state.index_keys is not None
    part = weights.at("indexer").at("compressor")
    pooled, compressor = compress_ref(x, part, state.index_compressor)
    norm = part.tensor("norm.weight")
    keys = place_entries_ref(pooled, state.index_compressor.entries, ratio, norm, freqs, config.norm_eps, numerics)
    keys = index_format_ref(keys, numerics)
    return replace(state, index_compressor=compressor, index_keys=state.index_keys.append(keys))


def select_entries_ref(
    x: Tensor,
    qr: Tensor,
    weights: Weights,
    ratio: int,
    positions: Tensor,
    freqs: Tensor,
    state: LayerState,
    config: ModelConfig,
    numerics: Numerics,
) -> list[Tensor]:
    """The compressed entries of every query: all visible ones on C128, the indexer's best on C4, none without.

    Args:
        x: ``[T, D]`` normed layer input.
        qr: ``[T, q_lora_rank]`` of `queries_ref`.
        weights: the attention's.
        ratio: r of the layer.
        positions: integer ``[T]``.
        freqs: fp32 ``[R / 2]`` of the layer.
        state: after `update_rows_ref`.
        config: the model.
        numerics: formats.

    Returns:
        T tensors, int64 entry numbers below ``(p + 1) // r``.
    """
    if ratio == SWA:
        return [torch.zeros(0, dtype=torch.int64, device=qr.device) for _ in positions]
    visible = [(p + 1) // ratio for p in positions.tolist()]  # the closing token sees the entry that it closed
    if ratio != C4:
        return [torch.arange(count, device=qr.device) for count in visible]
    assert state.index_keys is not None
    part = weights.at("indexer")
    queries = index_queries_ref(qr, part, positions, freqs, config, numerics)  # [T, Hi, di]
    head_weights = index_head_weights_ref(x, part, config, numerics)  # [T, Hi]
    selected = []
    for query, head_weight, count in zip(queries, head_weights, visible, strict=True):
        keys = state.index_keys.gather(torch.arange(count, device=qr.device), numerics.dtype)  # [N, di]
        selected.append(select_ref(index_scores_ref(query, keys, head_weight), config.index_topk))
    return selected


def attend_row_ref(q: Tensor, kv: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Softmax attention of one token's heads over its keys, with a sink.

    Args:
        q: ``[H, d]``.
        kv: ``[n, d]`` keys, which are also the values.
        sink: ``[H]`` learned logits, compared with scaled scores and not scaled themselves; their value is zero.
        scale: d^-0.5.

    Returns:
        o ``[H, d]``.
    """
    scores = (q @ kv.T) * scale  # [H, n]
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1), sink)  # [H]
    return torch.exp(scores - total[:, None]) @ kv


def output_ref(
    o: Tensor, weights: Weights, positions: Tensor, freqs: Tensor, config: ModelConfig, numerics: Numerics
) -> Tensor:
    """Rotate back and project: per group of heads with ``wo_a``, then all together with ``wo_b``.

    Args:
        o: ``[T, H, d]`` attention output.
        weights: the attention's.
        positions: integer ``[T]``, of the queries.
        freqs: fp32 ``[R / 2]`` of the layer.
        config: G groups.
        numerics: formats; ``wo_a`` reads bfloat16, never FP8.

    Returns:
        y ``[T, D]``.
    """
    o = numerics.round(rotate_back_ref(o, positions, freqs))
    grouped = o.reshape(o.shape[0], config.o_groups, config.wo_a_input_width)  # [T, G, H/G * d]
    z = numerics.round(grouped_projection_ref(grouped, weights.matrix("wo_a"))).flatten(1)  # [T, G * o_lora_rank]
    return numerics.round(numerics.linear_input(z) @ weights.matrix("wo_b").T)


def attention_ref(
    x: Tensor,
    weights: Weights,
    layer: int,
    positions: Tensor,
    state: LayerState,
    config: ModelConfig,
    numerics: Numerics,
) -> tuple[Tensor, LayerState]:
    """One attention layer over T consecutive tokens of one sequence: prefill, a chunk of it, or decode.

    Args:
        x: ``[T, D]`` normed layer input.
        weights: the attention's (``layers.N.attn``).
        layer: which layer, for its ratio and frequencies.
        positions: int64 ``[T]``, consecutive, following the state.
        state: what earlier tokens left.
        config: the model.
        numerics: formats.

    Returns:
        y ``[T, D]`` and the new state.
    """
    ratio, freqs = config.ratio(layer), layer_frequencies(config, layer, numerics)
    q, qr = queries_ref(x, weights, positions, freqs, config, numerics)
    kv = keys_ref(x, weights, positions, freqs, config, numerics)
    state = update_rows_ref(x, kv, weights, ratio, freqs, state, config, numerics)
    selected = select_entries_ref(x, qr, weights, ratio, positions, freqs, state, config, numerics)

    sink = weights.tensor("attn_sink")
    o = torch.zeros_like(q)  # [T, H, d]
    window, compressed = _read(state, positions, config, numerics.dtype)
    for t, p in enumerate(positions.tolist()):
        keys = _row_keys(window, compressed, selected[t], p, config, numerics.dtype)
        o[t] = attend_row_ref(q[t], keys, sink, config.softmax_scale)
    y = output_ref(numerics.round(o), weights, positions, freqs, config, numerics)

    end = int(positions[-1]) + 1
    return y, replace(state, window=state.window.forget(end - config.window_size))


def _read(state: LayerState, positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Rows, Rows | None]:
    """The rows that several queries share, dequantised once; a single query reads its own from the caches."""
    if positions.shape[0] == 1:
        return state.window, state.compressed
    first = max(0, int(positions[0]) - config.window_size + 1)
    window = PlainRows(
        state.window.gather(torch.arange(first, state.window.end, device=positions.device), dtype), first
    )
    if state.compressed is None:
        return window, None
    entries = torch.arange(state.compressed.end, device=positions.device)
    return window, PlainRows(state.compressed.gather(entries, dtype))


def _row_keys(
    window: Rows, compressed: Rows | None, selected: Tensor, p: int, config: ModelConfig, dtype: torch.dtype
) -> Tensor:
    """Keys of the query at position p, window first, ``[n, d]``."""
    recent = torch.arange(max(0, p - config.window_size + 1), p + 1, device=selected.device)
    keys = window.gather(recent, dtype)
    return keys if compressed is None else torch.cat((keys, compressed.gather(selected, dtype)))
