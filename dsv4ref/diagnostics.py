"""Opt-in record of which kernels ran on which shapes: one line per launcher call, never a tensor's values.

A launcher calls ``record("sparse_decode", q=q, heads=64, path="split-k")``. With nothing set that costs a fraction of a
microsecond. ``DSV4REF_SHAPE_DUMP=folder`` appends each call to a JSONL file, ``DSV4REF_LOG=summary|full`` prints it;
both are read at each call. Tensors become shape, stride, dtype and device, so recording never copies from a device or
waits for it. While a graph is being captured nothing is recorded: the replays that matter run no host code at all.

Every process writes a file of its own, named by start time and process id, with one write per line: processes and
threads cannot interleave, and a forked child opens its own file. ``read`` and ``histogram`` turn a folder into rows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv4ref import settings

# Distinct calls that DSV4REF_LOG=summary remembers per process; a field that is new in every call must not fill memory.
SUMMARY_LIMIT = 1000

_FILE_PATTERN = "shapes-*.jsonl"
_ROW_KEYS = {"event": str, "time_ns": int, "pid": int, "thread": int, "fields": dict}


class Row(NamedTuple):
    """One recorded call: ``time_ns`` since the epoch, ``thread`` the system's id, ``fields`` as JSON holds them."""

    event: str
    time_ns: int
    pid: int
    thread: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Bin:
    """How often one event was recorded with the same ``fields``."""

    fields: Mapping[str, Any]
    count: int


def record(event: str, /, **fields: Any) -> None:
    """Records one kernel call if recording is on; returns at once if it is off or a graph is being captured.

    Args:
        event: what ran, for example ``"sparse_decode"``.
        **fields: what it ran on. Tensors are summarised; dtypes and devices become text; numbers, strings, booleans,
            None, and lists, tuples and string-keyed mappings of these are kept.

    Raises:
        TypeError: a field holds anything else (only noticed while recording is on).
        ValueError: a field holds nan or infinity, or a setting is malformed.
    """
    if not settings.any_set(b"DSV4REF_SHAPE_DUMP", b"DSV4REF_LOG"):
        return
    folder, level = settings.get("DSV4REF_SHAPE_DUMP"), settings.get("DSV4REF_LOG")
    if (folder is None and level == "off") or capture_under_way():
        return
    if not isinstance(event, str):
        raise TypeError(f"event: got {type(event).__name__}, expected the event's name")
    plain = {name: _plain(value, f"{event}: {name}") for name, value in fields.items()}
    if folder is not None:
        _recorder.append(folder, event, plain)
    if level != "off":
        _recorder.print(event, plain, every=level == "full")


def enabled() -> bool:
    """Whether ``record`` would record now, for callers whose fields cost something to compute."""
    on = settings.get("DSV4REF_SHAPE_DUMP") is not None or settings.get("DSV4REF_LOG") != "off"
    return on and not capture_under_way()


def capture_under_way() -> bool:
    """Whether the current stream is being captured into a graph."""
    # is_initialized first: a process that never touched the GPU captures nothing, and asking must not create a context.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def read(folder: str | os.PathLike[str] | None = None) -> list[Row]:
    """All rows that any process recorded in a folder, by time.

    Args:
        folder: the folder; that of ``DSV4REF_SHAPE_DUMP`` when None.

    Raises:
        ValueError: there is no such folder, or a line is not a row; the message names file and line.
    """
    where = settings.get("DSV4REF_SHAPE_DUMP") if folder is None else Path(folder)
    if where is None:
        raise ValueError("folder: got None and DSV4REF_SHAPE_DUMP is not set, expected a folder of recorded files")
    if not where.is_dir():
        raise ValueError(f"folder: got {str(where)!r}, expected a folder that exists")
    rows = []
    for file in sorted(where.glob(_FILE_PATTERN)):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            rows.append(_parse(line, f"{file}:{number}"))
    # Stable, and a file is in the order of its process: equal times keep that order.
    return sorted(rows, key=lambda row: row.time_ns)


