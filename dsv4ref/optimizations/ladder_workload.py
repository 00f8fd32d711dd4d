"""What the ladder runs: one fixed benchmark on a slice of V4, one decode engine per set of switches, and its gate.

All requests are submitted at once. Their prompts are computed in chunks, untimed; then every step is a decode step with
one row per request, and those are timed, a window of steps at a time. So "output tok/s" here is decode alone: requests
in flight over the mean time of a step. All engines of a pass stand at the same positions in the same round.

The gate is the equality of greedy tokens with the engine that has every switch off, on requests of their own that join
at two moments. A first divergence is allowed where the two tokens' logits are closer than twice the budget; the budget
is twice the largest error of a logit under plain bf16 attention, as for the engine's own tests.

Weights are random and drawn in the released storage formats: MXFP4 experts, FP8 linears. What random weights cannot
show is a routing histogram with hot experts.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA, V4_FLASH, V4_TINY, ModelConfig, RouterConfig
from dsv4ref.formats.scope import Scope
from dsv4ref.optimizations.ladder_attribution import Switches, features_of
from dsv4ref.ref.census import DTYPES, TensorSpec, census, is_quantised, scale_name
from dsv4ref.ref.checkpoint_writer import random_tensor
from dsv4ref.ref.model import Model
from dsv4ref.ref.sparse_attention import sparse_attention_plain
from dsv4ref.serving.engine import DecodeEngine

__all__ = [
    "PRESETS",
    "EngineSubject",
    "Generated",
    "Preset",
    "divergent",
    "gate_budget",
    "generate",
    "get_preset",
    "plain_generated",
    "prompts",
    "slice_model",
]


@dataclass(frozen=True)
class Preset:
    """A benchmark and everything that fixes it.

    Args:
        name: as typed on the command line.
        config: the slice of a model.
        requests: requests in flight.
        prompt, output: tokens of each.
        chunk: prompt tokens of a step at most.
        window: decode steps of one sample.
        warmup: decode steps of a fresh engine that are not counted.
        repeats: windows per rung unless the command says otherwise.
        gate: requests, prompt and output tokens of the gate.
        rehearsal: it shows the method and says nothing about speed.
        about: what it is.
    """

    name: str
    config: ModelConfig
    requests: int
    prompt: int
    output: int
    chunk: int
    window: int
    warmup: int
    repeats: int
    gate: tuple[int, int, int]
    rehearsal: bool
    about: str

    @property
    def max_length(self) -> int:
        """Tokens that one request computes at most."""
        return self.prompt + self.output - 1

    def settings(self) -> dict[str, Any]:
        """Everything that a run may not change while it resumes, as plain values; repeats may."""
        values = asdict(self)
        del values["repeats"], values["about"]
        return values

    def facts(self) -> dict[str, Any]:
        """What the benchmark is, for a table."""
        kinds = [self.config.layer_kind(layer) for layer in range(self.config.n_layers)]
        return {
            "model": f"{self.config.name}: layers {', '.join(kinds)}, width {self.config.hidden_size}, "
            f"{self.config.router.n_experts} experts in MXFP4, random weights",
            "requests": self.requests,
            "tokens in / out": f"{self.prompt} / {self.output}",
            "steps per window": self.window,
            "warm-up steps": self.warmup,
        }


def _slice(model: ModelConfig, name: str, ratios: tuple[int, ...], **changes: Any) -> ModelConfig:
    """The first layers of a model would all be of one kind; a slice has one of each, the first routed by token id."""
    return replace(
        model, name=name, n_layers=len(ratios), compress_ratios=ratios, n_mtp_layers=0, n_hash_layers=1, **changes
    )


_TINY = _slice(
    V4_TINY, "v4-tiny-slice", (SWA, C4, C128), hidden_size=64, vocab_size=96, n_heads=4, q_lora_rank=32,
    o_lora_rank=64, window_size=24, index_topk=5, moe_inter_dim=32,
    router=RouterConfig(n_experts=8, top_k=3, scoring="sqrtsoftplus", route_scale=1.5),
)  # fmt: skip

# The chunk: a slot's window ring holds a whole one, and the steps that the prompts take are lost to the first requests.
# Of 1024 prompts of 512, 2048 leaves every request 256 decode steps with all others in flight.
#
# The gate's requests fill the window and close an entry of either kind. Timed contexts stay below 4 * topk tokens, so
# no preset at Flash widths has a row from which the indexer has to choose.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "h200-slice", _slice(V4_FLASH, "v4-flash-slice", (SWA, C4, C128)), requests=1024, prompt=512,
                output=512, chunk=2048, window=16, warmup=8, repeats=30, gate=(8, 136, 8), rehearsal=False,
                about="the sources' benchmark (512 in, 512 out, 1024 concurrent) on three layers of V4-Flash",
            ),
            Preset(
                "h200-short", _slice(V4_FLASH, "v4-flash-slice", (SWA, C4, C128)), requests=32, prompt=128,
                output=512, chunk=2048, window=10, warmup=8, repeats=30, gate=(8, 136, 8), rehearsal=False,
                about="the same layers with 32 requests of 128 tokens: a pass of prompts is 128 times smaller",
            ),
            Preset(
                "tiny", _TINY, requests=2, prompt=5, output=16, chunk=16, window=2, warmup=1, repeats=10,
                gate=(3, 26, 4), rehearsal=True, about="the same method on a toy; no statement about speed",
            ),
        )
    }
)  # fmt: skip


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# --- model and prompts ---


def slice_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Model:
    """A random model in the released storage formats.

    What is stored as codes is drawn as codes, on the device: quantising random numbers for 256 experts a layer would
    take longer than the benchmark. Scales keep matrices at variance 1 / width, to a power of two.

    Args:
        config: any V4 model.
        seed: of the weights; a tensor depends on it, its name and the device's kind only.
        device: where the weights lie.
    """
    tensors: dict[str, Tensor] = {}
    for name, spec in census(config).items():
        if spec.dtype == "F8_E8M0":
            continue  # comes with its weight
        if is_quantised(spec):
            tensors[name], tensors[scale_name(name)] = _codes(
                name, spec, census(config)[scale_name(name)], seed, device
            )
        else:
            tensors[name] = random_tensor(name, config, seed).to(device)
    return Model(config, tensors)


_E2M1_MEAN_SQUARE = sum(value * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8


def _codes(
    name: str, spec: TensorSpec, scale: TensorSpec, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Random codes of a quantised matrix, and one scale for all its blocks."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    width = spec.logical_shape[-1]
    if spec.dtype == "I8":
        # Every byte is two e2m1 codes.
        codes = torch.randint(0, 256, spec.shape, generator=generator, device=device, dtype=torch.uint8).view(
            torch.int8
        )
        mean_square = _E2M1_MEAN_SQUARE
    else:
        codes = torch.randn(spec.shape, generator=generator, device=device).to(DTYPES[spec.dtype])
        mean_square = 1.0
    exponent = round(math.log2(1 / (width * mean_square)) / 2)
    scales = torch.full(scale.shape, 127 + exponent, device=device, dtype=torch.uint8)
    return codes, scales.view(DTYPES[scale.dtype])


def prompts(config: ModelConfig, count: int, length: int, seed: int) -> Tensor:
    """Random token ids, int64 ``[count, length]`` on the host."""
    return torch.randint(0, config.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


# --- the gate ---


@dataclass
class Generated:
    """Tokens of every request, and the logits ``[V]`` that each was taken from."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)


