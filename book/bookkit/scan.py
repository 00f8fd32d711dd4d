"""Find everything in a built site that a page would load from somewhere else, or that is not there to be loaded.

Links that a reader clicks may lead anywhere. What a page loads by itself (scripts, styles, images, fonts, frames) must
be a relative path to a file of the site, or the site does not work from ``file://`` without network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser load something, by tag; "*" is any tag.
LOADING = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "frame": ("src",),
    "embed": ("src",),
    "audio": ("src",),
    "video": ("src", "poster"),
    "track": ("src",),
    "input": ("src",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "feimage": ("href", "xlink:href"),
    "*": ("background",),
}
# <link rel=...> that names a page instead of loading a file.
PASSIVE_LINKS = frozenset(
    {"author", "canonical", "alternate", "help", "index", "license", "next", "prev", "search", "top"}
)
HARMLESS_SCHEMES = frozenset({"data", "blob", "about", "javascript"})
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
SCRIPT_TYPES = frozenset({"", "text/javascript", "application/javascript", "module"})

CSS_URL = re.compile(r"""url\(\s*(['"]?)(.*?)\1\s*\)|@import\s+(['"])(.*?)\3""", re.IGNORECASE | re.DOTALL)
CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
OUTSIDE = r"""(?:https?:|wss?:)?//"""
# A call or an assignment that loads an address which stands right there.
JS_LOAD = re.compile(
    r"""(?:\b(?:import|importScripts|fetch|require|requirejs|getScript|sendBeacon|Worker|SharedWorker|WebSocket|EventSource"""
    r"""|FontFace)\s*\(\s*|\bimport\s+(?:[\w*{}\s,]+\bfrom\s+)?|\bfrom\s+|\.(?:src|href)\s*=\s*|\.open\(\s*["']\w+["']\s*,\s*)"""
    rf"""["'`](?P<url>{OUTSIDE}[^"'`\s]+)"""
)
# In scripts written for this book there is no reason to name an outside address at all.
JS_STRING = re.compile(rf"""["'`](?P<url>{OUTSIDE}[^"'`\s]+)""")


@dataclass(frozen=True)
class Finding:
    """Something a page loads that it should not.

    Args:
        file: the file of the site, relative to it.
        line: line in that file, 0 if not known.
        url: what would be loaded.
        reason: what is wrong with it.
    """

    file: str
    line: int
    url: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.url[:160]}: {self.reason}"


def scan(site: Path, authored: frozenset[str] = frozenset()) -> list[Finding]:
    """Scan every page, style sheet and script of a site.

    Args:
        site: built HTML folder.
        authored: names of scripts under ``_static`` that belong to the book; in them, as in every inline script, any
            outside address counts. In library code only addresses that are loaded on the spot do; what it may load
            later shows when the browser check opens the pages.

    Returns:
        What was found, by file.

    Raises:
        ValueError: the folder has no index.html.
    """
    if not (site / "index.html").is_file():
        raise ValueError(f"site: {site} has no index.html, expected a built book")
    findings: list[Finding] = []
    for file in sorted(site.rglob("*")):
        name = file.relative_to(site).as_posix()
        if file.suffix == ".html" and not name.startswith("_static/"):  # the theme leaves templates there, no pages
            page = _Page()
            page.feed(file.read_text(encoding="utf-8"))
            findings += [Finding(name, line, url, why) for line, url in page.loads if (why := _wrong(url, file, site))]
            findings += [Finding(name, line, url, "outside address in an inline script") for line, url in page.scripted]
        elif file.suffix == ".css":
            text = file.read_text(encoding="utf-8")
            findings += [Finding(name, 0, url, why) for url in css_loads(text) if (why := _wrong(url, file, site))]
        elif file.suffix in (".js", ".mjs"):
            pattern = JS_STRING if name.removeprefix("_static/") in authored else JS_LOAD
            text = file.read_text(encoding="utf-8", errors="replace")
            findings += [
                Finding(
                    name, text.count("\n", 0, match.start()) + 1, match["url"], "outside address that a script loads"
                )
                for match in pattern.finditer(text)
            ]
    return findings


def css_loads(text: str) -> Iterator[str]:
    """Addresses that a style sheet loads: ``url(...)`` and ``@import``."""
    for match in CSS_URL.finditer(CSS_COMMENT.sub("", text)):
        yield (match[2] or match[4] or "").strip()


def _wrong(url: str, file: Path, site: Path) -> str:
    """Why a page must not load this address, or nothing."""
    parts = urlsplit(url)
    if parts.scheme in HARMLESS_SCHEMES or (not parts.scheme and not parts.netloc and not parts.path):
        return ""
    if parts.scheme or parts.netloc:
        return "outside address"
    if parts.path.startswith("/"):
        return "absolute path: it names another file when the site is opened from a folder"
    target = (file.parent / unquote(parts.path)).resolve()
    if not target.is_relative_to(site.resolve()):
        return "leads out of the site"
    return "" if target.is_file() else "no such file in the site"


class _Page(HTMLParser):
    """Collects what one page loads."""

    def __init__(self, line: int = 0) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[tuple[int, str]] = []
        self.scripted: list[tuple[int, str]] = []
        self._base = line
        self._inside = ""
        self._type = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        line = self._line()
        for name in (*LOADING.get(tag, ()), *LOADING["*"]):
            if name in values:
                urls = _srcset(values[name]) if name == "srcset" else [values[name].strip()]
                self.loads += [(line, url) for url in urls if url]
        if tag == "link" and not set(values.get("rel", "").lower().split()) & PASSIVE_LINKS:
            self.loads.append((line, values.get("href", "")))
        if (
            tag == "meta"
            and values.get("http-equiv", "").lower() == "refresh"
            and "url=" in values.get("content", "").lower()
        ):
            self.loads.append((line, re.split("url=", values["content"], flags=re.IGNORECASE)[1].strip("'\" ")))
        if "style" in values:
            self.loads += [(line, url) for url in css_loads(values["style"])]
        if "srcdoc" in values:
            self._nested(values["srcdoc"])
        if tag in ("script", "style"):
            self._inside, self._type = tag, values.get("type", "").lower()

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        line = self._line()
        if self._inside == "style":
            self.loads += [(line, url) for url in css_loads(data)]
        elif self._inside == "script" and self._type in SCRIPT_TYPES:
            self.scripted += [(line, match["url"]) for match in JS_STRING.finditer(data)]
        elif self._inside == "script" and self._type == WIDGET_STATE:
            # HTML widgets carry their markup in the state; it becomes part of the page.
            for markup in _strings(json.loads(data)):
                if "<" in markup:
                    self._nested(markup)

    def _nested(self, markup: str) -> None:
        page = _Page(self._line())
        page.feed(markup)
        self.loads += page.loads
        self.scripted += page.scripted

    def _line(self) -> int:
        return self._base or self.getpos()[0]


def _srcset(value: str) -> list[str]:
    # Candidates are separated by a comma and white space; a comma inside a data: address has none after it.
    return [candidate.split()[0] for candidate in re.split(r",\s+", value.strip()) if candidate.split()]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
