"""The derived tensor list against what is published: index totals, counts by dtype, and a listing of the headers."""

from collections import Counter
from dataclasses import replace

import pytest

from dsv4ref.config import V4_FLASH, V4_PRO, V4_TINY, ModelConfig
from dsv4ref.ref.census import (
    DTYPES,
    TensorSpec,
    census,
    is_quantised,
    parameters,
    rows,
    scale_name,
    total_bytes,
    totals,
)

# Headers of deepseek-ai/DeepSeek-V4-Flash's 46 shards: how many, name with * for numbers, dtype, shape.
FLASH_HEADERS = """
1 embed.weight BF16 129280x4096
1 norm.weight BF16 4096
1 head.weight BF16 129280x4096
1 hc_head_fn F32 4x16384
1 hc_head_base F32 4
1 hc_head_scale F32 1
43 layers.*.hc_attn_fn F32 24x16384
43 layers.*.hc_attn_base F32 24
43 layers.*.hc_attn_scale F32 3
43 layers.*.attn_norm.weight BF16 4096
43 layers.*.attn.wq_a.weight F8_E4M3 1024x4096
43 layers.*.attn.wq_a.scale F8_E8M0 8x32
43 layers.*.attn.q_norm.weight BF16 1024
43 layers.*.attn.wq_b.weight F8_E4M3 32768x1024
43 layers.*.attn.wq_b.scale F8_E8M0 256x8
43 layers.*.attn.wkv.weight F8_E4M3 512x4096
43 layers.*.attn.wkv.scale F8_E8M0 4x32
43 layers.*.attn.kv_norm.weight BF16 512
43 layers.*.attn.attn_sink F32 64
43 layers.*.attn.wo_a.weight F8_E4M3 8192x4096
43 layers.*.attn.wo_a.scale F8_E8M0 64x32
43 layers.*.attn.wo_b.weight F8_E4M3 4096x8192
43 layers.*.attn.wo_b.scale F8_E8M0 32x64
21 layers.*.attn.compressor.ape F32 4x1024
21 layers.*.attn.compressor.wkv.weight BF16 1024x4096
21 layers.*.attn.compressor.wgate.weight BF16 1024x4096
20 layers.*.attn.compressor.ape F32 128x512
20 layers.*.attn.compressor.wkv.weight BF16 512x4096
20 layers.*.attn.compressor.wgate.weight BF16 512x4096
41 layers.*.attn.compressor.norm.weight BF16 512
21 layers.*.attn.indexer.wq_b.weight F8_E4M3 8192x1024
21 layers.*.attn.indexer.wq_b.scale F8_E8M0 64x8
21 layers.*.attn.indexer.weights_proj.weight BF16 64x4096
21 layers.*.attn.indexer.compressor.ape F32 4x256
21 layers.*.attn.indexer.compressor.wkv.weight BF16 256x4096
21 layers.*.attn.indexer.compressor.wgate.weight BF16 256x4096
21 layers.*.attn.indexer.compressor.norm.weight BF16 128
43 layers.*.hc_ffn_fn F32 24x16384
43 layers.*.hc_ffn_base F32 24
43 layers.*.hc_ffn_scale F32 3
43 layers.*.ffn_norm.weight BF16 4096
43 layers.*.ffn.gate.weight BF16 256x4096
3 layers.*.ffn.gate.tid2eid I64 129280x6
40 layers.*.ffn.gate.bias F32 256
11008 layers.*.ffn.experts.*.w1.weight I8 2048x2048
11008 layers.*.ffn.experts.*.w1.scale F8_E8M0 2048x128
11008 layers.*.ffn.experts.*.w2.weight I8 4096x1024
11008 layers.*.ffn.experts.*.w2.scale F8_E8M0 4096x64
11008 layers.*.ffn.experts.*.w3.weight I8 2048x2048
11008 layers.*.ffn.experts.*.w3.scale F8_E8M0 2048x128
43 layers.*.ffn.shared_experts.w1.weight F8_E4M3 2048x4096
43 layers.*.ffn.shared_experts.w1.scale F8_E8M0 16x32
43 layers.*.ffn.shared_experts.w2.weight F8_E4M3 4096x2048
43 layers.*.ffn.shared_experts.w2.scale F8_E8M0 32x16
43 layers.*.ffn.shared_experts.w3.weight F8_E4M3 2048x4096
43 layers.*.ffn.shared_experts.w3.scale F8_E8M0 16x32
1 mtp.*.enorm.weight BF16 4096
1 mtp.*.hnorm.weight BF16 4096
1 mtp.*.norm.weight BF16 4096
1 mtp.*.e_proj.weight F8_E4M3 4096x4096
1 mtp.*.e_proj.scale F8_E8M0 32x32
1 mtp.*.h_proj.weight F8_E4M3 4096x4096
1 mtp.*.h_proj.scale F8_E8M0 32x32
1 mtp.*.hc_head_fn F32 4x16384
1 mtp.*.hc_head_base F32 4
1 mtp.*.hc_head_scale F32 1
1 mtp.*.hc_attn_fn F32 24x16384
1 mtp.*.hc_attn_base F32 24
1 mtp.*.hc_attn_scale F32 3
1 mtp.*.attn_norm.weight BF16 4096
1 mtp.*.attn.wq_a.weight F8_E4M3 1024x4096
1 mtp.*.attn.wq_a.scale F8_E8M0 8x32
1 mtp.*.attn.q_norm.weight BF16 1024
1 mtp.*.attn.wq_b.weight F8_E4M3 32768x1024
1 mtp.*.attn.wq_b.scale F8_E8M0 256x8
1 mtp.*.attn.wkv.weight F8_E4M3 512x4096
1 mtp.*.attn.wkv.scale F8_E8M0 4x32
1 mtp.*.attn.kv_norm.weight BF16 512
1 mtp.*.attn.attn_sink F32 64
1 mtp.*.attn.wo_a.weight F8_E4M3 8192x4096
1 mtp.*.attn.wo_a.scale F8_E8M0 64x32
1 mtp.*.attn.wo_b.weight F8_E4M3 4096x8192
1 mtp.*.attn.wo_b.scale F8_E8M0 32x64
1 mtp.*.hc_ffn_fn F32 24x16384
1 mtp.*.hc_ffn_base F32 24
1 mtp.*.hc_ffn_scale F32 3
1 mtp.*.ffn_norm.weight BF16 4096
1 mtp.*.ffn.gate.weight BF16 256x4096
1 mtp.*.ffn.gate.bias F32 256
256 mtp.*.ffn.experts.*.w1.weight I8 2048x2048
256 mtp.*.ffn.experts.*.w1.scale F8_E8M0 2048x128
256 mtp.*.ffn.experts.*.w2.weight I8 4096x1024
256 mtp.*.ffn.experts.*.w2.scale F8_E8M0 4096x64
256 mtp.*.ffn.experts.*.w3.weight I8 2048x2048
256 mtp.*.ffn.experts.*.w3.scale F8_E8M0 2048x128
1 mtp.*.ffn.shared_experts.w1.weight F8_E4M3 2048x4096
1 mtp.*.ffn.shared_experts.w1.scale F8_E8M0 16x32
1 mtp.*.ffn.shared_experts.w2.weight F8_E4M3 4096x2048
1 mtp.*.ffn.shared_experts.w2.scale F8_E8M0 32x16
1 mtp.*.ffn.shared_experts.w3.weight F8_E4M3 2048x4096
1 mtp.*.ffn.shared_experts.w3.scale F8_E8M0 16x32
"""

