"""The built book works from a folder without network; a broken one is noticed."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import check_site
import nbformat
import pytest
from bookkit import browser, links, reader, scan, visit
from bookkit.vendor import VendorError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsv4ref import settings
from dsv4ref.optimizations import catalogue

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BOOK = Path(__file__).resolve().parents[2] / "book"
AUTHORED = frozenset(path.name for path in (BOOK / "_static").glob("*.js"))
START = [
    new_markdown_cell(
        "# Start with the walrus\n\nOn to [the chapter](05_sample.ipynb); see [H12](../book/hazards.md#h12)."
    ),
    new_code_cell("print(6 * 7)"),
]
SAMPLE = [
    new_markdown_cell(
        "# Sample chapter\n\nInline $x^2$, and\n\n$$\n\\sum_{i} e^{s_i}\n$$\n\n"
        "<details><summary>Solution</summary>\n\nA **folded** zebra, $y_1$.\n\n</details>"
    ),
    new_code_cell(
        "import ipywidgets as w\n"
        'square = \'<svg width="9" height="9" aria-label="a small square"></svg>\'\n'
        "w.VBox([w.IntSlider(description='rows', value=4, max=9), w.HTML(square)])"
    ),
    new_code_cell(
        "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(4, 2.5))\nax.plot([1, 2, 4]);",
        metadata={"mystnb": {"image": {"alt": "a curve that rises"}}},
    ),
    new_code_cell(
        "from dsv4ref.show import panels\n\n"
        "panels.frames(lambda rows: panels.bars({'time': rows}, title='Time', unit='us'), 'rows', [1, 2, 4])"
    ),
    new_code_cell(
        "import os\n\nif path := os.environ.get('BOOK_TEST_RUNS'):\n"
        "    with open(path, 'a') as runs:\n        runs.write('x')"
    ),
]


def write(folder: Path, name: str, cells: list[NotebookNode]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / name)


# A build as if the package never changed: somebody may be editing it while the tests run.
FROZEN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import build
from bookkit import stage
stage.package_folders = list
sys.exit(build.main(sys.argv[1:]))
"""


