"""The expert layer: both forms against float64, every row written once, slots that are not local never read."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from expert_inputs import LIMIT, choices, layer64, quantised, worst
from torch import Tensor

from dsv4ref.evidence.gates import poisoned_allocations
from dsv4ref.evidence.launches import count_launches
from dsv4ref.kernels.experts import (
    DispatchPlan,
    ExpertMap,
    ExpertTile,
    Mxfp4Weights,
    allocate_plan,
    allocate_scratch,
    expert_layer,
    plan_dispatch,
)
from dsv4ref.kernels.experts.expert_layer import Form, owned_w2, sum_slots
from dsv4ref.kernels.experts.separate import activate_rows, gather_rows

FORMS: tuple[Form, ...] = ("products", "owned")
TILE = ExpertTile(16, 64, 64, 4)
DEPTH, INNER = 96, 64


class Layer:
    """Experts of hidden width 96 and 64 inner units, and a batch."""

    def __init__(self, experts: Tensor, num_experts: int, rng: torch.Generator, device: str) -> None:
        tokens, top_k = experts.shape
        self.experts = experts
        self.w1 = quantised(num_experts, 2 * INNER, DEPTH, rng, device)
        self.w2 = quantised(num_experts, DEPTH, INNER, rng, device)
        self.x = torch.randn((tokens, DEPTH), generator=rng).to(device, torch.bfloat16)
        self.weights = torch.rand((tokens, top_k), generator=rng).to(device)
        # Nobody may read the weight of a slot that is not local.
        self.weights[(experts < 0) | (experts >= num_experts)] = float("nan")
        self.plan = plan_dispatch(experts.to(device), num_experts, block_m=16)

    def run(self, form: Form, **changes: Any) -> Tensor:
        given: dict[str, Any] = {
            "x": self.x,
            "w1": self.w1,
            "w2": self.w2,
            "route_weights": self.weights,
            "plan": self.plan,
        }
        given |= {"w1_tile": TILE, "w2_tile": TILE if form == "products" else None}
        with poisoned_allocations():
            return expert_layer(**{**given, "limit": LIMIT, "form": form, **changes})

    def want(self) -> Tensor:
        return layer64(self.x, self.w1, self.w2, self.weights, self.experts, LIMIT)


BATCHES = {
    "one token": lambda rng: (choices(1, 4, 3, 0, rng), 4),
    "no token": lambda rng: (choices(0, 4, 3, 0, rng), 4),
    "two blocks, 11 of 17 experts": lambda rng: (choices(17, 11, 2, 6, rng), 11),
    "one expert gets everything": lambda rng: (torch.full((40, 1), 3, dtype=torch.int32), 5),
    "nothing local": lambda rng: (torch.full((3, 2), -1, dtype=torch.int32), 4),
    "ids that are no expert": lambda rng: (torch.tensor([[9, 1], [-7, 0], [2**31 - 1, -1]], dtype=torch.int32), 4),
    "an expert twice in a row": lambda rng: (torch.tensor([[1, 1], [0, 1]], dtype=torch.int32), 2),
    "an expert twice in a row, two tiles": lambda rng: (torch.full((12, 2), 1, dtype=torch.int32), 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_both_forms_are_the_float64_sum(batch: Any, form: Form, rng: torch.Generator, device: str) -> None:
    experts, count = batch(rng)
    layer = Layer(experts, count, rng, device)
    got = layer.run(form)
    assert got.shape == layer.x.shape
    assert worst(got, layer.want(), 0.015) == ""


@pytest.mark.parametrize("form", FORMS)
def test_a_token_without_a_local_expert_gets_zeros(form: Form, rng: torch.Generator, device: str) -> None:
    experts = choices(18, 4, 2, 0, rng)
    experts[[0, 5, 17]] = -1
    layer = Layer(experts, 4, rng, device)
    out = torch.full((18, DEPTH), float("nan"), dtype=torch.bfloat16, device=device)
    assert layer.run(form, out=out) is out
    assert (out[[0, 5, 17]] == 0).all()
    assert worst(out, layer.want(), 0.015) == ""


@pytest.mark.parametrize("form", FORMS)
def test_ranks_add_up_to_one_rank(form: Form, rng: torch.Generator, device: str) -> None:
    experts = choices(7, 6, 3, 0, rng)
    whole = Layer(experts, 6, rng, device)
    total = torch.zeros((7, DEPTH), dtype=torch.float64)
    for rank in range(4):  # 2 + 2 + 1 + 1 experts
        one = ExpertMap.placed(6, rank=rank, ranks=4, placement="linear", device=device)
        owned = one.global_ids().cpu().long()
        plan = plan_dispatch(experts.to(device), expert_map=one, block_m=16)
        w1, w2 = (Mxfp4Weights(w.packed[owned], w.scales[owned]) for w in (whole.w1, whole.w2))
        total += whole.run(form, w1=w1, w2=w2, plan=plan).cpu().double()
    assert worst(total, whole.want(), 0.03) == ""


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bytes_every_time_and_for_a_token_alone(form: Form, rng: torch.Generator, device: str) -> None:
    layer = Layer(choices(20, 5, 3, 2, rng), 5, rng, device)
    got = layer.run(form)
    assert torch.equal(got, layer.run(form))
    alone = plan_dispatch(layer.experts[18:19].to(device), 5, block_m=16)
    one = layer.run(form, x=layer.x[18:19], route_weights=layer.weights[18:19], plan=alone)
    assert torch.equal(one[0], got[18]), "what a token gets must not depend on the batch around it"


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_with_its_token_and_a_broken_expert_with_its_own(
    form: Form, rng: torch.Generator, device: str
) -> None:
    layer = Layer(torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32), 3, rng, device)
    clean = layer.run(form)
    layer.x[1] = float("nan")
    got = layer.run(form)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    layer.w2.scales[1] = 255
    got = layer.run(form)
    assert got[:2].isnan().all()
    assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize(("form", "launches"), [("products", 3), ("owned", 2)])
def test_launches_are_counted(form: Form, launches: int, rng: torch.Generator, device: str) -> None:
    layer = Layer(choices(5, 4, 2, 1, rng), 4, rng, device)
    given = (layer.x, layer.w1, layer.w2, layer.weights, layer.plan)
    assert count_launches(lambda: expert_layer(*given, limit=LIMIT, form=form)).total == launches


@pytest.mark.parametrize("form", FORMS)
def test_static_memory_serves_another_routing(form: Form, rng: torch.Generator, device: str) -> None:
    """What a captured graph does: the same addresses, other experts in them, leftovers of the last batch around."""
    layer = Layer(choices(9, 4, 3, 0, rng), 4, rng, device)
    plan = allocate_plan(9, 3, 4, block_m=16, device=device)
    scratch = allocate_scratch(9, 3, INNER, DEPTH, form=form, device=device)
    out = torch.empty((9, DEPTH), dtype=torch.bfloat16, device=device)
    for absent in (0, 6):
        layer.experts = choices(9, 4, 3, absent, rng)
        layer.plan = plan_dispatch(layer.experts.to(device), 4, block_m=16, out=plan)
        layer.run(form, scratch=scratch, out=out)
        layer.weights = layer.weights.nan_to_num(0.5)
        assert worst(out, layer.want(), 0.015) == "", f"{absent} absent"


# --- the parts ---


def test_the_sum_reads_local_rows_only_and_adds_in_fp32(device: str) -> None:
    """256 + 1 + ... + 1: eight ones vanish one by one in bf16, not in fp32."""
    experts = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, -1]], dtype=torch.int32, device=device)
    plan = plan_dispatch(experts, 9, block_m=16)
    products = torch.ones((10, 1030), dtype=torch.bfloat16, device=device)
    products[0], products[9] = 256.0, float("nan")
    got = sum_slots(products, torch.ones((1, 10), device=device), plan)
    assert (got == 264.0).all()


def test_rows_by_an_index_and_back(rng: torch.Generator, device: str) -> None:
    plan = plan_dispatch(choices(9, 4, 3, 2, rng).to(device), 4, block_m=16)
    rows = torch.randn((27, 1030), generator=rng).to(device, torch.bfloat16)
    there = gather_rows(rows, plan.gather)
    back = gather_rows(there, plan.scatter)
    local = plan.local.flatten() >= 0
    assert torch.equal(back[local], rows[local])
    assert (back[~local] == 0).all()


def test_the_separate_activation_is_the_references(rng: torch.Generator, device: str) -> None:
    rows = (3 * torch.randn((5, 2 * 1030), generator=rng)).to(device, torch.bfloat16)
    gate, up = rows.cpu().double().chunk(2, dim=1)
    for limit in (None, LIMIT):
        clamped = gate.clamp(max=limit) if limit else gate
        want = clamped * torch.sigmoid(clamped) * (up.clamp(-limit, limit) if limit else up)
        assert worst(activate_rows(rows, limit), want, 0.004 * float(want.abs().max())) == ""


# --- bad input ---


def test_bad_arguments_are_named(rng: torch.Generator, device: str) -> None:
    layer = Layer(choices(4, 3, 2, 0, rng), 3, rng, device)

    def refused(kind: type[Exception], message: str, form: Any = "products", **changes: Any) -> None:
        with pytest.raises(kind, match=re.escape(message)):
            layer.run(form, **changes)

    refused(ValueError, "form: got 'fused', expected 'products' or 'owned'", form="fused")
    refused(TypeError, "w1: got tuple, expected a Mxfp4Weights", w1=(layer.w1.packed, layer.w1.scales))
    refused(TypeError, "plan: got dict, expected a DispatchPlan", plan=layer.plan.tensors)
    refused(ValueError, "w2: got 3 experts of [128, 96], expected 3 of [96, 64]", w2=layer.w1)
    refused(TypeError, "route_weights: got torch.bfloat16", route_weights=layer.weights.bfloat16())
    refused(ValueError, "route_weights: got shape [4, 1], expected [4, 2]", route_weights=layer.weights[:, :1])
    refused(ValueError, "x: got shape [3, 96], expected [4, 96]", x=layer.x[:3])
    refused(ValueError, "out: its memory range overlaps x's", out=layer.x)
    narrow = allocate_scratch(4, 2, INNER, DEPTH, form="owned", device=device)
    refused(ValueError, "scratch: has no products", scratch=narrow)
    refused(ValueError, "w2_tile: got 16x64x64 w4 s1, expected None", form="owned", w2_tile=TILE)
    with pytest.raises(ValueError, match="top_k: got 0, expected an integer of at least 1"):
        allocate_scratch(4, 0, INNER, DEPTH)
    with pytest.raises(ValueError, match=r"index: got shape \[4, 2\], expected \[n\]"):
        gather_rows(layer.x, layer.plan.local)
    with pytest.raises(ValueError, match=r"rows: got shape \[4, 95\], expected gate and up"):
        activate_rows(layer.x[:, 1:], None)
    with pytest.raises(ValueError, match=r"hidden: got shape \[4, 96\], expected \[8, 64\]"):
        owned_w2(layer.x, layer.w2, layer.weights, layer.plan)


def test_a_plan_for_other_experts_is_refused(rng: torch.Generator, device: str) -> None:
    layer = Layer(choices(4, 3, 2, 0, rng), 3, rng, device)
    other: DispatchPlan = plan_dispatch(layer.experts.to(device), 5, block_m=16)
    for form in FORMS:
        with pytest.raises(ValueError, match="plan: made for 5 experts, expected 3"):
            layer.run(form, plan=other)
