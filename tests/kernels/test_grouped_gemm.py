"""The grouped MXFP4 GEMM: every code and scale exactly, every row of every expert once, and nothing else written."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_inputs import LIMIT, choices, hidden_of, matrices, quantised, worst
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.kernels.experts import ExpertTile, Mxfp4Weights, grouped_gemm, plan_dispatch

TILE = ExpertTile(16, 32, 64, 4)


def bf16(rows: int, columns: int, rng: torch.Generator, device: str) -> Tensor:
    return torch.randn((rows, columns), generator=rng).to(device, torch.bfloat16)


def identity(size: int, device: str) -> Tensor:
    return torch.eye(size, dtype=torch.bfloat16, device=device)


# --- the weights ---


def test_every_code_under_every_scale_is_what_the_format_says(device: str) -> None:
    """Against a unit matrix the products are the weights: 16 codes under 256 scale bytes, subnormals and NaN too."""
    codes = torch.arange(32, dtype=torch.uint8) % 16
    packed = mxfp4.pack(codes).expand(1, 256, 16).contiguous()
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(1, 256, 1)
    weights = Mxfp4Weights(packed.to(device), scales.to(device))
    plan = plan_dispatch(torch.zeros((32, 1), dtype=torch.int32, device=device), 1, block_m=32)
    tile = ExpertTile(32, 256, 32, 4)
    got = grouped_gemm(identity(32, device), weights, plan, tile=tile).cpu().float()  # [32, 256], transposed
    want = mxfp4.dequantise(packed, scales, torch.bfloat16)[0].T.float()
    # A sum over the other columns: 0 * inf is NaN, so a row that holds an infinity or NaN is compared as such.
    finite = want.isfinite().all(dim=0)
    assert int(finite.sum()) == 253, "255 is NaN, and 253 and 254 reach beyond bf16"
    assert got[:, ~finite].isnan().any(dim=0).all()
    bad = (got[:, finite] != want[:, finite]).nonzero().tolist()
    assert not bad, (
        f"column, scale {bad[0]}: {got[:, finite][tuple(bad[0])]}, expected {want[:, finite][tuple(bad[0])]}"
    )


def test_bytes_behind_a_row_are_not_read(rng: torch.Generator, device: str) -> None:
    """K = 96 in steps of 64: the second step would reach the next row's codes and its scale, here NaN (H39)."""
    weights = quantised(1, 32, 96, rng, device)
    weights.scales[:, 1::2] = 255
    x = bf16(5, 96, rng, device)
    plan = plan_dispatch(torch.zeros((5, 1), dtype=torch.int32, device=device), 1, block_m=16)
    got = grouped_gemm(x, weights, plan, tile=TILE)
    want = x.cpu().double() @ matrices(weights)[0].T
    assert worst(got[:, 0::2], want[:, 0::2], 0.02) == ""
    assert got[:, 1::2].isnan().all()


# --- rows ---

SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "experts": 4, "top_k": 2, "absent": 0},
    "experts beyond 32, most of them empty": {"tokens": 5, "experts": 37, "top_k": 3, "absent": 0},
    "a part of the experts": {"tokens": 40, "experts": 3, "top_k": 4, "absent": 5},
    "several tiles to an expert": {"tokens": 50, "experts": 2, "top_k": 1, "absent": 0},
    "nothing local": {"tokens": 3, "experts": 2, "top_k": 2, "absent": 10**6},
}


