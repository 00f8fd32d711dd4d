"""Which slots a decode row lists, entry by entry: the definition, with Python's integers and lists.

A query row at position p sees ``(p + 1) // ratio`` entries of a scope: tokens for SWA (ratio 1), compressed entries for
C4 and C128, the one that its own token closes included. SWA lists the last 128 of them, C128 all, C4 those that the
indexer chose. A scope's cache is paged: entry e of a request lies in block ``table[e // block_size]``.

A padded row of a batch has position -1 and sees nothing. An entry without a slot, because its block is not allocated or
not in the cache, is listed as -1 by SWA and C128, whose lengths follow from positions, and is left out by C4.

Source: DeepSeek-V4 inference/model.py (which entries); vLLM cache_utils.py and the ragged decode buffers of its ROCm
backend (slots; padded rows have length 0).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["full_window_ref", "pack_entries_ref", "pack_slots_ref", "recent_lists_ref", "seen_ref", "slot_ref"]


def seen_ref(position: int, ratio: int) -> int:
    """Entries that the query at ``position`` may see; 0 for a padded row, whose position is -1."""
    return (position + 1) // ratio if position >= 0 else 0


def slot_ref(entry: int, blocks: Sequence[int], block_size: int, num_slots: int) -> int:
    """The slot of an entry.

    Args:
        entry: number within the request.
        blocks: the request's block ids; negative where none is allocated.
        block_size: entries per block.
        num_slots: slots of the cache.

    Returns:
        The slot, or -1 if there is none.
    """
    if entry < 0 or entry // block_size >= len(blocks):
        return -1
    block = blocks[entry // block_size]
    slot = block * block_size + entry % block_size
    return slot if block >= 0 and slot < num_slots else -1


def _blocks_of(request: int, table: Sequence[Sequence[int]]) -> Sequence[int]:
    return table[request] if 0 <= request < len(table) else ()


def recent_lists_ref(
    positions: Sequence[int],
    requests: Sequence[int],
    table: Sequence[Sequence[int]],
    *,
    ratio: int,
    width: int,
    block_size: int,
    num_slots: int,
) -> list[list[int]]:
    """Each row's last ``width`` visible entries, as slots.

    Args:
        positions, requests: of every row.
        table: block ids per request.
        ratio, width, block_size, num_slots: as `seen_ref` and `slot_ref`; entries per row at most.

    Returns:
        One list of slots per row, oldest entry first, -1 for an entry without a slot.
    """
    lists = []
    for position, request in zip(positions, requests, strict=True):
        seen = seen_ref(position, ratio)
        blocks = _blocks_of(request, table)
        lists.append([slot_ref(e, blocks, block_size, num_slots) for e in range(max(seen - width, 0), seen)])
    return lists


def pack_entries_ref(
    entries: Sequence[Sequence[int]],
    positions: Sequence[int],
    requests: Sequence[int],
    table: Sequence[Sequence[int]],
    *,
    ratio: int,
    block_size: int,
    num_slots: int,
) -> list[list[int]]:
    """Each row's chosen entries, as slots, without those that it may not see or that have none; order is kept.

    Args:
        entries: per row, entry numbers within its request; -1 for none, anywhere.
        positions, requests, table, ratio, block_size, num_slots: as in `recent_lists_ref`.

    Returns:
        One list of slots per row.
    """
    lists = []
    for chosen, position, request in zip(entries, positions, requests, strict=True):
        seen = seen_ref(position, ratio)
        blocks = _blocks_of(request, table)
        slots = [slot_ref(e, blocks, block_size, num_slots) for e in chosen if 0 <= e < seen]
        lists.append([slot for slot in slots if slot >= 0])
    return lists


def pack_slots_ref(slots: Sequence[Sequence[int]], lengths: Sequence[int], num_slots: int) -> list[list[int]]:
    """Each row's slots up to its length, without those that are none; order is kept."""
    return [
        [s for s in row[: max(length, 0)] if 0 <= s < num_slots] for row, length in zip(slots, lengths, strict=True)
    ]


def full_window_ref(length: int, topk: int) -> list[int]:
    """What top-k selects from at most topk entries: all of them, then -1.

    Raises:
        ValueError: more entries than topk, where a choice has to be made.
    """
    if not 0 <= length <= topk:
        raise ValueError(f"length: got {length}, expected 0 to topk = {topk}: beyond it, top-k has to choose")
    return [*range(length), *[-1] * (topk - length)]
