"""Checkpoints: what is written reads back, one shard at a time, headers before data."""

from __future__ import annotations

import json
import math
import shutil
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
    as_bytes,
    assert_same,
    edit_index,
    edit_shard,
    read_index,
    shard_of,
)
from torch import Tensor

from dsv4ref.config import V4_FLASH
from dsv4ref.ref import checkpoint, checkpoint_writer
from dsv4ref.ref.census import DTYPES, TensorSpec, census, is_quantised
from dsv4ref.ref.checkpoint import INDEX, CheckpointError, inspect, iter_tensors, load


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in several shards, never modified."""
    return checkpoint_writer.write_random(tmp_path_factory.mktemp("written") / "small", SMALL, 7, SHARD_BYTES)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors, each in a shard of its own: every weight is apart from its scale."""
    return checkpoint_writer.write_random(tmp_path_factory.mktemp("apart") / "small", SMALL, 7, shard_bytes=1)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(checkpoint, "safe_open", found)
    return found


# --- what is written reads back ---------------------------------------------------------------------------------------


def test_written_checkpoint_has_every_tensor_of_the_census_in_several_shards(written: Path) -> None:
    tensors = load(written, SMALL)
    specs = census(SMALL)
    assert list(tensors) == list(specs)
    for name, spec in specs.items():
        assert (tuple(tensors[name].shape), tensors[name].dtype) == (spec.shape, DTYPES[spec.dtype]), name
    shards = set(read_index(written)["weight_map"].values())
    assert len(shards) > 5
    assert all((written / shard).stat().st_size < 2 * SHARD_BYTES for shard in shards)
    assert read_index(written)["metadata"]["total_size"] == inspect(written, SMALL).total_bytes


def test_stored_tensors_written_again_read_back_byte_for_byte(written: Path, tmp_path: Path) -> None:
    tensors = load(written, SMALL)
    again = checkpoint_writer.write(tmp_path / "again", SMALL, tensors, shard_bytes=1 << 30)
    assert len(set(read_index(again)["weight_map"].values())) == 1
    assert_same(load(again, SMALL), tensors)


def test_dequantised_tensors_written_again_read_back_as_the_same_numbers(written: Path, tmp_path: Path) -> None:
    numbers = load(written, SMALL, dequantise_to=torch.float32)
    again = checkpoint_writer.write(tmp_path / "again", SMALL, numbers)
    assert_same(load(again, SMALL, dequantise_to=torch.float32), numbers)


