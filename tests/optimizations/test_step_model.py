"""The decode step as data: its bytes are the checkpoint's, its FLOPs what the reference multiplies, its caches the
specification's."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dsv4ref.config import C4, C128, SWA, V3_2, V4_FLASH, V4_PRO, V4_TINY, ModelConfig
from dsv4ref.device import get_device
from dsv4ref.evidence.launches import count_launches
from dsv4ref.optimizations import decode_model, step_model
from dsv4ref.optimizations.decode_step import random_model
from dsv4ref.optimizations.step_model import Row, decode_tokens, prefill_tokens
from dsv4ref.optimizations.step_trace import trace
from dsv4ref.ref.census import census
from dsv4ref.ref.model import forward_ref
from dsv4ref.ref.numerics import STRUCTURE, Numerics

TARGETS = ("mi300x", "mi355x", "h200")
MODELS = [V4_FLASH, V4_PRO, V4_TINY]


def named(step: list[Row], stage: str, kind: str | None = None) -> Row:
    (row,) = [row for row in step if row.stage == stage and kind in (None, row.kind)]
    return row


# --- weights: the census ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_step_that_touches_everything_reads_the_checkpoint_to_the_byte(model: ModelConfig) -> None:
    main = sum(spec.nbytes for name, spec in census(model).items() if not name.startswith("mtp."))
    step = step_model.rows(model, decode_tokens(model, 10**7, 1))  # every token, every expert
    assert sum(row.count * row.stored_bytes for row in step) == main
    assert sum(row.count * row.weight_bytes for row in step) == main


def test_what_flash_leaves_out_of_the_published_total_is_its_mtp_block() -> None:
    step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, 1))
    mtp = sum(spec.nbytes for name, spec in census(V4_FLASH).items() if name.startswith("mtp."))
    assert sum(row.count * row.stored_bytes for row in step) == 159_609_485_896 - mtp


def test_every_tensor_outside_mtp_blocks_has_a_stage_and_its_own_layer() -> None:
    for name in census(V4_FLASH):
        if not name.startswith("mtp."):
            stage, layer = step_model.stage_of(name)
            assert stage in step_model.STAGES
            assert (f"layers.{layer}." in name) == (layer is not None)


@pytest.mark.parametrize("name", ["mtp.0.norm.weight", "layers.3.attn.wq_c.weight", "layers.x.attn_norm.weight"])
def test_a_tensor_of_no_stage_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"name: got '{name}', expected a tensor that a stage"):
        step_model.stage_of(name)


def test_one_row_reads_six_experts_and_one_line_of_every_table() -> None:
    step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, 1024))
    experts = named(step, "routed_experts")
    assert experts.weight_bytes == pytest.approx(experts.stored_bytes * 6 / 256)
    assert named(step, "embed").weight_bytes == 2 * 4096
    assert named(step, "router", "hash").weight_bytes == pytest.approx(2 * 256 * 4096 + 6 * 8)


@pytest.mark.parametrize(("rows", "expected"), [(1, 6.0), (2, 11.859375), (64, 199.9), (1024, 256.0)])
def test_distinct_experts_follow_the_formula(rows: int, expected: float) -> None:
    assert step_model.distinct_experts(rows, 6, 256) == pytest.approx(expected, abs=0.05)


def test_distinct_experts_are_what_uniform_routing_touches() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [
        len({e for row in torch.rand(16, 256, generator=rng).argsort(dim=1)[:, :6].tolist() for e in row})
        for _ in range(300)
    ]
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(step_model.distinct_experts(16, 6, 256), abs=1.0), mean


def test_an_expert_parallel_rank_holds_its_share_and_serves_everybodys_rows() -> None:
    tokens = decode_tokens(V4_FLASH, 32, 1024)
    alone, shared = (named(step_model.rows(V4_FLASH, tokens, ep=ep), "routed_experts") for ep in (1, 8))
    assert shared.stored_bytes == alone.stored_bytes / 8
    assert shared.flops == alone.flops  # as many rows come as go
    touched = step_model.distinct_experts(8 * 32, 6, 256) / 256
    assert shared.weight_bytes == pytest.approx(touched * shared.stored_bytes)
    with pytest.raises(ValueError, match="ep: got 3, expected a divisor of the 256 experts"):
        step_model.rows(V4_FLASH, tokens, ep=3)


# --- FLOPs: the reference, counted -----------------------------------------------------------------------------------

STEPS = [(0, 1), (3, 1), (126, 1), (126, 3), (131, 2)]


@pytest.mark.parametrize(("first", "count"), STEPS)
def test_flops_are_what_the_reference_multiplies_stage_by_stage_and_layer_by_layer(first: int, count: int) -> None:
    model = random_model(V4_TINY, 0, STRUCTURE)
    token_ids = torch.arange(first + count) % V4_TINY.vocab_size
    state = forward_ref(model, token_ids[:first])[1] if first else None
    counted: Counter[tuple[str, int | None]] = Counter()
    for operator in trace(lambda: forward_ref(model, token_ids[first:], state)):
        counted[operator.stage, operator.layer] += operator.flops
    expected: Counter[tuple[str, int | None]] = Counter()
    for row in step_model.rows(V4_TINY, prefill_tokens(V4_TINY, count, first)):
        for layer in row.layers or (None,):
            expected[row.stage, layer] += int(row.flops)
    wrong = {key: (counted[key], expected[key]) for key in counted | expected if counted[key] != expected[key]}
    assert not wrong, f"(stage, layer): (counted, expected) {wrong}"


def test_hadamard_is_the_one_product_that_the_model_leaves_out() -> None:
    """As a matrix, 2 * 128^2 per vector; once per indexer query head and once per entry that closes."""
    token_ids = torch.arange(5)
    flops = {}
    for numerics in (STRUCTURE, Numerics()):
        model = random_model(V4_TINY, 0, numerics)
        state = forward_ref(model, token_ids[:2])[1]
        operators = trace(functools.partial(forward_ref, model, token_ids[2:], state))
        flops[numerics] = sum(operator.flops for operator in operators)
    vectors = 3 * V4_TINY.index_n_heads + 1  # positions 2, 3, 4; an entry closes at 3
    assert flops[Numerics()] - flops[STRUCTURE] == V4_TINY.n_c4_layers * vectors * 2 * V4_TINY.index_head_dim**2


def test_the_trace_sees_every_launch_that_the_counter_sees() -> None:
    model = random_model(V4_TINY, 0, STRUCTURE)
    token_ids = torch.arange(4)
    state = forward_ref(model, token_ids[:3])[1]

    def call() -> object:
        return forward_ref(model, token_ids[3:], state)

    operators = trace(call)
    launches = count_launches(call, method="aten-dispatch+interpreter")
    kinds = Counter(operator.kind for operator in operators if operator.kind)
    assert kinds == {"kernel": len(launches.kernels), "copy": len(launches.copies), "fill": len(launches.fills)}
    assert {operator.stage for operator in operators} == set(step_model.STAGES)


def test_tracing_something_else_says_so() -> None:
    with pytest.raises(ValueError, match="call: got mm before any weight was read, expected a forward pass"):
        trace(lambda: torch.ones(2, 2) @ torch.ones(2, 2))


def test_attention_is_the_decode_chapters_arithmetic() -> None:
    params = {"rows": 64, "heads": 64, "swa": 128, "extra": 512}
    row = named(step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 64, 32768)), "attention", "C4")
    assert row.flops == decode_model.decode_flops(params)
    assert row.cache_bytes + row.activation_bytes == decode_model.least_bytes(params)


# --- keys and caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 127, 128, 129, 511, 512, 2047, 2052, 32768, 1 << 20])
@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.name)
def test_keys_are_the_configurations(model: ModelConfig, context: int) -> None:
    tokens = decode_tokens(model, 3, context)
    for layer in range(model.n_layers):
        assert tokens.keys[model.ratio(layer)] == 3 * model.keys_per_query(layer, context)
    assert tokens.scored == 3 * (context // 4)


def test_consecutive_tokens_are_single_ones_summed() -> None:
    together = prefill_tokens(V4_TINY, 7, 125)
    apart = [decode_tokens(V4_TINY, 1, context) for context in range(126, 133)]
    assert together.scored == sum(tokens.scored for tokens in apart)
    assert all(together.keys[r] == sum(tokens.keys[r] for tokens in apart) for r in (SWA, C4, C128))


@pytest.mark.parametrize(("model", "per_token"), [(V4_FLASH, 3850.25), (V4_PRO, 5511.4375), (V3_2, 48068.0)])
def test_a_token_adds_so_many_bytes(model: ModelConfig, per_token: float) -> None:
    assert step_model.cache_growth(model).total == per_token
    span = 1 << 16
    grown = step_model.cache_bytes(model, span + 4096) - step_model.cache_bytes(model, 4096)
    assert grown == span * per_token


def test_a_short_sequence_holds_windows_and_closed_entries() -> None:
    layers = V4_FLASH.n_layers
    assert step_model.cache_bytes(V4_FLASH, 0) == 0
    assert step_model.cache_bytes(V4_FLASH, 3) == layers * 3 * 584
    assert step_model.cache_bytes(V4_FLASH, 4) == layers * 4 * 584 + 21 * (584 + 132)
    assert step_model.cache_bytes(V4_FLASH, 128) == layers * 128 * 584 + 21 * 32 * 716 + 20 * 584


def test_compressor_rows_are_64_16_and_512_kib() -> None:
    fixed = step_model.fixed_bytes(V4_FLASH)
    assert fixed["compressor rows"] == 2**10 * (21 * (64 + 16) + 20 * 512)
    assert fixed["windows"] == 43 * 128 * 584


def test_a_step_writes_what_the_cache_grows_by() -> None:
    """Per row: the window entry and the r-th part of each compressed one."""
    step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, 4096))
    written = named(step, "kv_insert").cache_bytes * 43
    assert written == 43 * 584
    states = {"C4": (8192 + 8192) * 21, "C128": (4096 + 4096) * 20}  # a row written, and what closing reads per token
    entries = sum(
        named(step, "compressor", kind).cache_bytes * n - states[kind] for kind, n in (("C4", 21), ("C128", 20))
    )
    keys = named(step, "index_k").cache_bytes * 21 - (2048 + 2048) * 21
    assert entries + keys == pytest.approx(step_model.cache_growth(V4_FLASH).total)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", TARGETS)
def test_a_stage_is_held_against_the_rate_of_its_format(device: str) -> None:
    spec = get_device(device)
    step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 64, 4096))
    assert spec.fp8_tflops is not None
    assert spec.bf16_tflops is not None
    assert step_model.bound(named(step, "wq_b"), spec).flops_per_s == spec.fp8_tflops * 1e12
    assert step_model.bound(named(step, "wo_a"), spec).flops_per_s == spec.bf16_tflops * 1e12


def test_one_row_takes_less_than_many_and_is_bound_by_memory_everywhere() -> None:
    spec = get_device("mi300x")
    times = []
    for rows in (1, 64, 1024):
        step = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, rows, 32768))
        times.append(step_model.step_bound_us(step, spec))
        if rows == 1:
            assert {step_model.bound(row, spec).side for row in step} == {"memory"}
    assert times == sorted(times)


def test_a_device_without_published_rates_has_no_bound() -> None:
    (row, *_) = step_model.rows(V4_FLASH, decode_tokens(V4_FLASH, 1, 1))
    with pytest.raises(ValueError, match="spec: cpu has no published bandwidth or bf16 matrix rate"):
        step_model.bound(row, get_device("cpu"))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_amounts_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="rows: got 0, expected a positive integer"):
        decode_tokens(V4_FLASH, 0, 5)
    with pytest.raises(ValueError, match="context: got 1048577, expected 1 to 1048576 for v4-flash"):
        decode_tokens(V4_FLASH, 1, (1 << 20) + 1)
    with pytest.raises(ValueError, match=r"tokens: got 2\.5, expected a positive integer"):
        prefill_tokens(V4_FLASH, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first: got 4095, expected 0 to 4094 for v4-tiny"):
        prefill_tokens(V4_TINY, 2, 4095)
    with pytest.raises(ValueError, match="context: got -1, expected 0 or more tokens"):
        step_model.cache_bytes(V4_FLASH, -1)


def test_a_model_without_hash_layers_has_no_such_row() -> None:
    step = step_model.rows(replace(V4_TINY, n_hash_layers=0), decode_tokens(V4_TINY, 1, 1))
    assert [row.kind for row in step if row.stage == "router"] == ["learned"]
