"""The sparse decode kernel against the reference: interpreted on a CPU, compiled on a GPU, the same tests."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.evidence import compare
from dsv4ref.formats import Dialect, KVCache, Scope, kv_cache
from dsv4ref.kernels.sparse_mla import decode
from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD_BITS = 0x7FA5  # a NaN with a payload: an overwritten guard shows in its bytes


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def assert_same(got: Tensor, want: Tensor, why: str = "") -> None:
    """The same bytes, whatever the strides."""
    found = compare.identical("result", got.contiguous(), want.contiguous())
    assert found.passed, f"{found.detail} {why}"


def guarded(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.full(shape, GUARD_BITS, dtype=torch.int16, device=device).view(torch.bfloat16)


def is_guard(values: Tensor) -> bool:
    return bool((values.contiguous().view(torch.int16) == GUARD_BITS).all())


# --- within the budget of the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 5, 8, 16, 32, 64, 128])
def test_head_counts(heads: int, build: Builder) -> None:
    call = build.small(rows=2 if heads < 64 else 1, heads=heads)
    call.check(*call.run())


@pytest.mark.parametrize("blocks", [(2, 64), (64, 2), (256, 2), (64, 256), (2, 2)], ids=str)
def test_block_sizes(blocks: tuple[int, int], build: Builder) -> None:
    call = build.small(blocks=blocks)
    call.check(*call.run())


@pytest.mark.parametrize("extra", Dialect)
@pytest.mark.parametrize("swa", Dialect)
def test_dialects_of_the_two_caches_are_independent(swa: Dialect, extra: Dialect, build: Builder) -> None:
    call = build.small(dialects=(swa.value, extra.value))
    call.check(*call.run())


LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 126, 127, 128, 129)
SHAPES = (LaunchShape(16, 16, 4), LaunchShape(16, 32, 8), LaunchShape(64, 16, 8, 2), LaunchShape(4, 64, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_list_lengths_around_tiles_and_window(shape: LaunchShape, build: Builder, device: str) -> None:
    """Each length in either scope, both empty included, under tiles of 16, 32 and 64 keys."""
    if device == "cuda" and torch.version.hip is None and shape.block_h < 16:
        pytest.skip("tl.dot needs at least 16 rows on NVIDIA")
    extra = [0, *LENGTHS[:0:-1]]
    call = build.call(build.lists(LENGTHS, 64), build.lists(extra, 64), heads=5)
    call.check(*call.run(launch=shape))


def test_swa_only_layers(build: Builder) -> None:
    call = build.call(build.lists([20, 0, 33], 64))
    call.check(*call.run())


def test_scale_is_an_argument(build: Builder) -> None:
    call = replace(build.small(), scale=0.013)
    call.check(*call.run())


def test_scores_in_the_thousands_do_not_overflow(build: Builder) -> None:
    call = build.small()
    call = replace(call, q=call.q * 512)
    out, lse = call.run()
    assert lse.abs().max() > 1000, "the test must reach scores whose exponential overflows"
    call.check(out, lse)


def test_the_same_call_twice_gives_the_same_bytes(build: Builder) -> None:
    call = build.small(rows=3)
    for first, second in zip(call.run(), call.run(), strict=True):
        assert_same(first, second)


# --- the sink and the LSE --------------------------------------------------------------------------------------------


def test_a_sink_of_minus_infinity_is_no_sink(build: Builder) -> None:
    call = build.call([[3, 9], []], [[7], []], sink=False)
    without, lse = call.run()
    call.check(without, lse)
    ends = replace(call, sink=torch.full((4,), -math.inf, device=call.q.device))
    out, lse_ends = ends.run()
    assert_same(out, without)
    assert_same(lse_ends, lse)


def test_a_sink_of_plus_infinity_takes_everything(build: Builder) -> None:
    """Per head: the others keep their output, and the LSE does not know of the sink."""
    call = build.call([[3, 9], []], [[7], []])
    assert call.sink is not None
    _, lse = call.run()
    call.sink[1] = math.inf
    out, lse_ends = call.run()
    assert torch.count_nonzero(out[:, 1]) == 0
    assert torch.isfinite(out).all()
    assert_same(lse_ends, lse)
    call.check(out, lse_ends)


@pytest.mark.parametrize("offset", [-80.0, 80.0])
def test_sinks_far_from_the_scores(offset: float, build: Builder) -> None:
    call = build.small()
    assert call.sink is not None
    call = replace(call, sink=call.sink + offset)
    call.check(*call.run())


def test_the_lse_may_be_left_out_or_given_inside_a_larger_buffer(build: Builder, device: str) -> None:
    call = build.small(rows=3, heads=5)
    out, lse = call.run()
    bare, none = sparse_mla_decode(call.q, call.swa, call.extra, sink=call.sink)
    assert none is None
    assert_same(bare, out)
    memory = torch.full((6, 9), 7.0, device=device)
    given = memory[2:5, 3:8]
    out_given, returned = call.run(lse=given)
    assert returned is given
    assert_same(given, lse)
    assert_same(out_given, out)
    memory[2:5, 3:8] = 7.0
    assert (memory == 7.0).all(), "memory beside the given LSE was written"


# --- slots that do not count, and slots that count twice -------------------------------------------------------------


def test_invalid_slots_anywhere_in_a_list_are_skipped(build: Builder) -> None:
    """-1, both ends of int32, the first slot past the end; in front, inside and last. 128 is the cache's row count."""
    call = build.call(
        [[-1, 5, 128, 9], [7, INT_MAX, -1, INT_MIN, 8, 2, -1], [129, -2, *range(20), -1, 3]],
        [[4, 130], [-1] * 17 + [6], [INT_MIN]],
    )
    assert call.swa.cache.rows == 128
    call.check(*call.run())


