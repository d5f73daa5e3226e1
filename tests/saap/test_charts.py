"""Axes and the geometry of charts: places, ticks, shades, marks."""

import re

import pytest

from saap.axes import Axis, number, whole_ticks
from saap.charts import LEFT, SHADES, TOP, HeatRows, bars, heat_map, scatter


def cells(path: str) -> int:
    return path.count("M")


@pytest.mark.parametrize("values", [[0.5, 3.0], [-2.0, 5.0], [0.0, 1e-9], [1e-6, 4e3], [7.0, 7.0], [0.0, 0.0], [-3.0]])
def test_axes_hold_their_values_and_tick_round_numbers_in_order(values: list[float]) -> None:
    for axis in (Axis.around(values), Axis.around(values).padded()):
        assert all(0 <= axis.place(value) <= 1 for value in values)
        places = [place for place, _ in axis.ticks()]
        assert places == sorted(places) and 1 <= len(places) <= 7
        assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
        for place in (0.0, 0.3, 1.0):
            assert axis.place(axis.value(place)) == pytest.approx(place, abs=1e-9)


def test_ranges_of_decades_are_logarithmic_unless_something_is_negative() -> None:
    assert Axis.around([1e-3, 1.0]).log and not Axis.around([0.5, 1.0]).log and not Axis.around([-1e-3, 1.0]).log
    zeros = Axis.around([0.0, 1e-3, 1.0])
    assert zeros.log and zeros.place(0.0) == 0.0
    assert Axis.around([1e-30, 1.0]).low == pytest.approx(1e-9)  # further below than anyone can see
    assert [label for _, label in Axis(1e-6, 1e2, log=True).ticks()] == ["10⁻⁶", "10⁻⁴", "0.01", "1", "100"]
    assert [label for _, label in Axis(3, 40, log=True).ticks()] == ["5", "10", "20"]


def test_numbers_on_axes() -> None:
    assert [number(v) for v in (0, 0.25, 12000, 2.5e-5, 1e9, -4e-7)] == [
        "0",
        "0.25",
        "12,000",
        "2.5·10⁻⁵",
        "10⁹",
        "-4·10⁻⁷",
    ]
    assert number(float("inf")) == "inf"
    assert whole_ticks(80, 16) == list(range(0, 80, 5)) and whole_ticks(3, 16) == [0, 1, 2] == whole_ticks(3, 3)


def test_bars_scale_to_the_largest_layer_and_drop_labels_when_thin() -> None:
    chart = bars([100, 50], [25, 50], "channels")
    widths = [float(w) for w in re.findall(r"h([\d.]+)v", chart.before + chart.after)]
    assert widths == pytest.approx([widths[0], widths[0] / 2, widths[0] / 4, widths[0] / 2], abs=0.01)
    assert [text for _, _, text in chart.labels] == ["25", "50"] and not bars([8] * 80, [4] * 80, "heads").labels
    assert bars([4, 4], [0, 4], "heads").after.count("M") == 1  # an empty layer draws nothing


@pytest.mark.parametrize("layers", [1, 6, 80, 126])
def test_any_number_of_layers_fits_a_page(layers: int) -> None:
    frame = bars([8] * layers, [4] * layers, "heads").frame
    assert frame.total_height < 800 and frame.y_ticks[0][1] == "0"
    gaps = [b[0] - a[0] for a, b in zip(frame.y_ticks, frame.y_ticks[1:], strict=False)]
    assert all(gap >= 15 for gap in gaps)  # labels of 12 units do not overlap


def test_shades_cover_equally_many_cells_whatever_the_scale() -> None:
    values = [10.0**exponent for exponent in range(-9, 9)] * 2
    chart = heat_map(HeatRows([values[:18], values[18:]], cuts=[0.5, 0.25]), "share")
    assert [cells(path) for path in chart.shades] == [4] * SHADES
    assert chart.legend[0][1] == "10⁻⁹" and chart.legend[-1][1] == "10⁸" and chart.marks_are == "line"
    assert sum(map(cells, heat_map(HeatRows([[3.0] * 5]), "x").shades)) == 5  # equal values are one shade


def test_removed_heads_are_crossed_out_where_they_are() -> None:
    chart = heat_map(HeatRows([[1.0, 2.0], [3.0, 4.0]], removed=[[], [1]]), "KV head")
    (x, y), *_ = [tuple(map(float, pair)) for pair in re.findall(r"M([\d.]+) ([\d.]+)", chart.marks)]
    assert x > LEFT + chart.frame.width / 2 and y > TOP + chart.frame.height / 2
    assert cells(chart.marks) == 1 and chart.marks_are == "crosses"
    assert heat_map(HeatRows([[1.0], [2.0]], removed=[[], []]), "KV head").marks == ""


def test_kept_units_are_dots_and_removed_ones_crosses() -> None:
    chart = scatter([(1.0, 0.5, True), (2.0, 0.1, False), (3.0, 0.2, True)], "importance", "fluctuation")
    assert chart.kept.count("h0") == 2 and chart.removed.count("l4 4m-4 0l4-4") == 1
