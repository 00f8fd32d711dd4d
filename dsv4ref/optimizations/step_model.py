"""One decode step as data: a row per stage and layer kind, with its FLOPs and bytes, and the bounds that follow.

A step takes T rows, each the next token of a sequence of its own with the same context, through every layer. A row of
the model is one stage of one kind of layer; its amounts are per layer, for all T rows:

* FLOPs are those of the matrix products, 2 m n k; norms, softmax, rotations and Sinkhorn have none here. They are what
  the reference multiplies: tests count it product by product. (The Hadamard transform is a matrix product only in the
  reference, and is left out.)
* weight bytes are read once per step, as the checkpoint stores them. Of the embedding and the hash tables a step reads
  at most T lines; of the routed experts those that some row chose.
* cache bytes: 584 per attended and per written entry, 132 per scored indexer entry, and the compressors' fp32 rows. An
  entry is written every r-th token; what closing a group costs is spread over its r tokens.
* activation bytes: every stage reads its input once and writes its result once, bf16 except where noted. Fusing two
  stages saves what passes between them; nothing here is fused.

Routed experts: every row chooses k of E, uniformly and independently, so that E (1 - (1 - k/E)^T) of them are touched
in expectation. Real routing is skewed and touches fewer.

Source: shapes from `dsv4ref.config`, stored bytes from `dsv4ref.ref.census`, cache layouts from vLLM's DeepSeek-V4 code
and FlashMLA; compressor rows as DeepSeek-V4 inference/model.py keeps them (fp32, kv and score).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv4ref.config import C4, C128, LAYER_KINDS, SWA, ModelConfig, V32Config
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence.roofline import Bound
from dsv4ref.formats.kv_cache import ENTRY_BYTES
from dsv4ref.ref.census import census

__all__ = [
    "STAGES",
    "CacheGrowth",
    "Row",
    "Stage",
    "Tokens",
    "bound",
    "cache_bytes",
    "cache_growth",
    "decode_tokens",
    "distinct_experts",
    "fixed_bytes",
    "group_times_us",
    "index_entry_bytes",
    "launches",
    "prefill_tokens",
    "rows",
    "stage_of",
    "stage_times_us",
    "step_bound_us",
    "total_bytes",
    "total_flops",
]

Rate = Literal["bf16", "fp8"]

_BF16, _FP32 = 2, 4
_ROUTE_BYTES = 4 + 4
"""What a router hands on per chosen expert: fp32 weight and int32 number."""


@dataclass(frozen=True)
class Stage:
    """One stage of the step.

    Args:
        name: its key everywhere.
        group: what it is a part of, for figures.
        rate: the matrix rate its FLOPs are held against. FP8 where the checkpoint's FP8 or FP4 weights meet FP8
            activations (DeepSeek's GEMMs) and in the indexer's FP8 scores; bf16 otherwise. Stages that DeepSeek
            multiplies in fp32 (hyper-connections, compressor, router, head) are held against bf16 as well, since no
            fp32 rate is among the published figures: their bound is the more optimistic for it.
        chapters: numbers of the chapters that change this stage.
        about: what it does.
    """

    name: str
    group: str
    rate: Rate
    chapters: tuple[int, ...]
    about: str


_STAGES = (
    Stage("embed", "embedding, head", "bf16", (), "one embedding line per row, copied to the residual streams"),
    Stage("hc_pre_attn", "mHC, norms", "bf16", (), "mixing weights, Sinkhorn, one mixture of the streams"),
    Stage("attn_norm", "mHC, norms", "bf16", (), "RMSNorm"),
    Stage("wq_a", "projections", "fp8", (), "query latent"),
    Stage("q_norm", "mHC, norms", "bf16", (), "RMSNorm of the latent, which the indexer reads too"),
    Stage("wq_b", "projections", "fp8", (), "queries of all heads"),
    Stage("q_rope", "mHC, norms", "bf16", (), "norm per head, RoPE"),
    Stage("wkv", "projections", "fp8", (), "one key-and-value vector for all heads"),
    Stage("kv_insert", "attention", "bf16", (2,), "RMSNorm, RoPE, quantise, write into the window cache"),
    Stage("compressor", "compressor", "bf16", (2,), "two projections, the open group, an entry every r-th token"),
    Stage("index_k", "indexer", "bf16", (2,), "the indexer's own compressor"),
    Stage("index_q", "indexer", "fp8", (), "indexer queries, RoPE, Hadamard"),
    Stage("index_weights", "indexer", "bf16", (), "one weight per indexer head"),
    Stage("index_logits", "indexer", "fp8", (7,), "scores of all visible entries"),
    Stage("topk", "indexer", "bf16", (7,), "the best entries"),
    Stage("attention", "attention", "bf16", (2, 4, 5, 6, 9, 10, 11, 15, 16, 18), "window and compressed keys, sink"),
    Stage("inverse_rope", "attention", "bf16", (19,), "rotates the output back, in place"),
    Stage("wo_a", "projections", "bf16", (8,), "output projection per head group"),
    Stage("wo_b", "projections", "fp8", (), "output projection over all groups"),
    Stage("hc_post_attn", "mHC, norms", "bf16", (), "mixes the streams and adds the result"),
    Stage("hc_pre_ffn", "mHC, norms", "bf16", (), "as before attention"),
    Stage("ffn_norm", "mHC, norms", "bf16", (), "RMSNorm"),
    Stage("router", "experts", "bf16", (3, 14), "scores, the chosen experts, their weights"),
    Stage("routed_experts", "experts", "fp8", (3, 12, 13), "clamped SwiGLU of the chosen experts, weighted sum"),
    Stage("shared_expert", "experts", "fp8", (), "the expert of every row"),
    Stage("hc_post_ffn", "mHC, norms", "bf16", (), "as after attention"),
    Stage("head_collapse", "mHC, norms", "bf16", (), "streams to one vector"),
    Stage("final_norm", "mHC, norms", "bf16", (), "RMSNorm"),
    Stage("lm_head", "embedding, head", "bf16", (), "fp32 logits of the vocabulary"),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _STAGES}
"""Every stage by name, in the order in which a step meets them."""

_WEIGHTS = (  # the part of a checkpoint name behind its layer -> the stage that reads it
    (r"embed\.", "embed"),
    (r"hc_attn_", "hc_pre_attn"),
    (r"attn_norm\.", "attn_norm"),
    (r"attn\.wq_a\.", "wq_a"),
    (r"attn\.q_norm\.", "q_norm"),
    (r"attn\.wq_b\.", "wq_b"),
    (r"attn\.wkv\.", "wkv"),
    (r"attn\.kv_norm\.", "kv_insert"),
    (r"attn\.attn_sink", "attention"),
    (r"attn\.compressor\.", "compressor"),
    (r"attn\.indexer\.compressor\.", "index_k"),
    (r"attn\.indexer\.wq_b\.", "index_q"),
    (r"attn\.indexer\.weights_proj\.", "index_weights"),
    (r"attn\.wo_a\.", "wo_a"),
    (r"attn\.wo_b\.", "wo_b"),
    (r"hc_ffn_", "hc_pre_ffn"),
    (r"ffn_norm\.", "ffn_norm"),
    (r"ffn\.gate\.", "router"),
    (r"ffn\.experts\.", "routed_experts"),
    (r"ffn\.shared_experts\.", "shared_expert"),
    (r"hc_head_", "head_collapse"),
    (r"norm\.", "final_norm"),
    (r"head\.", "lm_head"),
)


def stage_of(name: str) -> tuple[str, int | None]:
    """The stage that reads a tensor, and its layer; None for a tensor read once per step.

    Args:
        name: checkpoint name, of a weight or a scale, outside the MTP blocks.

    Raises:
        ValueError: no stage of the step reads such a tensor.
    """
    match = re.match(r"layers\.(\d+)\.", name)
    rest, layer = (name[match.end() :], int(match[1])) if match else (name, None)
    for pattern, stage in _WEIGHTS:
        if re.match(pattern, rest):
            return stage, layer
    raise ValueError(f"name: got {name!r}, expected a tensor that a stage of the decode step reads")


@dataclass(frozen=True)
class Tokens:
    """What a call works on: how many rows, and how much they see together.

    Args:
        rows: T.
        keys: ratio -> keys attended, summed over the rows, in one layer of that ratio.
        scored: indexer entries scored, summed over the rows, in one C4 layer.
    """

    rows: int
    keys: Mapping[int, int]
    scored: int


def decode_tokens(model: ModelConfig, rows: int, context: int) -> Tokens:
    """T rows of as many sequences, each the last of ``context`` tokens.

    Raises:
        ValueError: no rows, or a context that is empty or longer than the model's.
    """
    _positive("rows", rows)
    if not isinstance(context, int) or not 1 <= context <= model.max_position:
        raise ValueError(f"context: got {context!r}, expected 1 to {model.max_position} for {model.name}")
    keys = {ratio: rows * _keys(model, ratio, context) for ratio in LAYER_KINDS}
    return Tokens(rows, keys, rows * (context // C4))


def prefill_tokens(model: ModelConfig, tokens: int, first: int = 0) -> Tokens:
    """Consecutive tokens of one sequence: a prompt, a chunk, or a step of several tokens.

    Args:
        model: any V4 model.
        tokens: how many, at least 1.
        first: position of the first.

    Raises:
        ValueError: as `decode_tokens`.
    """
    _positive("tokens", tokens)
    if not isinstance(first, int) or not 0 <= first <= model.max_position - tokens:
        raise ValueError(f"first: got {first!r}, expected 0 to {model.max_position - tokens} for {model.name}")
    contexts = range(first + 1, first + tokens + 1)
    keys = {ratio: sum(_keys(model, ratio, context) for context in contexts) for ratio in LAYER_KINDS}
    return Tokens(tokens, keys, sum(context // C4 for context in contexts))


def _keys(model: ModelConfig, ratio: int, context: int) -> int:
    entries = context // ratio if ratio else 0
    return min(context, model.window_size) + (min(entries, model.index_topk) if ratio == C4 else entries)


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def distinct_experts(rows: int, top_k: int, experts: int) -> float:
    """Experts that at least one of T rows chose, in expectation: ``E (1 - (1 - k/E)^T)``, choices uniform."""
    return experts * (1 - (1 - top_k / experts) ** rows)


@dataclass(frozen=True)
class Row:
    """One stage of one kind of layer; amounts are per layer and for all rows of the step.

    Args:
        stage: key of `STAGES`.
        kind: ``"all"`` layers, those of one ratio (``"SWA"``, ``"C4"``, ``"C128"``), ``"hash"`` or ``"learned"`` ones,
            or ``"once"`` per step.
        layers: which; empty for once per step.
        shape: what is computed, for people.
        flops: of the matrix products.
        weight_bytes: read in this step.
        cache_bytes: read and written, of KV and indexer caches and compressor rows.
        activation_bytes: read and written.
        stored_bytes: the stage's tensors in the checkpoint, all of them that this rank holds.
    """

    stage: str
    kind: str
    layers: tuple[int, ...]
    shape: str
    flops: float
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float
    stored_bytes: float

    @property
    def count(self) -> int:
        """How often the stage runs in a step."""
        return len(self.layers) or 1

    @property
    def bytes(self) -> float:
        """All bytes of one run."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class _Work:
    """A row before its weights are looked up: FLOPs, cache bytes, activation bytes, and the weights' touched share."""

    shape: str
    flops: float = 0
    cache: float = 0
    activations: float = 0
    lines: int | None = None  # of a table of which only that many lines are read
    share: float = 1.0  # of the stored bytes


def rows(model: ModelConfig, tokens: Tokens, *, ep: int = 1) -> list[Row]:
    """The step, stage by stage, in the order in which it runs; without a top-k where no entry is visible yet.

    Args:
        model: any V4 model.
        tokens: of `decode_tokens` or `prefill_tokens`; under expert parallelism, of one rank.
        ep: ranks that share the routed experts, each with rows of its own; everything else is on every rank. A rank
            then holds E / ep experts and serves the rows of all ranks with them; what travels between ranks is not
            counted.

    Raises:
        ValueError: ``ep`` does not divide the experts.
    """
    _positive("ep", ep)
    if model.router.n_experts % ep:
        raise ValueError(f"ep: got {ep}, expected a divisor of the {model.router.n_experts} experts")
    stored = _stored(model)
    found = []
    for stage in STAGES:
        for kind, layers in _kinds(model, stage):
            work = _work(model, tokens, stage, kind, ep)
            weights = stored[stage, layers[0] if layers else None] if (stage in _READING) else {}
            total = sum(weights.values())
            read = work.share * total
            if work.lines is not None:
                table = max(weights, key=lambda name: weights[name])  # embedding, or a layer's tid2eid
                read = total - weights[table] + work.lines * weights[table] / model.vocab_size
            held = total / ep if stage == "routed_experts" else total
            row = Row(stage, kind, layers, work.shape, work.flops, read, work.cache, work.activations, held)
            if row.bytes:
                found.append(row)
    return found


_READING = {stage for _, stage in _WEIGHTS}


# Pro has 145,116 tensors, and a figure asks for dozens of steps.
@functools.lru_cache(maxsize=8)
def _stored(model: ModelConfig) -> dict[tuple[str, int | None], dict[str, int]]:
    """Stage and layer -> its tensors' bytes by name, MTP blocks left out."""
    found: dict[tuple[str, int | None], dict[str, int]] = {}
    for name, spec in census(model).items():
        if not name.startswith("mtp."):
            found.setdefault(stage_of(name), {})[name] = spec.nbytes
    return found


def _kinds(model: ModelConfig, stage: str) -> list[tuple[str, tuple[int, ...]]]:
    """The kinds of layers that have a stage, each with its layers."""
    everywhere = tuple(range(model.n_layers))
    if stage in ("embed", "head_collapse", "final_norm", "lm_head"):
        return [("once", ())]
    if stage == "attention":
        kinds = [(kind, model.layers(ratio)) for ratio, kind in LAYER_KINDS.items()]
    elif stage == "compressor":
        kinds = [(LAYER_KINDS[ratio], model.layers(ratio)) for ratio in (C4, C128)]
    elif stage.startswith("index_") or stage == "topk":
        kinds = [(LAYER_KINDS[C4], model.layers(C4))]
    elif stage == "router":
        hashed = tuple(layer for layer in everywhere if model.is_hash_layer(layer))
        kinds = [("hash", hashed), ("learned", tuple(layer for layer in everywhere if layer not in hashed))]
    else:
        kinds = [("all", everywhere)]
    return [(kind, layers) for kind, layers in kinds if layers]


_RATIOS = {kind: ratio for ratio, kind in LAYER_KINDS.items()}


def _work(m: ModelConfig, tokens: Tokens, stage: str, kind: str, ep: int) -> _Work:
    # T rows, D hidden, n streams, H heads of d, Q query latent, G groups of rank R, I expert width, E experts, V words.
    T, D, n, d, Q = tokens.rows, m.hidden_size, m.hc_mult, m.head_dim, m.q_lora_rank
    heads, index_width = m.n_heads * d, m.index_n_heads * m.index_head_dim
    G, R, width = m.wo_a_shape

    def product(inner: int, outer: int, note: str = "", rows: int = 0) -> _Work:
        moved = _BF16 * T * (inner + outer)
        return _Work(f"[{T}, {inner}] x [{inner}, {outer}]{note}", 2.0 * T * inner * outer, activations=moved)

    def norm(elements: int, note: str = "") -> _Work:
        return _Work(f"[{T}, {elements}]{note}", activations=2 * _BF16 * T * elements)

    def compressor(ratio: int, dim: int, entry_bytes: int) -> _Work:
        channels = 2 * dim if ratio == C4 else dim
        row = 2 * channels * _FP32  # kv and score of one token
        pooled = 2 * dim * _FP32 * (2 * ratio if ratio == C4 else ratio)  # what closing a group reads
        return _Work(
            f"2 x [{T}, {D}] x [{D}, {channels}]; every {ratio}th token an entry of {dim}",
            2 * 2.0 * T * D * channels,
            cache=T * (row + (pooled + entry_bytes) / ratio),
            activations=_BF16 * T * D,
        )

    if stage == "embed":
        return _Work(f"{T} lines of [{m.vocab_size}, {D}]", activations=_BF16 * T * n * D, lines=min(T, m.vocab_size))
    if stage in ("hc_pre_attn", "hc_pre_ffn"):
        mixes = (2 + n) * n
        moved = T * (_BF16 * (n * D + D) + _FP32 * (n + n * n))
        return _Work(f"[{T}, {n * D}] x [{n * D}, {mixes}], Sinkhorn", 2.0 * T * n * D * mixes, activations=moved)
    if stage in ("hc_post_attn", "hc_post_ffn"):
        moved = T * (_BF16 * (D + 2 * n * D) + _FP32 * (n + n * n))
        return _Work(f"[{T}, {n}, {n}] x [{T}, {n}, {D}]", 2.0 * T * n * n * D, activations=moved)
    if stage in ("attn_norm", "ffn_norm", "final_norm"):
        return norm(D)
    if stage == "wq_a":
        return product(D, Q)
    if stage == "q_norm":
        return norm(Q)
    if stage == "wq_b":
        return product(Q, heads)
    if stage == "q_rope":
        return norm(heads, f", {m.n_heads} heads")
    if stage == "wkv":
        return product(D, d)
    if stage == "kv_insert":
        return _Work(f"[{T}, {d}] -> {T} x {ENTRY_BYTES} bytes", cache=T * ENTRY_BYTES, activations=_BF16 * T * d)
    if stage == "compressor":
        return compressor(_RATIOS[kind], d, ENTRY_BYTES)
    if stage == "index_k":
        return compressor(C4, m.index_head_dim, index_entry_bytes(m))
    if stage == "index_q":
        return product(Q, index_width)
    if stage == "index_weights":
        return product(D, m.index_n_heads)
    if stage == "index_logits":
        entries = tokens.scored
        return _Work(
            f"[{m.index_n_heads}, {m.index_head_dim}] x {entries} entries",
            2.0 * entries * m.index_n_heads * (m.index_head_dim + 1),
            cache=entries * index_entry_bytes(m),
            activations=_BF16 * T * (index_width + m.index_n_heads) + _FP32 * entries,
        )
    if stage == "topk":
        chosen = tokens.keys[C4] - tokens.keys[SWA]
        return _Work(f"{chosen} of {tokens.scored} entries", activations=_FP32 * (tokens.scored + chosen))
    if stage == "attention":
        keys = tokens.keys[_RATIOS[kind]]
        moved = 2 * _BF16 * T * heads
        shape = f"[{m.n_heads}, {d}] x {keys} keys"
        return _Work(shape, 4.0 * heads * keys, cache=keys * ENTRY_BYTES, activations=moved)
    if stage == "inverse_rope":
        rotary = m.n_heads * m.rope_head_dim
        return _Work(f"[{T}, {m.n_heads}, {m.rope_head_dim}]", activations=2 * _BF16 * T * rotary)
    if stage == "wo_a":
        moved = _BF16 * T * (heads + G * R)
        return _Work(f"{G} x [{T}, {width}] x [{width}, {R}]", 2.0 * T * G * width * R, activations=moved)
    if stage == "wo_b":
        return product(G * R, D)
    if stage == "head_collapse":
        shape = f"[{T}, {n * D}] x [{n * D}, {n}]"
        return _Work(shape, 2.0 * T * n * D * n, activations=_BF16 * T * (n * D + D))
    if stage == "lm_head":
        moved = T * (_BF16 * D + _FP32 * m.vocab_size)
        return _Work(f"[{T}, {D}] x [{D}, {m.vocab_size}]", 2.0 * T * D * m.vocab_size, activations=moved)
    return _experts(m, T, stage, kind, ep)


def _experts(m: ModelConfig, T: int, stage: str, kind: str, ep: int) -> _Work:
    D, inter, E, k = m.hidden_size, m.moe_inter_dim, m.router.n_experts, m.router.top_k
    if stage == "router":
        lines = min(T, m.vocab_size) if kind == "hash" else None
        moved = T * (_BF16 * D + _ROUTE_BYTES * k)
        how = "by token" if kind == "hash" else "by score"
        return _Work(f"[{T}, {D}] x [{D}, {E}], {k} {how}", 2.0 * T * D * E, activations=moved, lines=lines)
    if stage == "shared_expert":
        moved = _BF16 * T * 2 * (D + inter)
        return _Work(f"[{T}, {D}] x 3 x [{D}, {inter}]", 6.0 * T * D * inter, activations=moved)
    assert stage == "routed_experts", stage
    share = distinct_experts(ep * T, k, E) / E
    touched = f"{share * E / ep:.1f} of {E // ep} experts"
    moved = _BF16 * T * k * 2 * (D + inter)
    shape = f"[{T * k}, {D}] x 3 x [{D}, {inter}], {touched}"
    return _Work(shape, 6.0 * T * k * D * inter, activations=moved, share=share / ep)


# --- bounds ----------------------------------------------------------------------------------------------------------


def bound(row: Row, spec: DeviceSpec) -> Bound:
    """The roofline bound of one run of a stage on a device's published peaks.

    Raises:
        ValueError: the device publishes no bandwidth or no rate for the stage.
    """
    rate = {"bf16": spec.bf16_tflops, "fp8": spec.fp8_tflops}[STAGES[row.stage].rate]
    if spec.bandwidth_tb_s is None or rate is None:
        raise ValueError(f"spec: {spec.key} has no published bandwidth or {STAGES[row.stage].rate} matrix rate")
    return Bound(row.bytes, row.flops, spec.bandwidth_tb_s * 1e12, rate * 1e12)


def total_bytes(step: list[Row]) -> float:
    """Bytes of a whole step."""
    return sum(row.count * row.bytes for row in step)


def total_flops(step: list[Row]) -> float:
    """FLOPs of a whole step."""
    return sum(row.count * row.flops for row in step)


def launches(step: list[Row]) -> int:
    """Launches of a step that runs every stage of every layer as one kernel."""
    return sum(row.count for row in step)


def step_bound_us(step: list[Row], spec: DeviceSpec) -> float:
    """Sum of the stages' bounds in microseconds: what a step cannot beat if stages run one after another, unfused."""
    return sum(row.count * bound(row, spec).time_us for row in step)


def stage_times_us(step: list[Row], spec: DeviceSpec) -> dict[str, float]:
    """The bounds by stage, over all kinds of layers, in the order of the step."""
    times: dict[str, float] = {}
    for row in step:
        times[row.stage] = times.get(row.stage, 0.0) + row.count * bound(row, spec).time_us
    return times


def group_times_us(step: list[Row], spec: DeviceSpec) -> dict[str, float]:
    """The bounds by `Stage.group`; every group is there, in the order in which a step first meets it."""
    times = dict.fromkeys((stage.group for stage in STAGES.values()), 0.0)
    for stage, us in stage_times_us(step, spec).items():
        times[STAGES[stage].group] += us
    return times


# --- the cache -------------------------------------------------------------------------------------------------------


def index_entry_bytes(model: ModelConfig | V32Config) -> int:
    """Bytes of one indexer entry: FP8 codes and one fp32 scale per entry (132)."""
    return model.index_head_dim + _FP32


@dataclass(frozen=True)
class CacheGrowth:
    """Bytes that a token adds to a sequence's caches, over all layers, from the point on where windows are full.

    Args:
        main: key-and-value entries.
        indexer: indexer entries.
    """

    main: float
    indexer: float

    @property
    def total(self) -> float:
        """Both."""
        return self.main + self.indexer


def cache_growth(model: ModelConfig | V32Config) -> CacheGrowth:
    """Bytes per token of context; MTP blocks left out.

    V4 keeps an entry per 4 or per 128 tokens, and the indexer one per 4. V3.2 keeps one of each per token and layer:
    FP8 latent with an fp32 scale per 128, bf16 rotary part (656 bytes), and the indexer's.

    Source: FlashMLA (584-byte and 656-byte entries); vLLM (132-byte indexer entries); DeepSeek-V3.2-Exp
    inference/model.py, ``Indexer`` (FP8 keys and fp32 scales).
    """
    if isinstance(model, V32Config):
        entry = model.v_dim + _FP32 * model.v_dim // 128 + _BF16 * model.rope_head_dim
        return CacheGrowth(float(model.n_layers * entry), float(model.n_layers * index_entry_bytes(model)))
    main = ENTRY_BYTES * (model.n_c4_layers / C4 + model.n_c128_layers / C128)
    return CacheGrowth(main, index_entry_bytes(model) * model.n_c4_layers / C4)


def cache_bytes(model: ModelConfig | V32Config, context: int) -> int:
    """Bytes that one sequence of ``context`` tokens holds in its caches, pages taken as full and padding left out.

    Windows and closed entries; not the compressors' rows, see `fixed_bytes`.
    """
    if not isinstance(context, int) or context < 0:
        raise ValueError(f"context: got {context!r}, expected 0 or more tokens")
    if isinstance(model, V32Config):
        return round(context * cache_growth(model).total)
    window = model.n_layers * min(context, model.window_size) * ENTRY_BYTES
    c4 = model.n_c4_layers * (context // C4) * (ENTRY_BYTES + index_entry_bytes(model))
    return window + c4 + model.n_c128_layers * (context // C128) * ENTRY_BYTES


def fixed_bytes(model: ModelConfig) -> dict[str, int]:
    """What a sequence holds however long it is: full windows, and the fp32 rows of the compressors' open groups."""

    def state(ratio: int, dim: int) -> int:  # C4 keeps the previous group as well, both twice as wide
        overlap = 2 if ratio == C4 else 1
        return overlap * ratio * 2 * overlap * dim * _FP32

    c4 = state(C4, model.head_dim) + state(C4, model.index_head_dim)
    return {
        "windows": model.n_layers * model.window_size * ENTRY_BYTES,
        "compressor rows": model.n_c4_layers * c4 + model.n_c128_layers * state(C128, model.head_dim),
    }
