"""The lightning indexer: Hadamard, scores by loops, the tie rule, and what quantised scoring amounts to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close, random_weights, tiny

from dsv4ref.formats import fp8, ue8m0
from dsv4ref.formats.fp8 import Dialect
from dsv4ref.ref.indexer import (
    hadamard_ref,
    index_format_ref,
    index_head_weights_ref,
    index_queries_ref,
    index_scores_ref,
    select_ref,
)
from dsv4ref.ref.numerics import STRUCTURE, Numerics
from dsv4ref.ref.rope import layer_frequencies, rotate_ref
from dsv4ref.ref.weights import Weights

CONFIG = tiny((4,), n_hash_layers=0)


def test_hadamard_is_the_sylvester_matrix() -> None:
    matrix = hadamard_ref(torch.eye(128, dtype=torch.float64))
    for i in range(128):
        for j in range(128):
            sign = -1 if (i & j).bit_count() % 2 else 1
            assert matrix[i, j].item() == pytest.approx(sign * 128**-0.5, rel=1e-15), (i, j)


def test_hadamard_is_its_own_inverse_and_keeps_dot_products(rng: torch.Generator) -> None:
    a, b = (torch.randn((5, 128), generator=rng, dtype=torch.float64) for _ in range(2))
    assert_close(hadamard_ref(hadamard_ref(a)), a, 1e-13)
    assert_close(hadamard_ref(a) @ hadamard_ref(b).T, a @ b.T, 1e-12)
    assert (hadamard_ref(a) @ b.T - a @ b.T).abs().max() > 1, "one side only: another score"
    with pytest.raises(ValueError, match="x: got last dimension 96, expected a power of two"):
        hadamard_ref(torch.zeros(1, 96))


def test_scores_by_loops(rng: torch.Generator) -> None:
    q = torch.randn((6, 8), generator=rng, dtype=torch.float64)
    keys = torch.randn((9, 8), generator=rng, dtype=torch.float64)
    w = torch.randn(6, generator=rng, dtype=torch.float64)
    got = index_scores_ref(q, keys, w)
    for j in range(9):
        dots = [sum(a * b for a, b in zip(q[h].tolist(), keys[j].tolist(), strict=True)) for h in range(6)]
        want = sum(w[h].item() * max(dot, 0) for h, dot in enumerate(dots))
        assert got[j].item() == pytest.approx(want, rel=1e-12), j
    assert (got < 0).any(), "weights are signed, scores may be negative"


def test_an_entry_that_no_head_responds_to_outranks_negative_scores() -> None:
    q, keys = torch.ones(2, 4), torch.tensor([[1.0] * 4, [-1.0] * 4])
    scores = index_scores_ref(q, keys, torch.tensor([-1.0, 0.25]))
    assert scores.tolist() == [-3.0, 0.0]
    assert select_ref(scores, 1).tolist() == [1]


def test_selection_and_its_tie_rule() -> None:
    scores = torch.tensor([1.0, 3.0, 0.0, 3.0, -0.0, 2.0, 0.0])
    assert select_ref(scores, 2).tolist() == [1, 3]
    assert select_ref(scores, 5).tolist() == [1, 3, 5, 0, 2], "equal scores, -0 among them: lower number first"
    assert select_ref(scores, 50).tolist() == [1, 3, 5, 0, 2, 4, 6]
    assert select_ref(scores[:0], 4).tolist() == []
    assert select_ref(torch.zeros(3000), 512).tolist() == list(range(512))


def test_queries_and_head_weights(rng: torch.Generator) -> None:
    tensors = random_weights(CONFIG, 1)
    part = Weights(tensors, torch.float32, "layers.0.attn.indexer")
    x, qr = torch.randn((3, CONFIG.hidden_size), generator=rng), torch.randn((3, CONFIG.q_lora_rank), generator=rng)
    positions, freqs = torch.tensor([5, 6, 7]), layer_frequencies(CONFIG, 0, STRUCTURE)
    q = index_queries_ref(qr, part, positions, freqs, CONFIG, STRUCTURE)
    assert q.shape == (3, 64, 128)
    for h in (0, 63):
        head = tensors["layers.0.attn.indexer.wq_b.weight"][128 * h : 128 * h + 128]
        assert_close(q[:, h], rotate_ref(qr @ head.T, positions, freqs), 1e-5, f"head {h}")
    w = index_head_weights_ref(x, part, CONFIG, STRUCTURE)
    want = x @ tensors["layers.0.attn.indexer.weights_proj.weight"].T * (128**-0.5 * 64**-0.5)
    assert_close(w, want, 1e-7)


def test_without_quantisation_hadamard_changes_no_score(rng: torch.Generator) -> None:
    q, keys, w = (torch.randn(shape, generator=rng) for shape in ((64, 128), (20, 128), (64,)))
    plain = index_scores_ref(q, keys, w)
    rotated = replace(STRUCTURE, hadamard=True)
    got = index_scores_ref(index_format_ref(q, rotated), index_format_ref(keys, rotated), w)
    assert_close(got, plain, 1e-4 * plain.abs().max().item())


@pytest.mark.parametrize(("kind", "relative"), [("fp8", 2**-4), ("fp4", 2**-2)])
def test_quantised_vectors_are_near_and_on_their_grid(kind: str, relative: float, rng: torch.Generator) -> None:
    numerics = Numerics(quantise_index=kind, hadamard=False)  # type: ignore[arg-type]
    x = torch.randn((40, 128), generator=rng)
    got = index_format_ref(x, numerics)
    assert torch.equal(index_format_ref(got, numerics), got), "quantising twice is quantising once"
    blocks = x.unflatten(1, (-1, 32 if kind == "fp4" else 128))
    error = (got - x).abs().view_as(blocks) / blocks.abs().amax(dim=-1, keepdim=True)
    assert 0.01 < error.max() < relative
    distinct = got.view_as(blocks).abs()[0, 0].unique().numel()
    assert distinct <= (8 if kind == "fp4" else 127)


def test_hadamard_comes_before_quantisation(rng: torch.Generator) -> None:
    x = torch.randn((4, 128), generator=rng).to(torch.bfloat16).float()
    rotated = hadamard_ref(x).to(torch.bfloat16).float()
    assert torch.equal(index_format_ref(x, Numerics()), index_format_ref(rotated, Numerics(hadamard=False)))


def test_fp8_scoring_with_folded_scales_is_the_same(rng: torch.Generator) -> None:
    """vLLM's kernel: codes against codes, the query's scale folded into the head weight, the key's multiplied last."""
    q, keys, w = (torch.randn(shape, generator=rng) for shape in ((64, 128), (20, 128), (64,)))
    numerics = Numerics(quantise_index="fp8", hadamard=False)
    got = index_scores_ref(index_format_ref(q, numerics), index_format_ref(keys, numerics), w)

    def codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = x.to(torch.bfloat16).float()
        scale = ue8m0.decode(ue8m0.scale_byte(rounded.abs().amax(dim=-1), 448.0))
        return fp8.decode(fp8.encode(rounded / scale[:, None], Dialect.FN), Dialect.FN), scale

    (q8, q_scale), (k8, k_scale) = codes(q), codes(keys)
    want = k_scale * ((w * q_scale) @ torch.relu(q8 @ k8.T))
    assert_close(got, want, 1e-4 * want.abs().max().item())
