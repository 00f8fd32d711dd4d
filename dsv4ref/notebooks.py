"""Notebooks: one normal form, the rules a chapter keeps, and a runner for authors.

`fix` brings every notebook of a folder into the one byte form that version control and CI compare; `check` says what
is off, including what no program can repair. `execute` runs one notebook and keeps the outputs of its headline cells:
those tagged ``nbval-check-output``, whose stored output nbval compares. Every other output is stripped.

Exercises are ``###`` headings with the solution in plain HTML, ``<details><summary>Solution</summary>``: JupyterLab and
the book (MyST passes HTML through) both fold it, which no Sphinx directive does in JupyterLab.
"""

import ast
import hashlib
import io
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dsv4ref.device import CAPABILITIES, unmet

ANATOMY = (
    "At a glance",
    "The idea",
    "What it computes",
    "Reference",
    "Predict",
    "Baseline and optimised",
    "Prove it",
    "Break it",
    "Measure",
    "On the target",
    "Explore",
    "What did not work",
    "Exercises",
    "Sources",
)
"""The ``##`` headings of a chapter, in order. A chapter may leave some out, and adds none."""

START = "00"  # the start notebook is no chapter: free headings, any number of headline cells
CHECKED = "nbval-check-output"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python"}
MAX_LINES = 25
MAX_HEADLINES = 3

_FILE_NAME = re.compile(r"\d{2}_[a-z][a-z0-9_]*\.ipynb")
_NOTEBOOK_KEYS = {"dsv4ref", "kernelspec", "language_info", "mystnb"}
_CELL_KEYS = {"tags", "mystnb", "jupyter"}
# Tags and comments that make nbval or MyST pass over a cell or its error: a check that cannot fail.
_BAD_TAGS = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
_NBVAL_COMMENT = re.compile(r"#\s*(NBVAL_[A-Z_]+|PYTEST_VALIDATE_IGNORE_OUTPUT)")
_ROOTS = r"(?:home|root|tmp|usr|opt|var|mnt|etc|srv|data|dev|workspace|scratch|Users|content|kaggle)"
_ABSOLUTE = re.compile(rf"(?<![\w.~/:-])(?:~/|/{_ROOTS}/|file:///)|\b[A-Za-z]:\\")
_URL = re.compile(r"\bhttps?://", re.IGNORECASE)
_OUTPUT_RULES = (
    ("an object address", re.compile(r"0x[0-9a-fA-F]{6,}")),
    ("a timing", re.compile(r"\b\d[\d.,]*\s*(?:ns|us|µs|μs|ms|s|secs?|seconds|min|minutes|it/s|tok/s)\b")),
    ("a time of day", re.compile(r"\b\d{2}:\d{2}:\d{2}\b")),
    ("an absolute path", re.compile(rf"{_ABSOLUTE.pattern}|(?<![\w.~/:<-])/(?:[\w.-]+/)+")),
    ("an ANSI escape", re.compile(r"\x1b\[")),
)
_MARKDOWN = MarkdownIt("commonmark").enable("table")


class NotebookError(RuntimeError):
    """A notebook that cannot be read or does not run; the message names the file and the cell."""


@dataclass(frozen=True)
class Finding:
    """One thing that is off.

    Args:
        notebook: file name.
        cell: position in the notebook, from 0; None where the whole notebook is meant.
        rule: short name of the rule.
        message: what was found and what is expected.
        fixable: whether `fix` repairs it.
    """

    notebook: str
    cell: int | None
    rule: str
    message: str
    fixable: bool = False

    def __str__(self) -> str:
        where = self.notebook if self.cell is None else f"{self.notebook}, cell {self.cell}"
        return f"{where}: {self.rule}: {self.message}{' (--fix repairs this)' if self.fixable else ''}"


