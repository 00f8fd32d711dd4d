"""What every test shares: where kernels run, seeds, and the reason why a GPU test is skipped."""

from __future__ import annotations

import zlib

import dsv4ref.kernels  # before anything imports triton: this decides whether kernels are compiled or interpreted

# isort: split
import hypothesis
import pytest
import torch

from dsv4ref import settings

# Examples depend on the test only. Interpreted kernels are slow enough for hypothesis' deadline to be noise.
hypothesis.settings.register_profile("dsv4ref", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dsv4ref")


def pytest_report_header() -> str:
    seed = settings.get("DSV4REF_SEED")
    return f"dsv4ref.kernels: {dsv4ref.kernels.__file__}, {dsv4ref.kernels.mode()}; DSV4REF_SEED={seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; torch sees none"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors for kernels go: "cuda" if kernels are compiled, "cpu" if they are interpreted."""
    return "cuda" if dsv4ref.kernels.mode() == "compiled" else "cpu"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this very test and of ``DSV4REF_SEED``: selecting or reordering tests changes no inputs."""
    return (zlib.crc32(request.node.nodeid.encode()) ^ settings.get("DSV4REF_SEED")) & 0x7FFFFFFF


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a test has the same inputs on every device."""
    return torch.Generator().manual_seed(seed)
