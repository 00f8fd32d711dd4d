"""Chapter 19's model, its eager path, and what it claims bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4ref.device import get_device
from dsv4ref.evidence import compare, records
from dsv4ref.evidence.launches import count_launches, operator_kind
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM
from dsv4ref.kernels.sparse_mla import QueryRotation
from dsv4ref.kernels.sparse_mla.rotate import rotate_rows
from dsv4ref.optimizations import catalogue, fused_inverse_rope
from dsv4ref.optimizations.fused_inverse_rope import (
    EAGER_LAUNCHES,
    RotationInputs,
    StepState,
    compiled_without_guards,
    decode,
    eager_bytes,
    eager_rotation,
    finish,
    rotation_bytes,
    rotation_times_us,
    rounded_twice_and_once,
    roundings,
)
from dsv4ref.ref.rope import rotate_back_ref
from dsv4ref.serving.graphs import capture

OPT = catalogue.get("fused_inverse_rope")
SEED = 0
TWO_WAYS = pytest.mark.parametrize("name", ["tiny", "tiny-one-split"])


def inputs_of(name: str, device: str = "cpu") -> RotationInputs:
    built = OPT.make_inputs(OPT.case(name), device, SEED)
    assert isinstance(built, RotationInputs)
    return built


def assert_same(got: Tensor, want: Tensor, why: str = "") -> None:
    found = compare.identical("out", got.contiguous(), want.contiguous())
    assert found.passed, f"{found.detail} {why}"


# --- bit for bit ---


@TWO_WAYS
def test_no_turn_reaches_the_first_448_dims(name: str, device: str) -> None:
    """The same kernel at other positions: whatever it computes, the angle is not in it."""
    inputs = inputs_of(name, device)
    turned, _ = decode(inputs, inputs.rotation)
    nowhere = replace(inputs.rotation, positions=torch.zeros_like(inputs.positions))
    assert_same(turned[..., :NOPE_DIM], decode(inputs, nowhere)[0][..., :NOPE_DIM])


@TWO_WAYS
def test_position_0_is_the_decode_without_rotation(name: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("with and without the rotation are two kernels, compiled apart; the budget holds for both")
    inputs = inputs_of(name, device)
    nowhere = replace(inputs.rotation, positions=torch.zeros_like(inputs.positions))
    assert_same(decode(inputs, nowhere)[0], decode(inputs)[0])


@TWO_WAYS
def test_one_launch_after_is_the_eager_rotation(name: str, device: str) -> None:
    """vllm#45103's own criterion; on a GPU a compiler may contract multiplies and adds."""
    inputs = inputs_of(name, device)
    out, _ = decode(inputs)
    eager, once = eager_rotation(out, inputs.rotation), rotate_rows(out.clone(), inputs.rotation)
    assert_same(once[..., :NOPE_DIM], eager[..., :NOPE_DIM])
    if device == "cpu":
        assert_same(once, eager)
    assert compare.error_norm(once, eager.double()) < 2**-9


