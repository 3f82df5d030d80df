"""What to change so that a model fits, each change proven by planning it.

Sorted by what it costs the user: first what is free, then speed, then the context, last another file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

from qnext.errors import UsageError
from qnext.models.header import ModelHeader
from qnext.models.shape import LayerBytes, ModelShape
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Placed, Problem
from qnext.units import format_bytes

Fits = Callable[[Problem], bool]

_CONTEXT_STEP = 1024
_QUANT_BITS = (
    ("Q8_0", 8.52), ("Q6_K", 6.57), ("Q5_K_M", 5.70), ("Q5_K_S", 5.52), ("Q4_K_M", 4.87), ("Q4_K_S", 4.57),
    ("IQ4_XS", 4.28), ("Q3_K_M", 3.85), ("Q3_K_S", 3.47), ("IQ3_XXS", 3.32), ("Q2_K", 2.94),
    ("IQ2_XXS", 2.63), ("IQ1_M", 2.45), ("IQ1_S", 2.30),
)  # fmt: skip
"""Bits per parameter of the published files of Qwen3-Next-80B-A3B-Instruct, file size over parameters."""
_SCALE_STEP = 0.97
_SCALE_TRIES = 12


def suggest_changes(problem: Problem, placed: Placed, fits: Fits) -> Iterator[str]:
    """Changes, as flags, under which the model fits; the last line is about the size of the file.

    `placed` is what did not fit. `fits` says whether a problem has a placement that does: the exactest
    judgement the caller has.
    """

    def holds(options: PlanOptions) -> bool:
        try:
            return fits(replace(problem, options=options, compute=None))
        except UsageError:  # a cache type that this model's heads cannot use
            return False

    if _too_large(problem, placed):
        yield _smaller_file(problem, placed, fits)
        return
    options, base = problem.options, placed.placement
    slots = base.parallel
    asked = replace(options, context=base.context, ubatch=base.ubatch, parallel=slots)
    singles = [
        (base.load_mode != "none", "--load-mode none", replace(asked, load_mode="none")),
        (_forced(options), "no -ngl, -ncmoe, -ot or -ts", _unforced(asked)),
        (base.ubatch > 512, "-ub 512", replace(asked, ubatch=512)),
        (base.ubatch > 128, "-ub 128", replace(asked, ubatch=128)),
        (base.kv_type_k == "f16", "-ctk q8_0 -ctv q8_0", replace(asked, kv_type_k="q8_0", kv_type_v="q8_0")),
    ]
    found = [text for applies, text, wishes in singles if applies and holds(wishes)]
    if "-ub 512" in found and "-ub 128" in found:
        found.remove("-ub 128")
    yield from found
    context = _largest_context(asked, holds)
    if context is not None:
        yield f"-c {context}"
    if slots > 1:
        one = replace(asked, parallel=1, context=base.context // slots)
        if holds(one):
            yield f"-np 1 -c {one.context}"
    if not found and context is None:
        smallest = replace(_unforced(asked), load_mode="none", ubatch=128, kv_type_k="q8_0", kv_type_v="q8_0")
        context = base.context if holds(smallest) else _largest_context(smallest, holds)
        if context is not None:
            yield f"--load-mode none -ub 128 -ctk q8_0 -ctv q8_0 -c {context}, with nothing else forced"
    yield _smaller_file(problem, placed, fits)


def _too_large(problem: Problem, placed: Placed) -> bool:
    """Whether the weights alone exceed all budgets together, so that only another file can help."""
    weights = sum(device.weights_bytes for device in placed.memory.devices)
    budgets = sum(budget.budget_bytes for budget in problem.budgets)
    return weights > budgets and placed.placement.load_mode in ("none", "mlock", "dio")


def _forced(options: PlanOptions) -> bool:
    return (
        options.n_gpu_layers is not None
        or options.cpu_experts is not None
        or bool(options.overrides)
        or options.tensor_split is not None
    )


def _unforced(options: PlanOptions) -> PlanOptions:
    return replace(options, n_gpu_layers=None, cpu_experts=None, overrides=(), tensor_split=None)


def _largest_context(asked: PlanOptions, holds: Callable[[PlanOptions], bool]) -> int | None:
    """The largest context below the asked one that fits, to a thirty-second of it; None if none does."""
    assert asked.context is not None
    unit = max(_CONTEXT_STEP * (asked.parallel or 1), asked.context // 32)
    low, high = 1, -(-asked.context // unit)
    if high <= 1 or not holds(replace(asked, context=unit)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if holds(replace(asked, context=middle * unit)):
            low = middle
        else:
            high = middle
    return low * unit


def _smaller_file(problem: Problem, placed: Placed, fits: Fits) -> str:
    """How small the file would have to be, planned with all tensors shrunk alike, and which quants are."""
    header = problem.header
    weights = sum(device.weights_bytes for device in placed.memory.devices)
    ratio = max(0.0, 1 - sum(placed.missing.values()) / max(1, weights))
    for _ in range(_SCALE_TRIES):
        smaller = replace(
            problem,
            header=_shrunk_header(header, ratio),
            shape=_shrunk_shape(problem.shape, ratio),
            options=replace(problem.options, context=placed.placement.context),
            compute=None,
        )
        if ratio > 0 and fits(smaller):
            break
        ratio *= _SCALE_STEP
    else:
        return "another model: no file of this one is small enough"
    size = round(header.file_bytes * ratio)
    parameters = sum(prod(tensor.shape) for tensor in header.tensors)
    name = next((name for name, bits in _QUANT_BITS if parameters * bits / 8 <= size), None)
    if name is None:
        return f"a file of up to {format_bytes(size)}, smaller than any usual quant of this model"
    return f"a file of up to {format_bytes(size)}, such as {name}"


def _shrunk_header(header: ModelHeader, ratio: float) -> ModelHeader:
    tensors = tuple(
        replace(tensor, nbytes=round(tensor.nbytes * ratio), offset=round(tensor.offset * ratio))
        for tensor in header.tensors
    )
    return replace(header, tensors=tensors, file_bytes=round(header.file_bytes * ratio))


def _shrunk_shape(shape: ModelShape, ratio: float) -> ModelShape:
    layers = tuple(
        LayerBytes(round(layer.expert_bytes * ratio), round(layer.other_bytes * ratio))
        for layer in shape.layer_bytes
    )
    return replace(shape, layer_bytes=layers)
