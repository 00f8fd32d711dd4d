"""bf16 and fp8 in Triton kernels, against torch: on the CPU a test of the shim, on a GPU of the hardware's own claims.

The last part is the control: the plain interpreter, in a process without the shim, must get the same things wrong.
"""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit signature takes no Python types)

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

from dsv4ref.kernels import mode  # before triton: this import decides how triton.language is decorated
from dsv4ref.kernels.interpreter import configure

# isort: split
import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = mode() == "interpreted"
DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
BLOCK = 2048

E4M3, E4M3_FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
E5M2, E5M2_FNUZ = torch.float8_e5m2, torch.float8_e5m2fnuz
FLOAT8 = [E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ]
CODE_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LARGEST_CODE = {E4M3: 0x7E, E4M3_FNUZ: 0x7F, E5M2: 0x7B, E5M2_FNUZ: 0x7F}
NAN_CODES = {
    E4M3: [0x7F, 0xFF],
    E4M3_FNUZ: [0x80],
    E5M2: [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF],
    E5M2_FNUZ: [0x80],
}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needs_dialect(dtype: torch.dtype) -> None:
    if INTERPRETED:
        return
    is_cdna3 = torch.version.hip is not None and "gfx94" in torch.cuda.get_device_properties(0).gcnArchName
    if dtype in (E4M3_FNUZ, E5M2_FNUZ) and not is_cdna3:
        pytest.skip(f"{name(dtype)} is a type of CDNA3 (gfx942) only; this GPU is {torch.cuda.get_device_name()}")


