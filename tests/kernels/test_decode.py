"""The sparse decode kernel against the reference: interpreted on a CPU, compiled on a GPU, the same tests.

Every output and scratch starts as NaN, every cache ends in a block of 0xFF (NaN codes, scales and rope), and inputs are
built on the CPU so that they do not depend on the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import Dialect, KVCache, Scope, kv_cache
from dsv4ref.formats.scope import ragged
from dsv4ref.kernels.sparse_mla import decode
from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD_BITS = 0x7FA5  # a NaN with a payload: an overwritten guard shows in its bytes
Lists = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Call:
    """The arguments of one decode, and what the reference makes of them."""

    q: Tensor
    swa: Scope
    extra: Scope | None = None
    sink: Tensor | None = None
    scale: float = 512**-0.5

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The kernel's out and LSE, into poisoned memory."""
        with poisoned_allocations():
            out, lse = sparse_mla_decode(
                self.q, self.swa, self.extra, sink=self.sink, scale=self.scale, **{"return_lse": True, **options}
            )
        assert lse is not None
        return out, lse

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Hold results against the budget of the attention gates."""
        scopes = [self.swa] if self.extra is None else [self.swa, self.extra]
        want, want_lse = sparse_attention_ref(self.q, scopes, self.sink, self.scale)
        plain, _ = sparse_attention_plain(self.q, scopes, self.sink, self.scale)
        found = compare.close("out", out, want, compare.TOLERANCES["attention_bf16"], plain)
        assert found.passed, found.detail
        if lse is not None:
            found = compare.close("lse", lse, want_lse, compare.TOLERANCES["lse_fp32"])
            assert found.passed, found.detail


class Builder:
    """Builds calls on one device from one generator."""

    def __init__(self, rng: torch.Generator, device: str) -> None:
        self.rng, self.device = rng, device

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.rng) * std

    def queries(self, rows: int, heads: int) -> Tensor:
        return self.randn(rows, heads, 512, std=16.0).to(torch.bfloat16).to(self.device)

    def cache(self, entries: int, block: int = 64, dialect: str = "e4m3fn") -> KVCache:
        """``entries`` rounded up to whole blocks, then one block of poison."""
        blocks = -(-entries // block)
        cache = kv_cache.allocate(blocks + 1, block, dialect, device=self.device, fill=0xFF)
        slots = torch.arange(blocks * block, device=self.device)
        kv_cache.insert(cache, slots, self.randn(blocks * block, 512, std=0.1).to(self.device))
        return cache

    def scope(self, cache: KVCache, lists: Lists) -> Scope:
        return Scope(cache, *ragged(lists, self.device), width=max((len(row) for row in lists), default=0))

    def lists(self, lengths: Sequence[int], entries: int) -> list[list[int]]:
        return [torch.randint(0, entries, (n,), generator=self.rng).tolist() for n in lengths]

    def call(
        self, swa: Lists, extra: Lists | None = None, *, heads: int = 4, blocks: tuple[int, int] = (64, 64),
        dialects: tuple[str, str] = ("e4m3fn", "e4m3fn"), entries: int = 64, sink: bool = True,
    ) -> Call:  # fmt: skip
        return Call(
            q=self.queries(len(swa), heads),
            swa=self.scope(self.cache(entries, blocks[0], dialects[0]), swa),
            extra=None if extra is None else self.scope(self.cache(entries, blocks[1], dialects[1]), extra),
            sink=self.randn(heads).to(self.device) if sink else None,
        )

    def small(self, rows: int = 2, heads: int = 4, **options: Any) -> Call:
        """Rows of 20 SWA and 17 extra slots: whole and partial tiles of 16."""
        return self.call(self.lists([20] * rows, 64), self.lists([17] * rows, 64), heads=heads, **options)


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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
    call = replace(call, q=call.q * 256)
    out, lse = call.run()
    assert lse.abs().max() > 1000
    call.check(out, lse)


def test_the_same_call_twice_gives_the_same_bytes(build: Builder) -> None:
    call = build.small(rows=3)
    for first, second in zip(call.run(), call.run(), strict=True):
        assert same_bytes(first, second)


# --- the sink and the LSE --------------------------------------------------------------------------------------------


def test_a_sink_of_minus_infinity_is_no_sink(build: Builder) -> None:
    call = build.call([[3, 9], []], [[7], []], sink=False)
    without, lse = call.run()
    call.check(without, lse)
    ends = replace(call, sink=torch.full((4,), -math.inf, device=call.q.device))
    out, lse_ends = ends.run()
    assert same_bytes(out, without)
    assert same_bytes(lse_ends, lse)


def test_a_sink_of_plus_infinity_takes_everything(build: Builder) -> None:
    """Per head: the others keep their output, and the LSE does not know of the sink."""
    call = build.call([[3, 9], []], [[7], []])
    assert call.sink is not None
    _, lse = call.run()
    call.sink[1] = math.inf
    out, lse_ends = call.run()
    assert torch.count_nonzero(out[:, 1]) == 0
    assert torch.isfinite(out).all()
    assert same_bytes(lse_ends, lse)
    call.check(out, lse_ends)


@pytest.mark.parametrize("offset", [-80.0, 80.0])
def test_sinks_far_from_the_scores(offset: float, build: Builder) -> None:
    call = build.small()
    assert call.sink is not None
    call = replace(call, sink=call.sink + offset)
    call.check(*call.run())


def test_the_lse_may_be_left_out_or_given_with_any_strides(build: Builder, device: str) -> None:
    call = build.small(rows=3, heads=5)
    out, lse = call.run()
    bare, none = sparse_mla_decode(call.q, call.swa, call.extra, sink=call.sink)
    assert none is None
    assert same_bytes(bare, out)
    memory = torch.full((5, 7), 7.0, device=device)
    given = memory.T[2:5]  # [3, 5]: rows next to each other, heads 7 apart
    with pytest.raises(ValueError, match=r"lse: got strides \(1, 7\), expected a unit stride in the last dimension"):
        call.run(lse=given)
    memory = torch.full((6, 9), 7.0, device=device)
    given = memory[2:5, 3:8]
    out_given, returned = call.run(lse=given)
    assert returned is given
    assert same_bytes(given, lse)
    assert same_bytes(out_given, out)
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
    assert same_bytes(out[1], torch.zeros_like(out[1])), "not even a negative zero"
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
    assert same_bytes(out, clean)
    assert same_bytes(lse_poisoned, lse)


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
        assert same_bytes(got, want)


def test_blocks_beyond_2_gib_are_addressed_in_64_bits(build: Builder, device: str) -> None:
    """H26. The cache is virtual memory: only the pages that are touched exist."""
    blocks = 2**31 // 37_440 + 20
    flat = torch.empty(blocks * 37_440, dtype=torch.uint8, device=device)
    cache = KVCache(flat.as_strided((blocks, 64, 584), (37_440, 584, 1)), Dialect.FN)
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
        assert same_bytes(ours, theirs)


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
    assert same_bytes(strided, plain)


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


# --- refusals --------------------------------------------------------------------------------------------------------


def _meta_scope() -> Scope:
    cache = kv_cache.allocate(1, 2, "e4m3fn", device="meta")
    return Scope(cache, *(t.to("meta") for t in ragged([[0], [1]])), width=1)


def _refused(call: Call, error: type[Exception], message: str, **arguments: Any) -> None:
    fields = {"q": call.q, "swa": call.swa, "extra": call.extra, "sink": call.sink, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        sparse_mla_decode(fields.pop("q"), fields.pop("swa"), fields.pop("extra"), **fields)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("q", lambda c: c.q.tolist(), TypeError, "q: got list, expected a torch.Tensor"),
        ("q", lambda c: c.q.float(), TypeError, "q: got torch.float32, expected torch.bfloat16"),
        ("q", lambda c: c.q[0], ValueError, "q: got shape [4, 512], expected [T, H, 512]"),
        ("q", lambda c: c.q[..., :448], ValueError, "q: got shape [2, 4, 448], expected [T, H, 512]"),
        ("q", lambda c: c.q[:, :0], ValueError, "q: got 0 heads, expected at least 1"),
        ("q", lambda c: c.q.repeat(1, 1, 2)[..., ::2], ValueError, "q: got strides (4096, 1024, 2), expected a unit"),
        ("swa", lambda c: c.swa.cache, TypeError, "swa: got KVCache, expected a Scope"),
        ("swa", lambda c: None, TypeError, "swa: got NoneType, expected a Scope"),
        ("swa", lambda c: replace(c.swa, indptr=c.swa.indptr[:2]), ValueError, "swa: its indptr has 1 rows, expected 2"),
        ("swa", lambda c: _meta_scope(), ValueError, "swa: cache on meta, expected"),
        ("extra", lambda c: c.swa.cache, TypeError, "extra: got KVCache, expected a Scope"),
        ("extra", lambda c: replace(c.swa, indptr=c.swa.indptr[:1]), ValueError, "extra: its indptr has 0 rows"),
        ("extra", lambda c: _meta_scope(), ValueError, "extra: cache on meta, expected"),
        ("sink", lambda c: c.sink.double(), TypeError, "sink: got torch.float64, expected torch.float32"),
        ("sink", lambda c: 0.0, TypeError, "sink: got float, expected a torch.Tensor"),
        ("sink", lambda c: c.sink[:3], ValueError, "sink: got shape [3], expected [4]"),
        ("sink", lambda c: c.sink.repeat(2)[::2], ValueError, "sink: got strides (2,), expected a contiguous tensor"),
        ("sink", lambda c: c.sink.to("meta"), ValueError, "sink: on meta, expected"),
        ("scale", lambda c: 0.0, ValueError, "scale: got 0.0, expected a positive finite float"),
        ("scale", lambda c: -0.1, ValueError, "scale: got -0.1"),
        ("scale", lambda c: math.nan, ValueError, "scale: got nan"),
        ("scale", lambda c: math.inf, ValueError, "scale: got inf"),
        ("scale", lambda c: 1, ValueError, "scale: got 1, expected a positive finite float"),
        ("scale", lambda c: None, ValueError, "scale: got None"),
        ("out", lambda c: c.q.tolist(), TypeError, "out: got list, expected a torch.Tensor"),
        ("out", lambda c: c.q.float(), TypeError, "out: got torch.float32, expected torch.bfloat16"),
        ("out", lambda c: torch.empty_like(c.q)[:1], ValueError, "out: got shape [1, 4, 512], expected [2, 4, 512]"),
        ("out", lambda c: c.q.to("meta"), ValueError, "out: on meta, expected"),
        ("out", lambda c: c.q.repeat(1, 1, 2)[..., ::2], ValueError, "out: got strides (4096, 1024, 2), expected a unit"),
        ("out", lambda c: c.q[:1].clone().expand(2, 4, 512), ValueError, "with strides (0, 512, 1) overlaps itself"),
        ("lse", lambda c: c.q[..., 0].clone(), TypeError, "lse: got torch.bfloat16, expected torch.float32"),
        ("lse", lambda c: c.sink.clone(), ValueError, "lse: got shape [4], expected [2, 4]"),
        ("lse", lambda c: torch.empty(2, 4, device="meta"), ValueError, "lse: on meta, expected"),
        ("lse", lambda c: c.sink.clone().expand(2, 4), ValueError, "lse: shape [2, 4] with strides (0, 1) overlaps itself"),
        ("launch", lambda c: "64x16x8", TypeError, "launch: got str, expected a LaunchShape"),
        ("launch", lambda c: (64, 16, 8), TypeError, "launch: got tuple, expected a LaunchShape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    argument: str, change: Any, error: type[Exception], message: str, build: Builder
) -> None:
    call = build.call([[1], [2]])
    _refused(call, error, message, **{argument: change(call)})


def _over(other: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that begins in the last 16 bytes of another one's memory; the pool holds both."""
    size = math.prod(shape) * dtype.itemsize
    begin = other.storage_offset() * other.element_size() + other.numel() * other.element_size() - 16
    pool = torch.empty(0, dtype=torch.uint8, device=other.device).set_(other.untyped_storage())
    return pool[begin : begin + size].view(dtype).view(shape)


