"""A small checkpoint for tests, ways to damage one, and a spy on what is read of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4ref.config import ModelConfig, RouterConfig
from dsv4ref.ref.checkpoint import INDEX

# Every layer kind and both routers, with matrices that blocks of 128 do not fill; about 1 MB.
SMALL = ModelConfig(
    name="small",
    vocab_size=48,
    hidden_size=160,
    n_layers=4,
    n_heads=4,
    head_dim=128,
    q_lora_rank=72,
    o_groups=2,
    o_lora_rank=40,
    index_n_heads=2,
    index_topk=4,
    moe_inter_dim=96,
    n_hash_layers=1,
    router=RouterConfig(n_experts=4, top_k=3, scoring="sqrtsoftplus", route_scale=1.5),
    compress_ratios=(0, 0, 4, 128, 0),
)
SHARD_BYTES = 100_000

TABLE = "layers.0.ffn.gate.tid2eid"
FP8, FP8_SCALE = "layers.1.attn.wq_b.weight", "layers.1.attn.wq_b.scale"
FP4, FP4_SCALE = "layers.2.ffn.experts.1.w2.weight", "layers.2.ffn.experts.1.w2.scale"


class Spy:
    """safetensors' safe_open, counting how many shards are open at a time and which tensors are read."""

    def __init__(self) -> None:
        self.open_now = self.most_open = self.times_opened = 0
        self.read: list[str] = []

    def __call__(self, path: Path, framework: str) -> SpiedShard:
        return SpiedShard(self, path, framework)


class SpiedShard:
    def __init__(self, spy: Spy, path: Path, framework: str) -> None:
        self.spy, self.shard = spy, safe_open(path, framework)

    def __enter__(self) -> SpiedShard:
        self.shard.__enter__()
        self.spy.times_opened += 1
        self.spy.open_now += 1
        self.spy.most_open = max(self.spy.most_open, self.spy.open_now)
        return self

    def __exit__(self, *error: object) -> None:
        self.spy.open_now -= 1
        self.shard.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.shard.keys())

    def get_slice(self, name: str) -> Any:
        return self.shard.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        self.spy.read.append(name)
        return self.shard.get_tensor(name)


def read_index(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return content


def shard_of(folder: Path, name: str) -> str:
    return str(read_index(folder)["weight_map"][name])


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = read_index(folder)
    edit(content)
    (folder / INDEX).write_text(json.dumps(content))


def edit_shard(folder: Path, shard: str, edit: Callable[[dict[str, Tensor]], None]) -> None:
    content = {name: tensor.clone() for name, tensor in load_file(folder / shard).items()}
    edit(content)
    save_file(content, folder / shard)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype is tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        differ = (as_bytes(got[name]) != as_bytes(tensor)).nonzero()
        assert not len(differ), f"{name}: byte {int(differ[0])} differs"
