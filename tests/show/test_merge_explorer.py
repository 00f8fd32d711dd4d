"""The merge's panel: weights as the reference has them, and what each mistake does to them."""

from __future__ import annotations

import math
import re

import pytest

from dsv4ref.show.merge import MISTAKES, merge_explorer


def weights(**options: float | int | str) -> dict[str, float]:
    """What the bars say, from the alternative text."""
    said = re.search(r'aria-label="[^"]*?; mistake: [^:]*: ([^"]*)"', merge_explorer(**options))  # type: ignore[arg-type]
    assert said is not None
    pairs = (re.fullmatch(r"(.*?) ([\d.e-]+) of the row", item) for item in re.split(r"(?<=row), ", said[1]))
    return {m[1]: float(m[2]) for m in pairs if m is not None}


def test_equal_scores_weigh_by_their_number() -> None:
    found = weights(swa=1.0, extra=1.0, extra_keys=512, sink=-50.0)
    assert found["SWA"] == pytest.approx(128 / 640, rel=1e-3)
    assert found["extra"] == pytest.approx(512 / 640, rel=1e-3)


def test_an_empty_scope_weighs_nothing() -> None:
    found = weights(extra_keys=0, swa=0.0, sink=math.log(128))
    assert found == {"SWA": 0.5, "extra": 0.0, "sink": 0.5}


@pytest.mark.parametrize("mistake", MISTAKES[1:])
def test_every_mistake_shows_and_its_weights_still_add_up(mistake: str) -> None:
    found = weights(mistake=mistake)
    for kind in ("right", "wrong"):
        assert sum(w for name, w in found.items() if name.endswith(kind)) == pytest.approx(1.0, abs=1e-3)
    assert any(abs(found[f"{n}, right"] - found[f"{n}, wrong"]) > 0.01 for n in ("SWA", "extra", "sink"))


def test_unknown_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="mistake: got 'typo', expected one of"):
        merge_explorer(mistake="typo")
