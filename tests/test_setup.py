"""What a newcomer meets first: README, Makefile, pins, conda file, CI script. Nothing is installed here."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from dsv4ref.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
needs_checkout = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout"
)


def pins() -> dict[str, str]:
    """Version by canonical name of every line in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"constraints.txt: {line!r}, expected name==version"
            assert canonicalize_name(name) not in found, f"constraints.txt: {name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


def make(*arguments: str) -> str:
    # These tests may run under `make test TORCH=...`, whose choices an inner make would take over.
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell_lines(text: str) -> list[str]:
    """Commands of the ``console`` blocks, without prompt and comment."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), lines
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines]


def makes(text: str) -> set[str]:
    """Targets of every ``make ...`` that a text tells the reader to type."""
    typed = [*shell_lines(text), *re.findall(r"`([^`\n]+)`", text)]
    words = [shlex.split(line) for line in typed if re.search(r"(^|\s)make ", line)]
    return {word for line in words for word in line[line.index("make") + 1 :] if "=" not in word}


# ---- README ----


@needs_make
def test_readme_and_preface_name_targets_that_exist() -> None:
    listed = set(re.findall(r"^  make (\w+)", make("help"), re.MULTILINE))
    told = makes(README) | makes((ROOT / "book" / "preface.md").read_text(encoding="utf-8"))
    assert {"lab", "workbook", "test"} <= told
    assert told - listed == set()


def test_readme_commands_parse_and_exist() -> None:
    commands: Any = get_command(app)
    told = [line for line in re.findall(r"`(dsv4ref [^`\n]+)`", README) if line != "dsv4ref COMMAND"]
    known = commands.commands
    for line in told:
        name, *arguments = shlex.split(line)[1:]
        assert name in known, f"README: {line}"
        known[name].make_context(name, arguments, resilient_parsing=False).close()
    missing = set(known) - {line.split()[1] for line in told}
    assert missing == set(), "commands that README's table does not have"


def test_readme_links_lead_somewhere_and_its_figure_has_a_text() -> None:
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", README)
    assert [target for _, _, target in links if not re.match(r"https?:", target) and not (ROOT / target).exists()] == []
    figures = [(text, target) for mark, text, target in links if mark]
    assert [target for _, target in figures] == ["README-figure.svg"]
    assert all(len(text) > 20 for text, _ in figures)


def test_readme_types_no_measured_figure_by_hand() -> None:
    """Figures come from records: a ratio, a time or a rate in the text would outlive its record."""
    assert re.findall(r"\d[\d.,]*\s*(?:×|x\b|%|us\b|µs|ms\b|tok/s|TB/s|TFLOP)", README) == []


def test_readme_figure_shows_what_the_records_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "book" / "readme_figure.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_figure_check_notices_another_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    script = importlib.import_module("readme_figure")
    old = (ROOT / "README-figure.svg").read_text(encoding="utf-8")
    assert "<title>" in old
    measured = re.search(r"measured \d+\.(\d)", old)
    assert measured is not None
    digit = measured.start(1)
    changed = old[:digit] + str((int(old[digit]) + 1) % 10) + old[digit + 1 :]
    (tmp_path / "figure.svg").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(script, "FIGURE", tmp_path / "figure.svg")
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0


# ---- pins ----


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        wanted += [Requirement(text) for text in extra if not text.startswith("dsv4ref")]
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} against the pinned {version}"


def test_pins_are_public_versions_of_other_packages() -> None:
    pinned = pins()
    assert "dsv4ref" not in pinned
    assert [f"{name}=={version}" for name, version in pinned.items() if not re.fullmatch(r"[\d.]+\w*", version)] == []
    build = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    ]
    assert all(requirement.specifier.contains(pinned[requirement.name]) for requirement in build)


def test_conda_file_agrees_with_project_and_pins() -> None:
    yaml: Any = importlib.import_module("yaml")
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = {Requirement(text.replace("=", "==", 1)).name if "==" not in text and ">=" not in text else
             Requirement(text).name: text for text in entries if isinstance(text, str)}  # fmt: skip
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert Requirement(conda["python"]).specifier.contains(f"{oldest}.0")
    assert not Requirement(conda["python"]).specifier.contains("3.10.0")
    assert conda["nodejs"] == "nodejs=20"
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    assert "--constraint constraints.txt" in pip
    assert f"torch=={pins()['torch']}+cpu" in pip
    assert f"--extra-index-url {CPU_INDEX}" in pip
    (extras,) = [re.findall(r"\[(.*)\]", line)[0].split(",") for line in pip if line.startswith("-e .")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])


# ---- Makefile ----


@needs_make
def test_set_up_takes_the_cpu_build_unless_told_otherwise(tmp_path: Path) -> None:
    def installs(*choice: str) -> list[str]:
        steps = make("-n", "setup", f"VENV={tmp_path / 'venv'}", *choice)
        (what,) = re.findall(r" -m pip install --retries 0 (.+?) \|\|", steps)
        return what.split()

    torch = f"torch=={pins()['torch']}"
    assert installs() == [f"{torch}+cpu", f"--extra-index-url={CPU_INDEX}"]
    assert installs(f"TORCH={torch}") == [torch], "PyPI's build needs no other index"
    rocm = "https://download.pytorch.org/whl/rocm9.9"
    assert installs(f"TORCH={torch}", f"TORCH_INDEX={rocm}") == [torch, f"--extra-index-url={rocm}"]


@needs_make
def test_choice_of_torch_is_kept_and_a_new_one_starts_afresh(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "choice.mk").write_text("TORCH_KEPT := torch==2.11.0\nTORCH_INDEX_KEPT :=\n")
    (venv / ".ready").touch()
    assert "pip install" not in make("-n", "setup", f"VENV={venv}")
    assert "pip install" not in make("-n", "setup", f"VENV={venv}", "TORCH=torch==2.11.0")
    other = make("-n", "setup", f"VENV={venv}", "TORCH=torch==2.12.0")
    assert "install --retries 0 torch==2.12.0 " in other
    assert f"-m venv --clear {venv}" in other


@needs_make
def test_active_environment_is_used_as_it_is() -> None:
    for target in ("lab", "workbook", "test", "lint", "book", "isa", "measure"):
        steps = make("-n", target, "VENV=none")
        found = [word for word in ("-m venv", "pip install", "constraints.txt", "none/") if word in steps]
        assert found == [], f"make {target} VENV=none"


def test_nothing_asks_for_root() -> None:
    assert "sudo" not in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "sudo" not in README


# ---- CI, and what must not be in the repository ----


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    stages = re.findall(r"^stage (.+)$", text, re.MULTILINE)
    assert {"make lint", "make test", "make workbook"} <= set(stages)
    assert stages.index("make lint") < stages.index("make test")
    assert re.findall(r'"\S+(dsv4ref [^"]+)"', text) == [
        "dsv4ref hazards --device cpu",
        "dsv4ref verify --cases all --device cpu",
    ]
    timed = dict(re.findall(r"^within (\d+) (?:env \S+ )?(.+)$", text, re.MULTILINE))
    assert timed == {"360": "first_chapter", "600": ".venv/bin/python book/build.py"}


@pytest.mark.parametrize(("limit", "status"), [(5, 0), (0, 1)])
def test_ci_stops_at_a_stage_that_takes_too_long(limit: int, status: int) -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    functions = re.findall(r"^(?:stage|within)\(\) \{\n.*?^\}$", text, re.MULTILINE | re.DOTALL)
    assert len(functions) == 2
    script = "\n".join(["set -euo pipefail", "times=", *functions, f"within {limit} sleep 1.1", "echo went on"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("went on" in done.stdout) == (status == 0)
    assert bool(re.search(r"sleep 1\.1 took \d s, expected at most 0", done.stderr)) == (status == 1)


@pytest.mark.parametrize(
    ("first", "second"), [("echo one", "echo two"), ("false", "echo two"), ("echo one", "false"), ("false", "false")]
)
def test_ci_stops_when_either_of_two_commands_fails(first: str, second: str) -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (function,) = re.findall(r"^beside\(\) \{\n.*?^\}$", text, re.MULTILINE | re.DOTALL)
    script = "\n".join(["set -euo pipefail", "times=", function, f'beside "{first}" "{second}"', "echo went on"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    failing = [command for command in (first, second) if command == "false"]
    assert done.stderr.splitlines() == [f"failed: {command}" for command in failing]
    assert (done.returncode == 0) == (not failing) == ("went on" in done.stdout)
    for command, printed in ((first, "one"), (second, "two")):
        assert (printed in done.stdout.splitlines()) == (command != "false")


@needs_make
def test_notebooks_run_several_at_a_time_and_each_in_one_process() -> None:
    steps = make("-n", "notebooks", "VENV=none")
    assert "${workers:+--dist loadfile} notebooks/" in steps
    assert "no:xdist" not in steps


# Written in pieces, so that this file does not hold what it looks for. Tests of bad paths may show the home of "me".
PRIVATE = re.compile(
    "|".join(
        [
            r"(?<![\w.~])/(?:work|root|scratch|workspace)" + r"/\w",
            r"(?<![\w.~])/(?:home|Users)" + r"/(?!me/)\w",
            r"(?<![\w.~])/opt" + r"/(?:wheels|pypi)",
            r"\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))" + r"\.\d{1,3}\.\d{1,3}\b",
            r"\b[\w-]+\.(?:internal|corp|intranet|lan)" + r"\b",
        ]
    )
)


@needs_checkout
def test_no_machine_path_and_no_private_host_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{at}: {hit[0]}" for at, line in enumerate(lines, 1) if (hit := PRIVATE.search(line))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["see /home/" + "kim/x", "cd /work" + "/main", "ssh 192.168" + ".0.7", "http://ci.acme" + ".internal/x"],
)
def test_private_places_are_recognised(text: str) -> None:
    assert PRIVATE.search(text)