def codes(dtype: torch.dtype) -> torch.Tensor:
    """Every code of a type of 8 or 16 bits, in order."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(65536).to(torch.int16).view(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(CODE_DTYPE[x.dtype.itemsize]).to(torch.int64)


def assert_same(got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor, signed_zero: bool = True) -> None:
    """Bits equal, where one NaN is as good as another; ``signed_zero=False`` also forgets the sign of zero."""
    got, want = got.cpu(), want.cpu()
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    different = bits(got) != bits(want)
    if want.dtype.is_floating_point:
        different &= ~(got.float().isnan() & want.float().isnan())
        if not signed_zero:
            different &= ~((got.float() == 0) & (want.float() == 0))
    if not different.any():
        return
    gap = (got.double() - want.double()).abs().nan_to_num(nan=float("inf")).masked_fill(~different, -1.0)
    worst = int(gap.flatten().argmax())
    row = {"got": got, "want": want} | {f"input{i}": x.cpu() for i, x in enumerate(inputs)}
    shown = ", ".join(
        f"{k} {v.flatten()[worst].item()!r} (0x{int(bits(v).flatten()[worst]) & (256**v.dtype.itemsize - 1):x})"
        for k, v in row.items()
    )
    raise AssertionError(f"{int(different.sum())} of {want.numel()} differ, worst at {worst}: {shown}")


def assert_within(got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """|got - exact| <= bound, elementwise; all in float64."""
    error = (got.cpu().double() - exact).abs()
    excess = torch.where(error.isnan(), float("inf"), error - bound)
    worst = int(excess.flatten().argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{int((excess > 0).sum())} of {exact.numel()} outside, worst at {worst}: got {got.flatten()[worst].item()!r}, "
        f"exact {exact.flatten()[worst].item()!r}, bound {bound.flatten()[worst].item():.3e}"
    )


# ---- casts ----------------------------------------------------------------------------------------------------------


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty), mask=offsets < n)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.full((x.numel(),), 0x55, dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(dtype).to(DEVICE)
    _cast_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.to(DEVICE), y, x.numel(), BLOCK=BLOCK)
    return y.cpu()


def log_uniform(count: int, low: float, high: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponent = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (torch.exp2(exponent) * sign).float()


def with_neighbours(x: torch.Tensor) -> torch.Tensor:
    infinity = torch.full_like(x, float("inf"))
    return torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)])


def rounding_cases(dtype: torch.dtype) -> torch.Tensor:
    """fp32: every finite value, every midpoint of neighbours and the fp32 numbers next to both, and random numbers."""
    values = codes(dtype).float()
    values = values[values.isfinite()].unique()  # sorted
    midpoints = ((values[1:].double() + values[:-1].double()) / 2).float()
    smallest = float(torch.log2(values[values > 0].min()))
    largest = float(torch.log2(values.max()))
    random = log_uniform(20_000, smallest - 2, largest, seed=1)
    return torch.cat([with_neighbours(values), with_neighbours(midpoints), random, torch.tensor([0.0, -0.0])])


def test_bf16_widens_to_fp32_exactly_for_every_code() -> None:
    x = codes(torch.bfloat16)
    assert_same(cast(x, torch.float32), x.float(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=name)
def test_bf16_casts_to_other_types_like_torch(dtype: torch.dtype) -> None:
    x = codes(torch.bfloat16)
    if dtype == torch.int32:
        x = x[x.float().abs() < 2**31]  # outside, the conversion is undefined on every device
    assert_same(cast(x, dtype), x.to(dtype), x)


def test_fp32_rounds_to_bf16_like_torch() -> None:
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    specials = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, -1e-45])
    x = torch.cat([rounding_cases(torch.bfloat16), random.int().view(torch.float32), specials])
    assert_same(cast(x, torch.bfloat16), x.bfloat16(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=name)
def test_fp16_and_fp64_round_to_bf16_like_torch(dtype: torch.dtype) -> None:
    x = codes(dtype) if dtype == torch.float16 else log_uniform(20_000, -130, 127, seed=2).double()
    assert_same(cast(x, torch.bfloat16), x.to(torch.bfloat16), x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=name)
def test_integers_cast_to_bf16_like_torch(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(3)
    shift = torch.randint(0, limits.bits, (20_000,), generator=generator)
    x = torch.randint(limits.min, limits.max, (20_000,), generator=generator) >> shift
    x = torch.cat([x, torch.tensor([limits.min, limits.max, 0, 1])]).to(dtype)
    assert_same(cast(x, torch.bfloat16), x.to(torch.bfloat16), x)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_decodes_like_torch_for_every_code(dtype: torch.dtype, target: torch.dtype) -> None:
    needs_dialect(dtype)
    x = codes(dtype)
    if not INTERPRETED and target == torch.bfloat16 and (dtype == E5M2 or torch.version.hip):
        # Compiled to bf16, these turn NaN and infinity into finite numbers up to triton 3.9 (triton-lang/triton#11784).
        x = x[x.float().isfinite()]
    assert_same(cast(x, target), x.to(target), x)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_nan_codes_are_nan_and_no_others(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    decoded = cast(codes(dtype), torch.float32)
    assert decoded.isnan().nonzero().flatten().tolist() == NAN_CODES[dtype]


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_fp32_rounds_to_float8_like_torch_inside_the_finite_range(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    x = rounding_cases(dtype)
    assert_same(cast(x, dtype), x.to(dtype), x)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_every_16_bit_code_rounds_to_float8_like_torch_inside_the_finite_range(
    dtype: torch.dtype, source: torch.dtype
) -> None:
    needs_dialect(dtype)
    x = codes(source)
    x = x[x.float().abs() <= codes(dtype).float()[LARGEST_CODE[dtype]]]
    assert_same(cast(x, dtype), x.float().to(dtype), x)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_saturates_beyond_the_finite_range(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    largest = codes(dtype).float()[LARGEST_CODE[dtype]].item()
    beyond = [largest * 1.01, largest * 1.05, largest * 1.2, largest * 2, 1e30]
    if INTERPRETED or torch.version.hip is None:
        beyond.append(float("inf"))  # AMD's conversion instructions have their own rule for infinities
    x = torch.tensor(beyond)
    x = torch.cat([x, -x])
    want = torch.tensor([LARGEST_CODE[dtype]] * len(beyond) + [LARGEST_CODE[dtype] | 0x80] * len(beyond))
    assert_same(cast(x, dtype), want.to(torch.uint8).view(dtype), x)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_fp32_nan_stays_nan_in_float8(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    x = torch.tensor([0x7FC00000, 0x7F800001, 0xFFC00000 - 2**32, -1], dtype=torch.int32).view(torch.float32)
    got = cast(x, dtype).view(torch.uint8).tolist()
    assert set(got) <= set(NAN_CODES[dtype]), f"codes {[hex(code) for code in got]} are not all NaN"


@triton.jit
def _truncate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


def test_explicit_rounding_toward_zero_truncates_bf16() -> None:
    x = log_uniform(BLOCK, -30, 30, seed=4)
    y = torch.zeros(BLOCK, dtype=torch.bfloat16, device=DEVICE)
    _truncate_kernel[(1,)](x.to(DEVICE), y, BLOCK=BLOCK)
    assert_same(y, (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16), x)


# ---- bytes: load, store, where, bitcast, constants ------------------------------------------------------------------


@triton.jit
def _move_kernel(x_ptr, loaded_ptr, chosen_ptr, raw_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask & (offsets % 3 != 0), other=1.5)
    tl.store(loaded_ptr + offsets, x, mask=mask)
    tl.store(chosen_ptr + offsets, tl.where(offsets % 2 == 0, x, tl.load(x_ptr + offsets, mask=mask)), mask=mask)
    raw = x.to(raw_ptr.dtype.element_ty, bitcast=True)
    tl.store(raw_ptr + offsets, raw, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=name)
def test_load_store_where_and_bitcast_move_codes_untouched(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    x, index = codes(dtype), torch.arange(codes(dtype).numel())
    loaded, chosen = (torch.zeros_like(x, device=DEVICE) for _ in range(2))
    raw = torch.zeros(x.numel(), dtype=CODE_DTYPE[dtype.itemsize], device=DEVICE)
    _move_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.to(DEVICE), loaded, chosen, raw, x.numel(), BLOCK=BLOCK)
    want = torch.where(index % 3 == 0, bits(torch.tensor([1.5]).to(dtype)), bits(x))
    assert torch.equal(bits(loaded.cpu()), want)
    assert torch.equal(bits(raw.cpu()), want)
    assert torch.equal(bits(chosen.cpu()), torch.where(index % 2 == 0, want, bits(x)))


@triton.jit
def _constant_kernel(y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    constant = tl.full([BLOCK], 2.7, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, tl.where(offsets == 0, tl.zeros([BLOCK], y_ptr.dtype.element_ty), constant))


def test_bf16_constants_are_rounded() -> None:
    y = torch.ones(32, device=DEVICE, dtype=torch.bfloat16)
    _constant_kernel[(1,)](y, BLOCK=32)
    assert_same(y, torch.tensor([0.0] + [2.7] * 31).bfloat16())


# ---- bf16 arithmetic ------------------------------------------------------------------------------------------------


@triton.jit
def _binary_kernel(a_ptr, b_ptr, y_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = tl.load(a_ptr + offsets, mask=mask)
    b = tl.load(b_ptr + offsets, mask=mask)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "div":
        y = a / b
    elif OP == "scaled":
        y = a * 0.3 + 2
    elif OP == "neg":
        y = -a
    elif OP == "abs":
        y = tl.abs(a)
    elif OP == "max":
        y = tl.maximum(a, b)
    elif OP == "min":
        y = tl.minimum(a, b)
    elif OP == "max_nan":
        y = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min_nan":
        y = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        y = tl.clamp(a, -2.0, 3.0)
    elif OP == "clamp_nan":
        y = tl.clamp(a, -2.0, 3.0, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "mask":
        y = (a > b).to(tl.bfloat16)
    else:
        tl.static_assert(OP == "compare")
        y = (a < b).to(tl.int32) + (a <= b).to(tl.int32) * 2 + (a > b).to(tl.int32) * 4
        y += (a >= b).to(tl.int32) * 8 + (a == b).to(tl.int32) * 16 + (a != b).to(tl.int32) * 32
    tl.store(y_ptr + offsets, y, mask=mask)


def operand_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of 26 special values, random pairs of all magnitudes, and random pairs of close magnitudes."""
    tiny = torch.tensor([1, 0x7F, 0x80, 0x7F7F], dtype=torch.int16).view(torch.bfloat16).float().tolist()
    positive = [0.0, 1.0, 2.0, 3.0, 0.3, 1.0078125, 65280.0, 1e-20, *tiny, float("inf")]
    special = torch.tensor(positive + [-x for x in positive] + [float("nan")]).bfloat16()
    first, second = torch.meshgrid(special, special, indexing="ij")
    generator = torch.Generator().manual_seed(5)
    random = torch.randint(0, 65536, (2, 20_000), generator=generator).to(torch.int16).view(torch.bfloat16)
    random[random.isnan()] = float("nan")  # quiet: of a signalling NaN and a number, maxima differ between devices
    close = torch.randn(2, 20_000, generator=generator).bfloat16()
    a = torch.cat([first.flatten(), random[0], close[0]])
    return a, torch.cat([second.flatten(), random[1], close[1]])


