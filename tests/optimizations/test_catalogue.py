"""The catalogue: every chapter is found, described consistently, and named in errors about names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dsv4ref.optimizations
from dsv4ref.device import KNOWN_DEVICES
from dsv4ref.evidence import records
from dsv4ref.optimizations import catalogue
from dsv4ref.optimizations.base import Case, Hazard, Optimization, run_hazard, verify

CHAPTERS = tuple(catalogue.load())


def test_chapters_come_in_the_order_of_their_numbers() -> None:
    numbers = [chapter.number for chapter in catalogue.load().values()]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 3
    assert all(id == chapter.id for id, chapter in catalogue.load().items())


@pytest.mark.parametrize("id", CHAPTERS)
def test_a_chapter_says_where_it_stands_and_what_it_is_measured_on(id: str) -> None:
    chapter = catalogue.get(id)
    assert chapter.notebook == f"{chapter.number:02d}_{id}.ipynb"
    assert chapter.title
    assert chapter.part
    assert chapter.sources
    assert chapter.hazards, "a gate is shown failing"
    assert any(case.tiny for case in chapter.cases.values())
    # A chapter whose two sides are both the CPU reference times nothing, and no source of it can make a record stale.
    assert any(case.measured for case in chapter.cases.values()) == bool(chapter.measured_modules)
    assert not any(case.tiny and case.needs_gpu for case in chapter.cases.values())
    for module in chapter.measured_modules:
        assert len(records.module_sha256(module)) == 64


@pytest.mark.parametrize("id", CHAPTERS)
def test_every_case_has_a_prediction_on_every_device(id: str) -> None:
    """Counted everywhere, timed where the device publishes what the model needs."""
    chapter = catalogue.get(id)
    for case in chapter.cases.values():
        for key, spec in KNOWN_DEVICES.items():
            p = chapter.predict(case, key)
            assert 0 <= p.least_bytes <= min(p.baseline_bytes, p.optimized_bytes), (case.name, key)
            assert p.flops >= 0
            more = 1 if id == "split_k_decode" else 0  # a reduce is what splitting costs
            assert 0 <= p.optimized_launches <= p.baseline_launches + more
            assert p.ratio is None or spec.bandwidth_tb_s is not None, (case.name, key)
            if spec.bandwidth_tb_s is not None and p.flops > 0:  # an empty batch takes no time to compare
                assert p.ratio is not None, (case.name, key)
            if p.bound_us is not None and p.optimized_us is not None:
                assert p.bound_us <= p.optimized_us * (1 + 1e-9), (case.name, key)


@pytest.mark.parametrize("id", CHAPTERS)
def test_claims_are_published_figures_of_this_chapter(id: str) -> None:
    """A chapter about correctness alone has none; whoever claims a speed has its figures in the data file."""
    claims = catalogue.get(id).claims
    assert all(claim.chapter == id for claim in claims)
    assert all(claim.source and claim.device for claim in claims)


# --- names that are wrong --------------------------------------------------------------------------------------------


def test_an_unknown_chapter_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"id: no chapter is called 'decode_launch_shap'; nearest: decode_launch_shape"
    ):
        catalogue.get("decode_launch_shap")
    with pytest.raises(ValueError, match=r"id: no chapter is called 'zzz'; nearest: .*output_passthrough"):
        catalogue.get("zzz")


def test_selecting_nothing_selects_everything_and_keeps_the_given_order() -> None:
    assert tuple(c.id for c in catalogue.select([])) == CHAPTERS
    assert [c.id for c in catalogue.select(reversed(CHAPTERS))] == list(reversed(CHAPTERS))
    with pytest.raises(ValueError, match="id: no chapter is called 'nothing'"):
        catalogue.select([CHAPTERS[0], "nothing"])


def test_an_unknown_case_or_hazard_is_answered_with_the_known_ones() -> None:
    chapter = catalogue.get("output_passthrough")
    with pytest.raises(ValueError, match=r"case: got 'tinny', expected one of \[.*'tiny'.*\] for output_passthrough"):
        verify(chapter, "tinny", device="cpu", seed=0)
    with pytest.raises(
        ValueError, match=r"hazard: got 'alias', expected one of \[.*'shared-memory'.*\] for output_pass"
    ):
        run_hazard(chapter, "alias", device="cpu", seed=0)


# --- rows for listings -----------------------------------------------------------------------------------------------


def test_there_is_a_row_per_notebook_in_file_order() -> None:
    rows = catalogue.rows(())
    assert [row["number"] for row in rows] == sorted(row["number"] for row in rows)
    assert rows[0]["id"] == "start_here"
    assert {row["id"] for row in rows} == {page.id for page in catalogue.PAGES} | set(CHAPTERS)
    for row in rows:
        assert list(row) == ["id", "number", "title", "part", "gate", "notebook", "devices"]
        assert row["devices"] == []
        assert (row["gate"] is None) == (row["id"] not in CHAPTERS)
        assert row["notebook"] == f"{row['number']:02d}_{row['id']}.ipynb"


# --- adding a chapter ------------------------------------------------------------------------------------------------


@pytest.fixture
def add_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Put one more module into the package of chapters, for one test."""
    added: list[str] = []

    def add(name: str, change: str) -> None:
        (tmp_path / f"{name}.py").write_text(
            "from dataclasses import replace\n"
            "from dsv4ref.optimizations.output_passthrough import OPTIMIZATION as _known\n"
            f"OPTIMIZATION = replace(_known, {change})\n"
        )
        added.append(f"dsv4ref.optimizations.{name}")
        catalogue.load.cache_clear()

    monkeypatch.setattr(dsv4ref.optimizations, "__path__", [*dsv4ref.optimizations.__path__, str(tmp_path)])
    yield add
    for name in added:
        sys.modules.pop(name, None)
        monkeypatch.delattr(dsv4ref.optimizations, name.rpartition(".")[2], raising=False)
    catalogue.load.cache_clear()


def test_a_module_with_an_optimization_is_a_chapter(add_module: Callable[[str, str], None]) -> None:
    add_module("zz_new_chapter", "id='new_chapter', number=99")
    assert tuple(catalogue.load()) == (*CHAPTERS, "new_chapter")
    assert catalogue.rows(())[-1]["notebook"] == "99_new_chapter.ipynb"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("id='another'", "number: 6 is used by two chapters, expected each once"),
        ("id='another', number=0", "number: 0 is used by two chapters"),
        ("number=90", "id: output_passthrough is used by two chapters"),
        ("id='start_here', number=90", "id: start_here is used by two chapters"),
    ],
)
def test_ids_and_numbers_are_used_once(change: str, message: str, add_module: Callable[[str, str], None]) -> None:
    add_module("zz_double", change)
    with pytest.raises(ValueError, match=message):
        catalogue.load()


def _like_chapter_6(**changes: object) -> Optimization:
    known = catalogue.get("output_passthrough")
    return Optimization(**{**{f: getattr(known, f) for f in known.__dataclass_fields__}, **changes})


def test_a_hazard_must_name_a_case_of_its_chapter() -> None:
    hazard = Hazard("t", "s", "src", (), "nowhere", lambda inputs: {})
    with pytest.raises(ValueError, match=r"hazards\['h'\].case: got 'nowhere', expected one of \["):
        _like_chapter_6(hazards={"h": hazard})


def test_a_case_must_go_by_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"cases\['a'\]: the case calls itself 'b'"):
        _like_chapter_6(cases={"a": Case("b", {})}, hazards={})
