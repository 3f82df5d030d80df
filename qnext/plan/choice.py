"""Chooses context, slots, cache type, ubatch and placement: one decision, for they share the same memory.

What the user can do with the model comes first, so the longest context that fits is taken. Of what fits with
it, the shortest turn of the stated workload: a large ubatch copies the experts in RAM to the GPU less often,
a cache in q8_0 takes half the room, and both buy or cost layers of experts on the GPU. Slots beyond the first
are taken only from what nobody misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qnext.models.shape import ModelShape
from qnext.plan.options import (
    CPU_UBATCH,
    DEFAULT_CONTEXT,
    GPU_UBATCHES,
    MOST_SLOTS,
    SMALLEST_CONTEXT,
    Wishes,
)
from qnext.plan.packing import pack_experts
from qnext.plan.placement import Placed, Problem, find_placement
from qnext.plan.turn import placed_seconds
from qnext.plan.values import Placement

Cache = tuple[str, str]
"""Types of the cache's keys and values."""

FULL_CACHE: Cache = ("f16", "f16")
SMALL_CACHE: Cache = ("q8_0", "q8_0")

SMALL_CACHE_GAIN = 0.05
"""What q8_0 must save of a turn to be taken for speed: less would not be worth the rounding."""
SLOTS_COST = 0.02
"""What slots beyond the first may add to a turn of one user who has the machine to himself."""


def choose_placement(problem: Problem) -> Placed:
    """Everything as wished or as suits the workload best, and the placement for it.

    Less context, ubatch and cache never need more memory: if the smallest do not fit, nothing between is
    worth trying, and the placement returned is the smallest, with what it lacks.
    """
    fitting = fitting_placements(problem)
    return fitting[0] if fitting else _smallest(problem)


def fitting_placements(problem: Problem) -> list[Placed]:
    """Placements for the first context that fits, one for each ubatch and cache that does, the best first."""
    if problem.options.parallel is None:
        return _with_slots(problem)
    ubatches = _ubatches(problem)
    for number, (context, cache) in enumerate(_rooms(problem)):
        if number == 1 and not _smallest(problem).fits:
            break
        placed = [find_placement(problem, _base(problem, context, cache, ubatch)) for ubatch in ubatches]
        fitting = [pack_experts(problem, candidate) for candidate in placed if candidate.fits]
        if fitting:
            fitting = sorted(fitting, key=lambda candidate: placed_seconds(problem, candidate))
            return _with_smaller_cache(problem, fitting)
    return []


def _with_slots(problem: Problem) -> list[Placed]:
    """As many slots, each with the context of a single one, as cost that one next to nothing."""
    options = problem.options
    single = fitting_placements(replace(problem, options=replace(options, parallel=1)))
    if not single:
        return single
    limit = placed_seconds(problem, single[0]) * (1 + SLOTS_COST)
    context = single[0].placement.context
    for slots in range(MOST_SLOTS, 1, -1):
        each = context if options.context is None else options.context // slots
        if each < options.workload.tokens:
            continue
        wished = replace(options, parallel=slots, context=each * slots)
        several = fitting_placements(replace(problem, options=wished))
        if several and placed_seconds(problem, several[0]) <= limit:
            return several
    return single


def _with_smaller_cache(problem: Problem, fitting: list[Placed]) -> list[Placed]:
    """`fitting` with the same in q8_0, in front where the experts that the cache gave way to are worth it."""
    best = fitting[0]
    squeezed = bool(best.placement.devices) and (
        bool(best.placement.cpu_expert_layers) or best.placement.n_gpu_layers <= problem.shape.n_layer_all
    )
    if not squeezed or SMALL_CACHE not in cache_types(problem) or problem.options.prefer == "quality":
        return fitting
    if best.placement.kv_type_k == SMALL_CACHE[0]:
        return fitting
    context, first = best.placement.context, best.placement.ubatch
    small = find_placement(problem, _base(problem, context, SMALL_CACHE, first))
    if not small.fits:
        return fitting
    small = pack_experts(problem, small)
    if placed_seconds(problem, small) >= placed_seconds(problem, best) * (1 - SMALL_CACHE_GAIN):
        return [*fitting, small]
    others = (
        find_placement(problem, _base(problem, context, SMALL_CACHE, ubatch))
        for ubatch in _ubatches(problem)
        if ubatch != first
    )
    packed = [small, *(pack_experts(problem, one) for one in others if one.fits)]
    return [*sorted(packed, key=lambda candidate: placed_seconds(problem, candidate)), *fitting]


