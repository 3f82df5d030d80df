"""The trip of `qnext bench sweep`: cells from the plan, a race between them, every step kept as it ends.

The race (`qnext.bench.racing`) is a function of its seed and its outcomes, so a sweep that was cut short is
told its stored outcomes again and goes on with the next step. What was running when the process or the
machine ended has a row without an outcome: it counts as crashed and is not tried again, unless it had run
well before, or is the plan itself and the machine stayed up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from qnext.bench.race_values import Outcome, Result, Step
from qnext.bench.racing import SETTINGS, Race
from qnext.config import Paths
from qnext.engine.child import silence_limit
from qnext.engine.crash import EngineCrashError
from qnext.errors import EngineError, QnextError, UsageError
from qnext.hardware import machine_fingerprint
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.surroundings import Notice, require_this_machine
from qnext.pipeline.sweep_engine import SweepEngine, Taken, race_status
from qnext.pipeline.sweep_setup import Prepared
from qnext.pipeline.sweep_values import (
    Cell,
    RungSize,
    SweepSettings,
    cell_from_dict,
    cell_to_dict,
    settings_from_dict,
    settings_to_dict,
)
from qnext.store.identity import model_digest, utc_now
from qnext.store.sweeps import Measurement, StoredCell, StoredSweep, SweepStore

SLOWEST = 6.0
"""A measurement is stopped after so many times what the fastest has taken."""
LEAST_LIMIT_S = 2.0
BASELINE_SHARE = 0.25
"""Of the budget: what a baseline, or the very first cell, may take for one measurement."""
OVERRUN, OVERRUN_S = 2.0, 20.0
"""Where a race is cut short: so many times its budget and so much beside, when the machine is far slower than
forecast."""
DEPTH_LIMIT_SHARE = 0.25
"""Of the budget: what reading the depth may take before a cell counts as too slow."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sweep stands after a step: `cell` gave `taken`; seconds of the budget."""

    number: int
    cell: Cell
    rung: str
    taken: Taken
    seconds: float
    spent_s: float
    race: Race


@dataclass(frozen=True, slots=True)
class SweepWatch:
    """What a caller may follow: the id once there is one, loads (0 to 1), steps as they begin and end."""

    on_start: Callable[[str, Race], None] | None = None
    on_load: Callable[[float], None] | None = None
    on_step: Callable[[Step, Cell], None] | None = None
    on_measured: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True)
class SweepRun:
    """A sweep that ended: what the race says, with everything measured; `cut_short`: not to its end."""

    sweep: StoredSweep
    planned: PlannedModel
    settings: SweepSettings
    cells: tuple[Cell, ...]
    result: Result
    cut_short: bool


def start_sweep(prepared: Prepared, paths: Paths) -> StoredSweep:
    """Store a sweep that this process owns."""
    planned, settings = prepared.planned, prepared.settings
    store = SweepStore(paths.results_db)
    sweep_id = store.create(
        model=settings.request.model,
        model_digest=model_digest(planned.model.header.paths),
        machine=machine_fingerprint(planned.surroundings.machine),
        engine_build=require_this_machine(planned.surroundings).digest,
        seed=settings.seed,
        settings=settings_to_dict(settings),
        cells=[
            StoredCell(cell.name, cell_to_dict(cell), cell.status or "waiting", cell.because)
            for cell in prepared.cells
        ],
    )
    return store.get(sweep_id)


def reopen_sweep(sweep: StoredSweep, paths: Paths, notice: Notice) -> Prepared:
    """What a stored sweep was about. Raises UsageError where model, machine or engine are others now."""
    settings = settings_from_dict(sweep.settings)
    planned = plan_model(settings.request, paths, notice)
    now = {
        "model": (sweep.model_digest, model_digest(planned.model.header.paths)),
        "machine": (sweep.machine, machine_fingerprint(planned.surroundings.machine)),
        "engine": (sweep.engine_build, require_this_machine(planned.surroundings).digest),
    }
    for what, (then, here) in now.items():
        if then != here:
            raise UsageError(
                f"the {what} is another one than when sweep {sweep.id} began",
                hint="Start a new sweep: leave out --resume.",
            )
    return Prepared(planned, settings, _cells_of(sweep))


