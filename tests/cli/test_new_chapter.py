"""``dsv4ref new-chapter``: what it makes works at once, and what it cannot make it refuses without a trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4ref
from dsv4ref import cli, new_chapter, notebooks
from dsv4ref.optimizations import catalogue

ROOT = Path(__file__).resolve().parents[2]
LONGEST = "a_toy_whose_name_is_quite_long_1"  # 32: every line with the id must fit
FILES = [
    f"kernels/{LONGEST}.py",
    f"dsv4ref/optimizations/{LONGEST}.py",
    "tests/exercises/test_exercises_97.py",
    f"notebooks/97_{LONGEST}.ipynb",
]


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the copy's package, as an editable install of the copy would give it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4REF_", "PYTEST_", "TRITON_INTERPRET"))}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A copy of the tree in which the command has run, and what it said."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dsv4ref", "kernels", "notebooks", "tests"):
        # A link to the kernels may stand in the package already; the copy gets its own.
        ignored = shutil.ignore_patterns(
            "__pycache__", ".ipynb_checkpoints", *(["kernels"] if name == "dsv4ref" else [])
        )
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "dsv4ref" / "kernels").symlink_to(folder / "kernels")
    command = ("-m", "dsv4ref", "new-chapter", LONGEST, "--number", "97", "--title", "A toy: one pass", "--part", "III")
    done = python(folder, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done


def test_it_says_what_it_made_and_makes_nothing_else(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = made
    assert done.stdout.splitlines() == FILES
    kept = {
        p.relative_to(ROOT) for top in ("dsv4ref", "kernels", "notebooks", "tests") for p in (ROOT / top).rglob("*")
    }
    now = {
        p.relative_to(folder)
        for top in ("dsv4ref", "kernels", "notebooks", "tests")
        for p in (folder / top).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert sorted(p.as_posix() for p in now - kept) == sorted(FILES)
    for name in FILES:
        assert not re.search("__[A-Z]+__", (folder / name).read_text(encoding="utf-8")), name


# One process of the copy answers everything that importing its chapters takes.
ASK = """
import json, sys
from dsv4ref import new_chapter
from dsv4ref.optimizations import catalogue, chapter
opt = catalogue.get(sys.argv[1])
try:
    new_chapter.plan(opt.id)
    refusal = "none"
except ValueError as error:
    refusal = str(error)
tiny = [name for name, case in opt.cases.items() if case.tiny]
print(json.dumps({
    "place": [opt.number, opt.title, opt.part],
    "gates": {row["case"]: row["passed"] for row in chapter.gate_rows(opt, tiny, target="cpu", seed=0)},
    "hazards": {row["hazard"]: row["caught"] for row in chapter.hazard_rows(opt, target="cpu", seed=0)},
    "again": refusal,
}))
"""


def test_its_gates_pass_and_catch_every_planted_bug(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    done = python(made[0], "-c", ASK, LONGEST)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["place"] == [97, "A toy: one pass", "III MXFP4 MoE"]
    assert said["gates"] == dict.fromkeys(("tiny", "tiny-odd", "tiny-none"), True)
    assert said["hazards"] == dict.fromkeys(("tail-unwritten", "rounded-between", "not-clamped"), True)
    assert said["again"] == f"ID: '{LONGEST}' is taken by 97_{LONGEST}.ipynb, expected a new one"


def test_the_notebook_says_its_part_and_title(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    notebook = json.loads((made[0] / FILES[-1]).read_text(encoding="utf-8"))
    assert notebook["metadata"]["dsv4ref"] == {"part": "III", "requires": ["cpu-interpreter"]}
    assert "".join(notebook["cells"][0]["source"]).startswith("# 97 · A toy: one pass\n")


def test_it_passes_hygiene_lint_and_the_chapters_tests(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    assert [str(finding) for finding in notebooks.check(folder / "notebooks")] == []
    for rules in (("check",), ("format", "--check")):
        done = python(folder, "-m", "ruff", *rules, *FILES[:3])
        assert done.returncode == 0, done.stdout + done.stderr
    tests = ("tests/optimizations/test_catalogue.py", FILES[2])
    done = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert done.returncode == 0, done.stdout[-2000:]


# --- refusals; nothing is written ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["Split_K", "split-k", "2pass", "_x", "x_", "a__b", "class", "a" * 33, "", "über", "a/b"]
)
def test_only_identifiers_are_ids(id: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ID: got {id!r}, expected a Python identifier in lower case")):
        new_chapter.plan(id)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("output_passthrough", "ID: 'output_passthrough' is taken by 06_output_passthrough.ipynb"),
        ("start_here", "ID: 'start_here' is taken by 00_start_here.ipynb"),
        ("catalogue", "ID: 'catalogue' would overwrite or shadow dsv4ref/optimizations/catalogue.py"),
        ("checks", "ID: 'checks' would overwrite or shadow kernels/checks.py"),
        ("experts", "ID: 'experts' would overwrite or shadow kernels/experts"),
    ],
)
def test_names_in_use_are_refused(id: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        new_chapter.plan(id)


def test_numbers_in_use_or_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--number: 6 is taken by 06_output_passthrough.ipynb, expected a free one"):
        new_chapter.plan("toy", number=6)
    for number in (-1, 100):
        with pytest.raises(ValueError, match=f"--number: got {number}, expected 1 to 99"):
            new_chapter.plan("toy", number=number)


def test_titles_and_parts_that_do_not_fit_are_refused() -> None:
    for title in ("", 'a "quoted" one', "two\nlines", "pipe | pipe", "x" * 61, "__ID__"):
        with pytest.raises(ValueError, match=re.escape(f"--title: got {title!r}, expected one line")):
            new_chapter.plan("toy", title=title)
    with pytest.raises(ValueError, match=r"--part: got 'VI', expected one of I, II, III, IV, V"):
        new_chapter.plan("toy", part="VI")


def test_by_default_it_comes_last_and_is_called_by_its_id() -> None:
    plan = new_chapter.plan("one_more_toy")
    assert plan.number > max(opt.number for opt in catalogue.load().values())
    assert (plan.title, plan.part) == ("One more toy", "V")
    assert not any(path.exists() for path in plan.files.values())


def test_an_installed_package_without_a_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4ref, "__file__", str(tmp_path / "dsv4ref" / "__init__.py"))
    with pytest.raises(
        ValueError, match=r"which has no pyproject.toml, kernels, notebooks, tests; expected a checkout"
    ):
        new_chapter.plan("toy")


def test_a_notebook_that_does_not_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = new_chapter.Plan("toy", 97, "Toy", "V", tmp_path)
    for path in plan.files.values():
        path.parent.mkdir(parents=True)

    def fails(path: Path, **_: object) -> None:
        assert path.is_file()
        raise notebooks.NotebookError(f"{path.name}, cell 3: no")

    monkeypatch.setattr(notebooks, "execute", fails)
    with pytest.raises(notebooks.NotebookError, match=r"97_toy.ipynb, cell 3: no"):
        new_chapter.create(plan, progress=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dsv4ref", "new-chapter", "split-k"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("dsv4ref: ID: got 'split-k', expected a Python identifier")
