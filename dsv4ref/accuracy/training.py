"""Train the small model: ``python -m dsv4ref.accuracy.training --out FILE [--seed N]``.

Four stages, each a layout of `Task` and a way to select (`STAGES`): plain lookup of a few pairs, then operators, then
the whole length, all three attending densely; last with the indexer's own selection. The loss is the cross-entropy of
answers and copies, plus, for the indexer, the divergence of its scores from the attention that entries got
(DeepSeek-V3.2's way: the indexer learns from attention, attention learns nothing from the indexer).

What is not learnt by gradient:

* routers. With one expert per token the renormalised weight is a constant, so that a router gets no gradient: it stays
  the random partition that it starts as;
* their correction bias. After every step an expert with more than the mean load loses ``BIAS_STEP``, one with less
  gains it (`balance`, DeepSeek-V3's rule). The steps shrink to nothing, so that experts can specialise;
* shared experts keep their initial weights: left free they learn the operators by themselves, and what routing does
  would not show in any score.

What is chosen with the breakages in view, `initial_weights`:

* queries of the C4 layer start aligned with its keys, so that a token finds its own kind at once. From random weights
  the lookup is not found within the minutes that this may take;
* routers start with small weights: scores of neighbouring experts then are as close as those of 256 experts are, and a
  rounded bias can change a selection at all. They do not read the dimensions in which embeddings of keys start, so that
  an expert is chosen by what is to be done rather than by the key that was asked for;
* residual streams start with a mixing matrix that moves three streams in a ring, and with every half-block reading two
  of four streams and writing two. Started near the identity they stay near it, and its transpose is the same matrix.
  Of the permutations of four, only rings of three differ from their inverse also when applied twice.

Source: DeepSeek-V3 technical report, 2.1.2 (auxiliary-loss-free load balancing); DeepSeek-V3.2-Exp report (indexer).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED, VOCABULARY, Examples, Task
from dsv4ref.accuracy.twin import IndexTrace, Select, Trace, forward
from dsv4ref.config import C4, ModelConfig
from dsv4ref.ref.census import DTYPES, census
from dsv4ref.ref.weights import block_name, weight_shapes

__all__ = [
    "SEED",
    "STAGES",
    "Losses",
    "Stage",
    "Trainer",
    "as_stored",
    "balance",
    "index_loss",
    "initial_weights",
    "main",
    "source_hash",
    "train",
]

SEED = 0
"""Of the shipped weights."""

FIXED = (".ffn.gate.", ".shared_experts.")
"""Parts of names that are not learnt by gradient."""

TRAINING_SEEDS = 1_000_000
"""Training draws from seeds of this and up; everything below is held out."""

LEARNING_RATE = 3e-3
WARM_UP = 30
CLIP = 1.0
COPY_WEIGHT = 0.5
ROUTER_SCALE = 0.015
"""Standard deviation of router weights."""
KEY_WIDTH = 32
"""Dimensions in which embeddings of keys start, and which routers do not read."""
BIAS_STEP = 0.0005
BIAS_STEPS = 0.4
"""Share of all steps after which biases no longer move."""


@dataclass(frozen=True)
class Stage:
    """Some steps on one layout.

    Args:
        name: for the progress bar.
        task: the layout.
        steps: how many.
        batch: B.
        select: what C4 layers attend to.
    """

    name: str
    task: Task
    steps: int
    batch: int
    select: Select


STAGES = (
    Stage("lookup", Task(groups=8, pairs=6, gap=8, queries=6, operators=1), 120, 16, "all"),
    Stage("operators", Task(groups=11, pairs=10, gap=8, queries=10), 680, 16, "all"),
    Stage("full length", TASK, 30, 6, "all"),
    Stage("selected", TASK, 20, 4, "topk"),
)
"""What the shipped weights went through."""


@dataclass(frozen=True)
class Losses:
    """One step: cross-entropies, the indexer's divergence (nats), and shares of right answers."""

    retrieval: float
    copying: float
    index: float
    retrieval_right: float
    copying_right: float


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """fp32 weights to start from; the module says what is special about them.

    Args:
        config: `V4_TINY_TRAINED`, or one with its vocabulary and a hidden width above ``KEY_WIDTH``.
        seed: of all that is random.

    Returns:
        checkpoint name -> tensor, hash tables int64.
    """
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=rng) if not name.endswith("tid2eid") else torch.zeros(0)
        if name.endswith("tid2eid"):
            ranks = torch.rand(shape[0], config.router.n_experts, generator=rng)
            tensors[name] = ranks.argsort(dim=1)[:, : shape[1]].contiguous()
        elif name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        elif name.endswith(".gate.weight"):
            tensors[name] = ROUTER_SCALE * noise * (torch.arange(shape[1]) >= KEY_WIDTH)
        elif name.endswith(("hc_attn_base", "hc_ffn_base")):
            tensors[name] = _stream_logits(config.hc_mult, rng)
        elif name == "embed.weight":
            tensors[name] = _embedding(noise)
        elif name.endswith("hc_head_base"):
            tensors[name] = noise
        elif name.rsplit(".", 1)[-1].startswith("hc_") and name.endswith("_scale"):
            tensors[name] = torch.full(shape, 0.3)
        elif len(shape) == 1 or name.endswith(".ape"):
            tensors[name] = torch.zeros(shape)
        else:
            # What half-blocks write starts small, so that what streams carry at first is the token.
            small = 0.3 if name.endswith(("wo_b.weight", "w2.weight")) else 1.0
            tensors[name] = small * noise * shape[-1] ** -0.5 if name != "head.weight" else 0.1 * noise
    for layer in config.layers(C4):
        _align(tensors, f"{block_name(config, layer)}.attn", config)
    return tensors


