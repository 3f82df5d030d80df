"""GPU sensors that lie, raise, hang or die cost a value, never a traceback or a wrong number.

A stand-in `pynvml` module is put before the real one on the reading child's path, so the child process, its
deadline and its protocol are the real ones.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.hardware.detect import detect_machine
from qnext.hardware.gpus import detect_gpus, judge_gpus, normal_bus_id
from qnext.hardware.machine import Gpu, Machine, Sources, facts
from qnext.hardware.nvml import NvmlReport, read_nvml
from qnext.units import GIB, MIB

STAND_IN = """
import time
from types import SimpleNamespace
NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(at): return at
def nvmlDeviceGetName(gpu): return "NVIDIA GeForce RTX 5080"
def nvmlDeviceGetUUID(gpu): return f"GPU-{gpu}{gpu}aa"
def nvmlDeviceGetPciInfo(gpu): return SimpleNamespace(busId=f"00000000:0{gpu + 1}:00.0")
nvmlMemory_v2 = 2
def nvmlDeviceGetMemoryInfo(gpu, version=1):
    return SimpleNamespace(total=16303 << 20, free=15000 << 20, used=(1303 if version == 1 else 903) << 20)
def nvmlDeviceGetCudaComputeCapability(gpu): return (12, 0)
def nvmlSystemGetDriverVersion(): return "580.65"
def nvmlDeviceGetNumGpuCores(gpu): return 10752
def nvmlDeviceGetMaxClockInfo(gpu, kind): return 15001 if kind == 2 else 3090
def nvmlDeviceGetMemoryBusWidth(gpu): return 256
def nvmlDeviceGetCurrPcieLinkGeneration(gpu): return 1
def nvmlDeviceGetMaxPcieLinkGeneration(gpu): return 5
def nvmlDeviceGetCurrPcieLinkWidth(gpu): return 16
def nvmlDeviceGetMaxPcieLinkWidth(gpu): return 16
def nvmlDeviceGetGpuMaxPcieLinkGeneration(gpu): return 5
def nvmlDeviceGetEnforcedPowerLimit(gpu): return 300000
def nvmlDeviceGetPowerManagementDefaultLimit(gpu): return 360000
def nvmlDeviceGetPowerManagementLimitConstraints(gpu): return [200000, 400000]
def nvmlDeviceGetClockInfo(gpu, kind): return 405 if kind == 2 else 210
def nvmlDeviceGetCurrentClocksEventReasons(gpu): return 0x1 | 0x4
def nvmlDeviceGetCurrentEccMode(gpu): return 0
def nvmlDeviceGetMigMode(gpu): return [0, 0]
def nvmlDeviceGetComputeRunningProcesses(gpu):
    return [SimpleNamespace(pid=4242, usedGpuMemory=None), SimpleNamespace(pid=4243, usedGpuMemory=5 << 20)]
