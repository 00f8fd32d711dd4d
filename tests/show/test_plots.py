"""Figures: what rows hold is drawn, with units, device and date, an alternative text, and the same bytes every time."""

import base64
import re
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dsv4ref.show import plots

DEVICE, DATE = "NVIDIA H200", "2026-10-01T12:00:00"
TIMES = {("B=1", "baseline"): 300.0, ("B=1", "optimised"): 100.0, ("B=9", "baseline"): 900.0, ("B=9", "peer"): 450.0}
BARS = [
    {"case": c, "variant": v, "p20_us": t * 0.9, "p50_us": t, "p80_us": t * 1.2, "device": DEVICE, "date": DATE}
    for (c, v), t in TIMES.items()
]
RATIO: dict[str, Any] = {
    "id": "moe_tiles",
    "case": "M=64",
    "device": DEVICE,
    "predicted": 1.5,
    "claimed": 1.0279,
    "ratio": 1.4,
    "ratio_ci": (1.3, 1.45),
    "date": DATE,
}
UNMEASURED = RATIO | {"device": "MI355X", "ratio": None, "ratio_ci": None, "date": None}
POINT: dict[str, Any] = {
    "label": "baseline",
    "bytes": 1e8,
    "flops": 2e10,
    "p50_us": 100.0,
    "percent": 25.0,
    "device": DEVICE,
    "date": DATE,
}
ROOF: dict[str, Any] = {"label": "HBM, bf16", "bandwidth_Bps": 4e12, "rate_flops": 800e12}


def texts(fig: Figure) -> str:
    """Everything written on a figure."""
    fig.draw_without_rendering()
    return "\n".join(item.get_text() for item in fig.findobj(Text) if isinstance(item, Text))


def only_axes(fig: Figure) -> Any:
    """The one drawing area, untyped: matplotlib types what it returns too widely to read numbers from."""
    (ax,) = fig.axes
    return ax


def test_bars_are_as_long_as_the_medians_with_whiskers_from_p20_to_p80() -> None:
    fig = plots.measured_bars(BARS, "Sparse decode")
    ax = only_axes(fig)
    assert sorted(patch.get_width() for patch in ax.patches) == [100, 300, 450, 900]
    ends = sorted(tuple(segment[:, 0]) for lines in ax.collections for segment in lines.get_segments())
    assert ends == [pytest.approx((0.9 * t, 1.2 * t)) for t in (100, 300, 450, 900)]
    assert ax.get_xscale() == "linear"
    assert ax.get_xlabel() == "time, us"
    written = texts(fig)
    for text in ("NVIDIA H200, 2026-10-01", "p20 to p80", "B=1", "B=9", "baseline", "optimised", "peer", "450 us"):
        assert text in written


