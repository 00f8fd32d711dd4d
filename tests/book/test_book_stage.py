"""Staging: chapters in order, a source tree that follows the notebooks, a cache that follows the code."""

import json
import os
from pathlib import Path

import pytest
from bookkit import stage

from dsv4ref import new_chapter
from dsv4ref.optimizations import catalogue


def notebook(folder: Path, name: str, first: str = "# A title", part: str | None = None) -> Path:
    metadata = {} if part is None else {"dsv4ref": {"part": part}}
    cells = [{"cell_type": "markdown", "metadata": {}, "id": "a", "source": first.splitlines(keepends=True)}]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_chapters_come_in_order_with_title_and_part(tmp_path: Path) -> None:
    notebook(tmp_path, "12_w2.ipynb", "# Direct *W2*\n\ntext")
    notebook(tmp_path, "00_start_here.ipynb", "# Start here")
    notebook(tmp_path, "05_decode.ipynb", "\n# Decode", part="IV orchestration")
    notebook(tmp_path, "19_last.ipynb")
    found = [(c.number, c.ident, c.title, c.part) for c in stage.find_chapters(tmp_path)]
    assert found == [
        (0, "start_here", "Start here", ""),
        (5, "decode", "Decode", "IV"),
        (12, "w2", "Direct *W2*", "III"),
        (19, "last", "A title", "V"),
    ]


def test_catalogue_and_book_agree_on_parts() -> None:
    chapters = catalogue.load()
    assert chapters
    for chapter in chapters.values():
        number, name = chapter.part.split(" ", 1)
        caption, numbers = stage.PARTS[number]
        assert caption == f"Part {number}: {name}", chapter.id
        assert chapter.number in numbers, chapter.id


def test_every_number_has_exactly_one_part() -> None:
    for number in range(100):
        assert sum(number in numbers for _, numbers in stage.PARTS.values()) == 1, number


@pytest.mark.parametrize(
    ("name", "first", "part", "message"),
    [
        ("5_decode.ipynb", "# T", None, r"5_decode\.ipynb: expected a name like"),
        ("05_Decode.ipynb", "# T", None, r"05_Decode\.ipynb: expected a name like"),
        (
            "05_decode.ipynb",
            "No title",
            None,
            r"05_decode\.ipynb: expected the first markdown cell to start with a '# Title'",
        ),
        ("05_decode.ipynb", "# T", "VII", r"05_decode\.ipynb: metadata part is 'VII', expected one of \['I', "),
    ],
)
def test_notebook_that_is_not_a_chapter_is_named(
    tmp_path: Path, name: str, first: str, part: str | None, message: str
) -> None:
    notebook(tmp_path, name, first, part)
    with pytest.raises(ValueError, match=message):
        stage.find_chapters(tmp_path)


def test_two_notebooks_of_one_number_are_refused(tmp_path: Path) -> None:
    notebook(tmp_path, "05_a.ipynb")
    notebook(tmp_path, "05_b.ipynb")
    with pytest.raises(ValueError, match=r"05_b\.ipynb: number 05 is taken by 05_a\.ipynb"):
        stage.find_chapters(tmp_path)


def test_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"notebooks: .*gone is not a folder"):
        stage.find_chapters(tmp_path / "gone")


def test_source_tree_follows_pages_and_notebooks(tmp_path: Path) -> None:
    book, notebooks, source = tmp_path / "book", tmp_path / "notebooks", tmp_path / "source"
    book.mkdir()
    (book / "index.md").write_text("# Index")
    (book / "conf.py").write_text("")
    notebook(notebooks, "01_a.ipynb", "# A\n\n[H12](../book/hazards.md#h12), [b](02_b.ipynb)")
    gone = notebook(notebooks, "02_b.ipynb")
    stage.stage(book, notebooks, source)
    staged = source / "chapters" / "01_a.ipynb"
    assert {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()} == {
        "index.md",
        "chapters/01_a.ipynb",
        "chapters/02_b.ipynb",
    }
    assert (
        "".join(json.loads(staged.read_text())["cells"][0]["source"])
        == "# A\n\n[H12](../hazards.md#h12), [b](02_b.ipynb)"
    )

    os.utime(staged, (1, 1))
    gone.unlink()
    stage.stage(book, notebooks, source)
    assert staged.stat().st_mtime == 1, "a notebook that did not change was written again"
    assert not (source / "chapters" / "02_b.ipynb").exists()

    notebook(notebooks, "01_a.ipynb", "# Changed")
    stage.stage(book, notebooks, source)
    assert staged.stat().st_mtime > 1


def test_pages_without_a_source_are_removed_from_an_old_site(tmp_path: Path) -> None:
    source, html = tmp_path / "source", tmp_path / "html"
    for path in (source / "index.md", source / "chapters" / "01_a.ipynb"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    pages = (
        "index.html",
        "search.html",
        "genindex.html",
        "gone.html",
        "chapters/01_a.html",
        "chapters/02_b.html",
        "_static/x.html",
    )
    for name in pages:
        (html / name).parent.mkdir(parents=True, exist_ok=True)
        (html / name).write_text("")
    stage.prune(source, html)
    assert {page for page in pages if not (html / page).exists()} == {"gone.html", "chapters/02_b.html"}


def test_fingerprint_follows_sources_records_and_variables(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("a = 1")
    (tmp_path / "h200.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    seen = {stage.fingerprint([tmp_path], {})}
    (tmp_path / "notes.txt").write_text("changed")
    assert stage.fingerprint([tmp_path], {"HOME": "/elsewhere"}) in seen
    for change in (
        lambda: (tmp_path / "kernel.py").write_text("a = 2"),
        lambda: (tmp_path / "h200.jsonl").write_text('{"p50_us": 1}'),
        lambda: (tmp_path / "kernel.py").rename(tmp_path / "other.py"),
    ):
        change()
        seen.add(stage.fingerprint([tmp_path], {}))
    seen.add(stage.fingerprint([tmp_path], {"DSV4REF_SEED": "1"}))
    seen.add(stage.fingerprint([tmp_path], {"TRITON_INTERPRET": "1"}))
    assert len(seen) == 6


def test_outputs_of_older_code_are_dropped(tmp_path: Path) -> None:
    cached = tmp_path / ".jupyter_cache" / "global.db"
    assert not stage.drop_stale(tmp_path, "first")
    cached.parent.mkdir()
    cached.write_text("")
    assert not stage.drop_stale(tmp_path, "first")
    assert cached.exists()
    assert stage.drop_stale(tmp_path, "second")
    assert not cached.exists()


def test_package_folders_hold_the_kernels_too() -> None:
    names = [folder / "__init__.py" for folder in stage.package_folders()]
    assert len(names) == 2
    assert all(name.is_file() for name in names), names
    assert names[1].parent.name == "kernels"


def test_parts_are_those_that_new_chapters_can_be_put_into() -> None:
    captions = {key: caption for key, (caption, _) in stage.PARTS.items() if key}
    assert captions == {key: f"Part {key}: {about}" for key, about in new_chapter.PARTS.items()}
