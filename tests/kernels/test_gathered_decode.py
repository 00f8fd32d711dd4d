"""The decode over gathered rows: against the reference, against the paged decode, validity, scales, bad arguments."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import Dialect, fp8, kv_cache
from dsv4ref.formats.kv_cache import NOPE_DIM, SCALE_COUNT
from dsv4ref.kernels.sparse_mla.fp8_gather import (
    GatheredScope,
    Kind,
    allocate_buffer,
    gather_bf16,
    gather_fp8,
    gather_unit_scale,
)
from dsv4ref.kernels.sparse_mla.gathered_decode import GATHERED_LAUNCH, gathered_launch, sparse_mla_decode_gathered
from dsv4ref.kernels.sparse_mla.launch import LaunchShape

FN, FNUZ = Dialect.FN, Dialect.FNUZ
GATHERS = {Kind.SCALES_KEPT: gather_fp8, Kind.BF16: gather_bf16, Kind.UNIT_SCALE: gather_unit_scale}
EXACT = pytest.mark.parametrize("kind", [Kind.SCALES_KEPT, Kind.BF16])
KINDS = pytest.mark.parametrize("kind", list(Kind))
SHAPE = LaunchShape(16, 16, 4)
INT_MAX = 2**31 - 1


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def gathered(call: Call, kind: Kind, target: Dialect = FN, room: int = 2) -> list[GatheredScope]:
    scopes = [call.swa] if call.extra is None else [call.swa, call.extra]
    return [
        GATHERS[kind](s, allocate_buffer(s.indices.numel() + room, kind, target, device=call.q.device)) for s in scopes
    ]


def run(call: Call, scopes: list[GatheredScope], **options: Any) -> tuple[Tensor, Tensor]:
    """The kernel's out and LSE, into poisoned memory."""
    options = {"return_lse": True, "launch": SHAPE, **options}
    with poisoned_allocations():
        out, lse = sparse_mla_decode_gathered(call.q, *scopes, sink=call.sink, scale=call.scale, **options)
    assert lse is not None
    return out, lse


def assert_same(got: Tensor, want: Tensor) -> None:
    found = compare.identical("result", got.contiguous(), want.contiguous())
    assert found.passed, found.detail


# --- within the budget of the reference ---


@EXACT
@pytest.mark.parametrize("heads", [1, 5, 64])
def test_head_counts(kind: Kind, heads: int, build: Builder) -> None:
    call = build.small(rows=2, heads=heads)
    call.check(*run(call, gathered(call, kind)))


@EXACT
@pytest.mark.parametrize("target", list(Dialect))
def test_caches_and_rows_in_any_dialect(kind: Kind, target: Dialect, build: Builder) -> None:
    call = build.small(dialects=("e4m3fnuz", "e4m3fn"))
    call.check(*run(call, gathered(call, kind, target)))


def test_the_rows_of_two_scopes_are_read_each_in_its_own_dialect(build: Builder) -> None:
    call = build.small()
    scopes = [gathered(call, Kind.SCALES_KEPT, FNUZ)[0], gathered(call, Kind.SCALES_KEPT, FN)[1]]
    call.check(*run(call, scopes))


@EXACT
def test_lists_with_holes_empty_rows_and_duplicates(kind: Kind, build: Builder) -> None:
    swa = [[3, -1, 9], [], [5, 5, INT_MAX, 1], [-1, -2], [], *build.lists([17, 33], 64)]
    extra = [[], [], [7], [-1], [2, 4, -1], *build.lists([1, 16], 64)]
    call = build.call(swa, extra)
    out, lse = run(call, gathered(call, kind))
    call.check(out, lse)
    assert (out[[1, 3]] == 0).all()
    assert (lse[[1, 3]] == -math.inf).all()


@EXACT
def test_the_launch_shape_changes_no_more_than_rounding(kind: Kind, build: Builder) -> None:
    call = build.small(heads=8)
    for shape in (None, LaunchShape(32, 32, 8), LaunchShape(16, 64, 4)):
        call.check(*run(call, gathered(call, kind), launch=shape))


@EXACT
def test_sinks_of_either_infinity(kind: Kind, build: Builder) -> None:
    call = build.call([[3, 9], []], [[7], []])
    assert call.sink is not None
    call.sink[0], call.sink[1] = math.inf, -math.inf
    out, lse = run(call, gathered(call, kind))
    assert (out[:, 0] == 0).all()
    call.check(out, lse)
    call = replace(call, sink=None)
    call.check(*run(call, gathered(call, kind)))


