"""Other people's kernels: absent without a GPU, refused under a borrowed name, and checked before they are timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4ref.kernels import peers
from dsv4ref.kernels.experts import Mxfp4Weights, plan_dispatch

PARTS = ("matmul_ogs", "routing", "tensor", "tensor_details/layout")


@pytest.fixture
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No package of either name imported yet, and none of them afterwards."""

    def ours(name: str) -> bool:
        return name.split(".")[0] in ("triton_kernels", "vllm")

    kept = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in kept:
        del sys.modules[name]
    peers._triton_kernels.cache_clear()
    yield monkeypatch
    peers._triton_kernels.cache_clear()
    for name in [name for name in sys.modules if ours(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def package(where: Path, parts: tuple[str, ...]) -> None:
    """An importable package of empty modules, the second of which imports the first by the package's bare name."""
    for number, part in enumerate(("__init__", *parts)):
        path = where / f"{part}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import triton_kernels.matmul_ogs\n" if number == 2 else "")


def test_there_is_no_expert_peer_without_a_gpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("kernels are compiled here, and the plan's take no CPU tensors")
    experts = torch.zeros((2, 1), dtype=torch.int32)
    w = Mxfp4Weights(torch.zeros((1, 256, 64), dtype=torch.uint8), torch.zeros((1, 256, 4), dtype=torch.uint8))
    x, weights = torch.zeros((2, 128), dtype=torch.bfloat16), torch.ones((2, 1))
    plan = plan_dispatch(experts, num_experts=1, block_m=16)
    assert peers.triton_kernels_layer(x, w, w, weights, plan, limit=None, ours=lambda: x) is None


def test_an_unrelated_package_of_that_name_is_refused(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "triton_kernels", ())
    fresh_imports.syspath_prepend(str(tmp_path))
    assert peers._triton_kernels() is None
    assert peers.note(peers.TRITON_KERNELS) is None


def test_vllms_copy_serves_under_the_bare_name(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "vllm/third_party/triton_kernels", PARTS)
    fresh_imports.setattr(sys, "path", [str(tmp_path)])  # a copy installed on this machine must not answer instead
    found = peers._triton_kernels()
    assert found is not None
    assert found.__name__ == "vllm.third_party.triton_kernels"
    assert sys.modules["triton_kernels.matmul_ogs"].__file__ == str(Path(found.__path__[0]) / "matmul_ogs.py")


def test_half_a_copy_leaves_the_bare_name_free(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "vllm/third_party/triton_kernels", PARTS[:1])
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    assert peers._triton_kernels() is None
    assert "triton_kernels" not in sys.modules


def test_a_peer_that_only_rounds_otherwise_agrees(rng: torch.Generator) -> None:
    ours = torch.randn((8, 64), generator=rng)
    peers._check_agreement((ours * (1 + 2**-8)).to(torch.bfloat16), ours.to(torch.bfloat16))
    peers._check_agreement(torch.zeros((2, 4)), torch.zeros((2, 4)))  # no expert of the batch is local


@pytest.mark.parametrize("change", ["swapped rows", "one row", "nan"])
def test_a_peer_that_computes_something_else_is_refused(change: str, rng: torch.Generator) -> None:
    ours = torch.randn((8, 64), generator=rng)
    theirs = ours.roll(1, dims=0) if change == "swapped rows" else ours.clone()
    if change != "swapped rows":
        theirs[3] = {"one row": 0.0, "nan": float("nan")}[change]
    with pytest.raises(RuntimeError, match=r"peer: differs from our result by .* expected 0.03 of it"):
        peers._check_agreement(theirs, ours)
    with pytest.raises(RuntimeError, match=r"peer: result \(7, 64\), expected \(8, 64\)"):
        peers._check_agreement(theirs[:7], ours)
