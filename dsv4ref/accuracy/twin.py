"""A batched, differentiable forward pass with the reference's weights: what training runs.

`forward` computes what `dsv4ref.ref.model.forward_ref` computes in fp32 without formats (``STRUCTURE``), from an empty
state, for B sequences at once. Norms, projections, rotations and hyper-connections are the reference's own functions,
over tokens of all sequences in one row; what the reference does token by token is written again, without loops over
tokens:

* pooling         groups as an axis; C4's previous group is the same tensor shifted by one
* attention       blocks of W queries over 2 W window keys and all entries, masked
* selection       a stable sort of all scores at once
* experts         tokens sorted by expert into one padded batch

Top-k selection has no gradient. ``select="all"`` attends to every visible entry instead, and `IndexTrace` carries what
the indexer is then trained on: its scores, and the attention that each entry got.

Source: the formulas are those of dsv4ref.ref; DeepSeek-V3.2-Exp's report trains its indexer on the attention mass in
the same two steps (dense, then sparse).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.config import C4, SWA, ModelConfig
from dsv4ref.ref.attention import keys_ref, output_ref, queries_ref
from dsv4ref.ref.experts import clamped_swiglu_ref, route_ref, shared_expert_ref
from dsv4ref.ref.hyper_connections import collapse_ref, hc_post_ref, hc_pre_ref
from dsv4ref.ref.indexer import index_head_weights_ref, index_queries_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.rope import layer_frequencies, rotate_ref
from dsv4ref.ref.weights import Weights, block_name

__all__ = ["IndexTrace", "Select", "Trace", "forward"]

Select: TypeAlias = Literal["topk", "all"]

_HIDDEN = float("-inf")


@dataclass(frozen=True)
class IndexTrace:
    """What one C4 layer's indexer said and what attention did, at the probed positions.

    Args:
        scores: ``[B, P, N]`` of every entry, differentiable in the indexer's own weights only.
        mass: ``[B, P, N]`` attention summed over heads, detached.
        visible: bool ``[P, N]``, entries that the position may see.
    """

    scores: Tensor
    mass: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Trace:
    """A forward pass.

    Args:
        logits: ``[B, P, V]`` at the probed positions.
        index: layer -> its indexer, C4 layers only.
        loads: layer -> int64 ``[E]``, tokens that chose each expert; learned routers only.
    """

    logits: Tensor
    index: Mapping[int, IndexTrace]
    loads: Mapping[int, Tensor]


def forward(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    *,
    select: Select = "topk",
    probe: Tensor | None = None,
) -> Trace:
    """B whole sequences from their start, in fp32, no formats.

    Args:
        tensors: checkpoint name -> floating tensor (hash tables int64); gradients flow into those that ask for them.
        config: the model.
        tokens: int64 ``[B, T]``.
        select: ``"topk"`` is the model; ``"all"`` lets C4 layers attend to every visible entry.
        probe: int64 ``[P]``, positions to report; default all of them.

    Returns:
        `Trace`.

    Raises:
        ValueError: tokens are no ``[B, T]`` within the vocabulary, or ``select`` is neither.
    """
    if tokens.dim() != 2 or tokens.dtype is not torch.int64 or not tokens.numel():
        raise ValueError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected torch.int64 [B, T], not empty")
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if bool(outside.any()):
        raise ValueError(f"tokens: got {int(tokens[outside][0])}, expected 0 to {config.vocab_size - 1}")
    if select not in ("topk", "all"):
        raise ValueError(f"select: got {select!r}, expected 'topk' or 'all'")
    batch, length = tokens.shape
    probe = torch.arange(length) if probe is None else probe
    weights = Weights(tensors)
    positions = torch.arange(length).repeat(batch)  # [B * T]
    flat = tokens.flatten()

    streams = weights.tensor("embed.weight")[flat][:, None, :].repeat(1, config.hc_mult, 1)  # [B * T, n, D]
    index: dict[int, IndexTrace] = {}
    loads: dict[int, Tensor] = {}
    for layer in range(config.n_layers):
        block = weights.at(block_name(config, layer))
        u, post, mix = hc_pre_ref(streams, block, "attn", config, STRUCTURE)
        x = rms_norm_ref(u, block.tensor("attn_norm.weight"), config.norm_eps)
        y, traced = _attention(x, block.at("attn"), layer, positions, batch, config, select, probe)
        if traced is not None:
            index[layer] = traced
        streams = hc_post_ref(y, streams, post, mix, STRUCTURE)

        u, post, mix = hc_pre_ref(streams, block, "ffn", config, STRUCTURE)
        x = rms_norm_ref(u, block.tensor("ffn_norm.weight"), config.norm_eps)
        hashed = config.is_hash_layer(layer)
        y, load = _experts(x, flat, block.at("ffn"), hashed, config)
        if not hashed:
            loads[layer] = load
        streams = hc_post_ref(y, streams, post, mix, STRUCTURE)

    streams = streams.unflatten(0, (batch, length))[:, probe].flatten(0, 1)  # [B * P, n, D]
    collapsed = collapse_ref(streams, weights, config, STRUCTURE)
    normed = rms_norm_ref(collapsed, weights.tensor("norm.weight"), config.norm_eps)
    logits = (normed @ weights.matrix("head").T).unflatten(0, (batch, -1))  # [B, P, V]
    return Trace(logits, index, loads)


def _attention(
    x: Tensor,
    weights: Weights,
    layer: int,
    positions: Tensor,
    batch: int,
    config: ModelConfig,
    select: Select,
    probe: Tensor,
) -> tuple[Tensor, IndexTrace | None]:
    """One attention layer over ``[B * T, D]``."""
    ratio, freqs = config.ratio(layer), layer_frequencies(config, layer, STRUCTURE)
    q, latent = queries_ref(x, weights, positions, freqs, config, STRUCTURE)
    kv = keys_ref(x, weights, positions, freqs, config, STRUCTURE).unflatten(0, (batch, -1))  # [B, T, d]
    q = q.unflatten(0, (batch, -1))  # [B, T, H, d]
    length = kv.shape[1]

    entries, allowed, traced = kv.new_zeros(batch, 0, config.head_dim), torch.ones(length, 0, dtype=torch.bool), None
    scores = visible = None
    if ratio != SWA:
        entries = _entries(x.unflatten(0, (batch, -1)), weights.at("compressor"), ratio, freqs, config)  # [B, N, d]
        allowed = visible = torch.arange(entries.shape[1]) < ((torch.arange(length) + 1) // ratio)[:, None]  # [T, N]
    if ratio == C4:
        at = torch.arange(length) if select == "topk" else probe
        scores = _index_scores(x, latent, weights.at("indexer"), at, batch, freqs, config)  # [B, len(at), N]
        if select == "topk":
            assert visible is not None
            allowed = visible & _best(scores.detach().masked_fill(~visible, _HIDDEN), config.index_topk)  # [B, T, N]
            scores = scores[:, probe]
    o, mass = _attend(q, kv, entries, allowed, weights.tensor("attn_sink"), config)
    if scores is not None and visible is not None:
        traced = IndexTrace(scores, mass.detach()[:, probe], visible[probe])
    return output_ref(o.flatten(0, 1), weights, positions, freqs, config, STRUCTURE), traced


def _entries(x: Tensor, weights: Weights, ratio: int, freqs: Tensor, config: ModelConfig) -> Tensor:
    """All entries of every sequence: ``[B, T, D]`` gives ``[B, T // r, d]``, normed and rotated."""
    batch, count = x.shape[0], x.shape[1] // ratio
    x = x[:, : count * ratio]
    kv = (x @ weights.matrix("wkv").T).unflatten(1, (count, ratio))  # [B, N, r, c]
    score = (x @ weights.matrix("wgate").T).unflatten(1, (count, ratio)) + weights.tensor("ape")
    if ratio == C4:
        dim = kv.shape[-1] // 2
        kv = torch.cat((_previous(kv[..., :dim], 0.0), kv[..., dim:]), dim=2)  # [B, N, 2 r, d]
        score = torch.cat((_previous(score[..., :dim], _HIDDEN), score[..., dim:]), dim=2)
    pooled = (torch.softmax(score, dim=2) * kv).sum(dim=2).flatten(0, 1)  # [B * N, d]
    normed = rms_norm_ref(pooled, weights.tensor("norm.weight"), config.norm_eps)
    return rotate_ref(normed, (torch.arange(count) * ratio).repeat(batch), freqs).unflatten(0, (batch, count))


def _previous(groups: Tensor, first: float) -> Tensor:
    """Every group's predecessor; the first group's is filled with ``first``."""
    return torch.cat((torch.full_like(groups[:, :1], first), groups[:, :-1]), dim=1)


def _index_scores(
    x: Tensor, latent: Tensor, weights: Weights, at: Tensor, batch: int, freqs: Tensor, config: ModelConfig
) -> Tensor:
    """Scores of every entry at some positions, ``[B, len(at), N]``; the layer's input gets no gradient from them."""
    x, latent = x.detach().unflatten(0, (batch, -1)), latent.detach().unflatten(0, (batch, -1))  # [B, T, ..]
    keys = _entries(x, weights.at("compressor"), C4, freqs, config)  # [B, N, di]
    rows, where = x[:, at].flatten(0, 1), at.repeat(batch)
    q = index_queries_ref(latent[:, at].flatten(0, 1), weights, where, freqs, config, STRUCTURE)  # [B * P, Hi, di]
    head_weights = index_head_weights_ref(rows, weights, config, STRUCTURE)  # [B * P, Hi]
    responses = torch.relu(torch.einsum("bphi,bni->bphn", q.unflatten(0, (batch, -1)), keys))
    return torch.einsum("bph,bphn->bpn", head_weights.unflatten(0, (batch, -1)), responses)


def _best(scores: Tensor, topk: int) -> Tensor:
    """Mask of the ``topk`` largest of the last dimension, ties to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _attend(
    q: Tensor, kv: Tensor, entries: Tensor, allowed: Tensor, sink: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Softmax over window and entries with a sink.

    Args:
        q: ``[B, T, H, d]``.
        kv: ``[B, T, d]`` window keys.
        entries: ``[B, N, d]``.
        allowed: bool ``[T, N]`` or ``[B, T, N]``.
        sink: ``[H]``.
        config: W and the scale.

    Returns:
        o ``[B, T, H, d]`` and the attention of entries summed over heads, ``[B, T, N]``.
    """
    length, width, count = q.shape[1], config.window_size, entries.shape[1]
    pad = -length % width
    blocks = functional.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, width))  # [B, b, W, H, d]
    own = functional.pad(kv, (0, 0, 0, pad)).unflatten(1, (-1, width))  # [B, b, W, d]
    near = torch.cat((_previous(own, 0.0), own), dim=2)  # [B, b, 2 W, d]

    recent = torch.einsum("bgthd,bgkd->bgthk", blocks, near)  # [B, b, W, H, 2 W]
    distance = width + torch.arange(width)[:, None] - torch.arange(2 * width)  # [W, 2 W] query minus key
    inside = ((distance >= 0) & (distance < width)).expand(blocks.shape[1], -1, -1).clone()
    inside[0, :, :width] = False  # the first block has no predecessor
    recent = recent.masked_fill(~inside[None, :, :, None, :], _HIDDEN).flatten(1, 2)[:, :length]  # [B, T, H, 2 W]
    distant = torch.einsum("bthd,bnd->bthn", q, entries)
    distant = distant.masked_fill(~allowed.expand(q.shape[0], -1, -1)[:, :, None, :], _HIDDEN)  # [B, T, H, N]

    scores = torch.cat((recent, distant), dim=-1) * config.softmax_scale
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1), sink)  # [B, T, H]
    p_recent, p_distant = torch.exp(scores - total[..., None]).split((2 * width, count), dim=-1)
    p_blocks = functional.pad(p_recent, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, width))
    o = torch.einsum("bgthk,bgkd->bgthd", p_blocks, near).flatten(1, 2)[:, :length]
    return o + torch.einsum("bthn,bnd->bthd", p_distant, entries), p_distant.sum(dim=2)