def _embedding(noise: Tensor) -> Tensor:
    """Keys in the first ``KEY_WIDTH`` dimensions, other tokens in the rest, all of the same expected length."""
    token = torch.arange(noise.shape[0])
    is_key = (token >= VOCABULARY.first_key) & (token < VOCABULARY.first_value)
    in_key_width = torch.arange(noise.shape[1]) < KEY_WIDTH
    share = torch.where(is_key, KEY_WIDTH, noise.shape[1] - KEY_WIDTH) / noise.shape[1]
    return noise * (is_key[:, None] == in_key_width) * share[:, None].rsqrt()


def _stream_logits(n: int, rng: torch.Generator) -> Tensor:
    """Base of one half-block's mixing weights: read two of four streams, write two, move three of them in a ring."""

    def half() -> Tensor:
        signs = torch.where(torch.arange(n) < n // 2, 2.5, -2.5)
        return signs[torch.randperm(n, generator=rng)]

    ring = torch.randperm(n, generator=rng)
    target = torch.arange(n)
    target[ring[1:]] = ring[1:].roll(1)
    mixing = 4 * torch.eye(n)[target] + 0.3 * torch.randn(n, n, generator=rng)
    return torch.cat((half(), half(), mixing.flatten()))


def _align(tensors: dict[str, Tensor], attention: str, config: ModelConfig) -> None:
    """Queries and indexer queries become what keys of the same token are, as far as the latent's width allows."""
    latent = tensors[f"{attention}.wq_a.weight"]  # [q_lora, D]
    own = tensors[f"{attention}.compressor.wkv.weight"][config.head_dim :]  # [d, D], an entry's own group
    tensors[f"{attention}.wq_b.weight"] = (own @ latent.T).repeat(config.n_heads, 1)
    own = tensors[f"{attention}.indexer.compressor.wkv.weight"][config.index_head_dim :]
    tensors[f"{attention}.indexer.wq_b.weight"] += 0.5 * (own @ latent.T).repeat(config.index_n_heads, 1)


def index_loss(trace: IndexTrace, queries: int) -> Tensor:
    """Divergence of the indexer's softmax from attention over visible entries, KL(attention || indexer), in nats.

    Args:
        trace: of one C4 layer.
        queries: how many of the probed positions, from the first, it is averaged over.
    """
    mass = trace.mass[:, :queries]
    target = mass / mass.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    hidden = ~trace.visible[:queries]
    predicted = trace.scores[:, :queries].masked_fill(hidden, -1e9).log_softmax(dim=-1)
    return (torch.special.xlogy(target, target) - target * predicted).sum(dim=-1).mean()


def balance(bias: Tensor, load: Tensor, step: float) -> None:
    """Move a correction bias, in place, toward an even load: up by ``step`` below the mean load, down above it."""
    share = load.to(torch.float32)
    bias += step * torch.sign(share.mean() - share)


class Trainer:
    """Weights on their way through stages.

    Args:
        config: the model.
        seed: of weights and data.
        total: steps of the whole schedule: the learning rate falls along a cosine over them.
        tensors: weights to go on from; default `initial_weights`.

    Raises:
        ValueError: ``seed`` is negative.
    """

    def __init__(self, config: ModelConfig, seed: int, total: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more: below are the seeds of held-out examples")
        self.config, self.seed, self.total, self.step = config, seed, total, 0
        start = initial_weights(config, seed) if tensors is None else tensors
        self.tensors = {name: t.clone() for name, t in start.items()}
        self.biases = {
            layer: self.tensors[f"{block_name(config, layer)}.ffn.gate.bias"]
            for layer in range(config.n_hash_layers, config.n_layers)
        }
        learnt = {
            name: t.requires_grad_()
            for name, t in self.tensors.items()
            if t.is_floating_point() and not any(part in name for part in FIXED)
        }
        self.learnt = list(learnt.values())
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [t for t in self.learnt if t.dim() > 1], "weight_decay": 0.01},
                {"params": [t for t in self.learnt if t.dim() == 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            foreach=True,
        )

    def learn(self, examples: Examples, select: Select) -> Losses:
        """One step.

        Args:
            examples: the batch.
            select: what C4 layers attend to.

        Returns:
            Losses before the step.
        """
        probe = torch.cat((examples.retrieval, examples.copying))
        queries = examples.retrieval.shape[0]
        trace = forward(self.tensors, self.config, examples.tokens, select=select, probe=probe)
        targets = examples.targets(probe)  # [B, P]
        entropy = functional.cross_entropy(trace.logits.flatten(0, 1), targets.flatten(), reduction="none")
        retrieval, copying = entropy.view_as(targets).split((queries, probe.shape[0] - queries), dim=1)
        index = torch.stack([index_loss(part, queries) for part in trace.index.values()]).sum()
        loss = retrieval.mean() + COPY_WEIGHT * copying.mean() + index

        for group in self.optimiser.param_groups:
            group["lr"] = LEARNING_RATE * self._schedule()
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, CLIP)
        self.optimiser.step()
        self._balance(trace)
        self.step += 1
        right = (trace.logits.argmax(dim=-1) == targets).to(torch.float32)
        return Losses(
            retrieval=float(retrieval.detach().mean()),
            copying=float(copying.detach().mean()),
            index=float(index.detach()),
            retrieval_right=float(right[:, :queries].mean()),
            copying_right=float(right[:, queries:].mean()),
        )

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.total))))

    def _balance(self, trace: Trace) -> None:
        step = BIAS_STEP * max(0.0, 1 - self.step / (BIAS_STEPS * self.total))
        for layer, bias in self.biases.items():
            balance(bias, trace.loads[layer], step)

    def run(self, stage: Stage) -> Iterator[Losses]:
        """Every step of a stage, on data of this trainer's own seeds."""
        for _ in range(stage.steps):
            batch = stage.task.examples(stage.batch, TRAINING_SEEDS * (self.seed + 1) + self.step)
            yield self.learn(batch, stage.select)