def elementwise(op: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = operand_pairs()
    y = torch.full_like(a, 77, dtype=dtype).to(DEVICE)
    _binary_kernel[(triton.cdiv(a.numel(), BLOCK),)](a.to(DEVICE), b.to(DEVICE), y, a.numel(), OP=op, BLOCK=BLOCK)
    return a, b, y.cpu()


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "abs": lambda a, b: a.abs(),
    "scaled": lambda a, b: a * torch.tensor(0.3).bfloat16() + 2,
    "mask": lambda a, b: (a > b).bfloat16(),
}


@pytest.mark.parametrize("op", ARITHMETIC)
def test_bf16_arithmetic_rounds_like_torch(op: str) -> None:
    a, b, got = elementwise(op, torch.bfloat16)
    if op == "scaled" and not INTERPRETED:
        pytest.skip("the compiler contracts multiply and add into one fma, which rounds once")
    assert_same(got, ARITHMETIC[op](a, b), a, b)


def test_bf16_negation() -> None:
    a, _, got = elementwise("neg", torch.bfloat16)
    assert_same(got, -a, a, signed_zero=False)  # triton <= 3.7 computes 0 - x, which is +0 at x = +0


def test_bf16_division_is_an_fp32_division() -> None:
    a, b, got = elementwise("div", torch.float32)
    want = a.float() / b.float()
    if INTERPRETED:
        assert_same(got, want, a, b)
    else:  # compiled fp32 division is approximate (2 ulp) and may flush subnormals
        exact = a.double() / b.double()
        ordinary = want.isfinite() & (want.abs() > 2.0**-120) & (b.float().abs() < 2.0**120)
        assert_within(got[ordinary], exact[ordinary], exact[ordinary].abs() * 2.0**-21)


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        ("max", torch.fmax),
        ("min", torch.fmin),
        ("max_nan", torch.maximum),
        ("min_nan", torch.minimum),
        ("clamp", lambda a, b: torch.fmin(torch.fmax(a, torch.tensor(-2.0)), torch.tensor(3.0))),
        ("clamp_nan", lambda a, b: a.clamp(-2.0, 3.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bf16_maximum_minimum_and_clamp_treat_nan_as_the_gpu_does(
    op: str, reference: Callable[..., torch.Tensor]
) -> None:
    a, b, got = elementwise(op, torch.float32)
    assert_same(got, reference(a.float(), b.float()), a, b, signed_zero=False)  # which zero wins is unspecified


def test_bf16_comparisons_are_ieee() -> None:
    a, b, got = elementwise("compare", torch.int32)
    relations = torch.stack([a < b, a <= b, a > b, a >= b, a == b, a != b])
    weights = torch.tensor([1, 2, 4, 8, 16, 32])
    assert_same(got, (relations * weights[:, None]).sum(0).int(), a, b)


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    y = tl.fma(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.load(c_ptr + offsets))
    tl.store(y_ptr + offsets, y)


def test_bf16_fma_keeps_the_product_exact() -> None:
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(2, BLOCK, generator=generator).bfloat16()
    c = -(a * b)  # what is left is the rounding error of the product: 0 if the product were rounded to bf16 first
    y = torch.zeros_like(a, device=DEVICE)
    _fma_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c.to(DEVICE), y, BLOCK=BLOCK)
    exact = a.double() * b.double() + c.double()
    assert exact.count_nonzero() > BLOCK / 2
    assert_within(y, exact, exact.abs() * 2.0**-8)


# ---- reductions and scans over bf16 ---------------------------------------------------------------------------------


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + rows[:, None] * COLS + cols[None, :])
    if OP == "sum":
        y = tl.sum(x, axis=1)
    elif OP == "max":
        y = tl.max(x, axis=1)
    elif OP == "min":
        y = tl.min(x, axis=1)
    elif OP == "argmax":
        y = tl.argmax(x, axis=1)
    elif OP == "own_sum":
        y = tl.reduce(x, 1, _add)
    else:
        tl.static_assert(OP == "own_max")
        y = tl.reduce(x, 1, _larger)
    tl.store(y_ptr + rows, y)


