"""Which models of the catalogue this machine can run, the one to take first.

A model whose dimensions are known is planned in full from a header that is computed, without a network; with
`online` the others are planned from their published headers. What remains is judged by size alone: weights,
context and compute against all memory that may be used. That is an estimate and forecasts no speed.

The order wants no benchmark results, which every model has others of: more parameters know more, as long as
the answers come no slower than people read and the quant is not poor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Literal

from qnext.config import Paths
from qnext.errors import QnextError
from qnext.models.catalogue import CatalogueModel, load_catalogue
from qnext.models.quality import quality_of
from qnext.models.ranged import Deadline
from qnext.pipeline.choosing import choose_model, weigh_model
from qnext.pipeline.locate import LocatedModel, locate_models
from qnext.pipeline.planning import problem_on
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, Surroundings, look_around
from qnext.plan.budgets import make_budgets
from qnext.plan.options import SMALLEST_CONTEXT, Preference
from qnext.plan.quants import BALANCED_SHARE, Candidate, candidate_to_dict, choose_quant
from qnext.plan.values import HOST
from qnext.units import GIB, format_bytes

Located = tuple[LocatedModel, ...] | QnextError

_AT_ONCE = 8
"""Repositories that are read at the same time."""

Basis = Literal["shape", "headers", "size"]
"""What an entry rests on: computed headers, published ones, or sizes alone."""
Tier = Literal["good", "by size", "slow or poor", "too large"]
TIERS: tuple[Tier, ...] = ("good", "by size", "slow or poor", "too large")

READING_TPS = 5.0
"""About 240 words a minute, the mean of adults reading English silently (Brysbaert 2019, 190 studies)."""

_LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS")
"""The steps that are planned: between two of them lies little, each takes a fifth of a second, and below are
only poor ones, which are judged by size."""
_USUAL = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ3_XXS", "IQ2_XXS")
"""What is reckoned with where a repository's sizes are not known: types whose bits per weight are."""

KV_BYTES = 4096
"""Per layer and token of context: 8 heads of 128 for K and V in f16, the most that the catalogue's models
have in the mean of their layers."""
HOST_COMPUTE, DEVICE_COMPUTE = GIB // 2, GIB
"""Compute buffers: logits and activations of a ubatch of 512 on the host, of 2048 on a device."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One model with the quant to take of it; where none fits, with the one that lacks least.

    `listed` says that the repository is known to offer this quant under this name, with this size.
    `because` is why this quant, in words.
    """

    model: CatalogueModel
    candidate: Candidate
    basis: Basis
    tier: Tier
    listed: bool
    because: str

    @property
    def ref(self) -> str:
        """What to give a command that is to plan, fetch or run it."""
        return f"{self.model.name}:{self.candidate.quant}" if self.listed else self.model.name


@dataclass(frozen=True, slots=True)
class Ranking:
    """`entries` with the best first; `order` says in words what that means."""

    entries: tuple[Ranked, ...]
    order: str
    surroundings: Surroundings

    def best(self, but: str | None = None) -> Ranked | None:
        """The model to propose, but not one of the repository `but`; None when none fits."""
        fitting = (one for one in self.entries if one.tier != "too large")
        return next((one for one in fitting if but not in (one.model.repo, *one.model.alternatives)), None)


