"""What would change a plan most: each part of the machine made better by a usual step, and what that brings.

Pure. Changes are written as `--what-if` takes them, so that any of them can be planned in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qnext.hardware.machine import Machine
from qnext.plan.choice import choose_placement, fitting_placements
from qnext.plan.machine_speeds import FASTEST_PCIE_GEN
from qnext.plan.placement import Placed, Problem
from qnext.plan.turn import forecast, placed_seconds, turn_seconds
from qnext.plan.values import Prediction
from qnext.plan.what_if import with_changes
from qnext.units import GIB

_STEP = 4 / 3
"""A memory kit or card a third faster: DDR5-4800 to 6400."""
_MORE_VRAM_GIB = 8


@dataclass(frozen=True, slots=True)
class Lever:
    """One change of the machine. `gain` is the share of the turn's time that it saves, 0.2 for a fifth; None
    where the model does not fit without it."""

    what_if: str
    words: str
    prediction: Prediction
    gain: float | None


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The next best placement: what is different, and how much longer its turn takes (0.03: 3 %).

    Negative where a rounded cache saves too little to be taken.
    """

    words: str
    loss: float


def find_levers(machine: Machine, make_problem: Callable[[Machine], Problem]) -> tuple[Lever, ...]:
    """Changes that shorten the turn, or make the model fit, the one that brings most first.

    `make_problem` sets up a machine.
    """
    before = _seconds(make_problem(machine))
    if before == 0:  # a turn of nothing
        return ()
    found = []
    for what_if, words in _steps(machine):
        changed, _ = with_changes(machine, what_if)
        problem = make_problem(changed)
        placed = choose_placement(problem)
        if not placed.fits or problem.speeds is None:
            continue
        workload = problem.options.workload
        prediction, _ = forecast(problem, placed.placement, placed.memory.devices, problem.speeds, workload)
        gain = 1 - turn_seconds(prediction, workload) / before if before else None
        if gain is None or gain > 0.005:
            found.append(Lever(what_if, words, prediction, gain))
    return tuple(sorted(found, key=_worth, reverse=True))


def _worth(lever: Lever) -> float:
    speed = lever.prediction.decode_tps
    return (speed.mid if speed else 0.0) if lever.gain is None else lever.gain


def runner_up(problem: Problem) -> RunnerUp | None:
    """The second best of the placements that were weighed, None where there was no choice."""
    ranked = fitting_placements(problem)
    if len(ranked) < 2 or problem.speeds is None:
        return None
    best, *others = ranked
    second = min(others, key=lambda other: placed_seconds(problem, other))
    seconds = placed_seconds(problem, best)
    loss = placed_seconds(problem, second) / seconds - 1 if seconds else 0.0
    return RunnerUp(_difference(best, second), loss)


def _seconds(problem: Problem) -> float | None:
    """The turn's time; None where the model does not fit or no speeds are known."""
    placed = choose_placement(problem)
    return placed_seconds(problem, placed) if placed.fits and problem.speeds else None


def _difference(best: Placed, other: Placed) -> str:
    parts = []
    if other.placement.ubatch != best.placement.ubatch:
        parts.append(f"ubatch {other.placement.ubatch:,} instead of {best.placement.ubatch:,}")
    if other.placement.kv_type_k != best.placement.kv_type_k:
        parts.append(f"KV cache in {other.placement.kv_type_k} instead of {best.placement.kv_type_k}")
    before, after = (len(one.placement.cpu_expert_layers) for one in (best, other))
    if after != before:
        parts.append(f"experts of {after} layers in RAM instead of {before}")
    if other.placement.devices != best.placement.devices:
        parts.append(f"on {' + '.join(other.placement.devices) or 'the CPU'}")
    return ", ".join(parts)


def _steps(machine: Machine) -> Iterator[tuple[str, str]]:
    """(change, in words) worth trying on this machine."""
    memory = machine.memory
    if memory.total_bytes and not machine.unified_memory:
        size = 2 * round(memory.total_bytes / GIB)
        yield f"ram={size}G", f"twice the RAM ({size} GiB)"
    bandwidth = memory.rated_bandwidth_bps or memory.measured_bandwidth_bps
    if bandwidth:
        faster = round(bandwidth * _STEP / 1e9)
        yield f"ram_bandwidth={faster}G", f"memory a third faster ({faster} GB/s)"
        if memory.channels and memory.channels_max and memory.channels < memory.channels_max:
            full = round(bandwidth * memory.channels_max / memory.channels / 1e9)
            yield f"ram_bandwidth={full}G", f"all {memory.channels_max} memory channels ({full} GB/s)"
    cores = machine.cpu.usable_cores or machine.cpu.physical_cores
    if cores:
        yield f"cores={2 * cores}", f"twice the cores ({2 * cores})"
    if machine.unified_memory:
        return
    for position, gpu in enumerate(machine.gpus):
        name = gpu.name or f"GPU {position}"
        if gpu.vram_total_bytes:
            size = round(gpu.vram_total_bytes / GIB) + _MORE_VRAM_GIB
            yield f"vram.{position}={size}G", f"{_MORE_VRAM_GIB} GiB more VRAM on {name}"
        generation, width = gpu.pcie_gen_max, gpu.pcie_width_max
        if generation and width and width < 16:
            yield f"pcie.{position}={generation}x16", f"sixteen lanes instead of {width} for {name}"
        if generation and width and generation < FASTEST_PCIE_GEN:
            yield f"pcie.{position}={generation + 1}x{width}", f"PCIe {generation + 1}.0 for {name}"
    if machine.gpus and machine.gpus[-1].vram_total_bytes:
        more = len(machine.gpus) + 1
        yield f"gpus={more}", f"one more {machine.gpus[-1].name or 'GPU'}"
