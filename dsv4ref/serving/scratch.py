"""Buffers of a persistent decode that live as long as the graphs over them, rewritten in place every step.

A captured graph replays addresses. Whatever a decode step needs therefore has to exist before the capture and to stay
where it is: the packed lists, the cast query, the output, the constants, and the work plan. Three verbs keep apart what
may happen when: `Scratch.rebuild` allocates, once per shape and never under capture; `Scratch.refresh` writes this
step's values into the same addresses, the plan included, because a plan describes lengths and lengths change (H05);
`Scratch.decode` runs.

One scratch serves one stream: two streams would write each other's lists (H33). One scratch serves one shape: batch
buckets share nothing (H08).

Source: ROCm/vllm#900, ``AiterSparseScratch``, whose second version refreshes the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dsv4ref.kernels.aiter import adapters
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.lists import list_offsets, pack_lists
from dsv4ref.kernels.aiter.plan import DecodeShape, PlanBuffers, check_plan
from dsv4ref.kernels.capture import current_stream, is_capturing
from dsv4ref.kernels.checks import check_tensor, numbered_device

__all__ = ["Scratch", "Scratches", "scratch_bytes", "scratch_sizes"]


def scratch_sizes(library: Library, shape: DecodeShape) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Size and dtype of every buffer of a scratch, by name, the six of the plan first; nothing is allocated.

    Args:
        library: whose plan buffers.
        shape: fixed layout.

    Raises:
        ValueError: a ragged shape, whose lists have no place of their own.
        UnsupportedError, TypeError: as `adapters.plan_sizes`.
    """
    if shape.layout != "fixed":
        raise ValueError(
            f"shape: got layout {shape.layout!r}, expected 'fixed': each row's list has its place in a scratch"
        )
    rows, heads = shape.rows, shape.heads
    return {
        **adapters.plan_sizes(library, shape),
        "qo_indptr": ((rows + 1,), torch.int32),
        "kv_last_page_lens": ((rows,), torch.int32),
        "q_scale": ((1,), torch.float32),
        "kv_scale": ((1,), torch.float32),
        "kv_indptr": ((rows + 1,), torch.int32),
        "kv_indices": ((rows, shape.topk), torch.int32),
        "counts": ((rows,), torch.int32),
        "empty": ((rows,), torch.bool),
        "q": ((rows, heads, shape.dim), shape.q_dtype),
        "out": ((rows, heads, shape.value_dim), torch.bfloat16),
    }


def scratch_bytes(library: Library, shape: DecodeShape) -> int:
    """Bytes that a scratch of this shape takes; nothing is allocated.

    Raises: as `scratch_sizes`.
    """
    sizes = scratch_sizes(library, shape).values()
    return sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in sizes)