@triton.jit
def _scan_kernel(x_ptr, y_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + offsets)
    if OP == "cumsum":
        y = tl.cumsum(x, axis=1)
    elif OP == "cumprod":
        y = tl.cumprod(x, axis=1)
    else:
        tl.static_assert(OP == "own_scan")
        y = tl.associative_scan(x, 1, _add)
    tl.store(y_ptr + offsets, y)


def matrix(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(7)).bfloat16()


@pytest.mark.parametrize("op", ["sum", "own_sum"])
def test_bf16_sums_stay_within_their_roundings(op: str) -> None:
    rows, cols = (16, 128) if op == "sum" else (2, 32)
    x = matrix(rows, cols)
    y = torch.full((rows,), float("nan"), dtype=torch.float32, device=DEVICE)  # fp32 shows that the sum was bf16
    _reduce_kernel[(1,)](x.to(DEVICE), y, OP=op, ROWS=rows, COLS=cols)
    assert_same(y, y.bfloat16().float())
    if INTERPRETED and op == "sum":
        assert_same(y, x.float().sum(1).bfloat16().float())  # one rounding, at the end
    # A tree rounds once per level, a chain once per element; each rounding is at most 2^-9 of the partial sum.
    steps = cols if INTERPRETED else cols.bit_length()
    assert_within(y, x.double().sum(1), steps * 2.0**-9 * x.double().abs().sum(1))


