"""Write a checkpoint in the released format: the inverse of `dsv4ref.ref.checkpoint`, for tests and small models.

Weights that the format stores quantised may be given as numbers: FP8 matrices get one UE8M0 scale per 128 x 128 block,
``e = ceil(log2(max|w| / 448))``, routed experts become MXFP4. What `checkpoint.load` returned, in either form, can be
written again and reads back as the same numbers: a block's scale is a power of two, so requantising loses nothing.

Source: DeepSeek-V4 inference/convert.py and kernel.py (block sizes, rounding of scales).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.formats import fp8, mxfp4, ue8m0
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.ref import checkpoint, checkpoint_config
from dsv4ref.ref.census import DTYPES, TensorSpec, census, is_quantised, scale_name, total_bytes
from dsv4ref.ref.projection import WEIGHT_BLOCK

__all__ = ["SHARD_BYTES", "quantise", "quantise_fp8", "random_tensor", "write", "write_random"]

SHARD_BYTES = 4 << 30
"""Bytes of tensors that a shard holds at most, unless a single tensor is larger."""

_FP8_MAX = Dialect.FN.writer_max
# The smallest block maximum that divides to a normal float: an all-zero block gets the scale 2^-126.
_FP8_FLOOR = _FP8_MAX * 2.0**-126

_NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Selection bias of a router as released models have it: far above the scores, so that rounding the sum matters.
_BIAS_OFFSET = 8.0


def write(
    folder: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write tensors as shards, an index and ``config.json``.

    Args:
        folder: where to; created if need be, and empty otherwise.
        config: the model.
        tensors: by checkpoint name. A quantised weight either as stored and with its scale, or in a floating dtype with
            its unpacked shape and without one. All others in the stored dtype and shape.
        shard_bytes: bytes of tensors at which the next shard begins; one tensor is never split.

    Returns:
        ``folder``. The index is written last: a folder that an error has left incomplete does not load.

    Raises:
        TypeError, ValueError: a name, shape, dtype or value that does not belong; the names, shapes and dtypes of all
            tensors are checked before anything is written.
        FileExistsError: ``folder`` is a file or is not empty.
    """
    specs = census(config)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
    without_scale = {scale_name(name) for name, spec in specs.items() if _as_numbers(tensors.get(name), spec)}
    expected = [name for name in specs if name not in without_scale]
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"tensors: has no {missing[0]}, expected {len(expected)} tensors of {config.name}")
    if extra := sorted(set(tensors) - set(expected)):
        why = "comes with unquantised numbers" if extra[0] in specs else f"is no tensor of {config.name}"
        raise ValueError(f"tensors: {extra[0]} {why}, expected {len(expected)} tensors")
    for name in expected:
        _check_form(name, tensors[name], specs[name])
    return _write(Path(folder), config, tensors.__getitem__, shard_bytes)


