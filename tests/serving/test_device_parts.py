"""The parts of a device step give what the reference's parts give, row by row, without reading the device."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from engine_runs import in_mxfp4, slice_model
from torch import Tensor

from dsv4ref.config import C4, C128
from dsv4ref.formats import kv_cache
from dsv4ref.ref.checkpoint_writer import quantise_fp8
from dsv4ref.ref.compressor import CompressorState, compress_ref, empty_state, place_entries_ref
from dsv4ref.ref.experts import routed_experts_ref
from dsv4ref.ref.indexer import index_format_ref
from dsv4ref.ref.model import Model
from dsv4ref.ref.numerics import DEEPSEEK, DEFAULT, Numerics, fp4_round_trip
from dsv4ref.ref.rope import layer_frequencies
from dsv4ref.ref.weights import Weights
from dsv4ref.serving.gathered_experts import GatheredExperts
from dsv4ref.serving.graphs import EmulatedGraph
from dsv4ref.serving.grouped_experts import GroupedExperts
from dsv4ref.serving.resident import fp4_values, index_values, resident_model, write_entries
from dsv4ref.serving.tails import Tail, append_and_pool, place_rows

WIDTH = 64

# --- formats ----------------------------------------------------------------------------------------------------------


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Equal to the last bit, the sign of zero included."""
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
    different = (got.contiguous().view(kind) != want.contiguous().view(kind)).flatten().nonzero()
    if different.numel():
        at = int(different[0])
        raise AssertionError(f"element {at}: got {got.flatten()[at]}, expected {want.flatten()[at]}")


def test_fp4_values_are_the_formats_at_every_tie_and_in_between(rng: torch.Generator) -> None:
    eighths = torch.arange(-46, 47) / 8  # 93 numbers: every code but 6 and every midpoint
    near = torch.nextafter(eighths.bfloat16(), torch.tensor(torch.inf).bfloat16()).float()
    rows = [torch.cat((part.view(3, 31), torch.full((3, 1), 6.0)), dim=1) for part in (eighths, near)]  # scale 1
    for exponent in (-130, -20, 0, 7):
        assert_bits(*(f(torch.stack(rows) * 2.0**exponent) for f in (fp4_values, fp4_round_trip)))
    drawn = torch.randn(40, 128, generator=rng) * torch.logspace(-30, 8, 40)[:, None]
    drawn[3] = 0.0
    assert_bits(fp4_values(drawn), fp4_round_trip(drawn))


@pytest.mark.parametrize(
    "numerics", [DEFAULT, replace(DEFAULT, quantise_index="fp8"), replace(DEFAULT, hadamard=False)]
)
def test_index_values_are_the_references(numerics: Numerics, rng: torch.Generator) -> None:
    x = torch.randn(5, 3, 128, generator=rng)
    assert_bits(index_values(x, numerics), index_format_ref(x, numerics))


def test_entries_are_written_as_the_checked_writer_writes_them(rng: torch.Generator) -> None:
    caches = [kv_cache.allocate(3, 8, "e4m3fn", fill=0xFF) for _ in range(2)]
    slots, kv = torch.tensor([17, 3, 0, 23]), torch.randn(4, 512, generator=rng)
    kv_cache.insert(caches[0], slots, kv)
    write_entries(caches[1], slots, kv)
    assert torch.equal(caches[0].data, caches[1].data)


# --- open groups ------------------------------------------------------------------------------------------------------


def compressor(ratio: int, dim: int, rng: torch.Generator) -> Weights:
    channels = 2 * dim if ratio == C4 else dim
    parts = {"wkv.weight": (channels, WIDTH), "wgate.weight": (channels, WIDTH), "ape": (ratio, channels)}
    return Weights({name: torch.randn(shape, generator=rng) / 8 for name, shape in parts.items()})


