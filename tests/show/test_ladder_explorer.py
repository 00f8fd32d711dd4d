"""Chapter 17's pictures: what the bars say, at the edges."""

from __future__ import annotations

import re

import pytest

from dsv4ref.optimizations import ladder_statistics as statistics
from dsv4ref.show.ladder import ORDERS, VIEWS, ladder_explorer, noise_explorer


def bars(picture: str, unit: str) -> dict[str, float]:
    said = re.search(r'aria-label="([^"]*)"', picture)
    assert said is not None
    items = said[1].rsplit(": ", 1)[1].removesuffix(".").split(f" {unit}")
    pairs = (re.fullmatch(r"(?:, )?(.*) ([\d.,e+-]+)", item) for item in items if item)
    return {m[1]: float(m[2].replace(",", "")) for m in pairs if m is not None}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_divides_the_same_total(order: str) -> None:
    shown = bars(ladder_explorer(order), "ms")
    assert list(shown)[:3] == order.split(" > ")
    assert shown["sum"] == pytest.approx(sum(list(shown.values())[:3]), rel=0.01)
    assert shown["sum"] == pytest.approx(bars(ladder_explorer(ORDERS[0]), "ms")["sum"])


def test_only_the_ladder_depends_on_the_order() -> None:
    drawn = {view: {tuple(sorted(bars(ladder_explorer(o, view), "ms").items())) for o in ORDERS} for view in VIEWS}
    assert {view: len(found) for view, found in drawn.items()} == {"ladder": 5, "left out": 1, "Shapley": 1}


def test_a_kernel_is_worth_nothing_behind_a_slower_host() -> None:
    first = next(order for order in ORDERS if order.startswith("faster kernel"))
    assert bars(ladder_explorer(first, host_ms=30, device_ms=28), "ms")["faster kernel"] == 0
    assert bars(ladder_explorer(first, host_ms=28, device_ms=30), "ms")["faster kernel"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ladder_explorer("b > a"), "order: got 'b > a', expected one of"),
        (lambda: ladder_explorer(view="mean"), "view: got 'mean', expected one of"),
        (lambda: ladder_explorer(host_ms=0.0), "host_ms, device_ms: got 0.0, 28.0"),
        (lambda: noise_explorer(0.0), "noise: got 0.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_more_noise_leaves_fewer_rungs_and_more_runs_bring_them_back() -> None:
    def told(noise: float, repeats: int = 1) -> int:
        found = re.search(r"(\d) of 5 rungs", noise_explorer(noise, repeats))
        assert found is not None
        return int(found[1])

    assert [told(noise) for noise in (0.01, 0.1, 0.3, 1.0, 2.0)] == [5, 4, 2, 1, 0]
    assert told(0.3, 100) == 5
    assert len(bars(noise_explorer(), "%")) == len(statistics.published_rungs())