def check(folder: Path | str) -> list[Finding]:
    """Hold every notebook of a folder against the rules.

    Args:
        folder: holds ``NN_id.ipynb`` files; subfolders are not read.

    Returns:
        what is off, in order of file and cell; a folder without notebooks is a finding too.

    Raises:
        ValueError: `folder` is not a folder.
    """
    paths = _notebooks(folder)
    if not paths:
        return [Finding(Path(folder).name, None, "empty", "no notebooks, expected NN_id.ipynb files")]
    found: list[Finding] = []
    for path in paths:
        found += _check_file(path)
    numbers = Counter(path.name[:2] for path in paths)
    for path in paths:
        if numbers[path.name[:2]] > 1:
            message = f"number {path.name[:2]} is taken {numbers[path.name[:2]]} times, expected once"
            found.append(Finding(path.name, None, "number", message))
    return sorted(found, key=lambda finding: finding.notebook)  # stable: cells keep their order


def fix(folder: Path | str) -> list[Path]:
    """Bring every notebook of a folder into normal form; running it again changes nothing.

    Args:
        folder: as for `check`.

    Returns:
        the files that were rewritten.

    Raises:
        ValueError: `folder` is not a folder.
        NotebookError: a file is not a notebook of format 4.
    """
    changed = []
    for path in _notebooks(folder):
        old = path.read_bytes()
        new = _serialise(normalise(_read(path)))
        if new != old:
            _replace(path, new)
            changed.append(path)
    return changed


def requires(path: Path | str) -> tuple[str, ...]:
    """What a notebook says it needs, in the words of `dsv4ref.device.CAPABILITIES`.

    Raises:
        NotebookError: the file is no notebook, does not say, or uses an unknown word.
    """
    path = Path(path)
    nb = _read(path)
    words, problem = _required(nb), _requires_problem(nb)
    if words is None or problem:
        raise NotebookError(f"{path.name}: {problem}")
    return tuple(words)


def execute(path: Path | str, timeout: float = 300.0, progress: bool = True) -> None:
    """Run a notebook from top to bottom in this environment and keep the outputs of its headline cells.

    Args:
        path: the notebook; rewritten in normal form after a run without errors, untouched otherwise.
        timeout: seconds one cell may take.
        progress: show a progress bar on stderr.

    Raises:
        NotebookError: a cell fails, also inside a widget's callback, or this machine lacks what the notebook requires.
    """
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm import tqdm

    path = Path(path)
    missing = unmet(requires(path))
    if missing:
        raise NotebookError(f"{path.name}: needs {', '.join(missing)}, which this machine does not have")
    nb = normalise(_read(path))
    client = NotebookClient(
        nb,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_this_environment()),
        timeout=timeout,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # how a kernel listens is no news to who runs a notebook
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    with client.setup_kernel():
        for position, cell in enumerate(tqdm(nb.cells, desc=path.name, unit="cell", disable=not progress)):
            try:
                client.execute_cell(cell, position)
            except CellExecutionError as error:
                raise NotebookError(f"{path.name}, cell {position}: {error.ename}: {error.evalue}") from error
            except CellTimeoutError as error:
                raise NotebookError(f"{path.name}, cell {position}: took more than {timeout:g} s") from error
            except DeadKernelError as error:
                raise NotebookError(f"{path.name}, cell {position}: the kernel died") from error
            # An error inside a widget's callback is shown but does not stop nbclient.
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    raise NotebookError(f"{path.name}, cell {position}: {output.ename}: {output.evalue}")
    _replace(path, _serialise(normalise(nb)))


