"""Chooses context, ubatch and placement: the first context that fits, then what makes the turn shortest."""

from __future__ import annotations

from qnext.plan.options import CPU_UBATCH, DEFAULT_CONTEXT, GPU_UBATCHES, SMALLEST_CONTEXT
from qnext.plan.packing import pack_experts
from qnext.plan.placement import Placed, Problem, find_placement
from qnext.plan.turn import placed_seconds
from qnext.plan.values import Placement


def choose_placement(problem: Problem) -> Placed:
    """Context and ubatch as wished or as suits the workload best, and the placement for them.

    The first context that fits is taken, longest first: a context costs what the user can do. Of the ubatches
    that fit with it, the one whose turn is shortest: a large one copies the experts in RAM to the GPU less
    often, and its buffer takes the room of other experts. Less context and ubatch never need more memory: if
    the smallest do not fit, nothing between is worth trying.
    """
    fitting = fitting_placements(problem)
    if fitting:
        return fitting[0]
    return find_placement(problem, _base(problem, _contexts(problem)[-1], _ubatches(problem)[-1]))


def fitting_placements(problem: Problem) -> list[Placed]:
    """Placements for the first context that fits, one for each ubatch that does, shortest turn first."""
    contexts, ubatches = _contexts(problem), _ubatches(problem)
    for context in contexts:
        placed = [find_placement(problem, _base(problem, context, ubatch)) for ubatch in ubatches]
        fitting = [pack_experts(problem, candidate) for candidate in placed if candidate.fits]
        if len(fitting) == 1:
            return fitting
        if fitting:
            return sorted(fitting, key=lambda candidate: placed_seconds(problem, candidate))
        if context == contexts[0] and len(contexts) > 1:
            smallest = find_placement(problem, _base(problem, contexts[-1], ubatches[-1]))
            if not smallest.fits:
                break
    return []


def _contexts(problem: Problem) -> list[int]:
    """Contexts to try, most wanted first."""
    options = problem.options
    largest = problem.shape.context_train * options.parallel
    contexts = [options.context or min(DEFAULT_CONTEXT, largest)]
    while options.context is None and contexts[-1] > SMALLEST_CONTEXT:
        contexts.append(max(SMALLEST_CONTEXT, contexts[-1] // 2))
    return contexts


def _ubatches(problem: Problem) -> list[int]:
    """Physical batches to try, largest first."""
    options = problem.options
    if options.ubatch:
        return [min(options.ubatch, options.batch)]
    has_gpu = any(budget.kind == "gpu" and budget.budget_bytes > 0 for budget in problem.budgets)
    tried = GPU_UBATCHES if has_gpu else (CPU_UBATCH,)
    return list(dict.fromkeys(min(ubatch, options.batch) for ubatch in tried))


def _base(problem: Problem, context: int, ubatch: int) -> Placement:
    options = problem.options
    return Placement(
        rpc_servers=problem.rpc_servers,
        context=context,
        batch=options.batch,
        ubatch=ubatch,
        kv_type_k=options.kv_type_k,
        kv_type_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        threads=options.threads,
        threads_batch=options.threads_batch,
        load_mode=options.load_mode,
        parallel=options.parallel,
        outputs_max=options.parallel,
    )
