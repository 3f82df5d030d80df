"""Which layers leave their experts in RAM, where layers differ in size: the GPU's room packed best.

Quants such as Q4_K_M give half of the layers larger experts. `find_placement` leaves the tail of the model
in RAM; with the same room a GPU may hold one small layer more, or exchange two small ones for a large one.
Layers of one size are alike, so what is chosen is how many of each size stay in RAM, the last ones of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

from qnext.plan.flags import expert_pattern
from qnext.plan.placement import Placed, Problem, check_placement
from qnext.plan.turn import placed_seconds
from qnext.plan.values import HOST, Override, Placement

_MOST_COMBINATIONS = 20_000
_TRIES = 10
"""Packings that are checked exactly, the most promising first."""


def pack_experts(problem: Problem, placed: Placed) -> Placed:
    """`placed`, or a packing of the same placement on one GPU whose turn is shorter and that fits.

    Leaves alone what the user forced, several devices, and machines whose speeds are not known.
    """
    placement, options = placed.placement, problem.options
    forced = options.cpu_experts is not None or options.n_gpu_layers is not None or options.overrides
    if problem.speeds is None or forced or len(placement.devices) != 1 or not placement.cpu_expert_layers:
        return placed
    groups = _groups(problem)
    if prod(len(group) + 1 for group in groups) > _MOST_COMBINATIONS:
        return placed
    seconds = placed_seconds(problem, placed)
    for layers in _promising(problem, placed, groups):
        candidate = check_placement(problem, _with_layers(placement, layers))
        if candidate.fits:
            return candidate if placed_seconds(problem, candidate) < seconds else placed
    return placed


def _groups(problem: Problem) -> list[list[int]]:
    """The trunk's layers by the size of their experts, each in order."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for layer, size in enumerate(problem.shape.layer_bytes[: problem.shape.n_layer]):
        by_size[size.expert_bytes].append(layer)
    return list(by_size.values())


def _promising(problem: Problem, placed: Placed, groups: list[list[int]]) -> Iterator[tuple[int, ...]]:
    """Sets of layers to leave in RAM, better than the present one if they fit, the best first.

    What a layer of each size saves on the GPU is asked of the forecast once; the rest is adding up. There may
    be a little more room than the present placement leaves: the buffer that experts are copied through is as
    large as the largest in RAM.
    """
    shape, here = problem.shape, set(placed.placement.cpu_expert_layers)
    sizes = [shape.layer_bytes[group[0]].expert_bytes for group in groups]
    saved = [_saved(problem, placed, group[-1]) for group in groups]
    device = placed.memory.devices[-1]
    now = [sum(layer in here for layer in group) for group in groups]
    room = (device.budget_bytes or 0) - device.total_bytes + max(sizes) - min(sizes)
    options = []
    for counts in product(*(range(len(group) + 1) for group in groups)):
        moved = [before - after for before, after in zip(now, counts, strict=True)]
        taken = sum(number * size for number, size in zip(moved, sizes, strict=True))
        gain = sum(number * worth for number, worth in zip(moved, saved, strict=True))
        if taken <= room and gain > 0 and any(counts):
            options.append((gain, counts))
    for _, counts in sorted(options, reverse=True)[:_TRIES]:
        chosen = [layer for group, count in zip(groups, counts, strict=True) for layer in _last(group, count)]
        yield tuple(sorted(chosen))


def _saved(problem: Problem, placed: Placed, layer: int) -> float:
    """Seconds of a turn that the experts of one layer cost in RAM instead of on the GPU."""
    placement = placed.placement
    every = tuple(range(problem.shape.n_layer))
    others = tuple(number for number in every if number != layer)
    both = (check_placement(problem, _with_layers(placement, layers)) for layers in (every, others))
    all_there, one_less = (placed_seconds(problem, one) for one in both)
    return all_there - one_less


def _with_layers(placement: Placement, layers: tuple[int, ...]) -> Placement:
    rule = Override(expert_pattern(layers), HOST)
    return replace(placement, cpu_expert_layers=layers, overrides=(*placement.overrides[:-1], rule))


def _last(group: list[int], count: int) -> list[int]:
    return group[len(group) - count :]
