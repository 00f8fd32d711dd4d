"""Everything that can be wrong with a checkpoint is refused in one line, before any of it is used."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    FP4,
    FP4_SCALE,
    FP8,
    FP8_SCALE,
    SHARD_BYTES,
    SMALL,
    TABLE,
    Spy,
    edit_index,
    edit_shard,
    read_index,
    shard_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref import checkpoint, checkpoint_writer
from dsv4ref.ref.census import census
from dsv4ref.ref.checkpoint import INDEX, CheckpointError, inspect, iter_tensors, load


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in several shards, never modified."""
    return checkpoint_writer.write_random(tmp_path_factory.mktemp("written") / "small", SMALL, 7, SHARD_BYTES)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(checkpoint, "safe_open", found)
    return found


# --- what is wrong is refused before any data is used -----------------------------------------------------------------


def _refused(folder: Path, message: str, spy: Spy, config: ModelConfig = SMALL, *, by_values: bool = False) -> None:
    """Both entry points refuse in one line, having read nothing but, for wrong values, scales and tables."""
    for attempt in (lambda: iter_tensors(folder, config), lambda: load(folder, config, dequantise_to=torch.float32)):
        with pytest.raises(CheckpointError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert spy.open_now == 0
    specs = census(config)
    if by_values:
        assert {specs[name].dtype for name in spy.read} <= {"F8_E8M0", "I64"}
    else:
        assert not spy.read


def test_absent_folder_is_refused(tmp_path: Path, spy: Spy) -> None:
    _refused(tmp_path / "nowhere", "folder: got .*nowhere, which is no directory", spy)
    (tmp_path / "file").write_text("")
    _refused(tmp_path / "file", "folder: got .*file, which is no directory", spy)
    _refused(tmp_path, f"{INDEX}: No such file or directory in ", spy)


def test_missing_shard_is_refused(folder: Path, spy: Spy) -> None:
    shard = shard_of(folder, FP4)
    (folder / shard).unlink()
    _refused(folder, f"{INDEX}: names {shard}, which is not in the folder", spy)


@pytest.mark.parametrize("left", [lambda size: size - 1, lambda size: size // 2, lambda size: 20, lambda size: 0])
def test_truncated_shard_is_refused(folder: Path, spy: Spy, left: Callable[[int], int]) -> None:
    shard = shard_of(folder, FP4)
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[: left(len(data))])
    _refused(folder, f"{shard}: cut short or damaged, expected a safetensors file", spy)


def test_damaged_header_is_refused(folder: Path, spy: Spy) -> None:
    shard = shard_of(folder, FP4)
    data = bytearray((folder / shard).read_bytes())
    data[8] ^= 0xFF
    (folder / shard).write_bytes(bytes(data))
    _refused(folder, f"{shard}: cut short or damaged", spy)


def test_shard_that_the_index_does_not_name_is_refused(folder: Path, spy: Spy) -> None:
    save_file({"extra": torch.zeros(1)}, folder / "model-00099-of-00099.safetensors")
    _refused(folder, f"{INDEX}: does not name model-00099-of-00099.safetensors, which is in the folder", spy)


def test_tensor_misnamed_in_its_shard_is_refused(folder: Path, spy: Spy) -> None:
    shard, wrong = shard_of(folder, FP8), "layers.1.attn.wqb.weight"
    edit_shard(folder, shard, lambda content: content.update({wrong: content.pop(FP8)}))
    _refused(folder, rf"says that {FP8} is in {shard}, which does not hold it \(it has {wrong}\)", spy)


def test_tensor_misnamed_in_shard_and_index_is_refused(folder: Path, spy: Spy) -> None:
    shard, wrong = shard_of(folder, FP8), f"model.{FP8}"
    edit_shard(folder, shard, lambda content: content.update({wrong: content.pop(FP8)}))
    edit_index(folder, lambda content: content["weight_map"].update({wrong: content["weight_map"].pop(FP8)}))
    _refused(folder, rf"{FP8}: not in the checkpoint, expected for small \(it has {wrong}\)", spy)


def test_missing_tensor_is_refused(folder: Path, spy: Spy) -> None:
    edit_shard(folder, shard_of(folder, FP8), lambda content: content.__delitem__(FP8))
    edit_index(folder, lambda content: content["weight_map"].__delitem__(FP8))
    _refused(folder, f"{FP8}: not in the checkpoint, expected for small$", spy)


@pytest.mark.parametrize("indexed", [False, True])
def test_extra_tensor_is_refused(folder: Path, spy: Spy, indexed: bool) -> None:
    shard, extra = shard_of(folder, FP8), "layers.1.attn.wq_b.bias"
    edit_shard(folder, shard, lambda content: content.update({extra: torch.zeros(3)}))
    if indexed:
        edit_index(folder, lambda content: content["weight_map"].update({extra: shard}))
    message = f"{extra}: in {shard}, but small has no such tensor" if indexed else f"{INDEX}: does not name {extra}"
    _refused(folder, message, spy)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (FP8, lambda t: t.T.contiguous(), r"got F8_E4M3 \[72, 512\] in .*, expected F8_E4M3 \[512, 72\] for small"),
        (FP8, lambda t: t.to(torch.bfloat16), r"got BF16 \[512, 72\] in .*, expected F8_E4M3 \[512, 72\]"),
        (FP8, lambda t: t.to(torch.float8_e5m2), r"got F8_E5M2 \[512, 72\] in .*, expected F8_E4M3"),
        (FP8_SCALE, lambda t: t.view(torch.uint8)[:3].view(t.dtype), r"got F8_E8M0 \[3, 1\] .* \[4, 1\]"),
        (FP8_SCALE, lambda t: t.to(torch.float32), r"got F32 \[4, 1\] in .*, expected F8_E8M0 \[4, 1\]"),
        (FP4, lambda t: t.view(torch.uint8), r"got U8 \[160, 48\] in .*, expected I8 \[160, 48\]"),
        (FP4, lambda t: t.repeat(1, 2), r"got I8 \[160, 96\] in .*, expected I8 \[160, 48\]"),
        (FP4_SCALE, lambda t: t.view(torch.uint8)[:, :1].contiguous().view(t.dtype), r"got F8_E8M0 \[160, 1\] in"),
        (TABLE, lambda t: t.to(torch.int32), r"got I32 \[48, 3\] in .*, expected I64 \[48, 3\]"),
        (TABLE, lambda t: t[:, :2].contiguous(), r"got I64 \[48, 2\] in .*, expected I64 \[48, 3\]"),
        ("layers.1.ffn.gate.bias", lambda t: t.to(torch.bfloat16), r"got BF16 \[4\] in .*, expected F32 \[4\]"),
        ("hc_head_scale", lambda t: t[0].clone(), r"got F32 \[\] in .*, expected F32 \[1\]"),
    ],
)  # fmt: skip
def test_wrong_shape_or_dtype_is_refused(
    folder: Path, spy: Spy, name: str, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    edit_shard(folder, shard_of(folder, name), lambda content: content.update({name: wrong(content[name])}))
    _refused(folder, f"{name}: {message}", spy)


def test_index_that_puts_a_tensor_into_another_shard_is_refused(folder: Path, spy: Spy) -> None:
    shard, other = shard_of(folder, FP8), shard_of(folder, "embed.weight")
    assert shard != other
    edit_index(folder, lambda content: content["weight_map"].update({FP8: other}))
    _refused(folder, f"{INDEX}: says that {FP8} is in {other}, but it is in {shard}", spy)


def test_tensor_in_two_shards_is_refused(folder: Path, spy: Spy) -> None:
    shard, other = shard_of(folder, FP8_SCALE), shard_of(folder, "embed.weight")
    scale = load_file(folder / shard)[FP8_SCALE]
    edit_shard(folder, other, lambda content: content.update({FP8_SCALE: scale}))
    _refused(folder, f"{FP8_SCALE}: in {other} and again in {shard}, expected it once", spy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["metadata"].update(total_size=5), r"metadata.total_size is 5, expected \d+ for small"),
        (lambda c: c["metadata"].update(total_size="5"), "metadata.total_size is '5', expected a number of bytes"),
        (lambda c: c.__delitem__("metadata"), "metadata.total_size is None, expected a number"),
        (lambda c: c.__delitem__("weight_map"), "weight_map is NoneType, expected tensor name -> shard"),
        (lambda c: c.update(weight_map={}), "weight_map is dict, expected"),
        (lambda c: c["weight_map"].update({FP8: "../m.safetensors"}), f"{FP8} is in '../m.safetensors', expected"),
        (lambda c: c["weight_map"].update({FP8: "model.bin"}), f"{FP8} is in 'model.bin', expected the name of a"),
        (lambda c: c["weight_map"].update({FP8: 3}), f"{FP8} is in 3, expected the name of a"),
    ],
)  # fmt: skip
def test_index_that_lies_is_refused(
    folder: Path, spy: Spy, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_index(folder, edit)
    _refused(folder, f"{INDEX}: {message}", spy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, expected an object"),
        (
            '{"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            "has 'a' twice",
        ),
    ],
)
def test_unreadable_index_is_refused(folder: Path, spy: Spy, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    _refused(folder, f"{INDEX}: {message}", spy)


@pytest.mark.parametrize("name", [FP8_SCALE, FP4_SCALE])
def test_nan_scale_is_refused(folder: Path, spy: Spy, name: str) -> None:
    def poison(content: dict[str, Tensor]) -> None:
        content[name].view(torch.uint8)[-1, -1] = 255

    edit_shard(folder, shard_of(folder, name), poison)
    rows, columns = census(SMALL)[name].shape
    message = rf"{name}: 1 NaN scales \(byte 255\), the first at \[{rows - 1}, {columns - 1}\], expected 0 to 254"
    _refused(folder, message, spy, by_values=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4, 1], "token 5 slot 1 has expert 4, expected 0 to 3"),
        ([0, 1, -1], "token 5 slot 2 has expert -1, expected 0 to 3"),
        ([3, 1, 3], "token 5 has expert 3 twice, expected 3 distinct"),
    ],
)
def test_wrong_expert_ids_are_refused(folder: Path, spy: Spy, ids: list[int], message: str) -> None:
    def poison(content: dict[str, Tensor]) -> None:
        content[TABLE][5] = torch.tensor(ids)

    edit_shard(folder, shard_of(folder, TABLE), poison)
    _refused(folder, f"{TABLE}: {message}", spy, by_values=True)


