"""Chapter 06: let the decode kernel write into the caller's buffer instead of a scratch that is copied over.

Baseline: decode into ``empty_like(q)``, then ``output.copy_(scratch)``. Optimised: pass ``out=``. Bit-identical: the
same kernel with the same launch shape writes the same bytes, elsewhere.

What makes it a chapter is the contract that the copy provided for free: any strides, any dtype, no aliasing, and every
row overwritten. The gate therefore compares the caller's *whole* buffer, guard rows included.

Source: doubleword's vLLM fork, commit 27888ec80; vllm#50566 (the same, with preallocated split-K scratch).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.formats import Scope
from dsv4ref.formats.kv_cache import HEAD_DIM
from dsv4ref.kernels import checks
from dsv4ref.kernels.sparse_mla import select_launch, sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import table_for
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case
from dsv4ref.ref.sparse_attention import row_slots

__all__ = ["OPTIMIZATION", "OutputInputs"]

_GUARD_ROWS = 2
_GUARD_BITS = 0x7FA5
"""A bf16 NaN with a payload: a guard that was overwritten, even by another NaN, shows in the bytes."""

_COPY_LAUNCH_US = 2.0
"""Assumed cost of one more launch inside a graph, microseconds, on top of the bytes it moves."""


@dataclass(frozen=True)
class OutputInputs:
    """Decode inputs and the caller's buffer: where in it the output goes.

    Args:
        decode: attention inputs for T rows of H heads.
        buffer: bf16 ``[T + guards, heads >= H, 512]``, filled with the guard pattern.
        first_row, first_head: corner of the output inside the buffer.
    """

    decode: DecodeInputs
    buffer: Tensor
    first_row: int
    first_head: int

    def view(self, buffer: Tensor) -> Tensor:
        """The output's window ``[T, H, 512]`` in a buffer of this layout."""
        rows, heads, _ = self.decode.q.shape
        return buffer[self.first_row : self.first_row + rows, self.first_head : self.first_head + heads]


def _build(case: Case, device: str, seed: int) -> OutputInputs:
    decode = decode_inputs.build(case, device, seed)
    rows, heads, _ = decode.q.shape
    layout = case.params["layout"]
    if layout == "prefix":  # the first rows of a larger batch's output: output[:num_decode_tokens]
        shape, corner = (rows + _GUARD_ROWS, heads), (0, 0)
    elif layout == "middle":  # rows in the middle: decode tokens behind prefill tokens
        shape, corner = (rows + 2 * _GUARD_ROWS, heads), (_GUARD_ROWS, 0)
    elif layout == "heads":  # every row strided: this rank's heads inside a padded row
        shape, corner = (rows + _GUARD_ROWS, 2 * heads), (1, heads)
    else:
        raise ValueError(f"layout: got {layout!r}, expected 'prefix', 'middle' or 'heads'")
    bits = torch.full((*shape, HEAD_DIM), _GUARD_BITS, dtype=torch.int16, device=device)
    return OutputInputs(decode, bits.view(torch.bfloat16), *corner)


def _decode_into(inputs: DecodeInputs, out: Tensor) -> None:
    sparse_mla_decode(inputs.q, inputs.swa, inputs.extra, sink=inputs.sink, scale=inputs.scale, out=out)


def _decode_and_copy(inputs: DecodeInputs, out: Tensor) -> None:
    scratch = torch.empty_like(inputs.q)
    _decode_into(inputs, scratch)
    out.copy_(scratch)


def _run(inputs: OutputInputs, write: Callable[[DecodeInputs, Tensor], None]) -> dict[str, Tensor]:
    buffer = inputs.buffer.clone()
    out = inputs.view(buffer)
    write(inputs.decode, out)
    return {"buffer": buffer, "out": out}


def _baseline(inputs: OutputInputs) -> dict[str, Tensor]:
    return _run(inputs, _decode_and_copy)