def _pooled(tensor: Tensor) -> Tensor:
    """A copy at the start of a pool that is large enough for an output behind it."""
    size = tensor.numel() * tensor.element_size()
    pool = torch.zeros(size + (1 << 16), dtype=torch.uint8, device=tensor.device)
    copy = pool[:size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


INPUTS = {
    "q": "q",
    "swa cache": "the swa cache",
    "extra cache": "the extra cache",
    "swa indices": "the swa indices",
    "extra indices": "the extra indices",
    "swa indptr": "the swa indptr",
    "extra indptr": "the extra indptr",
    "sink": "sink",
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("output", ["out", "lse"])
def test_an_output_that_shares_memory_with_an_input_is_refused(output: str, which: str, build: Builder) -> None:
    """Programs that finish early would write what others have yet to read."""
    call = build.call([list(range(4)), [2] * 4], [list(range(4)), [2] * 4])
    assert call.extra is not None
    assert call.sink is not None
    shape, dtype = ((2, 4, 512), torch.bfloat16) if output == "out" else ((2, 4), torch.float32)
    if which == "q":
        call = replace(call, q=_pooled(call.q))
        victim = call.q
    elif which == "sink":
        call = replace(call, sink=_pooled(call.sink))
        assert call.sink is not None
        victim = call.sink
    else:
        name, part = which.split()
        scope = call.swa if name == "swa" else call.extra
        if part == "cache":
            # The second block's own bytes: the cache's memory is its blocks, whatever the 584-byte view says.
            victim = scope.cache.data.as_strided((scope.cache.num_blocks * scope.cache.block_stride - 100_00,), (1,))
        else:
            scope = replace(scope, **{part: _pooled(getattr(scope, part))})
            victim = getattr(scope, part)
        call = replace(call, **{name: scope})
    with pytest.raises(ValueError, match=f"{output}: its memory range overlaps {INPUTS[which]}'s by .* bytes"):
        call.run(**{output: _over(victim, shape, dtype)})


def test_out_and_lse_in_one_piece_of_memory_are_refused(build: Builder, device: str) -> None:
    call = build.call([[1], [2]])
    out = _pooled(torch.zeros((2, 4, 512), dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match="lse: its memory range overlaps out's by 16 bytes"):
        call.run(out=out, lse=_over(out, (2, 4), torch.float32))


def test_neighbours_in_one_pool_are_accepted(build: Builder) -> None:
    """Planners place tensors back to back; touching is not overlapping."""
    call = build.call([[1], [2]])
    pool = torch.empty((2, 2, 4, 512), dtype=torch.bfloat16, device=call.q.device)
    pool[0] = call.q
    call = replace(call, q=pool[0])
    call.check(call.run(out=pool[1])[0])
