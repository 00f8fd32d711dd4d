"""Vendoring: the pinned JavaScript is taken, everything else is refused."""

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from bookkit import vendor

Demo = tuple[vendor.Package, Path]
BOOK = Path(__file__).resolve().parents[2] / "book"


def tarball(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pin(path: Path, contents: str) -> vendor.Package:
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return vendor.Package("@scope/demo", "1.2.3", f"sha512-{digest}", "@scope/demo", ("package/a.js",), contents)


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    """A pinned package and its tarball; only a.js of it is kept."""
    packed = tarball(tmp_path / "demo.tgz", {"package/a.js": b"let a = 1;", "package/b.js": b"let b = 2;"})
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    (wanted / "a.js").write_bytes(b"let a = 1;")
    return pin(packed, vendor.contents_digest(wanted)), packed


def test_pinned_package_is_unpacked_once_and_only_what_the_table_takes(demo: Demo, tmp_path: Path) -> None:
    package, packed = demo
    folder = tmp_path / "vendor"
    assert vendor.ensure([package], folder, lambda *_: packed) == ["@scope/demo@1.2.3"]
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"a.js"}

    def never(*_: object) -> Path:
        pytest.fail("a folder that matches its pin was fetched again")

    assert vendor.ensure([package], folder, never) == []


def test_file_changed_on_disk_is_fetched_again(demo: Demo, tmp_path: Path) -> None:
    package, packed = demo
    folder = tmp_path / "vendor"
    vendor.ensure([package], folder, lambda *_: packed)
    changed = folder / "@scope" / "demo" / "a.js"
    changed.write_bytes(b"let a = 2;")
    assert vendor.ensure([package], folder, lambda *_: packed) == ["@scope/demo@1.2.3"]
    assert changed.read_bytes() == b"let a = 1;"


def test_tarball_with_another_hash_is_refused_and_leaves_the_folder_alone(demo: Demo, tmp_path: Path) -> None:
    package, _ = demo
    other = tarball(tmp_path / "other.tgz", {"package/a.js": b"let a = 1;", "package/evil.js": b""})
    folder = tmp_path / "vendor"
    old = folder / "@scope" / "demo" / "old.js"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    with pytest.raises(vendor.VendorError, match=r"@scope/demo@1\.2\.3: tarball refused.*pins sha512-"):
        vendor.ensure([package], folder, lambda *_: other)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["old.js"]


def test_unpacked_files_that_differ_from_the_pin_are_refused(demo: Demo, tmp_path: Path) -> None:
    _, packed = demo
    wrong = pin(packed, "sha256-" + "0" * 64)
    with pytest.raises(vendor.VendorError, match=r"unpacked files refused, they have sha256-[0-9a-f]{64}"):
        vendor.ensure([wrong], tmp_path / "vendor", lambda *_: packed)


def test_member_outside_the_package_is_refused(tmp_path: Path) -> None:
    packed = tarball(tmp_path / "evil.tgz", {"package/../../a.js": b"x"})
    package = vendor.Package("evil", "1.0.0", pin(packed, "sha256-").integrity, "evil", ("package/*",), "sha256-")
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(vendor.VendorError, match="not a plain file inside the package"):
        vendor.unpack(packed, package, folder)
    assert not (tmp_path / "a.js").exists()


def test_without_npm_the_error_names_the_package_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = vendor.read_table(BOOK / "vendor.json")[0]
    with pytest.raises(vendor.VendorError, match=r"requirejs@2\.\S+: npm is not on PATH; .*book/_static/vendor"):
        vendor.ensure([package], tmp_path / "vendor")


def test_npm_that_fails_is_reported_with_its_last_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network request failed' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    package = vendor.read_table(BOOK / "vendor.json")[0]
    with pytest.raises(vendor.VendorError, match=r"npm pack failed \(npm error network request failed\)"):
        vendor.ensure([package], tmp_path / "vendor")


def test_table_pins_every_package_by_exact_version_and_both_hashes() -> None:
    packages = {package.name: package for package in vendor.read_table(BOOK / "vendor.json")}
    assert packages.keys() == {"requirejs", "@jupyter-widgets/html-manager", "mathjax"}
    for package in packages.values():
        assert package.version.count(".") == 2, package
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"))) == 64, package
        assert len(bytes.fromhex(package.contents.removeprefix("sha256-"))) == 32, package


def test_table_row_without_a_hash_is_an_error(tmp_path: Path) -> None:
    table = tmp_path / "vendor.json"
    table.write_text('{"demo": {"version": "1.0.0", "integrity": "sha512-", "folder": "demo", "take": []}}')
    with pytest.raises(ValueError, match=r"vendor\.json: package 'demo' lacks \['contents'\]"):
        vendor.read_table(table)