@pytest.mark.parametrize("invalid", [[], [-1], [128, INT_MAX, INT_MIN] * 7], ids=["empty", "-1", "out of range"])
@pytest.mark.parametrize("sink", [None, 0.5, -math.inf, math.inf])
def test_rows_without_a_valid_slot_are_exactly_zero(invalid: list[int], sink: float | None, build: Builder) -> None:
    call = build.call([[3], invalid, [5]], [[], invalid, [6]], sink=False)
    if sink is not None:
        call = replace(call, sink=torch.full((4,), sink, device=call.q.device))
    out, lse = call.run()
    assert_same(out[1], torch.zeros_like(out[1]), "(not even a negative zero)")
    assert torch.equal(lse[1], torch.full_like(lse[1], -math.inf))
    call.check(out, lse)


def test_duplicates_count_as_often_as_they_are_listed(build: Builder) -> None:
    call = build.call([[3, 3, 3, 9] * 6, [3, 9]], [[5, 5], [5]])
    out, lse = call.run()
    call.check(out, lse)
    single = replace(call, swa=build.scope(call.swa.cache, [[3, 9] * 6, [3, 9]]))
    assert (single.run()[0][0] - out[0]).abs().max() > 1e-3
    with pytest.raises(AssertionError, match="out: "):
        single.check(out)


def test_nan_in_entries_nobody_refers_to_does_not_matter(build: Builder) -> None:
    """The same bytes whether the other entries of the same blocks are numbers or poison, pads included."""
    lists = ([[3, 9, -1], [60, INT_MAX]], [[5], [-1]])
    call = build.call(*lists)
    assert call.extra is not None
    clean, lse = call.run()
    for scope in (call.swa, call.extra):
        used = {slot for row in lists[0] + lists[1] for slot in row}
        unused = torch.tensor([slot for slot in range(64) if slot not in used], device=call.q.device)
        scope.cache.entry_rows[0, unused] = 0xFF
        scope.cache.entry_scales[0, unused] = 0xFF
        scope.cache.entry_scales[0, :, 7] = 0xFF
    out, lse_poisoned = call.run()
    assert_same(out, clean)
    assert_same(lse_poisoned, lse)


def _poison_code(cache: KVCache, slot: int) -> None:
    cache.entry_rows[0, slot, 100] = 0x7F if cache.dialect is Dialect.FN else 0x80


def _poison_scale(cache: KVCache, slot: int) -> None:
    cache.entry_scales[0, slot, 6] = 0xFF


def _poison_rope(cache: KVCache, slot: int) -> None:
    cache.entry_rows[0, slot, 575] = 0x7F
    cache.entry_rows[0, slot, 574] = 0xC0


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("poison", [_poison_code, _poison_scale, _poison_rope])
def test_nan_in_an_entry_that_is_read_shows_in_its_row_only(poison: Any, dialect: Dialect, build: Builder) -> None:
    call = build.call([[3, 9], [4, 10]], [[5], [6]], dialects=("e4m3fn", dialect.value))
    assert call.extra is not None
    poison(call.extra.cache, 5)
    out, lse = call.run()
    assert torch.isnan(out[0]).all()
    assert torch.isnan(lse[0]).all()
    assert torch.isfinite(out[1]).all()
    call.check(out, lse)


