"""Router logits: the fp32 sum of exact products on every path, the same bytes every time, nothing else written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.kernels import codes
from dsv4ref.kernels.experts import router_gemm, router_logits
from dsv4ref.kernels.experts.router_gemm import ROWS_PATH, TILES, select_tile
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.router_band import LOGIT_BAND

SHAPES = {
    "one row, one expert, one column": (1, 1, 1),
    "rows, odd sizes, two steps": (5, 37, 1101),
    "rows, at the limit": (8, 6, 64),
    "slices, past the limit": (9, 24, 96),
    "slices, odd sizes": (17, 37, 301),
    "tiles of 32": (129, 24, 200),
    "tiles of 64": (1025, 70, 72),
}


def operands(rows: int, experts: int, depth: int, rng: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn((rows, depth), generator=rng).to(device, torch.bfloat16)
    weight = (torch.randn((experts, depth), generator=rng) * depth**-0.5).to(device, torch.bfloat16)
    return x, weight


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.cpu().double() @ weight.cpu().double().T


def worst(got: Tensor, want: Tensor) -> str:
    """The largest error against the band, empty if within it."""
    error = (got.cpu().double() - want).abs() / (LOGIT_BAND * want.abs().clamp(min=1.0))
    if error.numel() == 0 or bool((error <= 1).all()):
        return ""
    where = divmod(int(error.nan_to_num(float("inf")).argmax()), want.shape[1])
    return f"{where}: {got[where].item()}, expected {want[where].item()}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_the_exact_sums_within_the_band(
    shape: tuple[int, int, int], rng: torch.Generator, device: str
) -> None:
    x, weight = operands(*shape, rng, device)
    z = router_logits(x, weight)
    assert (z.dtype, tuple(z.shape)) == (torch.float32, shape[:2])
    assert worst(z, exact(x, weight)) == ""


@pytest.mark.parametrize("rows", [3, 20, 130])
def test_nothing_is_rounded_to_bf16(rows: int, device: str) -> None:
    """One large product and small ones: bf16 would lose the small ones, in the sum as well as in the result."""
    x = torch.ones((rows, 300), dtype=torch.bfloat16, device=device)
    weight = torch.full((5, 300), 2.0**-9, dtype=torch.bfloat16, device=device)
    weight[:, 0] = 1.0
    want = 1.0 + 299 * 2.0**-9  # exact in fp32 in any order
    assert torch.tensor(want).to(torch.bfloat16).item() != want
    assert (router_logits(x, weight) == want).all()


@pytest.mark.parametrize("rows", [3, 20, 130])
def test_the_same_bytes_every_time(rows: int, rng: torch.Generator, device: str) -> None:
    x, weight = operands(rows, 40, 520, rng, device)
    assert torch.equal(router_logits(x, weight), router_logits(x, weight))


@pytest.mark.parametrize("rows", [3, 20, 130])
def test_a_callers_buffer_and_strided_rows(rows: int, rng: torch.Generator, device: str) -> None:
    wide, weight = operands(rows, 37, 96, rng, device)
    weight = weight[:, :90].contiguous()
    memory = torch.full((rows + 2, 48), 7.0, device=device)
    out = memory[1:-1, 4:41]
    assert router_logits(wide[:, :90], weight, out=out) is out
    assert torch.equal(out, router_logits(wide[:, :90].contiguous(), weight))
    guards = torch.ones_like(memory, dtype=torch.bool)
    guards[1:-1, 4:41] = False
    assert (memory[guards] == 7.0).all()


@pytest.mark.parametrize("rows", [4, 20, 130])
def test_nan_and_infinity_stay_in_their_row_and_their_expert(rows: int, rng: torch.Generator, device: str) -> None:
    x, weight = operands(rows, 24, 96, rng, device)
    clean = router_logits(x, weight)
    x[1], weight[5, 3] = float("nan"), float("inf")
    z = router_logits(x, weight)
    assert z[1].isnan().all()
    touched = torch.zeros_like(z, dtype=torch.bool)
    touched[1], touched[:, 5] = True, True
    assert not z[touched].isfinite().any()
    assert torch.equal(z[~touched], clean[~touched])


def test_an_empty_batch_launches_nothing(device: str) -> None:
    weight = torch.zeros((4, 16), dtype=torch.bfloat16, device=device)
    assert router_logits(torch.zeros((0, 16), dtype=torch.bfloat16, device=device), weight).shape == (0, 4)


class Launch:
    """In a kernel's place: notes how it is launched, and launches nothing."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *args, **options: self.seen.append(options)


