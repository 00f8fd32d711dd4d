"""Experts: the clamp's sides, where the router weight goes, stored formats, independence of tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close, random_weights, tiny
from torch import Tensor

from dsv4ref.formats import mxfp4, ue8m0
from dsv4ref.ref.experts import clamped_swiglu_ref, moe_ref, route_ref, routed_experts_ref, shared_expert_ref
from dsv4ref.ref.numerics import STRUCTURE, Numerics
from dsv4ref.ref.weights import Weights

CONFIG = tiny((0, 0), swiglu_limit=0.7)
DOUBLE = replace(STRUCTURE, dtype=torch.float64)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_weights(CONFIG, 7)


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


def test_the_gate_is_clamped_above_and_the_other_on_both_sides() -> None:
    gate = torch.tensor([-50.0, -3, 3, 50], dtype=torch.float64)
    up = torch.tensor([-50.0, 50, 2, -2], dtype=torch.float64)
    got = clamped_swiglu_ref(gate, up, 10.0)
    want = [silu(-50) * -10, silu(-3) * 10, silu(3) * 2, silu(10) * -2]
    assert got.tolist() == pytest.approx(want, rel=1e-12)
    # A lower clamp on the gate would give silu(-10) = -4.5e-4 where silu(-50) = -1e-20.
    assert abs(got[0].item()) < 1e-15
    assert clamped_swiglu_ref(gate, up, None).tolist() == pytest.approx(
        [silu(g) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)], rel=1e-12
    )


def test_the_whole_part_by_loops(tensors: dict[str, Tensor], rng: torch.Generator) -> None:
    """Router, six experts and the shared one, for a hash layer and a learned one."""
    x = torch.randn((5, CONFIG.hidden_size), generator=rng, dtype=torch.float64)
    token_ids = torch.randint(0, CONFIG.vocab_size, (5,), generator=rng)
    clamped = 0

    def expert(name: str, row: Tensor) -> Tensor:
        nonlocal clamped
        w1, w2, w3 = (tensors[f"{name}.w{i}.weight"].double() for i in (1, 2, 3))
        hidden = []
        for g, u in zip((w1 @ row).tolist(), (w3 @ row).tolist(), strict=True):
            clamped += g > 0.7 or abs(u) > 0.7
            hidden.append(silu(min(g, 0.7)) * max(-0.7, min(u, 0.7)))
        return w2 @ torch.tensor(hidden, dtype=torch.float64)

    for layer, hashed in ((0, True), (1, False)):
        prefix = f"layers.{layer}.ffn"
        got = moe_ref(x, token_ids, Weights(tensors, torch.float64, prefix), hashed, CONFIG, DOUBLE)
        for t in range(5):
            scores = torch.sqrt(torch.log1p(torch.exp(tensors[f"{prefix}.gate.weight"].double() @ x[t])))
            if hashed:
                chosen = tensors[f"{prefix}.gate.tid2eid"][token_ids[t]].tolist()
            else:
                chosen = (scores + tensors[f"{prefix}.gate.bias"]).topk(6).indices.tolist()
            total = sum(scores[e] for e in chosen)
            want = expert(f"{prefix}.shared_experts", x[t])
            for e in chosen:
                want = want + expert(f"{prefix}.experts.{e}", x[t]) * scores[e] / total * CONFIG.router.route_scale
            assert_close(got[t], want, 1e-10, f"layer {layer}, token {t}")
    assert clamped > 100, "the clamp must act"


def test_the_router_weight_before_or_after_w2_is_the_same_but_for_rounding(
    tensors: dict[str, Tensor], rng: torch.Generator
) -> None:
    x = torch.randn((4, CONFIG.hidden_size), generator=rng)
    weights = Weights(tensors, torch.float32, "layers.1.ffn")
    route, experts = route_ref(x, torch.zeros(4, dtype=torch.int64), weights.at("gate"), False, CONFIG)

    def total(numerics: Numerics) -> Tensor:
        return routed_experts_ref(x, route, experts, weights.at("experts"), 0.7, numerics)

    before, after = (replace(STRUCTURE, weight_before_w2=value) for value in (True, False))
    assert_close(total(before), total(after), 1e-5)
    rounded = [total(replace(n, round_bf16=True)) for n in (before, after)]
    assert not torch.equal(*rounded)
    assert_close(rounded[0], rounded[1], 0.05)


def test_the_shared_experts_clamp_is_a_switch(tensors: dict[str, Tensor], rng: torch.Generator) -> None:
    x = torch.randn((4, CONFIG.hidden_size), generator=rng)
    weights = Weights(tensors, torch.float32, "layers.0.ffn.shared_experts")
    clamped = shared_expert_ref(x, weights, 0.7, STRUCTURE)
    free = shared_expert_ref(x, weights, 0.7, replace(STRUCTURE, clamp_shared=False))
    assert_close(free, shared_expert_ref(x, weights, 1e9, STRUCTURE), 0.0)
    assert (clamped - free).abs().max() > 0.1
    # Routed experts clamp whatever the switch says.
    route, experts = torch.full((4, 6), 0.25), torch.arange(6).repeat(4, 1)
    both = [
        routed_experts_ref(x, route, experts, Weights(tensors).at("layers.0.ffn.experts"), 0.7, numerics)
        for numerics in (STRUCTURE, replace(STRUCTURE, clamp_shared=False))
    ]
    assert torch.equal(*both)


def test_a_token_does_not_see_which_others_share_its_experts(tensors: dict[str, Tensor], rng: torch.Generator) -> None:
    x = torch.randn((6, CONFIG.hidden_size), generator=rng)
    weights = Weights(tensors, torch.float32, "layers.1.ffn.experts")
    route = torch.rand((6, 6), generator=rng)
    experts = torch.stack([torch.randperm(16, generator=rng)[:6] for _ in range(6)])
    together = routed_experts_ref(x, route, experts, weights, 0.7, STRUCTURE)
    for t in range(6):
        alone = routed_experts_ref(x[t : t + 1], route[t : t + 1], experts[t : t + 1], weights, 0.7, STRUCTURE)
        assert torch.equal(alone[0], together[t]), t


def test_the_order_of_slots_does_not_matter(tensors: dict[str, Tensor], rng: torch.Generator) -> None:
    x, route = torch.randn((3, CONFIG.hidden_size), generator=rng), torch.rand((3, 6), generator=rng)
    experts = torch.stack([torch.randperm(16, generator=rng)[:6] for _ in range(3)])
    weights = Weights(tensors, torch.float32, "layers.1.ffn.experts")
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    want = routed_experts_ref(x, route, experts, weights, 0.7, STRUCTURE)
    assert torch.equal(routed_experts_ref(x, route[:, order], experts[:, order], weights, 0.7, STRUCTURE), want)


def test_weights_in_the_checkpoints_formats_act_as_their_values(
    tensors: dict[str, Tensor], rng: torch.Generator
) -> None:
    """MXFP4 routed experts and FP8 shared experts give the same bits as their dequantised matrices."""
    stored, plain = dict(tensors), dict(tensors)
    for name in [n for n in tensors if ".experts." in n and n.endswith("weight")]:
        packed, scales = mxfp4.quantise(tensors[name])
        stored[name], stored[name.replace(".weight", ".scale")] = packed.view(torch.int8), scales
        plain[name] = mxfp4.dequantise(packed, scales)
    for name in [n for n in tensors if "shared_experts" in n]:
        scales = torch.full([-(-n // 128) for n in tensors[name].shape], 120, dtype=torch.uint8)
        codes = (tensors[name] / ue8m0.decode(scales)[0, 0]).to(torch.float8_e4m3fn)
        stored[name], stored[name.replace(".weight", ".scale")] = codes, scales.view(torch.float8_e8m0fnu)
        plain[name] = codes.float() * 2.0**-7
    x, ids = torch.randn((3, CONFIG.hidden_size), generator=rng), torch.tensor([0, 5, 9])
    got, want = (
        moe_ref(x, ids, Weights(t, torch.float32, "layers.0.ffn"), True, CONFIG, STRUCTURE) for t in (stored, plain)
    )
    assert torch.equal(got, want)
    original = moe_ref(x, ids, Weights(tensors, torch.float32, "layers.0.ffn"), True, CONFIG, STRUCTURE)
    assert not torch.equal(got, original)


@pytest.mark.parametrize("switch", ["quantise_linear_inputs", "quantise_expert_inputs"])
def test_quantised_inputs_reach_the_experts_they_name(
    switch: str, tensors: dict[str, Tensor], rng: torch.Generator
) -> None:
    x, ids = torch.randn((3, CONFIG.hidden_size), generator=rng), torch.tensor([0, 5, 9])
    quantised = replace(STRUCTURE, **{switch: "fp8"})  # type: ignore[arg-type]
    weights = Weights(tensors, torch.float32, "layers.0.ffn")
    route, experts = route_ref(x, ids, weights.at("gate"), True, CONFIG)

    def parts(numerics: Numerics) -> tuple[Tensor, Tensor]:
        return (
            routed_experts_ref(x, route, experts, weights.at("experts"), 0.7, numerics),
            shared_expert_ref(x, weights.at("shared_experts"), 0.7, numerics),
        )

    routed, shared = (not torch.equal(a, b) for a, b in zip(parts(quantised), parts(STRUCTURE), strict=True))
    assert (routed, shared) == (switch == "quantise_expert_inputs", switch == "quantise_linear_inputs")
    for got, want in zip(parts(quantised), parts(STRUCTURE), strict=True):
        assert_close(got, want, 0.1)
