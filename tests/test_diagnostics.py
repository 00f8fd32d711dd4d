"""The shape recorder: free when off, one file per process, silent under graph capture, never reading a tensor."""

import json
import multiprocessing
import os
import sys
import threading
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4ref import diagnostics, settings
from dsv4ref.diagnostics import Bin, histogram, read, record


@pytest.fixture(autouse=True)
def _recording_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV4REF_SHAPE_DUMP", raising=False)
    monkeypatch.delenv("DSV4REF_LOG", raising=False)
    monkeypatch.setattr(diagnostics, "_recorder", diagnostics._Recorder())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is being recorded to."""
    monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(tmp_path / "dump"))
    return tmp_path / "dump"


# --- off --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [None, "", "off"])
def test_off_writes_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if log is not None:
        monkeypatch.setenv("DSV4REF_LOG", log)
    record("decode", q=torch.empty(4, 64), junk=object())
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert not diagnostics.enabled()


def _seconds(call: Callable[[], object], calls: int = 20_000) -> float:
    return min(timeit.repeat(call, number=calls, repeat=5)) / calls


def test_off_costs_less_than_five_microseconds_and_less_than_reading_a_setting() -> None:
    # Measured 0.24 us with two fields; the bound leaves room for a loaded machine, the comparison does not move.
    q = torch.empty(4, 64)
    off = _seconds(lambda: record("decode", q=q, heads=64))
    setting = _seconds(lambda: settings.get("DSV4REF_LOG"))
    assert off < 5e-6, f"{off * 1e9:.0f} ns per call while off"
    assert off < setting, f"{off * 1e9:.0f} ns per call while off, {setting * 1e9:.0f} ns to read one setting"


# --- what a row holds -------------------------------------------------------------------------------------------------


def test_tensors_are_summarised_and_never_read(folder: Path) -> None:
    # A meta tensor has no storage: anything that reads a value from it raises.
    q = torch.empty(5, 64, 512, dtype=torch.bfloat16, device="meta")[:, ::2]
    before = time.time_ns()
    record("decode", q=q, kind=torch.float8_e4m3fn, where=torch.device("cuda", 1), heads=64, out=None)
    (row,) = read(folder)
    assert (row.event, row.pid, row.thread) == ("decode", os.getpid(), threading.get_native_id())
    assert before <= row.time_ns <= time.time_ns()
    assert row.fields == {
        "q": {"shape": [5, 32, 512], "stride": [32768, 1024, 1], "dtype": "bfloat16", "device": "meta"},
        "kind": "float8_e4m3fn",
        "where": "cuda:1",
        "heads": 64,
        "out": None,
    }


def test_scalar_and_sparse_tensors_are_summarised(folder: Path) -> None:
    record("decode", scalar=torch.tensor(3.0), sparse=torch.eye(2).to_sparse())
    fields = read(folder)[0].fields
    assert fields["scalar"] == {"shape": [], "stride": [], "dtype": "float32", "device": "cpu"}
    assert fields["sparse"] == {"shape": [2, 2], "stride": None, "dtype": "float32", "device": "cpu"}


def test_nested_data_survives_the_round_trip(folder: Path) -> None:
    fields: dict[str, Any] = {
        "shape": (1, [2, None]),
        "tile": {"m": 64, "on": True},
        "scale": 0.5,
        "text": "a\n\u2028é",
    }
    record("moe", **fields)
    assert read(folder)[0].fields == {**fields, "shape": [1, [2, None]]}


def test_a_field_may_be_called_event(folder: Path) -> None:
    record("decode", event="inner", pid=1)
    (row,) = read(folder)
    assert (row.event, row.fields) == ("decode", {"event": "inner", "pid": 1})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (object(), TypeError, "decode: x: got object, expected JSON data, a tensor"),
        ({1, 2}, TypeError, "decode: x: got set"),
        (b"a", TypeError, "decode: x: got bytes"),
        ([0, lambda: 0], TypeError, r"decode: x\[1\]: got function"),
        ({"a": {2: 0}}, TypeError, r"decode: x\['a'\]: got a mapping with key 2, expected string keys"),
        (float("nan"), ValueError, "decode: x: got nan, expected a finite number"),
        ([float("inf")], ValueError, r"decode: x\[0\]: got inf"),
    ],
)
def test_what_is_no_json_is_refused_and_nothing_is_written(
    folder: Path, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        record("decode", x=value)
    assert not folder.exists()


def test_event_must_be_a_name(folder: Path) -> None:
    with pytest.raises(TypeError, match="event: got int"):
        record(3, x=1)  # type: ignore[arg-type]


def test_malformed_setting_is_reported_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4REF_LOG", "loud")
    with pytest.raises(ValueError, match=r"^DSV4REF_LOG: got 'loud', expected one of off, summary, full"):
        record("decode")


# --- files, threads, processes ----------------------------------------------------------------------------------------


def test_one_process_keeps_one_file_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("a", 3), ("b", 2), ("a", 1)):
        monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(tmp_path / name))
        for i in range(count):
            record("decode", i=i)
    assert [len(read(tmp_path / name)) for name in "ab"] == [4, 2]
    assert [row.fields["i"] for row in read(tmp_path / "a")] == [0, 1, 2, 0]
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_threads_share_one_file_of_whole_lines_in_order(folder: Path) -> None:
    workers, calls = 8, 100
    start = threading.Barrier(workers)

    def work(worker: int) -> None:
        start.wait()
        for i in range(calls):
            record("decode", worker=worker, i=i, pad="x" * 300)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # provokes the races that a lock must stop
    try:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    (file,) = folder.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == workers * calls
    times = [line["time_ns"] for line in lines]
    assert times == sorted(times)
    for worker in range(workers):
        assert [row["fields"]["i"] for row in lines if row["fields"]["worker"] == worker] == list(range(calls))
    assert len({line["thread"] for line in lines}) == workers


def test_each_line_is_one_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real_write = os.write

    def counting_write(fd: int, data: bytes) -> int:
        written.append(data)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", counting_write)
    for i in range(3):
        record("decode", i=i, pad="x" * 10_000)
    assert [data[-1:] for data in written] == [b"\n"] * 3
    assert [json.loads(data)["fields"]["i"] for data in written] == [0, 1, 2]


def _record_many(worker: int, count: int) -> None:
    for i in range(count):
        record("decode", worker=worker, i=i, pad="x" * 300)


def _run(method: str, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int]:
    """Runs ``target`` in as many processes, two at most, and returns their ids."""
    context: Any = multiprocessing.get_context(method)
    processes = [context.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * len(processes), f"exit codes {codes}; None means it hung"
    return [process.pid for process in processes]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_write_files_of_their_own(folder: Path, method: str) -> None:
    record("decode", worker=-1, i=0)  # the parent's file is open when the children start
    children = _run(method, _record_many, [(0, 150), (1, 150)])
    record("decode", worker=-1, i=1)
    by_file = {}
    for file in folder.iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert {str(line["pid"]) for line in lines} == {file.stem.rpartition("-")[2]}
        by_file[lines[0]["pid"]] = [line["fields"]["i"] for line in lines]
    assert by_file == {os.getpid(): [0, 1], children[0]: list(range(150)), children[1]: list(range(150))}
    assert len(read(folder)) == 302


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_child_forked_while_a_thread_is_recording_does_not_hang(folder: Path) -> None:
    record("decode", worker=-1, i=0)
    with diagnostics._recorder._lock:
        _run("fork", _record_many, [(0, 2)])
    assert [row.fields["i"] for row in read(folder) if row.fields["worker"] == 0] == [0, 1]


# --- graph capture ----------------------------------------------------------------------------------------------------


def test_silent_while_a_graph_is_captured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4REF_LOG", "full")
    monkeypatch.setattr(diagnostics, "capture_under_way", lambda: True)
    record("decode", i=0)
    assert (folder.exists(), capsys.readouterr().err, diagnostics.enabled()) == (False, "", False)
    monkeypatch.setattr(diagnostics, "capture_under_way", lambda: False)
    record("decode", i=1)
    assert [row.fields for row in read(folder)] == [{"i": 1}]
    assert diagnostics.enabled()


def test_asking_about_capture_does_not_start_cuda() -> None:
    started = torch.cuda.is_initialized()
    assert diagnostics.capture_under_way() is False
    assert torch.cuda.is_initialized() == started


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a real graph")
def test_real_capture_is_silent_and_recording_never_synchronises(folder: Path) -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        record("decode", when="before", x=x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with torch.cuda.graph(graph):
        x.mul_(2)
        assert diagnostics.capture_under_way()
        record("decode", when="during", x=x)
    for _ in range(3):
        graph.replay()
    record("decode", when="after", x=x)
    assert [row.fields["when"] for row in read(folder)] == ["before", "after"]
    assert read(folder)[0].fields["x"]["device"] == f"cuda:{torch.cuda.current_device()}"
    assert x.tolist() == [8.0] * 4


# --- printing ---------------------------------------------------------------------------------------------------------


def test_full_log_prints_every_call_and_summary_each_distinct_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    q = torch.empty(2, 3, 4)
    lines = {}
    for level in ("full", "summary"):
        monkeypatch.setenv("DSV4REF_LOG", level)
        for heads in (64, 64, 128):
            record("decode", q=q, t=q.transpose(0, 1), s=torch.tensor(1), heads=heads, path="split-k")
        lines[level] = capsys.readouterr().err.splitlines()
    first = (
        "dsv4ref decode q=float32[2, 3, 4] on cpu t=float32[3, 2, 4] stride [4, 12, 1] on cpu "
        's=int64[] on cpu heads=64 path="split-k"'
    )
    assert lines["full"] == [first, first, first.replace("heads=64", "heads=128")]
    assert lines["summary"] == lines["full"][1:]


def test_summary_stops_remembering_at_its_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4REF_LOG", "summary")
    monkeypatch.setattr(diagnostics, "SUMMARY_LIMIT", 3)
    for i in (0, 1, 1, 2, 3, 4, 0, 5):
        record("decode", i=i)
    assert capsys.readouterr().err.splitlines() == [
        "dsv4ref decode i=0",
        "dsv4ref decode i=1",
        "dsv4ref decode i=2",
        "dsv4ref: more than 3 distinct calls, the summary ends here",
    ]
    assert len(diagnostics._recorder._printed) == 4


# --- reading back -----------------------------------------------------------------------------------------------------


def test_histogram_counts_by_chosen_fields(folder: Path) -> None:
    for tokens, tile in ((1, 16), (64, 32), (64, 32), (64, 16)):
        record("moe", tokens=tokens, tile=tile)
    record("decode", tokens=64)
    assert histogram("moe", folder) == [
        Bin({"tile": 32, "tokens": 64}, 2),
        Bin({"tile": 16, "tokens": 1}, 1),
        Bin({"tile": 16, "tokens": 64}, 1),
    ]
    assert histogram("moe", by=["tokens"]) == [Bin({"tokens": 64}, 3), Bin({"tokens": 1}, 1)]
    assert histogram("nothing", folder) == []
    with pytest.raises(ValueError, match=r"by: event 'moe' was recorded without 'heads', it has \['tile', 'tokens'\]"):
        histogram("moe", folder, by=["tokens", "heads"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "decode", "time', "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected an object with event, time_ns, pid, thread, fields"),
        ('{"event": "decode"}', "expected an object with"),
        ('{"event": "d", "time_ns": "1", "pid": 1, "thread": 1, "fields": {}}', "expected an object with"),
    ],
)
def test_corrupt_line_is_named_by_file_and_line(folder: Path, line: str, message: str) -> None:
    record("decode", i=0)
    (file,) = folder.iterdir()
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"{file}:2: {message}")


def test_read_merges_files_by_time_and_ignores_others(folder: Path) -> None:
    folder.mkdir()
    row = {"event": "decode", "pid": 1, "thread": 1, "fields": {}}
    for name, times in (("shapes-1-1.jsonl", (1, 5)), ("shapes-2-2.jsonl", (2, 3))):
        (folder / name).write_text("".join(json.dumps({**row, "time_ns": t}) + "\n" for t in times))
    (folder / "notes.jsonl").write_text("not a record\n")
    assert [r.time_ns for r in read(folder)] == [1, 2, 3, 5]


def test_reading_without_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: got None and DSV4REF_SHAPE_DUMP is not set"):
        read()
    with pytest.raises(ValueError, match=r"folder: got '.*none', expected a folder that exists"):
        read(tmp_path / "none")
