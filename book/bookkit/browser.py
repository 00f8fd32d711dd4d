"""Open a built site from ``file://`` in headless Chromium without network and look whether everything is there.

What a page must show is read off the page itself: its formulas, widget views, figures and code blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 60_000  # a loaded machine with two cores takes its time over three megabytes of widget code
LOCAL = ("file:", "data:", "blob:", "about:")
# Below this a text is hard to read (WCAG AA for body text).
MIN_CONTRAST = 4.5

PROBE = Path(__file__).with_name("probe.js")


class BrowserError(RuntimeError):
    """There is no browser to check with."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium: the one on PATH, else the one Playwright downloaded.

    Raises:
        BrowserError: neither is there, or Playwright itself is missing.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise BrowserError("playwright is not installed: pip install -e '.[test]'") from error
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            reason = error.message.strip().splitlines()[0]
            raise BrowserError(
                f"no usable Chromium ({reason}): install chromium or 'playwright install chromium'"
            ) from error
        try:
            yield browser
        finally:
            browser.close()


def look(page: Page, path: Path, theme: str, name: str, problems: list[str]) -> str:
    """Open one page and compare what it shows with what its HTML promises.

    Args:
        page: a browser page.
        path: the HTML file.
        theme: the colour scheme the browser asks for, light or dark.
        name: how to call the page in a problem.
        problems: list that receives one line per problem.

    Returns:
        The page's H1.
    """
    page.goto(path.as_uri(), wait_until="load", timeout=TIMEOUT_MS)
    settle(page)
    found: dict[str, Any] = page.evaluate("bookProbe.counts()")
    views = found["views"]
    if found["drawn"] < found["formulas"]:
        problems.append(f"{name}: {found['drawn']} of {found['formulas']} formulas are drawn")
    problems += [f"{name}: shows an error: {text!r}" for text in found["errors"]]
    problems += [f"{name}: image {source} is not shown" for source, width in found["images"] if not width]
    problems += [f"{name}: a picture without a description: {markup}" for markup in found["unnamed"]]
    if found["copy"] < found["blocks"]:
        problems.append(f"{name}: {found['copy']} of {found['blocks']} code blocks have a copy button")
    if found["widgets"] < views:
        problems.append(f"{name}: {found['widgets']} of {views} widget views are rendered")
    if views and "SliderModel" in path.read_text(encoding="utf-8") and not found["handles"]:
        problems.append(f"{name}: holds sliders, and none is visible")
    worst = page.evaluate("bookProbe.contrast()")
    if worst["ratio"] < MIN_CONTRAST:
        problems.append(f"{name}: contrast {worst['ratio']:.1f} < {MIN_CONTRAST} at {worst['text']!r}")
    shown = page.evaluate("document.documentElement.dataset.theme")
    if shown != theme:
        problems.append(f"{name}: the page is in theme {shown!r}")
    return str(found["title"])


def settle(page: Page) -> None:
    """Wait until an open page has drawn what it draws after loading, or has had its time."""
    _wait(page, "() => { const n = bookProbe.counts(); return n.widgets >= n.views && n.copy >= n.blocks; }")
    page.evaluate("bookProbe.settle()")


def search(browser: Browser, site: Path, word: str, expected: Path) -> list[str]:
    """Search for a word as a reader would and expect a page among the results.

    Args:
        browser: from :func:`chromium`.
        site: built HTML folder.
        word: what to type.
        expected: page that must be found.

    Returns:
        One line per problem.
    """
    problems: list[str] = []
    name = f"search.html?q={word}"
    with opened(browser, "light", name, problems) as page:
        page.goto((site / "search.html").as_uri() + f"?q={quote(word)}", wait_until="load", timeout=TIMEOUT_MS)
        target = f"#search-results a[href*={json.dumps(expected.name)}]"
        if not _wait(page, f"document.querySelector({json.dumps(target)}) !== null"):
            hits = page.locator("#search-results li").count()
            problems.append(f"{name}: {expected.name} is not among the {hits} results")
    return problems


@contextmanager
def opened(browser: Browser, theme: str, name: str, problems: list[str]) -> Iterator[Page]:
    """A page in a context of its own, without network; what goes wrong in it is added to the problems."""
    context = browser.new_context(offline=True, color_scheme="dark" if theme == "dark" else "light")
    context.add_init_script(path=PROBE)
    page = context.new_page()
    page.on("console", lambda m: problems.append(f"{name}: console: {m.text[:200]}") if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"{name}: script error: {str(error)[:200]}"))
    page.on("requestfailed", lambda request: problems.append(f"{name}: could not load {request.url[:200]}"))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(LOCAL) else problems.append(f"{name}: asked for {request.url[:200]}")
        ),
    )
    try:
        yield page
    finally:
        context.close()


def _wait(page: Page, condition: str) -> bool:
    """Whether a condition came true in time; what it means that it did not is for the caller to say."""
    from playwright.sync_api import TimeoutError as Timeout

    try:
        page.wait_for_function(condition, timeout=TIMEOUT_MS)
    except Timeout:
        return False
    return True
