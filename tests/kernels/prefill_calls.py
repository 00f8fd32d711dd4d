"""Prefill calls for tests: a decode call's keys as a workspace of their own, its lists as rows of that."""

from __future__ import annotations

import math

import torch
from decode_calls import Call
from torch import Tensor

from dsv4ref.formats import kv_cache

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOLES_SWA = [[3, -1, 9], [], [5, 5, INT_MAX, 1], [-1, -2], [], [INT_MIN, 64, 63]]
HOLES_EXTRA = [[], [], [7], [-1], [2, 4, -1], [200, 0]]


def workspace(call: Call, stride: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """kv, indices and lengths of a decode call: its caches dequantised in a row, NaN between and behind them.

    An SWA slot past its cache would be an extra row here, so slots that are not valid become negative or too large.
    """
    scopes = [call.swa] if call.extra is None else [call.swa, call.extra]
    gap, base, parts = 3, 0, []
    lists: list[list[int]] = [[] for _ in range(call.q.shape[0])]
    past = sum(scope.cache.rows + gap for scope in scopes)
    for scope in scopes:
        every = torch.arange(scope.cache.rows, device=call.q.device)
        poison = torch.full((gap, 512), math.nan, dtype=torch.bfloat16, device=call.q.device)
        parts += [kv_cache.gather(scope.cache, every, torch.bfloat16), poison]
        for row, listed in enumerate(lists):
            for slot in scope.indices[int(scope.indptr[row]) : int(scope.indptr[row + 1])].tolist():
                listed.append(base + slot if 0 <= slot < scope.cache.rows else (slot if slot < 0 else past))
        base += scope.cache.rows + gap
    width = max(len(listed) for listed in lists) + 2
    padded = [listed + [0] * (width - len(listed)) for listed in lists]  # a valid row: only the length hides it
    kv = torch.full((past + 1, stride), math.nan, dtype=torch.bfloat16, device=call.q.device)[:past, :512]
    kv.copy_(torch.cat(parts))
    indices = torch.tensor(padded, dtype=torch.int32, device=call.q.device)
    lengths = torch.tensor([len(listed) for listed in lists], dtype=torch.int32, device=call.q.device)
    return kv, indices, lengths