@pytest.mark.parametrize(("gather", "scatter"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_local_row_is_its_experts_product_and_no_other_is_written(
    shape: dict[str, int], gather: bool, scatter: bool, rng: torch.Generator, device: str
) -> None:
    experts = choices(rng=rng, **shape)
    weights = quantised(shape["experts"], 48, 64, rng, device)
    plan = plan_dispatch(experts.to(device), shape["experts"], block_m=16)
    slots, top_k = experts.numel(), shape["top_k"]
    x = bf16(shape["tokens"] if gather else slots, 64, rng, device)
    out = torch.full((slots, 48), 7.0, dtype=torch.bfloat16, device=device)
    assert grouped_gemm(x, weights, plan, gather=gather, scatter=scatter, tile=TILE, out=out) is out
    want = torch.full((slots, 48), 7.0, dtype=torch.float64)
    dense, owners = matrices(weights), experts.flatten().tolist()
    for position, slot in enumerate(plan.gather.tolist()):
        if slot >= 0:
            source = x[slot // top_k if gather else position].cpu().double()
            want[slot if scatter else position] = dense[owners[slot]] @ source
    assert worst(out, want, 0.04) == ""


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_gate_and_up_are_multiplied_clamped_and_activated(
    limit: float | None, rng: torch.Generator, device: str
) -> None:
    experts = choices(9, 3, 2, 1, rng)
    weights = quantised(3, 96, 64, rng, device)  # 48 hidden columns: half a block at the end
    x = 3 * bf16(9, 64, rng, device)
    plan = plan_dispatch(experts.to(device), 3, block_m=16)
    got = grouped_gemm(x, weights, plan, gather=True, gated=True, limit=limit, tile=replace(TILE, block_n=64))
    dense, owners = matrices(weights), experts.flatten().tolist()
    for position, slot in enumerate(plan.gather.tolist()):
        if slot >= 0:
            want = hidden_of(x[slot // 2].cpu(), dense, owners[slot], limit)
            assert worst(got[position], want, 0.005 * float(want.abs().max())) == "", position


def test_nan_survives_the_clamp_and_stays_in_its_row(rng: torch.Generator, device: str) -> None:
    weights = quantised(2, 64, 64, rng, device)
    x = bf16(4, 64, rng, device)
    plan = plan_dispatch(torch.tensor([[0], [1], [0], [1]], dtype=torch.int32, device=device), 2, block_m=16)
    clean = grouped_gemm(x, weights, plan, gather=True, gated=True, limit=LIMIT, tile=TILE)
    x[2] = float("nan")
    got = grouped_gemm(x, weights, plan, gather=True, gated=True, limit=LIMIT, tile=TILE)
    assert got[1].isnan().all(), "sorted position 1 is token 2"
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


def test_tiles_of_one_step_give_the_same_bytes(rng: torch.Generator, device: str) -> None:
    """block_k decides the order of summation; the other sizes and the pieces of the epilogue do not."""
    experts = choices(20, 2, 2, 1, rng).to(device)
    weights, x = quantised(2, 128, 96, rng, device), bf16(20, 96, rng, device)
    found = {}
    for tile in (
        TILE, ExpertTile(32, 64, 64, 4), ExpertTile(16, 64, 64, 8, subtile_n=16), ExpertTile(16, 128, 64, 4, 2, 16),
    ):  # fmt: skip
        plan = plan_dispatch(experts, 2, block_m=tile.block_m)
        got = grouped_gemm(x, weights, plan, gather=True, gated=True, limit=LIMIT, tile=tile)
        found[str(tile)] = got[: int(plan.offsets[-1])]
    first = found.pop(str(TILE))
    for name, other in found.items():
        assert torch.equal(first, other), f"{name}: first difference at {(first != other).nonzero()[0].tolist()}"


def test_strided_rows_of_input_and_output(rng: torch.Generator, device: str) -> None:
    experts = choices(6, 3, 2, 0, rng).to(device)
    weights, wide = quantised(3, 32, 64, rng, device), bf16(6, 100, rng, device)
    plan = plan_dispatch(experts, 3, block_m=16)
    memory = torch.full((14, 48), 7.0, dtype=torch.bfloat16, device=device)
    got = grouped_gemm(wide[:, 8:72], weights, plan, gather=True, tile=TILE, out=memory[1:-1, 4:36])
    assert torch.equal(got, grouped_gemm(wide[:, 8:72].contiguous(), weights, plan, gather=True, tile=TILE))
    guards = torch.ones_like(memory, dtype=torch.bool)
    guards[1:-1, 4:36] = False
    assert (memory[guards] == 7.0).all()


# --- bad input ---


def test_weights_of_another_packing_are_refused() -> None:
    packed, scales = torch.zeros((2, 8, 32), dtype=torch.uint8), torch.zeros((2, 8, 2), dtype=torch.uint8)
    Mxfp4Weights(packed, scales)
    with pytest.raises(TypeError, match=r"packed: got torch.int8, expected torch.uint8"):
        Mxfp4Weights(packed.view(torch.int8), scales)
    with pytest.raises(ValueError, match=r"packed: got shape \[2, 8, 24\], .* a multiple of 16 bytes"):
        Mxfp4Weights(packed[..., :24].contiguous(), scales)
    with pytest.raises(ValueError, match=r"scales: got shape \[2, 8, 4\], expected \[2, 8, 2\]"):
        Mxfp4Weights(packed, torch.zeros((2, 8, 4), dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scales: got shape \[2, 2, 8\], expected \[2, 8, 2\]"):
        Mxfp4Weights(packed, scales.transpose(1, 2).contiguous())
    with pytest.raises(ValueError, match="packed: got strides"):
        Mxfp4Weights(packed.transpose(0, 1).contiguous().transpose(0, 1), scales)


def test_bad_arguments_are_named(rng: torch.Generator, device: str) -> None:
    weights, x = quantised(3, 32, 64, rng, device), bf16(4, 64, rng, device)
    plan = plan_dispatch(choices(4, 3, 2, 0, rng).to(device), 3, block_m=16)
    given: dict[str, Any] = {"x": x, "weights": weights, "plan": plan, "gather": True, "tile": TILE}

    def refused(kind: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(kind, match=re.escape(message)):
            grouped_gemm(**{**given, **changes})

    refused(TypeError, "weights: got Tensor, expected a Mxfp4Weights", weights=weights.packed)
    refused(TypeError, "plan: got dict, expected a DispatchPlan", plan=plan.tensors)
    refused(TypeError, "x: got torch.float32, expected torch.bfloat16", x=x.float())
    refused(ValueError, "x: got shape [4, 64], expected [8, 64]", gather=False)
    refused(ValueError, "x: got strides (1, 4), expected a unit stride", x=x.T.contiguous().T)
    refused(ValueError, "plan: made for 3 experts, expected 2", weights=quantised(2, 32, 64, rng, device))
    refused(ValueError, "plan: made for tiles of 16 rows, expected 32, as", tile=ExpertTile(32, 32, 64, 4))
    refused(ValueError, "tile: got block_n 16, expected at least 32", tile=ExpertTile(16, 16, 64, 4), gated=True)
    refused(ValueError, "limit: got 1.0 with gated=False", limit=1.0)
    refused(ValueError, "limit: got -1.0 with gated=True", limit=-1.0, gated=True)
    refused(ValueError, "out: got shape [4, 32], expected [8, 32]", out=torch.empty_like(x[:, :32]))
    both = torch.zeros((8, 64), dtype=torch.bfloat16, device=device)
    refused(ValueError, "out: its memory range overlaps x's", x=both[:4], out=both[:, :32])


def test_an_empty_batch_and_a_rank_without_experts_launch_nothing(rng: torch.Generator, device: str) -> None:
    none = torch.zeros((0, 2), dtype=torch.int32, device=device)
    weights = quantised(3, 32, 64, rng, device)
    plan = plan_dispatch(none, 3, block_m=16)
    assert grouped_gemm(bf16(0, 64, rng, device), weights, plan, gather=True, tile=TILE).shape == (0, 32)
    empty = Mxfp4Weights(weights.packed[:0], weights.scales[:0])
    plan = plan_dispatch(torch.full((2, 2), -1, dtype=torch.int32, device=device), 0, block_m=16)
    out = torch.full((4, 32), 7.0, dtype=torch.bfloat16, device=device)
    grouped_gemm(bf16(2, 64, rng, device), empty, plan, gather=True, scatter=True, tile=TILE, out=out)
    assert (out == 7.0).all()
