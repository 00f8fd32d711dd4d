"""In-register decoding of codes and scales, bit for bit against the formats, in every mode."""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit signature takes no Python types)

from __future__ import annotations

from dsv4ref import kernels  # before triton: this import decides how triton.language is decorated
from dsv4ref.kernels.codes import _decode_codes, _decode_scales, _join_keys, architecture, decode_mode

# isort: split
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats import Dialect, fp8, ue8m0

BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
ROPE = torch.arange(256, dtype=torch.int32).mul(257).to(torch.uint16).view(torch.bfloat16)  # NaN, inf, -0 among them
MODES = {
    "packed_fn": Dialect.FN,
    "native_fn": Dialect.FN,
    "native_fnuz": Dialect.FNUZ,
    "bits_fn": Dialect.FN,
    "bits_fnuz": Dialect.FNUZ,
}


@triton.jit
def _decode_all_codes(codes, out, MODE: tl.constexpr):
    lanes = tl.arange(0, 256)
    tl.store(out + lanes, _decode_codes(tl.load(codes + lanes), MODE))


@triton.jit
def _decode_all_scales(scale_bytes, out):
    lanes = tl.arange(0, 256)
    tl.store(out + lanes, _decode_scales(tl.load(scale_bytes + lanes)))


@triton.jit
def _join_all(codes, scale_bytes, rope, out, MODE: tl.constexpr):
    """One program per scale byte: 256 codes under it, then the 256 rope values."""
    columns = tl.arange(0, 512)[None, :]
    rows = tl.program_id(0) + tl.arange(0, 1)[:, None]
    is_code = columns < 256
    factors = tl.broadcast_to(_decode_scales(tl.load(scale_bytes + rows)), (1, 512))
    keys = _join_keys(
        tl.load(codes + columns, mask=is_code, other=0),
        factors,
        tl.load(rope + columns - 256, mask=columns >= 256, other=0.0),
        is_code,
        MODE,
    )
    tl.store(out + rows * 512 + columns, keys)


def skip_unless_it_runs(mode: str, device: str) -> None:
    """Skip a mode that this device has no instructions for. The interpreter runs all but PTX."""
    if device == "cpu" and mode == "packed_fn":
        pytest.skip("packed_fn is PTX, which the interpreter does not run")
    if device == "cuda" and not mode.startswith("bits"):
        arch = architecture(torch.device("cuda", 0))
        own = mode == "native_fn" and arch == "sm_90"  # the hardware has it, though no kernel asks for it
        if decode_mode(MODES[mode], arch) != mode and not own:
            pytest.skip(f"{arch} has no instructions for {mode}")


def mismatches(got: Tensor, want: Tensor) -> list[tuple[int, int, int]]:
    """(byte, got bits, wanted bits) where bf16 results differ; every NaN counts as the same."""
    rows = []
    pairs = zip(got.view(torch.int16).tolist(), want.view(torch.int16).tolist(), strict=True)
    for byte, (ours, theirs) in enumerate(pairs):
        both_nan = bool(got[byte].isnan() and want[byte].isnan())
        if ours != theirs and not both_nan:
            rows.append((byte, ours & 0xFFFF, theirs & 0xFFFF))
    return rows


@pytest.mark.parametrize("mode", MODES)
def test_every_code_decodes_to_the_formats_value(mode: str, device: str) -> None:
    dialect = MODES[mode]
    if mode != "packed_fn":  # whose single codes Triton's own conversions decode, and the interpreter runs those
        skip_unless_it_runs(mode, device)
    out = torch.full((256,), 7.0, dtype=torch.bfloat16, device=device)
    _decode_all_codes[(1,)](BYTES.to(device), out, MODE=mode)
    wrong = mismatches(out.cpu(), fp8.decode(BYTES, dialect, torch.bfloat16))
    assert not wrong, f"(code, got, expected) {[tuple(map(hex, row)) for row in wrong[:3]]}, {len(wrong)} in all"


