"""MXFP4: codes and rounding over their whole range, packing order, scales."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4ref.formats import mxfp4, ue8m0

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_decode_gives_the_sixteen_values() -> None:
    got = mxfp4.decode(torch.arange(16, dtype=torch.uint8))
    assert got.tolist() == VALUES + [-value for value in VALUES]
    assert math.copysign(1, got[8].item()) == -1, "code 8 is -0"
    # The definition, from the bits: sign, two exponent bits of bias 1, one mantissa bit.
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert abs(got[code].item()) == magnitude, code


def test_encode_inverts_decode() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(mxfp4.encode(mxfp4.decode(codes)), codes)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (7.0, 6), (1e30, 6), (math.inf, 6)],
)
def test_ties_go_to_even_and_large_values_saturate(value: float, rounded: float) -> None:
    both = mxfp4.decode(mxfp4.encode(torch.tensor([value, -value], dtype=torch.float64)))
    assert both.tolist() == [rounded, -rounded]


def test_values_beside_a_tie_go_to_the_nearer_code() -> None:
    for low, high in itertools.pairwise(VALUES):
        tie = torch.tensor((low + high) / 2)
        below, above = torch.nextafter(tie, torch.tensor(0.0)), torch.nextafter(tie, torch.tensor(9.0))
        assert mxfp4.decode(mxfp4.encode(torch.stack((below, above)))).tolist() == [low, high]


@given(st.floats(-6, 6, allow_subnormal=False))
def test_no_code_is_nearer_than_the_one_chosen(value: float) -> None:
    got = mxfp4.decode(mxfp4.encode(torch.tensor([value], dtype=torch.float64))).item()
    assert abs(got - value) == min(abs(sign * v - value) for v in VALUES for sign in (1, -1))
    assert math.copysign(1, got) == math.copysign(1, value)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="values: got NaN"):
        mxfp4.encode(torch.tensor([0.0, math.nan]))


def test_the_low_nibble_is_the_even_index() -> None:
    codes = torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)
    packed = mxfp4.pack(codes)
    assert packed.tolist() == [[0x21, 0x8F]]
    assert torch.equal(mxfp4.unpack(packed), codes)


def test_int8_bytes_unpack_like_uint8() -> None:
    """Checkpoints store int8; an arithmetic shift would smear the sign bit over the high nibble."""
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    assert torch.equal(mxfp4.unpack(every.view(torch.int8)), mxfp4.unpack(every))
    assert torch.equal(mxfp4.pack(mxfp4.unpack(every)), every)


@pytest.mark.parametrize("amax", [6.0, 6.5, 3.0, 2.9, 12.0, 1e-3, 7e4])
def test_the_scale_is_the_smallest_power_of_two_that_fits(amax: float) -> None:
    x = torch.linspace(-0.9, 0.9, 32) * amax
    x[5] = amax
    packed, scales = mxfp4.quantise(x[None])
    exponent = int(scales) - 127
    assert exponent == math.ceil(math.log2(amax / 6))
    assert packed.shape == (1, 16)
    assert scales.shape == (1, 1)
    error = (mxfp4.dequantise(packed, scales)[0] - x).abs()
    assert (error <= 2.0**exponent).all(), "half of the widest step, 4 to 6"


def test_blocks_of_32_have_their_own_scale(rng: torch.Generator) -> None:
    x = torch.randn((3, 2, 96), generator=rng) * torch.tensor([1.0, 100.0, 1e-4]).repeat_interleave(32)
    packed, scales = mxfp4.quantise(x)
    assert packed.shape == (3, 2, 48)
    assert scales.shape == (3, 2, 3)
    for block in range(3):
        part = x[..., 32 * block : 32 * block + 32].contiguous()
        alone = mxfp4.quantise(part)
        assert torch.equal(alone[0], packed[..., 16 * block : 16 * block + 16])
        assert torch.equal(alone[1][..., 0], scales[..., block])


def test_an_all_zero_block_survives() -> None:
    packed, scales = mxfp4.quantise(torch.zeros(2, 32))
    assert torch.count_nonzero(packed) == 0
    assert ue8m0.decode(scales).tolist() == [[2.0**-126], [2.0**-126]]
    assert torch.count_nonzero(mxfp4.dequantise(packed, scales)) == 0


def test_quantising_again_changes_nothing(rng: torch.Generator) -> None:
    x = torch.randn((64, 64), generator=rng) * torch.exp(3 * torch.randn((64, 1), generator=rng))
    once = mxfp4.dequantise(*mxfp4.quantise(x))
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(once)), once)
    assert not torch.equal(once, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_code_under_every_scale(dtype: torch.dtype) -> None:
    """16 codes times 256 scale bytes: the exact product, rounded once where the result type does not hold it."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(256, 32)
    scales = torch.arange(256).to(torch.uint8)[:, None]
    got = mxfp4.dequantise(mxfp4.pack(codes), scales, dtype)
    assert torch.isnan(got[255]).all(), "byte 255 is NaN, whatever it multiplies"
    signed = VALUES + [-value for value in VALUES]
    exact = torch.tensor([[math.ldexp(v, b - 127) for v in signed] for b in range(255)], dtype=torch.float64)
    want = exact.to(dtype).repeat(1, 2)
    worst = (got[:255] != want).nonzero()[:1].tolist()
    assert not worst, f"[byte, code] {worst[0]}: {got[tuple(worst[0])]}, expected {want[tuple(worst[0])]}"
    assert torch.equal(torch.signbit(got[:255]), torch.signbit(want)), "-0 keeps its sign"


def test_dequantised_values_are_exact_in_bfloat16(rng: torch.Generator) -> None:
    packed = torch.randint(0, 256, (8, 32), generator=rng).to(torch.uint8)
    scales = torch.randint(20, 230, (8, 2), generator=rng).to(torch.uint8)
    wide = mxfp4.dequantise(packed, scales, torch.float64)
    assert torch.equal(mxfp4.dequantise(packed, scales, torch.bfloat16).to(torch.float64), wide)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 33\), expected a last dimension"):
        mxfp4.quantise(torch.zeros(2, 33))
    with pytest.raises(TypeError, match=r"x: got torch.int64"):
        mxfp4.quantise(torch.zeros(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: got infinities or NaN"):
        mxfp4.quantise(torch.full((1, 32), math.inf))
    with pytest.raises(ValueError, match="codes: got 16, expected 0 to 15"):
        mxfp4.decode(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes: got 200, expected 0 to 15"):
        mxfp4.pack(torch.tensor([200, 1], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes: got shape \(2, 3\), expected an even"):
        mxfp4.pack(codes[:, :3])
    with pytest.raises(TypeError, match=r"packed: got torch.int32"):
        mxfp4.unpack(codes.to(torch.int32))
    with pytest.raises(ValueError, match=r"scales: got shape \(2, 1\) for \(2, 32\) packed bytes, expected \(2, 2\)"):
        mxfp4.dequantise(codes, torch.zeros(2, 1, dtype=torch.uint8))
