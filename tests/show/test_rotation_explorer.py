"""The rotation's panel: angles as the reference has them, and what each mistake does to them."""

from __future__ import annotations

import math
import re

import pytest

from dsv4ref.show.rotation import MISTAKES, PAIRS, rotation_explorer


def degrees(**options: int | str) -> dict[int, float]:
    """What the bars say, from the alternative text."""
    said = re.search(r'aria-label="([^"]*)"', rotation_explorer(**options))  # type: ignore[arg-type]
    assert said is not None
    found = {int(pair): float(value) for pair, value in re.findall(r"pair (\d+) ([\d.e-]+) degrees", said[1])}
    assert list(found) == list(PAIRS)
    return found


def test_pair_0_turns_by_one_radian_a_token_and_slower_pairs_by_less() -> None:
    for layer in ("SWA only", "compressed"):
        found = degrees(position=1, layer=layer)
        assert found[0] == pytest.approx(math.degrees(1.0), rel=1e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert degrees(position=0) == dict.fromkeys(PAIRS, 0.0)


def test_yarn_divides_the_slowest_pairs_by_16() -> None:
    plain = math.degrees(100_000 * 160_000 ** (-62 / 64))
    assert degrees(position=100_000, layer="compressed")[31] == pytest.approx(plain / 16, rel=2e-3)


@pytest.mark.parametrize("mistake", MISTAKES[1:])
def test_every_mistake_shows_and_stays_within_half_a_turn(mistake: str) -> None:
    found = degrees(position=4099, mistake=mistake)
    assert max(found.values()) > 0.5, found
    assert max(found.values()) <= 180


def test_one_token_too_far_is_one_radian_on_the_fastest_pair() -> None:
    assert degrees(position=1000, mistake="one token too far")[0] == pytest.approx(math.degrees(1.0), rel=1e-2)


def test_bf16_holds_256_positions() -> None:
    assert max(degrees(position=256, mistake="position in bf16").values()) == 0
    assert degrees(position=257, mistake="position in bf16")[0] == pytest.approx(math.degrees(1.0), rel=1e-2)


def test_row_3_is_right_at_position_3() -> None:
    assert max(degrees(position=3, mistake="row 3 for the position").values()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "C4"}, "layer: got 'C4', expected one of"),
        ({"mistake": "typo"}, "mistake: got 'typo', expected one of"),
        ({"position": -1}, "position: got -1, expected 0 or more"),
    ],
)
def test_unknown_choices_are_refused(options: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotation_explorer(**options)  # type: ignore[arg-type]