def normalise(nb: Any) -> Any:
    """The normal form of a notebook, as a new notebook.

    Metadata is reduced to what the project uses; cell ids come from the cell's own text, so that a moved cell keeps its
    id; empty cells go; only headline cells keep outputs, with the counts of a run from top to bottom.

    Args:
        nb: a notebook of format 4, from nbformat.
    """
    metadata = {key: value for key, value in nb.metadata.items() if key in _NOTEBOOK_KEYS}
    metadata |= {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    if (words := _required(nb)) is not None:
        metadata["dsv4ref"] = {**metadata["dsv4ref"], "requires": sorted(set(words))}
    cells: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    count = 0
    for old in nb.cells:
        source = old.source.replace("\r\n", "\n").rstrip()
        if not source:
            continue
        key = hashlib.sha256(f"{old.cell_type}\0{source}".encode()).hexdigest()[:12]
        seen[key] += 1
        cell = {
            "cell_type": old.cell_type,
            "id": key if seen[key] == 1 else f"{key}-{seen[key]}",
            "metadata": _cell_metadata(old.metadata),
            "source": source,
        }
        if old.get("attachments"):
            cell["attachments"] = old.attachments
        if old.cell_type == "code":
            count += 1
            keep = CHECKED in _tags(old) and old.execution_count is not None
            cell["outputs"] = _outputs(old.outputs, count) if keep else []
            cell["execution_count"] = count if keep else None
        cells.append(cell)
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _outputs(outputs: list[Any], count: int) -> list[Any]:
    """Outputs as one run leaves them, however the kernel cut its streams."""
    kept: list[Any] = []
    for output in outputs:
        output = nbformat.from_dict(output)
        if output.output_type == "execute_result":
            output["execution_count"] = count
        last = kept[-1] if kept else None
        if last is not None and output.output_type == "stream" == last.output_type and output.name == last.name:
            last["text"] += output.text
        else:
            kept.append(output)
    return kept


def _cell_metadata(old: Any) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key in _CELL_KEYS and value}
    if isinstance(kept.get("tags"), list):
        kept["tags"] = sorted({tag for tag in kept["tags"] if isinstance(tag, str)})
    return kept


# --- files ------------------------------------------------------------------------------------------------------------


def _notebooks(folder: Path | str) -> list[Path]:
    if not Path(folder).is_dir():
        raise ValueError(f"folder: got {str(folder)!r}, expected a folder of notebooks")
    return sorted(path for path in Path(folder).glob("*.ipynb") if path.is_file())


def _read(path: Path) -> Any:
    # Not nbformat.read: it repairs while it reads, with random ids.
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("nbformat") != 4:
            raise ValueError("not a notebook of format 4")
        return nbformat.v4.reads(text)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise NotebookError(f"{path.name}: cannot be read as a notebook: {error}") from error


