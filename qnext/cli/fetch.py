"""Before `run` and `bench`: a published model is fetched, after a question where someone can answer it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.output import note

if TYPE_CHECKING:
    from qnext.config import Paths
    from qnext.pipeline.planning import PlannedModel
    from qnext.pipeline.request import Request

Yes = Annotated[
    bool, typer.Option("-y", "--yes", metavar="", help="Fetch the model without asking, if it is not here.")
]


def with_model_here(request: Request, paths: Paths, *, yes: bool) -> Request:
    """`request` with a model that is on this disk; fetched if need be.

    Raises ModelError when nobody agreed to that, and what planning and fetching raise.
    """
    from qnext.errors import ModelError
    from qnext.pipeline.fetching import fetch_planned, plan_published

    planned = plan_published(request, paths, note)
    if planned is None:
        return request
    if planned.model.here:
        return replace(request, model=planned.model.path)
    if not (yes or _asked(planned)):
        raise ModelError(
            f"{planned.model.ref} is not on this disk",
            hint=f"Add --yes to fetch it, or fetch it first: qnext pull {planned.model.ref}",
        )
    from qnext.cli.pull import transfer_bar

    with transfer_bar("fetching") as show:
        return replace(request, model=fetch_planned(planned, show))


def _asked(planned: PlannedModel) -> bool:
    """Show what would be fetched and how it should run, and ask; nobody to ask means no."""
    from qnext.report.plan_view import plan_line
    from qnext.report.words import forecast
    from qnext.units import format_bytes

    published = planned.model.published
    assert published is not None
    note(plan_line(planned.plan))
    note(f"forecast: decode {forecast(planned.plan.prediction.decode_tps)}")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    size = format_bytes(published.size_bytes)
    return typer.confirm(f"Fetch {published.repo} {published.quant}, {size}?", default=True, err=True)
