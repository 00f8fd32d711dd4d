"""Chapter 08: keep the output projection's weight in bf16 instead of dequantising it every step.

Baseline: FP8 weight and UE8M0 scales are expanded to bf16 by eager PyTorch in every call, then multiplied. Optimised:
the bf16 copy is kept (`dsv4ref.kernels.projection.DequantisedWeight`) and refreshed when the weight's bytes change.
Bit-identical: the dequantisation is exact and the product is the same call.

The catch is "when the bytes change". The gate runs a whole life of a weight: first use, in-place update, a write
through ``.data``, replacement by another tensor, an address that is handed out again, new scales; after each, the
projection must equal the one computed from scratch.

Source: doubleword's vLLM fork, commit 501595f95; vllm#45103 (the same inside a larger fusion).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref import config, device
from dsv4ref.config import ModelConfig
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound
from dsv4ref.formats import Dialect, fp8, ue8m0
from dsv4ref.kernels.codes import decode_mode
from dsv4ref.kernels.projection import TILE_ROWS, DequantisedWeight, dequantise_weight, grouped_projection
from dsv4ref.optimizations import decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.ref.projection import WEIGHT_BLOCK, dequantise_weight_ref, grouped_projection_ref

__all__ = ["EVENTS", "OPTIMIZATION", "KeyTrial", "ProjectionInputs", "broken_keys", "copy_bytes"]

EVENTS = ("first use", "in-place update", "write through .data", "tensor replaced", "address reused", "scales reloaded")
"""The life of a weight, in order; the projection is computed after each."""

WeightSource = Callable[[Tensor, Tensor], Tensor]
"""(weight, scale) as the caller holds them now -> the bf16 weight to multiply with."""


@dataclass(frozen=True)
class ProjectionInputs:
    """o bf16 ``[T, G, D]`` and the bytes of three successive weights ``[G * R, D]`` with two sets of scales."""

    o: Tensor
    codes: tuple[Tensor, Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    dtype: torch.dtype


def _build(case: Case, device: str, seed: int) -> ProjectionInputs:
    p = case.params
    rows, columns = p["groups"] * p["rank"], p["width"]
    generator = torch.Generator(device=device).manual_seed(seed)
    o = (torch.randn((p["rows"], p["groups"], columns), generator=generator, device=device) * 0.1).to(torch.bfloat16)
    dialect = Dialect.of(p["dialect"])

    def codes() -> Tensor:
        values = torch.randn((rows, columns), generator=generator, device=device) * 64.0
        return fp8.encode(values, dialect)

    def scales() -> Tensor:
        # Powers of two around 2^-9: a weight of standard deviation 64 * 2^-9 and products of order one.
        shape = (rows // WEIGHT_BLOCK, columns // WEIGHT_BLOCK)
        return torch.randint(115, 121, shape, generator=generator, device=device, dtype=torch.uint8)

    return ProjectionInputs(o, (codes(), codes(), codes()), (scales(), scales()), dialect.dtype)


def _life(inputs: ProjectionInputs, new_source: Callable[[Tensor, Tensor], WeightSource]) -> dict[str, Tensor]:
    """Run the events and collect the projection after each.

    ``new_source`` makes the thing under test from the first weight, as a layer's constructor would.
    """
    first, second, third = inputs.codes
    weight = first.clone().view(inputs.dtype)
    scale = inputs.scales[0].clone()
    source = new_source(weight, scale)
    outputs = {}

    def project(event: str) -> None:
        outputs[event] = grouped_projection(inputs.o, source(weight, scale))

    project("first use")
    weight.view(torch.uint8).copy_(second)  # an in-place update: autograd's version counter moves
    project("in-place update")
    weight.data.view(torch.uint8).copy_(third)  # what weight loaders do: no counter moves
    project("write through .data")
    weight = first.clone().view(inputs.dtype)  # module.weight = another tensor
    project("tensor replaced")
    # The old weight is freed and the allocator hands its address to the new one. Two tensors over one storage are that
    # moment made repeatable; .data has a fresh version counter, as a new tensor has.
    source(weight, scale)
    weight = weight.data
    weight.data.view(torch.uint8).copy_(second)
    project("address reused")
    scale.data.copy_(inputs.scales[1])
    project("scales reloaded")
    return outputs


def _dequantise_every_step(weight: Tensor, scale: Tensor) -> WeightSource:
    return dequantise_weight_ref


def _device_checked(weight: Tensor, scale: Tensor) -> WeightSource:
    return DequantisedWeight(weight, scale, check="device").current


def _baseline(inputs: ProjectionInputs) -> dict[str, Tensor]:
    return _life(inputs, _dequantise_every_step)


def _optimized(inputs: ProjectionInputs) -> dict[str, Tensor]:
    return _life(inputs, _device_checked)


def _reference(inputs: ProjectionInputs) -> dict[str, Tensor]:
    """Each event's projection in float64 from the bytes that are current after it."""
    current = {
        "first use": (0, 0),
        "in-place update": (1, 0),
        "write through .data": (2, 0),
        "tensor replaced": (0, 0),
        "address reused": (1, 0),
        "scales reloaded": (1, 1),
    }
    o = inputs.o.to(torch.float64)
    return {
        event: grouped_projection_ref(
            o, dequantise_weight_ref(inputs.codes[c].view(inputs.dtype), inputs.scales[s], torch.float64)
        )
        for event, (c, s) in current.items()
    }


