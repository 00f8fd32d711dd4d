"""Small V4 models with random weights, for tests of the reference; and the failure message they share.

All have 64 index heads: with few, exact-zero score ties make two correct implementations select different entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V4_TINY, ModelConfig
from dsv4ref.ref.weights import weight_shapes

torch.set_num_threads(1)


def tiny(ratios: tuple[int, ...], **changes: Any) -> ModelConfig:
    """A model with these main-layer ratios and one MTP block; heads are 128 wide unless changed."""
    values: dict[str, Any] = {
        "name": "test",
        "n_layers": len(ratios),
        "compress_ratios": (*ratios, 0),
        "head_dim": 128,
        "hidden_size": 128,
        "vocab_size": 96,
        "q_lora_rank": 64,
        "o_lora_rank": 32,
        "moe_inter_dim": 64,
        "index_topk": 8,
        "n_hash_layers": min(1, len(ratios)),
    }
    return replace(V4_TINY, **(values | changes))


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """fp32 weights under which every part matters: O(1) activations, gates, sinks, biases and mixing weights."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        if name.endswith("tid2eid"):
            rows = [torch.randperm(config.router.n_experts, generator=rng) for _ in range(shape[0])]
            tensors[name] = torch.stack(rows)[:, : shape[1]].contiguous()
        elif name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * torch.randn(shape, generator=rng)
        elif len(shape) == 1 or name.endswith(".ape"):
            tensors[name] = 0.5 * torch.randn(shape, generator=rng)
        else:
            tensors[name] = torch.randn(shape, generator=rng) * shape[-1] ** -0.5
    return tensors


def random_tokens(config: ModelConfig, count: int, seed: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


class Recorded(Mapping[str, Tensor]):
    """A mapping that knows which tensors were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def assert_close(got: Tensor, want: Tensor, limit: float, what: str = "") -> float:
    """``max |got - want| <= limit``, or fail with the worst index and both values. Returns the maximum."""
    assert got.shape == want.shape, f"{what} shapes {tuple(got.shape)} and {tuple(want.shape)}"
    if not got.numel():
        return 0.0
    difference = (got.double() - want.double()).abs()
    difference = torch.where(torch.isnan(difference), torch.inf, difference)
    worst = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    largest = float(difference.flatten()[worst])
    assert largest <= limit, (
        f"{what} at {index}: {got.flatten()[worst].item()}, expected {want.flatten()[worst].item()} within {limit}"
    )
    return largest
