"""Small models for the engine's tests, and runs of it that can be compared token by token and logit by logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V4_TINY, ModelConfig, RouterConfig
from dsv4ref.formats import mxfp4
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.scope import Scope
from dsv4ref.ref.checkpoint_writer import quantise_fp8, random_tensor
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.numerics import DEFAULT, Numerics
from dsv4ref.ref.sparse_attention import sparse_attention_plain
from dsv4ref.ref.weights import weight_shapes
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import Features
from dsv4ref.serving.operations import compose
from dsv4ref.serving.requests import Request

torch.set_num_threads(1)


def slice_model(
    ratios: tuple[int, ...] = (0, 4, 128), seed: int = 0, numerics: Numerics = DEFAULT, **changes: Any
) -> Model:
    """A random model whose heads fit the caches and whose ``wo_a`` is stored in FP8; its window is no whole block."""
    config = replace(
        V4_TINY, name="slice", n_layers=len(ratios), compress_ratios=ratios, n_mtp_layers=0, hidden_size=64,
        vocab_size=96, n_heads=4, q_lora_rank=32, o_lora_rank=64, window_size=24, index_topk=5, moe_inter_dim=32,
        router=RouterConfig(n_experts=8, top_k=3, scoring="sqrtsoftplus", route_scale=1.5), **changes,
    )  # fmt: skip
    tensors = {name: random_tensor(name, config, seed) for name in weight_shapes(config)}
    for name in [name for name in tensors if name.endswith("wo_a.weight")]:
        tensors[name], tensors[name.replace("weight", "scale")] = quantise_fp8(tensors[name].float())
    return Model(config, tensors, numerics)


def in_mxfp4(model: Model) -> Model:
    """The model with its routed experts stored as the released models store them."""
    tensors = dict(model.tensors)
    for name in [name for name in tensors if ".experts." in name]:
        packed, tensors[name.replace("weight", "scale")] = mxfp4.quantise(tensors[name])
        tensors[name] = packed.view(torch.int8)
    return Model(model.config, tensors, model.numerics)


def prompt(config: ModelConfig, length: int, seed: int) -> list[int]:
    tokens = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    return [int(token) for token in tokens]


def engine(model: Model, **changes: Any) -> DecodeEngine:
    """An engine whose window blocks and chunks are small enough for rings to wrap within a few steps."""
    values: dict[str, Any] = {"slots": 3, "max_length": 160, "chunk": 20, "block_size": 16}
    subject = DecodeEngine(model, **{**values, **changes})
    if subject.decoder is not None:
        _route_prompts_by_the_reference(subject, values["slots"] if "slots" not in changes else changes["slots"])
    return subject


def _route_prompts_by_the_reference(subject: DecodeEngine, slots: int) -> None:
    """Interpreted, the router's kernel would take most of a prompt's time; batches of up to ``slots`` rows keep it."""
    kernel, reference = subject.operations.route, compose(subject.model, Features(), "cpu").route

    def route(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        return (kernel if x.shape[0] <= slots else reference)(x, *given)

    subject.operations = replace(subject.operations, route=route)


Arrivals = Mapping[int, Sequence[tuple[list[int], int]]]
"""Step -> (prompt, tokens to generate) of the requests that are submitted before it."""

_CONFIG = slice_model((0,)).config
# Joins in the middle of others, more requests than slots, prompts in several chunks, the window's wrap at 24 tokens.
ARRIVALS: Arrivals = {
    0: [(prompt(_CONFIG, 5, 0), 7), (prompt(_CONFIG, 29, 1), 4)],
    2: [(prompt(_CONFIG, 1, 2), 6)],
    3: [(prompt(_CONFIG, 9, 3), 3)],
}
# The C128 entry that position 127 closes; the chunk leaves a token over.
LONG: Arrivals = {0: [(prompt(_CONFIG, 124, 4), 7)], 1: [(prompt(_CONFIG, 6, 5), 6)]}


@dataclass
class Run:
    """What became of every request: its tokens, and the logits that each was taken from."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)
    done: dict[int, Request] = field(default_factory=dict)
    rows: list[tuple[int, int]] = field(default_factory=list)


def drive(engine: DecodeEngine, arrivals: Arrivals, cancels: Mapping[int, Sequence[int]] | None = None) -> Run:
    """Step until all is done; blocks are counted after every step."""
    run, step = Run(), 0
    while not engine.idle or step <= max(arrivals, default=-1):
        for tokens, new in arrivals.get(step, ()):
            engine.submit(tokens, new)
        for id in (cancels or {}).get(step, ()):
            engine.cancel(id)
        result = engine.step()
        engine.check_blocks()
        run.rows.append((result.decoded, result.prefilled))
        for id, token in result.tokens.items():
            run.tokens.setdefault(id, []).append(token)
            run.logits.setdefault(id, []).append(result.logits[id].cpu())  # they lie where they were computed
        run.done |= {request.id: request for request in result.done}
        step += 1
    return run


