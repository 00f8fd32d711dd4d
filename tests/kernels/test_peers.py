"""Other people's kernels: absent without a GPU, refused under a borrowed name, and checked before they are timed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from decode_calls import Builder

from dsv4ref.kernels import peers
from dsv4ref.kernels.experts import Mxfp4Weights, plan_dispatch
from dsv4ref.kernels.peers import expert_layer, vllm_triton
from dsv4ref.kernels.peers.agreement import check_agreement
from dsv4ref.kernels.sparse_mla.prefill import sparse_mla_prefill

PARTS = ("matmul_ogs", "routing", "tensor", "tensor_details/layout")
ALONE = """
import vllm.envs as envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
_ON_GFX942 = current_platform.is_rocm()
kernels = (tl, triton)
@eager_break_during_capture
def seen():
    return _ON_GFX942, current_platform.is_fp8_fnuz()
"""
WITH_A_SPLIT = ALONE + "_sparse_attn_decode_partial_kernel = None\n"


@pytest.fixture
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No package of either name imported yet, and none of them afterwards."""

    def ours(name: str) -> bool:
        return name.split(".")[0] in ("triton_kernels", "vllm", "vllm_rocm_sparse")

    kept = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in kept:
        del sys.modules[name]
    found = (expert_layer._triton_kernels, vllm_triton._module)
    for cached in found:
        cached.cache_clear()
    yield monkeypatch
    for cached in found:
        cached.cache_clear()
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
    assert expert_layer._triton_kernels() is None
    assert peers.note(peers.TRITON_KERNELS) is None


def test_vllms_copy_serves_under_the_bare_name(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "vllm/third_party/triton_kernels", PARTS)
    fresh_imports.setattr(sys, "path", [str(tmp_path)])  # a copy installed on this machine must not answer instead
    found = expert_layer._triton_kernels()
    assert found is not None
    assert found.__name__ == "vllm.third_party.triton_kernels"
    assert sys.modules["triton_kernels.matmul_ogs"].__file__ == str(Path(found.__path__[0]) / "matmul_ogs.py")


def test_half_a_copy_leaves_the_bare_name_free(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "vllm/third_party/triton_kernels", PARTS[:1])
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    assert expert_layer._triton_kernels() is None
    assert "triton_kernels" not in sys.modules


def test_a_peer_that_only_rounds_otherwise_agrees(rng: torch.Generator) -> None:
    ours = torch.randn((8, 64), generator=rng)
    check_agreement((ours * (1 + 2**-8)).to(torch.bfloat16), ours.to(torch.bfloat16))
    check_agreement(torch.zeros((2, 4)), torch.zeros((2, 4)))  # no expert of the batch is local


@pytest.mark.parametrize("change", ["swapped rows", "one row", "nan"])
def test_a_peer_that_computes_something_else_is_refused(change: str, rng: torch.Generator) -> None:
    ours = torch.randn((8, 64), generator=rng)
    theirs = ours.roll(1, dims=0) if change == "swapped rows" else ours.clone()
    if change != "swapped rows":
        theirs[3] = {"one row": 0.0, "nan": float("nan")}[change]
    with pytest.raises(RuntimeError, match=r"peer: differs from our result by .* expected 0.03 of it"):
        check_agreement(theirs, ours)
    with pytest.raises(RuntimeError, match=r"peer: result \(7, 64\), expected \(8, 64\)"):
        check_agreement(theirs[:7], ours)


# --- vLLM's decode, alone or from vLLM ---


def one_file(where: Path, home: str, text: str) -> None:
    """A package that holds one module, its parents empty."""
    path = where / f"{home.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    for parent in path.parents[: home.count(".")]:
        (parent / "__init__.py").write_text("")
    path.write_text(text)


