"""Sparse MLA decode over paged FP8 caches: the kernels, the merge of partial results, launch shapes and splits."""

from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch
from dsv4ref.kernels.sparse_mla.merge import QueryRotation, merge_scopes
from dsv4ref.kernels.sparse_mla.prefill import sparse_mla_prefill
from dsv4ref.kernels.sparse_mla.rotate import rotate_rows
from dsv4ref.kernels.sparse_mla.split_decode import SplitScratch, plan_for, split_k_decode
from dsv4ref.kernels.sparse_mla.splits import Machine, SplitPlan, plan_splits
from dsv4ref.kernels.sparse_mla.two_scope import TwoScopeScratch, two_scope_decode

__all__ = [
    "LaunchShape",
    "Machine",
    "QueryRotation",
    "SplitPlan",
    "SplitScratch",
    "TwoScopeScratch",
    "merge_scopes",
    "plan_for",
    "plan_splits",
    "rotate_rows",
    "select_launch",
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "split_k_decode",
    "two_scope_decode",
]
