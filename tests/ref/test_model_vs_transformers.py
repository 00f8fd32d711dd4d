"""The whole reference against an implementation that was not written here: transformers' ``deepseek_v4``.

Same random weights, fp32, every format off. Prefill, and prefill followed by decode at the splits where caches,
compressor groups and the window change hands, against ONE forward pass of transformers without any cache.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import Recorded, assert_close, random_tokens, random_weights, tiny
from torch import Tensor

from dsv4ref.config import V4_TINY, ModelConfig
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.mtp import mtp_inputs_ref, mtp_ref, new_mtp_sequence
from dsv4ref.ref.numerics import STRUCTURE

# Untyped on purpose: its annotations do not know what its own configuration accepts. conftest has imported
# dsv4ref.kernels by now; before that, transformers would take kernels/ on sys.path for a package of its own.
transformers: Any = importlib.import_module("transformers")

LIMIT = 2e-5
"""Of |dlogit|, for logits with a standard deviation of about 1: fp32 sums in another order, four layers deep."""

ROUTER = tiny((0,)).router
CONFIGS: dict[str, tuple[ModelConfig, int]] = {
    # Flash's beginning, with the released YaRN; all three kinds of layer, one hash layer.
    "flash": (tiny((0, 4, 128, 4), swiglu_limit=0.7), 262),
    # Pro's beginning, compressed from layer 0; a short original context, so that YaRN moves every slow pair visibly.
    "pro": (
        tiny((128, 128, 4, 128), original_seq_len=256, swiglu_limit=0.7, router=replace(ROUTER, route_scale=2.5)),
        261,
    ),
    # Wider heads, other groups, several hash layers, C4 in front; constants that released models share, all different.
    "mixed": (
        tiny(
            (4, 0, 4, 128),
            head_dim=192,
            n_heads=4,
            o_groups=4,
            n_hash_layers=3,
            index_topk=16,
            original_seq_len=512,
            swiglu_limit=2.0,
            norm_eps=0.02,
            hc_eps=0.003,
            hc_sinkhorn_iters=5,
            rope_theta=3000.0,
            compress_rope_theta=50000.0,
            rope_factor=8.0,
            beta_fast=24.0,
            beta_slow=2.0,
        ),
        135,
    ),
    # Heads of the released width.
    "wide": (V4_TINY, 134),
}
CASES = [("flash", 0), ("flash", 1), ("pro", 2), ("pro", 3), ("mixed", 4), ("mixed", 5), ("wide", 7)]


def test_the_configurations_cover_what_they_should() -> None:
    ratios = {ratio for config, _ in CONFIGS.values() for ratio in config.main_ratios}
    assert ratios == {0, 4, 128}
    for config, tokens in CONFIGS.values():
        assert config.index_n_heads == 64
        assert tokens // 4 > config.index_topk, "the top-k must drop entries"
        assert 0 < config.n_hash_layers < config.n_layers


LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")


def hf_state(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The weights under transformers' names, and which of ours went in; MTP has no counterpart there."""
    state, used = {}, set()
    for name, tensor in tensors.items():
        layer = re.match(r"layers\.(\d+)\.(.*)", name)
        if name in TOP_NAMES:
            state[TOP_NAMES[name]] = tensor
        elif layer and layer[2] in LAYER_NAMES:
            state[f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}"] = tensor
        elif not EXPERT.fullmatch(name):
            continue
        used.add(name)
    for layer_number in range(config.n_layers):
        experts = [f"layers.{layer_number}.ffn.experts.{e}" for e in range(config.router.n_experts)]
        gate_up = [torch.cat((tensors[f"{e}.w1.weight"], tensors[f"{e}.w3.weight"])) for e in experts]
        state[f"model.layers.{layer_number}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        down = torch.stack([tensors[f"{e}.w2.weight"] for e in experts])
        state[f"model.layers.{layer_number}.mlp.experts.down_proj"] = down
    return state, used


def hf_model(config: ModelConfig, tensors: dict[str, Tensor]) -> torch.nn.Module:
    rope = {
        "rope_type": "yarn",
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.original_seq_len,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
    }
    hf_config = transformers.DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_inter_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        head_dim=config.head_dim,
        qk_rope_head_dim=config.rope_head_dim,
        q_lora_rank=config.q_lora_rank,
        num_experts_per_tok=config.router.top_k,
        n_routed_experts=config.router.n_experts,
        routed_scaling_factor=config.router.route_scale,
        max_position_embeddings=config.max_position,
        rope_theta=config.rope_theta,
        compress_rope_theta=config.compress_rope_theta,
        rope_parameters=rope,
        compress_ratios=list(config.main_ratios),
        num_hash_layers=config.n_hash_layers,
        hc_mult=config.hc_mult,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        swiglu_limit=config.swiglu_limit,
        sliding_window=config.window_size,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        index_n_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_topk=config.index_topk,
        rms_norm_eps=config.norm_eps,
        attn_implementation="eager",
        experts_implementation="eager",
        use_cache=False,
    )
    assert hf_config.rope_parameters["compress"]["attention_factor"] == 1.0
    model = transformers.DeepseekV4ForCausalLM(hf_config).to(torch.float32).eval()
    state, used = hf_state(config, tensors)
    assert set(state) == set(model.state_dict()), set(state) ^ set(model.state_dict())
    assert used == {name for name in tensors if not name.startswith("mtp.")}, "a weight of ours has no place"
    model.load_state_dict(state, strict=True)
    return model


