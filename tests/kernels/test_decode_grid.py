"""The decode over a grid like FlashMLA's: page sizes, widths, lengths or none, the sink, query tokens per request.

Rows of a request are its query tokens: each lists one slot more than the one before. With lengths there is an empty row
and a row of invalid slots only; without them every list is full. The whole grid needs a GPU; the interpreter gets the
corners that no other test has.

Source of the grid: FlashMLA ``tests/test_flash_mla_sparse_decoding.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from decode_calls import Builder, Call

from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.kernels.sparse_mla import split_k_decode

PAGES = (2, 53, 61, 64, 69, 256, 576)
WIDTHS = (64, 128, 512, 1024, 2048)
WINDOW = 128


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def point(build: Builder, *, page: int, width: int, tokens: int, ragged: bool, sink: bool, window: int) -> Call:
    """Two requests of ``tokens`` query rows each; if ragged, two rows more: one without slots, one of invalid ones."""
    entries = max(2 * page, width)
    lists = []
    for full in (window, width):
        lengths = [full - (tokens - 1 - t if ragged else 0) for _ in range(2) for t in range(tokens)]
        found = build.lists(lengths, entries)
        lists.append([*found, [], [-1, 10**6, -(2**31)] * (full // 3)] if ragged else found)
    return build.call(*lists, heads=8, blocks=(page, page), entries=entries, sink=sink)


def hold(call: Call, *, ragged: bool, splits: tuple[int | None, ...], at: str) -> None:
    """Single pass and split-K within the budget; rows without a key exactly zero."""
    results = [call.run()]
    for count in splits:
        with poisoned_allocations():
            out, lse = split_k_decode(
                call.q, call.swa, call.extra, sink=call.sink, scale=call.scale, return_lse=True, splits=count
            )
        assert lse is not None
        results.append((out, lse))
    for out, lse in results:
        call.check(out, lse)
        assert not ragged or torch.count_nonzero(out[-2:]) == 0, at
        assert not ragged or bool((lse[-2:] == -math.inf).all()), at


@pytest.mark.parametrize(
    ("page", "tokens", "ragged", "sink"), [(576, 2, True, True), (61, 3, True, False), (69, 2, False, False)]
)
def test_corners_of_the_grid(page: int, tokens: int, ragged: bool, sink: bool, build: Builder) -> None:
    call = point(build, page=page, width=64, tokens=tokens, ragged=ragged, sink=sink, window=24)
    hold(call, ragged=ragged, splits=(3,), at=f"page {page}")


@pytest.mark.gpu
@pytest.mark.parametrize("page", PAGES)
def test_the_whole_grid(page: int, build: Builder, device: str) -> None:
    if device == "cpu":
        pytest.skip("a grid of this size takes the interpreter minutes; its corners are run above")
    points = itertools.product((True, False), (True, False), WIDTHS)
    for (ragged, sink, width), tokens in zip(points, itertools.cycle((1, 2, 3)), strict=False):
        call = point(build, page=page, width=width, tokens=tokens, ragged=ragged, sink=sink, window=WINDOW)
        at = f"page {page}, {width} slots, {tokens} tokens, ragged {ragged}, sink {sink}"
        hold(call, ragged=ragged, splits=(None, 7), at=at)
