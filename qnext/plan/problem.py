"""From a machine to the problem of placing one model on it: budgets, and how each device stores tensors."""

from __future__ import annotations

from collections.abc import Mapping

from qnext.hardware.machine import Gpu, Machine
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.budgets import make_budgets
from qnext.plan.options import PlanOptions, RepackPolicy
from qnext.plan.placement import Problem
from qnext.plan.speed import MachineSpeeds
from qnext.plan.traits import device_traits, host_traits
from qnext.plan.values import HOST

_BACKEND_OF = {"rocm": "hip"}
"""Name of the engine's backend library where it is not that of the kind of GPU."""


def backend_of(gpu: Gpu) -> str:
    """The engine's backend library that drives a GPU (`cuda`, `hip`, `vulkan`); empty when not known."""
    return _BACKEND_OF.get(gpu.kind or "", gpu.kind or "")


def untried_layout(machine: Machine) -> RepackPolicy:
    """The weight layout for a CPU on which none could be tried: AMX counts as a risk."""
    return "experts" if "amx_int8" in (machine.cpu.instruction_sets or ()) else "full"


def make_problem(
    header: ModelHeader,
    shape: ModelShape,
    machine: Machine,
    options: PlanOptions,
    *,
    ram: int | None = None,
    vram: int | None = None,
    ram_headroom: int | None = None,
    vram_headroom: int | None = None,
    device_memory: Mapping[str, int] | None = None,
    rpc_servers: tuple[str, ...] = (),
    speeds: MachineSpeeds | None = None,
) -> Problem:
    """The problem with the machine's free memory as budgets, or what the user names (see `make_budgets`)."""
    budgets = make_budgets(
        machine,
        ram=ram,
        vram=vram,
        ram_headroom=ram_headroom,
        vram_headroom=vram_headroom,
        device_memory=device_memory,
        rpc_servers=rpc_servers,
    )
    traits = {HOST: host_traits(machine.cpu.instruction_sets or ())}
    for budget in budgets:
        if budget.name != HOST:
            traits[budget.name] = device_traits(budget, free_bytes=budget.budget_bytes)
    return Problem(header, shape, budgets, traits, options, rpc_servers=rpc_servers, speeds=speeds)