def test_nothing_is_read_past_the_capacity_of_a_list(build: Builder, device: str) -> None:
    """indptr asks for more than the buffer holds; what stands behind the buffer are valid slots that must not count."""
    call = build.call([[1, 2, 3], [4, 5]])
    memory = torch.tensor([1, 2, 3, 4, *([60] * 40)], dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 3, 40], dtype=torch.int32, device=device)
    call.swa.cache.entry_rows[0, 60] = 0xFF
    beyond = replace(call, swa=Scope(call.swa.cache, memory[:4], indptr, width=40))
    out, lse = beyond.run()
    assert torch.isfinite(out).all()
    within = replace(call, swa=build.scope(call.swa.cache, [[1, 2, 3], [4]]))
    for got, want in zip((out, lse), within.run(), strict=True):
        assert_same(got, want)


def test_blocks_beyond_2_gib_are_addressed_in_64_bits(build: Builder, device: str) -> None:
    """H26. Virtual memory: only pages that are touched exist. An offset that wraps lands in the lead, which is zero."""
    blocks, lead = 2**31 // 37_440 + 20, 2**31 + 2**20
    flat = torch.empty(lead + blocks * 37_440, dtype=torch.uint8, device=device)
    flat[:1] = 0
    cache = KVCache(flat.as_strided((blocks, 64, 584), (37_440, 584, 1), lead), Dialect.FN)
    far = torch.tensor([cache.rows - 1, cache.rows - 70, 3], device=device)
    assert int(far[1]) // 64 * cache.block_stride > 2**31
    kv = build.randn(3, 512, std=0.1).to(device)
    kv_cache.insert(cache, far, kv)
    small = build.cache(3)
    kv_cache.insert(small, torch.arange(3, device=device), kv)
    q = build.queries(1, 4)
    want = Call(q, build.scope(small, [[0, 1, 2]]), build.scope(small, [[1]]))
    got = Call(q, build.scope(cache, [far.tolist()]), build.scope(cache, [far[1:2].tolist()]))
    for ours, theirs in zip(got.run(), want.run(), strict=True):
        assert_same(ours, theirs)


# --- memory of the query and of the output ---------------------------------------------------------------------------


def _contiguous(x: Tensor) -> Tensor:
    return x


def _sliced(x: Tensor) -> Tensor:
    """Rows, heads and dims inside a larger tensor."""
    rows, heads, dim = x.shape
    memory = guarded((rows + 3, heads + 2, dim + 64), str(x.device))
    view = memory[2 : 2 + rows, 1 : 1 + heads, :dim]
    view.copy_(x)
    return view


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("out_layout", [_contiguous, _sliced, _heads_first])
@pytest.mark.parametrize("q_layout", [_contiguous, _sliced, _heads_first])
def test_strides_of_query_and_output(q_layout: Any, out_layout: Any, build: Builder) -> None:
    call = build.call([[1, 2], [], [5]], heads=3)
    plain, _ = call.run()
    out = out_layout(torch.full_like(plain, math.nan))
    strided, _ = replace(call, q=q_layout(call.q)).run(out=out)
    assert strided is out
    assert_same(strided, plain)


def test_one_query_row_for_all_may_be_an_expanded_view(build: Builder) -> None:
    call = build.call([[1, 2], [3]])
    shared = replace(call, q=call.q[:1].expand(2, -1, -1))
    shared.check(*shared.run())


@pytest.mark.parametrize("heads", [3, 16, 17])
def test_memory_around_a_callers_output_is_untouched(heads: int, build: Builder, device: str) -> None:
    """Guard rows and guard heads, also where the last head block is partly outside."""
    call = build.small(rows=3, heads=heads)
    memory = guarded((3 + 4, heads + 5, 512), device)
    out = memory[2:5, 1 : 1 + heads]
    call.check(call.run(out=out)[0])
    out.copy_(guarded((3, heads, 512), device))
    assert is_guard(memory), "memory beside the given output was written"


def test_every_row_of_a_callers_output_is_written(build: Builder, device: str) -> None:
    """Yesterday's answer must not survive in rows that have nothing to attend to."""
    call = build.call([[], [-1], [3], []], [[], [], [], [9]])
    out = guarded((4, 4, 512), device)
    call.run(out=out)
    assert torch.isfinite(out).all()
    call.check(out)


def test_an_empty_batch_launches_nothing(build: Builder) -> None:
    call = build.call([], [], heads=3)
    out, lse = call.run()
    assert out.shape == (0, 3, 512)
    assert lse.shape == (0, 3)


# --- properties ------------------------------------------------------------------------------------------------------