def test_the_file_alone_is_imported_and_what_stood_in_is_gone(
    fresh_imports: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_file(tmp_path, vllm_triton._ALONE, WITH_A_SPLIT)
    one_file(tmp_path, "vllm.third_party.something", "")  # another slice of vLLM that is imported already
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    slice_of_vllm = importlib.import_module("vllm.third_party.something")
    found = vllm_triton._module()
    assert found is not None
    assert found.__name__ == vllm_triton._ALONE
    assert found.kernels == (tl, triton)
    assert [name for name in sys.modules if name.startswith("vllm.")] == ["vllm.third_party", slice_of_vllm.__name__]
    assert sys.modules["vllm"].__file__ == str(tmp_path / "vllm/__init__.py")
    assert peers.note(peers.VLLM_TRITON) == f"{vllm_triton._ALONE} (vllm_rocm_sparse version unknown)"


def test_vllm_itself_comes_before_the_file_alone(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_file(tmp_path, vllm_triton._INSTALLED, "_sparse_attn_decode_partial_kernel = None\n")
    one_file(tmp_path, vllm_triton._ALONE, WITH_A_SPLIT)
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    found = vllm_triton._module()
    assert found is not None
    assert found.__name__ == vllm_triton._INSTALLED


def test_a_version_without_the_split_is_refused(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_file(tmp_path, vllm_triton._INSTALLED, "")
    one_file(tmp_path, vllm_triton._ALONE, ALONE)
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    assert vllm_triton._module() is None
    assert peers.note(peers.VLLM_TRITON) is None


def test_the_path_of_gfx942_is_taken_for_the_call_only(fresh_imports: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_file(tmp_path, vllm_triton._ALONE, WITH_A_SPLIT)
    fresh_imports.setattr(sys, "path", [str(tmp_path)])
    found = vllm_triton._module()
    assert found is not None

    def call() -> None:
        with vllm_triton._as_on_gfx942(found):
            assert found.seen() == (True, False)
            raise RuntimeError("in the call")

    with pytest.raises(RuntimeError, match="in the call"):
        call()
    assert found.seen() == (False, False)


def test_there_are_no_attention_peers_without_a_gpu(rng: torch.Generator, device: str) -> None:
    if device != "cpu":
        pytest.skip("kernels are compiled here")
    call = Builder(rng, device).small(rows=1, heads=64)
    lists, kv = torch.zeros((1, 128), dtype=torch.int32), torch.zeros((4, 512), dtype=torch.bfloat16)
    shared: dict[str, Any] = {
        "sink": call.sink, "scale": call.scale, "out": torch.empty_like(call.q), "ours": lambda: call.q
    }  # fmt: skip
    assert peers.vllm_sparse_decode(call.q, call.swa, call.extra, **shared) is None
    assert peers.flashmla_prefill(call.q, kv, lists, **shared) is None


def test_a_peer_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="variant: got 'FlashInfer', expected one of \\['FlashMLA', "):
        peers.note("FlashInfer")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 64])
def test_vllms_decode_agrees_and_a_wrong_result_is_refused(heads: int, rng: torch.Generator, device: str) -> None:
    if peers.vllm_note() is None:
        pytest.skip("no vLLM with this decode is installed")
    build = Builder(rng, device)
    call = build.call(build.lists([20, 0, 41], 64), build.lists([64, 3, 0], 64), heads=heads)
    out = torch.empty_like(call.q)
    shared: dict[str, Any] = {"sink": call.sink, "scale": call.scale}
    ours = call.run()[0]
    peer = peers.vllm_sparse_decode(call.q, call.swa, call.extra, **shared, out=out, ours=lambda: ours)
    assert peer is not None
    out.fill_(float("nan"))
    check_agreement(peer(), ours)
    with pytest.raises(RuntimeError, match="peer: differs from our result"):
        peers.vllm_sparse_decode(call.q, call.swa, None, **shared, out=out, ours=lambda: ours)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_flashmlas_prefill_agrees_and_what_it_does_not_take_has_no_peer(
    heads: int, rng: torch.Generator, device: str
) -> None:
    if peers.flashmla_note() is None:
        pytest.skip("no FlashMLA is installed")
    build = Builder(rng, device)
    q, kv = build.queries(3, heads), build.randn(300, 512, std=0.1).to(torch.bfloat16).to(device)
    indices = torch.tensor(build.lists([256] * 3, 300), dtype=torch.int32, device=device)
    sink, out = build.randn(heads).to(device), torch.full_like(q, float("nan"))
    ours = sparse_mla_prefill(q, kv, indices, sink=sink)[0]
    shared: dict[str, Any] = {"sink": sink, "scale": 512**-0.5, "out": out, "ours": lambda: ours}
    peer = peers.flashmla_prefill(q, kv, indices, **shared)
    assert peer is not None
    out.fill_(float("nan"))
    check_agreement(peer(), ours)
    assert peers.flashmla_prefill(q, kv, indices[:, :200].contiguous(), **shared) is None
    assert peers.flashmla_prefill(q[:, :16].contiguous(), kv, indices, **shared) is None
