"""What the ladder runs: one fixed benchmark on a slice of V4, and when two runs of it gave the same tokens.

The rule of every gate here: greedy tokens equal those of the engine that has every switch off. A first divergence is
allowed where the two tokens' logits are closer than twice the budget; the budget is twice the largest error of a logit
under plain bf16 attention, as for the engine's own tests. A ladder's own gate runs the rows that it times
(`dsv4ref.optimizations.ladder_subjects`); the one here runs requests that join at two moments, prompts and all.

Weights are random and drawn in the released storage formats: MXFP4 experts, FP8 linears. What random weights cannot
show is a routing histogram with hot experts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA, V4_FLASH, V4_TINY, ModelConfig, RouterConfig
from dsv4ref.formats.scope import Scope
from dsv4ref.optimizations.ladder_attribution import features_of
from dsv4ref.ref.census import DTYPES, TensorSpec, census, is_quantised, scale_name
from dsv4ref.ref.checkpoint_writer import random_tensor
from dsv4ref.ref.model import Model
from dsv4ref.ref.sparse_attention import sparse_attention_plain
from dsv4ref.serving.engine import DecodeEngine

__all__ = [
    "PRESETS",
    "Generated",
    "Preset",
    "SoakPlan",
    "attend_plainly",
    "divergent",
    "gaps",
    "gate_budget",
    "generate",
    "get_preset",
    "plain_generated",
    "prompts",
    "slice_model",
]


@dataclass(frozen=True)
class SoakPlan:
    """A run of joins and leaves.

    Args:
        steps: in all.
        mark: the step behind which memory is looked at for the first time; the last one is the second.
        slots: requests at once.
        lengths: (prompt, output) tokens of the requests, over and over.

    Raises:
        ValueError: a mark that is not before the last step.
    """

    steps: int
    mark: int
    slots: int
    lengths: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 0 < self.mark < self.steps:
            raise ValueError(f"mark: got {self.mark}, expected a step before the last one, {self.steps}")


@dataclass(frozen=True)
class Preset:
    """A benchmark and everything that fixes it.

    Args:
        name: as typed on the command line.
        config: the slice of a model.
        requests: requests in flight.
        prompt, output: tokens of each.
        chunk: prompt tokens of a step at most.
        prompt_rows: prompts go through device steps, a token of each request and step; otherwise through the reference.
        window: decode steps of one sample at most.
        sample_s: seconds that a sample should take; a rung whose step is long takes fewer steps, at least two.
        warmup: decode steps of a fresh engine that are not counted, and whose tokens its gate compares.
        budget: how many of these steps the gate's budget is measured in; in fewer it is no larger.
        repeats: rounds unless the command says otherwise.
        often: rounds of the rungs whose steps are fast enough for a whole window, for one of the others.
        gate: requests, prompt and output tokens of the gate with joins.
        batches: batch sizes whose metadata is measured.
        soak: the run of joins and leaves; None where another preset's says the same.
        begin: the first rung has every switch up to this one on; None: it has everything off.
        rehearsal: it shows the method and says nothing about speed.
        about: what it is.

    Raises:
        ValueError: a budget of no step, or of more than are gated.
    """

    name: str
    config: ModelConfig
    requests: int
    prompt: int
    output: int
    chunk: int
    prompt_rows: bool
    window: int
    sample_s: float
    warmup: int
    budget: int
    repeats: int
    often: int
    gate: tuple[int, int, int]
    batches: tuple[int, ...]
    soak: SoakPlan | None
    begin: str | None
    rehearsal: bool
    about: str

    def __post_init__(self) -> None:
        if not 1 <= self.budget <= self.warmup:
            raise ValueError(f"budget: got {self.budget}, expected 1 to {self.warmup} steps, the warm-up's")

    @property
    def max_length(self) -> int:
        """Tokens that one request computes at most."""
        return self.prompt + self.output - 1

    def settings(self) -> dict[str, Any]:
        """Everything that a run may not change while it resumes, as plain values; how many rounds may."""
        values = asdict(self)
        for name in ("repeats", "often", "about"):
            del values[name]
        return values

    def facts(self) -> dict[str, Any]:
        """What the benchmark is, for a table."""
        kinds = [self.config.layer_kind(layer) for layer in range(self.config.n_layers)]
        return {
            "model": f"{self.config.name}: layers {', '.join(kinds)}, width {self.config.hidden_size}, "
            f"{self.config.router.n_experts} experts in MXFP4, random weights",
            "first rung": "everything off" if self.begin is None else f"everything up to {self.begin}",
            "requests": self.requests,
            "tokens in / out": f"{self.prompt} / {self.output}",
            "steps per window": f"{self.window}, fewer where they take more than {self.sample_s:g} s, at least 2",
            "warm-up steps, gated": self.warmup,
            "prompts": "a token of each per device step" if self.prompt_rows else f"in chunks of {self.chunk}",
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

# The reference computes a prompt row by row, on the host; 1024 prompts of 512 are half a million rows, or 512 device
# steps. A slot's window ring holds a whole chunk, which is then of no use.
#
# A replayed step's time has plateaus that last for a second or so. Windows are so short that those that are compared
# mostly lie on one of them, and there are many of them.
#
# The gate's requests fill the window and close an entry of either kind, in h200-short within the steps that warm an
# engine up. Timed contexts stay below 4 * topk tokens, so no preset at Flash widths has a row from which the indexer
# has to choose.
#
# Behind 512 tokens and one, the third step closes a C4 entry; everything off takes many seconds for each of them.
_FLASH: dict[str, Any] = {
    "config": _slice(V4_FLASH, "v4-flash-slice", (SWA, C4, C128)),
    "chunk": 64, "prompt_rows": True, "gate": (2, 130, 4), "batches": (1, 64, 1024), "rehearsal": False,
}  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "h200-slice", requests=1024, prompt=512, output=512, window=4, sample_s=0.65, warmup=3, budget=1,
                repeats=150, often=1, soak=None, begin="device_step", **_FLASH,
                about="the sources' benchmark (512 in, 512 out, 1024 concurrent) on three layers of V4-Flash",
            ),
            Preset(
                "h200-short", requests=32, prompt=124, output=512, window=8, sample_s=1.0, warmup=5, budget=5,
                repeats=10, often=12,
                soak=SoakPlan(2000, 100, 8, ((4, 100), (2, 40), (9, 200), (6, 60), (1, 20))), begin=None, **_FLASH,
                about="the same layers with 32 requests of 124 tokens, whose first steps close entries of both kinds",
            ),
            Preset(
                "tiny", _TINY, requests=2, prompt=5, output=16, chunk=16, prompt_rows=False, window=2, sample_s=60.0,
                warmup=2, budget=2, repeats=10, often=1, gate=(3, 26, 4), batches=(1, 4),
                soak=SoakPlan(12, 4, 2, ((3, 4), (26, 2), (1, 3))), begin=None, rehearsal=True,
                about="the same method on a toy; no statement about speed",
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

    What is stored as codes is drawn as codes, on the device, and so are embedding and head: quantising random numbers
    for 256 experts a layer would take longer than the benchmark, and drawing half a billion on the host is slow too.
    Scales keep matrices at variance 1 / width, to a power of two.

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
        elif name in ("embed.weight", "head.weight"):
            tensors[name] = _vocabulary(name, spec, seed, device)
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


def _vocabulary(name: str, spec: TensorSpec, seed: int, device: torch.device | str) -> Tensor:
    """Embedding or head, with the variances of `random_tensor`."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.randn(spec.shape, generator=generator, device=device)
    return (values if name.startswith("embed") else values * spec.shape[-1] ** -0.5).to(DTYPES[spec.dtype])


