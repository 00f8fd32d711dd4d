"""A bug to plant in a copy of the source; every `mutations_*.py` beside this file lists some."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutation"]


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` becomes ``new`` in ``file``; ``cases`` must turn red and ``unaffected`` must stay green."""

    file: str
    old: str
    new: str
    cases: tuple[str, ...]
    unaffected: tuple[str, ...] = ()
