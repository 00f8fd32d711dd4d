"""The timeline has a cell per request and step and a mark per verdict, and says in words what it draws."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from dsv4ref.serving.metadata import KEYS
from dsv4ref.serving.traces import Lengths
from dsv4ref.show.timeline import TRACES, fill_explorer, metadata_timeline, timeline

STEPS = [Lengths((1, 1), (3, 8)), Lengths((4, 1), (4, 9)), Lengths((1,), (16,))]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def label(svg: str) -> str:
    return str(drawn(svg).get("aria-label"))


def test_a_cell_is_as_full_as_the_request_and_a_chunk_is_struck_through() -> None:
    root = drawn(timeline(STEPS, ["plan", "stale", "reuse"], 8, "Key"))
    fills = [float(str(rect.get("height"))) for rect in root.iter(f"{SVG}rect") if rect.get("fill-opacity")]
    assert [height / 16 for height in fills[:-1]] == pytest.approx([3 / 8, 1, 4 / 8, 1, 1])  # the last is the legend's
    assert len(list(root.iter(f"{SVG}line"))) == 2  # one chunk, and the legend


def test_every_verdict_has_its_mark_and_the_text_counts_them() -> None:
    svg = timeline(STEPS, ["plan", "stale", "reuse"], 8, "Key")
    root = drawn(svg)
    assert len(list(root.iter(f"{SVG}circle"))) == 1 + 1
    assert len(list(root.iter(f"{SVG}path"))) == 1 + 1
    assert label(svg) == "Key. 3 steps of 2 requests: 1 planned, 1 reused, 1 reused and wrong."


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("key", KEYS)
def test_only_the_published_key_is_ever_wrong(trace: str, key: str) -> None:
    """And on these traces only for a long prompt in chunks."""
    wrong = int(re.findall(r"(\d+) reused and wrong", label(metadata_timeline(trace, key)))[0])
    assert (wrong > 0) == (key == "published" and trace == "prompt")


def test_below_topk_every_step_plans() -> None:
    assert "36 planned, 0 reused" in label(metadata_timeline("decode", "lengths", 100))
    assert "1 planned, 35 reused" in label(metadata_timeline("decode", "lengths", 5000))


def test_a_larger_shrink_fills_longer_and_growth_fills_nothing() -> None:
    def tail_us(before: int, tokens: int) -> float:
        return float(re.findall(r"the tail, \d launches ([\d.]+) us", label(fill_explorer(before, tokens)))[0])

    assert tail_us(8192, 64) > tail_us(512, 64) > tail_us(65, 64) > tail_us(64, 64) == tail_us(1, 64)
    assert "everything, 8 launches" in label(fill_explorer(64, 64))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"verdict: got 2 for 3 steps, expected one per step"):
        timeline(STEPS, ["plan", "plan"], 8, "Key")
    with pytest.raises(ValueError, match="trace: got 'chat', expected one of"):
        metadata_timeline("chat")
    with pytest.raises(ValueError, match="key: got 'hash', expected one of"):
        metadata_timeline("decode", "hash")
