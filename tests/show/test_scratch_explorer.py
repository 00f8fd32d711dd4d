"""Chapter 10's panel: the bars are the bytes of a scratch."""

from __future__ import annotations

import re

import pytest

from dsv4ref.show.explorers import scratch_explorer


def test_query_output_and_lists_are_what_the_shape_says() -> None:
    svg = scratch_explorer(rows=64, heads=16, topk=512, device="mi355x")
    values = re.findall(r">([\d.,]+) KiB<", svg)
    found = [float(v.replace(",", "")) for v in values[:3]]
    assert found == [64 * 16 * 512 / 2**10, 64 * 16 * 512 * 2 / 2**10, 64 * 512 * 4 / 2**10]


def test_the_plan_grows_with_compute_units_and_not_with_lists() -> None:
    def plan(**changes: object) -> float:
        svg = scratch_explorer(**{"rows": 8, "heads": 16, "topk": 512, "device": "mi355x", **changes})  # type: ignore[arg-type]
        return float(re.findall(r">([\d.,]+) KiB<", svg)[3].replace(",", ""))

    assert plan(device="mi300x") > plan()
    assert plan(topk=128) == plan()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="key: no device is called 'mi400'"):
        scratch_explorer(device="mi400")
