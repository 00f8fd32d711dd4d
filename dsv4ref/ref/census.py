"""Every tensor of a released checkpoint, derived from the configuration alone: name, shape, stored dtype.

    embed, layers.N.*, norm, head, hc_head_*, mtp.M.*        flat names, no "model." prefix; no embedding or head of its
                                                             own in an MTP block

How weights are stored: matrices of attention, of the shared expert and of the MTP projections as FP8 e4m3 with one
UE8M0 scale per 128 x 128 block; routed experts as FP4 e2m1, two to an int8 along K, with one UE8M0 scale per 32 of K;
what steers (router, compressor, indexer weights, norms) as bf16; what is small and delicate (sinks, biases, position
tables, hyper-connections) as fp32; token-to-expert tables as int64.

Source: DeepSeek-V4 inference/model.py and convert.py, and the released safetensors headers; the sums over this table
reproduce the published index files to the byte. `-Base` checkpoints store routed experts differently; they are not
described here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from dsv4ref.config import C4, ModelConfig
from dsv4ref.formats import mxfp4
from dsv4ref.ref.projection import WEIGHT_BLOCK

__all__ = [
    "DTYPES",
    "TensorSpec",
    "census",
    "is_quantised",
    "parameters",
    "rows",
    "scale_name",
    "total_bytes",
    "totals",
]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I8": torch.int8,
        "I64": torch.int64,
    }
)
"""What safetensors calls the stored dtypes, and torch's name for each."""


class TensorSpec(NamedTuple):
    """One stored tensor: its shape as stored (an FP4 matrix has half as many columns) and a key of ``DTYPES``."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Stored elements; an int8 that holds two FP4 codes is one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, header left out."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> int:
        """Numbers of the model in it: two per int8, none in a scale or an index table."""
        return {"F8_E8M0": 0, "I64": 0, "I8": 2}.get(self.dtype, 1) * self.elements

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the numbers it stands for: an FP4 matrix unpacked, anything else as stored."""
        return (*self.shape[:-1], 2 * self.shape[-1]) if self.dtype == "I8" else self.shape

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_Named: TypeAlias = Iterator[tuple[str, TensorSpec]]


def census(config: ModelConfig) -> Mapping[str, TensorSpec]:
    """Derive every tensor of a model's checkpoint.

    Args:
        config: the model.

    Returns:
        name -> spec, read-only, in the order in which a forward pass meets them, MTP blocks last.

    Raises:
        TypeError: ``config`` is no V4 model.
        ValueError: it has no released storage form: experts that are not FP4, or not exactly one shared expert.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a ModelConfig")
    if config.expert_dtype != "fp4":
        raise ValueError(
            f"expert_dtype: got {config.expert_dtype!r}, expected 'fp4' (-Base checkpoints, whose routed experts are "
            "fp8 with fp32 scales, are not supported)"
        )
    if config.n_shared_experts != 1:
        raise ValueError(f"n_shared_experts: got {config.n_shared_experts}, expected 1")
    return _census(config)


# Pro has 145,116 tensors: deriving them takes half a second, and every sum below starts from them.
@functools.lru_cache(maxsize=4)
def _census(config: ModelConfig) -> Mapping[str, TensorSpec]:
    return MappingProxyType(dict(_checkpoint(config)))


def is_quantised(spec: TensorSpec) -> bool:
    """Whether a tensor is codes that mean nothing without the scale beside them."""
    return spec.dtype in ("F8_E4M3", "I8")


def scale_name(name: str) -> str:
    """Name of the scale that belongs to a quantised weight: ``...wq_a.weight`` -> ``...wq_a.scale``."""
    return name.removesuffix("weight") + "scale"


def total_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors, which is ``metadata.total_size`` of the index file."""
    return sum(spec.nbytes for spec in census(config).values())


def parameters(config: ModelConfig, *, mtp: bool = False) -> int:
    """Numbers in the model: embedding, head and every weight, scales and index tables left out.

    Args:
        config: the model.
        mtp: count the MTP blocks too.
    """
    return sum(spec.parameters for name, spec in census(config).items() if mtp or not name.startswith("mtp."))


def totals(config: ModelConfig) -> list[dict[str, Any]]:
    """Sums by stored dtype, largest first, then over everything.

    Returns:
        Rows ``{"dtype", "tensors", "elements", "bytes"}``; the last one's dtype is ``"total"``.
    """
    specs = list(census(config).values())
    groups = {dtype: [spec for spec in specs if spec.dtype == dtype] for dtype in {spec.dtype for spec in specs}}
    by_size = sorted(groups.items(), key=lambda item: -sum(spec.nbytes for spec in item[1]))
    return [
        {
            "dtype": dtype,
            "tensors": len(group),
            "elements": sum(spec.elements for spec in group),
            "bytes": sum(spec.nbytes for spec in group),
        }
        for dtype, group in [*by_size, ("total", specs)]
    ]


def rows(config: ModelConfig) -> list[dict[str, Any]]:
    """The checkpoint in about a hundred lines: tensors that differ only in layer or expert number are one row.

    Returns:
        Rows ``{"tensor", "shape", "dtype", "count", "bytes"}`` in order of first appearance; ``tensor`` has ``*`` for
        each number, ``bytes`` is the sum over all ``count``. C4 and C128 compressors differ in shape, hence in row.
    """
    counts: dict[tuple[str, TensorSpec], int] = {}
    for name, spec in census(config).items():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), spec
        counts[key] = counts.get(key, 0) + 1
    return [
        {
            "tensor": name,
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "count": count,
            "bytes": count * spec.nbytes,
        }
        for (name, spec), count in counts.items()
    ]


# --- the tables -------------------------------------------------------------------------------------------------------
# D hidden, V vocabulary, H heads, G output groups, E experts, I expert width, r compression ratio, S residual streams.


