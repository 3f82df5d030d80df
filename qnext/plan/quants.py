"""Which quant of a model to take on one machine: each planned, then one chosen by what the user prefers.

A better quant answers better and reads more bytes per token; where both fit the choice is a matter of taste,
so it is stated: `quality` takes the best that fits, `speed` the fastest that is not poor, `balanced` the best
that costs no more than a third of the speed of the fastest good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qnext.plan.ceiling import longest_context
from qnext.plan.choice import choose_placement
from qnext.plan.options import Preference
from qnext.plan.placement import Placed, Problem
from qnext.plan.reasons import layers_with_experts_in_ram
from qnext.plan.turn import forecast
from qnext.plan.values import Prediction, Reason

BALANCED_SHARE = 0.67
"""The part of the fastest good quant's decode speed that `balanced` keeps at least."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One quant to be weighed: its name, size, problem, and how good it is.

    `quality` is any number that orders (higher is better), `word` says it for people, `poor` marks quants
    that nobody should be given unasked, `quality_source` says what the order rests on.
    """

    quant: str
    size_bytes: int
    problem: Problem
    quality: float
    word: str
    poor: bool
    quality_source: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One quant as it would run here. `context_ceiling` is the longest context that fits, None if none does.

    `where` says in words what lies where; `missing` is bytes per device where it does not fit.
    """

    quant: str
    size_bytes: int
    fits: bool
    where: str
    prediction: Prediction | None
    context_ceiling: int | None
    quality: float
    word: str
    poor: bool
    quality_source: str
    missing: Mapping[str, int]


def weigh(offer: Offer) -> Candidate:
    """Plan one quant."""
    problem = offer.problem
    placed = choose_placement(problem)
    prediction = None
    if placed.fits and problem.speeds is not None:
        prediction, _ = forecast(
            problem, placed.placement, placed.memory.devices, problem.speeds, problem.options.workload
        )
    return Candidate(
        quant=offer.quant,
        size_bytes=offer.size_bytes,
        fits=placed.fits,
        where=_where(placed, problem) if placed.fits else "",
        prediction=prediction,
        context_ceiling=longest_context(problem, placed) if placed.fits else None,
        quality=offer.quality,
        word=offer.word,
        poor=offer.poor,
        quality_source=offer.quality_source,
        missing=placed.missing,
    )


def choose_quant(
    candidates: Sequence[Candidate], prefer: Preference = "balanced", min_tps: float | None = None
) -> tuple[Candidate | None, Reason | None]:
    """The quant to take and why; (None, None) when none fits.

    With `min_tps` those forecast slower (middle of the range) are passed over, unless none is as fast: then
    the fastest is taken.
    """
    fitting = [one for one in candidates if one.fits]
    if not fitting:
        return None, None
    fast = [one for one in fitting if min_tps is None or _decode(one) >= min_tps]
    if not fast:
        best = max(fitting, key=_decode)
        why = f"none reaches {min_tps:g} t/s; this is the fastest"
        return best, _reason(best, why, candidates)
    good = [one for one in fast if not one.poor] or fast
    if prefer == "speed":
        best, why = max(good, key=lambda one: (_decode(one), one.quality)), "the fastest that is not poor"
    elif prefer == "quality":
        best, why = max(good, key=lambda one: (one.quality, _decode(one))), "the best that fits"
    else:
        floor = BALANCED_SHARE * max(map(_decode, good))
        quick = [one for one in good if _decode(one) >= floor]
        best = max(quick, key=lambda one: (one.quality, _decode(one)))
        why = f"the best that keeps {BALANCED_SHARE:.0%} of the fastest good one's speed"
    if min_tps is not None:
        why += f" and reaches {min_tps:g} t/s"
    return best, _reason(best, why, candidates)


def _where(placed: Placed, problem: Problem) -> str:
    placement, shape = placed.placement, problem.shape
    if not placement.devices:
        return "CPU"
    moved = len(layers_with_experts_in_ram(shape, placement))
    on = " + ".join(placement.devices)
    if placement.n_gpu_layers <= shape.n_layer_all:
        experts = f", {moved} layers' experts in RAM" if moved else ""
        return f"{placement.n_gpu_layers - 1}/{shape.n_layer} layers on {on}{experts}"
    return f"{moved}/{shape.n_layer} layers' experts in RAM" if moved else f"all on {on}"


def _decode(candidate: Candidate) -> float:
    speed = candidate.prediction.decode_tps if candidate.prediction else None
    return speed.mid if speed else 0.0


def _reason(best: Candidate, why: str, candidates: Sequence[Candidate]) -> Reason:
    better = [one for one in candidates if one.quality > best.quality]
    numbers: dict[str, float | int | str] = {"size_bytes": best.size_bytes, "decode_tps": _decode(best)}
    if better:
        above = min(better, key=lambda one: one.quality)
        lacking = sum(above.missing.values())
        why += f"; {above.quant} above it "
        why += (
            f"lacks {lacking / (1 << 30):.1f} GiB" if not above.fits else f"decodes {_decode(above):.0f} t/s"
        )
    return Reason(f"quant {best.quant}", f"{why} (quality: {best.word}, by {best.quality_source})", numbers)


def candidate_to_dict(candidate: Candidate) -> dict[str, Any]:
    """One entry of a plan's `candidates`."""
    speed = candidate.prediction
    return {
        "quant": candidate.quant,
        "fits": candidate.fits,
        "total_bytes": candidate.size_bytes,
        "where": candidate.where or None,
        "missing_bytes": dict(candidate.missing),
        "decode_tps": asdict(speed.decode_tps) if speed and speed.decode_tps else None,
        "prefill_tps": asdict(speed.prefill_tps) if speed and speed.prefill_tps else None,
        "decode_tps_mid": _decode(candidate) or None,
        "context_ceiling": candidate.context_ceiling,
        "quality": candidate.quality,
        "quality_word": candidate.word,
        "quality_source": candidate.quality_source,
    }