@EXACT
def test_swa_only_layers_and_no_rows(kind: Kind, build: Builder) -> None:
    call = build.call([[1, 2, 3], [], [4]])
    call.check(*run(call, gathered(call, kind)))
    none = build.call([])
    assert run(none, gathered(none, kind))[0].shape == (0, 4, 512)


def test_unit_scale_rows_give_attention_over_the_rounded_numbers(build: Builder) -> None:
    call = build.small(rows=2)
    assert call.extra is not None
    scopes = gathered(call, Kind.UNIT_SCALE, FNUZ)
    out, lse = run(call, scopes)
    assert call.sink is not None
    for row in range(2):
        keys = torch.cat(
            [
                fp8.decode(s.buffer.values[int(s.indptr[row]) : int(s.indptr[row + 1])], FNUZ, torch.float64)
                for s in scopes
            ]
        )
        scores = call.q[row].double() @ keys.T * call.scale
        total = torch.logaddexp(torch.logsumexp(scores, dim=-1), call.sink.double())
        want = torch.exp(scores - total[:, None]) @ keys
        assert compare.error_norm(out[row], want) < 2**-8
        assert compare.error_norm(lse[row], torch.logsumexp(scores, dim=-1)) < 1e-6


@EXACT
def test_equal_tiles_give_the_paged_decodes_bytes(kind: Kind, build: Builder, device: str) -> None:
    if device == "cuda":
        pytest.skip("two compiled kernels may contract multiplies and adds differently; the budget holds for both")
    call = build.small(rows=3, heads=5, dialects=("e4m3fnuz", "e4m3fn"))
    for got, want in zip(run(call, gathered(call, kind)), call.run(launch=SHAPE), strict=True):
        assert_same(got, want)


# --- validity, capacity, scales ---


@KINDS
def test_rows_without_validity_are_not_keys_whatever_they_hold(kind: Kind, build: Builder) -> None:
    call = build.call([[3, -1, 9, -1], [-1]], [[-1, 7], [5]])
    scopes = gathered(call, kind)
    want = run(call, scopes)
    assert torch.isfinite(want[0]).all(), "rows past the lists are NaN from the start"
    for scope in scopes:
        rows = scope.buffer
        none = rows.valid == 0
        rows.values[none] = torch.nan if kind is Kind.BF16 else 0x7F
        if rows.rope is not None:
            rows.rope[none] = torch.nan
            rows.tags[:, :SCALE_COUNT][none] = 255
    for got, right in zip(run(call, scopes), want, strict=True):
        assert_same(got, right)


@KINDS
def test_a_zero_row_that_is_valid_is_a_key(kind: Kind, build: Builder) -> None:
    call = replace(build.call([[-1, -1]]), sink=None)
    scopes = gathered(call, kind)
    assert (run(call, scopes)[1] == -math.inf).all()
    scopes[0].buffer.valid[:2] = 1
    _, lse = run(call, scopes)
    assert torch.allclose(lse, torch.full_like(lse, math.log(2)))  # two scores of zero


@KINDS
def test_an_indptr_past_the_buffer_reads_no_further_than_its_end(kind: Kind, build: Builder) -> None:
    call = build.call([[3, 9, 4]])
    (scope,) = gathered(call, kind, room=0)
    want = run(call, [scope])
    scope.indptr[1] = 1000
    for got, right in zip(run(call, [scope]), want, strict=True):
        assert_same(got, right)


@pytest.mark.parametrize("dialect", list(Dialect))
def test_one_key_alone_comes_back_as_it_is_under_every_scale(dialect: Dialect, device: str) -> None:
    """Weight 1 on one key: the output is the key, from scale byte 0 up to where bf16 ends; subnormals left out."""
    codes = torch.arange(256).to(torch.uint8)
    numbers = codes[fp8.decode(codes, dialect).isfinite()]
    rows = allocate_buffer(37, Kind.SCALES_KEPT, dialect, device=device)
    assert rows.rope is not None
    rows.values.copy_(numbers.repeat(66)[: 37 * NOPE_DIM].reshape(37, NOPE_DIM))
    rows.tags[:, :SCALE_COUNT] = torch.arange(37 * SCALE_COUNT).clamp(max=254).reshape(37, SCALE_COUNT).to(torch.uint8)
    rows.rope.fill_(1.5)
    scope = GatheredScope(rows, torch.arange(38, dtype=torch.int32, device=device), width=1)
    q = torch.zeros((37, 1, 512), dtype=torch.bfloat16, device=device)
    out, _ = sparse_mla_decode_gathered(q, scope, launch=SHAPE)
    want = kv_cache.dequantise(rows.values, rows.tags[:, :SCALE_COUNT], rows.rope, dialect)
    normal = want.isfinite() & (want.abs() >= torch.finfo(torch.bfloat16).tiny)
    finite_rows = want.isfinite().all(dim=1, keepdim=True)  # inf times a zero query is NaN in every dim
    checked = normal & finite_rows
    assert int(checked.sum()) > 15_000
    assert_same(torch.where(checked, out[:, 0], 0), torch.where(checked, want, 0))


