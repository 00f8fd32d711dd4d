"""Every link of a site is followed to its file and its anchor; what leads out of the site is left alone."""

import re
from pathlib import Path

import pytest
from bookkit import links


def site(folder: Path, body: str, **pages: str) -> Path:
    for name, content in {"index": body, **pages}.items():
        (folder / f"{name}.html").write_text(f"<html><body>\n{content}</body></html>")
    (folder / "chapters").mkdir()
    (folder / "chapters" / "one.html").write_text('<h2 id="the idea">x</h2><svg><a xlink:href="../index.html"/></svg>')
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize(
    "href",
    [
        "",
        "#",
        "#here",
        "other.html",
        "other.html#old",
        "chapters/one.html#the%20idea",
        "notes.txt",
        "https://elsewhere.example/x#y",
        "//elsewhere.example/x",
        "mailto:a@elsewhere.example",
    ],
)
def test_link_that_leads_somewhere_is_left_alone(tmp_path: Path, href: str) -> None:
    body = f'<p id="here"><a href="{href}">x</a></p>'
    assert links.broken(site(tmp_path, body, other='<a name="old"></a>')) == []


@pytest.mark.parametrize(
    ("href", "wrong"),
    [
        ("gone.html", "no such file in the site"),
        ("chapters/", "no such file in the site"),
        ("../x.html", "leads out of the site"),
        ("#gone", r"index\.html has no gone"),
        ("chapters/one.html#The-Idea", r"one\.html has no The-Idea"),
        ("file:///x/index.html", "the scheme file leads nowhere"),
    ],
)
def test_dead_link_is_named_with_page_and_line(tmp_path: Path, href: str, wrong: str) -> None:
    (problem,) = links.broken(site(tmp_path, f'<p>\n<a href="{href}">x</a></p>'))
    assert problem.startswith(f"index.html:3: link to {href}: "), problem
    assert re.search(wrong, problem), problem


def test_link_in_a_drawing_is_followed_too(tmp_path: Path) -> None:
    folder = site(tmp_path, "x")
    (folder / "chapters" / "one.html").write_text('<svg><a xlink:href="../gone.html"/></svg>')
    assert links.broken(folder) == ["chapters/one.html:1: link to ../gone.html: no such file in the site"]


def test_folder_without_a_book_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no index\.html, expected a built book"):
        links.broken(tmp_path)
