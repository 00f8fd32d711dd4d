"""Sparse decode in eager PyTorch: gather both scopes, dequantise, one softmax; and the traffic that costs.

This is what a port runs before it has a kernel, and the baseline of chapter 09's published figure. Every operator reads
its inputs from memory and writes its output back: a 584-byte cache entry becomes 2,048 bytes of fp32 by way of five
copies, and each head's scores make the trip eight times.

Lists are padded to the scope's width, so that shapes do not depend on data and nothing waits for the device.

Source: ``_ref_sparse_attn_decode`` of vLLM's DeepSeek-V4 bring-up for ROCm (vllm#40889 replaces it): fp32 scores over
both scopes at once, the sink as a factor 1 / (1 + exp(sink - lse)). It dequantises the *whole* paged cache first; here
only the gathered entries are, which is kinder to the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4ref.device import DeviceSpec
from dsv4ref.formats import Scope, fp8, ue8m0
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, ROW_BYTES, SCALE_BLOCK, SCALE_COUNT, SCALE_SLOTS
from dsv4ref.optimizations import decode_model

__all__ = ["GATHER_LAUNCHES", "gather_bytes", "gather_decode", "gather_time_us"]

GATHER_LAUNCHES = 81
"""Operators that launch work in one `gather_decode` over two scopes, counted without a GPU; a test counts them."""

_LAUNCH_US = 2.0
_FP32_SHARE = 1 / 8


def gather_decode(q: Tensor, scopes: Sequence[Scope], sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of T query rows over their slots with PyTorch operators.

    Args:
        q: bf16 ``[T, H, 512]``.
        scopes: one or two scopes with T rows each; no row longer than its scope's width.
        sink: fp32 ``[H]``.
        scale: softmax scale.

    Returns:
        out bf16 ``[T, H, 512]`` and natural-log lse fp32 ``[T, H]`` without the sink.
    """
    gathered = [_gathered(scope) for scope in scopes]
    keys = torch.cat([keys for keys, _ in gathered], dim=1)  # [T, K, 512]
    valid = torch.cat([valid for _, valid in gathered], dim=1)  # [T, K]
    keys = keys.masked_fill(~valid[..., None], 0.0).to(torch.float32)
    scores = q.to(torch.float32) @ keys.transpose(1, 2)  # [T, H, K]
    scores = scores.mul_(scale).masked_fill_(~valid[:, None], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # [T, H]
    weights = torch.exp(scores - lse[..., None])  # NaN in an empty row, which is overwritten below
    out = (weights @ keys) * (1.0 / (1.0 + torch.exp(sink - lse)))[..., None]
    return out.masked_fill_(torch.isneginf(lse)[..., None], 0.0).to(torch.bfloat16), lse


def _gathered(scope: Scope) -> tuple[Tensor, Tensor]:
    """Every row's slots, padded to the scope's width and dequantised: bf16 ``[T, W, 512]`` and their validity."""
    cache = scope.cache
    begin = scope.indptr[:-1, None]
    lanes = torch.arange(scope.width, dtype=torch.int32, device=scope.indptr.device)
    inside = lanes < scope.indptr[1:, None] - begin  # [T, W]
    # One slot of -1 behind the list is what lanes past a row's end read.
    padded = pad(scope.indices, (0, 1), value=-1)
    slots = padded[(begin + lanes).masked_fill(~inside, scope.indices.numel())]
    valid = (slots >= 0) & (slots < cache.rows)
    slots = slots.masked_fill(~valid, 0)
    block, position = slots // cache.block_size, slots % cache.block_size
    rows = cache.entry_rows[block, position]  # [T, W, 576]
    scales = cache.entry_scales[block, position][..., :SCALE_COUNT]
    codes = fp8.decode(rows[..., :NOPE_DIM], cache.dialect).unflatten(-1, (SCALE_COUNT, SCALE_BLOCK))
    nope = (codes * ue8m0.decode(scales)[..., None]).flatten(-2)
    return torch.cat([nope.to(torch.bfloat16), rows[..., NOPE_DIM:].view(torch.bfloat16)], dim=-1), valid


_BYTES_PER_KEY: Mapping[str, int] = {
    "gather rows and scales": 2 * (ROW_BYTES + SCALE_SLOTS),
    "codes to fp32": NOPE_DIM * (1 + 4),
    "times scale": NOPE_DIM * (4 + 4),
    "to bf16": NOPE_DIM * (4 + 2),
    "join with rope": HEAD_DIM * (2 + 2),
    "join the scopes": HEAD_DIM * (2 + 2),
    "zero what is invalid": HEAD_DIM * (2 + 2),
    "to fp32": HEAD_DIM * (2 + 4),
    "read for scores and for values": HEAD_DIM * (4 + 4),
}
_BYTES_PER_SCORE: Mapping[str, int] = {
    "written": 4,
    "scaled": 4 + 4,
    "masked": 4 + 4,
    "reduced to the LSE": 4,
    "less the LSE": 4 + 4,
    "exponential": 4 + 4,
    "read for values": 4,
}
_BYTES_PER_OUTPUT: Mapping[str, int] = {
    "q to fp32": 2 + 4,
    "q": 4,
    "out": 4,
    "sink": 4 + 4,
    "zeroed": 4 + 4,
    "to bf16": 4 + 2,
}


def gather_bytes(params: Mapping[str, Any]) -> int:
    """Bytes `gather_decode` moves if each operator reads its inputs once and writes its output once.

    Operators on slots, scales and LSEs count as none; those that take several passes (a reduction) as one.
    """
    keys = params["rows"] * (int(params["swa"]) + int(params["extra"] or 0))
    per_key = sum(_BYTES_PER_KEY.values()) + params["heads"] * sum(_BYTES_PER_SCORE.values())
    return int(keys * per_key + params["rows"] * params["heads"] * HEAD_DIM * sum(_BYTES_PER_OUTPUT.values()))


def gather_time_us(params: Mapping[str, Any], spec: DeviceSpec) -> float:
    """Modelled microseconds of one `gather_decode` under graph replay, a round figure that favours the baseline.

    Bytes at published bandwidth, 2 us per launch, and the two products in fp32 at an eighth of the dense bf16 rate,
    which is MI300X's published ratio (163.4 of 1,307.4 TFLOP/s); the other devices publish less.
    """
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    moved_us = gather_bytes(params) / (spec.bandwidth_tb_s * 1e6)
    products_us = decode_model.decode_flops(params) / (spec.bf16_tflops * _FP32_SHARE * 1e6)
    return moved_us + products_us + GATHER_LAUNCHES * _LAUNCH_US
