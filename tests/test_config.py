"""Model shapes against the published tables, the checkpoint's own byte count, and the known traps."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from dsv4ref import config
from dsv4ref.config import MODELS, V3_2, V4_FLASH, V4_PRO, V4_TINY, ModelConfig, RouterConfig, get_model


@pytest.mark.parametrize(
    ("model", "main", "total", "swa", "c4", "c128", "first", "last_main"),
    [(V4_FLASH, 43, 44, 2, 21, 20, (0, 0, 4, 128), 4), (V4_PRO, 61, 62, 0, 30, 31, (128, 128, 4, 128), 4)],
    ids=["flash", "pro"],
)
def test_layer_list_matches_the_released_one(
    model: ModelConfig, main: int, total: int, swa: int, c4: int, c128: int, first: tuple[int, ...], last_main: int
) -> None:
    assert (model.n_layers, len(model.compress_ratios)) == (main, total)
    assert (model.n_swa_layers, model.n_c4_layers, model.n_c128_layers) == (swa, c4, c128)
    assert model.compress_ratios[:4] == first
    assert model.ratio(model.n_layers - 1) == last_main
    assert model.compress_ratios[model.n_layers :] == (0,)
    assert {model.ratio(layer) for layer in range(2, model.n_layers, 2)} == {4}
    assert {model.ratio(layer) for layer in range(3, model.n_layers, 2)} == {128}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            V4_FLASH,
            {
                "vocab_size": 129280, "hidden_size": 4096, "n_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
                "o_lora_rank": 1024, "index_topk": 512, "moe_inter_dim": 2048, "heads_per_group": 8,
                "wo_a_input_width": 4096, "wo_a_shape": (8, 1024, 4096), "topk_window_tokens": 2048,
                "first_dropping_context": 2052,
            },
        ),
        (
            V4_PRO,
            {
                "vocab_size": 129280, "hidden_size": 7168, "n_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
                "o_lora_rank": 1024, "index_topk": 1024, "moe_inter_dim": 3072, "heads_per_group": 8,
                "wo_a_input_width": 4096, "wo_a_shape": (16, 1024, 4096), "topk_window_tokens": 4096,
                "first_dropping_context": 4100,
            },
        ),
    ],
    ids=["flash", "pro"],
)  # fmt: skip
def test_sizes_match_the_published_table(model: ModelConfig, expected: dict[str, object]) -> None:
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize("model", [V4_FLASH, V4_PRO], ids=["flash", "pro"])
def test_values_both_models_share(model: ModelConfig) -> None:
    assert (model.head_dim, model.nope_dim, model.rope_head_dim, model.window_size) == (512, 448, 64, 128)
    assert (model.index_n_heads, model.index_head_dim, model.n_shared_experts, model.n_hash_layers) == (64, 128, 1, 3)
    assert (model.hc_mult, model.hc_sinkhorn_iters, model.hc_eps, model.norm_eps) == (4, 20, 1e-6, 1e-6)
    assert math.isclose(model.softmax_scale, 0.04419417, abs_tol=5e-9)
    assert math.isclose(model.index_scale, 0.01104854, abs_tol=5e-9)


def test_dataclass_defaults_of_the_reference_code_are_not_taken_for_release_values() -> None:
    for model in (V4_FLASH, V4_PRO):
        assert (model.rope_factor, model.original_seq_len, model.beta_fast, model.beta_slow) == (16, 65536, 32, 1)
        assert (model.rope_theta, model.compress_rope_theta, model.max_position) == (10000, 160000, 1048576)
        assert model.swiglu_limit == 10.0
    assert (V4_FLASH.router.n_experts, V4_FLASH.router.route_scale, V4_FLASH.router.top_k) == (256, 1.5, 6)
    assert (V4_PRO.router.n_experts, V4_PRO.router.route_scale, V4_PRO.router.top_k) == (384, 2.5, 6)
    assert {m.router.scoring for m in MODELS.values()} == {"sqrtsoftplus"}


def test_layer_two_is_c4_where_a_generated_list_would_say_c128() -> None:
    assert [m.layer_kind(2) for m in (V4_FLASH, V4_PRO)] == ["C4", "C4"]
    assert [m.layer_kind(0) for m in (V4_FLASH, V4_PRO)] == ["SWA", "C128"]


def test_rope_follows_the_layer_kind() -> None:
    assert [V4_FLASH.layer_rope_theta(layer) for layer in (0, 1, 2, 3, 43)] == [1e4, 1e4, 1.6e5, 1.6e5, 1e4]
    assert [V4_PRO.uses_yarn(layer) for layer in (0, 60, 61)] == [True, True, False]


def test_hash_layers_are_the_first_three_and_never_mtp() -> None:
    assert [layer for layer in range(44) if V4_FLASH.is_hash_layer(layer)] == [0, 1, 2]
    everything_hashed = replace(V4_TINY, n_hash_layers=V4_TINY.n_layers)
    assert not everything_hashed.is_hash_layer(V4_TINY.n_layers)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_layers_partition_the_main_model(model: ModelConfig) -> None:
    found = sorted(layer for ratio in (0, 4, 128) for layer in model.layers(ratio))
    assert found == list(range(model.n_layers))
    assert len(model.layers(4)) == model.n_c4_layers


@pytest.mark.parametrize(
    ("model", "layer", "context", "keys"),
    [
        (V4_FLASH, 2, 1048576, 640),
        (V4_PRO, 2, 1048576, 1152),
        (V4_FLASH, 3, 1048576, 128 + 8192),
        (V4_FLASH, 0, 1048576, 128),
        (V4_FLASH, 2, 3, 3),
        (V4_FLASH, 2, 4, 4 + 1),
        (V4_FLASH, 3, 127, 127),
        (V4_FLASH, 3, 128, 128 + 1),
        (V4_FLASH, 2, 2047, 128 + 511),
        (V4_FLASH, 2, 2048, 640),
    ],
)
def test_keys_per_query(model: ModelConfig, layer: int, context: int, keys: int) -> None:
    assert model.keys_per_query(layer, context) == keys


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_topk_drops_its_first_entry_at_the_stated_context(model: ModelConfig) -> None:
    layer, first = model.layers(4)[0], model.first_dropping_context
    dropped = [
        min(context, model.window_size) + context // 4 - model.keys_per_query(layer, context)
        for context in (model.topk_window_tokens, first - 1, first, first + 3, first + 4)
    ]
    assert dropped == [0, 0, 1, 1, 2]


def test_tensor_parallel_ranks_keep_whole_output_groups() -> None:
    assert [V4_FLASH.heads_per_rank(tp) for tp in (1, 2, 4, 8)] == [64, 32, 16, 8]
    assert [V4_PRO.heads_per_rank(tp) for tp in (8, 16)] == [16, 8]
    for model, tp in ((V4_FLASH, 16), (V4_PRO, 32), (V4_FLASH, 3), (V4_FLASH, 0)):
        with pytest.raises(ValueError, match=f"tp: got {tp}, expected a divisor of o_groups = {model.o_groups}"):
            model.heads_per_rank(tp)


def test_v32_has_only_its_own_fields() -> None:
    assert (V3_2.hidden_size, V3_2.n_layers, V3_2.n_moe_layers, V3_2.n_heads) == (7168, 61, 58, 128)
    assert (V3_2.qk_dim, V3_2.v_dim, V3_2.rope_head_dim) == (576, 512, 64)
    assert (V3_2.index_n_heads, V3_2.index_head_dim, V3_2.index_topk) == (64, 128, 2048)
    router = V3_2.router
    assert (router.n_experts, router.n_groups, router.topk_groups, router.top_k) == (256, 8, 4, 8)
    assert (router.experts_per_group, router.scoring, router.route_scale) == (32, "sigmoid", 2.5)
    assert not any(hasattr(V3_2, name) for name in ("compress_ratios", "swiglu_limit", "hc_mult", "o_groups"))
    assert V4_FLASH.router.experts_per_group is None


def test_tiny_model_keeps_what_kernels_and_traps_depend_on() -> None:
    assert (V4_TINY.head_dim, V4_TINY.nope_dim, V4_TINY.window_size) == (512, 448, 128)
    assert V4_TINY.index_n_heads == 64, "few index heads give exact-zero score ties"
    assert V4_TINY.router.top_k == 6, "six slots per token are no power of two"
    assert set(V4_TINY.compress_ratios) == {0, 4, 128}
    assert {V4_TINY.is_hash_layer(layer) for layer in range(V4_TINY.n_layers)} == {True, False}
    assert V4_TINY.first_dropping_context < 128


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": (0, 0, 4, 128)}, r"compress_ratios: got 4 entries, expected .* 4 \+ 1 = 5"),
        ({"compress_ratios": (0, 0, 4, 64, 0)}, "compress_ratios: entry 3 is 64, expected 0, 4 or 128"),
        ({"compress_ratios": (0, 0, 4, 128, 4)}, "compress_ratios: entry 4 is an MTP block with ratio 4, expected 0"),
        ({"o_groups": 3}, "o_groups: got 3, expected a divisor of n_heads = 8"),
        ({"n_kv_heads": 2}, "n_kv_heads: got 2, expected 1"),
        ({"rope_head_dim": 63}, "rope_head_dim: got 63, expected an even number"),
        ({"rope_head_dim": 128}, "rope_head_dim: got 128, .* index_head_dim = 128"),
        ({"head_dim": 500}, "head_dim: got 500, .* = 436 to be a multiple of 64"),
        ({"index_head_dim": 96}, "index_head_dim: got 96, expected a power of two"),
        ({"hidden_size": 250}, "hidden_size: got 250, expected a multiple of 32"),
        ({"moe_inter_dim": 100}, "moe_inter_dim: got 100, expected a multiple of 32"),
        ({"n_hash_layers": 5}, "n_hash_layers: got 5, expected 0 to n_layers = 4"),
        ({"n_heads": 0}, "n_heads: got 0, expected a finite number above 0"),
        ({"n_hash_layers": -1}, "n_hash_layers: got -1, expected a finite number 0 or more"),
        ({"hc_eps": float("nan")}, "hc_eps: got nan, expected a finite number above 0"),
        ({"compress_ratios": (0, False, 4, 128, 0)}, "compress_ratios: entry 1 is False, expected 0, 4 or 128"),
        ({"compress_ratios": (0, 0, 4.0, 128, 0)}, "compress_ratios: entry 2 is 4.0, expected 0, 4 or 128"),
        ({"rope_theta": 1.0}, "rope_theta: got 1.0, expected a base above 1"),
        ({"compress_rope_theta": 0.5}, "compress_rope_theta: got 0.5, expected a base above 1"),
        ({"beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast: got 1.0, expected at least beta_slow = 32.0"),
        ({"router": V3_2.router}, "router: got sigmoid with 8 groups, expected sqrtsoftplus with no groups"),
        ({"router": replace(V4_TINY.router, scoring="sigmoid")}, "router: got sigmoid with no groups, expected sqrts"),
    ],
)
def test_inconsistent_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(V4_TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 0, 4, 128, 0]}, "compress_ratios: got list, expected a tuple"),
        ({"n_heads": 8.0}, "n_heads: got 8.0, expected an integer"),
        ({"n_layers": True}, "n_layers: got True, expected an integer"),
        ({"rope_theta": "10000"}, "rope_theta: got '10000', expected a number"),
        ({"router": None}, "router: got NoneType, expected a RouterConfig"),
    ],
)
def test_wrong_type_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        replace(V4_TINY, **changes)


def test_renormalisation_is_yes_or_no() -> None:
    with pytest.raises(TypeError, match="norm_topk_prob: got 'false', expected True or False"):
        replace(V4_TINY.router, norm_topk_prob="false")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 7}, "n_groups: got 7, expected a divisor of n_experts = 256"),
        ({"topk_groups": None}, "topk_groups: got None with n_groups 8, expected both or neither"),
        ({"n_groups": 256}, "n_groups: got 256, expected at most n_experts / 2 = 128"),
        ({"topk_groups": 9}, "topk_groups: got 9, expected at most n_groups = 8"),
        ({"topk_groups": 1, "top_k": 33}, "top_k: got 33, expected at most 32"),
        ({"scoring": "softmax"}, "scoring: got 'softmax'"),
        ({"top_k": 0}, "top_k: got 0"),
    ],
)
def test_inconsistent_router_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(V3_2.router, **changes)


def test_inconsistent_v32_is_refused() -> None:
    with pytest.raises(ValueError, match="n_moe_layers: got 62, expected at most n_layers = 61"):
        replace(V3_2, n_moe_layers=62)
    with pytest.raises(ValueError, match="v_dim: got 600, expected at most qk_dim = 576"):
        replace(V3_2, v_dim=600)


def test_layer_and_context_out_of_range_are_refused() -> None:
    for layer in (-1, 44):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 43 for v4-flash"):
            V4_FLASH.ratio(layer)
    with pytest.raises(ValueError, match="context: got 0"):
        V4_FLASH.keys_per_query(0, 0)
    with pytest.raises(ValueError, match="ratio: got 1, expected 0, 4 or 128"):
        V4_FLASH.layers(1)


def test_models_are_frozen_and_hashable() -> None:
    with pytest.raises(FrozenInstanceError):
        V4_FLASH.n_heads = 1  # type: ignore[misc]
    assert len({V4_FLASH, V4_PRO, V4_TINY, replace(V4_TINY)}) == 3
    assert hash(RouterConfig(n_experts=8, top_k=2, scoring="sigmoid", route_scale=1.0)) == hash(
        RouterConfig(n_experts=8, top_k=2, scoring="sigmoid", route_scale=1.0)
    )


def test_get_model_by_name_and_nearest_name_error() -> None:
    assert [get_model(name) for name in ("v4-flash", "v4-pro", "v4-tiny")] == [V4_FLASH, V4_PRO, V4_TINY]
    with pytest.raises(ValueError, match=r"no model is called 'V4_Flash'; did you mean 'v4-flash'\?"):
        get_model("V4_Flash")
    with pytest.raises(ValueError, match=r"'zzz'; Models: v4-flash, v4-pro, v4-tiny"):
        get_model("zzz")
    with pytest.raises(ValueError, match=r"'v3.2' is no V4 model; its few shapes are config.V3_2"):
        get_model(config.V3_2.name)
