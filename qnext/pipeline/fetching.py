"""A published model, before it is run: found on this disk, or planned, and fetched once that is agreed to."""

from __future__ import annotations

import os

from qnext.config import Paths
from qnext.models.download import OnProgress, download
from qnext.models.hub_cache import hub_folder
from qnext.pipeline.locate import OnHeaders, find_here
from qnext.pipeline.planning import PlannedModel, choose_quant_here, plan_chosen, require_fit
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice


def find_or_plan(
    request: Request, paths: Paths, notice: Notice, on_headers: OnHeaders | None = None
) -> str | PlannedModel:
    """The file to load where the model is on this disk, else the plan, which fits, for what is to be fetched.

    With the file here the network is asked only for what leaves the quant open, and nothing is planned yet
    but that choice. Nothing is fetched but headers. Raises DoesNotFitError, ModelError, DownloadError.
    """
    if request.model == "demo" or os.path.lexists(os.path.expanduser(request.model)):  # noqa: PTH111
        return request.model
    here = find_here(request.model, paths)
    if here is not None:
        return str(here)
    chosen = choose_quant_here(request, paths, notice, on_headers)
    if chosen.model.here:
        return chosen.model.path
    planned = plan_chosen(request, paths, chosen)
    require_fit(planned.plan)
    return planned


def fetch_planned(planned: PlannedModel, on_progress: OnProgress) -> str:
    """Fetch what is missing of a planned model; returns the file to load. Raises DownloadError."""
    assert planned.model.published is not None
    places = download(planned.model.published, hub_folder(os.environ), on_progress=on_progress)
    return str(places[0].path)
