"""Read a checkpoint in the released format: safetensors shards, an index, flat names, FP8 and FP4 weights with scales.

    folder/model.safetensors.index.json      {"metadata": {"total_size": bytes}, "weight_map": {tensor: shard}}
    folder/model-00001-of-000NN.safetensors  ...
    folder/config.json                       compared with the configuration where present

Nothing is used before everything is known to be right. Three passes, each with at most one shard open:
1. the headers of all shards against the index and the census: names, shapes, dtypes, sizes; no tensor is read;
2. scales and token-to-expert tables, whose values can be wrong: no NaN scale, no bad or doubled expert id;
3. the tensors, copied out of the shard one at a time, so that a closed shard takes no memory.

Source: the released checkpoints' index and headers; DeepSeek-V4 inference/convert.py for how codes and scales combine.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.formats import mxfp4
from dsv4ref.ref import checkpoint_config
from dsv4ref.ref.census import TensorSpec, census, is_quantised, scale_name, total_bytes
from dsv4ref.ref.checkpoint_config import CheckpointError
from dsv4ref.ref.projection import WEIGHT_BLOCK, dequantise_weight_ref

__all__ = ["INDEX", "Checkpoint", "CheckpointError", "check_values", "dequantise", "inspect", "iter_tensors", "load"]

INDEX = "model.safetensors.index.json"
"""Name of the index file."""

_EXACT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers are right. Holds no tensor and no open file."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorSpec]
    shards: Mapping[str, Sequence[str]]  # shard -> its tensors, both in the order they are read
    sizes: Mapping[str, int]  # shard -> bytes of the file when its header was checked

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


def inspect(folder: str | Path, config: ModelConfig) -> Checkpoint:
    """Check names, shapes, dtypes and sizes of every tensor from the shards' headers, reading no tensor.

    Args:
        folder: where the index and the shards are.
        config: the model that it should be.

    Returns:
        What was found, as `iter_tensors` reads it.

    Raises:
        TypeError: ``config`` is no V4 model.
        CheckpointError: the first thing that is wrong, in one line.
    """
    expected = census(config)
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"folder: got {folder}, which is no directory, expected a checkpoint's folder")
    total_size, weight_map = _read_index(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if strays := sorted({path.name for path in folder.glob("*.safetensors")} - set(shards)):
        raise CheckpointError(f"{INDEX}: does not name {strays[0]}, which is in the folder{_more(strays)}")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{INDEX}: names {missing[0]}, which is not in the folder{_more(missing)}")
    sizes = {shard: (folder / shard).stat().st_size for shard in shards}
    headers = {shard: _read_header(folder / shard) for shard in shards}
    _refuse_base(headers)
    if (folder / checkpoint_config.FILE).exists():
        checkpoint_config.compare(folder, config)
    _check_index(weight_map, headers)
    _check_names(weight_map, expected, config.name)
    for name, spec in expected.items():
        shard = weight_map[name]
        if headers[shard][name] != spec:
            raise CheckpointError(f"{name}: got {headers[shard][name]} in {shard}, expected {spec} for {config.name}")
    if total_size != (total := total_bytes(config)):
        raise CheckpointError(f"{INDEX}: metadata.total_size is {total_size}, expected {total} for {config.name}")
    order: dict[str, list[str]] = {shard: [] for shard in shards}
    for name in expected:
        order[weight_map[name]].append(name)
    return Checkpoint(folder=folder, config=config, tensors=expected, shards=order, sizes=sizes)


def iter_tensors(
    folder: str | Path, config: ModelConfig, *, dequantise_to: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Check a checkpoint, then go through its tensors with never more than one shard open.

    Headers, scales and tables of all shards are checked when this is called, not when the iterator is first advanced.
    Each tensor is a copy: keeping it does not keep its shard.

    Args:
        folder: where the index and the shards are.
        config: the model that it should be.
        dequantise_to: None for tensors as stored, codes and scales apart. A dtype (bfloat16 or wider, so exact) for
            quantised weights as numbers of that dtype, unpacked and with no scale; all others still as stored, because
            what is stored in fp32 must not lose bits.

    Returns:
        An iterator of (name, tensor): shard after shard, within a shard in census order.

    Raises:
        TypeError: ``config`` is no V4 model.
        ValueError: ``dequantise_to`` is another dtype.
        CheckpointError: what is wrong, in one line; while iterating only if a shard changes in the meantime.
    """
    if dequantise_to is not None and dequantise_to not in _EXACT_DTYPES:
        raise ValueError(
            f"dequantise_to: got {dequantise_to}, expected None or one of {', '.join(map(str, _EXACT_DTYPES))}"
        )
    checkpoint = inspect(folder, config)
    distant_scales = _check_data(checkpoint, keep=dequantise_to is not None)
    return _stream(checkpoint, dequantise_to, distant_scales)


