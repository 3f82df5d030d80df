"""The end of a sweep: who won against whom, the records, the saved profile.

The race's verdict compares the challenger with the best baseline. The other baselines are compared here, on
the pairs of the same duel alone: the measurements before it chose the challenger, and an arm picked as the
best of many looks better there than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.bench.names import Scenario
from qnext.bench.pareto import pareto_front
from qnext.bench.race_values import Result
from qnext.bench.verdict import Verdict, compare_paired
from qnext.config import Paths
from qnext.hardware import machine_fingerprint
from qnext.pipeline.planning import PlannedModel, with_path
from qnext.pipeline.recording import new_record, test_result
from qnext.pipeline.surroundings import require_this_machine
from qnext.pipeline.sweep_cell_results import CellResult, summarise_cells
from qnext.pipeline.sweep_values import Cell, Role, SweepSettings, problem_of
from qnext.pipeline.sweeping import SweepRun
from qnext.pipeline.tuned import (
    LIKELY_FASTER,
    TunedProfile,
    driver_of,
    memory_of,
    profile_name,
    save_profile,
)
from qnext.plan.plan import Plan, make_plan
from qnext.store.identity import utc_now
from qnext.store.record import Record, device_from_dict, record_to_dict
from qnext.store.results import ResultStore
from qnext.store.sweeps import Measurement, StoredSweep, SweepStore

SCHEMA = "qnext.sweep/1"


@dataclass(frozen=True, slots=True)
class SweepEnd:
    """A finished sweep. `against` holds the winner's verdict against each baseline that ran, by role.

    `front` are the names of the cells that no other beats in decode, prefill and context together; `plan` is
    the winner's, with its command line. `rival` is the challenger that no test has shown to be faster.
    `likely` is set where the winner was chosen without such a test: the chance, by all that was measured,
    that it takes less time than the best baseline.
    """

    sweep: StoredSweep
    settings: SweepSettings
    winner: CellResult
    results: tuple[CellResult, ...]
    against: Mapping[Role, tuple[str, Verdict | None]]
    front: tuple[str, ...]
    plan: Plan
    profile: TunedProfile
    loads: int
    rival: tuple[str, Verdict] | None = None
    likely: float | None = None

    def of_role(self, role: Role) -> CellResult | None:
        """The baseline, if it ran."""
        return next((one for one in self.results if role in one.cell.roles), None)


def conclude(run: SweepRun, paths: Paths, command: Sequence[str], loads: int) -> SweepEnd:
    """Judge a finished race, store a record of every cell that ran, save the winner as a profile."""
    results = summarise_cells(run.sweep, run.cells, run.result)
    by_name = {one.cell.name: one for one in results}
    winner_name = _winner(run.result, by_name)
    against = _against(run, winner_name)
    plan_name, verdict = against.get("plan", (winner_name, None))
    shown_faster = verdict is not None and verdict.word == "faster"
    if by_name[winner_name].cell.roles and by_name[plan_name].turn_s and not shown_faster:
        winner_name = plan_name  # of equal baselines the plan stays
        against = _against(run, winner_name)
    shown = {winner_name, *(one.cell.name for one in results if one.cell.roles)}
    results = tuple(
        replace(one, record=_record(run, one, command, "bench" if one.cell.name in shown else "sweep"))
        if one.count
        else one
        for one in results
    )
    records = [one.record for one in results if one.record is not None]
    ResultStore(paths.results_db).keep(records)
    winner = next(one for one in results if one.cell.name == winner_name)
    likely = _likely(run.result, winner_name)
    profile = _profile(run, winner, against, likely)
    save_profile(profile, paths)
    points = [one for one in results if one.decode_tps and one.prefill_tps]
    front = pareto_front([(one.decode_tps or 0, one.prefill_tps or 0, one.context) for one in points])
    store = SweepStore(paths.results_db)
    plan = _plan_of(run.planned, winner.cell)
    store.finish(
        run.sweep.id,
        "ok",
        result={
            "winner": winner_name,
            "profile": profile.name,
            "verdict": profile.verdict,
            "against": _against_to_dict(against),
            "likely": likely,
            "gains": {one.cell.name: one.gain for one in results if one.gain is not None},
            "llama_server_argv": list(plan.argv),
            "loads": loads,
            "cut_short": run.cut_short,
        },
        standings={place: (one.status, one.because) for place, one in enumerate(results)},
        records={place: one.record.id for place, one in enumerate(results) if one.record is not None},
    )
    return SweepEnd(
        sweep=store.get(run.sweep.id),
        settings=run.settings,
        winner=winner,
        results=results,
        against=against,
        front=tuple(points[index].cell.name for index in front),
        plan=plan,
        profile=profile,
        loads=loads,
        rival=_rival(run.result, winner_name),
        likely=likely,
    )


def sweep_to_dict(end: SweepEnd) -> dict[str, Any]:
    """The sweep as JSON, schema `qnext.sweep/1`.

    `baseline` is the plan's record, `fit` that of llama.cpp's own placement, `best` the winner's. An entry of
    `cells` has the keys of a record (id None where none was made) and beside them name, roles, status,
    because, knobs, environment, turn_s, decode_tps, prefill_tps, gain and count.
    """

    def record(one: CellResult | None) -> dict[str, Any] | None:
        return None if one is None or one.record is None else record_to_dict(one.record)

    return {
        "schema": SCHEMA,
        "id": end.sweep.id,
        "model": end.sweep.model,
        "objective": end.settings.objective,
        "baseline": record(end.of_role("plan")),
        "fit": record(end.of_role("fit")),
        "best": record(end.winner),
        "winner": end.winner.cell.name,
        "against": _against_to_dict(end.against),
        "rival": {"cell": end.rival[0], **_verdict_to_dict(end.rival[1])} if end.rival else None,
        "likely": end.likely,
        "pareto": list(end.front),
        "loads": end.loads,
        "llama_server_argv": list(end.plan.argv),
        "cells": [
            {
                **(record(one) or {"id": None, "tests": []}),
                "name": one.cell.name,
                "roles": list(one.cell.roles),
                "status": one.status,
                "because": one.because,
                "knobs": dict(one.cell.knobs),
                "environment": dict(one.cell.environment),
                "predicted_s": list(one.cell.predicted_s),
                "turn_s": one.turn_s,
                "decode_tps": one.decode_tps,
                "prefill_tps": one.prefill_tps,
                "gain": one.gain,
                "count": one.count,
            }
            for one in end.results
        ],
        "profile": end.profile.name,
    }


def _against_to_dict(against: Mapping[Role, tuple[str, Verdict | None]]) -> dict[str, Any]:
    return {
        role: {"cell": name, **(_verdict_to_dict(verdict) if verdict else {"word": None})}
        for role, (name, verdict) in against.items()
    }


def _winner(result: Result, results: Mapping[str, CellResult]) -> str:
    """The race's winner; where the race was ended before its test, the best baseline that ran."""
    assert result.winner is not None
    ran = [one for one in results.values() if one.cell.roles and one.turn_s and one.status == "ok"]
    if result.verdict is not None or results[result.winner].cell.roles or not ran:
        return result.winner
    return min(ran, key=lambda one: one.turn_s or 0.0).cell.name