def test_dequantised_weights_are_code_times_scale(written: Path) -> None:
    stored, numbers = load(written, SMALL), load(written, SMALL, dequantise_to=torch.float32)
    fp8, scale = stored[FP8].to(torch.float32), stored[FP8_SCALE].view(torch.uint8)
    assert numbers[FP8].shape == fp8.shape == (512, 72)
    for row, column in [(0, 0), (127, 71), (128, 0), (511, 71), (300, 33)]:
        wanted = fp8[row, column].item() * 2.0 ** (int(scale[row // 128, column // 128]) - 127)
        assert numbers[FP8][row, column].item() == wanted, (row, column)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    packed, scale = stored[FP4].view(torch.uint8), stored[FP4_SCALE].view(torch.uint8)
    assert (numbers[FP4].shape, packed.shape) == ((160, 96), (160, 48))
    for row, column in [(0, 0), (0, 1), (159, 95), (159, 94), (77, 31), (77, 32)]:
        code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
        wanted = values[code] * 2.0 ** (int(scale[row, column // 32]) - 127)
        assert numbers[FP4][row, column].item() == wanted, (row, column)


def test_quantisation_keeps_weights_within_half_a_code_step(written: Path) -> None:
    numbers = load(written, SMALL, dequantise_to=torch.float32)
    for name, spec in census(SMALL).items():
        if not is_quantised(spec):
            continue
        original = checkpoint_writer.random_tensor(name, SMALL, 7)
        # Half a step relative to the value (3 and 1 mantissa bits), or half the smallest step of the largest block.
        relative, steps = (2**-4, 448 * 2**9) if spec.dtype == "F8_E4M3" else (2**-2, 6 * 2)
        error = (numbers[name] - original).abs()
        bound = torch.maximum(relative * original.abs(), original.abs().max() / steps * 2)
        worst = int((error - bound).argmax())
        assert bool((error <= bound).all()), (
            f"{name}: element {worst} is {original.flatten()[worst]}, stored as {numbers[name].flatten()[worst]}"
        )


def test_bfloat16_holds_dequantised_weights_exactly_and_other_tensors_keep_their_dtype(written: Path) -> None:
    stored = load(written, SMALL)
    wide = load(written, SMALL, dequantise_to=torch.float64)
    narrow = load(written, SMALL, dequantise_to=torch.bfloat16)
    assert set(wide) == set(narrow) == {name for name, spec in census(SMALL).items() if spec.dtype != "F8_E8M0"}
    for name, spec in census(SMALL).items():
        if is_quantised(spec):
            assert (wide[name].dtype, narrow[name].dtype) == (torch.float64, torch.bfloat16)
            assert torch.equal(wide[name], narrow[name].to(torch.float64)), name
        elif spec.dtype != "F8_E8M0":
            assert torch.equal(as_bytes(narrow[name]), as_bytes(stored[name])), name
            assert narrow[name].dtype is stored[name].dtype, name


def test_weight_and_scale_may_be_in_different_shards(written: Path, apart: Path) -> None:
    where = read_index(apart)["weight_map"]
    assert len(set(where.values())) == len(where)
    for target in (None, torch.float32):
        assert_same(load(apart, SMALL, dequantise_to=target), load(written, SMALL, dequantise_to=target))


def test_scale_in_an_earlier_shard_than_its_weight(folder: Path) -> None:
    wanted = load(folder, SMALL, dequantise_to=torch.float32)
    later = shard_of(folder, FP8_SCALE)
    first = min(read_index(folder)["weight_map"].values())
    assert first != later
    moved: dict[str, Tensor] = {}
    edit_shard(folder, later, lambda content: moved.update({FP8_SCALE: content.pop(FP8_SCALE)}))
    edit_shard(folder, first, lambda content: content.update(moved))
    edit_index(folder, lambda content: content["weight_map"].update({FP8_SCALE: first}))
    assert_same(load(folder, SMALL, dequantise_to=torch.float32), wanted)


def test_random_weights_depend_on_seed_and_name_only(written: Path, tmp_path: Path) -> None:
    same = load(checkpoint_writer.write_random(tmp_path / "same", SMALL, 7, shard_bytes=1 << 30), SMALL)
    assert_same(same, load(written, SMALL))
    assert torch.equal(checkpoint_writer.random_tensor("head.weight", SMALL, 7), same["head.weight"])
    assert not torch.equal(checkpoint_writer.random_tensor("head.weight", SMALL, 8), same["head.weight"])
    assert not torch.equal(same["layers.0.hc_attn_fn"], same["layers.1.hc_attn_fn"])
    assert (int(same[TABLE].min()), int(same[TABLE].max())) == (0, SMALL.router.n_experts - 1)


# --- one shard at a time, headers before data -------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, torch.bfloat16], ids=["stored", "dequantised"])
def test_never_more_than_one_shard_is_open(written: Path, spy: Spy, target: torch.dtype | None) -> None:
    tensors = []
    for name, tensor in iter_tensors(written, SMALL, dequantise_to=target):
        tensors.append((name, tensor))
        assert spy.open_now == 1
    assert (spy.open_now, spy.most_open) == (0, 1)
    shards = len(set(read_index(written)["weight_map"].values()))
    assert spy.times_opened == 3 * shards, "headers, checked values, tensors: each pass opens every shard once"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("target", [None, torch.bfloat16], ids=["stored", "dequantised"])
def test_tensors_that_are_kept_do_not_keep_their_shards_mapped(apart: Path, target: torch.dtype | None) -> None:
    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split(None, 5)[5] for line in lines if f"{apart}/" in line}

    kept, most = [], 0
    for name, tensor in iter_tensors(apart, SMALL, dequantise_to=target):
        kept.append((name, tensor))
        most = max(most, len(mapped()))
    assert most == 1, "the list of mapped files must show the open shard, and no other"
    assert not mapped()


def test_abandoned_iteration_closes_its_shard(written: Path, spy: Spy) -> None:
    tensors = iter_tensors(written, SMALL)
    next(tensors)
    assert spy.open_now == 1
    del tensors
    assert spy.open_now == 0


def test_headers_are_checked_without_reading_a_tensor(written: Path, spy: Spy) -> None:
    inspect(written, SMALL)
    assert not spy.read
    assert spy.most_open == 1


def test_headers_of_full_size_flash_are_checked_without_reading_its_160_gigabytes(tmp_path: Path, spy: Spy) -> None:
    # Sparse files: headers as published, and holes where the data would be.
    shards: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in census(V4_FLASH).items():
        parts = name.split(".")
        number = {"embed": 1, "layers": 2 + int(parts[1]) if parts[0] == "layers" else 0, "mtp": 46}.get(parts[0], 45)
        shards.setdefault(f"model-{number:05}-of-00046.safetensors", {})[name] = spec
    for shard, specs in shards.items():
        header, at = {}, 0
        for name, spec in specs.items():
            offsets = [at, at + spec.nbytes]
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            at = offsets[1]
        text = json.dumps(header).encode()
        with (tmp_path / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            try:
                file.truncate(8 + len(text) + at)
            except OSError as error:
                pytest.skip(f"needs a file system with sparse files: {error}")
    weight_map = {name: shard for shard, specs in shards.items() for name in specs}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 159609485896}, "weight_map": weight_map}))
    found = inspect(tmp_path, V4_FLASH)
    assert found.total_bytes == 159_609_485_896
    assert sum(len(names) for names in found.shards.values()) == 69_187
    assert sum(found.sizes.values()) > found.total_bytes
    assert not spy.read
    with pytest.raises(CheckpointError, match=r"embed.weight: got BF16 \[129280, 4096\] .*, expected BF16"):
        inspect(tmp_path, replace(V4_FLASH, vocab_size=129281))


# --- the writer refuses, too ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(written: Path) -> dict[str, Tensor]:
    return load(written, SMALL)


def _changed(tensors: dict[str, Tensor], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm.weight": None}, ValueError, "tensors: has no norm.weight, expected"),
        ({"extra": torch.zeros(1)}, ValueError, "tensors: extra is no tensor of small"),
        ({FP8: torch.zeros(512, 72)}, ValueError, f"tensors: {FP8_SCALE} comes with unquantised numbers"),
        ({FP8_SCALE: None}, ValueError, f"tensors: has no {FP8_SCALE}"),
        ({FP4: torch.zeros(9, 8), FP4_SCALE: None}, ValueError, r"expected I8 \[160, 48\] or numbers \[160, 96\]"),
        ({"norm.weight": torch.zeros(160)}, ValueError, r"norm.weight is torch.float32 \[160\], expected BF16 \[160\]"),
        ({"norm.weight": [0.0]}, TypeError, "tensors: norm.weight is a list, expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_writer_refuses_what_does_not_belong_before_writing(
    stored: dict[str, Tensor], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        checkpoint_writer.write(tmp_path / "new", SMALL, _changed(stored, changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FP8: torch.full((512, 72), math.inf), FP8_SCALE: None}, "values: got .* non-finite numbers"),
        ({FP4: torch.full((160, 96), math.nan), FP4_SCALE: None}, "got infinities or NaN"),
        ({TABLE: torch.zeros(48, 3, dtype=torch.int64)}, f"{TABLE}: token 0 has expert 0 twice"),
    ],
)
def test_writer_that_stops_leaves_nothing_that_loads(
    stored: dict[str, Tensor], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint_writer.write(tmp_path, SMALL, _changed(stored, changes), shard_bytes=SHARD_BYTES)
    with pytest.raises(CheckpointError, match=f"{INDEX}: No such file"):
        load(tmp_path, SMALL)


def test_writer_refuses_a_folder_that_is_not_empty_and_shards_of_no_size(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        checkpoint_writer.write_random(written, SMALL)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"shard_bytes: got {size}, expected"):
            checkpoint_writer.write_random(tmp_path / "new", SMALL, shard_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name: got 'layers.1.attn.wq_b.scale', expected"):
        checkpoint_writer.random_tensor(FP8_SCALE, SMALL)


def test_tensors_that_share_memory_are_written_apart(stored: dict[str, Tensor], tmp_path: Path) -> None:
    tied = _changed(stored, {"head.weight": stored["embed.weight"]})
    tied["layers.0.attn_norm.weight"] = tied["embed.weight"][0]
    again = load(checkpoint_writer.write(tmp_path / "tied", SMALL, tied), SMALL)
    assert torch.equal(again["head.weight"], stored["embed.weight"])
    assert torch.equal(again["layers.0.attn_norm.weight"], stored["embed.weight"][0])


def test_fp8_scales_put_each_blocks_maximum_below_448_and_above_half_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.logspace(-30, 30, 6)[:, None].repeat_interleave(128, 0)[:700]
    values = torch.randn(700, 200, generator=generator) * magnitude
    codes, scale = checkpoint_writer.quantise_fp8(values)
    assert (codes.shape, scale.shape) == ((700, 200), (6, 2))
    for row in range(6):
        for column in range(2):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            factor = 2.0 ** (int(scale.view(torch.uint8)[row, column]) - 127)
            largest = values[block].abs().max().item() / factor
            assert 224 < largest <= 448, (row, column, largest)
            assert codes[block].to(torch.float32).abs().max() >= 224
    zeros, scale = checkpoint_writer.quantise_fp8(torch.zeros(3, 5))
    assert not as_bytes(zeros).any()
    assert int(scale.view(torch.uint8)) == 1, "an all-zero block has the scale 2^-126"
    with pytest.raises(ValueError, match=r"values: got shape \(3,\)"):
        checkpoint_writer.quantise_fp8(torch.zeros(3))
