"""Lay out the Sphinx source tree: the book's own pages plus the notebooks, and decide what an old build may keep.

The tree is made under the output folder, so two builds (the real one and a test's) never share a source file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CHAPTERS = "chapters"
CHAPTER_NAME = re.compile(r"(\d{2})_([a-z0-9_]+)\.ipynb")
# Part captions of the sidebar, with the chapter numbers each part holds unless a notebook's metadata says otherwise.
PARTS: Mapping[str, tuple[str, range]] = {
    "": ("Start here", range(1)),
    "I": ("Part I: ground truth", range(1, 4)),
    "II": ("Part II: sparse MLA decode", range(4, 12)),
    "III": ("Part III: MXFP4 MoE", range(12, 15)),
    "IV": ("Part IV: orchestration", range(15, 18)),
    "V": ("Part V: after the sources", range(18, 100)),
}
PAGES = ("*.md", "references.bib")
# What the outputs of an executed notebook depend on besides its own cells, which jupyter-cache does compare.
SOURCE_SUFFIXES = (".py", ".jsonl", ".json", ".toml")
LIBRARIES = ("torch", "triton", "numpy", "matplotlib", "ipywidgets", "ipykernel", "myst-nb")
ENVIRONMENT_PREFIXES = ("DSV4REF_", "TRITON_")


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book.

    Args:
        number: file order, 0..99.
        ident: name after the number, the id of its optimisation.
        path: the notebook.
        title: its H1.
        part: key of :data:`PARTS`.
    """

    number: int
    ident: str
    path: Path
    title: str
    part: str


def find_chapters(notebooks: Path) -> list[Chapter]:
    """List the notebooks of a folder in reading order.

    Args:
        notebooks: folder of ``NN_id.ipynb`` files; missing numbers are fine.

    Returns:
        Chapters by number.

    Raises:
        ValueError: the folder is absent, a name or a part is not as expected, two notebooks share a number, or a
            notebook does not start with an H1.
    """
    if not notebooks.is_dir():
        raise ValueError(f"notebooks: {notebooks} is not a folder, expected one with NN_id.ipynb files")
    found: dict[int, Chapter] = {}
    for path in sorted(notebooks.glob("*.ipynb")):
        match = CHAPTER_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"notebook {path.name}: expected a name like 05_decode_launch_shape.ipynb")
        number = int(match[1])
        if number in found:
            raise ValueError(f"notebook {path.name}: number {number:02} is taken by {found[number].path.name}")
        content = json.loads(path.read_text(encoding="utf-8"))
        found[number] = Chapter(number, match[2], path, _title(content, path.name), _part(content, number, path.name))
    return [found[number] for number in sorted(found)]


def stage(book: Path, notebooks: Path, source: Path) -> list[Chapter]:
    """Bring a Sphinx source tree up to date; files that did not change keep their time stamp, so Sphinx skips them.

    Args:
        book: folder with the book's own pages.
        notebooks: folder with the chapters.
        source: the tree to write.

    Returns:
        The chapters, in reading order.

    Raises:
        ValueError: see :func:`find_chapters`.
    """
    chapters = find_chapters(notebooks)
    wanted = {source / page.name: page.read_bytes() for pattern in PAGES for page in sorted(book.glob(pattern))}
    for chapter in chapters:
        wanted[source / CHAPTERS / chapter.path.name] = _for_the_book(chapter.path)
    (source / CHAPTERS).mkdir(parents=True, exist_ok=True)
    for old in [path for path in source.rglob("*") if path.is_file() and path not in wanted]:
        old.unlink()
    for target, content in wanted.items():
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)
    return chapters


def prune(source: Path, html: Path) -> None:
    """Remove the pages of an earlier build whose source is gone; Sphinx leaves them.

    Args:
        source: staged source tree.
        html: built site.
    """
    documents = {
        path.relative_to(source).with_suffix("") for path in source.rglob("*") if path.suffix in (".md", ".ipynb")
    }
    made_by_sphinx = {Path("genindex"), Path("search")}
    for page in list(html.rglob("*.html")):
        name = page.relative_to(html).with_suffix("")
        if name.parts[0] != "_static" and name not in documents | made_by_sphinx:
            page.unlink()


def fingerprint(folders: Iterable[Path], environ: Mapping[str, str] = os.environ) -> str:
    """Digest of everything outside a notebook that its outputs depend on.

    Args:
        folders: source folders of the packages that notebooks import.
        environ: environment; only the project's and Triton's variables count.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256(sys.version.encode())
    for name in LIBRARIES:
        digest.update(f"{name}={importlib.metadata.version(name)}\n".encode())
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIXES):
            digest.update(f"{name}={environ[name]}\n".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCE_SUFFIXES and path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def package_folders() -> list[Path]:
    """Folders of ``dsv4ref`` and of the kernels that are installed inside it.

    Raises:
        ValueError: the package is not installed in this environment.
    """
    folders = []
    for name in ("dsv4ref", "dsv4ref.kernels"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{name} is not importable by {sys.executable}; install the project there first")
        folders += [Path(place) for place in spec.submodule_search_locations]
    return folders


def drop_stale(out: Path, current: str) -> bool:
    """Forget executed notebooks and parsed pages of an earlier build when what they depend on has changed.

    Without this, jupyter-cache would serve outputs of an older kernel: it compares the cells only.

    Args:
        out: output folder of the build.
        current: :func:`fingerprint` of now.

    Returns:
        Whether something was dropped.
    """
    stamp = out / "fingerprint"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == current:
        return False
    old = [out / ".jupyter_cache", out / "doctrees"]
    dropped = any(folder.exists() for folder in old)
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(current, encoding="utf-8")
    return dropped


def _title(notebook: dict, name: str) -> str:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            lines = [line for line in text.splitlines() if line.strip()]
            if lines and lines[0].startswith("# "):
                return lines[0][2:].strip()
            break
    raise ValueError(f"notebook {name}: expected the first markdown cell to start with a '# Title' line")


def _part(notebook: dict, number: int, name: str) -> str:
    part = notebook["metadata"].get("dsv4ref", {}).get("part")
    if part is None:
        return next(key for key, (_, numbers) in PARTS.items() if number in numbers)
    key = str(part).split()[0] if str(part).strip("- ") else ""
    if key not in PARTS:
        raise ValueError(f"notebook {name}: metadata part is {part!r}, expected one of {[key for key in PARTS if key]}")
    return key


def _for_the_book(path: Path) -> bytes:
    """A notebook whose links to book pages (``../book/x.md`` in the repository) lead to their place in the book."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            lines = [cell["source"]] if isinstance(cell["source"], str) else cell["source"]
            cell["source"] = [line.replace("](../book/", "](../") for line in lines]
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True).encode()
