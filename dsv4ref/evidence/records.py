"""Measurement records: one JSON line per measurement, with provenance, and with the hashes that let it go stale.

`Record` is a figure measured here; `PublishedFigure` is somebody else's, kept in another file and never mixed in. Both
are checked when they are made, so a file read back holds nothing that could not have been written (`lines`). Records
ship with the package as data/records/<device>/<chapter>.jsonl, published figures as data/published.jsonl.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import platform
import re
import secrets
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypedDict

from dsv4ref.evidence import lines

PACKAGE = lines.PACKAGE
SCHEMA = 1
HOST = "host"
"""`Record.method` of a line whose microseconds are the host's, never to be set beside a device's."""

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
        lines.check_types(self)
        lines.check_fixed(self, kind="measured", schema=SCHEMA, gate="passed")
        lines.check_keys(self, "chapter", "device")
        if not 0 < self.p20_us <= self.p50_us <= self.p80_us:
            times = (self.p20_us, self.p50_us, self.p80_us)
            raise ValueError(f"p20_us, p50_us, p80_us: got {times}, expected positive times in rising order")
        lines.check_least(self, 1, "repeats")
        lines.check_least(self, 0, "bytes", "flops", "launches", "seed", "noise_floor")
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
        lines.utc("date", self.date)
        lines.check_sources(self)


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
        lines.check_types(self)
        lines.check_fixed(self, kind="published", schema=SCHEMA)
        lines.check_keys(self, "chapter")
        for name in ("before", "after"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive figure")

    @property
    def gain_percent(self) -> float:
        """Change from before to after, percent; the text of a source may say otherwise, its figures say this."""
        return 100.0 * (self.after / self.before - 1.0)


# ---- files ----


def write(path: Path, records: Iterable[Record] | Iterable[PublishedFigure]) -> None:
    """Append records to a JSON Lines file: `lines.append` of one of the two kinds, never both."""
    lines.append(path, records, Record, PublishedFigure)


def read(path: Path) -> tuple[Record, ...]:
    """All measurement records of a JSON Lines file, in its order.

    Raises: ValueError 'file:line: what is wrong, what is expected' for the first line that is not exactly one record;
    OSError if the file cannot be read.
    """
    return tuple(record for _, record in lines.read(path, Record))


def read_published(path: Path) -> tuple[PublishedFigure, ...]:
    """All published figures of a JSON Lines file, in its order. Raises as `read`."""
    return tuple(record for _, record in lines.read(path, PublishedFigure))


def read_folder(folder: Path) -> tuple[Record, ...]:
    """All records below `folder`, whose files must stand at <device>/<chapter>.jsonl and hold what their place says.

    Raises: as `lines.read_folder`.
    """
    return lines.read_folder(folder, Record)


def shipped(extra: Path | None = None) -> tuple[Record, ...]:
    """The records that came with the package, then those of a further folder.

    Args:
        extra: a folder laid out as `read_folder` wants it, or None.

    Raises: as `read_folder`.
    """
    records = lines.shipped("records", Record)
    return records if extra is None else records + read_folder(extra)


def published(chapter: str | None = None) -> tuple[PublishedFigure, ...]:
    """The published figures that came with the package, of one chapter or all. Raises as `read`."""
    with importlib.resources.as_file(importlib.resources.files(lines.PACKAGE) / "data" / "published.jsonl") as path:
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
        newest = max(enumerate(group), key=lambda item: (lines.utc("date", item[1].date), item[0]))[1]
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


class _Sourced(Protocol):
    """What can go stale: a record, or other evidence that names the sources it is about."""

    @property
    def sources(self) -> Mapping[str, str]: ...


def stale_modules(record: _Sourced) -> tuple[str, ...]:
    """The modules of `record.sources` whose source has changed since, or is gone."""
    return tuple(name for name, digest in record.sources.items() if _current(name) != digest)


def is_stale(record: _Sourced) -> bool:
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
        commit=commit_of(Path(str(importlib.resources.files(lines.PACKAGE)))),
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