def load(folder: str | Path, config: ModelConfig, *, dequantise_to: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read a whole checkpoint into memory: all of it or, on any error, nothing. Arguments and errors: `iter_tensors`.

    Returns:
        name -> tensor, in census order.
    """
    found = dict(iter_tensors(folder, config, dequantise_to=dequantise_to))
    return {name: found[name] for name in census(config) if name in found}


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Turn one quantised weight into numbers; exact in bfloat16 and wider wherever the result is a normal number.

    Args:
        weight: float8_e4m3fn ``[N, K]`` or int8 ``[N, K / 2]`` holding two FP4 codes each.
        scale: float8_e8m0fnu, ``[ceil(N / 128), ceil(K / 128)]`` or ``[N, K / 32]``.
        dtype: result type.

    Returns:
        ``[N, K]`` of ``dtype``.

    Raises:
        TypeError: the dtypes are others.
        ValueError: the shapes do not belong together.
    """
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise TypeError(f"weight: got {weight.dtype}, expected torch.float8_e4m3fn or torch.int8")
    if scale.dtype is not torch.float8_e8m0fnu:
        raise TypeError(f"scale: got {scale.dtype}, expected torch.float8_e8m0fnu")
    scale_bytes = scale.view(torch.uint8)
    wanted = tuple(-(-n // WEIGHT_BLOCK) for n in weight.shape)
    if weight.dtype is not torch.int8 and tuple(scale.shape) != wanted:
        raise ValueError(f"scale: got shape {tuple(scale.shape)} for {tuple(weight.shape)} codes, expected {wanted}")
    if weight.dtype is torch.int8:
        return mxfp4.dequantise(weight, scale_bytes, dtype)
    return dequantise_weight_ref(weight, scale_bytes, dtype)


def check_values(name: str, tensor: Tensor, config: ModelConfig) -> None:
    """Check what a header cannot say about a scale or a token-to-expert table; any other tensor passes.

    Args:
        name: the tensor's name, for the message.
        tensor: as stored.
        config: the model.

    Raises:
        CheckpointError: a NaN scale (byte 255), an expert id out of range, or an id twice in a token's row.
    """
    if tensor.dtype is torch.float8_e8m0fnu:
        nan = tensor.view(torch.uint8) == 255
        if bool(nan.any()):
            raise CheckpointError(
                f"{name}: {int(nan.sum())} NaN scales (byte 255), the first at {_first(nan)}, expected 0 to 254"
            )
    elif tensor.dtype is torch.int64:
        experts = config.router.n_experts
        outside = (tensor < 0) | (tensor >= experts)
        if bool(outside.any()):
            token, slot = _first(outside)
            raise CheckpointError(
                f"{name}: token {token} slot {slot} has expert {int(tensor[token, slot])}, expected 0 to {experts - 1}"
            )
        # Twice the same id: indexed += would add it once, a grouped reduction twice.
        ids = tensor.sort(dim=1).values
        twice = ids[:, 1:] == ids[:, :-1]
        if bool(twice.any()):
            token, slot = _first(twice)
            raise CheckpointError(
                f"{name}: token {token} has expert {int(ids[token, slot])} twice, expected {tensor.shape[1]} distinct"
            )


# --- passes 2 and 3: data ---------------------------------------------------------------------------------------------


def _check_data(checkpoint: Checkpoint, *, keep: bool) -> dict[str, Tensor]:
    """Check values; with ``keep``, return the scales of weights that are in another shard."""
    distant: dict[str, Tensor] = {}  # few, if any: released shards are cut between layers
    for shard, names in checkpoint.shards.items():
        here = set(names)
        with _open(checkpoint.folder / shard, checkpoint.sizes[shard]) as file:
            for name in names:
                if checkpoint.tensors[name].dtype not in ("F8_E8M0", "I64"):
                    continue
                tensor = file.get_tensor(name)
                check_values(name, tensor, checkpoint.config)
                if keep and name.endswith(".scale") and name.removesuffix("scale") + "weight" not in here:
                    distant[name] = tensor.clone()
                del tensor
    return distant


def _stream(
    checkpoint: Checkpoint, dequantise_to: torch.dtype | None, distant_scales: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for shard, names in checkpoint.shards.items():
        with _open(checkpoint.folder / shard, checkpoint.sizes[shard]) as file:
            for name in names:
                spec = checkpoint.tensors[name]
                if dequantise_to is not None and spec.dtype == "F8_E8M0":
                    continue
                if dequantise_to is not None and is_quantised(spec):
                    other = scale_name(name)
                    scale = distant_scales.pop(other, None)
                    if scale is None:
                        scale = file.get_tensor(other)
                    yield name, dequantise(file.get_tensor(name), scale, dequantise_to)
                    del scale
                else:
                    # get_tensor is a view of the mapped file, which it would keep mapped for as long as it lives.
                    yield name, file.get_tensor(name).clone()


@contextlib.contextmanager
def _open(path: Path, size: int | None = None) -> Iterator[Any]:
    """One shard, opened by safetensors; a file that cannot be read, or not any more, is a CheckpointError."""
    try:
        # A mapped file that has become shorter kills the process on access, so look before opening.
        if size is not None and path.stat().st_size != size:
            raise CheckpointError(f"{path.name}: changed since its header was checked, expected {size} bytes")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: cut short or damaged, expected a safetensors file ({error})") from error


# --- pass 1: index and headers ----------------------------------------------------------------------------------------


def _read_index(path: Path) -> tuple[int, dict[str, str]]:
    content = checkpoint_config.read_json(path)
    metadata, weight_map = content.get("metadata"), content.get("weight_map")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, bool) or not isinstance(total, int):
        raise CheckpointError(f"{INDEX}: metadata.total_size is {total!r}, expected a number of bytes")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map is {type(weight_map).__name__}, expected tensor name -> shard")
    for name, shard in weight_map.items():
        # A shard is a file of this folder: a path would let an index reach anywhere.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
            raise CheckpointError(f"{INDEX}: {name} is in {shard!r}, expected the name of a .safetensors file")
    return total, weight_map


def _read_header(path: Path) -> dict[str, TensorSpec]:
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)
        return {name: TensorSpec(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _refuse_base(headers: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    for shard, header in headers.items():
        for name, spec in header.items():
            if ".experts." not in name:
                continue
            # fp8 codes with fp32 scales, whatever else may differ.
            if spec.dtype.startswith("F8_E4M3") or (not name.endswith(".weight") and spec.dtype == "F32"):
                raise CheckpointError(
                    f"{name}: {spec} in {shard} is a -Base checkpoint's (routed experts in fp8 with fp32 scales), "
                    "expected a released one with experts in int8-packed FP4"
                )


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    where: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header:
            if name in where:
                raise CheckpointError(f"{name}: in {where[name]} and again in {shard}, expected it once")
            where[name] = shard
    for name, shard in weight_map.items():
        if name not in where:
            near = _nearest(name, [other for other in headers[shard] if other not in weight_map])
            raise CheckpointError(f"{INDEX}: says that {name} is in {shard}, which does not hold it{near}")
        if where[name] != shard:
            raise CheckpointError(f"{INDEX}: says that {name} is in {shard}, but it is in {where[name]}")
    if extra := [name for name in where if name not in weight_map]:
        raise CheckpointError(f"{INDEX}: does not name {extra[0]}, which is in {where[extra[0]]}{_more(extra)}")


def _check_names(weight_map: Mapping[str, str], expected: Mapping[str, TensorSpec], model: str) -> None:
    missing = [name for name in expected if name not in weight_map]
    extra = [name for name in weight_map if name not in expected]
    if missing:
        near = _nearest(missing[0], extra)
        raise CheckpointError(f"{missing[0]}: not in the checkpoint, expected for {model}{near}{_more(missing)}")
    if extra:
        raise CheckpointError(f"{extra[0]}: in {weight_map[extra[0]]}, but {model} has no such tensor{_more(extra)}")


def _nearest(name: str, others: Sequence[str]) -> str:
    # Comparing with everything in a checkpoint of another model would take minutes.
    close = difflib.get_close_matches(name, others[:1000], n=1, cutoff=0.6)
    return f" (it has {close[0]})" if close else ""


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _first(mask: Tensor) -> list[int]:
    index: list[int] = mask.nonzero()[0].tolist()
    return index
