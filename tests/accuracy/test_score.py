"""The shipped weights: what they score with the reference, and what each breakage costs.

Few sequences, so that this stays quick; every bound leaves three standard errors of the answers that it rests on.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsv4ref.accuracy import score
from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED, Examples
from dsv4ref.accuracy.training import SEED, source_hash
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.ref.experts import route_ref
from dsv4ref.ref.hyper_connections import hc_weights_ref
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.numerics import DEFAULT, STRUCTURE
from dsv4ref.ref.weights import Weights

torch.set_num_threads(1)

HELD_OUT = 77
SEQUENCES = 4
MANY = 10


@pytest.fixture(scope="module")
def examples() -> Examples:
    return TASK.examples(SEQUENCES, HELD_OUT)


@pytest.fixture(scope="module")
def prompts(examples: Examples) -> Examples:
    """The same sequences processed as one prompt each: three times as quick, through the same caches."""
    return replace(examples, tail=TASK.length)


@pytest.fixture(scope="module")
def healthy(prompts: Examples) -> Mapping[str, float]:
    return score.accuracy(score.paged(score.load_model()), prompts)


@pytest.fixture(scope="module")
def many() -> Examples:
    """More sequences, for what is scored in fp32 on plain tensors, three times as quick again."""
    return replace(TASK.examples(MANY, HELD_OUT), tail=TASK.length)


@pytest.fixture(scope="module")
def structure(many: Examples) -> Mapping[str, float]:
    return score.accuracy(score.plain(score.load_model(STRUCTURE)), many)


def test_structure_in_fp32_prefill_then_decode(examples: Examples) -> None:
    found = score.accuracy(score.plain(score.load_model(STRUCTURE)), examples)
    assert found["retrieval"] >= 0.95, found
    assert found["copying"] >= 0.95, found
    assert found["not_finite"] == 0


def test_default_formats_on_paged_fp8_caches_prefill_then_decode(examples: Examples) -> None:
    found = score.accuracy(score.paged(score.load_model(DEFAULT)), examples)
    assert found["retrieval"] >= 0.95, found
    assert found["copying"] >= 0.95, found
    assert found["retrieval_asked"] == SEQUENCES * TASK.queries


@pytest.mark.parametrize(
    ("name", "at_least"), [("fp8_dialect_compressed", 5), ("fp8_dialect_window", 5), ("one_sided_hadamard", 40)]
)
def test_a_misread_cache_costs_retrieval(
    name: str, at_least: float, prompts: Examples, healthy: Mapping[str, float]
) -> None:
    broken = score.accuracy(score.breakages()[name](score.load_model()), prompts)
    points, error = score.points_lost(healthy, broken)
    assert points - 3 * error >= at_least, f"{name}: {points:.1f} points lost, standard error {error:.1f}: {broken}"


@pytest.mark.parametrize(("name", "at_least"), [("router_bias_bf16_8", 5), ("transposed_sinkhorn", 5)])
def test_a_wrong_weight_costs_retrieval(
    name: str, at_least: float, many: Examples, structure: Mapping[str, float]
) -> None:
    broken = score.accuracy(score.plain(score.breakages()[name](score.load_model(STRUCTURE)).model), many)
    points, error = score.points_lost(structure, broken)
    assert points - 3 * error >= at_least, f"{name}: {points:.1f} points lost, standard error {error:.1f}: {broken}"


@pytest.mark.parametrize("name", ["router_bias_bf16_0", "router_bias_bf16_1"])
def test_a_rounded_bias_near_zero_costs_nothing_that_shows(
    name: str, many: Examples, structure: Mapping[str, float]
) -> None:
    few = replace(many, tokens=many.tokens[:SEQUENCES])
    broken = score.accuracy(score.plain(score.breakages()[name](score.load_model(STRUCTURE)).model), few)
    points, error = score.points_lost(structure, broken)
    assert points <= 3 * error, f"{points:.1f} points lost, standard error {error:.1f}"


def selections(model: Model, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Experts of every token in every learned layer, from one pass of the reference."""
    found: list[torch.Tensor] = []

    def recorded(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = route_ref(*arguments)  # type: ignore[arg-type]
        found.append(chosen[1])
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4ref.ref.experts.route_ref", recorded)
        forward_ref(model, tokens)
    return {layer: found[layer] for layer in range(model.config.n_layers) if not model.config.is_hash_layer(layer)}


def test_a_constant_changes_no_selection_in_fp32_and_many_in_bfloat16(examples: Examples) -> None:
    model, tokens = score.load_model(STRUCTURE), examples.tokens[0]
    right = selections(model, tokens)
    shifted = selections(score.router_bias(model, 8.0, torch.float32).model, tokens)
    rounded = selections(score.router_bias(model, 8.0).model, tokens)
    for layer, experts in right.items():
        bias = model.tensors[f"layers.{layer}.ffn.gate.bias"]
        assert bool(bias.any()), "load balancing moved the bias"
        assert torch.equal(shifted[layer], experts), f"layer {layer}: fp32 bias + 8 changed a selection"
        kinds = (bias + 8).to(torch.bfloat16).unique().numel()
        changed = float((rounded[layer] != experts).any(dim=1).float().mean())
        assert kinds < bias.unique().numel()
        assert changed > 0.2, f"layer {layer}: {changed:.0%} of tokens changed experts, {kinds} distinct bf16 biases"


def test_misread_rows_are_half_of_what_was_written_and_the_rotary_part_is_intact() -> None:
    broken, right = score.misread_dialect(score.load_model(), "compressed"), score.paged(score.load_model())
    kv = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    layer, sound = broken.new_state().layers[1], right.new_state().layers[1]
    assert layer.compressed is not None
    assert sound.compressed is not None
    got = layer.compressed.append(kv).gather(torch.arange(4), torch.float32)
    want = sound.compressed.append(kv).gather(torch.arange(4), torch.float32)
    assert torch.equal(2 * got[:, :448], want[:, :448])
    assert torch.equal(got[:, 448:], want[:, 448:])
    window = layer.window.append(kv).gather(torch.arange(4), torch.float32)
    assert torch.equal(window, want), "the other cache is read as it is written"


def test_minus_zero_is_misread_as_nan() -> None:
    layer = score.misread_dialect(score.load_model(), "window").new_state().layers[0]
    kv = torch.ones(1, 512)
    kv[0, 7] = -1e-7
    got = layer.window.append(kv).gather(torch.arange(1), torch.float32)
    assert got.isnan().nonzero().tolist() == [[0, 7]]


def test_logits_that_are_not_finite_answer_nothing(prompts: Examples) -> None:
    model = score.load_model(STRUCTURE)
    head = model.tensors["head.weight"].clone()
    head[3] = float("nan")
    one = replace(prompts, tokens=prompts.tokens[:1])
    found = score.accuracy(score.plain(replace(model, tensors={**model.tensors, "head.weight": head})), one)
    assert (found["retrieval"], found["copying"], found["not_finite"]) == (0, 0, 1)


def test_transposed_logits_give_the_transposed_matrix_up_to_its_last_normalisation() -> None:
    model = score.load_model(STRUCTURE)
    broken = score.transposed_sinkhorn(model).model
    streams = torch.randn(64, 4, 64, generator=torch.Generator().manual_seed(2))
    asymmetry = []
    for layer in range(3):
        for half in ("attn", "ffn"):
            name = f"layers.{layer}.hc_{half}"
            mixes = []
            for weights in (Weights(model.tensors), Weights(broken.tensors)):
                fn, base, scale = (weights.tensor(f"{name}_{part}") for part in ("fn", "base", "scale"))
                mixes.append(hc_weights_ref(streams, fn, base, scale, V4_TINY_TRAINED))
            (pre, post, right), (same_pre, same_post, transposed) = mixes
            assert torch.equal(pre, same_pre)
            assert torch.equal(post, same_post)
            difference = float((right.mT - transposed).abs().max())
            assert difference < 0.03, f"{name}: {difference}"
            asymmetry.append(float((right.mT - right).abs().max()))
    assert max(asymmetry) > 0.5, f"matrices are nearly symmetric: {asymmetry}"


def test_one_sided_hadamard_needs_a_rotation_to_leave_out() -> None:
    with pytest.raises(ValueError, match="hadamard=False, expected True"):
        score.one_sided_hadamard(score.load_model(STRUCTURE))
    with pytest.raises(ValueError, match="cache: got 'swa', expected 'window' or 'compressed'"):
        score.misread_dialect(score.load_model(), "swa")


def test_the_dialect_of_all_caches_may_be_either(prompts: Examples) -> None:
    one = replace(prompts, tokens=prompts.tokens[:1])
    model = score.load_model()
    fnuz = score.paged(replace(model, numerics=replace(DEFAULT, kv_dialect=Dialect.FNUZ)), dialect=Dialect.FNUZ)
    assert score.accuracy(fnuz, one) == score.accuracy(score.paged(model), one)


def test_points_lost_and_their_error() -> None:
    right = {"retrieval": 1.0, "retrieval_asked": 100.0}
    broken = {"retrieval": 0.5, "retrieval_asked": 100.0}
    points, error = score.points_lost(right, broken)
    assert points == 50
    assert error == pytest.approx(100 * (0.0025 + 0.005 * 0.995 / 100) ** 0.5)


def test_the_weights_say_where_they_come_from() -> None:
    found = score.metadata()
    assert (found["config"], found["seed"]) == (V4_TINY_TRAINED.name, str(SEED))
    assert found["sources"] == source_hash(), "the code that makes the weights has changed: train them again"
    assert score.WEIGHTS.stat().st_size < 3.3e6


def test_files_that_are_no_trained_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not there, expected safetensors"):
        score.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"), metadata={"config": "v4-flash"})
    with pytest.raises(ValueError, match="is for config 'v4-flash', expected 'v4-tiny-trained'"):
        score.metadata(tmp_path / "other.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(score.WEIGHTS.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short, damaged"):
        score.load(cut)