def rank_models(
    request: Request,
    paths: Paths,
    notice: Notice,
    *,
    online: bool = False,
    surroundings: Surroundings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Every model of the catalogue on the machine of `request`, whose `model` is not looked at.

    With `online` headers are read from the Hub or the cache, `on_progress` hears of how many models of how
    many; a model whose headers cannot be had is judged by size, and `notice` says why. Raises ModelError,
    HardwareError, UsageError.
    """
    around = look_around(request, paths, notice) if surroundings is None else surroundings
    floor = READING_TPS if request.min_tps is None else request.min_tps
    planned: dict[tuple[str, str], Candidate] = {}
    entries = []
    models = load_catalogue()
    read = _read_all([one for one in models if one.shape is None], paths, on_progress) if online else {}
    for model in models:
        ranked = _from_shape(model, request, around, floor, planned)
        if ranked is None and online:
            ranked = _from_headers(model, read[model.name], request, around, floor, notice)
        if ranked is None:
            ranked = _by_size(model, request, around)
        elif ranked.tier == "too large" and ranked.basis == "shape":
            # Not every published quant can be computed: a smaller one may fit.
            by_size = _by_size(model, request, around)
            ranked = by_size if by_size.candidate.fits else ranked
        entries.append(ranked)
    words = (
        f"forecast to decode {floor:g} t/s or more in a quant that is not poor; "
        "then what fits by size alone; then the slow and the poor; then what does not fit, by what it lacks. "
        "Within each: more parameters first, then better quality, then faster."
    )
    return Ranking(tuple(sorted(entries, key=_order)), words, around)


def tier_of(candidate: Candidate, floor: float) -> Tier:
    """Where a planned candidate belongs; `floor` is the slowest decode to put up with, in t/s."""
    if not candidate.fits:
        return "too large"
    decode = candidate.prediction.decode_tps if candidate.prediction else None
    return "good" if decode and decode.mid >= floor and not candidate.poor else "slow or poor"


def ranking_to_dict(ranking: Ranking) -> dict[str, Any]:
    """The ranking as JSON, without its `schema` field."""
    return {
        "order": ranking.order,
        "models": [
            {
                "name": one.model.name,
                "title": one.model.title,
                "ref": one.ref,
                "repo": one.model.repo,
                "total_params": one.model.total_params,
                "active_params": one.model.active_params,
                "tier": one.tier,
                "basis": one.basis,
                "because": one.because,
                **candidate_to_dict(one.candidate),
            }
            for one in ranking.entries
        ],
    }


def _order(one: Ranked) -> tuple[Any, ...]:
    """Equal ones: general models before coding ones, those that answer at once before those that think."""
    candidate, model = one.candidate, one.model
    lacking = sum(candidate.missing.values())
    decode = candidate.prediction.decode_tps if candidate.prediction else None
    return (
        TIERS.index(one.tier),
        lacking,
        -model.total_params,
        -round(candidate.quality, 3),
        -(decode.mid if decode else 0),
        "coder" in model.name,
        model.thinking.switch == "always",
        model.name,
    )


def _from_shape(
    model: CatalogueModel,
    request: Request,
    around: Surroundings,
    floor: float,
    planned: dict[tuple[str, str], Candidate],
) -> Ranked | None:
    """Planned from computed headers; None where the model's dimensions are not known.

    `planned` keeps what was planned by shape and quant, since several models share a shape.
    """
    if model.shape is None:
        return None
    sizes = dict(model.quants)
    names = [name for name in _LADDER if name in sizes] or list(_LADDER)
    candidates = []
    for name in names:
        key = model.shape, name
        if key not in planned:
            planned[key] = _weigh_shape(model.shape, name, request, around)
        size = sizes.get(name)
        candidates.append(planned[key] if size is None else replace(planned[key], size_bytes=size))
    chosen, reason = choose_quant(candidates, request.prefer, request.min_tps)
    candidate = chosen or min(candidates, key=lambda one: sum(one.missing.values()))
    because = reason.because if reason else "the smallest of those planned"
    return Ranked(model, candidate, "shape", tier_of(candidate, floor), candidate.quant in sizes, because)


def _weigh_shape(shape: str, quant: str, request: Request, around: Surroundings) -> Candidate:
    from qnext.models.shape import read_shape
    from qnext.models.synth.imagined import imagined_header

    header = imagined_header(shape, quant)
    model = LocatedModel(shape, header, read_shape(header))
    return weigh_model(model, problem_on(around.machine, model, request, around))


def _read_all(
    models: Sequence[CatalogueModel], paths: Paths, on_progress: Callable[[int, int], None] | None
) -> dict[str, Located]:
    """The published headers of `models` by name, of several at once; what went wrong for those without."""
    deadline = Deadline()

    def read(model: CatalogueModel) -> Located:
        try:
            return locate_models(model.name, paths, lambda _: None, within=deadline)
        except QnextError as error:
            return error

    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="model")
    try:
        waiting = {pool.submit(read, model): model.name for model in models}
        found: dict[str, Located] = {}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            if on_progress is not None:
                on_progress(len(found), len(models))
        return found
    finally:
        deadline.cancel()  # after Ctrl-C the others need not go on
        pool.shutdown(cancel_futures=True)


def _from_headers(
    model: CatalogueModel,
    located: Located,
    request: Request,
    around: Surroundings,
    floor: float,
    notice: Notice,
) -> Ranked | None:
    """Planned from published headers; None, with a notice, where they cannot be had."""
    if isinstance(located, QnextError):
        notice(f"{model.name} is judged by size alone: {located.message}")
        return None
    weighed = [(weigh_model(one, problem_on(around.machine, one, request, around)), one) for one in located]
    taken, _, reason = choose_model(weighed, request.prefer, request.min_tps)
    candidate = next(candidate for candidate, one in weighed if one is taken)
    because = reason.because if reason else "the smallest published"
    return Ranked(model, candidate, "headers", tier_of(candidate, floor), True, because)


def _by_size(model: CatalogueModel, request: Request, around: Surroundings) -> Ranked:
    """Weights, context and compute against all budgets together. See KV_BYTES for the allowance."""
    budgets = make_budgets(
        around.machine,
        ram=request.ram,
        vram=request.vram,
        ram_headroom=request.ram_headroom,
        vram_headroom=request.vram_headroom,
        device_memory=request.device_memory,
        rpc_servers=request.rpc_servers,
    )
    total = sum(budget.budget_bytes for budget in budgets)
    context = request.context or SMALLEST_CONTEXT * (request.parallel or 1)
    beside = KV_BYTES * model.layers * context
    beside += sum(HOST_COMPUTE if budget.name == HOST else DEVICE_COMPUTE for budget in budgets)
    sizes = dict(model.quants) or _usual_sizes(model)
    candidates = [_sized(model, quant, size, size + beside - total) for quant, size in sizes.items()]
    fitting = [one for one in candidates if one.fits]
    words = f"an estimate: weights, and {format_bytes(beside)} for context {context:,} and compute, in "
    words += format_bytes(total)
    listed = bool(model.quants)
    if not fitting:
        least = min(candidates, key=lambda one: one.size_bytes)
        return Ranked(model, least, "size", "too large", listed, words)
    taken = _choose_by_size(fitting, request.prefer)
    return Ranked(model, taken, "size", "slow or poor" if taken.poor else "by size", listed, words)


def _usual_sizes(model: CatalogueModel) -> dict[str, int]:
    bits = {name: quality_of(name).bits_per_weight or 16 for name in _USUAL}
    return {name: int(model.total_params * each / 8) for name, each in bits.items()}


def _sized(model: CatalogueModel, quant: str, size: int, lacking: int) -> Candidate:
    quality = quality_of(quant, model.arch, size_bytes=size, params=model.total_params)
    return Candidate(
        quant=quant,
        size_bytes=size,
        fits=lacking <= 0,
        where="",
        prediction=None,
        context_ceiling=None,
        quality=quality.score,
        word=quality.word,
        poor=quality.poor,
        quality_source=quality.source,
        missing={"memory": lacking} if lacking > 0 else {},
    )


def _choose_by_size(fitting: Sequence[Candidate], prefer: Preference) -> Candidate:
    """As `choose_quant`, with the inverse of the size for the speed that is not known."""
    good = [one for one in fitting if not one.poor] or fitting
    smallest = min(good, key=lambda one: one.size_bytes)
    if prefer == "speed":
        return smallest
    most = float("inf") if prefer == "quality" else smallest.size_bytes / BALANCED_SHARE
    return max(
        (one for one in good if one.size_bytes <= most), key=lambda one: (one.quality, -one.size_bytes)
    )
