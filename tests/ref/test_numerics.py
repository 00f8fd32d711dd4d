"""The round trips through storage formats: which values share a scale, floors, and what is rounded first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4ref.formats import Dialect, mxfp4
from dsv4ref.ref.indexer import index_format_ref
from dsv4ref.ref.numerics import STRUCTURE, Numerics, bf16_round_trip, fp4_round_trip, fp8_round_trip


def uneven(rng: torch.Generator, rows: int, width: int) -> Tensor:
    """Neighbouring runs of 32 values of very different size: sharing a scale with the wrong ones costs precision."""
    size = torch.exp(4 * torch.randn((rows, width // 32), generator=rng)).repeat_interleave(32, dim=1)
    return torch.randn((rows, width), generator=rng) * size


@pytest.mark.parametrize("block", [64, 128])
def test_every_fp8_block_is_rounded_alone(block: int, rng: torch.Generator) -> None:
    x = uneven(rng, 20, 384)
    got = fp8_round_trip(x, block)
    for first in range(0, 384, block):
        part = slice(first, first + block)
        assert torch.equal(got[:, part], fp8_round_trip(x[:, part], block))
    assert not torch.equal(got, fp8_round_trip(x, 2 * block))
    error = (got - x).abs().unflatten(1, (-1, block))
    largest = x.abs().unflatten(1, (-1, block)).amax(dim=-1, keepdim=True)
    assert (error <= largest * 2**-4).all()


@pytest.mark.parametrize("dialect", Dialect)
def test_fp8_by_its_definition(dialect: Dialect) -> None:
    """amax 450 needs 2^1 under 448 (2^2 under 224); 3 mantissa bits are left of every value."""
    x = torch.tensor([450.0, 100, 1.1, -7.3] + [0.0] * 60)
    assert fp8_round_trip(x, 64, dialect)[:4].tolist() == [448.0, 96.0, 1.125, -7.5]


def test_small_blocks_meet_the_floor() -> None:
    """amax 1e-4 / 448 gives 2^-22; the smallest subnormal is then 2^-31, and less than half of it is 0."""
    x = torch.tensor([2.0**-31, 0.49 * 2.0**-31, 0.0])
    assert fp8_round_trip(x, 64).tolist() == [2.0**-31, 0.0, 0.0]
    assert torch.count_nonzero(fp8_round_trip(torch.zeros(3, 128), 64)) == 0


def test_values_are_rounded_to_bfloat16_first() -> None:
    """1.0629 is above the middle between 1 and 1.125; bfloat16 makes it 1.0625, the middle, and that goes to even."""
    assert fp8_round_trip(torch.tensor([1.0629, 448.0]), 64)[0] == 1.0


def test_fp4_is_mxfp4_of_bfloat16(rng: torch.Generator) -> None:
    x = uneven(rng, 8, 128)
    got = fp4_round_trip(x)
    assert torch.equal(got, mxfp4.dequantise(*mxfp4.quantise(bf16_round_trip(x))))
    assert torch.equal(got[:, 32:64], fp4_round_trip(x[:, 32:64].contiguous()))
    assert fp4_round_trip(x.double()).dtype is torch.float64


def test_which_blocks_go_where(rng: torch.Generator) -> None:
    x = uneven(rng, 8, 128)
    wide = fp8_round_trip(x, 128)
    assert torch.equal(Numerics(quantise_linear_inputs="fp8").linear_input(x), wide)
    assert torch.equal(Numerics(quantise_expert_inputs="fp8").expert_input(x), wide)
    assert torch.equal(index_format_ref(x, Numerics(quantise_index="fp8", hadamard=False)), wide)
    assert not torch.equal(wide, fp8_round_trip(x, 64))
    for numerics in (Numerics(), STRUCTURE):
        assert numerics.linear_input(x) is x
        assert numerics.expert_input(x) is x


def test_rounding_is_a_switch(rng: torch.Generator) -> None:
    x = torch.randn(64, generator=rng)
    assert torch.equal(Numerics().round(x), x.to(torch.bfloat16).float())
    assert torch.equal(STRUCTURE.round(x), x)
    assert Numerics(dtype=torch.float64).round(x).dtype is torch.float64