@functools.cache
def case(name: str, seed: int) -> tuple[Model, Tensor, Tensor]:
    """Our model, its tokens, and transformers' logits for them."""
    config, count = CONFIGS[name]
    tensors = random_weights(config, seed)
    tokens = random_tokens(config, count, seed)
    with torch.no_grad():
        logits = hf_model(config, tensors)(input_ids=tokens[None]).logits[0]
    assert logits.std() > 0.5, "the limit is for logits of order 1"
    return Model(config, tensors, STRUCTURE), tokens, logits


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_prefill(name: str, seed: int) -> None:
    model, tokens, want = case(name, seed)
    recorded = Recorded(model.tensors)
    output, _ = forward_ref(Model(model.config, recorded, STRUCTURE), tokens)
    assert_close(output.logits, want, LIMIT, f"{name}, seed {seed}: logits [position, token]")
    unread = {n for n in model.tensors if not n.startswith("mtp.")} - recorded.read
    assert not unread, f"weights that no part of the reference read: {sorted(unread)}"


@pytest.mark.parametrize(("name", "seed"), [("flash", 0), ("pro", 2)])
@pytest.mark.parametrize("split", [3, 4, 5, 127, 128, 129, 130, 131, 132, 256])
def test_prefill_then_decode(name: str, seed: int, split: int) -> None:
    """Six tokens one by one after a prompt of ``split``: across the next group's end, wherever the split fell in it."""
    model, tokens, want = case(name, seed)
    output, state = forward_ref(model, tokens[:split])
    logits = [output.logits]
    for p in range(split, min(split + 6, tokens.shape[0])):
        output, state = forward_ref(model, tokens[p : p + 1], state)
        logits.append(output.logits)
    end = state.position
    assert end > split
    assert_close(torch.cat(logits), want[:end], LIMIT, f"{name}, prompt of {split}: logits [position, token]")


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_decode_from_the_first_token(name: str, seed: int) -> None:
    """Every position decoded alone: all hand-overs of all caches, at every remainder of 4 and of 128."""
    model, tokens, want = case(name, seed)
    state, logits = None, []
    for p in range(tokens.shape[0]):
        output, state = forward_ref(model, tokens[p : p + 1], state)
        logits.append(output.logits)
    assert_close(torch.cat(logits), want, LIMIT, f"{name}, seed {seed}: logits [position, token]")


@functools.cache
def mtp_case() -> tuple[Model, Tensor, Tensor, Tensor]:
    """An MTP block, its inputs, and the logits that a one-layer transformers model gives for the same inputs.

    transformers has no MTP. Its ordinary layer, collapse, norm and head, loaded with the MTP block's weights and fed
    the joined streams in place of embeddings, are the block behind the join.
    """
    config = tiny((0,), n_hash_layers=0, swiglu_limit=0.7)
    tensors = random_weights(config, 6)
    model = Model(config, tensors, STRUCTURE)
    tokens = random_tokens(config, 141, 6)
    streams = forward_ref(model, tokens[:-1])[0].streams
    state = new_mtp_sequence(model)
    embedded = tensors["embed.weight"][tokens[1:]]
    joined = mtp_inputs_ref(streams, embedded, state.position + torch.arange(140), model, config.n_layers)

    swapped = dict(tensors)
    for name in tensors:
        if name.startswith("layers.0."):
            swapped[name] = tensors[name.replace("layers.0.", "mtp.0.")]
        elif f"mtp.0.{name}" in tensors:
            swapped[name] = tensors[f"mtp.0.{name}"]
    hf = hf_model(config, swapped)
    hf.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda _, args, kwargs: ((joined[None],), kwargs), with_kwargs=True
    )
    with torch.no_grad():
        return model, tokens, streams, hf(input_ids=tokens[None, 1:]).logits[0]


def test_the_mtp_block() -> None:
    model, tokens, streams, want = mtp_case()
    recorded = Recorded(model.tensors)
    output, _ = mtp_ref(Model(model.config, recorded, STRUCTURE), tokens[1:], streams)
    assert_close(output.logits, want, LIMIT, "MTP logits [position, token]")
    unread = {name for name in model.tensors if name.startswith("mtp.")} - recorded.read
    assert not unread, f"weights that no part of the MTP block read: {sorted(unread)}"


def test_chunks_of_uneven_size() -> None:
    model, tokens, want = case("flash", 1)
    state, logits = None, []
    for chunk in tokens.split([1, 2, 4, 57, 63, 2, 71, 3, 58, 1]):
        output, state = forward_ref(model, chunk, state)
        logits.append(output.logits)
    assert_close(torch.cat(logits), want, LIMIT, "logits [position, token]")


@pytest.mark.parametrize(
    ("name", "seed", "change"),
    [
        (name, seed, change)
        for name, seed in (("flash", 0), ("pro", 2), ("mixed", 4))
        for change in ({"swiglu_limit": 1e9}, {"rope_factor": 1.0}, {"index_topk": 10**6})
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_what_the_cases_exercise_changes_the_logits(name: str, seed: int, change: dict[str, Any]) -> None:
    """The clamp is active, YaRN moves something, the top-k drops something: each by far more than the limit."""
    model, tokens, want = case(name, seed)
    other = Model(replace(model.config, **change), model.tensors, STRUCTURE)
    difference = (forward_ref(other, tokens)[0].logits - want).abs().max().item()
    assert difference > 100 * LIMIT, f"{change} changes logits by {difference} only"
