"""Source listings: the code that runs, with its file and lines, and excerpts that fail when a marker has gone."""

import functools
import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.formats import fp8
from dsv4ref.show import source
from dsv4ref.show.source import BothThemes, show_source

TRITON = """
import sys
import triton
import triton.language as tl
from dsv4ref.show.source import show_source

sys.path.insert(0, sys.argv[1])
import kernels_to_show as module

for kernel in (module._plain_kernel, module._tuned_kernel):
    print(type(kernel).__name__, show_source(kernel))
"""
KERNELS = """import triton
import triton.language as tl


@triton.jit
def _plain_kernel(x, n: tl.constexpr):
    # load
    value = tl.load(x)
    tl.store(x, value + n)


@triton.autotune(configs=[triton.Config({"n": 1})], key=[])
@triton.jit
def _tuned_kernel(x, n: tl.constexpr):
    tl.store(x, n)
"""


def example(values: list[int]) -> int:
    # first: add up
    total = sum(values)
    # second: scale <up> & "quote"
    total *= 2
    # third
    return total


def code_of(shown: source.Html) -> str:
    """What a reader would copy: the text of the listing without the numbers."""
    body = re.search(r"<code[^>]*>(.*)</code>", shown.html, re.DOTALL)
    assert body is not None
    bare = re.sub(r'<span aria-hidden="true"[^>]*>[^<]*</span>', "", body[1])
    return html.unescape(re.sub(r"<[^>]+>", "", bare))


def test_the_listing_is_the_source_with_file_and_lines() -> None:
    shown = show_source(fp8)
    assert code_of(shown) == inspect.getsource(fp8).rstrip("\n")
    lines = len(inspect.getsource(fp8).rstrip("\n").splitlines())
    assert str(shown).splitlines()[0] == f"dsv4ref/formats/fp8.py, lines 1-{lines}"
    assert "<figcaption" in shown.html


def test_a_function_is_numbered_as_in_its_file() -> None:
    shown = show_source(source.show_source)
    lines, first = inspect.getsourcelines(source.show_source)
    assert f"dsv4ref/show/source.py, lines {first}-{first + len(lines) - 1}" in shown.html
    numbers = re.findall(r'<span aria-hidden="true"[^>]*> *(\d+)  </span>', shown.html)
    assert [int(n) for n in numbers] == list(range(first, first + len(lines)))
    assert str(Path(source.__file__).parent) not in shown.html + shown.text


def test_a_wrapper_shows_what_it_wraps() -> None:
    @functools.wraps(example)
    def wrapper(*args: Any) -> Any:
        return example(*args)

    assert code_of(show_source(wrapper)) == inspect.getsource(example).rstrip("\n")


def test_a_part_runs_from_its_first_marker_up_to_its_second() -> None:
    shown = show_source(example, part=("first:", "third"))
    assert code_of(shown) == '# first: add up\ntotal = sum(values)\n# second: scale <up> & "quote"\ntotal *= 2'
    first = inspect.getsourcelines(example)[1] + 1
    assert f"lines {first}-{first + 3}" in shown.text
    assert "<up>" not in shown.html


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (("first:", "fourth"), ValueError, "marker 'fourth' stands in 0 comment lines"),
        (("return total", "third"), ValueError, "marker 'return total' stands in 0 comment lines"),
        (("s", "third"), ValueError, "marker 's' stands in 2 comment lines"),
        (("third", "first:"), ValueError, "end marker 'first:' .* is not after 'third'"),
        (("third", "third"), ValueError, "is not after"),
        ("first", TypeError, "part: got 'first', expected two"),
        (("first:", ""), TypeError, "expected two non-empty texts"),
    ],
)
def test_a_part_that_cannot_be_found_is_an_error(part: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        show_source(example, part=part)


@pytest.mark.parametrize("obj", [3, "text", len, {}])
def test_what_has_no_python_source_is_refused(obj: Any) -> None:
    with pytest.raises(TypeError, match="obj: no Python source"):
        show_source(obj)


@pytest.mark.parametrize(("interpret", "kind"), [("0", "JITFunction"), ("1", "InterpretedFunction")])
def test_kernels_show_their_python_source_compiled_and_interpreted(interpret: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "kernels_to_show.py").write_text(KERNELS)
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )
    plain, tuned = KERNELS.split("\n\n\n")[1:]
    expected = f"{kind} kernels_to_show.py, lines 5-9\n\n{plain}\nAutotuner kernels_to_show.py, lines 12-15\n\n{tuned}"
    assert done.stdout == expected, done.stderr


def test_files_are_named_as_the_repository_names_them() -> None:
    # kernels/ is installed as dsv4ref.kernels; a package's own file keeps its name.
    assert source._file(importlib.import_module("dsv4ref.kernels")) == "kernels/__init__.py"
    assert source._file(source) == "dsv4ref/show/source.py"
    typed: dict[str, Any] = {"__name__": "__main__"}
    exec("def typed(): pass", typed)
    assert source._file(typed["typed"]) == "this notebook"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["ffffff", "111111"])
def test_every_colour_reads_on_light_and_dark(page: str) -> None:
    colours = {colour for rule in BothThemes.styles.values() for colour in re.findall("#([0-9a-f]{6})", rule)}
    assert len(colours) >= 5
    for colour in colours:
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0, (colour, page)
    assert "background-color" not in show_source(example).html
