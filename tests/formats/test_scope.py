"""Scopes: ragged lists packed and described, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4ref.formats import Scope, kv_cache
from dsv4ref.formats.scope import ragged

CACHE = kv_cache.allocate(2, 2, "e4m3fn")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_lists_are_packed_one_after_another() -> None:
    indices, indptr = ragged([[5, -1], [], [3, 3, 0]])
    assert indices.tolist() == [5, -1, 3, 3, 0]
    assert indptr.tolist() == [0, 2, 2, 5]
    assert indices.dtype is indptr.dtype is torch.int32


@pytest.mark.parametrize(("lists", "indptr"), [([], [0]), ([[]], [0, 0]), ([[], []], [0, 0, 0])])
def test_no_lists_and_empty_lists_are_packed(lists: list[list[int]], indptr: list[int]) -> None:
    got_indices, got_indptr = ragged(lists)
    assert got_indices.tolist() == []
    assert got_indices.dtype is torch.int32
    assert got_indptr.tolist() == indptr


def test_a_scope_knows_its_query_rows() -> None:
    assert Scope(CACHE, *ragged([[0], [1, 2], []]), width=2).num_queries == 3
    assert Scope(CACHE, *ragged([]), width=0).num_queries == 0


def test_lists_may_be_longer_than_what_is_used() -> None:
    """Static buffers of a captured graph: capacity for the widest step, indptr says what counts."""
    scope = Scope(CACHE, int32(1, 2, 3, 99), int32(0, 1, 3), width=4)
    assert scope.num_queries == 2


FIELDS: dict[str, Any] = {"cache": CACHE, "indices": int32(0, 1), "indptr": int32(0, 2), "width": 2}


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("indices", torch.tensor([0, 1]), TypeError, "indices: got torch.int64, expected torch.int32"),
        ("indptr", torch.tensor([0.0, 2.0]), TypeError, "indptr: got torch.float32, expected torch.int32"),
        ("indices", int32(0, 1)[None], ValueError, "indices: got shape (1, 2) strides (2, 1), expected 1-D contiguous"),
        ("indices", int32(0, 1, 2, 3)[::2], ValueError, "indices: got shape (2,) strides (2,), expected 1-D"),
        ("indptr", int32(0, 1, 2, 3)[::2], ValueError, "indptr: got shape (2,) strides (2,), expected 1-D"),
        ("indices", int32(0, 1).to("meta"), ValueError, "indices: on meta, expected cpu like the cache"),
        ("indptr", int32(0, 2).to("meta"), ValueError, "indptr: on meta, expected cpu like the cache"),
        ("indptr", int32(), ValueError, "indptr: got no elements, expected T + 1 (at least 1)"),
        ("width", -1, ValueError, "width: got -1, expected a non-negative integer"),
        ("width", 2.0, ValueError, "width: got 2.0, expected a non-negative integer"),
    ],
)
def test_bad_fields_are_named(field: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Scope(**{**FIELDS, field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cache", CACHE.data, "cache: got Tensor, expected a KVCache"),
        ("indices", [0, 1], "indices: got list, expected a torch.Tensor"),
        ("indptr", (0, 2), "indptr: got tuple, expected a torch.Tensor"),
    ],
)
def test_other_types_are_refused_by_field(field: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        Scope(**{**FIELDS, field: value})
