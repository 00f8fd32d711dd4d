"""The picture of a rounded bias: a line per expert, a bar per bf16 value, numbers that are counted."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from dsv4ref.optimizations.router_study import draw_bias
from dsv4ref.show.panels import COLOURS
from dsv4ref.show.router import bias_explorer


@pytest.mark.parametrize(("offset", "router", "experts"), [(7.0, "V3.2", 64), (0.0, "V4-Flash", 37)])
def test_a_line_per_expert_and_a_bar_per_value(offset: float, router: str, experts: int) -> None:
    root = ElementTree.fromstring(bias_explorer(offset, 0.02, experts, router, rows=40))
    lines = [e for e in root.iter("line") if e.attrib["stroke"] == COLOURS[0]]
    values, shared = draw_bias(offset, 0.02, experts, 0).to(torch.bfloat16).unique(return_counts=True)
    bars = [float(e.attrib["height"]) for e in root.iter("rect")]
    assert (len(lines), len(bars)) == (experts, len(values))
    assert bars.index(max(bars)) == int(shared.argmax())
    assert f"{len(values)} in bf16" in root.attrib["aria-label"]
    assert f"up to {int(shared.max())} experts share a value" in root.attrib["aria-label"]


def test_a_router_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router: got 'V5', expected one of \['V3.2', 'V4-Flash'\]"):
        bias_explorer(router="V5")
