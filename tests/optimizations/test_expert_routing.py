"""Chapter 03 beyond its gate: ranks under torchrun, counted launches, closed forms, and what the pictures rest on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4ref import kernels, settings
from dsv4ref.evidence import records
from dsv4ref.evidence.launches import count_launches
from dsv4ref.optimizations import catalogue, expert_routing, routing_eager, routing_experts, routing_ranks
from dsv4ref.optimizations.base import case_seed
from dsv4ref.optimizations.expert_routing import assignments
from dsv4ref.optimizations.routing_inputs import RoutingInputs, undecided

OPT = catalogue.get("expert_routing")
SEED = settings.get("DSV4REF_SEED")
INTERPRETED = pytest.mark.skipif(kernels.mode() != "interpreted", reason="a GPU each for two ranks, or CPU tensors")


def built(name: str, device: str) -> RoutingInputs:
    inputs: RoutingInputs = OPT.make_inputs(OPT.case(name), device, case_seed(OPT.id, name, SEED))
    return inputs


@INTERPRETED
def test_two_ranks_give_what_one_gives_even_if_one_has_no_token_and_no_slot() -> None:
    found = routing_ranks.run_ranks(2, "tiny-idle-rank", seed=SEED)
    assert found["passed"], found["detail"]
    assert found["backend"] == "gloo"
    assert found["tokens"] == [[4, 2], [6, 0]]
    assert found["slots"] == [[36, 0], [36, 0]]


@pytest.mark.parametrize(
    ("rows", "ranks", "idle", "want"),
    [(40, 2, False, [27, 13]), (40, 2, True, [40, 0]), (1, 4, False, [1, 0, 0, 0]), (0, 2, False, [0, 0])],
)
def test_shares_are_uneven_and_whole(rows: int, ranks: int, idle: bool, want: list[int]) -> None:
    assert routing_ranks.shares(rows, ranks, idle=idle) == want


def test_a_rank_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun replaced by a process that ends at once: what it printed must reach the caller."""
    monkeypatch.setattr(routing_ranks, "_LAUNCHER", ("-c", "import sys; sys.exit('no such thing')"))
    with pytest.raises(RuntimeError, match=r"2 ranks: exit status 1, 0 answers\nno such thing"):
        routing_ranks.run_ranks(2, "tiny", seed=0)


def test_eager_launches_are_counted_and_stay_a_lower_bound_of_the_records() -> None:
    assert {kind: routing_eager.eager_launches(kind) for kind in ("learned", "hash", "grouped", "plan")} == {
        "learned": 9, "hash": 15, "grouped": 15, "plan": 36
    }  # fmt: skip
    with pytest.raises(ValueError, match="kind: got 'random', expected one of"):
        routing_eager.eager_launches("random")
    for record in records.shipped():
        if record.chapter == OPT.id and record.case in OPT.cases and record.variant in ("baseline", "optimized"):
            p = OPT.predict(OPT.case(record.case), record.device)
            assert record.launches is not None
            if record.variant == "optimized":
                assert record.launches == p.optimized_launches, record.case
            else:
                assert record.launches >= p.baseline_launches, record.case


@pytest.mark.parametrize(("case", "kind"), [("tiny", "learned"), ("tiny-padding", "hash"), ("tiny-grouped", "grouped")])
def test_launches_are_as_predicted(case: str, kind: str, device: str) -> None:
    timed = OPT.timed(built(case, device))
    prediction = OPT.predict(OPT.case(case), "h200")
    if kernels.mode() == "interpreted":  # a GPU's profile sees every kernel of a sort
        assert count_launches(timed["eager route"]).total == routing_eager.eager_launches(kind)
        assert count_launches(timed["eager order"]).total == routing_eager.eager_launches("plan")
        assert count_launches(timed["baseline"]).total == prediction.baseline_launches
    warmup = 0 if kernels.mode() == "interpreted" else 2
    assert count_launches(timed["route"], warmup=warmup).total == routing_eager.FUSED_LAUNCHES["route"]
    assert count_launches(timed["order"], warmup=warmup).total == routing_eager.FUSED_LAUNCHES["plan"]
    assert count_launches(timed["optimized"], warmup=warmup).total == prediction.optimized_launches == 4