# --- keys that were used or proposed, and what they miss ---


@dataclass(frozen=True)
class KeyTrial:
    """A cache key and the events after which it served a stale weight."""

    key: str
    stale_after: tuple[str, ...]


class _KeyedCache:
    """Dequantise again only when ``key(weight, scale)`` changes."""

    def __init__(self, key: Callable[[Tensor, Tensor], object]) -> None:
        self._key = key
        self._seen: object = None
        self._copy: Tensor | None = None

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        key = self._key(weight, scale)
        if self._copy is None or key != self._seen:
            self._seen, self._copy = key, dequantise_weight(weight, scale)
        return self._copy


def _address_key(weight: Tensor, scale: Tensor) -> object:
    return (tuple(weight.shape), weight.data_ptr(), scale.data_ptr())


def _address_and_version_key(weight: Tensor, scale: Tensor) -> object:
    return (*_address_key(weight, scale), weight._version, scale._version)  # type: ignore[misc]


def _no_key(weight: Tensor, scale: Tensor) -> object:
    return "set once on the module"


def _host_checked(weight: Tensor, scale: Tensor) -> WeightSource:
    return DequantisedWeight(weight, scale, check="host").current


def _dequantised_twice(weight: Tensor, scale: Tensor) -> WeightSource:
    """The weight became bf16 but its scale attribute stayed, and a second pass applies it again."""

    def source(weight: Tensor, scale: Tensor) -> Tensor:
        once = dequantise_weight(weight, scale)
        factors = ue8m0.decode(scale).repeat_interleave(WEIGHT_BLOCK, 0).repeat_interleave(WEIGHT_BLOCK, 1)
        return (once.to(torch.float32) * factors).to(torch.bfloat16)

    return source


_BROKEN: Mapping[str, Callable[[Tensor, Tensor], WeightSource]] = {
    "shape and data_ptr": lambda weight, scale: _KeyedCache(_address_key),
    "no key, set once": lambda weight, scale: _KeyedCache(_no_key),
    "data_ptr and _version": lambda weight, scale: _KeyedCache(_address_and_version_key),
    "identity, _version and data_ptr": _host_checked,
}


def broken_keys(inputs: ProjectionInputs) -> tuple[KeyTrial, ...]:
    """Run the life of a weight under each key and report where it is stale; last comes the shipped device check."""
    truth = _baseline(inputs)
    trials = []
    for name, new_source in (*_BROKEN.items(), ("fingerprint of the bytes, on the device", _device_checked)):
        seen = _life(inputs, new_source)
        trials.append(KeyTrial(name, tuple(event for event in EVENTS if not torch.equal(seen[event], truth[event]))))
    return tuple(trials)


