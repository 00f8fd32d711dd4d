"""Compile requests of the split decode, partial kernel and reduce, as the launcher would specialise them on AMD."""

from __future__ import annotations

from dataclasses import replace

from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.split_decode import REDUCE_CHUNK, REDUCE_WARPS
from dsv4ref.optimizations import decode_model

__all__ = ["partial_request", "reduce_request"]

_MODULE = "dsv4ref.kernels.sparse_mla.split_decode"
_FINISH = {"positions": "*i64", "cos": "*fp32", "sin": "*fp32"}
_STRIDES = dict.fromkeys(
    ["out_stride_t", "out_stride_h", "lse_stride_t", "lse_stride_h", "cos_stride", "sin_stride", "num_positions"], "i32"
)
_COUNTS = {"num_rows": "i32", "num_heads": "i32", "num_splits": "i32"}


def partial_request(shape: LaunchShape, arch: str, *, split: bool = True, rotation: bool = False) -> CompileRequest:
    """The partial kernel at one launch shape, over two scopes.

    Args:
        shape: tile and warps.
        arch: "gfx942" or "gfx950".
        split: writes parts for a reduce; otherwise one split, with sink and output.
        rotation: of the one split, with inverse RoPE as well.
    """
    whole = decode_model.compile_request(shape, arch)
    rope = rotation and not split
    unused = "*bf16"  # the launcher passes an output or a query where an argument has no use
    finish = _FINISH if rope else dict.fromkeys(_FINISH, unused)
    parts = "*fp32" if split else unused
    pointers = {**finish, "parts": parts, "part_lses": parts}
    if split:
        pointers["sink"] = unused
    signature = {**whole.signature, **pointers, **_STRIDES, **_COUNTS}
    constexprs = {**whole.constexprs, "SPLIT": split, "HAS_SINK": not split, "HAS_ROPE": rope}
    loose = {"num_rows", "num_splits"}
    if not split:
        del signature["num_splits"]
        constexprs["num_splits"] = 1  # the JIT folds an integer equal to 1
    kind = "parts" if split else f"one split{', rotation' if rope else ''}"
    aligned = (whole.divisible_by_16 | frozenset(pointers) | frozenset(_STRIDES) | {"num_heads"}) - loose
    return replace(
        whole,
        kernel="split_k_decode",
        module=_MODULE,
        function="_split_k_decode_kernel",
        shape=f"{shape}, {kind}",
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=frozenset(aligned),
    )


def reduce_request(arch: str, *, padded: int = 32, rotation: bool = False) -> CompileRequest:
    """The reduce over up to ``padded`` splits, with the sink.

    Args:
        arch: "gfx942" or "gfx950".
        padded: splits, rounded up to a power of two.
        rotation: with inverse RoPE and the merged LSE as well.
    """
    finish = _FINISH if rotation else dict.fromkeys(_FINISH, "*bf16")
    pointers = {
        "parts": "*fp32", "part_lses": "*fp32", "sink": "*fp32", **finish, "out": "*bf16",
        "lse": "*fp32" if rotation else "*bf16",
    }  # fmt: skip
    strides = dict(_STRIDES)
    constexprs: dict[str, int | bool] = {"PADDED": padded, "CHUNK": min(padded, REDUCE_CHUNK)}
    if rotation:
        del strides["lse_stride_h"]
        constexprs["lse_stride_h"] = 1
    return CompileRequest(
        kernel="reduce_splits",
        module=_MODULE,
        function="_reduce_splits_kernel",
        shape=f"{padded} parts w{REDUCE_WARPS}{', rotation, LSE' if rotation else ''}",
        signature={**pointers, **strides, **_COUNTS},
        constexprs={**constexprs, "HAS_SINK": True, "HAS_LSE": rotation, "HAS_ROPE": rotation},
        num_warps=REDUCE_WARPS,
        divisible_by_16=frozenset(pointers) | frozenset(strides) | {"num_heads"},
    )
