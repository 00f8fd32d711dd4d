"""The merge kernel against its definition: properties of merging, the ends of the range, strides, rotation."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.evidence.compare import Tolerance
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import kv_cache
from dsv4ref.kernels.sparse_mla import merge
from dsv4ref.kernels.sparse_mla.merge import MAX_PARTS, QueryRotation, merge_scopes
from dsv4ref.ref.merge import merge_scopes_ref
from dsv4ref.ref.rope import frequencies

INF, NAN = math.inf, math.nan
EMPTY = st.sampled_from([-INF, INF])
FP32 = Tolerance(
    abs=2e-6, rel=1e-5, cosine=None, yardstick_factor=None,
    reason="a handful of fp32 roundings and two exp2 on unit values: 2^-19; bf16 anywhere would show at 2^-9",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Keys of a few heads cut into parts, and the parts' attention; empty parts have LSE -inf and zeros."""

    partials: Tensor
    lses: Tensor

    def shuffled(self, order: list[int]) -> Parts:
        return Parts(self.partials[order], self.lses[order])


def cut(sizes: list[int], seed: int, heads: int = 3, spread: float = 4.0) -> Parts:
    """One row with ``sum(sizes)`` keys, the i-th part taking the next ``sizes[i]``; fp32."""
    rng = torch.Generator().manual_seed(seed)
    scores = (torch.randn((heads, sum(sizes)), generator=rng) * spread).split(sizes, dim=1)
    values = torch.randn((sum(sizes), 512), generator=rng).split(sizes)
    lses = torch.stack([torch.logsumexp(s, dim=1) for s in scores])
    outs = torch.stack([torch.nan_to_num(torch.softmax(s, dim=1) @ v) for s, v in zip(scores, values, strict=True)])
    return Parts(outs[:, None], lses[:, None])


def run(parts: Parts, device: str, **options: Tensor | QueryRotation | None) -> tuple[Tensor, Tensor]:
    """The kernel's fp32 out and LSE, on the CPU, from poisoned memory."""
    with poisoned_allocations():
        out = torch.empty(parts.partials.shape[1:], device=device)
        lse = torch.empty(parts.lses.shape[1:], device=device)
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        merge_scopes(parts.partials.to(device), parts.lses.to(device), out=out, lse=lse, **moved)  # type: ignore[arg-type]
    return out.cpu(), lse.cpu()


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for name, ours, theirs, tolerance in (
        ("out", got[0], want[0], FP32),
        ("lse", got[1], want[1], compare.TOLERANCES["lse_fp32"]),
    ):
        found = compare.close(name, ours, theirs.to(torch.float64), tolerance)
        assert found.passed, found.detail


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for name, ours, theirs in zip(("out", "lse"), got, want, strict=True):
        found = compare.identical(name, ours, theirs)
        assert found.passed, found.detail


# --- properties of merging -------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=12)


@few
@given(sizes=SIZES, seed=SEEDS, sink=st.none() | st.floats(-30, 30, width=32))
def test_the_merge_of_a_split_is_the_single_pass(sizes: list[int], seed: int, sink: float | None, device: str) -> None:
    """However a row's keys are cut, empty parts included: the same as all keys in one part."""
    logits = None if sink is None else torch.full((3,), sink)
    split, whole = cut(sizes, seed), cut([sum(sizes)], seed)
    assert_close(run(split, device, sink=logits), merge_scopes_ref(whole.partials, whole.lses, logits))


@few
@given(sizes=SIZES, seed=SEEDS, data=st.data())
def test_the_order_of_parts_does_not_matter(sizes: list[int], seed: int, data: st.DataObject, device: str) -> None:
    parts = cut(sizes, seed)
    order = data.draw(st.permutations(range(len(sizes))))
    assert_close(run(parts.shuffled(list(order)), device), run(parts, device))


@few
@given(sizes=SIZES.filter(lambda sizes: len(sizes) > 1), seed=SEEDS, data=st.data())
def test_merging_is_associative(sizes: list[int], seed: int, data: st.DataObject, device: str) -> None:
    """Merging some parts first and the result with the rest is merging all; the sink comes last and once."""
    parts = cut(sizes, seed)
    sink = torch.tensor([0.5, -2.0, 3.0])
    first = data.draw(st.integers(1, len(sizes) - 1))
    out, lse = run(Parts(parts.partials[:first], parts.lses[:first]), device)
    rest = Parts(
        torch.cat([out[None], parts.partials[first:]]),
        torch.cat([lse[None], parts.lses[first:]]),
    )
    assert_close(run(rest, device, sink=sink), run(parts, device, sink=sink))


