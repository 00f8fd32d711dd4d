"""The routing baseline in eager PyTorch, and the closed forms that chapters about experts predict with.

The eager path is what an engine without fused routing kernels runs: scores, `torch.topk`, a masked lookup in the map, a
stable sort by expert, and index arithmetic for gather, scatter and tiles. It reads nothing back to the host, so it can
be captured; its ties are `torch.topk`'s, which defines none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.config import V3_2, V4_FLASH, RouterConfig
from dsv4ref.kernels.experts.dispatch import BLOCK_TOKENS, max_tiles

__all__ = [
    "FUSED_LAUNCHES",
    "eager_bytes",
    "eager_launches",
    "eager_plan",
    "eager_route_grouped",
    "eager_route_hash",
    "eager_route_learned",
    "fused_bytes",
    "fused_launches",
    "least_bytes",
    "load_facts",
    "loads",
]

FUSED_LAUNCHES = {"route": 1, "plan": 3}
"""Launches of the kernels; a test counts them."""


def eager_route_learned(logits: Tensor, bias: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """`route_learned` in eager PyTorch: weights fp32 and experts int32, ``[M, k]``."""
    scores = torch.sqrt(functional.softplus(logits.float()))
    experts = torch.topk(scores + bias, router.top_k, dim=-1).indices
    return _weights(scores, experts, router), experts.to(torch.int32)


def eager_route_hash(logits: Tensor, table: Tensor, token_ids: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """`route_hash` in eager PyTorch; token ids outside the table give -1 with weight 0."""
    known = ((token_ids >= 0) & (token_ids < table.shape[0]))[:, None]
    experts = table[token_ids.clamp(0, table.shape[0] - 1)]
    weights = _weights(torch.sqrt(functional.softplus(logits.float())), experts, router)
    return weights * known, experts.masked_fill(~known, -1).to(torch.int32)


def eager_route_grouped(logits: Tensor, bias: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """`route_grouped` in eager PyTorch."""
    assert router.n_groups is not None
    assert router.topk_groups is not None
    scores = torch.sigmoid(logits.float())
    biased = (scores + bias).unflatten(1, (router.n_groups, -1))
    best = biased.topk(2, dim=-1).values.sum(dim=-1).topk(router.topk_groups, dim=-1).indices
    kept = torch.zeros(biased.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
    masked = biased.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    experts = torch.topk(masked, router.top_k, dim=-1).indices
    return _weights(scores, experts, router), experts.to(torch.int32)


def _weights(scores: Tensor, experts: Tensor, router: RouterConfig) -> Tensor:
    chosen = scores.gather(1, experts)
    if router.norm_topk_prob:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return chosen * router.route_scale


def eager_plan(experts: Tensor, table: Tensor, num_local: int, block_m: int) -> dict[str, Tensor]:
    """`plan_dispatch` in eager PyTorch, by output name.

    Args:
        experts: int32 ``[M, k]`` global ids.
        table: int32 ``[E]`` of one rank's map.
        num_local: experts of this rank, at least 1.
        block_m: rows of a tile.
    """
    unknown = (experts < 0) | (experts >= table.shape[0])
    local = table[experts.clamp(0, table.shape[0] - 1)].masked_fill_(unknown, -1)
    flat = local.flatten()
    missing = flat < 0
    key = flat.masked_fill(missing, num_local)
    order = torch.sort(key, stable=True).indices
    counts, one = key.new_zeros(num_local + 1), key.new_ones(1)
    histogram = counts.scatter_add_(0, key.to(torch.int64), one.expand_as(key))[:num_local]
    offsets = functional.pad(histogram.cumsum(0, dtype=torch.int32), (1, 0))
    at = torch.arange(flat.shape[0], dtype=torch.int32, device=key.device)
    scatter = torch.empty_like(flat).scatter_(0, order, at).masked_fill_(missing, -1)
    gather = order.to(torch.int32).masked_fill_(at >= offsets[-1], -1)
    needed = (histogram + (block_m - 1)) // block_m
    ends = needed.cumsum(0, dtype=torch.int32)
    tiles = max_tiles(flat.shape[0], num_local, block_m)
    tile = torch.arange(tiles, dtype=torch.int32, device=key.device)
    unused = tile >= ends[-1]
    owner = torch.searchsorted(ends, tile, right=True, out_int32=True).clamp_(max=num_local - 1)
    first = offsets[owner] + (tile - (ends - needed)[owner]) * block_m
    return {
        "local": local,
        "histogram": histogram,
        "offsets": offsets,
        "gather": gather,
        "scatter": scatter,
        "tile_expert": owner.masked_fill_(unused, -1),
        "tile_first": first.masked_fill_(unused, -1),
    }


@functools.cache
def eager_launches(kind: str) -> int:
    """Launches of an eager path on fp32 logits, counted on a small batch: an operator counts as one.

    A lower bound of what a GPU launches, where a sort or a top-k is several kernels, more of them in larger batches.

    Args:
        kind: "learned", "hash", "grouped" or "plan".

    Raises:
        ValueError: another kind.
    """
    from dsv4ref.evidence.launches import count_launches  # not above: dsv4ref.kernels decides how Triton is imported

    router = V3_2.router if kind == "grouped" else V4_FLASH.router
    logits, bias = torch.zeros((2, router.n_experts)), torch.zeros(router.n_experts)
    experts, tokens = torch.arange(router.top_k, dtype=torch.int32).repeat(2, 1), torch.arange(2)
    choices, table = experts.to(torch.int64), torch.arange(router.n_experts, dtype=torch.int32)
    paths: dict[str, Callable[[], object]] = {
        "learned": lambda: eager_route_learned(logits, bias, router),
        "hash": lambda: eager_route_hash(logits, choices, tokens, router),
        "grouped": lambda: eager_route_grouped(logits, bias, router),
        "plan": lambda: eager_plan(experts, table, router.n_experts, 16),
    }
    if kind not in paths:
        raise ValueError(f"kind: got {kind!r}, expected one of {list(paths)}")
    return count_launches(paths[kind], warmup=0, method="aten-dispatch+interpreter").total


# --- closed forms ---

_EAGER_SCORE_BYTES: Mapping[str, int] = {
    "learned": (4 + 4) * 3 + 4,  # softplus, root, plus bias; top-k reads
    "hash": (4 + 4) * 2,  # softplus, root
    "grouped": (4 + 4) * 3 + 4 + 4,  # sigmoid, plus bias, mask; two top-k read
}
"""Bytes the eager router moves per logit, beside the cast of logits that are not fp32."""
_EAGER_SLOT_BYTES: Mapping[str, int] = {
    "unknown ids": 2 * (4 + 1) + 3,
    "lookup, masked": (4 + 4) + (4 + 4 + 4) + (4 + 1 + 4),
    "key": (4 + 1) + (4 + 1 + 4),
    "stable sort": 4 * 2 * (4 + 8),  # four passes over 32-bit keys with 64-bit values
    "histogram": (4 + 8) + (8 + 4 + 8),
    "scatter": 4 + (8 + 4 + 4) + (4 + 1 + 4),
    "gather": (8 + 4) + (4 + 1) + (4 + 1 + 4),
}
"""The eager plan: bytes moved per slot."""
_EAGER_EXPERT_BYTES: Mapping[str, int] = {
    "zeros": 4,
    "two running sums": 2 * (4 + 4),
    "offsets": 4 + 4,
    "tiles needed": 2 * (4 + 4),
    "tile starts": 3 * 4,
}
"""The eager plan: bytes moved per expert of the rank. Operators per tile count as none."""


def least_bytes(kind: str, rows: int, router: RouterConfig, num_local: int, logit_bytes: int) -> int:
    """Bytes nobody can avoid: logits read, weights and ids, gather and scatter written, the histogram.

    Args:
        kind: "learned", "hash" (reads k logits of a row, a token id and its k experts) or "grouped".
        rows: M.
        router: E and k.
        num_local: experts of this rank.
        logit_bytes: 4, or 2 for bf16 logits.
    """
    read = rows * router.n_experts * logit_bytes
    if kind == "hash":
        read = rows * (router.top_k * (logit_bytes + 8) + 8)
    return read + rows * router.top_k * 16 + num_local * 4


def eager_bytes(kind: str, rows: int, router: RouterConfig, num_local: int, logit_bytes: int) -> int:
    """Bytes the eager path asks for.

    Args:
        kind: "learned", "hash" or "grouped".
        rows: M.
        router: E and k.
        num_local: experts of this rank.
        logit_bytes: 4, or 2 for bf16 logits, which are cast first.
    """
    cast = 0 if logit_bytes == 4 else logit_bytes + 4
    per_logit = _EAGER_SCORE_BYTES[kind] + cast
    per_slot, per_expert = sum(_EAGER_SLOT_BYTES.values()), sum(_EAGER_EXPERT_BYTES.values())
    return rows * (router.n_experts * per_logit + router.top_k * per_slot) + num_local * per_expert


def fused_bytes(kind: str, rows: int, router: RouterConfig, num_local: int, logit_bytes: int, block_m: int) -> int:
    """Bytes the kernels ask for, re-reads of bias, histogram and block counts included.

    Args: as `eager_bytes`; and
        block_m: rows of a tile.
    """
    slots, blocks = rows * router.top_k, -(-rows // BLOCK_TOKENS)
    scored = rows * router.n_experts * (logit_bytes + 4) if kind != "hash" else rows * (router.top_k + 1) * 8
    routed = slots * (4 + 4 + logit_bytes)
    counted = slots * (4 + 4 + 4) + 3 * 4 * blocks * (num_local + 1)
    placed = slots * (4 + 4 + 4 + 8) + 4 * num_local * max(blocks, 1) + 2 * 4 * num_local
    tiles = max_tiles(slots, num_local, block_m) * 8
    return scored + routed + counted + placed + tiles


def loads(num_experts: int, top_k: int, rows: int, skew: float, seed: int = 0) -> Tensor:
    """Tokens per expert, int64 ``[E]``, under a popularity that falls as a power of the expert's rank.

    Expert number r in a fixed random order has popularity ``(r + 1) ** -skew``; every token draws k distinct experts by
    it (Gumbel noise on the logarithm, the k largest win).

    Args:
        num_experts, top_k, rows: E, k and M.
        skew: 0 for equally popular experts.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_experts, generator=generator)
    popularity = -skew * torch.log1p(order.to(torch.float32))
    uniform = torch.rand((rows, num_experts), generator=generator).clamp_min(1e-12)
    chosen = (popularity - torch.log(-torch.log(uniform))).topk(top_k, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=num_experts)


