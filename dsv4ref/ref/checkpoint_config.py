"""A checkpoint's ``config.json``: the published key names on one side, `ModelConfig` on the other.

Shapes alone do not tell two models apart: the route scale, the clamp, the rotary bases and the top-k could all differ
without any tensor changing size. So a loader compares this file with the configuration it is given.

Source: config.json of deepseek-ai/DeepSeek-V4-Flash and -Pro.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv4ref.config import ModelConfig, RouterConfig

__all__ = ["FILE", "CheckpointError", "as_json", "compare", "read_config", "read_json"]

FILE = "config.json"
"""Name of the configuration file."""


class CheckpointError(ValueError):
    """A checkpoint is not what it should be; nothing of it was used."""


# Dots lead into nested objects, here and in the tables below.
_MODEL_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "n_layers",
        "num_nextn_predict_layers": "n_mtp_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "qk_rope_head_dim": "rope_head_dim",
        "q_lora_rank": "q_lora_rank",
        "o_groups": "o_groups",
        "o_lora_rank": "o_lora_rank",
        "sliding_window": "window_size",
        "index_n_heads": "index_n_heads",
        "index_head_dim": "index_head_dim",
        "index_topk": "index_topk",
        "n_shared_experts": "n_shared_experts",
        "moe_intermediate_size": "moe_inter_dim",
        "swiglu_limit": "swiglu_limit",
        "num_hash_layers": "n_hash_layers",
        "hc_mult": "hc_mult",
        "hc_sinkhorn_iters": "hc_sinkhorn_iters",
        "hc_eps": "hc_eps",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rope_theta",
        "compress_rope_theta": "compress_rope_theta",
        "rope_scaling.factor": "rope_factor",
        "rope_scaling.original_max_position_embeddings": "original_seq_len",
        "rope_scaling.beta_fast": "beta_fast",
        "rope_scaling.beta_slow": "beta_slow",
        "max_position_embeddings": "max_position",
        "expert_dtype": "expert_dtype",
        "bos_token_id": "bos_id",
        "eos_token_id": "eos_id",
        "compress_ratios": "compress_ratios",
    }
)
_ROUTER_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "n_routed_experts": "n_experts",
        "num_experts_per_tok": "top_k",
        "scoring_func": "scoring",
        "routed_scaling_factor": "route_scale",
        "norm_topk_prob": "norm_topk_prob",
    }
)
# What every V4 file says and this package takes for granted; a file that says otherwise is another model's.
_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "deepseek_v4",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "rope_scaling.type": "yarn",
        "quantization_config.quant_method": "fp8",
        "quantization_config.fmt": "e4m3",
        "quantization_config.scale_fmt": "ue8m0",
        "quantization_config.weight_block_size": [128, 128],
    }
)


def read_config(folder: str | Path) -> ModelConfig:
    """Build the model's configuration from a checkpoint's ``config.json``.

    Args:
        folder: the checkpoint's folder, whose name becomes the model's name.

    Returns:
        The configuration; keys that the file leaves out have the value that both released models share.

    Raises:
        CheckpointError: no such file, no JSON, a key missing that has no shared value, or values that contradict each
            other or what this package computes.
    """
    path = Path(folder) / FILE
    content = _flat(read_json(path))
    _check_fixed(content)
    model = {ours: _frozen(content[theirs]) for theirs, ours in _MODEL_KEYS.items() if theirs in content}
    router = {ours: content[theirs] for theirs, ours in _ROUTER_KEYS.items() if theirs in content}
    for cls, keys, values in ((RouterConfig, _ROUTER_KEYS, router), (ModelConfig, _MODEL_KEYS, model)):
        required = {item.name for item in fields(cls) if item.default is MISSING}
        if absent := [theirs for theirs, ours in keys.items() if ours in required and ours not in values]:
            raise CheckpointError(f"{FILE}: has no {absent[0]}, expected one in {path}")
    try:
        return ModelConfig(name=path.parent.resolve().name, router=RouterConfig(**router), **model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{FILE}: {error}") from error


def compare(folder: str | Path, config: ModelConfig) -> None:
    """Compare a checkpoint's ``config.json`` with a configuration, in every value that the file gives.

    Raises:
        CheckpointError: they differ, or the file is not readable.
    """
    content = _flat(read_json(Path(folder) / FILE))
    _check_fixed(content)
    for keys, holder in ((_MODEL_KEYS, config), (_ROUTER_KEYS, config.router)):
        for theirs, ours in keys.items():
            if theirs in content and _frozen(content[theirs]) != (wanted := getattr(holder, ours)):
                raise CheckpointError(
                    f"{FILE}: {theirs} is {content[theirs]!r}, expected {_thawed(wanted)!r} for {config.name}"
                )


def as_json(config: ModelConfig) -> dict[str, Any]:
    """The content of ``config.json`` for a configuration, as the released models write it."""
    flat: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": "bfloat16", **_FIXED}
    flat |= {theirs: _thawed(getattr(config, ours)) for theirs, ours in _MODEL_KEYS.items()}
    flat |= {theirs: getattr(config.router, ours) for theirs, ours in _ROUTER_KEYS.items()}
    content: dict[str, Any] = {}
    for key, value in flat.items():
        outer, _, inner = key.rpartition(".")
        (content.setdefault(outer, {}) if outer else content)[inner] = value
    return content


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        CheckpointError: the file is missing or unreadable, holds no object, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path.name}: has {key!r} twice, expected it once")
            found[key] = value
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: {error.strerror} in {path.parent}, expected a checkpoint's file"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path.name}: is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: holds a {type(content).__name__}, expected an object")
    return content


def _check_fixed(content: Mapping[str, Any]) -> None:
    if content.get("expert_dtype", "fp4") != "fp4":
        raise CheckpointError(
            f"{FILE}: expert_dtype is {content['expert_dtype']!r}, expected 'fp4' (-Base checkpoints, whose routed "
            "experts are fp8 with fp32 scales, are not supported)"
        )
    for key, wanted in _FIXED.items():
        if key in content and content[key] != wanted:
            raise CheckpointError(f"{FILE}: {key} is {content[key]!r}, expected {wanted!r}")


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
