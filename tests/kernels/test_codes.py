"""In-register decoding of codes and scales, bit for bit against the formats, in every mode."""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit signature takes no Python types)

from __future__ import annotations

from dsv4ref import kernels  # before triton: this import decides how triton.language is decorated
from dsv4ref.kernels.codes import _decode_codes, _decode_scales, architecture, decode_mode

# isort: split
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats import Dialect, fp8, ue8m0

BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
MODES = {
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
    if device == "cuda" and mode.startswith("native"):
        arch = architecture(torch.device("cuda", 0))
        if decode_mode(dialect, arch) != mode:
            pytest.skip(f"{arch} converts the other dialect in hardware")
    out = torch.full((256,), 7.0, dtype=torch.bfloat16, device=device)
    _decode_all_codes[(1,)](BYTES.to(device), out, MODE=mode)
    wrong = mismatches(out.cpu(), fp8.decode(BYTES, dialect, torch.bfloat16))
    assert not wrong, f"(code, got, expected) {[tuple(map(hex, row)) for row in wrong[:3]]}, {len(wrong)} in all"


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
        ("sm_90", "native_fn", "bits_fnuz"),
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
