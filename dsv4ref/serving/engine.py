"""The decode engine: continuous batching of a V4 model over paged FP8 caches, by the reference or by kernels.

A step lets waiting requests join, computes one batch (a token of every decoding request, then chunks of prompts), and
takes a token of highest logit for everybody whose known tokens are computed. `Features` chooses the operations, and who
computes what::

    prompts          `dsv4ref.serving.forward`, the reference on paged caches
    decode rows      the same, in the same pass; with ``device_step`` `dsv4ref.serving.device_decoder`, which takes a
                     request over from its prompt's state and is replayed from graphs with ``captured_steps``

A step is a transaction: states are values and join their request when all of it has succeeded, and the rows of caches
and slots that a failed step wrote are written again before anybody reads them. So an exception leaves every request as
it was.

Source: the order of a step as in vLLM's V1 engine; the model: dsv4ref.ref.model. For serving, use vLLM: this engine has
no server, no tensor parallelism, no sampling but greedy, and computes most of a step in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.model import Model, check_tokens
from dsv4ref.ref.state import State
from dsv4ref.serving.batch import make_batch
from dsv4ref.serving.blocks import CacheSizes, PagedCaches
from dsv4ref.serving.checkpoints import Checkpoint, check_fits, copied_request, read_caches, rebound, write_caches
from dsv4ref.serving.device_decoder import DeviceDecoder, default_sizes
from dsv4ref.serving.features import Features, check_available
from dsv4ref.serving.forward import ReferenceForward
from dsv4ref.serving.operations import compose
from dsv4ref.serving.requests import Request, RequestQueue, Segment, Status, greedy
from dsv4ref.serving.resident import resident_model

__all__ = ["DecodeEngine", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        tokens: request id -> the token generated for it.
        logits: request id -> the logits ``[V]`` that it was taken from, where they were computed; none if the engine
            does not keep them.
        done: requests that left since the last step, in order; the engine knows them no longer.
        decoded: decode rows computed.
        prefilled: prompt rows computed.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    logits: Mapping[int, Tensor] = field(default_factory=dict)
    done: tuple[Request, ...] = ()
    decoded: int = 0
    prefilled: int = 0


class _Computed(NamedTuple):
    """What a step has for a segment before anybody's request changes.

    Args:
        segment: whose.
        state: after it; None where the decoder has it.
        sampled: whether a token is due.
        token: that token; None where its logits are not finite.
        logits: ``[V]``, if they are kept.
    """

    segment: Segment
    state: State | None
    sampled: bool
    token: int | None = None
    logits: Tensor | None = None


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
        device: where the caches, the lists and the kernels are. The reference computes where the model's weights are,
            hence there too with ``resident_weights``.
        buckets: batch sizes of a device step, 1 to ``slots``; a batch runs in the smallest that holds it. By default
            the powers of two below ``slots``, and ``slots``. With ``captured_steps`` each is captured now, and larger
            batches run uncaptured.
        keep_logits: whether a step's result holds logits; a device step's must be copied for it.
        prompt_rows: prompts go through the device step as well, one token of each request and step, whatever the chunk:
            for many prompts at once, each of which the reference would compute row by row.

    Attributes:
        caches: the paged caches and their pools.
        operations: what `Features` composed; captured steps keep what was there when they were captured.
        decoder: what computes decode rows with ``device_step``; None without.

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
        buckets: Sequence[int] | None = None,
        keep_logits: bool = True,
        prompt_rows: bool = False,
    ) -> None:
        config = model.config
        self.model = model
        self.features = Features() if features is None else features
        self._queue = RequestQueue(slots, chunk, prompt_rows=prompt_rows)
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
        if buckets is not None and not self.features.device_step:
            raise ValueError(f"buckets: got {list(buckets)}, expected None without device_step")
        if prompt_rows and not self.features.device_step:
            raise ValueError("prompt_rows: got True, expected False without device_step")
        check_available(model, self.features)
        computing = resident_model(model, device) if self.features.resident_weights else model
        self.operations = compose(computing, self.features, device)
        self.caches = PagedCaches(config, sizes, model.numerics, device, computing.device)
        self._forward = ReferenceForward(computing, self.caches, self.operations)
        self.decoder: DeviceDecoder | None = None
        if self.features.device_step:
            sizes_of_batches = default_sizes(slots) if buckets is None else buckets
            skip_full = self.features.full_window_skip
            self.decoder = DeviceDecoder(computing, self.caches, sizes_of_batches, skip_full=skip_full)
            if self.features.captured_steps:
                self.decoder.capture(self.operations)
        self._keep_logits = keep_logits
        self._states: dict[int, State | None] = {}  # None: the decoder has it
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
        if request.id in self._states:
            del self._states[request.id]
            self.caches.close(request.id)
            if self.decoder is not None:
                self.decoder.leave(request.id)
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

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Where the running requests stand, to go on from there more than once; their prompts are computed.

        Raises:
            RuntimeError: nobody runs, or somebody waits or has a prompt to compute.
        """
        unready = [r.id for r in self._queue.running if not r.decoding]
        if unready or self._queue.waiting or not self._queue.running:
            raise RuntimeError(
                f"checkpoint: prompts of requests {unready} are not computed and {len(self._queue.waiting)} wait, "
                "expected requests that run and decode"
            )
        states = {request.id: self._state_of(request) for request in self._queue.running}
        return Checkpoint(
            self.model.config, self.caches.sizes, tuple(copied_request(r) for r in self._queue.running), states,
            {id: self.caches.window_pool.held(id) for id in states},
            {id: self.caches.page_pool.held(id) for id in states}, read_caches(self.caches),
        )  # fmt: skip

    def _state_of(self, request: Request) -> State:
        """A running request's state, handed back by the decoder if that has it."""
        if (state := self._states[request.id]) is not None:
            return state
        assert self.decoder is not None
        return self.decoder.states.hand_back(request.id, request.computed)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put these requests in the place of everybody who waits or runs, who are forgotten.

        Args:
            checkpoint: of an engine of the same model and sizes; not changed.

        Raises:
            ValueError: another model or sizes; nothing has changed.
            RuntimeError: called from within a step.
        """
        if self._stepping:
            raise RuntimeError("restore: called from within a step, expected it before the next one")
        check_fits(checkpoint, self.caches)
        if self.decoder is not None:
            for request in self._queue.running:
                self.decoder.leave(request.id)
        self._left.clear()
        self._queue.replace(copied_request(request) for request in checkpoint.requests)
        self.caches.window_pool.assign(checkpoint.window)
        self.caches.page_pool.assign(checkpoint.pages)
        write_caches(self.caches, checkpoint.caches)
        self._states = {id: rebound(state, self.caches) for id, state in checkpoint.states.items()}
        self._next_id = max(self._next_id, 1 + max(self._states))

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
                result = self._commit(segments, self._compute(segments))
        finally:
            self._stepping = False
            for request in [r for r in (*self._queue.running, *self._queue.waiting) if r.cancelled]:
                self._leave(request, Status.CANCELLED)
        done, self._left = tuple(self._left), []
        return replace(result, done=done)

    def _compute(self, segments: Sequence[Segment]) -> list[_Computed]:
        """What the step is to give every segment; no request has changed."""
        count = self._decoder_takes(segments)
        others = segments[count:]
        computed = self._decode(segments[:count]) if count else []
        if not others:
            return computed
        batch = make_batch(others, self._forward.model.device)
        before = [state for segment in others if (state := self._states[segment.request.id]) is not None]
        logits, states = self._forward(batch, before, self.operations)
        found = dict(zip(batch.sampled, zip(greedy(logits), logits, strict=True), strict=True))
        for number, (segment, state) in enumerate(zip(others, states, strict=True)):
            computed.append(_Computed(segment, state, number in found, *found.get(number, ())))
        return computed

    def _decoder_takes(self, segments: Sequence[Segment]) -> int:
        """How many of a step's segments, the first ones, the decoder computes."""
        if self.decoder is None:
            return 0
        if self._queue.prompt_rows or segments[-1].request.decoding:  # decoding requests come first
            return len(segments)
        return sum(segment.request.decoding for segment in segments)

    def _decode(self, segments: Sequence[Segment]) -> list[_Computed]:
        """The same for one token of each request, by the decoder."""
        assert self.decoder is not None
        ids, positions = [s.request.id for s in segments], [s.begin for s in segments]
        for id in ids:
            if (state := self._states[id]) is not None:
                self.decoder.join(id, state)
        rows = self.decoder.rows(ids, positions, [s.request.token(s.begin) for s in segments])
        answers, logits = self.decoder.decode(rows, self.operations)
        kept: Iterable[Tensor | None] = [None] * len(rows)
        if self._keep_logits:
            kept = logits.clone()  # the next step writes over them
        sampled = [s.samples for s in segments] if self._queue.prompt_rows else [True] * len(rows)
        given = zip(segments, sampled, answers, kept, strict=True)
        return [_Computed(segment, None, due, token, row) for segment, due, token, row in given]

    def _commit(self, segments: Sequence[Segment], computed: Sequence[_Computed]) -> StepResult:
        """Give every request its new state, and its token if it is due one."""
        tokens, rows, decoded, prefilled = {}, {}, 0, 0
        for (request, begin, end), state, sampled, token, logits in computed:
            if request.decoding:
                decoded += end - begin
            else:
                prefilled += end - begin
            self._states[request.id] = state
            request.computed = end
            if request.cancelled or not sampled:
                continue
            if token is None:
                self._leave(request, Status.FAILED, f"logits after {request.length} tokens are not finite")
                continue
            tokens[request.id] = token
            if self._keep_logits and logits is not None:
                rows[request.id] = logits
            if request.take(token):
                self._leave(request, Status.FINISHED)
        return StepResult(tokens, rows, decoded=decoded, prefilled=prefilled)


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
