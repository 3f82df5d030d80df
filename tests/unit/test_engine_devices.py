"""GPUs that the engine lists join those that NVML knows."""

from dataclasses import replace
from typing import Any

import pytest

from qnext.engine.build import EngineBuild
from qnext.hardware import Gpu, Machine
from qnext.pipeline.engine_devices import merge_devices
from qnext.pipeline.surroundings import _usable_gpus
from qnext.units import GIB

CPU = {"name": "CPU", "description": "a CPU", "kind": "host", "free_bytes": GIB, "total_bytes": GIB}


def device(
    name: str, kind: str = "gpu", total: int = 24 * GIB, free: int = 23 * GIB, bus: str | None = None
) -> dict[str, Any]:
    return {
        "pci_bus_id": bus,
        "name": name,
        "description": f"card {name}",
        "kind": kind,
        "free_bytes": free,
        "total_bytes": total,
    }


def test_a_card_without_nvml_is_found_with_its_memory() -> None:
    machine = merge_devices(Machine(), [CPU, device("ROCm0")])
    (gpu,) = machine.gpus
    assert (gpu.kind, gpu.index, gpu.name) == ("rocm", 0, "card ROCm0")
    assert (gpu.vram_total_bytes, gpu.vram_free_bytes) == (24 * GIB, 23 * GIB)
    assert machine.sources["gpus.0.vram_total_bytes"] == "the engine's device list"


def test_what_nvml_knows_of_a_card_stays() -> None:
    known = Gpu(
        name="RTX", kind="cuda", index=0, vram_total_bytes=16 * GIB, vram_free_bytes=15 * GIB, driver="580"
    )
    machine = merge_devices(Machine(gpus=(known,)), [CPU, device("CUDA0"), device("CUDA1")])
    assert machine.gpus[0] == known
    assert [gpu.index for gpu in machine.gpus] == [0, 1]


def test_absurd_memory_is_unknown() -> None:
    machine = merge_devices(Machine(), [device("Vulkan0", total=1 << 60, free=0)])
    assert (machine.gpus[0].vram_total_bytes, machine.gpus[0].vram_free_bytes) == (None, None)


def test_a_gpu_in_the_processor_counts_only_where_there_is_no_other() -> None:
    both = [device("Vulkan0"), device("Vulkan1", kind="igpu")]
    assert [gpu.index for gpu in merge_devices(Machine(), both).gpus] == [0]
    alone = merge_devices(Machine(), [device("Vulkan0", kind="igpu")])
    assert alone.unified_memory is True
    assert len(alone.gpus) == 1


def test_rpc_workers_are_no_gpus_of_this_machine() -> None:
    assert merge_devices(Machine(), [device("RPC0")]).gpus == ()


FAST = Gpu(name="RTX 5080", kind="cuda", index=0, pci_bus_id="0000:02:00.0", vram_total_bytes=16 * GIB)
SLOW = Gpu(name="RTX 3060", kind="cuda", index=1, pci_bus_id="0000:01:00.0", vram_total_bytes=12 * GIB)
RADEON = Gpu(
    name="RX 7900 XTX", kind="rocm", pci_bus_id="0000:03:00.0", vram_total_bytes=24 * GIB, driver="amdgpu"
)
ARC = Gpu(name="Arc A770", kind="sycl", pci_bus_id="0000:0a:00.0", driver="xe")


def test_the_engine_numbers_unequal_cards_by_their_bus_ids() -> None:
    listed = [device("CUDA0", bus="0000:01:00.0"), device("CUDA1", bus="0000:02:00.0")]
    machine = merge_devices(Machine(gpus=(FAST, SLOW)), listed)
    assert [(gpu.name, gpu.index) for gpu in machine.gpus] == [("RTX 5080", 1), ("RTX 3060", 0)]
    assert machine.gpus[0].vram_total_bytes == 16 * GIB
    assert machine.sources["gpus.0.index"] == "the engine's device list"


