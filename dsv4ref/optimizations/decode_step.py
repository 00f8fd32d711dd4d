"""Chapter 01: one decode step of the reference model, against recomputing the whole sequence for every step.

Baseline: prefill everything up to the step's last token again and keep the new rows. Optimised: what a server does, a
forward pass of the new tokens alone, over the state that the prefix left: window keys, compressed entries, indexer keys
and the compressors' open groups. Both run the same PyTorch functions. What the gate proves is that the state holds all
that a step needs, at positions where something changes hands (4 and 128), for steps of one and of several tokens, on
plain tensors and on paged FP8 caches.

There are two oracles, because quantisation is discontinuous. On plain tensors no format is applied, and the oracle
recomputes in float64. On paged caches DeepSeek's formats are on; a difference of one part in 10^7 may there round a
code the other way and then select another entry or expert. The oracle of a paged case is therefore the same step on
plain tensors that hold the dequantised values.

Source: DeepSeek-V4 inference/model.py, which decodes single tokens from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv4ref.config import C4, V4_TINY, ModelConfig
from dsv4ref.device import get_device
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.formats import kv_cache
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.optimizations import step_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.ref import attention, compressor
from dsv4ref.ref.checkpoint_writer import random_tensor
from dsv4ref.ref.compressor import CompressorState
from dsv4ref.ref.indexer import index_head_weights_ref, index_queries_ref, index_scores_ref, select_ref
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.numerics import DEFAULT, STRUCTURE, Numerics
from dsv4ref.ref.state import LayerState, PagedRows, Rows, State, paged_sequence
from dsv4ref.ref.weights import Weights, weight_shapes

__all__ = ["OPTIMIZATION", "StepInputs", "prefixed", "random_model"]

_WINDOW_BLOCK = 16
_PAGE_TOKENS = 128
"""Small pages: a sequence of some 250 tokens fills several, frees the first and takes them again."""


@dataclass(frozen=True)
class StepInputs:
    """A model, and one sequence cut into a prefix and steps.

    Args:
        model: random weights, and the formats to compute in.
        token_ids: int64 ``[p + n]``, the prefix and the tokens that steps process.
        prefix: p, tokens that are processed before the first step; may be 0.
        chunk: tokens of one forward pass over the prefix.
        steps: tokens of each step; they sum to n.
        dialect: e4m3 dialect of paged FP8 caches; None for plain tensors.
        order: int64 ``[layers, .]``, per layer the order in which a paged cache hands out blocks.
    """

    model: Model
    token_ids: Tensor
    prefix: int
    chunk: int
    steps: tuple[int, ...]
    dialect: Dialect | None
    order: Tensor

    @property
    def ends(self) -> list[int]:
        """Tokens processed after each step."""
        return [self.prefix + sum(self.steps[: index + 1]) for index in range(len(self.steps))]


def random_model(config: ModelConfig, seed: int, numerics: Numerics = STRUCTURE) -> Model:
    """A model with random weights, which keep activations of order 1, held in float32.

    Args:
        config: any small model.
        seed: of the weights.
        numerics: formats to compute in.
    """
    drawn = {name: random_tensor(name, config, seed) for name in weight_shapes(config)}
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in drawn.items()}
    return Model(config, tensors, numerics)


def _build(case: Case, device: str, seed: int) -> StepInputs:
    # CPU tensors whatever the device: the reference is the oracle of kernels, and needs none.
    prefix, steps, dialect = case.params["prefix"], case.params["steps"], case.params["dialect"]
    numerics = STRUCTURE if dialect is None else replace(DEFAULT, kv_dialect=dialect)
    model = random_model(V4_TINY, seed, numerics)
    rng = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(V4_TINY.vocab_size, (prefix + sum(steps),), generator=rng)
    order = torch.stack([torch.randperm(64, generator=rng) for _ in V4_TINY.main_ratios])
    return StepInputs(model, token_ids, prefix, case.params["chunk"], steps, dialect, order)


def _empty(inputs: StepInputs) -> State:
    """The sequence before its first token."""
    if inputs.dialect is None:
        return inputs.model.new_sequence()
    state = paged_sequence(
        inputs.model.config,
        max_tokens=len(inputs.token_ids),
        chunk=max(inputs.chunk, *inputs.steps),
        block_size=_WINDOW_BLOCK,
        page_tokens=_PAGE_TOKENS,
        dialect=inputs.dialect,
    )
    layers = zip(state.layers, inputs.order.tolist(), strict=True)
    return replace(state, layers=tuple(_shuffled(layer, order) for layer, order in layers))


def _shuffled(layer: LayerState, order: list[int]) -> LayerState:
    """With the caches' free blocks in another order: a pool that serves many sequences hands out any block."""

    def rows(given: Rows) -> Rows:
        assert isinstance(given, PagedRows)
        return replace(given, free=tuple(block for block in order if block in given.free))

    return replace(
        layer,
        window=rows(layer.window),
        compressed=None if layer.compressed is None else rows(layer.compressed),
    )


