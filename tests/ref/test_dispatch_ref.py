"""The integer reference of dispatch: small cases written out, and what must hold of any routing."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.ref.dispatch import dispatch_ref, expert_table_ref, remap_ref


def test_tables_written_out() -> None:
    linear = [expert_table_ref(5, rank, 2, "linear").tolist() for rank in range(2)]
    assert linear == [[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]]
    turns = [expert_table_ref(5, rank, 2, "round_robin").tolist() for rank in range(2)]
    assert turns == [[0, -1, 1, -1, 2], [-1, 0, -1, 1, -1]]


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (385, 4), (3, 5), (1, 1)])
def test_every_expert_has_one_owner(experts: int, ranks: int, placement: str) -> None:
    tables = torch.stack([expert_table_ref(experts, rank, ranks, placement) for rank in range(ranks)])
    assert ((tables >= 0).sum(dim=0) == 1).all()
    sizes = [(table >= 0).sum().item() for table in tables]
    assert max(sizes) - min(sizes) <= 1
    for table in tables:
        assert sorted(table[table >= 0].tolist()) == list(range(int((table >= 0).sum())))


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement: got 'random', expected 'linear' or 'round_robin'"):
        expert_table_ref(4, 0, 2, "random")


def test_ids_that_are_no_expert_do_not_wrap() -> None:
    table = torch.tensor([-1, 0, 1], dtype=torch.int32)
    assert remap_ref(torch.tensor([[-1, 0, 2], [3, 1, -4]]), table).tolist() == [[-1, -1, 1], [-1, 0, -1]]


def test_a_dispatch_written_out() -> None:
    plan = dispatch_ref(torch.tensor([[2, 0], [-1, 2], [2, 5]]), 3, block_m=2)
    assert plan.histogram.tolist() == [1, 0, 3]
    assert plan.offsets.tolist() == [0, 1, 1, 4]
    assert plan.gather.tolist() == [1, 0, 3, 4, -1, -1]
    assert plan.scatter.tolist() == [1, 0, -1, 2, 3, -1]
    assert plan.tile_expert.tolist() == [0, 2, 2]
    assert plan.tile_first.tolist() == [0, 1, 3]


def test_nothing_to_dispatch() -> None:
    plan = dispatch_ref(torch.zeros((0, 6), dtype=torch.int32), 4, block_m=16)
    assert plan.histogram.tolist() == [0] * 4
    assert plan.gather.numel() == plan.tile_expert.numel() == 0
