"""What decoding requests hold on the device, by request slot: block tables, open groups, and who has which slot.

A request gets a slot when its first token is decoded, and from then on its state lives here and in the caches: the
prompt's state, a Python value, is handed over once (`SlotStates.join`). One slot more than there are requests is the
padding's: rows of a batch that are no token write there.

A slot that is taken over is poisoned before it is written, and its table rows name no block once it is given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4ref.config import C4, SWA
from dsv4ref.ref.model import Model
from dsv4ref.ref.state import State
from dsv4ref.serving.blocks import BlockPool, PagedCaches, RequestRows
from dsv4ref.serving.tails import Tail

__all__ = ["LayerTails", "SlotStates"]


@dataclass(frozen=True)
class LayerTails:
    """One layer's open groups.

    Args:
        compressor: None without compression.
        index: the indexer's, on C4 layers.
    """

    compressor: Tail | None = None
    index: Tail | None = None


class SlotStates:
    """Block tables and open groups of all request slots, at addresses that never change.

    Args:
        model: shapes and arithmetic dtype.
        caches: whose blocks the tables name.

    Attributes:
        padding: the slot of rows that are no token.
        window_table: int32 ``[slots + 1, blocks of the longest request]``, -1 for none; a ring, written out.
        page_table: int32 ``[slots + 1, pages of the longest request]``, likewise.
        tails: per layer.
    """

    def __init__(self, model: Model, caches: PagedCaches) -> None:
        config, sizes = model.config, caches.sizes
        device = caches.layers[0].window.data.device
        self.padding, self._caches = sizes.slots, caches
        self.pool = BlockPool("slots", sizes.slots)
        self._slots: dict[int, int] = {}  # what the pool says, as a step reads it

        def table(tokens: int) -> Tensor:
            shape = (sizes.slots + 1, -(-sizes.max_length // tokens))
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self.window_table, self.page_table = table(sizes.block_size), table(sizes.page_tokens)

        def tail(ratio: int, dim: int) -> Tail:
            return Tail.allocate(sizes.slots + 1, ratio, dim, ratio == C4, model.numerics.dtype, device)

        self.tails = tuple(
            LayerTails(
                None if ratio == SWA else tail(ratio, config.head_dim),
                tail(ratio, config.index_head_dim) if ratio == C4 else None,
            )
            for ratio in config.main_ratios
        )

    @property
    def nbytes(self) -> int:
        """Bytes of tables and open groups."""
        tails = [tail for layer in self.tails for tail in (layer.compressor, layer.index) if tail is not None]
        return self.window_table.nbytes + self.page_table.nbytes + sum(tail.nbytes for tail in tails)

    def slot_of(self, owner: int) -> int | None:
        """The slot that a request has; None if it has none."""
        return self._slots.get(owner)

    def slots_of(self, owners: Sequence[int]) -> list[int]:
        """The slots of requests that have one.

        Raises:
            ValueError: one has none.
        """
        try:
            return [self._slots[owner] for owner in owners]
        except KeyError as error:
            raise ValueError(f"owner: got {error}, expected one of {self.pool.owners}, who have joined") from None

    def join(self, owner: int, state: State) -> int:
        """Give a request a slot and hand its state over.

        Args:
            owner: the request's id.
            state: over the caches' rows; its prompt is computed. Not changed.

        Returns:
            The slot.

        Raises:
            ValueError: the request has one already.
            OutOfBlocksError: none is free.
            RuntimeError: as the copies raise; then the request has no slot.
        """
        (slot,) = self.pool.take(owner, 1)
        try:
            self._write_tables(slot, state)
            for tails, layer in zip(self.tails, state.layers, strict=True):
                for tail, group in ((tails.compressor, layer.compressor), (tails.index, layer.index_compressor)):
                    if tail is not None:
                        assert group is not None
                        tail.take_over(slot, group)
        except BaseException:
            self.pool.give_back(owner)
            raise
        self._slots[owner] = slot
        return slot

    def hand_back(self, owner: int, position: int) -> State:
        """A request's state as a value, as `join` takes it over; its slot keeps it too.

        Args:
            owner: a request that has a slot.
            position: tokens that it has computed.

        Raises:
            ValueError: it has no slot.
        """
        (slot,) = self.slots_of([owner])
        state = self._caches.behind(owner, position)
        layers = []
        for tails, layer in zip(self.tails, state.layers, strict=True):
            compressor, index = (
                None if tail is None else tail.hand_back(slot, position) for tail in (tails.compressor, tails.index)
            )
            layers.append(replace(layer, compressor=compressor, index_compressor=index))
        return replace(state, layers=tuple(layers))

    def _write_tables(self, slot: int, state: State) -> None:
        window = state.layers[0].window
        assert isinstance(window, RequestRows), "the engine's states are made by its caches"
        pages = next((s.compressed.blocks for s in state.layers if isinstance(s.compressed, RequestRows)), ())
        ring = [window.blocks[column % len(window.blocks)] for column in range(self.window_table.shape[1])]
        columns = [*pages, *[-1] * (self.page_table.shape[1] - len(pages))]
        for table, row in ((self.window_table, ring), (self.page_table, columns)):
            table[slot].copy_(torch.tensor(row, dtype=torch.int32))

    def leave(self, owner: int) -> None:
        """Take a request's slot back; nothing if it has none."""
        if (slot := self.slot_of(owner)) is None:
            return
        self.pool.give_back(owner)
        del self._slots[owner]
        self.window_table[slot].fill_(-1)
        self.page_table[slot].fill_(-1)
