"""The best model that is on this disk already, whichever program fetched it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

from qnext.errors import ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.hub_cache import find_cached
from qnext.models.shape import read_shape
from qnext.pipeline.choosing import weigh_model
from qnext.pipeline.locate import LocatedModel
from qnext.pipeline.planning import problem_on
from qnext.pipeline.ranking import READING_TPS, TIERS, tier_of
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Surroundings
from qnext.plan.quants import Candidate

MOST_READ = 20
"""Headers read at most, the largest models first: each takes up to a fifth of a second."""


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model in one of the caches, planned. `store` says whose cache it is, `repo` is None where unknown."""

    path: str
    store: str
    repo: str | None
    title: str
    candidate: Candidate


def best_held(request: Request, around: Surroundings) -> HeldModel | None:
    """The model on this disk that fits and comes first by the order of `rank_models`, None if none fits.

    Only models with a chat template: embeddings and draft heads lie in the same folders.
    """
    floor = READING_TPS if request.min_tps is None else request.min_tps
    found = sorted(
        (model for model in find_cached(os.environ).models if model.complete),
        key=lambda model: -model.size_bytes,
    )
    ranked = []
    for cached in found[:MOST_READ]:
        try:
            header = read_header(cached.path)
            shape = read_shape(header)
        except ModelError:
            continue
        if "tokenizer.chat_template" not in header.metadata:
            continue
        path = str(cached.path)
        model = LocatedModel(path, header, shape)
        candidate = weigh_model(model, problem_on(around.machine, model, request, around))
        if candidate.fits:
            parameters = sum(prod(tensor.shape) for tensor in header.tensors)
            place = TIERS.index(tier_of(candidate, floor)), -parameters, -candidate.quality, path
            title = shape.name or cached.path.name
            ranked.append((place, HeldModel(path, cached.store, cached.repo, title, candidate)))
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None
