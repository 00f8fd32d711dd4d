"""A prompt's last chunk as inputs of the sparse attention: one builder for both ways that its keys can be read.

T query rows at the end of a prompt list the window before them and the index's top-k of the compressed entries that
exist at their positions. The lists name slots of the two FP8 caches, whose pages lie in any order, as a decode's do.
The workspace holds the same entries dequantised, the window's first, each scope in the order of its positions.

Source of the workspace: vLLM's DeepSeek-V4 prefill, which gathers a chunk's entries of both caches into one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref.formats import Scope, kv_cache
from dsv4ref.formats.kv_cache import ENTRY_BYTES, HEAD_DIM
from dsv4ref.optimizations import decode_inputs
from dsv4ref.optimizations.base import Case
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case

__all__ = ["Workspace", "build", "distinct_keys", "is_prompt", "least_bytes", "prompt_case"]

_PROMPT = "prompt"
_RATIO = 4
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Workspace:
    """A chunk's keys in bf16, and where its rows' lists stand in them.

    Args:
        kv: bf16 ``[N, 512]`` contiguous.
        indices: int32 ``[T, W]`` contiguous, rows of ``kv``: the window's, then the index's.
    """

    kv: Tensor
    indices: Tensor


def prompt_case(name: str, *, tokens: int, rows: int, heads: int, swa: int, extra: int, **flags: Any) -> Case:
    """Describe the last chunk of a prompt at a C4 layer.

    Args:
        name: the case's name.
        tokens: the prompt's length; every row has a full window and a full top-k, so ``tokens - rows >= swa - 1`` and
            ``(tokens - rows + 1) // 4 >= extra``.
        rows: query rows, the chunk's tokens.
        heads: H.
        swa, extra: the window and the index's top-k.
        flags: `Case`'s own fields (tiny, measured, needs_gpu, about).

    Raises:
        ValueError: a prompt too short for full lists.
    """
    before = tokens - rows
    if rows < 1 or before < swa - 1 or (before + 1) // _RATIO < extra:
        raise ValueError(
            f"tokens: got {tokens}, expected enough for {swa} window keys and {extra} of one entry per {_RATIO} tokens "
            f"before the first of {rows} rows"
        )
    case = decode_case(name, rows=rows, heads=heads, swa=swa, extra=extra, lengths=_PROMPT, **flags)
    return replace(case, params={**case.params, "tokens": tokens})


def is_prompt(params: Mapping[str, Any]) -> bool:
    """Whether a case's rows are a prompt's, and so list the same keys."""
    return bool(params["lengths"] == _PROMPT)


def distinct_keys(params: Mapping[str, Any]) -> int:
    """Entries that a chunk's rows can list between them: the window of its first row on, and all compressed ones."""
    return int(params["rows"] + params["swa"] - 1 + params["tokens"] // _RATIO)


def least_bytes(params: Mapping[str, Any]) -> int:
    """Bytes a prefill must move: every listed entry once from its FP8 cache, q read, the output written."""
    return distinct_keys(params) * ENTRY_BYTES + 4 * params["rows"] * params["heads"] * HEAD_DIM


def build(case: Case, device: str, seed: int) -> tuple[DecodeInputs, Workspace]:
    """Build a prompt case's inputs over its FP8 caches, and its workspace."""
    p = case.params
    rows, swa, topk = p["rows"], p["swa"], p["extra"]
    generator = torch.Generator(device=device).manual_seed(seed)
    q = (torch.randn((rows, p["heads"], HEAD_DIM), generator=generator, device=device) * decode_inputs._QUERY_STD).to(
        torch.bfloat16
    )
    sink = torch.randn((p["heads"],), generator=generator, device=device)
    # Row t stands at position first + t. Its window is the last swa positions, its own included.
    window = torch.arange(rows, device=device)[:, None] + torch.arange(swa, device=device)  # [T, swa], from the first
    entries = (p["tokens"] - rows + torch.arange(rows, device=device) + 1) // _RATIO  # [T]: C4 entries that exist
    chosen = _distinct(entries, topk, generator)  # [T, topk]
    scopes, parts = [], []
    for salt, (name, listed, count) in enumerate(
        (("swa", window, rows + swa - 1), ("extra", chosen, int(entries[-1])))
    ):
        block = p[f"{name}_block"]
        blocks = math.ceil(count / block)
        cache = decode_inputs._pool(blocks, block, p[f"{name}_dialect"], device, salt)
        pages = torch.randperm(blocks, generator=generator, device=device)
        slots = pages.repeat_interleave(block) * block + torch.arange(blocks * block, device=device) % block
        indptr = torch.arange(rows + 1, device=device, dtype=torch.int32) * listed.shape[1]
        indices = slots[listed].flatten().to(torch.int32)
        scopes.append(Scope(cache=cache, indices=indices, indptr=indptr.contiguous(), width=listed.shape[1]))
        parts.append(kv_cache.gather(cache, slots[:count]))
    step = DecodeInputs(q=q, swa=scopes[0], extra=scopes[1], sink=sink, scale=HEAD_DIM**-0.5)
    indices = torch.cat([window, chosen + parts[0].shape[0]], dim=1).to(torch.int32)
    return step, Workspace(torch.cat(parts), indices)


def _distinct(entries: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below each row's own bound, in no order: int64 ``[T, count]``."""
    most = int(entries.max())
    found = []
    for begin in range(0, entries.shape[0], _ROWS_AT_ONCE):
        bounds = entries[begin : begin + _ROWS_AT_ONCE, None]
        lot = torch.rand((bounds.shape[0], most), generator=generator, device=entries.device)
        lot.masked_fill_(torch.arange(most, device=entries.device) >= bounds, -1.0)
        found.append(lot.topk(count, dim=1).indices)
    return torch.cat(found)
