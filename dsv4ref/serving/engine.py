"""The decode engine: continuous batching of a V4 model over paged FP8 caches, by the reference or by kernels.

A step lets waiting requests join, computes one batch (a token of every decoding request, then chunks of prompts), and
takes a token of highest logit for everybody whose known tokens are computed. `Features` chooses the operations; what it
does not name is the reference's::

    all rows at once          embedding, residual streams, query and key paths, output projection, router, experts, head
    decode rows at once       sparse attention over two ragged scopes
    request by request        window and compressed rows, indexer selection, attention of prompt rows

A step is a transaction: states are values and join their request when all of it has succeeded, and the cache rows that
a failed step wrote are written again before anybody reads them. So an exception leaves every request as it was.

Source: the order of a step as in vLLM's V1 engine; the model: dsv4ref.ref.model. For serving, use vLLM: this engine has
no server, no tensor parallelism, no sampling but greedy, and computes most of a step in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA, ModelConfig
from dsv4ref.ref.attention import keys_ref, queries_ref, select_entries_ref, update_rows_ref
from dsv4ref.ref.experts import routed_experts_ref, shared_expert_ref
from dsv4ref.ref.hyper_connections import hc_post_ref, hc_pre_ref
from dsv4ref.ref.model import Model, check_tokens, head_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.rope import layer_frequencies
from dsv4ref.ref.state import LayerState, State
from dsv4ref.ref.weights import Weights, block_name
from dsv4ref.serving.batch import Batch, SlotLists, make_batch, prompt_scope
from dsv4ref.serving.blocks import CacheSizes, PagedCaches, RequestRows
from dsv4ref.serving.features import Features
from dsv4ref.serving.operations import compose, reference_attention
from dsv4ref.serving.requests import Request, RequestQueue, Status, greedy

__all__ = ["DecodeEngine", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        tokens: request id -> the token generated for it.
        logits: request id -> the logits ``[V]`` that it was taken from.
        done: requests that left since the last step, in order; the engine knows them no longer.
        decoded: decode rows computed.
        prefilled: prompt rows computed.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    logits: Mapping[int, Tensor] = field(default_factory=dict)
    done: tuple[Request, ...] = ()
    decoded: int = 0
    prefilled: int = 0


class DecodeEngine:
    """Requests in, tokens out.

    Args:
        model: config, weights, formats; 512-wide heads and FP8 keys, for the 584-byte caches. MTP blocks are not run.
        features: which optimisations; all off is the reference.
        slots: requests that run at once; more wait.
        max_length: tokens that one request computes at most.
        cache_tokens: tokens that the compressed caches hold over all requests; by default every slot may hold
            ``max_length``. With less, a request waits until pages for its longest possible length are free.
        chunk: prompt tokens of a step at most, over all requests.
        block_size: tokens per window block.
        page_tokens: tokens per page of the compressed caches.
        device: where the FP8 caches, the lists and the kernels are; the reference computes on the host.

    Attributes:
        caches: the paged caches and their pools.
        operations: what `Features` composed.

    Raises:
        TypeError, ValueError: sizes that cannot be, a model that the caches or the features do not fit, a device on
            which kernels cannot run.
        RuntimeError: the caches could not be allocated.
    """

    def __init__(
        self,
        model: Model,
        features: Features | None = None,
        *,
        slots: int,
        max_length: int,
        cache_tokens: int | None = None,
        chunk: int = 256,
        block_size: int = 64,
        page_tokens: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        config = model.config
        self.model = model
        self.features = Features() if features is None else features
        self._queue = RequestQueue(slots, chunk)
        sizes = CacheSizes(
            slots=slots, max_length=max_length, cache_tokens=max_length if cache_tokens is None else cache_tokens,
            chunk=chunk, block_size=block_size, page_tokens=page_tokens,
        )  # fmt: skip
        if cache_tokens is None:  # whole pages, request by request
            sizes = replace(sizes, cache_tokens=slots * -(-max_length // page_tokens) * page_tokens)
        if max_length > config.max_position:
            raise ValueError(
                f"max_length: got {max_length}, expected at most {config.max_position}, {config.name}'s positions"
            )
        self.operations = compose(model, self.features, device)
        self.caches = PagedCaches(config, sizes, model.numerics, device)
        self._prompt_attention = reference_attention(model)
        # By ratio, the most slots of a row: the window's under 0, then each kind of compressed entries.
        self._widths = {SWA: config.window_size, C4: config.index_topk, C128: max(1, max_length // C128)}
        self._lists = {
            ratio: SlotLists(slots, self._widths[ratio], device, self.operations.prepare_lists)
            for ratio in sorted({SWA, *config.main_ratios})
        }
        # NaN: a row that an operation leaves unwritten is heard.
        shape = (slots, config.n_heads, config.head_dim)
        self._attended = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        self._states: dict[int, State] = {}
        self._left: list[Request] = []
        self._next_id = 0
        self._stepping = False

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int] | Tensor, max_new_tokens: int, *, stop: Iterable[int] = ()) -> int:
        """Queue a request; it joins in the first step that has a slot and blocks for it, in order of submission.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens to generate at most, at least 1.
            stop: token ids that end the answer.

        Returns:
            The request's id.

        Raises:
            ValueError: an empty prompt, tokens outside the vocabulary, or more tokens than ``max_length``.
            TypeError: numbers that are no integers.
        """
        config, most = self.model.config, self.caches.sizes.max_length
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected a positive integer")
        tokens = _token_ids("prompt", prompt, config)
        if not tokens:
            raise ValueError("prompt: got no tokens, expected at least one: there is nothing to continue")
        request = Request(self._next_id, tokens, max_new_tokens, frozenset(_token_ids("stop", stop, config)))
        if request.longest > most:
            raise ValueError(
                f"prompt: got {len(tokens)} tokens and max_new_tokens = {max_new_tokens}, which computes "
                f"{request.longest}; expected at most max_length = {most}"
            )
        self._next_id += 1
        self._queue.waiting.append(request)
        return request.id

    def cancel(self, id: int) -> None:
        """Take a request out: at once, or, from within a step, when that ends; its token of that step is dropped.

        Raises:
            ValueError: no request of that id waits or runs.
        """
        request = self._queue.find(id)
        request.cancelled = True
        if not self._stepping:
            self._leave(request, Status.CANCELLED)

    @property
    def idle(self) -> bool:
        """Whether nobody waits or runs and everybody who left has been handed over."""
        return not (self._queue.waiting or self._queue.running or self._left)

    @property
    def running(self) -> tuple[int, ...]:
        """Ids of the requests that run, in the order in which they joined."""
        return tuple(request.id for request in self._queue.running)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Ids of the requests that wait, first come first."""
        return tuple(request.id for request in self._queue.waiting)

    def check_blocks(self) -> None:
        """Every cache block is free or held by a request that runs.

        Raises:
            RuntimeError: names the pool and the block or owner that is wrong.
        """
        self.caches.check(self.running)

    def _leave(self, request: Request, status: Status, error: str | None = None) -> None:
        self._queue.leave(request, status, error)
        if self._states.pop(request.id, None) is not None:
            self.caches.close(request.id)
        self._left.append(request)

    def _join(self) -> None:
        """Everybody who has a slot and blocks, in order: nobody overtakes a request that waits for its blocks."""
        while (request := self._queue.next()) is not None and self.caches.fits(request.longest):
            try:
                state = self.caches.open(request.id, request.longest)
            except (RuntimeError, MemoryError) as error:
                self._leave(request, Status.FAILED, f"its caches could not be made: {error}")
                continue
            self._states[request.id] = state
            self._queue.join(request)

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self) -> dict[int, Request]:
        """Step until nobody is left; returns everybody who left meanwhile, by id."""
        done: dict[int, Request] = {}
        while not self.idle:
            done |= {request.id: request for request in self.step().done}
        return done

    @torch.no_grad()
    def step(self) -> StepResult:
        """Join, compute one batch, take tokens, leave.

        Returns:
            What happened; empty if nobody runs.

        Raises:
            RuntimeError: called from within a step. Whatever an operation raises comes through, and every request is
                as it was before: the step can be tried again, or a request cancelled first.
        """
        if self._stepping:
            raise RuntimeError("step: called from within a step, expected the next one after it")
        self._stepping = True
        result = StepResult()
        try:
            self._join()
            segments = self._queue.schedule()
            if segments:
                batch = make_batch(segments)
                logits, states = self._forward(batch)
                result = self._commit(batch, logits, states)
        finally:
            self._stepping = False
            for request in [r for r in (*self._queue.running, *self._queue.waiting) if r.cancelled]:
                self._leave(request, Status.CANCELLED)
        done, self._left = tuple(self._left), []
        return replace(result, done=done)

    def _commit(self, batch: Batch, logits: Tensor, states: Sequence[State]) -> StepResult:
        """Give every request its new state, and its token if it is due one."""
        for segment, state in zip(batch.segments, states, strict=True):
            self._states[segment.request.id] = state
            segment.request.computed = segment.end
        tokens, rows = {}, {}
        for number, token, row in zip(batch.sampled, greedy(logits), logits, strict=True):
            request = batch.segments[number].request
            if request.cancelled:
                continue
            if token is None:
                self._leave(request, Status.FAILED, f"logits after {request.length} tokens are not finite")
                continue
            tokens[request.id], rows[request.id] = token, row
            if request.take(token):
                self._leave(request, Status.FINISHED)
        prefilled = int(batch.positions.numel()) - batch.decodes
        return StepResult(tokens, rows, decoded=batch.decodes, prefilled=prefilled)

    # --- the model ----------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> tuple[Tensor, list[State]]:
        """Logits ``[len(batch.sampled), V]``, and every segment's state after it."""
        model, config, numerics = self.model, self.model.config, self.model.numerics
        states = [self._states[segment.request.id] for segment in batch.segments]
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
            y, layer_states = self._attention(normed, weights.at("attn"), layer, batch, before)
            for collected, layer_state in zip(after, layer_states, strict=True):
                collected.append(layer_state)
            streams = hc_post_ref(y, streams, post, mix, numerics)

            u, post, mix = hc_pre_ref(streams, weights, "ffn", config, numerics)
            normed = numerics.round(rms_norm_ref(u, weights.tensor("ffn_norm.weight"), config.norm_eps))
            y = self._experts(normed, weights.at("ffn"), layer, batch)
            streams = hc_post_ref(y, streams, post, mix, numerics)
        logits = head_ref(streams[batch.sampled_rows], model.weights, model)
        ends = [segment.end for segment in batch.segments]
        return logits, [State(end, tuple(layers)) for end, layers in zip(ends, after, strict=True)]

    def _attention(
        self, x: Tensor, weights: Weights, layer: int, batch: Batch, before: Sequence[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """One attention layer: y ``[T, D]`` of x ``[T, D]``, and every segment's state of the layer."""
        config, numerics = self.model.config, self.model.numerics
        ratio, freqs = config.ratio(layer), layer_frequencies(config, layer, numerics)
        q, qr = queries_ref(x, weights, batch.positions, freqs, config, numerics)
        kv = keys_ref(x, weights, batch.positions, freqs, config, numerics)

        states: list[LayerState] = []
        window: list[Tensor] = []  # per row, slots
        compressed: list[Tensor] = []
        for rows, state in zip(batch.rows, before, strict=True):
            positions = batch.positions[rows]
            state = update_rows_ref(x[rows], kv[rows], weights, ratio, freqs, state, config, numerics)
            chosen = select_entries_ref(x[rows], qr[rows], weights, ratio, positions, freqs, state, config, numerics)
            window += [_slots(state.window, _window(p, config.window_size)) for p in positions.tolist()]
            if ratio != SWA:
                compressed += [_slots(state.compressed, entries) for entries in chosen]
            oldest = int(positions[-1]) + 2 - config.window_size  # that the next token still sees
            states.append(replace(state, window=state.window.forget(oldest)))

        o = self._attend(q, weights.tensor("attn_sink"), layer, batch.decodes, window, compressed)
        return self.operations.project(numerics.round(o), layer, batch.positions, freqs), states

    def _attend(
        self, q: Tensor, sink: Tensor, layer: int, decodes: int, window: list[Tensor], compressed: list[Tensor]
    ) -> Tensor:
        """o ``[T, H, d]``: decode rows by the chosen operation, prompt rows by the reference."""
        caches, ratio = self.caches.layers[layer], self.model.config.ratio(layer)
        parts = []
        if decodes:
            scope = self._lists[SWA].scope(caches.window, window[:decodes])
            extra = None
            if caches.compressed is not None:
                extra = self._lists[ratio].scope(caches.compressed, compressed[:decodes])
            parts.append(self.operations.attend(q[:decodes], scope, extra, sink, self._attended[:decodes]))
        if decodes < q.shape[0]:
            scope, extra = prompt_scope(caches.window, window[decodes:], self._widths[SWA]), None
            if caches.compressed is not None:
                extra = prompt_scope(caches.compressed, compressed[decodes:], self._widths[ratio])
            parts.append(self._prompt_attention(q[decodes:], scope, extra, sink, self._attended[:0]))
        return torch.cat(parts)

    def _experts(self, x: Tensor, weights: Weights, layer: int, batch: Batch) -> Tensor:
        """The feed-forward part: `dsv4ref.ref.experts.moe_ref` with the chosen router."""
        config, numerics = self.model.config, self.model.numerics
        hashed = config.is_hash_layer(layer)
        route_weights, experts = self.operations.route(x, batch.token_ids, weights.at("gate"), hashed)
        routed = routed_experts_ref(x, route_weights, experts, weights.at("experts"), config.swiglu_limit, numerics)
        shared = shared_expert_ref(x, weights.at("shared_experts"), config.swiglu_limit, numerics)
        return numerics.round(routed + shared)


def _token_ids(name: str, given: Iterable[int] | Tensor, config: ModelConfig) -> tuple[int, ...]:
    """Token ids as a tuple, checked."""
    try:
        ids = given if isinstance(given, Tensor) else torch.tensor(list(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {given!r}, expected a sequence of token ids") from error
    if ids.dim() == 1 and not ids.numel():
        return ()
    check_tokens(ids, 0, config, name)
    return tuple(ids.tolist())


def _window(position: int, width: int) -> Tensor:
    """Positions that a query sees raw: int64 ``[min(position + 1, width)]``."""
    return torch.arange(max(0, position - width + 1), position + 1)


def _slots(rows: object, numbers: Tensor) -> Tensor:
    assert isinstance(rows, RequestRows), "the engine's states are made by its caches"
    return rows.slots(numbers)
