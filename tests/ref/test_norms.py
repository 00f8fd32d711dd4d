"""RMS norms against Python's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import assert_close

from dsv4ref.ref.norms import head_norm_ref, rms_norm_ref


def by_loops(row: list[float], eps: float) -> list[float]:
    return [value / math.sqrt(math.fsum(v * v for v in row) / len(row) + eps) for value in row]


def test_weighted_norm(rng: torch.Generator) -> None:
    x = torch.randn((2, 3, 7), generator=rng, dtype=torch.float64)
    weight = torch.randn(7, generator=rng, dtype=torch.float64)
    got = rms_norm_ref(x, weight, 1e-6)
    for a in range(2):
        for b in range(3):
            want = torch.tensor(by_loops(x[a, b].tolist(), 1e-6), dtype=torch.float64) * weight
            assert_close(got[a, b], want, 1e-13, f"row {a, b}")


def test_the_head_norm_is_per_head_over_all_dimensions(rng: torch.Generator) -> None:
    q = torch.randn((2, 4, 16), generator=rng, dtype=torch.float64) * torch.tensor([1.0, 10, 100, 0.01]).view(1, 4, 1)
    got = head_norm_ref(q, 1e-6)
    for t in range(2):
        for h in range(4):
            want = torch.tensor(by_loops(q[t, h].tolist(), 1e-6), dtype=torch.float64)
            assert_close(got[t, h], want, 1e-13, f"head {t, h}")


def test_eps_is_added_to_the_mean_and_rescues_zero_rows() -> None:
    assert torch.count_nonzero(rms_norm_ref(torch.zeros(2, 8), torch.ones(8), 1e-6)) == 0
    tiny = torch.full((1, 8), 1e-3)
    assert rms_norm_ref(tiny, torch.ones(8), 1e-6)[0, 0].item() == pytest.approx(1 / math.sqrt(2), rel=1e-6)


def test_the_bf16_chain_is_bf16_and_close(rng: torch.Generator) -> None:
    q = torch.randn((8, 4, 128), generator=rng).to(torch.bfloat16).to(torch.float32)
    chain, exact = head_norm_ref(q, 1e-6, bf16_steps=True), head_norm_ref(q, 1e-6)
    assert torch.equal(chain, chain.to(torch.bfloat16).to(torch.float32))
    relative = ((chain - exact).abs() / exact.abs().clamp(min=1e-6)).max().item()
    assert 1e-4 < relative < 4 * 2**-8, "four roundings of 2^-9 each, some halved by the root"
    # The same on a bfloat16 tensor, where torch rounds after every operation.
    tensor = q.to(torch.bfloat16)
    want = tensor * torch.rsqrt(tensor.square().mean(dim=-1, keepdim=True) + 1e-6)
    assert_close(chain, want.float(), 0.0, "query [token, head, dimension]")
