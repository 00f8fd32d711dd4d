"""Hopper's prefill: when it is taken, what it compiles to for sm_90, and on sm_90 the attention that it computes."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from prefill_calls import HOLES_EXTRA, HOLES_SWA, INT_MAX, workspace
from torch import Tensor

from dsv4ref import device as devices
from dsv4ref import kernels
from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.kernels.sparse_mla import LaunchShape, QueryRotation, hopper_prefill
from dsv4ref.kernels.sparse_mla.prefill import sparse_mla_prefill
from dsv4ref.optimizations import split_k_decode as chapter
from dsv4ref.ref.rope import frequencies, rotate_back_ref
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

CHILD = Path(__file__).with_name("hopper_prefill_ptx.py")
SPILL_LIMIT = 64
REGISTERS_OF_A_SM = 65_536
SHARED_OF_A_BLOCK = 232_448
THREADS = 4 * 128


@functools.cache
def on_sm_90() -> bool:
    return kernels.mode() == "compiled" and devices.current().arch == hopper_prefill.ARCH


needs_sm_90 = pytest.mark.skipif(not on_sm_90(), reason="needs an sm_90 GPU: Gluon has no interpreter")


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


# --- when it is taken ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(on_sm_90(), reason="this is sm_90")
def test_elsewhere_it_is_refused_by_name_and_never_chosen(build: Builder) -> None:
    call = build.small(rows=1, heads=64)
    kv, indices, lengths = workspace(call)
    with pytest.raises(ValueError, match="path: got 'gluon', but that kernel is for sm_90, and this is"):
        sparse_mla_prefill(call.q, kv, indices, lengths=lengths, path="gluon")
    chosen, _ = sparse_mla_prefill(call.q, kv, indices, lengths=lengths)
    portable, _ = sparse_mla_prefill(call.q, kv, indices, lengths=lengths, path="triton")
    found = compare.identical("out", chosen, portable)
    assert found.passed, found.detail


def test_a_path_that_is_none_is_refused(build: Builder) -> None:
    call = build.small(rows=1)
    kv, indices, _ = workspace(call)
    with pytest.raises(ValueError, match="path: got 'cuda', expected one of 'auto', 'triton', 'gluon'"):
        sparse_mla_prefill(call.q, kv, indices, path="cuda")  # type: ignore[arg-type]


def test_what_it_does_not_take_is_said(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_prefill, "architecture", lambda where: "sm_90")
    q, kv = build.queries(2, 64), build.randn(9, 520).to(torch.bfloat16).to(build.device)
    assert hopper_prefill.refusal(q, kv[:, :512].contiguous(), None) is None
    said = hopper_prefill.refusal(q, kv[:, :512].contiguous(), LaunchShape(64, 64, 8, 2))
    assert said == "its tile is fixed, and launch asks for 64x64 w8 s2"
    said = hopper_prefill.refusal(q, kv[:, :512], None)
    assert said is not None
    assert said.startswith("kv lies at 0x"), said
    assert said.endswith("with strides (520,), and it copies 16 bytes at a time"), said
    odd = torch.zeros(2 * 64 * 512 + 1, dtype=torch.bfloat16, device=build.device)[1:].view(2, 64, 512)
    said = hopper_prefill.refusal(odd, kv[:, :512].contiguous(), None)
    assert said is not None
    assert said.startswith("q lies at 0x"), said


# --- what it compiles to ---------------------------------------------------------------------------------------------


def test_it_compiles_for_sm_90_without_a_gpu() -> None:
    """wgmma, not serialised; every copy of 16 bytes; registers and shared memory of one SM; few words spilt."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, str(CHILD)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["variant"] for row in rows] == ["served", "bare"]
    for row in rows:
        assert not row["imported_early"], "the package imports the Gluon kernel before it is launched"
        assert row["registers"] * THREADS <= REGISTERS_OF_A_SM, row
        assert row["spill_bytes"] <= SPILL_LIMIT, row
        assert row["shared_bytes"] <= SHARED_OF_A_BLOCK, row
        assert row["wgmma"] > 0, row
        assert not row["serialised"], row
        assert not row["hasty_arrivals"], row
        assert not row["unawaited_copies"], row
        assert row["copies_of_16"] == row["copies"] > 0, row


