"""Rotary positions: interleaved pairs over the LAST dimensions of a vector, YaRN-scaled on compressed layers.

    pair i is (a, b) = (x[2i], x[2i + 1]) of the rotary part, its angle phi = p * f_i
    rotate          a' = a cos phi - b sin phi        b' = b cos phi + a sin phi
    rotate back     the same with -phi
    f_i = theta^(-2i / R)                             R rotary dimensions, 64 in DeepSeek-V4

YaRN (context extension) divides slow frequencies by a factor and leaves fast ones alone, with a linear ramp between::

    turns(n) = R ln(L0 / (2 pi n)) / (2 ln theta)     the pair that turns n times over the original context L0
    low = max(floor(turns(beta_fast)), 0)             high = min(ceil(turns(beta_slow)), R - 1)
    ramp_i = clamp((i - low) / (high - low), 0, 1)
    f_i <- f_i / factor * ramp_i + f_i * (1 - ramp_i)

No attention temperature goes with it. Which layer uses what: a layer without compression has theta 10000 and no YaRN; a
compressed layer has theta 160000 and YaRN for everything rotary in it, its sliding-window keys included.

Angles are float32 products of an integer position and a float32 frequency: at positions near a million their rounding
is visible, and it is part of the model.

Source: DeepSeek-V4 inference/model.py, ``precompute_freqs_cis`` and ``apply_rotary_emb``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.numerics import Numerics

__all__ = ["frequencies", "layer_frequencies", "rotate_back_ref", "rotate_ref", "yarn"]


def frequencies(theta: float, rope_dim: int) -> Tensor:
    """Base frequencies ``theta^(-2i / R)``, fp32 ``[R / 2]``."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    return 1.0 / (theta**exponents)


def yarn(
    base: Tensor, theta: float, factor: float, original_seq_len: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN-scale base frequencies.

    Args:
        base: fp32 ``[R / 2]`` of `frequencies`.
        theta: the base they were made with.
        factor: what slow frequencies are divided by (16).
        original_seq_len: context length the model was first trained at (65536).
        beta_fast: pairs that turn more often than this over the original context stay (32).
        beta_slow: pairs that turn less often than this are divided (1).

    Returns:
        fp32 ``[R / 2]``.
    """
    rope_dim = 2 * base.shape[0]

    def pair_with_turns(turns: float) -> float:
        return rope_dim * math.log(original_seq_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    # R - 1 although there are only R / 2 pairs: DeepSeek's bound, beyond reach at the released theta.
    high = min(math.ceil(pair_with_turns(beta_slow)), rope_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp)


def layer_frequencies(config: ModelConfig, layer: int, numerics: Numerics) -> Tensor:
    """Frequencies of everything rotary in one layer, fp32 ``[R / 2]``.

    ``numerics.yarn_on_swa`` reproduces a fork that scales layers without compression too (their theta stays 10000).
    """
    theta = config.layer_rope_theta(layer)
    base = frequencies(theta, config.rope_head_dim)
    if not (config.uses_yarn(layer) or numerics.yarn_on_swa):
        return base
    return yarn(base, theta, config.rope_factor, config.original_seq_len, config.beta_fast, config.beta_slow)


def rotate_ref(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """Rotate the last R dimensions of every vector to its position.

    Args:
        x: ``[T, ..., d]``, float32 or float64, d >= R.
        positions: integer ``[T]``, absolute, from 0; moved to where ``x`` is.
        freqs: fp32 ``[R / 2]``, likewise.

    Returns:
        ``[T, ..., d]``; the first d - R dimensions are untouched.
    """
    return _rotate(x, positions, freqs, 1.0)


def rotate_back_ref(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """Inverse of `rotate_ref`, for attention outputs: keys are values too, so outputs carry rotated dimensions.

    Args and returns as `rotate_ref`; ``positions`` are the queries' own.
    """
    return _rotate(x, positions, freqs, -1.0)


def _rotate(x: Tensor, positions: Tensor, freqs: Tensor, sign: float) -> Tensor:
    rope_dim = 2 * freqs.shape[0]
    if positions.dim() != 1 or positions.shape[0] != x.shape[0] or positions.is_floating_point():
        raise ValueError(
            f"positions: got {positions.dtype} {tuple(positions.shape)}, expected integers [{x.shape[0]}], one per row"
        )
    if x.shape[-1] < rope_dim:
        raise ValueError(f"x: got last dimension {x.shape[-1]}, expected at least the {rope_dim} rotary ones")
    angles = positions.to(x.device, torch.float32)[:, None] * freqs.to(x.device)  # [T, R / 2]
    angles = angles.view(-1, *(1 for _ in x.shape[1:-1]), rope_dim // 2)  # [T, 1..., R / 2]
    cos, sin = torch.cos(angles).to(x.dtype), sign * torch.sin(angles).to(x.dtype)
    nope, rope = x[..., :-rope_dim], x[..., -rope_dim:]
    a, b = rope[..., 0::2], rope[..., 1::2]  # [T, ..., R / 2]
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((nope, rotated), dim=-1)
