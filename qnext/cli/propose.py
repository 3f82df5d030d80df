"""`qnext run` without MODEL: one that is on the disk already, else the best of the catalogue for this box."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import MODEL_HELP
from qnext.cli.output import note
from qnext.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from qnext.config import Paths
    from qnext.pipeline.request import Request

ModelOrBest = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Left out: the best one for this machine."),
]


def require_someone() -> None:
    """Raise UsageError where nobody can be asked which model to run."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "no MODEL is named, and there is no terminal to propose one on",
            hint="See what this machine can run: qnext plan --all; then: qnext run MODEL",
        )


def propose_model(request: Request, paths: Paths, *, yes: bool) -> Request:
    """`request` with a model for this machine: one on this disk if that is agreed to, else the best known.

    Whether to fetch the latter is asked later, when its headers have been read. `yes` agrees to the first.
    Raises DoesNotFitError when there is nothing to propose.
    """
    from qnext.pipeline.held_models import best_held
    from qnext.pipeline.ranking import rank_models
    from qnext.pipeline.surroundings import look_around, require_this_machine
    from qnext.report.words import forecast
    from qnext.units import format_bytes

    around = look_around(request, paths, note)
    require_this_machine(around)
    held = best_held(request, around)
    if held is not None:
        one = held.candidate
        speed = forecast(one.prediction.decode_tps if one.prediction else None)
        note(
            f"{held.title} {one.quant}, {format_bytes(one.size_bytes)}, is on this disk ({held.store}) and "
            f"fits; decode {speed}, quality: {one.word}"
        )
        if yes or typer.confirm("Run it?", default=True, err=True):
            return replace(request, model=held.path)
    refused = held.repo if held is not None else None
    best = rank_models(request, paths, note, surroundings=around).best(but=refused)
    if best is None:
        raise DoesNotFitError(
            "no model of the catalogue fits this machine",
            hint="See what each of them lacks: qnext plan --all; or try: qnext run demo",
        )
    one = best.candidate
    speed = forecast(one.prediction.decode_tps if one.prediction else None)
    note(
        f"proposed: {best.model.title} {one.quant}, {format_bytes(one.size_bytes)} to fetch, decode {speed}; "
        f"of those that {_EACH[best.tier]} it has the most parameters"
    )
    return replace(request, model=best.ref)


_EACH = {
    "good": "fit and answer fast enough in a quant that is not poor,",
    "by size": "fit by size (an estimate)",
    "slow or poor": "fit, though slow or in a poor quant,",
}
