"""A model's weights where the engine computes, dequantised once, and the formats of a step that the host cannot watch.

The reference reads a weight as it is stored, and dequantises it whenever it reads it. `resident_model` gives a model of
the same values whose matrices are numbers already. Two kinds stay as they are stored: routed experts, which would take
eight times their memory, and ``wo_a``, whose copy is a switch of its own (chapter 08).

The other functions compute what the reference's do, to the last bit, without their checks: those read the device, which
a captured step cannot (chapter 10), and a step of the engine has nothing left to check.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from dsv4ref.formats import kv_cache, mxfp4, ue8m0
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.ref.indexer import hadamard_ref, index_format_ref
from dsv4ref.ref.model import Model
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.weights import Weights

__all__ = ["AS_STORED", "fp4_values", "index_values", "resident_model", "write_entries"]

AS_STORED = (".experts.", ".wo_a.", ".tid2eid", "embed.weight")


@dataclass(frozen=True, eq=False)
class _Resident(Model):
    """A resident model, and the tensors that it was made from: while it lives, nothing else has their identities."""

    sources: tuple[Tensor, ...] = ()


# By the identity and version of every tensor, as `dsv4ref.serving.grouped_experts` shares its stacks (H31).
_RESIDENT: WeakValueDictionary[tuple[object, ...], _Resident] = WeakValueDictionary()


def resident_model(model: Model, device: torch.device | str) -> Model:
    """The same model with its weights on a device, in the arithmetic dtype but for those that stay as stored.

    Args:
        model: any; a tensor that is already what it should be is shared, not copied.
        device: where.

    Returns:
        A `Model` whose tensors do not follow later changes of the original's, those that are shared aside. Engines that
        stand side by side, as on a ladder, get the same one while the original's tensors are unchanged.
    """
    device = torch.device(device)
    sources = tuple(model.tensors.values())
    key = (device, model.config, model.numerics, *((id(tensor), tensor._version) for tensor in sources))
    if (known := _RESIDENT.get(key)) is not None:
        return known
    tensors: dict[str, Tensor] = {}
    for name, stored in model.tensors.items():
        if any(part in name for part in AS_STORED):
            tensors[name] = stored.to(device)
        elif name.endswith(".weight") and f"{name.removesuffix('weight')}scale" in model.tensors:
            tensors[name] = _dequantised(model.weights, name, device)
        elif not name.endswith(".scale") or f"{name.removesuffix('scale')}weight" not in model.tensors:
            tensors[name] = stored.to(device, model.numerics.dtype)
    resident = _Resident(model.config, tensors, model.numerics, sources)
    _RESIDENT[key] = resident
    return resident


def _dequantised(weights: Weights, name: str, device: torch.device) -> Tensor:
    return weights.matrix(name.removesuffix(".weight")).to(device)


def fp4_values(x: Tensor) -> Tensor:
    """`dsv4ref.ref.numerics.fp4_round_trip` without a look at the values.

    Codes are the multiples of 1/2 up to 2, of 1 up to 4 and of 2 up to 6, and among each the even multiple is the even
    code: so rounding a quotient to even is rounding to the even code.

    Args:
        x: floating ``[..., K]``, K a multiple of 32.

    Returns:
        ``[..., K]`` of ``x``'s dtype; a block with a NaN or an infinity has no meaningful values.
    """
    blocks = x.to(torch.bfloat16).to(torch.float32).unflatten(-1, (-1, mxfp4.BLOCK))  # [..., K / 32, 32]
    amax = blocks.abs().amax(dim=-1)
    scale = ue8m0.decode(ue8m0.scale_byte(amax, mxfp4.MAX, floor=mxfp4.AMAX_FLOOR))[..., None]
    scaled = blocks / scale
    magnitude = scaled.abs()
    spacing = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return (torch.round(scaled / spacing) * spacing * scale).flatten(-2).to(x.dtype)


def index_values(x: Tensor, numerics: Numerics) -> Tensor:
    """`dsv4ref.ref.indexer.index_format_ref` without a look at the values; the same arguments and result."""
    if numerics.quantise_index != "fp4":
        return index_format_ref(x, numerics)
    return fp4_values(numerics.round(hadamard_ref(x)) if numerics.hadamard else x)


def write_entries(cache: KVCache, slots: Tensor, kv: Tensor) -> None:
    """`dsv4ref.formats.kv_cache.insert` without a look at the slots.

    Args:
        cache: where.
        slots: int64 ``[N]``, each of the cache; where several are equal, one of their entries is what remains.
        kv: floating ``[N, 512]``.
    """
    codes, scales, rope = kv_cache.quantise(kv, cache.dialect)
    block, place = slots // cache.block_size, slots % cache.block_size
    cache.entry_rows[block, place] = torch.cat([codes, rope.view(torch.uint8)], dim=1)
    cache.entry_scales[block, place] = functional.pad(scales, (0, kv_cache.SCALE_SLOTS - scales.shape[1]))
