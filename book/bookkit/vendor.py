"""Fetch the book's JavaScript from npm, pinned by hash, into one folder that the site is served from.

The table (``vendor.json``) names, per npm package: the version, the npm ``integrity`` (SHA-512) of its tarball, the
tarball members to keep, and the SHA-256 of what those members must look like on disk. A folder that already matches is
never fetched again, so a machine without network works once the folder has been copied there.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NPM_TIMEOUT_S = 300
STRIP = "package/"  # npm puts every member of a tarball under this folder


class VendorError(RuntimeError):
    """A pinned JavaScript package could not be fetched, or is not the pinned one."""


@dataclass(frozen=True)
class Package:
    """One row of the table.

    Args:
        name: npm package name.
        version: exact version.
        integrity: ``sha512-`` and the base64 digest of the tarball, as npm publishes it.
        folder: folder under the vendor folder that receives the files.
        take: glob patterns of tarball members to keep.
        contents: ``sha256-`` and the hex digest of the kept files, see :func:`contents_digest`.
    """

    name: str
    version: str
    integrity: str
    folder: str
    take: tuple[str, ...]
    contents: str

    @property
    def spec(self) -> str:
        """``name@version``, the way npm wants it."""
        return f"{self.name}@{self.version}"


Fetch = Callable[[Package, Path], Path]


def read_table(path: Path) -> tuple[Package, ...]:
    """Read the pinned packages.

    Args:
        path: the JSON table.

    Returns:
        The packages, in the table's order.

    Raises:
        ValueError: a row lacks a key, or a digest has the wrong form.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    packages = []
    for name, row in rows.items():
        missing = {"version", "integrity", "folder", "take", "contents"} - row.keys()
        if missing:
            raise ValueError(f"{path.name}: package {name!r} lacks {sorted(missing)}")
        for key, prefix in (("integrity", "sha512-"), ("contents", "sha256-")):
            if not row[key].startswith(prefix):
                raise ValueError(f"{path.name}: {name} {key} is {row[key]!r}, expected it to start with {prefix!r}")
        packages.append(
            Package(name, row["version"], row["integrity"], row["folder"], tuple(row["take"]), row["contents"])
        )
    return tuple(packages)


def contents_digest(folder: Path) -> str:
    """Digest of every file under a folder: SHA-256 of the sorted ``<sha256>  <path>`` lines (what sha256sum prints).

    Args:
        folder: folder to read; an absent one has the digest of no files.

    Returns:
        ``sha256-`` and the hex digest.
    """
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return "sha256-" + hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def npm_pack(package: Package, destination: Path) -> Path:
    """Download one tarball with ``npm pack`` (no script of the package runs).

    Args:
        package: what to fetch.
        destination: folder that receives the tarball.

    Returns:
        Path of the tarball.

    Raises:
        VendorError: npm is not installed, or it could not deliver the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise VendorError(f"{package.spec}: npm is not on PATH; {_PREFILL}")
    command = [npm, "pack", package.spec, "--ignore-scripts", "--json", "--pack-destination", str(destination)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise VendorError(f"{package.spec}: npm gave no answer within {NPM_TIMEOUT_S} s; {_PREFILL}") from error
    tarballs = sorted(destination.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VendorError(f"{package.spec}: npm pack failed ({reason}); {_PREFILL}")
    return tarballs[0]


def unpack(tarball: Path, package: Package, folder: Path) -> None:
    """Check a tarball against its pin and write the kept members.

    Args:
        tarball: npm tarball.
        package: its row in the table.
        folder: empty folder that receives the files.

    Raises:
        VendorError: the tarball (then nothing is written) or what it unpacks to is not what the table pins.
    """
    digest = hashlib.sha512(tarball.read_bytes()).digest()
    integrity = "sha512-" + base64.b64encode(digest).decode()
    if integrity != package.integrity:
        raise VendorError(f"{package.spec}: tarball refused, it has {integrity}, the table pins {package.integrity}")
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive.getmembers():
            if not any(fnmatch.fnmatchcase(member.name, pattern) for pattern in package.take):
                continue
            source = archive.extractfile(member)
            target = folder / member.name.removeprefix(STRIP)
            if source is None or not target.resolve().is_relative_to(folder.resolve()):
                raise VendorError(f"{package.spec}: member {member.name!r} is not a plain file inside the package")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())
    if (found := contents_digest(folder)) != package.contents:
        raise VendorError(
            f"{package.spec}: unpacked files refused, they have {found}, the table pins {package.contents}"
        )


def ensure(packages: Sequence[Package], vendor: Path, fetch: Fetch = npm_pack) -> list[str]:
    """Make the vendor folder hold exactly the pinned files.

    Args:
        packages: the table.
        vendor: folder that receives one folder per package.
        fetch: how to get a tarball; ``npm_pack`` unless a test says otherwise.

    Returns:
        ``name@version`` of every package that had to be fetched (absent, or not matching its pin).

    Raises:
        VendorError: a package could not be fetched, or came with another hash.
    """
    fetched = []
    for package in packages:
        target = vendor / package.folder
        if contents_digest(target) == package.contents:
            continue
        vendor.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=vendor, prefix=".fetch-") as work:
            tarball = fetch(package, Path(work))
            fresh = Path(work) / "files"
            fresh.mkdir()
            unpack(tarball, package, fresh)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)  # a scoped package lies one folder deeper
            os.replace(fresh, target)
        fetched.append(package.spec)
    return fetched


_PREFILL = "without npm or network, copy book/_static/vendor from a machine that has built the book"
