"""Training: a few steps with the shipped seed, what gradients must not move, and files that the reference loads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4ref.accuracy import score, training
from dsv4ref.accuracy.task import V4_TINY_TRAINED
from dsv4ref.accuracy.training import SEED, STAGES, Trainer, as_stored, balance, index_loss, initial_weights, train
from dsv4ref.accuracy.twin import IndexTrace
from dsv4ref.ref.model import Model, forward_ref

torch.set_num_threads(1)

FEW = replace(STAGES[0], steps=22, batch=4)
TWO = (replace(STAGES[0], steps=1, batch=1), replace(STAGES[-1], steps=1, batch=1))


def test_a_few_steps_with_the_shipped_seed_lower_every_loss() -> None:
    trainer = Trainer(V4_TINY_TRAINED, SEED, total=sum(stage.steps for stage in STAGES))
    losses = list(trainer.run(FEW))
    for name, least in (("retrieval", 0.3), ("copying", 0.3), ("index", 0.0)):
        first, last = (sum(getattr(step, name) for step in part) / 3 for part in (losses[:3], losses[-3:]))
        assert last < first - least, f"{name}: {first:.3f} -> {last:.3f}"


def test_a_run_is_repeatable_and_its_file_loads_into_the_reference(tmp_path: Path) -> None:
    trainer = Trainer(V4_TINY_TRAINED, SEED, total=2)
    assert [len(list(trainer.run(stage))) for stage in TWO] == [1, 1]
    found = train(tmp_path / "a.safetensors", SEED, TWO, progress=False)
    assert found["steps"] == "2 of 2"
    assert score.metadata(tmp_path / "a.safetensors") == found
    tensors, again = score.load(tmp_path / "a.safetensors"), as_stored(trainer.tensors, V4_TINY_TRAINED)
    assert tensors.keys() == again.keys()
    differ = [name for name, tensor in tensors.items() if not tensor.equal(again[name])]
    assert not differ, f"the same seed gave another {differ[0]}"
    tokens = TWO[0].task.examples(1, 1).tokens[0]
    assert bool(forward_ref(Model(V4_TINY_TRAINED, tensors), tokens)[0].logits.isfinite().all())


def test_routers_and_shared_experts_are_not_learnt_by_gradient() -> None:
    trainer = Trainer(V4_TINY_TRAINED, SEED, total=2)
    start = initial_weights(V4_TINY_TRAINED, SEED)
    stage = replace(STAGES[0], steps=1, batch=1)
    assert len(list(trainer.run(stage))) == 1
    fixed = {name for name, tensor in trainer.tensors.items() if tensor.equal(start[name])}
    want = {name for name in start if any(part in name for part in (".shared_experts.", ".gate.weight", "tid2eid"))}
    assert want <= fixed, want - fixed
    for layer, bias in trainer.biases.items():
        moved = bias.abs().unique()
        assert set(moved.tolist()) <= {0.0, float(torch.tensor(training.BIAS_STEP))}, f"layer {layer}: {moved}"
        assert float(moved.max()) > 0


def test_training_stays_off_held_out_seeds() -> None:
    with pytest.raises(ValueError, match="seed: got -1, expected 0 or more"):
        Trainer(V4_TINY_TRAINED, -1, total=1)
    assert training.TRAINING_SEEDS == 1_000_000, "what docstrings promise"


def test_balancing_lowers_the_bias_of_busy_experts_and_raises_that_of_idle_ones() -> None:
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    balance(bias, torch.tensor([9, 0, 4, 3]), 0.25)
    assert bias.tolist() == [0.25, 0.75, 0.5, 0.75]


def test_index_loss_is_zero_where_scores_say_what_attention_does_and_ignores_hidden_entries() -> None:
    mass = torch.tensor([[[0.5, 1.5, 0.0]]])
    visible = torch.tensor([[True, True, False]])
    right = torch.tensor([[[0.0, 1.0986123, 50.0]]])
    assert abs(float(index_loss(IndexTrace(right, mass, visible), 1))) < 1e-6
    flat = float(index_loss(IndexTrace(torch.zeros(1, 1, 3), mass, visible), 1))
    want = float(torch.special.xlogy(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 1.5])).sum())
    assert flat == pytest.approx(want, abs=1e-6), f"{flat}, expected {want}"


def test_weights_are_stored_as_released_ones_and_biases_take_an_offset_exactly() -> None:
    stored = as_stored(initial_weights(V4_TINY_TRAINED, 1), V4_TINY_TRAINED)
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert kinds["layers.1.attn.wq_b.weight"] is torch.bfloat16
    assert kinds["layers.1.attn.attn_sink"] is torch.float32
    assert kinds["layers.0.ffn.gate.tid2eid"] is torch.int64
    bias = {"layers.1.ffn.gate.bias": torch.linspace(-0.3, 0.3, 32)}
    rounded = as_stored(bias, V4_TINY_TRAINED)["layers.1.ffn.gate.bias"]
    assert torch.equal((rounded + 8) - 8, rounded)


def test_source_hash_ignores_comments_and_docstrings_only(tmp_path: Path) -> None:
    code = {"a": '"""One."""\n\nx = "s"  # why\n', "b": '"""Two."""\nx = (\n    "s"\n)\n', "c": 'x = "t"\n'}
    texts = {}
    for name, text in code.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        texts[name] = training._code(path)
    assert texts["a"] == 'x="s"'
    assert texts["c"] == 'x="t"'
    assert texts["b"] == 'x=("s")', "brackets are code"
