"""Measured facts are remembered for the very thing that was measured, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qnext.config import Paths
from qnext.hardware import Machine, NumaNode, load_machine
from qnext.pipeline.measurements import recall_measurements, remember_measurements

GB = 1_000_000_000


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "config", tmp_path / "data", tmp_path / "cache")


def box() -> Machine:
    machine = load_machine("rtx5080-128gb")
    nodes = (NumaNode(0, 64 * GB, 16), NumaNode(1, 64 * GB, 16))
    return replace(machine, memory=replace(machine.memory, numa_nodes=nodes))


def measured(machine: Machine) -> Machine:
    nodes = tuple(replace(node, measured_bandwidth_bps=30 * GB) for node in machine.memory.numa_nodes or ())
    return replace(
        machine,
        memory=replace(
            machine.memory,
            measured_bandwidth_bps=60 * GB,
            bandwidth_by_threads=((1, 20 * GB), (8, 60 * GB)),
            bandwidth_knee_threads=8,
            numa_nodes=nodes,
        ),
        disk=replace(machine.disk, read_bps=3 * GB),
        gpus=(replace(machine.gpus[0], pcie_gen_loaded=5, h2d_pinned_bps=50 * GB),),
        sources={**machine.sources, "disk.read_bps": "read directly"},
    )


def facts(machine: Machine) -> tuple[object, ...]:
    node = (machine.memory.numa_nodes or ())[0].measured_bandwidth_bps
    gpu, memory = machine.gpus[0], machine.memory
    by_threads = memory.bandwidth_by_threads
    return memory.measured_bandwidth_bps, by_threads, node, machine.disk.read_bps, gpu.h2d_pinned_bps


def test_what_was_measured_comes_back_with_its_day(paths: Paths) -> None:
    assert recall_measurements(box(), paths) == box()
    remember_measurements(measured(box()), paths)
    again = recall_measurements(box(), paths)
    assert facts(again) == facts(measured(box()))
    assert again.sources["disk.read_bps"].startswith("read directly, on 20")
    remember_measurements(again, paths)
    assert recall_measurements(box(), paths).sources == again.sources


def test_a_later_measurement_replaces_an_earlier_one_and_leaves_the_others(paths: Paths) -> None:
    remember_measurements(measured(box()), paths)
    faster = replace(box(), disk=replace(box().disk, read_bps=7 * GB))
    remember_measurements(faster, paths)
    again = recall_measurements(box(), paths)
    assert again.disk.read_bps == 7 * GB
    assert again.memory.measured_bandwidth_bps == 60 * GB


def test_a_card_in_another_slot_is_measured_again(paths: Paths) -> None:
    remember_measurements(measured(box()), paths)
    moved = replace(box(), gpus=(replace(box().gpus[0], pci_bus_id="0000:07:00.0"),))
    again = recall_measurements(moved, paths)
    assert again.gpus[0].h2d_pinned_bps is None and again.disk.read_bps == 3 * GB


def test_memory_at_another_speed_and_another_disk_are_measured_again(paths: Paths) -> None:
    remember_measurements(measured(box()), paths)
    faster = replace(box(), memory=replace(box().memory, speed_mtps=6000))
    assert recall_measurements(faster, paths).memory.measured_bandwidth_bps is None
    local = replace(box(), disk=replace(box().disk, filesystem="nfs4"))
    assert recall_measurements(local, paths).disk.read_bps is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"memory": 3}', '{"memory": {"key": null, "facts": []}}']
)
def test_a_damaged_file_counts_as_nothing_measured(paths: Paths, content: str) -> None:
    remember_measurements(measured(box()), paths)
    (entry,) = paths.probes_dir.iterdir()
    entry.write_text(content)
    assert recall_measurements(box(), paths) == box()
