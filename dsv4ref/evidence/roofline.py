"""Bounds: the time that an operation cannot beat, from its bytes and FLOPs and the machine's roofs.

`Bound` is arithmetic and runs anywhere. `measure_roofs` measures the two roofs of the current GPU, in the run whose
points are held against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dsv4ref.evidence.timing import percentiles, require_gpu, sample_events

COPY_BYTES = 1 << 30  # one direction; far above any last-level cache
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Level:
    """Traffic through one more level of the memory hierarchy: `bytes` at `bytes_per_s` bytes per second."""

    name: str
    bytes: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not self.name or self.name in ("memory", "arithmetic"):
            raise ValueError(f"name: got {self.name!r}, expected a name other than 'memory' and 'arithmetic'")
        _check_work("bytes", self.bytes)
        _check_rate("bytes_per_s", self.bytes_per_s)


@dataclass(frozen=True)
class Bound:
    """The time bound of an operation that moves `bytes` and computes `flops`.

    Args:
        bytes: through device memory, each operand counted as often as it must move.
        flops: operations on the unit whose rate is given; a multiply-add is two.
        bytes_per_s: memory bandwidth, bytes per second.
        flops_per_s: arithmetic rate, FLOPs per second.
        levels: further levels (L2, shared memory) that bound the time by their own traffic.

    Raises: ValueError for a negative or non-finite amount, a rate that is not positive, or no work at all.
    """

    bytes: float
    flops: float
    bytes_per_s: float
    flops_per_s: float
    levels: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        _check_work("bytes", self.bytes)
        _check_work("flops", self.flops)
        _check_rate("bytes_per_s", self.bytes_per_s)
        _check_rate("flops_per_s", self.flops_per_s)
        names = [level.name for level in self.levels]
        if len(set(names)) != len(names):
            raise ValueError(f"levels: got the names {names}, expected each once")
        if max(self.sides_us.values()) == 0:
            raise ValueError("bytes, flops: got no work at all, expected at least one of them above 0")

    @property
    def sides_us(self) -> dict[str, float]:
        """The time that each side alone would take, in microseconds: 'memory', 'arithmetic' and each level's name."""
        times = {
            "memory": 1e6 * self.bytes / self.bytes_per_s,
            "arithmetic": 1e6 * self.flops / self.flops_per_s,
        }
        times.update({level.name: 1e6 * level.bytes / level.bytes_per_s for level in self.levels})
        return times

    @property
    def time_us(self) -> float:
        """The bound: the slowest side's time, in microseconds, as if the others were hidden behind it."""
        return max(self.sides_us.values())

    @property
    def side(self) -> str:
        """The side that binds; the first of memory, arithmetic, levels where two tie."""
        times = self.sides_us
        return max(times, key=lambda name: times[name])

    @property
    def intensity(self) -> float:
        """FLOPs per byte of device memory; infinite where no byte moves."""
        return self.flops / self.bytes if self.bytes else math.inf

    @property
    def ridge(self) -> float:
        """The intensity at which memory and arithmetic take equally long, FLOPs per byte."""
        return self.flops_per_s / self.bytes_per_s

    def attained(self, us: float) -> float:
        """What share of the bound a measured time reaches, in percent; 100 is the bound itself.

        Raises: ValueError if `us` is not a positive number of microseconds.
        """
        _check_rate("us", us)
        return 100 * self.time_us / us


@dataclass(frozen=True)
class Roofs:
    """Measured roofs of one GPU: copy bandwidth (bytes read plus bytes written, per second) and bf16 matrix rate."""

    device_name: str
    copy_bytes_per_s: float
    bf16_flops_per_s: float

    def bound(self, bytes: float, flops: float, levels: tuple[Level, ...] = ()) -> Bound:
        """The bound of `bytes` of device memory traffic and `flops` of bf16 matrix work under these roofs."""
        return Bound(bytes, flops, self.copy_bytes_per_s, self.bf16_flops_per_s, levels)


def measure_roofs(device: torch.device | str = "cuda", *, repeats: int = 30) -> Roofs:
    """Measure copy bandwidth and bf16 matrix rate on a GPU, medians of `repeats` event-timed calls on random data.

    The copy is the faster of the runtime's copy and an elementwise kernel (some runtimes copy below what a kernel
    reaches), 1 GiB each way. The matrix product is 8192 x 8192 x 8192.

    Args:
        device: a CUDA or ROCm device with about 4 GiB free.
        repeats: samples of each, at least 1.

    Raises: ValueError for a device that is no GPU or `repeats` below 1; RuntimeError without a GPU.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device: got {str(device)!r}, expected a 'cuda' device (ROCm goes by that name too)")
    require_gpu("measure_roofs")
    with torch.cuda.device(device):
        return Roofs(
            device_name=torch.cuda.get_device_name(),
            copy_bytes_per_s=2 * COPY_BYTES / (1e-6 * _copy_us(repeats)),
            bf16_flops_per_s=2 * MATMUL_SIZE**3 / (1e-6 * _matmul_us(repeats)),
        )


def _copy_us(repeats: int) -> float:
    source = torch.randn(COPY_BYTES // 4, dtype=torch.float32, device="cuda", generator=_generator())
    target = torch.empty_like(source)
    runtime = sample_events(lambda: target.copy_(source), repeats=repeats, warmup=5)
    kernel = sample_events(lambda: torch.neg(source, out=target), repeats=repeats, warmup=5)
    return min(percentiles(runtime, (50,))[0], percentiles(kernel, (50,))[0])


def _matmul_us(repeats: int) -> float:
    generator = _generator()
    left, right = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    product = torch.empty_like(left)
    return percentiles(sample_events(lambda: torch.mm(left, right, out=product), repeats=repeats, warmup=10), (50,))[0]


def _generator() -> torch.Generator:
    """One of our own, so that measuring the roofs does not shift anybody's random inputs."""
    return torch.Generator(device="cuda").manual_seed(0)


def _check_work(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: got {value}, expected a finite amount of at least 0")


def _check_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")
