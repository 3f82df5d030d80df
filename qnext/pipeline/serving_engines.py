"""Which engine a server runs on: this Python's, or a llama-server for a GPU that this one cannot use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qnext.config import Paths
from qnext.engine.build import installed_build
from qnext.engine.others import find_other_engines
from qnext.errors import EngineError, UsageError
from qnext.hardware import Gpu, Machine, detect_machine
from qnext.models.hub_cache import hub_folder
from qnext.pipeline.engine_devices import merge_devices
from qnext.pipeline.planning import ChosenModel, PlannedModel, choose_quant_here, plan_chosen, require_fit
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice
from qnext.plan.budgets import engine_name
from qnext.plan.machine_speeds import machine_speeds
from qnext.plan.problem import backend_of

PROGRAM = "llama-server"
_LIST_LIMIT_S = 15.0
"""How long it may take to list its devices: a GPU's first use can take seconds."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """`program` is the llama-server to run, None for the engine of this Python; `said` why, for people.

    `devices` are the GPUs that llama-server lists (`CUDA0: NVIDIA GeForce RTX 4090`).
    """

    program: str | None
    said: str = ""
    devices: tuple[str, ...] = ()


def choose_engine(asked: str, program: str | None) -> EngineChoice:
    """The engine for `asked` (auto, python, llama-server); `program` is a llama-server named by the user.

    Raises UsageError for another word, EngineError where there is none.
    """
    if asked not in ("auto", "python", PROGRAM):
        raise UsageError(
            f"'{asked}' is not a value of --engine", hint=f"Choose one of: auto, python, {PROGRAM}."
        )
    if asked == "python":
        return EngineChoice(None)
    found = _find(program)
    if asked == PROGRAM:
        if found is None:
            raise EngineError(
                "there is no llama-server on PATH",
                hint="Name one with --llama-server PATH, or serve with --engine python.",
            )
        return EngineChoice(found, f"{PROGRAM}, as asked for", list_devices(found))
    build = installed_build()
    if build is None:
        if found is None:
            return EngineChoice(None)  # what needs it says how to install it
        return EngineChoice(found, f"{PROGRAM}, for llama-cpp-python is not installed", list_devices(found))
    machine = detect_machine(hub_folder(os.environ))
    idle = [at for at, gpu in enumerate(machine.gpus) if backend_of(gpu) not in build.backends]
    if found is None or not idle:
        return EngineChoice(None)
    devices = list_devices(found)
    merged = _merge(machine, devices).gpus  # the machine's own in their order, then those it did not know
    gained = [merged[at] for at in idle if _is_listed(merged[at], devices)]
    if not gained:
        name = machine.gpus[idle[0]].name or "a GPU"
        return EngineChoice(None, f"python; {name} stays idle: {PROGRAM} cannot use it either")
    return EngineChoice(
        found,
        f"{PROGRAM}, for it can use {gained[0].name or 'the GPU'} and this Python's build cannot; "
        "--engine python serves without it",
        devices,
    )


def plan_for_server(request: Request, taken: EngineChoice, paths: Paths, notice: Notice) -> PlannedModel:
    """The plan for llama-server, with the GPUs that it lists. Raises DoesNotFitError.

    Where these are not this Python's, nothing of the plan can be measured by a dry run.
    """
    chosen = choose_quant_here(request, paths, notice)
    around = chosen.surroundings
    if around.this_machine:
        machine = detect_machine(hub_folder(os.environ))
        merged = _merge(replace(around.machine, gpus=machine.gpus), taken.devices)
        machine = replace(merged, gpus=tuple(gpu for gpu in merged.gpus if _is_listed(gpu, taken.devices)))
        if machine.gpus != around.machine.gpus:
            around = replace(around, machine=machine, build=None, speeds=machine_speeds(machine), warnings=())
            chosen = ChosenModel(chosen.model, around, chosen.candidates, chosen.why)
    planned = plan_chosen(request, paths, chosen)
    require_fit(planned.plan)
    return planned


def list_devices(program: str) -> tuple[str, ...]:
    """The GPUs that the llama-server at `program` lists; empty where it does not answer."""
    folder = Path(program).parent
    engines = find_other_engines({**os.environ, "PATH": str(folder)}, _LIST_LIMIT_S)
    return next((engine.devices or () for engine in engines if engine.name == PROGRAM), ())


def _find(program: str | None) -> str | None:
    found = shutil.which(program or PROGRAM)
    if program is not None and found is None:
        raise UsageError(f"'{program}' is no program", hint="Give the path of a llama-server.")
    return None if found is None else str(Path(found).absolute())


def _is_listed(gpu: Gpu, devices: Iterable[str]) -> bool:
    return gpu.index is not None and engine_name(gpu, 0) in {one.partition(": ")[0] for one in devices}


def _merge(machine: Machine, devices: Iterable[str]) -> Machine:
    """`machine` with its GPUs as llama-server numbers them."""
    listed = [
        {"name": name, "description": what, "kind": "gpu", "total_bytes": None, "free_bytes": None}
        for name, _, what in (device.partition(": ") for device in devices)
    ]
    return merge_devices(machine, listed)