def as_stored(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights as they are shipped: matrices and norms in bfloat16, what the released checkpoints hold in fp32 in fp32.

    Correction biases become multiples of 2^-16, so that adding 8 to them in fp32 is exact.

    Args:
        tensors: fp32 weights.
        config: the model.
    """
    stored = {}
    for name, spec in census(config).items():
        if name not in tensors:
            continue  # the scale of a matrix that is quantised in released checkpoints
        tensor = tensors[name].detach()
        dtype = DTYPES[spec.dtype]
        if name.endswith(".gate.bias"):
            tensor = (tensor * 2**16).round() / 2**16
        if not tensor.is_floating_point():
            stored[name] = tensor.contiguous()
        else:
            stored[name] = tensor.to(torch.float32 if dtype is torch.float32 else torch.bfloat16).contiguous()
    return stored


def source_hash() -> str:
    """sha256 of the code of task, forward pass and training, which weights are made by.

    Comments, docstrings and layout do not count, so that a better sentence does not make weights stale.
    """
    digest = hashlib.sha256()
    for name in ("task", "twin", "training"):
        digest.update(_code(Path(__file__).with_name(f"{name}.py")).encode())
    return digest.hexdigest()


def _code(path: Path) -> str:
    """A module's tokens without space between or within them; f-strings are cut differently by Python 3.12."""
    text, starts_line = [], True
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING):
                starts_line = True
            elif token.type not in (tokenize.COMMENT, tokenize.NL):
                docstring = starts_line and token.type == tokenize.STRING
                text.append("" if docstring else token.string)
                starts_line = False
    return "".join("".join(text).split())


def train(out: Path, seed: int = SEED, stages: Sequence[Stage] = STAGES, progress: bool = True) -> dict[str, str]:
    """Train, and write the weights, after every stage anew: a run that is cut short leaves something.

    Args:
        out: where to; a safetensors file.
        seed: of weights and data.
        stages: the schedule.
        progress: show a bar.

    Returns:
        The file's metadata.
    """
    from tqdm import tqdm

    total, begun, cpu = sum(stage.steps for stage in stages), time.monotonic(), time.process_time()
    trainer = Trainer(V4_TINY_TRAINED, seed, total)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, str] = {}
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for stage in stages:
            for losses in trainer.run(stage):
                bar.set_description(stage.name, refresh=False)
                bar.set_postfix_str(
                    f"retrieval {losses.retrieval_right:.2f} copying {losses.copying_right:.2f} "
                    f"loss {losses.retrieval:.3f} {losses.copying:.3f} indexer {losses.index:.3f}",
                    refresh=False,
                )
                bar.update()
            metadata = {
                "config": V4_TINY_TRAINED.name,
                "seed": str(seed),
                "steps": f"{trainer.step} of {total}",
                "sources": source_hash(),
                "torch": torch.__version__,
                "cpu_seconds": f"{time.process_time() - cpu:.0f}",
                "wall_seconds": f"{time.monotonic() - begun:.0f}",
            }
            save_file(as_stored(trainer.tensors, V4_TINY_TRAINED), str(out), metadata=metadata)
    return metadata


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dsv4ref.accuracy.training", description="Train the small model.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and data (default: %(default)s)")
    chosen = parser.parse_args()
    print(train(chosen.out, chosen.seed))


if __name__ == "__main__":
    main()
