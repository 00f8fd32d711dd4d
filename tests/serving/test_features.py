"""Features: what refines what, what a model cannot turn on, and that every switch changes what is launched."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_runs import in_mxfp4, slice_model
from torch import Tensor

from dsv4ref import diagnostics
from dsv4ref.accuracy.score import load_model
from dsv4ref.evidence.launches import Launches, count_launches
from dsv4ref.formats import kv_cache
from dsv4ref.formats.scope import Scope, ragged
from dsv4ref.kernels.sparse_mla.launch import STATIC
from dsv4ref.optimizations import catalogue
from dsv4ref.ref.numerics import DEEPSEEK, DEFAULT, STRUCTURE
from dsv4ref.serving.features import Features, available, check_available, unavailable
from dsv4ref.serving.operations import Operations, compose
from dsv4ref.serving.tail_fill import TailFilled

SPARSE = Features(sparse_decode=True)
ROWS = 3


@pytest.fixture(scope="module")
def attention(device: str) -> tuple[Tensor, Scope, Tensor, Tensor]:
    """Queries, one scope, sink and output rows of three decode rows."""
    rng = torch.Generator().manual_seed(5)
    cache = kv_cache.allocate(2, 16, "e4m3fn", device=device)
    kv_cache.insert(cache, torch.arange(32, device=device), torch.randn(32, 512, generator=rng).to(device))
    scope = Scope(cache, *ragged([[3, 1], [17], [30, 2, 5]], device), 24)
    out = torch.full((ROWS, 4, 512), torch.nan, dtype=torch.bfloat16, device=device)
    return torch.randn(ROWS, 4, 512, generator=rng).bfloat16().float(), scope, torch.randn(4, generator=rng), out


def launches(operations: Operations, given: tuple[Tensor, Scope, Tensor, Tensor]) -> Launches:
    q, scope, sink, out = given
    return count_launches(lambda: operations.attend(q, scope, None, sink, out), warmup=0)


def test_every_switch_names_a_chapter_that_exists() -> None:
    for item in fields(Features):
        assert item.metadata["chapter"] in catalogue.load(), item.name


def test_a_refinement_needs_what_it_refines() -> None:
    for name in ("launch_shape", "output_passthrough"):
        with pytest.raises(ValueError, match=f"{name}: got True, expected False without sparse_decode"):
            Features(**{name: True})
    with pytest.raises(TypeError, match="sparse_decode: got 1, expected True or False"):
        Features(sparse_decode=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="captured_steps: got True, expected False without device_step"):
        Features(captured_steps=True)
    for missing in ("sparse_decode", "routing_kernels", "resident_weights"):
        needed = {"sparse_decode": True, "routing_kernels": True, "resident_weights": True, missing: False}
        with pytest.raises(ValueError, match=f"device_step: got True, expected False without {missing}"):
            Features(device_step=True, **needed)


def test_a_model_without_fp8_projection_says_so_and_everything_else_is_available() -> None:
    model = load_model()
    assert set(unavailable(model)) == {"cached_projection", "grouped_experts"}
    assert {name for name, on in available(model).switches().items() if not on} == set(unavailable(model))
    with pytest.raises(ValueError, match=r"cached_projection=True, .*layers.0.attn.wo_a.weight is stored in torch.bf"):
        check_available(model, Features(cached_projection=True))
    with pytest.raises(TypeError, match="features: got dict, expected a Features"):
        check_available(model, {})  # type: ignore[arg-type]


def test_formats_that_kernels_do_not_compute_in_are_refused() -> None:
    model = in_mxfp4(slice_model((0,)))
    assert not unavailable(model)
    steps = {"device_step", "full_window_skip", "captured_steps"}
    unrounded = set(unavailable(replace(model, numerics=STRUCTURE)))
    assert unrounded == {
        "sparse_decode",
        "launch_shape",
        "output_passthrough",
        "cached_projection",
        "grouped_experts",
        *steps,
    }
    float64 = unavailable(replace(model, numerics=replace(DEFAULT, dtype=torch.float64)))
    assert set(float64) == {"routing_kernels", *steps}
    assert float64["captured_steps"].startswith("device_step is not available: routing_kernels is not available: ")


def test_an_indexer_that_its_kernel_does_not_take_leaves_everything_but_device_steps() -> None:
    model = in_mxfp4(slice_model((4,), index_n_heads=8))
    assert set(unavailable(model)) == {"device_step", "full_window_skip", "captured_steps"}
    assert not unavailable(in_mxfp4(slice_model((0,), index_n_heads=8)))
    with pytest.raises(
        ValueError, match="device_step=True, expected False: index_n_heads is 8, and the indexer's kern"
    ):
        check_available(model, replace(available(model), device_step=True))


def test_switching_one_off_switches_off_what_builds_on_it() -> None:
    everything = available(in_mxfp4(slice_model((0,))))
    off = [name for name, on in everything.without("sparse_decode").switches().items() if not on]
    refined = ["launch_shape", "output_passthrough"]
    assert off == ["sparse_decode", *refined, "device_step", "full_window_skip", "captured_steps"]
    assert everything.without("captured_steps") == replace(everything, captured_steps=False)
    with pytest.raises(ValueError, match="names: got 'graphs', expected some of"):
        everything.without("graphs")


def test_sparse_decode_is_one_kernel_and_a_copy_and_output_passthrough_saves_the_copy(
    attention: tuple[Tensor, Scope, Tensor, Tensor], device: str
) -> None:
    model = slice_model((0,))
    reference = launches(compose(model, Features(), device), attention)
    copied = launches(compose(model, SPARSE, device), attention)
    in_place = launches(compose(model, replace(SPARSE, output_passthrough=True), device), attention)
    found = [sum("sparse_mla_decode" in name for name in run.kernels) for run in (reference, copied, in_place)]
    assert found == [0, 1, 1]
    assert len(copied.copies) - len(in_place.copies) == 1
    assert torch.isfinite(attention[3]).all()


def test_launch_shape_leaves_the_choice_to_the_launcher(
    attention: tuple[Tensor, Scope, Tensor, Tensor], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(tmp_path))
    monkeypatch.delenv("DSV4REF_LAUNCH_SHAPE", raising=False)
    q, scope, sink, out = attention
    for features in (SPARSE, replace(SPARSE, launch_shape=True)):
        compose(slice_model((0,)), features, device).attend(q, scope, None, sink, out)
    shapes = [row.fields["launch"] for row in diagnostics.read(tmp_path) if row.event == "sparse_mla_decode"]
    assert shapes[0] == str(STATIC)
    assert shapes[1] != str(STATIC)


def test_cached_projection_dequantises_nothing_and_follows_a_weight_that_changes(device: str) -> None:
    model = slice_model((0,))
    kept = compose(model, Features(cached_projection=True), device)
    stepwise = compose(model, Features(), device)
    rng = torch.Generator().manual_seed(1)
    o, freqs = torch.randn(2, 4, 512, generator=rng).bfloat16().float(), torch.rand(32, generator=rng)
    given = (o, 0, torch.tensor([3, 40]), freqs)
    got, want = kept.project(*given), stepwise.project(*given)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7 * float(want.abs().max()))
    counted = [count_launches(partial(ops.project, *given), warmup=0) for ops in (kept, stepwise)]
    assert not any("dequantise" in name for name in counted[0].kernels)
    if (
        device == "cpu"
    ):  # elsewhere the reference's work is not on the device, and weights are copies, as `compose` says
        assert len(counted[0].kernels) < len(counted[1].kernels)
        model.tensors["layers.0.attn.wo_a.weight"].copy_(model.tensors["layers.0.attn.wo_a.weight"].float() / 2)
        torch.testing.assert_close(
            kept.project(*given), stepwise.project(*given), rtol=2**-7, atol=2**-7 * float(want.abs().max())
        )
        assert float((kept.project(*given) - got).abs().max()) > 0


@pytest.mark.parametrize("hashed", [True, False])
def test_routing_kernels_choose_the_references_experts(hashed: bool, device: str, rng: torch.Generator) -> None:
    model = slice_model((0, 0))
    gate = model.weights.at(f"layers.{0 if hashed else 1}.ffn.gate")
    x, tokens = torch.randn(5, 64, generator=rng), torch.randint(0, 96, (5,), generator=rng)
    routes = [compose(model, Features(routing_kernels=on), device).route for on in (False, True)]
    (want_weights, want), (weights, experts) = (route(x, tokens, gate, hashed) for route in routes)
    assert torch.equal(experts, want), (experts, want)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=0)
    counted = count_launches(lambda: routes[1](x, tokens, gate, hashed), warmup=0)
    assert sum("_route_" in name for name in counted.kernels) == 1


def test_shrink_tail_fill_clears_nothing_in_a_steady_state(device: str) -> None:
    cleared = []
    for on in (False, True):
        prepare = compose(slice_model((0,)), Features(shrink_tail_fill=on), device).prepare_lists
        buffers = TailFilled(4, 8, device)
        prepare(buffers, 3)
        counted = count_launches(partial(prepare, buffers, 3), warmup=0)
        cleared.append(len(counted.fills) + len(counted.kernels))
    assert cleared == [3, 0]


def test_grouped_experts_need_mxfp4_and_unquantised_inputs() -> None:
    model = in_mxfp4(slice_model((0,)))
    reasons = [unavailable(m)["grouped_experts"] for m in (slice_model((0,)), replace(model, numerics=DEEPSEEK))]
    assert reasons[0].startswith("layers.0.ffn.experts.0.w1.weight is stored in torch.float32, and the GEMM decodes")
    assert reasons[1] == "numerics quantise expert inputs to fp8, and the GEMM reads bf16"


def test_grouped_experts_are_three_launches_behind_a_plan_and_give_the_references_sum(
    device: str, rng: torch.Generator
) -> None:
    model = in_mxfp4(slice_model((0,), numerics=replace(DEFAULT, weight_before_w2=False)))
    x, weights = torch.randn(3, 64, generator=rng).bfloat16().float(), torch.rand(3, 3, generator=rng)
    experts = torch.stack([torch.randperm(8, generator=rng)[:3] for _ in range(3)])
    reference, grouped = (compose(model, Features(grouped_experts=on), device) for on in (False, True))
    want = reference.experts(x, weights, experts, 0)
    counted = count_launches(lambda: grouped.experts(x, weights, experts, 0), warmup=0)
    assert sum("grouped" in name or "sum_slots" in name for name in counted.kernels) == 3
    assert grouped.step_experts is grouped.experts
    got = grouped.experts(x, weights, experts.index_fill(0, torch.tensor([1]), -1), 0)
    assert torch.equal(got[1], torch.zeros(64))
    rows = [0, 2]
    torch.testing.assert_close(got[rows], want[rows], rtol=2**-6, atol=2**-7 * float(want.abs().max()))