def load_facts(counts: Tensor, ranks: int, block_m: int) -> dict[str, float]:
    """What a histogram means for a linear placement over ranks and for tiles of block_m rows.

    Args:
        counts: integer ``[E]``, tokens per expert.
        ranks: R.
        block_m: rows of a tile.

    Returns:
        mean and largest load, empty experts, load of the busiest rank over the ranks' mean (1 is balanced; 0 without a
        token), tiles needed, tiles that the ranks' grids reserve (`max_tiles`, summed), and the share of the needed
        tiles' rows that hold a slot.
    """
    slots = int(counts.sum())
    owned = [int(part.sum()) for part in counts.tensor_split(ranks)]
    tiles = int(((counts + block_m - 1) // block_m).sum())
    sizes = [len(part) for part in counts.tensor_split(ranks)]
    return {
        "mean": slots / len(counts),
        "largest": int(counts.max()),
        "empty": int((counts == 0).sum()),
        "busiest rank": max(owned) / (slots / ranks) if slots else 0.0,
        "tiles": tiles,
        "reserved": sum(max_tiles(slots, size, block_m) for size in sizes),
        "filled": slots / (tiles * block_m) if tiles else 0.0,
    }


def fused_launches(params: Mapping[str, Any]) -> int:
    """Launches of routing and dispatch for a case: none to route an empty batch, and no histogram to count."""
    return sum(FUSED_LAUNCHES.values()) if params["rows"] else FUSED_LAUNCHES["plan"] - 1
