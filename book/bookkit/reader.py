"""Use a built page as readers do: move its sliders by keyboard, sort, copy code, hold it in a phone, have it read out.

Looking at a page is :mod:`bookkit.browser`'s; here something is done to it, and what follows is compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bookkit import browser as windows

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE_WIDTH, PHONE_HEIGHT = 390, 844
# From the click to a page that can be read: its text is there, laid out and painted.
FIRST_PAGE_MS = 2000
SITE_BYTES = 40 * 10**6
# axe's two upper levels; what it calls moderate or minor is advice.
SERIOUS = ("serious", "critical")

# One column of a table, by the button in its heading.
COLUMN = """button => {
  const head = button.closest("th"), rows = [...head.closest("table").tBodies[0].rows];
  return { sort: head.getAttribute("aria-sort"), texts: rows.map(row => row.cells[head.cellIndex].textContent.trim()) };
}"""

# The text that a click on a copy button takes along, read where the browser hands it over.
COPIED = """() => document.addEventListener("copy", () => {
  const from = document.activeElement;
  window.bookCopied = "value" in from ? from.value : String(getSelection());
})"""


def move_sliders(page: Page, name: str) -> list[str]:
    """Move every slider of an open page by one step, by keyboard: its value changes, and so does what it shows.

    Args:
        page: a page that :func:`bookkit.browser.look` has found complete.
        name: how to call the page in a problem.

    Returns:
        One line per slider that does not move.
    """
    problems = []
    for at, slider in enumerate(page.locator('.dsv4-frames input[type="range"]').all()):
        before = page.evaluate("bookProbe.frames()")
        slider.press("ArrowRight")
        after = page.evaluate("bookProbe.frames()")
        if after[at] == before[at] or "|" in after[at]:
            problems.append(f"{name}: the arrow key takes frames panel {at} from {before[at]!r} to {after[at]!r}")
    for at, handle in enumerate(page.locator(".noUi-handle:visible").all()):
        before = handle.get_attribute("aria-valuetext")
        for key in ("ArrowRight", "ArrowLeft"):  # one of them moves it, wherever it stands
            if handle.get_attribute("aria-valuetext") == before:
                handle.press(key)
        if handle.get_attribute("aria-valuetext") == before:
            problems.append(f"{name}: no arrow key moves slider {at} from {before!r}")
    return problems


def sort_tables(page: Page, name: str) -> list[str]:
    """Press every heading of an open page's sortable tables, twice: the rows stay, their order follows the heading.

    Args, returns: as :func:`move_sliders`; a page without such tables has no problem.
    """
    problems = []
    for table in page.locator(".sortable table").all():
        rows = sorted(table.locator("tbody tr").all_inner_texts())
        buttons = table.locator("th button").all()
        if len(buttons) != table.locator("th").count():
            problems.append(f"{name}: {len(buttons)} headings of a sortable table can be pressed")
        for button in buttons:
            turns = []
            for direction in ("ascending", "descending"):
                button.press("Enter")
                cells = page.evaluate(COLUMN, button.element_handle())
                known = [text for text in cells["texts"] if text != "–"]
                turns.append(known)
                if cells["sort"] != direction:
                    problems.append(f"{name}: {button.inner_text()!r} sorts {cells['sort']}, expected {direction}")
                if sorted(table.locator("tbody tr").all_inner_texts()) != rows:
                    problems.append(f"{name}: {button.inner_text()!r} changes the rows, not only their order")
            if len(set(turns[0])) > 1 and turns[0] == turns[1]:
                problems.append(f"{name}: {button.inner_text()!r} keeps the order {turns[0][:3]}")
            numbers = [float(text.strip("×")) for text in turns[0] if re.fullmatch(r"-?[\d.]+×?", text)]
            if numbers != sorted(numbers):
                problems.append(f"{name}: {button.inner_text()!r} has the order {numbers[:5]}")
    return problems


def copy_code(page: Page, name: str) -> list[str]:
    """Press the first copy button of an open page and compare what is taken along with the listing.

    Args, returns: as :func:`move_sliders`; a page without code has no problem.
    """
    button = page.locator("article div.highlight:visible button.copybtn").first
    if not button.count():
        return []
    page.evaluate(COPIED)
    listing = page.locator("article div.highlight:visible:has(button.copybtn) pre").first.inner_text()
    button.dispatch_event("click")  # it shows itself only under a pointer
    copied = str(page.evaluate("window.bookCopied || ''"))
    # Prompts stay behind, and so does what such a listing shows of a command's output.
    lines = {line.strip().removeprefix("$ ") for line in listing.splitlines()}
    strange = [line for line in copied.splitlines() if line.strip() not in lines]
    if not copied.strip() or strange:
        return [f"{name}: the copy button takes {copied[:60]!r}, expected the listing {listing[:60]!r}"]
    return []


def hold_in_phone(browser: Browser, path: Path, name: str) -> list[str]:
    """Open a page in a phone's window: nothing sticks out to the right.

    Args:
        browser: from :func:`bookkit.browser.chromium`.
        path: the HTML file.
        name: how to call the page in a problem.

    Returns:
        One line per element that is wider than the window and does not scroll by itself.
    """
    problems: list[str] = []
    with windows.opened(browser, "light", name, problems) as page:
        page.set_viewport_size({"width": PHONE_WIDTH, "height": PHONE_HEIGHT})
        page.goto(path.as_uri(), wait_until="load", timeout=windows.TIMEOUT_MS)
        windows.settle(page)
        found: dict[str, Any] = page.evaluate("bookProbe.overflow()")
    problems += [f"{name}: wider than a phone: {element}" for element in found["elements"]]
    if found["page"] > 0 and not found["elements"]:
        problems.append(f"{name}: the page is {found['page']} px wider than a phone's window")
    return problems


def first_page_ms(browser: Browser, path: Path, tries: int = 3) -> float:
    """Milliseconds until a page opened from disk can be read: parsed and painted; the best of several tries.

    Args:
        browser: from :func:`bookkit.browser.chromium`.
        path: the HTML file.
        tries: each in a context of its own, without a cache; another program may disturb one of them.
    """
    taken = []
    for _ in range(tries):
        with windows.opened(browser, "light", path.name, []) as page:
            page.goto(path.as_uri(), wait_until="load", timeout=windows.TIMEOUT_MS)
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            taken.append(
                page.evaluate(
                    "Math.max(performance.getEntriesByName('first-contentful-paint')[0].startTime,"
                    " performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd)"
                )
            )
    return float(min(taken))


def audit(browser: Browser, path: Path, axe: str, theme: str, name: str) -> list[str]:
    """Run axe-core on a page.

    Args:
        browser: from :func:`bookkit.browser.chromium`.
        path: the HTML file.
        axe: axe-core's script, as text.
        theme: light or dark.
        name: how to call the page in a problem.

    Returns:
        One line per rule that is broken seriously, with the first place.
    """
    problems: list[str] = []
    with windows.opened(browser, theme, name, problems) as page:
        page.goto(path.as_uri(), wait_until="load", timeout=windows.TIMEOUT_MS)
        windows.settle(page)
        page.evaluate(axe)  # it would preload style sheets, which a browser refuses on file://
        found = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
    for rule in found["violations"]:
        if rule["impact"] in SERIOUS:
            places = rule["nodes"]
            problems.append(f"{name}: axe {rule['id']}, {len(places)} times, first {places[0]['html'][:100]!r}")
    return problems


def site_bytes(site: Path) -> int:
    """Size of a built site: the files a reader carries away."""
    return sum(file.stat().st_size for file in site.rglob("*") if file.is_file())
