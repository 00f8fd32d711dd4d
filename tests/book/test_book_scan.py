"""The scan finds every way a page can load something from elsewhere, and leaves links alone."""

from pathlib import Path

import pytest
from bookkit import scan

OUTSIDE = "https://elsewhere.example/x"


def site(folder: Path, body: str = "", files: dict[str, str] | None = None) -> Path:
    (folder / "index.html").write_text(f"<html><head></head><body>{body}</body></html>")
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    "body",
    [
        f'<script src="{OUTSIDE}"></script>',
        '<script src="//elsewhere.example/x"></script>',
        f'<link rel="stylesheet" href="{OUTSIDE}">',
        f'<link rel="preconnect" href="{OUTSIDE}">',
        f'<img src="{OUTSIDE}">',
        f'<img srcset="x.png 1x, {OUTSIDE} 2x">',
        f'<iframe src="{OUTSIDE}"></iframe>',
        f"<iframe srcdoc=\"&lt;img src='{OUTSIDE}'&gt;\"></iframe>",
        f'<object data="{OUTSIDE}"></object>',
        f'<svg><image href="{OUTSIDE}"/></svg>',
        f'<p style="background: url({OUTSIDE})">x</p>',
        f"<style>@import '{OUTSIDE}';</style>",
        f"<style>@font-face {{ src: url('{OUTSIDE}') }}</style>",
        f'<meta http-equiv="refresh" content="0; url={OUTSIDE}">',
        f'<script>const cdn = "{OUTSIDE}";</script>',
        '<script type="application/vnd.jupyter.widget-state+json">'
        f'{{"state": {{"a": {{"value": "<img src=\'{OUTSIDE}\'>"}}}}}}</script>',
    ],
)
def test_page_that_loads_an_outside_address_is_found(tmp_path: Path, body: str) -> None:
    site(tmp_path, body, {"x.png": ""})
    findings = scan.scan(tmp_path)
    assert [(finding.file, finding.line) for finding in findings] == [("index.html", 1)], findings
    assert findings[0].reason.startswith("outside address")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("_static/a.css", f"@import url('{OUTSIDE}');"),
        ("_static/a.css", f'@import "{OUTSIDE}";'),
        ("_static/a.css", "b { background: url(//elsewhere.example/x.png) }"),
        ("_static/lib.js", f'fetch("{OUTSIDE}")'),
        ("_static/lib.js", f"import('{OUTSIDE}')"),
        ("_static/lib.js", f'import x from "{OUTSIDE}"'),
        ("_static/lib.js", f'e=document.createElement("script");e.src="{OUTSIDE}"'),
        ("_static/lib.js", f'r.open("GET", "{OUTSIDE}")'),
        ("_static/own.js", f'const later = "{OUTSIDE}";'),
    ],
)
def test_file_that_loads_an_outside_address_is_found(tmp_path: Path, name: str, content: str) -> None:
    site(tmp_path, files={name: content})
    assert [finding.file for finding in scan.scan(tmp_path, frozenset({"own.js"}))] == [name]


def test_links_comments_and_data_addresses_are_no_loads(tmp_path: Path) -> None:
    body = f"""
    <a href="{OUTSIDE}">read on</a> <p>{OUTSIDE}</p>
    <link rel="canonical" href="{OUTSIDE}"> <img src="data:image/png;base64,AAAA"> <a href="#here">here</a>
    <script type="application/json">{{"source": "{OUTSIDE}"}}</script>
    <svg xmlns="http://www.w3.org/2000/svg"><use href="#mark"/></svg>
    """
    files = {
        "_static/a.css": f"/* from {OUTSIDE} */ b {{ color: red }}",
        "_static/lib.js": f'// see "{OUTSIDE}"\nlet a = "{OUTSIDE}"',
    }
    site(tmp_path, body, files)
    assert scan.scan(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [("gone.js", "no such file"), ("/gone.js", "absolute path"), ("../../gone.js", "leads out of the site")],
)
def test_address_that_cannot_work_from_a_folder_is_found(tmp_path: Path, url: str, reason: str) -> None:
    site(tmp_path, f'<script src="{url}"></script>')
    assert [finding.reason.startswith(reason) for finding in scan.scan(tmp_path)] == [True]


def test_relative_address_with_a_query_is_fine(tmp_path: Path) -> None:
    site(
        tmp_path,
        '<script src="_static/a.js?v=1"></script>',
        {"_static/a.js": "", "_static/a.css": "b{background:url(a.js#x)}"},
    )
    assert scan.scan(tmp_path) == []


def test_folder_that_is_no_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"site: .* has no index\.html"):
        scan.scan(tmp_path)
