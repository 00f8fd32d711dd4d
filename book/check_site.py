#!/usr/bin/env python
"""Check a built book: nothing comes from elsewhere, no link is dead, and every page works in a browser without network.

    python book/check_site.py [--audit] [SITE]

SITE is the folder with index.html, by default book/_build/html. The accessibility audit needs axe-core, which is
fetched with npm once and pinned by hash; without network that part is left out, and said to be, unless --audit asks
for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK))

from bookkit import browser, links, scan, vendor, visit  # noqa: E402  (bookkit sits beside this script)

AUTHORED = frozenset(path.name for path in (BOOK / "_static").glob("*.js"))
TOOLS = BOOK / "_tools"  # not _static: what only checks the site is no part of it


def axe() -> str:
    """axe-core's script.

    Raises:
        VendorError: it is neither there nor to be had.
    """
    vendor.ensure(vendor.read_table(BOOK / "audit.json"), TOOLS)
    return (TOOLS / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 if the site works, 1 with one line per problem, 2 if it cannot be checked."""
    parser = argparse.ArgumentParser(description="Check a built book offline.")
    parser.add_argument("site", type=Path, nargs="?", default=BOOK / "_build" / "html", help="folder with index.html")
    parser.add_argument("--audit", action="store_true", help="fail if the accessibility audit cannot run")
    options = parser.parse_args(arguments)
    site = options.site.resolve()
    try:
        problems = [str(finding) for finding in scan.scan(site, AUTHORED)] + links.broken(site)
        with browser.chromium() as chromium:
            exceeded, figures = visit.limits(site, chromium)
            problems += exceeded + visit.check_site(site, chromium)
            try:
                problems += visit.audit(site, chromium, axe())
            except vendor.VendorError as error:
                if options.audit:
                    raise
                print(f"check_site: accessibility was not audited ({error})")
    except (ValueError, browser.BrowserError, vendor.VendorError) as error:
        print(f"check_site: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(
        f"check_site: {len(problems)} problems in {site}" if problems else f"check_site: {site} works offline", end=""
    )
    print(f" ({figures})")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
