"""GPUs that the engine lists join those that NVML knows."""

from typing import Any

from qnext.hardware import Gpu, Machine
from qnext.pipeline.engine_devices import merge_devices
from qnext.units import GIB

CPU = {"name": "CPU", "description": "a CPU", "kind": "host", "free_bytes": GIB, "total_bytes": GIB}


def device(name: str, kind: str = "gpu", total: int = 24 * GIB, free: int = 23 * GIB) -> dict[str, Any]:
    return {
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
    known = Gpu(name="RTX", kind="cuda", index=0, vram_total_bytes=16 * GIB, driver="580")
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