def _engine(model: Model, switches: Iterable[str], device: torch.device | str, **sizes: Any) -> DecodeEngine:
    return DecodeEngine(model, features_of(switches), device=device, **sizes)


def _gate_engine(model: Model, asked: Tensor, new: int, switches: Iterable[str], device: Any) -> DecodeEngine:
    count, length = asked.shape
    # A chunk that cuts a prompt, and a block that the window does not fill.
    sizes = {"slots": count, "max_length": length + new, "chunk": max(1, 2 * length - 1), "block_size": 16}
    return _engine(model, switches, device, **sizes)


def generate(model: Model, asked: Tensor, new: int, switches: Iterable[str], device: torch.device | str) -> Generated:
    """Greedy tokens of requests that join at two moments, by an engine with these switches.

    Args:
        model: of `slice_model`.
        asked: int64 ``[R, P]``, the prompts.
        new: tokens of each answer.
        switches: which are on.
        device: of the engine.
    """
    return _drive(_gate_engine(model, asked, new, switches, device), asked, new)


def plain_generated(model: Model, asked: Tensor, new: int, device: torch.device | str) -> Generated:
    """The same by the engine with every switch off and the straightforward bf16 attention in decode rows."""

    def attend(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        scopes = [window] if compressed is None else [window, compressed]
        where = out.device
        o, _ = sparse_attention_plain(q.to(where, torch.bfloat16), scopes, sink.to(where), model.config.softmax_scale)
        return o.to(q.device, q.dtype)

    engine = _gate_engine(model, asked, new, (), device)
    engine.operations = replace(engine.operations, attend=attend)
    return _drive(engine, asked, new)


def _drive(engine: DecodeEngine, asked: Tensor, new: int) -> Generated:
    seen, later = Generated(), asked.shape[0] // 2
    for prompt in asked[later:]:
        engine.submit(prompt, new)
    waiting = list(asked[:later])
    while not engine.idle or waiting:
        result = engine.step()
        for id, token in result.tokens.items():
            seen.tokens.setdefault(id, []).append(token)
            seen.logits.setdefault(id, []).append(result.logits[id].float().cpu())
        if result.decoded and waiting:  # others join where the first ones already decode
            for prompt in waiting:
                engine.submit(prompt, new)
            waiting = []
        failed = [request for request in result.done if request.error is not None]
        if failed:
            raise RuntimeError(f"request {failed[0].id} failed: {failed[0].error}")
    return seen


def _agreed(run: Generated, reference: Generated, id: int) -> int:
    pairs = zip(run.tokens.get(id, ()), reference.tokens[id], strict=False)
    return next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(len(run.tokens.get(id, ())), len(reference.tokens[id]))
    )


