"""What llama.cpp says it allocated, and when that differs enough from the plan to warn."""

from __future__ import annotations

import pytest

from qnext.engine.log_reader import BufferSize, allocated_devices, device_of_buffer, read_buffer_sizes
from qnext.pipeline.running import differences
from qnext.plan.values import Budget, DeviceMemory
from qnext.units import GIB, MIB

LOG = """\
load_tensors: offloading 8 repeating layers to GPU
load_tensors:          CPU model buffer size =     8.74 MiB
load_tensors:   CPU_REPACK model buffer size =     6.75 MiB
load_tensors: RPC0[127.0.0.1:50052] model buffer size =   128.00 MiB
load_tensors:    CUDA_Host model buffer size =     1.00 MiB
llama_context:        CPU  output buffer size =     0.00 MiB
llama_kv_cache:        CPU KV buffer size =     2.00 MiB
llama_kv_cache: size =    2.00 MiB (  2048 cells,   2 layers,  1/1 seqs), K (f16):    1.00 MiB
llama_memory_recurrent:        CPU RS buffer size =     0.41 MiB
sched_reserve: RPC0[127.0.0.1:50052] compute buffer size =     7.04 MiB
sched_reserve:        CPU compute buffer size =     1.25 MiB
set_abort_callback: call
""".splitlines()

BUDGETS = {
    "CPU": Budget("CPU", "host", 8 * GIB, "CPU"),
    "RPC0": Budget("RPC0", "rpc", GIB, "RPC0[127.0.0.1:50052]"),
}


def test_every_buffer_is_counted_once_on_the_device_whose_memory_it_takes() -> None:
    host, device = allocated_devices(read_buffer_sizes(LOG), BUDGETS)
    assert host.weights_bytes == round(8.74 * MIB) + round(6.75 * MIB) + MIB
    assert (host.kv_bytes, host.recurrent_bytes) == (2 * MIB, round(0.41 * MIB))
    assert (host.compute_bytes, host.other_bytes) == (round(1.25 * MIB), 0)
    assert (device.weights_bytes, device.compute_bytes) == (128 * MIB, round(7.04 * MIB))
    assert host.budget_bytes == 8 * GIB and device.kind == "rpc"


def test_a_summary_line_is_no_buffer() -> None:
    assert BufferSize("CPU", "KV", 2 * MIB) in read_buffer_sizes(LOG)
    assert len(read_buffer_sizes(LOG)) == 9


@pytest.mark.parametrize(
    ("buffer", "device"),
    [("CUDA1", "CUDA1"), ("CUDA10", "CPU"), ("CUDA_Host", "CPU"), ("CPU_Mapped", "CPU"), ("AMX", "CPU")],
)
def test_buffer_names_are_matched_whole(buffer: str, device: str) -> None:
    assert device_of_buffer(buffer, ["CUDA0", "CUDA1"]) == device


def memory(weights: int) -> tuple[DeviceMemory, ...]:
    return (DeviceMemory("CPU", "host", None, weights, 0, 0, 0),)


@pytest.mark.parametrize(
    ("planned", "allocated", "warns"),
    [
        (GIB, GIB, False),
        (GIB, GIB + GIB // 100, False),
        (GIB, GIB + GIB // 100 + 1, True),
        (GIB, GIB - GIB // 50, True),
        (40 * GIB, 40 * GIB + 32 * MIB, False),
        (40 * GIB, 40 * GIB + 33 * MIB, True),
        (1000, 1000 + MIB // 20, False),  # llama.cpp prints hundredths of a MiB, for several buffers
        (0, 33 * MIB, True),
    ],
)
def test_more_than_a_hundredth_or_32_mib_off_warns(planned: int, allocated: int, warns: bool) -> None:
    found = differences(memory(planned), memory(allocated))
    assert bool(found) == warns
    if warns:
        assert ("more" if allocated > planned else "less") in found[0] and "instead of" in found[0]
