"""Index logits and the choice of the top-k: against the reference, at the edges of topk, and with ties."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.kernels.sparse_mla.topk import TopkScratch, index_logits, select
from dsv4ref.ref.indexer import index_scores_ref, select_ref

HEADS, DIM, BLOCK_SIZE = 16, 32, 8


@dataclass(frozen=True)
class Given:
    q: Tensor
    weights: Tensor
    keys: Tensor
    table: Tensor
    requests: Tensor
    lengths: Tensor

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        return tuple(value.to(device) for value in vars(self).values())

    def scores(self, row: int) -> Tensor:
        """float64 scores of the entries that a row sees."""
        entries = torch.arange(int(self.lengths[row]))
        blocks = self.table[int(self.requests[row])].long()[entries // BLOCK_SIZE]
        keys = self.keys[blocks, entries % BLOCK_SIZE].double()
        return index_scores_ref(self.q[row].double(), keys, self.weights[row].double())


def given(lengths: list[int], rng: torch.Generator, *, blocks: int = 12, whole: bool = True) -> Given:
    """Whole numbers give scores that fp32 sums exactly in any order."""
    rows = len(lengths)
    sizes = {"q": (rows, HEADS, DIM), "weights": (rows, HEADS), "keys": (30, BLOCK_SIZE, DIM)}
    drawn = {
        name: torch.randint(-3, 4, size, generator=rng).float() if whole else torch.randn(size, generator=rng)
        for name, size in sizes.items()
    }
    table = torch.stack([torch.randperm(30, generator=rng)[:blocks] for _ in range(3)]).to(torch.int32)
    requests = torch.arange(rows, dtype=torch.int32) % 3
    return Given(
        drawn["q"].to(torch.bfloat16), drawn["weights"], drawn["keys"].to(torch.bfloat16), table, requests,
        torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def logits_of(g: Given, columns: int, device: str, **options: Any) -> Tensor:
    out = torch.full((len(g.lengths), columns), 7777.0, device=device)
    index_logits(*g.tensors(device), logits=out, **options)
    return out.cpu()


def choice_of(g: Given, topk: int, columns: int, device: str, **options: Any) -> list[list[int]]:
    out = torch.full((len(g.lengths), topk), 7777, dtype=torch.int32, device=device)
    scratch = TopkScratch.allocate(len(g.lengths), columns, topk, device)
    scratch.logits.fill_(torch.nan)
    select(*g.tensors(device), scratch=scratch, out=out, **options)
    return [[int(entry) for entry in row] for row in out.tolist()]


@pytest.mark.parametrize("columns", [1, 64, 90])
def test_logits_are_the_references_and_minus_infinity_behind(columns: int, device: str, rng: torch.Generator) -> None:
    g = given([0, 1, columns // 2, columns], rng)
    found = logits_of(g, columns, device)
    for row, length in enumerate(g.lengths.tolist()):
        want = g.scores(row)
        wrong = (found[row, :length].double() != want).nonzero()
        assert not len(wrong), f"row {row}, entry {wrong[0]}: {found[row, wrong[0]]}, expected {want[wrong[0]]}"
        assert (found[row, length:] == -torch.inf).all()


def test_logits_of_real_numbers_are_close(device: str, rng: torch.Generator) -> None:
    g = given([70, 33], rng, whole=False)
    found = logits_of(g, 90, device)
    for row, length in enumerate(g.lengths.tolist()):
        want = g.scores(row)
        torch.testing.assert_close(found[row, :length].double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_an_entry_without_a_block_has_no_logit_and_is_not_chosen(device: str, rng: torch.Generator) -> None:
    g = given([20, 20, 20], rng)
    g.table[0, 1], g.table[1, 0] = -1, 30
    g = replace(g, requests=torch.tensor([0, 1, 9], dtype=torch.int32))
    found = logits_of(g, 32, device)
    assert torch.isinf(found).sum(1).tolist() == [32 - 12, 32 - 12, 32]
    choice = choice_of(g, 20, 32, device)
    assert [sum(entry >= 0 for entry in row) for row in choice] == [12, 12, 0]
    assert not set(choice[0]) & set(range(8, 16))


@pytest.mark.parametrize("skip_full", [False, True])
def test_the_choice_at_the_edges_of_topk(skip_full: bool, device: str, rng: torch.Generator) -> None:
    topk = 9
    g = given([0, 1, topk - 1, topk, topk + 1, 40, 0], rng)
    for row, (length, choice) in enumerate(
        zip(g.lengths.tolist(), choice_of(g, topk, 48, device, skip_full=skip_full), strict=True)
    ):
        kept = min(length, topk)
        assert choice[kept:] == [-1] * (topk - kept), f"row {row}: tail {choice[kept:]}"
        scores = g.scores(row)
        kth = torch.sort(scores, descending=True).values[kept - 1] if kept else 0.0
        above = set((scores > kth).nonzero().flatten().tolist())
        assert len(set(choice[:kept])) == kept, f"row {row} chose an entry twice"
        assert above <= set(choice[:kept]), f"row {row} misses {above - set(choice[:kept])}"
        assert all(scores[entry] >= kth for entry in choice[:kept]), f"row {row}"
        assert sorted(scores[choice[:kept]].tolist()) == sorted(scores[select_ref(scores, topk)].tolist())
        if skip_full and length <= topk:
            assert choice[:kept] == list(range(length)), f"row {row}"


def test_rows_that_are_skipped_keep_their_logits(device: str, rng: torch.Generator) -> None:
    found = logits_of(given([5, 6], rng), 16, device, skip_up_to=5)
    assert (found[0] == 7777.0).all()
    assert (found[1] != 7777.0).all()


def test_fewer_columns_than_topk(device: str, rng: torch.Generator) -> None:
    (row,) = choice_of(given([6], rng), 10, 7, device)
    assert sorted(row[:6]) == list(range(6))
    assert row[6:] == [-1] * 4


def test_no_rows(device: str, rng: torch.Generator) -> None:
    assert choice_of(given([], rng), 4, 8, device) == []


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", torch.zeros(2, 16, 32), TypeError, r"q: got torch\.float32, expected torch\.bfloat16"),
        ("q", torch.zeros(2, 12, 32).bfloat16(), ValueError, "q: got Hi = 12, expected a power of two from 16 on"),
        ("weights", torch.zeros(2, 8), ValueError, r"weights: got shape \[2, 8\], expected \[2, 16\]"),
        ("keys", torch.zeros(4, 8, 64).bfloat16()[:, :, ::2], ValueError, "keys: got strides"),
        ("lengths", torch.zeros(2, dtype=torch.int64), TypeError, r"lengths: got torch\.int64"),
        ("lengths", torch.zeros(1, dtype=torch.int32), ValueError, r"lengths: got shape \[1\], expected \[2\]"),
    ],
)
def test_a_wrong_argument_is_refused(
    name: str, value: Tensor, error: type[Exception], message: str, rng: torch.Generator
) -> None:
    arguments: dict[str, Any] = {**vars(given([3, 4], rng)), name: value}
    with pytest.raises(error, match=message):
        index_logits(**arguments, logits=torch.zeros(2, 8))


def test_a_scratch_of_another_topk_is_refused(rng: torch.Generator) -> None:
    out, scratch = torch.zeros((2, 5), dtype=torch.int32), TopkScratch.allocate(2, 8, 4)
    with pytest.raises(ValueError, match=r"scratch\.values: got shape \[2, 4\], expected \[2, 5\]"):
        select(*given([3, 4], rng).tensors("cpu"), scratch=scratch, out=out)