def histogram(event: str, folder: str | os.PathLike[str] | None = None, by: Sequence[str] | None = None) -> list[Bin]:
    """Counts the recorded calls of one event by what they ran on.

    Args:
        event: the event's name.
        folder: as for ``read``.
        by: the fields that tell calls apart; all of them when None.

    Returns:
        One bin per distinct combination, the most frequent first; empty if the event was not recorded.

    Raises:
        ValueError: as ``read``, or a row of the event lacks a field of ``by``.
    """
    counts: Counter[str] = Counter()
    for row in read(folder):
        if row.event != event:
            continue
        missing = [name for name in by or () if name not in row.fields]
        if missing:
            raise ValueError(f"by: event {event!r} was recorded without {missing[0]!r}, it has {sorted(row.fields)}")
        chosen = row.fields if by is None else {name: row.fields[name] for name in by}
        counts[json.dumps(chosen, sort_keys=True)] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Bin(json.loads(fields), count) for fields, count in ordered]


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {line[:80]!r}") from None
    if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != _ROW_KEYS:
        raise ValueError(f"{where}: expected an object with {', '.join(_ROW_KEYS)}, got {line[:80]!r}")
    return Row(**row)


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON data; ``where`` names it in an error."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: got {value}, expected a finite number (JSON has no nan or infinity)")
        return value
    if isinstance(value, torch.Tensor):
        return {
            "shape": [int(size) for size in value.shape],
            "stride": [int(step) for step in value.stride()] if value.layout == torch.strided else None,
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
        }
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: got a mapping with key {key!r}, expected string keys")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where}: got {type(value).__name__}, expected JSON data, a tensor, a dtype or a device")


def _text(value: Any) -> str:
    """A field for the eye: ``bfloat16[64, 64, 512]`` for a contiguous tensor."""
    if isinstance(value, dict) and set(value) == {"shape", "stride", "dtype", "device"}:
        shape, stride = value["shape"], value["stride"]
        dense = list(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]
        strides = "" if stride == (dense if shape else []) else f" stride {stride}"
        return f"{value['dtype']}{shape}{strides} on {value['device']}"
    return json.dumps(value)


class _Recorder:
    """This process's open file and what its summary has printed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._file = -1
        self._printed: set[str] = set()

    def append(self, folder: Path, event: str, fields: dict[str, Any]) -> None:
        row = {
            "event": event,
            "time_ns": 0,
            "pid": os.getpid(),
            "thread": threading.get_native_id(),
            "fields": fields,
        }
        with self._lock:
            if folder != self._folder:
                self._open(folder)
            # Read under the lock, so that the lines of a file stand in the order of their times.
            row["time_ns"] = time.time_ns()
            line = (json.dumps(row) + "\n").encode()
            while line:
                line = line[os.write(self._file, line) :]

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._file >= 0:
            os.close(self._file)
            self._folder, self._file = None, -1
        # Process ids repeat, across machines that share a folder and over time: the start time tells them apart, and
        # O_EXCL refuses a file that is somebody's already.
        name = f"shapes-{time.time_ns()}-{os.getpid()}.jsonl"
        self._file = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._folder = folder

    def print(self, event: str, fields: dict[str, Any], *, every: bool) -> None:
        line = f"dsv4ref {event} " + " ".join(f"{name}={_text(value)}" for name, value in fields.items())
        with self._lock:
            if not every:
                if line in self._printed or len(self._printed) > SUMMARY_LIMIT:
                    return
                self._printed.add(line)
                if len(self._printed) > SUMMARY_LIMIT:
                    line = f"dsv4ref: more than {SUMMARY_LIMIT} distinct calls, the summary ends here"
            sys.stderr.write(line.rstrip() + "\n")


_recorder = _Recorder()


def _after_fork() -> None:
    """Gives a forked child its own state: the file is the parent's, and a thread left behind may hold the lock."""
    global _recorder
    inherited, _recorder = _recorder, _Recorder()
    if inherited._file >= 0:
        os.close(inherited._file)


os.register_at_fork(after_in_child=_after_fork)
