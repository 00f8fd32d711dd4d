"""Solutions of chapter 02's exercises, worked out with the package, and what the chapter counts and draws."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import torch

from dsv4ref.evidence.launches import count_launches
from dsv4ref.formats import Dialect, KVCache, fp8, kv_cache, ue8m0
from dsv4ref.kernels.cache_gather import relabel_entries, unconvertible_blocks
from dsv4ref.optimizations.fp8_dialects import OPTIMIZATION, scope_rows, touched_rows
from dsv4ref.show.explorers import byte_explorer, value_explorer

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_fp8_dialects.ipynb"
TITLES = ["Where is the byte?", "When does 240 choose another scale than 224?", "What can never be converted?"]


def exercises() -> dict[str, str]:
    """Title to text of every exercise, its solution included."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    section = prose.split("\n## Exercises\n")[1].split("\n## ")[0]
    return {part.split("\n", 1)[0].strip(): part for part in section.split("\n### ")[1:]}


def test_the_chapter_has_these_exercises_and_no_other() -> None:
    assert list(exercises()) == TITLES


def test_the_byte_is_where_the_solution_says() -> None:
    found = re.search(r"`([\d *+]+)`, which is (\d+)", exercises()[TITLES[0]])
    assert found is not None
    address = int(found[2])
    assert eval(found[1]) == address  # the solution's own arithmetic: digits, *, + and spaces
    cache = kv_cache.allocate(1, 256, "e4m3fn")
    kv = torch.ones((1, 512))
    kv[0, 128:192] = 2.0**9
    kv_cache.insert(cache, torch.tensor([3]), kv)
    block = cache.data.as_strided((cache.block_stride,), (1,))
    largest = block[256 * 576 :].argmax()  # the one block of 64 that is scaled up
    assert int(largest) + 256 * 576 == address
    assert int(block[address]) == int(ue8m0.scale_byte(torch.tensor(2.0**9), 448.0))


@pytest.mark.parametrize("exponent", [-8, 0, 7])
def test_240_and_224_differ_for_maxima_with_mantissas_in_the_named_interval(exponent: int) -> None:
    mantissas = 1 + torch.arange(128) / 128  # every bf16 mantissa
    maxima = mantissas * 2.0**exponent
    differ = ue8m0.scale_byte(maxima, 240.0) != ue8m0.scale_byte(maxima, 224.0)
    inside = (mantissas > 1.75) & (mantissas <= 1.875)
    wrong = mantissas[differ != inside].tolist()
    assert not wrong, f"mantissas {wrong[:3]}"
    said = re.search(r"That is (\d+) of the 128 mantissas", exercises()[TITLES[1]])
    assert said is not None
    assert int(differ.sum()) == int(said[1])


