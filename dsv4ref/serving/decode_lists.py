"""One batch size's decode metadata at fixed addresses: inputs that the host copies in, lists that the device makes.

`DecodeLists.load` is the host's part, before a launch or a replay: it copies a step's inputs to where a graph reads
them and marks the rows behind them as padding. `DecodeLists.refresh` is the device's part, four launches that may be
captured: they read those inputs and nothing that the host knew.

Source: doubleword's vLLM fork, commits 22cc02230 and 00af8fd88 (the buffers that graphs need); vLLM's ragged decode
buffers for DeepSeek-V4 on ROCm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.sparse_mla.indices import pack_entries, recent_lists

__all__ = ["PADDING", "DecodeLists", "DecodeStep", "ListGeometry", "Ragged"]

PADDING = -1
"""Position of a row that is no token: it sees nothing, so its lists are empty."""

_C4, _C128 = 4, 128


@dataclass(frozen=True)
class ListGeometry:
    """What the lists of a decode step are made for.

    Args:
        topk: entries that a C4 row attends to at most.
        context: the longest context in tokens; it bounds block tables and C128 rows.
        swa_slots, c4_slots, c128_slots: slots of the three caches.
        window: tokens of the SWA scope.
        swa_block: tokens per block of the SWA cache.
        page: tokens per block of the compressed caches, ``page // 4`` C4 and ``page // 128`` C128 entries.

    Raises:
        ValueError: a number below 1, or a page that does not hold whole C128 entries.
    """

    topk: int
    context: int
    swa_slots: int
    c4_slots: int
    c128_slots: int
    window: int = 128
    swa_block: int = 64
    page: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.page % _C128:
            raise ValueError(f"page: got {self.page}, expected a multiple of {_C128}: an entry lies in one block")

    @property
    def swa_blocks(self) -> int:
        """Columns of the SWA block table."""
        return -(-self.context // self.swa_block)

    @property
    def pages(self) -> int:
        """Columns of the compressed caches' block table."""
        return -(-self.context // self.page)

    @property
    def widths(self) -> dict[str, int]:
        """Entries of a row at most, by scope."""
        return {"swa": self.window, "c4": self.topk, "c128": max(self.context // _C128, 1)}


@dataclass(frozen=True)
class DecodeStep:
    """What a decode step brings, T rows of R requests; all int32.

    Args:
        positions: ``[T]`` of the query tokens.
        requests: ``[T]``, rows of the tables; speculative tokens share one.
        swa_table: ``[R, swa_blocks]`` block ids.
        pages: ``[R, pages]`` block ids of the compressed caches, which share one table.
        entries: ``[T, topk]`` C4 entries that the indexer chose, numbered within the request, -1 for none.
    """

    positions: Tensor
    requests: Tensor
    swa_table: Tensor
    pages: Tensor
    entries: Tensor


@dataclass(frozen=True)
class Ragged:
    """One scope's lists: row t's slots are ``indices[indptr[t]:indptr[t + 1]]``."""

    indices: Tensor
    indptr: Tensor


class DecodeLists:
    """Inputs and lists of a decode step of up to ``rows`` rows, at addresses that a graph may capture.

    Nothing is initialised but what marks padding: `refresh` writes every offset, and nobody reads an index behind the
    last one.

    Args:
        rows: rows of the batch size, padding included; at least 1.
        requests: requests that the tables have room for; at least 1.
        geometry: sizes.
        device: where everything lies.
        tables: block tables to read instead of own ones, ``swa_table`` and ``pages`` of `DecodeStep` for all requests:
            batch sizes that serve the same requests share them, and `place` alone starts a step.

    Raises:
        TypeError, ValueError: a number below 1, or tables of another dtype, size or device.
    """

    def __init__(
        self,
        rows: int,
        requests: int,
        geometry: ListGeometry,
        device: torch.device | str = "cpu",
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("requests", requests)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.rows, self.geometry = rows, geometry

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        if tables is None:
            tables = (buffer(requests, geometry.swa_blocks), buffer(requests, geometry.pages))
        swa_table, pages = tables
        for name, table, columns in (
            ("tables[0]", swa_table, geometry.swa_blocks),
            ("tables[1]", pages, geometry.pages),
        ):
            checks.check_tensor(name, table, dtype=torch.int32, shape=(requests, columns))
        self.step = DecodeStep(
            positions=buffer(rows).fill_(PADDING),
            requests=buffer(rows).fill_(PADDING),
            swa_table=swa_table,
            pages=pages,
            entries=buffer(rows, geometry.topk),
        )
        self.counts = buffer(rows)
        self.lists = {s: Ragged(buffer(rows * width), buffer(rows + 1)) for s, width in geometry.widths.items()}

    def load(self, step: DecodeStep) -> None:
        """Copy a step's inputs into place and mark the rows behind them as padding; the host's part.

        Args:
            step: at most `rows` rows and as many requests as there is room for.

        Raises:
            TypeError, ValueError: another dtype, too many rows or requests, or sizes of another geometry.
        """
        g, mine = self.geometry, self.step
        checks.check_tensor("positions", step.positions, dtype=torch.int32, shape=("T",))
        tokens = step.positions.shape[0]
        if tokens > self.rows:
            raise ValueError(f"positions: got {tokens} rows, expected at most {self.rows}")
        checks.check_tensor("requests", step.requests, dtype=torch.int32, shape=(tokens,))
        checks.check_tensor("swa_table", step.swa_table, dtype=torch.int32, shape=("R", g.swa_blocks))
        checks.check_tensor("pages", step.pages, dtype=torch.int32, shape=(step.swa_table.shape[0], g.pages))
        checks.check_tensor("entries", step.entries, dtype=torch.int32, shape=(tokens, g.topk))
        requests = step.swa_table.shape[0]
        if requests > mine.swa_table.shape[0]:
            raise ValueError(f"swa_table: got {requests} requests, expected at most {mine.swa_table.shape[0]}")
        self.place(step.positions, step.requests)
        mine.swa_table[:requests].copy_(step.swa_table)
        mine.pages[:requests].copy_(step.pages)
        mine.entries[:tokens].copy_(step.entries)

    def place(self, positions: Tensor, requests: Tensor) -> None:
        """Copy a step's rows into place and mark those behind them as padding; tables and entries stay.

        Args:
            positions, requests: as in `DecodeStep`, at most `rows`.
        """
        tokens = positions.shape[0]
        for target, source in ((self.step.positions, positions), (self.step.requests, requests)):
            target[:tokens].copy_(source)
            target[tokens:].fill_(PADDING)  # the rows of a larger step before this one

    def refresh(self) -> None:
        """Make all lists from what `load` put in place: four launches, safe to capture."""
        self.list_swa()
        self.list_c128()
        self.pack_c4()

    def list_swa(self) -> None:
        """The SWA lists alone, one launch."""
        self._list_recent("swa", self.step.swa_table, 1, self.geometry.swa_block, self.geometry.swa_slots)

    def list_c128(self) -> None:
        """The C128 lists alone, one launch."""
        self._list_recent("c128", self.step.pages, _C128, self.geometry.page // _C128, self.geometry.c128_slots)

    def _list_recent(self, scope: str, table: Tensor, ratio: int, block: int, slots: int) -> None:
        s, ragged = self.step, self.lists[scope]
        recent_lists(
            s.positions, s.requests, table, ratio=ratio, width=self.geometry.widths[scope], block_size=block,
            num_slots=slots, indices=ragged.indices, indptr=ragged.indptr,
        )  # fmt: skip

    def pack_c4(self) -> None:
        """The C4 lists alone, two launches: they change from layer to layer, because each layer has an indexer."""
        g, s, ragged = self.geometry, self.step, self.lists["c4"]
        pack_entries(
            s.entries, s.positions, s.requests, s.pages, ratio=_C4, block_size=g.page // _C4, num_slots=g.c4_slots,
            counts=self.counts, indices=ragged.indices, indptr=ragged.indptr,
        )  # fmt: skip

    def addresses(self) -> dict[str, int]:
        """Where everything lies, by name: what a captured graph holds."""
        lists = {f"{s}.{name}": getattr(r, name) for s, r in self.lists.items() for name in ("indices", "indptr")}
        tensors = {**vars(self.step), "counts": self.counts, **lists}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and lists."""
        lists = [t for r in self.lists.values() for t in (r.indices, r.indptr)]
        return sum(t.nbytes for t in (*vars(self.step).values(), self.counts, *lists))
