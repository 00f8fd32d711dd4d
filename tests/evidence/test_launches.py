"""Counting launches: operators and interpreted kernels on the CPU, profiles as data, and a real profile on a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from dsv4ref.evidence.launches import Launches, Method, between_sentinels, by_kind, count_launches, device_events

CPU: Method = "aten-dispatch+interpreter"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.profiler needs a GPU to see kernels")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")


def _increment(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, offsets < count) + 1, offsets < count)


_increment_kernel = InterpretedFunction(_increment)


def increment(source: torch.Tensor, target: torch.Tensor, blocks: int | None = None) -> None:
    count = source.numel()
    grid = (lambda meta: (triton.cdiv(count, meta["BLOCK"]),)) if blocks is None else (blocks,)
    _increment_kernel[grid](source, target, count, BLOCK=16)


def counted(fn: Callable[[], object]) -> Launches:
    return count_launches(fn, warmup=0, method=CPU)


x = torch.arange(16, dtype=torch.float32).reshape(4, 4)
NOTHING: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("fn", "kernels", "copies", "fills"),
    [
        (
            lambda: (x.t(), x[1:, ::2], x.view(16), x.split(2), x.detach(), x.view(torch.int32)),
            NOTHING,
            NOTHING,
            NOTHING,
        ),
        (lambda: (torch.empty(3), torch.empty_like(x), x.new_empty(2)), NOTHING, NOTHING, NOTHING),
        (
            lambda: (torch.empty(3).resize_(5), torch.empty(0).set_(x.untyped_storage()), x.clone().t_()),
            NOTHING,
            ("aten.clone",),
            NOTHING,
        ),
        (lambda: (x.size(), x.is_contiguous(), x.data_ptr()), NOTHING, NOTHING, NOTHING),
        (lambda: (x.to(torch.float32), x.float(), x.contiguous(), x.reshape(-1)), NOTHING, NOTHING, NOTHING),
        (lambda: x.to(torch.float32, copy=True), NOTHING, ("aten._to_copy",), NOTHING),
        (lambda: x.bfloat16(), NOTHING, ("aten._to_copy",), NOTHING),
        (lambda: torch.empty(4, 4).copy_(x), NOTHING, ("aten.copy_",), NOTHING),
        (lambda: x.t().reshape(-1), NOTHING, ("aten.clone",), NOTHING),
        (lambda: x[0, 0].item(), NOTHING, ("aten._local_scalar_dense",), NOTHING),
        (lambda: bool(x.any()), ("aten.any",), ("aten._local_scalar_dense",), NOTHING),
        (lambda: (torch.zeros(3), x.new_full((2,), 1.0)), NOTHING, NOTHING, ("aten.zeros", "aten.new_full")),
        (lambda: (torch.empty(3).zero_(), torch.empty(3).fill_(2)), NOTHING, NOTHING, ("aten.zero_", "aten.fill_")),
        (lambda: torch.nn.functional.linear(x, x, x[0]), ("aten.addmm",), NOTHING, NOTHING),
        (lambda: torch.equal(x, x), ("aten.equal",), NOTHING, NOTHING),
        (lambda: torch.cumsum(x, 0, out=torch.empty(4, 4)), ("aten.cumsum",), NOTHING, NOTHING),
        (lambda: torch._foreach_mul([x, x], 2), ("aten._foreach_mul",), NOTHING, NOTHING),
        (lambda: (torch.empty(0).zero_(), x[:0] + 1, torch.empty(4)[4:].fill_(1)), NOTHING, NOTHING, NOTHING),
        (lambda: x[:0].sum(), ("aten.sum",), NOTHING, NOTHING),
        (lambda: torch.zeros(4, device="meta") + 1, ("aten.add",), NOTHING, ("aten.zeros",)),
    ],
)
def test_operators_count_by_what_they_would_launch(
    fn: Callable[[], object], kernels: tuple[str, ...], copies: tuple[str, ...], fills: tuple[str, ...]
) -> None:
    assert counted(fn) == Launches(CPU, kernels, copies, fills)


def test_total_is_the_sum_over_kinds() -> None:
    launches = counted(lambda: (x + 1, x.clone(), torch.zeros(2), x * 2))
    assert (len(launches.kernels), len(launches.copies), len(launches.fills), launches.total) == (2, 1, 1, 4)


def test_interpreted_kernel_counts_once_by_name_without_the_operators_that_emulate_it() -> None:
    target = torch.zeros(40)
    launches = counted(lambda: increment(torch.arange(40.0), target))
    assert launches == Launches(CPU, ("aten.arange", "_increment"), (), ())
    expected = torch.arange(40.0) + 1
    assert torch.equal(target, expected), f"at {int((target != expected).nonzero()[0])}: the kernel did not run"


def test_kernels_and_operators_are_listed_in_their_order() -> None:
    target = torch.zeros(16)

    def fn() -> None:
        increment(x.view(16), target, blocks=1)
        target.mul_(2)
        increment(target, target, blocks=1)

    assert counted(fn).kernels == ("_increment", "aten.mul_", "_increment")


def test_empty_grid_launches_nothing() -> None:
    assert counted(lambda: increment(x.view(16), torch.empty(16), blocks=0)).total == 0
    assert counted(lambda: increment(torch.empty(0), torch.empty(0))).total == 0


def test_counting_leaves_no_trace_even_after_an_error() -> None:
    before = GridExecutor.__call__

    def fails() -> None:
        increment(x.view(16), torch.empty(16), blocks=1)
        raise KeyError("from fn")

    with pytest.raises(KeyError, match="from fn"):
        counted(fails)
    assert GridExecutor.__call__ is before
    assert counted(lambda: x + 1).kernels == ("aten.add",)


def test_custom_operator_counts_by_its_kernels_or_as_one() -> None:
    library = torch.library.Library("dsv4ref_test_launches", "DEF")
    library.define("plain(Tensor x) -> Tensor")
    library.define("kernel(Tensor x) -> Tensor")

    def kernel(source: torch.Tensor) -> torch.Tensor:
        target = torch.empty_like(source)
        increment(source, target, blocks=1)
        increment(target, target, blocks=1)
        return target

    library.impl("plain", lambda source: source * 2 + 1, "CPU")
    library.impl("kernel", kernel, "CPU")
    operators = torch.ops.dsv4ref_test_launches
    flat = x.view(16)
    assert counted(lambda: operators.plain(flat)).kernels == ("dsv4ref_test_launches.plain",)
    assert counted(lambda: operators.kernel(flat)).kernels == ("_increment", "_increment")


def test_warm_up_runs_first_and_is_not_counted() -> None:
    cache: dict[str, torch.Tensor] = {}
    runs: list[int] = []

    def fn() -> torch.Tensor:
        runs.append(1)
        if "weight" not in cache:
            cache["weight"] = x.bfloat16().float()
        return cache["weight"] + 1

    assert count_launches(fn, method=CPU) == Launches(CPU, ("aten.add",), (), ())
    assert len(runs) == 3
    cache.clear()
    assert counted(fn).total == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup": -1}, "warmup: got -1"), ({"method": "guess"}, "method: got 'guess', expected one of")],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_launches(lambda: None, **options)


@needs_no_gpu
def test_without_a_gpu_the_default_is_dispatch_and_the_profiler_says_what_it_needs() -> None:
    assert count_launches(lambda: x + 1, warmup=0).method == CPU
    with pytest.raises(RuntimeError, match=r"count_launches.*expected a CUDA or ROCm GPU"):
        count_launches(lambda: x + 1, method="cuda-profiler")


# ---- profiles as data ----


def event(category: str, name: str, ts: float, ph: str = "X") -> dict[str, Any]:
    return {"ph": ph, "cat": category, "name": name, "ts": ts, "dur": 1, "pid": 0, "tid": 7}


def test_trace_gives_device_activity_in_time_order() -> None:
    trace = {
        "traceEvents": [
            event("cuda_runtime", "cudaLaunchKernel", 0),
            event("kernel", "second", 20),
            event("kernel", "first", 10),
            event("ac2g", "ac2g", 10, ph="s"),
            event("kernel", "an arrow to a kernel", 10, ph="f"),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 30),
            event("gpu_memset", "Memset (Device)", 15),
            event("gpu_user_annotation", "ProfilerStep#1", 5),
            {"ph": "M", "name": "process_name", "pid": 0},
        ]
    }
    events = device_events(json.loads(json.dumps(trace)))
    assert events == [
        ("kernel", "first"),
        ("fill", "Memset (Device)"),
        ("kernel", "second"),
        ("copy", "Memcpy DtoD (Device -> Device)"),
    ]
    assert by_kind(events) == (("first", "second"), ("Memcpy DtoD (Device -> Device)",), ("Memset (Device)",))


def test_hip_copies_and_sets_done_by_kernels_are_no_kernels_of_the_call() -> None:
    trace = {
        "traceEvents": [
            event("kernel", "__amd_rocclr_fillBufferAligned.kd", 1),
            event("kernel", "__amd_rocclr_copyBuffer.kd", 2),
            event("kernel", "_decode_kernel", 3),
        ]
    }
    assert [kind for kind, _ in device_events(trace)] == ["fill", "copy", "kernel"]


S = ("kernel", "sentinel")
K = ("kernel", "work")
C = ("copy", "Memcpy")


@pytest.mark.parametrize(
    ("events", "between"),
    [
        ([S, S, S, K, C, S], [K, C]),
        ([S, K, C, S], [K, C]),  # a lost prefix of sentinels loses nothing of the call
        ([S, S, S, S, K, S], [S, K]),  # the call itself begins with a kernel of that name
        ([S, S, S, S], []),
        ([S, S, S, C, S], [C]),
        ([K, C, S], None),  # all sentinels lost: part of the call may be lost too
        ([C, S], None),
        ([S], None),
        ([], None),
        ([S, S, S, K], None),  # the end is missing
    ],
)
def test_sentinels_prove_that_a_profile_holds_the_whole_call(events: list, between: list | None) -> None:
    assert between_sentinels(events, 3) == between


# ---- on a GPU ----


@pytest.mark.gpu
@needs_gpu
def test_profile_counts_kernels_and_copies_by_name() -> None:
    source = torch.randn(1 << 16, device="cuda")
    first, second, third = (torch.empty_like(source) for _ in range(3))

    def fn() -> None:
        torch.neg(source, out=first)
        torch.add(first, 1, out=second)
        third.copy_(second)

    launches = count_launches(fn)
    assert launches.method == "cuda-profiler"
    assert (len(launches.kernels), len(launches.copies), len(launches.fills)) == (2, 1, 0), launches
    assert "neg" in launches.kernels[0], launches
    assert count_launches(lambda: source.view(-1)).total == 0


@pytest.mark.gpu
@needs_gpu
def test_profile_sees_the_kernels_inside_a_replayed_graph() -> None:
    source = torch.randn(1 << 16, device="cuda")
    target = torch.empty_like(source)
    torch.neg(source, out=target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            torch.neg(source, out=target)
    assert len(count_launches(graph.replay).kernels) == 5


@pytest.mark.gpu
@needs_gpu
@compiles
def test_profile_names_compiled_triton_kernels() -> None:
    kernel = triton.jit(_increment)
    source = torch.randn(64, device="cuda")
    target = torch.empty_like(source)
    launches = count_launches(lambda: kernel[(4,)](source, target, 64, BLOCK=16))
    assert launches.kernels == ("_increment",), launches
    assert torch.equal(target, source + 1)


@pytest.mark.gpu
@needs_gpu
def test_dispatch_method_refuses_gpu_tensors() -> None:
    source = torch.zeros(4, device="cuda")
    with pytest.raises(ValueError, match="touches a tensor on cuda:0, expected CPU tensors"):
        count_launches(lambda: source + 1, warmup=0, method=CPU)