def _serialise(nb: Any) -> bytes:
    return (nbformat.v4.writes(nb) + "\n").encode("utf-8")


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _this_environment() -> Any:
    """Starts kernels with this interpreter, whatever kernels the user has registered."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisEnvironment(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())  # its argv begins with sys.executable

    return ThisEnvironment()


# --- rules ------------------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> Iterator[Finding]:
    name = path.name
    if not _FILE_NAME.fullmatch(name):
        yield Finding(name, None, "file-name", "expected NN_id.ipynb: two digits, then lower case, digits and _")
    try:
        nb = _read(path)
        normal = normalise(nb)
        nbformat.validate(normal)
    except NotebookError as error:
        yield Finding(name, None, "unreadable", str(error).removeprefix(f"{name}: "))
        return
    except nbformat.ValidationError as error:
        yield Finding(name, None, "schema", str(error).splitlines()[0])
        return
    form = list(_form(nb, normal))
    if not form and path.read_bytes() != _serialise(normal):
        form = [(None, "layout", "not in the byte form that nbformat writes")]
    yield from (Finding(name, cell, rule, message, fixable=True) for cell, rule, message in form)
    for rules in (_notebook_rules(nb), _heading_rules(nb, name), _cell_rules(nb), _headline_rules(nb, name)):
        yield from (Finding(name, cell, rule, message) for cell, rule, message in rules)


Hit = tuple[int | None, str, str]


def _form(nb: Any, normal: Any) -> Iterator[Hit]:
    """What normalising would change."""
    for key, want in (("kernelspec", KERNELSPEC), ("language_info", LANGUAGE)):
        if nb.metadata.get(key) != want:
            yield None, key.replace("_", "-"), f"got {json.dumps(nb.metadata.get(key))}, expected {json.dumps(want)}"
    if "widgets" in nb.metadata:
        yield None, "widget-state", "the notebook stores widget state, expected none"
    extra = sorted(set(nb.metadata) - _NOTEBOOK_KEYS - {"widgets"})
    if extra:
        yield None, "metadata", f"got {', '.join(extra)}, expected only {', '.join(sorted(_NOTEBOOK_KEYS))}"
    kept: Iterator[Any] = iter(normal.cells)
    for position, cell in enumerate(nb.cells):
        if not cell.source.strip():
            yield position, "empty-cell", "got a cell without text, expected none"
            continue
        new = next(kept)
        if cell.get("id") != new.id:
            yield position, "cell-id", f"got {cell.get('id')}, expected {new.id}, derived from the source"
        if cell.metadata != new.metadata:
            yield position, "cell-metadata", f"got {json.dumps(cell.metadata)}, expected {json.dumps(new.metadata)}"
        if cell.cell_type != "code":
            continue
        if CHECKED not in _tags(cell) and (cell.outputs or cell.execution_count):
            yield position, "outputs", f"a cell without the tag {CHECKED} stores outputs or a count, expected neither"
        elif cell.outputs and cell.execution_count is None:
            yield position, "outputs", "stores outputs without an execution count, expected both or neither"
        elif cell.execution_count != new.execution_count:
            yield position, "count", f"got {cell.execution_count}, expected {new.execution_count}: a run from the top"


def _required(nb: Any) -> list[str] | None:
    own = nb.metadata.get("dsv4ref")
    words = own.get("requires") if isinstance(own, dict) else None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _requires_problem(nb: Any) -> str:
    """What is wrong with the notebook's ``requires``; empty when nothing is."""
    words = _required(nb)
    if words is None:
        return f'metadata "dsv4ref" is {json.dumps(nb.metadata.get("dsv4ref"))}, expected {{"requires": [...]}}'
    unknown = sorted(set(words) - set(CAPABILITIES))
    return f"requires {', '.join(unknown)}, expected words from {', '.join(CAPABILITIES)}" if unknown else ""


