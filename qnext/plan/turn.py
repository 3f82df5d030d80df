"""How long one turn takes with a placement: the measure by which placements and quants are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnext.plan.placement import Placed, Problem
from qnext.plan.speed import MachineSpeeds, predict_speed
from qnext.plan.values import HOST, DeviceMemory, Placement, Prediction, Reason, Workload
from qnext.plan.weights import PlacedTensor, assign_buffers


def forecast(
    problem: Problem,
    placement: Placement,
    devices: Sequence[DeviceMemory],
    speeds: MachineSpeeds,
    workload: Workload,
) -> tuple[Prediction, Reason]:
    """Speeds of a placement for any workload, with the numbers they rest on. `devices` is its memory."""
    tensors, owners = place_tensors(problem, placement)
    return predict_speed(problem.shape, placement, tensors, devices, owners, speeds, workload)


def place_tensors(problem: Problem, placement: Placement) -> tuple[tuple[PlacedTensor, ...], dict[str, str]]:
    """Every tensor in its buffer type, and the device that each buffer type belongs to."""
    used = problem.used(placement)
    placed = assign_buffers(problem.header, problem.shape, placement, problem.traits[HOST], used)
    return placed, {device.buffer_type: device.name for device in used}


def turn_seconds(prediction: Prediction, workload: Workload) -> float:
    """Time of one turn of `workload` at the middle of a forecast; infinite without one."""
    prefill, decode = prediction.prefill_tps, prediction.decode_tps
    if prefill is None or decode is None or not prefill.mid or not decode.mid:
        return float("inf")
    return workload.prompt / prefill.mid + workload.generate / decode.mid


def verifying_share(problem: Problem, placed: Placed) -> float | None:
    """Time of a decode step that checks two tokens over that of one token; None where no speeds are known.

    What the second token adds is taken from the forecast of very short prompts.
    """
    if problem.speeds is None:
        return None
    speeds, devices = problem.speeds, placed.memory.devices

    def seconds(tokens: int) -> tuple[float, float]:
        workload = replace(problem.options.workload, prompt=tokens)
        prediction, _ = forecast(problem, placed.placement, devices, speeds, workload)
        prefill, decode = prediction.prefill_tps, prediction.decode_tps
        return (tokens / prefill.mid if prefill else 0.0), (1 / decode.mid if decode else 0.0)

    (one, step), (two, _) = seconds(1), seconds(2)
    return 1 + (two - one) / step if step else None


def placed_seconds(problem: Problem, placed: Placed) -> float:
    """Time of one turn of the problem's workload with a placement; 0 where no speeds are known."""
    if problem.speeds is None:
        return 0.0
    workload = problem.options.workload
    prediction, _ = forecast(problem, placed.placement, placed.memory.devices, problem.speeds, workload)
    return turn_seconds(prediction, workload)
