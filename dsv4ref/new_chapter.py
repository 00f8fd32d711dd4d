"""A new chapter from the template: module, kernels, notebook and exercise tests that pass every check at once.

The template is a toy that works, an activation in one launch instead of two, in ``data/new_chapter``. Its files are
what they will be but for five words between double underscores. The reader replaces it piece by piece, and every check
says what is not consistent yet.

Files are written into the checkout that this package is imported from, the notebook is run once so that its headline
cells have outputs to compare, and if anything goes wrong every file is taken back.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import dsv4ref
from dsv4ref import notebooks
from dsv4ref.optimizations import catalogue
from dsv4ref.show.step import PLANNED

__all__ = ["PARTS", "Plan", "checkout", "create", "plan"]

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "I": "ground truth",
        "II": "sparse MLA decode",
        "III": "MXFP4 MoE",
        "IV": "orchestration",
        "V": "after the sources",
    }
)
"""The parts of the book: numeral -> what it is about."""

_TEMPLATE = Path(__file__).parent / "data" / "new_chapter"
_REQUIRES = ("cpu-interpreter",)
_LONGEST_ID = 32  # lines of the template that hold the id stay within 120 columns
_TITLE = re.compile(r"[A-Za-z0-9][\w ,.:()+/'-]{0,59}")  # stands in a string, a table and a heading as it is


@dataclass(frozen=True)
class Plan:
    """A chapter that can be created: its place in the book, and the files it will be.

    Args:
        id, number, title: as in `dsv4ref.optimizations.base.Optimization`.
        part: numeral of `PARTS`.
        root: the checkout.
    """

    id: str
    number: int
    title: str
    part: str
    root: Path

    @property
    def files(self) -> Mapping[str, Path]:
        """Template file -> the file it becomes; the notebook comes last, because it needs the others to run."""
        return {
            "kernel.py.txt": self.root / "kernels" / f"{self.id}.py",
            "module.py.txt": self.root / "dsv4ref" / "optimizations" / f"{self.id}.py",
            "exercises.py.txt": self.root / "tests" / "exercises" / f"test_exercises_{self.number:02d}.py",
            "notebook.py.txt": self.root / "notebooks" / f"{self.number:02d}_{self.id}.ipynb",
        }

    def text(self, template: str) -> str:
        """A template file with this chapter's words in it."""
        words = {
            "__ID__": self.id,
            "__NN__": f"{self.number:02d}",
            "__NUMBER__": str(self.number),
            "__TITLE__": self.title,
            "__NUMERAL__": self.part,
            "__PART__": f"{self.part} {PARTS[self.part]}",
        }
        source = (_TEMPLATE / template).read_text(encoding="utf-8")
        return re.sub("|".join(words), lambda match: words[match[0]], source)


def checkout() -> Path:
    """The checkout that this package is imported from.

    Raises:
        ValueError: it is installed without one.
    """
    root = Path(dsv4ref.__file__).resolve().parents[1]
    if absent := [name for name in ("pyproject.toml", "kernels", "notebooks", "tests") if not (root / name).exists()]:
        raise ValueError(
            f"dsv4ref is imported from {root}, which has no {', '.join(absent)}; expected a checkout, installed with "
            "pip install -e"
        )
    return root


def plan(id: str, *, number: int | None = None, title: str | None = None, part: str = "V") -> Plan:
    """Check what was asked for; nothing is written.

    Args:
        id: a Python identifier in lower case; names the module, the kernels and the notebook.
        number: place in the book, 1 to 99; behind every chapter, written or planned, if None.
        title: heading; the id in words if None.
        part: numeral of `PARTS`.

    Returns:
        the plan, whose files do not exist yet.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    root = checkout()
    if not re.fullmatch(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*", id) or keyword.iskeyword(id) or len(id) > _LONGEST_ID:
        raise ValueError(
            f"ID: got {id!r}, expected a Python identifier in lower case of at most {_LONGEST_ID} letters, digits and "
            "single underscores"
        )
    title = id.replace("_", " ").capitalize() if title is None else title
    if not _TITLE.fullmatch(title):
        raise ValueError(
            f"--title: got {title!r}, expected one line of at most 60 letters, digits, spaces and , . : ( ) + / ' -"
        )
    if part not in PARTS:
        close = difflib.get_close_matches(part.upper(), PARTS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"--part: got {part!r}, expected one of {', '.join(PARTS)}{hint}")
    taken = _taken(root)
    behind = max(*taken, *PLANNED) + 1
    number = behind if number is None else number
    if not 1 <= number <= 99:
        raise ValueError(f"--number: got {number}, expected 1 to 99")
    if number in taken:
        raise ValueError(f"--number: {number} is taken by {taken[number]}, expected a free one, such as {behind}")
    found = Plan(id, number, title, part, root)
    _refuse_existing(found)
    return found


def create(chapter: Plan, *, timeout: float = 300.0, progress: bool = True) -> tuple[Path, ...]:
    """Write a chapter's files and run its notebook.

    Args:
        chapter: from `plan`.
        timeout: seconds a cell may take.
        progress: show a progress bar on stderr.

    Returns:
        the files, in the order in which they were written.

    Raises:
        ValueError: a file has come into being since.
        NotebookError: the notebook does not run here; no file is left.
    """
    _refuse_existing(chapter)
    files = chapter.files
    written: list[Path] = []
    try:
        for template, path in files.items():
            text = chapter.text(template)
            written.append(path)
            path.write_text(_as_notebook(text, chapter.part) if path.suffix == ".ipynb" else text, encoding="utf-8")
        notebooks.execute(files["notebook.py.txt"], timeout=timeout, progress=progress)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return tuple(written)


def _taken(root: Path) -> Mapping[int, str]:
    """Numbers of chapters, of pages, and of notebooks that no module belongs to."""
    numbers = {int(row["number"]): str(row["notebook"]) for row in catalogue.rows(())}
    on_disk = {int(path.name[:2]): path.name for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    return numbers | on_disk


def _refuse_existing(chapter: Plan) -> None:
    known = {str(row["id"]): str(row["notebook"]) for row in catalogue.rows(())}
    if chapter.id in known:
        raise ValueError(f"ID: {chapter.id!r} is taken by {known[chapter.id]}, expected a new one")
    packages = [chapter.root / "kernels" / chapter.id, chapter.root / "dsv4ref" / "optimizations" / chapter.id]
    existing = [path for path in (*chapter.files.values(), *packages) if path.exists()]
    if existing:
        shown = ", ".join(_relative(existing, chapter.root))
        raise ValueError(f"ID: {chapter.id!r} would overwrite or shadow {shown}, expected a new one")


def _relative(paths: Iterable[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def _as_notebook(source: str, part: str) -> str:
    """A percent script as a notebook: ``# %%`` begins a code cell, ``# %% [markdown]`` one of commented Markdown."""
    cells = []
    for block in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            cells.append(new_markdown_cell("\n".join(re.sub(r"^# ?", "", line) for line in body.splitlines())))
        else:
            tags = re.findall(r'"([\w-]+)"', head)
            cells.append(new_code_cell(body, metadata={"tags": tags} if tags else {}))
    metadata = {"dsv4ref": {"requires": list(_REQUIRES), "part": part}, "kernelspec": notebooks.KERNELSPEC}
    return str(nbformat.writes(new_notebook(cells=cells, metadata=metadata)))
