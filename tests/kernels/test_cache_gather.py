"""The cache reader and the dialect conversion: bits against the formats, corners of the layout, and bad arguments."""

from __future__ import annotations

import re
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.compare import identical
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.formats import Dialect, KVCache, kv_cache
from dsv4ref.formats.kv_cache import NOPE_DIM, SCALE_COUNT
from dsv4ref.kernels import cache_gather
from dsv4ref.kernels.cache_gather import gather_entries, relabel_entries, unconvertible_blocks

FN, FNUZ = Dialect.FN, Dialect.FNUZ
BOTH = pytest.mark.parametrize("dialect", list(Dialect))


def written(
    entries: int, block: int, dialect: Dialect, rng: torch.Generator, device: str, blocks: int | None = None
) -> tuple[KVCache, Tensor]:
    """A poisoned cache with random entries, some of whose codes underflow to -0."""
    cache = kv_cache.allocate(blocks or -(-entries // block) + 1, block, dialect, device=device, fill=0xFF)
    kv = torch.randn((entries, 512), generator=rng) * torch.exp2(torch.randint(-6, 6, (entries, 1), generator=rng))
    kv[:, 3::97] = -1e-9
    kv = kv.to(device)
    kv_cache.insert(cache, torch.arange(entries, device=device), kv)
    return cache, kv


def same_bits(got: Tensor, want: Tensor) -> None:
    """bf16 rows equal bit for bit; every NaN counts as the same."""
    mask = identical("NaN mask", got.isnan(), want.isnan())
    assert mask.passed, mask.detail
    found = identical("rows", got.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).contiguous(),
                      want.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).contiguous())  # fmt: skip
    assert found.passed, found.detail


def set_codes(cache: KVCache, codes: Tensor, scale: int) -> None:
    """Fill entry 0 with ``codes`` (repeated) under one scale byte, everything else with zeros under 127."""
    cache.entry_rows.zero_()
    cache.entry_scales[..., :SCALE_COUNT] = 127
    cache.entry_rows[0, 0, :NOPE_DIM] = codes.repeat(2)[:NOPE_DIM].to(cache.data.device)
    cache.entry_scales[0, 0, :SCALE_COUNT] = scale


# --- reading ---


@BOTH
@pytest.mark.parametrize("block", [1, 2, 64, 256])
def test_rows_are_the_formats_rows(dialect: Dialect, block: int, rng: torch.Generator, device: str) -> None:
    cache, _ = written(21, block, dialect, rng, device)
    slots = torch.randint(0, cache.rows, (37,), generator=rng).to(torch.int32).to(device)
    with poisoned_allocations():
        got = gather_entries(cache, slots)
    same_bits(got, kv_cache.gather(cache, slots))