@pytest.mark.parametrize("op", ["max", "min", "own_max"])
def test_bf16_maxima_are_exact(op: str) -> None:
    rows, cols = (16, 128) if op != "own_max" else (2, 32)
    x = matrix(rows, cols)
    if op != "own_max":
        x[3, 5] = float("nan")  # tl.max and tl.min drop NaN
    y = torch.full((rows,), float("nan"), dtype=torch.float32, device=DEVICE)
    _reduce_kernel[(1,)](x.to(DEVICE), y, OP=op, ROWS=rows, COLS=cols)
    filled = x.float().nan_to_num(nan=float("inf") if op == "min" else float("-inf"))
    assert_same(y, filled.amin(1) if op == "min" else filled.amax(1))


def test_bf16_argmax_orders_numbers_not_codes() -> None:
    x = matrix(16, 128)
    y = torch.full((16,), -1, dtype=torch.int32, device=DEVICE)
    _reduce_kernel[(1,)](x.to(DEVICE), y, OP="argmax", ROWS=16, COLS=128)
    assert_same(y, x.float().argmax(1).int())  # the maxima of this seed are unique
    assert (x == x.amax(1, keepdim=True)).sum() == 16


@pytest.mark.parametrize("op", ["cumsum", "cumprod", "own_scan"])
def test_bf16_scans_stay_within_their_roundings(op: str) -> None:
    x = matrix(2, 32)
    y = torch.full((2, 32), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    _scan_kernel[(1,)](x.to(DEVICE), y, OP=op, ROWS=2, COLS=32)
    exact = x.double().cumprod(1) if op == "cumprod" else x.double().cumsum(1)
    magnitude = exact.abs() if op == "cumprod" else x.double().abs().cumsum(1)
    # Up to triton 3.8 tl.cumsum and tl.cumprod promote bf16 to fp32; the interpreter computes them in fp32 anyway.
    steps = 1 if op != "own_scan" and (INTERPRETED or TRITON < (3, 9)) else 32
    assert_within(y, exact, steps * 2.0**-8 * magnitude)


# ---- dot ------------------------------------------------------------------------------------------------------------


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.load(c_ptr + m[:, None] * N + n[None, :])
    y = tl.dot(a, b, c, out_dtype=c.dtype)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


def dot(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(c, float("nan")).to(DEVICE)
    _dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c.to(DEVICE), y, M=a.shape[0], N=b.shape[1], K=a.shape[1])
    return y.cpu()


@pytest.mark.parametrize(
    ("dtype", "out"),
    # bf16 has an fp32 result only
    [*product([torch.float16, *FLOAT8], [torch.float32, torch.float16]), (torch.bfloat16, torch.float32)],
    ids=name,
)
def test_dot_is_within_fp32_accumulation_of_float64(dtype: torch.dtype, out: torch.dtype) -> None:
    needs_dialect(dtype)
    m, n, k = 64, 32, 128
    generator = torch.Generator().manual_seed(8)
    scale = 2.0**40 if dtype == torch.bfloat16 else 1.0  # no fp16 holds these
    a = (torch.randn(m, k, generator=generator) * scale).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    c = (torch.randn(m, n, generator=generator) * scale).to(out)
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    # A GPU's fp16 accumulator rounds at 2^-11 at every step, the interpreter's once. Hopper keeps about 14 bits of the
    # sum of each 32 fp8 products (DeepSeek-V3 report, section 3.3.2), others fp32's 24.
    step = 2.0**-24
    if not INTERPRETED and out == torch.float16:
        step = 2.0**-11
    elif not INTERPRETED and dtype in FLOAT8:
        step = 2.0**-13 / 32
    bound = (k + 1) * step * magnitude + (2.0**-11 * exact.abs() if out == torch.float16 else 0)
    assert_within(dot(a, b, c), exact, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3, E4M3_FNUZ], ids=name)
