"""Notebook hygiene: every rule on a notebook that keeps it and on one that breaks it; the normal form; the runner."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dsv4ref import notebooks
from dsv4ref.notebooks import ANATOMY, CHECKED, NotebookError, check, execute, fix, normalise, requires

SHIPPED = Path(__file__).parents[1] / "notebooks"
SOLUTION = "<details>\n<summary>Solution</summary>\n\n*Because.*\n\n</details>"
TEXT = [new_output("stream", name="stdout", text="gate: pass, 12 cases\n")]


def headline(source: str = "print('gate: pass, 12 cases')", outputs: list[Any] | None = None) -> Any:
    outputs = TEXT if outputs is None else outputs
    return new_code_cell(source, metadata={"tags": [CHECKED]}, execution_count=2, outputs=outputs)


def good() -> Any:
    cells = [
        new_markdown_cell("# A chapter\n\n![what it shows](figure.svg) and [a link](https://example.org)"),
        new_code_cell("import dsv4ref\nimport torch\nprint(f'{1} us/step')  # see https://example.org"),
        new_markdown_cell("## The idea\n\nText.\n\n```text\n# no heading\n```"),
        headline(),
        new_markdown_cell(f"## Exercises\n\n### One\n\nWhy?\n\n{SOLUTION}\n\n### Two\n\nHow?\n\n{SOLUTION}"),
        new_markdown_cell("## Sources\n\n- one"),
    ]
    return normalise(new_notebook(cells=cells, metadata={"dsv4ref": {"requires": []}}))


def write(folder: Path, nb: Any, name: str = "05_chapter.ipynb") -> Path:
    path = folder / name
    path.write_text(nbformat.v4.writes(nb) + "\n", encoding="utf-8")
    return path


def rules(folder: Path) -> list[str]:
    return [finding.rule for finding in check(folder)]


def add(*cells: Any) -> Callable[[Any], None]:
    """Put cells behind the setup cell, and count anew."""

    def change(nb: Any) -> None:
        nb.cells[2:2] = cells
        nb.cells = normalise(nb).cells

    return change


def code(source: str, **kwargs: Any) -> Callable[[Any], None]:
    return add(new_code_cell(source, **kwargs))


def text(source: str) -> Callable[[Any], None]:
    return add(new_markdown_cell(source))


def replace(position: int, cell: Any) -> Callable[[Any], None]:
    """Put another cell in the place of one, keeping whatever outputs it has."""

    def change(nb: Any) -> None:
        cell.id = normalise(new_notebook(cells=[cell])).cells[0].id
        nb.cells[position] = cell

    return change


def metadata(**items: Any) -> Callable[[Any], None]:
    return lambda nb: nb.metadata.update(items)


def output(mime: str, value: str) -> Callable[[Any], None]:
    return replace(3, headline("1", [new_output("display_data", {mime: value})]))


def printed(value: str) -> Callable[[Any], None]:
    return output("text/plain", value)


def test_a_good_notebook_has_no_findings(tmp_path: Path) -> None:
    write(tmp_path, good())
    assert [str(finding) for finding in check(tmp_path)] == []


def test_the_shipped_notebooks_have_no_findings() -> None:
    if not list(SHIPPED.glob("*.ipynb")):
        pytest.skip("no chapter has been written yet")
    assert [str(finding) for finding in check(SHIPPED)] == []


BROKEN: dict[str, tuple[str, Callable[[Any], None]]] = {
    # form
    "other kernel": ("kernelspec", metadata(kernelspec={"name": "venv", "display_name": "venv"})),
    "full language info": ("language-info", metadata(language_info={"name": "python", "version": "3.11.2"})),
    "stored widget state": ("widget-state", metadata(widgets={"application/vnd.jupyter.widget-state+json": {}})),
    "editor metadata": ("metadata", metadata(toc={"base": 1})),
    "random id": ("cell-id", lambda nb: nb.cells[0].update(id="8f3a2b1c")),
    "cell metadata": ("cell-metadata", lambda nb: nb.cells[0].metadata.update(collapsed=True)),
    "empty cell": ("empty-cell", lambda nb: nb.cells.append(new_code_cell(""))),
    "outputs of a free cell": ("outputs", lambda nb: nb.cells[1].update(outputs=TEXT)),
    "count of another run": ("count", lambda nb: nb.cells[3].update(execution_count=7)),
    "count of a free cell": ("outputs", lambda nb: nb.cells[1].update(execution_count=3)),
    # notebook
    "no requirements": ("requires", metadata(dsv4ref={})),
    "requirements of another kind": ("requires", metadata(dsv4ref={"requires": "gpu"})),
    "unknown capability": ("requires", metadata(dsv4ref={"requires": ["gfx9942"]})),
    "torch before dsv4ref": ("first-import", lambda nb: replace(1, new_code_cell("import torch\nimport dsv4ref"))(nb)),
    "no import": ("first-import", lambda nb: replace(1, new_code_cell("print(1)"))(nb)),
    # headings
    "two titles": ("title", text("# Another")),
    "underlined title": ("title", text("Another\n=======")),
    "no title": ("title", replace(0, new_markdown_cell("Text."))),
    "free section": ("sections", text("## Digression")),
    "sections reordered": ("sections", text("## Break it")),
    "section twice": ("sections", text("## The idea")),
    "one exercise": ("exercises", replace(4, new_markdown_cell(f"## Exercises\n\n### One\n\n{SOLUTION}"))),
    "exercise without solution": (
        "solution",
        replace(4, new_markdown_cell(f"## Exercises\n\n### One\n\n{SOLUTION}\n\n### Two\n\nHow?")),
    ),
    "open solution": (
        "solution",
        replace(
            4, new_markdown_cell(f"## Exercises\n\n### A\n\n{SOLUTION}\n\n### B\n\n<details open>\n\nx\n\n</details>")
        ),
    ),
    "solution torn over two cells": ("solution", text("<details>\n<summary>More</summary>\n\ntext")),
    "no blank line in a solution": ("solution", text("<details>\n<summary>More</summary>\n*text*\n\n</details>")),
    # code
    "26 lines": ("length", code("\n".join(f"x{i} = {i}" for i in range(26)))),
    "pip by shell": ("source", code("!pip install triton")),
    "pip by magic": ("source", code("%pip install triton")),
    "pip of an interpreter": ("source", code("!python -m pip install triton")),
    "timeit": ("source", code("%timeit 1 + 1")),
    "timeit of a cell": ("source", code("%%timeit\n1 + 1")),
    "git clone": ("source", code("import os\nos.system('git clone somewhere')")),
    "outside address": ("source", code("url = 'https://example.org/data.json'")),
    "home folder": ("source", code("path = '~/records'")),
    "absolute path": ("source", code("path = '/scratch0/records'")),
    "absolute path in a comment": ("source", code("x = 1  # from /home/me/x")),
    "absolute path in an f-string": ("source", code("path = f'/scratch0/{1}'")),
    "drive letter": ("source", code(r"path = 'C:\\records'")),
    "interact": ("source", code("import ipywidgets\nipywidgets.interact(print, x=(1, 2))")),
    "Output widget": ("source", code("from ipywidgets import Output\nout = Output()")),
    "icon": ("source", code("from ipywidgets import Button\nButton(icon='play')")),
    "syntax error": ("source", code("x = = 1")),
    "skipped cell": ("tag", code("x = 1", metadata={"tags": ["nbval-skip"]})),
    "cell that may raise": ("tag", code("x = 1", metadata={"tags": ["raises-exception"]})),
    "nbval comment": ("tag", code("# NBVAL_IGNORE_OUTPUT\nx = 1")),
    # markdown
    "image without text": ("alt", text("![](figure.svg)")),
    "img without text": ("alt", text('<img src="figure.svg" alt="">')),
    "img in a line": ("alt", text('See <img src="figure.svg"> here.')),
    "figure directive": ("alt", text("```{figure} figure.svg\nCaption\n```")),
    "colon figure directive": ("alt", text(":::{figure} figure.svg\nCaption\n:::")),
    "outside image": ("outside", text("![a badge](https://example.org/badge.svg)")),
    "outside frame": ("outside", text('<iframe src="https://example.org/"></iframe>')),
    # headline cells
    "no headline cell": ("headlines", replace(3, new_code_cell("print(1)"))),
    "four headline cells": ("headlines", lambda nb: nb.cells.extend(_more_headlines(3))),
    "headline never run": ("headlines", replace(3, new_code_cell("print(1)", metadata={"tags": [CHECKED]}))),
    "headline without count": ("headlines outputs", lambda nb: nb.cells[3].update(execution_count=None)),
    "headline text cell": ("headlines", replace(5, new_markdown_cell("## Sources", metadata={"tags": [CHECKED]}))),
    "object address": ("headline-output", printed("<object at 0x7f32ab0c1d90>")),
    "time in us": ("headline-output", printed("baseline 12.5 us")),
    "time per step": ("headline-output", printed("41 ms/step")),
    "throughput": ("headline-output", printed("2485.06 tok/s")),
    "time of day": ("headline-output", printed("run at 12:31:07")),
    "path": ("headline-output", printed("saved in /scratch0/records/x")),
    "colours": ("headline-output", printed("\x1b[31mFAIL\x1b[0m")),
    "picture": ("headline-output", output("image/png", "iVBORw0KGgo=")),
    "widget": ("headline-output", output("application/vnd.jupyter.widget-view+json", "{}")),
    "error": (
        "headline-output",
        replace(3, headline("1/0", [new_output("error", ename="E", evalue="", traceback=[])])),
    ),
    "stderr": ("headline-output", replace(3, headline("1", [new_output("stream", name="stderr", text="careful")]))),
}


def _more_headlines(count: int) -> list[Any]:
    cells = [headline(f"print({i})") for i in range(count)]
    return normalise(new_notebook(cells=[new_code_cell("import dsv4ref"), new_code_cell("2"), *cells])).cells[2:]


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_rule_is_found_and_named(name: str, tmp_path: Path) -> None:
    broken, damage = BROKEN[name]
    nb = good()
    damage(nb)
    write(tmp_path, nb)
    found = check(tmp_path)
    assert {finding.rule for finding in found} == set(broken.split()), [str(finding) for finding in found]


FINE: dict[str, Callable[[Any], None]] = {
    "25 lines": code("\n".join(f"x{i} = {i}" for i in range(25))),
    "unit after a value": code("print(f'{1.0}/s and {2}/step')"),
    "relative path": code("path = 'data/records/x.jsonl'"),
    "package data": code("path = 'dsv4ref/data/dev/x'"),
    "address in a comment": code("x = 1  # https://example.org/pull/1"),
    "the word Output": code("print('Output(s) of interact(ion), icon=none')"),
    "other magic": code("%matplotlib inline\nx = 1"),
    "heading inside a fence": text("```python\n# a comment\n## another\n```"),
    "figure directive with text": text("```{figure} figure.svg\n:alt: bars\n\nCaption\n```"),
    "sections left out": text("## At a glance"),
    "short hex and integers": printed("code 0x7F decodes to 240; 12 cases; 3 hazards; gfx942/gfx950"),
    "html table": output("text/html", "<table><tbody><tr><td>12</td><td>pass</td></tr></tbody></table>"),
    "collapsed input": lambda nb: nb.cells[1].metadata.update(jupyter={"source_hidden": True}),
}


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_like_a_breach_is_left_alone(name: str, tmp_path: Path) -> None:
    nb = good()
    FINE[name](nb)
    write(tmp_path, nb)
    assert [str(finding) for finding in check(tmp_path)] == []


def test_the_whole_anatomy_in_order_is_accepted_and_exchanging_two_sections_is_not(tmp_path: Path) -> None:
    order = [title for title in ANATOMY if title != "Exercises"]
    for sections, expected in ((order, []), ([*order[:3], order[4], order[3], *order[5:]], ["sections"])):
        cells = [*good().cells[:2], *(new_markdown_cell(f"## {title}") for title in sections), headline("2")]
        write(tmp_path, normalise(new_notebook(cells=cells, metadata={"dsv4ref": {"requires": []}})))
        assert rules(tmp_path) == expected, check(tmp_path)


def test_the_start_notebook_has_free_sections_and_any_number_of_headlines(tmp_path: Path) -> None:
    nb = good()
    text("## Where to begin")(nb)
    nb.cells.extend(_more_headlines(3))
    nb = normalise(nb)
    write(tmp_path, nb, "00_start_here.ipynb")
    assert rules(tmp_path) == []
    write(tmp_path, nb, "01_decode_step.ipynb")
    assert rules(tmp_path) == ["sections", "headlines"]


@pytest.mark.parametrize("name", ["5_chapter.ipynb", "05-chapter.ipynb", "05_Chapter.ipynb", "Untitled.ipynb"])
def test_other_file_names_are_found(name: str, tmp_path: Path) -> None:
    write(tmp_path, good(), name)
    assert rules(tmp_path) == ["file-name"]


def test_a_number_taken_twice_is_found_in_both(tmp_path: Path) -> None:
    write(tmp_path, good(), "05_one.ipynb")
    write(tmp_path, good(), "05_two.ipynb")
    assert [(f.notebook, f.rule) for f in check(tmp_path)] == [("05_one.ipynb", "number"), ("05_two.ipynb", "number")]


def test_an_empty_folder_is_a_finding_and_a_missing_one_an_error(tmp_path: Path) -> None:
    assert rules(tmp_path) == ["empty"]
    with pytest.raises(ValueError, match=r"folder: got .*nowhere"):
        check(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["not json", "[]", '{"nbformat": 3}', '{"nbformat": 4}'])
def test_a_file_that_is_no_notebook_is_found_by_check_and_refused_by_fix(content: str, tmp_path: Path) -> None:
    path = tmp_path / "05_chapter.ipynb"
    path.write_text(content)
    assert rules(tmp_path) == ["unreadable"]
    with pytest.raises(NotebookError, match=r"05_chapter\.ipynb: cannot be read"):
        fix(tmp_path)
    assert path.read_text() == content


def untidy() -> Any:
    """What an editor leaves behind; every form rule is broken."""
    nb = good()
    nb.metadata.update(
        kernelspec={"name": "venv"}, language_info={"name": "python", "version": "3"}, widgets={}, toc={}
    )
    for i, cell in enumerate(nb.cells):
        cell.id = f"random-{i}"
        cell.metadata["collapsed"] = True
        cell.source += "\n\n"
    nb.cells[1].update(outputs=TEXT, execution_count=41)
    nb.cells[3].execution_count = 42
    nb.cells[3].outputs = [new_output("stream", name="stdout", text=part) for part in ("gate: pass, ", "12 cases\n")]
    nb.cells[3].metadata["tags"] = [CHECKED, "hide-input", CHECKED]
    nb.cells.append(new_code_cell(""))
    return nb


def test_fix_repairs_every_form_rule_and_is_idempotent(tmp_path: Path) -> None:
    path = write(tmp_path, untidy())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert {f.rule for f in check(tmp_path) if f.fixable} >= {"kernelspec", "widget-state", "cell-id", "outputs"}
    assert fix(tmp_path) == [path]
    once = path.read_bytes()
    assert [str(finding) for finding in check(tmp_path)] == []
    assert fix(tmp_path) == []
    assert path.read_bytes() == once
    assert list(tmp_path.iterdir()) == [path]


def test_fixed_bytes_are_those_nbformat_writes(tmp_path: Path) -> None:
    nb = untidy()
    nb.cells[0].source = "# Größe × 2"
    path = write(tmp_path, nb)
    fix(tmp_path)
    content = path.read_bytes()
    assert b"\r" not in content
    assert content.endswith(b"}\n")
    assert not content.endswith(b"\n\n")
    assert "# Größe × 2".encode() in content
    assert content.startswith(b'{\n "cells": [\n  {\n   "cell_type"')
    plain = json.dumps(json.loads(content), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert content.decode() == plain


def test_fix_keeps_headline_outputs_with_the_count_of_a_run_from_the_top(tmp_path: Path) -> None:
    path = write(tmp_path, untidy())
    fix(tmp_path)
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == [None, 2]
    assert cells[3].outputs == TEXT
    assert cells[3].metadata == {"tags": ["hide-input", CHECKED]}
    assert cells[1].outputs == []


def test_fix_invents_no_count_for_a_headline_that_never_ran(tmp_path: Path) -> None:
    nb = good()
    nb.cells[3].execution_count = None
    path = write(tmp_path, nb)
    fix(tmp_path)
    assert nbformat.read(path, as_version=4).cells[3].execution_count is None
    assert rules(tmp_path) == ["headlines"]


def test_another_layout_of_the_same_notebook_is_found_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "05_chapter.ipynb"
    path.write_text(json.dumps(json.loads(nbformat.v4.writes(good())), indent=2))
    assert [(f.rule, f.fixable) for f in check(tmp_path)] == [("layout", True)]
    fix(tmp_path)
    assert rules(tmp_path) == []


def test_ids_follow_the_cell_not_its_place_and_count_duplicates() -> None:
    one, two = new_markdown_cell("one"), new_markdown_cell("two")
    first = normalise(new_notebook(cells=[one, two, new_markdown_cell("one")]))
    second = normalise(new_notebook(cells=[two, one, new_code_cell("one")]))
    ids = [cell.id for cell in first.cells]
    assert second.cells[0].id == ids[1]
    assert second.cells[1].id == ids[0]
    assert ids[2] == f"{ids[0]}-2"
    assert second.cells[2].id not in ids


def test_requires_reads_the_metadata_and_refuses_unknown_words(tmp_path: Path) -> None:
    nb = good()
    nb.metadata["dsv4ref"]["requires"] = ["gfx942", "gpu"]
    assert requires(write(tmp_path, nb)) == ("gfx942", "gpu")
    nb.metadata["dsv4ref"]["requires"] = ["gfx9942"]
    with pytest.raises(NotebookError, match=r"requires gfx9942, expected words from .*gfx942"):
        requires(write(tmp_path, nb))


def test_findings_name_file_cell_and_rule() -> None:
    finding = notebooks.Finding("05_chapter.ipynb", 3, "length", "got 26 lines")
    assert str(finding) == "05_chapter.ipynb, cell 3: length: got 26 lines"


def runnable(*sources: str) -> Any:
    nb = good()
    code("x = 20")(nb)
    nb.cells[-3] = headline("print(x + 1, flush=True)\nprint(x + 2)\nx")
    nb.cells[-3].outputs, nb.cells[-3].execution_count = [], None
    nb.cells[1].source = "import dsv4ref"
    nb.cells += [new_code_cell(source) for source in sources]
    return normalise(nb)


@pytest.mark.parametrize("stale", [False, True])
def test_execute_fills_headline_cells_and_leaves_a_clean_file(stale: bool, tmp_path: Path) -> None:
    nb = runnable()
    if stale:
        nb.cells[-3].outputs, nb.cells[-3].execution_count = TEXT, 3
    path = write(tmp_path, nb)
    assert rules(tmp_path) == ([] if stale else ["headlines"])
    execute(path, timeout=60, progress=False)
    assert rules(tmp_path) == []
    cell = nbformat.read(path, as_version=4).cells[-3]
    assert [output.get("text", output.get("data")) for output in cell.outputs] == ["21\n22\n", {"text/plain": "20"}]
    assert cell.execution_count == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "cell 7: ZeroDivisionError: division by zero"),
        (
            "from ipywidgets import Button\nb = Button()\nb.on_click(lambda _: 1 / 0)\nb.click()",
            "cell 7: ZeroDivisionError: division by zero",
        ),
        ("import time\ntime.sleep(30)", "cell 7: took more than 2 s"),
    ],
    ids=["cell", "widget callback", "timeout"],
)
def test_execute_refuses_a_failing_notebook_and_leaves_the_file_alone(
    source: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, runnable(source))
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=message):
        execute(path, timeout=2, progress=False)
    assert path.read_bytes() == before


def test_execute_says_what_the_machine_lacks(tmp_path: Path) -> None:
    nb = runnable()
    nb.metadata["dsv4ref"]["requires"] = ["gfx942", "gfx950", "sm_90"]  # no machine has all three
    with pytest.raises(NotebookError, match=r"needs .*gfx9.*which this machine does not have"):
        execute(write(tmp_path, nb), progress=False)
