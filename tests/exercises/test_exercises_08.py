"""Solutions of chapter 08's exercises, worked out with the package."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.formats import Dialect, fp8, ue8m0
from dsv4ref.kernels.projection import DequantisedWeight, grouped_projection
from dsv4ref.optimizations.cached_projection import copy_bytes
from dsv4ref.ref.projection import dequantise_weight_ref

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "08_cached_projection.ipynb"
TITLES = ["Which scales are safe?", "Tell the host", "Without the position", "What does a rank pay?"]


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    section = prose.split("\n## Exercises\n")[1].split("\n## ")[0]
    assert [part.split("\n", 1)[0].strip() for part in section.split("\n### ")[1:]] == TITLES


def random_weight(rng: torch.Generator, device: str, rows: int = 256) -> tuple[Tensor, Tensor]:
    codes = fp8.encode(torch.randn((rows, 128), generator=rng) * 64, Dialect.FN)
    scale = torch.randint(115, 121, (rows // 128, 1), generator=rng).to(torch.uint8)
    return codes.to(device).view(Dialect.FN.dtype), scale.to(device)


@pytest.mark.parametrize(("dialect", "safe"), [(Dialect.FN, range(3, 247)), (Dialect.FNUZ, range(4, 248))])
def test_safe_scales_are_one_range_of_bytes(dialect: Dialect, safe: range) -> None:
    codes = fp8.decode(torch.arange(256, dtype=torch.uint8), dialect)
    codes, scales = codes[codes.isfinite()], ue8m0.decode(torch.arange(255, dtype=torch.uint8))
    exact = torch.outer(codes.double(), scales.double())
    rounded = torch.outer(codes, scales).to(torch.bfloat16).double()
    found = [byte for byte in range(255) if torch.equal(exact[:, byte], rounded[:, byte])]
    assert found == list(safe)


def test_a_version_counted_by_hand_tells_the_host(rng: torch.Generator, device: str) -> None:
    weight, scale = random_weight(rng, device)
    other, _ = random_weight(rng, device)
    kept = DequantisedWeight(weight, scale, check="host")
    first = kept.current(weight, scale).clone()
    weight.data.copy_(other)
    assert torch.equal(kept.current(weight, scale), first)  # the write was not seen
    torch.autograd.graph.increment_version(weight)
    assert torch.equal(kept.current(weight, scale), dequantise_weight_ref(weight, scale))
    assert not torch.equal(kept.buffer, first)


@pytest.mark.gpu
def test_under_replay_only_a_refresh_tells_the_graph(rng: torch.Generator) -> None:
    weight, scale = random_weight(rng, "cuda")
    other, _ = random_weight(rng, "cuda")
    o = torch.randn((3, 1, 128), generator=rng).to("cuda", torch.bfloat16)
    kept = DequantisedWeight(weight, scale, check="host")
    first = grouped_projection(o, kept.current(weight, scale))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = grouped_projection(o, kept.current(weight, scale))
    weight.data.copy_(other)
    torch.autograd.graph.increment_version(weight)
    graph.replay()
    assert torch.equal(z, first)
    kept.refresh(weight, scale)
    graph.replay()
    assert torch.equal(z, grouped_projection(o, dequantise_weight_ref(weight, scale)))
    assert not torch.equal(z, first)


def blocks_words(weight: Tensor) -> Tensor:
    """The 32-bit words of every 128 x 128 block in ascending order: all that a sum without positions can depend on."""
    words = weight.view(torch.int32)
    return torch.stack([block.flatten().sort().values for block in words.split(128)])


@pytest.mark.parametrize(("row", "blind"), [(77, True), (200, False)])
def test_rows_exchanged_within_a_block_need_the_position(
    row: int, blind: bool, rng: torch.Generator, device: str
) -> None:
    weight, scale = random_weight(rng, device)
    kept = DequantisedWeight(weight, scale, check="device")
    before, words = kept.buffer.clone(), blocks_words(weight)
    raw = weight.data.view(torch.uint8)
    raw[[3, row]] = raw[[row, 3]]
    assert torch.equal(blocks_words(weight), words) == blind
    assert torch.equal(kept.current(weight, scale), dequantise_weight_ref(weight, scale))
    assert not torch.equal(kept.buffer, before)


def test_a_tensor_parallel_rank_pays_its_share_of_the_groups() -> None:
    groups, ranks = config.V4_PRO.o_groups, 8
    whole = copy_bytes("v4-pro")
    assert f"{whole / 2**30:.1f}" == "7.6"
    assert groups == 16
    assert groups // ranks == 2
    per_group = whole // groups
    assert per_group * groups == whole
    assert per_group * (groups // ranks) == whole // 8 < 2**30
    assert max(tp for tp in range(1, 65) if groups % tp == 0) == 16
