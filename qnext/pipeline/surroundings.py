"""What a plan needs to know beside the model: machine, engine build, safe weight layout, RAM bandwidth.

Answers that cost something (a probe that runs a model, a bandwidth measurement) are asked for once per
machine and engine build and kept in the cache folder; `notice` tells the user why it takes a moment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qnext.config import Paths
from qnext.engine.build import EngineBuild, installed_build
from qnext.errors import EngineError, HardwareError, ModelError
from qnext.hardware import Machine, detect_machine, load_machine, machine_fingerprint
from qnext.models.hub_cache import hub_folder
from qnext.pipeline.engine_devices import add_engine_gpus
from qnext.pipeline.measurements import recall_measurements, remember_measurements
from qnext.pipeline.request import Request
from qnext.pipeline.speed_memory import recall_speeds
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import RepackPolicy
from qnext.plan.overrides import repack_overrides
from qnext.plan.problem import backend_of, untried_layout
from qnext.plan.speed import MachineSpeeds
from qnext.plan.traits import host_traits
from qnext.plan.values import Placement

logger = logging.getLogger(__name__)

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The machine as planned for. `changes` say in words how it differs from the one it was made from.

    `build` is None without an engine, for a recorded machine, and where the changes add or take GPUs.
    """

    machine: Machine
    this_machine: bool
    build: EngineBuild | None
    repack: RepackPolicy
    speeds: MachineSpeeds
    threads: int
    threads_batch: int
    warnings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def look_around(request: Request, paths: Paths, notice: Notice) -> Surroundings:
    """Detect or load the machine and fetch the remembered answers, asking those that are missing."""
    this_machine = request.hardware is None
    if request.hardware is None:
        machine = detect_machine(hub_folder(os.environ))
    else:
        machine = load_machine(request.hardware, paths.hardware_dir)
    build = installed_build() if this_machine else None
    if build is not None:
        machine = add_engine_gpus(machine, build)
    machine, warnings = _usable_gpus(machine, build, this_machine)
    if this_machine:
        machine = _with_bandwidth(machine, thread_counts(machine)[0], paths, notice)
    repack = _repack_policy(request, machine, build, paths, notice)
    changes: tuple[str, ...] = ()
    if request.what_if is not None:
        gpus, this_machine = len(machine.gpus), False
        from qnext.plan.what_if import with_changes

        machine, changes = with_changes(machine, request.what_if)
        build = build if len(machine.gpus) == gpus else None
        warnings = (*warnings, f"planned for a changed machine: {'; '.join(changes)}")
    speeds = machine_speeds(machine)
    if this_machine and build is not None:
        speeds = replace(speeds, history=recall_speeds(machine, build, paths, speeds))
    threads, threads_batch = thread_counts(machine)
    return Surroundings(
        machine=machine,
        this_machine=this_machine,
        build=build,
        repack=repack,
        speeds=speeds,
        threads=request.threads or threads,
        threads_batch=request.threads_batch or request.threads or threads_batch,
        warnings=warnings,
        changes=changes,
    )


def _usable_gpus(
    machine: Machine, build: EngineBuild | None, this_machine: bool
) -> tuple[Machine, tuple[str, ...]]:
    """The machine with the GPUs that the installed engine can drive, and a warning for each of the others.

    A card of this machine without an `index` is one that no engine has listed: it cannot be addressed.
    """
    if not this_machine:
        return machine, ()
    listed = tuple(gpu for gpu in machine.gpus if gpu.index is not None)
    if build is None:
        return replace(machine, gpus=listed), ()
    usable = tuple(gpu for gpu in listed if backend_of(gpu) in build.backends)
    idle = [gpu for gpu in machine.gpus if gpu not in usable]
    warnings = tuple(
        f"{gpu.name or 'a GPU'} is not used: the engine does not list it, is its runtime installed?"
        if backend_of(gpu) in build.backends
        else f"{gpu.name or 'a GPU'} is not used: the engine was built without {gpu.kind or 'its backend'}; "
        "build it again with QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version"
        for gpu in idle
    )
    return replace(machine, gpus=usable), warnings


