"""What each cell of a sweep has reached, by its stored measurements: while it runs, at its end, and later."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qnext.bench.race_values import Result
from qnext.pipeline.sweep_values import Cell
from qnext.store.record import Record
from qnext.store.sweeps import Measurement, StoredSweep


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell reached: medians of its `count` good measurements; None where there is none.

    `turn_s` is the objective's time. `gain` is the plan's time over the cell's, at its most likely by all
    that the sweep measured: medians of different moments may say otherwise, and a sweep without an end has
    nothing else.
    """

    cell: Cell
    status: str
    because: str
    count: int
    turn_s: float | None
    decode_tps: float | None
    prefill_tps: float | None
    gain: float | None
    record: Record | None = None

    @property
    def context(self) -> int:
        """Tokens that the cell has room for."""
        return self.cell.placement.context


def summarise_cells(
    sweep: StoredSweep, cells: Sequence[Cell], result: Result | None
) -> tuple[CellResult, ...]:
    """What each cell has reached so far; with a `result`, what the race says of those that were not run."""
    standings = {} if result is None else {one.arm: one for one in result.standings}
    taken: dict[int, list[Measurement]] = {place: [] for place in range(len(cells))}
    for one in sweep.measurements:
        if one.status is not None:
            taken[one.cell].append(one)
    found = []
    for place, cell in enumerate(cells):
        good = [one for one in taken[place] if one.status == "ok" and one.turn_ns]
        status, because = cell.status or "waiting", cell.because
        if good and (taken[place][-1].status in ("ok", "noisy", "too-slow")):
            status, because = "ok", ""
        elif taken[place]:
            last = taken[place][-1]
            status, because = last.status or "", last.because
        elif not cell.status and cell.name in standings:
            status, because = standings[cell.name].word, standings[cell.name].because
        found.append(
            CellResult(
                cell,
                status,
                because,
                len(good),
                turn_s=_median([(one.turn_ns or 0) / 1e9 for one in good]),
                decode_tps=_rate([ns for one in good for ns in one.token_ns], 1),
                prefill_tps=_median(
                    [(one.prompt or 0) * 1e9 / one.prefill_ns for one in good if one.prefill_ns]
                ),
                gain=None,
            )
        )
    gains = _gains(found, sweep, result)
    return tuple(replace(one, gain=gains.get(one.cell.name)) for one in found)


def _gains(found: Sequence[CellResult], sweep: StoredSweep, result: Result | None) -> dict[str, float]:
    """The plan's time over that of each cell that ran."""
    if result is None and sweep.result and "gains" in sweep.result:
        return dict(sweep.result["gains"])
    plan = next((one for one in found if "plan" in one.cell.roles), None)
    if plan is None or plan.turn_s is None:
        return {}
    ratios = {one.arm: one.ratio[1] for one in result.standings if one.ratio} if result else {}
    if plan.cell.name not in ratios:
        return {one.cell.name: plan.turn_s / one.turn_s for one in found if one.turn_s}
    own = ratios[plan.cell.name]
    return {
        one.cell.name: own / ratios[one.cell.name] for one in found if one.turn_s and one.cell.name in ratios
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _rate(times_ns: Sequence[int], tokens: int) -> float | None:
    return tokens * 1e9 / statistics.median(times_ns) if times_ns else None