def expected_keys(dialect: Dialect) -> Tensor:
    """bf16 ``[256, 512]``: every code under every scale byte, in float64 and rounded once; then the rope values."""
    products = fp8.decode(BYTES, dialect, torch.float64) * ue8m0.decode(BYTES).double()[:, None]
    return torch.cat((products.float().to(torch.bfloat16), ROPE.expand(256, -1)), dim=1)  # exact in fp32 where finite


@pytest.mark.parametrize("mode", MODES)
def test_every_code_under_every_scale_byte_and_the_rope_beside_them(mode: str, device: str) -> None:
    skip_unless_it_runs(mode, device)
    out = torch.full((256, 512), 7.0, dtype=torch.bfloat16, device=device)
    _join_all[(256,)](BYTES.to(device), BYTES.to(device), ROPE.to(device), out, MODE=mode)
    got, want = out.cpu(), expected_keys(MODES[mode])
    differ = (got.view(torch.int16) != want.view(torch.int16)) & ~(got.isnan() & want.isnan())
    first = [(*at, got[tuple(at)].item(), want[tuple(at)].item()) for at in differ.nonzero()[:3].tolist()]
    assert not differ.any(), f"(scale byte, column, got, expected) {first}, {int(differ.sum())} in all"


def test_the_steps_of_the_packed_mode_are_exact_but_for_one_rounding() -> None:
    """Code -> fp16 -> fp32 -> bf16 loses nothing, and the bf16 product rounds as the float64 product does."""
    exact = fp8.decode(BYTES, Dialect.FN, torch.float64)
    steps = exact.to(torch.float16).to(torch.float32).to(torch.bfloat16)
    assert torch.equal(steps.double().nan_to_num(7.0), exact.nan_to_num(7.0))
    products = steps[None, :] * ue8m0.decode(BYTES).to(torch.bfloat16)[:, None]
    want = expected_keys(Dialect.FN)[:, :256]
    differ = (products != want) & ~(products.isnan() & want.isnan())
    assert not differ.any(), f"(scale byte, code) {differ.nonzero()[:3].tolist()}, {int(differ.sum())} in all"


def test_every_scale_byte_decodes_to_its_power_of_two(device: str) -> None:
    out = torch.full((256,), 7.0, dtype=torch.bfloat16, device=device)
    _decode_all_scales[(1,)](BYTES.to(device), out)
    wrong = mismatches(out.cpu(), ue8m0.decode(BYTES).to(torch.bfloat16))
    assert not wrong, f"(byte, got, expected) {[tuple(map(hex, row)) for row in wrong[:3]]}, {len(wrong)} in all"
    assert out[0].item() == 2.0**-127
    assert out[255].isnan().item()


@pytest.mark.parametrize(
    ("arch", "fn", "fnuz"),
    [
        ("gfx942", "bits_fn", "native_fnuz"),
        ("gfx950", "native_fn", "bits_fnuz"),
        ("sm_90", "packed_fn", "bits_fnuz"),
        ("sm_80", "bits_fn", "bits_fnuz"),
        ("cpu", "bits_fn", "bits_fnuz"),
    ],
)
def test_hardware_converts_its_own_dialect_and_bits_are_moved_for_the_other(arch: str, fn: str, fnuz: str) -> None:
    assert decode_mode(Dialect.FN, arch) == fn
    assert decode_mode(Dialect.FNUZ, arch) == fnuz


@pytest.mark.skipif(kernels.mode() == "compiled", reason="says what the interpreter calls itself")
def test_the_interpreters_architecture_is_cpu() -> None:
    assert architecture(torch.device("cpu")) == "cpu"


def test_cpu_tensors_are_refused_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture.cache_clear()
    monkeypatch.setattr(kernels, "mode", lambda: "compiled")
    try:
        with pytest.raises(
            ValueError, match=r"device: got CPU tensors while kernels are compiled; expected GPU tensors"
        ):
            architecture(torch.device("cpu"))
    finally:
        architecture.cache_clear()
