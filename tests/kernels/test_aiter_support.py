"""The support matrix: what it says of the calls that matter, and that every refusal names a choice that works."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dsv4ref.kernels.aiter.contract import CONTRACT
from dsv4ref.kernels.aiter.support import ARCHS, MATRIX, Answer, Kernel, matrix_rows, query


def ask(**changes: Any) -> Answer:
    usual = {"arch": "gfx950", "heads": 16, "query_length": 1, "q_dtype": "fp8", "kv_dtype": "fp8"}
    return query("mla_decode_fwd", **{**usual, "persistent": True, "lse": True, **changes})


def test_the_persistent_fp8_decode_with_lse_exists_on_gfx950_for_16_and_32_heads() -> None:
    assert ask().supported
    assert ask(heads=32).supported


def test_gfx942_has_no_persistent_lse_but_for_64_heads_which_fault() -> None:
    for heads in (16, 32, 128):
        answer = ask(arch="gfx942", heads=heads)
        assert not answer.supported
        assert answer.reason.startswith(f"no LSE for {heads} heads")
        assert ask(arch="gfx942", heads=heads, lse=False).supported
    faulting = ask(arch="gfx942", heads=64)
    assert faulting.kernel is not None
    assert "aiter#4957" in faulting.kernel.note


def test_gfx942_offers_an_lse_outside_the_persistent_path() -> None:
    nearest = ask(arch="gfx942").nearest
    assert nearest is not None
    assert (nearest.arch, nearest.heads, nearest.persistent, nearest.lse) == ("gfx942", 16, False, True)
    assert "two KV splits" in nearest.note


def test_64_heads_on_gfx950_are_answered_with_32() -> None:
    answer = ask(heads=64)
    assert "+inf" in answer.reason
    assert answer.nearest is not None
    assert answer.nearest.heads == 32


def test_an_lse_nobody_asked_for_does_no_harm() -> None:
    assert ask(lse=False).kernel == ask(lse=True).kernel


def test_any_length_serves_every_length() -> None:
    for length in (1, 3, 7):
        assert ask(arch="gfx942", heads=128, query_length=length, lse=False).supported


def test_another_architecture_is_refused_with_those_there_are() -> None:
    answer = ask(arch="sm_90")
    assert answer.reason == "no kernel for sm_90; mla_decode_fwd has some for gfx942, gfx950"


def test_every_refusal_names_a_choice_that_is_supported() -> None:
    grid = itertools.product(
        ARCHS, (8, 16, 24, 32, 64, 128), (1, 2, 3, 4), ("fp8", "bf16"), (True, False), (True, False)
    )
    for arch, heads, length, dtype, persistent, lse in grid:
        answer = ask(arch=arch, heads=heads, query_length=length, q_dtype=dtype, kv_dtype=dtype, persistent=persistent,
                     lse=lse)  # fmt: skip
        assert answer.supported == (answer.reason == "") == (answer.kernel is not None)
        near = answer.nearest
        assert near is not None
        assert near.arch == arch, "another GPU is no choice"
        again = query(near.entry, arch=arch, heads=near.heads, query_length=near.query_length or length,
                      q_dtype=near.q_dtype, kv_dtype=near.kv_dtype, persistent=near.persistent,
                      lse=near.lse)  # fmt: skip
        assert again.supported, near


def test_a_row_answers_for_itself_and_rows_do_not_contradict_each_other() -> None:
    for row in MATRIX:
        assert query(row.entry, arch=row.arch, heads=row.heads, query_length=row.query_length or 1, q_dtype=row.q_dtype,
                     kv_dtype=row.kv_dtype, persistent=row.persistent, lse=row.lse).supported, row  # fmt: skip
    shapes = [(r.entry, r.arch, r.heads, r.query_length, r.q_dtype, r.kv_dtype, r.persistent) for r in MATRIX]
    assert len(shapes) == len(set(shapes))


def test_every_row_has_a_source_and_an_entry_of_the_contract() -> None:
    for row in MATRIX:
        assert row.entry in CONTRACT
        assert row.source
        assert row.arch in ARCHS


def test_v4_entries_exist_on_gfx950_only() -> None:
    for entry in ("mla_decode_fwd_v4_nm", "mla_v40_decode_fwd"):
        assert {row.arch for row in MATRIX if row.entry == entry} == {"gfx950"}
    assert all(r.heads * r.query_length in (64, 128) for r in MATRIX if r.entry == "mla_v40_decode_fwd")


def test_rows_for_a_table_can_be_narrowed() -> None:
    rows = matrix_rows("mla_decode_fwd", "gfx942")
    assert rows
    assert {row["entry"] for row in rows} == {"mla_decode_fwd"}
    assert {row["arch"] for row in rows} == {"gfx942"}
    assert len(matrix_rows()) == len(MATRIX)
    assert "any" in {row["query length"] for row in rows}


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"entry: got 'mla', expected one of \['mla_decode_fwd'"):
        query("mla", arch="gfx950", heads=16, query_length=1, q_dtype="fp8", kv_dtype="fp8", persistent=True, lse=True)


def test_a_row_reads_as_a_sentence() -> None:
    row = Kernel("e", "gfx942", 128, 0, "fp8", "fp8", True, False, "", "s")
    assert str(row) == "128 heads, any length, fp8/fp8, persistent, no LSE on gfx942"