def prefixed(inputs: StepInputs, state: State | None = None) -> State:
    """The state that the prefix leaves.

    Args:
        inputs: model and sequence.
        state: the sequence's beginning; an empty state by default.
    """
    state = _empty(inputs) if state is None else state
    if inputs.prefix:
        for chunk in inputs.token_ids[: inputs.prefix].split(inputs.chunk):
            _, state = forward_ref(inputs.model, chunk, state)
    return state


def _outputs(logits: list[Tensor], streams: list[Tensor]) -> dict[str, Tensor]:
    joined = torch.cat(logits)  # [n, V]
    return {"logits": joined, "streams": torch.cat(streams), "top1": joined.argmax(dim=-1)}


def _step(inputs: StepInputs, state: State) -> dict[str, Tensor]:
    """All steps, from the state that the prefix left."""
    logits, streams = [], []
    for chunk in inputs.token_ids[inputs.prefix :].split(list(inputs.steps)):
        output, state = forward_ref(inputs.model, chunk, state)
        logits.append(output.logits)
        streams.append(output.streams)
    return _outputs(logits, streams)


def _recompute(inputs: StepInputs) -> dict[str, Tensor]:
    """All steps, each by processing the sequence from its first token."""
    logits, streams = [], []
    for end, count in zip(inputs.ends, inputs.steps, strict=True):
        output, _ = forward_ref(inputs.model, inputs.token_ids[:end])
        logits.append(output.logits[-count:])
        streams.append(output.streams[-count:])
    return _outputs(logits, streams)


def _optimized(inputs: StepInputs) -> dict[str, Tensor]:
    return _step(inputs, prefixed(inputs))


def _reference(inputs: StepInputs) -> dict[str, Tensor]:
    if inputs.dialect is not None:
        return _optimized(replace(inputs, dialect=None))
    exact = replace(inputs.model, numerics=replace(inputs.model.numerics, dtype=torch.float64))
    output, _ = forward_ref(exact, inputs.token_ids)
    return _outputs([output.logits[inputs.prefix :]], [output.streams[inputs.prefix :]])


def _timed(inputs: StepInputs) -> Mapping[str, Callable[[], object]]:
    state = prefixed(inputs)  # a step writes what it wrote before: repeating it leaves the state's rows as they were
    return {"baseline": lambda: _recompute(inputs), "optimized": lambda: _step(inputs, state)}


def _predict(case: Case, device: str) -> Prediction:
    spec = get_device(device)
    known = spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None
    end, recompute, step = case.params["prefix"], [], []
    for count in case.params["steps"]:
        step += step_model.rows(V4_TINY, step_model.prefill_tokens(V4_TINY, count, end))
        end += count
        recompute += step_model.rows(V4_TINY, step_model.prefill_tokens(V4_TINY, end))
    baseline, optimized = (step_model.total_bytes(rows) for rows in (recompute, step))
    return Prediction(
        baseline_bytes=round(baseline),
        optimized_bytes=round(optimized),
        least_bytes=round(min(baseline, optimized)),
        flops=round(step_model.total_flops(step)),
        baseline_launches=step_model.launches(recompute),
        optimized_launches=step_model.launches(step),
        baseline_us=step_model.step_bound_us(recompute, spec) if known else None,
        optimized_us=step_model.step_bound_us(step, spec) if known else None,
        bound_us=step_model.step_bound_us(step, spec) if known else None,
        reason="every stage at its bound, one launch per stage and layer; the prefix's rows are the difference",
    )


