"""Equal keys imply equal plans, for the keys that claim it; without host lengths nothing is ever reused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4ref import config
from dsv4ref.kernels.capture import emulated_capture
from dsv4ref.kernels.work_plan import Plan, empty_plan
from dsv4ref.serving.metadata import (
    KEYS,
    CacheStats,
    Key,
    MetadataCache,
    Step,
    kv_indptr_of,
    lengths_key,
    make_step,
    published_key,
    vllm_033_key,
)
from dsv4ref.serving.plan import kv_work, plan_work_ref
from dsv4ref.serving.traces import decode_trace, prefill_trace, serving_trace

TOPK = 8
# Small numbers close to top-k, so that two random steps often clamp to the same lengths.
REQUEST = st.tuples(st.integers(0, 5), st.integers(0, 12))
REQUESTS = st.lists(REQUEST, max_size=4)


def step_of(requests: list[tuple[int, int]], on_host: bool = True) -> Step:
    """(query, context) per request."""
    return make_step([q for q, _ in requests], [q + c for q, c in requests], on_host=on_host)


def lengths_of(step: Step, topk: int = TOPK) -> list[int]:
    return kv_indptr_of(step, topk).diff().tolist()


# --- lengths ---


@given(REQUESTS)
def test_a_token_sees_what_is_before_it_up_to_topk(requests: list[tuple[int, int]]) -> None:
    ramp = [min(context + token + 1, TOPK) for query, context in requests for token in range(query)]
    assert lengths_of(step_of(requests)) == ramp


def test_a_padding_request_has_no_entries() -> None:
    assert lengths_of(make_step([2, 3, 1], [5, 0, 9])) == [4, 5, 0, 0, 0, 8]


def test_lengths_come_from_the_device_and_not_from_the_host() -> None:
    step = make_step([1, 1], [3, 4])
    step.seq_lens[0] = 7
    assert lengths_of(step) == [7, 4]


@pytest.mark.parametrize(
    ("query", "seq", "message"),
    [
        ([1], [1, 2], "seq_lens: got 2 requests, expected 1"),
        ([2, -1], [2, 1], r"query_lens\[1\]: got -1, expected 0 or more"),
        ([2, 3], [2, 2], r"seq_lens\[1\]: got 2, expected at least its 3 query tokens, or 0"),
    ],
)
def test_steps_that_cannot_be_are_refused(query: list[int], seq: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_step(query, seq)


# --- keys ---


def equal_plans(first: Step, second: Step) -> bool:
    if first.tokens != second.tokens:
        return False
    plans = [plan_work_ref(kv_indptr_of(step, TOPK), empty_plan(max(step.tokens, 1), 3)) for step in (first, second)]
    return torch.equal(plans[0].work_info, plans[1].work_info)


@pytest.mark.parametrize("key", [vllm_033_key, lengths_key])
@settings(max_examples=400)
@given(pair=st.tuples(REQUESTS, REQUESTS) | st.lists(REQUEST, min_size=1, max_size=2).map(lambda r: (r, r[::-1])))
def test_equal_keys_imply_equal_plans(key: Key, pair: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    first, second = map(step_of, pair)
    if key(first, TOPK) == key(second, TOPK):
        assert equal_plans(first, second), (lengths_of(first), lengths_of(second))


@settings(max_examples=400)
@given(REQUESTS, REQUESTS)
def test_the_lengths_key_never_misses_an_equal_plan(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    one, other = step_of(first), step_of(second)
    assert (lengths_key(one, TOPK) == lengths_key(other, TOPK)) == (lengths_of(one) == lengths_of(other))


def test_the_published_key_takes_the_second_chunk_for_the_first() -> None:
    """vllm#42982 at its own sizes."""
    topk = config.V3_2.index_topk
    first, second = step_of([(4096, 0)]), step_of([(4096, 4096)])
    assert published_key(first, topk) == published_key(second, topk)
    assert vllm_033_key(first, topk) != vllm_033_key(second, topk)
    assert lengths_key(first, topk) != lengths_key(second, topk)
    work = [kv_work(plan_work_ref(kv_indptr_of(step, topk), empty_plan(4096, 304))) for step in (first, second)]
    assert work == [6_292_480, 8_388_608]


def test_the_mended_key_misses_two_kinds_of_equal_plans() -> None:
    """It tells a context of exactly top-k from one token less, and cares where one request ends and another begins."""
    for first, second in (([(1, TOPK - 1)], [(1, TOPK)]), ([(3, 0)], [(1, 0), (2, 1)])):
        one, other = step_of(first), step_of(second)
        assert lengths_of(one) == lengths_of(other)
        assert lengths_key(one, TOPK) == lengths_key(other, TOPK)
        assert vllm_033_key(one, TOPK) != vllm_033_key(other, TOPK)


@pytest.mark.parametrize("name", KEYS)
def test_no_key_is_made_of_lengths_that_the_host_does_not_have(name: str) -> None:
    assert KEYS[name](step_of([(1, 20)], on_host=False), TOPK) is None


# --- the cache ---


