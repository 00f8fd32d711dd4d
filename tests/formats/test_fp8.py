"""e4m3 codes of both dialects: against torch, against the formula, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4ref.formats import Dialect, fp8

CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
NAN_CODES = {Dialect.FN: {0x7F, 0xFF}, Dialect.FNUZ: {0x80}}


def by_formula(code: int, dialect: Dialect) -> float:
    """sign * 2^(e - bias) * 1.mmm, subnormals without the hidden bit; the two dialects differ in bias and specials."""
    if code in NAN_CODES[dialect]:
        return math.nan
    bias = 7 if dialect is Dialect.FN else 8
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    magnitude = mantissa * 2.0 ** (1 - bias - 3) if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - bias - 3)
    return -magnitude if code & 0x80 else magnitude


def bits(values: Tensor) -> list[int]:
    """float32 bit patterns, every NaN as one."""
    patterns = values.to(torch.float32).view(torch.int32)
    return torch.where(torch.isnan(values), torch.full_like(patterns, 0x7FC00000), patterns).tolist()


@pytest.mark.parametrize("dialect", Dialect)
def test_every_code_decodes_to_the_formula_bit_for_bit(dialect: Dialect) -> None:
    expected = torch.tensor([by_formula(code, dialect) for code in range(256)])
    decoded = bits(fp8.decode(CODES, dialect))
    wrong = [(code, decoded[code], want) for code, want in enumerate(bits(expected)) if decoded[code] != want]
    assert not wrong, f"(code, got, expected) {wrong[0]}, {len(wrong)} in all"


@pytest.mark.parametrize("dialect", Dialect)
def test_every_code_decodes_as_torch_does(dialect: Dialect) -> None:
    assert bits(fp8.decode(CODES, dialect)) == bits(CODES.view(dialect.dtype).to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dialect", Dialect)
def test_decoding_is_exact_in_every_wider_type(dialect: Dialect, dtype: torch.dtype) -> None:
    decoded = fp8.decode(CODES, dialect, dtype)
    assert decoded.dtype is dtype
    assert bits(decoded) == bits(fp8.decode(CODES, dialect))


@pytest.mark.parametrize("dialect", Dialect)
def test_encoding_inverts_decoding(dialect: Dialect) -> None:
    numbers = torch.tensor([code for code in range(256) if code not in NAN_CODES[dialect]]).to(torch.uint8)
    assert fp8.encode(fp8.decode(numbers, dialect), dialect).tolist() == numbers.tolist()
    assert set(fp8.encode(torch.tensor([math.nan, -math.nan]), dialect).tolist()) <= NAN_CODES[dialect]


@pytest.mark.parametrize("dialect", Dialect)
def test_encoding_rounds_to_nearest_with_ties_to_even(dialect: Dialect) -> None:
    """Between any two neighbouring codes: the middle goes to the even code, either side of it to the nearer one."""
    largest = 0x7E if dialect is Dialect.FN else 0x7F
    low = fp8.decode(CODES[:largest], dialect, torch.float64)
    high = fp8.decode(CODES[1 : largest + 1], dialect, torch.float64)
    middle = ((low + high) / 2).to(torch.float32)
    codes = torch.arange(largest)
    even = codes + codes % 2
    assert fp8.encode(middle, dialect).tolist() == even.tolist()
    assert fp8.encode(torch.nextafter(middle, torch.tensor(0.0)), dialect).tolist() == codes.tolist()
    assert fp8.encode(torch.nextafter(middle, torch.tensor(1e9)), dialect).tolist() == (codes + 1).tolist()


@pytest.mark.parametrize(
    ("value", "fn", "fnuz"),
    [
        (239.0, 240.0, 240.0),
        (240.0, 240.0, 240.0),
        (248.0, 256.0, 240.0),  # 248 ties to the even code; torch's own fnuz cast gives NaN from here up
        (250.0, 256.0, 240.0),
        (449.0, 448.0, 240.0),
        (1e4, 448.0, 240.0),
        (math.inf, 448.0, 240.0),
        (-math.inf, -448.0, -240.0),
    ],
)
def test_encoding_saturates(value: float, fn: float, fnuz: float) -> None:
    for dialect, expected in ((Dialect.FN, fn), (Dialect.FNUZ, fnuz)):
        code = fp8.encode(torch.tensor([value]), dialect)
        assert fp8.decode(code, dialect).item() == expected, dialect


def test_fnuz_never_writes_the_byte_that_means_negative_zero_elsewhere() -> None:
    tiny = torch.tensor([-0.0, 0.0, -1e-9, -(2.0**-11)])  # half the smallest fnuz number rounds to zero
    assert fp8.encode(tiny, Dialect.FNUZ).tolist() == [0, 0, 0, 0]
    assert fp8.encode(tiny, Dialect.FN).tolist() == [0x80, 0, 0x80, 0x80]


def test_the_same_byte_is_half_as_much_in_fnuz_for_exactly_253_codes() -> None:
    fn, fnuz = (fp8.decode(CODES, dialect, torch.float64) for dialect in (Dialect.FN, Dialect.FNUZ))
    half = torch.isfinite(fn) & torch.isfinite(fnuz)
    assert int(half.sum()) == 253
    assert torch.equal(fnuz[half] * 2, fn[half])
    assert [hex(code) for code in CODES[~half].tolist()] == ["0x7f", "0x80", "0xff"]
    assert fnuz[0x7F].item() == 240.0
    assert fnuz[0xFF].item() == -240.0
    assert torch.isnan(fn[[0x7F, 0xFF]]).all()
    assert torch.isnan(fnuz[0x80])
    assert fn[0x80].item() == 0.0
    assert math.copysign(1.0, fn[0x80].item()) == -1.0


def test_dialects_state_their_limits() -> None:
    assert {d: (d.finite_max, d.writer_max, d.dtype) for d in Dialect} == {
        Dialect.FN: (448.0, 448.0, torch.float8_e4m3fn),
        Dialect.FNUZ: (240.0, 224.0, torch.float8_e4m3fnuz),
    }
    for dialect in Dialect:
        assert torch.finfo(dialect.dtype).max == dialect.finite_max


def test_relabelled_codes_are_half_the_value_everywhere() -> None:
    codes = torch.tensor([code for code in range(256) if code not in (0x7F, 0xFF)]).to(torch.uint8)
    relabelled = fp8.from_fn_to_fnuz(codes)
    assert torch.equal(
        fp8.decode(relabelled, Dialect.FNUZ, torch.float64) * 2, fp8.decode(codes, Dialect.FN, torch.float64)
    )
    changed = (relabelled != codes).nonzero().flatten().tolist()
    assert [(int(codes[i]), int(relabelled[i])) for i in changed] == [(0x80, 0x00)]


def test_relabelling_refuses_nan_bytes_which_would_become_240() -> None:
    with pytest.raises(ValueError, match=r"codes: 2 NaN bytes \(0x7F/0xFF\), expected finite OCP codes"):
        fp8.from_fn_to_fnuz(torch.tensor([1, 0x7F, 0xFF], dtype=torch.uint8))


@pytest.mark.parametrize("codes", [torch.zeros(2), torch.zeros(2, dtype=torch.int32)], ids=["float", "int32"])
def test_relabelling_refuses_other_types_than_bytes(codes: Tensor) -> None:
    with pytest.raises(TypeError, match=rf"codes: got {codes.dtype}, expected torch.uint8"):
        fp8.from_fn_to_fnuz(codes)


def test_decoding_refuses_other_types_than_bytes() -> None:
    with pytest.raises(TypeError, match=r"codes: got torch.int8, expected torch.uint8"):
        fp8.decode(torch.zeros(2, dtype=torch.int8), Dialect.FN)


@pytest.mark.parametrize("value", ["fn", "E4M3FN", "", None, 3])
def test_unknown_dialects_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"cache: got .*, expected one of \['e4m3fn', 'e4m3fnuz'\]"):
        Dialect.of(value, argument="cache")


@pytest.mark.parametrize("dialect", Dialect)
def test_dialects_are_known_by_their_names(dialect: Dialect) -> None:
    assert Dialect.of(dialect.value) is dialect
    assert Dialect.of(dialect) is dialect
