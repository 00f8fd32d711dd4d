"""A step's rows by the reference, with the operations that `Features` chose: prompts always, decode rows by default.

    all rows at once          embedding, residual streams, query and key paths, output projection, router, experts, head
    decode rows at once       sparse attention over two ragged scopes
    request by request        window and compressed rows, indexer selection, attention of prompt rows

It computes where the model's weights are; the caches and the lists of decode rows may be elsewhere. States are values:
nothing but rows of the caches has changed before the caller takes the new ones.

Source: dsv4ref.ref.model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA
from dsv4ref.ref.attention import keys_ref, queries_ref, select_entries_ref, update_rows_ref
from dsv4ref.ref.experts import shared_expert_ref
from dsv4ref.ref.hyper_connections import hc_post_ref, hc_pre_ref
from dsv4ref.ref.model import Model, head_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.rope import layer_frequencies
from dsv4ref.ref.state import LayerState, State
from dsv4ref.ref.weights import Weights, block_name
from dsv4ref.serving.batch import Batch, SlotLists, prompt_scope
from dsv4ref.serving.blocks import PagedCaches, RequestRows
from dsv4ref.serving.operations import Operations, reference_attention

__all__ = ["ReferenceForward"]


class ReferenceForward:
    """The model over paged caches.

    Args:
        model: config, weights, formats.
        caches: of the model.
        operations: of `dsv4ref.serving.operations.compose`; the lists' part of it is bound here.
    """

    def __init__(self, model: Model, caches: PagedCaches, operations: Operations) -> None:
        config, sizes = model.config, caches.sizes
        device = caches.layers[0].window.data.device
        self.model, self.caches = model, caches
        self._prompt_attention = reference_attention(model)
        self._freqs = tuple(
            layer_frequencies(config, layer, model.numerics).to(model.device) for layer in range(config.n_layers)
        )
        # By ratio, the most slots of a row: the window's under 0, then each kind of compressed entries.
        self._widths = {SWA: config.window_size, C4: config.index_topk, C128: max(1, sizes.max_length // C128)}
        self._lists = {
            ratio: SlotLists(sizes.slots, self._widths[ratio], device, operations.prepare_lists)
            for ratio in sorted({SWA, *config.main_ratios})
        }
        # NaN: a row that an operation leaves unwritten is heard.
        shape = (sizes.slots, config.n_heads, config.head_dim)
        self._attended = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)

    def __call__(self, batch: Batch, states: Sequence[State], operations: Operations) -> tuple[Tensor, list[State]]:
        """Compute a batch.

        Args:
            batch: at least one segment.
            states: of its segments.
            operations: what `Features` composed.

        Returns:
            Logits ``[len(batch.sampled), V]``, and every segment's state after it.

        Raises:
            ValueError: a state that does not fit, before any work. Whatever an operation raises.
        """
        model, config, numerics = self.model, self.model.config, self.model.numerics
        for segment, state in zip(batch.segments, states, strict=True):
            state.check_rows(config)
            state.check_room(config, segment.end - segment.begin)
        for lists in self._lists.values():
            lists.prepare(batch.decodes)

        embedded = numerics.round(model.weights.raw("embed.weight")[batch.token_ids].to(numerics.dtype))  # [T, D]
        streams = embedded[:, None, :].repeat(1, config.hc_mult, 1)  # [T, n, D]
        after: list[list[LayerState]] = [[] for _ in states]
        for layer in range(config.n_layers):
            weights = model.weights.at(block_name(config, layer))
            u, post, mix = hc_pre_ref(streams, weights, "attn", config, numerics)
            normed = numerics.round(rms_norm_ref(u, weights.tensor("attn_norm.weight"), config.norm_eps))
            before = [state.layers[layer] for state in states]
            y, layer_states = self._attention(normed, weights.at("attn"), layer, batch, before, operations)
            for collected, layer_state in zip(after, layer_states, strict=True):
                collected.append(layer_state)
            streams = hc_post_ref(y, streams, post, mix, numerics)

            u, post, mix = hc_pre_ref(streams, weights, "ffn", config, numerics)
            normed = numerics.round(rms_norm_ref(u, weights.tensor("ffn_norm.weight"), config.norm_eps))
            y = self._experts(normed, weights.at("ffn"), layer, batch, operations)
            streams = hc_post_ref(y, streams, post, mix, numerics)
        logits = head_ref(streams[batch.sampled_rows], model.weights, model)
        ends = [segment.end for segment in batch.segments]
        return logits, [State(end, tuple(layers)) for end, layers in zip(ends, after, strict=True)]

    def _attention(
        self,
        x: Tensor,
        weights: Weights,
        layer: int,
        batch: Batch,
        before: Sequence[LayerState],
        operations: Operations,
    ) -> tuple[Tensor, list[LayerState]]:
        """One attention layer: y ``[T, D]`` of x ``[T, D]``, and every segment's state of the layer."""
        config, numerics = self.model.config, self.model.numerics
        ratio, freqs = config.ratio(layer), self._freqs[layer]
        q, qr = queries_ref(x, weights, batch.positions, freqs, config, numerics)
        kv = keys_ref(x, weights, batch.positions, freqs, config, numerics)

        states: list[LayerState] = []
        window: list[Tensor] = []  # per row, slots
        compressed: list[Tensor] = []
        for segment, rows, state in zip(batch.segments, batch.rows, before, strict=True):
            positions = batch.positions[rows]
            state = update_rows_ref(x[rows], kv[rows], weights, ratio, freqs, state, config, numerics)
            chosen = select_entries_ref(x[rows], qr[rows], weights, ratio, positions, freqs, state, config, numerics)
            window += [_slots(state.window, _window(p, config.window_size)) for p in range(segment.begin, segment.end)]
            if ratio != SWA:
                compressed += [_slots(state.compressed, entries) for entries in chosen]
            oldest = segment.end + 1 - config.window_size  # that the next token still sees
            states.append(replace(state, window=state.window.forget(oldest)))

        o = self._attend(q, weights.tensor("attn_sink"), layer, batch.decodes, window, compressed, operations)
        return operations.project(numerics.round(o), layer, batch.positions, freqs), states

    def _attend(
        self,
        q: Tensor,
        sink: Tensor,
        layer: int,
        decodes: int,
        window: list[Tensor],
        compressed: list[Tensor],
        operations: Operations,
    ) -> Tensor:
        """o ``[T, H, d]``: decode rows by the chosen operation, prompt rows by the reference."""
        caches, ratio = self.caches.layers[layer], self.model.config.ratio(layer)
        parts = []
        if decodes:
            scope = self._lists[SWA].scope(caches.window, window[:decodes])
            extra = None
            if caches.compressed is not None:
                extra = self._lists[ratio].scope(caches.compressed, compressed[:decodes])
            parts.append(operations.attend(q[:decodes], scope, extra, sink, self._attended[:decodes]))
        if decodes < q.shape[0]:
            scope, extra = prompt_scope(caches.window, window[decodes:], self._widths[SWA]), None
            if caches.compressed is not None:
                extra = prompt_scope(caches.compressed, compressed[decodes:], self._widths[ratio])
            parts.append(self._prompt_attention(q[decodes:], scope, extra, sink, self._attended[:0]))
        return torch.cat(parts)

    def _experts(self, x: Tensor, weights: Weights, layer: int, batch: Batch, operations: Operations) -> Tensor:
        """The feed-forward part: `dsv4ref.ref.experts.moe_ref` with the chosen router and experts."""
        config, numerics = self.model.config, self.model.numerics
        hashed = config.is_hash_layer(layer)
        route_weights, experts = operations.route(x, batch.token_ids, weights.at("gate"), hashed)
        routed = operations.experts(x, route_weights, experts, layer)
        shared = shared_expert_ref(x, weights.at("shared_experts"), config.swiglu_limit, numerics)
        return numerics.round(routed + shared)


def _window(position: int, width: int) -> Tensor:
    """Positions that a query sees raw: int64 ``[min(position + 1, width)]``."""
    return torch.arange(max(0, position - width + 1), position + 1)


def _slots(rows: object, numbers: Tensor) -> Tensor:
    assert isinstance(rows, RequestRows), "the engine's states are made by its caches"
    return rows.slots(numbers)
