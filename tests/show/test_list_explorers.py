"""The panels of chapters 04 and 07: what the bars say, at the edges."""

from __future__ import annotations

import re

import pytest

from dsv4ref.show.lists import list_explorer, window_explorer


def bars(picture: str, unit: str) -> dict[str, float]:
    """Bars by name, from the picture's own text."""
    said = re.search(r'aria-label="([^"]*)"', picture)
    assert said is not None
    text = said[1].split(": ", 1)[1] if said[1].count(": ") == 1 else said[1][said[1].index("logits") :]
    pairs = (re.fullmatch(r"(.*) ([\d.,e+-]+)", item) for item in re.split(rf" {unit}(?:, |$|\.)", text) if item)
    return {m[1]: float(m[2].replace(",", "")) for m in pairs if m is not None}


@pytest.mark.parametrize(
    ("position", "want"),
    [
        (0, {"SWA": 1, "C4": 0, "C128": 0}),
        (127, {"SWA": 128, "C4": 32, "C128": 1}),
        (2047, {"SWA (of 2,048)": 128, "C4": 512, "C128": 16}),
        (2051, {"SWA (of 2,052)": 128, "C4 (of 513)": 512, "C128": 16}),
    ],
)
def test_a_row_lists_what_it_sees_up_to_the_bounds(position: int, want: dict[str, float]) -> None:
    assert bars(list_explorer(position), "slots") == want


def test_beyond_the_window_both_ways_take_the_same_time() -> None:
    inside = list(bars(window_explorer(2048), "us").values())
    beyond = list(bars(window_explorer(2052), "us").values())
    assert inside[0] > inside[1] > 0
    assert beyond[0] == beyond[1]


def test_a_context_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="context: got 3, expected at least 4 tokens"):
        window_explorer(3)
