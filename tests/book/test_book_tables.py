"""The generated tables say what their rows say, and refuse rows that contradict the book."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bookkit import tables

BOOK = Path(__file__).resolve().parents[2] / "book"
DOCUMENTS = {"decode": "chapters/05_decode.ipynb"}
HAZARDS = {
    "H01": {"name": "collision", "symptom": "noise | garbage", "cause": "bad key", "source": "vllm#1"},
    "H02": {"name": "rows", "symptom": "old data", "cause": "unwritten", "source": "aiter#2"},
}


def chapter(number: int, **hazards: tuple[str, ...]) -> SimpleNamespace:
    planted = {name: SimpleNamespace(ids=ids) for name, ids in hazards.items()}
    return SimpleNamespace(number=number, hazards=planted, gate=SimpleNamespace(name="bit" if number < 7 else "budget"))


def rows_of(markdown: str) -> list[str]:
    return [line for line in markdown.splitlines() if line.startswith("| ")][2:]


def test_hazards_name_the_chapters_that_plant_them() -> None:
    catalogue = {"decode": chapter(5, short=("H02",), long=("H02",)), "unrendered": chapter(7, other=("H02",))}
    first, second = rows_of(tables.hazard_table(HAZARDS, catalogue, DOCUMENTS))
    assert first == "| [H01]{#h01} | **collision**: noise \\| garbage | bad key | vllm#1 | no chapter yet | – |"
    assert second.endswith("| [05 decode](/chapters/05_decode.ipynb), 07 unrendered | 05 bit, 07 budget |")


def test_chapter_that_plants_an_unknown_hazard_is_named() -> None:
    with pytest.raises(ValueError, match=r"decode: hazard 'short' names 'H99', which is not in hazards\.toml"):
        tables.hazard_table(HAZARDS, {"decode": chapter(5, short=("H99",))}, {})


def test_hazard_without_a_cause_is_named() -> None:
    with pytest.raises(ValueError, match=r"hazards\.toml: H01 lacks \['cause'\]"):
        tables.hazard_table({"H01": {"name": "a", "symptom": "b", "source": "c"}}, {}, {})


def test_book_lists_all_hazards_in_order_with_every_field_on_one_line() -> None:
    hazards = tomllib.loads((BOOK / "hazards.toml").read_text(encoding="utf-8"))
    assert list(hazards) == [f"H{number:02}" for number in range(1, 43)]
    for number, hazard in hazards.items():
        assert hazard.keys() == tables.HAZARD_FIELDS, number
        assert all(text.strip() == text and "\n" not in text and text for text in hazard.values()), number


def report(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": "decode", "case": "flash-256", "device": "h200", "method": "graph", "baseline_us": 1682.74,
        "optimized_us": 244.51, "ratio": 6.882, "ratio_ci": [6.87, 6.9], "resolvable": True, "predicted": 7.0,
        "peers": {"FlashMLA": 88.9}, "gate": "passed", "stale": False, "date": "2026-01-02T03:04:05+00:00",
        "claimed": "+5.50 % tok/s, 2x MI300X; +1.00 % tok/s, B", "noise_floor": 0.004, "hazards": 9,
    }  # fmt: skip
    return row | changes


def test_scoreboard_row_shows_times_ratio_interval_and_peers() -> None:
    (row,) = rows_of(tables.scoreboard([report()], DOCUMENTS))
    assert row == (
        "| [decode](/chapters/05_decode.ipynb) | flash-256 | +5.50 %, +1.00 % | 7.00× | 6.88× [6.87, 6.90] "
        "| ±0.4 % | 1683 | 244.5 | FlashMLA 88.9 | passed | 9 | graph | 2026-01-02 | no |"
    )


def test_scoreboard_says_when_a_ratio_is_not_resolvable_or_stale_or_not_predicted() -> None:
    changes = {
        "ratio": 1.004,
        "ratio_ci": [0.99, 1.02],
        "resolvable": False,
        "stale": True,
        "predicted": None,
        "claimed": None,
        "peers": {},
    }
    (row,) = rows_of(tables.scoreboard([report(**changes)], {}))
    assert "| – | 1.004× [0.990, 1.020] not resolvable |" in row
    assert row.endswith("| 2026-01-02 | stale |")


def test_scoreboard_keeps_devices_apart() -> None:
    text = tables.scoreboard([report(device="mi300x"), report(), report(device="mi300x", case="tiny")], {})
    first, second = text.split("{rubric} mi300x")
    assert "{rubric} h200" in first
    assert len(rows_of(first)) == 1
    assert len(rows_of(second)) == 2
    assert tables.scoreboard([], {}) == "No measurement ships with the workbook yet.\n"


def test_unmeasured_chapters_show_predictions_per_device_and_what_is_not_known() -> None:
    listed: list[dict[str, Any]] = [
        {"id": "decode", "case": "flash-256", "predicted": {"a": 1.5, "b": None}, "gate": "bit", "hazards": 4},
        {"id": "tour", "case": None, "predicted": {}, "gate": "budget", "hazards": 11},
    ]
    text = tables.unmeasured_table(listed, ["a", "b"], DOCUMENTS)
    assert text.startswith(":::{div} sortable\n")
    assert "| Predicted, a | Predicted, b |" in text
    assert rows_of(text) == [
        "| [decode](/chapters/05_decode.ipynb) | flash-256 | 1.50× | – | bit | 4 |",
        "| tour | nothing to time | – | – | budget | 11 |",
    ]
    assert "Every chapter has a record." in tables.unmeasured_table([], ["a"], {})


def test_claims_are_quoted_with_device_source_and_note() -> None:
    claim = SimpleNamespace(
        what="throughput", before=4691.31, after=4822.24, unit="tok/s", gain_percent=2.791, device="2x MI300X",
        source="PR 12", note="the text says 1.9 %",
    )  # fmt: skip
    (row,) = rows_of(tables.claims_table({"decode": SimpleNamespace(claims=(claim,))}, {}))
    assert row == (
        "| decode | throughput; the text says 1.9 % | 4691.31 → 4822.24 tok/s (+2.79 %) | 2x MI300X | PR 12 |"
    )


def test_status_has_a_row_per_run_newest_first() -> None:
    def record(run: str, day: str, chapter: str) -> SimpleNamespace:
        return SimpleNamespace(
            run=run, date=f"{day}T10:00:00+00:00", chapter=chapter, device_name="NVIDIA H200", driver=None,
            torch="2.11.0", triton="3.6.0", python="3.12", commit="0123456789abcdef",
        )  # fmt: skip

    records = [
        record("a", "2026-01-01", "decode"),
        record("b", "2026-02-01", "decode"),
        record("b", "2026-02-01", "other"),
    ]
    markdown = tables.run_status(records, lambda one: one.chapter == "other", DOCUMENTS)
    newest, oldest = rows_of(markdown)
    assert newest.startswith(
        "| 2026-02-01 | NVIDIA H200 | driver –, torch 2.11.0, triton 3.6.0, Python 3.12 | `0123456789` |"
    )
    assert newest.endswith("| [decode](/chapters/05_decode.ipynb), other | 1 of 2 stale |")
    assert oldest.endswith("| 1 current |")


def test_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 cells"):
        tables.table(("a", "b"), [("x",)], "none")
