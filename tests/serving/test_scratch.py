"""The scratch: addresses never change, everything is rewritten every step, and what it cannot serve is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.aiter.adapters import UnsupportedError
from dsv4ref.kernels.aiter.emulation import emulated_library
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.plan import DecodeShape, PlanBuffers
from dsv4ref.kernels.capture import emulated_capture, emulated_stream
from dsv4ref.serving.graphs import capture
from dsv4ref.serving.scratch import Scratch, Scratches, scratch_bytes

FP8 = torch.float8_e4m3fn
SCALE = 512**-0.5
SLOTS = 100


def shape(rows: int = 2, topk: int = 64, **changes: Any) -> DecodeShape:
    return DecodeShape(**{"rows": rows, "heads": 16, "topk": topk, "q_dtype": FP8, "kv_dtype": FP8, **changes})


@pytest.fixture
def library() -> Library:
    return emulated_library(compute_units=4)


@pytest.fixture
def cache(rng: torch.Generator, device: str) -> Tensor:
    return torch.randn(SLOTS, 1, 1, 512, generator=rng).to(FP8).to(device)


class Step:
    """One step's inputs; the entries behind each length are poison."""

    def __init__(self, lengths: list[int], rng: torch.Generator, device: str, *, topk: int = 64) -> None:
        rows = len(lengths)
        self.q = torch.randn(rows, 16, 512, generator=rng).bfloat16().to(device)
        indices = torch.randint(0, SLOTS, (rows, topk), generator=rng, dtype=torch.int32)
        for row, length in enumerate(lengths):
            indices[row, length:] = 2**31 - 1
        self.indices = indices.to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def on(self, scratch: Scratch, cache: Tensor) -> tuple[Tensor, Tensor]:
        scratch.refresh(self.q, self.indices, self.lengths, SLOTS)
        lse = scratch.decode(cache, SCALE, return_lse=True)
        assert lse is not None
        return scratch.out.clone(), lse.clone()

    def expected(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Attention in float64 on the fp8 numbers; rows without a key are 0 and -inf."""
        rows = self.q.shape[0]
        out = torch.zeros(rows, 16, 512, dtype=torch.float64)
        lse = torch.full((rows, 16), -torch.inf, dtype=torch.float64)
        keys, q = cache.cpu()[:, 0, 0].double(), self.q.cpu().to(FP8).double()
        for row in range(rows):
            slots = [s for s in self.indices[row].tolist()[: int(self.lengths[row])] if 0 <= s < SLOTS]
            if slots:
                scores = q[row] @ keys[slots].T * SCALE
                out[row], lse[row] = torch.softmax(scores, -1) @ keys[slots], scores.logsumexp(-1)
        return out, lse


def agrees(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0].cpu().double(), want[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(found[1].cpu().double(), want[1], rtol=1e-6, atol=1e-6)


@pytest.fixture
def built(library: Library, device: str) -> Scratch:
    with poisoned_allocations():
        scratch = Scratch(library, shape(), device)
        scratch.rebuild()
    return scratch


def test_the_three_call_protocol(built: Scratch, cache: Tensor, rng: torch.Generator, device: str) -> None:
    """Lengths [3, 2], the same again, then [4, 1]: the protocol of ROCm/vllm#900."""
    where = built.addresses()
    step = Step([3, 2], rng, device)
    first, again = step.on(built, cache), step.on(built, cache)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    step.lengths.copy_(torch.tensor([4, 1]))
    step.indices[0, 3] = 11
    changed = step.on(built, cache)
    assert not torch.equal(first[0], changed[0])
    assert built.addresses() == where
    agrees(changed, step.expected(cache))


def test_a_random_walk_of_lengths_is_right_at_every_step(
    built: Scratch, cache: Tensor, rng: torch.Generator, device: str
) -> None:
    where = built.addresses()
    for _ in range(6):
        lengths = torch.randint(0, 65, (2,), generator=rng).tolist()
        step = Step(lengths, rng, device)
        agrees(step.on(built, cache), step.expected(cache))
        built.check()
    assert built.addresses() == where


def test_two_keys_interleaved_do_not_disturb_each_other(
    library: Library, cache: Tensor, rng: torch.Generator, device: str
) -> None:
    scratches = Scratches(library, device)
    steps = {rows: Step([40] * rows, rng, device) for rows in (5, 2)}
    alone = {rows: step.on(scratches.at(shape(rows)), cache)[0] for rows, step in steps.items()}
    for rows in (2, 5, 5, 2):
        scratch = scratches.at(shape(rows))
        assert torch.equal(steps[rows].on(scratch, cache)[0], alone[rows])
    ranges = [range(b.data_ptr(), b.data_ptr() + b.numel() * b.element_size())
              for rows in (2, 5) for b in scratches.at(shape(rows)).plan.by_name().values()]  # fmt: skip
    assert not any(set(a) & set(b) for i, a in enumerate(ranges) for b in ranges[i + 1 :])


def test_padding_rows_are_zero_after_a_larger_batch(
    built: Scratch, cache: Tensor, rng: torch.Generator, device: str
) -> None:
    Step([40, 50], rng, device).on(built, cache)
    smaller = Step([7, 0], rng, device)
    out, lse = smaller.on(built, cache)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    agrees((out, lse), smaller.expected(cache))


def test_holes_in_a_list_are_packed_away(built: Scratch, cache: Tensor, rng: torch.Generator, device: str) -> None:
    step = Step([6, 9], rng, device)
    step.indices[0, 2] = -1
    step.indices[1, 0] = SLOTS
    agrees(step.on(built, cache), step.expected(cache))


def test_a_captured_step_follows_lengths_and_slots(
    built: Scratch, cache: Tensor, rng: torch.Generator, device: str
) -> None:
    step = Step([3, 2], rng, device)

    def work() -> Tensor | None:
        built.refresh(step.q, step.indices, step.lengths, SLOTS)
        return built.decode(cache, SCALE, return_lse=True)

    graph, where = capture(work, device=device), built.addresses()
    for lengths in ([60, 1], [0, 33], [3, 2]):
        fresh = Step(lengths, rng, device)
        for name in ("q", "indices", "lengths"):
            getattr(step, name).copy_(getattr(fresh, name))
        graph.replay()
        agrees((built.out, graph.outputs), fresh.expected(cache))
    assert built.addresses() == where


# --- what a step costs ---


def test_preparing_a_step_is_three_launches_and_no_allocation(
    built: Scratch, rng: torch.Generator, device: str
) -> None:
    step = Step([3, 2], rng, device)

    def prepare() -> None:
        built.prepare(step.q, step.indices, step.lengths, SLOTS)

    assert count_launches(prepare).total == 3
    assert count_allocations(prepare).count == 0


@pytest.mark.gpu
def test_a_replayed_step_allocates_nothing_on_a_gpu(built: Scratch, cache: Tensor, rng: torch.Generator) -> None:
    step = Step([40, 2], rng, "cuda")

    def work() -> None:
        built.refresh(step.q, step.indices, step.lengths, SLOTS)
        built.decode(cache, SCALE, return_lse=True)

    graph = capture(work, device="cuda")
    found = count_allocations(graph.replay)
    assert (found.method, found.count) == ("cuda-allocator", 0)


def test_its_bytes_are_known_before_it_is_built(library: Library, device: str) -> None:
    for key in (shape(), shape(7, 128)):
        scratch = Scratch(library, key, device)
        foretold = scratch.nbytes
        assert foretold == scratch_bytes(library, key)
        scratch.rebuild()
        held = [scratch.buffer(name) for name in scratch.addresses()]
        assert foretold == sum(b.numel() * b.element_size() for b in held)
    scratches = Scratches(library, device)
    assert scratches.nbytes == 0
    both = [shape(), shape(7, 128)]
    assert scratches.preallocate(both) == sum(scratch_bytes(library, key) for key in both)
    assert scratches.preallocate(both) == scratches.nbytes, "the second time builds nothing"


def test_a_gpu_without_a_number_is_the_one_whose_tensors_come(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for kept in (Scratch(library, shape(), "cuda"), Scratches(library, "cuda")):
        assert kept.device == torch.device("cuda", 2)


def test_a_preallocated_scratch_is_found_under_capture(library: Library) -> None:
    scratches = Scratches(library, "cpu")
    scratches.preallocate([shape()])
    with emulated_capture():
        assert scratches.at(shape()).addresses()
        with pytest.raises(
            RuntimeError, match=r"scratch: first built under graph capture, expected rebuild\(\) before it"
        ):
            scratches.at(shape(3))


@pytest.fixture
def interpreted(device: str) -> None:
    """Streams are emulated for CPU tensors, which compiled kernels cannot take."""
    if device != "cpu":
        pytest.skip("kernels are compiled here; emulated streams are for the CPU")


# --- what is refused ---


def test_a_plan_of_other_lengths_is_refused_by_its_row(
    built: Scratch, cache: Tensor, rng: torch.Generator, device: str
) -> None:
    """H05: the version that made the plan once, when it allocated."""
    Step([9, 9], rng, device).on(built, cache)
    shorter = Step([9, 5], rng, device)
    built.prepare(shorter.q, shorter.indices, shorter.lengths, SLOTS)  # and no replan
    with pytest.raises(
        ValueError, match="plan: work row 1 reads entries 64 to 73 of batch 1, whose list is 64 to 69 now"
    ):
        built.check()


@pytest.mark.usefixtures("interpreted")
def test_a_scratch_serves_one_stream(library: Library, rng: torch.Generator) -> None:
    scratch = Scratch(library, shape(), "cpu")
    scratch.rebuild()
    step = Step([3, 2], rng, "cpu")
    with emulated_stream(7):
        for call in (
            lambda: scratch.refresh(step.q, step.indices, step.lengths, SLOTS),
            lambda: scratch.prepare(step.q, step.indices, step.lengths, SLOTS),
            scratch.replan,
        ):
            with pytest.raises(RuntimeError, match="used on stream 0x7, expected 0x0, where it was built"):
                call()
        with emulated_capture():  # captured work runs where it is replayed
            scratch.refresh(step.q, step.indices, step.lengths, SLOTS)


@pytest.mark.usefixtures("interpreted")
def test_a_second_stream_builds_its_own(library: Library, cache: Tensor, rng: torch.Generator) -> None:
    a, b = (Scratch(library, shape(), "cpu") for _ in range(2))
    steps = [Step([40, 3], rng, "cpu"), Step([5, 64], rng, "cpu")]
    a.rebuild()
    with emulated_stream(7):
        b.rebuild()
        b.refresh(steps[1].q, steps[1].indices, steps[1].lengths, SLOTS)
    a.refresh(steps[0].q, steps[0].indices, steps[0].lengths, SLOTS)
    with emulated_stream(7):
        b.decode(cache.cpu(), SCALE, return_lse=False)
    a.decode(cache.cpu(), SCALE, return_lse=False)
    for scratch, step in zip((a, b), steps, strict=True):
        torch.testing.assert_close(scratch.out.double(), step.expected(cache)[0], rtol=2**-8, atol=1e-6)


def test_nothing_works_before_rebuild(library: Library, cache: Tensor, rng: torch.Generator) -> None:
    scratch = Scratch(library, shape(), "cpu")
    step = Step([3, 2], rng, "cpu")
    for call in (
        lambda: scratch.refresh(step.q, step.indices, step.lengths, SLOTS),
        lambda: scratch.decode(cache, SCALE, return_lse=False),
        scratch.check,
        scratch.addresses,
    ):
        with pytest.raises(RuntimeError, match=r"scratch: not built, expected rebuild\(\) first"):
            call()


def test_a_decode_needs_a_refresh_of_its_own(built: Scratch, cache: Tensor, rng: torch.Generator, device: str) -> None:
    with pytest.raises(RuntimeError, match="no refresh since the last decode"):
        built.decode(cache, SCALE, return_lse=False)
    Step([3, 2], rng, device).on(built, cache)
    with pytest.raises(RuntimeError, match="no refresh since the last decode"):
        built.decode(cache, SCALE, return_lse=False)


def test_a_plan_is_not_checked_under_capture(built: Scratch) -> None:
    with emulated_capture(), pytest.raises(RuntimeError, match="plan: reading it back needs the host"):
        built.check()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ({"layout": "ragged"}, ValueError, "shape: got layout 'ragged', expected 'fixed'"),
        ({"heads": 24}, UnsupportedError, "no kernel with heads 24"),
        ({"q_dtype": torch.float8_e4m3fnuz}, TypeError, "q_dtype: got torch.float8_e4m3fnuz"),
    ],
)
def test_a_shape_it_cannot_hold_is_refused(
    key: dict[str, Any], error: type[Exception], message: str, library: Library
) -> None:
    with pytest.raises(error, match=message):
        Scratch(library, shape(**key), "cpu")