def _rival(result: Result, winner: str) -> tuple[str, Verdict] | None:
    """The challenger where it did not win and was not shown to be slower."""
    challenger, verdict = result.challenger, result.verdict
    if challenger in (None, winner) or verdict is None or verdict.word == "slower" or verdict.ratio >= 1:
        return None
    return str(challenger), verdict


def _likely(result: Result, winner: str) -> float | None:
    """The chance that the winner is faster than the best baseline, where no test has shown it."""
    if winner != result.challenger or result.verdict is None or result.verdict.word == "faster":
        return None
    return result.likely


def _against(run: SweepRun, winner: str) -> dict[Role, tuple[str, Verdict | None]]:
    """The winner's verdict against each baseline that ran, from the duel."""
    names = [cell.name for cell in run.cells]
    racers = {cell.name for cell in run.cells if cell.roles} | {winner, run.result.challenger or winner}
    duel: list[Measurement] = []
    for one in reversed(run.sweep.measurements):
        if names[one.cell] not in racers:
            break
        duel.append(one)
    times: dict[str, list[int | None]] = {name: [] for name in racers}
    for one in reversed(duel):
        times[names[one.cell]].append(one.turn_ns if one.status == "ok" else None)
    found: dict[Role, tuple[str, Verdict | None]] = {}
    for cell in run.cells:
        pairs = [(a, b) for a, b in zip(times[winner], times.get(cell.name, []), strict=False) if a and b]
        for role in cell.roles:
            verdict = None
            if cell.name != winner and pairs:
                verdict = compare_paired(*zip(*pairs, strict=True), confidence=run.settings.confidence)
            if cell.name == run.result.against and winner == run.result.challenger:
                verdict = run.result.verdict
            found[role] = (cell.name, verdict)
    return found


