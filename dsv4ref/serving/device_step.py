"""One batch size's decode step as device work alone: it reads inputs at fixed addresses and leaves tokens at others.

A step of n rows, each the next token of one request or padding::

    positions, slots, tokens      inputs; the step ends by writing what the next one needs over them
    every layer                   keys into the window cache, entries into compressed ones, lists, attention, experts
    logits, answers               outputs

Everything that differs from row to row is an address or a mask made on the device: whether a row is a token (its
position is not -1), whether its token closes a group (``(p + 1) mod r == 0``), which slot an entry has. Rows that have
nothing to write write into the caches' bins. So the step is one sequence of launches whatever its rows are, and may be
captured once and replayed for all of them (`dsv4ref.serving.device_decoder`).

A step may be repeated from the same inputs: what it writes at position p is a function of the token and of earlier
positions, and nobody reads what it overwrites.

Source: the formulas of dsv4ref.ref; buffers indexed by request slot as in vLLM's DeepSeek-V4 backend on ROCm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.sparse_mla.topk import TopkScratch, select
from dsv4ref.ref.attention import keys_ref, kv_format_ref, queries_ref
from dsv4ref.ref.experts import shared_expert_ref
from dsv4ref.ref.hyper_connections import hc_post_ref, hc_pre_ref
from dsv4ref.ref.indexer import index_head_weights_ref
from dsv4ref.ref.model import Model, head_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.rope import layer_frequencies, rotate_ref
from dsv4ref.ref.weights import Weights, block_name
from dsv4ref.serving.blocks import LayerCaches, PagedCaches
from dsv4ref.serving.decode_lists import DecodeLists, ListGeometry
from dsv4ref.serving.full_window import choose_entries
from dsv4ref.serving.operations import Operations
from dsv4ref.serving.resident import index_values, write_entries
from dsv4ref.serving.slot_states import LayerTails, SlotStates
from dsv4ref.serving.tails import Tail, append_and_pool, place_rows

__all__ = ["NO_ANSWER", "DeviceStep", "Rows"]

NO_ANSWER = -1
"""The answer of a row whose logits are not finite."""


@dataclass(frozen=True)
class Rows:
    """What a step computes: one token of each of several requests; lists, since the host has them in every step.

    Args:
        slots: the requests'.
        positions: of the tokens.
        tokens: their ids.
    """

    slots: Sequence[int] = ()
    positions: Sequence[int] = ()
    tokens: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.slots)

    def followed_by(self, answers: Sequence[int]) -> Rows:
        """The next tokens of the same requests."""
        return Rows(self.slots, [position + 1 for position in self.positions], answers)


@dataclass(frozen=True)
class _Layer:
    """What is fixed about a layer."""

    number: int
    ratio: int
    weights: Weights
    freqs: Tensor
    caches: LayerCaches
    tails: LayerTails


@dataclass(frozen=True)
class _Rows:
    """The step's rows as the layers read them, made once per step on the device.

    Args:
        live: bool ``[n]``, whether a row is a token.
        positions: int64 ``[n]``, 0 for padding.
        slots: int64 ``[n]``, the padding slot for padding.
        tokens: int64 ``[n]``.
    """

    live: Tensor
    positions: Tensor
    slots: Tensor
    tokens: Tensor


class DeviceStep:
    """Buffers and device work of one batch size.

    Args:
        rows: of the batch size.
        model: resident on the caches' device, as `dsv4ref.serving.resident.resident_model` makes it.
        caches: the engine's.
        states: the requests' slots.
        skip_full: C4 rows that see no more entries than top-k take all of them, and no logits are made for them.

    Attributes:
        tokens: int64 ``[rows]``, the tokens to compute; the step writes its answers over them.
        lists: positions and slots of the rows, and the ragged lists.
        answers: int64 ``[rows]``, the token of highest logit per row, or `NO_ANSWER`.
    """

    def __init__(self, rows: int, model: Model, caches: PagedCaches, states: SlotStates, *, skip_full: bool) -> None:
        config, sizes = model.config, caches.sizes
        device = caches.layers[0].window.data.device
        self.rows, self.model, self._states, self._skip_full = rows, model, states, skip_full
        self._layers = tuple(
            _Layer(
                number, config.ratio(number), model.weights.at(block_name(config, number)),
                layer_frequencies(config, number, model.numerics).to(device), caches.layers[number],
                states.tails[number],
            )
            for number in range(config.n_layers)
        )  # fmt: skip
        self._ratios = frozenset(config.main_ratios)

        def slots(ratio: int) -> int:
            held = [layer.caches.compressed for layer in self._layers if layer.ratio == ratio]
            return held[0].rows if held and held[0] is not None else 1

        geometry = ListGeometry(
            topk=config.index_topk, context=sizes.max_length, swa_slots=caches.layers[0].window.rows,
            c4_slots=slots(C4), c128_slots=slots(C128), window=config.window_size, swa_block=sizes.block_size,
            page=sizes.page_tokens,
        )  # fmt: skip
        tables = (states.window_table, states.page_table)
        self.lists = DecodeLists(rows, sizes.slots + 1, geometry, device, tables)
        columns = max(sizes.max_length // C4, 1) if C4 in self._ratios else 1
        self._scratch = TopkScratch.allocate(rows, columns, config.index_topk, device)
        shape = (rows, config.n_heads, config.head_dim)
        # NaN: a row that an operation leaves unwritten is heard.
        self._attended = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.answers = torch.full((rows,), NO_ANSWER, dtype=torch.int64, device=device)

    def addresses(self) -> dict[str, int]:
        """Where everything lies that a captured step keeps between replays, by name."""
        mine = {"tokens": self.tokens, "answers": self.answers, "attended": self._attended, **vars(self._scratch)}
        return {**self.lists.addresses(), **{name: tensor.data_ptr() for name, tensor in mine.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables that all batch sizes share left out."""
        shared = self._states.window_table.nbytes + self._states.page_table.nbytes
        mine = (self.tokens, self.answers, self._attended, *vars(self._scratch).values())
        return self.lists.nbytes - shared + sum(tensor.nbytes for tensor in mine)

    def load(self, rows: Rows) -> None:
        """Copy a step's rows into place and mark those behind them as padding; the host's part.

        Args:
            rows: at most as many as the batch size.

        Raises:
            ValueError: more.
        """
        if len(rows) > self.rows:
            raise ValueError(f"rows: got {len(rows)}, expected at most {self.rows}")
        columns = torch.tensor([rows.positions, rows.slots, rows.tokens], dtype=torch.int64).to(self.tokens.device)
        positions, slots = columns[:2].to(torch.int32)
        self.lists.place(positions, slots)
        self.tokens[: len(rows)].copy_(columns[2])
        self.tokens[len(rows) :].zero_()

    def run(self, operations: Operations) -> Tensor:
        """Compute the step: device work only, safe to capture.

        Args:
            operations: of `dsv4ref.serving.operations.compose`; no switch is read here.

        Returns:
            Logits ``[rows, V]``; of no meaning in padding rows.
        """
        model, config, numerics = self.model, self.model.config, self.model.numerics
        step = self.lists.step
        live = step.positions >= 0
        slots = torch.where(live, step.requests, self._states.padding).to(torch.int64)
        rows = _Rows(live, step.positions.clamp(min=0).to(torch.int64), slots, self.tokens)
        self.lists.list_swa()
        if C128 in self._ratios:
            self.lists.list_c128()

        embedded = numerics.round(model.weights.raw("embed.weight")[rows.tokens].to(numerics.dtype))  # [n, D]
        streams = embedded[:, None, :].repeat(1, config.hc_mult, 1)  # [n, streams, D]
        for layer in self._layers:
            u, post, mix = hc_pre_ref(streams, layer.weights, "attn", config, numerics)
            normed = numerics.round(rms_norm_ref(u, layer.weights.tensor("attn_norm.weight"), config.norm_eps))
            streams = hc_post_ref(self._attention(normed, layer, rows, operations), streams, post, mix, numerics)

            u, post, mix = hc_pre_ref(streams, layer.weights, "ffn", config, numerics)
            normed = numerics.round(rms_norm_ref(u, layer.weights.tensor("ffn_norm.weight"), config.norm_eps))
            streams = hc_post_ref(self._feed_forward(normed, layer, rows, operations), streams, post, mix, numerics)
        logits = head_ref(streams, model.weights, model)
        self._answer(logits, rows)
        return logits

    def _answer(self, logits: Tensor, rows: _Rows) -> None:
        """Take the tokens, and make them the next step's; last, so that a step that fails has kept its inputs."""
        finite = torch.isfinite(logits).all(dim=1)
        self.answers.copy_(torch.where(finite, logits.argmax(dim=1), NO_ANSWER))
        self.tokens.copy_(torch.where(rows.live & finite, self.answers, rows.tokens))
        self.lists.step.positions.add_(rows.live.to(torch.int32))

    # --- attention ----------------------------------------------------------------------------------------------------

    def _attention(self, x: Tensor, layer: _Layer, rows: _Rows, operations: Operations) -> Tensor:
        """y ``[n, D]`` of x ``[n, D]``."""
        config, numerics, weights = self.model.config, self.model.numerics, layer.weights.at("attn")
        q, qr = queries_ref(x, weights, rows.positions, layer.freqs, config, numerics)
        kv = keys_ref(x, weights, rows.positions, layer.freqs, config, numerics)
        window = layer.caches.window
        write_entries(window, self._slots(window.num_blocks, window.block_size, rows, rows.positions, rows.live), kv)
        extra = None
        if layer.ratio != SWA:
            extra = self._compressed(x, qr, weights, layer, rows)
        swa = self.lists.lists["swa"]
        scope = Scope(window, swa.indices, swa.indptr, config.window_size)
        o = operations.attend(q, scope, extra, weights.tensor("attn_sink"), self._attended)
        return operations.project(numerics.round(o), layer.number, rows.positions, layer.freqs)

    def _compressed(self, x: Tensor, qr: Tensor, weights: Weights, layer: _Layer, rows: _Rows) -> Scope:
        """Write the entries that the rows close, and list those that they attend to."""
        cache, tail = layer.caches.compressed, layer.tails.compressor
        assert cache is not None
        assert tail is not None
        closed = self._closed(x, weights.at("compressor"), tail, layer, rows)
        write_entries(
            cache,
            self._entry_slots(cache, layer.ratio, rows),
            kv_format_ref(closed, self.model.config, self.model.numerics),
        )
        name = "c4" if layer.ratio == C4 else "c128"
        if layer.ratio == C4:
            self._select(x, qr, weights.at("indexer"), layer, rows)
        listed = self.lists.lists[name]
        return Scope(cache, listed.indices, listed.indptr, self.lists.geometry.widths[name])

    def _closed(self, x: Tensor, weights: Weights, tail: Tail, layer: _Layer, rows: _Rows) -> Tensor:
        """The entry that each row's token closes, ``[n, d]``, before its format; of no meaning where it closes none."""
        pooled = append_and_pool(x, weights, tail, rows.slots, rows.positions)
        entry = _entry(rows, layer.ratio)
        norm = weights.tensor("norm.weight")
        return place_rows(
            pooled, entry, layer.ratio, norm, layer.freqs, self.model.config.norm_eps, self.model.numerics
        )

    def _select(self, x: Tensor, qr: Tensor, weights: Weights, layer: _Layer, rows: _Rows) -> None:
        """Write indexer keys, choose entries, list them."""
        config, numerics, step = self.model.config, self.model.numerics, self.lists.step
        keys, tail = layer.caches.index_keys, layer.tails.index
        assert keys is not None
        assert tail is not None
        assert layer.caches.compressed is not None
        key = index_values(self._closed(x, weights.at("compressor"), tail, layer, rows), numerics)
        slots = self._entry_slots(layer.caches.compressed, C4, rows)
        keys[slots // keys.shape[1], slots % keys.shape[1]] = key.to(keys.dtype)

        q = numerics.round(numerics.linear_input(qr) @ weights.matrix("wq_b").T)
        q = q.unflatten(-1, (config.index_n_heads, config.index_head_dim))  # [n, Hi, di]
        q = index_values(numerics.round(rotate_ref(q, rows.positions, layer.freqs)), numerics)
        queries = q.to(torch.bfloat16).contiguous()  # exact: the format's values
        head_weights = index_head_weights_ref(x, weights, config, numerics).contiguous()
        seen = torch.div(step.positions + 1, C4, rounding_mode="floor")  # 0 in padding
        given = (queries, head_weights, keys, step.pages, step.requests, seen)
        if self._skip_full:
            choose_entries(*given, longest=None, scratch=self._scratch, out=step.entries)
        else:
            select(*given, scratch=self._scratch, out=step.entries)
        self.lists.pack_c4()

    def _entry_slots(self, cache: KVCache, ratio: int, rows: _Rows) -> Tensor:
        """Where each row's closed entry goes, int64 ``[n]``; the bin where its token closes none."""
        closes = rows.live & ((rows.positions + 1) % ratio == 0)
        return self._slots(cache.num_blocks, cache.block_size, rows, _entry(rows, ratio), closes, pages=True)

    def _slots(
        self, blocks: int, block_size: int, rows: _Rows, numbers: Tensor, writes: Tensor, *, pages: bool = False
    ) -> Tensor:
        """Slots of numbered rows of a cache, int64 ``[n]``; the bin where a row does not write or has no block."""
        table = self._states.page_table if pages else self._states.window_table
        block = table[rows.slots, numbers // block_size].to(torch.int64)
        slot = block * block_size + numbers % block_size
        return torch.where(writes & (block >= 0), slot, (blocks - 1) * block_size)

    # --- experts ------------------------------------------------------------------------------------------------------

    def _feed_forward(self, x: Tensor, layer: _Layer, rows: _Rows, operations: Operations) -> Tensor:
        """The feed-forward part, ``[n, D]``: routed experts of the rows that are tokens, and the shared one."""
        config, numerics, weights = self.model.config, self.model.numerics, layer.weights.at("ffn")
        hashed = config.is_hash_layer(layer.number)
        route_weights, experts = operations.route(x, rows.tokens, weights.at("gate"), hashed)
        experts = torch.where(rows.live[:, None], experts, -1)
        routed = operations.step_experts(x, route_weights, experts, layer.number)
        shared = shared_expert_ref(x, weights.at("shared_experts"), config.swiglu_limit, numerics)
        return numerics.round(routed + shared)


def _entry(rows: _Rows, ratio: int) -> Tensor:
    """Number of the last entry that is closed once each row's token is; 0 before there is any."""
    return ((rows.positions + 1) // ratio - 1).clamp(min=0)