def test_slots_that_are_none_give_zeros_and_their_bytes_are_not_read(rng: torch.Generator, device: str) -> None:
    cache, _ = written(4, 2, FN, rng, device)
    slots = torch.tensor([-1, 1, cache.rows, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    with poisoned_allocations():
        got = gather_entries(cache, slots)
    assert (got[[0, 2, 3, 4]] == 0).all()
    same_bits(got[1:2], kv_cache.gather(cache, slots[1:2]))


@BOTH
def test_a_cache_is_read_in_its_own_dialect_whatever_the_machine_speaks(
    dialect: Dialect, rng: torch.Generator, device: str
) -> None:
    """The same bytes under either label: 253 codes differ by exactly two, and by nothing else."""
    cache = kv_cache.allocate(1, 1, dialect, device=device)
    set_codes(cache, torch.arange(256).to(torch.uint8), 127)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    mine = gather_entries(cache, slots)[0, :256].float()
    other = FN if dialect is FNUZ else FNUZ
    theirs = gather_entries(KVCache(cache.data, other), slots)[0, :256].float()
    both = mine.isfinite() & theirs.isfinite()
    assert int(both.sum()) == 253
    assert torch.equal(mine[both], theirs[both] * (2.0 if dialect is FN else 0.5))
    assert sorted((~both).nonzero()[:, 0].tolist()) == [0x7F, 0x80, 0xFF]


def test_rows_go_where_the_caller_says_and_nowhere_else(rng: torch.Generator, device: str) -> None:
    cache, _ = written(5, 64, FN, rng, device)
    slots = torch.arange(5, dtype=torch.int32, device=device)
    buffer = torch.full((7, 1024), 7.0, dtype=torch.bfloat16, device=device)
    out = buffer[1:6, 256:768]
    assert gather_entries(cache, slots, out=out) is out
    same_bits(out, kv_cache.gather(cache, slots))
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard[1:6, 256:768] = False
    assert (buffer[guard] == 7.0).all()


def test_an_empty_list_gives_no_rows(rng: torch.Generator, device: str) -> None:
    cache, _ = written(1, 64, FN, rng, device)
    assert gather_entries(cache, torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, 512)


# --- converting ---


@BOTH
@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_a_converted_cache_is_the_one_a_writer_of_that_dialect_stores(
    dialect: Dialect, block: int, rng: torch.Generator, device: str
) -> None:
    to = FN if dialect is FNUZ else FNUZ
    cache, kv = written(21, block, dialect, rng, device)
    numbers = kv_cache.gather(cache, torch.arange(21, device=device))
    rope_and_pad = cache.entry_rows[..., NOPE_DIM:].clone(), cache.entry_scales[..., SCALE_COUNT:].clone()
    done = relabel_entries(cache, to)
    assert done.dialect is to
    assert done.data.data_ptr() == cache.data.data_ptr()
    fresh = kv_cache.allocate(cache.num_blocks, block, to, device=device, fill=0xFF)
    kv_cache.insert(fresh, torch.arange(21, device=device), kv)
    want = fresh.entry_rows.reshape(-1, 576)[:21, :NOPE_DIM]
    want = torch.where(want == 0x80, torch.zeros_like(want), want)  # fnuz had no -0 to give back
    codes = identical("codes", done.entry_rows.reshape(-1, 576)[:21, :NOPE_DIM].contiguous(), want.contiguous())
    assert codes.passed, codes.detail
    scales = identical("scales", done.entry_scales.reshape(-1, 8)[:21].contiguous(),
                       fresh.entry_scales.reshape(-1, 8)[:21].contiguous())  # fmt: skip
    assert scales.passed, scales.detail
    assert torch.equal(done.entry_rows[..., NOPE_DIM:], rope_and_pad[0])
    assert torch.equal(done.entry_scales[..., SCALE_COUNT:], rope_and_pad[1])
    read = kv_cache.gather(done, torch.arange(21, device=device))
    assert torch.equal(read, numbers)  # -0 equals +0


@BOTH
def test_every_code_keeps_its_value_or_its_nan(dialect: Dialect, device: str) -> None:
    """All 256 codes at every position of a word."""
    to = FN if dialect is FNUZ else FNUZ
    for shift in range(4):
        cache = kv_cache.allocate(1, 2, dialect, device=device)
        set_codes(cache, torch.arange(256).roll(shift).to(torch.uint8), 100)
        before = kv_cache.gather(cache, torch.zeros(1, dtype=torch.int64, device=device)).float()
        after = relabel_entries(cache, to, check=False)
        got = kv_cache.gather(after, torch.zeros(1, dtype=torch.int64, device=device)).float()
        # 240 * 2^k has no OCP partner at the same exponent: unchecked, it becomes NaN and never another number
        no_partner = (
            (before.abs() == 240.0 * 2.0**-27) if dialect is FNUZ else torch.zeros_like(before, dtype=torch.bool)
        )
        assert torch.equal(got.isnan(), before.isnan() | no_partner)
        kept = ~got.isnan()
        assert torch.equal(got[kept], before[kept])


def test_there_and_back_gives_the_same_bytes(rng: torch.Generator, device: str) -> None:
    cache, _ = written(10, 2, FNUZ, rng, device, blocks=5)  # nothing left unwritten: 0xFF is fnuz's -240
    rows, scales = cache.entry_rows.clone(), cache.entry_scales.clone()
    back = relabel_entries(relabel_entries(cache, FN), FNUZ)
    assert back.dialect is FNUZ
    assert torch.equal(back.entry_rows, rows)
    assert torch.equal(back.entry_scales, scales)


@BOTH
def test_nan_scales_stay_nan_and_padding_is_left_alone(dialect: Dialect, device: str) -> None:
    cache = kv_cache.allocate(2, 64, dialect, device=device, fill=0xFF)
    done = relabel_entries(cache, FN if dialect is FNUZ else FNUZ)
    assert (done.entry_scales == 255).all()
    flat = done.data.as_strided((2, done.block_stride), (done.block_stride, 1))
    assert (flat[:, 64 * 584 :] == 0xFF).all()


@pytest.mark.parametrize(("dialect", "before", "after"), [(FN, 253, 254), (FN, 254, 255), (FNUZ, 1, 0), (FNUZ, 0, 0)])
def test_scale_bytes_stop_at_the_ends_of_their_range(dialect: Dialect, before: int, after: int, device: str) -> None:
    """Unchecked, as under graph capture; nothing wraps from one end to the other."""
    cache = kv_cache.allocate(1, 2, dialect, device=device)
    set_codes(cache, torch.full((NOPE_DIM,), 0x38, dtype=torch.uint8), before)
    done = relabel_entries(cache, FN if dialect is FNUZ else FNUZ, check=False)
    assert done.entry_scales[0, 0, :SCALE_COUNT].tolist() == [after] * SCALE_COUNT


def test_a_cache_already_in_the_dialect_is_returned_untouched(rng: torch.Generator, device: str) -> None:
    cache, _ = written(3, 2, FN, rng, device)
    before = cache.data.clone()
    assert relabel_entries(cache, "e4m3fn") is cache
    assert torch.equal(cache.data, before)


@pytest.mark.parametrize(
    ("dialect", "code", "scale", "blocks"),
    [
        (FNUZ, 0x7F, 127, 1),  # 240
        (FNUZ, 0xFF, 127, 1),  # -240
        (FNUZ, 0x01, 0, 7),  # half of 2^-127 has no scale byte
        (FNUZ, 0x00, 0, 0),  # a zero block has no scale to lose
        (FNUZ, 0x7E, 127, 0),  # 224
        (FN, 0x01, 254, 7),  # twice 2^127
        (FN, 0x7F, 127, 0),  # a NaN stays one
    ],
)
def test_blocks_that_do_not_convert_are_refused_before_anything_is_written(
    dialect: Dialect, code: int, scale: int, blocks: int, device: str
) -> None:
    cache = kv_cache.allocate(1, 2, dialect, device=device)
    set_codes(cache, torch.zeros(NOPE_DIM, dtype=torch.uint8), scale)
    cache.entry_rows[0, 0, :NOPE_DIM:64] = code
    if blocks == 1:
        cache.entry_rows[0, 0, 64:NOPE_DIM] = 0
    to = FN if dialect is FNUZ else FNUZ
    assert unconvertible_blocks(cache, to) == blocks
    before = cache.data.clone()
    if not blocks:
        relabel_entries(cache, to)
        return
    with pytest.raises(ValueError, match=f"cache: {blocks} blocks of 64 codes hold .*re-encode those to {to.value}"):
        relabel_entries(cache, to)
    assert torch.equal(cache.data, before)


def test_blocks_far_apart_are_addressed_in_64_bits(device: str) -> None:
    """A stride that two blocks take past 2^31 bytes; the memory is reserved, not touched."""
    if device != "cpu":
        pytest.skip("reserves 4 GiB, which a CPU backs only where it is touched")
    stride = 576 * 3728271  # 2,147,484,096 bytes, just above 2^31
    flat = torch.empty(2 * stride, dtype=torch.uint8)
    cache = KVCache(flat.as_strided((2, 2, 584), (stride, 584, 1)), FN)
    kv_cache.insert(cache, torch.tensor([2, 3]), torch.randn(2, 512, generator=torch.Generator().manual_seed(1)))
    want = kv_cache.gather(cache, torch.tensor([2, 3]))
    slots = torch.tensor([2, 3], dtype=torch.int32)
    same_bits(gather_entries(cache, slots), want)
    done = relabel_entries(cache, FNUZ, check=False)
    assert torch.equal(gather_entries(done, slots), want)


# --- constants and bad arguments ---


def test_the_kernels_constants_are_the_layouts() -> None:
    assert cache_gather._DIM.value == kv_cache.HEAD_DIM
    assert cache_gather._ROW_BYTES.value == kv_cache.ROW_BYTES
    assert cache_gather._ROW_WORDS.value * 4 == kv_cache.ROW_BYTES
    assert cache_gather._CODE_WORDS.value * 4 == kv_cache.NOPE_DIM
    assert cache_gather._SCALE_COUNT.value == kv_cache.SCALE_COUNT
    assert cache_gather._SCALE_SLOTS.value == kv_cache.SCALE_SLOTS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": lambda c, s: c.data}, TypeError, "cache: got Tensor, expected a KVCache"),
        ({"slots": lambda c, s: s.tolist()}, TypeError, "slots: got list, expected a torch.Tensor"),
        ({"slots": lambda c, s: s.long()}, TypeError, "slots: got torch.int64, expected torch.int32"),
        ({"slots": lambda c, s: s[None]}, ValueError, "slots: got shape [1, 4], expected [N]"),
        ({"slots": lambda c, s: s.repeat(2)[::2]}, ValueError, "slots: got strides (2,), expected a contiguous"),
        ({"slots": lambda c, s: s.to("meta")}, ValueError, "slots: on meta, expected"),
        ({"out": lambda c, s: torch.empty(4, 512)}, TypeError, "out: got torch.float32, expected torch.bfloat16"),
        ({"out": lambda c, s: _bf16(c, 3, 512)}, ValueError, "out: got shape [3, 512], expected [4, 512]"),
        ({"out": lambda c, s: _bf16(c, 4, 1024)[:, ::2]}, ValueError, "out: got strides (1024, 2), expected a unit"),
        ({"out": lambda c, s: _bf16(c, 1, 512).expand(4, 512)}, ValueError, "overlaps itself"),
        ({"out": lambda c, s: c.data.as_strided((4, 1024), (1024, 1)).view(torch.bfloat16)}, ValueError,
         "out: its memory range overlaps the cache's by 4096 bytes"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, rng: torch.Generator, device: str
) -> None:
    cache, _ = written(8, 2, FN, rng, device)
    slots = torch.arange(4, dtype=torch.int32, device=device)
    arguments: dict[str, Any] = {"cache": cache, "slots": slots}
    arguments |= {name: make(cache, slots) for name, make in change.items()}
    with pytest.raises(error, match=re.escape(message)):
        gather_entries(arguments.pop("cache"), arguments.pop("slots"), **arguments)


def _bf16(cache: KVCache, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=cache.data.device)


def test_an_unknown_dialect_is_named(rng: torch.Generator, device: str) -> None:
    cache, _ = written(1, 2, FN, rng, device)
    with pytest.raises(ValueError, match=r"to: got 'fp8', expected one of \['e4m3fn', 'e4m3fnuz'\]"):
        relabel_entries(cache, "fp8")
    with pytest.raises(TypeError, match="cache: got Tensor, expected a KVCache"):
        relabel_entries(cache.data, "e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache: got Tensor, expected a KVCache"):
        unconvertible_blocks(cache.data, "e4m3fn")  # type: ignore[arg-type]


@pytest.mark.skipif(kernels.mode() == "compiled", reason="plants a state that cannot happen with a GPU's tensors")
def test_cpu_tensors_are_refused_where_kernels_are_compiled(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = written(1, 2, FN, rng, "cpu")
    cache_gather.architecture.cache_clear()
    monkeypatch.setattr(kernels, "mode", lambda: "compiled")
    try:
        for call in (
            lambda: gather_entries(cache, torch.zeros(1, dtype=torch.int32)),
            lambda: relabel_entries(cache, FNUZ),
        ):
            with pytest.raises(ValueError, match="device: got CPU tensors while kernels are compiled"):
                call()
    finally:
        cache_gather.architecture.cache_clear()
