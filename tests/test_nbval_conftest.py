"""The notebooks' conftest under nbval, in a process of its own: what is skipped, and what nbval sees fail."""

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from dsv4ref.device import capabilities
from dsv4ref.notebooks import CHECKED

CONFTEST = Path(__file__).parents[1] / "notebooks" / "conftest.py"


def add(folder: Path, name: str, *sources: str, requires: list[str], stored: str | None = None) -> None:
    """A notebook of untagged cells; with `stored`, the last one is tagged and has that output."""
    cells = [new_code_cell(source) for source in sources]
    if stored is not None:
        cells[-1].metadata["tags"] = [CHECKED]
        cells[-1].execution_count = len(cells)
        cells[-1].outputs = [new_output("stream", name="stdout", text=stored)]
    nbformat.write(new_notebook(cells=cells, metadata={"dsv4ref": {"requires": requires}}), folder / name)


def run(folder: Path) -> str:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")  # the folder is a project of its own
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-rA", "--color=no"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "."],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MPLBACKEND": "agg"},
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One run over notebooks of every kind; each test below reads its own lines."""
    folder = tmp_path_factory.mktemp("notebooks")
    absent = "gfx942" if "gfx942" not in capabilities() else "sm_90"
    add(folder, "01_fine.ipynb", "x = 2", "print('gate: pass')", requires=[], stored="gate: pass\n")
    add(folder, "02_absent.ipynb", "raise SystemError('this cell ran')", requires=[absent])
    click = "from ipywidgets import Button\nb = Button()\nb.on_click(lambda _: 1 / 0)\nb.click()\nprint('went on')"
    add(folder, "03_callback.ipynb", click, requires=[])
    moved = (
        "from dsv4ref.show.panels import bars, panel\n"
        "p = panel(lambda n: bars({'x': 1 / (3 - n)}, title='t', unit='us'), n=(1, 5))",
        "p.controls['n'].value = 3",
    )
    add(folder, "04_panel.ipynb", *moved, requires=[])
    add(folder, "05_differs.ipynb", "print('hazards caught: 2 of 3')", requires=[], stored="hazards caught: 3 of 3\n")
    backend = "import os\nassert os.environ['MPLBACKEND'] != 'agg', os.environ['MPLBACKEND']"
    add(folder, "06_backend.ipynb", backend, requires=[])
    return run(folder)


def outcome(report: str, cell: str) -> str:
    lines = [line for line in report.splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED", "ERROR"))]
    found = [line.split()[0] for line in lines if cell in line]
    assert len(found) == 1, f"{cell}: {found}\n{report}"
    return found[0]


def test_a_notebook_that_can_run_passes(report: str) -> None:
    assert outcome(report, "01_fine.ipynb::Cell 0") == "PASSED"
    assert outcome(report, "01_fine.ipynb::Cell 1") == "PASSED"


def test_a_notebook_whose_capability_is_absent_is_skipped_with_the_reason(report: str) -> None:
    skipped = [line for line in report.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1, report
    assert "02_absent.ipynb" in skipped[0]
    assert "needs gfx942; this machine has" in skipped[0] or "needs sm_90; this machine has" in skipped[0]
    assert "this cell ran" not in report


def test_an_error_in_a_widget_callback_fails_the_cell(report: str) -> None:
    assert outcome(report, "03_callback.ipynb::Cell 0") == "FAILED"
    assert "ZeroDivisionError" in report


def test_an_error_when_a_panel_moves_fails_the_cell_that_moved_it(report: str) -> None:
    assert outcome(report, "04_panel.ipynb::Cell 0") == "PASSED"
    assert outcome(report, "04_panel.ipynb::Cell 1") == "FAILED"


def test_a_headline_output_that_differs_fails(report: str) -> None:
    assert outcome(report, "05_differs.ipynb::Cell 0") == "FAILED"
    assert "hazards caught: 2 of 3" in report


def test_kernels_start_with_their_own_plotting_backend(report: str) -> None:
    assert outcome(report, "06_backend.ipynb::Cell 0") == "PASSED"


def load(folder: Path) -> Any:
    """The conftest as a module that believes to lie in `folder`."""
    spec = importlib.util.spec_from_file_location("notebooks_conftest", shutil.copy(CONFTEST, folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_misspelt_capability_stops_the_run_instead_of_skipping(tmp_path: Path) -> None:
    add(tmp_path, "01_typo.ipynb", "x = 1", requires=["gfx9942"])
    cell = SimpleNamespace(path=tmp_path / "01_typo.ipynb")
    with pytest.raises(pytest.UsageError, match=r"01_typo\.ipynb: requires gfx9942, expected words from"):
        load(tmp_path).pytest_collection_modifyitems([cell])


@pytest.mark.parametrize(
    ("option", "workers", "dist", "refused"),
    [
        ("nbval_lax", 2, "load", True),
        ("nbval_lax", 2, "worksteal", True),
        ("nbval_lax", 2, "loadfile", False),
        ("nbval_lax", 0, "no", False),
        ("", 2, "load", False),
    ],
)
def test_a_notebook_is_not_spread_over_processes(
    option: str, workers: int, dist: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")  # restored whatever the conftest does to it
    options = {option: True, "numprocesses": workers, "dist": dist}
    config = SimpleNamespace(getoption=lambda name, default=None: options.get(name, default))
    with pytest.raises(pytest.UsageError, match="add --dist loadfile") if refused else nullcontext():
        load(tmp_path).pytest_configure(config)
