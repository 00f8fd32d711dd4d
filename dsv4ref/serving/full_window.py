"""When a C4 layer's choice is the identity, who may say so, and when.

The host knows an upper bound of the lengths without asking the device, and while it is at most top-k one fill replaces
logits and top-k. That is a branch of the host: inside a graph it would be frozen (H07). So under capture the decision
is left to the device, row by row, unless no replay can ever need the other branch.

Source: doubleword's vLLM fork, commit 266c6c84d (the host branch); vLLM 0.33 takes the longest context of the model as
the bound where a whole step is captured.
"""

from __future__ import annotations

import enum

from torch import Tensor

from dsv4ref.kernels.capture import is_capturing
from dsv4ref.kernels.sparse_mla.indices import fill_window
from dsv4ref.kernels.sparse_mla.topk import TopkScratch, select

__all__ = ["Way", "choose_entries", "way_for"]


class Way(enum.StrEnum):
    """How a choice is made."""

    FILL = "fill"
    TOPK = "top-k"
    DEVICE = "device decides"


def way_for(topk: int, columns: int, longest: int | None, *, capturing: bool) -> Way:
    """Which way is right for a batch.

    Args:
        topk: entries chosen at most.
        columns: entries that any row of any batch may ever see: what the block tables can address.
        longest: the host's upper bound of this batch's lengths; None if it has none.
        capturing: the answer will be replayed for other batches.

    Raises:
        ValueError: a negative number.
    """
    for name, value in (("topk", topk), ("columns", columns), ("longest", longest)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: got {value}, expected at least 0")
    if columns <= topk:
        return Way.FILL
    if capturing or longest is None:
        return Way.DEVICE
    return Way.FILL if longest <= topk else Way.TOPK


def choose_entries(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    table: Tensor,
    requests: Tensor,
    lengths: Tensor,
    *,
    longest: int | None,
    scratch: TopkScratch,
    out: Tensor,
) -> Way:
    """The C4 entries that every row attends to, by the cheapest way that is right here.

    Args:
        q, weights, keys, table, requests, lengths, scratch, out: as `dsv4ref.kernels.sparse_mla.topk.select`.
        longest: as in `way_for`; a bound that is too low gives a wrong choice, and nobody can check it here.

    Returns:
        The way taken.

    Raises:
        TypeError, ValueError: as `select` and `way_for`.
    """
    way = way_for(out.shape[-1], scratch.logits.shape[-1], longest, capturing=is_capturing())
    if way is Way.FILL:
        fill_window(lengths, out)
    else:
        select(q, weights, keys, table, requests, lengths, scratch=scratch, out=out, skip_full=way is Way.DEVICE)
    return way
