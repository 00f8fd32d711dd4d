"""Two-scope decode: scope by scope and merged, the same attention as in one pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref.evidence import compare, launches
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import Scope
from dsv4ref.kernels.sparse_mla import LaunchShape, QueryRotation, TwoScopeScratch, two_scope_decode
from dsv4ref.ref.rope import frequencies, rotate_back_ref
from dsv4ref.ref.sparse_attention import sparse_attention_ref

GUARD_BITS = 0x7FA5


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def run(call: Call, **options: Any) -> tuple[Tensor, Tensor]:
    assert call.extra is not None
    with poisoned_allocations():
        out, lse = two_scope_decode(
            call.q, call.swa, call.extra, sink=call.sink, scale=call.scale, **{"return_lse": True, **options}
        )
    assert lse is not None
    return out, lse


def assert_same(got: Tensor, want: Tensor) -> None:
    found = compare.identical("result", got.contiguous(), want.contiguous())
    assert found.passed, found.detail


@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_head_counts_of_every_tensor_parallel_slice(heads: int, build: Builder) -> None:
    call = build.small(rows=1, heads=heads)
    call.check(*run(call))


def test_each_scope_may_be_empty_in_each_row(build: Builder) -> None:
    """Neither, one, the other, both; and a row whose slots are all invalid."""
    swa = [[3, 9], [], [5, 5, 11], [], [-1, 10**6]]
    extra = [[7], [2, 40], [], [], [-1]]
    call = build.call(swa, extra)
    out, lse = run(call)
    call.check(out, lse)
    assert torch.count_nonzero(out[3:]) == 0
    assert (lse[3:] == -math.inf).all()


def test_a_scope_without_a_single_slot(build: Builder) -> None:
    call = build.call(build.lists([20, 1, 17], 64), [[], [], []])
    call.check(*run(call))


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -80.0, 80.0])
def test_the_sink_is_applied_once_and_may_be_infinite(sink: float, build: Builder) -> None:
    call = build.small()
    assert call.sink is not None
    call = replace(call, sink=torch.full_like(call.sink, sink))
    call.check(*run(call))


def test_no_sink_at_all(build: Builder) -> None:
    call = build.small(sink=False)
    call.check(*run(call))


def test_the_two_caches_keep_their_dialects_and_launch_shapes(build: Builder) -> None:
    call = build.small(dialects=("e4m3fnuz", "e4m3fn"), blocks=(256, 2))
    call.check(*run(call, launches=(LaunchShape(16, 16, 4), LaunchShape(64, 32, 8))))


def test_the_rotation_is_undone_on_the_merged_row(build: Builder, device: str) -> None:
    call = build.small(rows=3)
    assert call.extra is not None
    positions, freqs = torch.tensor([0, 9, 1000]), frequencies(160_000.0, 64)
    rotation = QueryRotation.of(positions.to(device), freqs.to(device), 1024)
    out, _ = run(call, rotation=rotation)
    want, _ = sparse_attention_ref(call.q, [call.swa, call.extra], call.sink, call.scale)
    want = rotate_back_ref(want.cpu(), positions, freqs)
    plain, _ = run(call)
    found = compare.close(
        "out", out.cpu(), want, compare.TOLERANCES["attention_bf16"],
        rotate_back_ref(plain.cpu().float(), positions, freqs).to(torch.bfloat16),
    )  # fmt: skip
    assert found.passed, found.detail
    assert_same(out[..., :448], plain[..., :448])


def test_a_scratch_kept_between_steps_changes_no_bit(build: Builder, device: str) -> None:
    """Larger than the batch, poisoned, and holding the last step's answer: every byte read is written first."""
    call, later = build.small(rows=3), build.call([[], [4, 9]], [[7], []], heads=4)
    fresh, fresh_later = run(call), run(later)
    scratch = TwoScopeScratch.allocate(5, 4, device)
    scratch.partials.fill_(math.nan)
    scratch.lses.fill_(math.nan)
    pointers = scratch.partials.data_ptr(), scratch.lses.data_ptr()
    for step, want in ((call, fresh), (later, fresh_later), (call, fresh)):
        for got, expected in zip(run(step, scratch=scratch), want, strict=True):
            assert_same(got, expected)
    assert (scratch.partials.data_ptr(), scratch.lses.data_ptr()) == pointers
    assert scratch.nbytes == 2 * 5 * 4 * (512 * 2 + 4)


