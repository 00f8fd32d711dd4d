"""A scope: one KV cache and, per query row, the ragged list of its slots that the row attends to.

DeepSeek-V4's decode has up to two: the SWA scope (the last 128 tokens, raw) and the extra scope (compressed entries,
C4 or C128). They are separate caches with their own block size and dialect.

Source: vLLM's ragged decode buffers for DeepSeek-V4 on ROCm (names and meaning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.formats.kv_cache import KVCache

__all__ = ["Scope", "ragged"]


@dataclass(frozen=True)
class Scope:
    """A cache with ragged slot lists.

    Args:
        cache: the paged cache.
        indices: int32 ``[capacity]`` contiguous; row t's slots are ``indices[indptr[t]:indptr[t + 1]]``. A slot below 0
            or at least ``cache.rows`` is skipped, wherever it stands; a slot listed twice counts twice.
        indptr: int32 ``[T + 1]`` contiguous, non-decreasing, ``indptr[0] == 0``, ``indptr[T] <= capacity``.
        width: the widest a row can be in the steady state (128 for SWA, the index top-k for C4); launch shapes are
            selected by it, because the live lengths are on the device and reading them would stall.

    Raises:
        TypeError, ValueError: wrong dtype, rank, contiguity or device, naming the field.
    """

    cache: KVCache
    indices: Tensor
    indptr: Tensor
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.cache, KVCache):
            raise TypeError(f"cache: got {type(self.cache).__name__}, expected a KVCache")
        for name, tensor in (("indices", self.indices), ("indptr", self.indptr)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
            if tensor.dtype is not torch.int32:
                raise TypeError(f"{name}: got {tensor.dtype}, expected torch.int32")
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)} strides {tensor.stride()}, expected 1-D contiguous"
                )
            if tensor.device != self.cache.data.device:
                raise ValueError(f"{name}: on {tensor.device}, expected {self.cache.data.device} like the cache")
        if self.indptr.numel() < 1:
            raise ValueError("indptr: got no elements, expected T + 1 (at least 1)")
        if not isinstance(self.width, int) or self.width < 0:
            raise ValueError(f"width: got {self.width!r}, expected a non-negative integer")

    @property
    def num_queries(self) -> int:
        """T, the query rows the lists are for."""
        return int(self.indptr.numel()) - 1


def ragged(lists: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pack per-row slot lists.

    Args:
        lists: one sequence of slots per query row.
        device: where the tensors go.

    Returns:
        indices int32 ``[sum of lengths]`` and indptr int32 ``[T + 1]``.
    """
    lengths = torch.tensor([0, *(len(row) for row in lists)], dtype=torch.int64)
    flat = [slot for row in lists for slot in row]
    indices = torch.tensor(flat, dtype=torch.int32, device=device)
    return indices, lengths.cumsum(0).to(torch.int32).to(device)
