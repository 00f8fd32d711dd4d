"""Graphs: an emulated one replays device work on the addresses it was captured with, and nothing of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.kernels.aiter.lists import pack_lists
from dsv4ref.kernels.capture import emulated_stream, is_capturing
from dsv4ref.serving.graphs import Buckets, EmulatedGraph, FreedMemoryError, capture


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.arange(6.0, device=device)


# --- what is true of real and emulated graphs ---


def test_a_replay_reads_what_stands_at_the_captured_addresses(x: Tensor, device: str) -> None:
    buffer = torch.zeros_like(x)

    def step() -> Tensor:
        twice = x * 2
        buffer[1:].copy_(twice[1:])
        buffer[0].fill_(9)
        return twice.sum()

    graph = capture(step, device=device)
    x.add_(1)
    buffer.zero_()
    graph.replay()
    assert graph.outputs.item() == 2 * x.sum().item()
    assert buffer.tolist() == [9, *(2 * x[1:]).tolist()]


def test_what_the_host_decided_is_frozen(x: Tensor, device: str) -> None:
    state = {"factor": 2.0, "rows": 3, "calls": 0}

    def step() -> Tensor:
        state["calls"] += 1
        return x[: int(state["rows"])] * state["factor"]

    graph = capture(step, device=device, warmup=2)
    assert state["calls"] == 3
    state.update(factor=5.0, rows=6)
    x.add_(1)
    graph.replay()
    assert graph.outputs.tolist() == (2 * x[:3]).tolist()
    assert state["calls"] == 3, "a replay runs no host code"


def test_a_replacement_is_not_seen_and_a_write_is(device: str) -> None:
    held = {"x": torch.ones(3, device=device)}
    first = held["x"]
    graph = capture(lambda: held["x"] + 1, device=device)
    held["x"] = torch.full((3,), 5.0, device=device)
    graph.replay()
    assert graph.outputs.tolist() == [2, 2, 2]
    first.fill_(7)
    graph.replay()
    assert graph.outputs.tolist() == [8, 8, 8]


def test_interpreted_and_compiled_kernels_are_replayed(device: str) -> None:
    lists = torch.tensor([[3, -1, 5]], dtype=torch.int32, device=device)
    lengths = torch.tensor([3], dtype=torch.int32, device=device)
    out, counts = torch.zeros_like(lists), torch.zeros_like(lengths)
    graph = capture(lambda: pack_lists(lists, lengths, 9, out=out, counts=counts), device=device)
    lists[0, 1] = 8
    graph.replay()
    assert (out.tolist(), counts.tolist()) == ([[3, 8, 5]], [3])
    lengths.fill_(1)
    graph.replay()
    assert (out.tolist(), counts.tolist()) == ([[3, -1, -1]], [1])


def test_a_graph_keeps_its_own_memory(device: str) -> None:
    def adding(k: int) -> Callable[[], Tensor]:
        return lambda: torch.zeros(4, device=device) + k

    graphs = [capture(adding(k), device=device) for k in (1, 2)]
    for index in (0, 1, 0):
        graphs[index].replay()
    assert [g.outputs.tolist() for g in graphs] == [[1] * 4, [2] * 4]


def test_captures_do_not_nest(device: str) -> None:
    with pytest.raises(RuntimeError, match="already capturing"):
        capture(lambda: capture(lambda: None, device=device), device=device, warmup=0)
    if device == "cpu":
        assert not is_capturing()


def test_a_negative_warmup_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="warmup: got -1, expected at least 0"):
        capture(lambda: None, device=device, warmup=-1)


# --- the emulation ---


@pytest.mark.parametrize(
    ("what", "operator"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.sum() > 3), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 2], "index"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.unique(), "unique"),
        (lambda x: x.index_put_((x > 2,), torch.ones(3)), "index_put"),
    ],
)
def test_work_that_reads_the_device_cannot_be_captured(what: Callable[[Tensor], Any], operator: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"capture: aten\._?{operator.lstrip('_')}.* reads the device from the host"
    ):
        EmulatedGraph(lambda: what(torch.arange(6.0)))
    assert not is_capturing()


def test_numbers_from_the_host_cannot_be_captured() -> None:
    with pytest.raises(RuntimeError, match=r"capture: torch\.tensor copies numbers from the host"):
        EmulatedGraph(lambda: torch.ones(3) * torch.tensor([1.0, 2.0, 3.0]))


PICK, ZERO = torch.tensor([1, 1, 0]), torch.tensor(0.0)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x[PICK],
        lambda x: x.masked_fill_(x > 2, 0.0),
        lambda x: x.clone().index_put_((x > 2,), ZERO),
        lambda x: torch.where(x > 2, x, 0.0).cumsum(0),
        lambda x: torch.searchsorted(x, x + 0.5, right=True),
    ],
)
def test_work_of_static_shape_is_captured_and_replayed(what: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0)
    graph = EmulatedGraph(lambda: what(x))
    x.copy_(torch.tensor([5.0, 5, 6, 1, 2, 2]))
    want = what(x.clone())
    graph.replay()
    assert torch.equal(graph.outputs, want)


class Owner:
    """Holds tensors that a test lets go of."""

    def __init__(self) -> None:
        self.x, self.i = torch.ones(2, 3), torch.tensor([1, 0])

    def free(self) -> None:
        del self.x, self.i


def test_memory_that_was_freed_is_named() -> None:
    owner = Owner()
    graph = EmulatedGraph(lambda: owner.x[1] * 2)
    graph.replay()
    owner.free()
    with pytest.raises(
        FreedMemoryError, match=r"operation 0 \(aten\.mul\.Tensor\) reads torch\.float32 \[3\], which was freed"
    ):
        graph.replay()


def test_garbage_can_be_asked_for_instead() -> None:
    owner = Owner()
    graph = EmulatedGraph(lambda: (owner.x[1] * 2, owner.i + 0), on_freed="garbage")
    graph.replay()
    assert graph.outputs[0].tolist() == [2, 2, 2]
    owner.free()
    graph.replay()
    assert graph.outputs[0].isnan().all()
    assert graph.outputs[1].tolist() == [2**63 - 1] * 2
    with pytest.raises(ValueError, match="on_freed: got 'zero', expected 'raise' or 'garbage'"):
        EmulatedGraph(lambda: None, on_freed="zero")  # type: ignore[arg-type]


def test_a_view_keeps_the_memory_it_views() -> None:
    owner = Owner()
    view = owner.x[1]
    graph = EmulatedGraph(lambda: owner.x * 2)
    owner.free()
    view.fill_(4)
    graph.replay()
    assert graph.outputs.tolist() == [[2, 2, 2], [8, 8, 8]]


def test_replays_belong_to_one_stream(x: Tensor) -> None:
    graph = EmulatedGraph(lambda: x.cpu() + 1)
    graph.replay()
    with (
        emulated_stream(2),
        pytest.raises(RuntimeError, match="replay: on stream 0x2, expected 0x0, the first replay's"),
    ):
        graph.replay()


def test_only_device_work_is_recorded() -> None:
    x, buffer = torch.ones(6), torch.zeros(6)

    def step() -> None:
        torch.empty(3)
        x.view(2, 3).t()[0]
        buffer.copy_(x)

    assert len(EmulatedGraph(step)) == 1


# --- buckets ---


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it(device: str) -> None:
    def of_size(size: int) -> Callable[[], Tensor]:
        zeros = torch.zeros(size, device=device)
        held.append(zeros)
        return lambda: zeros + size

    held: list[Tensor] = []
    buckets = Buckets([8, 2, 4], device=device)
    for size in buckets.sizes:
        buckets.capture(size, of_size(size))
    assert [buckets.size_for(n) for n in (1, 2, 3, 4, 5, 8)] == [2, 2, 4, 4, 8, 8]
    for rows in (3, 1, 8, 2, 4):
        assert buckets.replay(rows).tolist() == [buckets.size_for(rows)] * buckets.size_for(rows)


def test_buckets_refuse_what_they_cannot_hold(device: str) -> None:
    buckets = Buckets([2, 4], device=device)
    buckets.capture(2, lambda: None)
    with pytest.raises(ValueError, match="rows: got 5, expected 1 to 4, the largest bucket"):
        buckets.size_for(5)
    with pytest.raises(ValueError, match="rows: got 0, expected 1 to 4"):
        buckets.replay(0)
    with pytest.raises(ValueError, match="rows: got 3, expected a captured bucket; 4 has not been captured"):
        buckets.replay(3)
    for size in (2, 3):
        with pytest.raises(ValueError, match=rf"size: got {size}, expected one of the uncaptured buckets \[4\]"):
            buckets.capture(size, lambda: None)
    for sizes in ([], [2, 2], [0]):
        with pytest.raises(ValueError, match="sizes: got"):
            Buckets(sizes, device=device)


@pytest.mark.gpu
def test_a_replay_allocates_nothing_on_a_gpu() -> None:
    x = torch.ones(64, device="cuda")
    graph = capture(lambda: (x * 2).cumsum(0) + torch.zeros_like(x), device="cuda")
    found = count_allocations(graph.replay)
    assert (found.method, found.count) == ("cuda-allocator", 0)


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_belong_to_one_stream() -> None:
    x = torch.ones(4, device="cuda")
    graph = capture(lambda: x + 1, device="cuda")
    graph.replay()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(RuntimeError, match="the first replay's"):
        graph.replay()
