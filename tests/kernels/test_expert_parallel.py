"""Expert parallelism under torch.distributed: one process here, two under torchrun in the chapter's own tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.kernels.experts.expert_parallel import combine, expert_parallel, gather_tokens

pytestmark = pytest.mark.skipif(kernels.mode() != "interpreted", reason="gloo exchanges CPU tensors")


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one rank: what is left of the exchange is padding, remapping and slicing."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scaled(x: Tensor, weights: Tensor, local: Tensor) -> Tensor:
    """Expert e multiplies by e + 1."""
    factors = torch.where(local >= 0, (local + 1) * weights, 0.0).sum(dim=1, keepdim=True)
    return x.float() * factors


WHOLE = ExpertMap.placed(4, rank=0, ranks=1)


@pytest.mark.usefixtures("_alone")
def test_padding_rows_are_zeros_that_belong_to_nobody(rng: torch.Generator) -> None:
    x, weights = torch.randn((2, 3), generator=rng).bfloat16(), torch.rand((2, 6), generator=rng)
    experts = torch.arange(12, dtype=torch.int32).reshape(2, 6)
    got = gather_tokens(x, weights, experts, capacity=5)
    assert [tuple(t.shape) for t in got] == [(5, 3), (5, 6), (5, 6)]
    for tensor, given, fill in zip(got, (x, weights, experts), (0, 0, -1), strict=True):
        assert torch.equal(tensor[:2], given)
        assert (tensor[2:] == fill).all()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_own_rows_come_back_and_the_shared_expert_is_added_once(rows: int, rng: torch.Generator) -> None:
    x = torch.randn((rows, 3), generator=rng)
    weights = torch.rand((rows, 2), generator=rng)
    experts = torch.tensor([[0, 3], [-1, 2], [1, -1]], dtype=torch.int32)[:rows]
    calls = []

    def shared(tokens: Tensor) -> Tensor:
        calls.append(tokens.shape)
        return 100 * tokens

    y = expert_parallel(x, weights, experts, WHOLE, scaled, capacity=4, shared=shared)
    assert torch.allclose(y, scaled(x, weights, experts) + 100 * x, rtol=1e-6)
    assert calls == [(rows, 3)]
    alone = expert_parallel(x, weights, experts, WHOLE, scaled, capacity=4)
    assert torch.allclose(alone, scaled(x, weights, experts), rtol=1e-6)


X, W, E = torch.zeros(2, 3), torch.zeros(2, 6), torch.zeros((2, 6), dtype=torch.int32)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_map": WHOLE.table}, TypeError, "expert_map: got Tensor, expected an ExpertMap"),
        ({"expert_map": WHOLE.mask()}, TypeError, "expert_map: got Tensor, expected an ExpertMap"),
        (
            {"expert_map": ExpertMap.placed(4, rank=1, ranks=2)},
            ValueError,
            "expert_map: for rank 1 of 2, expected rank 0 of 1",
        ),
        ({"capacity": 1}, ValueError, "capacity: got 1, expected an integer of at least 2"),
        ({"capacity": 0, "x": X[:0], "weights": W[:0], "experts": E[:0]}, ValueError, "capacity: got 0"),
        ({"weights": W.double()}, TypeError, "weights: got torch.float64, expected torch.float32"),
        ({"experts": E.long()}, TypeError, "experts: got torch.int64, expected torch.int32"),
        ({"experts": E[:, :5]}, ValueError, "experts: got shape [2, 5], expected [2, 6]"),
        ({"x": X[:1]}, ValueError, "x: got shape [1, 3], expected [2, D]"),
        ({"x": None}, TypeError, "x: got NoneType, expected a torch.Tensor"),
        ({"local_experts": lambda x, w, e: x.bfloat16()}, TypeError, "parts: got torch.bfloat16"),
        ({"local_experts": lambda x, w, e: x[:1]}, ValueError, "parts: got shape [1, 3], expected [4, D]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": X, "weights": W, "experts": E, "expert_map": WHOLE, "local_experts": scaled, "capacity": 4, **change,
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        expert_parallel(**arguments)


@pytest.mark.usefixtures("_alone")
def test_more_rows_than_capacity_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: got 5, expected 0 to the capacity 4"):
        combine(torch.zeros(4, 3), rows=5, capacity=4)
