"""Controls of the gates: one bug planted in a copy of the shipped source, and the same checks must turn red.

Each run is a process of its own that imports the copy. A mutation names the text it replaces, which must stand in the
source exactly once: when the code moves, the control breaks loudly instead of testing nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Verifies the cases given as arguments and prints {case: [passed, detail]} and where the code came from.
VERIFY = """
import json, sys
from dsv4ref import kernels
from dsv4ref.optimizations import base, catalogue
found = {}
for chapter, case in (name.split("/") for name in sys.argv[1:]):
    verdict = base.verify(catalogue.get(chapter), case, device="cpu", seed=0)
    found[f"{chapter}/{case}"] = [verdict.passed, verdict.detail]
print(json.dumps({"kernels": kernels.__file__, "found": found}))
"""


MUTATIONS = {
    name: mutation
    for file in sorted(Path(__file__).parent.glob("mutations_*.py"))
    for name, mutation in importlib.import_module(file.stem).MUTATIONS.items()
}
CASES = sorted({case for m in MUTATIONS.values() for case in (*m.cases, *m.unaffected)})


def copy_package(folder: Path) -> None:
    """The package as it is installed: kernels/ inside dsv4ref/."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dsv4ref", folder / "dsv4ref", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "dsv4ref" / "kernels", ignore=ignore)


def mutate(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / ("dsv4ref/" + file if file.startswith("kernels/") else file)
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file} holds the text {source.count(old)} times, expected once: {old!r}"
    path.write_text(source.replace(old, new), encoding="utf-8")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy, its kernels interpreted."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("DSV4REF_LAUNCH_SHAPE", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def verified(folder: Path, cases: tuple[str, ...]) -> dict[str, Any]:
    done = python(folder, "-c", VERIFY, *cases)
    assert done.returncode == 0, done.stderr[-2000:]  # a crash is no verdict
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["kernels"]).is_relative_to(folder), "the run must use the copy"
    return dict(answer["found"])


def test_the_unmutated_copy_is_green(tmp_path: Path) -> None:
    copy_package(tmp_path)
    red = {case: detail for case, (passed, detail) in verified(tmp_path, tuple(CASES)).items() if not passed}
    assert not red


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_in_the_source_turns_the_gates_red(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    copy_package(tmp_path)
    mutate(tmp_path, mutation.file, mutation.old, mutation.new)
    found = verified(tmp_path, (*mutation.cases, *mutation.unaffected))
    missed = {case: found[case][1] for case in mutation.cases if found[case][0]}
    assert not missed, "the gate did not notice"
    collateral = {case: found[case][1] for case in mutation.unaffected if not found[case][0]}
    assert not collateral, "the mutation breaks more than it says"


# The chapter's gate uses the device check, so the host check's controls are its own tests.
HOST_KEY = "return self.weight() is weight and self.scale() is scale and self.seen == _visible(weight, scale)"
HOST_KEYS = {
    "data_ptr only": (
        "return [s[1] for s in self.seen] == [s[1] for s in _visible(weight, scale)]",
        {"write_in_place", "write_one_element", "write_scale_in_place", "reuse_address"},
    ),
    "data_ptr and version": ("return self.seen == _visible(weight, scale)", {"reuse_address"}),
    "identity only": (
        "return self.weight() is weight and self.scale() is scale",
        {"write_in_place", "write_one_element", "write_scale_in_place"},
    ),
}


@pytest.mark.parametrize("key", HOST_KEYS)
def test_a_weaker_host_key_turns_its_tests_red(key: str, tmp_path: Path) -> None:
    weaker, unseen = HOST_KEYS[key]
    copy_package(tmp_path)
    mutate(tmp_path, "kernels/projection.py", HOST_KEY, weaker)
    for folder in ("tests/kernels", "tests/conftest.py"):
        source, target = ROOT / folder, tmp_path / folder
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    done = python(
        tmp_path, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-rf", "tests/kernels/test_projection.py",
        "-k", "test_the_host_check_sees_what_the_host_can_see",
    )  # fmt: skip
    assert str(tmp_path / "dsv4ref" / "kernels") in done.stdout, "the run must use the copy"
    red = {line.split("[")[1].split("]")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert red == unseen, done.stdout[-2000:]
