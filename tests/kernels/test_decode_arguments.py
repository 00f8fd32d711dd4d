"""The decode launcher's boundary: every bad argument is one error that names it, what came and what was expected."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_calls import Builder, Call
from torch import Tensor

from dsv4ref.formats import Scope, kv_cache
from dsv4ref.formats.scope import ragged
from dsv4ref.kernels.sparse_mla.decode import sparse_mla_decode


@pytest.fixture
def build(rng: torch.Generator, device: str) -> Builder:
    return Builder(rng, device)


def _meta_scope() -> Scope:
    cache = kv_cache.allocate(1, 2, "e4m3fn", device="meta")
    indices, indptr = ragged([[0], [1]])
    return Scope(cache, indices.to("meta"), indptr.to("meta"), width=1)


def _refused(call: Call, error: type[Exception], message: str, **arguments: Any) -> None:
    fields = {"q": call.q, "swa": call.swa, "extra": call.extra, "sink": call.sink, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        sparse_mla_decode(fields.pop("q"), fields.pop("swa"), fields.pop("extra"), **fields)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("q", lambda c: c.q.tolist(), TypeError, "q: got list, expected a torch.Tensor"),
        ("q", lambda c: c.q.float(), TypeError, "q: got torch.float32, expected torch.bfloat16"),
        ("q", lambda c: c.q[0], ValueError, "q: got shape [4, 512], expected [T, H, 512]"),
        ("q", lambda c: c.q[..., :448], ValueError, "q: got shape [2, 4, 448], expected [T, H, 512]"),
        ("q", lambda c: c.q[:, :0], ValueError, "q: got 0 heads, expected at least 1"),
        ("q", lambda c: c.q.repeat(1, 1, 2)[..., ::2], ValueError, "q: got strides (4096, 1024, 2), expected a unit"),
        ("swa", lambda c: c.swa.cache, TypeError, "swa: got KVCache, expected a Scope"),
        ("swa", lambda c: None, TypeError, "swa: got NoneType, expected a Scope"),
        ("swa", lambda c: replace(c.swa, indptr=c.swa.indptr[:2]), ValueError, "swa: its indptr has 1 rows, expected"),
        ("swa", lambda c: _meta_scope(), ValueError, "swa: cache on meta, expected"),
        ("extra", lambda c: c.swa.cache, TypeError, "extra: got KVCache, expected a Scope"),
        ("extra", lambda c: replace(c.swa, indptr=c.swa.indptr[:1]), ValueError, "extra: its indptr has 0 rows"),
        ("extra", lambda c: _meta_scope(), ValueError, "extra: cache on meta, expected"),
        ("sink", lambda c: c.sink.double(), TypeError, "sink: got torch.float64, expected torch.float32"),
        ("sink", lambda c: 0.0, TypeError, "sink: got float, expected a torch.Tensor"),
        ("sink", lambda c: c.sink[:3], ValueError, "sink: got shape [3], expected [4]"),
        ("sink", lambda c: c.sink.repeat(2)[::2], ValueError, "sink: got strides (2,), expected a contiguous tensor"),
        ("sink", lambda c: c.sink.to("meta"), ValueError, "sink: on meta, expected"),
        ("scale", lambda c: 0.0, ValueError, "scale: got 0.0, expected a positive finite float"),
        ("scale", lambda c: -0.1, ValueError, "scale: got -0.1"),
        ("scale", lambda c: math.nan, ValueError, "scale: got nan"),
        ("scale", lambda c: math.inf, ValueError, "scale: got inf"),
        ("scale", lambda c: 1, ValueError, "scale: got 1, expected a positive finite float"),
        ("scale", lambda c: None, ValueError, "scale: got None"),
        ("out", lambda c: c.q.tolist(), TypeError, "out: got list, expected a torch.Tensor"),
        ("out", lambda c: c.q.float(), TypeError, "out: got torch.float32, expected torch.bfloat16"),
        ("out", lambda c: torch.empty_like(c.q)[:1], ValueError, "out: got shape [1, 4, 512], expected [2, 4, 512]"),
        ("out", lambda c: c.q.to("meta"), ValueError, "out: on meta, expected"),
        ("out", lambda c: c.q.repeat(1, 1, 2)[..., ::2], ValueError, "out: got strides (4096, 1024, 2), expected"),
        ("out", lambda c: c.q[:1].clone().expand(2, 4, 512), ValueError, "with strides (0, 512, 1) overlaps itself"),
        ("lse", lambda c: c.q[..., 0].clone(), TypeError, "lse: got torch.bfloat16, expected torch.float32"),
        ("lse", lambda c: c.sink.clone(), ValueError, "lse: got shape [4], expected [2, 4]"),
        ("lse", lambda c: torch.empty(2, 4, device="meta"), ValueError, "lse: on meta, expected"),
        ("lse", lambda c: c.sink.clone().expand(2, 4), ValueError, "lse: shape [2, 4] with strides (0, 1) overlaps"),
        ("launch", lambda c: "64x16x8", TypeError, "launch: got str, expected a LaunchShape"),
        ("launch", lambda c: (64, 16, 8), TypeError, "launch: got tuple, expected a LaunchShape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    argument: str, change: Any, error: type[Exception], message: str, build: Builder
) -> None:
    call = build.call([[1], [2]])
    _refused(call, error, message, **{argument: change(call)})


def _pooled(tensor: Tensor) -> Tensor:
    """A copy at the start of a pool that is large enough for an output."""
    pool = torch.zeros(tensor.numel() * tensor.element_size() + 8192, dtype=torch.uint8, device=tensor.device)
    copy = pool[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _over(victim: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that begins where another one does, in the same storage."""
    pool = torch.empty(0, dtype=dtype, device=victim.device).set_(victim.untyped_storage())
    return pool[: math.prod(shape)].view(shape)


