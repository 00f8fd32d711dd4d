"""Tiles held in two halves: the same attention as whole tiles, and where they are taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref.formats import kv_cache
from dsv4ref.kernels.sparse_mla import LaunchShape, decode, halves, split_decode
from dsv4ref.kernels.sparse_mla.split_decode import split_k_decode

TILE = LaunchShape(16, 16, 4)

Decode = Callable[[Call], tuple[Tensor, Tensor]]


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    if device != "cpu":
        pytest.skip("compiled, halves are for tiles of 64 heads: the measured cases hold those to the reference")
    return Builder(rng, device)


@pytest.fixture(params=["single pass", "one split", "three splits"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decode:
    """A decode of small tiles that are held in halves all the same; its launcher has to ask whether to."""
    asked: list[tuple[object, ...]] = []

    def in_halves(*arguments: object) -> bool:
        asked.append(arguments)
        return True

    for module in (decode, split_decode):
        monkeypatch.setattr(module, "in_halves", in_halves)

    def decoded(call: Call) -> tuple[Tensor, Tensor]:
        if request.param == "single pass":
            out, lse = call.run(launch=TILE)
        else:
            splits = 1 if request.param == "one split" else 3
            out, found = split_k_decode(
                call.q, call.swa, call.extra, sink=call.sink, scale=call.scale, return_lse=True, launch=TILE,
                splits=splits,
            )  # fmt: skip
            assert found is not None
            lse = found
        assert asked == [(TILE, *modes_of(call))]
        return out, lse

    return decoded


def modes_of(call: Call) -> list[str]:
    """How the interpreter reads the two scopes' codes."""
    second = call.extra if call.extra is not None else call.swa
    return [f"bits_{'fn' if s.cache.dialect.value == 'e4m3fn' else 'fnuz'}" for s in (call.swa, second)]


def test_lists_of_any_length_are_the_references(run: Decode, build: Builder) -> None:
    lengths = (0, 1, 15, 16, 17, 33, 64)
    call = build.call(build.lists(lengths, 64), build.lists([0, *lengths[:0:-1]], 64), heads=5)
    call.check(*run(call))


@pytest.mark.parametrize("dialect", ["e4m3fn", "e4m3fnuz"])
def test_scopes_with_blocks_of_different_sizes(dialect: str, run: Decode, build: Builder) -> None:
    call = build.small(blocks=(53, 2), dialects=(dialect, dialect))
    call.check(*run(call))


def test_layers_without_an_extra_scope(run: Decode, build: Builder) -> None:
    call = build.call(build.lists([20, 0, 50], 64), sink=False)
    call.check(*run(call))


def test_scores_in_the_thousands_do_not_overflow(run: Decode, build: Builder) -> None:
    call = build.small()
    call = replace(call, q=call.q * 512)
    out, lse = run(call)
    assert lse.abs().max() > 1000, "the test must reach scores whose exponential overflows"
    call.check(out, lse)


def test_rows_without_keys_are_zero_and_holes_are_skipped(run: Decode, build: Builder) -> None:
    """No slot at all, invalid ones only, -1 and out-of-range inside lists, a duplicate; the cache ends in poison."""
    swa = [[], [-1, 10**6] * 10, [3, -1, 3, 10**6, 9], [-1] * 20 + [5]]
    call = build.call(swa, [[], [-1], [], [7] + [-1] * 20])
    out, lse = run(call)
    call.check(out, lse)
    assert torch.count_nonzero(out[:2]) == 0
    assert (lse[:2] == -math.inf).all()


def test_the_kernels_constants_are_the_formats() -> None:
    for constant, want in (
        (halves._DIM, kv_cache.HEAD_DIM), (halves._HALF, kv_cache.HEAD_DIM // 2), (halves._NOPE, kv_cache.NOPE_DIM),
        (halves._ROPE, kv_cache.ROPE_DIM), (halves._ROW_BYTES, kv_cache.ROW_BYTES),
        (halves._SCALE_SLOTS, kv_cache.SCALE_SLOTS), (halves._SCALE_BLOCK, kv_cache.NOPE_DIM // 7),
        (halves._LOWEST, decode._LOWEST.value),
    ):  # fmt: skip
        assert constant.value == want


def test_halves_are_for_sixty_four_heads_of_codes_decoded_in_pairs() -> None:
    for shape, modes, want in (
        (LaunchShape(64, 64, 8), ("packed_fn", "packed_fn"), True),
        (LaunchShape(32, 64, 8), ("packed_fn", "packed_fn"), False),
        (LaunchShape(64, 64, 8), ("packed_fn", "bits_fnuz"), False),
        (LaunchShape(64, 16, 8), ("native_fnuz", "bits_fn"), False),
        (LaunchShape(64, 16, 8), ("native_fn", "native_fn"), False),
    ):
        assert halves.in_halves(shape, *modes) is want, (shape, modes)