def test_an_lse_that_the_architecture_has_not_is_refused(rng: torch.Generator, device: str) -> None:
    fnuz = torch.float8_e4m3fnuz
    scratch = Scratch(emulated_library("gfx942", compute_units=4), shape(q_dtype=fnuz, kv_dtype=fnuz), device)
    scratch.rebuild()
    step = Step([3, 2], rng, device)
    cache = torch.randn(SLOTS, 1, 1, 512, generator=rng).to(fnuz).to(device)
    scratch.refresh(step.q, step.indices, step.lengths, SLOTS)
    with pytest.raises(UnsupportedError, match="no LSE for 16 heads"):
        scratch.decode(cache, SCALE, return_lse=True)


def test_wrong_inputs_are_refused_by_name(built: Scratch, rng: torch.Generator, device: str) -> None:
    step = Step([3, 2], rng, device)
    with pytest.raises(TypeError, match=r"q: got torch\.float32, expected torch\.bfloat16"):
        built.refresh(step.q.float(), step.indices, step.lengths, SLOTS)
    with pytest.raises(ValueError, match=r"indices: got shape \[2, 32\], expected \[2, 64\]"):
        built.refresh(step.q, step.indices[:, :32], step.lengths, SLOTS)
    with pytest.raises(TypeError, match=r"lengths: got torch\.int64, expected torch\.int32"):
        built.refresh(step.q, step.indices, step.lengths.long(), SLOTS)
    with pytest.raises(ValueError, match="name: got 'lse', expected one of"):
        built.buffer("lse")


def test_the_plan_is_the_six_buffers_by_name(built: Scratch) -> None:
    for name in PlanBuffers.__dataclass_fields__:
        assert getattr(built.plan, name).data_ptr() == built.addresses()[name]