# --- what it computes ------------------------------------------------------------------------------------------------


def attend(q: Tensor, kv: Tensor, indices: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with poisoned_allocations():
        out, lse = sparse_mla_prefill(q, kv, indices, **{"return_lse": True, "path": "gluon", **options})
    assert lse is not None
    return out, lse


def run(call: Call, **options: Any) -> tuple[Tensor, Tensor]:
    kv, indices, lengths = workspace(call, 528)
    return attend(call.q, kv, indices, lengths=lengths, sink=call.sink, scale=call.scale, **options)


@needs_sm_90
@pytest.mark.parametrize("heads", [1, 5, 64, 65, 128, 200])
def test_head_counts(heads: int, build: Builder) -> None:
    call = build.small(rows=3, heads=heads)
    call.check(*run(call))


@needs_sm_90
def test_list_lengths_around_tiles(build: Builder) -> None:
    """Lengths around tiles of 64, the reverse in the other scope; a row without keys in the middle."""
    lengths = (0, 1, 63, 64, 65, 130, 200)
    call = build.call(build.lists(lengths, 256), build.lists([0, *lengths[:0:-1]], 256), heads=64, entries=256)
    call.check(*run(call))


@needs_sm_90
@pytest.mark.parametrize("sink", [True, False])
def test_holes_empty_rows_duplicates_and_slots_past_the_end(sink: bool, build: Builder) -> None:
    call = build.call(HOLES_SWA, HOLES_EXTRA, heads=64, sink=sink)
    out, lse = run(call)
    call.check(out, lse)
    for row in (1, 3):
        assert (out[row] == 0).all(), row
        assert (lse[row] == -math.inf).all(), row


@needs_sm_90
def test_sinks_of_either_infinity(build: Builder) -> None:
    call = build.call([[3, 9], []], [[7], []], heads=64)
    assert call.sink is not None
    call.sink[0], call.sink[1] = math.inf, -math.inf
    out, lse = run(call)
    assert (out[:, 0] == 0).all()
    call.check(out, lse)


@needs_sm_90
def test_queries_that_are_no_numbers_stay_in_their_rows_and_an_empty_list_hides_them(build: Builder) -> None:
    """A padded row holds anything: without a valid key its output is zero, with one its NaN shows."""
    call = build.call([[3, 9], [-1] * 70, [4]], heads=64)
    call.q[1:] = math.nan
    out, lse = run(call)
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert out[2].isnan().all()


@needs_sm_90
def test_lengths_below_zero_are_empty_and_above_the_width_read_the_width(build: Builder) -> None:
    call = build.small(rows=3, heads=64)
    kv, indices, _ = workspace(call)
    whole, _ = attend(call.q, kv, indices[:, :37])
    ours = torch.tensor([-5, 37, INT_MAX], dtype=torch.int32, device=build.device)
    out, lse = attend(call.q, kv, indices[:, :37], lengths=ours)
    found = compare.identical("out", out[1:].contiguous(), whole[1:].contiguous())
    assert found.passed, found.detail
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()


@needs_sm_90
def test_more_pieces_than_sms_follow_one_another(build: Builder) -> None:
    """Programs keep their barriers over several rows, rows without a key among them; twice the same bytes."""
    lengths = [0 if row % 5 == 3 else 1 + 37 * row % 250 for row in range(300)]
    call = build.call(build.lists(lengths, 256), build.lists(lengths[::-1], 256), heads=128, entries=256)
    out, lse = run(call)
    call.check(out, lse)
    again, _ = run(call)
    found = compare.identical("out", again, out)
    assert found.passed, found.detail


@needs_sm_90
def test_the_rotation_is_that_of_the_reference(build: Builder, device: str) -> None:
    call = build.small(rows=4, heads=64)
    freqs = frequencies(10_000.0, 64).to(device)
    positions = torch.tensor([0, 1, 511, 1_000], device=device)
    out, _ = run(call, rotation=QueryRotation.of(positions, freqs, 1024))
    scopes = [call.swa] if call.extra is None else [call.swa, call.extra]
    right, _ = sparse_attention_ref(call.q, scopes, call.sink, call.scale)
    plain, _ = sparse_attention_plain(call.q, scopes, call.sink, call.scale)
    plain = rotate_back_ref(plain.float(), positions, freqs).to(torch.bfloat16)
    want = rotate_back_ref(right, positions, freqs)
    found = compare.close("out", out, want, compare.TOLERANCES["attention_bf16"], plain)
    assert found.passed, found.detail


@needs_sm_90
def test_rows_beyond_2_gib_are_addressed_in_64_bits(build: Builder, device: str) -> None:
    """H26. What a wrapped offset would read is zero."""
    rows, lead = 2**31 // 512 + 20, 2**31 + 2**20
    flat = torch.zeros(lead + rows * 512, dtype=torch.bfloat16, device=device)
    kv = flat.as_strided((rows, 512), (512, 1), lead)
    far = torch.tensor([[rows - 1, rows - 9, 3]], dtype=torch.int32, device=device)
    keys = build.randn(3, 512, std=0.1).to(torch.bfloat16).to(device)
    kv[far[0].long()] = keys
    q = build.queries(1, 64)
    near = torch.arange(3, dtype=torch.int32, device=device)[None]
    for got, want in zip(attend(q, kv, far), attend(q, keys, near), strict=True):
        found = compare.identical("result", got, want)
        assert found.passed, found.detail


@needs_sm_90
def test_strided_queries_and_outputs_and_nothing_written_outside(build: Builder, device: str) -> None:
    call = build.small(rows=3, heads=64)
    want, want_lse = run(call)
    buffer = torch.full((5, 70, 512), 7.0, dtype=torch.bfloat16, device=device)
    lses = torch.full((3, 70), 7.0, device=device)
    q = torch.full((3, 71, 512), math.nan, dtype=torch.bfloat16, device=device)[:, 2:66].copy_(call.q)
    kv, indices, lengths = workspace(call)
    out, lse = attend(
        q, kv, indices, lengths=lengths, sink=call.sink, scale=call.scale, out=buffer[1:4, 2:66], lse=lses[:, 6:]
    )
    for name, got, right in (("out", out, want), ("lse", lse, want_lse)):
        found = compare.identical(name, got.contiguous(), right)
        assert found.passed, found.detail
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard[1:4, 2:66] = False
    assert (buffer[guard] == 7.0).all()
    assert (lses[:, :6] == 7.0).all()


@needs_sm_90
def test_no_rows_no_keys_and_no_width(build: Builder, device: str) -> None:
    kv = build.randn(4, 512).to(torch.bfloat16).to(device)
    lists = torch.zeros((2, 3), dtype=torch.int32, device=device)
    q = build.queries(2, 64)
    assert attend(q[:0], kv, lists[:0])[0].shape == (0, 64, 512)
    for out, lse in (attend(q, kv[:0], lists), attend(q, kv, lists[:, :0])):
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@needs_sm_90
def test_a_prompt_is_timed_on_both_paths_and_wrong_keys_are_refused(device: str) -> None:
    opt = chapter.OPTIMIZATION
    inputs = opt.make_inputs(opt.case("tiny-prompt"), device, 5)
    assert chapter.HOPPER_BF16_KEYS in opt.timed(inputs)


PLANTED = {
    "a list's last key dropped": ("mask=lanes < end,", "mask=lanes < end - 1,"),
    "one half of the dims scored twice": ("keys.index(2 * at + 1).permute", "keys.index(2 * at).permute"),
    "older sums do not decay": ("output * decays.index(at).load(per_row)[:, None]", "output"),
}


def planted(bug: str, folder: Path) -> ModuleType:
    """The kernel's module with a bug in its source, under a name of its own."""
    right, wrong = PLANTED[bug]
    source = Path(hopper_prefill.__file__).with_name("hopper_prefill_kernel.py").read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{right!r} stands there {source.count(right)} times"
    (folder / "planted_prefill.py").write_text(source.replace(right, wrong), encoding="utf-8")
    return importlib.import_module("planted_prefill")


@needs_sm_90
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = build.call(build.lists((70, 130), 256), heads=64, entries=256)
    call.check(*run(call))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_prefill", raising=False)
    module = planted(bug, tmp_path)
    monkeypatch.setattr(hopper_prefill, "_kernel_module", lambda: module)
    out, _ = run(call)
    with pytest.raises(AssertionError):
        call.check(out)
