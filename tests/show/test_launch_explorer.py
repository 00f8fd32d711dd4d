"""The picture of the expert layer's launches: a bar per launch, and totals that are the model's."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from dsv4ref.show.expert_layer import launch_explorer


def test_a_bar_per_launch_of_the_three_paths() -> None:
    root = ElementTree.fromstring(launch_explorer(rows=8, ranks=2, device="h200"))
    assert len(root.findall("rect")) == 6 + 3 + 2
    widths = [float(bar.attrib["width"]) for bar in root.findall("rect")]
    assert abs(max(sum(widths[:6]), sum(widths[6:9]), sum(widths[9:])) - 530) < 0.1, "the longest path fills the plot"
    for path, launches in (("separate", 6), ("products", 3), ("owned", 2)):
        assert f"{path}: {launches} launches" in root.attrib["aria-label"]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rows: got 0, expected at least 1"):
        launch_explorer(rows=0)
    with pytest.raises(ValueError, match="ranks: got 3, expected a divisor of 256"):
        launch_explorer(ranks=3)
    with pytest.raises(ValueError, match="device: got 'cpu', expected one with published bandwidth"):
        launch_explorer(device="cpu")