@pytest.mark.parametrize(("ratio", "prompts", "steps"), [(C4, (1, 3, 4, 7, 18), 14), (C128, (5, 126, 128, 250), 9)])
def test_groups_that_steps_close_are_those_that_the_reference_closes(
    ratio: int, prompts: tuple[int, ...], steps: int, rng: torch.Generator
) -> None:
    """Requests of several lengths together, every step done twice, rings in another order, padding beside them."""
    dim, slots = 8, len(prompts) + 2
    weights = compressor(ratio, dim, rng)
    tail = Tail.allocate(slots, ratio, dim, ratio == C4, torch.float32, "cpu")
    tokens = [torch.randn(length + steps, WIDTH, generator=rng) for length in prompts]
    states: list[CompressorState] = []
    for number, (x, length) in enumerate(zip(tokens, prompts, strict=True)):
        _, state = compress_ref(x[:length], weights, empty_state(ratio, dim, ratio == C4))
        tail.take_over(slots - 2 - number, state)
        states.append(state)
    where = torch.tensor([*(slots - 2 - number for number in range(len(prompts))), slots - 1])  # padding last
    closed = 0
    for step in range(steps):
        x = torch.stack(
            [*(row[length + step] for row, length in zip(tokens, prompts, strict=True)), torch.zeros(WIDTH)]
        )
        positions = torch.tensor([*(length + step for length in prompts), 0])
        append_and_pool(x, weights, tail, where, positions)
        pooled = append_and_pool(x, weights, tail, where, positions)
        for number, length in enumerate(prompts):
            want, states[number] = compress_ref(x[number : number + 1], weights, states[number])
            assert bool(want.shape[0]) == ((length + step + 1) % ratio == 0)
            if want.shape[0]:
                closed += 1
                torch.testing.assert_close(pooled[number : number + 1], want, rtol=1e-5, atol=1e-6)
    assert closed >= 2


def test_a_slot_that_is_taken_over_keeps_nothing_of_whom_it_was(rng: torch.Generator) -> None:
    weights = compressor(C4, 8, rng)
    tail = Tail.allocate(1, C4, 8, True, torch.float32, "cpu")
    tail.kv.fill_(1.0)
    tail.score.fill_(1.0)
    x = torch.randn(6, WIDTH, generator=rng)
    pooled, state = compress_ref(x, weights, empty_state(C4, 8, True))
    assert pooled.shape[0] == 1
    tail.take_over(0, state)
    written = ~tail.kv[0].isnan()
    assert written[4:6].all(), "the open group's rows"
    assert written[0:4, :8].all(), "the previous group's first half"
    assert int(written.sum()) == 2 * 16 + 4 * 8


