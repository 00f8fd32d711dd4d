"""Chapter 10's own figures: launches and allocations as counted, and what the strict emulation says of planted bugs."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4ref.evidence import timing
from dsv4ref.evidence.allocations import count_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.aiter.emulation import emulated_library, library_for
from dsv4ref.kernels.capture import emulated_capture, emulated_stream
from dsv4ref.optimizations import catalogue, graph_clean_scratch
from dsv4ref.optimizations.graph_clean_scratch import (
    OPTIMIZED_LAUNCHES,
    CachedPlan,
    ScratchInputs,
    _planted,
    _walk,
    placements,
)
from dsv4ref.serving.graphs import EmulatedGraph, FreedMemoryError
from dsv4ref.serving.scratch import Scratch

OPT = catalogue.get("graph_clean_scratch")


def built(case: str, device: str) -> ScratchInputs:
    inputs: ScratchInputs = OPT.make_inputs(OPT.case(case), device, 0)
    return inputs


@pytest.mark.parametrize("case", ["three-calls", "two-keys"])
def test_launches_are_as_predicted(case: str, device: str) -> None:
    counted = {name: count_launches(call) for name, call in OPT.timed(built(case, device)).items()}
    p = OPT.predict(OPT.case(case), "mi355x")
    assert (p.baseline_launches, p.optimized_launches) == (7, 3)
    for name, want in (("baseline", p.baseline_launches), ("optimized", p.optimized_launches)):
        assert counted[name].total == want, counted[name]


def test_allocations_go_from_sixteen_to_none(device: str) -> None:
    calls = OPT.timed(built("three-calls", device))
    assert count_allocations(calls["baseline"]).count == 16
    assert count_allocations(calls["optimized"]).count == 0


class CastTwice(Scratch):
    """The query is cast into a tensor of its own, and copied from there: the same bits at the same addresses."""

    def prepare(self, q: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor, num_slots: int) -> None:
        super().prepare(q, indices, lengths, num_slots)
        self._buffers["q"].copy_(q.to(self.shape.q_dtype))


def test_a_temporary_that_changes_no_bit_turns_the_gate_red(device: str) -> None:
    inputs = built("three-calls", device)
    verdict = OPT.gate.judge(
        _planted(CastTwice)(inputs), baseline=OPT.baseline(inputs), reference=OPT.reference(inputs)
    )
    assert [c.output for c in verdict.comparisons if not c.passed] == ["allocated"], verdict.detail


def test_what_the_hosts_clock_times_prepares_the_same_lists(device: str) -> None:
    inputs = built("three-calls", device)
    scratches: list[Scratch] = []

    class Kept(Scratch):
        def rebuild(self) -> None:
            super().rebuild()
            scratches.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_clean_scratch, "Scratch", Kept)
        calls = graph_clean_scratch._host_timed(inputs)
    assert list(calls) == ["baseline", "optimized", "replayed", "inputs copied, replayed"]
    (scratch,) = scratches
    lists: Any = calls["baseline"]()
    for name in ("replayed", "inputs copied, replayed"):
        for buffer in ("kv_indices", "kv_indptr", "counts"):
            scratch.buffer(buffer).fill_(-7)
        calls[name]()
        for buffer in ("kv_indices", "kv_indptr", "counts"):
            assert torch.equal(scratch.buffer(buffer), lists[buffer]), (name, buffer)


@pytest.mark.gpu
def test_a_replayed_preparation_keeps_the_host_for_less_time_than_an_eager_one() -> None:
    inputs = OPT.make_inputs(OPT.case("flash-tp4-64"), "cuda", 0)
    run = timing.time_host(graph_clean_scratch._host_timed(inputs), baseline="baseline", rounds=100)
    p50 = {name: q.p50_us for name, q in run.quantiles.items()}
    assert p50["replayed"] < p50["optimized"] < p50["baseline"], p50


def test_what_is_timed_has_a_scratch_on_every_stream_that_calls_it(device: str) -> None:
    """As timing does: warm-up and capture on a stream of its own, launches counted on the current one."""
    if device != "cpu":
        pytest.skip("kernels are compiled here; emulated streams are for the CPU")
    call = OPT.timed(built("three-calls", device))["optimized"]
    with emulated_stream(7):
        call()
        assert count_allocations(call).count == 0
        with emulated_capture():
            call()
    with emulated_stream(8), emulated_capture(), pytest.raises(RuntimeError, match="first built under graph capture"):
        call()
    assert count_launches(call).total == sum(OPTIMIZED_LAUNCHES.values())


@pytest.mark.gpu
def test_what_is_timed_is_captured_on_the_stream_that_warmed_it_up() -> None:
    calls = OPT.timed(built("three-calls", "cuda"))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for call in calls.values():
        call()  # on the current stream: a scratch of its own, of no use to the other
        with torch.cuda.stream(side):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        kept: dict[str, Any] = {name: call() for name, call in calls.items()}
    graph.replay()
    lists: Any = calls["baseline"]()
    assert torch.equal(kept["baseline"]["kv_indices"], lists["kv_indices"])


def test_bytes_are_as_predicted_where_they_can_be_added_up(device: str) -> None:
    """The constants that the baseline writes anew, from the tensors themselves."""
    inputs = built("two-keys", device)
    scratch = Scratch(inputs.library, inputs.shape(inputs.steps[0]), device)
    scratch.rebuild()
    names = ("qo_indptr", "kv_last_page_lens", "q_scale", "kv_scale")
    written = sum(scratch.buffer(name).numel() * scratch.buffer(name).element_size() for name in names)
    p = OPT.predict(OPT.case("two-keys"), "cpu")
    assert p.baseline_bytes - p.optimized_bytes == written


def test_the_second_call_of_the_protocol_repeats_the_first_and_the_third_differs(device: str) -> None:
    out = OPT.optimized(built("three-calls", device))["out"].view(3, -1)
    assert torch.equal(out[0], out[1])
    assert (out[0].float() - out[2].float()).abs().max() > 0.1


def test_the_split_case_splits_and_the_holes_case_has_holes(device: str) -> None:
    inputs = built("split", device)
    scratch = Scratch(emulated_library(compute_units=4), inputs.shape(inputs.steps[0]), device)
    scratch.rebuild()
    for step in inputs.steps[:1]:
        scratch.prepare(step.q, step.indices, step.lengths, inputs.slots)
        scratch.replan()
    assert int(scratch.plan.reduce_indptr[-1]) >= 2
    holed = built("holes", "cpu")
    step = holed.steps[0]
    inside = torch.arange(step.indices.shape[1]) < step.lengths[:, None]
    holes = inside & ((step.indices < 0) | (step.indices >= holed.slots))
    assert holes.any(1).all()
    assert (step.indices[~inside] == 2**31 - 1).all(), "behind the lengths lies poison"


def test_the_strict_emulation_names_the_row_of_a_kept_plan(device: str) -> None:
    inputs = built("emulated-three-calls", device)
    inputs = replace(inputs, library=emulated_library(inputs.library.arch, compute_units=4))
    scratch = CachedPlan(inputs.library, inputs.shape(inputs.steps[0]), device)
    scratch.rebuild()
    with pytest.raises(
        ValueError, match="plan: work row 1 reads entries 64 to 66 of batch 1, whose list is 64 to 65 now"
    ):
        list(_walk(inputs, lambda shape: scratch))


def test_a_graph_over_a_scratch_that_was_rebuilt_reads_freed_memory(device: str) -> None:
    if device != "cpu":
        pytest.skip("kernels are compiled here; a real graph would read the memory without a word")
    inputs = built("three-calls", "cpu")
    step = inputs.steps[0]
    scratch = Scratch(inputs.library, inputs.shape(step), "cpu")
    scratch.rebuild()
    graph = EmulatedGraph(lambda: scratch.prepare(step.q, step.indices, step.lengths, inputs.slots))
    graph.replay()
    scratch.rebuild()
    gc.collect()
    with pytest.raises(FreedMemoryError, match=r"operation 0 \(_pack_lists_kernel\) reads torch\.int32"):
        graph.replay()


def test_planted_bugs_run_on_the_emulation_everywhere() -> None:
    for hazard in OPT.hazards.values():
        params = OPT.case(hazard.case).params
        assert params["emulated"], f"{hazard.title}: on the real library this would read out of bounds"


def test_the_cpu_gets_the_emulation_and_says_so() -> None:
    library = library_for("cpu")
    assert library.emulated
    assert "emulation" in library.name


def test_a_graph_follows_unless_the_host_replaces_what_it_reads(device: str) -> None:
    found = {
        (row["buffers"], row["refresh"].split(",")[0]): row["right"] for row in placements(built("three-calls", device))
    }
    assert found == {
        ("one scratch", "in the graph"): True,
        ("one scratch", "by the host"): True,
        ("new each step", "in the graph"): True,
        ("new each step", "by the host"): False,
    }