def test_a_bf16_cast_is_counted(device: str) -> None:
    eager = count_launches(OPT.timed(built("tiny-odd", device))["baseline"]).total
    if kernels.mode() == "interpreted":
        assert eager == OPT.predict(OPT.case("tiny-odd"), "h200").baseline_launches


def test_the_eager_path_gives_the_same_integers_where_nothing_ties(device: str) -> None:
    for case in OPT.cases.values():
        if case.tiny and case.params["content"] != "ties":
            inputs = built(case.name, device)
            eager, want = OPT.baseline(inputs), OPT.reference(inputs)
            for name in ("experts", *expert_routing.PLAN_OUTPUTS):
                assert torch.equal(eager[name].cpu(), want[name]), (case.name, name)


@pytest.mark.parametrize("case", [case.name for case in OPT.cases.values() if case.params["rows"]])
def test_predictions_count_more_than_must_move_and_favour_the_kernels(case: str) -> None:
    p = OPT.predict(OPT.case(case), "mi300x")
    assert p.baseline_bytes > p.optimized_bytes > p.least_bytes > 0
    assert p.ratio is not None
    assert p.ratio > 1


def test_inputs_keep_scores_apart_or_equal() -> None:
    """The same rows with the band closed in on: some must be undecided, or the check sees nothing."""
    inputs = built("tiny-two-blocks", "cpu")
    assert not undecided(inputs.logits, inputs.bias, inputs.router).any()
    logits = inputs.logits.clone()
    best = OPT.reference(inputs)["experts"]
    logits[3, best[3, 1].long()] = torch.nextafter(logits[3, best[3, 0].long()], torch.tensor(-9.0))
    flat = torch.zeros_like(inputs.bias)
    assert undecided(logits, flat, inputs.router)[3]
    grouped = built("tiny-grouped", "cpu")
    assert not undecided(grouped.logits, grouped.bias, grouped.router).any()
    assert not undecided(torch.zeros(1, 32), torch.zeros(32), grouped.router).any()


# --- what the pictures rest on ---


@pytest.fixture(scope="module")
def two_blocks(device: str) -> tuple[RoutingInputs, dict[str, Tensor]]:
    inputs = built("tiny-two-blocks", device)
    return inputs, dict(OPT.optimized(inputs))


def test_a_right_assignment_names_each_chosen_pair_once(two_blocks: tuple[RoutingInputs, dict[str, Tensor]]) -> None:
    inputs, outputs = two_blocks
    want = torch.zeros(40, 72, dtype=torch.int64).scatter_(1, outputs["experts"].cpu().long(), 1)
    assert torch.equal(assignments(inputs, outputs), want)


@pytest.mark.parametrize("hazard", ["mask-as-map", "wrapped-minus-one", "phantom-expert", "sentinel-clamped"])
def test_wrong_assignments_still_have_right_products(hazard: str, device: str) -> None:
    found = expert_routing.damage(hazard, device=device, seed=SEED)
    assert not found.verdict.passed
    assert not torch.equal(found.wrong, found.right)
    assert found.row["products, largest error"] < 1e-12
    assert found.row["output, error"] > 0.01
    assert int(found.row["tokens with a wrong output"].split()[0]) > 0


def test_a_wrong_product_would_show(
    two_blocks: tuple[RoutingInputs, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the check above."""
    inputs, outputs = two_blocks
    right = routing_experts.routed_experts_ref
    monkeypatch.setattr(routing_experts, "routed_experts_ref", lambda *arguments: 1.001 * right(*arguments))
    assert inputs.moe is not None
    assert routing_experts.local_error(inputs.moe, assignments(inputs, outputs)) > 1e-4


def test_loads_add_up_and_skew() -> None:
    even, skewed = (routing_eager.loads(64, 6, 200, skew) for skew in (0.0, 1.5))
    assert even.sum() == skewed.sum() == 1200
    assert skewed.max() > 2 * even.max()
    assert torch.equal(skewed, routing_eager.loads(64, 6, 200, 1.5))
    assert routing_eager.loads(8, 6, 0, 1.0).tolist() == [0] * 8
