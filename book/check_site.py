#!/usr/bin/env python
"""Check a built book: nothing is loaded from elsewhere, and every page works in a browser without network.

    python book/check_site.py [SITE]

SITE is the folder with index.html, by default book/_build/html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK))

from bookkit import browser, scan  # noqa: E402  (bookkit sits beside this script)

AUTHORED = frozenset(path.name for path in (BOOK / "_static").glob("*.js"))


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 if the site works, 1 with one line per problem, 2 if it cannot be checked."""
    parser = argparse.ArgumentParser(description="Check a built book offline.")
    parser.add_argument("site", type=Path, nargs="?", default=BOOK / "_build" / "html", help="folder with index.html")
    site = parser.parse_args(arguments).site.resolve()
    try:
        problems = [str(finding) for finding in scan.scan(site, AUTHORED)]
        with browser.chromium() as chromium:
            problems += browser.check_site(site, chromium)
    except (ValueError, browser.BrowserError) as error:
        print(f"check_site: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"check_site: {len(problems)} problems in {site}" if problems else f"check_site: {site} works offline")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
