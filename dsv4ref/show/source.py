"""Show the source that really runs: a kernel, a reference function, or the part of it between two comments.

A chapter never paraphrases a kernel. `show_source` reads the function from its file, names the file and the lines, and
colours it with Pygments in tones that read on white and on near-black alike, because a notebook cannot know the theme.
"""

import html
import inspect
import textwrap
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.style import Style
from pygments.token import Comment, Keyword, Name, Number, Operator, String

from dsv4ref.show import Html


class BothThemes(Style):
    """Mid-tone colours, each at 4:1 contrast or better on white and on #111; the rest inherits the page's colour."""

    background_color = "transparent"
    styles = {  # noqa: RUF012  (the attribute's type is Pygments' own)
        Comment: "italic #767676",
        Keyword: "bold #8f5fd0",
        Operator.Word: "bold #8f5fd0",
        Name.Function: "#0f7fbf",
        Name.Class: "#0f7fbf",
        Name.Decorator: "#b5651d",
        Name.Builtin: "#0f7fbf",
        Number: "#c2542d",
        String: "#3a8540",
    }


def show_source(obj: Any, *, part: tuple[str, str] | None = None) -> Html:
    """Render the source of a function, kernel, class or module with its file name and line numbers.

    Args:
        obj: a plain function, class or module, or a Triton kernel (compiled, interpreted, autotuned: anything that
            keeps the Python function in ``.fn``).
        part: two texts, each found in exactly one comment line; the listing runs from the first of these lines up to,
            and without, the second. The excerpt is dedented; its line numbers stay those of the file.

    Returns:
        The listing as `Html`; its plain text is the same source.

    Raises:
        TypeError: `obj` has no Python source, or `part` is not a pair of texts.
        ValueError: a marker is missing, stands in several comment lines, or the second comes before the first.
    """
    function = _python_object(obj)
    try:
        lines, first = inspect.getsourcelines(function)
    except (TypeError, OSError) as error:
        raise TypeError(f"obj: no Python source for {obj!r}; expected a function, class, module or kernel") from error
    first = max(first, 1)  # a module's listing is numbered from 0
    if part is not None:
        start, stop = _between(lines, part)
        lines, first = lines[start:stop], first + start
    code = textwrap.dedent("".join(lines)).rstrip("\n")
    where = f"{_file(function)}, lines {first}-{first + code.count(chr(10))}"
    return Html(_listing(code, first, where), f"{where}\n\n{code}")


def _python_object(obj: Any) -> Any:
    """Follow Triton's ``.fn`` and functools' ``__wrapped__`` down to the function that was written."""
    while not (inspect.isroutine(obj) or inspect.isclass(obj) or inspect.ismodule(obj)) and hasattr(obj, "fn"):
        obj = obj.fn
    return inspect.unwrap(obj) if callable(obj) else obj


def _file(function: Any) -> str:
    """The file as the repository names it, never an absolute path."""
    try:
        path = Path(inspect.getsourcefile(function) or "")
    except TypeError:  # a class typed into a notebook has no module file
        path = Path()
    module = inspect.getmodule(function)
    name = module.__name__ if module is not None else ""
    if name in ("", "__main__") or path.suffix != ".py":
        return "this notebook"
    parts = name.split(".")
    if parts[:2] == ["dsv4ref", "kernels"]:
        parts = parts[1:]  # kernels/ stands beside dsv4ref/ in the repository and is installed inside it
    return "/".join([*parts, "__init__.py"]) if path.name == "__init__.py" else "/".join(parts) + ".py"


def _between(lines: list[str], part: tuple[str, str]) -> tuple[int, int]:
    if not (isinstance(part, tuple) and len(part) == 2 and all(isinstance(text, str) and text for text in part)):
        raise TypeError(f"part: got {part!r}, expected two non-empty texts, (start marker, end marker)")
    found = []
    for marker in part:
        hits = [i for i, line in enumerate(lines) if line.lstrip().startswith("#") and marker in line]
        if len(hits) != 1:
            raise ValueError(f"part: marker {marker!r} stands in {len(hits)} comment lines, expected exactly 1")
        found += hits
    start, stop = found
    if stop <= start:
        raise ValueError(f"part: end marker {part[1]!r} (line {stop + 1}) is not after {part[0]!r} (line {start + 1})")
    return start, stop


# Pages style pre for their own code cells; a listing inherits their text colour and nothing else.
_PRE = (
    "margin:0;padding:0.5em 0 0.5em 0.75em;overflow-x:auto;white-space:pre;line-height:1.35;background:none;"
    "color:inherit;border:0;border-left:3px solid #76767680;box-shadow:none"
)
_CODE = "white-space:pre;background:none;color:inherit"
_CAPTION = "font-size:0.85em;opacity:0.8;color:inherit;text-align:left"


def _listing(code: str, first: int, where: str) -> str:
    coloured = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True, noclasses=True, style=BothThemes))
    lines = coloured.rstrip("\n").split("\n")  # Pygments closes every span at the end of its line
    width = len(str(first + len(lines) - 1))
    # The numbers are drawn but not selectable, so that copying the listing copies code.
    number = '<span aria-hidden="true" style="user-select:none;color:#767676">{}  </span>{}'
    body = "\n".join(number.format(str(first + i).rjust(width), line) for i, line in enumerate(lines))
    return (
        '<figure class="dsv4-source" style="margin:0.5em 0">'
        f'<figcaption style="{_CAPTION}">{html.escape(where)}</figcaption>'
        f'<pre tabindex="0" style="{_PRE}"><code style="{_CODE}">{body}</code></pre>'
        "</figure>"
    )
