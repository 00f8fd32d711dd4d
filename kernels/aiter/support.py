"""Which shapes AITER has a kernel for, as data, and a question to ask of it before a launch.

AITER answers an unsupported shape with an AssertionError, with "cannot get heuristic kernel", or by returning an
infinite LSE. The rows below are what can be asked for: the shapes DeepSeek-V4 decodes with (8 to 128 heads on a rank)
on gfx942 and gfx950. What is not listed is not known to work; nothing here was run on an AMD GPU.

Sources: ROCm/aiter at e4048607a for the entries' own checks. The assembly kernels behind ``mla_decode_fwd`` are listed
in ``hsa/<arch>/mla/mla_asm.csv``, whose rows were read again at 074f473a2 (gfx942) and 0462c5383 (gfx950), and chosen
from in ``csrc/py_itfs_cu/asm_mla.cu``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ARCHS", "COMMIT", "MATRIX", "Answer", "Kernel", "matrix_rows", "query"]

COMMIT = "e4048607a"
"""The ROCm/aiter commit that the entries were read at."""

ARCHS = ("gfx942", "gfx950")

_CSV = "hsa/{arch}/mla/mla_asm.csv"
_ASM = "csrc/py_itfs_cu/asm_mla.cu"
_V4_NM = "aiter/mla.py, mla_decode_fwd_v4_nm; csrc/py_itfs_cu/asm_mla_v4.cu"
_V40 = "aiter/mla.py, mla_v40_decode_fwd; aiter#3459"
_SPARSE = "aiter/ops/triton/attention/pa_decode_sparse.py"
_TWO_SPLITS = "lse: two KV splits at least: the one-split kernel writes no LSE (vLLM 0.33.0, _aiter_ops.py)"


@dataclass(frozen=True)
class Kernel:
    """One shape that an entry serves.

    Args:
        entry: the function, as `contract` names it.
        arch: ``gfx942`` or ``gfx950``.
        heads: query heads on this rank, all on one KV head.
        query_length: query tokens per sequence; 0 is any.
        q_dtype, kv_dtype: ``"fp8"``, ``"bf16"``, ``"fp16"``, or ``"fp8+bf16"`` for fp8 nope beside bf16 rope. Which fp8
            dialect follows from ``arch``.
        persistent: needs a work plan (`get_mla_metadata_v1`).
        lse: returns a natural-log LSE that can be merged.
        note: what to know before using it.
        source: file in ROCm/aiter at `COMMIT`, or the thread.
    """

    entry: str
    arch: str
    heads: int
    query_length: int
    q_dtype: str
    kv_dtype: str
    persistent: bool
    lse: bool
    note: str
    source: str

    def __str__(self) -> str:
        length = "any length" if self.query_length == 0 else f"length {self.query_length}"
        mode = "persistent" if self.persistent else "not persistent"
        with_lse = "with LSE" if self.lse else "no LSE"
        return f"{self.heads} heads, {length}, {self.q_dtype}/{self.kv_dtype}, {mode}, {with_lse} on {self.arch}"


def _asm(arch: str, dtypes: str, shapes: Mapping[tuple[int, int], str], *, persistent: bool) -> tuple[Kernel, ...]:
    """Kernels of ``mla_decode_fwd``: (heads, query length) -> "lse" or "", optionally followed by ": note"."""
    q_dtype, kv_dtype = dtypes.split("/")
    kernels = []
    for (heads, length), text in shapes.items():
        has_lse, _, note = text.partition(":")
        source = _CSV.format(arch=arch)
        kernels.append(
            Kernel("mla_decode_fwd", arch, heads, length, q_dtype, kv_dtype, persistent, has_lse == "lse",
                   note.strip(), source)
        )  # fmt: skip
    return tuple(kernels)


_FOLDED = ": planned as twice as many rows of 16 heads"
_INF_LSE = ": its LSE kernel returned +inf; ROCm/vllm#900 calls it twice with 32 heads instead"
_FAULTS = "lse: reported to fault the GPU (aiter#4957)"
_FALLS_BACK = "lse: without num_kv_splits, AITER leaves the persistent path from 32 rows on"
_PADDED = ": padded to length 4"

MATRIX: tuple[Kernel, ...] = (
    *_asm("gfx942", "fp8/fp8", {(16, 1): "", (16, 2): "", (16, 4): "", (32, 1): _FOLDED, (64, 1): _FAULTS,
                                (128, 0): ""}, persistent=True),
    *_asm("gfx942", "bf16/bf16", {(8, 2): "", (16, 1): _PADDED, (16, 2): _PADDED, (16, 4): ""}, persistent=True),
    *_asm("gfx942", "fp8/fp8", dict.fromkeys(((8, 1), (16, 1), (16, 2), (16, 4), (128, 0)), _TWO_SPLITS),
          persistent=False),
    *_asm("gfx942", "bf16/bf16", {**dict.fromkeys(((8, 1), (16, 1), (16, 4), (32, 0), (64, 0)), _TWO_SPLITS),
                                  (128, 0): f"{_TWO_SPLITS}; persistent is ignored for this shape"}, persistent=False),
    *_asm("gfx950", "fp8/fp8", {(8, 4): "lse", (16, 1): "lse", (16, 2): "", (16, 4): "lse", (32, 1): "lse",
                                (32, 4): "lse", (64, 1): _INF_LSE}, persistent=True),
    *_asm("gfx950", "bf16/bf16", {(16, 1): _FALLS_BACK, (16, 2): f"lse{_PADDED}", (16, 4): "lse", (32, 4): "lse",
                                  (64, 1): "lse"}, persistent=True),
    *(Kernel("mla_decode_fwd_v4_nm", "gfx950", heads, length, "fp8+bf16", "fp8+bf16", False, False,
             "sink folded in; its attn_lse holds partials of splits", _V4_NM)
      for heads, length in ((16, 1), (16, 2), (16, 4), (32, 1), (64, 1), (128, 1))),
    *(Kernel("mla_v40_decode_fwd", "gfx950", heads, length, "fp8+bf16", "fp8+bf16", True, True,
             "AITER_ENABLE_EXPERIMENTAL=1, else NotImplementedError; heads x length is 64 or 128", _V40)
      for heads, length in ((16, 4), (32, 2), (32, 4), (64, 1), (64, 2), (128, 1))),
    *(Kernel("pa_decode_sparse", arch, heads, 1, "bf16", kv_dtype, False, False,
             "skip_reduce returns partials in base 2; one split leaves empty rows unwritten"
             + ("; fp8 codes must be e4m3fnuz" if kv_dtype == "fp8" else ""), _SPARSE)
      for arch in ARCHS for heads in (16, 32, 64, 128) for kv_dtype in ("bf16", "fp8")),
)  # fmt: skip
"""Every shape that is known to have a kernel, by entry. `query` asks; `matrix_rows` is the same as plain rows."""


@dataclass(frozen=True)
class Answer:
    """What the matrix says of one call.

    Args:
        supported: there is a kernel.
        kernel: its row; None if there is none.
        reason: why not, in a sentence; empty if supported.
        nearest: the row that needs the fewest changes, or None if the entry has no kernel at all.
    """

    supported: bool
    kernel: Kernel | None
    reason: str
    nearest: Kernel | None


def query(
    entry: str, *, arch: str, heads: int, query_length: int, q_dtype: str, kv_dtype: str, persistent: bool, lse: bool
) -> Answer:
    """Ask whether a call has a kernel, why not, and what comes nearest.

    Args: as the fields of `Kernel`; ``lse`` is whether the caller needs one.

    Raises:
        ValueError: the matrix does not know the entry.
    """
    rows = [row for row in MATRIX if row.entry == entry]
    if not rows:
        raise ValueError(f"entry: got {entry!r}, expected one of {sorted({row.entry for row in MATRIX})}")
    wanted = {"arch": arch, "heads": heads, "query_length": query_length, "dtypes": f"{q_dtype}/{kv_dtype}",
              "persistent": persistent, "lse": lse}  # fmt: skip
    for row in rows:
        if not _misses(row, wanted):
            return Answer(True, row, "", row)
    nearest = min(rows, key=lambda row: _distance(row, wanted))
    return Answer(False, None, _reason(rows, wanted, nearest), nearest)


def matrix_rows(entry: str | None = None, arch: str | None = None) -> list[dict[str, Any]]:
    """The matrix as rows for a table, one per kernel, narrowed to an entry or an architecture if one is named."""
    return [
        {
            "entry": row.entry,
            "arch": row.arch,
            "heads": row.heads,
            "query length": row.query_length or "any",
            "q/kv": f"{row.q_dtype}/{row.kv_dtype}",
            "persistent": row.persistent,
            "LSE": row.lse,
            "note": row.note,
            "source": row.source,
        }
        for row in MATRIX
        if entry in (None, row.entry) and arch in (None, row.arch)
    ]


# What a caller would rather change, first to last: another arch is no choice at all.
_WEIGHTS = {"persistent": 1, "query_length": 2, "heads": 3, "lse": 4, "dtypes": 6, "arch": 100}


def _misses(row: Kernel, wanted: Mapping[str, Any]) -> list[str]:
    """Fields in which a row does not serve a call: a row with an LSE serves a call without one."""
    have = {
        "arch": row.arch,
        "heads": row.heads,
        "query_length": wanted["query_length"] if row.query_length == 0 else row.query_length,
        "dtypes": f"{row.q_dtype}/{row.kv_dtype}",
        "persistent": row.persistent,
        "lse": row.lse and wanted["lse"],
    }
    return [name for name, value in have.items() if value != wanted[name]]


def _distance(row: Kernel, wanted: Mapping[str, Any]) -> tuple[int, bool, int]:
    """Weighted misses, then rows without a warning, then heads that divide the wanted ones most evenly."""
    heads = max(row.heads, wanted["heads"]) / max(min(row.heads, wanted["heads"]), 1)
    return sum(_WEIGHTS[name] for name in _misses(row, wanted)), bool(row.note), int(heads)


def _reason(rows: list[Kernel], wanted: Mapping[str, Any], nearest: Kernel) -> str:
    if all(row.arch != wanted["arch"] for row in rows):
        known = sorted({row.arch for row in rows})
        return f"no kernel for {wanted['arch']}; {rows[0].entry} has some for {', '.join(known)}"
    if wanted["lse"]:
        rest = [row for row in rows if _misses(row, wanted) == ["lse"]]
        if rest:
            without = str(rest[0]).replace(", no LSE on", " on")
            return f"no LSE for {without}" + (f" ({rest[0].note})" if rest[0].note else "")
    names = {"query_length": "query length", "dtypes": "q/kv dtypes"}
    shown = {"query_length": nearest.query_length, "dtypes": f"{nearest.q_dtype}/{nearest.kv_dtype}"}
    parts = [
        f"{names.get(name, name)} {wanted[name]} (nearest {shown.get(name, getattr(nearest, name, None))})"
        for name in _misses(nearest, wanted)
    ]
    return "no kernel with " + " and ".join(parts)