def test_a_card_the_engine_does_not_list_cannot_be_addressed() -> None:
    machine = merge_devices(Machine(gpus=(FAST, SLOW)), [device("CUDA0", bus="0000:01:00.0")])
    assert [gpu.index for gpu in machine.gpus] == [None, 0]


@pytest.mark.parametrize("bus", ["0000:03:00.0", None])
@pytest.mark.parametrize(("name", "kind"), [("ROCm0", "rocm"), ("Vulkan0", "vulkan")])
def test_a_card_known_from_sysfs_and_from_the_engine_appears_once(
    bus: str | None, name: str, kind: str
) -> None:
    (gpu,) = merge_devices(Machine(gpus=(RADEON,)), [CPU, device(name, bus=bus)]).gpus
    assert (gpu.name, gpu.kind, gpu.index) == ("RX 7900 XTX", kind, 0)
    assert (gpu.vram_total_bytes, gpu.vram_free_bytes, gpu.driver) == (24 * GIB, 23 * GIB, "amdgpu")


def test_two_cards_without_bus_ids_are_told_apart_by_size() -> None:
    listed = [device("Vulkan0", total=16 * GIB, free=15 * GIB), device("Vulkan1", total=24 * GIB - 5)]
    machine = merge_devices(Machine(gpus=(RADEON, replace(ARC, vram_total_bytes=16 * GIB))), listed)
    assert [gpu.index for gpu in machine.gpus] == [1, 0]


def test_a_card_under_two_backends_keeps_its_own() -> None:
    for known in (Machine(gpus=(FAST,)), Machine(gpus=(replace(FAST, index=None),))):
        listed = [device("Vulkan0", bus="0000:02:00.0"), device("CUDA0", bus="0000:02:00.0")]
        (gpu,) = merge_devices(known, listed).gpus
        assert (gpu.kind, gpu.index) == ("cuda", 0)
    unknown = merge_devices(Machine(), [device("CUDA0", bus="0:2:0.0"), device("Vulkan0", bus="0:2:0.0")])
    assert [gpu.kind for gpu in unknown.gpus] == ["cuda"]


def test_an_nvidia_card_is_driven_by_vulkan_where_that_is_all_there_is() -> None:
    (gpu,) = merge_devices(Machine(gpus=(FAST,)), [device("Vulkan0", bus="0000:02:00.0")]).gpus
    assert (gpu.name, gpu.kind, gpu.index, gpu.vram_total_bytes) == ("RTX 5080", "vulkan", 0, 16 * GIB)


def test_memory_the_kernel_does_not_state_comes_from_the_engine() -> None:
    machine = merge_devices(Machine(gpus=(ARC,)), [device("SYCL0", total=16 * GIB, free=15 * GIB)])
    assert (machine.gpus[0].kind, machine.gpus[0].vram_total_bytes) == ("sycl", 16 * GIB)
    assert machine.sources["gpus.0.vram_total_bytes"] == "the engine's device list"


def test_a_processors_gpu_alone_in_the_list_is_not_taken_for_the_card_that_is_missing() -> None:
    igpu = device("Vulkan0", kind="igpu", total=60 * GIB, bus="0000:c1:00.0")
    machine = merge_devices(Machine(gpus=(RADEON,)), [igpu])
    assert [(gpu.name, gpu.index) for gpu in machine.gpus] == [("RX 7900 XTX", None), ("card Vulkan0", 0)]


def test_a_plan_uses_only_cards_that_an_engine_has_listed() -> None:
    here = Machine(gpus=(FAST, RADEON))
    hip = EngineBuild("x", "1", None, "0", ("cpu", "cuda", "hip"))
    machine, warnings = _usable_gpus(here, hip, True)
    assert machine.gpus == (FAST,)
    assert warnings == ("RX 7900 XTX is not used: the engine does not list it, is its runtime installed?",)
    machine, (first, second) = _usable_gpus(here, replace(hip, backends=("cpu",)), True)
    assert machine.gpus == () and "built without cuda" in first and "built without rocm" in second
    assert _usable_gpus(here, None, True) == (Machine(gpus=(FAST,)), ())
    assert _usable_gpus(here, None, False) == (here, ())