def copy_bytes(model: str) -> int:
    """Bytes the bf16 copies of ``wo_a`` take over all layers of a model, one rank holding all groups."""
    m = config.get_model(model)
    return 2 * m.n_layers * m.o_groups * m.o_lora_rank * m.wo_a_input_width


def _timed(inputs: ProjectionInputs) -> Mapping[str, Callable[[], object]]:
    weight, scale = inputs.codes[0].view(inputs.dtype), inputs.scales[0]
    on_host = DequantisedWeight(weight, scale, check="host")
    on_device = DequantisedWeight(weight, scale, check="device")
    return {
        "baseline": lambda: grouped_projection(inputs.o, dequantise_weight_ref(weight, scale)),
        "optimized": lambda: grouped_projection(inputs.o, on_device.current(weight, scale)),
        "host check": lambda: grouped_projection(inputs.o, on_host.current(weight, scale)),
        "one-pass dequantise": lambda: grouped_projection(inputs.o, dequantise_weight(weight, scale)),
    }


_EAGER_STEPS: Mapping[str, int] = {
    "weight to fp32": 1 + 4,
    "scale bytes to int32": 0,
    "shift into the exponent": 0,
    "is it byte 0": 0,
    "2^-127": 0,
    "select": 0,
    "is it byte 255": 0,
    "NaN": 0,
    "select again": 0,
    "expand scales over rows": 0,
    "expand scales over columns": 4,
    "multiply": 4 + 4 + 4,
    "to bf16": 4 + 2,
}
"""The eager dequantisation, launch by launch: bytes moved per weight element (the unexpanded scales count as none)."""

_DEVICE_CHECK_STEPS = ("fingerprint, and dequantise the blocks that changed",)


def _predict(case: Case, device_key: str) -> Prediction:
    p = case.params
    elements = p["groups"] * p["rank"] * p["width"]
    activations = 2 * p["rows"] * p["groups"] * (p["width"] + p["rank"])
    flops = 2 * p["rows"] * elements
    product_bytes = 2 * elements + activations
    eager_bytes = sum(_EAGER_STEPS.values()) * elements
    fingerprint_bytes = elements  # every FP8 byte is read once to see that none changed
    spec = decode_model.spec_for(device_key)
    baseline_us = optimized_us = product_us = None
    if spec is not None and spec.bandwidth_tb_s is not None and spec.bf16_tflops is not None:
        rates = (spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12)
        product_us = Bound(product_bytes, flops, *rates).time_us
        baseline_us = Bound(eager_bytes, 0, *rates).time_us + product_us
        optimized_us = Bound(fingerprint_bytes, 0, *rates).time_us + product_us
    return Prediction(
        baseline_bytes=eager_bytes + product_bytes,
        optimized_bytes=fingerprint_bytes + product_bytes,
        least_bytes=product_bytes,
        flops=flops,
        baseline_launches=len(_EAGER_STEPS) + 1,
        optimized_launches=len(_DEVICE_CHECK_STEPS) + 1,
        baseline_us=baseline_us,
        optimized_us=optimized_us,
        bound_us=product_us,
        reason=f"{sum(_EAGER_STEPS.values())} bytes of eager traffic per weight element against 1 to fingerprint it; "
        "the product is the same call",
    )


