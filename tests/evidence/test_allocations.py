"""Counting allocations: what counts, what does not, and the methods by name."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.kernels.aiter.lists import pack_lists

CPU: Literal["aten-dispatch"] = "aten-dispatch"


def test_each_new_storage_counts_once() -> None:
    x = torch.ones(8)
    found = count_allocations(lambda: (x * 2) + torch.empty(8), method=CPU)
    assert found.count == 3
    assert [name.split(".")[1] for name in found.operators] == ["mul", "empty", "add"]


def test_views_and_writes_in_place_do_not_count() -> None:
    x, y = torch.ones(8), torch.zeros(8)

    def in_place() -> None:
        y[1:].copy_(x[:-1])
        y.add_(x).mul_(2)
        torch.cumsum(x, 0, out=y)
        x.view(2, 4).t()

    assert count_allocations(in_place, method=CPU).count == 0


def test_what_emulates_a_kernel_does_not_count(device: str) -> None:
    if device != "cpu":
        pytest.skip("kernels are compiled here, nothing emulates them")
    lists, counts = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = torch.zeros_like(lists)
    lengths = torch.ones_like(counts)
    assert count_allocations(lambda: pack_lists(lists, lengths, 9, out=out, counts=counts), method=CPU).count == 0


def test_warmup_calls_are_not_counted() -> None:
    held: list[torch.Tensor] = []

    def once() -> None:
        if not held:
            held.append(torch.ones(3))

    assert count_allocations(once, warmup=0, method=CPU).count == 1
    held.clear()
    assert count_allocations(once, warmup=1, method=CPU).count == 0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup: got -1, expected at least 0"):
        count_allocations(lambda: None, warmup=-1)
    with pytest.raises(ValueError, match="method: got 'cuda', expected one of"):
        count_allocations(lambda: None, method="cuda")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="count_allocations"):
            count_allocations(lambda: None, method="cuda-allocator")


@pytest.mark.gpu
def test_the_allocators_counter_sees_every_tensor() -> None:
    x = torch.ones(8, device="cuda")
    found = count_allocations(lambda: (x * 2) + torch.empty_like(x))
    assert (found.method, found.count) == ("cuda-allocator", 3)
    assert count_allocations(lambda: x.add_(1)).count == 0
