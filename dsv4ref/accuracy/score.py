"""Score the trained model: share of right answers, with the reference as it should be or broken in one place.

What is scored is a `Subject`: any `dsv4ref.ref.model.Model` (weights and formats), and what its sequences start from
(plain tensors, paged FP8 caches, anything with the same interface). Every sequence is processed as a server does it,
the prompt in one pass and the rest token by token, always fed the right tokens; an answer counts if its token has the
highest logit. Logits that are not finite answer nothing.

Breakages are functions from a model to a subject, each with one bug. None patches code: each is a wrong weight, or rows
that are read wrongly.

    fp8_dialect_compressed   compressed caches hold e4m3fn, the reader takes them for e4m3fnuz    vllm#42893, vllm#45681
    fp8_dialect_window       the same with the window caches
    one_sided_hadamard       the indexer's queries are Hadamard-rotated, its keys are not         ROCm/ATOM#1507
    router_bias_bf16_<o>     the correction bias, o added to all of it, is rounded to bfloat16    sglang#37133
    transposed_sinkhorn      residual streams are mixed with the transposed matrix                in no public report

Weights come with the package, data/tiny_v4.safetensors; `dsv4ref.accuracy.training` makes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED, Examples, Task
from dsv4ref.formats import kv_cache
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.ref.indexer import hadamard_ref
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.numerics import DEFAULT, Numerics
from dsv4ref.ref.state import LayerState, PagedRows, Rows, State, paged_sequence

__all__ = [
    "ROUTER_BIAS_OFFSETS",
    "WEIGHTS",
    "Breakage",
    "Subject",
    "accuracy",
    "breakages",
    "load",
    "load_model",
    "metadata",
    "misread_dialect",
    "one_sided_hadamard",
    "paged",
    "plain",
    "points_lost",
    "router_bias",
    "transposed_sinkhorn",
]

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "tiny_v4.safetensors"
"""The shipped weights."""

ROUTER_BIAS_OFFSETS = (0.0, 1.0, 8.0)
"""What is added to the correction bias before rounding. 8 is about where the released Flash's are (`ref.router`)."""


@dataclass(frozen=True)
class Subject:
    """What is scored.

    Args:
        model: shapes, weights, formats.
        new_state: makes the empty state of one sequence; called once per sequence.
    """

    model: Model
    new_state: Callable[[], State]


Breakage: TypeAlias = Callable[[Model], Subject]


# --- the shipped model ------------------------------------------------------------------------------------------------


