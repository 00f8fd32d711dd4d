"""RoPE and YaRN: rotation number by number, the released frequencies, which layer uses which."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from tiny_models import assert_close

from dsv4ref.config import V4_FLASH, V4_PRO
from dsv4ref.ref.numerics import STRUCTURE, Numerics
from dsv4ref.ref.rope import frequencies, layer_frequencies, rotate_back_ref, rotate_ref, yarn

SWA_LAYER, C4_LAYER, C128_LAYER = 0, 2, 3  # of Flash


def test_pairs_are_interleaved_in_the_last_dimensions(rng: torch.Generator) -> None:
    """Each pair is one complex number, turned by p * f: checked in Python's own complex arithmetic."""
    x = torch.randn((3, 2, 10), generator=rng, dtype=torch.float64)  # 4 nope, 6 rope
    positions, freqs = torch.tensor([0, 1, 7]), torch.tensor([1.0, 0.25, 0.0625])
    got = rotate_ref(x, positions, freqs)
    assert torch.equal(got[..., :4], x[..., :4]), "nope dimensions pass through"
    for t, p in enumerate(positions.tolist()):
        for h in range(2):
            for pair, f in enumerate(freqs.tolist()):
                a, b = x[t, h, 4 + 2 * pair].item(), x[t, h, 5 + 2 * pair].item()
                turned = complex(a, b) * cmath.exp(1j * p * f)
                pair_got = complex(got[t, h, 4 + 2 * pair].item(), got[t, h, 5 + 2 * pair].item())
                assert abs(pair_got - turned) < 1e-6, (t, h, pair, pair_got, turned)


def test_rotating_back_restores(rng: torch.Generator) -> None:
    x = torch.randn((5, 3, 128), generator=rng)
    positions = torch.tensor([0, 1, 127, 4096, 1048575])
    freqs = layer_frequencies(V4_FLASH, C4_LAYER, STRUCTURE)
    assert_close(rotate_back_ref(rotate_ref(x, positions, freqs), positions, freqs), x, 2e-6)
    assert (rotate_ref(x, positions, freqs)[1:] - x[1:]).abs().max() > 0.1
    assert_close(rotate_back_ref(x, positions, freqs)[:1], x[:1], 0.0)


def test_dot_products_depend_on_distance_only(rng: torch.Generator) -> None:
    q, k = (torch.randn((1, 64), generator=rng, dtype=torch.float64) for _ in range(2))
    freqs = frequencies(10000.0, 64)

    def dot(p: int, s: int) -> float:
        return float((rotate_ref(q, torch.tensor([p]), freqs) * rotate_ref(k, torch.tensor([s]), freqs)).sum())

    assert dot(60, 47) == pytest.approx(dot(13, 0), abs=1e-4)
    assert abs(dot(13, 0) - dot(0, 13)) > 1e-2, "the direction of the turn matters"


def test_base_frequencies() -> None:
    got = frequencies(10000.0, 64)
    want = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert got.dtype is torch.float32
    assert ((got.double() - want).abs() / want).max() < 1e-6


def test_yarn_of_the_released_models() -> None:
    """Pairs 0..15 untouched, 25..31 divided by 16, a straight line of weights between."""
    for config in (V4_FLASH, V4_PRO):
        base = frequencies(160000.0, 64).double()
        ratio = layer_frequencies(config, C4_LAYER, STRUCTURE).double() / base
        for i in range(32):
            ramp = min(max((i - 15) / (25 - 15), 0), 1)
            assert ratio[i].item() == pytest.approx(1 - ramp + ramp / 16, rel=1e-6), i


def test_yarn_at_the_theta_where_it_must_not_occur() -> None:
    """Bounds 20 and 33 at theta 10000: the upper one exceeds the number of pairs, so no pair is divided fully."""
    base = frequencies(10000.0, 64)
    ratio = yarn(base, 10000.0, 16.0, 65536, 32.0, 1.0) / base
    for i in range(32):
        ramp = min(max((i - 20) / (33 - 20), 0), 1)
        assert ratio[i].item() == pytest.approx(1 - ramp + ramp / 16, rel=1e-5), i


def test_yarn_with_both_bounds_equal_is_a_step() -> None:
    base = frequencies(10000.0, 64)
    scaled = yarn(base, 10000.0, 16.0, 6, 32.0, 1.0)  # so short a context that both bounds are below 0
    assert torch.isfinite(scaled).all()
    ratio = scaled / base
    assert set(torch.unique(ratio.round(decimals=5)).tolist()) == {0.0625, 1.0}


def test_which_layer_uses_what() -> None:
    plain = frequencies(10000.0, 64)
    assert torch.equal(layer_frequencies(V4_FLASH, SWA_LAYER, STRUCTURE), plain)
    assert torch.equal(layer_frequencies(V4_FLASH, V4_FLASH.n_layers, STRUCTURE), plain), "MTP"
    compressed = layer_frequencies(V4_FLASH, C4_LAYER, STRUCTURE)
    assert torch.equal(compressed, layer_frequencies(V4_FLASH, C128_LAYER, STRUCTURE))
    assert torch.equal(compressed, layer_frequencies(V4_PRO, 0, STRUCTURE)), "Pro compresses from layer 0"
    assert not torch.equal(compressed[:16], plain[:16])


def test_the_forks_yarn_on_swa_layers_can_be_reproduced() -> None:
    plain = layer_frequencies(V4_FLASH, SWA_LAYER, STRUCTURE)
    fork = layer_frequencies(V4_FLASH, SWA_LAYER, Numerics(yarn_on_swa=True))
    changed = (fork != plain).nonzero().flatten().tolist()
    assert changed == list(range(21, 32))
    turn = (plain - fork).max().item() * 128 * 180 / math.pi
    assert turn == pytest.approx(2.12, abs=0.01), "degrees across the window"


def test_angles_are_float32_products() -> None:
    """At a million positions the rounding of p * f is 0.03 radians; it is the same in every arithmetic dtype."""
    x = torch.tensor([[1.0, 0.0]])
    positions, freqs = torch.tensor([1048573]), torch.tensor([0.7])
    single, double = rotate_ref(x, positions, freqs), rotate_ref(x.double(), positions, freqs)
    assert_close(single, double, 1e-7)
    exact = math.cos(1048573 * freqs.double().item())
    assert abs(double[0, 0].item() - exact) > 1e-4


def test_wrong_arguments_are_refused() -> None:
    x, freqs = torch.zeros(2, 64), frequencies(10000.0, 64)
    with pytest.raises(ValueError, match=r"positions: got torch.int64 \(3,\), expected integers \[2\]"):
        rotate_ref(x, torch.arange(3), freqs)
    with pytest.raises(ValueError, match=r"positions: got torch.float32"):
        rotate_ref(x, torch.zeros(2), freqs)
    with pytest.raises(ValueError, match="x: got last dimension 32, expected at least the 64 rotary"):
        rotate_ref(x[:, :32], torch.arange(2), freqs)
