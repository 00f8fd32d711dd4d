"""Launch shapes: the published table as data, the workbook's own selection at its edges, and registers and LDS."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from dsv4ref.device import native_dialect
from dsv4ref.evidence import isa
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats import Dialect
from dsv4ref.kernels.codes import decode_mode
from dsv4ref.kernels.sparse_mla.launch import (
    PUBLISHED,
    SELECTION,
    STATIC,
    LaunchShape,
    Rule,
    choose,
    select_launch,
    table_for,
)
from dsv4ref.optimizations import decode_model

SMALL_4W, WIDE_4W = LaunchShape(16, 32, 4), LaunchShape(4, 64, 4)
MEDIUM_4W, LARGE_8W, LARGE_4W = LaunchShape(32, 16, 4), LaunchShape(64, 16, 8), LaunchShape(64, 16, 4)

# rows -> shape at extra widths 0, 8 and 9; 64 heads. Upstream's table, edge by edge.
PUBLISHED_AT_EDGES = {
    1: (SMALL_4W, SMALL_4W, WIDE_4W),
    31: (SMALL_4W, SMALL_4W, WIDE_4W),
    32: (STATIC, STATIC, SMALL_4W),
    33: (SMALL_4W, SMALL_4W, SMALL_4W),
    79: (SMALL_4W, SMALL_4W, SMALL_4W),
    80: (MEDIUM_4W, MEDIUM_4W, MEDIUM_4W),
    255: (MEDIUM_4W, MEDIUM_4W, MEDIUM_4W),
    256: (LARGE_4W, LARGE_8W, LARGE_8W),
    5120: (LARGE_4W, LARGE_8W, LARGE_8W),
}


@pytest.mark.parametrize("rows", PUBLISHED_AT_EDGES)
def test_the_published_table_at_its_edges(rows: int) -> None:
    assert tuple(choose(PUBLISHED, rows, 64, extra).shape for extra in (0, 8, 9)) == PUBLISHED_AT_EDGES[rows]


@pytest.mark.parametrize("extra", [0, 8])
def test_the_published_table_overlaps_itself_at_32_rows(extra: int) -> None:
    """Two lines cover the call and name two shapes, so the order of lines decides."""
    covering = [rule for rule in PUBLISHED if rule.matches(32, 64, extra)]
    assert [rule.shape for rule in covering] == [STATIC, SMALL_4W]
    first, second = (PUBLISHED.index(rule) for rule in covering)
    swapped = list(PUBLISHED)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert choose(tuple(swapped), 32, 64, extra).shape == SMALL_4W


def test_nothing_else_in_the_published_table_overlaps_but_its_swa_only_line() -> None:
    """The 256-row line for SWA-only layers stands before the one it refines; elsewhere one line covers a call."""
    doubled = {
        (rows, extra)
        for rows, extra in itertools.product(range(1, 400), (0, 1, 8, 9, 512))
        if sum(rule.matches(rows, 64, extra) for rule in PUBLISHED) != 1
    }
    assert doubled == {(32, 0), (32, 1), (32, 8)} | {(rows, 0) for rows in range(256, 400)}


def test_the_static_shape_is_what_the_port_used() -> None:
    assert (STATIC.block_h, STATIC.block_k, STATIC.num_warps, STATIC.num_stages) == (16, 16, 4, 1)


# --- selection -------------------------------------------------------------------------------------------------------

_CDNA_64_HEADS = {79: (16, 32, 8), 80: (32, 16, 8), 255: (32, 16, 8), 256: (64, 16, 8), 5120: (64, 16, 8)}
_CDNA_128_HEADS = {39: (16, 32, 8), 40: (32, 16, 8), 127: (32, 16, 8), 128: (64, 16, 8)}
_CDNA_8_HEADS = {1: (16, 32, 8), 256: (16, 32, 8), 5120: (16, 32, 8)}
_CDNA_32_HEADS = {159: (16, 32, 8), 160: (32, 16, 8), 256: (32, 16, 8), 5120: (32, 16, 8)}
EDGES = {
    ("gfx942", 64): _CDNA_64_HEADS,
    ("gfx942", 128): _CDNA_128_HEADS,
    ("gfx942", 8): _CDNA_8_HEADS,
    ("gfx942", 32): _CDNA_32_HEADS,
    ("gfx950", 64): _CDNA_64_HEADS,
    ("gfx950", 128): _CDNA_128_HEADS,
    ("cpu", 8): _CDNA_8_HEADS,
    ("sm_90", 16): {1: (16, 64, 8), 132: (16, 64, 8), 133: (16, 32, 4), 1024: (16, 32, 4)},
    ("sm_90", 17): {66: (16, 64, 8), 67: (64, 64, 8), 133: (64, 64, 8)},
    ("sm_90", 32): {66: (16, 64, 8), 67: (64, 64, 8), 1024: (64, 64, 8)},
    ("sm_90", 64): {33: (16, 64, 8), 34: (64, 64, 8), 1024: (64, 64, 8)},
    ("sm_90", 128): {16: (16, 64, 8), 17: (64, 64, 8), 34: (64, 64, 8)},
}


@pytest.mark.parametrize(("arch", "heads"), EDGES)
def test_selection_at_its_thresholds(arch: str, heads: int) -> None:
    for rows, shape in EDGES[arch, heads].items():
        for extra in (0, 8, 512):
            assert select_launch(arch, rows, heads, extra) == LaunchShape(*shape), (rows, extra)


@pytest.mark.parametrize("arch", [*SELECTION, "gfx90a"])
def test_every_call_has_a_shape(arch: str) -> None:
    heads = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128)
    rules = table_for(arch)
    used = {choose(rules, rows, h, extra) for rows in range(2001) for h in heads for extra in (0, 9)}
    unused = [rule.reason for rule in rules if rule not in used]
    assert not unused, "lines that no call reaches"


@pytest.mark.parametrize("arch", ["gfx90a", "sm_120", "gfx942:sramecc+", ""])
def test_architectures_without_rules_use_the_static_shape_and_say_so(arch: str) -> None:
    for rows, heads, extra in ((1, 8, 0), (80, 64, 512), (5120, 128, 1024)):
        assert select_launch(arch, rows, heads, extra) == STATIC
    (rule,) = table_for(arch)
    assert rule.reason == f"no rules for {arch}: the static shape"


def test_a_table_with_a_gap_is_an_error() -> None:
    gap = (Rule(STATIC, "small only", max_rows=8),)
    with pytest.raises(ValueError, match="rules: none covers rows=9, heads=64, extra_width=0"):
        choose(gap, 9, 64, 0)


def test_workgroup_bounds_count_the_programs_of_the_rules_own_shape() -> None:
    rule = Rule(LaunchShape(32, 16, 4), "", min_workgroups=6, max_workgroups=6)
    assert [rows for rows in range(10) if rule.matches(rows, 64, 0)] == [3]
    assert [rows for rows in range(10) if rule.matches(rows, 33, 0)] == [3]
    assert [rows for rows in range(10) if rule.matches(rows, 32, 0)] == [6]


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 16, 4), "block_h: got 0, expected a positive power of two"),
        ((48, 16, 4), "block_h: got 48, expected a positive power of two"),
        ((-16, 16, 4), "block_h: got -16"),
        ((16.0, 16, 4), "block_h: got 16.0"),
        ((16, 24, 4), "block_k: got 24"),
        ((16, 16, 3), "num_warps: got 3"),
        ((16, 16, 4, 0), "num_stages: got 0, expected a positive integer"),
        ((16, 16, 4, 1.5), "num_stages: got 1.5"),
        ((64, 128, 8), "block_k: got 128, expected at most 64"),
    ],
)
def test_shapes_that_cannot_be(fields: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchShape(*fields)


def test_a_shape_prints_itself_and_counts_its_workgroups() -> None:
    shape = LaunchShape(64, 16, 8, 2)
    assert str(shape) == "64x16 w8 s2"
    assert [shape.workgroups(rows, heads) for rows, heads in ((0, 64), (3, 64), (3, 65), (3, 1))] == [0, 3, 6, 3]


# --- what the compiler makes of them, for GPUs that are not here -----------------------------------------------------


def variant(request: CompileRequest, label: str, **changes: int | str) -> CompileRequest:
    """The request with other constexprs; a real LSE pointer goes with HAS_LSE."""
    return replace(
        request,
        shape=f"{request.shape}, {label}",
        constexprs={**request.constexprs, **changes},
        signature={**request.signature, "lse": "*fp32" if changes.get("HAS_LSE") else "*bf16"},
    )


def shapes_of(arch: str) -> list[CompileRequest]:
    shapes = dict.fromkeys(rule.shape for rule in table_for(arch))
    return [decode_model.compile_request(shape, arch) for shape in shapes]


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_every_selected_shape_fits_registers_and_lds(arch: str) -> None:
    """In every configuration that is served on the architecture: dialects, scopes, block sizes, sink, LSE."""
    own, ocp = (decode_mode(d, arch) for d in (Dialect.of(native_dialect(arch)), Dialect.FN))
    requests = [
        request
        for shape in shapes_of(arch)
        for request in (
            shape,
            variant(shape, "SWA only, no sink", HAS_EXTRA=False, HAS_SINK=False),
            variant(shape, "LSE, C128 blocks", HAS_LSE=True, EXTRA_BLOCK=2),
            variant(shape, "own dialect twice", SWA_MODE=own, EXTRA_MODE=own),
            variant(shape, "OCP twice, LSE", SWA_MODE=ocp, EXTRA_MODE=ocp, HAS_LSE=True),
        )
    ]
    rows = isa.compile_rows(requests, [arch])
    # Spills belong to kernel and compiler (H35): Triton 3.6 spills one shape on gfx942, 3.7.1 and 3.8 do not.
    old = [row for row in rows if row.triton.startswith("3.6.") and arch == "gfx942" and "16x32 w8" in row.shape]
    assert isa.check_caps([row for row in rows if row not in old]) == []
    assert [row.shape for row in rows] == [request.shape for request in requests]
    assert all(row.mfma > 0 for row in rows), "matrix instructions must be used"


def test_a_cache_in_the_foreign_dialect_spills_at_most_two_registers_on_gfx950() -> None:
    """No writer there produces fnuz, and converting a cache only touches its scale bytes."""
    requests = [
        variant(shape, label, SWA_MODE="bits_fnuz", EXTRA_MODE=extra)
        for shape in shapes_of("gfx950")
        for label, extra in (("fnuz + OCP", "native_fn"), ("fnuz twice", "bits_fnuz"))
    ]
    spills = {row.shape: row.vgpr_spills for row in isa.compile_rows(requests, ["gfx950"])}
    assert all(count == 0 for shape, count in spills.items() if not shape.startswith("64x16 w8")), spills
    assert max(spills.values()) <= 2, spills


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_the_cap_check_sees_a_shape_that_spills(arch: str) -> None:
    """The control: 64x64 with 8 waves needs far more registers than there are."""
    (row,) = isa.compile_rows([decode_model.compile_request(LaunchShape(64, 64, 8), arch)], [arch])
    assert row.vgpr_spills > 0
    assert any("VGPR spills" in line for line in isa.check_caps([row]))
