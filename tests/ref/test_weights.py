"""Weights by checkpoint name: what is read, and which sets of tensors are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import random_weights, tiny
from torch import Tensor

from dsv4ref.formats import mxfp4
from dsv4ref.ref.weights import Weights, block_name, check_weights, weight_shapes

CONFIG = tiny((4, 0), n_hash_layers=1)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_weights(CONFIG, 0)


def test_complete_weights_pass_in_any_stored_format(tensors: dict[str, Tensor]) -> None:
    check_weights(CONFIG, tensors)
    stored = dict(tensors)
    packed, scales = mxfp4.quantise(tensors["layers.0.ffn.experts.3.w2.weight"])
    stored["layers.0.ffn.experts.3.w2.weight"] = packed.view(torch.int8)
    stored["layers.0.ffn.experts.3.w2.scale"] = scales.view(torch.float8_e8m0fnu)
    stored["layers.1.attn.wq_b.weight"] = tensors["layers.1.attn.wq_b.weight"].to(torch.float8_e4m3fn)
    stored["layers.1.attn.wq_b.scale"] = torch.full((8, 1), 127, dtype=torch.uint8)
    stored["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].to(torch.int32)
    check_weights(CONFIG, stored)


def test_mtp_blocks_have_names_of_their_own() -> None:
    assert [block_name(CONFIG, layer) for layer in range(3)] == ["layers.0", "layers.1", "mtp.0"]
    shapes = weight_shapes(CONFIG)
    assert "mtp.0.ffn.gate.bias" in shapes, "MTP routes by score"
    assert "layers.0.ffn.gate.bias" not in shapes, "hash layers have no bias"
    assert not any("compressor" in name for name in shapes if name.startswith("mtp"))


def changed(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in new.items()})


def dropped(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def doubled_expert(tensors: dict[str, Any]) -> None:
    table = tensors["layers.0.ffn.gate.tid2eid"].clone()
    table[17] = torch.tensor([3, 1, 2, 5, 3, 0])
    tensors["layers.0.ffn.gate.tid2eid"] = table


def unknown_expert(expert: int) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        table = tensors["layers.0.ffn.gate.tid2eid"].clone()
        table[17, 2] = expert
        tensors["layers.0.ffn.gate.tid2eid"] = table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped("layers.0.attn.indexer.compressor.ape"), "'layers.0.attn.indexer.compressor.ape' is missing"),
        (changed(layers__9__attn__wq_a__weight=torch.zeros(1)), r"'layers.9.attn.wq_a.weight' and 0 more belong to no"),
        (changed(norm__weight=torch.ones(64)), r"'norm.weight' is torch.float32 \[64\], expected \[128\] for test"),
        (
            changed(layers__1__attn__wo_b__weight=torch.zeros(128, 64, dtype=torch.float8_e4m3fn)),
            r"'layers.1.attn.wo_b.scale' is nothing, expected UE8M0 scales \[1, 1\]",
        ),
        (
            changed(layers__0__ffn__experts__0__w1__weight=torch.zeros(64, 128, dtype=torch.int8)),
            r"'layers.0.ffn.experts.0.w1.weight' is torch.int8 \[64, 128\], expected \[64, 64\]",
        ),
        (
            changed(
                layers__1__attn__wkv__weight=torch.zeros(128, 128, dtype=torch.float8_e4m3fn),
                layers__1__attn__wkv__scale=torch.ones(1, 1),
            ),
            r"'layers.1.attn.wkv.scale' is torch.float32, expected UE8M0",
        ),
        (doubled_expert, r"gives token 17 experts \[3, 1, 2, 5, 3, 0\], expected distinct"),
        (unknown_expert(16), "names expert 16, expected 0 to 15"),
        (unknown_expert(-1), "names expert -1, expected 0 to 15"),
    ],
    ids=["missing", "unknown", "shape", "no scale", "unpacked", "scale dtype", "double", "expert id", "no expert"],
)
def test_wrong_weights_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tensors: dict[str, Tensor]
) -> None:
    bad = dict(tensors)
    change(bad)
    with pytest.raises(ValueError, match=message):
        check_weights(CONFIG, bad)


def test_types_are_checked(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"'head.weight' is a list, expected a torch.Tensor"):
        check_weights(CONFIG, tensors | {"head.weight": [1]})  # type: ignore[arg-type]
    table = tensors["layers.0.ffn.gate.tid2eid"].float()
    with pytest.raises(TypeError, match=r"is torch.float32, expected torch.int64 or torch.int32"):
        check_weights(CONFIG, tensors | {"layers.0.ffn.gate.tid2eid": table})


@pytest.mark.parametrize(
    ("name", "tensor", "scale"),
    [
        ("layers.1.ffn.gate", torch.zeros(16, 128, dtype=torch.float8_e4m3fn), torch.full((1, 1), 127)),
        ("embed", torch.zeros(96, 128, dtype=torch.float8_e4m3fn), torch.full((1, 1), 127)),
        ("layers.0.attn.q_norm", torch.zeros(32, dtype=torch.uint8), torch.full((2,), 127)),
        ("layers.0.attn.compressor.wkv", torch.zeros(256, 128, dtype=torch.int32), None),
        ("layers.0.attn.wq_a", torch.zeros(64, 128, dtype=torch.float8_e5m2), None),
        ("layers.0.attn.wq_a", torch.zeros(64, 128, dtype=torch.int64), None),
    ],
    ids=["router", "embedding", "norm", "integers", "e5m2", "integers for a quantised one"],
)
def test_formats_that_would_be_read_without_their_scale_are_refused(
    name: str, tensor: Tensor, scale: Tensor | None, tensors: dict[str, Tensor]
) -> None:
    bad = tensors | {f"{name}.weight": tensor}
    if scale is not None:
        bad[f"{name}.scale"] = scale.to(torch.uint8)
    with pytest.raises(TypeError, match=rf"'{name}.weight' is {tensor.dtype}, expected bfloat16 or wider"):
        check_weights(CONFIG, bad)


def test_a_hash_table_of_another_size_is_refused(tensors: dict[str, Tensor]) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    with pytest.raises(ValueError, match=rf"{name}' is \[95, 6\], expected \[96, 6\] for test"):
        check_weights(CONFIG, tensors | {name: tensors[name][:95]})


def test_reading_by_prefix(tensors: dict[str, Tensor]) -> None:
    attn = Weights(tensors, torch.float64).at("layers.0").at("attn")
    assert attn.tensor("attn_sink").dtype is torch.float64
    assert torch.equal(attn.matrix("wq_a"), tensors["layers.0.attn.wq_a.weight"].double())
    with pytest.raises(ValueError, match=r"no tensor is called 'layers.0.attn.wq_c.weight'"):
        attn.matrix("wq_c")