def _rooms(problem: Problem) -> Iterator[tuple[int, Cache]]:
    """Contexts and cache types to try, most wanted first: rounding the cache is better than half the context,
    for those who prefer quality as long as a turn fits in it."""
    contexts, caches = _contexts(problem), cache_types(problem)
    if problem.options.prefer == "quality":
        turn = problem.options.workload.tokens * (problem.options.parallel or 1)
        enough = [context for context in contexts if context >= turn] or contexts[:1]
        yield from ((context, cache) for cache in caches for context in enough)
        contexts = contexts[len(enough) :]
    yield from ((context, cache) for context in contexts for cache in caches)


def _contexts(problem: Problem) -> list[int]:
    """Contexts to try, most wanted first."""
    options = problem.options
    slots = options.parallel or 1
    turn = -(-options.workload.tokens // SMALLEST_CONTEXT) * SMALLEST_CONTEXT
    wanted = max(DEFAULT_CONTEXT, turn * slots)
    contexts = [options.context or min(wanted, problem.shape.context_train * slots)]
    while options.context is None and contexts[-1] > SMALLEST_CONTEXT:
        contexts.append(max(SMALLEST_CONTEXT, contexts[-1] // 2))
    return contexts


def cache_types(problem: Problem) -> list[Cache]:
    """Cache types to try, most wanted first."""
    options = problem.options
    named = named_cache(options, problem.shape)
    if named is not None:
        return [named]
    small = options.flash_attention == "on" and _heads_divide(problem.shape, 32)
    return [FULL_CACHE, SMALL_CACHE] if small else [FULL_CACHE]


def named_cache(wishes: Wishes, shape: ModelShape) -> Cache | None:
    """What the user said of the cache, None where nothing was said.

    With one type named the other is f16, or the same where keys and values are one cache.
    """
    named = wishes.kv_type_k or wishes.kv_type_v
    if named is None:
        return None
    other = named if shape.latent_attention else FULL_CACHE[0]
    return wishes.kv_type_k or other, wishes.kv_type_v or other


def _heads_divide(shape: ModelShape, block: int) -> bool:
    """Whether the heads of the cache are whole blocks of a quantised type."""
    lengths = [shape.key_length, shape.value_length]
    if any(shape.sliding):
        lengths += [shape.key_length_swa, shape.value_length_swa]
    return bool(shape.attention_layers) and all(length % block == 0 for length in lengths)


def _ubatches(problem: Problem) -> list[int]:
    """Physical batches to try, largest first."""
    options = problem.options
    if options.ubatch:
        return [min(options.ubatch, options.batch)]
    has_gpu = any(budget.kind == "gpu" and budget.budget_bytes > 0 for budget in problem.budgets)
    tried = GPU_UBATCHES if has_gpu else (CPU_UBATCH,)
    return list(dict.fromkeys(min(ubatch, options.batch) for ubatch in tried))


def _smallest(problem: Problem) -> Placed:
    """The placement that needs least of all that may be chosen."""
    base = _base(problem, _contexts(problem)[-1], cache_types(problem)[-1], _ubatches(problem)[-1])
    return find_placement(problem, base)


def _base(problem: Problem, context: int, cache: Cache, ubatch: int) -> Placement:
    options = problem.options
    slots = options.parallel or 1
    return Placement(
        rpc_servers=problem.rpc_servers,
        context=context,
        batch=options.batch,
        ubatch=ubatch,
        kv_type_k=cache[0],
        kv_type_v=cache[1],
        flash_attention=options.flash_attention,
        threads=options.threads,
        threads_batch=options.threads_batch,
        load_mode=options.load_mode,
        parallel=slots,
        outputs_max=slots,
    )
