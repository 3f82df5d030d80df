"""Recorded machines: shipped profiles load, wrong files are refused with the nearest right name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.errors import HardwareError, UsageError
from qnext.hardware import list_profiles, load_machine, machine_from_dict, machine_to_dict
from qnext.hardware.machine import Cpu, Machine, Memory, facts
from qnext.hardware.recorded import find_profile, find_profiles, save_profile
from qnext.units import GIB


@pytest.mark.parametrize("name", list_profiles())
def test_each_shipped_profile_can_be_planned_for_and_survives_the_round_trip(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.memory.usable_bytes
    assert machine.memory.rated_bandwidth_bps or machine.cpu.hypervisor
    assert machine.cpu.usable_cores and machine.cpu.instruction_sets
    assert all(gpu.vram_free_bytes and gpu.rated_bandwidth_bps for gpu in machine.gpus)
    assert all(gpu.pcie_gen or machine.unified_memory for gpu in machine.gpus)
    assert set(machine.sources) == {path for path, _ in facts(machine)}
    assert machine_from_dict(json.loads(json.dumps(machine_to_dict(machine)))) == machine


@pytest.mark.parametrize("name", list_profiles())
def test_figures_of_a_shipped_profile_agree_with_each_other_and_have_sources(name: str) -> None:
    machine = load_machine(name)
    cpu, memory = machine.cpu, machine.memory
    if memory.channels and memory.speed_mtps and memory.rated_bandwidth_bps:
        given = memory.channels * memory.speed_mtps * 8_000_000
        assert memory.rated_bandwidth_bps == pytest.approx(given, rel=0.002)
        assert memory.channels <= (memory.channels_max or 0)
    assert (cpu.performance_cores or 0) + (cpu.efficiency_cores or 0) == cpu.physical_cores
    assert sum(node.logical_cores or 0 for node in memory.numa_nodes or ()) in (0, cpu.logical_cores)
    for gpu in machine.gpus:
        if machine.unified_memory:
            assert gpu.rated_bandwidth_bps == memory.rated_bandwidth_bps
        else:
            assert gpu.pcie_gen_max == min(gpu.pcie_gen_card_max or 0, gpu.pcie_gen_slot_max or 0)
            assert gpu.pcie_width_max == min(gpu.pcie_width_card_max or 0, gpu.pcie_width_slot_max or 0)
    comment = [line for line in find_profile(name).path.read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 4 and any(".com" in line or ".org" in line or "/proc" in line for line in comment)


def test_the_reference_box_is_as_described() -> None:
    machine = load_machine("rtx5080-128gb")
    assert machine.memory.rated_bandwidth_bps == 76_800_000_000
    assert [(gpu.pcie_gen, gpu.pcie_width) for gpu in machine.gpus] == [(5, 16)]
    assert {"epyc-12ch-cpu", "laptop-8gb", "rtx4070-64gb", "ci-2core"} <= set(list_profiles())
    assert len(list_profiles()) >= 14


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
        (
            "memory: {numa_nodes: [{node: 0}, {totl_bytes: 1}]}\n",
            "'memory.numa_nodes.1.totl_bytes' is not a known key. Did you mean 'total_bytes'?",
        ),
        ("cpu: {physical_cores: '8'}\n", 'cpu.physical_cores has to be a whole number, not "8"'),
        ("cpu: {physical_cores: 8.5}\n", "cpu.physical_cores has to be a whole number, not 8.5"),
        ("cpu: {physical_cores: true}\n", "cpu.physical_cores has to be a whole number, not true"),
        ("cpu: {model: 8}\n", "cpu.model has to be a text, in quotes if it looks like a number, not 8"),
        ("gpus: [{compute_capability: 8.9}]\n", "gpus.0.compute_capability has to be a text"),
        ("gpus: [{pci_bus_id: 0000:01:00.0}]\n", "gpus.0.pci_bus_id has to be a text"),
        ("cpu: {instruction_sets: avx2}\n", "cpu.instruction_sets has to be a list"),
        ("cpu: 5\n", "cpu has to be a mapping of keys, not 5"),
        ("gpus: {}\n", "gpus has to be a list"),
        ("gpus: [7]\n", "gpus.0 has to be a mapping of keys"),
        ("unified_memory: maybe\n", "unified_memory has to be true or false"),
        ("sources: [1]\n", "sources has to be a mapping of keys"),
        ("memory: {bandwidth_by_threads: [[1]]}\n", "a list of pairs [threads, bytes per second]"),
        ("memory: {total_bytes: 12 cows}\n", "total_bytes: '12 cows' is not a size"),
        ("memory: {total_bytes: -5}\n", "memory.total_bytes is below zero"),
        ("memory: {total_bytes: -5G}\n", "'-5G' is not a size"),
        (f"memory: {{total_bytes: {'9' * 400}G}}\n", "is larger than any memory"),
        (f"memory: {{total_bytes: {'9' * 400}}}\n", "hardware can have"),
        (f"memory: {{total_bytes: 0x{'f' * 4000}}}\n", "hardware can have"),
        (f"memory: {{total_bytes: {'9' * 5000}}}\n", "not valid"),
        ("memory: {total_bytes: 2000000T}\n", "memory.total_bytes is larger than hardware can have"),
        ("memory: {numa_nodes: [{total_bytes: -1}]}\n", "memory.numa_nodes.0.total_bytes is below zero"),
        ("memory: {bandwidth_by_threads: [[2, -1]]}\n", "bandwidth_by_threads.0.1 is below zero"),
        ("memory: {total_bytes: .inf}\n", "cannot be read"),
        ("cpu: {quota_cores: .inf}\n", "cpu.quota_cores"),
        ("cpu: {quota_cores: .nan}\n", "cpu.quota_cores"),
        ("memory: {bandwidth_spread: .nan}\n", "memory.bandwidth_spread"),
        ("cpu: {physical_cores: 100000}\n", "cpu.physical_cores is larger than hardware can have"),
        ("gpus: [{pcie_gen_max: 60000}]\n", "gpus.0.pcie_gen_max has to be one of 1, 2"),
        ("gpus: [{pcie_width: 3}]\n", "gpus.0.pcie_width has to be one of 1, 2"),
        ("gpus: [{kind: cda}]\n", "gpus.0.kind has to be one of cuda, rocm"),
        ("memory: {total_bytes: 8G, available_bytes: 9G}\n", "memory.available_bytes is above memory.total"),
        ("gpus: [{vram_total_bytes: 8G, vram_free_bytes: 9G}]\n", "gpus.0.vram_free_bytes is above"),
        ("cpu: {physical_cores: 4, usable_cores: 5}\n", "cpu.usable_cores is above cpu.physical_cores"),
        ('cpu: {model: "\\e[31mred"}\n', "cpu.model is too long or holds characters that cannot be"),
        ('"\\e[31m": 1\n', "'\\x1b[31m'"),
        ("cpu: {1: 2}\n", "the key 1 is not a text"),
        ("cpu: {sockets: 2026-01-01}\n", "sockets: datetime.date(2026, 1, 1) is neither a text nor a number"),
        ("cpu: {sockets: 1, sockets: 2}\n", "the key 'sockets' is there twice"),
        ("cpu: &a {sockets: 1}\nmemory: *a\n", "aliases (*name) are not allowed"),
        ("cpu: &a [*a]\n", "aliases (*name) are not allowed"),
        ("cpu: !!python/object/apply:os.getcwd []\n", "is not valid"),
        ("[" * 1200, "nested too deeply"),
        ("memory: {total_bytes: 32G}\n", "lacks memory.total_bytes or cpu.physical_cores"),
        ("- 1\n", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("schema: qnext.doctor/1\nmachine: 5\n", "does not hold a mapping"),
        ("cpu: [\n", "is not valid"),
        ("\x00", "is not valid"),
        (" " * 300_000, "is too large"),
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


def test_a_file_that_expands_without_end_is_refused_at_once(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(HardwareError, match="aliases"):
        load_machine(write(tmp_path, "a0: &a0 [x]\n" + "\n".join(levels)))


@pytest.mark.parametrize("text", ['{"cpu": {"quota_cores": NaN}}', '{"os": "a", "os": "b"}', "[" * 90_000])
def test_json_is_read_as_strictly_as_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(HardwareError, match="is not valid"):
        load_machine(write(tmp_path, text, "box.json"))


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with pytest.raises(HardwareError, match="too large"):
        load_machine(str(tmp_path / "zero.yaml"))


def test_what_a_command_printed_as_json_is_read_as_the_machine_in_it(tmp_path: Path) -> None:
    machine = {"cpu": {"physical_cores": 4}, "memory": {"total_bytes": 5 * GIB}}
    text = json.dumps({"schema": "qnext.doctor/1", "machine": machine, "findings": []})
    assert load_machine(write(tmp_path, text, "m.json")).cpu.physical_cores == 4


def test_a_quota_bounds_the_threads_of_an_idle_machine(tmp_path: Path) -> None:
    text = "cpu: {physical_cores: 8, logical_cores: 16, quota_cores: 2.5}\nmemory: {total_bytes: 32G}\n"
    cpu = load_machine(write(tmp_path, text)).cpu
    assert (cpu.usable_cores, cpu.usable_logical_cores) == (2, 2)


BOX = Machine(cpu=Cpu(physical_cores=8, model="X"), memory=Memory(total_bytes=32 * GIB, available_bytes=GIB))


def test_a_saved_machine_is_found_by_name_as_idle(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "hardware"
    path = save_profile(BOX, "my-box.2", folder)
    assert path == folder / "my-box.2.yaml" and [path] == list(folder.iterdir())
    machine = load_machine("my-box.2", folder)
    assert (machine.name, machine.cpu.physical_cores) == ("my-box.2", 8)
    assert machine.memory.usable_bytes == 32 * GIB
    assert [profile.name for profile in find_profiles(folder) if profile.own] == ["my-box.2"]
    with pytest.raises(HardwareError) as caught:
        load_machine("my-bx.2", folder)
    assert "Did you mean 'my-box.2'?" in caught.value.hint


@pytest.mark.parametrize("name", list_profiles())
def test_every_machine_survives_being_saved(name: str, tmp_path: Path) -> None:
    before = load_machine(name)
    save_profile(before, "copy", tmp_path)
    after = load_machine("copy", tmp_path)
    idle = {"memory.available_bytes", "memory.usable_bytes", "gpus"}
    known = {path: value for path, value in facts(before) if path not in idle and "_free_" not in path}
    assert known == {path: value for path, value in facts(after) if path in known}


def test_saving_replaces_only_when_told_to_and_leaves_no_traces(tmp_path: Path) -> None:
    path = save_profile(BOX, "box", tmp_path)
    before = path.read_text()
    with pytest.raises(UsageError) as caught:
        save_profile(BOX, "box", tmp_path)
    assert "--force" in caught.value.hint
    with pytest.raises(HardwareError, match="lacks"):
        save_profile(Machine(), "box", tmp_path, force=True)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    save_profile(Machine(cpu=Cpu(physical_cores=2), memory=BOX.memory), "box", tmp_path, force=True)
    assert load_machine("box", tmp_path).cpu.physical_cores == 2


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "/tmp/x",
        "a\\b",
        "x.yaml",
        "x.YML",
        "-x",
        "--force",
        "ä",
        "a b",
        "a\n",
        "n" * 65,
    ],
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be a profile's name"):
        save_profile(BOX, name, tmp_path, force=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rtx5080-128gb", "RTX5080-128GB"])
def test_a_shipped_name_stays_the_shipped_machine(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes with qnext"):
        save_profile(BOX, name, tmp_path, force=True)
    (tmp_path / "rtx5080-128gb.yaml").write_text(GOOD)
    assert load_machine("rtx5080-128gb", tmp_path).gpus


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HardwareError, match="cannot be written"):
        save_profile(BOX, "box", tmp_path / "file" / "hardware")
