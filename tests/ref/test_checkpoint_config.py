"""config.json: the published file is the model that it names, and a file that differs is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import SMALL

from dsv4ref.config import V4_FLASH, V4_PRO, V4_TINY, ModelConfig
from dsv4ref.ref import checkpoint_writer
from dsv4ref.ref.checkpoint import CheckpointError, inspect
from dsv4ref.ref.checkpoint_config import FILE, as_json, compare, read_config

# deepseek-ai/DeepSeek-V4-Flash, config.json of the first release.
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_act": "silu",
    "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512, "initializer_range": 0.02,
    "max_position_embeddings": 1048576, "model_type": "deepseek_v4", "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 6, "num_hidden_layers": 43, "num_hash_layers": 3, "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1, "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128,
    "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 129280, "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip


def _written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / FILE).write_text(json.dumps(content))
    return folder


def test_published_file_is_flash(tmp_path: Path) -> None:
    assert read_config(_written(tmp_path, FLASH)) == replace(V4_FLASH, name=tmp_path.name)
    compare(tmp_path, V4_FLASH)


@pytest.mark.parametrize("model", [V4_FLASH, V4_PRO, V4_TINY, SMALL], ids=lambda model: model.name)
def test_written_file_reads_back_as_the_same_configuration(model: ModelConfig, tmp_path: Path) -> None:
    assert read_config(_written(tmp_path, as_json(model))) == replace(model, name=tmp_path.name)
    compare(tmp_path, model)


def test_written_file_has_the_published_keys_and_values() -> None:
    written = as_json(V4_FLASH)
    # Not of the model: how transformers trained or cached. And one key of later releases.
    assert set(FLASH) - set(written) == {"attention_dropout", "initializer_range", "transformers_version", "use_cache"}
    assert set(written) - set(FLASH) == {"expert_dtype"}
    for key in set(written) & set(FLASH) - {"quantization_config"}:
        assert written[key] == FLASH[key], key
    assert written["quantization_config"].items() <= FLASH["quantization_config"].items()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", 2.5), ("swiglu_limit", 0), ("rope_theta", 160000), ("index_topk", 1024),
        ("norm_topk_prob", False), ("num_hash_layers", 2), ("compress_ratios", [0, 0, *[128, 4] * 20, 128, 0]),
        ("sliding_window", "128"), ("hidden_size", None),
    ],
)  # fmt: skip
def test_value_that_no_shape_would_show_is_compared(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{FILE}: {key} is .*, expected .* for v4-flash"):
        compare(_written(tmp_path, {**FLASH, key: value}), V4_FLASH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear', expected 'yarn'"),
        ({"quantization_config": {"weight_block_size": [64, 64]}}, r"weight_block_size is \[64, 64\], expected \[128"),
        ({"quantization_config": {"scale_fmt": "float"}}, "scale_fmt is 'float', expected 'ue8m0'"),
        ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32', expected 'deepseek_v4'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ],
)
def test_file_of_another_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _written(tmp_path, {**FLASH, **changes})
    for attempt in (lambda: compare(tmp_path, V4_FLASH), lambda: read_config(tmp_path)):
        with pytest.raises(CheckpointError, match=f"{FILE}: .*{message}"):
            attempt()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 0, 4]}, r"compress_ratios: got 3 entries, expected .* = 44"),
        ({"compress_ratios": [0, 0, *[4, 64] * 20, 4, 0]}, "compress_ratios: entry 3 is 64, expected 0, 4 or 128"),
        ({"o_groups": 7}, "o_groups: got 7, expected a divisor of n_heads = 64"),
        ({"num_attention_heads": "64"}, "n_heads: got '64', expected an integer"),
        ({"scoring_func": "softmax"}, "scoring: got 'softmax'"),
        ({"num_experts_per_tok": 300}, "top_k: got 300, expected at most 256"),
        ({"num_key_value_heads": 8}, "n_kv_heads: got 8, expected 1"),
        ({"hidden_size": 4097}, "hidden_size: got 4097, expected a multiple of 32"),
    ],
)
def test_configuration_that_violates_an_invariant_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^{FILE}: {message}"):
        read_config(_written(tmp_path, {**FLASH, **changes}))


@pytest.mark.parametrize("key", ["compress_ratios", "vocab_size", "n_routed_experts"])
def test_missing_key_is_refused_unless_both_released_models_share_its_value(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}: has no {key}"):
        read_config(_written(tmp_path, {name: value for name, value in FLASH.items() if name != key}))
    without = {name: value for name, value in FLASH.items() if name not in ("hc_eps", "sliding_window", "rope_scaling")}
    assert read_config(_written(tmp_path, without)) == replace(V4_FLASH, name=tmp_path.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("3", "holds a int"), ('{"hc_mult": 4, "hc_mult": 5}', "has 'hc_mult' twice")],
)
def test_unreadable_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{FILE}: {message}"):
        read_config(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{FILE}: No such file or directory in "):
        read_config(tmp_path)


def test_checkpoint_whose_configuration_differs_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_writer.write_random(tmp_path / "small", SMALL)
    assert inspect(folder, read_config(folder)).config == SMALL
    with pytest.raises(CheckpointError, match=f"{FILE}: swiglu_limit is 10.0, expected 7.0 for small"):
        inspect(folder, replace(SMALL, swiglu_limit=7.0))
    (folder / FILE).unlink()
    assert inspect(folder, replace(SMALL, swiglu_limit=7.0)).config.swiglu_limit == 7.0


def test_base_configuration_is_named_as_such(tmp_path: Path) -> None:
    _written(tmp_path, {**FLASH, "expert_dtype": "fp8"})
    for attempt in (lambda: compare(tmp_path, V4_FLASH), lambda: read_config(tmp_path)):
        with pytest.raises(CheckpointError, match=f"{FILE}: expert_dtype is 'fp8', expected 'fp4' .*-Base"):
            attempt()
