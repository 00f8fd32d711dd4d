"""Block-scaled FP8 weights kept as bf16: a one-pass dequantisation kernel and the cache that knows when to run it.

The output projection ``wo_a`` is stored in FP8 and multiplied in bf16. Keeping a bf16 copy is exact (4 significant
bits times a power of two) and saves the dequantisation of every step, but raises the question this module answers:
when is the copy stale? Two answers are provided, each stated by name:

* ``check="host"`` compares identity, version, address and dtype of the two tensors. Free, but PyTorch keeps no version
  for writes through ``.data`` or by other libraries, and a replayed graph runs no host code: whoever writes that way
  must call `DequantisedWeight.refresh`.
* ``check="device"`` fingerprints every 128 x 128 block on the device and dequantises those that changed, in one launch.
  No host sync, so it can be captured, and a replayed graph follows any write.

The bf16 buffer's address never changes, so graphs captured over it stay valid across weight updates.

Reference: `dsv4ref.ref.projection`. Hazards: H31, H32.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import _decode_codes, _decode_scales, architecture, decode_mode

__all__ = ["TILE_ROWS", "DequantisedWeight", "dequantise_weight", "grouped_projection"]

_BLOCK = 128
TILE_ROWS = 32
"""Weight rows one program dequantises; divides the 128 rows that share a scale."""


@triton.jit
def _dequantise_tile(weight, scale, out, tile_row, tile_column, columns, MODE: tl.constexpr, TILE: tl.constexpr):
    """w[n, k] = code[n, k] * 2^(byte[n // 128, k // 128] - 127) for one tile of TILE rows and 128 columns."""
    rows = tile_row * TILE + tl.arange(0, TILE)
    lanes = tile_column * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * columns + lanes[None, :]
    factor = _decode_scales(tl.load(scale + (tile_row * TILE // 128) * (columns // 128) + tile_column))
    value = _decode_codes(tl.load(weight + at), MODE).to(tl.float32) * factor.to(tl.float32)
    tl.store(out + at, value.to(tl.bfloat16))


@triton.jit
def _dequantise_weight_kernel(weight, scale, out, columns, MODE: tl.constexpr, TILE: tl.constexpr):
    _dequantise_tile(weight, scale, out, tl.program_id(0), tl.program_id(1), columns, MODE, TILE)


@triton.jit
def _mix64(x):
    """splitmix64's finaliser: a bijection of 64-bit words, so that a change in one lane changes the sum over lanes."""
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _fingerprint_block(weight_words, scale_byte, tile_row, tile_column, columns):
    """64 bits of one 128 x 128 block: a polynomial per lane in the words it reads, mixed once, summed over lanes.

    The multiplier is odd, so a change of any single word always shows; two other blocks agree with chance 2^-64.
    """
    rows = tl.arange(0, 16)
    words = tl.arange(0, 32)
    at = (tile_row * 128 + rows)[:, None].to(tl.int64) * (columns // 4) + (tile_column * 32 + words)[None, :]
    state = (rows[:, None] * 32 + words[None, :] + 1).to(tl.uint64)
    for step in tl.static_range(8):  # unrolled: all loads are in flight before the first is needed
        word = tl.load(weight_words + at + step * 4 * columns).to(tl.uint32, bitcast=True)
        state = state * 0x5851F42D4C957F2D + word.to(tl.uint64)
    lanes = tl.sum(tl.sum(_mix64(state).to(tl.int64, bitcast=True), axis=1), axis=0)
    return lanes + (scale_byte.to(tl.int64) + 1) * 0x5851F42D4C957F2D


@triton.jit
def _follow_weight_kernel(weight_words, weight, scale, out, seen, columns, MODE: tl.constexpr, FORCE: tl.constexpr):
    """Fingerprint one 128 x 128 block and its scale; dequantise it again if the fingerprint is not the one seen last.

    A program reads and writes nothing but its own block, fingerprint and output, so one launch does it all and no
    program waits for another.
    """
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    tile = tile_row * (columns // 128) + tile_column
    fresh = _fingerprint_block(weight_words, tl.load(scale + tile), tile_row, tile_column, columns)
    known = tl.load(seen + tile)
    if FORCE or fresh != known:
        for step in range(4):  # 32 rows at a time: the rare path must not set the registers of the usual one
            _dequantise_tile(weight, scale, out, tile_row * 4 + step, tile_column, columns, MODE, 32)
        tl.debug_barrier()  # no warp may still have to read `seen` when another replaces it
        tl.store(seen + tile, fresh)


def _check_weight(weight: object, scale: object) -> tuple[Tensor, Tensor, Dialect]:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a torch.Tensor")
    dialects = {d.dtype: d for d in Dialect}
    if weight.dtype not in dialects:
        raise TypeError(
            f"weight: got {weight.dtype}, expected float8_e4m3fn or float8_e4m3fnuz "
            "(a bf16 weight is already dequantised; applying its scale again would be wrong)"
        )
    if weight.dim() != 2 or weight.shape[0] % _BLOCK or weight.shape[1] % _BLOCK or not weight.is_contiguous():
        raise ValueError(
            f"weight: got shape {list(weight.shape)} strides {weight.stride()}, "
            f"expected contiguous [N, K] with N and K multiples of {_BLOCK}"
        )
    rows, columns = weight.shape
    checked = checks.check_tensor(
        "scale",
        scale,
        dtype=torch.uint8,
        shape=(rows // _BLOCK, columns // _BLOCK),
        device=weight.device,
        contiguous=True,
    )
    return weight, checked, dialects[weight.dtype]


def dequantise_weight(weight: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Dequantise a block-scaled FP8 matrix to bf16 in one pass.

    Args:
        weight: e4m3fn or e4m3fnuz ``[N, K]`` contiguous, N and K multiples of 128.
        scale: UE8M0 bytes, uint8 ``[N / 128, K / 128]`` contiguous.
        out: bf16 ``[N, K]`` contiguous to write into; allocated if None.

    Returns:
        ``out``; one kernel launch.

    Raises:
        TypeError, ValueError: wrong dtype, shape, layout or device; ``out`` overlapping an input.
    """
    weight, scale, dialect = _check_weight(weight, scale)
    rows, columns = weight.shape
    if out is None:
        out = torch.empty((rows, columns), dtype=torch.bfloat16, device=weight.device)
    else:
        checks.check_tensor(
            "out", out, dtype=torch.bfloat16, shape=(rows, columns), device=weight.device, contiguous=True
        )
        checks.check_no_overlap("out", out, "weight", weight)
        checks.check_no_overlap("out", out, "scale", scale)
    if weight.numel():
        grid = (rows // TILE_ROWS, columns // _BLOCK)
        mode = decode_mode(dialect, architecture(weight.device))
        _dequantise_weight_kernel[grid](weight.view(torch.uint8), scale, out, columns, MODE=mode, TILE=TILE_ROWS)
    return out


def grouped_projection(o: Tensor, weight: Tensor) -> Tensor:
    """z[t, g, r] = sum_d o[t, g, d] * weight[g * R + r, d] as one batched bf16 matrix product.

    Args:
        o: bf16 ``[T, G, D]``.
        weight: bf16 ``[G * R, D]`` contiguous.

    Returns:
        bf16 ``[T, G, R]`` (a transposed view of the product).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    checks.check_tensor("o", o, dtype=torch.bfloat16, shape=("T", "G", "D"))
    _, groups, width = o.shape
    checks.check_tensor("weight", weight, dtype=torch.bfloat16, shape=("G*R", width), device=o.device, contiguous=True)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"weight: got {weight.shape[0]} rows, expected a multiple of the {groups} groups of o")
    per_group = weight.view(groups, -1, width)
    return torch.bmm(o.transpose(0, 1), per_group.transpose(1, 2)).transpose(0, 1)


class DequantisedWeight:
    """The bf16 copy of one block-scaled FP8 weight, kept current; its address never changes.

    Args:
        weight: e4m3 ``[N, K]``, as `dequantise_weight`.
        scale: uint8 ``[N / 128, K / 128]``.
        check: how `current` finds out that the weight changed; the module docstring says what each can and cannot see.

    Attributes:
        buffer: bf16 ``[N, K]``.
    """

    def __init__(self, weight: Tensor, scale: Tensor, *, check: Literal["host", "device"]) -> None:
        if check not in ("host", "device"):
            raise ValueError(f"check: got {check!r}, expected 'host' or 'device'")
        weight, scale, _ = _check_weight(weight, scale)
        self.check = check
        self.buffer = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        self._key: _HostKey | None = None
        blocks = scale.numel() if check == "device" else 0
        self._seen = torch.zeros(blocks, dtype=torch.int64, device=weight.device)
        self.refresh(weight, scale)

    @property
    def nbytes(self) -> int:
        """Device memory the copy and its fingerprints take, bytes."""
        return sum(t.numel() * t.element_size() for t in (self.buffer, self._seen))

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Dequantise now, whatever the check thinks; for loaders that write behind PyTorch's back.

        Raises:
            TypeError, ValueError: as `dequantise_weight`; another shape than the copy's.
        """
        weight, scale, dialect = self._checked(weight, scale)
        if self.check == "host":
            dequantise_weight(weight, scale, out=self.buffer)
            self._key = _HostKey.of(weight, scale)
        else:
            self._follow(weight, scale, dialect, force=True)

    def current(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The up-to-date bf16 copy: `buffer`, refreshed in place first if the check says the weight changed.

        Args:
            weight, scale: the tensors as the caller holds them now; they may be other tensors than last time.

        Returns:
            `buffer`.

        Raises:
            TypeError, ValueError: as `refresh`.
            RuntimeError: ``check="host"`` found a change while a graph is being captured (the refresh would be replayed
                every step); call `refresh` before capturing.
        """
        weight, scale, dialect = self._checked(weight, scale)
        if self.check == "host":
            if self._key is None or not self._key.matches(weight, scale):
                if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "weight: changed since the last refresh, expected refresh() before graph capture"
                    )
                self.refresh(weight, scale)
            return self.buffer
        self._follow(weight, scale, dialect, force=False)
        return self.buffer

    def _checked(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Dialect]:
        weight, scale, dialect = _check_weight(weight, scale)
        if weight.shape != self.buffer.shape or weight.device != self.buffer.device:
            raise ValueError(
                f"weight: got {list(weight.shape)} on {weight.device}, "
                f"expected {list(self.buffer.shape)} on {self.buffer.device} like the copy"
            )
        return weight, scale, dialect

    def _follow(self, weight: Tensor, scale: Tensor, dialect: Dialect, *, force: bool) -> None:
        if weight.numel() == 0:
            return
        rows, columns = weight.shape
        _follow_weight_kernel[(rows // _BLOCK, columns // _BLOCK)](
            weight.view(torch.int32),
            weight.view(torch.uint8),
            scale,
            self.buffer,
            self._seen,
            columns,
            MODE=decode_mode(dialect, architecture(weight.device)),
            FORCE=force,
        )


@dataclass(frozen=True)
class _HostKey:
    """Everything the host can see of two tensors.

    Identity is a weak reference, so that an address reused after a free is a new tensor, not the old one.
    """

    weight: weakref.ref[Tensor]
    scale: weakref.ref[Tensor]
    seen: tuple[tuple[int, int, torch.dtype], ...]

    @staticmethod
    def of(weight: Tensor, scale: Tensor) -> _HostKey:
        return _HostKey(weakref.ref(weight), weakref.ref(scale), _visible(weight, scale))

    def matches(self, weight: Tensor, scale: Tensor) -> bool:
        return self.weight() is weight and self.scale() is scale and self.seen == _visible(weight, scale)


def _visible(weight: Tensor, scale: Tensor) -> tuple[tuple[int, int, torch.dtype], ...]:
    for name, tensor in (("weight", weight), ("scale", scale)):
        if tensor.is_inference():
            raise ValueError(
                f"{name}: is an inference tensor, which has no version counter; expected a normal tensor, "
                "or check='device'"
            )
    return tuple((t._version, t.data_ptr(), t.dtype) for t in (weight, scale))
