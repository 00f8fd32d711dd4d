"""Sparse MLA decode over paged FP8 caches: the kernel and the choice of its launch shape."""

from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import LaunchShape, select_launch

__all__ = ["LaunchShape", "select_launch", "sparse_mla_decode"]
