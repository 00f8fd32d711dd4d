"""Sparse MLA decode over paged FP8 caches: the kernels, the merge of partial results, the choice of launch shape."""

from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch
from dsv4ref.kernels.sparse_mla.merge import QueryRotation, merge_scopes
from dsv4ref.kernels.sparse_mla.two_scope import TwoScopeScratch, two_scope_decode

__all__ = [
    "LaunchShape",
    "QueryRotation",
    "TwoScopeScratch",
    "merge_scopes",
    "select_launch",
    "sparse_mla_decode",
    "two_scope_decode",
]