def _planted(name: str) -> Callable[[ProjectionInputs], dict[str, Tensor]]:
    return lambda inputs: _life(inputs, _BROKEN[name])


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    native = Dialect.of(device.native_dialect(arch), argument=f"native dialect of {arch}")
    pointers = {"weight": "*u8", "scale": "*u8", "out": "*bf16"}
    return (
        CompileRequest(
            kernel="dequantise_weight",
            module="dsv4ref.kernels.projection",
            function="_dequantise_weight_kernel",
            shape=f"{TILE_ROWS}x{WEIGHT_BLOCK} w4 s1",
            signature={**pointers, "columns": "i32"},
            constexprs={"MODE": decode_mode(native, arch), "TILE": TILE_ROWS},
            num_warps=4,
            divisible_by_16=frozenset({*pointers, "columns"}),
        ),
        CompileRequest(
            kernel="follow_weight",
            module="dsv4ref.kernels.projection",
            function="_follow_weight_kernel",
            shape=f"{WEIGHT_BLOCK}x{WEIGHT_BLOCK} w4 s1",
            signature={"weight_words": "*i32", **pointers, "seen": "*i64", "columns": "i32"},
            constexprs={"MODE": decode_mode(native, arch), "FORCE": False},
            num_warps=4,
            divisible_by_16=frozenset({"weight_words", *pointers, "seen", "columns"}),
        ),
    )


def _case(name: str, model: ModelConfig, rows: int, **flags: Any) -> Case:
    params = {
        "rows": rows,
        "groups": model.o_groups,
        "rank": model.o_lora_rank,
        "width": model.wo_a_input_width,
        "dialect": "e4m3fn",
    }
    return Case(name, params, **flags)


_TINY_PARAMS = {"rows": 3, "groups": 2, "rank": 128, "width": 256, "dialect": "e4m3fn"}
_CASES = (
    Case("tiny", _TINY_PARAMS, tiny=True),
    Case("tiny-fnuz", {**_TINY_PARAMS, "dialect": "e4m3fnuz"}, tiny=True, about="a weight converted for gfx942"),
    Case("tiny-one-row", {**_TINY_PARAMS, "rows": 1, "groups": 1}, tiny=True),
    *(_case(f"flash-{t}", config.V4_FLASH, t, measured=True, needs_gpu=True) for t in (1, 8, 64, 128, 256, 1024)),
    _case("pro-256", config.V4_PRO, 256, needs_gpu=True),
)

OPTIMIZATION = Optimization(
    id="cached_projection",
    number=8,
    title="Cached projection weight",
    part="II sparse MLA decode",
    sources=("doubleword vLLM fork, commit 501595f95", "vllm#45103"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_baseline,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate(
        (
            *(Check(event, "bit") for event in EVENTS),
            *(Check(event, "budget", "matmul_bf16") for event in EVENTS),
        )
    ),
    hazards={
        "address-key": Hazard(
            title="the cache is keyed on data_ptr",
            story="The published key is shapes and addresses. An in-place update keeps both, and so does a new tensor "
            "that gets a freed one's address.",
            source="doubleword vLLM fork, commit 501595f95, review of PR 12",
            ids=("H31",),
            case="tiny",
            planted=_planted("shape and data_ptr"),
        ),
        "set-once": Hazard(
            title="no key at all: the copy hangs on the module",
            story="vLLM 0.33 keeps the copy as an attribute and never invalidates it, so a weight reload or an RL "
            "weight sync keeps serving the old projection.",
            source="vLLM 0.33.0, wo_a._dsv4_wo_a_bf16",
            ids=("H31",),
            case="tiny",
            planted=_planted("no key, set once"),
        ),
        "version-only": Hazard(
            title="the version counter is trusted",
            story="PyTorch counts in-place writes, but not those through .data, which is how weight loaders write.",
            source="PyTorch: a tensor's .data has a version counter of its own",
            ids=("H31",),
            case="tiny",
            planted=_planted("data_ptr and _version"),
        ),
        "dequantised-twice": Hazard(
            title="the scale is applied twice",
            story="After the weight has become bf16 its scale attribute is still there; a second pass through the same "
            "code multiplies it in again. vLLM guards with element_size() == 1.",
            source="vLLM 0.33.0, the guard in the wo_a cache",
            ids=("H31",),
            case="tiny",
            planted=lambda inputs: _life(inputs, _dequantised_twice),
        ),
    },
    predict=_predict,
    claims=records.published("cached_projection"),
    timed=_timed,
    measured_modules=("dsv4ref.kernels.projection", "dsv4ref.kernels.codes", "dsv4ref.ref.projection"),
    kernels=_requests,
)
