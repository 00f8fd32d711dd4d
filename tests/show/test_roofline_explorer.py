"""The roofline of attention: its figures are the models', marks stand on the roofs they name, words say all of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from dsv4ref.device import get_device
from dsv4ref.evidence.roofline import Bound
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch
from dsv4ref.optimizations import decode_model
from dsv4ref.show.roofline import SIDES, roofline_explorer

DEVICES = ("mi300x", "mi355x", "h200")
KINDS = ("SWA", "C4", "C128")


def said(svg: str) -> str:
    return ElementTree.fromstring(svg).attrib["aria-label"]


def params(rows: int, heads: int, swa: int, extra: int) -> dict[str, int]:
    return {"rows": rows, "heads": heads, "swa": swa, "extra": extra}


def expected(device: str, rows: int, heads: int, extra: int) -> Bound:
    work, spec = params(rows, heads, 128, extra), get_device(device)
    return replace(decode_model.bound(work, spec), levels=(decode_model.dequantisation(work, spec),))


def marks(svg: str) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Kind -> (intensity, TFLOP/s) of its filled and its hollow mark, read back from their pixels."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    shapes = (r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5"', r'<rect x="([\d.]+)" y="([\d.]+)" width="9"',
              r'<path d="M([\d.]+) ([\d.]+)l6')  # fmt: skip
    for kind, shape, (dx, dy) in zip(KINDS, shapes, ((0, 0), (4.5, 4.5), (0, 6)), strict=True):
        for x, y in re.findall(shape, svg)[:2]:  # the key and the lists have marks as well, behind these
            intensity = 10 ** (3 * (float(x) + dx - 70) / 540)
            found[kind].append((intensity, 0.1 * 50_000 ** ((270 - float(y) - dy) / 230)))
    return {kind: (points[0], points[1]) for kind, points in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_times_and_the_binding_side_are_the_models(device: str, heads: int) -> None:
    text = said(roofline_explorer(64, heads, 512, 32768, device))
    for kind, extra in zip(KINDS, (0, 512, 256), strict=True):
        bound = expected(device, 64, heads, extra)
        sides = ", ".join(f"{SIDES[side][0]} {us:.4g} us" for side, us in bound.sides_us.items())
        ordered = sorted(bound.sides_us.values())
        line = next(part for part in text.split(". ") if part.startswith(f"{kind},"))
        assert f": {sides}; bound by {SIDES[bound.side][0]}, {ordered[-1] / ordered[-2]:.2f} times" in line, kind


@pytest.mark.parametrize("device", DEVICES)
def test_a_key_costs_the_vector_units_what_the_decode_model_says(device: str) -> None:
    spec, shape = get_device(device), LaunchShape(16, 32, 8)  # one resident workgroup
    units, tflops = spec.compute_units, spec.bf16_tflops
    assert units is not None
    assert tflops is not None
    # One row on every unit; 17 and 32 keys are one tile, so that waiting for memory drops out.
    few, many = (decode_model.decode_time_us(params(units, 16, keys, 0), shape, spec) for keys in (17, 32))
    matrix_us = 4 * 16 * 512 / (1e6 * tflops / units)
    level = decode_model.dequantisation(params(units, 16, 1, 0), spec)
    assert 1e6 * level.bytes / level.bytes_per_s == pytest.approx((many - few) / 15 - matrix_us, rel=1e-9)


def test_all_three_sides_bind_somewhere() -> None:
    binding = {
        re.findall(r"C4,[^;]*; bound by ([a-z ]+),", said(roofline_explorer(heads=heads, device=device)))[0]
        for heads in (8, 64, 128)
        for device in DEVICES
    }
    assert binding == {name for name, _ in SIDES.values()}


@pytest.mark.parametrize(
    ("context", "topk", "c4", "c128"),
    [(100, 512, 25, 0), (1024, 512, 256, 8), (32768, 1024, 1024, 256), (1 << 20, 512, 512, 8192)],
)
def test_lists_follow_from_the_context(context: int, topk: int, c4: int, c128: int) -> None:
    text, window = said(roofline_explorer(context=context, topk=topk)), min(context, 128)
    for kind, extra in zip(KINDS, (0, c4, c128), strict=True):
        assert f"{kind}, {window} + {extra:,} keys" in text


@pytest.mark.parametrize("device", DEVICES)
def test_marks_stand_at_the_bound_and_at_the_modelled_launch(device: str) -> None:
    spec, drawn = get_device(device), marks(roofline_explorer(device=device))
    for kind, extra in zip(KINDS, (0, 512, 256), strict=True):
        bound, work = expected(device, 64, 64, extra), params(64, 64, 128, extra)
        launch_us = decode_model.decode_time_us(work, select_launch(spec.arch, 64, 64, extra), spec)
        for at, us in zip(drawn[kind], (bound.time_us, launch_us), strict=True):
            assert at == pytest.approx((bound.intensity, bound.flops / us / 1e6), rel=0.005), kind
        ceilings = (bound.bytes_per_s * bound.intensity, *(1e6 * bound.flops / us for us in bound.sides_us.values()))
        assert drawn[kind][0][1] == pytest.approx(min(ceilings) / 1e12, rel=0.005)


def test_rows_leave_the_bound_where_it_is_and_move_the_launch() -> None:
    one, many = (marks(roofline_explorer(rows=rows)) for rows in (1, 1024))
    for kind in KINDS:
        assert one[kind][0] == pytest.approx(many[kind][0])
        assert one[kind][1][1] < many[kind][1][1] / 10


def test_the_roof_of_dequantisation_rises_with_the_heads_and_is_dashed() -> None:
    for heads in (8, 16, 64):
        spec = get_device("mi355x")
        level = decode_model.dequantisation(params(1, heads, 128, 0), spec)
        height = 4 * heads * level.bytes_per_s / 1e12  # two products of 2 FLOP per code and head
        svg = roofline_explorer(heads=heads, device="mi355x")
        assert f"dequantisation {f'{height:,.0f}' if height >= 1000 else f'{height:.4g}'} TFLOP/s" in said(svg)
        pens = {c: "dasharray" in rest for c, rest in re.findall(r'stroke="(#\w+)" ([^/]*class="roof"[^/]*)/>', svg)}
        assert pens == {colour: name == "dequantisation" for name, colour in SIDES.values()}


def test_roofs_meet_at_the_ridge() -> None:
    svg = roofline_explorer(device="h200")
    ends = {c: tuple(map(float, xy)) for *xy, c in re.findall(
        r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" stroke="(#\w+)" [^/]*class="roof"', svg
    )}  # fmt: skip
    memory, matrix = ends[SIDES["memory"][1]], ends[SIDES["arithmetic"][1]]
    assert memory[2:] == matrix[:2]
    ridge = expected("h200", 1, 64, 0).ridge
    assert memory[2] == pytest.approx(70 + 540 * math.log10(ridge) / 3, abs=0.06)
    assert matrix[1] == matrix[3]


def test_everything_stays_on_the_page() -> None:
    for rows, heads, topk, context in ((1, 8, 512, 1), (1024, 128, 1024, 1 << 20), (1, 1, 1, 128)):
        for device in DEVICES:
            svg = roofline_explorer(rows, heads, topk, context, device)
            height = float(svg.split('viewBox="0 0 640 ')[1].split('"')[0])
            for x, y, wide, tall in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="(14)"', svg):
                assert float(x) + float(wide) <= 460
                assert float(y) + float(tall) <= height
            for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)[:2]:
                assert 70 <= float(x) <= 610
                assert 40 <= float(y) <= 270


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected at least 1"),
        ({"heads": -8}, "heads: got -8, expected at least 1"),
        ({"topk": 0}, "topk: got 0, expected at least 1"),
        ({"context": 0}, "context: got 0, expected 1 to"),
        ({"device": "cpu"}, "device: got 'cpu', expected one with published"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roofline_explorer(**changes)  # type: ignore[arg-type]
