"""The figures of a sweep's report: which cells go into which chart, and what the chart says in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnext.bench.pareto import pareto_front
from qnext.report.html_charts import COLOURS, MUTED, RULER, Axis, Chart, Line, Point
from qnext.report.words import digits, plural

if TYPE_CHECKING:
    from qnext.bench.knob_model import Level
    from qnext.pipeline.sweep_cell_results import CellResult

CURVES = 4
CONTENDERS = 5
QUANTILES = 60
_SHORT = {"threads": "t", "threads_batch": "tb", "ubatch": "ub", "batch": "b", "flash": "fa"}


@dataclass(frozen=True, slots=True)
class Figure:
    """Charts under one heading; `note` says what is seen, or why there is no chart."""

    id: str
    title: str
    note: str
    charts: tuple[Chart, ...] = ()


def over_knob(
    results: Sequence[CellResult], chosen: str, knob: str, title: str, unit: str, *, doubling: bool = False
) -> Figure:
    """Decode and prefill over the levels of a knob: lines join cells that differ in nothing else."""
    name = knob.replace(" ", "-")
    ran = [one for one in results if one.decode_tps and one.prefill_tps and knob in one.cell.knobs]
    levels = sorted({int(one.cell.knobs[knob]) for one in ran})
    if len(levels) < 2:
        what = f"all measured cells have {levels[0]:,}" if levels else "no cell was measured"
        return Figure(name, title, f"No curve of {unit}: {what}.")
    curves = _curves(ran, chosen, knob, results[0].cell.knobs)
    on_curves = {one.cell.name for _, cells in curves for one in cells}
    rest = [one for one in ran if one.cell.name not in on_curves]
    place: Callable[[float], float] = math.log2 if doubling else float
    ticks = tuple((place(level), f"{level:,}") for level in _thinned(levels))
    charts = []
    for word, speed in (("Decode", _decode), ("Prefill", _prefill)):
        lines = [
            Line(
                label,
                number,
                tuple(
                    Point(place(int(one.cell.knobs[knob])), speed(one), _said(one, speed)) for one in cells
                ),
            )
            for number, (label, cells) in enumerate(curves)
        ]
        dots = tuple(Point(place(int(one.cell.knobs[knob])), speed(one), _said(one, speed)) for one in rest)
        lines.insert(0, Line("other cells", MUTED, dots, joined=False, dots=3))
        best = max(ran, key=speed)
        summary = f"The fastest has {unit} {best.cell.knobs[knob]:,}: {digits(speed(best))} t/s."
        charts.append(Chart(f"{word} over {unit}", summary, Axis(unit, ticks), Axis("t/s"), _shown(lines)))
    note = "Lines join cells that differ in nothing else; every dot is the median of a cell."
    return Figure(name, title, note, tuple(charts))


def pareto_figure(results: Sequence[CellResult]) -> tuple[Figure, tuple[str, ...]]:
    """Decode against prefill, a colour per context, and the cells that no other beats in all three."""
    ran = [one for one in results if one.decode_tps and one.prefill_tps]
    title = "Decode, prefill and context"
    if not ran:
        return Figure("pareto", title, "No cell was measured."), ()
    front = [ran[i] for i in pareto_front([(_decode(one), _prefill(one), one.context) for one in ran])]
    names = {one.cell.name for one in front}
    lines = []
    for number, context in enumerate(sorted({one.context for one in ran}, reverse=True)):
        colour = number if number < COLOURS else MUTED
        mine = [one for one in ran if one.context == context]
        for on_front in (False, True):
            points = tuple(
                Point(_prefill(one), _decode(one), f"{one.cell.name}: {_both(one)}, context {one.context:,}")
                for one in mine
                if (one.cell.name in names) == on_front
            )
            label = f"context {context:,}: " + ("beaten by none" if on_front else "beaten")
            lines.append(Line(label, colour, points, joined=False, dots=6.5 if on_front else 3))
    ends = (
        f"{plural(len(front), 'cell')} of {len(ran)} {'is' if len(front) == 1 else 'are'} beaten by no other"
    )
    chart = Chart(
        "Decode against prefill",
        f"{ends}: {', '.join(one.cell.name for one in front[:5])}.",
        Axis("prefill, t/s"),
        Axis("decode, t/s"),
        _shown(lines),
    )
    note = f"{ends} in decode, prefill and context together (large dots); further up and right is faster."
    return Figure("pareto", title, note, (chart,)), tuple(one.cell.name for one in front)


def forecast_figure(results: Sequence[CellResult]) -> Figure:
    """Measured speeds over the forecast ones; on the rule they are equal."""
    title = "Forecast and measured"
    lines, notes = [], []
    for number, (word, speed) in enumerate((("decode", _decode), ("prefill", _prefill))):
        pairs = []
        for one in results:
            said = getattr(one.cell.prediction, f"{word}_tps")
            if said is not None and said.mid > 0 and getattr(one, f"{word}_tps"):
                pairs.append((said, one))
        points = tuple(
            Point(
                said.mid,
                speed(one),
                f"{one.cell.name}: {word} {digits(said.mid)} forecast, {digits(speed(one))} t/s",
            )
            for said, one in pairs
        )
        lines.append(Line(word, number, points, joined=False, dots=4))
        if pairs:
            ratio = statistics.median(speed(one) / said.mid for said, one in pairs)
            inside = sum(said.low <= speed(one) <= said.high for said, one in pairs)
            notes.append(
                f"{word}: half of the cells reached {ratio:.2f} times their forecast or more, "
                f"{inside} of {len(pairs)} lie in its range"
            )
    values = [value for line in lines for point in line.points for value in (point.x, point.y)]
    if not values:
        return Figure("forecast", title, "No measured cell had a forecast.")
    low, high = min(values), max(values)
    rule = Line("as forecast", RULER, (Point(low, low), Point(high, high)), dots=0)
    chart = Chart(
        "Measured over forecast",
        "; ".join(notes) + ".",
        Axis("forecast, t/s", log=True),
        Axis("measured, t/s", log=True),
        _shown([rule, *lines]),
    )
    return Figure("forecast", title, f"{'; '.join(notes).capitalize()}. Both axes are logarithmic.", (chart,))


def latency_figure(contenders: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """Share of decode steps that took at most so long, a curve for each of (name, ns of every step)."""
    title = "Time of each token"
    told = [(name, sorted(times)) for name, times in contenders if len(times) > 1][:CONTENDERS]
    if not told:
        return Figure("latency", title, "No decode steps were measured.")
    end_ms = max(percentile(times, 0.99) for _, times in told) * 1.15 / 1e6
    lines, cut = [], 0
    for number, (name, times) in enumerate(told):
        points = []
        for step in range(QUANTILES + 1):
            share = step / QUANTILES
            value = percentile(times, share) / 1e6
            if value <= end_ms:
                points.append(Point(value, 100 * share))
        cut += sum(time / 1e6 > end_ms for time in times)
        lines.append(Line(name, number, tuple(points), dots=0))
    medians = ", ".join(f"{name} {percentile(times, 0.5) / 1e6:.2f} ms" for name, times in told)
    chart = Chart(
        "Distribution of token times",
        f"Medians: {medians}.",
        Axis("ms per token"),
        Axis("% of steps", tuple((float(share), str(share)) for share in (0, 25, 50, 75, 100))),
        tuple(lines),
    )
    beyond = f" {plural(cut, 'slower step')} {'lies' if cut == 1 else 'lie'} beyond the chart." if cut else ""
    note = f"How many of the decode steps took at most so long; steeper and further left is better.{beyond}"
    return Figure("latency", title, note, (chart,))


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the ordered ones do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def difference_words(knobs: Mapping[str, Level], plan: Mapping[str, Level], without: str = "") -> str:
    """What differs from the plan's knobs, as cells are named; `as planned` for nothing."""
    changed = [
        f"{_SHORT.get(knob, knob)} {level}"
        for knob, level in knobs.items()
        if knob != without and level != plan.get(knob)
    ]
    return ", ".join(changed) or "as planned"


