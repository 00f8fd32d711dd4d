"""The tile pictures: bars as tall as the counts they stand for, figures that are the model's, alternative text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

from dsv4ref.device import get_device
from dsv4ref.optimizations import tile_model
from dsv4ref.optimizations.routing_eager import loads
from dsv4ref.show.tiles import histogram_bars, tile_explorer


def heights(svg: str) -> list[float]:
    return [float(rect.attrib["height"]) for rect in ElementTree.fromstring(svg).iter("rect")]


def test_bars_stand_in_the_tiles_they_need_busiest_first() -> None:
    drawn = heights(histogram_bars(torch.tensor([16, 40, 0]), 32, title="three experts"))
    unit = 150 / 64  # the busiest expert needs two tiles of 32
    assert drawn == pytest.approx([64 * unit, 40 * unit, 32 * unit, 16 * unit, 0, 0], abs=0.06)


def test_the_line_below_says_what_occupancy_counts() -> None:
    svg = histogram_bars(torch.tensor([16, 40, 0]), 32, title="three experts")
    said = "56 rows in 3 tiles of 32: 58.3 % full, 40 rows of padding, 1 re-reads"
    assert said in svg
    assert f'aria-label="three experts. {said}"' in svg


def test_nothing_routed_is_refused_here_and_said_in_the_explorer() -> None:
    with pytest.raises(ValueError, match="histogram: got 4 experts without a row"):
        histogram_bars(torch.zeros(4, dtype=torch.int64), 16, title="none")
    empty = next(r for r in range(2, 384) if not int(tile_model.local_loads(loads(384, 6, 1, 0.0), r).sum()))
    assert "no rows on this rank" in tile_explorer(tokens=1, experts=384, ranks=empty)


def test_every_tile_of_the_table_has_its_modelled_time() -> None:
    svg, spec = tile_explorer(tokens=1024, ranks=2, device="mi300x"), get_device("mi300x")
    mine = tile_model.local_loads(loads(256, 6, 1024, 0.0), 2)
    for tile in tile_model.candidates("gfx942"):
        time = tile_model.layer_time_us(mine, tile, 4096, 2048, spec)
        assert f"{tile}: {time:,.0f} us" in svg, tile
    assert re.findall(r"(\S+) w\d s\d: \d+ us \(selected, best\)", svg) == ["32x128x128"]


def test_ragged_ranks_and_skew_draw() -> None:
    for changes in ({"experts": 384, "ranks": 8}, {"skew": 1.5}, {"tokens": 8192, "block_m": 16, "device": "h200"}):
        ElementTree.fromstring(tile_explorer(**changes))