def test_dot_spreads_nan_over_its_row_only(dtype: torch.dtype) -> None:
    needs_dialect(dtype)
    a = torch.ones(32, 32)
    a[5, 7] = float("nan")
    y = dot(a.to(dtype), torch.ones(32, 32).to(dtype), torch.zeros(32, 32))
    assert y[5].isnan().all()
    assert y[torch.arange(32) != 5].eq(32).all()


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel fails in the compiler, and prints its IR")
def test_arithmetic_on_float8_is_refused() -> None:
    a = torch.ones(64, dtype=E4M3)
    with pytest.raises(Exception, match="arithmetic on fp8e4nv does not compile for any GPU"):
        _binary_kernel[(1,)](a, a, torch.empty(64), 64, OP="add", BLOCK=64)


# ---- the choice of mode ---------------------------------------------------------------------------------------------


def test_configure_answers_the_same_every_time() -> None:
    builder_dot = None
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        builder_dot = InterpreterBuilder.create_dot
    assert configure() == mode() == ("interpreted" if INTERPRETED else "compiled")
    if INTERPRETED:
        assert InterpreterBuilder.create_dot is builder_dot, "a second configure() patched the patches"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (
            "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; import dsv4ref.kernels",
            {"TRITON_INTERPRET": "0"},
            "RuntimeError: triton was imported in compiled mode before dsv4ref.kernels, which needs interpreted mode "
            "here: import dsv4ref.kernels before triton (or set TRITON_INTERPRET=1",
        ),
        (
            "from triton.runtime import interpreter as i; del i.InterpreterBuilder.create_dot; import dsv4ref.kernels",
            {"TRITON_INTERPRET": "1"},
            f"triton {triton.__version__} has no triton.runtime.interpreter.InterpreterBuilder.create_dot",
        ),
        (
            "from dsv4ref.kernels import mode; raise SystemExit(mode())",
            {"TRITON_INTERPRET": "0"},
            "compiled",
        ),
    ],
    ids=["triton imported first", "internal name gone", "compiler asked for"],
)
def test_mode_is_decided_loudly(code: str, environment: dict[str, str], expected: str) -> None:
    result = run_python(code, **environment)
    assert result.returncode == 1
    assert expected in result.stderr


# ---- control: the plain interpreter is wrong in the ways that the shim mends -----------------------------------------