# The same for a part of deepseek-ai/DeepSeek-V4-Pro's headers.
PRO_HEADERS = """
layers.60.attn.wq_a.weight F8_E4M3 1536x7168
layers.60.attn.wq_b.weight F8_E4M3 65536x1536
layers.60.attn.wkv.weight F8_E4M3 512x7168
layers.60.attn.wo_a.weight F8_E4M3 16384x4096
layers.60.attn.wo_b.weight F8_E4M3 7168x16384
layers.60.attn.attn_sink F32 128
layers.60.attn.compressor.wkv.weight BF16 1024x7168
layers.60.attn.compressor.ape F32 4x1024
layers.0.attn.compressor.wkv.weight BF16 512x7168
layers.0.attn.compressor.ape F32 128x512
layers.60.attn.indexer.wq_b.weight F8_E4M3 8192x1536
layers.60.attn.indexer.weights_proj.weight BF16 64x7168
layers.60.attn.indexer.compressor.wkv.weight BF16 256x7168
layers.60.ffn.experts.383.w1.weight I8 3072x3584
layers.60.ffn.experts.383.w1.scale F8_E8M0 3072x224
layers.60.ffn.shared_experts.w1.weight F8_E4M3 3072x7168
layers.2.ffn.gate.tid2eid I64 129280x6
layers.60.hc_attn_fn F32 24x28672
mtp.0.hc_head_fn F32 4x28672
mtp.0.e_proj.weight F8_E4M3 7168x7168
mtp.0.h_proj.weight F8_E4M3 7168x7168
embed.weight BF16 129280x7168
head.weight BF16 129280x7168
norm.weight BF16 7168
"""

FLASH_COUNTS = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def test_flash_is_the_published_list_of_headers_row_for_row() -> None:
    published = {}
    for line in FLASH_HEADERS.split("\n")[1:-1]:
        count, name, dtype, shape = line.split()
        published[name, dtype, _shape(shape)] = int(count)
    derived = {(row["tensor"], row["dtype"], tuple(row["shape"])): row["count"] for row in rows(V4_FLASH)}
    assert len(published) == 101
    wrong = {key: (derived.get(key), published.get(key)) for key in derived.keys() ^ published.keys()}
    assert not wrong, f"name, dtype, shape: (derived count, published count): {wrong}"
    assert derived == published