def _curves(
    ran: Sequence[CellResult], chosen: str, knob: str, plan: Mapping[str, Level]
) -> list[tuple[str, list[CellResult]]]:
    """Cells that differ in `knob` alone: those like the chosen one, like the plan, then the longest rows."""
    groups: dict[tuple[object, ...], list[CellResult]] = {}
    for one in ran:
        others = sorted((name, str(level)) for name, level in one.cell.knobs.items() if name != knob)
        groups.setdefault((tuple(others), one.context), []).append(one)

    def rank(cells: list[CellResult]) -> tuple[bool, bool, int]:
        names = [one.cell.name for one in cells]
        is_plan = any("plan" in one.cell.roles for one in cells)
        return chosen not in names, not is_plan, -len({one.cell.knobs[knob] for one in cells})

    kept = [cells for cells in groups.values() if len({one.cell.knobs[knob] for one in cells}) > 1]
    found = []
    for cells in sorted(kept, key=rank)[:CURVES]:
        cells.sort(key=lambda one: int(one.cell.knobs[knob]))
        found.append((difference_words(cells[0].cell.knobs, plan, knob), cells))
    return found


def _thinned(levels: Sequence[int]) -> Sequence[int]:
    """At most seven of them, for the axis."""
    step = math.ceil(len(levels) / 7)
    return levels[::step]


def _shown(lines: Sequence[Line]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line.points)


def _decode(one: CellResult) -> float:
    return one.decode_tps or 0.0


def _prefill(one: CellResult) -> float:
    return one.prefill_tps or 0.0


def _said(one: CellResult, speed: Callable[[CellResult], float]) -> str:
    return f"{one.cell.name}: {digits(speed(one))} t/s"


def _both(one: CellResult) -> str:
    return f"prefill {digits(_prefill(one))}, decode {digits(_decode(one))} t/s"
