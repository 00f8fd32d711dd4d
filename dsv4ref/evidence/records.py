"""Measurement records: one JSON line per measurement, with provenance, and with the hashes that let it go stale.

`Record` is a figure measured here; `PublishedFigure` is somebody else's, kept in another file and never mixed in. Both
are checked when they are made, so a file read back holds nothing that could not have been written. Records ship with
the package as data/records/<device>/<chapter>.jsonl, published figures as data/published.jsonl.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import subprocess
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict, TypeVar

PACKAGE = "dsv4ref"
SCHEMA = 1
HOST = "host"
"""`Record.method` of a line whose microseconds are the host's, never to be set beside a device's."""

_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")  # devices and chapters name folders and files
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RATIO_FIELDS = ("ratio", "ratio_low", "ratio_high", "noise_floor")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: a variant of one chapter's operation, on one case, on one device.

    Times are microseconds per call: the device's, or with the method `HOST` the host's, from a call to its return; the
    ladder's method names its own. `ratio` is baseline / this variant with its 95 % interval, against the
    baseline of the same `run`, and `noise_floor` is that run's; the four are None on the baseline's own line. `bytes`
    and `flops` are counted per call; `launches` is None where nobody counted. `bound_us` is the time bound under the
    roofs measured in the run. `gate` is always 'passed': nothing is recorded behind a red gate. `sources` maps module
    names to the sha256 of the source measured. `peers` notes the version of a third party's kernel.

    Raises: ValueError or TypeError naming the field, what it holds and what is expected.
    """

    chapter: str
    case: str
    variant: str
    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int
    method: str
    bytes: int
    flops: int
    launches: int | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    noise_floor: float | None
    bound_us: float | None
    gate: str
    device: str
    device_name: str
    driver: str | None
    torch: str
    triton: str
    python: str
    mode: str
    date: str
    commit: str | None
    seed: int
    sources: Mapping[str, str]
    peers: str | None
    run: str
    kind: str = "measured"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_types(self)
        _check_fixed(self, kind="measured", schema=SCHEMA, gate="passed")
        _check_keys(self, "chapter", "device")
        if not 0 < self.p20_us <= self.p50_us <= self.p80_us:
            times = (self.p20_us, self.p50_us, self.p80_us)
            raise ValueError(f"p20_us, p50_us, p80_us: got {times}, expected positive times in rising order")
        _check_least(self, 1, "repeats")
        _check_least(self, 0, "bytes", "flops", "launches", "seed", "noise_floor")
        if self.bound_us is not None and self.bound_us <= 0:
            raise ValueError(f"bound_us: got {self.bound_us}, expected a positive time or None")
        given = [name for name in _RATIO_FIELDS if getattr(self, name) is not None]
        if given and len(given) < len(_RATIO_FIELDS):
            raise ValueError(f"{', '.join(_RATIO_FIELDS)}: got only {', '.join(given)}, expected all four or none")
        if self.ratio is not None and self.ratio_low is not None and self.ratio_high is not None:
            interval = (self.ratio_low, self.ratio, self.ratio_high)
            if not 0 < interval[0] <= interval[1] <= interval[2]:
                raise ValueError(
                    f"ratio_low, ratio, ratio_high: got {interval}, expected positive numbers in rising order"
                )
        _utc("date", self.date)
        if not self.sources:
            raise ValueError("sources: got no modules, expected the modules measured and the sha256 of each")
        for name, digest in self.sources.items():
            if not name or not _SHA256.fullmatch(digest):
                raise ValueError(f"sources[{name!r}]: got {digest!r}, expected 64 lower-case hexadecimal digits")
        object.__setattr__(self, "sources", dict(self.sources))


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A change that somebody else published: two figures, their device and source, never measured here.

    `what` says what was measured and under which conditions; `note` what to know before quoting it.

    Raises: ValueError or TypeError naming the field, what it holds and what is expected.
    """

    chapter: str
    what: str
    before: float
    after: float
    unit: str
    device: str
    source: str
    note: str
    kind: str = "published"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_types(self)
        _check_fixed(self, kind="published", schema=SCHEMA)
        _check_keys(self, "chapter")
        for name in ("before", "after"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive figure")

    @property
    def gain_percent(self) -> float:
        """Change from before to after, percent; the text of a source may say otherwise, its figures say this."""
        return 100.0 * (self.after / self.before - 1.0)


AnyRecord = TypeVar("AnyRecord", Record, PublishedFigure)


# ---- files ----


def write(path: Path, records: Iterable[Record] | Iterable[PublishedFigure]) -> None:
    """Append records to a JSON Lines file, one unbuffered write per line; makes the file and its folder if missing.

    Several processes may append at once: each holds the file's advisory lock while it checks the end and writes, so
    lines stay whole and the lines of one call stay together.

    Raises:
        TypeError: `records` holds anything else, or both kinds.
        ValueError: the file ends in a truncated line, which appending would corrupt further.
        OSError: the file cannot be written, or took only part of a line.
    """
    lines: list[Record | PublishedFigure] = list(records)
    kinds = {type(record) for record in lines}
    if len(kinds) > 1 or not kinds <= {Record, PublishedFigure}:
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"records: got {names}, expected only Record or only PublishedFigure")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by closing
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            raise ValueError(f"{path}: the last line is truncated, expected a newline at its end; repair it first")
        for record in lines:
            line = (json.dumps(dataclasses.asdict(record), allow_nan=False, ensure_ascii=False) + "\n").encode()
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{path}: a line was written only in part (is the disk full?)")
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[Record, ...]:
    """All measurement records of a JSON Lines file, in its order.

    Raises: ValueError 'file:line: what is wrong, what is expected' for the first line that is not exactly one record;
    OSError if the file cannot be read.
    """
    return tuple(record for _, record in _read(path, Record))


def read_published(path: Path) -> tuple[PublishedFigure, ...]:
    """All published figures of a JSON Lines file, in its order. Raises as `read`."""
    return tuple(record for _, record in _read(path, PublishedFigure))


def read_folder(folder: Path) -> tuple[Record, ...]:
    """All records below `folder`, whose files must stand at <device>/<chapter>.jsonl and hold what their place says.

    Raises: ValueError if `folder` is none, a file stands elsewhere, or a line belongs to another device or chapter;
    otherwise as `read`.
    """
    if not folder.is_dir():
        raise ValueError(f"folder: got {folder}, which is no folder, expected one holding <device>/<chapter>.jsonl")
    records = []
    for path in sorted(folder.rglob("*.jsonl")):
        if path.parent.parent != folder:
            raise ValueError(f"{path}: expected record files at <device>/<chapter>.jsonl below {folder}")
        for number, record in _read(path, Record):
            for name, got, place in (
                ("device", record.device, path.parent.name),
                ("chapter", record.chapter, path.stem),
            ):
                if got != place:
                    raise ValueError(f"{path}:{number}: {name}: got {got!r}, expected {place!r} from the file's place")
            records.append(record)
    return tuple(records)


def shipped(extra: Path | None = None) -> tuple[Record, ...]:
    """The records that came with the package, then those of a further folder.

    Args:
        extra: a folder laid out as `read_folder` wants it, or None.

    Raises: as `read_folder`.
    """
    records: tuple[Record, ...] = ()
    with importlib.resources.as_file(importlib.resources.files(PACKAGE) / "data" / "records") as folder:
        if folder.is_dir():  # a release before the first measured run has none
            records = read_folder(folder)
    return records if extra is None else records + read_folder(extra)


def published(chapter: str | None = None) -> tuple[PublishedFigure, ...]:
    """The published figures that came with the package, of one chapter or all. Raises as `read`."""
    with importlib.resources.as_file(importlib.resources.files(PACKAGE) / "data" / "published.jsonl") as path:
        return tuple(figure for figure in read_published(path) if chapter in (None, figure.chapter))


def latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """The newest run's lines for each (chapter, case, device, variant), in the order in which these first appear.

    The newest run is the one with the latest date; of equal dates, the one that comes last. It may hold one line per
    method (device time, host time); of several lines by one method, the last counts.
    """
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.chapter, record.case, record.device, record.variant), []).append(record)
    kept: list[Record] = []
    for group in groups.values():
        newest = max(enumerate(group), key=lambda item: (_utc("date", item[1].date), item[0]))[1]
        kept.extend({record.method: record for record in group if record.run == newest.run}.values())
    return tuple(kept)


# ---- staleness ----


def module_sha256(name: str) -> str:
    """The sha256 of a module's source file, found without importing the module (its parent packages are imported).

    Raises: ValueError if there is no such module or it has no Python source.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError) as error:
        raise ValueError(f"module: got {name!r}, which cannot be found ({error}); expected a module's name") from error
    if spec is None or spec.origin is None or not spec.has_location or not spec.origin.endswith(".py"):
        raise ValueError(f"module: got {name!r}, which has no Python source file, expected one that has")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def hash_sources(names: Iterable[str]) -> dict[str, str]:
    """`Record.sources` for these modules, sorted by name. Raises as `module_sha256`."""
    return {name: module_sha256(name) for name in sorted(set(names))}