def run_sweep(
    sweep: StoredSweep, prepared: Prepared, paths: Paths, watch: SweepWatch, *, resumed: bool = False
) -> SweepRun:
    """Race the cells to the end, from wherever the stored sweep stands.

    Ctrl-C and errors leave everything that was measured in the store, and go on to the caller.
    """
    store = SweepStore(paths.results_db)
    store.adopt(sweep.id)
    driver = _Driver(store, sweep, prepared, watch)
    try:
        driver.run(resumed)
    except (KeyboardInterrupt, BrokenPipeError):
        store.finish(sweep.id, "interrupted")
        raise
    except QnextError:
        store.finish(sweep.id, "failed")
        raise
    result = driver.race.result()
    if result.winner is None:
        store.finish(sweep.id, "failed")
        raise EngineError(
            "no configuration of the sweep ran",
            hint=f"See what happened: qnext run {sweep.model} --prompt Hello -v",
        )
    return SweepRun(
        store.get(sweep.id),
        prepared.planned,
        prepared.settings,
        prepared.cells,
        result,
        cut_short=driver.race.next() is not None,
    )


class _Driver:
    """Runs the steps of one race."""

    def __init__(self, store: SweepStore, sweep: StoredSweep, prepared: Prepared, watch: SweepWatch) -> None:
        self._store, self._sweep, self._prepared, self._watch = store, sweep, prepared, watch
        self._settings = prepared.settings
        self._places = {cell.name: number for number, cell in enumerate(prepared.cells)}
        self._begun: int | None = None
        self._ran = {one.cell for one in sweep.measurements if one.status == "ok"}
        self._fastest: dict[str, float] = {}
        self._second: tuple[int, str, Taken, float] | None = None
        settings = self._settings
        self.race = Race.restore(
            [cell.arm() for cell in prepared.live],
            {
                **{name: getattr(settings, name) for name in SETTINGS},
                "outcomes": [
                    {
                        "arm": prepared.cells[one.cell].name,
                        "rung": one.rung,
                        "status": race_status(one.status),
                        "turn_ns": one.turn_ns,
                        "seconds": one.seconds,
                    }
                    for one in sweep.measurements
                    if one.status is not None
                ],
            },
        )

    def run(self, resumed: bool) -> None:
        """Steps until the race is over."""
        self._settle_what_broke_off()
        if self._watch.on_start is not None:
            self._watch.on_start(self._sweep.id, self.race)
        settings, planned = self._settings, self._prepared.planned
        with SweepEngine(
            planned.model.path,
            replace(planned.problem, compute=None),
            objective=settings.objective,
            workload=settings.workload,
            seed=settings.seed,
            silence_limit_s=self._silence_limit_s(),
            depth_limit_s=max(5 * LEAST_LIMIT_S, DEPTH_LIMIT_SHARE * settings.seconds),
            on_load=self._watch.on_load,
        ) as engine:
            end_s = OVERRUN * settings.seconds + OVERRUN_S
            while (step := self.race.next()) is not None and self.race.spent_s < end_s:
                cell = self._prepared.cells[self._places[step.arm]]
                if self._watch.on_step is not None:
                    self._watch.on_step(step, cell)
                self._take(engine, step, cell)

    def _take(self, engine: SweepEngine, step: Step, cell: Cell) -> None:
        """One step: its row first where it may not come back, then the measurement, then its outcome."""
        settings, place = self._settings, self._places[cell.name]
        began = utc_now()
        risky = not engine.ready(cell) or place not in self._ran
        if risky:
            self._store.begin(self._sweep.id, step.number, place, step.rung)
        try:
            if settings.cooldown_s:
                time.sleep(settings.cooldown_s)
            taken, seconds = self._measure(engine, step, cell)
        except (KeyboardInterrupt, EngineCrashError):
            if risky:
                self._store.forget(self._sweep.id, step.number)
            raise
        if taken.status == "ok":
            self._ran.add(place)
            busy = (taken.prefill_ns or 0) + sum(taken.token_ns)
            self._fastest[step.rung] = min(self._fastest.get(step.rung, 1e9), busy / 1e9)
        self._observe(step, place, taken, seconds, began)
        if self._watch.on_measured is not None:
            progress = Progress(step.number, cell, step.rung, taken, seconds, self.race.spent_s, self.race)
            self._watch.on_measured(progress)

    def _measure(self, engine: SweepEngine, step: Step, cell: Cell) -> tuple[Taken, float]:
        """What the step gave and the seconds it took; what came of its partner waits for the next step."""
        second, self._second = self._second, None
        if second is not None and second[:2] == (step.number, step.arm):
            return second[2:]
        started = time.monotonic()
        size, limit_s = self._size(cell, step.rung), self._limit_s(cell, step)
        if step.partner is None:
            also = None if step.also is None else self._prepared.cells[self._places[step.also]]
            taken = engine.measure(cell, size, step.number, limit_s, step.keep, also)
            return taken, time.monotonic() - started
        partner = self._prepared.cells[self._places[step.partner]]
        size = max(size, self._size(partner, step.rung), key=lambda one: one.prompt)
        limit_s = max(limit_s, self._limit_s(partner, step))
        taken, other = engine.measure_both((cell, partner), size, step.number, limit_s)
        seconds = (time.monotonic() - started) / 2
        if engine.ready(partner):  # else one of them died
            self._second = step.number + 1, partner.name, other, seconds
        return taken, seconds

    def _observe(self, step: Step, place: int, taken: Taken, seconds: float, began: str) -> None:
        done = Measurement(
            number=step.number,
            cell=place,
            rung=step.rung,
            started_at=began,
            status=taken.status,
            because=taken.because,
            prompt=taken.prompt,
            depth=taken.depth,
            prefill_ns=taken.prefill_ns,
            token_ns=taken.token_ns,
            turn_ns=taken.turn_ns,
            seconds=seconds,
            rss_bytes=taken.rss_bytes,
            major_faults=taken.major_faults,
            facts=dict(taken.facts) or None,
        )
        self._store.end(self._sweep.id, done, taken.status, taken.because)
        self.race.observe(step, Outcome(race_status(taken.status), taken.turn_ns, seconds))

    def _settle_what_broke_off(self) -> None:
        """Judge the measurement that was running when the sweep's last process ended."""
        step = self.race.next()
        open_rows = [one for one in self._sweep.measurements if one.status is None]
        if step is None or not open_rows or open_rows[-1].number != step.number:
            return
        place = self._places[step.arm]
        cell, same_boot = self._prepared.cells[place], self._sweep.same_boot
        if same_boot and (place in self._ran or "plan" in cell.roles):
            return
        what = "the sweep's process ended" if same_boot else "the machine went down"
        taken = Taken("crashed", f"{what} while this was running; it is not tried again")
        self._observe(step, place, taken, 0.0, open_rows[-1].started_at)

    def _size(self, cell: Cell, rung: str) -> RungSize:
        """Tokens of a rung; a prompt of a whole ubatch at least, as far as the workload has one."""
        settings = self._settings
        size = settings.short if rung == "short" else settings.full
        wanted = min(settings.workload.prompt, cell.placement.ubatch)
        return replace(size, prompt=max(size.prompt, wanted))

    def _limit_s(self, cell: Cell, step: Step) -> float:
        fastest = self._fastest.get(step.rung)
        if cell.roles or fastest is None:
            return max(5 * LEAST_LIMIT_S, BASELINE_SHARE * self._settings.seconds)
        return max(LEAST_LIMIT_S, SLOWEST * fastest)

    def _silence_limit_s(self) -> float:
        """What the user set; else enough for a batch ten times slower than forecast."""
        if os.environ.get("QNEXT_ENGINE_TIMEOUT", "").strip():
            return silence_limit()
        slowest = max(cell.predicted_s[2] for cell in self._prepared.live)
        return min(silence_limit(), max(60.0, 10 * slowest))


def _cells_of(sweep: StoredSweep) -> tuple[Cell, ...]:
    """The cells as they were made: what was found out about them since is in the measurements."""
    measured = {one.cell for one in sweep.measurements}
    never = ("does-not-fit", "crashed")
    return tuple(
        cell_from_dict(
            cell.name,
            cell.config,
            *((cell.status, cell.because) if place not in measured and cell.status in never else ()),
        )
        for place, cell in enumerate(sweep.cells)
    )
