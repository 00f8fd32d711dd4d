"""Follow every link of a built site that stays inside it: the file is there, and so is the place on it.

Sphinx checks what it resolves itself; raw HTML, links inside pictures and anchors of notebooks pass through it unread.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Addresses that lead out of the site, or nowhere by design; whether those still answer needs a network.
ELSEWHERE = frozenset({"http", "https", "mailto", "javascript", "data"})


def broken(site: Path) -> list[str]:
    """Check every ``<a href>`` of every page against the files and the anchors of the site.

    Args:
        site: built HTML folder.

    Returns:
        One line per link that leads to nothing, by page and line.

    Raises:
        ValueError: the folder has no index.html.
    """
    if not (site / "index.html").is_file():
        raise ValueError(f"site: {site} has no index.html, expected a built book")
    root = site.resolve()
    files = [file for file in sorted(root.rglob("*.html")) if "_static" not in file.relative_to(root).parts]
    pages = {file: _read(file) for file in files}  # the theme leaves templates in _static, no pages
    return [
        f"{file.relative_to(root).as_posix()}:{line}: link to {href}: {wrong}"
        for file, page in pages.items()
        for line, href in page.links
        if (wrong := _wrong(href, file, root, pages))
    ]


def _wrong(href: str, file: Path, root: Path, pages: dict[Path, _Page]) -> str:
    """Why a link leads to nothing, or nothing."""
    parts = urlsplit(href)
    if parts.scheme in ELSEWHERE or parts.netloc:
        return ""
    if parts.scheme:
        return f"the scheme {parts.scheme} leads nowhere from a folder"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_relative_to(root):
        return "leads out of the site"
    if not target.is_file():
        return "no such file in the site"
    anchor = unquote(parts.fragment)
    # "#" alone is the top of the page; what other files than pages hold is theirs to say.
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{target.name} has no {anchor}"
    return ""


def _read(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


class _Page(HTMLParser):
    """The links of one page with their lines, and the anchors that others may name."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[tuple[int, str]] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        # SVG's links are called the same, in an older name space if they were drawn by matplotlib.
        href = values.get("href", values.get("xlink:href"))
        if tag in ("a", "area") and href is not None:
            self.links.append((self.getpos()[0], href.strip()))