def stale_modules(record: Record) -> tuple[str, ...]:
    """The modules of `record.sources` whose source has changed since, or is gone."""
    return tuple(name for name, digest in record.sources.items() if _current(name) != digest)


def is_stale(record: Record) -> bool:
    """True if a source measured has changed since."""
    return bool(stale_modules(record))


def _current(name: str) -> str | None:
    try:
        return module_sha256(name)
    except ValueError:
        return None


# ---- provenance ----


class Provenance(TypedDict):
    """The fields of a `Record` that say where and when it was measured; `Record(**provenance(...), ...)`."""

    device: str
    device_name: str
    driver: str | None
    torch: str
    triton: str
    python: str
    mode: str
    date: str
    commit: str | None


def provenance(*, device: str, device_name: str, mode: str) -> Provenance:
    """Collect what this process runs on, now.

    Args:
        device: key that names the device's folder of records, such as 'h200'.
        device_name: as the driver calls it.
        mode: how kernels run, such as 'compiled'.

    Returns: `Provenance`; `driver` is None where no driver states its version, `commit` None outside a checkout.
    """
    import torch  # here, so that reading records costs no torch

    return Provenance(
        device=device,
        device_name=device_name,
        driver=driver_version(),
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        mode=mode,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit_of(Path(str(importlib.resources.files(PACKAGE)))),
    )