def build(notebooks: Path, out: Path, frozen: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    script = ["-c", FROZEN, str(BOOK)] if frozen else [str(BOOK / "build.py")]
    command = [sys.executable, *script, "--notebooks", str(notebooks), "--out", str(out)]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book around two small notebooks: the output folder of the build."""
    folder = tmp_path_factory.mktemp("book")
    write(folder / "notebooks", "00_start_here.ipynb", START)
    write(folder / "notebooks", "05_sample.ipynb", SAMPLE)
    done = build(folder / "notebooks", folder / "out", frozen=True, BOOK_TEST_RUNS=str(folder / "runs"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "out"


@pytest.fixture(scope="session")
def site(built: Path) -> Path:
    return built / "html"


@pytest.fixture
def damaged(site: Path, tmp_path: Path) -> Path:
    """A copy of the site to break."""
    return Path(shutil.copytree(site, tmp_path / "html"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as opened:
        yield opened


def look(chromium: Browser, page: Path, theme: str = "light") -> list[str]:
    problems: list[str] = []
    with browser.opened(chromium, theme, page.name, problems) as tab:
        browser.look(tab, page, theme, page.name, problems)
    return problems


def test_sidebar_lists_chapters_by_part_between_front_and_reference(site: Path) -> None:
    html = (site / "index.html").read_text(encoding="utf-8")
    sidebar = html[html.index("bd-links") : html.index("</nav>", html.index("bd-links"))]
    items = [" ".join(text.split()) for text in re.findall(r">([^<>]*\w[^<>]*)<", sidebar)]
    front = items.index("Before you start")
    assert items[front:][4:9] == [
        "Start here",
        "Start with the walrus",
        "Part II: sparse MLA decode",
        "Sample chapter",
        "Reference",
    ]


def test_every_page_of_the_book_is_built(site: Path) -> None:
    for page in BOOK.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page.name


def test_notebook_keeps_its_details_links_and_outputs(site: Path) -> None:
    start = (site / "chapters" / "00_start_here.html").read_text(encoding="utf-8")
    assert 'href="05_sample.html"' in start
    assert 'href="../hazards.html#h12"' in start
    assert ">42\n<" in start
    sample = (site / "chapters" / "05_sample.html").read_text(encoding="utf-8")
    assert re.search(r"<details>\s*<summary>Solution</summary>.*<strong>folded</strong>.*</details>", sample, re.DOTALL)


def test_generated_pages_hold_what_the_package_says(site: Path) -> None:
    environment = (site / "environment.html").read_text(encoding="utf-8")
    missing = [name for name in settings.ENV if f'id="{name.lower().replace("_", "-")}"' not in environment]
    assert missing == []
    hazards = (site / "hazards.html").read_text(encoding="utf-8")
    assert [number for number in range(1, 43) if f'id="h{number:02}"' not in hazards] == []
    scoreboard = (site / "scoreboard.html").read_text(encoding="utf-8")
    for ident, chapter in catalogue.load().items():
        if any(hazard.ids for hazard in chapter.hazards.values()):
            assert f"{chapter.number:02} {ident}" in hazards, f"the index does not say that {ident} plants a hazard"
        for claim in chapter.claims:
            assert f"{claim.before:g} → {claim.after:g}" in scoreboard, f"{ident}: {claim.what}"
        assert f">{ident}<" in scoreboard, f"{ident} is neither among the measured nor the unmeasured chapters"
    status = (site / "status.html").read_text(encoding="utf-8")
    assert re.search(r"Built.*\d{4}-\d\d-\d\d \d\d:\d\d UTC.*Notebooks executed.*2.*Triton", status, re.DOTALL)


def test_every_chapter_stands_in_the_reading_paths_and_on_the_picture(site: Path) -> None:
    preface = (site / "preface.html").read_text(encoding="utf-8")
    front = (site / "index.html").read_text(encoding="utf-8")
    picture = front[front.index("step-picture") :]
    for chapter in catalogue.load().values():
        assert f"{chapter.number:02} {html.escape(chapter.title)}" in preface, chapter.id
        assert f">{chapter.number:02}</text>" in picture, chapter.id


def test_built_site_loads_nothing_from_elsewhere(site: Path) -> None:
    assert [str(finding) for finding in scan.scan(site, AUTHORED)] == []


def test_every_link_and_anchor_of_the_book_leads_somewhere(site: Path) -> None:
    assert links.broken(site) == []


def test_second_build_runs_no_notebook_again_and_a_changed_environment_does(built: Path) -> None:
    runs = built.parent / "runs"
    assert runs.read_text() == "x"
    notebooks = built.parent / "notebooks"
    write(notebooks, "05_sample.ipynb", [*SAMPLE, new_markdown_cell("An afterthought about a pangolin.")])
    done = build(notebooks, built, frozen=True, BOOK_TEST_RUNS=str(runs))
    assert done.returncode == 0, done.stderr[-4000:]
    assert runs.read_text() == "x"
    assert "pangolin" in (built / "html" / "chapters" / "05_sample.html").read_text(encoding="utf-8")
    done = build(notebooks, built, frozen=True, BOOK_TEST_RUNS=str(runs), DSV4REF_SEED="7")
    assert done.returncode == 0, done.stderr[-4000:]
    assert runs.read_text() == "xx"


def test_notebook_that_raises_fails_the_build_with_its_traceback(tmp_path: Path) -> None:
    write(tmp_path / "nb", "05_sample.ipynb", [new_markdown_cell("# Sample"), new_code_cell("1 / 0")])
    done = build(tmp_path / "nb", tmp_path / "out")
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "05_sample.ipynb" in done.stderr


def test_dead_link_fails_the_build(tmp_path: Path) -> None:
    write(tmp_path / "nb", "05_sample.ipynb", [new_markdown_cell("# Sample\n\n[gone](06_gone.ipynb)")])
    done = build(tmp_path / "nb", tmp_path / "out")
    assert done.returncode == 1
    assert "06_gone.ipynb" in done.stderr


def test_misnamed_notebook_is_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path / "nb", "sample.ipynb", SAMPLE)
    done = build(tmp_path / "nb", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip() == "book: notebook sample.ipynb: expected a name like 05_decode_launch_shape.ipynb"


@pytest.mark.browser
def test_site_works_offline_in_a_browser(site: Path, chromium: Browser) -> None:
    """Sliders, formulas, figures, copy buttons, download, search, both themes, a phone; nothing is asked for."""
    assert visit.check_site(site, chromium) == []
    problems, figures = visit.limits(site, chromium)
    assert problems == [], figures
    sample = (site / "chapters" / "05_sample.html").read_text(encoding="utf-8")
    for promised in ("IntSliderModel", 'class="math', "<img ", "widget-view+json", "dsv4-frames", "aria-label"):
        assert promised in sample, f"the sample page holds no {promised}, so the check above saw none"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("_static/vendor/mathjax/es5/tex-svg.js", r"0 of 3 formulas are drawn"),
        ("_static/vendor/@jupyter-widgets/html-manager/dist/embed-amd.js", r"0 of 1 widget views are rendered"),
        ("_static/vendor/requirejs/require.js", r"0 of 1 widget views are rendered"),
        ("_static/copybutton.js", r"0 of \d code blocks have a copy button"),
        ("_images/*.png", r"image \S+png is not shown"),
    ],
)
def test_missing_piece_is_noticed(
    damaged: Path, chromium: Browser, monkeypatch: pytest.MonkeyPatch, broken: str, problem: str
) -> None:
    monkeypatch.setattr(browser, "TIMEOUT_MS", 4000)
    (found,) = damaged.glob(broken)
    found.unlink()
    problems = look(chromium, damaged / "chapters" / "05_sample.html")
    assert any(re.search(problem, line) for line in problems), problems
    assert any("could not load" in line for line in problems), problems


@pytest.mark.browser
@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ("<script>console.error('boom')</script>", r"console: boom"),
        ("<script>throw new Error('bang')</script>", r"script error: .*bang"),
        ("<script>fetch('https://elsewhere' + '.example/x').catch(() => {})</script>", r"asked for https://elsewhere"),
        ("<style>main p { color: #888 !important; background: #fff }</style>", r"contrast 3\.5 < 4\.5"),
        (
            "<script>document.documentElement.dataset.mode = 'dark'</script>",
            r"theme 'dark'",
        ),
        ("<div class='math notranslate'>\\(\\undefinedmacro\\)</div>", r"shows an error: "),
        (
            "<div><svg aria-label='a word'><text y='9' style='fill: #999'>Fog</text></svg></div>",
            r"2\.8 < 4\.5 at 'Fog'",
        ),
        ("<div><svg width='9' height='9'><path d='M0 0'/></svg></div>", r"a picture without a description: <svg"),
        ("<div><img src='../_static/file.png' alt='../_static/file.png'></div>", r"without a description: <img"),
    ],
)
def test_page_that_misbehaves_is_noticed(
    damaged: Path, chromium: Browser, monkeypatch: pytest.MonkeyPatch, planted: str, problem: str
) -> None:
    monkeypatch.setattr(browser, "TIMEOUT_MS", 20_000)
    page = damaged / "chapters" / "05_sample.html"
    html = page.read_text(encoding="utf-8")
    place = "</article>" if planted.startswith("<div") else "</head>"  # formulas stand in the text
    page.write_text(html.replace(place, planted + place, 1), encoding="utf-8")
    problems = look(chromium, page)
    assert any(re.search(problem, line) for line in problems), problems


@pytest.mark.browser
@pytest.mark.parametrize(
    ("piece", "instead", "problem"),
    [
        ("d.hidden=i!==Number(s.value)", "d.hidden=i!==0", r"the arrow key takes frames panel 0 from 'rows = 1' to"),
        ("</head>", "<script>addEventListener('keydown', e => e.stopPropagation(), true)</script></head>", r"slider 0"),
        ("</head>", "<script>document.execCommand = () => true</script></head>", r"the copy button takes ''"),
    ],
)
def test_control_that_does_nothing_is_noticed(
    damaged: Path, chromium: Browser, piece: str, instead: str, problem: str
) -> None:
    page = damaged / "chapters" / "05_sample.html"
    html = page.read_text(encoding="utf-8")
    assert piece in html
    page.write_text(html.replace(piece, instead), encoding="utf-8")
    problems: list[str] = []
    with browser.opened(chromium, "light", page.name, problems) as tab:
        browser.look(tab, page, "light", page.name, problems)
        problems += reader.move_sliders(tab, page.name) + reader.copy_code(tab, page.name)
    assert any(re.search(problem, line) for line in problems), problems


@pytest.mark.browser
@pytest.mark.parametrize(
    ("piece", "instead", "problem"),
    [
        ("return up ? compareKeys(a, b) : compareKeys(b, a);", "return 0;", r"keeps the order"),
        ("a.number - b.number", "b.number - a.number", r"has the order"),
        ("body.append(", "body.replaceChildren(keyed[0][1]); [].concat(", r"changes the rows"),
        ('up ? "ascending" : "descending"', '"ascending"', r"sorts ascending, expected descending"),
        ("head.replaceChildren(button);", "", r"0 headings of a sortable table can be pressed"),
    ],
)
def test_table_that_does_not_sort_is_noticed(
    damaged: Path, chromium: Browser, piece: str, instead: str, problem: str
) -> None:
    script = damaged / "_static" / "sort.js"
    text = script.read_text(encoding="utf-8")
    assert piece in text
    script.write_text(text.replace(piece, instead), encoding="utf-8")
    problems: list[str] = []
    with browser.opened(chromium, "light", "board", problems) as tab:
        browser.look(tab, damaged / "scoreboard.html", "light", "board", problems)
        problems += reader.sort_tables(tab, "board")
    assert any(re.search(problem, line) for line in problems), problems


@pytest.mark.browser
def test_page_wider_than_a_phone_is_noticed(damaged: Path, chromium: Browser) -> None:
    page = damaged / "chapters" / "05_sample.html"
    assert reader.hold_in_phone(chromium, page, "sample") == []
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</article>", "<p style='width: 500px'>A plank.</p></article>", 1), encoding="utf-8")
    assert reader.hold_in_phone(chromium, page, "sample") == ["sample: wider than a phone: <p> A plank."]


@pytest.mark.browser
def test_figures_of_a_site_are_held_to_their_limits(
    site: Path, chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SITE_BYTES", 1000)
    monkeypatch.setattr(reader, "FIRST_PAGE_MS", 0)
    problems, _ = visit.limits(site, chromium)
    assert [re.sub(r"\d[\d.]*", "N", line) for line in problems] == [
        "the site has N MB, expected below N",
        "index.html can be read after N ms, expected below N",
    ]


@pytest.fixture(scope="session")
def axe() -> str:
    try:
        return check_site.axe()
    except VendorError as error:
        pytest.skip(f"needs axe-core: {error}")


@pytest.mark.browser
def test_audit_is_clean_and_finds_a_field_without_a_name(damaged: Path, chromium: Browser, axe: str) -> None:
    """axe itself is somebody else's; this shows that it runs here and that its findings reach the report."""
    assert visit.audit(damaged, chromium, axe) == []
    page = damaged / "chapters" / "00_start_here.html"
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</article>", "<input type='text'></article>", 1), encoding="utf-8")
    problems = visit.audit(damaged, chromium, axe)
    assert [line.split(", first")[0] for line in problems] == [
        f"chapters/00_start_here.html ({theme}): axe label, 1 times" for theme in ("light", "dark")
    ]


@pytest.mark.browser
def test_search_that_finds_nothing_is_noticed(site: Path, chromium: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = site / "chapters" / "00_start_here.html"
    assert browser.search(chromium, site, "walrus", chapter) == []
    monkeypatch.setattr(browser, "TIMEOUT_MS", 2000)
    (problem,) = browser.search(chromium, site, "rhinoceros", chapter)
    assert problem == "search.html?q=rhinoceros: 00_start_here.html is not among the 0 results"


@pytest.mark.browser
def test_command_line_reports_problems_and_fails(damaged: Path) -> None:
    page = damaged / "index.html"
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</body>", '<img src="https://elsewhere.example/x.png"></body>'), encoding="utf-8")
    kept = {"index.html", "search.html", "00_start_here.html"}
    for other in [path for path in damaged.rglob("*.html") if path.name not in kept]:
        other.unlink()  # fewer pages to open
    done = subprocess.run(
        [sys.executable, str(BOOK / "check_site.py"), str(damaged)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "index.html:" in done.stdout
    assert "https://elsewhere.example/x.png: outside address" in done.stdout
    assert "asked for https://elsewhere.example/x.png" in done.stdout
    assert "chapters/00_start_here.html (" not in done.stdout
    assert re.search(r"\d problems in .* MB, first page readable after \d+ ms", done.stdout)
    nothing = subprocess.run(
        [sys.executable, str(BOOK / "check_site.py"), str(damaged / "_static")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert nothing.returncode == 2
    assert "has no index.html, expected a built book" in nothing.stderr
