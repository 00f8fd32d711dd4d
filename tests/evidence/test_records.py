"""Records: what a line must hold, how a file is refused, when a record is stale, and where it was measured."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4ref.evidence import records
from dsv4ref.evidence.records import PublishedFigure, Record, latest, read, read_folder, read_published, write

RECORD = Record(
    chapter="decode_launch_shape",
    case="flash_64",
    variant="optimized",
    p20_us=80.5,
    p50_us=83.7,
    p80_us=85.0,
    repeats=40,
    method="graph",
    bytes=1_000_000,
    flops=2_000_000,
    launches=2,
    ratio=1.93,
    ratio_low=1.91,
    ratio_high=1.95,
    noise_floor=0.004,
    bound_us=20.0,
    gate="passed",
    device="h200",
    device_name="NVIDIA H200",
    driver="580.159.03",
    torch="2.11.0+cu130",
    triton="3.6.0",
    python="3.12.3",
    mode="compiled",
    date="2026-01-31T12:00:00+00:00",
    commit="0" * 40,
    seed=0,
    sources={"dsv4ref.evidence.timing": "ab" * 32},
    peers=None,
    run="20260131T120000Z-abc123",
)
BASELINE = replace(RECORD, variant="baseline", ratio=None, ratio_low=None, ratio_high=None, noise_floor=None)
FIGURE = PublishedFigure(
    chapter="decode_launch_shape",
    what="output throughput, concurrency 5120",
    before=4362.78,
    after=4603.64,
    unit="tok/s",
    device="2x MI300X",
    source="PR 12",
    note="one run",
)


def line(**changes: Any) -> str:
    return json.dumps({**asdict(RECORD), **changes}) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


# ---- round trip ----


def test_records_come_back_equal_and_in_order(path: Path) -> None:
    write(path, [BASELINE])
    write(path, [RECORD, replace(RECORD, launches=None, bound_us=None, driver=None, commit=None, peers="FlashMLA 1")])
    assert read(path) == (
        BASELINE,
        RECORD,
        replace(RECORD, launches=None, bound_us=None, driver=None, commit=None, peers="FlashMLA 1"),
    )
    assert path.read_bytes().count(b"\n") == 3


def test_published_figures_come_back_equal_and_are_another_kind(path: Path) -> None:
    write(path, [FIGURE])
    assert read_published(path) == (FIGURE,)
    with pytest.raises(ValueError, match=r"run.jsonl:1: kind: got 'published', expected 'measured'"):
        read(path)
    with pytest.raises(TypeError, match=r"records: got \['PublishedFigure', 'Record'\], expected only"):
        write(path, [RECORD, FIGURE])  # type: ignore[arg-type]
    assert read_published(path) == (FIGURE,)


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda value: bool(value.strip()))
key = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True)
positive = st.floats(min_value=1e-300, max_value=1e300)
count = st.integers(min_value=0, max_value=2**70)


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    times = sorted(draw(st.tuples(positive, positive, positive)))
    interval = draw(st.none() | st.tuples(positive, positive, positive).map(sorted))
    held: dict[str, Any] = dict(zip(("p20_us", "p50_us", "p80_us"), times, strict=True))
    held |= dict.fromkeys(("ratio_low", "ratio", "ratio_high", "noise_floor"))
    if interval is not None:
        held |= dict(zip(("ratio_low", "ratio", "ratio_high"), interval, strict=True))
        held["noise_floor"] = draw(st.floats(min_value=0, max_value=10))
    held |= {name: draw(key) for name in ("chapter", "device")}
    held |= {name: draw(text) for name in ("case", "variant", "method", "device_name", "mode", "run")}
    held |= {name: draw(text) for name in ("torch", "triton", "python")}
    held |= {name: draw(st.none() | text) for name in ("driver", "commit", "peers")}
    held |= {name: draw(count) for name in ("bytes", "flops", "seed")}
    digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
    return Record(
        **held,
        repeats=draw(st.integers(min_value=1, max_value=10**6)),
        launches=draw(st.none() | count),
        bound_us=draw(st.none() | positive),
        gate="passed",
        date=draw(st.datetimes(timezones=st.just(UTC))).isoformat(),
        sources=draw(st.dictionaries(text, digests, min_size=1, max_size=3)),
    )


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(any_record(), max_size=4))
def test_any_record_survives_its_file(tmp_path_factory: pytest.TempPathFactory, batch: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "any.jsonl"
    write(path, batch)
    assert read(path) == tuple(batch)


def test_whole_numbers_stand_for_times(path: Path) -> None:
    path.write_text(line(p20_us=1, p50_us=2, p80_us=3))
    record = read(path)[0]
    assert (record.p50_us, type(record.p50_us)) == (2.0, float)


# ---- refusals ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "blank line, expected one JSON object per line"),
        ("{\n", "not JSON"),
        ("[1]\n", "got a JSON list, expected one JSON object"),
        (line()[:-1], "truncated, expected a newline"),
        (line()[:40], "truncated, expected a newline"),
        (line(extra=1), "unknown field 'extra', expected only chapter, "),
        (line().replace('"case": "flash_64", ', ""), "missing field 'case'"),
        (line().replace('"case"', '"seed": 1, "case"', 1), "field 'seed' comes twice"),
        (line(p50_us="83.7"), r"p50_us: got '83.7' \(str\), expected a number"),
        (line(p50_us=None), r"p50_us: got None \(NoneType\), expected a number"),
        (line(p80_us=float("nan")), "p80_us: got 'NaN'"),
        (line(p80_us=float("inf")), "p80_us: got 'Infinity'"),
        (line().replace("85.0", "1e999"), "p80_us: got inf, expected a finite number"),
        (line(p80_us=10**400), "p80_us: got inf, expected a finite number"),
        (line(repeats=40.0), r"repeats: got 40.0 \(float\), expected a whole number"),
        (line(repeats=True), r"repeats: got True \(bool\), expected a whole number"),
        (line(repeats=0), "repeats: got 0, expected at least 1"),
        (line(bytes=-1), "bytes: got -1, expected at least 0"),
        (line(launches="2"), r"launches: got '2' \(str\), expected a whole number or None"),
        (line(p20_us=84.0), "p20_us, p50_us, p80_us: got"),
        (line(p20_us=0.0), "p20_us, p50_us, p80_us: got"),
        (line(ratio=None), "ratio, .*: got only ratio_low, ratio_high, noise_floor, expected all four or none"),
        (line(ratio_low=1.94), "ratio_low, ratio, ratio_high: got"),
        (line(bound_us=0), "bound_us: got 0.0, expected a positive time"),
        (line(gate="failed"), "gate: got 'failed', expected 'passed'"),
        (line(kind="guessed"), "kind: got 'guessed', expected 'measured'"),
        (line(schema=2), "schema: got 2, expected 1"),
        (line(device="H 200"), "device: got 'H 200', expected lower-case letters"),
        (line(chapter="../x"), "chapter: got '../x'"),
        (line(case=" "), "case: got ' ', expected text"),
        (line(date="yesterday"), "date: got 'yesterday', expected a date and time"),
        (line(date="2026-01-31T12:00:00"), "date: got .* expected a time in UTC"),
        (line(date="2026-01-31T12:00:00+02:00"), "date: got .* expected a time in UTC"),
        (line(sources={}), "sources: got no modules"),
        (line(sources={"m": "AB" * 32}), r"sources\['m'\]: got"),
        (line(sources={"m": 1}), "sources: got .* expected a mapping of text to text"),
    ],
)
def test_bad_line_is_refused_with_file_line_and_expectation(path: Path, content: str, message: str) -> None:
    path.write_text(line() + content)
    with pytest.raises(ValueError, match=f"run.jsonl:2: {message}"):
        read(path)


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(line().encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"run\.jsonl:2: not JSON"):
        read(path)


@pytest.mark.parametrize("field", [field.name for field in fields(Record)])
def test_every_field_must_be_there(path: Path, field: str) -> None:
    held = asdict(RECORD)
    del held[field]
    path.write_text(json.dumps(held) + "\n")
    with pytest.raises(ValueError, match=f"run.jsonl:1: missing field '{field}'"):
        read(path)


def test_appending_to_a_truncated_file_is_refused_and_changes_nothing(path: Path) -> None:
    path.write_text(line()[:-1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the last line is truncated"):
        write(path, [RECORD])
    assert path.read_bytes() == before


def test_empty_file_holds_no_records(path: Path) -> None:
    write(path, [])
    assert read(path) == ()


# ---- concurrent appends ----


def append(path: Path, variant: str, together: Any) -> None:
    # Lines long enough that a torn write would show; all made beforehand, so that both processes only write.
    batch = [replace(RECORD, variant=variant, case=f"{index}", peers=variant * 100_000) for index in range(200)]
    together.wait(30)
    for record in batch:
        write(path, [record])


def test_two_processes_append_whole_lines(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    workers = [context.Process(target=append, args=(path, name, together)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = read(path)
    assert len(found) == 400
    for name in ("a", "b"):
        assert [record.case for record in found if record.variant == name] == [str(index) for index in range(200)]


# ---- folders ----


def test_folder_gives_all_devices_and_chapters(tmp_path: Path) -> None:
    other = replace(RECORD, device="mi300x", chapter="moe_tiles")
    write(tmp_path / "h200" / "decode_launch_shape.jsonl", [BASELINE, RECORD])
    write(tmp_path / "mi300x" / "moe_tiles.jsonl", [other])
    (tmp_path / "README.md").write_text("not a record file")
    assert read_folder(tmp_path) == (BASELINE, RECORD, other)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mi300x/decode_launch_shape.jsonl", "decode_launch_shape.jsonl:1: device: got 'h200', expected 'mi300x'"),
        ("h200/moe_tiles.jsonl", "moe_tiles.jsonl:1: chapter: got 'decode_launch_shape', expected 'moe_tiles'"),
        ("decode_launch_shape.jsonl", "expected record files at <device>/<chapter>.jsonl"),
        ("runs/h200/decode_launch_shape.jsonl", "expected record files at <device>/<chapter>.jsonl"),
    ],
)
def test_figures_of_one_device_cannot_stand_as_anothers(tmp_path: Path, place: str, message: str) -> None:
    write(tmp_path / place, [RECORD])
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: got .*none, which is no folder"):
        read_folder(tmp_path / "none")


def test_further_folder_adds_to_what_the_package_ships(tmp_path: Path) -> None:
    write(tmp_path / "h200" / "decode_launch_shape.jsonl", [RECORD])
    assert records.shipped(tmp_path) == (*records.shipped(), RECORD)
    with pytest.raises(ValueError, match="which is no folder"):
        records.shipped(tmp_path / "none")


# ---- latest ----


def test_latest_keeps_the_newest_run_of_each_measurement() -> None:
    def at(hour: int, run: str, **changes: Any) -> Record:
        return replace(RECORD, date=f"2026-01-31T{hour:02}:00:00+00:00", run=run, **changes)

    old = at(10, "old")
    new = at(12, "new")
    host = at(12, "new", method="host")
    repeated = at(12, "new", p50_us=84.0)
    other_case = at(9, "older", case="pro_128")
    other_device = at(9, "older", device="mi300x")
    other_chapter = at(9, "older", chapter="moe_tiles")
    given = [new, old, host, other_case, other_device, other_chapter, repeated]
    assert latest(given) == (repeated, host, other_case, other_device, other_chapter)
    assert latest([]) == ()


def test_latest_compares_times_not_their_spelling() -> None:
    zulu = replace(RECORD, date="2026-01-31T12:00:00Z", run="z")
    later = replace(RECORD, date="2026-01-31T12:00:00.5+00:00", run="later")
    assert latest([later, zulu]) == (later,)
    same = replace(RECORD, run="same")
    assert latest([zulu, same]) == (same,)


def test_reading_records_needs_no_torch() -> None:
    script = "import sys, dsv4ref.evidence.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- staleness ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    source = tmp_path / "record_test_package" / "kernel.py"
    source.parent.mkdir()
    (source.parent / "__init__.py").write_text("")
    source.write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield source
    sys.modules.pop("record_test_package", None)


def test_record_goes_stale_with_one_byte_of_its_source(module: Path) -> None:
    name = "record_test_package.kernel"
    record = replace(RECORD, sources=records.hash_sources([name, "dsv4ref.evidence.records"]))
    assert list(record.sources) == ["dsv4ref.evidence.records", name]
    assert not records.is_stale(record)
    before = module.read_bytes()
    module.write_bytes(before + b"#")
    assert records.is_stale(record)
    assert records.stale_modules(record) == (name,)
    module.write_bytes(before)
    assert not records.is_stale(record)
    module.unlink()
    importlib.invalidate_caches()
    assert records.stale_modules(record) == (name,)
    assert name not in sys.modules


def test_package_is_hashed_by_its_init(module: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert records.module_sha256("record_test_package") == empty


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.module", "sys", "_json", ""])
def test_module_without_source_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"module: got '{name}'"):
        records.module_sha256(name)


# ---- provenance ----


def test_provenance_fills_the_fields_of_a_record() -> None:
    import torch

    found = records.provenance(device="cpu", device_name="a CPU", mode="interpreter")
    record = replace(RECORD, **found)
    assert (record.device, record.torch, record.mode) == ("cpu", torch.__version__, "interpreter")
    assert record.python == ".".join(str(part) for part in sys.version_info[:3])
    assert latest([RECORD, record]) == (RECORD, record)
    assert record.triton.startswith("3.")


def test_run_ids_differ() -> None:
    assert len({records.new_run() for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("text_", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\nGCC version: 12.2",
            "580.159.03",
        ),
        ("NVRM version: something else\n", None),
    ],
)
def test_nvidia_driver_version_is_read_from_the_kernels_file(tmp_path: Path, text_: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text_)
    assert records.driver_version(tmp_path / "version", tmp_path / "none") == version


def test_driver_version_of_amdgpu_or_none(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("6.12.12\n")
    assert records.driver_version(tmp_path / "none", tmp_path / "version") == "6.12.12"
    assert records.driver_version(tmp_path / "none", tmp_path / "none") is None


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_and_says_when_it_is_dirty(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    assert records.commit_of(package) is None
    git(tmp_path, "init", "-q")
    (package / "a.py").write_text("1\n")
    assert records.commit_of(package) is None
    git(tmp_path, "add", "package")
    assert records.commit_of(package) is None  # tracked, but no commit yet
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert records.commit_of(package) == head
    (tmp_path / "new_kernel.py").write_text("2\n")
    assert records.commit_of(package) == head + "+dirty"


def test_checkout_that_merely_surrounds_an_installation_is_not_its_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("site-packages\n")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-q", "-m", "first")
    installed = tmp_path / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("1\n")
    assert records.commit_of(installed) is None


def test_no_git_means_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert records.commit_of(Path(__file__).parent) is None