def test_base_checkpoint_is_refused(folder: Path, spy: Spy) -> None:
    specs = census(SMALL)
    for shard in set(read_index(folder)["weight_map"].values()):

        def to_base(content: dict[str, Tensor]) -> None:
            for name in [name for name in content if ".experts." in name]:
                rows, columns = specs[name.removesuffix("scale").removesuffix("weight") + "weight"].logical_shape
                if name.endswith(".scale"):
                    content[name] = torch.ones(math.ceil(rows / 128), math.ceil(columns / 128))
                else:
                    content[name] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)

        edit_shard(folder, shard, to_base)
    _refused(folder, r"is a -Base checkpoint's \(routed experts in fp8 with fp32 scales\), expected a released", spy)


def test_checkpoint_of_another_model_is_refused(folder: Path, spy: Spy) -> None:
    (folder / "config.json").unlink()
    _refused(
        folder,
        r"embed.weight: got BF16 \[48, 160\] in .*, expected BF16 \[64, 160\]",
        spy,
        replace(SMALL, vocab_size=64),
    )
    _refused(folder, r"layers.1.ffn.gate.tid2eid: not in the checkpoint", spy, replace(SMALL, n_hash_layers=2))
    with pytest.raises(CheckpointError, match=r"mtp.0.*: in model-.*, but small has no such tensor .and .* more"):
        inspect(folder, replace(SMALL, n_mtp_layers=0, compress_ratios=(0, 0, 4, 128)))