def test_pro_agrees_with_published_headers() -> None:
    derived = census(V4_PRO)
    for line in PRO_HEADERS.split("\n")[1:-1]:
        name, dtype, shape = line.split()
        assert derived[name] == TensorSpec(_shape(shape), dtype), name


@pytest.mark.parametrize(
    ("model", "expected_bytes", "expected_tensors"),
    [(V4_FLASH, 159_609_485_896, 69_187), (V4_PRO, 864_704_792_696, 145_116)],
    ids=["flash", "pro"],
)
def test_totals_are_the_published_ones(model: ModelConfig, expected_bytes: int, expected_tensors: int) -> None:
    *by_dtype, total = totals(model)
    assert (total["dtype"], total["tensors"], total["bytes"]) == ("total", expected_tensors, expected_bytes)
    for key in ("tensors", "elements", "bytes"):
        assert sum(row[key] for row in by_dtype) == total[key], key
    assert total_bytes(model) == expected_bytes
    assert sum(row["bytes"] for row in rows(model)) == expected_bytes
    assert [row["bytes"] for row in by_dtype] == sorted((row["bytes"] for row in by_dtype), reverse=True)


def test_flash_counts_by_dtype_and_elements_are_the_published_ones() -> None:
    *by_dtype, total = totals(V4_FLASH)
    assert {row["dtype"]: row["tensors"] for row in by_dtype} == FLASH_COUNTS
    assert total["elements"] == 158_069_433_298


def test_parameters_are_the_published_sizes() -> None:
    assert (parameters(V4_FLASH), parameters(V4_FLASH, mtp=True)) == (284_332_240_471, 290_942_289_362)
    main, all_of_pro = parameters(V4_PRO), parameters(V4_PRO, mtp=True)
    assert round(main / 1e12, 3) == 1.573
    assert all_of_pro - main == 25_840_145_979


@pytest.mark.parametrize("model", [V4_FLASH, V4_PRO, V4_TINY], ids=["flash", "pro", "tiny"])
def test_every_quantised_weight_has_its_scale_right_after_it_and_no_scale_stands_alone(model: ModelConfig) -> None:
    specs = census(model)
    names = list(specs)
    scales = set()
    for name, following in zip(names, [*names[1:], ""], strict=True):
        if is_quantised(specs[name]):
            assert following == scale_name(name)
            scales.add(following)
    assert scales == {name for name, spec in specs.items() if spec.dtype == "F8_E8M0"}
    assert {spec.dtype for spec in specs.values()} <= set(DTYPES)


def test_scales_of_partial_blocks_are_rounded_up() -> None:
    odd = replace(V4_TINY, hidden_size=160, q_lora_rank=129)
    specs = census(odd)
    assert specs["layers.0.attn.wq_a.weight"].shape == (129, 160)
    assert specs["layers.0.attn.wq_a.scale"].shape == (2, 2)
    assert specs["layers.0.ffn.experts.0.w1.weight"].shape == (128, 80)
    assert specs["layers.0.ffn.experts.0.w1.scale"].shape == (128, 5)
    assert specs["layers.0.ffn.experts.0.w1.weight"].logical_shape == (128, 160)


def test_names_follow_the_layer_kinds_of_the_configuration() -> None:
    model = replace(V4_TINY, n_layers=3, n_mtp_layers=2, n_hash_layers=2, compress_ratios=(128, 4, 0, 0, 0))
    names = census(model)
    kinds = Counter(name.split(".")[1] for name in names if ".attn.compressor.ape" in name)
    assert kinds == {"0": 1, "1": 1}
    assert [name for name in names if name.endswith("indexer.weights_proj.weight")] == [
        "layers.1.attn.indexer.weights_proj.weight"
    ]
    assert [name.split(".")[1] for name in names if name.endswith("tid2eid")] == ["0", "1"]
    assert [name for name in names if name.endswith("gate.bias")] == [
        "layers.2.ffn.gate.bias",
        "mtp.0.ffn.gate.bias",
        "mtp.1.ffn.gate.bias",
    ]
    assert "mtp.1.hc_head_fn" in names
    assert not any(
        name.startswith("mtp.") for name in census(replace(V4_TINY, n_mtp_layers=0, compress_ratios=(0, 0, 4, 128)))
    )


def test_what_has_no_released_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expert_dtype: got 'fp8', expected 'fp4' .*-Base"):
        census(replace(V4_TINY, expert_dtype="fp8"))
    with pytest.raises(ValueError, match="n_shared_experts: got 2, expected 1"):
        census(replace(V4_TINY, n_shared_experts=2))
    with pytest.raises(TypeError, match="config: got str, expected a ModelConfig"):
        census("v4-flash")  # type: ignore[arg-type]
