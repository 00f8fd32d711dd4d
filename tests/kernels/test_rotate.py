"""The rotation in one launch: against the reference, rows left alone, what it must not touch, bad arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.formats.kv_cache import NOPE_DIM, ROPE_DIM
from dsv4ref.kernels.sparse_mla import merge_scopes, rotate
from dsv4ref.kernels.sparse_mla.merge import QueryRotation
from dsv4ref.kernels.sparse_mla.rotate import rotate_rows
from dsv4ref.ref.rope import frequencies, rotate_back_ref

FREQS = frequencies(10_000.0, ROPE_DIM)
POSITIONS = torch.tensor([0, 1, 77, 4095])


def outputs(rng: torch.Generator, device: str, heads: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn((4, heads, 512), generator=rng).to(dtype).to(device)


def rotation_on(device: str, positions: Tensor = POSITIONS) -> QueryRotation:
    return QueryRotation.of(positions.to(device), FREQS.to(device), 4096)


def assert_same(got: Tensor, want: Tensor, why: str = "") -> None:
    found = compare.identical("x", got.cpu().contiguous(), want.cpu().contiguous())
    assert found.passed, f"{found.detail} {why}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [1, 16, 17])
def test_against_the_reference(heads: int, dtype: torch.dtype, rng: torch.Generator, device: str) -> None:
    x = outputs(rng, device, heads, dtype)
    before = x.clone()
    assert rotate_rows(x, rotation_on(device)) is x
    want = rotate_back_ref(before.cpu().double(), POSITIONS, FREQS)
    assert compare.error_norm(x.cpu(), want) < (2**-8 if dtype is torch.bfloat16 else 2**-22)
    assert_same(x[..., :NOPE_DIM], before[..., :NOPE_DIM], "only the last 64 dims turn")
    assert_same(x[0], before[0], "position 0 is no turn")


def test_it_is_the_merges_rotation_on_rounded_numbers(rng: torch.Generator, device: str) -> None:
    x = outputs(rng, device)
    merged, _ = merge_scopes(x[None], torch.zeros((1, 4, 5), device=device), rotation=rotation_on(device))
    ours = rotate_rows(x.clone(), rotation_on(device))
    if device == "cpu":  # two compiled kernels may contract multiplies and adds differently
        assert_same(ours, merged)
    assert compare.error_norm(ours, merged.double()) < 2**-9


@pytest.mark.parametrize("count", range(5))
def test_rows_before_the_first_are_left_alone(count: int, rng: torch.Generator, device: str) -> None:
    x = outputs(rng, device)
    want = torch.cat([x[:count], rotate_rows(x.clone(), rotation_on(device))[count:]])
    first = torch.tensor([count], dtype=torch.int32, device=device)
    assert_same(rotate_rows(x, rotation_on(device), first=first), want)


def test_rows_and_heads_of_a_larger_buffer(rng: torch.Generator, device: str) -> None:
    x = outputs(rng, device)
    buffer = torch.full((6, 9, 512), 7.0, dtype=torch.bfloat16, device=device)
    view = buffer[1:5, 2:7].copy_(x)
    assert_same(rotate_rows(view, rotation_on(device)), rotate_rows(x, rotation_on(device)))
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard[1:5, 2:7] = False
    assert (buffer[guard] == 7.0).all()


def test_a_position_outside_the_tables_shows_unless_the_row_is_zero(rng: torch.Generator, device: str) -> None:
    x = outputs(rng, device)
    x[3] = 0
    rotate_rows(x, rotation_on(device, torch.tensor([-1, 4096, 4095, -1])))
    assert [bool(row[..., NOPE_DIM:].isnan().all()) for row in x] == [True, True, False, False]
    assert x[..., :NOPE_DIM].isfinite().all()
    assert (x[3] == 0).all()


def test_no_rows_is_no_work(rng: torch.Generator, device: str) -> None:
    none = outputs(rng, device)[:0]
    assert rotate_rows(none, rotation_on(device, POSITIONS[:0])).shape == (0, 5, 512)


def test_the_kernels_constants_are_the_formats() -> None:
    assert (rotate._NOPE.value, rotate._ROPE.value, 2 * rotate._PAIRS.value) == (NOPE_DIM, ROPE_DIM, ROPE_DIM)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected a torch.Tensor"),
        ({"x": torch.zeros((4, 5, 512), dtype=torch.half)}, TypeError, "x: got torch.float16, expected torch.bfloat16"),
        ({"x": torch.zeros((4, 5, 64))}, ValueError, "x: got shape [4, 5, 64], expected [T, H, 512]"),
        ({"x": torch.zeros((4, 1, 512)).expand(4, 5, 512)}, ValueError, "x: shape [4, 5, 512] with strides"),
        ({"rotation": POSITIONS}, TypeError, "rotation: got Tensor, expected a QueryRotation"),
        ({"rotation": rotation_on("cpu", POSITIONS[:2])}, ValueError, "rotation: got 2 positions on cpu, expected"),
        ({"first": torch.tensor([1])}, TypeError, "first: got torch.int64, expected torch.int32"),
        ({"first": torch.zeros(2, dtype=torch.int32)}, ValueError, "first: got shape [2], expected [1]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros((4, 5, 512)), "rotation": rotation_on("cpu"), **change}
    with pytest.raises(error, match=re.escape(message)):
        rotate_rows(**arguments)


def test_tables_in_the_outputs_memory_are_refused() -> None:
    memory = torch.zeros(4 * 5 * 512)
    rotation = QueryRotation(POSITIONS, memory[:64].view(2, 32), torch.zeros((2, 32)))
    with pytest.raises(ValueError, match="x: its memory range overlaps cos's by 256 bytes"):
        rotate_rows(memory.view(4, 5, 512), rotation)
