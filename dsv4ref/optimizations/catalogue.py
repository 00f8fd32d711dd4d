"""Every chapter, found by looking: a module of this package that defines ``OPTIMIZATION`` is one.

Adding a chapter is adding such a module and a notebook; tests, command line, scoreboard and book read this catalogue.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import dsv4ref.optimizations
from dsv4ref.evidence.records import Record
from dsv4ref.optimizations.base import Optimization

__all__ = ["PAGES", "Page", "get", "load", "rows", "select"]


@dataclass(frozen=True)
class Page:
    """A notebook that is not about one optimisation."""

    id: str
    number: int
    title: str
    part: str

    @property
    def notebook(self) -> str:
        """File name of the notebook."""
        return f"{self.number:02d}_{self.id}.ipynb"


PAGES = (Page("start_here", 0, "Start here", "-"),)
"""Notebooks without an optimisation: no gate, nothing to measure."""


@functools.cache
def load() -> Mapping[str, Optimization]:
    """All chapters by id, in order of their numbers.

    Raises:
        ValueError: two chapters share an id or a number.
    """
    found: list[Optimization] = []
    for module in pkgutil.iter_modules(dsv4ref.optimizations.__path__):
        chapter = getattr(importlib.import_module(f"dsv4ref.optimizations.{module.name}"), "OPTIMIZATION", None)
        if isinstance(chapter, Optimization):
            found.append(chapter)
    found.sort(key=lambda chapter: chapter.number)
    for field in ("id", "number"):
        values = [getattr(chapter, field) for chapter in (*PAGES, *found)]
        doubled = sorted({str(value) for value in values if values.count(value) > 1})
        if doubled:
            raise ValueError(f"{field}: {', '.join(doubled)} is used by two chapters, expected each once")
    return MappingProxyType({chapter.id: chapter for chapter in found})


def get(id: str) -> Optimization:
    """One chapter.

    Raises:
        ValueError: no such chapter; the message names the nearest ids.
    """
    chapters = load()
    if id in chapters:
        return chapters[id]
    near = difflib.get_close_matches(id, chapters, n=2, cutoff=0.4) or list(chapters)
    raise ValueError(f"id: no chapter is called {id!r}; nearest: {', '.join(near)}")


def select(ids: Iterable[str]) -> tuple[Optimization, ...]:
    """The named chapters, or all of them if none is named.

    Raises:
        ValueError: as `get`.
    """
    chosen = tuple(ids)
    return tuple(get(id) for id in chosen) if chosen else tuple(load().values())


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per notebook: id, number, title, part, gate (None for pages), notebook, devices with records."""
    recorded: dict[str, set[str]] = {}
    for record in records:
        recorded.setdefault(record.chapter, set()).add(record.device)
    entries: list[Page | Optimization] = [*PAGES, *load().values()]
    return [
        {
            "id": entry.id,
            "number": entry.number,
            "title": entry.title,
            "part": entry.part,
            "gate": entry.gate.name if isinstance(entry, Optimization) else None,
            "notebook": entry.notebook,
            "devices": sorted(recorded.get(entry.id, ())),
        }
        for entry in sorted(entries, key=lambda entry: entry.number)
    ]
