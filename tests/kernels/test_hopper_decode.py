"""Hopper's decode: when it is taken, what it compiles to for sm_90, and on sm_90 the attention that it computes."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref import device as devices
from dsv4ref import kernels
from dsv4ref.evidence import compare
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import kv_cache
from dsv4ref.kernels.sparse_mla import LaunchShape, QueryRotation, hopper_decode, plan_for, split_k_decode
from dsv4ref.kernels.sparse_mla.splits import MAX_SPLITS, Machine
from dsv4ref.optimizations import split_k_decode as chapter
from dsv4ref.optimizations.base import verify
from dsv4ref.ref.rope import frequencies, rotate_back_ref
from dsv4ref.ref.sparse_attention import sparse_attention_plain, sparse_attention_ref

CHILD = Path(__file__).with_name("hopper_ptx.py")
SPILL_LIMIT = 160
REGISTERS_OF_A_SM = 65_536
SHARED_OF_A_BLOCK = 232_448
THREADS = 4 * 128


@functools.cache
def on_sm_90() -> bool:
    return kernels.mode() == "compiled" and devices.current().arch == hopper_decode.ARCH


needs_sm_90 = pytest.mark.skipif(not on_sm_90(), reason="needs an sm_90 GPU: Gluon has no interpreter")


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


@pytest.fixture
def h200() -> Machine:
    return Machine.of(devices.KNOWN_DEVICES["h200"])


# --- when it is taken ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(on_sm_90(), reason="this is sm_90")
def test_elsewhere_it_is_refused_by_name_and_never_chosen(build: Builder) -> None:
    call = build.small(rows=1, heads=64)
    with pytest.raises(ValueError, match="path: got 'gluon', but that kernel is for sm_90, and this is"):
        split_k_decode(call.q, call.swa, call.extra, path="gluon")
    assert plan_for(call.q, call.swa, call.extra) == plan_for(call.q, call.swa, call.extra, path="triton")
    assert plan_for(call.q, call.swa, call.extra).path == "triton"


def test_a_path_that_is_none_is_refused(build: Builder) -> None:
    call = build.small(rows=1)
    with pytest.raises(ValueError, match="path: got 'cuda', expected one of 'auto', 'triton', 'gluon'"):
        split_k_decode(call.q, call.swa, call.extra, path="cuda")  # type: ignore[arg-type]


def test_what_it_does_not_take_is_said(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_decode, "architecture", lambda where: "sm_90")
    call = build.small(rows=1)
    mixed = build.small(rows=1, dialects=("e4m3fn", "e4m3fnuz"))
    assert hopper_decode.refusal(call.q, call.swa, call.extra, None) is None
    said = hopper_decode.refusal(mixed.q, mixed.swa, mixed.extra, None)
    assert said == "extra's cache is e4m3fnuz, and it reads e4m3fn only"
    said = hopper_decode.refusal(call.q, call.swa, call.extra, LaunchShape(16, 16, 4))
    assert said == "its tile is fixed, and launch asks for 16x16 w4 s1"
    askew = torch.zeros((1, 64, 520), dtype=torch.bfloat16, device=call.q.device)[:, :, :512]
    said = hopper_decode.refusal(askew, call.swa, call.extra, None)
    assert said is not None
    assert said.endswith("with strides (33280, 520, 1), and it copies 16 bytes at a time")


def test_it_is_taken_where_it_was_faster() -> None:
    taken = {
        heads: [rows for rows in (1, 7, 8, 31, 32, 256) if hopper_decode.worthwhile(rows, heads, 128, 512)]
        for heads in (4, 8, 32, 64, 127, 128)
    }
    many = [8, 31, 32, 256]
    assert taken == {4: [], 8: [32, 256], 32: [32, 256], 64: many, 127: many, 128: [1, 7, *many]}


@pytest.mark.parametrize("heads", [64, 128])
def test_few_rows_are_split_and_full_machines_are_not(heads: int, h200: Machine) -> None:
    splits = {rows: hopper_decode.plan(h200, rows, heads, 128, 512).splits for rows in (1, 8, 1024)}
    assert splits[1] >= splits[8] > 1, splits
    assert splits[1024] == 1, splits


def test_a_plan_covers_every_tile_and_keeps_a_count_that_is_asked_for(h200: Machine) -> None:
    for rows, swa, extra in ((1, 128, 512), (3, 1, 0), (64, 128, 1024), (200, 0, 0), (1, 128, 8192)):
        plan = hopper_decode.plan(h200, rows, 64, swa, extra)
        tiles = max(1, -(-swa // 64) + -(-extra // 64))
        assert plan.tiles_per_split * plan.splits >= tiles > plan.tiles_per_split * (plan.splits - 1), plan
        assert plan.splits <= MAX_SPLITS
        assert plan.waves == -(-plan.workgroups // h200.compute_units), plan
    assert hopper_decode.plan(h200, 1024, 64, 128, 512, splits=7).splits == 7
    for splits in (0, 33):
        with pytest.raises(ValueError, match=f"splits: got {splits}, expected an integer from 1 to 32"):
            hopper_decode.plan(h200, 1, 64, 128, 512, splits=splits)


# --- what it compiles to ---------------------------------------------------------------------------------------------


def test_it_compiles_for_sm_90_without_a_gpu() -> None:
    """wgmma, not serialised; 16-byte loads; registers and shared memory of one SM; few words spilt.

    Zero it is not: four groups of warps share the register file, and ptxas spills around a hundred bytes, by Triton
    release. The accumulators are 512 bytes of each thread: the limit is far below one of them going to memory.
    """
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, str(CHILD)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["variant"] for row in rows] == ["one split", "splits"]
    for row in rows:
        assert not row["imported_early"], "the package imports the Gluon kernel before it is launched"
        assert row["registers"] * THREADS <= REGISTERS_OF_A_SM, row
        assert row["spill_bytes"] <= SPILL_LIMIT, row
        assert row["shared_bytes"] <= SHARED_OF_A_BLOCK, row
        assert row["wgmma"] > 0, row
        assert not row["serialised"], row
        assert not row["hasty_arrivals"], row
        assert not row["unawaited_copies"], row
        assert row["wide_loads"] > 0, row


# --- what it computes ------------------------------------------------------------------------------------------------


def run(call: Call, splits: int, **options: Any) -> tuple[Tensor, Tensor]:
    with poisoned_allocations():
        out, lse = split_k_decode(
            call.q, call.swa, call.extra, sink=call.sink, scale=call.scale, splits=splits, path="gluon",
            return_lse=True, **options,
        )  # fmt: skip
    assert lse is not None
    return out, lse


@needs_sm_90
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [5, 8, 64, 128])
def test_head_counts(heads: int, splits: int, build: Builder) -> None:
    call = build.small(rows=3, heads=heads)
    call.check(*run(call, splits))


@needs_sm_90
@pytest.mark.parametrize("splits", [1, 2, 5, 32])
def test_lists_of_any_length_cut_anywhere(splits: int, build: Builder) -> None:
    """Lengths around tiles of 64, the reverse in the other scope; a row without keys."""
    lengths = (0, 1, 63, 64, 65, 130, 200)
    call = build.call(build.lists(lengths, 256), build.lists([0, *lengths[:0:-1]], 256), heads=64, entries=256)
    call.check(*run(call, splits))


@needs_sm_90
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_rows_without_keys_are_zero_and_holes_are_skipped(splits: int, build: Builder) -> None:
    swa = [[], [-1, 10**6] * 40, [3, -1, 3, 10**6, 9], [-1] * 70 + [5]]
    extra = [[], [-1], [], [7] + [-1] * 80]
    call = build.call(swa, extra, heads=64)
    out, lse = run(call, splits)
    call.check(out, lse)
    assert (out[:2] == 0).all()
    assert (lse[:2] == -torch.inf).all()


@needs_sm_90
@pytest.mark.parametrize("options", [{"sink": False}, {"blocks": (2, 53)}, {"blocks": (256, 69)}], ids=str)
def test_pages_of_any_size_and_calls_without_a_sink(options: dict[str, Any], build: Builder) -> None:
    call = build.small(heads=64, **options)
    call.check(*run(call, 1))
    alone = replace(call, extra=None)
    alone.check(*run(alone, 2))


@needs_sm_90
def test_more_pieces_than_sms_follow_one_another(build: Builder) -> None:
    """Programs keep their barriers over several rows, rows without a key among them."""
    lengths = [0 if row % 5 == 3 else 1 + 37 * row % 150 for row in range(300)]
    call = build.call(build.lists(lengths, 256), build.lists(lengths[::-1], 256), heads=128, entries=256)
    call.check(*run(call, 1))
    call.check(*run(call, 3))


@needs_sm_90
@pytest.mark.parametrize("splits", [1, 2])
def test_the_same_bits_every_time_beside_other_work(splits: int, build: Builder, device: str) -> None:
    """Roles that hand over before their writes can be seen are right most of the time, and least where others run."""
    lengths = [1 + 37 * row % 190 for row in range(321)]
    call = build.call(build.lists(lengths, 256), build.lists(lengths[::-1], 256), heads=64, entries=256)
    first, first_lse = run(call, splits)
    beside, busy = torch.cuda.Stream(), torch.randn((2048, 2048), device=device)
    for time in range(200):
        with torch.cuda.stream(beside):
            busy @ busy
        out, lse = run(call, splits)
        assert torch.equal(out.view(torch.int16), first.view(torch.int16)), f"run {time}"
        assert torch.equal(lse, first_lse), f"run {time}"


@needs_sm_90
@pytest.mark.parametrize("splits", [1, 3])
def test_the_rotation_is_that_of_the_reference(splits: int, build: Builder, device: str) -> None:
    call = build.small(rows=4, heads=64)
    freqs = frequencies(10_000.0, 64).to(device)
    positions = torch.tensor([0, 1, 511, 1_000], device=device)
    out, _ = run(call, splits, rotation=QueryRotation.of(positions, freqs, 1024))
    scopes = [call.swa] if call.extra is None else [call.swa, call.extra]
    right, _ = sparse_attention_ref(call.q, scopes, call.sink, call.scale)
    plain, _ = sparse_attention_plain(call.q, scopes, call.sink, call.scale)
    plain = rotate_back_ref(plain.float(), positions, freqs).to(torch.bfloat16)
    want = rotate_back_ref(right, positions, freqs)
    found = compare.close("out", out, want, compare.TOLERANCES["attention_bf16"], plain)
    assert found.passed, found.detail


def one_key_each(build: Builder, codes: Tensor, scales: Sequence[int], device: str) -> Call:
    """Rows of one key each: codes that start one further on, ``scales[row]`` for its seven scales; zero queries."""
    cache = build.cache(64)
    block = cache.data.as_strided((cache.block_stride,), (1,))
    for row, scale in enumerate(scales):
        block[row * 576 : row * 576 + 448] = codes.roll(-row)[:448].to(device)
        block[64 * 576 + row * 8 : 64 * 576 + row * 8 + 7] = scale
    scope = build.scope(cache, [[row] for row in range(len(scales))])
    return Call(torch.zeros((len(scales), 64, 512), dtype=torch.bfloat16, device=device), scope)


@needs_sm_90
def test_every_code_and_scale_arrives_exactly(build: Builder, device: str) -> None:
    """With one key the output is that key: all finite codes, and scales on both sides of 2^8."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F] * 2, dtype=torch.uint8)
    call = one_key_each(build, finite, [20, 60, 112, 120, 127, 134, 135, 200, 240, 245], device)
    out, _ = run(call, 1)
    slots = torch.arange(call.q.shape[0], device=device)
    keys = kv_cache.gather(call.swa.cache, slots)[:, None, :].expand_as(out)
    wrong = (out != keys).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} values differ, first at {wrong[0].tolist()}"


