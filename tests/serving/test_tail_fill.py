"""What may be seen of tail-filled buffers is what whole-buffer fills would leave; the gap is all that differs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.launches import Launches, count_launches
from dsv4ref.kernels.capture import emulated_capture
from dsv4ref.serving.tail_fill import TailFilled

MAX_TOKENS, TOPK = 10, 4
STEP = st.lists(st.integers(0, TOPK), max_size=MAX_TOKENS)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(buffers: TailFilled, lengths: list[int], mark: int) -> None:
    """One step whose request ids and indices are all `mark`."""
    buffers.prepare(len(lengths))
    buffers.write(ints([mark] * len(lengths)), ints(lengths))
    buffers.indices[: sum(lengths)] = mark


def wrong(buffers: TailFilled, lengths: list[int], mark: int) -> list[str]:
    """Every observable element that is not what buffers filled with zeros would hold."""
    tokens, total = len(lengths), sum(lengths)
    ends = [sum(lengths[:token]) for token in range(tokens + 1)]
    expected: dict[str, list[int | None]] = {
        "req_id": [*[mark] * tokens, *[0] * (MAX_TOKENS - tokens)],
        "indptr": [*ends, *[total] * (MAX_TOKENS - tokens)],
        "indices": [*[mark] * total, *[None] * (tokens * TOPK - total), *[0] * ((MAX_TOKENS - tokens) * TOPK)],
    }
    return [
        f"{name}[{at}]: {got}, expected {want}"
        for name, values in expected.items()
        for at, (got, want) in enumerate(zip(getattr(buffers, name).tolist(), values, strict=True))
        if want is not None and got != want
    ]


@settings(max_examples=200)
@given(st.lists(STEP, min_size=1, max_size=8))
def test_after_any_sequence_only_the_gap_differs_from_full_fills(steps: list[list[int]]) -> None:
    with poisoned_allocations():
        buffers = TailFilled(MAX_TOKENS, TOPK)
    for mark, lengths in enumerate(steps, start=1):
        run(buffers, lengths, mark)
        assert wrong(buffers, lengths, mark) == []


def test_eight_then_three_then_six() -> None:
    with poisoned_allocations():
        buffers = TailFilled(MAX_TOKENS, TOPK)
    for mark, tokens in enumerate((8, 3, 6), start=1):
        run(buffers, [2] * tokens, mark)
        assert wrong(buffers, [2] * tokens, mark) == []


def test_the_gap_keeps_an_earlier_step() -> None:
    """A statement about the buffers, not a wish: whoever reads here reads another step's indices."""
    buffers = TailFilled(MAX_TOKENS, TOPK)
    run(buffers, [4, 4, 4], 1)
    run(buffers, [1, 1, 1], 2)
    assert buffers.indices.tolist()[:12] == [2] * 3 + [1] * 9
    assert set(buffers.indices.tolist()[12:]) == {0}


def launched(buffers: TailFilled, before: int, tokens: int) -> Launches:
    def step() -> None:
        buffers.prepare(tokens)
        buffers.write(ints([1] * tokens), ints([2] * tokens))

    run(buffers, [1] * before, 1)
    # Tensors come from the host here: their making launches nothing.
    return count_launches(step, warmup=0, method="aten-dispatch+interpreter")


@pytest.mark.parametrize(("before", "tokens", "fills"), [(3, 3, 1), (3, 5, 1), (5, 3, 3), (5, 0, 3)])
def test_a_step_fills_two_tails_when_it_shrinks_and_none_otherwise(before: int, tokens: int, fills: int) -> None:
    """One further fill is `write`'s: it flattens the rest of indptr."""
    assert len(launched(TailFilled(MAX_TOKENS, TOPK), before, tokens).fills) == fills


def test_buffers_keep_their_addresses_and_their_size_is_known() -> None:
    buffers = TailFilled(MAX_TOKENS, TOPK)
    names = ("req_id", "indices", "indptr")
    before = [getattr(buffers, name).data_ptr() for name in names]
    for mark, tokens in enumerate((8, 0, 10), start=1):
        run(buffers, [1] * tokens, mark)
    assert [getattr(buffers, name).data_ptr() for name in names] == before
    assert buffers.nbytes == 4 * (MAX_TOKENS + MAX_TOKENS * TOPK + MAX_TOKENS + 1)


@pytest.mark.parametrize(
    ("tokens", "topk", "message"), [(0, 4, "max_tokens: got 0, expected at least 1"), (4, -1, "topk: got -1")]
)
def test_buffers_of_nothing_are_refused(tokens: int, topk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TailFilled(tokens, topk)


@pytest.mark.parametrize("tokens", [-1, MAX_TOKENS + 1])
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(tokens: int) -> None:
    buffers = TailFilled(MAX_TOKENS, TOPK)
    run(buffers, [2] * 5, 1)
    with pytest.raises(ValueError, match=f"tokens: got {tokens}, expected 0 to {MAX_TOKENS}"):
        buffers.prepare(tokens)
    assert wrong(buffers, [2] * 5, 1) == []
    run(buffers, [2] * 3, 2)
    assert wrong(buffers, [2] * 3, 2) == []


@pytest.mark.parametrize(
    ("req_id", "lengths", "message"),
    [
        (ints([1, 1]), ints([1, 1, 1]), r"req_id: got shape \[2\], expected \[3\]"),
        (ints([1, 1, 1]), ints([1]), r"lengths: got shape \[1\], expected \[3\]"),
        (torch.zeros(3, dtype=torch.int64), ints([1, 1, 1]), "req_id: got torch.int64, expected torch.int32"),
    ],
)
def test_writing_another_step_than_was_prepared_is_refused(req_id: Tensor, lengths: Tensor, message: str) -> None:
    buffers = TailFilled(MAX_TOKENS, TOPK)
    buffers.prepare(3)
    with pytest.raises((TypeError, ValueError), match=message):
        buffers.write(req_id, lengths)


def test_preparing_under_capture_is_refused() -> None:
    with emulated_capture(), pytest.raises(RuntimeError, match="prepare: called under graph capture"):
        TailFilled(MAX_TOKENS, TOPK).prepare(3)
