"""Sphinx extension: directives for the parts of the book that are generated at build time.

``{chapters}`` the table of contents by part; ``{hazard-index}``, ``{settings-table}``, ``{scoreboard}``,
``{unmeasured}``, ``{claims}``, ``{run-status}``, ``{build-status}``, ``{device}`` and ``{devices}`` the tables of
:mod:`bookkit.tables`, read from the installed package; ``{step-picture}`` the decode step with links to the chapters.
The role ``{chapter}`` links a chapter by its id, ``{part}`` all chapters of a part. Pages that hold one of them are
read again at every build, because what they show does not live in the source tree.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from bookkit import stage, tables
from dsv4ref import device, kernels, settings
from dsv4ref.evidence import records
from dsv4ref.optimizations import catalogue, chapter, report
from dsv4ref.optimizations.base import Optimization
from dsv4ref.show import home, step


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
        return tables.hazard_table(hazards, catalogue.load(), self.documents())


class SettingsTable(Generated):
    """The environment variables."""

    def markdown(self) -> str:
        return tables.settings_table(settings.rows())


class Scoreboard(Generated):
    """Predicted and measured, per device."""

    def markdown(self) -> str:
        return tables.scoreboard(report.report_rows(measured()), self.documents())


class Unmeasured(Generated):
    """The chapters that nobody has measured yet, with what is predicted for them."""

    def markdown(self) -> str:
        recorded = {row["id"] for row in report.report_rows(measured())}
        devices = [spec.key for spec in device.KNOWN_DEVICES.values() if spec.compute_units is not None]
        rows = []
        for ident, optimization in catalogue.load().items():
            if ident in recorded:
                continue
            predicted = chapter.board_rows(optimization, (), devices)
            cases = list(dict.fromkeys(row["case"] for row in predicted))
            case = home.CASE if home.CASE in cases else next(iter(cases), None)
            ratios = {row["device"]: row["predicted"] for row in predicted if row["case"] == case}
            rows.append(
                {"id": ident, "case": case, "predicted": ratios, "gate": optimization.gate.name}
                | {"hazards": len(optimization.hazards)}
            )
        return tables.unmeasured_table(rows, devices, self.documents())


class BuildStatus(Generated):
    """What the pages were computed with, when and where."""

    def markdown(self) -> str:
        versions = {name: metadata.version(name) for name in ("torch", "triton", "sphinx")}
        here = device.current()
        mode = "Triton's CPU interpreter" if kernels.mode() == "interpreted" else "compiled kernels"
        facts = (
            ("Built", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
            ("Notebooks executed", len(self.chapters())),
            ("On", f"{here.name}, with {mode}"),
            ("With", f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items())),
        )
        return tables.table(("What", "This build"), facts, "")


class Claims(Generated):
    """What the sources published."""

    def markdown(self) -> str:
        return tables.claims_table(catalogue.load(), self.documents())


class RunStatus(Generated):
    """What ran where, when."""

    def markdown(self) -> str:
        return tables.run_status(measured(), records.is_stale, self.documents())


class Device(Generated):
    """The published figures of the device that is named."""

    required_arguments = 1

    def markdown(self) -> str:
        return tables.device_table(device.get_device(self.arguments[0]))


class Devices(Generated):
    """Every GPU of the book side by side; with the argument ``arithmetic``, what follows from the figures."""

    optional_arguments = 1

    def markdown(self) -> str:
        gpus = [spec for spec in device.KNOWN_DEVICES.values() if spec.compute_units is not None]
        return tables.device_arithmetic(gpus) if self.arguments == ["arithmetic"] else tables.device_comparison(gpus)


class StepPicture(Generated):
    """One decode step on one page; the numbers on its stages lead to the chapters."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        known = {chapter.path.name for chapter in self.chapters()}

        def link(notebook: str) -> str:
            return f"{stage.CHAPTERS}/{notebook.removesuffix('.ipynb')}.html" if notebook in known else ""

        return [nodes.raw("", f'<div class="step-picture">{step.step_diagram(link=link)}</div>', format="html")]


class ChapterLink(SphinxRole):
    """``{chapter}`output_passthrough` ``: number and title, a link where the book has the notebook."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        self.env.note_reread()
        return [self.link(catalogue.get(self.text))], []

    def link(self, optimization: Optimization) -> nodes.Node:
        shown = nodes.inline("", f"{optimization.number:02} {optimization.title}")
        document = f"{stage.CHAPTERS}/{optimization.notebook.removesuffix('.ipynb')}"
        if document not in self.env.found_docs:
            return shown
        options = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{document}", "refexplicit": True}
        return addnodes.pending_xref("", shown, refdoc=self.env.docname, refwarn=True, **options)


class PartLinks(ChapterLink):
    """``{part}`II` ``: every chapter of that part, in order, or that there is none yet."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        self.env.note_reread()
        if self.text not in stage.PARTS:
            raise ValueError(f"part: got {self.text!r}, expected one of {', '.join(filter(None, stage.PARTS))}")
        links = [self.link(one) for one in catalogue.load().values() if one.part.split()[0] == self.text]
        if not links:
            return [nodes.Text("no chapter yet")], []
        return [node for one in links for node in (nodes.Text(", "), one)][1:], []


def measured() -> tuple[records.Record, ...]:
    """The records that ship with the package and those of the folder that ``DSV4REF_RECORDS`` names."""
    return records.shipped(settings.get("DSV4REF_RECORDS"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("chapters", Chapters)
    app.add_directive("hazard-index", HazardIndex)
    app.add_directive("settings-table", SettingsTable)
    app.add_directive("scoreboard", Scoreboard)
    app.add_directive("unmeasured", Unmeasured)
    app.add_directive("build-status", BuildStatus)
    app.add_directive("claims", Claims)
    app.add_directive("run-status", RunStatus)
    app.add_directive("device", Device)
    app.add_directive("devices", Devices)
    app.add_directive("step-picture", StepPicture)
    app.add_role("chapter", ChapterLink())
    app.add_role("part", PartLinks())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
