"""What every peer is held to before it is timed, and how its package is named."""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

__all__ = ["check_agreement", "described"]

_AGREEMENT = 3e-2
"""Largest norm of the difference to this project's result, over that result's norm. A wrong layout gives about 1."""


def described(home: str, package: str | None = None) -> str:
    """A module with the version of its package, e.g. "vllm.third_party.flashmla (vllm 0.22.0)".

    Args:
        home: dotted name of what is called.
        package: the distribution that it came with; the first part of ``home`` if None.
    """
    package = package or home.split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return f"{home} ({package} {version})"


def check_agreement(found: Tensor, expected: Tensor) -> None:
    """Refuse a peer that computes something else: its time would mean nothing.

    Args:
        found: the peer's result, any float dtype.
        expected: this project's, of the same shape.

    Raises:
        RuntimeError: another shape, or a difference that rounding does not explain.
    """
    if found.shape != expected.shape:
        raise RuntimeError(f"peer: result {tuple(found.shape)}, expected {tuple(expected.shape)}")
    theirs, ours = found.to(torch.float32), expected.to(torch.float32)
    error, size = float((theirs - ours).norm()), float(ours.norm())
    if not error <= _AGREEMENT * size:  # NaN is no agreement
        raise RuntimeError(f"peer: differs from our result by {error:.3g} of {size:.3g}, expected {_AGREEMENT:g} of it")
