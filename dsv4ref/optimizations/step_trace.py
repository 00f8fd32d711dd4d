"""A forward pass of the reference, watched: every ATen operator with its stage, layer, shapes and FLOPs.

The stages are those of `step_model`. The reference is not instrumented: reading a tensor of the checkpoint says which
stage has begun and in which layer, and so does the call of a function that reads none. An operator belongs to the stage
entered last. That is exact for matrix products; now and then an index or a cast counts with the stage before its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4ref.evidence.launches import Kind, operator_kind
from dsv4ref.optimizations.step_model import stage_of
from dsv4ref.ref import attention, model
from dsv4ref.ref.state import PlainRows
from dsv4ref.ref.weights import Weights

__all__ = ["Operator", "trace"]


@dataclass(frozen=True)
class Operator:
    """One ATen operator as it ran.

    Args:
        stage: key of `step_model.STAGES`.
        layer: None in a stage that runs once per step.
        name: of the operator, without its namespace.
        kind: what it would launch on a GPU, as `evidence.launches` counts; None for views and metadata.
        inputs: shapes of its tensor arguments.
        output: shape of its first tensor result, None if it has none.
        flops: 2 m n k of a matrix product, 0 otherwise.
    """

    stage: str
    layer: int | None
    name: str
    kind: Kind | None
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...] | None
    flops: int


def trace(call: Callable[[], object]) -> list[Operator]:
    """Run a forward pass of the reference and note every operator.

    Args:
        call: runs `forward_ref` on CPU tensors; its result is dropped.

    Returns:
        The operators in order.

    Raises:
        ValueError: ``call`` computes before it reads anything of a model.
    """
    watch = _Watch()
    with contextlib.ExitStack() as stack:
        for patch in watch.patches():
            stack.enter_context(patch)
        stack.enter_context(watch)
        call()
    return watch.operators


_ENTERED_BY_CALL: tuple[tuple[Any, str, str], ...] = (
    (attention, "head_norm_ref", "q_rope"),
    (attention, "index_scores_ref", "index_logits"),
    (attention, "select_ref", "topk"),
    (attention, "_row_keys", "attention"),
    (attention, "rotate_back_ref", "inverse_rope"),
)


class _Watch(TorchDispatchMode):
    """Notes operators, and where the forward pass is."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.stage: str | None = None
        self.layer: int | None = None

    def patches(self) -> Iterator[Any]:
        """Every place where a stage begins, wrapped."""
        read, gather, mix = Weights.raw, PlainRows.gather, model.hc_post_ref

        def raw(weights: Weights, name: str) -> Tensor:
            self.stage, self.layer = stage_of(weights._full(name))
            return read(weights, name)

        def gathered(rows: PlainRows, numbers: Tensor, dtype: torch.dtype) -> Tensor:
            if self.stage in ("index_weights", "topk"):  # the first query's keys, the next ones'
                self.stage = "index_logits"
            return gather(rows, numbers, dtype)

        def mixed(*args: Any) -> Tensor:
            self.stage = "hc_post_attn" if self.stage == "wo_b" else "hc_post_ffn"
            return mix(*args)

        yield mock.patch.object(Weights, "raw", raw)
        yield mock.patch.object(PlainRows, "gather", gathered)
        yield mock.patch.object(model, "hc_post_ref", mixed)
        for owner, name, stage in _ENTERED_BY_CALL:
            yield mock.patch.object(owner, name, self._entering(getattr(owner, name), stage))

    def _entering(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def entered(*args: Any) -> Any:
            self.stage = stage
            return function(*args)

        return entered

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::", 1)[1]
        inputs = tuple(tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        outputs = [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)]
        kind = operator_kind(func, args, kwargs, result)
        flops = _flops(name, inputs)
        if self.stage is None:  # positions and checks of the tokens, before the embedding is read
            if flops:
                raise ValueError(f"call: got {name} before any weight was read, expected a forward pass")
            stage = "embed"
        else:
            stage = self.stage
        self.operators.append(Operator(stage, self.layer, name, kind, inputs, outputs[0] if outputs else None, flops))
        return result


def _flops(name: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    """2 m n k of a matrix product; the reference uses no fused ones (addmm and its kin)."""
    if name in ("mm", "bmm"):
        (*batch, m, k), (*_, n) = shapes
        return 2 * m * k * n * (batch[0] if batch else 1)
    if name == "mv":
        m, k = shapes[0]
        return 2 * m * k
    if name == "dot":
        return 2 * shapes[0][0]
    if name in ("addmm", "baddbmm", "addmv", "addbmm", "linear", "einsum", "matmul"):
        raise ValueError(f"call: got {name}, whose FLOPs are not counted here; expected mm, bmm, mv or dot")
    return 0
