"""Charts as SVG inside a page: lines and dots over two axes, drawn by pygal, coloured by the page's own CSS.

A page for dark and light, desk and phone needs charts that take its colours and keep a readable size of
text. So each chart is drawn twice, wide and narrow, and the style sheet shows one of them; series have no
colour but the classes `color-0`, `color-1`… of the legend beside them. What pygal adds for pages of its own
(styles, scripts with an address, a tooltip) is taken out; a dot says what it is in a `<title>`, which
browsers show and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

SIZES = (("wide", 540, 330), ("narrow", 330, 290))
FONT_PX = 12
PADDING = 0.06
COLOURS = 6
MUTED, RULER = 6, 7
"""Colours of the style sheet after the six of the series: what is in the background, and straight rules."""


@dataclass(frozen=True, slots=True)
class Point:
    """A dot at (x, y); `said` is what it tells."""

    x: float
    y: float
    said: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one kind: joined by a line, shown as dots, or both. `colour` counts from 0."""

    name: str
    colour: int
    points: tuple[Point, ...]
    joined: bool = True
    dots: float = 4.0


@dataclass(frozen=True, slots=True)
class Axis:
    """`ticks` are (value, label); None: round ones. A `log` axis has room for positive values alone."""

    title: str
    ticks: tuple[tuple[float, str], ...] | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart; `summary` says in a sentence what is to be seen, for those who cannot see it."""

    title: str
    summary: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


def draw(chart: Chart) -> str:
    """Both sizes as SVG elements that stand in an HTML page as they are: every text in them is escaped."""
    return "\n".join(_svg(chart, name, width, height) for name, width, height in SIZES)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, within low..high."""
    rough = (high - low) / max(1, most - 1) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Values 1, 2, 5, 10… within low..high; powers of ten alone where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            break
    return found


def _svg(chart: Chart, name: str, width: int, height: int) -> str:
    from xml.etree import ElementTree

    import pygal
    from pygal.style import Style

    # One font for what is measured here and drawn by the browser.
    style = Style(font_family="sans-serif", label_font_size=FONT_PX, major_label_font_size=FONT_PX)
    drawing = pygal.XY(
        width=width,
        height=height,
        style=style,
        css=(),
        js=(),
        show_legend=False,
        no_prefix=True,
        disable_xml_declaration=True,
        margin=4,
        margin_right=14,
        truncate_label=-1,
        print_values=False,
    )
    shown = [line for line in chart.lines if line.points]
    narrow = width < 400
    drawing.xrange, drawing.x_labels = _axis(
        chart.x, [p.x for line in shown for p in line.points], 6 if narrow else 8
    )
    drawing.range, drawing.y_labels = _axis(chart.y, [p.y for line in shown for p in line.points], 8)
    for line in shown:
        drawing.add(
            "",
            [
                {"value": (_at(chart.x, point.x), _at(chart.y, point.y)), "label": point.said}
                for point in line.points
            ],
            stroke=line.joined,
            show_dots=line.dots > 0,
            dots_size=line.dots,
        )
    tree = drawing.render_tree()
    _keep_the_drawing(tree)
    for parent in tree.iter("g"):
        words = parent.get("class", "").split()
        if "series" in words:
            line = shown[int(next(word for word in words if word.startswith("serie-"))[6:])]
            parent.set("class", f"series color-{line.colour}")
    tree.set("class", f"drawing {name}")
    tree.set("role", "img")
    tree.set("aria-label", f"{chart.title}. {chart.summary}")
    tree.attrib.pop("id", None)
    return ElementTree.tostring(tree, encoding="unicode")


def _at(axis: Axis, value: float) -> float:
    return math.log10(value) if axis.log else value


def _axis(
    axis: Axis, values: Sequence[float], most: int
) -> tuple[tuple[float, float], list[dict[str, object]]]:
    """The range with some room at its ends, in the chart's own coordinates, and the labels."""
    ends = [_at(axis, value) for value in (*values, *(value for value, _ in axis.ticks or ()))]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = PADDING * (high - low) or (0.1 if axis.log else 0.05 * abs(high) or 1.0)
    low, high = low - room, high + room
    ticks: Iterable[tuple[float, str]]
    if axis.ticks is not None:
        ticks = axis.ticks
    elif axis.log:
        ticks = [(value, f"{value:,g}") for value in log_ticks(10**low, 10**high, most)]
    else:
        ticks = [(value, f"{value:,.10g}") for value in round_ticks(low, high, most)]
    return (low, high), [{"value": _at(axis, value), "label": label} for value, label in ticks]


def _keep_the_drawing(tree: Element) -> None:
    """Take out pygal's styles, scripts and tooltip; give each dot one title instead of its descriptions."""
    for parent in list(tree.iter()):
        for child in list(parent):
            if (
                not isinstance(child.tag, str)
                or child.tag in ("defs", "title")
                or {"tooltip-overlay", "text-overlay", "titles"} & set(child.get("class", "").split())
            ):  # a comment has no name
                parent.remove(child)
    for dots in tree.iter("g"):
        if dots.get("class") != "dots":
            continue
        told = next((child.text for child in dots if child.get("class") == "label"), None)
        for child in [child for child in dots if child.tag == "desc"]:
            dots.remove(child)
        for dot in dots:
            title = dot.makeelement("title", {})
            title.text = told
            dot.append(title)