class Scratch:
    """Every buffer of one decode shape, at addresses that never change.

    Args:
        library: the one whose plans it holds.
        shape: the key; a batch with fewer rows uses the shape's rows with lengths of 0.
        device: where the buffers live; "cuda" is the GPU that is current now.

    Attributes:
        out: bf16 ``[T, H, value_dim]``, the last decode's output.
    """

    out: Tensor

    def __init__(self, library: Library, shape: DecodeShape, device: torch.device | str) -> None:
        self.library = library
        self.shape = shape
        self.device = numbered_device(device)
        self._sizes = scratch_sizes(library, shape)
        self._buffers: dict[str, Tensor] = {}
        self._stream: int | None = None
        self._refreshed = False

    @property
    def nbytes(self) -> int:
        """Bytes it holds once it is built."""
        return scratch_bytes(self.library, self.shape)

    @property
    def plan(self) -> PlanBuffers:
        """The six plan buffers."""
        self._check_built()
        return PlanBuffers(**{name: self._buffers[name] for name in PlanBuffers.__dataclass_fields__})

    def buffer(self, name: str) -> Tensor:
        """A buffer by its name in `scratch_sizes`.

        Raises:
            ValueError: no such buffer.
        """
        self._check_built()
        if name not in self._buffers:
            raise ValueError(f"name: got {name!r}, expected one of {sorted(self._buffers)}")
        return self._buffers[name]

    def addresses(self) -> dict[str, int]:
        """Where every buffer lies; equal before and after any number of steps."""
        self._check_built()
        return {name: buffer.data_ptr() for name, buffer in self._buffers.items()}

    def rebuild(self) -> None:
        """Allocate every buffer and write the constants; the current stream becomes the scratch's own.

        Raises:
            RuntimeError: during graph capture, where an allocation would belong to the graph.
        """
        if is_capturing():
            raise RuntimeError(f"scratch: first built under graph capture, expected rebuild() before it ({self.shape})")
        self._buffers = {
            name: torch.empty(size, dtype=dtype, device=self.device) for name, (size, dtype) in self._sizes.items()
        }
        self.out = self._buffers["out"]
        self._stream = current_stream(self.device)
        self._refreshed = False
        torch.arange(self.shape.rows + 1, out=self._buffers["qo_indptr"])
        for name in ("kv_last_page_lens", "q_scale", "kv_scale"):
            self._buffers[name].fill_(1)

    def prepare(self, q: Tensor, indices: Tensor, lengths: Tensor, num_slots: int) -> None:
        """Write this step's query, lists and lengths in place: three launches, no allocation.

        Args:
            q: bf16 ``[T, H, dim]``; cast to the shape's dtype with scale 1.
            indices: int32 ``[T, topk]`` slots; invalid entries are packed away.
            lengths: int32 ``[T]`` entries of each row; 0 for padding rows.
            num_slots: slots of the cache.

        Raises:
            RuntimeError: not built; built on another stream.
            TypeError, ValueError: another dtype, shape or device.
        """
        self._check_usable()
        shape = self.shape
        check_tensor("q", q, dtype=torch.bfloat16, shape=(shape.rows, shape.heads, shape.dim), device=self.device)
        check_tensor("indices", indices, dtype=torch.int32, shape=(shape.rows, shape.topk), device=self.device)
        b = self._buffers
        pack_lists(indices, lengths, num_slots, out=b["kv_indices"], counts=b["counts"])
        list_offsets(b["counts"], indptr=b["kv_indptr"], empty=b["empty"])
        b["q"].copy_(q)

    def replan(self) -> None:
        """Make the plan of the lengths that `prepare` wrote, in place.

        Raises:
            RuntimeError: as `prepare`.
        """
        self._check_usable()
        adapters.fill_plan(
            self.library,
            self.shape,
            self.plan,
            qo_indptr=self._buffers["qo_indptr"],
            kv_indptr=self._buffers["kv_indptr"],
            kv_last_page_lens=self._buffers["kv_last_page_lens"],
        )

    def refresh(self, q: Tensor, indices: Tensor, lengths: Tensor, num_slots: int) -> None:
        """`prepare` and `replan`: everything that a step has to write before it decodes.

        Args, raises: as `prepare`.
        """
        self.prepare(q, indices, lengths, num_slots)
        self.replan()
        self._refreshed = True

    def check(self) -> None:
        """Read the plan and the lengths back and compare them; for tests and debugging, since it waits for the device.

        Raises:
            ValueError: the plan does not fit; the message names the row.
            RuntimeError: during graph capture; not built.
        """
        self._check_built()
        check_plan(self.plan, self.shape, self._buffers["kv_indptr"])

    def decode(self, kv: Tensor, sm_scale: float, *, return_lse: bool) -> Tensor | None:
        """Decode the refreshed step into `out`. Rows without a key become 0 with an LSE of -inf.

        Args:
            kv: the shape's kv dtype, ``[slots, 1, 1, dim]``.
            sm_scale: softmax scale.
            return_lse: ask for the LSE.

        Returns:
            LSE fp32 ``[T, H]``, allocated by the library; None if not asked for.

        Raises:
            RuntimeError: no refresh since the last decode; as `prepare`.
            UnsupportedError, TypeError, ValueError: as `adapters.mla_decode`.
        """
        self._check_usable()
        if not self._refreshed:
            raise RuntimeError("scratch: no refresh since the last decode, expected refresh() before every decode()")
        self._refreshed = False
        b = self._buffers
        lse = adapters.mla_decode(
            self.library,
            self.shape,
            self.plan,
            q=b["q"],
            kv=kv,
            out=b["out"],
            qo_indptr=b["qo_indptr"],
            kv_indptr=b["kv_indptr"],
            kv_indices=b["kv_indices"].view(-1),
            kv_last_page_lens=b["kv_last_page_lens"],
            sm_scale=sm_scale,
            q_scale=b["q_scale"],
            kv_scale=b["kv_scale"],
            return_lse=return_lse,
        )
        b["out"].masked_fill_(b["empty"][:, None, None], 0.0)
        if lse is not None:
            lse.masked_fill_(b["empty"][:, None], -torch.inf)
        return lse

    def _check_built(self) -> None:
        if not self._buffers:
            when = "before the capture" if is_capturing() else "first"
            raise RuntimeError(f"scratch: not built, expected rebuild() {when} ({self.shape})")

    def _check_usable(self) -> None:
        self._check_built()
        # Captured work runs on the stream that replays it, which the graph itself watches.
        stream = current_stream(self.device)
        if not is_capturing() and stream != self._stream:
            raise RuntimeError(
                f"scratch: used on stream {stream:#x}, expected {self._stream:#x}, where it was built: one scratch per "
                "stream, or two streams write each other's lists"
            )


class Scratches:
    """Scratches by shape: one each, built on first use or ahead of it.

    Args:
        library: as `Scratch`.
        device: as `Scratch`.
    """

    def __init__(self, library: Library, device: torch.device | str) -> None:
        self.library = library
        self.device = numbered_device(device)
        self._held: dict[DecodeShape, Scratch] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all scratches that are built."""
        return sum(scratch.nbytes for scratch in self._held.values())

    def preallocate(self, shapes: Iterable[DecodeShape]) -> int:
        """Build the scratches of these shapes, so that a later capture finds them; returns the bytes held then.

        Raises:
            RuntimeError: during graph capture.
        """
        for shape in shapes:
            self.at(shape)
        return self.nbytes

    def at(self, shape: DecodeShape) -> Scratch:
        """The scratch of a shape, built if there is none.

        Raises:
            RuntimeError: it would have to be built during graph capture.
        """
        if shape not in self._held:
            scratch = Scratch(self.library, shape, self.device)
            scratch.rebuild()
            self._held[shape] = scratch
        return self._held[shape]