def prompts(config: ModelConfig, count: int, length: int, seed: int) -> Tensor:
    """Random token ids, int64 ``[count, length]`` on the host."""
    return torch.randint(0, config.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


# --- the gate ---


@dataclass
class Generated:
    """Tokens of every request, and the logits ``[V]`` that each was taken from."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)


def _gate_engine(model: Model, asked: Tensor, new: int, switches: Iterable[str], device: Any) -> DecodeEngine:
    count, length = asked.shape
    # A chunk that cuts a prompt, and a block that the window does not fill.
    return DecodeEngine(
        model, features_of(switches), slots=count, max_length=length + new, chunk=max(1, 2 * length - 1), block_size=16,
        device=device,
    )  # fmt: skip


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
    engine = _gate_engine(model, asked, new, (), device)
    attend_plainly(engine)
    return _drive(engine, asked, new)


def attend_plainly(engine: DecodeEngine) -> None:
    """Give an engine with every switch off the straightforward bf16 attention in decode rows, for budgets."""
    scale = engine.model.config.softmax_scale

    def attend(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        scopes = [window] if compressed is None else [window, compressed]
        where = out.device
        o, _ = sparse_attention_plain(q.to(where, torch.bfloat16), scopes, sink.to(where), scale)
        return o.to(q.device, q.dtype)

    engine.operations = replace(engine.operations, attend=attend)


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
    """Twice the largest error of a logit under plain bf16 attention, while its tokens are the reference's.

    Args:
        plain: of `attend_plainly`, of as many tokens as it ran for.
        reference: of the same requests, of as many or more.
    """
    worst = 0.0
    for id in reference.tokens:
        steps = slice(0, min(_agreed(plain, reference, id) + 1, len(plain.tokens[id])))
        for got, want in zip(plain.logits[id][steps], reference.logits[id][steps], strict=True):
            worst = max(worst, float((got - want).abs().max()))
    return 2 * worst


def gaps(run: Generated, reference: Generated) -> dict[int, float]:
    """Requests with another token than the reference's, and by how much it had been lower in the reference's logits.

    Args:
        run, reference: of the same requests.

    Returns:
        Request -> the highest logit less that of the run's token where the two first differ; infinite where the run has
        ended early or went on.
    """
    found = {}
    for id, tokens in reference.tokens.items():
        at, given = _agreed(run, reference, id), run.tokens.get(id, [])
        if at == len(tokens) == len(given):
            continue
        found[id] = math.inf  # it ended early, or ran on
        if at < min(len(tokens), len(given)):
            logits = reference.logits[id][at]
            found[id] = float(logits.max() - logits[given[at]])
    return found


def divergent(run: Generated, reference: Generated, budget: float) -> int:
    """Requests whose tokens leave the reference's by more than the budget explains.

    Args:
        run, reference: of the same requests.
        budget: of `gate_budget`; two logits may each be off by it.
    """
    return sum(not gap <= 2 * budget for gap in gaps(run, reference).values())