def _repack_policy(
    request: Request, machine: Machine, build: EngineBuild | None, paths: Paths, notice: Notice
) -> RepackPolicy:
    """The asked-for layout, else the probed one; where nothing can be probed, AMX counts as a risk."""
    if request.repack is not None:
        return request.repack
    probed = probe_layout(machine, build, paths, notice) if build is not None else None
    return probed or untried_layout(machine)


def probe_layout(machine: Machine, build: EngineBuild, paths: Paths, notice: Notice) -> RepackPolicy | None:
    """The fastest weight layout that does not crash here, tried out once; None where it cannot be tried.

    Raises EngineError when no layout runs.
    """
    from qnext.engine.probe import known_policy, safe_repack_policy

    entry = layout_entry(paths, machine, build)
    known = known_policy(entry, build)
    if known is not None:
        return known.policy
    from qnext.models.gguf_reader import read_header
    from qnext.models.synth import demo_path

    try:
        model = demo_path(paths.demo_dir)
    except ModelError as error:
        notice(f"not checking which weight layout is safe on this CPU: {error.message}")
        return None
    notice("checking once which weight layout is safe on this CPU (about a second)")
    host = host_traits(machine.cpu.instruction_sets or ())
    threads = thread_counts(machine)[0]
    plain = Placement(threads=threads, threads_batch=threads)
    placements: dict[RepackPolicy, Placement] = {
        "full": replace(plain, extra_buffers=True),
        "experts": replace(plain, overrides=repack_overrides(read_header(model), host)),
        "off": plain,
    }
    return safe_repack_policy(model, _PROBE_PROMPT, placements, build, entry).policy


def layout_entry(paths: Paths, machine: Machine, build: EngineBuild) -> Path:
    """Cache file that remembers which weight layout is safe with this build on this machine."""
    return paths.probes_dir / f"layout-{machine_fingerprint(machine)}-{build.digest}.json"


_PROBE_PROMPT = "What can you do for me? " * 90
"""Long enough for a full ubatch of 512 tokens and a remainder."""


_BUSY = "on a busy machine"


def _with_bandwidth(machine: Machine, threads: int, paths: Paths, notice: Notice) -> Machine:
    """`machine` with what was measured here, its RAM bandwidth at least.

    Where that is not known it is measured in half a second, and again in a calm moment when the machine was
    busy: noise only takes away, so the higher figure counts.
    """
    machine = recall_measurements(machine, paths)
    known, busy = machine.memory.measured_bandwidth_bps, _is_busy(threads)
    if known and (busy or _BUSY not in machine.sources.get("memory.measured_bandwidth_bps", "")):
        return machine
    from qnext.hardware.bandwidth import measure_in_child

    notice("measuring RAM bandwidth once (under a second)")
    memory = machine.memory
    try:
        measured = measure_in_child(
            threads, llc_bytes=machine.cpu.llc_bytes, usable_bytes=memory.usable_bytes
        )
    except HardwareError as error:
        logger.info("%s", error.message)
        return machine
    how = f"read with {threads} threads in half a second{', ' + _BUSY if busy else ''}"
    machine = replace(
        machine,
        memory=replace(memory, measured_bandwidth_bps=max(known or 0, measured)),
        sources={**machine.sources, "memory.measured_bandwidth_bps": how},
    )
    remember_measurements(machine, paths)
    return machine


def _is_busy(threads: int) -> bool:
    """Whether other programs use a good part of the cores at this moment."""
    try:
        return os.getloadavg()[0] > max(0.5, threads / 4)
    except (AttributeError, OSError):
        return False


def require_this_machine(surroundings: Surroundings) -> EngineBuild:
    """The engine build to run with. Raises EngineError for a recorded machine or without an engine."""
    if not surroundings.this_machine:
        raise EngineError(
            "a recorded or changed machine can be planned for, not run on",
            hint="Leave out --hardware and --what-if, or use qnext plan.",
        )
    from qnext.engine.build import require_build

    return require_build()
