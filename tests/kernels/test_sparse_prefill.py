"""Sparse prefill over a bf16 workspace: against the reference, against the FP8 caches, causality, rotation, memory."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from prefill_calls import HOLES_EXTRA, HOLES_SWA, INT_MAX, workspace
from torch import Tensor

from dsv4ref.evidence import compare, isa
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, ROPE_DIM
from dsv4ref.kernels.sparse_mla import prefill
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.kernels.sparse_mla.merge import QueryRotation
from dsv4ref.kernels.sparse_mla.prefill import PREFILL_SELECTION, select_prefill_launch, sparse_mla_prefill
from dsv4ref.ref.rope import frequencies, rotate_back_ref
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

SHAPE = LaunchShape(16, 16, 4)


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def assert_same(got: Tensor, want: Tensor, why: str = "") -> None:
    """The same bytes, whatever the strides."""
    found = compare.identical("result", got.contiguous(), want.contiguous())
    assert found.passed, f"{found.detail} {why}"


def run(call: Call, *, stride: int = 512, **options: Any) -> tuple[Tensor, Tensor]:
    """The prefill kernel's out and LSE on a decode call's quantised inputs, into poisoned memory."""
    kv, indices, lengths = workspace(call, stride)
    return attend(call.q, kv, indices, lengths=lengths, sink=call.sink, scale=call.scale, **options)


def attend(q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with poisoned_allocations():
        out, lse = sparse_mla_prefill(q, kv, indices, **{"return_lse": True, **options})
    assert lse is not None
    return out, lse


# --- within the budget of the reference ---


@pytest.mark.parametrize("heads", [1, 5, 16, 32, 64, 128])
def test_head_counts(heads: int, build: Builder) -> None:
    call = build.small(rows=2 if heads < 64 else 1, heads=heads)
    call.check(*run(call))


@pytest.mark.parametrize("shape", [None, SHAPE, LaunchShape(16, 64, 4), LaunchShape(32, 32, 8, 2)], ids=str)
def test_list_lengths_around_tiles(shape: LaunchShape | None, build: Builder) -> None:
    lengths = (0, 1, 15, 16, 17, 31, 63, 64, 65)
    call = build.call(build.lists(lengths, 64), build.lists(lengths[::-1], 64), heads=5)
    call.check(*run(call, launch=shape))


@pytest.mark.parametrize("sink", [True, False])
def test_holes_empty_rows_duplicates_and_slots_past_the_end(sink: bool, build: Builder) -> None:
    call = build.call(HOLES_SWA, HOLES_EXTRA, sink=sink)
    out, lse = run(call)
    call.check(out, lse)
    for row in (1, 3):
        assert (out[row] == 0).all(), row
        assert (lse[row] == -math.inf).all(), row


def test_sinks_of_either_infinity(build: Builder) -> None:
    call = build.call([[3, 9], []], [[7], []])
    assert call.sink is not None
    call.sink[0], call.sink[1] = math.inf, -math.inf
    out, lse = run(call)
    assert (out[:, 0] == 0).all()
    call.check(out, lse)


def test_keys_that_no_fp8_cache_could_hold(build: Builder) -> None:
    kv, q = build.randn(40, 512, std=0.1).to(torch.bfloat16).to(build.device), build.queries(3, 4)
    indices = torch.tensor(build.lists([33] * 3, 40), dtype=torch.int32, device=build.device)
    out, lse = attend(q, kv, indices)  # no lengths: the whole width
    scores = torch.einsum("thd,tkd->thk", q.double(), kv.double()[indices.long()]) * HEAD_DIM**-0.5
    want = torch.einsum("thk,tkd->thd", scores.softmax(-1), kv.double()[indices.long()])
    assert compare.error_norm(out, want) < 2**-8
    assert compare.error_norm(lse, torch.logsumexp(scores, dim=-1)) < 1e-6


def test_lengths_below_zero_are_empty_and_above_the_width_read_the_width(build: Builder) -> None:
    call = build.small(rows=3)
    kv, indices, _ = workspace(call)
    full = torch.tensor([37, 37, 37], dtype=torch.int32, device=build.device)
    ours = torch.tensor([-5, 37, INT_MAX], dtype=torch.int32, device=build.device)
    want, _ = attend(call.q, kv, indices[:, :37], lengths=full)
    out, lse = attend(call.q, kv, indices[:, :37], lengths=ours)
    assert_same(out[1:], want[1:])
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()


# --- the two ways to read a prompt's keys, prefill and decode, causality ---


@pytest.mark.parametrize("lengths", [((16, 32, 16), (17, 5, 40)), ((20, 33, 7), (17, 5, 40))], ids=["aligned", "odd"])
def test_workspace_and_fp8_caches_give_the_same(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], build: Builder, device: str
) -> None:
    """Equal tiles see equal operands: the same bytes. Where the SWA list ends inside a tile, one rounding apart."""
    call = build.call(*(build.lists(part, 64) for part in lengths), heads=5, dialects=("e4m3fnuz", "e4m3fn"))
    (out, lse), (want, want_lse) = run(call, launch=SHAPE), call.run(launch=SHAPE)
    call.check(out, lse)
    call.check(want, want_lse)
    aligned = all(n % SHAPE.block_k == 0 for n in lengths[0])
    if aligned and device == "cpu":  # two compiled kernels may contract multiplies and adds differently
        assert_same(out, want)
        assert_same(lse, want_lse)
    assert compare.error_norm(out, want.double()) < 2**-9


def causal_lists(rows: int, window: int, ratio: int) -> tuple[list[list[int]], list[list[int]]]:
    """Window slots max(0, p - window + 1) to p, and every compressed entry that is complete at p."""
    return (
        [list(range(max(0, p - window + 1), p + 1)) for p in range(rows)],
        [list(range((p + 1) // ratio)) for p in range(rows)],
    )


def test_prefill_at_p_is_decode_at_p(build: Builder) -> None:
    call = build.call(*causal_lists(9, 6, 4))
    prefilled = run(call, launch=SHAPE)
    kv, indices, lengths = workspace(call)
    for p in range(9):
        one = attend(
            call.q[p : p + 1], kv, indices[p : p + 1], lengths=lengths[p : p + 1], sink=call.sink, launch=SHAPE
        )
        for got, want in zip(prefilled, one, strict=True):
            assert_same(got[p : p + 1], want, f"at position {p}")


def test_the_future_leaves_the_past_bitwise(build: Builder) -> None:
    """New bytes in every slot after p, for each p: rows up to p keep theirs, row p + 1 does not."""
    call = build.call(*causal_lists(9, 6, 4))
    kv, indices, lengths = workspace(call)
    before, _ = attend(call.q, kv, indices, lengths=lengths, sink=call.sink)
    assert call.extra is not None
    second = call.swa.cache.rows + 3  # where the compressed entries start
    for p in (2, 3, 6, 7):
        changed = kv.clone()
        changed[p + 1 : 64] += 1.0
        changed[second + (p + 1) // 4 : second + 64] += 1.0
        after, _ = attend(call.q, changed, indices, lengths=lengths, sink=call.sink)
        assert_same(after[: p + 1], before[: p + 1], f"rows up to {p}")
        assert not torch.equal(after[p + 1], before[p + 1]), f"row {p + 1} reads its own key"


def test_the_order_of_a_list_is_rounding_only(build: Builder) -> None:
    call = build.small(rows=2)
    kv, indices, lengths = workspace(call)
    order = torch.randperm(37, generator=build.rng)
    out, lse = attend(call.q, kv, indices[:, :37][:, order].contiguous(), lengths=lengths, sink=call.sink)
    call.check(out, lse)


# --- rotation ---


def rotated(build: Builder) -> tuple[Call, QueryRotation, Tensor]:
    """Two rows, where they stand, and the frequencies."""
    freqs = frequencies(10_000.0, ROPE_DIM)
    positions = torch.tensor([77, 4095], device=build.device)
    return build.small(rows=2), QueryRotation.of(positions, freqs.to(build.device), 4096), freqs


def test_the_last_64_dims_are_rotated_back_before_the_rounding(build: Builder) -> None:
    call, rotation, freqs = rotated(build)
    assert call.extra is not None
    out, lse = run(call, rotation=rotation)
    want, _ = sparse_attention_ref(call.q, [call.swa, call.extra], call.sink, call.scale)
    plain, plain_lse = sparse_attention_plain(call.q, [call.swa, call.extra], call.sink, call.scale)
    turned = [rotate_back_ref(x.cpu(), rotation.positions.cpu(), freqs) for x in (want, plain.float())]
    found = compare.close("out", out.cpu(), turned[0], compare.TOLERANCES["attention_bf16"], turned[1].bfloat16())
    assert found.passed, found.detail
    nowhere = replace(rotation, positions=torch.zeros_like(rotation.positions))
    still, still_lse = run(call, rotation=nowhere)
    assert_same(out[..., :NOPE_DIM], still[..., :NOPE_DIM], "no turn reaches the other dims")
    assert_same(lse, still_lse)
    call.check(still, plain_lse)


def test_a_position_outside_the_tables_shows_unless_the_row_is_empty(build: Builder) -> None:
    call, rotation, _ = rotated(build)
    kv, indices, lengths = workspace(call)
    far = replace(rotation, positions=torch.tensor([-1, 4096], device=build.device))
    out, _ = attend(call.q, kv, indices, lengths=lengths, rotation=far)
    assert out[..., NOPE_DIM:].isnan().all()
    assert out[..., :NOPE_DIM].isfinite().all()
    out, _ = attend(call.q, kv, indices, lengths=torch.zeros_like(lengths), rotation=far)
    assert (out == 0).all()


# --- memory ---


def test_rows_beyond_2_gib_are_addressed_in_64_bits(build: Builder, device: str) -> None:
    """H26. Virtual memory: only pages that are touched exist. An offset that wraps lands in the lead, which is zero."""
    rows, lead = 2**31 // 512 + 20, 2**31 + 2**20
    flat = torch.empty(lead + rows * 512, dtype=torch.bfloat16, device=device)
    kv = flat.as_strided((rows, 512), (512, 1), lead)
    far = torch.tensor([rows - 1, rows - 9, 3], dtype=torch.int32, device=device)
    assert int(far[1]) * 512 > 2**31
    keys = build.randn(3, 512, std=0.1).to(torch.bfloat16).to(device)
    kv[far.long()] = keys
    q = build.queries(1, 4)
    near = torch.arange(3, dtype=torch.int32, device=device)[None]
    for got, want in zip(attend(q, kv, far[None]), attend(q, keys, near), strict=True):
        assert_same(got, want)


def test_any_strides_and_nothing_written_outside(build: Builder, device: str) -> None:
    call = build.small(rows=3, heads=4)
    want, want_lse = run(call)
    buffer = torch.full((5, 8, 512), 7.0, dtype=torch.bfloat16, device=device)
    lses = torch.full((3, 8), 7.0, device=device)
    kv, indices, lengths = workspace(call, stride=520)
    q = torch.full((3, 9, 512), math.nan, dtype=torch.bfloat16, device=device)[:, 2:6].copy_(call.q)
    padded = torch.zeros((3, indices.shape[1] + 5), dtype=torch.int32, device=device)[:, : indices.shape[1]]
    out, lse = attend(
        q, kv, padded.copy_(indices), lengths=lengths, sink=call.sink, out=buffer[1:4, 2:6], lse=lses[:, 4:]
    )
    assert out.data_ptr() == buffer[1:4, 2:6].data_ptr()
    assert_same(out, want)
    assert_same(lse, want_lse)
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard[1:4, 2:6] = False
    assert (buffer[guard] == 7.0).all()
    assert (lses[:, :4] == 7.0).all()


def test_no_rows_no_keys_and_no_width(build: Builder, device: str) -> None:
    kv = build.randn(4, 512).to(torch.bfloat16).to(device)
    lists = torch.zeros((2, 3), dtype=torch.int32, device=device)
    q = build.queries(2, 4)
    assert attend(q[:0], kv, lists[:0])[0].shape == (0, 4, 512)
    for out, lse in (attend(q, kv[:0], lists), attend(q, kv, lists[:, :0])):
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def turn(rows: int, like: Tensor) -> QueryRotation:
    positions = torch.zeros(rows, dtype=torch.int64, device=like.device)
    return QueryRotation.of(positions, torch.ones(32, device=like.device), 1)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("q", lambda a: a["q"].float(), TypeError, "q: got torch.float32, expected torch.bfloat16"),
        ("q", lambda a: a["q"][:, :0], ValueError, "q: got 0 heads, expected at least 1"),
        ("q", lambda a: a["q"].repeat(1, 1, 2)[..., ::2], ValueError, "q: got strides (4096, 1024, 2), expected a"),
        ("kv", lambda a: a["kv"].float(), TypeError, "kv: got torch.float32, expected torch.bfloat16"),
        ("kv", lambda a: a["kv"][:, :448], ValueError, f"kv: got shape [134, 448], expected [N, {HEAD_DIM}]"),
        ("kv", lambda a: a["kv"].repeat(1, 2)[:, ::2], ValueError, "kv: got strides (1024, 2), expected a unit"),
        ("indices", lambda a: a["indices"].long(), TypeError, "indices: got torch.int64, expected torch.int32"),
        ("indices", lambda a: a["indices"][:1], ValueError, "indices: got shape [1, 39], expected [2, W]"),
        ("indices", lambda a: a["indices"][0], ValueError, "indices: got shape [39], expected [2, W]"),
        ("lengths", lambda a: a["lengths"].long(), TypeError, "lengths: got torch.int64, expected torch.int32"),
        ("lengths", lambda a: a["lengths"][:1], ValueError, "lengths: got shape [1], expected [2]"),
        ("sink", lambda a: a["sink"][:3], ValueError, "sink: got shape [3], expected [4]"),
        ("scale", lambda a: 0.0, ValueError, "scale: got 0.0, expected a positive finite float"),
        ("out", lambda a: a["q"], ValueError, "out: its memory range overlaps q's by 8192 bytes"),
        ("out", lambda a: a["q"][:1].clone(), ValueError, "out: got shape [1, 4, 512], expected [2, 4, 512]"),
        ("lse", lambda a: a["sink"].clone(), ValueError, "lse: got shape [4], expected [2, 4]"),
        ("rotation", lambda a: a["q"], TypeError, "rotation: got Tensor, expected a QueryRotation"),
        ("rotation", lambda a: turn(3, a["q"]), ValueError, "rotation: got 3 positions on"),
        ("launch", lambda a: "64x16", TypeError, "launch: got str, expected a LaunchShape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    argument: str, change: Any, error: type[Exception], message: str, build: Builder
) -> None:
    call = build.small()
    small = replace(call, swa=build.scope(build.cache(1), build.lists([20] * 2, 64)))
    kv, indices, lengths = workspace(small)
    fields: dict[str, Any] = {"q": call.q, "kv": kv[:134], "indices": indices, "lengths": lengths, "sink": call.sink}
    fields[argument] = change(fields)
    with pytest.raises(error, match=re.escape(message)):
        sparse_mla_prefill(**fields)


# --- launch shapes ---


def test_the_kernels_constants_are_the_formats() -> None:
    assert prefill._DIM.value == HEAD_DIM


def test_shapes_are_chosen_by_heads() -> None:
    for arch, (narrow, medium, wide) in {
        "gfx942": ((16, 32, 8), (32, 16, 8), (64, 16, 8)),
        "sm_90": ((16, 64, 4, 2), (32, 32, 4, 3), (64, 64, 8, 2)),
        "an architecture without rules": ((16, 32, 8), (32, 16, 8), (64, 16, 8)),
    }.items():
        for heads, shape in {1: narrow, 16: narrow, 17: medium, 32: medium, 33: wide, 128: wide}.items():
            assert select_prefill_launch(arch, heads) == LaunchShape(*shape), (arch, heads)


def compile_request(shape: LaunchShape) -> CompileRequest:
    """The kernel as a served prefill specialises it: lengths, a sink and the rotation, no LSE."""
    pointers = {
        "q": "*bf16", "kv": "*bf16", "indices": "*i32", "lengths": "*i32", "sink": "*fp32", "out": "*bf16",
        "lse": "*bf16", "positions": "*i64", "cos": "*fp32", "sin": "*fp32",
    }  # fmt: skip
    strides = "q_stride_t q_stride_h kv_stride indices_stride out_stride_t out_stride_h lse_stride_t lse_stride_h"
    sizes = "cos_stride sin_stride num_positions width num_heads"
    aligned = dict.fromkeys(f"{strides} {sizes}".split(), "i32")
    return CompileRequest(
        kernel="sparse_mla_prefill",
        module="dsv4ref.kernels.sparse_mla.prefill",
        function="_sparse_mla_prefill_kernel",
        shape=str(shape),
        signature={**pointers, **aligned, "num_keys": "i32", "scale_log2": "fp32"},
        constexprs={
            "HAS_LENGTHS": True, "HAS_SINK": True, "HAS_ROPE": True, "HAS_LSE": False, "APART": False,
            "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        divisible_by_16=frozenset(pointers) | frozenset(aligned),
    )  # fmt: skip


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_no_shape_spills_or_passes_the_lds_and_twice_the_keys_would(arch: str) -> None:
    shapes = [rule.shape for rule in PREFILL_SELECTION[arch]]
    rows = isa.compile_rows([compile_request(shape) for shape in shapes], [arch])
    # Spills belong to kernel and compiler (H35): Triton 3.6 spills a few registers of one shape on gfx942, 3.7.1 none.
    old = [row for row in rows if row.triton.startswith("3.6.") and arch == "gfx942" and "64x16 w8" in row.shape]
    assert all(0 < row.vgpr_spills < 10 for row in old), old
    assert isa.check_caps([row for row in rows if row not in old]) == []
    assert {row.waves_per_simd for row in rows} == {2}
    (wider,) = isa.compile_rows([compile_request(LaunchShape(64, 32, 8))], [arch])
    assert wider.vgpr_spills > 0, "the reason that the table gives"


# --- on Hopper: the first product once ---


def test_keeping_the_products_apart_changes_no_byte(
    build: Builder, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("two compiled kernels may contract multiplies and adds differently")
    call = build.call(HOLES_SWA, HOLES_EXTRA)
    want, want_lse = run(call, launch=SHAPE)
    monkeypatch.setattr(prefill, "_products_apart", lambda arch, launch: True)
    out, lse = run(call, launch=SHAPE)
    assert_same(out, want)
    assert_same(lse, want_lse)


def test_the_products_are_kept_apart_where_warps_outnumber_the_tiles_rows() -> None:
    for arch, shape, apart in (
        ("sm_90", LaunchShape(64, 64, 8, 2), True),
        ("sm_90", LaunchShape(64, 64, 4), False),
        ("sm_90", LaunchShape(32, 32, 4, 3), False),  # no warpgroup product
        ("sm_90", LaunchShape(128, 64, 8), False),
        ("gfx942", LaunchShape(64, 16, 8), False),
    ):
        assert prefill._products_apart(arch, shape) is apart, (arch, shape)


WGMMAS = """
import json, re, sys
import dsv4ref.kernels
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsv4ref.kernels.sparse_mla.prefill import _sparse_mla_prefill_kernel as kernel
job = json.loads(sys.argv[1])
for apart in (False, True):
    constants = job["constexprs"] | {"APART": apart}
    types = {n: "constexpr" if n in constants else job["signature"][n] for n in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in job["aligned"]}
    source = ASTSource(kernel, types, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=job["options"])
    print(len(re.findall("wgmma.mma_async", built.asm["ptx"])), built.metadata.shared)
"""


def test_each_warpgroup_computes_half_of_the_first_product() -> None:
    """Per tile of 64 keys: QK in 32 steps of 16 dims and PV in 4 of 16 keys. Seen together, QK takes 64 steps."""
    shape = select_prefill_launch("sm_90", 64)
    request = compile_request(shape)
    job = {
        "constexprs": dict(request.constexprs), "signature": dict(request.signature),
        "aligned": sorted(request.divisible_by_16),
        "options": {"num_warps": shape.num_warps, "num_stages": shape.num_stages},
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-c", WGMMAS, json.dumps(job)], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    (together, _), (apart, shared) = (map(int, line.split()) for line in child.stdout.splitlines())
    assert (together, apart) == (2 * 32 + 4, 32 + 4)
    assert shared <= 227 * 1024, "a program of a Hopper SM"
