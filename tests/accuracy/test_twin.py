"""The batched forward pass is the reference: same logits, loads and selections; and it is differentiable."""

from dataclasses import replace

import pytest
import torch

from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED, Task
from dsv4ref.accuracy.training import initial_weights
from dsv4ref.accuracy.twin import forward
from dsv4ref.config import C4, C128, SWA, ModelConfig
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.weights import weight_shapes

torch.set_num_threads(1)

LIMIT = 2e-5
"""max |dlogit| in fp32 on logits of about 1: the bound that the reference is held to against transformers."""


def random_weights(seed: int, config: ModelConfig = V4_TINY_TRAINED) -> dict[str, torch.Tensor]:
    """Every part matters: O(1) everywhere, no zero biases, sinks or position tables."""
    rng = torch.Generator().manual_seed(seed)
    tensors = initial_weights(config, seed)
    for name, shape in weight_shapes(config).items():
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * torch.randn(shape, generator=rng)
        elif not name.endswith("tid2eid"):
            scale = 0.5 if len(shape) == 1 or name.endswith(".ape") else shape[-1] ** -0.5
            tensors[name] = scale * torch.randn(shape, generator=rng)
    return tensors


@pytest.mark.parametrize("seed", [1, 2])
def test_every_logit_equals_the_reference(seed: int) -> None:
    tokens = TASK.examples(2, seed).tokens
    tensors = random_weights(seed)
    with torch.no_grad():
        got = forward(tensors, V4_TINY_TRAINED, tokens).logits
        for row in range(2):
            want = forward_ref(Model(V4_TINY_TRAINED, tensors, STRUCTURE), tokens[row])[0].logits
            difference = (got[row] - want).abs()
            t, v = divmod(int(difference.argmax()), want.shape[1])
            assert float(difference.max()) <= LIMIT, (
                f"row {row} position {t} token {v}: {got[row, t, v].item()}, expected {want[t, v].item()}"
            )


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 33, 36, 129])
def test_lengths_around_every_boundary(length: int) -> None:
    config = replace(V4_TINY_TRAINED, compress_ratios=(C128, C4, SWA), n_hash_layers=2)
    tensors = random_weights(4, config)
    tokens = TASK.examples(1, 7).tokens[:, -length:]
    with torch.no_grad():
        got = forward(tensors, config, tokens).logits[0]
        want = forward_ref(Model(config, tensors, STRUCTURE), tokens[0])[0].logits
    difference = (got - want).abs()
    assert float(difference.max()) <= LIMIT, f"position {int(difference.max(dim=1).values.argmax())} of {length}"


def test_probing_reports_the_same_logits() -> None:
    tensors, tokens = random_weights(1), TASK.examples(2, 8).tokens
    probe = torch.tensor([40, 257, 3])
    with torch.no_grad():
        everywhere = forward(tensors, V4_TINY_TRAINED, tokens)
        probed = forward(tensors, V4_TINY_TRAINED, tokens, probe=probe)
    difference = float((probed.logits - everywhere.logits[:, probe]).abs().max())
    assert difference <= LIMIT, difference
    assert torch.equal(probed.index[1].mass, everywhere.index[1].mass[:, probe])


def test_dense_selection_attends_to_every_entry_and_scores_as_the_sparse_one() -> None:
    tensors, tokens, probe = random_weights(1), TASK.examples(1, 9).tokens, torch.tensor([290])
    with torch.no_grad():
        dense = forward(tensors, V4_TINY_TRAINED, tokens, select="all", probe=probe).index[1]
        sparse = forward(tensors, V4_TINY_TRAINED, tokens, probe=probe).index[1]
    assert int((dense.mass > 0).sum()) == int(dense.visible.sum()) == (290 + 1) // 4
    assert int((sparse.mass > 0).sum()) == V4_TINY_TRAINED.index_topk
    assert torch.allclose(dense.scores, sparse.scores, atol=1e-6)


def test_loads_count_every_slot() -> None:
    tokens = TASK.examples(2, 10).tokens
    with torch.no_grad():
        loads = forward(random_weights(1), V4_TINY_TRAINED, tokens).loads
    assert set(loads) == {1, 2}, "the hash layer's loads are nobody's to balance"
    assert all(int(load.sum()) == tokens.numel() * V4_TINY_TRAINED.router.top_k for load in loads.values())


def test_gradients_reach_every_weight_but_what_selects() -> None:
    small = Task(groups=33, pairs=4, gap=4, letters=3, queries=2)
    tensors = {k: t.requires_grad_() if t.is_floating_point() else t for k, t in random_weights(3).items()}
    trace = forward(tensors, V4_TINY_TRAINED, small.examples(2, 1).tokens)
    trace.logits.square().mean().backward()
    without = {name for name, t in tensors.items() if t.is_floating_point() and (t.grad is None or not t.grad.any())}
    idle = {name for name in without if ".ffn.experts." in name}
    for layer, load in trace.loads.items():
        unused = {f"layers.{layer}.ffn.experts.{e}.w1.weight" for e in (load == 0).nonzero().flatten().tolist()}
        assert {n for n in idle if n.startswith(f"layers.{layer}.") and n.endswith("w1.weight")} == unused
    routers = {name for name in tensors if ".ffn.gate." in name}  # one expert per token: its weight is a constant
    assert without - idle - routers == {name for name in tensors if ".indexer." in name}
    trace = forward(tensors, V4_TINY_TRAINED, small.examples(2, 1).tokens)
    for tensor in tensors.values():
        tensor.grad = None
    trace.index[1].scores.square().mean().backward()
    reached = {name for name, t in tensors.items() if t.grad is not None}
    assert reached == {name for name in tensors if ".indexer." in name}, "the indexer learns from attention only"


def test_bad_input_is_refused() -> None:
    tensors = random_weights(1)
    with pytest.raises(ValueError, match=r"tokens: got torch.int64 \(3,\), expected torch.int64 \[B, T\]"):
        forward(tensors, V4_TINY_TRAINED, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens: got 150, expected 0 to 149"):
        forward(tensors, V4_TINY_TRAINED, torch.full((1, 3), 150))
    with pytest.raises(ValueError, match="select: got 'some', expected 'topk' or 'all'"):
        forward(tensors, V4_TINY_TRAINED, torch.zeros(1, 3, dtype=torch.int64), select="some")  # type: ignore[arg-type]
