"""Finding the genuine AITER, and refusing what only shares its name.

``import aiter`` is done here and nowhere else: late, because it creates folders, edits ``sys.path`` and on a machine
without ROCm raises RuntimeError rather than ImportError. PyPI's ``aiter`` is an asynchronous-iterator library; it would
import without complaint and is therefore recognised by its files first.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from dsv4ref import device
from dsv4ref.kernels.aiter import contract

__all__ = ["AiterUnavailableError", "Library", "load_aiter", "unavailable"]


class AiterUnavailableError(RuntimeError):
    """Genuine AITER cannot be used here; the message says what was found and what to install."""


@dataclass(frozen=True)
class Library:
    """AITER as the adapters see it: the genuine package, or something laid out like it.

    Args:
        name: what it calls itself on pages and in messages; an emulation says so here.
        module: the ``aiter`` module or an object with the same functions at the same paths.
        arch: the architecture whose rows of the support matrix apply.
        compute_units: CUs that a plan is made for.
        emulated: True unless it is the genuine library.
    """

    name: str
    module: Any
    arch: str
    compute_units: int
    emulated: bool

    def function(self, entry: str) -> Any:
        """The function behind an entry of the contract.

        Raises:
            AttributeError: the library does not have it.
        """
        try:
            return contract.find(self.module, entry)
        except (AttributeError, ImportError) as error:
            where = contract.CONTRACT[entry].module
            raise AttributeError(f"{self.name} has no {where}.{entry}: {error}") from error


def unavailable() -> str | None:
    """Why genuine AITER cannot be loaded here, in a sentence; None if it can be tried."""
    (found,) = (row for row in device.unrelated_packages() if row.package == "aiter")
    if found.verdict != "genuine":
        return f"aiter: {found.found}; install AMD's: {found.install}"
    machine = device.current()
    if machine.backend != "rocm":
        return f"aiter: installed, but it needs an AMD GPU and torch sees {machine.name} ({machine.arch})"
    return None


@functools.cache
def load_aiter() -> Library:
    """Import genuine AITER and describe this machine's part of it.

    Raises:
        AiterUnavailableError: it is absent, unrelated, has no AMD GPU to run on, or fails to import.
    """
    reason = unavailable()
    if reason is not None:
        raise AiterUnavailableError(reason)
    try:
        module = importlib.import_module("aiter")
        importlib.import_module("aiter.mla")
    except Exception as error:  # AITER raises RuntimeError, and whatever its just-in-time build raises
        raise AiterUnavailableError(f"aiter: import failed with {type(error).__name__}: {error}") from error
    machine = device.current()
    return Library("AITER", module, machine.arch, machine.compute_units, emulated=False)