# --- hazards ---

_attend_row, _row_keys, _select_entries = attention.attend_row_ref, attention._row_keys, attention.select_entries_ref


def _planted(
    *patches: tuple[Any, str, Callable[..., Any]], between: Callable[[LayerState], LayerState] = lambda layer: layer
) -> Callable[[StepInputs], dict[str, Tensor]]:
    """The decode path with functions of the reference replaced, and each layer's state changed after the prefix."""

    def run(inputs: StepInputs) -> dict[str, Tensor]:
        with ExitStack() as stack:
            for owner, name, broken in patches:
                stack.enter_context(mock.patch.object(owner, name, broken))
            state = prefixed(inputs)
            return _step(inputs, replace(state, layers=tuple(between(layer) for layer in state.layers)))

    return run


def _rotated_at_entry_number(
    pooled: Tensor, first: int, ratio: int, norm: Tensor, freqs: Tensor, eps: float, numerics: Numerics
) -> Tensor:
    return compressor.place_entries_ref(pooled, first, 1, norm, freqs, eps, numerics)


def _without_previous_half(x: Tensor, weights: Weights, state: CompressorState) -> tuple[Tensor, CompressorState]:
    """Every call pools its first group as if there were none before."""
    kv, score = torch.zeros_like(state.previous_kv), torch.full_like(state.previous_score, float("-inf"))
    return compressor.compress_ref(x, weights, replace(state, previous_kv=kv, previous_score=score))


def _with_compressors(layer: LayerState, change: Callable[[CompressorState], CompressorState]) -> LayerState:
    def changed(state: CompressorState | None) -> CompressorState | None:
        return None if state is None else change(state)

    return replace(layer, compressor=changed(layer.compressor), index_compressor=changed(layer.index_compressor))


def _open_group_lost(layer: LayerState) -> LayerState:
    def lost(state: CompressorState) -> CompressorState:
        return replace(state, kv=torch.zeros_like(state.kv), score=torch.full_like(state.score, float("-inf")))

    return _with_compressors(layer, lost)


def _other_request(inputs: StepInputs, tokens: int) -> State:
    """What another sequence of that many tokens leaves."""
    other = (inputs.token_ids.repeat(tokens)[:tokens] + 1) % inputs.model.config.vocab_size
    _, state = forward_ref(inputs.model, other, inputs.model.new_sequence())
    return state


def _compressor_not_reset(inputs: StepInputs) -> dict[str, Tensor]:
    """A request starts with the "previous group" rows that another one left in its place."""
    used = _other_request(inputs, 2 * C4).layers

    def stale(new: CompressorState | None, old: CompressorState | None) -> CompressorState | None:
        if new is None or old is None:
            return None
        return replace(new, previous_kv=old.previous_kv, previous_score=old.previous_score)

    start = inputs.model.new_sequence()
    layers = tuple(
        replace(
            new,
            compressor=stale(new.compressor, old.compressor),
            index_compressor=stale(new.index_compressor, old.index_compressor),
        )
        for new, old in zip(start.layers, used, strict=True)
    )
    return _step(inputs, prefixed(inputs, replace(start, layers=layers)))


def _window_of_another_request(inputs: StepInputs) -> dict[str, Tensor]:
    """Compressed entries and open groups are this request's, windows those of whoever had the place before."""
    state, other = prefixed(inputs), _other_request(inputs, inputs.prefix)
    layers = (replace(own, window=used.window) for own, used in zip(state.layers, other.layers, strict=True))
    return _step(inputs, replace(state, layers=tuple(layers)))


def _window_one_short(
    window: Rows, compressed: Rows | None, selected: Tensor, p: int, config: ModelConfig, dtype: torch.dtype
) -> Tensor:
    return _row_keys(window, compressed, selected, p, replace(config, window_size=config.window_size - 1), dtype)


