"""Evidence in files: one JSON line per checked dataclass, appended whole, and refused by file and line if damaged.

What `records`, `profiles` and `sanitizer` share. Such a dataclass has the fields `kind` and `schema` with defaults,
checks itself when it is made with the functions at the end of this module, and ships with the package as
data/<folder>/<device>/<chapter>.jsonl.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.resources
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

PACKAGE = "dsv4ref"

_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")  # devices and chapters name folders and files
_SHA256 = re.compile(r"[0-9a-f]{64}")

Line = TypeVar("Line")


# ---- files ----


def append(path: Path, lines: Iterable[Any], *kinds: type) -> None:
    """Append to a JSON Lines file, one unbuffered write per line; makes the file and its folder if missing.

    Several processes may append at once: each holds the file's advisory lock while it checks the end and writes, so
    lines stay whole and the lines of one call stay together.

    Args:
        path: the file.
        lines: dataclasses, all of one of `kinds`.
        kinds: what the file may hold.

    Raises:
        TypeError: `lines` holds anything else, or several kinds.
        ValueError: the file ends in a truncated line, which appending would corrupt further.
        OSError: the file cannot be written, or took only part of a line.
    """
    batch = list(lines)
    found = {type(line) for line in batch}
    if len(found) > 1 or not found <= set(kinds):
        names = sorted(kind.__name__ for kind in found)
        expected = " or ".join(f"only {kind.__name__}" for kind in kinds)
        raise TypeError(f"records: got {names}, expected {expected}")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by closing
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            raise ValueError(f"{path}: the last line is truncated, expected a newline at its end; repair it first")
        for line in batch:
            text = (json.dumps(dataclasses.asdict(line), allow_nan=False, ensure_ascii=False) + "\n").encode()
            if os.write(descriptor, text) != len(text):
                raise OSError(f"{path}: a line was written only in part (is the disk full?)")
    finally:
        os.close(descriptor)


def read(path: Path, cls: type[Line]) -> list[tuple[int, Line]]:
    """The lines of a file, with their numbers from 1 on.

    Raises: ValueError 'file:line: what is wrong, what is expected' for the first line that is not exactly one `cls`;
    OSError if the file cannot be read.
    """
    content = path.read_bytes().split(b"\n")
    if content.pop():
        raise ValueError(f"{path}:{len(content) + 1}: truncated, expected a newline at the end of the last line")
    found = []
    for number, line in enumerate(content, start=1):
        try:
            found.append((number, _parse(line, cls)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return found


def read_folder(folder: Path, cls: type[Line]) -> tuple[Line, ...]:
    """All lines below `folder`, whose files must stand at <device>/<chapter>.jsonl and hold what their place says.

    Raises: ValueError if `folder` is none, a file stands elsewhere, or a line belongs to another device or chapter;
    otherwise as `read`.
    """
    if not folder.is_dir():
        raise ValueError(f"folder: got {folder}, which is no folder, expected one holding <device>/<chapter>.jsonl")
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        if path.parent.parent != folder:
            raise ValueError(f"{path}: expected record files at <device>/<chapter>.jsonl below {folder}")
        for number, line in read(path, cls):
            for name, place in (("device", path.parent.name), ("chapter", path.stem)):
                if (got := getattr(line, name)) != place:
                    raise ValueError(f"{path}:{number}: {name}: got {got!r}, expected {place!r} from the file's place")
            found.append(line)
    return tuple(found)


def shipped(name: str, cls: type[Line]) -> tuple[Line, ...]:
    """The lines that came with the package in data/`name`, none without such a folder. Raises as `read_folder`."""
    with importlib.resources.as_file(importlib.resources.files(PACKAGE) / "data" / name) as folder:
        return read_folder(folder, cls) if folder.is_dir() else ()  # before the first run on a GPU there is none


def _parse(line: bytes, cls: type[Line]) -> Line:
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
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kind = fields["kind"].default
    if loaded.get("kind", kind) != kind:  # before the fields, which all differ in a line of the other kind
        raise ValueError(f"kind: got {loaded['kind']!r}, expected {kind!r}")
    if unknown := [name for name in loaded if name not in fields]:
        raise ValueError(f"unknown field {unknown[0]!r}, expected only {', '.join(fields)}")
    if missing := [name for name in fields if name not in loaded]:
        raise ValueError(f"missing field {missing[0]!r}, expected all of {', '.join(fields)}")
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


# ---- checks ----


def check_types(line: Any) -> None:
    """Hold every field against its annotation, and refuse empty text and numbers that are not finite.

    Whole numbers in the place of numbers become floats, mappings become dicts.

    Raises: ValueError or TypeError naming the field, what it holds and what is expected.
    """
    for name, hint in typing.get_type_hints(type(line)).items():
        value = getattr(line, name)
        allowed = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
        if not any(_is_a(value, one) for one in allowed):
            wanted = " or ".join(_TYPE_NAMES[one] for one in allowed)
            raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected {wanted}")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}: got {value!r}, expected text that says something")
        if float in allowed and value is not None:
            object.__setattr__(line, name, _finite(name, value))
        if isinstance(value, Mapping):
            numbers = typing.get_args(hint)[1] is float
            held = {key: _finite(f"{name}[{key!r}]", item) if numbers else item for key, item in value.items()}
            object.__setattr__(line, name, held)


def check_fixed(line: Any, **fixed: object) -> None:
    """ValueError unless these fields hold exactly this."""
    for name, expected in fixed.items():
        if (got := getattr(line, name)) != expected:
            raise ValueError(f"{name}: got {got!r}, expected {expected!r}")


def check_keys(line: Any, *names: str) -> None:
    """ValueError unless these fields can name a folder or a file."""
    for name in names:
        if not _KEY.fullmatch(getattr(line, name)):
            raise ValueError(
                f"{name}: got {getattr(line, name)!r}, expected lower-case letters, digits, '_', '-' and '.'"
            )


def check_least(line: Any, least: int, *names: str) -> None:
    """ValueError if one of these fields is below `least`; None passes."""
    for name in names:
        value = getattr(line, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_sources(line: Any) -> None:
    """ValueError unless `sources` maps at least one module to the sha256 of its source."""
    if not line.sources:
        raise ValueError("sources: got no modules, expected the modules measured and the sha256 of each")
    for name, digest in line.sources.items():
        if not name or not _SHA256.fullmatch(digest):
            raise ValueError(f"sources[{name!r}]: got {digest!r}, expected 64 lower-case hexadecimal digits")


def utc(name: str, text: str) -> datetime:
    """The date and time that a field holds; ValueError naming the field if it is none, or not in UTC."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected a date and time such as 2026-01-31T12:00:00+00:00") from error
    if date.utcoffset() != timedelta(0):
        raise ValueError(f"{name}: got {text!r}, expected a time in UTC, ending in +00:00 or Z")
    return date


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
    Mapping[str, int]: "a mapping of text to whole numbers",
    Mapping[str, float]: "a mapping of text to numbers",
}


def _is_a(value: object, hint: Any) -> bool:
    if isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, float | int)
    if hint in _TYPE_NAMES and (parts := typing.get_args(hint)):
        return isinstance(value, Mapping) and all(
            _is_a(key, parts[0]) and _is_a(item, parts[1]) for key, item in value.items()
        )
    return isinstance(value, hint)
