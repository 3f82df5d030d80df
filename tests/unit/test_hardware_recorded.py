"""Recorded machines: shipped profiles load, wrong files are refused with the nearest right name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.errors import HardwareError
from qnext.hardware import list_profiles, load_machine, machine_from_dict, machine_to_dict
from qnext.hardware.machine import facts
from qnext.units import GIB


@pytest.mark.parametrize("name", list_profiles())
def test_each_shipped_profile_can_be_planned_for_and_survives_the_round_trip(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.memory.usable_bytes and machine.memory.rated_bandwidth_bps
    assert machine.cpu.usable_cores and machine.cpu.instruction_sets
    assert all(gpu.vram_free_bytes and gpu.rated_bandwidth_bps and gpu.pcie_gen for gpu in machine.gpus)
    assert set(machine.sources) == {path for path, _ in facts(machine)}
    assert machine_from_dict(json.loads(json.dumps(machine_to_dict(machine)))) == machine


def test_the_reference_box_is_as_described() -> None:
    machine = load_machine("rtx5080-128gb")
    assert machine.memory.rated_bandwidth_bps == 76_800_000_000
    assert [(gpu.pcie_gen, gpu.pcie_width) for gpu in machine.gpus] == [(5, 16)]
    assert {"epyc-12ch-cpu", "laptop-8gb", "rtx4070-64gb", "rtx5080-128gb"} <= set(list_profiles())


def write(folder: Path, text: str, name: str = "box.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


GOOD = "cpu: {physical_cores: 8}\nmemory: {total_bytes: 32GiB}\n"


def test_a_hand_written_machine_is_taken_as_idle_and_says_so(tmp_path: Path) -> None:
    machine = load_machine(write(tmp_path, GOOD + "gpus: [{name: X, vram_total_bytes: 8G}]\n"))
    assert machine.name == "box"
    assert machine.memory.usable_bytes == 32 * GIB
    assert machine.gpus[0].vram_free_bytes == 8 * GIB
    assert machine.sources["memory.usable_bytes"].startswith("assumed of an idle machine")
    assert machine.sources["memory.total_bytes"] == "stated by the recording box"


def test_a_recorded_limit_bounds_what_is_usable(tmp_path: Path) -> None:
    text = "cpu: {physical_cores: 8}\nmemory: {total_bytes: 32G, available_bytes: 30G, limit_bytes: 16G}\n"
    assert load_machine(write(tmp_path, text)).memory.usable_bytes == 16 * GIB


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "memori: {}\n", "'memori' is not a known key. Did you mean 'memory'?"),
        (
            "cpu: {physical_core: 8}\n",
            "'cpu.physical_core' is not a known key. Did you mean 'physical_cores'?",
        ),
        (
            "gpus: [{vram_totl_bytes: 1}]\n",
            "'gpus.0.vram_totl_bytes' is not a known key. Did you mean 'vram_total",
        ),
        ("cpu: {physical_cores: '8'}\n", "cpu.physical_cores: Input should be a valid integer"),
        ("memory: {total_bytes: 12 cows}\n", "total_bytes: '12 cows' is not a size"),
        ("memory: {total_bytes: -5}\n", "memory.total_bytes is below zero"),
        ("cpu: {sockets: 2026-01-01}\n", "not JSON serializable"),
        ("memory: {total_bytes: 32G}\n", "lacks memory.total_bytes or cpu.physical_cores"),
        ("- 1\n", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("cpu: [\n", "is not valid"),
        ("cpu: &a [*a]\n", "cannot be read"),
        ("\x00", "is not valid"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(HardwareError) as caught:
        load_machine(write(tmp_path, text))
    assert said in caught.value.message
    assert caught.value.hint


def test_json_works_like_yaml_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    data = {"cpu": {"physical_cores": 4}, "memory": {"total_bytes": 5 * GIB}}
    assert load_machine(write(tmp_path, json.dumps(data), "m.json")).memory.total_bytes == 5 * GIB
    (tmp_path / "m.yml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(HardwareError):
        load_machine(str(tmp_path / "m.yml"))


def test_an_unknown_profile_names_the_nearest_and_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(HardwareError) as caught:
        load_machine("rtx5080")
    assert "Did you mean 'rtx5080-128gb'?" in caught.value.hint
    with pytest.raises(HardwareError, match="No such file"):
        load_machine(str(tmp_path / "none.json"))
