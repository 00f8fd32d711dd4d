"""Split-K sparse decode: however a row is cut, the same attention; what was not written is not read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref import diagnostics, kernels
from dsv4ref.evidence import compare, launches
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import kv_cache
from dsv4ref.kernels.sparse_mla import (
    LaunchShape,
    QueryRotation,
    SplitScratch,
    plan_for,
    sparse_mla_decode,
    split_decode,
    split_k_decode,
)
from dsv4ref.ref.merge import merge_scopes_ref
from dsv4ref.ref.rope import frequencies, rotate_back_ref
from dsv4ref.ref.sparse_attention import sparse_attention_ref

GUARD_BITS = 0x7FA5
TILE = LaunchShape(16, 16, 4)


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def run(call: Call, splits: int | None, **options: Any) -> tuple[Tensor, Tensor]:
    with poisoned_allocations():
        out, lse = split_k_decode(
            call.q, call.swa, call.extra, sink=call.sink, scale=call.scale, splits=splits,
            **{"return_lse": True, "launch": TILE, **options},
        )  # fmt: skip
    assert lse is not None
    return out, lse


def assert_same(got: Tensor, want: Tensor) -> None:
    found = compare.identical("result", got.contiguous(), want.contiguous())
    assert found.passed, found.detail


# --- within the budget of the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [5, 8, 16, 32, 64, 128])
def test_head_counts_of_every_tensor_parallel_slice(heads: int, splits: int, build: Builder) -> None:
    call = build.small(rows=1, heads=heads)
    call.check(*run(call, splits, launch=None))


@pytest.mark.parametrize("splits", [2, 5, 32])
def test_cuts_fall_anywhere_in_either_list(splits: int, build: Builder) -> None:
    """Lengths around tiles of 16 in one scope, the reverse in the other: cuts within a scope, between both, in none."""
    lengths = (0, 1, 15, 16, 17, 33, 64)
    call = build.call(build.lists(lengths, 64), build.lists([0, *lengths[:0:-1]], 64), heads=5)
    call.check(*run(call, splits))


@pytest.mark.parametrize("blocks", [(2, 53), (61, 2), (256, 69)], ids=str)
def test_pages_of_any_size(blocks: tuple[int, int], build: Builder) -> None:
    call = build.small(rows=1, blocks=blocks)
    call.check(*run(call, 3))


def test_the_two_caches_keep_their_dialects(build: Builder) -> None:
    call = build.small(dialects=("e4m3fnuz", "e4m3fn"))
    call.check(*run(call, 2))


@pytest.mark.parametrize("splits", [1, 4])
def test_layers_without_an_extra_scope_and_calls_without_a_sink(splits: int, build: Builder) -> None:
    call = build.call(build.lists([20, 0, 50], 64), sink=False)
    call.check(*run(call, splits))


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_in_the_thousands_do_not_overflow(splits: int, build: Builder) -> None:
    call = build.small()
    call = replace(call, q=call.q * 512)
    out, lse = run(call, splits)
    assert lse.abs().max() > 1000, "the test must reach scores whose exponential overflows"
    call.check(out, lse)


# --- empty rows, empty splits, the sink ------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_rows_without_keys_are_zero_and_holes_are_skipped(splits: int, build: Builder) -> None:
    """No slot at all, invalid ones only, -1 and out-of-range inside lists, a duplicate."""
    swa = [[], [-1, 10**6] * 10, [3, -1, 3, 10**6, 9], [-1] * 20 + [5]]
    extra = [[], [-1], [], [7] + [-1] * 20]
    call = build.call(swa, extra)
    out, lse = run(call, splits)
    call.check(out, lse)
    assert torch.count_nonzero(out[:2]) == 0
    assert (lse[:2] == -math.inf).all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sink", [-math.inf, math.inf, -80.0, 80.0])
def test_the_sink_is_applied_once_and_may_be_infinite(sink: float, splits: int, build: Builder) -> None:
    call = build.call([[3, 9] * 10, []], [[7] * 20, []])
    assert call.sink is not None
    call = replace(call, sink=torch.full_like(call.sink, sink))
    out, lse = run(call, splits)
    call.check(out, lse)
    if sink == math.inf:
        assert torch.count_nonzero(out) == 0
        assert torch.isfinite(lse[0]).all(), "the LSE does not know of the sink"


def test_an_empty_split_writes_its_lse_and_no_part(build: Builder, device: str) -> None:
    """3 tiles in 4 splits: the fourth has none; of a row with holes only, no split has a key."""
    call = build.call([[1] * 20, [-1] * 40], [[2] * 10, [-1]], heads=4)
    scratch = SplitScratch.allocate(4 * 2 * 4, device)
    scratch.parts.fill_(math.nan)
    scratch.lses.fill_(math.nan)
    call.check(*run(call, 4, scratch=scratch))
    written = ~scratch.parts.view(4, 2, 4, 512).isnan().all(-1)
    lses = scratch.lses.view(4, 2, 4)
    want = torch.zeros_like(written)
    want[:3, 0] = True
    assert torch.equal(written, want)
    assert torch.equal(lses == -math.inf, ~want), lses


def test_a_scratch_kept_between_steps_changes_no_bit(build: Builder, device: str) -> None:
    """Larger than needed, poisoned, then holding the answers of longer and of wider steps."""
    calls = [build.small(rows=3), build.call([[], [4, 9]], [[7], []]), build.small(rows=1, heads=8)]
    fresh = [run(call, 3) for call in calls]
    scratch = SplitScratch.allocate(40, device)
    scratch.parts.fill_(math.nan)
    scratch.lses.fill_(math.nan)
    for at in (0, 1, 2, 1, 0):
        for got, want in zip(run(calls[at], 3, scratch=scratch), fresh[at], strict=True):
            assert_same(got, want)
    assert scratch.nbytes == 40 * (512 * 4 + 4)


def test_the_parts_are_the_partial_results_the_merge_defines(build: Builder, device: str) -> None:
    """fp32, normalised, natural LSE, no sink: `merge_scopes_ref` makes the same rows of them."""
    call = build.small(rows=2)
    scratch = SplitScratch.allocate(3 * 2 * 4, device)
    out, lse = run(call, 3, scratch=scratch)
    parts, lses = scratch.parts.view(3, 2, 4, 512).cpu(), scratch.lses.view(3, 2, 4).cpu()
    assert call.sink is not None
    want, want_lse = merge_scopes_ref(parts, lses, call.sink.cpu())
    found = compare.close("out", out.cpu(), want, compare.TOLERANCES["attention_bf16"], out.cpu())
    assert found.passed, found.detail
    assert torch.allclose(lse.cpu(), want_lse.float(), atol=1e-5)
    call.check(out, lse)  # in another base both sides would agree on something else


# --- one split, and what a split count promises ----------------------------------------------------------------------


def test_one_split_is_the_single_pass(build: Builder) -> None:
    """Bit for bit where every operation is rounded alone; a compiler may fuse the two kernels differently."""
    call = build.call(build.lists([20, 0, 33], 64), build.lists([17, 40, 0], 64), heads=5)
    out, lse = run(call, 1)
    call.check(out, lse)
    if kernels.mode() == "interpreted":
        want, want_lse = sparse_mla_decode(
            call.q, call.swa, call.extra, sink=call.sink, return_lse=True, launch=TILE
        )  # fmt: skip
        assert want_lse is not None
        assert_same(out, want)
        assert_same(lse, want_lse)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_split_count_gives_the_same_bytes(splits: int, build: Builder) -> None:
    call = build.small(rows=3)
    for first, second in zip(run(call, splits), run(call, splits), strict=True):
        assert_same(first, second)


def test_a_row_does_not_depend_on_its_neighbours(build: Builder) -> None:
    call = build.small(rows=3)
    assert call.extra is not None
    out, _ = run(call, 3)
    alone = build.scope(call.swa.cache, [call.swa.indices[20:40].tolist()])
    extra = build.scope(call.extra.cache, [call.extra.indices[17:34].tolist()])
    single, _ = run(replace(call, q=call.q[1:2], swa=alone, extra=extra), 3)
    assert_same(single[0], out[1])


@pytest.mark.parametrize("splits", [1, 3])
def test_the_rotation_is_undone_in_fp32_before_rounding(splits: int, build: Builder, device: str) -> None:
    call = build.call([[3] * 20, [5] * 33, [], [1, 2]], [[7] * 17, [], [], [4]])
    positions, freqs = torch.tensor([0, 9, 77, 1000]), frequencies(160_000.0, 64)
    rotation = QueryRotation.of(positions.to(device), freqs.to(device), 1024)
    out, lse = run(call, splits, rotation=rotation)
    plain, plain_lse = run(call, splits)
    assert call.extra is not None
    want, _ = sparse_attention_ref(call.q, [call.swa, call.extra], call.sink, call.scale)
    want = rotate_back_ref(want.cpu(), positions, freqs)
    rounded = rotate_back_ref(plain.cpu().float(), positions, freqs).to(torch.bfloat16)
    found = compare.close("out", out.cpu(), want, compare.TOLERANCES["attention_bf16"], rounded)
    assert found.passed, found.detail
    assert_same(out[..., :448], plain[..., :448])
    assert_same(lse, plain_lse)
    assert torch.count_nonzero(out[2]) == 0


def test_a_position_outside_the_tables_shows(build: Builder, device: str) -> None:
    call = build.call([[3] * 20, []], [[7] * 17, []])
    rotation = QueryRotation.of(torch.tensor([64, 64], device=device), torch.ones(32, device=device), 64)
    for splits in (1, 3):
        out, _ = run(call, splits, rotation=rotation)
        assert out[0, :, 448:].isnan().all()
        assert not out[0, :, :448].isnan().any()
        assert torch.count_nonzero(out[1]) == 0, "zeros have no direction"


# --- serving: the caller's memory, launches, capture -----------------------------------------------------------------


@pytest.mark.parametrize(("splits", "kernels_launched"), [(1, 1), (3, 2)])
def test_one_launch_or_two_and_no_host_read(
    splits: int, kernels_launched: int, build: Builder, device: str
) -> None:  # fmt: skip
    call = build.small()
    scratch, out = SplitScratch.allocate(3 * 2 * 4, device), torch.empty_like(call.q)
    counted = launches.count_launches(
        lambda: split_k_decode(call.q, call.swa, call.extra, sink=call.sink, out=out, scratch=scratch, splits=splits),
        warmup=1,
    )
    assert len(counted.kernels) == counted.total == kernels_launched, counted


@pytest.mark.parametrize("splits", [1, 2])
def test_the_outputs_may_be_slices_of_the_callers_buffers(splits: int, build: Builder, device: str) -> None:
    call = build.small(rows=2)
    out, lse = run(call, splits)
    buffer = torch.full((3, 8, 512), GUARD_BITS, dtype=torch.int16, device=device).view(torch.bfloat16)
    lses = torch.full((3, 8), 7.0, device=device)
    run(call, splits, out=buffer[:2, 4:], lse=lses[:2, 4:])
    assert_same(buffer[:2, 4:], out)
    assert_same(lses[:2, 4:], lse)
    assert (buffer.view(torch.int16)[2] == GUARD_BITS).all()
    assert (buffer.view(torch.int16)[:2, :4] == GUARD_BITS).all()
    assert (lses[2] == 7.0).all()
    assert (lses[:2, :4] == 7.0).all()


def test_the_plan_knows_widths_and_not_lengths(build: Builder) -> None:
    """What a capture freezes has to hold for every replay: short rows of a wide scope are planned as wide ones."""
    call = build.small(rows=1)
    assert call.extra is not None
    wide = replace(call.extra, width=1024)
    empty = replace(wide, indptr=torch.zeros_like(wide.indptr))
    assert plan_for(call.q, call.swa, wide) == plan_for(call.q, call.swa, empty)
    assert plan_for(call.q, call.swa, wide).splits > 1
    assert plan_for(call.q, call.swa, replace(call.extra, width=0)).splits == 1


def test_the_chosen_path_can_be_asked_for(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(tmp_path))
    run(build.small(rows=1), 3)
    found = next(row for row in diagnostics.read(tmp_path) if row.event == "split_k_decode")
    assert (found.fields["splits"], found.fields["launch"]) == (3, "16x16 w4 s1")


def test_an_empty_batch_launches_nothing(build: Builder, device: str) -> None:
    call = replace(build.call([[]], [[]]), q=torch.empty((0, 4, 512), dtype=torch.bfloat16, device=device))
    call = replace(call, swa=build.scope(call.swa.cache, []), extra=None)
    out, lse = run(call, None)
    assert out.shape == (0, 4, 512)
    assert lse.shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
def test_a_captured_call_follows_lists_that_change_between_replays(splits: int, build: Builder, device: str) -> None:
    call = build.small(rows=2)
    assert call.extra is not None
    scratch, out = SplitScratch.allocate(3 * 2 * 4, device), torch.empty_like(call.q)

    def step() -> None:
        split_k_decode(
            call.q, call.swa, call.extra, sink=call.sink, out=out, scratch=scratch, splits=splits, launch=TILE
        )  # fmt: skip

    step()  # compiled before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length in (17, 0, 5):
        call.extra.indptr.copy_(torch.tensor([0, length, 2 * length], dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        call.check(out)


# --- refusals: before the first launch -------------------------------------------------------------------------------


def refused(call: Call, match: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    """The error comes, and the scratch is untouched."""
    rows, heads = call.q.shape[:2]
    scratch = SplitScratch.allocate(3 * rows * heads, call.q.device)
    scratch.parts.fill_(7.0)
    arguments: dict[str, Any] = {"sink": call.sink, "scratch": scratch, "splits": 3, "extra": call.extra, **options}
    extra = arguments.pop("extra")
    with pytest.raises(kind, match=match):
        split_k_decode(call.q, call.swa, extra, **arguments)
    assert (scratch.parts == 7.0).all(), "a kernel was launched before the error"


def test_wrong_arguments_are_refused_before_the_first_launch(build: Builder, device: str) -> None:
    call = build.small()
    assert call.sink is not None
    refused(call, r"sink: got shape \[3\], expected \[4\]", sink=call.sink[1:])
    refused(call, "extra: got tuple, expected a Scope", TypeError, extra=())
    refused(call, r"out: got shape \[1, 4, 512\]", out=torch.empty((1, 4, 512), dtype=torch.bfloat16, device=device))
    refused(call, "out: got torch.float32, expected torch.bfloat16", TypeError, out=torch.empty_like(call.q).float())
    refused(call, "out: its memory range overlaps q's", out=call.q)
    refused(call, r"lse: got shape \[2, 5\]", lse=torch.empty((2, 5), device=device))
    refused(call, "launch: got str, expected a LaunchShape", TypeError, launch="16x16")
    for splits in (0, 33, 2.0):
        refused(call, rf"splits: got {splits}, expected an integer from 1 to 32", splits=splits)
    refused(call, "rotation: got tuple, expected a QueryRotation", TypeError, rotation=())
    rotation = QueryRotation.of(torch.zeros(3, dtype=torch.int64, device=device), torch.ones(32, device=device), 4)
    refused(call, "rotation: got 3 positions", rotation=rotation)
    rows = torch.zeros(65_537, dtype=torch.int32, device=device)
    many = replace(call, q=call.q[:1].expand(65_536, 4, 512), swa=replace(call.swa, indptr=rows), extra=None)
    with pytest.raises(ValueError, match="q: got 65536 rows, expected at most 65535"):
        split_k_decode(many.q, many.swa, splits=1)


def test_a_scratch_that_does_not_fit_is_refused(build: Builder, device: str) -> None:
    call = build.small(rows=2, heads=4)
    refused(call, "scratch: got 23 places .* expected at least 24", scratch=SplitScratch.allocate(23, device))
    refused(call, "scratch: got tuple, expected a SplitScratch", TypeError, scratch=())
    scratch = SplitScratch.allocate(24, device)
    inside = scratch.parts.view(torch.bfloat16).view(-1)[: 2 * 4 * 512].view(2, 4, 512)
    refused(call, r"out: its memory range overlaps scratch\.parts's", scratch=scratch, out=inside)
    refused(replace(call, q=inside), r"scratch\.parts: its memory range overlaps q's", scratch=scratch)
    lse = scratch.lses[:8].view(2, 4)
    refused(call, r"lse: its memory range overlaps scratch\.lses's", scratch=scratch, lse=lse)
    with pytest.raises(ValueError, match="lses: got shape"):
        SplitScratch(scratch.parts, scratch.lses[1:])
    with pytest.raises(ValueError, match="parts: got strides"):
        SplitScratch(torch.empty((4, 1024), device=device)[:, ::2], scratch.lses[:4])
    with pytest.raises(ValueError, match="lses: its memory range overlaps parts's"):
        SplitScratch(scratch.parts, scratch.parts.view(-1)[:24])
    with pytest.raises(ValueError, match="places: got -1, expected a non-negative integer"):
        SplitScratch.allocate(-1, device)


def test_the_kernels_constants_are_the_formats() -> None:
    assert split_decode._DIM.value == kv_cache.HEAD_DIM
    assert split_decode._LOG2_E.value == pytest.approx(math.log2(math.e), abs=1e-16)
    assert split_decode._LN_2.value == pytest.approx(math.log(2), abs=1e-16)
