"""MXFP4 weights in Hopper's fragment order: the same numbers, the same products, and back to the same bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_inputs import LIMIT, choices, quantised
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import ExpertTile, Mxfp4Weights, expert_layer, grouped_gemm, plan_dispatch
from dsv4ref.kernels.experts.grouped_gemm import grouped_constants
from dsv4ref.kernels.experts.mxfp4 import LARGEST_SCALE

TILE = ExpertTile(16, 64, 128, 4)


@pytest.fixture(autouse=True)
def _hopper_or_interpreter(device: str) -> None:
    if architecture(torch.device(device)) not in ("cpu", "sm_90"):
        pytest.skip("the layout is sm_90's")


def every_code_at_every_place() -> Mxfp4Weights:
    """129 scale bytes, and under each 16 rows that differ by a rotation of the codes: ``[1, 2064, 128]``."""
    row, column = torch.arange(16)[:, None], torch.arange(128)[None, :]
    packed = mxfp4.pack(((row + column) % 16).to(torch.uint8)).repeat(LARGEST_SCALE + 1, 1)
    scales = torch.arange(LARGEST_SCALE + 1, dtype=torch.int32).repeat_interleave(16).to(torch.uint8)
    return Mxfp4Weights(packed[None].contiguous(), scales[None, :, None].expand(1, -1, 4).contiguous())


def difference(got: Tensor, want: Tensor) -> str:
    bad = (got != want).nonzero().tolist()
    return f"{bad[0]}: {got[tuple(bad[0])]}, expected {want[tuple(bad[0])]}" if bad else ""


# --- the layout ---


def test_weights_come_back_bit_by_bit(rng: torch.Generator) -> None:
    packed = torch.randint(0, 256, (2, 5, 192), generator=rng, dtype=torch.uint8)
    scales = torch.randint(0, LARGEST_SCALE + 1, (2, 5, 12), generator=rng, dtype=torch.uint8)
    for weights in (Mxfp4Weights(packed, scales), every_code_at_every_place()):
        moved = weights.prepared("sm_90")
        assert (moved.layout, moved.num_experts, moved.n, moved.k) == ("wgmma", *weights.packed.shape[:2], weights.k)
        assert moved.bytes_per_expert * moved.num_experts == moved.packed.nbytes + moved.scales.nbytes
        assert moved.prepared("sm_90") is moved
        back = moved.restored()
        assert back.layout == "checkpoint"
        assert difference(back.packed, weights.packed) == ""
        assert difference(back.scales, weights.scales) == ""


def test_what_the_layout_cannot_hold_stays_as_it_is(rng: torch.Generator) -> None:
    fits, narrow = quantised(1, 8, 128, rng, "cpu"), quantised(1, 8, 160, rng, "cpu")
    assert fits.prepared("gfx942") is fits
    assert fits.restored() is fits
    assert narrow.prepared("sm_90") is narrow, "K = 160 is no whole number of steps"
    for byte in (LARGEST_SCALE + 1, 255):
        scales = fits.scales.clone()
        scales[0, -1, -1] = byte
        large = Mxfp4Weights(fits.packed, scales)
        assert large.prepared("sm_90") is large, byte


def test_every_code_at_every_place_under_every_scale_is_what_the_format_says(device: str) -> None:
    """Against a unit matrix the products are the weights, subnormals of bf16 among them."""
    weights = every_code_at_every_place()
    moved = weights.prepared("sm_90")
    moved = Mxfp4Weights(moved.packed.to(device), moved.scales.to(device), "wgmma")
    plan = plan_dispatch(torch.zeros((128, 1), dtype=torch.int32, device=device), 1, block_m=128)
    x = torch.eye(128, dtype=torch.bfloat16, device=device)
    got = grouped_gemm(x, moved, plan, tile=ExpertTile(128, 128, 128, 4)).cpu().T
    want = mxfp4.dequantise(weights.packed, weights.scales, torch.bfloat16)[0]
    assert difference(got.float(), want.float()) == "", "row (scale, rotation), column"


# --- products ---

TILES = (
    TILE, ExpertTile(16, 128, 128, 4), ExpertTile(32, 64, 128, 2), ExpertTile(16, 128, 128, 4, subtile_n=16),
    ExpertTile(16, 128, 128, 8, 2),
)  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_either_layout_gives_the_same_products(tile: ExpertTile, rng: torch.Generator, device: str) -> None:
    """96 rows fill no block of 64 or 128: one and two parts, whole and cut off; gate and up by eights."""
    experts = choices(11, 3, 2, 2, rng).to(device)
    weights, x = quantised(3, 96, 256, rng, device), torch.randn((11, 256), generator=rng).to(device, torch.bfloat16)
    plan = plan_dispatch(experts, 3, block_m=tile.block_m)
    ways: tuple[dict[str, Any], ...] = (
        {"gather": True, "gated": True, "limit": LIMIT}, {"gather": True, "gated": True},
        {"gather": True}, {"gather": True, "scatter": True},
    )  # fmt: skip
    for way in ways:
        found = []
        for matrices in (weights, weights.prepared("sm_90")):
            out = torch.full((22, 48 if "gated" in way else 96), 7.0, dtype=torch.bfloat16, device=device)
            found.append(grouped_gemm(x, matrices, plan, tile=tile, out=out, **way).cpu())
        if device == "cpu":
            assert difference(found[1], found[0]) == "", way
        else:  # matrix instructions of other shapes may sum in another order
            torch.testing.assert_close(found[1].float(), found[0].float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("height", [32, 128])
def test_an_experts_last_tile_at_half_its_height_gives_the_same_products(
    height: int, rng: torch.Generator, device: str
) -> None:
    """The half is full, overfull, not for a whole tile, and for the three rows that are left behind one."""
    counts = torch.tensor([height // 2, height // 2 + 1, height, height + 3])
    experts = torch.arange(4, dtype=torch.int32).repeat_interleave(counts)[:, None].to(device)
    weights, rows = quantised(4, 64, 128, rng, device), int(counts.sum())
    x = torch.randn((rows, 128), generator=rng).to(device, torch.bfloat16)
    found = []
    for matrices in (weights, weights.prepared("sm_90")):
        plan = plan_dispatch(experts, 4, block_m=height)
        out = torch.full((rows, 32), 7.0, dtype=torch.bfloat16, device=device)
        tile = ExpertTile(height, 64, 128, 4)
        found.append(grouped_gemm(x, matrices, plan, gather=True, gated=True, tile=tile, out=out).cpu().float())
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=2**-7)


def test_nan_of_one_row_stays_in_it(rng: torch.Generator, device: str) -> None:
    weights, x = quantised(2, 64, 128, rng, device), torch.randn((4, 128), generator=rng).to(device, torch.bfloat16)
    plan = plan_dispatch(torch.tensor([[0], [1], [0], [1]], dtype=torch.int32, device=device), 2, block_m=16)
    moved = weights.prepared("sm_90")
    clean = grouped_gemm(x, moved, plan, gather=True, gated=True, limit=LIMIT, tile=TILE)
    x[2] = float("nan")
    got = grouped_gemm(x, moved, plan, gather=True, gated=True, limit=LIMIT, tile=TILE)
    assert got[1].isnan().all(), "sorted position 1 is token 2"
    assert difference(got[[0, 2, 3]], clean[[0, 2, 3]]) == ""


# --- what is refused ---


def test_bad_weights_and_launches_are_refused_by_name(rng: torch.Generator, device: str) -> None:
    weights = quantised(1, 64, 128, rng, device)
    moved = weights.prepared("sm_90")

    def refused(said: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(said)):
            Mxfp4Weights(*arguments)

    refused("layout: got 'hopper', expected one of ['checkpoint', 'wgmma']", weights.packed, weights.scales, "hopper")
    refused("packed: got shape [1, 64, 64], expected [E, K / 128, N, 64]", weights.packed, weights.scales, "wgmma")
    refused("packed: got shape [1, 1, 64, 64], expected [E, N, K / 2]", moved.packed, moved.scales)
    refused("scales: got shape [1, 64, 4], expected [1, 1, 64, 4]", moved.packed, weights.scales, "wgmma")
    x, plan = torch.ones((2, 128), dtype=torch.bfloat16, device=device), None
    plan = plan_dispatch(torch.zeros((2, 1), dtype=torch.int32, device=device), 1, block_m=16)
    for tile, said in (
        (replace(TILE, block_k=64), "tile: got block_k 64, expected 128 with the layout 'wgmma'"),
        (replace(TILE, num_warps=1), "tile: got block_n 64 with 1 warps, expected at most 32 rows to a warp"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            grouped_gemm(x, moved, plan, tile=tile)
    with pytest.raises(ValueError, match="weights: in the layout 'wgmma', expected 'checkpoint' on gfx942"):
        grouped_constants(64, 128, 1, TILE, "gfx942", False, False, False, False, "wgmma")


def test_the_owning_form_takes_the_layout_of_checkpoints(rng: torch.Generator, device: str) -> None:
    w1, w2 = quantised(2, 256, 128, rng, device), quantised(2, 128, 128, rng, device)
    x = torch.randn((3, 128), generator=rng).to(device, torch.bfloat16)
    experts = torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device)
    weights, plan = torch.ones((3, 1), device=device), plan_dispatch(experts, 2, block_m=16)
    first, second = w1.prepared("sm_90"), w2.prepared("sm_90")

    def layer(w2: Mxfp4Weights, **form: Any) -> Tensor:
        return expert_layer(x, first, w2, weights, plan, limit=None, w1_tile=TILE, **form).cpu()

    with pytest.raises(ValueError, match=re.escape("w2: got the layout 'wgmma', expected 'checkpoint'")):
        layer(second, form="owned")
    torch.testing.assert_close(layer(w2, form="owned"), layer(second, w2_tile=TILE), rtol=2**-7, atol=2**-7)