def nvmlDeviceGetGraphicsRunningProcesses(gpu): return [SimpleNamespace(pid=4242, usedGpuMemory=None)]
"""

FUNCTIONS = sorted(set(re.findall(r"def (nvml\w+)", STAND_IN)))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with Python text appended to the stand-in; detection then reads it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()

    def detect(extra: str = "", environ: dict[str, str] | None = None, deadline_s: float = 20.0) -> Any:
        (tmp_path / "pynvml.py").write_text(STAND_IN + extra)
        sources = Sources()
        gpus = detect_gpus(sources, environ or {}, tmp_path, deadline_s)
        for path, value in facts(Machine(gpus=gpus)):
            assert not path.startswith("gpus.") or value is None or sources[path]
        return gpus, sources

    return detect


linux_only = pytest.mark.skipif(sys.platform == "win32", reason="the driver is looked for under /dev")


@linux_only
def test_a_healthy_card_is_read_in_full(stand_in: Any) -> None:
    gpus, sources = stand_in()
    assert gpus[1] == Gpu(
        name="NVIDIA GeForce RTX 5080",
        kind="cuda",
        index=1,
        pci_bus_id="0000:02:00.0",
        vram_total_bytes=16303 * MIB,
        vram_free_bytes=15000 * MIB,
        rated_bandwidth_bps=960_064_000_000,
        compute_capability="12.0",
        pcie_gen=1,
        pcie_gen_max=5,
        pcie_width=16,
        pcie_width_max=16,
        driver="580.65",
        pcie_gen_card_max=5,
        power_limit_w=300,
        power_default_w=360,
        power_max_w=400,
        core_clock_mhz=210,
        core_clock_max_mhz=3090,
        memory_clock_mhz=405,
        memory_clock_max_mhz=15001,
        throttle_reasons=("power cap",),
        processes=2,
        vram_others_bytes=903 * MIB,
        ecc=False,
        mig=False,
    )
    assert sources["gpus.1.pcie_gen"] == "NVML, drops when idle"
    assert not re.search(r"GPU-|424[23]", str(gpus) + str(sources))  # no serial-like identity, no process id


def right_or_unknown(gpus: tuple[Gpu, ...], healthy: tuple[Gpu, ...]) -> bool:
    """Whether every fact is the healthy one or None; a GPU that is not there claims nothing."""
    return all(
        value in (None, getattr(good, name))
        for gpu, good in zip(gpus, healthy, strict=False)
        for name, value in asdict(gpu).items()
    )


@pytest.mark.thorough
@linux_only
def test_each_function_may_fail(stand_in: Any) -> None:
    healthy, _ = stand_in()
    for function in FUNCTIONS:
        gpus, sources = stand_in(f"\ndef {function}(*a, **k): raise NVMLError('Unknown Error')\n")
        assert right_or_unknown(gpus, healthy), function
        assert gpus or "Unknown Error" in sources["gpus"], function


@pytest.mark.thorough
@linux_only
def test_each_function_may_hang(stand_in: Any) -> None:
    healthy, _ = stand_in()
    for function in FUNCTIONS:
        began = time.monotonic()
        gpus, sources = stand_in(f"\ndef {function}(*a, **k): time.sleep(60)\n", deadline_s=0.2)
        assert time.monotonic() - began < 5, function
        assert right_or_unknown(gpus, healthy), function
        assert "did not answer within 0.2 s" in sources["gpus"], function


@linux_only
def test_a_gpu_that_is_part_of_its_processor_shares_the_memory(stand_in: Any, tmp_path: Path) -> None:
    stand_in(
        "\ndef nvmlDeviceGetCount(): return 1\ndef nvmlDeviceGetName(gpu): return 'NVIDIA GB10'\n"
        "def nvmlDeviceGetMemoryInfo(*a, **k): raise NVMLError('Not Supported')\n"
    )
    machine = detect_machine(tmp_path, root=tmp_path, environ={}, gpu_deadline_s=20.0)
    assert machine.unified_memory is True
    assert machine.gpus[0].vram_total_bytes is None
    assert machine.sources["gpus.0.vram_total_bytes"] == "NVML: Not Supported"


ZERO_IS_AN_ANSWER = {"ecc", "mig", "throttle_bits", "processes", "vram_used"}


def test_each_reading_may_lie() -> None:
    good = {
        **card("x", "0000:01:00.0", 1),
        "vram_free": GIB,
        "vram_used": GIB,
        "compute_capability": [8, 9],
        "driver": "580.65",
        "memory_clock": 10501,
        "memory_bus_width": 384,
        "pcie_gen": 1,
        "pcie_gen_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "pcie_gen_card_max": 4,
        "power_limit": 450_000,
        "power_default": 450_000,
        "power_range": [150_000, 600_000],
        "core_clock_now": 210,
        "memory_clock_now": 405,
        "throttle_bits": 4,
        "ecc": 1,
        "mig": 0,
        "processes": 3,
    }
    healthy = judge_gpus(NvmlReport([good], [{}]), Sources(), {})
    for key in good:
        for lie in (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, -1, "[N/A]", "", None, 1e30, [], [0], [0, 0]):
            if lie == 0 and key in ZERO_IS_AN_ANSWER:
                continue
            gpus = judge_gpus(NvmlReport([{**good, key: lie}], [{}]), Sources(), {})
            assert right_or_unknown(gpus, healthy), (key, lie)


@linux_only
def test_an_older_driver_is_asked_for_throttling_by_the_older_name(stand_in: Any) -> None:
    gpus, _ = stand_in(
        "\ndef nvmlDeviceGetCurrentClocksEventReasons(gpu): raise NVMLError('Function Not Found')\n"
        "def nvmlDeviceGetCurrentClocksThrottleReasons(gpu): return 0x20 | 0x40\n"
    )
    assert gpus[0].throttle_reasons == ("temperature, by the driver", "temperature, by the hardware")


def test_a_card_in_slices_states_no_memory_of_its_own() -> None:
    sources = Sources()
    readings = {"vram_total": 80 * GIB, "vram_free": 79 * GIB, "vram_used": GIB, "mig": 1}
    (gpu,) = judge_gpus(NvmlReport([readings], [{}]), sources, {})
    assert (gpu.mig, gpu.vram_total_bytes, gpu.vram_free_bytes) == (True, None, None)
    assert "slice" in sources["gpus.0.vram_total_bytes"]


def test_an_idle_card_at_clocks_that_were_asked_for_is_not_throttled() -> None:
    (gpu,) = judge_gpus(NvmlReport([{"throttle_bits": 0x3}], [{}]), Sources(), {})
    assert gpu.throttle_reasons == ()


def test_processes_out_of_a_containers_sight_are_not_counted_as_none() -> None:
    sources = Sources()
    readings = {"vram_total": 24 * GIB, "vram_used": 6 * GIB, "processes": 0}
    (gpu,) = judge_gpus(NvmlReport([readings], [{}]), sources, {})
    assert (gpu.processes, gpu.vram_others_bytes) == (None, 6 * GIB)
    assert "out of sight" in sources["gpus.0.processes"]


def test_a_card_whose_memory_is_empty_is_held_by_nobody() -> None:
    readings = {"vram_total": 24 * GIB, "vram_used": 0, "processes": 0}
    (gpu,) = judge_gpus(NvmlReport([readings], [{}]), Sources(), {})
    assert (gpu.processes, gpu.vram_others_bytes) == (0, 0)


@pytest.mark.thorough
@linux_only
def test_a_hanging_sensor_costs_one_deadline_and_only_what_comes_after_it(stand_in: Any) -> None:
    hang = "\ndef nvmlDeviceGetCurrPcieLinkGeneration(gpu): time.sleep(60)\n"
    began = time.monotonic()
    gpus, sources = stand_in(hang, deadline_s=4.0)
    assert time.monotonic() - began < 12
    assert [gpu.vram_free_bytes for gpu in gpus] == [15000 * MIB] * 2
    assert gpus[0].pcie_gen is gpus[0].pcie_width_max is None
    assert sources["gpus.0.pcie_gen"] == "NVML did not answer within 4 s"


@linux_only
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("\ndef nvmlInit(): raise NVMLError('Driver/library version mismatch')\n", "version mismatch"),
        ("\ndef nvmlInit(): time.sleep(60)\n", "did not answer within"),
        ("\ndef nvmlInit(): import os; os.abort()\n", "ended with status -6"),
        ("\nraise ImportError('no such file')\n", "not usable: no such file"),
        ("\ndef nvmlDeviceGetCount(): return 0\n", "lists no GPU"),
    ],
)
def test_a_driver_that_fails_at_once_gives_no_gpu_and_a_reason(stand_in: Any, extra: str, said: str) -> None:
    gpus, sources = stand_in(extra, deadline_s=2.0)
    assert gpus == ()
    assert said in sources["gpus"]


@linux_only
def test_a_raising_or_missing_sensor_costs_only_itself(stand_in: Any) -> None:
    gpus, sources = stand_in(
        "\ndef nvmlDeviceGetMemoryInfo(gpu): raise NVMLError('Not Supported')\n"
        "del nvmlDeviceGetMemoryBusWidth\n"
    )
    assert gpus[0].vram_total_bytes is gpus[0].vram_free_bytes is gpus[0].rated_bandwidth_bps is None
    assert gpus[0].driver == "580.65"
    assert sources["gpus.0.vram_total_bytes"] == "NVML: Not Supported"


@linux_only
@pytest.mark.parametrize(
    ("environ", "buses"),
    [
        ({}, ["0000:01:00.0", "0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, ["0000:02:00.0", "0000:01:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-11"}, ["0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, ["0000:01:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, []),
    ],
)
def test_only_gpus_cuda_will_show_are_listed(
    stand_in: Any, environ: dict[str, str], buses: list[str]
) -> None:
    gpus, _ = stand_in(environ=environ)
    assert [gpu.pci_bus_id for gpu in gpus] == buses
    assert [gpu.index for gpu in gpus] == list(range(len(buses)))


def card(name: str, bus: str, cores: int) -> dict[str, Any]:
    return {"name": name, "pci_bus_id": bus, "cores": cores, "core_clock": 2500, "vram_total": 8 * GIB}


def test_unequal_cards_are_numbered_fastest_first_unless_told_otherwise() -> None:
    report = NvmlReport(
        values=[card("slow", "0:1:0.0", 3000), card("fast", "0:2:0.0", 9000)], errors=[{}, {}]
    )
    by_speed = judge_gpus(report, Sources(), {"CUDA_VISIBLE_DEVICES": "0"})
    by_bus = judge_gpus(report, Sources(), {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [gpu.name for gpu in by_speed] == ["fast"]
    assert [gpu.name for gpu in by_bus] == ["slow"]


@pytest.mark.parametrize("lie", [0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, -1, "[N/A]", None, 1.5, []])
def test_absurd_readings_become_none_with_a_note(lie: object) -> None:
    keys = (
        "vram_total",
        "vram_free",
        "pcie_gen",
        "pcie_width",
        "memory_clock",
        "compute_capability",
        "driver",
    )
    sources = Sources()
    (gpu,) = judge_gpus(
        NvmlReport([{**card("x", "0:1:0.0", 1), **dict.fromkeys(keys, lie)}], [{}]), sources, {}
    )
    assert gpu.vram_total_bytes is gpu.vram_free_bytes is gpu.rated_bandwidth_bps is None
    assert gpu.pcie_gen is gpu.pcie_width is gpu.compute_capability is gpu.driver is None
    assert sources["gpus.0.pcie_gen"] == f"NVML reads {lie!r}, which cannot be"


any_reading = (
    st.none() | st.integers() | st.text(max_size=20) | st.lists(st.integers(), max_size=3) | st.floats()
)


@given(st.dictionaries(st.sampled_from([*card("", "", 0), "vram_free", "uuid", "pcie_gen"]), any_reading))
def test_whatever_nvml_says_free_memory_never_exceeds_total(readings: dict[str, Any]) -> None:
    sources = Sources()
    (gpu,) = judge_gpus(NvmlReport([readings], [{}]), sources, {})
    assert gpu.vram_free_bytes is None or 0 < gpu.vram_free_bytes <= (gpu.vram_total_bytes or 0)
    told = [path for path, value in facts(Machine(gpus=(gpu,))) if path.startswith("gpus") and value]
    assert all(sources[path] for path in told)


def test_bus_ids_of_nvml_and_of_the_engine_agree() -> None:
    assert normal_bus_id("00000000:0A:00.0") == normal_bus_id("0000:0a:00.0") == "0000:0a:00.0"
    assert normal_bus_id("[N/A]") is normal_bus_id(None) is None


def test_reading_without_a_driver_reports_why() -> None:
    report = read_nvml(20.0)
    assert report.values or report.problem