def test_shard_that_shrinks_while_it_is_read_is_an_error_and_load_returns_nothing(folder: Path) -> None:
    shards = sorted(set(read_index(folder)["weight_map"].values()))
    tensors = iter_tensors(folder, SMALL)
    next(tensors)
    (folder / shards[-1]).write_bytes((folder / shards[-1]).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shards[-1]}: changed since its header was checked"):
        list(tensors)


@pytest.mark.parametrize(
    ("weight", "scale", "error", "message"),
    [
        (torch.float8_e4m3fn, torch.ones(2, 1), TypeError, "scale: got torch.float32, expected torch.float8_e8m0fnu"),
        (torch.bfloat16, torch.ones(2, 1), TypeError, "weight: got torch.bfloat16, expected torch.float8_e4m3fn or"),
        (torch.float8_e4m3fn, torch.zeros(3, 1), ValueError, r"scale: got shape \(3, 1\) for \(130, 64\) codes"),
        (torch.int8, torch.zeros(2, 1), ValueError, r"scales: got shape \(2, 1\) for \(130, 64\) packed bytes"),
    ],
)
def test_scales_of_another_kind_are_refused(
    weight: torch.dtype, scale: Tensor, error: type[Exception], message: str
) -> None:
    """fp32 scales seen as bytes would be four scales each, most of them plausible."""
    if error is ValueError:
        scale = scale.to(torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(error, match=message):
        checkpoint.dequantise(torch.zeros(130, 64).to(weight), scale)


def test_bad_arguments_are_refused(written: Path) -> None:
    with pytest.raises(ValueError, match=r"dequantise_to: got torch.float16, expected None or one of torch.bfloat16"):
        iter_tensors(written, SMALL, dequantise_to=torch.float16)
    with pytest.raises(TypeError, match="config: got dict, expected a ModelConfig"):
        load(written, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert_dtype: got 'fp8'"):
        load(written, replace(SMALL, expert_dtype="fp8"))
