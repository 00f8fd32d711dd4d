"""Sphinx extension: directives for the parts of the book that are generated at build time.

``{chapters}`` the table of contents by part; ``{hazard-index}``, ``{settings-table}``, ``{scoreboard}`` and
``{run-status}`` the tables of :mod:`bookkit.tables`, read from the installed package. Pages that hold one of them are
read again at every build, because what they show does not live in the source tree.
"""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bookkit import stage, tables


def catalogue_or_none() -> Any:
    if importlib.util.find_spec("dsv4ref.optimizations.catalogue") is None:
        return None
    return importlib.import_module("dsv4ref.optimizations.catalogue")


class Generated(SphinxDirective):
    """A directive whose content is Markdown made at build time."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return self.parse_text_to_nodes(self.markdown(), allow_section_headings=True)

    def markdown(self) -> str:
        raise NotImplementedError

    def chapters(self) -> list[stage.Chapter]:
        return stage.find_chapters(Path(self.env.srcdir) / stage.CHAPTERS)

    def documents(self) -> Mapping[str, str]:
        """Per chapter id, the document its notebook became."""
        return {chapter.ident: f"{stage.CHAPTERS}/{chapter.path.name}" for chapter in self.chapters()}


class Chapters(Generated):
    """The chapters as toctrees, one per part that has any."""

    def markdown(self) -> str:
        blocks = []
        for part, (caption, _) in stage.PARTS.items():
            names = [chapter.path.stem for chapter in self.chapters() if chapter.part == part]
            if names:
                lines = ["```{toctree}", f":caption: {caption}", ":maxdepth: 1", ""]
                lines += [f"{stage.CHAPTERS}/{name}" for name in names]
                blocks.append("\n".join([*lines, "```", ""]))
        return "\n".join(blocks)


class HazardIndex(Generated):
    """H01.. with symptom, cause, source, and the chapters that plant them."""

    def markdown(self) -> str:
        path = Path(self.env.app.confdir) / "hazards.toml"
        hazards = tomllib.loads(path.read_text(encoding="utf-8"))
        return tables.hazard_table(
            hazards, catalogue_or_none().CATALOGUE if catalogue_or_none() else {}, self.documents()
        )


class SettingsTable(Generated):
    """The environment variables."""

    def markdown(self) -> str:
        from dsv4ref import settings

        return tables.settings_table(settings.rows())


class Scoreboard(Generated):
    """Claimed, predicted and measured, per device."""

    def markdown(self) -> str:
        return tables.scoreboard(catalogue_or_none().report_rows() if catalogue_or_none() else [], self.documents())


class RunStatus(Generated):
    """What ran where, when."""

    def markdown(self) -> str:
        from dsv4ref import settings
        from dsv4ref.evidence import records

        return tables.run_status(records.shipped(settings.get("DSV4REF_RECORDS")), records.is_stale, self.documents())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("chapters", Chapters)
    app.add_directive("hazard-index", HazardIndex)
    app.add_directive("settings-table", SettingsTable)
    app.add_directive("scoreboard", Scoreboard)
    app.add_directive("run-status", RunStatus)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