def _notebook_rules(nb: Any) -> Iterator[Hit]:
    if problem := _requires_problem(nb):
        yield None, "requires", problem
    first = next(((i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code"), None)
    if first is None:
        yield None, "first-import", "no code cell, expected one that imports dsv4ref"
    elif (module := _first_import(first[1].source)) != "dsv4ref":
        yield first[0], "first-import", f"the first code cell imports {module or 'nothing'} first, expected dsv4ref"


def _heading_rules(nb: Any, name: str) -> Iterator[Hit]:
    headings = [
        (position, *heading)
        for position, cell in enumerate(nb.cells)
        if cell.cell_type == "markdown"
        for heading in _headings(_MARKDOWN.parse(cell.source))
    ]
    titles = [(position, text) for position, level, text in headings if level == 1]
    if len(titles) != 1:
        got = ", ".join(text for _, text in titles) or "none"
        yield (titles[1][0] if titles else None), "title", f"got {len(titles)} titles (# ...): {got}; expected 1"
    if name.startswith(START):
        return
    reached = -1
    for position, level, text in headings:
        if level != 2:
            continue
        if text not in ANATOMY:
            yield position, "sections", f"got {text!r}, expected one of {', '.join(ANATOMY)}"
        elif (place := ANATOMY.index(text)) <= reached:
            yield position, "sections", f"{text!r} comes after {ANATOMY[reached]!r}, expected the order of the anatomy"
        else:
            reached = place
    yield from _exercise_rules(nb)


def _exercise_rules(nb: Any) -> Iterator[Hit]:
    """In the section Exercises: 2 to 4 ``###`` headings, each followed by a folded solution."""
    inside, start = False, None
    exercises: list[list[Any]] = []  # [position, title, folded solutions]
    for position, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        for token, following in _with_next(_MARKDOWN.parse(cell.source)):
            if token.type == "heading_open" and token.tag in ("h1", "h2"):
                inside = following is not None and following.content.strip() == "Exercises"
                start = position if inside else start
            elif token.type == "heading_open" and token.tag == "h3" and inside and following is not None:
                exercises.append([position, following.content.strip(), 0])
            elif token.type == "html_block" and inside and exercises:
                exercises[-1][2] += len(re.findall(r"<details\s*>", token.content))
        opened = len(re.findall(r"<details\b", cell.source))
        if opened != cell.source.count("</details>"):
            yield position, "solution", "<details> and </details> do not pair within the cell"
        if inside and "<details open" in cell.source:
            yield position, "solution", "a solution stands open, expected <details> without open"
        if opened and re.search(r"</summary>[ \t]*(?:\n[ \t]*\S|[^\s<])", cell.source):
            yield position, "solution", "expected a blank line after </summary>; without it the text is not Markdown"
    if start is not None and not 2 <= len(exercises) <= 4:
        yield start, "exercises", f"got {len(exercises)} exercises (### headings), expected 2 to 4"
    for position, title, solutions in exercises:
        if not solutions:
            yield position, "solution", f"{title!r} has no folded solution (<details><summary>Solution</summary>)"


def _cell_rules(nb: Any) -> Iterator[Hit]:
    for position, cell in enumerate(nb.cells):
        hits = _code_rules(cell) if cell.cell_type == "code" else _markdown_rules(cell)
        yield from ((position, rule, message) for rule, message in hits)


def _code_rules(cell: Any) -> Iterator[tuple[str, str]]:
    source = cell.source
    count = len(source.rstrip().splitlines())
    if count > MAX_LINES:
        yield "length", f"got {count} lines, expected at most {MAX_LINES}; move logic into the package"
    for tag in sorted(_BAD_TAGS & set(_tags(cell))):
        yield "tag", f"got {tag}, which makes the runner pass over the cell; expected no such tag"
    if match := _NBVAL_COMMENT.search(source):
        yield "tag", f"got the comment {match[0]!r}, expected cell tags"
    bare = _without_comments(source)
    for match in re.finditer(r"^[ \t]*(?:[!%].*\b(?:pip|conda|mamba|uv)|%%?timeit)\b.*", bare, re.MULTILINE):
        yield "source", f"got {match[0].strip()!r}, expected no installs and no %timeit in a notebook"
    if re.search(r"\bgit\s+clone\b", bare):
        yield "source", "got git clone, expected nothing fetched at run time"
    if _URL.search(bare):
        yield "source", "got an http(s) address in code, expected nothing loaded at run time"
    if match := _ABSOLUTE.search(source):
        yield "source", f"got the absolute path {match[0]!r}..., expected paths relative to the notebook or package"
    tree = _parse(source)
    if tree is None:
        yield "source", "does not parse as Python"
        return
    for text in _leading_texts(tree):
        if re.match(r"/[A-Za-z0-9_.-]+(/|$)", text) and not _ABSOLUTE.search(text):
            yield "source", f"got the absolute path {text!r}, expected paths relative to the notebook or package"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("interact", "interactive", "interact_manual", "interactive_output", "Output"):
            yield "source", f"got {called}(, expected panel(f, ...), whose errors fail the cell"
        if any(keyword.arg == "icon" for keyword in node.keywords):
            yield "source", "got icon=, expected none: icons come from a font that is not there offline"


def _markdown_rules(cell: Any) -> Iterator[tuple[str, str]]:
    for token in _walk(_MARKDOWN.parse(cell.source)):
        if token.type == "image":
            if not token.content.strip():
                yield "alt", f"image {token.attrs.get('src')} has no alternative text"
            if _URL.match(str(token.attrs.get("src", ""))):
                yield "outside", f"image {token.attrs['src']} comes from outside, expected a file of the repository"
        elif token.type in ("html_block", "html_inline"):
            for tag in re.findall(r"<img\b[^>]*>", token.content, re.IGNORECASE):
                if not re.search(r"""\balt\s*=\s*("[^"]*\S[^"]*"|'[^']*\S[^']*')""", tag):
                    yield "alt", f"{tag} has no alternative text"
            if match := re.search(r"<\w+\b[^>]*\bsrc\s*=\s*[\"']?https?:[^>]*>", token.content, re.IGNORECASE):
                yield "outside", f"{match[0]} is loaded from outside, expected a file of the repository"
        elif token.type == "fence" and re.match(r"\{(image|figure)\}", token.info) and ":alt:" not in token.content:
            yield "alt", f"{token.info.strip()} has no :alt:"
    for match in re.finditer(r"^(:{3,})\{(?:image|figure)\}.*?^\1", cell.source, re.MULTILINE | re.DOTALL):
        if ":alt:" not in match[0]:
            yield "alt", f"{match[0].splitlines()[0]} has no :alt:"


def _headline_rules(nb: Any, name: str) -> Iterator[Hit]:
    tagged = [(i, cell) for i, cell in enumerate(nb.cells) if CHECKED in _tags(cell)]
    most = len(nb.cells) if name.startswith(START) else MAX_HEADLINES
    if not 1 <= len(tagged) <= most:
        wanted = "at least 1" if name.startswith(START) else f"1 to {MAX_HEADLINES}"
        yield None, "headlines", f"got {len(tagged)} cells tagged {CHECKED}, expected {wanted}"
    for position, cell in tagged:
        if cell.cell_type != "code":
            yield position, "headlines", f"a {cell.cell_type} cell has the tag {CHECKED}, expected code"
            continue
        if not cell.outputs or cell.execution_count is None:
            lack = "outputs" if not cell.outputs else "execution count"
            yield position, "headlines", f"no {lack}: nbval would compare nothing; run the notebook with --execute"
        for output in cell.outputs:
            yield from ((position, "headline-output", message) for message in _output_problems(output))


def _output_problems(output: Any) -> Iterator[str]:
    if output.output_type == "error":
        yield f"stores the error {output.get('ename')}, expected a run without errors"
        return
    if output.output_type == "stream" and output.name == "stderr":
        yield "holds stderr, which differs between versions; expected stdout or a value"
    data = {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
    for mime, value in data.items():
        if not mime.startswith("text/"):
            yield f"holds {mime}, expected text that can be compared"
            continue
        for what, pattern in _OUTPUT_RULES:
            if match := pattern.search("".join(value)):
                yield f"holds {what}, {match[0]!r}, which is not the same in every run"


# --- reading cells ----------------------------------------------------------------------------------------------------


def _tags(cell: Any) -> list[str]:
    tags = cell.metadata.get("tags", [])
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _parse(source: str) -> ast.Module | None:
    """The cell as Python; lines that only IPython knows are left out, and a cell magic is not Python at all."""
    if source.lstrip().startswith("%%"):
        return ast.parse("")
    plain = re.sub(r"^([ \t]*)[%!?].*$", r"\1pass", source, flags=re.MULTILINE)
    try:
        return ast.parse(plain)
    except SyntaxError:
        return None


def _first_import(source: str) -> str:
    tree = _parse(source)
    for node in ast.walk(tree) if tree is not None else ():  # breadth first: top-level statements in order
        if isinstance(node, ast.Import):
            return node.names[0].name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            return (node.module or "").split(".")[0]
    return ""


def _leading_texts(tree: ast.Module) -> Iterator[str]:
    """Every text literal, and of an f-string its first piece: a later piece such as ``/s`` continues something."""
    pieces = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            yield node.value


def _without_comments(source: str) -> str:
    """The source with comments blanked; unchanged where it is not Python."""
    lines = source.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, SyntaxError):
        return source
    return "\n".join(lines)


def _headings(tokens: list[Token]) -> Iterator[tuple[int, str]]:
    for token, following in _with_next(tokens):
        if token.type == "heading_open" and following is not None:
            yield int(token.tag[1]), following.content.strip()


def _with_next(tokens: list[Token]) -> Iterator[tuple[Token, Token | None]]:
    return zip(tokens, [*tokens[1:], None], strict=True)


def _walk(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _walk(token.children or [])