def metadata(path: Path | str = WEIGHTS) -> dict[str, str]:
    """Where weights come from: config, seed, steps, sources, machine and accuracy, as strings.

    Args:
        path: a file of `dsv4ref.accuracy.training`.

    Raises:
        ValueError: the file cannot be read, or is of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is cut short, damaged or not there, expected safetensors ({error})") from error
    if found.get("config") != V4_TINY_TRAINED.name:
        raise ValueError(f"path: {path} is for config {found.get('config')!r}, expected {V4_TINY_TRAINED.name!r}")
    return found


def load(path: Path | str = WEIGHTS) -> dict[str, Tensor]:
    """The trained weights: checkpoint name -> tensor as stored. Arguments and errors as `metadata`."""
    metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)


@functools.lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Tensor]:
    return MappingProxyType(load())


def load_model(numerics: Numerics = DEFAULT) -> Model:
    """The trained model in some formats; its weights are read once and shared."""
    return Model(V4_TINY_TRAINED, _shipped(), numerics)


def plain(model: Model) -> Subject:
    """A model on plain tensors."""
    return Subject(model, model.new_sequence)


def paged(model: Model, task: Task = TASK, dialect: Dialect | str = Dialect.FN) -> Subject:
    """A model on paged 584-byte FP8 caches.

    Args:
        model: any; its formats should be those of the cache (``kv_dialect``), which quantises once more.
        task: how long sequences are, whether they come as one prompt or not.
        dialect: what all caches are written in and read as.
    """

    def new_state() -> State:
        return paged_sequence(model.config, task.length, task.length, dialect=dialect, dtype=model.numerics.dtype)

    return Subject(model, new_state)


# --- scoring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(subject: Subject, examples: Examples) -> dict[str, float]:
    """Share of right answers.

    Args:
        subject: model and state factory.
        examples: of any `Task`; seeds below 1,000,000 are held out.

    Returns:
        ``{"retrieval", "copying"}`` in 0..1, ``{"retrieval_asked", "copying_asked"}`` how many answers each is of, and
        ``"not_finite"``, the share of answers, of both kinds, whose logits hold a NaN or an infinity.
    """
    right = {"retrieval": 0, "copying": 0}
    bad = 0
    for tokens in examples.tokens:
        prompt, state = forward_ref(subject.model, tokens[: examples.tail], subject.new_state())
        logits = [prompt.logits]
        for t in range(examples.tail, tokens.shape[0] - 1):  # nothing is due after the last token
            step, state = forward_ref(subject.model, tokens[t : t + 1], state)
            logits.append(step.logits)
        rows = torch.cat(logits)  # [T - 1, V]
        finite = rows.isfinite().all(dim=1)
        for name in right:
            positions = getattr(examples, name)
            hit = rows[positions].argmax(dim=1) == tokens[positions + 1]
            right[name] += int((hit & finite[positions]).sum())
            bad += int((~finite[positions]).sum())
    asked = {name: examples.tokens.shape[0] * getattr(examples, name).shape[0] for name in right}
    return {
        **{name: right[name] / asked[name] for name in right},
        **{f"{name}_asked": asked[name] for name in right},
        "not_finite": bad / sum(asked.values()),
    }


def points_lost(
    right: Mapping[str, float], broken: Mapping[str, float], task: str = "retrieval"
) -> tuple[float, float]:
    """What a change costs, in points of accuracy.

    Args:
        right: of `accuracy`, without the change.
        broken: of `accuracy`, with it.
        task: ``"retrieval"`` or ``"copying"``.

    Returns:
        100 times the difference of shares, and 100 times its standard error: two binomial ones, taken as independent,
        each no smaller than that of half a wrong answer. Scores of the same examples usually differ by less.
    """

    def variance(score: Mapping[str, float]) -> float:
        share, asked = score[task], score[f"{task}_asked"]
        least = 0.5 / asked
        share = min(max(share, least), 1 - least)
        return share * (1 - share) / asked

    return 100 * (right[task] - broken[task]), 100 * math.sqrt(variance(right) + variance(broken))


# --- breakages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Misread:
    """Paged rows whose reader takes the codes for another dialect; what is written is right."""

    rows: PagedRows
    reads_as: Dialect

    @property
    def first(self) -> int:
        return self.rows.first

    @property
    def end(self) -> int:
        return self.rows.end

    @property
    def room(self) -> int:
        return self.rows.room

    def append(self, rows: Tensor) -> _Misread:
        return replace(self, rows=self.rows.append(rows))

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return kv_cache.gather(KVCache(self.rows.cache.data, self.reads_as), self.rows.slots(numbers), dtype)

    def forget(self, before: int) -> _Misread:
        return replace(self, rows=self.rows.forget(before))


def _misread(rows: Rows) -> _Misread:
    assert isinstance(rows, PagedRows)
    return _Misread(rows, Dialect.FNUZ)


@dataclass(frozen=True)
class _Unrotated:
    """Indexer keys without their Hadamard rotation, which queries keep: the transform is its own inverse."""

    rows: Rows

    @property
    def first(self) -> int:
        return self.rows.first

    @property
    def end(self) -> int:
        return self.rows.end

    @property
    def room(self) -> int | None:
        return self.rows.room

    def append(self, rows: Tensor) -> _Unrotated:
        return replace(self, rows=self.rows.append(rows))

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return hadamard_ref(self.rows.gather(numbers, dtype))

    def forget(self, before: int) -> _Unrotated:
        return replace(self, rows=self.rows.forget(before))


def _with_layers(subject: Subject, change: Callable[[LayerState], LayerState]) -> Subject:
    """The subject with every layer of its empty states changed."""

    def new_state() -> State:
        state = subject.new_state()
        return replace(state, layers=tuple(change(layer) for layer in state.layers))

    return Subject(subject.model, new_state)


def misread_dialect(model: Model, cache: str) -> Subject:
    """All caches are written in e4m3fn; one kind of them is read as e4m3fnuz.

    Codes decode to half their value, and -0 (byte 0x80) to NaN.

    Args:
        model: the model.
        cache: ``"window"`` or ``"compressed"``.

    Raises:
        ValueError: ``cache`` is neither.
    """
    if cache not in ("window", "compressed"):
        raise ValueError(f"cache: got {cache!r}, expected 'window' or 'compressed'")

    def misread(layer: LayerState) -> LayerState:
        if cache == "window":
            return replace(layer, window=_misread(layer.window))
        return layer if layer.compressed is None else replace(layer, compressed=_misread(layer.compressed))

    return _with_layers(paged(model), misread)


def one_sided_hadamard(model: Model) -> Subject:
    """The indexer compares rotated queries with keys that are not rotated.

    Raises:
        ValueError: the model's formats rotate neither.
    """
    if not model.numerics.hadamard:
        raise ValueError("model: its numerics have hadamard=False, expected True: one side is to keep the rotation")

    def unrotate(layer: LayerState) -> LayerState:
        return layer if layer.index_keys is None else replace(layer, index_keys=_Unrotated(layer.index_keys))

    return _with_layers(paged(model), unrotate)


def router_bias(model: Model, offset: float, dtype: torch.dtype = torch.bfloat16) -> Subject:
    """The correction bias of every learned router, shifted and then stored in ``dtype``.

    A constant added to all biases of a router changes no selection in exact arithmetic, and weights do not contain the
    bias: with ``dtype`` float32 this is the same model for any offset that fp32 can hold. In bfloat16 biases around 8
    are multiples of 1/16.

    Args:
        model: the model.
        offset: added to every bias. The shipped biases are what load balancing made of zeros, so that they stand around
            0; the released Flash's stand around 8 (`ref.router`).
        dtype: what the sum is rounded to.
    """
    tensors = dict(model.tensors)
    for name, tensor in model.tensors.items():
        if name.endswith("ffn.gate.bias"):
            tensors[name] = (tensor.to(torch.float32) + offset).to(dtype).to(torch.float32)
    return paged(replace(model, tensors=tensors))


def transposed_sinkhorn(model: Model) -> Subject:
    """Streams are mixed with C[destination, source].

    The weights that make C's logits change rows with columns. Sinkhorn of transposed logits is the transposed matrix up
    to the order of its last two normalisations: over the shipped weights no entry differs by more than 0.03.
    """
    n = model.config.hc_mult
    tensors = dict(model.tensors)
    for name, tensor in model.tensors.items():
        if name.rsplit(".", 1)[-1] in ("hc_attn_fn", "hc_attn_base", "hc_ffn_fn", "hc_ffn_base"):
            mixing = tensor[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
            tensors[name] = torch.cat((tensor[: 2 * n], mixing))
    return paged(replace(model, tensors=tensors))


def breakages() -> Mapping[str, Breakage]:
    """Name -> function from the model to a subject with one bug, on paged FP8 caches; read-only."""
    found: dict[str, Breakage] = {
        "fp8_dialect_compressed": functools.partial(misread_dialect, cache="compressed"),
        "fp8_dialect_window": functools.partial(misread_dialect, cache="window"),
        "one_sided_hadamard": one_sided_hadamard,
        "transposed_sinkhorn": transposed_sinkhorn,
    }
    for offset in ROUTER_BIAS_OFFSETS:
        found[f"router_bias_bf16_{offset:g}"] = functools.partial(router_bias, offset=offset)
    return MappingProxyType(found)
