"""Weights by the flat names of the published checkpoint, read as plain matrices whatever they are stored in.

``layers.3.attn.wq_a.weight`` is the tensor of that name. A matrix may be stored as a floating tensor, as FP8 with a
sibling ``.scale`` of UE8M0 bytes per 128 x 128 block, or as int8-packed MXFP4 with a sibling ``.scale`` per 32 columns;
reading one dequantises it. MTP blocks are ``mtp.0``, and so on.

Source: DeepSeek-V4 inference/model.py (module names), inference/convert.py (stored formats).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.formats import mxfp4
from dsv4ref.ref.census import census, is_quantised, scale_name
from dsv4ref.ref.projection import WEIGHT_BLOCK, dequantise_weight_ref

__all__ = ["Weights", "block_name", "check_weights", "weight_shapes"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_BYTES = (torch.uint8, torch.int8)
_E8M0 = torch.float8_e8m0fnu
_NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Weights:
    """The tensors below one prefix, converted to ``dtype`` as they are read.

    Args:
        tensors: checkpoint name -> tensor.
        dtype: what `tensor` and `matrix` return.
        prefix: prepended to every name, with a dot unless empty.
    """

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    prefix: str = ""

    def at(self, name: str) -> Weights:
        """The tensors of a part: ``at("attn").tensor("attn_sink")`` reads ``<prefix>.attn.attn_sink``."""
        return Weights(self.tensors, self.dtype, self._full(name))

    def raw(self, name: str) -> Tensor:
        """A tensor as stored."""
        full = self._full(name)
        if full not in self.tensors:
            raise ValueError(f"weights: no tensor is called {full!r}")
        return self.tensors[full]

    def tensor(self, name: str) -> Tensor:
        """A tensor stored as floating point, in ``dtype``."""
        return self.raw(name).to(self.dtype)

    def matrix(self, name: str) -> Tensor:
        """The ``[out, in]`` matrix of a linear, ``<name>.weight``, dequantised to ``dtype``."""
        stored = self.raw(f"{name}.weight")
        if stored.dtype in _FP8:
            return dequantise_weight_ref(stored, self._scale(name), self.dtype)
        if stored.dtype in _BYTES:
            return mxfp4.dequantise(stored, self._scale(name), self.dtype)
        return stored.to(self.dtype)

    def _scale(self, name: str) -> Tensor:
        scale = self.raw(f"{name}.scale")
        return scale.view(torch.uint8) if scale.dtype is _E8M0 else scale

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


def block_name(config: ModelConfig, layer: int) -> str:
    """The checkpoint's prefix of a block: ``layers.N``, and ``mtp.N`` from ``n_layers`` on."""
    config.ratio(layer)  # raises on a layer that is not there
    return f"layers.{layer}" if layer < config.n_layers else f"mtp.{layer - config.n_layers}"


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model's formulas use: the checkpoint's, scales left out.

    Args:
        config: any model.

    Returns:
        Checkpoint name -> logical shape (an MXFP4 matrix is ``[out, in]`` here, ``[out, in / 2]`` as stored).
    """
    return {name: spec.logical_shape for name, spec in census(config).items() if not name.endswith(".scale")}


def check_weights(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is there, with its shape, its scales, and nothing besides; hash tables name distinct experts.

    Args:
        config: the model.
        tensors: checkpoint name -> tensor, in any of the stored formats.

    Raises:
        ValueError: names the first tensor that is missing, unknown or wrong, what it is and what was expected.
        TypeError: a value is no tensor, a hash table is no integer tensor, or a tensor is quantised that the checkpoint
            stores as numbers: nothing would apply its scale.
    """
    specs, expected = census(config), weight_shapes(config)
    scales: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"weights: {name!r} is missing, expected shape {list(shape)}")
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weights: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
        stored = shape
        if name.endswith(".tid2eid"):
            _check_hash_table(name, tensor, shape, config)
            continue
        if tensor.dtype not in (*_NUMBERS, *(_FP8 + _BYTES if is_quantised(specs[name]) else ())):
            formats = ", FP8 or packed FP4" if is_quantised(specs[name]) else ""
            raise TypeError(f"weights: {name!r} is {tensor.dtype}, expected bfloat16 or wider floating point{formats}")
        if tensor.dtype in _FP8:
            scales[scale_name(name)] = tuple(-(-n // WEIGHT_BLOCK) for n in shape)
        elif tensor.dtype in _BYTES:
            stored = (*shape[:-1], shape[-1] // 2)
            scales[scale_name(name)] = (*shape[:-1], shape[-1] // mxfp4.BLOCK)
        if tuple(tensor.shape) != stored:
            raise ValueError(
                f"weights: {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {list(stored)} for {config.name}"
            )
    for name, shape in scales.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            got = list(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"weights: {name!r} is {got}, expected UE8M0 scales {list(shape)}")
        if tensors[name].dtype not in (torch.uint8, _E8M0):
            raise ValueError(
                f"weights: {name!r} is {tensors[name].dtype}, expected UE8M0 bytes (uint8, float8_e8m0fnu)"
            )
    unknown = sorted(set(tensors) - set(expected) - set(scales))
    if unknown:
        raise ValueError(f"weights: {unknown[0]!r} and {len(unknown) - 1} more belong to no part of {config.name}")


def _check_hash_table(name: str, table: Tensor, shape: tuple[int, ...], config: ModelConfig) -> None:
    """Published tables are int64 where DeepSeek's module declares int32: both pass. Twice the same expert does not."""
    if table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"weights: {name!r} is {table.dtype}, expected torch.int64 or torch.int32")
    if tuple(table.shape) != shape:
        raise ValueError(f"weights: {name!r} is {list(table.shape)}, expected {list(shape)} for {config.name}")
    n_experts = config.router.n_experts
    outside = (table < 0) | (table >= n_experts)
    if bool(outside.any()):
        raise ValueError(f"weights: {name!r} names expert {int(table[outside][0])}, expected 0 to {n_experts - 1}")
    ordered = table.sort(dim=-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1)
    if bool(repeated.any()):
        token = int(repeated.nonzero()[0, 0])
        raise ValueError(
            f"weights: {name!r} gives token {token} experts {table[token].tolist()}, expected distinct ones"
        )