def _plan_of(planned: PlannedModel, cell: Cell) -> Plan:
    if cell.placement == planned.plan.placement:
        return planned.plan
    problem = problem_of(replace(planned.problem, compute=None), cell.placement)
    plan = make_plan(planned.plan.model_ref, problem, planned.surroundings.speeds, placement=cell.placement)
    return with_path(plan, planned.model)


def _record(run: SweepRun, one: CellResult, command: Sequence[str], kind: Any) -> Record:
    """A record of all good measurements of a cell, a test for each size of prompt, answer and depth."""
    planned = replace(run.planned, plan=_plan_of(run.planned, one.cell), environment=one.cell.environment)
    place = run.cells.index(one.cell)
    mine = [told for told in run.sweep.measurements if told.cell == place]
    good = [told for told in mine if told.status == "ok"]
    facts = next((told.facts for told in mine if told.facts and "allocated" in told.facts), {})
    allocated: list[dict[str, Any]] = facts.get("allocated", [])
    samples: dict[Scenario, list[int]] = {}
    for told in good:
        prompt, depth = told.prompt or 0, told.depth or 0
        if prompt and told.prefill_ns:
            samples.setdefault(Scenario(prompt, 0, depth), []).append(told.prefill_ns)
        if told.token_ns:
            decode = Scenario(0, len(told.token_ns), depth + prompt)
            samples.setdefault(decode, []).append(sum(told.token_ns))
    record = new_record(
        planned,
        require_this_machine(run.planned.surroundings),
        kind,
        tuple(device_from_dict(device) for device in allocated),
        command,
        {"sweep": run.sweep.id, "tests": [test.name for test in samples]},
    )
    return replace(
        record,
        status="ok",
        tests=tuple(test_result(test, times, planned) for test, times in samples.items()),
    )


def _profile(
    run: SweepRun,
    winner: CellResult,
    against: Mapping[Role, tuple[str, Verdict | None]],
    likely: float | None,
) -> TunedProfile:
    surroundings, settings = run.planned.surroundings, run.settings
    machine, workload = surroundings.machine, settings.workload
    _, verdict = against.get("plan", ("", None))
    word: str = verdict.word if verdict else "not tested"
    if "plan" in winner.cell.roles:
        word = "the plan itself"
    elif likely is not None and word == "no difference shown":
        word = LIKELY_FASTER
    name = profile_name(run.planned.model.ref, run.sweep.model_digest, machine_fingerprint(machine))
    return TunedProfile(
        name=name,
        model=run.sweep.model,
        model_digest=run.sweep.model_digest,
        machine=run.sweep.machine,
        cpu=machine.cpu.model,
        engine=run.sweep.engine_build,
        driver=driver_of(machine),
        memory_bytes=memory_of(machine),
        when=utc_now(),
        sweep=run.sweep.id,
        objective=settings.objective,
        workload={"prompt": workload.prompt, "generate": workload.generate, "depth": workload.depth},
        turn_s=round(winner.turn_s or 0.0, 4),
        ratio=None if verdict is None else (verdict.ratio, verdict.low, verdict.high),
        verdict=word,
        placement=winner.cell.placement,
        environment=dict(winner.cell.environment),
    )


def _verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "word": verdict.word,
        "ratio": verdict.ratio,
        "low": verdict.low,
        "high": verdict.high,
        "confidence": verdict.confidence,
        "p_value": verdict.p_value,
        "pairs": verdict.pairs,
    }
