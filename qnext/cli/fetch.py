"""Before `run` and `bench`: a published model is fetched, after a question where someone can answer it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.output import note, progress_bar

if TYPE_CHECKING:
    from qnext.config import Paths
    from qnext.pipeline.locate import OnHeaders
    from qnext.pipeline.planning import PlannedModel
    from qnext.pipeline.request import Request

Yes = Annotated[
    bool, typer.Option("-y", "--yes", metavar="", help="Fetch the model without asking, if it is not here.")
]


@contextmanager
def header_bar(doing: str, *, silent: bool = False) -> Iterator[OnHeaders]:
    """A bar on stderr while headers of published models are read, and then `doing`; none where `silent`."""
    if silent:
        yield lambda done, total: None
        return
    with progress_bar(doing) as show:

        def move(done: int, total: int) -> None:
            show(done / total, f"reading headers: {done} of {total}" if done < total else doing)

        yield move


def with_model_here(request: Request, paths: Paths, *, yes: bool, silent: bool = False) -> Request:
    """`request` with a model that is on this disk; fetched if need be. `silent`: without progress bars.

    Raises ModelError when nobody agreed to that, and what planning and fetching raise.
    """
    from qnext.errors import ModelError
    from qnext.pipeline.fetching import fetch_planned, find_or_plan

    with header_bar(f"planning {Path(request.model).name}", silent=silent) as read:
        planned = find_or_plan(request, paths, note, read)
    if isinstance(planned, str):
        return replace(request, model=planned)
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
