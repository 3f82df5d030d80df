"""Cells of a sweep measured outside of it: one by one as a grid, in rounds, two taking turns."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import psutil

from claims import CannotMeasure
from qnext.engine.turns import in_turns, running_ns
from qnext.pipeline.sweep_engine import SweepEngine
from qnext.pipeline.sweep_setup import Prepared
from qnext.pipeline.sweep_values import Cell, RungSize

_LIMIT_S = 300.0


def measure_grid(prepared: Prepared, repeats: int) -> tuple[dict[str, list[int]], float]:
    """(ns of the objective by cell, seconds in all): a warm-up and `repeats` turns of each, as llama-bench.

    Each way to place the weights is loaded once. Turns that fail are left out.
    """
    times: dict[str, list[int]] = {}
    cells = _by_group(prepared.live)
    began, number = time.monotonic(), 0
    with _engine(prepared) as engine:
        for done, cell in enumerate(cells):
            for _ in range(repeats):
                number += 1
                taken = engine.measure(cell, _whole_turn(prepared), number, _LIMIT_S)
                if taken.turn_ns is not None:
                    times.setdefault(cell.name, []).append(taken.turn_ns)
                else:
                    say(f"{cell.name}: {taken.status}, {taken.because}")
            if done % 10 == 0:
                say(f"grid: {done} of {len(cells)} cells, {time.monotonic() - began:.0f} s")
    if not times:
        raise CannotMeasure("no cell of the grid ran")
    return times, time.monotonic() - began


def measure_rounds(
    prepared: Prepared, cells: Sequence[Cell], *, rounds: int, turns: int
) -> dict[str, list[int]]:
    """Ns of the objective of each cell, the i-th ones of all taken near each other.

    A round loads each placement once and takes `turns` of each cell there, the order drawn anew for each; the
    rounds go there and back through the placements. Raises CannotMeasure for a cell that does not run.
    """
    chance, number = random.Random(2), 10_000
    times: dict[str, list[int]] = {cell.name: [] for cell in cells}
    groups = list(dict.fromkeys(cell.group for cell in _by_group(cells)))
    with _engine(prepared) as engine:
        for played in range(rounds):
            for group in groups if played % 2 == 0 else groups[::-1]:
                here = [cell for cell in cells if cell.group == group]
                for _ in range(turns):
                    for cell in chance.sample(here, len(here)):
                        number += 1
                        taken = engine.measure(cell, _whole_turn(prepared), number, _LIMIT_S)
                        while taken.status == "noisy":
                            number += 1
                            taken = engine.measure(cell, _whole_turn(prepared), number, _LIMIT_S)
                        if taken.turn_ns is None:
                            raise CannotMeasure(f"{cell.name} does not run again: {taken.because}")
                        times[cell.name].append(taken.turn_ns)
            say(f"round {played + 1}: { ({name: round(ns[-1] / 1e9, 3) for name, ns in times.items()}) }")
    return times


@dataclass(slots=True)
class Duellist:
    """A cell with an engine of its own. `helpers` compute for it besides its child: an RPC worker."""

    prepared: Prepared
    cell: Cell
    helpers: tuple[psutil.Process, ...] = ()
    members: list[psutil.Process] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


def measure_duel(one: Duellist, other: Duellist, *, count: int) -> tuple[list[int], list[int]]:
    """Ns of `count` workload turns of both, whole ones, each run while the other's processes are stopped.

    Both stay in memory and have the processor in turns (`qnext.engine.turns`), so that the i-th ones of both
    fell into the same moments. Raises CannotMeasure for a cell that does not run.
    """
    from tests.engine_processes import children

    sides = (one, other)
    with ExitStack() as stack:
        engines = [stack.enter_context(_engine(side.prepared)) for side in sides]
        for side, engine in zip(sides, engines, strict=True):
            there = children()
            _turn_of(side, engine, 0)
            side.members = [*(child for child in children() if child not in there), *side.helpers]
            side.spans.clear()
        for number in range(1, count + 1):
            work = [
                partial(_turn_of, side, engine, number) for side, engine in zip(sides, engines, strict=True)
            ]
            turns = in_turns([side.members for side in sides], work)
            for side, taken in zip(sides, turns, strict=True):
                side.turns += taken
    first, second = ([running_ns(side.turns, began, ended) for began, ended in side.spans] for side in sides)
    return first, second


def _turn_of(side: Duellist, engine: SweepEngine, number: int) -> None:
    began = time.perf_counter_ns()
    taken = engine.measure(side.cell, _whole_turn(side.prepared), 20_000 + number, None)
    if taken.status not in ("ok", "noisy"):
        raise CannotMeasure(f"{side.cell.name} does not run again: {taken.because}")
    side.spans.append((began, time.perf_counter_ns()))


def say(text: str) -> None:
    """A line for who waits."""
    print(text, file=sys.stderr, flush=True)


def _engine(prepared: Prepared) -> SweepEngine:
    planned = prepared.planned
    return SweepEngine(
        planned.model.path,
        replace(planned.problem, compute=None),
        objective=prepared.settings.objective,
        workload=prepared.settings.workload,
        seed=1,
        silence_limit_s=_LIMIT_S,
        depth_limit_s=_LIMIT_S,
    )


def _whole_turn(prepared: Prepared) -> RungSize:
    workload = prepared.settings.workload
    return RungSize(workload.prompt, workload.generate, workload.depth)


def _by_group(cells: Iterable[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: (cell.order, cell.group))
