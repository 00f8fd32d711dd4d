"""Device pages show every published figure with its source, and what is said to follow does."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from bookkit import tables

from dsv4ref.device import KNOWN_DEVICES, DeviceSpec
from dsv4ref.evidence import isa
from dsv4ref.optimizations import catalogue

BOOK = Path(__file__).resolve().parents[2] / "book"
GPUS = [spec for spec in KNOWN_DEVICES.values() if spec.compute_units is not None]


def cells_of(markdown: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines()[2:] if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.parametrize("spec", GPUS, ids=lambda spec: spec.key)
def test_a_device_page_has_every_figure_with_its_source(spec: DeviceSpec) -> None:
    shown = cells_of(tables.device_table(spec))
    published = [
        field.name for field in fields(spec) if field.default is None and getattr(spec, field.name) is not None
    ]
    assert {tables._FIGURES[name][0] for name in published} == set(shown) - {"Compiler target"}
    for name in published:
        assert shown[tables._FIGURES[name][0]][1] == spec.sources[name]
    page = (BOOK / f"device-{spec.key}.md").read_text(encoding="utf-8")
    assert f"```{{device}} {spec.key}\n```" in page
    assert page.startswith(f"# {spec.name} ({spec.arch})\n")


@pytest.mark.parametrize("spec", GPUS, ids=lambda spec: spec.key)
def test_no_figure_is_typed_twice(spec: DeviceSpec) -> None:
    """Prose beside the generated tables says how many of nothing that a table counts."""
    prose = (BOOK / f"device-{spec.key}.md").read_text(encoding="utf-8")
    typed = re.findall(r"\b\d[\d.,]*\s*(?:[KMG]iB|[TG]B/s|TFLOP|MHz|CUs?\b|SMs?\b|lanes)", prose)
    assert typed == []


def test_figures_that_nobody_published_are_left_out_and_dashed() -> None:
    mi300x, _, h200 = GPUS
    assert "Infinity Cache" in cells_of(tables.device_table(mi300x))
    assert "Infinity Cache" not in cells_of(tables.device_table(h200))
    assert cells_of(tables.device_comparison([mi300x, h200]))["Infinity Cache"] == ["256 MiB", tables.NONE]


def test_arithmetic_is_the_figures_arithmetic() -> None:
    follows = cells_of(tables.device_arithmetic(GPUS))
    assert follows["32-bit registers per lane of a SIMD"] == ["512", "512", "512"]
    assert follows["the same with every wave slot taken"] == ["64", "64", "32"]
    assert follows["Waves on the whole device, at most"] == ["9,728", "8,192", "8,448"]
    assert follows["LDS of the whole device"] == ["19 MiB", "40 MiB", "29.39 MiB"]
    assert follows["FLOP per byte where bf16 meets memory"] == ["247", "315", "206"]
    for key in ("gfx942", "gfx950"):
        assert isa.arch_caps(key).vgprs_per_lane == 512, "the compiler's tables agree with the vendor's"


def test_arithmetic_needs_the_figures_it_stands_on() -> None:
    sources = {name: source for name, source in GPUS[2].sources.items() if name != "lds_bytes"}
    lacking = replace(GPUS[2], lds_bytes=None, sources=sources)
    with pytest.raises(ValueError, match="h200: no published lds_bytes, expected all of"):
        tables.device_arithmetic([lacking])


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_the_largest_matrix_instruction_that_the_compiler_emits_is_listed(arch: str) -> None:
    """Smaller K of the earlier generation stay available, and fill the rest of a tile."""
    (spec,) = [spec for spec in GPUS if spec.arch == arch]
    (row,) = isa.compile_rows(catalogue.get("decode_launch_shape").kernels(arch)[:1], [arch])
    emitted = [match[1] for kind in row.mfma_kinds if (match := re.search(r"_f32_(\d+x\d+x\d+)_bf16", kind))]
    largest = max(emitted, key=lambda shape: int(shape.split("x")[-1]))
    assert f"bf16 {largest}" in (spec.matrix_shapes or ()), row.mfma_kinds