def test_the_order_of_slots_changes_rounding_only(build: Builder) -> None:
    swa, extra = build.lists([40], 64), build.lists([33], 64)
    call = build.call(swa, extra)
    out, lse = call.run()
    for _ in range(2):
        order = [torch.randperm(len(row), generator=build.rng).tolist() for row in (swa[0], extra[0])]
        shuffled = [[row[i] for i in places] for row, places in zip((swa[0], extra[0]), order, strict=True)]
        assert call.extra is not None
        again = replace(
            call,
            swa=build.scope(call.swa.cache, [shuffled[0]]),
            extra=build.scope(call.extra.cache, [shuffled[1]]),
        )
        out_again, lse_again = again.run()
        call.check(out_again, lse_again)
        assert (out_again - out).abs().max() <= 2 * out.abs().max() / 128
        assert torch.allclose(lse_again, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("extra_dialect", Dialect)
def test_two_scopes_are_one_concatenated_scope(extra_dialect: Dialect, build: Builder, device: str) -> None:
    """Also across dialects: written under 224, fnuz holds exactly the numbers that OCP holds under 448."""
    kv = build.randn(48, 512, std=0.1).to(device)
    first, second = (kv_cache.allocate(12, 2, d, device=device) for d in ("e4m3fn", extra_dialect))
    joined = kv_cache.allocate(24, 2, "e4m3fn", device=device)
    half = torch.arange(24, device=device)
    kv_cache.insert(first, half, kv[:24])
    kv_cache.insert(second, half, kv[24:])
    kv_cache.insert(joined, torch.arange(48, device=device), kv)
    a, b = build.lists([20, 0, 7], 24), build.lists([17, 9, 0], 24)
    q, sink = build.queries(3, 4), build.randn(4).to(device)
    split = Call(q, build.scope(first, a), build.scope(second, b), sink)
    whole = Call(q, build.scope(joined, [x + [s + 24 for s in y] for x, y in zip(a, b, strict=True)]), None, sink)
    out, lse = split.run()
    whole.check(out, lse)
    want, want_lse = whole.run()
    assert (out - want).abs().max() <= 2 * want.abs().max() / 128
    assert torch.allclose(lse, want_lse, rtol=1e-6, atol=1e-6)


def test_launch_shapes_change_rounding_only(build: Builder) -> None:
    call = build.small(rows=1, heads=20)
    out, _ = call.run(launch=LaunchShape(16, 16, 4))
    for shape in (LaunchShape(32, 64, 8), LaunchShape(64, 32, 8)):
        again, _ = call.run(launch=shape)
        call.check(again)
        assert (again - out).abs().max() <= 2 * out.abs().max() / 128


def test_the_kernels_constants_are_the_formats() -> None:
    names = {
        "_NOPE": kv_cache.NOPE_DIM,
        "_DIM": kv_cache.HEAD_DIM,
        "_ROPE": kv_cache.ROPE_DIM,
        "_SCALE_BLOCK": kv_cache.SCALE_BLOCK,
        "_SCALE_SLOTS": kv_cache.SCALE_SLOTS,
        "_ROW_BYTES": kv_cache.ROW_BYTES,
    }
    assert {name: getattr(decode, name).value for name in names} == names


# --- which launch shape is used --------------------------------------------------------------------------------------


def launched(call: Call, folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> str:
    """The launch shape that the recorder saw."""
    patch.setenv("DSV4REF_SHAPE_DUMP", str(folder))
    call.run(**options)
    return str(diagnostics.read(folder)[-1].fields["launch"])


def test_the_environment_overrides_the_selection_and_an_argument_the_environment(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = build.call([[1, 2]])
    monkeypatch.delenv("DSV4REF_LAUNCH_SHAPE", raising=False)
    selected = launched(call, tmp_path, monkeypatch)
    monkeypatch.setenv("DSV4REF_LAUNCH_SHAPE", "16x64x4")
    assert launched(call, tmp_path, monkeypatch) == "16x64 w4 s1" != selected
    monkeypatch.setenv("DSV4REF_LAUNCH_SHAPE", "32x32x8x2")
    assert launched(call, tmp_path, monkeypatch) == "32x32 w8 s2"
    assert launched(call, tmp_path, monkeypatch, launch=LaunchShape(16, 16, 4)) == "16x16 w4 s1"
    monkeypatch.delenv("DSV4REF_LAUNCH_SHAPE")
    assert launched(call, tmp_path, monkeypatch) == selected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64x16", "DSV4REF_LAUNCH_SHAPE: got '64x16', expected BHxBKxWARPS"),
        ("48x16x4", "DSV4REF_LAUNCH_SHAPE: got '48x16x4'"),
        ("64x128x8", "block_k: got 128, expected at most 64"),
    ],
)
def test_a_bad_shape_in_the_environment_is_an_error(
    text: str, message: str, build: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4REF_LAUNCH_SHAPE", text)
    with pytest.raises(ValueError, match=message):
        build.call([[1, 2]]).run()
