"""Hyper-connections: Sinkhorn's column sums, and who mixes into whom."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import assert_close, tiny

from dsv4ref.ref.hyper_connections import collapse_ref, hc_post_ref, hc_pre_ref, hc_weights_ref, sinkhorn_ref
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.weights import Weights

# The two eps are 1e-6 in released models, and two different fields: here they cannot stand in for each other.
NORM_EPS, HC_EPS = 0.3, 0.01
CONFIG = replace(tiny((0,)), hidden_size=32, norm_eps=NORM_EPS, hc_eps=HC_EPS)
D = CONFIG.hidden_size


def parameters(
    rng: torch.Generator, rows: int = 24, scales: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fn = torch.randn((rows, 4 * D), generator=rng, dtype=torch.float64) * 0.3
    base = torch.randn(rows, generator=rng, dtype=torch.float64)
    return fn, base, torch.randn(scales, generator=rng, dtype=torch.float64)


def by_loops(
    x: list[list[float]], fn: list[list[float]], base: list[float], scale: list[float]
) -> tuple[list[float], list[float], list[list[float]]]:
    """pre, post and C of one token, with Python lists."""
    flat = [value for stream in x for value in stream]
    rms = math.sqrt(math.fsum(v * v for v in flat) / len(flat) + NORM_EPS)
    m = [math.fsum(a * b for a, b in zip(flat, row, strict=True)) / rms for row in fn]
    pre = [1 / (1 + math.exp(-(m[i] * scale[0] + base[i]))) + HC_EPS for i in range(4)]
    post = [2 / (1 + math.exp(-(m[4 + j] * scale[1] + base[4 + j]))) for j in range(4)]
    logits = [[m[8 + 4 * i + j] * scale[2] + base[8 + 4 * i + j] for j in range(4)] for i in range(4)]
    c = []
    for row in logits:
        top = [math.exp(v - max(row)) for v in row]
        c.append([v / sum(top) + HC_EPS for v in top])
    for iteration in range(20):
        if iteration:
            c = [[v / (sum(row) + HC_EPS) for v in row] for row in c]
        columns = [sum(c[i][j] for i in range(4)) + HC_EPS for j in range(4)]
        c = [[c[i][j] / columns[j] for j in range(4)] for i in range(4)]
    return pre, post, c


def test_a_half_block_number_by_number(rng: torch.Generator) -> None:
    """What is read and what is written back, without a single tensor operation on the other side."""
    streams = torch.randn((2, 4, D), generator=rng, dtype=torch.float64)
    fn, base, scale = parameters(rng)
    weights = Weights({"b.hc_ffn_fn": fn, "b.hc_ffn_base": base, "b.hc_ffn_scale": scale}, torch.float64, "b")
    numerics = replace(STRUCTURE, dtype=torch.float64)
    u, post, mix = hc_pre_ref(streams, weights, "ffn", CONFIG, numerics)
    result = torch.randn((2, D), generator=rng, dtype=torch.float64)
    written = hc_post_ref(result, streams, post, mix, numerics)
    for t in range(2):
        x = streams[t].tolist()
        want_pre, want_post, c = by_loops(x, fn.tolist(), base.tolist(), scale.tolist())
        for d in range(D):
            want_u = sum(want_pre[i] * x[i][d] for i in range(4))
            assert u[t, d].item() == pytest.approx(want_u, abs=1e-12), (t, d)
            for j in range(4):
                want = want_post[j] * result[t, d].item() + sum(c[i][j] * x[i][d] for i in range(4))
                assert written[t, j, d].item() == pytest.approx(want, abs=1e-12), (t, j, d)


def test_the_matrix_is_far_from_symmetric(rng: torch.Generator) -> None:
    """Otherwise the test above could not tell C from its transpose."""
    _, _, mix = hc_weights_ref(
        torch.randn((8, 4, D), generator=rng, dtype=torch.float64), *parameters(rng), config=CONFIG
    )
    assert (mix - mix.transpose(1, 2)).abs().amax(dim=(1, 2)).min() > 0.05


@given(st.integers(0, 2**31 - 1), st.floats(0.01, 8))
def test_columns_sum_to_one(seed: int, spread: float) -> None:
    logits = torch.randn((16, 4, 4), generator=torch.Generator().manual_seed(seed)) * spread
    mix = sinkhorn_ref(logits, 20, 1e-6)
    assert (mix > 0).all()
    assert_close(mix.sum(dim=-2), torch.ones(16, 4), 1e-5, "column sums [matrix, destination]")


@pytest.mark.parametrize("iterations", [1, 2, 3, 20])
def test_every_iteration_counts(iterations: int) -> None:
    """Rows then columns, the softmax being the first row step: by loops, on a matrix that converges slowly."""
    logits: list[list[float]] = [[6.0, 0, 0, 0], [6, -6, 0, 1], [0, 0, 9, 9], [3, 2, 9, -9]]
    powers = [[math.exp(v) for v in row] for row in logits]
    matrix = [[v / sum(row) + 1e-6 for v in row] for row in powers]
    for step in range(1, 2 * iterations):
        if step % 2:
            sums = [sum(row[j] for row in matrix) + 1e-6 for j in range(4)]
            matrix = [[row[j] / sums[j] for j in range(4)] for row in matrix]
        else:
            matrix = [[v / (sum(row) + 1e-6) for v in row] for row in matrix]
    want = torch.tensor(matrix, dtype=torch.float64)
    assert_close(sinkhorn_ref(torch.tensor(logits, dtype=torch.float64), iterations, 1e-6), want, 1e-13)
    other = sinkhorn_ref(torch.tensor(logits, dtype=torch.float64), iterations + 1, 1e-6)
    assert (other - want).abs().max() > 1e-7, "one more iteration must show"


def test_rows_sum_to_one_only_roughly(rng: torch.Generator) -> None:
    mix = sinkhorn_ref(torch.randn((64, 4, 4), generator=rng) * 4, 20, 1e-6)
    rows = (mix.sum(dim=-1) - 1).abs().max().item()
    columns = (mix.sum(dim=-2) - 1).abs().max().item()
    assert rows > 10 * columns, "the last step normalises columns"


def test_more_iterations_only_refine(rng: torch.Generator) -> None:
    logits = torch.randn((8, 4, 4), generator=rng)
    once, many = sinkhorn_ref(logits, 1, 1e-6), sinkhorn_ref(logits, 20, 1e-6)
    assert_close(sinkhorn_ref(logits, 200, 1e-6), many, 1e-4)
    assert (once - many).abs().max() > 1e-3
    assert_close(once, (lambda s: s / (s.sum(-2, keepdim=True) + 1e-6))(logits.softmax(-1) + 1e-6), 1e-7)


def test_extreme_logits_stay_finite() -> None:
    mix = sinkhorn_ref(torch.tensor([[[1e4, -1e4, 0, 0]] * 4]), 20, 1e-6)
    assert torch.isfinite(mix).all()
    assert (mix > 0).all()


def test_ranges(rng: torch.Generator) -> None:
    pre, post, _ = hc_weights_ref(
        torch.randn((64, 4, D), generator=rng, dtype=torch.float64), *parameters(rng), config=CONFIG
    )
    assert (pre >= HC_EPS).all()
    assert (pre <= 1 + HC_EPS).all()
    assert (post >= 0).all()
    assert (post <= 2).all()
    assert post.max() > 1, "twice a sigmoid"


def test_collapse(rng: torch.Generator) -> None:
    streams = torch.randn((3, 4, D), generator=rng, dtype=torch.float64)
    fn, base, scale = parameters(rng, 4, 1)
    weights = Weights({"hc_head_fn": fn, "hc_head_base": base, "hc_head_scale": scale}, torch.float64)
    got = collapse_ref(streams, weights, CONFIG, replace(STRUCTURE, dtype=torch.float64))
    for t in range(3):
        flat = streams[t].flatten()
        m = (fn @ flat) / math.sqrt(flat.square().mean().item() + NORM_EPS)
        pre = [1 / (1 + math.exp(-(m[i] * scale[0] + base[i]).item())) + HC_EPS for i in range(4)]
        want = torch.stack([pre[i] * streams[t, i] for i in range(4)]).sum(dim=0)
        assert_close(got[t], want, 1e-12, f"token {t}")
