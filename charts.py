"""Charts for the report: numbers in, inline SVG out, as elements that escape every text they are given.

Colours, dashes and fonts are classes of the style sheet in report.html, so that charts follow light and dark pages.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 220  # units of a chart, about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 22, 22, 38  # margins
LARGEST = 1e30  # values that are drawn
BAR, LABELS = 22, 92  # height of a bar with its gap; width of the bars' labels


class Line(NamedTuple):
    """A line of a chart."""

    label: str
    style: str  # class of the style sheet
    xs: Sequence[float]
    ys: Sequence[float]


class Axis(NamedTuple):
    """A scale from values to positions."""

    label: str  # with the unit
    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at `low` to 1 at `high`."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)


def element(name: str, *content: str | Element, **attributes: str | float) -> Element:
    """Make an element of HTML or SVG; `aria_label` and `class_` stand for `aria-label` and `class`."""
    made = Element(name, {key.rstrip("_").replace("_", "-"): attribute(value) for key, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made


def attribute(value: str | float) -> str:
    """Return an attribute's value, numbers with at most one decimal."""
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def make_axis(label: str, values: Sequence[float], log: bool = False) -> Axis:
    """Return an axis that shows all values, which are positive if it is logarithmic, with ticks at round ones."""
    low, high = min(values, default=1), max(values, default=1)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    if not log:
        ticks = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
        return Axis(label, ticks[0], ticks[-1], ticks, log)
    steps = (1,) if high / low > 300 else (1, 3) if high / low > 20 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    low, high = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    return Axis(label, low, high, [tick for tick in ticks if low <= tick <= high], log)


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    labels: tuple[str, str],
    log: tuple[bool, bool] = (False, False),
    marks: Sequence[tuple[float, float]] = (),
) -> Element:
    """Draw lines as a figure with a title and a legend.

    Args:
        title: Above the chart.
        description: Of what the chart shows, for those who do not see it.
        lines: Points that an axis cannot show are left out, such as zeros on a logarithmic one.
        labels: Of the x axis and the y axis, with units.
        log: Whether each is logarithmic.
        marks: Points that are marked with a dot.
    """
    drawn_points = [drawable(zip(line.xs, line.ys), log) for line in lines]
    x = make_axis(labels[0], [across for points in drawn_points for across, _ in points], log[0])
    y = make_axis(labels[1], [up for points in drawn_points for _, up in points], log[1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = x.share(point[0]), y.share(point[1])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = draw_axes(x, y, place)
    for line, points in zip(lines, drawn_points):
        places = " ".join(f"{across:.1f},{down:.1f}" for across, down in map(place, points))
        drawn.append(element("polyline", points=places, class_=f"line {line.style}"))
    for across, down in map(place, drawable(marks, log)):
        drawn.append(element("circle", cx=across, cy=down, r=4, class_="mark"))
    entries = [element("li", swatch(line.style), line.label) for line in lines]
    return figure(title, element("ul", *entries, class_="legend"), picture(description, HEIGHT, drawn))


def drawable(points: Iterable[tuple[float, float]], log: tuple[bool, bool]) -> list[tuple[float, float]]:
    """Return the points that the axes can show; a log file may hold any number."""
    return [
        point
        for point in points
        if all(abs(value) < LARGEST and (value > 1 / LARGEST or not positive) for value, positive in zip(point, log))
    ]


def draw_axes(x: Axis, y: Axis, place: Callable[[tuple[float, float]], tuple[float, float]]) -> list[Element]:
    """Draw grid, ticks and labels."""
    drawn = []
    for tick in y.ticks:
        _, down = place((x.low, tick))
        drawn.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down, y2=down, class_="grid"))
        drawn.append(element("text", f"{tick:,.6g}", x=LEFT - 6, y=down + 4, class_="tick end"))
    for tick in x.ticks:
        across, _ = place((tick, y.low))
        drawn.append(element("line", x1=across, x2=across, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        drawn.append(element("text", f"{tick:,.6g}", x=across, y=HEIGHT - BOTTOM + 15, class_="tick middle"))
    drawn.append(element("text", y.label, x=4, y=12, class_="axis"))
    drawn.append(element("text", x.label, x=WIDTH - RIGHT, y=HEIGHT - 6, class_="axis end"))
    return drawn


def swatch(style: str) -> Element:
    """Draw a short line as in the chart, for the legend."""
    line = element("line", x1=0, x2=26, y1=5, y2=5, class_=f"line {style}")
    return element("svg", line, viewBox="0 0 26 10", width=26, height=10, aria_hidden="true")


def picture(description: str, height: float, drawn: Sequence[Element]) -> Element:
    """Return drawn elements as an SVG of WIDTH by `height`."""
    return element("svg", *drawn, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=description)


def figure(title: str, *content: Element) -> Element:
    """Return content as a figure with a title."""
    return element("figure", element("figcaption", title), *content, class_="chart")


def histogram_lines(values: Mapping[str, np.ndarray], styles: Sequence[str], bins: int = 24) -> list[Line]:
    """Return the outlines of histograms of sets of values, on the same bins, as percentages of each set."""
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    lines = []
    for (label, own), style in zip(values.items(), styles):
        shares = 100 * np.histogram(own, edges)[0] / len(own)
        heights = np.concatenate([[0], np.repeat(shares, 2), [0]])
        lines.append(Line(label, style, np.repeat(edges, 2).tolist(), heights.tolist()))
    return lines


def bar_chart(title: str, reading: str, bars: Mapping[str, tuple[float, str]], number: str) -> Element:
    """Draw values as labelled bars, with a line at the last one, which the others are read beside.

    Args:
        title: Above the chart.
        reading: Which way is better.
        bars: Value, and class of the style sheet, by label. Values that are not finite have no bar.
        number: Format of the values in text.
    """
    room = WIDTH - LABELS - 52  # for the longest bar; its value stands beside it
    finite = [value for value, _ in bars.values() if math.isfinite(value)]
    longest = max(map(abs, finite), default=0) or 1
    drawn, texts = [], []
    for row, (label, (value, style)) in enumerate(bars.items()):
        middle = row * BAR + BAR / 2
        length = room * max(0, value) / longest if math.isfinite(value) else 0
        text = f"{value:{number}}" if math.isfinite(value) else "unknown"
        texts.append(f"{label} {text}")
        drawn.append(element("text", label, x=LABELS - 8, y=middle + 4, class_="tick end"))
        drawn.append(element("rect", x=LABELS, y=row * BAR + 3, width=length, height=BAR - 6, class_=f"bar {style}"))
        drawn.append(element("text", text, x=LABELS + length + 6, y=middle + 4, class_="value"))
    last = list(bars.values())[-1][0]
    if math.isfinite(last):
        across = LABELS + room * max(0, last) / longest
        drawn.insert(0, element("line", x1=across, x2=across, y1=0, y2=len(bars) * BAR, class_="reference"))
    description = f"{title}: {', '.join(texts)}"
    return figure(title, element("p", reading, class_="reading"), picture(description, len(bars) * BAR, drawn))