def write_random(folder: str | Path, config: ModelConfig, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write random weights (`random_tensor`) with never more than one shard in memory.

    Args:
        folder: where to; created if need be, and empty otherwise.
        config: the model; a small one, unless the disk is large.
        seed: the same seed gives the same bytes.
        shard_bytes: bytes of tensors at which the next shard begins.

    Returns:
        ``folder``.

    Raises:
        TypeError, ValueError: ``config`` has no released form, or ``shard_bytes`` is no positive integer.
        FileExistsError: ``folder`` is a file or is not empty.
    """
    return _write(Path(folder), config, lambda name: random_tensor(name, config, seed), shard_bytes)


def random_tensor(name: str, config: ModelConfig, seed: int = 0) -> Tensor:
    """One tensor of a random model, unquantised; it depends on its name and the seed only, not on the others.

    Scaled so that activations stay of order 1: matrices have variance 1 / width, norms are near 1, hyper-connection
    bases spread around 0, router biases lie around 8 as released ones do, and each token's experts are distinct.

    Args:
        name: a tensor's checkpoint name, not a scale's.
        config: the model.
        seed: of the model.

    Returns:
        float32 with the unpacked shape for a quantised weight, else the stored dtype and shape.

    Raises:
        ValueError: no such tensor, or the scale of a quantised weight.
    """
    specs = census(config)
    if name not in specs or specs[name].dtype == "F8_E8M0":
        raise ValueError(f"name: got {name!r}, expected a tensor of {config.name} that is no scale")
    spec = specs[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if spec.dtype == "I64":
        tokens, slots = spec.shape
        return torch.rand(tokens, config.router.n_experts, generator=generator).argsort(dim=1)[:, :slots].clone()
    shape = spec.logical_shape
    values = torch.randn(shape, generator=generator)
    part = name.rsplit(".", 2)[-2:]
    if part[-1] == "bias":
        values = _BIAS_OFFSET + 0.25 * values
    elif part[-1].endswith("_scale") or (part[-1] == "weight" and len(shape) == 1):
        values = 1.0 + 0.1 * values
    elif part[-1].endswith("_fn") or (part[-1] == "weight" and part[0] != "embed"):
        values *= shape[-1] ** -0.5
    return values if is_quantised(spec) else values.to(DTYPES[spec.dtype])


def quantise(values: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Quantise a weight as its spec stores it: see `quantise_fp8` and `dsv4ref.formats.mxfp4.quantise`.

    Args:
        values: floating ``[N, K]``, finite.
        spec: of the weight, ``F8_E4M3`` or ``I8``.

    Returns:
        The codes in the stored dtype, and the float8_e8m0fnu scale.
    """
    if spec.dtype == "I8":
        packed, scales = mxfp4.quantise(values)
        return packed.view(torch.int8), scales.view(torch.float8_e8m0fnu)
    return quantise_fp8(values)


def quantise_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix to e4m3fn with one UE8M0 scale per 128 x 128 block; blocks at the edges may be smaller.

    Args:
        values: floating ``[N, K]``, finite.

    Returns:
        float8_e4m3fn ``[N, K]`` and float8_e8m0fnu ``[ceil(N / 128), ceil(K / 128)]``.

    Raises:
        ValueError: ``values`` is no matrix or holds infinities or NaN.
    """
    if values.dim() != 2 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"values: got shape {tuple(values.shape)} or non-finite numbers, expected a finite matrix")
    rows, columns = values.shape
    B = WEIGHT_BLOCK
    padded = torch.nn.functional.pad(values.to(torch.float32), (0, -columns % B, 0, -rows % B))
    blocks = padded.unflatten(1, (-1, B)).unflatten(0, (-1, B))  # [N / B, B, K / B, B]
    scales = ue8m0.scale_byte(blocks.abs().amax(dim=(1, 3)), _FP8_MAX, floor=_FP8_FLOOR)  # [N / B, K / B]
    scaled = blocks / ue8m0.decode(scales)[:, None, :, None]
    codes = fp8.encode(scaled.reshape(padded.shape)[:rows, :columns], Dialect.FN)
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def _as_numbers(tensor: Tensor | None, spec: TensorSpec) -> bool:
    return tensor is not None and is_quantised(spec) and tensor.dtype in _NUMBERS


def _check_form(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    as_numbers = _as_numbers(tensor, spec)
    wanted = spec.logical_shape if as_numbers else spec.shape
    if tuple(tensor.shape) != wanted or not (as_numbers or tensor.dtype is DTYPES[spec.dtype]):
        numbers = f" or numbers {list(spec.logical_shape)}" if is_quantised(spec) else ""
        raise ValueError(f"tensors: {name} is {tensor.dtype} {list(tensor.shape)}, expected {spec}{numbers}")


def _write(folder: Path, config: ModelConfig, get: Callable[[str], Tensor], shard_bytes: int) -> Path:
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes: got {shard_bytes!r}, expected a positive number of bytes")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: got {folder}, expected a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    specs = census(config)
    shards = _plan(specs, shard_bytes)
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}  # scales of weights that were quantised here; the census has them next in line
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {}
        for name in names:
            tensor = pending.pop(name, None)
            if tensor is None:
                tensor = get(name).detach().cpu()
                if _as_numbers(tensor, specs[name]):
                    tensor, pending[scale_name(name)] = quantise(tensor, specs[name])
            checkpoint.check_values(name, tensor, config)
            # A copy: safetensors takes no two tensors that share memory, such as a tied embedding or slices of one.
            content[name] = tensor.clone(memory_format=torch.contiguous_format)
            weight_map[name] = shard
        save_file(content, folder / shard, metadata={"format": "pt"})
    _write_json(folder / checkpoint_config.FILE, checkpoint_config.as_json(config))
    metadata = {"total_size": total_bytes(config)}
    _write_json(folder / checkpoint.INDEX, {"metadata": metadata, "weight_map": weight_map})
    return folder


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not shards or spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    return shards


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
