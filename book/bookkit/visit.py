"""Go through a built site page by page, as readers do, and collect what does not work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.search.en import SearchEnglish

from bookkit import browser, reader

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Text from end to end, or with everything that a chapter may hold.
AUDITED = ("index.html", "chapters/00_start_here.html", "chapters/05_decode_launch_shape.html")


def check_site(site: Path, chromium: Browser) -> list[str]:
    """Check every page of a site in both themes, by hand and in a phone's window; the downloads and the search.

    Args:
        site: built HTML folder.
        chromium: from :func:`bookkit.browser.chromium`.

    Returns:
        One line per problem; empty if the site works.

    Raises:
        ValueError: the site has no chapters.
    """
    pages = [page for page in sorted(site.glob("*.html")) if page.name not in ("search.html", "genindex.html")]
    chapters = sorted((site / "chapters").glob("*.html"))
    if not chapters:
        raise ValueError(f"site: {site} has no chapters/*.html, expected a book with at least one chapter")
    problems: list[str] = []
    titles: dict[Path, str] = {}
    for path in [*pages, *chapters]:
        where = path.relative_to(site).as_posix()
        for theme in ("light", "dark"):
            name = f"{where} ({theme})"
            with browser.opened(chromium, theme, name, problems) as page:
                titles[path] = browser.look(page, path, theme, name, problems)
                if theme == "light":  # colours aside, both themes do the same
                    for use in (reader.move_sliders, reader.sort_tables, reader.copy_code):
                        problems += use(page, name)
        problems += reader.hold_in_phone(chromium, path, f"{where} (phone)")
    for path in chapters:
        problems += _download(path, site)
        problems += browser.search(chromium, site, _longest_word(titles[path]), path)
    return problems


def audit(site: Path, chromium: Browser, axe: str) -> list[str]:
    """Hold the start pages and one full chapter against axe's rules, in both themes.

    Args:
        site: built HTML folder.
        chromium: from :func:`bookkit.browser.chromium`.
        axe: axe-core's script, as text.

    Returns:
        One line per rule that a page breaks seriously.
    """
    return [
        problem
        for where in AUDITED
        if (site / where).is_file()
        for theme in ("light", "dark")
        for problem in reader.audit(chromium, site / where, axe, theme, f"{where} ({theme})")
    ]


def limits(site: Path, chromium: Browser) -> tuple[list[str], str]:
    """Hold a site against its two figures: how large it may be, and how soon its first page can be read.

    Args:
        site: built HTML folder.
        chromium: from :func:`bookkit.browser.chromium`.

    Returns:
        One line per figure that is exceeded; and both figures, in words.
    """
    size, first = reader.site_bytes(site), reader.first_page_ms(chromium, site / "index.html")
    problems = []
    if size >= reader.SITE_BYTES:
        problems.append(f"the site has {size / 1e6:.1f} MB, expected below {reader.SITE_BYTES / 1e6:.0f}")
    if first >= reader.FIRST_PAGE_MS:
        problems.append(f"index.html can be read after {first:.0f} ms, expected below {reader.FIRST_PAGE_MS}")
    return problems, f"{size / 1e6:.1f} MB, first page readable after {first:.0f} ms"


def _download(path: Path, site: Path) -> list[str]:
    """The chapter's page links to its notebook, and the notebook is there."""
    name = path.relative_to(site).as_posix()
    links = re.findall(r'<a href="([^"]+\.ipynb)"[^>]*download', path.read_text(encoding="utf-8"), re.DOTALL)
    if not links:
        return [f"{name}: has no button that downloads the notebook"]
    target = (path.parent / links[0]).resolve()
    if not target.is_file() or "cells" not in json.loads(target.read_text(encoding="utf-8")):
        return [f"{name}: the download {links[0]} is not a notebook of the site"]
    return []


def _longest_word(title: str) -> str:
    """The longest word of a title that Sphinx's search index keeps."""
    words = [word for word in re.findall(r"[A-Za-z]+", title) if word.lower() not in SearchEnglish.stopwords]
    return max(words, key=len)
