"""A published model that is not here, before it is run: planned, and fetched once that is agreed to."""

from __future__ import annotations

import os

from qnext.config import Paths
from qnext.models.download import OnProgress, download
from qnext.models.hub_cache import hub_folder
from qnext.pipeline.planning import PlannedModel, plan_model, require_fit
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice


def plan_published(request: Request, paths: Paths, notice: Notice) -> PlannedModel | None:
    """The plan for a model that is named by its repository, which fits; None for one named by its path.

    Nothing is fetched but headers. Raises DoesNotFitError, ModelError, DownloadError.
    """
    if request.model == "demo" or os.path.lexists(os.path.expanduser(request.model)):  # noqa: PTH111
        return None
    planned = plan_model(request, paths, notice)
    if planned.model.published is None:
        return None
    require_fit(planned.plan)
    return planned


def fetch_planned(planned: PlannedModel, on_progress: OnProgress) -> str:
    """Fetch what is missing of a planned model; returns the file to load. Raises DownloadError."""
    assert planned.model.published is not None
    places = download(planned.model.published, hub_folder(os.environ), on_progress=on_progress)
    return str(places[0].path)