def test_a_wide_span_takes_a_logarithmic_axis_that_says_so() -> None:
    ax = plots.measured_bars([*BARS, BARS[0] | {"case": "B=0", "p20_us": 9, "p50_us": 10, "p80_us": 11}]).axes[0]
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "time, us (log scale)"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: got none"),
        ([{k: v for k, v in BARS[0].items() if k != "date"}], r"rows\[0\]: no date"),
        ([BARS[0], BARS[1] | {"device": "MI300X"}], "got devices NVIDIA H200, MI300X, expected one"),
        ([BARS[0], BARS[0]], "2 rows for 1 bars"),
        ([BARS[0] | {"p80_us": 1.0}], "B=1, baseline: got p20 270.0, p50 300.0, p80 1.0 us"),
        ([BARS[0] | {"p20_us": -1.0}], "expected 0 < p20"),
    ],
)
def test_bars_refuse_rows_that_would_mislead(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.measured_bars(rows)


def test_predictions_claims_and_measurements_stand_on_one_line_per_row() -> None:
    fig = plots.predicted_vs_measured([RATIO, UNMEASURED])
    points = {
        str(line.get_label()): [(float(x), int(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in only_axes(fig).lines
        if not str(line.get_label()).startswith("_")
    }
    assert points == {
        "predicted": [(1.5, 0), (1.5, 1)],
        "claimed": [(1.0279, 0), (1.0279, 1)],
        "measured, 95 % interval": [(1.4, 0)],
    }
    interval = [line.get_xdata() for line in only_axes(fig).lines if list(line.get_xdata()) == [1.3, 1.45]]
    assert len(interval) == 1
    written = texts(fig)
    assert written.count("not measured") == 1
    assert "NVIDIA H200, 2026-10-01 · measured" in written


def test_figures_without_a_measurement_say_so() -> None:
    written = texts(plots.predicted_vs_measured([UNMEASURED]))
    assert "predictions and published figures only, not measured" in written
    assert "MI355X" in written


def test_a_published_figure_that_is_no_ratio_is_described_and_not_drawn() -> None:
    for claimed, said in (
        ("58 casts per step", "58 casts per step"),
        (["+2.79 % tok/s", "+1.9 % tok/s"], "+2.79 % tok/s, +1.9 % tok/s"),
        ([], "nothing"),
    ):
        fig = plots.predicted_vs_measured([RATIO | {"claimed": claimed}])
        assert "claimed" not in [str(line.get_label()) for line in fig.axes[0].lines]
        assert f"predicted 1.50×, claimed {said}, measured 1.40×" in str(fig.get_label())


def test_ratios_refuse_a_measurement_without_a_date_and_an_empty_figure() -> None:
    with pytest.raises(ValueError, match="measured without a date: moe_tiles, M=64"):
        plots.predicted_vs_measured([RATIO | {"date": None}])
    with pytest.raises(ValueError, match="no row has a predicted"):
        plots.predicted_vs_measured([UNMEASURED | {"predicted": None, "claimed": None}])


def test_the_roofline_puts_points_at_their_intensity_and_rate_and_bends_at_the_ridge() -> None:
    fig = plots.roofline([POINT], [ROOF], "Decode")
    ax = only_axes(fig)
    roof, point = ax.lines
    assert [float(v[0]) for v in point.get_data()] == pytest.approx([200.0, 200.0])  # FLOP/byte, TFLOP/s
    assert roof.get_data()[0][1] == pytest.approx(200.0)
    assert roof.get_data()[1][1:] == pytest.approx([800.0, 800.0])
    assert roof.get_data()[1][0] == pytest.approx(4.0 * roof.get_data()[0][0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("arithmetic intensity, FLOP/byte", "rate, TFLOP/s")
    written = texts(fig)
    for text in ("25 % of its bound", "4 TB/s, 800 TFLOP/s", "NVIDIA H200, 2026-10-01"):
        assert text in written


def test_the_roofline_refuses_nothing_and_zero() -> None:
    with pytest.raises(ValueError, match="points: got none"):
        plots.roofline([], [ROOF])
    with pytest.raises(ValueError, match="roofs: got none"):
        plots.roofline([POINT], [])
    with pytest.raises(ValueError, match="points: baseline: got bytes 0, flops"):
        plots.roofline([POINT | {"bytes": 0}], [ROOF])


def test_a_picture_carries_its_alternative_text_escaped() -> None:
    shown = plots.picture(plots.measured_bars(BARS), alt='a "quoted" <b>')
    assert shown.html.startswith('<img alt="a &quot;quoted&quot; &lt;b&gt;" src="data:image/svg+xml;base64,')
    assert str(shown) == 'a "quoted" <b>'
    own = plots.picture(plots.measured_bars(BARS, "Decode"))
    assert str(own).startswith("Decode, median times on NVIDIA H200, 2026-10-01. B=1, baseline: 300 us;")


def test_a_figure_without_a_description_is_refused() -> None:
    with pytest.raises(ValueError, match="alt: got ''"):
        plots.picture(Figure())


def svg(fig: Figure) -> str:
    found = re.search(r"base64,([^\"]+)", plots.picture(fig).html)
    assert found is not None
    return base64.b64decode(found[1]).decode()


def test_pictures_are_transparent_and_the_same_in_every_run() -> None:
    fig = plots.measured_bars(BARS)
    drawn = svg(fig)
    assert drawn == svg(plots.measured_bars(BARS))
    assert tuple(fig.get_facecolor())[-1] == 0
    assert only_axes(fig).get_facecolor()[3] == 0
    grounds = re.findall(r'<g id="patch_[12]">\s*<path[^>]*style="fill: (\S+?)[;"]', drawn)
    assert grounds == ["none", "none"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_text_and_the_first_three_colours_stand_out_from_light_and_dark_pages(page: str) -> None:
    for colour, least in ((plots.GREY, 4.0), *((c, 3.0) for c in plots.COLOURS[:3])):
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (colour, page)


def test_the_style_does_not_outlive_its_block() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["text.color"] == plots.GREY
    plots.measured_bars(BARS)
    assert dict(matplotlib.rcParams) == before