def _with(scope: Scope, field: str, value: Any) -> Scope:
    return replace(scope, **{field: value})


INPUTS = {
    "q": "q",
    "swa cache": "the swa cache",
    "extra cache": "the extra cache",
    "swa indices": "the swa indices",
    "extra indices": "the extra indices",
    "swa indptr": "the swa indptr",
    "extra indptr": "the extra indptr",
    "sink": "sink",
}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("output", ["out", "lse"])
def test_an_output_that_shares_memory_with_an_input_is_refused(output: str, which: str, build: Builder) -> None:
    """Programs that finish early would write what others have yet to read."""
    call = build.call([[1], [2]], [[3], [4]])
    changes: dict[str, Any]
    if which in ("q", "sink"):
        victim = _pooled(getattr(call, which))
        changes = {which: victim}
    else:
        name, part = which.split()
        scope: Scope = getattr(call, name)
        victim = scope.cache.data if part == "cache" else _pooled(getattr(scope, part))
        changes = {} if part == "cache" else {name: _with(scope, part, victim)}
    call = replace(call, **changes)
    shape, dtype = ((2, 4, 512), torch.bfloat16) if output == "out" else ((2, 4), torch.float32)
    with pytest.raises(ValueError, match=f"{output}: its memory range overlaps {INPUTS[which]}'s by .* bytes"):
        call.run(**{output: _over(victim, shape, dtype)})


def test_out_and_lse_in_one_piece_of_memory_are_refused(build: Builder, device: str) -> None:
    call = build.call([[1], [2]])
    out = _pooled(torch.zeros((2, 4, 512), dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match="lse: its memory range overlaps out's by 32 bytes"):
        call.run(out=out, lse=_over(out, (2, 4), torch.float32))


def test_neighbours_in_one_pool_are_accepted(build: Builder) -> None:
    """Planners place tensors back to back; touching is not overlapping."""
    call = build.call([[1], [2]])
    pool = torch.empty((2, 2, 4, 512), dtype=torch.bfloat16, device=call.q.device)
    pool[0] = call.q
    call = replace(call, q=pool[0])
    call.check(call.run(out=pool[1])[0])
