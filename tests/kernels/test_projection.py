"""The bf16 copy of an FP8 weight: exact, at one address, and as fresh as its check promises."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dsv4ref.formats import Dialect, fp8
from dsv4ref.kernels.projection import DequantisedWeight, dequantise_weight, grouped_projection
from dsv4ref.ref.projection import dequantise_weight_ref, grouped_projection_ref

SHAPE = (256, 384)
CHECKS: tuple[Literal["host", "device"], ...] = ("host", "device")
FN = Dialect.FN


def random_weight(
    rng: torch.Generator, device: str, shape: tuple[int, int] = SHAPE, dialect: Dialect = FN
) -> tuple[Tensor, Tensor]:
    codes = fp8.encode(torch.randn(shape, generator=rng) * 64, dialect)
    scale = torch.randint(110, 140, (shape[0] // 128, shape[1] // 128), generator=rng).to(torch.uint8)
    return codes.to(device).view(dialect.dtype), scale.to(device)


def difference(got: Tensor, want: Tensor) -> str:
    """Where two bf16 tensors differ in bytes, any NaN being one NaN; empty if nowhere."""
    ours, theirs = got.cpu().view(torch.int16), want.cpu().view(torch.int16)
    differs = (ours != theirs) & ~(got.isnan() & want.isnan()).cpu()
    if not differs.any():
        return ""
    where = tuple(differs.nonzero()[0].tolist())
    return f"{int(differs.sum())} elements, first {where}: {got[where].item()}, expected {want[where].item()}"


def is_current(copy: DequantisedWeight, weight: Tensor, scale: Tensor) -> bool:
    return not difference(copy.current(weight, scale), dequantise_weight_ref(weight, scale))


# --- the dequantisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", Dialect)
def test_dequantising_gives_the_references_bytes(dialect: Dialect, rng: torch.Generator, device: str) -> None:
    weight, scale = random_weight(rng, device, dialect=dialect)
    out = dequantise_weight(weight, scale)
    assert out.dtype is torch.bfloat16
    assert out.is_contiguous()
    assert difference(out, dequantise_weight_ref(weight, scale)) == ""


@pytest.mark.parametrize("dialect", Dialect)
def test_every_code_under_scales_from_end_to_end(dialect: Dialect, device: str) -> None:
    """Blocks of 128 x 128 with all 256 codes each: subnormal scales and results, NaN codes and byte 255."""
    codes = torch.arange(256).to(torch.uint8).repeat(64).reshape(128, 128).repeat(4, 8).contiguous()
    scale = torch.tensor([0, 1, 2, *range(15, 244, 9), 253, 254, 255]).to(torch.uint8).reshape(4, 8)
    weight, scale = codes.to(device).view(dialect.dtype), scale.to(device)
    assert difference(dequantise_weight(weight, scale), dequantise_weight_ref(weight, scale)) == ""


def test_writing_into_a_callers_buffer_touches_nothing_else(rng: torch.Generator, device: str) -> None:
    weight, scale = random_weight(rng, device)
    memory = torch.full((SHAPE[0] + 2, SHAPE[1]), 7.0, dtype=torch.bfloat16, device=device)
    out = memory[1:-1]
    assert dequantise_weight(weight, scale, out=out) is out
    assert difference(out, dequantise_weight_ref(weight, scale)) == ""
    assert (memory[[0, -1]] == 7.0).all()


def test_a_weight_of_no_rows_is_fine(device: str) -> None:
    weight = torch.empty((0, 128), dtype=FN.dtype, device=device)
    scale = torch.empty((0, 1), dtype=torch.uint8, device=device)
    assert dequantise_weight(weight, scale).shape == (0, 128)
    for check in CHECKS:
        assert DequantisedWeight(weight, scale, check=check).current(weight, scale).shape == (0, 128)


def test_grouped_projection_is_the_reference(rng: torch.Generator, device: str) -> None:
    o = torch.randn((3, 2, 384), generator=rng).to(torch.bfloat16).to(device)
    weight = (torch.randn(SHAPE, generator=rng) * 0.05).to(torch.bfloat16).to(device)
    got = grouped_projection(o, weight)
    want = grouped_projection_ref(o.to(torch.float64), weight.to(torch.float64))
    assert got.shape == (3, 2, 128)
    assert got.dtype is torch.bfloat16
    error = (got.to(torch.float64) - want).abs() / (want.abs() + 0.1)
    assert error.max() < 2 / 128, f"worst {error.max().item()} at {int(error.argmax())}"


# --- when the copy is stale ------------------------------------------------------------------------------------------


class Life:
    """A weight, its scales and a copy, and the things that happen to them."""

    def __init__(self, rng: torch.Generator, device: str, check: Literal["host", "device"]) -> None:
        self.weight, self.scale = random_weight(rng, device)
        self.other, self.other_scale = random_weight(rng, device)
        self.copy = DequantisedWeight(self.weight, self.scale, check=check)

    def write_in_place(self) -> None:
        self.weight.view(torch.uint8).copy_(self.other.view(torch.uint8))

    def write_one_element(self) -> None:
        byte = self.weight.view(torch.uint8)[17, 300:301]
        byte.bitwise_xor_(1)

    def write_through_data(self) -> None:
        self.weight.data.view(torch.uint8).copy_(self.other.view(torch.uint8))

    def write_by_another_library(self) -> None:
        """DLPack hands the memory out; PyTorch learns nothing of what happens to it."""
        torch.from_dlpack(self.weight.detach().view(torch.uint8).__dlpack__()).copy_(self.other.view(torch.uint8))

    def replace(self) -> None:
        self.weight = self.other

    def replace_scale(self) -> None:
        self.scale = self.other_scale

    def write_scale_in_place(self) -> None:
        self.scale.copy_(self.other_scale)

    def write_scale_through_data(self) -> None:
        self.scale.data.copy_(self.other_scale)

    def reuse_address(self) -> None:
        """Another tensor at the same address, whose version counter reads the same."""
        before = (self.weight.data_ptr(), self.weight._version)
        self.weight = self.weight.data
        self.weight.data.view(torch.uint8).copy_(self.other.view(torch.uint8))
        assert (self.weight.data_ptr(), self.weight._version) == before


SEEN_BY_BOTH = (
    "write_in_place", "write_one_element", "replace", "replace_scale", "write_scale_in_place", "reuse_address",
)  # fmt: skip
UNSEEN_BY_HOST = ("write_through_data", "write_scale_through_data", "write_by_another_library")


@pytest.mark.parametrize("event", [*SEEN_BY_BOTH, *UNSEEN_BY_HOST])
def test_the_device_check_sees_every_change(event: str, rng: torch.Generator, device: str) -> None:
    life = Life(rng, device, "device")
    before = life.copy.current(life.weight, life.scale).clone()
    getattr(life, event)()
    assert difference(dequantise_weight_ref(life.weight, life.scale), before), "the event must change something"
    assert is_current(life.copy, life.weight, life.scale)


@pytest.mark.parametrize("event", SEEN_BY_BOTH)
def test_the_host_check_sees_what_the_host_can_see(event: str, rng: torch.Generator, device: str) -> None:
    life = Life(rng, device, "host")
    getattr(life, event)()
    assert is_current(life.copy, life.weight, life.scale)


@pytest.mark.parametrize("event", UNSEEN_BY_HOST)
def test_the_host_check_is_blind_to_writes_without_a_version_until_refreshed(
    event: str, rng: torch.Generator, device: str
) -> None:
    """The documented limit; if this test fails, the host check has become better than its docstring."""
    life = Life(rng, device, "host")
    getattr(life, event)()
    assert not is_current(life.copy, life.weight, life.scale)
    life.copy.refresh(life.weight, life.scale)
    assert is_current(life.copy, life.weight, life.scale)


@pytest.mark.parametrize("check", CHECKS)
def test_an_unchanged_weight_is_not_dequantised_again(
    check: Literal["host", "device"], rng: torch.Generator, device: str
) -> None:
    """A mark left in the copy stays until the weight changes; refresh wipes it whatever the check thinks."""
    life = Life(rng, device, check)
    life.copy.buffer[3, 5] = 8192.0
    for _ in range(2):
        assert life.copy.current(life.weight, life.scale)[3, 5].item() == 8192.0
    life.copy.refresh(life.weight, life.scale)
    assert difference(life.copy.buffer, dequantise_weight_ref(life.weight, life.scale)) == ""


def test_a_weight_that_goes_back_to_old_bytes_is_followed(rng: torch.Generator, device: str) -> None:
    life = Life(rng, device, "device")
    first = life.weight.view(torch.uint8).clone()
    life.write_through_data()
    assert is_current(life.copy, life.weight, life.scale)
    life.weight.data.view(torch.uint8).copy_(first)
    assert is_current(life.copy, life.weight, life.scale)


def test_the_host_check_knows_a_freed_weight_from_its_successor(rng: torch.Generator, device: str) -> None:
    """The key holds no reference: the old weight can go, and a new one is new even at its address and version."""
    weight, scale = random_weight(rng, device)
    copy = DequantisedWeight(weight, scale, check="host")
    address = weight.data_ptr()
    del weight
    gc.collect()
    for _ in range(50):
        weight, _ = random_weight(rng, device)
        if weight.data_ptr() == address:
            break
    assert is_current(copy, weight, scale)


@pytest.mark.parametrize("check", CHECKS)
def test_the_buffers_address_never_changes(check: Literal["host", "device"], rng: torch.Generator, device: str) -> None:
    """What makes it safe to capture a graph over it."""
    life = Life(rng, device, check)
    address, buffer = life.copy.buffer.data_ptr(), life.copy.buffer
    for event in (*SEEN_BY_BOTH, *UNSEEN_BY_HOST):
        getattr(life, event)()
        assert life.copy.current(life.weight, life.scale) is buffer
        life.copy.refresh(life.weight, life.scale)
        assert life.copy.buffer is buffer
        assert buffer.data_ptr() == address, event


def test_memory_is_counted(rng: torch.Generator, device: str) -> None:
    """The copy is two bytes an element; a fingerprint is one int64 per block of 128 x 128."""
    weight, scale = random_weight(rng, device)
    assert DequantisedWeight(weight, scale, check="host").nbytes == 2 * weight.numel()
    assert DequantisedWeight(weight, scale, check="device").nbytes == 2 * weight.numel() + 6 * 8


def test_every_single_bit_flip_changes_the_fingerprint(rng: torch.Generator, device: str) -> None:
    """At random places of weight and scales, the last byte of each included."""
    weight, scale = random_weight(rng, device)
    copy = DequantisedWeight(weight, scale, check="device")
    for target, count in ((weight.view(torch.uint8), 20), (scale, 6)):
        flat = target.data.view(-1)
        places = [flat.numel() - 1, *torch.randint(0, flat.numel(), (count,), generator=rng).tolist()]
        for place in places:
            bit = int(torch.randint(0, 8, (1,), generator=rng))
            before = copy._seen.clone()
            flat[place] = flat[place] ^ (1 << bit)
            copy.current(weight, scale)
            assert not torch.equal(copy._seen, before), f"byte {place}, bit {bit}"
            assert difference(copy.buffer, dequantise_weight_ref(weight, scale)) == "", f"byte {place}, bit {bit}"


@pytest.mark.parametrize(("one", "other"), [(0, 1), (5, 96 * 3 + 5), (31, 32), (3, 20_000)])
def test_swapped_words_change_the_fingerprint(one: int, other: int, rng: torch.Generator, device: str) -> None:
    """A plain sum would not notice: neighbours, two rows of one block, and words of two blocks (96 words a row)."""
    weight, scale = random_weight(rng, device)
    copy = DequantisedWeight(weight, scale, check="device")
    words = weight.data.view(torch.int32).view(-1)
    words[[one, other]] = words[[other, one]].clone()
    assert is_current(copy, weight, scale)


def test_swapped_scales_change_the_fingerprint(device: str, rng: torch.Generator) -> None:
    weight, scale = random_weight(rng, device)
    scale.copy_(torch.arange(120, 126, dtype=torch.uint8).view(2, 3))
    copy = DequantisedWeight(weight, scale, check="device")
    scale.data.copy_(scale.flip(0).clone())
    assert is_current(copy, weight, scale)


# --- refusals --------------------------------------------------------------------------------------------------------

WEIGHT = torch.zeros(128, 256).to(FN.dtype)
SCALE = torch.full((1, 2), 127, dtype=torch.uint8)
BF16 = torch.zeros((128, 256), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "scale", "error", "message"),
    [
        (None, SCALE, TypeError, "weight: got NoneType, expected a torch.Tensor"),
        (BF16, SCALE, TypeError, "weight: got torch.bfloat16, expected float8_e4m3fn or float8_e4m3fnuz (a bf16"),
        (WEIGHT.view(torch.uint8), SCALE, TypeError, "weight: got torch.uint8, expected float8_e4m3fn"),
        (WEIGHT[:100], SCALE, ValueError, "weight: got shape [100, 256]"),
        (WEIGHT[:, :200], SCALE, ValueError, "weight: got shape [128, 200]"),
        (WEIGHT[None], SCALE, ValueError, "weight: got shape [1, 128, 256]"),
        (torch.zeros(256, 128).to(FN.dtype).T, SCALE, ValueError, "strides (1, 128), expected contiguous [N, K]"),
        (WEIGHT, [127], TypeError, "scale: got list, expected a torch.Tensor"),
        (WEIGHT, SCALE.to(torch.float32), TypeError, "scale: got torch.float32, expected torch.uint8"),
        (WEIGHT, SCALE.T, ValueError, "scale: got shape [2, 1], expected [1, 2]"),
        (WEIGHT, torch.zeros(1, 4, dtype=torch.uint8)[:, ::2], ValueError, "scale: got strides (4, 2), expected a"),
        (WEIGHT, SCALE.to("meta"), ValueError, "scale: on meta, expected cpu"),
    ],
)  # fmt: skip
def test_weights_that_are_none(weight: Any, scale: Any, error: type[Exception], message: str, device: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: dequantise_weight(weight, scale),
        lambda: DequantisedWeight(weight, scale, check="device"),
        lambda: DequantisedWeight(WEIGHT.to(device), SCALE.to(device), check="host").current(weight, scale),
    )
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (BF16.to(torch.float32), TypeError, "out: got torch.float32, expected torch.bfloat16"),
        (BF16[:, :128], ValueError, "out: got shape [128, 128], expected [128, 256]"),
        (torch.zeros((256, 128), dtype=torch.bfloat16).T, ValueError, "out: got strides (1, 128), expected a contig"),
        (BF16.to("meta"), ValueError, "out: on meta, expected cpu"),
    ],
)
def test_buffers_that_cannot_hold_the_result(out: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dequantise_weight(WEIGHT, SCALE, out=out)


@pytest.mark.parametrize("name", ["weight", "scale"])
def test_an_output_over_its_input_is_refused(name: str) -> None:
    memory = torch.zeros(4 * WEIGHT.numel(), dtype=torch.uint8)
    inputs = {"weight": WEIGHT, "scale": SCALE}
    begin = 2 * WEIGHT.numel() - 16
    inputs[name] = memory[begin : begin + inputs[name].numel()].view(inputs[name].dtype).view(inputs[name].shape)
    out = memory[: 2 * WEIGHT.numel()].view(torch.bfloat16).view(128, 256)
    with pytest.raises(ValueError, match=f"out: its memory range overlaps {name}'s"):
        dequantise_weight(inputs["weight"], inputs["scale"], out=out)


def test_a_copy_belongs_to_one_shape(rng: torch.Generator, device: str) -> None:
    copy = DequantisedWeight(*random_weight(rng, device), check="device")
    other = random_weight(rng, device, (128, 128))
    for call in (copy.current, copy.refresh):
        with pytest.raises(
            ValueError, match=r"weight: got \[128, 128\] on .*, expected \[256, 384\] on .* like the copy"
        ):
            call(*other)


@pytest.mark.parametrize("check", ["data_ptr", "", None])
def test_unknown_checks_are_refused(check: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"check: got {check!r}, expected 'host' or 'device'")):
        DequantisedWeight(WEIGHT, SCALE, check=check)


@pytest.mark.parametrize("name", ["weight", "scale"])
def test_the_host_check_refuses_inference_tensors_which_have_no_version(
    name: str, rng: torch.Generator, device: str
) -> None:
    pair = dict(zip(("weight", "scale"), random_weight(rng, device), strict=True))
    with torch.inference_mode():
        pair[name] = pair[name].clone()
    with pytest.raises(ValueError, match=f"{name}: is an inference tensor, .* expected a normal tensor, or check='dev"):
        DequantisedWeight(**pair, check="host")
    assert is_current(DequantisedWeight(**pair, check="device"), pair["weight"], pair["scale"])


@pytest.mark.parametrize(
    ("o", "weight", "error", "message"),
    [
        (torch.zeros(1, 2, 256), BF16, TypeError, "o: got torch.float32, expected torch.bfloat16"),
        (BF16, BF16, ValueError, "o: got shape [128, 256], expected [T, G, D]"),
        (BF16[:6].view(3, 2, 256), WEIGHT, TypeError, "weight: got torch.float8_e4m3fn, expected torch.bfloat16"),
        (BF16[:6].view(3, 2, 256), BF16[:, :128], ValueError, "weight: got shape [128, 128], expected [G*R, 256]"),
        (BF16[:6].view(2, 3, 256), BF16, ValueError, "weight: got 128 rows, expected a multiple of the 3 groups of o"),
        (BF16[:0].view(3, 0, 256), BF16, ValueError, "weight: got 128 rows, expected a multiple of the 0 groups of o"),
        (BF16[:6].view(3, 2, 256), BF16.to("meta"), ValueError, "weight: on meta, expected cpu"),
    ],
)
def test_projections_that_do_not_fit(o: Tensor, weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        grouped_projection(o, weight)


# --- under graph capture ---------------------------------------------------------------------------------------------


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.gpu
def test_a_replayed_device_check_follows_any_write(rng: torch.Generator) -> None:
    life = Life(rng, "cuda", "device")
    graph = captured(lambda: life.copy.current(life.weight, life.scale))
    for event in ("write_through_data", "write_scale_through_data", "write_in_place"):
        getattr(life, event)()
        graph.replay()
        torch.cuda.synchronize()
        assert difference(life.copy.buffer, dequantise_weight_ref(life.weight, life.scale)) == "", event


@pytest.mark.gpu
def test_the_host_check_refuses_to_bake_a_refresh_into_a_graph(rng: torch.Generator) -> None:
    life = Life(rng, "cuda", "host")
    life.write_in_place()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"weight: changed since the last refresh, expected refresh\(\) before graph"),
        torch.cuda.graph(graph),
    ):
        life.copy.current(life.weight, life.scale)
    life.copy.refresh(life.weight, life.scale)
    o = torch.ones((1, 2, SHAPE[1]), dtype=torch.bfloat16, device="cuda")
    captured(lambda: grouped_projection(o, life.copy.current(life.weight, life.scale))).replay()
    assert is_current(life.copy, life.weight, life.scale)
