"""Colours of listings and of the roofline stand out from the book's two grounds, and no tone is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv4ref.show import roofline, source

CSS = (Path(__file__).resolve().parents[2] / "book" / "_static" / "book.css").read_text(encoding="utf-8")
RULE = re.compile(
    r'\[data-theme="(\w+)"\] \.dsv4-source span\[style\*="(#\w{6})"(?: i)?\] \{ color: (#\w{6}) !important; \}'
)
GROUNDS = {"light": "#ffffff", "dark": "#121212"}  # the theme's --pst-color-background
AA = 4.5
AA_PICTURE = 3.0  # lines and bars, which have their names beside them


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", GROUNDS)
def test_every_tone_of_a_listing_has_a_readable_one_in_the_book(theme: str) -> None:
    tones = {match for style in source.BothThemes.styles.values() for match in re.findall(r"#\w{6}", style)}
    given = {tone.lower(): colour for where, tone, colour in RULE.findall(CSS) if where == theme}
    assert given.keys() == {tone.lower() for tone in tones}
    weak = {colour: contrast(colour, GROUNDS[theme]) for colour in given.values()}
    assert {colour: ratio for colour, ratio in weak.items() if ratio < AA} == {}


@pytest.mark.parametrize("theme", GROUNDS)
def test_the_roofs_stand_out(theme: str) -> None:
    weak = {name: contrast(colour, GROUNDS[theme]) for name, colour in roofline.SIDES.values()}
    assert {name: ratio for name, ratio in weak.items() if ratio < AA_PICTURE} == {}


def test_contrast_is_the_standards() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)