def gate_budget(plain: Generated, reference: Generated) -> float:
    """Twice the largest error of a logit under plain bf16 attention, while its tokens are the reference's."""
    worst = 0.0
    for id in reference.tokens:
        steps = slice(0, _agreed(plain, reference, id) + 1)
        for got, want in zip(plain.logits[id][steps], reference.logits[id][steps], strict=True):
            worst = max(worst, float((got - want).abs().max()))
    return 2 * worst


def divergent(run: Generated, reference: Generated, budget: float) -> int:
    """Requests whose tokens leave the reference's by more than the budget explains.

    Args:
        run, reference: of the same requests.
        budget: of `gate_budget`; two logits may each be off by it.
    """
    count = 0
    for id, tokens in reference.tokens.items():
        at = _agreed(run, reference, id)
        if at == len(tokens) and len(run.tokens.get(id, ())) == at:
            continue
        if at >= len(run.tokens.get(id, ())):
            count += 1  # it ended early, or ran on
            continue
        logits = reference.logits[id][at]
        count += not float(logits.max() - logits[run.tokens[id][at]]) <= 2 * budget
    return count


# --- the benchmark ---


class EngineSubject:
    """One engine in its decode phase: every request decodes, nobody joins or leaves.

    Args:
        model: the slice.
        preset: the benchmark.
        switches: which are on.
        asked: int64 ``[requests, prompt]``.
        device: of the engine.

    Attributes:
        on_gpu: whether steps are waited for and memory is counted.
        engine_bytes: what building it and computing the prompts left allocated on the GPU; None on the CPU.
    """

    def __init__(
        self, model: Model, preset: Preset, switches: Switches, asked: Tensor, device: torch.device | str
    ) -> None:
        self._preset, self.on_gpu = preset, torch.device(device).type == "cuda"
        before = self._allocated()
        sizes = {"slots": preset.requests, "max_length": preset.max_length, "chunk": preset.chunk}
        self._engine = _engine(model, sorted(switches), device, **sizes)
        for prompt in asked:
            self._engine.submit(prompt, preset.output)
        self._made = 0
        while self._step().prefilled:
            pass
        for _ in range(preset.warmup):
            self._step()
        after = self._allocated()
        self.engine_bytes = None if before is None or after is None else after - before

    @property
    def room(self) -> int:
        """Decode steps before the first request leaves."""
        return self._preset.output - self._made - 1

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return self._preset.prompt + self._made

    def step(self) -> None:
        """One decode step of all requests.

        Raises:
            RuntimeError: a request has no token left, or the step decoded another number of rows.
        """
        if self.room < 1:
            raise RuntimeError(f"step: {self._made} of {self._preset.output} tokens are generated, expected room")
        result = self._step()
        if result.decoded != self._preset.requests or result.prefilled or result.done:
            raise RuntimeError(
                f"step: decoded {result.decoded} rows, prefilled {result.prefilled}, {len(result.done)} left; "
                f"expected {self._preset.requests} decode rows and nothing else"
            )

    def window(self, steps: int) -> tuple[float, ...]:
        """Seconds of each of so many decode steps, by the host's clock, the device idle before and after each."""
        seconds = []
        for _ in range(steps):
            self._wait()
            started = time.perf_counter()
            self.step()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return tuple(seconds)

    def step_bytes(self) -> int | None:
        """Bytes that one step allocates on top of what is there, at its peak; None on the CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _step(self) -> Any:
        result = self._engine.step()
        failed = [request for request in result.done if request.error is not None]
        if failed:
            raise RuntimeError(f"request {failed[0].id} failed: {failed[0].error}")
        # Requests whose prompt was in the first chunk are ahead of the others by the steps that the rest took.
        self._made += bool(result.tokens)
        return result

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _allocated(self) -> int | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