@needs_sm_90
def test_a_nan_code_and_a_nan_scale_show(build: Builder, device: str) -> None:
    codes = torch.full((449,), 0x38, dtype=torch.uint8)
    codes[448] = 0xFF  # beyond the first row's codes, the last of the second's
    call = one_key_each(build, codes, [127, 127, 255], device)
    out, _ = run(call, 1)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert out[2].isnan().all()


@needs_sm_90
@pytest.mark.parametrize("case", ["tiny-ragged", "tiny-over-split", "window-edges", "flash-74"])
def test_the_chapters_gate_compares_it(case: str) -> None:
    inputs = chapter.OPTIMIZATION.make_inputs(chapter.OPTIMIZATION.case(case), "cuda", 0)
    assert f"{chapter.HOPPER} out" in chapter.OPTIMIZATION.optimized(inputs)


PLANTED = {
    "a scale of the neighbouring group": ("hopper_fill", "(_FACTOR_0,", "(_FACTOR_1,", "tiny-ragged"),
    "a tile's last key dropped": (
        "hopper_fill", "(lanes < length)", "(lanes < length) & (lanes % _KEYS != _KEYS - 1)", "flash-74",
    ),
    "older sums do not decay": (
        "hopper_kernel", "output * decays.index(at).load(per_row)[:, None]", "output", "flash-74",
    ),
}  # fmt: skip
"""Where a bug goes, what stands there, what it becomes, and a case that shows it: any tile, a full one, several."""


def planted(bug: str, folder: Path) -> ModuleType:
    """The kernel's module with a bug in its source, or in that of its fill, under names of their own."""
    package = hopper_decode.__name__.rpartition(".")[0]
    where, right, wrong, _ = PLANTED[bug]
    for name in ("hopper_fill", "hopper_kernel"):
        source = (Path(hopper_decode.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        if name == where:
            assert source.count(right) == 1, f"{name}: {right!r} stands there {source.count(right)} times"
            source = source.replace(right, wrong)
        source = source.replace(f"from {package}.hopper_fill import", "from planted_fill import")
        (folder / f"{name.replace('hopper', 'planted')}.py").write_text(source, encoding="utf-8")
    return importlib.import_module("planted_kernel")


@needs_sm_90
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_turns_the_chapters_gate_red(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("planted_fill", "planted_kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = planted(bug, tmp_path)
    monkeypatch.setattr(hopper_decode, "_kernel_module", lambda: module)
    verdict = verify(chapter.OPTIMIZATION, PLANTED[bug][3], device="cuda", seed=0)
    assert not verdict.passed, f"{bug}: {verdict.detail}"
