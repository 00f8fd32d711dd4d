"""nbval over this folder: skips what the machine cannot run, with the reason, and nothing else.

    pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks/

Cells of a notebook share one kernel and run in order, so that with pytest-xdist a notebook has to stay in one process:
``-n 2 --dist loadfile``. The timeout per cell is nbval's own option.
"""

import os
from pathlib import Path

import pytest

from dsv4ref.device import capabilities, unmet
from dsv4ref.notebooks import NotebookError, requires

HERE = Path(__file__).parent
WHOLE_FILES = ("loadfile", "loadscope")  # how pytest-xdist keeps a file in one process


def pytest_configure(config: pytest.Config) -> None:
    if not (config.getoption("nbval", False) or config.getoption("nbval_lax", False)):
        return
    if config.getoption("numprocesses", None) and config.getoption("dist") not in WHOLE_FILES:
        raise pytest.UsageError("cells of one notebook share a kernel: add --dist loadfile, or leave out -n")
    # The kernel sets its own inline backend unless the shell, or a test run around this one, has set another.
    os.environ.pop("MPLBACKEND", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    have = capabilities()
    marks: dict[Path, pytest.MarkDecorator | None] = {}
    for item in items:
        path = item.path
        if path.suffix != ".ipynb" or HERE not in path.parents:
            continue
        if path not in marks:
            try:
                missing = unmet(requires(path), have)
            except NotebookError as error:
                raise pytest.UsageError(str(error)) from error
            reason = f"needs {', '.join(missing)}; this machine has {', '.join(sorted(have)) or 'none of them'}"
            marks[path] = pytest.mark.skip(reason=reason) if missing else None
        if mark := marks[path]:
            item.add_marker(mark)
