"""What `qnext doctor --full` measures: RAM, disk, GPU links, and which weight layout is safe. Some 12 s.

One after the other, because each would slow the others down. What fails is a note beside the fact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qnext.config import Paths
from qnext.engine.build import EngineBuild
from qnext.engine.link import measure_links
from qnext.errors import EngineError, HardwareError
from qnext.hardware import Machine
from qnext.hardware.bandwidth import measure_bandwidth, read_node_cpus, sweep_threads, with_bandwidth
from qnext.hardware.disk import measure_disk, with_disk_speed
from qnext.pipeline.measurements import remember_measurements
from qnext.pipeline.surroundings import Notice, probe_layout
from qnext.plan.options import RepackPolicy

Show = Callable[[float, str], None]

_BANDWIDTH_SHARE, _DISK_SHARE, _LAYOUT_SHARE = 0.4, 0.7, 0.8


def measure_machine(
    machine: Machine,
    build: EngineBuild | None,
    model_folder: Path,
    paths: Paths,
    notice: Notice,
    show: Show,
) -> tuple[Machine, RepackPolicy | None]:
    """(`machine` with what was measured, also remembered; the safe weight layout, None if not found out).

    `model_folder` is where models are kept. `show` is told the share that is done, 0 to 1, and what is next.
    """
    show(0.0, "reading RAM")
    try:
        bandwidth = measure_bandwidth(
            sweep_threads(machine.cpu),
            nodes=read_node_cpus(),
            llc_bytes=machine.cpu.llc_bytes,
            usable_bytes=machine.memory.usable_bytes,
            on_progress=lambda share: show(share * _BANDWIDTH_SHARE, "reading RAM"),
        )
        machine = with_bandwidth(machine, bandwidth)
    except HardwareError as error:
        notice(error.message)
    show(_BANDWIDTH_SHARE, "reading the disk")
    machine = with_disk_speed(machine, measure_disk(model_folder))
    layout: RepackPolicy | None = None
    if build is not None:
        show(_DISK_SHARE, "trying weight layouts")
        try:
            layout = probe_layout(machine, build, paths, lambda _: None)
        except EngineError as error:
            notice(error.message)
        show(_LAYOUT_SHARE, "copying to GPUs")
        machine = measure_links(machine, build, on_progress=lambda what: show(_LAYOUT_SHARE, what))
    remember_measurements(machine, paths)
    return machine, layout
