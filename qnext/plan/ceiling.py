"""How far the context of a plan can grow."""

from __future__ import annotations

from dataclasses import replace

from qnext.plan.choice import cache_types
from qnext.plan.placement import Placed, Problem, find_placement

_CONTEXT_STEP = 1024


def longest_context(problem: Problem, placed: Placed) -> int:
    """The longest context with which the model still fits, to a whole 1,024 tokens.

    Experts may give way, and the cache be rounded, where the user left that open. Found by halving, to a
    sixteenth.
    """
    problem = replace(problem, compute=None)  # a dry run's figures are those of one context
    most = problem.shape.context_train
    base = placed.placement
    step = _CONTEXT_STEP * base.parallel
    if _fits(problem, placed, most * base.parallel):
        return max(most * base.parallel, base.context)
    low, high = base.context // step, most * base.parallel // step
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if _fits(problem, placed, middle * step):
            low = middle
        else:
            high = middle
    return max(low * step, base.context)


def _fits(problem: Problem, placed: Placed, context: int) -> bool:
    smallest = cache_types(problem)[-1]
    blank = replace(
        placed.placement,
        context=context,
        kv_type_k=smallest[0],
        kv_type_v=smallest[1],
        devices=(),
        cpu_expert_layers=(),
        overrides=(),
        n_gpu_layers=0,
    )
    return find_placement(problem, blank).fits