def lost_pairs() -> set[tuple[int, int]]:
    """(code, scale byte) in fnuz whose number no OCP pair with the same code holds."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    fnuz, fn = (fp8.decode(codes, d, torch.float64).tolist() for d in (Dialect.FNUZ, Dialect.FN))
    scales = ue8m0.decode(codes).to(torch.float64).tolist()
    lost = set()
    for c in range(256):
        held = {fn[c] * s for s in scales[:255]}
        lost |= {(c, b) for b in range(255) if fnuz[c] == fnuz[c] and fnuz[c] * scales[b] not in held}
    return lost


def test_762_pairs_have_no_partner_with_the_same_code() -> None:
    lost = lost_pairs()
    codes = {c for c, b in lost if b}
    assert codes == {0x7F, 0xFF}
    assert sum(c in codes for c, _ in lost) == 510
    assert sum(c not in codes for c, _ in lost) == 252
    said = re.search(r"Together (\d+)\.", exercises()[TITLES[2]])
    assert said is not None
    assert len(lost) == int(said[1])


def test_the_conversion_refuses_exactly_those_pairs() -> None:
    """One block of 64 per pair: filled with the code, under the scale."""
    cache = kv_cache.allocate(1, 256 * 256 // 4, "e4m3fnuz")  # four pairs to an entry; the other blocks stay zero
    pairs = [(c, b) for c in range(256) for b in range(256)]
    grid = torch.tensor(pairs, dtype=torch.int32).to(torch.uint8).reshape(-1, 4, 2)
    cache.entry_scales[..., :7] = 127
    cache.entry_rows[0, :, : 4 * 64] = grid[..., 0].repeat_interleave(64, dim=1)
    cache.entry_scales[0, :, :4] = grid[..., 1]
    assert unconvertible_blocks(cache, "e4m3fn") == len(lost_pairs())


def test_no_writer_makes_such_a_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    amplitudes = torch.exp2(torch.arange(-40.0, 41.0))
    kv = torch.randn((len(amplitudes), 512), generator=generator) * amplitudes[:, None]
    codes, scales, _ = kv_cache.quantise(kv, "e4m3fnuz")
    assert not ((codes & 0x7F) == 0x7F).any()
    assert int(scales.min()) > 0


# --- what the chapter counts and draws -------------------------------------------------------------------------------


def test_launches_and_bytes_are_those_predicted(device: str) -> None:
    inputs = OPTIMIZATION.make_inputs(OPTIMIZATION.case("tiny"), device, 0)
    variants = OPTIMIZATION.timed(inputs)
    prediction = OPTIMIZATION.predict(OPTIMIZATION.case("tiny"), "h200")
    if device == "cpu":  # a GPU may take several kernels for one operator
        assert count_launches(variants["baseline"]).total == prediction.baseline_launches
    assert count_launches(variants["optimized"]).total == prediction.optimized_launches
    assert prediction.least_bytes < prediction.optimized_bytes < prediction.baseline_bytes


def test_reading_a_cache_in_either_dialect_is_one_launch(device: str) -> None:
    variants = OPTIMIZATION.timed(OPTIMIZATION.make_inputs(OPTIMIZATION.case("tiny"), device, 0))
    assert [count_launches(variants[f"read as {d.value}"]).total for d in Dialect] == [1, 1]


def test_a_conversion_touches_scale_bytes_and_minus_zeros_only(device: str) -> None:
    inputs = OPTIMIZATION.make_inputs(OPTIMIZATION.case("tiny"), device, 0)
    cache = inputs.extra
    written = len(inputs.kv)
    before = KVCache(cache.data.as_strided((cache.num_blocks * cache.block_stride,), (1,)).clone().as_strided(
        cache.data.shape, cache.data.stride()), cache.dialect)  # fmt: skip
    minus_zeros = int((before.entry_rows[0, :written, :448] == 0x80).sum())
    assert minus_zeros >= written - 1  # every entry but the zero one has one planted
    nan_codes = 448 * (cache.rows - written)  # unwritten entries are 0xFF
    changed = {row["plane"]: row["changed"] for row in touched_rows(before, relabel_entries(cache, "e4m3fnuz"))}
    assert changed == {"codes": minus_zeros + nan_codes, "rope": 0, "scale bytes": 7 * written, "pad": 0}


@pytest.mark.parametrize("flag", list(Dialect))
def test_one_flag_breaks_one_scope_and_only_that(flag: Dialect, device: str) -> None:
    rows = {row["scope"]: row for row in scope_rows(flag, where=device)}
    broken, whole = ("SWA", "extra") if flag is Dialect.FN else ("extra", "SWA")
    assert rows[whole]["cosine"] == pytest.approx(1.0, abs=1e-12)
    assert rows[whole]["length"] == 1.0
    assert rows[broken]["cosine"] < 0.95
    assert (rows[broken]["length"] > 1.5) == (flag is Dialect.FN)
    assert not any(row["NaN outputs"] for row in rows.values())


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (byte_explorer(0x76, 128), "e4m3fn: 14/8 x 2^(14 - 7) = 224; with its scale 448"),
        (byte_explorer(0x76, 128), "e4m3fnuz: 14/8 x 2^(14 - 8) = 112; with its scale 224"),
        (byte_explorer(0x7F), "e4m3fn: NaN"),
        (byte_explorer(0xFF), "e4m3fnuz: -15/8 x 2^(15 - 8) = -240"),
        (byte_explorer(0x80), "e4m3fnuz: NaN"),
        (byte_explorer(0x01), "e4m3fn: 1/8 x 2^(1 - 7) = 0.00195312"),
        (byte_explorer(0x01, 255), "with its scale NaN"),
        (value_explorer(300.0), "e4m3fnuz: clamped 0x7F = 240; torch's bare cast 0x80 = NaN"),
        (value_explorer(-1e-4), "e4m3fn: clamped 0x80 = -0"),
    ],
)
def test_the_explorers_say_what_a_byte_means(picture: str, said: str) -> None:
    label = re.search(r'aria-label="([^"]+)"', picture)
    assert label is not None
    assert said in label[1]
