"""A forecast from slices as one HTML file: the speeds, their charts, what a token's time goes into."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from qnext.report.forecast_view import bound_words, headline_words, measured_words, speed_rows, token_parts
from qnext.report.html_charts import MUTED, Axis, Chart, Line, Point
from qnext.report.html_figures import Figure
from qnext.report.html_page import drawings, legend, render_page
from qnext.report.words import digits

if TYPE_CHECKING:
    from qnext.pipeline.forecasting import Forecast


def forecast_page(forecast: Forecast) -> str:
    """The page, which needs no network."""
    shape = forecast.planned.model.shape
    parts = token_parts(forecast)
    total = sum(parts.values())
    figures = [*_depths(forecast), *_ubatches(forecast), *_splits(forecast)]
    return render_page(
        "forecast.html.j2",
        model=f"{shape.name or forecast.planned.plan.model_ref} {shape.quant or ''}".strip(),
        measured=measured_words(forecast),
        headline=headline_words(forecast),
        warnings=forecast.warnings,
        speeds=speed_rows(forecast),
        figures=[(figure, drawings(figure)) for figure in figures],
        legends=[legend(figure) for figure in figures],
        parts=[(name, ns / 1e6, ns / total) for name, ns in parts.items()],
        bound=bound_words(forecast),
    )


def _depths(forecast: Forecast) -> list[Figure]:
    """Decode over the tokens that came before, with both ends of the range."""
    if len(forecast.decode) < 2:
        return []
    lines = []
    for name, colour, dots, which in (
        ("forecast", 0, 4.0, "mid"),
        ("low", MUTED, 0.0, "low"),
        ("high", MUTED, 0.0, "high"),
    ):
        points = [(depth, getattr(speed, which)) for depth, speed in forecast.decode.items()]
        said = tuple(Point(depth, tps, f"after {depth:,}: {digits(tps)} t/s") for depth, tps in points)
        lines.append(Line(name, colour, said, dots=dots))
    ticks = tuple((float(depth), f"{depth:,}") for depth in forecast.decode)
    told = tuple(forecast.decode.items())
    first, last = told[0], told[-1]
    summary = (
        f"{digits(first[1].mid)} t/s after {first[0]:,} tokens, {digits(last[1].mid)} after {last[0]:,}."
    )
    chart = Chart("Decode over context", summary, Axis("tokens before", ticks), Axis("t/s"), tuple(lines))
    return [Figure("depths", "Longer conversations", summary, (chart,))]


def _ubatches(forecast: Forecast) -> list[Figure]:
    """Prefill over the tokens of a batch."""
    found = forecast.prefill_by_ubatch
    if len(found) < 2:
        return []
    points = tuple(
        Point(math.log2(size), tps, f"ubatch {size:,}: {digits(tps)} t/s") for size, tps in found.items()
    )
    ticks = tuple((math.log2(size), f"{size:,}") for size in found)
    planned = forecast.planned.plan.placement.ubatch
    summary = f"The plan has {planned:,}. A larger batch takes more memory for intermediate results."
    chart = Chart(
        "Prefill over ubatch", summary, Axis("ubatch", ticks), Axis("t/s"), (Line("forecast", 0, points),)
    )
    return [Figure("ubatches", "Long prompts", summary, (chart,))]


def _splits(forecast: Forecast) -> list[Figure]:
    """Decode and prefill over the number of expert layers in RAM, where there is another memory."""
    if len(forecast.neighbours) < 2:
        return []
    chosen = len(forecast.planned.plan.placement.cpu_expert_layers)
    charts = []
    tests: tuple[tuple[str, Literal["decode", "prefill"]], ...] = (
        ("Decode", "decode"),
        ("Prefill", "prefill"),
    )
    for word, test in tests:
        groups: dict[str, list[Point]] = {"fits": [], "does not fit": [], "planned": []}
        for one in forecast.neighbours:
            speed = getattr(one, test).mid
            point = Point(
                one.cpu_expert_layers, speed, f"{one.cpu_expert_layers} in RAM: {digits(speed)} t/s"
            )
            groups["fits" if one.fits else "does not fit"].append(point)
            if one.cpu_expert_layers == chosen:
                groups["planned"].append(point)
        lines = (
            Line("fits", 0, tuple(groups["fits"])),
            Line("does not fit", MUTED, tuple(groups["does not fit"])),
            Line("planned", 1, tuple(groups["planned"]), joined=False, dots=7),
        )
        planned = groups["planned"][0].y if groups["planned"] else 0.0
        charts.append(
            Chart(
                f"{word} over expert layers in RAM",
                f"With the planned {chosen}: {digits(planned)} t/s.",
                Axis("layers whose experts are in RAM"),
                Axis("t/s"),
                tuple(line for line in lines if line.points),
            )
        )
    note = f"The plan keeps the experts of {chosen} layers in RAM; fewer need more memory on devices."
    return [Figure("splits", "Experts in RAM", note, tuple(charts))]