def _visible_at_the_steps_end(
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
    """Every row of a step may read the entries that its last row may read."""
    if not ratio:
        return _select_entries(x, qr, weights, ratio, positions, freqs, state, config, numerics)
    visible = torch.arange((int(positions[-1]) + 1) // ratio)
    if state.index_keys is None:
        return [visible for _ in positions]
    part, keys = weights.at("indexer"), state.index_keys.gather(visible, numerics.dtype)
    queries = index_queries_ref(qr, part, positions, freqs, config, numerics)
    shares = index_head_weights_ref(x, part, config, numerics)
    scores = [index_scores_ref(query, keys, share) for query, share in zip(queries, shares, strict=True)]
    return [select_ref(row, config.index_topk) for row in scores]


def _not_rotated_back(o: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    return o


def _sink_scaled(q: Tensor, kv: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _attend_row(q, kv, sink * scale, scale)


def _yarn_everywhere(inputs: StepInputs) -> dict[str, Tensor]:
    numerics = replace(inputs.model.numerics, yarn_on_swa=True)
    return _optimized(replace(inputs, model=replace(inputs.model, numerics=numerics)))


def _block_table_ignored(rows: PagedRows, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Row i is read from block i // bs, whatever the table says."""
    found = kv_cache.gather(rows.cache, numbers % rows.cache.rows, dtype)
    return found.nan_to_num()  # never-written pages are poisoned here; a server's hold other sequences' numbers


def _case(name: str, prefix: int, steps: tuple[int, ...], about: str, **params: Any) -> Case:
    given = {"prefix": prefix, "steps": steps, "chunk": max(prefix, 1), "dialect": None}
    return Case(name, {**given, **params}, tiny=True, about=about)


_CASES = (
    _case("first", 0, (1, 1, 1, 1, 1), "from nothing; the first C4 entry closes at position 3"),
    _case("after-3", 3, (1, 1), "a prompt one token short of an entry"),
    _case("after-4", 4, (1, 1), "a prompt that ends with an entry"),
    _case("after-5", 5, (1, 1, 1), "an open group of one; its entry pools the group before as well"),
    _case("window", 127, (1, 1), "the window fills, the first C128 entry closes; the window slides"),
    _case("after-130", 130, (1, 1), "a C4 entry closes at 131, behind a full window"),
    _case("second", 255, (1,), "the second C128 entry closes"),
    _case("several", 125, (3, 2), "steps of several tokens, entries closing inside one"),
    _case("paged", 165, (3,), "OCP caches, shuffled pages, some freed and reused", chunk=16, dialect=Dialect.FN),
    _case("paged-fnuz", 30, (1, 3), "FNUZ caches, odd chunks", chunk=13, dialect=Dialect.FNUZ),
)

OPTIMIZATION = Optimization(
    id="decode_step",
    number=1,
    title="One decode step",
    part="I ground truth",
    sources=("DeepSeek-V4 inference/model.py",),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    baseline=_recompute,
    optimized=_optimized,
    gate=Gate(
        (Check("logits", "budget", "step_fp32"), Check("streams", "budget", "step_fp32"), Check("top1", "exact"))
    ),
    hazards={
        "rotated-at-entry-number": Hazard(
            title="a compressed entry is rotated to its own number",
            story="Entry j stands at position j*r, its group's first token, and not at j, nor at the token that closed "
            "it. Entry 0 is right in either case, so that nothing shows before the second entry.",
            source="AMD-AGI/Primus#928 and #930, 2 (compressed keys not at positions of the original sequence)",
            ids=(),
            case="after-5",
            planted=_planted((attention, "place_entries_ref", _rotated_at_entry_number)),
        ),
        "previous-half-dropped": Hazard(
            title="a C4 entry closed in decode pools four tokens instead of eight",
            story="The overlap with the group before was a shift along the groups of one call. A prompt has many "
            "groups; a decode call has one, and the shift leaves nothing of it.",
            source="jundot/omlx#2271 (answers drift from Simplified to Traditional Chinese in long generations)",
            ids=(),
            case="after-5",
            planted=_planted((attention, "compress_ref", _without_previous_half)),
        ),
        "open-group-lost": Hazard(
            title="the prompt's remainder is not handed over",
            story="Tokens behind the last complete group are in no entry yet. If prefill drops them, the entry that "
            "decode closes pools its own tokens only. The window still holds the lost ones, for 128 positions.",
            source="no report of this very bug; Avarok-Cybersecurity/atlas#275 (no entries at all from decode) is akin",
            ids=(),
            case="after-5",
            planted=_planted(between=_open_group_lost),
        ),
        "compressor-not-reset": Hazard(
            title="a request starts with the compressor rows of another",
            story="Entry 0 has no previous group: its rows must weigh nothing. A prompt shorter than a group does not "
            "overwrite them, and decode then pools what an earlier request left there.",
            source="DeepSeek-V4 inference/model.py, Compressor: its state is made once and never reset",
            ids=(),
            case="after-3",
            planted=_compressor_not_reset,
        ),
        "stale-window": Hazard(
            title="the window is another request's",
            story="Windows in a ring per request are no part of a prefix cache: a hit restores compressed entries and "
            "reads the window from whoever used the ring before.",
            source="ROCm/ATOM#1417 (empty answers on a prefix-cache hit)",
            ids=(),
            case="after-5",
            planted=_window_of_another_request,
        ),
        "window-one-short": Hazard(
            title="a window of 127",
            story="The window is 128 keys with the query's own. Counting the own key beside it loses the oldest one; "
            "no sequence shorter than the window shows it.",
            source="no report of this very bug; onnxruntime/mobius#596 (no window at all) is akin",
            ids=(),
            case="after-130",
            planted=_planted((attention, "_row_keys", _window_one_short)),
        ),
        "visible-at-the-steps-end": Hazard(
            title="every row of a step sees what its last row sees",
            story="context // r counts entries for the last token. With speculative decoding a step has several "
            "tokens, and the earlier ones then read an entry that holds their own future.",
            source="ROCm/ATOM#2101",
            ids=(),
            case="several",
            planted=_planted((attention, "select_entries_ref", _visible_at_the_steps_end)),
        ),
        "not-rotated-back": Hazard(
            title="the output is not rotated back",
            story="Keys are values, so that the output carries their rotation. Without the inverse, what wo_a reads "
            "depends on absolute positions.",
            source="AMD-AGI/Primus#928 and #930, 3; Avarok-Cybersecurity/atlas#186",
            ids=(),
            case="after-5",
            planted=_planted((attention, "rotate_back_ref", _not_rotated_back)),
        ),
        "sink-scaled": Hazard(
            title="the sink is multiplied by the softmax scale",
            story="The sink is a logit that is compared with scaled scores. Appended to the raw scores it is scaled "
            "with them, and every head's sink moves towards 0.",
            source="no report of this very bug; the order of operations in DeepSeek-V4 inference/kernel.py decides it",
            ids=(),
            case="first",
            planted=_planted((attention, "attend_row_ref", _sink_scaled)),
        ),
        "yarn-everywhere": Hazard(
            title="layers without compression are YaRN-scaled too",
            story="One frequency table for all layers, or a theta that switches while the scaling does not. Over a "
            "full window the angles are off by 2.12 degrees at most.",
            source="sglang#34788; vllm#54815; 1Cat-vLLM#251",
            ids=(),
            case="after-130",
            planted=_yarn_everywhere,
        ),
        "block-table-ignored": Hazard(
            title="logical blocks are read as physical ones",
            story="A cache that serves one sequence hands out its blocks in order, and the table is the identity. In "
            "a shared pool it is not.",
            source="no report of this very bug; ATOM#1904 (rows addressed wrongly, 0.36 -> 0.958 when fixed) is akin",
            ids=(),
            case="paged-fnuz",
            planted=_planted((PagedRows, "gather", _block_table_ignored)),
        ),
    },
    predict=_predict,
    claims=(),
    timed=_timed,
    measured_modules=(),
)