def test_three_launches_and_no_host_read(build: Builder, device: str) -> None:
    call = build.small()
    scratch, out = TwoScopeScratch.allocate(2, 4, device), torch.empty_like(call.q)
    assert call.extra is not None
    swa, extra = call.swa, call.extra
    counted = launches.count_launches(
        lambda: two_scope_decode(call.q, swa, extra, sink=call.sink, out=out, scratch=scratch), warmup=1
    )
    assert len(counted.kernels) == counted.total == 3, counted


def test_the_output_may_be_a_slice_of_the_callers_buffer(build: Builder, device: str) -> None:
    call = build.small(rows=2)
    out, _ = run(call)
    buffer = torch.full((3, 8, 512), GUARD_BITS, dtype=torch.int16, device=device).view(torch.bfloat16)
    run(call, out=buffer[:2, 4:])
    assert_same(buffer[:2, 4:], out)
    assert (buffer.view(torch.int16)[2] == GUARD_BITS).all()
    assert (buffer.view(torch.int16)[:2, :4] == GUARD_BITS).all()


@pytest.mark.gpu
def test_a_captured_call_follows_lists_that_change_between_replays(build: Builder, device: str) -> None:
    call = build.small(rows=2)
    assert call.extra is not None
    extra: Scope = call.extra
    scratch, out = TwoScopeScratch.allocate(2, 4, device), torch.empty_like(call.q)
    two_scope_decode(call.q, call.swa, extra, sink=call.sink, out=out, scratch=scratch)  # compiled before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two_scope_decode(call.q, call.swa, extra, sink=call.sink, out=out, scratch=scratch)
    for length in (17, 0, 5):
        extra.indptr.copy_(torch.tensor([0, length, 2 * length], dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        call.check(out)


# --- refusals: before the first launch -------------------------------------------------------------------------------


def refused(call: Call, match: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    """The error comes, and the scratch is untouched: not even the first decode ran."""
    rows, heads = call.q.shape[:2]
    scratch = TwoScopeScratch.allocate(rows, heads, call.q.device)
    scratch.partials.fill_(7.0)
    arguments: dict[str, Any] = {"sink": call.sink, "scratch": scratch, "extra": call.extra, **options}
    extra = arguments.pop("extra")
    with pytest.raises(kind, match=match):
        two_scope_decode(call.q, call.swa, extra, **arguments)
    assert (scratch.partials == 7.0).all(), "a decode was launched before the error"


def test_wrong_arguments_are_refused_before_the_first_launch(build: Builder, device: str) -> None:
    call = build.small()
    assert call.sink is not None
    refused(call, r"extra: got NoneType, expected a Scope \(with one scope, sparse_mla_decode\)", TypeError, extra=None)
    refused(call, r"sink: got shape \[3\], expected \[4\]", sink=call.sink[1:])
    refused(call, r"out: got shape \[1, 4, 512\]", out=torch.empty((1, 4, 512), device=device))
    refused(call, "out: its memory range overlaps q's", out=call.q)
    refused(call, r"lse: got shape \[2, 5\]", lse=torch.empty((2, 5), device=device))
    refused(call, r"launches\[1\]: got str, expected a LaunchShape or None", TypeError, launches=(None, "16x16"))
    rotation = QueryRotation.of(torch.zeros(3, dtype=torch.int64, device=device), torch.ones(32, device=device), 4)
    refused(call, "rotation: got 3 positions", rotation=rotation)


def test_a_scratch_that_does_not_fit_is_refused(build: Builder, device: str) -> None:
    call = build.small(rows=2, heads=4)
    refused(call, "scratch: got 1 rows of 4 heads", scratch=TwoScopeScratch.allocate(1, 4, device))
    refused(call, "scratch: got 2 rows of 8 heads", scratch=TwoScopeScratch.allocate(2, 8, device))
    refused(call, "scratch: got tuple, expected a TwoScopeScratch", TypeError, scratch=())
    scratch = TwoScopeScratch.allocate(2, 4, device)
    refused(call, "out: its memory range overlaps partials's", scratch=scratch, out=scratch.partials[0])
    shared = TwoScopeScratch(torch.stack([call.q, call.q]), torch.empty((2, 2, 4), device=device))
    refused(replace(call, q=shared.partials[0]), r"scratch.partials: its memory range overlaps q's", scratch=shared)
    with pytest.raises(ValueError, match="partials: got strides"):
        TwoScopeScratch(scratch.partials[:, :1], scratch.lses[:, :1])
    with pytest.raises(ValueError, match="lses: its memory range overlaps partials's"):
        TwoScopeScratch(scratch.partials, scratch.partials.view(torch.float32).view(-1)[:16].view(2, 2, 4))
