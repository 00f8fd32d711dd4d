"""Bounds are arithmetic over bytes, FLOPs and roofs; the roofs themselves need a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4ref.evidence.roofline import Bound, Level, Roofs, measure_roofs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measuring roofs needs a CUDA or ROCm GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_memory_binds_below_the_ridge_and_arithmetic_above_it() -> None:
    roofs = Roofs("card", copy_bytes_per_s=4e12, bf16_flops_per_s=800e12)
    below = roofs.bound(4_000_000, 400_000_000)
    assert (below.ridge, below.intensity, below.side, below.time_us) == (200.0, 100.0, "memory", 1.0)
    above = roofs.bound(4_000_000, 1_600_000_000)
    assert (above.intensity, above.side, above.time_us) == (400.0, "arithmetic", 2.0)
    assert above.sides_us == {"memory": 1.0, "arithmetic": 2.0}


def test_sides_tie_exactly_at_the_ridge() -> None:
    bound = Bound(1000, 200_000, 4e12, 800e12)
    assert bound.intensity == bound.ridge
    assert bound.sides_us["memory"] == pytest.approx(bound.sides_us["arithmetic"], rel=1e-15)


def test_attained_is_the_share_of_the_bound() -> None:
    bound = Bound(4_000_000, 0, 4e12, 1e12)
    assert bound.attained(1.0) == 100.0
    assert bound.attained(4.0) == 25.0
    for us in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="us: got"):
            bound.attained(us)


def test_further_level_binds_where_its_traffic_takes_longest() -> None:
    bound = Bound(4_000_000, 400, 4e12, 800e12, (Level("L2", 48_000_000, 12e12), Level("LDS", 10, 1e12)))
    assert (bound.side, bound.time_us) == ("L2", 4.0)
    assert bound.ridge == 200.0


def test_pure_arithmetic_has_infinite_intensity() -> None:
    bound = Bound(0, 800, 4e12, 800e12)
    assert bound.intensity == math.inf
    assert bound.side == "arithmetic"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1, 1), "bytes: got -1, expected a finite amount of at least 0"),
        ((1, math.nan, 1, 1), "flops: got nan"),
        ((1, 1, 0, 1), "bytes_per_s: got 0, expected a finite number above 0"),
        ((1, 1, 1, math.inf), "flops_per_s: got inf"),
        ((0, 0, 1, 1), "got no work at all"),
        ((1, 1, 1, 1, (Level("L2", 1, 1), Level("L2", 2, 1))), "levels: got the names"),
    ],
)
def test_bound_refuses_what_is_no_work_or_no_roof(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bound(*arguments)


def test_level_may_not_take_the_name_of_a_side() -> None:
    with pytest.raises(ValueError, match="name: got 'memory'"):
        Level("memory", 1, 1)


def test_roofs_are_measured_on_gpus_only() -> None:
    with pytest.raises(ValueError, match="device: got 'cpu', expected a 'cuda' device"):
        measure_roofs("cpu")


@needs_no_gpu
def test_measuring_roofs_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="measure_roofs: expected a CUDA or ROCm GPU"):
        measure_roofs()


@pytest.mark.gpu
@needs_gpu
def test_roofs_of_a_data_centre_card_are_plausible() -> None:
    roofs = measure_roofs()
    # Any card of the last decade copies above 0.1 TB/s, none above 20; likewise 10 TF and 10 PF in bf16.
    assert 1e11 < roofs.copy_bytes_per_s < 2e13, roofs
    assert 1e13 < roofs.bf16_flops_per_s < 1e16, roofs
    assert roofs.device_name == torch.cuda.get_device_name()