@few
@given(sizes=SIZES, seed=SEEDS, marks=st.lists(EMPTY, min_size=5, max_size=5), poison=st.sampled_from([NAN, INF, 7.0]))
def test_what_an_empty_part_holds_never_shows(
    sizes: list[int], seed: int, marks: list[float], poison: float, device: str
) -> None:
    """The same bytes whether empty parts hold zeros or poison, and whether their LSE is -inf or +inf."""
    clean = cut([*sizes, 0], seed)
    dirty = Parts(clean.partials.clone(), clean.lses.clone())
    for i, size in enumerate([*sizes, 0]):
        if size == 0:
            dirty.partials[i], dirty.lses[i] = poison, marks[i % 5]
    sink = torch.tensor([0.5, -2.0, 3.0])
    assert_same(run(dirty, device, sink=sink), run(clean, device, sink=sink))


def test_every_cut_of_a_short_row_is_the_same_row(device: str) -> None:
    """Not sampled: all 16 ways to cut five keys into consecutive parts."""
    whole = cut([5], 6)
    want = merge_scopes_ref(whole.partials, whole.lses)
    for inside in itertools.product((False, True), repeat=4):
        bounds = [0, *(i + 1 for i, cuts in enumerate(inside) if cuts), 5]
        assert_close(run(cut([b - a for a, b in itertools.pairwise(bounds)], 6), device), want)


# --- the ends of the range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [None, 0.3, -INF, INF])
@pytest.mark.parametrize("marks", [(-INF, -INF), (INF, -INF), (INF, INF)], ids=str)
def test_all_parts_empty_is_exactly_zero(marks: tuple[float, float], sink: float | None, device: str) -> None:
    parts = Parts(torch.full((2, 1, 3, 512), NAN), torch.tensor(marks)[:, None, None].expand(2, 1, 3))
    out, lse = run(parts, device, sink=None if sink is None else torch.full((3,), sink))
    assert torch.count_nonzero(out) == 0, f"{out[out != 0][:4]}"
    assert lse.tolist() == [[-INF] * 3]


def test_an_infinite_sink_takes_everything_or_nothing_and_leaves_the_lse(device: str) -> None:
    parts = cut([3, 4], 0)
    bare = run(parts, device)
    out, lse = run(parts, device, sink=torch.tensor([INF, -INF, 0.0]))
    assert torch.count_nonzero(out[:, 0]) == 0
    assert_same((out[:, 1], lse), (bare[0][:, 1], bare[1]))
    assert not torch.equal(out[:, 2], bare[0][:, 2])


@pytest.mark.parametrize("offset", [-1.0e4, -200.0, 200.0, 1.0e4])
def test_scores_whose_exponential_overflows(offset: float, device: str) -> None:
    """Only differences of LSEs and sink count."""
    parts = cut([3, 4], 1)
    moved, sink = Parts(parts.partials, parts.lses + offset), torch.tensor([0.5, -2.0, 3.0]) + offset
    assert_close(run(moved, device, sink=sink), merge_scopes_ref(moved.partials, moved.lses, sink))


@pytest.mark.parametrize("distance", [-300.0, 300.0])
def test_a_sink_far_from_the_scores_does_not_disturb_the_lse(distance: float, device: str) -> None:
    parts = cut([3, 4], 2)
    sink = torch.full((3,), distance)
    assert_close(run(parts, device, sink=sink), merge_scopes_ref(parts.partials, parts.lses, sink))


def test_nan_comes_out_only_where_it_weighs_something(device: str) -> None:
    parts = cut([2, 3], 3)
    parts.partials[1] = NAN
    parts.lses[0, 0] = 0.0
    parts.lses[1, 0] = torch.tensor([0.0, -INF, -500.0])  # the last underflows to a weight of 0
    out, lse = run(parts, device)
    assert [bool(out[0, h].isnan().all()) for h in range(3)] == [True, False, False]
    assert_same((out[:, 1:], lse[:, 1:]), (parts.partials[0][:, 1:], parts.lses[0][:, 1:]))


def test_a_nan_lse_or_sink_shows_in_its_own_head_only(device: str) -> None:
    parts = cut([2, 3], 4)
    parts.lses[1, 0, 0] = NAN
    out, lse = run(parts, device, sink=torch.tensor([0.0, NAN, 0.0]))
    assert [bool(out[0, h].isnan().all()) for h in range(3)] == [True, True, False]
    assert torch.isfinite(out[0, 2]).all()
    assert lse[0].isnan().tolist() == [True, False, False]


# --- shapes, dtypes and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 5, 8, 16, 32, 64, 128])
def test_head_counts(heads: int, device: str) -> None:
    parts = cut([2, 3], heads, heads=heads)
    sink = torch.linspace(-3, 3, heads)
    assert_close(run(parts, device, sink=sink), merge_scopes_ref(parts.partials, parts.lses, sink))


