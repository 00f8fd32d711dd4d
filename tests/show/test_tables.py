"""Tables: every text escaped, verdicts in words, unknown values shown as such, and one page that sorts offline."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4ref.evidence.timing import summarise
from dsv4ref.show import Html, tables
from dsv4ref.show.tables import Column, number, rich_table, scoreboard_html, table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>\"'&[bold]"
GATE = {"id": "output_passthrough", "case": "tiny", "gate": "bit", "passed": True, "detail": "0 of 4 bytes differ"}
SCORE: dict[str, Any] = {
    "id": "moe_tiles",
    "case": "M=1024",
    "device": "NVIDIA H200",
    "claimed": 1.0279,
    "predicted": 1.05,
    "ratio": 2.843,
    "ratio_ci": [2.79, 2.9],
    "noise_floor": 0.012,
    "baseline_us": 2669.9,
    "optimized_us": 941.21,
    "peers": {"FlashMLA": 321.9},
    "gate": True,
    "stale": False,
}
PREDICTED = SCORE | {
    "device": "MI355X",
    "ratio": None,
    "ratio_ci": None,
    "noise_floor": None,
    "baseline_us": None,
    "optimized_us": None,
    "peers": {},
    "gate": None,
    "stale": None,
}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (0, "0"),
        (65536, "65,536"),
        (0.0, "0"),
        (0.12345, "0.1235"),
        (941.21, "941.2"),
        (2669.9, "2,670"),
        (3.2e-7, "3.20e-07"),
        (4.29e12, "4.29e+12"),
        (float("nan"), "nan"),
        ("<b>", "<b>"),
        ([1024, 0.5], "1,024, 0.5"),
        ({"FlashMLA": 321.9}, "FlashMLA 321.9"),
        ([], "–"),
    ],
)
def test_numbers_keep_four_digits_and_unknown_is_a_dash(value: object, shown: str) -> None:
    assert number(value) == shown


def test_every_text_is_escaped_in_html_and_left_alone_in_plain_text() -> None:
    shown = table([{EVIL: EVIL}], [Column(EVIL, title=EVIL)], caption=EVIL)
    card = tables.device_card({EVIL: EVIL}, caption=EVIL, note=EVIL)
    page = scoreboard_html([SCORE | {"id": EVIL, "peers": {EVIL: 1.0}}], title=EVIL, note=EVIL)
    assert "<script" not in shown.html
    assert "<script" not in card.html
    assert page.count("<script") == 1  # the page's own
    assert "alert(1)&lt;/script&gt;&quot;&#x27;&amp;" in page
    assert shown.html.count("&lt;script&gt;") == 4  # label, caption, heading, cell
    assert card.html.count("&lt;script&gt;") == 4
    assert EVIL in shown.text


def test_a_table_shows_both_in_a_browser_and_as_plain_text() -> None:
    shown = table([{"kernel": "decode", "lds": 65536}, {"kernel": "merge", "lds": None}], ["kernel", "lds"], "ISA")
    assert isinstance(shown, Html)
    assert shown._repr_mimebundle_() == {"text/html": shown._repr_html_(), "text/plain": str(shown)}
    assert str(shown) == "ISA\nkernel     lds\n------  ------\ndecode  65,536\nmerge        –"
    assert shown.html.count("<tr>") == 3
    assert '<th scope="col"' in shown.html
    assert re.search(r'text-align:right[^>]*">65,536</td>', shown.html)


def test_tables_set_no_background_but_that_of_a_verdict() -> None:
    page = tables.gate_table([GATE, GATE | {"passed": False}]).html
    assert page.count("background:") == 2
    assert page.count("color:#fff") == 2
    assert "background" not in tables.device_card({"GPU": "none"}).html


def test_a_verdict_is_a_word_and_unknown_is_neither() -> None:
    rows = [GATE, GATE | {"passed": False}, GATE | {"passed": None}]
    assert re.findall(r"✓ pass|✗ FAIL|bit +–", tables.gate_table(rows).text) == ["✓ pass", "✗ FAIL", "bit   –"]
    caught = {"id": "x", "hazard": "H12", "caught": False, "detail": ""}
    assert "✗ MISSED" in tables.hazard_table([caught]).html
    with pytest.raises(ValueError, match="passed: got 1, expected a bool"):
        tables.gate_table([GATE | {"passed": 1}])


def test_a_missing_key_is_an_error_that_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]: no detail; it has id, case, gate, passed"):
        tables.gate_table([GATE, {key: value for key, value in GATE.items() if key != "detail"}])
    with pytest.raises(ValueError, match="columns: got 'id'"):
        table([], "id")


def test_an_empty_table_says_so() -> None:
    shown = tables.gate_table([])
    assert "no rows" in shown.html
    assert "no rows" in shown.text


def test_isa_rows_keep_every_count() -> None:
    row = dict.fromkeys(("vgpr", "agpr", "sgpr", "vgpr_spills", "lds", "waves_per_simd", "mfma"), 0) | {
        "kernel": "decode",
        "arch": "gfx942",
        "shape": "64x32, 8 warps",
        "vgpr_spills": 112,
        "lds": 65536,
    }
    line = tables.isa_table([row]).text.splitlines()[-1]
    assert re.split(r"  +", line) == ["decode", "gfx942", "64x32, 8 warps", "0", "0", "0", "112", "65,536", "0", "0"]


def test_the_scoreboard_gives_claim_prediction_and_measurement_with_interval() -> None:
    line = tables.scoreboard([SCORE]).text.splitlines()[-1]
    assert re.split(r"  +", line) == [
        "moe_tiles", "M=1024", "NVIDIA H200", "1.028×", "1.050×", "2.84× [2.79, 2.90]", "±1.2 %", "2,670", "941.2",
        "FlashMLA 321.9", "✓ passed", "current",
    ]  # fmt: skip


def test_the_scoreboard_reads_a_row_of_the_report() -> None:
    claims = ["+2.79 % tok/s (mi300x, PR 12)", "+1.9 % tok/s (mi300x, its text)"]
    row = SCORE | {"claimed": claims, "gate": "passed", "date": "2026-10-01", "resolvable": True, "variants": {}}
    text = tables.scoreboard([row, row | {"claimed": []}]).text
    assert "+2.79 % tok/s (mi300x, PR 12); +1.9 % tok/s (mi300x, its text)" in text
    assert text.count("✓ passed") == 2
    page = scoreboard_html([row | {"claimed": []}])
    assert 'data-sort="">–</td>' in page  # sorts among the unknown


def test_the_scoreboard_says_by_which_clock_once_a_row_is_of_the_hosts() -> None:
    device, host = SCORE | {"method": "graph"}, SCORE | {"method": "host"}
    assert "method" not in tables.scoreboard([device]).text
    lines = tables.scoreboard([device, host]).text.splitlines()[-2:]
    assert [re.split(r"  +", line)[3] for line in lines] == ["graph", "host"]


def test_what_was_not_measured_is_not_given_a_number() -> None:
    shown = tables.scoreboard([PREDICTED])
    assert re.split(r"  +", shown.text.splitlines()[-1])[5:] == ["not measured", "–", "–", "–", "–", "–"]
    assert "peers" not in shown.text  # nobody measured any
    assert "STALE" in tables.scoreboard([SCORE | {"stale": True}]).text


def test_not_resolvable_is_said_exactly_where_the_timing_says_it() -> None:
    wobble = [1 + 0.01 * ((7 * i) % 11 - 5) / 5 for i in range(20)]
    outside_alone = 0
    for scale in (1 + 0.002 * step for step in range(-20, 21)):
        noisier = [(1 + 3 * (w - 1)) / scale for w in wobble[5:] + wobble[:5]]
        samples = {"base": wobble, "again": wobble[3:] + wobble[:3], "fast": noisier}
        run = summarise(
            samples, baseline="base", again="again", method="graph", device_name="x", rotations=2, flush_bytes=1
        )
        ratio = run.ratios["fast"]
        row = SCORE | {"ratio": ratio.median, "ratio_ci": [ratio.low, ratio.high], "noise_floor": run.noise_floor}
        said = "not resolvable" in tables.scoreboard([row]).text
        assert said is not run.resolvable("fast"), (ratio, run.noise_floor)
        outside_alone += said and abs(ratio.median - 1) > run.noise_floor
    assert outside_alone > 0  # the ratio has left the floor, its interval has not


def test_the_terminal_shows_the_same_cells_and_reads_no_markup() -> None:
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table([SCORE | {"id": "[bold]x[/bold]"}, PREDICTED], tables.SCOREBOARD, caption="[red]board"))
    text = console.export_text()
    for cell in ("[bold]x[/bold]", "2.84× [2.79, 2.90]", "not measured", "✓ passed", "[red]board"):
        assert cell in text


def test_the_scoreboard_page_needs_nothing_from_outside() -> None:
    page = scoreboard_html([SCORE, PREDICTED])
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//\w|<link|\bsrc=|@import|url\(", page), "outside reference"
    assert page.count("<script>") == 1
    assert 'addEventListener("click"' in page
    assert "light dark" in page
    assert page.count('aria-sort="none"') == len(tables.SCOREBOARD)
    assert "$" not in page  # every placeholder was filled


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and there is none on PATH")
def test_clicking_a_header_sorts_by_number_and_the_filter_hides_rows(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    rows = [
        SCORE | {"id": "nine", "ratio": 9.0, "ratio_ci": None},
        PREDICTED | {"id": "none"},
        SCORE | {"id": "ten", "ratio": 10.0, "ratio_ci": None},
        SCORE | {"id": "one", "ratio": 1.5, "ratio_ci": None, "gate": False},
    ]
    path = tmp_path / "board.html"
    path.write_text(scoreboard_html(rows), encoding="utf-8")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())

        def ids() -> list[str]:
            return page.locator("tbody tr:visible td:first-child").all_inner_texts()

        assert ids() == ["nine", "none", "ten", "one"]
        ratio = page.get_by_role("button", name="measured [95 %]")
        ratio.click()
        assert ids() == ["one", "nine", "ten", "none"]  # as numbers, the unknown last
        ratio.press("Enter")
        assert ids() == ["ten", "nine", "one", "none"]
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("measured")
        page.get_by_role("button", name="id", exact=True).click()
        assert ids() == ["nine", "none", "one", "ten"]
        page.get_by_label("Filter").fill("fail")
        assert ids() == ["one"]
        assert page.locator("#count").inner_text() == "1 rows"
        browser.close()
    assert errors == []
