"""Of several quants of one model the one for this machine: each planned by arithmetic, one chosen."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from qnext.models.quality import quality_of
from qnext.pipeline.locate import LocatedModel
from qnext.plan.options import Preference
from qnext.plan.placement import Problem
from qnext.plan.quants import Candidate, Offer, choose_quant, weigh
from qnext.plan.values import Reason


def choose_model(
    weighed: Sequence[tuple[Candidate, LocatedModel]], prefer: Preference, min_tps: float | None
) -> tuple[LocatedModel, tuple[Candidate, ...], Reason | None]:
    """(the quant to take, all of them with the best first, why); the smallest where none fits."""
    ordered = sorted(weighed, key=lambda pair: (pair[0].quality, pair[0].size_bytes), reverse=True)
    candidates = tuple(candidate for candidate, _ in ordered)
    chosen, reason = choose_quant(candidates, prefer, min_tps)
    if chosen is None:
        return min((model for _, model in ordered), key=lambda m: m.header.file_bytes), candidates, None
    return next(model for candidate, model in ordered if candidate is chosen), candidates, reason


def weigh_model(model: LocatedModel, problem: Problem) -> Candidate:
    """One quant of a model, planned and with what is known of its quality."""
    published = model.published
    name = published.quant if published else model.shape.quant or "unknown"
    size = published.size_bytes if published else model.header.file_bytes
    parameters = sum(prod(tensor.shape) for tensor in model.header.tensors)
    quality = quality_of(name, model.shape.arch, size_bytes=size, params=parameters)
    return weigh(Offer(name, size, problem, quality.score, quality.word, quality.poor, quality.source))