@pytest.mark.parametrize("rows", [3, 20, 130, 1030])
def test_a_launch_is_what_its_shape_says_down_to_the_stages(
    rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tile = Launch(), replace(select_tile(rows), num_stages=5)
    monkeypatch.setattr(router_gemm, "_router_rows_kernel", launch)
    monkeypatch.setattr(router_gemm, "_router_tile_kernel", launch)
    monkeypatch.setattr(router_gemm, "select_tile", lambda rows: tile)
    router_logits(*(torch.zeros((n, 16), dtype=torch.bfloat16, device=device) for n in (rows, 4)))
    (seen,) = launch.seen
    assert (seen["num_warps"], seen["num_stages"]) == (
        tile.num_warps,
        tile.stages(codes.architecture(torch.device(device))),
    )
    assert (tile.stages("sm_90"), tile.stages("gfx942")) == (5, router_gemm.AMD_STAGES)


def test_what_the_chapter_compiles_is_what_is_launched() -> None:
    for arch in ("gfx942", "gfx950", "sm_90"):
        requests = catalogue.get("router_dtype").kernels(arch)
        launched = {(f"{tile} s{tile.stages(arch)}", tile.num_warps, tile.stages(arch)) for tile in (ROWS_PATH, *TILES)}
        assert {(r.shape, r.num_warps, r.num_stages) for r in requests} == launched
        assert len(requests) == len(launched)


def test_every_number_of_rows_has_a_launch_shape_and_limits_rise() -> None:
    limits = [tile.max_rows for tile in (ROWS_PATH, *TILES)]
    assert limits[-1] is None
    known = [limit for limit in limits if limit is not None]
    assert known == sorted(known)
    assert [select_tile(m) for m in (0, 1, 8, 9, 128, 129, 1024, 1025, 4096, 4097, 8192)] == [
        *[ROWS_PATH] * 3, *(tile for tile in TILES for _ in range(2))
    ]  # fmt: skip
    with pytest.raises(ValueError, match="rows: got -1, expected at least 0"):
        select_tile(-1)


X, W = torch.zeros((3, 16), dtype=torch.bfloat16), torch.zeros((4, 16), dtype=torch.bfloat16)
BAD = {
    "x in fp32": ((X.float(), W, None), TypeError, "x: got torch.float32, expected torch.bfloat16"),
    "x of one dimension": ((X[0], W, None), ValueError, "x: got shape [16], expected [M, D]"),
    "no columns": ((X[:, :0], W[:, :0], None), ValueError, "x: got shape [3, 0], expected at least one column"),
    "x turned": ((torch.zeros((16, 3), dtype=torch.bfloat16).T, W, None), ValueError,
                 "x: got strides (1, 3), expected a unit stride in the last dimension"),
    "weight in fp32": ((X, W.float(), None), TypeError, "weight: got torch.float32, expected torch.bfloat16"),
    "weight too narrow": ((X, W[:, :8], None), ValueError, "weight: got shape [4, 8], expected [E, 16]"),
    "weight strided": ((X, torch.zeros((4, 32), dtype=torch.bfloat16)[:, :16], None), ValueError,
                       "weight: got strides (32, 1), expected a contiguous tensor"),
    "out in bf16": ((X, W, torch.zeros((3, 4), dtype=torch.bfloat16)), TypeError,
                    "out: got torch.bfloat16, expected torch.float32"),
    "out too small": ((X, W, torch.zeros((2, 4))), ValueError, "out: got shape [2, 4], expected [3, 4]"),
    "out expanded": ((X, W, torch.zeros((1, 4)).expand(3, 4)), ValueError, "overlaps itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str, device: str) -> None:
    (x, weight, out), error, message = BAD[name]
    placed = [None if t is None else _like(t, device) for t in (x, weight, out)]
    with pytest.raises(error, match=re.escape(message)):
        router_logits(placed[0], placed[1], out=placed[2])  # type: ignore[arg-type]


def test_an_output_inside_an_operand_is_refused(device: str) -> None:
    shared = torch.zeros(512, dtype=torch.uint8, device=device)
    x, out = shared[:96].view(torch.bfloat16).view(3, 16), shared[32:80].view(torch.float32).view(3, 4)
    with pytest.raises(ValueError, match="out: its memory range overlaps x's by 48 bytes"):
        router_logits(x, W.to(device), out=out)


def _like(tensor: Tensor, device: str) -> Tensor:
    """The same strides on another device, which ``to`` would not keep."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