def _optimized(inputs: OutputInputs) -> dict[str, Tensor]:
    return _run(inputs, _decode_into)


def _reference(inputs: OutputInputs) -> dict[str, Tensor]:
    return {"out": decode_inputs.reference(inputs.decode)["out"]}


def _yardstick(inputs: OutputInputs) -> dict[str, Tensor]:
    return {"out": decode_inputs.plain(inputs.decode)["out"]}


def _timed(inputs: OutputInputs) -> Mapping[str, Callable[[], object]]:
    out = inputs.view(inputs.buffer)
    return {
        "baseline": lambda: _decode_and_copy(inputs.decode, out),
        "optimized": lambda: _decode_into(inputs.decode, out),
    }


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device) if p["rows"] else None  # an empty batch takes no time to compare
    shape = select_launch(spec.arch if spec else "cpu", p["rows"], p["heads"], p["extra"] or 0)
    vector = decode_model.vector_bytes(p)
    moved = decode_model.key_bytes(p, shape) + 2 * vector
    decode_us = decode_model.decode_time_us(p, shape, spec) if spec else None
    copy_us = None
    if spec is not None and spec.bandwidth_tb_s is not None:
        copy_us = 2 * vector / (spec.bandwidth_tb_s * 1e6) + _COPY_LAUNCH_US
    return Prediction(
        baseline_bytes=moved + 2 * vector,
        optimized_bytes=moved,
        least_bytes=decode_model.least_bytes(p),
        flops=decode_model.decode_flops(p),
        baseline_launches=2,
        optimized_launches=1,
        baseline_us=None if decode_us is None or copy_us is None else decode_us + copy_us,
        optimized_us=decode_us,
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason="one launch less, and one read and one write of the output",
    )


# --- hazards ---


@contextlib.contextmanager
def _overlap_unchecked() -> Iterator[None]:
    """The launcher as it would be without its aliasing check."""
    with mock.patch.object(checks, "check_no_overlap", return_value=None):
        yield


def _output_shares_query_memory(inputs: OutputInputs) -> dict[str, Tensor]:
    """q and the output live in one allocation, one row apart; the first row is a call of its own."""

    def write(decode: DecodeInputs, out: Tensor) -> None:
        rows = decode.q.shape[0]
        shared = torch.empty((rows + 1, *decode.q.shape[1:]), dtype=decode.q.dtype, device=decode.q.device)
        query, result = shared[:-1], shared[1:]
        query.copy_(decode.q)
        with _overlap_unchecked():
            for begin, end in ((0, 1), (1, rows)):
                part = _rows_of(replace(decode, q=query), begin, end)
                _decode_into(part, result[begin:end])
        out.copy_(result)

    return _run(inputs, write)


def _rows_of(decode: DecodeInputs, begin: int, end: int) -> DecodeInputs:
    def cut(scope: Scope) -> Scope:
        first = int(scope.indptr[begin])
        return replace(
            scope,
            indices=scope.indices[first : int(scope.indptr[end])].clone(),
            indptr=scope.indptr[begin : end + 1] - first,
        )

    extra = None if decode.extra is None else cut(decode.extra)
    return replace(decode, q=decode.q[begin:end], swa=cut(decode.swa), extra=extra)


def _strides_ignored(inputs: OutputInputs) -> dict[str, Tensor]:
    """The kernel is told the output is contiguous."""

    def write(decode: DecodeInputs, out: Tensor) -> None:
        rows, heads, dim = out.shape
        _decode_into(decode, out.as_strided((rows, heads, dim), (heads * dim, dim, 1)))

    return _run(inputs, write)


def _absolute_offset(inputs: OutputInputs) -> dict[str, Tensor]:
    """The output view is rebuilt with ``as_strided`` and an absolute storage offset of zero."""

    def write(decode: DecodeInputs, out: Tensor) -> None:
        _decode_into(decode, out.as_strided(out.shape, out.stride(), 0))

    return _run(inputs, write)


