"""The projection reference: block-scaled weights dequantised exactly, and every group with its own matrix."""

from __future__ import annotations

import re

import pytest
import torch

from dsv4ref.formats import Dialect, fp8
from dsv4ref.ref.projection import WEIGHT_BLOCK, dequantise_weight_ref, grouped_projection_ref


@pytest.mark.parametrize("dialect", Dialect)
def test_each_block_has_its_own_scale(dialect: Dialect, rng: torch.Generator) -> None:
    """Against indexing, element by element, also where the last blocks are cut off."""
    rows, columns = 130, 257
    codes = fp8.encode(torch.randn((rows, columns), generator=rng) * 60, dialect)
    scale = torch.randint(90, 140, (2, 3), generator=rng).to(torch.uint8)
    got = dequantise_weight_ref(codes.view(dialect.dtype), scale, torch.float64)
    values = fp8.decode(codes, dialect, torch.float64)
    for n, k in ((0, 0), (127, 127), (127, 128), (128, 127), (129, 255), (129, 256), (64, 200)):
        want = values[n, k].item() * 2.0 ** (scale[n // WEIGHT_BLOCK, k // WEIGHT_BLOCK].item() - 127)
        assert got[n, k].item() == want, (n, k)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (
            (130, 257),
            (2, 4),
            "scale: got shape [2, 4], expected [2, 3], one per 128 x 128 block of a weight [130, 257]",
        ),
        ((130, 257), (130, 3), "scale: got shape [130, 3], expected [2, 3]"),
        ((130, 257), (1, 3), "scale: got shape [1, 3], expected [2, 3]"),
        ((130, 257), (6,), "scale: got shape [6], expected [2, 3]"),
        ((2, 128, 128), (1, 1), "weight: got shape [2, 128, 128], expected [N, K]"),
    ],
)
def test_scales_of_another_shape_are_refused(weight: tuple[int, ...], scale: tuple[int, ...], message: str) -> None:
    codes = torch.zeros(weight, dtype=torch.uint8).view(Dialect.FN.dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        dequantise_weight_ref(codes, torch.full(scale, 127, dtype=torch.uint8))


@pytest.mark.parametrize("dialect", Dialect)
def test_bf16_holds_every_product(dialect: Dialect) -> None:
    """4 significant bits times a power of two: all codes under scales from 2^-100 to 2^100."""
    codes = torch.arange(256).to(torch.uint8).repeat(WEIGHT_BLOCK)[: WEIGHT_BLOCK * 128].reshape(WEIGHT_BLOCK, 128)
    codes = codes.repeat(1, 2)
    for byte in (27, 115, 127, 227):
        scale = torch.full((1, 2), byte, dtype=torch.uint8)
        weight = codes.view(dialect.dtype)
        exact = dequantise_weight_ref(weight, scale, torch.float64)
        rounded = dequantise_weight_ref(weight, scale).to(torch.float64)
        same = (rounded == exact) | (rounded.isnan() & exact.isnan())
        where = (~same).nonzero()[:1].tolist()
        assert same.all(), f"scale byte {byte}, first {where}"


def test_groups_project_with_their_own_rows_and_heads_do_not_mix(rng: torch.Generator) -> None:
    T, G, R, D = 3, 2, 4, 8
    o = torch.randn((T, G, D), generator=rng, dtype=torch.float64)
    weight = torch.randn((G * R, D), generator=rng, dtype=torch.float64)
    z = grouped_projection_ref(o, weight)
    assert z.shape == (T, G, R)
    for t in range(T):
        for g in range(G):
            for r in range(R):
                want = sum(o[t, g, d].item() * weight[g * R + r, d].item() for d in range(D))
                assert z[t, g, r].item() == pytest.approx(want, rel=1e-12), (t, g, r)


def test_the_result_has_the_inputs_dtype(rng: torch.Generator) -> None:
    o = torch.randn((1, 1, 8), generator=rng).to(torch.bfloat16)
    assert grouped_projection_ref(o, torch.ones(2, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16
