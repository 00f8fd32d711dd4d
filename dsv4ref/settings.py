"""The one place that reads environment variables: their names, types, defaults and meaning.

Values are parsed when they are asked for, never when a module is imported, so a test or a notebook cell can change one
and see the effect. A variable set to the empty string counts as unset. A bad value raises one ValueError that names the
variable, what it holds and what it should hold; nothing falls back to the default.

``ENV`` is the whole table; ``rows`` renders it for the documentation, ``unknown`` finds misspelt names.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, overload

PREFIX = "DSV4REF_"
LogLevel: TypeAlias = Literal["off", "summary", "full"]

_LOG_LEVELS: tuple[LogLevel, ...] = ("off", "summary", "full")
# The spellings Triton's own knob accepts, in any case; every other text, "2" included, Triton reads as off.
_TRUE = frozenset({"1", "true", "on", "yes", "y"})
_FALSE = frozenset({"0", "false", "off", "no", "n"})


class LaunchShape(NamedTuple):
    """One launch shape of the sparse decode kernel, as ``DSV4REF_LAUNCH_SHAPE`` writes it.

    ``block_h`` heads and ``block_k`` keys per tile, ``warps`` per workgroup; ``stages`` None leaves it to the kernel.
    """

    block_h: int
    block_k: int
    warps: int
    stages: int | None = None

    def __str__(self) -> str:
        return "x".join(str(part) for part in self if part is not None)


@dataclass(frozen=True)
class Setting:
    """One environment variable: ``type`` says in words what it takes, ``default`` is what ``get`` returns if unset."""

    name: str
    type: str
    default: Any
    meaning: str
    owner: str = "dsv4ref"
    parse: Callable[[str], Any] = field(default=str, repr=False, compare=False)


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) >= 2**63:
        raise ValueError("a whole number from 0 to 2**63 - 1")
    return int(text)


def _folder_to_write(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError("a folder (it is made when missing), and this is a file")
    return path


def _folder_to_read(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError("a folder that exists")
    return path


def _log_level(text: str) -> LogLevel:
    for level in _LOG_LEVELS:
        if text == level:
            return level
    raise ValueError(f"one of {', '.join(_LOG_LEVELS)}")


def _launch_shape(text: str) -> LaunchShape:
    wanted = "BHxBKxWARPS or BHxBKxWARPSxSTAGES, such as 64x64x8x2, the first three powers of two and STAGES at least 1"
    if not re.fullmatch(r"[0-9]+(x[0-9]+){2,3}", text):
        raise ValueError(wanted)
    shape = LaunchShape(*(int(part) for part in text.split("x")))
    if any(part < 1 or part & (part - 1) for part in shape[:3]) or shape.stages == 0:
        raise ValueError(wanted)
    return shape


def _switch(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError("1 or 0 (Triton reads any other text as off, without saying so)")
    return lowered in _TRUE


_TABLE = (
    Setting(
        "DSV4REF_SEED", "whole number", 0, "Base seed of generated inputs; each case mixes in its own id.", parse=_seed
    ),
    Setting(
        "DSV4REF_SHAPE_DUMP",
        "folder",
        None,
        "Append every recorded kernel call (shapes, strides, dtypes, never values) to a JSONL file per process in this "
        "folder, which is made when missing. Off when unset; silent while a graph is being captured.",
        parse=_folder_to_write,
    ),
    Setting(
        "DSV4REF_LOG",
        "off, summary or full",
        "off",
        "Print recorded kernel calls to stderr: summary prints each distinct call once per process, full prints every "
        "call. Silent while a graph is being captured.",
        parse=_log_level,
    ),
    Setting(
        "DSV4REF_LAUNCH_SHAPE",
        "BHxBKxWARPS[xSTAGES]",
        None,
        "Overrides the launch shape of the sparse decode kernel, for sweeps: heads per tile, keys per tile, warps, and "
        "pipeline stages. Unset means the kernel's own selection.",
        parse=_launch_shape,
    ),
    Setting(
        "DSV4REF_RECORDS",
        "folder that exists",
        None,
        "A further folder of measurement records, read beside those that ship with the package.",
        parse=_folder_to_read,
    ),
    Setting(
        "TRITON_INTERPRET",
        "1 or 0",
        False,
        "Run Triton kernels in Triton's CPU interpreter. Read when a kernel module is imported, so set it before that.",
        owner="Triton",
        parse=_switch,
    ),
)

# Looking up an unset name in os.environ costs half a microsecond, most of it encoding the name and raising twice. Its
# dictionary of bytes answers in a thirtieth of that; os.environb is the same data behind the slower door.
_raw_environ: Mapping[bytes, bytes] = getattr(os.environ, "_data", os.environb)

ENV: Mapping[str, Setting] = MappingProxyType({setting.name: setting for setting in _TABLE})


@overload
def get(name: Literal["DSV4REF_SEED"]) -> int: ...
@overload
def get(name: Literal["DSV4REF_SHAPE_DUMP", "DSV4REF_RECORDS"]) -> Path | None: ...
@overload
def get(name: Literal["DSV4REF_LOG"]) -> LogLevel: ...
@overload
def get(name: Literal["DSV4REF_LAUNCH_SHAPE"]) -> LaunchShape | None: ...
@overload
def get(name: Literal["TRITON_INTERPRET"]) -> bool: ...
@overload
def get(name: str) -> Any: ...


def get(name: str) -> Any:
    """Reads one variable from the environment, now.

    Args:
        name: a key of ``ENV``.

    Returns:
        The parsed value, or the setting's default when the variable is unset or empty.

    Raises:
        ValueError: ``name`` is not in ``ENV``, or the variable holds something its type does not allow.
    """
    setting = ENV.get(name)
    if setting is None:
        raise ValueError(f"name: no setting is called {name!r}; {_suggest(name)}")
    text = os.environ.get(name, "")
    if not text:
        return setting.default
    try:
        return setting.parse(text)
    except ValueError as wanted:
        raise ValueError(f"{name}: got {text!r}, expected {wanted}") from None


def any_set(*names: bytes) -> bool:
    """Whether one of the variables holds anything, unparsed: for hot paths, hence the names as bytes."""
    return any(map(_raw_environ.get, names))


def unknown(environ: Mapping[str, str] | None = None) -> list[dict[str, str | None]]:
    """Variables that start with ``DSV4REF_`` and that nothing here reads.

    Args:
        environ: the mapping to look through; the process environment when None.

    Returns:
        One row ``{"name", "nearest"}`` per variable, by name; ``nearest`` is the known name it resembles, or None.
    """
    present = os.environ if environ is None else environ
    strays = sorted(name for name in present if name.startswith(PREFIX) and name not in ENV)
    return [{"name": name, "nearest": _nearest(name)} for name in strays]


def rows() -> list[dict[str, str]]:
    """The documentation table, one row ``{"name", "type", "default", "owner", "meaning"}`` per variable."""
    return [
        {
            "name": setting.name,
            "type": setting.type,
            "default": _default_text(setting.default),
            "owner": setting.owner,
            "meaning": setting.meaning,
        }
        for setting in _TABLE
    ]


def _default_text(default: object) -> str:
    if default is None:
        return "unset"
    return str(int(default)) if isinstance(default, bool) else str(default)


def _nearest(name: str) -> str | None:
    close = difflib.get_close_matches(name.upper(), ENV, n=1, cutoff=0.75)
    return close[0] if close else None


def _suggest(name: str) -> str:
    nearest = _nearest(name)
    return f"did you mean {nearest!r}?" if nearest else f"known: {', '.join(ENV)}"