def new_run() -> str:
    """An id for the lines of one run: the UTC time, and six random digits against two runs in one second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def driver_version(
    nvidia: Path = Path("/proc/driver/nvidia/version"), amdgpu: Path = Path("/sys/module/amdgpu/version")
) -> str | None:
    """The GPU driver's version from the kernel's own files; None where there is none, or none that states it."""
    if nvidia.is_file():
        found = re.search(r"Kernel Module\D*?\s(?:for \S+\s+)?(\d+\.\d+(?:\.\d+)*)", nvidia.read_text())
        return found.group(1) if found else None
    if amdgpu.is_file():
        return amdgpu.read_text().strip() or None
    return None


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that tracks `folder`'s files, with '+dirty' if its tree has changes.

    None without git, outside a checkout, before the first commit, or where a checkout merely surrounds the folder (an
    environment installed inside somebody's repository).
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    head = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if not head or changes is None:
        return None
    return head + ("+dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _triton_version() -> str:
    """The version of whatever distribution provides triton: its name differs on ROCm."""
    names = sorted(set(importlib.metadata.packages_distributions().get("triton", [])))
    if not names:
        import triton

        return triton.__version__
    return ", ".join(importlib.metadata.version(name) for name in names)


# ---- checks ----


def _read(path: Path, cls: type[AnyRecord]) -> list[tuple[int, AnyRecord]]:
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        raise ValueError(f"{path}:{len(lines) + 1}: truncated, expected a newline at the end of the last line")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append((number, _parse(line, cls)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


def _parse(line: bytes, cls: type[AnyRecord]) -> AnyRecord:
    if not line.strip():
        raise ValueError("blank line, expected one JSON object per line")
    try:
        # Constants (NaN, Infinity) become strings, which the field's own check then refuses by name.
        loaded = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=str)
    except _RepeatedFieldError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}), expected one JSON object per line") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"got a JSON {type(loaded).__name__}, expected one JSON object per line")
    kind = cls.__dataclass_fields__["kind"].default
    if loaded.get("kind", kind) != kind:  # before the fields, which all differ in a line of the other kind
        raise ValueError(f"kind: got {loaded['kind']!r}, expected {kind!r}")
    expected = [field.name for field in dataclasses.fields(cls)]
    if unknown := [name for name in loaded if name not in expected]:
        raise ValueError(f"unknown field {unknown[0]!r}, expected only {', '.join(expected)}")
    if missing := [name for name in expected if name not in loaded]:
        raise ValueError(f"missing field {missing[0]!r}, expected all of {', '.join(expected)}")
    return cls(**loaded)


class _RepeatedFieldError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedFieldError(f"field {name!r} comes twice, expected each field once")
        found[name] = value
    return found


def _check_types(record: Record | PublishedFigure) -> None:
    """Hold every field against its annotation, and refuse empty text and numbers that are not finite."""
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        allowed = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
        if not any(_is_a(value, one) for one in allowed):
            wanted = " or ".join(_TYPE_NAMES[one] for one in allowed)
            raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected {wanted}")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}: got {value!r}, expected text that says something")
        if float in allowed and value is not None:
            object.__setattr__(record, name, _finite(name, value))


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)  # a whole number is one too, unless it is beyond every float
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


_TYPE_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    type(None): "None",
    Mapping[str, str]: "a mapping of text to text",
}


def _is_a(value: object, hint: Any) -> bool:
    if isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, float | int)
    if hint == Mapping[str, str]:
        return isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)
    return isinstance(value, hint)


def _check_fixed(record: Record | PublishedFigure, **fixed: object) -> None:
    for name, expected in fixed.items():
        if (got := getattr(record, name)) != expected:
            raise ValueError(f"{name}: got {got!r}, expected {expected!r}")


def _check_keys(record: Record | PublishedFigure, *names: str) -> None:
    for name in names:
        if not _KEY.fullmatch(getattr(record, name)):
            raise ValueError(
                f"{name}: got {getattr(record, name)!r}, expected lower-case letters, digits, '_', '-' and '.'"
            )


def _check_least(record: Record, least: int, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")


def _utc(name: str, text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected a date and time such as 2026-01-31T12:00:00+00:00") from error
    if date.utcoffset() != timedelta(0):
        raise ValueError(f"{name}: got {text!r}, expected a time in UTC, ending in +00:00 or Z")
    return date
