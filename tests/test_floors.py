"""The floors hold: nothing in the package imports from its own floor's neighbours or from above.

The contract stands in pyproject.toml and import-linter checks it, on a tree laid out like the wheel: in the checkout
kernels/ is a folder of its own, which static tools cannot follow.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package as it is installed, beside its pyproject.toml."""
    ignore = shutil.ignore_patterns("__pycache__", "*.jsonl")
    shutil.copytree(ROOT / "dsv4ref", tmp_path / "dsv4ref", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "dsv4ref" / "kernels", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--config", "pyproject.toml"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "400"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def contract() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        (only,) = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return dict(only)


def layers() -> list[list[str]]:
    return [[name.strip() for name in layer.replace(":", "|").split("|")] for layer in contract()["layers"]]


def test_the_package_keeps_its_floors(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("formats/fp8.py", "import dsv4ref.optimizations.catalogue", "dsv4ref.formats.fp8 -> dsv4ref.optimizations"),
        ("ref/projection.py", "from dsv4ref.kernels import codes", "dsv4ref.ref.projection -> dsv4ref.kernels.codes"),
        ("kernels/codes.py", "from dsv4ref.ref import projection", "dsv4ref.kernels.codes -> dsv4ref.ref.projection"),
        ("accuracy/score.py", "from dsv4ref.evidence import gates", "dsv4ref.accuracy.score -> dsv4ref.evidence.gates"),
        ("evidence/gates.py", "from dsv4ref.show import tables", "dsv4ref.evidence.gates -> dsv4ref.show.tables"),
        ("show/tables.py", "from dsv4ref import cli", "dsv4ref.show.tables -> dsv4ref.cli"),
    ],
)
def test_an_import_from_above_or_beside_is_reported(module: str, line: str, broken: str, tree: Path) -> None:
    path = tree / "dsv4ref" / module
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\ndef _planted() -> None:\n    {line}\n", encoding="utf-8")
    done = lint_imports(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken in done.stdout


def test_every_module_of_the_package_stands_on_a_floor() -> None:
    """A module that no layer names may import anything: import-linter is silent about it."""
    here = [p for p in (ROOT / "dsv4ref").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    names = {f"dsv4ref.{path.stem}" for path in here} | {"dsv4ref.kernels"}
    placed = {name for layer in layers() for name in layer}
    assert names - {"dsv4ref.__init__", "dsv4ref.__main__"} == placed


FLOORS = (
    {"config", "formats", "device", "settings", "diagnostics"},
    {"ref", "kernels"},
    {"accuracy", "evidence", "serving"},
    {"optimizations"},
    {"show"},
    {"cli", "new_chapter", "notebooks"},
)


def test_the_contract_orders_the_floors_as_the_architecture_does() -> None:
    """Layers may be finer than floors, never the other way round; floors without a module yet are left out."""
    depth = {name.removeprefix("dsv4ref."): d for d, layer in enumerate(reversed(layers())) for name in layer}
    assert depth.keys() <= set().union(*FLOORS)
    spans = [[depth[name] for name in floor if name in depth] for floor in FLOORS]
    for below, above in itertools.pairwise(span for span in spans if span):
        assert max(below) < min(above), contract()["layers"]
    assert depth["ref"] == depth["kernels"], "neither may import the other"
    assert contract()["type"] == "layers"