PLAIN = """
import json
import torch, triton
import triton.language as tl

@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o).to(y_ptr.dtype.element_ty))

@triton.jit
def op_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + o)
    b = tl.load(b_ptr + o)
    if OP == "add":
        y = a + b
    elif OP == "compare":
        y = (a < b).to(tl.int32)
    elif OP == "mask":
        y = (a > b).to(y_ptr.dtype.element_ty)
    elif OP == "maximum":
        y = tl.maximum(a, b)
    elif OP == "full":
        y = tl.full([BLOCK], 2.5, tl.bfloat16)
    elif OP == "sum":
        y = tl.full([BLOCK], 0.0, tl.float32) + tl.sum(a, axis=0)
    else:
        y = tl.full([BLOCK], 0.0, tl.float32) + tl.argmax(a, axis=0)
    tl.store(y_ptr + o, y)

@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + o, tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o)))

def cast(x, dtype):
    y = torch.zeros(x.numel()).to(dtype)
    cast_kernel[(1,)](x, y, BLOCK=x.numel())
    return y.float()

def op(a, b, dtype, name):
    y = torch.zeros(a.numel()).to(dtype)
    op_kernel[(1,)](a, b, y, OP=name, BLOCK=a.numel())
    return y.float()

def dot(a, b):
    y = torch.zeros(a.shape)
    dot_kernel[(1,)](a, b, y, N=a.shape[0])
    return y

torch.manual_seed(0)
bf16, fn, fnuz = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz
a, b = torch.randn(2, 256).to(bf16)
square = torch.randn(2, 32, 32)
squares = {dtype: square.to(dtype) for dtype in (bf16, fn)}
poisoned = squares[fn][0].clone().view(torch.uint8).index_fill(0, torch.tensor([3]), 0x7F).view(fn)
x = torch.randn(256) * 10
nan = torch.full_like(a, float("nan"))
every = torch.arange(256).to(torch.uint8)
checks = {
    "dot bf16": lambda: (dot(*squares[bf16]), squares[bf16][0].float() @ squares[bf16][1].float()),
    "dot fp8 NaN": lambda: (dot(poisoned, squares[fn][1])[3], torch.full((32,), float("nan"))),
    "add bf16": lambda: (op(a, b, bf16, "add"), (a + b).float()),
    "compare bf16": lambda: (op(a, b, torch.int32, "compare"), (a < b).float()),
    "sum bf16": lambda: (op(a, b, torch.float32, "sum")[:1], a.float().sum()[None]),
    "argmax bf16": lambda: (op(a, b, torch.float32, "argmax")[:1], a.float().argmax()[None].float()),
    "fp32 to bf16": lambda: (cast(x, bf16), x.bfloat16().float()),
    "int32 to bf16": lambda: (cast(torch.arange(256).int(), bf16), torch.arange(256).float()),
    "fp32 to fp8e4nv": lambda: (cast(x, fn), x.to(fn).float()),
    "fp8e4nv NaN": lambda: (cast(every.view(fn), torch.float32), every.view(fn).float()),
    "fp8e4b8": lambda: (cast(every.view(fnuz), torch.float32), every.view(fnuz).float()),
    "fp32 to fp8e4b8": lambda: (cast(x, fnuz), x.to(fnuz).float()),
    "mask to bf16": lambda: (op(a, b, bf16, "mask"), (a > b).float()),
    "full bf16": lambda: (op(a, b, bf16, "full"), torch.full((256,), 2.5)),
    "maximum NaN": lambda: (op(nan.float(), b.float(), torch.float32, "maximum"), b.float()),
}
report = {}
for label, check in checks.items():
    try:
        got, want = check()
    except Exception as error:
        report[label] = [True, f"raises {error}"[:160]]
        continue
    near = torch.isclose(got, want, rtol=2.0**-10, atol=1e-4, equal_nan=True)
    worst = int((got - want).abs().nan_to_num(nan=float("inf")).masked_fill(near, -1).argmax())
    shown = f"{int((~near).sum())} of {near.numel()} wrong, got {got.flatten()[worst]}, want {want.flatten()[worst]}"
    report[label] = [not bool(near.all()), shown]
print(json.dumps(report))
"""
OLDEST, NEWEST = (3, 6), (3, 9)  # Triton releases looked at; a defect of the newest is expected in later ones too
SEEN = {
    "dot bf16": (OLDEST, NEWEST),
    "dot fp8 NaN": (OLDEST, NEWEST),
    "add bf16": (OLDEST, NEWEST),
    "compare bf16": (OLDEST, NEWEST),
    "sum bf16": (OLDEST, NEWEST),
    "argmax bf16": (NEWEST, NEWEST),
    "fp32 to bf16": (OLDEST, NEWEST),
    "int32 to bf16": (OLDEST, NEWEST),
    "fp32 to fp8e4nv": (OLDEST, NEWEST),
    "fp8e4nv NaN": (OLDEST, NEWEST),
    "fp8e4b8": (OLDEST, NEWEST),
    "fp32 to fp8e4b8": (OLDEST, NEWEST),
    "mask to bf16": (OLDEST, NEWEST),
    "full bf16": (OLDEST, (3, 8)),
    "maximum NaN": (OLDEST, (3, 7)),
}


@pytest.fixture(scope="module")
def plain_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, str]]:
    script = Path(tmp_path_factory.mktemp("plain")) / "plain.py"  # triton.jit reads its source from a file
    script.write_text(PLAIN)
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("defect", SEEN)
def test_plain_interpreter_still_has_the_defect(plain_report: dict[str, tuple[bool, str]], defect: str) -> None:
    first, last = SEEN[defect]
    if not (first <= TRITON <= last or (last == NEWEST <= TRITON)):
        pytest.skip(f"seen in triton {first[0]}.{first[1]} to {last[0]}.{last[1]}, this is {triton.__version__}")
    wrong, shown = plain_report[defect]
    assert wrong, (
        f"triton {triton.__version__}'s own interpreter now gets '{defect}' right ({shown}): check what it does, then "
        "retire that patch from dsv4ref.kernels.interpreter and update its table of defects"
    )