def test_the_rotation_commutes_with_the_sum_over_parts() -> None:
    """Why it may stand behind the merge: sum of turned parts and turned sum, in float64."""
    inputs = inputs_of("tiny")
    parts = torch.randn((3, 3, 8, HEAD_DIM), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = sum(rotate_back_ref(part, inputs.positions, inputs.freqs) for part in parts)
    assert isinstance(each, Tensor)
    assert compare.error_norm(each, rotate_back_ref(parts.sum(0), inputs.positions, inputs.freqs)) < 1e-15


# --- roundings ---


@pytest.mark.parametrize("name", ["tiny", "tiny-one-split", "tiny-speculative", "tiny-c128", "tiny-swa-only"])
def test_the_fused_path_is_nearer_to_float64(name: str, device: str) -> None:
    found = roundings(inputs_of(name, device))
    assert found["fused"] < min(found["eager after"], found["one launch after"]), found


def test_one_rounding_less_is_worth_a_root_of_two_where_pairs_turn() -> None:
    """Over many vectors. A pair that hardly turns is rounded to what it was, and gains nothing."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn((2000, 64), generator=rng, dtype=torch.float64)
    fast, slow = torch.ones(32), torch.full((32,), 1e-12)
    positions = torch.randint(0, 1000, (2000,), generator=rng)
    twice, once = rounded_twice_and_once(x, positions, fast)
    assert twice / once == pytest.approx(2**0.5, rel=0.02)
    twice, once = rounded_twice_and_once(x, positions, slow)
    assert twice == pytest.approx(once, rel=1e-6)


# --- what the host knows of turned rows (H09) ---


def test_a_count_read_without_guards_is_the_first_steps_for_ever(device: str) -> None:
    inputs = inputs_of("tiny", device)
    out, tables = decode(inputs)[0], (inputs.positions, inputs.rotation.cos, inputs.rotation.sin)
    compiled = compiled_without_guards()
    for first in (3, 0, 2):
        assert_same(finish(out, StepState(first), *tables)[:first], out[:first])
        assert_same(compiled(out, StepState(first), *tables), out, "traced with all three rows turned")


def test_a_count_on_the_device_is_read_at_every_replay(device: str) -> None:
    inputs = inputs_of("tiny", device)
    out, _ = decode(inputs)
    x, first = out.clone(), torch.tensor([3], dtype=torch.int32, device=device)
    graph = capture(lambda: rotate_rows(x, inputs.rotation, first=first), device=device)
    for count in (0, 2, 3):
        x.copy_(out)
        first.fill_(count)
        graph.replay()
        assert_same(x, torch.cat([out[:count], rotate_rows(out.clone(), inputs.rotation)[count:]]), f"count {count}")


# --- the model ---


@pytest.mark.parametrize("name", ["tiny", "tiny-c128", "tiny-swa-only"])
def test_the_eager_rotation_launches_what_the_model_counts(name: str) -> None:
    inputs = inputs_of(name)
    out, _ = decode(inputs)
    counted = count_launches(lambda: eager_rotation(out, inputs.rotation), method="aten-dispatch+interpreter")
    assert counted.total == EAGER_LAUNCHES, counted


class Traffic(TorchDispatchMode):
    """Bytes of the operators that would launch work: their inputs and outputs, gathers by what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if operator_kind(func, args, kwargs, result) is not None:
            written = nbytes(result)
            if func._schema.name == "aten::index_select":
                self.bytes += 2 * written
            elif func._schema.name == "aten::copy_":  # its destination is written, not read
                self.bytes += written + nbytes(args[1])
            else:
                self.bytes += written + nbytes((args, kwargs))
        return result


def nbytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("name", ["tiny", "tiny-c128"])
def test_the_eager_rotation_moves_what_the_model_counts(name: str) -> None:
    """All but the tables, which are rows of 256 bytes."""
    inputs, params = inputs_of(name), OPT.case(name).params
    out, _ = decode(inputs)
    with Traffic() as traffic:
        eager_rotation(out, inputs.rotation)
    tables = params["rows"] * 128 * (2 * 2 + 4)  # two gathers, and four products that each read one
    assert traffic.bytes - tables == eager_bytes(params)


@pytest.mark.parametrize("device_key", ["mi300x", "mi355x", "h200"])
def test_every_measured_case_gains_less_the_more_rows_there_are(device_key: str) -> None:
    ratios = []
    for rows in (1, 64, 1024):
        prediction = OPT.predict(OPT.case(f"flash-{rows}"), device_key)
        assert prediction.ratio is not None
        assert prediction.baseline_launches - prediction.optimized_launches == EAGER_LAUNCHES
        ratios.append(prediction.ratio)
    assert ratios[0] > ratios[-1] > 1, ratios


def test_each_way_to_rotate_moves_less_than_the_one_before() -> None:
    params, spec = OPT.case("flash-64").params, get_device("mi300x")
    moved, times = rotation_bytes(params), rotation_times_us(params, spec)
    assert list(moved) == list(times) == ["eager", "one launch, whole heads", "one launch, in place", "fused"]
    for found in (list(moved.values()), list(times.values())):
        assert found == sorted(found, reverse=True)
    assert moved["one launch, whole heads"] == 8 * moved["one launch, in place"]
    assert times["fused"] == 0


def test_what_is_timed_turns_what_the_gate_checks(device: str) -> None:
    inputs = inputs_of("tiny", device)
    timed = OPT.timed(inputs)
    assert set(timed) == {"baseline", "optimized", "one launch after", "decode, not rotated"}
    want = OPT.optimized(inputs)["out"]
    fused = timed["optimized"]()
    assert isinstance(fused, tuple)
    assert_same(fused[0], want)
    for name in ("baseline", "one launch after"):
        turned = timed[name]()
        assert isinstance(turned, Tensor)
        assert compare.error_norm(turned, want.double()) < 2**-8, name


# --- cases ---


def test_cases_stand_where_they_say(device: str) -> None:
    near, far = inputs_of("tiny", device).positions, inputs_of("tiny-c128", device).positions
    assert int(near.max()) < 4096
    assert int(far.min()) > 65_536
    pairs = inputs_of("tiny-speculative", device).positions.view(-1, 2)
    assert pairs.diff(dim=1).flatten().tolist() == [1, 1]
    assert inputs_of("tiny-start", device).positions.tolist() == [0, 0]
    swa, compressed = inputs_of("tiny-swa-only", device), inputs_of("tiny", device)
    assert torch.equal(swa.freqs, compressed.other_freqs)
    assert torch.equal(swa.other_freqs, compressed.freqs)
    assert {c.params["rows"] for c in OPT.cases.values() if c.measured} == {1, 8, 64, 128, 256, 1024}


def test_tables_of_bf16_cos_and_sin_pass_the_gate(device: str) -> None:
    """Not a hazard: transformers rounds cos and sin, not positions, and the budget of a bf16 output has room for it."""
    inputs = inputs_of("tiny-c128", device)
    tables = (table.to(torch.bfloat16).float() for table in (inputs.rotation.cos, inputs.rotation.sin))
    out, lse = decode(inputs, QueryRotation(inputs.positions, *tables), return_lse=True)
    assert lse is not None
    verdict = OPT.gate.judge(
        {"out": out, "lse": lse}, baseline={}, reference=OPT.reference(inputs),
        yardstick=fused_inverse_rope._yardstick(inputs),
    )  # fmt: skip
    assert verdict.passed, verdict.detail


def _recorded() -> list[records.Record]:
    return [r for r in records.latest(records.shipped()) if (r.chapter, r.device) == (OPT.id, "h200")]


def test_what_the_rotation_adds_is_the_difference_to_the_decode_alone() -> None:
    times = {(r.case, r.variant): r.p50_us for r in _recorded()}
    rows = fused_inverse_rope.added_rows(OPT, _recorded())
    assert sorted(row["case"] for row in rows) == sorted(n for n, case in OPT.cases.items() if case.measured)
    for row in rows:
        assert tuple(row) == fused_inverse_rope.ADDED
        added = (row["decode"] + row["inside"], row["decode"] + row["one launch"], row["decode"] + row["operators"])
        seen = tuple(times[row["case"], v] for v in ("optimized", "one launch after", "baseline"))
        assert added == pytest.approx(seen), (row["case"], added, seen)


def test_inside_is_dearer_than_a_launch_at_one_shape_only_and_a_dearer_one_would_be_counted() -> None:
    rows = fused_inverse_rope.added_rows(OPT, _recorded())
    assert all(max(row["inside"], row["one launch"]) < row["operators"] for row in rows), rows
    assert all(row["inside"] < row["one launch"] for row in rows if row["splits"] > 1), rows
    dearer = {row["case"] for row in rows if row["inside"] >= row["one launch"]}
    assert dearer == {"pro-1024"}
    by_case = {row["case"]: row for row in rows}
    assert by_case["pro-1024"]["inside"] > 2 * by_case["pro-1024"]["one launch"]
    grown = {
        model: by_case[f"{model}-1024"]["inside"] / by_case[f"{model}-256"]["inside"] for model in ("flash", "pro")
    }
    assert all(factor > 1024 / 256 for factor in grown.values()), grown
    assert all(row["one launch"] > row["model, one launch"] for row in rows), rows
    assert "inside no cheaper than one launch in 1 of 12" in fused_inverse_rope.summary(OPT, _recorded())
    slowed = [
        replace(r, p50_us=r.p80_us + 100, p80_us=r.p80_us + 100)
        if (r.case, r.variant) == ("flash-1", "optimized")
        else r
        for r in _recorded()
    ]
    assert "inside no cheaper than one launch in 2 of 12" in fused_inverse_rope.summary(OPT, slowed)


def test_without_records_nothing_is_said_of_the_rotation() -> None:
    assert fused_inverse_rope.summary(OPT, []) == ""
    assert fused_inverse_rope.added_rows(OPT, [replace(r, device="cpu") for r in _recorded()]) == []
