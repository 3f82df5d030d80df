"""What a sweep found, in words: the chosen cell, the stored verdicts against each baseline, what to do next.

Verdicts are the stored ones, never made anew from the medians: the race counts its looks at the pairs, and a
second judgement here could say something else. Without a stored result nothing is called a winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnext.hardware.redact import redact_text
from qnext.report.words import chance, interval, plural

if TYPE_CHECKING:
    from qnext.pipeline.sweep_cell_results import CellResult
    from qnext.pipeline.sweep_values import SweepSettings
    from qnext.store.sweeps import StoredSweep

ROLES = {"plan": "the plan", "fit": "llama.cpp's own fit", "defaults": "llama.cpp's defaults"}
OBJECTIVES = {"turn": "per turn", "decode": "of decode", "prefill": "of prefill"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The chosen cell against a baseline: `said` in words, figures where it was tested."""

    label: str
    word: str
    said: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int | None = None


def chosen_cell(sweep: StoredSweep, results: Sequence[CellResult]) -> CellResult | None:
    """The stored winner; while there is none, the cell with the least median time."""
    named = (sweep.result or {}).get("winner")
    ran = [one for one in results if one.turn_s and one.status == "ok"]
    found = next((one for one in results if one.cell.name == named), None)
    return found or min(ran, key=lambda one: one.turn_s or 0.0, default=None)


def comparisons_of(
    sweep: StoredSweep, results: Sequence[CellResult], settings: SweepSettings
) -> tuple[Comparison, ...]:
    """The stored verdicts, for each baseline one."""
    if sweep.result is None:
        return ()
    per = OBJECTIVES[settings.objective]
    winner, against = sweep.result.get("winner"), sweep.result.get("against", {})
    found = []
    for role, label in ROLES.items():
        cell = next((one for one in results if role in one.cell.roles), None)
        told = against.get(role) or {}
        if cell is None:
            found.append(Comparison(label, "not run", _absence(role, results)))
        elif cell.cell.name == winner:
            found.append(Comparison(label, "chosen", "this is the chosen configuration"))
        elif told.get("word") is None:
            why = (
                "no time was left for it"
                if cell.status == "ok"
                else f"{cell.status}: {redact_text(cell.because)}"
            )
            found.append(Comparison(label, "not tested", f"not tested, {why}"))
        else:
            between = interval(told["low"], told["high"], told["confidence"], told["pairs"])
            found.append(
                Comparison(
                    label,
                    told["word"],
                    f"{_difference(told['word'], told['ratio'], per)} ({between})",
                    told["ratio"],
                    told["low"],
                    told["high"],
                    told["pairs"],
                )
            )
    return tuple(found)


def _absence(role: str, results: Sequence[CellResult]) -> str:
    refused = next((one for one in results if role == "fit" and "fit" in one.cell.name and one.because), None)
    if refused is not None:
        return f"not run, {refused.status}: {redact_text(refused.because)}"
    return "not run: it cannot be asked here, or does not fit"


def _difference(word: str, ratio: float, per: str) -> str:
    if word == "faster":
        return f"{1 - ratio:.1%} less time {per}"
    return f"{ratio - 1:.1%} more time {per}" if word == "slower" else "no difference shown"


def headline(
    sweep: StoredSweep,
    results: Sequence[CellResult],
    chosen: CellResult | None,
    comparisons: Sequence[Comparison],
    settings: SweepSettings,
) -> str:
    """What was found, in a sentence or two."""
    if chosen is None:
        return f"None of the {plural(len(results), 'configuration')} gave a figure, so nothing is known yet."
    per, ran = OBJECTIVES[settings.objective], sum(one.count > 0 for one in results)
    if sweep.result is None:
        return (
            f"The fastest so far is “{chosen.cell.name}” with {seconds(chosen.turn_s)} {per}, of {ran} "
            f"measured of {plural(len(results), 'configuration')}. It was not tested against the plan, so "
            "nothing is proven yet."
        )
    plan = next((one for one in comparisons if one.label == ROLES["plan"]), None)
    if plan is None or plan.word == "chosen":
        first = (
            "The plan is the only configuration, and it runs."
            if len(results) == 1
            else f"The plan stays: none of {len(results) - 1} other configurations was shown to be faster."
        )
    elif plan.ratio is None:
        first = f"“{chosen.cell.name}” is chosen; against the plan it was not tested."
    else:
        first = f"“{chosen.cell.name}” against the plan: {plan.said}."
    fit = next((one for one in comparisons if one.label == ROLES["fit"]), None)
    second = "" if fit is None else f" Against {fit.label}: {fit.said}."
    if fit is not None and fit.word == "chosen":
        second = " It is llama.cpp's own fit."
    likely = sweep.result.get("likely")
    if likely is not None:
        second += (
            f" With what was measured before that test, it is {chance(likely)} likely to be faster than the "
            "best of them."
        )
    return first + second


def warning(sweep: StoredSweep, results: Sequence[CellResult]) -> str:
    """What keeps the figures from being the last word; empty where nothing does."""
    waiting = sum(one.status == "waiting" for one in results)
    left = f"; {plural(waiting, 'cell')} still waiting" if waiting else ""
    if sweep.status == "ok":
        return "It ended before its test was done." if (sweep.result or {}).get("cut_short") else ""
    state = {"running": "is still running", "interrupted": "was cut short", "failed": "failed"}[sweep.status]
    return f"This sweep {state}{left}. Go on with: qnext bench sweep {sweep.id} --resume"


def seconds(value: float | None) -> str:
    from qnext.report.sweep_view import seconds_words

    return seconds_words(value)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}"