def _empty_rows_unwritten(inputs: OutputInputs) -> dict[str, Tensor]:
    """Rows without a valid slot return early: the caller's buffer keeps what it held."""

    def write(decode: DecodeInputs, out: Tensor) -> None:
        before = out.clone()
        _decode_into(decode, out)
        for row in range(out.shape[0]):
            if all(row_slots(scope, row).numel() == 0 for scope in decode.scopes):
                out[row] = before[row]

    return _run(inputs, write)


def _with_layout(case: Case, layout: str, **changes: Any) -> Case:
    return replace(case, params={**case.params, "layout": layout}, **changes)


_TINY = {case.name: case for case in decode_inputs.tiny_and_odd_cases()}
_CASES = (
    _with_layout(_TINY["tiny"], "prefix", about="output[:num_decode_tokens] of a larger batch"),
    _with_layout(_TINY["tiny-ragged"], "middle", about="decode rows behind prefill rows; empty rows"),
    _with_layout(_TINY["tiny-fnuz"], "heads", about="a slice of padded heads: rows and heads strided"),
    _with_layout(_TINY["flash-tp4-3"], "heads"),
    _with_layout(_TINY["flash-74"], "middle"),
    _with_layout(decode_case("flash-none", rows=0, heads=64, about="an empty batch"), "prefix", tiny=True),
    *(_with_layout(case, "prefix") for case in decode_inputs.production_cases()),
)

OPTIMIZATION = Optimization(
    id="output_passthrough",
    number=6,
    title="Output pass-through",
    part="II sparse MLA decode",
    sources=("doubleword vLLM fork, commit 27888ec80", "vllm#50566"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_yardstick,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate((Check("buffer", "bit"), Check("out", "budget", "attention_bf16"))),
    hazards={
        "shared-memory": Hazard(
            title="the output aliases the query",
            story="Freed memory is reused: a planner puts the output where q was, shifted. The copy hid it: the "
            "scratch was complete before anything was overwritten.",
            source="ATOM commit 876dc004c (an aliasing view: 52.5 -> 82.5 % after the fix)",
            ids=("H27",),
            case="tiny",
            planted=_output_shares_query_memory,
        ),
        "strides-ignored": Hazard(
            title="the output's strides are not passed to the kernel",
            story="A kernel that assumes [T, H, 512] contiguous works on every fresh tensor and scatters into the "
            "neighbouring heads of a slice.",
            source="no report of this very bug; ATOM#1904 (rows addressed wrongly, 0.36 -> 0.958 when fixed) is akin",
            ids=("H27",),
            case="tiny-fnuz",
            planted=_strides_ignored,
        ),
        "absolute-offset": Hazard(
            title="a view rebuilt with an absolute storage offset",
            story="as_strided's offset counts from the storage, not from the tensor it is called on; zero means the "
            "start of the batch's buffer.",
            source="ATOM#1775 (a missing storage_offset()); ATOM commit 876dc004c",
            ids=("H27",),
            case="tiny-ragged",
            planted=_absolute_offset,
        ),
        "empty-rows": Hazard(
            title="rows without a valid slot are left unwritten",
            story="AITER's sparse decode returns early for an empty row when there is one split. In a fresh scratch "
            "that is garbage nobody reads; in the caller's buffer it is the previous step's answer.",
            source="AITER pa_decode_sparse at e4048607a (read and run in the interpreter); vllm#46408",
            ids=("H12",),
            case="tiny-ragged",
            planted=_empty_rows_unwritten,
        ),
    },
    predict=_predict,
    claims=records.published("output_passthrough"),
    timed=_timed,
    measured_modules=decode_model.MEASURED_MODULES,
    kernels=lambda arch: tuple(
        decode_model.compile_request(shape, arch) for shape in dict.fromkeys(r.shape for r in table_for(arch))
    ),
)