def test_the_first_group_has_no_previous_one_whatever_the_ring_holds(rng: torch.Generator) -> None:
    weights = compressor(C4, 8, rng)
    tail = Tail.allocate(1, C4, 8, True, torch.float32, "cpu")  # NaN
    x = torch.randn(4, WIDTH, generator=rng)
    want, _ = compress_ref(x, weights, empty_state(C4, 8, True))
    slot = torch.zeros(1, dtype=torch.int64)
    for position in range(4):
        pooled = append_and_pool(x[position : position + 1], weights, tail, slot, torch.tensor([position]))
    torch.testing.assert_close(pooled, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numerics", [DEFAULT, DEEPSEEK])
def test_entries_of_different_requests_are_placed_as_the_reference_places_one(
    numerics: Numerics, rng: torch.Generator
) -> None:
    config = slice_model((4,)).config
    freqs, norm = layer_frequencies(config, 0, numerics), torch.randn(128, generator=rng)
    pooled, entries = torch.randn(3, 128, generator=rng), torch.tensor([0, 7, 31])
    got = place_rows(pooled, entries, C4, norm, freqs, config.norm_eps, numerics)
    want = [
        place_entries_ref(row[None], int(entry), C4, norm, freqs, config.norm_eps, numerics)
        for row, entry in zip(pooled, entries, strict=True)
    ]
    assert_bits(got, torch.cat(want))


# --- weights and experts ----------------------------------------------------------------------------------------------


def stored_as(model: Model, kind: str) -> Model:
    """The model with its routed experts stored in another format."""
    if kind == "mxfp4":
        return in_mxfp4(model)
    tensors = dict(model.tensors)
    for name in [name for name in tensors if ".experts." in name and kind == "fp8"]:
        tensors[name], tensors[name.replace("weight", "scale")] = quantise_fp8(tensors[name].float())
    return Model(model.config, tensors, model.numerics)


def test_resident_weights_are_the_models_and_dequantised_once(device: str) -> None:
    model = stored_as(slice_model((4,)), "mxfp4")
    resident = resident_model(model, device)
    kept = {name for name, tensor in resident.tensors.items() if tensor.dtype is not torch.float32}
    assert all(".experts." in n or ".wo_a." in n or n.endswith("tid2eid") or n == "embed.weight" for n in kept), kept
    for name in model.tensors:
        if name.endswith(".weight") and model.tensors[name].dim() == 2:
            part = name.removesuffix(".weight")
            assert torch.equal(resident.weights.matrix(part).cpu(), model.weights.matrix(part)), name
    wanted = sum(tensor.numel() for name, tensor in model.tensors.items() if name.endswith("experts.0.w1.weight"))
    assert resident.tensors["layers.0.ffn.experts.0.w1.weight"].numel() == wanted
    again = resident_model(resident, device)
    assert all(again.tensors[name] is tensor for name, tensor in resident.tensors.items())


@pytest.mark.parametrize("numerics", [DEFAULT, replace(DEEPSEEK, weight_before_w2=False)])
@pytest.mark.parametrize("kind", ["as written", "mxfp4", "fp8"])
def test_gathered_experts_add_up_to_the_references_sum(kind: str, numerics: Numerics, rng: torch.Generator) -> None:
    model = stored_as(slice_model((4,), numerics=numerics), kind)
    config, x = model.config, torch.randn(5, 64, generator=rng).bfloat16().float()
    experts = torch.stack([torch.randperm(8, generator=rng)[:3] for _ in range(5)])
    weights = torch.rand(5, 3, generator=rng)
    parts = model.weights.at("layers.0.ffn.experts")
    want = routed_experts_ref(x, weights, experts, parts, config.swiglu_limit, numerics)
    pair = config.moe_inter_dim * config.hidden_size * 4
    for pairs in (1, 4, 15, 100):
        got = GatheredExperts(model, "cpu", gather_bytes=pairs * pair)(x, weights, experts, 0)
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8 * float(want.abs().max()), msg=f"{pairs} pairs")


def test_a_pair_without_an_expert_adds_nothing_and_nothing_is_read_from_the_device(rng: torch.Generator) -> None:
    model = stored_as(slice_model((4,)), "mxfp4")
    gathered = GatheredExperts(model, "cpu")
    x, weights = torch.randn(3, 64, generator=rng), torch.rand(3, 3, generator=rng)
    experts = torch.tensor([[0, 5, 2], [-1, -1, -1], [7, -1, 1]])
    graph = EmulatedGraph(lambda: gathered(x, weights, experts, 0))
    assert torch.equal(graph.outputs[1], torch.zeros(64))
    pairs = (weights[2, [0, 2]][None], experts[2, [0, 2]][None])
    torch.testing.assert_close(graph.outputs[2:], gathered(x[2:], *pairs, 0))
    experts.copy_(torch.tensor([[1, 0, 6], [3, 4, 5], [-1, 2, 0]]))
    graph.replay()
    assert torch.equal(graph.outputs, gathered(x, weights, experts, 0))


def test_memory_for_less_than_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="gather_bytes: got 8191, expected at least 8192, one dequantised matrix"):
        GatheredExperts(slice_model((0,)), "cpu", gather_bytes=8191)


def test_stacks_of_the_same_tensors_are_shared_until_nobody_has_them_or_a_tensor_changes(device: str) -> None:
    model = stored_as(slice_model((4,)), "mxfp4")
    first, second = GroupedExperts(model, device), GroupedExperts(Model(model.config, dict(model.tensors)), device)
    stacks = first._layers[0]
    assert all(mine is other for mine, other in zip(stacks, second._layers[0], strict=True))

    codes = model.tensors["layers.0.ffn.experts.3.w2.weight"]
    codes.copy_(~codes)
    third = GroupedExperts(model, device)._layers[0]
    assert third[0] is stacks[0], "w1 and w3 are what they were"
    assert third[1] is not stacks[1]
    differs = (third[1].matrices.packed != stacks[1].matrices.packed).flatten(1).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [3]

    held = weakref.ref(stacks[1])
    del first, second, stacks
    assert held() is None, "a stack outlived everybody who had it"