def alone(model: Model, arrivals: Arrivals) -> Run:
    """The same requests by the reference model, each on its own, whole prompt first."""
    run = Run()
    requests = [request for step in sorted(arrivals) for request in arrivals[step]]
    for id, (tokens, new) in enumerate(requests):
        output, state = forward_ref(model, torch.tensor(tokens))
        run.tokens[id], run.logits[id] = [], []
        for _ in range(new):
            run.logits[id].append(output.logits[-1])
            run.tokens[id].append(int(output.logits[-1].argmax()))
            if len(run.tokens[id]) < new:
                output, state = forward_ref(model, torch.tensor(run.tokens[id][-1:]), state)
    return run


def plain_attend(model: Model) -> Any:
    """Decode attention by the straightforward bf16 implementation that numerical budgets are relative to."""

    def attend(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        scopes = [window] if compressed is None else [window, compressed]
        o, _ = sparse_attention_plain(
            q.bfloat16().to(out.device), scopes, sink.to(out.device), model.config.softmax_scale
        )
        return o.to(q.device, q.dtype)

    return attend


def agreed(run: Run, other: Run, id: int) -> int:
    """Tokens of a request that two runs share from the first on."""
    pairs = zip(run.tokens[id], other.tokens[id], strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(run.tokens[id]))


def error_norms(run: Run, other: Run) -> dict[int, float]:
    """Relative error norm of each request's logits, over the steps that both runs took after the same tokens."""
    norms = {}
    for id in other.tokens:
        steps = slice(0, agreed(run, other, id) + 1)
        got, want = (torch.stack(r.logits[id][steps]).double() for r in (run, other))
        norms[id] = float((got - want).norm() / want.norm())
    return norms


def smooth_model(ratios: tuple[int, ...] = (0, 4, 128)) -> Model:
    """Without a choice that an error could flip: all layers route by token id, and top-k keeps every entry."""
    model = slice_model(ratios, numerics=replace(DEFAULT, kv_dialect=Dialect.FNUZ))
    tensors = dict(model.tensors)
    for layer in range(1, len(ratios)):
        tensors.pop(f"layers.{layer}.ffn.gate.bias")
        tensors[f"layers.{layer}.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"]
    return Model(replace(model.config, n_hash_layers=len(ratios), index_topk=64), tensors, model.numerics)


def assert_same(run: Run, reference: Run, budget: float) -> None:
    """Equal tokens, or a first divergence between two tokens whose logits differ by no more than twice the budget."""
    assert run.tokens.keys() == reference.tokens.keys()
    for id, tokens in reference.tokens.items():
        at = agreed(run, reference, id)
        if at == len(tokens):
            continue
        logits, other = reference.logits[id][at], run.tokens[id][at]
        margin = float(logits.max() - logits[other])
        where = f"request {id}, token {at}: got {other}, expected {tokens[at]}"
        assert margin <= 2 * budget, f"{where}, {margin} apart with a budget of {budget}"


def largest_error(run: Run, reference: Run) -> float:
    """The largest error of a logit while the tokens agree."""
    worst = 0.0
    for id in reference.tokens:
        for got, want in zip(run.logits[id], reference.logits[id][: agreed(run, reference, id) + 1], strict=False):
            worst = max(worst, float((got - want).abs().max()))
    return worst


def plain_run(model: Model, arrivals: Arrivals, device: str) -> Run:
    """The reference engine with the straightforward bf16 attention in decode rows."""
    subject = engine(model, device=device)
    subject.operations = replace(subject.operations, attend=plain_attend(model))
    return drive(subject, arrivals)


def assert_within_budget(run: Run, off: Run, plain: Run) -> None:
    """Every request's logits within twice the error of plain bf16 attention, and its tokens with them."""
    allowed = error_norms(plain, off)
    for id, norm in error_norms(run, off).items():
        assert norm <= 2 * allowed[id], f"request {id}: error {norm}, plain bf16 attention {allowed[id]}"
    assert_same(run, off, 2 * largest_error(plain, off))


def same_bits(run: Run, other: Run) -> None:
    """The same tokens and logits, to the last bit, and the same rows in every step."""
    assert run.tokens == other.tokens
    for id, logits in other.logits.items():
        for number, (got, want) in enumerate(zip(run.logits[id], logits, strict=True)):
            different = (got != want).nonzero()
            assert not different.numel(), f"request {id}, token {number}: {got[different[0]]}, {want[different[0]]}"
    assert run.rows == other.rows
