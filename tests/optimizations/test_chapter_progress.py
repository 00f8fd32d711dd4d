"""A loop of a notebook shows a bar once it is slow, and leaves nothing of it; the command line never has one."""

from __future__ import annotations

import itertools
import sys

import pytest

from dsv4ref.optimizations import chapter


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, notebook: bool = True
) -> str:
    """What goes to stderr while three items take some seconds each, by a clock that advances whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: seconds * next(ticks))
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert list(chapter.progress(iter("abc"), "weighing")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_slow_loop_has_a_bar_that_is_gone_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(monkeypatch, capsys, 3.0).split("\r")
    assert any(line.startswith("weighing:") and "2/3" in line for line in lines), lines
    assert lines[-1] == "", "the cursor is back at the start of the line"
    assert lines[-2].strip() == "", "and the line is blank"


def test_a_quick_loop_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(monkeypatch, capsys, 0.01) == ""


def test_there_is_no_bar_outside_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(monkeypatch, capsys, 3.0, notebook=False) == ""
