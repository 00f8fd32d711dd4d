"""UE8M0 scale bytes: every byte's value, and the writer's rounding up, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dsv4ref.formats import ue8m0

BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def test_every_byte_is_a_power_of_two_and_255_is_nan() -> None:
    decoded = ue8m0.decode(BYTES)
    assert decoded.dtype is torch.float32
    wrong = [(b, decoded[b].item()) for b in range(255) if decoded[b].item() != math.ldexp(1.0, b - 127)]
    assert not wrong, f"(byte, got) {wrong[0]}, {len(wrong)} in all"
    assert math.isnan(decoded[255].item())


def test_byte_zero_is_a_subnormal_and_not_zero() -> None:
    """The shift that most readers use, byte << 23, gives 0.0 here."""
    assert ue8m0.decode(torch.tensor([0], dtype=torch.uint8)).item() == 2.0**-127


def test_decoding_refuses_other_types_than_bytes() -> None:
    with pytest.raises(TypeError, match=r"scale_bytes: got torch.int32, expected torch.uint8"):
        ue8m0.decode(torch.zeros(2, dtype=torch.int32))


def test_the_exponent_rounds_up_at_and_next_to_every_power_of_two() -> None:
    exponents = torch.arange(-20, 21)
    powers = torch.ldexp(torch.ones(41), exponents)
    above = torch.nextafter(powers, torch.tensor(math.inf))
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert ue8m0.ceil_exponent(powers).tolist() == exponents.tolist()
    assert ue8m0.ceil_exponent(above).tolist() == (exponents + 1).tolist()
    assert ue8m0.ceil_exponent(below).tolist() == exponents.tolist()


def test_the_logarithm_in_float32_would_be_wrong_one_ulp_above_powers_of_two() -> None:
    """Why the bits are used: most of these 41 values would get a scale that overflows."""
    powers = torch.ldexp(torch.ones(41), torch.arange(-20, 21))
    above = torch.nextafter(powers, torch.tensor(math.inf))
    by_logarithm = torch.ceil(torch.log2(above)).to(torch.int32)
    too_low = int((by_logarithm < ue8m0.ceil_exponent(above)).sum())
    assert too_low > 20, f"{too_low} of 41"


def all_bf16(low: float) -> torch.Tensor:
    """Every positive finite bf16 number from ``low`` up, as float32."""
    values = torch.arange(0x0080, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    return values[values >= low]


@pytest.mark.parametrize("fp8_max", [448.0, 224.0, 240.0])
def test_the_scale_is_the_smallest_power_of_two_that_holds_the_block(fp8_max: float) -> None:
    """Exhaustive over bf16, which block maxima are, in float64 (exact: 8 bits times 3 bits)."""
    amax = all_bf16(ue8m0.AMAX_FLOOR)
    exponent = ue8m0.scale_byte(amax, fp8_max).to(torch.float64) - 127
    holds = amax.to(torch.float64) <= fp8_max * torch.exp2(exponent)
    smaller_would_not = amax.to(torch.float64) > fp8_max * torch.exp2(exponent - 1)
    wrong = ~(holds & smaller_would_not)
    worst = amax[wrong][:1].tolist()
    assert not wrong.any(), f"{int(wrong.sum())} of {len(amax)} block maxima, first {worst}"


@pytest.mark.parametrize(("fp8_max", "byte"), [(448.0, 105), (224.0, 106), (240.0, 106)])
def test_all_zero_blocks_get_the_floor(fp8_max: float, byte: int) -> None:
    floor = Fraction(ue8m0.AMAX_FLOOR) / Fraction(fp8_max)
    assert Fraction(2) ** (byte - 127) >= floor > Fraction(2) ** (byte - 128)
    got = ue8m0.scale_byte(torch.tensor([0.0, 1e-30, ue8m0.AMAX_FLOOR]), fp8_max)
    assert got.tolist() == [byte, byte, byte]


def test_the_floor_is_an_argument() -> None:
    assert ue8m0.scale_byte(torch.tensor([1e-7]), 448.0, floor=1e-10).item() < 105


def test_scale_bytes_stay_in_range() -> None:
    extremes = torch.tensor([math.nan, math.inf, torch.finfo(torch.float32).max])
    assert ue8m0.scale_byte(extremes, 448.0).tolist() == [255, 255, 247]