def _experts(
    x: Tensor, token_ids: Tensor, weights: Weights, hashed: bool, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Routed and shared experts over ``[N, D]``; and int64 ``[E]``, how many tokens each expert got."""
    n_experts, top_k = config.router.n_experts, config.router.top_k
    route_weights, experts = route_ref(x, token_ids, weights.at("gate"), hashed, config)  # [N, k]
    order = experts.flatten().argsort(stable=True)  # [N * k] slots, expert by expert
    load = experts.flatten().bincount(minlength=n_experts)  # [E]
    starts = load.cumsum(0) - load
    owner = experts.flatten()[order]
    room = int(load.max())
    places = owner * room + torch.arange(owner.shape[0]) - starts[owner]  # row of the padded batch

    def stack(name: str) -> Tensor:
        return torch.stack([weights.at(f"experts.{e}").matrix(name) for e in range(n_experts)])

    padded = x.new_zeros(n_experts * room, x.shape[1]).index_copy(0, places, x[order // top_k])
    inputs = padded.unflatten(0, (n_experts, room))  # [E, room, D]
    gate, up = inputs @ stack("w1").mT, inputs @ stack("w3").mT  # [E, room, I]
    y = (clamped_swiglu_ref(gate, up, config.swiglu_limit) @ stack("w2").mT).flatten(0, 1)[places]  # [N * k, D]
    routed = torch.zeros_like(x).index_add(0, order // top_k, y * route_weights.flatten()[order][:, None])
    return routed + shared_expert_ref(x, weights.at("shared_experts"), config.swiglu_limit, STRUCTURE), load
