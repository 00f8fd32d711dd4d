"""The command line: stable JSON rows, exit codes, and one line on stderr for bad input.

Commands run in this process through ``main``, as the installed script calls it, but where a process of its own is the
point. Chapters are broken by planting their own hazards, so a red gate here is a real one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from dsv4ref import cli, settings
from dsv4ref.evidence import isa, records
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Optimization
from dsv4ref.optimizations.ladder_inside import trace_counts

REPOSITORY = Path(__file__).parents[2]
VERIFY = ["id", "case", "gate", "passed", "detail"]
HAZARDS = ["id", "hazard", "caught", "detail"]
LIST = ["id", "number", "title", "part", "gate", "notebook", "devices"]
ISA = ["kernel", "arch", "shape", "vgpr", "agpr", "sgpr", "vgpr_spills", "lds", "waves_per_simd", "mfma"]
REPORT = [
    "id", "case", "device", "method", "baseline_us", "optimized_us", "ratio", "ratio_ci", "noise_floor", "predicted",
    "claimed", "peers", "gate", "stale",
]  # fmt: skip

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("verify", "--json", DSV4REF_SEED="3")``: exit status and what was printed."""
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # restored: commands may set it

    def running(*arguments: str, **environ: str) -> Ran:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["dsv4ref", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Ran(stop.value.code or 0, printed.out, printed.err)  # type: ignore[arg-type]

    return running


def own_process(*arguments: str, **environ: str) -> Ran:
    """The same through ``python -m dsv4ref``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(settings.PREFIX)}
    clean.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "dsv4ref", *arguments], capture_output=True, text=True, env=clean | environ, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def only(monkeypatch: pytest.MonkeyPatch, chapter: Optimization) -> None:
    monkeypatch.setattr(catalogue, "load", lambda: MappingProxyType({chapter.id: chapter}))


# ---- rows and exit codes ----


def test_verify_gives_one_row_per_tiny_case_of_the_named_chapters(run: Run) -> None:
    ids = ["output_passthrough", "cached_projection"]
    ran = run("verify", *ids, "--json")
    assert ran.code == 0, ran.err
    assert {tuple(row) for row in ran.rows} == {tuple(VERIFY)}
    tiny = [(id, case.name) for id in ids for case in catalogue.get(id).cases.values() if case.tiny]
    assert [(row["id"], row["case"]) for row in ran.rows] == tiny
    assert {row["passed"] for row in ran.rows} == {True}
    assert {row["gate"] for row in ran.rows} == {catalogue.get(id).gate.name for id in ids}
    assert all(row["detail"] for row in ran.rows)


def test_verify_fails_on_a_red_gate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = catalogue.get("cached_projection")
    name, hazard = next(iter(chapter.hazards.items()))
    only(monkeypatch, dataclasses.replace(chapter, optimized=hazard.planted))
    ran = run("verify", "--json")
    assert ran.code == 1, f"{name} in the place of the optimised path: exit {ran.code}"
    assert False in [row["passed"] for row in ran.rows]
    assert run("verify").code == 1


@without_gpu
def test_verify_of_all_cases_says_what_it_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = catalogue.get("cached_projection")
    large = [f"{chapter.id}/{case.name}" for case in chapter.cases.values() if case.needs_gpu]
    assert large
    ran = run("verify", chapter.id, "--cases", "all", "--json")
    assert ran.code == 0, ran.err
    assert [row["case"] for row in ran.rows] == [case.name for case in chapter.cases.values() if not case.needs_gpu]
    assert ran.err.strip().endswith(", ".join(large))


def test_hazards_are_all_caught(run: Run) -> None:
    chapter = catalogue.get("output_passthrough")
    ran = run("hazards", chapter.id, "--json")
    assert ran.code == 0, ran.err
    assert {tuple(row) for row in ran.rows} == {tuple(HAZARDS)}
    assert [(row["id"], row["hazard"]) for row in ran.rows] == [(chapter.id, name) for name in chapter.hazards]
    assert {row["caught"] for row in ran.rows} == {True}


def test_a_hazard_that_no_gate_catches_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = catalogue.get("cached_projection")
    name, hazard = next(iter(chapter.hazards.items()))
    harmless = dataclasses.replace(hazard, planted=chapter.optimized)
    only(monkeypatch, dataclasses.replace(chapter, hazards={name: harmless}))
    ran = run("hazards", "--json")
    assert (ran.code, [row["caught"] for row in ran.rows]) == (1, [False])


def test_list_names_every_chapter_and_page(run: Run) -> None:
    ran = run("list", "--json")
    assert ran.code == 0, ran.err
    assert {tuple(row) for row in ran.rows} == {tuple(LIST)}
    assert {row["id"] for row in ran.rows} == set(catalogue.load()) | {page.id for page in catalogue.PAGES}
    numbers = [row["number"] for row in ran.rows]
    assert numbers == sorted(numbers)
    assert all(row["notebook"] == f"{row['number']:02}_{row['id']}.ipynb" for row in ran.rows)
    assert {device for row in ran.rows for device in row["devices"]} == {r.device for r in records.shipped()}


def test_isa_rows_have_the_stable_keys_first(run: Run) -> None:
    kernel = catalogue.get("cached_projection").kernels("gfx942")[0].kernel
    ran = run("isa", kernel, "--arch", "gfx942", "--json")
    assert ran.code == 0, ran.err
    assert {tuple(row)[: len(ISA)] for row in ran.rows} == {tuple(ISA)}
    assert {(row["kernel"], row["arch"]) for row in ran.rows} == {(kernel, "gfx942")}
    assert all(row["vgpr"] > 0 and row["waves_per_simd"] > 0 for row in ran.rows)


def test_isa_fails_over_a_cap_and_names_kernel_and_figure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = catalogue.get("cached_projection").kernels("gfx942")[0].kernel
    small = dataclasses.replace(isa.arch_caps("gfx942"), lds_bytes=16)
    monkeypatch.setattr(isa, "_CAPS", {**isa._CAPS, "gfx942": small})
    ran = run("isa", kernel, "--arch", "gfx942", "--json")
    assert ran.code == 1, ran.err
    (row,) = [row for row in ran.rows if row["lds"] > 16]
    assert ran.err.strip() == f"{kernel} [{row['shape']}] on gfx942: {row['lds']:,} bytes of LDS, cap 16"


def test_report_rows_and_the_html_file(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "scoreboard.html"
    ran = run("report", "--json", "--html", str(page))
    assert ran.code == 0, ran.err
    assert {tuple(row)[: len(REPORT)] for row in ran.rows} == {tuple(REPORT)}
    html = page.read_text(encoding="utf-8")
    assert "</html>" in html
    assert [row["id"] for row in ran.rows if row["id"] not in html] == []
    for row in ran.rows:
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["optimized_us"], rel=0.05)
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]


def newer(folder: Path, **changes: Any) -> Mapping[str, Any]:
    """One chapter's shipped lines as a later run in another folder, the optimised path's fields changed."""
    shipped = [r for r in records.shipped() if r.variant in ("baseline", "optimized")]
    first = next(r for r in shipped if r.variant == "optimized")
    where = (first.chapter, first.case, first.device)
    lines = [
        dataclasses.replace(r, date="2099-01-01T00:00:00+00:00", run="later", **(changes if r == first else {}))
        for r in records.latest(shipped)
        if (r.chapter, r.case, r.device) == where and (r.variant == "baseline" or r == first)
    ]
    records.write(folder / first.device / f"{first.chapter}.jsonl", lines)
    return {"id": first.chapter, "case": first.case, "device": first.device}


def test_report_reads_a_further_folder_and_shows_the_newer_run(run: Run, tmp_path: Path) -> None:
    where = newer(tmp_path, p20_us=0.5, p50_us=0.75, p80_us=1.0)
    ran = run("report", "--json", DSV4REF_RECORDS=str(tmp_path))
    (row,) = [row for row in ran.rows if where.items() <= row.items()]
    assert (row["optimized_us"], row["date"][:4]) == (0.75, "2099")


def test_report_calls_a_record_stale_when_its_source_has_changed(run: Run, tmp_path: Path) -> None:
    where = newer(tmp_path, sources={"dsv4ref.config": "0" * 64})
    ran = run("report", "--json", DSV4REF_RECORDS=str(tmp_path))
    assert [row["stale"] for row in ran.rows if where.items() <= row.items()] == [True]
    assert "STALE" in run("report").out


def test_doctor_works_with_an_unknown_variable_and_names_the_nearest(run: Run) -> None:
    ran = run("doctor", "--json", DSV4REF_LOGG="1", DSV4REF_LOG="off")
    assert ran.code == 0, ran.err
    card = json.loads(ran.out)
    assert {"machine", "capabilities", "packages", "notes", "environment"} <= card.keys()
    assert card["environment"]["unknown"] == [{"name": "DSV4REF_LOGG", "nearest": "DSV4REF_LOG"}]
    assert [row["name"] for row in card["environment"]["set"]][:1] == ["DSV4REF_LOG"]
    assert {"aiter", "triton_kernels"} <= {row["package"] for row in card["packages"]}
    assert "DSV4REF_LOGG is set but unknown, did you mean DSV4REF_LOG?" in run("doctor").out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("verify cached_projection", ["Gates on", "tiny-one-row"]),
        ("hazards cached_projection", ["Planted bugs on", "address-key"]),
        ("isa dequantise_weight --arch gfx950", ["Cross-compiled", "dequantise_weight", "gfx950"]),
        ("list", ["Chapters", "00_start_here.ipynb"]),
        ("report", ["Scoreboard", "flash-256", "h200"]),
    ],
)
def test_without_json_a_listing_is_a_table(run: Run, arguments: str, shown: list[str]) -> None:
    ran = run(*arguments.split())
    assert ran.code == 0, ran.err
    assert [text for text in shown if text not in ran.out] == [], ran.out


def test_python_m_runs_the_same_commands() -> None:
    ran = own_process("list", "--json")
    assert ran.code == 0, ran.err
    assert {tuple(row) for row in ran.rows} == {tuple(LIST)}


def test_a_fresh_process_chooses_the_interpreter_by_itself() -> None:
    ran = own_process("verify", "cached_projection", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert {row["passed"] for row in ran.rows} == {True}


def test_notebooks_check_fails_on_what_is_off_and_fix_mends_what_it_can(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "05_sample.ipynb"
    notebook = {"cells": [], "metadata": {"stray": 1}, "nbformat": 4, "nbformat_minor": 5}
    source.write_text(json.dumps(notebook), encoding="utf-8")
    ran = run("notebooks", "--check", "--folder", str(tmp_path))
    assert (ran.code, ran.out) == (1, "")
    assert "05_sample.ipynb" in ran.err
    assert run("notebooks", "--fix", "--folder", str(tmp_path)).code == 1  # an empty chapter stays off
    assert "stray" not in source.read_text(encoding="utf-8")


def test_the_lab_prints_an_address_that_leads_to_the_start_notebook(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def call(command: list[str], env: Mapping[str, str]) -> int:
        started.append(command)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.chdir(REPOSITORY)
    assert run("lab", "--no-browser").code == 0
    start = Path("notebooks", "00_start_here.ipynb")
    lab, flags = [sys.executable, "-m", "jupyterlab"], [f"--LabApp.default_url=/lab/tree/{start.name}", "--no-browser"]
    assert started == [[*lab, str(start), *flags]]
    assert start.is_file()


def test_a_ladder_rehearses_on_a_cpu_and_says_so_in_every_row(run: Run, tmp_path: Path) -> None:
    arguments = (
        "ladder",
        "--out",
        str(tmp_path),
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--switches",
        "shrink_tail_fill",
    )
    ran = run(*arguments, "--json")
    assert ran.code == 0, ran.err
    assert [row["rung"] for row in ran.rows] == ["everything off", "+ shrink_tail_fill"]
    assert all(row["gate"] == "green" and "no statement about speed" in row["note"] for row in ran.rows)
    stated = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for row in stated["traces"]:  # what the report says of a trace is what its file holds
        assert trace_counts(tmp_path / row["file"]).items() <= row.items()
        assert row["operators"] > 1000
    assert all("no statement about speed" in row["note"] for row in (*stated["inside"], *stated["traces"]))
    assert [row["launches"] > 0 for row in stated["inside"]] == [True, True]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"ladder.jsonl", "report.json", "trace_before.json.gz", "trace_after.json.gz"}
    assert_refused(run(*arguments, "--seed", "1"), "ladder.jsonl", "seed: it has 0, this run has 1")


# ---- bad input: exit 2, nothing on stdout, one line on stderr ----


def assert_refused(ran: Ran, *said: str) -> None:
    assert ran.code == 2, f"exit {ran.code}; {ran.err}"
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("dsv4ref: ")
    assert [word for word in said if word not in lines[0]] == [], lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("verify decode_lunch_shape", ["'decode_lunch_shape'", "decode_launch_shape"]),
        ("hazards output_passthru", ["'output_passthru'", "output_passthrough"]),
        ("verify --device tpu", ["--device", "tpu", "cpu", "cuda"]),
        ("verify --cases some", ["--cases", "some", "tiny", "all"]),
        ("verify --seed x", ["--seed"]),
        ("verify --seed -1", ["seed", "-1"]),
        ("isa no_such_kernel", ["no_such_kernel", "sparse_mla_decode"]),
        ("isa --arch gfx906", ["arch", "gfx906", "gfx942", "gfx950"]),
        ("report --html {nowhere}/page.html", ["page.html"]),
        ("notebooks", ["--check", "--fix", "--execute"]),
        ("notebooks --check --fix", ["--check", "--fix"]),
        ("notebooks --check --folder {nowhere}", ["{nowhere}"]),
        ("notebooks --execute {nowhere}.ipynb", ["{nowhere}.ipynb"]),
        ("lab --folder {nowhere}", ["--folder", "00_start_here.ipynb"]),
        ("measure", ["--out"]),
        ("profile split_k_decode --case tiny", ["--out"]),
        ("profile split_k_decode --out {nowhere}", ["--case"]),
        ("profile --case tiny --out {nowhere}", ["ID"]),
        ("sanitize split_k_decode", ["--out"]),
        ("sanitize split_k_decode --out {nowhere} --tool leakcheck", ["tool", "'leakcheck'", "memcheck", "racecheck"]),
        ("ladder", ["--out"]),
        ("ladder --device cpu --out {nowhere}", ["--preset", "h200-short", "needs a GPU", "tiny"]),
        ("ladder --device cpu --out {nowhere} --preset mini", ["preset", "'mini'", "h200-slice", "tiny"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --repeats 3", ["repeats", "3", "at least 10"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --seconds 0", ["max_seconds", "0", "positive"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --order down", ["order", "'down'", "source", "reverse"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --switches fast", ["switches", "'fast'", "sparse_decode"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --from warp", ["begin", "'warp'", "device_step"]),
        ("ladder --device cpu --out {nowhere} --preset tiny --attribution all", ["'all'", "ladder", "shapley"]),
        ("verify --colour", ["--colour"]),
        ("--colour", ["--colour"]),
        ("doctor now", ["now"]),
        ("verfy", ["verfy"]),
    ],
)
def test_bad_argument_is_one_line(run: Run, tmp_path: Path, arguments: str, said: list[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    ran = run(*(part.format(nowhere=nowhere) for part in arguments.split()))
    assert_refused(ran, *(word.format(nowhere=nowhere) for word in said))


@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        ("verify cached_projection", "DSV4REF_SEED", "abc", ["'abc'", "whole number"]),
        ("hazards cached_projection", "DSV4REF_SEED", "-1", ["'-1'", "whole number"]),
        ("verify decode_launch_shape", "DSV4REF_LAUNCH_SHAPE", "3x3", ["'3x3'", "BHxBKxWARPS"]),
        ("hazards decode_launch_shape", "DSV4REF_LAUNCH_SHAPE", "64x", ["'64x'", "BHxBKxWARPS"]),
        ("verify decode_launch_shape", "DSV4REF_LOG", "loud", ["'loud'", "summary"]),
        ("report", "DSV4REF_RECORDS", "nowhere", ["'nowhere'", "a folder that exists"]),
        ("list", "DSV4REF_RECORDS", "nowhere", ["'nowhere'", "a folder that exists"]),
    ],
)
def test_bad_variable_is_one_line_that_names_it(run: Run, command: str, name: str, value: str, said: list[str]) -> None:
    assert_refused(run(*command.split(), **{name: value}), name, *said)


@pytest.mark.parametrize("command", ["report", "list"])
def test_damaged_record_is_named_by_file_and_line(run: Run, tmp_path: Path, command: str) -> None:
    where = newer(tmp_path)
    (path,) = tmp_path.rglob("*.jsonl")
    count = len(path.read_text(encoding="utf-8").splitlines())
    with path.open("a", encoding="utf-8") as lines:
        lines.write('{"chapter": "' + where["id"] + '", "case": \n')
    assert_refused(run(command, DSV4REF_RECORDS=str(tmp_path)), f"{path}:{count + 1}: ")


@without_gpu
@pytest.mark.parametrize(
    "arguments",
    [
        "verify --device cuda",
        "hazards --device cuda",
        "measure --out records",
        "profile split_k_decode --case tiny --out profiles",
        "sanitize split_k_decode --out sanitizer",
    ],
)
def test_asking_for_a_gpu_that_is_not_there_is_one_line(run: Run, arguments: str) -> None:
    assert_refused(run(*arguments.split()), "GPU")


def test_refusal_in_a_process_of_its_own_shows_no_traceback() -> None:
    assert_refused(own_process("verify", "no_such_chapter"), "'no_such_chapter'")
    assert_refused(own_process("verify", "--cases", "some"), "--cases", "tiny", "all")