# --- outputs and arguments ---


@EXACT
def test_outputs_go_where_the_caller_says_and_nowhere_else(kind: Kind, build: Builder, device: str) -> None:
    call = build.small(rows=3, heads=4)
    scopes = gathered(call, kind)
    want, want_lse = run(call, scopes)
    buffer = torch.full((5, 8, 512), 7.0, dtype=torch.bfloat16, device=device)
    lses = torch.full((3, 8), 7.0, device=device)
    out, lse = run(call, scopes, out=buffer[1:4, 2:6], lse=lses[:, 4:])
    assert out.data_ptr() == buffer[1:4, 2:6].data_ptr()
    assert_same(out, want)
    assert_same(lse, want_lse)
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard[1:4, 2:6] = False
    assert (buffer[guard] == 7.0).all()
    assert (lses[:, :4] == 7.0).all()


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("q", lambda c, s: c.q.float(), TypeError, "q: got torch.float32, expected torch.bfloat16"),
        ("q", lambda c, s: c.q[..., :448], ValueError, "q: got shape [2, 4, 448], expected [T, H, 512]"),
        ("q", lambda c, s: c.q[:, :0], ValueError, "q: got 0 heads, expected at least 1"),
        ("q", lambda c, s: c.q.repeat(1, 1, 2)[..., ::2], ValueError, "q: got strides (4096, 1024, 2), expected a"),
        ("swa", lambda c, s: c.swa, TypeError, "swa: got Scope, expected a GatheredScope"),
        ("swa", lambda c, s: replace(s[0], indptr=s[0].indptr[:2]), ValueError, "swa: its indptr has 1 rows, expected"),
        ("extra", lambda c, s: s[1].buffer, TypeError, "extra: got GatherBuffer, expected a GatheredScope"),
        ("extra", lambda c, s: gathered(c, Kind.BF16)[1], ValueError, "extra: got bf16 rows, expected scales kept"),
        ("sink", lambda c, s: c.sink[:3], ValueError, "sink: got shape [3], expected [4]"),
        ("scale", lambda c, s: math.nan, ValueError, "scale: got nan, expected a positive finite float"),
        ("out", lambda c, s: torch.empty_like(c.q)[:1], ValueError, "out: got shape [1, 4, 512], expected [2, 4, 512]"),
        ("out", lambda c, s: c.q, ValueError, "out: its memory range overlaps q's by 8192 bytes"),
        ("lse", lambda c, s: c.sink.clone(), ValueError, "lse: got shape [4], expected [2, 4]"),
        ("launch", lambda c, s: "32x16", TypeError, "launch: got str, expected a LaunchShape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    argument: str, change: Any, error: type[Exception], message: str, build: Builder
) -> None:
    call = build.small()
    scopes = gathered(call, Kind.SCALES_KEPT)
    fields: dict[str, Any] = {"q": call.q, "swa": scopes[0], "extra": scopes[1], "sink": call.sink}
    fields[argument] = change(call, scopes)
    with pytest.raises(error, match=re.escape(message)):
        sparse_mla_decode_gathered(fields.pop("q"), fields.pop("swa"), fields.pop("extra"), **fields)


def test_an_output_inside_the_gathered_rows_is_refused(build: Builder) -> None:
    call = build.call([[1] * 8])
    (scope,) = gathered(call, Kind.BF16)
    inside = scope.buffer.values[:4].reshape(1, 4, 512)
    with pytest.raises(ValueError, match="out: its memory range overlaps the swa values's by 4096 bytes"):
        sparse_mla_decode_gathered(call.q, scope, out=inside)


def test_an_architecture_without_a_shape_gets_gfx942s() -> None:
    assert gathered_launch("cpu") == gathered_launch("gfx1201") == GATHERED_LAUNCH["gfx942"]