def cache_with(key: Key = lengths_key) -> tuple[MetadataCache, list[int]]:
    """A cache and the total KV work of each plan it made."""
    made: list[int] = []

    def planner(kv_indptr: Tensor, plan: Plan) -> Plan:
        made.append(int(kv_indptr[-1]))
        return plan_work_ref(kv_indptr, plan)

    return MetadataCache(planner, empty_plan(16, 4), TOPK, key), made


def test_an_unchanged_step_is_not_planned_again_and_the_buffers_stay() -> None:
    cache, made = cache_with()
    first = cache.build(step_of([(1, 10), (1, 20)]))
    again = cache.build(step_of([(1, 11), (1, 30)]))
    assert (first.reused, again.reused, made) == (False, True, [2 * TOPK])
    assert again.plan.work_info.data_ptr() == first.plan.work_info.data_ptr()
    assert cache.stats == CacheStats(hits=1, misses=1)
    assert cache.stats.hit_rate == 0.5


def test_a_step_without_host_lengths_is_planned_and_forgotten() -> None:
    """The step after it may look like the one before it, but the buffers hold the plan in between."""
    cache, made = cache_with()
    known = step_of([(1, 3)])
    for step in (known, step_of([(1, 5)], on_host=False), known, known):
        built = cache.build(step)
        assert kv_work(built.plan) == int(built.kv_indptr[-1])
    assert made == [4, 6, 4]
    assert cache.stats == CacheStats(hits=1, misses=3, unkeyed=1)


def test_without_host_lengths_nothing_is_ever_reused() -> None:
    cache, made = cache_with()
    for _ in range(4):
        cache.build(step_of([(1, 20)], on_host=False))
    assert len(made) == 4
    assert cache.stats == CacheStats(hits=0, misses=4, unkeyed=4)
    assert cache.stats.hit_rate == 0


def test_a_planner_that_fails_leaves_no_plan_to_reuse() -> None:
    cache, made = cache_with()
    step = step_of([(1, 20)])
    cache.build(step)
    with pytest.raises(ValueError, match="expected at most 16"):
        cache.build(step_of([(5, 20)] * 4))
    assert not cache.build(step).reused
    assert len(made) == 3


@settings(max_examples=60)
@given(st.lists(st.tuples(REQUESTS.filter(lambda r: sum(q for q, _ in r) <= 16), st.booleans()), max_size=8))
def test_every_step_of_any_trace_has_its_own_plan(steps: list[tuple[list[tuple[int, int]], bool]]) -> None:
    cache, _ = cache_with()
    for requests, on_host in steps:
        built = cache.build(step_of(requests, on_host))
        alone = plan_work_ref(built.kv_indptr, empty_plan(16, 4))
        assert torch.equal(built.plan.work_info, alone.work_info)


def test_building_under_capture_is_refused() -> None:
    cache, _ = cache_with()
    with emulated_capture(), pytest.raises(RuntimeError, match="build: called under graph capture"):
        cache.build(step_of([(1, 3)]))


@pytest.mark.parametrize(
    "make", [lambda: kv_indptr_of(step_of([]), 0), lambda: MetadataCache(plan_work_ref, empty_plan(1, 1), 0)]
)
def test_a_topk_below_one_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="topk: got 0, expected at least 1"):
        make()


# --- traces ---


def test_decode_adds_the_same_tokens_to_every_request() -> None:
    assert [(step.query, step.seq) for step in decode_trace([3, 9], 2, per_step=2)] == [
        ((2, 2), (5, 11)),
        ((2, 2), (7, 13)),
    ]


@pytest.mark.parametrize(("prompt", "chunks"), [(1, [1]), (8, [8]), (9, [8, 1]), (24, [8, 8, 8])])
def test_a_prompt_is_cut_into_chunks_of_the_budget(prompt: int, chunks: list[int]) -> None:
    trace = prefill_trace(prompt, 8)
    assert [step.query for step in trace] == [(chunk,) for chunk in chunks]
    assert trace[-1].seq == (prompt,)


def test_a_server_keeps_its_budget_and_gives_every_request_its_tokens() -> None:
    trace = serving_trace(slots=4, prompt=28, output=9, budget=20, steps=60)
    assert all(sum(step.query) <= 20 for step in trace)
    assert all(query <= seq for step in trace for query, seq in zip(step.query, step.seq, strict=True))
    assert max(seq for step in trace for seq in step.seq) == 28 + 9
    finished = sum(seq == 37 for step in trace for seq in step.seq)
    joined = sum(query == seq for step in trace for query, seq in zip(step.query, step.seq, strict=True))
    assert finished >= 12
    assert abs(finished - joined) <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decode_trace([-1], 2), "contexts: got -1, expected at least 0"),
        (lambda: decode_trace([1], 2, per_step=0), "per_step: got 0, expected at least 1"),
        (lambda: prefill_trace(0, 2), "prompt: got 0, expected at least 1"),
        (lambda: serving_trace(slots=4, prompt=1, output=1, budget=3, steps=1), "budget: got 3, expected at least 4"),
    ],
)
def test_traces_of_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
