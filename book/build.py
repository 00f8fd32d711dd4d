#!/usr/bin/env python
"""Build the book: executed notebooks plus the pages of this folder, as a static site that needs no network.

    python book/build.py [--notebooks DIR] [--out DIR] [--jobs N]

The site is OUT/html; OUT also keeps the cache of executed notebooks, so a second build only renders what changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK))

from bookkit import stage, vendor  # noqa: E402  (bookkit sits beside this script)

STOPPED = 2  # Sphinx's exit status after an exception; warnings give 1


def jobs_here() -> int:
    """How many notebooks run at a time: up to four, one per core; one where a GPU is, which some of them time."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else min(4, cores)


def build(notebooks: Path, out: Path, jobs: int = 1) -> int:
    """Vendor, stage, execute and render.

    Args:
        notebooks: folder of NN_id.ipynb files.
        out: output folder; OUT/html is the site.
        jobs: Sphinx processes; each may run a notebook of its own.

    Returns:
        Sphinx's exit status: 0 if every notebook ran and nothing was warned about.

    Raises:
        ValueError: the notebooks are not as expected.
        VendorError: the JavaScript is neither there nor to be had.
    """
    from jupyter_cache import get_cache
    from sphinx.cmd.build import main as sphinx_build

    fetched = vendor.ensure(vendor.read_table(BOOK / "vendor.json"), BOOK / "_static" / "vendor")
    if fetched:
        print("vendored:", ", ".join(fetched))
    folders = stage.package_folders()
    if records := os.environ.get("DSV4REF_RECORDS"):
        folders.append(Path(records))
    if stage.drop_stale(out, stage.fingerprint(folders)):
        print("the code or its environment changed since the last build: every notebook runs again")
    chapters = stage.stage(BOOK, notebooks, out / "source")
    stage.prune(out / "source", out / "html")
    print(f"{len(chapters)} chapters:", ", ".join(chapter.path.stem for chapter in chapters))
    # -W turns warnings into a failing status; --keep-going (implied since Sphinx 8.1) shows all of them first.
    options = ["-W", "--keep-going", "-b", "html", "-c", str(BOOK), "-d", str(out / "doctrees")]
    cache = out / ".jupyter_cache"
    assert get_cache(cache).db is not None  # makes it, once: processes that find none would each create its tables
    options += ["-D", f"nb_execution_cache_path={cache}"]
    places = [str(out / "source"), str(out / "html")]
    status = sphinx_build([*options, "-j", str(jobs), *places])
    if status == STOPPED and jobs > 1:
        print("a process that stops takes its messages along; once more in one process, for what it has to say:")
        sphinx_build([*options, "-j", "1", *places])
    return status


def main(arguments: list[str] | None = None) -> int:
    """Command line; bad input and missing tools are one line on stderr and status 2."""
    parser = argparse.ArgumentParser(description="Build the book.")
    parser.add_argument("--notebooks", type=Path, default=BOOK.parent / "notebooks", help="folder of NN_id.ipynb files")
    parser.add_argument("--out", type=Path, default=BOOK / "_build", help="output folder (OUT/html is the site)")
    parser.add_argument("--jobs", type=int, help="Sphinx processes (by default as many as cores, four at most)")
    options = parser.parse_args(arguments)
    jobs = jobs_here() if options.jobs is None else options.jobs
    try:
        status = build(options.notebooks.resolve(), options.out.resolve(), jobs)
    except (ValueError, vendor.VendorError) as error:
        print(f"book: {error}", file=sys.stderr)
        return 2
    if status == 0:
        print(f"book: {options.out.resolve() / 'html' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
