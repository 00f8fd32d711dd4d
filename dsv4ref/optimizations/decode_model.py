"""A closed-form time model of the sparse decode, and its compile requests: what the decode chapters predict with.

The model is meant to be written down before measuring, so its constants are round numbers that anybody can defend, not
a fit. Per compute unit, workgroups run in rounds; in a round every workgroup walks its keys tile by tile::

    time = rounds * (tiles * latency + resident * keys * cost_per_key)
    rounds = ceil(workgroups / (compute units * resident)),  resident = 8 waves / waves per workgroup

* latency: two dependent trips to memory per tile (slot, then entry), 0.7 us each;
* cost per key: decoding 512 codes at 12 lane-instructions each on 128 lanes, plus 4 * max(BLOCK_H, 16) * 512 FLOPs at
  the unit's share of the dense bf16 rate;
* resident: eight waves, because every launch shape here needs 200 registers or more per lane.

It has no term for shared memory (LDS), instruction overlap or caches; the chapters say what that costs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4ref import device
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.roofline import Bound, Level
from dsv4ref.formats import Dialect
from dsv4ref.formats.kv_cache import ENTRY_BYTES, HEAD_DIM
from dsv4ref.kernels.codes import decode_mode
from dsv4ref.kernels.sparse_mla.halves import in_halves
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

__all__ = [
    "bound",
    "compile_request",
    "decode_flops",
    "decode_time_us",
    "dequantisation",
    "key_bytes",
    "least_bytes",
    "spec_for",
    "vector_bytes",
]

MEASURED_MODULES = (
    "dsv4ref.kernels.sparse_mla.decode",
    "dsv4ref.kernels.sparse_mla.halves",
    "dsv4ref.kernels.sparse_mla.launch",
    "dsv4ref.kernels.codes",
)
"""The modules whose bytes a decode record stands on."""

_MEMORY_TRIP_US = 0.7
_TRIPS_PER_TILE = 2
_LANES = 128
_INSTRUCTIONS_PER_CODE = 12
_CLOCK_GHZ = 1.8
_DECODE_US_PER_KEY = HEAD_DIM * _INSTRUCTIONS_PER_CODE / (_LANES * _CLOCK_GHZ * 1e3)  # of one compute unit
_RESIDENT_WAVES = 8
_SMALLEST_MATRIX_TILE = 16


def spec_for(key: str) -> DeviceSpec | None:
    """The device's published figures, or None if they do not include what the model needs (the CPU)."""
    spec = device.KNOWN_DEVICES.get(key)
    if spec is None or spec.bandwidth_tb_s is None or spec.bf16_tflops is None or spec.compute_units is None:
        return None
    return spec


def decode_flops(params: Mapping[str, Any]) -> int:
    """FLOPs of the two matrix products: 4 * T * H * keys * 512."""
    return 4 * params["rows"] * params["heads"] * _keys(params) * HEAD_DIM


def key_bytes(params: Mapping[str, Any], shape: LaunchShape | None) -> int:
    """Cache bytes the programs of a launch ask for, re-reads by further head blocks included; once per row if None."""
    passes = 1 if shape is None else shape.workgroups(1, params["heads"])
    return int(passes * params["rows"] * _keys(params) * ENTRY_BYTES)


def least_bytes(params: Mapping[str, Any]) -> int:
    """Bytes a decode call must move: every key once, q read, the output written."""
    return key_bytes(params, None) + 2 * vector_bytes(params)


def vector_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of one bf16 ``[T, H, 512]`` tensor, which q and the output are."""
    return int(2 * params["rows"] * params["heads"] * HEAD_DIM)


def bound(params: Mapping[str, Any], spec: DeviceSpec) -> Bound:
    """The roofline bound of a decode call on published peaks: every key read once, q read, the output written."""
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    return Bound(least_bytes(params), decode_flops(params), spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12)


def dequantisation(params: Mapping[str, Any], spec: DeviceSpec) -> Level:
    """The vector units as one more side of the bound: the codes of every key, decoded once per row.

    A launch whose workgroups hold fewer heads than the row has decodes them once per head block: this is the least.

    Args:
        params: rows, swa, extra.
        spec: a card with published compute units.

    Returns:
        the level "dequantisation": 512 bytes a key, at the rate of all units under the model's instructions per code.
    """
    assert spec.compute_units is not None
    rate = 1e6 * spec.compute_units * HEAD_DIM / _DECODE_US_PER_KEY
    return Level("dequantisation", params["rows"] * _keys(params) * HEAD_DIM, rate)


def decode_time_us(params: Mapping[str, Any], shape: LaunchShape, spec: DeviceSpec) -> float:
    """Modelled microseconds of one decode launch; see the module docstring for the model."""
    assert spec.compute_units is not None
    assert spec.bf16_tflops is not None
    resident = max(1, _RESIDENT_WAVES // shape.num_warps)
    rounds = -(-shape.workgroups(params["rows"], params["heads"]) // (spec.compute_units * resident))
    tiles = sum(-(-params[scope] // shape.block_k) for scope in ("swa", "extra") if params[scope])
    matrix_flops = 4 * max(shape.block_h, _SMALLEST_MATRIX_TILE) * HEAD_DIM
    matrix_us = matrix_flops / (spec.bf16_tflops * 1e6 / spec.compute_units)
    per_tile = tiles * _TRIPS_PER_TILE * _MEMORY_TRIP_US
    return rounds * (per_tile + resident * _keys(params) * (_DECODE_US_PER_KEY + matrix_us))


def _keys(params: Mapping[str, Any]) -> int:
    return int(params["swa"]) + int(params["extra"] or 0)


def compile_request(shape: LaunchShape, arch: str) -> CompileRequest:
    """The decode kernel at one launch shape as it would be specialised on an AMD architecture.

    Both scopes have 64-entry blocks; the SWA cache is in the architecture's own dialect and the extra cache in OCP, as
    upstream runs them. Sink on, LSE off: the serving configuration.
    """
    native = Dialect.of(device.native_dialect(arch), argument=f"native dialect of {arch}")
    modes = decode_mode(native, arch), decode_mode(Dialect.FN, arch)
    pointers = {
        "q": "*bf16", "out": "*bf16", "lse": "*bf16", "sink": "*fp32",
        "swa_cache": "*u8", "swa_indices": "*i32", "swa_indptr": "*i32",
        "extra_cache": "*u8", "extra_indices": "*i32", "extra_indptr": "*i32",
    }  # fmt: skip
    sizes = "swa_rows swa_block_stride extra_rows extra_block_stride num_heads"
    strides = "q_stride_t q_stride_h out_stride_t out_stride_h lse_stride_t lse_stride_h"
    aligned = dict.fromkeys(f"{sizes} {strides}".split(), "i32")
    free = {"swa_capacity": "i32", "extra_capacity": "i32", "scale_log2": "fp32"}
    return CompileRequest(
        kernel="sparse_mla_decode",
        module="dsv4ref.kernels.sparse_mla.decode",
        function="_sparse_mla_decode_kernel",
        shape=str(shape),
        signature={**pointers, **aligned, **free},
        constexprs={
            "SWA_BLOCK": 64,
            "SWA_MODE": modes[0],
            "EXTRA_BLOCK": 64,
            "EXTRA_MODE": modes[1],
            "HAS_EXTRA": True,
            "HAS_SINK": True,
            "HAS_LSE": False,
            "HALVES": in_halves(shape, *modes),
            "BLOCK_H": shape.block_h,
            "BLOCK_K": shape.block_k,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        divisible_by_16=frozenset(pointers) | frozenset(aligned),
    )