def _checkpoint(m: ModelConfig) -> _Named:
    D, V = m.hidden_size, m.vocab_size
    yield "embed.weight", TensorSpec((V, D), "BF16")
    for layer in range(m.n_layers):
        yield from _block(m, layer, f"layers.{layer}.")
    yield "norm.weight", TensorSpec((D,), "BF16")
    yield "head.weight", TensorSpec((V, D), "BF16")
    yield from _hyper_connection("hc_head_", m, mixes=m.hc_mult, scales=1)
    for block in range(m.n_mtp_layers):
        prefix = f"mtp.{block}."
        yield from _norm(f"{prefix}enorm", D)
        yield from _norm(f"{prefix}hnorm", D)
        yield from _fp8(f"{prefix}e_proj", D, D)
        yield from _fp8(f"{prefix}h_proj", D, D)
        yield from _block(m, m.n_layers + block, prefix)
        yield from _norm(f"{prefix}norm", D)
        yield from _hyper_connection(f"{prefix}hc_head_", m, mixes=m.hc_mult, scales=1)


def _block(m: ModelConfig, layer: int, prefix: str) -> _Named:
    # Sigmoid inputs for pre and post, and the S x S matrix for Sinkhorn; each of the three has a scale.
    mixes = 2 * m.hc_mult + m.hc_mult**2
    yield from _hyper_connection(f"{prefix}hc_attn_", m, mixes=mixes, scales=3)
    yield from _norm(f"{prefix}attn_norm", m.hidden_size)
    yield from _attention(m, m.ratio(layer), f"{prefix}attn.")
    yield from _hyper_connection(f"{prefix}hc_ffn_", m, mixes=mixes, scales=3)
    yield from _norm(f"{prefix}ffn_norm", m.hidden_size)
    yield from _experts(m, f"{prefix}ffn.", hash_routed=m.is_hash_layer(layer))


def _attention(m: ModelConfig, ratio: int, prefix: str) -> _Named:
    D = m.hidden_size
    groups, rank, width = m.wo_a_shape
    yield from _fp8(f"{prefix}wq_a", m.q_lora_rank, D)
    yield from _norm(f"{prefix}q_norm", m.q_lora_rank)
    yield from _fp8(f"{prefix}wq_b", m.n_heads * m.head_dim, m.q_lora_rank)
    yield from _fp8(f"{prefix}wkv", m.head_dim, D)
    yield from _norm(f"{prefix}kv_norm", m.head_dim)
    yield f"{prefix}attn_sink", TensorSpec((m.n_heads,), "F32")
    if ratio:
        yield from _compressor(m, ratio, m.head_dim, f"{prefix}compressor.")
    if ratio == C4:
        yield from _fp8(f"{prefix}indexer.wq_b", m.index_n_heads * m.index_head_dim, m.q_lora_rank)
        yield f"{prefix}indexer.weights_proj.weight", TensorSpec((m.index_n_heads, D), "BF16")
        yield from _compressor(m, ratio, m.index_head_dim, f"{prefix}indexer.compressor.")
    yield from _fp8(f"{prefix}wo_a", groups * rank, width)
    yield from _fp8(f"{prefix}wo_b", D, groups * rank)


def _compressor(m: ModelConfig, ratio: int, width: int, prefix: str) -> _Named:
    # C4 windows overlap: one half of the columns for the previous window, one for the current.
    wide = 2 * width if ratio == C4 else width
    yield f"{prefix}ape", TensorSpec((ratio, wide), "F32")
    yield f"{prefix}wkv.weight", TensorSpec((wide, m.hidden_size), "BF16")
    yield f"{prefix}wgate.weight", TensorSpec((wide, m.hidden_size), "BF16")
    yield from _norm(f"{prefix}norm", width)


def _experts(m: ModelConfig, prefix: str, *, hash_routed: bool) -> _Named:
    D, inter, E = m.hidden_size, m.moe_inter_dim, m.router.n_experts
    shapes = {"w1": (inter, D), "w2": (D, inter), "w3": (inter, D)}  # gate, down, up
    yield f"{prefix}gate.weight", TensorSpec((E, D), "BF16")
    if hash_routed:
        yield f"{prefix}gate.tid2eid", TensorSpec((m.vocab_size, m.router.top_k), "I64")
    else:
        yield f"{prefix}gate.bias", TensorSpec((E,), "F32")
    for expert in range(E):
        for name, (rows_, columns) in shapes.items():
            yield f"{prefix}experts.{expert}.{name}.weight", TensorSpec((rows_, columns // 2), "I8")
            yield f"{prefix}experts.{expert}.{name}.scale", TensorSpec((rows_, columns // mxfp4.BLOCK), "F8_E8M0")
    for name, shape in shapes.items():
        yield from _fp8(f"{prefix}shared_experts.{name}", *shape)


def _hyper_connection(prefix: str, m: ModelConfig, *, mixes: int, scales: int) -> _Named:
    yield f"{prefix}fn", TensorSpec((mixes, m.hc_mult * m.hidden_size), "F32")
    yield f"{prefix}base", TensorSpec((mixes,), "F32")
    yield f"{prefix}scale", TensorSpec((scales,), "F32")


def _norm(prefix: str, width: int) -> _Named:
    yield f"{prefix}.weight", TensorSpec((width,), "BF16")


def _fp8(prefix: str, out_width: int, in_width: int) -> _Named:
    blocks = math.ceil(out_width / WEIGHT_BLOCK), math.ceil(in_width / WEIGHT_BLOCK)
    yield f"{prefix}.weight", TensorSpec((out_width, in_width), "F8_E4M3")
    yield f"{prefix}.scale", TensorSpec(blocks, "F8_E8M0")
