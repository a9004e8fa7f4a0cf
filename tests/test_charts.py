"""charts.py: where values are drawn, which ticks axes have, and that texts are escaped."""

import math
from xml.etree.ElementTree import tostring

import numpy as np
import pytest

import charts
from charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, bar_chart, element, histogram_lines, line_chart, make_axis


def points_of(chart):
    """The coordinates of each line of a chart, without those of the legend."""
    lines = [own.get("points") for own in chart.iter("polyline")]
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_elements_escape_texts_and_attributes():
    made = element("p", "a < b ", element("b", "&"), " <script>", " end", class_="x", aria_label='"<')
    html = tostring(made, encoding="unicode", method="html")
    assert html == '<p class="x" aria-label="&quot;<">a &lt; b <b>&amp;</b> &lt;script&gt; end</p>'


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(0.013, 0.9), (1, 250), (2, 2), (0.001, 0.0011), (3e-5, 7e4)])
def test_axes_contain_their_values_and_have_readable_ticks(values, log):
    axis = make_axis("x", values, log)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 0 <= axis.share(values[0]) <= axis.share(values[1]) <= 1
    assert len(axis.ticks) <= 11 and (log or len(axis.ticks) >= 3)


def test_lines_are_drawn_where_their_values_are():
    chart = line_chart("t", "d", [Line("a", "c1", (0, 5, 10), (0, 10, 5))], ("x", "y"), marks=[(10, 5)])
    ((first, middle, last),) = points_of(chart)
    bottom = HEIGHT - charts.BOTTOM
    assert first == (LEFT, bottom)
    assert middle == pytest.approx(((LEFT + WIDTH - RIGHT) / 2, TOP))
    assert last == pytest.approx((WIDTH - RIGHT, (TOP + bottom) / 2))
    (mark,) = chart.iter("circle")
    assert (float(mark.get("cx")), float(mark.get("cy"))) == last


def test_decades_are_equally_far_apart_on_a_logarithmic_axis():
    chart = line_chart("t", "d", [Line("a", "c1", (0, 1, 2), (0.01, 0.1, 1))], ("x", "y"), (False, True))
    ((_, low), (_, middle), (_, high)) = points_of(chart)[0]
    assert low - middle == pytest.approx(middle - high, abs=0.11)


def test_points_that_cannot_be_drawn_are_left_out():
    chart = line_chart("t", "d", [Line("a", "c1", (1, 2, 3, 4), (0.0, math.nan, 1.0, 2.0))], ("x", "y"), (False, True))
    assert len(points_of(chart)[0]) == 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ys", [(0.0, 0.0), (-1e308, 1.7e308), (5e-324, 1.0), (1e29, 1e29), ()])
def test_any_values_of_a_log_file_can_be_drawn(ys, log):
    xs = range(len(ys))
    chart = line_chart("t", "d", [Line("a", "c1", xs, ys)], ("x", "y"), (False, log), list(zip(xs, ys)))
    html = tostring(chart, encoding="unicode")
    assert "nan" not in html and "inf" not in html


def test_each_line_is_in_the_legend_with_its_style():
    chart = line_chart("t", "d", [Line("a", "c1", (1, 2), (1, 2)), Line("b", "c2", (1, 2), (2, 1))], ("x", "y"))
    legend = {entry[0].tail: entry[0][0].get("class") for entry in chart.iter("li")}
    assert legend == {"a": "line c1", "b": "line c2"}
    assert [own.get("class") for own in chart.iter("polyline")] == ["line c1", "line c2"]


def test_histograms_share_their_bins_and_sum_to_100_percent():
    random = np.random.default_rng(0)
    first, second = histogram_lines({"a": random.random(50), "b": random.random(9) + 1}, ("c1", "c2"), bins=10)
    assert first.xs == second.xs
    for line in (first, second):
        assert line.ys[0] == line.ys[-1] == 0
        assert sum(line.ys[1:-1:2]) == pytest.approx(100)


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("t", "r", {"a": (2.0, "c1"), "b": (-1.0, "c2"), "c": (math.nan, "c3"), "d": (1.0, "c4")}, ".1f")
    lengths = [float(bar.get("width")) for bar in chart.iter("rect")]
    assert lengths[0] == 2 * lengths[3] > 0
    assert lengths[1:3] == [0, 0]
    assert [own.text for own in chart.iter("text") if own.get("class") == "value"] == ["2.0", "-1.0", "unknown", "1.0"]
    (reference,) = (own for own in chart.iter("line"))
    assert float(reference.get("x1")) == charts.LABELS + lengths[3]
    assert chart.find("svg").get("aria-label") == "t: a 2.0, b -1.0, c unknown, d 1.0"


def test_bars_without_any_value_are_drawn():
    chart = bar_chart("t", "r", {"a": (math.nan, "c1"), "b": (0.0, "c2")}, ".1f")
    assert [float(bar.get("width")) for bar in chart.iter("rect")] == [0, 0]