@pytest.mark.parametrize("count", [1, 2, MAX_PARTS])
def test_numbers_of_parts(count: int, device: str) -> None:
    parts = cut([2] * count, count)
    assert_close(run(parts, device), merge_scopes_ref(parts.partials, parts.lses))


@pytest.mark.parametrize("part_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_are_rounded_once_and_parts_are_read_as_they_are(part_dtype: torch.dtype, device: str) -> None:
    parts = cut([2, 3], 5)
    parts = Parts(parts.partials.to(part_dtype), parts.lses)
    wide = run(parts, device)
    assert_close(wide, merge_scopes_ref(parts.partials, parts.lses))
    narrow, none = merge_scopes(parts.partials.to(device), parts.lses.to(device))
    assert none is None
    assert_same((narrow.cpu(), wide[1]), (wide[0].to(torch.bfloat16), wide[1]))


def test_any_strides_and_nothing_written_outside(rng: torch.Generator, device: str) -> None:
    """Parts in the middle of larger rows, LSEs transposed, the output a slice of padded heads."""
    rows, heads = 3, 5
    partials = torch.randn((rows, 2, heads + 2, 512), generator=rng).to(torch.bfloat16)
    lses = torch.randn((heads, rows, 2), generator=rng)
    parts = Parts(partials.transpose(0, 1)[:, :, 1:-1], lses.permute(2, 1, 0))
    sink = torch.randn(heads, generator=rng).to(device)
    compact = merge_scopes(
        parts.partials.contiguous().to(device), parts.lses.contiguous().to(device), sink=sink, return_lse=True
    )
    guard = torch.full((rows + 1, 2 * heads, 512), 0x7FA5, dtype=torch.int16, device=device).view(torch.bfloat16)
    scores = torch.full((rows, heads + 3), 7.0, device=device)
    moved = partials.to(device).transpose(0, 1)[:, :, 1:-1], lses.to(device).permute(2, 1, 0)
    out, lse = merge_scopes(*moved, sink=sink, out=guard[:rows, heads:], lse=scores[:, 1:-2])
    assert compact[1] is not None
    assert lse is not None
    assert_same((out.contiguous(), lse.contiguous()), (compact[0], compact[1]))
    untouched = guard.view(torch.int16)
    assert (untouched[rows:] == 0x7FA5).all()
    assert (untouched[:rows, :heads] == 0x7FA5).all()
    assert (scores[:, [0, -2, -1]] == 7.0).all()


def test_no_rows_is_no_work(device: str) -> None:
    out, lse = merge_scopes(
        torch.empty((2, 0, 4, 512), device=device), torch.empty((2, 0, 4), device=device), return_lse=True
    )
    assert out.shape == (0, 4, 512)
    assert lse is not None
    assert lse.shape == (0, 4)


def test_the_kernels_constants_are_the_formats() -> None:
    assert merge._DIM.value == kv_cache.HEAD_DIM
    assert merge._ROPE_PAIRS.value * 2 == kv_cache.ROPE_DIM
    assert merge._LOG2_E.value == math.log2(math.e)
    assert merge._LN_2.value == math.log(2)


# --- rotation --------------------------------------------------------------------------------------------------------

FREQS = frequencies(10_000.0, 64)


def rows_of(count: int, seed: int) -> Parts:
    """``count`` rows of the same kind, two parts each."""
    each = [cut([2, 3], seed + i) for i in range(count)]
    return Parts(torch.cat([p.partials for p in each], dim=1), torch.cat([p.lses for p in each], dim=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_last_64_dims_are_rotated_back_to_the_querys_position(dtype: torch.dtype, device: str) -> None:
    parts, positions = rows_of(4, 10), torch.tensor([0, 1, 77, 4095], dtype=dtype)
    sink = torch.tensor([0.5, -2.0, 3.0])
    rotation = QueryRotation.of(positions.to(device), FREQS.to(device), 4096)
    got = run(parts, device, sink=sink, rotation=rotation)
    assert_close(got, merge_scopes_ref(parts.partials, parts.lses, sink, positions=positions, freqs=FREQS))
    plain = run(parts, device, sink=sink)
    assert_same((got[0][..., :448].contiguous(), got[1]), (plain[0][..., :448].contiguous(), plain[1]))


def test_the_rotation_comes_before_the_rounding(device: str) -> None:
    parts, positions = rows_of(2, 20), torch.tensor([3, 500])
    rotation = QueryRotation.of(positions.to(device), FREQS.to(device), 512)
    wide, lse = run(parts, device, rotation=rotation)
    narrow, _ = merge_scopes(parts.partials.to(device), parts.lses.to(device), rotation=rotation)
    assert_same((narrow.cpu(), lse), (wide.to(torch.bfloat16), lse))


def test_a_position_outside_the_tables_shows_unless_the_row_is_empty(device: str) -> None:
    parts, positions = rows_of(4, 30), torch.tensor([-1, 8, 7, -1])
    parts.lses[:, 3] = -INF
    out, _ = run(parts, device, rotation=QueryRotation.of(positions.to(device), FREQS.to(device), 8))
    rotated = out[..., 448:].isnan()
    assert [bool(rotated[row].all()) for row in range(4)] == [True, True, False, False]
    assert torch.isfinite(out[..., :448]).all()
    assert torch.isfinite(out[2]).all()
    assert torch.count_nonzero(out[3]) == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(
    match: str, kind: type[Exception], device: str, partials: Tensor | None = None, lses: Tensor | None = None,
    **options: object,
) -> None:  # fmt: skip
    parts = torch.zeros((2, 3, 4, 512), device=device) if partials is None else partials
    weights = torch.zeros((2, 3, 4), device=device) if lses is None else lses
    with pytest.raises(kind, match=match):
        merge_scopes(parts, weights, **options)  # type: ignore[arg-type]


def test_wrong_parts_are_refused(device: str) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    refused("partials: got list, expected a torch.Tensor", TypeError, device, partials=[])  # type: ignore[arg-type]
    half = zeros(2, 3, 4, 512, dtype=torch.float16)
    refused("partials: got torch.float16, expected torch.bfloat16 or torch.float32", TypeError, device, partials=half)
    refused(r"partials: got shape \[2, 3, 4, 448\]", ValueError, device, partials=zeros(2, 3, 4, 448))
    refused("partials: got 0 parts, expected 1 to 16", ValueError, device, partials=zeros(0, 3, 4, 512))
    refused("partials: got 17 parts, expected 1 to 16", ValueError, device, partials=zeros(17, 3, 4, 512))
    refused("partials: got 0 heads", ValueError, device, partials=zeros(2, 3, 0, 512))
    refused("partials: got strides", ValueError, device, partials=zeros(2, 3, 4, 1024)[..., ::2])
    refused("lses: got torch.float64, expected torch.float32", TypeError, device, lses=zeros(2, 3, 4).double())
    refused(r"lses: got shape \[3, 3, 4\], expected \[2, 3, 4\]", ValueError, device, lses=zeros(3, 3, 4))
    refused(r"sink: got shape \[3\], expected \[4\]", ValueError, device, sink=zeros(3))


def test_wrong_outputs_are_refused_before_anything_is_written(device: str) -> None:
    memory = torch.zeros((2, 3, 4, 512), device=device)
    scores = torch.zeros((2, 3, 4), device=device)
    half = torch.zeros((3, 4, 512), dtype=torch.float16, device=device)
    refused("out: got torch.float16, expected torch.bfloat16 or torch.float32", TypeError, device, out=half)
    refused(r"out: got shape \[3, 4, 448\]", ValueError, device, out=torch.zeros((3, 4, 448), device=device))
    expanded = torch.zeros((1, 4, 512), device=device).expand(3, 4, 512)
    refused("out: shape .* overlaps itself", ValueError, device, out=expanded)
    refused("out: its memory range overlaps partials's", ValueError, device, partials=memory, out=memory[0])
    refused("lse: its memory range overlaps lses's", ValueError, device, lses=scores, lse=scores[1])
    out = torch.zeros((3, 4, 512), device=device)
    inside = out.view(-1)[:12].view(3, 4)
    refused("lse: its memory range overlaps out's", ValueError, device, out=out, lse=inside)
    refused(r"lse: got shape \[3, 5\]", ValueError, device, lse=torch.zeros((3, 5), device=device))


def test_wrong_rotations_are_refused(device: str) -> None:
    positions = torch.zeros(3, dtype=torch.int64, device=device)
    freqs = FREQS.to(device)
    with pytest.raises(TypeError, match=r"positions: got torch\.float32, expected torch\.int32 or torch\.int64"):
        QueryRotation.of(positions.float(), freqs, 8)
    with pytest.raises(ValueError, match=r"freqs: got shape \[31\], expected \[32\]"):
        QueryRotation.of(positions, freqs[1:], 8)
    with pytest.raises(ValueError, match="length: got 0, expected a positive integer"):
        QueryRotation.of(positions, freqs, 0)
    tables = torch.zeros((8, 64), device=device)
    with pytest.raises(ValueError, match="sin: got strides"):
        QueryRotation(positions, tables[:, :32], tables[:, ::2])
    with pytest.raises(ValueError, match="sin: got 7 positions, expected 8 like cos"):
        QueryRotation(positions, tables[:, :32], tables[1:, :32])
    refused("rotation: got tuple, expected a QueryRotation", TypeError, device, rotation=(positions, tables, tables))
    refused("rotation: got 2 positions", ValueError, device, rotation=QueryRotation.of(positions[:2], freqs, 8))
