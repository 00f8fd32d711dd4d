"""The start page lists every chapter that there is, in order, with links and with reading times that are counted."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsv4ref.optimizations import catalogue
from dsv4ref.show import home

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHAPTERS = [chapter for chapter in catalogue.load().values() if (NOTEBOOKS / chapter.notebook).is_file()]


def notebook(path: Path, prose: str, code: str = "") -> Path:
    nbformat.write(new_notebook(cells=[new_markdown_cell(prose), new_code_cell(code)]), path)
    return path


@pytest.mark.parametrize(
    ("words", "lines", "minutes"), [(1, 0, 5), (1349, 0, 5), (1351, 0, 10), (900, 125, 10), (1800, 250, 20)]
)
def test_reading_time_counts_words_and_lines_of_code(tmp_path: Path, words: int, lines: int, minutes: int) -> None:
    path = notebook(tmp_path / "x.ipynb", "word " * words, "x = 1\n\n" * lines)
    assert home.reading_minutes(path) == minutes


def test_folded_solutions_take_no_time_to_read(tmp_path: Path) -> None:
    folded = f"# x\n\n<details><summary>Solution</summary>\n\n{'word ' * 5000}\n\n</details>"
    assert home.reading_minutes(notebook(tmp_path / "x.ipynb", folded)) == 5


def test_reading_time_of_a_notebook_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: no notebook .*gone\.ipynb"):
        home.reading_minutes(tmp_path / "gone.ipynb")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.id)
def test_reading_time_on_a_card_is_about_what_the_notebook_has(chapter: catalogue.Optimization) -> None:
    path = NOTEBOOKS / chapter.notebook
    said = re.search(r"^\| Reading time \| (\d+) minutes", nbformat.read(path, 4).cells[0].source, re.MULTILINE)
    assert said is not None, chapter.notebook
    counted = home.reading_minutes(path)
    assert abs(int(said[1]) - counted) <= 10, f"{chapter.notebook} says {said[1]} minutes, counted {counted}"


def test_contents_link_every_chapter_in_order_with_its_minutes() -> None:
    text = home.contents(catalogue.rows(()), NOTEBOOKS)
    listed = re.findall(r"^\| (\d\d) \| \[.+?\]\((\w+\.ipynb)\) \| .+? \| (\d+) \| nothing yet \|$", text, re.MULTILINE)
    parts = list(dict.fromkeys(chapter.part for chapter in CHAPTERS))
    ordered = sorted(CHAPTERS, key=lambda chapter: (parts.index(chapter.part), chapter.number))
    assert [(int(number), name) for number, name, _ in listed] == [(c.number, c.notebook) for c in ordered]
    assert re.findall(r"^\| \| \*\*Part (.+?)\*\*", text, re.MULTILINE) == parts


def test_contents_name_a_chapter_without_a_notebook_and_leave_pages_out(tmp_path: Path) -> None:
    chapter = {
        "number": 5,
        "title": "A | B",
        "part": "II x",
        "gate": "bit",
        "notebook": "05_a.ipynb",
        "devices": ["h200"],
    }
    page = {"number": 0, "title": "Start", "part": "-", "gate": None, "notebook": "00_s.ipynb", "devices": []}
    assert home.contents([page, chapter], tmp_path).splitlines()[2:] == [
        "| | **Part II x** | | | |",
        "| 05 | A \\| B |  |  | h200 |",
    ]


def test_one_case_each_prefers_the_usual_case_keeps_devices_apart_and_leaves_host_time_out() -> None:
    rows = [
        {"id": id, "case": case, "device": device, "method": "graph"}
        for id, case, device in (
            ("a", "flash-1", "h200"), ("a", home.CASE, "h200"), ("a", "flash-1", "mi300x"), ("b", "c4", "h200"),
        )
    ]  # fmt: skip
    rows.insert(0, {"id": "a", "case": home.CASE, "device": "h200", "method": "host"})
    chosen = [(row["id"], row["case"], row["device"]) for row in home.one_case_each(rows)]
    assert chosen == [("a", home.CASE, "h200"), ("a", "flash-1", "mi300x"), ("b", "c4", "h200")]
    with pytest.raises(ValueError, match="rows: got none"):
        home.one_case_each([])
